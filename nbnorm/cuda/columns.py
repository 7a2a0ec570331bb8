"""Column traversal on the GPU, for small S: a block takes `length` samples of `group` channels.

The channels of a group are adjacent. Their columns are read by `readers` threads, `width` columns
each, and the block reads as many samples at a time (`at_once`) as it has threads for. Each column
has its own sums; the columns of a channel are added up in shared memory. x[n] is contiguous. A
kernel gets a tensor as its memory and the stride of n, in values. Device functions get a view of
the thread's columns: (memory, stride of n, where they begin), or `kept_at` for a chunk that the
block keeps in shared memory.

As in rows.py, what is done with a chunk is written once, here for u = v = 1. A thread with a column
that needs other units computes its columns one by one: `apply_singly` and so on.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from numba import cuda
from numba.cuda import types

from nbnorm.activations import Activation
from nbnorm.cuda.activations import activation_functions
from nbnorm.cuda.channel import (
    channel_functions,
    finish_moments_channel,
    finish_sums_channel_of,
    second_functions,
)
from nbnorm.cuda.intrinsics import STORAGE, memory_of, quotient
from nbnorm.cuda.jit import device, kernel
from nbnorm.cuda.plan import STORED_AS_ZERO, THREADS, UNROLL, WARP, Names
from nbnorm.cuda.values import (
    centred,
    float32_load,
    gradient_sums_of,
    moment_sums_of,
    normalised,
    second_sums_of,
    warp_sum,
)

SHORT = 8  # columns of a channel that a single thread adds up


def build(
    dtype: str, width: int, activation: Activation | None, wide: Names = ()
) -> SimpleNamespace:
    """Return the kernels for tensors of a dtype, read and written `width` values at a time.

    Those named in `wide`, among dy, ddx, residual and y, are float32.
    """
    computed = STORAGE[dtype].computed
    activate, through, taken = activation_functions(activation, computed)
    load, store = memory_of(dtype, width)
    load_one, store_one = memory_of(dtype, 1)
    # Vectors in flight per tensor if two or three tensors are read at once.
    few = UNROLL if width <= 4 else UNROLL // 2
    fewer = UNROLL if width <= 4 else 1
    size, pair_size, fewer_size = UNROLL * width, few * width, fewer * width
    moment_sums, gradient_sums = (
        moment_sums_of(computed, UNROLL, width),
        gradient_sums_of(computed, fewer, width),
    )
    of = channel_functions(computed)
    plain_affine, affine_channel, scale_channel = (
        of.plain_affine, of.affine_channel, of.scale_channel,
    )  # fmt: skip
    plain_factors, factors_channel = of.plain_factors, of.factors_channel
    coefficients_channel = of.coefficients_channel
    finish_sums_channel = finish_sums_channel_of(computed)
    zero, one, threshold = computed(0), computed(1), computed(STORED_AS_ZERO.get(dtype, 0.0))
    cells = THREADS * width

    @device
    def located(C, S, group, readers, g):
        """c0 and number of columns of group g; this thread's row and column; number of rows."""
        c0 = g * group
        columns = min(group, C - c0) * S
        row = quotient(cuda.threadIdx.x, readers)
        column = (cuda.threadIdx.x - row * readers) * width
        return c0, columns, row, column, quotient(cuda.blockDim.x, readers)

    @device
    def samples(N, length, k, columns, row, column, at_once):
        """First sample of chunk k for this thread, and the end; 0 if it has no column."""
        end = min((k + 1) * length, N) if row < at_once and column < columns else 0
        return k * length + row, end

    @device
    def kept_at(slab, length, readers, column, k, at):
        """Where a thread keeps its columns of chunk k, the `at`-th chunk that the block keeps."""
        start = at * length * readers * width + quotient(column, width)
        return slab, readers, k * length, start, length * readers

    def fetch_with(load: Any) -> Any:
        """Make `fetch`, which loads a sample's columns by `load`."""

        @device
        def fetch(view, unroll, n, end, at_once, values):
            """Load up to `unroll` samples n, n + at_once, ... before end; return their number."""
            memory, n_stride, start = view
            count = 0
            for r in range(unroll):
                i = n + r * at_once
                if i < end:
                    load(memory, i * n_stride + start, values, r * width)
                    count += 1
            return count

        return fetch

    @device
    def keep(kept, unroll, n, end, at_once, values):
        """Keep in shared memory what was fetched, neighbouring threads side by side."""
        slab, readers, first, start, apart = kept
        for r in range(unroll):
            i = n + r * at_once
            if i < end:
                for w in range(width):
                    slab[start + w * apart + (i - first) * readers] = values[r * width + w]

    @device
    def recall(kept, unroll, n, end, at_once, values):
        """Load what was kept, as `fetch` loads from memory."""
        slab, readers, first, start, apart = kept
        for r in range(unroll):
            i = n + r * at_once
            if i < end:
                for w in range(width):
                    values[r * width + w] = slab[start + w * apart + (i - first) * readers]

    @device
    def drop(kept, unroll, n, end, at_once, values):
        """Keep nothing."""

    def fetch_one_with(load_one: Any) -> Any:
        """Make `fetch_one`, which loads a value by `load_one`."""

        @device
        def fetch_one(view, i, w):
            """Return column w of sample i."""
            value = cuda.local.array(1, computed)
            load_one(view[0], i * view[1] + view[2] + w, value, 0)
            return value[0]

        return fetch_one

    fetch, fetch_one = fetches = fetch_with(load), fetch_one_with(load_one)
    if wide:
        fetches = fetch_with(float32_load(width)), fetch_one_with(float32_load(1))
    (fetch_dy, fetch_one_dy), (fetch_ddx, _), of_residual, of_y = (
        fetches if name in wide else (fetch, fetch_one) for name in ("dy", "ddx", "residual", "y")
    )
    (fetch_residual, fetch_one_residual), (fetch_y, fetch_one_y) = of_residual, of_y

    @device
    def write_one(view, i, w, value):
        """Store value, rounded, as column w of the thread's columns of sample i."""
        values = cuda.local.array(1, computed)
        values[0] = value
        store_one(view[0], i * view[1] + view[2] + w, values, 0)

    @device
    def keep_one(kept, i, w, value):
        """Keep column w of sample i."""
        slab, readers, first, start, apart = kept
        slab[start + w * apart + (i - first) * readers] = value

    @device
    def recall_one(kept, i, w):
        """Return column w of sample i of what was kept."""
        slab, readers, first, start, apart = kept
        return slab[start + w * apart + (i - first) * readers]

    @device
    def drop_one(kept, i, w, value):
        """Keep nothing."""

    @device
    def first_values(x, c0, S, column, K):
        """K[w] = first value of the channel of column w, in float64."""
        value = cuda.local.array(1, computed)
        for w in range(width):
            load_one(x, (c0 + quotient(column + w, S)) * S, value, 0)
            K[w] = types.float64(value[0])

    @device
    def by_channel(sums, shared, S, columns, row, column, at_once, chunks, k, partial):
        """partial[c, k] = sum of the columns of each channel, first over rows, then over S."""
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
    def store_sums(s, t, shared, S, columns, row, column, at_once, C, c0, k, chunks, partial):
        """partial[:, c, k] = two sums over the block."""
        by_channel(s, shared, S, columns, row, column, at_once, chunks, c0 * chunks + k, partial)
        by_channel(
            t, shared, S, columns, row, column, at_once, chunks, (C + c0) * chunks + k, partial
        )

    @device
    def channel_of(mine, w):
        """Channel of this thread's column w."""
        _, c0, S, column = mine
        return c0 + quotient(column + w, S)

    @device
    def affine(mine, hi, a, b):
        """hi, a and b of this thread's columns with u = 1; whether u = 1 will do for all."""
        (mean, rstd, gamma, beta), _, _, _ = mine
        plain = True
        for w in range(width):
            c = channel_of(mine, w)
            hi[w], a[w], b[w], fits = plain_affine(mean, rstd, gamma, beta, c)
            plain = plain and fits
        return plain

    @device
    def scales(mine, scale):
        """`scale_channel` of this thread's columns, with u = 1."""
        (_, rstd, _, _), _, _, _ = mine
        for w in range(width):
            scale[w] = scale_channel(rstd, one, channel_of(mine, w))

    @device
    def coefficients(mine, sums, C, count, h, p, q):
        """h, p and q of this thread's columns with v = 1; whether v = 1 will do for all."""
        (mean, rstd, _, _), _, _, _ = mine
        plain = True
        for w in range(width):
            c = channel_of(mine, w)
            h[w], p[w], q[w] = coefficients_channel(mean, rstd, sums, C, count, one, one, c)
            plain = plain and plain_factors(rstd, sums, C, count, c)
        return plain

    def stats_with(keep: Any) -> Any:
        """Make `stats_chunk`, which calls `keep` with what it has loaded."""

        @device
        def stats_chunk(x, kept, n, end, at_once, K, s, q):
            """s = sum d and q = sum d^2 of this thread's columns, where d = x - K."""
            values = cuda.local.array(size, computed)
            for w in range(width):
                s[w] = 0.0
                q[w] = 0.0
            while n < end:
                count = fetch(x, UNROLL, n, end, at_once, values)
                keep(kept, UNROLL, n, end, at_once, values)
                for w in range(width):
                    s_more, q_more = moment_sums(values, w, count, K[w])
                    s[w] += s_more
                    q[w] += q_more
                n += UNROLL * at_once

        return stats_chunk

    def apply_with(fetch_x: Any, fetch_one_x: Any) -> Any:
        """Make `apply_chunk`, which loads x by `fetch_x`."""

        @device
        def apply_singly(x, residual, y, n, end, at_once, mine, low, added):
            """`apply_chunk`, column by column: at least one needs a unit."""
            (mean, rstd, gamma, beta), _, _, _ = mine
            for w in range(width):
                hi, u, a, b = affine_channel(mean, rstd, gamma, beta, channel_of(mine, w))
                i = n
                while i < end:
                    value = normalised(fetch_one_x(x, i, w), hi, u, a, b)
                    if added:
                        value += fetch_one_residual(residual, i, w)
                    write_one(y, i, w, activate(value, low))
                    i += at_once

        @device
        def apply_chunk(x, residual, y, n, end, at_once, mine, plain, hi, a, b, low, added):
            """y = act((x u - hi) a + b [+ residual]); u is 1 if `plain`."""
            values = cuda.local.array(pair_size, computed)
            more = cuda.local.array(pair_size, computed)
            if not plain:
                apply_singly(x, residual, y, n, end, at_once, mine, low, added)
                return
            while n < end:
                fetch_x(x, few, n, end, at_once, values)
                if added:
                    fetch_residual(residual, few, n, end, at_once, more)
                for r in range(few):
                    i = n + r * at_once
                    if i < end:
                        for w in range(width):
                            value = normalised(values[r * width + w], hi[w], one, a[w], b[w])
                            if added:
                                value += more[r * width + w]
                            values[r * width + w] = activate(value, low)
                        store(y[0], i * y[1] + y[2], values, r * width)
                n += few * at_once

        return apply_chunk

    def backward_reduce_with(keep: Any, keep_one: Any) -> Any:
        """Make `backward_reduce_chunk`, which calls `keep` with what it has loaded."""

        @device
        def gradient_sums64(dy, x, y, kept_g, n, end, at_once, mine, w, mask):
            """sum g and sum g (x u - hi) scale of column w, which needs a unit, in float64."""
            (mean, rstd, gamma, beta), _, _, _ = mine
            c = channel_of(mine, w)
            hi, u, a, b = affine_channel(mean, rstd, gamma, beta, c)
            unit, scale = types.float64(u), types.float64(scale_channel(rstd, u, c))
            s, t, output = 0.0, 0.0, zero
            while n < end:
                g, value = fetch_one_dy(dy, n, w), fetch_one(x, n, w)
                if mask == 2:
                    output = fetch_one_y(y, n, w)
                if mask:
                    value = taken(value)
                    g = through(g, value, output, hi, u, a, b, mask, threshold, zero)
                keep_one(kept_g, n, w, g)
                d = cuda.fma(types.float64(value), unit, -types.float64(hi))
                s += types.float64(g)
                t = cuda.fma(types.float64(g), d * scale, t)
                n += at_once
            return s, t

        @device
        def backward_reduce_singly(dy, x, y, kept_g, n, end, at_once, mine, mask, s, t):
            """Replace the sums of those columns that need a unit."""
            (mean, rstd, gamma, beta), _, _, _ = mine
            for w in range(width):
                _, _, _, fits = plain_affine(mean, rstd, gamma, beta, channel_of(mine, w))
                if not fits:
                    s[w], t[w] = gradient_sums64(dy, x, y, kept_g, n, end, at_once, mine, w, mask)

        @device
        def backward_reduce_chunk(
            dy, x, y, kept_g, kept_x, n, end, at_once, mine, plain, hi, a, b, scale, mask, s, t
        ):
            """s = sum g, t = sum g (x u - hi) scale of this thread's columns."""
            g = cuda.local.array(fewer_size, computed)
            values = cuda.local.array(fewer_size, computed)
            outputs = cuda.local.array(fewer_size, computed)
            begin = n
            for w in range(width):
                s[w] = 0.0
                t[w] = 0.0
            while n < end:
                count = fetch_dy(dy, fewer, n, end, at_once, g)
                fetch(x, fewer, n, end, at_once, values)
                if mask == 2:
                    fetch_y(y, fewer, n, end, at_once, outputs)
                if mask:
                    for r in range(fewer):
                        for w in range(width):
                            j = r * width + w
                            values[j] = taken(values[j])
                            g[j] = through(
                                g[j], values[j], outputs[j], hi[w], one, a[w], b[w], mask,
                                threshold, zero,
                            )  # fmt: skip
                keep(kept_g, fewer, n, end, at_once, g)
                keep(kept_x, fewer, n, end, at_once, values)
                for w in range(width):
                    s_more, t_more = gradient_sums(g, values, w, count, hi[w], one, scale[w])
                    s[w] += s_more
                    t[w] += t_more
                n += fewer * at_once
            if not plain:
                backward_reduce_singly(dy, x, y, kept_g, begin, end, at_once, mine, mask, s, t)

        return backward_reduce_chunk

    def backward_apply_with(fetch_g: Any, fetch_one_g: Any, fetch_x: Any, fetch_one_x: Any) -> Any:
        """Make `backward_apply_chunk`, which loads dy by `fetch_g` and x by `fetch_x`."""

        @device
        def backward_apply_singly(
            dy, x, y, dx, dresidual, n, end, at_once, mine, sums, C, count, mask, training, wanted
        ):
            """`backward_apply_chunk`, column by column: at least one needs a unit."""
            (mean, rstd, gamma, beta), _, _, _ = mine
            for w in range(width):
                c = channel_of(mine, w)
                hi, u, a, b = affine_channel(mean, rstd, gamma, beta, c)
                v, f = factors_channel(rstd, gamma, sums, C, count, u, training, c)
                h, p, q, output = zero, zero, zero, zero
                if training:
                    h, p, q = coefficients_channel(mean, rstd, sums, C, count, u, v, c)
                i = n
                while i < end:
                    g, value = fetch_one_g(dy, i, w), fetch_one_x(x, i, w)
                    if mask == 2:
                        output = fetch_one_y(y, i, w)
                    if mask:
                        value = taken(value)
                        g = through(g, value, output, hi, u, a, b, mask, threshold, zero)
                    if wanted & 2:
                        write_one(dresidual, i, w, g)
                    if wanted & 1:
                        d = centred(g, value, hi, u, h, p, q, v, training)
                        write_one(dx, i, w, f * d)
                    i += at_once

        @device
        def backward_apply_chunk(
            dy, x, y, dx, dresidual, n, end, at_once, mine, sums, C, count,
            plain, hi, a, b, h, p, q, mask, training, wanted,
        ):  # fmt: skip
            """dx = a ((g - h) - ((x - hi) p + q)) if wanted & 1, dresidual = g if wanted & 2.

            a g without `training`. `mask` is 0 if dy is g already.
            """
            g = cuda.local.array(pair_size, computed)
            values = cuda.local.array(pair_size, computed)
            outputs = cuda.local.array(pair_size, computed)
            if not plain:
                backward_apply_singly(
                    dy, x, y, dx, dresidual, n, end, at_once, mine, sums, C, count,
                    mask, training, wanted,
                )  # fmt: skip
                return
            while n < end:
                fetch_g(dy, few, n, end, at_once, g)
                fetch_x(x, few, n, end, at_once, values)
                if mask == 2:
                    fetch_y(y, few, n, end, at_once, outputs)
                for r in range(few):
                    i = n + r * at_once
                    if i < end:
                        for w in range(width):
                            j = r * width + w
                            if mask:
                                values[j] = taken(values[j])
                                g[j] = through(
                                    g[j], values[j], outputs[j], hi[w], one, a[w], b[w], mask,
                                    threshold, zero,
                                )  # fmt: skip
                        if wanted & 2:
                            store(dresidual[0], i * dresidual[1] + dresidual[2], g, r * width)
                        if wanted & 1:
                            for w in range(width):
                                j = r * width + w
                                d = centred(
                                    g[j], values[j], hi[w], one, h[w], p[w], q[w], one, training
                                )
                                values[j] = a[w] * d
                            store(dx[0], i * dx[1] + dx[2], values, r * width)
                n += few * at_once

        return backward_apply_chunk

    stats_chunk, apply_chunk = stats_with(drop), apply_with(fetch, fetch_one)
    backward_reduce_chunk = backward_reduce_with(drop, drop_one)
    backward_apply_chunk = backward_apply_with(fetch_dy, fetch_one_dy, fetch, fetch_one)

    @kernel(2)
    def stats(x, xn, C, S, N, group, readers, length, chunks, partial, mean, again):
        """partial[:, c, k] = sum d, sum d^2 of chunk k, where d = x - K.

        K is the channel's first value, stored in mean[c]; or mean[c] itself if `again`.
        """
        g = quotient(cuda.blockIdx.x, chunks)
        k = cuda.blockIdx.x - g * chunks
        c0, columns, row, column, at_once = located(C, S, group, readers, g)
        n, end = samples(N, length, k, columns, row, column, at_once)
        shared = cuda.shared.array(cells, types.float64)
        K = cuda.local.array(width, types.float64)
        s = cuda.local.array(width, types.float64)
        q = cuda.local.array(width, types.float64)
        if n < end:
            if again:
                for w in range(width):
                    K[w] = mean[c0 + quotient(column + w, S)]
            else:
                first_values(x, c0, S, column, K)
                if n == 0:
                    for w in range(width):
                        mean[c0 + quotient(column + w, S)] = K[w]
        stats_chunk((x, xn, c0 * S + column), 0, n, end, at_once, K, s, q)
        store_sums(s, q, shared, S, columns, row, column, at_once, C, c0, k, chunks, partial)

    @kernel(2)
    def apply(
        x, xn, residual, rn, y, yn, C, S, N, group, readers, length, chunks,
        mean, rstd, gamma, beta, floor, added,
    ):  # fmt: skip
        """y = act(gamma (x - mean) rstd + beta [+ residual]), from the last block to the first."""
        block = cuda.gridDim.x - 1 - cuda.blockIdx.x
        g = quotient(block, chunks)
        c0, columns, row, column, at_once = located(C, S, group, readers, g)
        n, end = samples(N, length, block - g * chunks, columns, row, column, at_once)
        hi = cuda.local.array(width, computed)
        a = cuda.local.array(width, computed)
        b = cuda.local.array(width, computed)
        mine, plain = ((mean, rstd, gamma, beta), c0, S, column), True
        if n < end:
            plain = affine(mine, hi, a, b)
        start = c0 * S + column
        apply_chunk(
            (x, xn, start), (residual, rn, start), (y, yn, start), n, end, at_once,
            mine, plain, hi, a, b, computed(floor), added,
        )  # fmt: skip

    @kernel(2)
    def backward_reduce(
        dy, dyn, x, xn, y, yn, C, S, N, group, readers, length, chunks,
        mean, rstd, gamma, beta, mask, partial,
    ):  # fmt: skip
        """partial[:, c, k] = sum g, sum g (x u - hi) scale of chunk k."""
        g = quotient(cuda.blockIdx.x, chunks)
        k = cuda.blockIdx.x - g * chunks
        c0, columns, row, column, at_once = located(C, S, group, readers, g)
        n, end = samples(N, length, k, columns, row, column, at_once)
        shared = cuda.shared.array(cells, types.float64)
        hi = cuda.local.array(width, computed)
        a = cuda.local.array(width, computed)
        b = cuda.local.array(width, computed)
        scale = cuda.local.array(width, computed)
        s = cuda.local.array(width, types.float64)
        t = cuda.local.array(width, types.float64)
        mine, plain = ((mean, rstd, gamma, beta), c0, S, column), True
        if n < end:
            plain = affine(mine, hi, a, b)
            scales(mine, scale)
        start = c0 * S + column
        backward_reduce_chunk(
            (dy, dyn, start), (x, xn, start), (y, yn, start), 0, 0, n, end, at_once,
            mine, plain, hi, a, b, scale, mask, s, t,
        )  # fmt: skip
        store_sums(s, t, shared, S, columns, row, column, at_once, C, c0, k, chunks, partial)

    @kernel(2)
    def backward_apply(
        dy, dyn, x, xn, y, yn, dx, dxn, dresidual, rn, C, S, N, group, readers, length, chunks,
        mean, rstd, gamma, beta, sums, count, mask, training, wanted,
    ):  # fmt: skip
        """dx = gamma rstd (g - (sums[0] + x_hat sums[1]) / count) and dresidual = g.

        dx = gamma rstd g without `training`. Writes dx if wanted & 1, dresidual if wanted & 2.
        """
        block = cuda.gridDim.x - 1 - cuda.blockIdx.x
        g = quotient(block, chunks)
        c0, columns, row, column, at_once = located(C, S, group, readers, g)
        n, end = samples(N, length, block - g * chunks, columns, row, column, at_once)
        hi = cuda.local.array(width, computed)
        a = cuda.local.array(width, computed)
        b = cuda.local.array(width, computed)
        h = cuda.local.array(width, computed)
        p = cuda.local.array(width, computed)
        q = cuda.local.array(width, computed)
        mine, plain = ((mean, rstd, gamma, beta), c0, S, column), True
        if n < end:
            plain = affine(mine, hi, a, b)
            if training:
                plain = coefficients(mine, sums, C, count, h, p, q) and plain
        start = c0 * S + column
        backward_apply_chunk(
            (dy, dyn, start), (x, xn, start), (y, yn, start),
            (dx, dxn, start), (dresidual, rn, start), n, end, at_once,
            mine, sums, C, count, plain, hi, a, b, h, p, q, mask, training, wanted,
        )  # fmt: skip

    # Fewer vectors in flight: three tensors, and nine coefficients or five sums for each column.
    least = 2 if width <= 4 else 1
    least_size = least * width
    second_sums = second_sums_of(computed, least, width)
    second = second_functions(computed)
    tangent_channel, tangent64, tangent = second.tangent_channel, second.tangent64, second.tangent
    curvature_channel, curvature64 = second.curvature_channel, second.curvature64
    curvature = second.curvature

    @kernel(1)
    def second_reduce(
        ddx, ddxn, dy, dyn, x, xn, C, S, N, group, readers, length, chunks, mean, rstd, partial,
    ):  # fmt: skip
        """partial[:, c, k] = sum d, d t, g, g t, d g; d = ddx, g = dy and t = (x - hi) scale."""
        block = quotient(cuda.blockIdx.x, chunks)
        k = cuda.blockIdx.x - block * chunks
        c0, columns, row, column, at_once = located(C, S, group, readers, block)
        n, end = samples(N, length, k, columns, row, column, at_once)
        shared = cuda.shared.array(cells, types.float64)
        hi = cuda.local.array(width, computed)
        scale = cuda.local.array(width, computed)
        d = cuda.local.array(least_size, computed)
        g = cuda.local.array(least_size, computed)
        values = cuda.local.array(least_size, computed)
        s_d = cuda.local.array(width, types.float64)
        s_dt = cuda.local.array(width, types.float64)
        s_g = cuda.local.array(width, types.float64)
        s_gt = cuda.local.array(width, types.float64)
        s_dg = cuda.local.array(width, types.float64)
        start = c0 * S + column
        for w in range(width):
            s_d[w], s_dt[w], s_g[w], s_gt[w], s_dg[w] = 0.0, 0.0, 0.0, 0.0, 0.0
            if n < end:
                c = c0 + quotient(column + w, S)
                hi[w], scale[w] = computed(mean[c]), scale_channel(rstd, one, c)
        while n < end:
            count = fetch_ddx((ddx, ddxn, start), least, n, end, at_once, d)
            fetch_dy((dy, dyn, start), least, n, end, at_once, g)
            fetch((x, xn, start), least, n, end, at_once, values)
            for w in range(width):
                more_d, more_dt, more_g, more_gt, more_dg = second_sums(
                    d, g, values, w, count, hi[w], scale[w]
                )
                s_d[w] += more_d
                s_dt[w] += more_dt
                s_g[w] += more_g
                s_gt[w] += more_gt
                s_dg[w] += more_dg
            n += least * at_once
        store_sums(s_d, s_dt, shared, S, columns, row, column, at_once, C, c0, k, chunks, partial)
        store_sums(
            s_g, s_gt, shared, S, columns, row, column, at_once, C, 2 * C + c0, k, chunks, partial
        )
        by_channel(
            s_dg, shared, S, columns, row, column, at_once, chunks, (4 * C + c0) * chunks + k,
            partial,
        )  # fmt: skip

    @kernel(1)
    def second_apply(
        ddx, ddxn, dy, dyn, x, xn, ddy, ddyn, dx, dxn, C, S, N, group, readers, length, chunks,
        mean, table, curved,
    ):  # fmt: skip
        """ddy = `tangent` and, if `curved`, dx = `curvature`, from the last block to the first."""
        block = cuda.gridDim.x - 1 - cuda.blockIdx.x
        i = quotient(block, chunks)
        c0, columns, row, column, at_once = located(C, S, group, readers, i)
        n, end = samples(N, length, block - i * chunks, columns, row, column, at_once)
        hi = cuda.local.array(width, computed)
        a = cuda.local.array(width, computed)
        h = cuda.local.array(width, computed)
        p = cuda.local.array(width, computed)
        q = cuda.local.array(width, computed)
        b = cuda.local.array(width, computed)
        k = cuda.local.array(width, computed)
        s = cuda.local.array(width, computed)
        t = cuda.local.array(width, computed)
        d = cuda.local.array(least_size, computed)
        g = cuda.local.array(least_size, computed)
        values = cuda.local.array(least_size, computed)
        plain, start = True, c0 * S + column
        if n < end:
            for w in range(width):
                c = c0 + quotient(column + w, S)
                hi[w], a[w], h[w], p[w], q[w], fits = tangent_channel(mean, table, C, c)
                plain = plain and fits
                if curved:
                    b[w], k[w], s[w], t[w], fits = curvature_channel(mean, table, C, c)
                    plain = plain and fits
        while n < end:
            fetch_ddx((ddx, ddxn, start), least, n, end, at_once, d)
            fetch((x, xn, start), least, n, end, at_once, values)
            if curved:
                fetch_dy((dy, dyn, start), least, n, end, at_once, g)
            for r in range(least):
                i = n + r * at_once
                if i < end:
                    for w in range(width):
                        j = r * width + w
                        d_j, x_j = d[j], values[j]
                        if plain:
                            d[j] = tangent(d_j, x_j, hi[w], a[w], h[w], p[w], q[w])
                            if curved:
                                values[j] = curvature(
                                    d_j, g[j], x_j, hi[w], h[w], p[w], b[w], k[w], s[w], t[w]
                                )
                        else:
                            c = c0 + quotient(column + w, S)
                            d[j] = tangent64(mean, table, C, c, d_j, x_j)
                            if curved:
                                values[j] = curvature64(mean, table, C, c, d_j, g[j], x_j)
                    store(ddy, i * ddyn + start, d, r * width)
                    if curved:
                        store(dx, i * dxn + start, values, r * width)
            n += least * at_once

    stats_keeping, apply_kept = stats_with(keep), apply_with(recall, recall_one)
    backward_reduce_keeping = backward_reduce_with(keep, keep_one)
    backward_apply_kept = backward_apply_with(recall, recall_one, recall, recall_one)

    def fused(barrier: Any) -> SimpleNamespace:
        """Return kernels that read memory once and keep a group of channels on chip.

        `blocks` blocks keep a group, `each` chunks per block. `barrier` waits for all of them.
        """

        @kernel(1)
        def forward(
            x, xn, residual, rn, y, yn, C, S, N, group, readers, length, chunks, blocks, each,
            count, eps, partial, mean, m2, rstd, gamma, beta, floor, added,
        ):  # fmt: skip
            """`stats`, `finish_moments` and `apply`."""
            slab = cuda.shared.array(0, computed)
            shared = cuda.shared.array(cells, types.float64)
            g = quotient(cuda.blockIdx.x, blocks)
            rank = cuda.blockIdx.x - g * blocks
            begin, stop = rank * each, min((rank + 1) * each, chunks)
            c0, columns, row, column, at_once = located(C, S, group, readers, g)
            start = c0 * S + column
            hi = cuda.local.array(width, computed)
            a = cuda.local.array(width, computed)
            b = cuda.local.array(width, computed)
            K = cuda.local.array(width, types.float64)
            s = cuda.local.array(width, types.float64)
            q = cuda.local.array(width, types.float64)
            if row < at_once and column < columns:
                first_values(x, c0, S, column, K)
                if begin == 0 and row == 0:
                    for w in range(width):
                        mean[c0 + quotient(column + w, S)] = K[w]
            k = begin
            while k < stop:
                n, end = samples(N, length, k, columns, row, column, at_once)
                kept = kept_at(slab, length, readers, column, k, k - begin)
                stats_keeping((x, xn, start), kept, n, end, at_once, K, s, q)
                store_sums(
                    s, q, shared, S, columns, row, column, at_once, C, c0, k, chunks, partial
                )
                k += 1
            barrier()
            c = rank * (cuda.blockDim.x // WARP) + cuda.threadIdx.x // WARP
            while c < quotient(columns, S):
                finish_moments_channel(partial, c0 + c, C, chunks, count, eps, mean, m2, rstd)
                c += blocks * (cuda.blockDim.x // WARP)
            barrier()
            mine, plain = ((mean, rstd, gamma, beta), c0, S, column), True
            if row < at_once and column < columns:
                plain = affine(mine, hi, a, b)
            k = begin
            while k < stop:
                n, end = samples(N, length, k, columns, row, column, at_once)
                apply_kept(
                    kept_at(slab, length, readers, column, k, k - begin),
                    (residual, rn, start), (y, yn, start), n, end, at_once,
                    mine, plain, hi, a, b, computed(floor), added,
                )  # fmt: skip
                k += 1

        @kernel(1)
        def backward(
            dy, dyn, x, xn, y, yn, dx, dxn, dresidual, rn,
            C, S, N, group, readers, length, chunks, blocks, each,
            mean, rstd, gamma, beta, partial, sums, count, mask, wanted,
        ):  # fmt: skip
            """`backward_reduce`, `finish_sums` and `backward_apply`."""
            slab = cuda.shared.array(0, computed)
            shared = cuda.shared.array(cells, types.float64)
            g = quotient(cuda.blockIdx.x, blocks)
            rank = cuda.blockIdx.x - g * blocks
            begin, stop = rank * each, min((rank + 1) * each, chunks)
            c0, columns, row, column, at_once = located(C, S, group, readers, g)
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
                plain = affine(mine, hi, a, b)
                scales(mine, scale)
            k = begin
            while k < stop:
                n, end = samples(N, length, k, columns, row, column, at_once)
                backward_reduce_keeping(
                    (dy, dyn, start), (x, xn, start), (y, yn, start),
                    kept_at(slab, length, readers, column, k, k - begin),
                    kept_at(slab, length, readers, column, k, k - begin + each),
                    n, end, at_once, mine, plain, hi, a, b, scale, mask, s, t,
                )  # fmt: skip
                store_sums(
                    s, t, shared, S, columns, row, column, at_once, C, c0, k, chunks, partial
                )
                k += 1
            barrier()
            c = rank * (cuda.blockDim.x // WARP) + cuda.threadIdx.x // WARP
            while c < quotient(columns, S):
                finish_sums_channel(partial, c0 + c, C, chunks, mean, rstd, sums)
                c += blocks * (cuda.blockDim.x // WARP)
            barrier()
            if row < at_once and column < columns:
                plain = coefficients(mine, sums, C, count, h, p, q) and plain
            k = begin
            while k < stop:
                n, end = samples(N, length, k, columns, row, column, at_once)
                backward_apply_kept(
                    kept_at(slab, length, readers, column, k, k - begin),
                    kept_at(slab, length, readers, column, k, k - begin + each), (y, yn, start),
                    (dx, dxn, start), (dresidual, rn, start), n, end, at_once,
                    mine, sums, C, count, plain, hi, a, b, h, p, q, 0, True, wanted,
                )  # fmt: skip
                k += 1

        return SimpleNamespace(forward=forward, backward=backward)

    return SimpleNamespace(
        stats=stats,
        apply=apply,
        backward_reduce=backward_reduce,
        backward_apply=backward_apply,
        second_reduce=second_reduce,
        second_apply=second_apply,
        fused=fused,
    )
