"""Times on the GPU by CUDA events, of calls that take turns, with nothing of theirs in L2.

Before each call a buffer of four times L2 is read, for long enough that the host has put the whole
call on the stream before the GPU gets there: what is timed is the GPU's work alone, and neither the
host's nor lines of the last call that wait to be written.
"""

import math
import statistics
import time
import traceback
from typing import Any, NamedTuple

import numpy as np

from benchmarks.gpu.large import seed_with
from benchmarks.gpu.machine import Machine, Unavailable
from benchmarks.gpu.peers import (
    COPY,
    OPS,
    OURS,
    PEERS,
    Batch,
    Call,
    as_array,
    is_ours,
    torch_of,
)
from benchmarks.gpu.records import Records, say
from benchmarks.shapes import RESNET50

ROUNDS, LEAST_FLUSH_US = 7, 300.0
ROW_SECONDS = 0.15  # more rounds, until a row has taken this long
STAGES = ((32, "float32"), (32, "bfloat16"), (256, "bfloat16"), (256, "float32"), (32, "float16"),
          (256, "float16"))  # fmt: skip
# torch.compile takes seconds for each op and layout: at a few shapes, while there is time for it.
COMPILED = ((32, 256, 56, 56), (32, 64, 112, 112))


class Times(NamedTuple):
    """Of one call, in microseconds; and of the host, to put it on the stream."""

    least: float
    median: float
    host: float


class Budget:
    """Seconds that may go into compiling."""

    def __init__(self, seconds: float) -> None:
        self.left = seconds

    def spend(self, call: Call) -> Any:
        """Call; what it takes is taken off."""
        begin = time.monotonic()
        try:
            return call()
        finally:
            self.left -= time.monotonic() - begin


