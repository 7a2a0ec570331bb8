"""asv: calls from functions that users compile, and the time to compile such a function."""

import numpy as np
from numba import njit

import nbnorm
from benchmarks.peers import Batch
from benchmarks.shapes import shape_of

CALLS = 100


@njit
def forwards(x, gamma, beta, running_mean, running_var, calls):
    total = 0.0
    for _ in range(calls):
        total += nbnorm.batch_norm_forward(x, gamma, beta, running_mean, running_var).rstd[0]
    return total


@njit
def inferences(x, gamma, beta, running_mean, running_var, calls):
    total = 0.0
    for _ in range(calls):
        y = nbnorm.batch_norm_inference(x, gamma, beta, running_mean, running_var)
        total += y.size
    return total


@njit
def backwards(x, gamma, beta, running_mean, running_var, calls):
    total = 0.0
    _, mean, rstd = nbnorm.batch_norm_forward(x, gamma, beta)
    for _ in range(calls):
        total += nbnorm.batch_norm_backward(x, x, gamma, mean, rstd).dgamma[0]
    return total


class Calls:
    """A hundred calls in a compiled or Python loop, each with new results."""

    params = (
        ["compiled", "Python"],
        ["forward", "inference", "backward"],
        ["2x8x4x4", "60x100", "8x16x32x32"],
    )
    param_names = ("loop", "op", "shape")
    timeout = 300

    def setup(self, loop, op, name):
        x = Batch(shape_of(name)).x
        C = x.shape[1]
        parameters = [np.ones(C, x.dtype), np.zeros(C, x.dtype)]
        self.args = x, *parameters, np.zeros(C, x.dtype), np.ones(C, x.dtype)
        compiled = {"forward": forwards, "inference": inferences, "backward": backwards}[op]
        self.loop = compiled if loop == "compiled" else compiled.py_func
        self.loop(*self.args, 1)

    def time_calls(self, loop, op, name):
        self.loop(*self.args, CALLS)


# Numba has compiled a function, and nbnorm is imported.
BEFORE = """
import numpy, nbnorm
from numba import njit
@njit
def any_function(x):
    return numpy.zeros(x.shape) + x
@njit
def function(x):
    return nbnorm.batch_norm_forward(x, axis={axis})
x = numpy.ones((60, 10, 10), "float32")
any_function(x)
"""


class Compile:
    """The first compilation of a function that calls forward, in a separate process.

    Channels first takes longer: planes may be small or large, so both traversals are compiled.
    """

    params = ([1, -1],)
    param_names = ("axis",)
    number = 1
    repeat = 3
    rounds = 1
    warmup_time = 0
    timeout = 300

    def timeraw_first_call(self, axis):
        return "function(x)", BEFORE.format(axis=axis)
