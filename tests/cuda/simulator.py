"""Run the CUDA backend on the CPU, over NumPy arrays and without CUDA; `load` returns it.

Kernels run as Python. A stand-in for `numba.cuda` provides indices, barriers, shuffles and memory;
stand-ins for `intrinsics` and `launch` move the values. Functions that wait for other threads
become generators, so that the threads of a block can take turns: each runs until it waits or ends,
in an order that `backwards` reverses.

Errors that would go unnoticed on a GPU, or hang it, raise here: an access outside an array, a
misaligned vector, a value that is stored twice, threads that touch the same shared memory without a
barrier in between, a barrier that some threads never reach, a shuffle without the whole warp, an
argument of another type than the kernel is compiled for. Shared and local memory start as NaN.
Numbers are those of a GPU except for the last bit of a float64 `fma`.
"""

import ast
import importlib
import importlib.util
import inspect
import math
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import ml_dtypes
import numpy as np

WARP = 32
TRANSFORMED = ("plan", "values", "channel", "rows", "columns", "weighted")
STORAGE = {
    dtype.name: SimpleNamespace(
        pointer=dtype, computed=np.float64 if dtype == np.float64 else np.float32
    )
    for dtype in map(np.dtype, (np.float32, np.float64, np.float16, ml_dtypes.bfloat16))
}

launches: list[str] = []  # names of the kernels that ran
loads: Counter[int] = Counter()  # widths of the loads from tensors
backwards = False  # run the last block and the last thread first
limits = 0, False  # bytes of shared memory per block, whether there are clusters
_stored: set[tuple[int, int]] = set()  # memory and index of each store of this launch


class _Thread:
    """A thread of a block: what it waits for, and what it passes to other threads of its warp."""

    def __init__(self, index, function, arguments):
        self.index, self.waits_for, self.passes, self.turn = index, None, [None, None], 0
        self._steps = function(*arguments)
        if not inspect.isgenerator(self._steps):  # it waited for no other thread, and has ended
            self._steps = iter(())

    def step(self):
        """Run until the thread waits or ends."""
        self.waits_for = next(self._steps, "end")


class _Block:
    """Threads that share memory and barriers."""

    def __init__(self, index=0, dynamic=0):
        self.index, self.dynamic = index, dynamic  # bytes of dynamic shared memory
        self.thread, self.threads, self.shared, self.barriers = None, [], {}, 0

    def run(self, function, arguments, threads):
        """Run until all threads have ended or wait for the cluster; return whether any waits."""
        cuda.block, cuda.blockIdx.x = self, self.index
        if not self.threads:
            for t in range(threads):
                cuda.threadIdx.x = t
                self.threads.append(_Thread(t, function, arguments))
        ready = self._alive()
        while ready:
            for thread in reversed(ready) if backwards else ready:
                cuda.threadIdx.x, self.thread = thread.index, thread
                thread.step()
            ready = self._released()
        return bool(self._alive())

    def _alive(self):
        return [thread for thread in self.threads if thread.waits_for != "end"]

    def _released(self):
        """Return the threads that can continue."""
        warps = [self.threads[w : w + WARP] for w in range(0, len(self.threads), WARP)]
        ready = [t for warp in warps if all(t.waits_for == "warp" for t in warp) for t in warp]
        if ready:
            return ready
        self.barriers += 1
        alive = self._alive()
        waits_for = {t.waits_for for t in alive}
        assert "warp" not in waits_for, "a shuffle without the whole warp"
        assert len(waits_for) < 2, "some threads wait for the block, others for the cluster"
        return alive if waits_for == {"block"} else []


class _Shared:
    """Shared memory that detects two threads touching a value without a barrier in between."""

    def __init__(self, block, size, dtype):
        self._block, self._dtype = block, dtype
        self._values = [dtype(np.nan)] * size
        self._touched = {}  # index: (barriers passed, thread, whether it was written)

    def _touch(self, i, writes):
        assert 0 <= i < len(self._values), f"shared[{i}] of {len(self._values)}"
        now, thread = self._block.barriers, self._block.thread.index
        then, other, written = self._touched.get(i, (-1, thread, False))
        if then != now:
            written = False
        elif other != thread:
            written = written or writes
            assert not written, f"threads {other} and {thread} race for shared[{i}]"
        self._touched[i] = now, thread, writes or written

    def __getitem__(self, i):
        self._touch(i, False)
        return self._values[i]

    def __setitem__(self, i, value):
        self._touch(i, True)
        self._values[i] = self._dtype(value)


