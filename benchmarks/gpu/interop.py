"""torch's tensors on a GPU in and out, on torch's streams; and what is refused."""

import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import nbnorm
from benchmarks.gpu.bounds import T
from benchmarks.gpu.cases import Case, Given, draw
from benchmarks.gpu.correctness import Verdict, compare, holds
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.records import Records, say
from nbnorm import reference

SHAPES = (Case((8, 16, 14, 14)), Case((4, 8, 20, 20)), Case((60, 96)))


class Tensors:
    """The arguments as torch's tensors."""

    def __init__(self, torch: Any, given: Given, device: str, last: bool) -> None:
        self.torch, self.given, self.device = torch, given, device
        self.last = last
        self.x, self.dy, self.residual = (self.of(a) for a in given[:3])
        if last:
            layout = {"memory_format": torch.channels_last}
            self.x, self.dy, self.residual = (
                t.contiguous(**layout) for t in (self.x, self.dy, self.residual)
            )
        self.gamma, self.beta, self.running_mean, self.running_var = (
            self.of(a) for a in given[3:7]
        )

    def of(self, array: np.ndarray) -> Any:
        """Copy an array to the device."""
        torch, array = self.torch, array.copy()  # on the CPU it would be the same memory
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).to(self.device).view(torch.bfloat16)
        return torch.from_numpy(array).to(self.device)

    def fetch(self, tensor: Any) -> np.ndarray:
        """Copy a tensor to NumPy, by way of float64."""
        return tensor.detach().double().cpu().numpy()


def check_step(t: Tensors) -> Iterator[Verdict]:
    """Forward and backward; what comes back, and its values."""
    g, torch = t.given, t.torch
    y, mean, rstd = nbnorm.batch_norm_forward(
        t.x, t.gamma, t.beta, t.running_mean, t.running_var, eps=g.eps
    )
    got = nbnorm.batch_norm_backward(t.dy, t.x, t.gamma, mean, rstd)
    for name, result in {"y": y, "mean": mean, "rstd": rstd, "dx": got.dx}.items():
        kind = t.x.dtype if name in ("y", "dx") else torch.float64
        good = isinstance(result, torch.Tensor) and result.device == t.x.device
        yield holds(
            f"{name} is a tensor of {kind}", good and result.dtype == kind, repr(result)[:99]
        )
    yield holds("y has x's order in memory", y.stride() == t.x.stride(), str(y.stride()))
    ref = reference.batch_norm_forward(g.x, g.gamma, g.beta, eps=g.eps)
    stats = [np.asarray(s).astype(np.float64) for s in (ref.mean, ref.rstd)]
    tolerance = T.y_tolerance(g.x, g.gamma, g.beta, ref.mean, ref.rstd, axis=1)
    yield compare("y", t.fetch(y), ref.y, tolerance)
    want = reference.batch_norm_backward(g.dy, g.x, g.gamma, *stats)
    # The statistics are ours, and off by as much again.
    tolerance = 2 * T.dx_tolerance(g.dy, g.x, g.gamma, *stats, axis=1)
    yield compare("dx", t.fetch(got.dx), want.dx, tolerance)
    running = g.running_mean.copy(), g.running_var.copy()
    allowed = T.running_tolerance(
        reference.batch_norm_stats(g.x), *running, momentum=0.1, correction=1, dtype=g.x.dtype
    )
    reference.batch_norm_forward(g.x, None, None, *running, eps=g.eps)
    for name, expected, tolerance in zip(("running_mean", "running_var"), running, allowed,
                                         strict=True):  # fmt: skip
        updated = t.fetch(getattr(t, name))
        unit = T.one_unit(expected, expected.dtype)
        yield compare(f"{name}, in place", updated, expected.astype(np.float64), tolerance + unit)


def check_out(t: Tensors) -> Iterator[Verdict]:
    out = t.torch.full_like(t.x, float("nan"))
    y = nbnorm.batch_norm_forward(t.x, t.gamma, t.beta, out=out).y
    fresh = nbnorm.batch_norm_forward(t.x, t.gamma, t.beta).y
    yield holds("out is written and returned", y is out and bool((out == fresh).all()))


