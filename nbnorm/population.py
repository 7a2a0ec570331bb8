"""Statistics of data larger than memory, and of the inputs of layers over many batches.

Both merge the count, mean and M2 of parts, so every value has the same weight however the data is
split.
"""

import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import product
from math import prod
from typing import Any

import numpy as np

from nbnorm import _checks
from nbnorm._arrays import take_numbers
from nbnorm._typing import Array, Axis
from nbnorm.functional import batch_norm_stats
from nbnorm.layer import BatchNorm
from nbnorm.moments import Moments, Pairwise

__all__ = ["population_stats", "recalibrate"]

# Values: 32 MiB of float32. For a file in the page cache, chunks of an eighth of that took 1.06 to
# 1.35 times as long, and of a 128th 2 to 3 times (benchmarks/population.py chunks).
CHUNK = 1 << 23


def population_stats(
    data: Array | Iterable[Array], *, axis: Axis = 1, chunk: int = CHUNK, progress: bool = False
) -> Moments:
    """Compute count, mean and M2 per channel of data that need not fit into memory.

    Parameters
    ----------
    data : array, or iterable of arrays
        An array that `batch_norm_stats` accepts, a memory map, or an object that reads an array
        when sliced (an h5py dataset). An iterable of these (files, a generator of batches) is
        consumed once; its arrays must agree only in the shape of the channel axes. A dask array
        is processed block by block, after rechunking so that blocks span the channel axes.
    axis : int or tuple of int, default 1
        Channel axes of each array: the axes that **keep** their statistics, not the axes to
        reduce.
    chunk : int, default 8388608
        Maximum number of values to process at a time. Arrays are split along the reduced axes,
        the outermost in memory first. Has no effect on dask arrays.
    progress : bool, default False
        Whether to show a progress bar of the values processed (for a dask array, of its tasks).
        Needs the ``progress`` extra.

    Returns
    -------
    Moments
        (count, mean, m2) of all values together, arrays of the first chunk's library. The same
        chunks always give the same bits; other chunks may change the last bits.

    Raises
    ------
    TypeError
        `data` is neither an array nor an iterable of arrays, or an array has a dtype that
        `batch_norm_stats` does not accept.
    ValueError
        `data` has no arrays; channel axes have different shapes; axis is invalid; chunk is less
        than 1.
    ImportError
        `progress` is True and tqdm is not installed.

    Notes
    -----
    Chunks are merged in pairs, then pairs of pairs, and so on, with the formula of Chan, Golub &
    LeVeque (1983). Each value passes through log2(n) merges for n chunks, not n. For 100,000 chunks
    of a few float64 values with a mean of 1e6 standard deviations, the mean is off by 3 roundings;
    merging in sequence gives 280.

    If slicing reads or copies (h5py, arrays without an (N, C, S) view), memory holds one chunk. A
    memory map takes only pages that the system can reclaim. A dask array is computed by its
    scheduler in one go, so memory holds as many blocks as the scheduler works on.

    Examples
    --------
    >>> import numpy as np
    >>> from nbnorm.population import population_stats
    >>> batches = (np.full((n, 1), float(n)) for n in (1, 3))  # 1 once, 3 three times
    >>> stats = population_stats(batches)
    >>> stats.mean, stats.var()
    (array([2.5]), array([0.75]))

    Set the running statistics of a layer whose inputs are the data itself:

    >>> from nbnorm import BatchNorm
    >>> layer = BatchNorm(1)
    >>> layer.set_statistics(population_stats(np.arange(9.0).reshape(9, 1), axis=layer.axis))
    >>> layer.running_mean, layer.running_var
    (array([4.], dtype=float32), array([7.5], dtype=float32))
    """
    _checks.axes(axis)
    chunk = _positive(chunk)
    dask = sys.modules.get("dask.array")
    if dask is not None and isinstance(data, dask.Array):
        return _of_dask(data, axis, progress)
    arrays = [data] if hasattr(data, "shape") else data
    if not isinstance(arrays, Iterable):
        raise TypeError(
            "data must be an array or an iterable of arrays, "
            f"got {type(data).__module__}.{type(data).__qualname__}"
        )
    merged = Pairwise()
    channels = None
    bar_of = _bar(progress)
    with ExitStack() as shown:
        bar = None
        for i, array in enumerate(arrays):
            try:
                for piece in _pieces(array, axis, chunk):
                    if bar is None:  # only once a piece has passed the checks
                        bar = shown.enter_context(bar_of(_size(arrays)))
                    moments = batch_norm_stats(piece, axis=axis)
                    shape = tuple(moments.mean.shape)
                    if channels not in (None, shape):
                        raise ValueError(
                            f"data has channel axes of shape {shape}, expected {channels}, the "
                            "shape in the arrays before"
                        )
                    channels = shape
                    merged.add(moments)
                    if progress:
                        bar.update(prod(piece.shape))
            except (TypeError, ValueError) as error:
                error.add_note(f"(array {i} of data)")
                raise
    if not merged:
        raise ValueError("data has no arrays, expected at least one")
    total: Moments = merged.total()
    return total


