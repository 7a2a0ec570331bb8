"""Units of work, shared among the threads of Numba's pool (LLVM, as intrinsics.py).

For a prange Numba compiles the loop's body, a wrapper around it and the kernel, 1-2 s more than for
a serial loop, and the result always runs on threads. `launch` compiles one function that does a
share of the units. The kernel calls the pool by address with that function. Without a pool there is
one share, which the caller does.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

INT = ir.IntType(64)
BYTES = ir.IntType(8).as_pointer()
# What Numba's pool calls, a gufunc's loop(arguments, lengths, steps, data). See `_share`.
LOOP = ir.FunctionType(
    ir.VoidType(), [BYTES.as_pointer(), INT.as_pointer(), INT.as_pointer(), BYTES]
)
# numba_parallel_for(loop, arguments, lengths, steps, data, core dimensions, number of arguments,
# number of threads).
_POOL = ir.FunctionType(
    ir.VoidType(),
    [BYTES, BYTES.as_pointer(), INT.as_pointer(), INT.as_pointer(), BYTES, INT, INT, INT],
)


@intrinsic
def launch(typing_context, pool, units, body, args):
    """Call body(*args, u) for every u < units on the threads of `pool`; see `threads.pool`.

    Each thread takes one contiguous range of units. If the body raises, which it does only for
    lack of memory, `launch` raises MemoryError when all threads have ended.
    """
    called = typing_context.resolve_function_type(body, (*args.types, types.intp), {})
    compiled = body.dispatcher.get_compile_result(called)

    def codegen(context, builder, signature, values):
        pool, units, _, packed = values
        context.add_linking_libs([compiled.library])
        address, threads = (builder.extract_value(pool, i) for i in range(2))
        alone = builder.or_(
            builder.icmp_unsigned("==", address, INT(0)),
            builder.icmp_signed("<", threads, INT(2)),
        )
        shares = builder.select(alone, INT(1), threads)
        work = ir.LiteralStructType([packed.type, INT, INT, INT])
        share = _share(context, builder.module, compiled.fndesc, called, work)
        memory = cgutils.alloca_once(builder, work)
        for i, value in enumerate((packed, units, shares, INT(0))):
            builder.store(value, cgutils.gep_inbounds(builder, memory, 0, i))
        data = builder.bitcast(memory, BYTES)
        # The loop's only argument is the number of the share, passed as an address: from 0 on, in
        # steps of 1.
        number = cgutils.alloca_once_value(builder, ir.Constant(BYTES, None))
        length = cgutils.alloca_once_value(builder, shares)
        step = cgutils.alloca_once_value(builder, INT(1))
        with builder.if_else(alone) as (serial, parallel):
            with serial:
                builder.call(share, [number, length, step, data])
            with parallel:
                loop = builder.bitcast(share, BYTES)
                builder.call(
                    builder.inttoptr(address, _POOL.as_pointer()),
                    [loop, number, length, step, data, INT(0), INT(1), threads],
                )
        failed = builder.load(cgutils.gep_inbounds(builder, memory, 0, 3))
        with builder.if_then(builder.icmp_unsigned("!=", failed, INT(0)), likely=False):
            message = ("no memory for temporary arrays",)
            context.call_conv.return_user_exc(builder, MemoryError, message)
        return context.get_dummy_value()

    return types.void(pool, types.intp, body, args), codegen


def _share(context, module, descriptor, called, work):
    """Make the function that does some of the shares of `work` = (args, units, shares, failed)."""
    function = ir.Function(module, LOOP, module.get_unique_name("nbnorm_share"))
    function.linkage = "internal"
    function.attributes.add("noinline")  # called in two places
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    numbers, lengths, _, data = function.args
    memory = builder.bitcast(data, work.as_pointer())
    packed, units, shares = (
        builder.load(cgutils.gep_inbounds(builder, memory, 0, i)) for i in range(3)
    )
    args = [builder.extract_value(packed, i) for i in range(len(called.args) - 1)]
    first = builder.ptrtoint(builder.load(numbers), INT)
    last = builder.add(first, builder.load(lengths))
    begin, end = (builder.sdiv(builder.mul(t, units), shares) for t in (first, last))
    with cgutils.for_range_slice(builder, begin, end, INT(1)) as (u, _):
        status, _ = context.call_internal_no_propagate(builder, descriptor, called, [*args, u])
        with builder.if_then(status.is_error, likely=False):
            builder.store(INT(1), cgutils.gep_inbounds(builder, memory, 0, 3))
    builder.ret_void()
    return function
