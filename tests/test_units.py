"""Every unit of work is done once with any number of threads, and errors of units are not lost."""

import ctypes
from pathlib import Path

import numba
import numpy as np
import pytest
from children import run_child

from nbnorm.cpu import threads
from nbnorm.cpu.host import loop_of
from nbnorm.cpu.jit import entry, ordered
from nbnorm.cpu.launch import launch


@ordered
def count_one(done, wrong, u):
    if u == wrong:
        raise ValueError("a unit fails")
    done[u] += 1


@entry("test_count_all")
def count_all(pool, units, done, wrong):
    launch(pool, units, count_one, (done, wrong))


@ordered
def note_thread(who, u):
    who[u] = numba.get_thread_id()


@entry("test_note_all")
def note_all(pool, units, who):
    launch(pool, units, note_thread, (who,))


@pytest.mark.parametrize("units", [0, 1, 2, 3, 7, 64, 1000])
@pytest.mark.parametrize("count", [1, 2, 5, numba.config.NUMBA_NUM_THREADS])
def test_every_unit_is_done_once(units, count):
    for pool in 0, threads.pool():
        done = np.zeros(units, np.int64)
        with threads.turn(True):
            count_all((pool, min(count, threads.count())), units, done, -1)
        assert (done == 1).all()


SHARED = """
import numpy as np
from test_units import note_all
from nbnorm.cpu import threads
who = np.full(8, -1)
note_all((threads.pool(), 2), 8, who)
print(*who)
"""


def test_threads_share_the_units():
    """If the caller did all units, every other test would still pass."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{SHARED}"
    printed = run_child("-c", code, NUMBA_NUM_THREADS="2", NUMBA_THREADING_LAYER="omp")
    assert printed.split() == 4 * ["0"] + 4 * ["1"]


@pytest.mark.parametrize("wrong", [0, 3, 6])
def test_what_a_unit_raises_is_a_memory_error_when_all_have_ended(wrong):
    for pool in 0, threads.pool():
        done = np.zeros(7, np.int64)
        with threads.turn(True), pytest.raises(MemoryError, match="no memory"):
            count_all((pool, threads.count()), 7, done, wrong)
        assert done.tolist() == [int(u != wrong) for u in range(7)]


def test_numba_still_has_the_pool_that_is_called_by_name():
    """Otherwise all results would be right, but computed by one thread."""
    printed = run_child(
        "-c", "from nbnorm.cpu import threads; print(threads.pool(), threads.count())"
    )
    pool, count = map(int, printed.split())
    assert pool != 0
    assert count == numba.config.NUMBA_NUM_THREADS


def test_every_unit_is_done_once_on_the_pool_of_a_host():
    try:
        library = ctypes.CDLL("libgomp.so.1")
    except OSError:
        pytest.skip("needs GCC's OpenMP library")
    loop = loop_of(library)
    for units in 0, 1, 7, 1000:
        for count in 1, 2, 5:
            done = np.zeros(units, np.int64)
            count_all((loop.address, count), units, done, -1)
            assert (done == 1).all()


@pytest.mark.parametrize("library", ["no such file", "libm.so.6"])
def test_what_is_no_pool_is_not_adopted(library, monkeypatch):
    monkeypatch.setattr(threads, "_host", None)
    threads.adopt(library, lambda: 1)
    assert threads._host is None
