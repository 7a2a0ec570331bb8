"""Tests on a GPU: `pytest --backend cupy`, or `--backend simulator` with smaller shapes.

Arrays are NumPy's; the backend copies them to the device and back (backends.py). Results must have
the CPU's properties, within its tolerances. `benchmarks/gpu/check.sh` runs this file in parts:
smoke, cases, large, repeat, torch, graph.
"""

import importlib
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from math import prod
from types import SimpleNamespace

import numpy as np
import pytest
import test_properties as properties
from strategies import DTYPES, HALVES, Recipe, dtype_of, lay_out
from tolerances import (
    assert_same_bits,
    assert_within,
    dx_tolerance,
    mean_tolerance,
    rstd_tolerance,
    stored,
    sums_tolerance,
    y_tolerance,
)

import nbnorm
from nbnorm import reference

dtypes = pytest.mark.parametrize("dtype", DTYPES)
traversals = pytest.mark.parametrize("traversal", ["rows", "columns"])
SHARED = 227 << 10  # bytes of shared memory per block on sm_90, and on the simulator


@pytest.fixture(scope="module", autouse=True)
def on_device(request):
    """Return the backend; skip if it is not on a device."""
    name = request.config.getoption("--backend")
    if name not in ("cupy", "simulator"):
        pytest.skip("needs --backend cupy, or simulator")
    return SimpleNamespace(
        simulated=name == "simulator", cupy=importlib.import_module("cupy"),
        backend=importlib.import_module("nbnorm.cuda"),
    )  # fmt: skip


@pytest.fixture
def keeps(on_device, monkeypatch):
    """Let kernels keep tensors in shared memory if they fit, or make them read memory twice."""

    def set_to(kept):
        limits = (SHARED, True) if kept else (0, False)
        if on_device.simulated:
            monkeypatch.setattr(sys.modules["simulator"], "limits", limits)
        elif not kept:
            monkeypatch.setattr(on_device.backend.launch, "limits", lambda: limits)
        else:
            monkeypatch.undo()

    set_to(True)
    return set_to


@pytest.fixture
def launched(on_device, monkeypatch):
    """Record the launched kernels by name, and the number of blocks in their clusters."""
    found, run = {}, on_device.backend.launch.run

    def note(kernel, *args, cluster=1, **options):
        found[kernel.py_func.__name__] = cluster
        run(kernel, *args, cluster=cluster, **options)

    with monkeypatch.context() as patch:
        patch.setattr(on_device.backend.launch, "run", note)
        yield found


@dataclass(frozen=True)
class Whole(Recipe):
    """A recipe with residual and ReLU in every dtype, which need no extra kernels on a GPU."""

    with_extras = True


def holds(name, *arguments):
    """Run the body of a property in test_properties.py."""
    getattr(properties, f"test_{name}").hypothesis.inner_test(*arguments)


# -- smoke: every kernel once ---------------------------------------------------------------------

ACCESSES = [(dtype, access) for dtype in DTYPES for access in ("vectors", "values")]
ACCESSES += [(dtype, how) for dtype in DTYPES[:1] + HALVES for how in ("kept", "clusters")]


@pytest.fixture
def bare_memory(on_device):
    """Give every array its own allocation, so that compute-sanitizer knows its bounds."""
    if on_device.simulated:
        yield
        return
    cupy = on_device.cupy
    cupy.cuda.set_allocator(None)
    yield
    cupy.cuda.set_allocator(cupy.get_default_memory_pool().malloc)


