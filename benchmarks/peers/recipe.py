"""NumPy, as in course notes: one line per equation, each result in a new array.

float16 and bfloat16 are converted to float32 first: NumPy computes in the type of its arrays, and a
sum of ones in bfloat16 stops growing at 256.
"""

from functools import partial
from typing import NamedTuple

import numpy as np

from benchmarks.peers.batch import EPS, MOMENTUM, Batch, Call, Peer


class _Normalised(NamedTuple):
    mean: np.ndarray
    var: np.ndarray
    rstd: np.ndarray
    xhat: np.ndarray


def peer() -> Peer:
    ops = {"forward": _forward, "backward": _backward, "inference": _inference}
    return Peer(ops | {"relu": partial(_step, add=False), "add+relu": partial(_step, add=True)})


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.itemsize == 2 else array


def _spread(parameter: np.ndarray, b: Batch) -> np.ndarray:
    """Return a parameter in a shape that broadcasts against x."""
    return parameter.reshape(-1, *[1] * (b.x.ndim - 2))


def _axes(b: Batch) -> tuple[int, ...]:
    return (0, *range(2, b.x.ndim))


def _normalise(b: Batch) -> _Normalised:
    x = _wide(b.x)
    mean = x.mean(_axes(b))
    centered = x - _spread(mean, b)
    var = (centered**2).mean(_axes(b))
    rstd = 1 / np.sqrt(var + var.dtype.type(EPS))
    return _Normalised(mean, var, rstd, centered * _spread(rstd, b))


def _scale(b: Batch, n: _Normalised) -> np.ndarray:
    """Update the running statistics; return gamma xhat + beta."""
    unbiased = n.var * (b.values / (b.values - 1))
    b.running_mean[:] = (1 - MOMENTUM) * b.running_mean + MOMENTUM * n.mean
    b.running_var[:] = (1 - MOMENTUM) * b.running_var + MOMENTUM * unbiased
    return _spread(b.gamma, b) * n.xhat + _spread(b.beta, b)


def _gradients(b: Batch, dy: np.ndarray, n: _Normalised) -> tuple[np.ndarray, ...]:
    axes, m = _axes(b), b.values
    dgamma, dbeta = (dy * n.xhat).sum(axes), dy.sum(axes)
    dxhat = dy * _spread(b.gamma, b)
    sums = dxhat.sum(axes, keepdims=True), (dxhat * n.xhat).sum(axes, keepdims=True)
    dx = _spread(n.rstd / m, b) * (m * dxhat - sums[0] - n.xhat * sums[1])
    return dx.astype(b.x.dtype, copy=False), dgamma, dbeta


def _forward(b: Batch) -> Call:
    return lambda: _scale(b, _normalise(b)).astype(b.x.dtype, copy=False)


def _backward(b: Batch) -> Call:
    normalised = _normalise(b)
    return lambda: _gradients(b, _wide(b.dy), normalised)


def _inference(b: Batch) -> Call:
    parameters = b.gamma, b.beta, b.running_mean, b.running_var
    gamma, beta, mean, var = (_spread(parameter, b) for parameter in parameters)

    def call() -> np.ndarray:
        y = gamma * (_wide(b.x) - mean) / np.sqrt(var + var.dtype.type(EPS)) + beta
        return y.astype(b.x.dtype, copy=False)

    return call


def _step(b: Batch, *, add: bool) -> Call:
    def call() -> tuple[np.ndarray, ...]:
        normalised = _normalise(b)
        y = _scale(b, normalised)
        y = np.maximum(y + b.residual if add else y, 0)
        masked = b.dy * (y > 0)
        gradients = _gradients(b, _wide(masked), normalised)
        return (y.astype(b.x.dtype, copy=False), *gradients, *[masked] * add)

    return call
