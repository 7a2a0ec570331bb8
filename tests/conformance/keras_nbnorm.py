"""Run Keras's own tests of batch normalization with nbnorm in its NumPy backend.

A script for a separate process, because Keras reads its backend from the environment
(``KERAS_BACKEND=numpy``). It replaces three functions of Keras, runs the tests in Keras's wheel,
and prints their outcomes as JSON.
"""

import contextlib
import functools
import json
import os
import sys
from collections import Counter

import numpy as np
import pytest
from keras.src import ops
from keras.src.backend.numpy import nn
from keras.src.layers import BatchNormalization

import nbnorm

MODULES = (
    "keras.src.layers.normalization.batch_normalization_test",
    "keras.src.ops.nn_test",
)
ABOUT = "BatchNormalizationTest or batch_normalization or moments"

calls = Counter()


def instead_of(owner):
    """Replace `owner`'s function of the same name; the new one receives the old as `theirs`."""

    def replace(function):
        name = function.__name__

        @functools.wraps(getattr(owner, name))
        def counted(*args, **kwargs):
            return function(theirs, *args, **kwargs)

        theirs = getattr(owner, name)
        setattr(owner, name, counted)
        return function

    return replace


@instead_of(nn)
def batch_normalization(theirs, x, mean, variance, axis, offset=None, scale=None, epsilon=1e-3):
    calls["batch_norm_inference"] += 1
    return nbnorm.batch_norm_inference(x, scale, offset, mean, variance, eps=epsilon, axis=axis)


@instead_of(nn)
def moments(theirs, x, axes, keepdims=False, synchronized=False):
    if synchronized:
        return theirs(x, axes, keepdims, synchronized)
    calls["batch_norm_stats"] += 1
    reduced = {axis % x.ndim for axis in np.atleast_1d(axes)}
    kept = [axis for axis in range(x.ndim) if axis not in reduced]
    # Add a channel axis of length 1, because Keras may reduce all axes.
    found = nbnorm.batch_norm_stats(x[..., None], axis=(*kept, x.ndim))
    shape = [1 if axis in reduced else length for axis, length in enumerate(x.shape)]
    shape = shape if keepdims else [x.shape[axis] for axis in kept]
    # Keras clips values that float16 cannot hold.
    limit = np.finfo(np.float16).max if x.dtype == np.float16 else np.inf
    return tuple(
        np.clip(values, -limit, limit).astype(x.dtype).reshape(shape)
        for values in (found.mean, found.var())
    )


@instead_of(BatchNormalization)
def call(theirs, self, inputs, training=None, mask=None):
    """Replace the training step, with moving averages; other calls use the functions above."""
    if mask is not None or self.renorm or not (training and self.trainable):
        return theirs(self, inputs, training=training, mask=mask)
    calls["batch_norm_forward"] += 1
    gamma, beta = (None if v is None else v.value for v in (self.gamma, self.beta))
    mean, variance = self.moving_mean.value.copy(), self.moving_variance.value.copy()
    result = nbnorm.batch_norm_forward(
        inputs, gamma, beta, mean, variance,
        momentum=1 - self.momentum, eps=self.epsilon, correction=0, axis=self.axis,
    )  # fmt: skip
    self.moving_mean.assign(mean)
    self.moving_variance.assign(variance)
    return ops.cast(result.y, self.compute_dtype)


class Report:
    """A pytest plugin that records each test's outcome and its calls of nbnorm."""

    def __init__(self):
        self.tests = {}

    def pytest_configure(self, config):
        # Registered by conftest.py in Keras's repository, which is not in the wheel.
        config.addinivalue_line("markers", "requires_trainable_backend: needs fit()")

    def pytest_collection_modifyitems(self, items):
        for item in items:
            if item.get_closest_marker("requires_trainable_backend"):
                item.add_marker(pytest.mark.skip(reason="Keras cannot fit() on NumPy"))

    def pytest_runtest_logstart(self):
        np.random.seed(0)  # noqa: NPY002  # what Keras's tests draw from
        calls.clear()

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            name = ".".join(report.nodeid.split("::")[-2:])
            self.tests[name] = {
                "outcome": report.outcome,
                "details": report.longreprtext,
                "calls": dict(calls),
            }


def main():
    report = Report()
    with contextlib.redirect_stdout(sys.stderr):
        arguments = ["-c", os.devnull, "-p", "no:cacheprovider", "-k", ABOUT, "--pyargs", *MODULES]
        pytest.main(arguments, plugins=[report])
    print(json.dumps(report.tests))


if __name__ == "__main__":
    main()