@traversals
@pytest.mark.parametrize(("dtype", "access"), ACCESSES)
def test_smoke(traversal, dtype, access, keeps, launched, bare_memory, on_device):
    aligned = access != "values"
    C, *space = {
        ("rows", True): (8, 16, 16), ("rows", False): (5, 17, 17),
        ("columns", True): (8, 4, 4), ("columns", False): (5, 3, 7),
    }[traversal, aligned]  # fmt: skip
    plan, itemsize = on_device.backend.plan, dtype_of(dtype).itemsize
    chunks = 1 if access == "kept" else 2
    of = C, prod(space), itemsize, 16 if aligned else itemsize
    N = next(N for N in count(2) if plan(N, *of).chunks == chunks)
    recipe = Whole((N, C, *space), 1, dtype, offset=1.0)
    keeps(access in ("kept", "clusters"))
    holds("training_forward", recipe, "relu", "C")
    holds("backward", recipe, "relu", True, True, "C")
    if access in ("vectors", "values"):
        assert {"stats", "apply", "backward_reduce", "backward_apply"} <= set(launched)
        holds("inference", recipe, None, None)
        holds("running_statistics", recipe, "float32", 0.1, 1)
    else:
        clusters = access == "clusters" and on_device.backend.launch.limits()[1]
        assert (launched["forward"] > 1) == (launched["backward"] > 1) == clusters
        keeps(False)
        holds("training_forward", recipe, None, None)


# -- cases: the CPU's properties over shapes, layouts and data ------------------------------------

CASES = [
    Whole(shape, axis, layout=layout)
    for shape, axis, layout in [
        ((4, 8, 16, 16), 1, "C"), ((9, 16, 14, 14), 1, "C"), ((1, 12, 7, 7), 1, "C"),
        ((60, 96), 1, "C"), ((5, 7, 14, 14), 1, "C"), ((300, 1, 3, 3), 1, "C"),
        ((4, 24, 9, 10), 1, "channels last"), ((2, 5, 31, 33), 1, "C"), ((33, 37, 7, 7), 1, "C"),
        ((60, 100), 1, "off a cache line"), ((4, 8, 16, 16), 1, "off a cache line"),
        ((1023, 5), 1, "C"), ((64, 1), 1, "C"), ((4, 1, 16, 16), 1, "C"), ((1, 8, 32, 32), 1, "C"),
        ((2, 96, 128, 3), -1, "C"), ((3, 3, 65, 63), 1, "channels last"),
        ((16, 3, 5, 7), (1, 2, 3), "C"), ((40, 1, 28, 28), (1, 2, 3), "C"), ((6, 10, 50), 1, "C"),
        ((2, 4, 3, 12, 11), 1, "C"), ((5, 300, 6), 0, "C"), ((4, 3, 128, 130), 1, "C"),
        ((3000, 30), 1, "C"), ((700, 24, 2, 3), 1, "C"), ((2, 2050), 1, "C"),
        ((60, 256), 1, "every second row"), ((4, 6, 20, 20), 1, "every second row"),
        ((4, 6, 20, 20), 1, "padded rows"), ((4, 6, 20, 20), 1, "reversed"),
        ((4, 6, 20, 20), 1, "Fortran"), ((50, 60), 1, "Fortran"),
    ]
]  # fmt: skip
DATA = [
    {"offset": offset, "kind": kind, "scale": scale}
    for kind, offset, scale in [
        ("normal", 1.0, 1.0), ("outlier first", 0.0, 1.0), ("mixed scales", 1e2, 1.0),
        ("constant channels", 1.0, 1.0), ("drift", 1e6, 1.0), ("normal", 0.0, 1e25),
        ("normal", 0.0, 1e-25),
    ]
]  # fmt: skip


def data_for(number, dtype):
    """Return two kinds of data for a case, and different ones for the next."""
    fitting = DATA[:4] if dtype in HALVES else DATA
    return [fitting[i % len(fitting)] for i in (number, number + 3)]


@dtypes
@pytest.mark.parametrize("number", range(len(CASES)))
def test_cases(number, dtype, keeps):
    for data in data_for(number, dtype):
        parameters = {"gamma_dtype": "float64"} if number % 5 == 4 else {}
        recipe = Whole(**{**vars(CASES[number]), **data, **parameters, "dtype": dtype})
        holds("stats", recipe)
        holds("training_forward", recipe, "relu", "C")
        holds("inference", recipe, "relu", "C")
        for training, residual in ((True, True), (True, False), (False, True)):
            holds("backward", recipe, "relu", residual, training, recipe.layout)
        for name, *arguments in (("forward", "relu"), ("backward", "relu", True, "C")):
            holds(f"split_{name}_is_the_fused_one", recipe, *arguments)


