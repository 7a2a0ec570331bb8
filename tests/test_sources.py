"""Datasets of Zarr, h5py, xarray and dask: each chunk is read once, in bounded memory."""

import io
import sys
from collections import Counter

import numpy as np
import pytest
from children import run_child
from test_population import Stored, assert_statistics, drawn, merges_of
from tolerances import assert_same_bits

from nbnorm import Moments, _checkpoint, population, population_stats

zarr = pytest.importorskip("zarr", reason="datasets of Zarr need zarr")
h5py = pytest.importorskip("h5py", reason="datasets of HDF5 need h5py")
xr = pytest.importorskip("xarray", reason="arrays of xarray need xarray")
da = pytest.importorskip("dask.array", reason="arrays of dask need dask")


class CountingStore(zarr.storage.MemoryStore):
    """Counts the reads of each chunk."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.reads = Counter()

    def with_read_only(self, read_only=False):
        same = super().with_read_only(read_only)
        same.reads = self.reads
        return same

    async def get(self, key, prototype, byte_range=None):
        if "/c/" in f"/{key}":
            self.reads[key, str(byte_range)] += 1
        return await super().get(key, prototype, byte_range)


class CountingFile(io.BytesIO):
    """Counts reads by the offset at which they begin."""

    def __init__(self):
        super().__init__()
        self.reads = Counter()

    def readinto(self, buffer):
        self.reads[self.tell()] += 1
        return super().readinto(buffer)


class InZarr:
    def __init__(self, x, chunks, **options):
        self.store = CountingStore()
        self.dataset = zarr.create_array(
            self.store, shape=x.shape, chunks=chunks, dtype=x.dtype, **options
        )
        self.dataset[...] = x
        self.store.reads.clear()

    def reads(self):
        """Return how often each chunk has been read."""
        return list(self.store.reads.values())


class InHDF5:
    def __init__(self, x, chunks):
        self.file = CountingFile()
        with h5py.File(self.file, "w") as file:
            file.create_dataset("x", data=x, chunks=chunks, compression="gzip")
        # No chunk cache: it would hide that chunks of a small file such as this are read again.
        self.dataset = h5py.File(self.file, "r", rdcc_nbytes=0)["x"]
        number = self.dataset.id.get_num_chunks()
        self.chunks = [self.dataset.id.get_chunk_info(i).byte_offset for i in range(number)]
        self.file.reads.clear()

    def reads(self):
        return [self.file.reads[offset] for offset in self.chunks]


class Unchunked:
    """A dataset that does not state its chunks."""

    def __init__(self, dataset):
        self._dataset, self.shape = dataset, dataset.shape

    def __getitem__(self, index):
        return self._dataset[index]


KINDS = {"zarr": InZarr, "h5py": InHDF5}
kinds = pytest.mark.parametrize("kind", KINDS)
SHAPE, DIMS = (60, 6, 20, 10), ("time", "band", "y", "x")
CHUNKS = (
    ((7, 6, 20, 10), 1, 60_000),
    ((7, 6, 8, 10), 1, 12_000),
    ((7, 2, 8, 5), 1, 3000),  # the chunks of all channels together are too many values
    ((7, 4, 20, 10), 1, 18_000),
    ((60, 1, 20, 10), 1, 6000),  # a chunk of the file is larger than a piece
    ((1, 6, 1, 1), 1, 50),
    ((8, 6, 4, 5), -1, 3000),
    ((8, 6, 4, 5), (1, 3), 3000),
    ((8, 3, 20, 5), (1, 2, 3), 3000),
    ((60, 6, 20, 10), 1, 100),
)


@kinds
@pytest.mark.parametrize(("chunks", "axis", "chunk"), CHUNKS, ids=str)
def test_each_chunk_of_a_file_is_read_once(kind, chunks, axis, chunk):
    x = drawn(SHAPE, "float32", offset=2.0)
    stored = KINDS[kind](x, chunks)
    comp = population_stats(stored.dataset, axis=axis, chunk=chunk)
    assert_statistics(comp, x, axis, merges=merges_of(x.size))
    number = np.prod([-(-length // n) for length, n in zip(SHAPE, chunks, strict=True)])
    assert stored.reads() == [1] * number


@kinds
def test_reads_are_counted(kind):
    """Chunks that are not stated are read more than once: the test above can fail."""
    stored = KINDS[kind](drawn(SHAPE), (7, 6, 20, 10))
    population_stats(Unchunked(stored.dataset), chunk=4000)
    assert max(stored.reads()) > 1


@pytest.fixture
def pieces(monkeypatch):
    """Return the list of the shapes of the chunks passed to batch_norm_stats, in order."""
    taken, stats = [], population.batch_norm_stats

    def watched(x, *, axis):
        taken.append(x.shape)
        return stats(x, axis=axis)

    monkeypatch.setattr(population, "batch_norm_stats", watched)
    return taken


@kinds
@pytest.mark.parametrize(("chunks", "axis", "chunk"), CHUNKS, ids=str)
def test_pieces_are_no_larger_than_asked(kind, chunks, axis, chunk, pieces):
    """A piece has at most a fifth of `chunk`, as reading takes memory too, or is one file chunk."""
    population_stats(KINDS[kind](drawn(SHAPE), chunks).dataset, axis=axis, chunk=chunk)
    sizes = [np.prod(shape) for shape in pieces]
    assert sum(sizes) == np.prod(SHAPE)
    assert max(sizes) <= max(chunk // 5, np.prod(chunks))


@kinds
def test_small_chunks_are_read_together(kind, pieces):
    population_stats(KINDS[kind](drawn(SHAPE), (4, 6, 10, 10)).dataset, chunk=100_000)
    assert pieces == [(16, *SHAPE[1:])] * 3 + [(12, *SHAPE[1:])]


@kinds
def test_divided_channels_have_the_statistics_of_all(kind):
    x = drawn(SHAPE, "float32", offset=2.0)
    stored = KINDS[kind](x, (60, 1, 20, 10)).dataset
    comp = population_stats(stored, chunk=36_000)
    parts = [population_stats(x[:, i : i + 1]) for i in range(6)]
    assert comp.count == parts[0].count
    assert type(comp.count) is int
    assert_same_bits(comp.mean, np.concatenate([part.mean for part in parts]))
    assert_same_bits(comp.m2, np.concatenate([part.m2 for part in parts]))


def test_shards_of_zarr():
    x = drawn(SHAPE, "float32")
    stored = InZarr(x, (5, 6, 10, 5), shards=(20, 6, 20, 10))
    comp = population_stats(stored.dataset, chunk=4000)
    assert_statistics(comp, x, merges=merges_of(40))
    ranges = [number for (_, span), number in stored.store.reads.items() if "Range" in span]
    assert ranges.count(1) >= 3 * 4 * 2 * 2


def test_an_uncompressed_dataset_of_h5py():
    x = drawn(SHAPE)
    file = h5py.File(io.BytesIO(), "w")
    comp = population_stats(file.create_dataset("x", data=x), chunk=4000)
    ref = population_stats(x, chunk=4000)
    assert_same_bits(comp.m2, ref.m2)


@kinds
def test_several_datasets(kind):
    """The chunks of one dataset divide the channels; those of another do not."""
    x = drawn(SHAPE, "float32")
    data = [KINDS[kind](x[:25], (25, 2, 5, 5)), KINDS[kind](x[25:], (7, 6, 20, 10))]
    comp = population_stats((stored.dataset for stored in data), chunk=2000)
    assert_statistics(comp, x, merges=merges_of(x.size))
    assert all(set(stored.reads()) == {1} for stored in data)


@pytest.mark.parametrize("group", ["zarr", "h5py", "xarray", "dict"])
def test_what_holds_several_arrays_is_refused(group):
    x = np.zeros((4, 3))
    data = {
        "zarr": lambda: zarr.create_group(CountingStore()),
        "h5py": lambda: h5py.File(io.BytesIO(), "w"),
        "xarray": lambda: xr.Dataset({"x": (("a", "b"), x)}),
        "dict": lambda: {"x": x},
    }[group]()
    with pytest.raises(TypeError, match=r"^data must be an array .* got .*; pass data\[key\]$"):
        population_stats(data)


@kinds
def test_bytes_in_a_file(kind):
    x = np.random.default_rng(0).integers(256, size=SHAPE, dtype=np.uint8)
    comp = population_stats(KINDS[kind](x, (7, 2, 20, 10)).dataset, chunk=6000)
    assert_statistics(comp, x.astype("float32"), merges=merges_of(x.size))


def test_integers_in_a_file_are_named(tmp_path):
    stored = InZarr(np.zeros((40, 3), int), (10, 3))
    with pytest.raises(TypeError, match=r"^data has dtype int64"):
        population_stats(stored.dataset)


# Memory


MEMORY = """
import re, sys
import h5py, numpy as np, xarray, zarr
from nbnorm.population import CHUNK, population_stats
path, kind = sys.argv[1:]
options = {"engine": "zarr", "chunks": None, "consolidated": False}
data = {
    "zarr": lambda: zarr.open_array(f"{path}/x", mode="r"),
    "h5py": lambda: h5py.File(path, "r")["x"],
    "xarray": lambda: xarray.open_dataset(path, **options)["x"],
}[kind]()
population_stats(np.asarray(data[:8]))  # compile, start threads
def peak(function):
    open("/proc/self/clear_refs", "w").write("5")
    before = int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
    function()
    most = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
    return 1024 * (most - before) / (4 * CHUNK)
