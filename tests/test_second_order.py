"""Second derivatives and forward mode against the oracle, and the oracle against differences."""

from itertools import product

import ml_dtypes
import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, Recipe, dtype_of, lay_out, other_layouts, recipes
from tolerances import (
    UNITS,
    assert_same_bits,
    assert_within,
    channels_of,
    one_unit,
    reduced_axes,
    second_dgamma_tolerance,
    second_dx_tolerance,
    spread,
    stored,
    ty_tolerance,
)

import nbnorm
from nbnorm import reference

pytestmark = pytest.mark.slow

UNIT = np.finfo(np.longdouble).eps
STEP = UNIT ** (np.longdouble(1) / 3)  # of central differences, as in test_reference.py
DIFFERENCE = 1000 * STEP**2
SHAPES = [((7, 3), 1), ((3, 2, 2, 3), 1), ((4, 2, 3), -1), ((5, 2, 3), (1, 2))]
PLANES = {"rows": (4, 3, 20, 20), "columns": (33, 5, 7, 7), "vectors": (70, 40)}


def setup_module():
    """One thread: any number gives the same bits (test_threads.py)."""
    numba.set_num_threads(1)


def teardown_module():
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)


def normal(seed, shape, dtype=np.longdouble):
    return np.asarray(np.random.default_rng(seed).normal(size=shape)).astype(dtype)


def central(function, *arrays):
    """Return the numerical gradient of a scalar function with respect to each array."""
    gradients = []
    for array in arrays:
        gradient = np.zeros_like(array)
        for i in np.ndindex(array.shape):
            value = array[i]
            array[i] = value + STEP
            above = function()
            array[i] = value - STEP
            below = function()
            array[i] = value
            gradient[i] = (above - below) / (2 * STEP)
        gradients.append(gradient)
    return gradients


def small_case(shape, axis):
    """Return ddx, ddgamma, ddbeta, dy, x, gamma, beta in longdouble, and a mean and a variance."""
    channels = channels_of(shape, axis)
    large = (normal(i, shape) for i in range(3))
    small = (normal(3 + i, channels) for i in range(4))
    return *large, *small, normal(8, channels), 1 + normal(9, channels) ** 2


def statistics_of(x, axis, mean, var, training):
    if not training:
        return mean, 1 / np.sqrt(var + 0.1)
    moments = reference.batch_norm_stats(x, axis=axis)
    return moments.mean, 1 / np.sqrt(moments.m2 / moments.count + 0.1)


# The oracle


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_double_backward_is_the_derivative_of_backward(shape, axis, training):
    ddx, dy, x, ddgamma, ddbeta, gamma, _, mean, var = small_case(shape, axis)

    def loss():
        used = statistics_of(x, axis, mean, var, training)
        grads = reference.batch_norm_backward(dy, x, gamma, *used, training=training, axis=axis)
        pairs = (ddx, grads.dx), (ddgamma, grads.dgamma), (ddbeta, grads.dbeta)
        return sum(np.sum(a * b) for a, b in pairs)

    found = reference.batch_norm_double_backward(
        ddx, ddgamma, ddbeta, dy, x, gamma, *statistics_of(x, axis, mean, var, training),
        training=training, axis=axis,
    )  # fmt: skip
    for name, got, expected in zip(found._fields, found, central(loss, dy, x, gamma), strict=True):
        assert_within(got, expected, DIFFERENCE, name)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_jvp_is_the_derivative_of_forward(shape, axis, training):
    tx, _, x, tgamma, tbeta, gamma, beta, mean, var = small_case(shape, axis)

    def y(step):
        moved = x + step * tx
        used = statistics_of(moved, axis, mean, var, training)
        parameters = gamma + step * tgamma, beta + step * tbeta
        return reference.batch_norm_apply(moved, *parameters, *used, axis=axis)

    used = statistics_of(x, axis, mean, var, training)
    found = reference.batch_norm_jvp(
        tx, tgamma, tbeta, x, gamma, *used, training=training, axis=axis
    )
    assert_within(found, (y(STEP) - y(-STEP)) / (2 * STEP), DIFFERENCE, "ty")


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_gradients_of_given_statistics(shape, axis):
    _, dy, x, _, _, gamma, beta, mean, var = small_case(shape, axis)

    def loss():
        y = reference.batch_norm_inference(x, gamma, beta, mean, var, eps=0.1, axis=axis)
        return np.sum(dy * y)

    rstd = 1 / np.sqrt(var + 0.1)
    sums = reference.batch_norm_backward_reduce(dy, x, mean, rstd, axis=axis)
    found = reference.batch_norm_backward_statistics(*sums, gamma, rstd)
    for name, got, expected in zip(("dmean", "dvar"), found, central(loss, mean, var), strict=True):
        assert_within(got, expected, DIFFERENCE, name)


