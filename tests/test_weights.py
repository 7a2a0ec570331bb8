"""What counts: masks, lengths and weights in every function, against the oracle."""

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from refusals import data, refuses, taking
from strategies import Recipe, dtype_of, other_layouts, recipes
from tolerances import (
    UNITS,
    assert_same_bits,
    assert_within,
    axes_of,
    m2_tolerance,
    mean_tolerance,
    one_unit,
    reduced_axes,
    rstd_tolerance,
    spread,
    sums_tolerance,
    terms_of,
    widened,
    y_tolerance,
)

import nbnorm
from nbnorm import BatchNorm, Moments, cpu, reference
from nbnorm.cpu import channel, weighted_columns

pytestmark = pytest.mark.slow  # compiles kernels that few other tests use

KINDS = ("mask", "lengths", "weights")
FUNCTIONS = taking("mask")
BACKWARD = [name for name in FUNCTIONS if "backward" in name]


def what_counts(recipe, kind, shared, rng):
    """Return the arguments that state which values of x count."""
    shape, kept = list(recipe.shape), axes_of(len(recipe.shape), recipe.axis)
    if kind == "lengths":
        others = [i for i in range(1, len(shape)) if i not in kept]
        return {"lengths": rng.integers(0, shape[others[-1]] + 1, shape[0])}
    if shared:
        shape = [1 if a in kept else n for a, n in enumerate(shape)]
    counts = rng.random(shape) < rng.choice([0.1, 0.5, 0.9])
    if kind == "mask":
        return {"mask": counts}
    return {"weights": np.where(counts, rng.uniform(0.1, 3, shape), 0).astype(np.float32)}


def skip_without_axis(kind, shape):
    """Skip `lengths` in examples that have no axis for them."""
    if kind == "lengths" and shape in ((40, 3), (300, 200), (70, 2, 40)):
        pytest.skip("no axis to go along")


def assert_statistics(x, mask):
    """Compare the moments of the values that count with the oracle's."""
    moments, ref = (f(x, mask=mask) for f in (nbnorm.batch_norm_stats, reference.batch_norm_stats))
    assert_within(moments.mean, ref.mean, mean_tolerance(ref, x.dtype), "mean")
    assert_within(moments.m2, ref.m2, m2_tolerance(ref, x.dtype), "m2")


def weights_of(recipe, counting):
    """Return the weight of every value of x, in x's shape."""
    x = recipe.x()
    return reference._what_counts(
        x, recipe.axis, *(counting.get(n) for n in ("mask", "lengths", "length_axis", "weights"))
    )


def poisoned(x, w, rng):
    """Return x with NaN, Inf or the largest finite numbers in place of values that do not count."""
    found = x.copy()
    with np.errstate(over="ignore"):
        wrong = rng.choice([np.nan, np.inf, -np.inf, 3e38], x.shape).astype(x.dtype)
    found[w == 0] = wrong[w == 0]
    return found


@st.composite
def cases(draw, dtypes=("float32", "float64")):
    """Draw a recipe and what counts, with more than one value in each channel or none."""
    recipe = draw(recipes(dtypes=dtypes, most=20_000))
    kind, shared = draw(st.sampled_from(KINDS)), draw(st.booleans())
    kept = axes_of(len(recipe.shape), recipe.axis)
    if kind == "lengths" and all(i in kept for i in range(1, len(recipe.shape))):
        kind = "mask"
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return recipe, what_counts(recipe, kind, shared, rng), rng


def tame(x, w, ref_mean, axis):
    """Replace values that do not count by the mean, which adds nothing to a tolerance."""
    return np.where(w > 0, x, spread(ref_mean, x, axis)).astype(x.dtype)


@given(cases(), st.sampled_from((None, "relu")), st.sampled_from((0.0, None, 7.5)))
def test_forward(case, activation, fill):
    recipe, counting, rng = case
    w, axis = weights_of(recipe, counting), recipe.axis
    clean = np.where(w > 0, recipe.x(), 0).astype(recipe.x().dtype)
    x = poisoned(clean, w, rng) if fill is not None else clean
    gamma, beta = recipe.gamma(), recipe.beta()
    options = {"eps": recipe.eps, "axis": axis, "activation": activation, "correction": 0}
    options |= {"fill": fill, **counting}
    y, mean, rstd = nbnorm.batch_norm_forward(x, gamma, beta, **options)
    ref = reference.batch_norm_forward(clean, gamma, beta, **options)
    own = reference.batch_norm_stats(clean, axis=axis, **counting)
    inside = tame(x, w, ref.mean, axis) if fill is not None else x
    error = y_tolerance(inside, gamma, beta, ref.mean, ref.rstd, axis=axis)
    assert y.dtype == x.dtype
    assert_within(y, ref.y, error, "y")
    assert_within(mean, ref.mean, mean_tolerance(own, x.dtype), "mean")
    assert_within(rstd, ref.rstd, rstd_tolerance(own, ref.rstd, x.dtype), "rstd")
    if fill is not None:
        assert_array_equal(y[w == 0], np.asarray(fill, y.dtype))
    moments = nbnorm.batch_norm_stats(x, axis=axis, **counting)
    assert_same_bits(moments.mean, mean, "mean of stats and of the forward")
    assert_within(moments.m2, own.m2, m2_tolerance(own, x.dtype), "m2")
    assert_allclose(np.broadcast_to(moments.count, own.count.shape), own.count, rtol=1e-6)
    del options["eps"], options["correction"]
    applied = nbnorm.batch_norm_apply(x, gamma, beta, mean, rstd, **options)
    assert_same_bits(applied, y, "y of apply and of the forward")


