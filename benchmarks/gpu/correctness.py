"""Every function against the oracle: results, running statistics, and the memory around them.

Expected values and tolerances are those of the tests (nbnorm.reference, tests/tolerances.py).
Results go into memory full of NaN, with a margin that must stay so.
"""

import math
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import nbnorm
from benchmarks.gpu.bounds import T
from benchmarks.gpu.cases import CASES, Case, Given, draw, kinds_of
from benchmarks.gpu.machine import Array, Machine, Poisoned, Unavailable, same_bits
from benchmarks.gpu.records import Records, say
from nbnorm import reference

MOMENTUM = 0.3


class Verdict(NamedTuple):
    """What came of one comparison: the error in units of what is allowed."""

    name: str
    excess: float
    detail: str = ""


class Subject:
    """A case with its arguments on the device."""

    def __init__(self, machine: Machine, case: Case, given: Given) -> None:
        self.machine, self.case, self.given = machine, case, given
        self.x = machine.place(given.x, case.place)
        self.residual = machine.place(given.residual, case.elsewhere)
        self.gamma, self.beta = machine.send(given.gamma), machine.send(given.beta)
        self.moments = reference.batch_norm_stats(given.x, axis=case.axis)
        ref = reference.batch_norm_forward(given.x, eps=given.eps, axis=case.axis)
        # What the backward and the halves are given: rounded to the float64 that they take.
        self.mean, self.rstd = (np.asarray(s).astype(np.float64) for s in (ref.mean, ref.rstd))
        self.device_mean, self.device_rstd = machine.send(self.mean), machine.send(self.rstd)

    def place(self, host: np.ndarray) -> Array:
        """Copy dy or y to the device."""
        return self.machine.place(host, self.case.elsewhere)

    def out(self) -> Poisoned:
        """Return memory for a result."""
        return self.machine.poisoned(self.given.x.shape, self.given.x.dtype, self.case.elsewhere)

    def running(self) -> tuple[Array, Array]:
        """Return fresh running statistics on the device."""
        send = self.machine.send
        return send(self.given.running_mean), send(self.given.running_var)

    def within(self, name: str, actual: Array, expected: Any, tolerance: Any) -> Verdict:
        """Compare a result with what is expected."""
        return compare(name, self.machine.fetch(actual), np.asarray(expected), tolerance)

    def clean(self, name: str, out: Poisoned) -> Verdict:
        """Whether nothing but the result was written."""
        spilled = out.spilled()
        return Verdict(f"{name}: memory around it", float(spilled), f"{spilled} values written")


def compare(name: str, actual: np.ndarray, expected: np.ndarray, tolerance: Any) -> Verdict:
    if actual.shape != expected.shape:
        return Verdict(name, math.inf, f"shape {actual.shape}, not {expected.shape}")
    actual = actual.astype(np.float64 if actual.itemsize == 2 else np.longdouble)
    with np.errstate(all="ignore"):
        error = np.abs(actual - expected.astype(np.longdouble))
        ratio = np.where(error == 0, 0, error / np.broadcast_to(tolerance, error.shape))
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))  # Inf, NaN
    ratio = np.nan_to_num(np.where(same, 0, ratio), nan=np.inf)
    at = np.unravel_index(np.argmax(ratio), ratio.shape)
    far = int((ratio > 1).sum())
    place = tuple(int(i) for i in at)
    detail = f"{far} of {ratio.size} off, worst at {place}: {actual[at]} against {expected[at]}"
    return Verdict(name, float(ratio[at]), detail if far else "")


def holds(name: str, holds: bool, detail: str = "") -> Verdict:
    return Verdict(name, 0.0 if holds else math.inf, "" if holds else detail or "it is not so")


def check_stats(s: Subject) -> Iterator[Verdict]:
    moments = nbnorm.batch_norm_stats(s.x, axis=s.case.axis)
    dtype = s.given.x.dtype
    yield holds("stats: count", moments.count == s.moments.count)
    yield s.within("stats: mean", moments.mean, s.moments.mean, T.mean_tolerance(s.moments, dtype))
    yield s.within("stats: M2", moments.m2, s.moments.m2, T.m2_tolerance(s.moments, dtype))
    one, two = s.machine.send(s.given.running_mean), s.machine.send(s.given.running_var)
    if s.moments.count < 2 or s.given.eps == 0:
        return
    new = nbnorm.update_running_stats(one, two, moments, momentum=MOMENTUM, inplace=False)
    yield from _running(s, "update_running_stats", new)
    yield s.within("update_running_stats: old mean", one, s.given.running_mean, 0)


