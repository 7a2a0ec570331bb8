"""`nbnorm._rows`: moments of rows, which do not depend on how calls divide the rows."""

from itertools import pairwise

import numba
import numpy as np
import pytest
from tolerances import assert_same_bits, assert_within, m2_tolerance, mean_tolerance

from nbnorm import Moments
from nbnorm._pairwise import Pairwise
from nbnorm._rows import BLOCK, Rows

pytestmark = pytest.mark.cpu_only

N = 7 * BLOCK + 300
ALONG_BORDERS = [[1], [2, 5], [5, 6], [1, 2, 3, 4, 5, 6, 7]]  # in blocks
ACROSS_BORDERS = [1, 50, BLOCK - 1, BLOCK, BLOCK + 1, 2500, 2777, 6000, 6500]


def drawn(dtype, order="C", columns=3, nan=False, offset=50.0):
    rng = np.random.default_rng(columns)
    x = rng.normal(offset, 2.0, (N, columns)).astype(dtype)
    if nan:
        x[rng.random(x.shape) < 1e-3] = np.nan
        x[: BLOCK + 500, 0] = np.nan
    return np.asarray(x, order=order)


def drawn_weights(dtype):
    weights = np.random.default_rng(1).random(N)
    weights[::7] = 0
    return weights.astype("float32" if dtype == "float16" else dtype)


def moments_of(x, cuts=(), weights=None):
    """Add rows in calls that end at these cuts; return the moments of all."""
    rows = Rows(x.shape[1])
    for begin, end in pairwise([0, *cuts, len(x)]):
        rows.add(x[begin:end], None if weights is None else weights[begin:end])
        assert (len(rows.blocks), rows.rows) == divmod(end, BLOCK)
    return rows.total()


def exact(x, weights=None):
    """Return moments in longdouble, ignoring NaN."""
    there = ~np.isnan(x)
    w = there * (np.ones(len(x)) if weights is None else weights).astype(np.longdouble)[:, None]
    values = np.where(there, x, 0).astype(np.longdouble)
    count = w.sum(axis=0)
    mean = (w * values).sum(axis=0) / count
    return Moments(count, mean, (w * (values - mean) ** 2).sum(axis=0))


every = pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])


@pytest.mark.parametrize(
    ("value", "weight"),
    [(1e8, 0), (1e20, 0), (1e200, 0), (-np.inf, 0), (1e8, 1e-300), (1e20, 1e-300)],
)
def test_a_first_row_of_no_weight_costs_no_digits(value, weight):
    x, weights = drawn("float64", offset=1.0), np.ones(N)
    x[0], weights[0] = value, weight
    got, expected = moments_of(x, (), weights), exact(x[1:])
    np.testing.assert_allclose(got.mean, expected.mean.astype(float), rtol=1e-14)
    np.testing.assert_allclose(got.m2, expected.m2.astype(float), rtol=1e-13)


def test_an_outlier_first_costs_no_digits():
    x = drawn("float64", offset=0.0)
    x[0] = 1e12
    expected = exact(x)
    np.testing.assert_allclose(moments_of(x).mean, expected.mean.astype(float), rtol=1e-14)


