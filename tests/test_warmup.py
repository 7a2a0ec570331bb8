"""After `warmup`, calls of the same kind compile nothing."""

import numpy as np
import pytest
from strategies import dtype_of

import nbnorm
from nbnorm.cpu import entries as shortcut
from nbnorm.cpu import kernels


def compiled():
    """Return the number of signatures that each kernel has been compiled for."""
    passes = {
        (traversal, name): kernel
        for traversal in ("rows", "columns")
        for name, kernel in vars(getattr(kernels, traversal)).items()
    }
    others = {name: getattr(kernels, name) for name in ("move", "rstd_all")}
    ordinary = {name: getattr(shortcut, name) for name in ENTRIES}
    return {name: len(function.signatures) for name, function in (passes | others).items()} | {
        name: function.cache_info().currsize for name, function in ordinary.items()
    }


ENTRIES = ("forward", "inference", "backward")


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(
    ("shape", "axis", "dtype"),
    [
        ((6, 4, 17, 17), 1, "float32"),
        ((40, 10), 1, "float64"),
        ((8, 16, 32, 32), 1, "float32"),
        ((9000, 7), -1, "bfloat16"),
    ],
)
def test_calls_after_it_compile_nothing(shape, axis, dtype, activation, residual):
    nbnorm.warmup(shape, dtype=dtype_of(dtype), axis=axis, activation=activation, residual=residual)
    before = compiled()
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(size=shape).astype(dtype_of(dtype)) for _ in range(2))
    C = shape[axis]
    wide = "f8" if dtype == "float64" else "f4"
    gamma, beta, *running = (np.ones(C, wide) for _ in range(4))
    options = {"axis": axis, "activation": activation}
    added = dy if residual else None
    y, mean, rstd = nbnorm.batch_norm_forward(x, gamma, beta, *running, residual=added, **options)
    mask = {"y": y} if residual else {"beta": beta}
    nbnorm.batch_norm_backward(dy, x, gamma, mean, rstd, **mask, **options)
    nbnorm.batch_norm_inference(x, gamma, beta, *running, residual=added, **options)
    assert compiled() == before


def test_without_a_shape():
    with pytest.raises(TypeError, match="at least one shape"):
        nbnorm.warmup()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (((4, 5),), {"dtype": "int32"}, TypeError, "dtype int32"),
        (((4, 5),), {"axis": 3}, ValueError, "axis 3"),
        (((4, 5),), {"activation": "elu"}, ValueError, "activation"),
        (((4,),), {}, ValueError, "at least 2 dimensions"),
    ],
)
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        nbnorm.warmup(*arguments, **options)
