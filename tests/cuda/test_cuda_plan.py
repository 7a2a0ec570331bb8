"""How a pass is split on a GPU: every value is done once, and vectors are aligned."""

import importlib.util
import inspect
from itertools import product
from pathlib import Path

import pytest

import nbnorm
from nbnorm._layout import PLANE


def _loaded():
    """Load the module without its package, which needs CUDA."""
    file = Path(nbnorm.__file__).parent / "cuda" / "plan.py"
    spec = importlib.util.spec_from_file_location("plan_of_cuda", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cuts = _loaded()
plan = cuts.plan

ROWS = [
    (32, 64, 112 * 112),
    (32, 256, 28 * 28),
    (16, 3, 512 * 512),
    (1, 1, 10**7),
    (5, 3, 257),
    (3, 2, 300),
    (1, 1, 256),
    (7, 4, 256 + 8),
]
COLUMNS = [
    (32, 1024, 14 * 14),
    (32, 2048, 7 * 7),
    (60, 100, 1),
    (513, 2048, 1),
    (10**5, 3, 1),
    (7, 1, 255),
    (2, 1500, 1),
    (1, 1, 1),
    (9, 33, 4),
    (3, 5, 24),
    (1000, 7, 10),
    (4, 3, 254),
]
ITEMSIZES = (2, 4, 8)
ALIGNMENTS = (1, 2, 4, 8, 16)


def cases(shapes):
    found = [
        (shape, itemsize, aligned)
        for shape, itemsize, aligned in product(shapes, ITEMSIZES, ALIGNMENTS)
        if aligned >= itemsize
    ]
    return pytest.mark.parametrize(("shape", "itemsize", "aligned"), found, ids=str)


def parts(total, per, chunks):
    """Return the ranges of all chunks."""
    return [range(k * per, min((k + 1) * per, total)) for k in range(chunks)]


def assert_done_once(ranges, total):
    """Assert that consecutive, nonempty ranges cover 0 to total."""
    assert [part.start for part in ranges] == [0, *(part.stop for part in ranges[:-1])]
    assert ranges[-1].stop == total
    assert all(ranges)


@cases(ROWS)
def test_rows_every_vector_of_a_channel_is_done_once(shape, itemsize, aligned):
    N, C, S = shape
    cut = plan(*shape, itemsize, aligned)
    assert cut.traversal == "rows"
    assert S % cut.width == 0, "a vector would end in the next plane"
    assert cut.width in (1, 16 // itemsize)
    assert cut.width == 1 or aligned >= 16
    assert_done_once(parts(N * S // cut.width, cut.length, cut.chunks), N * S // cut.width)
    assert cut.blocks == C * cut.chunks


@cases(COLUMNS)
def test_columns_every_value_is_done_once(shape, itemsize, aligned):
    N, C, S = shape
    cut = plan(*shape, itemsize, aligned)
    assert cut.traversal == "columns"
    assert cut.width in (1, 16 // itemsize)
    assert cut.width == 1 or aligned >= 16
    assert C * S % cut.width == 0, "the next sample would not be aligned"
    assert_done_once(parts(N, cut.length, cut.chunks), N)
    groups = -(-C // cut.group)
    assert cut.blocks == groups * cut.chunks
    for group in {0, groups - 1}:
        first, columns = group * cut.group * S, min(cut.group, C - group * cut.group) * S
        starts = [lane * cut.width for lane in range(cut.readers) if lane * cut.width < columns]
        assert first % cut.width == 0, "vectors of a later group would not be aligned"
        assert columns % cut.width == 0, "a vector would end in the next group"
        assert [s + w for s in starts for w in range(cut.width)] == list(range(columns))


@cases(COLUMNS)
def test_columns_fit_into_a_block(shape, itemsize, aligned):
    cut = plan(*shape, itemsize, aligned)
    at_once = cuts.THREADS // cut.readers
    assert at_once >= 1, "a sample of the group has more vectors than a block has threads"
    # Shared memory holds `width` sums of every thread, indexed by column.
    columns = min(cut.group, shape[1]) * shape[2]
    assert at_once * columns <= cuts.THREADS * cut.width
    assert cut.length % (at_once * cuts.UNROLL) == 0, "threads would have samples of several chunks"


@pytest.mark.parametrize("S", range(1, PLANE))
def test_columns_of_any_length_fit_into_a_block(S):
    for C, itemsize, aligned in product((1, 2, 3, 8, 64, 1000), ITEMSIZES, (2, 16)):
        cut = plan(3, C, S, itemsize, aligned)
        assert 1 <= cut.readers <= cuts.THREADS
        assert cut.group * S == cut.readers * cut.width


@cases(ROWS + COLUMNS)
def test_chunks_are_few_and_large_enough(shape, itemsize, aligned):
    N, C, S = shape
    cut = plan(*shape, itemsize, aligned)
    assert 1 <= cut.chunks <= cuts.CHUNKS
    values = N * S if cut.traversal == "rows" else N * S * min(cut.group, C)
    # Each chunk except the last has enough values to amortise a block's other work.
    if 1 < cut.chunks < cuts.CHUNKS:
        assert values / cut.chunks >= cuts.BLOCK_VALUES / 4


DEVICES = [(227 << 10, True), (163 << 10, False), (99 << 10, False), (0, False)]  # sm_90, 80, 89


@pytest.mark.parametrize("tensors", [1, 2])
@pytest.mark.parametrize("device", DEVICES)
@cases(ROWS + COLUMNS)
def test_every_chunk_is_kept_by_one_block_that_has_the_memory(
    shape, itemsize, aligned, device, tensors
):
    cut = plan(*shape, itemsize, aligned)
    kept = cuts.residence(cut, tensors, *device)
    if kept is None:
        return
    shared, clusters = device
    assert 1 <= kept.blocks <= cuts.CLUSTER
    assert kept.blocks == 1 or clusters
    assert kept.blocks * (kept.each - 1) < cut.chunks <= kept.blocks * kept.each
    assert kept.grid * cut.chunks == cut.blocks * kept.blocks
    # Values of a chunk, padded, as float32; sums as float64.
    assert kept.shared == kept.each * cut.length * cut.readers * cut.width * 4 * tensors
    sums = cuts.THREADS * cut.width if cut.traversal == "columns" else 32
    assert kept.shared + 8 * sums <= shared


def test_what_fits_is_kept():
    """ResNet-50's layers, batches of 32 and 256, on sm_90: forward keeps x, backward dy and x."""
    sides = (112, 56, 56, 56, 28, 28, 28, 14, 14, 14, 7, 7)
    widths = (64, 64, 128, 256, 128, 256, 512, 256, 512, 1024, 512, 2048)

    def kept(N, tensors, last=False):
        shapes = [(N, C, side * side) for C, side in zip(widths, sides, strict=True)]
        if last:
            shapes = [(N * S, C, 1) for N, C, S in shapes]
        found = [cuts.residence(plan(*shape, 4, 16), tensors, *DEVICES[0]) for shape in shapes]
        return sum(residence is not None for residence in found)

    assert [kept(32, 1), kept(32, 2), kept(256, 1), kept(256, 2)] == [12, 11, 8, 5]
    assert [kept(32, 1, last=True), kept(32, 2, last=True)] == [2, 0]
    assert cuts.residence(plan(1, 64, 1 << 10, 4, 16), 1, *DEVICES[1]) is not None
    assert cuts.residence(plan(1, 64, 1 << 15, 4, 16), 1, *DEVICES[1]) is None


def test_large_inputs_keep_a_gpu_busy():
    for shape in (*ROWS[:4], (32, 1024, 196), (32, 2048, 49), (10**5, 64, 1)):
        for itemsize in ITEMSIZES:
            N, C, S = shape
            blocks = plan(*shape, itemsize, 16).blocks
            assert blocks >= min(132, N * C * S // (4 * cuts.BLOCK_VALUES)), shape


def test_the_cut_knows_no_device():
    parameters = list(inspect.signature(plan).parameters)
    assert parameters == ["N", "C", "S", "itemsize", "aligned", "threads"]
    for shape, itemsize in product(ROWS + COLUMNS, ITEMSIZES):
        assert plan(*shape, itemsize, 16) == plan(*shape, itemsize, 1 << 40)


def test_the_largest_tensors_have_few_enough_blocks():
    for shape in ((1 << 15, 1 << 16, 1), (1, 1 << 21, 1 << 10), (1 << 10, 1 << 10, 1 << 11)):
        for aligned in (2, 16):
            assert plan(*shape, 2, aligned).blocks < 1 << 31
