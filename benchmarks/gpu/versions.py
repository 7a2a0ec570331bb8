"""Print the environment; exit with status 1 and the reason if something needed is missing.

Versions come first, as they explain most later failures.
"""

import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.gpu import records

PACKAGES = (
    "numpy", "ml-dtypes", "numba", "numba-cuda", "llvmlite", "cuda-core", "cuda-bindings",
    "cuda-pathfinder", "nvidia-nvvm", "nvidia-cuda-nvrtc", "nvidia-nvjitlink", "cupy-cuda13x",
    "cupy-cuda12x", "torch", "triton", "pytest", "hypothesis",
)  # fmt: skip
LIBRARIES = ("nvvm", "nvrtc", "nvJitLink", "cudart")
TOOLS = ("nvidia-smi", "compute-sanitizer", "ncu")


def versions() -> dict[str, str]:
    """Return the versions of installed packages."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _gpu() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()


def _libraries() -> str:
    from cuda.pathfinder import load_nvidia_dynamic_lib

    return ", ".join(str(load_nvidia_dynamic_lib(name).abs_path) for name in LIBRARIES)


def _compiled() -> str:
    """Compile one of nbnorm's kernels for this GPU and load it."""
    from nbnorm.cuda import kernels, loading

    kernel = kernels.rstd_all
    loaded = loading.load(kernel, kernels.signature(kernel, "float64", "float64"))
    return f"a kernel compiles and loads, handle {loaded.handle:#x}"


def _cupy() -> str:
    import cupy

    cupy.ones(3).sum().item()
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    facts = ("major", "minor", "multiProcessorCount", "l2CacheSize", "sharedMemPerBlockOptin")
    return ", ".join(f"{name} {properties.get(name)}" for name in facts)


def _limits() -> str:
    from nbnorm.cuda import launch

    shared, clusters = launch.limits()
    return f"{shared} bytes of shared memory a block, {'' if clusters else 'no '}clusters"


def _torch() -> str:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")
    return f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"


Look = Callable[[], str]
# In this order: each check needs the earlier ones to succeed.
NEEDED: dict[str, Look] = {
    "GPU": _gpu, "libraries": _libraries, "compiler": _compiled, "CuPy": _cupy, "limits": _limits,
}  # fmt: skip
WANTED: dict[str, Look] = {"PyTorch": _torch}


def looked(parts: dict[str, Look]) -> Iterator[tuple[str, str, bool]]:
    """Yield name, description, and whether it was found."""
    for name, look in parts.items():
        try:
            yield name, look(), True
        except Exception as error:
            yield name, f"{type(error).__name__}: {error}"[:500], False


def run(*, dry: bool) -> dict[str, Any]:
    """Print and return the environment; exit with status 1 if something needed is missing."""
    found: dict[str, Any] = versions()
    print(", ".join(f"{name} {number}" for name, number in found.items()), flush=True)
    tools = {tool: shutil.which(tool) or "not found" for tool in TOOLS}
    print(", ".join(f"{tool}: {where}" for tool, where in tools.items()), flush=True)
    missing = []
    for name, what, there in looked(NEEDED | WANTED):
        print(f"{name}: {'' if there else 'MISSING: '}{what}", flush=True)
        found[name] = what
        missing += [name] if name in NEEDED and not there else []
    records.add("environment", found=found)
    if missing and not dry:
        sys.exit(f"nothing can run here without: {', '.join(missing)}")
    return found
