"""How a pass is split: only the shape decides the bits, and every value is processed once."""

from itertools import product

import pytest

from nbnorm.cpu.caches import TYPICAL, Caches, caches
from nbnorm.cpu.plan import plan

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
MACHINES = (TYPICAL, Caches(1 << 15, 1 << 20), Caches(1 << 22, 1 << 30))
cases = pytest.mark.parametrize(("shape", "itemsize"), list(product(SHAPES, ITEMSIZES)), ids=str)


def chunk_ranges(cut):
    """Return the items (tiles, or rows of columns) of each chunk, and the number of items."""
    grid = cut.grid
    if cut.traversal == "columns":
        items = -(-grid.N // grid.fold)
    else:
        items = -(-grid.N // grid.fold) * -(-grid.S // grid.tile)
    return [range(k * grid.per, min((k + 1) * grid.per, items)) for k in range(cut.chunks)], items


@cases
def test_the_machine_changes_nothing_that_decides_bits(shape, itemsize):
    one = plan(*shape, itemsize, 1, TYPICAL, 2)
    for threads, caches_ in product((2, 3, 8, 64), MACHINES):
        many = plan(*shape, itemsize, threads, caches_, 3)
        assert many.grid == one.grid
        assert many.chunks == one.chunks
        assert many.traversal == one.traversal


@cases
@pytest.mark.parametrize("threads", [1, 2, 3, 64])
@pytest.mark.parametrize("caches_", MACHINES, ids=str)
def test_every_item_and_channel_is_done_once(shape, itemsize, threads, caches_):
    cut = plan(*shape, itemsize, threads, caches_, 2)
    ranges, items = chunk_ranges(cut)
    assert [i for chunk in ranges for i in chunk] == list(range(items))
    assert all(ranges)
    parts = [range(k * cut.part, min((k + 1) * cut.part, items)) for k in range(cut.parts)]
    assert [i for part in parts for i in part] == list(range(items))
    assert all(parts)
    blocks, spans, strips = (cut.block, cut.blocks), (cut.span, cut.spans), (cut.strip, cut.strips)
    for size, count in (blocks, spans, strips):
        units = [range(u * size, min((u + 1) * size, shape[1])) for u in range(count)]
        assert sum(map(len, units)) == shape[1]
        assert all(units)
        if cut.traversal == "columns" and cut.grid.fold > 1:
            assert count == 1  # samples that share a row include all their channels


@cases
def test_chunks_are_of_equal_size(shape, itemsize):
    ranges, _ = chunk_ranges(plan(*shape, itemsize, 2, TYPICAL, 2))
    sizes = [len(chunk) for chunk in ranges]
    assert max(sizes) - min(sizes) < max(2, len(sizes))


@pytest.mark.parametrize("threads", [2, 8, 64])
@pytest.mark.parametrize("shape", SHAPES[:5] + SHAPES[7:10], ids=str)
def test_large_inputs_keep_all_threads_busy(shape, threads):
    cut = plan(*shape, 4, threads, TYPICAL, 2)
    N, C, S = shape
    assert cut.parallel
    written = cut.strips * cut.parts
    for units in (cut.blocks if cut.fused else threads, cut.spans * cut.chunks, written):
        assert units >= min(threads, N * C * S >> 18)


def test_few_channels_are_still_shared_out_in_several_blocks_a_thread():
    cut = plan(4, 16, 28 * 28, 4, 2, TYPICAL, 2)
    assert cut.fused
    assert cut.blocks == 4


def test_blocks_are_shared_out_evenly():
    cut = plan(32, 130, 28 * 28, 4, 2, Caches(1 << 20, 1 << 30), 2)
    assert cut.fused
    assert cut.blocks % 2 == 0


def test_threads_write_whole_rows_where_parts_of_rows_would_be_short():
    cut = plan(256, 1024, 1, 4, 2, TYPICAL, 2)
    assert not cut.fused
    assert (cut.strips, cut.parts, cut.part) == (1, 2, 128)
    assert plan(256, 4096, 1, 4, 2, Caches(4 << 20, 32 << 20), 2).fused


def test_small_inputs_and_one_thread_are_serial():
    assert not plan(60, 100, 1, 4, 64, TYPICAL, 2).parallel
    assert not plan(4096, 512, 1, 4, 1, TYPICAL, 2).parallel


def test_results_are_streamed_where_the_last_cache_does_not_hold_all_tensors():
    half = TYPICAL.last // 2
    assert not plan(half >> 12, 1024, 1, 4, 2, TYPICAL, 2).streamed
    assert plan((half >> 12) + 1, 1024, 1, 4, 2, TYPICAL, 2).streamed
    assert plan(half >> 12, 1024, 1, 4, 2, TYPICAL, 3).streamed


def lay_caches(folder, processors):
    """Write caches as Linux reports them: {processor: [(level, type, size, shared with)]}."""
    for cpu, found in processors.items():
        for i, described in enumerate(found):
            index = folder / f"cpu{cpu}" / "cache" / f"index{i}"
            index.mkdir(parents=True)
            names = ("level", "type", "size", "shared_cpu_list")
            for name, value in zip(names, described, strict=True):
                (index / name).write_text(f"{value}\n")


def test_caches_are_those_of_the_processors_that_may_be_used(tmp_path, monkeypatch):
    inner = [(1, "Instruction", "64K", "0-1"), (1, "Data", "48K", "0-1")]
    lay_caches(
        tmp_path,
        {
            0: [*inner, (2, "Unified", "2048K", "0-1"), (3, "Unified", "32M", "0-3,8")],
            1: [*inner, (2, "Unified", "2048K", "0-1"), (3, "Unified", "32M", "0-3,8")],
            9: [(2, "Unified", "2048K", "9"), (3, "Unified", "16384K", "9-12")],
            20: [(2, "Unified", "64K", "20"), (3, "Unified", "1024M", "20")],
        },
    )
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 9}, raising=False)
    # Two threads share the first second-level cache; the two last-level caches add up.
    assert caches(tmp_path) == Caches(own=1 << 20, last=48 << 20)


def test_a_system_that_does_not_tell_has_typical_caches(tmp_path, monkeypatch):
    assert caches(tmp_path) == TYPICAL
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0}, raising=False)
    odd = [("unknown", "0"), ("", "0"), ("2M", ""), ("2M", "0,"), ("2M", "0x0"), ("2T", "0")]
    for i, (size, shared) in enumerate(odd):
        lay_caches(tmp_path / str(i), {0: [(2, "Unified", size, shared)]})
        assert caches(tmp_path / str(i)) == TYPICAL
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    assert caches() == TYPICAL
