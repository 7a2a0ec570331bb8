"""What a call costs before the GPU begins: host time, launches; and each kernel's own time.

Host time is that of a call on a tiny array, many in a row without waiting for the device, fewer
than its queue holds; the median of many such rows.
"""

import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

import nbnorm
from benchmarks.gpu.large import EPS, random, seed_with
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.records import Records, say

TINY = (2, 8, 4, 4)
IN_A_ROW, ROWS = 50, 40
PROFILED = (
    ((32, 64, 112, 112), "C"), ((32, 256, 56, 56), "C"), ((32, 256, 56, 56), "channels-last"),
    ((32, 1024, 14, 14), "C"), ((32, 2048, 7, 7), "C"),
)  # fmt: skip
PROFILED_CALLS = 20

Call = Callable[[], Any]


def calls_on(machine: Machine, shape: tuple[int, ...], place: str, dtype: Any) -> dict[str, Call]:
    """Return calls on arrays of a shape: of nbnorm, and one of CuPy's as a unit."""
    C = shape[1]
    x, dy = (random(machine, shape, dtype, place, backwards=back) for back in (False, True))
    gamma, beta, mean, var = (machine.send(np.ones(C, np.float32)) for _ in range(4))
    out = machine.xp.empty_like(x)
    _, batch_mean, rstd = nbnorm.batch_norm_forward(x, gamma, beta, eps=EPS)
    return {
        "forward": lambda: nbnorm.batch_norm_forward(x, gamma, beta, mean, var, out=out),
        "forward, relu, new": lambda: nbnorm.batch_norm_forward(
            x, gamma, beta, mean, var, activation="relu"
        ),
        "backward": lambda: nbnorm.batch_norm_backward(dy, x, gamma, batch_mean, rstd, out=out),
        "inference": lambda: nbnorm.batch_norm_inference(x, gamma, beta, mean, var, out=out),
        "stats": lambda: nbnorm.batch_norm_stats(x),
    }


def torch_calls(machine: Machine, shape: tuple[int, ...]) -> dict[str, Call]:
    """Return torch's calls on tensors of a shape, and ours on the same."""
    import torch

    device = "cpu" if machine.dry else "cuda"
    x = torch.randn(shape, device=device)
    parameters = [torch.ones(shape[1], device=device) for _ in range(4)]
    gamma, beta, mean, var = parameters
    return {
        "torch: F.batch_norm": lambda: torch.nn.functional.batch_norm(
            x, mean, var, gamma, beta, training=True
        ),
        "torch tensors in: forward": lambda: nbnorm.batch_norm_forward(x, *parameters),
    }


def host_time(machine: Machine, call: Call) -> dict[str, float]:
    """Return microseconds a call: median and least."""
    for _ in range(20):
        call()
    samples = []
    for _ in range(ROWS):
        machine.sync()
        begin = time.perf_counter()
        for _ in range(IN_A_ROW):
            call()
        samples.append((time.perf_counter() - begin) / IN_A_ROW * 1e6)
    machine.sync()
    return {"median_us": statistics.median(samples), "least_us": min(samples)}


def launches(machine: Machine, call: Call) -> dict[str, int]:
    """Count kernels of nbnorm's that a call launches, and everything that it puts on a stream."""
    found = {}
    from nbnorm.cuda import launch

    usual, count = launch.run, [0]

    def counted(*arguments: Any) -> None:
        count[0] += 1
        usual(*arguments)

    call()
    launch.run = counted
    try:
        call()
    finally:
        launch.run = usual
    found["nbnorm"] = count[0]
    found["all"] = _nodes(machine, call)
    return found


def _nodes(machine: Machine, call: Call) -> int:
    """Nodes of the graph that a call makes: kernels, copies and fills, CuPy's too."""
    from cuda.bindings import runtime

    cupy = machine.xp
    stream = cupy.cuda.Stream(non_blocking=True)
    machine.sync()
    with stream:
        call()
        stream.synchronize()
        stream.begin_capture()
        try:
            call()
        finally:
            captured = stream.end_capture()
    error, _, number = runtime.cudaGraphGetNodes(captured.graph, 0)
    if int(error):
        raise RuntimeError(f"cudaGraphGetNodes: {error}")
    machine.sync()
    return int(number)


def kernels(machine: Machine, call: Call) -> dict[str, dict[str, float]]:
    """Return number a call and microseconds of every kernel, as torch's profiler sees them."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.zeros(1, device="cuda")
    for _ in range(3):
        call()
    machine.sync()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        for _ in range(PROFILED_CALLS):
            call()
        machine.sync()
    found = {}
    for event in seen.key_averages():
        microseconds = getattr(event, "self_device_time_total", 0) or 0
        if microseconds > 0:
            number = event.count / PROFILED_CALLS
            found[event.key[:160]] = {
                "a_call": number, "us_a_call": round(microseconds / PROFILED_CALLS, 2)
            }  # fmt: skip
    return found


def run(machine: Machine, records: Records, seed: int, seconds: float) -> None:
    """Time calls, count launches, and say what each kernel takes."""
    deadline = time.monotonic() + seconds
    seed_with(seed)
    _first_calls(machine, records)
    calls = _try(records, "calls", lambda: calls_on(machine, TINY, "C", np.dtype("float32"))) or {}
    calls |= _try(records, "torch", lambda: torch_calls(machine, TINY)) or {}
    for name, call in calls.items():
        times = _try(records, name, lambda call=call: host_time(machine, call))
        counted = None
        if not (machine.dry or "torch" in name):
            counted = _try(records, name, lambda call=call: launches(machine, call))
        if times:
            say(f"{name:28} {times['median_us']:8.1f} us, launches {counted}")
            records.add(what="host", name=name, shape=TINY, launches=counted, **times)
    if machine.dry:
        return
    for shape, place in PROFILED:
        if time.monotonic() > deadline:
            return
        _profile(machine, records, shape, place)


def _first_calls(machine: Machine, records: Records) -> None:
    """Seconds that the first call of each kind takes, which compiles."""
    x = machine.send(np.ones((4, 8, 16, 16), np.float32))
    begin = time.perf_counter()
    _, mean, rstd = nbnorm.batch_norm_forward(x)
    machine.sync()
    forward, begin = time.perf_counter() - begin, time.perf_counter()
    nbnorm.batch_norm_backward(x, x, None, mean, rstd)
    machine.sync()
    backward = time.perf_counter() - begin
    say(f"first forward {forward:.1f} s, first backward {backward:.1f} s")
    records.add(what="first call", forward=forward, backward=backward)


def _profile(machine: Machine, records: Records, shape: tuple[int, ...], place: str) -> None:
    for dtype in ("float32", "bfloat16"):
        calls = _try(records, dtype, lambda dtype=dtype: calls_on(
            machine, shape, place, machine.dtype(dtype))) or {}  # fmt: skip
        for name in ("forward", "backward", "inference"):
            call = calls.get(name)
            found = call and _try(records, name, lambda call=call: kernels(machine, call))
            for kernel, numbers in (found or {}).items():
                say(f"{shape} {place} {dtype} {name}: {numbers['us_a_call']:9.2f} us {kernel}")
            if found:
                records.add(
                    what="kernels", name=name, shape=shape, place=place, dtype=dtype, kernels=found
                )
        machine.tidy()


def _try(records: Records, name: str, call: Call) -> Any:
    try:
        return call()
    except Exception as error:
        say(traceback.format_exc())
        records.add(what="error", name=name, error=f"{type(error).__name__}: {error}")
        return None
