"""Compile kernels for GPUs that are not present, and inspect their machine code."""

import re
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

from cuda.pathfinder import find_nvidia_binary_utility
from numba.cuda import dispatcher, types
from numba.cuda.cudadrv import devices

from nbnorm.cuda.kernels import signature

ARCHITECTURES = {"sm_80": (8, 0, ""), "sm_90a": (9, 0, "a")}
FLOAT32 = types.CPointer(types.float32)
REGISTERS = 1 << 16  # of a multiprocessor, on both architectures

_INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_RESOURCE = re.compile(r"\b(REG|STACK|SHARED|LOCAL):(\d+)")


class Code(NamedTuple):
    """A compiled kernel: registers, bytes of memory, and instruction counts."""

    registers: int
    stack: int
    shared: int
    local: int
    instructions: Counter[str]
    calls: list[str]

    def count(self, name, *modifiers):
        """Return the number of instructions with this name and all of these modifiers."""
        return sum(
            number
            for instruction, number in self.instructions.items()
            if instruction.split(".")[0] == name and set(modifiers) <= set(instruction.split("."))
        )


def compiled(kernel, dtype, parameters, architectures=tuple(ARCHITECTURES), weights=""):
    """Compile a kernel of the backend; return its code by architecture."""
    return code_of(kernel, signature(kernel, dtype, parameters, weights), architectures)


def ptx_of(kernel, dtype, parameters, weights=""):
    """Compile a kernel of the backend, or one of (float32 pointer, int64); return its PTX."""
    kinds = signature(kernel, dtype, parameters, weights) if dtype else (FLOAT32, types.int64)
    return _library(kernel, kinds).get_asm_str(cc=max(ARCHITECTURES.values()))


def code_of(kernel, kinds, architectures=tuple(ARCHITECTURES)):
    """Compile a kernel with its declared options; return its code by architecture.

    The kernel is typed once: Numba's LLVM IR of these kernels does not depend on the architecture.
    """
    library = _library(kernel, kinds)
    cubins = [library.get_cubin(cc=ARCHITECTURES[name]) for name in architectures]
    with ThreadPoolExecutor() as pool:
        return dict(zip(architectures, pool.map(disassembled, cubins), strict=True))


def _library(kernel, kinds):
    """Type a kernel and generate its LLVM IR."""
    newest = max(ARCHITECTURES.values())
    device = SimpleNamespace(id=0, compute_capability=newest[:2])
    context = SimpleNamespace(device=device)
    with (
        mock.patch.object(dispatcher, "get_current_device", return_value=device),
        mock.patch.object(devices, "get_context", return_value=context),
    ):
        return dispatcher._Kernel(kernel.py_func, kinds, **kernel.targetoptions)._codelibrary


def disassembled(cubin):
    """Disassemble a cubin with NVIDIA's tools."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(bytes(getattr(cubin, "code", cubin)))
        resources = dict(_RESOURCE.findall(_said("cuobjdump", "--dump-resource-usage", file)))
        found = _INSTRUCTION.findall(_said("nvdisasm", "-c", file))
    return Code(
        *(int(resources[name]) for name in ("REG", "STACK", "SHARED", "LOCAL")),
        Counter(name for name, _ in found),
        [operands for name, operands in found if name.startswith("CALL")],
    )


def _said(tool, *arguments):
    program = find_nvidia_binary_utility(tool)
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def problems(code, kernel, *, width, loads=0, stores=0):
    """Return the problems of a kernel's code, which needs this many `loads` and `stores`."""
    threads, resident = kernel.targetoptions["launch_bounds"]
    most = REGISTERS // (threads * resident)
    wide = ("128",) if width > 1 else ()
    spilled = code.count("LDL") + code.count("STL")
    found = {
        f"{code.stack} bytes of stack": code.stack,
        f"{code.local} bytes of local memory": code.local,
        f"{spilled} accesses to local memory": spilled,
        f"{code.registers} registers, not {most}": code.registers > most,
        "64-bit division": any("div_s64" in called for called in code.calls),
        f"fewer than {loads} loads {wide}": code.count("LDG", "NA", *wide) < loads,
        f"fewer than {stores} streaming stores {wide}": code.count("STG", "EF", *wide) < stores,
    }
    return [problem for problem, there in found.items() if there]
