"""Activations other than ReLU: their functions, both passes, errors, user-defined functions."""

import math

import numba
import numpy as np
import pytest
from children import run_child
from hypothesis import given
from hypothesis import strategies as st

import nbnorm
from nbnorm import reference
from nbnorm.activations import NAMES, TABLE, Activation
from nbnorm.cpu import functions
from nbnorm.cpu.intrinsics import each
from nbnorm.cpu.jit import entry, ordered
from nbnorm.integrations._curvature import curvature

pytestmark = pytest.mark.slow  # each activation compiles two kernels

DTYPES = [np.float32, np.float64]


def drawn(shape, dtype, seed=0):
    """Return x, gamma, beta, residual and dy; before the activation, y lies on both sides of 0."""
    rng = np.random.default_rng(seed)
    x, residual, dy = (rng.normal(0.3, 1.5, shape).astype(dtype) for _ in range(3))
    gamma, beta = rng.normal(1, 1, shape[1]).astype(dtype), rng.normal(0, 2, shape[1]).astype(dtype)
    return x, gamma, beta, residual, dy


# The functions


@ordered
def one_value(j, v, act, out):
    out[j] = functions.value_at(v[j], act)


@ordered
def one_derivative(j, v, act, out):
    out[j] = functions.derivative_at(v[j], act)


@entry("test_values")
def values(v, act, out):
    each(v.size, one_value, (v, act, out))


@entry("test_derivatives")
def derivatives(v, act, out):
    each(v.size, one_derivative, (v, act, out))


def evaluated(name, v):
    """Return the value and the derivative, as kernels compute them."""
    act = functions.argument(nbnorm.activation(name))
    y, slope = np.empty_like(v), np.empty_like(v)
    values(v, act, y)
    derivatives(v, act, slope)
    return y, slope


def arguments(dtype):
    rng = np.random.default_rng(7)
    sizes = np.exp(rng.uniform(-30, 4, 2000))
    parts = rng.normal(0, 1, 4000), rng.normal(0, 4, 4000), sizes, -sizes
    return np.concatenate([*parts, [0, 3, -3, 6, 1e30, -1e30]]).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TABLE)
def test_values_and_derivatives(name, dtype):
    """Errors are those of an argument off by a unit in the last place, plus units of the result."""
    v = arguments(dtype)
    y, slope = evaluated(name, v)
    exact = reference._activate(v.astype(np.longdouble), name)
    exact_slope = reference._activate(v.astype(np.longdouble), name, derivative=True)
    eps = np.finfo(dtype).eps
    least = np.finfo(dtype).tiny * 100  # results near the smallest normal number may become 0
    units = 3.5 if name == "gelu" and dtype == np.float64 else 2.25
    assert (abs(y - exact) <= eps * (units * abs(exact) + abs(v * exact_slope)) + least).all()
    assert (abs(slope - exact_slope) <= 2 * eps).all()


