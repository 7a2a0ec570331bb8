"""Measurements as JSON: rows, and a run of rows with its conditions and command."""

import json
import os
import platform
import shlex
import textwrap
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite.binding
import numba

import nbnorm
from benchmarks.floor import FLOORS
from benchmarks.peers import PEERS
from benchmarks.shapes import Shape
from benchmarks.timing import Times


class Row(NamedTuple):
    """Times of one op at one shape, and its floor in seconds."""

    op: str
    dtype: str
    shape: Shape
    floor: float
    times: dict[str, Times]

    def ratio(self, name: str, to: str) -> float:
        """Return the least time of a peer divided by that of `to`."""
        return self.times[name].least / self.times[to].least

    def rounded(self) -> "Row":
        """Return the row with figures rounded to four digits, as the clock is no more exact."""
        times = {name: Times(*map(_four_digits, pair)) for name, pair in self.times.items()}
        return self._replace(floor=_four_digits(self.floor), times=times)


class Run(NamedTuple):
    """Rows measured under the same conditions; `left_out` says why peers are missing."""

    conditions: dict[str, Any]
    commands: list[str]
    left_out: dict[str, str]
    rows: list[Row]

    def write(self, path: Path) -> None:
        """Write JSON, one row per line."""
        rows = ",\n".join(json.dumps(row._asdict()) for row in self.rows)
        head = json.dumps(self._replace(rows=[])._asdict(), indent=1)
        path.write_text(head.removesuffix("[]\n}") + f"[\n{rows}\n]\n}}\n")

    def with_least_floors(self) -> "Run":
        """Return the run with one floor per shape and dtype for all ops: the fastest sweep."""
        least: dict[tuple[str, Shape], float] = {}
        for row in self.rows:
            sweep = row.floor / FLOORS[row.op]
            least[row.dtype, row.shape] = min(sweep, least.get((row.dtype, row.shape), sweep))
        rows = [
            row._replace(floor=FLOORS[row.op] * least[row.dtype, row.shape]).rounded()
            for row in self.rows
        ]
        return self._replace(rows=rows)

    @classmethod
    def read(cls, *paths: Path) -> "Run":
        """Read files that `write` wrote, all on the same machine and day with the same versions."""
        first, *others = (cls(**json.loads(path.read_text())) for path in paths)
        commands, left_out, rows = list(first.commands), dict(first.left_out), list(first.rows)
        for other in others:
            if other.conditions != first.conditions:
                raise ValueError("the files were measured under different conditions")
            commands += other.commands
            left_out |= other.left_out
            rows += other.rows
        return cls(first.conditions, commands, left_out, [_row(**row) for row in rows])


def _four_digits(value: float) -> float:
    return float(f"{value:.4g}")


def _row(*, shape: list[int], times: dict[str, list[float]], **rest: Any) -> Row:
    return Row(
        shape=tuple(shape), times={name: Times(*pair) for name, pair in times.items()}, **rest
    )


def conditions(*libraries: str) -> dict[str, Any]:
    """Return machine, date and versions of these libraries, by default of Numba and all peers."""
    libraries = libraries or ("numba", *dict.fromkeys(peer.library for peer in PEERS.values()))
    return {
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "threads": numba.get_num_threads(),
        "system": platform.system(),
        "versions": {"Python": platform.python_version(), "nbnorm": nbnorm.__version__}
        | {name: version(name) for name in libraries if find_spec(name)},
        "date": date.today().isoformat(),
    }


def command_of(program: str, arguments: list[str]) -> str:
    return shlex.join(["python", f"benchmarks/{program}", *arguments])


def describe(conditions: dict[str, Any]) -> str:
    """Return the conditions as a sentence, in lines of at most 100 characters."""
    versions = ", ".join(f"{name} {number}" for name, number in conditions["versions"].items())
    sentence = (
        f"{conditions['cpu']}, {conditions['cpus']} CPUs, threads used: {conditions['threads']}; "
        f"{conditions['system']}, {versions}; {conditions['date']}."
    )
    return textwrap.fill(sentence, 100, break_on_hyphens=False)


def _cpu() -> str:
    """Return the processor's name, followed by LLVM's name for it in brackets."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = text.partition("model name")[2].partition(":")[2].partition("\n")[0].strip()
    except OSError:
        name = platform.processor()
    return f"{name or platform.machine()} ({llvmlite.binding.get_host_cpu_name()})"
