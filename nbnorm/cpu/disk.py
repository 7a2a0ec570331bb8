"""Compiled kernels on disk: a file for each kernel, signature, machine and state of the source."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import llvmlite
import numba
from numba.core.caching import CompileResultCacheImpl, NullCache
from numba.core.serialize import dumps

from nbnorm.cpu import sources

# Part of the key, as machine code calls into Numba and the interpreter.
_VERSIONS = (
    numba.__version__,
    llvmlite.__version__,
    sys.implementation.cache_tag,
    getattr(sys, "abiflags", ""),  # not on Windows
)

# The name of a file: kernel, state, rest of the key; while it is written, 32 random digits more.
_FILE = re.compile(r"nbnorm-\w+-([0-9a-f]{8})[0-9a-f]{16}\.nbc(\.[0-9a-f]{32})?")
# Numba's folder for functions whose source is in one folder: its name, and a digest of its path.
_FOLDER = re.compile(r"(.+)_[0-9a-f]{40}")

# Part of the names of types for which kernels hold a user's functions. They are not kept: another
# process may have other functions under the same name.
OF_A_USER = "of_a_user"

# Seconds. Writing a file takes milliseconds: an older temporary file is from a killed process.
_LEFT = 3600
# A file's date is the day of its last use. It is removed if it is older than _UNUSED and of another
# state (versions, source, processor). Neither is enough: environments and machines that share a
# folder have states of their own, and a container's image may be built long before it runs.
_DAY = 24 * 3600
_UNUSED = 8 * 7 * _DAY


def cache_of(function: Callable[..., Any], name: str) -> Any:
    """Return the cache of a kernel; one that stores nothing if it has no folder or no source."""
    if sources.IMPORTED is not None:
        with suppress(Exception):  # Numba can fail: no folder, no home, odd zips
            return KernelCache(function, name)
    return NullCache()


class KernelCache(NullCache):  # type: ignore[misc]
    """Numba's folders and pickles, in files of our own.

    Numba keys an entry by the function's own file and its pickled closure, so it does not notice
    an edited callee in another file, and never finds a closure over compiled functions again. It
    also numbers the files of a function through an index. Two processes that compile at the same
    time can take the same number, and one then loads the other's kernel.

    A file begins with a checksum of its key and content. A file that does not match is a miss, and
    is neither unpickled nor given to LLVM: a zeroed page of machine code would end every process
    that loads it, until someone deletes the file.
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self._name = name
        self._numba = CompileResultCacheImpl(function)

    @property
    def cache_path(self) -> str:
        """The folder of the files."""
        return str(self._numba.locator.get_cache_path())

    def _place(self, sig: Any, codegen: Any) -> tuple[Path, bytes]:
        """Return the file of a signature, and its key."""
        key = (self._name, str(sig), codegen.magic_tuple(), *_VERSIONS, sources.IMPORTED)
        digest = hashlib.sha256(repr(key).encode())
        state = hashlib.sha256(repr(key[2:]).encode())  # what all kernels of a process share
        file = f"nbnorm-{self._name}-{state.hexdigest()[:8]}{digest.hexdigest()[:16]}.nbc"
        return Path(self.cache_path) / file, digest.digest()

    def _of_a_user(self, sig: Any) -> bool:
        """Whether a kernel contains a user's functions, by its name and signature."""
        return OF_A_USER in self._name or OF_A_USER in str(sig)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the compiled kernel, or None if its file is missing or damaged."""
        if self._of_a_user(sig):
            return None
        target_context.refresh()
        path, key = self._place(sig, target_context.codegen())
        with suppress(Exception):
            checksum, content = _cut(path.read_bytes())
            if checksum == _checksum(key, content):
                kernel = self._numba.rebuild(target_context, pickle.loads(content))
                _note_use(path)
                return kernel
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Write a temporary file, then rename it: other processes see all of it or nothing."""
        if self._of_a_user(sig) or sources.now() != sources.IMPORTED:
            return
        if not self._numba.check_cachable(data):
            return
        path, key = self._place(sig, data.codegen)
        content = dumps(self._numba.reduce(data))
        _tidy(path)
        # Not numbered by process: containers that share a folder have the same numbers.
        part = path.with_name(f"{path.name}.{uuid4().hex}")
        with suppress(OSError):  # a full disk, a folder gone: the kernel is compiled all the same
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                part.write_bytes(_checksum(key, content) + content)
                part.replace(path)
            finally:
                with suppress(OSError):  # normally it has been renamed
                    part.unlink()


def _note_use(path: Path) -> None:
    """Set a file's date to today, if that is permitted."""
    with suppress(OSError):
        if time.time() - path.stat().st_mtime > _DAY:
            os.utime(path)


def _tidy(path: Path) -> None:
    """Remove unused files from the folder of `path` and from the package's other folders.

    Numba makes a folder for each place that the package is installed in, so old environments leave
    theirs behind. Only files with our form of name are removed, and folders that become empty. A
    running process has loaded the file that it loses, or compiles the kernel again.
    """
    folder, state = path.parent, path.name.rpartition("-")[2][:8]
    _remove_unused(str(folder), state)
    own = _FOLDER.fullmatch(folder.name)
    if own is None:
        return
    with suppress(OSError), os.scandir(folder.parent) as entries:
        for entry in entries:
            found = _FOLDER.fullmatch(entry.name)
            if found is None or found[1] != own[1] or entry.name == folder.name:
                continue
            if entry.is_dir(follow_symlinks=False) and _remove_unused(entry.path, state):
                with suppress(OSError):  # there is more in it
                    os.rmdir(entry.path)


def _remove_unused(folder: str, state: str) -> bool:
    """Remove temporary files of killed processes, and unused files of states other than `state`.

    Return whether anything was removed; errors are ignored.
    """
    removed = False
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = _FILE.fullmatch(entry.name)
            if found is None or (found[1] == state and not found[2]):
                continue
            with suppress(OSError):  # another process was here first
                age = time.time() - entry.stat(follow_symlinks=False).st_mtime
                if age > (_LEFT if found[2] else _UNUSED):
                    os.unlink(entry.path)
                    removed = True
    return removed


def _checksum(key: bytes, content: bytes) -> bytes:
    return hashlib.sha256(key + content).digest()


def _cut(file: bytes) -> tuple[bytes, bytes]:
    """Return the checksum and the content."""
    size = hashlib.sha256().digest_size
    return file[:size], file[size:]
