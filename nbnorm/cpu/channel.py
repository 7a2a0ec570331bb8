"""One channel's arithmetic, in float64: moments merged, coefficients of the affine maps.

`partial[:, k, c]` describes chunk k of channel c by count, shift, delta and M2, where the mean is
shift + delta. shift is a mean of the chunk's first values; delta, of the size of a standard
deviation, keeps the digits that a mean of 1e6 standard deviations would round away at every merge.

`norm` is (mean, rstd, gamma, beta), float64 arrays of shape (C,); `like` an array of the compute
dtype, which coefficients are rounded to.
"""

import math

import numpy as np

from nbnorm.cpu.intrinsics import piece
from nbnorm.cpu.jit import none_without, ordered

# Values whose mean is a chunk's shift: with the first value alone, 60 samples (one tile, K up to 3
# standard deviations off) left rstd wrong by 9e-7.
FIRST = 32


@ordered
def merge(count, delta, m2, k, delta_k, m2_k):
    """Chan, Golub & LeVeque (1983): moments of a union, both deltas from one shift."""
    total = count + k
    d = delta_k - delta
    return total, delta + d * (k / total), m2 + m2_k + d * d * (count * k / total)


@ordered
def lost(k, d, q, m2, like):
    """Whether sums of d = x - K and q = sum d^2 over k values lost too much to rounding.

    d is the tile's mean from K, m2 what the chunk's M2 would become. Overflow and underflow of d^2,
    and a K so far off (an outlier as first value, a drifting mean) that k d^2 counts next to M2:
    tolerating 4 M2 rather than a quarter of it cost y and M2 another 4 units in the last place.
    """
    limits = np.finfo(like.dtype)
    return not (q <= limits.max) or q < k * limits.tiny * 2.0**26 or k * d * d > m2 / 4


@ordered
def finish(partial, c, eps):
    """Merge a channel's chunks in order: mean, M2 and rstd = 1/sqrt(M2/m + eps)."""
    count, shift, delta, m2 = partial[0, 0, c], partial[1, 0, c], partial[2, 0, c], partial[3, 0, c]
    for k in range(1, partial.shape[1]):
        delta_k = (partial[1, k, c] - shift) + partial[2, k, c]
        count, delta, m2 = merge(count, delta, m2, partial[0, k, c], delta_k, partial[3, k, c])
    spread = m2 / count + eps
    return shift + delta, m2, 0.0 if spread == 0 else 1 / math.sqrt(spread)


@ordered
def split(mean, like):
    """mean = hi + lo, hi in the dtype of the array `like`: x - hi is exact near the mean."""
    hi = like.dtype.type(mean)
    return hi, mean - np.float64(hi)


@ordered
def affine(norm, c, like):
    """hi, a, b of y = (x - hi) a + b, in float64 and rounded once; norm without beta: b None."""
    mean, rstd, gamma, beta = norm
    hi, lo = split(mean[c], like)
    a = gamma[c] * rstd[c]
    return hi, like.dtype.type(a), offset(beta, c, lo * a, like)


@none_without("beta")
def offset(beta, c, shift, like):
    """beta - shift, rounded; None of no beta."""
    return like.dtype.type(beta[c] - shift)


@ordered
def unit(norm, c, like):
    """Power of two next to rstd: (x - hi) unit is exact and of the size of x_hat."""
    _, exponent = math.frexp(norm[1][c])
    return like.dtype.type(math.ldexp(1.0, min(max(exponent, -126), 127)))


@ordered
def finish_sums(partial, norm, c, like):
    """Add up a channel's chunks in order: sum dy, and sum dy x_hat of sum dy (x - hi) unit."""
    sum_dy = 0.0
    sum_scaled = 0.0
    for k in range(partial.shape[1]):
        sum_dy += partial[0, k, c]
        sum_scaled += partial[1, k, c]
    mean, rstd = norm[0], norm[1]
    _, lo = split(mean[c], like)
    return sum_dy, rstd[c] * (sum_scaled / unit(norm, c, like) - lo * sum_dy)


@none_without("sums")
def gradient(norm, sums, count, c, like):
    """h, p, q of dx / (gamma rstd) = (dy - h) - ((x - hi) p + q); None of no sums.

    That is dy - mean(dy) - x_hat mean(dy x_hat) with mean(dy) split as the mean of x is: dy - h is
    exact near the mean of dy.
    """
    mean, rstd = norm[0], norm[1]
    _, lo = split(mean[c], like)
    h, l = split(sums[0, c] / count, like)
    p = rstd[c] * (sums[1, c] / count)
    return h, like.dtype.type(p), like.dtype.type(l - lo * p)


@none_without("b", fused=True)
def normalised(x, hi, a, b):
    """y before the activation; backward recomputes the ReLU mask by this very expression."""
    return (x - hi) * a + b


@ordered
def rectified(v, floor):
    """max(v, floor) that lets NaN pass; floor is 0 for ReLU, -inf for no activation."""
    return floor if v <= floor else v


@ordered
def masked(dy, y, v, zero):
    """dy where ReLU let the value pass: y > 0, with y as stored or, where that is None, v.

    Where both are None there was no activation.
    """
    if y is not None:
        return dy if y > 0 else zero
    if v is not None:
        return dy if v > 0 else zero
    return dy


@none_without("array")
def item(array, i):
    """array[i]; None of no array."""
    return array[i]


@ordered
def add_up(runs, width):
    """Sum runs of `width` values into the first run, in pairs: n values are rounded log2 n times.

    In one chain, 256 samples with an outlier left M2 wrong by 4 units of float64.
    """
    n = runs.size // width
    while n > 1:
        half = (n + 1) // 2
        upper = piece((runs, 0, 0), 0, 0, half * width, (n - half) * width)
        for j in range(upper.size):
            runs[j] += upper[j]
        n = half
