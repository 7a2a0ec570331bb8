"""Integer input: exact statistics, and normalisation without a floating-point copy."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import tolerances
from hypothesis import given
from hypothesis import strategies as st

import nbnorm
from nbnorm import reference
from nbnorm.cpu import integers
from nbnorm.population import population_stats

DTYPES = ("uint8", "int8", "uint16", "int16")
# Rows and columns, folded and not, in one chunk and several, in one thread and more.
SHAPES = [
    ((3, 2), 1),
    ((40, 3, 5, 7), 1),
    ((40, 5, 7, 3), -1),
    ((2, 3, 40, 50), 1),
    ((3, 40, 50, 3), -1),
    ((700, 300), 1),
    ((5, 70, 14, 14), 1),
    ((2, 3, 400, 700), 1),
    ((2, 400, 700, 3), -1),
    ((4, 60, 3, 20), (1, 3)),
]


def drawn(shape, dtype, seed=0, *, least=None, most=None):
    limits = np.iinfo(dtype)
    least, most = limits.min if least is None else least, limits.max if most is None else most
    return np.random.default_rng(seed).integers(least, most, shape, dtype, endpoint=True)


def exact(x, axis):
    """Return the count, the channels' shape, and each channel's mean and M2 as fractions."""
    axes = [i % x.ndim for i in np.atleast_1d(axis)]
    rows = np.moveaxis(x, axes, range(len(axes)))
    channels = rows.shape[: len(axes)]
    rows = rows.reshape(int(np.prod(channels)), -1).astype(np.int64)
    m, s = rows.shape[1], [int(v) for v in rows.sum(1)]
    q = [int(v) for v in (rows * rows).sum(1)]
    means = [Fraction(a, m) for a in s]
    return m, channels, means, [b - Fraction(a * a, m) for a, b in zip(s, q, strict=True)]


def assert_exact(moments, x, axis):
    count, channels, means, m2s = exact(x, axis)
    assert moments.count == count
    assert type(moments.count) is int
    assert moments.mean.shape == moments.m2.shape == channels
    assert moments.mean.dtype == moments.m2.dtype == np.float64
    assert moments.mean.ravel().tolist() == [float(mean) for mean in means]
    # Three roundings, of which one is of a term of at most a third of the result.
    for found, m2 in zip(moments.m2.ravel().tolist(), m2s, strict=True):
        assert abs(Fraction(found) - m2) <= 2 * m2 * Fraction(2) ** -52


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_statistics_are_exact(shape, axis, dtype):
    x = drawn(shape, dtype)
    assert_exact(nbnorm.batch_norm_stats(x, axis=axis), x, axis)
    expected = reference.batch_norm_stats(x, axis=axis)
    np.testing.assert_allclose(nbnorm.batch_norm_stats(x, axis=axis).m2, expected.m2, rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", ["min", "max"])
@pytest.mark.parametrize("shape", [(3, 2, 300, 300), (40_000, 5)])
def test_extremes_and_constants(shape, dtype, value):
    """No sum overflows, and the variance of a constant is 0."""
    x = np.full(shape, getattr(np.iinfo(dtype), value), dtype)
    moments = nbnorm.batch_norm_stats(x)
    assert (moments.mean == x.flat[0]).all()
    assert (moments.m2 == 0).all()
    x.reshape(-1)[::2] = np.iinfo(dtype).min
    assert_exact(nbnorm.batch_norm_stats(x), x, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_small_variance_far_from_zero_keeps_its_digits(dtype):
    limits = np.iinfo(dtype)
    x = drawn((2, 3, 200, 300), dtype, least=limits.max - 1)
    x[0, 0] = limits.max
    x[1, 0] = limits.max
    x[1, 0, 0, 0] -= 1
    assert_exact(nbnorm.batch_norm_stats(x), x, 1)


def test_squares_whose_sum_int64_cannot_hold():
    partial = np.full((2, 8, 1), 2**30, np.int64)  # eight chunks of 2^30 values, all the same
    partial *= np.array([65535, 65535**2]).reshape(2, 1, 1)
    mean, m2 = integers.moments(partial, 2**33)
    assert (mean, m2) == (65535, 0)
    partial[:, ::2] = 0
    mean, m2 = integers.moments(partial, 2**33)
    assert (mean, m2) == (32767.5, 2**33 * 32767.5**2)


def test_more_integers_than_a_sum_can_hold():
    x = np.broadcast_to(np.uint8(1), (2**33 + 1, 1))
    with pytest.raises(
        ValueError, match=r"x has 8589934593 integers per channel, expected at most"
    ):
        nbnorm.batch_norm_stats(x)


@pytest.mark.slow  # kernels for four dtypes and any strides
@given(
    st.sampled_from(DTYPES),
    st.lists(st.integers(1, 12), min_size=2, max_size=4),
    st.integers(0, 3),
    st.integers(0, 99),
    st.sampled_from(["C", "F", "gaps", "read-only", "reversed"]),
)
def test_any_layout(dtype, shape, axis, seed, layout):
    axis %= len(shape)
    x = laid_out(drawn(shape, dtype, seed), layout)
    assert_exact(nbnorm.batch_norm_stats(x, axis=axis), x, axis)
    check_inference(x, axis, None, seed)


def laid_out(x, layout):
    if layout == "F":
        return np.asfortranarray(x)
    if layout == "gaps":
        spaced = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
        spaced[..., ::2] = x
        return spaced[..., ::2]
    if layout == "reversed":
        return x[::-1]
    if layout == "read-only":
        x.flags.writeable = False
    return x


def check_inference(x, axis, dtype, seed=0, **options):
    """Compare with the float64 reference, and bit for bit with converted x."""
    rng = np.random.default_rng(seed)
    channels = tuple(x.shape[i] for i in np.atleast_1d(axis))
    gamma, beta = rng.uniform(0.5, 2, channels), rng.normal(size=channels)
    limits = np.iinfo(x.dtype)
    mean = rng.uniform(limits.min, limits.max, channels)
    var = rng.uniform(1, 2.0**x.itemsize, channels) ** 2
    arguments = gamma, beta, mean, var
    y = nbnorm.batch_norm_inference(x, *arguments, axis=axis, dtype=dtype, **options)
    expected_dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype or "f4")
    assert y.dtype == expected_dtype
    assert y.shape == x.shape
    expected = reference.batch_norm_inference(x, *arguments, axis=axis, **options)
    narrow = np.float64 if dtype == "float64" else np.float32
    same = nbnorm.batch_norm_inference(x.astype(narrow), *arguments, axis=axis, **options)
    if dtype in (None, "float32", "float64"):
        np.testing.assert_array_equal(y, same)  # the arithmetic is that of the converted x
    else:
        np.testing.assert_array_equal(y, same.astype(expected_dtype))
    rstd = 1 / np.sqrt(var + 1e-5)
    if not options:
        tolerance = tolerances.y_tolerance(x.astype(narrow), gamma, beta, mean, rstd, axis=axis)
        tolerance = tolerances.stored(tolerance, expected, expected_dtype)
        tolerances.assert_within(y, expected, tolerance, "y")
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_inference(shape, axis, dtype):
    check_inference(drawn(shape, dtype), axis, None)


@pytest.mark.slow  # kernels for sixteen pairs of dtypes
@pytest.mark.parametrize("result", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_of_the_result(dtype, result):
    check_inference(drawn((4, 20, 30, 3), dtype), -1, result)
    check_inference(drawn((2, 3, 20, 30), dtype), 1, result)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_activations(activation):
    check_inference(drawn((4, 20, 30, 3), "uint8"), -1, None, activation=activation)


def test_results_past_the_cache_are_the_same():
    """With streaming stores and threads, every image equals the result of a call on it alone."""
    x = drawn((200, 64, 64, 48), "uint8")
    statistics = np.linspace(0, 255, 48), np.linspace(1, 5000, 48)
    y = nbnorm.batch_norm_inference(x, None, None, *statistics, axis=-1)
    for i in (0, 99, 199):
        alone = nbnorm.batch_norm_inference(x[i : i + 1], None, None, *statistics, axis=-1)
        np.testing.assert_array_equal(y[i : i + 1], alone)


def test_bits_do_not_depend_on_threads(thread_count):
    import numba

    x = drawn((8, 200, 200, 3), "uint8")
    statistics = np.full(3, 99.0), np.full(3, 2000.0)
    found = []
    for threads in range(1, thread_count + 1):
        numba.set_num_threads(threads)
        moments = nbnorm.batch_norm_stats(x, axis=-1)
        y = nbnorm.batch_norm_inference(x, None, None, *statistics, axis=-1)
        found.append((moments.mean.tobytes(), moments.m2.tobytes(), y.tobytes()))
    assert len(set(found)) == 1


def test_order_of_memory_is_kept():
    x = drawn((4, 3, 20, 30), "uint8").transpose(0, 2, 3, 1)
    y = nbnorm.batch_norm_inference(x, None, None, np.zeros(3), np.ones(3), axis=-1)
    assert [s // 4 for s in y.strides] == list(x.strides)


@pytest.mark.parametrize("result", ["float32", "float64", "float16"])
def test_out(result):
    x = drawn((2, 3, 8, 8), "uint8")
    out = np.empty(x.shape, result)
    statistics = np.full(3, 100.0), np.full(3, 50.0)
    assert nbnorm.batch_norm_inference(x, None, None, *statistics, out=out) is out
    expected = nbnorm.batch_norm_inference(x, None, None, *statistics, dtype=result)
    np.testing.assert_array_equal(out, expected)


def test_empty():
    x = np.empty((0, 3), np.uint8)
    assert nbnorm.batch_norm_stats(x).count == 0
    y = nbnorm.batch_norm_inference(x, None, None, np.zeros(3), np.ones(3))
    assert (y.shape, y.dtype) == ((0, 3), np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_population(dtype):
    x = drawn((50, 20, 30, 3), dtype)
    whole = population_stats(x, axis=-1, chunk=20_000)
    count, _, means, m2s = exact(x, -1)
    assert whole.count == count
    np.testing.assert_allclose(whole.mean, [float(v) for v in means], rtol=1e-15)
    np.testing.assert_allclose(whole.m2, [float(v) for v in m2s], rtol=1e-14)
    batches = population_stats((x[i : i + 10] for i in range(0, 50, 10)), axis=-1)
    np.testing.assert_allclose(batches.m2, whole.m2, rtol=1e-14)


X = np.zeros((4, 3), np.uint8)
STATISTICS = np.zeros(3), np.ones(3)
OUT = np.full((4, 3), 7.0, np.float32)


def infer(**options):
    return nbnorm.batch_norm_inference(X, None, None, *STATISTICS, **options)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: nbnorm.batch_norm_forward(X),
            TypeError,
            r"x has dtype uint8, .*x\.astype\(np\.float32\); batch_norm_stats and .* take integers",
        ),
        (
            lambda: nbnorm.batch_norm_apply(X, None, None, *STATISTICS),
            TypeError,
            "x has dtype uint8",
        ),
        (lambda: nbnorm.batch_norm_stats(X.astype(np.int32)), TypeError, "x has dtype int32"),
        (lambda: nbnorm.batch_norm_stats(X.astype(bool)), TypeError, "x has dtype bool"),
        (
            lambda: nbnorm.batch_norm_stats(X, mask=X > 0),
            TypeError,
            "mask must be None if x has dtype uint8; convert x first, with x.astype",
        ),
        (lambda: nbnorm.batch_norm_stats(X, groups=2), TypeError, "groups must be None if x has"),
        (
            lambda: infer(residual=OUT, out=OUT),
            TypeError,
            "residual must be None if x has dtype uint8",
        ),
        (
            lambda: infer(dtype="int8", out=OUT),
            TypeError,
            "dtype is int8, expected one of",
        ),
        (lambda: infer(dtype="colour"), TypeError, "dtype must be one of float32, .*'colour'"),
        (
            lambda: infer(dtype="float64", out=OUT),
            ValueError,
            "out has dtype float32, expected float64, the dtype of the result",
        ),
        (
            lambda: infer(out=np.zeros_like(X)),
            TypeError,
            "out is uint8, expected one of float32",
        ),
        (
            lambda: nbnorm.batch_norm_inference(OUT, None, None, *STATISTICS, dtype=np.float64),
            ValueError,
            "dtype is float64, expected float32, the dtype of x",
        ),
    ],
)
def test_what_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()
    assert (OUT == 7).all()


def test_dtype_may_be_that_of_floating_x():
    y = nbnorm.batch_norm_inference(OUT, None, None, *STATISTICS, dtype=np.float32)
    np.testing.assert_array_equal(y, nbnorm.batch_norm_inference(OUT, None, None, *STATISTICS))
