"""nbnorm.integrations.onnx against the oracle, in every version of the operator, and as a backend.

ONNX's own tests are in test_onnx_conformance.py.
"""

import doctest
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from children import run_child
from numpy.testing import assert_allclose, assert_array_equal
from tolerances import (
    assert_same_bits,
    assert_within,
    channels_of,
    m2_tolerance,
    mean_tolerance,
    one_unit,
    running_tolerance,
    y_tolerance,
)

pytest.importorskip("onnx", "1.19", reason="the integration of ONNX needs onnx 1.19")

from ml_dtypes import bfloat16
from onnx import TensorProto, checker, helper, numpy_helper
from onnx.defs import onnx_opset_version
from onnx.reference import ReferenceEvaluator

import nbnorm.integrations.onnx as integration
from nbnorm import reference
from nbnorm.integrations.onnx import Backend, BatchNormalization

pytestmark = pytest.mark.cpu_only

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.hosts import onnx as benchmark  # noqa: E402

EXAMPLE = ROOT / "docs" / "examples" / "onnx_model.py"
INPUTS = ("x", "scale", "bias", "mean", "var")
SHAPE = (4, 3, 5, 6)
DTYPES = (np.float32, np.float64, np.float16, bfloat16)
# An operator set for each version of the operator, and sets between them.
OPSETS = {1: 1, 5: 1, 6: 6, 7: 7, 8: 7, 9: 9, 13: 9, 14: 14, 15: 15, onnx_opset_version(): 15}
opsets = pytest.mark.parametrize("opset", OPSETS)


@pytest.fixture
def calls(monkeypatch):
    """Count the calls of each of nbnorm's functions."""
    counts = Counter()

    def counted(name, function):
        def call(*args, **options):
            counts[name] += 1
            return function(*args, **options)

        monkeypatch.setattr(integration, name, call)

    for name in ("batch_norm_forward", "batch_norm_inference", "batch_norm_stats"):
        counted(name, getattr(integration, name))
    return counts


def drawn(shape=SHAPE, dtype=np.float32, parameter=None, statistic=None, axis=1):
    """Return the operator's inputs by name."""
    rng = np.random.default_rng(0)
    channels = channels_of(shape, axis) if len(shape) > 1 else (1,)
    dtypes = {"x": dtype}
    dtypes |= dict.fromkeys(("scale", "bias"), parameter or dtype)
    dtypes |= dict.fromkeys(("mean", "var"), statistic or dtype)
    feeds = {name: rng.uniform(0.5, 1.5, channels) for name in INPUTS}
    feeds["x"] = rng.standard_normal(shape)
    return {name: feeds[name].astype(dtypes[name]) for name in INPUTS}


def tensor(name, like):
    kind = helper.np_dtype_to_tensor_dtype(like.dtype)
    return helper.make_tensor_value_info(name, kind, like.shape)


def tensors(arrays):
    return [tensor(name, array) for name, array in arrays.items()]


def attributes_of(opset, training):
    """Return the attributes that set the mode, and those that version 1 requires."""
    attributes = {"consumed_inputs": [0, 0, 0, 1, 1]} if opset < 6 else {}
    if opset < 7:
        return attributes | ({} if training else {"is_test": 1})
    return {"training_mode": int(training)} if opset >= 14 else {}


def results_of(opset, training):
    """Return the names of the results in this mode."""
    if not training:
        return ["y"]
    moved = ["y", "running_mean", "running_var"]
    return moved if opset >= 14 else [*moved, "saved_mean", "saved_var"]


