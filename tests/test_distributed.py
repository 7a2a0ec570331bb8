"""Synchronised batch normalization over threads, over MPI and over torch.distributed.

The cases are in `distributed_cases.py`. Threads need no optional package; real ranks are processes
with a time limit, so that a rank that waits forever fails.
"""

# ruff: noqa: N802  # names of MPI

import doctest
import importlib.util
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import refusals
from distributed_cases import (
    BATCHES,
    CASES,
    CLOSE,
    Batch,
    Silent,
    bits_of_a_step,
    step,
    whole_step,
)
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from tolerances import assert_same_bits

import nbnorm
from nbnorm import distributed
from nbnorm._checks import NOT_GIVEN
from nbnorm._frame import Frame
from nbnorm.distributed import (
    SelfComm,
    SyncBatchNorm,
    ThreadComm,
    TorchProcessGroup,
    sync_batch_norm_backward,
    sync_batch_norm_forward,
)

HERE = Path(__file__).parent
TIME_LIMIT = 300  # seconds, including compilation of kernels
WAIT = 60  # seconds that a thread waits for the others, longer than any case takes


# Ranks as threads


def over_threads(size, function, timeout=WAIT):
    """Call with every rank's communicator at once; return the results, or raise one error."""

    def work(comm):
        with comm:
            return function(comm)

    with ThreadPoolExecutor(size) as threads:
        ranks = list(map(partial(threads.submit, work), ThreadComm.split(size, timeout=timeout)))
    # Put errors of ranks that only lost their partner last; they do not tell the cause.
    errors = [rank.exception() for rank in ranks if rank.exception() is not None]
    errors.sort(key=lambda error: error.__cause__ in errors)
    if errors:
        raise errors[0]
    return [rank.result() for rank in ranks]


# Cases that compile kernels that no other case uses.
SLOW = (
    *("equals_one_process_with_residual", "equals_one_process_with_residual_and_relu"),
    *("equals_one_process_where_planes_are_large", "renormalises_with_the_statistics_of_all_ranks"),
)


@pytest.mark.parametrize("size", BATCHES)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES]
)
def test_over_threads(name, size):
    over_threads(size, CASES[name])


def test_a_rank_that_waits_is_found_out():
    """Otherwise all these tests could pass for a rank that never communicates."""

    def one_does_not_take_part(comm):
        if comm.Get_rank() > 0:
            sync_batch_norm_forward(np.ones((3, 2)), comm=comm)

    with pytest.raises(TimeoutError, match=r"^rank 1 has waited 0.2 s for rank 0$"):
        over_threads(2, one_does_not_take_part, timeout=0.2)


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5), with_residual=st.booleans())
def test_however_a_batch_is_split(sizes, with_residual):
    if sum(sizes) == 0:
        sizes = [*sizes, 1]
    results = over_threads(
        len(sizes), lambda comm: step(comm, Batch(comm, sizes=sizes), "relu", with_residual)
    )
    whole = Batch(SelfComm(), sizes=[sum(sizes)])
    ref, ref_back, ref_running = whole_step(whole, "relu", with_residual)
    assert_allclose(np.concatenate([forward.y for forward, *_ in results]), ref.y, **CLOSE)
    assert_allclose(np.concatenate([back.dx for _, back, _ in results]), ref_back.dx, **CLOSE)
    for name in ("dgamma", "dbeta"):
        total = sum(getattr(back, name) for _, back, _ in results)
        assert_allclose(total, getattr(ref_back, name), **CLOSE)
    for forward, _, running in results:
        for array, theirs in zip((*forward[1:3], *running), (*ref[1:], *ref_running), strict=True):
            assert_allclose(array, theirs, **CLOSE)
        for ours, first in zip(
            (*forward[1:3], *running), (*results[0][0][1:3], *results[0][2]), strict=True
        ):
            assert_same_bits(ours, first)


