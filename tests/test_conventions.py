"""Checkpoints of other frameworks: loaded, trained further, dumped; compared with frameworks."""

import importlib.util
import json
import os
import re
import subprocess
from functools import partial
from pathlib import Path

import convention_formulas
import convention_hosts
import ml_dtypes
import numpy as np
import pytest
from children import run_child
from tolerances import UNITS, assert_same_bits, assert_within, one_unit

from nbnorm import BatchNorm, conventions
from nbnorm.conventions import CONVENTIONS

# Keras converts its variables to NumPy arrays in a way that NumPy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CHANNELS = 3
PAGE = Path(__file__).resolve().parents[1] / "docs" / "conventions.md"

# Chainer and MXNet need an older NumPy than nbnorm: they run in another Python.
OLD = ("chainer", "mxnet", "gluon")
OLD_PYTHON = "NBNORM_OLD_HOSTS_PYTHON"

# The frameworks' own names, independent of nbnorm's table: (gamma, beta, mean, variance).
NAMES = {
    "torch": ("weight", "bias", "running_mean", "running_var"),
    "keras": ("gamma", "beta", "moving_mean", "moving_variance"),
    "flax": ("scale", "bias", "mean", "var"),
    "onnx": ("scale", "B", "input_mean", "input_var"),
    "caffe": ("scale", "bias", "mean", "variance"),
    "chainer": ("gamma", "beta", "avg_mean", "avg_var"),
    "mxnet": ("bn_gamma", "bn_beta", "bn_moving_mean", "bn_moving_var"),
    "gluon": ("gamma", "beta", "running_mean", "running_var"),
}
PREFIX = {"mxnet": "bn_"}
CHANNELS_LAST = ("keras", "flax")

# Hyperparameters to test in addition to the defaults.
OPTIONS = {
    "torch": [
        {"eps": 0.01, "momentum": 0.3},
        {"momentum": None},
        {"affine": False},
        {"bias": False},
        {"track_running_stats": False},
    ],
    "keras": [
        {"epsilon": 0.01, "momentum": 0.8},
        {"scale": False},
        {"center": False},
        {"scale": False, "center": False},
        {"axis": 1},
    ],
    "flax": [
        {"epsilon": 0.01, "momentum": 0.8},
        {"use_scale": False},
        {"use_bias": False},
        {"use_scale": False, "use_bias": False},
        {"axis": 1},
    ],
    "onnx": [{"epsilon": 0.01, "momentum": 0.8}],
    "caffe": [
        {"eps": 0.01, "moving_average_fraction": 0.8},
        {"moving_average_fraction": 1.0},
        {"bias_term": False},
        {"scale": False},
    ],
    "chainer": [
        {"eps": 0.01, "decay": 0.8},
        {"use_gamma": False},
        {"use_beta": False},
        {"use_gamma": False, "use_beta": False},
    ],
    "mxnet": [{"eps": 0.01, "momentum": 0.8}, {"fix_gamma": False}, {"axis": -1}],
    "gluon": [{"epsilon": 0.01, "momentum": 0.8}, {"scale": False}, {"axis": -1}],
}
# Arrays that are absent if a keyword is False.
LEFT_OUT = {
    ("torch", "affine"): ("weight", "bias"),
    ("torch", "bias"): ("bias",),
    ("torch", "track_running_stats"): ("running_mean", "running_var"),
    ("keras", "scale"): ("gamma",),
    ("keras", "center"): ("beta",),
    ("flax", "use_scale"): ("scale",),
    ("flax", "use_bias"): ("bias",),
    ("caffe", "scale"): ("scale", "bias"),
    ("caffe", "bias_term"): ("bias",),
    ("chainer", "use_gamma"): ("gamma",),
    ("chainer", "use_beta"): ("beta",),
}
CASES = [
    pytest.param(framework, options, id=f"{framework}-{options or 'defaults'}")
    for framework, more in OPTIONS.items()
    for options in ({}, *more)
]
cases = pytest.mark.parametrize(("framework", "options"), CASES)
# Compare with the framework itself and with its formula; Caffe has no installable package.
RUNS = [
    pytest.param(*case.values, source, id=f"{case.id}-{source}")
    for case in CASES
    for source in ("formula", "package")
    if (case.values[0], source) != ("caffe", "package")
]
runs = pytest.mark.parametrize(("framework", "options", "source"), RUNS)
dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])
frameworks = pytest.mark.parametrize("framework", CONVENTIONS)

