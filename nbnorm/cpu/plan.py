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

SHARES = 4  # units of work for every thread, so that none waits long for the last one
SERIAL_BELOW = 1 << 15  # values: a parallel launch costs more than the whole pass
RUN_BYTES = 16 << 10  # bytes to read in sequence, enough to keep the memory busy
# Values of a plane that is normalised by itself, although summed by columns with others.
PLANE_ALONE = 128
# Bytes of a short-plane row: with coefficients for every column, more do not stay in L1 (7 x 7
# planes took 1.4 times as long with 16 KiB).
COLUMNS = 8 << 10


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
    itself takes `span` of them at a time, for long runs through memory. `streamed`: the output is
    stored past the cache, as it is too large for its next reader to find it there.
    """

    traversal: str
    grid: Grid
    chunks: int
    block: int
    blocks: int
    span: int
    spans: int
    fused: bool
    parallel: bool
    streamed: bool


@compiled_too
def by_rows(S: int) -> bool:
    """Whether planes of S values are summed along themselves rather than down the samples."""
    return S >= PLANE


@compiled_too
def fold_of(C: int, S: int) -> int:
    """How many samples make one row of the column traversal."""
    return max(1, SAMPLE // (C * S))


@compiled_too
def past_cache(N: int, C: int, S: int, itemsize: int, tensors: int, last: int) -> bool:
    """Whether the last cache does not hold all tensors of a pass, so that results are streamed."""
    return tensors * N * C * S * itemsize > last


@compiled_too
def serial(
    N: int, C: int, S: int, itemsize: int, own: int, streamed: bool
) -> tuple[int, int, int, int, int, int]:
    """Tile, fold, per, chunks, block and span of a pass in one thread; see `Grid` and `Plan`."""
    if by_rows(S):
        most = TILE_BYTES // max(itemsize, 4)
        across = _ceil(S, most)
        tile = _ceil(_ceil(S, across), 16) * 16
        fold = max(1, most // S)
        tiles = _ceil(N, fold) * _ceil(S, tile)
        chunks, per = _shares(tiles, max(1, CHUNK // (tile * fold)))
        block = min(RUN_BYTES // (S * itemsize), own // (N * S * itemsize))
        span = C
    else:
        tile, fold = S, fold_of(C, S)
        chunks, per = _shares(_ceil(N, fold), max(CHUNK_ROWS, CHUNK // (fold * C * S)))
        block = span = C
        if fold == 1:
            block = (RUN_BYTES if S == 1 else COLUMNS) // (S * itemsize)
            span = C if S >= PLANE_ALONE and not streamed else block
    return tile, fold, per, chunks, min(max(1, block), C), min(max(1, span), C)


@lru_cache(maxsize=1024)
def plan(N: int, C: int, S: int, itemsize: int, threads: int, caches: Caches, tensors: int) -> Plan:
    """Cut a pass over N samples of C channels of S values, none of them 0.

    A thread's block of channels should stay in its own cache between the halves of the pass.
    Results are streamed where the last cache does not hold all tensors of the pass: ordinary stores
    would first drive out what is to be read, then fetch what they overwrite.
    """
    parallel = threads > 1 and N * C * S >= SERIAL_BELOW
    streamed = past_cache(N, C, S, itemsize, tensors, caches.last)
    tile, fold, per, chunks, block, span = serial(N, C, S, itemsize, caches.own, streamed)
    grid = Grid(N, C, S, tile, fold, per)
    if parallel and by_rows(S):
        block = min(block, C // (SHARES * threads))
        span = _channels_of(SHARES * threads, C, chunks)
    elif parallel and fold == 1:
        slab = caches.own // (N * S * itemsize)
        if slab * S * itemsize >= RUN_BYTES // 4:
            block = min(block, slab)
        block = min(block, _channels_of(threads, C, chunks))
        if S >= PLANE_ALONE and not streamed:
            span = _channels_of(SHARES * threads, C, chunks)
        else:
            span = min(span, _channels_of(threads, C, chunks))
    block, span = max(1, min(block, C)), max(1, min(span, C))
    blocks = _ceil(C, block)
    resident = by_rows(S) or block * N * S * itemsize <= caches.own
    fused = not parallel or (resident and blocks >= threads and _balanced(blocks, threads))
    return Plan(
        "rows" if by_rows(S) else "columns",
        grid,
        chunks,
        block,
        blocks,
        span,
        _ceil(C, span),
        fused,
        parallel,
        streamed,
    )


@compiled_too
def _shares(items: int, most: int) -> tuple[int, int]:
    """How many chunks of at most so many items, and how many items each has but the last."""
    chunks = _ceil(items, most)
    return chunks, _ceil(items, chunks)


def _channels_of(units: int, C: int, chunks: int) -> int:
    """How many channels to take at once for `units` units of work, with channels in `chunks`."""
    return _ceil(C, _ceil(units, chunks))


def _balanced(blocks: int, threads: int) -> bool:
    """Whether an equal share of blocks keeps every thread busy three quarters of the time."""
    return blocks / (_ceil(blocks, threads) * threads) >= 0.75


@compiled_too
def _ceil(a: int, b: int) -> int:
    return -(-a // b)