def check_forward(s: Subject) -> Iterator[Verdict]:
    g, axis = s.given, s.case.axis
    running = s.running() if s.moments.count > 1 and g.eps > 0 else (None, None)
    out = s.out()
    y, mean, rstd = nbnorm.batch_norm_forward(
        s.x, s.gamma, s.beta, *running, momentum=MOMENTUM, eps=g.eps, axis=axis, out=out.array
    )
    ref = reference.batch_norm_forward(g.x, g.gamma, g.beta, eps=g.eps, axis=axis)
    yield holds("forward: y is out", y is out.array)
    yield s.within("forward: mean", mean, ref.mean, T.mean_tolerance(s.moments, g.x.dtype))
    tolerance = T.rstd_tolerance(s.moments, ref.rstd, g.x.dtype)
    yield s.within("forward: rstd", rstd, ref.rstd, tolerance)
    tolerance = T.y_tolerance(g.x, g.gamma, g.beta, ref.mean, ref.rstd, axis=axis)
    yield s.within("forward: y", y, ref.y, tolerance)
    yield s.clean("forward: y", out)
    if running[0] is not None:
        yield from _running(s, "forward", running)


def _running(s: Subject, name: str, new: tuple[Array, Array]) -> Iterator[Verdict]:
    old = s.given.running_mean, s.given.running_var
    expected = reference.update_running_stats(*old, s.moments, momentum=MOMENTUM, inplace=False)
    allowed = T.running_tolerance(
        s.moments, *old, momentum=MOMENTUM, correction=1, dtype=s.given.x.dtype
    )
    names = "running_mean", "running_var"
    for what, got, want, tolerance in zip(names, new, expected, allowed, strict=True):
        tolerance = T.stored(tolerance, want, got.dtype)
        yield s.within(f"{name}: {what}", got, want, tolerance)


def check_forward_new(s: Subject) -> Iterator[Verdict]:
    """Into new memory, with residual and ReLU; without parameters; and by halves."""
    g, axis = s.given, s.case.axis
    y, mean, rstd = nbnorm.batch_norm_forward(
        s.x, s.gamma, s.beta, eps=g.eps, axis=axis, residual=s.residual, activation="relu"
    )
    ref = reference.batch_norm_forward(
        g.x, g.gamma, g.beta, eps=g.eps, axis=axis, residual=g.residual, activation="relu"
    )
    tolerance = T.y_tolerance(
        g.x, g.gamma, g.beta, ref.mean, ref.rstd, axis=axis, residual=g.residual
    )
    yield s.within("forward, residual, relu: y", y, ref.y, tolerance)
    applied = nbnorm.batch_norm_apply(
        s.x, s.gamma, s.beta, mean, rstd, axis=axis, residual=s.residual, activation="relu"
    )
    yield holds("apply has the forward's bits", same_bits(applied, y))
    bare = nbnorm.batch_norm_forward(s.x, eps=g.eps, axis=axis)
    ref = reference.batch_norm_forward(g.x, eps=g.eps, axis=axis)
    tolerance = T.y_tolerance(g.x, None, None, ref.mean, ref.rstd, axis=axis)
    yield s.within("forward, no parameters: y", bare.y, ref.y, tolerance)


def check_inplace(s: Subject) -> Iterator[Verdict]:
    g, axis = s.given, s.case.axis
    plain = nbnorm.batch_norm_forward(s.x, s.gamma, s.beta, eps=g.eps, axis=axis).y
    x = s.machine.place(g.x, s.case.place)
    y = nbnorm.batch_norm_forward(x, s.gamma, s.beta, eps=g.eps, axis=axis, out=x).y
    yield holds("forward in place has the same bits", y is x and same_bits(y, plain))
    dy = s.place(g.dy)
    arguments = s.x, s.gamma, s.device_mean, s.device_rstd
    plain = nbnorm.batch_norm_backward(dy, *arguments, axis=axis).dx
    dx = nbnorm.batch_norm_backward(dy, *arguments, axis=axis, out=dy).dx
    yield holds("backward in place has the same bits", dx is dy and same_bits(dx, plain))