@given(cases(), st.booleans(), other_layouts())
def test_backward(case, training, dy_layout):
    recipe, counting, rng = case
    w, axis = weights_of(recipe, counting), recipe.axis
    clean, gamma = np.where(w > 0, recipe.x(), 0).astype(recipe.x().dtype), recipe.gamma()
    dy = recipe.like_x(5, dy_layout)
    clean_dy = np.where(w > 0, dy, 0).astype(dy.dtype)
    x, poisoned_dy = poisoned(clean, w, rng), poisoned(clean_dy, w, rng)
    ref = reference.batch_norm_forward(
        clean, gamma, eps=recipe.eps, axis=axis, correction=0, **counting
    )
    options = {"axis": axis, **counting}
    arguments = gamma, ref.mean.astype(np.float64), ref.rstd.astype(np.float64)
    got = nbnorm.batch_norm_backward(poisoned_dy, x, *arguments, training=training, **options)
    expected = reference.batch_norm_backward(
        clean_dy, clean, *arguments, training=training, **options
    )
    sums = nbnorm.batch_norm_backward_reduce(poisoned_dy, x, *arguments[1:], **options)
    inside = tame(clean, w, arguments[1], axis)
    errors = sums_tolerance(clean_dy, inside, *arguments[1:], axis=axis)
    for total, wanted, error in zip(sums, (expected.dbeta, expected.dgamma), errors, strict=True):
        assert_within(total, wanted, error, "sums")
    xhat, factor, _ = terms_of(inside, *arguments, axis)
    over = reduced_axes(x.ndim, axis)

    def most(values):
        return np.max(np.abs(values), axis=over, keepdims=True, initial=0)

    m = np.maximum(np.sum(w, axis=over, keepdims=True), np.min(w[w > 0], initial=1))
    scale = most(widened(clean_dy))
    if training:
        heaviest = most(w)
        scale = scale + heaviest * np.abs(spread(expected.dbeta, x, axis)) / m
        scale = scale + heaviest * most(xhat) * np.abs(spread(expected.dgamma, x, axis)) / m
    assert_within(got.dx, expected.dx, UNITS * one_unit(np.abs(factor) * scale, x.dtype), "dx")
    assert_array_equal(got.dx[w == 0], 0)
    if training:
        count = nbnorm.batch_norm_stats(x, **options).count
        if np.all(np.asarray(count) > 0):
            dx = nbnorm.batch_norm_backward_apply(
                poisoned_dy, x, *arguments, *sums, count, **options
            )
            assert_same_bits(dx, got.dx, "dx of the halves")


EXAMPLES = [((40, 3), 1), ((9, 5, 7), 1), ((6, 4, 70), 1), ((4, 3, 30, 20), 1), ((300, 200), 1)]
EXAMPLES += [((5, 40, 9), -1), ((3, 300, 5), (1,)), ((70, 2, 40), (1, 2))]
examples = pytest.mark.parametrize(
    ("shape", "axis"), EXAMPLES, ids=lambda value: str(value).replace(" ", "")
)
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@kinds
@examples
def test_what_does_not_count_changes_no_bit(shape, axis, kind, dtype):
    recipe, rng = Recipe(shape, axis, dtype), np.random.default_rng(1)
    skip_without_axis(kind, shape)
    counting = what_counts(recipe, kind, True, rng)
    w, x, dy = weights_of(recipe, counting), recipe.x(), recipe.like_x(5)
    residual = recipe.like_x(7)
    gamma, beta = recipe.gamma(), recipe.beta()
    results = []
    for _ in range(2):
        y, mean, rstd = nbnorm.batch_norm_forward(
            x,
            gamma,
            beta,
            axis=axis,
            residual=residual,
            activation="relu",
            correction=0,
            **counting,
        )
        grads = nbnorm.batch_norm_backward(
            dy, x, gamma, mean, rstd, beta=beta, y=y, activation="relu", axis=axis, **counting
        )
        results.append((y, mean, rstd, *grads))
        x, dy, residual = (poisoned(a, w, rng) for a in (x, dy, residual))
    for before, after in zip(*results, strict=True):
        assert_same_bits(after, before)
    assert_array_equal(results[0][0][w == 0].astype(np.float64), 0)


