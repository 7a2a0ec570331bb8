"""Every public function on arrays of array-api-strict, which implement only the standard.

A matrix of functions, channel axes, dtypes, devices and layouts. Results are array-api-strict's
arrays on the device of the arguments, with the same bits as results for NumPy arrays; arguments
that a function does not write keep their bits. The strictest flags are set: no boolean indexing,
no data-dependent shapes, no extensions.
"""

import math

import numpy as np
import pytest
from tolerances import assert_same_bits

import nbnorm
from nbnorm import BatchNorm, Moments

xp = pytest.importorskip("array_api_strict", reason="the standard's arrays need array-api-strict")

pytestmark = [pytest.mark.cpu_only, pytest.mark.slow]

INFO = xp.__array_namespace_info__()
DEVICES = INFO.devices()
AXES = {1: (4, 6, 5), -1: (4, 5, 6), (1, 2): (4, 2, 3)}  # channel axes, and shapes with 6 channels


@pytest.fixture(autouse=True)
def _strictest():
    with xp.ArrayAPIStrictFlags(
        boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=()
    ):
        yield


# Memory layouts: functions of the shape to start from, and of the array of that shape. Layouts use
# operations of the standard only.
LAYOUTS = {
    "contiguous": (lambda shape: shape, lambda lib, a: a),
    "permuted": (lambda shape: shape[::-1], lambda lib, a: lib.permute_dims(a, (2, 1, 0))),
    "flipped": (lambda shape: shape, lambda lib, a: lib.flip(a, axis=0)),
    "sliced": (lambda shape: (2 * shape[0], *shape[1:]), lambda lib, a: a[::2, ...]),
    "empty": (lambda shape: shape, lambda lib, a: a[:0, ...]),
}


def arguments(axis, dtype, statistic, layout="contiguous"):
    """Return all arrays by name, and the function that lays out those that are like x."""
    rng = np.random.default_rng(5)
    start, laid_out = LAYOUTS[layout]
    like_x = {
        name: rng.normal(size=start(AXES[axis])).astype(dtype)
        for name in ("x", "dy", "residual", "y", "out")
    }
    channels = tuple(AXES[axis][a] for a in np.atleast_1d(axis))
    dtypes = {
        **dict.fromkeys(("gamma", "beta", "running_mean", "running_var"), dtype),
        **dict.fromkeys(("mean", "rstd", "m2", "sum_dy", "sum_dy_xhat"), statistic),
    }
    per_channel = {
        name: (rng.normal(size=channels) ** 2 + 0.5).astype(kind) for name, kind in dtypes.items()
    }
    weights = {"linear": (6, 4), "kernel": (6, 2, 3), "transposed": (4, 3, 3)}
    weights = {name: rng.normal(size=shape).astype(dtype) for name, shape in weights.items()}
    return like_x, {**per_channel, **weights}, laid_out


def moments(a, count=20):
    return Moments(count, a["mean"], a["m2"])


def layer(a, axis):
    """Load a state, then run a training step and an evaluation."""
    features = tuple(a["gamma"].shape)
    made = BatchNorm(
        features if isinstance(axis, tuple) else features[0],
        axis=axis,
        activation="relu",
        dtype=np.from_dlpack(a["gamma"]).dtype,
    )
    state = {"weight": a["gamma"], "bias": a["beta"]}
    state |= {name: a[name] for name in ("running_mean", "running_var")}
    made.load_state_dict({**state, "num_batches_tracked": 2})
    y = made.forward(a["x"], a["residual"])
    gradients = made.backward(a["dy"])
    return y, gradients, made.grads["weight"], made.grads["bias"], made.eval().forward(a["x"])


def recalibrated(a, axis):
    """Evaluate x with the statistics of two batches, unless they are empty."""
    features = tuple(a["gamma"].shape)
    made = BatchNorm(features if isinstance(axis, tuple) else features[0], axis=axis)
    if a["x"].shape[0]:
        with nbnorm.recalibrate(made):
            made.forward(a["x"]), made.forward(a["dy"])
    return made.eval().forward(a["x"])


