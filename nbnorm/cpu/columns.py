"""Columns: S is small. A tile is a few rows x[n, c0:c1, :] and is summed down the rows.

`fold` samples in sequence make one row, so that a row fills vector registers even where C S is 3;
column j of a row belongs to channel c0 + (j // S) % (c1 - c0). A chunk is `per` rows in sequence.
The last four functions do chunk k of the channels c0 <= c < c1 (of all channels where fold > 1),
with grid = (N, C, S, fold, per), in which x[n, c0:c1, :] is contiguous. Arrays come as in rows.py.

Each column keeps its own sum, so that no sum depends on where a block of channels begins. A loop
over rows stands in one function with the loop over columns: to call a function costs two atomic
operations for each array it is given, as long as the arithmetic on a short row.
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
from nbnorm.cpu.intrinsics import piece
from nbnorm.cpu.jit import none_without, ordered

# Rows a tile: over fewer the merges take longer than the sums. Rows summed in x's dtype before
# float64 takes over: with all 128, an outlier among them left rstd wrong by 3e-7. The two sums of
# the backward pass go row by row and not by fours, so they take fewer.
TILE = 128
RUN = 32
GRADIENT_RUN = 16


@ordered
def rows(grid, k):
    """First row of chunk k and the one after its last."""
    N, _, _, fold, per = grid
    return k * per, min((k + 1) * per, (N + fold - 1) // fold)


@ordered
def width(grid, r, c0, c1):
    """Columns of row r; the last one may hold less than fold samples."""
    N, _, S, fold, _ = grid
    return min(fold, N - r * fold) * (c1 - c0) * S


@ordered
def empty_row(grid, c0, c1, like):
    """Room for one row; rows unpacked from a 2-d array would not be contiguous in type."""
    return np.empty(grid[3] * (c1 - c0) * grid[2], like.dtype)


@ordered
def expand(out, S, channels):
    """Give every column its channel's value, which is at the channel's first column."""
    if out is None:
        return
    if S > 1:
        for c in range(channels):
            for j in range(c * S + 1, (c + 1) * S):
                out[j] = out[c * S]
    period = channels * S
    for j in range(period, out.size):
        out[j] = out[j - period]


@ordered
def gather(sums, S, out):
    """Add up each channel's columns; `sums` is used up."""
    add_up(sums, out.size * S)
    for c in range(out.size):
        if S > 1:
            add_up(piece((sums, 0, 0), 0, 0, c * S, S), 1)
        out[c] = sums[c * S]


@ordered
def sums(x, grid, r0, r1, c0, c1, K, s, q, s64, q64):
    """Sum d and d^2, d = x - K, of rows r0 <= r < r1 down each column into s64 and q64."""
    s64[:] = 0
    q64[:] = 0
    for r in range(r0, r1, RUN):
        run_sums(x, grid, r, min(r + RUN, r1), c0, c1, K, s, q)
        for j in range(K.size):
            s64[j] += s[j]
            q64[j] += q[j]


