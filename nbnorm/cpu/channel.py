"""Per-channel arithmetic in float64: merging moments, coefficients of the normalisation.

`partial` has shape (sums, chunks, C). For statistics partial[:, k, c] is count, shift, delta and M2
of chunk k of channel c, whose mean is shift + delta. shift is the mean of the chunk's first values.
delta has the size of a standard deviation, so it keeps digits that a mean of 1e6 standard
deviations would lose to rounding at every merge.

`norm` is (mean, rstd, gamma, beta), arrays of shape (C,), the first two float64, and, in a backward
pass, an activation other than ReLU. In a forward pass of batch renormalization gamma and beta are
results of `fold`, and the fifth is (population, gamma, beta, r, d), see `renorm_factors`. `like` is
an array of the compute dtype, to which coefficients are rounded. Loops over channels run through
`each`, which vectorises them: merging 49 chunks of 1024 channels one by one took a quarter of
forward's time.
"""

import numpy as np
from numba import types

from nbnorm.cpu.element import at
from nbnorm.cpu.intrinsics import clear, each, new, news, of_chunk, part, piece, row, zeros
from nbnorm.cpu.jit import by_types, none_without, ordered
from nbnorm.cpu.storage import computed, epsilon, limits

# A chunk's shift is the mean of its first FIRST values. With one value, up to 3 standard deviations
# off, 60 samples (one tile) left rstd wrong by 9e-7.
FIRST = 32


@ordered
def merge(count, delta, m2, count_b, delta_b, m2_b):
    """Count, delta and M2 of the union of two sets of values (Chan, Golub & LeVeque 1983).

    delta + d n_b / n and M2 + M2_b + d^2 n_a n_b / n, where d = delta_b - delta and n = n_a + n_b.
    Both deltas are relative to one shift. With weights both sets may be empty.
    """
    total = count + count_b
    d = delta_b - delta
    n = total if total > 0 else 1.0
    return total, delta + d * (count_b / n), m2 + m2_b + d * d * (count * count_b / n)


@ordered
def lost(n, d, q, m2, like):
    """Whether the sums of x - K and (x - K)^2 over a tile of n values are too inaccurate to use.

    d is the tile's mean minus K, q the sum of squares, m2 the chunk's M2 after the merge. The sums
    are lost if squares overflow or underflow (also if every x is K), or if n d^2 > m2 / 4: K is
    then too far from the mean. A limit of 4 m2 would cost 4 more units in the last place.
    """
    tiny, greatest = limits(like)
    return not (q <= greatest) or q < n * tiny * 2.0**26 or n * d * d > m2 / 4


@ordered
def with_tile(count, shift, delta, m2, m, center, d, q, like):
    """Merge a tile into a chunk: return delta, M2 and whether the tile's sums are `lost`.

    d and q are the tile's sums of x - center and (x - center)^2; its mean is center + d / m, its M2
    q - d^2 / m. m is its number of values, or its weight, which may be 0.
    """
    mean = d / (m if m > 0 else 1.0)
    delta_tile = center - shift + mean
    _, new_delta, new_m2 = merge(count, delta, m2, m, delta_tile, q - d * mean)
    return new_delta, new_m2, lost(m, mean, q, new_m2, like)


@ordered
def merge_chunk(c, count_k, shift_k, delta_k, m2_k, count, shift, delta, m2):
    """Merge the moments of one chunk of channel c into those of the chunks before it."""
    shift[c] = shift[c] if count[c] > 0 else shift_k[c]
    count[c], delta[c], m2[c] = merge(
        count[c], delta[c], m2[c], count_k[c], (shift_k[c] - shift[c]) + delta_k[c], m2_k[c]
    )


@ordered
def rstd_of(var, eps):
    """1 / sqrt(var + eps); 0 if var + eps is 0."""
    spread = var + eps
    return 0.0 if spread == 0 else 1 / np.sqrt(spread)


