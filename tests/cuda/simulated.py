"""The CUDA backend against the oracle, simulated; test_simulator.py runs it in a child process.

Blocks have two warps and chunks few values, so that small shapes have many of both.
"""

import inspect
import sys
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import simulator
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import BFLOAT16, DTYPES, HALVES, KINDS, OFFSETS, SCALES, Recipe, dtype_of
from tolerances import (
    assert_same_bits,
    assert_within,
    dx_tolerance,
    inverse,
    m2_tolerance,
    mean_tolerance,
    relative_unit,
    rstd_tolerance,
    running_tolerance,
    second_dgamma_tolerance,
    second_dx_tolerance,
    sums_tolerance,
    ty_tolerance,
    y_tolerance,
)

from nbnorm import activation, reference
from nbnorm.activations import TABLE, inverse_of, with_own_kernels

THREADS, BLOCK_VALUES, ALIGNMENT, UNTOUCHED = 64, 256, 256, 0xA5
backend = simulator.load(THREADS=THREADS, BLOCK_VALUES=BLOCK_VALUES)

ROWS = [(3, 5, 256), (2, 3, 300), (2, 2, 289), (11, 2, 256), (1, 1, 2500), (1, 3, 257)]
COLUMNS = [
    *[(5, 7, 16), (3, 4, 49), (30, 3, 1), (9, 5, 2), (100, 6, 10)],  # S fills whole vectors or not
    *[(6, 40, 1), (3, 33, 4), (5, 70, 8), (2, 9, 64)],  # several channel groups, the last smaller
    *[(2, 200, 1), (1, 4, 16), (2, 1, 1), (1, 1, 31), (13, 1, 3), (3, 3, 63)],
]
ROW, COLUMN = (11, 2, 256), (21, 5, 24)  # both have several chunks
MODES = ("plain", "relu", "residual and relu")
REACHED = {  # kernels that each function launches
    "stats": ["stats", "finish_moments"],
    "forward": ["stats", "finish_moments", "apply"],
    "apply": ["apply"],
    "rstd": ["rstd_all"],
    "renorm_factors": ["renorm_factors"],
    "backward_reduce": ["backward_reduce", "finish_sums"],
    "backward_apply": ["backward_apply"],
    "backward": ["backward_reduce", "finish_sums", "backward_apply"],
    "double_backward": [
        "second_reduce", "finish_second_sums", "second_table", "second_apply",
    ],
    "jvp": ["backward_reduce", "finish_sums", "second_table", "second_apply"],
}  # fmt: skip
shapes = pytest.mark.parametrize("shape", ROWS + COLUMNS, ids=str)
both = pytest.mark.parametrize("shape", [ROW, COLUMN], ids=["rows", "columns"])
dtypes = pytest.mark.parametrize("dtype", DTYPES)
modes = pytest.mark.parametrize("mode", MODES)


class Arena:
    """Memory with margins around every array, which must not change."""

    def __init__(self):
        self._placed = []

    def place(self, values, *, first=0, plane_gap=0, sample_gap=0):
        """Copy values to separate memory, `first` values after an aligned address."""
        N, C, S = values.shape
        plane, size = S + plane_gap, values.itemsize
        sample = C * plane + sample_gap
        memory = np.full(N * sample * size + 3 * ALIGNMENT, UNTOUCHED, np.uint8)
        start = ALIGNMENT - memory.ctypes.data % ALIGNMENT + first * size
        spec = values.shape, values.dtype, start, (sample * size, plane * size, size)
        self._placed.append((memory, spec))
        array = self._array(memory, spec)
        array[...] = values
        return array

    def given(self, values, **layout):
        """Place a read-only input."""
        array = self.place(values, **layout)
        array.flags.writeable = False
        return array

    def wanted(self, like, **layout):
        """Place an output filled with NaN."""
        return self.place(np.full(like.shape, np.nan, like.dtype), **layout)

    def check(self):
        for memory, spec in self._placed:
            outside = memory.copy()
            array = self._array(outside, spec)
            array.view(np.dtype(f"V{array.itemsize}"))[...] = bytes([UNTOUCHED] * array.itemsize)
            assert (outside == UNTOUCHED).all(), "values beside an array were overwritten"

    @staticmethod
    def _array(memory, spec):
        shape, dtype, start, strides = spec
        return np.ndarray(shape, dtype, memory, start, strides)


