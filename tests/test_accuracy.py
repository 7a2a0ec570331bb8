"""Accuracy on hard inputs: means far from 0, tiny and huge scales, outliers.

Shapes are named by their traversal: rows if a plane has many positions, columns if it has few.
Other libraries lose between three and all digits on most of these inputs.
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
    """Use one thread: any number gives the same bits (test_threads.py)."""
    numba.set_num_threads(1)


def teardown_module():
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)


def draw(shape, axis, dtype, *, offset=0.0, seed=0):
    """Return x with a mean of `offset` standard deviations, and gamma, beta and dy."""
    rng = np.random.default_rng(seed)
    channels = channels_of(shape, axis)
    x = (rng.normal(size=shape) + offset).astype(dtype)
    gamma = (rng.choice([-1, 1], channels) * rng.uniform(0.5, 2, channels)).astype("float32")
    beta = rng.normal(size=channels).astype("float32")
    return x, gamma, beta, rng.normal(size=shape).astype(dtype)


def longest_first(x, axis):
    """View x with its longest reduced axis first."""
    return np.moveaxis(x, max(reduced_axes(x.ndim, axis), key=lambda a: x.shape[a]), 0)


def channels_first(x, axis):
    """View x with its (first) channel axis first."""
    return np.moveaxis(x, axes_of(x.ndim, axis)[0], 0)


def first_values(x, axis):
    """View the first value of every channel."""
    over = reduced_axes(x.ndim, axis)
    return x[tuple(slice(0, 1) if a in over else slice(None) for a in range(x.ndim))]


def assert_accurate(x, gamma, beta, dy, *, axis, eps=1e-5):
    """Check statistics, forward, and both backward passes against their tolerances."""
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
@pytest.mark.parametrize(
    ("x_scale", "dy_scale", "gamma"),
    [(1e25, 1e-20, 1e20), (1e20, 1e-20, 1e6), (1e12, 1e-30, 1e20), (1e37, 1e-36, 1e37)],
)
def test_gradients_that_only_a_large_gamma_brings_back_into_range(
    shape, axis, x_scale, dy_scale, gamma
):
    """rstd mean(dy x_hat) is subnormal or 0 in float32; rounding it would put dx off by 77 %."""
    x, _, _, dy = draw(shape, axis, "float32")
    x, dy = (x * x_scale).astype("float32"), (dy * dy_scale).astype("float32")
    gamma = np.full(channels_of(shape, axis), gamma)
    assert_accurate(x, gamma, None, dy, axis=axis, eps=0.0)


def assert_dx_near_the_reference(dy, x, gamma):
    _, mean, rstd = nbnorm.batch_norm_forward(x, gamma, eps=0.0)
    dx = nbnorm.batch_norm_backward(dy, x, gamma, mean, rstd)[0]
    want = reference.batch_norm_backward(dy, x, gamma, mean, rstd)[0]
    np.testing.assert_allclose(dx, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())


def test_a_large_dy_of_one_value_among_the_smallest_stays_finite():
    """mean(dy) must bound the power of two v: mean(dy x_hat) ignores a dy where x is the mean."""
    x = np.float32([0, 1e30, -1e30, 3e30, -3e30] * 200)[:, None]
    dy = np.zeros_like(x)
    dy[0], dy[1] = 1e30, 1e-20
    assert_dx_near_the_reference(dy, x, np.full(1, 1e30))


def test_a_mean_of_dy_x_hat_that_is_nearly_0_keeps_v_in_range():
    """p = rstd mean(dy x_hat) of 1e-78 would require v = 1e40."""
    x = np.float32([1e26, 1e36, -1e36, -1e26] * 10)[:, None]
    dy = np.zeros_like(x)
    dy[0], dy[3] = 1e-30, -1e-30
    assert_dx_near_the_reference(dy, x, np.full(1, 1e38))


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
    """In these tiles the shift K is exact and M2 is 0; later data are up to 1e4 deviations away."""
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
    """beta puts many y within a rounding of 0, where any other expression gives another mask."""
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
    # The training path uses the same mask expression. dy is 1, so its sum over the mask is a count.
    sums = nbnorm.batch_norm_backward_reduce(
        np.ones_like(x), x, mean, rstd, gamma=gamma, beta=beta, axis=axis, activation="relu"
    )
    counts = np.sum(y > 0, axis=reduced_axes(x.ndim, axis)).astype(np.float64)
    assert_same_bits(sums[0], counts, "number of values that pass")


def run_everything(x, dy, residual, gamma, beta, axis):
    """Return two dicts of results by name: arrays of x's shape, and values per channel."""
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


