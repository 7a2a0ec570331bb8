"""Memory of results: used again, never while anything refers to it, and unseen by the user."""

import copy
import gc
import pickle
import threading

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
    """Start each test with nothing idle, under the default limit, and leave it so."""
    nbnorm.set_pool_limit(0)
    nbnorm.set_pool_limit(None)
    yield
    nbnorm.set_pool_limit(0)
    nbnorm.set_pool_limit(None)


def test_memory_is_used_again(x):
    addresses = {address(nbnorm.batch_norm_forward(x).y) for _ in range(5)}
    assert len(addresses) == 1


def test_not_while_the_result_or_a_view_of_it_lives(x):
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


def test_limit_and_what_has_been_idle_longest(x):
    nbnorm.set_pool_limit(2 * NBYTES + 200)
    results = [nbnorm.batch_norm_forward(x).y for _ in range(4)]
    where = [address(y) for y in results]
    while results:
        results.pop(0)
    assert pool.idle()[0] <= 2 * NBYTES + 200
    again = [nbnorm.batch_norm_forward(x).y for _ in range(2)]
    assert {address(y) for y in again} == set(where[2:])
    del again
    assert nbnorm.set_pool_limit(0) == 2 * NBYTES + 200
    assert pool.idle() == (0, 0)
    assert nbnorm.batch_norm_forward(x).y.flags.owndata


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


def test_a_block_collected_while_the_lock_is_held_is_not_lost():
    memory = pool._pool.take(NBYTES)
    with pool._pool._lock:  # as when the collector runs within `take`
        pool._pool.give(memory)
    assert pool.idle()[0] == 0
    assert pool._pool.take(NBYTES) is memory


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