@pytest.fixture
def arena():
    arena = Arena()
    yield arena
    arena.check()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill new memory with NaN."""
    empty = np.empty

    def poison(*args, **options):
        memory = empty(*args, **options)
        if memory.dtype.kind == "f":
            memory.fill(np.nan)
        return memory

    monkeypatch.setattr(np, "empty", poison)


def call(name, *args, **options):
    """Call a function of the backend; assert that it launches exactly its kernels."""
    del simulator.launches[:]
    result = getattr(backend, name)(*args, **options)
    found = [launch.replace("finish_weighted", "finish_moments") for launch in simulator.launches]
    if args[0].dtype == np.float64 and found[:4] == 2 * ["stats", "finish_moments"]:
        del found[:2]  # float64 may be summed again around the mean
    fused = simulator.limits[0] and name in ("forward", "backward")
    assert found == ([name] if fused else REACHED[name]), name
    return result


@contextmanager
def fused(shared=1 << 16, *, clusters=True):
    """Give blocks this much shared memory, so that forward and backward read memory once."""
    simulator.limits = shared, clusters
    try:
        yield
    finally:
        simulator.limits = 0, False


@contextmanager
def last_thread_first():
    simulator.backwards = True
    try:
        yield
    finally:
        simulator.backwards = False


class Run:
    """Call all functions of the backend on one set of arrays; hold their results and outputs."""

    def __init__(self, arena, recipe, mode="plain", *, x=None, dy=None, gamma=None, layouts=None):
        self._arena, self._layouts = arena, layouts or {}
        self.eps, self.activation = recipe.eps, None if mode == "plain" else "relu"
        self.gamma = recipe.gamma() if gamma is None else gamma
        self.beta = recipe.beta()
        self.x = self._given("x", recipe.x() if x is None else x)
        self.dy = self._given("dy", recipe.like_x(5) if dy is None else dy)
        self.residual = None
        if mode == "residual and relu":
            self.residual = self._given("residual", recipe.like_x(4))
        self._forward()
        if self.residual is not None:
            self._backward(None, self._given("y", self.y))
        else:
            self._backward(self.beta if self.activation else None, None)

    def _given(self, name, values):
        return self._arena.given(values, **self._layouts.get(name, {}))

    def _wanted(self, *names):
        return [self._arena.wanted(self.x, **self._layouts.get(name, {})) for name in names]

    def _forward(self):
        x, gamma, beta = self.x, self.gamma, self.beta
        self.y, y = self._wanted("y", "y")
        rest = gamma, beta, self.eps, self.residual, self.activation, self.y
        self.mean, self.m2, self.rstd = call("forward", x, *rest)
        for alone, fused in zip(call("stats", x), (self.mean, self.m2), strict=True):
            assert_same_bits(alone, fused, "statistics alone and of the forward")
        call("apply", x, gamma, beta, self.mean, self.rstd, self.residual, self.activation, y)
        assert_same_bits(y, self.y, "y of apply and of the forward")

    def _backward(self, *mask):
        rest = self.dy, self.x, self.gamma, self.mean, self.rstd
        count = self.x.shape[0] * self.x.shape[2]
        self.dx, self.dresidual = self._wanted("dx", "dresidual")
        self.sums = call("backward", *rest, *mask, self.dx, self.dresidual)
        sums = call("backward_reduce", *rest, *mask)
        assert_same_bits(sums, self.sums, "sums alone and of the backward")
        dx, dresidual = self._wanted("dx", "dresidual")
        call("backward_apply", *rest, sums, count, *mask, dx, None)
        assert_same_bits(dx, self.dx, "dx alone and of the backward")
        call("backward_apply", *rest, None, count, *mask, None, dresidual)
        assert_same_bits(dresidual, self.dresidual, "dresidual alone and of the backward")
        (self.frozen_dx,) = self._wanted("dx")
        call("backward_apply", *rest, None, count, *mask, self.frozen_dx, None)

    def results(self):
        names = ("mean", "m2", "rstd", "y", "sums", "dx", "dresidual", "frozen_dx")
        return {name: getattr(self, name) for name in names}

    def check(self):
        """Compare with the oracle."""
        x, dtype, gamma, beta = self.x, self.x.dtype, self.gamma, self.beta
        moments = reference.batch_norm_stats(x)
        ref = reference.batch_norm_forward(
            x, gamma, beta, eps=self.eps, residual=self.residual,
            activation=self.activation,
        )  # fmt: skip
        assert_within(self.mean, moments.mean, mean_tolerance(moments, dtype), "mean")
        assert_within(self.m2, moments.m2, m2_tolerance(moments, dtype), "M2")
        assert_within(self.rstd, ref.rstd, rstd_tolerance(moments, ref.rstd, dtype), "rstd")
        scales = x, gamma, beta, ref.mean, ref.rstd
        y_error = y_tolerance(*scales, axis=1, residual=self.residual)
        assert_within(self.y, ref.y, y_error, "y")
        # Pass the masked dy to the oracle: near 0 its own mask may differ by a rounding.
        dy = np.where(self.y > 0, self.dy, 0).astype(dtype) if self.activation else self.dy
        assert_same_bits(self.dresidual, dy, "dresidual")
        rest = x, gamma, self.mean, self.rstd
        ref = reference.batch_norm_backward(dy, *rest)
        dbeta_error, dgamma_error = sums_tolerance(dy, x, self.mean, self.rstd, axis=1)
        assert_within(self.sums[0], ref.dbeta, dbeta_error, "sum dy")
        assert_within(self.sums[1], ref.dgamma, dgamma_error, "sum dy x_hat")
        assert_within(self.dx, ref.dx, dx_tolerance(dy, *rest, axis=1), "dx")
        ref = reference.batch_norm_backward(dy, *rest, training=False)
        error = dx_tolerance(dy, *rest, axis=1, training=False)
        assert_within(self.frozen_dx, ref.dx, error, "dx with frozen statistics")
        return self


def assert_same_results(one, other):
    for (name, a), b in zip(one.results().items(), other.results().values(), strict=True):
        assert_same_bits(a, b, name)


@pytest.fixture
def forgetful():
    """Clear cached plans and kernels, which a test replaces."""
    modules = [sys.modules[f"nbnorm.cuda{name}"] for name in ("", ".kernels", ".plan")]
    caches = [f for module in modules for f in vars(module).values() if hasattr(f, "cache_clear")]

    def forget():
        for function in caches:
            function.cache_clear()

    forget()
    yield
    forget()


def chunks(shape, dtype):
    return backend.plan(*shape, dtype_of(dtype).itemsize, ALIGNMENT).chunks


# -- every function, dtype and class of shapes -----------------------------------------------------


@modes
@dtypes
@shapes
def test_results_are_the_oracles(arena, shape, dtype, mode):
    if shape in (ROW, COLUMN):
        assert chunks(shape, dtype) > 1
    Run(arena, Recipe(shape, 1, dtype), mode).check()


@modes
@both
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_gamma_and_beta_may_be_float64(arena, shape, dtype, mode):
    recipe = Recipe(shape, 1, dtype, gamma_dtype="float64", beta_dtype="float64")
    Run(arena, recipe, mode).check()


@both
@pytest.mark.parametrize(
    ("ends", "gap"), [((0, 1, 1, 4), 0), (None, 0), (None, 8)], ids=["parts", "samples", "apart"]
)
def test_segments(arena, shape, ends, gap):
    """Slices of N, and parts of one sample each, which are channels of one array."""
    from nbnorm._segments import Segmented  # imports the CPU's kernels

    recipe = Recipe((4, *shape[1:]), 1, offset=3.0)
    ends = list(range(5)) if ends is None else list(ends)
    G, C, counts = len(ends) - 1, shape[1], [n * shape[2] for n in np.diff(ends)]
    memory = SimpleNamespace(zeros=np.zeros, contiguous=np.ascontiguousarray)
    segmented = Segmented(backend, memory, ends, C, counts)
    x, dy = arena.given(recipe.x()), arena.given(recipe.like_x(5))
    gamma, beta = (np.tile(a, G) for a in (recipe.gamma(), recipe.beta()))
    y, applied, dx, split = (arena.wanted(x, sample_gap=gap) for _ in range(4))
    mean, m2, rstd = segmented.forward(x, gamma, beta, recipe.eps, None, None, y)
    assert_same_bits(segmented.stats(x)[1], m2, "M2")
    segmented.apply(x, gamma, beta, mean, rstd, None, False, applied)
    assert_same_bits(applied, y, "y")
    sums = segmented.backward(dy, x, gamma, mean, rstd, None, None, dx, None)
    assert_same_bits(segmented.backward_reduce(dy, x, gamma, mean, rstd, None, None), sums, "sums")
    rest = dy, x, gamma, mean, rstd
    segmented.backward_apply(*rest, sums, counts, None, None, split, None)
    assert_same_bits(split, dx, "dx")
    for g in range(G):
        n, c = slice(ends[g], ends[g + 1]), slice(g * C, (g + 1) * C)
        if counts[g]:
            ref = reference.batch_norm_forward(x[n], gamma[c], beta[c], eps=recipe.eps)
            error = y_tolerance(x[n], gamma[c], beta[c], ref.mean, ref.rstd, axis=1)
            assert_within(y[n], ref.y, error, "y")
            back = dy[n], x[n], gamma[c], mean[c], rstd[c]
            assert_within(dx[n], reference.batch_norm_backward(*back).dx,
                          dx_tolerance(*back, axis=1), "dx")  # fmt: skip


@dtypes
@both
@pytest.mark.parametrize("act", [None, activation("leaky_relu", slope=0.25)], ids=str)
def test_backward_from_y(arena, shape, dtype, act):
    """y takes the place of x, with parameters of both signs, as `functional` passes them."""
    recipe = Recipe(shape, 1, dtype, offset=3.0)
    gamma, beta = recipe.gamma(), recipe.beta()
    y, mean, rstd = reference.batch_norm_forward(recipe.x(), gamma, beta, activation=act)
    y, dy = arena.given(y.astype(dtype_of(dtype))), arena.given(recipe.like_x(5))
    dx, frozen = arena.wanted(y), arena.wanted(y)
    center, over_gamma, factor = inverse(gamma, beta, rstd.astype(np.float64), mean)
    rest = dy, y, factor, center, over_gamma
    inverted = None if act is None else inverse_of(act)
    options = {"beta": beta, "y": y, "activation": act}

    sums = call("backward", *rest, None, None, dx, None, inverted)
    call("backward_apply", *rest, None, 1, None, None, frozen, None, inverted)
    again = call("backward_reduce", *rest, None, None, inverted)
    assert_same_bits(again, sums, "sums")
    v, through = y, dy
    if act is not None:  # a power of two: nothing is rounded
        v = np.where(y > 0, y, y * y.dtype.type(4))
        through = np.where(y > 0, dy, dy * y.dtype.type(0.25))
    for training, got in ((True, dx), (False, frozen)):
        ref = reference.batch_norm_backward(
            dy, None, gamma, mean, rstd, training=training, **options
        )
        error = dx_tolerance(through, v, *rest[2:], axis=1, training=training)
        assert_within(got, ref.dx, error, "dx")
    dbeta_error, dgamma_error = sums_tolerance(through, v, center, over_gamma, axis=1)
    assert_within(sums[0], ref.dbeta, dbeta_error, "sum dy")
    assert_within(sums[1], ref.dgamma, dgamma_error, "sum dy x_hat")
    if dtype != "float64":  # float64 values are never kept
        kept = arena.wanted(y)
        with fused():
            assert_same_bits(
                call("backward", *rest, None, None, kept, None, inverted), sums, "sums"
            )
        assert_same_bits(kept, dx, "dx")


@pytest.mark.parametrize("shape", [(3, 2, 255), (9, 3, 144), (40, 260, 1), (3, 2, 256)], ids=str)
def test_blocks_of_the_size_they_have_on_a_gpu(arena, monkeypatch, forgetful, shape):
    plan = backend.plan
    for module in (backend, backend.kernels.columns):
        monkeypatch.setattr(module, "THREADS", 256)
    monkeypatch.setattr(backend, "plan", lambda *args: plan(*args, 256))
    for dtype in ("float32", "float16"):
        Run(arena, Recipe(shape, 1, dtype), "relu").check()


def test_the_greatest_number_of_chunks_holds_the_rest(arena, monkeypatch, forgetful):
    monkeypatch.setattr(sys.modules["nbnorm.cuda.plan"], "CHUNKS", 2)
    for shape in ((40, 1, 256), (90, 2, 24)):
        assert chunks(shape, "float32") == 2
        Run(arena, Recipe(shape, 1), "relu").check()


layouts = st.fixed_dictionaries(
    {"first": st.integers(0, 8), "plane_gap": st.just(0), "sample_gap": st.integers(0, 8)}
)


@settings(max_examples=50)
@given(st.data())
def test_drawn_shapes_and_layouts(data):
    draw, arena = data.draw, Arena()
    large = draw(st.booleans())
    S = draw(st.integers(256, 700) if large else st.integers(1, THREADS))
    C = draw(st.integers(1, max(1, min(300, 2000 // S))))
    N = draw(st.integers(1 if S > 1 else 2, max(2, min(300, 3000 // (C * S)))))
    dtype = draw(st.sampled_from(DTYPES))
    kind = draw(st.sampled_from(KINDS))
    recipe = Recipe(
        (N, C, S),
        1,
        dtype,
        kind=kind,
        offset=draw(st.sampled_from(OFFSETS[:3] if dtype in HALVES else OFFSETS)),
        scale=draw(st.sampled_from(SCALES[:1] if dtype == "float16" else SCALES)),
        eps=1e-5 if kind == "constant channels" else draw(st.sampled_from((1e-5, 0.0))),
        seed=draw(st.integers(0, 999)),
    )
    found = {}
    for name in ("x", "dy", "residual", "y", "dx", "dresidual"):
        if draw(st.booleans()):
            found[name] = draw(layouts)
            if S >= 256:  # _layout: planes may be apart only if they are large
                found[name]["plane_gap"] = draw(st.integers(0, 8))
            if C * S < 256:  # and samples only if they are large
                found[name]["sample_gap"] = 0
    Run(arena, recipe, draw(st.sampled_from(MODES)), layouts=found).check()
    arena.check()


# -- memory ----------------------------------------------------------------------------------------


@dtypes
@both
def test_aligned_memory_is_read_in_vectors_of_16_bytes(arena, shape, dtype):
    width = 16 // dtype_of(dtype).itemsize
    simulator.loads.clear()
    Run(arena, Recipe(shape, 1, dtype), "residual and relu")
    scalars = simulator.loads.pop(1, 0)  # the first value of each channel
    assert set(simulator.loads) == {width}
    assert simulator.loads[width] * width > 3 * scalars


ELSEWHERE = [(shape, gap) for shape in (ROW, COLUMN) for gap in ({"first": 1}, {"sample_gap": 3})]


@pytest.mark.parametrize("name", ["x", "dy", "residual", "y", "dx", "dresidual"])
@pytest.mark.parametrize(("shape", "gap"), [*ELSEWHERE, (ROW, {"plane_gap": 1})], ids=str)
def test_any_tensor_may_lie_anywhere(arena, shape, name, gap):
    simulator.loads.clear()
    Run(arena, Recipe(shape, 1), "residual and relu", layouts={name: gap}).check()
    # Accesses to this tensor are scalar, all others are vectors.
    assert simulator.loads[1] > 0
    assert set(simulator.loads) <= {1, 4}


@dtypes
@both
def test_gaps_of_whole_vectors_change_no_bit(arena, shape, dtype):
    gap = 16 // dtype_of(dtype).itemsize
    layout = {"first": gap, "sample_gap": 3 * gap, "plane_gap": gap if shape == ROW else 0}
    names = ("x", "dy", "residual", "y", "dx", "dresidual")
    recipe = Recipe(shape, 1, dtype)
    gaps = Run(arena, recipe, "residual and relu", layouts=dict.fromkeys(names, layout))
    assert_same_results(gaps.check(), Run(arena, recipe, "residual and relu"))


@dtypes
@both
def test_in_place_changes_no_bit(arena, shape, dtype):
    run = Run(arena, Recipe(shape, 1, dtype), "residual and relu")
    for name in ("x", "residual"):
        tensors = {"x": run.x, "residual": run.residual}
        tensors[name] = y = arena.place(tensors[name])
        rest = run.mean, run.rstd, tensors["residual"], "relu", y
        call("apply", tensors["x"], run.gamma, run.beta, *rest)
        assert_same_bits(y, run.y, f"y written over {name}")
    rest = run.gamma, run.mean, run.rstd, None
    for name in ("dx", "dresidual"):
        found = {"dx": arena.wanted(run.x), "dresidual": arena.wanted(run.x)}
        found[name] = dy = arena.place(run.dy)
        call("backward", dy, run.x, *rest, run.y, found["dx"], found["dresidual"])
        for result, expected in (("dx", run.dx), ("dresidual", run.dresidual)):
            assert_same_bits(found[result], expected, f"{result}, {name} written over dy")
    x, y = arena.place(run.x), arena.place(run.y)
    call("backward", run.dy, x, *rest, run.y, x, None)
    assert_same_bits(x, run.dx, "dx written over x")
    call("backward", run.dy, run.x, *rest, y, y, None)
    assert_same_bits(y, run.dx, "dx written over y")


@dtypes
@both
def test_the_order_of_threads_and_blocks_changes_no_bit(arena, shape, dtype):
    recipe = Recipe(shape, 1, dtype, offset=3.0)
    for mode in MODES:
        first = Run(arena, recipe, mode)
        with last_thread_first():
            assert_same_results(first, Run(arena, recipe, mode))


# -- memory read once ------------------------------------------------------------------------------

KEPT = {  # shape: number of chunks in float32
    (1, 3, 256): 1,
    (11, 2, 256): 3,
    (40, 1, 256): 10,
    (1, 2, 512): 1,
    (5, 7, 16): 1,
    (21, 5, 24): 3,
    (200, 2, 24): 10,
    (70, 40, 1): 3,
    (5, 70, 8): 1,
}
kept = pytest.mark.parametrize("shape", KEPT, ids=str)
narrow = pytest.mark.parametrize("dtype", ["float32", *HALVES])


@modes
@narrow
@kept
def test_keeping_chunks_changes_no_bit(arena, shape, dtype, mode):
    if dtype == "float32":
        assert chunks(shape, dtype) == KEPT[shape]
    recipe = Recipe(shape, 1, dtype, offset=3.0)
    expected = Run(arena, recipe, mode)
    with fused():
        assert_same_results(expected, Run(arena, recipe, mode).check())
        with last_thread_first():
            assert_same_results(expected, Run(arena, recipe, mode))


@narrow
@both
def test_what_is_kept_is_read_once(arena, shape, dtype):
    width = 16 // dtype_of(dtype).itemsize
    run = Run(arena, Recipe(shape, 1, dtype), "residual and relu")
    vectors = run.x.size // width
    (y, dx, dresidual), rest = run._wanted("y", "dx", "dresidual"), (run.gamma, run.mean, run.rstd)
    with fused():
        simulator.loads.clear()
        call("forward", run.x, run.gamma, run.beta, run.eps, run.residual, "relu", y)
        assert simulator.loads[width] == 2 * vectors  # x, residual
        simulator.loads.clear()
        call("backward", run.dy, run.x, *rest, None, run.y, dx, dresidual)
        assert simulator.loads[width] == 3 * vectors  # dy, x, y


@narrow
@both
def test_kept_in_place_changes_no_bit(arena, shape, dtype):
    run = Run(arena, Recipe(shape, 1, dtype), "residual and relu")
    rest = run.gamma, run.mean, run.rstd, None
    with fused():
        for name in ("x", "residual"):
            tensors = {"x": run.x, "residual": run.residual}
            tensors[name] = y = arena.place(tensors[name])
            options = run.eps, tensors["residual"], "relu", y
            call("forward", tensors["x"], run.gamma, run.beta, *options)
            assert_same_bits(y, run.y, f"y written over {name}")
        for name in ("dy", "x", "y"):
            tensors = {"dy": run.dy, "x": run.x, "y": run.y}
            tensors[name] = dx = arena.place(tensors[name])
            call("backward", tensors["dy"], tensors["x"], *rest, tensors["y"], dx, None)
            assert_same_bits(dx, run.dx, f"dx written over {name}")


@pytest.mark.parametrize("shape", [(1, 3, 256), (5, 7, 16)], ids=str)
def test_blocks_that_cannot_wait_for_each_other_keep_single_chunks(arena, shape):
    recipe = Recipe(shape, 1)
    expected = Run(arena, recipe, "relu")
    with fused(clusters=False):
        assert_same_results(expected, Run(arena, recipe, "relu"))


@pytest.mark.parametrize(
    ("shape", "dtype", "shared", "clusters", "layout"),
    [
        (ROW, "float32", 1 << 16, False, {}),  # several chunks, and no clusters
        (COLUMN, "float32", 1 << 16, False, {}),
        (ROW, "float32", 1 << 11, True, {}),  # little memory
        (COLUMN, "float32", 1 << 11, True, {}),
        (ROW, "float64", 1 << 16, True, {}),
        (ROW, "float32", 1 << 16, True, {"y": {"first": 1}}),  # read value by value
        (COLUMN, "float32", 1 << 16, True, {"y": {"sample_gap": 3}}),
    ],
    ids=str,
)
def test_what_cannot_be_kept_is_read_again(arena, shape, dtype, shared, clusters, layout):
    run = Run(arena, Recipe(shape, 1, dtype), "relu", layouts=layout)
    (y,) = run._wanted("y")
    with fused(shared, clusters=clusters):
        del simulator.launches[:]
        backend.forward(run.x, run.gamma, run.beta, run.eps, None, "relu", y)
    assert simulator.launches[-3:] == ["stats", "finish_moments", "apply"]
    assert_same_bits(y, run.y)


@both
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_nan_stays_in_its_channel_where_it_is_kept(arena, shape, dtype):
    recipe = Recipe(shape, 1, dtype)
    x = recipe.x()
    x[0, 1, 0] = np.nan
    expected = Run(arena, recipe, "relu", x=x)
    with fused():
        assert_same_results(expected, Run(arena, recipe, "relu", x=x))


# -- hard values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("offset", [1e4, 1e6])
@both
def test_a_mean_far_from_0_costs_no_digits(arena, shape, dtype, mode, offset):
    Run(arena, Recipe(shape, 1, dtype, offset=offset, eps=0.0), mode).check()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("shape", [(6, 7, 256), (50, 7, 24), (50, 7, 1)], ids=str)
def test_channels_of_all_scales_do_not_disturb_each_other(arena, shape, dtype, eps):
    scales = np.array([1e-30, 1e30, 1e-20, 1, 1e20, 1e-10, 1e10])[:, None]
    recipe = Recipe(shape, 1, dtype, eps=eps)
    x = (recipe.x().astype(np.float64) * scales).astype(recipe.x().dtype)
    Run(arena, recipe, x=x).check()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("full", [False, True])
@both
def test_sums_of_dy_may_leave_float32(arena, shape, dtype, full):
    recipe = Recipe(shape, 1, dtype)
    x, dy = recipe.x(), recipe.like_x(5)
    x = (x.astype(np.float64) * 1e6).astype(x.dtype)
    dy = (np.abs(dy.astype(np.float64)) * 3e37).astype(dy.dtype)
    dy = over_the_range(dy) if full else dy
    run = Run(arena, recipe, x=x, dy=dy)
    wanted = reference.batch_norm_backward(dy, x, run.gamma, run.mean, run.rstd)
    # Sums beyond float32's range are float64, but terms are float32: 2^29 float64 units.
    wide = dy.astype(np.float64), x.astype(np.float64)
    errors = sums_tolerance(*wide, run.mean, run.rstd, axis=1)
    assert_within(run.sums[0], wanted.dbeta, errors[0] * 2.0**29, "sum dy")
    assert_within(run.sums[1], wanted.dgamma, errors[1] * 2.0**29, "sum dy x_hat")
    error = dx_tolerance(dy, x, run.gamma, run.mean, run.rstd, axis=1)
    assert_within(run.dx, wanted.dx, error, "dx")


@dtypes
@both
def test_a_first_value_that_is_an_outlier_costs_no_digits(arena, shape, dtype):
    recipe = Recipe(shape, 1, dtype)
    x = recipe.x()
    x[0, :, 0] = 1e3
    Run(arena, recipe, x=x).check()


@dtypes
@pytest.mark.parametrize("shape", [ROW, COLUMN, (2, 2, 289), (70, 3, 1)], ids=str)
@pytest.mark.parametrize("value", [0.0, 0.1, -300.7])
def test_a_constant_channel_has_no_spread_at_all(arena, shape, dtype, value):
    recipe = Recipe(shape, 1, dtype, eps=0.0)
    x = recipe.x()
    x[:, 0] = value
    run = Run(arena, recipe, x=x)
    assert run.mean[0] == x[0, 0, 0].astype(np.float64)
    assert run.m2[0] == 0
    assert run.rstd[0] == 0
    assert (run.y[:, 0] == run.beta[0].astype(x.dtype)).all()
    assert (run.dx[:, 0] == 0).all()
    assert (run.rstd[1:] > 0).all()


@modes
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", [(6, 3, 256), (21, 5, 24), (40, 9, 1), (3, 4, 49)], ids=str)
def test_nan_and_infinity_stay_in_their_channel(arena, shape, dtype, mode):
    recipe = Recipe(shape, 1, dtype)
    clean = Run(arena, recipe, mode).results()
    others = np.arange(shape[1]) != 1
    for name, bad, place in (("x", np.nan, 0), ("x", np.inf, -1), ("dy", np.nan, -1)):
        array = recipe.x() if name == "x" else recipe.like_x(5)
        array[place, 1, place] = bad
        found = Run(arena, recipe, mode, **{name: array}).results()
        for result, values in found.items():
            kept = others if values.ndim == 1 else (slice(None), others)
            assert_same_bits(values[kept], clean[result][kept], f"{result}: {bad} in {name}")
        if name == "x":
            assert not np.isfinite(found["mean"][1])
            assert np.isnan(found["m2"][1])
            assert np.isnan(found["rstd"][1])
            assert np.isnan(found["y"][:, 1]).all()  # through ReLU too
            assert np.isnan(found["dx"][:, 1]).all()
    if mode == "plain":
        assert np.isnan(found["sums"][:, 1]).all()


# -- the range of numbers --------------------------------------------------------------------------

EXTREMES = (  # scales of x, gamma and dy, and which term leaves float32's range
    (np.inf, 1, 1),  # x - mean; x spans the whole range
    (1e-39, 1, 1e-5),  # rstd
    (1, 1, 1),
    (1e30, 1e-20, 1),  # gamma rstd, which is too small
    (1e-30, 1e10, 1e-5),  # or too large
    (1e37, 1e-7, 1),
    (1e25, 1e20, 1e-20),  # rstd mean(dy x_hat), offset by gamma
    (1e37, 1e37, 1e-36),
    (1e-30, 1e-18, 1e12),  # the same, too large
    (1e-40, 1e34, 1e-36),  # gamma rstd by a wide margin
    (1, 0, 1),
    (1, 1, 0),
)
in_reach = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
alone_and_mixed = pytest.mark.parametrize(
    "shape", [(3, 16, 256), (50, 16, 1), (21, 16, 2)], ids=["rows", "columns", "columns of planes"]
)


def over_the_range(like):
    """Return values of either sign and any size, with both ends of the range in every channel."""
    most = float(ml_dtypes.finfo(like.dtype).max)
    values = np.random.default_rng(1).uniform(-1, 1, like.shape) * most
    values[0], values[-1] = most, -most
    return values.astype(np.float32).astype(like.dtype)


def extremes(recipe):
    """Return x, gamma and dy, whose channels cycle through EXTREMES."""
    scales = np.resize(EXTREMES, (recipe.shape[1], 3))
    whole = np.isinf(scales[:, 0])
    x, gamma, dy = (a.astype(np.float64) for a in (recipe.x(), recipe.gamma(), recipe.like_x(5)))
    x *= np.where(whole, 1, scales[:, 0])[:, None]
    x, dy = (a.astype(np.float32).astype(dtype_of(recipe.dtype)) for a in (x, dy * scales[:, 2:]))
    x[:, whole] = over_the_range(x)[:, whole]
    return x, (gamma * scales[:, 1]).astype(np.float32), dy


@modes
@in_reach
@alone_and_mixed
def test_every_finite_x_is_normalised(arena, shape, dtype, mode):
    """Channels that share a thread need different powers of two, or none."""
    recipe = Recipe(shape, 1, dtype, eps=0.0)
    x, gamma, dy = extremes(recipe)
    run = Run(arena, recipe, mode, x=x, gamma=gamma, dy=dy).check()
    with fused():
        assert_same_results(run, Run(arena, recipe, mode, x=x, gamma=gamma, dy=dy))
    ordinary = Run(arena, recipe, mode).results()
    for name, values in run.results().items():
        c = 2 if values.ndim == 1 else (slice(None), 2)
        assert_same_bits(values[c], ordinary[name][c], f"{name} beside channels of any scale")


@in_reach
@alone_and_mixed
@pytest.mark.parametrize("part", [1, 16])
@pytest.mark.parametrize("training", [False, True])
def test_x_minus_mean_may_be_twice_the_greatest_number(arena, shape, dtype, part, training):
    recipe = Recipe(shape, 1, dtype)
    x, dy, C = over_the_range(recipe.x()), recipe.like_x(5), shape[1]
    most = float(ml_dtypes.finfo(dtype_of(dtype)).max)
    mean, var = np.full(C, most / part), np.full(C, (most / 3) ** 2)
    gamma, beta, rstd = np.full(C, 2, np.float32), np.ones(C, np.float32), var**-0.5
    y, dx = arena.wanted(x), arena.wanted(x)
    call("apply", x, gamma, beta, mean, rstd, None, None, y)
    want = reference.batch_norm_apply(x, gamma, beta, mean, rstd)
    assert_within(y, want, y_tolerance(x, gamma, beta, mean, rstd, axis=1), "y")
    for shift in (None, beta):
        sums = call("backward_reduce", dy, x, gamma, mean, rstd, shift, None)
        arriving = dy if shift is None else np.where(y > 0, dy, 0).astype(dy.dtype)
        want = reference.batch_norm_backward(arriving, x, gamma, mean, rstd, training=training)
        wanted = want.dbeta, want.dgamma
        errors = sums_tolerance(arriving, x, mean, rstd, axis=1)
        for name, got, expected, error in zip("st", sums, wanted, errors, strict=True):
            assert_within(got, expected, error, name)
        given, count = sums if training else None, x.size // C
        call("backward_apply", dy, x, gamma, mean, rstd, given, count, shift, None, dx, None)
        error = dx_tolerance(arriving, x, gamma, mean, rstd, axis=1, training=training)
        assert_within(dx, want.dx, error, "dx")


@alone_and_mixed
@pytest.mark.parametrize(("value", "eps"), [(np.finfo(np.float32).max, 1e-5), (2.0**102, 1e-20)])
def test_a_constant_channel_of_large_numbers_gives_beta(arena, shape, value, eps):
    """x - hi is 0; neither hi u, with a power of two u, nor the factor a may become Inf."""
    gamma = np.full(shape[1], np.finfo(np.float32).max)
    run = Run(arena, Recipe(shape, 1, eps=eps), x=np.full(shape, value, np.float32), gamma=gamma)
    assert_same_bits(run.y, np.broadcast_to(run.beta[:, None], shape).copy())


@alone_and_mixed
@pytest.mark.parametrize("gamma", [1e-200, 1e-90, 1e90, 1e200])
def test_a_gamma_that_float32_does_not_hold_leaves_its_own_gradient_right(arena, shape, gamma):
    recipe = Recipe(shape, 1, gamma_dtype="float64", beta_dtype="float64", eps=0.0)
    x = recipe.x() * np.float32(1e10 if gamma > 1 else 1e-10)
    run = Run(arena, recipe, x=x, gamma=np.full(shape[1], gamma))
    assert not any(np.isnan(values).any() for values in run.results().values())
    if gamma < 1:
        y = np.broadcast_to(run.beta[:, None], shape).astype(np.float32)
        assert_same_bits(run.y, y)
    wanted = reference.batch_norm_backward(run.dy, run.x, run.gamma, run.mean, run.rstd).dgamma
    _, error = sums_tolerance(run.dy, run.x, run.mean, run.rstd, axis=1)
    assert_within(run.sums[1], wanted, error, "sum dy x_hat")


def test_columns_of_dead_channels_are_read_in_vectors(arena):
    """Channels with zero gradient, gamma and spread need no power of two."""
    recipe = Recipe((50, 16, 1), 1)
    x, gamma, dy = recipe.x(), recipe.gamma(), recipe.like_x(5)
    simulator.loads.clear()
    Run(arena, recipe)
    ordinary = simulator.loads.copy()
    x[:, 0], gamma[1], dy[:, 2] = 1, 0, 0
    simulator.loads.clear()
    Run(arena, recipe, x=x, gamma=gamma, dy=dy).check()
    assert simulator.loads == ordinary


@pytest.mark.parametrize(
    ("values", "dy", "gamma"),
    [
        # mean(dy) must bound the power of two v: mean(dy x_hat) ignores a dy where x is the mean.
        ((0, 1e30, -1e30, 3e30, -3e30), {0: 1e30, 1: 1e-20}, 1e30),
        # rstd mean(dy x_hat) is 1e-78, which would require v = 1e40.
        ((1e26, 1e36, -1e36, -1e26), {0: 1e-30, 3: -1e-30}, 1e38),
    ],
    ids=["a large dy", "a mean of nearly 0"],
)
@pytest.mark.parametrize("by_rows", [True, False])
def test_a_large_gamma_takes_no_dy_out_of_range(arena, values, dy, gamma, by_rows):
    values = np.resize(np.float32(values), 1280)
    x = values.reshape((1, 1, -1) if by_rows else (-1, 1, 1))
    gradient = np.zeros_like(x)
    for place, value in dy.items():
        gradient.flat[place] = value
    recipe = Recipe(x.shape, 1, gamma_dtype="float64", beta_dtype="float64", eps=0.0)
    run = Run(arena, recipe, x=x, dy=gradient, gamma=np.full(1, gamma))
    want = reference.batch_norm_backward(gradient, x, run.gamma, run.mean, run.rstd).dx
    np.testing.assert_allclose(run.dx, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())


@both
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("name", TABLE)
def test_activations_of_the_table(arena, shape, name, added):
    rng = np.random.default_rng(3)
    x, dy, residual = (arena.given(rng.normal(0, 2, shape).astype(np.float32)) for _ in range(3))
    gamma, beta = rng.normal(1, 1, (2, shape[1])).astype(np.float32)
    residual = residual if added else None
    act = activation(name)

    def both_passes():
        y, dx, dresidual = arena.wanted(x), arena.wanted(x), arena.wanted(x) if added else None
        mean, _, rstd = call("forward", x, gamma, beta, 1e-5, residual, act, y)
        sums = call("backward", dy, x, gamma, mean, rstd, beta, residual, dx, dresidual, act)
        return y, dx, dresidual, mean, rstd, sums

    y, dx, dresidual, mean, rstd, sums = both_passes()
    options = {"residual": residual, "activation": act}
    expected = reference.batch_norm_apply(x, gamma, beta, mean, rstd, **options)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    grads = reference.batch_norm_backward(dy, x, gamma, mean, rstd, beta=beta, **options)
    np.testing.assert_allclose(dx, grads.dx, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sums, [grads.dbeta, grads.dgamma], rtol=1e-4, atol=1e-3)
    if added:
        np.testing.assert_allclose(dresidual, grads.dresidual, rtol=1e-5, atol=1e-5)
    with fused():
        for one, other in zip(both_passes(), (y, dx, dresidual, mean, rstd, sums), strict=True):
            assert one is other is None or assert_same_bits(one, other) is None


# -- values with weights ---------------------------------------------------------------------------

WEIGHTED = [(2, 2, 300), (1, 3, 257), (3, 4, 49), (70, 3, 1), (9, 70, 1), (30, 6, 2), (2, 9, 64)]
MASKED_ROW, MASKED_COLUMN = (2, 2, 300), (18, 3, 24)  # both have several chunks
COUNTING = ["mask", "weights", "mask of each channel", "weights of each channel"]
counted = pytest.mark.parametrize("counting", COUNTING)
by_both = pytest.mark.parametrize("shape", [MASKED_ROW, MASKED_COLUMN], ids=["rows", "columns"])


def weights_of(recipe, counting, fill=0.0, dead=False, first=None):
    """Return weights as the backend takes them: a fifth are 0, and if `dead` all of channel 1.

    `first` is the weight of the first value of each channel.
    """
    (N, C, S), each = recipe.shape, "each" in counting
    rng = np.random.default_rng(11)
    shape = (N, C if each else 1, S)
    found = rng.uniform(0.1, 3, shape) * (rng.random(shape) < 0.8)
    dtype = np.float64 if recipe.dtype == "float64" else np.float32
    values = (found > 0).astype(np.uint8) if counting.startswith("mask") else found.astype(dtype)
    if dead:
        values[:, 1] = 0
    if first is not None:
        values[0, :, 0] = first
    return SimpleNamespace(values=values, count=backend.weigh(values, C), fill=fill)


class WeightedRun:
    """Call all functions of the backend with weights; hold their results."""

    def __init__(
        self, arena, recipe, weights, mode="plain", *,
        poison=None, layouts=None, x=None, dy=None, gamma=None,
    ):  # fmt: skip
        layouts = layouts or {}
        self.w = np.broadcast_to(weights.values, recipe.shape).astype(np.float64)
        self.weights, self.mode, self.eps = weights, mode, recipe.eps
        self.gamma = recipe.gamma() if gamma is None else gamma
        self.beta = recipe.beta()
        self.activation = None if mode == "plain" else "relu"
        found = {"x": recipe.x() if x is None else x, "dy": recipe.like_x(5) if dy is None else dy}
        found["residual"] = recipe.like_x(4)
        for name, values in found.items():
            if poison is not None:
                values[self.w == 0] = poison
            setattr(self, name, arena.given(values, **layouts.get(name, {})))
        self.residual = self.residual if mode == "residual and relu" else None

        def wanted(*names):
            return [arena.wanted(self.x, **layouts.get(name, {})) for name in names]

        def called(name, *args):
            return call(name, *args, weights=weights)

        self.y, y = wanted("y", "y")
        rest = self.gamma, self.beta
        apply = self.residual, self.activation
        forward = called("forward", self.x, *rest, self.eps, *apply, self.y)
        self.mean, self.m2, self.rstd = forward
        for alone, found in zip(called("stats", self.x), (self.mean, self.m2), strict=True):
            assert_same_bits(alone, found, "statistics alone and of the forward")
        called("apply", self.x, *rest, self.mean, self.rstd, *apply, y)
        assert_same_bits(y, self.y, "y of apply and of the forward")
        rest = self.dy, self.x, self.gamma, self.mean, self.rstd
        mask = None, None
        if self.residual is not None:
            mask = None, arena.given(self.y, **layouts.get("y", {}))
        elif self.activation:
            mask = self.beta, None
        self.dx, self.dresidual = wanted("dx", "dresidual")
        self.sums = called("backward", *rest, *mask, self.dx, self.dresidual)
        sums = called("backward_reduce", *rest, *mask)
        assert_same_bits(sums, self.sums, "sums alone and of the backward")
        dx, dresidual, self.frozen_dx = wanted("dx", "dresidual", "dx")
        called("backward_apply", *rest, sums, weights.count, *mask, dx, None)
        assert_same_bits(dx, self.dx, "dx alone and of the backward")
        called("backward_apply", *rest, None, 1, *mask, None, dresidual)
        assert_same_bits(dresidual, self.dresidual, "dresidual alone and of the backward")
        called("backward_apply", *rest, None, 1, *mask, self.frozen_dx, None)

    results = Run.results

    def check(self):
        """Compare with the oracle; through ReLU, use the backend's own y and dy."""
        x, w, dtype, fill = np.where(self.w > 0, self.x, 0), self.w, self.x.dtype, self.weights.fill
        x = (x if fill is not None else self.x).astype(dtype)
        given = {"weights": w}
        moments = reference.batch_norm_stats(x, **given)
        norm = self.gamma, self.beta
        np.testing.assert_allclose(
            np.broadcast_to(self.weights.count, moments.count.shape), moments.count, rtol=1e-6
        )
        ref = reference.batch_norm_forward(
            x, *norm, eps=self.eps, residual=self.residual, activation=self.activation, fill=fill,
            correction=0, **given,
        )  # fmt: skip
        assert_within(self.mean, moments.mean, mean_tolerance(moments, dtype), "mean")
        assert_within(self.m2, moments.m2, m2_tolerance(moments, dtype), "M2")
        assert_within(self.rstd, ref.rstd, rstd_tolerance(moments, ref.rstd, dtype), "rstd")
        mean, rstd = ref.mean.astype(np.float64), ref.rstd.astype(np.float64)
        inside = np.where(w > 0, x, mean[:, None]).astype(dtype) if fill is not None else x
        error = y_tolerance(inside, *norm, mean, rstd, axis=1, residual=self.residual)
        assert_within(self.y, ref.y, error, "y")
        if fill is not None:
            assert (self.y[w == 0] == np.asarray(fill, dtype)).all()
        dy = np.where(w > 0, self.dy, 0).astype(dtype)
        if self.activation:
            dy = np.where(self.y > 0, dy, 0).astype(dtype)
        assert_same_bits(self.dresidual, dy, "dresidual")
        rest = x, self.gamma, self.mean, self.rstd
        tame = np.where(w > 0, x, self.mean[:, None]).astype(dtype), *rest[1:]
        ref = reference.batch_norm_backward(dy, *rest, **given)
        errors = sums_tolerance(dy, tame[0], self.mean, self.rstd, axis=1)
        assert_within(self.sums[0], ref.dbeta, errors[0], "sum dy")
        assert_within(self.sums[1], ref.dgamma, errors[1], "sum dy x_hat")
        heaviest = max(w.max(initial=0), 1)
        error = dx_tolerance(dy, *tame, axis=1) * heaviest * w.size / max(np.sum(w > 0), 1)
        assert_within(self.dx, ref.dx, error, "dx")
        assert (self.dx[w == 0] == 0).all()
        ref = reference.batch_norm_backward(dy, *rest, training=False, **given)
        error = dx_tolerance(dy, *tame, axis=1, training=False)
        assert_within(self.frozen_dx, ref.dx, error, "dx with frozen statistics")
        return self


