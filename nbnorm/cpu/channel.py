"""A channel's arithmetic, in float64: moments merged, coefficients of the affine maps.

`partial[:, k, c]` describes chunk k of channel c by count, shift, delta and M2, where the mean is
shift + delta. shift is a mean of the chunk's first values; delta, of the size of a standard
deviation, keeps the digits that a mean of 1e6 standard deviations would round away at every merge.

`norm` is (mean, rstd, gamma, beta), arrays of shape (C,), the first two float64; `like` an array of
the compute dtype, which coefficients are rounded to. What is done for every channel goes through
`each`: with 1024 channels and 49 chunks, merging them one by one took a quarter of forward's time.
"""

import numpy as np

from nbnorm.cpu.intrinsics import clear, each, new, news, of_chunk, part, piece, row, zeros
from nbnorm.cpu.jit import none_without, ordered
from nbnorm.cpu.storage import computed, epsilon, limits

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
    """Whether sums of x - K and q, of its square, over k values lost too much to rounding.

    d is the tile's mean less K, m2 what the chunk's M2 would become. Sums are lost where squares
    over- or underflow, and where K is so far off (an outlier as first value, a drifting mean) that
    k d^2 exceeds a quarter of M2: a threshold of 4 M2 cost y and M2 another 4 units in the last
    place.
    """
    tiny, most = limits(like)
    return not (q <= most) or q < k * tiny * 2.0**26 or k * d * d > m2 / 4


@ordered
def merge_chunk(c, count_k, shift_k, delta_k, m2_k, count, shift, delta, m2):
    """Merge a chunk's moments into those of the chunks before it."""
    count[c], delta[c], m2[c] = merge(
        count[c], delta[c], m2[c], count_k[c], (shift_k[c] - shift[c]) + delta_k[c], m2_k[c]
    )


@ordered
def rstd_of(var, eps):
    """1 / sqrt(var + eps); 0 where that is 1/0."""
    spread = var + eps
    return 0.0 if spread == 0 else 1 / np.sqrt(spread)


@ordered
def finish_channel(c, count, shift, delta, m2, eps, mean, rstd):
    """Mean and rstd of a channel whose chunks are merged."""
    mean[c] = shift[c] + delta[c]
    # Where M2 overflows float64 the spread is not known: y is NaN rather than beta.
    rstd[c] = np.nan if m2[c] == np.inf else rstd_of(m2[c] / count[c], eps)


@ordered
def finish(partial, c0, c1, eps, mean, m2, rstd):
    """Merge all chunks in order: mean, M2 and rstd of channels c0 <= c < c1."""
    size = c1 - c0
    count, delta = zeros(2, size, np.float64)
    shift, merged = of_chunk(partial, 1, 0, c0, c1), part(m2, c0, c1)
    clear(merged)
    for k in range(partial.shape[1]):
        chunk = (of_chunk(partial, 0, k, c0, c1), of_chunk(partial, 1, k, c0, c1),
                 of_chunk(partial, 2, k, c0, c1), of_chunk(partial, 3, k, c0, c1))  # fmt: skip
        each(size, merge_chunk, (*chunk, count, shift, delta, merged))
    statistics = part(mean, c0, c1), part(rstd, c0, c1)
    each(size, finish_channel, (count, shift, delta, merged, eps, *statistics))


@ordered
def split(mean, like):
    """mean = hi + lo, hi in the dtype of the array `like`: x - hi is exact near the mean."""
    hi = like.dtype.type(mean)
    return hi, mean - np.float64(hi)


@ordered
def size_of(value):
    """Greatest power of two up to |value|, in float64; 0 if subnormal, Inf if Inf or NaN."""
    bits = np.int64(np.float64(value).view(np.int64) & 0x7FF0000000000000)
    return np.int64(bits).view(np.float64)