# One rank


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("plane", [(), (7, 7), (28, 28)])
def test_one_rank_gives_the_bits_of_the_local_functions(dtype, plane, with_residual):
    batch = Batch(SelfComm(), dtype, plane=plane, sizes=[60])
    ours = step(SelfComm(), batch, "relu", with_residual)
    whole = whole_step(batch, "relu", with_residual)
    for results, expected in zip(ours, whole, strict=True):
        for array, theirs in zip(results, expected, strict=False):  # sync adds count
            assert (array is None) == (theirs is None)
            if array is not None:
                assert_same_bits(array, theirs)


def _spoilt():
    """Yield local functions and arguments that they reject, many of every kind."""
    data, per_channel = refusals.data, refusals.per_channel
    both = "batch_norm_forward", "batch_norm_backward"
    for function in both:
        for argument, value in {
            "x": data().astype(int),
            "gamma": per_channel(length=7),
            "beta": np.ma.masked_array(per_channel()),
            "axis": 9,
            "activation": "elu",
            "out": data(shape=(2, 8, 4, 5)),
        }.items():
            yield function, {argument: value}
        yield function, {"gamma": per_channel().astype(int)}
        yield function, {"x": None}
        yield function, {"axis": (1, 1)}
        yield function, {"axis": "1"}
        yield function, {"out": np.lib.stride_tricks.as_strided(data(), strides=(0, 64, 16, 4))}
        shared = data()
        yield function, {"x": shared, "out": shared[::-1]}
    for spoilt in (
        {"running_mean": None},
        {"running_var": per_channel().astype(complex)},
        {"running_mean": per_channel(length=1)},
        {"residual": data("float64")},
        {"residual": data(shape=(1, 8, 4, 4))},
        {"eps": -1.0},
        {"eps": "1e-5"},
        {"momentum": None},
        {"correction": np.inf},
        {"correction": "x"},
        {"x": (shared := data()), "running_mean": shared[0, 0].reshape(-1)[:8]},
        {"x": (other := data()), "running_var": other[0, 0].reshape(-1)[:8]},
        {"running_mean": (third := per_channel()), "running_var": third},
        {"gamma": (fourth := per_channel()), "running_var": fourth[:]},
        {"beta": (fifth := per_channel()), "running_mean": fifth},
        {"residual": (sixth := data()), "running_var": sixth[0, 0].reshape(-1)[:8]},
        {"momentum": np.nan},
        {"momentum": -np.inf},
    ):
        yield "batch_norm_forward", spoilt
    for spoilt in (
        {"dy": data("float64")},
        {"dy": None},
        {"y": data(shape=(8,))},
        {"mean": None},
        {"rstd": per_channel(length=9)},
        {"output_mask": (True,) * 3},
        {"output_mask": (1, 1, 1, 2)},
        {"beta": NOT_GIVEN, "y": None},
    ):
        yield "batch_norm_backward", spoilt


@pytest.mark.parametrize(
    ("function", "spoilt"),
    list(_spoilt()),
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_refuses_what_the_local_function_refuses_in_its_words(function, spoilt):
    """The checks made before the header is sent are those of the local functions."""
    arguments = refusals.VALID[function]() | spoilt
    with pytest.raises((TypeError, ValueError)) as theirs:
        getattr(nbnorm, function)(**arguments)
    if function == "batch_norm_backward":
        arguments["count"] = 32
    before = refusals.bits(arguments)
    with pytest.raises((TypeError, ValueError)) as ours:
        getattr(distributed, f"sync_{function}")(**arguments, comm=SelfComm())
    assert (ours.type, str(ours.value)) == (theirs.type, str(theirs.value))
    for name, (array, copy) in before.items():
        assert_same_bits(array, copy, name)


def test_read_only_running_statistics_are_refused():
    frozen = np.zeros(2)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match=r"^running_mean is read-only; it is updated in place"):
        sync_batch_norm_forward(np.ones((3, 2)), None, None, frozen, np.ones(2), comm=SelfComm())


