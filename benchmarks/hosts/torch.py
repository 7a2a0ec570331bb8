"""PyTorch: its own batch norm and nbnorm's, with autograd."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from benchmarks.peers.batch import EPS, Batch
from nbnorm.integrations.torch import batch_norm


def name() -> str:
    return f"PyTorch {torch.__version__}"


def calls(shape: tuple[int, ...], dtype: str = "float32") -> dict[str, Callable[[], object]]:
    """Return calls of forward and backward, which return y, dx, dgamma, dbeta as tensors."""
    b = Batch(shape, dtype)
    dy = torch.from_numpy(b.dy)
    inputs = [torch.from_numpy(array).requires_grad_() for array in (b.x, b.gamma, b.beta)]

    def step(function: Callable[..., Any]) -> tuple[Any, ...]:
        y = function(inputs[0], None, None, *inputs[1:], training=True, eps=EPS)
        return (y.detach(), *torch.autograd.grad(y, inputs, dy))

    return {"host": lambda: step(functional.batch_norm), "nbnorm": lambda: step(batch_norm)}
