"""What a thread does with a batch of values, and a block with the sums of its threads.

A batch is `number` values of one channel, every `step`-th of a thread's own array from `start` on,
of which the first `count` are there. It is summed in the compute dtype around its own mean; what is
added up over batches, threads and blocks is float64.

Where a product is added, it is by `fma`, here and in channel.py: which of them to fuse is else the
compiler's choice, and could be another one in each kernel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from nbnorm.cuda.jit import device

WARP = 32
ALL_LANES = 0xFFFFFFFF


@device
def warp_sum(value):
    """Sum over a warp, in pairs, the same in every lane."""
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
    """max(value, floor) that lets NaN pass; floor is 0 for ReLU, -inf for no activation."""
    return floor if value <= floor else value


@device
def normalised(x, hi, u, a, b):
    """y before residual and activation; backward recomputes the ReLU mask by this expression.

    x u - hi is rounded once, u being a power of two; of u = 1 it is x - hi.
    """
    return cuda.fma(cuda.fma(x, u, -hi), a, b)


@device
def centred(g, x, hi, u, h, p, q, v, training):
    """dx / f, or g v where statistics are constants."""
    return cuda.fma(g, v, -h) - normalised(x, hi, u, p, q) if training else g * v


@device
def passed(g, x, y, hi, u, a, b, masked, least, zero):
    """dy where ReLU let the value pass: recomputed from x (masked 1), or read from y (2).

    What is not above `least` was stored as 0.
    """
    if masked == 1:
        return g if normalised(x, hi, u, a, b) > least else zero
    return g if y > zero else zero


def moments_of(computed: Any, number: int, step: int) -> Any:
    """Return `moments` for batches of `number` values, `step` apart, in the dtype `computed`."""
    limits = np.finfo(np.float32 if computed == types.float32 else np.float64)
    # Between these no square of a deviation that counts has over- or underflowed.
    least, most = float(limits.tiny) * 2.0**26, float(limits.max)
    narrow = computed == types.float32
    zero = computed(0)

    @device
    def moments64(values, start, count, shift):
        """`moments` in float64, for squares that float32 does not hold."""
        s = 0.0
        q = 0.0
        for i in range(number):
            if i < count:
                d = types.float64(values[start + i * step]) - shift
                s += d
                q = cuda.fma(d, d, q)
        return s, q

    @device
    def moments(values, start, count, shift):
        """Sums of d and of d^2, d = x - shift, of a batch.

        With e = x - c from the batch's own mean c, and c' = c - shift: sum d = n c' + sum e, and
        sum d^2 = sum e^2 + c' (n c' + 2 sum e) (Chan, Golub & LeVeque 1983, from one shift).
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
            return moments64(values, start, count, shift)
        c, n = types.float64(center) - shift, types.float64(count)
        s, q = types.float64(s), types.float64(q)
        return cuda.fma(n, c, s), cuda.fma(c, cuda.fma(n, c, s + s), q)

    return moments


def gradients_of(computed: Any, number: int, step: int) -> Any:
    """Return `gradients` for batches of `number` values, `step` apart."""
    zero = computed(0)
    narrow = computed == types.float32
    most = float(np.finfo(np.float32).max)

    @device
    def gradients64(g, x, start, count, hi, u, scale):
        """`gradients` in float64, for sums or an x_hat that float32 does not hold."""
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
    def gradients(g, x, start, count, hi, u, scale):
        """Sums of g and of g (x u - hi) scale of a batch."""
        s = zero
        t = zero
        for i in range(number):
            if i < count:
                s += g[start + i * step]
                d = cuda.fma(x[start + i * step], u, -hi)
                t = cuda.fma(g[start + i * step], d * scale, t)
        if narrow and not (abs(s) <= most and abs(t) <= most):
            return gradients64(g, x, start, count, hi, u, scale)
        return types.float64(s), types.float64(t)

    return gradients
