"""What is timed: nbnorm, PyTorch and a copy, on the same values in memory.

A peer's setup does what can be done beforehand and returns a call; a call returns y or dx.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

import nbnorm
from benchmarks.gpu.large import random
from benchmarks.gpu.machine import Array, Machine, Unavailable, bits

EPS, MOMENTUM = 1e-5, 0.1
OPS = ("forward", "backward", "inference")
# Tensors of x's size that an op must read or write at least, in units of those a copy does.
FLOORS = {"forward": 1.0, "backward": 1.5, "inference": 1.0}
COPY = "copy"

Call = Callable[[], Any]


class Batch:
    """Arguments at a shape in both layouts; made when they are first asked for."""

    def __init__(self, machine: Machine, shape: tuple[int, ...], dtype: str) -> None:
        self.machine, self.shape, self.dtype = machine, shape, machine.dtype(dtype)
        C = shape[1]
        parameters = (
            np.linspace(0.5, 1.5, C), np.linspace(-0.5, 0.5, C), np.zeros(C), np.ones(C),
        )  # fmt: skip
        self.parameters = [machine.send(p.astype(np.float32)) for p in parameters]
        self._made: dict[tuple[str, bool], Array] = {}

    def array(self, name: str, last: bool) -> Array:
        """Return x, dy or out (N, C, H, W), its channels last in memory if so."""
        if (name, last) not in self._made:
            self._made[name, last] = self._turned(name) if last else self._drawn(name)
        return self._made[name, last]

    def _drawn(self, name: str) -> Array:
        return random(self.machine, self.shape, self.dtype, backwards=name != "x")

    def _turned(self, name: str) -> Array:
        """The same values with the channels last in memory."""
        values = bits(self.array(name, False)).transpose(0, 2, 3, 1)
        return self.machine.xp.ascontiguousarray(values).view(self.dtype).transpose(0, 3, 1, 2)

    def tensor(self, name: str, last: bool) -> Any:
        """Return the same memory as a tensor of torch's."""
        return as_tensor(self.machine, self.array(name, last))


def as_tensor(machine: Machine, array: Array) -> Any:
    """View an array as a tensor; bfloat16 by way of its bits, which any DLPack can hold."""
    torch = torch_of(machine)
    if array.dtype.name == "bfloat16":
        return torch.from_dlpack(bits(array)).view(torch.bfloat16)
    return torch.from_dlpack(array)


def as_array(machine: Machine, result: Any) -> Array:
    """View a result as an array."""
    if not hasattr(result, "detach"):
        return result
    torch, tensor = torch_of(machine), result.detach()
    if tensor.dtype == torch.bfloat16:
        dtype = machine.dtype("bfloat16")
        return machine.xp.from_dlpack(tensor.view(torch.int16)).view(dtype)
    return machine.xp.from_dlpack(tensor)


def torch_of(machine: Machine) -> Any:
    """Return torch; Unavailable where it is not there or sees no GPU."""
    try:
        import torch
    except ImportError as error:
        raise Unavailable(str(error)) from error
    if not (machine.dry or torch.cuda.is_available()):
        raise Unavailable("torch sees no GPU")
    return torch


Setup = Callable[[Batch], Call]


class Peer(NamedTuple):
    """Who computes it: setups by op, and whether the channels are last in memory."""

    ops: dict[str, Setup]
    last: bool = False
    compiled: bool = False


def _copy(b: Batch) -> Call:
    source, target = bits(b.array("x", False)), bits(b.array("out", False))
    return lambda: b.machine.xp.copyto(target, source)


def _ours(*, last: bool) -> Peer:
    def forward(b: Batch) -> Call:
        x, out = b.array("x", last), b.array("out", last)
        return lambda: (
            nbnorm.batch_norm_forward(x, *b.parameters, momentum=MOMENTUM, eps=EPS, out=out).y
        )

    def backward(b: Batch) -> Call:
        x, dy, out = (b.array(name, last) for name in ("x", "dy", "out"))
        gamma, beta = b.parameters[:2]
        _, mean, rstd = nbnorm.batch_norm_forward(x, gamma, beta, eps=EPS)
        return lambda: nbnorm.batch_norm_backward(dy, x, gamma, mean, rstd, out=out).dx

    def inference(b: Batch) -> Call:
        x, out = b.array("x", last), b.array("out", last)
        return lambda: nbnorm.batch_norm_inference(x, *b.parameters, eps=EPS, out=out)

    return Peer({"forward": forward, "backward": backward, "inference": inference}, last)


