"""`BatchNorm` follows its inputs to a GPU and back.

Runs in a child process with the simulator and a stand-in for CuPy.
"""

from pathlib import Path

import pytest
from children import run_child

CHILD = """
import sys

sys.path.insert(0, TESTS)
import backends

backends.EXCHANGES["simulator"]()
import cupy
import numpy as np
from numpy.testing import assert_array_equal

import nbnorm

rng = np.random.default_rng(0)
x, residual, dy = (rng.normal(3, 2, (6, 5, 4, 3)).astype("float32") for _ in range(3))
here, there = (nbnorm.BatchNorm(5, activation="relu") for _ in range(2))
for layer in (here, there):
    layer.parameters["weight"][...] = np.linspace(0.5, 2, 5)


def on(device, array):
    with cupy.cuda.Device(device):
        return cupy.asarray(array)


def near(got, expected):
    got = got.get() if isinstance(got, cupy.ndarray) else got
    np.testing.assert_allclose(got, expected, 1e-5, 1e-6)


def arrays(layer):
    return [*layer.parameters.values(), layer.running_mean, layer.running_var]


def same_state():
    expected = here.state_dict()
    for name, value in there.state_dict().items():
        assert type(value) is np.ndarray
        near(value, expected[name])


# Training on two GPUs, one after the other, and on the CPU again.
for device in (0, 1, 1, None, 0):
    given = (x, residual) if device is None else (on(device, x), on(device, residual))
    y = there.forward(*given)
    near(y, here.forward(x, residual))
    dx, dresidual = there.backward(dy if device is None else on(device, dy))
    expected = here.backward(dy)
    near(dx, expected[0])
    near(dresidual, expected[1])
    near(there.grads["weight"], here.grads["weight"])
    for array in (*arrays(there), y, dx, there.grads["bias"]):
        if device is None:
            assert type(array) is np.ndarray
        else:
            assert isinstance(array, cupy.ndarray) and array.device.id == device
    same_state()
assert there.num_batches_tracked == 5

# Evaluation on a GPU, with a state and statistics from the CPU.
state = {name: value + 1 for name, value in here.state_dict().items()}
moments = nbnorm.batch_norm_stats(x)
device_moments = nbnorm.batch_norm_stats(on(1, x))
for layer in (here, there):
    layer.eval()
    layer.load_state_dict(state)
    near(there.forward(on(0, x)), here.forward(x)) if layer is there else None
here.set_statistics(moments)
for given in (moments, device_moments):
    there.running_mean.set(np.full(5, np.nan, "float32"))
    there.set_statistics(given)
    same_state()
with nbnorm.recalibrate(here):
    here.forward(x[:2]), here.forward(x[2:])
with nbnorm.recalibrate(there):
    there.forward(on(1, x[:2])), there.forward(on(1, x[2:]))
same_state()
there.load_state_dict({**state, "weight": on(1, state["weight"])})
here.load_state_dict(state)
same_state()
assert isinstance(there.running_var, cupy.ndarray)

# Renormalisation, with bounds that clip and bounds that do not.
for bounds in ((1.1, 0.2), (10.0, 10.0)):
    options = {"renorm": nbnorm.Renorm(*bounds), "debias": True}
    here, there = (nbnorm.BatchNorm(5, **options) for _ in range(2))
    for device in (0, None, 1):
        given, back = (a if device is None else on(device, a) for a in (x, dy))
        near(there.forward(given), here.forward(x))
        near(there.backward(back), here.backward(dy))
        for name, gradient in there.grads.items():
            near(gradient, here.grads[name])
        same_state()

# One parameter alone.
for affine in ("gamma", "beta"):
    here, there = (nbnorm.BatchNorm(5, affine=affine) for _ in range(2))
    near(there.forward(on(1, x)), here.forward(x))
    near(there.backward(on(1, dy)), here.backward(dy))
    [(name, gradient)] = there.grads.items()
    near(gradient, here.grads[name])
    same_state()
mean, var = (on(0, np.full(5, value, "float32")) for value in (1.0, 2.0))
saved = nbnorm.batch_renorm_forward(on(0, x), None, None, mean, var)
assert all(isinstance(array, cupy.ndarray) for array in saved)
empty = nbnorm.batch_renorm_forward(on(0, x[:0]), None, None, mean, var)
near(empty.r, np.ones(5))
print("done")
"""


@pytest.mark.slow  # compiles kernels in a child process
def test_a_layer_follows_its_inputs_to_a_gpu_and_back():
    tests = Path(__file__).parents[1]
    assert run_child("-W", "error", "-c", f"TESTS = {str(tests)!r}\n{CHILD}") == "done\n"
