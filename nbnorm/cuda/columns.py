"""Columns on the GPU: S is small. A block takes `group` channels, side by side, of `per` samples.

The columns of a group are read by `lanes` threads, `width` columns each, and as many samples at a
time as the block has threads for. Each column has sums of its own; those of a channel are added up
in shared memory. x[n] is contiguous; a tensor comes as its memory and the stride of n, in values.
"""

from __future__ import annotations

from types import SimpleNamespace

from numba import cuda
from numba.cuda import types

from nbnorm.cuda.channel import coefficients
from nbnorm.cuda.intrinsics import STORAGE, memory_of, quotient
from nbnorm.cuda.jit import device, kernel
from nbnorm.cuda.plan import STORED_AS_ZERO, THREADS, UNROLL
from nbnorm.cuda.values import (
    WARP,
    gradients_of,
    moments_of,
    normalised,
    passed,
    rectified,
    warp_sum,
)

SHORT = 8  # columns of a channel that one thread adds up by itself


def build(dtype: str, width: int) -> SimpleNamespace:
    """Kernels for tensors of a dtype that are read and written `width` values at a time."""
    computed = STORAGE[dtype].computed
    load, store = memory_of(dtype, width)
    load_one, _ = memory_of(dtype, 1)
    # Vectors under way where two or three tensors are read at once.
    few = UNROLL if width <= 4 else UNROLL // 2
    fewer = UNROLL if width <= 4 else 1
    size, pair_size, fewer_size = UNROLL * width, few * width, fewer * width
    moments, gradients = moments_of(computed, UNROLL, width), gradients_of(computed, fewer, width)
    affine, unit_of, gradient = coefficients(computed)
    zero, least = computed(0), computed(STORED_AS_ZERO.get(dtype, 0.0))
    cells = THREADS * width

    @device
    def located(C, S, N, group, lanes, per, chunks, block):
        """First channel, chunk, columns, this thread's row and column, its samples, their step.

        A thread that has no column has no samples.
        """
        groups = quotient(block, chunks)
        k = block - groups * chunks
        c0 = groups * group
        columns = min(group, C - c0) * S
        row = quotient(cuda.threadIdx.x, lanes)
        column = (cuda.threadIdx.x - row * lanes) * width
        at_once = quotient(cuda.blockDim.x, lanes)
        end = min((k + 1) * per, N) if row < at_once and column < columns else 0
        return c0, k, columns, row, column, k * per + row, end, at_once

    @device
    def fetch(memory, unroll, n, end, at_once, n_stride, offset, values):
        """Load `unroll` samples from n on, `at_once` apart; how many there are before end."""
        count = 0
        for u in range(unroll):
            i = n + u * at_once
            if i < end:
                load(memory, i * n_stride + offset, values, u * width)
                count += 1
        return count

    @device
    def by_channel(sums, shared, S, columns, row, column, at_once, chunks, k, partial):
        """Add up the columns of each channel into partial[c, k], first over rows, then over S."""
        cuda.syncthreads()
        if row < at_once and column < columns:
            for w in range(width):
                shared[row * columns + column + w] = sums[w]
        cuda.syncthreads()
        j = cuda.threadIdx.x
        while j < columns:
            total = 0.0
            for i in range(at_once):
                total += shared[i * columns + j]
            shared[j] = total
            j += cuda.blockDim.x
        cuda.syncthreads()
        channels = quotient(columns, S)
        if S <= SHORT:
            c = cuda.threadIdx.x
            while c < channels:
                total = 0.0
                for i in range(S):
                    total += shared[c * S + i]
                partial[c * chunks + k] = total
                c += cuda.blockDim.x
        else:
            c = cuda.threadIdx.x // WARP
            while c < channels:
                total = 0.0
                for i in range(cuda.threadIdx.x % WARP, S, WARP):
                    total += shared[c * S + i]
                total = warp_sum(total)
                if cuda.threadIdx.x % WARP == 0:
                    partial[c * chunks + k] = total
                c += cuda.blockDim.x // WARP

    @kernel(2)
    def stats(x, xn, C, S, N, group, lanes, per, chunks, partial, mean, again):
        """partial[:, c, k] = sum d, sum d^2 of chunk k, d = x - K; mean[c] = K, or K = mean[c]."""
        c0, k, columns, row, column, begin, end, at_once = located(
            C, S, N, group, lanes, per, chunks, cuda.blockIdx.x
        )
        shared = cuda.shared.array(cells, types.float64)
        values = cuda.local.array(size, computed)
        shift = cuda.local.array(width, types.float64)
        s = cuda.local.array(width, types.float64)
        q = cuda.local.array(width, types.float64)
        for w in range(width):
            s[w] = 0.0
            q[w] = 0.0
            if begin < end:
                c = c0 + quotient(column + w, S)
                load_one(x, c * S, values, 0)
                shift[w] = mean[c] if again else types.float64(values[0])
                if begin == 0 and not again:
                    mean[c] = shift[w]
        n = begin
        while n < end:
            count = fetch(x, UNROLL, n, end, at_once, xn, c0 * S + column, values)
            for w in range(width):
                s_more, q_more = moments(values, w, count, shift[w])
                s[w] += s_more
                q[w] += q_more
            n += UNROLL * at_once
        by_channel(s, shared, S, columns, row, column, at_once, chunks, c0 * chunks + k, partial)
        by_channel(
            q, shared, S, columns, row, column, at_once, chunks, (C + c0) * chunks + k, partial
        )

    @kernel(2)
    def apply(
        x, xn, residual, rn, y, yn, C, S, N, group, lanes, per, chunks,
        mean, rstd, gamma, beta, floor, added,
    ):  # fmt: skip
        """y = act(gamma (x - mean) rstd + beta [+ residual]), the last block first."""
        c0, _, _, _, column, begin, end, at_once = located(
            C, S, N, group, lanes, per, chunks, cuda.gridDim.x - 1 - cuda.blockIdx.x
        )
        values = cuda.local.array(pair_size, computed)
        more = cuda.local.array(pair_size, computed)
        hi = cuda.local.array(width, computed)
        a = cuda.local.array(width, computed)
        b = cuda.local.array(width, computed)
        if begin < end:
            for w in range(width):
                c = c0 + quotient(column + w, S)
                hi[w], a[w], b[w] = affine(mean, rstd, gamma, beta, c)
        low = computed(floor)
        offset = c0 * S + column
        n = begin
        while n < end:
            fetch(x, few, n, end, at_once, xn, offset, values)
            if added:
                fetch(residual, few, n, end, at_once, rn, offset, more)
            for u in range(few):
                i = n + u * at_once
                if i < end:
                    for w in range(width):
                        value = normalised(values[u * width + w], hi[w], a[w], b[w])
                        if added:
                            value += more[u * width + w]
                        values[u * width + w] = rectified(value, low)
                    store(y, i * yn + offset, values, u * width)
            n += few * at_once

    @kernel(2)
    def reduce(
        dy, dyn, x, xn, y, yn, C, S, N, group, lanes, per, chunks,
        mean, rstd, gamma, beta, masked, partial,
    ):  # fmt: skip
        """partial[:, c, k] = sum dy, sum dy (x - hi) unit of chunk k."""
        c0, k, columns, row, column, begin, end, at_once = located(
            C, S, N, group, lanes, per, chunks, cuda.blockIdx.x
        )
        shared = cuda.shared.array(cells, types.float64)
        g = cuda.local.array(fewer_size, computed)
        values = cuda.local.array(fewer_size, computed)
        outputs = cuda.local.array(fewer_size, computed)
        hi = cuda.local.array(width, computed)
        a = cuda.local.array(width, computed)
        b = cuda.local.array(width, computed)
        unit = cuda.local.array(width, computed)
        s = cuda.local.array(width, types.float64)
        t = cuda.local.array(width, types.float64)
        for w in range(width):
            s[w] = 0.0
            t[w] = 0.0
            if begin < end:
                c = c0 + quotient(column + w, S)
                hi[w], a[w], b[w] = affine(mean, rstd, gamma, beta, c)
                unit[w] = unit_of(rstd, c)
        offset = c0 * S + column
        n = begin
        while n < end:
            count = fetch(dy, fewer, n, end, at_once, dyn, offset, g)
            fetch(x, fewer, n, end, at_once, xn, offset, values)
            if masked == 2:
                fetch(y, fewer, n, end, at_once, yn, offset, outputs)
            if masked:
                for u in range(fewer):
                    for w in range(width):
                        j = u * width + w
                        g[j] = passed(
                            g[j], values[j], outputs[j], hi[w], a[w], b[w], masked, least, zero
                        )
            for w in range(width):
                s_more, t_more = gradients(g, values, w, count, hi[w], unit[w])
                s[w] += s_more
                t[w] += t_more
            n += fewer * at_once
        by_channel(s, shared, S, columns, row, column, at_once, chunks, c0 * chunks + k, partial)
        by_channel(
            t, shared, S, columns, row, column, at_once, chunks, (C + c0) * chunks + k, partial
        )

    @kernel(2)
    def differentiate(
        dy, dyn, x, xn, y, yn, dx, dxn, dresidual, rn, C, S, N, group, lanes, per, chunks,
        mean, rstd, gamma, beta, sums, count, masked, training, outs,
    ):  # fmt: skip
        """dx (outs & 1) and dresidual (outs & 2); not training: statistics are constants."""
        c0, _, _, _, column, begin, end, at_once = located(
            C, S, N, group, lanes, per, chunks, cuda.gridDim.x - 1 - cuda.blockIdx.x
        )
        g = cuda.local.array(pair_size, computed)
        values = cuda.local.array(pair_size, computed)
        outputs = cuda.local.array(pair_size, computed)
        hi = cuda.local.array(width, computed)
        a = cuda.local.array(width, computed)
        b = cuda.local.array(width, computed)
        h = cuda.local.array(width, computed)
        p = cuda.local.array(width, computed)
        q = cuda.local.array(width, computed)
        if begin < end:
            for w in range(width):
                c = c0 + quotient(column + w, S)
                hi[w], a[w], b[w] = affine(mean, rstd, gamma, beta, c)
                if training:
                    h[w], p[w], q[w] = gradient(mean, rstd, sums, C, count, c)
        offset = c0 * S + column
        n = begin
        while n < end:
            fetch(dy, few, n, end, at_once, dyn, offset, g)
            fetch(x, few, n, end, at_once, xn, offset, values)
            if masked == 2:
                fetch(y, few, n, end, at_once, yn, offset, outputs)
            for u in range(few):
                i = n + u * at_once
                if i < end:
                    for w in range(width):
                        j = u * width + w
                        if masked:
                            g[j] = passed(
                                g[j], values[j], outputs[j], hi[w], a[w], b[w], masked, least, zero
                            )
                    if outs & 2:
                        store(dresidual, i * rn + offset, g, u * width)
                    if outs & 1:
                        for w in range(width):
                            j = u * width + w
                            d = g[j]
                            if training:
                                d = (d - h[w]) - normalised(values[j], hi[w], p[w], q[w])
                            values[j] = a[w] * d
                        store(dx, i * dxn + offset, values, u * width)
            n += few * at_once

    return SimpleNamespace(
        stats=stats, apply=apply, reduce=reduce, differentiate=differentiate
    )  # fmt: skip
