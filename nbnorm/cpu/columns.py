"""Column traversal, for small S: a tile is a few rows x[n, c0:c1, :], summed down the rows.

`fold` consecutive samples form one row, so that a row fills vector registers even if C S is 3.
Column j of a row belongs to channel c0 + (j // S) % (c1 - c0). A chunk is `per` consecutive rows.
`stats`, `apply`, `backward_reduce` and `backward_apply` process chunk k of the channels
c0 <= c < c1 (of all channels if fold > 1); x[n, c0:c1, :] is contiguous. Arrays are views as in
rows.py.

Each column keeps its own sum, so no sum depends on where a block of channels begins. The loop over
rows and the loop over columns are in the same function: a call costs two atomic operations for each
array, which take as long as the arithmetic on a short row.
"""

import numpy as np

from nbnorm.cpu import element
from nbnorm.cpu import rows as by_rows
from nbnorm.cpu.channel import (
    FIRST,
    affine,
    after,
    all_one,
    bound,
    coefficients,
    factors,
    gate,
    given,
    merge,
    pairwise_sum,
    scales,
    with_tile,
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
from nbnorm.cpu.jit import noinline, none_without, ordered
from nbnorm.cpu.plan import planes_alone
from nbnorm.cpu.storage import computed, load
from nbnorm.cpu.weights import weights_of

# Rows in a tile. With fewer, merging takes longer than summing.
TILE_ROWS = 256
# Rows summed in the compute dtype, then in float64. With 128, an outlier left rstd wrong by 3e-7.
RUN_ROWS = 32


@ordered
def rows(grid, k):
    """First row of chunk k, and the row after its last."""
    N, _, _, _, fold, per = grid
    return k * per, min((k + 1) * per, (N + fold - 1) // fold)


@ordered
def row_size(grid, r, c0, c1):
    """Number of columns of row r; the last row may hold fewer than `fold` samples."""
    N, _, S, _, fold, _ = grid
    return min(fold, N - r * fold) * (c1 - c0) * S


@none_without("values")
def by_columns(values, grid, ahead):
    """Expand one value per channel to one per column, followed by `ahead` values of the next row.

    Returns `values` itself if nothing changes.
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
    """`by_columns` of three arrays, such as hi, a and b; None for None."""
    p, q, r = values
    return by_columns(p, grid, ahead), by_columns(q, grid, ahead), by_columns(r, grid, ahead)


@noinline
def expand(values, S, out):
    """Set every column of `out` to the value of its channel."""
    whole = (out, 0, 0)
    for begin in range(0, out.size, values.size * S):
        if S == 1:
            each(values.size, element.copy, (values, piece(whole, 0, 0, begin, values.size)))
            continue
        for c in range(values.size):
            each(S, element.fill, (values[c], piece(whole, 0, 0, begin + c * S, S)))


@noinline
def gather(sums, S, out):
    """out[c] = sum of channel c's columns, in all samples of a row; overwrites `sums`."""
    pairwise_sum(sums, out.size * S)
    if S == 1:
        each(out.size, element.copy, (sums, out))
        return
    for c in range(out.size):
        out[c] = sum_of(piece((sums, 0, S), 0, c, 0, S))


@ordered
def whole_share(grid, r0, r1, parts):
    """Number of rows in each of `parts` equal shares of r0 <= r < r1, without a short last row.

    Loops take one row of each share at a time and load sums or coefficients once for all of them.
    Neighbouring rows would lie in one page, where the processor prefetches less: statistics of
    32 x 56 x 56 x 256 read 17 GB/s with four neighbours, 28 with one row of each quarter.
    """
    N, _, _, _, fold, _ = grid
    return (min(r1, N // fold) - r0) // parts


@noinline
def moment_sums(x, grid, r0, r1, c0, c1, K, s, q, s64, q64):
    """s64 = sum d and q64 = sum d^2 down each column of rows r0 <= r < r1, where d = x - K.

    s and q are scratch in the compute dtype: 0 on entry and on return.
    """
    fold = grid[4]
    size = K.size
    quarter = whole_share(grid, r0, r1, 4)
    clear(s64)
    clear(q64)
    for begin in range(r0, r0 + quarter, RUN_ROWS // 4):
        for r in range(begin, min(begin + RUN_ROWS // 4, r0 + quarter)):
            each(
                size,
                element.add_moment_rows,
                (four(x, r * fold, quarter * fold, c0, 0, size), K, s, q),
            )
        each(size, element.drain, (s, s64))
        each(size, element.drain, (q, q64))
    if r0 + 4 * quarter < r1:
        for r in range(r0 + 4 * quarter, r1):
            short = row_size(grid, r, c0, c1)
            each(short, element.add_moment_row, (piece(x, r * fold, c0, 0, short), K, s, q))
        each(size, element.drain, (s, s64))
        each(size, element.drain, (q, q64))


@noinline
def moment_sums64(x, w, n0, n1, c, s, size, K):
    """sum w d and sum w d^2 of x[n0:n1, c, s : s + size] in float64, and whether each d is 0.

    d = x - K; values of weight 0 do not count, all weights are 1 if w is None. Values are added one
    after another, hence with compensation (Kahan 1965).
    """
    s_sum, q_sum, s_rest, q_rest, others = 0.0, 0.0, 0.0, 0.0, 0
    for n in range(n0, n1):
        values, weights = piece(x, n, c, s, size), weights_of(w, n, c, s, size)
        for i in range(size):
            weight = element.weight64(weights, i)
            if weight != 0:
                d = np.float64(load(values, i)) - K
                s_sum, s_rest = add_compensated(s_sum, weight * d - s_rest)
                q_sum, q_rest = add_compensated(q_sum, weight * d * d - q_rest)
                others += d != 0
    return s_sum, q_sum, others == 0


@ordered
def add_compensated(so_far, value):
    """so_far + value, and its rounding error, to subtract from the next value."""
    grown = so_far + value
    return grown, (grown - so_far) - value


@noinline
def moments64(x, w, n0, n1, c, s, size, m, K):
    """Two-pass moments in float64 of x[n0:n1, c, s : s + size], whose weights add up to m.

    Returns a value near the mean, the mean minus that value, and M2. Used if the sums in the
    compute dtype are `lost`.
    """
    d, _, same = moment_sums64(x, w, n0, n1, c, s, size, K)
    if same:
        return K, 0.0, 0.0
    center = K + d / m
    d, q, _ = moment_sums64(x, w, n0, n1, c, s, size, center)
    return center, d / m, q - d * d / m


@noinline
def first_means(x, grid, c0, c1, begin, end, center, K, s, s64, shift):
    """shift = mean of the chunk's first values of each channel, exact if they are all equal.

    center receives each channel's first value and K its expansion to columns. s is scratch: 0 on
    entry and on return.
    """
    N, _, S, _, fold, _ = grid
    for c in range(c0, c1):
        center[c - c0] = load(piece(x, begin * fold, c, 0, 1), 0)
    expand(center, S, K)
    stop = min(begin + (FIRST + fold * S - 1) // (fold * S), end)
    quarter = whole_share(grid, begin, stop, 4)
    for r in range(begin, begin + quarter):
        rows_ = four(x, r * fold, quarter * fold, c0, 0, K.size)
        each(K.size, element.add_moment_rows, (rows_, K, s, None))
    for r in range(begin + 4 * quarter, stop):
        short = row_size(grid, r, c0, c1)
        each(short, element.add_moment_row, (piece(x, r * fold, c0, 0, short), K, s, None))
    clear(s64)
    each(K.size, element.drain, (s, s64))
    gather(s64, S, shift)
    n0, n1 = begin * fold, min(stop * fold, N)
    for c in range(shift.size):
        if not abs(shift[c]) < np.inf:
            K64 = np.float64(center[c])
            shift[c], _, _ = moment_sums64(x, None, n0, n1, c0 + c, 0, S, K64)
        shift[c] = center[c] + shift[c] / ((n1 - n0) * S)


@ordered
def mean_so_far(c, shift, delta, center):
    """center = shift + delta, the mean so far in the compute dtype."""
    center[c] = shift[c] + delta[c]


@ordered
def merge_tile(c, count, shift, delta, m2, m, center, d, q, new_delta, new_m2, gone):
    """`with_tile` of channel c; all channels have the same count and m."""
    new_delta[c], new_m2[c], gone[c] = with_tile(
        count, shift[c], delta[c], m2[c], m, center[c], d[c], q[c], center
    )


@noinline
def stats(x, grid, c0, c1, k, partial):
    """partial[:, k, c] = count, shift, delta, M2 of chunk k, for channels c0 <= c < c1."""
    N, _, S, _, fold, _ = grid
    channels, dtype = c1 - c0, computed(x).dtype
    # One allocation for all arrays of a kind: allocations are half the time of a small call.
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
        moment_sums(x, grid, r, stop, c0, c1, K, s, q, s64, q64)
        gather(s64, S, d)
        gather(q64, S, d2)
        before, after = (count, shift, delta, m2), (new_delta, new_m2, gone)
        each(channels, merge_tile, (*before, m, center, d, d2, *after))
        for c in range(channels):
            if gone[c]:
                K64 = np.float64(center[c])
                near, rest, m2_tile = moments64(x, None, n0, n1, c0 + c, 0, S, m, K64)
                if count == 0:  # a shift that far off would cost delta digits
                    shift[c] = near
                _, new_delta[c], new_m2[c] = merge(
                    count, delta[c], m2[c], m, (near - shift[c]) + rest, m2_tile
                )
        count += m
        # Array assignments would take half a second more to compile, only for an error message.
        each(channels, element.copy, (new_delta, delta))
        each(channels, element.copy, (new_m2, m2))
    each(channels, element.fill, (count, of_chunk(partial, 0, k, c0, c1)))


@ordered
def by_planes(x, grid, streamed, c0, c1):
    """Whether to normalise a chunk plane by plane, as rows.py does."""
    _, _, S, _, fold, _ = grid
    return fold == 1 and planes_alone(S, c1 - c0, x[0].itemsize, streamed)


@ordered
def columns_ahead(out, views, grid, streamed, c0, c1):
    """Values in a cache line of `out`, if rows also write values of the next row; else 0.

    They do (see `before_line`) if results are streamed, the block has all channels, and the rows of
    every view that is not None follow one another without gaps.
    """
    _, C, S, _, _, _ = grid
    follow = streamed and c1 - c0 == C and in_sequence(views, C * S)
    return LINE // out[0].itemsize if follow else 0


@ordered
def first_line(out, grid, begin, ahead):
    """Number of values of row `begin` of `out` before its first cache line; 0 if `ahead` is 0."""
    return line_after(piece(out, begin * grid[4], 0, 0, 1)) if ahead else 0


@ordered
def before_line(grid, r, begin, end, first, ahead):
    """Number of values of row r that are written with row r - 1: those before r's first line.

    All rows begin <= r < end but the first and the last then write whole cache lines, which
    streaming stores need not read. Otherwise inference of 32 x 56 x 56 x 100 took 1.6 times as long
    with y 16 bytes after a line, as NumPy's arrays begin.
    """
    if ahead == 0 or r in (begin, end):
        return 0
    _, C, S, _, fold, _ = grid
    return min((first - (r - begin) * fold * C * S) % ahead, row_size(grid, r, 0, C))


@noinline
def apply(x, residual, grid, norm, floor, streamed, c0, c1, k, y):
    """y = act(gamma (x - mean) rstd + beta [+ residual]) in chunk k, channels c0 <= c < c1."""
    hi_c, u_c, a_c, b_c = affine(norm, c0, c1, computed(y))
    if by_planes(x, grid, streamed, c0, c1) or not all_one(u_c):
        by_rows.apply(x, residual, grid, norm, floor, streamed, c0, c1, k, y)
        return
    ahead = columns_ahead(y, (x, residual, y), grid, streamed, c0, c1)
    hi, a, b = by_columns_each((hi_c, a_c, b_c), grid, ahead)
    fold = grid[4]
    low = bound(floor, hi)
    begin, end = rows(grid, k)
    first = first_line(y, grid, begin, ahead)
    half = 0 if streamed else whole_share(grid, begin, end, 2)
    for r in range(begin, begin + half):
        n, step, size = r * fold, half * fold, row_size(grid, r, c0, c1)
        x_, residual_ = two(x, n, step, c0, 0, size), two(residual, n, step, c0, 0, size)
        pair = x_, residual_, hi, None, a, b, low, two(y, n, step, c0, 0, size)
        each(size, element.apply_rows, pair)
    for r in range(begin + 2 * half, end):
        n = r * fold
        j = before_line(grid, r, begin, end, first, ahead)
        size = row_size(grid, r, c0, c1) + before_line(grid, r + 1, begin, end, first, ahead) - j
        hi_, a_, b_ = part((hi, a, b), j, j + size)
        args = piece(x, n, c0, j, size), piece(residual, n, c0, j, size), hi_, None, a_, b_, low
        each_to(size, element.apply, args, (piece(y, n, c0, j, size),), streamed)
    fence(streamed)


@noinline
def backward_reduce(dy, x, y, grid, norm, c0, c1, k, partial, kept):
    """`rows.backward_reduce` by columns."""
    _, _, S, _, fold, _ = grid
    hi_c, u_c, a_c, b_c = affine(norm, c0, c1, computed(x))
    scale_c = scales(norm, c0, c1, u_c)
    hi, a, b = by_columns_each((hi_c, a_c, b_c), grid, 0)
    scale = by_columns(scale_c, grid, 0)
    u = by_columns(given(kept, u_c), grid, 0)  # for g; sums with u != 1 are recomputed below
    s, t = zeros(2, hi.size, hi.dtype)
    s64, t64 = zeros(2, hi.size, np.float64)
    act = gate(norm, hi)
    r0, r1 = rows(grid, k)
    size = hi.size
    quarter = whole_share(grid, r0, r1, 4)
    step = quarter * fold
    for begin in range(r0, r0 + quarter, RUN_ROWS // 4):
        for r in range(begin, min(begin + RUN_ROWS // 4, r0 + quarter)):
            n = r * fold
            dy_, x_ = four(dy, n, step, c0, 0, size), four(x, n, step, c0, 0, size)
            y_, kept_ = four(y, n, step, c0, 0, size), four(kept, n, step, c0, 0, size)
            args = dy_, x_, y_, hi, u, a, b, scale, act, kept_, s, t
            each(size, element.add_gradient_rows, args)
        each(size, element.drain, (s, s64))
        each(size, element.drain, (t, t64))
    if r0 + 4 * quarter < r1:
        for r in range(r0 + 4 * quarter, r1):
            n, short = r * fold, row_size(grid, r, c0, c1)
            dy_, x_ = piece(dy, n, c0, 0, short), piece(x, n, c0, 0, short)
            y_, kept_ = piece(y, n, c0, 0, short), piece(kept, n, c0, 0, short)
            args = dy_, x_, y_, hi, u, a, b, scale, act, kept_, s, t
            each(short, element.add_gradient_row, args)
        each(size, element.drain, (s, s64))
        each(size, element.drain, (t, t64))
    gather(s64, S, of_chunk(partial, 0, k, c0, c1))
    gather(t64, S, of_chunk(partial, 1, k, c0, c1))
    g, y_, norm_ = after(kept, dy, y, norm)
    b_, act_ = given(norm_[3], b_c), gate(norm_, hi)
    for c in range(c0, c1):
        i = c - c0
        if u_c[i] != 1 or by_rows.overflowed(partial, k, c):
            partial[0, k, c], partial[1, k, c] = by_rows.gradient_sums64(
                g, x, None, y_, grid, k, c,
                hi_c[i], u_c[i], a_c[i], element.at(b_, i), scale_c[i], act_,
            )  # fmt: skip


@noinline
def backward_apply(dy, x, y, grid, norm, sums, count, streamed, c0, c1, k, dx, dresidual):
    """`rows.backward_apply` by columns."""
    hi_c, u_c, a_c, b_c = affine(norm, c0, c1, computed(x))
    v_c, _ = factors(norm, sums, count, c0, c1, u_c)
    if by_planes(x, grid, streamed, c0, c1) or not (all_one(u_c) and all_one(v_c)):
        by_rows.backward_apply(
            dy, x, y, grid, norm, sums, count, streamed, c0, c1, k, dx, dresidual
        )
        return
    out = element.either(dx, dresidual)
    ahead = columns_ahead(out, (dy, x, y, dx, dresidual), grid, streamed, c0, c1)
    hi, a, b = by_columns_each((hi_c, a_c, b_c), grid, ahead)
    hpq = by_columns_each(coefficients(norm, sums, count, c0, c1, u_c, v_c), grid, ahead)
    act = gate(norm, hi)
    fold = grid[4]
    begin, end = rows(grid, k)
    first = first_line(out, grid, begin, ahead)
    half = 0 if streamed else whole_share(grid, begin, end, 2)
    for r in range(begin, begin + half):
        n, step, size = r * fold, half * fold, row_size(grid, r, c0, c1)
        dy_, x_ = two(dy, n, step, c0, 0, size), two(x, n, step, c0, 0, size)
        y_, dx_ = two(y, n, step, c0, 0, size), two(dx, n, step, c0, 0, size)
        pair = dy_, x_, y_, hi, None, a, b, hpq, None, a, act, dx_
        each(size, element.backward_apply_rows, (*pair, two(dresidual, n, step, c0, 0, size)))
    for r in range(begin + 2 * half, end):
        n = r * fold
        j = before_line(grid, r, begin, end, first, ahead)
        size = row_size(grid, r, c0, c1) + before_line(grid, r + 1, begin, end, first, ahead) - j
        dy_, x_, y_ = piece(dy, n, c0, j, size), piece(x, n, c0, j, size), piece(y, n, c0, j, size)
        outs = piece(dx, n, c0, j, size), piece(dresidual, n, c0, j, size)
        hi_, a_, b_, hpq_ = part((hi, a, b, hpq), j, j + size)
        args = dy_, x_, y_, hi_, None, a_, b_, hpq_, None, a_, act
        each_to(size, element.backward_apply, args, outs, streamed)
    fence(streamed)
