"""The loops over blocks and chunks of channels, one source for rows and columns.

There are two ways through a pass. `fused`, a thread takes a block of channels through both steps:
the block is still near for the second one. Else every (span, chunk) is shared out, then every
(strip, part). Either way threads run the same functions, on units that are independent.
"""

from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import numpy as np

from nbnorm.cpu import columns as _columns
from nbnorm.cpu import rows as _rows
from nbnorm.cpu.channel import finish, finish_sums, rstd_of
from nbnorm.cpu.jit import entry, named, ordered
from nbnorm.cpu.launch import launch
from nbnorm.cpu.plan import Plan
from nbnorm.cpu.threads import pool

_FIRST = np.int64(0)  # channel; for a plain 0 the function would be compiled once more


class Work(NamedTuple):
    """How a pass is shared out: what `plan.Plan` says, and by whom it is done (`threads.pool`)."""

    block: int
    blocks: int
    span: int
    spans: int
    chunks: int
    strip: int
    strips: int
    parts: int
    part: int
    fused: int
    streamed: int
    pool: int
    threads: int


def work_for(cut: Plan) -> tuple[int, ...]:
    """Return the numbers of `Work`; asking for the pool starts it."""
    return (
        cut.block, cut.blocks, cut.span, cut.spans, cut.chunks,
        cut.strip, cut.strips, cut.parts, cut.part,
        int(cut.fused), int(cut.streamed), pool() if cut.parallel else 0, cut.threads,
    )  # fmt: skip


@ordered
def work_of(n):
    """`Work` of its numbers."""
    return Work(
        n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12],
    )  # fmt: skip


@ordered
def in_parts(grid, work):
    """`plan.Grid` with parts for chunks."""
    N, C, S, tile, fold, _ = grid
    return N, C, S, tile, fold, work.part


@ordered
def channels(block, u, C):
    """First channel of block u and the one after its last."""
    return u * block, min((u + 1) * block, C)


