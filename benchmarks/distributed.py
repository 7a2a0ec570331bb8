"""Cost of a synchronised layer and of its messages alone, and accuracy of the merge.

    NUMBA_NUM_THREADS=1 mpiexec -n 2 python benchmarks/distributed.py layers
    NUMBA_NUM_THREADS=1 mpiexec -n 2 python benchmarks/distributed.py messages
    python benchmarks/distributed.py threads
    python benchmarks/distributed.py merge

`layers` times forward and backward of one layer, interleaved; all ranks start each call together,
and a call takes as long as its slowest rank. The table has medians over all turns. The last column
is synchronised minus local at the tenth percentile, which other work on the machine affects less.
`halves` is the synchronised layer of a single rank, without messages: the cost of reading x twice.
`messages` times the gathers of one layer and step, without the layer. `threads` times the
synchronised layer on two Python threads as ranks, with one of Numba's threads per rank and with all
of them, and one call for the batches of both. `merge` simulates ranks in one process and compares
with long double.
"""

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if not __package__:  # run as a program: make this folder's package and nbnorm importable
    # Replace this folder, in which `distributed` would be this file.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numba
import numpy as np

import nbnorm
from benchmarks.runs import conditions, describe
from benchmarks.tables import markdown
from nbnorm import Moments
from nbnorm.distributed import (
    SelfComm,
    ThreadComm,
    sync_batch_norm_backward,
    sync_batch_norm_forward,
)

SHAPES = [
    (2, 512),
    (64, 512),
    (1024, 512),
    (8, 512, 7, 7),
    (32, 512, 7, 7),
    (8, 512, 14, 14),
    (32, 512, 14, 14),
]
CHANNELS = (64, 512, 2048)
RANKS = (2, 64, 512, 4096)
LAYERS_OF_RESNET50 = 53

Call = Callable[[], Any]


def calls_of(shape: tuple[int, ...], comm: Any) -> dict[str, Call]:
    """Return calls of one layer's training step: on this rank alone, in halves, synchronised."""
    rng = np.random.default_rng(comm.Get_rank())
    x, dy = (rng.standard_normal(shape, np.float32) for _ in range(2))
    gamma, beta, var = (np.ones(shape[1], np.float32) for _ in range(3))
    mean = np.zeros(shape[1], np.float32)
    y, dx = np.empty_like(x), np.empty_like(x)

    def local() -> None:
        saved = nbnorm.batch_norm_forward(x, gamma, beta, mean, var, out=y)
        nbnorm.batch_norm_backward(dy, x, gamma, saved.mean, saved.rstd, out=dx)

    def sync(ranks: Any) -> Call:
        def call() -> None:
            saved = sync_batch_norm_forward(x, gamma, beta, mean, var, out=y, comm=ranks)
            sync_batch_norm_backward(dy, x, gamma, *saved[1:], out=dx, comm=ranks)

        return call

    return {"local": local, "halves": sync(SelfComm()), "synchronised": sync(comm)}


def in_turns(calls: dict[str, Call], comm: Any, turns: int) -> dict[str, np.ndarray]:
    """Return the slowest rank's time in µs: tenth percentile and median over the turns."""
    own = {name: np.empty(turns) for name in calls}
    for call in calls.values():  # compiles
        call()
    for turn in range(turns):
        for name, call in calls.items():
            comm.Barrier()
            begin = time.perf_counter()
            call()
            own[name][turn] = (time.perf_counter() - begin) * 1e6
    slowest = {}
    for name, times in own.items():
        table = np.empty((comm.Get_size(), turns))
        comm.Allgather(times, table)
        slowest[name] = np.percentile(table.max(axis=0), [10, 50])
    return slowest


def layers(comm: Any, turns: int) -> list[list[str]]:
    """Time all shapes."""
    names = ["local, µs", "halves", "synchronised", "more than local", "tenth percentile"]
    lines = [["shape on each rank", *names]]
    for shape in SHAPES:
        times = in_turns(calls_of(shape, comm), comm, turns)
        extra = times["synchronised"] - times["local"]
        columns = [f"{times[name][1]:.0f}" for name in times]
        lines.append(["x".join(map(str, shape)), *columns, f"{extra[1]:.0f}", f"{extra[0]:.0f}"])
    return lines


