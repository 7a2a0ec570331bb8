"""Call every public function with random wrong arguments, in a child process: it must not crash.

Numba does not check bounds, so a kernel given a wrong length reads and writes other memory. The
child surrounds every array with a margin of known bytes, calls a function, and expects TypeError or
ValueError; if a draw happens to be valid, it compares the result with the oracle.

Run as a script, this file is the child; its arguments are the seed and the number of calls.
"""

import inspect
import math
import sys

import numpy as np
import pytest
from children import run_child

import nbnorm
from nbnorm import Moments, reference

pytestmark = pytest.mark.slow

MARGIN = 64
MARK = 0xA5
WRITTEN = ("out", "running_mean", "running_var")
FUNCTIONS = sorted(
    name
    for name in nbnorm.__all__
    if inspect.isfunction(getattr(nbnorm, name))
    and name not in ("show_config", "set_pool_limit", "warmup", "population_stats", "recalibrate")
    and name != "activation"  # takes no arrays
)


class Canaries:
    """Arrays between margins that must keep their bytes."""

    def __init__(self):
        self.memories = []

    def array(self, values):
        """Copy values to memory with a margin on both sides."""
        memory = np.full(values.nbytes + 2 * MARGIN, MARK, np.uint8)
        array = memory[MARGIN : MARGIN + values.nbytes].view(values.dtype).reshape(values.shape)
        array[...] = values
        self.memories.append((memory, values.nbytes))
        return array

    def check(self):
        """Fail if a margin was written to."""
        for memory, size in self.memories:
            assert (memory[:MARGIN] == MARK).all(), "wrote before the start of an array"
            assert (memory[MARGIN + size :] == MARK).all(), "wrote past the end of an array"


def valid_arguments(function, rng, keep):
    """Return valid arguments for a small input, with a margin around each array."""
    ndim = int(rng.integers(2, 5))
    shape = tuple(int(n) for n in rng.integers(1, 9, ndim))
    axis = int(rng.integers(-ndim, ndim))
    channels = (shape[axis],)

    def large():
        return keep(rng.normal(size=shape).astype("float32"))

    def small():
        return keep(rng.uniform(0.5, 2, channels).astype("float32"))

    statistics = {"mean": small(), "rstd": small()}
    moments = Moments(9, rng.normal(size=channels), rng.uniform(0.5, 2, channels))
    activation = [None, "relu"][rng.integers(2)]
    common = {"gamma": small(), "beta": small(), "axis": axis, "activation": activation}
    running = {"running_mean": small(), "running_var": small()}
    gradient = {"dy": large(), "x": large(), **statistics, "y": large()}
    kernel = tuple(int(n) for n in rng.integers(1, 4, rng.integers(1, 4)))
    fold = {"gamma": small(), "beta": small(), "mean": small(), "var": small()}
    out = {"out": large()} if rng.random() < 0.5 else {}
    return {
        "batch_norm_forward": {"x": large(), "residual": large(), **common, **running, **out},
        "batch_norm_inference": {
            "x": large(),
            "mean": small(),
            "var": small(),
            "residual": large(),
            **common,
            **out,
        },
        "batch_norm_apply": {"x": large(), **statistics, "residual": large(), **common, **out},
        "batch_norm_stats": {"x": large(), "axis": axis},
        "batch_norm_backward": {**gradient, **common, **out},
        "batch_norm_backward_reduce": {**gradient, **common},
        "batch_norm_backward_apply": {
            **gradient,
            **common,
            "sum_dy": small(),
            "sum_dy_xhat": small(),
            "count": 9,
            **out,
        },
        "micro_batch_norm_forward": {"x": large(), "part": large(), **common, **running},
        "micro_batch_norm_backward": {
            **{name: large() for name in ("dy", "x", "dy_part", "part")},
            **statistics,
            **common,
            "count": 2 * math.prod(shape) // shape[axis],
        },
        "batch_renorm_forward": {"x": large(), "residual": large(), **common, **running, **out},
        "batch_renorm_backward": {**gradient, **common, "r": small(), "d": small(), **out},
        "batch_norm_double_backward": {
            "ddx": large(),
            "ddgamma": small(),
            "ddbeta": small(),
            "gamma": small(),
            "dy": large(),
            "x": large(),
            "axis": axis,
            **statistics,
        },
        "batch_norm_jvp": {
            "tx": large(),
            "tgamma": small(),
            "tbeta": small(),
            "gamma": small(),
            "x": large(),
            "axis": axis,
            **statistics,
        },
        "batch_norm_backward_statistics": {
            "sum_dy": small(),
            "sum_dy_xhat": small(),
            "gamma": small(),
            "rstd": small(),
        },
        "update_running_stats": {**running, "moments": moments},
        "fold_batch_norm": fold,
        "fold_into_linear": {
            "weight": keep(rng.normal(size=(*channels, 3))),
            "bias": small(),
            **fold,
        },
        "fold_into_conv": {
            "weight": keep(rng.normal(size=(*channels, 3, *kernel))),
            "bias": small(),
            **fold,
        },
    }[function]


