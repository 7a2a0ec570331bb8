"""What this installation runs on: one page to put into a bug report."""

import platform
from importlib.util import find_spec

import llvmlite
import llvmlite.binding
import numba
import numpy as np

from nbnorm import pool
from nbnorm._version import __version__
from nbnorm.cpu.kernels import cache_folder

# The features that decide how wide the kernels' vectors are and whether halves are converted
# in hardware; a host lists a hundred others.
_FEATURES = "sse4.2 avx avx2 fma f16c avx512f avx512vl avx512bf16 avx512fp16 neon fullfp16 bf16 sve"


def show_config() -> None:
    """Print versions, CPU, threads, threading layer, cache folder and CUDA state.

    ``python -m nbnorm`` does the same. Looking changes nothing: no kernel is compiled, no thread
    started, and of CUDA's packages it only says whether they are installed.

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
    """Return those of the host's features that matter to the kernels."""
    host = llvmlite.binding.get_host_cpu_features()
    return " ".join(name for name in _FEATURES.split() if host.get(name)) or "none of note"


def _threads() -> dict[str, str]:
    """Return threads in use and their layer, or how Numba will choose it when it starts them."""
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
    """Say whether a top-level package is installed, without importing it."""
    return "not installed" if find_spec(package) is None else "installed"