# -- large ----------------------------------------------------------------------------------------

LARGE = [
    *[((32, 256, 56, 56), "C"), ((32, 256, 56, 56), "channels last"), ((32, 64, 112, 112), "C")],
    *[((32, 2048, 7, 7), "C"), ((16, 3, 512, 512), "C"), ((7, 1, 701, 703), "C")],
    *[((65_536, 200), "C"), ((2, 40_000, 5, 5), "C")],
]
# More than 2^31 values, by rows and by columns, in float16 to save memory.
HUGE = [((256, 8200, 32, 32), "C"), ((131_100, 16_400), "C")]
POOL = np.random.default_rng(0).normal(size=4_194_301)  # a prime: no shape repeats the data


def values(shape, dtype, layout="C", *, offset=0.0, first=0):
    """Return random numbers, quickly; they are read-only, so that they are not copied back."""
    array = np.resize((np.roll(POOL, first) + offset).astype(dtype_of(dtype)), shape)
    array = array if layout == "C" else lay_out(array, layout)
    root = array if array.base is None else array.base
    root.flags.writeable = array.flags.writeable = False
    return array


def sized(shape, on_device):
    """Return the shape for a GPU, or a small one like it for the simulator."""
    if not on_device.simulated:
        return shape
    rows = prod(shape[2:]) >= 256
    return (min(shape[0], 3), min(shape[1], 4), *((16, 16) if rows else shape[2:]))


@dataclass
class Step:
    """A training step with ReLU, and its results."""

    x: np.ndarray
    dy: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray

    def __call__(self, residual=None):
        x, gamma, beta = self.x, self.gamma, self.beta
        forward = nbnorm.batch_norm_forward(x, gamma, beta, residual=residual, activation="relu")
        y = None if residual is None else forward.y
        got = nbnorm.batch_norm_backward(
            self.dy, x, gamma, forward.mean, forward.rstd, beta=beta, y=y, activation="relu"
        )
        return forward, got


def step_of(shape, dtype, layout="C", offset=1.0):
    C = shape[1]
    wide = "float64" if dtype == "float64" else "float32"
    gamma, beta = np.linspace(0.5, 1.5, C).astype(wide), np.linspace(-1, 1, C).astype(wide)
    return Step(
        values(shape, dtype, layout, offset=offset), values(shape, dtype, layout, first=7),
        gamma, beta,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "layout", "dtype"),
    [*((*of, dtype) for of in LARGE for dtype in DTYPES), *((*of, "float16") for of in HUGE)],
    ids=str,
)
def test_large(shape, layout, dtype, on_device):
    shape = sized(shape, on_device)
    step = step_of(shape, dtype, layout, offset=1e4 if dtype == "float32" else 1.0)
    forward, got = step()
    some = sorted({0, shape[1] // 2, shape[1] - 1})  # the channels that the oracle has time for
    some = some[-1:] if prod(shape) // shape[1] > 1 << 21 else some
    x, dy, gamma, beta = (
        np.ascontiguousarray(a[:, some] if a.ndim > 1 else a[some]) for a in vars(step).values()
    )
    moments = reference.batch_norm_stats(x)
    ref = reference.batch_norm_forward(x, gamma, beta, activation="relu")
    mean, rstd = forward.mean[some], forward.rstd[some]
    assert_within(mean, ref.mean, mean_tolerance(moments, x.dtype), "mean")
    assert_within(rstd, ref.rstd, rstd_tolerance(moments, ref.rstd, x.dtype), "rstd")
    tolerance = y_tolerance(x, gamma, beta, ref.mean, ref.rstd, axis=1)
    assert_within(forward.y[:, some], ref.y, tolerance, "y")
    masked = np.where(forward.y[:, some] > 0, dy, 0).astype(dy.dtype)
    ref = reference.batch_norm_backward(masked, x, gamma, mean, rstd)
    tolerance = dx_tolerance(masked, x, gamma, mean, rstd, axis=1)
    assert_within(got.dx[:, some], ref.dx, tolerance, "dx")
    sums = sums_tolerance(masked, x, mean, rstd, axis=1)
    for name, error in zip(("dbeta", "dgamma"), sums, strict=True):
        expected, result = getattr(ref, name), getattr(got, name)[some]
        assert_within(result, expected, stored(error, expected, result.dtype), name)


# -- repeat: the same bits from run to run, and kept or read twice --------------------------------


def assert_same_results(one, other):
    for a, b in zip(one, other, strict=True):
        for name, left, right in zip(a._fields, a, b, strict=True):
            if left is not None:
                assert_same_bits(left, right, name)


@dtypes
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        *LARGE[:5],
        # On sm_90 clusters that keep two and three chunks per block by rows, and one by columns.
        *[((256, 512, 28, 28), "C"), ((256, 512, 14, 14), "C"), ((5, 7, 31, 33), "C")],
        *[((60, 100), "C"), ((100_000, 5), "C"), ((2, 8, 4, 4), "C")],
    ],
    ids=str,
)
def test_repeat(shape, layout, dtype, keeps, on_device):
    shape = sized(shape, on_device)
    step = step_of(shape, dtype, layout)
    residual = values(shape, dtype, layout, first=11)
    first = step(residual)
    assert_same_results(first, step(residual))
    keeps(False)
    assert_same_results(first, step(residual))


