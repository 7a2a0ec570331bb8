"""What Numba cannot express, in LLVM (as in objects.py, launch.py and host.py).

`each` is a loop with independent iterations, as `#pragma omp simd` in C. LLVM does not vectorise a
plain loop over more than a few arrays, as it would have to check each written array against all
others (at most eight checks), and a loop that works in place runs value by value.

`piece`, `two`, `four`, `row` and `part` slice without counting references. Numba counts them
atomically in every function that an array passes through: per row, that takes as long as the
arithmetic on 512 values.

`each_to` can store past the cache. An ordinary store reads the line that it overwrites, a
non-temporal store does not: reading and writing 103 MB took 4.9 ms with the former, 3.3 ms with the
latter. Computing a tile in a buffer and copying it out gained nothing, as the memory waits while
the tile is computed.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from nbnorm.cpu.jit import ordered

_INT32 = ir.IntType(32)

LINE = 64  # bytes of a cache line, and of a vector here; LLVM splits it for narrower registers


@intrinsic
def piece(typing_context, view, n, c, s, size):
    """x[n, c, s : s + size] of a view (memory, stride of n, stride of c); None for None."""
    ints = (types.intp,) * 4
    if isinstance(view, types.NoneType):
        return types.none(view, *ints), _nothing

    def codegen(context, builder, signature, args):
        return _piece(context, builder, view.types[0], *args)

    return types.Array(view.types[0].dtype, 1, "C")(view, *ints), codegen


def _pieces(count):
    @intrinsic
    def pieces(typing_context, view, n, step, c, s, size):
        """Pieces at n, n + step, n + 2 step, ..., as a tuple; a tuple of None for None."""
        ints = (types.intp,) * 5
        if isinstance(view, types.NoneType):
            return types.UniTuple(types.none, count)(view, *ints), _nothing

        def codegen(context, builder, signature, args):
            view_, n, step, *rest = args
            pieces = []
            for _ in range(count):
                pieces.append(_piece(context, builder, view.types[0], view_, n, *rest))
                n = builder.add(n, step)
            return context.make_tuple(builder, signature.return_type, pieces)

        return types.UniTuple(types.Array(view.types[0].dtype, 1, "C"), count)(view, *ints), codegen

    return pieces


two, four = _pieces(2), _pieces(4)


@intrinsic
def in_sequence(typing_context, views, step):
    """Whether x[n + 1] begins `step` values after x[n], in every view that is not None."""

    def codegen(context, builder, signature, args):
        same = context.get_constant(types.boolean, True)
        for i, view in enumerate(views.types):
            if not isinstance(view, types.NoneType):
                n_stride = builder.extract_value(builder.extract_value(args[0], i), 1)
                same = builder.and_(same, builder.icmp_signed("==", n_stride, args[1]))
        return same

    return types.boolean(views, types.intp), codegen


def _nothing(context, builder, signature, args):
    return context.get_constant_null(signature.return_type)


def _piece(context, builder, memory, view, n, c, s, size):
    array, n_stride, c_stride = (builder.extract_value(view, i) for i in range(3))
    data = context.make_array(memory)(context, builder, array).data
    start = builder.add(builder.mul(n, n_stride), builder.mul(c, c_stride))
    row = types.Array(memory.dtype, 1, "C")
    return array_at(context, builder, row, builder.gep(data, [builder.add(start, s)]), [size])


@intrinsic
def new(typing_context, shape, dtype):
    """Uninitialised array; shape is a length or a tuple of lengths.

    `np.empty` would be two more functions to compile for every dtype and rank, 60 ms.
    """
    one = isinstance(shape, types.Integer)
    kind = types.Array(dtype.dtype, 1 if one else len(shape), "C")

    def codegen(context, builder, signature, args):
        lengths = [args[0]] if one else cgutils.unpack_tuple(builder, args[0])
        return _new(context, builder, kind, lengths)

    return kind(types.intp if one else shape, dtype), codegen


@intrinsic(prefer_literal=True)
def news(typing_context, count, size, dtype):
    """Tuple of `count` uninitialised arrays of one length, allocated together.

    Allocations are half the time of a small call.
    """

    def codegen(context, builder, signature, args):
        _, arrays = _news(context, builder, signature.return_type, args[1])
        return arrays

    return types.UniTuple(_row_of(dtype), count.literal_value)(count, types.intp, dtype), codegen


@intrinsic(prefer_literal=True)
def zeros(typing_context, count, size, dtype):
    """`news` filled with 0."""

    def codegen(context, builder, signature, args):
        whole, arrays = _news(context, builder, signature.return_type, args[1])
        _clear(builder, whole)
        return arrays

    return types.UniTuple(_row_of(dtype), count.literal_value)(count, types.intp, dtype), codegen


def _row_of(dtype):
    return types.Array(dtype.dtype, 1, "C")


def _news(context, builder, rows, size):
    """One array over all the memory, and the tuple of arrays that share it."""
    kind = rows.dtype
    whole = context.make_array(kind)(
        context, builder, _new(context, builder, kind, [builder.mul(size, size.type(rows.count))])
    )
    arrays = []
    for i in range(rows.count):
        data = builder.gep(whole.data, [builder.mul(size, size.type(i))])
        arrays.append(array_at(context, builder, kind, data, [size], whole.meminfo))
        if i:
            context.nrt.incref(builder, kind, arrays[-1])
    return whole, context.make_tuple(builder, rows, arrays)


@intrinsic
def clear(typing_context, array):
    """Fill an array in C order with 0."""

    def codegen(context, builder, signature, args):
        _clear(builder, context.make_array(array)(context, builder, args[0]))
        return context.get_dummy_value()

    return types.void(array), codegen


def _clear(builder, array):
    cgutils.memset(builder, array.data, builder.mul(array.nitems, array.itemsize), 0)


@intrinsic
def row(typing_context, array, i):
    """array[i] of a matrix in C order, without counting references."""
    kind = types.Array(array.dtype, 1, "C")

    def codegen(context, builder, signature, args):
        array_ = context.make_array(array)(context, builder, args[0])
        _, size = cgutils.unpack_tuple(builder, array_.shape)
        start = builder.gep(array_.data, [builder.mul(args[1], size)])
        return array_at(context, builder, kind, start, [size])

    return kind(array, types.intp), codegen


@intrinsic
def of_chunk(typing_context, partial, i, k, c0, c1):
    """partial[i, k, c0:c1] of an array in C order, without counting references."""
    kind = types.Array(partial.dtype, 1, "C")

    def codegen(context, builder, signature, args):
        array, i, k, c0, c1 = args
        array_ = context.make_array(partial)(context, builder, array)
        _, chunks, channels = cgutils.unpack_tuple(builder, array_.shape)
        start = builder.mul(builder.add(builder.mul(i, chunks), k), channels)
        start = builder.gep(array_.data, [builder.add(start, c0)])
        return array_at(context, builder, kind, start, [builder.sub(c1, c0)])

    return kind(partial, *(types.intp,) * 4), codegen


@intrinsic
def part(typing_context, values, begin, end):
    """values[begin:end] of a row, or of each in a tuple, references uncounted; None for None."""
    ints = (types.intp,) * 2

    def codegen(context, builder, signature, args):
        value, begin, end = args
        size = builder.sub(end, begin)

        def of(kind, array):
            data = context.make_array(kind)(context, builder, array).data
            return array_at(context, builder, kind, builder.gep(data, [begin]), [size])

        return _for_arrays(context, builder, values, value, of)

    return values(values, *ints), codegen


def _new(context, builder, kind, lengths):
    size = context.get_constant(types.intp, kind.dtype.bitwidth // 8)
    for length in lengths:
        size = builder.mul(size, length)
    align = context.get_preferred_array_alignment(kind.dtype)
    meminfo = context.nrt.meminfo_alloc_aligned(builder, size, align)
    data = context.nrt.meminfo_data(builder, meminfo)
    return array_at(context, builder, kind, data, lengths, meminfo)


def array_at(context, builder, kind, data, lengths, meminfo=None):
    """Make an array in C order from memory at `data`; `meminfo`, if given, counts references."""
    array = context.make_array(kind)(context, builder)
    itemsize = context.get_constant(types.intp, kind.dtype.bitwidth // 8)
    strides = [itemsize]
    for length in reversed(lengths[1:]):
        strides.insert(0, builder.mul(strides[0], length))
    context.populate_array(
        array,
        data=builder.bitcast(data, array.data.type),
        shape=cgutils.pack_array(builder, lengths),
        strides=cgutils.pack_array(builder, strides),
        itemsize=itemsize,
        meminfo=meminfo,
    )
    return array._getvalue()


@intrinsic
def row_of(typing_context, array):
    """A C-contiguous array as a writeable row, without counting references; None for None.

    The array must outlive its row, as arguments and returned results do.
    """
    if isinstance(array, types.NoneType):
        return types.none(array), _nothing
    row = types.Array(array.dtype, 1, "C")

    def codegen(context, builder, signature, args):
        given = context.make_array(array)(context, builder, args[0])
        return array_at(context, builder, row, given.data, [given.nitems])

    return row(array), codegen


@intrinsic
def line_after(typing_context, array):
    """Number of values from an array's start to the first cache line at or after it."""

    def codegen(context, builder, signature, args):
        data = context.make_array(array)(context, builder, args[0]).data
        return _before_line(builder, [data], array.dtype.bitwidth // 8)

    return types.intp(array), codegen


@intrinsic
def address_of(typing_context, array):
    """Address of an array's first value."""

    def codegen(context, builder, signature, args):
        given = context.make_array(array)(context, builder, args[0])
        return builder.ptrtoint(given.data, context.get_value_type(types.intp))

    return types.intp(array), codegen


@intrinsic
def each(typing_context, size, body, args):
    """Call body(j, *args) for every j < size, in any order.

    Iterations must be independent: of an array that it reads, the body may write only element j. It
    gets arrays without reference counts, which would otherwise change for every j.
    """
    body_signature = typing_context.resolve_function_type(body, (types.intp, *args.types), {})

    def codegen(context, builder, signature, values):
        call = context.get_function(body, body_signature)
        size, _, packed = values
        arrays = _rebased(context, builder, args, packed, lambda data: data)
        _loop(builder, size.type(0), size, lambda j: call(builder, [j, *arrays]))
        return context.get_dummy_value()

    return types.void(size, body, args), codegen


@intrinsic
def each_to(typing_context, size, body, args, outs, streamed):
    """`each` of a body that writes to its last arguments, `outs`; past the cache if `streamed`.

    Whole vectors are streamed, from the first cache line on; none if the outs reach a cache line at
    different j. The body writes a vector to the stack, which LLVM turns into a register.

    This is one intrinsic because a function would count references to args, and such an atomic
    operation waits for all streaming stores (channels-last inference took 9.0 ms rather than 3.3).
    """
    kinds = (*args.types, *outs.types)
    body_signature = typing_context.resolve_function_type(body, (types.intp, *kinds), {})
    dtypes = [out.dtype for out in outs.types if isinstance(out, types.Array)]
    itemsize = dtypes[0].bitwidth // 8
    # One vector of the compute dtype. In half precision that is half a line: two stores fill it.
    width = LINE // max(itemsize, 4)

    def codegen(context, builder, signature, values):
        call = context.get_function(body, body_signature)
        size, _, args_, outs_, streamed = values
        targets = [
            context.make_array(kind)(context, builder, builder.extract_value(outs_, i)).data
            for i, kind in enumerate(outs.types)
            if isinstance(kind, types.Array)
        ]
        item = targets[0].type.pointee
        vector = ir.VectorType(item, width)
        stack = [cgutils.alloca_once(builder, vector) for _ in targets]

        def body_at(first, outputs):
            """The body, its inputs shifted to begin at value `first`."""
            outputs = iter(outputs)
            inputs = _rebased(
                context, builder, args, args_, lambda data: builder.gep(data, [first])
            )
            written = _rebased(context, builder, outs, outs_, lambda data: next(outputs))
            return lambda j: call(builder, [j, *inputs, *written])

        zero, one_store = size.type(0), size.type(width)
        before = _before_line(builder, targets, itemsize)
        before = builder.select(builder.icmp_unsigned("<", before, size), before, size)
        before = builder.select(streamed, before, size)
        stores = builder.sdiv(builder.sub(size, before), one_store)
        after = builder.add(before, builder.mul(stores, one_store))
        with builder.if_then(builder.and_(streamed, builder.icmp_signed("<", after, size))):
            for target in targets:
                _fetch(builder, builder.gep(target, [after]))
        with cgutils.for_range(builder, stores) as loop:
            first = builder.add(before, builder.mul(loop.index, one_store))
            there = [builder.bitcast(memory, item.as_pointer()) for memory in stack]
            _loop(builder, zero, one_store, body_at(first, there))
            for memory, target in zip(stack, targets, strict=True):
                target = builder.bitcast(builder.gep(target, [first]), vector.as_pointer())
                store = builder.store(builder.load(memory), target, align=width * itemsize)
                hint = builder.module.add_metadata([_INT32(1)])
                store.set_metadata("nontemporal", hint)
        with cgutils.for_range(builder, size.type(2)) as loop:
            first_part = builder.icmp_signed("==", loop.index, zero)
            begin = builder.select(first_part, zero, after)
            end = builder.select(first_part, before, size)
            _loop(builder, begin, end, body_at(zero, targets))
        return context.get_dummy_value()

    return types.void(size, body, args, outs, streamed), codegen


def _before_line(builder, pointers, itemsize):
    """Number of values before the first cache line; -1 if it differs between the pointers."""
    counts = []
    for pointer in pointers:
        address = builder.ptrtoint(pointer, ir.IntType(64))
        past = builder.and_(builder.neg(address), address.type(LINE - 1))
        counts.append(builder.udiv(past, address.type(itemsize)))
    count = counts[0]
    for other in counts[1:]:
        count = builder.select(builder.icmp_unsigned("==", count, other), count, count.type(-1))
    return count


def _fetch(builder, pointer, write=True):
    """Prefetch a cache line that will be written soon, or read.

    An ordinary store to a line that is not in the cache holds up all stores behind it. If y begins
    16 bytes after a line, every plane of 28 x 28 ends with such a store: inference of
    32 x 512 x 28 x 28 took 2.4 ms instead of 1.3.
    """
    pointer = builder.bitcast(pointer, ir.PointerType(ir.IntType(8)))
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, _INT32, _INT32, _INT32])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(prefetch, [pointer, _INT32(int(write)), _INT32(3), _INT32(1)])