@pytest.mark.parametrize("name", TABLE)
def test_the_table_against_formulas_of_others(name):
    """The oracle computes from the same table, so compare the table with published formulas."""

    def sigmoid(v):
        return 1 / (1 + math.exp(-v))

    published = {
        "leaky_relu": lambda v: max(v, 0) + 0.01 * min(v, 0),
        "relu6": lambda v: min(max(v, 0), 6),
        "hardswish": lambda v: v * min(max(v + 3, 0), 6) / 6,
        "silu": lambda v: v * sigmoid(v),
        "gelu": lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2,
        "gelu_tanh": lambda v: (
            v / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
        ),
        "sigmoid": sigmoid,
        "tanh": math.tanh,
    }
    v = np.array([-7.1, -3.2, -2.9, -1.3, -0.4, 0.2, 0.9, 2.6, 3.1, 5.9, 6.2])
    formula, h = published[name], 1e-6
    expected = [formula(t) for t in v]
    slopes = [(formula(t + h) - formula(t - h)) / (2 * h) for t in v]
    np.testing.assert_allclose(reference._activate(v, name), expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(reference._activate(v, name, True), slopes, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", TABLE)
def test_curvature(name):
    """The second derivative, for hosts: compare with differences; 0 far out, and NaN at NaN."""
    v, h = np.linspace(-9, 9, 1801) + 1e-3, np.longdouble(1e-5)
    sides = (reference._activate(v + step, name, derivative=True) for step in (h, -h))
    difference = np.subtract(*sides) / (2 * h)
    smooth = abs(abs(v) - 3) > 1e-2  # where hardswish has corners
    found = curvature(nbnorm.activation(name), v)
    np.testing.assert_allclose(found[smooth], difference[smooth].astype(float), atol=1e-9)
    far = curvature(nbnorm.activation(name), np.array([np.inf, -np.inf, 1e300, -1e4, np.nan]))
    np.testing.assert_array_equal(far, [0, 0, 0, 0, np.nan])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TABLE)
def test_limits(name, dtype):
    """NaN passes through; infinite arguments give the limits, not NaN from Inf times 0."""
    v = np.array([np.nan, np.inf, -np.inf], dtype)
    y, slope = evaluated(name, v)
    assert np.isnan(y[0])
    assert not np.isnan(y[1:]).any()
    assert not np.isnan(slope[1:]).any()
    assert y[1] == {"relu6": 6, "sigmoid": 1, "tanh": 1}.get(name, np.inf)
    assert y[2] == {"leaky_relu": -np.inf, "tanh": -1}.get(name, 0)


@pytest.mark.parametrize("name", TABLE)
def test_loops_are_vectorised_and_call_nothing(name):
    v = np.zeros(8, np.float32)
    act = functions.argument(nbnorm.activation(name))
    for cached in (values, derivatives):
        # Code loaded from a cache cannot be inspected.
        kernel = numba.jit(**cached.targetoptions)(cached.py_func)
        kernel(v, act, v)
        (code,) = (
            asm for types, asm in kernel.inspect_asm().items()
            if types[0].dtype is numba.float32 and types[1].instance_class is type(act)
        )  # fmt: skip
        assert "ps" in code
        for call in ("expf", "tanhf", "erff", "erfcf", "powf"):
            assert call not in code


# Both passes


@given(
    st.sampled_from(list(TABLE)),
    st.sampled_from([(7, 5), (3, 4, 6), (4, 3, 5, 5), (2, 2, 17, 17), (40, 3)]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_forward_and_backward(name, shape, added, training, seed):
    x, gamma, beta, residual, dy = drawn(shape, np.float32, seed)
    residual = residual if added else None
    options = {"activation": name, "residual": residual}
    running = np.zeros(shape[1], np.float32), np.ones(shape[1], np.float32)
    y, mean, rstd = nbnorm.batch_norm_forward(
        x, gamma, beta, *running, training=training, **options
    )
    v = reference.batch_norm_apply(x, gamma, beta, mean, rstd, residual=residual)
    exact = reference._activate(v, name)
    scale = abs(gamma).max() * abs(rstd).max() * abs(x).max() + abs(v).max() + abs(beta).max()
    assert (abs(y - exact) <= 8 * np.finfo(np.float32).eps * scale).all()
    options |= {"beta": beta, "training": training}
    found = nbnorm.batch_norm_backward(dy, x, gamma, mean, rstd, **options)
    expected = reference.batch_norm_backward(dy, x, gamma, mean, rstd, **options)
    m = x.size // shape[1]
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            size = 1 + abs(dy).max() * (1 + abs(gamma).max()) * (1 + rstd.max()) * m
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-6 * size)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_are_computed_in_float32(dtype):
    dtype = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.float16
    x, gamma, beta, residual, _ = drawn((6, 4, 9), np.float32)
    x, residual = x.astype(dtype), residual.astype(dtype)
    y = nbnorm.batch_norm_forward(x, gamma, beta, activation="silu", residual=residual).y
    wide = [a.astype(np.float32) for a in (x, residual)]
    expected = nbnorm.batch_norm_forward(
        wide[0], gamma, beta, activation="silu", residual=wide[1]
    ).y.astype(dtype)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("name", ["leaky_relu", "gelu"])
@pytest.mark.parametrize("shape", [(40, 3), (6, 4, 20, 20)])
def test_the_split_passes_are_the_whole_ones(name, shape):
    x, gamma, beta, residual, dy = drawn(shape, np.float32)
    options = {"activation": name, "residual": residual}
    y, mean, rstd = nbnorm.batch_norm_forward(x, gamma, beta, **options)
    again = nbnorm.batch_norm_apply(x, gamma, beta, mean, rstd, **options)
    np.testing.assert_array_equal(y, again)
    options["beta"] = beta
    whole = nbnorm.batch_norm_backward(dy, x, gamma, mean, rstd, **options)
    sums = nbnorm.batch_norm_backward_reduce(dy, x, mean, rstd, gamma=gamma, **options)
    dx = nbnorm.batch_norm_backward_apply(
        dy, x, gamma, mean, rstd, *sums, x.size // shape[1], **options
    )
    np.testing.assert_array_equal(whole.dx, dx)
    np.testing.assert_array_equal(whole.dgamma, sums[1].astype(np.float32))


@pytest.mark.parametrize("scale", [(1, 1), (2e37, 1), (1, 2e37)], ids=["plain", "x", "dy"])
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("shape", [(40, 3), (6, 4, 20, 20), (64, 64, 28, 28)])
def test_dy_through_the_activation_is_kept(shape, added, scale):
    """Kept in dx between the two sweeps, it gives the bits of computing it twice, even in place.

    This holds even where gamma rstd, or sums of dy, leave the range of float32.
    """
    x, gamma, beta, residual, dy = drawn(shape, np.float32)
    x[:, 1] *= scale[0]
    gamma[1] /= scale[0]
    dy[:, 1] = abs(dy[:, 1]) * scale[1]
    _, mean, rstd = nbnorm.batch_norm_forward(x, gamma, beta)
    options = {"activation": "silu", "residual": residual if added else None, "beta": beta}
    sums = nbnorm.batch_norm_backward_reduce(dy, x, mean, rstd, gamma=gamma, **options)
    dx = nbnorm.batch_norm_backward_apply(
        dy, x, gamma, mean, rstd, *sums, x.size // shape[1], **options
    )
    frozen = nbnorm.batch_norm_backward(dy, x, gamma, mean, rstd, training=False, **options)
    with np.errstate(over="ignore"):
        dbeta, dgamma = np.float32(sums)
    for out in None, dy:
        found = nbnorm.batch_norm_backward(dy, x, gamma, mean, rstd, out=out, **options)
        np.testing.assert_array_equal(found.dx, dx)
        np.testing.assert_array_equal(found.dbeta, dbeta)
        np.testing.assert_array_equal(found.dgamma, dgamma)
        if added:
            np.testing.assert_array_equal(found.dresidual, frozen.dresidual)


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("name", ["hardswish", "silu"])
def test_the_layer(name, added):
    x, gamma, beta, residual, dy = drawn((6, 4, 5), np.float32)
    layer = nbnorm.BatchNorm(4, activation=name)
    layer.parameters["weight"][:], layer.parameters["bias"][:] = gamma, beta
    residual = residual if added else None
    y = layer.forward(x, residual)
    whole = nbnorm.batch_norm_forward(x, gamma, beta, residual=residual, activation=name)
    np.testing.assert_array_equal(y, whole.y)
    expected = nbnorm.batch_norm_backward(
        dy, x, gamma, whole.mean, whole.rstd, beta=beta, residual=residual, activation=name
    )
    found = layer.backward(dy)
    if added:
        np.testing.assert_array_equal(found[1], expected.dresidual)
        found = found[0]
    np.testing.assert_array_equal(found, expected.dx)
    np.testing.assert_array_equal(layer.grads["weight"], expected.dgamma)


def test_a_slope_needs_no_kernel_of_its_own():
    x, gamma, beta, _, _ = drawn((5, 3), np.float32)
    plain = nbnorm.batch_norm_forward(x, gamma, beta).y
    for slope in (0.0, 0.2, 1.0, -1.0):
        act = nbnorm.activation("leaky_relu", slope=slope)
        y = nbnorm.batch_norm_forward(x, gamma, beta, activation=act).y
        np.testing.assert_allclose(y, np.where(plain > 0, plain, np.float32(slope) * plain))


# User-defined functions


@numba.njit
def softsign(v):
    return v / (1 + abs(v))


@numba.njit
def softsign_derivative(v):
    return 1 / (1 + abs(v)) ** 2


def test_functions_of_the_users_own():
    act = nbnorm.activation(softsign, softsign_derivative)
    assert act == nbnorm.activation(softsign, softsign_derivative)
    x, gamma, beta, _, dy = drawn((9, 4, 3), np.float32)
    y, mean, rstd = nbnorm.batch_norm_forward(x, gamma, beta, activation=act)
    v = reference.batch_norm_apply(x, gamma, beta, mean, rstd)
    np.testing.assert_allclose(y, v / (1 + abs(v)), rtol=1e-5, atol=1e-6)
    options = {"beta": beta, "activation": act}
    found = nbnorm.batch_norm_backward(dy, x, gamma, mean, rstd, **options)
    expected = nbnorm.batch_norm_backward(
        (dy / (1 + abs(v)) ** 2).astype(np.float32), x, gamma, mean, rstd
    )
    np.testing.assert_allclose(found.dx, expected.dx, rtol=1e-4, atol=1e-5)


def test_kernels_of_the_users_functions_are_not_kept(tmp_path):
    """Another process would load them for other functions of the same name."""
    code = """
import sys, numba, numpy as np, nbnorm
factor = float(sys.argv[1])
value, derivative = numba.njit(lambda v: v * factor), numba.njit(lambda v: factor)
x = np.arange(6, dtype=np.float32).reshape(3, 2)
act = nbnorm.activation(value, derivative)
print(nbnorm.batch_norm_forward(x, activation=act).y[2, 0])
"""
    two, three = (
        float(run_child("-c", code, factor, NUMBA_CACHE_DIR=str(tmp_path))) for factor in "23"
    )
    assert three == pytest.approx(1.5 * two)


# Errors


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("elu",), {}, ValueError, "activation must be one of relu, leaky_relu"),
        (("silu",), {"slope": 1}, TypeError, "activation 'silu' has no parameter 'slope'"),
        (("relu",), {"slope": 1}, TypeError, "activation 'relu' has no parameter 'slope'"),
        (("leaky_relu",), {"slope": "1"}, TypeError, "slope must be a real number, got '1'"),
        (("leaky_relu",), {"slope": np.inf}, ValueError, "slope must be finite, got inf"),
        (("relu", softsign), {}, TypeError, "derivative is only for functions of your own"),
        ((softsign,), {}, TypeError, "derivative must be a function compiled by numba.njit"),
        ((math.tanh, softsign), {}, TypeError, "value must be a function compiled by numba.njit"),
        ((softsign, softsign), {"a": 1}, TypeError, "functions of your own have no parameters"),
    ],
)
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        nbnorm.activation(*arguments, **options)


