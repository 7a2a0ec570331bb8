"""Tables of check.sh's results: python -m benchmarks.gpu.table FOLDER prints them.

With --docs a selection is written into docs/gpu.md. The exit status is 1 if a part failed or ran
out of time, or if no part ran.
"""

import argparse
import csv
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.records import COPY, FLOORS, OPS, OURS, OURS_LAST, TWICE, Record, others, read
from benchmarks.markdown import markdown
from benchmarks.shapes import RESNET50, name_of

DOCS = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"
BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
LEGEND = """\
Least microseconds by CUDA events, of calls that take turns; the second-level cache is flushed
before each call. *Share*: of a copy's bandwidth, counting the bytes that the op must move. *Host*:
microseconds until nbnorm's call returned. Peers' times are multiples of nbnorm's on the same
layout.
"""
_VERDICT = re.compile(r"^(.+?): (tests/\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED) +\[ *\d+%\]")
_KERNEL = re.compile(r"nbnorm4cuda\d+([a-z]+(?:\d+\w+?_3clocals_3e)?\d+[a-z_]+)B")


class Row(NamedTuple):
    """One op at one shape: least microseconds by peer, and nbnorm's on the host."""

    shape: tuple[int, ...]
    dtype: str
    op: str
    least: dict[str, float]
    host: float

    @property
    def best(self) -> float:
        """Time of the faster of nbnorm's two layouts."""
        return min(self.least[name] for name in (OURS, OURS_LAST) if name in self.least)

    @property
    def peer(self) -> float | None:
        """Time of the fastest peer, of any layout."""
        return min((self.least[name] for name in others(self.least)), default=None)

    def share(self, time: float) -> float:
        """Return the share of the copy's bandwidth, counting the bytes that the op must move."""
        return FLOORS[self.op] * self.least[COPY] / time


def rows_of(records: list[Record]) -> list[Row]:
    """Return the timed rows; a repeated row replaces an earlier one unless it has fewer peers."""
    found = {}
    for record in records:
        if record["what"] == "row":
            key = tuple(record["shape"]), record["dtype"], record["op"]
            least = {name: times[0] for name, times in record["times"].items()}
            more = len(least) >= len(found[key].least) if key in found else True
            if more:
                found[key] = Row(*key, least, record["times"][OURS][2])
    return list(found.values())


def environment(records: list[Record]) -> str:
    """Return a description of the environment."""
    for record in records:
        if record["what"] == "environment":
            return "; ".join(f"{name} {what}" for name, what in record["found"].items()) + "\n"
    return "The environment was not recorded.\n"


def steps(records: list[Record], log: str) -> tuple[str, bool]:
    """Return a table of all runs, and whether all of them passed."""
    verdicts: dict[str, Counter[str]] = {}
    for line in log.splitlines():
        if found := _VERDICT.match(line):
            verdicts.setdefault(found[1], Counter())[found[3]] += 1
    ends = [record for record in records if record["what"] == "end"]
    lines = [["what", "exit status", "seconds", "passed", "failed", "skipped"]]
    for end in ends:
        count = verdicts.get(end["name"], Counter())
        failed = count["FAILED"] + count["ERROR"]
        code = "out of time" if end["code"] in (124, 137) else str(end["code"])
        numbers = [str(n) for n in (count["PASSED"], failed, count["SKIPPED"])]
        cells = numbers if count else ["-"] * 3
        lines.append([end["name"], code, str(end["seconds"]), *cells])
    return markdown(lines), bool(ends) and not any(end["code"] for end in ends)


def failures(records: list[Record], log: str) -> Iterator[str]:
    """Yield a line for each failure and each peer that was left out."""
    for line in log.splitlines():
        found = _VERDICT.match(line)
        if (found and found[3] in ("FAILED", "ERROR")) or re.match(r"\S+: \S+: MISSING", line):
            yield f"- {line[:300]}"
    yield from sorted(
        {f"- left out: {r['name']}: {r['reason']}" for r in records if r["what"] == "left out"}
    )
    yield from (
        f"- {r['part']}: {r['rows']} rows not run" for r in records if r["what"] == "not run"
    )


def table(rows: list[Row]) -> str:
    """Return a table with a row per shape."""
    found = dict.fromkeys(name for row in rows for name in row.least)
    names = [name for name in found if name == TWICE or name in others(found)]
    lines = [["shape", COPY, OURS, "share", OURS_LAST, "share", "host", *names]]
    for row in rows:
        cells = [name_of(row.shape), _us(row.least[COPY])]
        for name in (OURS, OURS_LAST):
            time = row.least.get(name)
            cells += [_us(time), "-" if time is None else f"{row.share(time):.2f}"]
        cells.append(_us(row.host))
        for name in names:
            like = row.least.get(OURS_LAST if "channels-last" in name else OURS)
            cells.append(_ratio(row.least.get(name), like))
        lines.append(cells)
    return markdown(lines)