print(peak(lambda: population_stats(data)), peak(lambda: np.asarray(data[...])))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
@pytest.mark.parametrize("digits", [0, 20], ids=["compressible", "incompressible"])
@pytest.mark.parametrize("kind", ["zarr", "h5py", "xarray"])
def test_memory_stays_under_two_chunks(tmp_path, kind, digits):
    """Of the default size, 32 MiB, by all that the process holds; the file has four."""
    shape, chunks = (512, 4, 128, 128), (8, 4, 128, 128)
    path, rng = tmp_path / "x", np.random.default_rng(0)
    values = np.ldexp(rng.integers(0, 4 << digits, (64, *shape[1:])), -digits)
    if kind == "h5py":
        file = h5py.File(path, "w")
        x = file.create_dataset("x", shape, "f4", chunks=chunks, compression=1)
    else:
        x = zarr.create_group(path).create_array(
            "x", shape=shape, chunks=chunks, dtype="f4", dimension_names=DIMS
        )
    for i in range(0, shape[0], 64):
        x[i : i + 64] = values
    if kind == "h5py":
        file.close()
    ours, whole = map(float, run_child("-c", MEMORY, str(path), kind).split())
    assert ours < 2
    assert whole > 3.5


# xarray


def labelled(x, *dims):
    return xr.DataArray(x, dims=dims)


