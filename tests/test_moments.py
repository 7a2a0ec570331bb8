"""Merging moments, and moving running statistics towards them."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from nbnorm import reference
from nbnorm.moments import Moments, rstd_of, update_running_stats

U = 2.0**-53  # unit roundoff of float64


def exact(x):
    """Return moments of the rows of x, in longdouble."""
    x = x.astype(np.longdouble)
    count = len(x)
    mean = x.sum(axis=0) / max(count, 1)
    return count, mean, ((x - mean) ** 2).sum(axis=0)


def moments(x):
    """Return moments of the rows of x, each rounded once to float64."""
    count, mean, m2 = exact(x)
    return Moments(count, mean.astype(np.float64), m2.astype(np.float64))


def draw(seed, rows, channels=3, offset=0.0, scale=1.0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, channels)) + offset) * scale


def assert_same_bits(comp, ref):
    assert comp.count == ref.count
    assert_array_equal(comp.mean, ref.mean)
    assert_array_equal(comp.m2, ref.m2)


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    channels=st.sampled_from([0, 1, 3]),
    offset=st.sampled_from([0.0, 1.0, -1e3, 1e6]),
    scale=st.sampled_from([1.0, 1e-25, 1e25]),
    seed=st.integers(0, 2**32 - 1),
)
def test_merged_chunks_have_the_moments_of_the_whole(lengths, channels, offset, scale, seed):
    x = draw(seed, sum(lengths), channels, offset, scale)
    ref_count, ref_mean, ref_m2 = exact(x)

    first, *rest = [moments(chunk) for chunk in np.split(x, np.cumsum(lengths)[:-1])]
    comp = first.merge(*rest)

    # Each given or merged mean has an error of at most `lost`. M2 includes d^2 n_a n_b / n, which
    # is at most M2, so an error of 2 lost in d costs at most 4 lost sqrt(M2 n).
    lost = (2 * len(lengths) + 1) * U * np.abs(x).max(axis=0, initial=0.0)
    assert comp.count == ref_count
    assert np.all(np.abs(comp.mean - ref_mean) <= lost)
    bound = 4 * lost * np.sqrt(ref_m2 * ref_count) + 4 * len(lengths) * U * ref_m2
    assert np.all(np.abs(comp.m2 - ref_m2) <= bound + 4 * ref_count * lost**2)


def test_merge_goes_in_the_order_given():
    a, b, c = (moments(draw(seed, rows)) for seed, rows in ((1, 7), (2, 5), (3, 11)))
    assert_same_bits(a.merge(b, c), a.merge(b).merge(c))
    assert not np.array_equal(a.merge(b, c).mean, a.merge(c, b).mean)  # the order changes bits


def test_merge_leaves_its_arguments_alone():
    a, b = moments(draw(1, 7)), moments(draw(2, 5))
    before = [array.copy() for array in (a.mean, a.m2, b.mean, b.m2)]
    merged = a.merge(b)
    alone = a.merge()
    merged.mean[...] = alone.mean[...] = alone.m2[...] = -1
    for array, was in zip((a.mean, a.m2, b.mean, b.m2), before, strict=True):
        assert_array_equal(array, was)


def test_empty_moments_change_nothing():
    empty = Moments(0, np.zeros(3), np.zeros(3))
    full = moments(draw(1, 7))
    for merged in (
        full.merge(empty),
        empty.merge(full),
        empty.merge(empty, full, empty),
        full.merge(),
    ):
        assert_same_bits(merged, full)
    assert_same_bits(empty.merge(empty), empty)


def test_empty_moments_have_no_variance_and_rstd_0():
    empty = Moments(0, np.zeros(3), np.zeros(3))
    for correction in (0, 1, 2):
        assert_array_equal(empty.var(correction), np.zeros(3))
    assert_array_equal(empty.rstd(1e-5), np.zeros(3))


def test_counts_beyond_int64_merge():
    big = Moments(2**62, np.array([1.0]), np.array([2.0**62]))
    other = Moments(2**62, np.array([3.0]), np.array([2.0**62]))
    merged = big.merge(other, other)
    assert merged.count == 3 * 2**62
    np.testing.assert_allclose(merged.mean, [7 / 3], rtol=4 * U)
    np.testing.assert_allclose(merged.var(), [1 + 8 / 9], rtol=8 * U)
    counted = Moments(np.int64(2**62), np.array([1.0]), np.array([2.0**62]))
    assert counted.merge(other, other).count == 3 * 2**62


def test_var_divides_by_count_less_correction():
    x = draw(5, 9)
    for correction in (0, 1, 2):
        np.testing.assert_allclose(
            moments(x).var(correction), x.var(axis=0, ddof=correction), rtol=16 * U
        )
    assert_array_equal(moments(x).var(), moments(x).var(0))
    with pytest.raises(ValueError, match="expected more than 1 value per channel when training"):
        moments(x[:1]).var(correction=1)
    with pytest.raises(ValueError, match="expected more than 2 values per channel when training"):
        moments(x[:2]).var(correction=2)


def test_rstd_is_of_the_biased_variance():
    x = draw(6, 9)
    np.testing.assert_allclose(
        moments(x).rstd(1e-3), 1 / np.sqrt(x.var(axis=0) + 1e-3), rtol=16 * U
    )


def test_rstd_of_nothing_is_0_and_of_nan_is_nan():
    var = np.array([0.0, np.nan, np.inf, 4.0, 5e-324])
    ref = np.array([0.0, np.nan, 0.0, 0.5, 1 / np.sqrt(5e-324)])
    assert_array_equal(rstd_of(var, 0.0), ref)
    assert rstd_of(var, 0.25)[0] == 2.0


@pytest.mark.parametrize("eps", [-1e-5, np.inf, np.nan])
def test_bad_eps_is_refused(eps):
    for call in (lambda: rstd_of(np.ones(2), eps), lambda: moments(draw(1, 4)).rstd(eps)):
        with pytest.raises(ValueError, match=f"eps must be finite and not negative, got {eps}"):
            call()


def test_nan_and_inf_stay_in_their_channel():
    x, bad = draw(1, 7, 4), draw(2, 5, 4)
    ref = moments(x).merge(moments(bad))
    sick = moments(bad)
    sick.mean[1], sick.m2[1] = np.nan, np.nan
    sick.mean[2], sick.m2[2] = np.inf, np.inf
    comp = sick.merge(sick, moments(x)), moments(x).merge(sick)
    assert_array_equal(comp[1].mean[[0, 3]], ref.mean[[0, 3]])
    assert_array_equal(comp[1].m2[[0, 3]], ref.m2[[0, 3]])
    for merged in comp:
        assert_array_equal(np.isfinite(merged.m2), [True, False, False, True])
        assert_array_equal(np.isfinite(merged.rstd(1e-5))[[0, 3]], [True, True])
        assert np.isnan(merged.rstd(1e-5)[1])


@pytest.mark.parametrize("where", ["self", "other", "m2"])
def test_shapes_that_differ_are_refused(where):
    three, four = np.zeros(3), np.zeros(4)
    pair = {
        "self": (Moments(2, four, four), Moments(2, three, three)),
        "other": (Moments(2, three, three), Moments(2, three, four)),
        "m2": (Moments(2, three, four), Moments(2, three, three)),
    }[where]
    with pytest.raises(ValueError, match=r"moments\.\w+ has shape \(\d,\), expected \(\d,\)"):
        pair[0].merge(pair[1])


def test_moments_of_wrong_types_are_refused():
    good = np.zeros(2)
    with pytest.raises(TypeError, match=r"moments\.mean has dtype int64"):
        Moments(2, np.zeros(2, np.int64), good).merge()
    with pytest.raises(TypeError, match=r"moments\.m2 must be a NumPy array"):
        Moments(2, good, [0.0, 0.0]).var()
    with pytest.raises(TypeError):
        Moments("2", good, good).var()
    with pytest.raises(TypeError):
        Moments(np.nan, good, good).var()
    with pytest.raises(ValueError, match=r"moments\.count must not be negative, got -1"):
        Moments(-1, good, good).merge()


def test_moments_of_other_libraries_merge_into_theirs():
    torch = pytest.importorskip("torch")
    parts = [moments(draw(seed, 5)) for seed in (1, 2)]
    ref = parts[0].merge(parts[1])
    tensors = [Moments(n, torch.from_numpy(mean), torch.from_numpy(m2)) for n, mean, m2 in parts]
    comp = tensors[0].merge(tensors[1])
    for name in ("mean", "m2"):
        assert isinstance(getattr(comp, name), torch.Tensor)
        assert_array_equal(getattr(comp, name).numpy(), getattr(ref, name))
    assert_array_equal(comp.var(1).numpy(), ref.var(1))
    assert_array_equal(comp.rstd(1e-5).numpy(), ref.rstd(1e-5))


# Running statistics

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]


def running(dtype_mean=np.float32, dtype_var=None):
    mean = np.array([0.25, -2.0, 3.0]).astype(dtype_mean)
    return mean, np.array([1.0, 0.5, 2.0]).astype(dtype_var or dtype_mean)


@pytest.mark.parametrize("dtype_var", DTYPES)
@pytest.mark.parametrize("dtype_mean", DTYPES)
@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, -0.5, 1.5])
def test_running_statistics_move_by_momentum(dtype_mean, dtype_var, correction, momentum):
    batch = moments(draw(3, 8, offset=2.0))
    mean, var = running(dtype_mean, dtype_var)
    batch_var = batch.m2 / (8 - correction)
    ref_mean = ((1 - momentum) * mean.astype(float) + momentum * batch.mean).astype(dtype_mean)
    ref_var = ((1 - momentum) * var.astype(float) + momentum * batch_var).astype(dtype_var)

    fresh = update_running_stats(
        mean, var, batch, momentum=momentum, correction=correction, inplace=False
    )
    assert_array_equal(mean, running(dtype_mean)[0])  # the given arrays are unchanged
    assert_array_equal(var, running(dtype_var)[1])
    own = update_running_stats(mean, var, batch, momentum=momentum, correction=correction)

    assert own[0] is mean
    assert own[1] is var
    for comp in (fresh, own):
        assert comp[0].dtype == dtype_mean
        assert comp[1].dtype == dtype_var
        assert_array_equal(comp[0], ref_mean)
        assert_array_equal(comp[1], ref_var)


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, -0.5])
def test_running_statistics_agree_with_the_oracle(momentum, correction):
    options = {"momentum": momentum, "correction": correction, "inplace": False}
    batch = moments(draw(3, 8, offset=2.0))
    mean, var = running(np.float64)
    ref = reference.update_running_stats(mean, var, batch, **options)
    for comp, expected in zip(update_running_stats(mean, var, batch, **options), ref, strict=True):
        np.testing.assert_allclose(comp, expected.astype(float), rtol=0, atol=16 * U)


def test_running_statistics_agree_with_torch():
    torch = pytest.importorskip("torch")
    x = draw(4, 12, offset=1.0)
    mean, var = running(np.float64)
    ref_mean, ref_var = torch.from_numpy(mean.copy()), torch.from_numpy(var.copy())
    torch.nn.functional.batch_norm(
        torch.from_numpy(x), ref_mean, ref_var, training=True, momentum=0.3
    )
    update_running_stats(mean, var, moments(x), momentum=0.3)
    np.testing.assert_allclose(mean, ref_mean.numpy(), rtol=16 * U)
    np.testing.assert_allclose(var, ref_var.numpy(), rtol=16 * U)


@pytest.mark.parametrize("inplace", [True, False])
def test_an_empty_batch_leaves_running_statistics_alone(inplace):
    mean, var = running()
    empty = Moments(0, np.zeros(3), np.zeros(3))
    comp = update_running_stats(mean, var, empty, momentum=1.0, inplace=inplace)
    for array, own, ref in zip(comp, (mean, var), running(), strict=True):
        assert (array is own) == inplace
        assert np.shares_memory(array, own) == inplace
        assert_array_equal(array, ref)


def test_strided_running_statistics_are_updated_in_place():
    table = np.zeros((3, 4), np.float32)
    batch = moments(draw(3, 8))
    ref_mean, ref_var = update_running_stats(table[:, 1], table[::-1, 2], batch, inplace=False)
    update_running_stats(table[:, 1], table[::-1, 2], batch)
    assert_array_equal(table[:, 1], ref_mean)
    assert_array_equal(table[::-1, 2], ref_var)
    assert_array_equal(table[:, [0, 3]], 0)


def test_nan_and_overflow_reach_running_statistics_without_warning():
    mean, var = running(np.float16)
    batch = Moments(4, np.array([np.nan, 1e300, 1.0]), np.array([np.inf, 1e300, 3.0]))
    update_running_stats(mean, var, batch, momentum=0.5)
    assert_array_equal(mean, np.array([np.nan, np.inf, 2.0], np.float16))
    assert_array_equal(var, np.array([np.inf, np.inf, 1.5], np.float16))


def refused(mean, var, batch, error, match, **options):
    """Call, expect the error, and check that both arrays are unchanged."""
    before = [np.array(array) for array in (mean, var)]
    with pytest.raises(error, match=match):
        update_running_stats(mean, var, batch, **options)
    assert_array_equal(mean, before[0])
    assert_array_equal(var, before[1])


def test_too_few_values_are_refused():
    match = "expected more than 1 value per channel when training, got 1"
    refused(*running(), moments(draw(1, 1)), ValueError, match)
    match = "expected more than 3 values per channel when training, got 3"
    refused(*running(), moments(draw(1, 3)), ValueError, match, correction=3)
    comp = update_running_stats(*running(), moments(draw(1, 1)), momentum=1.0, correction=0)
    assert_array_equal(comp[1], np.zeros(3))


def test_wrong_shapes_of_running_statistics_are_refused():
    mean, var = running()
    batch = moments(draw(1, 5))
    match = r"running_var has shape \(2,\), expected \(3,\)"
    refused(mean, var[:2], batch, ValueError, match)
    match = r"running_mean has shape \(3, 1\), expected \(3,\)"
    refused(mean[:, None], var, batch, ValueError, match)


def test_wrong_types_of_running_statistics_are_refused():
    mean, var = running()
    batch = moments(draw(1, 5))
    refused(mean, var.astype(np.int32), batch, TypeError, "running_var has dtype int32")
    refused(mean.tolist(), var, batch, TypeError, "running_mean must be a NumPy array")
    refused(mean, np.ma.masked_array(var), batch, TypeError, "running_var is a masked array")


def test_momentum_and_correction_that_are_no_numbers_are_refused():
    batch = moments(draw(1, 5))
    refused(*running(), batch, TypeError, "momentum must be a real number", momentum=None)
    refused(*running(), batch, TypeError, "correction must be a real number", correction=None)
    refused(*running(), batch, ValueError, "correction must be finite", correction=np.nan)


def test_read_only_running_statistics_are_refused_in_place():
    mean, var = running()
    batch = moments(draw(1, 5))
    var.flags.writeable = False
    refused(mean, var, batch, ValueError, "running_var is read-only.*inplace=False")
    comp = update_running_stats(mean, var, batch, inplace=False)
    assert_array_equal(comp, update_running_stats(mean, var.copy(), batch, inplace=False))
    assert comp[1].flags.writeable


def test_running_statistics_of_torch_are_updated_through_their_memory():
    torch = pytest.importorskip("torch")
    batch = moments(draw(3, 8))
    ref_mean, ref_var = update_running_stats(*running(), batch, inplace=False)
    mean, var = (torch.from_numpy(array) for array in running())
    fresh = update_running_stats(mean, var, batch, inplace=False)
    assert_array_equal(mean.numpy(), running()[0])
    comp = update_running_stats(mean, var, batch)
    assert comp[0] is mean
    assert comp[1] is var
    for pair in (comp, fresh):
        assert all(isinstance(array, torch.Tensor) for array in pair)
        assert_array_equal(pair[0].numpy(), ref_mean)
        assert_array_equal(pair[1].numpy(), ref_var)
    with pytest.raises(TypeError, match="running_mean is a tensor that requires grad"):
        update_running_stats(mean.requires_grad_(), var, batch)


def test_running_statistics_of_jax_are_read_only():
    jnp = pytest.importorskip("jax.numpy")
    batch = moments(draw(3, 8))
    ref = update_running_stats(*running(), batch, inplace=False)
    mean, var = (jnp.asarray(array) for array in running())
    with pytest.raises(ValueError, match=r"running_mean is read-only.*inplace=False"):
        update_running_stats(mean, var, batch)
    comp = update_running_stats(mean, var, batch, inplace=False)
    for array, expected in zip(comp, ref, strict=True):
        assert isinstance(array, type(mean))
        assert_array_equal(np.asarray(array), expected)


def test_running_statistics_of_the_array_api():
    xp = pytest.importorskip("array_api_strict")
    batch = moments(draw(3, 8))
    ref = update_running_stats(*running(), batch, inplace=False)
    own = [xp.asarray(array) for array in running()]
    comp = update_running_stats(*own, batch)
    for array, was, expected in zip(comp, own, ref, strict=True):
        assert array is was
        assert_array_equal(np.from_dlpack(array), expected)


def test_running_statistics_of_one_memory_cannot_be_updated_in_place():
    moments = Moments(3, np.full(4, 2.0), np.ones(4))
    both = np.ones(4, np.float32)
    with pytest.raises(ValueError, match="share memory"):
        update_running_stats(both, both, moments)
    assert (both == 1).all()
    update_running_stats(both, both, moments, inplace=False)
