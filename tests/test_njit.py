"""Functions that users compile with Numba: the same bits and errors as calls from Python.

A function is written once and runs compiled and as Python. Compiling takes seconds, so one function
makes all the calls and is compiled for few types: the cases below spread axes, dtypes and ranks.
"""

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from children import run_child
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit, prange
from numba.core.errors import TypingError

import nbnorm
from nbnorm.cpu import _CACHES
from nbnorm.cpu import plan as plan_of
from nbnorm.cpu.plan import NEAR, serial

RELU = "relu"


def everything(axis, activation):
    """Return a function that calls every function that compiled code supports."""

    def calls(x, dy, gamma, beta, running_mean, running_var, momentum, eps, correction):
        forward = nbnorm.batch_norm_forward(
            x, gamma, beta, running_mean, running_var,
            momentum=momentum, eps=eps, correction=correction, axis=axis, activation=activation,
        )  # fmt: skip
        frozen = nbnorm.batch_norm_forward(
            x, gamma, beta, running_mean, running_var,
            training=False, eps=eps, axis=axis, activation=activation,
        )  # fmt: skip
        inferred = nbnorm.batch_norm_inference(
            x, gamma, beta, running_mean, running_var, eps=eps, axis=axis, activation=activation
        )
        moments = nbnorm.batch_norm_stats(x, axis=axis)
        moved = nbnorm.update_running_stats(
            running_mean, running_var, moments, momentum=momentum, correction=correction
        )
        applied = nbnorm.batch_norm_apply(
            x, gamma, beta, forward.mean, forward.rstd, axis=axis, activation=activation
        )
        backward = nbnorm.batch_norm_backward(
            dy, x, gamma, forward.mean, forward.rstd, beta=beta, axis=axis, activation=activation
        )
        constant = nbnorm.batch_norm_backward(
            dy, x, gamma, frozen.mean, frozen.rstd,
            beta=beta, training=False, axis=axis, activation=activation,
        )  # fmt: skip
        sums = nbnorm.batch_norm_backward_reduce(
            dy, x, forward.mean, forward.rstd,
            gamma=gamma, beta=beta, activation=activation, axis=axis,
        )  # fmt: skip
        dx = nbnorm.batch_norm_backward_apply(
            dy, x, gamma, forward.mean, forward.rstd, sums[0], sums[1], moments.count,
            beta=beta, activation=activation, axis=axis,
        )  # fmt: skip
        return (
            forward, frozen, inferred, moments, moved, applied, backward, constant, sums, dx
        )  # fmt: skip

    return calls


def step(axis, activation):
    """Return a function that only trains, which compiles faster than `everything`."""

    def calls(x, dy, gamma, beta, running_mean, running_var, momentum, eps, correction):
        forward = nbnorm.batch_norm_forward(
            x, gamma, beta, running_mean, running_var,
            momentum=momentum, eps=eps, correction=correction, axis=axis, activation=activation,
        )  # fmt: skip
        backward = nbnorm.batch_norm_backward(
            dy, x, gamma, forward.mean, forward.rstd, beta=beta, axis=axis, activation=activation
        )
        return forward, backward

    return calls


# Function, axis, activation, number of axes, dtypes of x and of parameters.
CASES = {
    "images": (everything, 1, None, 4, "f4", "f4"),
    "sequences": (everything, 1, RELU, 3, "f8", "f8"),
    "volumes, float64 parameters": (step, 1, RELU, 5, "f4", "f8"),
    "channels-last images": (everything, -1, None, 4, "f8", "f4"),
    "channels-last sequences": (step, -1, RELU, 3, "f4", "f4"),
    "vectors": (step, 1, None, 2, "f4", "f4"),
}
COMPILED = {case: njit(make(*found[:2])) for case, (make, *found) in CASES.items()}


def arguments(case, shape, seed=0, momentum=0.1, eps=1e-5, correction=1, offset=0.0):
    """Return arguments of one of the functions."""
    _, axis, _, _, dtype, of_parameters = CASES[case]
    rng = np.random.default_rng(seed)
    x, dy = (rng.standard_normal((2, *shape)) + offset).astype(dtype)
    gamma, beta, mean, var = rng.standard_normal((4, shape[axis])).astype(of_parameters)
    return x, dy, gamma, beta, mean, np.abs(var), momentum, eps, correction


def copies(args):
    return [a.copy() if isinstance(a, np.ndarray) else a for a in args]


