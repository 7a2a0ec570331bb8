"""`ThreadComm` itself: order, timing, and what happens when a thread does not arrive.

`test_distributed.py` runs all cases of ranks over it, and compares its bits with those of
processes.
"""

import copy
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
from distributed_cases import Batch, step
from hypothesis import given, settings
from hypothesis import strategies as st
from test_distributed import WAIT, over_threads
from tolerances import assert_same_bits

import nbnorm
from nbnorm.distributed import SelfComm, SyncBatchNorm, ThreadComm, sync_batch_norm_forward

SIZES = (3, 0, 9, 4)


def outcomes(function, comms):
    """Call with each communicator in a thread; return results or errors, and seconds."""

    def work(comm):
        try:
            with comm:
                return function(comm)
        except Exception as error:
            return error

    begin = time.perf_counter()
    with ThreadPoolExecutor(len(comms)) as threads:
        found = list(threads.map(work, comms))
    return found, time.perf_counter() - begin


def gathered(comm, row):
    table = np.empty((comm.size, *row.shape), row.dtype)
    comm.Allgather(row, table)
    return table


# What is exchanged


@given(
    size=st.integers(1, 5),
    rounds=st.integers(1, 6),
    dtype=st.sampled_from(("float64", "uint8")),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_every_rank_gets_all_rows_in_rank_order(size, rounds, dtype, seed):
    """Even if some ranks are late and senders reuse their buffers at once."""

    def exchanges(comm):
        late = random.Random(100 * seed + comm.rank)
        row, tables = np.empty(3, dtype), []
        for turn in range(rounds):
            row[...] = 10 * turn + comm.rank
            if late.random() < 0.3:
                time.sleep(0.002)
            tables.append(gathered(comm, row))
            row[...] = 255
        return tables

    expected = [
        np.repeat([[10 * turn + rank] for rank in range(size)], 3, 1) for turn in range(rounds)
    ]
    for tables in over_threads(size, exchanges):
        for table, rows in zip(tables, expected, strict=True):
            assert_same_bits(table, rows.astype(dtype))


def test_bits_do_not_depend_on_which_thread_comes_first():
    def late(first):
        def work(comm):
            time.sleep(0 if comm.rank == first else 0.02)
            return step(comm, Batch(comm, "float32", plane=(20, 20), sizes=SIZES), "relu")

        return work

    reference = over_threads(len(SIZES), late(0))
    for first in range(1, len(SIZES)):
        for ours, theirs in zip(over_threads(len(SIZES), late(first)), reference, strict=True):
            for results, expected in zip(ours, theirs, strict=True):
                for array, other in zip(results, expected, strict=True):
                    assert array is None if other is None else True
                    if other is not None:
                        assert_same_bits(array, other)


def test_statistics_are_merged_in_rank_order():
    whole = Batch(SelfComm(), "float32", plane=(20, 20), sizes=[sum(SIZES)])
    ends = np.cumsum(SIZES)
    moments = [
        nbnorm.batch_norm_stats(whole.x[end - size : end])
        for end, size in zip(ends, SIZES, strict=True)
    ]
    merged = moments[0].merge(*moments[1:])
    results = over_threads(
        len(SIZES), lambda comm: step(comm, Batch(comm, "float32", plane=(20, 20), sizes=SIZES))
    )
    for forward, *_ in results:
        assert_same_bits(forward.mean, merged.mean)
        assert_same_bits(forward.rstd, merged.rstd(1e-5))


@pytest.mark.parametrize("threads", [1, numba.config.NUMBA_NUM_THREADS])
def test_large_parts_in_parallel_kernels(threads):
    """Calls of 2^15 values and more start Numba's threads, from every rank's thread."""
    x = np.random.default_rng(0).normal(size=(8, 16, 64, 64)).astype("float32")
    whole = nbnorm.batch_norm_forward(x)
    layers = {}

    def train(comm):
        numba.set_num_threads(threads)  # for calls from this thread only
        layer = layers[comm.rank] = SyncBatchNorm(16, comm=comm)
        part = x[4 * comm.rank : 4 * comm.rank + 4]
        for _ in range(3):
            y = layer.forward(part)
            layer.backward(y)
        return y

    parts = over_threads(2, train)
    np.testing.assert_allclose(np.concatenate(parts), whole.y, rtol=1e-5, atol=1e-5)
    for name, array in layers[0].state_dict().items():
        assert_same_bits(layers[1].state_dict()[name], array, name)


def test_one_rank_needs_no_other_thread():
    (comm,) = ThreadComm.split(1)
    assert_same_bits(gathered(comm, np.arange(3.0)), np.arange(3.0)[None])
    assert (comm.Get_size(), comm.Get_rank()) == (comm.size, comm.rank) == (1, 0)
    assert repr(comm) == "ThreadComm(rank=0, size=1)"


def test_a_deep_copy_of_a_layer_shares_the_communicator():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 5)).astype(np.float32)

    def train(comm):
        layer = SyncBatchNorm(5, comm=comm)
        part = x[4 * comm.rank : 4 * comm.rank + 4]
        layer.forward(part)
        copied, aside = copy.deepcopy((layer, [layer]))
        assert copied is aside[0] is not layer
        assert type(copied) is SyncBatchNorm
        assert copied.comm is comm
        before = {name: array.copy() for name, array in layer.state_dict().items()}
        dx = copied.backward(part)
        y = copied.forward(2 * part)  # both ranks: the copy is synchronised
        for name, array in layer.state_dict().items():
            assert_same_bits(array, before[name], name)
        assert_same_bits(layer.backward(part), dx, "dx")
        return y, copied.running_mean

    (_, mean), (_, other_mean) = over_threads(2, train)
    assert_same_bits(mean, other_mean)


