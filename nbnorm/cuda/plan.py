"""How a pass over (N, C, S) is cut up on a GPU: pure, from shape, strides, addresses and dtype.

What decides bits (traversal, width, group, lanes, per) follows from shape, alignment and dtype
alone, so that results are the same on every GPU.
"""

from functools import lru_cache
from math import gcd
from typing import NamedTuple

from nbnorm._layout import PLANE

THREADS = 256  # a block; no fewer than PLANE, so that there is one for every column of a plane
VECTOR = 16  # bytes of the widest access
UNROLL = 4  # vectors of one tensor that a thread has under way
CHUNK = 1 << 14  # values of a channel, or of a group of channels, that one block takes
CHUNKS = 1024  # of a channel at most: one warp adds them up
# Greatest value that is stored as 0: half the least number, a tie, goes to even.
STORED_AS_ZERO = {"float16": 2.0**-25, "bfloat16": 2.0**-134}
LANES = 32  # vectors side by side, at least, where a row of columns has as many


class Plan(NamedTuple):
    """Cut of a pass.

    By rows, a block takes `per` vectors of one channel, counted through all its planes. By columns,
    it takes `group` channels of `per` samples, `lanes` threads side by side along the columns and
    as many samples at a time as there are threads for. Either way there are `chunks` of them.
    """

    traversal: str
    width: int  # values that are loaded at once
    group: int
    lanes: int
    per: int
    chunks: int
    blocks: int


@lru_cache(maxsize=1024)
def plan(N: int, C: int, S: int, itemsize: int, aligned: int, threads: int = THREADS) -> Plan:
    """Cut a pass over N samples of C channels of S values, none of them 0.

    `aligned` is a number of bytes that divides all addresses and strides of planes and samples.
    """
    width = VECTOR // itemsize
    if S >= PLANE:
        if aligned % VECTOR or S % width:
            width = 1
        vectors = N * (S // width)
        if vectors >= 1 << 31:  # vectors are numbered with 32 bits
            raise ValueError(
                f"x has {N * S} values a channel, read {width} at a time: expected fewer than "
                f"{width << 31}"
            )
        most = max(CHUNK // width, threads * UNROLL)
        chunks = min(_ceil(vectors, most), CHUNKS)
        per = _ceil(vectors, chunks)
        chunks = _ceil(vectors, per)
        return Plan("rows", width, 1, 1, per, chunks, C * chunks)
    unit = width // gcd(S, width)  # channels that end where a vector ends
    if aligned % VECTOR or C * S % width or _ceil(unit * S, width) > threads:
        width, unit = 1, 1
    units = max(1, min(LANES, threads) * width // (unit * S))
    group = min(unit * units, _ceil(C, unit) * unit)
    lanes = group * S // width
    at_once = max(1, threads // lanes)
    step = at_once * UNROLL
    most = _ceil(max(CHUNK // (group * S), 1), step) * step
    chunks = min(_ceil(N, most), CHUNKS)
    per = _ceil(_ceil(N, chunks), step) * step
    chunks = _ceil(N, per)
    return Plan("columns", width, group, lanes, per, chunks, _ceil(C, group) * chunks)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
