"""The accuracy bar where it is hard to hold: means far from 0, tiny and huge scales, outliers.

Shapes are named by the traversal they take: rows where the positions of a plane are many, columns
where they are few. Other libraries lose between three and all digits on most of these inputs.
"""

import numba
import numpy as np
import pytest
from strategies import LAYOUTS, Recipe
from tolerances import (
    assert_same_bits,
    assert_within,
    axes_of,
    channels_of,
    dx_tolerance,
    m2_tolerance,
    mean_tolerance,
    reduced_axes,
    rstd_tolerance,
    spread,
    stored,
    sums_tolerance,
    y_tolerance,
)

import nbnorm
from nbnorm import reference

ROWS = [(4, 3, 56, 56), (2, 2, 112, 112), (1, 2, 3000)]
COLUMNS = [(64, 100), (5000, 7), (8, 32, 7, 7), (16, 5, 14, 14)]
NCHW = [(shape, 1) for shape in ROWS + COLUMNS]
CHANNELS_LAST = [((8, 14, 14, 32), -1), ((2, 40, 40, 3), -1)]
PER_ACTIVATION = [((70, 3, 5, 5), (1, 2, 3))]
CASES = NCHW + CHANNELS_LAST + PER_ACTIVATION
dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])
cases = pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)


def setup_module():
    """One thread: a parallel kernel has its serial twin's bits (test_threads.py), and compiles."""
    numba.set_num_threads(1)


def teardown_module():
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)


def draw(shape, axis, dtype, *, offset=0.0, seed=0):
    """Return x with this many standard deviations of mean, and gamma, beta, dy."""
    rng = np.random.default_rng(seed)
    channels = channels_of(shape, axis)
    x = (rng.normal(size=shape) + offset).astype(dtype)
    gamma = (rng.choice([-1, 1], channels) * rng.uniform(0.5, 2, channels)).astype("float32")
    beta = rng.normal(size=channels).astype("float32")
    return x, gamma, beta, rng.normal(size=shape).astype(dtype)


def longest_first(x, axis):
    """View x with its longest reduced axis in front."""
    return np.moveaxis(x, max(reduced_axes(x.ndim, axis), key=lambda a: x.shape[a]), 0)


def channels_first(x, axis):
    """View x with its (first) channel axis in front."""
    return np.moveaxis(x, axes_of(x.ndim, axis)[0], 0)


def first_values(x, axis):
    """View the very first value of every channel."""
    over = reduced_axes(x.ndim, axis)
    return x[tuple(slice(0, 1) if a in over else slice(None) for a in range(x.ndim))]


def assert_accurate(x, gamma, beta, dy, *, axis, eps=1e-5):
    """Hold statistics, forward and both backwards to the bar."""
    stats = nbnorm.batch_norm_stats(x, axis=axis)
    moments = reference.batch_norm_stats(x, axis=axis)
    assert_within(stats.mean, moments.mean, mean_tolerance(moments, x.dtype), "mean")
    assert_within(stats.m2, moments.m2, m2_tolerance(moments, x.dtype), "M2")

    got = nbnorm.batch_norm_forward(x, gamma, beta, eps=eps, axis=axis)
    ref = reference.batch_norm_forward(x, gamma, beta, eps=eps, axis=axis)
    assert_within(got.mean, ref.mean, mean_tolerance(moments, x.dtype), "mean")
    assert_within(got.rstd, ref.rstd, rstd_tolerance(moments, ref.rstd, x.dtype), "rstd")
    y_error = y_tolerance(x, gamma, beta, ref.mean, ref.rstd, axis=axis)
    assert_within(got.y, ref.y, y_error, "y")

    mean, rstd = (np.asarray(s).astype(np.float64) for s in (ref.mean, ref.rstd))
    for training in (True, False):
        grads = nbnorm.batch_norm_backward(dy, x, gamma, mean, rstd, training=training, axis=axis)
        want = reference.batch_norm_backward(dy, x, gamma, mean, rstd, training=training, axis=axis)
        dx_error = dx_tolerance(dy, x, gamma, mean, rstd, axis=axis, training=training)
        assert_within(grads.dx, want.dx, dx_error, "dx")
        beta_error, gamma_error = sums_tolerance(dy, x, mean, rstd, axis=axis)
        gamma_error = stored(gamma_error, want.dgamma, grads.dgamma.dtype)
        beta_error = stored(beta_error, want.dbeta, grads.dbeta.dtype)
        assert_within(grads.dgamma, want.dgamma, gamma_error, "dgamma")
        assert_within(grads.dbeta, want.dbeta, beta_error, "dbeta")