# Values near 1 and statistics of twelve of them, summed in another order: 1e-5 is 80 units of
# float32, 1e-12 some 4000 of float64. Confusing two conventions costs 1e-3 or more.
CLOSE = {"float32": {"rtol": 1e-5, "atol": 1e-5}, "float64": {"rtol": 1e-12, "atol": 1e-12}}
# Frameworks that store eps or momentum in float32 for any dtype; Keras also computes in float32.
SINGLE = ("keras", "onnx", "mxnet", "gluon")


def axis_of(framework, options):
    return options.get("axis", -1 if framework in CHANNELS_LAST else 1)


def drawn(seed, framework, options, dtype="float64", *, n=3):
    """Return an input in the layout of these hyperparameters: n images, 2 by 2, 3 channels."""
    x = np.random.default_rng(seed).normal(0.5, 2.0, (n, 2, 2, CHANNELS)).astype(dtype)
    return np.ascontiguousarray(np.moveaxis(x, -1, axis_of(framework, options)))


def given(framework, options, dtype="float64", shape=(CHANNELS,)):
    """Return arrays that earlier training of the framework's layer could have produced."""
    rng = np.random.default_rng(9)
    gamma, beta, mean = rng.normal(size=(3, *shape))
    var = rng.uniform(0.5, 2.0, shape)
    arrays = dict(zip(NAMES[framework], (gamma, beta, mean, var), strict=True))
    for keyword, value in options.items():
        for name in LEFT_OUT.get((framework, keyword), ()) if value is False else ():
            del arrays[name]
    arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    if framework == "caffe":  # after so many batches that the sum of the weights is constant
        fraction = options.get("moving_average_fraction", 0.999)
        factor = np.array([7 if fraction == 1 else 1 / (1 - fraction)], dtype)
        order = ("mean", "variance", "factor", "scale", "bias")
        arrays |= {"factor": factor, "mean": mean * factor, "variance": var * factor}
        arrays = {name: arrays[name].astype(dtype) for name in order if name in arrays}
    if framework == "torch" and "running_mean" in arrays:
        arrays["num_batches_tracked"] = np.array(7)
    if framework == "chainer":
        arrays["N"] = np.array(0)
    return arrays


@pytest.fixture(scope="session")
def old_python(tmp_path_factory):
    """Yield a function that runs Chainer and MXNet in a child process with an older NumPy."""
    python = os.environ.get(OLD_PYTHON)
    if python is None:
        pytest.skip(
            f"no {OLD_PYTHON}: a Python with chainer, mxnet and a NumPy old enough for them"
        )
    folder = tmp_path_factory.mktemp("old")
    given, result, log = (folder / name for name in ("given.npz", "result.npz", "stderr"))
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [python, convention_hosts.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as child,
    ):

        def run(framework, *arguments):
            convention_hosts.write(given, *arguments)
            child.stdin.write(json.dumps([framework, str(given), str(result)]) + "\n")
            child.stdin.flush()
            assert child.stdout.readline() == "done\n", log.read_text()[-4000:]
            _, arrays, _, y = convention_hosts.read(result)
            return arrays, y

        yield run


@pytest.fixture
def run(request, source, framework):
    """The framework or its formula, as a function of options, arrays, batches and x."""
    if source == "formula":
        return getattr(convention_formulas, framework)
    if framework in OLD:
        return partial(request.getfixturevalue("old_python"), framework)
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")
    return getattr(convention_hosts, framework)


