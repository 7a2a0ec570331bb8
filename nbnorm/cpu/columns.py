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
    LINE,
    clear,
    each,
    each_to,
    fence,
    four,
    in_sequence,
    line_after,
    new,
    news,
    of_chunk,
    part,
    piece,
    sum_of,
    two,
    zeros,
)
from nbnorm.cpu.jit import none_without, ordered, shared
from nbnorm.cpu.plan import planes_alone
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
def by_columns(values, grid, ahead):
    """Numbers for every column, of those for every channel, and for `ahead` more of the next row.

    No copy where the two are the same.
    """
    _, _, S, _, fold, _ = grid
    if S * fold == 1 and ahead == 0:
        return values
    size = fold * values.size * S
    out = new(size + ahead, values.dtype)
    expand(values, S, part(out, 0, size))
    for j in range(ahead):
        out[size + j] = out[j]
    return out


@none_without("values")
def by_columns_each(values, grid, ahead):
    """`by_columns` of three arrays, such as hi, a, b; None for None."""
    p, q, r = values
    return by_columns(p, grid, ahead), by_columns(q, grid, ahead), by_columns(r, grid, ahead)


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
def whole_share(grid, r0, r1, parts):
    """How many rows each of equal parts of rows r0 <= r < r1 has, short ones left out.

    One row of each part is taken at a time: sums or coefficients are then loaded once for all of
    them. Of rows next to one another the processor fetches less ahead, as they lie in one page:
    statistics of 32 x 56 x 56 x 256 read 17 GB/s with four neighbours, 28 with a row of each
    quarter.
    """
    N, _, _, _, fold, _ = grid
    return (min(r1, N // fold) - r0) // parts


@shared
def sums(x, grid, r0, r1, c0, c1, K, s, q, s64, q64):
    """Sum d and d^2, d = x - K, of rows r0 <= r < r1 down each column into s64 and q64.

    s and q are 0 before and after.
    """
    fold = grid[4]
    size = K.size
    quarter = whole_share(grid, r0, r1, 4)
    clear(s64)
    clear(q64)
    for begin in range(r0, r0 + quarter, RUN_ROWS // 4):
        for r in range(begin, min(begin + RUN_ROWS // 4, r0 + quarter)):
            each(size, element.add_rows, (four(x, r * fold, quarter * fold, c0, 0, size), K, s, q))
        each(size, element.drain, (s, s64))
        each(size, element.drain, (q, q64))
    if r0 + 4 * quarter < r1:
        for r in range(r0 + 4 * quarter, r1):
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
def first_means(x, grid, c0, c1, begin, end, k, K, s, s64, shift):
    """Means of the chunk's first values, exact where they are all the same; s stays 0."""
    N, _, S, _, fold, _ = grid
    for c in range(c0, c1):
        k[c - c0] = load(piece(x, begin * fold, c, 0, 1), 0)
    expand(k, S, K)
    stop = min(begin + (FIRST + fold * S - 1) // (fold * S), end)
    quarter = whole_share(grid, begin, stop, 4)
    for r in range(begin, begin + quarter):
        rows_ = four(x, r * fold, quarter * fold, c0, 0, K.size)
        each(K.size, element.add_differences, (rows_, K, s))
    for r in range(begin + 4 * quarter, stop):
        short = width(grid, r, c0, c1)
        each(short, element.add_difference, (piece(x, r * fold, c0, 0, short), K, s))
    clear(s64)
    each(K.size, element.drain, (s, s64))
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
    s, q = zeros(2, fold * channels * S, dtype)
    K = new(s.size, dtype)
    s64, q64 = news(2, K.size, np.float64)
    d, d2, new_delta, new_m2 = news(4, channels, np.float64)
    gone = new(channels, np.uint8)
    shift, delta = of_chunk(partial, 1, k, c0, c1), of_chunk(partial, 2, k, c0, c1)
    m2 = of_chunk(partial, 3, k, c0, c1)
    begin, end = rows(grid, k)
    first_means(x, grid, c0, c1, begin, end, center, K, s, s64, shift)
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
def by_planes(x, grid, streamed, c0, c1):
    """Whether a chunk is normalised plane by plane, as rows are."""
    _, _, S, _, fold, _ = grid
    return fold == 1 and planes_alone(S, c1 - c0, x[0].itemsize, streamed)


@ordered
def columns_ahead(out, views, grid, streamed, c0, c1):
    """How many values of the next row a row may take along: a line of `out`, see `before_line`.

    0 where the rows of a view (None has none) do not follow one another without a gap.
    """
    _, C, S, _, _, _ = grid
    follow = streamed and c1 - c0 == C and in_sequence(views, C * S)
    return LINE // out[0].itemsize if follow else 0


@ordered
def first_line(out, grid, begin, ahead):
    """How many values of row `begin` are before the first cache line of `out`."""
    return line_after(piece(out, begin * grid[4], 0, 0, 1)) if ahead else 0


@ordered
def before_line(grid, r, begin, end, first, ahead):
    """How many values of row r are written with the row before: up to the first cache line.

    Rows begin <= r < end then fill whole lines but for the first and the last, and nothing that is
    streamed is read first. With rows as they are, inference of 32 x 56 x 56 x 100 took 1.6 times as
    long, where y begins 16 bytes after a line, as NumPy's arrays do.
    """
    if ahead == 0 or r in (begin, end):
        return 0
    _, C, S, _, fold, _ = grid
    return min((first - (r - begin) * fold * C * S) % ahead, width(grid, r, 0, C))


@shared
def apply(x, residual, grid, norm, floor, streamed, c0, c1, k, y):
    """y = act(gamma (x - mean) rstd + beta [+ residual])."""
    hi_c, u_c, a_c, b_c = affine(norm, c0, c1, computed(x))
    if by_planes(x, grid, streamed, c0, c1) or not all_one(u_c):
        by_rows.apply(x, residual, grid, norm, floor, streamed, c0, c1, k, y)
        return
    ahead = columns_ahead(y, (x, residual, y), grid, streamed, c0, c1)
    hi, a, b = by_columns_each((hi_c, a_c, b_c), grid, ahead)
    fold = grid[4]
    low = hi.dtype.type(floor)
    begin, end = rows(grid, k)
    first = first_line(y, grid, begin, ahead)
    half = 0 if streamed else whole_share(grid, begin, end, 2)
    for r in range(begin, begin + half):
        n, step, size = r * fold, half * fold, width(grid, r, c0, c1)
        x_, residual_ = two(x, n, step, c0, 0, size), two(residual, n, step, c0, 0, size)
        pairs = x_, residual_, hi, None, a, b, low, two(y, n, step, c0, 0, size)
        each(size, element.normalise_rows, pairs)
    for r in range(begin + 2 * half, end):
        n = r * fold
        j = before_line(grid, r, begin, end, first, ahead)
        size = width(grid, r, c0, c1) + before_line(grid, r + 1, begin, end, first, ahead) - j
        hi_, a_, b_ = part((hi, a, b), j, j + size)
        args = piece(x, n, c0, j, size), piece(residual, n, c0, j, size), hi_, None, a_, b_, low
        each_to(size, element.normalise, args, (piece(y, n, c0, j, size),), streamed)
    fence(streamed)


@shared
def reduce(dy, x, y, grid, norm, c0, c1, k, partial):
    """partial[:, k, c] = sum dy, sum dy (x u - hi) scale of chunk k, dy masked by y > 0.

    The mask is recomputed where norm holds beta, read where y is given.
    """
    _, _, S, _, fold, _ = grid
    hi_c, u_c, a_c, b_c = affine(norm, c0, c1, computed(x))
    scale_c = scales(norm, c0, c1, u_c)
    hi, a, b = by_columns_each((hi_c, a_c, b_c), grid, 0)
    scale = by_columns(scale_c, grid, 0)
    s, t = zeros(2, hi.size, hi.dtype)
    s64, t64 = zeros(2, hi.size, np.float64)
    zero = hi.dtype.type(0)
    r0, r1 = rows(grid, k)
    size = hi.size
    quarter = whole_share(grid, r0, r1, 4)
    step = quarter * fold
    for begin in range(r0, r0 + quarter, RUN_ROWS // 4):
        for r in range(begin, min(begin + RUN_ROWS // 4, r0 + quarter)):
            n = r * fold
            dy_, x_ = four(dy, n, step, c0, 0, size), four(x, n, step, c0, 0, size)
            args = dy_, x_, four(y, n, step, c0, 0, size), hi, None, a, b, scale, zero, s, t
            each(size, element.add_gradient_rows, args)
        each(size, element.drain, (s, s64))
        each(size, element.drain, (t, t64))
    if r0 + 4 * quarter < r1:
        for r in range(r0 + 4 * quarter, r1):
            n, short = r * fold, width(grid, r, c0, c1)
            dy_, x_ = piece(dy, n, c0, 0, short), piece(x, n, c0, 0, short)
            args = dy_, x_, piece(y, n, c0, 0, short), hi, None, a, b, scale, zero, s, t
            each(short, element.add_gradient_row, args)
        each(size, element.drain, (s, s64))
        each(size, element.drain, (t, t64))
    gather(s64, S, of_chunk(partial, 0, k, c0, c1))
    gather(t64, S, of_chunk(partial, 1, k, c0, c1))
    for c in range(c0, c1):
        i = c - c0
        if u_c[i] != 1 or by_rows.overflowed(partial, k, c):
            partial[0, k, c], partial[1, k, c] = by_rows.sums_again(
                dy, x, y, grid, k, c,
                hi_c[i], u_c[i], a_c[i], element.at(b_c, i), scale_c[i], zero,
            )  # fmt: skip


@shared
def differentiate(dy, x, y, grid, norm, sums, count, streamed, c0, c1, k, dx, dresidual):
    """Write dx and dresidual, each where given; sums=None where statistics are frozen."""
    hi_c, u_c, a_c, b_c = affine(norm, c0, c1, computed(x))
    v_c, _ = factors(norm, sums, count, c0, c1, u_c)
    if by_planes(x, grid, streamed, c0, c1) or not (all_one(u_c) and all_one(v_c)):
        by_rows.differentiate(dy, x, y, grid, norm, sums, count, streamed, c0, c1, k, dx, dresidual)
        return
    out = element.either(dx, dresidual)
    ahead = columns_ahead(out, (dy, x, y, dx, dresidual), grid, streamed, c0, c1)
    hi, a, b = by_columns_each((hi_c, a_c, b_c), grid, ahead)
    hpq = by_columns_each(coefficients(norm, sums, count, c0, c1, u_c, v_c), grid, ahead)
    zero = hi.dtype.type(0)
    fold = grid[4]
    begin, end = rows(grid, k)
    first = first_line(out, grid, begin, ahead)
    half = 0 if streamed else whole_share(grid, begin, end, 2)
    for r in range(begin, begin + half):
        n, step, size = r * fold, half * fold, width(grid, r, c0, c1)
        dy_, x_ = two(dy, n, step, c0, 0, size), two(x, n, step, c0, 0, size)
        y_, dx_ = two(y, n, step, c0, 0, size), two(dx, n, step, c0, 0, size)
        pairs = dy_, x_, y_, hi, None, a, b, hpq, None, a, zero, dx_
        each(size, element.differentiate_rows, (*pairs, two(dresidual, n, step, c0, 0, size)))
    for r in range(begin + 2 * half, end):
        n = r * fold
        j = before_line(grid, r, begin, end, first, ahead)
        size = width(grid, r, c0, c1) + before_line(grid, r + 1, begin, end, first, ahead) - j
        dy_, x_, y_ = piece(dy, n, c0, j, size), piece(x, n, c0, j, size), piece(y, n, c0, j, size)
        outs = piece(dx, n, c0, j, size), piece(dresidual, n, c0, j, size)
        hi_, a_, b_, hpq_ = part((hi, a, b, hpq), j, j + size)
        args = dy_, x_, y_, hi_, None, a_, b_, hpq_, None, a_, zero
        each_to(size, element.differentiate, args, outs, streamed)
    fence(streamed)
