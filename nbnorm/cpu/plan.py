"""How a pass over (N, C, S) is divided: tiles and chunks by shape, blocks and threads by machine.

What determines bits (traversal, tile, fold, chunk) follows from shape and dtype alone. Threads and
caches determine which channels are processed together, in what order, and whether threads are used
at all. The functions that are `compiled_too` also divide the passes of overloads.py.
"""

from functools import lru_cache
from typing import NamedTuple

from nbnorm._layout import PLANE, SAMPLE
from nbnorm.cpu.caches import Caches
from nbnorm.cpu.jit import compiled_too

TILE_BYTES = 16 << 10  # bytes of a tile in the compute dtype: a third of L1
CHUNK = 1 << 18  # values in a chunk: threads split a channel into chunks
CHUNK_ROWS = 512  # up to here rows are not split: merging a chunk costs a tenth of summing it

SHARES = 4  # units of work per thread, so that the threads' shares differ by less than a quarter
SERIAL_BELOW = 1 << 15  # values; for fewer, a parallel launch costs more than the whole pass
# Size of all tensors of a block as a multiple of a thread's own cache; four times that if the
# last-level cache holds everything. Forward of 32 x 256 x 56 x 56 took 7.8 ms in blocks of one
# channel, 6.2 in blocks of four: longer contiguous reads are worth more than a nearer cache.
NEAR = 4
RUN_BYTES = 16 << 10  # bytes read contiguously, enough to keep the memory busy
# Least bytes of a row that one thread writes. With 2 KiB, the processor prefetches what another
# thread writes: inference of 256 x 1024 took 45 us with two threads and 34 with one.
PAGE = 4 << 10
# Planes of this many values or more are normalised one by one, though summed by columns.
PLANE_ALONE = 128
PLANES_BYTES = 64 << 10  # least bytes of contiguous planes that are streamed one by one
# Bytes, in the compute dtype, of a row of smaller planes. The coefficients of more columns would
# not stay in L1 (forward of 32 x 512 x 7 x 7 took 267 us with 8 KiB, 225 with 4.5).
COLUMNS = 9 << 9
LINE_CHANNELS = 16  # this many channels of float32 fill whole cache lines for any S


class Grid(NamedTuple):
    """How values are grouped for the innermost loops.

    By rows, a tile is `tile` values of a row or, if `fold` > 1, `fold` whole rows. By columns, a
    row is `fold` samples, and `tile` is the size S of a plane.
    """

    N: int
    C: int
    S: int
    tile: int
    fold: int
    per: int  # tiles (by rows) or rows (by columns) in a chunk


class Plan(NamedTuple):
    """How a pass is divided.

    If `fused`, a thread takes whole channels through both steps, `block` of them at a time.
    Otherwise a step takes `span` channels at a time, to read long contiguous stretches; a step
    that writes takes `strip` channels and, in place of chunks, `parts` of `part` tiles or rows.
    `threads` share the work. If `streamed`, the output is stored past the cache, as it is too
    large for its next reader to find it there.
    """

    traversal: str
    grid: Grid
    chunks: int
    block: int
    blocks: int
    span: int
    spans: int
    strip: int
    strips: int
    parts: int
    part: int
    fused: bool
    threads: int
    streamed: bool

    @property
    def parallel(self) -> bool:
        """Whether more than one thread is used."""
        return self.threads > 1


@compiled_too
def by_rows(S: int, plane: int = PLANE) -> bool:
    """Whether to sum planes of S values along S rather than down the samples."""
    return plane <= S


