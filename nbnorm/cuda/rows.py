"""Rows on the GPU: S is large. A block takes `per` vectors of one channel.

The vectors of a channel are numbered through all its planes; vector v lies in sample v // vectors.
A tensor comes as its memory, the stride of n and that of c, in values; `per`, `chunks` and the
rest as in plan.py.
"""

from __future__ import annotations

from types import SimpleNamespace

from numba import cuda
from numba.cuda import types

from nbnorm.cuda.channel import coefficients
from nbnorm.cuda.intrinsics import STORAGE, memory_of, quotient
from nbnorm.cuda.jit import device, kernel
from nbnorm.cuda.plan import STORED_AS_ZERO, UNROLL
from nbnorm.cuda.values import block_sum, gradients_of, moments_of, normalised, passed, rectified


def build(dtype: str, width: int) -> SimpleNamespace:
    """Kernels for tensors of a dtype that are read and written `width` values at a time."""
    computed = STORAGE[dtype].computed
    load, store = memory_of(dtype, width)
    load_one, _ = memory_of(dtype, 1)
    # Vectors under way where two or three tensors are read at once.
    few = UNROLL if width <= 4 else UNROLL // 2
    size, pair_size = UNROLL * width, few * width
    moments, gradients = moments_of(computed, size, 1), gradients_of(computed, pair_size, 1)
    affine, unit_of, gradient = coefficients(computed)
    zero, least = computed(0), computed(STORED_AS_ZERO.get(dtype, 0.0))

    @device
    def place(v, vectors, n_stride, c_offset):
        """Where vector v of a channel begins."""
        n = quotient(v, vectors)
        return n * n_stride + c_offset + (v - n * vectors) * width

    @device
    def fetch(memory, unroll, v, end, vectors, n_stride, c_offset, values):
        """Load `unroll` vectors from v on, a block apart; how many values there are before end."""
        count = 0
        for u in range(unroll):
            j = v + u * cuda.blockDim.x
            if j < end:
                load(memory, place(j, vectors, n_stride, c_offset), values, u * width)
                count += width
        return count

    @kernel(3)
    def stats(x, xn, xc, C, vectors, total, per, chunks, partial, mean, again):
        """partial[:, c, k] = sum d, sum d^2 of chunk k, d = x - K; mean[c] = K, or K = mean[c]."""
        c = quotient(cuda.blockIdx.x, chunks)
        k = cuda.blockIdx.x - c * chunks
        shared = cuda.shared.array(32, types.float64)
        values = cuda.local.array(size, computed)
        load_one(x, c * xc, values, 0)
        shift = mean[c] if again else types.float64(values[0])
        first = k * per
        end = min(first + per, total)
        s = 0.0
        q = 0.0
        v = first + cuda.threadIdx.x
        while v < end:
            count = fetch(x, UNROLL, v, end, vectors, xn, c * xc, values)
            s_more, q_more = moments(values, 0, count, shift)
            s += s_more
            q += q_more
            v += UNROLL * cuda.blockDim.x
        s = block_sum(s, shared)
        q = block_sum(q, shared)
        if cuda.threadIdx.x == 0:
            partial[c * chunks + k] = s
            partial[(C + c) * chunks + k] = q
            if k == 0 and not again:
                mean[c] = shift

    @kernel()
    def apply(
        x, xn, xc, residual, rn, rc, y, yn, yc, C, vectors, total, per, chunks,
        mean, rstd, gamma, beta, floor, added,
    ):  # fmt: skip
        """y = act(gamma (x - mean) rstd + beta [+ residual]).

        From the last block to the first: what the statistics read last is still in the cache.
        """
        block = cuda.gridDim.x - 1 - cuda.blockIdx.x
        c = quotient(block, chunks)
        first = (block - c * chunks) * per
        end = min(first + per, total)
        values = cuda.local.array(pair_size, computed)
        more = cuda.local.array(pair_size, computed)
        hi, a, b = affine(mean, rstd, gamma, beta, c)
        low = computed(floor)
        v = first + cuda.threadIdx.x
        while v < end:
            fetch(x, few, v, end, vectors, xn, c * xc, values)
            if added:
                fetch(residual, few, v, end, vectors, rn, c * rc, more)
            for u in range(few):
                j = v + u * cuda.blockDim.x
                if j < end:
                    for w in range(width):
                        value = normalised(values[u * width + w], hi, a, b)
                        if added:
                            value += more[u * width + w]
                        values[u * width + w] = rectified(value, low)
                    store(y, place(j, vectors, yn, c * yc), values, u * width)
            v += few * cuda.blockDim.x

    @kernel(2)
    def reduce(
        dy, dyn, dyc, x, xn, xc, y, yn, yc, C, vectors, total, per, chunks,
        mean, rstd, gamma, beta, masked, partial,
    ):  # fmt: skip
        """partial[:, c, k] = sum dy, sum dy (x - hi) unit of chunk k."""
        c = quotient(cuda.blockIdx.x, chunks)
        k = cuda.blockIdx.x - c * chunks
        shared = cuda.shared.array(32, types.float64)
        g = cuda.local.array(pair_size, computed)
        values = cuda.local.array(pair_size, computed)
        outputs = cuda.local.array(pair_size, computed)
        first = k * per
        end = min(first + per, total)
        hi, a, b = affine(mean, rstd, gamma, beta, c)
        unit = unit_of(rstd, c)
        s = 0.0
        t = 0.0
        v = first + cuda.threadIdx.x
        while v < end:
            count = fetch(dy, few, v, end, vectors, dyn, c * dyc, g)
            fetch(x, few, v, end, vectors, xn, c * xc, values)
            if masked == 2:
                fetch(y, few, v, end, vectors, yn, c * yc, outputs)
            if masked:
                for w in range(pair_size):
                    g[w] = passed(g[w], values[w], outputs[w], hi, a, b, masked, least, zero)
            s_more, t_more = gradients(g, values, 0, count, hi, unit)
            s += s_more
            t += t_more
            v += few * cuda.blockDim.x
        s = block_sum(s, shared)
        t = block_sum(t, shared)
        if cuda.threadIdx.x == 0:
            partial[c * chunks + k] = s
            partial[(C + c) * chunks + k] = t

    @kernel(2)
    def differentiate(
        dy, dyn, dyc, x, xn, xc, y, yn, yc, dx, dxn, dxc, dresidual, rn, rc,
        C, vectors, total, per, chunks,
        mean, rstd, gamma, beta, sums, count, masked, training, outs,
    ):  # fmt: skip
        """dx (outs & 1) and dresidual (outs & 2); not training: statistics are constants."""
        block = cuda.gridDim.x - 1 - cuda.blockIdx.x
        c = quotient(block, chunks)
        first = (block - c * chunks) * per
        end = min(first + per, total)
        g = cuda.local.array(pair_size, computed)
        values = cuda.local.array(pair_size, computed)
        outputs = cuda.local.array(pair_size, computed)
        hi, a, b = affine(mean, rstd, gamma, beta, c)
        h, p, q = zero, zero, zero
        if training:
            h, p, q = gradient(mean, rstd, sums, C, count, c)
        v = first + cuda.threadIdx.x
        while v < end:
            fetch(dy, few, v, end, vectors, dyn, c * dyc, g)
            fetch(x, few, v, end, vectors, xn, c * xc, values)
            if masked == 2:
                fetch(y, few, v, end, vectors, yn, c * yc, outputs)
            for u in range(few):
                j = v + u * cuda.blockDim.x
                if j < end:
                    if masked:
                        for w in range(u * width, (u + 1) * width):
                            g[w] = passed(
                                g[w], values[w], outputs[w], hi, a, b, masked, least, zero
                            )
                    if outs & 2:
                        store(dresidual, place(j, vectors, rn, c * rc), g, u * width)
                    if outs & 1:
                        for w in range(u * width, (u + 1) * width):
                            d = g[w]
                            if training:
                                d = (d - h) - normalised(values[w], hi, p, q)
                            values[w] = a * d
                        store(dx, place(j, vectors, dxn, c * dxc), values, u * width)
            v += few * cuda.blockDim.x

    return SimpleNamespace(
        stats=stats, apply=apply, reduce=reduce, differentiate=differentiate
    )  # fmt: skip
