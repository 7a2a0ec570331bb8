"""Traversal of values with weights by rows; see weights.py for x.

Values of weight 0 are read, but change no bit: they may be NaN or Inf. partial[0] is the sum of
weights. It can be 0 in a tile, in a chunk, or in all of them.
"""

import numpy as np
from numba import types

from nbnorm.cpu import element
from nbnorm.cpu.channel import (
    FIRST,
    affine,
    bound,
    coefficients,
    coefficients_of,
    factors,
    gate,
    merge,
    scales,
    with_tile,
)
from nbnorm.cpu.columns import moments64
from nbnorm.cpu.intrinsics import each, each_to, fence, four, new, part, piece, zeros
from nbnorm.cpu.jit import by_types, noinline, ordered
from nbnorm.cpu.rows import (
    LANES,
    clear_chunk,
    gradient_sums64,
    line,
    locate,
    overflowed,
    tiles,
    total,
)
from nbnorm.cpu.storage import computed, load
from nbnorm.cpu.weights import filled, own, weights_of


@noinline
def first_weighted(x, w, n0, n1, c, s, size):
    """Number of the first values of weight above 0 in a tile, at most FIRST, and their mean.

    The mean is exact if these values are all equal.
    """
    found, first, rest = 0, 0.0, 0.0
    for n in range(n0, n1):
        values, weights = piece(x, n, c, s, size), weights_of(w, n, c, s, size)
        for i in range(size):
            if element.at(weights, i) != 0:
                value = np.float64(load(values, i))
                first = value if found == 0 else first
                rest += value - first
                found += 1
                if found == FIRST:
                    return found, first + rest / found
    return found, first + rest / max(found, 1)


@by_types
def four_lanes(w, i):
    """LANES values each from i, i + LANES, ... on, as a 4-tuple."""
    if isinstance(w, types.Array):
        return lambda w, i: four(line(w), i, LANES, 0, 0, LANES)
    return lambda w, i: (w, w, w, w)


@ordered
def add_weighted_piece(x, w, K, s, q, m):
    """s += w d, q += w d^2 and, unless m is None, m += w lane by lane, where d = x - K."""
    whole = x.size // (4 * LANES) * (4 * LANES)
    for i in range(0, whole, 4 * LANES):
        x_, w_ = four_lanes(x, i), four_lanes(w, i)
        each(LANES, element.add_weighted_rows, (x_, w_, K, s, q, m))
    for i in range(whole, x.size, LANES):
        size = min(LANES, x.size - i)
        x_, w_ = part((x, w), i, i + size)
        each(size, element.add_weighted_row, (x_, w_, K, s, q, m))


@noinline
def add_weights(w, n0, n1, s, size, lanes):
    """lanes += the weights of a tile, which all channels share."""
    for n in range(n0, n1):
        weights = weights_of(w, n, 0, s, size)
        for i in range(0, size, LANES):
            width = min(LANES, size - i)
            each(width, element.add_value, (lanes, part(weights, i, i + width)))


@ordered
def tile_weight(lanes, shared, wide):
    """Sum of a tile's weights: of `lanes` or, if channels share weights (None), `shared`."""
    if lanes is None:
        return shared
    return total(lanes, wide)


@noinline
def stats(x, grid, c0, c1, k, partial):
    """partial[:, k, c] = weight, shift, delta, M2 of chunk k, for channels c0 <= c < c1."""
    values, w, _ = x
    s_lanes, q_lanes, m_lanes = zeros(3, LANES, computed(x).dtype)
    wide = new(LANES, np.float64)
    clear_chunk(partial, k, c0, c1)
    begin, end = tiles(grid, k)
    m_own, shared = own(w, m_lanes), 0.0
    for t in range(begin, end):
        n0, n1, s, size = locate(grid, t)
        if m_own is None:
            add_weights(w, n0, n1, s, size, m_lanes)
            shared = total(m_lanes, wide)
            if shared == 0:
                continue
        for c in range(c0, c1):
            count, shift, delta = partial[0, k, c], partial[1, k, c], partial[2, k, c]
            m2 = partial[3, k, c]
            if count == 0:
                found, shift = first_weighted(values, w, n0, n1, c, s, size)
                if found == 0:
                    continue
            K = s_lanes.dtype.type(shift + delta)
            for n in range(n0, n1):
                w_ = weights_of(w, n, c, s, size)
                add_weighted_piece(piece(values, n, c, s, size), w_, K, s_lanes, q_lanes, m_own)
            d, q = total(s_lanes, wide), total(q_lanes, wide)
            m = tile_weight(m_own, shared, wide)
            K64 = np.float64(K)
            new_delta, new_m2, gone = with_tile(count, shift, delta, m2, m, K64, d, q, s_lanes)
            if gone:
                near, rest, m2_tile = moments64(values, w, n0, n1, c, s, size, m, K64)
                if count == 0:  # a shift that far off would cost delta digits
                    shift = near
                _, new_delta, new_m2 = merge(count, delta, m2, m, (near - shift) + rest, m2_tile)
            partial[0, k, c], partial[1, k, c] = count + m, shift
            partial[2, k, c], partial[3, k, c] = new_delta, new_m2


