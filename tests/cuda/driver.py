"""Launch without a GPU: a CUDA driver that runs nothing, and a CuPy that holds nothing.

`environment` builds the driver (fake_driver.c) and returns the environment of a process that loads
it. In that process `Driver` reports launches; call `install_cupy` before importing nbnorm.cuda.
"""

import ctypes
import importlib.util
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import numpy as np

LAUNCH_FAILED = 719
DEFAULT, PER_THREAD = 0, 2  # CUDA's handles of the default streams


def missing():
    """Return why the fake driver is unavailable, or None if it can be used."""
    if sys.platform != "linux":
        return f"libcuda.so.1 is built for Linux, not {sys.platform}"
    if importlib.util.find_spec("numba_cuda") is None:
        return "numba-cuda is not installed"
    return None if shutil.which("cc") else "no C compiler (cc)"


def environment(folder):
    """Build the driver in a folder; return the environment of a process that loads it."""
    library = Path(folder, "libcuda.so.1")
    source = Path(__file__).with_name("fake_driver.c")
    build = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    Path(folder, "libcuda.so").symlink_to(library.name)  # the name that Numba tries first
    return {
        "LD_LIBRARY_PATH": str(folder),
        "NUMBA_CUDA_DRIVER": str(library),
        "NUMBA_ENABLE_CUDASIM": "0",
    }


def stream_of(device, number=0):
    """Return the handle of a stream on a device."""
    return 100 * device + 10 + number


class Launch(NamedTuple):
    """A launch as seen by the driver.

    `types` are the argument types of the machine code, "int64", "float64" or "float32*", and
    `arguments` are the driver's arguments, read with these types.
    """

    kernel: str  # file.function
    grid: tuple
    block: tuple
    shared: int
    cluster: int
    device: int
    loaded_on: int  # the current device when the kernel was loaded
    stream: int
    types: list
    arguments: list


class _Kernel(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 512),
        ("device", ctypes.c_int),
        ("parameters", ctypes.c_int),
        ("size", ctypes.c_int * 64),
        ("may_share", ctypes.c_uint),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.POINTER(_Kernel)),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("cluster", ctypes.c_uint),
        ("device", ctypes.c_int),
        ("stream", ctypes.c_size_t),
        ("parameter", (ctypes.c_ubyte * 8) * 64),
    )


class Driver:
    """The calls that this process made to the fake driver."""

    def __init__(self):
        self._library = ctypes.CDLL("libcuda.so.1")
        self._library.fake_calls.restype = ctypes.c_long
        self._library.fake_launched.restype = ctypes.c_long
        self._library.fake_launch.restype = ctypes.POINTER(_Launch)
        self._library.fake_launch.argtypes = (ctypes.c_long,)
        self.fail = self._library.fake_fail
        self.delay = self._library.fake_delay
        self.resources = self._library.fake_resources
        self.device = self._library.fake_device
        self.depth = self._library.fake_depth
        self.set_device = self._library.fake_set_device

    def calls(self, prefix=""):
        """Return the number of calls of functions whose names begin with a prefix."""
        return self._library.fake_calls(prefix.encode())

    def during(self, call, *args, **options):
        """Return the launches made by a call, in order; `returned` is the call's result."""
        first = self._library.fake_launched()
        self.returned = call(*args, **options)
        return [self._launch(number) for number in range(first, self._library.fake_launched())]

    def _launch(self, number):
        launch = self._library.fake_launch(number).contents
        kernel = launch.kernel.contents
        name, types = _demangled(kernel.name.decode())
        assert list(kernel.size[: kernel.parameters]) == [8] * len(types), name
        arguments = [
            np.frombuffer(launch.parameter[i], _READ.get(kind, "<u8"), 1)[0].item()
            for i, kind in enumerate(types)
        ]
        return Launch(
            name,
            tuple(launch.grid),
            tuple(launch.block),
            launch.shared,
            launch.cluster,
            launch.device,
            kernel.device,
            launch.stream,
            types,
            arguments,
        )


_READ = {"int64": "<i8", "float64": "<f8"}


def _demangled(symbol):
    """Return ("rows.apply", argument types) from a kernel's mangled name.

    Numba writes a name as its length and itself, an integer as x, a double as d, and a pointer as
    the name of its type. Text between the kernel's name and the types, from B to E, distinguishes
    versions of the kernel.
    """
    parts = re.fullmatch(
        r"_ZN6nbnorm4cuda\d+(rows|columns|channel|weighted)"
        r"(?:\d+\w+?_3clocals_3e)?\d+([a-z_]+)B\w*?E((?:[xd]|\d+[a-z]+\d+_2a)+)",
        symbol,
    )
    assert parts, symbol
    module, name, types = parts.groups()
    found = re.findall(r"[xd]|\d+[a-z]+\d+_2a", types)
    names = {"x": "int64", "d": "float64"}
    return f"{module}.{name}", [
        names.get(kind) or kind.lstrip("0123456789").replace("_2a", "*") for kind in found
    ]


class Array:
    """An object with a CuPy array's attributes, whose address refers to no memory."""

    __module__ = "cupy"
    _next = 1 << 32

    def __init__(self, shape, dtype=np.float64, strides=None, offset=0):
        self.dtype = np.dtype(dtype)
        self.itemsize = self.dtype.itemsize
        self._shape = [shape] if isinstance(shape, int) else list(shape)
        self.size = math.prod(self._shape)
        dense = [math.prod(self._shape[i + 1 :]) for i in range(len(self._shape))]
        self._strides = [n * self.itemsize for n in strides or dense]
        self.flags = SimpleNamespace(c_contiguous=strides is None)
        self.data = SimpleNamespace(ptr=Array._next + offset * self.itemsize)
        Array._next += 1 << 24

    # CuPy builds these tuples on every access; reusing them would understate host times.
    @property
    def shape(self):
        return tuple(self._shape)

    @property
    def strides(self):
        return tuple(self._strides)


def install_cupy(driver):
    """Replace CuPy by a stub and return it.

    `use` sets CuPy's current device and stream, and `allocated` lists the arrays made by `empty`.
    `empty` first looks for an array of its shape in `ready`, which takes almost no time.
    """

    class Stream:
        def __init__(self, ptr, device_id):
            self.ptr, self.device_id = ptr, device_id

    now = SimpleNamespace(device=0, stream=Stream(DEFAULT, -1))

    def use(device=0, stream=DEFAULT):
        driver.set_device(device)
        now.device = device
        now.stream = Stream(stream, -1 if stream in (DEFAULT, PER_THREAD) else device)

    allocated, ready = [], {}

    def empty(shape, dtype=np.float64):
        if shape in ready:
            return ready[shape]
        array = Array(shape, dtype)
        allocated.append(array)
        return array

    def absent(name):
        def function(*args, **options):
            raise NotImplementedError(f"the stub has no cupy.{name}")

        return function

    cupy = ModuleType("cupy")
    cupy.ndarray, cupy.empty, cupy.use = Array, empty, use
    cupy.allocated, cupy.ready = allocated, ready
    cupy.cuda = SimpleNamespace(
        get_current_stream=lambda: now.stream,
        Device=lambda: SimpleNamespace(id=now.device),
        runtime=SimpleNamespace(getDevice=lambda: now.device),
    )
    cupy.__getattr__ = absent  # functions that are looked up but not called
    sys.modules["cupy"] = cupy
    return cupy
