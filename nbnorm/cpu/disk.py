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

# A file while it is written: the name it will have, then 32 random digits.
_PART = re.compile(r"nbnorm-\w+-[0-9a-f]{24}\.nbc\.[0-9a-f]{32}")
# Seconds. To write a file takes milliseconds: an older one was left by a process that was killed.
_LEFT = 3600


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

    A file begins with a checksum of its key and content. Unless it is, to the bit, what was
    written under this name, it is a miss, before it is unpickled or given to LLVM. One zeroed page
    of machine code used to end every process that loaded it, until someone deleted the file.
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
        file = f"nbnorm-{self._name}-{digest.hexdigest()[:24]}.nbc"
        return Path(self.cache_path) / file, digest.digest()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the compiled kernel, or None if its file is missing or damaged."""
        target_context.refresh()
        path, key = self._place(sig, target_context.codegen())
        with suppress(Exception):
            checksum, content = _cut(path.read_bytes())
            if checksum == _checksum(key, content):
                return self._numba.rebuild(target_context, pickle.loads(content))
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Write a temporary file, then rename it: other processes see all of it or nothing."""
        if sources.now() != sources.IMPORTED or not self._numba.check_cachable(data):
            return
        path, key = self._place(sig, data.codegen)
        content = dumps(self._numba.reduce(data))
        _remove_leftovers(path.parent)
        # Not numbered by process: containers that share a folder have the same numbers.
        part = path.with_name(f"{path.name}.{uuid4().hex}")
        with suppress(OSError):  # a full disk, a folder gone: the kernel is compiled all the same
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                part.write_bytes(_checksum(key, content) + content)
                part.replace(path)
            finally:
                with suppress(OSError):  # renamed, mostly; an interrupt goes on
                    part.unlink()


def _remove_leftovers(folder: Path) -> None:
    """Remove what processes left that were killed while they wrote; nothing where that fails."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _PART.fullmatch(entry.name):
                with suppress(OSError):  # another process was here first
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime > _LEFT:
                        os.unlink(entry.path)


def _checksum(key: bytes, content: bytes) -> bytes:
    return hashlib.sha256(key + content).digest()


def _cut(file: bytes) -> tuple[bytes, bytes]:
    """Return the checksum and the content."""
    size = hashlib.sha256().digest_size
    return file[:size], file[size:]