@dtypes
@cases
@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e6])
def test_mean_far_from_zero(shape, axis, dtype, offset):
    x, gamma, beta, dy = draw(shape, axis, dtype, offset=offset)
    assert_accurate(x, gamma, beta, dy, axis=axis)


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
@pytest.mark.parametrize("shape", [(4, 3, 40, 40), (8, 32, 7, 7), (2, 16, 14, 14)], ids=str)
def test_channels_last_view(shape, offset):
    x, gamma, beta, dy = draw(shape, 1, "float32", offset=offset)
    last = [np.moveaxis(np.moveaxis(a, 1, -1).copy(), -1, 1) for a in (x, dy)]
    assert_accurate(last[0], gamma, beta, last[1], axis=1)
    assert_accurate(last[0], gamma, beta, dy, axis=1)


@pytest.mark.parametrize("dy_layout", ["as x", "C", "broadcast"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((4, 3, 20, 20), 1), ((8, 32, 7, 7), 1), ((64, 33), 1), ((3, 5, 6, 40), (0, 3))],
    ids=str,
)
def test_every_layout(shape, axis, layout, dy_layout):
    recipe = Recipe(shape, axis, layout=layout, offset=1e4)
    dy = recipe.like_x(5, layout if dy_layout == "as x" else dy_layout)
    assert_accurate(recipe.x(), recipe.gamma(), recipe.beta(), dy, axis=axis)


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("shape", [(32, 48, 28, 28), (2, 3, 400, 400), (40000, 33)], ids=str)
def test_inputs_large_enough_for_several_threads_and_chunks(shape, offset):
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    x, gamma, beta, dy = draw(shape, 1, "float32", offset=offset)
    assert_accurate(x, gamma, beta, dy, axis=1)
    numba.set_num_threads(1)


@dtypes
@cases
@pytest.mark.parametrize("outlier", [1e3, 1e4, -1e6])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_outlier_as_the_very_first_value(shape, axis, dtype, outlier, offset):
    x, gamma, beta, dy = draw(shape, axis, dtype, offset=offset)
    first_values(x, axis)[...] += outlier
    assert_accurate(x, gamma, beta, dy, axis=axis)


@dtypes
@cases
@pytest.mark.parametrize("scale", [1e25, 1e-25, 1e30, 1e-30])
def test_huge_and_tiny_scales_without_eps(shape, axis, dtype, scale):
    x, gamma, beta, dy = draw(shape, axis, dtype, offset=3.0)
    assert_accurate((x * scale).astype(dtype), gamma, beta, dy, axis=axis, eps=0.0)


@pytest.mark.parametrize("scale", [1e25, 1e-25])
@pytest.mark.parametrize("offset", [1e2, 1e6])
@cases
def test_huge_and_tiny_scales_far_from_zero(shape, axis, scale, offset):
    x, gamma, beta, dy = draw(shape, axis, "float32", offset=offset)
    assert_accurate((x * scale).astype("float32"), gamma, beta, dy, axis=axis, eps=0.0)


@cases
def test_channels_of_very_different_scales(shape, axis):
    x, gamma, beta, dy = draw(shape, axis, "float32", offset=10.0)
    for i, channel in enumerate(channels_first(x, axis)):
        channel *= np.float32(10.0) ** (5 * (i % 11 - 5))
    assert_accurate(x, gamma, beta, dy, axis=axis, eps=0.0)