# -- numba.cuda ----------------------------------------------------------------------------------


def _jit(device=False, forceinline=False, launch_bounds=None):
    return lambda function: function if device else SimpleNamespace(py_func=function)


def _shared_array(shape, dtype):
    block, caller = cuda.block, sys._getframe(1)
    size = shape or block.dynamic // np.dtype(dtype).itemsize
    place = caller.f_code, caller.f_lineno
    if place not in block.shared:
        block.shared[place] = _Shared(block, size, dtype)
    return block.shared[place]


def _syncthreads():
    yield "block"


def _shfl_xor_sync(lanes, value, mask):
    assert lanes == 0xFFFFFFFF
    assert 0 < mask < WARP
    thread = cuda.block.thread
    # A thread may be one shuffle ahead of another: two values, in turn, are enough.
    thread.turn ^= 1
    thread.passes[thread.turn] = value
    yield "warp"
    return cuda.block.threads[thread.index ^ mask].passes[thread.turn]


def _fma(a, b, c):
    """Return a b + c, rounded once or nearly so."""
    if type(c) is np.float32:
        return np.float32(float(a) * float(b) + float(c))
    return np.float64(np.longdouble(a) * np.longdouble(b) + np.longdouble(c))


cuda = ModuleType("numba.cuda")
vars(cuda).update(
    jit=_jit,
    types=SimpleNamespace(
        float32=np.float32, float64=np.float64, int64=int, uint8=np.uint8, CPointer=np.dtype
    ),
    local=SimpleNamespace(array=lambda shape, dtype: np.full(shape, np.nan, dtype)),
    shared=SimpleNamespace(array=_shared_array),
    syncthreads=_syncthreads,
    shfl_xor_sync=_shfl_xor_sync,
    fma=_fma,
    **{name: SimpleNamespace(x=0) for name in ("threadIdx", "blockIdx", "blockDim", "gridDim")},
)


# -- nbnorm.cuda.intrinsics ----------------------------------------------------------------------