@ordered
def finish_moments_channel(c, count, shift, delta, m2, eps, mean, rstd):
    """mean = shift + delta and rstd = 1 / sqrt(M2 / count + eps) of channel c; 0 if count is 0."""
    mean[c] = shift[c] + delta[c]
    # If M2 overflows float64, the variance is unknown: y becomes NaN rather than beta.
    found = np.nan if m2[c] == np.inf else rstd_of(m2[c] / count[c], eps)
    rstd[c] = found if count[c] > 0 else 0.0


@ordered
def finish_moments(partial, c0, c1, eps, mean, m2, rstd):
    """Merge all chunks in order into mean, M2 and rstd of channels c0 <= c < c1."""
    size = c1 - c0
    count, delta = zeros(2, size, np.float64)
    shift, merged = of_chunk(partial, 1, 0, c0, c1), part(m2, c0, c1)
    clear(merged)
    for k in range(partial.shape[1]):
        chunk = (of_chunk(partial, 0, k, c0, c1), of_chunk(partial, 1, k, c0, c1),
                 of_chunk(partial, 2, k, c0, c1), of_chunk(partial, 3, k, c0, c1))  # fmt: skip
        each(size, merge_chunk, (*chunk, count, shift, delta, merged))
    statistics = part(mean, c0, c1), part(rstd, c0, c1)
    each(size, finish_moments_channel, (count, shift, delta, merged, eps, *statistics))


@ordered
def clipped(value, least, most):
    """value clipped to [least, most]; NaN stays."""
    if value < least:
        return least
    return most if value > most else value


@ordered
def renorm_factors_channel(c, mean, m2, count, eps, running_mean, running_var, r_max, d_max, r, d):
    """r and d of channel c; see `renorm_factors`."""
    std, running_std = np.sqrt(m2[c] / count + eps), np.sqrt(running_var[c] + eps)
    off = mean[c] - running_mean[c]
    ratio = 1.0 if std == 0 and running_std == 0 else std / running_std
    distance = 0.0 if off == 0 and running_std == 0 else off / running_std
    r[c], d[c] = clipped(ratio, 1 / r_max, r_max), clipped(distance, -d_max, d_max)


@ordered
def renorm_factors(mean, m2, count, eps, population, c0, c1, r, d):
    """r and d of batch renormalization (Ioffe 2017), of channels c0 <= c < c1.

    r = clip(std / running_std, 1 / r_max, r_max) and
    d = clip((mean - running_mean) / running_std, -d_max, d_max), where 0 / 0 is 1 and 0. Both std
    include eps. `population` is (running_mean, running_var, r_max, d_max); arrays are float64 (C,).
    """
    running_mean, running_var, r_max, d_max = population
    args = part(mean, c0, c1), part(m2, c0, c1), count, eps
    towards = part(running_mean, c0, c1), part(running_var, c0, c1), r_max, d_max
    each(c1 - c0, renorm_factors_channel, (*args, *towards, part(r, c0, c1), part(d, c0, c1)))


@ordered
def fold_channel(c, gamma, beta, r, d, gamma_, beta_):
    """gamma r and beta + gamma d of channel c, so that y = (x - mean) rstd gamma_ + beta_."""
    gamma_[c], beta_[c] = gamma[c] * r[c], beta[c] + gamma[c] * d[c]


@ordered
def fold(gamma, beta, r, d, c0, c1, gamma_, beta_):
    """gamma r and beta + gamma d of channels c0 <= c < c1; all arrays are float64."""
    args = part(gamma, c0, c1), part(beta, c0, c1), part(r, c0, c1), part(d, c0, c1)
    each(c1 - c0, fold_channel, (*args, part(gamma_, c0, c1), part(beta_, c0, c1)))


@ordered
def split(mean, like):
    """mean = hi + lo, hi rounded to the dtype of `like`: x - hi is exact for x near the mean."""
    hi = like.dtype.type(mean)
    return hi, mean - np.float64(hi)


