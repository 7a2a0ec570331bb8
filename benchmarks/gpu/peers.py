"""The peers on a GPU: nbnorm, PyTorch and a copy, on the same values in memory.

A peer's setup does all preparations and returns a call; the call returns y or dx.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 - registers bfloat16 with NumPy
import numpy as np

import nbnorm
from benchmarks.gpu.records import COPY, OPS, OURS, OURS_LAST, TWICE

EPS = 1e-5
POOL = 4_194_301  # a prime, so that repeats of the random numbers align with no shape

Array = Any  # numpy.ndarray or cupy.ndarray
Call = Callable[[], Any]


class Machine:
    """CuPy and its device or, if `dry`, NumPy and the CPU.

    For bfloat16, CuPy only allocates, copies, and views arrays as 16-bit integers.
    """

    def __init__(self, *, dry: bool) -> None:
        if dry:
            self.xp: Any = np
        else:
            import cupy

            self.xp = cupy
        self.dry = dry
        self._pool = np.random.default_rng().normal(size=POOL)

    def send(self, host: np.ndarray) -> Array:
        """Copy a NumPy array to the device."""
        return self.xp.array(bits(host)).view(host.dtype)

    def random(self, shape: tuple[int, ...], dtype: Any, *, backwards: bool = False) -> Array:
        """Return an array filled with random numbers, which are drawn once and repeated."""
        pool = self.send((self._pool[::-1] if backwards else self._pool).astype(dtype))
        return self.xp.resize(bits(pool), shape).view(dtype)

    def sync(self) -> None:
        """Wait for all launched work."""
        if not self.dry:
            self.xp.cuda.Device().synchronize()

    def tidy(self) -> None:
        """Return pooled memory to the device."""
        if not self.dry:
            self.xp.get_default_memory_pool().free_all_blocks()
            if "torch" in sys.modules:
                sys.modules["torch"].cuda.empty_cache()


def bits(array: Array) -> Array:
    """View an array as integers of its itemsize, which copies and DLPack support."""
    return array.view({2: np.int16, 4: np.int32, 8: np.int64}[array.dtype.itemsize])


class Batch:
    """Arguments of one shape in both layouts, made at first use."""

    def __init__(self, machine: Machine, shape: tuple[int, ...], dtype: str) -> None:
        self.machine, self.shape, self.dtype = machine, shape, np.dtype(dtype)
        C = shape[1]
        drawn = np.linspace(0.5, 1.5, C), np.linspace(-0.5, 0.5, C), np.zeros(C), np.ones(C)
        self.parameters = [machine.send(p.astype(np.float32)) for p in drawn]
        self._made: dict[tuple[str, bool], Array] = {}

    def array(self, name: str, last: bool) -> Array:
        """Return x, dy or out (N, C, H, W), with channels last in memory if `last`."""
        key = name, last
        if key not in self._made and not last:
            random = self.machine.random
            self._made[key] = random(self.shape, self.dtype, backwards=name != "x")
        elif key not in self._made:
            turned = self.machine.xp.ascontiguousarray(
                bits(self.array(name, False)).transpose(0, 2, 3, 1)
            )
            self._made[key] = turned.view(self.dtype).transpose(0, 3, 1, 2)
        return self._made[key]

    def tensor(self, name: str, last: bool) -> Any:
        """Return the same memory as a torch tensor."""
        return tensor_of(self.array(name, last))

    def values(self, result: Any) -> np.ndarray:
        """Return the first and the last sample of a result, in NumPy and float32."""
        if hasattr(result, "detach"):
            return result.detach()[[0, -1]].float().cpu().numpy()
        ends = self.machine.xp.ascontiguousarray(bits(result)[:: max(len(result) - 1, 1)])
        return (ends if self.machine.dry else ends.get()).view(self.dtype).astype(np.float32)


def tensor_of(array: Array) -> Any:
    """View an array as a tensor; bfloat16 is passed as 16-bit integers."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_dlpack(bits(array)).view(torch.bfloat16)
    return torch.from_dlpack(array)