@contextmanager
def recalibrate(*layers: BatchNorm) -> Iterator[None]:
    """Collect the layers' input statistics inside the block; store them on exit.

    Inside the ``with`` block, every forward call of a layer normalises with the statistics of its
    batch, as in training, whatever the layer's mode, and without `renorm`. If the block ends
    without an exception, the running statistics of each layer become those of all values it has
    seen, with batches weighted by their sizes. Until then they do not change. A layer that has
    seen no values keeps its running statistics.

    Parameters
    ----------
    *layers : BatchNorm
        Usually all batch norms of a network. A layer used in several places collects its inputs
        from all of them. `SyncBatchNorm` collects the inputs of all ranks.

    Returns
    -------
    context manager
        For use in a ``with`` statement. It yields None.

    Raises
    ------
    TypeError
        A layer is not a BatchNorm.
    ValueError
        No layer is given; a layer keeps no running statistics or is already being recalibrated;
        inside the block, a batch has too few values for training; on exit, no layer has seen a
        value.

    Notes
    -----
    Implements lines 8 to 10 of Algorithm 2 of Ioffe & Szegedy (2015) for fixed parameters. The
    paper averages over batches, which weights all batches equally and omits the variance between
    their means. This function computes the exact population statistics.

    Modes and parameters do not change, nor does ``num_batches_tracked``, unless it is 0 and weights
    batches (``momentum=None``, ``debias=True``): it then becomes the number of batches seen, so
    that the next batch in training does not replace the statistics.

    Examples
    --------
    >>> import numpy as np
    >>> from nbnorm import BatchNorm
    >>> from nbnorm.population import recalibrate
    >>> layer = BatchNorm(1)
    >>> with recalibrate(layer):
    ...     for batch in (np.zeros((2, 1)), np.array([[1.0], [2.0], [3.0], [6.0]])):
    ...         y = layer.forward(batch)
    >>> layer.running_mean, layer.running_var
    (array([2.], dtype=float32), array([5.2], dtype=float32))
    """
    layers = tuple(dict.fromkeys(layers))
    if not layers:
        raise ValueError("layers is empty, expected at least one layer")
    for layer in layers:
        if not isinstance(layer, BatchNorm):
            raise TypeError(f"layers must be BatchNorm, got {type(layer).__qualname__}")
        if layer.running_mean is None:
            raise ValueError(f"{layer} has no running statistics (track_running_stats=False)")
        if layer._seen is not None:
            raise ValueError(f"{layer} is already being recalibrated")
    with ExitStack() as block:
        seen = [block.enter_context(layer._collecting()) for layer in layers]
        yield
    if not any(seen):
        raise ValueError("layers received no values within the block, expected at least one batch")
    for layer, merged in zip(layers, seen, strict=True):
        if merged:
            layer.set_statistics(merged.total(), num_batches_tracked=batches_of(layer, merged))


def batches_of(layer: Any, seen: Pairwise) -> int | None:
    """Return as how many batches the statistics of those seen count, None for the layer's own.

    That number matters where it weights batches. PyTorch's `update_bn` leaves the number of batches
    seen; here it replaces only the 0 of a layer that has not been trained.
    """
    weighted = layer.momentum is None or getattr(layer, "debias", False)
    return len(seen) if weighted and layer.num_batches_tracked == 0 else None


def _of_dask(data: Any, axis: Axis, progress: bool) -> Moments:
    """Compute the moments of a dask array in one graph, which returns only the merged result."""
    from dask import delayed

    axes, _, _ = _checks.channel_axes(data.shape, _checks.axes(axis), "data")
    take_numbers(np.empty(0, data.dtype), "data")
    stats_of = delayed(batch_norm_stats)
    merged = Pairwise()
    for block in data.rechunk(dict.fromkeys(axes, -1)).to_delayed().ravel():
        merged.add(stats_of(block, axis=axis))
    with _bar(progress, of_dask=True)():
        stats: Moments = merged.total().compute()
    return stats


def _pieces(array: Any, axis: Axis, chunk: int) -> Iterator[Array]:
    """Yield pieces of at most `chunk` values, cut along the reduced axes of an array."""
    if not hasattr(array, "shape"):
        take_numbers(array, "data")  # raises, as this is not an array
    shape = tuple(array.shape)
    axes, _, _ = _checks.channel_axes(shape, _checks.axes(axis), "data")
    size, steps = prod(shape), list(shape)
    if size > chunk:
        # Cuts along the innermost axis would read every page of a memory map for every piece.
        strides = getattr(array, "strides", None) or range(len(shape), 0, -1)
        for a in sorted(set(range(len(shape))) - set(axes), key=lambda a: -abs(strides[a])):
            size //= shape[a]
            steps[a] = max(1, min(chunk // size, shape[a]))
    cuts = (
        [slice(begin, min(begin + step, length)) for begin in range(0, max(length, 1), step or 1)]
        for length, step in zip(shape, steps, strict=True)
    )
    for index in product(*cuts):
        piece = array[index]
        take_numbers(piece, "data")
        yield piece
        del piece  # keep only one piece in memory


def _bar(progress: bool, *, of_dask: bool = False) -> Callable[..., AbstractContextManager[Any]]:
    """Return a function that opens a progress bar, updated with numbers of values or by dask."""
    title = "population statistics"
    if not progress:
        return nullcontext
    try:
        if of_dask:
            from tqdm.dask import TqdmCallback

            return partial(TqdmCallback, desc=title, unit=" tasks")
        from tqdm.auto import tqdm

        return lambda total: tqdm(desc=title, total=total, unit=" values", unit_scale=True)
    except ImportError as error:
        raise ImportError(
            'a progress bar needs tqdm: pip install "nbnorm-kernels[progress]"'
        ) from error


def _size(arrays: Iterable[Array]) -> int | None:
    """Return the number of values, or None if only iterating over the arrays would tell."""
    if not isinstance(arrays, Sequence):
        return None
    return sum(prod(getattr(array, "shape", ())) for array in arrays)


def _positive(chunk: Any) -> int:
    try:
        values = operator.index(chunk)
    except TypeError:
        raise TypeError(f"chunk must be an int, got {chunk!r}") from None
    if values < 1:
        raise ValueError(f"chunk must be at least 1, got {values}")
    return values
