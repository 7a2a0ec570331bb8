"""Memory of results: reused, but never while anything refers to it, and invisible to the user."""

import copy
import gc
import pickle
import sys
import threading
from itertools import combinations, pairwise

import numpy as np
import pytest
from children import run_child

import nbnorm
from nbnorm import pool

SHAPE = (16, 64, 32, 32)
NBYTES = 4 * 16 * 64 * 32 * 32


def address(array):
    return array.__array_interface__["data"][0]


@pytest.fixture
def x():
    return np.random.default_rng(0).standard_normal(SHAPE, np.float32)


@pytest.fixture(autouse=True)
def _fresh_pool():
    """Start and end each test with nothing idle and the default limit."""
    nbnorm.set_pool_limit(0)
    nbnorm.set_pool_limit(None)
    yield
    nbnorm.set_pool_limit(0)
    nbnorm.set_pool_limit(None)


def test_memory_is_used_again(x):
    addresses = {address(nbnorm.batch_norm_forward(x).y) for _ in range(5)}
    assert len(addresses) == 1


def test_memory_is_not_reused_while_the_result_or_a_view_lives(x):
    first = nbnorm.batch_norm_forward(x).y
    kept = first[3:, ::2].T
    expected = kept.copy()
    del first
    others = [nbnorm.batch_norm_forward(2 * x + i).y for i in range(3)]
    assert not any(np.shares_memory(kept, other) for other in others)
    np.testing.assert_array_equal(kept, expected)
    memoryview_of = memoryview(others[0])
    where = address(others[0])
    others.clear()
    assert address(nbnorm.batch_norm_forward(x).y) != where
    del memoryview_of
    gc.collect()


def test_results_begin_at_a_cache_line_and_are_plain_arrays(x):
    y = nbnorm.batch_norm_forward(x).y
    assert address(y) % 64 == 0
    assert type(y) is np.ndarray
    assert y.flags.c_contiguous
    assert y.flags.writeable
    assert y.flags.aligned
    assert not y.flags.owndata
    with pytest.raises(ValueError, match="own"):
        y.resize(3, 3)


def test_pickle_copy_save_and_dlpack(x, tmp_path):
    y = nbnorm.batch_norm_forward(x).y
    np.save(tmp_path / "y.npy", y)
    for other in (
        pickle.loads(pickle.dumps(y)),
        pickle.loads(pickle.dumps(y, protocol=5)),
        copy.deepcopy(y),
        np.load(tmp_path / "y.npy"),
        np.frombuffer(y.tobytes(), y.dtype).reshape(y.shape),
        np.from_dlpack(y),
        np.asarray(memoryview(y)),
    ):
        np.testing.assert_array_equal(other, y)


def test_memory_lives_as_long_as_a_dlpack_view(x):
    y = nbnorm.batch_norm_forward(x).y
    view, expected = np.from_dlpack(y), y.copy()
    del y
    nbnorm.batch_norm_forward(3 * x + 1)
    np.testing.assert_array_equal(view, expected)


def test_the_pool_holds_no_more_than_its_limit(x):
    nbnorm.set_pool_limit(2 * NBYTES + 200)
    results = [nbnorm.batch_norm_forward(x).y for _ in range(4)]
    where = [address(y) for y in results]
    results.clear()
    assert pool.idle()[0] == 2 * NBYTES
    again = [nbnorm.batch_norm_forward(x).y for _ in range(2)]
    assert {address(y) for y in again} == set(where[:2])
    del again
    assert nbnorm.set_pool_limit(0) == 2 * NBYTES + 200
    assert pool.idle() == (0, 0)
    assert nbnorm.batch_norm_forward(x).y.flags.owndata


def in_use():
    """Return the bytes of all live results from the pool."""
    pool.idle()  # takes back the memory of deleted results
    return pool._pool._in_use()


def bytes_(n):
    return pool.empty((n,), np.dtype(np.uint8))


def test_what_has_been_idle_longest_goes_first():
    first, second = bytes_(6 << 20), bytes_(5 << 20)
    del first
    del second
    third = bytes_(2 << 20)  # 13 MiB together, but at most 11 have been in use
    assert pool.idle()[0] == 5 << 20
    del third


def test_sizes_that_take_turns_share_memory():
    """Take the smallest idle memory that fits, up to twice the size wanted."""
    large, small = bytes_(8 << 20), bytes_(6 << 20)
    places = {address(large): 8, address(small): 6}
    del large, small
    for wanted, given in [(8, 8), (7, 8), (6, 6), (5, 6), (3, 6), (4, 6), (7, 8)]:
        array = bytes_(wanted << 20)
        assert places.get(address(array)) == given
        del array
    assert pool.idle()[0] == 14 << 20
    array = bytes_(5 << 19)
    assert memory_of(array).size == 5 << 19, "more than half would be wasted"


def test_no_more_is_idle_than_was_in_use_at_once():
    rng = np.random.default_rng(0)
    kept, sizes, most = [], [], 0
    for size in rng.integers(pool.LEAST, 8 * pool.LEAST, 300):
        kept.append(bytes_(int(size)))
        sizes.append(memory_of(kept[-1]).size)
        assert size <= sizes[-1] <= 2 * pool._size_class(int(size))
        most = max(most, sum(sizes))
        for i in sorted(rng.integers(0, len(kept), 2), reverse=True)[: len(kept) - 1]:
            if i < len(kept):
                del kept[i], sizes[i]
        assert pool.idle()[0] + sum(sizes) <= most
        assert in_use() == sum(sizes)


