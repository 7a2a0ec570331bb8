"""Run by test_thinc.py in a child process: the layer with stand-ins for CuPy and CUDA."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from backends import simulated
from thinc.api import NumpyOps, Ops

from nbnorm.integrations.thinc import BatchNorm

simulated()
import cupy  # noqa: E402  # the stand-in


class StandInOps(Ops):
    """Ops that allocate as `CupyOps` does."""

    name, xp = "cupy", cupy


def results(ops, array_of):
    """Return all results of a layer, for one kind of arrays."""
    rng = np.random.default_rng(0)
    X, dY = (array_of(rng.standard_normal((40, 3)).astype("f")) for _ in range(2))
    layer = BatchNorm(3, activation="relu")
    layer.ops = ops
    layer.initialize()
    given = []
    for is_train in (True, True, False):
        Y, backprop = layer(X, is_train=is_train)
        given += [Y, backprop(dY)]
    return (
        given
        + [layer.get_param(name) for name in layer.param_names]
        + [layer.get_grad(name) for name in ("G", "b")]
    )


expected = results(NumpyOps(), np.asarray)
got = results(StandInOps(), cupy.asarray)
assert len(got) == len(expected) == 12
for ours, reference in zip(got, expected, strict=True):
    assert type(ours) is cupy.ndarray, type(ours)
    assert ours.dtype == reference.dtype
    np.testing.assert_allclose(ours.get(), reference, rtol=0, atol=2e-5)  # sums of 40, three times