@counted
@pytest.mark.parametrize("shape", WEIGHTED, ids=str)
def test_weighted_results_are_the_oracles(arena, shape, counting):
    recipe = Recipe(shape, 1, offset=3.0)
    WeightedRun(arena, recipe, weights_of(recipe, counting)).check()


@modes
@by_both
@dtypes
def test_weighted_results_of_every_dtype_and_mode(arena, shape, dtype, mode):
    recipe = Recipe(shape, 1, dtype)
    kinds = (COUNTING[1], None), (COUNTING[2], 7.5), (COUNTING[3], 0.0)
    counting, fill = kinds[MODES.index(mode)]
    WeightedRun(arena, recipe, weights_of(recipe, counting, fill), mode).check()


@dtypes
@pytest.mark.parametrize("shape", [MASKED_ROW, MASKED_COLUMN, (40, 9, 1)], ids=str)
def test_what_does_not_count_changes_no_bit(arena, shape, dtype):
    recipe = Recipe(shape, 1, dtype)
    for mode, poison, counting in zip(MODES, (np.nan, np.nan, np.inf), COUNTING[1:], strict=True):
        weights = weights_of(recipe, counting)
        clean = WeightedRun(arena, recipe, weights, mode)
        assert_same_results(clean, WeightedRun(arena, recipe, weights, mode, poison=poison))