def test_what_the_derivative_depends_on():
    x, gamma, beta, residual, dy = drawn((5, 3), np.float32)
    y, mean, rstd = nbnorm.batch_norm_forward(x, gamma, beta, activation="silu", residual=residual)
    given_ = dy, x, gamma, mean, rstd
    with pytest.raises(ValueError, match=r"^beta is not given, and the derivative of"):
        nbnorm.batch_norm_backward(*given_, activation="silu")
    with pytest.raises(ValueError, match=r"^y does not give the derivative of"):
        nbnorm.batch_norm_backward(*given_, beta=beta, activation="silu", y=y)
    with pytest.raises(ValueError, match=r"^residual does not give the mask of activation='relu'"):
        nbnorm.batch_norm_backward(*given_, beta=beta, activation="relu", residual=residual)
    with pytest.raises(ValueError, match=r"^residual has shape"):
        nbnorm.batch_norm_backward(*given_, beta=beta, activation="silu", residual=residual[:4])


def test_names_and_equality():
    assert ("relu", *TABLE) == NAMES
    assert repr(nbnorm.activation("gelu")) == "activation('gelu')"
    assert nbnorm.activation("leaky_relu") == Activation("leaky_relu", (0.01,))
    assert nbnorm.activation("leaky_relu") != nbnorm.activation("leaky_relu", slope=0.2)
    assert len({nbnorm.activation("tanh"), nbnorm.activation("tanh")}) == 1
    x = drawn((5, 3), np.float32)[0]
    np.testing.assert_array_equal(
        nbnorm.batch_norm_forward(x, activation=nbnorm.activation("relu")).y,
        nbnorm.batch_norm_forward(x, activation="relu").y,
    )
