"""Results stored past the cache: the bits of ordinary stores, within the array's bounds.

Only tensors of tens of megabytes exceed real caches; here the library assumes tiny caches.
"""

from itertools import product

import numba
import numpy as np
import pytest
from children import run_child
from strategies import BFLOAT16, lay_out
from tolerances import assert_same_bits

import nbnorm
from nbnorm import _shortcut, cpu
from nbnorm.cpu.caches import Caches
from nbnorm.cpu.plan import plan

DTYPES = ("float32", "float64", "float16", BFLOAT16)
# Rows shorter, longer and much longer than a line; rows of whole lines or not; several samples in a
# row of columns, and a last row of one; planes that are normalised one by one if not streamed;
# parallel and serial.
SHAPES = (
    *((3, 4, 20, 20), (2, 3, 48, 100), (20, 6, 14, 14), (70, 5, 7, 7)),
    *((40, 64), (40, 300), (300, 3), (2, 2600), (9, 1), (257, 1), (86, 3), (2000, 33)),
)
SENTINEL = 77

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def streaming(monkeypatch):
    """Return a function that sets how later calls store."""

    def stream(wanted):
        last = 0 if wanted else 1 << 40
        monkeypatch.setattr(cpu, "_CACHES", Caches(own=1 << 20, last=last))
        monkeypatch.setattr(_shortcut, "_site", lambda *where: None)  # small calls never stream

    return stream