# -- torch: tensors and streams -------------------------------------------------------------------


@pytest.fixture
def torch(on_device):
    """PyTorch on a GPU, or on the CPU if the GPU is simulated."""
    torch = pytest.importorskip("torch")
    torch.device_here = "cpu" if on_device.simulated else "cuda"
    return torch


def expected_of(function, torch):
    """Return a function of NumPy arrays that computes on the device where tensors are."""
    return function.__wrapped__ if torch.device_here == "cpu" else function


def tensor_of(torch, array):
    array = np.array(array)
    if array.dtype.name == "bfloat16":
        return tensor_of(torch, array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array).to(torch.device_here)


def array_of(torch, tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).cpu().numpy().view(dtype_of("bfloat16"))
    return tensor.cpu().numpy()


@dtypes
@pytest.mark.parametrize("shape", [(8, 16, 14, 14), (4, 8, 20, 20), (60, 96)], ids=str)
def test_torch_tensors_give_the_bits_of_cupy_arrays(torch, shape, dtype, on_device):
    recipe = Recipe(sized(shape, on_device), 1, dtype)
    x, dy, gamma, beta = recipe.x(), recipe.like_x(5), recipe.gamma(), recipe.beta()
    running = recipe.running()
    given = [tensor_of(torch, array) for array in (x, gamma, beta, *running)]
    forward = expected_of(nbnorm.batch_norm_forward, torch)(x, gamma, beta, *running)
    got = nbnorm.batch_norm_forward(*given)
    for name, tensor, array in zip(got._fields, got, forward, strict=True):
        assert tensor.device == given[0].device
        assert_same_bits(array_of(torch, tensor), array, name)
    for tensor, array in zip(given[3:], running, strict=True):
        assert_same_bits(array_of(torch, tensor), array, "running statistics in place")
    backward = expected_of(nbnorm.batch_norm_backward, torch)(dy, x, gamma, *forward[1:])
    gradients = nbnorm.batch_norm_backward(tensor_of(torch, dy), *given[:2], *got[1:])
    for tensor, array in zip(gradients[:3], backward[:3], strict=True):
        assert_same_bits(array_of(torch, tensor), array, "gradients")
    if len(shape) == 4:
        last = given[0].contiguous(memory_format=torch.channels_last)
        assert nbnorm.batch_norm_forward(last).y.stride() == last.stride()


