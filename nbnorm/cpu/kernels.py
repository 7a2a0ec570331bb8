"""The loops over chunks and blocks of channels, one source for rows and columns.

A kernel is one prange whose body is one call to a serial function; its serial twin makes the same
calls in order. There are two ways through a pass. `stats` then `apply`, and `reduce` then
`differentiate`, share out every (block, chunk) of the work. `forward` and `backward` give a thread
a block of channels for both steps: the block is still in its cache for the second one.
"""

from types import ModuleType, SimpleNamespace

from numba import prange

from nbnorm.cpu import columns as _columns
from nbnorm.cpu import rows as _rows
from nbnorm.cpu.channel import finish, finish_sums, rstd_of
from nbnorm.cpu.jit import entry, kernel, named, ordered


@ordered
def channels(block, u, C):
    """First channel of block u and the one after its last."""
    return u * block, min((u + 1) * block, C)


def _build(traversal: ModuleType) -> tuple[SimpleNamespace, SimpleNamespace]:
    """Make the six kernels of a traversal, each compiled at its first call, and their units."""
    name = traversal.__name__.rpartition(".")[2]
    stats_chunk, apply_chunk = traversal.stats, traversal.apply
    reduce_chunk, differentiate_chunk = traversal.reduce, traversal.differentiate

    @ordered
    @named(f"{name}_stats_unit")
    def stats_unit(x, grid, block, chunks, partial, u):
        c0, c1 = channels(block, u // chunks, grid[1])
        stats_chunk(x, grid, c0, c1, u % chunks, partial)

    @kernel(f"{name}_stats")
    def stats(x, grid, block, chunks, units, partial):
        for u in prange(units):
            stats_unit(x, grid, block, chunks, partial, u)

    @ordered
    @named(f"{name}_apply_unit")
    def apply_unit(x, residual, grid, block, chunks, norm, floor, streamed, y, u):
        c0, c1 = channels(block, u // chunks, grid[1])
        apply_chunk(x, residual, grid, norm, floor, streamed, c0, c1, u % chunks, y)

    @kernel(f"{name}_apply")
    def apply(x, residual, grid, block, chunks, units, norm, floor, streamed, y):
        for u in prange(units):
            apply_unit(x, residual, grid, block, chunks, norm, floor, streamed, y, u)

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

    @kernel(f"{name}_forward")
    def forward(x, residual, grid, block, units, norm, eps, floor, streamed, partial, m2, y):
        for u in prange(units):
            forward_block(x, residual, grid, block, norm, eps, floor, streamed, partial, m2, y, u)

    @ordered
    @named(f"{name}_reduce_unit")
    def reduce_unit(dy, x, y, grid, block, chunks, norm, partial, u):
        c0, c1 = channels(block, u // chunks, grid[1])
        reduce_chunk(dy, x, y, grid, norm, c0, c1, u % chunks, partial)

    @kernel(f"{name}_reduce")
    def reduce(dy, x, y, grid, block, chunks, units, norm, partial):
        for u in prange(units):
            reduce_unit(dy, x, y, grid, block, chunks, norm, partial, u)

    @ordered
    @named(f"{name}_differentiate_unit")
    def differentiate_unit(
        dy, x, y, grid, block, chunks, norm, sums, count, streamed, dx, dresidual, u
    ):
        c0, c1 = channels(block, u // chunks, grid[1])
        differentiate_chunk(
            dy, x, y, grid, norm, sums, count, streamed, c0, c1, u % chunks, dx, dresidual
        )

    @kernel(f"{name}_differentiate")
    def differentiate(
        dy, x, y, grid, block, chunks, units, norm, sums, count, streamed, dx, dresidual
    ):
        for u in prange(units):
            differentiate_unit(
                dy, x, y, grid, block, chunks, norm, sums, count, streamed, dx, dresidual, u
            )

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

    @kernel(f"{name}_backward")
    def backward(dy, x, y, grid, block, units, norm, count, streamed, partial, sums, dx, dresidual):
        for u in prange(units):
            backward_block(
                dy, x, y, grid, block, norm, count, streamed, partial, sums, dx, dresidual, u
            )

    return SimpleNamespace(
        stats=stats,
        apply=apply,
        forward=forward,
        reduce=reduce,
        differentiate=differentiate,
        backward=backward,
    ), SimpleNamespace(
        stats=stats_unit,
        apply=apply_unit,
        forward=forward_block,
        reduce=reduce_unit,
        differentiate=differentiate_unit,
        backward=backward_block,
    )


rows, rows_units = _build(_rows)
columns, columns_units = _build(_columns)


@entry("finish_all")
def finish_all(partial, eps, mean, m2, rstd):
    """Mean, M2 and rstd of every channel, after `stats`."""
    finish(partial, 0, mean.size, eps, mean, m2, rstd)


@entry("rstd_all")
def rstd_all(var, eps, rstd):
    """rstd of every channel's variance."""
    for c in range(var.size):
        rstd[c] = rstd_of(var[c], eps)


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


@entry("finish_all_sums")
def finish_all_sums(partial, norm, x, sums):
    """The sums of every channel, after `reduce`."""
    finish_sums(partial, norm, 0, sums.shape[1], x, sums)


def cache_folder() -> str | None:
    """Return the folder that compiled kernels are kept in, None where they are not."""
    folder: str | None = rows.stats.parallel._cache.cache_path
    return folder
