"""Traversal of values with weights by columns; see weights.py and weighted_rows.py."""

import numpy as np

from nbnorm.cpu import element, weighted_rows
from nbnorm.cpu.channel import (
    FIRST,
    affine,
    all_one,
    bound,
    coefficients,
    factors,
    gate,
    merge,
    scales,
    with_tile,
)
from nbnorm.cpu.columns import (
    RUN_ROWS,
    TILE_ROWS,
    before_line,
    by_columns,
    by_columns_each,
    columns_ahead,
    expand,
    first_line,
    gather,
    mean_so_far,
    moments64,
    row_size,
    rows,
)
from nbnorm.cpu.intrinsics import (
    clear,
    each,
    each_to,
    fence,
    new,
    news,
    of_chunk,
    part,
    piece,
    prefetch,
    zeros,
)
from nbnorm.cpu.jit import by_types, noinline, ordered
from nbnorm.cpu.rows import clear_chunk, gradient_sums64, overflowed
from nbnorm.cpu.storage import computed, load
from nbnorm.cpu.weights import (
    alike,
    beside,
    counts,
    filled,
    masks_samples,
    own,
    sample_weight,
    weights_of,
)


@ordered
def in_quarters(i, r0, r1):
    """The i-th row of r0 <= r < r1 to read, one of each quarter in turn; see `whole_share`."""
    quarter = (r1 - r0) // 4
    return r0 + i // 4 + i % 4 * quarter if i < 4 * quarter else r0 + i


@ordered
def samples(x, n, c, size):
    """The rows x[n[i], c : c + size] of four samples."""
    return (
        piece(x, n[0], c, 0, size), piece(x, n[1], c, 0, size),
        piece(x, n[2], c, 0, size), piece(x, n[3], c, 0, size),
    )  # fmt: skip


@noinline
def first_that_counts(x, w, n0, n1, c, S):
    """The first value of x[n0:n1, c] that counts, or 0. Only weights are read before it."""
    for n in range(n0, n1):
        weights = weights_of(w, n, c, 0, S)
        for i in range(S):
            if element.at(weights, i) != 0:
                return np.float64(load(piece(x, n, c, 0, S), i))
    return 0.0


@by_types
def add_first(x, w, n, c, size, found, K, s, m):
    """Add row x[n, c : c + size] to s; `found` rows precede it. m counts the values of each column.

    K receives the first row, or the first value of each column that counts.
    """

    def own(x, w, n, c, size, found, K, s, m):
        args = piece(x, n, c, 0, size), weights_of(w, n, c, 0, size), K, s, m
        each(size, element.add_first_row, args)

    def shared(x, w, n, c, size, found, K, s, m):
        x_ = piece(x, n, c, 0, size)
        if found == 0:
            each(size, element.copy, (x_, K))
        each(size, element.add_moment_row, (x_, K, s, None))
        each(size, element.fill, (K.dtype.type(found + 1), m))

    return shared if len(w.types) == 2 else own


@noinline
def first_shifts(x, w, grid, c0, c1, begin, end, shift):
    """shift = mean of the first values of weight above 0 of each channel, 0 where there are none.

    It is exact if these values are all equal. They are those of the first FIRST rows that count, or
    the first one that counts if a channel has none there. With a single value, as in a chunk that
    begins in padding, the sums are often `lost`: statistics of 64 x 400 x 512 with lengths took
    four times as long. If values have weights of their own, every row counts as one of the FIRST:
    a channel's sums must not depend on which rows count in other channels of its block.
    """
    N, _, S, _, fold, _ = grid
    channels, dtype = c1 - c0, computed((x, w, 0.0)).dtype
    K, s, m = zeros(3, fold * channels * S, dtype)
    found = 0
    for r in range(begin, end):
        if counts(w, r * fold):
            add_first(x, w, r * fold, c0, row_size(grid, r, c0, c1), found, K, s, m)
            found += 1
        if found == FIRST:
            break
    for c in range(channels):
        count, first, rest = 0.0, 0.0, 0.0
        for j0 in range(c * S, K.size, channels * S):
            for j in range(j0, j0 + S):
                if m[j] > 0:
                    first = np.float64(K[j]) if count == 0 else first
                    rest += (K[j] - first) * m[j] + s[j]
                    count += m[j]
        if count == 0:
            first = first_that_counts(x, w, begin * fold, min(end * fold, N), c0 + c, S)
        mean = first + rest / max(count, 1.0)
        shift[c] = mean if abs(mean) < np.inf else first