@pytest.mark.parametrize(
    ("names", "axis"),
    [("band", 1), (("band",), 1), (("x", "band"), (3, 1)), (("band", -1), (1, 3)), (1, 1)],
    ids=str,
)
def test_dimensions_have_names(names, axis):
    x = drawn(SHAPE, "float32")
    ref = population_stats(x, axis=axis, chunk=4000)
    array = labelled(x, *DIMS)
    for data in (array, array.variable, iter([array])):
        comp = population_stats(data, axis=names, chunk=4000)
        assert type(comp.mean) is np.ndarray
        assert_same_bits(comp.mean, ref.mean)
        assert_same_bits(comp.m2, ref.m2)


def test_a_name_may_be_another_axis_in_each_array():
    x = drawn(SHAPE)
    data = [labelled(x[:20], *DIMS), labelled(x[20:], *DIMS).transpose("y", "x", "time", "band")]
    comp = population_stats(data, axis="band")
    assert_statistics(comp, x, merges=merges_of(2))


@pytest.mark.parametrize(
    ("data", "axis", "error", "match"),
    [
        ("labelled", "bands", ValueError, r"^axis 'bands' is not a dimension of data, .*'band'"),
        ("labelled", ("band", 1), ValueError, r"^axis .* names an axis of data .* twice"),
        ("labelled", ("band", 1.0), TypeError, r"^axis must be an int"),
        ("labelled", DIMS, ValueError, r"leaves no axis"),
        ("integers", "band", TypeError, r"^data has dtype int64"),
        ("plain", "band", TypeError, r"^axis must be an int .* got 'band'; only axes of xarray"),
    ],
)
def test_names_that_are_refused(data, axis, error, match):
    x = np.zeros((4, 3, 2, 2))
    arrays = {"labelled": labelled(x, *DIMS), "plain": x}
    arrays["integers"] = labelled(x.astype(int), *DIMS)
    with pytest.raises(error, match=match):
        population_stats(arrays[data], axis=axis)