@pytest.fixture
def close(source, framework, dtype):
    """Tolerances for the dtype, or for float32 if the framework rounds hyperparameters to it."""
    return CLOSE["float32" if source == "package" and framework in SINGLE else dtype]


def load(framework, arrays, options):
    return conventions.load(framework, arrays, prefix=PREFIX.get(framework, ""), **options)


def dump(framework, layer, options):
    """Dump a layer with the switches in the options."""
    switches = {k: v for k, v in options.items() if k in CONVENTIONS[framework].switches()}
    return conventions.dump(framework, layer, prefix=PREFIX.get(framework, ""), **switches)


def statistics(framework, arrays):
    """Return running mean and variance; for Caffe, sums divided by the factor."""
    untagged = {name.rpartition(":")[2]: array for name, array in arrays.items()}
    factor = untagged["factor"] if framework == "caffe" else 1
    return [untagged[name] / factor for name in NAMES[framework][2:] if name in untagged]


def assert_statistics(framework, arrays, ref_arrays, close):
    comp, ref = statistics(framework, arrays), statistics(framework, ref_arrays)
    for ours, theirs in zip(comp, ref, strict=True):
        np.testing.assert_allclose(ours, theirs, **close)


@runs
@dtypes
def test_a_checkpoint_computes_what_it_did(run, close, framework, options, dtype):
    batches = [drawn(seed, framework, options, dtype) for seed in (1, 2)]
    x = drawn(3, framework, options, dtype, n=5)
    arrays, ref_y = run(options, given(framework, options, dtype), batches, x)
    layer = load(framework, arrays, options)
    floating = {a.dtype for a in arrays.values() if a.dtype.kind == "f"}
    assert floating == {layer.dtype}
    np.testing.assert_allclose(layer.eval().forward(x), ref_y, **close)


@runs
@dtypes
def test_training_goes_on_as_it_would_have(run, close, framework, options, dtype):
    batch, *before = (drawn(seed, framework, options, dtype) for seed in (1, 2, 3))
    arrays, _ = run(options, given(framework, options, dtype), before, batch)
    ref_arrays, _ = run(options, arrays_untagged(arrays), [batch], batch)
    layer = load(framework, arrays, options)
    layer.forward(batch)
    arrays, _ = dump(framework, layer, options)
    assert_statistics(framework, arrays, ref_arrays, close)
    if "num_batches_tracked" in arrays:
        assert_same_bits(arrays["num_batches_tracked"], ref_arrays["num_batches_tracked"])


@runs
@dtypes
def test_back_in_the_framework_it_does_the_same(run, close, framework, options, dtype):
    x, batch, ours = (drawn(seed, framework, options, dtype) for seed in (1, 2, 3))
    layer = load(framework, given(framework, options, dtype), options)
    layer.forward(ours)
    arrays, hyperparameters = dump(framework, layer, options)
    _, y = run(hyperparameters, arrays, [], x)
    ref_y = layer.eval().forward(x)
    np.testing.assert_allclose(y, ref_y, **close)

    arrays, _ = run(hyperparameters, arrays, [batch], x)
    layer.train().forward(batch)
    ref_arrays, _ = dump(framework, layer, options)
    assert_statistics(framework, arrays, ref_arrays, close)


def arrays_untagged(arrays):
    """Return arrays by names without MXNet's tags."""
    return {name.rpartition(":")[2]: array for name, array in arrays.items()}