@by_both
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_channel_in_which_nothing_counts_has_no_statistics(arena, shape, dtype):
    recipe = Recipe(shape, 1, dtype)
    weights = weights_of(recipe, "mask of each channel", dead=True)
    run = WeightedRun(arena, recipe, weights, poison=np.nan)
    assert weights.count[1] == run.mean[1] == run.m2[1] == run.rstd[1] == 0
    assert (run.sums[:, 1] == 0).all()
    assert (run.y[:, 1] == 0).all()
    assert (run.dx[:, 1] == 0).all()
    run.check()
    weights.fill = None
    run = WeightedRun(arena, recipe, weights)
    assert (run.y[:, 1] == run.beta[1].astype(run.y.dtype)).all()


@by_both
@dtypes
def test_weights_of_1_are_no_weights(arena, shape, dtype):
    recipe = Recipe(shape, 1, dtype, offset=3.0)
    values = np.ones((shape[0], 1, shape[2]), np.uint8)
    ones = SimpleNamespace(values=values, count=backend.weigh(values, shape[1]), fill=0.0)
    run, other = WeightedRun(arena, recipe, ones, "relu"), Run(arena, recipe, "relu")
    run.check()
    for name in ("mean", "rstd"):
        np.testing.assert_allclose(getattr(run, name), getattr(other, name), rtol=1e-6)


