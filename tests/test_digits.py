"""Precision that depends on a single line of a kernel, on inputs that no other test has.

Tolerances as in tolerances.py. Functions that take sums or statistics receive exact ones, so that
an error can have only one cause.
"""

import numba
import numpy as np
import pytest
from tolerances import (
    UNITS,
    assert_within,
    m2_tolerance,
    mean_tolerance,
    one_unit,
    rstd_tolerance,
)

import nbnorm
from nbnorm import reference

BY_ROWS, BY_COLUMNS = (4, 3, 20, 20), (300, 6)
both = pytest.mark.parametrize("shape", [BY_ROWS, BY_COLUMNS], ids=["rows", "columns"])


def setup_module():
    """Use one thread: any number gives the same bits (test_threads.py)."""
    numba.set_num_threads(1)


def teardown_module():
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)


def over(x):
    return tuple(a for a in range(x.ndim) if a != 1)


def per_channel(values, x):
    return np.asarray(values).reshape(-1, *[1] * (x.ndim - 2))


@both
def test_a_mean_of_dy_between_two_floats_is_taken_off_whole(shape):
    """dy - h, with h the mean of dy in float32, is exact; the mean's rest joins other terms."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype("float32")
    dy = (rng.normal(size=shape) + 1e6).astype("float32")
    wide = dy.astype(np.longdouble)
    mean, rstd = np.zeros(shape[1]), np.ones(shape[1])
    m = x.size // shape[1]
    sum_dy, sum_dy_xhat = wide.sum(over(x)), ((wide - 1e6) * x).sum(over(x))
    dx = nbnorm.batch_norm_backward_apply(
        dy, x, None, mean, rstd, sum_dy.astype(float), sum_dy_xhat.astype(float), m
    )
    terms = wide - per_channel(sum_dy / m, x), x * per_channel(sum_dy_xhat / m, x)
    scale = sum(np.abs(term).max(over(x), keepdims=True) for term in terms)
    assert_within(dx, terms[0] - terms[1], UNITS * one_unit(scale, "float32"), "dx")


def assert_statistics(x):
    moments = reference.batch_norm_stats(x)
    got = nbnorm.batch_norm_stats(x)
    assert_within(got.mean, moments.mean, mean_tolerance(moments, x.dtype), "mean")
    assert_within(got.m2, moments.m2, m2_tolerance(moments, x.dtype), "M2")
    rstd = reference.batch_norm_forward(x, eps=0.0).rstd
    got_rstd = nbnorm.batch_norm_forward(x, eps=0.0).rstd
    assert_within(got_rstd, rstd, rstd_tolerance(moments, rstd, x.dtype), "rstd")


@pytest.mark.parametrize("shape", [(16384, 64), (1, 1, 1 << 19)], ids=["columns", "rows"])
def test_first_values_far_off_cost_the_later_ones_no_digit(shape):
    """The first values are 1e6 from all later ones: deltas from them would round at each merge."""
    x = np.random.default_rng(0).normal(size=shape)
    (x[:32] if len(shape) == 2 else x[0, :, :32])[...] = 1e6
    assert_statistics(x)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(65536, 1), (1, 1, 4096)], ids=["columns", "rows"])
def test_a_shift_taken_from_values_far_off_costs_no_digit(shape, dtype):
    """The sum of squares about the shift K would be many times M2."""
    x = np.random.default_rng(0).normal(size=shape).astype(dtype)
    x.reshape(-1)[: x.size // 256] = 1e4
    assert_statistics(x)


def test_sums_down_the_rows_are_kept_in_float32_for_a_short_run_only():
    """A float32 sum of 2^26 ignores added terms of 4 * 0.99^2, so its run must end soon."""
    x = np.full((256, 256), 0.99, np.float32)
    x[::2] *= -1  # K is 0
    x[128] = 2.0**13
    assert_statistics(x)


@pytest.mark.parametrize("shape", [(16384, 1), (1, 1, 2048)], ids=["columns", "rows"])
def test_equal_values_after_others_round_with_one_sign(shape):
    """Rounding errors of squares about K have one sign and add up; about the mean they are tiny."""
    for value in np.random.default_rng(0).uniform(-1, 1, 20):
        x = np.full(shape, value)
        x.reshape(-1)[: x.size // 64] = 1 / 3
        assert_statistics(x)
