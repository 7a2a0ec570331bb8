"""Rows: S is large. A tile is a piece of one row x[n, c, :] and is summed along itself.

The tiles of a channel, row after row, are numbered; a chunk is `per` of them in sequence. The last
four functions do chunk k of the channels c0 <= c < c1, with grid = (N, C, S, tile, per). x, dy, y,
residual, dx and dresidual come as views (memory, stride of n, stride of c), as None where absent.
"""

import numpy as np

from nbnorm.cpu.channel import (
    FIRST,
    add_up,
    affine,
    gradient,
    item,
    lost,
    masked,
    merge,
    normalised,
    rectified,
    unit,
)
from nbnorm.cpu.intrinsics import piece, settle, staged
from nbnorm.cpu.jit import none_without, ordered


@ordered
def tiles(grid, k):
    """Numbers of the first tile of chunk k and of the one after its last."""
    N, _, S, tile, per = grid
    return k * per, min((k + 1) * per, N * ((S + tile - 1) // tile))


@ordered
def locate(grid, t):
    """Tile t begins at x[n, :, s] and holds `size` values."""
    _, _, S, tile, _ = grid
    across = (S + tile - 1) // tile
    n = t // across
    s = (t - n * across) * tile
    return n, s, min(tile, S - s)


# Chains that a tile is summed in, side by side: eight vectors of eight, enough to hide the time
# that an addition takes. Few values a chain also means little rounding.
LANES = 64


@ordered
def sums(x, K, s, q, wide):
    """Sum d and sum d^2 of d = x - K, in x's dtype by lanes, which float64 adds up."""
    s[:] = 0
    q[:] = 0
    whole = x.size // (4 * LANES) * (4 * LANES)
    for i in range(0, whole, 4 * LANES):
        x0, x1 = x[i : i + LANES], x[i + LANES : i + 2 * LANES]
        x2, x3 = x[i + 2 * LANES : i + 3 * LANES], x[i + 3 * LANES : i + 4 * LANES]
        for j in range(LANES):
            d0 = x0[j] - K
            d1 = x1[j] - K
            d2 = x2[j] - K
            d3 = x3[j] - K
            s[j] += (d0 + d1) + (d2 + d3)
            q[j] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
    for i in range(whole, x.size, LANES):
        rest = x[i : i + LANES]
        for j in range(rest.size):
            d = rest[j] - K
            s[j] += d
            q[j] += d * d
    return total(s, wide), total(q, wide)


@ordered
def total(lanes, wide):
    """Sum of all lanes, in float64."""
    for j in range(LANES):
        wide[j] = lanes[j]
    add_up(wide, 1)
    return wide[0]


@ordered
def constant(x, K):
    """Whether every x is K: a dead channel, which need not be summed again."""
    others = 0
    for i in range(x.size):
        others += x[i] != K
    return others == 0


@ordered
def moments64(x, K, wide):
    """Mean from K and M2 of a tile in two passes, for sums that were lost in x's dtype."""
    if constant(x, K):
        return 0.0, 0.0
    s, q = np.empty(LANES), np.empty(LANES)
    values = x.astype(np.float64)
    first, _ = sums(values, np.float64(K), s, q, wide)
    center = K + first / x.size
    rest, square = sums(values, center, s, q, wide)
    return (center - K) + rest / x.size, square - rest * rest / x.size


@ordered
def first_mean(x):
    """Mean of the first values, exact where they are all the same."""
    values = min(FIRST, x.size)
    s = 0.0
    for i in range(values):
        s += np.float64(x[i]) - x[0]
    return x[0] + s / values


@ordered
def add_tile(x, k, c, s_lanes, q_lanes, wide, partial):
    """Merge the moments of one tile into those of its chunk."""
    count, shift, delta, m2 = partial[0, k, c], partial[1, k, c], partial[2, k, c], partial[3, k, c]
    if count == 0:
        shift = first_mean(x)
    K = x.dtype.type(shift + delta)
    s, q = sums(x, K, s_lanes, q_lanes, wide)
    d = s / x.size
    from_shift = np.float64(K) - shift
    merged = merge(count, delta, m2, x.size, from_shift + d, q - s * d)
    if lost(x.size, d, q, merged[2], x):
        d, m2_tile = moments64(x, K, wide)
        if count == 0:  # a shift that far off would cost delta its digits
            shift = K + d
            from_shift = np.float64(K) - shift
        merged = merge(count, delta, m2, x.size, from_shift + d, m2_tile)
    partial[0, k, c], partial[2, k, c], partial[3, k, c] = merged
    partial[1, k, c] = shift


@ordered
def stats(x, grid, c0, c1, k, partial):
    """partial[:, k, c] = count, shift, delta, M2 of chunk k."""
    s_lanes, q_lanes = np.empty(LANES, x[0].dtype), np.empty(LANES, x[0].dtype)
    wide = np.empty(LANES)
    partial[:, k, c0:c1] = 0
    begin, end = tiles(grid, k)
    for t in range(begin, end):
        n, s, size = locate(grid, t)
        for c in range(c0, c1):
            add_tile(piece(x, n, c, s, size), k, c, s_lanes, q_lanes, wide, partial)


@ordered
def normalise_tile(x, residual, hi, a, b, floor, y):
    """y = max((x - hi) a + b [+ residual], floor)."""
    for i in range(x.size):
        v = normalised(x[i], hi, a, b)
        if residual is not None:
            v += residual[i]
        y[i] = rectified(v, floor)


@ordered
def apply(x, residual, grid, norm, floor, streamed, c0, c1, k, y):
    """y = act(gamma (x - mean) rstd + beta [+ residual])."""
    low = x[0].dtype.type(floor)
    buffer = np.empty(grid[3], x[0].dtype)
    begin, end = tiles(grid, k)
    for t in range(begin, end):
        n, s, size = locate(grid, t)
        for c in range(c0, c1):
            hi, a, b = affine(norm, c, x[0])
            target = piece(y, n, c, s, size)
            out = staged(buffer, target, streamed)
            normalise_tile(
                piece(x, n, c, s, size), piece(residual, n, c, s, size), hi, a, b, low, out
            )
            settle(out, target, streamed)


@ordered
def gradient_sums(dy, x, y, hi, a, b, scale, s, t, wide):
    """Sum dy and sum dy (x - hi) scale of a tile, dy masked by ReLU, as `sums` does."""
    s[:] = 0
    t[:] = 0
    zero = x.dtype.type(0)
    for i in range(0, x.size, LANES):
        dy_, x_, y_ = part(dy, i), part(x, i), part(y, i)
        for j in range(x_.size):
            g = masked(dy_[j], item(y_, j), normalised(x_[j], hi, a, b), zero)
            s[j] += g
            t[j] += g * ((x_[j] - hi) * scale)
    return total(s, wide), total(t, wide)


@none_without("x")
def part(x, i):
    """One value of x for each lane, from i on; None of no array."""
    return x[i : i + LANES]


@ordered
def reduce(dy, x, y, grid, norm, c0, c1, k, partial):
    """partial[:, k, c] = sum dy, sum dy (x - hi) unit of chunk k, dy masked by y > 0.

    The mask is recomputed where norm holds beta, read where y is given.
    """
    s_lanes, t_lanes = np.empty(LANES, x[0].dtype), np.empty(LANES, x[0].dtype)
    wide = np.empty(LANES)
    partial[:, k, c0:c1] = 0
    begin, end = tiles(grid, k)
    for t in range(begin, end):
        n, s, size = locate(grid, t)
        for c in range(c0, c1):
            hi, a, b = affine(norm, c, x[0])
            s_tile, t_tile = gradient_sums(
                piece(dy, n, c, s, size), piece(x, n, c, s, size), piece(y, n, c, s, size),
                hi, a, b, unit(norm, c, x[0]), s_lanes, t_lanes, wide,
            )  # fmt: skip
            partial[0, k, c] += s_tile
            partial[1, k, c] += t_tile


@ordered
def centred(g, x, hi, coefficients):
    """(g - h) - ((x - hi) p + q); g where statistics are constants (no h, p, q)."""
    if coefficients is None:
        return g
    h, p, q = coefficients
    return (g - h) - normalised(x, hi, p, q)


@ordered
def mask_tile(dy, x, y, hi, a, b, g):
    """g = dy masked by ReLU."""
    zero = x.dtype.type(0)
    for i in range(x.size):
        g[i] = masked(dy[i], item(y, i), normalised(x[i], hi, a, b), zero)


@ordered
def gradient_tile(dy, x, y, hi, a, b, coefficients, dx):
    """dx = a (g - mean(g) - x_hat mean(g x_hat)) of g = dy masked by ReLU."""
    zero = x.dtype.type(0)
    for i in range(x.size):
        g = masked(dy[i], item(y, i), normalised(x[i], hi, a, b), zero)
        dx[i] = a * centred(g, x[i], hi, coefficients)


@ordered
def differentiate(dy, x, y, grid, norm, sums, count, streamed, c0, c1, k, dx, dresidual):
    """dx and dresidual, each where given; sums (sum dy, sum dy x_hat) None: frozen statistics."""
    buffer = np.empty(grid[3], x[0].dtype)
    begin, end = tiles(grid, k)
    for t in range(begin, end):
        n, s, size = locate(grid, t)
        for c in range(c0, c1):
            hi, a, b = affine(norm, c, x[0])
            coefficients = gradient(norm, sums, count, c, x[0])
            dy_, x_, y_ = piece(dy, n, c, s, size), piece(x, n, c, s, size), piece(y, n, c, s, size)
            if dresidual is not None:  # before dx, which may be written over dy
                target = piece(dresidual, n, c, s, size)
                out = staged(buffer, target, streamed)
                mask_tile(dy_, x_, y_, hi, a, b, out)
                settle(out, target, streamed)
            if dx is not None:
                target = piece(dx, n, c, s, size)
                out = staged(buffer, target, streamed)
                gradient_tile(dy_, x_, y_, hi, a, b, coefficients, out)
                settle(out, target, streamed)
