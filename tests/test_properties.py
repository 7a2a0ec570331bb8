"""Every public function against the oracle, for drawn shapes, axes, layouts, dtypes and scales."""

from dataclasses import replace
from itertools import product

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    DTYPES,
    Recipe,
    other_layouts,
    recipes,
)
from tolerances import (
    assert_same_bits,
    assert_within,
    dx_tolerance,
    m2_tolerance,
    mean_tolerance,
    relative_unit,
    rstd_tolerance,
    running_tolerance,
    stored,
    sums_tolerance,
    y_tolerance,
)

import nbnorm
from nbnorm import reference

activations = st.sampled_from((None, "relu"))


def setup_module():
    """Use one thread: any number gives the same bits (test_threads.py)."""
    numba.set_num_threads(1)


def teardown_module():
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)


def parameter_dtype(recipe):
    """Return the dtype of dgamma and dbeta."""
    return recipe.x().dtype if recipe.gamma_dtype is None else recipe.gamma().dtype


@given(recipes(), activations, st.none() | other_layouts())
def test_training_forward(recipe, activation, residual_layout):
    x, gamma, beta = recipe.x(), recipe.gamma(), recipe.beta()
    wanted = residual_layout and recipe.with_extras
    residual = recipe.like_x(4, residual_layout) if wanted else None
    options = {"eps": recipe.eps, "axis": recipe.axis}
    ref = reference.batch_norm_forward(
        x, gamma, beta, residual=residual, activation=activation, **options
    )
    got = nbnorm.batch_norm_forward(
        x, gamma, beta, residual=residual, activation=activation, **options
    )
    y_error = y_tolerance(x, gamma, beta, ref.mean, ref.rstd, axis=recipe.axis, residual=residual)
    moments = reference.batch_norm_stats(x, axis=recipe.axis)
    assert got.y.dtype == x.dtype
    assert got.mean.dtype == got.rstd.dtype == np.float64
    assert_within(got.y, ref.y, y_error, "y")
    assert_within(got.mean, ref.mean, mean_tolerance(moments, x.dtype), "mean")
    assert_within(got.rstd, ref.rstd, rstd_tolerance(moments, ref.rstd, x.dtype), "rstd")
    assert_same_bits(x, recipe.x(), "x after the call")


@given(
    recipes(),
    st.sampled_from(DTYPES),
    st.sampled_from((0.1, 1.0, 0.0, -0.5)),
    st.sampled_from((0, 1)),
)
def test_running_statistics(recipe, dtype, momentum, correction):
    if dtype == "float16":  # other scales have variances out of range
        recipe = replace(recipe, scale=1.0, offset=0.0, kind="normal")
    x = recipe.x()
    old = recipe.running(dtype)
    running = recipe.running(dtype)
    nbnorm.batch_norm_forward(
        x,
        recipe.gamma(),
        recipe.beta(),
        *running,
        momentum=momentum,
        correction=correction,
        axis=recipe.axis,
    )
    moments = reference.batch_norm_stats(x, axis=recipe.axis)
    ref = (moments.mean, moments.m2 / (moments.count - correction))
    errors = running_tolerance(
        moments, *old, momentum=momentum, correction=correction, dtype=x.dtype
    )
    largest = np.finfo(np.float32).max  # for bfloat16 and float32
    for name, new, before, batch, error in zip(
        ("running_mean", "running_var"), running, old, ref, errors, strict=True
    ):
        expected = (1 - momentum) * before.astype(np.float64) + momentum * batch
        fits = np.abs(expected) < (largest if new.itemsize < 8 else np.inf)
        assert_within(new[fits], expected[fits], error[fits], name)
        assert np.all(np.isinf(new[~fits]))
        if momentum == 0:
            assert_same_bits(new, before, name)


@given(recipes(least_count=1), activations, st.none() | other_layouts())
def test_inference(recipe, activation, residual_layout):
    x, gamma, beta = recipe.x(), recipe.gamma(), recipe.beta()
    wanted = residual_layout and recipe.with_extras
    residual = recipe.like_x(4, residual_layout) if wanted else None
    # Statistics of other data, so that mean and std fit x only roughly.
    mean, var = recipe.running("float64")
    mean = (mean + recipe.offset) * recipe.scale
    var = var * recipe.scale**2
    options = {
        "eps": recipe.eps,
        "axis": recipe.axis,
        "residual": residual,
        "activation": activation,
    }
    ref = reference.batch_norm_inference(x, gamma, beta, mean, var, **options)
    y = nbnorm.batch_norm_inference(x, gamma, beta, mean, var, **options)
    rstd = 1 / np.sqrt(var + recipe.eps)
    error = y_tolerance(x, gamma, beta, mean, rstd, axis=recipe.axis, residual=residual)
    assert y.dtype == x.dtype
    assert_within(y, ref, error, "y")
    frozen = nbnorm.batch_norm_forward(x, gamma, beta, mean, var, training=False, **options)
    assert_same_bits(frozen.y, y, "y of the forward with training=False")
    assert_same_bits(frozen.mean, mean, "mean of the forward with training=False")
    assert_within(frozen.rstd, rstd, 2 * relative_unit(np.float64) * rstd, "rstd")
    assert_same_bits(x, recipe.x(), "x after the call")