@by_both
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("value", [0.0, -300.7])
def test_a_weighted_constant_channel_has_no_spread(arena, shape, dtype, value):
    recipe = Recipe(shape, 1, dtype, eps=0.0)
    for counting in COUNTING[:2]:
        x = recipe.x()
        x[:, 0] = value
        run = WeightedRun(arena, recipe, weights_of(recipe, counting), poison=np.nan, x=x)
        assert run.mean[0] == np.asarray(value, x.dtype).astype(np.float64)
        assert run.m2[0] == run.rstd[0] == 0
        assert (run.y[:, 0][run.w[:, 0] > 0] == run.beta[0].astype(x.dtype)).all()


@by_both
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("counting", COUNTING[:2])
def test_a_weighted_mean_far_from_0_costs_no_digits(arena, shape, dtype, counting):
    recipe = Recipe(shape, 1, dtype, offset=1e6, eps=0.0)
    WeightedRun(arena, recipe, weights_of(recipe, counting)).check()


@by_both
@pytest.mark.parametrize("value", [1e3, 1e8])
def test_an_outlier_of_little_weight_costs_no_digits(arena, shape, value):
    recipe = Recipe(shape, 1)
    weights = weights_of(recipe, "weights", first=1e-6 if value == 1e3 else 1e-18)
    x = recipe.x()
    x[0, :, 0] = value
    WeightedRun(arena, recipe, weights, x=x).check()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@by_both
