"""nbnorm.integrations.autograd: HIPS autograd differentiates batch normalization."""

import doctest
import re
import weakref
from itertools import product

import numpy as onp
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
from of_users import doubled, squared
from tolerances import assert_same_bits

pytest.importorskip("autograd", reason="the integration of autograd needs autograd")

import autograd.numpy as np
from autograd import elementwise_grad, grad, jacobian, make_jvp, make_vjp
from autograd.scipy.special import erf
from autograd.test_util import check_grads

import nbnorm
import nbnorm.integrations.autograd as integration
from nbnorm.integrations.autograd import batch_norm

layouts = pytest.mark.parametrize("layout", LAYOUTS)
fused = pytest.mark.parametrize("fused", FUSED)
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


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


def function_of(b, names, **options):
    """Return `batch_norm` as a function of the named arrays of b."""

    def function(*arrays):
        given = b.differentiable | dict(zip(names, arrays, strict=True))
        return batch_norm(**given, **options)

    return function


def differentiate(b, names=None, **options):
    """Return y and the gradients by name."""
    names = tuple(b.differentiable) if names is None else names
    arrays = [b.differentiable[name] for name in names]
    function = function_of(b, names, **options)
    if len(names) == 1:  # not in a tuple: autograd adds gradients into zeros of the argument's type
        vjp, y = make_vjp(function)(*arrays)
        return y, {names[0]: vjp(b.dy)}
    vjp, y = make_vjp(function, argnum=tuple(range(len(names))))(*arrays)
    return y, dict(zip(names, vjp(b.dy), strict=True))


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
    function = function_of(b, tuple(b.differentiable), activation=activation, **options)
    for i in range(len(b.differentiable)):
        check_grads(function, i, modes=["rev"], order=1)(*b.differentiable.values())


@layouts
@fused
@modes
@pytest.mark.parametrize(
    ("gamma", "beta"), [(True, True), (True, False), (False, True), (False, False)]
)
def test_check_grads(layout, fused, training, gamma, beta):
    residual, activation = FUSED[fused]
    b = drawn(layout, gamma=gamma, beta=beta, residual=residual)
    options = {} if training else frozen(b)
    names = tuple(b.differentiable)
    function = function_of(b, names, axis=LAYOUTS[layout][1], activation=activation, **options)
    onp.random.seed(0)  # noqa: NPY002 - autograd draws its directions from it
    check_grads(function, modes=["rev"], order=1)(*b.differentiable.values())
    for i in range(len(names)):
        check_grads(function, i, modes=["rev"], order=1)(*b.differentiable.values())


@fused
def test_half_precision(fused):
    """Gradients have the dtypes of their arrays; in float32 they equal nbnorm's own."""
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
        unit = onp.finfo(b.x.dtype).eps
        scale = 1 + onp.abs(expected[name]).max()
        assert onp.abs(grads[name].astype("float64") - expected[name]).max() <= 4 * unit * scale


@pytest.mark.parametrize("name", ["gamma", "beta"])
def test_parameters_of_two_dtypes(name):
    b = drawn(dtype="float32")
    wide = b._replace(**{name: b.differentiable[name].astype("float64")})
    _, grads = differentiate(wide, (name,))
    assert grads[name].dtype == "float64"
    _, expected = differentiate(b, (name,))
    assert_same_bits(grads[name].astype("float32"), expected[name])


def test_a_loss_in_another_dtype():
    """The gradient of y has the loss's dtype, that of x has x's."""
    b = drawn(dtype="float32", residual=True)
    weights = b.dy.astype("float64")
    for activation in (None, "relu"):
        function = function_of(b, ("x", "residual"), activation=activation)
        dx, dresidual = grad(lambda *arrays: np.sum(weights * function(*arrays)), (0, 1))(  # noqa: B023
            b.x, b.residual
        )
        _, expected = differentiate(b, ("x", "residual"), activation=activation)
        assert_same_bits(dx, expected["x"])
        assert_same_bits(dresidual, expected["residual"])


