"""A channel's arithmetic on the GPU, in float64: sums of all chunks, coefficients of affine maps.

Everything is summed around the channel's first value, so chunks need no merging: with d = x - K,
mean = K + sum d / m and M2 = sum d^2 - (sum d)^2 / m. In float64 that loses nothing that float32
could hold: K is one of the m values, so M2 is at least (m - 1) / m of the square of its distance
from the mean, and the difference is off by some m 2^-53 of it.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from nbnorm.cuda.intrinsics import exponent_of, power_of
from nbnorm.cuda.jit import device, kernel
from nbnorm.cuda.values import WARP, warp_sum

# What `exponent_of` says of 0 and subnormal numbers, and of Inf and NaN.
NONE, ENDLESS = -1023, 1024


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


@device
def next_to(rstd):
    """Exponent of the power of two next to rstd, in the range of float32's normal numbers."""
    return min(max(exponent_of(rstd), -126), 126)


def units(computed: Any) -> SimpleNamespace:
    """Return the CPU's `unit_for`, `most_for` and `in_range` for the dtype `computed`; see there.

    Powers of two are exponents here, for which any GPU's arithmetic is fast, and only asked for
    where `usual` says that one may be needed.
    """
    limits = np.finfo(np.float32 if computed == types.float32 else np.float64)
    least, finite = int(limits.minexp), float(limits.max)
    # From here on x - hi may overflow: less than half the distance of the greatest two numbers.
    far = int(limits.maxexp) - int(limits.nmant) - 2
    room = int(limits.maxexp) - 29

    @device
    def usual(size):
        """Whether a number of this size, and one twice as large, is a normal one of the dtype."""
        return least <= size < -least or size == NONE

    @device
    def unit_for(a, lowest, most):
        """Unit for which v u, v = x - hi, and a / u are in the dtype's range as v a is."""
        size = exponent_of(a)
        unit = min(max(lowest, size + least), size - least)
        return max(min(unit, most, -least), least)

    @device
    def most_for(hi):
        """Greatest unit for which hi and x - hi stay finite."""
        size = exponent_of(hi)
        return -1 if far <= size < ENDLESS else -1 - size - least

    @device
    def in_range(value):
        """A finite value as the nearest finite one of the dtype, so that 0 times it is 0."""
        if abs(value) < math.inf:
            value = min(max(value, -finite), finite)
        return computed(value)

    @device
    def bounds(p, size, unit):
        """Least and greatest v for p = rstd mean(dy x_hat) and means of dy and dy x_hat of a size.

        p v / u must be a normal number. x_hat is at most the root of count, and what is subtracted
        from dy so many times as large; so is dy itself, count times its mean, where only one value
        of it is not 0.
        """
        lowest, most = 0, unit - 1 - p - least
        if size <= room:
            if NONE < p < unit + least:
                lowest = min(unit + least - p, room - size)
        elif size < ENDLESS:
            most = min(most, -24)
        return lowest, most

    return SimpleNamespace(
        far=far, room=room, usual=usual, unit_for=unit_for, most_for=most_for, in_range=in_range,
        bounds=bounds,
    )  # fmt: skip


