"""Statistics of data in pieces equal those of the whole; layers can use them."""

import copy
import math
import sys
import weakref
from itertools import pairwise, product

import ml_dtypes
import numpy as np
import pytest
from children import run_child
from hypothesis import given
from hypothesis import strategies as st
from strategies import BFLOAT16, lay_out, shapes_and_axes
from tolerances import (
    assert_same_bits,
    assert_within,
    channels_of,
    m2_tolerance,
    mean_tolerance,
    merge_tolerance,
)

import nbnorm
from nbnorm import BatchNorm, Moments, batch_norm_stats, population, reference
from nbnorm._pairwise import Pairwise
from nbnorm.population import population_stats, recalibrate

U = 2.0**-53  # unit roundoff of float64
DTYPES = ("float32", "float64", "float16", BFLOAT16)
CASES = (
    *(((41, 3, 5, 6), 1), ((41, 5, 6, 3), -1), ((3, 41, 7), 0), ((90, 4), 1)),
    *(((41, 3, 4, 5), (1, 2, 3)), ((7, 3, 8, 2), (3, 1)), ((2, 3, 5, 40), 1), ((1, 2, 300), 1)),
)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
cases = pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)


def drawn(shape, dtype="float64", *, seed=0, offset=0.0):
    return (np.random.default_rng(seed).standard_normal(shape) + offset).astype(dtype)


def oracle(x, axis=1):
    """Return moments of x, in longdouble except for float16 and bfloat16."""
    return reference.batch_norm_stats(x.astype("float64", copy=False), axis=axis)


def assert_statistics(comp, x, axis=1, *, merges):
    """Compare with the oracle: the tolerances of one pass, plus a rounding for every merge."""
    ref = oracle(x, axis)
    assert comp.count == ref.count
    of_mean, of_m2 = merge_tolerance(ref, x, merges, axis=axis)
    dtype = "float64" if x.dtype == "float64" else "float32"
    assert_within(comp.mean, ref.mean, mean_tolerance(ref, dtype) + of_mean, "mean")
    assert_within(comp.m2, ref.m2, m2_tolerance(ref, dtype) + of_m2, "m2")


def merges_of(pieces):
    """Return the number of merges that a value goes through."""
    return 2 * math.ceil(math.log2(max(pieces, 1))) + 1


@pytest.fixture
def pieces(monkeypatch):
    """The chunks passed to batch_norm_stats, in order."""
    taken = []

    def watched(x, *, axis):
        taken.append(x)
        return batch_norm_stats(x, axis=axis)

    monkeypatch.setattr(population, "batch_norm_stats", watched)
    return taken


# Arrays


@dtypes
@cases
def test_an_array_in_pieces(shape, axis, dtype, pieces):
    x = drawn(shape, dtype, offset=3.0)
    comp = population_stats(x, axis=axis, chunk=100)
    assert_statistics(comp, x, axis, merges=merges_of(len(pieces)))
    assert len(pieces) > 1
    assert math.prod(shape) == sum(piece.size for piece in pieces)
    channels = math.prod(channels_of(shape, axis))
    assert all(piece.size <= max(100, channels) for piece in pieces)
    assert all(channels_of(piece.shape, axis) == channels_of(shape, axis) for piece in pieces)


def test_an_array_of_one_piece_is_that(pieces):
    x = drawn((5, 3, 4))
    assert_same_bits(population_stats(x).m2, batch_norm_stats(x).m2)
    assert [piece.shape for piece in pieces] == [x.shape]