@intrinsic
def prefetch(typing_context, values):
    """Prefetch a row that is skipped; does nothing for None.

    The processor prefetches only what is read in sequence: after a gap the next row would be late.
    """
    if isinstance(values, types.NoneType):
        return types.void(values), _nothing_at_all

    def codegen(context, builder, signature, args):
        array = context.make_array(values)(context, builder, args[0])
        size = builder.extract_value(array.shape, 0)
        step = size.type(LINE // (values.dtype.bitwidth // 8))
        with cgutils.for_range_slice(builder, size.type(0), size, step) as (i, _):
            _fetch(builder, builder.gep(array.data, [i]), write=False)
        return context.get_dummy_value()

    return types.void(values), codegen


def _nothing_at_all(context, builder, signature, args):
    return context.get_dummy_value()


def _loop(builder, begin, end, body):
    """Emit body(j) for begin <= j < end, marked as a loop of independent iterations."""
    group = _Distinct(builder.module, ())
    before = builder.block
    loop, done = builder.append_basic_block("each"), builder.append_basic_block("each.done")
    builder.cbranch(builder.icmp_signed("<", begin, end), loop, done)
    builder.position_at_end(loop)
    j = builder.phi(begin.type)
    j.add_incoming(begin, before)
    body(j)
    blocks = builder.function.blocks
    for block in blocks[blocks.index(loop) :]:
        for instruction in block.instructions:
            if instruction.opname == "call":
                instruction.set_metadata("llvm.access.group", group)
    following = builder.add(j, begin.type(1), flags=("nsw", "nuw"))
    j.add_incoming(following, builder.block)
    again = builder.cbranch(builder.icmp_signed("<", following, end), loop, done)

    def property_(name, *operands):
        name = ir.MetaDataString(builder.module, name)
        return builder.module.add_metadata([name, *operands])

    # LLVM does not vectorise an unrolled loop: adding up 64 lanes took 54 ns instead of 20.
    properties = (
        property_("llvm.loop.parallel_accesses", group),
        property_("llvm.loop.unroll.disable"),
    )
    again.set_metadata("llvm.loop", _Distinct(builder.module, properties, names_itself=True))
    builder.position_at_end(done)


def _rebased(context, builder, kind, packed, rebase):
    """Values of a tuple, its arrays without reference counts and with memory at rebase(memory)."""

    def of(kind, value):
        array = context.make_array(kind)(context, builder, value)
        array.meminfo = cgutils.get_null_value(array.meminfo.type)
        array.data = rebase(array.data)
        return array._getvalue()

    return cgutils.unpack_tuple(builder, _for_arrays(context, builder, kind, packed, of))


def _for_arrays(context, builder, kind, value, of):
    """`value` with each array in it, also within tuples, replaced by of(kind, array)."""
    if isinstance(kind, types.BaseTuple):
        parts = [
            _for_arrays(context, builder, item, builder.extract_value(value, i), of)
            for i, item in enumerate(kind.types)
        ]
        return context.make_tuple(builder, kind, parts)
    return of(kind, value) if isinstance(kind, types.Array) else value


class _Distinct(ir.values.MDValue):  # type: ignore[misc]
    """`distinct !{...}`: metadata equal to no other node, which llvmlite lacks."""

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
def sum_of(typing_context, values):
    """Sum of a float64 array: in four vectors of eight, these pairwise, then the rest.

    LLVM may not reorder the sum of a plain loop and adds one value after another: 49 of them took
    as long as 32 rows of 49 columns.
    """

    def codegen(context, builder, signature, args):
        array = context.make_array(values)(context, builder, args[0])
        size = builder.extract_value(array.shape, 0)
        item, lanes = array.data.type.pointee, 8
        vector = ir.VectorType(item, lanes)
        zeros, zero = ir.Constant(vector, [0.0] * lanes), ir.Constant(item, 0.0)
        sums = [cgutils.alloca_once_value(builder, zeros) for _ in range(4)]
        rest = cgutils.alloca_once_value(builder, zero)

        def add(begin, sums, width):
            """Add values from `begin` on, as long as they fill all sums; return where it ends."""
            step = size.type(len(sums) * width)
            end = builder.sub(size, builder.srem(builder.sub(size, begin), step))
            with cgutils.for_range_slice(builder, begin, end, step) as (i, _):
                for k, total in enumerate(sums):
                    pointer = builder.gep(array.data, [builder.add(i, size.type(k * width))])
                    value = builder.load(builder.bitcast(pointer, total.type), align=8)
                    builder.store(builder.fadd(builder.load(total), value), total)
            return end

        done = add(size.type(0), sums, lanes)
        done = add(done, sums[:1], lanes)
        add(done, [rest], 1)
        a, b, c, d = (builder.load(total) for total in sums)
        total = builder.fadd(builder.fadd(a, b), builder.fadd(c, d))
        while lanes > 1:
            lanes //= 2
            lower, upper = (
                builder.shuffle_vector(
                    total, total, ir.Constant(ir.VectorType(_INT32, lanes), half)
                )
                for half in (list(range(lanes)), list(range(lanes, 2 * lanes)))
            )
            total = builder.fadd(lower, upper)
        return builder.fadd(builder.extract_element(total, _INT32(0)), builder.load(rest))

    return types.float64(values), codegen


@intrinsic
def unconditional(typing_context, value):
    """value, loaded without waiting for the condition that selects it.

    LLVM would merge load and selection into a masked load. The processor would then begin to read
    dy only after x has arrived and been compared.
    """

    def codegen(context, builder, signature, args):
        freeze = ir.instructions.Instruction(builder.block, args[0].type, "freeze", args)
        builder._insert(freeze)
        return freeze

    return value(value), codegen


@intrinsic
def half_to_float(typing_context, bits):
    """float32 of the bits of a float16."""

    def codegen(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic
def half_from_float(typing_context, value):
    """Bits of the float16 nearest to a float32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), codegen


@intrinsic
def _fence(typing_context):
    """Wait until all stores are visible to other threads, streaming stores included.

    Releasing a lock does not wait for those.
    """

    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@ordered
def fence(streamed):
    """`_fence` at the end of a chunk, if it was streamed."""
    if streamed:
        _fence()