def _build(traversal: ModuleType) -> tuple[SimpleNamespace, SimpleNamespace, SimpleNamespace]:
    """Make the six passes of a traversal: their kernels, for Python; the passes; their units."""
    name = traversal.__name__.rpartition(".")[2]
    stats_chunk, apply_chunk = traversal.stats, traversal.apply
    reduce_chunk, differentiate_chunk = traversal.reduce, traversal.differentiate

    @ordered
    @named(f"{name}_stats_unit")
    def stats_unit(x, grid, block, chunks, partial, u):
        c0, c1 = channels(block, u // chunks, grid[1])
        stats_chunk(x, grid, c0, c1, u % chunks, partial)

    @ordered
    @named(f"{name}_stats_pass")
    def stats(x, grid, work, eps, partial, mean, m2, rstd):
        """Mean, M2 and rstd of every channel; partial takes those of its chunks."""
        units = work.spans * work.chunks
        args = x, grid, work.span, work.chunks, partial
        launch((work.pool, work.threads), units, stats_unit, args)
        finish(partial, _FIRST, grid[1], eps, mean, m2, rstd)

    @ordered
    @named(f"{name}_apply_unit")
    def apply_unit(x, residual, grid, block, chunks, norm, floor, streamed, y, u):
        c0, c1 = channels(block, u // chunks, grid[1])
        apply_chunk(x, residual, grid, norm, floor, streamed, c0, c1, u % chunks, y)

    @ordered
    @named(f"{name}_apply_pass")
    def apply(x, residual, grid, work, norm, floor, y):
        """y = act(gamma (x - mean) rstd + beta [+ residual])."""
        units, streamed = work.strips * work.parts, work.streamed != 0
        args = x, residual, in_parts(grid, work), work.strip, work.parts, norm, floor, streamed, y
        launch((work.pool, work.threads), units, apply_unit, args)

    @ordered
    @named(f"{name}_forward_block")
    def forward_block(x, residual, grid, block, norm, eps, floor, streamed, partial, m2, y, u):
        """Statistics, then normalisation: norm's mean and rstd are written, then used."""
        c0, c1 = channels(block, u, grid[1])
        for k in range(partial.shape[1]):
            stats_chunk(x, grid, c0, c1, k, partial)
        finish(partial, c0, c1, eps, norm[0], m2, norm[1])
        for k in range(partial.shape[1]):
            apply_chunk(x, residual, grid, norm, floor, streamed, c0, c1, k, y)

    @ordered
    @named(f"{name}_forward_pass")
    def forward(x, residual, grid, work, norm, eps, floor, partial, m2, y):
        """`stats`, into norm's mean and rstd, then `apply`."""
        if work.fused:
            streamed = work.streamed != 0
            args = x, residual, grid, work.block, norm, eps, floor, streamed, partial, m2, y
            launch((work.pool, work.threads), work.blocks, forward_block, args)
        else:
            stats(x, grid, work, eps, partial, norm[0], m2, norm[1])
            apply(x, residual, grid, work, norm, floor, y)

    @ordered
    @named(f"{name}_reduce_unit")
    def reduce_unit(dy, x, y, grid, block, chunks, norm, partial, u):
        c0, c1 = channels(block, u // chunks, grid[1])
        reduce_chunk(dy, x, y, grid, norm, c0, c1, u % chunks, partial)

    @ordered
    @named(f"{name}_reduce_pass")
    def reduce(dy, x, y, grid, work, norm, partial, sums):
        """Sum dy and sum dy x_hat of every channel; partial takes those of its chunks."""
        units = work.spans * work.chunks
        args = dy, x, y, grid, work.span, work.chunks, norm, partial
        launch((work.pool, work.threads), units, reduce_unit, args)
        finish_sums(partial, norm, _FIRST, grid[1], x, sums)

    @ordered
    @named(f"{name}_differentiate_unit")
    def differentiate_unit(
        dy, x, y, grid, block, chunks, norm, sums, count, streamed, dx, dresidual, u
    ):
        c0, c1 = channels(block, u // chunks, grid[1])
        differentiate_chunk(
            dy, x, y, grid, norm, sums, count, streamed, c0, c1, u % chunks, dx, dresidual
        )

    @ordered
    @named(f"{name}_differentiate_pass")
    def differentiate(dy, x, y, grid, work, norm, sums, count, dx, dresidual):
        """dx and dresidual, each where given; without sums mean and rstd are constants."""
        units, streamed = work.strips * work.parts, work.streamed != 0
        args = (
            dy, x, y, in_parts(grid, work), work.strip, work.parts, norm, sums, count, streamed,
            dx, dresidual,
        )  # fmt: skip
        launch((work.pool, work.threads), units, differentiate_unit, args)

    @ordered
    @named(f"{name}_backward_block")
    def backward_block(
        dy, x, y, grid, block, norm, count, streamed, partial, sums, dx, dresidual, u
    ):
        """The two sums, then dx."""
        c0, c1 = channels(block, u, grid[1])
        for k in range(partial.shape[1]):
            reduce_chunk(dy, x, y, grid, norm, c0, c1, k, partial)
        finish_sums(partial, norm, c0, c1, x, sums)
        for k in range(partial.shape[1]):
            differentiate_chunk(
                dy, x, y, grid, norm, sums, count, streamed, c0, c1, k, dx, dresidual
            )

    @ordered
    @named(f"{name}_backward_pass")
    def backward(dy, x, y, grid, work, norm, count, partial, sums, dx, dresidual):
        """`reduce`, then `differentiate` with its sums."""
        if work.fused:
            streamed = work.streamed != 0
            args = (
                dy, x, y, grid, work.block, norm, count, streamed, partial, sums, dx, dresidual,
            )  # fmt: skip
            launch((work.pool, work.threads), work.blocks, backward_block, args)
        else:
            reduce(dy, x, y, grid, work, norm, partial, sums)
            differentiate(dy, x, y, grid, work, norm, sums, count, dx, dresidual)

    @entry(f"{name}_stats")
    def stats_kernel(x, grid, work, eps, partial, mean, m2, rstd):
        stats(x, grid, work_of(work), eps, partial, mean, m2, rstd)

    @entry(f"{name}_apply")
    def apply_kernel(x, residual, grid, work, norm, floor, y):
        apply(x, residual, grid, work_of(work), norm, floor, y)

    @entry(f"{name}_forward")
    def forward_kernel(x, residual, grid, work, norm, eps, floor, partial, m2, y):
        forward(x, residual, grid, work_of(work), norm, eps, floor, partial, m2, y)

    @entry(f"{name}_reduce")
    def reduce_kernel(dy, x, y, grid, work, norm, partial, sums):
        reduce(dy, x, y, grid, work_of(work), norm, partial, sums)

    @entry(f"{name}_differentiate")
    def differentiate_kernel(dy, x, y, grid, work, norm, sums, count, dx, dresidual):
        differentiate(dy, x, y, grid, work_of(work), norm, sums, count, dx, dresidual)

    @entry(f"{name}_backward")
    def backward_kernel(dy, x, y, grid, work, norm, count, partial, sums, dx, dresidual):
        backward(dy, x, y, grid, work_of(work), norm, count, partial, sums, dx, dresidual)

    return (
        SimpleNamespace(
            stats=stats_kernel, apply=apply_kernel, forward=forward_kernel,
            reduce=reduce_kernel, differentiate=differentiate_kernel, backward=backward_kernel,
        ),
        SimpleNamespace(
            stats=stats, apply=apply, forward=forward,
            reduce=reduce, differentiate=differentiate, backward=backward,
        ),
        SimpleNamespace(
            stats=stats_unit, apply=apply_unit, forward=forward_block,
            reduce=reduce_unit, differentiate=differentiate_unit, backward=backward_block,
        ),
    )  # fmt: skip


rows, rows_passes, rows_units = _build(_rows)
columns, columns_passes, columns_units = _build(_columns)


@entry("rstd_all")
def rstd_all(var, eps, rstd):
    """rstd of every channel's variance."""
    for c in range(var.size):
        rstd[c] = rstd_of(var[c], eps)


@ordered
def take_statistics(running_mean, running_var, eps, mean, rstd):
    """mean and rstd of running statistics."""
    for c in range(mean.size):
        mean[c] = running_mean[c]
        rstd[c] = rstd_of(np.float64(running_var[c]), eps)


@ordered
def move_all(running_mean, running_var, mean, m2, momentum, divisor):
    """Running statistics towards those of a batch, whose variance is M2 / divisor."""
    old = 1.0 - momentum
    for c in range(mean.size):
        running_mean[c] = old * running_mean[c] + momentum * mean[c]
        running_var[c] = old * running_var[c] + momentum * (m2[c] / divisor)


@entry("move")
def move(running_mean, running_var, mean, m2, momentum, divisor):
    """`move_all`, called from Python."""
    move_all(running_mean, running_var, mean, m2, momentum, divisor)


def cache_folder() -> str | None:
    """Return the folder that compiled kernels are kept in, None where they are not."""
    folder: str | None = rows.stats._cache.cache_path
    return folder
