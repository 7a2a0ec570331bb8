"""asv: the most memory that the process ever had.

Each figure is of a process of its own, what the process starts with included: figures are there to
be compared. Compiling takes more memory than a result does, so `setup_cache`, which runs in another
process, compiles.
"""

from collections import deque
from itertools import product

import nbnorm
from benchmarks.peers import OPS, Batch
from benchmarks.shapes import shape_of
from benchmarks.suites.bench_passes import call_of


class Ops:
    """A hidden copy of the largest tensor, 103 MB, would show."""

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
    """A loop of y = batch_norm_forward(x), the last `held` results being kept: 51 MB each.

    The pool uses the memory of a result again: the peak must grow with `held`, one result for each,
    and not with `rounds`.
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
