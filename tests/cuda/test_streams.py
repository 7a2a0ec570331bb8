"""Arrays of other libraries on a GPU: computed on their device, on their library's stream.

Runs in a child process with the simulator and stand-ins for CuPy and torch.
"""

from pathlib import Path

import pytest
from children import run_child

CHILD = '''
import sys
from types import ModuleType, SimpleNamespace

sys.path.insert(0, TESTS)
import backends

backends.EXCHANGES["simulator"]()
import fake_cupy
import cupy
import numpy as np

import nbnorm
import nbnorm.cuda

STREAM, DEVICE = 777, 1


class Tensor:
    """A torch tensor on the second device."""

    requires_grad = False

    def __init__(self, array):
        self.array = array

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: f"torch.{self.array.dtype}")

    def __dlpack__(self, **_):
        raise AssertionError("the stand-in for CuPy takes it as it is")

    def __dlpack_device__(self):
        return 2, DEVICE

    def to_cupy(self):
        where.append((cupy.cuda.runtime.getDevice(), cupy.cuda.get_current_stream().ptr))
        return cupy.ndarray.of(self.array, cupy.cuda.Device())


torch = sys.modules["torch"] = ModuleType("torch")
Tensor.__module__ = "torch"
torch.from_dlpack = lambda array: Tensor(array.numpy)
torch.cuda = SimpleNamespace(current_stream=lambda device: SimpleNamespace(cuda_stream=STREAM))

where = []
launched = nbnorm.cuda.launch.run


def run(*args, **options):
    where.append((cupy.cuda.runtime.getDevice(), cupy.cuda.get_current_stream().ptr))
    launched(*args, **options)


nbnorm.cuda.launch.run = run
rng = np.random.default_rng(0)


def tensor(*shape):
    return Tensor(rng.uniform(1, 2, shape).astype("float32"))


def elsewhere(function, *args, **kwargs):
    """Call; everything must have been on the tensors' device and their library's stream."""
    where.clear()
    result = function(*args, **kwargs)
    assert where, function
    assert set(where) == {(DEVICE, STREAM)}, (function, where)
    assert cupy.cuda.runtime.getDevice() == cupy.cuda.get_current_stream().ptr == 0
    return result


x, dy, weight, bias, mean, var = tensor(4, 3), tensor(4, 3), *(tensor(3) for _ in range(4))
before = mean.array.copy()
y, m, r = elsewhere(nbnorm.batch_norm_forward, x, weight, bias, mean, var)
assert type(y) is Tensor and not np.array_equal(mean.array, before)
expected = nbnorm.batch_norm_forward(x.array, weight.array, bias.array).y
np.testing.assert_allclose(y.array, expected, 1e-5)
elsewhere(nbnorm.batch_norm_backward, dy, x, weight, m, r)
elsewhere(nbnorm.batch_norm_inference, x, weight, bias, mean, var)
mask = Tensor(np.array([[True], [True], [False], [True]]))
for counting in ({"mask": mask}, {"weights": tensor(4, 1)}, {"mask": mask, "groups": 2}):
    found = elsewhere(nbnorm.batch_norm_forward, x, weight, bias, correction=0, **counting)
    expected = nbnorm.batch_norm_forward(
        x.array, weight.array, bias.array, correction=0,
        **{name: getattr(given, "array", given) for name, given in counting.items()},
    )
    np.testing.assert_allclose(found.y.array, expected.y, 1e-4, 1e-4)
    elsewhere(nbnorm.batch_norm_backward, dy, x, weight, *found[1:], **counting)
elsewhere(nbnorm.batch_norm_apply, x=x, gamma=weight, beta=bias, mean=m, rstd=r)
moments = elsewhere(nbnorm.batch_norm_stats, x)
for function in (moments.merge, moments.var):
    elsewhere(function)
elsewhere(moments.rstd, 1e-5)
elsewhere(nbnorm.update_running_stats, mean, var, moments)
elsewhere(nbnorm.fold_batch_norm, weight, bias, mean, var)
elsewhere(nbnorm.fold_into_linear, tensor(3, 2), bias, weight, bias, mean, var)
elsewhere(nbnorm.fold_into_conv, tensor(3, 2, 1, 1), bias, weight, bias, mean, var)
for given in (
    {"gamma": weight.array}, {"gamma": cupy.asarray(weight.array)}, {"mask": mask.array},
    {"weights": cupy.asarray(weight.array)},
):
    try:
        nbnorm.batch_norm_forward(x, **given)
    except ValueError as error:
        assert "expected the memory of CUDA device 1, where x is" in str(error), error
    else:
        raise AssertionError("arrays in two places were accepted")
print("done")
'''


@pytest.mark.slow  # a child process that compiles and simulates kernels
def test_torch_tensors_are_computed_on_torchs_stream_of_their_device():
    tests = Path(__file__).parents[1]
    assert run_child("-W", "error", "-c", f"TESTS = {str(tests)!r}\n{CHILD}") == "done\n"
