"""Columns: S is small. A tile is a few rows x[n, c0:c1, :] and is summed down the rows.

`fold` samples in sequence make one row, so that a row fills vector registers even where C S
is 3; column j of a row belongs to channel c0 + (j // S) % (c1 - c0). A chunk is `per` rows in
sequence. `stats`, `apply`, `reduce` and `differentiate` do chunk k of the channels c0 <= c < c1 (of
all channels where fold > 1); x[n, c0:c1, :] is contiguous. Arrays come as in rows.py.

Each column keeps its own sum, so that no sum depends on where a block of channels begins. A loop
over rows stands in one function with the loop over columns: a function call costs two atomic
operations for each array it is given, which takes as long as the arithmetic on a short row.
"""

import numpy as np

from nbnorm.cpu import element
from nbnorm.cpu import rows as by_rows
from nbnorm.cpu.channel import (
    FIRST,
    add_up,
    affine,
    all_one,
    coefficients,
    factors,
    lost,
    merge,
    scales,
)
from nbnorm.cpu.intrinsics import (
    clear,
    each,
    each_to,
    fence,
    four,
    new,
    news,
    of_chunk,
    piece,
    sum_of,
    zeros,
)
from nbnorm.cpu.jit import none_without, ordered, shared
from nbnorm.cpu.plan import PLANE_ALONE
from nbnorm.cpu.storage import computed, load

# Rows in a tile: with fewer, merges take longer than sums.
TILE_ROWS = 256
# Rows summed in x's dtype before float64 takes over: with 128, an outlier left rstd wrong by 3e-7.
RUN_ROWS = 32


