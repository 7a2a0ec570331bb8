"""Second derivatives of the activations, for hosts that differentiate twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nbnorm.activations import Activation

# Beyond it every second derivative is 0 in float64; an infinite v would make it 0 times Inf.
_FAR = 1e3


def curvature(activation: Activation, v: Any) -> Any:
    """Return act''(v), an array of v's shape in float64, for an activation of the table.

    At the corners of piecewise functions it is 0. NaN gives NaN.
    """
    v = np.clip(np.asarray(v, np.float64), -_FAR, _FAR)
    return _TABLE[activation.name](v) + 0 * v


def has_curvature(activation: Activation) -> bool:
    """Whether `curvature` knows the activation; it does not know functions of the user."""
    return activation.functions is None


def _bump(v: Any) -> Any:
    """The logistic density, s (1 - s), s = sigmoid(v)."""
    e = np.exp(-abs(v))
    return e / (1 + e) ** 2


def _linear(v: Any) -> Any:
    return 0.0


def _hardswish(v: Any) -> Any:
    return np.where(abs(v) < 3, 1 / 3, 0)


def _sigmoid(v: Any) -> Any:
    """s (1 - s) (1 - 2 s)."""
    return -_bump(v) * np.tanh(v / 2)


def _tanh(v: Any) -> Any:
    """-2 t (1 - t^2)."""
    return -8 * np.tanh(v) * _bump(2 * v)


def _silu(v: Any) -> Any:
    """2 s' + v s''."""
    return 2 * _bump(v) + v * _sigmoid(v)


def _gelu(v: Any) -> Any:
    """(2 - v^2) times the normal density."""
    return (2 - v * v) * np.exp(-v * v / 2) / np.sqrt(2 * np.pi)


def _gelu_tanh(v: Any) -> Any:
    """The second derivative of v s(u), where u = sqrt(8 / pi) (v + 0.044715 v^3)."""
    factor = np.sqrt(8 / np.pi)
    u = factor * (v + 0.044715 * v**3)
    first, second = factor * (1 + 3 * 0.044715 * v * v), factor * 6 * 0.044715 * v
    return (2 * first + v * second) * _bump(u) + v * first**2 * _sigmoid(u)


_TABLE: dict[str, Callable[[Any], Any]] = {
    "leaky_relu": _linear,
    "relu6": _linear,
    "hardswish": _hardswish,
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
}