@pytest.mark.parametrize("comm", [None, object(), np.ones(3)], ids=["None", "object", "array"])
def test_what_is_no_communicator(comm):
    x = np.ones((3, 2))
    with pytest.raises(TypeError, match=r"^comm must be a communicator with Allgather"):
        sync_batch_norm_forward(x, comm=comm)
    with pytest.raises(TypeError, match=r"^comm must be a communicator with Allgather"):
        SyncBatchNorm(2, comm=comm)


def test_size_may_be_an_attribute():
    class Comm:
        size = 1

        def Allgather(self, sendbuf, recvbuf):
            recvbuf[...] = sendbuf

    assert sync_batch_norm_forward(np.ones((3, 2)), comm=Comm()).count == 3


def test_ranks_of_another_version():
    class Newer(SelfComm):
        """Two ranks, of which the other has a newer version: only headers are exchanged."""

        def Get_size(self):
            return 2

        def Allgather(self, sendbuf, recvbuf):
            assert sendbuf.size == 16, "the header has one length in all versions"
            recvbuf[...] = sendbuf
            recvbuf[1, :2] = 4, 1

    message = r"^ranks disagree on the version of the protocol: 3 on rank 0, 4 on rank 1$"
    with pytest.raises(ValueError, match=message):
        sync_batch_norm_forward(np.ones((3, 2)), comm=Newer())
    with pytest.raises(ValueError, match=r"^eps"):
        sync_batch_norm_forward(np.ones((3, 2)), eps=-1, comm=Newer())


class Counting(SelfComm):
    """A communicator that counts the bytes sent."""

    def __init__(self):
        self.sent = []

    def Allgather(self, sendbuf, recvbuf):
        self.sent.append(sendbuf.nbytes)
        super().Allgather(sendbuf, recvbuf)


def test_two_messages_a_pass_of_the_size_that_the_documentation_says():
    comm, C = Counting(), 512
    x = np.random.default_rng(0).normal(size=(4, C)).astype("float32")
    _, mean, rstd, count = sync_batch_norm_forward(x, comm=comm)
    sync_batch_norm_backward(x, x, None, mean, rstd, count, comm=comm)
    assert comm.sent == [128, 16 * C, 128, 16 * C]
    sync_batch_norm_backward(
        x, x, None, mean, rstd, count, comm=comm, output_mask=(False, True, True, True)
    )
    assert comm.sent[4:] == [128]


@pytest.mark.parametrize("library", ["array_api_strict", "torch"])
def test_arrays_of_other_libraries(library):
    module = pytest.importorskip(library)
    batch = Batch(SelfComm())
    ref, ref_back, ref_running = whole_step(batch, "relu", with_residual=True)
    arrays = batch.x, batch.dy, batch.residual, batch.gamma, batch.beta, *batch.running()
    x, dy, residual, gamma, beta, *running = map(module.from_dlpack, arrays)
    options = {"activation": "relu", "comm": SelfComm()}
    forward = sync_batch_norm_forward(x, gamma, beta, *running, residual=residual, **options)
    backward = sync_batch_norm_backward(
        dy, x, gamma, *forward[1:], beta=beta, y=forward.y, **options
    )
    results = *forward[:3], *running, *backward
    assert {type(result) for result in results} == {type(x)}
    expected = *ref, *ref_running, *ref_back
    for result, theirs in zip(results, expected, strict=True):
        assert_same_bits(np.from_dlpack(result), theirs)


@pytest.mark.parametrize("axis", [1, (1, 2)], ids=str)
def test_evaluation_looks_at_x_once(axis, monkeypatch):
    x = np.random.default_rng(0).normal(size=(4, 3, 2, 6))[..., ::2]
    channels = (3,) if axis == 1 else (3, 2)
    mean, var = np.zeros(channels), np.ones(channels)
    frames, begin = [], Frame.__init__

    def noted(frame, *args):
        frames.append(frame)
        begin(frame, *args)

    monkeypatch.setattr(Frame, "__init__", noted)
    options = {"training": False, "axis": axis}
    result = sync_batch_norm_forward(x, None, None, mean, var, comm=Silent(), **options)
    assert len(frames) == 1
    assert result.count == x.size // mean.size
    expected = nbnorm.batch_norm_forward(x, None, None, mean, var, **options)
    assert_same_bits(result.y, expected.y)


