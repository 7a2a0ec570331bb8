"""Row traversal, for large S: a tile is a piece of a row x[n, c, :] or several short rows.

Tiles are summed along S. The tiles of a channel are numbered row after row; a chunk is `per`
consecutive tiles. `stats`, `apply`, `backward_reduce` and `backward_apply` process chunk k of the
channels c0 <= c < c1. x, dy, y, residual, dx and dresidual are views (memory, stride of n, stride
of c), or None if absent.
"""

import numpy as np

from nbnorm.cpu import element
from nbnorm.cpu.channel import (
    FIRST,
    affine,
    after,
    bound,
    coefficients,
    coefficients_of,
    factors,
    gate,
    given,
    merge,
    scales,
    with_tile,
)
from nbnorm.cpu.intrinsics import clear, each, each_to, fence, four, new, of_chunk, piece, zeros
from nbnorm.cpu.jit import noinline, none_without, ordered
from nbnorm.cpu.storage import computed, load
from nbnorm.cpu.weights import weights_of

# Lanes that a tile is summed in: eight vectors of eight, enough to hide the latency of an
# addition. Short chains of additions also round less. `total` is written for 64.
LANES = 64


@ordered
def tiles(grid, k):
    """First tile of chunk k, and the tile after its last."""
    N, _, S, tile, fold, per = grid
    count = ((N + fold - 1) // fold) * ((S + tile - 1) // tile)
    return k * per, min((k + 1) * per, count)


@ordered
def locate(grid, t):
    """n0, n1, s and size of tile t = x[n0:n1, :, s : s + size]."""
    N, _, S, tile, fold, _ = grid
    across = (S + tile - 1) // tile
    n = t // across
    s = (t - n * across) * tile
    return n * fold, min((n + 1) * fold, N), s, min(tile, S - s)


@none_without("values")
def line(values):
    """A piece as a view whose samples are single values; None for None."""
    return values, 1, 0


@ordered
def add_moment_piece(x, K, s, q):
    """s += d and q += d^2 lane by lane in the compute dtype, where d = x - K."""
    whole = x.size // (4 * LANES) * (4 * LANES)
    for i in range(0, whole, 4 * LANES):
        each(LANES, element.add_moment_rows, (four(line(x), i, LANES, 0, 0, LANES), K, s, q))
    for i in range(whole, x.size, LANES):
        size = min(LANES, x.size - i)
        each(size, element.add_moment_row, (piece(line(x), i, 0, 0, size), K, s, q))


@ordered
def total(lanes, wide):
    """Sum of all lanes, pairwise in float64; the lanes are reset to 0."""
    each(LANES // 2, element.add_half, (lanes, wide, LANES // 2))
    each(LANES // 4, element.add_half, (wide, wide, LANES // 4))
    each(LANES // 8, element.add_half, (wide, wide, LANES // 8))
    each(LANES, element.fill, (0, lanes))
    return ((wide[0] + wide[4]) + (wide[2] + wide[6])) + ((wide[1] + wide[5]) + (wide[3] + wide[7]))


@noinline
def all_equal(x, n0, n1, c, s, size, K):
    """Whether every x of a tile is K, as in a dead channel: then there is nothing to sum again."""
    others = 0
    for n in range(n0, n1):
        values = piece(x, n, c, s, size)
        for i in range(size):
            others += load(values, i) != K
    return others == 0


@ordered
def in_float64(x):
    """Copy of a piece in float64."""
    out = new(x.size, np.float64)
    for i in range(x.size):
        out[i] = load(x, i)
    return out


@noinline
def moment_sums64(x, n0, n1, c, s, size, K):
    """sum d and sum d^2 of a tile in float64, where d = x - K."""
    s_lanes, q_lanes, wide = zeros(3, LANES, np.float64)
    for n in range(n0, n1):
        add_moment_piece(in_float64(piece(x, n, c, s, size)), K, s_lanes, q_lanes)
    return total(s_lanes, wide), total(q_lanes, wide)


@noinline
def moments64(x, n0, n1, c, s, size, K):
    """Two-pass moments of a tile in float64, used if the sums in the compute dtype are `lost`.

    Returns a value near the mean, the mean minus that value, and M2.
    """
    if all_equal(x, n0, n1, c, s, size, K):
        return K, 0.0, 0.0
    m = (n1 - n0) * size
    d, _ = moment_sums64(x, n0, n1, c, s, size, K)
    center = K + d / m
    d, q = moment_sums64(x, n0, n1, c, s, size, center)
    return center, d / m, q - d * d / m


@ordered
def first_mean(x):
    """Mean of the first values, exact if they are all equal."""
    values = min(FIRST, x.size)
    first = np.float64(load(x, 0))
    s = 0.0
    for i in range(values):
        s += load(x, i) - first
    return first + s / values


@ordered
def add_tile(x, n0, n1, c, s, size, k, s_lanes, q_lanes, wide, partial):
    """Merge the moments of a tile into those of chunk k of channel c."""
    count, shift, delta, m2 = partial[0, k, c], partial[1, k, c], partial[2, k, c], partial[3, k, c]
    if count == 0:
        shift = first_mean(piece(x, n0, c, s, size))
    K = s_lanes.dtype.type(shift + delta)
    for n in range(n0, n1):
        add_moment_piece(piece(x, n, c, s, size), K, s_lanes, q_lanes)
    d, q = total(s_lanes, wide), total(q_lanes, wide)
    m = float((n1 - n0) * size)
    K64 = np.float64(K)
    new_delta, new_m2, gone = with_tile(count, shift, delta, m2, m, K64, d, q, s_lanes)
    if gone:
        near, rest, m2_tile = moments64(x, n0, n1, c, s, size, K64)
        if count == 0:  # a shift that far off would cost delta digits
            shift = near
        _, new_delta, new_m2 = merge(count, delta, m2, m, (near - shift) + rest, m2_tile)
    partial[0, k, c], partial[1, k, c] = count + m, shift
    partial[2, k, c], partial[3, k, c] = new_delta, new_m2


@ordered
def clear_chunk(partial, k, c0, c1):
    """partial[:, k, c0:c1] = 0."""
    for i in range(partial.shape[0]):
        clear(of_chunk(partial, i, k, c0, c1))


@noinline
def stats(x, grid, c0, c1, k, partial):
    """partial[:, k, c] = count, shift, delta, M2 of chunk k, for channels c0 <= c < c1."""
    dtype = computed(x).dtype
    s_lanes, q_lanes = zeros(2, LANES, dtype)
    wide = new(LANES, np.float64)
    clear_chunk(partial, k, c0, c1)
    begin, end = tiles(grid, k)
    for t in range(begin, end):
        n0, n1, s, size = locate(grid, t)
        for c in range(c0, c1):
            add_tile(x, n0, n1, c, s, size, k, s_lanes, q_lanes, wide, partial)


@noinline
def apply(x, residual, grid, norm, floor, streamed, c0, c1, k, y):
    """y = act(gamma (x - mean) rstd + beta [+ residual]) in chunk k, channels c0 <= c < c1."""
    hi, u, a, b = affine(norm, c0, c1, computed(y))
    low = bound(floor, hi)
    begin, end = tiles(grid, k)
    for t in range(begin, end):
        n0, n1, s, size = locate(grid, t)
        for n in range(n0, n1):
            for c in range(c0, c1):
                i = c - c0
                x_, residual_ = piece(x, n, c, s, size), piece(residual, n, c, s, size)
                args, outs = (
                    (x_, residual_, hi[i], u[i], a[i], b[i], low),
                    (piece(y, n, c, s, size),),
                )
                each_to(size, element.apply, args, outs, streamed)
    fence(streamed)


@ordered
def add_gradient_piece(dy, x, y, kept, hi, u, a, b, scale, act, s, t):
    """s += g and t += g (x u - hi) scale lane by lane; kept = g, where g = dy act'(z)."""
    whole = x.size // (4 * LANES) * (4 * LANES)
    for i in range(0, whole, 4 * LANES):
        dy_, x_ = four(line(dy), i, LANES, 0, 0, LANES), four(line(x), i, LANES, 0, 0, LANES)
        y_, kept_ = four(line(y), i, LANES, 0, 0, LANES), four(line(kept), i, LANES, 0, 0, LANES)
        args = dy_, x_, y_, hi, u, a, b, scale, act, kept_, s, t
        each(LANES, element.add_gradient_rows, args)
    for i in range(whole, x.size, LANES):
        size = min(LANES, x.size - i)
        dy_, x_ = piece(line(dy), i, 0, 0, size), piece(line(x), i, 0, 0, size)
        y_, kept_ = piece(line(y), i, 0, 0, size), piece(line(kept), i, 0, 0, size)
        args = dy_, x_, y_, hi, u, a, b, scale, act, kept_, s, t
        each(size, element.add_gradient_row, args)


@noinline
def gradient_sums64(dy, x, w, y, grid, k, c, hi, u, a, b, scale, act):
    """sum g and sum g (x u - hi) scale over chunk k of channel c, in float64.

    w has weights (see weights.py) or is None; values of weight 0 are skipped.
    """
    s_sum, t_sum = 0.0, 0.0
    begin, end = tiles(grid, k)
    for t in range(begin, end):
        n0, n1, s, size = locate(grid, t)
        for n in range(n0, n1):
            dy_, x_, y_ = piece(dy, n, c, s, size), piece(x, n, c, s, size), piece(y, n, c, s, size)
            w_ = weights_of(w, n, c, s, size)
            for i in range(size):
                if element.weight64(w_, i) != 0:
                    g = np.float64(element.masked_dy(i, dy_, x_, y_, hi, u, a, b, act))
                    s_sum += g
                    t_sum += g * ((np.float64(element.taken(x_, i, act)) * u - hi) * scale)
    return s_sum, t_sum


@ordered
def overflowed(partial, k, c):
    """Whether a sum of chunk k of channel c is not finite."""
    return not abs(partial[0, k, c]) + abs(partial[1, k, c]) < np.inf


@noinline
def backward_reduce(dy, x, y, grid, norm, c0, c1, k, partial, kept):
    """partial[:, k, c] = sum g, sum g (x u - hi) scale of chunk k, where g = dy act'(z).

    See `nbnorm.cpu` for how beta and y determine g. g is written to `kept`, if given, which may be
    dy itself.
    """
    hi, u, a, b = affine(norm, c0, c1, computed(x))
    scale = scales(norm, c0, c1, u)
    act = gate(norm, hi)
    s_lanes, t_lanes = zeros(2, LANES, hi.dtype)
    wide = new(LANES, np.float64)
    clear_chunk(partial, k, c0, c1)
    begin, end = tiles(grid, k)
    for t in range(begin, end):
        n0, n1, s, size = locate(grid, t)
        for c in range(c0, c1):
            i = c - c0
            for n in range(n0, n1):
                add_gradient_piece(
                    piece(dy, n, c, s, size), piece(x, n, c, s, size), piece(y, n, c, s, size),
                    piece(kept, n, c, s, size),
                    hi[i], u[i], a[i], element.at(b, i), scale[i], act, s_lanes, t_lanes,
                )  # fmt: skip
            partial[0, k, c] += total(s_lanes, wide)
            partial[1, k, c] += total(t_lanes, wide)
    g, y_, norm_ = after(kept, dy, y, norm)
    b_, act_ = given(norm_[3], b), gate(norm_, hi)
    for c in range(c0, c1):
        if overflowed(partial, k, c):
            i = c - c0
            partial[0, k, c], partial[1, k, c] = gradient_sums64(
                g, x, None, y_, grid, k, c, hi[i], u[i], a[i], element.at(b_, i), scale[i], act_
            )


@noinline
def backward_apply(dy, x, y, grid, norm, sums, count, streamed, c0, c1, k, dx, dresidual):
    """dx = f ((g v - h) - ((x u - hi) p + q)) and dresidual = g in chunk k; either may be None.

    g = dy act'(z). dx = f v g if sums is None: frozen statistics. See `factors`, `coefficients`.
    """
    hi, u, a, b = affine(norm, c0, c1, computed(x))
    v, f = factors(norm, sums, count, c0, c1, u)
    hpq = coefficients(norm, sums, count, c0, c1, u, v)
    act = gate(norm, hi)
    begin, end = tiles(grid, k)
    for t in range(begin, end):
        n0, n1, s, size = locate(grid, t)
        for n in range(n0, n1):
            for c in range(c0, c1):
                i = c - c0
                dy_, x_ = piece(dy, n, c, s, size), piece(x, n, c, s, size)
                y_ = piece(y, n, c, s, size)
                outs = piece(dx, n, c, s, size), piece(dresidual, n, c, s, size)
                args = (
                    dy_, x_, y_, hi[i], u[i], a[i], element.at(b, i), coefficients_of(hpq, i),
                    v[i], f[i], act,
                )  # fmt: skip
                each_to(size, element.backward_apply, args, outs, streamed)
    fence(streamed)