def check_inference(s: Subject) -> Iterator[Verdict]:
    g, axis, eps = s.given, s.case.axis, 1e-5
    mean, var = g.running_mean, g.running_var
    if g.eps == 0 or np.abs(s.mean).max(initial=0) > 1e2:  # keep y at x's own scale
        mean, var = s.mean, np.asarray(s.moments.m2 / s.moments.count).astype(np.float64)
    out = s.out()
    y = nbnorm.batch_norm_inference(
        s.x, s.gamma, s.beta, s.machine.send(mean), s.machine.send(var),
        eps=eps, axis=axis, activation="relu", out=out.array,
    )  # fmt: skip
    ref = reference.batch_norm_inference(
        g.x, g.gamma, g.beta, mean, var, eps=eps, axis=axis, activation="relu"
    )
    rstd = 1 / np.sqrt(var.astype(np.float64) + eps)
    tolerance = T.y_tolerance(g.x, g.gamma, g.beta, mean, rstd, axis=axis)
    yield s.within("inference, relu: y", y, ref, tolerance)
    yield s.clean("inference: y", out)


def _gradients(s: Subject, name: str, got: Any, want: Any, dy: np.ndarray, training: bool = True):
    """Compare dx, dgamma, dbeta; `dy` has passed the ReLU."""
    g, axis = s.given, s.case.axis
    tolerance = T.dx_tolerance(dy, g.x, g.gamma, s.mean, s.rstd, axis=axis, training=training)
    yield s.within(f"{name}: dx", got.dx, want.dx, tolerance)
    allowed = T.sums_tolerance(dy, g.x, s.mean, s.rstd, axis=axis)
    for what, error in zip(("dbeta", "dgamma"), allowed, strict=True):
        expected = getattr(want, what)
        tolerance = T.stored(error, expected, g.gamma.dtype)
        yield s.within(f"{name}: {what}", getattr(got, what), expected, tolerance)


def check_backward(s: Subject) -> Iterator[Verdict]:
    g, axis = s.given, s.case.axis
    dy = s.place(g.dy)
    for training in (True, False):
        name = "backward" if training else "backward, frozen"
        out = s.out()
        got = nbnorm.batch_norm_backward(
            dy, s.x, s.gamma, s.device_mean, s.device_rstd,
            training=training, axis=axis, out=out.array,
        )  # fmt: skip
        want = reference.batch_norm_backward(
            g.dy, g.x, g.gamma, s.mean, s.rstd, training=training, axis=axis
        )
        yield from _gradients(s, name, got, want, g.dy, training)
        yield s.clean(f"{name}: dx", out)


def check_backward_relu(s: Subject) -> Iterator[Verdict]:
    """With the mask recomputed: dy is 0 where rounding may decide which side of 0 a value is on."""
    g, axis = s.given, s.case.axis
    before = reference.batch_norm_apply(g.x, g.gamma, g.beta, s.mean, s.rstd, axis=axis)
    tolerance = T.y_tolerance(g.x, g.gamma, g.beta, s.mean, s.rstd, axis=axis)
    dy = np.array(g.dy)
    dy[np.abs(before) <= 4 * tolerance] = 0
    masked = np.where(before > 0, dy, np.zeros_like(dy))
    device_dy, common = s.place(dy), {"axis": axis, "activation": "relu"}
    arguments = s.x, s.gamma, s.device_mean, s.device_rstd
    got = nbnorm.batch_norm_backward(device_dy, *arguments, beta=s.beta, **common)
    want = reference.batch_norm_backward(dy, g.x, g.gamma, s.mean, s.rstd, beta=g.beta, **common)
    yield from _gradients(s, "backward, relu", got, want, masked)
    sums = nbnorm.batch_norm_backward_reduce(
        device_dy, s.x, s.device_mean, s.device_rstd, gamma=s.gamma, beta=s.beta, **common
    )
    dx = nbnorm.batch_norm_backward_apply(
        device_dy, *arguments, *sums, s.moments.count, beta=s.beta, **common
    )
    yield holds("backward by halves has the same bits", same_bits(dx, got.dx))