FULL_RANGE = [(4, 2, 20, 20), (40, 3), (4, 6, 7, 7), (5, 3, 12, 12)]
full_range = pytest.mark.parametrize("shape", FULL_RANGE, ids=str)
narrow = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])


def as_dtype(values, dtype):
    """Round to a dtype by name; the values must fit into float32."""
    if dtype == "bfloat16":
        return np.asarray(values, "float32").astype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.asarray(values, dtype)


def largest(dtype):
    """Return the greatest finite number of a dtype."""
    return {"float16": 65504.0, "bfloat16": float.fromhex("0x1.fep127")}.get(
        dtype, float(np.finfo("float32").max)
    )


def draw_full_range(shape, dtype, extreme, seed=0):
    """Return x with +-extreme in every channel, gamma, beta and dy."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, shape) * extreme
    x[0], x[-1] = extreme, -extreme
    gamma, beta = rng.uniform(0.5, 2, shape[1]), rng.normal(size=shape[1])
    dy = rng.normal(size=shape)
    return as_dtype(x, dtype), gamma.astype("float32"), beta.astype("float32"), as_dtype(dy, dtype)


@narrow
@full_range
def test_values_over_the_whole_range(shape, dtype):
    x, gamma, beta, dy = draw_full_range(shape, dtype, largest(dtype))
    assert_accurate(x, gamma, beta, dy, axis=1)


@full_range
def test_subnormal_values_without_eps(shape):
    x, gamma, beta, dy = draw_full_range(shape, "float32", 1e-42)
    assert_accurate(x, gamma, beta, np.float32(1e-5) * dy, axis=1, eps=0.0)


@pytest.mark.parametrize("size", [1e36, largest("float32")])
@pytest.mark.parametrize("activation", [None, "relu"])
@full_range
def test_gradients_over_the_whole_range(shape, activation, size):
    """Sums of dy leave float32's range; x is so large that dx does not."""
    x, gamma, beta, _ = draw_full_range(shape, "float32", 1e6)
    dy = draw_full_range(shape, "float32", size, seed=1)[0]
    beta *= np.float32(0.1)
    forward = reference.batch_norm_forward(x, gamma, beta)
    options = {"beta": beta, "activation": activation} if activation else {}
    got = nbnorm.batch_norm_backward(dy, x, gamma, forward.mean, forward.rstd, **options)
    want = reference.batch_norm_backward(dy, x, gamma, forward.mean, forward.rstd, **options)
    arriving = np.where(forward.y > 0, dy, 0) if activation else dy
    error = dx_tolerance(arriving, x, gamma, forward.mean, forward.rstd, axis=1)
    assert_within(got.dx, want.dx, error, "dx")
    sums = nbnorm.batch_norm_backward_reduce(
        dy, x, forward.mean, forward.rstd, gamma=gamma, **options
    )
    wide = arriving.astype("float64"), x.astype("float64")
    errors = sums_tolerance(*wide, forward.mean, forward.rstd, axis=1)
    for sum_, wanted, error in zip(sums, (want.dbeta, want.dgamma), errors, strict=True):
        assert_within(sum_, wanted, error * 2.0**29, "sums")  # float64 terms, units of float32


@narrow
@full_range
@pytest.mark.parametrize("training", [False, True])
def test_means_at_the_end_of_the_range(shape, dtype, training):
    """x - mean is twice the greatest number; with fixed statistics y is still finite."""
    most = largest(dtype)
    x = np.full(shape, -most)
    x[0] = most
    x = as_dtype(x, dtype)
    mean, var = np.full(shape[1], most), np.full(shape[1], (most / 3) ** 2)
    dy = as_dtype(np.random.default_rng(0).normal(size=shape), dtype)
    gamma, beta = np.full(shape[1], 2, "float32"), np.ones(shape[1], "float32")
    got = nbnorm.batch_norm_inference(x, gamma, beta, mean, var)
    want = reference.batch_norm_inference(x, gamma, beta, mean, var)
    assert_within(got, want, y_tolerance(x, gamma, beta, mean, var**-0.5, axis=1), "y")
    for activation in (None, "relu"):
        options = {"beta": beta, "activation": activation, "training": training}
        got = nbnorm.batch_norm_backward(dy, x, gamma, mean, var**-0.5, **options)
        want = reference.batch_norm_backward(dy, x, gamma, mean, var**-0.5, **options)
        arriving = as_dtype(np.where(want.dx != 0, dy, 0), dtype) if not training else dy
        error = dx_tolerance(arriving, x, gamma, mean, var**-0.5, axis=1, training=training)
        assert_within(got.dx, want.dx, error, "dx")


