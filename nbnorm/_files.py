"""npz files of arrays, marked with their content and replaced atomically."""

import os
import pickle
import secrets
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import IO, Any

import numpy as np

from nbnorm._typing import NDArray

# What np.load raises for other or damaged files. TypeError: with .npy, `with` gets an ndarray.
_NOT_NPZ = (
    *(EOFError, KeyError, RuntimeError, TypeError, ValueError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error),
)
MARK = "format"  # name of the array that holds `content`, by which `read` knows its files


def write(file: Any, content: str, arrays: dict[str, Any]) -> None:
    """Write arrays as npz: to a path atomically, to a file object directly."""
    marked: dict[str, Any] = {MARK: np.array(content), **arrays}
    if hasattr(file, "write"):
        np.savez(file, **marked)
        return
    with _replacing(os.path.realpath(file)) as stream:
        np.savez(stream, **marked)


def read(file: Any, content: str, keys: Iterable[str], name: str) -> dict[str, NDArray]:
    """Return arrays of a file that `write` has written; `name` is the caller's argument."""
    named = named_file(file, name)
    try:
        with _opened(file) as stream, np.load(stream, allow_pickle=False) as stored:
            found = str(stored[MARK]) if MARK in stored else None
            arrays = {key: stored[key] for key in keys if found == content}
            names = ", ".join(stored) or "nothing"
    except _NOT_NPZ as error:
        raise ValueError(f"{named} is not an npz file, or is damaged ({error})") from error
    if found != content:
        holds = f"arrays named {names}" if found is None else repr(found)
        raise ValueError(f"{named} holds {holds}, expected {content!r}")
    return arrays


def named_file(file: Any, name: str) -> str:
    """Return a file's name in messages: the argument's name and the path."""
    return f"{name} {file if hasattr(file, 'read') else os.fspath(file)!r}"


def _opened(file: Any) -> AbstractContextManager[IO[bytes]]:
    # np.load does not close its file if that is not a zip file.
    return nullcontext(file) if hasattr(file, "read") else open(file, "rb")


@contextmanager
def _replacing(path: str) -> Iterator[IO[bytes]]:
    """Open a file beside `path`, which takes its place once it is whole and on the disk."""
    beside = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        with open(beside, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            os.remove(beside)
        raise
