"""The state of the source that kernels are compiled from, as a digest."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from importlib.resources import files
from importlib.resources.abc import Traversable


def digest(folder: Traversable) -> str | None:
    """Return a digest of all modules in a folder or zip; None if none can be read."""
    with suppress(Exception):  # a zip replaced meanwhile, a loader that shows no files
        modules = {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in folder.iterdir()
            if file.name.endswith((".py", ".pyc"))
        }
        if modules:
            return hashlib.sha256(repr(sorted(modules.items())).encode()).hexdigest()
    return None


def now() -> str | None:
    """Return the digest of this package's modules as they are now."""
    return digest(files("nbnorm.cpu"))


# Taken before the modules are imported, and compared when a kernel is saved. Otherwise an edit in
# between would store old kernels under the new source for good (seen: means wrong by 0.2).
IMPORTED = now()
