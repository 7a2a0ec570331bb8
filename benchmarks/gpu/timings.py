"""Times on the GPU by CUDA events, of interleaved calls that start with none of their data in L2.

Before each call the GPU reads a buffer of four times the size of L2, often enough that the host can
put the whole call on the stream meanwhile. The times therefore contain only the call's own work on
the GPU, neither the host's nor the writing back of the previous call's cache lines. Tables use the
minimum over the rounds.
"""

import importlib.util
import math
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.gpu import records
from benchmarks.gpu.peers import PEERS, Batch, Call, Machine
from benchmarks.gpu.records import COPY, OPS, OURS, TWICE
from benchmarks.shapes import RESNET50

ROUNDS, ROW_SECONDS, LEAST_FLUSH_US = 7, 0.1, 300.0
COMPILE_SECONDS = 40.0  # torch.compile takes seconds per op and layout, so only at SHORT
SHORT, DRY = ((32, 256, 56, 56), (32, 64, 112, 112)), (2, 8, 8, 8)
COMPILED = (*SHORT, DRY)
STAGES = ((32, "float32"), (32, "bfloat16"), (256, "bfloat16"), (256, "float32"), (32, "float16"))
ALLOWED = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}  # between libraries

Times = tuple[float, float, float]  # microseconds: minimum and median; the host's median


class Clock:
    """CUDA events on the default stream after a flush of L2; if dry, the host's clock."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self._reads = machine, 1
        if machine.dry:
            return
        xp = machine.xp
        properties = xp.cuda.runtime.getDeviceProperties(xp.cuda.Device().id)
        size = max(4 * int(properties.get("l2CacheSize", 0)), 1 << 28)
        self._buffer, self._result = xp.ones(size // 4, np.float32), xp.empty((), np.float32)
        self._flush()
        times = [self.once(self._flush, flush=False) for _ in range(5)]
        machine.sync()
        self.flush_us = min(self.between(*one) for one in times)

    def flush_for(self, microseconds: float) -> None:
        """Make the flush take at least this long."""
        if not self.machine.dry:
            self._reads = math.ceil(max(microseconds, LEAST_FLUSH_US) / max(self.flush_us, 1.0))

    def _flush(self) -> None:
        for _ in range(self._reads):
            self._buffer.max(out=self._result)

    def once(self, call: Call, *, flush: bool = True) -> tuple[Any, Any, float]:
        """Put a call on the stream; return the events around it, and the host's microseconds."""
        if self.machine.dry:
            begin = time.perf_counter()
            call()
            end = time.perf_counter()
            return begin, end, (end - begin) * 1e6
        start, end = self.machine.xp.cuda.Event(), self.machine.xp.cuda.Event()
        if flush:
            self._flush()
        start.record()
        begin = time.perf_counter()
        call()
        host = (time.perf_counter() - begin) * 1e6
        end.record()
        return start, end, host

    def between(self, start: Any, end: Any, _: float) -> float:
        """Return microseconds between two completed events."""
        if self.machine.dry:
            return float(end - start) * 1e6
        return float(self.machine.xp.cuda.get_elapsed_time(start, end)) * 1e3


def in_turns(clock: Clock, calls: dict[str, Call]) -> dict[str, Times]:
    """Time interleaved calls."""
    taken: dict[str, list[tuple[Any, Any, float]]] = {name: [] for name in calls}
    warm = [[clock.once(call, flush=False)[2] for _ in range(3)] for call in calls.values()]
    clock.machine.sync()
    clock.flush_for(1.5 * max(map(min, warm)))
    seconds = 0.0 if clock.machine.dry else ROW_SECONDS
    begin = time.monotonic()
    while len(taken[COPY]) < ROUNDS or time.monotonic() - begin < seconds:
        for name, call in calls.items():
            taken[name].append(clock.once(call))
        clock.machine.sync()
    found = {}
    for name, samples in taken.items():
        gpu = [clock.between(*one) for one in samples]
        host = statistics.median(one[2] for one in samples)
        found[name] = min(gpu), statistics.median(gpu), host
    return found