def spoil_array(name, array, rng, keep, *, beside_x):
    """Return a replacement for an array, usually a wrong one."""
    shape = list(array.shape) or [1]
    which = int(rng.integers(len(shape)))
    kind = int(rng.integers(14))
    if kind == 9 and not beside_x:  # for x this would be valid, but larger than memory
        kind = 8
    if kind == 8 and name in WRITTEN:  # if elements share memory, the last write wins
        kind = 11
    if kind == 0:
        shape[which] += int(rng.choice([-1, 1, 7, 1000]))
        return keep(np.ones([max(0, n) for n in shape], array.dtype))
    if kind == 1:
        shape[which] = 0
        return keep(np.ones(shape, array.dtype))
    if kind == 2:
        return keep(np.ones(rng.permutation(shape), array.dtype))
    if kind == 3:
        shape.insert(which, 1)
        return array.reshape(shape) if array.size else array
    if kind == 4:
        return keep(np.ones(array.size, array.dtype))
    if kind == 5:
        return np.ones((), array.dtype)
    if kind == 6:
        names = ["float16", "float32", "float64", "int8", "int64", "bool", "complex64", ">f4", "U3"]
        return np.ones(array.shape, str(rng.choice(names)))
    if kind == 7:
        return array[(slice(None, None, -1),) * array.ndim]
    if kind == 8:
        return np.lib.stride_tricks.as_strided(array, array.shape, [0] * array.ndim)
    if kind == 9:
        huge = [2**40, *shape[1:]]
        return np.broadcast_to(np.ones([1] * len(huge), array.dtype), huge)
    if kind == 10:
        memory = keep(np.ones(array.nbytes + 1, np.uint8))
        return memory[1:].view(array.dtype).reshape(array.shape)
    if kind == 11:
        view = array.view()
        view.flags.writeable = False
        return view
    if kind == 12:
        return np.ones(array.shape, [("a", array.dtype), ("b", "i4")])
    things = [None, 1, 2.5, "x", [], [1.0], (), {}, object(), np.float32(1), slice(None), len]
    return things[rng.integers(len(things))]


def spoil_option(name, rng):
    """Return a replacement for an option."""
    choices = {
        "axis": [0, 1, -1, 5, -9, (0, 0), (0, 1), (), (0, 1, 2, 3), None, 1.5, "1", 2**70],
        "activation": [None, "relu", "tanh", 0, object()],
        "count": [0, 1, -1, 2**70, None, 1.5],
        "moments": [None, (1, 2, 3), Moments(0, np.zeros(2), np.zeros(2)), Moments(3, None, None)],
    }[name]
    return choices[rng.integers(len(choices))]


def extra_options(function, rng):
    """Return valid and wrong values of other options."""
    eps = [0.0, 1e-5, -1.0, np.nan, np.inf, None, "x"]
    choices = {
        "batch_norm_forward": {
            "eps": eps,
            "correction": [0, 1, 2, 10**9],
            "training": [True, False],
        },
        "batch_norm_inference": {"eps": eps},
        "batch_norm_backward": {
            "output_mask": [(True,) * 3, (False,) * 4, (True, False, True, False), None, 3],
            "training": [True, False],
        },
        "batch_renorm_forward": {
            "eps": eps,
            "r_max": [1.0, 3.0, np.inf, 0.5, np.nan, None],
            "d_max": [0.0, 5.0, np.inf, -1.0, np.nan, None],
        },
        "update_running_stats": {
            "correction": [0, 1, 2, 10**9],
            "inplace": [True, False],
            "num_batches_tracked": [None, 0, 3, -1, 0.5],
        },
        "fold_into_conv": {"groups": [1, 0, 2, 3, -1, None], "transposed": [True, False]},
    }.get(function, {})
    return {name: c[rng.integers(len(c))] for name, c in choices.items() if rng.random() < 0.3}


# Micro-batches: calls with two parts. The oracle takes all parts as rows of one array.


