"""Arithmetic on single values and channels, at the edges where an error would go unnoticed.

Functions that only compiled code calls run as Python, through `py_func`.
"""

import numba
import numpy as np
import pytest
from strategies import dtype_of
from tolerances import assert_same_bits

import nbnorm
from nbnorm import reference
from nbnorm.cpu import channel, columns, element
from nbnorm.moments import Moments, update_running_stats

SHAPES = {"rows": (2, 2, 20, 20), "columns": (60, 2)}
both = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
HALVES_TOO = ("float32", "float64", "float16", "bfloat16")


def setup_module():
    """Use one thread: any number gives the same bits (test_threads.py)."""
    numba.set_num_threads(1)


def teardown_module():
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)


@both
def test_relu_at_its_edge_forward(shape):
    """Test zeros of both signs, the least numbers and NaN; -0 becomes 0."""
    tiny = np.float32(1e-45)
    x = np.resize(np.float32([0, -0.0, tiny, -tiny, np.nan, np.inf, -np.inf, 1, -1]), shape)
    beta = np.full(2, -0.0, np.float32)  # adding -0 changes nothing
    arguments = x, None, beta, np.zeros(2), np.ones(2)
    y = nbnorm.batch_norm_apply(*arguments, activation="relu")
    number = ~np.isnan(x)
    assert_same_bits(np.isnan(y), ~number)
    assert_same_bits(y[number], np.where(x > 0, x, np.float32(0))[number])
    plain = nbnorm.batch_norm_apply(*arguments)
    assert_same_bits(plain[number], x[number])  # without ReLU, -0 and -Inf stay
    ones = np.ones_like(x)
    added = nbnorm.batch_norm_apply(ones, None, None, np.zeros(2), np.ones(2), residual=x)
    np.testing.assert_array_equal(added, 1 + x)


@both
@pytest.mark.parametrize("from_y", [False, True])
def test_relu_lets_no_gradient_pass_at_0(shape, from_y):
    tiny = np.float32(1e-45)
    x = np.resize(np.float32([0, -0.0, tiny, -tiny, 1, -1, 2]), shape)
    options = {"y": np.maximum(x, 0)} if from_y else {"beta": np.zeros(2, "float32")}
    got = nbnorm.batch_norm_backward(
        np.full_like(x, 3), x, np.ones(2, "float32"), np.zeros(2), np.ones(2),
        activation="relu", training=False, **options,
    )  # fmt: skip
    assert_same_bits(got.dx, np.where(x > 0, np.float32(3), np.float32(0)))
    if from_y:
        assert_same_bits(got.dresidual, got.dx)
    else:
        assert got.dresidual is None
    over = tuple(a for a in range(x.ndim) if a != 1)
    np.testing.assert_array_equal(got.dbeta, 3 * (x > 0).sum(axis=over))
    np.testing.assert_array_equal(got.dgamma, 3 * np.maximum(x, 0).sum(axis=over))


def test_rstd_of_no_spread_is_0_and_else_follows_ieee():
    rstd_of = channel.rstd_of.py_func
    assert rstd_of(0.0, 0.0) == 0
    assert rstd_of(5e-324, 0.0) == 1 / np.sqrt(5e-324)
    assert rstd_of(0.0, 4.0) == 0.5
    assert rstd_of(np.inf, 1.0) == 0
    assert np.isnan(rstd_of(np.nan, 1.0))