@given(
    shape_and_axis=shapes_and_axes(most=3000, least_count=1),
    chunk=st.integers(1, 4000),
    offset=st.sampled_from([0.0, 1.0, 1e6]),
    layout=st.sampled_from(["C", "Fortran", "reversed", "every second", "read-only"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_however_an_array_is_cut(shape_and_axis, chunk, offset, layout, seed):
    shape, axis = shape_and_axis
    x = lay_out(drawn(shape, seed=seed, offset=offset), layout)
    comp = population_stats(x, axis=axis, chunk=chunk)
    assert_statistics(comp, x, axis, merges=merges_of(x.size))


@given(
    shape_and_axis=shapes_and_axes(most=3000, least_count=1),
    chunk=st.integers(1, 4000),
    drawn_chunks=st.data(),
    seed=st.integers(0, 2**32 - 1),
)
def test_however_a_file_is_divided(shape_and_axis, chunk, drawn_chunks, seed):
    """Every value is read once, no file chunk is in two pieces, and no piece is too large."""
    shape, axis = shape_and_axis
    x = drawn(shape, seed=seed, offset=1.0)
    stored = Stored(x)
    stored.chunks = tuple(drawn_chunks.draw(st.integers(1, n + 2)) for n in shape)
    comp = population_stats(stored, axis=axis, chunk=chunk)
    assert_statistics(comp, x, axis, merges=merges_of(x.size))
    owner = np.full(shape, -1)
    for number, index in enumerate(stored.indices):
        assert (owner[index] == -1).all()
        assert owner[index].size <= max(chunk // 3, math.prod(stored.chunks))
        owner[index] = number
    assert (owner >= 0).all()
    for begin in product(*(range(0, n, c) for n, c in zip(shape, stored.chunks, strict=True))):
        block = owner[tuple(slice(i, i + c) for i, c in zip(begin, stored.chunks, strict=True))]
        assert (block == block.flat[0]).all()


@pytest.mark.parametrize(
    "chunks", [(3, 3), (4.0, 3, 4, 4), ((7, 5), 3, 4, 4), "abcd", (0, 3, 4, 4)]
)
def test_chunks_that_say_nothing_are_no_borders(chunks, pieces):
    stored = Stored(drawn((60, 3, 4, 4)))
    stored.chunks = chunks
    population_stats(stored, chunk=500)
    assert [piece.size for piece in pieces] == [480] * 6


def test_chunks_that_differ_in_length_are_no_borders(pieces):
    class Irregular(Stored):
        @property
        def chunks(self):
            raise NotImplementedError

    population_stats(Irregular(drawn((60, 3, 4, 4))), chunk=500)
    assert [piece.size for piece in pieces] == [480] * 6


@pytest.mark.parametrize("shape", [(0, 3), (5, 0), (0, 3, 4), (3, 2, 0)], ids=str)
def test_an_array_without_values(shape):
    comp = population_stats(np.zeros(shape))
    ref = batch_norm_stats(np.zeros(shape))
    assert comp.count == ref.count
    assert_same_bits(comp.mean, ref.mean)
    assert_same_bits(comp.m2, ref.m2)


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
@dtypes
def test_a_memory_map(tmp_path, dtype, mode):
    x = drawn((60, 3, 4, 4), dtype, offset=2.0)
    x.tofile(tmp_path / "x")
    mapped = np.memmap(tmp_path / "x", dtype, mode, shape=x.shape)
    comp = population_stats(mapped, chunk=500)
    assert type(comp.mean) is np.ndarray
    whole = population_stats(x, chunk=500)
    assert_same_bits(comp.mean, whole.mean)
    assert_same_bits(comp.m2, whole.m2)


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_memory_map_is_read_in_its_own_order(tmp_path, order, pieces):
    """Each piece is contiguous in the file, so that no page is read twice."""
    x = np.asarray(drawn((60, 3, 20, 10)), order=order)
    np.save(tmp_path / "x.npy", x)
    population_stats(np.load(tmp_path / "x.npy", mmap_mode="r"), chunk=2000)
    assert len(pieces) > 10
    spans = [np.lib.array_utils.byte_bounds(piece) for piece in pieces]
    assert all(
        end - begin == piece.nbytes for (begin, end), piece in zip(spans, pieces, strict=True)
    )
    assert all(end == begin for (_, end), (begin, _) in pairwise(sorted(spans)))


class Stored:
    """Like a dataset in a file: it has a shape, and slices are arrays."""

    def __init__(self, array):
        self._array, self.shape = array, array.shape
        self.reads, self.indices = [], []

    def __getitem__(self, index):
        self.indices.append(index)
        self.reads.append(self._array[index].size)
        return self._array[index].copy()


def test_what_reads_an_array_when_it_is_sliced(pieces):
    x = drawn((60, 3, 4, 4))
    stored = Stored(x)
    assert_statistics(population_stats(stored, chunk=500), x, merges=merges_of(6))
    assert stored.reads == [piece.size for piece in pieces] == [480] * 6


def test_a_dataset_of_h5py(tmp_path):
    h5py = pytest.importorskip("h5py", reason="datasets of HDF5 need h5py")
    x = drawn((60, 3, 4, 4), "float32")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        stored = file.create_dataset("x", data=x, chunks=(7, 3, 4, 4))
        comp = population_stats(stored, chunk=500)  # cut along its own chunks, of seven samples
    assert_same_bits(comp.m2, population_stats(x, chunk=7 * 48).m2)


@pytest.mark.parametrize("library", ["array_api_strict", "torch", "jax.numpy"])
def test_arrays_of_other_libraries(library):
    xp = pytest.importorskip(library, reason=f"arrays of {library} need {library}")
    x = drawn((40, 3, 4), "float32")
    ref = population_stats(x, chunk=100)
    array = xp.asarray(x)
    for data in (array, iter([array[:7, ...], array[7:, ...]])):
        comp = population_stats(data, chunk=100)
        if library != "jax.numpy":  # without x64 JAX has no float64
            assert type(comp.mean) is type(array)
        assert comp.count == ref.count
    comp = population_stats(array, chunk=100)
    assert_same_bits(np.asarray(comp.mean), ref.mean)


# Several arrays


def test_arrays_one_after_the_other_are_gone_through_once():
    parts = [drawn((n, 3, 2), seed=n, offset=1.0) for n in (7, 0, 20, 5, 1)]
    consumed = []

    def stream():
        for part in parts:
            consumed.append(len(part))
            yield part

    comp = population_stats(stream())
    assert consumed == [7, 0, 20, 5, 1]
    assert_statistics(comp, np.concatenate(parts), merges=merges_of(5))
    for data in (parts, tuple(parts), iter(parts)):
        assert_same_bits(population_stats(data).m2, comp.m2)


def test_every_value_weighs_the_same():
    """The mean of the two means would be 2, that of the two variances 0."""
    stats = population_stats([np.full((1, 1), 1.0), np.full((3, 1), 3.0)])
    assert (stats.count, *stats.mean, *stats.var()) == (4, 2.5, 0.75)


def test_arrays_may_differ_in_all_but_the_channels():
    x = drawn((6, 3, 10, 10), "float32")
    parts = [x[:2, :, :, :5], x[:2, :, :, 5:].astype("float64"), x[2:3], x[3:].reshape(3, 3, 100)]
    assert_statistics(population_stats(parts), x, merges=merges_of(4))


def test_each_array_is_cut(pieces):
    parts = [Stored(drawn((n, 2), seed=n)) for n in (100, 30)]
    population_stats(parts, chunk=50)
    assert [len(piece) for piece in pieces] == [25, 25, 25, 25, 25, 5]


def test_empty_arrays_alone_have_no_statistics():
    comp = population_stats(np.zeros((0, 3)) for _ in range(3))
    assert comp.count == 0
    assert_same_bits(comp.mean, np.zeros(3))


def test_the_same_chunks_give_the_same_bits():
    x = drawn((4097, 5), "float32", offset=1e4)
    first, *others = (population_stats(x, chunk=30) for _ in range(3))
    for other in others:
        assert_same_bits(other.mean, first.mean)
        assert_same_bits(other.m2, first.m2)


def test_many_chunks_cost_no_accuracy():
    """In sequence, the mean would be rounded 20,000 times: a random walk of about 100 roundings."""
    rng = np.random.default_rng(0)
    rows = rng.integers(1, 8, 20_000)
    x = rng.standard_normal((rows.sum(), 4)) + 1e6
    comp = population_stats(np.split(x, np.cumsum(rows)[:-1]))
    wide = x.astype(np.longdouble)
    mean = wide.mean(axis=0)
    m2 = np.sum((wide - mean) ** 2, axis=0)
    # A chunk's own mean is rounded once, then once at each of 15 levels.
    assert_within(comp.mean, mean, 16 * np.spacing(1e6) / 2, "mean")
    # d has standard deviation 1, and an error of two such roundings, of either sign, in each merge.
    assert_within(comp.m2, m2, 4 * np.spacing(1e6) / 2 * m2, "m2")


@pytest.mark.parametrize("number", [1, 2, 3, 4, 7, 8, 33])
def test_merged_in_pairs_and_in_order(number):
    class Part:
        def __init__(self, values, depth=0):
            self.values, self.depth = values, depth

        def merge(self, other):
            return Part(self.values + other.values, 1 + max(self.depth, other.depth))

    merged = Pairwise()
    assert not merged
    for i in range(number):
        merged.add(Part([i]))
    assert merged
    assert merged.total().values == list(range(number))
    assert merged.total().depth == math.ceil(math.log2(number))


# Memory


@pytest.mark.parametrize("reader", [False, True], ids=["batches", "read from a file"])
def test_only_one_array_is_in_memory(reader):
    """An array is freed before a generator makes, or a reader reads, the next."""
    last, alive = [], []

    def made():
        alive.extend(past() is not None for past in last)
        array = drawn((20, 3))
        last[:] = [weakref.ref(array)]
        return array

    class Reader:
        shape = (100, 3)

        def __getitem__(self, index):
            return made()

    population_stats(Reader() if reader else (made() for _ in range(5)), chunk=60)
    assert alive == [False] * 4


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits memory without mapped files")
def test_memory_is_bounded(tmp_path):
    """Process a 256 MiB file in 64 MiB of memory, where NumPy's own functions fail."""
    shape = (64, 16, 256, 256)
    mapped = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, shape)
    mapped[::9, 3] = 2.5  # the file is mostly a hole
    mapped.flush()
    code = f"""
import re, resource
import numpy as np
from nbnorm.population import population_stats
mapped = np.load({str(tmp_path / "x.npy")!r}, mmap_mode="r")
strided = mapped.transpose(0, 2, 3, 1)[:, ::-1]  # pieces are copied
for data, axis in ((mapped, 1), (strided, -1)):
    population_stats(data[:2], axis=axis)  # compile, and start threads
status = open("/proc/self/status").read()
used = 1024 * int(re.search(r"VmData:\\s+(\\d+)", status)[1])
resource.setrlimit(resource.RLIMIT_DATA, (used + (64 << 20),) * 2)
for needs_it_all in (lambda: mapped.var(axis=(0, 2, 3)), lambda: np.array(mapped)):
    try:
        needs_it_all()
    except MemoryError:
        pass
    else:
        raise AssertionError("there is no limit")
for data, axis in ((mapped, 1), (strided, -1), ((x[None] for x in mapped), 1)):
    stats = population_stats(data, axis=axis)
    assert stats.count == 64 * 256 * 256
    np.testing.assert_allclose(stats.mean[[2, 3]], [0, 2.5 * 8 / 64], rtol=1e-6)
    np.testing.assert_allclose(stats.var()[[2, 3]], [0, 6.25 * 8 / 64 * 56 / 64], rtol=1e-6)
"""
    run_child("-c", code)


# Errors


@pytest.mark.parametrize(
    ("data", "options", "error", "match"),
    [
        (3, {}, TypeError, r"^data must be an array or an iterable of arrays, got builtins\.int"),
        (None, {}, TypeError, r"^data must be .* got builtins\.NoneType"),
        ([], {}, ValueError, r"^data has no arrays"),
        (iter(()), {}, ValueError, r"^data has no arrays"),
        ("text", {}, TypeError, r"^data must be a NumPy array.* got builtins\.str"),
        ([1.0, 2.0], {}, TypeError, r"^data must be a NumPy array.* got builtins\.float"),
        (np.zeros((4, 3), int), {}, TypeError, r"^data has dtype int64"),
        (np.ma.zeros((4, 3)), {}, TypeError, r"^data is a masked array"),
        (np.zeros((4, 3), ">f4"), {}, TypeError, r"^data has non-native byte order"),
        (np.zeros(4), {}, ValueError, r"^data must have at least 2 dimensions, got shape \(4,\)"),
        (np.zeros((4, 3)), {"axis": 2}, ValueError, r"^axis 2 is out of range"),
        (np.zeros((4, 3)), {"axis": (0, 1)}, ValueError, r"leaves no axis"),
        (np.zeros((4, 3)), {"axis": "1"}, TypeError, r"^axis must be an int"),
        (np.zeros((4, 3)), {"chunk": 0}, ValueError, r"^chunk must be at least 1, got 0"),
        (np.zeros((4, 3)), {"chunk": 1e6}, TypeError, r"^chunk must be an int, got 1000000\.0"),
        (
            [np.zeros((4, 3)), np.zeros((4, 2))],
            {},
            ValueError,
            r"^data has channel axes of shape \(2,\), expected \(3,\)",
        ),
    ],
)
def test_what_is_refused(data, options, error, match):
    with pytest.raises(error, match=match):
        population_stats(data, **options)


def test_the_array_that_is_wrong_is_named():
    good = np.zeros((4, 3))
    for bad in (good.astype(int), np.zeros((4, 2)), "text", np.zeros(3)):
        with pytest.raises((TypeError, ValueError)) as caught:
            population_stats([good, good, bad, good])
        assert caught.value.__notes__ == ["(array 2 of data)"]


class Frame:
    """Like a data frame of pandas: it has a shape, and columns by name."""

    shape = (4, 3)

    def keys(self):
        return list("abc")

    def __getitem__(self, key):
        raise KeyError(key)


class Convertible(Frame):
    def to_numpy(self):
        return np.zeros(self.shape)


@pytest.mark.parametrize(
    ("frame", "remedy"), [(Frame(), r"data\[key\]"), (Convertible(), r"data\.to_numpy\(\)")]
)
def test_frames_are_refused(frame, remedy):
    match = rf"^data must be an array or an iterable .*{type(frame).__name__}; pass {remedy}(\n|$)"
    with pytest.raises(TypeError, match=match) as caught:
        population_stats(frame)
    assert not hasattr(caught.value, "__notes__")
    with pytest.raises(TypeError, match=match) as caught:
        population_stats([np.zeros((4, 3)), frame])
    assert caught.value.__notes__ == ["(array 1 of data)"]


def test_what_a_generator_raises_comes_out_as_it_is():
    def broken():
        yield np.zeros((4, 3))
        raise ValueError("no more")

    with pytest.raises(ValueError, match=r"^no more$") as caught:
        population_stats(broken())
    assert not hasattr(caught.value, "__notes__")


def test_arguments_are_refused_before_data_is_touched():
    data = iter([np.zeros((4, 3))])
    for options in ({"axis": 1.5}, {"axis": ("x", 1.5)}, {"chunk": 0}, {"progress": "yes"}):
        with pytest.raises((TypeError, ValueError)):
            population_stats(data, **options)
    assert len(list(data)) == 1


# Progress


@pytest.fixture
def bars(monkeypatch):
    """The progress bars that were shown."""
    auto = pytest.importorskip("tqdm.auto", reason="progress bars need tqdm")
    shown = []

    class Recorded(auto.tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            shown.append(self)

    monkeypatch.setattr(auto, "tqdm", Recorded)
    return shown


def test_progress_counts_values(bars, capsys):
    x = drawn((50, 3, 4))
    population_stats(x, chunk=60, progress=True)
    population_stats([x, x[:7]], progress=True)
    population_stats(iter([x, x[:7]]), progress=True)
    assert [bar.total for bar in bars] == [600, 684, None]
    assert [bar.n for bar in bars] == [600, 684, 684]
    assert all(bar.disable or bar.pos == 0 for bar in bars)
    shown = capsys.readouterr()
    assert "600/600" in shown.err
    assert "values" in shown.err
    assert not shown.out


@pytest.mark.parametrize("bad", [np.zeros((4, 3), int), np.zeros(4), "text", [None]])
def test_no_bar_before_data_that_is_refused(bars, capsys, bad):
    with pytest.raises((TypeError, ValueError)):
        population_stats(bad, progress=True)
    assert not bars
    assert not capsys.readouterr().err


def test_no_bar_before_a_dask_array_that_is_refused(da, capsys):
    pytest.importorskip("tqdm", reason="progress bars need tqdm")
    with pytest.raises(TypeError, match=r"^data has dtype int64"):
        population_stats(da.ones((40, 3), dtype=int, chunks=10), progress=True)
    assert not capsys.readouterr().err


def test_no_progress_unless_asked_for(bars, capsys):
    population_stats(drawn((50, 3)))
    assert not bars
    assert not capsys.readouterr().err


def test_a_callable_is_told_of_values():
    x = drawn((50, 3, 4))
    for data, total in ((x, 600), ([x, x[:7]], 684), (iter([x, x[:7]]), None)):
        calls = []
        population_stats(data, chunk=60, progress=lambda *call, told=calls: told.append(call))
        most = 684 if total is None else total
        assert calls == [
            (done, total) for done in (*range(0, 600, 60), 600, 660, 684) if done <= most
        ]


def test_what_a_callable_raises_ends_the_call():
    def stop(done, total):
        raise KeyError(done)

    with pytest.raises(KeyError, match=r"^0$"):
        population_stats(drawn((50, 3)), progress=stop)


@pytest.mark.parametrize("bad", [np.zeros((4, 3), int), np.zeros(4), "text"])
def test_a_callable_is_not_told_of_data_that_is_refused(bad):
    calls = []
    with pytest.raises((TypeError, ValueError)):
        population_stats(bad, progress=lambda *call: calls.append(call))
    assert not calls


@pytest.mark.parametrize("progress", ["yes", "", None, 0, 1, []], ids=repr)
def test_progress_is_a_bool_or_callable(progress):
    with pytest.raises(TypeError, match=r"^progress must be a bool or callable, got ") as caught:
        population_stats(np.zeros((4, 3)), progress=progress)
    assert str(caught.value).endswith(f"got {progress!r}")


def test_progress_without_tqdm_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    data = iter([np.zeros((4, 3))])
    with pytest.raises(ImportError, match=r"pip install \"nbnorm-kernels\[progress\]\""):
        population_stats(data, progress=True)
    assert len(list(data)) == 1


# dask


@pytest.fixture
def da():
    return pytest.importorskip("dask.array", reason="arrays of dask need dask")


@pytest.mark.parametrize(
    ("shape", "axis", "chunks"),
    [
        ((50, 3, 6, 4), 1, (7, 3, 6, 4)),
        ((50, 3, 6, 4), 1, (7, 2, 5, 3)),
        ((50, 6, 4), -1, ((1, 0, 30, 19), 6, 3)),
        ((50, 6, 4), (1, 2), (50, 2, 1)),
        ((0, 3), 1, (5, 2)),
    ],
    ids=str,
)
def test_a_dask_array(da, shape, axis, chunks):
    x = drawn(shape, offset=2.0)
    data = da.from_array(x, chunks=chunks)
    comp = population_stats(data, axis=axis)
    assert type(comp) is Moments
    assert type(comp.mean) is np.ndarray
    assert_statistics(comp, x, axis, merges=merges_of(data.npartitions))
    again = population_stats(data, axis=axis)
    assert_same_bits(again.mean, comp.mean)
    assert_same_bits(again.m2, comp.m2)


def test_blocks_of_dask_are_merged_as_chunks_are(da):
    x = drawn((50, 3, 6), offset=1e4)
    comp = population_stats(da.from_array(x, chunks=(7, 3, 6)))
    ref = population_stats(x[i : i + 7] for i in range(0, 50, 7))
    assert_same_bits(comp.mean, ref.mean)
    assert_same_bits(comp.m2, ref.m2)


def test_a_dask_array_of_unknown_length(da):
    x = drawn((50, 3))
    data = da.from_array(x, chunks=(7, 3))
    positive = data[data[:, 0] > 0]
    assert math.isnan(positive.shape[0])
    assert_statistics(population_stats(positive), x[x[:, 0] > 0], merges=merges_of(8))


def test_what_blocks_of_dask_share_is_computed_once(da):
    calls = []

    def block(x):
        calls.append(x.shape)
        return x + 1.0

    data = da.ones((40, 3), chunks=(10, 3)).map_blocks(block, dtype=float, meta=np.empty((0, 0)))
    population_stats(data - data.mean(axis=0))
    assert calls == [(10, 3)] * 4


def test_a_dask_array_that_is_wrong(da):
    with pytest.raises(TypeError, match=r"^data has dtype int64"):
        population_stats(da.ones((40, 3), dtype=int, chunks=10))
    with pytest.raises(ValueError, match=r"^axis 2 is out of range for data of"):
        population_stats(da.ones((40, 3), chunks=10), axis=2)


def test_progress_of_dask_counts_values(da, bars, capsys):
    population_stats(da.ones((40, 3), chunks=(10, 3)), progress=True)
    assert [(bar.n, bar.total) for bar in bars] == [(120, 120)]
    assert "120/120" in capsys.readouterr().err


def test_dask_and_tqdm_are_not_imported():
    code = """
import sys, numpy
from nbnorm.population import population_stats
population_stats(numpy.ones((4, 3)))
found = {name.partition(".")[0] for name in sys.modules} & {
    "dask", "tqdm", "h5py", "torch", "xarray", "zarr"
}
assert not found, found
"""
    run_child("-c", code)


def test_a_bar_does_not_import_dask():
    pytest.importorskip("tqdm", reason="progress bars need tqdm")
    code = """
import sys, numpy
from nbnorm.population import population_stats
population_stats(numpy.ones((4, 3)), progress=True)
assert "tqdm" in sys.modules and "dask" not in sys.modules
"""
    run_child("-c", code)


# Layers


BATCHES = (7, 2, 0, 20, 5)


def batches(*shape, dtype="float64", offset=1.0):
    """Return uneven batches, each with a different mean."""
    return [drawn((n, *shape), dtype, seed=n, offset=offset * i) for i, n in enumerate(BATCHES)]


def layers_of(**options):
    """Return two layers of 3 and 4 channels that have been trained."""
    layers = [BatchNorm(n, dtype=np.float64, **options) for n in (3, 4)]
    for i, layer in enumerate(layers):
        layer.parameters["weight"][...] = drawn(layer.num_features, seed=8)
        layer.parameters["bias"][...] = drawn(layer.num_features, seed=9)
        layer.forward(drawn((6, layer.num_features), seed=i))
    return layers


def network(layers, weight, x):
    """Return the input of each layer, and the output."""
    first, second = layers
    between = np.tanh(first.forward(x)) @ weight
    return x, between, second.forward(between)


def state_of(layers):
    return [(layer.training, vars(layer).keys(), layer.state_dict()) for layer in layers]


def assert_same_state(layers, before):
    for (training, names, state), (was, had, expected) in zip(
        state_of(layers), before, strict=True
    ):
        assert training is was
        assert names == had
        for name, array in state.items():
            assert_same_bits(array, expected[name], name)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"correction": 0}], ids=str)
def test_layers_take_the_statistics_of_all_they_have_seen(options, training):
    layers, weight = layers_of(**options), drawn((3, 4))
    alone = layers_of(**options, track_running_stats=False)  # these use batch statistics
    seen = [network(alone, weight, x) for x in batches(3)]
    for layer in layers:
        layer.training = training
    before = state_of(layers)
    with recalibrate(*layers):
        results = [network(layers, weight, x) for x in batches(3)]
        for layer, (_, _, state) in zip(layers, before, strict=True):  # unchanged until the end
            assert_same_bits(layer.running_mean, state["running_mean"])
    for result, expected in zip(results, seen, strict=True):
        assert_same_bits(result[2], expected[2])
    for layer, inputs in zip(layers, list(zip(*seen, strict=True))[:2], strict=True):
        ref = oracle(np.concatenate(inputs))
        var = ref.m2 / (ref.count - layer.correction)
        # A handful of merges, and M2 converted to a variance and back.
        np.testing.assert_allclose(layer.running_mean, ref.mean.astype(float), rtol=0, atol=32 * U)
        np.testing.assert_allclose(layer.running_var, var.astype(float), rtol=32 * U)
        assert layer.training is training
        assert layer.num_batches_tracked == 1
        assert layer._seen is None


@pytest.mark.parametrize("dtype", ["float16", "float32", BFLOAT16], ids=str)
@pytest.mark.parametrize(
    ("axis", "features", "shape"), [(1, 3, (3, 5)), (-1, 5, (3, 5)), ((1, 2), (3, 5), (3, 5))]
)
def test_layers_of_any_axis_and_dtype(axis, features, shape, dtype):
    layer = BatchNorm(features, axis=axis, dtype=dtype)
    data = batches(*shape, dtype=dtype)
    with recalibrate(layer):
        for x in data:
            layer.forward(x)
    ref = BatchNorm(features, axis=axis, dtype=dtype)
    ref.set_statistics(population_stats(data, axis=axis))
    for name in ("running_mean", "running_var"):
        comp, expected = (
            getattr(one, name).astype(np.float64) for one in (layer, ref)
        )  # one rounding to the layer's dtype, which may differ
        unit = float(ml_dtypes.finfo(dtype).eps)
        np.testing.assert_allclose(comp, expected, rtol=unit, atol=unit)


def test_a_layer_in_several_places_counts_once():
    layer = BatchNorm(3)
    first, second = drawn((7, 3), seed=1), drawn((4, 3), seed=2, offset=5.0)
    with recalibrate(layer, layer):
        layer.forward(first)
        layer.forward(second)
    whole = BatchNorm(3)
    whole.set_statistics(population_stats([first, second]))
    np.testing.assert_allclose(layer.running_mean, whole.running_mean, rtol=2.0**-23)
    np.testing.assert_allclose(layer.running_var, whole.running_var, rtol=2.0**-23)


def test_modes_may_change_within_the_block():
    """Functions that evaluate a model often call `eval` first."""
    layers, x = [BatchNorm(3), BatchNorm(3)], drawn((7, 3), offset=4.0)
    seen = []
    with recalibrate(*layers):
        for layer in layers:
            layer.eval()
        seen.append(layers[1].forward(layers[0].forward(x)))
        layers[0].train()
        seen.append(layers[1].forward(layers[0].forward(x)))
    assert_same_bits(*seen)
    assert [layer.training for layer in layers] == [True, False]
    ref = BatchNorm(3)
    ref.set_statistics(population_stats([x, x]))
    np.testing.assert_allclose(layers[0].running_var, ref.running_var, rtol=2.0**-22)


def test_gradients_are_those_of_training():
    layer, ref = (BatchNorm(3, dtype=np.float64) for _ in range(2))
    x, dy = drawn((7, 3)), drawn((7, 3), seed=1)
    ref.forward(x)
    with recalibrate(layer.eval()):
        layer.forward(x)
        assert_same_bits(layer.backward(dy), ref.backward(dy))


def test_a_residual_and_relu_pass_through():
    layer, ref = (BatchNorm(3, activation="relu") for _ in range(2))
    x, residual = drawn((7, 3), "float32"), drawn((7, 3), "float32", seed=1)
    with recalibrate(layer):
        y = layer.forward(x, residual)
    assert_same_bits(y, ref.forward(x, residual))


def test_a_copy_made_within_the_block_is_what_the_layer_was():
    (layer, _), x = layers_of(), drawn((7, 3))
    expected = layer.eval().forward(x)
    with recalibrate(layer):
        layer.forward(x)
        copied = copy.deepcopy(layer)
    assert_same_bits(copied.forward(x), expected)


def test_an_exception_leaves_all_as_it_was():
    layers = layers_of()
    before = state_of(layers)

    def interrupted():
        with recalibrate(*layers):
            layers[0].forward(drawn((7, 3)))
            raise KeyboardInterrupt

    def misfit():
        with recalibrate(*layers):
            layers[0].forward(drawn((7, 3)))
            layers[1].forward(drawn((7, 3)))

    def too_few():
        with recalibrate(*layers):
            layers[0].forward(drawn((7, 3)))
            layers[1].forward(drawn((1, 4)))

    for call, error in (
        (interrupted, KeyboardInterrupt),
        (misfit, ValueError),
        (too_few, ValueError),
    ):
        with pytest.raises(error):
            call()
        assert_same_state(layers, before)


def test_layers_that_have_seen_nothing_keep_their_statistics():
    layers = layers_of()
    before = state_of(layers[1:])
    with recalibrate(*layers):
        layers[0].forward(drawn((7, 3)))
        layers[1].forward(np.zeros((0, 4)))
    assert_same_state(layers[1:], before)
    assert layers[0].running_mean is not None
    before = state_of(layers)
    message = "^layers received no values within the block"
    with pytest.raises(ValueError, match=message), recalibrate(*layers):
        layers[0].forward(np.zeros((0, 3)))
    assert_same_state(layers, before)


def test_layers_that_are_refused():
    without, good = BatchNorm(3, track_running_stats=False), BatchNorm(3)
    for layers, error, match in (
        ((), ValueError, "^layers is empty"),
        ((good, without), ValueError, r"^BatchNorm\(3, .* has no running statistics"),
        ((good, print), TypeError, "^layers must be BatchNorm, got builtin_function_or_method"),
    ):
        with pytest.raises(error, match=match), recalibrate(*layers):
            pass
        assert good._seen is None
    with recalibrate(good):
        good.forward(drawn((4, 3)))
        with pytest.raises(ValueError, match="is already being recalibrated"), recalibrate(good):
            pass
        good.forward(drawn((4, 3), seed=1))
    ref = BatchNorm(3)
    ref.set_statistics(population_stats([drawn((4, 3)), drawn((4, 3), seed=1)]))
    np.testing.assert_allclose(good.running_mean, ref.running_mean, rtol=2.0**-22)


def test_afterwards_layers_go_on_as_they_were():
    layer = BatchNorm(3, momentum=0.25, dtype=np.float64)
    x = drawn((7, 3), offset=4.0)
    with recalibrate(layer):
        layer.forward(x)
    mean = layer.running_mean.copy()
    layer.forward(x + 4.0)
    np.testing.assert_allclose(layer.running_mean, mean + 1.0, rtol=1e-12)
    y = layer.eval().forward(x)
    expected = nbnorm.batch_norm_inference(x, None, None, layer.running_mean, layer.running_var)
    np.testing.assert_allclose(y, expected, rtol=1e-12)