@pytest.mark.parametrize("activation", ["silu", "leaky_relu"])
@examples
def test_other_activations(shape, axis, activation):
    recipe, rng = Recipe(shape, axis), np.random.default_rng(2)
    counting = what_counts(recipe, "mask", True, rng)
    x, dy, residual = recipe.x(), recipe.like_x(5), recipe.like_x(7)
    options = {"axis": axis, "residual": residual, "activation": activation, **counting}
    gamma, beta = recipe.gamma(), recipe.beta()
    got = nbnorm.batch_norm_forward(x, gamma, beta, **options)
    ref = reference.batch_norm_forward(x, gamma, beta, **options)
    assert_allclose(got.y, ref.y, rtol=1e-5, atol=1e-5)
    arguments = dy, x, gamma, got.mean, got.rstd
    for a, b in zip(
        nbnorm.batch_norm_backward(*arguments, beta=beta, **options),
        reference.batch_norm_backward(*arguments, beta=beta, **options),
        strict=True,
    ):
        assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@kinds
@examples
def test_when_everything_counts_the_bits_are_those_of_a_plain_call(shape, axis, kind, dtype):
    if kind == "weights" or (kind == "lengths" and shape in ((40, 3), (300, 200), (70, 2, 40))):
        pytest.skip("no such call")
    recipe = Recipe(shape, axis, dtype)
    x, dy = recipe.x(), recipe.like_x(5)
    others = [i for i in reduced_axes(len(shape), axis) if i > 0]
    counting = {"mask": np.ones((1,) * len(shape), bool)}
    if kind == "lengths":
        counting = {"lengths": np.full(shape[0], shape[others[-1]])}
    plain = nbnorm.batch_norm_forward(x, axis=axis)
    for a, b in zip(nbnorm.batch_norm_forward(x, axis=axis, **counting), plain, strict=True):
        assert_same_bits(a, b)
    arguments = dy, x, None, plain.mean, plain.rstd
    plain = nbnorm.batch_norm_backward(*arguments, axis=axis)
    for a, b in zip(
        nbnorm.batch_norm_backward(*arguments, axis=axis, **counting)[:3], plain[:3], strict=True
    ):
        assert_same_bits(a, b)


