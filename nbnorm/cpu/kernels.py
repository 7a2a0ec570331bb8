"""Passes over blocks and chunks of channels, built from one source for rows and columns.

A pass runs in one of two ways. `fused`: each thread takes a block of channels through both steps
(statistics and normalisation, or sums and dx), so the block is still in cache for the second one.
Otherwise every (span, chunk) is a unit of the first step, and then every (strip, part) a unit of
the second. Either way threads run the same functions, on independent units.
"""

from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import numpy as np
from numba import types

from nbnorm.cpu import columns as _columns
from nbnorm.cpu import rows as _rows
from nbnorm.cpu import weighted_columns as _weighted_columns
from nbnorm.cpu import weighted_rows as _weighted_rows
from nbnorm.cpu.channel import after, finish_moments, finish_sums, fold, renorm_factors, rstd_of
from nbnorm.cpu.element import either
from nbnorm.cpu.functions import costs
from nbnorm.cpu.jit import by_types, entry, named, ordered
from nbnorm.cpu.launch import launch
from nbnorm.cpu.plan import Plan
from nbnorm.cpu.threads import pool
from nbnorm.cpu.weights import weigh_unit

_FIRST = np.int64(0)  # channel; with a plain 0 the function would be compiled once more


class Work(NamedTuple):
    """How a pass is divided (see `plan.Plan`), and the pool and threads that run it."""

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
    """Return the fields of `Work`; asking for the pool starts it."""
    return (
        cut.block, cut.blocks, cut.span, cut.spans, cut.chunks,
        cut.strip, cut.strips, cut.parts, cut.part,
        int(cut.fused), int(cut.streamed), pool() if cut.parallel else 0, cut.threads,
    )  # fmt: skip


@ordered
def work_of(n):
    """`Work` from its fields."""
    return Work(
        n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12],
    )  # fmt: skip


@ordered
def in_parts(grid, work):
    """`plan.Grid` whose chunks are parts."""
    N, C, S, tile, fold, _ = grid
    return N, C, S, tile, fold, work.part


@ordered
def channels(block, u, C):
    """First channel of block u, and the channel after its last."""
    return u * block, min((u + 1) * block, C)


def renormalise_channels(norm, m2, grid, eps, c0, c1):
    """Compute r and d of batch renormalization, and gamma and beta folded with them, in `norm`."""
    mean, _, gamma_, beta_, (population, gamma, beta, r, d) = norm
    renorm_factors(mean, m2, grid[0] * grid[2], eps, population, c0, c1, r, d)
    fold(gamma, beta, r, d, c0, c1, gamma_, beta_)


@by_types
def renormalise(norm, m2, grid, eps, c0, c1):
    """`renormalise_channels` if `norm` is for batch renormalization."""
    return renormalise_channels if len(norm) == 5 else lambda norm, m2, grid, eps, c0, c1: None


@by_types
def room(x, norm, dx, dresidual):
    """Array in which the first sweep keeps g = dy act'(z) for the second; None if it does not.

    It is dx or dresidual, unless that is in half precision or g is cheap to compute twice. It
    halves the time of silu's backward pass (32 x 64 x 56 x 56 on a Zen 3).
    """
    exact = getattr(x.types[0], "dtype", None) in (types.float32, types.float64)  # unweighted
    if not exact or len(norm) < 5 or not costs(norm.types[4]):
        return lambda x, norm, dx, dresidual: None
    return lambda x, norm, dx, dresidual: either(dx, dresidual)