@both
def test_beta_takes_what_the_mean_has_beyond_its_float32(shape):
    """mean = hi + lo, with hi in float32: x - hi is exact, and lo, up to 0.03, goes into beta."""
    x = (np.random.default_rng(0).normal(size=shape) + 1e6).astype("float32")
    mean = np.array([1e6 + 0.02, 1e6 - 0.013])
    y = nbnorm.batch_norm_apply(x, None, None, mean, np.ones(2))
    wide = x.astype(float) - mean.reshape(-1, *[1] * (x.ndim - 2))
    np.testing.assert_allclose(y, wide, rtol=0, atol=2e-6)
    ones = np.ones_like(x)
    sums = nbnorm.batch_norm_backward_reduce(ones, x, mean, np.ones(2))
    exact = wide.sum(axis=tuple(a for a in range(x.ndim) if a != 1))
    np.testing.assert_allclose(sums[1], exact, rtol=0, atol=1e-3)
    dx = nbnorm.batch_norm_backward_apply(
        np.zeros_like(x), x, None, mean, np.ones(2), np.zeros(2), np.full(2, 1.0), 1
    )
    np.testing.assert_allclose(dx, -wide, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 255, 256, 257, 320, 511, 513, 1000])
@pytest.mark.parametrize("samples", [1, 3])
def test_every_value_of_a_row_is_counted_once(size, samples):
    """A float32 sum of these small integers is exact, so an omitted or repeated one shows."""
    x = np.zeros((samples, 1, max(size, 256)), np.float32)
    x[..., :size] = np.resize(np.float32([1, -1, 3]), (samples, 1, size))
    got = nbnorm.batch_norm_stats(x)
    wide = x.astype(float)
    np.testing.assert_allclose(got.mean, wide.mean(), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(got.m2, x.size * wide.var(), rtol=1e-6)
    sums = nbnorm.batch_norm_backward_reduce(x, x, np.zeros(1), np.ones(1))
    assert sums[0] == wide.sum()
    assert sums[1] == (wide * wide).sum()


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5, 7, 31, 33, 36, 255, 257, 1030])
@pytest.mark.parametrize("channels", [1, 3, 301])
def test_every_value_of_a_column_is_counted_once(samples, channels):
    """Values after x in memory must not enter the sum."""
    memory = np.full(samples * channels + 4096, 7, np.float32)  # 7: larger ones cause a second sum
    x = memory[: samples * channels].reshape(samples, channels)
    x[...] = np.resize(np.float32([1, -1, 3, 5, -2]), x.shape)
    got = nbnorm.batch_norm_stats(x)
    wide = x.astype(float)
    np.testing.assert_allclose(got.mean, wide.mean(0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(got.m2, samples * wide.var(0), rtol=2e-6, atol=1e-12)
    sums = nbnorm.batch_norm_backward_reduce(x, x, np.zeros(channels), np.ones(channels))
    assert_same_bits(sums[0], wide.sum(0))
    assert_same_bits(sums[1], (wide * wide).sum(0))


@pytest.mark.parametrize("offset", [1e4, 1e8])
@pytest.mark.parametrize("shape", [(700, 1), (1, 1, 700)], ids=["columns", "rows"])
def test_sums_taken_again_are_of_two_passes_and_rounded_once(shape, offset):
    """Constant tiles, then values far off: sums are taken again, in two passes and in float64."""
    x = np.full(shape, 0.0)
    flat = x.reshape(-1)
    flat[32:] = np.random.default_rng(0).normal(size=668) + offset
    got, want = nbnorm.batch_norm_stats(x), reference.batch_norm_stats(x)
    np.testing.assert_allclose(got.mean, np.float64(want.mean), rtol=4e-16)
    np.testing.assert_allclose(got.m2, np.float64(want.m2), rtol=4e-15)


def test_sums_one_after_the_other_carry_their_rounding():
    """Kahan summation: 1 is lost when added to 2^53, and comes back with the next term."""
    s, rest = 2.0**53, 0.0
    for _ in range(8):
        s, rest = columns.add_compensated.py_func(s, 1.0 - rest)
    assert s - rest == 2.0**53 + 8


@pytest.mark.parametrize("value", [0.1, -7.3, 1e-30])
@pytest.mark.parametrize("shape", [(60, 2), (2, 2, 300), (40, 2, 14, 14)])
def test_a_constant_channel_has_no_m2_at_all(shape, value):
    x = np.full(shape, value)
    got = nbnorm.batch_norm_stats(x)
    assert_same_bits(got.m2, np.zeros(2))
    assert_same_bits(got.mean, np.full(2, value))


def test_a_power_of_two_next_to_rstd_is_one():
    like = np.empty(0, np.float32)
    rstd_power = numba.njit(lambda rstd, like: channel.rstd_power(rstd, like))
    for rstd in (1.0, 1.99, 3.0, 1e-3, 316.0):
        unit = rstd_power(rstd, like)
        assert unit <= rstd < 2 * unit
        assert np.frexp(unit)[0] == 0.5
    assert rstd_power(0.0, like) == np.finfo(np.float32).tiny
    assert rstd_power(1e300, like) == 2.0**126


def test_moments_of_one_value_and_of_many_merge():
    count, delta, m2 = channel.merge.py_func(3.0, 1.0, 2.0, 1.0, 5.0, 0.0)
    assert (count, delta, m2) == (4.0, 2.0, 14.0)


def test_the_mask_is_strict():
    masked = element.masked.py_func
    for y, passes in ((1.0, True), (0.0, False), (-0.0, False), (np.nan, False)):
        assert masked(5.0, y, None, 0.0, 0.0) == 5.0 * passes
        assert masked(5.0, None, y, 0.0, 0.0) == 5.0 * passes
    assert masked(5.0, None, None, 0.0, 0.0) == 5.0


@pytest.mark.parametrize("dtype", HALVES_TOO)
def test_running_statistics_forward_are_those_of_update(dtype):
    x = np.random.default_rng(0).normal(size=(9, 3)).astype("float32")
    for momentum, correction in ((0.1, 1), (0.5, 0), (1.0, 1)):
        ours, theirs = (
            [np.float32([0.25, -2, 3]).astype(dtype_of(dtype)),
             np.float32([1, 0.5, 2]).astype(dtype_of(dtype))] for _ in range(2)
        )  # fmt: skip
        options = {"momentum": momentum, "correction": correction}
        nbnorm.batch_norm_forward(x, None, None, *ours, **options)
        update_running_stats(*theirs, nbnorm.batch_norm_stats(x), **options)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=1e-6, atol=1e-7)


def test_an_empty_batch_and_a_full_one_merge():
    empty = Moments(0, np.full(1, np.nan), np.full(1, np.nan))
    full = Moments(2, np.ones(1), np.ones(1))
    for merged in (empty.merge(full), full.merge(empty)):
        assert merged.count == 2
        assert_same_bits(merged.mean, np.ones(1))


def test_a_count_of_0_is_for_empty_arrays():
    x, zeros = np.ones((4, 2), np.float32), np.zeros(2)
    with pytest.raises(ValueError, match=r"^count must be positive"):
        nbnorm.batch_norm_backward_apply(x, x, None, zeros, zeros, zeros, zeros, 0)
    nbnorm.batch_norm_backward_apply(x[:0], x[:0], None, zeros, zeros, zeros, zeros, 0)


@pytest.mark.parametrize("scale", [1e25, 1e-25])
@both
def test_squares_beyond_the_range_of_float32(shape, scale):
    x = (scale * (np.random.default_rng(0).normal(size=shape) + 3)).astype("float32")
    want = reference.batch_norm_forward(x, eps=0.0)
    np.testing.assert_allclose(nbnorm.batch_norm_stats(x).rstd(0.0), want.rstd, rtol=5e-7)


@both
def test_squares_among_the_subnormal_numbers_round_a_mean_of_0(shape):
    """Only the size of the sum of squares shows that the squares have no digits: d is about 0."""
    values = np.float32(1e-22) * np.float32([1, -1, 1.7, -1.7])
    x = np.moveaxis(np.resize(values, (2, shape[0], *shape[2:])), 0, 1).copy()
    want = reference.batch_norm_forward(x, eps=0.0)
    np.testing.assert_allclose(nbnorm.batch_norm_stats(x).rstd(0.0), want.rstd, rtol=5e-7)
