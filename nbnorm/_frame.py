"""`Frame`: checks the arrays of one call against x, and converts them to and from (N, C, S)."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from nbnorm import _checks, cpu
from nbnorm._arrays import cuda_backend, home_of, on_host, place_of, take, take_floating
from nbnorm._layout import Layout, fits, layout_of
from nbnorm._typing import Array, Axis, NDArray
from nbnorm.activations import Fused


class Out(NamedTuple):
    """An output argument: the object that was passed, and its NumPy or CuPy array."""

    given: Array
    taken: NDArray


class Target(NamedTuple):
    """A result in x's shape, the (N, C, S) array that kernels write, and its `Out`, if any."""

    array: NDArray
    written: NDArray
    out: Out | None


class Geometry(NamedTuple):
    """Properties derived from x's shape, strides and channel axes.

    `channels` is the shape of the channel axes, `size` the number of channels, `m` the number of
    values per channel. `fitting` is x's strides if x has the view that kernels need, else None.
    """

    channels: tuple[int, ...]
    size: int
    m: int
    empty: bool
    layout: Layout
    fitting: tuple[int, ...] | None


@lru_cache(maxsize=1024)
def geometry_of(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    itemsize: int,
    given: tuple[int, ...],
    name: str,
) -> Geometry:
    """Return the `Geometry` of x; raise ValueError if `given` are not channel axes of its shape."""
    axes, channels, m = _checks.channel_axes(shape, given, name)
    layout = layout_of(shape, strides, itemsize, axes)
    fitting = strides if fits(layout, shape, strides, itemsize) else None
    return Geometry(channels, prod(channels), m, prod(shape) == 0, layout, fitting)


