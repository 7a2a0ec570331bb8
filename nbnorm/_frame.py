"""What the arrays of one call have in common: x's shape, channel axes, layout and library."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from nbnorm import _checks, cpu
from nbnorm._arrays import cuda_backend, home_of, place_of, take, take_floating
from nbnorm._layout import Layout, fits, layout_of
from nbnorm._typing import Array, Axis, NDArray


class Out(NamedTuple):
    """An output that was passed: as it is handed back, and as the array that it is."""

    given: Array
    taken: NDArray


class Target(NamedTuple):
    """A result in x's shape, the (N, C, S) array that it is written through, and its `Out`."""

    array: NDArray
    written: NDArray
    out: Out | None


class Geometry(NamedTuple):
    """What follows from x's shape, strides and channel axes.

    `channels` is the shape of the channel axes, `size` their product, `m` the number of values per
    channel. `fitting` are x's strides where x itself has the view that kernels need.
    """

    channels: tuple[int, ...]
    size: int
    m: int
    empty: bool
    layout: Layout
    fitting: tuple[int, ...] | None


@lru_cache(maxsize=1024)
def geometry_of(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, given: tuple[int, ...]
) -> Geometry:
    """Check the channel axes and find x's layout."""
    axes, channels, m = _checks.channel_axes(shape, given)
    layout = layout_of(shape, strides, itemsize, axes)
    fitting = strides if fits(layout, shape, strides, itemsize) else None
    return Geometry(channels, prod(channels), m, prod(shape) == 0, layout, fitting)


