"""Row traversal on the GPU, for large S: a block takes a chunk, `length` vectors of one channel.

The vectors of a channel are numbered through all its planes; vector v lies in sample v // vectors.
A kernel gets a tensor as its memory and the strides of n and c, in values. Device functions get a
view of one channel: (memory, vectors, stride of n, where the channel begins), or, for a chunk that
the block keeps in shared memory, (slab, length, first, where the chunk begins).

What is done with a chunk is written once and compiled for both ways of reading it, so that sums,
and with them all bits, are the same.
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
from nbnorm.cuda.plan import STORED_AS_ZERO, UNROLL, WARP, Names
from nbnorm.cuda.values import (
    block_sum,
    centred,
    float32_load,
    gradient_sums_of,
    moment_sums_of,
    normalised,
    second_sums_of,
)


def build(
    dtype: str, width: int, activation: Activation | None, wide: Names = ()
) -> SimpleNamespace:
    """Return the kernels for tensors of a dtype, read and written `width` values at a time.

    Those named in `wide`, among dy, ddx, residual and y, are float32.
    """
    computed = STORAGE[dtype].computed
    activate, through, taken = activation_functions(activation, computed)
    load, store = memory_of(dtype, width)
    load_one, _ = memory_of(dtype, 1)
    # Vectors in flight per tensor if two or three tensors are read at once.
    few = UNROLL if width <= 4 else UNROLL // 2
    size, pair_size = UNROLL * width, few * width
    moment_sums, gradient_sums = (
        moment_sums_of(computed, size, 1),
        gradient_sums_of(computed, pair_size, 1),
    )
    of = channel_functions(computed)
    affine_channel, scale_channel = of.affine_channel, of.scale_channel
    factors_channel, coefficients_channel = of.factors_channel, of.coefficients_channel
    finish_sums_channel = finish_sums_channel_of(computed)
    zero, threshold = computed(0), computed(STORED_AS_ZERO.get(dtype, 0.0))

    @device
    def located(block, total, length, chunks):
        """Channel, chunk, first vector of the chunk, and the vector after its last."""
        c = quotient(block, chunks)
        k = block - c * chunks
        return c, k, k * length, min((k + 1) * length, total)

    @device
    def place(view, i):
        """Where vector i of a channel begins in the memory of its tensor, in values."""
        _, vectors, n_stride, start = view
        n = quotient(i, vectors)
        return n * n_stride + start + (i - n * vectors) * width

    def fetch_with(load: Any) -> Any:
        """Make `fetch`, which loads vectors by `load`."""

        @device
        def fetch(view, unroll, i, end, values):
            """Load up to `unroll` vectors before end, blockDim apart; return how many values."""
            count = 0
            for r in range(unroll):
                j = i + r * cuda.blockDim.x
                if j < end:
                    load(view[0], place(view, j), values, r * width)
                    count += width
            return count

        return fetch

    fetch = fetch_with(load)
    fetch_wide = fetch_with(float32_load(width)) if wide else fetch
    fetch_dy, fetch_ddx, fetch_residual, fetch_y = (
        fetch_wide if name in wide else fetch for name in ("dy", "ddx", "residual", "y")
    )

    @device
    def keep(kept, unroll, i, end, values):
        """Keep in shared memory what was fetched, neighbouring threads side by side."""
        slab, length, first, start = kept
        for r in range(unroll):
            j = i + r * cuda.blockDim.x
            if j < end:
                for w in range(width):
                    slab[start + w * length + j - first] = values[r * width + w]

    @device
    def recall(kept, unroll, i, end, values):
        """Load what was kept, as `fetch` loads from memory."""
        slab, length, first, start = kept
        for r in range(unroll):
            j = i + r * cuda.blockDim.x
            if j < end:
                for w in range(width):
                    values[r * width + w] = slab[start + w * length + j - first]

    @device
    def drop(kept, unroll, i, end, values):
        """Keep nothing."""

    @device
    def first_value(x, start):
        """First value of a channel, in float64."""
        value = cuda.local.array(1, computed)
        load_one(x, start, value, 0)
        return types.float64(value[0])

    @device
    def store_sums(partial, C, c, k, chunks, s, t, shared):
        """partial[:, c, k] = two sums over the block."""
        s = block_sum(s, shared)
        t = block_sum(t, shared)
        if cuda.threadIdx.x == 0:
            partial[c * chunks + k] = s
            partial[(C + c) * chunks + k] = t

    def stats_with(keep: Any) -> Any:
        """Make `stats_chunk`, which calls `keep` with what it has loaded."""

        @device
        def stats_chunk(x, kept, first, end, K):
            """sum d and sum d^2 of this thread's values, where d = x - K."""
            values = cuda.local.array(size, computed)
            s = 0.0
            q = 0.0
            i = first + cuda.threadIdx.x
            while i < end:
                count = fetch(x, UNROLL, i, end, values)
                keep(kept, UNROLL, i, end, values)
                s_more, q_more = moment_sums(values, 0, count, K)
                s += s_more
                q += q_more
                i += UNROLL * cuda.blockDim.x
            return s, q

        return stats_chunk

    def apply_with(fetch_x: Any) -> Any:
        """Make `apply_chunk`, which loads x by `fetch_x`."""

        @device
        def apply_chunk(x, residual, y, first, end, hi, u, a, b, low, added):
            """y = act((x u - hi) a + b [+ residual])."""
            values = cuda.local.array(pair_size, computed)
            more = cuda.local.array(pair_size, computed)
            i = first + cuda.threadIdx.x
            while i < end:
                fetch_x(x, few, i, end, values)
                if added:
                    fetch_residual(residual, few, i, end, more)
                for r in range(few):
                    j = i + r * cuda.blockDim.x
                    if j < end:
                        for w in range(r * width, (r + 1) * width):
                            value = normalised(values[w], hi, u, a, b)
                            if added:
                                value += more[w]
                            values[w] = activate(value, low)
                        store(y[0], place(y, j), values, r * width)
                i += few * cuda.blockDim.x

        return apply_chunk

    def backward_reduce_with(keep: Any) -> Any:
        """Make `backward_reduce_chunk`, which calls `keep` with what it has loaded."""

        @device
        def backward_reduce_chunk(dy, x, y, kept_g, kept_x, first, end, hi, u, a, b, scale, mask):
            """sum g and sum g (x u - hi) scale of this thread's values."""
            g = cuda.local.array(pair_size, computed)
            values = cuda.local.array(pair_size, computed)
            outputs = cuda.local.array(pair_size, computed)
            s = 0.0
            t = 0.0
            i = first + cuda.threadIdx.x
            while i < end:
                count = fetch_dy(dy, few, i, end, g)
                fetch(x, few, i, end, values)
                if mask == 2:
                    fetch_y(y, few, i, end, outputs)
                if mask:
                    for w in range(pair_size):
                        values[w] = taken(values[w])
                        g[w] = through(
                            g[w], values[w], outputs[w], hi, u, a, b, mask, threshold, zero
                        )
                keep(kept_g, few, i, end, g)
                keep(kept_x, few, i, end, values)
                s_more, t_more = gradient_sums(g, values, 0, count, hi, u, scale)
                s += s_more
                t += t_more
                i += few * cuda.blockDim.x
            return s, t

        return backward_reduce_chunk

    def backward_apply_with(fetch_g: Any, fetch_x: Any) -> Any:
        """Make `backward_apply_chunk`, which loads dy by `fetch_g` and x by `fetch_x`."""

        @device
        def backward_apply_chunk(
            dy, x, y, dx, dresidual, first, end,
            hi, u, a, b, h, p, q, v, f, mask, training, wanted,
        ):  # fmt: skip
            """dx = f ((g v - h) - ((x u - hi) p + q)) if wanted & 1, dresidual = g if wanted & 2.

            f v g without `training`. `mask` is 0 if dy is g already.
            """
            g = cuda.local.array(pair_size, computed)
            values = cuda.local.array(pair_size, computed)
            outputs = cuda.local.array(pair_size, computed)
            i = first + cuda.threadIdx.x
            while i < end:
                fetch_g(dy, few, i, end, g)
                fetch_x(x, few, i, end, values)
                if mask == 2:
                    fetch_y(y, few, i, end, outputs)
                if mask:
                    # In one loop over all vectors, which is unrolled whatever the activation.
                    for w in range(pair_size):
                        values[w] = taken(values[w])
                        g[w] = through(
                            g[w], values[w], outputs[w], hi, u, a, b, mask, threshold, zero
                        )
                for r in range(few):
                    j = i + r * cuda.blockDim.x
                    if j < end:
                        if wanted & 2:
                            store(dresidual[0], place(dresidual, j), g, r * width)
                        if wanted & 1:
                            for w in range(r * width, (r + 1) * width):
                                d = centred(g[w], values[w], hi, u, h, p, q, v, training)
                                values[w] = f * d
                            store(dx[0], place(dx, j), values, r * width)
                i += few * cuda.blockDim.x

        return backward_apply_chunk

    stats_chunk, apply_chunk = stats_with(drop), apply_with(fetch)
    backward_reduce_chunk, backward_apply_chunk = (
        backward_reduce_with(drop),
        backward_apply_with(fetch_dy, fetch),
    )

    @kernel(3)
    def stats(x, xn, xc, C, vectors, total, length, chunks, partial, mean, again):
        """partial[:, c, k] = sum d, sum d^2 of chunk k, where d = x - K.

        K is the channel's first value, stored in mean[c]; or mean[c] itself if `again`.
        """
        c, k, first, end = located(cuda.blockIdx.x, total, length, chunks)
        shared = cuda.shared.array(WARP, types.float64)
        K = mean[c] if again else first_value(x, c * xc)
        s, q = stats_chunk((x, vectors, xn, c * xc), 0, first, end, K)
        store_sums(partial, C, c, k, chunks, s, q, shared)
        if cuda.threadIdx.x == 0 and k == 0 and not again:
            mean[c] = K

    @kernel()
    def apply(
        x, xn, xc, residual, rn, rc, y, yn, yc, C, vectors, total, length, chunks,
        mean, rstd, gamma, beta, floor, added,
    ):  # fmt: skip
        """y = act(gamma (x - mean) rstd + beta [+ residual]), from the last block to the first.

        The values that `stats` read last are then still in the cache.
        """
        c, _, first, end = located(cuda.gridDim.x - 1 - cuda.blockIdx.x, total, length, chunks)
        hi, u, a, b = affine_channel(mean, rstd, gamma, beta, c)
        apply_chunk(
            (x, vectors, xn, c * xc), (residual, vectors, rn, c * rc), (y, vectors, yn, c * yc),
            first, end, hi, u, a, b, computed(floor), added,
        )  # fmt: skip

    @kernel(2)
    def backward_reduce(
        dy, dyn, dyc, x, xn, xc, y, yn, yc, C, vectors, total, length, chunks,
        mean, rstd, gamma, beta, mask, partial,
    ):  # fmt: skip
        """partial[:, c, k] = sum g, sum g (x u - hi) scale of chunk k."""
        c, k, first, end = located(cuda.blockIdx.x, total, length, chunks)
        shared = cuda.shared.array(WARP, types.float64)
        hi, u, a, b = affine_channel(mean, rstd, gamma, beta, c)
        s, t = backward_reduce_chunk(
            (dy, vectors, dyn, c * dyc), (x, vectors, xn, c * xc), (y, vectors, yn, c * yc), 0, 0,
            first, end, hi, u, a, b, scale_channel(rstd, u, c), mask,
        )  # fmt: skip
        store_sums(partial, C, c, k, chunks, s, t, shared)

    @kernel(2)
    def backward_apply(
        dy, dyn, dyc, x, xn, xc, y, yn, yc, dx, dxn, dxc, dresidual, rn, rc,
        C, vectors, total, length, chunks,
        mean, rstd, gamma, beta, sums, count, mask, training, wanted,
    ):  # fmt: skip
        """dx = gamma rstd (g - (sums[0] + x_hat sums[1]) / count) and dresidual = g.

        dx = gamma rstd g without `training`. Writes dx if wanted & 1, dresidual if wanted & 2.
        """
        c, _, first, end = located(cuda.gridDim.x - 1 - cuda.blockIdx.x, total, length, chunks)
        hi, u, a, b = affine_channel(mean, rstd, gamma, beta, c)
        v, f = factors_channel(rstd, gamma, sums, C, count, u, training, c)
        h, p, q = zero, zero, zero
        if training:
            h, p, q = coefficients_channel(mean, rstd, sums, C, count, u, v, c)
        backward_apply_chunk(
            (dy, vectors, dyn, c * dyc), (x, vectors, xn, c * xc), (y, vectors, yn, c * yc),
            (dx, vectors, dxn, c * dxc), (dresidual, vectors, rn, c * rc),
            first, end, hi, u, a, b, h, p, q, v, f, mask, training, wanted,
        )  # fmt: skip

    second_sums = second_sums_of(computed, pair_size, 1)
    second = second_functions(computed)
    tangent_channel, tangent64, tangent = second.tangent_channel, second.tangent64, second.tangent
    curvature_channel, curvature64 = second.curvature_channel, second.curvature64
    curvature, one = second.curvature, computed(1)

    @kernel(2)
    def second_reduce(
        ddx, ddxn, ddxc, dy, dyn, dyc, x, xn, xc, C, vectors, total, length, chunks,
        mean, rstd, partial,
    ):  # fmt: skip
        """partial[:, c, k] = sum d, d t, g, g t, d g of chunk k; d = ddx, g = dy, t from x."""
        c, k, first, end = located(cuda.blockIdx.x, total, length, chunks)
        shared = cuda.shared.array(WARP, types.float64)
        hi, scale = computed(mean[c]), scale_channel(rstd, one, c)
        d = cuda.local.array(pair_size, computed)
        g = cuda.local.array(pair_size, computed)
        values = cuda.local.array(pair_size, computed)
        s_d, s_dt, s_g, s_gt, s_dg = 0.0, 0.0, 0.0, 0.0, 0.0
        i = first + cuda.threadIdx.x
        while i < end:
            count = fetch_ddx((ddx, vectors, ddxn, c * ddxc), few, i, end, d)
            fetch_dy((dy, vectors, dyn, c * dyc), few, i, end, g)
            fetch((x, vectors, xn, c * xc), few, i, end, values)
            more_d, more_dt, more_g, more_gt, more_dg = second_sums(
                d, g, values, 0, count, hi, scale
            )
            s_d += more_d
            s_dt += more_dt
            s_g += more_g
            s_gt += more_gt
            s_dg += more_dg
            i += few * cuda.blockDim.x
        store_sums(partial, C, c, k, chunks, s_d, s_dt, shared)
        store_sums(partial, C, 2 * C + c, k, chunks, s_g, s_gt, shared)
        s_dg = block_sum(s_dg, shared)
        if cuda.threadIdx.x == 0:
            partial[(4 * C + c) * chunks + k] = s_dg

    @kernel(2)
    def second_apply(
        ddx, ddxn, ddxc, dy, dyn, dyc, x, xn, xc, ddy, ddyn, ddyc, dx, dxn, dxc,
        C, vectors, total, length, chunks, mean, table, curved,
    ):  # fmt: skip
        """Write ddy and, if `curved`, dx, from the last block to the first; see `table`."""
        c, _, first, end = located(cuda.gridDim.x - 1 - cuda.blockIdx.x, total, length, chunks)
        hi, a, h, p, q, plain = tangent_channel(mean, table, C, c)
        b, k, s, t = zero, zero, zero, zero
        if curved:
            b, k, s, t, more = curvature_channel(mean, table, C, c)
            plain = plain and more
        d = cuda.local.array(pair_size, computed)
        g = cuda.local.array(pair_size, computed)
        values = cuda.local.array(pair_size, computed)
        i = first + cuda.threadIdx.x
        while i < end:
            fetch_ddx((ddx, vectors, ddxn, c * ddxc), few, i, end, d)
            fetch((x, vectors, xn, c * xc), few, i, end, values)
            if curved:
                fetch_dy((dy, vectors, dyn, c * dyc), few, i, end, g)
            for r in range(few):
                j = i + r * cuda.blockDim.x
                if j < end:
                    for w in range(r * width, (r + 1) * width):
                        d_w, x_w = d[w], values[w]
                        d[w] = (
                            tangent(d_w, x_w, hi, a, h, p, q)
                            if plain
                            else tangent64(mean, table, C, c, d_w, x_w)
                        )
                        if curved:
                            values[w] = (
                                curvature(d_w, g[w], x_w, hi, h, p, b, k, s, t)
                                if plain
                                else curvature64(mean, table, C, c, d_w, g[w], x_w)
                            )
                    store(ddy, place((ddy, vectors, ddyn, c * ddyc), j), d, r * width)
                    if curved:
                        store(dx, place((dx, vectors, dxn, c * dxc), j), values, r * width)
            i += few * cuda.blockDim.x

    stats_keeping, apply_kept = stats_with(keep), apply_with(recall)
    backward_reduce_keeping, backward_apply_kept = (
        backward_reduce_with(keep),
        backward_apply_with(recall, recall),
    )

    def fused(barrier: Any) -> SimpleNamespace:
        """Return kernels that read memory once and keep a channel on chip.

        `blocks` blocks keep a channel, `each` chunks per block. `barrier` waits for all of them.
        """

        @kernel(3)
        def forward(
            x, xn, xc, residual, rn, rc, y, yn, yc, C, vectors, total, length, chunks, blocks, each,
            count, eps, partial, mean, m2, rstd, gamma, beta, floor, added,
        ):  # fmt: skip
            """`stats`, `finish_moments` and `apply`."""
            slab = cuda.shared.array(0, computed)
            shared = cuda.shared.array(WARP, types.float64)
            c = quotient(cuda.blockIdx.x, blocks)
            begin = (cuda.blockIdx.x - c * blocks) * each
            stop = min(begin + each, chunks)
            K = first_value(x, c * xc)
            k = begin
            while k < stop:
                first, end = k * length, min((k + 1) * length, total)
                kept = slab, length, first, (k - begin) * length * width
                s, q = stats_keeping((x, vectors, xn, c * xc), kept, first, end, K)
                store_sums(partial, C, c, k, chunks, s, q, shared)
                k += 1
            if cuda.threadIdx.x == 0 and begin == 0:
                mean[c] = K
            barrier()
            if cuda.threadIdx.x < WARP and begin == 0:
                finish_moments_channel(partial, c, C, chunks, count, eps, mean, m2, rstd)
            barrier()
            hi, u, a, b = affine_channel(mean, rstd, gamma, beta, c)
            k = begin
            while k < stop:
                first, end = k * length, min((k + 1) * length, total)
                kept = slab, length, first, (k - begin) * length * width
                apply_kept(
                    kept, (residual, vectors, rn, c * rc), (y, vectors, yn, c * yc),
                    first, end, hi, u, a, b, computed(floor), added,
                )  # fmt: skip
                k += 1

        @kernel(1)
        def backward(
            dy, dyn, dyc, x, xn, xc, y, yn, yc, dx, dxn, dxc, dresidual, rn, rc,
            C, vectors, total, length, chunks, blocks, each,
            mean, rstd, gamma, beta, partial, sums, count, mask, wanted,
        ):  # fmt: skip
            """`backward_reduce`, `finish_sums` and `backward_apply`."""
            slab = cuda.shared.array(0, computed)
            shared = cuda.shared.array(WARP, types.float64)
            c = quotient(cuda.blockIdx.x, blocks)
            begin = (cuda.blockIdx.x - c * blocks) * each
            stop = min(begin + each, chunks)
            half = each * length * width  # half of the slab: it holds g, then x
            hi, u, a, b = affine_channel(mean, rstd, gamma, beta, c)
            scale = scale_channel(rstd, u, c)
            y_view = y, vectors, yn, c * yc
            k = begin
            while k < stop:
                first, end = k * length, min((k + 1) * length, total)
                start = (k - begin) * length * width
                s, t = backward_reduce_keeping(
                    (dy, vectors, dyn, c * dyc), (x, vectors, xn, c * xc), y_view,
                    (slab, length, first, start), (slab, length, first, start + half),
                    first, end, hi, u, a, b, scale, mask,
                )  # fmt: skip
                store_sums(partial, C, c, k, chunks, s, t, shared)
                k += 1
            barrier()
            if cuda.threadIdx.x < WARP and begin == 0:
                finish_sums_channel(partial, c, C, chunks, mean, rstd, sums)
            barrier()
            v, f = factors_channel(rstd, gamma, sums, C, count, u, True, c)
            h, p, q = coefficients_channel(mean, rstd, sums, C, count, u, v, c)
            k = begin
            while k < stop:
                first, end = k * length, min((k + 1) * length, total)
                start = (k - begin) * length * width
                backward_apply_kept(
                    (slab, length, first, start), (slab, length, first, start + half), y_view,
                    (dx, vectors, dxn, c * dxc), (dresidual, vectors, rn, c * rc),
                    first, end, hi, u, a, b, h, p, q, v, f, 0, True, wanted,
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
