"""Fast path for common calls on NumPy arrays, with compiled checks; returns None for other calls.

The checks and arithmetic of a small call take 2 us when compiled; checks in Python take ten more.
A compiled entry (`nbnorm.cpu.entries`) does all of it, with threads if the call is large. For all
other calls, including those with invalid arguments, it writes nothing, and `functional` takes over.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import inf
from typing import Any

import numpy as np

from nbnorm import cpu
from nbnorm._layout import Axes, Layout, fits, layout_of
from nbnorm._typing import NDArray
from nbnorm.activations import TABLE, Activation
from nbnorm.activations import activation as named
from nbnorm.cpu import entries, functions, kernels, threads
from nbnorm.cpu.objects import readable
from nbnorm.cpu.plan import SERIAL_BELOW, by_rows, plan

_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
_READABLE = readable()
_EXACT = 1 << 53  # smaller ints are exact as floats


class _Entries:
    """Compiled entries for one shape and one activation.

    `act` is the activation's class in `functions`; None for ReLU or none.
    """

    __slots__ = ("act", "backward", "forward", "inference")

    def __init__(self, act: Any = None) -> None:
        self.act = act
        # Without and with a residual; for backward, by where the derivative comes from.
        self.forward: list[Any] = [None, None]
        self.inference: list[Any] = [None, None]
        self.backward: dict[str, Any] = {}


class _Site(_Entries):
    """Cached properties of calls on arrays of one shape, strides, dtype and channel axis."""

    __slots__ = (
        "C", "dense", "dtype", "form", "numbers", "order", "others", "serial", "shape", "small",
        "traversal", "turn",
    )  # fmt: skip

    def __init__(self, layout: Layout, lengths: Axes, strides: Axes, dtype: np.dtype[Any]) -> None:
        super().__init__()
        self.others: dict[Any, _Entries] = {}  # by class of activation
        self.shape = layout.shape
        N, self.C, S = layout.shape
        self.dtype = dtype
        self.small = N * self.C * S < SERIAL_BELOW  # done serially
        # The permutation of x's axes to their order in memory (None if trivial), and its inverse.
        order = layout.order
        self.order = None if layout.natural else order
        self.dense = tuple(lengths[i] for i in order)
        self.turn = tuple(map(order.index, range(len(order))))
        self.form = (*lengths, *strides)
        self.traversal = "rows" if by_rows(S) else "columns"
        # Arguments of entries: for small calls, and by the numbers of threads and of tensors.
        self.serial = self._numbers(1, 2) if self.small else None
        self.numbers: dict[tuple[int, int], NDArray] = {}

    def entries(self, act: Any) -> _Entries:
        """Return the entries of an activation's class."""
        found = self.others.get(act)
        if found is None:
            found = self.others[act] = _Entries(act)
        return found

    def new(self) -> NDArray:
        """Return a new array with x's shape, dtype and memory order."""
        empty = np.empty if self.small else cpu.memory.empty
        array: NDArray = empty(self.dense, self.dtype)
        return array if self.order is None else array.transpose(self.turn)

    def work(self, tensors: int) -> NDArray | None:
        """Return the `numbers` of a threaded entry that passes over `tensors` arrays like x.

        Return None if calls must take turns on the threads, which only the general path handles.
        """
        count = threads.count()
        numbers: NDArray | None = self.numbers.get((count, tensors))
        if numbers is None and not threads.one_at_a_time():
            numbers = self.numbers[count, tensors] = self._numbers(count, tensors)
        return numbers

    def _numbers(self, count: int, tensors: int) -> NDArray:
        cut = plan(*self.shape, self.dtype.itemsize, count, cpu._CACHES, tensors)
        return entries.site_for(cut.grid, kernels.work_for(cut), self.dtype, self.form)


@lru_cache(maxsize=1024)
def _site(shape: Axes, strides: Axes, dtype: np.dtype[Any], axis: int) -> _Site | None:
    """Return the site of calls on such arrays, or None if the fast path does not support them."""
    if not (_READABLE and len(shape) >= 2 and -len(shape) <= axis < len(shape)) or 0 in shape:
        return None
    layout = layout_of(shape, strides, dtype.itemsize, (axis % len(shape),))
    if layout.dense != layout.order or not fits(layout, shape, strides, dtype.itemsize):
        return None
    return _Site(layout, shape, strides, dtype)


def _site_of(x: NDArray, axis: int) -> _Site | None:
    dtype = x.dtype
    if dtype is _FLOAT32 or dtype is _FLOAT64:
        return _site(x.shape, x.strides, dtype, axis)
    for known in _FLOAT32, _FLOAT64:  # an unpickled array has its own dtype object
        if dtype == known and dtype.metadata is None:
            return _site(x.shape, x.strides, known, axis)
    return None


def adopt(library: str, most: Callable[[], int]) -> None:
    """Run kernels on the threads of another package's library; see `threads.adopt`."""
    threads.adopt(library, most)
    _site.cache_clear()  # sites depend on the thread pool


def _floor(activation: Any) -> float | None:
    """Return the lower bound of y: 0 with ReLU, -inf without; None for another activation."""
    if activation is None:
        return -inf
    return 0.0 if type(activation) is str and activation == "relu" else None


def _other(site: _Site, activation: Any) -> tuple[_Entries, float] | None:
    """Return the entries and the parameter of an activation that has no `_floor`.

    None if it is unknown; the general path then raises.
    """
    if type(activation) is str:
        made = _NAMED.get(activation)
        if made is None:
            return None
    elif type(activation) is not Activation:
        return None
    elif activation.functions is None and activation.name == "relu":
        return site, 0.0
    else:
        made = functions.argument(activation)
    return site.entries(type(made)), made[0]