@by_types
def add_row(x, w, n, c, size, K, s, q, m):
    """Add the row x[n, c : c + size], which counts, to the sums."""

    def weighted(x, w, n, c, size, K, s, q, m):
        args = piece(x, n, c, 0, size), weights_of(w, n, c, 0, size), K, s, q, m
        each(size, element.add_weighted_row, args)

    def masked(x, w, n, c, size, K, s, q, m):
        each(size, element.add_moment_row, (piece(x, n, c, 0, size), K, s, q))

    return masked if masks_samples(w) else weighted


@by_types
def add_four(x, w, n, c, size, K, s, q, m):
    """Add the rows x[n[i], c : c + size] of four samples, which count, to the sums."""

    def weighted(x, w, n, c, size, K, s, q, m):
        w_ = (
            weights_of(w, n[0], c, 0, size), weights_of(w, n[1], c, 0, size),
            weights_of(w, n[2], c, 0, size), weights_of(w, n[3], c, 0, size),
        )  # fmt: skip
        each(size, element.add_weighted_rows, (samples(x, n, c, size), w_, K, s, q, m))

    def masked(x, w, n, c, size, K, s, q, m):
        each(size, element.add_moment_rows, (samples(x, n, c, size), K, s, q))

    return masked if masks_samples(w) else weighted


@noinline
def columns_sums(x, w, grid, r0, r1, c0, c1, K, sums, sums64):
    """sums64 = sum w d, sum w d^2 and sum w down each column of rows r0 <= r < r1, d = x - K.

    `sums` are scratch in the compute dtype: 0 on entry and on return.
    """
    fold, size = grid[4], K.size
    s, q, m = sums[0], sums[1], own(w, sums[2])
    shared = 0.0
    waiting = new(4, np.int64)  # rows that count, to be added four at a time
    for j in range(3):
        clear(sums64[j])
    for begin in range(0, r1 - r0, RUN_ROWS):
        found = 0
        for i in range(begin, min(begin + RUN_ROWS, r1 - r0)):
            r = in_quarters(i, r0, r1)
            n, short = r * fold, row_size(grid, r, c0, c1)
            if beside(w, n, r0, r1):
                prefetch(piece(x, n, c0, 0, short))
            if not counts(w, n):
                continue
            shared += sample_weight(w, n)
            if short < size:
                add_row(x, w, n, c0, short, K, s, q, m)
                continue
            waiting[found] = n
            found += 1
            if found == 4:
                add_four(x, w, waiting, c0, size, K, s, q, m)
                found = 0
        for i in range(found):
            add_row(x, w, waiting[i], c0, size, K, s, q, m)
        each(size, element.drain, (s, sums64[0]))
        each(size, element.drain, (q, sums64[1]))
        if m is not None:
            each(size, element.drain, (sums[2], sums64[2]))
    if m is None:
        each(size, element.fill, (shared, sums64[2]))


@ordered
def merge_weighted_tile(c, count, shift, delta, m2, m, center, d, q, new_delta, new_m2, gone):
    """`with_tile` of channel c, which has a count and an m of its own.

    Reading both kinds by `element.at` kept the loop of `columns.merge_tile` from being vectorised:
    plain statistics of 64 x 400 x 512 took 1.6 ms instead of 1.3.
    """
    new_delta[c], new_m2[c], gone[c] = with_tile(
        count[c], shift[c], delta[c], m2[c], m[c], center[c], d[c], q[c], center
    )


