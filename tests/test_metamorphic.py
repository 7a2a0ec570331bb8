"""Relations between calls that hold whatever the right answer is."""

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import Recipe, recipes
from tolerances import (
    assert_same_bits,
    assert_within,
    dx_tolerance,
    m2_tolerance,
    mean_tolerance,
    reduced_axes,
    y_tolerance,
)

import nbnorm

SHAPES = [(6, 5, 31, 33), (3, 2, 2500), (64, 33), (16, 12, 7, 7), (2, 3, 4, 5, 6)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])


def setup_module():
    """Use one thread: any number gives the same bits (test_threads.py)."""
    numba.set_num_threads(1)


def teardown_module():
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)


def twice(tolerance):
    """Return the tolerance between two results that are each within `tolerance` of the truth."""
    return 2 * tolerance


@given(recipes(), st.integers(0, 2**32 - 1))
def test_permuting_samples_permutes_y_and_dx(recipe, seed):
    x, gamma, beta, dy = recipe.x(), recipe.gamma(), recipe.beta(), recipe.like_x(5)
    axis, eps = recipe.axis, recipe.eps
    over = reduced_axes(x.ndim, axis)[0]
    order = np.random.default_rng(seed).permutation(x.shape[over])
    here = nbnorm.batch_norm_forward(x, gamma, beta, axis=axis, eps=eps)
    there = nbnorm.batch_norm_forward(np.take(x, order, over), gamma, beta, axis=axis, eps=eps)
    error = y_tolerance(x, gamma, beta, here.mean, here.rstd, axis=axis)
    assert_within(there.y, np.take(here.y, order, over), twice(error), "y")
    dx = nbnorm.batch_norm_backward(dy, x, gamma, here.mean, here.rstd, axis=axis).dx
    permuted = nbnorm.batch_norm_backward(
        np.take(dy, order, over), np.take(x, order, over), gamma, here.mean, here.rstd, axis=axis
    ).dx
    error = dx_tolerance(dy, x, gamma, here.mean, here.rstd, axis=axis)
    assert_within(permuted, np.take(dx, order, over), twice(error), "dx")


@given(recipes())
def test_splitting_a_batch_and_merging_its_moments(recipe):
    x, axis = recipe.x(), recipe.axis
    over = reduced_axes(x.ndim, axis)[0]
    whole = nbnorm.batch_norm_stats(x, axis=axis)
    first, *rest = (
        nbnorm.batch_norm_stats(part, axis=axis) for part in np.array_split(x, 3, axis=over)
    )
    merged = first.merge(*rest)
    assert merged.count == whole.count
    assert_within(merged.mean, whole.mean, twice(mean_tolerance(whole, x.dtype)), "mean")
    assert_within(merged.m2, whole.m2, twice(m2_tolerance(whole, x.dtype)), "m2")


@given(recipes(layouts=("C",), dtypes=("float32",)))
def test_every_axis_order_normalises_alike(recipe):
    """Compare with a copy whose channel axes are last: NCHW with channels-last, and so on."""
    x, gamma, beta, dy = recipe.x(), recipe.gamma(), recipe.beta(), recipe.like_x(5)
    channels = sorted(a % x.ndim for a in np.ravel(recipe.axis))
    order = [*reduced_axes(x.ndim, recipe.axis), *channels]
    moved_axis = tuple(range(x.ndim - len(channels), x.ndim))
    back = np.argsort(order)
    moved, moved_dy = (np.ascontiguousarray(a.transpose(order)) for a in (x, dy))
    here = nbnorm.batch_norm_forward(x, gamma, beta, axis=recipe.axis, eps=recipe.eps)
    there = nbnorm.batch_norm_forward(moved, gamma, beta, axis=moved_axis, eps=recipe.eps)
    error = y_tolerance(x, gamma, beta, here.mean, here.rstd, axis=recipe.axis)
    assert_within(there.y.transpose(back), here.y, twice(error), "y")
    statistics = here.mean, here.rstd
    dx = nbnorm.batch_norm_backward(dy, x, gamma, *statistics, axis=recipe.axis).dx
    moved_dx = nbnorm.batch_norm_backward(moved_dy, moved, gamma, *statistics, axis=moved_axis).dx
    error = dx_tolerance(dy, x, gamma, *statistics, axis=recipe.axis)
    assert_within(moved_dx.transpose(back), dx, twice(error), "dx")