class Peer(NamedTuple):
    """Setups by op, whether channels are last in memory, and whether torch.compile is used."""

    ops: dict[str, Callable[[Batch], Call]]
    last: bool = False
    compiled: bool = False


def _copy(b: Batch) -> Call:
    source, target = bits(b.array("x", False)), bits(b.array("out", False))
    return lambda: b.machine.xp.copyto(target, source)


def _ours(*, last: bool = False, twice: bool = False) -> Peer:
    def taken(call: Call) -> Call:
        def reading_twice() -> Any:
            with read_twice():
                return call()

        return reading_twice if twice else call

    def forward(b: Batch) -> Call:
        x, out = b.array("x", last), b.array("out", last)
        return taken(lambda: nbnorm.batch_norm_forward(x, *b.parameters, eps=EPS, out=out).y)

    def backward(b: Batch) -> Call:
        x, dy, out = (b.array(name, last) for name in ("x", "dy", "out"))
        gamma, beta = b.parameters[:2]
        _, mean, rstd = nbnorm.batch_norm_forward(x, gamma, beta, eps=EPS)
        return taken(lambda: nbnorm.batch_norm_backward(dy, x, gamma, mean, rstd, out=out).dx)

    def inference(b: Batch) -> Call:
        x, out = b.array("x", last), b.array("out", last)
        return lambda: nbnorm.batch_norm_inference(x, *b.parameters, eps=EPS, out=out)

    ops = {"forward": forward, "backward": backward, "inference": inference}
    return Peer({op: ops[op] for op in (OPS[:2] if twice else OPS)}, last)


@contextmanager
def read_twice() -> Iterator[None]:
    """Keep nothing in shared memory, so that both sweeps of a pass read global memory."""
    launch = sys.modules.get("nbnorm.cuda.launch")
    if launch is None:  # dry
        yield
        return
    limits, launch.limits = launch.limits, lambda: (0, False)
    try:
        yield
    finally:
        launch.limits = limits


def _torch(*, last: bool = False, cudnn: bool = True, compiled: bool = False) -> Peer:
    """torch.nn.functional.batch_norm: forward and inference without autograd, backward with it."""

    def setup(b: Batch, training: bool) -> tuple[Callable[..., Any], list[Any]]:
        import torch

        def normalise(x: Any, gamma: Any, beta: Any, mean: Any, var: Any) -> Any:
            return torch.nn.functional.batch_norm(
                x, mean, var, gamma, beta, training=training, eps=EPS
            )

        def chosen(*arguments: Any) -> Any:
            with torch.backends.cudnn.flags(enabled=cudnn):
                return normalise(*arguments)

        tensors = [b.tensor("x", last), *(tensor_of(p.copy()) for p in b.parameters)]
        if not compiled:
            return chosen, tensors
        # Without fullgraph it would silently run uncompiled after too many shapes.
        return torch.compile(normalise, dynamic=False, fullgraph=True), tensors

    def normalise(b: Batch, training: bool) -> Call:
        import torch

        call, tensors = setup(b, training)
        return torch.no_grad()(lambda: call(*tensors))

    def backward(b: Batch) -> Call:
        import torch

        call, tensors = setup(b, True)
        wanted = [tensor.requires_grad_() for tensor in tensors[:3]]
        y, dy = call(*tensors), b.tensor("dy", last)
        return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)[0]

    ops = {
        "forward": lambda b: normalise(b, True),
        "backward": backward,
        "inference": lambda b: normalise(b, False),
    }
    return Peer(ops, last, compiled)


PEERS: dict[str, Peer] = {
    COPY: Peer(dict.fromkeys(OPS, _copy)),
    OURS: _ours(),
    OURS_LAST: _ours(last=True),
    TWICE: _ours(twice=True),
    "PyTorch": _torch(),
    "PyTorch channels-last": _torch(last=True),
    "PyTorch without cuDNN": _torch(cudnn=False),
    "PyTorch channels-last without cuDNN": _torch(last=True, cudnn=False),
    "torch.compile": _torch(compiled=True),
    "torch.compile channels-last": _torch(last=True, compiled=True),
}
