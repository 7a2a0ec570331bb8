"""Second-order passes by rows and by columns: the gradients of backward, and forward mode.

`jvp` sums tx and tx x_hat as backward does and writes ty. `double_backward` takes five sums in one
sweep over ddx, dy and x, and writes ddy and dx in another. Both steps are divided among threads
as in kernels.py; count is Inf for frozen statistics, which do not depend on x. A channel whose
numbers leave the range of the compute dtype is computed in float64, value by value.
"""

from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from nbnorm.cpu import columns as _columns
from nbnorm.cpu import element
from nbnorm.cpu import rows as _rows
from nbnorm.cpu.channel import (
    centers,
    curvature_coefficients,
    finish_second_sums,
    finish_sums,
    tangent_coefficients,
)
from nbnorm.cpu.columns import (
    RUN_ROWS,
    before_line,
    by_columns,
    by_planes,
    columns_ahead,
    first_line,
    gather,
    row_size,
    whole_share,
)
from nbnorm.cpu.intrinsics import each, each_to, fence, four, new, of_chunk, part, piece, zeros
from nbnorm.cpu.jit import entry, named, noinline, none_without, ordered
from nbnorm.cpu.kernels import channels, in_parts, work_of
from nbnorm.cpu.launch import launch
from nbnorm.cpu.rows import LANES, clear_chunk, line, locate, tiles, total
from nbnorm.cpu.storage import computed, limits, load

_FIRST = np.int64(0)  # channel, as in kernels.py


@ordered
def add_second_piece(ddx, dy, x, hi, scale, sums):
    """Add a piece of a row to the five sums, lane by lane."""
    whole = x.size // (4 * LANES) * (4 * LANES)
    for i in range(0, whole, 4 * LANES):
        ddx_, dy_ = four(line(ddx), i, LANES, 0, 0, LANES), four(line(dy), i, LANES, 0, 0, LANES)
        x_ = four(line(x), i, LANES, 0, 0, LANES)
        each(LANES, element.add_second_rows, (ddx_, dy_, x_, hi, scale, sums))
    for i in range(whole, x.size, LANES):
        size = min(LANES, x.size - i)
        ddx_, dy_ = piece(line(ddx), i, 0, 0, size), piece(line(dy), i, 0, 0, size)
        each(
            size,
            element.add_second_row,
            (ddx_, dy_, piece(line(x), i, 0, 0, size), hi, scale, sums),
        )


@noinline
def second_sums64(ddx, dy, x, grid, k, c, hi, scale, partial):
    """The five sums over chunk k of channel c, in float64."""
    s_d, s_dt, s_g, s_gt, s_dg = 0.0, 0.0, 0.0, 0.0, 0.0
    begin, end = tiles(grid, k)
    for i in range(begin, end):
        n0, n1, s, size = locate(grid, i)
        for n in range(n0, n1):
            ddx_, dy_ = piece(ddx, n, c, s, size), piece(dy, n, c, s, size)
            x_ = piece(x, n, c, s, size)
            for j in range(size):
                d, g = np.float64(load(ddx_, j)), np.float64(load(dy_, j))
                t = (np.float64(load(x_, j)) - hi) * scale
                s_d += d
                s_dt += d * t
                s_g += g
                s_gt += g * t
                s_dg += d * g
    partial[0, k, c], partial[1, k, c], partial[2, k, c] = s_d, s_dt, s_g
    partial[3, k, c], partial[4, k, c] = s_gt, s_dg


@ordered
def second_lost(partial, k, c, grid, like):
    """Whether a sum of chunk k of channel c overflowed, or the products d g underflowed.

    Products of numbers below 1e-19 underflow in float32, but affect the result if rstd is large.
    """
    tiny, _ = limits(like)
    s_d, s_dt, s_g = partial[0, k, c], partial[1, k, c], partial[2, k, c]
    s_gt, s_dg = partial[3, k, c], partial[4, k, c]
    if not abs(s_d) + abs(s_dt) + abs(s_g) + abs(s_gt) + abs(s_dg) < np.inf:
        return True
    some = abs(s_d) + abs(s_dt) > 0 and abs(s_g) + abs(s_gt) > 0
    return some and abs(s_dg) < grid[3] * grid[4] * grid[5] * tiny * 2.0**26


