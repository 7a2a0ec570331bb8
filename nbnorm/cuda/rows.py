"""Rows on the GPU: S is large. A block takes `per` vectors of one channel, a chunk of it.

The vectors of a channel are numbered through all its planes; vector v lies in sample v // vectors.
To a kernel a tensor comes as its memory, the stride of n and that of c, in values. From there on it
is a view of one channel: (memory, vectors, stride of n, where the channel begins), or, where a
block has put a chunk aside in shared memory, (slab, per, first, where the chunk begins).

What is done with a chunk is written once, and compiled for either way of reading it: sums, and
with them all bits, are the same.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from numba import cuda
from numba.cuda import types

from nbnorm.cuda.channel import coefficients, finish_moments, finishing
from nbnorm.cuda.intrinsics import STORAGE, memory_of, quotient
from nbnorm.cuda.jit import device, kernel
from nbnorm.cuda.plan import STORED_AS_ZERO, UNROLL
from nbnorm.cuda.values import (
    WARP,
    block_sum,
    centred,
    gradients_of,
    moments_of,
    normalised,
    passed,
    rectified,
)


def build(dtype: str, width: int) -> SimpleNamespace:
    """Kernels for tensors of a dtype that are read and written `width` values at a time."""
    computed = STORAGE[dtype].computed
    load, store = memory_of(dtype, width)
    load_one, _ = memory_of(dtype, 1)
    # Vectors under way where two or three tensors are read at once.
    few = UNROLL if width <= 4 else UNROLL // 2
    size, pair_size = UNROLL * width, few * width
    moments, gradients = moments_of(computed, size, 1), gradients_of(computed, pair_size, 1)
    of = coefficients(computed)
    affine, scale_of, factor, gradient = of.affine, of.scale_of, of.factor, of.gradient
    finish_gradients = finishing(computed)
    zero, least = computed(0), computed(STORED_AS_ZERO.get(dtype, 0.0))

    @device
    def located(block, total, per, chunks):
        """Channel, chunk of it, and the vectors from which and before which that reaches."""
        c = quotient(block, chunks)
        k = block - c * chunks
        return c, k, k * per, min((k + 1) * per, total)

    @device
    def place(view, i):
        """Where vector i of a channel begins."""
        _, vectors, n_stride, start = view
        n = quotient(i, vectors)
        return n * n_stride + start + (i - n * vectors) * width

    @device
    def fetch(view, unroll, i, end, values):
        """Load `unroll` vectors from i on, a block apart; how many values there are before end."""
        count = 0
        for r in range(unroll):
            j = i + r * cuda.blockDim.x
            if j < end:
                load(view[0], place(view, j), values, r * width)
                count += width
        return count

    @device
    def keep(kept, unroll, i, end, values):
        """Put aside what was fetched, neighbours side by side."""
        slab, per, first, start = kept
        for r in range(unroll):
            j = i + r * cuda.blockDim.x
            if j < end:
                for w in range(width):
                    slab[start + w * per + j - first] = values[r * width + w]

    @device
    def recall(kept, unroll, i, end, values):
        """Load what was kept, as `fetch` loads what was not."""
        slab, per, first, start = kept
        for r in range(unroll):
            j = i + r * cuda.blockDim.x
            if j < end:
                for w in range(width):
                    values[r * width + w] = slab[start + w * per + j - first]

    @device
    def drop(kept, unroll, i, end, values):
        """Keep nothing."""

    @device
    def first_value(x, start):
        """The channel's first value, in float64."""
        value = cuda.local.array(1, computed)
        load_one(x, start, value, 0)
        return types.float64(value[0])

    @device
    def put(partial, C, c, k, chunks, s, t, shared):
        """Add two sums up over the block; they go to partial[:, c, k]."""
        s = block_sum(s, shared)
        t = block_sum(t, shared)
        if cuda.threadIdx.x == 0:
            partial[c * chunks + k] = s
            partial[(C + c) * chunks + k] = t

    def summing(keep: Any) -> Any:
        @device
        def moments_of_chunk(x, kept, first, end, shift):
            """sum d and sum d^2 of this thread's values, d = x - shift."""
            values = cuda.local.array(size, computed)
            s = 0.0
            q = 0.0
            i = first + cuda.threadIdx.x
            while i < end:
                count = fetch(x, UNROLL, i, end, values)
                keep(kept, UNROLL, i, end, values)
                s_more, q_more = moments(values, 0, count, shift)
                s += s_more
                q += q_more
                i += UNROLL * cuda.blockDim.x
            return s, q

        return moments_of_chunk

    def normalising(fetch_x: Any) -> Any:
        @device
        def normalise_chunk(x, residual, y, first, end, hi, u, a, b, low, added):
            """y = act((x u - hi) a + b [+ residual])."""
            values = cuda.local.array(pair_size, computed)
            more = cuda.local.array(pair_size, computed)
            i = first + cuda.threadIdx.x
            while i < end:
                fetch_x(x, few, i, end, values)
                if added:
                    fetch(residual, few, i, end, more)
                for r in range(few):
                    j = i + r * cuda.blockDim.x
                    if j < end:
                        for w in range(r * width, (r + 1) * width):
                            value = normalised(values[w], hi, u, a, b)
                            if added:
                                value += more[w]
                            values[w] = rectified(value, low)
                        store(y[0], place(y, j), values, r * width)
                i += few * cuda.blockDim.x

        return normalise_chunk

    def reducing(keep: Any) -> Any:
        @device
        def gradients_of_chunk(dy, x, y, kept_g, kept_x, first, end, hi, u, a, b, scale, masked):
            """Sums of g and of g (x u - hi) scale of this thread's values, g = dy past ReLU."""
            g = cuda.local.array(pair_size, computed)
            values = cuda.local.array(pair_size, computed)
            outputs = cuda.local.array(pair_size, computed)
            s = 0.0
            t = 0.0
            i = first + cuda.threadIdx.x
            while i < end:
                count = fetch(dy, few, i, end, g)
                fetch(x, few, i, end, values)
                if masked == 2:
                    fetch(y, few, i, end, outputs)
                if masked:
                    for w in range(pair_size):
                        g[w] = passed(g[w], values[w], outputs[w], hi, u, a, b, masked, least, zero)
                keep(kept_g, few, i, end, g)
                keep(kept_x, few, i, end, values)
                s_more, t_more = gradients(g, values, 0, count, hi, u, scale)
                s += s_more
                t += t_more
                i += few * cuda.blockDim.x
            return s, t

        return gradients_of_chunk

    def differentiating(fetch_g: Any) -> Any:
        @device
        def differentiate_chunk(
            dy, x, y, dx, dresidual, first, end,
            hi, u, a, b, h, p, q, v, f, masked, training, outs,
        ):  # fmt: skip
            """dx (outs & 1) and dresidual (outs & 2) of dy, or of dy past ReLU and masked 0."""
            g = cuda.local.array(pair_size, computed)
            values = cuda.local.array(pair_size, computed)
            outputs = cuda.local.array(pair_size, computed)
            i = first + cuda.threadIdx.x
            while i < end:
                fetch_g(dy, few, i, end, g)
                fetch_g(x, few, i, end, values)
                if masked == 2:
                    fetch(y, few, i, end, outputs)
                for r in range(few):
                    j = i + r * cuda.blockDim.x
                    if j < end:
                        if masked:
                            for w in range(r * width, (r + 1) * width):
                                g[w] = passed(
                                    g[w], values[w], outputs[w], hi, u, a, b, masked, least, zero
                                )
                        if outs & 2:
                            store(dresidual[0], place(dresidual, j), g, r * width)
                        if outs & 1:
                            for w in range(r * width, (r + 1) * width):
                                d = centred(g[w], values[w], hi, u, h, p, q, v, training)
                                values[w] = f * d
                            store(dx[0], place(dx, j), values, r * width)
                i += few * cuda.blockDim.x

        return differentiate_chunk

    moments_of_chunk, normalise_chunk = summing(drop), normalising(fetch)
    gradients_of_chunk, differentiate_chunk = reducing(drop), differentiating(fetch)

    @kernel(3)
    def stats(x, xn, xc, C, vectors, total, per, chunks, partial, mean, again):
        """partial[:, c, k] = sum d, sum d^2 of chunk k, d = x - K; mean[c] = K, or K = mean[c]."""
        c, k, first, end = located(cuda.blockIdx.x, total, per, chunks)
        shared = cuda.shared.array(WARP, types.float64)
        shift = mean[c] if again else first_value(x, c * xc)
        s, q = moments_of_chunk((x, vectors, xn, c * xc), 0, first, end, shift)
        put(partial, C, c, k, chunks, s, q, shared)
        if cuda.threadIdx.x == 0 and k == 0 and not again:
            mean[c] = shift

    @kernel()
    def apply(
        x, xn, xc, residual, rn, rc, y, yn, yc, C, vectors, total, per, chunks,
        mean, rstd, gamma, beta, floor, added,
    ):  # fmt: skip
        """y = act(gamma (x - mean) rstd + beta [+ residual]).

        From the last block to the first: what the statistics read last is still in the cache.
        """
        c, _, first, end = located(cuda.gridDim.x - 1 - cuda.blockIdx.x, total, per, chunks)
        hi, u, a, b = affine(mean, rstd, gamma, beta, c)
        normalise_chunk(
            (x, vectors, xn, c * xc), (residual, vectors, rn, c * rc), (y, vectors, yn, c * yc),
            first, end, hi, u, a, b, computed(floor), added,
        )  # fmt: skip

    @kernel(2)
    def reduce(
        dy, dyn, dyc, x, xn, xc, y, yn, yc, C, vectors, total, per, chunks,
        mean, rstd, gamma, beta, masked, partial,
    ):  # fmt: skip
        """partial[:, c, k] = sum dy, sum dy (x u - hi) scale of chunk k."""
        c, k, first, end = located(cuda.blockIdx.x, total, per, chunks)
        shared = cuda.shared.array(WARP, types.float64)
        hi, u, a, b = affine(mean, rstd, gamma, beta, c)
        s, t = gradients_of_chunk(
            (dy, vectors, dyn, c * dyc), (x, vectors, xn, c * xc), (y, vectors, yn, c * yc), 0, 0,
            first, end, hi, u, a, b, scale_of(rstd, u, c), masked,
        )  # fmt: skip
        put(partial, C, c, k, chunks, s, t, shared)

    @kernel(2)
    def differentiate(
        dy, dyn, dyc, x, xn, xc, y, yn, yc, dx, dxn, dxc, dresidual, rn, rc,
        C, vectors, total, per, chunks,
        mean, rstd, gamma, beta, sums, count, masked, training, outs,
    ):  # fmt: skip
        """dx (outs & 1) and dresidual (outs & 2); not training: statistics are constants."""
        c, _, first, end = located(cuda.gridDim.x - 1 - cuda.blockIdx.x, total, per, chunks)
        hi, u, a, b = affine(mean, rstd, gamma, beta, c)
        v, f = factor(rstd, gamma, sums, C, count, u, training, c)
        h, p, q = zero, zero, zero
        if training:
            h, p, q = gradient(mean, rstd, sums, C, count, u, v, c)
        differentiate_chunk(
            (dy, vectors, dyn, c * dyc), (x, vectors, xn, c * xc), (y, vectors, yn, c * yc),
            (dx, vectors, dxn, c * dxc), (dresidual, vectors, rn, c * rc),
            first, end, hi, u, a, b, h, p, q, v, f, masked, training, outs,
        )  # fmt: skip

    keep_moments, normalise_kept = summing(keep), normalising(recall)
    keep_gradients, differentiate_kept = reducing(keep), differentiating(recall)

    def resident(together: Any) -> SimpleNamespace:
        """Kernels that read memory once: `blocks` blocks keep a channel, `each` chunks a block.

        `together` has the blocks of a channel wait for each other.
        """

        @kernel(3)
        def forward(
            x, xn, xc, residual, rn, rc, y, yn, yc, C, vectors, total, per, chunks, blocks, each,
            m, eps, partial, mean, m2, rstd, gamma, beta, floor, added,
        ):  # fmt: skip
            """`stats`, `finish` and `apply`."""
            slab = cuda.shared.array(0, computed)
            shared = cuda.shared.array(WARP, types.float64)
            c = quotient(cuda.blockIdx.x, blocks)
            begin = (cuda.blockIdx.x - c * blocks) * each
            stop = min(begin + each, chunks)
            shift = first_value(x, c * xc)
            k = begin
            while k < stop:
                first, end = k * per, min((k + 1) * per, total)
                kept = slab, per, first, (k - begin) * per * width
                s, q = keep_moments((x, vectors, xn, c * xc), kept, first, end, shift)
                put(partial, C, c, k, chunks, s, q, shared)
                k += 1
            if cuda.threadIdx.x == 0 and begin == 0:
                mean[c] = shift
            together()
            if cuda.threadIdx.x < WARP and begin == 0:
                finish_moments(partial, c, C, chunks, m, eps, mean, m2, rstd)
            together()
            hi, u, a, b = affine(mean, rstd, gamma, beta, c)
            k = begin
            while k < stop:
                first, end = k * per, min((k + 1) * per, total)
                kept = slab, per, first, (k - begin) * per * width
                normalise_kept(
                    kept, (residual, vectors, rn, c * rc), (y, vectors, yn, c * yc),
                    first, end, hi, u, a, b, computed(floor), added,
                )  # fmt: skip
                k += 1

        @kernel(1)
        def backward(
            dy, dyn, dyc, x, xn, xc, y, yn, yc, dx, dxn, dxc, dresidual, rn, rc,
            C, vectors, total, per, chunks, blocks, each,
            mean, rstd, gamma, beta, partial, sums, count, masked, outs,
        ):  # fmt: skip
            """`reduce`, `finish_sums` and `differentiate`."""
            slab = cuda.shared.array(0, computed)
            shared = cuda.shared.array(WARP, types.float64)
            c = quotient(cuda.blockIdx.x, blocks)
            begin = (cuda.blockIdx.x - c * blocks) * each
            stop = min(begin + each, chunks)
            half = each * per * width  # of the slab: g, then x
            hi, u, a, b = affine(mean, rstd, gamma, beta, c)
            scale = scale_of(rstd, u, c)
            y_view = y, vectors, yn, c * yc
            k = begin
            while k < stop:
                first, end = k * per, min((k + 1) * per, total)
                start = (k - begin) * per * width
                s, t = keep_gradients(
                    (dy, vectors, dyn, c * dyc), (x, vectors, xn, c * xc), y_view,
                    (slab, per, first, start), (slab, per, first, start + half),
                    first, end, hi, u, a, b, scale, masked,
                )  # fmt: skip
                put(partial, C, c, k, chunks, s, t, shared)
                k += 1
            together()
            if cuda.threadIdx.x < WARP and begin == 0:
                finish_gradients(partial, c, C, chunks, mean, rstd, sums)
            together()
            v, f = factor(rstd, gamma, sums, C, count, u, True, c)
            h, p, q = gradient(mean, rstd, sums, C, count, u, v, c)
            k = begin
            while k < stop:
                first, end = k * per, min((k + 1) * per, total)
                start = (k - begin) * per * width
                differentiate_kept(
                    (slab, per, first, start), (slab, per, first, start + half), y_view,
                    (dx, vectors, dxn, c * dxc), (dresidual, vectors, rn, c * rc),
                    first, end, hi, u, a, b, h, p, q, v, f, 0, True, outs,
                )  # fmt: skip
                k += 1

        return SimpleNamespace(forward=forward, backward=backward)

    return SimpleNamespace(
        stats=stats, apply=apply, reduce=reduce, differentiate=differentiate, resident=resident
    )