@noinline
def stats(x, grid, c0, c1, k, partial):
    """partial[:, k, c] = weight, shift, delta, M2 of chunk k, for channels c0 <= c < c1."""
    values, w, _ = x
    N, _, S, _, fold, _ = grid
    channels, dtype = c1 - c0, computed(x).dtype
    center = new(channels, dtype)
    sums = zeros(3, fold * channels * S, dtype)
    K = new(fold * channels * S, dtype)
    sums64 = news(3, K.size, np.float64)
    d, q, m, new_delta, new_m2 = news(5, channels, np.float64)
    gone = new(channels, np.uint8)
    clear_chunk(partial, k, c0, c1)
    count, m2 = of_chunk(partial, 0, k, c0, c1), of_chunk(partial, 3, k, c0, c1)
    shift, delta = of_chunk(partial, 1, k, c0, c1), of_chunk(partial, 2, k, c0, c1)
    begin, end = rows(grid, k)
    first_shifts(values, w, grid, c0, c1, begin, end, shift)
    for r in range(begin, end, TILE_ROWS):
        stop = min(r + TILE_ROWS, end)
        each(channels, mean_so_far, (shift, delta, center))
        expand(center, S, K)
        columns_sums(values, w, grid, r, stop, c0, c1, K, sums, sums64)
        gather(sums64[0], S, d)
        gather(sums64[1], S, q)
        gather(sums64[2], S, m)
        before, after = (count, shift, delta, m2), (new_delta, new_m2, gone)
        each(channels, merge_weighted_tile, (*before, m, center, d, q, *after))
        for c in range(channels):
            if gone[c]:
                near, rest, m2_tile = moments64(
                    values, w, r * fold, min(stop * fold, N), c0 + c, 0, S, m[c],
                    np.float64(center[c]),
                )  # fmt: skip
                if count[c] == 0:  # a shift that far off would cost delta digits
                    shift[c] = near
                _, new_delta[c], new_m2[c] = merge(
                    count[c], delta[c], m2[c], m[c], (near - shift[c]) + rest, m2_tile
                )
        each(channels, element.add_value, (count, m))
        each(channels, element.copy, (new_delta, delta))
        each(channels, element.copy, (new_m2, m2))


@ordered
def whole_lines(w, grid, r, begin, end, first, ahead, c0, c1):
    """First sample of row r, and where in the row to begin and how many values to write.

    See `before_line`. A row takes over values of the next one only if both have the same weight.
    """
    fold = grid[4]
    n, last, next_ = r * fold, max(r - 1, begin) * fold, min(r + 1, end - 1) * fold
    # No branch may use w: Numba would count a reference to it there, an atomic operation that waits
    # for streaming stores (see `each_to`).
    j = before_line(grid, r, begin, end, first, ahead * alike(w, last, n))
    after = before_line(grid, r + 1, begin, end, first, ahead * alike(w, n, next_))
    return n, j, row_size(grid, r, c0, c1) + after - j


@noinline
def apply(x, residual, grid, norm, floor, streamed, c0, c1, k, y):
    """`weighted_rows.apply` by columns."""
    values, w, fill = x
    hi_c, u_c, a_c, b_c = affine(norm, c0, c1, computed(x))
    if not all_one(u_c):
        weighted_rows.apply(x, residual, grid, norm, floor, streamed, c0, c1, k, y)
        return
    ahead = columns_ahead(y, (values, residual, y), grid, streamed, c0, c1)
    hi, a, b = by_columns_each((hi_c, a_c, b_c), grid, ahead)
    low, other = bound(floor, hi), filled(fill, hi)
    begin, end = rows(grid, k)
    first = first_line(y, grid, begin, ahead)
    for r in range(begin, end):
        n, j, size = whole_lines(w, grid, r, begin, end, first, ahead, c0, c1)
        hi_, a_, b_ = part((hi, a, b), j, j + size)
        if beside(w, n, begin, end):
            prefetch(piece(values, n, c0, j, size))
            prefetch(piece(residual, n, c0, j, size))
        args = (
            piece(values, n, c0, j, size), weights_of(w, n, c0, j, size), other,
            piece(residual, n, c0, j, size), hi_, None, a_, b_, low,
        )  # fmt: skip
        each_to(size, element.apply_weighted, args, (piece(y, n, c0, j, size),), streamed)
    fence(streamed)


