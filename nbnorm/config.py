"""Versions, hardware and settings of this installation, for bug reports."""

import platform
from importlib.util import find_spec

import llvmlite
import llvmlite.binding
import numba
import numpy as np

from nbnorm import pool
from nbnorm._version import __version__
from nbnorm.cpu.kernels import cache_folder

# CPU features that determine the vector width of the kernels and the conversion of 16-bit floats in
# hardware. LLVM reports a hundred others.
_FEATURES = "sse4.2 avx avx2 fma f16c avx512f avx512vl avx512bf16 avx512fp16 neon fullfp16 bf16 sve"


def show_config() -> None:
    """Print versions, CPU, threads, threading layer, cache folder and CUDA state.

    ``python -m nbnorm`` does the same. The function has no side effects: it compiles no kernel,
    starts no thread, and only reports whether CUDA's packages are installed.

    Examples
    --------
    >>> import nbnorm
    >>> nbnorm.show_config()  # doctest: +ELLIPSIS
    nbnorm ...
    CUDA ...
    """
    lines = {
        "nbnorm": __version__,
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "NumPy": np.__version__,
        "Numba": f"{numba.__version__}, llvmlite {llvmlite.__version__}",
        "CPU": f"{llvmlite.binding.get_host_cpu_name()}: {_cpu_features()}",
        **_threads(),
        "kernel cache": cache_folder() or "none: no folder can be written to",
        "pool": "{:.1f} of {:.1f} MiB idle".format(*(n / 2**20 for n in pool.idle())),
        "CUDA": f"numba-cuda {_installed('numba_cuda')}, CuPy {_installed('cupy')}",
    }
    for name, value in lines.items():
        print(f"{name:<16}{value}")


def _cpu_features() -> str:
    """Return the host's CPU features that matter to the kernels."""
    host = llvmlite.binding.get_host_cpu_features()
    return " ".join(name for name in _FEATURES.split() if host.get(name)) or "none of note"


def _threads() -> dict[str, str]:
    """Return the number of threads and their layer, or how Numba will choose it."""
    layer: str
    most = numba.config.NUMBA_NUM_THREADS
    try:
        layer, threads = numba.threading_layer(), numba.get_num_threads()
    except ValueError:  # not started yet: get_num_threads alone would start them
        layer, threads = "not chosen yet", most
    asked, priority = numba.config.THREADING_LAYER, numba.config.THREADING_LAYER_PRIORITY
    return {
        "threads": f"{threads} of {most}",
        "threading layer": f"{layer} (asked for: {asked}; priority: {', '.join(priority)})",
    }


def _installed(package: str) -> str:
    """Return "installed" or "not installed" for a top-level package, without importing it."""
    return "not installed" if find_spec(package) is None else "installed"
