"""The state of the source that kernels are compiled from."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from importlib.resources import files
from importlib.resources.abc import Traversable


def digest(folder: Traversable) -> str | None:
    """Digest of all modules in a folder or zip; None where there are none to be read."""
    with suppress(Exception):  # a zip replaced under us, a loader that shows no files
        modules = {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in folder.iterdir()
            if file.name.endswith((".py", ".pyc"))
        }
        if modules:
            return hashlib.sha256(repr(sorted(modules.items())).encode()).hexdigest()
    return None


def now() -> str | None:
    """Digest of the modules of this package as they are at this moment."""
    return digest(files("nbnorm.cpu"))


# Taken before the modules are imported, and compared when a kernel is kept: an edit in between
# would file old kernels under new source for good (seen: means wrong by 0.2).
IMPORTED = now()