def test_weighted_channels_of_any_scale(arena, shape, scale):
    recipe = Recipe(shape, 1, scale=scale, eps=0.0)
    for counting in COUNTING[:2]:
        WeightedRun(arena, recipe, weights_of(recipe, counting)).check()


@in_reach
@pytest.mark.parametrize("shape", [(2, 16, 256), (30, 16, 1)], ids=["rows", "columns"])
def test_every_finite_x_is_normalised_with_weights(arena, shape, dtype):
    recipe = Recipe(shape, 1, dtype, eps=0.0)
    x, gamma, dy = extremes(recipe)
    weights = weights_of(recipe, "mask", first=1)
    WeightedRun(arena, recipe, weights, "relu", x=x, gamma=gamma, dy=dy).check()


@pytest.mark.parametrize(
    ("shape", "gap"),
    [
        (MASKED_ROW, {"first": 1, "plane_gap": 1, "sample_gap": 3}),
        (MASKED_COLUMN, {"first": 3, "sample_gap": 3}),
    ],
    ids=["rows", "columns"],
)
def test_weighted_tensors_may_lie_anywhere(arena, shape, gap):
    recipe = Recipe(shape, 1)
    weights, names = weights_of(recipe, "mask"), ("x", "dy", "residual", "y", "dx", "dresidual")
    run = WeightedRun(arena, recipe, weights, MODES[2], layouts=dict.fromkeys(names, gap))
    assert_same_results(run, WeightedRun(arena, recipe, weights, MODES[2]))


