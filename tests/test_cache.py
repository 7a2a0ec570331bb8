"""Kernels on disk: found by their whole key, and recompiled if a file is damaged."""

import os
import pickle
import shutil
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np
import pytest
from children import run_child

import nbnorm
from nbnorm.cpu import disk, jit, sources


def tiny(values):
    values[0] += 1


def other(values):
    values[0] -= 1


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The only folder for kernels; it does not exist yet."""
    monkeypatch.setattr(numba.config, "CACHE_LOCATOR_CLASSES", "UserProvidedCacheLocator")
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


def loaded(function=tiny, dtype="f8", kernel=None):
    """Call a kernel as a new process would; return whether it came from disk."""
    kernel = kernel or jit.entry(function.__name__)(function)
    values, expected = np.zeros(2, dtype), np.zeros(2, dtype)
    function(expected)
    kernel(values)
    np.testing.assert_array_equal(values, expected)
    return bool(kernel.stats.cache_hits)


def kept(folder):
    """Return the files of all kernels; assert that there are no other files."""
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    assert all(path.name.startswith("nbnorm-") and path.suffix == ".nbc" for path in files), files
    return files


def compiled(function=tiny):
    """Return a kernel's cache, signature and compile result."""
    kernel = jit.entry(function.__name__)(function)
    loaded(function, kernel=kernel)
    (sig,) = kernel.signatures
    return kernel._cache, sig, kernel.overloads[sig]


def readable(cache, sig, result):
    return cache.load_overload(sig, result.target_context) is not None


def test_found_again(folder):
    assert not loaded()
    assert loaded()
    assert not loaded(dtype="f4")
    assert not loaded(other)
    assert len(kept(folder)) == 3
    assert loaded(other)
    assert loaded(dtype="f4")


# Damage. A damaged file must count as a miss, and be written again.