class Frame:
    """x as (N, C, S), and everything that has to match it.

    Attributes
    ----------
    x : ndarray
        x as NumPy sees it, in its own shape.
    inputs : dict of str to ndarray
        x and the others that have been checked, by name.
    m, channels : int
        Values per channel, number of channels.
    channel_shape : tuple of int
        The shape of the channel axes.
    empty : bool
        Whether there is nothing to compute: no samples or no channels.
    backend : module
        The functions that compute on (N, C, S) arrays of x's device.
    memory : module
        What allocates there.
    """

    backend: ModuleType = cpu
    memory: Any = cpu.memory

    def __init__(self, x: Array, axis: Axis) -> None:
        self.x = taken = take_floating(x, "x")
        self._given = x
        self.inputs = {"x": taken}
        if type(taken) is not np.ndarray:
            self.backend = cuda_backend("x")
            self.memory = self.backend.memory
        self.home = home_of(x)
        self._axis = axis
        given = (axis,) if type(axis) is int else _checks.axes(axis)
        self.channel_shape, self.channels, self.m, self.empty, self._layout, self._fitting = (
            geometry_of(taken.shape, taken.strides, taken.itemsize, given)
        )

    def required_like_x(self, array: Array, name: str) -> NDArray:
        """Check dy, residual or y: x's shape and dtype."""
        taken = take(array, name)
        if taken is not array or self.backend is not cpu:
            self._same_place(array, taken, name)
        _checks.same_dtype(taken, name, self.x)
        _checks.same_shape(taken, name, self.x)
        self.inputs[name] = taken
        return taken

    def like_x(self, array: Array | None, name: str) -> NDArray | None:
        """`required_like_x` of an argument that may be None."""
        return None if array is None else self.required_like_x(array, name)

    def per_channel(self, array: Array | None, name: str) -> NDArray | None:
        """`required` of an argument that may be None."""
        return None if array is None else self.required(array, name)

    def required(self, array: Array, name: str) -> NDArray:
        """Check a parameter or statistic: floating, the channel axes' shape."""
        taken = take_floating(array, name)
        if taken is not array or self.backend is not cpu:
            self._same_place(array, taken, name)
        _checks.channel_shape(taken, name, self.channel_shape, self.x, self._axis)
        self.inputs[name] = taken
        return taken

    def out(self, out: Array | None, inplace: str) -> Out | None:
        """Check an output against all inputs so far; `inplace` names the one that it may be."""
        if out is None:
            return None
        taken = take(out, "out")
        _checks.mutable(out, "out", "pass one that can be written to, or none")
        if taken is not out or self.backend is not cpu:
            self._same_place(out, taken, "out")
        _checks.output(taken, self.x, self.inputs.items(), inplace)
        return Out(out, taken)

    def _same_place(self, given: Array, taken: NDArray, name: str) -> None:
        """Refuse an array in other memory than x's, or on another device of x's library."""
        _checks.same_place(place_of(taken), name, place_of(self.x))
        if self.backend is cpu:  # elsewhere a place is a device
            _checks.same_device(given, name, self._given)

    def view(self, array: NDArray | None) -> NDArray | None:
        """(N, C, S) view of an array of x's shape, or a contiguous copy where it has none."""
        if array is None:
            return None
        if self._fits(array):
            return self._turned(array).reshape(self._layout.shape)
        copy: NDArray = self.memory.contiguous(self._turned(array))
        return copy.reshape(self._layout.shape)

    def target(self, out: Out | None = None) -> Target:
        """Memory for a result: out, or a fresh array of x's shape, dtype and order in memory."""
        layout = self._layout
        if out is None and layout.natural and layout.dense == layout.order:
            array: NDArray = self.memory.empty(self.x.shape, self.x.dtype)
            return Target(array, array.reshape(layout.shape), None)
        array = self._new() if out is None else out.taken
        if self.empty or self._fits(array):
            return Target(array, self._turned(array).reshape(layout.shape), out)
        return Target(array, self.memory.empty(layout.shape, self.x.dtype), out)

    def settle(self, target: Target) -> Any:
        """Hand a result back: as the out that was passed, else as an array of x's library."""
        if not (target.written.base is target.array or self.empty or self._fits(target.array)):
            turned = self._turned(target.array)
            turned[...] = target.written.reshape(turned.shape)
        return self.home(target.array) if target.out is None else target.out.given

    def _new(self) -> NDArray:
        dense = self._layout.dense or tuple(range(self.x.ndim))
        array: NDArray = self.memory.empty(tuple(self.x.shape[i] for i in dense), self.x.dtype)
        return array.transpose(tuple(map(dense.index, range(len(dense)))))

    def statistic(self, array: NDArray) -> NDArray:
        """Return a statistic as contiguous float64 of shape (C,), itself where it is that."""
        return self._flat(array, _FLOAT64)

    def scale_and_shift(
        self, gamma: NDArray | None, beta: NDArray | None
    ) -> tuple[NDArray, NDArray]:
        """Return gamma and beta with shape (C,), in one dtype that kernels are compiled for.

        float32 as long as that loses nothing, and float64 for x in float64.
        """
        wide = self.x.dtype == _FLOAT64
        for array in (gamma, beta):
            wide = wide or (array is not None and array.dtype == _FLOAT64)
        dtype = _FLOAT64 if wide else _FLOAT32
        constant = self.memory.constant
        return (
            self._flat(gamma, dtype) if gamma is not None else constant(self.channels, 1.0, dtype),
            self._flat(beta, dtype) if beta is not None else constant(self.channels, 0.0, dtype),
        )

    def unflat(self, array: NDArray) -> NDArray:
        """The channel axes' shape, from (C,)."""
        return array if len(self.channel_shape) == 1 else array.reshape(self.channel_shape)

    def scale_and_mask(
        self, relu: bool, gamma: NDArray | None, beta: NDArray | None, y: NDArray | None
    ) -> tuple[NDArray, NDArray | None, NDArray | None]:
        """(gamma, beta, y) as the backend's backward takes them: the last two for ReLU's mask."""
        if not relu or y is not None:
            return self.scale_and_shift(gamma, None)[0], None, self.view(y) if relu else None
        return *self.scale_and_shift(gamma, beta), None

    def parameter_gradient(self, total: NDArray, gamma: NDArray | None) -> Array:
        """Sum of shape (C,) rounded once to gamma's dtype, x's where there is no gamma."""
        dtype = self.x.dtype if gamma is None else gamma.dtype
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # as IEEE has it
            return self.home(self.unflat(total.astype(dtype)))

    def _flat(self, array: NDArray, dtype: np.dtype[Any]) -> NDArray:
        """Return an array as (C,), plain and of this dtype: itself where it is all that."""
        if array.dtype != dtype or not self.memory.plain(array):
            array = array.astype(dtype, "C")
        return array if array.ndim == 1 else array.reshape(-1)

    def _turned(self, array: NDArray) -> NDArray:
        """Transpose x's axes to the layout's order."""
        return array if self._layout.natural else array.transpose(self._layout.order)

    def _fits(self, array: NDArray) -> bool:
        """Whether an array of x's shape has the (N, C, S) view that kernels need."""
        return self.memory.aligned(array) and (
            array.strides == self._fitting
            or fits(self._layout, array.shape, array.strides, array.itemsize)
        )


_FLOAT32, _FLOAT64 = np.dtype("float32"), np.dtype("float64")