# What goes wrong


def test_an_exception_in_one_thread_ends_the_others():
    failure = ZeroDivisionError("no data")

    def work(comm):
        if comm.rank == 1:
            time.sleep(0.05)  # the others wait by then
            raise failure
        return sync_batch_norm_forward(np.ones((3, 2)), comm=comm)

    comms = ThreadComm.split(3)  # without a time limit
    found, seconds = outcomes(work, comms)
    assert found[1] is failure
    assert seconds < WAIT
    for error in (found[0], found[2]):
        assert isinstance(error, RuntimeError)
        assert str(error) == "rank 1 has ended with ZeroDivisionError: no data"
        assert error.__cause__ is failure
    with pytest.raises(RuntimeError, match="rank 1 has ended"):  # later calls do not wait either
        gathered(comms[0], np.zeros(1))


def test_an_exchange_that_is_complete_is_not_undone():
    """If a rank fails right after an exchange, ranks that have yet to wake still get its rows."""

    def work(comm):
        table = gathered(comm, np.array([float(comm.rank)]))
        if comm.rank == 0:
            raise ZeroDivisionError
        return table.ravel().tolist()

    for _ in range(50):
        found, _ = outcomes(work, ThreadComm.split(4))
        assert isinstance(found[0], ZeroDivisionError)
        assert found[1:] == [[0.0, 1.0, 2.0, 3.0]] * 3


def test_an_error_that_is_handled_ends_nothing():
    def work(comm):
        with pytest.raises((ValueError, RuntimeError), match="eps"):
            sync_batch_norm_forward(np.ones((3, 2)), eps=-float(comm.rank), comm=comm)
        return sync_batch_norm_forward(np.ones((3, 2)), comm=comm).count

    assert over_threads(2, work) == [6, 6]


def test_a_time_limit_ends_all():
    def work(comm):
        if comm.rank == 2:
            released.wait(WAIT)
        try:
            return gathered(comm, np.zeros(1))
        finally:
            released.set()

    released = threading.Event()
    found, seconds = outcomes(work, ThreadComm.split(3, timeout=0.1))
    assert seconds < WAIT
    kinds = sorted(type(error).__name__ for error in found)
    assert kinds == ["RuntimeError", "RuntimeError", "TimeoutError"]
    (late,) = (error for error in found if isinstance(error, TimeoutError))
    assert "has waited 0.1 s for rank" in str(late)
    assert all(error is late or error.__cause__ is late for error in found)


def test_a_time_limit_names_all_that_are_missing():
    comms = ThreadComm.split(3, timeout=0)
    with pytest.raises(TimeoutError, match=r"^rank 1 has waited 0 s for ranks 0, 2$"):
        gathered(comms[1], np.zeros(1))
    with pytest.raises(RuntimeError, match=r"^rank 1 has ended with TimeoutError"):  # no `with`
        gathered(comms[0], np.zeros(1))


def test_a_communicator_of_two_threads_at_once():
    comms = ThreadComm.split(2, timeout=WAIT)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(gathered, comms[0], np.zeros(1))
        while not comms[0]._meeting._table:
            time.sleep(0.001)
        with pytest.raises(RuntimeError, match=r"^two threads use the communicator of rank 0"):
            gathered(comms[0], np.zeros(1))
        gathered(comms[1], np.ones(1))
        assert_same_bits(first.result(), np.array([[0.0], [1.0]]))


@pytest.mark.parametrize("odd", [np.zeros(2), np.zeros(1, "float32")], ids=["size", "dtype"])
def test_rows_that_do_not_go_together(odd):
    def work(comm):
        return gathered(comm, np.zeros(1) if comm.rank == 0 else odd)

    found, _ = outcomes(work, ThreadComm.split(2, timeout=WAIT))
    assert str(found[0]) == (
        f"rank 1 sent {odd.size} values of dtype {odd.dtype}, and rank 0 expected 1 of dtype "
        "float64"
    )
    assert isinstance(found[1], ValueError)


@pytest.mark.parametrize(
    ("size", "timeout", "error", "message"),
    [
        (0, None, ValueError, "size must be at least 1, got 0"),
        (1.5, None, TypeError, "size must be an int, got 1.5"),
        (2, -1, ValueError, "timeout must be at least 0, got -1"),
        (2, float("nan"), ValueError, "timeout must be at least 0, got nan"),
        (2, "long", TypeError, "timeout must be a real number, got 'long'"),
    ],
)
def test_what_cannot_be_split(size, timeout, error, message):
    with pytest.raises(error) as raised:
        ThreadComm.split(size, timeout=timeout)
    assert str(raised.value) == message
