"""The oracle against finite differences, the paper's identities, exact arithmetic and torch.

Unless stated otherwise, data are longdouble, so that the oracle's equations are checked far below
the rounding of the types it judges.
"""

import inspect
import subprocess
import sys
from fractions import Fraction
from itertools import product

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from tolerances import assert_within, channels_of, reduced_axes

import nbnorm
from nbnorm import reference
from nbnorm.moments import Moments

UNIT = np.finfo(np.longdouble).eps
# A central difference of step h has errors f''' h^2 / 6 and (rounding of f) / h: with this step
# both are about its square.
STEP = UNIT ** (np.longdouble(1) / 3)
# The loss sums some thirty products near 10, and its third derivative is as large.
DIFFERENCE = 1000 * STEP**2
# Sums of up to 1000 terms of about 1, rounded once each.
ROUNDING = 1000 * UNIT

SHAPES = [
    ((7, 3), 1),
    ((3, 2, 2, 3), 1),
    ((4, 2, 3), -1),
    ((2, 3, 4), 0),
    ((5, 2, 3), (1, 2)),  # per activation
    ((2, 6, 2), (-1, 0)),  # neither ascending nor adjacent
]

FUNCTIONS = [
    "batch_norm_forward",
    "batch_norm_inference",
    "batch_norm_backward",
    "batch_norm_stats",
    "update_running_stats",
    "batch_norm_apply",
    "batch_norm_backward_reduce",
    "batch_norm_backward_apply",
    "batch_norm_backward_statistics",
    "batch_norm_double_backward",
    "batch_norm_jvp",
    "fold_batch_norm",
    "fold_into_linear",
    "fold_into_conv",
]


def normal(seed, shape, dtype=np.longdouble):
    """Return standard normal values."""
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def parameters(seed, shape, axis, dtype=np.longdouble):
    """Return gamma, beta, a mean and a variance; gamma of both signs."""
    channels = channels_of(shape, axis)
    gamma, beta, mean = (normal(seed + i, channels, dtype) for i in range(3))
    return gamma, beta, mean, np.exp(normal(seed + 3, channels, dtype))


def numeric_gradient(loss, array):
    """Return d loss / d array by central differences; restore the array."""
    gradient = np.empty_like(array)
    for i in np.ndindex(array.shape):
        value = array[i]
        array[i] = value + STEP
        above = loss()
        array[i] = value - STEP
        gradient[i] = (above - loss()) / (2 * STEP)
        array[i] = value
    return gradient


# --- Gradients against finite differences ---------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_gradients_are_those_of_finite_differences(
    shape, axis, activation, with_residual, training
):
    x, dy = normal(0, shape), normal(1, shape)
    gamma, beta, mean, var = parameters(2, shape, axis)
    residual = normal(6, shape) if with_residual else None

    def forward(activation=activation):
        return reference.batch_norm_forward(
            x,
            gamma,
            beta,
            mean if not training else None,
            var if not training else None,
            training=training,
            eps=0.1,
            axis=axis,
            residual=residual,
            activation=activation,
        )

    def loss():
        return np.sum(dy * forward().y)

    y, batch_mean, rstd = forward()
    if activation == "relu":  # no difference may cross the kink
        assert np.abs(forward(activation=None).y).min() > 100 * STEP
        assert 0 < np.mean(y > 0) < 1
    gradients = reference.batch_norm_backward(
        dy,
        x,
        gamma,
        batch_mean,
        rstd,
        beta=beta,
        y=y if with_residual else None,
        training=training,
        axis=axis,
        activation=activation,
    )
    assert_within(gradients.dx, numeric_gradient(loss, x), DIFFERENCE, "dx")
    assert_within(gradients.dgamma, numeric_gradient(loss, gamma), DIFFERENCE, "dgamma")
    assert_within(gradients.dbeta, numeric_gradient(loss, beta), DIFFERENCE, "dbeta")
    if with_residual:
        expected = numeric_gradient(loss, residual)
        assert_within(gradients.dresidual, expected, DIFFERENCE, "dresidual")
    else:
        assert gradients.dresidual is None


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_the_two_halves_make_the_whole_backward(shape, axis, activation):
    x, dy, residual = normal(0, shape), normal(1, shape), normal(6, shape)
    gamma, beta, _, _ = parameters(2, shape, axis)
    y, mean, rstd = reference.batch_norm_forward(
        x, gamma, beta, axis=axis, residual=residual, activation=activation
    )
    options = {"beta": beta, "y": y, "activation": activation, "axis": axis}
    whole = reference.batch_norm_backward(dy, x, gamma, mean, rstd, **options)
    sums = reference.batch_norm_backward_reduce(dy, x, mean, rstd, gamma=gamma, **options)
    count = reference.batch_norm_stats(x, axis=axis).count
    dx = reference.batch_norm_backward_apply(dy, x, gamma, mean, rstd, *sums, count, **options)
    assert_within(sums[0], whole.dbeta, ROUNDING, "sum_dy")
    assert_within(sums[1], whole.dgamma, ROUNDING, "sum_dy_xhat")
    assert_within(dx, whole.dx, ROUNDING, "dx")


