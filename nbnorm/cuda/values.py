"""What a thread does with a tile of values, and a block with the sums of its threads.

A tile is up to `number` values of one channel: every `step`-th value of a thread's local array from
`start` on, the first `count` of which are valid. It is summed in the compute dtype around its own
mean. Sums over tiles, threads and blocks are float64.

Products are added by `fma`, here and in channel.py. Otherwise the compiler would choose which ones
to fuse, and could choose others in each kernel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from nbnorm.cuda.intrinsics import memory_of
from nbnorm.cuda.jit import device
from nbnorm.cuda.plan import VECTOR, WARP

ALL_LANES = 0xFFFFFFFF


@device
def warp_sum(value):
    """Sum over a warp, pairwise, the same in every lane."""
    value += cuda.shfl_xor_sync(ALL_LANES, value, 16)
    value += cuda.shfl_xor_sync(ALL_LANES, value, 8)
    value += cuda.shfl_xor_sync(ALL_LANES, value, 4)
    value += cuda.shfl_xor_sync(ALL_LANES, value, 2)
    return value + cuda.shfl_xor_sync(ALL_LANES, value, 1)


@device
def block_barrier():
    """Wait for all threads of the block."""
    cuda.syncthreads()


@device
def block_sum(value, shared):
    """Sum over a block, warp after warp, the same in every thread."""
    thread = cuda.threadIdx.x
    value = warp_sum(value)
    cuda.syncthreads()
    if thread % WARP == 0:
        shared[thread // WARP] = value
    cuda.syncthreads()
    total = 0.0
    for warp in range(cuda.blockDim.x // WARP):
        total += shared[warp]
    return total


@device
def rectified(value, floor):
    """max(value, floor), but NaN stays NaN; floor is 0 for ReLU, -inf for no activation."""
    return floor if value <= floor else value


@device
def normalised(x, hi, u, a, b):
    """y before residual and activation: (x u - hi) a + b.

    Backward recomputes it with the same expression. x u - hi is rounded once, as u is a power of
    two; for u = 1 it is x - hi.
    """
    return cuda.fma(cuda.fma(x, u, -hi), a, b)


@device
def centred(g, x, hi, u, h, p, q, v, training):
    """dx / f = (g v - h) - ((x u - hi) p + q), or g v for frozen statistics."""
    return cuda.fma(g, v, -h) - normalised(x, hi, u, p, q) if training else g * v


@device
def masked(g, x, y, hi, u, a, b, mask, threshold, zero):
    """dy if ReLU let the value pass, else 0.

    The mask is recomputed from x (mask = 1) or read from y (mask = 2). A value that does not exceed
    `threshold` was stored as 0.
    """
    if mask == 1:
        return g if normalised(x, hi, u, a, b) > threshold else zero
    return g if y > zero else zero


def float32_load(width: int) -> Any:
    """Return a load of `width` float32 values, in as many vectors as that takes."""
    at_once = min(width, VECTOR // 4)
    load, _ = memory_of("float32", at_once)

    @device
    def load_all(memory, index, values, start):
        """values[start : start + width] = memory[index : index + width]."""
        for i in range(0, width, at_once):
            load(memory, index + i, values, start + i)

    return load_all


def moment_sums_of(computed: Any, number: int, step: int) -> Any:
    """Return `moment_sums` for tiles of `number` values, `step` apart, of dtype `computed`."""
    limits = np.finfo(np.float32 if computed == types.float32 else np.float64)
    # Between these bounds, no square of a deviation that counts has over- or underflowed.
    least, most = float(limits.tiny) * 2.0**26, float(limits.max)
    narrow = computed == types.float32
    zero = computed(0)

    @device
    def moment_sums64(values, start, count, K):
        """`moment_sums` in float64, for squares that float32 does not hold."""
        s = 0.0
        q = 0.0
        for i in range(number):
            if i < count:
                d = types.float64(values[start + i * step]) - K
                s += d
                q = cuda.fma(d, d, q)
        return s, q

    @device
    def moment_sums(values, start, count, K):
        """sum d and sum d^2 of a tile, where d = x - K.

        With e = x - c from the tile's own mean c, and c' = c - K: sum d = n c' + sum e and
        sum d^2 = sum e^2 + c' (n c' + 2 sum e) (Chan, Golub & LeVeque 1983, from one K).
        """
        if count <= 0:
            return 0.0, 0.0
        total = zero
        for i in range(number):
            if i < count:
                total += values[start + i * step]
        center = total / computed(count)
        s = zero
        q = zero
        for i in range(number):
            if i < count:
                e = values[start + i * step] - center
                s += e
                q = cuda.fma(e, e, q)
        if narrow and not (least <= q <= most):
            return moment_sums64(values, start, count, K)
        c, n = types.float64(center) - K, types.float64(count)
        s, q = types.float64(s), types.float64(q)
        return cuda.fma(n, c, s), cuda.fma(c, cuda.fma(n, c, s + s), q)

    return moment_sums


def gradient_sums_of(computed: Any, number: int, step: int) -> Any:
    """Return `gradient_sums` for tiles of `number` values, `step` apart."""
    zero = computed(0)
    narrow = computed == types.float32
    most = float(np.finfo(np.float32).max)

    @device
    def gradient_sums64(g, x, start, count, hi, u, scale):
        """`gradient_sums` in float64, used if a sum or one of its terms overflows float32."""
        hi, u, scale = types.float64(hi), types.float64(u), types.float64(scale)
        s = 0.0
        t = 0.0
        for i in range(number):
            if i < count:
                d = cuda.fma(types.float64(x[start + i * step]), u, -hi)
                s += types.float64(g[start + i * step])
                t = cuda.fma(types.float64(g[start + i * step]), d * scale, t)
        return s, t

    @device
    def gradient_sums(g, x, start, count, hi, u, scale):
        """sum g and sum g (x u - hi) scale of a tile."""
        s = zero
        t = zero
        for i in range(number):
            if i < count:
                s += g[start + i * step]
                d = cuda.fma(x[start + i * step], u, -hi)
                t = cuda.fma(g[start + i * step], d * scale, t)
        if narrow and not (abs(s) <= most and abs(t) <= most):
            return gradient_sums64(g, x, start, count, hi, u, scale)
        return types.float64(s), types.float64(t)

    return gradient_sums


def second_sums_of(computed: Any, number: int, step: int) -> Any:
    """Return `second_sums` for tiles of `number` values, `step` apart."""
    zero = computed(0)
    narrow = computed == types.float32
    most, least = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny) * 2.0**30

    @device
    def second_sums64(d, g, x, start, count, hi, scale):
        """`second_sums` in float64."""
        hi, scale = types.float64(hi), types.float64(scale)
        s_d, s_dt, s_g, s_gt, s_dg = 0.0, 0.0, 0.0, 0.0, 0.0
        for i in range(number):
            if i < count:
                j = start + i * step
                d_i, g_i = types.float64(d[j]), types.float64(g[j])
                t = (types.float64(x[j]) - hi) * scale
                s_d += d_i
                s_g += g_i
                s_dt = cuda.fma(d_i, t, s_dt)
                s_gt = cuda.fma(g_i, t, s_gt)
                s_dg = cuda.fma(d_i, g_i, s_dg)
        return s_d, s_dt, s_g, s_gt, s_dg

    @device
    def second_sums(d, g, x, start, count, hi, scale):
        """sum d, d t, g, g t and d g of a tile, where t = (x - hi) scale.

        Recomputed in float64 if one overflows, or if sum d g, which matters where rstd is large,
        underflows.
        """
        s_d, s_dt, s_g, s_gt, s_dg = zero, zero, zero, zero, zero
        for i in range(number):
            if i < count:
                j = start + i * step
                t = (x[j] - hi) * scale
                s_d += d[j]
                s_g += g[j]
                s_dt = cuda.fma(d[j], t, s_dt)
                s_gt = cuda.fma(g[j], t, s_gt)
                s_dg = cuda.fma(d[j], g[j], s_dg)
        if narrow:
            finite = abs(s_d) <= most and abs(s_g) <= most and abs(s_dg) <= most
            finite = finite and abs(s_dt) <= most and abs(s_gt) <= most
            some = abs(s_d) + abs(s_dt) > zero and abs(s_g) + abs(s_gt) > zero
            if not finite or (some and abs(s_dg) < least):
                return second_sums64(d, g, x, start, count, hi, scale)
        return (
            types.float64(s_d), types.float64(s_dt), types.float64(s_g), types.float64(s_gt),
            types.float64(s_dg),
        )  # fmt: skip

    return second_sums
