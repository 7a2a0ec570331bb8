"""How a pass is cut up: what decides bits follows from the shape, and no value is left out."""

from itertools import product

import pytest

from nbnorm.cpu.plan import ColumnsGrid, plan

SHAPES = [
    (32, 64, 112 * 112),
    (32, 256, 28 * 28),
    (32, 1024, 14 * 14),
    (32, 2048, 7 * 7),
    (16, 3, 512 * 512),
    (1, 1, 10**7),
    (60, 100, 1),
    (513, 2048, 1),
    (4096, 512, 1),
    (10**6, 3, 1),
    (7, 1, 255),
    (5, 3, 257),
    (2, 150528, 1),
    (1, 1, 1),
]
ITEMSIZES = (2, 4, 8)
cases = pytest.mark.parametrize(("shape", "itemsize"), list(product(SHAPES, ITEMSIZES)), ids=str)


def chunk_ranges(cut):
    """Return the items (tiles, or rows of columns) of each chunk, and how many there are."""
    grid = cut.grid
    if isinstance(grid, ColumnsGrid):
        items = -(-grid.N // grid.fold)
    else:
        items = -(-grid.N // grid.together) * -(-grid.S // grid.tile)
    return [range(k * grid.per, min((k + 1) * grid.per, items)) for k in range(cut.chunks)], items


@cases
def test_threads_change_nothing_that_decides_bits(shape, itemsize):
    one = plan(*shape, itemsize, 1)
    for threads in (2, 3, 8, 64):
        many = plan(*shape, itemsize, threads)
        assert many.grid == one.grid
        assert many.chunks == one.chunks
        assert many.traversal == one.traversal


@cases
@pytest.mark.parametrize("threads", [1, 2, 3, 64])
def test_every_item_and_channel_is_done_once(shape, itemsize, threads):
    cut = plan(*shape, itemsize, threads)
    ranges, items = chunk_ranges(cut)
    assert [i for chunk in ranges for i in chunk] == list(range(items))
    assert all(ranges)
    blocks = [range(u * cut.block, min((u + 1) * cut.block, shape[1])) for u in range(cut.blocks)]
    assert sum(map(len, blocks)) == shape[1]
    assert all(blocks)
    if isinstance(cut.grid, ColumnsGrid) and cut.grid.fold > 1:
        assert cut.blocks == 1  # several samples make a row only with all their channels


@cases
def test_chunks_are_of_equal_size(shape, itemsize):
    ranges, _ = chunk_ranges(plan(*shape, itemsize, 2))
    sizes = [len(chunk) for chunk in ranges]
    assert max(sizes) - min(sizes) < max(2, len(sizes))


@pytest.mark.parametrize("threads", [2, 8, 64])
@pytest.mark.parametrize("shape", SHAPES[:5] + SHAPES[7:10], ids=str)
def test_large_inputs_keep_all_threads_busy(shape, threads):
    cut = plan(*shape, 4, threads)
    N, C, S = shape
    assert cut.parallel
    shares = cut.blocks if cut.fused else cut.blocks * cut.chunks
    assert shares >= min(threads, N * C * S >> 18)


def test_small_inputs_are_serial_and_one_thread_is():
    assert not plan(60, 100, 1, 4, 64).parallel
    assert not plan(4096, 512, 1, 4, 1).parallel
