"""nbnorm.integrations.mygrad: tensors through batch normalization, and gradients back."""

import doctest
import gc
import re

import numpy as np
import pytest
from autodiff import (
    ACTIVATIONS,
    FUSED,
    LAYOUTS,
    assert_like_with_like,
    assert_moved_once,
    assert_right,
    assert_right_through,
    drawn,
    run_example,
)
from children import run_child
from tolerances import assert_same_bits

mg = pytest.importorskip("mygrad", reason="the integration of mygrad needs mygrad")

from mygrad.nnet import batchnorm  # noqa: E402

import nbnorm  # noqa: E402
import nbnorm.integrations.mygrad as integration  # noqa: E402
from nbnorm.integrations.mygrad import batch_norm  # noqa: E402

layouts = pytest.mark.parametrize("layout", LAYOUTS)
fused = pytest.mark.parametrize("fused", FUSED)
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
affine = pytest.mark.parametrize(
    ("gamma", "beta"), [(True, True), (True, False), (False, True), (False, False)]
)
LARGE = (1024, 64, 2, 2)  # 2 MiB in float64: memory of results is pooled


def test_gradients_have_no_graph_and_second_derivatives_take_arrays():
    """mygrad differentiates once: a penalty needs `batch_norm_double_backward`."""
    rng = np.random.default_rng(0)
    x, gamma = mg.tensor(rng.normal(size=(6, 3))), mg.tensor(rng.uniform(1, 2, 3))
    direction = rng.normal(size=(6, 3))

    def penalty():
        """Half the squared gradient of sum(direction * y)."""
        batch_norm(x, gamma).backward(direction)
        assert type(x.grad) is np.ndarray  # which is not part of mygrad's graph
        return np.sum(x.grad**2) / 2

    value = penalty()
    _, mean, rstd = nbnorm.batch_norm_forward(x.data, gamma.data)
    arguments = x.grad, None, None, direction, x.data, gamma.data, mean, rstd
    found = nbnorm.batch_norm_double_backward(*arguments)
    gamma.data[1] += 1e-6
    assert (penalty() - value) / 1e-6 == pytest.approx(found.dgamma[1], rel=1e-4)
    for i, name in ((0, "ddx"), (3, "dy"), (4, "x"), (5, "gamma")):
        tensors = [*arguments[:i], mg.tensor(arguments[i]), *arguments[i + 1 :]]
        with pytest.raises(TypeError, match=f"^{name} is a mygrad tensor, whose gradient would"):
            nbnorm.batch_norm_double_backward(*tensors)


@pytest.fixture
def backward_calls(monkeypatch):
    """Record the masks of the backward passes."""
    masks = []
    backward = integration.batch_norm_backward

    def counted(*args, **kwargs):
        masks.append(kwargs["output_mask"])
        return backward(*args, **kwargs)

    monkeypatch.setattr(integration, "batch_norm_backward", counted)
    return masks


def tensors(b, varied=None):
    """Return tensors on b's memory, constant except those named (None: all variable)."""
    return {
        name: mg.tensor(array, copy=False, constant=varied is not None and name not in varied)
        for name, array in b.differentiable.items()
    }


def differentiate(b, varied=None, **options):
    """Return y as an array, and the gradients by name."""
    given = tensors(b, varied)
    y = batch_norm(**given, **options)
    y.backward(b.dy)
    return y.data, {n: tensor.grad for n, tensor in given.items() if tensor.grad is not None}


def frozen(b):
    """Return arguments for evaluation."""
    return {"running_mean": b.running_mean, "running_var": b.running_var, "training": False}


# Values and gradients


@layouts
@fused
@modes
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_values_and_gradients(layout, fused, training, dtype):
    residual, activation = FUSED[fused]
    b, axis = drawn(layout, dtype, residual=residual), LAYOUTS[layout][1]
    options = {} if training else frozen(b)
    y, grads = differentiate(b, axis=axis, activation=activation, eps=1e-3, **options)
    assert set(grads) == set(b.differentiable)
    assert_right(b, y, grads, axis=axis, training=training, activation=activation, eps=1e-3)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("residual", [False, True])
@modes
def test_other_activations(activation, residual, training):
    b = drawn(residual=residual)
    options = {} if training else frozen(b)
    y, grads = differentiate(b, activation=activation, **options)
    assert set(grads) == set(b.differentiable)
    assert_right_through(b, y, grads, training=training, activation=activation)


