"""Debiased moving averages: in `update_running_stats`, and as an option of the layer."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from refusals import refuses
from tolerances import assert_same_bits, assert_within, one_unit

import nbnorm
from nbnorm import BatchNorm, Moments, conventions, reference
from nbnorm.moments import debiased

momenta = st.floats(1e-6, 1.0)


def draw(seed, shape=(6, 3)):
    return np.random.default_rng(seed).normal(2.0, 3.0, shape)


def adam(batches, momentum):
    """Average as Adam does, in longdouble: from 0, divided by 1 - (1 - momentum)^t."""
    average, weight = 0, np.longdouble(momentum)
    for t, batch in enumerate(batches, 1):
        average = (1 - weight) * average + weight * batch
        yield average / (1 - (1 - weight) ** t)


@given(momenta, st.integers(1, 30), st.integers(0, 99))
def test_the_running_statistics_are_adams_average(momentum, number, seed):
    """Each update rounds the two terms, their sum and the weight, relative to the largest batch."""
    batches = draw(seed, (number, 4, 3))
    mean, var = np.full(3, 1e6), np.full(3, 1e6)  # debiasing discards these
    means = list(adam(batches.mean(axis=1).astype(np.longdouble), momentum))
    variances = list(adam(batches.var(axis=1, ddof=1).astype(np.longdouble), momentum))
    for t, x in enumerate(batches):
        moments = nbnorm.batch_norm_stats(x)
        nbnorm.update_running_stats(mean, var, moments, momentum=momentum, num_batches_tracked=t)
        for got, expected, values in (
            (mean, means[t], batches.mean(axis=1)),
            (var, variances[t], batches.var(axis=1, ddof=1)),
        ):
            # 1 - (1 - momentum)^t of the oracle cancels where momentum t is small.
            cancels = np.longdouble(2) ** -63 / min(momentum, 1)
            most = np.abs(values[: t + 1]).max()
            tolerance = (t + 1) * 4 * one_unit(most, np.float64) + 4 * cancels * most
            assert_within(got, expected, tolerance, f"batch {t}")


@given(momenta, st.integers(0, 1000), st.booleans())
def test_the_oracle_agrees(momentum, batches, inplace):
    moments = nbnorm.batch_norm_stats(draw(1))
    options = {"momentum": momentum, "num_batches_tracked": batches}
    mean, var = np.array([0.5, -2.0, 3.0]), np.array([0.1, 4.0, 9.0])
    ref = reference.update_running_stats(mean, var, moments, inplace=False, **options)
    got = nbnorm.update_running_stats(mean, var, moments, inplace=inplace, **options)
    assert (got[0] is mean) == inplace
    for comp, expected in zip(got, ref, strict=True):
        # The oracle's powers are off by 1 / momentum units of longdouble; ours round in float64.
        error = 8 * np.finfo(np.float64).eps + 8 * np.finfo(np.longdouble).eps / momentum
        assert_allclose(comp, expected.astype(float), rtol=0, atol=float(error) * 10)


def test_weights():
    """The first batch has weight 1, the second 1 / (2 - momentum); the limit is momentum."""
    for momentum in (1e-12, 0.1, 0.5, 1.0):
        assert debiased(momentum, 0) == 1.0
        assert debiased(momentum, 1) == pytest.approx(1 / (2 - momentum), rel=1e-15)
        assert debiased(momentum, 10**9) == pytest.approx(max(momentum, 1e-9), rel=1e-3)
    for batches in (0, 1, 7, 1000):  # a small momentum weights all batches equally
        assert debiased(1e-12, batches) == pytest.approx(1 / (batches + 1), rel=1e-8)


@pytest.mark.parametrize("momentum", [0.0, -0.1, 1.5])
def test_momentum_outside_of_0_to_1_is_refused(momentum):
    match = r"momentum must be in \(0, 1\] for a debiased average, got"
    refuses("update_running_stats", ValueError, match, momentum=momentum, num_batches_tracked=0)
    layer = BatchNorm(3, momentum=momentum, debias=True)
    with pytest.raises(ValueError, match=match):
        layer.forward(draw(1))
    assert_array_equal(layer.running_mean, np.zeros(3))
    layer.eval().forward(draw(1))  # averages nothing


@pytest.mark.parametrize(
    ("batches", "error", "match"),
    [
        (-1, ValueError, "num_batches_tracked must not be negative, got -1"),
        (1.5, TypeError, "num_batches_tracked must be an integer, got 1.5"),
        ("2", TypeError, "num_batches_tracked must be an integer, got '2'"),
    ],
)
def test_numbers_of_batches_that_are_none(batches, error, match):
    refuses("update_running_stats", error, match, num_batches_tracked=batches)


def test_an_empty_batch_changes_nothing():
    mean, var = np.full(3, 7.0), np.full(3, 5.0)
    empty = Moments(0, np.zeros(3), np.zeros(3))
    nbnorm.update_running_stats(mean, var, empty, num_batches_tracked=0)
    assert_array_equal((mean, var), ([7.0] * 3, [5.0] * 3))


# The layer


def debiasing(**options):
    return BatchNorm(3, debias=True, dtype=np.float64, **options)


def test_evaluation_uses_the_debiased_statistics():
    layer, xs = debiasing(momentum=0.1), [draw(seed) for seed in range(5)]
    for x in xs:
        layer.forward(x)
    *_, mean = adam([x.mean(axis=0) for x in xs], 0.1)
    *_, var = adam([x.var(axis=0, ddof=1) for x in xs], 0.1)
    assert_allclose(layer.running_mean, mean.astype(float), rtol=1e-14)
    assert_allclose(layer.running_var, var.astype(float), rtol=1e-14)
    y = layer.eval().forward(xs[0])
    assert_allclose(y, ((xs[0] - mean) / np.sqrt(var + 1e-5)).astype(float), rtol=1e-12, atol=1e-12)


def test_after_one_batch_the_statistics_are_that_batchs():
    layer, x = debiasing(correction=0), draw(1)
    layer.forward(x)
    assert_allclose(layer.running_mean, x.mean(axis=0), rtol=1e-14)
    assert_allclose(layer.running_var, x.var(axis=0), rtol=1e-14)


def test_empty_batches_and_evaluation_do_not_count():
    layer, other = debiasing(), debiasing()
    for x in (draw(1), draw(2)):
        layer.forward(x)
        other.forward(x)
        other.forward(x[:0])
        other.eval().forward(x + 5)
        other.train()
    assert_same_bits(other.running_mean, layer.running_mean)
    assert_same_bits(other.running_var, layer.running_var)


def test_the_state_needs_nothing_more():
    layer = debiasing()
    layer.forward(draw(1))
    loaded = debiasing()
    loaded.load_state_dict(layer.state_dict())
    assert list(layer.state_dict()) == list(BatchNorm(3).state_dict())
    twins = loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    layer.forward(draw(2))
    for twin in twins:
        twin.forward(draw(2))
        assert_same_bits(twin.running_mean, layer.running_mean)
        assert_same_bits(twin.running_var, layer.running_var)


def test_equal_weights_have_no_bias():
    layer, plain = debiasing(momentum=None), BatchNorm(3, momentum=None, dtype=np.float64)
    for seed in range(3):
        layer.forward(draw(seed))
        plain.forward(draw(seed))
    assert_same_bits(layer.running_mean, plain.running_mean)


def test_with_renorm_and_with_ranks():
    from nbnorm.distributed import SelfComm, SyncBatchNorm

    plain, renorm = debiasing(), debiasing(renorm=nbnorm.Renorm(3, 5))
    ranks = SyncBatchNorm(3, comm=SelfComm(), debias=True, dtype=np.float64)
    for seed in range(3):
        for layer in (plain, renorm, ranks):
            layer.forward(draw(seed))
    for layer in (renorm, ranks):
        assert_same_bits(layer.running_mean, plain.running_mean)
        assert_same_bits(layer.running_var, plain.running_var)


WEIGHTED = [{"momentum": None}, {"momentum": 0.3, "debias": True}]
weighted = pytest.mark.parametrize("options", WEIGHTED, ids=["equal", "debiased"])


def after(layer, weight, old, x):
    """Check that a batch moves the running mean from `old` with this weight."""
    layer.forward(x)
    expected = (1 - weight) * old + weight * x.mean(axis=0)
    assert_allclose(layer.running_mean, expected, rtol=1e-14)


@weighted
def test_statistics_that_were_set_are_not_forgotten(options):
    """They count as one batch, or as `num_batches_tracked` batches."""
    moments, x = nbnorm.batch_norm_stats(draw(1, (60, 3))), draw(2)
    for number in (None, 1, 5):
        layer = BatchNorm(3, dtype=np.float64, **options)
        layer.set_statistics(moments, num_batches_tracked=number)
        seen = number or 1
        assert layer.num_batches_tracked == seen
        weight = 1 / (seen + 1) if layer.momentum is None else debiased(0.3, seen)
        after(layer, weight, moments.mean, x)
        assert layer.num_batches_tracked == seen + 1


@weighted
def test_a_layer_that_has_seen_batches_keeps_their_number(options):
    layer = BatchNorm(3, dtype=np.float64, **options)
    for seed in range(4):
        layer.forward(draw(seed))
    with nbnorm.recalibrate(layer):
        layer.forward(draw(7))
    layer.set_statistics(nbnorm.batch_norm_stats(draw(5)))
    assert layer.num_batches_tracked == 4
    layer.set_statistics(nbnorm.batch_norm_stats(draw(5)), num_batches_tracked=0)
    after(layer, 1.0, np.zeros(3), draw(6))  # forgotten on request


@weighted
def test_recalibration_counts_its_batches(options):
    layer, xs = BatchNorm(3, dtype=np.float64, **options), [draw(seed) for seed in range(4)]
    with nbnorm.recalibrate(layer):
        for x in xs:
            layer.forward(x)
    assert layer.num_batches_tracked == 4
    weight = 1 / 5 if layer.momentum is None else debiased(0.3, 4)
    after(layer, weight, np.concatenate(xs).mean(axis=0), draw(9))


def test_a_number_of_batches_that_is_none_sets_nothing():
    layer, moments = debiasing(), nbnorm.batch_norm_stats(draw(1))
    for bad, error in ((-1, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match=f"num_batches_tracked must .* got {bad}"):
            layer.set_statistics(moments, num_batches_tracked=bad)
    assert_array_equal(layer.running_mean, np.zeros(3))
    assert layer.num_batches_tracked == 0


def test_an_ordinary_momentum_needs_no_number():
    layer, moments = BatchNorm(3, dtype=np.float64), nbnorm.batch_norm_stats(draw(1))
    layer.set_statistics(moments)
    assert layer.num_batches_tracked == 0
    after(layer, 0.1, moments.mean, draw(2))


def test_repr_names_it():
    assert "activation=None, debias=True, dtype=" in repr(BatchNorm(3, debias=True))


@pytest.mark.parametrize("framework", ["keras", "flax", "torch", "caffe"])
def test_other_frameworks_get_the_debiased_statistics(framework):
    """Their layers use the statistics as stored, and have no batch count to debias them with."""
    layer = debiasing(correction=0, axis=-1)
    for seed in range(3):
        layer.forward(draw(seed))
    arrays, options = conventions.dump(framework, layer)
    back = conventions.load(framework, arrays, axis=-1, **{
        name: value for name, value in options.items() if name != "axis"
    })  # fmt: skip
    assert not back.debias
    for name in ("running_mean", "running_var"):
        assert_allclose(getattr(back, name), getattr(layer, name), rtol=1e-6)


def test_the_bias_of_kerass_average_after_so_many_batches():
    """Keras's averages start at 0 and 1, of which momentum^t remains (docs/conventions.md)."""
    momentum, t, xs = 0.9, 5, [draw(seed) for seed in range(5)]
    mean, var = np.zeros(3), np.ones(3)
    for x in xs:
        mean, var = (
            momentum * old + (1 - momentum) * new
            for old, new in ((mean, x.mean(axis=0)), (var, x.var(axis=0)))
        )
    layer = debiasing(correction=0, momentum=0.1)
    for x in xs:
        layer.forward(x)
    left = momentum**t
    assert_allclose(layer.running_mean, mean / (1 - left), rtol=1e-12)
    assert_allclose(layer.running_var, (var - left) / (1 - left), rtol=1e-12)
