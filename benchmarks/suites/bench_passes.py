"""asv: one pass or step over one tensor, by shape, layout and dtype.

`setup` draws data and compiles kernels, outside the timing. Passes write into existing memory;
steps return new results, as in users' programs.
"""

import numpy as np

import nbnorm
from benchmarks.peers import OPS, PEERS, Batch
from benchmarks.shapes import SHAPES, name_of, shape_of

LAYOUTS = ["channels-first", "channels-last"]


def call_of(op, shape, layout, dtype="float32"):
    """Return nbnorm's call, compiled by a first call."""
    last = layout == "channels-last"
    if last and len(shape) == 2:
        raise NotImplementedError("(N, C) has one layout")
    name = "nbnorm channels-last" if last else "nbnorm"
    peer = PEERS[name] if op in PEERS[name].ops else PEERS[f"{name}, new output"]
    call = peer.ops[op](Batch(shape, dtype, last=last))
    call()
    return call


class _Op:
    """An op in float32 at every shape; subclasses set `op`."""

    params = (list(map(name_of, SHAPES)), LAYOUTS)
    param_names = ("shape", "layout")
    op: str

    def setup(self, name, layout):
        self.call = call_of(self.op, shape_of(name), layout)

    def time_op(self, name, layout):
        self.call()


class Forward(_Op):
    op = "forward"


class Backward(_Op):
    op = "backward"


class Inference(_Op):
    op = "inference"


class StepWithRelu(_Op):
    op = "relu"


class StepWithAddRelu(_Op):
    op = "add+relu"


class SecondOrder:
    """The second derivative, and forward mode, in float32."""

    params = tuple(map(name_of, SHAPES))
    param_names = ("shape",)

    def setup(self, name):
        shape, rng = shape_of(name), np.random.default_rng(0)
        self.x, self.dy, self.ddx = (rng.standard_normal(shape, np.float32) for _ in range(3))
        _, *self.statistics = nbnorm.batch_norm_forward(self.x)
        self.time_double_backward(name)
        self.time_jvp(name)

    def time_double_backward(self, name):
        nbnorm.batch_norm_double_backward(
            self.ddx, None, None, self.dy, self.x, None, *self.statistics
        )

    def time_jvp(self, name):
        nbnorm.batch_norm_jvp(self.ddx, None, None, self.x, None, *self.statistics)


class Dtypes:
    """The other dtypes at two shapes: large planes out of cache, small planes in cache."""

    params = (
        list(OPS),
        ["32x256x56x56", "32x512x7x7"],
        LAYOUTS,
        ["float64", "float16", "bfloat16"],
    )
    param_names = ("op", "shape", "layout", "dtype")

    def setup(self, op, name, layout, dtype):
        self.call = call_of(op, shape_of(name), layout, dtype)

    def time_op(self, op, name, layout, dtype):
        self.call()


class Segments:
    """Training forward and backward with statistics for all of x, for 32 parts and per sample."""

    params = (["32x256x56x56", "128x256x14x14", "8192x256"], [1, 32, "samples"])
    param_names = ("shape", "groups")

    def setup(self, name, groups):
        batch = Batch(shape_of(name))
        self.x, self.dy = batch.x, batch.dy
        self.groups = len(self.x) if groups == "samples" else groups
        if self.x[0].size == self.x.shape[1] and groups == "samples":
            raise NotImplementedError("a sample has one value per channel")
        self.time_forward(name, groups)
        self.time_backward(name, groups)

    def time_forward(self, name, groups):
        result = nbnorm.batch_norm_forward(self.x, groups=self.groups)
        self.mean, self.rstd = result.mean, result.rstd

    def time_backward(self, name, groups):
        nbnorm.batch_norm_backward(self.dy, self.x, None, self.mean, self.rstd, groups=self.groups)


class WhatCounts:
    """Training forward and backward with lengths, a mask or weights, and without ("all")."""

    params = (["32x256x56x56", "32x56x56x256", "64x512x400"], ["all", "lengths", "mask", "weights"])
    param_names = ("shape", "what")

    def setup(self, name, what):
        shape = tuple(map(int, name.split("x")))
        self.axis = -1 if shape == (32, 56, 56, 256) else 1
        rng = np.random.default_rng(0)
        self.x, self.dy = rng.normal(size=(2, *shape)).astype(np.float32)
        shared = list(shape)
        shared[self.axis] = 1
        position = -2 if self.axis == -1 else -1
        self.counting = {
            "all": {},
            "lengths": {"lengths": rng.integers(1, shape[position] + 1, shape[0])},
            "mask": {"mask": rng.random(shared) < 0.7},
            "weights": {"weights": rng.random(shared, np.float32)},
        }[what]
        self.out = np.empty_like(self.x)
        self.time_forward(name, what)
        self.time_backward(name, what)

    def time_forward(self, name, what):
        _, self.mean, self.rstd = nbnorm.batch_norm_forward(
            self.x, axis=self.axis, out=self.out, **self.counting
        )

    def time_backward(self, name, what):
        nbnorm.batch_norm_backward(
            self.dy, self.x, None, self.mean, self.rstd, axis=self.axis, out=self.out,
            **self.counting,
        )  # fmt: skip


class Activations:
    """Forward and backward with activations, of which ReLU is the baseline."""

    params = (["8x64x28x28", "256x1024"], ["relu", "leaky_relu", "silu", "gelu", "tanh"])
    param_names = ("shape", "activation")

    def setup(self, name, activation):
        rng = np.random.default_rng(0)
        shape = shape_of(name)
        self.x, self.dy = rng.normal(size=(2, *shape)).astype(np.float32)
        self.gamma, self.beta = np.ones((2, shape[1]), np.float32)
        self.out = np.empty_like(self.x)
        self.time_forward(name, activation)
        self.time_backward(name, activation)

    def time_forward(self, name, activation):
        _, self.mean, self.rstd = nbnorm.batch_norm_forward(
            self.x, self.gamma, self.beta, activation=activation, out=self.out
        )

    def time_backward(self, name, activation):
        nbnorm.batch_norm_backward(
            self.dy, self.x, self.gamma, self.mean, self.rstd,
            beta=self.beta, activation=activation, out=self.out,
        )  # fmt: skip
