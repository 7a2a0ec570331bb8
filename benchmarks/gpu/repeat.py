"""The same bits every time, from every way of asking; NaN stays in its channel."""

import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import nbnorm
from benchmarks.gpu.large import EPS, random, seed_with
from benchmarks.gpu.machine import Array, Machine, Unavailable, bits, same_bits
from benchmarks.gpu.peers import reading_twice
from benchmarks.gpu.records import Records, say

REPEATS = 3
SHAPES: tuple[tuple[tuple[int, ...], str], ...] = (
    ((32, 256, 56, 56), "C"), ((32, 256, 56, 56), "channels-last"), ((32, 2048, 7, 7), "C"),
    ((32, 512, 14, 14), "C"), ((16, 3, 512, 512), "C"), ((16, 3, 512, 512), "channels-last"),
    # On sm_90 clusters that keep two and three chunks a block, by rows, and one by columns.
    ((256, 512, 28, 28), "C"), ((32, 64, 112, 112), "C"), ((256, 512, 14, 14), "C"),
    ((5, 7, 31, 33), "C"), ((60, 100), "C"), ((100_000, 5), "C"), ((2, 8, 4, 4), "C"),
)  # fmt: skip


class Step:
    """Training steps of BN, BN + ReLU and BN + residual + ReLU, and an inference."""

    def __init__(self, machine: Machine, shape: tuple[int, ...], place: str, dtype: Any) -> None:
        self.machine, self.shape, C = machine, shape, shape[1]
        self.x = random(machine, shape, dtype, place, offset=3.0)
        self.dy = random(machine, shape, dtype, place, backwards=True)
        self.residual = random(machine, shape, dtype, place, backwards=True)
        wide = np.float64 if dtype == np.float64 else np.float32
        self.gamma = machine.send(np.linspace(0.5, 1.5, C).astype(wide))
        self.beta = machine.send(np.linspace(-0.5, 0.5, C).astype(wide))

    def __call__(self, x: Array | None = None) -> dict[str, Array]:
        """Return all results, of new memory."""
        x = self.x if x is None else x
        running = [self.machine.send(np.ones(self.shape[1], np.float32)) for _ in range(2)]
        results = dict(zip(("running_mean", "running_var"), running, strict=True))
        for kind, activation, residual in (
            ("", None, None), (" relu", "relu", None), (" add relu", "relu", self.residual),
        ):  # fmt: skip
            forward = nbnorm.batch_norm_forward(
                x, self.gamma, self.beta, *(running if residual is not None else ()),
                eps=EPS, residual=residual, activation=activation,
            )  # fmt: skip
            gradients = nbnorm.batch_norm_backward(
                self.dy, x, self.gamma, forward.mean, forward.rstd, beta=self.beta,
                y=None if residual is None else forward.y, activation=activation,
            )  # fmt: skip
            for name, array in {**forward._asdict(), **gradients._asdict()}.items():
                if array is not None:
                    results[name + kind] = array
        frozen = nbnorm.batch_norm_inference(x, self.gamma, self.beta, *running, eps=EPS)
        return results | {"inference": frozen}


def _differing(a: dict[str, Array], b: dict[str, Array]) -> list[str]:
    return [name for name in a if not same_bits(a[name], b[name])]


def check_repeats(step: Step) -> Iterator[tuple[str, list[str]]]:
    """Again and again, with other values in the memory that scratch space is taken from."""
    first = step()
    for i in range(1, REPEATS):
        scratch = step.machine.xp.full(1 << 22, np.nan)
        del scratch
        yield f"repeat {i}", _differing(first, step())


def check_out(step: Step) -> Iterator[tuple[str, list[str]]]:
    """Into memory at hand."""
    fresh = nbnorm.batch_norm_forward(step.x, step.gamma, step.beta, eps=EPS)
    out = step.machine.xp.empty_like(step.x)
    bits(out)[...] = -1
    nbnorm.batch_norm_forward(step.x, step.gamma, step.beta, eps=EPS, out=out)
    yield "out", [] if same_bits(out, fresh.y) else ["y"]


def check_reading_twice(step: Step) -> Iterator[tuple[str, list[str]]]:
    """What is kept in shared memory gives the bits of what is read again; in place too."""
    with reading_twice():
        twice = step()
    yield "reading twice", _differing(twice, step())
    y, dx = step.machine.copied(step.x), step.machine.copied(step.dy)
    _, mean, rstd = nbnorm.batch_norm_forward(y, step.gamma, step.beta, eps=EPS, out=y)
    nbnorm.batch_norm_backward(dx, step.x, step.gamma, mean, rstd, out=dx)
    yield "in place", _differing({"y": y, "dx": dx}, twice)


def check_nan(step: Step) -> Iterator[tuple[str, list[str]]]:
    """NaN and Inf in one channel change no bit of another."""
    clean, x = step(), step.machine.copied(step.x)
    c = step.shape[1] // 2
    where = step.machine.xp.empty(step.shape, bool)
    where[...] = True
    where[:, c] = False
    bits(x)[0, c] = -1
    dirty = step(x)
    wrong = []
    for name, got in dirty.items():
        others = where if got.ndim > 1 else step.machine.xp.arange(step.shape[1]) != c
        if not bool((bits(got)[others] == bits(clean[name])[others]).all()):
            wrong.append(name)
    if not bool(step.machine.xp.isnan(step.machine.wide(dirty["y"][:, c])).all()):
        wrong.append("y of the channel itself, which is not NaN")
    yield "NaN in another channel", wrong


CHECKS: tuple[Callable[[Step], Iterator[tuple[str, list[str]]]], ...] = (
    check_repeats, check_out, check_reading_twice, check_nan,
)  # fmt: skip


def run(machine: Machine, records: Records, seed: int, seconds: float) -> None:
    """Check all shapes and dtypes."""
    deadline = time.monotonic() + seconds
    seed_with(seed)
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        try:
            kind = machine.dtype(dtype)
        except Unavailable as reason:
            records.add(dtype=dtype, left_out=str(reason))
            continue
        for shape, place in SHAPES:
            if time.monotonic() > deadline or not machine.alive():
                say("out of time, or the device no longer answers")
                records.add(dtype=dtype, not_run=1)
                return
            if machine.dry and np.prod(shape) > 1e6:
                shape = (4, 6, *shape[2:])
            _check(machine, records, shape, place, kind)
            machine.tidy()


def _check(
    machine: Machine, records: Records, shape: tuple[int, ...], place: str, dtype: Any
) -> None:
    failures: list[Any] = []
    number = 0
    try:
        step = Step(machine, shape, place, dtype)
        for check in CHECKS:
            for name, wrong in check(step):
                number += 1
                failures += [[name, *wrong]] if wrong else []
    except Exception as error:
        number += 1
        failures.append([f"{type(error).__name__}: {error}"])
        say(traceback.format_exc())
    say(f"{'BAD' if failures else 'ok '} {dtype.name} {shape} {place} {failures or ''}")
    records.add(
        dtype=dtype.name, shape=shape, place=place, checks=number, failed=len(failures),
        failures=failures,
    )  # fmt: skip
