"""Batch renormalization: the functions, and the layer's option."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from refusals import per_channel, refuses
from strategies import other_layouts, recipes
from tolerances import (
    assert_same_bits,
    assert_within,
    dx_tolerance,
    renorm_tolerance,
    stored,
    sums_tolerance,
    y_tolerance,
)

import nbnorm
from nbnorm import BatchNorm, Ramp, Renorm, reference

pytestmark = pytest.mark.slow  # compiles kernels that few other tests use

PLAIN = {"r_max": 1.0, "d_max": 0.0}
bounds = st.fixed_dictionaries(
    {
        "r_max": st.sampled_from((1.0, 1.1, 3.0, np.inf)),
        "d_max": st.sampled_from((0.0, 0.5, 5.0, np.inf)),
    }
)
activations = st.sampled_from((None, "relu"))
SHAPE = (6, 3, 5)


def near(recipe):
    """Return running statistics near those of the recipe's x, in float64."""
    mean, var = recipe.running("float64")
    return (mean + recipe.offset) * recipe.scale, var * recipe.scale**2


def folded(gamma, beta, r, d, x, axis):
    """Return gamma r and beta + gamma d in longdouble, for tolerances that broadcast them."""
    wide = np.longdouble(1) if gamma is None else gamma.astype(np.float64) * np.longdouble(1)
    shift = 0 if beta is None else beta.astype(np.float64)
    return wide * r, shift + wide * d


@given(recipes(), bounds, activations, st.none() | other_layouts())
def test_forward_is_the_oracles(recipe, bounds, activation, layout):
    x, gamma, beta = recipe.x(), recipe.gamma(), recipe.beta()
    residual = recipe.like_x(4, layout) if layout and recipe.with_extras else None
    options = bounds | {"eps": recipe.eps, "axis": recipe.axis}
    old, running, moved = near(recipe), near(recipe), near(recipe)
    rest = {"residual": residual, "activation": activation}
    ref = reference.batch_renorm_forward(x, gamma, beta, *near(recipe), **options, **rest)
    got = nbnorm.batch_renorm_forward(x, gamma, beta, *running, **options, **rest)
    moments = reference.batch_norm_stats(x, axis=recipe.axis)
    errors = renorm_tolerance(moments, old[1], ref.r, ref.d, x.dtype, recipe.eps)
    for name, error in zip("rd", errors, strict=True):
        assert_within(getattr(got, name), getattr(ref, name), error, name)
    plain = nbnorm.batch_norm_forward(x, None, None, *moved, axis=recipe.axis, eps=recipe.eps)
    assert_same_bits(got.mean, plain.mean)
    assert_within(got.rstd, plain.rstd, 4 * np.spacing(plain.rstd), "rstd")
    # Compare y for the statistics and corrections of nbnorm.
    scale, shift = folded(gamma, beta, got.r, got.d, x, recipe.axis)
    error = y_tolerance(x, scale, shift, got.mean, got.rstd, axis=recipe.axis, residual=residual)
    y = reference.batch_norm_apply(x, scale, shift, got.mean, got.rstd, axis=recipe.axis, **rest)
    assert got.y.dtype == x.dtype
    assert_within(got.y, y, error, "y")
    for new, wanted in zip(running, moved, strict=True):
        assert_same_bits(new, wanted, "running statistics")


