"""Compiling and loading kernels: the one file that depends on numba-cuda's internals.

Numba's only public way to run a kernel is its own launch. Our launch needs attributes of a loaded
kernel that are not public; they are read here. pyproject.toml says which numba-cuda has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from cuda.pathfinder import DynamicLibNotFoundError
from numba.cuda import types
from numba.cuda.cudadrv.error import NvvmSupportError

_PACKAGES = ("numba-cuda", "numba", "llvmlite", "cuda-core", "cuda-bindings", "cuda-pathfinder")


class Loaded(NamedTuple):
    """A kernel on a device."""

    owner: Any  # unloads the kernel when it is collected
    handle: int  # the driver's CUkernel
    shared: int  # bytes of shared memory that every block needs


def load(kernel: Any, kinds: tuple[Any, ...]) -> Loaded:
    """Compile a kernel for arguments of these types and load it on the current device."""
    with _explained(kernel):
        owner = kernel.compile(types.void(*kinds))._codelibrary.get_cufunc()
        # cuda-core's handle is an int or an object of cuda-bindings, which int() accepts.
        return Loaded(owner, int(owner.kernel.handle), int(owner.attrs.shared))


@contextmanager
def _explained(kernel: Any) -> Iterator[None]:
    """Raise an error that says what to do if numba-cuda lacks a part or has other internals."""
    try:
        yield
    except (NvvmSupportError, DynamicLibNotFoundError) as error:
        reason = str(error).partition("\n")[0]  # the folders that were searched follow
        raise RuntimeError(
            "CUDA's compiler is incomplete: install nbnorm-kernels[cuda], or set CUDA_HOME to a "
            f"CUDA toolkit such as /usr/local/cuda; {_versions()} ({reason})"
        ) from error
    except (AttributeError, TypeError) as error:
        raise RuntimeError(
            f"nbnorm could not load the kernel {kernel.py_func.__name__}: incompatible versions "
            f"{_versions()}; expected numba-cuda 0.30 or later ({error})"
        ) from error


def _versions() -> str:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)