def test_one_array_as_x_and_residual():
    b = drawn(residual=True)
    together = elementwise_grad(lambda x: b.dy * batch_norm(x, b.gamma, residual=x))(b.x)
    _, apart = differentiate(b._replace(residual=b.x, beta=None))
    assert_same_bits(together, apart["x"] + apart["residual"])


def test_channels_last_memory():
    b = drawn("channels-last")
    turned = b._replace(x=onp.moveaxis(b.x, -1, 1), dy=onp.moveaxis(b.dy, -1, 1))
    y, grads = differentiate(turned, ("x",))
    assert y.strides == grads["x"].strides == turned.x.strides
    assert_right(turned, y, grads, axis=1)


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training):
    b = drawn(shape=(0, 3, 2))
    y, grads = differentiate(b, activation="relu", **({} if training else frozen(b)))
    assert y.shape == grads["x"].shape == (0, 3, 2)
    assert not grads["gamma"].any()
    assert not grads["beta"].any()


def test_without_a_derivative_it_is_the_function():
    b = drawn()
    y = batch_norm(b.x, b.gamma, b.beta, activation="relu")
    assert type(y) is onp.ndarray
    assert_right(b, y, {}, axis=1, activation="relu")


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
def test_one_backward_pass_for_what_is_asked(backward_calls, names, activation):
    b = drawn(residual=True)
    y, grads = differentiate(b, names, activation=activation)
    mask = tuple(name in names for name in ("x", "gamma", "beta", "residual"))
    if activation is None:  # the gradient of a term that is only added is dy
        mask = (*mask[:3], False)
        if names == ("residual",):
            assert grads["residual"] is b.dy
    assert backward_calls == ([mask] if any(mask) else [])
    assert_right(b, y, grads, axis=1, activation=activation)


def test_one_backward_pass_for_each_row_of_a_jacobian(backward_calls):
    b = drawn("NC")
    rows = jacobian(lambda beta: batch_norm(b.x, b.gamma, beta))(b.beta)
    assert len(backward_calls) == b.x.size
    assert_same_bits(rows, onp.broadcast_to(onp.eye(4), (9, 4, 4)))


def test_the_forward_runs_once_and_its_statistics_are_used(monkeypatch):
    seen, given = [], []
    forward, backward = integration.batch_norm_forward, integration.batch_norm_backward

    def look(x, *args, **kwargs):
        seen.append((x, forward(x, *args, **kwargs)))
        return seen[-1][1]

    def look_back(dy, x, gamma, mean, rstd, **kwargs):
        given.append((x, gamma, mean, rstd))
        return backward(dy, x, gamma, mean, rstd, **kwargs)

    monkeypatch.setattr(integration, "batch_norm_forward", look)
    monkeypatch.setattr(integration, "batch_norm_backward", look_back)
    b = drawn()
    y, _ = differentiate(b)
    ((x, forward_result),) = seen
    ((x_again, gamma, mean, rstd),) = given
    assert x is x_again is b.x  # nothing is copied
    assert gamma is b.gamma
    assert y is forward_result.y
    assert mean is forward_result.mean
    assert rstd is forward_result.rstd


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("residual", [False, True])
def test_y_is_kept_only_where_its_mask_is_needed(residual, activation):
    b = drawn(residual=residual)
    kept = []

    def function(x):
        y = batch_norm(x, residual=b.residual, activation=activation)
        kept.append(weakref.ref(y._value))
        return np.sum(y)  # needs only y's shape

    vjp, _ = make_vjp(function)(b.x)
    assert (kept[-1]() is not None) == (residual and activation is not None)
    vjp(1.0)


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


def test_running_statistics_are_moved_once_in_nested_derivatives():
    b = drawn(beta=False)
    running = b.running_mean, b.running_var
    before = [array.copy() for array in running]

    def gradient(gamma):
        return grad(lambda x: np.sum(b.dy * batch_norm(x, gamma, None, *running)))(b.x)

    _, dx = make_vjp(gradient)(b.gamma)
    assert_moved_once(before, running, b.x, axis=1)
    assert_right(b, batch_norm(b.x, b.gamma), {"x": dx}, axis=1)