@ordered
def repair(ddx, dy, x, grid, c0, c1, k, hi, scale, partial):
    """Sum chunk k in float64 again for the channels whose sums were lost."""
    for c in range(c0, c1):
        if second_lost(partial, k, c, grid, hi):
            second_sums64(ddx, dy, x, grid, k, c, np.float64(hi[c - c0]), scale[c - c0], partial)


@noinline
def rows_second_reduce(ddx, dy, x, grid, norm, c0, c1, k, partial):
    """partial[:, k, c] = sums of d, d t, g, g t and d g over chunk k, by rows."""
    hi, scale = centers(norm, c0, c1, computed(x))
    sums = zeros(5, LANES, hi.dtype)
    wide = new(LANES, np.float64)
    clear_chunk(partial, k, c0, c1)
    begin, end = tiles(grid, k)
    for i in range(begin, end):
        n0, n1, s, size = locate(grid, i)
        for c in range(c0, c1):
            for n in range(n0, n1):
                ddx_, dy_ = piece(ddx, n, c, s, size), piece(dy, n, c, s, size)
                x_ = piece(x, n, c, s, size)
                add_second_piece(ddx_, dy_, x_, hi[c - c0], scale[c - c0], sums)
            for j in range(5):
                partial[j, k, c] += total(sums[j], wide)
    repair(ddx, dy, x, grid, c0, c1, k, hi, scale, partial)


