"""float16 and bfloat16: every bit pattern is widened and rounded as IEEE 754 requires."""

import numba
import numpy as np
import pytest
from strategies import BFLOAT16, dtype_of
from tolerances import assert_same_bits

import nbnorm
from nbnorm.cpu.storage import load, store

HALVES = ("float16", "bfloat16")
CARRIERS = {"float16": np.uint16, "bfloat16": np.int16}
PATTERNS = np.arange(1 << 16, dtype=np.uint16)


@numba.njit
def widen(bits, out):
    for j in range(bits.size):
        out[j] = load(bits, j)


@numba.njit
def narrow(values, out):
    for j in range(values.size):
        store(out, j, values[j])


def patterns(dtype):
    """Return all 65,536 bit patterns."""
    return PATTERNS.view(dtype_of(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_every_pattern_widened(dtype):
    out = np.empty(1 << 16, np.float32)
    widen(PATTERNS.view(CARRIERS[dtype]), out)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        expected = patterns(dtype).astype(np.float32)
    number = ~np.isnan(expected)
    assert np.isnan(out[~number]).all()
    assert_same_bits(out[number], expected[number])


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_at_between_and_beside_every_pattern(dtype):
    with np.errstate(invalid="ignore"):
        halves = patterns(dtype).astype(np.float32)
    halves = np.sort(halves[np.isfinite(halves)])
    ties = (halves[1:] / 2 + halves[:-1] / 2).astype(np.float32)
    step = np.float32(3.4e38 if dtype == "bfloat16" else 65520)  # from here on Inf is the nearest
    values = np.concatenate([halves, ties, [step, -step, np.inf, -np.inf, np.nan, -0.0, 1e-45]])
    values = values.astype(np.float32)
    with np.errstate(over="ignore"):
        values = np.concatenate([values, np.nextafter(values, np.float32(np.inf)),
                                 np.nextafter(values, np.float32(-np.inf))])  # fmt: skip
        expected = values.astype(dtype_of(dtype))
    out = np.empty(values.size, CARRIERS[dtype])
    narrow(values, out)
    out = out.view(dtype_of(dtype))
    number = ~np.isnan(values)
    assert np.isnan(out[~number].astype(np.float32)).all()
    assert_same_bits(out[number].view(np.uint16), expected[number].view(np.uint16))


def test_a_nan_of_any_payload_stays_one_in_bfloat16():
    bits = np.array([0x7F800001, 0x7FFFFFFF, 0x7F80FFFF], np.uint32)
    values = np.concatenate([bits, bits | np.uint32(1 << 31)]).view(np.float32)
    out = np.empty(values.size, np.int16)
    narrow(values, out)
    assert np.isnan(out.view(BFLOAT16).astype(np.float32)).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(1 << 16, 1), (256, 256), (1, 2, 1 << 15), (4, 1 << 10, 16)])
def test_the_identity_gives_every_pattern_back(dtype, shape):
    x = patterns(dtype).reshape(shape)
    zeros, ones = np.zeros(shape[1]), np.ones(shape[1])
    y = nbnorm.batch_norm_apply(x, None, None, zeros, ones)
    assert y.dtype == x.dtype
    wide = x.astype(np.float32)
    number = ~np.isnan(wide)
    assert np.isnan(y.astype(np.float32)[~number]).all()
    np.testing.assert_array_equal(y.astype(np.float32)[number], wide[number])


@pytest.mark.cpu_only  # a GPU reads more halves than floats at a time, and sums in another order
@pytest.mark.parametrize("dtype", HALVES)
def test_results_are_those_of_float32_rounded_once(dtype):
    rng = np.random.default_rng(0)
    for shape in ((8, 6, 20, 20), (8, 6, 7, 7), (300, 6)):
        x, dy, residual = (rng.normal(size=shape).astype(dtype_of(dtype)) for _ in range(3))
        wide = [a.astype(np.float32) for a in (x, dy, residual)]
        got = nbnorm.batch_norm_forward(x, residual=residual, activation="relu")
        ref = nbnorm.batch_norm_forward(wide[0], residual=wide[2], activation="relu")
        assert_same_bits(got.mean, ref.mean)
        assert_same_bits(got.y, ref.y.astype(x.dtype))
        options = {"y": got.y, "activation": "relu"}
        got_grads = nbnorm.batch_norm_backward(dy, x, None, got.mean, got.rstd, **options)
        options["y"] = got.y.astype(np.float32)
        grads = nbnorm.batch_norm_backward(wide[1], wide[0], None, ref.mean, ref.rstd, **options)
        for a, b in zip(got_grads, grads, strict=True):
            assert_same_bits(a, b.astype(x.dtype))


@pytest.mark.slow  # compiles kernels for float64 parameters
@pytest.mark.parametrize("shape", [(6, 1), (2, 1, 30, 30)], ids=["columns", "rows"])
@pytest.mark.parametrize("dtype", HALVES)
def test_relu_stops_what_is_too_small_to_be_stored(dtype, shape):
    """Backward recomputes the mask y > 0 with the y that forward stored."""
    least = {"float16": 2.0**-24, "bfloat16": 2.0**-133}[dtype]
    x = np.resize(np.array([-1, 1, 2, 3, 4, 5], dtype_of(dtype)), shape)
    gamma, mean, rstd = np.array([least / 4]), np.zeros(1), np.ones(1)
    y = nbnorm.batch_norm_apply(x, gamma, None, mean, rstd, activation="relu")
    stored = np.count_nonzero(y > 0)
    assert stored == x.size // 2  # half of the least number is a tie, which rounds to 0
    options = {"gamma": gamma, "activation": "relu"}
    for mask in ({"beta": None}, {"y": y}):
        sums = nbnorm.batch_norm_backward_reduce(np.ones_like(x), x, mean, rstd, **options, **mask)
        assert sums[0] == stored
    got = nbnorm.batch_norm_backward(
        np.ones_like(x), x, gamma, mean, rstd, training=False, activation="relu", beta=np.zeros(1)
    )
    assert got.dbeta == stored