@by_both
def test_weighted_threads_in_any_order_change_no_bit(arena, shape):
    recipe = Recipe(shape, 1, offset=3.0)
    weights = weights_of(recipe, "weights")
    first = WeightedRun(arena, recipe, weights, "relu")
    with last_thread_first():
        assert_same_results(first, WeightedRun(arena, recipe, weights, "relu"))


@by_both
def test_weighted_in_place_changes_no_bit(arena, shape):
    recipe = Recipe(shape, 1)
    weights = weights_of(recipe, "mask")
    run = WeightedRun(arena, recipe, weights)
    y, dx = arena.place(run.x), arena.place(run.dy)
    call("apply", y, run.gamma, run.beta, run.mean, run.rstd, None, None, y, weights=weights)
    assert_same_bits(y, run.y, "y written over x")
    rest = run.x, run.gamma, run.mean, run.rstd, None, None
    call("backward", dx, *rest, dx, None, weights=weights)
    assert_same_bits(dx, run.dx, "dx written over dy")


@by_both
@pytest.mark.parametrize("name", ["silu", "gelu"])
def test_weighted_activations(arena, shape, name):
    recipe, act = Recipe(shape, 1), activation(name)
    weights = weights_of(recipe, "mask")
    w = np.broadcast_to(weights.values, shape)
    x, dy, residual = (arena.given(a) for a in (recipe.x(), recipe.like_x(5), recipe.like_x(4)))
    norm = recipe.gamma(), recipe.beta()
    y, dx, dresidual = arena.wanted(x), arena.wanted(x), arena.wanted(x)
    mean, _, rstd = call("forward", x, *norm, recipe.eps, residual, act, y, weights=weights)
    rest = dy, x, norm[0], mean, rstd, norm[1], residual, dx, dresidual, act
    sums = call("backward", *rest, weights=weights)
    options = {"residual": residual, "activation": act, "weights": w.astype(float)}
    expected = reference.batch_norm_apply(x, *norm, mean, rstd, **options)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    ref = reference.batch_norm_backward(dy, x, norm[0], mean, rstd, beta=norm[1], **options)
    np.testing.assert_allclose(dx, ref.dx, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dresidual, ref.dresidual, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sums, [ref.dbeta, ref.dgamma], rtol=1e-4, atol=1e-3)


@by_both
def test_weighted_sums_of_dy_may_leave_float32(arena, shape):
    recipe = Recipe(shape, 1)
    weights = weights_of(recipe, "mask")
    dy = (np.abs(recipe.like_x(5).astype(np.float64)) * 3e37).astype(np.float32)
    mean, _, rstd = call("forward", arena.given(recipe.x()), recipe.gamma(), recipe.beta(), 1e-5,
                         None, None, arena.wanted(dy), weights=weights)  # fmt: skip
    x, gamma = recipe.x(), recipe.gamma()
    sums = call("backward_reduce", dy, x, gamma, mean, rstd, None, None, weights=weights)
    w = np.broadcast_to(weights.values, shape).astype(float)
    ref = reference.batch_norm_backward(dy, x, gamma, mean, rstd, weights=w)
    wide = dy.astype(np.float64), x.astype(np.float64)
    errors = sums_tolerance(*wide, mean, rstd, axis=1)
    assert_within(sums[0], ref.dbeta, errors[0] * 2.0**29, "sum dy")
    assert_within(sums[1], ref.dgamma, errors[1] * 2.0**29, "sum dy x_hat")


@pytest.mark.parametrize("shape", [(2, 3, 256), (40, 3, 1)], ids=str)
def test_weighted_nan_and_infinity_stay_in_their_channel(arena, shape):
    recipe = Recipe(shape, 1)
    weights = weights_of(recipe, "weights", first=1)
    clean = WeightedRun(arena, recipe, weights).results()
    others = np.arange(shape[1]) != 1
    for bad in (np.nan, np.inf):
        x = recipe.x()
        x[0, 1, 0] = bad
        run = WeightedRun(arena, recipe, weights, x=x)
        for result, values in run.results().items():
            kept = others if values.ndim == 1 else (slice(None), others)
            assert_same_bits(values[kept], clean[result][kept], f"{result}: {bad}")
        assert not np.isfinite(run.mean[1])
        assert np.isnan([run.m2[1], run.rstd[1]]).all()
        assert np.isnan(run.y[:, 1][run.w[:, 1] > 0]).all()


# -- second order ----------------------------------------------------------------------------------


def check_second_order(arena, recipe, training=True, scales=(1.0, 1.0), layout=None):
    """Call `double_backward` and `jvp`, and compare with the oracle."""
    layout = layout or {}
    x, gamma = recipe.x(), recipe.gamma().astype(np.float64)
    _, mean, rstd = reference.batch_norm_forward(x, gamma, eps=recipe.eps)
    mean, rstd = mean.astype(np.float64), rstd.astype(np.float64)
    ddgamma, ddbeta = recipe.beta().astype(np.float64), recipe.running("float64")[0]
    ddx, dy = (recipe.like_x(6 + i) * x.dtype.type(scale) for i, scale in enumerate(scales))
    placed = [arena.given(values, **layout) for values in (ddx, dy, x)]
    ddy, dx, ty = (arena.wanted(x, **layout) for _ in range(3))
    rest = gamma, mean, rstd, ddgamma, ddbeta
    dgamma = call("double_backward", *placed, *rest, training, ddy, dx)
    options = {"training": training}
    ref = reference.batch_norm_double_backward(
        ddx, ddgamma, ddbeta, dy, x, gamma, mean, rstd, **options
    )
    error = ty_tolerance(ddx, ddgamma, ddbeta, x, gamma, mean, rstd, axis=1, **options)
    assert_within(ddy, ref.ddy, error, "ddy")
    error = second_dx_tolerance(ddx, ddgamma, dy, x, gamma, mean, rstd, axis=1, **options)
    assert_within(dx, ref.dx, error, "dx")
    error = second_dgamma_tolerance(ddx, dy, x, mean, rstd, axis=1, **options)
    assert_within(dgamma, ref.dgamma, error, "dgamma")
    if training:
        call("jvp", placed[0], placed[2], *rest, training, ty)
    else:  # nothing is summed
        backend.jvp(placed[0], placed[2], *rest, training, ty)
    error = ty_tolerance(ddx, ddgamma, ddbeta, x, gamma, mean, rstd, axis=1, **options)
    assert_within(ty, ref.ddy, error, "ty")


@shapes
@pytest.mark.parametrize("training", [True, False])
def test_second_order(arena, shape, training):
    check_second_order(arena, Recipe(shape, 1, offset=3.0), training)


@both
@dtypes
def test_second_order_in_every_dtype(arena, shape, dtype):
    check_second_order(arena, Recipe(shape, 1, dtype=dtype, offset=3.0))


@both
@pytest.mark.parametrize("offset", OFFSETS)
def test_second_order_at_any_mean(arena, shape, offset):
    check_second_order(arena, Recipe(shape, 1, offset=offset))


@both
@pytest.mark.parametrize("layout", [{"first": 1}, {"plane_gap": 3}, {"sample_gap": 5}], ids=str)
def test_second_order_in_any_layout(arena, shape, layout):
    if shape == COLUMN and "plane_gap" in layout:
        pytest.skip("columns have no gaps between planes")
    check_second_order(arena, Recipe(shape, 1), layout=layout)


@both
@pytest.mark.parametrize(
    ("of_x", "of_ddx", "of_dy"),
    [(1e-20, 1e-2, 1e-2), (1e-25, 1e-25, 1e-20), (1e25, 1e25, 1e10), (3e37, 1e10, 1e20)],
)
def test_second_order_beyond_float32(arena, shape, of_x, of_ddx, of_dy):
    """Factors or sums leave float32's range, but results do not."""
    recipe = Recipe(shape, 1, scale=of_x, eps=0.0, gamma_dtype="float64")
    check_second_order(arena, recipe, scales=(of_ddx, of_dy))


# -- mixed precision ------------------------------------------------------------------------------


