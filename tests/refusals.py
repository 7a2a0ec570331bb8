"""Valid arguments of every public function, and a check that invalid ones leave no trace."""

import inspect

import numpy as np
import pytest
from tolerances import assert_same_bits

import nbnorm
from nbnorm import Moments

SHAPE = (2, 8, 4, 4)
SENTINEL = 12345.0


def data(dtype="float32", shape=SHAPE, seed=0):
    """Return an input-sized array."""
    return np.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def per_channel(dtype="float32", length=8):
    """Return a parameter or statistic filled with the sentinel."""
    return np.full(length, SENTINEL, dtype)


def target(dtype="float32", shape=SHAPE):
    """Return an output that shows whether it was written."""
    return np.full(shape, SENTINEL, dtype)


def moments(length=8, count=32):
    return Moments(count, np.zeros(length), np.ones(length))


VALID = {
    "batch_norm_forward": lambda: {
        "x": data(),
        "gamma": per_channel(),
        "beta": per_channel(),
        "running_mean": per_channel(),
        "running_var": per_channel(),
        "residual": data(),
        "out": target(),
    },
    "batch_norm_inference": lambda: {
        "x": data(),
        "gamma": per_channel(),
        "beta": per_channel(),
        "mean": per_channel(),
        "var": per_channel(),
        "residual": data(),
        "out": target(),
    },
    "batch_norm_apply": lambda: {
        "x": data(),
        "gamma": per_channel(),
        "beta": per_channel(),
        "mean": per_channel("float64"),
        "rstd": per_channel("float64"),
        "residual": data(),
        "out": target(),
    },
    "batch_norm_stats": lambda: {"x": data()},
    "batch_norm_backward": lambda: {
        "dy": data(),
        "x": data(),
        "gamma": per_channel(),
        "mean": per_channel("float64"),
        "rstd": per_channel("float64"),
        "beta": per_channel(),
        "y": data(),
        "activation": "relu",
        "out": target(),
    },
    "batch_norm_backward_reduce": lambda: {
        "dy": data(),
        "x": data(),
        "mean": per_channel("float64"),
        "rstd": per_channel("float64"),
        "gamma": per_channel(),
        "beta": per_channel(),
        "y": data(),
        "activation": "relu",
    },
    "batch_norm_backward_apply": lambda: {
        "dy": data(),
        "x": data(),
        "gamma": per_channel(),
        "mean": per_channel("float64"),
        "rstd": per_channel("float64"),
        "sum_dy": per_channel("float64"),
        "sum_dy_xhat": per_channel("float64"),
        "count": 32,
        "beta": per_channel(),
        "y": data(),
        "activation": "relu",
        "out": target(),
    },
    "batch_renorm_forward": lambda: {
        "x": data(),
        "gamma": per_channel(),
        "beta": per_channel(),
        "running_mean": per_channel(),
        "running_var": per_channel(),
        "residual": data(),
        "out": target(),
    },
    "batch_renorm_backward": lambda: {
        "dy": data(),
        "x": data(),
        "gamma": per_channel(),
        "mean": per_channel("float64"),
        "rstd": per_channel("float64"),
        "r": per_channel("float64"),
        "d": per_channel("float64"),
        "beta": per_channel(),
        "y": data(),
        "activation": "relu",
        "out": target(),
    },
    "batch_norm_double_backward": lambda: {
        "ddx": data(),
        "ddgamma": per_channel(),
        "ddbeta": per_channel(),
        "dy": data(),
        "x": data(),
        "gamma": per_channel(),
        "mean": per_channel("float64"),
        "rstd": per_channel("float64"),
    },
    "batch_norm_jvp": lambda: {
        "tx": data(),
        "tgamma": per_channel(),
        "tbeta": per_channel(),
        "x": data(),
        "gamma": per_channel(),
        "mean": per_channel("float64"),
        "rstd": per_channel("float64"),
    },
    "batch_norm_backward_statistics": lambda: {
        "sum_dy": per_channel("float64"),
        "sum_dy_xhat": per_channel("float64"),
        "gamma": per_channel(),
        "rstd": per_channel("float64"),
    },
    "update_running_stats": lambda: {
        "running_mean": per_channel(),
        "running_var": per_channel(),
        "moments": moments(),
    },
    "fold_batch_norm": lambda: {
        "gamma": per_channel(),
        "beta": per_channel(),
        "mean": per_channel(),
        "var": per_channel(),
    },
    "fold_into_linear": lambda: {
        "weight": data(shape=(8, 5)),
        "bias": per_channel(),
        "gamma": per_channel(),
        "beta": per_channel(),
        "mean": per_channel(),
        "var": per_channel(),
    },
    "fold_into_conv": lambda: {
        "weight": data(shape=(8, 5, 3, 3)),
        "bias": per_channel(),
        "gamma": per_channel(),
        "beta": per_channel(),
        "mean": per_channel(),
        "var": per_channel(),
    },
}
OVER_X = [name for name, make in VALID.items() if "x" in make()]
LARGE = ("x", "dy", "residual", "y", "out", "ddx", "tx")
SMALL = ("gamma", "beta", "running_mean", "running_var", "mean", "var", "rstd", "sum_dy")
SMALL += ("sum_dy_xhat", "bias", "ddgamma", "ddbeta", "tgamma", "tbeta", "r", "d")


def takers(*arguments, functions=tuple(VALID)):
    """Return pairs of a function and one of these arguments that it takes."""
    return [(f, a) for f in functions for a in arguments if a in VALID[f]()]


def taking(option):
    """Return the functions whose signature has this option."""
    return [f for f in VALID if option in inspect.signature(getattr(nbnorm, f)).parameters]


def bits(arguments):
    """Copy every array among the arguments, moments included."""
    arrays = {**arguments}
    if isinstance(arguments.get("moments"), Moments):
        arrays |= {"moments.mean": arrays["moments"].mean, "moments.m2": arrays["moments"].m2}
    return {
        name: (a, np.array(a, order="C"))
        for name, a in arrays.items()
        if type(a) is np.ndarray and a.dtype != object
    }


def refuses(function, error, match, **spoiled):
    """Call with some arguments replaced; check the exception and that no array has changed."""
    arguments = {**VALID[function](), **spoiled}
    before = bits(arguments)
    with pytest.raises(error, match=match):
        getattr(nbnorm, function)(**arguments)
    for name, (array, copy) in before.items():
        assert_same_bits(array, copy, name)
