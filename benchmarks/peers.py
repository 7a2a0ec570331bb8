"""Batch normalization as others do it, next to nbnorm: one dict for tests and benchmarks.

A peer's `forward`, `backward` and `inference` each take a `Batch`, do what can be done beforehand
and return a call without arguments, which is what is timed. The call returns y, or (dx, dgamma,
dbeta), as arrays or tensors in the shape of x, whatever their order in memory. Libraries are
imported when a peer is used, and a peer whose library is not installed is in `LEFT_OUT`.
"""

from collections.abc import Callable
from functools import cached_property, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

import nbnorm

EPS, MOMENTUM = 1e-5, 0.1

Call = Callable[[], Any]


class Batch:
    """Random arrays for one shape, in memory as the shape says or with the channels last.

    Attributes
    ----------
    x, dy, out : ndarray of `shape`, channel axis 1
        Input, gradient of the output, and memory for results.
    gamma, beta, running_mean, running_var : ndarray (C,)
    """

    def __init__(self, shape: tuple[int, ...], dtype: str = "float32", *, last: bool = False):
        self._shape, self._dtype, self._last = shape, np.dtype(dtype), last
        self._rng = np.random.default_rng(0)
        C = shape[1]
        self.gamma = self._rng.uniform(0.5, 1.5, C).astype(dtype)
        self.beta = self._rng.uniform(-0.5, 0.5, C).astype(dtype)
        self.running_mean = self._rng.uniform(-0.5, 0.5, C).astype(dtype)
        self.running_var = self._rng.uniform(0.5, 1.5, C).astype(dtype)
        self.x = self._draw()

    @cached_property
    def dy(self) -> np.ndarray:
        return self._draw()

    @cached_property
    def out(self) -> np.ndarray:
        return self._draw()

    def _draw(self) -> np.ndarray:
        N, C, *space = self._shape
        if not self._last:
            return self._rng.standard_normal(self._shape, self._dtype)
        return np.moveaxis(self._rng.standard_normal((N, *space, C), self._dtype), -1, 1)


class Peer(NamedTuple):
    """How somebody computes it; `last`: channels last in memory; `reuse`: into memory at hand."""

    forward: Callable[[Batch], Call]
    backward: Callable[[Batch], Call]
    inference: Callable[[Batch], Call]
    last: bool = False
    reuse: bool = False


def _nbnorm(*, last: bool, reuse: bool) -> Peer:
    def forward(b: Batch) -> Call:
        out = b.out if reuse else None
        return lambda: nbnorm.batch_norm_forward(
            b.x, b.gamma, b.beta, b.running_mean, b.running_var,
            momentum=MOMENTUM, eps=EPS, out=out,
        ).y  # fmt: skip

    def backward(b: Batch) -> Call:
        out = b.out if reuse else None
        _, mean, rstd = nbnorm.batch_norm_forward(b.x, b.gamma, b.beta, eps=EPS)
        return lambda: nbnorm.batch_norm_backward(b.dy, b.x, b.gamma, mean, rstd, out=out)[:3]

    def inference(b: Batch) -> Call:
        out = b.out if reuse else None
        return lambda: nbnorm.batch_norm_inference(
            b.x, b.gamma, b.beta, b.running_mean, b.running_var, eps=EPS, out=out
        )

    return Peer(forward, backward, inference, last, reuse)


