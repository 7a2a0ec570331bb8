"""Passes over x with weights, for any S: a mask is weights of 0 and 1; see `nbnorm._weights`.

Every thread has one channel, and reads values one by one: neighbouring threads, neighbouring
values. By rows (S >= PLANE), a block takes values of one channel, numbered through all its planes.
By columns, it takes samples of `group` channels, and a thread one column. A thread's next value
lies `dn` samples and `ds` values further on; (n, s, dn, ds, S) says where it is.

Values of weight 0 are read, but change no bit: they may be NaN or Inf. Statistics of tiles, threads
and chunks are (weight, mean, M2), merged in float64 (Chan, Golub & LeVeque 1983). Sums around one
value of the channel would need one of weight above 0, which may be anywhere, and of little weight.
Each merge rounds the mean, so a float64 x is summed once more, minus the mean found.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from nbnorm._layout import PLANE
from nbnorm.activations import Activation
from nbnorm.cuda.activations import activation_functions
from nbnorm.cuda.channel import channel_functions, rstd_of
from nbnorm.cuda.intrinsics import STORAGE, memory_of, quotient
from nbnorm.cuda.jit import device, kernel
from nbnorm.cuda.plan import STORED_AS_ZERO, THREADS, UNROLL, WARP, Names
from nbnorm.cuda.values import ALL_LANES, float32_load, normalised

ITEMS = 2 * UNROLL  # values of x in flight if nothing else but weights is read
MOMENT_CELLS, SUM_CELLS = 3 * THREADS, 2 * THREADS  # of shared memory


@device
def merge(m, mean, m2, other_m, other_mean, other_m2):
    """Weight, mean + d m_b / m and M2 + M2_b + d^2 m_a m_b / m of two sets; either may be empty."""
    if other_m == 0.0:
        return m, mean, m2
    if m == 0.0:
        return other_m, other_mean, other_m2
    d = other_mean - mean
    part = other_m / (m + other_m)
    return m + other_m, cuda.fma(d, part, mean), m2 + cuda.fma(d * d, m * part, other_m2)


@device
def warp_merge(m, mean, m2, apart):
    """`merge` with the lane `apart` away."""
    other_m = cuda.shfl_xor_sync(ALL_LANES, m, apart)
    other_mean = cuda.shfl_xor_sync(ALL_LANES, mean, apart)
    other_m2 = cuda.shfl_xor_sync(ALL_LANES, m2, apart)
    return merge(m, mean, m2, other_m, other_mean, other_m2)


@kernel()
def finish_weighted(partial, C, chunks, eps, again, mean, m2, rstd):
    """Turn `partial` into mean, M2 and rstd, one warp per channel; all 0 where nothing counts.

    If `again`, the means in `partial` are relative to mean[c].
    """
    c = types.int64(cuda.blockIdx.x * (cuda.blockDim.x // WARP) + cuda.threadIdx.x // WARP)
    if c < C:
        m, center, spread = 0.0, 0.0, 0.0
        for k in range(cuda.threadIdx.x % WARP, chunks, WARP):
            i = c * chunks + k
            m, center, spread = merge(
                m, center, spread,
                partial[i], partial[C * chunks + i], partial[2 * C * chunks + i],
            )  # fmt: skip
        m, center, spread = warp_merge(m, center, spread, 16)
        m, center, spread = warp_merge(m, center, spread, 8)
        m, center, spread = warp_merge(m, center, spread, 4)
        m, center, spread = warp_merge(m, center, spread, 2)
        m, center, spread = warp_merge(m, center, spread, 1)
        if cuda.threadIdx.x % WARP == 0:
            mean[c] = mean[c] + center if again else center
            m2[c] = spread
            if m == 0.0:
                rstd[c] = 0.0
            else:  # as in `finish_moments`
                rstd[c] = math.nan if spread == math.inf else rstd_of(spread / m, eps)


def tile_moments_of(computed: Any) -> Any:
    """Return `tile_moments` for values and weights of dtype `computed`."""
    limits = np.finfo(np.float32 if computed == types.float32 else np.float64)
    # Between these bounds, no weight or square that counts has over- or underflowed.
    least, most = float(limits.tiny) * 2.0**26, float(limits.max)
    narrow = computed == types.float32

    def moments_in(real: Any) -> Any:
        """Return `moments`, computed in the dtype `real`."""
        zero = real(0)

        @device
        def moments(values, weights):
            """Sum of weights, c near the mean, sum w e and sum w e^2, where e = x - c.

            c is x if all x that count are equal.
            """
            m, first, total = zero, zero, zero
            for i in range(ITEMS):
                w = real(weights[i])
                if w != zero:
                    first = real(values[i]) if m == zero else first
                    total = cuda.fma(w, real(values[i]) - first, total)
                    m += w
            center = first + total / m if m != zero else zero
            s = zero
            q = zero
            for i in range(ITEMS):
                w = real(weights[i])
                if w != zero:
                    e = real(values[i]) - center
                    s = cuda.fma(w, e, s)
                    q = cuda.fma(w * e, e, q)
            return types.float64(m), types.float64(center), types.float64(s), types.float64(q)

        return moments

    moments, moments64 = moments_in(computed), moments_in(types.float64)

    @device
    def tile_moments(values, weights):
        """Weight, mean and M2 of ITEMS values, each with its weight."""
        m, center, s, q = moments(values, weights)
        if m == 0.0:
            return 0.0, 0.0, 0.0
        if narrow and not (least <= q <= most and least <= m):
            m, center, s, q = moments64(values, weights)
        rest = cuda.fma(-s, s / m, q)
        return m, center + s / m, 0.0 if rest < 0.0 else rest

    return tile_moments


def tile_gradients_of(computed: Any) -> Any:
    """Return `tile_gradients` for values and weights of dtype `computed`."""
    narrow = computed == types.float32
    most = float(np.finfo(np.float32).max)

    def gradients_in(real: Any) -> Any:
        """Return `gradients`, computed in the dtype `real`."""

        @device
        def gradients(g, x, weights, hi, u, scale):
            """sum g and sum g (x u - hi) scale of the values of weight above 0."""
            s = real(0)
            t = real(0)
            for i in range(UNROLL):
                if weights[i] > 0:
                    d = cuda.fma(real(x[i]), real(u), -real(hi))
                    s += real(g[i])
                    t = cuda.fma(real(g[i]), d * real(scale), t)
            return types.float64(s), types.float64(t)

        return gradients

    gradients, gradients64 = gradients_in(computed), gradients_in(types.float64)

    @device
    def tile_gradients(g, x, weights, hi, u, scale):
        """`gradients`, in float64 if the sums or their terms overflow float32."""
        s, t = gradients(g, x, weights, hi, u, scale)
        if narrow and not (abs(s) <= most and abs(t) <= most):
            s, t = gradients64(g, x, weights, hi, u, scale)
        return s, t

    return tile_gradients


@device
def row_of(S, group):
    """Threads per channel and per row of threads, and this thread's row and column."""
    per = types.int64(cuda.blockDim.x) if S >= PLANE else S
    readers = group * per
    row = quotient(cuda.threadIdx.x, readers)
    return per, readers, row, cuda.threadIdx.x - row * readers


