"""What Numba cannot say: the only file with LLVM in it.

`piece` slices without counting references. Each function that an array passes through on its way
to a slice counts it up and down, atomically: per row, as long as the arithmetic on 512 values.

`stream` stores past the cache. Ordinary stores read every line of the output before they write it;
non-temporal ones do not: writing 103 MB from cached planes took 6.2 ms with the first, 3.8 ms with
the second. A kernel computes a tile in a buffer that stays in L1 and streams it out from there, so
that one intrinsic serves all of them.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from nbnorm.cpu.jit import ordered

LINE = 64  # bytes of a cache line, and of a vector here; LLVM splits it for narrower registers


@intrinsic
def piece(typing_context, view, n, c, s, size):  # type: ignore[no-untyped-def]
    """x[n, c, s : s + size] of a view (memory, stride of n, stride of c); None of no view."""
    ints = (types.intp,) * 4
    if isinstance(view, types.NoneType):
        return types.none(
            view, *ints
        ), lambda context, builder, sig, args: context.get_dummy_value()
    memory = view.types[0]
    slice_ = types.Array(memory.dtype, 1, "C")

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        array, n_stride, c_stride = (builder.extract_value(args[0], i) for i in range(3))
        data = context.make_array(memory)(context, builder, array).data
        start = builder.add(builder.mul(args[1], n_stride), builder.mul(args[2], c_stride))
        itemsize = context.get_constant(types.intp, memory.dtype.bitwidth // 8)
        result = context.make_array(slice_)(context, builder)
        context.populate_array(
            result,
            data=builder.gep(data, [builder.add(start, args[3])]),
            shape=cgutils.pack_array(builder, [args[4]]),
            strides=cgutils.pack_array(builder, [itemsize]),
            itemsize=itemsize,
            meminfo=None,
        )
        return result._getvalue()

    return slice_(view, *ints), codegen


@intrinsic
def _store_lines(typing_context, source, target, begin, lines):  # type: ignore[no-untyped-def]
    """Copy whole lines to target[begin:], which starts at a line, past the cache."""
    signature = types.void(source, target, types.intp, types.intp)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        i64 = ir.IntType(64)
        item = context.get_data_type(source.dtype)
        vector = ir.VectorType(item, LINE * 8 // source.dtype.bitwidth)
        arrays = [
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(signature.args[:2], args[:2], strict=True)
        ]
        source_, target_ = (
            builder.bitcast(builder.gep(array.data, [args[2]]), vector.as_pointer())
            for array in arrays
        )
        before = builder.block
        loop = builder.append_basic_block("stream")
        done = builder.append_basic_block("streamed")
        builder.cbranch(builder.icmp_signed(">", args[3], i64(0)), loop, done)
        builder.position_at_end(loop)
        i = builder.phi(i64)
        i.add_incoming(i64(0), before)
        value = builder.load(builder.gep(source_, [i]), align=source.dtype.bitwidth // 8)
        store = builder.store(value, builder.gep(target_, [i]), align=LINE)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        following = builder.add(i, i64(1))
        i.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, args[3]), loop, done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return signature, codegen


@ordered
def staged(buffer, target, streamed):  # type: ignore[no-untyped-def]
    """Where to compute the target: a part of the buffer if it is to be streamed, else itself."""
    return buffer[: target.size] if streamed else target


@ordered
def settle(source, target, streamed):  # type: ignore[no-untyped-def]
    """Bring what was computed where `staged` said to the target."""
    if streamed:
        stream(source, target)


@ordered
def stream(source, target):  # type: ignore[no-untyped-def]
    """target = source past the cache, but for the values before its first line and after its last.

    No fence follows: what hands the result to another thread (a barrier, a lock) orders these
    stores as it does all others.
    """
    size = target.size
    head = min(size, (-target.ctypes.data % LINE) // target.itemsize)
    lines = (size - head) // (LINE // target.itemsize)
    for i in range(head):
        target[i] = source[i]
    _store_lines(source, target, head, lines)
    for i in range(head + lines * (LINE // target.itemsize), size):
        target[i] = source[i]