@ordered
def run_sums(x, grid, r0, r1, c0, c1, K, s, q):
    """The same over a few rows, in x's dtype.

    Four rows at a time, for one load and store of the sums; what is left, and the last row of all
    where it is shorter, one by one.
    """
    N, _, _, fold, _ = grid
    s[:] = 0
    q[:] = 0
    whole = r0 + (min(r1, N // fold) - r0) // 4 * 4
    for r in range(r0, whole, 4):
        x0 = piece(x, r * fold, c0, 0, K.size)
        x1 = piece(x, (r + 1) * fold, c0, 0, K.size)
        x2 = piece(x, (r + 2) * fold, c0, 0, K.size)
        x3 = piece(x, (r + 3) * fold, c0, 0, K.size)
        for j in range(K.size):
            d0 = x0[j] - K[j]
            d1 = x1[j] - K[j]
            d2 = x2[j] - K[j]
            d3 = x3[j] - K[j]
            s[j] += (d0 + d1) + (d2 + d3)
            q[j] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
    for r in range(whole, r1):
        x0 = piece(x, r * fold, c0, 0, width(grid, r, c0, c1))
        for j in range(x0.size):
            d = x0[j] - K[j]
            s[j] += d
            q[j] += d * d


@ordered
def sums64(x, grid, n0, n1, c, K):
    """Sum d and d^2 of x[n0:n1, c, :] in float64, and whether every d is 0.

    One value after another, so with the rounding of each sum carried along (Kahan 1965).
    """
    s = 0.0
    q = 0.0
    s_rest = 0.0
    q_rest = 0.0
    same = True
    for n in range(n0, n1):
        values = piece(x, n, c, 0, grid[2])
        for i in range(values.size):
            d = np.float64(values[i]) - K
            s, s_rest = add_exactly(s, d - s_rest)
            q, q_rest = add_exactly(q, d * d - q_rest)
            same = same and d == 0
    return s, q, same


@ordered
def add_exactly(so_far, value):
    """Sum, and how much more than the value it grew by."""
    grown = so_far + value
    return grown, (grown - so_far) - value


@ordered
def moments64(x, grid, n0, n1, c, K):
    """Mean from K and M2 of x[n0:n1, c, :] in two passes, for sums lost in x's dtype."""
    m = (n1 - n0) * grid[2]
    s, _, same = sums64(x, grid, n0, n1, c, K)
    if same:
        return 0.0, 0.0
    center = K + s / m
    s, q, _ = sums64(x, grid, n0, n1, c, center)
    return (center - K) + s / m, q - s * s / m


@ordered
def first_means(x, grid, c0, c1, begin, end, K, s, q, s64, q64, shift):
    """Means of the chunk's first values, exact where they are all the same."""
    N, _, S, fold, _ = grid
    for c in range(c0, c1):
        K[(c - c0) * S] = piece(x, begin * fold, c, 0, 1)[0]
    expand(K, S, c1 - c0)
    stop = min(begin + (FIRST + fold * S - 1) // (fold * S), end)
    sums(x, grid, begin, stop, c0, c1, K, s, q, s64, q64)
    gather(s64, S, shift)
    m = (min(stop * fold, N) - begin * fold) * S
    for c in range(shift.size):
        shift[c] = K[c * S] + shift[c] / m


@ordered
def tile_moments(K, S, m, count, shift, delta, merged, d, m2):
    """Turn sums d, m2 into mean from K and M2, NaN where that was lost; tell whether any was."""
    any_lost = False
    for c in range(d.size):
        mean = d[c] / m
        tile = m2[c] - d[c] * mean
        _, _, would_be = merge(count, delta[c], merged[c], m, K[c * S] - shift[c] + mean, tile)
        gone = lost(m, mean, m2[c], would_be, K)
        any_lost |= gone
        d[c] = mean
        m2[c] = np.nan if gone else tile
    return any_lost


@ordered
def merge_tile(K, S, m, count, shift, delta, merged, d, m2):
    """Merge the tile's moments into the chunk's."""
    for c in range(d.size):
        count[c], delta[c], merged[c] = merge(
            count[c], delta[c], merged[c], m, K[c * S] - shift[c] + d[c], m2[c]
        )


@ordered
def stats(x, grid, c0, c1, k, partial):
    """partial[:, k, c] = count, shift, delta, M2 of chunk k."""
    N, _, S, fold, _ = grid
    channels = c1 - c0
    K, s, q = (empty_row(grid, c0, c1, x[0]), empty_row(grid, c0, c1, x[0]),
               empty_row(grid, c0, c1, x[0]))  # fmt: skip
    s64, q64 = np.empty(K.size), np.empty(K.size)
    d, m2 = np.empty(channels), np.empty(channels)
    count, shift, delta, merged = (partial[0, k][c0:c1], partial[1, k][c0:c1],
                                  partial[2, k][c0:c1], partial[3, k][c0:c1])  # fmt: skip
    begin, end = rows(grid, k)
    first_means(x, grid, c0, c1, begin, end, K, s, q, s64, q64, shift)
    count[:] = 0
    delta[:] = 0
    merged[:] = 0
    for r in range(begin, end, TILE):
        stop = min(r + TILE, end)
        for c in range(channels):
            K[c * S] = shift[c] + delta[c]
        expand(K, S, channels)
        sums(x, grid, r, stop, c0, c1, K, s, q, s64, q64)
        gather(s64, S, d)
        gather(q64, S, m2)
        n0 = r * fold
        n1 = min(stop * fold, N)
        m = (n1 - n0) * S
        if tile_moments(K, S, m, count[0], shift, delta, merged, d, m2):
            for c in range(channels):
                if np.isnan(m2[c]):
                    d[c], m2[c] = moments64(x, grid, n0, n1, c0 + c, np.float64(K[c * S]))
                    if count[c] == 0:  # a shift that far off would cost delta its digits
                        shift[c] = K[c * S] + d[c]
        merge_tile(K, S, m, count, shift, delta, merged, d, m2)


@ordered
def affine_columns(norm, grid, c0, c1, like):
    """hi, a, b of every column; b is None where no mask is recomputed."""
    S = grid[2]
    hi, a = empty_row(grid, c0, c1, like), empty_row(grid, c0, c1, like)
    b = given(norm[3], empty_row(grid, c0, c1, like))
    for c in range(c0, c1):
        j = (c - c0) * S
        hi[j], a[j], b_c = affine(norm, c, like)
        put(b, j, b_c)
    expand(hi, S, c1 - c0)
    expand(a, S, c1 - c0)
    expand(b, S, c1 - c0)
    return hi, a, b


@none_without("condition")
def given(condition, value):
    """Value, or None where the condition is None."""
    return value


@ordered
def put(array, j, value):
    """array[j] = value, of an array that is there."""
    if array is not None:
        array[j] = value


@ordered
def apply(x, residual, grid, norm, floor, streamed, c0, c1, k, y):
    """y = act(gamma (x - mean) rstd + beta [+ residual]).

    Never streamed: through a buffer of one short row that took 1.6 times as long.
    """
    hi, a, b = affine_columns(norm, grid, c0, c1, x[0])
    low = hi.dtype.type(floor)
    begin, end = rows(grid, k)
    for r in range(begin, end):
        size = width(grid, r, c0, c1)
        x_ = piece(x, r * grid[3], c0, 0, size)
        residual_ = piece(residual, r * grid[3], c0, 0, size)
        y_ = piece(y, r * grid[3], c0, 0, size)
        for j in range(size):
            v = normalised(x_[j], hi[j], a[j], b[j])
            if residual is not None:
                v += residual_[j]
            y_[j] = rectified(v, low)


@ordered
def reduce(dy, x, y, grid, norm, c0, c1, k, partial):
    """partial[:, k, c] = sum dy, sum dy (x - hi) unit of chunk k, dy masked by y > 0.

    The mask is recomputed where norm holds beta, read where y is given. Each row takes several
    short loops: LLVM vectorises none that needs more than eight checks for overlapping arrays.
    """
    S = grid[2]
    channels = c1 - c0
    hi, a, b = affine_columns(norm, grid, c0, c1, x[0])
    s, t = np.empty_like(hi), np.empty_like(hi)
    s64, t64 = np.zeros(hi.size), np.zeros(hi.size)
    row, scaled, scale = np.empty_like(hi), np.empty_like(hi), np.empty_like(hi)
    for c in range(channels):
        scale[c * S] = unit(norm, c0 + c, hi)
    expand(scale, S, channels)
    begin, end = rows(grid, k)
    zero = hi.dtype.type(0)
    for r0 in range(begin, end, GRADIENT_RUN):
        s[:] = 0
        t[:] = 0
        for i in range(r0, min(r0 + GRADIENT_RUN, end)):
            size = width(grid, i, c0, c1)
            x_ = piece(x, i * grid[3], c0, 0, size)
            y_ = piece(y, i * grid[3], c0, 0, size)
            dy_ = piece(dy, i * grid[3], c0, 0, size)
            g = dy_
            if y is not None or b is not None:
                for j in range(size):
                    v = normalised(x_[j], hi[j], a[j], item(b, j))
                    row[j] = masked(dy_[j], item(y_, j), v, zero)
                g = row
            for j in range(size):
                scaled[j] = (x_[j] - hi[j]) * scale[j]
            for j in range(size):
                s[j] += g[j]
                t[j] += g[j] * scaled[j]
        for j in range(s.size):
            s64[j] += s[j]
            t64[j] += t[j]
    gather(s64, S, partial[0, k][c0:c1])
    gather(t64, S, partial[1, k][c0:c1])


@none_without("sums")
def gradient_columns(norm, sums, count, grid, c0, c1, like):
    """h, p, q of every column; None of no sums."""
    S = grid[2]
    h, p, q = (empty_row(grid, c0, c1, like), empty_row(grid, c0, c1, like),
               empty_row(grid, c0, c1, like))  # fmt: skip
    for c in range(c0, c1):
        j = (c - c0) * S
        h[j], p[j], q[j] = gradient(norm, sums, count, c, like)
    expand(h, S, c1 - c0)
    expand(p, S, c1 - c0)
    expand(q, S, c1 - c0)
    return h, p, q


@ordered
def gradient_rows(dy, x, y, grid, begin, end, c0, c1, hi, a, b, h, p, q, dx, dresidual):
    """dx = a ((dy - h) - ((x - hi) p + q)), or a dy where there is no h; dy masked by ReLU."""
    row, correction = np.empty_like(hi), np.empty_like(hi)
    zero = hi.dtype.type(0)
    for i in range(begin, end):
        size = width(grid, i, c0, c1)
        x_ = piece(x, i * grid[3], c0, 0, size)
        y_ = piece(y, i * grid[3], c0, 0, size)
        dy_ = piece(dy, i * grid[3], c0, 0, size)
        g = dy_
        if y is not None or b is not None:
            for j in range(size):
                v = normalised(x_[j], hi[j], a[j], item(b, j))
                row[j] = masked(dy_[j], item(y_, j), v, zero)
            g = row
        if dresidual is not None:  # before dx, which may be written over dy
            dresidual_ = piece(dresidual, i * grid[3], c0, 0, size)
            for j in range(size):
                dresidual_[j] = g[j]
        if dx is not None:
            dx_ = piece(dx, i * grid[3], c0, 0, size)
            if h is None:
                for j in range(size):
                    dx_[j] = a[j] * g[j]
            else:
                for j in range(size):
                    correction[j] = normalised(x_[j], hi[j], p[j], q[j])
                for j in range(size):
                    dx_[j] = a[j] * ((g[j] - h[j]) - correction[j])


@ordered
def differentiate(dy, x, y, grid, norm, sums, count, streamed, c0, c1, k, dx, dresidual):
    """dx and dresidual, each where given; sums (sum dy, sum dy x_hat) None: frozen statistics."""
    hi, a, b = affine_columns(norm, grid, c0, c1, x[0])
    hpq = gradient_columns(norm, sums, count, grid, c0, c1, hi)
    begin, end = rows(grid, k)
    gradient_rows(
        dy, x, y, grid, begin, end, c0, c1, hi, a, b, item(hpq, 0), item(hpq, 1), item(hpq, 2),
        dx, dresidual,
    )  # fmt: skip