@fused
@modes
@affine
def test_gradients_agree_with_differences(fused, training, gamma, beta):
    """Central differences along random directions: errors h^2 and 2^-52 / h, of terms near 1."""
    residual, activation = FUSED[fused]
    b = drawn(gamma=gamma, beta=beta, residual=residual)
    options = {"activation": activation, **({} if training else frozen(b))}
    _, grads = differentiate(b, **options)
    rng, h = np.random.default_rng(1), 1e-5
    for name, array in b.differentiable.items():
        direction = rng.standard_normal(array.shape)
        above, below = (
            np.sum(
                b.dy * batch_norm(**b.differentiable | {name: array + step * direction}, **options)
            )
            for step in (h, -h)
        )
        expected = float((above - below).data) / (2 * h)
        assert abs(np.sum(grads[name] * direction) - expected) < 1e-7 * (1 + abs(expected))


@affine
def test_agrees_with_batchnorm_of_mygrad(gamma, beta):
    b = drawn(gamma=gamma, beta=beta)
    ours = differentiate(b, eps=1e-3)
    theirs = tensors(b)
    y = batchnorm(**theirs, eps=1e-3)
    y.backward(b.dy)
    np.testing.assert_allclose(ours[0], y.data, rtol=1e-12, atol=1e-12)
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[1][name], tensor.grad, rtol=1e-12, atol=1e-12)


@fused
def test_half_precision(fused):
    """Gradients have the dtypes of their tensors; in float32 they equal nbnorm's own."""
    residual, activation = FUSED[fused]
    b = drawn(dtype="float16", residual=residual)
    b = b._replace(gamma=b.gamma.astype("float32"), beta=b.beta.astype("float64"))
    y, grads = differentiate(b, activation=activation)
    wide = b._replace(**{n: a.astype("float32") for n, a in b.differentiable.items()})
    wide = wide._replace(dy=b.dy.astype("float32"))
    _, expected = differentiate(wide, activation=activation)
    assert y.dtype == "float16"
    for name, array in b.differentiable.items():
        assert grads[name].dtype == array.dtype
        unit = np.finfo(b.x.dtype).eps
        scale = 1 + np.abs(expected[name]).max()
        assert np.abs(grads[name].astype("float64") - expected[name]).max() <= 4 * unit * scale


def test_numbers_and_arrays_are_constants():
    b = drawn("NC")
    x = mg.tensor(b.x, copy=False)
    y = batch_norm(x, [1.0, 2.0, 3.0, 4.0], b.beta)
    y.backward(b.dy)
    same = b._replace(gamma=np.arange(1.0, 5.0))
    assert_right(same, y.data, {"x": x.grad}, axis=1)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_one_tensor_as_x_and_residual(activation):
    b = drawn(beta=False)
    x = mg.tensor(b.x, copy=False)
    batch_norm(x, b.gamma, residual=x, activation=activation).backward(b.dy)
    _, apart = differentiate(b._replace(residual=b.x), activation=activation)
    assert_same_bits(x.grad, apart["x"] + apart["residual"])


@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradients_add_up_over_the_graph(activation):
    b = drawn(residual=True)
    given = tensors(b)
    x, residual = given["x"], given["residual"]
    y = batch_norm(**given, activation=activation)
    (y * b.dy + 2 * x + 3 * residual).sum().backward()
    _, expected = differentiate(b, activation=activation)
    np.testing.assert_allclose(x.grad, expected["x"] + 2, rtol=1e-15)
    np.testing.assert_allclose(residual.grad, expected["residual"] + 3, rtol=1e-15)
    assert_same_bits(y.grad, b.dy)  # residual.grad must not share its memory


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training):
    b = drawn(shape=(0, 3, 2))
    y, grads = differentiate(b, activation="relu", **({} if training else frozen(b)))
    assert y.shape == grads["x"].shape == (0, 3, 2)
    assert not grads["gamma"].any()
    assert not grads["beta"].any()


# Number of calls and copies


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(
    "names",
    [
        ("x",),
        ("gamma",),
        ("beta",),
        ("residual",),
        ("x", "gamma"),
        ("gamma", "beta"),
        ("beta", "residual"),
        ("x", "gamma", "beta", "residual"),
    ],
    ids=" ".join,
)
def test_one_backward_pass_for_what_is_not_constant(backward_calls, names, activation):
    b = drawn(residual=True)
    y, grads = differentiate(b, names, activation=activation)
    assert backward_calls == [tuple(n in names for n in ("x", "gamma", "beta", "residual"))]
    assert set(grads) == set(names)
    assert_right(b, y, grads, axis=1, activation=activation)