def micro_forward(a, axis):
    """Normalise two parts and update the running statistics."""
    ys, *saved = nbnorm.micro_batch_norm_forward(
        [a["x"], a["dy"]],
        *(a["gamma"], a["beta"], a["running_mean"], a["running_var"]),
        activation="relu",
        axis=axis,
    )
    return tuple(ys), *saved


def micro_backward(a, axis):
    """Differentiate two parts."""
    count = sum(math.prod(a[name].shape) for name in ("x", "y")) // math.prod(a["gamma"].shape)
    dxs, *sums = nbnorm.micro_batch_norm_backward(
        [a["dy"], a["residual"]],
        *([a["x"], a["y"]], a["gamma"], a["mean"], a["rstd"], count),
        beta=a["beta"],
        activation="relu",
        axis=axis,
    )
    return tuple(dxs), *sums


# Calls by name, as functions of {name: array} and the axis.
CASES = {
    "batch_norm_forward": lambda a, axis: nbnorm.batch_norm_forward(
        a["x"], a["gamma"], a["beta"], axis=axis
    ),
    "batch_norm_forward, fused": lambda a, axis: nbnorm.batch_norm_forward(
        *(a["x"], a["gamma"], a["beta"], a["running_mean"], a["running_var"]),
        residual=a["residual"],
        activation="relu",
        out=a["out"],
        axis=axis,
    ),
    "batch_norm_forward, evaluation": lambda a, axis: nbnorm.batch_norm_forward(
        a["x"], None, a["beta"], a["running_mean"], a["running_var"], training=False, axis=axis
    ),
    "batch_norm_inference": lambda a, axis: nbnorm.batch_norm_inference(
        a["x"], a["gamma"], a["beta"], a["mean"], a["m2"], axis=axis
    ),
    "batch_norm_apply": lambda a, axis: nbnorm.batch_norm_apply(
        a["x"], a["gamma"], a["beta"], a["mean"], a["rstd"], residual=a["residual"], axis=axis
    ),
    "batch_norm_stats": lambda a, axis: nbnorm.batch_norm_stats(a["x"], axis=axis),
    "batch_norm_backward": lambda a, axis: nbnorm.batch_norm_backward(
        a["dy"], a["x"], a["gamma"], a["mean"], a["rstd"], axis=axis
    ),
    "batch_norm_backward, fused": lambda a, axis: nbnorm.batch_norm_backward(
        *(a["dy"], a["x"], a["gamma"], a["mean"], a["rstd"]),
        y=a["y"],
        activation="relu",
        out=a["out"],
        axis=axis,
    ),
    "batch_norm_backward, evaluation": lambda a, axis: nbnorm.batch_norm_backward(
        *(a["dy"], a["x"], None, a["mean"], a["rstd"]),
        training=False,
        output_mask=(True, False, True, False),
        axis=axis,
    ),
    "batch_norm_backward_reduce": lambda a, axis: nbnorm.batch_norm_backward_reduce(
        *(a["dy"], a["x"], a["mean"], a["rstd"]),
        gamma=a["gamma"],
        beta=a["beta"],
        activation="relu",
        axis=axis,
    ),
    "batch_norm_backward_apply": lambda a, axis: nbnorm.batch_norm_backward_apply(
        *(a["dy"], a["x"], a["gamma"], a["mean"], a["rstd"], a["sum_dy"], a["sum_dy_xhat"], 20),
        axis=axis,
    ),
    "micro_batch_norm_forward": micro_forward,
    "micro_batch_norm_backward": micro_backward,
    "batch_renorm_forward": lambda a, axis: nbnorm.batch_renorm_forward(
        *(a["x"], a["gamma"], a["beta"], a["running_mean"], a["running_var"]),
        axis=axis,
    ),
    "batch_renorm_backward": lambda a, axis: nbnorm.batch_renorm_backward(
        *(a["dy"], a["x"], a["gamma"], a["mean"], a["rstd"], a["rstd"], a["mean"]),
        axis=axis,
    ),
    "batch_norm_double_backward": lambda a, axis: nbnorm.batch_norm_double_backward(
        *(a["dy"], a["beta"], a["gamma"], a["y"], a["x"], a["gamma"], a["mean"], a["rstd"]),
        axis=axis,
    ),
    "batch_norm_jvp": lambda a, axis: nbnorm.batch_norm_jvp(
        *(a["dy"], a["beta"], a["gamma"], a["x"], a["gamma"], a["mean"], a["rstd"]), axis=axis
    ),
    "batch_norm_backward_statistics": lambda a, axis: nbnorm.batch_norm_backward_statistics(
        a["sum_dy"], a["sum_dy_xhat"], a["gamma"], a["rstd"]
    ),
    "Moments": lambda a, axis: (
        moments(a).merge(moments(a, 7), Moments(3, a["rstd"], a["m2"])),
        moments(a).var(correction=1),
        moments(a).rstd(1e-5),
    ),
    "update_running_stats": lambda a, axis: nbnorm.update_running_stats(
        a["running_mean"], a["running_var"], moments(a)
    ),
    "update_running_stats, not in place": lambda a, axis: nbnorm.update_running_stats(
        a["running_mean"], a["running_var"], moments(a), inplace=False
    ),
    "fold_batch_norm": lambda a, axis: nbnorm.fold_batch_norm(
        a["gamma"], a["beta"], a["mean"], a["m2"]
    ),
    "fold_into_linear": lambda a, axis: nbnorm.fold_into_linear(
        a["linear"], None, a["gamma"], a["beta"], a["mean"], a["m2"]
    ),
    "fold_into_conv": lambda a, axis: nbnorm.fold_into_conv(
        a["kernel"], a["beta"], a["gamma"], a["beta"], a["mean"], a["m2"], groups=2
    ),
    "fold_into_conv, transposed": lambda a, axis: nbnorm.fold_into_conv(
        *(a["transposed"], None, a["gamma"], None, a["mean"], a["m2"]),
        groups=2,
        transposed=True,
    ),
    "BatchNorm": layer,
    "population_stats": lambda a, axis: nbnorm.population_stats([a["x"], a["dy"]], axis=axis),
    "recalibrate": recalibrated,
}
WRITTEN = {
    "batch_norm_forward, fused": {"running_mean", "running_var", "out"},
    "batch_norm_backward, fused": {"out"},
    "batch_renorm_forward": {"running_mean", "running_var"},
    "micro_batch_norm_forward": {"running_mean", "running_var"},
    "update_running_stats": {"running_mean", "running_var"},
}
WITHOUT_ARRAYS = {
    # Types of results, options, and functions that take no arrays.
    *("BatchNormBackward", "BatchNormDoubleBackward", "BatchNormForward", "BatchRenormForward"),
    *("MicroBatchNormBackward", "MicroBatchNormForward"),
    *("Ramp", "Renorm", "activation", "set_pool_limit", "show_config", "warmup"),
}