@dtypes
@cases
def test_there_and_back_are_the_same_numbers(framework, options, dtype):
    arrays = given(framework, options, dtype)
    if "N" in arrays:
        arrays["N"] = np.array(12)
    layer = load(framework, arrays, options)
    back, hyperparameters = dump(framework, layer, options)
    fixed = {"mxnet": options.get("fix_gamma", True), "gluon": not options.get("scale", True)}
    if fixed.get(framework, False):  # gamma is dumped as 1, which is how the framework used it
        arrays[NAMES[framework][0]] = np.ones(CHANNELS, dtype)
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        if framework == "caffe" and name in ("mean", "variance", "factor"):
            # A quotient, a factor and a product, each rounded.
            tolerance = UNITS * one_unit(array, dtype)
            assert_within(back[name], array, tolerance, name)
        else:
            assert_same_bits(back[name], array, name)
    for name, value in options.items():
        assert hyperparameters[name] == (value and pytest.approx(value, rel=1e-15)), name


@frameworks
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", ml_dtypes.bfloat16], ids=str)
def test_a_layer_goes_there_and_comes_back(framework, dtype):
    layer = BatchNorm(CHANNELS, eps=0.02, momentum=0.25, dtype=dtype, axis=1)
    rng = np.random.default_rng(1)
    for array in (*layer.parameters.values(), layer.running_mean, layer.running_var):
        array[...] = rng.uniform(0.1, 2, CHANNELS)
    arrays, hyperparameters = conventions.dump(framework, layer, prefix="a/b.")
    there_is_an_axis = "axis" in hyperparameters
    assert there_is_an_axis == (framework in ("keras", "flax", "mxnet", "gluon"))
    back = conventions.load(framework, arrays, prefix="a/b.", **hyperparameters)
    assert (back.eps, back.momentum, back.axis) == (0.02, 0.25, 1)
    ref, comp = layer.state_dict(), back.state_dict()
    for name, array in ref.items():
        if framework == "caffe" and array.dtype != np.int64:
            # The factor 4 is exact, and so are all other numbers.
            array = array.astype(np.promote_types(dtype, np.float32))
        assert_same_bits(comp[name], array, name)


@frameworks
def test_arrays_in_the_frameworks_order_need_no_names(framework):
    arrays = given(framework, {})
    ref = load(framework, arrays, {}).state_dict()
    comp = load(framework, list(arrays.values()), {}).state_dict()
    for name, array in ref.items():
        assert_same_bits(comp[name], array, name)


@frameworks
def test_what_comes_out_is_a_copy(framework):
    layer = BatchNorm(CHANNELS)
    arrays, _ = conventions.dump(framework, layer)
    for array in arrays.values():
        array[...] = 5
    assert layer.running_mean.max() == 0
    assert layer.parameters["weight"].max() == 1
    loaded = conventions.load(framework, arrays)
    before = loaded.running_mean.copy()
    for array in arrays.values():
        array[...] = 7
    assert_same_bits(loaded.running_mean, before)


def test_names_of_a_saved_file_are_names():
    arrays = given("mxnet", {})
    tagged = {("aux:" if "moving" in n else "arg:") + n: array for n, array in arrays.items()}
    layer = conventions.load("mxnet", tagged, prefix="bn_")
    assert_same_bits(layer.running_var, arrays["bn_moving_var"])


def test_a_prefix_leaves_other_layers_alone():
    checkpoint = {
        f"{layer}/{name}": array
        for layer in ("bn1", "bn11")
        for name, array in given("keras", {}).items()
    }
    checkpoint["conv1/kernel"] = np.zeros((3, 3))
    layer = conventions.load("keras", checkpoint, prefix="bn1/")
    assert_same_bits(layer.running_mean, checkpoint["bn1/moving_mean"])


def test_the_file_of_a_checkpoint_is_a_mapping(tmp_path):
    arrays = given("chainer", {}, "float32")
    np.savez(tmp_path / "model.npz", **{f"bn/{name}": array for name, array in arrays.items()})
    with np.load(tmp_path / "model.npz") as checkpoint:
        layer = conventions.load("chainer", checkpoint, prefix="bn/")
    assert_same_bits(layer.running_var, arrays["avg_var"])


