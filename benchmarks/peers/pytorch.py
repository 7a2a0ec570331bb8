"""PyTorch on the CPU: operators, functions as users call them, and compiled functions."""

import os
import shutil
from functools import partial
from typing import Any

import numba
import numpy as np

from benchmarks.peers.batch import EPS, MOMENTUM, Batch, Call, LeftOut, Peer


def _torch() -> Any:
    import torch

    torch.set_num_threads(numba.get_num_threads())
    return torch


def _tensors(*arrays: np.ndarray) -> Any:
    """Return tensors that share the arrays' memory; bfloat16 is passed as 16-bit integers."""
    torch = _torch()
    return [
        torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        if array.dtype.name == "bfloat16"
        else torch.from_numpy(array)
        for array in arrays
    ]


def array_of(tensor: Any) -> np.ndarray:
    """Return an array that shares a tensor's memory."""
    torch, tensor = _torch(), tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view("bfloat16")
    return tensor.numpy()


def operators(*, last: bool = False) -> Peer:
    """PyTorch's operators, below autograd, with results in existing memory."""

    def normalise(b: Batch, *, training: bool) -> Call:
        torch = _torch()
        x, gamma, beta, mean, var, out = _tensors(
            b.x, b.gamma, b.beta, b.running_mean, b.running_var, b.out
        )
        saved = [gamma.new_empty(gamma.shape if training else 0) for _ in range(2)]
        inputs = x, gamma, beta, mean, var, training, MOMENTUM, EPS
        results = {"out": out, "save_mean": saved[0], "save_invstd": saved[1]}
        return lambda: torch.ops.aten.native_batch_norm.out(*inputs, **results)[0]

    def backward(b: Batch) -> Call:
        torch = _torch()
        dy, x, gamma, beta, out = _tensors(b.dy, b.x, b.gamma, b.beta, b.out)
        _, mean, rstd = torch.native_batch_norm(x, gamma, beta, None, None, True, MOMENTUM, EPS)
        inputs = dy, x, gamma, None, None, mean, rstd, True, EPS, [True, True, True]
        results = {"out0": out, "out1": torch.empty_like(gamma), "out2": torch.empty_like(beta)}
        return lambda: torch.ops.aten.native_batch_norm_backward.out(*inputs, **results)

    ops = {
        "forward": partial(normalise, training=True),
        "backward": backward,
        "inference": partial(normalise, training=False),
    }
    return Peer(ops, last, reuse=True, library="torch")


def functional(*, last: bool = False, compiled: bool = False) -> Peer:
    """torch.nn.functional with autograd, as users call it; residual and ReLU in place."""

    def prepare(b: Batch, *, training: bool, relu: bool = False) -> tuple[Any, list[Any]]:
        """Return a function and its first arguments."""
        torch = _torch()

        def function(x, mean, var, gamma, beta, residual=None):
            y = torch.nn.functional.batch_norm(
                x, mean, var, gamma, beta, training=training, momentum=MOMENTUM, eps=EPS
            )
            if residual is not None:
                y += residual
            return torch.relu_(y) if relu else y

        if compiled:
            _need_compiler()
            function = torch.compile(function, dynamic=False)
        return function, _tensors(b.x, b.running_mean, b.running_var, b.gamma, b.beta)

    def normalise(b: Batch, *, training: bool) -> Call:
        function, inputs = prepare(b, training=training)
        return lambda: function(*inputs)

    def backward(b: Batch) -> Call:
        torch = _torch()
        function, (x, mean, var, gamma, beta) = prepare(b, training=True)
        wanted = [tensor.requires_grad_() for tensor in (x, gamma, beta)]
        (dy,) = _tensors(b.dy)
        y = function(x, mean, var, gamma, beta)
        return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)

    def step(b: Batch, *, add: bool) -> Call:
        torch = _torch()
        function, inputs = prepare(b, training=True, relu=True)
        dy, residual = _tensors(b.dy, b.residual)
        inputs += [residual] * add
        x, _, _, gamma, beta, *added = inputs
        wanted = [tensor.requires_grad_() for tensor in (x, gamma, beta, *added)]

        def call() -> tuple:
            y = function(*inputs)
            return (y, *torch.autograd.grad(y, wanted, dy))

        return call

    ops = {
        "forward": partial(normalise, training=True),
        "backward": backward,
        "inference": partial(normalise, training=False),
        "relu": partial(step, add=False),
        "add+relu": partial(step, add=True),
    }
    return Peer(ops, last, library="torch")


def _need_compiler() -> None:
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        raise LeftOut("torch.compile needs a C++ compiler")
