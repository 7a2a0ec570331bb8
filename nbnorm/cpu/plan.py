"""How a pass over (N, C, S) is cut up: tiles and chunks by shape, blocks and sharing by machine.

What decides bits (traversal, tile, fold, chunk) follows from shape and dtype alone. Threads and
caches decide which channels go together, in what order, and whether threads are used at all. What
is `compiled_too` also cuts up the passes of compiled functions that call nbnorm, see overloads.py.
"""

from functools import lru_cache
from typing import NamedTuple

from nbnorm._layout import PLANE, SAMPLE
from nbnorm.cpu.caches import Caches
from nbnorm.cpu.jit import compiled_too

TILE_BYTES = 16 << 10  # bytes of a tile in the compute dtype: a third of L1
CHUNK = 1 << 18  # values in a chunk: the share of work that threads split a channel into
CHUNK_ROWS = 512  # rows that are not split: work per channel and chunk is a tenth of the rest

SHARES = 4  # units of work for every thread, so that their shares differ by less than a quarter
SERIAL_BELOW = 1 << 15  # values: a parallel launch costs more than the whole pass
# All tensors of a block, in times a thread's own cache; four times that where the last cache holds
# everything. Forward of 32 x 256 x 56 x 56 took 7.8 ms in blocks of one channel, 6.2 in blocks of
# four: a longer way through memory is worth more than a nearer cache.
NEAR = 4
RUN_BYTES = 16 << 10  # bytes to read in sequence, enough to keep the memory busy
# Bytes of a row that one thread writes. Where it is 2 KiB, the processor fetches ahead into what
# another thread writes: inference of 256 x 1024 took 45 us with two threads and 34 with one.
PAGE = 4 << 10
# Values of a plane that is normalised by itself, although summed by columns with others.
PLANE_ALONE = 128
PLANES_BYTES = 64 << 10  # of planes that follow one another, to stream them one by one
# Bytes, in the compute dtype, of a row of planes shorter than that: with coefficients for every
# column, more do not stay in L1 (forward of 32 x 512 x 7 x 7 took 267 us with 8 KiB, 225 with 4.5).
COLUMNS = 9 << 9
LINE_CHANNELS = 16  # so many begin at a cache line, whatever the plane


class Grid(NamedTuple):
    """How values are grouped for the innermost loops.

    By rows, a tile is `tile` values of a row or, where `fold` > 1, `fold` whole rows. By columns,
    a row of columns is `fold` samples, and `tile` is the size of a plane.
    """

    N: int
    C: int
    S: int
    tile: int
    fold: int
    per: int  # tiles, or rows of columns, in a chunk


class Plan(NamedTuple):
    """Cut of a pass.

    `fused`: a thread takes whole channels through both halves, `block` of them at a time. A half by
    itself takes `span` of them at a time, for long runs through memory; the one that writes takes
    `strip` of them and, for chunks, `parts` of `part` tiles or rows. `threads` share the work.
    `streamed`: the output is stored past the cache, as it is too large for its next reader to find
    it there.
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
        """Whether threads are used."""
        return self.threads > 1


@compiled_too
def by_rows(S: int) -> bool:
    """Whether planes of S values are summed along themselves rather than down the samples."""
    return S >= PLANE


@compiled_too
def fold_of(C: int, S: int) -> int:
    """How many samples make one row of the column traversal."""
    return max(1, SAMPLE // (C * S))


@compiled_too
def planes_alone(S: int, channels: int, itemsize: int, streamed: bool) -> bool:
    """Whether so many short planes of a sample are normalised one by one, not as a row of columns.

    A channel's coefficients are then numbers, not a column each: 14 x 14 planes in cache took 0.6
    times as long. But planes do not begin at a cache line: a few of them stream worse than a row.
    """
    return S >= PLANE_ALONE and (not streamed or channels * S * itemsize >= PLANES_BYTES)


@compiled_too
def past_cache(N: int, C: int, S: int, itemsize: int, tensors: int, last: int) -> bool:
    """Whether the last cache does not hold all tensors of a pass, so that results are streamed."""
    return tensors * N * C * S * itemsize > last


@compiled_too
def serial(
    N: int, C: int, S: int, itemsize: int, tensors: int, own: int, streamed: bool
) -> tuple[int, int, int, int, int, int]:
    """Tile, fold, per, chunks, block and span of a pass in one thread; see `Grid` and `Plan`."""
    if by_rows(S):
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
def plan(N: int, C: int, S: int, itemsize: int, threads: int, caches: Caches, tensors: int) -> Plan:
    """Cut a pass over N samples of C channels of S values, none of them 0.

    A thread's block of channels should stay near between the halves of the pass. Results are
    streamed where the last cache does not hold all tensors of the pass: ordinary stores would first
    drive out what is to be read, then fetch what they overwrite.
    """
    parallel = threads > 1 and N * C * S >= SERIAL_BELOW
    streamed = past_cache(N, C, S, itemsize, tensors, caches.last)
    tile, fold, per, chunks, block, span = serial(N, C, S, itemsize, tensors, caches.own, streamed)
    grid = Grid(N, C, S, tile, fold, per)
    if parallel and by_rows(S):
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
    resident = by_rows(S) or block * N * S * itemsize <= caches.own
    strip, parts, part = span, chunks, grid.per
    if parallel and not by_rows(S) and (S == 1 or fold > 1):
        strip = C if fold > 1 else max(1, min(RUN_BYTES // itemsize, C))
        parts, part = _parts(_ceil(N, fold), grid.per, _ceil(threads, _ceil(C, strip)))
        resident = resident and block * itemsize >= PAGE
    elif streamed and not by_rows(S):
        wide = _channels_of(SHARES * threads, C, chunks)
        strip = wide if planes_alone(S, wide, itemsize, streamed) else span
    fused = not parallel or (resident and blocks >= threads and _balanced(blocks, threads))
    return Plan(
        "rows" if by_rows(S) else "columns",
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
    """How many chunks of at most so many items, and how many items each has but the last."""
    chunks = _ceil(items, most)
    return chunks, _ceil(items, chunks)


def _parts(rows: int, per: int, least: int) -> tuple[int, int]:
    """At least so many parts of rows, none longer than a chunk, and how many rows each has."""
    part = min(per, _ceil(rows, least))
    return _ceil(rows, part), part


def _channels_of(units: int, C: int, chunks: int) -> int:
    """How many channels to take at once for `units` units of work, with channels in `chunks`."""
    return _ceil(C, _ceil(units, chunks))


def _equal(block: int, C: int, threads: int) -> int:
    """A block of up to so many channels, for as many blocks for every thread where C allows it."""
    return _ceil(C, _ceil(_ceil(C, block), threads) * threads)


@compiled_too
def _channels_in_row(S: int, itemsize: int, streamed: bool) -> int:
    """How many channels make a row of columns."""
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
