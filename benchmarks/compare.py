"""nbnorm next to its peers, each checked against the oracle and then timed in turns.

    python benchmarks/compare.py                                  # everything, some minutes
    python benchmarks/compare.py --quick
    python benchmarks/compare.py --shapes 32x256x56x56 60x100 --op forward --markdown table.md

Machines are shared and noisy, so a time alone says little: all calls of a row alternate in one
process, with the same number of threads, and are given as ratios to one another and to the floor
(floor.py). A ratio is the peer's least time over that of nbnorm on the same layout, writing into
memory at hand where the peer does, into new memory where the peer does.
"""

import argparse
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a program: make this folder's package and nbnorm importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import llvmlite.binding
import numba
import numpy as np

import nbnorm
from benchmarks.floor import sweeps
from benchmarks.peers import EPS, LEFT_OUT, PEERS, Batch, Call
from benchmarks.shapes import QUICK, RESNET50, SHAPES, Shape, name_of, shape_of
from nbnorm import reference

# Tensors read and written, in units of the floor's two.
FLOORS = {"forward": 1.0, "backward": 1.5, "inference": 1.0}
TURN = 1e-3  # seconds that one turn of one peer lasts at least
SAMPLE = 1e-4  # seconds that a sample of it lasts at least
# Seconds between turns. Two libraries have two pools of threads, and an idle OpenMP thread keeps
# its core busy for a while before it sleeps: without a pause the next peer pays for it.
PAUSE = 0.03


class Times(NamedTuple):
    """Of one call, in seconds."""

    least: float
    median: float


class Row(NamedTuple):
    """What was measured at one shape; the floor in seconds."""

    shape: Shape
    floor: float
    times: dict[str, Times]

    def ratio(self, name: str, to: str) -> float:
        """How many times as long as `to` the peer took."""
        return self.times[name].least / self.times[to].least


def is_ours(name: str) -> bool:
    return name.startswith("nbnorm")


def ours_for(name: str) -> str:
    """Return nbnorm's name with the peer's layout and use of memory."""
    last, reuse = PEERS[name].last, PEERS[name].reuse
    return next(n for n, p in PEERS.items() if is_ours(n) and (p.last, p.reuse) == (last, reuse))


def measure(op: str, shape: Shape, dtype: str, rounds: int) -> Row:
    """Check and time all peers at one shape."""
    layouts = (False, True) if len(shape) > 2 else (False,)
    batches = {last: Batch(shape, dtype, last=last) for last in layouts}
    calls: dict[str, Call] = {}
    for name, peer in PEERS.items():
        if peer.last in batches:
            batch = batches[peer.last]
            calls[name] = getattr(peer, op)(batch)
            check(name, op, batch, calls[name]())
    floors = sweeps(batches[False].x, batches[False].out)
    times = alternate(calls | floors, rounds)
    floor = FLOORS[op] * min(times[name].least for name in floors)
    return Row(shape, floor, {name: times[name] for name in calls})


def check(name: str, op: str, b: Batch, result: Any) -> None:
    """Raise AssertionError where a peer's result is not batch normalization.

    The first and the last channel are compared with the oracle, to a thousandth, others' to a
    hundredth: PyTorch channels-last loses 4e-3 at 16x3x512x512.
    """
    some = [0, -1]
    x, gamma, beta = b.x[:, some], b.gamma[some], b.beta[some]
    if op == "inference":
        mean, var = b.running_mean[some], b.running_var[some]
        expected = [reference.batch_norm_inference(x, gamma, beta, mean, var, eps=EPS)]
    else:
        y, mean, rstd = reference.batch_norm_forward(x, gamma, beta, eps=EPS)
        expected = [y]
    if op == "backward":
        dy = b.dy[:, some]
        expected = list(reference.batch_norm_backward(dy, x, gamma, mean, rstd)[:3])
    else:
        result = [result]
    for array, ref in zip(result, expected, strict=True):
        got = np.asarray(array)[..., some] if ref.ndim == 1 else np.asarray(array)[:, some]
        # dgamma and dbeta are sums of m terms of either sign.
        scale = math.sqrt(b.x[:, 0].size) if ref.ndim == 1 else 1.0
        error = np.abs(got - ref).max()
        if not error < (1e-3 if is_ours(name) else 1e-2) * scale:
            raise AssertionError(f"{name} {op} at {b.x.shape} is off by {error}")


