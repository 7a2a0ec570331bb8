"""Models folded by nbnorm.integrations.onnx.fold against the originals, in onnxruntime and ONNX."""

import numpy as np
import pytest

pytest.importorskip("onnx", "1.19", reason="the integration of ONNX needs onnx 1.19")

from hypothesis import given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from numpy.testing import assert_allclose
from onnx import ModelProto, TensorProto, checker, external_data_helper, helper, numpy_helper
from onnx.parser import parse_model
from onnx.reference import ReferenceEvaluator

from nbnorm.integrations.onnx import BatchNormalization, fold

pytestmark = pytest.mark.cpu_only

EPS = 1e-3


def model_of(text, constants, *, opset=15, ir=8, dtype=np.float32):
    """Return the model that `text` describes, its signature first; the input is x.

    `constants` become initializers.
    """
    model = parse_model(f'<ir_version: {ir}, opset_import: ["": {opset}]>\n{text}')
    for name, array in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array, dtype), name))
    return model


def norm_of(channels, seed=0, *, shift=True):
    """Return the constants s, b, m and v of a batch normalization."""
    rng = np.random.default_rng(seed)
    bn = dict(zip("sbm", rng.standard_normal((3, channels)), strict=True))
    bn |= {} if shift else {"b": np.zeros(channels), "m": np.zeros(channels)}
    return bn | {"v": rng.uniform(0.1, 2, channels)}


def run(model, feeds):
    """Return the outputs of ONNX's reference evaluator, with nbnorm as its BatchNormalization."""
    return ReferenceEvaluator(model, new_ops=[BatchNormalization]).run(None, feeds)


def run_in_onnxruntime(model, feeds):
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


def check(model, x, *, folded, left=(), how=run, rtol=0, atol=1e-11, **feeds):
    """Fold a model and compare its results; return what `fold` returned."""
    before = model.SerializeToString(deterministic=True)
    checker.check_model(model, full_check=True)
    result = fold(model)
    assert model.SerializeToString(deterministic=True) == before
    checker.check_model(result.model, full_check=True)
    assert set(result.folded) == set(folded)
    assert set(result.left) == set(left)
    ops = [node.op_type for node in result.model.graph.node]
    assert ops.count("BatchNormalization") == len([n for n in left if "/" not in n])
    for comp, ref in zip(
        how(result.model, feeds | {"x": x}), how(model, feeds | {"x": x}), strict=True
    ):
        assert comp.dtype == ref.dtype
        assert_allclose(comp.astype(float), ref.astype(float), rtol=rtol, atol=atol)
    return result


DOUBLE = {"dtype": np.float64}
NORM = f"BatchNormalization<epsilon = {EPS}>"