@given(recipes(), bounds, activations, other_layouts())
def test_backward_is_the_oracles(recipe, bounds, activation, layout):
    x, gamma, beta, axis = recipe.x(), recipe.gamma(), recipe.beta(), recipe.axis
    dy = recipe.like_x(5, layout)
    options = {"axis": axis, "activation": activation}
    y, *saved = nbnorm.batch_renorm_forward(
        x, gamma, beta, *near(recipe), eps=recipe.eps, **bounds, **options
    )
    got = nbnorm.batch_renorm_backward(dy, x, gamma, *saved, beta=beta, **options)
    # The oracle starts from the masked dy: near 0 its own mask may differ by a rounding.
    masked = np.where(y > 0, dy, 0).astype(x.dtype) if activation else dy
    ref = reference.batch_renorm_backward(masked, x, gamma, *saved, axis=axis)
    mean, rstd, r, d = saved
    scale, _ = folded(gamma, beta, r, d, x, axis)
    assert_within(got.dx, ref.dx, dx_tolerance(masked, x, scale, mean, rstd, axis=axis), "dx")
    of_sum, of_xhat = sums_tolerance(masked, x, mean, rstd, axis=axis)
    dtype = x.dtype if gamma is None else gamma.dtype
    of_dgamma = np.abs(r) * of_xhat + np.abs(d) * of_sum
    fits = np.abs(ref.dgamma) < (6e4 if dtype == np.float16 else np.inf)
    of_dgamma = stored(of_dgamma, ref.dgamma, dtype)
    assert_within(got.dgamma[fits], ref.dgamma[fits], of_dgamma[fits], "dgamma")
    assert_within(got.dbeta, ref.dbeta, stored(of_sum, ref.dbeta, dtype), "dbeta")
    assert got.dgamma.dtype == got.dbeta.dtype == dtype
    assert got.dresidual is None


@given(recipes(), activations)
def test_the_narrowest_bounds_are_batch_normalization_to_the_bit(recipe, activation):
    recipe = replace(recipe, gamma_dtype="float64", beta_dtype="float64")
    x, gamma, beta, dy = recipe.x(), recipe.gamma(), recipe.beta(), recipe.like_x(5)
    options = {"axis": recipe.axis, "activation": activation}
    expected, running = near(recipe), near(recipe)
    plain = nbnorm.batch_norm_forward(x, gamma, beta, *expected, eps=recipe.eps, **options)
    y, mean, rstd, r, d = nbnorm.batch_renorm_forward(
        x, gamma, beta, *running, eps=recipe.eps, **PLAIN, **options
    )
    assert_same_bits(mean, plain.mean)
    assert_same_bits(rstd, plain.rstd)
    assert_same_bits(y, plain.y)
    for new, wanted in zip(running, expected, strict=True):
        assert_same_bits(new, wanted)
    assert (r == 1).all()
    assert (d == 0).all()
    ref = nbnorm.batch_norm_backward(dy, x, gamma, mean, rstd, beta=beta, **options)
    got = nbnorm.batch_renorm_backward(dy, x, gamma, mean, rstd, r, d, beta=beta, **options)
    assert_same_bits(got.dx, ref.dx)
    assert_array_equal(got.dgamma, ref.dgamma)
    assert_same_bits(got.dbeta, ref.dbeta)


def case(seed=0, shape=SHAPE, dtype=np.float64):
    """Return x, dy, gamma, beta, running_mean and running_var."""
    rng = np.random.default_rng(seed)
    x, dy = rng.normal(1, 2, shape).astype(dtype), rng.normal(size=shape).astype(dtype)
    gamma, beta, mean = rng.normal(size=(3, shape[1]))
    return x, dy, gamma, beta, mean, rng.uniform(1, 9, shape[1])


@pytest.mark.parametrize(
    "shape",
    # By rows and by columns: serial, in blocks of channels, and in two steps.
    [(6, 5, 300), (40, 24, 300), (3, 2, 30_000), (7, 9), (600, 48, 4), (256, 512), (2000, 24)],
    ids=str,
)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_one_pass_is_statistics_then_apply_to_the_bit(shape, activation):
    x, dy, gamma, beta, mean, var = case(shape=shape, dtype=np.float32)
    y, *saved = nbnorm.batch_renorm_forward(
        x, gamma, beta, mean.copy(), var.copy(), r_max=1.1, d_max=0.4, activation=activation
    )
    moments = nbnorm.batch_norm_stats(x)
    rstd, std, running = moments.rstd(1e-5), np.sqrt(moments.var() + 1e-5), np.sqrt(var + 1e-5)
    r = np.clip(std / running, 1 / 1.1, 1.1)
    d = np.clip((moments.mean - mean) / running, -0.4, 0.4)
    for got, expected in zip(saved, (moments.mean, rstd, r, d), strict=True):
        assert_same_bits(got, expected)
    applied = nbnorm.batch_norm_apply(
        x, gamma * r, beta + gamma * d, moments.mean, rstd, activation=activation
    )
    assert_same_bits(y, applied)
    if activation:  # backward recomputes the mask of y
        grads = nbnorm.batch_renorm_backward(dy, x, gamma, *saved, beta=beta, activation="relu")
        masked = np.where(y > 0, dy, 0)
        assert_same_bits(grads.dx, nbnorm.batch_renorm_backward(masked, x, gamma, *saved).dx)