@ordered
def floor_power(value):
    """Greatest power of two <= |value|, as float64; 0 if subnormal, Inf for Inf and NaN."""
    bits = np.int64(np.float64(value).view(np.int64) & 0x7FF0000000000000)
    return np.int64(bits).view(np.float64)


@ordered
def unit_for(a, least, most, like):
    """Power of two u that keeps (x - hi) u and a / u in the dtype's range wherever (x - hi) a is.

    u is the power nearest to `least` (1 or more) for which a / u is normal, at most `most`; both
    are powers of two. u is 1 if a is normal and least = 1 <= most, and if a is Inf or NaN.
    """
    tiny, _ = limits(like)
    size = floor_power(a)
    if not size < np.inf:
        return 1.0
    unit = max(least, size * tiny)
    unit = unit if size == 0 else min(unit, size / tiny)
    return max(min(unit, most), tiny)


@ordered
def most_for(hi, like):
    """Upper bound of u: hi u stays finite, and u <= 1/2 where x - hi could overflow."""
    tiny, greatest = limits(like)
    size = floor_power(hi)
    if greatest * epsilon(like) / 4 <= size < np.inf:
        return 0.5
    return 1 / (2 * size * tiny)


@ordered
def in_range(value, like):
    """Clamp to the dtype's finite range, so that 0 times the result is 0; Inf and NaN stay."""
    _, greatest = limits(like)
    if abs(value) < np.inf:
        return min(max(value, -greatest), greatest)
    return value


@ordered
def affine_channel(c, mean, rstd, gamma, beta, hi, u, a, b):
    """hi, u, a and b of channel c; see `affine`."""
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
    """Coefficients hi, u, a, b of y = (x u - hi) a + b, one per channel; b is None if beta is.

    They are computed in float64 and rounded once. u is a power of two, 1 unless x - hi or
    gamma rstd leaves the range of the compute dtype; it changes no bit of a y within that range.
    hi is the rounded mean (see `split`) times u, a = gamma rstd / u, b = beta - lo gamma rstd.
    """
    mean, rstd, gamma, beta = norm[:4]
    size = c1 - c0
    hi, u, a, b_ = news(4, size, like.dtype)
    b = given(beta, b_)
    args = part(mean, c0, c1), part(rstd, c0, c1), part(gamma, c0, c1), part(beta, c0, c1)
    each(size, affine_channel, (*args, hi, u, a, b))
    return hi, u, a, b


@by_types
def bound(floor, like):
    """`floor` in the compute dtype; an activation unchanged."""
    if isinstance(floor, types.Number):
        return lambda floor, like: like.dtype.type(floor)
    return lambda floor, like: floor


@by_types
def gate(norm, like):
    """`act` of `element.through`: the activation in `norm`, or 0 for ReLU or none."""
    if len(norm) == 5:
        return lambda norm, like: norm[4]
    return lambda norm, like: like.dtype.type(0)


@by_types
def after(kept, dy, y, norm):
    """dy, y and norm for the second sweep: g for dy, and no activation, if g was kept."""
    if isinstance(kept, types.NoneType):
        return lambda kept, dy, y, norm: (dy, y, norm)
    return lambda kept, dy, y, norm: (kept, None, (norm[0], norm[1], norm[2], None))


@ordered
def all_one(units):
    """Whether every channel's unit is 1."""
    others = 0
    for c in range(units.size):
        others += units[c] != 1
    return others == 0


@none_without("condition")
def given(condition, value):
    """value, or None if `condition` is None."""
    return value


@ordered
def rstd_power(rstd, like):
    """Greatest power of two <= rstd, at least the dtype's least normal number, at most 2^126."""
    tiny, _ = limits(like)
    return min(max(floor_power(rstd), tiny), 2.0**126)


@ordered
def scale_channel(c, rstd, u, scale):
    """scale of channel c; see `scales`."""
    scale[c] = rstd_power(rstd[c], u) / u[c]


@ordered
def scales(norm, c0, c1, u):
    """Power of two for each channel: (x u - hi) scale is exact and has the size of x_hat."""
    scale = new(u.size, u.dtype)
    each(u.size, scale_channel, (part(norm[1], c0, c1), u, scale))
    return scale