def test_an_array_of_xarray_in_a_zarr_file_is_read_chunk_by_chunk():
    x = drawn(SHAPE, "float32", offset=2.0)
    store = CountingStore()
    encoding = {"x": {"chunks": (7, 2, 20, 10)}}
    xr.Dataset({"x": labelled(x, *DIMS)}).to_zarr(store, encoding=encoding, consolidated=False)
    with xr.open_dataset(store, engine="zarr", chunks=None, consolidated=False) as dataset:
        for _ in range(2):  # nothing is kept in memory
            store.reads.clear()
            comp = population_stats(dataset["x"], axis="band", chunk=3000)
            assert_statistics(comp, x, merges=merges_of(30))
            assert list(store.reads.values()) == [1] * 27


def test_an_array_of_xarray_in_a_netcdf_file(tmp_path):
    """Stored as scaled integers, computed as floats."""
    x = drawn((60, 3, 8), "float32")
    encoding = {"x": {"dtype": "int16", "scale_factor": 2.0**-10, "_FillValue": -(2**15)}}
    dataset = xr.Dataset({"x": labelled(x, "time", "band", "y")})
    dataset.to_netcdf(tmp_path / "x.nc", engine="scipy", encoding=encoding)
    with xr.open_dataset(tmp_path / "x.nc", engine="scipy") as dataset:
        comp = population_stats(dataset["x"], axis="band", chunk=500)
        rounded = dataset["x"].to_numpy()
    assert_statistics(comp, rounded, merges=merges_of(3))
    assert np.abs(rounded - x).max() <= 2.0**-10


def test_an_array_of_xarray_with_blocks_of_dask():
    x = drawn(SHAPE, offset=2.0)
    data = labelled(x, *DIMS).chunk(time=7, band=2)
    assert isinstance(data.data, da.Array)
    comp = population_stats(data, axis="band")
    ref = population_stats(da.from_array(x, chunks=(7, 2, 20, 10)))
    assert_same_bits(comp.m2, ref.m2)
    assert_statistics(comp, x, merges=merges_of(9))


# Progress and checkpoints


def streams(x):
    """Yield data with the values of x, each time anew."""
    yield "zarr", lambda: InZarr(x, (7, 6, 20, 10)).dataset
    yield "zarr, divided channels", lambda: InZarr(x, (30, 2, 20, 10)).dataset
    yield "h5py", lambda: InHDF5(x, (7, 6, 20, 10)).dataset
    yield "xarray", lambda: labelled(x, *DIMS)
    yield "dask", lambda: da.from_array(x, chunks=(7, 6, 20, 10))
    yield "xarray of dask", lambda: labelled(x, *DIMS).chunk(time=4)
    yield "batches", lambda: [x[i : i + 9] for i in range(0, 60, 9)]
    yield "arrays of dask", lambda: [da.from_array(x[i : i + 30], chunks=8) for i in (0, 30)]


STREAMS = dict(streams(drawn(SHAPE, "float32")))
every_stream = pytest.mark.parametrize("name", STREAMS)