def summary(rows: list[Row]) -> str:
    """Return a row per N, dtype and op: sums over ResNet-50, mean and least ratios."""
    lines = [["N", "dtype", "op", "shapes", f"ms for the 53, {OURS}", OURS_LAST, "best peer each",
              "share of copy", "best peer / ours, mean", "least"]]  # fmt: skip
    for (N, dtype, op), some in grouped(rows):
        ratios = {name_of(row.shape): row.peer / row.best for row in some if row.peer}
        worst = min(ratios, key=ratios.__getitem__, default="")
        lines.append([
            str(N), dtype, op, str(len(some)), _sum(some, OURS), _sum(some, OURS_LAST),
            _sum(some, None),
            f"{statistics.geometric_mean(row.share(row.best) for row in some):.2f}",
            f"{statistics.geometric_mean(ratios.values()):.2f}x" if ratios else "-",
            f"{ratios[worst]:.2f}x, {worst}" if ratios else "-",
        ])  # fmt: skip
    return markdown(lines)


def grouped(rows: list[Row]) -> list[tuple[tuple[int, str, str], list[Row]]]:
    """Return rows by N, dtype and op, with shapes in ResNet-50's order."""
    order = [shape[1:] for shape in RESNET50]
    groups: dict[tuple[int, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.shape[0], row.dtype, row.op), []).append(row)
    for some in groups.values():
        some.sort(key=lambda row: order.index(row.shape[1:]) if row.shape[1:] in order else 99)
    return sorted(
        groups.items(),
        key=lambda of: (of[0][0], of[0][1] != "float32", of[0][1], OPS.index(of[0][2])),
    )


def _sum(rows: list[Row], name: str | None) -> str:
    """Return ms for the 53 batch norms; if no name is given, with the best peer at each shape."""
    times = {row.shape[1:]: row.least.get(name) if name else row.peer for row in rows}
    found = [(times.get(shape[1:]), entry.count) for shape, entry in RESNET50.items()]
    if any(time is None for time, _ in found):
        return "-"
    return f"{sum(time * count for time, count in found if time is not None) / 1e3:.2f}"


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _ratio(value: float | None, to: float | None) -> str:
    return "-" if value is None or not to else f"{value / to:.2f}x"


def profile(file: Path) -> str:
    """Return Nsight Compute's figures, a row per kernel and grid; the first row has the units."""
    if not file.exists():
        return ""
    lines = [line for line in file.read_text().splitlines() if line.startswith('"')]
    head, seen = ["kernel", "grid"], {}
    for row in csv.DictReader(lines):
        key = row["Kernel Name"], row["Grid Size"]
        numbers = {name: number for name, number in row.items() if name and "__" in name}
        head[2:] = [name.partition(".")[0] for name in numbers]
        seen[key] = [".".join(_KERNEL.findall(key[0])[:1] or key[:1]), key[1], *numbers.values()]
    return markdown([head, *seen.values()]) if seen else ""


def timings(rows: list[Row]) -> Iterator[str]:
    """Yield all tables of times."""
    if rows:
        yield from (LEGEND, summary(rows))
    for (N, dtype, op), some in grouped(rows):
        yield f"### {op.capitalize()}, {dtype}, N = {N}\n\n{table(some)}"


def main() -> None:
    """Print all tables, or write those of docs/gpu.md."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="the FOLDER of check.sh")
    parser.add_argument("--docs", action="store_true", help="write a selection into docs/gpu.md")
    arguments = parser.parse_args()
    records = read(arguments.folder / "results.jsonl")
    log = arguments.folder / "log.txt"
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    ran, right = steps(records, text)
    parts = [environment(records), "    bash benchmarks/gpu/check.sh\n", ran]
    if arguments.docs:
        small = [row for row in rows_of(records) if row.shape[0] == 32]
        from benchmarks.tables import with_section  # imports the other benchmarks' libraries

        page = DOCS.read_text(encoding="utf-8")
        section = "\n".join([*parts, *timings(small)])
        DOCS.write_text(with_section(page, section, BEGIN, END), encoding="utf-8")
    else:
        parts += [*timings(rows_of(records)), profile(arguments.folder / "profile.csv")]
        print("\n".join([*parts, *failures(records, text)]))
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
