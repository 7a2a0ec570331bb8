"""What the arrays of one call have in common: x's shape, channel axes, layout and library."""

from __future__ import annotations

from math import prod
from types import ModuleType
from typing import NamedTuple

import numpy as np

from nbnorm import _checks, cpu, pool
from nbnorm._arrays import Array, NDArray, home_of, take, take_floating
from nbnorm._layout import fits, layout_of


class Target(NamedTuple):
    """A result in x's shape, and the (N, C, S) array that it is written through."""

    array: NDArray
    written: NDArray


class Frame:
    """x as (N, C, S), and everything that has to match it.

    Attributes
    ----------
    x : ndarray
        x as NumPy sees it, in its own shape.
    m, channels : int
        Values per channel, number of channels.
    empty : bool
        Whether there is nothing to compute: no samples or no channels.
    backend : module
        The functions that compute on (N, C, S) arrays of x's device.
    """

    def __init__(self, x: Array, axis: int | tuple[int, ...]) -> None:
        self.x = take_floating(x, "x")
        self.backend: ModuleType = cpu
        self.home = home_of(x)
        self._axis = axis
        shape, strides, itemsize = self.x.shape, self.x.strides, self.x.itemsize
        axes, self._channels, self.m = _checks.channel_axes(shape, axis)
        self.channels = prod(self._channels)
        self.empty = self.x.size == 0
        self._layout = layout_of(shape, strides, itemsize, axes)
        self._fitting = strides if fits(self._layout, shape, strides, itemsize) else None

    def required_like_x(self, array: Array, name: str) -> NDArray:
        """Check dy, residual or y: x's shape and dtype."""
        taken = take(array, name)
        _checks.same_dtype(taken, name, self.x)
        _checks.same_shape(taken, name, self.x)
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
        _checks.channel_shape(taken, name, self._channels, self.x, self._axis)
        return taken

    def out(
        self, out: Array | None, inputs: dict[str, NDArray | None], inplace: str
    ) -> NDArray | None:
        """Check an output; `inplace` names the one input that it may be."""
        if out is None:
            return None
        taken = take(out, "out")
        _checks.output(taken, self.x, inputs.items(), inplace)
        return taken

    def view(self, array: NDArray | None) -> NDArray | None:
        """(N, C, S) view of an array of x's shape, or a contiguous copy where it has none."""
        if array is None:
            return None
        if self._fits(array):
            return self._turned(array).reshape(self._layout.shape)
        return np.require(self._turned(array), requirements=["C", "A"]).reshape(self._layout.shape)

    def target(self, out: NDArray | None) -> Target:
        """Memory for a result: out, or a fresh array of x's shape, dtype and order in memory."""
        array = self._new() if out is None else out
        if self.empty or self._fits(array):
            return Target(array, self._turned(array).reshape(self._layout.shape))
        return Target(array, pool.empty(self._layout.shape, self.x.dtype))

    def settle(self, target: Target, out: Array | None = None) -> Array:
        """Hand a result back: as the out that was passed, else as an array of x's library."""
        if not (self.empty or self._fits(target.array)):
            turned = self._turned(target.array)
            turned[...] = target.written.reshape(turned.shape)
        return self.home(target.array) if out is None else out

    def _new(self) -> NDArray:
        dense = self._layout.dense
        if dense is None or dense == tuple(range(len(dense))):
            return pool.empty(self.x.shape, self.x.dtype)
        array = pool.empty(tuple(self.x.shape[i] for i in dense), self.x.dtype)
        return array.transpose(np.argsort(dense))

    def flat(self, array: NDArray | None, default: float) -> NDArray:
        """Parameter or statistic as contiguous float64 of shape (C,)."""
        if array is None:
            return np.full(self.channels, default, np.float64)
        # A copy: a read-only array is another type to Numba, and would have kernels compiled anew.
        return array.astype(np.float64, "C").reshape(self.channels)

    def unflat(self, array: NDArray) -> NDArray:
        """The channel axes' shape, from (C,)."""
        return array.reshape(self._channels)

    def mask(
        self, relu: bool, beta: NDArray | None, y: NDArray | None
    ) -> tuple[NDArray | None, NDArray | None]:
        """(beta, y) as the backend's backward takes them: what the ReLU mask comes from."""
        if not relu:
            return None, None
        return (self.flat(beta, 0), None) if y is None else (None, self.view(y))

    def parameter_gradient(self, total: NDArray, gamma: NDArray | None) -> Array:
        """Sum of shape (C,) rounded once to gamma's dtype, x's where there is no gamma."""
        dtype = self.x.dtype if gamma is None else gamma.dtype
        with np.errstate(over="ignore", invalid="ignore"):  # Inf is what IEEE makes of it
            return self.home(self.unflat(total.astype(dtype)))

    def _turned(self, array: NDArray) -> NDArray:
        """Transpose x's axes to the layout's order."""
        return array if self._layout.natural else array.transpose(self._layout.order)

    def _fits(self, array: NDArray) -> bool:
        """Whether an array of x's shape has the (N, C, S) view that kernels need."""
        return array.flags.aligned and (
            array.strides == self._fitting
            or fits(self._layout, array.shape, array.strides, array.itemsize)
        )