@ordered
def add_other(j, values, others):
    """values[j] += others[j]."""
    values[j] += others[j]


@ordered
def finish_sums_channel(c, mean, rstd, like, sum_dy, sum_dy_xhat):
    """Turn the sum of dy (x - hi) times `rstd_power` into sum dy x_hat, in place."""
    _, lo = split(mean[c], like)
    scaled = sum_dy_xhat[c] / rstd_power(rstd[c], like)
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
def divisor(count, c):
    """count of channel c, to divide its sums by; 1 if it is 0, as the sums are 0 then."""
    m = at(count, c)
    return m if m > 0 else 1.0


@ordered
def factors_channel(c, c0, rstd, gamma, sums, count, u, v, f):
    """v and f of channel c; see `factors`."""
    a = np.float64(gamma[c]) * rstd[c]
    least, most = 1.0, np.inf
    if sums is not None:
        tiny, greatest = limits(u)
        m = divisor(count, c0 + c)
        mean_dy, mean_dy_xhat = sums[0, c0 + c] / m, sums[1, c0 + c] / m
        p = floor_power(rstd[c] * mean_dy_xhat)
        most = u[c] / (2 * p * tiny)
        size = max(floor_power(mean_dy), floor_power(mean_dy_xhat))
        # |x_hat| <= sqrt(count), so up to sqrt(count) times these means is subtracted from dy. dy
        # itself may be count times its mean, if only one value is not 0.
        room = greatest * 2.0**-28
        if size < room:
            if 0 < p < tiny * u[c]:  # p v / u must be a normal number
                least = min(tiny * u[c] / p, floor_power(room / size), 1 / tiny)
        elif size < np.inf:
            most = min(most, 2.0**-24)
    v[c] = unit_for(a, least, most, u)
    f[c] = in_range(a / v[c], u)


@ordered
def factors(norm, sums, count, c0, c1, u):
    """Factors v and f of dx = f (dy v - ...), where f v = gamma rstd, one per channel.

    v is a power of two; v and f are for dx what u and a are for y (see `affine`).
    """
    size = c1 - c0
    v, f = news(2, size, u.dtype)
    each(
        size,
        factors_channel,
        (c0, part(norm[1], c0, c1), part(norm[2], c0, c1), sums, count, u, v, f),
    )
    return v, f


@ordered
def coefficients_channel(c, mean, rstd, sum_dy, sum_dy_xhat, count, u, v, h, p, q):
    """h, p and q of channel c; see `coefficients`."""
    _, lo = split(mean[c], h)
    m = divisor(count, c)
    mean_dy, l = split(sum_dy[c] / m, h)
    p_c = rstd[c] * (sum_dy_xhat[c] / m)
    h[c] = mean_dy * v[c]
    p[c] = p_c * v[c] / u[c]
    q[c] = (l - lo * p_c) * v[c]


@none_without("sums")
def coefficients(norm, sums, count, c0, c1, u, v):
    """Coefficients h, p, q of dx / f = (dy v - h) - ((x u - hi) p + q), or None without sums.

    `count` is one number or one per channel, shape (C,).
    The right side is v (dy - mean(dy) - x_hat mean(dy x_hat)). mean(dy) is split like the mean of
    x, so that dy - h is exact for dy near its mean.
    """
    size = c1 - c0
    h, p, q = news(3, size, u.dtype)
    channels = (
        part(norm[0], c0, c1), part(norm[1], c0, c1),
        part(row(sums, 0), c0, c1), part(row(sums, 1), c0, c1),
    )  # fmt: skip
    each(size, coefficients_channel, (*channels, part(count, c0, c1), u, v, h, p, q))
    return h, p, q


@none_without("hpq")
def coefficients_of(hpq, c):
    """h[c], p[c] and q[c] of what `coefficients` returned; None for None."""
    h, p, q = hpq
    return h[c], p[c], q[c]