@device
def combine(shared, i, j, moments):
    """Add thread j's results to thread i's: weight, mean and M2 if `moments`, else two sums."""
    if moments:
        shared[i], shared[THREADS + i], shared[2 * THREADS + i] = merge(
            shared[i], shared[THREADS + i], shared[2 * THREADS + i],
            shared[j], shared[THREADS + j], shared[2 * THREADS + j],
        )  # fmt: skip
    else:
        shared[i] += shared[j]
        shared[THREADS + i] += shared[THREADS + j]


@device
def combine_block(shared, S, group, moments):
    """Combine the results of a channel's threads; True in the thread that holds the total.

    In a tree: all rows of threads into the first one, then that row into its first thread.
    """
    thread = cuda.threadIdx.x
    per, readers, row, column = row_of(S, group)
    number = quotient(cuda.blockDim.x, readers)
    while number > 1:
        half = (number + 1) >> 1
        cuda.syncthreads()
        if row + half < number:
            combine(shared, thread, thread + half * readers, moments)
        number = half
    place, number = column - quotient(column, per) * per, per
    while number > 1:
        half = (number + 1) >> 1
        cuda.syncthreads()
        if row == 0 and place + half < number:
            combine(shared, thread, thread + half, moments)
        number = half
    return row == 0 and place == 0


