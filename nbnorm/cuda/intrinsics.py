"""What numba.cuda cannot express: 16-byte vectors, halves, 32-bit division, exponents, clusters.

This is the only file with LLVM and PTX. `memory_of` returns the load and the store for a storage
dtype and a width. They move values between memory (a raw pointer) and a thread's local array of the
compute dtype.
"""

from typing import Any, NamedTuple

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_F32, _F64 = ir.FloatType(), ir.DoubleType()


class Storage(NamedTuple):
    """A dtype in memory: pointer type, compute dtype, bytes, and its name in PTX."""

    pointer: Any
    computed: Any
    itemsize: int
    ptx: str


STORAGE = {
    "float32": Storage(types.CPointer(types.float32), types.float32, 4, "f32"),
    "float64": Storage(types.CPointer(types.float64), types.float64, 8, "f64"),
    "float16": Storage(types.CPointer(types.uint16), types.float32, 2, "f16"),
    "bfloat16": Storage(types.CPointer(types.int16), types.float32, 2, "bf16"),
}


class _Word(NamedTuple):
    """A register of a load or store: PTX type, constraint, LLVM type, number of values in it."""

    ptx: str
    constraint: str
    type: Any
    values: int


def _word(storage: Storage, width: int) -> _Word:
    if storage.itemsize == 8:
        return _Word("f64", "d", _F64, 1)
    if storage.itemsize == 4:
        return _Word("f32", "f", _F32, 1)
    return _Word("b16", "h", _I16, 1) if width == 1 else _Word("b32", "r", _I32, 2)


def memory_of(dtype: str, width: int) -> tuple[Any, Any]:
    """Return load and store of `width` values at an address that is a multiple of their size.

    load(pointer, index, values, start): values[start : start + width] = pointer[index : ...].
    store(pointer, index, values, start): the reverse, rounded to nearest, ties to even.
    """
    storage = STORAGE[dtype]
    word = _word(storage, width)
    words = width // word.values
    suffix = (f".v{words}" if words > 1 else "") + f".{word.ptx}"

    # With side effects: LLVM must not repeat a load after a store to its memory (y may be x).
    @intrinsic
    def load(typing_context, pointer, index, values, start):
        def codegen(context, builder, signature, args):
            registers = [f"${i}" for i in range(words)]
            text = f"ld.global.L1::no_allocate{suffix} {_braced(registers)}, [${words}];"
            outputs = ir.LiteralStructType([word.type] * words) if words > 1 else word.type
            constraints = ",".join([f"={word.constraint}"] * words + ["l"])
            address = _address(builder, args[0], args[1])
            asm = ir.InlineAsm(ir.FunctionType(outputs, [_I64]), text, constraints, True)
            loaded = builder.call(asm, [address])
            if words > 1:
                loaded = [builder.extract_value(loaded, i) for i in range(words)]
            else:
                loaded = [loaded]
            wide = [value for item in loaded for value in _widened(builder, item, storage)]
            target = context.make_array(signature.args[2])(context, builder, args[2]).data
            for i, value in enumerate(wide):
                place = builder.add(args[3], args[3].type(i))
                builder.store(value, builder.gep(target, [place]))
            return context.get_dummy_value()

        return types.void(pointer, types.int64, values, types.int64), codegen

    @intrinsic
    def store(typing_context, pointer, index, values, start):
        def codegen(context, builder, signature, args):
            source = context.make_array(signature.args[2])(context, builder, args[2]).data
            wide = [
                builder.load(builder.gep(source, [builder.add(args[3], args[3].type(i))]))
                for i in range(width)
            ]
            narrow = [
                _narrowed(builder, wide[i : i + word.values], storage)
                for i in range(0, width, word.values)
            ]
            registers = [f"${i + 1}" for i in range(words)]
            text = f"st.global.cs{suffix} [$0], {_braced(registers)};"
            kind = ir.FunctionType(ir.VoidType(), [_I64] + [word.type] * words)
            constraints = ",".join(["l"] + [word.constraint] * words + ["~{memory}"])
            asm = ir.InlineAsm(kind, text, constraints, True)
            builder.call(asm, [_address(builder, args[0], args[1]), *narrow])
            return context.get_dummy_value()

        return types.void(pointer, types.int64, values, types.int64), codegen

    return load, store


@intrinsic
def quotient(typing_context, a, b):
    """a // b for 0 <= a, b < 2^31, with no check for 0.

    A 64-bit division is a function call, and Python's checks b.
    """

    def codegen(context, builder, signature, args):
        a, b = (builder.trunc(value, _I32) for value in args)
        return builder.zext(builder.udiv(a, b), _I64)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def exponent_of(typing_context, value):
    """e of 2^e <= |value| < 2^(e + 1), int64; -1023 for 0 and subnormal, 1024 for Inf and NaN."""

    def codegen(context, builder, signature, args):
        bits = builder.trunc(builder.lshr(builder.bitcast(args[0], _I64), _I64(52)), _I32)
        biased = builder.and_(bits, _I32(0x7FF))
        return builder.sext(builder.sub(biased, _I32(1023)), _I64)

    return types.int64(types.float64), codegen


@intrinsic
def power_of(typing_context, exponent):
    """2^exponent as float64, for exponents from -1022 to 1023."""

    def codegen(context, builder, signature, args):
        biased = builder.add(args[0], _I64(1023))
        return builder.bitcast(builder.shl(biased, _I64(52)), _F64)

    return types.float64(types.int64), codegen


@intrinsic
def cluster_barrier(typing_context):
    """Wait for all blocks of the cluster; what they wrote is then visible. Needs sm_90."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [])
        text = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
        asm = ir.InlineAsm(kind, text, "~{memory}", True)
        builder.call(asm, [], attrs=("convergent",))
        return context.get_dummy_value()

    return types.void(), codegen


def _braced(registers: list[str]) -> str:
    return "{" + ", ".join(registers) + "}" if len(registers) > 1 else registers[0]


def _address(builder: Any, pointer: Any, index: Any) -> Any:
    return builder.ptrtoint(builder.gep(pointer, [index]), _I64)


def _widened(builder: Any, word: Any, storage: Storage) -> list[Any]:
    """Return the values in a register, in the compute dtype."""
    if storage.itemsize >= 4:
        return [word]
    if storage.ptx == "bf16":
        if word.type == _I16:
            word = builder.shl(builder.zext(word, _I32), _I32(16))
            return [builder.bitcast(word, _F32)]
        lower, upper = builder.shl(word, _I32(16)), builder.and_(word, _I32(0xFFFF0000))
        return [builder.bitcast(lower, _F32), builder.bitcast(upper, _F32)]
    halves = [word]
    if word.type != _I16:
        halves = [builder.trunc(word, _I16), builder.trunc(builder.lshr(word, _I32(16)), _I16)]
    convert = ir.InlineAsm(ir.FunctionType(_F32, [_I16]), "cvt.f32.f16 $0, $1;", "=f,h")
    return [builder.call(convert, [half]) for half in halves]


def _narrowed(builder: Any, values: list[Any], storage: Storage) -> Any:
    """Return a register with these values of the compute dtype."""
    if storage.itemsize >= 4:
        return values[0]
    if len(values) == 1:
        kind, text, constraints = _I16, f"cvt.rn.{storage.ptx}.f32 $0, $1;", "=h,f"
    else:  # the first operand becomes the upper half
        kind, text, constraints = _I32, f"cvt.rn.{storage.ptx}x2.f32 $0, $2, $1;", "=r,f,f"
    asm = ir.InlineAsm(ir.FunctionType(kind, [_F32] * len(values)), text, constraints)
    return builder.call(asm, values)