# Gradients of local losses


def test_losses_of_uneven_batches():
    """For the mean over all samples, ranks must divide by the whole count.

    If each rank takes the mean over its own batch, as a data-parallel wrapper does, the gradient is
    that of the average of the ranks' losses: every rank has the same weight, whatever its size.
    """
    target = np.random.default_rng(1).normal(size=(32, 4, 3, 2))

    def gradients(comm, divisors):
        batch = Batch(comm, sizes=BATCHES[4])
        x = batch.own(batch.x)
        forward = sync_batch_norm_forward(x, batch.gamma, batch.beta, comm=comm)
        dy = (forward.y - batch.own(target)) / divisors[comm.Get_rank()]
        grads = sync_batch_norm_backward(dy, x, batch.gamma, *forward[1:], comm=comm)
        return grads.dgamma, grads.dx

    def whole(weights):
        batch = Batch(SelfComm(), sizes=[32])
        forward = nbnorm.batch_norm_forward(batch.x, batch.gamma, batch.beta)
        dy = (forward.y - target) * weights[:, None, None, None]
        grads = nbnorm.batch_norm_backward(dy, batch.x, batch.gamma, *forward[1:])
        return grads.dgamma, grads.dx

    sizes = np.array(BATCHES[4])
    per_sample = np.full(32, 1 / 32), [32] * 4
    per_rank = np.repeat(1 / np.maximum(sizes, 1), sizes), np.maximum(sizes, 1)
    for weights, divisors in (per_sample, per_rank):
        results = over_threads(4, lambda comm, divisors=divisors: gradients(comm, divisors))
        dgamma, dx = whole(weights)
        assert_allclose(sum(own for own, _ in results), dgamma, **CLOSE)
        assert_allclose(np.concatenate([own for _, own in results]), dx, **CLOSE)


# The layer


def test_layer_in_evaluation_communicates_nothing():
    x = np.random.default_rng(0).normal(size=(5, 2))
    for options in ({}, {"track_running_stats": False}):
        layer = SyncBatchNorm(2, comm=SelfComm(), dtype=np.float64, **options)
        single = nbnorm.BatchNorm(2, dtype=np.float64, **options)
        layer.forward(x)
        single.forward(x)
        layer.comm = Silent()
        assert_same_bits(layer.eval().forward(x), single.eval().forward(x))
        assert_same_bits(layer.backward(x), single.backward(x))
        for name, grad in single.grads.items():
            assert_same_bits(layer.grads[name], grad, name)


def test_layer_counts_a_batch_that_is_empty_here():
    def counted(comm):
        layer = SyncBatchNorm(2, comm=comm, momentum=None)
        for size in (0, 3) if comm.Get_rank() == 0 else (4, 0):
            layer.forward(np.ones((size, 2), "float32"))
        layer.forward(np.ones((0, 2), "float32"))  # empty on all ranks: not counted
        return layer.num_batches_tracked

    assert over_threads(2, counted) == [2, 2]


def test_layer_is_a_batch_norm():
    layer = SyncBatchNorm((2, 3), comm=SelfComm(), axis=(1, 2), activation="relu")
    assert isinstance(layer, nbnorm.BatchNorm)
    assert repr(layer).startswith("SyncBatchNorm((2, 3), eps=1e-05, ")
    assert repr(layer.eval()).endswith("training=False)")
    with pytest.raises(RuntimeError, match="backward called before forward"):
        layer.backward(np.ones((4, 2, 3), "float32"))
    x = np.random.default_rng(0).normal(size=(4, 2, 3)).astype("float32")
    same = SyncBatchNorm((2, 3), comm=SelfComm(), axis=(1, 2), activation="relu")
    assert_same_bits(layer.train()(x, x), same.forward(x, x))
    other = nbnorm.BatchNorm((2, 3), axis=(1, 2))
    other.load_state_dict(layer.state_dict())
    with pytest.raises(TypeError, match="unexpected keyword"):
        SyncBatchNorm(2, comm=SelfComm(), epsilon=1e-5)