@pytest.mark.parametrize("dtype", DTYPES)
def test_inference_leaves_running_statistics_of_any_dtype_alone(dtype):
    recipe = Recipe((4, 5, 6), 1)
    x, running = recipe.x(), recipe.running(dtype)
    got = nbnorm.batch_norm_forward(x, None, None, *running, training=False, momentum=0.7)
    ref = reference.batch_norm_forward(x, None, None, *running, training=False)
    assert_within(got.y, ref.y, y_tolerance(x, None, None, ref.mean, ref.rstd, axis=1), "y")
    for new, old in zip(running, recipe.running(dtype), strict=True):
        assert_same_bits(new, old)


def forward_then_masked_dy(recipe, activation, with_residual, dy_layout):
    """Run the forward; return its results, dy, and dy after the mask of y > 0."""
    x, gamma, beta = recipe.x(), recipe.gamma(), recipe.beta()
    residual = recipe.like_x(4) if with_residual else None
    forward = nbnorm.batch_norm_forward(
        x,
        gamma,
        beta,
        eps=recipe.eps,
        axis=recipe.axis,
        residual=residual,
        activation=activation,
    )
    dy = recipe.like_x(5, dy_layout)
    masked = np.where(forward.y > 0, dy, 0).astype(dy.dtype) if activation else dy
    return x, gamma, beta, forward, dy, masked


@given(recipes(), activations, st.booleans(), st.booleans(), other_layouts())
def test_backward(recipe, activation, with_residual, training, dy_layout):
    if not recipe.with_extras:
        activation, with_residual = None, False
    x, gamma, beta, forward, dy, masked = forward_then_masked_dy(
        recipe, activation, with_residual, dy_layout
    )
    axis, mean, rstd = recipe.axis, forward.mean, forward.rstd
    given_y = forward.y if with_residual else None
    got = nbnorm.batch_norm_backward(
        dy,
        x,
        gamma,
        mean,
        rstd,
        beta=beta,
        y=given_y,
        training=training,
        axis=axis,
        activation=activation,
    )
    # Pass the masked dy to the oracle: near 0 its own mask may differ by a rounding.
    ref = reference.batch_norm_backward(masked, x, gamma, mean, rstd, training=training, axis=axis)
    assert got.dx.dtype == x.dtype
    assert got.dgamma.dtype == got.dbeta.dtype == parameter_dtype(recipe)
    error = dx_tolerance(masked, x, gamma, mean, rstd, axis=axis, training=training)
    assert_within(got.dx, ref.dx, error, "dx")
    dbeta_error, dgamma_error = sums_tolerance(masked, x, mean, rstd, axis=axis)
    dgamma_error = stored(dgamma_error, ref.dgamma, got.dgamma.dtype)
    dbeta_error = stored(dbeta_error, ref.dbeta, got.dbeta.dtype)
    assert_within(got.dgamma, ref.dgamma, dgamma_error, "dgamma")
    assert_within(got.dbeta, ref.dbeta, dbeta_error, "dbeta")
    if with_residual:
        assert_same_bits(got.dresidual, masked, "dresidual")
    else:
        assert got.dresidual is None
    assert_same_bits(x, recipe.x(), "x after the call")
    assert_same_bits(dy, recipe.like_x(5, dy_layout), "dy after the call")


@pytest.mark.parametrize("mask", list(product((False, True), repeat=4)))
@pytest.mark.parametrize("training", [True, False])
def test_output_mask_drops_results_and_changes_no_other(mask, training):
    recipe = Recipe((4, 6, 9, 11), 1, offset=3.0)
    x, gamma, beta, forward, dy, _ = forward_then_masked_dy(recipe, "relu", True, "C")
    arguments = (dy, x, gamma, forward.mean, forward.rstd)
    options = {"beta": beta, "y": forward.y, "activation": "relu", "training": training}
    full = nbnorm.batch_norm_backward(*arguments, **options)
    some = nbnorm.batch_norm_backward(*arguments, output_mask=mask, **options)
    for name, wanted, result, expected in zip(full._fields, mask, some, full, strict=True):
        if wanted:
            assert_same_bits(result, expected, name)
        else:
            assert result is None, name


@given(recipes(least_count=1))
def test_stats(recipe):
    x = recipe.x()
    got = nbnorm.batch_norm_stats(x, axis=recipe.axis)
    ref = reference.batch_norm_stats(x, axis=recipe.axis)
    assert type(got.count) is int
    assert got.count == recipe.count
    assert got.mean.dtype == got.m2.dtype == np.float64
    assert got.mean.shape == got.m2.shape == recipe.channels
    assert_within(got.mean, ref.mean, mean_tolerance(ref, x.dtype), "mean")
    assert_within(got.m2, ref.m2, m2_tolerance(ref, x.dtype), "m2")
    assert_same_bits(x, recipe.x(), "x after the call")