def messages(comm: Any, turns: int) -> list[list[str]]:
    """Time the four gathers of a layer and step: two headers, two times 2 C values."""
    lines = [["C", "bytes received", "µs for a layer and step", f"ms for {LAYERS_OF_RESNET50}"]]
    size = comm.Get_size()
    for channels in CHANNELS:
        buffers = [np.zeros((size + 1, length)) for length in (16, 2 * channels)]

        def gathers(buffers: list[np.ndarray] = buffers) -> None:
            for buffer in (*buffers, *buffers):
                comm.Allgather(buffer[-1], buffer[:-1])

        spent = in_turns({"gathers": gathers}, comm, turns)["gathers"][1]
        received = 2 * sum(buffer[1:].nbytes for buffer in buffers)
        columns = [f"{received}", f"{spent:.1f}", f"{spent * LAYERS_OF_RESNET50 / 1e3:.2f}"]
        lines.append([f"{channels}", *columns])
    return lines


class Together(ThreadComm):
    """`ThreadComm` with a barrier, so that threads can start a call together."""

    def Barrier(self) -> None:  # noqa: N802
        """Return once all threads are here."""
        self.Allgather(np.zeros(1), np.empty((self.size, 1)))


def thread_ranks(turns: int) -> list[list[str]]:
    """Time two threads, each with half of the batch, and one call for the whole batch."""
    most = numba.get_num_threads()
    ways = ["one call, µs", "2 threads, 1 of Numba's each", f"2 threads, {most} of Numba's each"]
    lines = [["shape on each thread", *ways]]

    def with_threads(number: int, call: Call) -> Call:
        def call_with() -> None:
            numba.set_num_threads(number)
            call()

        return call_with

    def timed(comm: Any) -> dict[str, np.ndarray]:
        step = calls_of(shape, comm)["synchronised"]
        whole = calls_of((2 * shape[0], *shape[1:]), SelfComm())["local"]
        alone: Call = whole if comm.Get_rank() == 0 else lambda: None
        calls = with_threads(most, alone), with_threads(1, step), with_threads(most, step)
        return in_turns(dict(zip(ways, calls, strict=True)), comm, turns)

    for shape in SHAPES:
        with ThreadPoolExecutor(2) as threads:
            times, _ = threads.map(timed, Together.split(2))
        lines.append(["x".join(map(str, shape)), *(f"{times[way][1]:.0f}" for way in ways)])
    return lines


def merge() -> list[list[str]]:
    """Merge simulated ranks of 1 to 63 values per channel: greatest errors, and time."""
    names = ["mean, std", "M2, relative", "M2 of sums of x and x²"]
    lines = [["ranks", "mean / std", *names, "ms to merge"]]
    for ranks in RANKS:
        for offset in (0.0, 1e3, 1e6):
            lines.append([f"{ranks}", f"{offset:g}", *merged(ranks, offset)])
    return lines


def merged(ranks: int, offset: float) -> list[str]:
    """Return errors and time of one merge of 512 channels."""
    rng = np.random.default_rng(ranks)
    parts = [rng.normal(size=(rng.integers(1, 64), 512)) + offset for _ in range(ranks)]
    count = sum(map(len, parts))
    exact = sum(part.sum(axis=0, dtype=np.longdouble) for part in parts) / count
    m2 = sum(((part - exact) ** 2).sum(axis=0) for part in parts)
    sums = sum(part.sum(axis=0) for part in parts)
    squares = sum((part * part).sum(axis=0) for part in parts)
    own = [nbnorm.batch_norm_stats(part) for part in parts]
    begin = time.perf_counter()
    moments = Moments.merge(*own)
    spent = time.perf_counter() - begin
    errors = (
        np.abs(moments.mean - exact) / np.sqrt(m2 / count),
        np.abs(moments.m2 - m2) / m2,
        np.abs(squares - sums * sums / count - m2) / m2,
    )
    return [*(f"{error.max():.1e}" for error in errors), f"{spent * 1e3:.2g}"]


def main() -> None:
    """Measure what the command line asks for; the first rank prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["layers", "messages", "threads", "merge"])
    parser.add_argument("--turns", type=int, default=400, help="per call, default %(default)s")
    args = parser.parse_args()
    command = f"python benchmarks/distributed.py {' '.join(sys.argv[1:])}"
    if args.what in ("threads", "merge"):
        table = merge() if args.what == "merge" else thread_ranks(args.turns)
        print(f"{describe(conditions('numpy', 'numba'))}\n\n    {command}\n\n{markdown(table)}")
        return
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    lines = {"layers": layers, "messages": messages}[args.what](comm, args.turns)
    if comm.Get_rank() == 0:
        implementation = MPI.Get_library_version().splitlines()[0].replace("\t", " ")
        print(f"{describe(conditions('numpy', 'numba', 'mpi4py'))} {implementation}\n")
        threads = f"NUMBA_NUM_THREADS={numba.get_num_threads()}"
        print(f"    {threads} mpiexec -n {comm.Get_size()} {command}\n")
        print(markdown(lines))


if __name__ == "__main__":
    main()