@dtypes
@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
@pytest.mark.parametrize(
    "shape", [(1, 2, 3 * 4096), (6, 3, 56, 56), (9000, 7), (64, 5, 14, 14)], ids=str
)
def test_first_tiles_are_constant(shape, dtype, value):
    """K is exact there, M2 is 0, and the data that follow are up to 1e4 deviations away."""
    x, gamma, beta, dy = draw(shape, 1, dtype)
    flat = np.moveaxis(x, 1, 0).reshape(shape[1], -1)
    flat[:, : flat.shape[1] // 3] = value
    x = np.moveaxis(flat.reshape(shape[1], shape[0], *shape[2:]), 0, 1).copy()
    assert_accurate(x, gamma, beta, dy, axis=1)


@dtypes
@cases
@pytest.mark.parametrize("step", [1.0, 100.0, 1e4])
def test_mean_drifts_over_the_batch(shape, axis, dtype, step):
    x, gamma, beta, dy = draw(shape, axis, dtype)
    along = longest_first(x, axis)
    along += (step * np.arange(len(along))).reshape(-1, *[1] * (x.ndim - 1)).astype(dtype)
    assert_accurate(x, gamma, beta, dy, axis=axis)


@cases
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_padding_with_zeros(shape, axis, offset):
    x, gamma, beta, dy = draw(shape, axis, "float32", offset=offset)
    along = longest_first(x, axis)
    along[: len(along) // 2] = 0
    assert_accurate(x, gamma, beta, dy, axis=axis)
    x[..., -1:] = 0
    assert_accurate(x, gamma, beta, dy, axis=axis)


def test_two_million_values_in_one_channel():
    x, gamma, beta, dy = draw((1, 1, 2_000_003), 1, "float32", offset=1e4)
    assert_accurate(x, gamma, beta, dy, axis=1)


@pytest.mark.parametrize("spread_of_values", [1e-3, 1e-6])
@cases
def test_variance_far_below_eps(shape, axis, spread_of_values):
    x, gamma, beta, dy = draw(shape, axis, "float32")
    x = (x * np.float32(spread_of_values)).astype("float32")
    assert_accurate(x, gamma, beta, dy, axis=axis, eps=1e-3)


@dtypes
@cases
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.0, 16777217.0, 1e30, 1e-30])
def test_constant_channel_gives_exactly_beta(shape, axis, dtype, activation, value):
    x, gamma, beta, residual = draw(shape, axis, dtype)
    x[...] = value
    per_channel = spread(beta, x, axis).astype(dtype)
    wanted = np.broadcast_to(per_channel, shape)
    with_residual = per_channel + residual
    if activation:
        zero = np.zeros((), dtype)
        wanted, with_residual = np.maximum(wanted, zero), np.maximum(with_residual, zero)
    options = {"axis": axis, "activation": activation}
    assert_same_bits(nbnorm.batch_norm_forward(x, gamma, beta, **options).y, wanted)
    y = nbnorm.batch_norm_forward(x, gamma, beta, residual=residual, **options).y
    assert_same_bits(y, with_residual)
    got = nbnorm.batch_norm_forward(x, gamma, **options)
    assert not np.any(got.y)
    assert_same_bits(got.mean, np.full(beta.shape, x.flat[0], np.float64), "mean")