def test_the_mask_recomputed_from_x_is_that_of_y():
    shape = (5, 4, 3)
    x, dy = normal(0, shape), normal(1, shape)
    gamma, beta, _, _ = parameters(2, shape, 1)
    y, mean, rstd = reference.batch_norm_forward(x, gamma, beta, activation="relu")
    options = {"beta": beta, "activation": "relu"}
    recomputed = reference.batch_norm_backward(dy, x, gamma, mean, rstd, **options)
    stored = reference.batch_norm_backward(dy, x, gamma, mean, rstd, y=y, **options)
    for name in ("dx", "dgamma", "dbeta"):
        assert_array_equal(getattr(recomputed, name), getattr(stored, name), name)
    assert recomputed.dresidual is None
    assert_array_equal(stored.dresidual, np.where(y > 0, dy, 0), "dresidual")


# --- Identities of the paper ----------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_gamma_std_and_beta_mean_give_the_input_back(shape, axis):
    x = normal(0, shape) * 3 + 5
    mean, rstd = reference.batch_norm_forward(x, axis=axis)[1:]
    y = reference.batch_norm_forward(x, 1 / rstd, mean, axis=axis).y
    assert_within(y, x, 16 * ROUNDING, "y")


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_outputs_have_mean_beta_and_standard_deviation_gamma(shape, axis):
    gamma, beta, _, _ = parameters(2, shape, axis)
    y = reference.batch_norm_forward(normal(0, shape) + 7, gamma, beta, eps=0.0, axis=axis).y
    over = reduced_axes(len(shape), axis)
    assert_within(y.mean(axis=over), beta, ROUNDING, "mean of y")
    assert_within(y.std(axis=over), np.abs(gamma), ROUNDING, "standard deviation of y")


@pytest.mark.parametrize("a", [1e-3, 0.7, 1e3])
def test_scaling_the_weights_changes_neither_output_nor_input_gradient(a):
    # Section 3.3: BN((aW)u) = BN(Wu), dBN((aW)u)/du = dBN(Wu)/du,
    # dBN((aW)u)/d(aW) = 1/a dBN(Wu)/dW.
    u, W, dy = normal(0, (20, 7)), normal(1, (5, 7)), normal(2, (20, 5))
    gamma, beta, _, _ = parameters(3, dy.shape, 1)

    def layer(W):
        x = u @ W.T
        y, mean, rstd = reference.batch_norm_forward(x, gamma, beta, eps=0.0)
        dx = reference.batch_norm_backward(dy, x, gamma, mean, rstd).dx
        return y, dx @ W, dx.T @ u  # y, du, dW

    y, du, dW = layer(W)
    y_scaled, du_scaled, dW_scaled = layer(np.longdouble(a) * W)
    assert_within(y_scaled, y, ROUNDING, "BN((aW)u)")
    assert_within(du_scaled, du, ROUNDING, "dBN((aW)u)/du")
    assert_within(dW_scaled * np.longdouble(a), dW, ROUNDING, "a dBN((aW)u)/d(aW)")


def test_a_bias_before_batch_norm_has_no_effect_and_no_gradient():
    # Section 3.2: its effect is cancelled by the subtraction of the mean.
    x, dy, bias = normal(0, (20, 5)), normal(1, (20, 5)), normal(2, 5)
    gamma, beta, _, _ = parameters(3, x.shape, 1)
    without = reference.batch_norm_forward(x, gamma, beta)
    y, mean, rstd = reference.batch_norm_forward(x + bias, gamma, beta)
    assert_within(y, without.y, ROUNDING, "y")
    dx = reference.batch_norm_backward(dy, x + bias, gamma, mean, rstd).dx
    assert_within(dx.sum(axis=0), np.zeros(5), ROUNDING, "dbias")
    # with frozen statistics the bias has a gradient
    frozen = reference.batch_norm_backward(dy, x, gamma, mean, rstd, training=False).dx
    assert_within(frozen.sum(axis=0), gamma * rstd * dy.sum(axis=0), ROUNDING, "frozen dbias")