def evaluated(feeds, opset=15, *, training=False, results=None, checked=True, ours=True, **more):
    """Run a model of one node; return results by name."""
    results = results or results_of(opset, training)
    attributes = attributes_of(opset, training) | more
    node = helper.make_node("BatchNormalization", list(feeds), results, **attributes)
    likes = {"y": feeds["x"], "running_mean": feeds["mean"], "running_var": feeds["mean"]}
    likes |= {name: feeds["mean"].astype(feeds["x"].dtype) for name in ("saved_mean", "saved_var")}
    outputs = tensors({name: likes[name] for name in results if name})
    graph = helper.make_graph([node], "one", tensors(feeds), outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    if checked:
        checker.check_model(model, full_check=True)
    evaluator = ReferenceEvaluator(model, new_ops=[BatchNormalization] if ours else None)
    names = [name for name in results if name]
    return dict(zip(names, evaluator.run(None, feeds), strict=True))


def check(found, feeds, *, training, axis=1, momentum=0.9, eps=1e-5):
    """Compare the operator's results with the oracle; momentum and eps are ONNX's, in float32."""
    x, scale, bias, mean, var = feeds.values()
    momentum, eps = float(np.float32(momentum)), float(np.float32(eps))
    running = mean.astype(np.longdouble), var.astype(np.longdouble)
    options = {"axis": axis, "training": training, "eps": eps}
    ref = reference.batch_norm_forward(
        x, scale, bias, *running, momentum=1 - momentum, correction=0, **options
    )
    tolerance = y_tolerance(x, scale, bias, ref.mean, ref.rstd, axis=axis)
    assert found["y"].dtype == x.dtype
    assert_within(found["y"], ref.y, tolerance, "y")
    if not training:
        assert list(found) == ["y"]
        return
    moments = reference.batch_norm_stats(x, axis=axis)
    tolerances = running_tolerance(
        moments, mean, var, momentum=1 - momentum, correction=0, dtype=x.dtype
    )
    names = ("running_mean", "running_var")
    for name, expected, before, within in zip(names, running, (mean, var), tolerances, strict=True):
        assert found[name].dtype == before.dtype
        assert_within(found[name], expected, within, name)
    if "saved_mean" in found:
        saved = moments.mean, moments.m2 / moments.count
        tolerances = (
            mean_tolerance(moments, x.dtype),
            m2_tolerance(moments, x.dtype) / moments.count,
        )
        for name, expected, within in zip(
            ("saved_mean", "saved_var"), saved, tolerances, strict=True
        ):
            assert found[name].dtype == x.dtype
            assert_within(found[name], expected, within + one_unit(expected, x.dtype), name)


# Versions


@opsets
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 7), SHAPE, (2, 3, 2, 4, 3)], ids=str)
def test_every_version_agrees_with_the_oracle(shape, training, opset, calls):
    feeds = drawn(shape)
    kept = {name: array.copy() for name, array in feeds.items()}
    found = evaluated(feeds, opset, training=training, momentum=0.7, epsilon=1e-2)
    check(found, feeds, training=training, momentum=0.7, eps=1e-2)
    assert calls == (
        Counter(batch_norm_forward=1, batch_norm_stats=int(opset < 14))
        if training
        else Counter(batch_norm_inference=1)
    )
    for name, array in feeds.items():
        assert_same_bits(array, kept[name], name)


@opsets
@pytest.mark.parametrize("training", [False, True])
def test_defaults_are_those_of_the_specification(training, opset):
    feeds = drawn()
    check(evaluated(feeds, opset, training=training), feeds, training=training)


@pytest.mark.parametrize("opset", [1, 6, 7, 8])
@pytest.mark.parametrize("training", [False, True])
def test_per_activation_before_version_9(training, opset):
    axis = (1, 2, 3)
    feeds = drawn((6, 3, 2, 4), axis=axis)
    found = evaluated(feeds, opset, training=training, spatial=0)
    check(found, feeds, training=training, axis=axis)
    assert found["y"].shape == (6, 3, 2, 4)


@pytest.mark.parametrize("opset", [9, 14, 15])
@pytest.mark.parametrize("training", [False, True])
def test_a_single_dimension_is_one_channel_since_version_9(training, opset):
    feeds = drawn((20,))
    found = evaluated(feeds, opset, training=training)
    assert found["y"].shape == (20,)
    as_column = feeds | {"x": feeds["x"][:, np.newaxis]}
    check(found | {"y": found["y"][:, np.newaxis]}, as_column, training=training)
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        evaluated(feeds, 8)


@pytest.mark.parametrize("opset", [1, 6])
def test_old_versions_train_unless_they_are_told_not_to(opset):
    feeds = drawn()
    trained = evaluated(feeds, opset, training=True, results=["y"])["y"]
    assert_same_bits(trained, evaluated(feeds, 15, training=True)["y"])
    asked = evaluated(feeds, opset, is_test=0, results=["y"])["y"]
    assert_same_bits(trained, asked)


@pytest.mark.parametrize("opset", [14, 15])
def test_an_attribute_tells_the_mode_since_version_14(opset):
    feeds = drawn()
    trained = evaluated(feeds, opset, training=True, results=["y"], checked=False)["y"]
    assert_same_bits(trained, evaluated(feeds, opset, training=True)["y"])
    assert (trained != evaluated(feeds, opset)["y"]).any()