def check_stream(t: Tensors) -> Iterator[Verdict]:
    """On a stream of torch's own, behind work that takes a while, and without waiting."""
    torch = t.torch
    if t.device == "cpu":
        return
    expected = nbnorm.batch_norm_forward(t.x, t.gamma, t.beta).y
    torch.cuda.synchronize()
    busy = torch.ones(4096, 4096, device=t.device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    wrong = 0
    with torch.cuda.stream(stream):
        for _ in range(5):
            x = torch.full_like(t.x, float("nan"))
            for _ in range(3):
                busy @ busy
            x.copy_(t.x)
            y = nbnorm.batch_norm_forward(x, t.gamma, t.beta).y
            x.fill_(float("nan"))
            wrong += int((y.clone() != expected).sum())  # .sum() on the same stream
    torch.cuda.synchronize()
    yield holds("on a stream of torch's own", wrong == 0, f"{wrong} values differ")


def check_refusals(t: Tensors) -> Iterator[Verdict]:
    x = t.x.detach().clone().requires_grad_()
    yield _refused("x that requires grad", TypeError, lambda: nbnorm.batch_norm_forward(x))
    if t.device == "cpu":
        return
    there = t.gamma.cpu(), t.beta.cpu()
    for name, gamma in {"a torch": there[0], "a NumPy": there[0].float().numpy()}.items():
        yield _refused(
            f"gamma, {name} array on the CPU", ValueError,
            lambda gamma=gamma: nbnorm.batch_norm_forward(t.x, gamma),
        )  # fmt: skip


def _refused(name: str, error: type[Exception], call: Callable[[], Any]) -> Verdict:
    try:
        call()
    except error:
        return holds(f"refused: {name}", True)
    except Exception as other:
        return holds(f"refused: {name}", False, f"{type(other).__name__}: {other}")
    return holds(f"refused: {name}", False, "it was taken")


CHECKS = (check_step, check_out, check_stream, check_refusals)


def run(machine: Machine, records: Records, seed: int, seconds: float) -> None:
    """Check some shapes, layouts and dtypes."""
    try:
        import torch
    except ImportError as reason:
        say(f"left out: {reason}")
        records.add(left_out=str(reason))
        return
    device = "cpu" if machine.dry else "cuda"
    if not machine.dry and not torch.cuda.is_available():
        say("left out: torch sees no GPU")
        records.add(left_out="torch sees no GPU")
        return
    deadline = time.monotonic() + seconds
    for dtype in ("float32", "float16", "bfloat16", "float64"):
        for case in SHAPES:
            for last in (False, True) if len(case.shape) == 4 else (False,):
                if time.monotonic() > deadline:
                    records.add(not_run=1)
                    return
                _check(machine, records, torch, case, dtype, seed, device, last)


def _check(
    machine: Machine, records: Records, torch: Any, case: Case, dtype: str, seed: int,
    device: str, last: bool,
) -> None:  # fmt: skip
    found: list[Verdict] = []
    for check in CHECKS:
        try:
            machine.dtype(dtype)
            given = draw(case, dtype, "normal", np.random.default_rng(seed))
            found += check(Tensors(torch, given, device, last))
        except Exception as error:
            say(traceback.format_exc())
            found.append(Verdict(check.__name__, np.inf, f"{type(error).__name__}: {error}"))
    bad = [verdict for verdict in found if not verdict.excess <= 1]
    layout = "channels-last" if last else "C"
    say(f"{'BAD' if bad else 'ok '} torch {dtype} {case.shape} {layout}: {len(found)} checks")
    for verdict in bad:
        say(f"    {verdict.name}: {verdict.excess:.3g}; {verdict.detail}")
    records.add(
        dtype=dtype, shape=case.shape, place=layout, checks=len(found), failed=len(bad),
        failures=[verdict._asdict() for verdict in bad],
    )  # fmt: skip