@given(recipes(), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_merged_moments_of_parts_are_those_of_the_whole(recipe, weights):
    x = recipe.x()
    over = next(a for a in range(x.ndim) if a not in {b % x.ndim for b in np.ravel(recipe.axis)})
    cuts = np.cumsum(weights) * x.shape[over] // sum(weights)
    parts = [
        nbnorm.batch_norm_stats(part, axis=recipe.axis) for part in np.split(x, cuts, axis=over)
    ]
    got = parts[0].merge(*parts[1:])
    ref = reference.batch_norm_stats(x, axis=recipe.axis)
    assert got.count == recipe.count
    assert_within(got.mean, ref.mean, mean_tolerance(ref, x.dtype), "mean")
    assert_within(got.m2, ref.m2, m2_tolerance(ref, x.dtype), "m2")
    for correction in (0, 1):
        var = ref.m2 / (ref.count - correction)
        error = m2_tolerance(ref, x.dtype) / (ref.count - correction)
        assert_within(got.var(correction), var, error, "var")
    rstd = 1 / np.sqrt(ref.m2 / ref.count + np.longdouble(1e-5))
    assert_within(got.rstd(1e-5), rstd, rstd_tolerance(ref, rstd, x.dtype), "rstd")


@given(recipes(dtypes=("float32",)), activations)
def test_split_forward_is_the_fused_one(recipe, activation):
    x, gamma, beta, axis = recipe.x(), recipe.gamma(), recipe.beta(), recipe.axis
    residual = recipe.like_x(4)
    fused_running = recipe.running()
    fused = nbnorm.batch_norm_forward(
        x,
        gamma,
        beta,
        *fused_running,
        eps=recipe.eps,
        axis=axis,
        residual=residual,
        activation=activation,
    )
    moments = nbnorm.batch_norm_stats(x, axis=axis)
    running = nbnorm.update_running_stats(*recipe.running(), moments)
    rstd = moments.rstd(recipe.eps)
    y = nbnorm.batch_norm_apply(
        x, gamma, beta, moments.mean, rstd, axis=axis, residual=residual, activation=activation
    )
    # Both ways use the same chunks and expression, so the bits agree.
    assert_same_bits(moments.mean, fused.mean, "mean")
    assert_same_bits(rstd, fused.rstd, "rstd")
    assert_same_bits(y, fused.y, "y")
    assert_same_bits(running[0], fused_running[0], "running_mean")
    assert_same_bits(running[1], fused_running[1], "running_var")


@given(recipes(dtypes=("float32",)), activations, st.booleans(), other_layouts())
def test_split_backward_is_the_fused_one(recipe, activation, with_residual, dy_layout):
    x, gamma, beta, forward, dy, masked = forward_then_masked_dy(
        recipe, activation, with_residual, dy_layout
    )
    axis, mean, rstd = recipe.axis, forward.mean, forward.rstd
    options = {
        "beta": beta,
        "y": forward.y if with_residual else None,
        "activation": activation,
        "axis": axis,
    }
    sums = nbnorm.batch_norm_backward_reduce(dy, x, mean, rstd, gamma=gamma, **options)
    dx = nbnorm.batch_norm_backward_apply(dy, x, gamma, mean, rstd, *sums, recipe.count, **options)
    fused = nbnorm.batch_norm_backward(dy, x, gamma, mean, rstd, **options)
    assert_same_bits(dx, fused.dx, "dx")
    ref = reference.batch_norm_backward_reduce(masked, x, mean, rstd, axis=axis)
    errors = sums_tolerance(masked, x, mean, rstd, axis=axis)
    for name, got, expected, error in zip(
        ("sum_dy", "sum_dy_xhat"), sums, ref, errors, strict=True
    ):
        assert got.dtype == np.float64
        assert got.shape == recipe.channels
        assert_within(got, expected, error, name)
    assert_same_bits(sums[1].astype(fused.dgamma.dtype), fused.dgamma, "dgamma")
    assert_same_bits(sums[0].astype(fused.dbeta.dtype), fused.dbeta, "dbeta")


@given(recipes(dtypes=("float32",)), st.sampled_from(DTYPES))
def test_mean_and_rstd_may_have_any_floating_dtype(recipe, dtype):
    recipe = replace(recipe, scale=1.0, offset=0.0)  # x's statistics would not fit into float16
    x, gamma, dy = recipe.x(), recipe.gamma(), recipe.like_x(5)
    mean, rstd = recipe.running(dtype)
    wide = (mean.astype(np.float64), rstd.astype(np.float64))
    for function, first in (
        (nbnorm.batch_norm_apply, (x, gamma, None)),
        (nbnorm.batch_norm_backward, (dy, x, gamma)),
    ):
        got = function(*first, mean, rstd, axis=recipe.axis)
        expected = function(*first, *wide, axis=recipe.axis)
        for a, b in (
            zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
        ):
            if b is not None:
                assert_same_bits(a, b)
