"""Passes over segments: a thread takes whole parts of x, one after another, in serial passes.

Each part is a slice of N with its own statistics, so it stays in a core's cache between the two
steps of a pass. `ends` are the parts' ends in N, shape (parts + 1,); per-channel arrays have shape
(parts * C,). Apart from that, the functions match those of `nbnorm.cpu`. Parts may be empty.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from nbnorm._layout import PLANE
from nbnorm._typing import NDArray
from nbnorm.cpu import kernels
from nbnorm.cpu.caches import caches
from nbnorm.cpu.channel import finish_moments, finish_sums
from nbnorm.cpu.intrinsics import new, part
from nbnorm.cpu.jit import entry, named, none_without, ordered
from nbnorm.cpu.launch import launch
from nbnorm.cpu.plan import past_cache, serial
from nbnorm.cpu.threads import pool

# The small planes of parts with few samples are summed along each plane. Summed down the samples,
# they would need nearly as many sums as values.
LEAST_PLANE, MOST_SAMPLES = 32, 8

_CACHES = caches()


class Parts(NamedTuple):
    """C and S of x, and how the passes over its parts run.

    `planes` is 1 if parts are `few`: each channel of a part is then one tile.
    """

    C: int
    S: int
    planes: int
    itemsize: int
    tensors: int
    own: int
    streamed: int
    pool: int
    threads: int


@ordered
def parts_of(n):
    """`Parts` from its fields."""
    return Parts(n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8])


@none_without("view")
def moved(view, n):
    """The view (memory, stride of n, stride of c) that begins at sample n; None for None."""
    memory, n_stride, c_stride = view
    return part(memory, n * n_stride, memory.size), n_stride, c_stride


@none_without("sums")
def sums_of(sums, g):
    """Sums of part g, shape (2, C); None for None."""
    return sums[g]


@ordered
def norm_of(norm, c0, c1):
    """`norm` of channels c0 <= c < c1: mean, rstd, gamma, beta and, if there is one, activation."""
    mean, rstd, gamma, beta = norm[:4]
    rows = part(mean, c0, c1), part(rstd, c0, c1), part(gamma, c0, c1), part(beta, c0, c1)
    return rows + norm[4:]


@ordered
def planned(N, parts):
    """Grid, chunks and block of a serial pass over a part of N samples."""
    C, S = parts.C, parts.S
    if parts.planes:
        one = np.int64(1)
        return (N, C, S, (S + 15) // 16 * 16, N, one), one, C
    tile, fold, per, chunks, block, _ = serial(
        N, C, S, parts.itemsize, parts.tensors, parts.own, parts.streamed != 0
    )
    return (N, C, S, tile, fold, per), chunks, block


def _build(name: str, units: SimpleNamespace) -> SimpleNamespace:
    """Make the passes of a traversal from its units."""
    stats_unit, apply_unit, forward_block = units.stats, units.apply, units.forward
    backward_reduce_unit, backward_apply_unit = units.backward_reduce, units.backward_apply
    backward_block = units.backward

    @ordered
    @named(f"{name}_stats_part")
    def stats_part(x, ends, parts, mean, m2, rstd, g):
        N, C = ends[g + 1] - ends[g], parts.C
        if N > 0:
            grid, chunks, _ = planned(N, parts)
            partial, x_ = new((4, chunks, C), np.float64), moved(x, ends[g])
            for k in range(chunks):
                stats_unit(x_, grid, C, chunks, partial, k)
            c0, c1 = g * C, (g + 1) * C
            of_part = part(mean, c0, c1), part(m2, c0, c1), part(rstd, c0, c1)
            finish_moments(partial, np.int64(0), C, 0.0, *of_part)

    @ordered
    @named(f"{name}_apply_part")
    def apply_part(x, residual, ends, parts, norm, floor, y, g):
        N, C = ends[g + 1] - ends[g], parts.C
        if N > 0:
            grid, chunks, _ = planned(N, parts)
            norm_, n = norm_of(norm, g * C, (g + 1) * C), ends[g]
            x_, residual_, y_ = moved(x, n), moved(residual, n), moved(y, n)
            for k in range(chunks):
                apply_unit(x_, residual_, grid, C, chunks, norm_, floor, parts.streamed != 0, y_, k)

    @ordered
    @named(f"{name}_forward_part")
    def forward_part(x, residual, ends, parts, norm, eps, floor, m2, y, g):
        N, C = ends[g + 1] - ends[g], parts.C
        if N > 0:
            grid, chunks, block = planned(N, parts)
            norm_, n = norm_of(norm, g * C, (g + 1) * C), ends[g]
            x_, residual_, y_ = moved(x, n), moved(residual, n), moved(y, n)
            partial, m2_ = new((4, chunks, C), np.float64), part(m2, g * C, (g + 1) * C)
            for u in range((C + block - 1) // block):
                forward_block(
                    x_, residual_, grid, block, norm_, eps, floor, parts.streamed != 0,
                    partial, m2_, y_, u,
                )  # fmt: skip

    @ordered
    @named(f"{name}_backward_reduce_part")
    def backward_reduce_part(dy, x, y, ends, parts, norm, sums, g):
        N, C = ends[g + 1] - ends[g], parts.C
        if N > 0:
            grid, chunks, _ = planned(N, parts)
            norm_, n = norm_of(norm, g * C, (g + 1) * C), ends[g]
            dy_, x_, y_ = moved(dy, n), moved(x, n), moved(y, n)
            partial = new((2, chunks, C), np.float64)
            for k in range(chunks):
                backward_reduce_unit(dy_, x_, y_, grid, C, chunks, norm_, partial, None, k)
            finish_sums(partial, norm_, np.int64(0), C, x_, sums[g])

    @ordered
    @named(f"{name}_backward_apply_part")
    def backward_apply_part(dy, x, y, ends, parts, norm, sums, counts, dx, dresidual, g):
        N, C = ends[g + 1] - ends[g], parts.C
        if N > 0:
            grid, chunks, _ = planned(N, parts)
            norm_, n = norm_of(norm, g * C, (g + 1) * C), ends[g]
            dy_, x_, y_ = moved(dy, n), moved(x, n), moved(y, n)
            dx_, dresidual_ = moved(dx, n), moved(dresidual, n)
            for k in range(chunks):
                backward_apply_unit(
                    dy_, x_, y_, grid, C, chunks, norm_, sums_of(sums, g), counts[g],
                    parts.streamed != 0, dx_, dresidual_, k,
                )  # fmt: skip

    @ordered
    @named(f"{name}_backward_part")
    def backward_part(dy, x, y, ends, parts, norm, sums, dx, dresidual, g):
        N, C = ends[g + 1] - ends[g], parts.C
        if N > 0:
            grid, chunks, block = planned(N, parts)
            norm_, n = norm_of(norm, g * C, (g + 1) * C), ends[g]
            dy_, x_, y_ = moved(dy, n), moved(x, n), moved(y, n)
            dx_, dresidual_ = moved(dx, n), moved(dresidual, n)
            partial, m = new((2, chunks, C), np.float64), float(N * parts.S)
            for u in range((C + block - 1) // block):
                backward_block(
                    dy_, x_, y_, grid, block, norm_, m, parts.streamed != 0, partial, sums[g],
                    dx_, dresidual_, u,
                )  # fmt: skip

    @entry(f"{name}_stats_parts")
    def stats(x, ends, numbers, mean, m2, rstd):
        parts = parts_of(numbers)
        args = x, ends, parts, mean, m2, rstd
        launch((parts.pool, parts.threads), ends.size - 1, stats_part, args)

    @entry(f"{name}_apply_parts")
    def apply(x, residual, ends, numbers, norm, floor, y):
        parts = parts_of(numbers)
        args = x, residual, ends, parts, norm, floor, y
        launch((parts.pool, parts.threads), ends.size - 1, apply_part, args)

    @entry(f"{name}_forward_parts")
    def forward(x, residual, ends, numbers, norm, eps, floor, m2, y):
        parts = parts_of(numbers)
        args = x, residual, ends, parts, norm, eps, floor, m2, y
        launch((parts.pool, parts.threads), ends.size - 1, forward_part, args)

    @entry(f"{name}_backward_reduce_parts")
    def backward_reduce(dy, x, y, ends, numbers, norm, sums):
        parts = parts_of(numbers)
        args = dy, x, y, ends, parts, norm, sums
        launch((parts.pool, parts.threads), ends.size - 1, backward_reduce_part, args)

    @entry(f"{name}_backward_apply_parts")
    def backward_apply(dy, x, y, ends, numbers, norm, sums, counts, dx, dresidual):
        parts = parts_of(numbers)
        args = dy, x, y, ends, parts, norm, sums, counts, dx, dresidual
        launch((parts.pool, parts.threads), ends.size - 1, backward_apply_part, args)

    @entry(f"{name}_backward_parts")
    def backward(dy, x, y, ends, numbers, norm, sums, dx, dresidual):
        parts = parts_of(numbers)
        args = dy, x, y, ends, parts, norm, sums, dx, dresidual
        launch((parts.pool, parts.threads), ends.size - 1, backward_part, args)

    return SimpleNamespace(
        stats=stats, apply=apply, forward=forward,
        backward_reduce=backward_reduce, backward_apply=backward_apply, backward=backward,
    )  # fmt: skip


_ROWS = _build("rows", kernels.rows_units)
_COLUMNS = _build("columns", kernels.columns_units)


def few(samples: int, S: int) -> bool:
    """Whether to traverse small planes by rows, in parts of at most `samples` samples."""
    return LEAST_PLANE <= S < PLANE and samples <= MOST_SAMPLES


def kernels_for(
    x: NDArray, samples: int, tensors: int, threads: int
) -> tuple[Any, tuple[int, ...], bool]:
    """Return the kernels for x, the fields of `Parts`, and whether they use threads.

    `samples` is the size of the largest part.
    """
    N, C, S = x.shape
    planes = few(samples, S)
    along = S >= PLANE or planes
    streamed = past_cache(N, C, S, x.itemsize, tensors, _CACHES.last)
    numbers = (
        C, S, int(planes), x.itemsize, tensors, _CACHES.own, int(streamed),
        pool() if threads > 1 else 0, threads,
    )  # fmt: skip
    return _ROWS if along else _COLUMNS, numbers, threads > 1