@pytest.mark.parametrize("opset", [7, 8, 9, 13])
def test_results_tell_the_mode_from_version_7_to_9(opset):
    feeds = drawn()
    for results in (["y"], ["y", ""]):
        found = evaluated(feeds, opset, results=results, checked=False)
        check(found, feeds, training=False)
    trained = evaluated(feeds, opset, training=True)
    assert_same_bits(trained["y"], evaluated(feeds, 15, training=True)["y"])
    for results in (["y", "", "running_var"], [*trained][:3], [*trained][:4]):
        found = evaluated(feeds, opset, results=results, checked=False)
        for name, array in found.items():
            assert_same_bits(array, trained[name], name)


@pytest.mark.parametrize("opset", [14, 15, onnx_opset_version()])
@pytest.mark.parametrize("training", [False, True])
def test_the_evaluators_own_operator_agrees(training, opset, calls):
    feeds = drawn()
    found = evaluated(feeds, opset, training=training)
    used = calls.total()
    assert used
    theirs = evaluated(feeds, opset, training=training, ours=False)
    assert calls.total() == used  # theirs ran, not nbnorm's
    assert found.keys() == theirs.keys()
    for name, array in found.items():  # theirs rounds a few times more
        assert_allclose(array, theirs[name], rtol=0, atol=2e-6)


def test_the_moved_statistics_are_those_of_the_formula():
    feeds = drawn((2, 1)) | {"x": np.array([[1], [5]], np.float32)}
    feeds |= {"mean": np.array([10], np.float32), "var": np.array([100], np.float32)}
    found = evaluated(feeds, training=True, momentum=0.75)
    # Mean 3 and variance 4, not 8: the old statistics have weight 3/4.
    assert (found["running_mean"], found["running_var"]) == (8.25, 76)


# Dtypes and memory