def alternate(calls: dict[str, Call], rounds: int) -> dict[str, Times]:
    """Time calls in turns, at least `rounds` of them and for half a second."""
    repeats = {name: math.ceil(SAMPLE / turn(call, 1)[0]) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    begin, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - begin < 0.5:
        for name, call in calls.items():
            samples[name] += turn(call, repeats[name])
        done += 1
    return {name: Times(min(all_), statistics.median(all_)) for name, all_ in samples.items()}


def turn(call: Call, repeats: int) -> list[float]:
    """Pause, wake the threads with a call that does not count, and time the next.

    A sample is the mean of so many calls. There are several, as a thread that woke up on a busy
    core is moved to another only after some milliseconds.
    """
    time.sleep(PAUSE)
    call()
    samples: list[float] = []
    while sum(samples) * repeats < TURN:
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        samples.append((time.perf_counter() - begin) / repeats)
    return samples


def table_of(rows: list[Row]) -> str:
    """One row a shape, one column a peer; `LEGEND` says what a cell holds."""
    lines = [["shape", "floor", *PEERS]]
    for row in rows:
        cells = dict.fromkeys(PEERS, "-")
        for name, (least, median) in row.times.items():
            cells[name] = f"{1e3 * least:.3f} {1e3 * median:.3f} " + (
                f"{least / row.floor:.2f} fl"
                if is_ours(name)
                else f"{row.ratio(name, ours_for(name)):.2f}x"
            )
        lines.append([name_of(row.shape), f"{1e3 * row.floor:.4f}", *cells.values()])
    return markdown(lines)


def summary_of(rows: list[Row]) -> str:
    """Geometric means and worst cases over the shapes; all batch norms of ResNet-50 added up."""
    ours = [name for name in PEERS if is_ours(name)]
    others = [name for name in PEERS if not is_ours(name)]
    lines = [["", "geometric mean", "worst", "at"]]

    def add(
        label: str, name: str, value: Callable[[Row], float], worst: Callable[..., Row]
    ) -> None:
        measured = [row for row in rows if name in row.times]
        if measured:
            row, mean = worst(measured, key=value), statistics.geometric_mean(map(value, measured))
            lines.append([label, f"{mean:.2f}", f"{value(row):.2f}", name_of(row.shape)])

    for name in ours:
        add(f"{name}, floors", name, lambda row, n=name: row.times[n].least / row.floor, max)
    for name in others:
        us = ours_for(name)
        add(f"{name} / {us}", name, lambda row, n=name, us=us: row.ratio(n, us), min)
    for name in ours:
        add(
            f"best of all peers / {name}",
            name,
            lambda row, us=name: min(row.ratio(n, us) for n in others if n in row.times),
            min,
        )
    text = markdown(lines)
    resnet = [row for row in rows if row.shape in RESNET50]
    if len(resnet) == len(RESNET50):
        text += f"\nThe 53 batch norms of ResNet-50 at N = {resnet[0].shape[0]}, ms:"
        for name in PEERS:
            total = sum(RESNET50[row.shape].count * row.times[name].least for row in resnet)
            text += f" {name} {1e3 * total:.0f};"
        text = text.rstrip(";") + ".\n"
    return text


def markdown(lines: list[list[str]]) -> str:
    """Return a table, its columns aligned for reading as it is."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width for width in widths]
    return "".join(
        "| " + " | ".join(map(str.ljust, line, widths)) + " |\n"
        for line in [lines[0], rule, *lines[1:]]
    )


def conditions(program: str, arguments: list[str]) -> str:
    """Say what was run, where, when and with which versions."""
    names = ["numpy", "numba", "torch"]
    versions = ", ".join(f"{name} {version(name)}" for name in names if find_spec(name))
    left_out = f" Left out, not installed: {', '.join(LEFT_OUT)}." if LEFT_OUT else ""
    return (
        f"{cpu_model()}, {os.cpu_count()} CPUs, threads used: {numba.get_num_threads()}; "
        f"{platform.system()}, Python {platform.python_version()}, nbnorm {nbnorm.__version__}, "
        f"{versions}; {date.today().isoformat()}.{left_out}\n\n"
        f"    {shlex.join(['python', f'benchmarks/{program}', *arguments])}\n"
    )


def cpu_model() -> str:
    """Return the processor's name and what the compiler takes it for."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = text.partition("model name")[2].partition(":")[2].partition("\n")[0].strip()
    except OSError:
        name = platform.processor()
    return f"{name or platform.machine()} ({llvmlite.binding.get_host_cpu_name()})"


LEGEND = """\
A cell: milliseconds, least and median; then, for nbnorm, how many floors that is, and for a peer
how many times nbnorm's time it took, nbnorm on the same layout and like it writing into memory at
hand (nbnorm, PyTorch) or into a new output (NumPy, F.batch_norm). Floor: the fastest sweep that
reads x and writes y; backward, which reads one more tensor, has one and a half.
"""


def main() -> None:
    """Measure what the command line asks for, print it and write it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few small shapes, few rounds")
    parser.add_argument("--shapes", nargs="+", type=shape_of, metavar="NAME", help="32x256x56x56")
    parser.add_argument("--op", nargs="+", choices=FLOORS, default=list(FLOORS))
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here too")
    arguments = parser.parse_args()
    shapes = arguments.shapes or (QUICK if arguments.quick else SHAPES)
    if find_spec("torch"):
        import torch

        torch.set_num_threads(numba.get_num_threads())

    parts = [f"{conditions('compare.py', sys.argv[1:])}\n{LEGEND}"]
    print(parts[0])
    for op in arguments.op:
        rows = []
        for shape in shapes:
            print(f"{op} {name_of(shape)}", file=sys.stderr)
            rows.append(measure(op, shape, arguments.dtype, rounds=3 if arguments.quick else 9))
        parts.append(f"## {op}, {arguments.dtype}\n\n{table_of(rows)}\n{summary_of(rows)}")
        print(parts[-1])
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
