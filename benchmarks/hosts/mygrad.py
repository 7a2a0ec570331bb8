"""mygrad: its own batch normalization in NumPy, and nbnorm's."""

from collections.abc import Callable
from typing import Any

import mygrad
from mygrad.nnet.layers import batchnorm

from benchmarks.peers.batch import EPS, Batch
from nbnorm.integrations.mygrad import batch_norm


def name() -> str:
    return f"mygrad {mygrad.__version__}"


def calls(shape: tuple[int, ...], dtype: str = "float32") -> dict[str, Callable[[], object]]:
    """Return calls of forward and backward, which return y, dx, dgamma, dbeta as NumPy arrays."""
    b = Batch(shape, dtype)
    dy = b.dy
    x, gamma, beta = (mygrad.tensor(array, copy=False) for array in (b.x, b.gamma, b.beta))

    def step(function: Callable[..., Any]) -> tuple[Any, ...]:
        y = function(x, gamma=gamma, beta=beta, eps=EPS)
        y.backward(dy)
        return y.data, x.grad, gamma.grad, beta.grad

    return {"host": lambda: step(batchnorm), "nbnorm": lambda: step(batch_norm)}
