"""Moments saved to files, and calls that resume an interrupted one with the same bits."""

import io
import os
import sys
import warnings
from itertools import count

import numpy as np
import pytest
from children import run_child
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_same_bits

from nbnorm import Moments, _checkpoint, _files, population_stats
from nbnorm._pairwise import Pairwise


def drawn(shape, dtype="float64", *, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) + 3).astype(dtype)


def assert_same(comp, ref):
    assert type(comp) is Moments
    assert type(comp.count) is type(ref.count)
    if isinstance(ref.count, np.ndarray):
        assert_same_bits(comp.count, ref.count, "count")
    else:
        assert comp.count == ref.count
    assert_same_bits(comp.mean, ref.mean, "mean")
    assert_same_bits(comp.m2, ref.m2, "m2")


# Moments


def round_trip(moments):
    file = io.BytesIO()
    moments.save(file)
    file.seek(0)
    return Moments.load(file)


@given(
    number=st.one_of(
        st.integers(0, 2**64 - 1), st.floats(0, allow_infinity=False), st.just("array")
    ),
    shape=st.sampled_from([(0,), (1,), (3,), (2, 3), (4, 1, 2)]),
    values=st.lists(st.floats(), min_size=48, max_size=48),
)
def test_moments_come_back_as_they_were(number, shape, values):
    a, b, c = np.array(values).reshape(3, 16)[:, : np.prod(shape)].reshape(3, *shape)
    moments = Moments(np.nan_to_num(np.abs(c)) if number == "array" else number, a, b)
    assert_same(round_trip(moments), moments)


@pytest.mark.parametrize("suffix", ["", ".npz", ".moments"])
@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_path_is_taken_as_it_is(tmp_path, suffix, kind):
    moments = Moments(3, np.array([1.0, 2.0]), np.array([0.5, 0.25]))
    path = tmp_path / f"file{suffix}"
    moments.save(kind(path))
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    assert_same(Moments.load(kind(path)), moments)
    with np.load(path) as stored:
        assert_same_bits(stored["mean"], moments.mean)


def test_other_float_types_become_float64():
    moments = Moments(np.int32(3), np.array([0.1], np.float32), np.array([0.5], np.float16))
    assert_same(round_trip(moments), Moments(3, np.float64([np.float32(0.1)]), np.array([0.5])))


def test_what_was_there_stays_until_the_new_file_is_whole(tmp_path, monkeypatch):
    old, new = (Moments(n, np.array([float(n)]), np.zeros(1)) for n in (1, 2))
    path = tmp_path / "moments.npz"
    old.save(path)

    def full(stream, **arrays):
        stream.write(b"half of it")
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(np, "savez", full)
        with pytest.raises(OSError, match="no space left"):
            new.save(path)
    assert_same(Moments.load(path), old)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    new.save(path)
    assert_same(Moments.load(path), new)


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
def test_a_link_is_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "file")
    moments = Moments(3, np.ones(2), np.zeros(2))
    moments.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_same(Moments.load(tmp_path / "folder" / "file"), moments)


@pytest.mark.parametrize(
    ("moments", "error", "match"),
    [
        (Moments(-1, np.zeros(1), np.zeros(1)), ValueError, r"^moments\.count must not be neg"),
        (Moments(2**64, np.zeros(1), np.zeros(1)), ValueError, r"^moments\.count must fit"),
        (Moments("3", np.zeros(1), np.zeros(1)), TypeError, r"^moments\.count must be an int"),
        (Moments(3, np.zeros(1), np.zeros(2)), ValueError, r"^moments\.m2 has shape \(2,\)"),
        (Moments(3, [0.0], np.zeros(1)), TypeError, r"^moments\.mean must be a NumPy array"),
    ],
)
def test_what_are_no_moments_is_not_written(tmp_path, moments, error, match):
    with pytest.raises(error, match=match):
        moments.save(tmp_path / "file")
    assert not list(tmp_path.iterdir())