@pytest.mark.parametrize("shape", [(60, 5), (6, 5, 50), (300, 130), (4, 3, 400)], ids=str)
def test_whole_weights_are_repeated_samples(shape):
    rng = np.random.default_rng(3)
    x, times = rng.normal(2, 3, shape), rng.integers(0, 4, shape[0])
    weights = times.reshape((-1,) + (1,) * (len(shape) - 1)).astype(np.float64)
    repeated = x.repeat(times, axis=0)
    running = [(np.zeros(shape[1]), np.ones(shape[1])) for _ in range(2)]
    y, mean, rstd = nbnorm.batch_norm_forward(x, None, None, *running[0], weights=weights)
    expected = nbnorm.batch_norm_forward(repeated, None, None, *running[1])
    assert_allclose(y.repeat(times, axis=0), expected.y, rtol=1e-12, atol=1e-12)
    assert_allclose(mean, expected.mean, rtol=1e-13)
    assert_allclose(rstd, expected.rstd, rtol=1e-13)
    assert_allclose(running[0], running[1], rtol=1e-13)
    moments = nbnorm.batch_norm_stats(x, weights=weights)
    assert type(moments.count) is float
    assert moments.count == nbnorm.batch_norm_stats(repeated).count
    dy, samples = rng.normal(size=shape), np.arange(shape[0]).repeat(times)
    got = nbnorm.batch_norm_backward(dy, x, None, mean, rstd, weights=weights)
    each = dy / np.maximum(times, 1).reshape(weights.shape)  # shared by the repetitions
    of_each = nbnorm.batch_norm_backward(each[samples], repeated, None, mean, rstd).dx
    dx = np.zeros(shape)
    np.add.at(dx, samples, of_each)
    assert_allclose(got.dx, dx, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [1e-30, 1e30, 1e-300, 1e300])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_of_any_size(size, dtype):
    x, dy = data(dtype, (50, 4)), data(dtype, (50, 4), 1)
    weights = np.random.default_rng(4).uniform(0.1, 2, (50, 1))
    plain = nbnorm.batch_norm_forward(x, weights=weights, correction=0)
    scaled = nbnorm.batch_norm_forward(x, weights=weights * size, correction=0)
    assert_allclose(scaled.y, plain.y, rtol=1e-5, atol=1e-6)
    sized = nbnorm.batch_norm_stats(x, weights=weights * size)
    assert_allclose(sized.m2 / size, nbnorm.batch_norm_stats(x, weights=weights).m2, rtol=1e-5)
    assert_allclose(sized.count, weights.sum() * size, rtol=1e-6)
    arguments = dy, x, None, plain.mean, plain.rstd
    grads = nbnorm.batch_norm_backward(*arguments, weights=weights)
    sums = nbnorm.batch_norm_backward_reduce(dy, x, *arguments[3:], weights=weights * size)
    dx = nbnorm.batch_norm_backward_apply(*arguments, *sums, sized.count, weights=weights * size)
    assert_allclose(dx, grads.dx, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_half_precision(dtype):
    x, weights = data("float32", (50, 4)), np.resize([0, 1, 2.5], (50, 1)).astype(dtype_of(dtype))
    got = nbnorm.batch_norm_forward(x, weights=weights)
    expected = nbnorm.batch_norm_forward(x, weights=weights.astype(np.float32))
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize(
    "shape", [(6, 4), (6, 4, 9), (3, 4, 300), (100, 140), (7, 300, 2)], ids=str
)
@pytest.mark.parametrize("groups", [None, 1, 3])
def test_a_channel_in_which_nothing_counts(shape, groups):
    if groups == 3 and shape[0] % 3:
        pytest.skip("not divisible")
    x, dy = data("float32", shape), data("float32", shape, 1)
    mask = np.ones(shape, bool)
    mask[:, 1] = False
    x[:, 1] = np.nan
    C = shape[1]
    running_mean, running_var = np.full(C, 5.0), np.full(C, 7.0)
    beta = np.full(C, 3.0, np.float32)
    options = {"mask": mask, "groups": groups}
    y, mean, rstd = nbnorm.batch_norm_forward(x, None, beta, running_mean, running_var, **options)
    assert_array_equal(y[:, 1], 0)
    assert_array_equal(mean[..., 1], 0)
    assert_array_equal(rstd[..., 1], 0)
    assert (running_mean[1], running_var[1]) == (5.0, 7.0)
    assert (running_mean[[0, 2, 3]] != 5.0).all()
    moments = nbnorm.batch_norm_stats(x, **options)
    assert_array_equal(moments.count[..., 1], 0)
    assert_array_equal(moments.m2[..., 1], 0)
    grads = nbnorm.batch_norm_backward(dy, x, None, mean, rstd, **options)
    assert_array_equal(grads.dx[:, 1], 0)
    assert np.isfinite(grads.dx).all()
    assert (grads.dgamma[1], grads.dbeta[1]) == (0, 0)
    filled = nbnorm.batch_norm_forward(np.nan_to_num(x), None, beta, fill=None, **options)
    assert_array_equal(filled.y[:, 1], 3.0)
    running = [np.full(C, 5.0), np.full(C, 7.0)]
    nbnorm.update_running_stats(*running, moments)
    assert_array_equal(running[0], running_mean)
    assert_allclose(running[1], running_var, rtol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(12, 5, 8), (12, 5, 300), (64, 130, 1)], ids=str)
def test_segments_and_what_counts(shape, kind):
    rng = np.random.default_rng(5)
    recipe = Recipe(shape, 1, "float64", gamma_dtype="float64")
    counting = what_counts(recipe, kind, True, rng)
    if kind == "lengths":
        counting["lengths"] = np.maximum(counting["lengths"], 1)
        if shape[2] == 1:
            counting["lengths"][::3] = 0
    x, dy, gamma = recipe.x(), recipe.like_x(5), recipe.gamma()
    for segments in ({"groups": 4}, {"offsets": np.array([0, 3, 3, shape[0]])}):
        options = segments | counting
        running = [(np.zeros(shape[1]), np.ones(shape[1])) for _ in range(2)]
        got = nbnorm.batch_norm_forward(x, gamma, None, *running[0], correction=0, **options)
        ref = reference.batch_norm_forward(x, gamma, None, *running[1], correction=0, **options)
        for a, b in zip((*got, *running[0]), (*ref, *running[1]), strict=True):
            assert_allclose(a, b, rtol=1e-10, atol=1e-12)
        moments = nbnorm.batch_norm_stats(x, **options)
        own = reference.batch_norm_stats(x, **options)
        for a, b in zip(moments, own, strict=True):
            assert_allclose(a, b, rtol=1e-10, atol=1e-12)
        arguments = dy, x, gamma, got.mean, got.rstd
        grads = nbnorm.batch_norm_backward(*arguments, **options)
        for a, b in zip(grads, reference.batch_norm_backward(*arguments, **options), strict=True):
            if b is not None:
                assert_allclose(a, b, rtol=1e-9, atol=1e-11)
        sums = nbnorm.batch_norm_backward_reduce(dy, x, *arguments[3:], **options)
        if (moments.count > 0).all():
            dx = nbnorm.batch_norm_backward_apply(*arguments, *sums, moments.count, **options)
            assert_same_bits(dx, grads.dx)


