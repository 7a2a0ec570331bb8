"""Per-channel arithmetic on the GPU, in float64: sums of chunks, coefficients of the normalisation.

All chunks are summed around K, the channel's first value, so they need no merging: with d = x - K
of m values, mean = K + sum d / m and M2 = sum d^2 - (sum d)^2 / m. K is one of the values, so M2 is
at least (K - mean)^2, and the relative error of the difference is at most about m 2^-53: below
float32's up to m = 2^29. A float64 x is summed once more, around the mean found.

`partial` has shape (sums, C, chunks), the CPU's (sums, chunks, C): here a warp reads the chunks of
one channel, there a vector adds one chunk of many channels. The coefficients are those of
`nbnorm.cpu.channel`.
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
from nbnorm.cuda.plan import WARP
from nbnorm.cuda.values import warp_sum

# What `exponent_of` returns for 0 and subnormal numbers, and for Inf and NaN.
SUBNORMAL, NOT_FINITE = -1023, 1024


@device
def chunk_sum(partial, first, chunks):
    """Sum of partial[first : first + chunks] by a warp, the same in every lane."""
    total = 0.0
    for k in range(cuda.threadIdx.x % WARP, chunks, WARP):
        total += partial[first + k]
    return warp_sum(total)


@device
def rstd_of(var, eps):
    """1 / sqrt(var + eps); 0 if var + eps is 0."""
    spread = var + eps
    return 0.0 if spread == 0.0 else 1.0 / math.sqrt(spread)


@device
def finish_moments_channel(partial, c, C, chunks, count, eps, mean, m2, rstd):
    """mean = K + s / m, M2 = q - s^2 / m and rstd of channel c, by a warp; K is in mean[c]."""
    s = chunk_sum(partial, c * chunks, chunks)
    q = chunk_sum(partial, (C + c) * chunks, chunks)
    if cuda.threadIdx.x % WARP == 0:
        mean[c] += s / count
        rest = cuda.fma(-s, s / count, q)
        rest = 0.0 if rest < 0.0 else rest
        m2[c] = rest
        # If M2 overflows float64, the variance is unknown: y becomes NaN rather than beta.
        rstd[c] = math.nan if rest == math.inf else rstd_of(rest / count, eps)


@kernel()
def finish_moments(partial, C, chunks, count, eps, mean, m2, rstd):
    """Turn `partial` into mean, M2 and rstd, one warp per channel; mean[c] holds K on entry."""
    c = types.int64(cuda.blockIdx.x * (cuda.blockDim.x // WARP) + cuda.threadIdx.x // WARP)
    if c < C:
        finish_moments_channel(partial, c, C, chunks, count, eps, mean, m2, rstd)


@kernel()
def rstd_all(var, eps, rstd, C):
    """rstd = 1 / sqrt(var + eps) of every channel."""
    c = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if c < C:
        rstd[c] = rstd_of(var[c], eps)


@kernel()
def move(running_mean, running_var, mean, m2, momentum, divisor, C):
    """running = (1 - momentum) running + momentum batch; the batch's variance is M2 / divisor."""
    c = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if c < C:
        old = 1.0 - momentum
        running_mean[c] = old * running_mean[c] + momentum * mean[c]
        running_var[c] = old * running_var[c] + momentum * (m2[c] / divisor)


@device
def clipped(value, least, most):
    """value clipped to [least, most]; NaN stays."""
    if value < least:
        return least
    return most if value > most else value


@kernel()
def renorm_factors(mean, m2, count, eps, running_mean, running_var, r_max, d_max, C, r, d):
    """r and d of batch renormalization, one thread per channel; equations in the CPU's."""
    c = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if c < C:
        std, running_std = math.sqrt(m2[c] / count + eps), math.sqrt(running_var[c] + eps)
        off = mean[c] - running_mean[c]
        ratio = 1.0 if std == 0.0 and running_std == 0.0 else std / running_std
        distance = 0.0 if off == 0.0 and running_std == 0.0 else off / running_std
        r[c] = clipped(ratio, 1.0 / r_max, r_max)
        d[c] = clipped(distance, -d_max, d_max)


@device
def rstd_exponent(rstd):
    """Exponent of the greatest power of two <= rstd, clamped to [-126, 126] in every dtype."""
    return min(max(exponent_of(rstd), -126), 126)