@pytest.mark.parametrize("statistic", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("parameter", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("training", [False, True])
def test_mixed_dtypes(training, dtype, parameter, statistic):
    feeds = drawn((6, 3, 4), dtype, parameter, statistic)
    check(evaluated(feeds, 15, training=training), feeds, training=training)
    if dtype == parameter:
        check(evaluated(feeds, 14, training=training), feeds, training=training)


@pytest.mark.parametrize("opset", [6, 7, 9])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=lambda dtype: np.dtype(dtype).name)
def test_dtypes_of_old_versions(dtype, opset):
    feeds = drawn((6, 3, 4), dtype)
    check(evaluated(feeds, opset, training=True), feeds, training=True)


def test_float16_does_not_overflow():
    feeds = drawn((500, 3), np.float16)
    feeds["x"] = (feeds["x"] * 1000 + 30000).astype(np.float16)
    found = evaluated(feeds, training=True)
    assert np.isfinite(found["y"]).all()
    assert np.abs(found["y"].astype(np.float64).mean(axis=0)).max() < 2


def test_a_large_mean_costs_no_digits():
    feeds = drawn((50, 3, 20))
    offset = feeds | {"x": feeds["x"] + np.float32(2**20)}
    plain = feeds | {"x": (offset["x"] - np.float64(2**20)).astype(np.float32)}
    found, expected = (evaluated(f, training=True)["y"] for f in (offset, plain))
    assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_strides_are_taken_as_they_are():
    feeds = drawn()
    feeds["x"] = np.ascontiguousarray(feeds["x"].transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    feeds |= {name: np.repeat(feeds[name], 2)[::2] for name in INPUTS[1:]}
    for training in (False, True):
        found = evaluated(feeds, training=training)
        check(found, feeds, training=training)
        assert found["y"].strides == feeds["x"].strides


def test_read_only_inputs_are_left_alone():
    feeds = drawn()
    for array in feeds.values():
        array.flags.writeable = False
    check(evaluated(feeds, training=True), feeds, training=True)


def test_an_empty_batch_keeps_the_statistics():
    feeds = drawn((0, 3, 4, 5))
    found = evaluated(feeds, training=True)
    assert found["y"].shape == (0, 3, 4, 5)
    assert_same_bits(found["running_mean"], feeds["mean"])
    assert_same_bits(found["running_var"], feeds["var"])


def test_a_single_value_gives_the_bias():
    feeds = drawn((1, 3))
    found = evaluated(feeds, training=True)
    assert_array_equal(found["y"], feeds["bias"][np.newaxis])


# Ways to reach the operator


def test_a_single_node_and_eval(calls):
    feeds = drawn()
    node = helper.make_node("BatchNormalization", INPUTS, ["y"])
    [y] = ReferenceEvaluator(node, new_ops=[BatchNormalization]).run(None, feeds)
    check({"y": y}, feeds, training=False)
    assert_same_bits(BatchNormalization.eval(*feeds.values()), y)
    trained = BatchNormalization.eval(*feeds.values(), n_outputs=3, training_mode=1, momentum=0.5)
    names = ("y", "running_mean", "running_var")
    check(dict(zip(names, trained, strict=True)), feeds, training=True, momentum=0.5)
    assert calls == Counter(batch_norm_inference=2, batch_norm_forward=1)


def test_functions_of_a_model_use_it_and_hand_it_their_attributes(calls):
    node = helper.make_node("BatchNormalization", INPUTS, ["y"])
    for name, kind in (("epsilon", "FLOAT"), ("training_mode", "INT")):
        node.attribute.add(name=name, ref_attr_name=name, type=kind)
    opset, own = helper.make_opsetid("", 15), helper.make_opsetid("own", 1)
    function = helper.make_function(
        "own", "Norm", INPUTS, ["y"], [node], [opset], ["epsilon", "training_mode"]
    )
    feeds = drawn()
    for training in (False, True):
        attributes = {"epsilon": 0.5, "training_mode": int(training)}
        norm = helper.make_node("Norm", INPUTS, ["y"], domain="own", **attributes)
        graph = helper.make_graph([norm], "g", tensors(feeds), [tensor("y", feeds["x"])])
        model = helper.make_model(graph, functions=[function], opset_imports=[opset, own])
        [y] = Backend.run_model(model, feeds)
        assert_same_bits(y, evaluated(feeds, training=training, epsilon=0.5)["y"])
    assert calls == Counter(batch_norm_inference=2, batch_norm_forward=2)


def test_a_branch_of_a_condition_uses_it(calls):
    feeds = drawn()
    node = helper.make_node("BatchNormalization", INPUTS, ["inner"])
    then = helper.make_graph([node], "then", [], [tensor("inner", feeds["x"])])
    same = helper.make_node("Identity", ["x"], ["same"])
    other = helper.make_graph([same], "else", [], [tensor("same", feeds["x"])])
    condition = helper.make_node("If", ["yes"], ["y"], then_branch=then, else_branch=other)
    yes = helper.make_tensor_value_info("yes", TensorProto.BOOL, [])
    inputs = [yes, *tensors(feeds)]
    graph = helper.make_graph([condition], "g", inputs, [tensor("y", feeds["x"])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=8)
    evaluator = ReferenceEvaluator(model, new_ops=[BatchNormalization])
    [y] = evaluator.run(None, {"yes": np.array(True)} | feeds)
    check({"y": y}, feeds, training=False)
    [same] = evaluator.run(None, {"yes": np.array(False)} | feeds)
    assert_same_bits(same, feeds["x"])
    assert calls == Counter(batch_norm_inference=1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scale": np.ones(4, np.float32)}, ValueError, r"^scale has shape \(4,\), expected \(3,"),
        ({"bias": np.ones(4, np.float32)}, ValueError, r"^B has shape \(4,\), expected \(3,\)"),
        ({"mean": np.ones(2, np.float32)}, ValueError, r"^input_mean has shape \(2,\), expected"),
        ({"var": np.ones(2, np.float32)}, ValueError, r"^input_var has shape \(2,\), expected"),
        ({"x": np.ones((4, 3), np.int32)}, TypeError, "Issues with types"),
        ({"var": np.ones(3, np.int64)}, TypeError, "Issues with types"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_what_is_refused(training, change, error, message):
    with pytest.raises(error, match=message) as caught:
        evaluated(drawn() | change, training=training, checked=False)
    if error is TypeError:  # the evaluator raises its own error; nbnorm's is the cause
        assert "expected one of float32" in str(caught.value.__cause__)


# The backend


def network():
    """Convolution, batch norm, ReLU; the parameters are initializers, which inputs can override."""
    rng = np.random.default_rng(1)
    arrays = {"filters": rng.standard_normal((3, 2, 3, 3)).astype(np.float32)}
    arrays |= {name: a for name, a in drawn().items() if name != "x"}
    nodes = [
        helper.make_node("Conv", ["image", "filters"], ["x"]),
        helper.make_node("BatchNormalization", INPUTS, ["norm"]),
        helper.make_node("Relu", ["norm"], ["y"]),
        helper.make_node("ReduceMax", ["y"], ["most"], keepdims=0),
    ]
    image, y, most = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in {
            "image": ["N", 2, "H", "W"],
            "y": ["N", 3, "h", "w"],
            "most": [],
        }.items()
    )
    graph = helper.make_graph(
        nodes,
        "network",
        [tensor("filters", arrays["filters"]), image, tensor("scale", arrays["scale"])],
        [y, most],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)


def test_prepared_models_run_again_and_again(calls):
    model = network()
    image = np.random.default_rng(2).standard_normal((2, 2, 6, 7)).astype(np.float32)
    expected = ReferenceEvaluator(model).run(None, {"image": image})
    prepared = Backend.prepare(model)
    for inputs in ([image], (image,), {"image": image}):
        found = prepared.run(inputs)
        assert type(found) is tuple
        for ours, theirs in zip(found, expected, strict=True):
            assert_allclose(ours, theirs, rtol=0, atol=2e-5)  # sums of 18 products each
    assert calls == Counter(batch_norm_inference=3)
    assert_same_bits(Backend.run_model(model, [image])[0], found[0])
    twice = prepared.run({"image": image, "scale": np.zeros(3, np.float32)})
    assert (twice[0] == drawn()["bias"][:, np.newaxis, np.newaxis]).all()
    for wrong in ([], [image, image]):
        with pytest.raises(ValueError, match=rf"got {len(wrong)} inputs, expected 1: \['image'\]"):
            prepared.run(wrong)


def test_single_nodes_run_in_the_version_that_is_asked_for(calls):
    feeds = drawn()
    node = helper.make_node("BatchNormalization", INPUTS, ["y", "m", "v", "sm", "sv"])
    found = Backend.run_node(node, list(feeds.values()), opset_version=9)
    names = ("y", "running_mean", "running_var", "saved_mean", "saved_var")
    check(dict(zip(names, found, strict=True)), feeds, training=True)
    node = helper.make_node("BatchNormalization", INPUTS, ["y"])
    [y] = Backend.run_node(node, feeds)
    check({"y": y}, feeds, training=False)
    assert calls == Counter(batch_norm_forward=1, batch_norm_stats=1, batch_norm_inference=1)
    clip = helper.make_node("Clip", ["x", "", "most"], ["y"])
    [y] = Backend.run_node(clip, [np.arange(4.0), np.array(2.0)])
    assert y.tolist() == [0, 1, 2, 2]
    with pytest.raises(checker.ValidationError, match="spatial"):
        Backend.run_node(helper.make_node("BatchNormalization", INPUTS, ["y"], spatial=1), feeds)


def test_devices():
    assert Backend.supports_device("CPU")
    assert Backend.supports_device("CPU:0")
    assert not Backend.supports_device("CUDA")
    node = helper.make_node("Relu", ["x"], ["y"])
    for call in (
        lambda: Backend.prepare(network(), "CUDA:1"),
        lambda: Backend.run_model(network(), [], "CUDA:1"),
        lambda: Backend.run_node(node, [np.ones(1)], "CUDA:1"),
    ):
        with pytest.raises(ValueError, match="device is 'CUDA:1', expected 'CPU'"):
            call()


def test_compatible_models():
    model = network()
    assert Backend.is_compatible(model)
    assert not Backend.is_compatible(model, "CUDA")
    model.graph.node[2].domain = "nobody.knows"
    assert not Backend.is_compatible(model)
    model.opset_import.append(helper.make_opsetid("nobody.knows", 1))
    assert not Backend.is_compatible(model)
    with pytest.raises(NotImplementedError, match="Relu"):
        Backend.prepare(model)
    broken = network()
    broken.graph.node[0].output[0] = "elsewhere"
    with pytest.raises(checker.ValidationError):
        Backend.prepare(broken)


# The example, the benchmark and the documentation


def test_example():
    out = run_child(str(EXAMPLE), "--train", "500")
    rows = re.findall(r"^(\w+'s)(?: own)? .* ([\d.]+)%$", out, re.M)
    assert [name for name, _ in rows] == ["ONNX's", "nbnorm's"]
    accuracies = [float(accuracy) for _, accuracy in rows]
    assert min(accuracies) > 85  # ten classes
    assert abs(accuracies[0] - accuracies[1]) <= 0.2
    apart = float(re.search(r"greatest difference (\S+)$", out, re.M)[1])
    assert apart < 1e-4


@pytest.mark.parametrize("shape", [(60, 7), (3, 5, 4, 6)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("training", [False, True])
def test_benchmark_compares_like_with_like(training, dtype, shape, calls):
    assert benchmark.name().startswith("onnx ")
    compared = benchmark.calls(shape, dtype, training=training)
    assert list(compared) == ["host", "nbnorm"]
    host, ours = (call() for call in compared.values())
    assert calls.total() == 1
    assert len(host) == len(ours) == (3 if training else 1)
    for got, expected in zip(ours, host, strict=True):
        assert got.dtype == expected.dtype == dtype
        assert_allclose(got, expected, rtol=0, atol=20 * np.finfo(dtype).eps)


def test_doctests():
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, attempted = doctest.testmod(integration, optionflags=options)
    assert failed == 0
    assert attempted > 10
