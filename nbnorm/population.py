"""Statistics of data larger than memory, and of the inputs of layers over many batches.

Both merge count, mean and M2 of parts: however they are cut, each value weighs the same.
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
from nbnorm._arrays import take_floating
from nbnorm._typing import Array, Axis
from nbnorm.functional import batch_norm_stats
from nbnorm.layer import BatchNorm
from nbnorm.moments import Moments, Pairwise

__all__ = ["population_stats", "recalibrate"]

# 32 MiB of float32. An eighth of that took 1.06 to 1.35 times as long for a file in the page cache,
# a 128th 2 to 3 times (benchmarks/population.py chunks).
CHUNK = 1 << 23


def population_stats(
    data: Array | Iterable[Array], *, axis: Axis = 1, chunk: int = CHUNK, progress: bool = False
) -> Moments:
    """Count, mean and M2 of every channel of data that need not fit into memory.

    Parameters
    ----------
    data : array, or iterable of arrays
        Any array of `batch_norm_stats`, a memory map, or what reads an array when it is sliced (a
        dataset of h5py); an iterable of such (files, a generator of batches),
        which is gone through once and may differ in all but the channel axes; one dask array, whose
        blocks are taken as they are, but for the channel axes, which are brought together.
    axis : int or tuple of int, default 1
        Channel axes of each array: those that **keep** their statistics, not those that are
        reduced.
    chunk : int, default 8388608
        How many values to take at a time. An array is cut along the axes that are reduced, the
        outermost in memory first.
    progress : bool, default False
        Whether to show a bar of the values taken (of a dask array: of its tasks), which needs the
        extra ``progress``.

    Returns
    -------
    Moments
        (count, mean, m2) of all values together, arrays of the library of the first chunk. The
        same for the same chunks, always; other chunks may change the last bits.

    Raises
    ------
    TypeError
        `data` is neither; an array of another dtype than `batch_norm_stats` takes: integers, such
        as images, go in as ``(array.astype("f4") for array in arrays)``.
    ValueError
        There is no array; channel axes of different shapes; an axis that does not fit; a chunk of
        less than one value.
    ImportError
        A bar without tqdm.

    Notes
    -----
    Chunks are merged in pairs, pairs of pairs, and so on, by the formula of Chan, Golub & LeVeque
    (1983): a value goes through log2 of the number of merges that it would in sequence. 100,000
    chunks of a few float64 values with a mean of 1e6 standard deviations leave the mean wrong by 3
    roundings; in sequence it is 280.

    Memory holds one chunk, where slicing reads or copies (h5py, arrays without an (N, C, S) view),
    and nothing of a memory map but pages that the system takes back. A dask array is computed at
    once, by its scheduler: as many blocks are held as that works on.

    Examples
    --------
    >>> import numpy as np
    >>> from nbnorm.population import population_stats
    >>> batches = (np.full((n, 1), float(n)) for n in (1, 3))  # 1 once, 3 three times
    >>> stats = population_stats(batches)
    >>> stats.mean, stats.var()
    (array([2.5]), array([0.75]))

    The statistics of a layer that sees the data itself:

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
                    if bar is None:  # with the first piece that is right
                        bar = shown.enter_context(bar_of(_size(arrays)))
                    moments = batch_norm_stats(piece, axis=axis)
                    shape = tuple(moments.mean.shape)
                    if channels not in (None, shape):
                        raise ValueError(
                            f"data has channel axes of shape {channels} and then of {shape}"
                        )
                    channels = shape
                    merged.add(moments)
                    if progress:
                        bar.update(prod(piece.shape))
            except (TypeError, ValueError) as error:
                error.add_note(f"(array {i} of data)")
                raise
    if not merged:
        raise ValueError("data has no arrays, so that not even the number of channels is known")
    total: Moments = merged.total()
    return total


@contextmanager
def recalibrate(*layers: BatchNorm) -> Iterator[None]:
    """Within a ``with``, collect what layers see; at its end make that their running statistics.

    Every forward of a layer within the block normalises by the statistics of its batch, as in
    training, whatever the layer's mode. The running statistics stay as they are until the block has
    ended without an exception; then each layer gets those of all the values that it has seen
    together, batches weighted by their sizes. A layer that has seen no values keeps its own.

    Parameters
    ----------
    *layers : BatchNorm
        Usually all of a network; one that stands in several places of it counts once, with what it
        sees in all of them. `SyncBatchNorm` collects what all ranks see.

    Returns
    -------
    context manager
        For a ``with`` statement, to which it gives nothing.

    Raises
    ------
    TypeError
        A layer that is no BatchNorm.
    ValueError
        No layer, one that keeps no running statistics or is being recalibrated already; within the
        block, a batch of too few values, as in training; at its end, when none has seen a value.

    Notes
    -----
    Ioffe & Szegedy (2015), Algorithm 2, lines 8 to 10, for fixed parameters, with the exact
    statistics of the population in place of averages over batches, which weigh every batch the same
    and leave out the variance between their means.

    Modes, parameters and ``num_batches_tracked`` stay what they were.

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
        raise ValueError("there is no layer to recalibrate")
    for layer in layers:
        if not isinstance(layer, BatchNorm):
            raise TypeError(f"layers must be of BatchNorm, got {type(layer).__qualname__}")
        if layer.running_mean is None:
            raise ValueError(f"{layer} keeps no running statistics")
        if layer._seen is not None:
            raise ValueError(f"{layer} is being recalibrated already")
    with ExitStack() as block:
        seen = [block.enter_context(layer._collecting()) for layer in layers]
        yield
    if not any(seen):
        raise ValueError("none of the layers has seen a value")
    for layer, merged in zip(layers, seen, strict=True):
        if merged:
            layer.set_statistics(merged.total())


def _of_dask(data: Any, axis: Axis, progress: bool) -> Moments:
    """Statistics of a dask array: one graph, of which its scheduler returns C numbers."""
    from dask import delayed

    axes, _, _ = _checks.channel_axes(data.shape, _checks.axes(axis), "data")
    take_floating(np.empty(0, data.dtype), "data")
    stats_of = delayed(batch_norm_stats)
    merged = Pairwise()
    for block in data.rechunk(dict.fromkeys(axes, -1)).to_delayed().ravel():
        merged.add(stats_of(block, axis=axis))
    with _bar(progress, of_dask=True)():
        stats: Moments = merged.total().compute()
    return stats


def _pieces(array: Any, axis: Axis, chunk: int) -> Iterator[Array]:
    """Cut an array, along axes that are reduced, into pieces of `chunk` values at most."""
    if not hasattr(array, "shape"):
        take_floating(array, "data")  # which refuses what is no array
    shape = tuple(array.shape)
    axes, _, _ = _checks.channel_axes(shape, _checks.axes(axis), "data")
    size, steps = prod(shape), list(shape)
    if size > chunk:
        # Along the innermost axis each page of a map would be read for every piece.
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
        take_floating(piece, "data")
        yield piece
        del piece  # memory holds one


def _bar(progress: bool, *, of_dask: bool = False) -> Callable[..., AbstractContextManager[Any]]:
    """What shows a progress bar, to be updated by numbers of values, of this total, or by dask."""
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
    """How many values there are, where that is known without going through them."""
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
