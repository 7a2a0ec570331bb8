"""Coverage of the code that Numba compiles: `coverage run -m pytest -p jit_coverage`.

coverage.py sees only lines that Python runs, and the kernels do not run without the compiler,
because their intrinsics are LLVM IR. This plugin adds an instruction to each compiled line of
`nbnorm/cpu` that sets the line's byte. At the end, lines whose byte is set are added to coverage's
data.
"""

from pathlib import Path

import coverage
import numpy as np
import pytest
from llvmlite import ir
from numba.core.ir import Del
from numba.core.lowering import Lower

KERNELS = str(Path(__file__).parents[1] / "nbnorm" / "cpu")
BYTE, ADDRESS = ir.IntType(8), ir.IntType(64)

lines = {}  # (file, line): its place in `reached`
reached = np.zeros(1 << 16, np.uint8)
lower = Lower.lower_inst


def lower_and_note(self, inst):
    file, line = inst.loc.filename, inst.loc.line
    if file.startswith(KERNELS) and not isinstance(inst, Del):
        place = lines.setdefault((file, line), len(lines))
        address = ADDRESS(reached[place:].ctypes.data)
        self.builder.store(BYTE(1), self.builder.inttoptr(address, BYTE.as_pointer()))
    return lower(self, inst)


def pytest_configure():
    from nbnorm.cpu.disk import KernelCache

    Lower.lower_inst = lower_and_note
    # The bytes belong to this process, so load no kernel of another one, and save none.
    KernelCache.load_overload = lambda *args: None
    KernelCache.save_overload = lambda *args: None


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish():
    found = {}
    for (file, line), place in lines.items():
        if reached[place]:
            found.setdefault(file, set()).add(line)
    if (running := coverage.Coverage.current()) is not None:
        running.get_data().add_lines(found)