@ordered
def pairwise_sum(runs, length):
    """Add up runs of `length` values into the first one, pairwise: log2(n) roundings for n runs.

    In sequence, 256 samples with an outlier left a float64 M2 wrong by 4 units in the last place.
    """
    n = runs.size // length
    while n > 1:
        half = (n + 1) // 2
        upper = piece((runs, 0, 0), 0, 0, half * length, (n - half) * length)
        each(upper.size, add_other, (runs, upper))
        n = half


@ordered
def add_chunks(partial, i, c0, c1, total):
    """total = partial[i, :, c0:c1] added up over all chunks in order."""
    clear(total)
    for k in range(partial.shape[1]):
        each(total.size, add_other, (total, of_chunk(partial, i, k, c0, c1)))


@ordered
def mean_of(total, count):
    """total / count; 0 if count is Inf, which means that statistics are constants."""
    return 0.0 if count == np.inf else total / count


@ordered
def finish_second_channel(c, sum_d, sum_d_xhat, sum_g, sum_g_xhat, count, sum_dg):
    """Turn sum d g into sum d (g - mean(g) - x_hat mean(g x_hat)), in place."""
    sum_dg[c] -= sum_d[c] * mean_of(sum_g[c], count) + sum_d_xhat[c] * mean_of(sum_g_xhat[c], count)


@ordered
def finish_second_sums(partial, norm, c0, c1, x, count, sums):
    """Add up all chunks: the five sums (see `curvature_coefficients`) of channels c0 <= c < c1."""
    size = c1 - c0
    mean, rstd = part(norm[0], c0, c1), part(norm[1], c0, c1)
    sum_d, sum_d_xhat = part(row(sums, 0), c0, c1), part(row(sums, 1), c0, c1)
    sum_g, sum_g_xhat = part(row(sums, 2), c0, c1), part(row(sums, 3), c0, c1)
    sum_dg = part(row(sums, 4), c0, c1)
    add_chunks(partial, 0, c0, c1, sum_d)
    add_chunks(partial, 1, c0, c1, sum_d_xhat)
    add_chunks(partial, 2, c0, c1, sum_g)
    add_chunks(partial, 3, c0, c1, sum_g_xhat)
    add_chunks(partial, 4, c0, c1, sum_dg)
    each(size, finish_sums_channel, (mean, rstd, computed(x), sum_d, sum_d_xhat))
    each(size, finish_sums_channel, (mean, rstd, computed(x), sum_g, sum_g_xhat))
    each(size, finish_second_channel, (sum_d, sum_d_xhat, sum_g, sum_g_xhat, count, sum_dg))


@ordered
def center_channel(c, mean, rstd, hi, scale):
    """hi and scale of channel c; see `centers`."""
    hi[c], _ = split(mean[c], hi)
    scale[c] = rstd_power(rstd[c], hi)


@ordered
def centers(norm, c0, c1, like):
    """hi and scale, one per channel: (x - hi) scale is exact and has the size of x_hat."""
    hi, scale = news(2, c1 - c0, like.dtype)
    each(hi.size, center_channel, (part(norm[0], c0, c1), part(norm[1], c0, c1), hi, scale))
    return hi, scale


@ordered
def is_normal(value, like):
    """Whether a factor is normal in the dtype of `like`; True also for 0, Inf and NaN."""
    tiny, greatest = limits(like)
    return not (0 < abs(value) < tiny or greatest < abs(value) < np.inf)


@ordered
def subtractable(value, like):
    """Whether x - value is finite for every finite x; NaN passes."""
    _, greatest = limits(like)
    return not abs(value) >= greatest * epsilon(like) / 8