def same(found, expected):
    """Assert that two results have the same types and bits."""
    assert type(found) is type(expected)
    if isinstance(expected, tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    elif isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.flags.carray
        assert found.tobytes() == expected.tobytes()
    else:
        assert found == expected or (found != found and expected != expected)  # NaN


def compare(case, args):
    """Run a function compiled and as Python; compare results and arguments."""
    found, expected = copies(args), copies(args)
    same(COMPILED[case](*found), COMPILED[case].py_func(*expected))
    for one, other in zip(found, expected, strict=True):
        same(one, other)


@st.composite
def calls(draw):
    case = draw(st.sampled_from(list(CASES)))
    _, axis, _, rank, _, _ = CASES[case]
    small, large = st.integers(1, 7), st.sampled_from([17, 33, 64])
    shape = [draw(small) for _ in range(rank)]
    if draw(st.booleans()):
        shape[draw(st.integers(0, rank - 1))] = draw(large)
    correction = draw(st.sampled_from([0, 1]))
    if np.prod(shape) // shape[axis] <= correction:
        correction = 0
    return case, arguments(
        case, shape, draw(st.integers(0, 99)), draw(st.sampled_from([0.1, 0.0, 1.0, -0.5])),
        draw(st.sampled_from([1e-5, 0.0, 0.1])), correction, draw(st.sampled_from([0.0, 1e3])),
    )  # fmt: skip


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(calls())
def test_bits_of_python(call):
    compare(*call)


def enough(m, itemsize=4):
    """Return how many channels of m values exceed a block in this machine's cache."""
    return 1 + 4 * NEAR * _CACHES.own // (2 * m * itemsize)


LARGE = {
    "images": [(40, enough(40 * 8100), 90, 90), (1030, 120, 6, 6)],
    "sequences": [(5, enough(5 * 70_000), 70_000)],
    "channels-last sequences": [(2, 300, 4100)],
    "vectors": [(1100, 300)],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "shape"), [(case, shape) for case, shapes in LARGE.items() for shape in shapes]
)
def test_bits_of_python_where_a_pass_is_cut_up(case, shape):
    _, axis, _, _, dtype, _ = CASES[case]
    C = shape[axis]
    S = 1 if axis == -1 else int(np.prod(shape[2:]))
    cut = plan_of(np.prod(shape) // (C * S), C, S, np.dtype(dtype).itemsize, 1, _CACHES, 2)
    assert cut.chunks > 1
    assert cut.blocks > 1 or shape in [(1100, 300)]
    compare(case, arguments(case, shape))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("samples", [True, False])
def test_empty_arrays(case, samples):
    _, axis, _, rank, _, _ = CASES[case]
    shape = [3] * rank
    shape[0 if samples else axis] = 0
    compare(case, arguments(case, shape))


def test_read_only_arrays():
    args = arguments("vectors", (6, 5))
    for array in args[:4]:
        array.flags.writeable = False
    same(
        COMPILED["vectors"](*args[:4], *copies(args[4:])),
        COMPILED["vectors"].py_func(*args[:4], *copies(args[4:])),
    )


def optional(x, training, running_mean, running_var):
    """Omit arguments, pass None or a literal, or a value known only at run time."""
    plain = nbnorm.batch_norm_forward(x)
    none = nbnorm.batch_norm_forward(x, None, beta=None, activation=None, training=True, axis=-1)
    either = nbnorm.batch_norm_forward(
        x, None, None, running_mean, running_var, training=training, correction=0, momentum=1
    )
    backward = nbnorm.batch_norm_backward(x, x, None, either.mean, either.rstd, training=training)
    masked = nbnorm.batch_norm_backward(
        x, x, None, either.mean, either.rstd, beta=None, activation="relu"
    )
    sums = nbnorm.batch_norm_backward_reduce(x, x, either.mean, either.rstd)
    return plain, none, either, backward, masked, sums


@pytest.mark.slow
def test_what_may_be_left_out():
    compiled = njit(optional)
    x = np.random.default_rng(0).standard_normal((6, 5)).astype("f4")
    for training in (True, False):
        found, expected = (
            [np.full(5, 0.5, "f4"), np.full(5, 2.0)],
            [np.full(5, 0.5, "f4"), np.full(5, 2.0)],
        )
        same(compiled(x, training, *found), optional(x, training, *expected))
        same(tuple(found), tuple(expected))
        assert training == (not np.array_equal(found[0], np.full(5, 0.5)))


def test_moments_from_python():
    @njit
    def update(running_mean, running_var, moments):
        return nbnorm.update_running_stats(running_mean, running_var, moments, momentum=0.25)

    x = np.random.default_rng(0).standard_normal((6, 5))
    moments = nbnorm.batch_norm_stats(x)
    found, expected = [np.ones(5, "f4"), np.ones(5)], [np.ones(5, "f4"), np.ones(5)]
    result = update(*found, moments)
    same(result, update.py_func(*expected, moments))
    same(tuple(found), tuple(expected))
    assert np.shares_memory(result[0], found[0])


@pytest.mark.slow
def test_in_a_parallel_loop():
    @njit(parallel=True)
    def each(x, gamma):
        y, rstd = np.empty_like(x), np.empty((x.shape[0], x.shape[2]))
        for i in prange(x.shape[0]):
            result = nbnorm.batch_norm_forward(x[i], gamma)
            y[i], rstd[i] = result.y, result.rstd
        return y, rstd

    rng = np.random.default_rng(0)
    x, gamma = rng.standard_normal((30, 9, 5)).astype("f4"), np.ones(5, "f4")
    y, rstd = each(x, gamma)
    for i in range(len(x)):
        expected = nbnorm.batch_norm_forward(x[i], gamma)
        same((y[i], rstd[i]), (expected.y, expected.rstd))


# In child processes: which function compiles first must not matter.

STREAMED = """
import numpy as np, nbnorm
from numba import njit
from nbnorm.cpu import overloads

overloads._LAST = 1 << 12

def calls(x, dy, gamma):
    y, mean, rstd = nbnorm.batch_norm_forward(x, gamma)
    dx, dgamma, dbeta, _ = nbnorm.batch_norm_backward(dy, x, gamma, mean, rstd)
    return y, mean, rstd, dx, dgamma, dbeta

rng = np.random.default_rng(0)
x, dy = rng.standard_normal((2, 5, 7, 401)).astype("f4")
gamma = rng.standard_normal(x.shape[1]).astype("f4")
for one, other in zip(njit(calls)(x, dy, gamma), calls(x, dy, gamma), strict=True):
    assert one.tobytes() == other.tobytes()
"""


FAST = """
import numpy as np, nbnorm
from numba import njit

@njit(fastmath=True)
def forward(x):
    return nbnorm.batch_norm_forward(x)

x = np.random.default_rng(0).standard_normal((70, 30)).astype("f4")
x[0, :2] = 1e4, np.inf
for one, other in zip(forward(x), nbnorm.batch_norm_forward(x), strict=True):
    assert one.tobytes() == other.tobytes()
(code,) = forward.inspect_llvm().values()
assert " fadd " in code and " fadd fast " not in code
"""


@pytest.mark.slow
def test_fastmath_of_the_caller_changes_nothing():
    run_child("-c", FAST)


@pytest.mark.slow
def test_results_stored_past_the_cache_have_the_same_bits():
    run_child("-c", STREAMED)


CACHED = """
import numpy as np, nbnorm
from numba import njit

@njit(cache=True)
def step(x, gamma):
    forward = nbnorm.batch_norm_forward(x, gamma)
    return forward, nbnorm.batch_norm_backward(forward.y, x, gamma, forward.mean, forward.rstd)
"""
USE = """
import sys
sys.path.insert(0, sys.argv[1])
from cached import *
x, gamma = np.random.default_rng(0).standard_normal((9, 5)), np.ones(5)
forward, backward = step(x, gamma)
expected, gradients = step.py_func(x, gamma)
for one, other in zip((*forward, *backward[:3]), (*expected, *gradients[:3]), strict=True):
    assert one.tobytes() == other.tobytes()
assert type(forward) is nbnorm.BatchNormForward
print(sum(step.stats.cache_hits.values()))
"""


@pytest.mark.slow
def test_compiled_functions_can_be_cached(tmp_path):
    (tmp_path / "cached.py").write_text(CACHED)
    hits = [run_child("-c", USE, str(tmp_path), NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    assert hits == ["0\n", "1\n"]


# Errors at run time: a ValueError, before anything is written.

SHAPE = (4, 3)


@njit
def train(x, gamma, beta, running_mean, running_var, momentum, eps, correction):
    return nbnorm.batch_norm_forward(
        x, gamma, beta, running_mean, running_var,
        momentum=momentum, eps=eps, correction=correction,
    )  # fmt: skip


def good():
    rng = np.random.default_rng(0)
    x, gamma, beta = rng.standard_normal(SHAPE), np.ones(3), np.zeros(3)
    return {
        "x": x,
        "gamma": gamma,
        "beta": beta,
        "running_mean": np.zeros(3),
        "running_var": np.ones(3),
        "momentum": 0.1,
        "eps": 1e-5,
        "correction": 1.0,
    }


def refused(function, args, message):
    """Assert that a call raises and leaves its arrays unchanged."""
    before = copies(args.values())
    with pytest.raises(ValueError, match=message):
        function(*args.values())
    for one, other in zip(args.values(), before, strict=True):
        same(one, other)


@pytest.mark.parametrize("name", ["gamma", "beta", "running_mean", "running_var"])
def test_parameters_of_another_size(name):
    refused(train, good() | {name: np.ones(4)}, f"{name} must have one value for every channel")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *(("eps", value, "eps must be finite and not negative") for value in (-1e-5, np.nan)),
        ("eps", np.inf, "eps must be finite and not negative"),
        ("momentum", np.nan, "momentum must be finite"),
        ("momentum", -np.inf, "momentum must be finite"),
        ("correction", np.nan, "correction must be finite"),
        ("correction", 4.0, "more values per channel"),
    ],
)
def test_numbers_that_do_not_fit(name, value, message):
    with pytest.raises(ValueError):
        nbnorm.batch_norm_forward(**(good() | {name: value}))
    refused(train, good() | {name: value}, message)


def test_running_statistics_that_share_memory():
    args = good()
    whole = np.ones(6)
    for other in ("running_var", "gamma", "beta"):
        shared = {"running_mean": whole[:3], other: whole[2:5]}
        refused(train, args | shared, "share memory")
    refused(train, args | {"running_var": args["x"][1]}, "share memory")
    # An empty array shares no memory, and adjacent arrays do not overlap.
    inside = np.ndarray((0, 3), buffer=whole, offset=16)
    train(*(args | {"running_mean": whole[:3], "x": inside}).values())
    assert np.array_equal(whole, np.ones(6))
    apart = args | {"running_mean": whole[:3], "running_var": whole[3:]}
    train(*apart.values())
    assert not np.array_equal(whole, np.ones(6))


@njit
def given_statistics(x, gamma, beta, mean, var):
    return nbnorm.batch_norm_inference(x, gamma, beta, mean, var, eps=1.0)


@njit
def applied(x, gamma, beta, mean, rstd):
    return nbnorm.batch_norm_apply(x, gamma, beta, mean, rstd)


@njit
def backward(dy, x, gamma, mean, rstd):
    return nbnorm.batch_norm_backward(dy, x, gamma, mean, rstd)


@njit
def reduced(dy, x, mean, rstd):
    return nbnorm.batch_norm_backward_reduce(dy, x, mean, rstd)


@njit
def differentiated(dy, x, mean, rstd, sum_dy, sum_dy_xhat, count):
    return nbnorm.batch_norm_backward_apply(dy, x, None, mean, rstd, sum_dy, sum_dy_xhat, count)


@njit
def updated(running_mean, running_var, count, mean, m2, momentum, correction):
    moments = nbnorm.Moments(count, mean, m2)
    return nbnorm.update_running_stats(
        running_mean, running_var, moments, momentum=momentum, correction=correction
    )


X, OF_CHANNELS = np.zeros(SHAPE), np.ones(3)
OTHERS = {
    given_statistics: dict.fromkeys(["x", "gamma", "beta", "mean", "var"]),
    applied: dict.fromkeys(["x", "gamma", "beta", "mean", "rstd"]),
    backward: dict.fromkeys(["dy", "x", "gamma", "mean", "rstd"]),
    reduced: dict.fromkeys(["dy", "x", "mean", "rstd"]),
    differentiated: dict.fromkeys(["dy", "x", "mean", "rstd", "sum_dy", "sum_dy_xhat"]),
}


@pytest.mark.parametrize("function", OTHERS)
def test_arrays_of_another_size(function):
    args = {name: X if name in ("x", "dy") else OF_CHANNELS for name in OTHERS[function]}
    if function is differentiated:
        args["count"] = 4
    function(*args.values())
    for name in OTHERS[function]:
        if name == "dy":
            refused(function, args | {"dy": np.zeros((3, 4))}, "dy must have the shape of x")
            refused(function, args | {"dy": np.zeros((5, 3))}, "dy must have the shape of x")
        elif name != "x":
            refused(
                function, args | {name: np.ones(2)},
                rf"{name}.* must have one value for every channel of x",
            )  # fmt: skip


def test_counts_that_are_not_positive():
    args = {
        "dy": X,
        "x": X,
        "mean": OF_CHANNELS,
        "rstd": OF_CHANNELS,
        "a": OF_CHANNELS,
        "b": OF_CHANNELS,
    }
    refused(differentiated, args | {"count": 0}, "count must be positive")
    empty = {"dy": X[:0], "x": X[:0]}
    assert differentiated(*(args | empty | {"count": 0}).values()).shape == (0, 3)
    refused(differentiated, args | empty | {"count": -1}, "count must be positive")


def test_updates_that_do_not_fit():
    args = {
        "running_mean": np.zeros(3),
        "running_var": np.ones(3),
        "count": 4,
        "mean": np.ones(3),
        "m2": np.ones(3),
        "momentum": 0.1,
        "correction": 1.0,
    }
    for change, message in (
        ({"running_mean": np.ones(2)}, "must have the shape of the moments"),
        ({"running_var": np.ones(2)}, "must have the shape of the moments"),
        ({"m2": np.ones(2)}, "moments.m2 must have the shape of moments.mean"),
        ({"count": -1}, "count must not be negative"),
        ({"count": 1}, "more values per channel"),
        ({"momentum": np.inf}, "momentum must be finite"),
        ({"correction": np.nan}, "correction must be finite"),
        ({"running_mean": args["mean"]}, "share memory"),
        ({"running_var": args["m2"]}, "share memory"),
        ({"running_mean": args["running_var"]}, "share memory"),
    ):
        refused(updated, args | change, message)
    before = copies(args.values())
    updated(*(args | {"count": 0}).values())
    same(args["running_mean"], before[0])
    updated(*args.values())
    assert not np.array_equal(args["running_mean"], before[0])


# Errors at compile time.


IMAGES = np.zeros((2, 3, 4, 4), "f4")


def gamma_or_none(x):
    gamma = None
    for _ in range(x.size):  # Python 3.13 splits a branch into two calls, each with its own type
        gamma = x[0, 0, 0]
    return nbnorm.batch_norm_forward(x, gamma)


@pytest.mark.parametrize(
    ("function", "x", "message"),
    [
        (lambda x: nbnorm.batch_norm_forward(x, residual=x), IMAGES, "residual is not supported"),
        (lambda x: nbnorm.batch_norm_forward(x, out=x), IMAGES, "out is not supported"),
        (
            lambda x: nbnorm.batch_norm_forward(x, activation="gelu"),
            IMAGES,
            "activation must be None or 'relu'",
        ),
        (lambda x: nbnorm.batch_norm_forward(x, axis=2), IMAGES, "axis must be 1 or -1"),
        (lambda x: nbnorm.batch_norm_forward(x, axis=(1,)), IMAGES, "axis must be 1 or -1"),
        (lambda x: nbnorm.batch_norm_forward(x, axis=x.ndim - 1), IMAGES, "axis must be 1 or -1"),
        (lambda x: nbnorm.batch_norm_forward(x, eps="1"), IMAGES, "eps must be a real number"),
        (lambda x: nbnorm.batch_norm_forward(x, training=1), IMAGES, "training must be a bool"),
        (
            lambda x: nbnorm.batch_norm_forward(x, training=False),
            IMAGES,
            "running_mean and running_var must not be None",
        ),
        (
            lambda x: nbnorm.batch_norm_forward(x, None, None, x[0, 0, 0]),
            IMAGES,
            "running_var is None; pass both",
        ),
        (lambda x: nbnorm.batch_norm_forward(x, x), IMAGES, "gamma must have one axis"),
        (lambda x: nbnorm.batch_norm_forward(x, 1.0), IMAGES, "gamma must be an array"),
        (lambda x: nbnorm.batch_norm_forward(x[::2]), IMAGES, r"np.ascontiguousarray\(x\)"),
        (
            lambda x: nbnorm.batch_norm_forward(x, x[0, :, 0, 0]),
            IMAGES,
            r"np.ascontiguousarray\(gamma\)",
        ),
        (lambda x: nbnorm.batch_norm_forward(x), IMAGES.astype("f2"), "x must be an array"),
        (lambda x: nbnorm.batch_norm_forward(x), IMAGES.astype("i4"), "x must be an array"),
        (lambda x: nbnorm.batch_norm_forward(x), IMAGES[0, 0, 0], "x must have 2 to 5 axes"),
        (
            lambda x: nbnorm.batch_norm_forward(x),
            np.zeros((2, 1, 1, 1, 1, 1)),
            "x must have 2 to 5 axes",
        ),
        (
            gamma_or_none,
            IMAGES,
            "gamma has an optional type",
        ),
        (
            lambda x: nbnorm.batch_norm_inference(x, None, None, None, x[0, 0, 0]),
            IMAGES,
            "mean must be an array",
        ),
        (
            lambda x: nbnorm.batch_norm_backward(x, x, None, x[0, 0, 0], x[0, 0, 0], y=x),
            IMAGES,
            "y is not supported",
        ),
        (
            lambda x: nbnorm.batch_norm_backward(
                x, x, None, x[0, 0, 0], x[0, 0, 0], output_mask=(True, True, True, True)
            ),
            IMAGES,
            "output_mask is not supported",
        ),
        (
            lambda x: nbnorm.batch_norm_backward(
                x, x, None, x[0, 0, 0], x[0, 0, 0], activation="relu"
            ),
            IMAGES,
            "beta is not given",
        ),
        (
            lambda x: nbnorm.batch_norm_backward_reduce(
                x, x, x[0, 0, 0], x[0, 0, 0], beta=None, activation="relu"
            ),
            IMAGES,
            "gamma is not given",
        ),
        (
            lambda x: nbnorm.batch_norm_backward(x[0], x, None, x[0, 0, 0], x[0, 0, 0]),
            IMAGES,
            "dy must have 4 axes",
        ),
        (
            lambda x: nbnorm.batch_norm_backward(
                x.astype(np.float64), x, None, x[0, 0, 0], x[0, 0, 0]
            ),
            IMAGES,
            "dy has dtype float64",
        ),
        (
            lambda x: nbnorm.batch_norm_backward_apply(
                x, x, None, x[0, 0, 0], x[0, 0, 0], x[0, 0, 0], x[0, 0, 0], 1.5
            ),
            IMAGES,
            "count must be an int",
        ),
        (
            lambda x: nbnorm.update_running_stats(x[0, 0, 0], x[0, 0, 1], (1, x, x)),
            IMAGES,
            "moments must be nbnorm.Moments",
        ),
        (
            lambda x: nbnorm.update_running_stats(
                x[0, 0, 0], x[0, 0, 1], nbnorm.batch_norm_stats(x[0, 0]), inplace=False
            ),
            IMAGES,
            "inplace must be True",
        ),
    ],
)
def test_refused_when_compiled(function, x, message):
    with pytest.raises(TypingError, match=message):
        njit(function)(x)


def test_running_statistics_that_are_read_only():
    frozen = np.ones(3)
    frozen.flags.writeable = False

    def function(x, mean, var):
        return nbnorm.batch_norm_forward(x, None, None, mean, var)

    with pytest.raises(TypingError, match="running_mean is read-only"):
        njit(function)(np.zeros(SHAPE), frozen, np.ones(3))

    @njit
    def inference(x, mean, var):
        return nbnorm.batch_norm_forward(x, None, None, mean, var, training=False)

    x = np.ones(SHAPE)
    same(inference(x, frozen, np.ones(3)), inference.py_func(x, frozen, np.ones(3)))


def test_an_axis_that_is_known_when_it_runs():
    with pytest.raises(TypingError, match="axis must be 1 or -1, written out"):
        njit(lambda x, axis: nbnorm.batch_norm_forward(x, axis=axis))(IMAGES, 1)


def test_an_activation_that_is_known_when_it_runs():
    with pytest.raises(TypingError, match="activation must be None or 'relu', written out"):
        njit(lambda x, name: nbnorm.batch_norm_forward(x, activation=name))(IMAGES, "relu")


# Discovery by Numba


def test_the_entry_point_is_there():
    with (Path(__file__).parents[1] / "pyproject.toml").open("rb") as file:
        found = tomllib.load(file)["project"]["entry-points"]["numba_extensions"]
    assert list(found) == ["init"]  # the name that Numba looks up
    EntryPoint("init", found["init"], "numba_extensions").load()()


def test_the_plan_is_the_same_in_compiled_code():
    compiled = njit(lambda *args: serial(*args))
    rng = np.random.default_rng(0)
    for N, C, S in (2 ** rng.uniform(0, 14, (500, 3))).astype(int).tolist():
        for itemsize, own in ((4, 1 << 20), (8, 1 << 15)):
            for tensors, streamed in ((2, False), (3, True)):
                args = N, C, S, itemsize, tensors, own, streamed
                assert compiled(*args) == serial(*args)
