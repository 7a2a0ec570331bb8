"""How a pass over (N, C, S) is divided on a GPU, computed from shape, alignment and dtype.

What determines bits (traversal, width, group, readers, length) follows from these alone, so results
are the same on every GPU.
"""

from functools import lru_cache
from math import gcd
from typing import NamedTuple

from nbnorm._layout import PLANE

WARP = 32
THREADS = 256  # per block; at least PLANE, so that every column of a plane has a thread
VECTOR = 16  # bytes of the widest access
UNROLL = 4  # vectors of one tensor that a thread has in flight
# Values of a channel, or of a group of channels, that one block takes. On sm_90 three such chunks
# fit into a multiprocessor's shared memory as float32, and eight blocks of three hold a channel of
# 32 images of 112 x 112.
BLOCK_VALUES = 17 << 10
CLUSTER = 8  # blocks in a cluster, which every GPU that has clusters supports
CHUNKS = 1024  # per channel, at most: one warp adds them up
# Greatest value that is stored as 0: half the least number, as a tie goes to even.
STORED_AS_ZERO = {"float16": 2.0**-25, "bfloat16": 2.0**-134}
READERS = 32  # most threads that read a sample, unless one unit of channels needs more


Names = tuple[str, ...]  # of tensors that are float32 although x is float16 or bfloat16


class Plan(NamedTuple):
    """How a pass is divided.

    By rows, a block takes `length` vectors of one channel, numbered through all its planes. By
    columns, it takes `group` channels of `length` samples, with `readers` threads side by side
    along the columns and as many samples at a time as there are threads for. In both cases that is
    a chunk; there are `chunks` of them.
    """

    traversal: str
    width: int  # values loaded at once
    group: int
    readers: int
    length: int
    chunks: int
    blocks: int


@lru_cache(maxsize=1024)
def plan(N: int, C: int, S: int, itemsize: int, aligned: int, threads: int = THREADS) -> Plan:
    """Divide a pass over N samples of C channels of S values, none of them 0.

    `aligned` is a number of bytes that divides all addresses and all strides of planes and samples.
    """
    width = VECTOR // itemsize
    if S >= PLANE:
        if aligned % VECTOR or S % width:
            width = 1
        vectors = N * (S // width)
        if vectors >= 1 << 31:  # vectors are numbered with 32 bits
            raise ValueError(
                f"x has {N * S} values per channel, expected fewer than {width << 31} "
                f"(2**31 reads of {width})"
            )
        most = max(BLOCK_VALUES // width, threads * UNROLL)
        chunks = min(_ceil(vectors, most), CHUNKS)
        length = _ceil(vectors, chunks)
        chunks = _ceil(vectors, length)
        return Plan("rows", width, 1, 1, length, chunks, C * chunks)
    unit = width // gcd(S, width)  # channels that end where a vector ends
    if aligned % VECTOR or C * S % width or _ceil(unit * S, width) > threads:
        width, unit = 1, 1
    units = max(1, min(READERS, threads) * width // (unit * S))
    group = min(unit * units, _ceil(C, unit) * unit)
    readers = group * S // width
    at_once = max(1, threads // readers)
    step = at_once * UNROLL
    most = _ceil(max(BLOCK_VALUES // (group * S), 1), step) * step
    chunks = min(_ceil(N, most), CHUNKS)
    length = _ceil(_ceil(N, chunks), step) * step
    chunks = _ceil(N, length)
    return Plan("columns", width, group, readers, length, chunks, _ceil(C, group) * chunks)


class Residence(NamedTuple):
    """How blocks share a channel, or a group of channels, that stays in shared memory."""

    blocks: int  # per channel or group: a cluster, whose blocks can wait for each other
    each: int  # chunks per block
    grid: int
    shared: int  # bytes of a block's chunks


@lru_cache(maxsize=1024)
def residence(cut: Plan, tensors: int, shared: int, clusters: bool) -> Residence | None:
    """Return how to keep `tensors` tensors on chip from sums to results; None if they do not fit.

    A block may have `shared` bytes of shared memory, some of which the sums need. Values are kept
    as float32 whatever their dtype. A block keeps one chunk, or more if there are more than eight.
    """
    chunk = cut.length * cut.readers * cut.width * 4 * tensors
    sums = 8 * (THREADS * cut.width if cut.traversal == "columns" else WARP)
    each = _ceil(cut.chunks, CLUSTER)
    blocks = _ceil(cut.chunks, each)
    if each * chunk > shared - sums or (blocks > 1 and not clusters):
        return None
    return Residence(blocks, each, cut.blocks // cut.chunks * blocks, each * chunk)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
