"""What counts: the weights of x's values, from `mask`, `lengths` or `weights` of a call.

A mask is weights of 0 and 1. Values of weight 0 may be anything, NaN included. `WeightedFrame` is
the frame of such a call; its backend has the same functions as any, with the weights bound.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from nbnorm import _checks, _running
from nbnorm._arrays import on_host, take, take_floating
from nbnorm._frame import Frame
from nbnorm._typing import Array, Axis, NDArray


class Weights(NamedTuple):
    """Weights as kernels take them.

    `values` have shape (N, C, S), or (N, 1, S) if all channels share them, in C order: uint8 for a
    mask, else the compute dtype. `count` is their sum for each channel, float64 of shape (C,).
    `fill` is y where the weight is 0; None normalises x there like the rest.
    """

    values: NDArray
    count: NDArray  # type: ignore[assignment]  # shadows tuple.count, on purpose
    fill: float | None

    def of(self, begin: int, end: int, backend: Any) -> Weights:
        """Return the weights of samples begin to end."""
        values = self.values[begin:end]
        return Weights(values, backend.weigh(values, self.count.size), self.fill)


class Counting(NamedTuple):
    """The arguments of a call that say what counts."""

    mask: Array | None = None
    lengths: Array | None = None
    length_axis: int | None = None
    weights: Array | None = None
    fill: float | None = 0.0

    @property
    def given(self) -> bool:
        """Whether mask, lengths or weights is given."""
        return not (self.mask is None and self.lengths is None and self.weights is None)

    def check(self) -> None:
        """Raise if `length_axis` is given without `lengths`, or `fill` is not a number or None."""
        if self.length_axis is not None and self.lengths is None:
            raise ValueError("length_axis is given without lengths")
        if self.fill is not None:
            _checks.number(self.fill, "fill")


class WeightedFrame(Frame):
    """Frame of a call with mask, lengths or weights.

    `m` is the least positive sum of weights of a channel. Weights are divided by `unit`: 1, or, if
    the greatest is not between 2^-20 and 2^20, the power of two that brings it to [1, 2).
    """

    described = "x of shape {} with mask, lengths or weights"
    weights: Weights | None = None
    _found: Weights | None

    def __init__(self, x: Array, axis: Axis, counting: Counting, name: str = "x") -> None:
        super().__init__(x, axis, name)
        self._plain, self._found = self.backend, self._weigh(counting)
        self.m = least(self._totals)
        if not (self._every or self.empty):
            self._bind(self._found)

    def _bind(self, weights: Weights) -> None:
        """Compute with weights from now on."""
        self.weights, self.backend = weights, bound(self._plain, weights)

    def _weigh(self, counting: Counting) -> Weights:
        """Check the weights and return them.

        Sets `unit`, `_shared` (by all channels), `_kind` and `_one` (of a single count), `_count`
        and `_totals` (of each channel, on x's device and the host) and `_every` (each value counts
        once).
        """
        found = self._given_by(counting)
        self.unit, self._shared = 1.0, self._channels_share(found)
        self._kind: type = float if counting.weights is not None else int
        if found.dtype != np.bool_:
            found = self._scaled(found)
        values = self._spread(found)
        count = self.backend.weigh(values, max(self.channels, 1))
        with np.errstate(over="ignore"):
            totals = on_host(count * self.unit)  # for a mask, the only wait for a GPU
        _checks.finite_sums(totals)
        self._one = self._kind(totals[0])
        count, self._totals = count[: self.channels], totals[: self.channels]
        self._count = count * self.unit
        every = self.x.size // max(self.channels, 1)
        self._every = self._kind is int and bool((self._totals == every).all())
        fill = None if counting.fill is None else float(counting.fill)
        return Weights(values, count, fill)

    def _given_by(self, counting: Counting) -> NDArray:
        """Return the mask or weights, checked, with as many axes as x; lengths as a mask."""
        x = self.x
        names = ("mask", "lengths", "weights")
        given = [name for name in names if getattr(counting, name) is not None]
        _checks.at_most_one(given)
        [name] = given
        array = getattr(counting, name)
        if name == "lengths":
            lengths = on_host(take(array, name))
            axis, channels = counting.length_axis, self._channel_axes
            along = _checks.lengths(lengths, axis, x.shape, channels, self._name)
            inside = np.arange(x.shape[along]) < lengths[:, None]
            shape = [x.shape[i] if i in (0, along) else 1 for i in range(x.ndim)]
            mask: NDArray = self.memory.from_host(inside.reshape(shape))
            return mask
        taken = take(array, name) if name == "mask" else take_floating(array, name)
        self._same_place(array, taken, name)
        _checks.broadcastable(taken, name, x, self._name)
        if name == "mask":
            _checks.boolean(taken)
        self.inputs[name] = taken
        return taken.reshape((1,) * (x.ndim - taken.ndim) + taken.shape)

    def _channels_share(self, given: NDArray) -> bool:
        """Whether weights, of as many axes as x, are the same in all channels."""
        return all(given.shape[i] == 1 for i in self._channel_axes)

    @property
    def _channel_axes(self) -> list[int]:
        return [i % self.x.ndim for i in _checks.axes(self._axis)]

    def _scaled(self, weights: NDArray) -> NDArray:
        """Set `unit`; return weights divided by it, in the compute dtype; raise if invalid."""
        dtype = np.float64 if self.x.dtype == np.float64 else np.float32
        if weights.itemsize == 2:  # CuPy has no min() for bfloat16
            weights = weights.astype(np.float32)
        if weights.size == 0:
            return weights.astype(dtype)
        least, most = float(weights.min()), float(weights.max())
        _checks.weights(least, most)
        if most > 0 and not 2.0**-20 < most < 2.0**20:
            self.unit = 2.0 ** (np.frexp(most)[1] - 1)
        if self.unit != 1:
            weights = weights.astype(np.float64) / self.unit
        narrow: NDArray = weights.astype(dtype, copy=False)
        if dtype == np.float32 and weights.itemsize > 4:  # weights above 0 stay above 0
            narrow[(narrow == 0) & (weights > 0)] = np.finfo(dtype).tiny
        return narrow

    def _spread(self, given: NDArray) -> NDArray:
        """Return weights, of as many axes as x, with shape (N, C, S), or (N, 1, S) if shared."""
        shape = list(self.x.shape)
        if self._shared:
            for i in self._channel_axes:
                shape[i] = 1
        N, C, S = self._layout.shape
        turned = self._turned(np.broadcast_to(given, tuple(shape)))
        values: NDArray = self.memory.contiguous(turned).reshape(N, 1 if self._shared else C, S)
        return values.view(np.uint8) if values.dtype == np.bool_ else values

    def count(self) -> Any:
        """Return the count: an int, a float with `weights`, an array unless channels share it."""
        if self._shared:
            return self._one
        return self.home(self.unflat(self._count))

    def counted(self, count: Any) -> Any:
        """Check the `count` of a backward pass: a number, or one for each channel."""
        if len(getattr(count, "shape", ())) == 0:
            return _checks.weight(count, self.m) / self.unit
        counts = self.required_per_channel(self._floating(count), "count")
        given = on_host(counts)
        _checks.weight_each(given, self.unflat(self._totals))
        if self.weights is None and given.size and (given == given.flat[0]).all():
            return float(given.flat[0])
        if self.weights is None:  # other parts of the batch differ by channel
            assert self._found is not None
            self._bind(self._found)
        return self.statistic(counts) / self.unit

    def _floating(self, count: Array) -> Array:
        """Return counts that are integers, such as ``mask.sum(0)``, as float64."""
        taken = take(count, "count")
        return taken.astype(np.float64) if taken.dtype.kind in "iu" else count

    def move(
        self,
        running: tuple[NDArray, NDArray],
        mean: NDArray,
        m2: NDArray,
        momentum: float,
        correction: float,
    ) -> None:
        """Update running statistics, except in channels where nothing counts."""
        with np.errstate(all="ignore"):
            var = m2 * self.unit / (self._count - correction)
        _running.move(running, (mean, var), momentum, self._count > 0)


def least(totals: NDArray) -> Any:
    """Return the least positive total, or 0."""
    some = totals[totals > 0]
    return some.min().item() if some.size else 0


def bound(backend: Any, weights: Weights) -> Any:
    """Return the backend with these weights bound."""
    of_x = ("stats", "apply", "forward", "backward_reduce", "backward_apply", "backward")
    functions = {name: partial(getattr(backend, name), weights=weights) for name in of_x}
    return SimpleNamespace(**functions, rstd=backend.rstd)
