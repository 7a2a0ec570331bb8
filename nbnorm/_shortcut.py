"""Ordinary calls on NumPy arrays by one compiled function; None where a call is not ordinary.

Checks and arithmetic of a small call take 2 us when compiled, and ten more as Python. What an entry
(`nbnorm.cpu.entries`) does not recognise, wrong arguments among it, has been left untouched and
goes through `functional`.
"""

from __future__ import annotations

from functools import lru_cache
from math import inf, prod
from typing import Any

import numpy as np

from nbnorm._layout import layout_of
from nbnorm.cpu import entries, ordinary_plan
from nbnorm.cpu.objects import readable
from nbnorm.cpu.plan import SERIAL_BELOW

_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
_READABLE = readable()


class _Site:
    """What there is to know of calls on arrays of one shape, dtype and channel axis."""

    __slots__ = ("C", "backward", "dtype", "forward", "inference", "numbers", "traversal")

    def __init__(self, shape: tuple[int, int, int], dtype: np.dtype[Any]) -> None:
        self.traversal, self.numbers = ordinary_plan(shape, dtype)
        self.C = shape[1]
        self.dtype = dtype.name
        self.forward: list[Any] = [None, None]  # without residual and with it
        self.inference: list[Any] = [None, None]
        self.backward: dict[str, Any] = {}


@lru_cache(maxsize=1024)
def _site(shape: tuple[int, ...], dtype: np.dtype[Any], axis: int) -> _Site | None:
    """Return the site of small arrays in C order; None where there can be no ordinary call."""
    if (
        not (_READABLE and len(shape) >= 2 and -len(shape) <= axis < len(shape))
        or not any(dtype is known for known in _DTYPES)
        or not 0 < prod(shape) < SERIAL_BELOW
    ):
        return None
    size, strides = dtype.itemsize, []
    for n in reversed(shape):
        strides.insert(0, size)
        size *= n
    layout = layout_of(shape, tuple(strides), dtype.itemsize, (axis % len(shape),))
    return _Site(layout.shape, dtype) if layout.natural else None


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
    """y, mean and rstd of `batch_norm_forward`."""
    if type(axis) is not int or type(eps) is not float or type(momentum) is not float:
        return None
    shape, dtype = x.shape, x.dtype
    site = _site(shape, dtype, axis)
    if site is None or type(correction) is not int:
        return None
    if activation is None:
        floor = -inf
    elif type(activation) is str and activation == "relu":
        floor = 0.0
    else:
        return None
    added = residual is not None
    y = np.empty(shape, dtype) if out is None else out
    mean, rstd = np.empty(site.C), np.empty(site.C)
    if training:
        entry = site.forward[added]
        if entry is None:
            entry = site.forward[added] = entries.forward(site.traversal, site.dtype, added)
        done = entry(
            x, gamma, beta, running_mean, running_var, residual, out, y, mean, rstd, site.numbers,
            eps, momentum, correction, floor,
        )  # fmt: skip
    else:
        entry = site.inference[added]
        if entry is None:
            entry = site.inference[added] = entries.inference(site.traversal, site.dtype, added)
        done = -inf < momentum < inf and entry(
            x, gamma, beta, running_mean, running_var, residual, out, y, mean, rstd, site.numbers,
            eps, floor,
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
) -> Any:
    """y of `batch_norm_inference`."""
    if type(axis) is not int or type(eps) is not float:
        return None
    shape, dtype = x.shape, x.dtype
    site = _site(shape, dtype, axis)
    if site is None:
        return None
    if activation is None:
        floor = -inf
    elif type(activation) is str and activation == "relu":
        floor = 0.0
    else:
        return None
    added = residual is not None
    entry = site.inference[added]
    if entry is None:
        entry = site.inference[added] = entries.inference(site.traversal, site.dtype, added)
    y = np.empty(shape, dtype) if out is None else out
    done = entry(x, gamma, beta, mean, var, residual, out, y, None, None, site.numbers, eps, floor)
    return y if done else None


ALL = (True, True, True, True)


def backward(
    dy: Any,
    x: Any,
    gamma: Any,
    mean: Any,
    rstd: Any,
    beta: Any,
    y: Any,
    training: Any,
    axis: Any,
    activation: Any,
    output_mask: Any,
    out: Any,
) -> tuple[Any, Any, Any, Any] | None:
    """dx, dgamma, dbeta and dresidual of `batch_norm_backward`; beta is None where not given."""
    if type(axis) is not int or not training:
        return None
    shape, dtype = x.shape, x.dtype
    site = _site(shape, dtype, axis)
    if site is None:
        return None
    if output_mask is not ALL and not _is_mask(output_mask):
        return None
    if activation is None:
        mask = "none"
        if y is not None:
            return None
    elif type(activation) is str and activation == "relu":
        mask = "beta" if y is None else "y"
    else:
        return None
    want_dx, want_dgamma, want_dbeta, want_dresidual = output_mask
    if not want_dx or (mask == "y" and not want_dresidual):
        return None
    entry = site.backward.get(mask)
    if entry is None:
        entry = site.backward[mask] = entries.backward(site.traversal, site.dtype, mask)
    dx = np.empty(shape, dtype) if out is None else out
    dresidual = np.empty(shape, dtype) if mask == "y" else None
    dgamma, dbeta = np.empty(site.C, dtype), np.empty(site.C, dtype)
    if not entry(
        dy, x, gamma, mean, rstd, beta, y, out, dx, dresidual, dgamma, dbeta, site.numbers
    ):
        return None
    return dx, dgamma if want_dgamma else None, dbeta if want_dbeta else None, dresidual


def _is_mask(output_mask: Any) -> bool:
    return (
        type(output_mask) is tuple
        and len(output_mask) == 4
        and all(type(wanted) is bool for wanted in output_mask)
    )