@pytest.mark.parametrize("constant", [None, True])
def test_a_constant_result(backward_calls, constant):
    b = drawn()
    given = tensors(b, () if constant is None else None)
    y = batch_norm(**given, constant=constant)
    assert y.constant
    y.backward(b.dy)
    assert backward_calls == []
    assert all(tensor.grad is None for tensor in given.values())


def test_a_variable_result_of_constants(backward_calls):
    b = drawn()
    y = batch_norm(b.x, b.gamma, b.beta, constant=False)
    assert not y.constant
    (y * b.dy).sum().backward()
    assert backward_calls == [(False,) * 4]
    assert_same_bits(y.grad, b.dy)


def test_without_autodiff_it_is_the_function():
    b = drawn()
    with mg.no_autodiff:
        y = batch_norm(mg.tensor(b.x), b.gamma, b.beta, activation="relu")
    assert y.creator is None
    assert_right(b, y.data, {}, axis=1, activation="relu")


@layouts
@pytest.mark.parametrize("correction", [0, 1])
def test_running_statistics_are_moved_once(layout, correction):
    b, axis = drawn(layout), LAYOUTS[layout][1]
    running = b.running_mean, b.running_var
    before = [array.copy() for array in running]
    differentiate(
        b, running_mean=running[0], running_var=running[1], axis=axis, momentum=0.3,
        correction=correction,
    )  # fmt: skip
    assert_moved_once(before, running, b.x, axis=axis, momentum=0.3, correction=correction)


def test_evaluation_is_at_the_statistics_that_normalised():
    b = drawn()
    given = tensors(b)
    y = batch_norm(**given, **frozen(b))
    before = b._replace(running_mean=b.running_mean.copy(), running_var=b.running_var.copy())
    b.running_mean[:] = 7
    b.running_var[:] = 7
    y.backward(b.dy)
    assert_right(before, y.data, {"x": given["x"].grad}, axis=1, training=False)


# Memory


def test_nothing_is_copied(monkeypatch):
    """nbnorm receives the tensors' arrays, and tensors hold the arrays that it returns."""
    seen = []
    forward, backward = integration.batch_norm_forward, integration.batch_norm_backward

    def look(**kwargs):
        seen.append((kwargs["x"], forward(**kwargs)))
        return seen[-1][1]

    def look_back(dy, x, gamma, mean, rstd, **kwargs):
        seen.append((x, mean, rstd, backward(dy, x, gamma, mean, rstd, **kwargs)))
        return seen[-1][-1]

    monkeypatch.setattr(integration, "batch_norm_forward", look)
    monkeypatch.setattr(integration, "batch_norm_backward", look_back)
    b = drawn(shape=LARGE)
    given = tensors(b)
    y = batch_norm(**given)
    y.backward(b.dy)
    (x, result), (x_again, mean, rstd, grads) = seen
    assert x is x_again is b.x
    assert y.data is result.y
    assert mean is result.mean
    assert rstd is result.rstd
    assert given["x"].grad is grads.dx


@fused
def test_y_is_read_only_where_its_mask_is_needed(monkeypatch, fused):
    residual, activation = FUSED[fused]
    read = []
    backward = integration.batch_norm_backward

    def look(*args, y, **kwargs):
        read.append(y)
        return backward(*args, y=y, **kwargs)

    monkeypatch.setattr(integration, "batch_norm_backward", look)
    y, _ = differentiate(drawn(residual=residual), activation=activation)
    (given,) = read
    assert given is (y if fused == "residual and relu" else None)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_memory_is_locked_as_long_as_the_graph_lives(activation):
    """mygrad locks arrays and their bases, and ignores an exception if it cannot unlock one."""
    b = drawn(shape=LARGE, residual=True)
    given = {name: mg.tensor(array) for name, array in b.differentiable.items()}
    y = batch_norm(**given, activation=activation)
    z = y * b.dy
    arrays = [y.data, *(tensor.data for tensor in given.values())]
    assert not any(array.flags.writeable for array in arrays)
    z.sum().backward()
    del z
    gc.collect()
    assert all(array.flags.writeable for array in arrays)


