"""thinc has no batch norm: the host's version is a layer such as its users would write."""

from collections.abc import Callable

import numpy as np
import thinc
from thinc.api import Model, NumpyOps

from benchmarks.peers.batch import EPS, MOMENTUM, Batch
from nbnorm.integrations.thinc import BatchNorm


def name() -> str:
    return f"thinc {thinc.about.__version__}"


def calls(shape: tuple[int, ...], dtype: str = "float32") -> dict[str, Callable[[], object]]:
    """Return calls of forward and backward: they return Y, dX, dG, db, running mean and var."""
    batch = Batch(shape, dtype)
    models = {
        "host": Model("composed", _composed, params=dict.fromkeys(_PARAMETERS), ops=NumpyOps()),
        "nbnorm": BatchNorm(shape[1], eps=EPS, momentum=MOMENTUM, axis=1),
    }
    return {which: _step(model, batch) for which, model in models.items()}


_PARAMETERS = ("G", "b", "running_mean", "running_var")


def _step(model: Model, batch: Batch) -> Callable[[], object]:
    values = batch.gamma, batch.beta, batch.running_mean, batch.running_var
    for parameter, value in zip(_PARAMETERS, values, strict=True):
        model.set_param(parameter, value.copy())

    def step() -> tuple[np.ndarray, ...]:
        for parameter in ("G", "b"):  # reset to 0, as by an optimizer's step
            model.set_grad(parameter, np.zeros_like(model.get_param(parameter)))
        Y, backprop = model.begin_update(batch.x)
        dX = backprop(batch.dy)
        gradients = model.get_grad("G"), model.get_grad("b")
        return (Y, dX, *gradients, *map(model.get_param, _PARAMETERS[2:]))

    return step


def _composed(model: Model, X: np.ndarray, is_train: bool) -> tuple[np.ndarray, Callable]:
    """Batch norm of axis 1 in array operators, like thinc's LayerNorm."""
    axes = (0, *range(2, X.ndim))
    m = X.size // X.shape[1]

    def spread(parameter: np.ndarray) -> np.ndarray:
        return parameter.reshape(-1, *[1] * (X.ndim - 2))

    G, b, running_mean, running_var = map(model.get_param, _PARAMETERS)
    mean, var = (X.mean(axes), X.var(axes)) if is_train else (running_mean, running_var)
    rstd = (var + var.dtype.type(EPS)) ** -0.5
    Xhat = (X - spread(mean)) * spread(rstd)
    Y = Xhat * spread(G)
    Y += spread(b)
    if is_train:
        running_mean += MOMENTUM * (mean - running_mean)
        running_var += MOMENTUM * (m / (m - 1) * var - running_var)

    def backprop(dY: np.ndarray) -> np.ndarray:
        db, dG = dY.sum(axes), (dY * Xhat).sum(axes)
        model.inc_grad("b", db)
        model.inc_grad("G", dG)
        if not is_train:
            return dY * spread(G * rstd)
        dX = dY - spread(db / m)
        dX -= Xhat * spread(dG / m)
        dX *= spread(G * rstd)
        return dX

    return Y, backprop