@pytest.mark.parametrize("shape", [(400, 130), (90, 60, 20), (16, 12, 40, 30)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("late", [False, True])
def test_threads_change_no_bit(shape, dtype, late, thread_count):
    """Even if a channel begins to count later than others in the same block."""
    x, dy = data(dtype, shape), data(dtype, shape, 1)
    weights = np.random.default_rng(6).lognormal(0, 6, shape)
    if late:
        weights[: shape[0] // 3, : shape[1] // 2] = 0

    def results():
        running = np.zeros(shape[1]), np.ones(shape[1])
        y, mean, rstd = nbnorm.batch_norm_forward(x, None, None, *running, weights=weights)
        grads = nbnorm.batch_norm_backward(dy, x, None, mean, rstd, weights=weights)
        count = nbnorm.batch_norm_stats(x, weights=weights).count
        return y, mean, rstd, *grads[:3], *running, count

    together = results()
    numba.set_num_threads(1)
    for a, b in zip(results(), together, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("counting", [{"mask": (4, 1)}, {"mask": (4, 3)}, {"lengths": 5}], ids=str)
@pytest.mark.parametrize("segments", [{"groups": 2}, {"offsets": np.array([0, 1, 4])}], ids=str)
def test_segments_in_which_everything_counts(segments, counting):
    x, dy = data("float32", (4, 3, 5)), data("float32", (4, 3, 5), 1)
    if "mask" in counting:
        given_ = {"mask": np.ones((*counting["mask"], 1), bool)}
    else:
        given_ = {"lengths": np.full(4, 5)}
    running = [(np.zeros(3), np.ones(3)) for _ in range(2)]
    plain = nbnorm.batch_norm_forward(x, None, None, *running[0], **segments)
    same = nbnorm.batch_norm_forward(x, None, None, *running[1], **segments, **given_)
    for a, b in zip((*same, *running[1]), (*plain, *running[0]), strict=True):
        assert_same_bits(a, b)
    moments = nbnorm.batch_norm_stats(x, **segments, **given_)
    for a, b in zip(moments, nbnorm.batch_norm_stats(x, **segments), strict=True):
        assert_array_equal(a, b)
    with pytest.raises(ValueError, match="expected more than 1 value per channel"):
        nbnorm.batch_norm_forward(x[:, :, 0], groups=4, mask=np.ones((4, 1), bool))
    # Counts of other ranks, which differ by channel.
    counts = np.array([[12.0, 13, 14], [15, 16, 17]])
    grads = dy, x, None, plain.mean, plain.rstd
    sums = nbnorm.batch_norm_backward_reduce(dy, x, plain.mean, plain.rstd, **segments)
    dx = nbnorm.batch_norm_backward_apply(*grads, *sums, counts, **segments, **given_)
    ref = reference.batch_norm_backward_apply(*grads, *sums, counts, **segments)
    assert_allclose(dx, ref.astype(np.float64), rtol=1e-5, atol=1e-6)


def test_counts_of_other_parts_of_the_batch():
    x, dy = data("float32", (6, 3)), data("float32", (6, 3), 1)
    moments = nbnorm.batch_norm_stats(x)
    arguments = dy, x, None, moments.mean, moments.rstd(1e-5)
    sums = nbnorm.batch_norm_backward_reduce(dy, x, *arguments[3:])
    counts, everything = np.array([7, 8, 9]), np.ones((1, 1), bool)
    ref = reference.batch_norm_backward_apply(*arguments, *sums, counts)
    for given_ in (counts, counts.astype(float)):
        dx = nbnorm.batch_norm_backward_apply(*arguments, *sums, given_, mask=everything)
        assert_allclose(dx, ref.astype(float), rtol=1e-5, atol=1e-6)
        with pytest.raises(ValueError, match=r"count differs by channel, .* pass mask=np.ones"):
            nbnorm.batch_norm_backward_apply(*arguments, *sums, given_)
    same = nbnorm.batch_norm_backward_apply(*arguments, *sums, 6)
    for six in (6.0, np.full(3, 6), np.full(3, 6.0)):
        dx = nbnorm.batch_norm_backward_apply(*arguments, *sums, six)
        assert_same_bits(dx, same)


@pytest.mark.parametrize("shape", [(30, 140), (700, 140), (40, 4, 400)], ids=str)
def test_values_that_begin_to_count_late(shape):
    """The mean is far from 0: a channel without a shift near it would lose digits.

    Some channels count only in the beginning, so their later tiles are empty.
    """
    x = np.random.default_rng(12).normal(1e6, 1, shape)
    mask = np.zeros(x.shape, bool)
    mask[-20:, ::3], mask[:25, 1::3], mask[::7, 2::3] = True, True, True
    assert_statistics(x, mask)


@kinds
@examples
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_constant_channel_has_no_spread(shape, axis, kind, dtype):
    skip_without_axis(kind, shape)
    recipe = Recipe(shape, axis, dtype)
    counting = what_counts(recipe, kind, True, np.random.default_rng(8))
    x = np.full(shape, 0.1, dtype)
    x[weights_of(recipe, counting) == 0] = np.nan
    moments = nbnorm.batch_norm_stats(x, axis=axis, **counting)
    some = np.broadcast_to(moments.count, moments.mean.shape) > 0
    assert_array_equal(moments.mean[some], np.float64(x.dtype.type(0.1)))
    assert_array_equal(moments.m2, 0)


def test_the_first_samples_that_count_give_the_shift():
    """However late: with one value as the shift, padded sequences took four times as long."""
    N, C = 200, 5
    x = np.random.default_rng(0).normal(3, 1, (N, C)).astype(np.float32)
    counts = np.arange(N) % 2 * (np.arange(N) >= 50)
    w = counts.astype(np.uint8), 1
    grid, shift = tuple(map(np.int64, (N, C, 1, 256, 1, N))), np.empty(C)

    @numba.njit
    def first_shifts(x, w, grid, shift):
        weighted_columns.first_shifts((x, C, 1), w, grid, 0, C, 0, N, shift)

    first_shifts(x.ravel(), w, grid, shift)
    assert_allclose(shift, x[counts == 1][: channel.FIRST].mean(0, np.float64), rtol=1e-6)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("shape", [(16384, 64), (1, 1, 1 << 19)], ids=["columns", "rows"])
def test_first_values_far_off_cost_the_later_ones_no_digit(shape, shared):
    x = np.random.default_rng(0).normal(size=shape)
    (x[:32] if len(shape) == 2 else x[0, :, :32])[...] = 1e6
    mask = np.ones((shape[0], 1, *shape[2:]) if shared else shape, bool)
    mask.reshape(-1)[-1] = False
    x[np.broadcast_to(~mask, shape)] = np.nan
    assert_statistics(x, mask)


@pytest.mark.parametrize("shared", [True, False])
def test_first_values_may_differ_by_more_than_the_greatest_number(shared):
    x = np.full((40, 300), 3e38, np.float32)
    x[::3] *= -1
    mask = np.ones((40, 1 if shared else 300), bool)
    mask[-1, 0] = False
    assert_statistics(x, mask)


def test_weights_above_0_count_however_small():
    x = np.array([[1.0], [2.0], [3.0]], np.float32)
    weights = np.array([[1.0], [1e-60], [1.0]])
    y = nbnorm.batch_norm_forward(x, weights=weights, fill=9.0).y
    assert y[1, 0] != 9.0
    weights[1] = 0
    assert nbnorm.batch_norm_forward(x, weights=weights, fill=9.0).y[1, 0] == 9.0


def test_weights_whose_sum_is_the_number_of_values():
    """They must not be treated as a mask in which everything counts."""
    x, weights = np.array([[1.0], [2.0]]), np.array([[0.5], [1.5]])
    moments = nbnorm.batch_norm_stats(x, weights=weights)
    assert (moments.count, moments.mean[0]) == (2.0, 1.75)


def test_a_mask_of_odd_bytes():
    """Any byte except 0 is True, even where sums are taken again in float64."""
    x = np.array([[1e30], [-1e30], [3e30], [7.0]], np.float32)
    mask = np.array([[2], [2], [1], [0]], np.uint8).view(bool)
    odd = nbnorm.batch_norm_stats(x, mask=mask)
    even = nbnorm.batch_norm_stats(x, mask=mask == True)  # noqa: E712
    assert odd.count == even.count == 3
    assert_array_equal(odd.mean, even.mean)
    assert_array_equal(odd.m2, even.m2)


def test_no_channels():
    x = np.zeros((4, 0, 3), np.float32)
    assert nbnorm.batch_norm_stats(x).count == 12
    assert nbnorm.batch_norm_stats(x, mask=np.ones((4, 1, 1), bool)).count == 12
    assert nbnorm.batch_norm_forward(x, mask=np.ones((4, 1, 1), bool)).y.shape == x.shape
    assert nbnorm.batch_norm_stats(x, mask=np.ones((4, 0, 3), bool)).count.shape == (0,)


@pytest.mark.parametrize("shape", [(40, 3), (6, 4, 40), (300, 200)], ids=str)
def test_masks_of_any_layout_compile_nothing_new(shape):
    """Read-only, broadcast, reversed and transposed masks are the same mask."""
    x, rng = data("float32", shape), np.random.default_rng(11)
    whole = (shape[0], 1, *shape[2:])
    mask = rng.random(whole) < 0.5
    expected = nbnorm.batch_norm_forward(x, mask=mask)
    before = len(cpu.kernels.weighted_rows.forward.overloads)
    before += len(cpu.kernels.weighted_columns.forward.overloads)
    read_only, unaligned = mask.copy(), np.zeros(mask.size + 1, bool)[1:].reshape(whole)
    read_only.flags.writeable = False
    unaligned[...] = mask
    for same in (read_only, unaligned, mask[::-1].copy()[::-1], np.asfortranarray(mask)):
        for a, b in zip(nbnorm.batch_norm_forward(x, mask=same), expected, strict=True):
            assert_same_bits(a, b)
    after = len(cpu.kernels.weighted_rows.forward.overloads)
    assert after + len(cpu.kernels.weighted_columns.forward.overloads) == before
    full = nbnorm.batch_norm_forward(x, mask=np.broadcast_to(mask, shape))
    assert_allclose(full.y, expected.y, rtol=1e-5, atol=1e-6)


def test_moments_of_weights_merge():
    x = np.random.default_rng(7).normal(3, 2, (100, 4))
    weights = np.random.default_rng(8).uniform(0, 2, (100, 1))
    mask = np.random.default_rng(9).random((100, 4)) < 0.5
    for name, given_ in (("weights", weights), ("mask", mask)):
        parts = [
            nbnorm.batch_norm_stats(x[part], **{name: given_[part]})
            for part in (slice(0, 30), slice(30, 100))
        ]
        whole = nbnorm.batch_norm_stats(x, **{name: given_})
        merged = parts[0].merge(parts[1])
        for a, b in zip(merged, whole, strict=True):
            assert_allclose(a, b, rtol=1e-12)
        assert_allclose(merged.var(1), whole.var(1), rtol=1e-12)
        assert_allclose(merged.rstd(1e-5), whole.rstd(1e-5), rtol=1e-12)
    assert type(nbnorm.batch_norm_stats(x, weights=weights).count) is float
    assert type(nbnorm.batch_norm_stats(x, mask=mask[:, :1]).count) is int
    assert nbnorm.batch_norm_stats(x, mask=mask).count.shape == (4,)
    assert (
        Moments(2.5, np.ones(1), np.ones(1)).merge(Moments(1, np.ones(1), np.ones(1))).count == 3.5
    )


@kinds
def test_layer(kind):
    recipe, rng = Recipe((6, 4, 30), 1, "float64"), np.random.default_rng(10)
    counting = what_counts(recipe, kind, True, rng)
    x, dy = recipe.x(), recipe.like_x(5)
    layer = BatchNorm(4, dtype=np.float64)
    y = layer.forward(x, fill=2.0, **counting)
    running = np.zeros(4), np.ones(4)
    expected = nbnorm.batch_norm_forward(x, np.ones(4), np.zeros(4), *running, fill=2.0, **counting)
    assert_same_bits(y, expected.y)
    assert_same_bits(layer.running_mean, running[0])
    assert_same_bits(layer.running_var, running[1])
    assert layer.num_batches_tracked == 1
    dx = layer.backward(dy)
    grads = nbnorm.batch_norm_backward(dy, x, np.ones(4), expected.mean, expected.rstd, **counting)
    assert_same_bits(dx, grads.dx)
    assert_same_bits(layer.grads["weight"], grads.dgamma)
    layer.eval()
    y = layer(x, **counting)
    expected = nbnorm.batch_norm_inference(x, np.ones(4), np.zeros(4), *running, **counting)
    assert_allclose(y, expected, rtol=1e-12)


def test_a_constant_batch_is_tracked():
    layer = BatchNorm(2, eps=0, momentum=None)
    layer.forward(np.full((4, 2), 2, np.float32), mask=np.arange(4)[:, None] > 0)
    assert layer.num_batches_tracked == 1
    layer.set_statistics(
        nbnorm.batch_norm_stats(data("float32", (9, 2)), mask=data("f8", (9, 2)) > -9)
    )
    assert (layer.running_mean != 2).all()


@pytest.mark.parametrize("activation", [None, "leaky_relu"])
def test_in_place(activation):
    x, dy = data("float32", (6, 4, 30)), data("float32", (6, 4, 30), 1)
    mask = np.random.default_rng(13).random((6, 1, 30)) < 0.7
    results = []
    for inplace in (False, True):
        layer = BatchNorm(4, inplace=inplace, activation=activation)
        y = layer.forward(x.copy(), mask=mask)
        results.append((y, layer.backward(dy), *layer.grads.values(), layer.running_var))
    for a, b in zip(*results, strict=True):
        assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_batch_in_which_nothing_counts_is_not_tracked():
    layer = BatchNorm(3, momentum=None)
    layer.forward(data("float32", (4, 3)), mask=np.zeros((4, 1), bool))
    assert layer.num_batches_tracked == 0
    assert_array_equal(layer.running_mean, 0)
    layer.forward(data("float32", (4, 3)), mask=np.ones((4, 1), bool))
    assert layer.num_batches_tracked == 1


def test_lengths_are_a_mask():
    x = data("float32", (3, 5, 4, 6))
    lengths = np.array([2, 0, 4], np.uint8)
    mask = (np.arange(4) < lengths[:, None]).reshape(3, 1, 4, 1)
    got = nbnorm.batch_norm_forward(x, lengths=lengths, length_axis=2)
    for a, b in zip(got, nbnorm.batch_norm_forward(x, mask=mask), strict=True):
        assert_same_bits(a, b)
    default = nbnorm.batch_norm_forward(x, lengths=lengths)
    mask = (np.arange(6) < lengths[:, None]).reshape(3, 1, 1, 6)
    for a, b in zip(default, nbnorm.batch_norm_forward(x, mask=mask), strict=True):
        assert_same_bits(a, b)
    last = np.moveaxis(x, 1, -1)
    got = nbnorm.batch_norm_forward(last, axis=-1, lengths=lengths)
    assert_allclose(np.moveaxis(got.y, -1, 1), default.y, rtol=1e-5, atol=1e-6)


BAD = [
    ({"mask": np.ones((2, 1, 4, 4))}, TypeError, "mask has dtype float64, expected bool"),
    ({"mask": np.ones((3, 1, 4, 4), bool)}, ValueError, "does not broadcast to x of shape"),
    ({"mask": np.ones((1, 2, 8, 4, 4), bool)}, ValueError, "does not broadcast"),
    ({"mask": [True]}, TypeError, "mask must be a NumPy array"),
    ({"weights": np.ones((2, 1, 4, 4), int)}, TypeError, "weights has dtype int64"),
    ({"weights": np.full((2, 1, 1, 1), -1.0)}, ValueError, "weights must be finite and not neg"),
    ({"weights": np.full((2, 1, 1, 1), np.nan)}, ValueError, "not negative, got nan"),
    ({"weights": np.full((2, 1, 1, 1), np.inf)}, ValueError, "not negative, got inf"),
    ({"weights": np.ones((2, 3, 1, 1))}, ValueError, "weights has shape"),
    ({"lengths": np.ones(2)}, TypeError, "lengths has dtype float64, expected integers"),
    ({"lengths": np.ones(3, int)}, ValueError, "lengths has shape"),
    ({"lengths": np.array([1, 5])}, ValueError, r"lengths\[1\] is 5, expected 0 to 4"),
    ({"lengths": np.array([-1, 1])}, ValueError, r"lengths\[0\] is -1"),
    ({"lengths": np.ones(2, int), "length_axis": 1}, ValueError, "length_axis is 1, expected one"),
    ({"lengths": np.ones(2, int), "length_axis": 0}, ValueError, "length_axis is 0"),
    ({"lengths": np.ones(2, int), "length_axis": 4}, ValueError, "length_axis is 4"),
    ({"lengths": np.ones(2, int), "length_axis": "2"}, TypeError, "length_axis must be an int"),
    ({"length_axis": 2}, ValueError, "length_axis is given without lengths"),
    (
        {"mask": np.ones((2, 1, 1, 1), bool), "weights": np.ones((2, 1, 1, 1))},
        ValueError,
        "mask and weights are given, expected one of",
    ),
    ({"fill": "0", "mask": np.ones((2, 1, 1, 1), bool)}, TypeError, "fill must be a real number"),
    ({"fill": "0", "groups": 1}, TypeError, "fill must be a real number"),
    ({"weights": np.full((2, 1, 4, 4), 1e308)}, ValueError, "weights must have a finite sum"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_refused(name, bad, error, message):
    if "fill" in bad and name not in taking("fill"):
        pytest.skip("takes no fill")
    refuses(name, error, message, **bad)


@pytest.mark.parametrize("name", ["batch_norm_forward"])
def test_too_few_values_that_count(name):
    mask = np.zeros((2, 1, 4, 4), bool)
    mask[0, 0, 0, 0] = True
    refuses(name, ValueError, "expected more than 1 value", mask=mask)
    weights = np.full((2, 1, 4, 4), 1 / 64)
    refuses(name, ValueError, "expected more than 1 value", weights=weights)


def test_out_must_not_overlap_what_counts():
    x = data("float32", (4, 3, 5))
    weights = np.ones_like(x)
    with pytest.raises(ValueError, match="out"):
        nbnorm.batch_norm_forward(x, weights=weights, out=weights)
    assert_array_equal(weights, 1)
    running = np.ones(3), np.ones(3)
    with pytest.raises(ValueError, match="weights"):
        nbnorm.batch_norm_forward(np.ones((5, 3)), None, None, *running, weights=running[0][None])