@every
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("columns", [1, 3, 40])
@pytest.mark.parametrize("nan", [False, True], ids=["whole", "nan"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_calls_that_end_where_blocks_do_give_the_same_bits(dtype, order, columns, nan, weighted):
    x = drawn(dtype, order, columns, nan)
    weights = drawn_weights(dtype) if weighted else None
    whole = moments_of(x, (), weights)
    for blocks in ALONG_BORDERS:
        in_calls = moments_of(x, [block * BLOCK for block in blocks], weights)
        for name, one, other in zip(Moments._fields, whole, in_calls, strict=True):
            assert_same_bits(one, other, name)


@every
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("nan", [False, True], ids=["whole", "nan"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("cuts", [(), ACROSS_BORDERS], ids=["whole", "in calls"])
def test_against_longdouble(dtype, order, nan, weighted, cuts):
    x = drawn(dtype, order, nan=nan)
    weights = drawn_weights(dtype) if weighted else None
    expected, got = exact(x, weights), moments_of(x, cuts, weights)
    np.testing.assert_allclose(got.count, expected.count.astype(float), rtol=1e-13)
    assert_within(got.mean, expected.mean, mean_tolerance(expected, dtype), "mean")
    assert_within(got.m2, expected.m2, m2_tolerance(expected, dtype), "M2")


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("nan", [False, True], ids=["whole", "nan"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("offset", [1e3, 1e8])
@pytest.mark.parametrize(
    "cuts", [(), range(1, N, 100), ACROSS_BORDERS], ids=["whole", "hundreds", "in calls"]
)
def test_a_mean_far_off_costs_no_digits(order, nan, weighted, offset, cuts):
    """Merging means in float64 would cause errors of 1e-10 here."""
    x = drawn("float64", order, nan=nan, offset=offset)
    weights = drawn_weights("float64") if weighted else None
    whole, got = exact(x - offset, weights), moments_of(x, list(cuts), weights)
    assert (np.abs(got.mean / (whole.mean + offset) - 1) < 2e-16).all()
    assert (np.abs(got.m2 / whole.m2 - 1) < 1e-14).all()


def test_a_first_value_that_is_far_off_or_not_there_costs_no_digits():
    """An outlier costs the mean a rounding of its own size, far less than a standard deviation."""
    x = drawn("float64", offset=1e8)
    x[0] = np.nan, 0.0, 1e12
    got = moments_of(x, ACROSS_BORDERS)
    for column, mean, m2 in zip(x.T, got.mean, got.m2, strict=True):
        values = column[~np.isnan(column)].astype(np.longdouble)
        expected = values.mean()
        assert abs(mean - expected) < 2e-16 * np.abs(values).max()
        assert abs(m2 / np.sum((values - expected) ** 2) - 1) < 1e-14


@pytest.mark.parametrize("order", ["C", "F"])
def test_threads_do_not_change_the_bits(order, thread_count):
    x = drawn("float32", order, 40, nan=True)
    of_all = moments_of(x)
    numba.set_num_threads(1)
    for one, other in zip(moments_of(x), of_all, strict=True):
        assert_same_bits(one, other)


@every
@pytest.mark.parametrize("order", ["C", "F"])
def test_constants_have_no_variance(dtype, order):
    x = np.asarray(np.full((N, 3), [0.1, 1 / 3, 1e3 / 7]).astype(dtype), order=order)
    got = moments_of(x, ACROSS_BORDERS)
    assert_same_bits(got.mean, x[0].astype(float))
    assert not got.m2.any()


def test_columns_without_values_do_not_count():
    x = drawn("float32", nan=True)
    x[:, 1] = np.nan
    got = moments_of(x, [BLOCK])
    assert got.count[1] == got.m2[1] == 0
    assert got.count[0] == N - np.isnan(x[:, 0]).sum()


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_inf_shows_in_the_mean(value):
    x = drawn("float32", nan=True)
    x[2500, 2] = value
    assert np.isfinite(moments_of(x).mean).tolist() == [True, True, False]


def test_a_copy_goes_its_own_way():
    x = drawn("float64")
    rows = Rows(3)
    rows.add(x[:2500])
    before, other = rows.total(), rows.copy()
    other.add(x[2500:])
    for one, same in zip(rows.total(), before, strict=True):
        assert_same_bits(one, same)
    for one, same in zip(other.total(), moments_of(x, [2500]), strict=True):
        assert_same_bits(one, same)


@pytest.mark.parametrize("before", range(7))
@pytest.mark.parametrize("number", [0, 1, 2, 5, 8, 21])
def test_pairwise_extends_as_it_adds(before, number):
    rng = np.random.default_rng(0)
    parts = [Moments(rng.integers(0, 3, 2) * 1.0, *rng.random((2, 2))) for _ in range(99)]
    one_by_one, at_once = Pairwise(), Pairwise()
    for moments in parts[: before + number]:
        one_by_one.add(moments)
    for moments in parts[:before]:
        at_once.add(moments)
    at_once.extend(Moments(*np.array(parts)[before : before + number].swapaxes(0, 1)))
    for merged in one_by_one, at_once:
        merged.add(parts[-1])
    assert len(one_by_one) == len(at_once) == before + number + 1
    for one, other in zip(one_by_one.total(), at_once.total(), strict=True):
        assert_same_bits(one, other)


def test_the_origin_is_the_median_of_the_finite_values_that_count():
    x = np.array([[-9.0, -np.inf], [1, 6], [2, 7], [3, 8]])
    rows = Rows(2)
    rows.add(x, np.array([0.0, 1, 1, 1]))
    assert rows.origin.tolist() == [2, 7]
    rows = Rows(2)
    rows.add(x)
    assert rows.origin.tolist() == [1, 7]


def test_a_copy_has_an_origin_of_its_own():
    rows = Rows(1)
    rows.copy().add(np.array([[5.0]]))
    assert np.isnan(rows.origin).all()