_NAMED = {name: functions.argument(named(name)) for name in TABLE}


def forward(
    x: Any,
    gamma: Any,
    beta: Any,
    running_mean: Any,
    running_var: Any,
    training: Any,
    momentum: Any,
    eps: Any,
    correction: Any,
    axis: Any,
    residual: Any,
    activation: Any,
    out: Any,
) -> tuple[Any, Any, Any] | None:
    """Return y, mean and rstd of `batch_norm_forward`, or None."""
    if (
        type(axis) is not int
        or type(eps) is not float
        or type(momentum) is not float
        or type(correction) is not int
        or not -_EXACT < correction < _EXACT
        or type(training) is not bool
    ):
        return None
    if not training:
        if not -inf < momentum < inf:
            return None
        return inference(
            x, gamma, beta, running_mean, running_var, eps, axis, residual, activation, out, True
        )
    site, number = _site_of(x, axis), _floor(activation)
    if site is None:
        return None
    cached: _Entries = site
    if number is None:
        other = _other(site, activation)
        if other is None:
            return None
        cached, number = other
    added = residual is not None
    numbers = site.serial if site.small else site.work(2 + added)
    if numbers is None:
        return None
    entry = cached.forward[added]
    if entry is None:
        if not _all_of(site.dtype, gamma, beta, running_mean, running_var, residual, out):
            return None
        entry = entries.forward(site.traversal, site.dtype.name, added, cached.act)
        cached.forward[added] = entry
    y = site.new() if out is None else out
    mean, rstd = np.empty(site.C), np.empty(site.C)
    done = entry(
        x, gamma, beta, running_mean, running_var, residual, out, y, mean, rstd, numbers,
        eps, momentum, correction, number,
    )  # fmt: skip
    return (y, mean, rstd) if done else None


def inference(
    x: Any,
    gamma: Any,
    beta: Any,
    mean: Any,
    var: Any,
    eps: Any,
    axis: Any,
    residual: Any,
    activation: Any,
    out: Any,
    statistics: bool = False,
) -> tuple[Any, Any, Any] | None:
    """Return (y, mean, rstd) of `batch_norm_inference`; the last two are None or float64."""
    if type(axis) is not int or type(eps) is not float:
        return None
    site, number = _site_of(x, axis), _floor(activation)
    if site is None:
        return None
    cached: _Entries = site
    if number is None:
        other = _other(site, activation)
        if other is None:
            return None
        cached, number = other
    added = residual is not None
    numbers = site.serial if site.small else site.work(2 + added)
    if numbers is None:
        return None
    entry = cached.inference[added]
    if entry is None:
        if not _all_of(site.dtype, gamma, beta, mean, var, residual, out):
            return None
        entry = entries.inference(site.traversal, site.dtype.name, added, cached.act)
        cached.inference[added] = entry
    y = site.new() if out is None else out
    mean64, rstd = (np.empty(site.C), np.empty(site.C)) if statistics else (None, None)
    done = entry(x, gamma, beta, mean, var, residual, out, y, mean64, rstd, numbers, eps, number)
    return (y, mean64, rstd) if done else None


ALL = (True, True, True, True)


def backward(
    dy: Any,
    x: Any,
    gamma: Any,
    mean: Any,
    rstd: Any,
    beta: Any,
    y: Any,
    residual: Any,
    training: Any,
    axis: Any,
    activation: Any,
    output_mask: Any,
    out: Any,
) -> tuple[Any, Any, Any, Any] | None:
    """Return dx, dgamma, dbeta and dresidual of `batch_norm_backward`; an omitted beta is None."""
    if (
        type(axis) is not int
        or training is not True
        or (output_mask is not ALL and not _is_mask(output_mask))
    ):
        return None
    site, number = _site_of(x, axis), _floor(activation)
    if site is None:
        return None
    cached: _Entries = site
    if number is None:
        other = _other(site, activation)
        if other is None:
            return None
        cached, number = other
    # The derivative of ReLU is read from y, that of another activation computed with the residual.
    kept, useless = (y, residual) if cached.act is None else (residual, y)
    mask = "none" if number == -inf else "beta" if kept is None else "y"
    want_dx, want_dgamma, want_dbeta, want_dresidual = output_mask
    if not want_dx or useless is not None:
        return None
    if kept is not None and (mask == "none" or not want_dresidual):
        return None
    numbers = site.serial if site.small else site.work(5 if mask == "y" else 3)
    if numbers is None:
        return None
    entry = cached.backward.get(mask)
    if entry is None:
        if not (_all_of(site.dtype, dy, gamma, beta, kept, out) and _all_of(_FLOAT64, mean, rstd)):
            return None
        entry = entries.backward(site.traversal, site.dtype.name, mask, cached.act)
        cached.backward[mask] = entry
    dx = site.new() if out is None else out
    dresidual = site.new() if mask == "y" else None
    dgamma, dbeta = np.empty(site.C, site.dtype), np.empty(site.C, site.dtype)
    done = entry(
        dy, x, gamma, mean, rstd, beta, kept, out, dx, dresidual, dgamma, dbeta, numbers, number
    )
    if not done:
        return None
    return dx, dgamma if want_dgamma else None, dbeta if want_dbeta else None, dresidual


def _all_of(dtype: np.dtype[Any], *arrays: Any) -> bool:
    """Return True if all are None or arrays of `dtype`; entries are compiled only then."""
    return all(a is None or (type(a) is np.ndarray and a.dtype == dtype) for a in arrays)


def _is_mask(output_mask: Any) -> bool:
    return (
        type(output_mask) is tuple
        and len(output_mask) == 4
        and all(type(wanted) is bool for wanted in output_mask)
    )