@pytest.mark.parametrize("nbytes", [*range(1, 200), (1 << 21) - 1, 1 << 21, (1 << 21) + 1, 10**9])
def test_size_classes_waste_a_fifth_at_most(nbytes):
    size = pool._size_class(nbytes)
    assert nbytes <= size <= max(1.25 * nbytes, nbytes + 1)
    assert pool._size_class(size) == size


def test_memory_that_is_wanted_elsewhere_is_not_kept_idle(monkeypatch):
    del [bytes_(4 << 20) for _ in range(4)][:]
    assert pool.idle()[0] == 16 << 20
    allocate, idle, refused = np.empty, pool._pool.idle, []

    def short(*args, **options):
        if idle() > 0:
            refused.append(args)
            raise MemoryError
        return allocate(*args, **options)

    monkeypatch.setattr(np, "empty", short)
    assert bytes_(6 << 20).nbytes == 6 << 20
    assert refused


def test_small_results_are_numpys_own():
    assert nbnorm.batch_norm_forward(np.ones((60, 100))).y.flags.owndata


@pytest.mark.parametrize("nbytes", [1.5, "1", object()])
def test_limit_that_is_no_integer(nbytes):
    with pytest.raises(TypeError, match=r"^nbytes must be an int"):
        nbnorm.set_pool_limit(nbytes)


def test_limit_that_is_negative():
    with pytest.raises(ValueError, match=r"^nbytes is -1"):
        nbnorm.set_pool_limit(-1)


def test_environment():
    code = "import nbnorm; from nbnorm import pool; print(pool.idle())"
    assert run_child("-c", code, NBNORM_POOL_LIMIT="12345").strip() == "(0, 12345)"
    with pytest.raises(AssertionError, match="NBNORM_POOL_LIMIT is '1 GB'"):
        run_child("-c", code, NBNORM_POOL_LIMIT="1 GB")


def test_memory_cannot_have_two_owners(x):
    block = base_of(nbnorm.batch_norm_forward(x).y)
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="copy the array that uses it"):
            duplicate(block)


def memory_of(array):
    return base_of(array)._memory


def base_of(array):
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array.base


def interrupted_at(step, work):
    """Run `work`, interrupted at the step-th instruction of pool.py; return whether it was."""

    def interrupt():
        raise KeyboardInterrupt

    try:
        return handled_at(step, work, interrupt)
    except KeyboardInterrupt:
        return True


def test_an_interrupt_at_any_instruction_neither_loses_nor_doubles_memory():
    """Interrupt a hit, a miss that drops idle memory, and the return of a result in between."""
    kept = []

    def work():
        kept.append(bytes_(4 << 20))
        kept.append(bytes_(6 << 20))
        del kept[0]
        kept.append(bytes_(4 << 20))
        del kept[-1]
        kept.append(bytes_(3 << 20))
        pool.set_pool_limit(11 << 20)
        kept.append(bytes_(7 << 20))

    step = 1
    while True:
        nbnorm.set_pool_limit(0)
        nbnorm.set_pool_limit(None)
        done = not interrupted_at(step, work)
        nbnorm.set_pool_limit(None)
        pooled = [a for a in kept if isinstance(base_of(a), pool._Block)]
        assert in_use() == sum(memory_of(a).size for a in pooled)
        kept += [bytes_(n << 20) for n in (4, 6, 7, 4)]
        spans = sorted((address(array), array.nbytes) for array in kept)
        assert all(begin + size <= end for (begin, size), (end, _) in pairwise(spans))
        del pooled
        kept.clear()
        assert in_use() == 0
        if done:
            break
        step += 1
    assert step > 200


@pytest.mark.parametrize(
    "handler",
    [lambda: bytes_(5 << 20), lambda: nbnorm.set_pool_limit(0)],
    ids=["a result", "the limit"],
)
def test_a_signal_handler_may_use_the_pool_at_any_instruction(handler):
    def work():
        kept = [bytes_(4 << 20), bytes_(6 << 20)]
        del kept[0]
        kept += [bytes_(4 << 20), bytes_(7 << 20)]
        assert not any(np.shares_memory(a, b) for a, b in combinations(kept, 2))

    step = 1
    while handled_at(step, work, handler):
        assert in_use() == 0
        nbnorm.set_pool_limit(0)
        nbnorm.set_pool_limit(None)
        step += 1
    assert step > 100


def handled_at(step, work, handler):
    """Run `work`; call `handler` at the step-th instruction of pool.py; return whether it did."""
    done = 0

    def trace(frame, event, argument):
        nonlocal done
        if frame.f_code.co_filename != pool.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            done += 1
            assert done < 100_000, "pool.py never ends"
            if done == step:
                handler()
        return trace

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # Python 3.12 looks only here whether any frame wants it
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return done >= step


def test_a_result_that_lives_until_the_end_of_the_program():
    code = """
import sys, threading, numpy as np, nbnorm
from nbnorm import pool
class Node: pass
def results(n): return [pool.empty((1 << 21,), np.dtype(np.float32)) for _ in range(n)]
node = Node(); node.self, node.y = node, results(2)
sys.modules["keeper"] = results(1)
threading.local().y = results(1)
nbnorm.kept = results(1)
pool.kept = results(1)
kept = results(2)
"""
    for _ in range(3):
        assert (
            run_child("-X", "dev", "-c", code + "\nimport atexit; atexit.register(results, 1)")
            == ""
        )


def test_threads_never_get_the_same_memory():
    failures = []

    def work(value):
        for i in range(300):
            array = pool.empty((1 << 17,), np.dtype(np.float32))
            array[:] = value + i
            if not (array == value + i).all():
                failures.append(value)

    threads = [threading.Thread(target=work, args=(1000.0 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