def test_tensors_are_arrays():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    module = torch.nn.BatchNorm1d(CHANNELS, dtype=torch.bfloat16)
    layer = conventions.load("torch", module.state_dict())
    assert layer.dtype == ml_dtypes.bfloat16


def test_a_count_of_batches_may_be_absent():
    arrays = given("torch", {})
    assert conventions.load("torch", arrays).num_batches_tracked == 7
    del arrays["num_batches_tracked"]  # as before PyTorch 0.4.1
    assert conventions.load("torch", arrays).num_batches_tracked == 0


def test_the_widest_dtype_holds_all():
    arrays = given("keras", {}, "float16")
    mixed = arrays | {"moving_mean": arrays["moving_mean"].astype("float64")}
    assert conventions.load("keras", mixed).dtype == np.float64
    halves = arrays | {"gamma": arrays["gamma"].astype(ml_dtypes.bfloat16)}
    layer = conventions.load("keras", halves)
    assert layer.dtype == np.float32
    assert_same_bits(layer.running_mean, arrays["moving_mean"].astype("float32"))


def test_several_channel_axes():
    arrays = given("chainer", {}, shape=(3, 2, 2))
    x = np.random.default_rng(1).normal(size=(6, 3, 2, 2))
    ref_arrays, ref_y = convention_formulas.chainer({}, arrays, [], x)
    layer = conventions.load("chainer", arrays, axis=(1, 2, 3))
    np.testing.assert_allclose(layer.eval().forward(x), ref_y, **CLOSE["float64"])
    back, _ = conventions.dump("chainer", layer)
    for name, array in ref_arrays.items():
        assert_same_bits(back[name], array, name)
    with pytest.raises(
        ValueError, match=r"keras has one channel axis, but the layer has axis=\(1, 2, 3\)"
    ):
        conventions.dump("keras", layer)


def test_caffe_without_a_batch_has_statistics_of_0():
    arrays = given("caffe", {}) | {"factor": np.zeros(1)}
    layer = conventions.load("caffe", arrays)
    assert_same_bits(layer.running_mean, np.zeros(CHANNELS))
    assert_same_bits(layer.running_var, np.zeros(CHANNELS))


def test_caffe_that_forgets_nothing_is_the_cumulative_average():
    layer = conventions.load(
        "caffe", given("caffe", {"moving_average_fraction": 1.0}), moving_average_fraction=1
    )
    assert layer.momentum is None
    assert layer.num_batches_tracked == 7
    arrays, options = conventions.dump("caffe", layer)
    assert options["moving_average_fraction"] == 1
    assert arrays["factor"] == 7


def test_fixed_gamma_is_1_whatever_the_array_holds():
    arrays = {name.removeprefix("bn_"): array for name, array in given("mxnet", {}).items()}
    fixed = conventions.load("mxnet", arrays)
    assert_same_bits(fixed.parameters["weight"], np.ones(CHANNELS))
    assert_same_bits(fixed.parameters["bias"], arrays["beta"])
    free = conventions.load("mxnet", arrays, fix_gamma=False)
    assert_same_bits(free.parameters["weight"], arrays["gamma"])
    assert conventions.dump("mxnet", free)[1]["fix_gamma"] is False  # or MXNet would ignore gamma
    assert conventions.dump("mxnet", BatchNorm(3, affine=False))[1]["fix_gamma"] is True


def test_a_layer_without_parameters_has_those_that_a_framework_needs():
    layer = BatchNorm(CHANNELS, affine=False)
    arrays, options = conventions.dump("onnx", layer)
    assert arrays["scale"].tolist() == [1, 1, 1]
    assert arrays["B"].tolist() == [0, 0, 0]
    arrays, options = conventions.dump("keras", layer)
    assert list(arrays) == ["moving_mean", "moving_variance"]
    assert (options["scale"], options["center"]) == (False, False)
    arrays, options = conventions.dump("keras", layer, scale=True)
    assert list(arrays) == ["gamma", "moving_mean", "moving_variance"]