def coefficients(computed: Any) -> SimpleNamespace:
    """Return the functions below for the dtype `computed`.

    What they give is computed in float64 and rounded once.
    """
    of, one = units(computed), computed(1)
    far, room, usual, unit_for = of.far, of.room, of.usual, of.unit_for
    most_for, in_range, bounds = of.most_for, of.in_range, of.bounds

    @device
    def plain_affine(mean, rstd, gamma, beta, c):
        """hi, a, b of `affine` with u = 1, and whether that u will do."""
        hi = types.float64(computed(mean[c]))
        a = types.float64(gamma[c]) * rstd[c]
        b = cuda.fma(hi - mean[c], a, types.float64(beta[c]))
        fits = usual(exponent_of(a)) and exponent_of(hi) < far
        return computed(hi), computed(a), computed(b), fits

    @device
    def affine(mean, rstd, gamma, beta, c):
        """hi, u, a, b of y = (x u - hi) a + b: x - hi is exact near the mean = hi + lo.

        hi is that of the mean times u, a power of two: 1 unless x - hi or gamma rstd leaves the
        dtype's range.
        """
        hi, a, b, fits = plain_affine(mean, rstd, gamma, beta, c)
        if fits:
            return hi, one, a, b
        factor = types.float64(gamma[c]) * rstd[c]
        unit = unit_for(factor, 0, most_for(hi))
        # Further from rstd it would be for a gamma beyond float32, and leave `scale_of` no number.
        unit = min(max(unit, next_to(rstd[c]) - 127), next_to(rstd[c]) + 126)
        u = computed(power_of(unit))
        return hi * u, u, in_range(factor * power_of(-unit)), b

    @device
    def scale_of(rstd, u, c):
        """Power of two for which (x u - hi) scale is exact and of the size of x_hat."""
        return computed(power_of(next_to(rstd[c]) - exponent_of(u)))

    @device
    def means_of(rstd, sums, C, count, c):
        """Sizes of p = rstd mean(dy x_hat), and of the greater one of mean(dy), mean(dy x_hat)."""
        mean_dy, mean_dy_xhat = sums[c] / count, sums[C + c] / count
        size = max(exponent_of(mean_dy), exponent_of(mean_dy_xhat))
        return exponent_of(rstd[c] * mean_dy_xhat), size

    @device
    def plain_factor(rstd, sums, C, count, c):
        """Whether v = 1 will do for these sums, where u = 1 does."""
        p, size = means_of(rstd, sums, C, count, c)
        return usual(p) and size <= room

    @device
    def factor(rstd, gamma, sums, C, count, u, training, c):
        """v and f of dx = f (dy v - ...), v a power of two and f v = gamma rstd."""
        a = types.float64(gamma[c]) * rstd[c]
        fits = u == one and usual(exponent_of(a))
        if fits and not (training and not plain_factor(rstd, sums, C, count, c)):
            return one, computed(a)
        lowest, most = 0, ENDLESS
        if training:
            p, size = means_of(rstd, sums, C, count, c)
            lowest, most = bounds(p, size, exponent_of(u))
        unit = unit_for(a, lowest, most)
        return computed(power_of(unit)), in_range(a * power_of(-unit))

    @device
    def gradient(mean, rstd, sums, C, count, u, v, c):
        """h, p, q of dx / f = (dy v - h) - ((x u - hi) p + q); see the CPU's."""
        lo = mean[c] - types.float64(computed(mean[c]))
        mean_dy = sums[c] / count
        h = types.float64(computed(mean_dy))
        p = rstd[c] * (sums[C + c] / count)
        q = cuda.fma(-lo, p, mean_dy - h) * types.float64(v)
        p = p * power_of(exponent_of(v) - exponent_of(u))
        return computed(h * types.float64(v)), computed(p), computed(q)

    return SimpleNamespace(
        plain_affine=plain_affine, affine=affine, scale_of=scale_of, plain_factor=plain_factor,
        factor=factor, gradient=gradient,
    )  # fmt: skip


def finishing(computed: Any) -> Any:
    """Return `finish_gradients`, which ends `reduce` for one channel."""

    @device
    def finish_gradients(partial, c, C, chunks, mean, rstd, sums):
        """sum dy and sum dy x_hat of a channel by one warp."""
        s = chunk_sum(partial, c * chunks, chunks)
        t = chunk_sum(partial, (C + c) * chunks, chunks)
        if cuda.threadIdx.x % WARP == 0:
            lo = mean[c] - types.float64(computed(mean[c]))
            sums[c] = s
            sums[C + c] = rstd[c] * cuda.fma(-lo, s, t * power_of(-next_to(rstd[c])))

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
