"""JAX: batch normalization as in Flax, one jitted program per call.

Flax computes the variance as E[x^2] - E[x]^2, and statistics of float16 and bfloat16 in float32. A
program returns everything that a user needs, since XLA drops what is not returned. A call waits for
its results.
"""

import os
from functools import partial
from typing import Any

import numba
import numpy as np

from benchmarks.peers.batch import EPS, MOMENTUM, Batch, Call, Peer


def peer() -> Peer:
    ops = {"forward": _forward, "backward": _backward, "inference": _inference}
    steps = {"relu": partial(_step, add=False), "add+relu": partial(_step, add=True)}
    return Peer(ops | steps, library="jax")


def _jax(b: Batch) -> Any:
    # XLA reads this when it starts; by default it uses all processors.
    os.environ.setdefault("PJRT_NPROC", str(numba.get_num_threads()))
    import jax

    jax.config.update("jax_enable_x64", b.x.dtype == np.float64)
    return jax


def _arrays(jax: Any, *arrays: np.ndarray) -> list[Any]:
    return [jax.numpy.asarray(array) for array in arrays]


def _apply(jax: Any, x: Any, gamma: Any, beta: Any, mean: Any, var: Any) -> Any:
    """gamma (x - mean) / sqrt(var + eps) + beta, in the dtype of the parameters."""
    shape = (-1, *[1] * (x.ndim - 2))
    factor = jax.lax.rsqrt(var + EPS) * gamma
    y = (x.astype(mean.dtype) - mean.reshape(shape)) * factor.reshape(shape)
    return (y + beta.reshape(shape)).astype(x.dtype)


def _train(jax: Any, x: Any, gamma: Any, beta: Any) -> tuple[Any, Any, Any]:
    axes = (0, *range(2, x.ndim))
    wide = x.astype(gamma.dtype)
    mean = wide.mean(axes)
    var = (wide * wide).mean(axes) - mean * mean
    return _apply(jax, x, gamma, beta, mean, var), mean, var


def _move(running: tuple[Any, Any], mean: Any, var: Any, unbias: float) -> tuple[Any, Any]:
    """Return the running statistics moved towards those of the batch."""
    return (
        (1 - MOMENTUM) * running[0] + MOMENTUM * mean,
        (1 - MOMENTUM) * running[1] + MOMENTUM * unbias * var,
    )


def _forward(b: Batch) -> Call:
    jax = _jax(b)
    inputs = _arrays(jax, b.x, b.gamma, b.beta, b.running_mean, b.running_var)
    unbias = b.values / (b.values - 1)

    @jax.jit
    def program(x, gamma, beta, *running):
        y, mean, var = _train(jax, x, gamma, beta)
        return y, _move(running, mean, var, unbias)

    return lambda: jax.block_until_ready(program(*inputs))[0]


def _backward(b: Batch) -> Call:
    jax = _jax(b)
    dy, *inputs = _arrays(jax, b.dy, b.x, b.gamma, b.beta)
    # Forward saves arrays; a second program computes the gradients from them and dy.
    _, saved = jax.jit(partial(jax.vjp, lambda *args: _train(jax, *args)[0]))(*inputs)
    program = jax.jit(lambda saved, dy: saved(dy))
    return lambda: jax.block_until_ready(program(saved, dy))


def _inference(b: Batch) -> Call:
    jax = _jax(b)
    inputs = _arrays(jax, b.x, b.gamma, b.beta, b.running_mean, b.running_var)
    program = jax.jit(partial(_apply, jax))
    return lambda: jax.block_until_ready(program(*inputs))


def _step(b: Batch, *, add: bool) -> Call:
    jax = _jax(b)
    added = [b.residual] if add else []
    dy, *arrays = _arrays(jax, b.dy, b.running_mean, b.running_var, b.x, b.gamma, b.beta, *added)
    running, inputs = arrays[:2], arrays[2:]
    unbias = b.values / (b.values - 1)

    def layer(x, gamma, beta, *residual):
        y, mean, var = _train(jax, x, gamma, beta)
        return jax.nn.relu(sum(residual, y)), (mean, var)

    @jax.jit
    def program(dy, running, *inputs):
        y, back, moments = jax.vjp(layer, *inputs, has_aux=True)
        return (y, *back(dy)), _move(running, *moments, unbias)

    return lambda: jax.block_until_ready(program(dy, running, *inputs))[0]
