"""Shared by tests of hosts that differentiate NumPy functions: data, the oracle, children."""

import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from children import run_child
from tolerances import (
    assert_within,
    channels_of,
    dx_tolerance,
    running_tolerance,
    stored,
    sums_tolerance,
    y_tolerance,
)

import nbnorm
from nbnorm import reference

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the benchmarks are not part of an installation

from benchmarks.checking import check  # noqa: E402
from benchmarks.peers import Batch as Measured  # noqa: E402

LAYOUTS = {
    "NCHW": ((4, 3, 5, 6), 1),
    "NC": ((9, 4), 1),
    "channels-last": ((4, 5, 6, 3), -1),
    "per activation": ((6, 2, 3), (1, 2)),
}
# (residual, activation)
FUSED = {
    "plain": (False, None),
    "relu": (False, "relu"),
    "residual": (True, None),
    "residual and relu": (True, "relu"),
}


# Smooth, piecewise, and with a parameter.
ACTIVATIONS = ("silu", "hardswish", nbnorm.activation("leaky_relu", slope=0.2))


class Batch(NamedTuple):
    """Arguments of a call and the gradient of its result; omitted ones are None."""

    x: np.ndarray
    gamma: np.ndarray | None
    beta: np.ndarray | None
    residual: np.ndarray | None
    running_mean: np.ndarray
    running_var: np.ndarray
    dy: np.ndarray

    @property
    def differentiable(self):
        """Return names and arrays that have a gradient."""
        names = ("x", "gamma", "beta", "residual")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}


def drawn(
    layout="NCHW", dtype="float64", *, gamma=True, beta=True, residual=False, shape=None
) -> Batch:
    """Return a random batch whose arrays are read-only, except for running statistics."""
    shape, axis = LAYOUTS[layout] if shape is None else (shape, 1)
    channels = channels_of(shape, axis)
    rng = np.random.default_rng(0)

    def normal(size):
        array = rng.standard_normal(size).astype(dtype)
        array.flags.writeable = False
        return array

    return Batch(
        normal(shape),
        normal(channels) if gamma else None,
        normal(channels) if beta else None,
        normal(shape) if residual else None,
        rng.standard_normal(channels).astype(dtype),
        rng.uniform(0.5, 1.5, channels).astype(dtype),
        normal(shape),
    )


def assert_right(b, y, grads, *, axis, training=True, activation=None, eps=1e-5):
    """Compare y and a dict of gradients with the oracle's: value, shape and dtype."""
    ref_y, mean, rstd = reference.batch_norm_forward(
        b.x, b.gamma, b.beta, b.running_mean.copy(), b.running_var.copy(), training=training,
        eps=eps, axis=axis, residual=b.residual, activation=activation,
    )  # fmt: skip
    ref = reference.batch_norm_backward(
        b.dy, b.x, b.gamma, mean, rstd, y=ref_y, training=training, axis=axis, activation=activation
    )
    masked = ref.dresidual.astype(b.dy.dtype)
    dbeta_tolerance, dgamma_tolerance = sums_tolerance(masked, b.x, mean, rstd, axis=axis)
    assert y.dtype == b.x.dtype
    assert_within(
        y, ref_y, y_tolerance(b.x, b.gamma, b.beta, mean, rstd, axis=axis, residual=b.residual), "y"
    )
    expected = {
        "x": (
            ref.dx,
            dx_tolerance(masked, b.x, b.gamma, mean, rstd, axis=axis, training=training),
        ),
        "gamma": (ref.dgamma, stored(dgamma_tolerance, ref.dgamma, b.x.dtype)),
        "beta": (ref.dbeta, stored(dbeta_tolerance, ref.dbeta, b.x.dtype)),
        "residual": (ref.dresidual, 0),
    }
    for name, grad in grads.items():
        assert grad.dtype == getattr(b, name).dtype, name
        assert_within(grad, *expected[name], f"gradient of {name}")


def assert_right_through(b, y, grads, *, training, activation):
    """Compare y and gradients with the oracle's, for activations other than ReLU."""
    options = {"residual": b.residual, "activation": activation}
    running = b.running_mean.copy(), b.running_var.copy()
    ref_y, mean, rstd = reference.batch_norm_forward(
        b.x, b.gamma, b.beta, *running, training=training, **options
    )
    ref = reference.batch_norm_backward(
        b.dy, b.x, b.gamma, mean, rstd, beta=b.beta, training=training, **options
    )
    np.testing.assert_allclose(y, ref_y, rtol=1e-11, atol=1e-11)
    expected = dict(zip(("x", "gamma", "beta", "residual"), ref, strict=True))
    for name, grad in grads.items():
        assert grad.dtype == getattr(b, name).dtype, name
        np.testing.assert_allclose(grad, expected[name], rtol=1e-11, atol=1e-11, err_msg=name)


def assert_moved_once(before, after, x, *, axis, momentum=0.1, correction=1):
    """Compare running statistics, pairs (mean, var), with the oracle's after one batch."""
    moments = reference.batch_norm_stats(x, axis=axis)
    expected = reference.update_running_stats(
        *before, moments, momentum=momentum, correction=correction, inplace=False
    )
    tolerances = running_tolerance(
        moments, *before, momentum=momentum, correction=correction, dtype=x.dtype
    )
    for got, ref, tolerance, name in zip(after, expected, tolerances, ("mean", "var"), strict=True):
        assert_within(got, ref, tolerance, f"running_{name}")


class Trained(NamedTuple):
    """A row of an example's table."""

    first_loss: float
    last_loss: float
    accuracy: float


def run_example(name, *options):
    """Run an example; return its rows "nbnorm" and "none"."""
    script = str(ROOT / "docs" / "examples" / name)
    printed = run_child("-W", "error", script, *options)
    number = r" +([\d.]+)"
    rows = re.findall(rf"^(nbnorm|none){number}{number}{number}%{number}$", printed, re.M)
    assert [row[0] for row in rows] == ["nbnorm", "none"], printed
    return [Trained(float(row[1]), float(row[2]), float(row[3]) / 100) for row in rows]


def assert_like_with_like(calls, shape, dtype):
    """Check y, dx, dgamma and dbeta of the timed functions, "host" and "nbnorm"."""
    assert set(calls) == {"host", "nbnorm"}
    for name, call in calls.items():
        y, *grads = call()
        check(name, "forward", Measured(shape, dtype), y)
        check(name, "backward", Measured(shape, dtype), grads)
        assert all(array.dtype == dtype for array in (y, *grads))