@noinline
def backward_reduce(dy, x, y, grid, norm, c0, c1, k, partial, kept):
    """`weighted_rows.backward_reduce` by columns."""
    values, w, _ = x
    _, _, S, _, fold, _ = grid
    hi_c, u_c, a_c, b_c = affine(norm, c0, c1, computed(x))
    scale_c = scales(norm, c0, c1, u_c)
    hi, a, b = by_columns_each((hi_c, a_c, b_c), grid, 0)
    scale = by_columns(scale_c, grid, 0)
    s, t = zeros(2, hi.size, hi.dtype)
    s64, t64 = zeros(2, hi.size, np.float64)
    act = gate(norm, hi)
    r0, r1 = rows(grid, k)
    for begin in range(0, r1 - r0, RUN_ROWS):
        for i in range(begin, min(begin + RUN_ROWS, r1 - r0)):
            r = in_quarters(i, r0, r1)
            n, short = r * fold, row_size(grid, r, c0, c1)
            dy_, x_ = piece(dy, n, c0, 0, short), piece(values, n, c0, 0, short)
            w_, y_ = weights_of(w, n, c0, 0, short), piece(y, n, c0, 0, short)
            if beside(w, n, r0, r1):
                prefetch(dy_)
                prefetch(x_)
                prefetch(y_)
            if not counts(w, n):
                continue
            args = dy_, x_, w_, y_, hi, None, a, b, scale, act, s, t
            each(short, element.add_weighted_gradient_row, args)
        each(hi.size, element.drain, (s, s64))
        each(hi.size, element.drain, (t, t64))
    gather(s64, S, of_chunk(partial, 0, k, c0, c1))
    gather(t64, S, of_chunk(partial, 1, k, c0, c1))
    for c in range(c0, c1):
        i = c - c0
        if u_c[i] != 1 or overflowed(partial, k, c):
            partial[0, k, c], partial[1, k, c] = gradient_sums64(
                dy, values, w, y, grid, k, c,
                hi_c[i], u_c[i], a_c[i], element.at(b_c, i), scale_c[i], act,
            )  # fmt: skip


@noinline
def backward_apply(dy, x, y, grid, norm, sums, count, streamed, c0, c1, k, dx, dresidual):
    """`weighted_rows.backward_apply` by columns."""
    values, w, _ = x
    hi_c, u_c, a_c, b_c = affine(norm, c0, c1, computed(x))
    v_c, _ = factors(norm, sums, count, c0, c1, u_c)
    if not (all_one(u_c) and all_one(v_c)):
        weighted_rows.backward_apply(
            dy, x, y, grid, norm, sums, count, streamed, c0, c1, k, dx, dresidual
        )
        return
    out = element.either(dx, dresidual)
    ahead = columns_ahead(out, (dy, values, y, dx, dresidual), grid, streamed, c0, c1)
    hi, a, b = by_columns_each((hi_c, a_c, b_c), grid, ahead)
    hpq = by_columns_each(coefficients(norm, sums, count, c0, c1, u_c, v_c), grid, ahead)
    act, like = gate(norm, hi), computed(x)
    begin, end = rows(grid, k)
    first = first_line(out, grid, begin, ahead)
    for r in range(begin, end):
        n, j, size = whole_lines(w, grid, r, begin, end, first, ahead, c0, c1)
        dy_, x_ = piece(dy, n, c0, j, size), piece(values, n, c0, j, size)
        w_, y_ = weights_of(w, n, c0, j, size), piece(y, n, c0, j, size)
        outs = piece(dx, n, c0, j, size), piece(dresidual, n, c0, j, size)
        if beside(w, n, begin, end):
            prefetch(dy_)
            prefetch(x_)
            prefetch(y_)
        hi_, a_, b_, hpq_ = part((hi, a, b, hpq), j, j + size)
        args = dy_, x_, w_, y_, hi_, None, a_, b_, hpq_, None, a_, act, like
        each_to(size, element.backward_apply_weighted, args, outs, streamed)
    fence(streamed)