def passes_of(arena, x, dy, residual, activation, layout):
    """Return the results of all functions for x with this dy and residual."""
    C = x.shape[1]
    gamma, beta = np.linspace(0.5, 2, C), np.linspace(-1, 1, C)
    gamma[C // 2] = 1e-42  # needs a power of two: such columns are processed one by one
    x_, dy_, residual_ = (arena.given(values, **layout) for values in (x, dy, residual))
    y, dx, dresidual, ddy, dx2, ty = (arena.wanted(x, **layout) for _ in range(6))
    own = with_own_kernels(activation)
    mean, m2, rstd = backend.forward(x_, gamma, beta, 1e-5, residual_, activation, y)
    kept = residual_ if own is not None else y if activation else None
    args = dy_, x_, gamma, mean, rstd, beta if own is not None else None, kept
    sums = backend.backward(*args, dx, dresidual, own)
    again = backend.backward_reduce(*args, own)
    dgamma = backend.double_backward(dy_, dy_, x_, gamma, mean, rstd, beta, beta, True, ddy, dx2)
    backend.jvp(dy_, x_, gamma, mean, rstd, beta, beta, True, ty)
    results = y, dx, dresidual, sums, again, ddy, dx2, ty, dgamma, mean, m2, rstd
    return [np.array(result) for result in results]


def same_beside_float32(arena, recipe, name=None, layout=None, *, dy=True, residual=True):
    """Check that float32 dy or residual change no bit: kernels compute with halves in float32."""
    act = activation(name) if name == "silu" else name
    x, *halves = recipe.x(), recipe.like_x(5), recipe.like_x(6)
    wide = [
        a.astype(np.float32 if w else a.dtype) for a, w in zip(halves, (dy, residual), strict=True)
    ]
    expected = passes_of(arena, x, *halves, act, layout or {})
    for one, other in zip(passes_of(arena, x, *wide, act, layout or {}), expected, strict=True):
        assert_same_bits(one, other)


@both
@pytest.mark.parametrize(("dtype", "name"), [("float16", "relu"), ("bfloat16", "silu")])
@pytest.mark.parametrize("once", [False, True])
def test_float32_beside_halves_has_the_bits_of_equal_halves(arena, shape, dtype, name, once):
    with fused() if once else nullcontext():
        same_beside_float32(arena, Recipe(shape, 1, dtype=dtype, offset=2.0), name)


@pytest.mark.parametrize("dy", [True, False])
def test_one_tensor_of_float32_beside_halves(arena, dy):
    for shape in ((2, 3, 289), (9, 5, 2)):  # read value by value
        same_beside_float32(arena, Recipe(shape, 1, dtype="float16"), dy=dy, residual=not dy)


@both
@pytest.mark.parametrize("layout", [{"first": 1}, {"first": 4}, {"sample_gap": 4}], ids=str)
def test_float32_beside_halves_in_any_layout(arena, shape, layout):
    """Vectors of float32 and of halves are aligned at different indices."""
    same_beside_float32(arena, Recipe(shape, 1, dtype="float16"), "relu", layout)


@both
def test_a_float32_residual_is_not_rounded(arena, shape):
    recipe = Recipe(shape, 1, dtype="float16")
    x, C = recipe.x(), shape[1]
    residual = (-recipe.like_x(6).astype(np.float32) * (1 + 2.0**-13)).astype(np.float32)
    rounded, y = residual.astype(np.float16), arena.wanted(x)
    norm = np.full(C, -1.0), np.zeros(C), np.zeros(C), np.ones(C)
    backend.apply(arena.given(rounded), *norm, arena.given(residual), None, y)
    assert_same_bits(y, (residual - rounded.astype(np.float32)).astype(np.float16))
    assert (y != 0).any()


# -- numbers of a channel --------------------------------------------------------------------------


@pytest.mark.parametrize("C", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_rstd_of_any_number_of_channels(C, eps):
    var = np.random.default_rng(C).uniform(0.1, 9, C)
    var[0] = 0.0
    expected = np.where(var + eps == 0, 0, 1 / np.sqrt(np.maximum(var + eps, 1e-300)))
    got = call("rstd", var, eps)
    assert_within(got, expected, 2 * relative_unit(np.float64) * expected, "rstd")


@pytest.mark.parametrize("C", [1, 64, 65])
@pytest.mark.parametrize("bounds", [(1.0, 0.0), (1.2, 0.3), (np.inf, np.inf)])
def test_corrections_of_any_number_of_channels(C, bounds):
    rng = np.random.default_rng(C)
    mean, running_mean = rng.normal(size=(2, C))
    m2, running_var = rng.uniform(0.1, 9, (2, C))
    mean[-1], r_max, d_max = np.nan, *bounds
    got = call("renorm_factors", mean, m2, 7, 1e-3, running_mean, running_var, r_max, d_max)
    running_std = np.sqrt(running_var + 1e-3)
    r = np.clip(np.sqrt(m2 / 7 + 1e-3) / running_std, 1 / r_max, r_max)
    d = np.clip((mean - running_mean) / running_std, -d_max, d_max)
    for one, expected in zip(got, (r, d), strict=True):
        assert_same_bits(one, expected)


@both
def test_renormalisation_folds_its_corrections(arena, shape):
    recipe = Recipe(shape, 1, offset=3.0)
    x, C = recipe.x(), shape[1]
    gamma, beta, running_mean = np.random.default_rng(1).normal(size=(3, C))
    y, applied = arena.wanted(x), arena.wanted(x)
    population = running_mean, np.full(C, 2.0), 1.1, 0.4
    x_ = arena.given(x)
    mean, m2, rstd, r, d = backend.renorm_forward(
        x_, gamma, beta, *population, 1e-5, None, "relu", y
    )
    again = backend.renorm_factors(mean, m2, shape[0] * shape[2], 1e-5, *population)
    for one, other in zip((r, d), again, strict=True):
        assert_same_bits(one, other)
    backend.apply(x_, gamma * r, beta + gamma * d, mean, rstd, None, "relu", applied)
    assert_same_bits(y, applied)


@pytest.mark.parametrize("C", [1, 64, 65])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, -0.5])
def test_running_statistics_move_towards_the_batch(C, dtype, momentum):
    recipe = Recipe((9, C, 2), 1)
    moments = reference.batch_norm_stats(recipe.x())
    old, running = recipe.running(dtype), recipe.running(dtype)
    divisor = float(moments.count - 1)
    del simulator.launches[:]
    backend.move(*running, moments.mean, moments.m2, momentum, divisor)
    assert simulator.launches == ([] if dtype in HALVES else ["move"])
    batch = moments.mean, moments.m2 / divisor
    errors = running_tolerance(
        moments, *old, momentum=momentum, correction=1, dtype=np.dtype("float32")
    )
    for new, before, towards, error in zip(running, old, batch, errors, strict=True):
        expected = (1 - momentum) * before.astype(np.float64) + momentum * towards
        assert_within(new, expected, error, "running statistics")
        if momentum == 0:
            assert_same_bits(new, before)


def test_running_statistics_with_gaps_between_them():
    memory = np.full((2, 10), 5.0, np.float32)
    running = memory[0, ::2], memory[1, ::2]
    backend.move(*running, np.zeros(5), np.full(5, 18.0), 0.5, 9.0)
    assert memory[0].tolist() == [2.5, 5] * 5
    assert memory[1].tolist() == [3.5, 5] * 5


# -- the simulator itself --------------------------------------------------------------------------


def simulate(function, *args, threads=THREADS):
    simulator.cuda.blockDim.x = threads
    simulator._Block().run(function, args, threads)


def test_a_race_is_found():
    def racing(barrier):
        shared = simulator.cuda.shared.array(THREADS, np.float64)
        thread = simulator.cuda.threadIdx.x
        shared[thread] = 1.0
        if barrier:
            yield "block"
        shared[(thread + 1) % THREADS]

    simulate(racing, True)
    with pytest.raises(AssertionError, match="race"):
        simulate(racing, False)


def test_a_shuffle_without_the_whole_warp_is_found():
    def lonely():
        if simulator.cuda.threadIdx.x > 0:
            yield from simulator.cuda.shfl_xor_sync(0xFFFFFFFF, 1.0, 1)

    with pytest.raises(AssertionError, match="whole warp"):
        simulate(lonely)


def test_a_block_that_leaves_others_waiting_is_found():
    def leaving():
        if simulator.cuda.blockIdx.x == 0:
            yield from simulator.cluster_barrier()

    lonely = simulator.cuda.jit()(leaving)
    lonely.py_func.__signature__ = inspect.Signature()
    with fused(), pytest.raises(AssertionError, match="has ended that others wait for"):
        simulator.run(lonely, "float32", "float32", 2, THREADS, cluster=2)
    with fused(), pytest.raises(AssertionError, match="a cluster, but there is none"):
        simulator.run(lonely, "float32", "float32", 2, THREADS)


def test_accesses_outside_and_misaligned_and_twice_are_found(arena):
    array = arena.place(np.zeros((1, 1, 8), BFLOAT16))
    memory, values = simulator._passed(array.dtype, array), np.zeros(8, np.float32)
    load, store = simulator.memory_of("bfloat16", 4)
    store(memory, 4, values, 0)
    with pytest.raises(AssertionError, match="twice"):
        store(memory, 4, values, 4)
    for index, words in ((-1, "in memory of"), (5, "in memory of"), (2, "not aligned")):
        with pytest.raises(AssertionError, match=words):
            load(memory, index, values, 0)