def test_evaluation_leaves_running_statistics_alone():
    b = drawn()
    before = b.running_mean.copy(), b.running_var.copy()
    differentiate(b, **frozen(b))
    assert_same_bits(b.running_mean, before[0])
    assert_same_bits(b.running_var, before[1])


def test_a_gradient_taken_after_the_statistics_have_moved():
    """In evaluation, gradients use the statistics that normalised x, not later ones."""
    b = drawn()
    vjp, y = make_vjp(lambda x: batch_norm(x, b.gamma, b.beta, **frozen(b)))(b.x)
    before = b._replace(running_mean=b.running_mean.copy(), running_var=b.running_var.copy())
    b.running_mean[:] = 7
    b.running_var[:] = 7
    assert_right(before, y, {"x": vjp(b.dy)}, axis=1, training=False)


# Unsupported calls


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@modes
def test_running_statistics_that_are_differentiated_are_refused(name, training):
    b = drawn()
    running = {"running_mean": b.running_mean, "running_var": b.running_var}
    before = {key: array.copy() for key, array in running.items()}

    def loss(array):
        return np.sum(batch_norm(b.x, **running | {name: array}, training=training))

    with pytest.raises(
        TypeError, match=f"^{name} is an autograd box.* have no gradient; expected an ndarray"
    ):
        grad(loss)(running[name])
    for key, array in running.items():
        assert_same_bits(array, before[key])


def composed(x, gamma, beta, residual, running_mean, running_var, *, training, activation):
    """Compute batch normalization with autograd.numpy's functions, for channels along axis 1."""
    over = tuple(i for i in range(x.ndim) if i != 1)
    shape = [-1 if i == 1 else 1 for i in range(x.ndim)]
    mean, var = (r.reshape(shape) for r in (running_mean, running_var))
    if training:
        mean = np.mean(x, axis=over, keepdims=True)
        var = np.mean((x - mean) ** 2, axis=over, keepdims=True)
    y = np.reshape(gamma, shape) * (x - mean) / np.sqrt(var + 1e-5) + np.reshape(beta, shape)
    return FORMULAS[activation](y if residual is None else y + residual)


def logistic(v):
    return 1 / (1 + np.exp(-v))


FORMULAS = {
    None: lambda v: v,
    "relu": lambda v: np.maximum(v, 0),
    "leaky_relu": lambda v: np.where(v > 0, v, 0.01 * v),
    "relu6": lambda v: np.minimum(np.maximum(v, 0), 6),
    "hardswish": lambda v: v * np.minimum(np.maximum(v + 3, 0), 6) / 6,
    "silu": lambda v: v * logistic(v),
    "gelu": lambda v: v * (1 + erf(v / np.sqrt(2))) / 2,
    "gelu_tanh": lambda v: v * logistic(np.sqrt(8 / np.pi) * (v + 0.044715 * v**3)),
    "sigmoid": logistic,
    "tanh": np.tanh,
    nbnorm.activation("leaky_relu", slope=0.3): lambda v: np.where(v > 0, v, 0.3 * v),
}


# Each activation compiles its own kernels, so only three are tested in all cases.
SECOND = [*product((None, "relu", "silu"), (True, False), (False, True))]
SECOND += [(name, True, True) for name in FORMULAS if name not in (None, "relu", "silu")]


