"""What Numba cannot say: the only file with LLVM in it.

`each` is a loop whose iterations do not depend on one another, as `#pragma omp simd` in C. A plain
loop over more than a few arrays is not vectorised, as LLVM would have to check each written one
against all others (at most eight checks), and one that works in place runs value by value.

`piece` and `four` slice without counting references. Each function that an array passes through on
its way to a slice counts it up and down, atomically: per row, as long as the arithmetic on 512
values.

`stream` stores past the cache. Ordinary stores read every line of the output before they write it;
non-temporal ones do not: writing 103 MB from cached planes took 6.2 ms with the first, 3.8 ms with
the second. A kernel computes a tile in a buffer that stays in L1 and streams it out from there, so
that one intrinsic serves all of them.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from nbnorm.cpu.jit import none_without, ordered

LINE = 64  # bytes of a cache line, and of a vector here; LLVM splits it for narrower registers


@intrinsic
def piece(typing_context, view, n, c, s, size):
    """x[n, c, s : s + size] of a view (memory, stride of n, stride of c); None of no view."""
    ints = (types.intp,) * 4
    if isinstance(view, types.NoneType):
        return types.none(view, *ints), _nothing

    def codegen(context, builder, signature, args):
        return _piece(context, builder, view.types[0], *args)

    return types.Array(view.types[0].dtype, 1, "C")(view, *ints), codegen


@intrinsic
def four(typing_context, view, n, step, c, s, size):
    """The pieces at n, n + step, n + 2 step and n + 3 step; of no view, None four times."""
    ints = (types.intp,) * 5
    if isinstance(view, types.NoneType):
        return types.UniTuple(types.none, 4)(view, *ints), _nothing

    def codegen(context, builder, signature, args):
        view_, n, step, *rest = args
        pieces = []
        for _ in range(4):
            pieces.append(_piece(context, builder, view.types[0], view_, n, *rest))
            n = builder.add(n, step)
        return context.make_tuple(builder, signature.return_type, pieces)

    return types.UniTuple(types.Array(view.types[0].dtype, 1, "C"), 4)(view, *ints), codegen


def _nothing(context, builder, signature, args):
    return context.get_constant_null(signature.return_type)


def _piece(context, builder, memory, view, n, c, s, size):
    array, n_stride, c_stride = (builder.extract_value(view, i) for i in range(3))
    data = context.make_array(memory)(context, builder, array).data
    start = builder.add(builder.mul(n, n_stride), builder.mul(c, c_stride))
    itemsize = context.get_constant(types.intp, memory.dtype.bitwidth // 8)
    result = context.make_array(types.Array(memory.dtype, 1, "C"))(context, builder)
    context.populate_array(
        result,
        data=builder.gep(data, [builder.add(start, s)]),
        shape=cgutils.pack_array(builder, [size]),
        strides=cgutils.pack_array(builder, [itemsize]),
        itemsize=itemsize,
        meminfo=None,
    )
    return result._getvalue()


@intrinsic
def each(typing_context, size, body, args):
    """body(j, *args) for every j < size; j alone may be written, of arrays that are read too.

    Arrays go to the body without their reference counts, which it would change for every j.
    """
    body_signature = typing_context.resolve_function_type(body, (types.intp, *args.types), {})

    def codegen(context, builder, signature, values):
        call = context.get_function(body, body_signature)
        size, _, packed = values
        args_ = [
            _uncounted(context, builder, kind, builder.extract_value(packed, i))
            for i, kind in enumerate(args.types)
        ]
        group = _Distinct(builder.module, ())
        before, zero, one = builder.block, size.type(0), size.type(1)
        loop, done = builder.append_basic_block("each"), builder.append_basic_block("each.done")
        builder.cbranch(builder.icmp_signed(">", size, zero), loop, done)
        builder.position_at_end(loop)
        j = builder.phi(size.type)
        j.add_incoming(zero, before)
        call(builder, [j, *args_])
        blocks = builder.function.blocks
        for block in blocks[blocks.index(loop) :]:
            for instruction in block.instructions:
                if instruction.opname == "call":
                    instruction.set_metadata("llvm.access.group", group)
        following = builder.add(j, one, flags=("nsw", "nuw"))
        j.add_incoming(following, builder.block)
        again = builder.cbranch(builder.icmp_signed("<", following, size), loop, done)
        name = ir.MetaDataString(builder.module, "llvm.loop.parallel_accesses")
        parallel = builder.module.add_metadata([name, group])
        again.set_metadata("llvm.loop", _Distinct(builder.module, (parallel,), names_itself=True))
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(size, body, args), codegen


def _uncounted(context, builder, kind, value):
    """The arrays in a value with no owner to count references for."""
    if isinstance(kind, types.BaseTuple):
        items = [
            _uncounted(context, builder, item, builder.extract_value(value, i))
            for i, item in enumerate(kind.types)
        ]
        return context.make_tuple(builder, kind, items)
    if not isinstance(kind, types.Array):
        return value
    array = context.make_array(kind)(context, builder, value)
    array.meminfo = cgutils.get_null_value(array.meminfo.type)
    return array._getvalue()


class _Distinct(ir.values.MDValue):  # type: ignore[misc]
    """`distinct !{...}`, equal to no other node, as llvmlite makes none."""

    def __init__(self, module, operands, *, names_itself=False):
        super().__init__(module, operands, str(len(module.metadata)))
        if names_itself:
            self.operands = (self, *operands)

    def descr(self, buf):
        nodes = ", ".join(node.get_reference() for node in self.operands)
        buf += (f"distinct !{{ {nodes} }}", "\n")

    __eq__ = object.__eq__
    __hash__ = object.__hash__


@intrinsic
def half_to_float(typing_context, bits):
    """float32 of the bits of a float16."""

    def codegen(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic
def half_from_float(typing_context, value):
    """Bits of the float16 next to a float32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), codegen


@intrinsic
def _store_lines(typing_context, source, target, begin, lines):
    """Copy whole lines to target[begin:], which starts at a line, past the cache."""
    signature = types.void(source, target, types.intp, types.intp)

    def codegen(context, builder, signature, args):
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


@intrinsic
def _fence(typing_context):
    """Wait until all stores are seen, those past the cache too, which a lock's store would not."""

    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@ordered
def fence(streamed):
    """`_fence`, once a chunk, where anything was streamed."""
    if streamed:
        _fence()


@none_without("target")
def staged(buffer, target, streamed):
    """Where to compute the target: a part of the buffer if it is to be streamed, else itself."""
    return buffer[: target.size] if streamed else target


@none_without("target")
def flush(source, target, streamed):
    """Bring what was computed where `staged` said to the target."""
    if streamed:
        stream(source, target)


@ordered
def stream(source, target):
    """target = source past the cache, but for the values before its first line and after its last.

    `fence` orders these stores before what tells another thread of them.
    """
    size = target.size
    head = min(size, (-target.ctypes.data % LINE) // target.itemsize)
    lines = (size - head) // (LINE // target.itemsize)
    for i in range(head):
        target[i] = source[i]
    _store_lines(source, target, head, lines)
    for i in range(head + lines * (LINE // target.itemsize), size):
        target[i] = source[i]