def foreign(folder):
    """Write files of other kinds; yield each with the error expected."""
    named, array, cut = (folder / name for name in ("named.npz", "array.npy", "cut.npz"))
    np.savez(named, count=3, mean=np.zeros(3), m2=np.zeros(3))
    yield named, "holds arrays named count, mean, m2, expected 'nbnorm"
    np.save(array, np.zeros(3))
    yield array, "is not an npz file"
    _files.write(cut, "something else", {"mean": np.zeros(3)})
    yield cut, "holds 'something else', expected 'nbnorm"
    whole = cut.read_bytes()
    damaged = whole.replace(bytes(24), bytes(23) + b"1")
    for content in (b"", b"text", b"\x80\x04N.", whole[: len(whole) // 2], damaged):
        (folder / "bytes").write_bytes(content)
        yield folder / "bytes", "is not an npz file|holds 'something else'"


def test_other_files_are_refused(tmp_path):
    for path, match in foreign(tmp_path):
        with pytest.raises(ValueError, match=match) as caught:
            Moments.load(path)
        assert str(caught.value).startswith(f"file {str(path)!r} ")
    with pytest.raises(FileNotFoundError):
        Moments.load(tmp_path / "nothing")


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "file"
    Moments(3, np.full(100, 0.5), np.zeros(100)).save(path)
    whole = path.read_bytes()
    where = whole.index(np.float64(0.5).tobytes())
    path.write_bytes(whole[:where] + b"\x01" + whole[where + 1 :])
    with pytest.raises(ValueError, match=r"is not an npz file, or is damaged \(Bad CRC"):
        Moments.load(path)


@pytest.mark.parametrize(
    ("edited", "match"),
    [
        ({"m2": np.zeros(2)}, r"moments\.m2 has shape \(2,\), expected \(3,\)"),
        ({"count": np.zeros(2)}, r"moments\.count has shape \(2,\), expected \(3,\)"),
        ({"count": np.array(-1)}, r"moments\.count must not be negative, got -1"),
        ({"count": np.array("4")}, r"moments\.count must be an int or a finite float, got '4'"),
        ({"mean": np.zeros(3, int)}, r"moments\.mean has dtype int64"),
    ],
)
def test_an_edited_file_is_refused(tmp_path, edited, match):
    path = tmp_path / "file"
    Moments(4, np.zeros(3), np.zeros(3)).save(path)
    with np.load(path) as stored:
        arrays = {**stored, **edited}
    with open(path, "wb") as stream:
        np.savez(stream, **arrays)
    with pytest.raises(ValueError, match=match) as caught:
        Moments.load(path)
    assert str(caught.value).startswith(f"file {str(path)!r} ")


def test_any_byte_may_be_damaged(tmp_path):
    """Either the saved moments are loaded, or an error is raised."""
    path, moments = tmp_path / "file", Moments(3, np.array([0.5, 1.5]), np.array([0.25, 1.0]))
    moments.save(path)
    whole, refused = path.read_bytes(), 0
    for where in range(len(whole)):
        path.write_bytes(whole[:where] + bytes([whole[where] ^ 255]) + whole[where + 1 :])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zipfile warns about names
            try:
                assert_same(Moments.load(path), moments)
            except (ValueError, OSError):
                refused += 1
    assert refused > len(whole) / 2


# Checkpoints


class StopError(Exception):
    pass


class Stored:
    """Like a dataset in a file; the read with number `fail` raises an error."""

    def __init__(self, array, fail=None):
        self._array, self.shape, self.dtype = array, array.shape, array.dtype
        self.reads, self._fail = 0, fail

    def __getitem__(self, index):
        if self.reads == self._fail:
            raise StopError
        self.reads += 1
        return self._array[index]


X = drawn((41, 3, 4))


@pytest.mark.parametrize("seconds", [0.0, 1e9], ids=["always", "at the end"])
@pytest.mark.parametrize("reads", range(9))
def test_an_array_goes_on_where_it_was(tmp_path, monkeypatch, reads, seconds):
    """The checkpoint is written after every chunk, or after the first and when the call ends."""
    monkeypatch.setattr(_checkpoint, "SHARE", 1e9 if seconds == 0 else 0.0)
    file = tmp_path / "checkpoint"
    ref = population_stats(X, chunk=60)
    with pytest.raises(StopError):
        population_stats(Stored(X, reads), chunk=60, checkpoint=file)
    assert file.exists() == (reads > 0)
    rest = Stored(X)
    assert_same(population_stats(rest, chunk=60, checkpoint=file), ref)
    assert rest.reads == 9 - reads
    assert not list(tmp_path.iterdir())


def test_interrupted_again_and_again(tmp_path):
    file = str(tmp_path / "checkpoint")
    for _ in range(8):
        with pytest.raises(StopError):
            population_stats(Stored(X, 1), chunk=60, checkpoint=file)
    last = Stored(X)
    assert_same(population_stats(last, chunk=60, checkpoint=file), population_stats(X, chunk=60))
    assert last.reads == 1


@pytest.mark.parametrize("interrupt", range(1, 6))
@pytest.mark.parametrize("kind", [list, iter])
def test_arrays_go_on_where_they_were(tmp_path, kind, interrupt):
    """Finished arrays are taken from the iterable again, but are not read."""
    arrays = [drawn((n, 3), seed=n) for n in (40, 3, 0, 100, 7, 1)]
    file = tmp_path / "checkpoint"

    def broken():
        yield from arrays[:interrupt]
        raise StopError

    with pytest.raises(StopError):
        population_stats(broken(), chunk=60, checkpoint=file)
    rest = [Stored(array) for array in arrays]
    comp = population_stats(kind(rest), chunk=60, checkpoint=file)
    assert_same(comp, population_stats(arrays, chunk=60))
    assert [array.reads for array in rest[:interrupt]] == [0] * interrupt
    assert all(array.reads for array in rest[interrupt:])


def test_a_relative_path_stays_where_it_is(tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)

    def wandering():
        yield X
        os.chdir(elsewhere)
        yield X
        raise StopError

    with pytest.raises(StopError):
        population_stats(wandering(), checkpoint="checkpoint")
    assert not list(elsewhere.iterdir())
    arrays = [X] * 3
    comp = population_stats(arrays, checkpoint=tmp_path / "checkpoint")
    assert_same(comp, population_stats(arrays))


def test_within_an_array(tmp_path):
    arrays, file = [drawn((100, 3), seed=n) for n in range(3)], tmp_path / "checkpoint"
    with pytest.raises(StopError):
        population_stats([arrays[0], Stored(arrays[1], 2)], chunk=60, checkpoint=file)
    rest = [Stored(array) for array in arrays]
    assert_same(
        population_stats(rest, chunk=60, checkpoint=file), population_stats(arrays, chunk=60)
    )
    assert [array.reads for array in rest] == [0, 3, 5]


def test_an_interrupt_within_a_merge_loses_a_chunk_at_most(tmp_path, monkeypatch):
    file, ref = tmp_path / "checkpoint", population_stats(X, chunk=60)
    merges, merge = count(), Moments.merge

    def interrupted(self, *others):
        if next(merges) == 3:  # the sixth chunk, with the fifth
            raise KeyboardInterrupt
        return merge(self, *others)

    with monkeypatch.context() as patched:
        patched.setattr(Moments, "merge", interrupted)
        with pytest.raises(KeyboardInterrupt):
            population_stats(X, chunk=60, checkpoint=file)
    rest = Stored(X)
    assert_same(population_stats(rest, chunk=60, checkpoint=file), ref)
    assert rest.reads == 9 - 5


def test_a_callable_may_end_the_call(tmp_path):
    """The chunk reported to the callable is already in the file."""
    file = tmp_path / "checkpoint"

    def told(done, total):
        if done == 180:
            raise StopError

    with pytest.raises(StopError):
        population_stats(X, chunk=60, checkpoint=file, progress=told)
    calls = []
    population_stats(X, chunk=60, checkpoint=file, progress=lambda *call: calls.append(call))
    assert calls[0] == (180, 492)
    assert calls[-1] == (492, 492)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_process_that_is_killed(tmp_path):
    file = tmp_path / "checkpoint"
    np.save(tmp_path / "x.npy", X)
    code = f"""
import os, signal
import numpy as np
from nbnorm import _checkpoint, population_stats
_checkpoint.SHARE = 1e9
def told(done, total):
    if done == 300:
        os.kill(os.getpid(), signal.SIGKILL)
population_stats(
    np.load({str(tmp_path / "x.npy")!r}), chunk=60, checkpoint={str(file)!r}, progress=told
)
"""
    with pytest.raises(AssertionError, match="exit status -9"):
        run_child("-c", code)
    rest = Stored(X)
    assert_same(population_stats(rest, chunk=60, checkpoint=file), population_stats(X, chunk=60))
    assert rest.reads == 9 - 5


def test_writing_takes_its_share_of_the_time(tmp_path, monkeypatch):
    """On this clock a chunk takes 10 s and a file 1 s: it is written at once, then every 50 s."""

    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    clock, written = Clock(), []

    def write(file, content, arrays):
        clock.now += 1
        written.append(int(arrays["number"]))

    class Slow(Stored):
        def __getitem__(self, index):
            clock.now += 10
            return super().__getitem__(index)

    monkeypatch.setattr(_checkpoint, "time", clock)
    monkeypatch.setattr(_files, "write", write)
    population_stats(Slow(drawn((16, 3))), chunk=3, checkpoint=tmp_path / "checkpoint")
    assert written == [1, 6, 11, 16]


def test_all_that_is_left_may_be_nothing(tmp_path):
    file, arrays = tmp_path / "checkpoint", [X, X]

    def all_but_the_end():
        yield from arrays
        raise StopError

    with pytest.raises(StopError):
        population_stats(all_but_the_end(), checkpoint=file)
    assert_same(population_stats(arrays, checkpoint=file), population_stats(arrays))


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (X[:, :, :3], {"chunk": 60}),
        (X[:, :2], {"chunk": 60}),
        (X.astype("float32"), {"chunk": 60}),
        (X, {"chunk": 72}),
        (X, {"chunk": 60, "axis": -1}),
        ([X[:5], X[5:7]], {"chunk": 60}),
        (X[:10], {"chunk": 60}),
    ],
)
def test_a_checkpoint_of_other_data_is_refused(tmp_path, data, options):
    file = tmp_path / "checkpoint"
    with pytest.raises(StopError):
        population_stats(Stored(X, 4), chunk=60, checkpoint=file)
    content = file.read_bytes()
    with pytest.raises(ValueError, match=r"^checkpoint '.*' holds 4 parts of other data"):
        population_stats(data, checkpoint=file, **options)
    assert file.read_bytes() == content
    assert_same(population_stats(X, chunk=60, checkpoint=file), population_stats(X, chunk=60))