@pytest.mark.parametrize(
    ("scale", "gamma"), [(1e-42, 1e-30), (1e30, 1e-20), (1e37, 1e-7), (1e-30, 1e10)]
)
@full_range
def test_gamma_takes_the_factor_out_of_range(shape, scale, gamma):
    """gamma rstd leaves float32's range, but y does not."""
    x, sign, _, dy = draw_full_range(shape, "float32", scale)
    assert_accurate(x, np.float32(gamma) * sign, None, dy * np.float32(1e-5), axis=1, eps=0.0)


@full_range
def test_constant_channel_at_the_end_of_the_range(shape):
    most = largest("float32")
    x = np.full(shape, most, "float32")
    gamma, beta = np.full(shape[1], most, "float32"), np.arange(shape[1], dtype="float32")
    y = nbnorm.batch_norm_forward(x, gamma, beta).y
    assert_same_bits(y, np.broadcast_to(spread(beta, x, 1).astype("float32"), shape))


@full_range
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_extreme_channels_change_no_bit_of_another(shape, bad):
    """Channel 0 needs a power of two of another size, or (NaN, Inf) none suffices."""
    x, gamma, beta, dy = draw(shape, 1, "float32")
    residual = dy[::-1].copy()
    clean = run_everything(x, dy, residual, gamma, beta, 1)
    for value in (3e38, 1e-40, bad):
        x[:, 0] = (np.sign(x[:, 0]) if np.isfinite(value) else 1) * np.float32(value)
        found = run_everything(x, dy, residual, gamma, beta, 1)
        for ours, theirs in zip(found, clean, strict=True):
            for name, result in theirs.items():
                axis = 1 if result.ndim == len(shape) else 0
                rest = range(1, shape[1])
                assert_same_bits(np.take(ours[name], rest, axis), np.take(result, rest, axis), name)


@pytest.mark.parametrize("shape", [(50, 1), (1, 1, 400)], ids=str)
def test_range_of_float64(shape):
    """As docs/numerics.md states: either float64 holds the sum of squares or the channel is NaN."""
    rng = np.random.default_rng(0)
    values = np.sign(rng.normal(size=shape))
    values.flat[:2] = 1, -1
    m = values.size
    beta = np.ones(1)

    def forward(scale):
        return nbnorm.batch_norm_forward(values * scale, beta=beta, eps=0.0).y - 1

    expected = (values - values.mean()) / values.std()
    most = 1.3e154 / np.sqrt(m) / values.std()
    for scale in (most, 1e100, 1e-100, 2e-153):
        np.testing.assert_allclose(forward(scale), expected, rtol=0, atol=1e-14)
    for scale in (most * 1.1, 1e154, 1e300):
        assert np.isnan(forward(scale)).all()
    np.testing.assert_allclose(forward(1e-160), expected, rtol=0, atol=1e-3)
    assert not forward(1e-163).any()


@pytest.mark.parametrize("shape", [(512, 3), (1, 3, 512)], ids=str)
def test_mean_of_dy_that_float32_does_not_hold(shape):
    """x_hat is 1 or -1 and every sum is exact, so only the subtraction of dy's mean can err."""
    x, dy = np.ones(shape, "float32"), np.full(shape, 2.0**16, "float32")
    along = 0 if len(shape) == 2 else 2
    np.moveaxis(x, along, 0)[::2] = -1
    np.moveaxis(dy, along, 0)[:2] += 2.0**-2
    mean, rstd = np.zeros(3), np.ones(3)
    got = nbnorm.batch_norm_backward(dy, x, None, mean, rstd)
    want = reference.batch_norm_backward(dy, x, None, mean, rstd)
    np.testing.assert_allclose(got.dx, want.dx, rtol=0, atol=1e-8)