class Frame:
    """View of x as (N, C, S), with the other arrays of the call, which must match x.

    In a backward call without x, y takes its place, with `name` "y".

    Attributes
    ----------
    x : ndarray
        x as a NumPy or CuPy array, in its own shape.
    dtype : dtype
        dtype of results in x's shape: x's own, or y's if x holds integers.
    inputs : dict of str to ndarray
        x and the other arrays checked so far, by name.
    m, channels : int
        Number of values per channel, and number of channels.
    channel_shape : tuple of int
        Shape of the channel axes.
    empty : bool
        True if x has no values.
    backend : module
        Functions that compute on (N, C, S) arrays on x's device.
    memory : module
        Functions that allocate on x's device.
    """

    backend: ModuleType = cpu
    memory: Any = cpu.memory
    described = "x of shape {}"  # in messages: what has m values per channel
    unit = 1.0  # kernels' weights, counts and M2 are in this unit

    _take = staticmethod(take_floating)

    def __init__(self, x: Array, axis: Axis, name: str = "x") -> None:
        self.x = taken = self._take(x, name)
        self.dtype = taken.dtype
        self._given = x
        self._name = name
        self.inputs = {name: taken}
        if type(taken) is not np.ndarray:
            self.backend = cuda_backend(name)
            self.memory = self.backend.memory
        self.home = home_of(x)
        self._axis = axis
        given = (axis,) if type(axis) is int else _checks.axes(axis)
        self.channel_shape, self.channels, self.m, self.empty, self._layout, self._fitting = (
            geometry_of(taken.shape, taken.strides, taken.itemsize, given, name)
        )

    def required_like_x(self, array: Array, name: str) -> NDArray:
        """Return dy, residual or y as an array; raise unless it has x's shape and dtype.

        dy and residual may also be float32 where x is float16 or bfloat16: kernels compute these in
        float32 anyway, and are compiled for the dtype that they load.
        """
        taken = take(array, name)
        if taken is not array or self.memory is not cpu.memory:
            self._same_place(array, taken, name)
        wider = self.x.itemsize == 2 and taken.dtype == _FLOAT32
        if not (wider and name != "y"):
            _checks.same_dtype(taken, name, self.x, self._name)
        _checks.same_shape(taken, name, self.x, self._name)
        self.inputs[name] = taken
        return taken

    def like_x(self, array: Array | None, name: str) -> NDArray | None:
        """Call `required_like_x` for an argument that may be None."""
        return None if array is None else self.required_like_x(array, name)

    def per_channel(self, array: Array | None, name: str) -> NDArray | None:
        """Call `required_per_channel` for an argument that may be None."""
        return None if array is None else self.required_per_channel(array, name)

    def required_per_channel(self, array: Array, name: str) -> NDArray:
        """Return a parameter or statistic as an array; check its dtype and shape."""
        taken = take_floating(array, name)
        if taken is not array or self.memory is not cpu.memory:
            self._same_place(array, taken, name)
        _checks.channel_shape(taken, name, self.channel_shape, self.x, self._axis)
        self.inputs[name] = taken
        return taken

    def out(self, out: Array | None, inplace: str) -> Out | None:
        """Check an output against all inputs so far; it may be the input named `inplace`."""
        if out is None:
            return None
        taken = take(out, "out")
        _checks.mutable(out, "out", "pass a writable array, or omit out")
        if taken is not out or self.memory is not cpu.memory:
            self._same_place(out, taken, "out")
        _checks.output(taken, self.x, self.dtype, self.inputs.items(), inplace)
        return Out(out, taken)

    def _same_place(self, given: Array, taken: NDArray, name: str) -> None:
        """Raise if an array is not in the same memory, or on the same device, as x."""
        _checks.same_place(place_of(taken), name, place_of(self.x))
        if self.memory is cpu.memory:  # on a GPU, the place already names the device
            _checks.same_device(given, name, self._given)

    def count(self) -> Any:
        """Return the number of values per channel."""
        return self.m

    def counted(self, count: Any) -> Any:
        """Return the checked `count` of a backward pass."""
        if len(getattr(count, "shape", ())) > 0:
            return _checks.single_count(on_host(take(count, "count")), self.x)
        return _checks.count(count, self.x)

    def move(
        self,
        running: tuple[NDArray, NDArray],
        mean: NDArray,
        m2: NDArray,
        momentum: float,
        correction: float,
    ) -> None:
        """Update running statistics, which may have any strides, from a batch's mean and M2."""
        self.backend.move(*running, mean, m2, momentum, self.m - correction)

    def view(self, array: NDArray | None) -> NDArray | None:
        """Return an array of x's shape as an (N, C, S) view, or as a copy if there is none."""
        if array is None:
            return None
        if self._fits(array):
            return self._turned(array).reshape(self._layout.shape)
        copy: NDArray = self.memory.contiguous(self._turned(array))
        return copy.reshape(self._layout.shape)

    def target(self, out: Out | None = None) -> Target:
        """Return where a result goes: out, or a new array of x's shape and order of axes.

        A new array is in C order if x has gaps. If the array lacks the view that kernels need,
        they write another one, which `settle` copies.
        """
        layout = self._layout
        if out is None and layout.natural and layout.dense == layout.order:
            array: NDArray = self.memory.empty(self.x.shape, self.dtype)
            return Target(array, array.reshape(layout.shape), None)
        array = self._new() if out is None else out.taken
        if self.empty or self._fits(array):
            return Target(array, self._turned(array).reshape(layout.shape), out)
        return Target(array, self.memory.empty(layout.shape, self.dtype), out)

    def settle(self, target: Target) -> Any:
        """Copy what kernels wrote elsewhere; return the `out` passed, or x's library's array."""
        if not (target.written.base is target.array or self.empty or self._fits(target.array)):
            turned = self._turned(target.array)
            turned[...] = target.written.reshape(turned.shape)
        return self.home(target.array) if target.out is None else target.out.given

    def _new(self) -> NDArray:
        dense = self._layout.dense or tuple(range(self.x.ndim))
        array: NDArray = self.memory.empty(tuple(self.x.shape[i] for i in dense), self.dtype)
        return array.transpose(tuple(map(dense.index, range(len(dense)))))

    def statistic(self, array: NDArray) -> NDArray:
        """Return a statistic as contiguous float64 of shape (C,), copied only if needed."""
        return self._flat(array, _FLOAT64)

    def statistic_or(self, array: NDArray | None, otherwise: float) -> NDArray:
        """Call `statistic`; for None return an array of `otherwise`, never to be written to."""
        if array is not None:
            return self.statistic(array)
        same: NDArray = self.memory.constant(self.channels, otherwise, _FLOAT64)
        return same

    def scale_and_shift(
        self, gamma: NDArray | None, beta: NDArray | None
    ) -> tuple[NDArray, NDArray]:
        """Return gamma and beta with shape (C,), in a common dtype that kernels support.

        The dtype is float64 if y, gamma or beta is float64, else float32, which is then exact.
        """
        wide = self.dtype == _FLOAT64
        for array in (gamma, beta):
            wide = wide or (array is not None and array.dtype == _FLOAT64)
        dtype = _FLOAT64 if wide else _FLOAT32
        constant = self.memory.constant
        return (
            self._flat(gamma, dtype) if gamma is not None else constant(self.channels, 1.0, dtype),
            self._flat(beta, dtype) if beta is not None else constant(self.channels, 0.0, dtype),
        )

    def unflat(self, array: NDArray) -> NDArray:
        """Reshape an array of shape (C,) to the shape of the channel axes."""
        return array if len(self.channel_shape) == 1 else array.reshape(self.channel_shape)

    def scale_and_mask(
        self,
        activation: Fused,
        gamma: NDArray | None,
        beta: NDArray | None,
        y: NDArray | None,
        residual: NDArray | None,
    ) -> tuple[NDArray, NDArray | None, NDArray | None]:
        """Return (gamma, beta, y) as backends take them to differentiate the activation.

        beta and y are None if not needed. An activation other than ReLU gets the residual as y.
        """
        if activation is None or (activation == "relu" and y is not None):
            y_ = None if activation is None else self.view(y)
            return self.scale_and_shift(gamma, None)[0], None, y_
        residual_ = None if activation == "relu" else self.view(residual)
        return *self.scale_and_shift(gamma, beta), residual_

    def parameter_gradient(
        self, total: NDArray, gamma: NDArray | None, beta: NDArray | None = None
    ) -> Array:
        """Round a sum of shape (C,) to gamma's dtype, or to x's if gamma is None.

        `beta` is for `SegmentedFrame`, which takes the shape from it if gamma is None.
        """
        dtype = self.x.dtype if gamma is None else gamma.dtype
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # IEEE results
            return self.home(self.unflat(total.astype(dtype)))

    def _flat(self, array: NDArray, dtype: np.dtype[Any]) -> NDArray:
        """Return an array as contiguous (C,) of this dtype, without a copy if it is that."""
        if array.dtype != dtype or not self.memory.plain(array):
            array = array.astype(dtype, "C")
        return array if array.ndim == 1 else array.reshape(-1)

    def _turned(self, array: NDArray) -> NDArray:
        """Transpose an array of x's shape to the layout's order of axes."""
        return array if self._layout.natural else array.transpose(self._layout.order)

    def _fits(self, array: NDArray) -> bool:
        """Return True if an array of x's shape has the (N, C, S) view that kernels need."""
        return self.memory.aligned(array) and (
            (array.strides == self._fitting and array.itemsize == self.x.itemsize)
            or fits(self._layout, array.shape, array.strides, array.itemsize)
        )


_FLOAT32, _FLOAT64 = np.dtype("float32"), np.dtype("float64")