def test_no_public_function_and_no_device_is_left_out():
    assert len(dtypes_of_devices()) >= 6
    assert {name.partition(",")[0] for name in CASES} == set(nbnorm.__all__) - WITHOUT_ARRAYS


def as_numpy(array):
    return array if isinstance(array, np.ndarray) else np.from_dlpack(array)


def same(got, want, device, name):
    """Compare the library, device and bits of results, including nested tuples."""
    if isinstance(want, tuple):
        assert type(got) is type(want)
        for number, pair in enumerate(zip(got, want, strict=True)):
            same(*pair, device, f"{name}[{number}]")
    elif not isinstance(want, np.ndarray):
        assert got == want
    else:
        if want.dtype.name in INFO.dtypes(device=device):
            assert type(got) is type(xp.zeros(1)), name
            assert got.device == device, name
        else:  # as for any library without float64
            assert type(got) is np.ndarray, name
        assert_same_bits(as_numpy(got), want, name)


def compare(case, axis, dtype, device, layout="contiguous"):
    """Run one case with both libraries and compare results and arguments."""
    statistic = "float64" if "float64" in INFO.dtypes(device=device) else "float32"
    like_x, others, laid_out = arguments(axis, dtype, statistic, layout)
    given = {name: laid_out(np, array.copy()) for name, array in like_x.items()}
    given |= {name: array.copy() for name, array in others.items()}
    strict = {
        name: xp.asarray(array, device=device, copy=True)
        for name, array in {**like_x, **others}.items()
    }
    strict |= {name: laid_out(xp, strict[name]) for name in like_x}
    before = {name: array.copy() for name, array in given.items()}
    want = CASES[case](given, axis)
    same(CASES[case](strict, axis), want, device, "result")
    for name, array in strict.items():
        assert array.device == device
        assert_same_bits(as_numpy(array), given[name], name)
        if name not in WRITTEN.get(case, ()):
            assert_same_bits(given[name], before[name], f"{name} after the call")