@pytest.mark.parametrize(("activation", "training", "with_residual"), SECOND, ids=str)
def test_second_derivatives(activation, training, with_residual):
    """Compare every pair of arguments with batch norm composed of autograd's own functions."""
    b = drawn("NC", residual=True)
    arguments = [b.x, b.gamma, b.beta, *([b.residual] if with_residual else [])]
    options = {"training": training, "activation": activation}

    def ours(x, gamma, beta, residual=None):
        running = b.running_mean.copy(), b.running_var.copy()
        return batch_norm(x, gamma, beta, *running, residual=residual, **options)

    def theirs(x, gamma, beta, residual=None):
        return composed(x, gamma, beta, residual, b.running_mean, b.running_var, **options)

    for i, j in product(range(len(arguments)), repeat=2):
        hessians = []
        for function in (ours, theirs):

            def loss(*given, f=function):
                return np.sum(b.dy * f(*given) ** 3)

            hessians.append(jacobian(grad(loss, i), j)(*arguments))
        onp.testing.assert_allclose(*hessians, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("absent", [("gamma",), ("beta",), ("gamma", "beta")], ids=str)
def test_a_second_derivative_without_gamma_or_beta(absent):
    b = drawn("NC")
    parameters = {n: None if n in absent else getattr(b, n) for n in ("gamma", "beta")}

    def ours(x):
        return batch_norm(x, **parameters, activation="silu")

    def theirs(x):
        gamma = onp.ones_like(b.gamma) if "gamma" in absent else b.gamma
        beta = onp.zeros_like(b.beta) if "beta" in absent else b.beta
        running = b.running_mean, b.running_var
        return composed(x, gamma, beta, None, *running, training=True, activation="silu")

    hessians = (
        jacobian(grad(lambda x, f=f: np.sum(b.dy * f(x) ** 3)))(b.x) for f in (ours, theirs)
    )
    onp.testing.assert_allclose(*hessians, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [300, 1e-3])
def test_a_second_derivative_in_half_precision(size):
    """Products of dy and its direction leave float16; a float32 residual has a float32 gradient."""
    b = drawn("NC", residual=True)
    found = {}
    for dtype in ("float16", "float64"):
        x, residual = b.x.astype(dtype), b.residual.astype(np.promote_types(dtype, "float32"))
        dy = (size * b.dy / abs(b.dy).max()).astype(dtype)

        def loss(x, residual, dy=dy):
            y = batch_norm(x, b.gamma, b.beta, residual=residual, activation="silu")
            return np.sum(dy.astype("float32") * y)

        def twice(residual, x=x, loss=loss, dy=dy):
            return np.sum(dy.astype("float32") * grad(loss)(x, residual))

        found[dtype] = grad(twice)(residual)
        assert found[dtype].dtype == residual.dtype
    scale = abs(found["float64"]).max()
    onp.testing.assert_allclose(found["float16"], found["float64"], rtol=0, atol=2e-2 * scale)


def test_a_second_derivative_with_a_function_of_the_user_is_refused():
    b = drawn("NC")
    function = function_of(b, ("x",), activation=nbnorm.activation(squared, doubled))
    first = elementwise_grad(lambda x: function(x) ** 2)
    with pytest.raises(NotImplementedError, match=r"no second derivative with .*square.*numpy"):
        elementwise_grad(first)(b.x)


def test_a_mixed_second_derivative():
    b = drawn("NC")

    def first(x):
        return grad(lambda gamma: np.sum(b.dy * batch_norm(x, gamma)))(b.gamma)

    def of_composed(x):
        def loss(gamma):
            y = composed(
                x, gamma, b.beta, None, b.running_mean, b.running_var,
                training=True, activation=None,
            )  # fmt: skip
            return np.sum(b.dy * y)

        return grad(loss)(b.gamma)

    results = (jacobian(f)(b.x) for f in (first, of_composed))
    onp.testing.assert_allclose(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["x", "gamma"])
def test_a_third_derivative_is_refused(name):
    b = drawn("NC")
    function = function_of(b, (name,))
    first = elementwise_grad(lambda array: function(array) ** 2)
    second = elementwise_grad(lambda array: first(array) ** 2)
    array = b.differentiable[name]
    second(array)
    with pytest.raises(RuntimeError, match=r"up to the second.*autograd\.numpy"):
        elementwise_grad(second)(array)


def test_a_gradient_within_a_function_that_is_differentiated():
    """The inner gradient can be used if nothing is differentiated through it."""
    b = drawn("NC")

    def function(factor):
        gradient = grad(lambda gamma: np.sum(b.dy * batch_norm(b.x, gamma)))(b.gamma)
        return factor * np.sum(gradient)

    _, grads = differentiate(b, ("gamma",))
    assert grad(function)(2.0) == grads["gamma"].sum()


def test_forward_mode_is_refused():
    b = drawn("NC")
    with pytest.raises(NotImplementedError, match=r"JVP of _batch_norm wrt argnums \(0,\)"):
        make_jvp(lambda x: batch_norm(x, b.gamma))(b.x)(b.dy)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"gamma": onp.ones(4)}, ValueError, r"^gamma has shape \(4,\), expected \(3,\)"),
        ({"running_var": None}, ValueError, "^running_var is None"),
        ({"residual": onp.ones((4, 3, 5, 1))}, ValueError, "^residual has shape"),
        ({"residual": onp.ones((4, 3, 5, 6), "float32")}, TypeError, "^residual has dtype float32"),
        ({"beta": [1.0, 2.0, 3.0]}, TypeError, "^beta must be a NumPy array"),
        ({"eps": -1.0}, ValueError, "^eps must be finite"),
        ({"axis": 4}, ValueError, "^axis 4 is out of range"),
        ({"activation": "elu"}, ValueError, "^activation must be"),
        ({"momentum": float("nan")}, ValueError, "^momentum must be finite"),
        (
            {"gamma": (shared := onp.ones(3)), "running_var": shared},
            ValueError,
            "^running_var and gamma share memory",
        ),
    ],
)
def test_errors_leave_the_statistics_alone(given, error, message):
    b = drawn()
    arguments = {"running_mean": b.running_mean, "running_var": b.running_var}
    before = b.running_mean.copy(), b.running_var.copy()
    with pytest.raises(error, match=message):
        grad(lambda x: np.sum(batch_norm(x, **arguments | given)))(b.x)
    assert_same_bits(b.running_mean, before[0])
    assert_same_bits(b.running_var, before[1])