class Budget:
    """Remaining seconds, in all and for compiling."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self.compiling = min(COMPILE_SECONDS, seconds / 4)

    def over(self) -> bool:
        """Whether all time is spent."""
        return time.monotonic() > self._end


def peers_for(part: str, shape: tuple[int, ...], op: str, budget: Budget) -> Iterator[str]:
    """Yield the peers to time; the short part omits slow starters and less important peers."""
    for name, peer in PEERS.items():
        less = peer.compiled or "without" in name
        if op not in peer.ops or (less and part == "short"):
            continue
        if not peer.compiled or (budget.compiling > 0 and shape in COMPILED):
            yield name


def ready(batch: Batch, op: str, names: Iterator[str], budget: Budget) -> dict[str, Call]:
    """Set up the peers that agree with nbnorm; record those that fail."""
    calls: dict[str, Call] = {}
    expected: np.ndarray | None = None
    for name in names:
        if budget.over():
            break
        begin = time.monotonic()
        try:
            call = PEERS[name].ops[op](batch)
            got = None if name == COPY else batch.values(call())
            call()
            if name == OURS:
                expected = got
            elif got is not None and expected is not None:
                agree(got, expected, batch.dtype.name)
            calls[name] = call
        except Exception as error:
            left_out(name, error, shape=batch.shape, dtype=batch.dtype.name, op=op)
        if PEERS[name].compiled:
            budget.compiling -= time.monotonic() - begin
    return calls


def agree(got: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    """Raise AssertionError if two libraries differ by more than `ALLOWED`."""
    error = float(np.abs(got - expected).max())
    if not error <= ALLOWED[dtype] * max(1.0, float(np.abs(expected).max())):
        raise AssertionError(f"differs from nbnorm by {error}")


def left_out(name: str, error: Exception, **where: Any) -> None:
    """Record that a peer was not timed, and why."""
    print(f"left out: {name} {where}\n{traceback.format_exc(limit=-4)}", flush=True)
    reason = f"{type(error).__name__}: {str(error)[:200]}"
    records.add("left out", name=name, reason=reason, **where)


def shapes_of(part: str, *, dry: bool) -> list[tuple[tuple[int, ...], str]]:
    """Return shapes and dtypes, the most informative first."""
    if dry:
        return [(DRY, "float32")]
    if part != "timings":
        return [(shape, dtype) for shape in SHORT for dtype in ("float32", "bfloat16")]
    heavy = sorted(RESNET50, key=lambda shape: -RESNET50[shape].count * math.prod(shape))
    return [((N, *shape[1:]), dtype) for N, dtype in STAGES for shape in heavy]


def run(part: str, seconds: float, *, dry: bool) -> None:
    """Time as many rows as `seconds` allow; exit with status 1 if nbnorm fails or none ran."""
    machine, budget = Machine(dry=dry), Budget(seconds)
    if importlib.util.find_spec("torch"):
        import torch._functorch.config as functorch

        functorch.donated_buffer = False  # as backward runs repeatedly
    clock, rows, failed = Clock(machine), 0, 0
    todo = [(*of, op) for of in shapes_of(part, dry=dry) for op in OPS]
    for number, (shape, dtype, op) in enumerate(todo):
        if budget.over():
            print(f"out of time: {len(todo) - number} of {len(todo)} rows not run", flush=True)
            records.add("not run", part=part, rows=len(todo) - number)
            break
        batch = Batch(machine, shape, dtype)
        if part == "profile":
            names: Iterator[str] = (n for n in (OURS, TWICE) if op in PEERS[n].ops)
        else:
            names = peers_for(part, shape, op, budget)
        calls = ready(batch, op, names, budget)
        failed += OURS not in calls
        rows += 1
        if part != "profile" and COPY in calls and OURS in calls:
            times = in_turns(clock, calls)
            records.add("row", part=part, shape=shape, dtype=dtype, op=op, times=times)
            figures = ", ".join(f"{name} {least:.1f}" for name, (least, *_) in times.items())
            print(f"{op} {dtype} {shape} us: {figures}", flush=True)
        del batch, calls
        machine.tidy()
    if failed or not rows:
        sys.exit(f"nbnorm was not timed in {failed} of {rows} rows")