def _numpy() -> Peer:
    """As course notes and home-made networks have it: one line per equation, arrays in between."""

    def normalise(b: Batch, shape: tuple[int, ...], axes: tuple[int, ...]) -> Any:
        mean = b.x.mean(axes)
        centered = b.x - mean.reshape(shape)
        var = (centered**2).mean(axes)
        rstd = 1 / np.sqrt(var + b.x.dtype.type(EPS))
        return mean, var, rstd, centered * rstd.reshape(shape)

    def axes_of(b: Batch) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (-1, *[1] * (b.x.ndim - 2)), (0, *range(2, b.x.ndim))

    def forward(b: Batch) -> Call:
        shape, axes = axes_of(b)
        unbias = b.x[:, 0].size / (b.x[:, 0].size - 1)

        def call() -> np.ndarray:
            mean, var, _, xhat = normalise(b, shape, axes)
            b.running_mean = (1 - MOMENTUM) * b.running_mean + MOMENTUM * mean
            b.running_var = (1 - MOMENTUM) * b.running_var + MOMENTUM * unbias * var
            return b.gamma.reshape(shape) * xhat + b.beta.reshape(shape)

        return call

    def backward(b: Batch) -> Call:
        shape, axes = axes_of(b)
        m = b.x[:, 0].size
        _, _, rstd, xhat = normalise(b, shape, axes)
        scale = (rstd / m).reshape(shape)

        def call() -> tuple[np.ndarray, ...]:
            dgamma, dbeta = (b.dy * xhat).sum(axes), b.dy.sum(axes)
            dxhat = b.dy * b.gamma.reshape(shape)
            sums = dxhat.sum(axes, keepdims=True), (dxhat * xhat).sum(axes, keepdims=True)
            return scale * (m * dxhat - sums[0] - xhat * sums[1]), dgamma, dbeta

        return call

    def inference(b: Batch) -> Call:
        shape, _ = axes_of(b)
        gamma, beta, mean, var = (
            array.reshape(shape) for array in (b.gamma, b.beta, b.running_mean, b.running_var)
        )
        return lambda: gamma * (b.x - mean) / np.sqrt(var + b.x.dtype.type(EPS)) + beta

    return Peer(forward, backward, inference)


def _tensors(*arrays: np.ndarray) -> Any:
    """Return the arrays as torch tensors on the same memory."""
    import torch

    return [torch.from_numpy(array) for array in arrays]


def _torch_operators(*, last: bool) -> Peer:
    """PyTorch's own operators, below autograd, with results in memory that is there already."""

    def normalise(b: Batch, *, training: bool) -> Call:
        import torch

        x, gamma, beta, mean, var, out = _tensors(
            b.x, b.gamma, b.beta, b.running_mean, b.running_var, b.out
        )
        saved = [gamma.new_empty(gamma.shape if training else 0) for _ in range(2)]
        inputs = x, gamma, beta, mean, var, training, MOMENTUM, EPS
        results = {"out": out, "save_mean": saved[0], "save_invstd": saved[1]}
        return lambda: torch.ops.aten.native_batch_norm.out(*inputs, **results)[0]

    def backward(b: Batch) -> Call:
        import torch

        dy, x, gamma, beta, out = _tensors(b.dy, b.x, b.gamma, b.beta, b.out)
        _, mean, rstd = torch.native_batch_norm(x, gamma, beta, None, None, True, MOMENTUM, EPS)
        inputs = dy, x, gamma, None, None, mean, rstd, True, EPS, [True, True, True]
        results = {"out0": out, "out1": torch.empty_like(gamma), "out2": torch.empty_like(beta)}
        return lambda: torch.ops.aten.native_batch_norm_backward.out(*inputs, **results)

    forward, inference = partial(normalise, training=True), partial(normalise, training=False)
    return Peer(forward, backward, inference, last, reuse=True)


def _torch_functional() -> Peer:
    """torch.nn.functional.batch_norm and autograd, as users call them."""

    def normalise(b: Batch, *, training: bool) -> Call:
        from torch.nn.functional import batch_norm

        inputs = _tensors(b.x, b.running_mean, b.running_var, b.gamma, b.beta)
        return lambda: batch_norm(*inputs, training=training, momentum=MOMENTUM, eps=EPS)

    def backward(b: Batch) -> Call:
        import torch

        dy, *inputs = _tensors(b.dy, b.x, b.gamma, b.beta)
        x, gamma, beta = (tensor.requires_grad_() for tensor in inputs)
        y = torch.nn.functional.batch_norm(x, None, None, gamma, beta, training=True, eps=EPS)
        return lambda: torch.autograd.grad(y, (x, gamma, beta), dy, retain_graph=True)

    return Peer(partial(normalise, training=True), backward, partial(normalise, training=False))


PEERS: dict[str, Peer] = {
    "nbnorm": _nbnorm(last=False, reuse=True),
    "nbnorm channels-last": _nbnorm(last=True, reuse=True),
    "nbnorm new output": _nbnorm(last=False, reuse=False),
    "NumPy": _numpy(),
}
LEFT_OUT: list[str] = []

if find_spec("torch"):
    PEERS |= {
        "PyTorch": _torch_operators(last=False),
        "PyTorch channels-last": _torch_operators(last=True),
        "F.batch_norm": _torch_functional(),
    }
else:
    LEFT_OUT.append("PyTorch")