@ordered
def unit_for(a, least, most, like):
    """Power of two u for which (x - hi) u and a / u are in the dtype's range if (x - hi) a is.

    At least `least`, which is 1 or more, as far as a / u allows it; at most `most`; both are powers
    of two. Where a is in the range itself, and `least` is 1, u is 1.
    """
    tiny, _ = limits(like)
    size = size_of(a)
    if not size < np.inf:
        return 1.0
    unit = max(least, size * tiny)
    unit = unit if size == 0 else min(unit, size / tiny)
    return max(min(unit, most), tiny)


@ordered
def most_for(hi, like):
    """Greatest unit for which (x - hi) unit is finite, whatever x is."""
    tiny, most = limits(like)
    size = size_of(hi)
    if most * epsilon(like) / 4 <= size < np.inf:
        return 0.5
    return 1 / (2 * size * tiny)


@ordered
def in_range(value, like):
    """The nearest finite value of the dtype, so that 0 times it is 0; Inf and NaN stay."""
    _, most = limits(like)
    if abs(value) < np.inf:
        return min(max(value, -most), most)
    return value


@ordered
def affine_channel(c, mean, rstd, gamma, beta, hi, u, a, b):
    """See `affine`."""
    center, lo = split(mean[c], hi)
    a_c = np.float64(gamma[c]) * rstd[c]
    unit = unit_for(a_c, 1.0, most_for(center, hi), hi)
    hi[c] = center * unit
    u[c] = unit
    a[c] = in_range(a_c / unit, hi)
    if b is not None:
        b[c] = beta[c] - lo * a_c


@ordered
def affine(norm, c0, c1, like):
    """hi, u, a, b of y = (x u - hi) a + b, in float64 and rounded once; b is None if beta is.

    hi is the mean's (see `split`) times u, a power of two: 1 unless x - hi or gamma rstd leaves the
    range of x's dtype. Where nothing does, u changes no bit.
    """
    mean, rstd, gamma, beta = norm
    size = c1 - c0
    hi, u, a, shift = news(4, size, like.dtype)
    b = given(beta, shift)
    args = part(mean, c0, c1), part(rstd, c0, c1), part(gamma, c0, c1), part(beta, c0, c1)
    each(size, affine_channel, (*args, hi, u, a, b))
    return hi, u, a, b


@ordered
def all_one(units):
    """Whether no channel needs a unit."""
    others = 0
    for c in range(units.size):
        others += units[c] != 1
    return others == 0


@none_without("condition")
def given(condition, value):
    """Value, or None where the condition is None."""
    return value


@ordered
def power_of_two(rstd, like):
    """Power of two next to rstd, in the range of normal numbers of the dtype of `like`."""
    tiny, _ = limits(like)
    return min(max(size_of(rstd), tiny), 2.0**126)


@ordered
def scale_channel(c, rstd, u, scale):
    """See `scales`."""
    scale[c] = power_of_two(rstd[c], u) / u[c]


@ordered
def scales(norm, c0, c1, u):
    """Powers of two for which (x u - hi) scale is exact and of the size of x_hat."""
    scale = new(u.size, u.dtype)
    each(u.size, scale_channel, (part(norm[1], c0, c1), u, scale))
    return scale


@ordered
def add_other(j, values, others):
    """values += others."""
    values[j] += others[j]


@ordered
def finish_sums_channel(c, mean, rstd, like, sum_dy, sum_dy_xhat):
    """sum dy x_hat of sum dy (x - hi) unit."""
    _, lo = split(mean[c], like)
    scaled = sum_dy_xhat[c] / power_of_two(rstd[c], like)
    sum_dy_xhat[c] = rstd[c] * (scaled - lo * sum_dy[c])