@pytest.mark.parametrize("eps", [0.0, 0.5])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_dx_sums_to_zero_and_is_orthogonal_to_x_hat(shape, axis, eps):
    x, dy = normal(0, shape) + 2, normal(1, shape)
    gamma, _, _, _ = parameters(2, shape, axis)
    xhat, mean, rstd = reference.batch_norm_forward(x, eps=eps, axis=axis)
    dx, dgamma, _, _ = reference.batch_norm_backward(dy, x, gamma, mean, rstd, axis=axis)
    over = reduced_axes(len(shape), axis)
    assert_within(dx.sum(axis=over), np.zeros_like(mean), ROUNDING, "sum of dx")
    # The mean of x_hat^2 is var / (var + eps) = 1 - eps rstd^2: orthogonal except for eps.
    along = gamma * rstd * dgamma * (np.longdouble(eps) * rstd**2)
    assert_within((dx * xhat).sum(axis=over), along, ROUNDING, "sum of dx x_hat")


# --- Statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "offset"),
    [(np.float16, 1e3), *product((np.float32, np.float64), (0, 1e3, 1e6))],
)
def test_statistics_are_those_of_exact_arithmetic(dtype, offset):
    x = (normal(0, (300, 2)) + offset).astype(dtype)
    count, mean, m2 = reference.batch_norm_stats(x)
    assert count == 300
    unit = np.finfo(np.float64 if dtype != np.float64 else np.longdouble).eps
    for c in range(2):
        values = [Fraction(float(v)) for v in x[:, c]]
        exact_mean = sum(values) / 300
        exact_m2 = sum((v - exact_mean) ** 2 for v in values)
        # The mean is rounded. Deviations from it have only their own rounding, and a center off by
        # the mean's rounding adds m (rounding)^2 to M2.
        mean_error, m2_error = (
            abs(Fraction(*v.as_integer_ratio()) - exact)
            for v, exact in ((mean[c], exact_mean), (m2[c], exact_m2))
        )
        assert mean_error <= 2 * float(unit) * max(abs(exact_mean), 1)
        assert m2_error <= 300 * float(unit) * exact_m2 + 300 * (float(unit) * offset) ** 2


@pytest.mark.parametrize("value", [0.1, -1e6, 1e300])
def test_a_constant_channel_has_no_variance_however_long(value):
    x = np.full((100_001, 1), value)
    _, mean, m2 = reference.batch_norm_stats(x)
    assert mean[0] == np.longdouble(value)
    assert m2[0] == 0


def test_channel_axes_are_the_axes_kept_in_ascending_order():
    x = normal(0, (2, 3, 4, 5))
    gamma, beta, _, _ = parameters(1, x.shape, (1, 3))
    expected = reference.batch_norm_forward(x, gamma, beta, axis=(1, 3))
    assert expected.mean.shape == (3, 5)
    for axis in ((3, 1), (-1, -3), (-3, 3)):
        for got, want in zip(
            reference.batch_norm_forward(x, gamma, beta, axis=axis), expected, strict=True
        ):
            assert_array_equal(got, want)
    flat = np.moveaxis(x, 2, 1).reshape(8, 15)
    y, mean, _ = reference.batch_norm_forward(flat, gamma.ravel(), beta.ravel())
    y = np.moveaxis(y.reshape(2, 4, 3, 5), 1, 2)
    assert_within(y, expected.y, ROUNDING, "y of one flattened channel axis")
    assert_within(mean.reshape(3, 5), expected.mean, ROUNDING, "mean")