@every_stream
def test_a_callable_is_told_of_the_progress(name):
    calls = []
    comp = population_stats(STREAMS[name](), chunk=9000, progress=lambda *call: calls.append(call))
    done, totals = zip(*calls, strict=True)
    assert done[0] == 0
    assert done[-1] == 72_000
    assert len(done) > 6
    assert list(done) == sorted(done)
    assert set(totals) == {72_000}
    assert all(type(values) is int for values in done + totals)
    assert_same_bits(comp.m2, population_stats(STREAMS[name](), chunk=9000).m2)


def test_the_total_may_be_unknown():
    x = da.from_array(drawn((50, 3)), chunks=(7, 3))
    for data in (iter([drawn((50, 3))]), x[x[:, 0] > 0], [x[x[:, 0] > 0]]):
        calls = []
        population_stats(data, progress=lambda *call, told=calls: told.append(call))
        assert calls[0] == (0, None)
        assert calls[-1][0] > 0
        assert calls[-1][1] is None


class StopError(Exception):
    pass


@every_stream
@pytest.mark.parametrize("values", [1, 20_000, 40_000])
def test_every_stream_goes_on_where_it_was(name, values, tmp_path, monkeypatch):
    monkeypatch.setattr(population, "BLOCKS", 2)
    monkeypatch.setattr(_checkpoint, "SHARE", 1e9)
    options = {"chunk": 9000, "checkpoint": tmp_path / "checkpoint"}
    calls = []

    def stop(done, total):
        if done >= values:
            raise StopError

    with pytest.raises(StopError):
        population_stats(STREAMS[name](), progress=stop, **options)
    comp = population_stats(STREAMS[name](), progress=lambda *call: calls.append(call), **options)
    ref = population_stats(STREAMS[name](), checkpoint=tmp_path / "other", chunk=9000)
    assert type(comp) is Moments
    assert comp.count == ref.count
    assert_same_bits(comp.mean, ref.mean)
    assert_same_bits(comp.m2, ref.m2)
    assert calls[-1] == (72_000, 72_000)
    if values == 40_000:
        assert calls[0][0] > 20_000
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("blocks", [1, 2, 4, 8, 64])
def test_blocks_of_dask_in_groups_have_the_same_bits(blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(population, "BLOCKS", blocks)
    data = da.from_array(drawn((61, 3, 4), offset=1e4), chunks=(4, 3, 4))
    comp = population_stats(data, checkpoint=tmp_path / "checkpoint")
    ref = population_stats(data)
    assert_same_bits(comp.mean, ref.mean)
    assert_same_bits(comp.m2, ref.m2)


def test_results_are_of_the_library_after_going_on(tmp_path):
    torch = pytest.importorskip("torch", reason="tensors need torch")
    batches = [torch.from_numpy(drawn((n, 3), seed=n)) for n in (5, 6, 7)]

    def broken():
        yield from batches[:2]
        raise StopError

    with pytest.raises(StopError):
        population_stats(broken(), checkpoint=tmp_path / "checkpoint")
    comp = population_stats(batches, checkpoint=tmp_path / "checkpoint")
    assert type(comp.mean) is torch.Tensor
    assert_same_bits(comp.mean.numpy(), population_stats(batches).mean.numpy())


def test_a_checkpoint_divides_a_file_as_before(tmp_path):
    """Chunks of the file are part of what must agree."""
    x = drawn(SHAPE)
    with pytest.raises(StopError):
        population_stats(
            [InZarr(x, (7, 6, 20, 10)).dataset, Stored(x)],
            chunk=9000,
            checkpoint=tmp_path / "c",
            progress=_stop_at(10_000),
        )
    with pytest.raises(ValueError, match="of other data"):
        population_stats(InZarr(x, (5, 6, 20, 10)).dataset, chunk=9000, checkpoint=tmp_path / "c")


def _stop_at(values):
    def stop(done, total):
        if done >= values:
            raise StopError

    return stop