def test_without_bounds_training_normalises_as_inference():
    x, _, gamma, beta, mean, var = case()
    expected = nbnorm.batch_norm_inference(x, gamma, beta, mean, var)
    y = nbnorm.batch_renorm_forward(x, gamma, beta, mean, var, r_max=np.inf, d_max=np.inf).y
    assert_allclose(y, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("r_max", "d_max"), [(1.2, 0.3), (3.0, 5.0)])
def test_value_and_gradients_are_those_of_keras_2(r_max, d_max):
    """Differentiate its formulas, `_renorm_correction_and_moments` and `_compose_transforms`."""
    pytest.importorskip("autograd")
    import autograd.numpy as anp
    from autograd import grad
    from autograd.tracer import getval

    x, dy, gamma, beta, mean, var = case()
    eps = 1e-3

    def stopped(array):
        while array is not getval(array):
            array = getval(array)
        return array

    def y_of(x, gamma, beta):
        batch_mean, batch_var = (f(x, axis=(0, 2)) for f in (anp.mean, anp.var))
        stddev, renorm_stddev = anp.sqrt(batch_var + eps), np.sqrt(var + eps)
        r = np.clip(stopped(stddev) / renorm_stddev, 1 / r_max, r_max)
        d = np.clip((stopped(batch_mean) - mean) / renorm_stddev, -d_max, d_max)
        scale, offset = r * gamma, d * gamma + beta
        xhat = (x - batch_mean[:, None]) / stddev[:, None]
        return xhat * scale[:, None] + offset[:, None]

    y, *saved = nbnorm.batch_renorm_forward(
        x, gamma, beta, mean.copy(), var.copy(), r_max=r_max, d_max=d_max, eps=eps
    )
    assert_allclose(y, y_of(x, gamma, beta), rtol=1e-12, atol=1e-12)
    got = nbnorm.batch_renorm_backward(dy, x, gamma, *saved)
    wanted = grad(lambda *args: anp.sum(dy * y_of(*args)), (0, 1, 2))(x, gamma, beta)
    for name, gradient, expected in zip(("dx", "dgamma", "dbeta"), got, wanted, strict=False):
        assert_allclose(gradient, expected, rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("shape", [(64, 5), (4, 5, 20, 20)])
@pytest.mark.parametrize("activation", [None, nbnorm.activation("leaky_relu", slope=0.2)])
def test_backward_from_y(shape, activation):
    """x = None: x_hat = ((v - beta) / gamma - d) / r, where v is y before the activation."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(1, 2, (2, *shape))
    gamma, beta = rng.uniform(0.5, 2, 5), rng.normal(size=5)
    y, *saved = nbnorm.batch_renorm_forward(
        x, gamma, beta, np.ones(5), np.full(5, 4.0), r_max=1.1, d_max=0.2, activation=activation
    )
    options = {"beta": beta, "activation": activation}
    expected = nbnorm.batch_renorm_backward(dy, x, gamma, *saved, **options)
    for module in (nbnorm, reference):
        found = module.batch_renorm_backward(dy, None, gamma, *saved, y=y, **options)
        for got, wanted in zip(found[:3], expected[:3], strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)


def test_each_gradient_alone():
    x, dy, gamma, beta, mean, var = case()
    _, *saved = nbnorm.batch_renorm_forward(x, gamma, beta, mean, var, d_max=0.5)
    every = nbnorm.batch_renorm_backward(dy, x, gamma, *saved)
    for i, name in enumerate(("dx", "dgamma", "dbeta")):
        mask = tuple(j == i for j in range(4))
        got = nbnorm.batch_renorm_backward(dy, x, gamma, *saved, output_mask=mask)
        assert_array_equal(getattr(got, name), getattr(every, name))
        assert sum(gradient is not None for gradient in got) == 1


def test_gradient_of_a_residual():
    x, dy, gamma, beta, mean, var = case()
    residual = case(1)[0]
    options = {"activation": "relu"}
    y, *saved = nbnorm.batch_renorm_forward(x, gamma, beta, mean, var, residual=residual, **options)
    got = nbnorm.batch_renorm_backward(dy, x, gamma, *saved, y=y, **options)
    masked = np.where(y > 0, dy, 0)
    assert_array_equal(got.dresidual, masked)
    assert_array_equal(got.dx, nbnorm.batch_renorm_backward(masked, x, gamma, *saved).dx)


def test_results_go_where_they_are_wanted():
    x, dy, gamma, beta, mean, var = case()
    out, dx = np.empty_like(x), np.empty_like(x)
    y, *saved = nbnorm.batch_renorm_forward(x, gamma, beta, mean.copy(), var.copy(), out=out)
    assert y is out
    assert_array_equal(out, nbnorm.batch_renorm_forward(x, gamma, beta, mean, var).y)
    assert nbnorm.batch_renorm_backward(dy, x, gamma, *saved, out=dx).dx is dx
    assert_array_equal(dx, nbnorm.batch_renorm_backward(dy, x, gamma, *saved).dx)


def test_several_channel_axes():
    x, dy, *_ = case(shape=(6, 3, 2))
    (gamma, beta, mean), var = np.random.default_rng(2).normal(size=(3, 3, 2)), np.full((3, 2), 4.0)
    y, *saved = nbnorm.batch_renorm_forward(x, gamma, beta, mean.copy(), var.copy(), axis=(1, 2))
    grads = nbnorm.batch_renorm_backward(dy, x, gamma, *saved, axis=(1, 2))
    flat = [a.reshape(-1) for a in (gamma, beta, mean, var)]
    ref, *kept = nbnorm.batch_renorm_forward(x.reshape(6, 6), *flat)
    assert_array_equal(y, ref.reshape(x.shape))
    assert {a.shape for a in (*saved, grads.dgamma, grads.dbeta)} == {(3, 2)}
    expected = nbnorm.batch_renorm_backward(dy.reshape(6, 6), x.reshape(6, 6), flat[0], *kept)
    assert_array_equal(grads.dx, expected.dx.reshape(x.shape))
    assert_array_equal(grads.dgamma, expected.dgamma.reshape(3, 2))


def test_an_empty_batch_corrects_nothing():
    mean, var = np.full(3, 2.0), np.full(3, 4.0)
    for function in (nbnorm.batch_renorm_forward, reference.batch_renorm_forward):
        y, *_, r, d = function(np.empty((0, 3, 5)), None, None, mean, var)
        assert y.shape == (0, 3, 5)
        assert_array_equal(r, np.ones(3))
        assert_array_equal(d, np.zeros(3))
    assert_array_equal((mean, var), ([2.0] * 3, [4.0] * 3))


def test_standard_deviations_of_0():
    """0 / 0 gives no correction, other quotients are clipped; NaN stays in its channel."""
    x = np.array([[2.0, 3.0, 0.0, np.nan, 1.0], [2.0, 3.0, 2.0, 1.0, 3.0]])
    args = np.array([2.0, 2.0, 1.0, 0.0, 2.0]), np.array([0.0, 0.0, 0.0, 1.0, 1.0])
    for function in (nbnorm.batch_renorm_forward, reference.batch_renorm_forward):
        y, _, rstd, r, d = function(x, None, None, *(a.copy() for a in args), eps=0.0)
        assert_array_equal(rstd, [0, 0, 1, np.nan, 1])
        assert_array_equal(r, [1, 1, 3, np.nan, 1])
        assert_array_equal(d, [0, 5, 0, np.nan, 0])
        assert_array_equal(y[0], [0, 5, -3, np.nan, -1])


@pytest.mark.parametrize(
    ("name", "bad", "error", "match"),
    [
        ("r_max", 0.9, ValueError, "r_max must be at least 1, got 0.9"),
        ("r_max", np.nan, ValueError, "r_max must be at least 1, got nan"),
        ("r_max", "3", TypeError, "r_max must be a real number"),
        ("r_max", Ramp(0, 1, 1, 3), TypeError, "r_max must be a real number"),
        ("d_max", -0.1, ValueError, "d_max must be at least 0, got -0.1"),
        ("d_max", np.nan, ValueError, "d_max must be at least 0, got nan"),
        ("d_max", None, TypeError, "d_max must be a real number"),
        ("running_mean", None, ValueError, "^running_mean is None; batch renorm"),
        ("running_var", None, ValueError, "^running_var is None; batch renorm"),
    ],
)
def test_what_is_refused(name, bad, error, match):
    refuses("batch_renorm_forward", error, match, **{name: bad})


@pytest.mark.parametrize("name", ["r", "d"])
def test_corrections_of_another_shape_are_refused(name):
    refuses(
        "batch_renorm_backward", ValueError, rf"^{name} has shape \(7,\), expected \(8,\)",
        **{name: per_channel(length=7)},
    )  # fmt: skip


# The layer


def test_a_ramp():
    ramp = Ramp(10, 20, 1.0, 3.0)
    assert [ramp(batch) for batch in (0, 10, 15, 20, 99)] == [1.0, 1.0, 2.0, 3.0, 3.0]
    assert Ramp(5, 5, 0.0, 1.0)(5) == 0.0  # a step
    assert Ramp(5, 5, 0.0, 1.0)(6) == 1.0


def test_the_papers_schedule():
    """Section 4: r_max = 1 and d_max = 0 for 5000 steps; 3 at 40k and 5 at 25k."""
    renorm = Renorm()
    for batch, r_max, d_max in (
        (0, 1, 0),
        (5000, 1, 0),
        (25_000, 1 + 2 * 20 / 35, 5),
        (40_000, 3, 5),
    ):
        assert renorm.bounds(batch) == {"r_max": pytest.approx(r_max), "d_max": d_max}


def test_the_layer_calls_the_functions_with_the_schedule():
    asked = []

    def r_max(batch):
        asked.append(batch)
        return 1.0 + batch

    layer = BatchNorm(3, renorm=Renorm(r_max, 0.25), activation="relu", dtype=np.float64)
    mean, var = np.zeros(3), np.ones(3)
    for batch in range(3):
        x, dy, gamma, beta, *_ = case(batch)
        layer.parameters["weight"][...], layer.parameters["bias"][...] = gamma, beta
        y, *saved = nbnorm.batch_renorm_forward(
            x, gamma, beta, mean, var, r_max=1.0 + batch, d_max=0.25, activation="relu"
        )
        assert_same_bits(layer.forward(x), y)
        assert_same_bits(layer.running_mean, mean)
        assert_same_bits(layer.running_var, var)
        expected = nbnorm.batch_renorm_backward(dy, x, gamma, *saved, beta=beta, activation="relu")
        assert_same_bits(layer.backward(dy), expected.dx)
        assert_same_bits(layer.grads["weight"], expected.dgamma)
        assert_same_bits(layer.grads["bias"], expected.dbeta)
    assert asked == [0, 1, 2]
    layer.eval()
    expected = nbnorm.batch_norm_inference(x, gamma, beta, mean, var, activation="relu")
    assert_same_bits(layer.forward(x), expected)
    frozen = nbnorm.batch_norm_backward(
        dy, x, gamma, mean, 1 / np.sqrt(var + 1e-5), beta=beta, training=False, activation="relu"
    )
    assert_allclose(layer.backward(dy), frozen.dx)
    assert asked == [0, 1, 2]


def test_a_layer_with_residual_renormalises():
    layer = BatchNorm(3, renorm=Renorm(2, 1), activation="relu", dtype=np.float64)
    x, dy, *_ = case()
    residual = case(1)[0]
    y = layer.forward(x, residual)
    dx, dresidual = layer.backward(dy)
    assert_array_equal(dresidual, np.where(y > 0, dy, 0))
    parameters, running = (np.ones(3), np.zeros(3)), (np.zeros(3), np.ones(3))
    expected, *saved = nbnorm.batch_renorm_forward(
        x, *parameters, *running, r_max=2, d_max=1, residual=residual, activation="relu"
    )
    assert_array_equal(y, expected)
    grads = nbnorm.batch_renorm_backward(dy, x, np.ones(3), *saved, y=y, activation="relu")
    assert_array_equal(dx, grads.dx)


def test_copies_go_on_alike():
    x = case()[0]
    layer = BatchNorm(3, renorm=Renorm(Ramp(0, 4, 1, 3), 1), dtype=np.float64)
    layer.forward(x)
    copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    loaded = BatchNorm(3, renorm=layer.renorm, dtype=np.float64)
    loaded.load_state_dict(layer.state_dict())
    expected = layer.forward(x + 1)
    for other in (*copies, loaded):
        assert_same_bits(other.forward(x + 1), expected)


def test_a_refused_batch_leaves_the_layer_alone():
    layer = BatchNorm(3, renorm=Renorm(lambda batch: 0.5 if batch else 3.0, 1))
    layer.forward(case()[0])
    before = layer.state_dict()
    with pytest.raises(ValueError, match=r"r_max must be at least 1, got 0\.5"):
        layer.forward(case()[0])
    for name, value in layer.state_dict().items():
        assert_array_equal(value, before[name])


def test_recalibration_does_not_renormalise():
    x = case()[0]
    layer, plain = BatchNorm(3, renorm=Renorm(3, 5)), BatchNorm(3)
    with nbnorm.recalibrate(layer, plain):
        assert_same_bits(layer.forward(x), plain.forward(x))
    assert_same_bits(layer.running_var, plain.running_var)


def test_options_that_make_no_sense_together():
    with pytest.raises(ValueError, match="track_running_stats=True"):
        BatchNorm(3, renorm=Renorm(), track_running_stats=False)
    for bad in (True, (3.0, 5.0), {"r_max": 3.0}, 3.0):
        with pytest.raises(TypeError, match=r"renorm must be an nbnorm\.Renorm or None, got"):
            BatchNorm(3, renorm=bad)


def test_repr_names_renorm():
    assert "activation=None, renorm=Renorm(r_max=3, d_max=5), dtype=" in repr(
        BatchNorm(3, renorm=Renorm(3, 5))
    )


@pytest.mark.parametrize("library", ["torch", "jax.numpy", "array_api_strict"])
def test_arrays_of_other_libraries(library):
    xp = pytest.importorskip(library)
    x, dy, gamma, beta, mean, var = (a.astype(np.float32) for a in case())
    ref = nbnorm.batch_renorm_forward(x, gamma, beta, mean.copy(), var.copy())
    expected = nbnorm.batch_renorm_backward(dy, x, gamma, *ref[1:])
    x, dy, gamma, beta = map(xp.asarray, (x, dy, gamma, beta))
    got = nbnorm.batch_renorm_forward(x, gamma, beta, mean, var)
    grads = nbnorm.batch_renorm_backward(dy, x, gamma, *got[1:])
    assert type(got.y) is type(grads.dx) is type(grads.dgamma) is type(x)
    for a, b in zip((*got, *grads[:3]), (*ref, *expected[:3]), strict=True):
        assert_array_equal(np.from_dlpack(a), b)


def test_one_value_per_channel_is_refused():
    match = r"expected more than 1 value per channel when training, got x of shape \(1, 8\)"
    one = {"x": np.ones((1, 8), "f4"), "residual": None, "out": None}
    refuses("batch_renorm_forward", ValueError, match, **one)
    mean, var = per_channel(), per_channel()
    nbnorm.batch_renorm_forward(np.ones((1, 8), "f4"), None, None, mean, var, correction=0)


def test_dx_over_a_correction_is_refused():
    memory = np.ones(2 * 8 * 4 * 4 + 16)
    out = memory[: 2 * 8 * 4 * 4].reshape(2, 8, 4, 4)
    wide = {name: np.ones((2, 8, 4, 4)) for name in ("dy", "x", "y")}
    refuses(
        "batch_renorm_backward", ValueError, "^out overlaps d in memory",
        **wide, d=memory[250:258], out=out,
    )  # fmt: skip
