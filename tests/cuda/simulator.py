"""Kernels run on the CPU, thread by thread, over NumPy arrays: imported before `nbnorm.cuda`.

Numba's simulator gives threads their indices and their own memory. It has no warp shuffles, no
bodies for intrinsics, copies every array in and out, and waits in busy loops; those parts are here:
a block's threads meet at barriers, shared and local memory begins as NaN, and an access outside an
array, or a vector that does not begin at a multiple of its size, is an error.
"""

import os
import sys
import threading
from types import ModuleType

os.environ["NUMBA_ENABLE_CUDASIM"] = "1"

import numpy as np
from numba import cuda
from numba.cuda import types
from numba.cuda.simulator import kernelapi

WARP = 32


class _Barrier:
    """A barrier that threads leave for good when they end, as on a GPU."""

    def __init__(self, parties):
        self._parties, self._waiting, self._round = parties, 0, 0
        self._condition = threading.Condition()
        self.broken = False

    def _open(self):
        self._waiting, self._round = 0, self._round + 1
        self._condition.notify_all()

    def wait(self):
        with self._condition:
            mine = self._round
            self._waiting += 1
            if self._waiting >= self._parties:
                self._open()
            while mine == self._round and not self.broken:
                self._condition.wait()
            if self.broken:
                raise threading.BrokenBarrierError

    def leave(self):
        with self._condition:
            self._parties -= 1
            if self._parties and self._waiting >= self._parties:
                self._open()

    def abort(self):
        with self._condition:
            self.broken = True
            self._condition.notify_all()


class _Block:
    """What the threads of a block share."""

    def __init__(self, threads):
        self.all = _Barrier(threads)
        self.warps = [_Barrier(min(WARP, threads - w)) for w in range(0, threads, WARP)]
        self.lanes = [None] * threads
        self.shared = {}
        self.lock = threading.Lock()
        self.error = None


class _Thread(threading.Thread):
    def __init__(self, function, args, block, index, block_index):
        super().__init__(daemon=True)
        self._function, self._args, self.block, self.index = function, args, block, index
        self.threadIdx = kernelapi.Dim3(index, 0, 0)
        self.blockIdx = kernelapi.Dim3(block_index, 0, 0)

    def run(self):
        barriers = (self.block.all, self.block.warps[self.index // WARP])
        try:
            with np.errstate(all="ignore"):
                self._function(*self._args)
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:  # handed to whoever launched the kernel
            self.block.error = self.block.error or error
            for barrier in (self.block.all, *self.block.warps):
                barrier.abort()
        for barrier in barriers:
            barrier.leave()

    def syncthreads(self):
        self.block.all.wait()

    def exchange(self, value, mask):
        warp = self.block.warps[self.index // WARP]
        self.block.lanes[self.index] = value
        warp.wait()
        other = self.block.lanes[self.index ^ mask]
        warp.wait()
        return other


class _Local:
    @staticmethod
    def array(shape, dtype):
        return np.full(shape, np.nan, np.dtype(str(dtype)))


class _Shared:
    @staticmethod
    def array(shape, dtype):
        block = threading.current_thread().block
        caller = sys._getframe(1)
        with block.lock:
            key = caller.f_code, caller.f_lineno
            if key not in block.shared:
                block.shared[key] = np.full(shape, np.nan, np.dtype(str(dtype)))
            return block.shared[key]


class SimulatedModule(kernelapi.FakeCUDAModule):
    """`numba.cuda` as kernels see it while they run."""

    def __init__(self, blocks, threads):
        super().__init__((blocks, 1, 1), (threads, 1, 1), 0)
        self._local, self._shared = _Local, _Shared

    @property
    def local(self):
        return _Local

    @property
    def shared(self):
        return _Shared

    def shfl_xor_sync(self, lanes, value, mask):
        assert lanes == 0xFFFFFFFF
        return threading.current_thread().exchange(value, mask)


class _Kernel:
    def __init__(self, function):
        self.py_func = function


def _jit(device=False, forceinline=False, launch_bounds=None):
    return lambda function: function if device else _Kernel(function)


def launch(kernel, blocks, threads, args):
    """Run a kernel, block after block."""
    assert 0 < blocks < 2**31
    module = SimulatedModule(blocks, threads)
    files = [
        sys.modules[f"nbnorm.cuda.{name}"] for name in ("values", "channel", "rows", "columns")
    ]
    for file in files:
        file.cuda = module
    for b in range(blocks):
        block = _Block(threads)
        team = [_Thread(kernel.py_func, args, block, t, b) for t in range(threads)]
        for thread in team:
            thread.start()
        for thread in team:
            thread.join()
        if block.error is not None:
            raise block.error


# -- nbnorm.cuda.intrinsics ----------------------------------------------------------------------


class _Storage:
    def __init__(self, computed):
        self.computed = computed


def memory_of(dtype, width):
    """Load and store of `width` values between an array of memory and a thread's own."""
    computed = np.float64 if dtype == "float64" else np.float32

    def load(memory, index, values, start):
        assert 0 <= index <= memory.size - width, (index, memory.size)
        assert (memory.ctypes.data + index * memory.itemsize) % (width * memory.itemsize) == 0
        values[start : start + width] = memory[index : index + width].astype(computed)

    def store(memory, index, values, start):
        assert 0 <= index <= memory.size - width, (index, memory.size)
        assert (memory.ctypes.data + index * memory.itemsize) % (width * memory.itemsize) == 0
        memory[index : index + width] = values[start : start + width].astype(memory.dtype)

    return load, store


def quotient(a, b):
    """a // b of numbers that 32 bits hold."""
    assert 0 <= a < 2**32, a
    assert 0 < b < 2**32, b
    return a // b


# -- nbnorm.cuda.launch --------------------------------------------------------------------------

launches = []


def address(array):
    """Where an array begins."""
    return array.ctypes.data


def run(kernel, dtype, parameters, blocks, threads, *args):
    """Launch a kernel over the memory of NumPy arrays."""
    names = list(_parameters(kernel))
    assert len(names) == len(args), (names, args)
    launches.append(kernel.py_func.__name__)
    launch(kernel, blocks, threads, [_memory(arg) for arg in args])


def _parameters(kernel):
    code = kernel.py_func.__code__
    return code.co_varnames[: code.co_argcount]


def _memory(arg):
    """The values from an array's first to its last, gaps included, as one dimension."""
    if not isinstance(arg, np.ndarray):
        return int(arg) if isinstance(arg, bool) else arg
    last = sum((n - 1) * stride for n, stride in zip(arg.shape, arg.strides, strict=True))
    size = last // arg.itemsize + 1
    return np.lib.stride_tricks.as_strided(
        arg.reshape(-1)[:0] if 0 in arg.shape else arg, (size,), (arg.itemsize,)
    )


def install():
    """Put the simulator in place of what needs a GPU."""
    cuda.jit = _jit
    for name, contents in {
        "intrinsics": {
            "STORAGE": {
                name: _Storage(types.float64 if name == "float64" else types.float32)
                for name in ("float32", "float64", "float16", "bfloat16")
            },
            "memory_of": memory_of,
            "quotient": quotient,
        },
        "launch": {"address": address, "run": run},
    }.items():
        module = ModuleType(f"nbnorm.cuda.{name}")
        vars(module).update(contents)
        sys.modules[module.__name__] = module


install()
