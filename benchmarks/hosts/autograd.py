"""HIPS autograd has no batch normalization: the host's version is composed of its functions."""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import autograd.numpy as np
from autograd import make_vjp

from benchmarks.peers.batch import EPS, Batch
from nbnorm.integrations.autograd import batch_norm


def name() -> str:
    return f"autograd {version('autograd')}"


def composed(x: Any, gamma: Any, beta: Any, eps: float = EPS) -> Any:
    """Return batch normalization in autograd's functions."""
    axes, spread = (0, *range(2, x.ndim)), (-1, *[1] * (x.ndim - 2))
    mean, var = np.mean(x, axis=axes, keepdims=True), np.var(x, axis=axes, keepdims=True)
    return gamma.reshape(spread) * (x - mean) / np.sqrt(var + eps) + beta.reshape(spread)


def calls(shape: tuple[int, ...], dtype: str = "float32") -> dict[str, Callable[[], object]]:
    """Return calls of forward and backward, which return y, dx, dgamma, dbeta as NumPy arrays."""
    b = Batch(shape, dtype)
    b.dy  # noqa: B018 - draws it before the timing

    def step(function: Callable[..., Any]) -> tuple[Any, ...]:
        vjp, y = make_vjp(function, argnum=(0, 1, 2))(b.x, b.gamma, b.beta)
        return (y, *vjp(b.dy))

    return {"host": lambda: step(composed), "nbnorm": lambda: step(batch_norm)}