def units(computed: Any) -> SimpleNamespace:
    """Return `is_normal` and the CPU's `in_range` and units, for the compute dtype `computed`.

    Powers of two are given by their exponents, as integer arithmetic is fast on every GPU:
    `unit_exponent` and `most_exponent` are those of the CPU's `unit_for` and `most_for`. A unit is
    computed only if `is_normal` says that one may be needed.
    """
    limits = np.finfo(np.float32 if computed == types.float32 else np.float64)
    tiny, greatest = int(limits.minexp), float(limits.max)  # exponent; number
    # From this exponent of hi on, x - hi may overflow: hi is then at least half the distance
    # between the two greatest numbers.
    far = int(limits.maxexp) - int(limits.nmant) - 2
    room = int(limits.maxexp) - 29

    @device
    def is_normal(size):
        """Whether a number of this exponent and its double are normal, or it is 0 or subnormal."""
        return tiny <= size < -tiny or size == SUBNORMAL

    @device
    def unit_exponent(a, least, most):
        """Exponent of the unit u for which (x - hi) u and a / u are in range if (x - hi) a is."""
        size = exponent_of(a)
        unit = min(max(least, size + tiny), size - tiny)
        return max(min(unit, most, -tiny), tiny)

    @device
    def most_exponent(hi):
        """Upper bound of u's exponent: hi u stays finite; -1 where x - hi could overflow."""
        size = exponent_of(hi)
        return -1 if far <= size < NOT_FINITE else -1 - size - tiny

    @device
    def in_range(value):
        """Clamp a finite value to the dtype's finite range, so that 0 times the result is 0."""
        if abs(value) < math.inf:
            value = min(max(value, -greatest), greatest)
        return computed(value)

    @device
    def bounds(p, size, unit):
        """Least and greatest exponent of v.

        p is the exponent of rstd mean(dy x_hat), size the greater exponent of mean(dy) and
        mean(dy x_hat), unit that of u. p v / u must be a normal number. |x_hat| is at most
        sqrt(count), so what is subtracted from dy may be that many times these means. dy itself may
        be count times its mean, if only one value is not 0.
        """
        least, most = 0, unit - 1 - p - tiny
        if size <= room:
            if SUBNORMAL < p < unit + tiny:
                least = min(unit + tiny - p, room - size)
        elif size < NOT_FINITE:
            most = min(most, -24)
        return least, most

    return SimpleNamespace(
        far=far, room=room, is_normal=is_normal, unit_exponent=unit_exponent,
        most_exponent=most_exponent, in_range=in_range, bounds=bounds,
    )  # fmt: skip


def channel_functions(computed: Any) -> SimpleNamespace:
    """Return the functions below, for one channel c, with coefficients of the dtype `computed`.

    Coefficients are computed in float64 and rounded once.
    """
    of, one = units(computed), computed(1)
    far, room, is_normal, unit_exponent = of.far, of.room, of.is_normal, of.unit_exponent
    most_exponent, in_range, bounds = of.most_exponent, of.in_range, of.bounds

    @device
    def plain_affine(mean, rstd, gamma, beta, c):
        """hi, a and b of `affine_channel` with u = 1, and whether u = 1 will do."""
        hi = types.float64(computed(mean[c]))
        a = types.float64(gamma[c]) * rstd[c]
        b = cuda.fma(hi - mean[c], a, types.float64(beta[c]))
        fits = is_normal(exponent_of(a)) and exponent_of(hi) < far
        return computed(hi), computed(a), computed(b), fits

    @device
    def affine_channel(mean, rstd, gamma, beta, c):
        """Coefficients hi, u, a, b of y = (x u - hi) a + b; see the CPU's `affine`.

        u is a power of two, 1 unless x - hi or gamma rstd leaves the dtype's range.
        """
        hi, a, b, fits = plain_affine(mean, rstd, gamma, beta, c)
        if fits:
            return hi, one, a, b
        factor = types.float64(gamma[c]) * rstd[c]
        unit = unit_exponent(factor, 0, most_exponent(hi))
        # A gamma beyond float32 would take u further from rstd, and `scale_channel` out of range.
        unit = min(max(unit, rstd_exponent(rstd[c]) - 127), rstd_exponent(rstd[c]) + 126)
        u = computed(power_of(unit))
        return hi * u, u, in_range(factor * power_of(-unit)), b

    @device
    def scale_channel(rstd, u, c):
        """Power of two: (x u - hi) scale is exact and has the size of x_hat."""
        return computed(power_of(rstd_exponent(rstd[c]) - exponent_of(u)))

    @device
    def means_of(rstd, sums, C, count, c):
        """Exponents of p = rstd mean(dy x_hat), and of the greater of mean(dy), mean(dy x_hat)."""
        mean_dy, mean_dy_xhat = sums[c] / count, sums[C + c] / count
        size = max(exponent_of(mean_dy), exponent_of(mean_dy_xhat))
        return exponent_of(rstd[c] * mean_dy_xhat), size

    @device
    def plain_factors(rstd, sums, C, count, c):
        """Whether v = 1 will do for these sums, if u = 1 does."""
        p, size = means_of(rstd, sums, C, count, c)
        return is_normal(p) and size <= room

    @device
    def factors_channel(rstd, gamma, sums, C, count, u, training, c):
        """Factors v and f of dx = f (dy v - ...), where f v = gamma rstd; v is a power of two."""
        a = types.float64(gamma[c]) * rstd[c]
        fits = u == one and is_normal(exponent_of(a))
        if fits and not (training and not plain_factors(rstd, sums, C, count, c)):
            return one, computed(a)
        least, most = 0, NOT_FINITE
        if training:
            p, size = means_of(rstd, sums, C, count, c)
            least, most = bounds(p, size, exponent_of(u))
        unit = unit_exponent(a, least, most)
        return computed(power_of(unit)), in_range(a * power_of(-unit))

    @device
    def coefficients_channel(mean, rstd, sums, C, count, u, v, c):
        """Coefficients h, p, q of dx / f = (dy v - h) - ((x u - hi) p + q); see the CPU's."""
        lo = mean[c] - types.float64(computed(mean[c]))
        mean_dy = sums[c] / count
        h = types.float64(computed(mean_dy))
        p = rstd[c] * (sums[C + c] / count)
        q = cuda.fma(-lo, p, mean_dy - h) * types.float64(v)
        p = p * power_of(exponent_of(v) - exponent_of(u))
        return computed(h * types.float64(v)), computed(p), computed(q)

    return SimpleNamespace(
        plain_affine=plain_affine, affine_channel=affine_channel, scale_channel=scale_channel,
        plain_factors=plain_factors, factors_channel=factors_channel,
        coefficients_channel=coefficients_channel,
    )  # fmt: skip


