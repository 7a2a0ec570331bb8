"""asv: peak memory of a process.

Each figure comes from a separate process and includes the memory at its start, so only differences
matter. Compiling takes more memory than a result does, so `setup_cache` compiles, in another
process.
"""

from collections import deque
from itertools import product
from math import prod

import numpy as np

import nbnorm
from benchmarks.peers import OPS, Batch
from benchmarks.shapes import shape_of
from benchmarks.suites.bench_passes import call_of


class Ops:
    """All ops; a hidden copy of the largest tensor, 103 MB, would show."""

    params = (["32x256x56x56", "16x3x512x512"], list(OPS))
    param_names = ("shape", "op")

    def setup_cache(self):
        for name, op in product(*self.params):
            call_of(op, shape_of(name), "channels-first")

    def setup(self, name, op):
        self.call = call_of(op, shape_of(name), "channels-first")

    def peakmem_op(self, name, op):
        self.call()


class NewResults:
    """A loop of y = batch_norm_forward(x) that keeps the last `held` results of 51 MB.

    The pool reuses the memory of results: the peak must grow with `held`, by one result each, but
    not with `rounds`.
    """

    params = ([8, 80], [1, 4])
    param_names = ("rounds", "held")
    shape = (32, 512, 28, 28)

    def setup_cache(self):
        nbnorm.warmup(self.shape)

    def setup(self, rounds, held):
        self.x = Batch(self.shape).x

    def peakmem_loop(self, rounds, held):
        results = deque(maxlen=held)
        for _ in range(rounds):
            results.append(nbnorm.batch_norm_forward(self.x).y)


class Stack:
    """Forward and backward of eight layers in a row, on 51 MB, with and without inplace.

    In place, all layers together keep the memory of one tensor instead of nine.
    """

    params = ([False, True],)
    param_names = ("inplace",)
    shape = (32, 512, 28, 28)

    def setup_cache(self):
        for inplace in (False, True):
            self.setup(inplace)
            self.time_step(inplace)

    def setup(self, inplace):
        self.x = Batch(self.shape).x
        self.layers = [nbnorm.BatchNorm(self.shape[1], inplace=inplace) for _ in range(8)]

    def time_step(self, inplace):
        value = self.x
        for layer in self.layers:
            value = layer.forward(value)
        for layer in reversed(self.layers):
            value = layer.backward(value)

    peakmem_step = time_step


# Channels, smallest and largest side of a plane, and number of results.
MIXED = {
    "0.3-1.8 MB": (16, 24, 60, 200),
    "2-7 MB": (16, 60, 120, 60),
    "2-8 MB": (64, 24, 60, 60),
    "40-60 MB": (1200, 34, 37, 6),
}


class MixedResults:
    """Time and memory of results whose sizes never repeat, with and without the pool.

    With the pool, no case may take longer than without it, and the peak of memory may not exceed
    what was in use at once.
    """

    params = (list(MIXED), ["forward", "inference"], [1, 30], [True, False])
    param_names = ("sizes", "op", "held", "pool")

    def setup_cache(self):
        for C, *_ in MIXED.values():
            nbnorm.warmup((8, C, 40, 40))

    def setup(self, sizes, op, held, pool):
        C, low, high, number = MIXED[sizes]
        planes = np.random.default_rng(0).integers(low, high + 1, (number, 2))
        self.shapes = [(8, C, int(h), int(w)) for h, w in planes]
        self.x = Batch((8, C, high, high)).x.reshape(-1)
        mean, var = np.zeros(C, np.float32), np.ones(C, np.float32)
        self.y = {
            "forward": lambda x: nbnorm.batch_norm_forward(x).y,
            "inference": lambda x: nbnorm.batch_norm_inference(x, mean, var),
        }[op]
        self.before = nbnorm.set_pool_limit(None if pool else 0)
        self.time_loop(sizes, op, held, pool)

    def teardown(self, sizes, op, held, pool):
        nbnorm.set_pool_limit(self.before)

    def time_loop(self, sizes, op, held, pool):
        results = deque(maxlen=held)
        for shape in self.shapes:
            results.append(self.y(self.x[: prod(shape)].reshape(shape)))

    peakmem_loop = time_loop