def check_backward_residual(s: Subject) -> Iterator[Verdict]:
    """With the mask from y; and one result at a time."""
    g, axis = s.given, s.case.axis
    y = nbnorm.batch_norm_forward(
        s.x, s.gamma, s.beta, eps=g.eps, axis=axis, residual=s.residual, activation="relu"
    ).y
    host_y = s.machine.fetch(y)
    dy, y = s.place(g.dy), s.place(host_y)
    arguments = dy, s.x, s.gamma, s.device_mean, s.device_rstd
    common = {"axis": axis, "activation": "relu"}
    got = nbnorm.batch_norm_backward(*arguments, y=y, **common)
    want = reference.batch_norm_backward(g.dy, g.x, g.gamma, s.mean, s.rstd, y=host_y, **common)
    masked = np.where(host_y > 0, g.dy, np.zeros_like(g.dy))
    yield from _gradients(s, "backward, residual", got, want, masked)
    yield s.within("backward, residual: dresidual", got.dresidual, want.dresidual, 0)
    for i, name in enumerate(("dx", "dgamma", "dbeta", "dresidual")):
        mask = tuple(j == i for j in range(4))
        only = nbnorm.batch_norm_backward(*arguments, y=y, output_mask=mask, **common)
        alone = all((result is None) != wanted for result, wanted in zip(only, mask, strict=True))
        same = alone and same_bits(only[i], got[i])
        yield holds(f"output_mask: {name} alone", same)


CHECKS: tuple[Callable[[Subject], Iterator[Verdict]], ...] = (
    check_stats, check_forward, check_forward_new, check_inplace, check_inference,
    check_backward, check_backward_relu, check_backward_residual,
)  # fmt: skip


def verdicts(machine: Machine, case: Case, given: Given) -> Iterator[Verdict]:
    """Run all checks of a case; an exception is the verdict of the check it came from."""
    subject = Subject(machine, case, given)
    for check in CHECKS:
        try:
            yield from check(subject)
        except Exception as error:
            yield Verdict(
                check.__name__, math.inf, f"{type(error).__name__}: {error}\n{_trace(error)}"
            )
            if not machine.alive():
                return


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)[-4:])


def run(
    machine: Machine, records: Records, dtype: str, seed: int, seconds: float, skip: int
) -> int | None:
    """Check all cases from number `skip` on; the next number if the device no longer answers."""
    deadline = time.monotonic() + seconds
    try:
        machine.dtype(dtype)
    except Unavailable as reason:
        say(f"left out: {reason}")
        records.add(dtype=dtype, left_out=str(reason))
        return None
    say(f"{dtype}: {len(CASES)} cases, seed {seed}")
    for number, case in enumerate(CASES[skip:], skip):
        if time.monotonic() > deadline:
            say(f"out of time: {len(CASES) - number} cases were not run")
            records.add(dtype=dtype, not_run=len(CASES) - number)
            break
        for kind in kinds_of(case, dtype):
            _check(machine, records, case, number, dtype, kind, seed)
            if not machine.alive():
                say("the device no longer answers: on with the next case in a new process")
                return number + 1
    return None


def _check(
    machine: Machine, records: Records, case: Case, number: int, dtype: str, kind: str, seed: int
) -> None:
    begin = time.monotonic()
    rng = np.random.default_rng([seed, number])
    try:
        parameters = None if case.parameters == "float32" else machine.dtype(case.parameters)
        given = draw(case, dtype, kind, rng, parameters)
        found = list(verdicts(machine, case, given))
    except Unavailable as reason:
        records.add(dtype=dtype, case=case.label, left_out=str(reason))
        return
    except Exception as error:
        found = [Verdict("setup", math.inf, f"{error}\n{_trace(error)}")]
    bad = [verdict for verdict in found if not verdict.excess <= 1]
    worst = max(found, key=lambda verdict: verdict.excess)
    seconds = time.monotonic() - begin
    say(
        f"{'BAD' if bad else 'ok '} {dtype} {kind:8} {case.label}: {len(found)} checks, "
        f"worst {worst.excess:.2g} of what is allowed ({worst.name}), {seconds:.1f} s"
    )
    for verdict in bad:
        say(f"    {verdict.name}: {verdict.excess:.3g}; {verdict.detail}")
    records.add(
        dtype=dtype, case=case.label, kind=kind, seed=[seed, number], checks=len(found),
        failed=len(bad), worst=worst.excess, worst_name=worst.name, seconds=round(seconds, 2),
        failures=[verdict._asdict() for verdict in bad[:20]],
    )  # fmt: skip