# The kernels


def case(recipe, layout="C"):
    """Return ddx, ddgamma, ddbeta, dy, x, gamma and the float64 statistics of a recipe."""
    x, gamma = recipe.x(), recipe.gamma()
    forward = reference.batch_norm_forward(x, gamma, eps=recipe.eps, axis=recipe.axis)
    mean, rstd = (np.asarray(a).astype(np.float64) for a in (forward.mean, forward.rstd))
    ddgamma, ddbeta = recipe.beta(), recipe.running("float64")[0]
    return recipe.like_x(6, layout), ddgamma, ddbeta, recipe.like_x(5), x, gamma, mean, rstd


def overflowing(values, dtype):
    """Return values with Inf for those that are beyond a dtype."""
    greatest = float(ml_dtypes.finfo(dtype).max)
    return np.where(np.abs(values) > greatest, np.copysign(np.inf, values), values)


def check_double_backward(arguments, axis, training):
    got = nbnorm.batch_norm_double_backward(*arguments, training=training, axis=axis)
    ref = reference.batch_norm_double_backward(*arguments, training=training, axis=axis)
    ref = type(ref)(*(overflowing(a, b.dtype) for a, b in zip(ref, got, strict=True)))
    ddx, ddgamma, ddbeta, dy, x, gamma, mean, rstd = arguments
    options = {"axis": axis, "training": training}
    assert got.ddy.dtype == got.dx.dtype == x.dtype
    assert got.dgamma.dtype == (x if gamma is None else gamma).dtype
    error = ty_tolerance(ddx, ddgamma, ddbeta, x, gamma, mean, rstd, **options)
    assert_within(got.ddy, ref.ddy, error, "ddy")
    error = second_dx_tolerance(ddx, ddgamma, dy, x, gamma, mean, rstd, **options)
    assert_within(got.dx, ref.dx, error, "dx")
    if ddx is None:
        assert not got.dgamma.any()
        return got
    error = second_dgamma_tolerance(ddx, dy, x, mean, rstd, **options)
    assert_within(got.dgamma, ref.dgamma, stored(error, ref.dgamma, got.dgamma.dtype), "dgamma")
    return got


@given(recipes(), st.booleans(), other_layouts())
def test_double_backward(recipe, training, layout):
    arguments = case(recipe, layout)
    copies = [None if a is None else np.array(a) for a in arguments]
    check_double_backward(arguments, recipe.axis, training)
    for after, before in zip(arguments, copies, strict=True):
        if before is not None:
            assert_same_bits(np.ascontiguousarray(after), np.ascontiguousarray(before), "argument")


@given(recipes(), st.booleans(), other_layouts())
def test_jvp(recipe, training, layout):
    tx, tgamma, tbeta, _, x, gamma, mean, rstd = case(recipe, layout)
    arguments = tx, tgamma, tbeta, x, gamma, mean, rstd
    options = {"training": training, "axis": recipe.axis}
    got = nbnorm.batch_norm_jvp(*arguments, **options)
    ref = reference.batch_norm_jvp(*arguments, **options)
    assert got.dtype == x.dtype
    assert_within(got, ref, ty_tolerance(*arguments, **options), "ty")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("given", list(product((False, True), repeat=3)))