def test_running_statistics_with_momentum_1_over_k_are_algorithm_2():
    batches = [normal(k, (6, 3)) * (k + 1) for k in range(4)]
    mean, var = np.zeros(3, np.longdouble), np.zeros(3, np.longdouble)
    for k, x in enumerate(batches, start=1):
        momentum = np.longdouble(1) / k
        got = reference.update_running_stats(
            mean, var, reference.batch_norm_stats(x), momentum=momentum
        )
        assert got[0] is mean
        assert got[1] is var
    # Line 10: E[x] = E_B[mean_B], Var[x] = m/(m-1) E_B[var_B].
    means = np.mean([x.mean(axis=0) for x in batches], axis=0)
    variances = np.mean([x.var(axis=0) for x in batches], axis=0) * np.longdouble(6) / 5
    assert_within(mean, means, ROUNDING, "E[x]")
    assert_within(var, variances, 16 * ROUNDING, "Var[x]")


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("momentum", [0.0, 0.25, 1.0, -0.5])
def test_the_forward_updates_running_statistics_in_place(momentum, correction):
    x = normal(0, (4, 3, 5))
    running = [np.full(3, 2, np.float32), np.full(3, 3, np.float32)]
    y = reference.batch_norm_forward(
        x, None, None, *running, momentum=momentum, correction=correction
    ).y
    assert_array_equal(y, reference.batch_norm_forward(x).y)
    mean, var = x.mean(axis=(0, 2)), x.var(axis=(0, 2), ddof=correction)
    unit = np.finfo(np.float32).eps
    assert_within(running[0], (1 - momentum) * 2 + momentum * mean, 4 * unit, "running_mean")
    assert_within(running[1], (1 - momentum) * 3 + momentum * var, 8 * unit, "running_var")


def test_running_statistics_not_in_place_are_new_and_not_rounded():
    moments = Moments(3, np.array([4.0]), np.array([6.0]))
    old = np.array([0.1], np.float32), np.array([1.0], np.float32)
    mean, var = reference.update_running_stats(*old, moments, momentum=0.5, inplace=False)
    assert (old[0][0], old[1][0]) == (np.float32(0.1), 1)
    assert mean.dtype == var.dtype == np.longdouble
    assert mean[0] == (np.longdouble(np.float32(0.1)) + 4) / 2
    assert var[0] == 2


# --- Folding --------------------------------------------------------------------------------------