def build(dtype: str, activation: Activation | None, wide: Names = ()) -> SimpleNamespace:
    """Return the kernels for tensors of a dtype; those named in `wide` are float32."""
    computed = STORAGE[dtype].computed
    activate, through, taken = activation_functions(activation, computed)
    load, store = memory_of(dtype, 1)
    tile_moments, tile_gradients = tile_moments_of(computed), tile_gradients_of(computed)
    of = channel_functions(computed)
    affine_channel, scale_channel = of.affine_channel, of.scale_channel
    factors_channel, coefficients_channel = of.factors_channel, of.coefficients_channel
    zero, threshold = computed(0), computed(STORED_AS_ZERO.get(dtype, 0.0))
    double = computed == types.float64

    @device
    def located(block, C, S, N, group, length, chunks):
        """Chunk, channel, whether it exists, this thread's first value, and number of values.

        A thread without a channel gets channel 0, and no values.
        """
        g = quotient(block, chunks)
        k = block - g * chunks
        per, readers, row, column = row_of(S, group)
        at_once, within = quotient(cuda.blockDim.x, readers), quotient(column, per)
        c = g * group + within
        there = row < at_once and c < C
        first, step = k * length + row, at_once
        n, s, dn, ds, end = first, column - within * per, step, 0, min((k + 1) * length, N)
        if S >= PLANE:
            first, step = k * length + column, per
            n = quotient(first, S)
            s, dn, ds, end = first - n * S, 0, step, min((k + 1) * length, N * S)
        count = quotient(end - first + step - 1, step) if there and first < end else 0
        return k, c if there else 0, there, (n, s, dn, ds, S), count

    @device
    def after(at, number):
        """The place `number` of the thread's values further on."""
        n, s, dn, ds, S = at
        n += number * dn
        s += number * ds
        while s >= S:
            s -= S
            n += 1
        return n, s, dn, ds, S

    def fetch_with(load: Any) -> Any:
        """Make `fetch`, which loads values by `load`."""

        @device
        def fetch(view, number, at, count, values):
            """Load the first `count` of `number` values from place `at` on, and leave the rest.

            `view` is (memory, stride of n, where the channel begins).
            """
            memory, n_stride, start = view
            for i in range(number):
                if i < count:
                    load(memory, at[0] * n_stride + start + at[1], values, i)
                at = after(at, 1)

        return fetch

    fetch = fetch_with(load)
    fetch_wide = fetch_with(float32_load(1)) if wide else fetch
    fetch_dy, fetch_residual, fetch_y = (
        fetch_wide if name in wide else fetch for name in ("dy", "residual", "y")
    )

    @device
    def fetch_weights(view, number, at, count, weights):
        """Load weights as `fetch` loads values; those from `count` on are 0."""
        memory, n_stride, start = view
        for i in range(number):
            weights[i] = zero
            if i < count:
                weights[i] = computed(memory[at[0] * n_stride + start + at[1]])
            at = after(at, 1)

    @device
    def write(view, at, count, values):
        """Store the next UNROLL values, of which `count` are there."""
        memory, n_stride, start = view
        for i in range(UNROLL):
            if i < count:
                store(memory, at[0] * n_stride + start + at[1], values, i)
            at = after(at, 1)

    @kernel(2)
    def stats(
        x, xn, xc, weights, wn, wc, C, S, N, group, length, chunks, partial, mean, again,
    ):  # fmt: skip
        """partial[:, c, k] = weight, mean and M2 of chunk k, of x - mean[c] if `again`."""
        k, c, there, at, count = located(cuda.blockIdx.x, C, S, N, group, length, chunks)
        shared = cuda.shared.array(MOMENT_CELLS, types.float64)
        values = cuda.local.array(ITEMS, computed)
        w = cuda.local.array(ITEMS, computed)
        m, center, m2 = 0.0, 0.0, 0.0
        while count > 0:
            fetch_weights((weights, wn, c * wc), ITEMS, at, count, w)
            fetch((x, xn, c * xc), ITEMS, at, count, values)
            if double and again:
                for i in range(ITEMS):
                    values[i] -= computed(mean[c])
            more_m, more_center, more_m2 = tile_moments(values, w)
            m, center, m2 = merge(m, center, m2, more_m, more_center, more_m2)
            at, count = after(at, ITEMS), count - ITEMS
        thread = cuda.threadIdx.x
        shared[thread], shared[THREADS + thread], shared[2 * THREADS + thread] = m, center, m2
        if combine_block(shared, S, group, True) and there:
            partial[c * chunks + k] = shared[thread]
            partial[(C + c) * chunks + k] = shared[THREADS + thread]
            partial[(2 * C + c) * chunks + k] = shared[2 * THREADS + thread]

    @kernel()
    def apply(
        x, xn, xc, residual, rn, rc, y, yn, yc, weights, wn, wc, C, S, N, group, length, chunks,
        mean, rstd, gamma, beta, floor, added, fill, fills,
    ):  # fmt: skip
        """y = act(gamma (x - mean) rstd + beta [+ residual]); fill where w is 0, if `fills`."""
        block = cuda.gridDim.x - 1 - cuda.blockIdx.x
        _, c, _, at, count = located(block, C, S, N, group, length, chunks)
        values = cuda.local.array(UNROLL, computed)
        more = cuda.local.array(UNROLL, computed)
        w = cuda.local.array(UNROLL, computed)
        hi, u, a, b = affine_channel(mean, rstd, gamma, beta, c)
        low, other = computed(floor), computed(fill)
        while count > 0:
            fetch((x, xn, c * xc), UNROLL, at, count, values)
            if added:
                fetch_residual((residual, rn, c * rc), UNROLL, at, count, more)
            if fills:
                fetch_weights((weights, wn, c * wc), UNROLL, at, count, w)
            for i in range(UNROLL):
                value = normalised(values[i], hi, u, a, b)
                if added:
                    value += more[i]
                value = activate(value, low)
                values[i] = other if fills and w[i] == zero else value
            write((y, yn, c * yc), at, count, values)
            at, count = after(at, UNROLL), count - UNROLL

    @kernel(2)
    def backward_reduce(
        dy, dyn, dyc, x, xn, xc, y, yn, yc, weights, wn, wc, C, S, N, group, length, chunks,
        mean, rstd, gamma, beta, mask, partial,
    ):  # fmt: skip
        """partial[:, c, k] = sum g, sum g (x u - hi) scale of what counts in chunk k."""
        k, c, there, at, count = located(cuda.blockIdx.x, C, S, N, group, length, chunks)
        shared = cuda.shared.array(SUM_CELLS, types.float64)
        g = cuda.local.array(UNROLL, computed)
        values = cuda.local.array(UNROLL, computed)
        outputs = cuda.local.array(UNROLL, computed)
        w = cuda.local.array(UNROLL, computed)
        hi, u, a, b = affine_channel(mean, rstd, gamma, beta, c)
        scale = scale_channel(rstd, u, c)
        s, t = 0.0, 0.0
        while count > 0:
            fetch_dy((dy, dyn, c * dyc), UNROLL, at, count, g)
            fetch((x, xn, c * xc), UNROLL, at, count, values)
            fetch_weights((weights, wn, c * wc), UNROLL, at, count, w)
            if mask == 2:
                fetch_y((y, yn, c * yc), UNROLL, at, count, outputs)
            if mask:
                for i in range(UNROLL):
                    values[i] = taken(values[i])
                    g[i] = through(g[i], values[i], outputs[i], hi, u, a, b, mask, threshold, zero)
            more_s, more_t = tile_gradients(g, values, w, hi, u, scale)
            s += more_s
            t += more_t
            at, count = after(at, UNROLL), count - UNROLL
        thread = cuda.threadIdx.x
        shared[thread], shared[THREADS + thread] = s, t
        if combine_block(shared, S, group, False) and there:
            partial[c * chunks + k] = shared[thread]
            partial[(C + c) * chunks + k] = shared[THREADS + thread]

    @kernel(2)
    def backward_apply(
        dy, dyn, dyc, x, xn, xc, y, yn, yc, dx, dxn, dxc, dresidual, rn, rc, weights, wn, wc,
        C, S, N, group, length, chunks,
        mean, rstd, gamma, beta, sums, counts, mask, training, wanted,
    ):  # fmt: skip
        """dx = f ((g v - w h) - w ((x u - hi) p + q)) if wanted & 1, dresidual = g if wanted & 2.

        0 where w is 0. dx = f v g without `training`. counts[c] is m of channel c.
        """
        block = cuda.gridDim.x - 1 - cuda.blockIdx.x
        _, c, _, at, count = located(block, C, S, N, group, length, chunks)
        g = cuda.local.array(UNROLL, computed)
        values = cuda.local.array(UNROLL, computed)
        outputs = cuda.local.array(UNROLL, computed)
        w = cuda.local.array(UNROLL, computed)
        hi, u, a, b = affine_channel(mean, rstd, gamma, beta, c)
        m = counts[c] if counts[c] > 0.0 else 1.0  # where nothing counts, any number will do
        v, f = factors_channel(rstd, gamma, sums, C, m, u, training, c)
        h, p, q = zero, zero, zero
        if training:
            h, p, q = coefficients_channel(mean, rstd, sums, C, m, u, v, c)
        while count > 0:
            fetch_dy((dy, dyn, c * dyc), UNROLL, at, count, g)
            fetch((x, xn, c * xc), UNROLL, at, count, values)
            fetch_weights((weights, wn, c * wc), UNROLL, at, count, w)
            if mask == 2:
                fetch_y((y, yn, c * yc), UNROLL, at, count, outputs)
            for i in range(UNROLL):
                if mask:
                    values[i] = taken(values[i])
                    g[i] = through(g[i], values[i], outputs[i], hi, u, a, b, mask, threshold, zero)
                d = g[i] * v
                if training:
                    d = cuda.fma(g[i], v, -(w[i] * h))
                    d = cuda.fma(-w[i], normalised(values[i], hi, u, p, q), d)
                values[i] = f * d if w[i] != zero else zero
                g[i] = g[i] if w[i] != zero else zero
            if wanted & 2:
                write((dresidual, rn, c * rc), at, count, g)
            if wanted & 1:
                write((dx, dxn, c * dxc), at, count, values)
            at, count = after(at, UNROLL), count - UNROLL

    return SimpleNamespace(
        stats=stats, apply=apply, backward_reduce=backward_reduce, backward_apply=backward_apply,
    )  # fmt: skip
