"""Large arrays against float64 arithmetic on the device; and offsets that 32 bits do not hold.

Tolerances are those of the tests: four units in the last place at the scale of the terms.
"""

import math
import time
import traceback
from typing import Any, NamedTuple

import numpy as np

import nbnorm
from benchmarks.gpu.bounds import T
from benchmarks.gpu.machine import Array, Machine, Unavailable, bits
from benchmarks.gpu.records import Records, say

EPS, MOMENTUM = 1e-5, 0.1
POOL = 4_194_301  # a prime: random numbers that are repeated are not in step with any shape

LARGE: tuple[tuple[tuple[int, ...], str, float], ...] = (  # shape, place, offset
    ((32, 256, 56, 56), "C", 0.0),
    ((32, 256, 56, 56), "channels-last", 0.0),
    ((32, 64, 112, 112), "C", 1e6),
    ((32, 64, 112, 112), "channels-last", 1e6),
    ((32, 2048, 7, 7), "C", 1e6),
    ((32, 1024, 14, 14), "C", 0.0),
    ((16, 3, 512, 512), "C", 0.0),
    ((16, 3, 512, 512), "channels-last", 0.0),
    ((7, 1, 1513, 1511), "C", 1e6),
    ((65_536, 200), "C", 0.0),
    ((300_000, 3), "C", 0.0),
    ((2, 40_000, 5, 5), "C", 0.0),
)
# More than 2^31 values: by rows, by columns. Of float16, the smallest.
HUGE: tuple[tuple[int, ...], ...] = ((4_100, 32, 128, 128), (131_100, 16_400))


def random(
    machine: Machine, shape: tuple[int, ...], dtype: Any, place: str = "C", *,
    offset: float = 0.0, backwards: bool = False,
) -> Array:  # fmt: skip
    """Return random numbers of N(offset, 1), drawn once and repeated on the device.

    `backwards` gives others than without.
    """
    drawn = _pool()[::-1] if backwards else _pool()
    pool = bits(machine.send((drawn + offset).astype(dtype)))
    size = math.prod(shape)
    out = machine.xp.empty(size, pool.dtype)
    for start in range(0, size, POOL):
        part = out[start : start + POOL]
        part[...] = pool[: part.size]
    out = out.view(dtype)
    if place == "C":
        return out.reshape(shape)
    N, C, *space = shape
    return out.reshape(N, *space, C).transpose(0, len(shape) - 1, *range(1, len(shape) - 1))


_seed = [0]
_drawn: list[np.ndarray] = []


def _pool() -> np.ndarray:
    if not _drawn:
        _drawn.append(np.random.default_rng(_seed[0]).normal(size=POOL))
    return _drawn[0]


def seed_with(seed: int) -> None:
    """Say what random numbers are drawn from."""
    _seed[0] = seed
    _drawn.clear()


class Expected(NamedTuple):
    """What a training step gives, in float64, and what is allowed of it, channel by channel."""

    values: dict[str, Array]
    tolerances: dict[str, np.ndarray]


def expected(machine: Machine, x: Array, dy: Array, gamma: Array, beta: Array) -> Expected:
    """Compute a training step in float64 on the device; parameters in float64."""
    xp = machine.xp
    over = tuple(a for a in range(x.ndim) if a != 1)
    m = x.size // x.shape[1]
    g, b = (p.reshape(-1, *[1] * (x.ndim - 2)) for p in (gamma, beta))
    xhat = machine.wide(x)
    mean = xhat.mean(over, keepdims=True)
    xhat -= mean
    rest = xhat.mean(over, keepdims=True)  # takes back the rounding of a long sum
    xhat -= rest
    m2 = (xhat * xhat).sum(over, keepdims=True)
    rstd = 1 / xp.sqrt(m2 / m + EPS)
    xhat *= rstd
    wide_dy = machine.wide(dy)
    sums = wide_dy.sum(over, keepdims=True), (wide_dy * xhat).sum(over, keepdims=True)
    values = {"mean": mean + rest, "rstd": rstd, "y": g * xhat + b}
    values["dx"] = g * rstd * (wide_dy - sums[0] / m - xhat * (sums[1] / m))
    values |= {"dbeta": sums[0], "dgamma": sums[1]}

    def most(array: Array) -> np.ndarray:
        return machine.fetch(xp.abs(array).max(over)).reshape(-1)

    def flat(array: Array) -> np.ndarray:
        return np.abs(machine.fetch(array).reshape(-1))

    y_scale = np.max([most(g * xhat), flat(b), most(values["y"])], axis=0)
    dx_scale = most(wide_dy) + flat(sums[0]) / m + most(xhat) * flat(sums[1]) / m
    absolute = [flat(xp.abs(t).sum(over)) for t in (wide_dy, wide_dy * xhat)]
    computed = T.computed(x.dtype)
    # The oracle itself rounds where x is float64.
    units = T.UNITS * (8 if x.dtype == np.float64 else 1)
    tolerances = {
        "y": units * T.one_unit(y_scale, x.dtype),
        "dx": units * T.one_unit(flat(g) * flat(rstd) * dx_scale, x.dtype),
        "dbeta": units * T.one_unit(absolute[0], computed),
        "dgamma": units * T.one_unit(absolute[1], computed),
        "mean": units * T.one_unit(1 / flat(rstd), computed)
        + T.one_unit(flat(values["mean"]), np.float64),
        "rstd": units * T.relative_unit(computed) * flat(rstd),
    }
    return Expected(values, tolerances)