@pytest.mark.parametrize("shape", PLANES.values(), ids=PLANES)
def test_what_is_none_is_0(shape, given, training):
    arguments = case(Recipe(shape, 1, offset=3.0))
    zeros = [np.zeros_like(a) for a in arguments[:3]]
    some = [a if here else None for a, here in zip(arguments, given, strict=False)]
    full = [a if here else zero for a, here, zero in zip(arguments, given, zeros, strict=False)]
    got = check_double_backward((*some, *arguments[3:]), 1, training)
    other = nbnorm.batch_norm_double_backward(*full, *arguments[3:], training=training)
    ty = nbnorm.batch_norm_jvp(*some, *arguments[4:], training=training)
    # Kernels of the first order serve without ddx, so that bits may differ, but not by more.
    error = ty_tolerance(*some, *arguments[4:], axis=1, training=training)
    assert_within(ty, got.ddy, error, "ty")
    for name, one, two in zip(got._fields, got, other, strict=True):
        assert_within(one, two, UNITS * one_unit(np.max(np.abs(two)), one.dtype), name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", PLANES.values(), ids=PLANES)
def test_jvp_and_the_gradient_of_dy_are_one_map(shape, dtype):
    """The second derivative's ddy is the derivative of y along ddx: to the bit."""
    ddx, ddgamma, ddbeta, dy, x, gamma, mean, rstd = case(Recipe(shape, 1, dtype=dtype))
    args = x, gamma, mean, rstd
    ty = nbnorm.batch_norm_jvp(ddx, ddgamma, ddbeta, *args, training=False)
    found = nbnorm.batch_norm_double_backward(ddx, ddgamma, ddbeta, dy, *args, training=False)
    assert_same_bits(ty, found.ddy, "ty")


@pytest.mark.parametrize("shape", PLANES.values(), ids=PLANES)
@pytest.mark.parametrize(
    ("of_x", "of_dy", "of_ddx"),
    [
        (1e-20, 1e-2, 1e-2),  # rstd^2 alone leaves float32
        (1e-25, 1e-20, 1e-25),  # and products of dy and ddx underflow,
        (1e25, 1e20, 1e25),  # or overflow
        (1e30, 1.0, 1e30),
        (3e37, 1e30, 1e10),
    ],
)
def test_numbers_beyond_float32_within(shape, of_x, of_dy, of_ddx):
    """Factors and sums may leave float32's range; results are accurate where they fit."""
    recipe = Recipe(shape, 1, scale=of_x, eps=0.0)
    _, _, ddbeta, dy, x, gamma, _, _ = case(recipe)
    ddx = recipe.like_x(6) * np.float32(of_ddx)
    x[:, 0] = recipe.like_x(7)[:, 0]  # an ordinary channel beside the others
    forward = reference.batch_norm_forward(x, gamma, eps=0.0)
    arguments = ddx, None, ddbeta, dy * np.float32(of_dy), x, gamma, forward.mean, forward.rstd
    check_double_backward(arguments, 1, True)


@pytest.mark.parametrize("shape", PLANES.values(), ids=PLANES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_stay_in_their_channel(shape, training, bad):
    clean = case(Recipe(shape, 1))
    for i in 0, 3, 4:  # ddx, dy, x
        arguments = list(clean)
        arguments[i] = arguments[i].copy()
        arguments[i][1, 2] = bad
        expected = nbnorm.batch_norm_double_backward(*clean, training=training)
        got = nbnorm.batch_norm_double_backward(*arguments, training=training)
        others = np.arange(shape[1]) != 2
        assert not np.isfinite(got.ddy[1, 2]).all() or i == 3
        for name, one, two in zip(got._fields, got, expected, strict=True):
            channels = (slice(None), others) if one.ndim > 1 else others
            assert_same_bits(one[channels], two[channels], name)


@pytest.mark.parametrize("shape", [(3000, 8, 16, 17), (70_000, 24)], ids=["rows", "columns"])
def test_large_and_small_divisions_have_the_same_bits(shape):
    """The number of threads, and with it the division into blocks, does not change the bits."""
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    try:
        rng = np.random.default_rng(0)
        ddx, dy, x = (rng.standard_normal(shape, np.float32) for _ in range(3))
        parameters = [rng.normal(size=shape[1]) for _ in range(3)]
        mean, rstd = rng.normal(size=shape[1]), rng.uniform(0.5, 2, shape[1])
        args = ddx, *parameters[:2], dy, x, parameters[2].astype(np.float32), mean, rstd
        several = nbnorm.batch_norm_double_backward(*args)
        ty = nbnorm.batch_norm_jvp(*args[:3], *args[4:])
        numba.set_num_threads(1)
        one = nbnorm.batch_norm_double_backward(*args)
        for name, a, b in zip(one._fields, several, one, strict=True):
            assert_same_bits(a, b, name)
        assert_same_bits(nbnorm.batch_norm_jvp(*args[:3], *args[4:]), ty, "ty")
    finally:
        numba.set_num_threads(1)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 5), (4, 3, 0)])
