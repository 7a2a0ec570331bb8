"""Arrays that need not fit into memory: what is accepted, where it is cut, how a piece is read."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from math import prod
from typing import Any

from nbnorm import _checks
from nbnorm._arrays import take_numbers
from nbnorm._typing import Array

Index = tuple[slice, ...]


def arrays_of(data: Any) -> Iterable[Any]:
    """Return `data` as an iterable of arrays, or raise TypeError."""
    _check_names(data)
    if hasattr(data, "shape"):
        return (data,)
    if not isinstance(data, Iterable):
        raise _no_arrays(data)
    return data


def checked_axis(axis: Any) -> tuple[int | str, ...]:
    """Return axis as a tuple, or raise TypeError; names are looked up in each array."""
    given = axis if isinstance(axis, tuple) else (axis,)
    if not any(isinstance(a, str) for a in given):
        return _checks.axes(axis)
    return tuple(a if isinstance(a, str) else _checks.axes(a)[0] for a in given)


def of_dask(array: Any) -> bool:
    """Return True for a dask array."""
    dask = sys.modules.get("dask.array")
    return dask is not None and isinstance(array, dask.Array)


def check_type(array: Any) -> None:
    """Raise if this is not an array, or of a dtype that `batch_norm_stats` does not accept."""
    take_numbers(array, "data")


class Source:
    """An array, or an object that reads one when sliced, and its channel axes.

    `array` is what is sliced: for an xarray.DataArray its dask array or else its Variable, whose
    slices need no coordinates.
    """

    def __init__(self, array: Any, axis: tuple[int | str, ...]) -> None:
        _check_names(array)
        if not hasattr(array, "shape"):
            check_type(array)  # raises, as this is not an array
        self._labelled = _is_labelled(array)
        self.array = getattr(array, "variable", array) if self._labelled else array
        if self._labelled and array.chunks is not None:
            self._labelled, self.array = False, self.array.data
        named = tuple(_number(a, array) if isinstance(a, str) else a for a in axis)
        self.shape = tuple(array.shape)
        self.axes, self.channels, _ = _checks.channel_axes(self.shape, named, "data")
        self.axis = self.axes[0] if len(self.axes) == 1 else self.axes
        self.size = prod(self.shape)

    def read(self, index: Index) -> Array:
        """Return a piece as an array in memory, or raise if it has an unknown dtype."""
        piece = self.array[index]
        if self._labelled:
            piece = piece.data
        check_type(piece)
        return piece

    def cuts(self, chunk: int) -> Iterator[list[Index]]:
        """Cut the array into pieces of at most `chunk` values, along the chunks of a file.

        Yields, for each part of the reduced axes, a list of pieces that hold all channels together:
        one, or several if the file's chunks divide the channel axes and one would be too large.
        """
        steps = self._steps(chunk)
        if steps == self.shape:
            yield [tuple(slice(0, length) for length in steps)]
            return
        ranges = [
            [slice(i, min(i + step, length)) for i in range(0, max(length, 1), step or 1)]
            for length, step in zip(self.shape, steps, strict=True)
        ]
        over = [a for a in range(len(steps)) if a not in self.axes]
        order = [[*over, *self.axes].index(a) for a in range(len(steps))]
        for part in product(*(ranges[a] for a in over)):
            pieces = product(*(ranges[a] for a in self.axes))
            yield [tuple((*part, *piece)[i] for i in order) for piece in pieces]

    def _steps(self, chunk: int) -> Sequence[int]:
        """Return the lengths of a piece along the axes."""
        stored = self._stored()
        if stored is not None:
            # Reading a piece also holds the file's chunks, compressed and decompressed, and the
            # allocator's memory per thread: pieces of chunk / 3 took 1.7 to 2.1 chunks of memory,
            # of chunk / 5 1.0 to 1.4.
            chunk //= 5
        if self.size <= chunk:
            return self.shape
        steps = list(self.shape)
        # Cuts along the innermost axis would read every page of a memory map for every piece.
        strides = getattr(self.array, "strides", None) or range(len(steps), 0, -1)
        over = [a for a in range(len(steps)) if a not in self.axes]
        order = sorted(over, key=lambda a: -abs(strides[a]))
        if stored is None:  # channels are never divided
            grains = dict.fromkeys(order, 1)
        else:  # a chunk that is read in parts is decompressed for each of them
            order += self.axes
            grains = {a: min(stored[a], self.shape[a]) for a in order}
        values = self.size  # of a piece
        for a in order:
            values //= steps[a]
            steps[a] = min(max(chunk // values // grains[a], 1) * grains[a], steps[a])
            values *= steps[a]
        return steps

    def _stored(self) -> tuple[int, ...] | None:
        """Return the shape of the chunks in which a file holds the array, or None."""
        try:
            chunks = getattr(self.array, "chunks", None)
        except NotImplementedError:  # Zarr's, if chunks differ in length
            return None
        if self._labelled:
            preferred = self.array.encoding.get("preferred_chunks", {})
            lengths = zip(self.array.dims, self.shape, strict=True)
            chunks = preferred and tuple(preferred.get(dim, length) for dim, length in lengths)
        if not isinstance(chunks, tuple) or len(chunks) != len(self.shape):
            return None
        return chunks if all(isinstance(n, int) and n > 0 for n in chunks) else None


def _check_names(data: Any) -> None:
    """Raise for a mapping of arrays or a data frame, which iterates over names.

    Tests the class: an xarray.DataArray has its coordinates as attributes.
    """
    if hasattr(type(data), "keys"):
        whole = "data.to_numpy()" if hasattr(data, "to_numpy") else "data[key]"
        raise _no_arrays(data, f"; pass {whole}")


def _no_arrays(data: Any, remedy: str = "") -> TypeError:
    kind = f"{type(data).__module__}.{type(data).__qualname__}"
    return TypeError(f"data must be an array or an iterable of arrays, got {kind}{remedy}")


def _is_labelled(array: Any) -> bool:
    """Return True for arrays of xarray."""
    xarray = sys.modules.get("xarray")
    return xarray is not None and isinstance(array, xarray.DataArray | xarray.Variable)


def _number(name: str, array: Any) -> int:
    """Return the number of the axis with this name."""
    if not _is_labelled(array):
        raise TypeError(
            f"axis must be an int or a tuple of ints, got {name!r}; only axes of xarray have names"
        )
    if name not in array.dims:
        raise ValueError(f"axis {name!r} is not a dimension of data, which has {array.dims}")
    number: int = array.get_axis_num(name)
    return number