def drawn(shape, dtype, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


class Guarded:
    """Memory for a result that starts `offset` values after a line, between sentinels."""

    def __init__(self, shape, dtype, offset):
        size, itemsize = int(np.prod(shape)), np.dtype(dtype).itemsize
        self._all = np.full(size + 3 * 64, SENTINEL, dtype)
        self._first = (-self._all.ctypes.data % 64) // itemsize + 64 + offset
        self._last = self._first + size
        self.array = self._all[self._first : self._last].reshape(shape)

    def assert_kept(self):
        outside = np.concatenate([self._all[: self._first], self._all[self._last :]])
        np.testing.assert_array_equal(outside.astype(float), SENTINEL)


@shapes
@dtypes
def test_forward_streams_the_same_bits_to_any_address(shape, dtype, streaming):
    x, residual = drawn(shape, dtype, 0), drawn(shape, dtype, 1)
    gamma, beta = drawn(shape[1], "float32", 2), drawn(shape[1], "float32", 3)
    for options in ({}, {"residual": residual, "activation": "relu"}):
        streaming(False)
        expected = nbnorm.batch_norm_forward(x, gamma, beta, **options)
        streaming(True)
        fresh = nbnorm.batch_norm_forward(x, gamma, beta, **options)
        assert_same_bits(fresh.y, expected.y, "fresh y")
        for offset in (0, 1, 7, 8, 31):
            out = Guarded(shape, dtype, offset)
            nbnorm.batch_norm_forward(x, gamma, beta, out=out.array, **options)
            assert_same_bits(out.array, expected.y, f"y at offset {offset}")
            out.assert_kept()


@shapes
@dtypes
def test_backward_streams_the_same_bits_to_any_address(shape, dtype, streaming):
    x, dy, y = (drawn(shape, dtype, seed) for seed in range(3))
    gamma = drawn(shape[1], "float32", 3)
    mean, rstd = drawn(shape[1], "float64", 4), np.ones(shape[1])
    for training, with_y in product((True, False), repeat=2):
        options = {"y": y, "activation": "relu"} if with_y else {}
        streaming(False)
        expected = nbnorm.batch_norm_backward(
            dy, x, gamma, mean, rstd, training=training, **options
        )
        streaming(True)
        # With an odd offset, dx and dresidual start at different places in a line.
        for offset in (0, 1, 8):
            out = Guarded(shape, dtype, offset)
            got = nbnorm.batch_norm_backward(
                dy, x, gamma, mean, rstd, training=training, out=out.array, **options
            )
            assert_same_bits(got.dx, expected.dx, f"dx at offset {offset}")
            if with_y:
                assert_same_bits(got.dresidual, expected.dresidual, "dresidual")
            out.assert_kept()


@shapes
def test_streaming_works_in_place(shape, streaming):
    x, dy = drawn(shape, "float32", 0), drawn(shape, "float32", 1)
    streaming(False)
    y, mean, rstd = nbnorm.batch_norm_forward(x)
    dx = nbnorm.batch_norm_backward(dy, x, None, mean, rstd).dx
    streaming(True)
    nbnorm.batch_norm_backward(dy, x, None, mean, rstd, out=dy)
    assert_same_bits(dy, dx, "dx")
    nbnorm.batch_norm_forward(x, out=x)
    assert_same_bits(x, y, "y")


@pytest.mark.parametrize("gap", ["x", "dy", "y", "residual", "out"])
@pytest.mark.parametrize("shape", [(20, 6, 14, 14), (6, 2600), (40, 300)], ids=str)
def test_rows_with_gaps_stream_the_same_bits(shape, gap, streaming):
    """A row's last line also holds the first values of an adjacent row; here there is a gap."""
    wide = (2 * shape[0], *shape[1:])
    every = {name: drawn(wide, "float32", i) for i, name in enumerate(("x", "dy", "y", "residual"))}
    arrays = {n: a[::2] if n == gap else a[::2].copy() for n, a in every.items()}
    x, dy, y, residual = arrays.values()
    relu = {"activation": "relu"}

    def forward(**out):
        return nbnorm.batch_norm_forward(x, residual=residual, **relu, **out)

    def backward(**out):
        one = np.ones(shape[1])
        return nbnorm.batch_norm_backward(dy, x, None, 0 * one, one, y=y, **relu, **out)

    streaming(False)
    expected = forward().y, backward().dx
    streaming(True)
    for offset in (0, 1, 8):
        for passed, want in zip((forward, backward), expected, strict=True):
            out = Guarded(wide if gap == "out" else shape, "float32", offset)
            result = out.array[::2] if gap == "out" else out.array
            passed(out=result)
            assert_same_bits(result, want, f"{passed.__name__} at offset {offset}")
            if gap == "out":
                assert (out.array[1::2] == SENTINEL).all()
            out.assert_kept()


@pytest.mark.slow  # compiles kernels that few other tests use
@pytest.mark.parametrize("kind", ["samples", "values", "weights"])
@shapes
def test_what_counts_streams_the_same_bits(shape, kind, streaming):
    """A row takes over the first values of the next one only if both have the same weight."""
    x, dy, gamma = drawn(shape, "float32", 0), drawn(shape, "float32", 1), np.ones(shape[1])
    rng, alike = np.random.default_rng(2), (shape[0], *[1] * (len(shape) - 1))
    weights = rng.integers(0, 3, shape if kind == "values" else alike)
    weights[:2] = 1
    given = {"weights": weights.astype("float32")} if kind == "weights" else {"mask": weights > 0}
    streaming(False)
    expected = nbnorm.batch_norm_forward(x, gamma, fill=3, **given)
    statistics = gamma, expected.mean, expected.rstd
    dx = nbnorm.batch_norm_backward(dy, x, *statistics, **given).dx
    streaming(True)
    for offset in (0, 1, 8):
        out = Guarded(shape, "float32", offset)
        nbnorm.batch_norm_forward(x, gamma, fill=3, out=out.array, **given)
        assert_same_bits(out.array, expected.y, f"y at offset {offset}")
        nbnorm.batch_norm_backward(dy, x, *statistics, out=out.array, **given)
        assert_same_bits(out.array, dx, f"dx at offset {offset}")
        out.assert_kept()
    gaps = Guarded((2 * shape[0], *shape[1:]), "float32", 1)
    nbnorm.batch_norm_forward(x, gamma, fill=3, out=gaps.array[::2], **given)
    assert_same_bits(gaps.array[::2], expected.y, "y with gaps")
    nbnorm.batch_norm_backward(dy, x, *statistics, out=gaps.array[::2], **given)
    assert_same_bits(gaps.array[::2], dx, "dx with gaps")
    assert (gaps.array[1::2] == SENTINEL).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("channels", [1024, 96, 7])
def test_short_planes_stream_by_themselves_and_in_rows(channels, threads, streaming, thread_count):
    shape = (2, channels, 14, 14)
    x, dy = drawn(shape, "float32", 0), drawn(shape, "float32", 1)
    gamma, beta, mean = (drawn(channels, "float32", seed) for seed in (2, 3, 4))
    rstd = np.ones(channels)
    numba.set_num_threads(min(threads, thread_count))
    streaming(False)
    y = nbnorm.batch_norm_inference(x, gamma, beta, mean, rstd)
    dx = nbnorm.batch_norm_backward(dy, x, gamma, mean, rstd, training=False).dx
    streaming(True)
    for offset in (0, 4):
        out = Guarded(shape, "float32", offset)
        nbnorm.batch_norm_inference(x, gamma, beta, mean, rstd, out=out.array)
        assert_same_bits(out.array, y, "y")
        nbnorm.batch_norm_backward(dy, x, gamma, mean, rstd, training=False, out=out.array)
        assert_same_bits(out.array, dx, "dx")
        out.assert_kept()


def test_shared_passes_and_threads_stream_too(streaming):
    few = drawn((3, 1, 300, 400), "float32", 0)
    last = np.moveaxis(drawn((2, 300, 400, 3), "float32", 0), -1, 1)
    for array in (few, last):
        cut = plan(array.shape[0], array.shape[1], 120_000, 4, 2, Caches(1 << 20, 0), 2)
        assert cut.parallel
        assert not cut.fused or array is last
        streaming(False)
        expected = nbnorm.batch_norm_forward(array)
        streaming(True)
        assert_same_bits(nbnorm.batch_norm_forward(array).y, expected.y, "y")


@pytest.mark.parametrize("shape", [(3, 4, 20, 20), (40, 64)], ids=str)
def test_unaligned_results_are_not_streamed_to(shape, streaming):
    """A vector store past the cache must be aligned, or the program crashes."""
    x = drawn(shape, "float32", 0)
    expected = nbnorm.batch_norm_forward(x)
    streaming(True)
    out = lay_out(np.zeros_like(x), "unaligned")
    nbnorm.batch_norm_forward(x, out=out)
    assert_same_bits(out, expected.y, "y")
    nbnorm.batch_norm_backward(x, x, None, expected.mean, expected.rstd, out=out)
    wanted = nbnorm.batch_norm_backward(x, x, None, expected.mean, expected.rstd).dx
    assert_same_bits(out, wanted, "dx")


STORES = """
import numpy as np, nbnorm
from nbnorm.cpu import kernels
for shape in ((3, 4, 20, 20), (40, 64)):
    x = np.ones(shape, "float32")
    axis = (1,)  # with axis=1 small calls do not use these kernels
    y, mean, rstd = nbnorm.batch_norm_forward(x, axis=axis)
    nbnorm.batch_norm_backward(x, x, None, mean, rstd, y=y, axis=axis, activation="relu")
for traversal in (kernels.rows, kernels.columns):
    for kernel in (traversal.forward, traversal.backward):
        (code,) = kernel.inspect_asm().values()
        (ir,) = kernel.inspect_llvm().values()
        lines = code.splitlines()
        stores = {line.split()[0] for line in lines if "movnt" in line}
        print("fence seq_cst" in ir, "vfmadd" in code, *stores)
"""


@pytest.mark.slow
def test_kernels_hold_streaming_stores_of_whole_vectors_and_a_fence(tmp_path):
    """Scalar stores would take ten times as long, which tests of values cannot show.

    Nor would they show a missing fence, without which another thread may read stale values.
    """
    # Code loaded from a cache cannot be inspected.
    printed = run_child("-c", STORES, NUMBA_CACHE_DIR=str(tmp_path))
    for line in printed.splitlines():
        fenced, multiplies_and_adds, *stores = line.split()
        assert fenced == "True"
        if multiplies_and_adds != "True":
            pytest.skip("the processor is not an x86 with fused multiply-add")
        assert stores
        assert set(stores) <= {"vmovntps", "vmovntpd", "vmovntdq"}