@pytest.mark.parametrize("with_ddx", [True, False])
def test_no_values(shape, with_ddx):
    x, channels = np.zeros(shape, np.float32), np.zeros(shape[1])
    ddx = x if with_ddx else None
    found = nbnorm.batch_norm_double_backward(
        ddx, channels, channels, x, x, None, channels, channels
    )
    assert found.ddy.shape == found.dx.shape == shape
    assert_same_bits(found.dgamma, np.zeros(shape[1], np.float32), "dgamma")
    ty = nbnorm.batch_norm_jvp(ddx, channels, channels, x, None, channels, channels)
    assert ty.shape == shape


@pytest.mark.parametrize("shape", PLANES.values(), ids=PLANES)
def test_constant_channels_with_eps_0(shape):
    """rstd is 0 there, and with it what depends on x: ty = tbeta."""
    x = np.full(shape, 3, np.float32)
    mean, rstd = np.full(shape[1], 3.0), np.zeros(shape[1])
    ddx, e, b, dy, *_ = case(Recipe(shape, 1))
    found = nbnorm.batch_norm_double_backward(ddx, e, b, dy, x, None, mean, rstd)
    assert not found.dx.any()
    assert not found.dgamma.any()
    expected = np.broadcast_to(spread(b, x, 1), shape)
    assert_within(found.ddy, expected, one_unit(expected, np.float32), "ddy")


@pytest.mark.parametrize("layout", ["channels last", "Fortran", "reversed", "padded rows"])
def test_results_lie_as_x_does(layout):
    ddx, e, b, dy, x, gamma, mean, rstd = case(Recipe((4, 6, 9, 11), 1))
    expected = nbnorm.batch_norm_double_backward(ddx, e, b, dy, x, gamma, mean, rstd)
    turned = lay_out(x, layout)
    got = nbnorm.batch_norm_double_backward(ddx, e, b, dy, turned, gamma, mean, rstd)
    like = nbnorm.batch_norm_apply(turned, None, None, mean, rstd)
    assert got.ddy.strides == got.dx.strides == like.strides
    error = second_dx_tolerance(ddx, e, dy, x, gamma, mean, rstd, axis=1)
    assert_within(got.dx, expected.dx, 2 * error, "dx")


# Given statistics


@pytest.mark.parametrize("gamma_dtype", [None, *DTYPES])
@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_backward_statistics(shape, gamma_dtype):
    gamma = None if gamma_dtype is None else normal(0, shape, dtype_of(gamma_dtype))
    sum_dy, sum_dy_xhat = normal(1, shape, np.float64), normal(2, shape, np.float32)
    rstd = np.abs(normal(3, shape, np.float64))
    got = nbnorm.batch_norm_backward_statistics(sum_dy, sum_dy_xhat, gamma, rstd)
    ref = reference.batch_norm_backward_statistics(
        sum_dy, sum_dy_xhat, None if gamma is None else gamma.astype(np.float64), rstd
    )
    for name, a, b in zip(("dmean", "dvar"), got, ref, strict=True):
        assert a.dtype == np.float64
        assert_within(a, b, UNITS * one_unit(b, np.float64), name)


def test_backward_statistics_complete_the_chain_rule():
    """With d mean/dx and d var/dx, frozen statistics and theirs give the gradient in training."""
    x, dy = normal(0, (50, 4), np.float64), normal(1, (50, 4), np.float64)
    gamma = normal(2, 4, np.float64)
    _, mean, rstd = nbnorm.batch_norm_forward(x, gamma)
    whole = nbnorm.batch_norm_backward(dy, x, gamma, mean, rstd)
    frozen = nbnorm.batch_norm_backward(dy, x, gamma, mean, rstd, training=False)
    dmean, dvar = nbnorm.batch_norm_backward_statistics(frozen.dbeta, frozen.dgamma, gamma, rstd)
    dx = frozen.dx + dmean / 50 + dvar * 2 * (x - mean) / 50
    over = reduced_axes(2, 1)
    assert over == (0,)
    assert_within(dx, whole.dx, 8 * UNITS * one_unit(np.max(np.abs(dx)), np.float64), "dx")