KERAS = given("keras", {})
REFUSED = {
    "framework": (
        "tensorflow",
        KERAS,
        {},
        ValueError,
        "framework must be one of torch, keras, .* got 'tensorflow'",
    ),
    "keyword": (
        "keras",
        KERAS,
        {"eps": 1e-5},
        TypeError,
        "'eps' is not a keyword of keras, which accepts: epsilon, momentum, scale, center",
    ),
    "missing and unexpected": (
        "keras",
        {("gama" if name == "gamma" else name): array for name, array in KERAS.items()},
        {},
        ValueError,
        r"arrays .* for keras with scale=True, center=True; missing \['gamma'\], unexp.*'gama'",
    ),
    "switched off, but there": (
        "keras",
        KERAS,
        {"scale": False},
        ValueError,
        r"missing \[\], unexpected \['gamma'\]",
    ),
    "too few": (
        "keras",
        list(KERAS.values())[:3],
        {},
        ValueError,
        r"missing \['moving_variance'\]",
    ),
    "too many": (
        "keras",
        [*KERAS.values(), np.ones(3)],
        {},
        ValueError,
        r"unexpected \['array 4'\]",
    ),
    "no mapping": (
        "keras",
        1.0,
        {},
        TypeError,
        "arrays must be a mapping of names to arrays, .* got float",
    ),
    "shape": (
        "keras",
        KERAS | {"moving_mean": np.ones(4)},
        {},
        ValueError,
        r"moving_mean has shape \(4,\), expected \(3,\), the shape of gamma",
    ),
    "no axes": (
        "keras",
        dict.fromkeys(KERAS, np.ones(())),
        {},
        ValueError,
        r"gamma has shape \(\), expected one dimension for each axis in axis=-1",
    ),
    "axes": (
        "keras",
        KERAS,
        {"axis": (1, 2)},
        ValueError,
        r"gamma has shape \(3,\), expected one dimension for each axis in axis=\(1, 2\)",
    ),
    "axis": ("keras", KERAS, {"axis": "last"}, TypeError, "axis must be an int or a tuple of ints"),
    "dtype": ("keras", KERAS | {"beta": np.ones(3, int)}, {}, TypeError, "beta has dtype int64"),
    "list": ("keras", KERAS | {"beta": [0, 0, 0]}, {}, TypeError, "beta must be a NumPy array"),
    "epsilon": (
        "keras",
        KERAS,
        {"epsilon": -1.0},
        ValueError,
        "eps must be finite and not negative, got -1.0",
    ),
    "momentum": (
        "keras",
        KERAS,
        {"momentum": None},
        TypeError,
        "momentum must be a real number, got None",
    ),
    "no arrays": (
        "torch",
        {},
        {"affine": False, "track_running_stats": False},
        ValueError,
        "torch with affine=False, bias=True, track_running_stats=False stores no arrays",
    ),
    "factor": (
        "caffe",
        given("caffe", {}) | {"factor": np.array([-1.0])},
        {},
        ValueError,
        "factor must be finite and not negative, got -1.0",
    ),
    "factors": (
        "caffe",
        given("caffe", {}) | {"factor": np.ones(3)},
        {},
        ValueError,
        r"factor has shape \(3,\), expected one number",
    ),
}


@pytest.mark.parametrize(
    ("framework", "arrays", "options", "error", "match"), REFUSED.values(), ids=REFUSED
)
def test_load_refuses(framework, arrays, options, error, match):
    with pytest.raises(error, match=match):
        conventions.load(framework, arrays, **options)


def test_errors_name_arrays_with_their_prefix():
    arrays = {f"bn/{name}": array for name, array in KERAS.items()} | {"bn/beta": np.ones(4)}
    with pytest.raises(ValueError, match=r"^bn/beta has shape \(4,\), .* of bn/gamma$"):
        conventions.load("keras", arrays, prefix="bn/")


