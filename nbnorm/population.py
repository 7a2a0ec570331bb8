"""Statistics of data larger than memory, and of the inputs of layers over many batches.

Both merge the count, mean and M2 of parts, so every value has the same weight however the data is
split.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any

import numpy as np

from nbnorm import _checks, _sources
from nbnorm._arrays import on_host, take
from nbnorm._checkpoint import Checkpoint, values_of
from nbnorm._pairwise import Pairwise
from nbnorm._typing import Array, NamedAxis
from nbnorm.functional import batch_norm_stats
from nbnorm.layer import BatchNorm
from nbnorm.moments import Moments

__all__ = ["population_stats", "recalibrate"]

# Values: 32 MiB of float32. For a file in the page cache, chunks of an eighth of that took 1.06 to
# 1.35 times as long, and of a 128th 2 to 3 times (benchmarks/population.py chunks).
CHUNK = 1 << 23

# Blocks of a dask array from one checkpoint to the next. A power of two, so that they are merged in
# the same pairs as all blocks together.
BLOCKS = 64

Progress = bool | Callable[[int, int | None], object]


def population_stats(
    data: Array | Iterable[Array],
    *,
    axis: NamedAxis = 1,
    chunk: int = CHUNK,
    progress: Progress = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Moments:
    """Compute count, mean and M2 per channel of data that need not fit into memory.

    Parameters
    ----------
    data : array, or iterable of arrays
        An array that `batch_norm_stats` accepts, a memory map, an xarray.DataArray, or an object
        that reads an array when sliced (a dataset of Zarr or h5py). An iterable of these (files, a
        generator of batches) is consumed once; its arrays must agree only in the shape of the
        channel axes. A dask array, also inside a DataArray, is processed block by block, after
        rechunking so that blocks span the channel axes.
    axis : int, str, or tuple of these, default 1
        Channel axes of each array: the axes that **keep** their statistics, not the axes to
        reduce. A str is the name of a dimension of a DataArray.
    chunk : int, default 8388608
        Maximum number of values to process at a time. Arrays are split along the reduced axes,
        the outermost in memory first. Zarr and HDF5 arrays are split at the borders of the file's
        chunks, each decompressed once; pieces have at most chunk / 5 values, but at least one of
        the file's chunks. Has no effect on dask arrays.
    progress : bool or callable, default False
        Whether to show a progress bar of the values processed, which needs the ``progress`` extra.
        A callable is called as ``progress(done, total)`` before the first chunk and after each:
        with the number of values processed, and that of all, or None if that is unknown before an
        iterable ends. What it returns is ignored; what it raises ends the call. Distributed dask
        schedulers report only the end.
    checkpoint : str or path, optional
        A file that saves progress: to resume an interrupted call, repeat it with the same
        arguments. See Notes.

    Returns
    -------
    Moments
        (count, mean, m2) of all values together, arrays of the first chunk's library: NumPy's for
        files and DataArrays. The same chunks always give the same bits; other chunks may change the
        last bits.

    Raises
    ------
    TypeError
        `data` is neither an array nor an iterable of arrays, or an array has a dtype that
        `batch_norm_stats` does not accept. Data, or an item of it, holds arrays by name (a data
        frame, a dict). An axis is a name, but the array has none. `progress` is neither a bool nor
        callable; `checkpoint` is no path.
    ValueError
        `data` has no arrays; channel axes have different shapes; axis is invalid; chunk is less
        than 1; `checkpoint` is empty, a file of something else, or of a call with other data.
    OSError
        `checkpoint` is a folder, or cannot be read or written.
    ImportError
        `progress` is True and tqdm is not installed.

    Notes
    -----
    Chunks are merged in pairs, then pairs of pairs, and so on, with the formula of Chan, Golub &
    LeVeque (1983). Each value passes through log2(n) merges for n chunks, not n. For 100,000 chunks
    of a few float64 values with a mean of 1e6 standard deviations, the mean is off by 3 roundings;
    merging in sequence gives 280.

    If slicing reads or copies (Zarr, h5py, arrays without an (N, C, S) view), memory holds one
    piece. Zarr and HDF5 add the file's chunks that they read, compressed and decompressed: with
    pieces of `chunk` / 5, less than 2 `chunk` values in all, unless one chunk of the file is more.
    A memory map takes only pages that the system can reclaim. A dask array is computed by its
    scheduler in one go, so memory holds as many blocks as the scheduler works on.

    `checkpoint` is written when an exception ends the call, and otherwise so rarely that it takes
    at most 2 % of the time. It is replaced atomically, and removed when a call completes. It holds
    the moments still to be merged and the number of chunks in them, so a resumed call gives the
    same bits as one that was not interrupted. Pass it the same data, axis and chunk: shapes and
    dtypes are verified, values are not. It skips the finished chunks of an array without reading
    them; from an iterable it draws them and drops them. With a checkpoint, 64 blocks of a dask
    array are computed at a time; what they share with other blocks is computed again.

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

    Go on after an interruption:

    >>> import os, tempfile
    >>> x = np.arange(30.0).reshape(10, 3)
    >>> def interrupted(done, total):
    ...     if done == 15:
    ...         raise KeyboardInterrupt
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = os.path.join(folder, "checkpoint.npz")
    ...     try:
    ...         population_stats(x, chunk=3, checkpoint=file, progress=interrupted)
    ...     except KeyboardInterrupt:
    ...         stats = population_stats(x, chunk=3, checkpoint=file)  # reads 5 rows
    >>> stats.count, stats.mean
    (10, array([13.5, 14.5, 15.5]))
    """
    named, chunk = _sources.checked_axis(axis), _checks.at_least_one(chunk, "chunk")
    arrays = _sources.arrays_of(data)
    with _shown(progress) as show, Checkpoint(checkpoint) as merged:
        run = _Run(arrays, merged, show)
        number = 0
        for array in arrays:  # not enumerate, which holds an array until it has the next
            try:
                run.merge(_sources.Source(array, named), chunk, checkpoint is None)
            except (TypeError, ValueError) as error:
                error.add_note(f"(array {number} of data)")
                raise
            number += 1
            del array  # keep only one in memory
        if not number:
            raise ValueError("data has no arrays, expected at least one")
        return merged.total()


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
    """Return the `num_batches_tracked` to set for the batches seen; None keeps the layer's.

    It matters only if it weights batches. PyTorch's `update_bn` leaves the number of batches seen;
    here it replaces only the 0 of a layer that has not been trained.
    """
    weighted = layer.momentum is None or getattr(layer, "debias", False)
    return len(seen) if weighted and layer.num_batches_tracked == 0 else None


class _Run:
    """Merges the moments of data's arrays, and reports the progress."""

    def __init__(
        self,
        arrays: Iterable[Any],
        merged: Checkpoint,
        show: Callable[[int, int | None], object] | None,
    ) -> None:
        self._arrays, self._merged, self._show = arrays, merged, show
        self._channels: tuple[int, ...] | None = None
        self._begun, self._done = False, merged.values()
        self._total: int | None = None

    def merge(self, source: _sources.Source, chunk: int, at_once: bool) -> None:
        """Merge an array's moments; all blocks of a dask array `at_once`, or some at a time."""
        if self._channels not in (None, source.channels):
            raise ValueError(
                f"data has channel axes of shape {source.channels}, expected {self._channels}, "
                "that of the arrays before"
            )
        self._channels = source.channels
        array = source.array
        described = source.shape, getattr(array, "dtype", None), source.axes
        if not _sources.of_dask(array):
            for cut in source.cuts(chunk):
                if not self._merged.has_next(described, cut):
                    self._merged.add(self._of_pieces(source, cut))
                    self._tell()
            return
        _sources.check_type(np.empty(0, array.dtype))
        blocks = array.rechunk(dict.fromkeys(source.axes, -1)).to_delayed().ravel()
        step = len(blocks) if at_once else BLOCKS
        for i in range(0, len(blocks), step):
            if not self._merged.has_next(described, len(blocks), i):
                self._merged.add(self._of_blocks(source, blocks[i : i + step]))
                self._tell()

    def _of_pieces(self, source: _sources.Source, cut: list[_sources.Index]) -> Moments:
        """Return the moments of pieces that follow each other along the channel axes."""
        if len(cut) == 1:
            return self._of_piece(source, cut[0])
        mean, m2 = np.empty(source.channels), np.empty(source.channels)
        for index in cut:
            if index is not cut[0]:
                self._tell()
            part = self._of_piece(source, index)
            where = tuple(index[a] for a in source.axes)
            mean[where], m2[where] = on_host(take(part.mean, "mean")), on_host(take(part.m2, "m2"))
        return Moments(part.count, mean, m2)

    def _of_piece(self, source: _sources.Source, index: _sources.Index) -> Moments:
        piece = source.read(index)
        self._begin()
        moments = batch_norm_stats(piece, axis=source.axis)
        self._done += prod(piece.shape)
        return moments

    def _of_blocks(self, source: _sources.Source, blocks: Any) -> Moments:
        """Compute the moments of a dask array's blocks, in one graph that returns only them."""
        from dask import delayed
        from dask.callbacks import Callback

        stats_of = delayed(batch_norm_stats)
        parts = [stats_of(block, axis=source.axis) for block in blocks]
        merged = Pairwise()
        for part in parts:
            merged.add(part)
        keys, before = {part.key for part in parts}, self._done

        def count(key: Any, result: Any, *_: Any) -> None:
            if key in keys:
                self._done += values_of(result)
                self._tell()

        self._begin()
        with Callback(posttask=count):  # schedulers of several machines do not call it
            moments: Moments = merged.total().compute()
        self._done = before + values_of(moments)
        return moments

    def _begin(self) -> None:
        """Report the checkpoint's progress, once the first piece has passed the checks."""
        if not self._begun:
            self._begun = True
            self._total = _size(self._arrays)
            self._tell()

    def _tell(self) -> None:
        if self._show is not None:
            self._show(self._done, self._total)


@contextmanager
def _shown(progress: Progress) -> Iterator[Callable[[int, int | None], object] | None]:
    """Yield the callback that shows progress, or None."""
    if not (callable(progress) or isinstance(progress, bool | np.bool_)):
        raise TypeError(f"progress must be a bool or callable, got {progress!r}")
    if callable(progress) or not progress:
        yield progress if callable(progress) else None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            'a progress bar needs tqdm: pip install "nbnorm-kernels[progress]"'
        ) from error
    with ExitStack() as shown:
        bars: list[Any] = []

        def show(done: int, total: int | None) -> None:
            if bars:
                bars[0].update(done - bars[0].n)
                return
            bar = tqdm(
                desc="population statistics",
                total=total,
                initial=done,
                unit=" values",
                unit_scale=True,
            )
            bars.append(shown.enter_context(bar))

        yield show


def _size(arrays: Iterable[Array]) -> int | None:
    """Return the number of values, or None if it is unknown without iterating."""
    if not isinstance(arrays, Sequence):
        return None
    size = sum(prod(getattr(array, "shape", ())) for array in arrays)
    return size if size == size else None  # the shape of a dask array may have NaN