def test_torch_streams_are_waited_for_and_not_waited_on(torch):
    """Run on one of torch's own streams, behind work that takes a while."""
    gpu = torch.device_here == "cuda"
    x = torch.randn(8, 16, 14, 14, device=torch.device_here)
    expected = nbnorm.batch_norm_forward(x).y
    busy = torch.ones(2048 if gpu else 4, 2048 if gpu else 4, device=torch.device_here)
    stream = torch.cuda.Stream() if gpu else None
    if gpu:
        torch.cuda.synchronize()
    wrong = 0
    with torch.cuda.stream(stream) if gpu else nullcontext():
        for _ in range(5):
            given = torch.full_like(x, float("nan"))
            for _ in range(3):
                busy @ busy
            given.copy_(x)
            y = nbnorm.batch_norm_forward(given).y
            given.fill_(float("nan"))
            wrong += int((y != expected).sum())
    assert wrong == 0


def test_torch_tensors_elsewhere_are_refused(torch):
    x = torch.randn(4, 3, device=torch.device_here)
    with pytest.raises(TypeError, match="requires grad"):
        nbnorm.batch_norm_forward(x.clone().requires_grad_())
    if torch.device_here == "cuda":
        with pytest.raises(ValueError, match="expected the memory of CUDA device"):
            nbnorm.batch_norm_forward(x, torch.ones(3))


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
def test_torch_modules_train_as_torchs_own(torch, layout):
    hosts = pytest.importorskip("nbnorm.integrations.torch")
    made = torch.randn(6, 8, 14, 14).to(torch.device_here)
    results = []
    for kind in (hosts.BatchNorm2d, torch.nn.BatchNorm2d):
        module = kind(8).to(torch.device_here)
        x = made.clone(memory_format=getattr(torch, layout)).requires_grad_()
        module(x).square().sum().backward()
        results.append([x.grad, module.weight.grad, module.bias.grad, module.running_var])
    for ours, theirs in zip(*results, strict=True):
        assert ours.device == theirs.device
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


# -- graph ----------------------------------------------------------------------------------------


def captured(on_device, call):
    """Return a function that replays a call, and its results; on a simulated GPU, calls again."""
    if on_device.simulated:
        results = call()

        def repeat():
            for old, new in zip(results, call(), strict=True):
                old[...] = new

        return repeat, results
    cuda = on_device.cupy.cuda
    cuda.Device().synchronize()
    # Scratch memory belongs to the graph while it can be replayed, so it gets its own pool.
    pool, stream = cuda.MemoryPool(), cuda.Stream(non_blocking=True)
    with cuda.using_allocator(pool.malloc), stream:
        call()  # compiles and loads kernels, which is not allowed during capture
        stream.synchronize()
        stream.begin_capture()
        try:
            results = call()
        finally:
            graph = stream.end_capture()

    def replay(pool=pool):
        cuda.Device().synchronize()  # wait for x: the stream does not wait for the default one
        graph.launch(stream)
        stream.synchronize()

    return replay, results


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "without gamma"])
@pytest.mark.parametrize("added", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("shape", [(32, 64, 56, 56), (32, 512, 7, 7), (60, 100)], ids=str)
def test_graph(shape, added, affine, dtype, on_device):
    cupy, shape = on_device.cupy, sized(shape, on_device)
    forward, backward = (
        getattr(function, "__wrapped__", function)
        for function in (nbnorm.batch_norm_forward, nbnorm.batch_norm_backward)
    )
    x, dy, residual = (cupy.asarray(values(shape, dtype, first=i)) for i in range(3))
    gamma = beta = None
    if affine:
        gamma, beta = (cupy.asarray(np.linspace(a, 1, shape[1], dtype="f4")) for a in (0.5, -1))
    options = {"activation": "relu"} if affine or added else {}

    def call():
        y, mean, rstd = forward(x, gamma, beta, residual=residual if added else None, **options)
        got = backward(dy, x, gamma, mean, rstd, beta=beta, y=y if added else None, **options)
        return [y, mean, rstd, *(result for result in got if result is not None)]

    replay, results = captured(on_device, call)
    for number in range(3):
        x.set(values(shape, dtype, first=100 + number))
        replay()
        for result, direct in zip(results, call(), strict=True):
            assert_same_bits(result.get(), direct.get())