def finish_sums_channel_of(computed: Any) -> Any:
    """Return `finish_sums_channel` for the dtype `computed`."""

    @device
    def finish_sums_channel(partial, c, C, chunks, mean, rstd, sums):
        """sum g = s and sum g x_hat = rstd (t / 2^e - lo s) of channel c, by one warp."""
        s = chunk_sum(partial, c * chunks, chunks)
        t = chunk_sum(partial, (C + c) * chunks, chunks)
        if cuda.threadIdx.x % WARP == 0:
            lo = mean[c] - types.float64(computed(mean[c]))
            sums[c] = s
            sums[C + c] = rstd[c] * cuda.fma(-lo, s, t * power_of(-rstd_exponent(rstd[c])))

    return finish_sums_channel


def finish_sums(computed: Any) -> Any:
    """Return the kernel that adds up the chunks of `backward_reduce`."""
    finish_sums_channel = finish_sums_channel_of(computed)

    @kernel()
    def finish_sums(partial, C, chunks, mean, rstd, sums):
        """sum g and sum g x_hat of all channels, one warp for each."""
        c = types.int64(cuda.blockIdx.x * (cuda.blockDim.x // WARP) + cuda.threadIdx.x // WARP)
        if c < C:
            finish_sums_channel(partial, c, C, chunks, mean, rstd, sums)

    return finish_sums


@device
def mean_of(total, count):
    """total / count; 0 if count is Inf, which means that statistics are constants."""
    return 0.0 if count == math.inf else total / count


def finish_second_sums(computed: Any) -> Any:
    """Return the kernel that adds up the chunks of `second_reduce`."""
    finish_sums_channel = finish_sums_channel_of(computed)

    @kernel()
    def finish_second_sums(partial, C, chunks, count, mean, rstd, sums):
        """Sums of all channels, one warp for each; see the CPU's `curvature_coefficients`."""
        c = types.int64(cuda.blockIdx.x * (cuda.blockDim.x // WARP) + cuda.threadIdx.x // WARP)
        if c < C:
            s_dg = chunk_sum(partial, (4 * C + c) * chunks, chunks)
            finish_sums_channel(partial, c, C, chunks, mean, rstd, sums)
            s_g = chunk_sum(partial, (2 * C + c) * chunks, chunks)
            s_gt = chunk_sum(partial, (3 * C + c) * chunks, chunks)
            if cuda.threadIdx.x % WARP == 0:
                lo = mean[c] - types.float64(computed(mean[c]))
                s_gt = rstd[c] * cuda.fma(-lo, s_g, s_gt * power_of(-rstd_exponent(rstd[c])))
                sums[2 * C + c] = s_g
                sums[3 * C + c] = s_gt
                rest = cuda.fma(-sums[c], mean_of(s_g, count), s_dg)
                sums[4 * C + c] = cuda.fma(-sums[C + c], mean_of(s_gt, count), rest)

    return finish_second_sums


@kernel()
def second_table(mean, rstd, gamma, tgamma, tbeta, sums, count, curved, C, table, dgamma):
    """Rows of `table`: a, mean(d), p, tbeta of ddy, and b, mean(g), s of dx, and dgamma.

    ddy = a (d - mean(d)) + ((x - mean) p + tbeta) and, if `curved`,
    dx = b (d - mean(d)) + p (g - mean(g)) + (x - mean) s. These are the CPU's
    `tangent_coefficients` and `curvature_coefficients` before they are split and rounded.
    """
    c = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if c < C:
        r, e = rstd[c], tgamma[c]
        a = gamma[c] * r
        d_xhat = mean_of(sums[C + c], count)
        table[c] = a
        table[C + c] = mean_of(sums[c], count)
        table[2 * C + c] = r * cuda.fma(-a, d_xhat, e)
        table[3 * C + c] = tbeta[c]
        if curved:
            g_xhat = mean_of(sums[3 * C + c], count)
            inner = cuda.fma(-2.0 * d_xhat, g_xhat, mean_of(sums[4 * C + c], count))
            table[4 * C + c] = -r * a * g_xhat
            table[5 * C + c] = mean_of(sums[2 * C + c], count)
            table[6 * C + c] = -r * r * cuda.fma(a, inner, e * g_xhat)
            dgamma[c] = r * sums[4 * C + c]


def second_functions(computed: Any) -> SimpleNamespace:
    """Return functions of the rows of `table` for one channel, with results of dtype `computed`."""
    limits = np.finfo(np.float32 if computed == types.float32 else np.float64)
    tiny, greatest = float(limits.tiny), float(limits.max)
    far = greatest * float(limits.eps) / 8

    @device
    def fits(factor, center):
        """Whether a factor keeps its digits in the dtype, and x - center is finite for all x."""
        size = abs(factor)
        lost = 0.0 < size < tiny or greatest < size < math.inf
        return not lost and not abs(center) >= far

    @device
    def tangent_channel(mean, table, C, c):
        """hi, a, h, p, q of ddy = a (d - h) + ((x - hi) p + q), and whether they fit."""
        a, mean_d, p = table[c], table[C + c], table[2 * C + c]
        hi, h = computed(mean[c]), computed(mean_d)
        q = cuda.fma(-a, mean_d - types.float64(h), table[3 * C + c])
        q = cuda.fma(-p, mean[c] - types.float64(hi), q)
        plain = fits(a, mean[c]) and fits(p, mean_d)
        return hi, computed(a), h, computed(p), computed(q), plain

    @device
    def curvature_channel(mean, table, C, c):
        """b, k, s, t of dx = b (d - h) + p (g - k) + ((x - hi) s + t), and whether they fit."""
        b, mean_g, s = table[4 * C + c], table[5 * C + c], table[6 * C + c]
        mean_d, p = table[C + c], table[2 * C + c]
        k = computed(mean_g)
        t = -b * (mean_d - types.float64(computed(mean_d)))
        t = cuda.fma(-p, mean_g - types.float64(k), t)
        t = cuda.fma(-s, mean[c] - types.float64(computed(mean[c])), t)
        plain = fits(b, mean_g) and fits(s, mean_g)
        return computed(b), k, computed(s), computed(t), plain

    @device
    def tangent64(mean, table, C, c, d, x):
        """ddy of one value, in float64."""
        x_c = types.float64(x) - mean[c]
        rest = cuda.fma(x_c, table[2 * C + c], table[3 * C + c])
        return computed(cuda.fma(table[c], types.float64(d) - table[C + c], rest))

    @device
    def curvature64(mean, table, C, c, d, g, x):
        """dx of one value, in float64."""
        rest = (types.float64(x) - mean[c]) * table[6 * C + c]
        rest = cuda.fma(table[2 * C + c], types.float64(g) - table[5 * C + c], rest)
        return computed(cuda.fma(table[4 * C + c], types.float64(d) - table[C + c], rest))

    @device
    def tangent(d, x, hi, a, h, p, q):
        """a (d - h) + ((x - hi) p + q)."""
        return cuda.fma(a, d - h, cuda.fma(x - hi, p, q))

    @device
    def curvature(d, g, x, hi, h, p, b, k, s, t):
        """b (d - h) + p (g - k) + ((x - hi) s + t)."""
        return cuda.fma(b, d - h, cuda.fma(p, g - k, cuda.fma(x - hi, s, t)))

    return SimpleNamespace(
        tangent_channel=tangent_channel, curvature_channel=curvature_channel, tangent64=tangent64,
        curvature64=curvature64, tangent=tangent, curvature=curvature,
    )  # fmt: skip