@pytest.mark.parametrize("name", ["x", "gamma", "residual"])
def test_boxes_given_to_the_function_itself_are_sent_here(name):
    b = drawn()
    arguments = {"x": b.x, "gamma": b.gamma, "residual": b.x}

    def loss(box):
        return np.sum(nbnorm.batch_norm_forward(**arguments | {name: box}).y)

    message = rf"^{name} is an autograd box.*use nbnorm\.integrations\.autograd$"
    for differentiate_ in (grad, lambda f: grad(grad(f))):
        with pytest.raises(TypeError, match=message):
            differentiate_(loss)(arguments[name])


# Imports, examples, benchmarks


def test_importing_it_imports_no_other_host():
    code = (
        "import sys, nbnorm.integrations; assert 'autograd' not in sys.modules\n"
        "import nbnorm.integrations.autograd\n"
        "assert not {'torch', 'mygrad', 'thinc', 'onnx'} & set(sys.modules)"
    )
    run_child("-c", code)


def test_doctests():
    failed, attempted = doctest.testmod(integration)
    assert failed == 0
    assert attempted > 4


def test_example():
    """Chance accuracy is a tenth, and its loss log(10) = 2.3."""
    with_bn, without = run_example("autograd_mlp.py", "--steps", "100")
    assert with_bn.last_loss < 0.5 * with_bn.first_loss
    assert with_bn.accuracy > 0.6
    assert with_bn.accuracy > without.accuracy


@pytest.mark.parametrize("shape", [(60, 7), (3, 5, 4, 6)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_benchmark_compares_like_with_like(shape, dtype):
    from benchmarks.hosts import autograd as host

    assert re.fullmatch(r"autograd \d+\.\d+\S*", host.name())
    assert_like_with_like(host.calls(shape, dtype), shape, dtype)