class Clock:
    """CUDA events on the default stream behind a flush of L2; dry: the host's clock."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        if machine.dry:
            self.l2 = self.flush_us = 0.0
            return
        xp = machine.xp
        properties = xp.cuda.runtime.getDeviceProperties(xp.cuda.Device().id)
        self.l2 = float(properties.get("l2CacheSize", 0)) or 64e6
        self._buffer = xp.ones(int(max(4 * self.l2, 256e6)) // 4, np.float32)
        self._result = xp.empty((), np.float32)
        self._reads = 1
        self._flush()
        self.flush_us = min(self._elapsed(self._flush)[0] for _ in range(5))

    def at_least(self, microseconds: float) -> None:
        """Make the flush take so long."""
        if not self.machine.dry:
            self._reads = math.ceil(max(microseconds, LEAST_FLUSH_US) / max(self.flush_us, 1.0))

    def _flush(self) -> None:
        for _ in range(self._reads):
            self._buffer.max(out=self._result)

    def _elapsed(self, call: Call) -> tuple[float, float]:
        """Return microseconds on the GPU, and on the host, of a call."""
        start, end, host = self.record(call, flush=False)
        end.synchronize()
        return self.between(start, end), host

    def record(self, call: Call, *, flush: bool = True) -> tuple[Any, Any, float]:
        """Put a flush and a call on the stream, between two events."""
        if self.machine.dry:
            begin = time.perf_counter()
            call()
            end = time.perf_counter()
            return begin, end, (end - begin) * 1e6
        event = self.machine.xp.cuda.Event
        start, end = event(), event()
        if flush:
            self._flush()
        begin = time.perf_counter()
        start.record()
        call()
        end.record()
        return start, end, (time.perf_counter() - begin) * 1e6

    def between(self, start: Any, end: Any) -> float:
        """Return microseconds between two events that have happened."""
        if self.machine.dry:
            return (end - start) * 1e6
        return float(self.machine.xp.cuda.get_elapsed_time(start, end)) * 1e3


def alternate(clock: Clock, calls: dict[str, Call], seconds: float) -> dict[str, Times]:
    """Time calls in turns."""
    host: dict[str, list[float]] = {name: [] for name in calls}
    gpu: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():  # warm; how long the host takes says how long to flush
        for _ in range(3):
            host[name].append(clock.record(call, flush=False)[2])
    clock.machine.sync()
    clock.at_least(1.5 * max(min(samples) for samples in host.values()))
    begin, done = time.monotonic(), 0
    while done < ROUNDS or time.monotonic() - begin < seconds:
        taken = {name: clock.record(call) for name, call in calls.items()}
        clock.machine.sync()
        for name, (start, end, host_us) in taken.items():
            gpu[name].append(clock.between(start, end))
            host[name].append(host_us)
        done += 1
        if done >= ROUNDS and time.monotonic() - begin > 4 * seconds:
            break
    return {
        name: Times(min(gpu[name]), statistics.median(gpu[name]), statistics.median(host[name]))
        for name in calls
    }


def stages(dry: bool) -> list[tuple[tuple[int, ...], str]]:
    """Return shapes and dtypes, those that tell most first."""
    if dry:
        return [((2, C, side, side), "float32") for C, side in ((8, 20), (16, 7))]
    heavy = sorted(RESNET50, key=lambda shape: -RESNET50[shape].count * math.prod(shape))
    return [((N, *shape[1:]), dtype) for N, dtype in STAGES for shape in heavy]


def _calls(
    batch: Batch, op: str, budget: Budget | None, records: Records, labels: dict[str, Any]
) -> dict[str, Call]:
    """Set up all peers; those that cannot are recorded as left out."""
    calls: dict[str, Call] = {}
    expected = None
    for name, peer in PEERS.items():
        if op not in peer.ops or (peer.compiled and (budget is None or budget.left <= 0)):
            continue
        try:
            call, result = _first(peer.ops[op], batch, budget if peer.compiled else None)
            if name == OURS:
                expected = _some(batch.machine, result)
            elif name != COPY and expected is not None:
                _agree(_some(batch.machine, result), expected, batch.dtype.name)
            calls[name] = call
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error)[:300]}"
            say(f"    left out: {name}: {reason}")
            records.add(what="left out", **labels, name=name, reason=reason, ours=is_ours(name))
            if not isinstance(error, Unavailable | AssertionError):
                say(traceback.format_exc(limit=-3))
    return calls


def _first(setup: Any, batch: Batch, budget: Budget | None) -> tuple[Call, Any]:
    """Set up a peer and call it once."""

    def both() -> tuple[Call, Any]:
        call = setup(batch)
        return call, call()

    return both() if budget is None else budget.spend(both)


def _some(machine: Machine, result: Any) -> np.ndarray:
    """Return the first and the last sample of a result."""
    array = as_array(machine, result)
    last = array.shape[0] - 1
    return np.stack([machine.fetch(machine.wide(array[i : i + 1])) for i in (0, last)])


def _agree(got: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    """Whether two libraries computed the same: not how well."""
    allowed = {"float32": 1e-3, "float64": 1e-6, "float16": 2e-2, "bfloat16": 1e-1}[dtype]
    error = float(np.abs(got - expected).max())
    if not error <= allowed * max(1.0, float(np.abs(expected).max())):
        raise AssertionError(f"differs from nbnorm by {error}")


def run(
    machine: Machine, records: Records, seed: int, seconds: float, compile_seconds: float
) -> None:
    """Time as many shapes as there is time for."""
    begin = time.monotonic()
    seed_with(seed)
    _prepare_torch(machine)
    clock = Clock(machine)
    records.add(what="clock", l2=clock.l2, flush_us=clock.flush_us, seconds=seconds)
    budget = Budget(compile_seconds)
    todo = stages(machine.dry)
    for number, (shape, dtype) in enumerate(todo):
        if time.monotonic() - begin > seconds:
            say(f"out of time: {len(todo) - number} of {len(todo)} shapes were not timed")
            records.add(what="not run", shapes=len(todo) - number)
            return
        compiling = budget if shape in COMPILED or machine.dry else None
        _shape(machine, records, clock, shape, dtype, compiling, begin + seconds)
        machine.tidy()
        if not machine.alive():
            say("the device no longer answers")
            return


def _prepare_torch(machine: Machine) -> None:
    try:
        torch = torch_of(machine)
        import torch._functorch.config as functorch

        functorch.donated_buffer = False  # a backward is run again and again
        torch.backends.cudnn.benchmark = False
    except Exception as reason:
        say(f"torch: {reason}")


def _shape(
    machine: Machine, records: Records, clock: Clock, shape: tuple[int, ...], dtype: str,
    budget: Budget | None, deadline: float,
) -> None:  # fmt: skip
    for op in OPS:
        if time.monotonic() > deadline:
            return
        labels = {"shape": shape, "dtype": dtype, "op": op}
        try:
            batch = Batch(machine, shape, dtype)
            calls = _calls(batch, op, budget, records, labels)
            if calls:
                times = alternate(clock, calls, 0.0 if machine.dry else ROW_SECONDS)
                records.add(what="row", **labels, times=times)
                _say(labels, times)
            del calls, batch
        except Exception as error:
            say(traceback.format_exc(limit=-4))
            records.add(what="error", **labels, error=f"{type(error).__name__}: {error}")
        _tidy(machine)
        if not machine.alive():
            return


def _tidy(machine: Machine) -> None:
    machine.tidy()
    if not machine.dry:
        try:
            torch_of(machine).cuda.empty_cache()
        except Unavailable:
            return


def _say(labels: dict[str, Any], times: dict[str, Times]) -> None:
    figures = ", ".join(f"{name} {t.least:.1f}" for name, t in times.items())
    say(f"{labels['op']} {labels['dtype']} {labels['shape']} us: {figures}")