@compiled_too
def fold_of(C: int, S: int) -> int:
    """Number of samples in a row of the column traversal."""
    return max(1, SAMPLE // (C * S))


@compiled_too
def planes_alone(S: int, channels: int, itemsize: int, streamed: bool) -> bool:
    """Whether to normalise this many short planes of a sample one by one, not as a row of columns.

    A channel's coefficients are then scalars instead of one value per column: 14 x 14 planes in
    cache took 0.6 times as long. But planes that do not begin at a cache line stream more slowly
    than a row, unless many of them are contiguous.
    """
    return S >= PLANE_ALONE and (not streamed or channels * S * itemsize >= PLANES_BYTES)


@compiled_too
def past_cache(N: int, C: int, S: int, itemsize: int, tensors: int, last: int) -> bool:
    """Whether the last-level cache cannot hold all tensors, so that results are streamed."""
    return tensors * N * C * S * itemsize > last


@compiled_too
def serial(
    N: int, C: int, S: int, itemsize: int, tensors: int, own: int, streamed: bool,
    plane: int = PLANE,
) -> tuple[int, int, int, int, int, int]:  # fmt: skip
    """Tile, fold, per, chunks, block and span of a pass in one thread; see `Grid` and `Plan`."""
    if by_rows(S, plane):
        most = TILE_BYTES // max(itemsize, 4)
        across = _ceil(S, most)
        tile = _ceil(_ceil(S, across), 16) * 16
        fold = max(1, most // S)
        tiles = _ceil(N, fold) * _ceil(S, tile)
        chunks, per = _shares(tiles, max(1, CHUNK // (tile * fold)))
        block = (1 if streamed else 4) * NEAR * own // (tensors * N * S * itemsize)
        span = C
    else:
        tile, fold = S, fold_of(C, S)
        chunks, per = _shares(_ceil(N, fold), max(CHUNK_ROWS, CHUNK // (fold * C * S)))
        block = span = C
        if fold == 1:
            block = _channels_in_row(S, itemsize, streamed)
            span = C if S >= PLANE_ALONE and not streamed else block
    return tile, fold, per, chunks, max(1, min(block, C)), max(1, min(span, C))


@lru_cache(maxsize=1024)
def plan(
    N: int, C: int, S: int, itemsize: int, threads: int, caches: Caches, tensors: int,
    plane: int = PLANE,
) -> Plan:  # fmt: skip
    """Divide a pass over N samples of C channels of S values, none of them 0.

    Planes of `plane` values or more are traversed by rows.

    `tensors` is the number of arrays of that size that the pass touches. A thread's block of
    channels should stay in cache between the two steps. Results are streamed if the last-level
    cache cannot hold all tensors: ordinary stores would first evict what is yet to be read, then
    read the lines that they overwrite.
    """
    parallel = threads > 1 and N * C * S >= SERIAL_BELOW
    streamed = past_cache(N, C, S, itemsize, tensors, caches.last)
    along = by_rows(S, plane)
    tile, fold, per, chunks, block, span = serial(
        N, C, S, itemsize, tensors, caches.own, streamed, plane
    )
    grid = Grid(N, C, S, tile, fold, per)
    if parallel and along:
        block = _equal(max(1, min(block, C // (2 * threads))), C, threads)
        span = _channels_of(SHARES * threads, C, chunks)
    elif parallel and fold == 1:
        slab = caches.own // (N * S * itemsize)
        if slab * S * itemsize >= RUN_BYTES // 4:
            block = min(block, slab)
        block = min(block, _channels_of(threads, C, chunks))
        alone = S >= PLANE_ALONE and not streamed
        span = min(span, _channels_of(SHARES * threads if alone else threads, C, chunks))
    block, span = max(1, block), max(1, span)
    blocks = _ceil(C, block)
    resident = along or block * N * S * itemsize <= caches.own
    strip, parts, part = span, chunks, grid.per
    if parallel and not along and (S == 1 or fold > 1):
        strip = C if fold > 1 else max(1, min(RUN_BYTES // itemsize, C))
        parts, part = _parts(_ceil(N, fold), grid.per, _ceil(threads, _ceil(C, strip)))
        resident = resident and block * itemsize >= PAGE
    elif streamed and not along:
        wide = _channels_of(SHARES * threads, C, chunks)
        strip = wide if planes_alone(S, wide, itemsize, streamed) else span
    fused = not parallel or (resident and blocks >= threads and _balanced(blocks, threads))
    return Plan(
        "rows" if along else "columns",
        grid,
        chunks,
        block,
        blocks,
        span,
        _ceil(C, span),
        strip,
        _ceil(C, strip),
        parts,
        part,
        fused,
        threads if parallel else 1,
        streamed,
    )


@compiled_too
def _shares(items: int, most: int) -> tuple[int, int]:
    """Number of chunks of at most `most` items, and items in each chunk but the last."""
    chunks = _ceil(items, most)
    return chunks, _ceil(items, chunks)


def _parts(rows: int, per: int, least: int) -> tuple[int, int]:
    """Number of parts of rows, `least` or more, none longer than a chunk; and rows in each."""
    part = min(per, _ceil(rows, least))
    return _ceil(rows, part), part


def _channels_of(units: int, C: int, chunks: int) -> int:
    """Channels to take at once for `units` units of work if each channel has `chunks` chunks."""
    return _ceil(C, _ceil(units, chunks))


def _equal(block: int, C: int, threads: int) -> int:
    """Size of a block, at most `block`, that gives every thread as many blocks, if C allows it."""
    return _ceil(C, _ceil(_ceil(C, block), threads) * threads)


@compiled_too
def _channels_in_row(S: int, itemsize: int, streamed: bool) -> int:
    """Number of channels in a row of the column traversal."""
    if S == 1:
        return RUN_BYTES // itemsize
    if S >= PLANE_ALONE:  # normalised plane by plane unless streamed
        most = (RUN_BYTES // 2 if streamed else 2 * RUN_BYTES) // (S * itemsize)
    else:
        most = COLUMNS // (S * max(itemsize, 4))
    return most if most < LINE_CHANNELS else most - most % LINE_CHANNELS


def _balanced(blocks: int, threads: int) -> bool:
    """Whether an equal share of blocks keeps every thread busy three quarters of the time."""
    return blocks / (_ceil(blocks, threads) * threads) >= 0.75


@compiled_too
def _ceil(a: int, b: int) -> int:
    return -(-a // b)