@ordered
def tangent_channel(
    c, mean, rstd, gamma, tgamma, tbeta, sum_t, sum_t_xhat, count, hi, a, h, p, q, fits
):
    """Coefficients of channel c; see `tangent_coefficients`."""
    hi[c], lo = split(mean[c], hi)
    a_c = gamma[c] * rstd[c]
    mean_t = mean_of(sum_t[c], count)
    h[c], l = split(mean_t, hi)
    p_c = rstd[c] * (tgamma[c] - a_c * mean_of(sum_t_xhat[c], count))
    a[c] = a_c
    p[c] = p_c
    q[c] = tbeta[c] - a_c * l - lo * p_c
    fits[c] = (
        is_normal(a_c, hi) and is_normal(p_c, hi) and subtractable(mean[c], hi)
        and subtractable(mean_t, hi)
    )  # fmt: skip


@ordered
def tangent_coefficients(norm, tangents, sums, count, c0, c1, like):
    """hi, (a, h, p, q) of ty = a (tx - h) + ((x - hi) p + q), one per channel, and which fit.

    The right side is gamma rstd (tx - mean(tx) - x_hat mean(tx x_hat)) + tgamma x_hat + tbeta, with
    both means split like that of x. A channel whose coefficients do not fit in the dtype of `like`
    is computed in float64.
    """
    mean, rstd, gamma, _ = norm
    tgamma, tbeta = tangents
    size = c1 - c0
    hi, a, h, p, q = news(5, size, like.dtype)
    fits = new(size, np.uint8)
    args = (
        part(mean, c0, c1), part(rstd, c0, c1), part(gamma, c0, c1), part(tgamma, c0, c1),
        part(tbeta, c0, c1), part(row(sums, 0), c0, c1), part(row(sums, 1), c0, c1), count,
    )  # fmt: skip
    each(size, tangent_channel, (*args, hi, a, h, p, q, fits))
    return hi, (a, h, p, q), fits


@ordered
def curvature_channel(
    c, mean, rstd, gamma, ddgamma, sum_d, sum_d_xhat, sum_g, sum_g_xhat, sum_dg, count,
    b, k, s, t, fits,
):  # fmt: skip
    """Coefficients of channel c; see `curvature_coefficients`."""
    _, lo = split(mean[c], b)
    a_c = gamma[c] * rstd[c]
    _, l = split(mean_of(sum_d[c], count), b)
    mean_g = mean_of(sum_g[c], count)
    k[c], l_g = split(mean_g, b)
    d_xhat, g_xhat = mean_of(sum_d_xhat[c], count), mean_of(sum_g_xhat[c], count)
    p_c = rstd[c] * (ddgamma[c] - a_c * d_xhat)
    b_c = -rstd[c] * a_c * g_xhat
    along = a_c * (mean_of(sum_dg[c], count) - 2 * d_xhat * g_xhat) + ddgamma[c] * g_xhat
    s_c = -rstd[c] * rstd[c] * along
    b[c] = b_c
    s[c] = s_c
    t[c] = -(b_c * l + p_c * l_g) - lo * s_c
    fits[c] &= is_normal(b_c, b) and is_normal(s_c, b) and subtractable(mean_g, b)


@none_without("dy")
def curvature_coefficients(dy, norm, tangents, sums, count, c0, c1, like, fits):
    """(b, k, s, t) of dx = b (ddx - h) + p (dy - k) + ((x - hi) s + t), one per channel.

    h, p and hi are those of `tangent_coefficients`. docs/math.md derives the right side. `sums` has
    sum d, sum d x_hat, sum g, sum g x_hat and sum d (g - mean(g) - x_hat mean(g x_hat)) of d = ddx
    and g = dy. If dy is None, returns None and does not change `fits`.
    """
    mean, rstd, gamma, _ = norm
    size = c1 - c0
    b, k, s, t = news(4, size, like.dtype)
    args = (
        part(mean, c0, c1), part(rstd, c0, c1), part(gamma, c0, c1), part(tangents[0], c0, c1),
        part(row(sums, 0), c0, c1), part(row(sums, 1), c0, c1), part(row(sums, 2), c0, c1),
        part(row(sums, 3), c0, c1), part(row(sums, 4), c0, c1), count,
    )  # fmt: skip
    each(size, curvature_channel, (*args, b, k, s, t, fits))
    return b, k, s, t