# The documentation


def test_names_are_those_of_the_package():
    """Pickles store `__module__`: it names the package, whichever module defines an object."""
    for name in distributed.__all__:
        assert getattr(distributed, name).__module__ == "nbnorm.distributed", name


def test_doctests():
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    modules = pkgutil.iter_modules(distributed.__path__, "nbnorm.distributed.")
    tried = 0
    for module in (distributed, *(importlib.import_module(module.name) for module in modules)):
        failed, count = doctest.testmod(module, optionflags=options)
        assert failed == 0
        tried += count
    assert tried > 10


@pytest.mark.parametrize("name", ["sync_batch_norm_forward", "sync_batch_norm_backward"])
def test_docstrings_have_the_form_of_the_others(name):
    from test_repository import test_docstrings_of_functions as check

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nbnorm, name, getattr(distributed, name), raising=False)
        check(name)


# Real ranks


@cache
def output_of(size, *command):
    """Run ranks in a process group, killed at the time limit; return stdout and stderr."""
    environment = {**os.environ, "NUMBA_NUM_THREADS": "1"}
    package = str(Path(nbnorm.__file__).parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    with subprocess.Popen(
        command, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as ranks:  # fmt: skip
        try:
            out, err = ranks.communicate(timeout=TIME_LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(ranks.pid, signal.SIGKILL)
            out, err = ranks.communicate()
            err += f"\nnot done after {TIME_LIMIT} s"
    return out, err


def mpiexec():
    """Find MPI's launcher beside Python, or else on the path."""
    beside = Path(sys.executable).with_name("mpiexec")
    return str(beside) if beside.exists() else shutil.which("mpiexec")


def assert_bits_of_threads(size, out):
    """Check that rank 0 printed the bits that threads get with the same parts."""
    expected = over_threads(size, bits_of_a_step)
    assert f"bits {expected[0]}\n" in out, out[-500:]


def assert_passed(name, out, err):
    assert f"passed {name}\n" in out, f"{name} did not pass; {err[-4000:]}"


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_over_mpi(name, size):
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not installed")
    launcher = mpiexec()
    if launcher is None:
        pytest.skip("mpiexec is not installed")
    program = str(HERE / "distributed_ranks.py")
    command = launcher, "-n", str(size), sys.executable, program, "mpi", str(size)
    out, err = output_of(size, *command)
    assert_passed(name, out, err)
    if name == "equals_one_process":
        assert_bits_of_threads(size, out)


@pytest.fixture(scope="module")
def gloo_output(tmp_path_factory):
    """Return the outputs of two ranks of torch.distributed."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    torch_distributed = importlib.import_module("torch.distributed")
    if not (torch_distributed.is_available() and torch_distributed.is_gloo_available()):
        pytest.skip("torch has no gloo")
    file = tmp_path_factory.mktemp("gloo") / "store"
    program = HERE / "distributed_ranks.py"
    both = "\n".join(f'"$0" "{program}" gloo 2 {rank} "{file}" &' for rank in range(2))
    return output_of(2, "sh", "-c", f"{both}\nwait", sys.executable)


@pytest.mark.parametrize("name", [*CASES, "tensors_in_and_out"])
def test_over_torch_distributed(name, gloo_output):
    assert_passed(name, *gloo_output)


def test_threads_give_the_bits_of_torch_distributed(gloo_output):
    assert_bits_of_threads(2, gloo_output[0])


def test_torch_is_imported_by_its_adapter_only():
    from children import run_child

    code = """
import sys, numpy, nbnorm.distributed as d
x = numpy.ones((4, 3), "float32")
y, mean, rstd, count = d.sync_batch_norm_forward(x, comm=d.SelfComm())
d.sync_batch_norm_backward(x, x, None, mean, rstd, count, comm=d.SelfComm())
found = {"torch", "mpi4py", "cupy", "ml_dtypes"} & set(sys.modules)
assert not found, found
"""
    run_child("-c", code)


def test_torch_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="torch"):
        TorchProcessGroup()