@ordered
def finish_sums(partial, norm, c0, c1, x, sums):
    """Add up all chunks in order: sum dy and sum dy x_hat of channels c0 <= c < c1."""
    size = c1 - c0
    sum_dy, sum_dy_xhat = part(row(sums, 0), c0, c1), part(row(sums, 1), c0, c1)
    clear(sum_dy)
    clear(sum_dy_xhat)
    for k in range(partial.shape[1]):
        each(size, add_other, (sum_dy, of_chunk(partial, 0, k, c0, c1)))
        each(size, add_other, (sum_dy_xhat, of_chunk(partial, 1, k, c0, c1)))
    mean, rstd = part(norm[0], c0, c1), part(norm[1], c0, c1)
    each(size, finish_sums_channel, (mean, rstd, computed(x), sum_dy, sum_dy_xhat))


@ordered
def factor_channel(c, c0, rstd, gamma, sums, count, u, v, f):
    """v and f of `factors`."""
    a = np.float64(gamma[c]) * rstd[c]
    least, most = 1.0, np.inf
    if sums is not None:
        tiny, greatest = limits(u)
        mean_dy, mean_dy_xhat = sums[0, c0 + c] / count, sums[1, c0 + c] / count
        p = size_of(rstd[c] * mean_dy_xhat)
        most = u[c] / (2 * p * tiny)
        size = max(size_of(mean_dy), size_of(mean_dy_xhat))
        # What is subtracted from dy may be sqrt(count) times as large as these means, as x_hat is
        # that at most; dy itself may be count times its mean, where only one value is not 0.
        room = greatest * 2.0**-28
        if size < room:
            if 0 < p < tiny * u[c]:  # p v / u must be a normal number
                least = min(tiny * u[c] / p, size_of(room / size), 1 / tiny)
        elif size < np.inf:
            most = min(most, 2.0**-24)
    v[c] = unit_for(a, least, most, u)
    f[c] = in_range(a / v[c], u)


@ordered
def factors(norm, sums, count, c0, c1, u):
    """v and f of dx = f (dy v - ...), f v being gamma rstd: for dx what u and a are for y."""
    size = c1 - c0
    v, f = news(2, size, u.dtype)
    each(
        size,
        factor_channel,
        (c0, part(norm[1], c0, c1), part(norm[2], c0, c1), sums, count, u, v, f),
    )
    return v, f


@ordered
def coefficients_channel(c, mean, rstd, sum_dy, sum_dy_xhat, count, u, v, h, p, q):
    """See `coefficients`."""
    _, lo = split(mean[c], h)
    mean_dy, l = split(sum_dy[c] / count, h)
    p_c = rstd[c] * (sum_dy_xhat[c] / count)
    h[c] = mean_dy * v[c]
    p[c] = p_c * v[c] / u[c]
    q[c] = (l - lo * p_c) * v[c]


@none_without("sums")
def coefficients(norm, sums, count, c0, c1, u, v):
    """h, p, q of dx / f = (dy v - h) - ((x u - hi) p + q); None without sums.

    That is dy - mean(dy) - x_hat mean(dy x_hat), times v, with mean(dy) split as the mean of x is:
    dy - h is exact near the mean of dy.
    """
    size = c1 - c0
    h, p, q = news(3, size, u.dtype)
    channels = (
        part(norm[0], c0, c1), part(norm[1], c0, c1),
        part(row(sums, 0), c0, c1), part(row(sums, 1), c0, c1),
    )  # fmt: skip
    each(size, coefficients_channel, (*channels, count, u, v, h, p, q))
    return h, p, q


@none_without("hpq")
def coefficients_of(hpq, c):
    """h, p, q of channel c, an index into what `coefficients` gave; None for None."""
    h, p, q = hpq
    return h[c], p[c], q[c]


@ordered
def add_up(runs, width):
    """Sum runs of `width` values into the first run, in pairs: n values are rounded log2 n times.

    In one chain, 256 samples with an outlier left M2 wrong by 4 units of float64.
    """
    n = runs.size // width
    while n > 1:
        half = (n + 1) // 2
        upper = piece((runs, 0, 0), 0, 0, half * width, (n - half) * width)
        each(upper.size, add_other, (runs, upper))
        n = half