def test_other_files_are_no_checkpoints(tmp_path):
    Moments(3, np.zeros(3), np.zeros(3)).save(tmp_path / "moments.npz")
    others = [(tmp_path / "moments.npz", "holds 'nbnorm.Moments 1'"), *foreign(tmp_path)][:4]
    for path, match in others:
        content = path.read_bytes()
        with pytest.raises(ValueError, match=match) as caught:
            population_stats(iter(()), checkpoint=path)
        assert str(caught.value).startswith(f"checkpoint {str(path)!r} ")
        assert path.read_bytes() == content


def test_a_checkpoint_that_cannot_be_is_refused_before_data_is_touched(tmp_path):
    data = iter([X])
    for checkpoint, error, match in (
        (3, TypeError, "^checkpoint must be a path or None, got 3"),
        (tmp_path / "no" / "file", FileNotFoundError, "^checkpoint .* is not a folder$"),
        (tmp_path, IsADirectoryError, "^checkpoint '.*' is a folder, expected a file$"),
        (b"", ValueError, "^checkpoint is empty, expected a path or None$"),
        ("", ValueError, "^checkpoint is empty, expected a path or None$"),
    ):
        with pytest.raises(error, match=match):
            population_stats(data, checkpoint=checkpoint)
    assert len(list(data)) == 1


def test_the_state_of_pairs_is_their_number_and_what_waits():
    class Part(str):
        def merge(self, other):
            return Part(f"({self}{other})")

    whole = Pairwise()
    for letter in "abcdefghijk":
        whole.add(Part(letter))
        whole = Pairwise(len(whole), whole.waiting)
    assert whole.total() == "((((ab)(cd))((ef)(gh)))((ij)k))"


def test_nothing_is_written_without_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_files, "write", None)
    population_stats(X, chunk=60)
    assert not os.listdir(tmp_path)
