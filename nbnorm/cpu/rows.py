"""Rows: S is large. A tile is a piece of a row x[n, c, :], or several short rows, summed along S.

The tiles of a channel, row after row, are numbered; a chunk is `per` of them in sequence.
`stats`, `apply`, `reduce` and `differentiate` do chunk k of the channels c0 <= c < c1. x, dy, y,
residual, dx and dresidual come as views (memory, stride of n, stride of c), as None where absent.
"""

import numpy as np

from nbnorm.cpu import element
from nbnorm.cpu.channel import (
    FIRST,
    affine,
    coefficients,
    coefficients_of,
    factors,
    lost,
    merge,
    scales,
)
from nbnorm.cpu.intrinsics import clear, each, each_to, fence, four, new, of_chunk, piece, zeros
from nbnorm.cpu.jit import none_without, ordered, shared
from nbnorm.cpu.storage import computed, load

# A tile is summed in so many chains side by side: eight vectors of eight, enough to hide the time
# that an addition takes. Short chains also round less. `total` is written for 64.
LANES = 64


@ordered
def tiles(grid, k):
    """Numbers of the first tile of chunk k and of the one after its last."""
    N, _, S, tile, fold, per = grid
    count = ((N + fold - 1) // fold) * ((S + tile - 1) // tile)
    return k * per, min((k + 1) * per, count)


@ordered
def locate(grid, t):
    """Tile t is x[n0:n1, :, s : s + size]."""
    N, _, S, tile, fold, _ = grid
    across = (S + tile - 1) // tile
    n = t // across
    s = (t - n * across) * tile
    return n * fold, min((n + 1) * fold, N), s, min(tile, S - s)


@none_without("values")
def line(values):
    """A piece as a view whose samples are its values; None for None."""
    return values, 1, 0


@ordered
def add_piece(x, K, s, q):
    """Add d and d^2 of d = x - K, in x's dtype, to the lanes s and q."""
    whole = x.size // (4 * LANES) * (4 * LANES)
    for i in range(0, whole, 4 * LANES):
        each(LANES, element.add_rows, (four(line(x), i, LANES, 0, 0, LANES), K, s, q))
    for i in range(whole, x.size, LANES):
        size = min(LANES, x.size - i)
        each(size, element.add_row, (piece(line(x), i, 0, 0, size), K, s, q))


@ordered
def total(lanes, wide):
    """Sum of all lanes in pairs, in float64; they are left at 0."""
    each(LANES // 2, element.add_half, (lanes, wide, LANES // 2))
    each(LANES // 4, element.add_half, (wide, wide, LANES // 4))
    each(LANES // 8, element.add_half, (wide, wide, LANES // 8))
    each(LANES, element.fill, (0, lanes))
    return ((wide[0] + wide[4]) + (wide[2] + wide[6])) + ((wide[1] + wide[5]) + (wide[3] + wide[7]))


@shared
def constant(x, n0, n1, c, s, size, K):
    """Whether every x of a tile is K: a dead channel, which need not be summed again."""
    others = 0
    for n in range(n0, n1):
        values = piece(x, n, c, s, size)
        for i in range(size):
            others += load(values, i) != K
    return others == 0


@ordered
def in_float64(x):
    """Copy a piece."""
    out = new(x.size, np.float64)
    for i in range(x.size):
        out[i] = load(x, i)
    return out


@shared
def sums64(x, n0, n1, c, s, size, K):
    """Sum d and d^2 of a tile in float64."""
    s_lanes, q_lanes, wide = zeros(3, LANES, np.float64)
    for n in range(n0, n1):
        add_piece(in_float64(piece(x, n, c, s, size)), K, s_lanes, q_lanes)
    return total(s_lanes, wide), total(q_lanes, wide)


@shared
def moments64(x, n0, n1, c, s, size, K):
    """Mean, as a value near it and the rest, and M2 of a tile in two passes.

    Used where the sums in x's dtype were lost.
    """
    if constant(x, n0, n1, c, s, size, K):
        return K, 0.0, 0.0
    m = (n1 - n0) * size
    d, _ = sums64(x, n0, n1, c, s, size, K)
    center = K + d / m
    d, q = sums64(x, n0, n1, c, s, size, center)
    return center, d / m, q - d * d / m


@ordered
def first_mean(x):
    """Mean of the first values, exact where they are all the same."""
    values = min(FIRST, x.size)
    first = np.float64(load(x, 0))
    s = 0.0
    for i in range(values):
        s += load(x, i) - first
    return first + s / values


@ordered
def add_tile(x, n0, n1, c, s, size, k, s_lanes, q_lanes, wide, partial):
    """Merge the moments of one tile into those of its chunk."""
    count, shift, delta, m2 = partial[0, k, c], partial[1, k, c], partial[2, k, c], partial[3, k, c]
    if count == 0:
        shift = first_mean(piece(x, n0, c, s, size))
    K = s_lanes.dtype.type(shift + delta)
    for n in range(n0, n1):
        add_piece(piece(x, n, c, s, size), K, s_lanes, q_lanes)
    d, q = total(s_lanes, wide), total(q_lanes, wide)
    m = (n1 - n0) * size
    mean = d / m
    from_shift = np.float64(K) - shift
    merged = merge(count, delta, m2, m, from_shift + mean, q - d * mean)
    if lost(m, mean, q, merged[2], s_lanes):
        near, rest, m2_tile = moments64(x, n0, n1, c, s, size, np.float64(K))
        if count == 0:  # a shift that far off would cost delta its digits
            shift = near
        merged = merge(count, delta, m2, m, (near - shift) + rest, m2_tile)
    partial[0, k, c], partial[2, k, c], partial[3, k, c] = merged
    partial[1, k, c] = shift


@ordered
def clear_chunk(partial, k, c0, c1):
    """partial[:, k, c0:c1] = 0."""
    for i in range(partial.shape[0]):
        clear(of_chunk(partial, i, k, c0, c1))


@shared
def stats(x, grid, c0, c1, k, partial):
    """partial[:, k, c] = count, shift, delta, M2 of chunk k."""
    dtype = computed(x).dtype
    s_lanes, q_lanes = zeros(2, LANES, dtype)
    wide = new(LANES, np.float64)
    clear_chunk(partial, k, c0, c1)
    begin, end = tiles(grid, k)
    for t in range(begin, end):
        n0, n1, s, size = locate(grid, t)
        for c in range(c0, c1):
            add_tile(x, n0, n1, c, s, size, k, s_lanes, q_lanes, wide, partial)


@shared
def apply(x, residual, grid, norm, floor, streamed, c0, c1, k, y):
    """y = act(gamma (x - mean) rstd + beta [+ residual])."""
    hi, u, a, b = affine(norm, c0, c1, computed(x))
    low = hi.dtype.type(floor)
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
                each_to(size, element.normalise, args, outs, streamed)
    fence(streamed)


@ordered
def add_gradient_piece(dy, x, y, hi, u, a, b, scale, zero, s, t):
    """Add g and g (x u - hi) scale, g = dy masked by ReLU, to the lanes s and t."""
    whole = x.size // (4 * LANES) * (4 * LANES)
    for i in range(0, whole, 4 * LANES):
        dy_, x_ = four(line(dy), i, LANES, 0, 0, LANES), four(line(x), i, LANES, 0, 0, LANES)
        y_ = four(line(y), i, LANES, 0, 0, LANES)
        each(LANES, element.add_gradient_rows, (dy_, x_, y_, hi, u, a, b, scale, zero, s, t))
    for i in range(whole, x.size, LANES):
        size = min(LANES, x.size - i)
        dy_, x_ = piece(line(dy), i, 0, 0, size), piece(line(x), i, 0, 0, size)
        y_ = piece(line(y), i, 0, 0, size)
        each(size, element.add_gradient_row, (dy_, x_, y_, hi, u, a, b, scale, zero, s, t))


@shared
def sums_again(dy, x, y, grid, k, c, hi, u, a, b, scale, zero):
    """Sums of g and of g (x u - hi) scale over chunk k of channel c, in float64."""
    s_sum, t_sum = 0.0, 0.0
    begin, end = tiles(grid, k)
    for t in range(begin, end):
        n0, n1, s, size = locate(grid, t)
        for n in range(n0, n1):
            dy_, x_, y_ = piece(dy, n, c, s, size), piece(x, n, c, s, size), piece(y, n, c, s, size)
            for i in range(size):
                g = np.float64(element.gradient(i, dy_, x_, y_, hi, u, a, b, zero))
                s_sum += g
                t_sum += g * ((np.float64(load(x_, i)) * u - hi) * scale)
    return s_sum, t_sum


@ordered
def overflowed(partial, k, c):
    """Whether the sums of chunk k of a channel are not finite."""
    return not abs(partial[0, k, c]) + abs(partial[1, k, c]) < np.inf


@shared
def reduce(dy, x, y, grid, norm, c0, c1, k, partial):
    """partial[:, k, c] = sum dy, sum dy (x u - hi) scale of chunk k, dy masked by y > 0.

    The mask is recomputed where norm holds beta, read where y is given.
    """
    hi, u, a, b = affine(norm, c0, c1, computed(x))
    scale = scales(norm, c0, c1, u)
    zero = hi.dtype.type(0)
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
                    hi[i], u[i], a[i], element.at(b, i), scale[i], zero, s_lanes, t_lanes,
                )  # fmt: skip
            partial[0, k, c] += total(s_lanes, wide)
            partial[1, k, c] += total(t_lanes, wide)
    for c in range(c0, c1):
        if overflowed(partial, k, c):
            i = c - c0
            partial[0, k, c], partial[1, k, c] = sums_again(
                dy, x, y, grid, k, c, hi[i], u[i], a[i], element.at(b, i), scale[i], zero
            )


@shared
def differentiate(dy, x, y, grid, norm, sums, count, streamed, c0, c1, k, dx, dresidual):
    """Write dx and dresidual, each where given; sums=None where statistics are frozen."""
    hi, u, a, b = affine(norm, c0, c1, computed(x))
    v, f = factors(norm, sums, count, c0, c1, u)
    hpq = coefficients(norm, sums, count, c0, c1, u, v)
    zero = hi.dtype.type(0)
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
                    v[i], f[i], zero,
                )  # fmt: skip
                each_to(size, element.differentiate, args, outs, streamed)
    fence(streamed)
