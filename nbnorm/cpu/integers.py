"""Exact sums of integers, from which mean and M2 follow with three roundings.

A channel's sum x and sum x^2 are int64: exact, so no bit depends on how they are divided. Lanes and
columns of 8-bit integers are int32, twice as many to a vector. int32 holds a sum of 2^15 of their
squares; a chunk adds fewer than 2^11 values to a column, a tile fewer than 2^7 to a lane (`plan`).
"""

import numpy as np

from nbnorm._typing import NDArray
from nbnorm.cpu import columns, rows
from nbnorm.cpu.intrinsics import clear, each, new, piece, zeros
from nbnorm.cpu.jit import by_types, entry, named, noinline, ordered
from nbnorm.cpu.kernels import channels, work_of
from nbnorm.cpu.launch import launch

LANES = 64
MOST = 1 << 33  # values; their mean squared deviation is below 2^30


@by_types
def summed(view):
    """Empty array of the dtype in which a lane or column of a view's integers is summed."""
    if view.types[0].dtype.bitwidth == 8:
        return lambda view: new(0, np.int32)
    return lambda view: new(0, np.int64)


@ordered
def add(j, x, s, q):
    """s += x and q += x^2."""
    v = s.dtype.type(x[j])
    s[j] += v
    q[j] += v * v


@ordered
def total(sums):
    """Sum of all lanes, which are reset to 0."""
    found = np.int64(0)
    for i in range(sums.size):
        found += sums[i]
    clear(sums)
    return found


@noinline
def rows_stats(x, grid, c0, c1, k, partial):
    """partial[:, k, c] += sum x, sum x^2 of chunk k, for channels c0 <= c < c1."""
    s, q = zeros(2, LANES, summed(x).dtype)
    begin, end = rows.tiles(grid, k)
    for t in range(begin, end):
        n0, n1, first, size = rows.locate(grid, t)
        for c in range(c0, c1):
            for n in range(n0, n1):
                values = rows.line(piece(x, n, c, first, size))
                for i in range(0, size, LANES):
                    width = min(LANES, size - i)
                    each(width, add, (piece(values, i, 0, 0, width), s, q))
            partial[0, k, c] += total(s)
            partial[1, k, c] += total(q)


@noinline
def columns_stats(x, grid, c0, c1, k, partial):
    """partial[:, k, c] = sum x, sum x^2 of chunk k, for channels c0 <= c < c1."""
    _, _, S, _, fold, _ = grid
    s, q = zeros(2, fold * (c1 - c0) * S, summed(x).dtype)
    begin, end = columns.rows(grid, k)
    for r in range(begin, end):
        width = columns.row_size(grid, r, c0, c1)
        each(width, add, (piece(x, r * fold, c0, 0, width), s, q))
    for j in range(s.size):
        c = c0 + (j // S) % (c1 - c0)
        partial[0, k, c] += s[j]
        partial[1, k, c] += q[j]


def _build(name, stats_chunk):
    """Make the pass of a traversal."""

    @ordered
    @named(f"integer_{name}_unit")
    def unit(x, grid, block, chunks, partial, u):
        c0, c1 = channels(block, u // chunks, grid[1])
        stats_chunk(x, grid, c0, c1, u % chunks, partial)

    @entry(f"integer_{name}_sums")
    def sums(x, grid, work, partial):
        """partial[:, k, c] = sum x, sum x^2 of chunk k of channel c; 0 on entry."""
        work = work_of(work)
        units = work.spans * work.chunks
        launch((work.pool, work.threads), units, unit, (x, grid, work.span, work.chunks, partial))

    return sums


rows_sums, columns_sums = _build("rows", rows_stats), _build("columns", columns_stats)


def moments(partial: NDArray, m: int) -> tuple[NDArray, NDArray]:
    """Return mean and M2 = sum (x - mean)^2 of each channel, of m values, from `partial`.

    Deviations d from the integer next to the mean have exact sums, too. M2 is at least half of
    their sum of squares, so subtracting (sum d)^2 / m costs no digits. sum x^2 may exceed int64 and
    wrap around; sum d^2 then still is exact, being below 2^63 itself for m up to `MOST`.
    """
    s, q = partial.sum(axis=1)
    K = (2 * s + m) // (2 * m)
    d = s - m * K
    squares = q - K * (s + d)
    return s / m, squares - d * (d / m)