@noinline
def columns_second_reduce(ddx, dy, x, grid, norm, c0, c1, k, partial):
    """partial[:, k, c] = sums of d, d t, g, g t and d g over chunk k, by columns."""
    _, _, S, _, fold, _ = grid
    hi_c, scale_c = centers(norm, c0, c1, computed(x))
    hi, scale = by_columns(hi_c, grid, 0), by_columns(scale_c, grid, 0)
    size = hi.size
    sums, sums64 = zeros(5, size, hi.dtype), zeros(5, size, np.float64)
    r0, r1 = _columns.rows(grid, k)
    quarter = whole_share(grid, r0, r1, 4)
    step = quarter * fold
    for begin in range(r0, r0 + quarter, RUN_ROWS // 4):
        for r in range(begin, min(begin + RUN_ROWS // 4, r0 + quarter)):
            n = r * fold
            ddx_, dy_ = four(ddx, n, step, c0, 0, size), four(dy, n, step, c0, 0, size)
            x_ = four(x, n, step, c0, 0, size)
            each(size, element.add_second_rows, (ddx_, dy_, x_, hi, scale, sums))
        for j in range(5):
            each(size, element.drain, (sums[j], sums64[j]))
    if r0 + 4 * quarter < r1:
        for r in range(r0 + 4 * quarter, r1):
            n, short = r * fold, row_size(grid, r, c0, c1)
            ddx_, dy_ = piece(ddx, n, c0, 0, short), piece(dy, n, c0, 0, short)
            x_ = piece(x, n, c0, 0, short)
            each(short, element.add_second_row, (ddx_, dy_, x_, hi, scale, sums))
        for j in range(5):
            each(size, element.drain, (sums[j], sums64[j]))
    for j in range(5):
        gather(sums64[j], S, of_chunk(partial, j, k, c0, c1))
    repair(ddx, dy, x, grid, c0, c1, k, hi_c, scale_c, partial)


@none_without("coefficients")
def four_of(coefficients, c):
    """Coefficients of channel c; None for None."""
    a, h, p, q = coefficients
    return a[c], h[c], p[c], q[c]


@none_without("coefficients")
def four_by_columns(coefficients, grid, ahead):
    """`by_columns` of four coefficients; None for None."""
    a, h, p, q = coefficients
    return (
        by_columns(a, grid, ahead), by_columns(h, grid, ahead),
        by_columns(p, grid, ahead), by_columns(q, grid, ahead),
    )  # fmt: skip


@noinline
def second_apply64(ddx, dy, x, grid, norm, tangents, sums, count, c, k, ddy, dx):
    """Write chunk k of channel c, computed in float64."""
    like = new(0, np.float64)
    hi, ahpq, fits = tangent_coefficients(norm, tangents, sums, count, c, c + 1, like)
    bkst = curvature_coefficients(dy, norm, tangents, sums, count, c, c + 1, like, fits)
    begin, end = tiles(grid, k)
    for i in range(begin, end):
        n0, n1, s, size = locate(grid, i)
        for n in range(n0, n1):
            ddx_, dy_ = piece(ddx, n, c, s, size), piece(dy, n, c, s, size)
            args = ddx_, dy_, piece(x, n, c, s, size), hi[0], four_of(ahpq, 0), four_of(bkst, 0)
            outs = piece(ddy, n, c, s, size), piece(dx, n, c, s, size)
            each(size, element.second_apply, (*args, *outs))


@noinline
def rows_second_apply(ddx, dy, x, grid, norm, tangents, sums, count, streamed, c0, c1, k, ddy, dx):
    """ddy = `element.tangent` and, unless None, dx = `element.curvature` in chunk k, by rows."""
    like = computed(x)
    hi, ahpq, fits = tangent_coefficients(norm, tangents, sums, count, c0, c1, like)
    bkst = curvature_coefficients(dy, norm, tangents, sums, count, c0, c1, like, fits)
    begin, end = tiles(grid, k)
    for i in range(begin, end):
        n0, n1, s, size = locate(grid, i)
        for n in range(n0, n1):
            for c in range(c0, c1):
                if fits[c - c0]:
                    ddx_, dy_ = piece(ddx, n, c, s, size), piece(dy, n, c, s, size)
                    x_, hi_c = piece(x, n, c, s, size), hi[c - c0]
                    args = ddx_, dy_, x_, hi_c, four_of(ahpq, c - c0), four_of(bkst, c - c0)
                    outs = piece(ddy, n, c, s, size), piece(dx, n, c, s, size)
                    each_to(size, element.second_apply, args, outs, streamed)
    fence(streamed)
    for c in range(c0, c1):
        if not fits[c - c0]:
            second_apply64(ddx, dy, x, grid, norm, tangents, sums, count, c, k, ddy, dx)


@ordered
def all_set(fits):
    """Whether every channel's coefficients fit."""
    others = 0
    for c in range(fits.size):
        others += fits[c] == 0
    return others == 0


@noinline
def columns_second_apply(
    ddx, dy, x, grid, norm, tangents, sums, count, streamed, c0, c1, k, ddy, dx
):
    """`rows_second_apply` by columns."""
    like = computed(x)
    hi_c, ahpq_c, fits = tangent_coefficients(norm, tangents, sums, count, c0, c1, like)
    bkst_c = curvature_coefficients(dy, norm, tangents, sums, count, c0, c1, like, fits)
    if by_planes(x, grid, streamed, c0, c1) or not all_set(fits):
        rows_second_apply(
            ddx, dy, x, grid, norm, tangents, sums, count, streamed, c0, c1, k, ddy, dx
        )
        return
    ahead = columns_ahead(ddy, (ddx, dy, x, ddy, dx), grid, streamed, c0, c1)
    hi, ahpq = by_columns(hi_c, grid, ahead), four_by_columns(ahpq_c, grid, ahead)
    bkst = four_by_columns(bkst_c, grid, ahead)
    fold = grid[4]
    begin, end = _columns.rows(grid, k)
    first = first_line(ddy, grid, begin, ahead)
    for r in range(begin, end):
        n = r * fold
        j = before_line(grid, r, begin, end, first, ahead)
        size = row_size(grid, r, c0, c1) + before_line(grid, r + 1, begin, end, first, ahead) - j
        ddx_, dy_, x_ = (
            piece(ddx, n, c0, j, size),
            piece(dy, n, c0, j, size),
            piece(x, n, c0, j, size),
        )
        hi_, ahpq_, bkst_ = part((hi, ahpq, bkst), j, j + size)
        outs = piece(ddy, n, c0, j, size), piece(dx, n, c0, j, size)
        each_to(size, element.second_apply, (ddx_, dy_, x_, hi_, ahpq_, bkst_), outs, streamed)
    fence(streamed)


def _build(traversal: ModuleType, reduce_chunk: Any, apply_chunk: Any) -> SimpleNamespace:
    """Make the two passes of a traversal."""
    name = traversal.__name__.rpartition(".")[2]
    backward_reduce_chunk = traversal.backward_reduce

    @ordered
    @named(f"{name}_jvp_sums_unit")
    def jvp_sums_unit(tx, x, grid, block, chunks, norm, partial, u):
        c0, c1 = channels(block, u // chunks, grid[1])
        backward_reduce_chunk(tx, x, None, grid, norm, c0, c1, u % chunks, partial, None)

    @ordered
    @named(f"{name}_second_sums_unit")
    def second_sums_unit(ddx, dy, x, grid, block, chunks, norm, partial, u):
        c0, c1 = channels(block, u // chunks, grid[1])
        reduce_chunk(ddx, dy, x, grid, norm, c0, c1, u % chunks, partial)

    @ordered
    @named(f"{name}_second_apply_unit")
    def second_apply_unit(
        ddx, dy, x, grid, block, chunks, norm, tangents, sums, count, streamed, ddy, dx, u
    ):
        c0, c1 = channels(block, u // chunks, grid[1])
        apply_chunk(
            ddx, dy, x, grid, norm, tangents, sums, count, streamed, c0, c1, u % chunks, ddy, dx
        )

    @ordered
    @named(f"{name}_second_apply_pass")
    def second_apply(ddx, dy, x, grid, work, norm, tangents, sums, count, ddy, dx):
        units, streamed = work.strips * work.parts, work.streamed != 0
        args = (
            ddx, dy, x, in_parts(grid, work), work.strip, work.parts, norm, tangents, sums, count,
            streamed, ddy, dx,
        )  # fmt: skip
        launch((work.pool, work.threads), units, second_apply_unit, args)

    @ordered
    @named(f"{name}_jvp_block")
    def jvp_block(tx, x, grid, block, norm, tangents, count, streamed, partial, sums, ty, u):
        """Sums of block u, then its ty."""
        c0, c1 = channels(block, u, grid[1])
        if count < np.inf:
            for k in range(partial.shape[1]):
                backward_reduce_chunk(tx, x, None, grid, norm, c0, c1, k, partial, None)
            finish_sums(partial, norm, c0, c1, x, sums)
        for k in range(partial.shape[1]):
            apply_chunk(
                tx, None, x, grid, norm, tangents, sums, count, streamed, c0, c1, k, ty, None
            )

    @entry(f"{name}_jvp")
    def jvp(tx, x, grid, work, norm, tangents, count, partial, sums, ty):
        """ty = gamma rstd (tx - mean(tx) - x_hat mean(tx x_hat)) + tgamma x_hat + tbeta."""
        work = work_of(work)
        if work.fused:
            streamed = work.streamed != 0
            args = tx, x, grid, work.block, norm, tangents, count, streamed, partial, sums, ty
            launch((work.pool, work.threads), work.blocks, jvp_block, args)
            return
        if count < np.inf:
            units = work.spans * work.chunks
            summed = tx, x, grid, work.span, work.chunks, norm, partial
            launch((work.pool, work.threads), units, jvp_sums_unit, summed)
            finish_sums(partial, norm, _FIRST, grid[1], x, sums)
        second_apply(tx, None, x, grid, work, norm, tangents, sums, count, ty, None)

    @ordered
    @named(f"{name}_double_backward_block")
    def double_backward_block(
        ddx, dy, x, grid, block, norm, tangents, count, streamed, partial, sums, ddy, dx, u
    ):
        """Sums of block u, then its ddy and dx."""
        c0, c1 = channels(block, u, grid[1])
        for k in range(partial.shape[1]):
            reduce_chunk(ddx, dy, x, grid, norm, c0, c1, k, partial)
        finish_second_sums(partial, norm, c0, c1, x, count, sums)
        for k in range(partial.shape[1]):
            apply_chunk(ddx, dy, x, grid, norm, tangents, sums, count, streamed, c0, c1, k, ddy, dx)

    @entry(f"{name}_double_backward")
    def double_backward(ddx, dy, x, grid, work, norm, tangents, count, partial, sums, ddy, dx):
        """sums (see `channel.curvature_coefficients`), ddy and dx."""
        work = work_of(work)
        if work.fused:
            streamed = work.streamed != 0
            args = (
                ddx, dy, x, grid, work.block, norm, tangents, count, streamed, partial, sums,
                ddy, dx,
            )  # fmt: skip
            launch((work.pool, work.threads), work.blocks, double_backward_block, args)
            return
        units = work.spans * work.chunks
        summed = ddx, dy, x, grid, work.span, work.chunks, norm, partial
        launch((work.pool, work.threads), units, second_sums_unit, summed)
        finish_second_sums(partial, norm, _FIRST, grid[1], x, count, sums)
        second_apply(ddx, dy, x, grid, work, norm, tangents, sums, count, ddy, dx)

    return SimpleNamespace(jvp=jvp, double_backward=double_backward)


rows = _build(_rows, rows_second_reduce, rows_second_apply)
columns = _build(_columns, columns_second_reduce, columns_second_apply)