@dtypes
@cases
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_recomputed_relu_mask_is_that_of_the_forward(shape, axis, dtype, offset):
    """Beta puts many values within a rounding of 0, where any other expression would differ."""
    x, gamma, _, _ = draw(shape, axis, dtype)
    x = (np.round(2 * x) / 2 + offset).astype(dtype)
    mean, rstd = nbnorm.batch_norm_forward(x, axis=axis)[1:]
    beta = (-gamma * (first_values(x, axis).reshape(mean.shape) - mean) * rstd).astype(dtype)
    y = nbnorm.batch_norm_forward(x, gamma, beta, axis=axis, activation="relu").y
    dx = nbnorm.batch_norm_backward(
        np.ones_like(x),
        x,
        gamma,
        mean,
        rstd,
        beta=beta,
        training=False,
        axis=axis,
        activation="relu",
    ).dx
    assert_same_bits(dx != 0, y > 0, "mask")
    # The training path takes its mask from the same expression: sums of dy over it are counts.
    sums = nbnorm.batch_norm_backward_reduce(
        np.ones_like(x), x, mean, rstd, gamma=gamma, beta=beta, axis=axis, activation="relu"
    )
    counts = np.sum(y > 0, axis=reduced_axes(x.ndim, axis)).astype(np.float64)
    assert_same_bits(sums[0], counts, "number of values that pass")


def run_everything(x, dy, residual, gamma, beta, axis):
    """Return all results by name, with statistics and parameter gradients shaped like channels."""
    running = [np.zeros(gamma.shape, "float32"), np.ones(gamma.shape, "float32")]
    options = {"axis": axis, "activation": "relu"}
    forward = nbnorm.batch_norm_forward(x, gamma, beta, *running, residual=residual, **options)
    plain = nbnorm.batch_norm_forward(x, gamma, beta, axis=axis)
    moments = nbnorm.batch_norm_stats(x, axis=axis)
    grads = nbnorm.batch_norm_backward(
        dy, x, gamma, forward.mean, forward.rstd, beta=beta, y=forward.y, **options
    )
    masked = nbnorm.batch_norm_backward(
        dy, x, gamma, forward.mean, forward.rstd, beta=beta, **options
    )
    large = {
        "y": forward.y,
        "plain y": plain.y,
        "dx": grads.dx,
        "dresidual": grads.dresidual,
        "masked dx": masked.dx,
    }
    small = {
        "mean": forward.mean,
        "rstd": forward.rstd,
        "running_mean": running[0],
        "running_var": running[1],
        "m2": moments.m2,
        "dgamma": grads.dgamma,
        "dbeta": grads.dbeta,
        "masked dgamma": masked.dgamma,
    }
    return large, small


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["first", "last", "everywhere"])
@pytest.mark.parametrize("layout", ["C", "channels last"])
@pytest.mark.parametrize("shape", [(4, 3, 56, 56), (1, 2, 3000), (64, 100), (8, 32, 7, 7)], ids=str)
def test_nan_and_inf_change_no_bit_of_another_channel(shape, layout, place, bad):
    x, gamma, beta, dy = draw(shape, 1, "float32")
    residual = dy[::-1].copy()
    if layout == "channels last":
        x, dy, residual = (
            np.moveaxis(np.moveaxis(a, 1, -1).copy(), -1, 1) for a in (x, dy, residual)
        )
    clean = run_everything(x, dy, residual, gamma, beta, 1)
    others = np.arange(shape[1]) != 1
    sample, position = {"first": (0, 0), "last": (-1, -1), "everywhere": (slice(None),) * 2}[place]
    for poisoned in ("x", "dy", "residual"):
        arrays = {"x": x.copy("K"), "dy": dy.copy("K"), "residual": residual.copy("K")}
        arrays[poisoned][(sample, 1) + (position,) * (len(shape) - 2)] = bad
        found = run_everything(*arrays.values(), gamma, beta, 1)
        for name, result in clean[0].items():
            ours, theirs = found[0][name][:, others], result[:, others]
            assert_same_bits(ours, theirs, f"{name} with a bad {poisoned}")
        for name, result in clean[1].items():
            ours, theirs = found[1][name][others], result[others]
            assert_same_bits(ours, theirs, f"{name} with a bad {poisoned}")
        if poisoned == "x":
            assert np.isnan(found[0]["plain y"][:, 1]).all()
            assert not np.isfinite(found[1]["running_mean"][1])
            assert not np.isfinite(found[1]["mean"][1])
        if poisoned == "dy" and place == "everywhere":
            assert not np.isfinite(found[0]["masked dx"][:, 1]).any()