@ordered
def rows(grid, k):
    """First row of chunk k and the one after its last."""
    N, _, _, _, fold, per = grid
    return k * per, min((k + 1) * per, (N + fold - 1) // fold)


@ordered
def width(grid, r, c0, c1):
    """Columns of row r; the last one may hold less than fold samples."""
    N, _, S, _, fold, _ = grid
    return min(fold, N - r * fold) * (c1 - c0) * S


@none_without("values")
def by_columns(values, grid):
    """Numbers for every column of those for every channel; no copy where the two are the same."""
    _, _, S, _, fold, _ = grid
    if S * fold == 1:
        return values
    out = new(fold * values.size * S, values.dtype)
    expand(values, S, out)
    return out


@shared
def expand(values, S, out):
    """Give every column of `out` its channel's value."""
    whole = (out, 0, 0)
    for begin in range(0, out.size, values.size * S):
        if S == 1:
            each(values.size, element.copy, (values, piece(whole, 0, 0, begin, values.size)))
            continue
        for c in range(values.size):
            each(S, element.fill, (values[c], piece(whole, 0, 0, begin + c * S, S)))


@shared
def gather(sums, S, out):
    """Add up each channel's columns; `sums` is used up."""
    add_up(sums, out.size * S)
    if S == 1:
        each(out.size, element.copy, (sums, out))
        return
    for c in range(out.size):
        out[c] = sum_of(piece((sums, 0, S), 0, c, 0, S))


@ordered
def whole_fours(grid, r0, r1):
    """End of the rows from r0 on that can be taken four at a time: full ones."""
    N, _, _, _, fold, _ = grid
    return r0 + (min(r1, N // fold) - r0) // 4 * 4


@shared
def sums(x, grid, r0, r1, c0, c1, K, s, q, s64, q64):
    """Sum d and d^2, d = x - K, of rows r0 <= r < r1 down each column into s64 and q64."""
    fold = grid[4]
    size = K.size
    clear(s)
    clear(q)
    clear(s64)
    clear(q64)
    for begin in range(r0, r1, RUN_ROWS):
        end = min(begin + RUN_ROWS, r1)
        whole = whole_fours(grid, begin, end)
        for r in range(begin, whole, 4):
            each(size, element.add_rows, (four(x, r * fold, fold, c0, 0, size), K, s, q))
        for r in range(whole, end):
            short = width(grid, r, c0, c1)
            each(short, element.add_row, (piece(x, r * fold, c0, 0, short), K, s, q))
        each(size, element.drain, (s, s64))
        each(size, element.drain, (q, q64))


@shared
def sums64(x, grid, n0, n1, c, K):
    """Sum d and d^2 of x[n0:n1, c, :] in float64, and whether every d is 0.

    Values are added one by one, so each sum carries its rounding error along (Kahan 1965).
    """
    s = 0.0
    q = 0.0
    s_rest = 0.0
    q_rest = 0.0
    same = True
    S = grid[2]
    for n in range(n0, n1):
        values = piece(x, n, c, 0, S)
        for i in range(values.size):
            d = np.float64(load(values, i)) - K
            s, s_rest = add_exactly(s, d - s_rest)
            q, q_rest = add_exactly(q, d * d - q_rest)
            same = same and d == 0
    return s, q, same


@ordered
def add_exactly(so_far, value):
    """The sum, and by how much its growth exceeds the value."""
    grown = so_far + value
    return grown, (grown - so_far) - value


@shared
def moments64(x, grid, n0, n1, c, K):
    """Mean, as a value near it and the rest, and M2 of x[n0:n1, c, :] in two passes.

    Used where the sums in x's dtype were lost.
    """
    S = grid[2]
    m = (n1 - n0) * S
    s, _, same = sums64(x, grid, n0, n1, c, K)
    if same:
        return K, 0.0, 0.0
    center = K + s / m
    s, q, _ = sums64(x, grid, n0, n1, c, center)
    return center, s / m, q - s * s / m


@shared
def first_means(x, grid, c0, c1, begin, end, k, K, s, q, s64, q64, shift):
    """Means of the chunk's first values, exact where they are all the same."""
    N, _, S, _, fold, _ = grid
    for c in range(c0, c1):
        k[c - c0] = load(piece(x, begin * fold, c, 0, 1), 0)
    expand(k, S, K)
    stop = min(begin + (FIRST + fold * S - 1) // (fold * S), end)
    sums(x, grid, begin, stop, c0, c1, K, s, q, s64, q64)
    gather(s64, S, shift)
    n0, n1 = begin * fold, min(stop * fold, N)
    for c in range(shift.size):
        if not abs(shift[c]) < np.inf:
            shift[c], _, _ = sums64(x, grid, n0, n1, c0 + c, np.float64(k[c]))
        shift[c] = k[c] + shift[c] / ((n1 - n0) * S)


@ordered
def mean_so_far(c, shift, delta, k):
    """k = shift + delta."""
    k[c] = shift[c] + delta[c]


@ordered
def merge_tile(c, count, shift, delta, merged, m, k, d, q, new_delta, new_merged, gone):
    """Merge the moments of a tile, whose sums are d and q; say whether the sums were lost."""
    mean = d[c] / m
    delta_tile = k[c] - shift[c] + mean
    _, new_delta[c], new_merged[c] = merge(
        count, delta[c], merged[c], m, delta_tile, q[c] - d[c] * mean
    )
    gone[c] = lost(m, mean, q[c], new_merged[c], k)


@shared
def stats(x, grid, c0, c1, k, partial):
    """partial[:, k, c] = count, shift, delta, M2 of chunk k."""
    N, _, S, _, fold, _ = grid
    channels, dtype = c1 - c0, computed(x).dtype
    # A small call is half allocations: one for the arrays of a kind.
    center = new(channels, dtype)
    K, s, q = news(3, fold * channels * S, dtype)
    s64, q64 = news(2, K.size, np.float64)
    d, d2, new_delta, new_m2 = news(4, channels, np.float64)
    gone = new(channels, np.uint8)
    shift, delta = of_chunk(partial, 1, k, c0, c1), of_chunk(partial, 2, k, c0, c1)
    m2 = of_chunk(partial, 3, k, c0, c1)
    begin, end = rows(grid, k)
    first_means(x, grid, c0, c1, begin, end, center, K, s, q, s64, q64, shift)
    count = 0.0
    clear(delta)
    clear(m2)
    for r in range(begin, end, TILE_ROWS):
        stop = min(r + TILE_ROWS, end)
        n0, n1 = r * fold, min(stop * fold, N)
        m = float((n1 - n0) * S)
        each(channels, mean_so_far, (shift, delta, center))
        expand(center, S, K)
        sums(x, grid, r, stop, c0, c1, K, s, q, s64, q64)
        gather(s64, S, d)
        gather(q64, S, d2)
        before, after = (count, shift, delta, m2), (new_delta, new_m2, gone)
        each(channels, merge_tile, (*before, m, center, d, d2, *after))
        for c in range(channels):
            if gone[c]:
                K64 = np.float64(center[c])
                near, rest, m2_tile = moments64(x, grid, n0, n1, c0 + c, K64)
                if count == 0:  # a shift that far off would cost delta its digits
                    shift[c] = near
                _, new_delta[c], new_m2[c] = merge(
                    count, delta[c], m2[c], m, (near - shift[c]) + rest, m2_tile
                )
        count += m
        # Array assignments would bring in the text of an error message: half a second to compile.
        each(channels, element.copy, (new_delta, delta))
        each(channels, element.copy, (new_m2, m2))
    each(channels, element.fill, (count, of_chunk(partial, 0, k, c0, c1)))


@ordered
def by_planes(grid, streamed):
    """Whether a chunk is normalised plane by plane, as rows are.

    A channel's coefficients are then numbers, not a column each: 14 x 14 planes in cache took 0.6
    times as long. But planes that do not begin at a cache line stream worse than long rows.
    """
    _, _, S, _, fold, _ = grid
    return S >= PLANE_ALONE and fold == 1 and not streamed


@shared
def apply(x, residual, grid, norm, floor, streamed, c0, c1, k, y):
    """y = act(gamma (x - mean) rstd + beta [+ residual])."""
    hi_c, u_c, a_c, b_c = affine(norm, c0, c1, computed(x))
    if by_planes(grid, streamed) or not all_one(u_c):
        by_rows.apply(x, residual, grid, norm, floor, streamed, c0, c1, k, y)
        return
    hi, a, b = by_columns(hi_c, grid), by_columns(a_c, grid), by_columns(b_c, grid)
    fold = grid[4]
    low = hi.dtype.type(floor)
    begin, end = rows(grid, k)
    for r in range(begin, end):
        size = width(grid, r, c0, c1)
        x_, residual_ = piece(x, r * fold, c0, 0, size), piece(residual, r * fold, c0, 0, size)
        args, outs = (x_, residual_, hi, None, a, b, low), (piece(y, r * fold, c0, 0, size),)
        each_to(size, element.normalise, args, outs, streamed)
    fence(streamed)


@shared
def reduce(dy, x, y, grid, norm, c0, c1, k, partial):
    """partial[:, k, c] = sum dy, sum dy (x u - hi) scale of chunk k, dy masked by y > 0.

    The mask is recomputed where norm holds beta, read where y is given.
    """
    _, _, S, _, fold, _ = grid
    hi_c, u_c, a_c, b_c = affine(norm, c0, c1, computed(x))
    scale_c = scales(norm, c0, c1, u_c)
    hi, a, b = by_columns(hi_c, grid), by_columns(a_c, grid), by_columns(b_c, grid)
    scale = by_columns(scale_c, grid)
    s, t = zeros(2, hi.size, hi.dtype)
    s64, t64 = zeros(2, hi.size, np.float64)
    zero = hi.dtype.type(0)
    r0, r1 = rows(grid, k)
    for begin in range(r0, r1, RUN_ROWS):
        end = min(begin + RUN_ROWS, r1)
        whole = whole_fours(grid, begin, end)
        for r in range(begin, whole, 4):
            n = r * fold
            dy_, x_ = four(dy, n, fold, c0, 0, hi.size), four(x, n, fold, c0, 0, hi.size)
            args = dy_, x_, four(y, n, fold, c0, 0, hi.size), hi, None, a, b, scale, zero, s, t
            each(hi.size, element.add_gradient_rows, args)
        for r in range(whole, end):
            n = r * fold
            size = width(grid, r, c0, c1)
            dy_, x_ = piece(dy, n, c0, 0, size), piece(x, n, c0, 0, size)
            args = dy_, x_, piece(y, n, c0, 0, size), hi, None, a, b, scale, zero, s, t
            each(size, element.add_gradient_row, args)
        each(hi.size, element.drain, (s, s64))
        each(hi.size, element.drain, (t, t64))
    gather(s64, S, of_chunk(partial, 0, k, c0, c1))
    gather(t64, S, of_chunk(partial, 1, k, c0, c1))
    for c in range(c0, c1):
        i = c - c0
        if u_c[i] != 1 or by_rows.overflowed(partial, k, c):
            partial[0, k, c], partial[1, k, c] = by_rows.sums_again(
                dy, x, y, grid, k, c,
                hi_c[i], u_c[i], a_c[i], element.at(b_c, i), scale_c[i], zero,
            )  # fmt: skip


@none_without("hpq")
def by_columns_each(hpq, grid):
    """h, p, q of every column; None for None."""
    h, p, q = hpq
    return by_columns(h, grid), by_columns(p, grid), by_columns(q, grid)


@shared
def differentiate(dy, x, y, grid, norm, sums, count, streamed, c0, c1, k, dx, dresidual):
    """Write dx and dresidual, each where given; sums=None where statistics are frozen."""
    hi_c, u_c, a_c, b_c = affine(norm, c0, c1, computed(x))
    v_c, _ = factors(norm, sums, count, c0, c1, u_c)
    if by_planes(grid, streamed) or not (all_one(u_c) and all_one(v_c)):
        by_rows.differentiate(dy, x, y, grid, norm, sums, count, streamed, c0, c1, k, dx, dresidual)
        return
    hi, a, b = by_columns(hi_c, grid), by_columns(a_c, grid), by_columns(b_c, grid)
    hpq = by_columns_each(coefficients(norm, sums, count, c0, c1, u_c, v_c), grid)
    zero = hi.dtype.type(0)
    fold = grid[4]
    begin, end = rows(grid, k)
    for r in range(begin, end):
        n = r * fold
        size = width(grid, r, c0, c1)
        dy_, x_, y_ = piece(dy, n, c0, 0, size), piece(x, n, c0, 0, size), piece(y, n, c0, 0, size)
        outs = piece(dx, n, c0, 0, size), piece(dresidual, n, c0, 0, size)
        args = dy_, x_, y_, hi, None, a, b, hpq, None, a, zero
        each_to(size, element.differentiate, args, outs, streamed)
    fence(streamed)
