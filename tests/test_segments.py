"""Segments: every function against the oracle, part by part; shapes, running statistics, errors."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from refusals import VALID, per_channel, refuses, taking
from strategies import LAYOUTS, Recipe, other_layouts, recipes
from tolerances import (
    assert_same_bits,
    assert_within,
    dx_tolerance,
    m2_tolerance,
    mean_tolerance,
    reduced_axes,
    rstd_tolerance,
    stored,
    sums_tolerance,
    y_tolerance,
)

import nbnorm
from nbnorm import BatchNorm, Moments, reference
from nbnorm.distributed import SelfComm, SyncBatchNorm

pytestmark = pytest.mark.slow  # compiles kernels that few other tests use

BACKWARD = [name for name in taking("groups") if "backward" in name]


@st.composite
def divisions(draw):
    """Draw a recipe and how x is divided, with no part of a single value per channel."""
    recipe = draw(recipes(dtypes=("float32", "float64"), most=20_000))
    first = reduced_axes(len(recipe.shape), recipe.axis)[0]
    length = recipe.shape[first]
    if draw(st.booleans()):
        numbers = [n for n in (1, 2, 3, 4, 5, 8, 16, length) if length % n == 0]
        return recipe, {"groups": draw(st.sampled_from(numbers))}, first
    cuts = draw(st.lists(st.integers(0, length), max_size=4).map(sorted))
    return recipe, {"offsets": np.array([0, *cuts, length])}, first


def ends_of(recipe, division, first):
    length = recipe.shape[first]
    if "offsets" in division:
        return division["offsets"].tolist()
    return list(range(0, length + 1, length // division["groups"]))


def parts_of(recipe, division, first):
    """Yield the number of each part that is not empty, and its index."""
    for g, (begin, end) in enumerate(pairwise(ends_of(recipe, division, first))):
        if end > begin:
            yield g, (slice(None),) * first + (slice(begin, end),)


def parameters(recipe, rows, number):
    """Return gamma and beta, with a row for each part if `rows`."""
    shape = (number,) * rows + recipe.channels
    rng = np.random.default_rng(recipe.seed)
    gamma = rng.choice([-1, 1], shape) * rng.uniform(0.25, 2, shape)
    return gamma.astype(np.float32), rng.normal(size=shape).astype(np.float32)


def row_of(parameter, rows, g):
    return parameter[g] if rows else parameter


@given(divisions(), st.booleans(), st.sampled_from((None, "relu")))
def test_forward_is_that_of_each_part(division, rows, activation):
    recipe, segments, _ = division
    number = len(ends_of(*division)) - 1
    x, axis = recipe.x(), recipe.axis
    gamma, beta = parameters(recipe, rows, number)
    options = {"eps": recipe.eps, "axis": axis, "activation": activation, "correction": 0}
    y, mean, rstd = nbnorm.batch_norm_forward(x, gamma, beta, **options, **segments)
    moments = nbnorm.batch_norm_stats(x, axis=axis, **segments)
    applied = nbnorm.batch_norm_apply(
        x, gamma, beta, mean, rstd, axis=axis, activation=activation, **segments
    )
    assert mean.shape == rstd.shape == moments.m2.shape == (number, *recipe.channels)
    assert y.dtype == x.dtype
    assert_same_bits(applied, y, "y of apply and of the forward")
    assert_same_bits(moments.mean, mean, "mean of stats and of the forward")
    for g, part in parts_of(*division):
        gamma_, beta_ = row_of(gamma, rows, g), row_of(beta, rows, g)
        ref = reference.batch_norm_forward(x[part], gamma_, beta_, **options)
        own = reference.batch_norm_stats(x[part], axis=axis)
        error = y_tolerance(x[part], gamma_, beta_, ref.mean, ref.rstd, axis=axis)
        assert_within(y[part], ref.y, error, "y")
        assert_within(mean[g], ref.mean, mean_tolerance(own, x.dtype), "mean")
        assert_within(moments.m2[g], own.m2, m2_tolerance(own, x.dtype), "m2")
        assert_within(rstd[g], ref.rstd, rstd_tolerance(own, ref.rstd, x.dtype), "rstd")
    assert_same_bits(x, recipe.x(), "x after the call")


@given(divisions(), st.booleans(), st.booleans(), other_layouts())
def test_backward_is_that_of_each_part(division, rows, training, dy_layout):
    recipe, segments, _ = division
    number = len(ends_of(*division)) - 1
    x, axis, dy = recipe.x(), recipe.axis, recipe.like_x(5, dy_layout)
    gamma, beta = parameters(recipe, rows, number)
    forward = nbnorm.batch_norm_forward(
        x, gamma, beta, eps=recipe.eps, axis=axis, correction=0, **segments
    )
    mean, rstd = forward.mean, forward.rstd
    options = {"axis": axis, **segments}
    got = nbnorm.batch_norm_backward(dy, x, gamma, mean, rstd, training=training, **options)
    sums = nbnorm.batch_norm_backward_reduce(dy, x, mean, rstd, **options)
    assert got.dgamma.shape == got.dbeta.shape == gamma.shape
    assert got.dgamma.dtype == gamma.dtype
    totals, errors = np.zeros((2, *gamma.shape)), np.zeros((2, *gamma.shape))
    for g, part in parts_of(*division):
        gamma_ = row_of(gamma, rows, g)
        arguments = dy[part], x[part], gamma_, mean[g], rstd[g]
        ref = reference.batch_norm_backward(*arguments, training=training, axis=axis)
        error = dx_tolerance(*arguments, axis=axis, training=training)
        assert_within(got.dx[part], ref.dx, error, "dx")
        error = sums_tolerance(dy[part], x[part], mean[g], rstd[g], axis=axis)
        for i, expected in enumerate((ref.dbeta, ref.dgamma)):
            assert_within(sums[i][g], expected, error[i], "sums")
            at = (i, g) if rows else (i,)
            totals[at] += expected
            errors[at] += error[i]
    for total, error, grad in zip(totals, errors, (got.dbeta, got.dgamma), strict=True):
        assert_within(grad, total, stored(error, total, grad.dtype), "dgamma or dbeta")
    count = nbnorm.batch_norm_stats(x, **options).count
    dx = nbnorm.batch_norm_backward_apply(dy, x, gamma, mean, rstd, *sums, count, **options)
    if training:
        assert_same_bits(dx, got.dx, "dx of the halves")


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("segments", [{"groups": 3}, {"offsets": np.array([0, 2, 2, 9])}], ids=str)
def test_one_parameter_alone_has_gradients_of_its_shape(segments, rows, activation):
    """dgamma and dbeta have the shape of gamma; without gamma, dbeta has that of beta."""
    x, dy = np.random.default_rng(3).normal(1.0, 2.0, (2, 9, 4, 5))
    gamma, beta = np.random.default_rng(4).normal(1.0, 0.5, (2, *(3,) * rows, 4))
    for scale, shift in ((gamma, None), (None, beta)):
        arguments = {"axis": 1, "activation": activation, "correction": 0, **segments}
        _, mean, rstd = nbnorm.batch_norm_forward(x, scale, shift, **arguments)
        options = {"beta": shift, "activation": activation, **segments}
        got = nbnorm.batch_norm_backward(dy, x, scale, mean, rstd, **options)
        ref = reference.batch_norm_backward(dy, x, scale, mean, rstd, **options)
        for name in ("dx", "dgamma", "dbeta"):
            one, other = getattr(got, name), getattr(ref, name)
            assert one.shape == other.shape, name
            np.testing.assert_allclose(one, other.astype(float), rtol=1e-10, atol=1e-12)
        assert got.dbeta.shape == gamma.shape
        assert got.dgamma.shape == ((4,) if scale is None else gamma.shape)


@given(divisions(), st.booleans())
def test_the_oracle_is_itself_on_each_part(division, rows):
    recipe, segments, _ = division
    number = len(ends_of(*division)) - 1
    x, axis, dy = recipe.x(), recipe.axis, recipe.like_x(5)
    gamma, beta = parameters(recipe, rows, number)
    y, mean, rstd = reference.batch_norm_forward(x, gamma, beta, axis=axis, **segments)
    got = reference.batch_norm_backward(dy, x, gamma, mean, rstd, axis=axis, **segments)
    sums = reference.batch_norm_backward_reduce(dy, x, mean, rstd, axis=axis, **segments)
    for g, part in parts_of(*division):
        gamma_, beta_ = row_of(gamma, rows, g), row_of(beta, rows, g)
        ref = reference.batch_norm_forward(x[part], gamma_, beta_, axis=axis)
        back = reference.batch_norm_backward(dy[part], x[part], gamma_, *ref[1:], axis=axis)
        assert_array_equal(y[part], ref.y)
        assert_array_equal(mean[g], ref.mean)
        assert_array_equal(got.dx[part], back.dx)
        assert_array_equal(sums[1][g], back.dgamma)
        if rows:
            assert_array_equal(got.dgamma[g], back.dgamma)
    if not rows:
        assert_array_equal(got.dgamma, sum(sums[1]))


@given(divisions())
def test_inference_with_statistics_for_each_part(division):
    recipe, segments, _ = division
    number = len(ends_of(*division)) - 1
    x, axis = recipe.x(), recipe.axis
    rng = np.random.default_rng(recipe.seed)
    mean = rng.normal(size=(number, *recipe.channels)) * recipe.scale
    var = rng.uniform(0.5, 2, mean.shape) * recipe.scale**2
    y = nbnorm.batch_norm_inference(x, None, None, mean, var, axis=axis, **segments)
    ref = reference.batch_norm_inference(x, None, None, mean, var, axis=axis, **segments)
    for g, part in parts_of(*division):
        rstd = 1 / np.sqrt(var[g] + 1e-5)
        error = y_tolerance(x[part], None, None, mean[g], rstd, axis=axis)
        assert_within(y[part], ref[part], error, "y")
    shared = nbnorm.batch_norm_inference(x, None, None, mean[0], var[0], axis=axis, **segments)
    plain = nbnorm.batch_norm_inference(x, None, None, mean[0], var[0], axis=axis)
    error = y_tolerance(x, None, None, mean[0], 1 / np.sqrt(var[0] + 1e-5), axis=axis)
    assert_within(shared, plain, 2 * error, "y with statistics of the channels")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", [1, -1, 0, (1, 2)], ids=str)
def test_layouts(layout, axis):
    recipe = Recipe((6, 6, 6, 6), axis, layout=layout)
    x, dy = recipe.x(), recipe.like_x(5)
    gamma, beta = parameters(recipe, False, 3)
    y, mean, rstd = nbnorm.batch_norm_forward(x, gamma, beta, axis=axis, groups=3)
    dx = nbnorm.batch_norm_backward(dy, x, gamma, mean, rstd, axis=axis, groups=3).dx
    plain = np.ascontiguousarray(x)
    expected = nbnorm.batch_norm_forward(plain, gamma, beta, axis=axis, groups=3).y
    error = y_tolerance(x, gamma, beta, mean.mean(0), rstd.max(0), axis=axis)
    assert_within(y, expected, error, "y")
    assert (
        y.strides == nbnorm.batch_norm_inference(x, None, None, mean[0], rstd[0], axis=axis).strides
    )
    assert dx.strides == y.strides
    out = np.empty_like(x)
    assert nbnorm.batch_norm_forward(x, gamma, beta, axis=axis, groups=3, out=out).y is out
    assert_same_bits(out, y)


def test_samples_apart_in_memory():
    """Parts of one sample each cannot be read as channels of one array if samples lie apart."""
    x = np.random.default_rng(0).normal(size=(2, 6, 300)).astype(np.float32)[:, :3]
    out = np.full((2, 6, 300), 7, np.float32)
    y = nbnorm.batch_norm_forward(x, groups=2, out=out[:, :3]).y
    assert_same_bits(y, nbnorm.batch_norm_forward(x.copy(), groups=2).y)
    assert (out[:, 3:] == 7).all()


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize(
    "segments", [{"groups": 3}, {"offsets": np.array([0, 2, 2, 7, 12])}], ids=str
)
def test_running_statistics_move_once_with_the_average_by_count(correction, segments):
    x = np.random.default_rng(0).normal(3, 2, size=(12, 5, 7))
    old = np.linspace(-1, 1, 5), np.linspace(1, 2, 5)
    options = {"momentum": 0.3, "correction": correction}
    running, expected = ([a.copy() for a in old] for _ in range(2))
    nbnorm.batch_norm_forward(x, None, None, *running, **options, **segments)
    ends = segments.get("offsets", np.array([0, 4, 8, 12])).tolist()
    average = np.zeros((2, 5))
    for begin, end in pairwise(ends):
        part = x[begin:end].swapaxes(0, 1).reshape(5, -1)
        if end > begin:
            weight = (end - begin) / 12
            average += weight * np.array([part.mean(1), part.var(1, ddof=correction)])
    for before, batch, got in zip(old, average, running, strict=True):
        assert_allclose(got, 0.7 * before + 0.3 * batch, rtol=1e-13)
    reference.batch_norm_forward(x, None, None, *expected, **options, **segments)
    assert_allclose(running, expected, rtol=1e-13)
    moments = nbnorm.batch_norm_stats(x, **segments)
    split = nbnorm.update_running_stats(*(a.copy() for a in old), moments, **options)
    assert_allclose(split, expected, rtol=1e-13)


def test_running_statistics_normalise_every_part():
    x = np.random.default_rng(0).normal(size=(6, 5, 7)).astype(np.float32)
    running = np.linspace(-1, 1, 5), np.linspace(1, 2, 5)
    gamma = np.random.default_rng(1).normal(size=(3, 5))
    got = nbnorm.batch_norm_forward(x, gamma, None, *running, training=False, groups=3)
    ref = reference.batch_norm_forward(x, gamma, None, *running, training=False, groups=3)
    assert_allclose(got.y, ref.y, rtol=1e-5, atol=1e-6)
    assert_allclose(got.mean, ref.mean)
    got.mean[...] = 0  # must not be a view of the running statistics
    assert_array_equal(running[0], np.linspace(-1, 1, 5))


def test_counts():
    x = np.zeros((6, 5, 7))
    assert nbnorm.batch_norm_stats(x, groups=3).count == 14
    counts = nbnorm.batch_norm_stats(x, offsets=np.array([0, 1, 1, 6])).count
    assert_array_equal(counts, np.repeat([[7.0], [0.0], [35.0]], 5, axis=1))


def test_moments_whose_counts_differ():
    x = np.random.default_rng(0).normal(2, 3, size=(9, 4, 5))
    offsets = np.array([0, 1, 1, 4, 4])
    first, second = x[:4], x[4:8]
    one = nbnorm.batch_norm_stats(first, offsets=offsets)
    other = nbnorm.batch_norm_stats(second, offsets=np.array([0, 0, 2, 3, 4]))
    equal = nbnorm.batch_norm_stats(second, groups=4)
    for moments, cuts in (
        (one.merge(other), [0, 0, 2, 3, 4]),
        (other.merge(one), [0, 0, 2, 3, 4]),
        (one.merge(equal), [0, 1, 2, 3, 4]),
        (equal.merge(one), [0, 1, 2, 3, 4]),
    ):
        for g, ((a, b), (c, d)) in enumerate(zip(pairwise(offsets), pairwise(cuts), strict=True)):
            both = np.concatenate([first[a:b], second[c:d]])
            ref = reference.batch_norm_stats(both)
            assert (moments.count[g] == ref.count).all()
            assert_allclose(moments.mean[g], ref.mean.astype(float), rtol=1e-12)
            assert_allclose(moments.m2[g], ref.m2.astype(float), rtol=1e-12, atol=1e-12)
            var = ref.m2 / max(ref.count, 1)
            assert_allclose(moments.var()[g], var.astype(float), rtol=1e-12)
            rstd = (1 / np.sqrt(var + 0.1)).astype(float) if ref.count else np.zeros(4)
            assert_allclose(moments.rstd(0.1)[g], rstd, rtol=1e-12)
    with pytest.raises(ValueError, match=r"^expected more than 5 values per channel"):
        one.var(correction=5)
    with pytest.raises(ValueError, match=r"^moments.count has shape \(3,\), expected \(4, 4\)"):
        Moments(np.ones(3), one.mean, one.m2).var()
    with pytest.raises(ValueError, match=r"^moments.count must not be negative"):
        Moments(-one.count, one.mean, one.m2).var()


def test_moments_without_values_have_no_influence():
    """Even if their mean is NaN, or so far away that the square of the distance overflows."""
    zero = np.zeros((2, 1))
    one = Moments(np.array([[0.0], [3.0]]), np.array([[np.nan], [1.0]]), zero)
    other = Moments(np.array([[2.0], [0.0]]), np.array([[1e200], [0.0]]), np.array([[4.0], [0.0]]))
    for merged in (one.merge(other), other.merge(one), one._replace(mean=zero + 1).merge(other)):
        assert_array_equal(merged.count, [[2.0], [3.0]])
        assert_array_equal(merged.mean, [[1e200], [1.0]])
        assert_array_equal(merged.m2, [[4.0], [0.0]])
    assert_array_equal(one.rstd(4.0), [[0.0], [0.5]])


def test_an_empty_part_beside_a_large_one():
    """All threads share a large part; an empty part needs none."""
    x = np.random.default_rng(0).normal(size=(64, 2, 300)).astype(np.float32)
    y, mean, rstd = nbnorm.batch_norm_forward(x, offsets=np.array([0, 0, 64]))
    expected = nbnorm.batch_norm_forward(x)
    assert_same_bits(y, expected.y)
    assert_array_equal(mean, [[0, 0], expected.mean])
    assert_array_equal(rstd, [[0, 0], expected.rstd])


def test_a_part_may_count_values_elsewhere():
    """`count` may include values of other ranks, another number for each part."""
    x, dy = np.random.default_rng(0).normal(size=(2, 3, 4, 300)).astype(np.float32)
    counts, offsets = np.array([[300.0], [600.0], [1200.0]]).repeat(4, axis=1), np.arange(4)
    moments = nbnorm.batch_norm_stats(x, offsets=offsets)
    norm = moments.mean, moments.rstd(1e-5)
    sums = nbnorm.batch_norm_backward_reduce(dy, x, *norm, offsets=offsets)
    dx = nbnorm.batch_norm_backward_apply(dy, x, None, *norm, *sums, counts, offsets=offsets)
    for g in range(3):
        part, (mean, rstd, *of_part) = slice(g, g + 1), (a[g] for a in (*norm, *sums))
        expected = nbnorm.batch_norm_backward_apply(
            dy[part], x[part], None, mean, rstd, *of_part, int(counts[g, 0])
        )
        assert_same_bits(dx[part], expected)


@pytest.mark.parametrize("segments", [{"groups": 4}, {"offsets": np.array([0, 1, 3, 3, 4])}])
def test_nan_stays_in_its_part_and_channel(segments):
    x = np.random.default_rng(0).normal(size=(4, 3, 300)).astype(np.float32)
    clean = nbnorm.batch_norm_forward(x, **segments)
    x[1, 2, 5] = np.nan
    got = nbnorm.batch_norm_forward(x, **segments)
    where = np.isnan(got.mean)
    assert where.sum() == 1
    assert where[1, 2]
    assert_same_bits(got.mean[~where], clean.mean[~where])
    assert_same_bits(got.y[:, :2], clean.y[:, :2])


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
@pytest.mark.parametrize("groups", [1, 2])
def test_empty(shape, groups):
    x = np.zeros(shape, np.float32)
    y, mean, rstd = nbnorm.batch_norm_forward(x, groups=groups)
    assert y.shape == shape
    assert mean.shape == (groups, shape[1])
    assert not rstd.any()
    grads = nbnorm.batch_norm_backward(x, x, None, mean, rstd, groups=groups)
    assert_array_equal(grads.dgamma, np.zeros(shape[1]))


def test_from_y():
    recipe = Recipe((6, 3, 40), 1)
    gamma, beta = parameters(recipe, True, 3)
    x, dy = recipe.x(), recipe.like_x(5)
    y, mean, rstd = nbnorm.batch_norm_forward(x, gamma, beta, groups=3, out=x)
    got = nbnorm.batch_norm_backward(dy, None, gamma, mean, rstd, beta=beta, y=y, groups=3)
    expected = nbnorm.batch_norm_backward(dy, recipe.x(), gamma, mean, rstd, groups=3)
    for ours, theirs in zip(got[:3], expected[:3], strict=True):
        assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    gamma[1, 2] = 0
    with pytest.raises(ValueError, match=r"^gamma is 0 in channel \(1, 2\)"):
        nbnorm.batch_norm_backward(dy, None, gamma, mean, rstd, beta=beta, y=y, groups=3)


def test_residual_and_relu():
    recipe = Recipe((6, 3, 40), 1)
    gamma, beta = parameters(recipe, False, 3)
    x, dy, residual = recipe.x(), recipe.like_x(5), recipe.like_x(4)
    options = {"activation": "relu", "offsets": np.array([0, 1, 4, 6])}
    y, mean, rstd = nbnorm.batch_norm_forward(x, gamma, beta, residual=residual, **options)
    got = nbnorm.batch_norm_backward(dy, x, gamma, mean, rstd, beta=beta, y=y, **options)
    ref = reference.batch_norm_backward(dy, x, gamma, mean, rstd, beta=beta, y=y, **options)
    for ours, theirs in zip(got, ref, strict=True):
        assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


# Against other libraries


@pytest.mark.parametrize("size", [(7, 7), (20, 20)])
def test_instance_norm_is_torchs(size):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(2, 3, size=(4, 6, *size)).astype(np.float32)
    gamma, beta = np.linspace(0.5, 2, 6, dtype=np.float32), np.linspace(-1, 1, 6, dtype=np.float32)
    got = nbnorm.batch_norm_forward(x, gamma, beta, groups=4).y
    expected = torch.nn.functional.instance_norm(*map(torch.from_numpy, (x,)), None, None,
                                                 *map(torch.from_numpy, (gamma, beta)))  # fmt: skip
    assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-5)


def test_group_norm_is_torchs():
    """Groups are the channel axis of a reshaped x; gamma and beta per channel are applied later."""
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(2, 3, size=(4, 6, 9, 9)).astype(np.float32)
    gamma, beta = np.linspace(0.5, 2, 6, dtype=np.float32), np.linspace(-1, 1, 6, dtype=np.float32)
    moments = nbnorm.batch_norm_stats(x.reshape(4, 2, 3, 9, 9), groups=4)
    mean, rstd = (a.repeat(3, axis=1) for a in (moments.mean, moments.rstd(1e-5)))
    got = nbnorm.batch_norm_apply(x, gamma, beta, mean, rstd, groups=4)
    expected = torch.nn.functional.group_norm(
        torch.from_numpy(x), 2, torch.from_numpy(gamma), torch.from_numpy(beta)
    )
    assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-5)


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(6, 3, 40)).astype(np.float32)
    offsets = np.array([0, 1, 6])
    got = nbnorm.batch_norm_forward(torch.from_numpy(x), offsets=torch.from_numpy(offsets))
    for ours, theirs in zip(nbnorm.batch_norm_forward(x, offsets=offsets), got, strict=True):
        assert isinstance(theirs, torch.Tensor)
        assert_same_bits(theirs.numpy(), ours)
    count = nbnorm.batch_norm_stats(torch.from_numpy(x), offsets=offsets).count
    assert isinstance(count, torch.Tensor)


# The layer


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("segments", [{"groups": 3}, {"offsets": np.array([0, 2, 6])}], ids=str)
def test_layer(training, segments):
    recipe = Recipe((6, 3, 40), 1, dtype="float64")
    x, dy = recipe.x(), recipe.like_x(5)
    layer = BatchNorm(3, dtype=np.float64)
    layer.training = training
    running = layer.running_mean.copy(), layer.running_var.copy()
    gamma, beta = layer.parameters["weight"], layer.parameters["bias"]
    y = layer(x, **segments)
    ref = reference.batch_norm_forward(x, gamma, beta, *running, training=training, **segments)
    assert_allclose(y, ref.y.astype(float), rtol=1e-12, atol=1e-12)
    assert_allclose(layer.running_var, running[1].astype(float), rtol=1e-12)
    assert layer.num_batches_tracked == training
    back = reference.batch_norm_backward(
        dy, x, gamma, ref.mean, ref.rstd, training=training, **segments
    )
    assert_allclose(layer.backward(dy), back.dx.astype(float), rtol=1e-12, atol=1e-12)
    assert_allclose(layer.grads["weight"], back.dgamma.astype(float), rtol=1e-12)


def test_a_synchronised_layer_has_no_segments():
    layer = SyncBatchNorm(3, comm=SelfComm())
    with pytest.raises(ValueError, match=r"^groups cannot be combined with a synch"):
        layer(np.ones((6, 3), np.float32), groups=3)


# What is refused


OVER_PARTS = [name for name in taking("groups") if "x" in VALID[name]()]
SEGMENTED = pytest.mark.parametrize("function", OVER_PARTS)
WHOLE = "expected 0 to 2, the length of axis 0 of x"


@SEGMENTED
@pytest.mark.parametrize("groups", [0, -1, 3])
def test_groups_that_are_no_divisor(function, groups):
    expected = r"expected a divisor of 2, the length of axis 0 of x of shape \(2, 8, 4, 4\)"
    match = rf"^groups is {groups}, {expected}"
    refuses(function, ValueError, match, groups=groups)


@SEGMENTED
@pytest.mark.parametrize("groups", [1.0, "2", [1]])
def test_groups_that_are_no_int(function, groups):
    refuses(function, TypeError, r"^groups must be an int, got", groups=groups)


@SEGMENTED
@pytest.mark.parametrize(
    ("offsets", "error", "match"),
    [
        (np.array([0.0, 2.0]), TypeError, r"^offsets has dtype float64, expected integers"),
        ([0, 2], TypeError, r"^offsets must be a NumPy array"),
        (np.array([0]), ValueError, r"^offsets has shape \(1,\), expected \(parts \+ 1,\)"),
        (np.array([[0, 2]]), ValueError, r"^offsets has shape \(1, 2\)"),
        (np.array([1, 2]), ValueError, rf"^offsets go from 1 to 2, {WHOLE}"),
        (np.array([0, 1]), ValueError, r"^offsets go from 0 to 1"),
        (np.array([0, 3]), ValueError, r"^offsets go from 0 to 3"),
        (np.array([0, 2, 1, 2]), ValueError, r"^offsets decrease"),
        (np.array([0, -1, 2]), ValueError, r"^offsets decrease"),
    ],
)
def test_offsets_that_are_none(function, offsets, error, match):
    refuses(function, error, match, offsets=offsets)


@SEGMENTED
def test_both(function):
    refuses(
        function, ValueError, r"^groups and offsets are both", groups=2, offsets=np.array([0, 2])
    )


@pytest.mark.parametrize("name", ["gamma", "beta", "mean", "var", "rstd", "sum_dy", "sum_dy_xhat"])
@SEGMENTED
def test_parameters_of_another_shape(function, name):
    if name not in VALID[function]():
        return
    for shape, expected in (((7,), "(8,)"), ((3, 8), "(2, 8)"), ((2, 7), "(2, 8)"), ((), "(2, 8)")):
        match = rf"^{name} has shape {shape}, expected {expected}".replace("(", r"\(").replace(
            ")", r"\)"
        )
        refuses(function, ValueError, match, groups=2, **{name: np.ones(shape)})


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_running_statistics_have_no_rows(name):
    match = rf"^{name} has shape \(2, 8\), expected \(8,\)"
    refuses("batch_norm_forward", ValueError, match, groups=2, **{name: np.ones((2, 8))})


@pytest.mark.parametrize("function", BACKWARD)
def test_gamma_and_beta_with_different_rows(function):
    match = r"^beta has shape \(8,\), expected \(2, 8\), the shape of gamma"
    refuses(function, ValueError, match, groups=2, gamma=np.ones((2, 8)), beta=per_channel())


def test_a_part_with_too_few_values():
    x = np.ones((4, 3), np.float32)
    match = (
        r"^expected more than 1 value per channel when training, got a part of x of shape \(4, 3\)"
    )
    for segments in ({"groups": 4}, {"offsets": np.array([0, 0, 3, 4])}):
        with pytest.raises(ValueError, match=match):
            nbnorm.batch_norm_forward(x, **segments)
    nbnorm.batch_norm_forward(x, offsets=np.array([0, 2, 2, 4]))


@pytest.mark.parametrize(
    ("count", "match"),
    [
        (np.ones(2), r"^count has shape \(2,\), expected \(2, 8\), or an int"),
        (np.zeros((2, 8)), r"^count must be a positive integer"),
        (np.full((2, 8), 1.5), r"^count must be a positive integer"),
        (
            np.arange(1.0, 17).reshape(2, 8),
            r"^count must be a positive .* the same for all channels",
        ),
        (0, r"^count must be positive"),
    ],
)
def test_counts_that_are_none(count, match):
    spoiled = {"count": count, "groups": 2}
    refuses("batch_norm_backward_apply", ValueError, match, **spoiled)


def test_compiled_code_refuses_segments():
    numba = pytest.importorskip("numba")
    call = numba.njit(lambda x: nbnorm.batch_norm_stats(x, groups=2))
    with pytest.raises(numba.TypingError, match="groups"):
        call(np.ones((4, 3)))