@shapes
@dtypes
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("layout", ["C", "channels last", "every second", "reversed", "unaligned"])
def test_in_place_gives_the_bits_of_a_fresh_result(shape, dtype, activation, layout):
    recipe = Recipe(shape, 1, dtype=dtype, layout=layout, offset=100.0)
    gamma, beta = recipe.gamma(), recipe.beta()
    options = {"activation": activation}
    fresh = nbnorm.batch_norm_forward(recipe.x(), gamma, beta, **options)
    mean, rstd = fresh.mean, fresh.rstd
    x = recipe.x()
    got = nbnorm.batch_norm_forward(x, gamma, beta, out=x, **options)
    assert got.y is x
    assert_same_bits(x, fresh.y, "y")
    assert_same_bits(got.mean, mean, "mean")
    assert_same_bits(got.rstd, rstd, "rstd")
    x = recipe.x()
    nbnorm.batch_norm_apply(x, gamma, beta, mean, rstd, out=x, **options)
    assert_same_bits(x, fresh.y, "y of apply")

    x, dy = recipe.x(), recipe.like_x(5, layout)
    arguments, options = (gamma, mean, rstd), {"beta": beta, **options}
    expected = nbnorm.batch_norm_backward(dy, x, *arguments, **options)
    got = nbnorm.batch_norm_backward(dy, x, *arguments, out=dy, **options)
    assert got.dx is dy
    for name, ours, theirs in zip(got._fields[:3], got, expected, strict=False):
        assert_same_bits(ours, theirs, name)


@shapes
def test_backward_in_place_with_residual_still_returns_the_masked_dy(shape):
    recipe = Recipe(shape, 1)
    x, gamma, beta = recipe.x(), recipe.gamma(), recipe.beta()
    options = {"activation": "relu"}
    y, *statistics = nbnorm.batch_norm_forward(x, gamma, beta, residual=recipe.like_x(4), **options)
    dy = recipe.like_x(5)
    expected = nbnorm.batch_norm_backward(dy, x, gamma, *statistics, beta=beta, y=y, **options)
    got = nbnorm.batch_norm_backward(dy, x, gamma, *statistics, beta=beta, y=y, out=dy, **options)
    assert not np.shares_memory(got.dresidual, dy)
    for name, ours, theirs in zip(got._fields, got, expected, strict=True):
        assert_same_bits(ours, theirs, name)


@shapes
@dtypes
@pytest.mark.parametrize("factor", [2.0, 0.5, 2.0**40, -1.0])
def test_scaling_x_by_a_power_of_two_without_eps_keeps_the_bits(shape, dtype, factor):
    recipe = Recipe(shape, 1, dtype=dtype, offset=10.0)
    x, gamma, beta = recipe.x(), recipe.gamma(), recipe.beta()
    here = nbnorm.batch_norm_forward(x, gamma, beta, eps=0)
    there = nbnorm.batch_norm_forward(
        x * x.dtype.type(factor), gamma * np.float32(np.sign(factor)), beta, eps=0
    )
    assert_same_bits(there.y, here.y, "y")
    assert_same_bits(there.mean, here.mean * factor, "mean")
    assert_same_bits(there.rstd, here.rstd / abs(factor), "rstd")


@shapes
@pytest.mark.parametrize("shift", [16.0, 1024.0])
def test_shifting_whole_numbers_keeps_y(shape, shift):
    """If x + shift is exact, only the rounding of the sums changes."""
    recipe = Recipe(shape, 1)
    x = np.round(8 * recipe.x()).astype("float32")
    shifted = x + np.float32(shift)
    here = nbnorm.batch_norm_forward(x, recipe.gamma(), recipe.beta())
    there = nbnorm.batch_norm_forward(shifted, recipe.gamma(), recipe.beta())
    error = y_tolerance(x, recipe.gamma(), recipe.beta(), here.mean, here.rstd, axis=1)
    assert_within(there.y, here.y, twice(error), "y")
    error = mean_tolerance(nbnorm.batch_norm_stats(shifted), x.dtype)
    assert_within(there.mean, here.mean + shift, twice(error), "mean")


@shapes
def test_repeated_calls_give_the_same_bits(shape):
    recipe = Recipe(shape, 1, offset=1e3)
    x, gamma, beta, dy = recipe.x(), recipe.gamma(), recipe.beta(), recipe.like_x(5)
    first = nbnorm.batch_norm_forward(x, gamma, beta, activation="relu")
    arguments = (dy, x, gamma, first.mean, first.rstd)
    first_grads = nbnorm.batch_norm_backward(*arguments, beta=beta, activation="relu")
    for _ in range(5):
        again = nbnorm.batch_norm_forward(x, gamma, beta, activation="relu")
        grads = nbnorm.batch_norm_backward(*arguments, beta=beta, activation="relu")
        for name, ours, theirs in zip(first._fields, again, first, strict=True):
            assert_same_bits(ours, theirs, name)
        for name, ours, theirs in zip(grads._fields[:3], grads, first_grads, strict=False):
            assert_same_bits(ours, theirs, name)


@shapes
def test_one_channel_alone_is_that_channel_of_the_whole(shape):
    """A channel's statistics depend on its own values only."""
    recipe = Recipe(shape, 1, offset=50.0)
    x = recipe.x()
    whole = nbnorm.batch_norm_forward(x)
    for channel in {0, shape[1] // 2, shape[1] - 1}:
        alone = nbnorm.batch_norm_forward(x[:, channel : channel + 1])
        error = y_tolerance(x[:, channel : channel + 1], None, None, alone.mean, alone.rstd, axis=1)
        assert_within(alone.y[:, 0], whole.y[:, channel], twice(error)[:, 0], "y")