def _build(
    name: str, traversal: ModuleType | SimpleNamespace
) -> tuple[SimpleNamespace, SimpleNamespace, SimpleNamespace]:
    """Make the six passes of a traversal: kernels for Python, passes for compiled code, units."""
    stats_chunk, apply_chunk = traversal.stats, traversal.apply
    backward_reduce_chunk = traversal.backward_reduce
    backward_apply_chunk = traversal.backward_apply

    @ordered
    @named(f"{name}_stats_unit")
    def stats_unit(x, grid, block, chunks, partial, u):
        c0, c1 = channels(block, u // chunks, grid[1])
        stats_chunk(x, grid, c0, c1, u % chunks, partial)

    @ordered
    @named(f"{name}_stats_pass")
    def stats(x, grid, work, eps, partial, mean, m2, rstd):
        """Mean, M2 and rstd of every channel; partial receives the moments of the chunks."""
        units = work.spans * work.chunks
        args = x, grid, work.span, work.chunks, partial
        launch((work.pool, work.threads), units, stats_unit, args)
        finish_moments(partial, _FIRST, grid[1], eps, mean, m2, rstd)

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
        """Compute norm's mean and rstd of block u, then normalise it."""
        c0, c1 = channels(block, u, grid[1])
        for k in range(partial.shape[1]):
            stats_chunk(x, grid, c0, c1, k, partial)
        finish_moments(partial, c0, c1, eps, norm[0], m2, norm[1])
        renormalise(norm, m2, grid, eps, c0, c1)
        for k in range(partial.shape[1]):
            apply_chunk(x, residual, grid, norm, floor, streamed, c0, c1, k, y)

    @ordered
    @named(f"{name}_forward_pass")
    def forward(x, residual, grid, work, norm, eps, floor, partial, m2, y):
        """`stats` to norm's mean and rstd, then `apply`."""
        if work.fused:
            streamed = work.streamed != 0
            args = x, residual, grid, work.block, norm, eps, floor, streamed, partial, m2, y
            launch((work.pool, work.threads), work.blocks, forward_block, args)
        else:
            stats(x, grid, work, eps, partial, norm[0], m2, norm[1])
            renormalise(norm, m2, grid, eps, _FIRST, grid[1])
            apply(x, residual, grid, work, norm, floor, y)

    @ordered
    @named(f"{name}_backward_reduce_unit")
    def backward_reduce_unit(dy, x, y, grid, block, chunks, norm, partial, kept, u):
        c0, c1 = channels(block, u // chunks, grid[1])
        backward_reduce_chunk(dy, x, y, grid, norm, c0, c1, u % chunks, partial, kept)

    @ordered
    @named(f"{name}_backward_reduce_pass")
    def backward_reduce(dy, x, y, grid, work, norm, partial, sums, kept):
        """sums = sum g, sum g x_hat of every channel; partial receives those of the chunks.

        g = dy act'(z); it is written to `kept`, if given.
        """
        units = work.spans * work.chunks
        args = dy, x, y, grid, work.span, work.chunks, norm, partial, kept
        launch((work.pool, work.threads), units, backward_reduce_unit, args)
        finish_sums(partial, norm, _FIRST, grid[1], x, sums)

    @ordered
    @named(f"{name}_backward_apply_unit")
    def backward_apply_unit(
        dy, x, y, grid, block, chunks, norm, sums, count, streamed, dx, dresidual, u
    ):
        c0, c1 = channels(block, u // chunks, grid[1])
        backward_apply_chunk(
            dy, x, y, grid, norm, sums, count, streamed, c0, c1, u % chunks, dx, dresidual
        )

    @ordered
    @named(f"{name}_backward_apply_pass")
    def backward_apply(dy, x, y, grid, work, norm, sums, count, dx, dresidual):
        """dx and dresidual of `nbnorm.cpu.backward_apply`, each if given."""
        units, streamed = work.strips * work.parts, work.streamed != 0
        args = (
            dy, x, y, in_parts(grid, work), work.strip, work.parts, norm, sums, count, streamed,
            dx, dresidual,
        )  # fmt: skip
        launch((work.pool, work.threads), units, backward_apply_unit, args)

    @ordered
    @named(f"{name}_backward_block")
    def backward_block(
        dy, x, y, grid, block, norm, count, streamed, partial, sums, dx, dresidual, u
    ):
        """Sums of block u, then its dx and dresidual."""
        c0, c1 = channels(block, u, grid[1])
        kept = room(x, norm, dx, dresidual)
        for k in range(partial.shape[1]):
            backward_reduce_chunk(dy, x, y, grid, norm, c0, c1, k, partial, kept)
        finish_sums(partial, norm, c0, c1, x, sums)
        g, y_, norm_ = after(kept, dy, y, norm)
        for k in range(partial.shape[1]):
            backward_apply_chunk(
                g, x, y_, grid, norm_, sums, count, streamed, c0, c1, k, dx, dresidual
            )

    @ordered
    @named(f"{name}_backward_pass")
    def backward(dy, x, y, grid, work, norm, count, partial, sums, dx, dresidual):
        """`backward_reduce`, then `backward_apply` with its sums."""
        if work.fused:
            streamed = work.streamed != 0
            args = (
                dy, x, y, grid, work.block, norm, count, streamed, partial, sums, dx, dresidual,
            )  # fmt: skip
            launch((work.pool, work.threads), work.blocks, backward_block, args)
        else:
            kept = room(x, norm, dx, dresidual)
            backward_reduce(dy, x, y, grid, work, norm, partial, sums, kept)
            g, y_, norm_ = after(kept, dy, y, norm)
            backward_apply(g, x, y_, grid, work, norm_, sums, count, dx, dresidual)

    @entry(f"{name}_stats")
    def stats_kernel(x, grid, work, eps, partial, mean, m2, rstd):
        stats(x, grid, work_of(work), eps, partial, mean, m2, rstd)

    @entry(f"{name}_apply")
    def apply_kernel(x, residual, grid, work, norm, floor, y):
        apply(x, residual, grid, work_of(work), norm, floor, y)

    @entry(f"{name}_forward")
    def forward_kernel(x, residual, grid, work, norm, eps, floor, partial, m2, y):
        forward(x, residual, grid, work_of(work), norm, eps, floor, partial, m2, y)

    @entry(f"{name}_backward_reduce")
    def backward_reduce_kernel(dy, x, y, grid, work, norm, partial, sums):
        backward_reduce(dy, x, y, grid, work_of(work), norm, partial, sums, None)

    @entry(f"{name}_backward_apply")
    def backward_apply_kernel(dy, x, y, grid, work, norm, sums, count, dx, dresidual):
        backward_apply(dy, x, y, grid, work_of(work), norm, sums, count, dx, dresidual)

    @entry(f"{name}_backward")
    def backward_kernel(dy, x, y, grid, work, norm, count, partial, sums, dx, dresidual):
        backward(dy, x, y, grid, work_of(work), norm, count, partial, sums, dx, dresidual)

    return (
        SimpleNamespace(
            stats=stats_kernel, apply=apply_kernel, forward=forward_kernel,
            backward_reduce=backward_reduce_kernel, backward_apply=backward_apply_kernel,
            backward=backward_kernel,
        ),
        SimpleNamespace(
            stats=stats, apply=apply, forward=forward,
            backward_reduce=backward_reduce, backward_apply=backward_apply, backward=backward,
        ),
        SimpleNamespace(
            stats=stats_unit, apply=apply_unit, forward=forward_block,
            backward_reduce=backward_reduce_unit, backward_apply=backward_apply_unit,
            backward=backward_block,
        ),
    )  # fmt: skip


rows, rows_passes, rows_units = _build("rows", _rows)
columns, columns_passes, columns_units = _build("columns", _columns)
weighted_rows, _, _ = _build("weighted_rows", _weighted_rows)
weighted_columns, _, _ = _build("weighted_columns", _weighted_columns)


@entry("weigh")
def weigh(w, N, S, partial, pool, threads):
    """partial[u] = sums of weights of shape (N, C, S) over an equal share of the samples."""
    launch((pool, threads), partial.shape[0], weigh_unit, (w, N, S, partial))


@entry("rstd_all")
def rstd_all(var, eps, rstd):
    """rstd = 1 / sqrt(var + eps) of every channel."""
    for c in range(var.size):
        rstd[c] = rstd_of(var[c], eps)


@entry("renorm_factors")
def renorm_factors_all(mean, m2, count, eps, population, r, d):
    """`renorm_factors` of every channel, for moments that were computed before."""
    renorm_factors(mean, m2, count, eps, population, _FIRST, np.int64(mean.size), r, d)


@ordered
def inference_statistics(running_mean, running_var, eps, mean, rstd):
    """Mean and rstd of every channel from running statistics, in float64."""
    for c in range(mean.size):
        mean[c] = running_mean[c]
        rstd[c] = rstd_of(np.float64(running_var[c]), eps)


@ordered
def move_pass(running_mean, running_var, mean, m2, momentum, divisor):
    """running = (1 - momentum) running + momentum batch; the batch's variance is M2 / divisor."""
    old = 1.0 - momentum
    for c in range(mean.size):
        running_mean[c] = old * running_mean[c] + momentum * mean[c]
        running_var[c] = old * running_var[c] + momentum * (m2[c] / divisor)


@entry("move")
def move(running_mean, running_var, mean, m2, momentum, divisor):
    """`move_pass` for Python."""
    move_pass(running_mean, running_var, mean, m2, momentum, divisor)


def cache_folder() -> str | None:
    """Return the folder of compiled kernels, or None if they are not kept."""
    folder: str | None = rows.stats._cache.cache_path
    return folder
