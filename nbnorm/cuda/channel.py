"""A channel's arithmetic on the GPU, in float64: sums of all chunks, coefficients of affine maps.

Everything is summed around the channel's first value, so chunks need no merging: with d = x - K,
mean = K + sum d / m and M2 = sum d^2 - (sum d)^2 / m. In float64 that loses nothing that float32
could hold: K is one of the m values, so M2 is at least (m - 1) / m of the square of its distance
from the mean, and the difference is off by some m 2^-53 of it.
"""

from __future__ import annotations

import math
from typing import Any

from numba import cuda
from numba.cuda import types

from nbnorm.cuda.jit import device, kernel
from nbnorm.cuda.values import WARP, warp_sum


@device
def chunk_sum(partial, first, chunks):
    """Sum of the chunks of one channel by a warp, the same in every lane."""
    total = 0.0
    for k in range(cuda.threadIdx.x % WARP, chunks, WARP):
        total += partial[first + k]
    return warp_sum(total)


@device
def rstd_of(var, eps):
    """1 / sqrt(var + eps); 0 where that is 1/0."""
    spread = var + eps
    return 0.0 if spread == 0.0 else 1.0 / math.sqrt(spread)


@device
def finish_moments(partial, c, C, chunks, m, eps, mean, m2, rstd):
    """Mean, M2 and rstd of a channel by one warp; mean holds K."""
    s = chunk_sum(partial, c * chunks, chunks)
    q = chunk_sum(partial, (C + c) * chunks, chunks)
    if cuda.threadIdx.x % WARP == 0:
        mean[c] += s / m
        rest = cuda.fma(-s, s / m, q)
        rest = 0.0 if rest < 0.0 else rest
        m2[c] = rest
        # An M2 that float64 does not hold says nothing of the spread: y is NaN rather than beta.
        rstd[c] = math.nan if rest == math.inf else rstd_of(rest / m, eps)


@kernel()
def finish(partial, C, chunks, m, eps, mean, m2, rstd):
    """Mean, M2 and rstd of all channels."""
    c = types.int64(cuda.blockIdx.x * (cuda.blockDim.x // WARP) + cuda.threadIdx.x // WARP)
    if c < C:
        finish_moments(partial, c, C, chunks, m, eps, mean, m2, rstd)


@kernel()
def rstd_all(var, eps, rstd, C):
    """rstd of every channel's variance."""
    c = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if c < C:
        rstd[c] = rstd_of(var[c], eps)


@kernel()
def move(running_mean, running_var, mean, m2, momentum, divisor, C):
    """Running statistics towards those of a batch, whose variance is M2 / divisor."""
    c = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if c < C:
        old = 1.0 - momentum
        running_mean[c] = old * running_mean[c] + momentum * mean[c]
        running_var[c] = old * running_var[c] + momentum * (m2[c] / divisor)


def coefficients(computed: Any) -> tuple[Any, Any, Any]:
    """Return `affine`, `unit_of` and `gradient` for the dtype `computed`.

    What they give is computed in float64 and rounded once.
    """

    @device
    def affine(mean, rstd, gamma, beta, c):
        """hi, a, b of y = (x - hi) a + b: x - hi is exact near the mean = hi + lo."""
        hi = computed(mean[c])
        a = gamma[c] * rstd[c]
        lo = mean[c] - types.float64(hi)
        return hi, computed(a), computed(cuda.fma(-lo, a, types.float64(beta[c])))

    @device
    def unit_of(rstd, c):
        """Power of two next to rstd, in the range of normal numbers: (x - hi) unit is exact."""
        _, exponent = math.frexp(rstd[c])
        return computed(math.ldexp(1.0, min(max(exponent - 1, -126), 126)))

    @device
    def gradient(mean, rstd, sums, C, count, c):
        """h, p, q of dx / (gamma rstd) = (dy - h) - ((x - hi) p + q); see the CPU's."""
        lo = mean[c] - types.float64(computed(mean[c]))
        mean_dy = sums[c] / count
        h = computed(mean_dy)
        p = rstd[c] * (sums[C + c] / count)
        return h, computed(p), computed(cuda.fma(-lo, p, mean_dy - types.float64(h)))

    return affine, unit_of, gradient


def finishing(computed: Any) -> Any:
    """Return `finish_gradients`, which ends `reduce` for one channel."""
    _, unit_of, _ = coefficients(computed)

    @device
    def finish_gradients(partial, c, C, chunks, mean, rstd, sums):
        """sum dy and sum dy x_hat of a channel by one warp."""
        s = chunk_sum(partial, c * chunks, chunks)
        t = chunk_sum(partial, (C + c) * chunks, chunks)
        if cuda.threadIdx.x % WARP == 0:
            lo = mean[c] - types.float64(computed(mean[c]))
            sums[c] = s
            sums[C + c] = rstd[c] * cuda.fma(-lo, s, t / types.float64(unit_of(rstd, c)))

    return finish_gradients


def finish_sums(computed: Any) -> Any:
    """Return the kernel that ends `reduce`, of all channels."""
    finish_gradients = finishing(computed)

    @kernel()
    def finish_sums(partial, C, chunks, mean, rstd, sums):
        """sum dy and sum dy x_hat of all channels."""
        c = types.int64(cuda.blockIdx.x * (cuda.blockDim.x // WARP) + cuda.threadIdx.x // WARP)
        if c < C:
            finish_gradients(partial, c, C, chunks, mean, rstd, sums)

    return finish_sums