def conv(u, weight, bias, groups):
    """Convolution of u (N, in, H, W) with weight (out, in / groups, kh, kw)."""
    N, channels, out = *u.shape[:2], weight.shape[0]
    windows = np.lib.stride_tricks.sliding_window_view(u, weight.shape[2:], axis=(2, 3))
    windows = windows.reshape(N, groups, channels // groups, *windows.shape[2:])
    weight = weight.reshape(groups, out // groups, *weight.shape[1:])
    y = np.einsum("ngihwkl,goikl->ngohw", windows, weight)
    return y.reshape(N, out, *y.shape[3:]) + bias[:, None, None]


def conv_transposed(u, weight, bias, groups):
    """Transposed convolution of stride 2, of u (N, in, H, W) with weight (in, out/groups, kh, kw).

    Each input value adds its kernel to the output, at twice its position.
    """
    N, channels, H, W = u.shape
    per_group, kh, kw = weight.shape[1:]
    y = np.zeros((N, groups * per_group, 2 * (H - 1) + kh, 2 * (W - 1) + kw), u.dtype)
    for i, j, h, w in np.ndindex(channels, per_group, H, W):
        group = i // (channels // groups)
        y[:, group * per_group + j, 2 * h : 2 * h + kh, 2 * w : 2 * w + kw] += (
            u[:, i, h, w, None, None] * weight[i, j]
        )
    return y + bias[:, None, None]


CONVOLUTIONS = [
    pytest.param(groups, transposed, id=f"{'transposed' if transposed else 'plain'}-{groups}")
    for groups, transposed in product((1, 2, 4), (False, True))
]


def convolution(groups, transposed, dtype=np.longdouble):
    """Return input, weight and bias of a convolution of 4 channels to 12."""
    shape = (4, 12 // groups, 3, 2) if transposed else (12, 4 // groups, 3, 2)
    return normal(0, (2, 4, 5, 4), dtype), normal(1, shape, dtype), normal(2, 12, dtype)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("groups", "transposed"), CONVOLUTIONS)
def test_a_folded_convolution_is_the_convolution_then_inference(groups, transposed, with_bias):
    u, weight, bias = convolution(groups, transposed)
    if not with_bias:
        bias = np.zeros_like(bias)
    norm = parameters(3, (1, 12), 1)
    layer = conv_transposed if transposed else conv
    expected = reference.batch_norm_inference(layer(u, weight, bias, groups), *norm, eps=0.1)
    folded, folded_bias = reference.fold_into_conv(
        weight, bias if with_bias else None, *norm, eps=0.1, transposed=transposed, groups=groups
    )
    assert folded.shape == weight.shape
    assert_within(layer(u, folded, folded_bias, groups), expected, ROUNDING, "y")


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_folded_linear_layer_is_the_layer_then_inference(with_bias):
    u, weight = normal(0, (6, 4)), normal(1, (3, 4))
    bias = normal(2, 3) if with_bias else None
    norm = parameters(3, (1, 3), 1)
    x = u @ weight.T + (0 if bias is None else bias)
    expected = reference.batch_norm_inference(x, *norm)
    folded, folded_bias = reference.fold_into_linear(weight, bias, *norm)
    assert_within(u @ folded.T + folded_bias, expected, ROUNDING, "y")


@pytest.mark.parametrize(("with_gamma", "with_beta"), list(product((True, False), repeat=2)))
def test_scale_and_shift_are_inference(with_gamma, with_beta):
    x = normal(0, (9, 3))
    gamma, beta, mean, var = parameters(1, x.shape, 1)
    gamma, beta = gamma if with_gamma else None, beta if with_beta else None
    scale, shift = reference.fold_batch_norm(gamma, beta, mean, var, eps=0.1)
    expected = reference.batch_norm_inference(x, gamma, beta, mean, var, eps=0.1)
    assert_within(scale * x + shift, expected, ROUNDING, "y")


# --- Edges of the contract ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (2, 0, 4), (0, 0, 4)])
def test_no_values_or_no_channels(shape):
    x, channels = np.zeros(shape, np.float32), shape[1]
    running = np.full(channels, 2, np.float32), np.full(channels, 3, np.float32)
    y, mean, rstd = reference.batch_norm_forward(x, None, None, *running)
    assert y.shape == shape
    assert np.array_equal(mean, np.zeros(channels))
    assert np.array_equal(rstd, np.zeros(channels))
    assert np.all(running[0] == 2)
    assert np.all(running[1] == 3)
    dx, dgamma, dbeta, _ = reference.batch_norm_backward(x, x, None, mean, rstd)
    assert dx.shape == shape
    assert np.array_equal(dgamma, np.zeros(channels))
    assert np.array_equal(dbeta, np.zeros(channels))


def test_no_spread_and_no_eps_give_rstd_0_and_beta():
    x, beta = np.full((4, 2, 3), 0.1), np.array([0.5, -2.0])
    y, _, rstd = reference.batch_norm_forward(x, np.array([3.0, 4.0]), beta, eps=0.0)
    assert np.all(rstd == 0)
    assert np.all(y == beta[:, None])
    one = reference.batch_norm_forward(np.array([[7.0, 8.0]]), None, beta, correction=0)
    assert np.all(one.y == beta)
    assert np.all(reference.fold_batch_norm(None, beta, beta, np.zeros(2), eps=0.0)[0] == 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_nan_and_inf_stay_in_their_channel_and_pass_relu(bad, activation):
    x = normal(0, (5, 3, 4), np.float32)
    spoilt = x.copy()
    spoilt[2, 1, 3] = bad
    y, mean, rstd = reference.batch_norm_forward(spoilt, activation=activation)
    clean = reference.batch_norm_forward(x, activation=activation)
    assert np.all(np.isnan(y[:, 1]))
    assert_array_equal(y[:, ::2], clean.y[:, ::2])
    dy = normal(1, x.shape, np.float32)
    gradients = reference.batch_norm_backward(dy, spoilt, None, mean, rstd)
    expected = reference.batch_norm_backward(dy, x, None, clean.mean, clean.rstd)
    assert np.all(np.isnan(gradients.dx[:, 1]))
    assert_array_equal(gradients.dx[:, ::2], expected.dx[:, ::2])


@pytest.mark.parametrize("mask", list(product((True, False), repeat=4)))
def test_outputs_dropped_are_none(mask):
    x, dy = normal(0, (5, 3)), normal(1, (5, 3))
    y, mean, rstd = reference.batch_norm_forward(x, residual=x)
    whole = reference.batch_norm_backward(dy, x, None, mean, rstd, y=y)
    part = reference.batch_norm_backward(dy, x, None, mean, rstd, y=y, output_mask=mask)
    for wanted, got, want in zip(mask, part, whole, strict=True):
        if wanted:
            assert_array_equal(got, want)
        else:
            assert got is None


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_results_have_the_computing_dtype_and_inputs_are_left_alone(dtype):
    computing = np.longdouble if dtype is np.float64 else np.float64
    arrays = [normal(i, (5, 3), dtype) for i in range(2)]
    arrays += [a.astype(ml_dtypes.bfloat16) for a in parameters(2, (5, 3), 1)]
    for array in arrays:
        array.flags.writeable = False
    x, dy, gamma, beta, mean, var = arrays
    forward = reference.batch_norm_forward(x, gamma, beta, residual=dy, activation="relu")
    frozen = reference.batch_norm_forward(x, gamma, beta, mean, var, training=False)
    inference = reference.batch_norm_inference(x, gamma, beta, mean, var)
    moments = reference.batch_norm_stats(x)
    rest = {"beta": beta, "y": forward.y, "activation": "relu"}
    backward = reference.batch_norm_backward(dy, x, gamma, *forward[1:], **rest)
    sums = reference.batch_norm_backward_reduce(dy, x, *forward[1:], gamma=gamma, **rest)
    dx = reference.batch_norm_backward_apply(dy, x, gamma, *forward[1:], *sums, 5, **rest)
    for result in (*forward, *frozen, inference, *moments[1:], *backward, *sums, dx):
        assert result.dtype == computing


def test_out_is_filled_rounded_and_returned_and_may_be_the_input():
    x, dy = normal(0, (5, 3), np.float32), normal(1, (5, 3), np.float32)
    y, mean, rstd = reference.batch_norm_forward(x)
    dx = reference.batch_norm_backward(dy, x, None, mean, rstd).dx
    assert reference.batch_norm_backward(dy, x, None, mean, rstd, out=dy).dx is dy
    assert_array_equal(dy, dx.astype(np.float32))
    assert reference.batch_norm_forward(x, out=x).y is x
    assert_array_equal(x, y.astype(np.float32))


# --- Against the package and torch ----------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_are_those_of_the_package(name):
    def shape(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    assert shape(getattr(reference, name)) == shape(getattr(nbnorm, name))


def test_the_package_does_not_import_its_oracle():
    code = "import sys, nbnorm; sys.exit('nbnorm.reference' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(16, 5), (4, 5, 6), (3, 5, 4, 2), (2, 5, 3, 2, 2)])
def test_agrees_with_torch(shape, training):
    torch = pytest.importorskip("torch")
    x, dy = normal(0, shape, np.float64) * 2 + 1, normal(1, shape, np.float64)
    gamma, beta, mean, var = parameters(2, shape, 1, np.float64)
    tensors = [torch.tensor(a, requires_grad=True) for a in (x, gamma, beta)]
    running = [torch.tensor(mean), torch.tensor(var)]
    theirs = torch.nn.functional.batch_norm(
        tensors[0], *running, *tensors[1:], training=training, momentum=0.3, eps=1e-3
    )
    theirs.backward(torch.tensor(dy))
    y, batch_mean, rstd = reference.batch_norm_forward(
        x, gamma, beta, mean, var, training=training, momentum=0.3, eps=1e-3
    )
    ours = reference.batch_norm_backward(dy, x, gamma, batch_mean, rstd, training=training)
    tolerance = 1000 * np.finfo(np.float64).eps  # as ROUNDING, of the other's float64
    assert_within(theirs.detach().numpy(), y, tolerance, "y")
    for name, tensor in zip(("dx", "dgamma", "dbeta"), tensors, strict=True):
        assert_within(tensor.grad.numpy(), getattr(ours, name), tolerance, name)
    assert_within(running[0].numpy(), mean, tolerance, "running_mean")
    assert_within(running[1].numpy(), var, tolerance, "running_var")


@pytest.mark.parametrize(("groups", "transposed"), CONVOLUTIONS)
def test_folding_agrees_with_torch(groups, transposed):
    torch = pytest.importorskip("torch")
    u, weight, bias = convolution(groups, transposed, np.float64)
    gamma, beta, mean, var = parameters(3, (1, 12), 1, np.float64)

    def layer(weight, bias):
        tensors = [torch.tensor(a.astype(np.float64)) for a in (u, weight, bias)]
        if transposed:
            return torch.nn.functional.conv_transpose2d(*tensors, stride=2, groups=groups)
        return torch.nn.functional.conv2d(*tensors, groups=groups)

    tolerance = 1000 * np.finfo(np.float64).eps
    ours = (conv_transposed if transposed else conv)(u, weight, bias, groups)
    assert_within(layer(weight, bias).numpy(), ours, tolerance, "convolution of this file")
    expected = torch.nn.functional.batch_norm(
        layer(weight, bias), *(torch.tensor(a) for a in (mean, var, gamma, beta)), eps=0.1
    )
    folded = reference.fold_into_conv(
        weight, bias, gamma, beta, mean, var, eps=0.1, transposed=transposed, groups=groups
    )
    assert_within(layer(*folded).numpy(), expected.numpy(), tolerance, "y")
