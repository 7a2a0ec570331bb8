"""Forward and backward captured in a CUDA graph by CuPy, replayed on other data and compared."""

import traceback
from typing import Any

import numpy as np

import nbnorm
from benchmarks.gpu.large import EPS, random, seed_with
from benchmarks.gpu.machine import Array, Machine, bits, same_bits
from benchmarks.gpu.records import Records, say

SHAPES: tuple[tuple[tuple[int, ...], str], ...] = (
    ((32, 64, 56, 56), "C"), ((32, 64, 56, 56), "channels-last"), ((32, 512, 7, 7), "C"),
    ((60, 100), "C"),
)  # fmt: skip


class Step:
    """A training step whose arguments and results stay where they are."""

    def __init__(self, machine: Machine, shape: tuple[int, ...], place: str, dtype: Any) -> None:
        C = shape[1]
        self.x = random(machine, shape, dtype, place)
        self.dy = random(machine, shape, dtype, place, backwards=True)
        self.gamma = machine.send(np.linspace(0.5, 1.5, C).astype(np.float32))
        self.beta = machine.send(np.linspace(-0.5, 0.5, C).astype(np.float32))
        self.running = [machine.send(np.ones(C, np.float32)) for _ in range(2)]
        self.y, self.dx = machine.xp.empty_like(self.x), machine.xp.empty_like(self.x)

    def __call__(self) -> dict[str, Array]:
        """Run it; results that are not in memory at hand are new."""
        y, mean, rstd = nbnorm.batch_norm_forward(
            self.x, self.gamma, self.beta, *self.running,
            eps=EPS, activation="relu", out=self.y,
        )  # fmt: skip
        got = nbnorm.batch_norm_backward(
            self.dy, self.x, self.gamma, mean, rstd, beta=self.beta, activation="relu",
            out=self.dx,
        )  # fmt: skip
        return {"y": y, "mean": mean, "rstd": rstd, "dx": got.dx, "dgamma": got.dgamma,
                "dbeta": got.dbeta}  # fmt: skip

    def renew(self) -> None:
        """Put other values into x, and what was there before into the running statistics."""
        bits(self.x)[...] = bits(self.x)[::-1].copy()
        for array in self.running:
            array[...] = 1
        for array in (self.y, self.dx):
            bits(array)[...] = -1


def _capture(machine: Machine, step: Step) -> tuple[Any, Any, dict[str, Array], Any]:
    """Return graph, stream, results, and the pool that its scratch memory stays in."""
    cupy = machine.xp
    pool, stream = cupy.cuda.MemoryPool(), cupy.cuda.Stream(non_blocking=True)
    machine.sync()
    # Scratch memory belongs to the graph as long as it is replayed: a pool of its own holds it.
    with cupy.cuda.using_allocator(pool.malloc), stream:
        step()  # compiles and loads kernels, which a capture may not
        stream.synchronize()
        stream.begin_capture()
        try:
            results = step()
        finally:
            captured = stream.end_capture()
    return captured, stream, results, pool


def _compare(machine: Machine, shape: tuple[int, ...], place: str, dtype: Any) -> list[str]:
    step = Step(machine, shape, place, dtype)
    captured, stream, results, pool = _capture(machine, step)
    wrong = []
    for replay in range(3):
        step.renew()
        machine.sync()
        captured.launch(stream)
        stream.synchronize()
        replayed = {name: machine.copied(array) for name, array in results.items()}
        replayed |= {"running_mean": step.running[0].copy(), "running_var": step.running[1].copy()}
        for array in step.running:
            array[...] = 1
        direct = {name: machine.copied(array) for name, array in step().items()}
        direct |= dict(zip(("running_mean", "running_var"), step.running, strict=True))
        machine.sync()
        wrong += [f"{replay}: {n}" for n in direct if not same_bits(replayed[n], direct[n])]
    del captured, pool
    return wrong


def run(machine: Machine, records: Records, seed: int) -> None:
    """Check some shapes and dtypes."""
    if machine.dry:
        say("left out: a graph needs a GPU")
        return
    seed_with(seed)
    for dtype in ("float32", "bfloat16"):
        for shape, place in SHAPES:
            wrong: list[str] = []
            try:
                wrong = _compare(machine, shape, place, machine.dtype(dtype))
            except Exception as error:
                say(traceback.format_exc())
                wrong = [f"{type(error).__name__}: {error}"]
            say(f"{'BAD' if wrong else 'ok '} graph {dtype} {shape} {place} {wrong or ''}")
            records.add(
                dtype=dtype, shape=shape, place=place, checks=1, failed=int(bool(wrong)),
                failures=wrong,
            )  # fmt: skip
            if not machine.alive():
                return