def micro_forward(x, part, *, axis, **options):
    """Return all of y as rows, mean, rstd and the count."""
    ys, *saved = nbnorm.micro_batch_norm_forward([x, part], axis=axis, **options)
    return all_rows(list(ys), axis), *saved


def micro_backward(dy, x, dy_part, part, *, axis, **options):
    """Return all of dx as rows, dgamma and dbeta."""
    dxs, *sums = nbnorm.micro_batch_norm_backward([dy, dy_part], [x, part], axis=axis, **options)
    return all_rows(list(dxs), axis), *sums


def reference_forward(x, part, *, axis, **options):
    x = all_rows([x, part], axis)
    axes = tuple(range(1, x.ndim))
    return *reference.batch_norm_forward(x, axis=axes, **options), len(x)


def reference_backward(dy, x, dy_part, part, *, axis, count, **options):
    dy, x = all_rows([dy, dy_part], axis), all_rows([x, part], axis)
    assert count == len(x), f"{count} was accepted for {len(x)} values per channel"
    return reference.batch_norm_backward(dy, x, axis=tuple(range(1, x.ndim)), **options)[:3]


def all_rows(parts, axis):
    """Return an array (m, *channel shape) of the values of all parts."""
    rows = []
    for part in parts:
        axes = np.atleast_1d(axis) % part.ndim
        moved = np.moveaxis(part, axes, range(-len(axes), 0))
        rows.append(moved.reshape(-1, *(part.shape[a] for a in axes)))
    return np.concatenate(rows)


OURS = {"micro_batch_norm_forward": micro_forward, "micro_batch_norm_backward": micro_backward}
ORACLES = {
    "micro_batch_norm_forward": reference_forward,
    "micro_batch_norm_backward": reference_backward,
}


def one_call(rng):
    """Spoil one to three arguments of a random function and call it; return whether it raised."""
    canaries = Canaries()
    function = str(rng.choice(FUNCTIONS))
    arguments = valid_arguments(function, rng, canaries.array)
    for name in rng.permutation(list(arguments))[: rng.integers(0, 4)]:
        value = arguments[name]
        if isinstance(value, np.ndarray):
            beside_x = "x" in arguments and name not in ("x", "part")
            arguments[name] = spoil_array(name, value, rng, canaries.array, beside_x=beside_x)
        elif name in ("axis", "activation", "count", "moments"):
            arguments[name] = spoil_option(name, rng)
    arguments |= extra_options(function, rng)
    pristine = {
        name: np.copy(value) if isinstance(value, np.ndarray) and value.size < 10**7 else value
        for name, value in arguments.items()
        if name != "out"
    }
    try:
        result = OURS.get(function, getattr(nbnorm, function))(**arguments)
    except (TypeError, ValueError):
        return True
    finally:
        canaries.check()
    with np.errstate(all="ignore"):
        expected = ORACLES.get(function) or getattr(reference, function)
        expected = expected(**pristine)
    compare(result, expected, f"{function} {describe(arguments)}")
    return False


def describe(arguments):
    """Return arguments with arrays as dtype, shape and strides."""
    return {
        name: (str(a.dtype), a.shape, a.strides) if isinstance(a, np.ndarray) else a
        for name, a in arguments.items()
    }


def compare(result, expected, call):
    """Compare with the oracle loosely: other tests check accuracy."""
    if result is None or expected is None:
        assert (result is None) == (expected is None), call
    elif isinstance(result, tuple):
        assert len(result) == len(expected), call
        for ours, theirs in zip(result, expected, strict=True):
            compare(ours, theirs, call)
    else:
        ours, theirs = np.asarray(result), np.asarray(expected)
        assert ours.shape == theirs.shape, call
        theirs = theirs.astype(np.float64)
        size = np.max(np.abs(theirs), initial=1e-30, where=np.isfinite(theirs))
        np.testing.assert_allclose(ours, theirs, rtol=1e-2, atol=1e-2 * size, err_msg=call)


@pytest.mark.parametrize("seed", range(2))
def test_random_arguments_never_crash(seed):
    calls = 1500
    refused, done = map(int, run_child(__file__, str(seed), str(calls)).split())
    # If nearly all calls were valid, or nearly all rejected, the test would show little.
    assert done == calls
    assert 0.3 < refused / done < 0.95


if __name__ == "__main__":
    seed, calls = map(int, sys.argv[1:])
    refusals = 0
    for call in range(calls):
        try:
            refusals += one_call(np.random.default_rng([seed, call]))
        except BaseException:
            print(f"seed {seed}, call {call}", file=sys.stderr, flush=True)
            raise
    print(refusals, calls)
