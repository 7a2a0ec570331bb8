"""nbnorm.integrations.torch as a whole: names, examples, and the use of PyTorch's threads."""

import doctest
import os
import pickle
import pickletools
from pathlib import Path

import pytest
from children import run_child

torch = pytest.importorskip("torch", reason="the integration of PyTorch needs PyTorch")

from torch import nn  # noqa: E402

import nbnorm.integrations.torch as integration  # noqa: E402


def test_names_are_those_of_the_package():
    """Pickles store `__module__`: it names the package, whichever module defines an object."""
    for name in integration.__all__:
        assert getattr(integration, name).__module__ == "nbnorm.integrations.torch", name
    fused = integration.convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), fuse_relu=True)
    names = {argument for _, argument, _ in pickletools.genops(pickle.dumps(fused))}
    modules = {name for name in names if str(name).startswith("nbnorm")}
    assert modules == {"nbnorm.integrations.torch"}


def test_doctests():
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, attempted = doctest.testmod(integration, optionflags=options)
    assert failed == 0
    assert attempted > 10


HOSTED = """
import numpy as np, torch, nbnorm
from nbnorm.cpu import threads

def results():
    x = np.random.default_rng(0).normal(size=(16, 64, 28, 28)).astype("float32")
    y, mean, rstd = nbnorm.batch_norm_forward(x)
    return [y, mean, rstd, *nbnorm.batch_norm_backward(y, x, None, mean, rstd)[:3]]

own, pool = results(), threads.pool()
import nbnorm.integrations.torch
hosted = results()
print(threads.pool() != pool, all(a.tobytes() == b.tobytes() for a, b in zip(own, hosted)))
torch.set_num_threads(1)
print(threads.count())
"""


def test_kernels_run_on_the_threads_that_pytorch_has():
    """Its pool and Numba's would spin against each other: 20 ms instead of 1."""
    if not list((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        pytest.skip("this PyTorch has no OpenMP library of its own")
    printed = run_child("-c", HOSTED, NUMBA_THREADING_LAYER="omp", NUMBA_NUM_THREADS="2")
    assert printed.split() == ["True", "True", "1"]


FORKED = """
import os, signal, numpy as np, torch, nbnorm
import nbnorm.integrations.torch
(torch.ones(1000, 1000) @ torch.ones(1000, 1000)).add_(1)  # starts PyTorch's threads
torch.ones(10_000_000).add_(1)
pid = os.fork()
if not pid:
    signal.alarm(60)  # ends a child that waits for its parent's threads
    y = nbnorm.batch_norm_forward(np.ones((64, 64, 28, 28), "float32"))[0]
    os._exit(0 if (y == 0).all() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_forked_after_pytorch_had_started_its_threads_does_not_hang():
    assert run_child("-c", FORKED, NUMBA_NUM_THREADS="2").split() == ["0"]


def test_other_threading_layers_keep_their_threads():
    printed = run_child("-c", HOSTED, NUMBA_THREADING_LAYER="workqueue", NUMBA_NUM_THREADS="2")
    assert printed.split() == ["False", "True", "2"]