@noinline
def apply(x, residual, grid, norm, floor, streamed, c0, c1, k, y):
    """`rows.apply`, but y = fill where the weight is 0, unless fill is None."""
    values, w, fill = x
    hi, u, a, b = affine(norm, c0, c1, computed(x))
    low, other = bound(floor, hi), filled(fill, hi)
    begin, end = tiles(grid, k)
    for t in range(begin, end):
        n0, n1, s, size = locate(grid, t)
        for n in range(n0, n1):
            for c in range(c0, c1):
                i = c - c0
                w_ = weights_of(w, n, c, s, size)
                args = (
                    piece(values, n, c, s, size), w_, other, piece(residual, n, c, s, size),
                    hi[i], u[i], a[i], b[i], low,
                )  # fmt: skip
                outs = (piece(y, n, c, s, size),)
                each_to(size, element.apply_weighted, args, outs, streamed)
    fence(streamed)


@noinline
def backward_reduce(dy, x, y, grid, norm, c0, c1, k, partial, kept):
    """`rows.backward_reduce` over the values of weight above 0; `kept` is None."""
    values, w, _ = x
    hi, u, a, b = affine(norm, c0, c1, computed(x))
    scale, act = scales(norm, c0, c1, u), gate(norm, hi)
    s_lanes, t_lanes = zeros(2, LANES, hi.dtype)
    wide = new(LANES, np.float64)
    clear_chunk(partial, k, c0, c1)
    begin, end = tiles(grid, k)
    for t in range(begin, end):
        n0, n1, s, size = locate(grid, t)
        for c in range(c0, c1):
            i = c - c0
            for n in range(n0, n1):
                views = (
                    piece(dy, n, c, s, size), piece(values, n, c, s, size),
                    weights_of(w, n, c, s, size), piece(y, n, c, s, size),
                )  # fmt: skip
                norm_ = hi[i], u[i], a[i], element.at(b, i), scale[i], act
                for j in range(0, size, LANES):
                    lanes = min(LANES, size - j)
                    args = (*part(views, j, j + lanes), *norm_, s_lanes, t_lanes)
                    each(lanes, element.add_weighted_gradient_row, args)
            partial[0, k, c] += total(s_lanes, wide)
            partial[1, k, c] += total(t_lanes, wide)
    for c in range(c0, c1):
        if overflowed(partial, k, c):
            i = c - c0
            partial[0, k, c], partial[1, k, c] = gradient_sums64(
                dy, values, w, y, grid, k, c, hi[i], u[i], a[i], element.at(b, i), scale[i], act
            )


@noinline
def backward_apply(dy, x, y, grid, norm, sums, count, streamed, c0, c1, k, dx, dresidual):
    """`rows.backward_apply`, but dx = f ((g v - w h) - w ((x u - hi) p + q)); 0 where w is 0."""
    values, w, _ = x
    hi, u, a, b = affine(norm, c0, c1, computed(x))
    v, f = factors(norm, sums, count, c0, c1, u)
    hpq = coefficients(norm, sums, count, c0, c1, u, v)
    act, like = gate(norm, hi), computed(x)
    begin, end = tiles(grid, k)
    for t in range(begin, end):
        n0, n1, s, size = locate(grid, t)
        for n in range(n0, n1):
            for c in range(c0, c1):
                i = c - c0
                dy_, x_ = piece(dy, n, c, s, size), piece(values, n, c, s, size)
                w_, y_ = weights_of(w, n, c, s, size), piece(y, n, c, s, size)
                outs = piece(dx, n, c, s, size), piece(dresidual, n, c, s, size)
                args = (
                    dy_, x_, w_, y_, hi[i], u[i], a[i], element.at(b, i), coefficients_of(hpq, i),
                    v[i], f[i], act, like,
                )  # fmt: skip
                each_to(size, element.backward_apply_weighted, args, outs, streamed)
    fence(streamed)
