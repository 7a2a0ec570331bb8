"""Loops on the OpenMP pool of a host library in this process, not on Numba's own (LLVM code).

PyTorch's wheels bring a libgomp of their own. Idle threads of one pool spin for a while, on cores
that the other pool needs: forward and backward of 4096 x 512 took 1.4 ms when alternating with
PyTorch's calls, often 20. `loop_of` makes a function that is called like `numba_parallel_for` but
runs the loop on the host's threads, by GOMP_parallel, which GCC calls for `#pragma omp parallel`.
"""

from __future__ import annotations

import ctypes
from typing import Any

from llvmlite import ir
from numba import cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic

from nbnorm.cpu.launch import BYTES, INT, LOOP

_WORKER = ir.FunctionType(ir.VoidType(), [BYTES])
# GOMP_parallel(function that each thread runs, its argument, number of threads, flags).
_PARALLEL = ir.FunctionType(
    ir.VoidType(), [_WORKER.as_pointer(), BYTES, ir.IntType(32), ir.IntType(32)]
)
# The loop, its data, its number of iterations, and the next one that no thread has taken.
_RECORD = ir.LiteralStructType([LOOP.as_pointer(), BYTES, INT, INT])


@intrinsic
def _run(typing_context, parallel, loop, lengths, data, threads):
    """Run the iterations of a loop, each on whichever thread is free."""

    def codegen(context, builder, signature, args):
        parallel, loop, lengths, data, threads = args
        worker = _worker(builder.module)
        record = cgutils.alloca_once(builder, _RECORD)
        turns = builder.load(builder.inttoptr(lengths, INT.as_pointer()))
        fields = (
            builder.inttoptr(loop, LOOP.as_pointer()), builder.inttoptr(data, BYTES),
            turns, INT(0),
        )  # fmt: skip
        for i, value in enumerate(fields):
            builder.store(value, cgutils.gep_inbounds(builder, record, 0, i))
        builder.call(
            builder.inttoptr(parallel, _PARALLEL.as_pointer()),
            [
                worker, builder.bitcast(record, BYTES),
                builder.trunc(threads, ir.IntType(32)), ir.IntType(32)(0),
            ],
        )  # fmt: skip
        return context.get_dummy_value()

    return types.void(*(types.intp,) * 5), codegen


def _worker(module):
    """Make the function that each thread runs: take the next iteration until none is left."""
    function = ir.Function(module, _WORKER, module.get_unique_name("nbnorm_host_worker"))
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    record = builder.bitcast(function.args[0], _RECORD.as_pointer())
    loop, data, turns = (
        builder.load(cgutils.gep_inbounds(builder, record, 0, i)) for i in range(3)
    )
    following = cgutils.gep_inbounds(builder, record, 0, 3)
    number = cgutils.alloca_once(builder, BYTES)
    one = cgutils.alloca_once_value(builder, INT(1))
    take, work, done = (function.append_basic_block(name) for name in ("take", "work", "done"))
    builder.branch(take)
    builder.position_at_end(take)
    turn = builder.atomic_rmw("add", following, INT(1), "seq_cst")
    builder.cbranch(builder.icmp_signed("<", turn, turns), work, done)
    builder.position_at_end(work)
    builder.store(builder.inttoptr(turn, BYTES), number)
    builder.call(loop, [number, one, one, data])
    builder.branch(take)
    builder.position_at_end(done)
    builder.ret_void()
    return function


def loop_of(library: ctypes.CDLL) -> Any:
    """Return a compiled function that runs loops on a library's pool; keep it alive to call it."""
    parallel = ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value

    def on_host(loop, args, lengths, steps, data, dimensions, count, threads):
        _run(parallel, loop, lengths, data, threads)

    return cfunc(types.void(*(types.intp,) * 8))(on_host)
