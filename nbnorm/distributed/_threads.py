"""`ThreadComm`: the threads of a process as ranks."""

from __future__ import annotations

import threading
from math import inf
from types import TracebackType
from typing import Any, Self

import numpy as np

from nbnorm import _checks
from nbnorm._typing import NDArray


class ThreadComm:
    """Communicator of one of several threads, which take part as ranks.

    `split` makes the communicators, one for each thread. Inside ``with comm:``, an exception in
    one rank also ends the others, which would wait for it.

    Attributes
    ----------
    size : int
        Number of ranks.
    rank : int
        This communicator's rank.

    Notes
    -----
    Rows are copied, and every thread receives all rows in the order of the ranks. Results have the
    bits that processes give with the same parts, whichever thread comes first. Threads that only
    wait hold neither the GIL nor a processor.

    Examples
    --------
    >>> from concurrent.futures import ThreadPoolExecutor
    >>> import numpy as np
    >>> from nbnorm.distributed import ThreadComm, sync_batch_norm_forward
    >>> def mean_of_all(comm, x):
    ...     with comm:
    ...         return sync_batch_norm_forward(x, comm=comm).mean
    >>> parts = np.array([[1.0], [3.0]]), np.array([[8.0]])
    >>> with ThreadPoolExecutor(2) as threads:  # as many threads as ranks
    ...     list(threads.map(mean_of_all, ThreadComm.split(2), parts))
    [array([4.]), array([4.])]
    """

    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self._meeting, self.rank, self.size = meeting, rank, meeting.size

    @classmethod
    def split(cls, size: int, *, timeout: float | None = None) -> list[ThreadComm]:
        """Return the communicators of `size` threads, in rank order.

        Parameters
        ----------
        size : int
            Number of threads that take part, each with one of the communicators.
        timeout : float, optional
            Longest time in seconds for which a thread waits for the others in one exchange. None
            waits without limit.

        Returns
        -------
        list of ThreadComm
            One communicator per rank.

        Raises
        ------
        TypeError
            size is not an int, or timeout not a number.
        ValueError
            size is less than 1; timeout is negative or NaN.
        """
        ranks = _checks.at_least_one(size, "size")
        limit = inf if timeout is None else _checks.number(timeout, "timeout")
        if not limit >= 0:
            raise ValueError(f"timeout must be at least 0, got {timeout}")
        meeting = _Meeting(ranks, limit)
        return [cls(meeting, rank) for rank in range(ranks)]

    def Get_size(self) -> int:  # noqa: N802
        """Return the number of ranks."""
        return self.size

    def Get_rank(self) -> int:  # noqa: N802
        """Return this communicator's rank."""
        return self.rank

    def Allgather(self, sendbuf: NDArray, recvbuf: NDArray) -> None:  # noqa: N802
        """Write every rank's `sendbuf` into the rows of every rank's `recvbuf`, in rank order.

        Raises
        ------
        RuntimeError
            Another rank has ended with an exception, which is this one's cause; or another thread
            is in an exchange with this communicator.
        TimeoutError
            The others did not come in time. They raise RuntimeError.
        ValueError
            The ranks' arrays differ in size or dtype.
        """
        rows = self._meeting.exchange(self.rank, sendbuf.reshape(-1).copy())
        table = recvbuf.reshape(self.size, -1)
        for rank, row in enumerate(rows):
            if (row.size, row.dtype) != (table.shape[1], table.dtype):
                raise ValueError(
                    f"rank {rank} sent {row.size} values of dtype {row.dtype}, and rank "
                    f"{self.rank} expected {table.shape[1]} of dtype {table.dtype}"
                )
        recvbuf[...] = np.stack(rows).reshape(recvbuf.shape)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._meeting.end(self.rank, error)

    def __repr__(self) -> str:
        return f"ThreadComm(rank={self.rank}, size={self.size})"


class _Meeting:
    """Where the ranks exchange rows: a table for each exchange, and the first error that ends all.

    An exchange that is complete stays so: its table is not used again, so that a rank may go on to
    the next exchange, or end, before another has read the rows.
    """

    def __init__(self, size: int, limit: float) -> None:
        self.size, self._limit = size, min(limit, threading.TIMEOUT_MAX)
        self._changed = threading.Condition()
        self._table: dict[int, NDArray] = {}
        self._ended: tuple[int, BaseException] | None = None

    def exchange(self, rank: int, row: NDArray) -> list[NDArray]:
        """Return the rows of all ranks, in rank order, once all are there."""
        with self._changed:
            self._raise_if_ended()
            table = self._table
            if rank in table:
                raise RuntimeError(
                    f"two threads use the communicator of rank {rank}; each needs one of its own"
                )
            table[rank] = row
            if len(table) == self.size:
                self._table = {}
                self._changed.notify_all()
            self._changed.wait_for(lambda: len(table) == self.size or self._ended, self._limit)
            if len(table) < self.size:
                self._raise_if_ended()
                raise self._late(rank, table)
        return [table[other] for other in range(self.size)]

    def end(self, rank: int, error: BaseException) -> None:
        """Make waiting ranks and later exchanges raise, because of this rank's error."""
        with self._changed:
            self._ended = self._ended or (rank, error)
            self._changed.notify_all()

    def _raise_if_ended(self) -> None:
        if self._ended is not None:
            rank, error = self._ended
            raise RuntimeError(f"rank {rank} has ended with {_described(error)}") from error

    def _late(self, rank: int, table: dict[int, Any]) -> TimeoutError:
        """Return the TimeoutError of a rank that waited too long; end the others."""
        missing = [other for other in range(self.size) if other not in table]
        names = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
        error = TimeoutError(f"rank {rank} has waited {self._limit:g} s for {names}")
        self.end(rank, error)
        return error


def _described(error: BaseException) -> str:
    text = str(error)
    return type(error).__name__ + f": {text}" * bool(text)