def test_an_error_releases_the_memory():
    x = mg.tensor(drawn().x)
    with pytest.raises(ValueError, match="eps must be finite"):
        batch_norm(x, eps=-1.0)
    assert x.data.flags.writeable


@fused
def test_tensors_that_are_written_to_afterwards(fused):
    """Gradients use the values before the write."""
    residual, activation = FUSED[fused]
    b = drawn(residual=residual)
    weights = {name: mg.tensor(array) for name, array in b.differentiable.items()}
    inside = {name: tensor * 1.0 for name, tensor in weights.items()}
    y = batch_norm(**inside, activation=activation)
    loss = (y * b.dy).sum()
    for tensor in (y, *inside.values()):
        tensor *= -3.0
    loss.backward()
    grads = {name: tensor.grad for name, tensor in weights.items()}
    y, _ = differentiate(b, activation=activation)
    assert_right(b, y, grads, axis=1, activation=activation)


# Errors


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"gamma": np.ones(4)}, ValueError, r"^gamma has shape \(4,\), expected \(3,\)"),
        ({"running_var": None}, ValueError, "^running_var is None"),
        (
            {"running_mean": mg.zeros(3)},
            TypeError,
            "^running_mean is a mygrad tensor.* its data",
        ),
        ({"residual": np.ones((4, 3, 5, 1))}, ValueError, "^residual has shape"),
        ({"residual": np.ones((4, 3, 5, 6), "float32")}, TypeError, "^residual has dtype float32"),
        ({"x": np.ones((4, 3), int)}, TypeError, "^x has dtype int64"),
        ({"x": None}, TypeError, r"numpy\.object_"),
        ({"x": 1.0}, ValueError, "^x must have at least 2 dimensions"),
        ({"axis": 4}, ValueError, "^axis 4 is out of range"),
        ({"activation": "elu"}, ValueError, "^activation must be"),
        ({"constant": 1}, TypeError, "^constant must be a bool or None, got 1"),
        ({"momentum": float("nan")}, ValueError, "^momentum must be finite"),
        (
            {"gamma": (shared := mg.tensor(np.ones(3))), "running_var": shared.data},
            ValueError,
            "^running_var is read-only",  # mygrad locks the arrays of its tensors
        ),
    ],
)
def test_errors_leave_the_statistics_alone(given, error, message):
    b = drawn()
    arguments = {"x": mg.tensor(b.x), "running_mean": b.running_mean, "running_var": b.running_var}
    before = b.running_mean.copy(), b.running_var.copy()
    with pytest.raises(error, match=message):
        batch_norm(**arguments | given)
    assert_same_bits(b.running_mean, before[0])
    assert_same_bits(b.running_var, before[1])


@pytest.mark.parametrize("name", ["x", "gamma", "out"])
def test_tensors_given_to_the_function_itself_are_sent_here(name):
    b = drawn()
    arguments = {"x": b.x, "gamma": b.gamma, "out": np.empty_like(b.x)}
    tensor = mg.tensor(arguments[name])
    with pytest.raises(
        TypeError, match=rf"^{name} is a .*mygrad.*use nbnorm\.integrations\.mygrad"
    ):
        nbnorm.batch_norm_forward(**arguments | {name: tensor})
    nbnorm.batch_norm_forward(**arguments | {name: tensor.data})


# Imports, examples, benchmarks


def test_importing_it_imports_no_other_host():
    code = (
        "import sys, nbnorm.integrations; assert 'mygrad' not in sys.modules\n"
        "import nbnorm.integrations.mygrad\n"
        "assert not {'torch', 'autograd', 'thinc', 'onnx'} & set(sys.modules)"
    )
    run_child("-c", code)


def test_doctests():
    failed, attempted = doctest.testmod(integration)
    assert failed == 0
    assert attempted > 4


def test_example():
    """Chance accuracy is a tenth, and its loss log(10) = 2.3."""
    with_bn, without = run_example("mygrad_mlp.py", "--steps", "100")
    assert with_bn.last_loss < 0.5 * with_bn.first_loss
    assert with_bn.accuracy > 0.6
    assert with_bn.accuracy > without.accuracy


@pytest.mark.parametrize("shape", [(60, 7), (3, 5, 4, 6)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_benchmark_compares_like_with_like(shape, dtype):
    from benchmarks.hosts import mygrad as host

    assert re.fullmatch(r"mygrad \d+\.\d+\S*", host.name())
    assert_like_with_like(host.calls(shape, dtype), shape, dtype)