def excess(machine: Machine, got: Array, want: Array, allowed: np.ndarray) -> float:
    """Return the greatest error in units of what is allowed; infinite for NaN."""
    xp = machine.xp
    error = xp.abs(machine.wide(got) - want.reshape(got.shape))
    error = xp.where(xp.isnan(error), np.inf, error)
    over = tuple(a for a in range(got.ndim) if a != (1 if got.ndim > 1 else 0))
    worst = machine.fetch(error.max(over) if over else error).reshape(-1)
    with np.errstate(all="ignore"):
        ratio = np.where(worst == 0, 0, worst / allowed.astype(np.float64))
    return float(np.nan_to_num(ratio, nan=np.inf).max())


def step(machine: Machine, shape: tuple[int, ...], dtype: Any, place: str, offset: float) -> Any:
    """Return inputs and results of a training step at a shape."""
    C, wide = shape[1], np.dtype("float64" if dtype == np.float64 else "float32")
    x = random(machine, shape, dtype, place, offset=offset)
    dy = random(machine, shape, dtype, place, backwards=True)
    gamma = machine.send((1 + 0.25 * _pool()[:C]).astype(wide))
    beta = machine.send(np.linspace(-1, 1, C).astype(wide))
    y, dx = machine.xp.empty_like(x), machine.xp.empty_like(x)
    for out in (y, dx):
        bits(out)[...] = -1
    y, mean, rstd = nbnorm.batch_norm_forward(x, gamma, beta, eps=EPS, out=y)
    got = nbnorm.batch_norm_backward(dy, x, gamma, mean, rstd, out=dx)
    results = {"mean": mean, "rstd": rstd, "y": y}
    results |= {"dx": got.dx, "dgamma": got.dgamma, "dbeta": got.dbeta}
    return (x, dy, gamma, beta), results


def _compare(
    machine: Machine, shape: tuple[int, ...], dtype: Any, place: str, offset: float
) -> dict[str, float]:
    (x, dy, gamma, beta), results = step(machine, shape, dtype, place, offset)
    oracle = expected(machine, x, dy, machine.wide(gamma), machine.wide(beta))
    found = {}
    for name, got in results.items():
        allowed = oracle.tolerances[name]
        if name in ("dgamma", "dbeta"):
            stored = machine.fetch(oracle.values[name]).reshape(-1)
            allowed = allowed + T.one_unit(stored, gamma.dtype)
        found[name] = excess(machine, got, oracle.values[name], allowed)
    return found


def _compare_huge(machine: Machine, shape: tuple[int, ...], dtype: Any) -> dict[str, float]:
    """Compare the first and the last channel."""
    (x, dy, gamma, beta), results = step(machine, shape, dtype, "C", 0.0)
    found: dict[str, float] = {}
    for c in (slice(0, 1), slice(shape[1] - 1, shape[1])):
        wide = machine.wide(gamma[c]), machine.wide(beta[c])
        oracle = expected(machine, machine.copied(x[:, c]), machine.copied(dy[:, c]), *wide)
        for name in ("mean", "rstd", "y", "dx"):
            got = results[name][:, c] if name in ("y", "dx") else results[name][c]
            one = excess(machine, got, oracle.values[name], oracle.tolerances[name])
            found[name] = max(found.get(name, 0.0), one)
    return found


def run(machine: Machine, records: Records, seed: int, seconds: float) -> None:
    """Check all large shapes in all dtypes, then the huge ones if there is memory for them."""
    deadline = time.monotonic() + seconds
    seed_with(seed)
    cases: list[Any] = [
        (shape, dtype, place, offset if dtype.startswith("float32") else min(offset, 10.0))
        for shape, place, offset in LARGE
        for dtype in ("float32", "bfloat16", "float16", "float64")
    ]
    if machine.dry:
        cases = [((4, 6, *shape[2:]), *rest) for shape, *rest in cases[:12]]
    cases[8:8] = [((20, 6) if machine.dry else shape, "float16", "huge", 0.0) for shape in HUGE]
    for number, (shape, dtype, place, offset) in enumerate(cases):
        if time.monotonic() > deadline:
            say(f"out of time: {len(cases) - number} were not run")
            records.add(not_run=len(cases) - number)
            return
        _check(machine, records, shape, dtype, place, offset)
        machine.tidy()
        if not machine.alive():
            say("the device no longer answers")
            records.add(not_run=len(cases) - number - 1)
            return


def _check(
    machine: Machine, records: Records, shape: Any, dtype: str, place: str, offset: float
) -> None:
    label = {"shape": shape, "dtype": dtype, "place": place, "offset": offset}
    begin = time.monotonic()
    try:
        kind = machine.dtype(dtype)
        if place == "huge":
            need = 5 * math.prod(shape) * kind.itemsize
            if machine.free_bytes() < need:
                raise Unavailable(f"needs {need >> 30} GiB of free memory")
            found = _compare_huge(machine, shape, kind)
        else:
            found = _compare(machine, shape, kind, place, offset)
    except Unavailable as reason:
        say(f"left out: {label}: {reason}")
        records.add(**label, left_out=str(reason))
        return
    except Exception as error:
        say(f"BAD {label}\n{traceback.format_exc()}")
        records.add(**label, checks=1, failed=1, error=f"{type(error).__name__}: {error}")
        return
    bad = {name: value for name, value in found.items() if not value <= 1}
    seconds = time.monotonic() - begin
    figures = " ".join(f"{name} {value:.2g}" for name, value in found.items())
    say(f"{'BAD' if bad else 'ok '} {dtype} {shape} {place} {offset:g}: {figures}, {seconds:.1f} s")
    records.add(**label, checks=len(found), failed=len(bad), found=found)
