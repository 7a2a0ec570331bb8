"""Columns on the GPU: S is small. A block takes `group` channels, side by side, of `per` samples.

The columns of a group are read by `lanes` threads, `width` columns each, and as many samples at a
time as the block has threads for: `at_once`. Each column has sums of its own; those of a channel
are added up in shared memory. x[n] is contiguous; to a kernel a tensor comes as its memory and the
stride of n, in values. From there on it is a view of a thread's columns: (memory, stride of n,
where they begin), or, where a block has put a chunk aside in shared memory, `kept_at`.

What is done with a chunk is written once, as in rows.py, and with units of 1. A thread one of whose
columns needs others goes through its columns one after the other: `normalise_singly` and so on.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from numba import cuda
from numba.cuda import types

from nbnorm.cuda.channel import coefficients, finish_moments, finishing
from nbnorm.cuda.intrinsics import STORAGE, memory_of, quotient
from nbnorm.cuda.jit import device, kernel
from nbnorm.cuda.plan import STORED_AS_ZERO, THREADS, UNROLL
from nbnorm.cuda.values import (
    WARP,
    centred,
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
    load_one, store_one = memory_of(dtype, 1)
    # Vectors under way where two or three tensors are read at once.
    few = UNROLL if width <= 4 else UNROLL // 2
    fewer = UNROLL if width <= 4 else 1
    size, pair_size, fewer_size = UNROLL * width, few * width, fewer * width
    moments, gradients = moments_of(computed, UNROLL, width), gradients_of(computed, fewer, width)
    of = coefficients(computed)
    plain_affine, affine, scale_of = of.plain_affine, of.affine, of.scale_of
    plain_factor, factor, gradient = of.plain_factor, of.factor, of.gradient
    finish_gradients = finishing(computed)
    zero, one, least = computed(0), computed(1), computed(STORED_AS_ZERO.get(dtype, 0.0))
    cells = THREADS * width

    @device
    def located(C, S, group, lanes, g):
        """First channel and columns of a group, this thread's row and column, rows at once."""
        c0 = g * group
        columns = min(group, C - c0) * S
        row = quotient(cuda.threadIdx.x, lanes)
        column = (cuda.threadIdx.x - row * lanes) * width
        return c0, columns, row, column, quotient(cuda.blockDim.x, lanes)

    @device
    def samples(N, per, k, columns, row, column, at_once):
        """Sample from which and before which this thread reads chunk k; none without a column."""
        end = min((k + 1) * per, N) if row < at_once and column < columns else 0
        return k * per + row, end

    @device
    def kept_at(slab, per, lanes, column, k, at):
        """Where a thread keeps its part of chunk k, the `at`-th that the block keeps."""
        start = at * per * lanes * width + quotient(column, width)
        return slab, lanes, k * per, start, per * lanes

    @device
    def fetch(view, unroll, n, end, at_once, values):
        """Load `unroll` samples from n on, `at_once` apart; how many there are before end."""
        memory, n_stride, start = view
        count = 0
        for r in range(unroll):
            i = n + r * at_once
            if i < end:
                load(memory, i * n_stride + start, values, r * width)
                count += 1
        return count

    @device
    def keep(kept, unroll, n, end, at_once, values):
        """Put aside what was fetched, neighbours side by side."""
        slab, lanes, first, start, apart = kept
        for r in range(unroll):
            i = n + r * at_once
            if i < end:
                for w in range(width):
                    slab[start + w * apart + (i - first) * lanes] = values[r * width + w]

    @device
    def recall(kept, unroll, n, end, at_once, values):
        """Load what was kept, as `fetch` loads what was not."""
        slab, lanes, first, start, apart = kept
        for r in range(unroll):
            i = n + r * at_once
            if i < end:
                for w in range(width):
                    values[r * width + w] = slab[start + w * apart + (i - first) * lanes]

    @device
    def drop(kept, unroll, n, end, at_once, values):
        """Keep nothing."""

    @device
    def fetch_one(view, i, w):
        """Column w of sample i."""
        value = cuda.local.array(1, computed)
        load_one(view[0], i * view[1] + view[2] + w, value, 0)
        return value[0]

    @device
    def put_one(view, i, w, value):
        """Store column w of sample i."""
        values = cuda.local.array(1, computed)
        values[0] = value
        store_one(view[0], i * view[1] + view[2] + w, values, 0)

    @device
    def keep_one(kept, i, w, value):
        """Put aside column w of sample i."""
        slab, lanes, first, start, apart = kept
        slab[start + w * apart + (i - first) * lanes] = value

    @device
    def recall_one(kept, i, w):
        """Column w of sample i of what was kept."""
        slab, lanes, first, start, apart = kept
        return slab[start + w * apart + (i - first) * lanes]

    @device
    def drop_one(kept, i, w, value):
        """Keep nothing."""

    @device
    def first_values(x, c0, S, column, shift):
        """First values of the channels of a thread's columns, in float64."""
        value = cuda.local.array(1, computed)
        for w in range(width):
            load_one(x, (c0 + quotient(column + w, S)) * S, value, 0)
            shift[w] = types.float64(value[0])

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

    @device
    def put(s, t, shared, S, columns, row, column, at_once, C, c0, k, chunks, partial):
        """Add two sums up over the block; they go to partial[:, c, k]."""
        by_channel(s, shared, S, columns, row, column, at_once, chunks, c0 * chunks + k, partial)
        by_channel(
            t, shared, S, columns, row, column, at_once, chunks, (C + c0) * chunks + k, partial
        )

    @device
    def channel_of(mine, w):
        """Channel of column w of a thread's."""
        _, c0, S, column = mine
        return c0 + quotient(column + w, S)

    @device
    def affines(mine, hi, a, b):
        """hi, a, b of each of a thread's columns, with u = 1, and whether that will do for all."""
        (mean, rstd, gamma, beta), _, _, _ = mine
        plain = True
        for w in range(width):
            c = channel_of(mine, w)
            hi[w], a[w], b[w], fits = plain_affine(mean, rstd, gamma, beta, c)
            plain = plain and fits
        return plain

    @device
    def scales(mine, scale):
        """`scale_of` each of a thread's columns, with u = 1."""
        (_, rstd, _, _), _, _, _ = mine
        for w in range(width):
            scale[w] = scale_of(rstd, one, channel_of(mine, w))

    @device
    def gradients_each(mine, sums, C, count, h, p, q):
        """h, p, q of each of a thread's columns, with v = 1, and whether that will do for all."""
        (mean, rstd, _, _), _, _, _ = mine
        plain = True
        for w in range(width):
            c = channel_of(mine, w)
            h[w], p[w], q[w] = gradient(mean, rstd, sums, C, count, one, one, c)
            plain = plain and plain_factor(rstd, sums, C, count, c)
        return plain

    def summing(keep: Any) -> Any:
        @device
        def moments_of_chunk(x, kept, n, end, at_once, shift, s, q):
            """sum d and sum d^2 of this thread's columns, d = x - shift."""
            values = cuda.local.array(size, computed)
            for w in range(width):
                s[w] = 0.0
                q[w] = 0.0
            while n < end:
                count = fetch(x, UNROLL, n, end, at_once, values)
                keep(kept, UNROLL, n, end, at_once, values)
                for w in range(width):
                    s_more, q_more = moments(values, w, count, shift[w])
                    s[w] += s_more
                    q[w] += q_more
                n += UNROLL * at_once

        return moments_of_chunk

    def normalising(fetch_x: Any, fetch_one_x: Any) -> Any:
        @device
        def normalise_singly(x, residual, y, n, end, at_once, mine, low, added):
            """`normalise_chunk` of columns some of which need a unit, one after the other."""
            (mean, rstd, gamma, beta), _, _, _ = mine
            for w in range(width):
                hi, u, a, b = affine(mean, rstd, gamma, beta, channel_of(mine, w))
                i = n
                while i < end:
                    value = normalised(fetch_one_x(x, i, w), hi, u, a, b)
                    if added:
                        value += fetch_one(residual, i, w)
                    put_one(y, i, w, rectified(value, low))
                    i += at_once

        @device
        def normalise_chunk(x, residual, y, n, end, at_once, mine, plain, hi, a, b, low, added):
            """y = act((x u - hi) a + b [+ residual]); plain: u is 1."""
            values = cuda.local.array(pair_size, computed)
            more = cuda.local.array(pair_size, computed)
            if not plain:
                normalise_singly(x, residual, y, n, end, at_once, mine, low, added)
                return
            while n < end:
                fetch_x(x, few, n, end, at_once, values)
                if added:
                    fetch(residual, few, n, end, at_once, more)
                for r in range(few):
                    i = n + r * at_once
                    if i < end:
                        for w in range(width):
                            value = normalised(values[r * width + w], hi[w], one, a[w], b[w])
                            if added:
                                value += more[r * width + w]
                            values[r * width + w] = rectified(value, low)
                        store(y[0], i * y[1] + y[2], values, r * width)
                n += few * at_once

        return normalise_chunk

    def reducing(keep: Any, keep_one: Any) -> Any:
        @device
        def sums_again(dy, x, y, kept_g, n, end, at_once, mine, w, masked):
            """Sums of `gradients_of_chunk` of column w, which needs a unit, in float64."""
            (mean, rstd, gamma, beta), _, _, _ = mine
            c = channel_of(mine, w)
            hi, u, a, b = affine(mean, rstd, gamma, beta, c)
            unit, scale = types.float64(u), types.float64(scale_of(rstd, u, c))
            s, t, output = 0.0, 0.0, zero
            while n < end:
                g, value = fetch_one(dy, n, w), fetch_one(x, n, w)
                if masked == 2:
                    output = fetch_one(y, n, w)
                if masked:
                    g = passed(g, value, output, hi, u, a, b, masked, least, zero)
                keep_one(kept_g, n, w, g)
                d = cuda.fma(types.float64(value), unit, -types.float64(hi))
                s += types.float64(g)
                t = cuda.fma(types.float64(g), d * scale, t)
                n += at_once
            return s, t

        @device
        def sums_singly(dy, x, y, kept_g, n, end, at_once, mine, masked, s, t):
            """Replace what `gradients_of_chunk` has for columns that need a unit."""
            (mean, rstd, gamma, beta), _, _, _ = mine
            for w in range(width):
                _, _, _, fits = plain_affine(mean, rstd, gamma, beta, channel_of(mine, w))
                if not fits:
                    s[w], t[w] = sums_again(dy, x, y, kept_g, n, end, at_once, mine, w, masked)

        @device
        def gradients_of_chunk(
            dy, x, y, kept_g, kept_x, n, end, at_once, mine, plain, hi, a, b, scale, masked, s, t
        ):
            """Sums of g and of g (x u - hi) scale of this thread's columns, g = dy past ReLU."""
            g = cuda.local.array(fewer_size, computed)
            values = cuda.local.array(fewer_size, computed)
            outputs = cuda.local.array(fewer_size, computed)
            begin = n
            for w in range(width):
                s[w] = 0.0
                t[w] = 0.0
            while n < end:
                count = fetch(dy, fewer, n, end, at_once, g)
                fetch(x, fewer, n, end, at_once, values)
                if masked == 2:
                    fetch(y, fewer, n, end, at_once, outputs)
                if masked:
                    for r in range(fewer):
                        for w in range(width):
                            j = r * width + w
                            g[j] = passed(
                                g[j], values[j], outputs[j], hi[w], one, a[w], b[w], masked, least,
                                zero,
                            )  # fmt: skip
                keep(kept_g, fewer, n, end, at_once, g)
                keep(kept_x, fewer, n, end, at_once, values)
                for w in range(width):
                    s_more, t_more = gradients(g, values, w, count, hi[w], one, scale[w])
                    s[w] += s_more
                    t[w] += t_more
                n += fewer * at_once
            if not plain:
                sums_singly(dy, x, y, kept_g, begin, end, at_once, mine, masked, s, t)

        return gradients_of_chunk

    def differentiating(fetch_g: Any, fetch_one_g: Any) -> Any:
        @device
        def differentiate_singly(
            dy, x, y, dx, dresidual, n, end, at_once, mine, sums, C, count, masked, training, outs
        ):
            """`differentiate_chunk` of columns some of which need a unit, one after the other."""
            (mean, rstd, gamma, beta), _, _, _ = mine
            for w in range(width):
                c = channel_of(mine, w)
                hi, u, a, b = affine(mean, rstd, gamma, beta, c)
                v, f = factor(rstd, gamma, sums, C, count, u, training, c)
                h, p, q, output = zero, zero, zero, zero
                if training:
                    h, p, q = gradient(mean, rstd, sums, C, count, u, v, c)
                i = n
                while i < end:
                    g, value = fetch_one_g(dy, i, w), fetch_one_g(x, i, w)
                    if masked == 2:
                        output = fetch_one(y, i, w)
                    if masked:
                        g = passed(g, value, output, hi, u, a, b, masked, least, zero)
                    if outs & 2:
                        put_one(dresidual, i, w, g)
                    if outs & 1:
                        d = centred(g, value, hi, u, h, p, q, v, training)
                        put_one(dx, i, w, f * d)
                    i += at_once

        @device
        def differentiate_chunk(
            dy, x, y, dx, dresidual, n, end, at_once, mine, sums, C, count,
            plain, hi, a, b, h, p, q, masked, training, outs,
        ):  # fmt: skip
            """dx (outs & 1) and dresidual (outs & 2) of dy, or of dy past ReLU and masked 0."""
            g = cuda.local.array(pair_size, computed)
            values = cuda.local.array(pair_size, computed)
            outputs = cuda.local.array(pair_size, computed)
            if not plain:
                differentiate_singly(
                    dy, x, y, dx, dresidual, n, end, at_once, mine, sums, C, count,
                    masked, training, outs,
                )  # fmt: skip
                return
            while n < end:
                fetch_g(dy, few, n, end, at_once, g)
                fetch_g(x, few, n, end, at_once, values)
                if masked == 2:
                    fetch(y, few, n, end, at_once, outputs)
                for r in range(few):
                    i = n + r * at_once
                    if i < end:
                        for w in range(width):
                            j = r * width + w
                            if masked:
                                g[j] = passed(
                                    g[j], values[j], outputs[j], hi[w], one, a[w], b[w], masked,
                                    least, zero,
                                )  # fmt: skip
                        if outs & 2:
                            store(dresidual[0], i * dresidual[1] + dresidual[2], g, r * width)
                        if outs & 1:
                            for w in range(width):
                                j = r * width + w
                                d = centred(
                                    g[j], values[j], hi[w], one, h[w], p[w], q[w], one, training
                                )
                                values[j] = a[w] * d
                            store(dx[0], i * dx[1] + dx[2], values, r * width)
                n += few * at_once

        return differentiate_chunk

    moments_of_chunk, normalise_chunk = summing(drop), normalising(fetch, fetch_one)
    gradients_of_chunk = reducing(drop, drop_one)
    differentiate_chunk = differentiating(fetch, fetch_one)

    @kernel(2)
    def stats(x, xn, C, S, N, group, lanes, per, chunks, partial, mean, again):
        """partial[:, c, k] = sum d, sum d^2 of chunk k, d = x - K; mean[c] = K, or K = mean[c]."""
        g = quotient(cuda.blockIdx.x, chunks)
        k = cuda.blockIdx.x - g * chunks
        c0, columns, row, column, at_once = located(C, S, group, lanes, g)
        n, end = samples(N, per, k, columns, row, column, at_once)
        shared = cuda.shared.array(cells, types.float64)
        shift = cuda.local.array(width, types.float64)
        s = cuda.local.array(width, types.float64)
        q = cuda.local.array(width, types.float64)
        if n < end:
            if again:
                for w in range(width):
                    shift[w] = mean[c0 + quotient(column + w, S)]
            else:
                first_values(x, c0, S, column, shift)
                if n == 0:
                    for w in range(width):
                        mean[c0 + quotient(column + w, S)] = shift[w]
        moments_of_chunk((x, xn, c0 * S + column), 0, n, end, at_once, shift, s, q)
        put(s, q, shared, S, columns, row, column, at_once, C, c0, k, chunks, partial)

    @kernel(2)
    def apply(
        x, xn, residual, rn, y, yn, C, S, N, group, lanes, per, chunks,
        mean, rstd, gamma, beta, floor, added,
    ):  # fmt: skip
        """y = act(gamma (x - mean) rstd + beta [+ residual]), the last block first."""
        block = cuda.gridDim.x - 1 - cuda.blockIdx.x
        g = quotient(block, chunks)
        c0, columns, row, column, at_once = located(C, S, group, lanes, g)
        n, end = samples(N, per, block - g * chunks, columns, row, column, at_once)
        hi = cuda.local.array(width, computed)
        a = cuda.local.array(width, computed)
        b = cuda.local.array(width, computed)
        mine, plain = ((mean, rstd, gamma, beta), c0, S, column), True
        if n < end:
            plain = affines(mine, hi, a, b)
        start = c0 * S + column
        normalise_chunk(
            (x, xn, start), (residual, rn, start), (y, yn, start), n, end, at_once,
            mine, plain, hi, a, b, computed(floor), added,
        )  # fmt: skip

    @kernel(2)
    def reduce(
        dy, dyn, x, xn, y, yn, C, S, N, group, lanes, per, chunks,
        mean, rstd, gamma, beta, masked, partial,
    ):  # fmt: skip
        """partial[:, c, k] = sum dy, sum dy (x u - hi) scale of chunk k."""
        g = quotient(cuda.blockIdx.x, chunks)
        k = cuda.blockIdx.x - g * chunks
        c0, columns, row, column, at_once = located(C, S, group, lanes, g)
        n, end = samples(N, per, k, columns, row, column, at_once)
        shared = cuda.shared.array(cells, types.float64)
        hi = cuda.local.array(width, computed)
        a = cuda.local.array(width, computed)
        b = cuda.local.array(width, computed)
        scale = cuda.local.array(width, computed)
        s = cuda.local.array(width, types.float64)
        t = cuda.local.array(width, types.float64)
        mine, plain = ((mean, rstd, gamma, beta), c0, S, column), True
        if n < end:
            plain = affines(mine, hi, a, b)
            scales(mine, scale)
        start = c0 * S + column
        gradients_of_chunk(
            (dy, dyn, start), (x, xn, start), (y, yn, start), 0, 0, n, end, at_once,
            mine, plain, hi, a, b, scale, masked, s, t,
        )  # fmt: skip
        put(s, t, shared, S, columns, row, column, at_once, C, c0, k, chunks, partial)

    @kernel(2)
    def differentiate(
        dy, dyn, x, xn, y, yn, dx, dxn, dresidual, rn, C, S, N, group, lanes, per, chunks,
        mean, rstd, gamma, beta, sums, count, masked, training, outs,
    ):  # fmt: skip
        """dx (outs & 1) and dresidual (outs & 2); not training: statistics are constants."""
        block = cuda.gridDim.x - 1 - cuda.blockIdx.x
        g = quotient(block, chunks)
        c0, columns, row, column, at_once = located(C, S, group, lanes, g)
        n, end = samples(N, per, block - g * chunks, columns, row, column, at_once)
        hi = cuda.local.array(width, computed)
        a = cuda.local.array(width, computed)
        b = cuda.local.array(width, computed)
        h = cuda.local.array(width, computed)
        p = cuda.local.array(width, computed)
        q = cuda.local.array(width, computed)
        mine, plain = ((mean, rstd, gamma, beta), c0, S, column), True
        if n < end:
            plain = affines(mine, hi, a, b)
            if training:
                plain = gradients_each(mine, sums, C, count, h, p, q) and plain
        start = c0 * S + column
        differentiate_chunk(
            (dy, dyn, start), (x, xn, start), (y, yn, start),
            (dx, dxn, start), (dresidual, rn, start), n, end, at_once,
            mine, sums, C, count, plain, hi, a, b, h, p, q, masked, training, outs,
        )  # fmt: skip

    keep_moments, normalise_kept = summing(keep), normalising(recall, recall_one)
    keep_gradients = reducing(keep, keep_one)
    differentiate_kept = differentiating(recall, recall_one)

    def resident(together: Any) -> SimpleNamespace:
        """Kernels that read memory once: `blocks` blocks keep a group, `each` chunks a block.

        `together` has the blocks of a group wait for each other.
        """

        @kernel(1)
        def forward(
            x, xn, residual, rn, y, yn, C, S, N, group, lanes, per, chunks, blocks, each,
            m, eps, partial, mean, m2, rstd, gamma, beta, floor, added,
        ):  # fmt: skip
            """`stats`, `finish` and `apply`."""
            slab = cuda.shared.array(0, computed)
            shared = cuda.shared.array(cells, types.float64)
            g = quotient(cuda.blockIdx.x, blocks)
            rank = cuda.blockIdx.x - g * blocks
            begin, stop = rank * each, min((rank + 1) * each, chunks)
            c0, columns, row, column, at_once = located(C, S, group, lanes, g)
            start = c0 * S + column
            hi = cuda.local.array(width, computed)
            a = cuda.local.array(width, computed)
            b = cuda.local.array(width, computed)
            shift = cuda.local.array(width, types.float64)
            s = cuda.local.array(width, types.float64)
            q = cuda.local.array(width, types.float64)
            if row < at_once and column < columns:
                first_values(x, c0, S, column, shift)
                if begin == 0 and row == 0:
                    for w in range(width):
                        mean[c0 + quotient(column + w, S)] = shift[w]
            k = begin
            while k < stop:
                n, end = samples(N, per, k, columns, row, column, at_once)
                kept = kept_at(slab, per, lanes, column, k, k - begin)
                keep_moments((x, xn, start), kept, n, end, at_once, shift, s, q)
                put(s, q, shared, S, columns, row, column, at_once, C, c0, k, chunks, partial)
                k += 1
            together()
            c = rank * (cuda.blockDim.x // WARP) + cuda.threadIdx.x // WARP
            while c < quotient(columns, S):
                finish_moments(partial, c0 + c, C, chunks, m, eps, mean, m2, rstd)
                c += blocks * (cuda.blockDim.x // WARP)
            together()
            mine, plain = ((mean, rstd, gamma, beta), c0, S, column), True
            if row < at_once and column < columns:
                plain = affines(mine, hi, a, b)
            k = begin
            while k < stop:
                n, end = samples(N, per, k, columns, row, column, at_once)
                normalise_kept(
                    kept_at(slab, per, lanes, column, k, k - begin),
                    (residual, rn, start), (y, yn, start), n, end, at_once,
                    mine, plain, hi, a, b, computed(floor), added,
                )  # fmt: skip
                k += 1

        @kernel(1)
        def backward(
            dy, dyn, x, xn, y, yn, dx, dxn, dresidual, rn,
            C, S, N, group, lanes, per, chunks, blocks, each,
            mean, rstd, gamma, beta, partial, sums, count, masked, outs,
        ):  # fmt: skip
            """`reduce`, `finish_sums` and `differentiate`."""
            slab = cuda.shared.array(0, computed)
            shared = cuda.shared.array(cells, types.float64)
            g = quotient(cuda.blockIdx.x, blocks)
            rank = cuda.blockIdx.x - g * blocks
            begin, stop = rank * each, min((rank + 1) * each, chunks)
            c0, columns, row, column, at_once = located(C, S, group, lanes, g)
            start = c0 * S + column
            hi = cuda.local.array(width, computed)
            a = cuda.local.array(width, computed)
            b = cuda.local.array(width, computed)
            scale = cuda.local.array(width, computed)
            h = cuda.local.array(width, computed)
            p = cuda.local.array(width, computed)
            q = cuda.local.array(width, computed)
            s = cuda.local.array(width, types.float64)
            t = cuda.local.array(width, types.float64)
            mine, plain = ((mean, rstd, gamma, beta), c0, S, column), True
            if row < at_once and column < columns:
                plain = affines(mine, hi, a, b)
                scales(mine, scale)
            k = begin
            while k < stop:
                n, end = samples(N, per, k, columns, row, column, at_once)
                keep_gradients(
                    (dy, dyn, start), (x, xn, start), (y, yn, start),
                    kept_at(slab, per, lanes, column, k, k - begin),
                    kept_at(slab, per, lanes, column, k, k - begin + each),
                    n, end, at_once, mine, plain, hi, a, b, scale, masked, s, t,
                )  # fmt: skip
                put(s, t, shared, S, columns, row, column, at_once, C, c0, k, chunks, partial)
                k += 1
            together()
            c = rank * (cuda.blockDim.x // WARP) + cuda.threadIdx.x // WARP
            while c < quotient(columns, S):
                finish_gradients(partial, c0 + c, C, chunks, mean, rstd, sums)
                c += blocks * (cuda.blockDim.x // WARP)
            together()
            if row < at_once and column < columns:
                plain = gradients_each(mine, sums, C, count, h, p, q) and plain
            k = begin
            while k < stop:
                n, end = samples(N, per, k, columns, row, column, at_once)
                differentiate_kept(
                    kept_at(slab, per, lanes, column, k, k - begin),
                    kept_at(slab, per, lanes, column, k, k - begin + each), (y, yn, start),
                    (dx, dxn, start), (dresidual, rn, start), n, end, at_once,
                    mine, sums, C, count, plain, hi, a, b, h, p, q, 0, True, outs,
                )  # fmt: skip
                k += 1

        return SimpleNamespace(forward=forward, backward=backward)

    return SimpleNamespace(
        stats=stats, apply=apply, reduce=reduce, differentiate=differentiate, resident=resident
    )