DAMAGE = {
    "empty": lambda file: b"",
    "less than the checksum": lambda file: file[:20],
    "the checksum alone": lambda file: file[:32],
    "half": lambda file: file[: len(file) // 2],
    "one byte short": lambda file: file[:-1],
    "one byte more": lambda file: file + b"\0",
    "a page of zeros": lambda file: file[:4096] + bytes(4096) + file[8192:],
    "all zeros": lambda file: bytes(len(file)),
    "a pickled None": lambda file: pickle.dumps(None),
    "no checksum": lambda file: file[32:],
    "text": lambda file: b"not a kernel\n" * 1000,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_compiled_again(folder, damage):
    assert not loaded()
    (file,) = kept(folder)
    file.write_bytes(damage(file.read_bytes()))
    assert not loaded()
    assert loaded()
    assert kept(folder) == [file]


@pytest.mark.parametrize("what", [(other, "f8"), (tiny, "f4")], ids=["kernel", "signature"])
def test_another_file_in_its_place_is_compiled_again(folder, what):
    loaded()
    (file,) = kept(folder)
    loaded(*what)
    (another,) = {*kept(folder)} - {file}
    shutil.copy(another, file)
    assert not loaded()
    assert loaded()


@pytest.mark.parametrize(
    "content",
    [b"", pickle.dumps(None), pickle.dumps((1, 2)), b"cnbnorm.gone\nGone\n.", b"cnbnorm\nGone\n."],
    ids=["nothing", "None", "a tuple", "a missing module", "a missing class"],
)
def test_what_cannot_be_rebuilt_is_compiled_again(folder, content):
    cache, sig, result = compiled()
    path, key = cache._place(sig, result.library.codegen)
    path.write_bytes(disk._checksum(key, content) + content)
    assert not loaded()
    assert loaded()


def test_a_file_that_cannot_be_read_is_compiled_again(folder, monkeypatch):
    read = Path.read_bytes

    def refuse(path):
        if path.suffix == ".nbc":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    loaded()
    (file,) = kept(folder)
    file.write_bytes(b"what cannot be read may be anything")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", refuse)
        assert not loaded()
    assert loaded()


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
def test_a_link_to_itself_is_replaced(folder):
    loaded()
    (file,) = kept(folder)
    file.unlink()
    file.symlink_to(file)
    assert not loaded()
    assert loaded()


def test_a_folder_in_its_place_is_left_alone(folder):
    loaded()
    (file,) = kept(folder)
    file.unlink()
    (file / "something").mkdir(parents=True)
    assert not loaded()
    assert not loaded()
    assert not kept(folder)
    assert (file / "something").exists()


def test_no_single_bit_goes_unnoticed(tmp_path):
    """Run in a child process: LLVM would abort it if it loaded damaged code."""
    script = """if True:
        from pathlib import Path
        import numpy as np
        from nbnorm import cpu
        from nbnorm.cpu.kernels import rstd_all

        cpu.rstd(np.ones(3), 0.0)
        (sig,), cache = rstd_all.signatures, rstd_all._cache
        (file,) = Path(cache.cache_path).glob("nbnorm-rstd_all-*")
        whole = file.read_bytes()
        for bit in np.linspace(0, 8 * len(whole) - 1, 40, dtype=int):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            assert cache.load_overload(sig, rstd_all.targetctx) is None, bit
        file.write_bytes(whole)
        assert cache.load_overload(sig, rstd_all.targetctx) is not None
    """
    run_child("-c", script, NUMBA_CACHE_DIR=str(tmp_path))


# Writing. The file is always the old or the new one, and no other file is left beside it.


def test_a_full_disk(folder):
    resource = pytest.importorskip("resource")
    cache, sig, result = compiled()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        assert not loaded(other)
        cache.save_overload(sig, result)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(kept(folder)) == 1
    assert readable(cache, sig, result)
    assert not loaded(other)
    assert loaded(other)


# A file that is open at the interrupt is closed, with a warning, when its last reference goes.
@pytest.mark.filterwarnings("ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("first", [True, False])
def test_an_interrupt_at_any_line(folder, monkeypatch, first):
    cache, sig, result = compiled()
    (file,) = kept(folder)
    monkeypatch.setattr(sources, "now", lambda: sources.IMPORTED)  # skip a hundred irrelevant lines
    for line in range(1000):
        if first:
            file.unlink(missing_ok=True)
        # In a new thread, as an exception that a trace raises in a handler stays the current one.
        with ThreadPoolExecutor(1) as thread:
            done = thread.submit(interrupted, lambda: cache.save_overload(sig, result), line)
        if not done.result():
            break
        assert kept(folder) in ([[], [file]] if first else [[file]])
        assert readable(cache, sig, result) == file.exists()
    assert 10 < line < 999


def interrupted(function, line):
    """Interrupt a function at a line of disk.py, or of pathlib below it; return whether it was."""

    def trace(frame, event, _):
        nonlocal line
        code = frame.f_code.co_filename
        if code != disk.__file__ and "pathlib" not in code:
            return None
        line -= event == "line"
        if line < 0:
            raise KeyboardInterrupt
        return trace

    tracing = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(tracing)
    assert line >= 0, "the interrupt was swallowed"
    return False


def test_what_a_killed_process_left_is_removed(folder):
    loaded()
    (file,) = kept(folder)
    digits = "0123456789abcdef" * 2

    def left(name, seconds):
        """Return a file of this name, written `seconds` ago."""
        path = file.with_name(name)
        path.write_bytes(b"half a kernel")
        os.utime(path, (time.time() - seconds,) * 2)
        return path

    removed = [
        left(f"{file.name}.{digits}", 4000),
        left(f"nbnorm-b-{digits[:24]}.nbc.{digits}", 1e6),
    ]
    stay = [
        left(f"{file.name}.{digits[::-1]}", 3000),  # another process may still be writing it
        left(f"{file.name}.{'0' * 32}", -4000),  # the writer's clock is ahead
        # Files that are not nbnorm's.
        left(f"{file.name}.orig", 1e6),
        left(f"{file.name}.{digits}.orig", 1e6),
        left(f"{file.name}.{digits[1:]}", 1e6),
        left(f"my-{file.name}.{digits}", 1e6),
    ]
    loaded(other)
    assert not any(path.exists() for path in removed)
    assert all(path.exists() for path in (file, *stay))


@pytest.mark.parametrize("failing", ["scandir", "unlink"])
def test_leftovers_that_cannot_be_removed_stay(folder, monkeypatch, failing):
    loaded()
    (file,) = kept(folder)
    left = file.with_name(f"{file.name}.{'0' * 32}")
    left.write_bytes(b"half a kernel")
    os.utime(left, (0, 0))

    real = getattr(os, failing)

    def refuse(path):
        if folder in (path, *Path(path).parents):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)  # Python 3.13 lists the package's source with it

    with monkeypatch.context() as patched:
        patched.setattr(disk.os, failing, refuse)
        assert not loaded(other)
        assert left.exists()
    assert loaded(other)
    assert not loaded(other, dtype="f4")
    assert not left.exists()


WEEK = 7 * 24 * 3600


def aged(path, seconds):
    """Return a file, created if missing, that was last used `seconds` ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (time.time() - seconds,) * 2)
    return path


def test_unused_kernels_of_earlier_versions_are_removed(folder):
    loaded()
    (file,) = kept(folder)
    kernel = file.name[: -len("0123456789abcdef.nbc")]  # up to the state
    other_kernel = "nbnorm-a-01234567"
    assert not kernel.endswith("01234567")
    end = "0123456789abcdef.nbc"
    place = file.parent.name[:-40]
    like = file.parents[1] / f"{place}{'0' * 40}", file.parents[1] / f"{place}{'1' * 40}"
    removed = [
        aged(file.with_name(other_kernel + end), 9 * WEEK),
        aged(like[0] / (other_kernel + end), 9 * WEEK),
        aged(like[1] / (other_kernel + end), 9 * WEEK),
    ]
    stay = [
        aged(file, 99 * WEEK),  # of this version, as in an old image
        aged(file.with_name(kernel + end), 99 * WEEK),
        aged(file.with_name("nbnorm-b-01234567" + end), 7 * WEEK),  # in use
        # Files that are not nbnorm's, or not of this place.
        aged(file.with_name("my-" + other_kernel + end), 99 * WEEK),
        aged(file.with_name(other_kernel + end + ".orig"), 99 * WEEK),
        aged(file.with_name("tiny.tiny-28.py311.1.nbc"), 99 * WEEK),
        aged(like[1] / "tiny.tiny-28.py311.1.nbc", 99 * WEEK),
        aged(folder / (other_kernel + end), 99 * WEEK),
        aged(folder / "mine" / (other_kernel + end), 99 * WEEK),
        aged(folder / f"my_{place}{'0' * 40}" / (other_kernel + end), 99 * WEEK),
    ]
    empty = folder / f"{place}{'2' * 40}"  # another program may be about to write to it
    empty.mkdir()
    assert not loaded(other)
    assert not any(path.exists() for path in removed)
    assert all(path.exists() for path in (*stay, empty))
    assert not like[0].exists()
    for path in stay[1:]:
        path.unlink()
    assert loaded()


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
def test_what_a_link_leads_to_is_not_removed(folder, tmp_path):
    loaded()
    (file,) = kept(folder)
    kernel = aged(tmp_path / "elsewhere" / "nbnorm-a-0123456789abcdef01234567.nbc", 99 * WEEK)
    link = file.parents[1] / f"{file.parent.name[:-40]}{'0' * 40}"
    link.symlink_to(kernel.parent, target_is_directory=True)
    loaded(other)
    assert kernel.exists()


def test_a_kernel_that_is_used_says_so(folder):
    loaded()
    (file,) = kept(folder)
    for seconds in (9 * WEEK, 2 * 24 * 3600, 3600, -3600):
        aged(file, seconds)
        before = file.stat().st_mtime
        assert loaded()
        after = file.stat().st_mtime
        assert (after != before) == (seconds > 24 * 3600)
    assert abs(after - time.time()) < 2 * 3600


@pytest.mark.parametrize("failing", ["scandir", "unlink", "rmdir", "utime"])
def test_what_can_be_neither_removed_nor_dated_stays(folder, monkeypatch, failing):
    loaded()
    (file,) = kept(folder)
    aged(file, 9 * WEEK)
    like = file.parents[1] / f"{file.parent.name[:-40]}{'0' * 40}"
    unused = aged(like / "nbnorm-a-0123456789abcdef01234567.nbc", 9 * WEEK)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(disk.os, failing, refuse)
        assert loaded()
        assert not loaded(other)
        assert unused.exists() == (failing in ("scandir", "unlink"))
        assert like.exists() == (failing != "utime")
    assert loaded(other)


def test_a_file_appears_whole(folder, monkeypatch):
    """Otherwise a concurrent process could read half a file."""
    whole = []
    rename = Path.replace

    def look(part, path):
        assert not path.exists()
        assert part.parent == path.parent
        whole.append(part.read_bytes())
        return rename(part, path)

    monkeypatch.setattr(Path, "replace", look)
    loaded()
    (file,) = kept(folder)
    assert whole == [file.read_bytes()]


@pytest.mark.slow  # starts processes that import the package and compile
def test_processes_that_begin_at_the_same_time(tmp_path):
    def cold(_):
        return run_child("-c", RSTD, NUMBA_CACHE_DIR=str(tmp_path))

    with ThreadPoolExecutor(6) as pool:
        assert {line.split()[0] for line in pool.map(cold, range(6))} == {"0.5"}
    assert len(kept(tmp_path)) == 1
    assert cold(None).split() == ["0.5", "1"]


# Folders that are not available.


def a_file(place):
    place.write_text("not a folder")


def a_loop(place):
    place.symlink_to(place)


def a_file_above(place):
    place.parent.rmdir()
    place.parent.write_text("not a folder")


@pytest.mark.parametrize("occupy", [a_file, a_loop, a_file_above])
@pytest.mark.parametrize("late", [False, True])
def test_no_folder(tmp_path, monkeypatch, folder, occupy, late):
    if occupy is a_loop and sys.platform == "win32":
        pytest.skip("links need a privilege on Windows")
    (tmp_path / "above").mkdir()
    place = tmp_path / "above" / "kernels"
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(place))
    kernel = jit.entry("tiny")(tiny) if late else None
    shutil.rmtree(place, ignore_errors=True)
    occupy(place)
    if not late:
        kernel = jit.entry("tiny")(tiny)
        assert kernel._cache.cache_path is None
    assert not loaded(kernel=kernel)
    assert not loaded()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder closed even to root")
@pytest.mark.parametrize("late", [False, True])
def test_a_folder_that_cannot_be_written_to(monkeypatch, folder, late):
    kernel = jit.entry("tiny")(tiny) if late else None
    monkeypatch.setattr(numba.config, "CACHE_DIR", "/proc")
    if late:
        monkeypatch.setattr(disk.KernelCache, "cache_path", "/proc/self")
    assert not loaded(kernel=kernel)
    assert not loaded()


def test_a_folder_that_is_gone_is_made_again(folder):
    kernel = jit.entry("tiny")(tiny)
    shutil.rmtree(folder)
    assert not loaded(kernel=kernel)
    assert loaded()


def test_the_package_works_without_a_folder(tmp_path):
    (tmp_path / "kernels").write_text("not a folder")
    printed = run_child(
        "-c",
        RSTD + "nbnorm.show_config()",
        NUMBA_CACHE_DIR=str(tmp_path / "kernels"),
        NUMBA_CACHE_LOCATOR_CLASSES="UserProvidedCacheLocator",
    )
    assert printed.startswith("0.5 0\n")
    assert "kernel cache    none" in printed


# Keys


def test_versions_keep_apart(folder, monkeypatch):
    loaded()
    for i in range(len(disk._VERSIONS)):
        with monkeypatch.context() as patched:
            version = ("another", *disk._VERSIONS[i + 1 :])
            patched.setattr(disk, "_VERSIONS", disk._VERSIONS[:i] + version)
            assert not loaded()
            assert loaded()
        assert len(kept(folder)) == i + 2
        assert loaded()


def test_processors_keep_apart(folder):
    cache, sig, result = compiled()

    class Codegen:
        def magic_tuple(self):
            return ("another", "processor")

    assert cache._place(sig, result.library.codegen) != cache._place(sig, Codegen())


def test_a_digest_of_every_module(tmp_path):
    package = Path(sources.__file__).parent
    modules = sorted(path.name for path in package.glob("*.py"))
    assert len(modules) > 10
    shutil.copytree(package, tmp_path / "cpu", ignore=shutil.ignore_patterns("__pycache__"))
    digests = {sources.digest(tmp_path / "cpu")}
    assert digests == {sources.now()}
    for name in modules:
        with (tmp_path / "cpu" / name).open("a") as file:
            file.write("\n")
        digests.add(sources.digest(tmp_path / "cpu"))
    (tmp_path / "cpu" / "new.py").write_text("")
    digests.add(sources.digest(tmp_path / "cpu"))
    (tmp_path / "cpu" / "new.py").rename(tmp_path / "cpu" / "newer.py")
    digests.add(sources.digest(tmp_path / "cpu"))
    assert len(digests) == len(modules) + 3


@pytest.mark.parametrize("place", ["empty", "missing"])
def test_no_source_no_digest(tmp_path, place):
    (tmp_path / "empty").mkdir()
    assert sources.digest(tmp_path / place) is None


def test_nothing_is_kept_without_source(folder, monkeypatch):
    monkeypatch.setattr(sources, "IMPORTED", None)
    assert not loaded()
    assert not loaded()
    assert not folder.exists()


# Print 1 / sqrt(4) as computed by a kernel, and whether the kernel was loaded from disk.
RSTD = """
import numpy as np
import nbnorm
from nbnorm import cpu
from nbnorm.cpu.kernels import rstd_all
print(cpu.rstd(np.array([4.0]), 0.0)[0], sum(rstd_all.stats.cache_hits.values()))
"""

# A file, its text, and text that makes the result 10 times larger. KERNEL calls CALLEE.
CALLEE = ("channel.py", "1 / np.sqrt(spread)", "10 / np.sqrt(spread)")
KERNEL = ("kernels.py", " = rstd_of(", " = 10 * rstd_of(")


def edit(place, file, old, new):
    path = place / "nbnorm" / "cpu" / file
    source = path.read_text()
    assert old in source
    path.write_text(source.replace(old, new))


def undo(place, file, old, new):
    edit(place, file, new, old)


@pytest.fixture
def checkout(tmp_path):
    """Return a folder with a copy of the package."""
    package = Path(nbnorm.__file__).parent
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, tmp_path / "checkout" / "nbnorm", ignore=ignored)
    return tmp_path / "checkout"


@pytest.fixture
def rstd(tmp_path):
    """Return a function that runs a script with a copy of the package, with a new cache."""
    caches = {
        name: str(tmp_path / "kernels") for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME")
    }

    def run(place, script=RSTD):
        value, hits = run_child("-P", "-c", script, PYTHONPATH=str(place), **caches).split()
        return float(value), int(hits)

    return run


@pytest.mark.slow  # starts processes that import the package and compile
def test_an_edited_folder(checkout, rstd):
    assert rstd(checkout) == (0.5, 0)
    edit(checkout, *CALLEE)
    assert rstd(checkout) == (5.0, 0)
    undo(checkout, *CALLEE)
    assert rstd(checkout) == (0.5, 1)


@pytest.mark.slow  # starts processes that import the package and compile
@pytest.mark.parametrize("name", ["app.zip", "app.pyz"])
def test_another_zip_in_its_place(tmp_path, checkout, rstd, name):
    def pack():
        with zipfile.ZipFile(tmp_path / name, "w") as packed:
            for path in checkout.rglob("*.py"):
                packed.write(path, path.relative_to(checkout))

    pack()
    assert rstd(tmp_path / name) == (0.5, 0)
    edit(checkout, *CALLEE)
    pack()
    assert rstd(tmp_path / name) == (5.0, 0)
    # Numba caches kernels of a package in an archive only if the archive is named .zip.
    assert rstd(tmp_path / name) == (5.0, int(name == "app.zip"))


# Edit a file when a module is first looked up, or after all are imported.
EDIT = """
import importlib.abc, pathlib, sys

class Edit(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "{moment}":
            assert name != "nbnorm.cpu.weighted_rows" or "nbnorm.cpu.kernels" in sys.modules
            edit()

def edit():
    path = pathlib.Path({path!r})
    path.write_text(path.read_text().replace({old!r}, {new!r}))

sys.meta_path.insert(0, Edit())
import nbnorm
if "{moment}" == "the end":
    edit()
"""


@pytest.mark.slow  # starts processes that import the package and compile
@pytest.mark.parametrize("moment", ["nbnorm.cpu.kernels", "nbnorm.cpu.weighted_rows", "the end"])
def test_an_edit_while_the_package_is_imported(checkout, rstd, moment):
    """Edit a file before it is read, right after it, and after all modules are imported.

    kernels.py is the first to import weighted_rows.py.
    """
    file, old, new = KERNEL
    path = str(checkout / "nbnorm" / "cpu" / file)
    script = EDIT.format(path=path, old=old, new=new, moment=moment) + RSTD
    assert rstd(checkout, script) == (5.0 if moment == "nbnorm.cpu.kernels" else 0.5, 0)
    assert rstd(checkout)[0] == 5.0
    undo(checkout, *KERNEL)
    assert rstd(checkout)[0] == 0.5