def memory_of(dtype, width):
    """Return functions that load and store `width` values between memory and a thread's array."""

    size = width * STORAGE[dtype].pointer.itemsize

    def checked(memory, index):
        assert 0 <= index <= len(memory) - width, f"{index} in memory of {len(memory)} values"
        assert (memory.address + index * size // width) % size == 0, "a vector that is not aligned"
        return slice(index, index + width)

    def load(memory, index, values, start):
        loads[width] += 1
        values[start : start + width] = memory[checked(memory, index)]

    def store(memory, index, values, start):
        place = id(memory), index
        assert place not in _stored, f"{index} is stored twice"
        _stored.add(place)
        memory[checked(memory, index)] = values[start : start + width]

    return load, store


def cluster_barrier():
    """Wait for all threads of the cluster's blocks."""
    yield "cluster"


def quotient(a, b):
    """Return a // b of 31-bit numbers."""
    assert 0 <= a < 2**31, a
    assert 0 < b < 2**31, b
    return a // b


def exponent_of(value):
    """Return e of 2^e <= |value| < 2^(e + 1): -1023 for 0 and subnormals, 1024 for Inf and NaN."""
    return (int(np.float64(value).view(np.int64)) >> 52 & 0x7FF) - 1023


def power_of(exponent):
    """Return 2^exponent, which must be a normal number."""
    assert -1023 < exponent < 1024, exponent
    return np.float64(2.0**exponent)


# -- nbnorm.cuda.launch --------------------------------------------------------------------------


class _Memory(np.ndarray):
    """All memory of an array as one row, with the address of its start."""


def address(array):
    """Return the address of an array."""
    return array.ctypes.data


def run(kernel, dtype, parameters, blocks, threads, *args, weights="", cluster=1, shared=0):
    """Run a kernel on the memory of NumPy arrays, one cluster of blocks after another."""
    kinds = sys.modules["nbnorm.cuda.kernels"].signature(kernel, dtype, parameters, weights)
    arguments = [_passed(kind, arg) for kind, arg in zip(kinds, args, strict=True)]
    assert 0 < blocks < 2**31
    assert blocks % cluster == 0
    assert shared <= limits[0]
    assert cluster == 1 or limits[1]
    launches.append(kernel.py_func.__name__)
    _stored.clear()
    cuda.blockDim.x, cuda.gridDim.x = threads, blocks
    with np.errstate(all="ignore"):
        for first in _in_order(range(0, blocks, cluster)):
            together = [_Block(b, shared) for b in _in_order(range(first, first + cluster))]
            while any(waits := [b.run(kernel.py_func, arguments, threads) for b in together]):
                assert cluster > 1, "a block waits for a cluster, but there is none"
                assert all(waits), "a block has ended that others wait for"


def _in_order(numbers):
    return reversed(numbers) if backwards else numbers


def _passed(kind, arg):
    """Convert an argument to what a kernel receives: a number, or memory."""
    if not isinstance(kind, np.dtype):
        assert isinstance(arg, int | float if kind is np.float64 else int), arg
        return kind(arg)
    assert arg.dtype == kind, f"{arg.dtype} for a kernel that takes {kind}"
    last = sum((n - 1) * stride for n, stride in zip(arg.shape, arg.strides, strict=True))
    row = np.lib.stride_tricks.as_strided(arg, (last // arg.itemsize + 1,), (arg.itemsize,))
    memory = row.view(_Memory)
    memory.address = address(arg)
    return memory


# -- import --------------------------------------------------------------------------------------


class _Waiting(ast.NodeTransformer):
    """Turn calls of functions that wait for other threads into `yield from`."""

    def __init__(self, trees):
        self.names = {"syncthreads", "shfl_xor_sync", "barrier"}
        functions = [
            node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
        ]
        before = 0
        while before < len(self.names):
            before = len(self.names)
            self.names |= {f.name for f in functions if any(map(self._waits, _own_nodes(f)))}

    def _waits(self, node):
        called = getattr(node, "func", None)
        return getattr(called, "attr", getattr(called, "id", None)) in self.names

    def visit_Call(self, node):
        self.generic_visit(node)
        return ast.YieldFrom(node) if self._waits(node) else node


def _own_nodes(node):
    """Walk through a function, without its nested functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef):
            yield child
            yield from _own_nodes(child)


def _sqrt(value):
    return math.sqrt(value) if value >= 0 else math.nan  # Python raises, a GPU does not


_math = SimpleNamespace(**{**vars(math), "sqrt": _sqrt})


def _empty(shape):
    return np.empty(shape)  # looked up on every call, because tests make it return NaN


class _Importer:
    """Find and load the TRANSFORMED modules, with other constants in plan.py."""

    def __init__(self, **numbers):
        folder = Path(importlib.util.find_spec("nbnorm").origin).parent / "cuda"
        self._files = {f"nbnorm.cuda.{name}": folder / f"{name}.py" for name in TRANSFORMED}
        self._trees = {name: ast.parse(file.read_text()) for name, file in self._files.items()}
        for node in self._trees["nbnorm.cuda.plan"].body:
            if isinstance(node, ast.Assign) and node.targets[0].id in numbers:
                node.value = ast.Constant(numbers[node.targets[0].id])
        waiting = _Waiting(self._trees.values())
        self._trees = {
            name: ast.fix_missing_locations(waiting.visit(tree))
            for name, tree in self._trees.items()
        }

    def find_spec(self, name, path, target=None):
        if name in self._files:
            return importlib.util.spec_from_file_location(name, self._files[name], loader=self)
        return None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        exec(compile(self._trees[module.__name__], module.__file__, "exec"), vars(module))
        if hasattr(module, "math"):
            module.math = _math


def load(**numbers):
    """Import `nbnorm.cuda` on the simulator, with other THREADS or BLOCK_VALUES in plan.py."""
    intrinsics = {
        "STORAGE": STORAGE,
        "memory_of": memory_of,
        "quotient": quotient,
        "exponent_of": exponent_of,
        "power_of": power_of,
        "cluster_barrier": cluster_barrier,
    }
    launch = {"address": address, "run": run, "limits": lambda: limits}
    stand_ins = {"intrinsics": intrinsics, "launch": launch, "memory": {"empty": _empty}}
    sys.modules.update({"numba.cuda": cuda, "numba_cuda": ModuleType("numba_cuda")})
    for name, contents in stand_ins.items():
        module = sys.modules[f"nbnorm.cuda.{name}"] = ModuleType(f"nbnorm.cuda.{name}")
        vars(module).update(contents)
    sys.meta_path.insert(0, _Importer(**numbers))
    return importlib.import_module("nbnorm.cuda")
