"""What this was run on: versions, GPU, driver."""

import platform
import shutil
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.machine import DTYPES, Machine, Unavailable
from benchmarks.gpu.records import Records, say

PACKAGES = (
    "numpy", "ml-dtypes", "numba", "llvmlite", "numba-cuda", "cuda-core", "cuda-bindings",
    "cuda-toolkit", "nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-nvrtc", "nvidia-nvjitlink",
    "cupy-cuda13x", "cupy-cuda12x", "torch", "triton", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12",
)  # fmt: skip
QUERIED = (
    "name", "driver_version", "memory.total", "memory.used", "clocks.sm", "clocks.max.sm",
    "clocks.mem", "clocks.max.mem", "power.limit", "ecc.mode.current", "utilization.gpu",
)  # fmt: skip
TOOLS = ("compute-sanitizer", "ncu", "nvcc", "ptxas", "g++")


def run(machine: Machine, records: Records) -> None:
    """Record everything that can be found out; what cannot is left out."""
    parts = {
        "versions": _versions, "commit": _commit, "nvidia_smi": _queried, "tools": _tools,
        "device": lambda: _device(machine), "torch": _torch, "numba": _numba,
        "dtypes": lambda: _dtypes(machine), "cupy_bfloat16": lambda: _bfloat16(machine),
    }  # fmt: skip
    found: dict[str, Any] = {"date": date.today().isoformat(), "dry": machine.dry}
    for name, part in parts.items():
        try:
            found[name] = part()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        say(f"{name}: {found[name]}")
    records.add(**found)


def _versions() -> dict[str, str]:
    import nbnorm

    found = {"Python": platform.python_version(), "nbnorm": nbnorm.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    return _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")


def _queried() -> dict[str, str]:
    values = _output(
        "nvidia-smi", f"--query-gpu={','.join(QUERIED)}", "--format=csv,noheader"
    ).splitlines()[0]
    return dict(zip(QUERIED, map(str.strip, values.split(",")), strict=True))


def _tools() -> dict[str, str | None]:
    return {tool: shutil.which(tool) for tool in TOOLS}


def _output(*command: str) -> str:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=20, check=True
    ).stdout.strip()


def _device(machine: Machine) -> dict[str, Any]:
    if machine.dry:
        return {"name": platform.processor() or platform.machine()}
    runtime = machine.xp.cuda.runtime
    properties = runtime.getDeviceProperties(machine.xp.cuda.Device().id)
    wanted = (
        "name", "totalGlobalMem", "multiProcessorCount", "l2CacheSize", "clockRate",
        "memoryClockRate", "memoryBusWidth", "sharedMemPerMultiprocessor", "major", "minor",
    )  # fmt: skip
    found = {name: properties[name] for name in wanted if name in properties}
    found = {k: v.decode() if isinstance(v, bytes) else v for k, v in found.items()}
    numbers = {"driver": runtime.driverGetVersion(), "runtime": runtime.runtimeGetVersion()}
    return found | numbers | {"free": machine.free_bytes()}


def _torch() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda}
    found["available"] = torch.cuda.is_available()
    if found["available"]:
        found["cudnn"] = torch.backends.cudnn.version()
        found["capability"] = torch.cuda.get_device_capability()
    return found


def _numba() -> dict[str, Any]:
    import numba_cuda  # noqa: F401 - else Numba's own, older `numba.cuda` would be found
    from numba import cuda

    return {"available": cuda.is_available(), "file": cuda.__file__}


def _dtypes(machine: Machine) -> dict[str, str]:
    found = {}
    for name in DTYPES:
        try:
            machine.dtype(name)
            found[name] = "yes"
        except Unavailable as reason:
            found[name] = str(reason)
    return found


def _bfloat16(machine: Machine) -> dict[str, str]:
    """What CuPy can do in bfloat16, beyond holding it."""
    dtype, xp = machine.dtype("bfloat16"), machine.xp
    calls = {
        "zeros": lambda: xp.zeros(3, dtype),
        "full": lambda: xp.full(3, 1.5, dtype),
        "from float32": lambda: xp.ones(3, np.float32).astype(dtype),
        "from float64": lambda: xp.ones(3, np.float64).astype(dtype),
        "to float32": lambda: xp.empty(3, dtype).astype(np.float32),
        "to float64": lambda: xp.empty(3, dtype).astype(np.float64),
        "copy of a strided array": lambda: xp.ascontiguousarray(xp.empty((3, 4), dtype).T),
        "assign": lambda: xp.empty(3, dtype).__setitem__(..., xp.empty(3, dtype)),
        "get": lambda: machine.xp.empty(3, dtype).tolist(),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
            machine.sync()
            found[name] = "yes"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error)[:200]}"
    return found