@st.composite
def convolutions(draw):
    """Return a float32 model of a convolution and a batch norm in either order, x, and a name."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    transposed, first = draw(st.booleans()), draw(st.booleans())
    kernel = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    groups, inside, outside = (draw(st.integers(1, 3)) for _ in range(3))
    ins, outs = groups * inside, groups * outside
    shape = (ins, outside) if transposed else (outs, inside)
    constants = {"w": rng.standard_normal((*shape, *kernel)), "bias": rng.standard_normal(outs)}
    constants |= norm_of(ins if first else outs, shift=not (first and transposed))
    attributes = {"group": groups, "strides": [draw(st.integers(1, 2))] * len(kernel)}
    if not first or transposed:
        attributes["pads"] = [draw(st.integers(0, 1)) for _ in range(2 * len(kernel))]
    elif draw(st.booleans()):
        attributes["auto_pad"] = '"VALID"'
    else:
        attributes["pads"] = [0] * (2 * len(kernel))
    op = "ConvTranspose" if transposed else "Conv"
    op += "<" + ", ".join(f"{name} = {value}" for name, value in attributes.items()) + ">"
    parameters = "w, bias" if draw(st.booleans()) else "w"
    nodes = [f"z = {op}(x, {parameters})", f"y = {NORM}(z, s, b, m, v)"]
    if first:
        nodes = [f"z = {NORM}(x, s, b, m, v)", f"y = {op}(z, {parameters})"]
    axes = ", ".join(f"L{i}" for i in range(len(kernel)))
    ends = ", ".join(f"K{i}" for i in range(len(kernel)))
    text = f"g (float[N, {ins}, {axes}] x) => (float[N, {outs}, {ends}] y) {{ {' '.join(nodes)} }}"
    x = rng.standard_normal((2, ins, *[5] * len(kernel))).astype(np.float32)
    return model_of(text, constants), x, "z" if first else "y"


@given(convolutions())
@settings(max_examples=150)
def test_convolutions_in_onnxruntime(drawn):
    model, x, name = drawn
    # float32 sums of at most 243 products, with factors of batch normalization of up to 10.
    check(model, x, folded=[name], how=run_in_onnxruntime, rtol=1e-4, atol=1e-3)


MATRICES = {
    "Gemm": "z = Gemm(x, w, c)",
    "Gemm without C": "z = Gemm(x, w)",
    "Gemm of transB": "z = Gemm<transB = 1, alpha = 0.5, beta = 2.0>(x, t, c)",
    "Gemm of alpha": "z = Gemm<alpha = 3.0, beta = 0.0>(x, w, c)",
    "Gemm with a scalar": "z = Gemm(x, w, scalar)",
    "Gemm with a row": "z = Gemm(x, w, row)",
    "MatMul": "z = MatMul(x, w)",
    "MatMul and Add": "p = MatMul(x, w) z = Add(p, row)",
    "Add and MatMul": "p = MatMul(x, w) z = Add(scalar, p)",
}


@pytest.mark.parametrize("how", [run, run_in_onnxruntime])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", MATRICES)
def test_matrices(name, norm_first, how):
    rng = np.random.default_rng(0)
    w, c = rng.standard_normal((4, 3)), rng.standard_normal(3)
    constants = {"w": w, "t": w.T, "c": c, "scalar": c[0], "row": c[None]}
    constants |= norm_of(4 if norm_first else 3)
    nodes, bn = MATRICES[name], f"{NORM}({{}}, s, b, m, v)"
    if norm_first:
        nodes = f"u = {bn.format('x')} {nodes.replace('(x', '(u').replace('z =', 'y =')}"
    else:
        nodes = f"{nodes} y = {bn.format('z')}"
    double = how is run
    kind = "double" if double else "float"
    text = f"g ({kind}[N, 4] x) => ({kind}[N, 3] y) {{ {nodes} }}"
    model = model_of(text, constants, dtype=np.float64 if double else np.float32)
    x = rng.standard_normal((5, 4)).astype(np.float64 if double else np.float32)
    close = {} if double else {"rtol": 1e-5, "atol": 2e-5}
    if norm_first and name == "MatMul":
        result = check(model, x, folded=[], left=["u"], how=how, **close)
        assert result.left["u"].endswith("MatMul, which comes after it, cannot take it")
    else:
        result = check(model, x, folded=["u" if norm_first else "y"], how=how, **close)
        expected = ["MatMul", "Add"] if "MatMul" in name else ["Gemm"]
        assert [node.op_type for node in result.model.graph.node] == expected
        assert len(result.model.graph.initializer) <= 6  # including the unused ones of the test


CONV = "g (double[N, 3, L] x) => (double[N, 3, M] y{more}) {{ {nodes} }}"
X = np.random.default_rng(1).standard_normal((2, 3, 6))
W = {"w": np.random.default_rng(2).standard_normal((3, 3, 2)), "w1": np.ones((3, 3, 1))}
W |= {"bias": np.arange(3.0)}


def conv_model(nodes, more="", **options):
    nodes = nodes.replace("NORM", NORM)
    return model_of(CONV.format(nodes=nodes, more=more), W | norm_of(3), **DOUBLE, **options)


# Operators of random graphs, and how often each is drawn, by the axes of x after the channels.
ANYWHERE = {"NORM({0}, s, b, m, v)": 4, "NORM({0}, s2, b2, m2, v2)": 2, "Relu({0})": 1}
ANYWHERE |= {"Identity({0})": 1, "Add({0}, {1})": 1}
OPS = {
    ", L": {
        "Conv({0}, w1)": 3,
        "Conv({0}, w2, bias)": 3,
        "Conv<pads = [1, 1]>({0}, w3)": 2,
        "ConvTranspose({0}, w4)": 1,  # no bias: with groups, ONNX applies the first group's to all
    },
    "": {
        "MatMul({0}, w5)": 4,
        "Add({0}, bias)": 3,
        "Add(bias, {0})": 1,
        "Gemm({0}, w5, bias)": 2,
        "Gemm<transB = 1, alpha = 0.5>({0}, w5)": 1,
    },
}


@pytest.mark.parametrize("axes", OPS)
@given(st.integers(0, 2**32 - 1), st.integers(1, 10))
@settings(max_examples=200)
def test_graphs_at_random(axes, seed, size):
    rng = np.random.default_rng(seed)
    ops, often = map(list, zip(*(ANYWHERE | OPS[axes]).items(), strict=True))
    values, nodes = ["x"], []
    for i in range(size):
        # Mostly the previous value, as in networks.
        operands = [values[-1] if rng.random() < 0.7 else rng.choice(values) for _ in range(2)]
        op = rng.choice(ops, p=np.array(often) / sum(often))
        nodes.append(f"n{i} = {op.format(*operands)}")
        values.append(f"n{i}")
    outputs = {values[-1], *rng.choice(values[1:], rng.integers(3))}
    results = ", ".join(f"double[N, 3{axes}] {name}" for name in sorted(outputs))
    body = " ".join(nodes).replace("NORM", NORM)
    text = f"g (double[N, 3{axes}] x) => ({results}) {{ {body} }}"
    constants = {"w1": np.eye(3)[:, :, None] + 0.1, "w2": rng.standard_normal((3, 3, 1)) / 2}
    constants |= {"w3": rng.standard_normal((3, 3, 3)) / 3, "w4": rng.uniform(0, 1, (3, 3, 1))}
    constants |= {"w5": rng.standard_normal((3, 3)), "bias": np.arange(3.0)} | norm_of(3)
    constants |= {f"{key}2": value for key, value in norm_of(3, 1, shift=False).items()}
    x = X if axes else X[..., 0]
    model = model_of(text, constants, **DOUBLE)
    norms = {n.output[0] for n in model.graph.node if n.op_type == "BatchNormalization"}
    expected = run(model, {"x": x})
    result = fold(model)
    checker.check_model(result.model, full_check=True)
    assert {*result.folded, *result.left} == norms
    assert not {*result.folded} & {*result.left}
    for comp, ref in zip(run(result.model, {"x": x}), expected, strict=True):
        # Values grow by a factor of at most 30 at each node.
        assert_allclose(comp, ref, rtol=1e-10, atol=1e-13 * 10.0**size)
    # Constants go that lost their last use, and no others.
    before, after = (
        {n for node in m.graph.node for n in node.input} for m in (model, result.model)
    )
    left = {tensor.name for tensor in result.model.graph.initializer}
    assert left == {*constants} - before | {n for n in after if n in constants or ".folded" in n}


def test_batch_normalizations_on_both_sides_and_in_chains():
    nodes = """
        a = NORM(x, s, b, m, v)
        c = NORM(a, s, b, m, v)
        d = Conv(c, w, bias)
        e = NORM(d, s, b, m, v)
        y = NORM(e, s, b, m, v)
    """
    result = check(conv_model(nodes), X, folded=["a", "c", "e", "y"], atol=1e-9)
    (node,) = result.model.graph.node
    assert node.input[0] == "x"
    assert [tensor.name for tensor in result.model.graph.initializer] == ["w1", *node.input[1:]]


def test_the_layer_before_is_preferred():
    nodes = "a = Conv(x, w) c = NORM(a, s, b, m, v) y = Conv(c, w1)"
    result = check(conv_model(nodes), X, folded=["c"])
    first, second = result.model.graph.node
    assert second.input[1] == "w1"
    assert first.input[1] != "w"


def test_shared_initializers_are_not_changed():
    nodes = "a = Conv(x, w) c = NORM(a, s, b, m, v) d = Relu(c) y = Conv(d, w, s)"
    result = check(conv_model(nodes), X, folded=["c"])
    names = {tensor.name for tensor in result.model.graph.initializer}
    assert {"w", "s"} <= names
    assert not {"b", "m", "v"} & names
    nodes = "a = Conv(x, w1) c = Conv(a, w1) d = NORM(c, s, b, m, v) y = Relu(d)"
    check(conv_model(nodes), X, folded=["d"])


def test_constant_nodes_and_identities():
    constant = "one = Constant<value = double[3] {1.0, 2.0, 3.0}>()"
    nodes = (
        f"{constant} k = Identity(w) k2 = Identity(k) a = Conv(x, k2) y = NORM(a, one, b, m, one)"
    )
    result = check(conv_model(nodes), X, folded=["y"])
    assert [node.op_type for node in result.model.graph.node] == ["Conv"]
    text = """g (float[N, 1, L] x) => (float[N, 1, L] y) {
        one = Constant<value_floats = [1.5]>() a = Conv(x, w) y = NORM(a, one, one, one, one) }"""
    model = model_of(text.replace("NORM", NORM), {"w": np.ones((1, 1, 1))})
    check(model, X[:, :1].astype(np.float32), folded=["y"], atol=1e-6)


def test_names_of_nodes_are_reported():
    model = conv_model("a = Conv(x, w) y = NORM(a, s, b, m, v)")
    model.graph.node[1].name = "norm"
    assert fold(model).folded == ("norm",)


def test_values_that_are_gone_have_no_type_left():
    model = conv_model("a = Conv(x, w) y = NORM(a, s, b, m, v)")
    shape = ["N", 3, "M"]
    model.graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.DOUBLE, shape))
    assert not fold(model).model.graph.value_info


CONDITION = """
g (double[N, 3, L] x, bool yes) => (double[N, 3, M] y) {
    o = Identity(x)
    y = If(yes) <
        then_branch = t () => (double[N, 3, M] r) {
            a = Conv(o, w)
            r = NORM(a, s, b, m, v)
        },
        else_branch = e () => (double[N, 3, M] r2) {
            k = Constant<value = double[3] {1.0, 2.0, 3.0}>()
            a = Conv(o, w)
            r2 = NORM(a, k, k, k, k)
        }
    >
}
"""


def test_branches_are_folded_with_constants_from_outside():
    model = model_of(CONDITION.replace("NORM", NORM), W | norm_of(3), **DOUBLE)
    for yes in (False, True):
        result = check(model, X, folded=["r", "r2"], yes=np.array(yes))
        branches = [attribute.g for attribute in result.model.graph.node[-1].attribute]
        assert [[n.op_type for n in graph.node] for graph in branches] == [["Conv"]] * 2
    assert {t.name for t in result.model.graph.initializer} == {"w1", "bias"}


SAME_NAMES = """
g (double[N, 3, L] x, bool yes) => (double[N, 3, M] y) {
    o = Relu(x)
    p = Conv(o, w1)
    y = If(yes) <
        then_branch = t () => (double[N, 3, M] z) { THEN },
        else_branch = e () => (double[N, 3, M] z) { ELSE }
    >
}
"""
FOLDS, STAYS_HERE = "a = Conv(o, w1) z = NORM(a, s, b, m, v)", "z = NORM(p, s, b, m, v)"


@pytest.mark.parametrize("then", [FOLDS, STAYS_HERE])
@pytest.mark.parametrize("other", [FOLDS, STAYS_HERE])
def test_each_of_the_same_name_is_reported(then, other):
    text = SAME_NAMES.replace("THEN", then).replace("ELSE", other).replace("NORM", NORM)
    model = model_of(text, W | norm_of(3), **DOUBLE)
    names = {"y/then_branch/z": then, "y/else_branch/z": other}
    folded = [name for name, branch in names.items() if branch == FOLDS]
    left = [name for name in names if name not in folded]
    for yes in (False, True):
        check(model, X, folded=folded, left=left, yes=np.array(yes))


def test_nodes_of_one_name_are_reported_by_their_results():
    model = conv_model("a = Conv(x, w) c = NORM(a, s, b, m, v) d = Relu(c) y = NORM(d, s, b, m, v)")
    model.graph.node[1].name = model.graph.node[3].name = "norm"
    check(model, X, folded=["c"], left=["y"])
    nodes = "a = Conv(x, w) c = NORM(a, s, b, m, v) d = Relu(c) e = NORM(d, s, b, m, v)"
    model = conv_model(f"{nodes} f = Relu(e) y = NORM(f, s, b, m, v)")
    model.graph.node[1].name = model.graph.node[3].name = "norm"
    model.graph.node[5].name = "c"
    result = fold(model)
    assert result.folded == ("/c",)
    assert [*result.left] == ["e", "c"]


def test_values_that_a_branch_uses_stay():
    text = """
    g (double[N, 3, L] x, bool yes) => (double[N, 3, M] y) {
        a = Conv(x, w)
        n = NORM(a, s, b, m, v)
        y = If(yes) <
            then_branch = t () => (double[N, 3, M] r) { r = Neg(a) },
            else_branch = e () => (double[N, 3, M] r2) { r2 = Neg(n) }
        >
    }
    """
    model = model_of(text.replace("NORM", NORM), W | norm_of(3), **DOUBLE)
    for yes in (False, True):
        result = check(model, X, folded=[], left=["n"], yes=np.array(yes))
    assert "a, its input, is used elsewhere" in result.left["n"]
    text = (
        text.replace("Neg(a)", "Conv(n, w1)")
        .replace("Conv(x, w)", "Relu(x)")
        .replace("Neg(n)", "Neg(x)")
    )
    model = model_of(text.replace("NORM", NORM), W | norm_of(3), **DOUBLE)
    result = check(model, X, folded=[], left=["n"], yes=np.array(True))
    assert "Relu, which comes before it, cannot take it; n, its result, is not" in result.left["n"]


STAYS = {
    "another consumer": (
        "a = Conv(x, w) y = NORM(a, s, b, m, v) z = Neg(a)",
        ", double[N, 3, M] z",
        "a, its input, is used elsewhere, too",
    ),
    "an output": (
        "z = Conv(x, w) y = NORM(z, s, b, m, v)",
        ", double[N, 3, M] z",
        "z, its input, is used elsewhere, too",
    ),
    "an output that is normalised": (
        "z = NORM(x, s, b, m, v) y = Conv(z, w)",
        ", double[N, 3, L] z",
        "z, its result, is not the input of just one operator",
    ),
    "two layers": (
        "a = NORM(x, s, b, m, v) y = Conv(a, w) z = Conv(a, w1)",
        ", double[N, 3, L] z",
        "a, its result, is not the input of just one operator",
    ),
    "an activation": (
        "a = Conv(x, w) c = Relu(a) y = NORM(c, s, b, m, v)",
        "",
        "Relu, which comes before it, cannot take it",
    ),
    "padding": (
        "a = NORM(x, s, b, m, v) y = Conv<pads = [1, 0]>(a, w)",
        "",
        "padding is [1, 0], but zeros",
    ),
    "automatic padding": (
        'a = NORM(x, s, b, m, v) y = Conv<auto_pad = "SAME_UPPER">(a, w)',
        "",
        "padding is 'same', but zeros",
    ),
    "a transposed convolution": (
        "a = NORM(x, s, b, m, v) y = ConvTranspose(a, w)",
        "",
        "a transposed convolution adds the shift",
    ),
    "computed weights": (
        "k = Neg(w) a = Conv(x, k) y = NORM(a, s, b, m, v)",
        "",
        "k is not a constant",
    ),
    "computed statistics": (
        "k = Neg(m) a = Conv(x, w) y = NORM(a, s, b, k, v)",
        "",
        "k is not a constant",
    ),
    "another operator set": (
        "a = Conv(x, w) y = BatchNormalization<training_mode = 0>(a, s, b, x, v)",
        "",
        "x is an input of the graph, which callers may set",
    ),
}


@pytest.mark.parametrize("case", STAYS)
def test_what_stays(case):
    nodes, more, reason = STAYS[case]
    model = conv_model(nodes, more)
    name = next(n.output[0] for n in model.graph.node if n.op_type == "BatchNormalization")
    if "x," in nodes.partition("s, b, ")[2]:
        result = fold(model)
        assert result.folded == ()
    else:
        result = check(model, X, folded=[], left=[name])
    assert reason in result.left[name]


def test_a_shift_of_0_may_be_padded():
    for op in ("Conv<pads = [1, 0]>", "ConvTranspose<strides = [2]>"):
        text = CONV.format(nodes=f"a = {NORM}(x, s, b, m, v) y = {op}(a, w)", more="")
        check(model_of(text, W | norm_of(3, shift=False), **DOUBLE), X, folded=["a"])


def test_initializers_that_callers_may_set_stay():
    model = conv_model("a = Conv(x, w) y = NORM(a, s, b, m, v)")
    for name in ("w", "s"):
        given = ModelProto()
        given.CopyFrom(model)
        info = helper.make_tensor_value_info(
            name, TensorProto.DOUBLE, np.shape({**W, "s": [1] * 3}[name])
        )
        given.graph.input.append(info)
        result = check(given, X, folded=[], left=["y"])
        match = f"{name} is an input of the graph, which callers may set; take it off graph.input"
        assert match in result.left["y"]
    old = ModelProto()
    old.CopyFrom(model)
    old.ir_version = 3
    assert "with IR version 3 initializers are inputs" in fold(old).left["y"]


@pytest.mark.parametrize(
    ("opset", "attributes", "outputs", "folds"),
    [
        (15, "", "y", True),
        (14, "<training_mode = 0>", "y", True),
        (14, "<training_mode = 1>", "y, p, q", False),
        (14, "<training_mode = 1>", "y", False),
        (9, "", "y", True),
        (9, "", "y, p, q, i, j", False),
        (7, "", "y", True),
        (7, "<spatial = 0>", "y", False),
        (6, "<is_test = 1>", "y", True),
        (6, "", "y", False),
        (6, "<is_test = 1, spatial = 0>", "y", False),
    ],
)
def test_modes_of_every_version(opset, attributes, outputs, folds):
    nodes = f"a = Conv(x, w) {outputs} = BatchNormalization{attributes}(a, s, b, m, v)"
    model = conv_model(nodes, opset=opset)
    result = fold(model)
    assert result.folded == (("y",) if folds else ())
    if folds:
        assert [node.op_type for node in result.model.graph.node] == ["Conv"]
        assert_allclose(run(result.model, {"x": X}), run(model, {"x": X}), rtol=1e-12, atol=1e-12)
    else:
        assert result.model == model
        expected = "every activation" if "spatial" in attributes else "it is in training mode"
        assert expected in result.left["y"]


@pytest.mark.parametrize("shape", [["N", 4], ["N", 3, 4], ["N", 2, 3, 4], None])
def test_matmul_needs_two_axes(shape):
    rng, rank = np.random.default_rng(0), len(shape or ["N", 4])
    channels = {2: None, 3: 3, 4: 2}[rank]
    axes, results = (", ".join(map(str, [*(shape or ["N"])[:-1], c])) for c in (4, 3))
    signature = f"(double[{axes}] x) => (double[{results}] y)"
    reshape = "r = Identity(x)"
    if shape is None:  # a matrix, but only at run time
        signature = "(double[N, 4] x, int64[K] to) => (double[A, B] y)"
        reshape = "r = Reshape(x, to)"
    constants = {"w": rng.standard_normal((4, 3)), "c": rng.standard_normal(3)}
    for name, nodes, last in (
        ("y", f"p = MatMul(r, w) z = Add(p, c) y = {NORM}(z, s, b, m, v)", 3),
        ("y", f"p = MatMul(r, w) y = {NORM}(p, s, b, m, v)", 3),
        ("n", f"n = {NORM}(r, s, b, m, v) p = MatMul(n, w) y = Add(p, c)", 4),
    ):
        text = f"g {signature} {{ {reshape} {nodes} }}"
        model = model_of(text, constants | norm_of(channels or last), **DOUBLE)
        feeds = {} if shape else {"to": np.array([5, 4])}
        x = rng.standard_normal([5, *(shape or ["N", 4])[1:]])
        if shape and rank == 2:
            check(model, x, folded=[name], **feeds)
        else:
            result = check(model, x, folded=[], left=[name], **feeds)
            assert "is not known to have two axes" in result.left[name]


def test_biases_that_differ_by_row_stay():
    for c in (np.ones((5, 3)), np.ones((5, 1)), np.ones((1, 1, 3))):
        for nodes in ("z = Gemm(x, w, c)", "p = MatMul(x, w) z = Add(p, c)"):
            if c.ndim > 2 and "Gemm" in nodes:
                continue
            text = f"g (double[5, 4] x) => (double y) {{ {nodes} y = {NORM}(z, s, b, m, v) }}"
            channels = norm_of(5 if c.ndim > 2 else 3)
            model = model_of(text, {"w": np.ones((4, 3)), "c": c} | channels, **DOUBLE)
            result = fold(model)
            assert result.folded == ()
            assert "is not one value per channel" in result.left["y"]


def test_a_gemm_that_transposes_its_input():
    rng = np.random.default_rng(0)
    constants = {"w": rng.standard_normal((4, 3))} | norm_of(3)
    nodes = f"z = Gemm<transA = 1>(x, w) y = {NORM}(z, s, b, m, v)"
    x = rng.standard_normal((4, 5))
    text = f"g (double[4, N] x) => (double[N, 3] y) {{ {nodes} }}"
    check(model_of(text, constants, **DOUBLE), x, folded=["y"])
    nodes = f"z = {NORM}(x, s, b, m, v) y = Gemm<transA = 1>(z, w)"
    text = f"g (double[4, N] x) => (double[N, 3] y) {{ {nodes} }}"
    model = model_of(text, constants | norm_of(5), **DOUBLE)
    result = check(model, x, folded=[], left=["z"])
    assert "the Gemm after it transposes" in result.left["z"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, bfloat16])
@pytest.mark.parametrize("of_norm", [np.float32, np.float64])
def test_dtypes(dtype, of_norm):
    nodes = f"a = Conv(x, w, bias) y = {NORM}(a, s, b, m, v)"
    name = np.dtype(dtype).name
    kind = {"float32": "float", "float64": "double"}.get(name, name)
    text = CONV.format(nodes=nodes, more="").replace("double", kind)
    model = model_of(text, W, dtype=dtype, opset=22, ir=10)  # the first opset with bfloat16
    for key, array in norm_of(3).items():
        model.graph.initializer.append(numpy_helper.from_array(array.astype(of_norm), key))
    result = fold(model)
    checker.check_model(result.model, full_check=True)
    arrays = {t.name: numpy_helper.to_array(t) for t in result.model.graph.initializer}
    weight, bias = (arrays[key] for key in result.model.graph.node[0].input[1:])
    assert weight.dtype == bias.dtype == dtype
    bn = {key: array.astype(of_norm).astype(np.float64) for key, array in norm_of(3).items()}
    scale = bn["s"] / np.sqrt(bn["v"] + np.float32(EPS))
    exact = scale[:, None, None] * W["w"].astype(dtype).astype(np.float64)
    unit = {"float32": 2.0**-24, "float64": 2.0**-51, "float16": 2.0**-11}.get(name, 2.0**-8)
    assert_allclose(weight.astype(np.float64), exact, rtol=1.01 * unit, atol=0)


def test_weights_in_other_files_stay():
    model = conv_model("a = Conv(x, w) y = NORM(a, s, b, m, v)")
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "w")
    external_data_helper.set_external_data(weight, "weights.bin")
    weight.ClearField("raw_data")
    assert "w is in an external file, which was not loaded" in fold(model).left["y"]


def test_other_objects_are_refused():
    with pytest.raises(TypeError, match=r"model must be an onnx\.ModelProto, got str"):
        fold("model.onnx")
    model = conv_model("y = Relu(x)")
    assert fold(model)[1:] == ((), {})
    model.training_info.add()
    with pytest.raises(ValueError, match="model has training_info, expected a model for infere"):
        fold(model)


NETWORK = """
g (float[N, 3, H, W] x) => (float[N, 5] y) {
    n0 = NORM(x, s0, b0, m0, v0)
    a = Conv<kernel_shape = [3, 3]>(n0, w0)
    n1 = NORM(a, s1, b1, m1, v1)
    r = Relu(n1)
    c = Conv<pads = [1, 1, 1, 1]>(r, w1, bias)
    n2 = NORM(c, s1, b1, m1, v1)
    d = Add(n2, r)
    n3 = NORM(d, s1, b1, m1, v1)
    e = Conv<pads = [1, 1, 1, 1]>(n3, w1, bias)
    p = GlobalAveragePool(e)
    f = Flatten(p)
    n4 = NORM(f, s1, b1, m1, v1)
    h = Gemm(n4, w2)
    y = NORM(h, s2, b2, m2, v2)
}
"""


def test_a_network_in_onnxruntime():
    rng = np.random.default_rng(0)
    constants = {
        "w0": rng.standard_normal((6, 3, 3, 3)), "w1": rng.standard_normal((6, 6, 3, 3)),
        "w2": rng.standard_normal((6, 5)), "bias": rng.standard_normal(6),
    }  # fmt: skip
    for i, channels in enumerate((3, 6, 5)):
        constants |= {f"{key}{i}": array for key, array in norm_of(channels, i).items()}
    model = model_of(NETWORK.replace("NORM", NORM), constants)
    x = rng.standard_normal((2, 3, 8, 9)).astype(np.float32)
    folded = ["n0", "n1", "n2", "n4", "y"]
    # Three sums of 54 products in a row, with factors of batch normalization of up to 10.
    options = {"how": run_in_onnxruntime, "rtol": 1e-4, "atol": 1e-2}
    result = check(model, x, folded=folded, left=["n3"], **options)
    assert "padding is [1, 1, 1, 1], but" in result.left["n3"]
    assert [*fold(result.model).left] == ["n3"]