def _torch(*, last: bool = False, cudnn: bool = True, compiled: bool = False) -> Peer:
    """torch.nn.functional.batch_norm and autograd, as users call them."""

    def function(b: Batch, training: bool) -> Callable[..., Any]:
        torch = torch_of(b.machine)

        def normalise(x: Any, gamma: Any, beta: Any, mean: Any, var: Any) -> Any:
            return torch.nn.functional.batch_norm(
                x, mean, var, gamma, beta, training=training, momentum=MOMENTUM, eps=EPS
            )

        if compiled:
            # Without fullgraph it would run uncompiled, and not say so, after too many shapes.
            return torch.compile(normalise, dynamic=False, fullgraph=True)

        def chosen(*arguments: Any) -> Any:
            with torch.backends.cudnn.flags(enabled=cudnn):
                return normalise(*arguments)

        return chosen

    def arguments(b: Batch) -> tuple[Any, list[Any]]:
        parameters = [as_tensor(b.machine, p.copy()) for p in b.parameters]
        return b.tensor("x", last), parameters

    def normalise(b: Batch, *, training: bool) -> Call:
        x, parameters = arguments(b)
        call, torch = function(b, training), torch_of(b.machine)

        def without_gradients() -> Any:
            with torch.no_grad():
                return call(x, *parameters)

        return without_gradients

    def backward(b: Batch) -> Call:
        torch = torch_of(b.machine)
        x, parameters = arguments(b)
        wanted = [tensor.requires_grad_() for tensor in (x, *parameters[:2])]
        dy = b.tensor("dy", last)
        y = function(b, True)(x, *parameters)
        return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)[0]

    ops = {
        "forward": lambda b: normalise(b, training=True),
        "backward": backward,
        "inference": lambda b: normalise(b, training=False),
    }
    return Peer(ops, last, compiled)


@contextmanager
def reading_twice() -> Iterator[None]:
    """Nothing is kept in shared memory: sums and results each read their tensors."""
    launch = sys.modules.get("nbnorm.cuda.launch")
    if launch is None:  # dry
        yield
        return
    limits, launch.limits = launch.limits, lambda: (0, False)
    try:
        yield
    finally:
        launch.limits = limits


def _twice(ours: Peer) -> Peer:
    def setup_of(op: str) -> Setup:
        def setup(b: Batch) -> Call:
            call = ours.ops[op](b)

            def twice() -> Any:
                with reading_twice():
                    return call()

            return twice

        return setup

    return Peer({op: setup_of(op) for op in ("forward", "backward")}, ours.last)


OURS, OURS_LAST, OURS_TWICE = "nbnorm", "nbnorm channels-last", "nbnorm, read twice"
PEERS: dict[str, Peer] = {
    COPY: Peer(dict.fromkeys(OPS, _copy)),
    OURS: _ours(last=False),
    OURS_LAST: _ours(last=True),
    OURS_TWICE: _twice(_ours(last=False)),
    "PyTorch": _torch(),
    "PyTorch without cuDNN": _torch(cudnn=False),
    "PyTorch channels-last": _torch(last=True),
    "PyTorch channels-last without cuDNN": _torch(last=True, cudnn=False),
    "torch.compile": _torch(compiled=True),
    "torch.compile channels-last": _torch(last=True, compiled=True),
}


def is_ours(name: str) -> bool:
    return name in (OURS, OURS_LAST, OURS_TWICE)


def others(names: Any) -> list[str]:
    """Return the names that are neither nbnorm's nor the copy."""
    return [name for name in names if not is_ours(name) and name != COPY]