def trained(**options):
    """Return a layer with parameters other than 1 and 0."""
    layer = BatchNorm(CHANNELS, **options)
    for parameter in layer.parameters.values():
        parameter[-1] = 3
    return layer


UNHELD = {
    "framework": ("tensorflow", BatchNorm(3), {}, ValueError, "framework must be one of"),
    "keyword": (
        "keras",
        BatchNorm(3),
        {"epsilon": 1.0},
        TypeError,
        "'epsilon' is not a keyword of keras, which accepts: scale, center",
    ),
    "no keyword": ("onnx", BatchNorm(3), {"scale": False}, TypeError, "onnx, which accepts: none"),
    "layer": ("keras", KERAS, {}, TypeError, "layer must be an nbnorm.BatchNorm, got dict"),
    "gamma": (
        "keras",
        trained(),
        {"scale": False},
        ValueError,
        "keras with scale=False, center=True fixes weight at 1, but the layer has other values",
    ),
    "beta": ("keras", trained(), {"center": False}, ValueError, "fixes bias at 0"),
    "fixed gamma": ("mxnet", trained(), {"fix_gamma": True}, ValueError, "fixes weight at 1"),
    "statistics": (
        "torch",
        BatchNorm(3),
        {"track_running_stats": False},
        ValueError,
        "stores no (running_mean|running_var|num_batches_tracked), but the layer has it",
    ),
    "no statistics": (
        "keras",
        BatchNorm(3, track_running_stats=False),
        {},
        ValueError,
        "keras stores running statistics, but the layer has none",
    ),
    "cumulative": (
        "keras",
        BatchNorm(3, momentum=None),
        {},
        ValueError,
        "keras has no cumulative average, but the layer has momentum=None",
    ),
    "no batches": (
        "caffe",
        BatchNorm(3, momentum=None),
        {},
        ValueError,
        "caffe cannot store running statistics with momentum=None after 0 batches",
    ),
    "frozen": (
        "caffe",
        BatchNorm(3, momentum=0),
        {},
        ValueError,
        "caffe cannot store running statistics with momentum=0",
    ),
}


@pytest.mark.parametrize(
    ("framework", "layer", "options", "error", "match"), UNHELD.values(), ids=UNHELD
)
def test_dump_refuses(framework, layer, options, error, match):
    with pytest.raises(error, match=match):
        conventions.dump(framework, layer, **options)


def test_parameters_of_1_and_0_may_be_left_out():
    arrays, options = conventions.dump("keras", BatchNorm(CHANNELS), scale=False)
    assert list(arrays) == ["beta", "moving_mean", "moving_variance"]
    assert options["scale"] is False
    arrays, _ = conventions.dump("caffe", BatchNorm(CHANNELS), scale=False)
    assert list(arrays) == ["mean", "variance", "factor"]


def test_importing_it_brings_no_framework():
    code = """
import sys, nbnorm.conventions
found = {"torch", "keras", "jax", "onnx"} & set(sys.modules)
assert not found, found
"""
    run_child("-c", code)


def test_the_pages_table_is_what_the_conventions_are():
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| (.*) \|$", PAGE.read_text(), re.M)
    comp = {name: [cell.strip() for cell in rest.split("|")] for name, rest in rows}
    ref = {
        name: [
            "`{}` {:g}".format(*convention.eps),
            "`{}` {:g}, {}".format(*convention.momentum, convention.weighs),
            "unbiased" if convention.correction else "biased",
            " ".join(f"`{array}`" for array in convention.arrays),
            str(convention.axis),
        ]
        for name, convention in CONVENTIONS.items()
    }
    assert comp == ref


@pytest.mark.parametrize("framework", CONVENTIONS)
def test_a_momentum_that_is_not_finite_is_refused(framework):
    keyword = CONVENTIONS[framework].momentum[0]
    with pytest.raises(ValueError, match=f"^{keyword} must be finite, got nan"):
        conventions.load(framework, {}, **{keyword: float("nan")})