def combinations():
    """Return cases with their axes: folded weights have one channel axis."""
    return [(c, axis) for c in CASES for axis in AXES if axis == 1 or "fold_into" not in c]


every_case = pytest.mark.parametrize(("case", "axis"), combinations(), ids=str)


def dtypes_of_devices():
    """Return nbnorm's dtypes that each device supports."""
    return [
        pytest.param(dtype, device, id=f"{dtype}-{device}")
        for device in DEVICES
        for dtype in ("float32", "float64")
        if dtype in INFO.dtypes(device=device)
    ]


@pytest.mark.parametrize(("dtype", "device"), dtypes_of_devices())
@every_case
def test_devices(case, axis, dtype, device):
    compare(case, axis, dtype, device)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@every_case
def test_layouts(case, axis, layout):
    compare(case, axis, "float32", DEVICES[1], layout)


@pytest.mark.parametrize("version", ["2023.12", "2024.12", "2025.12"])
@pytest.mark.parametrize("case", CASES)
def test_versions_of_the_standard(case, version):
    with xp.ArrayAPIStrictFlags(api_version=version):
        compare(case, 1, "float32", DEVICES[1])


def test_versions_whose_dlpack_numpy_does_not_read():
    """NumPy asks for the version of DLPack, which array-api-strict refuses before 2023.12."""
    x, running = xp.ones((4, 6)), (xp.zeros(6), xp.ones(6))
    with xp.ArrayAPIStrictFlags(api_version="2022.12"):
        with pytest.raises(ValueError, match="max_version"):
            np.from_dlpack(x)
        with pytest.raises(TypeError, match=r"^x .*cannot be viewed as an array: .*2023\.12"):
            nbnorm.batch_norm_forward(x, None, None, *running)
    assert_same_bits(as_numpy(running[0]), np.zeros(6))


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint64", "complex64", "complex128"])
@pytest.mark.parametrize("name", ["x", "gamma", "running_var"])
def test_dtypes_that_are_not_computed_in(name, dtype):
    given = {"x": xp.ones((4, 6)), "gamma": xp.ones(6)}
    given |= {"running_mean": xp.zeros(6), "running_var": xp.ones(6)}
    given[name] = xp.astype(given[name], getattr(xp, dtype))
    with pytest.raises(TypeError, match=rf"^{name} has dtype {dtype}"):
        nbnorm.batch_norm_forward(**given)
    assert_same_bits(as_numpy(given["running_mean"]), np.zeros(6))


@pytest.mark.parametrize("name", ["running_mean", "running_var", "out"])
def test_memory_that_is_read_only(name):
    given = {"x": np.ones((4, 6)), "out": np.ones((4, 6))}
    given |= {"running_mean": np.zeros(6), "running_var": np.ones(6)}
    given[name].flags.writeable = False
    strict = {key: xp.asarray(array, copy=False) for key, array in given.items()}
    with pytest.raises(ValueError, match=rf"^{name} is read-only"):
        nbnorm.batch_norm_forward(**strict)
    assert_same_bits(given["running_mean"], np.zeros(6))
