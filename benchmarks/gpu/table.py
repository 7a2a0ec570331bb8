"""Tables of what check.sh found: all of it in Markdown, a selection in docs/gpu.md.

python benchmarks/gpu/table.py gpu-results/results.jsonl --markdown gpu-results/table.md
python benchmarks/gpu/table.py gpu-results/results.jsonl --docs
"""

import argparse
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a program: make this folder's package importable
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.gpu.peers import COPY, FLOORS, OPS, OURS, OURS_LAST, OURS_TWICE, PEERS, others
from benchmarks.gpu.records import of, read
from benchmarks.shapes import RESNET50, name_of
from benchmarks.tables import markdown, with_section

DOCS = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"
BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
CHECKED = ("correctness", "large", "repeat", "torch", "graph", "sanitize")

LEGEND = """\
Times by CUDA events, the second-level cache flushed before each call, calls of all taking turns;
the least of them. *Share*: of a copy's bandwidth, counting the bytes that have to be moved.
*Best peer*: the fastest of PyTorch's at a shape, whatever its layout.
"""

Record = dict[str, Any]


class Row(NamedTuple):
    """Least microseconds of everyone, of one op at one shape."""

    shape: tuple[int, ...]
    dtype: str
    op: str
    least: dict[str, float]

    @property
    def ours(self) -> float:
        """The faster of nbnorm's two layouts."""
        return min(self.least[name] for name in (OURS, OURS_LAST) if name in self.least)

    @property
    def peer(self) -> str | None:
        """The fastest peer."""
        names = others(self.least)
        return min(names, key=self.least.__getitem__) if names else None

    def share(self, name: str) -> float | None:
        """What part of the copy's bandwidth is reached, of bytes that have to be moved."""
        if COPY not in self.least or name not in self.least:
            return None
        return FLOORS[self.op] * self.least[COPY] / self.least[name]


def rows_of(records: list[Record]) -> list[Row]:
    """Return the rows in which nbnorm was timed."""
    found = []
    for record in of(records, "timings", what="row"):
        least = {name: times[0] for name, times in record["times"].items()}
        if OURS in least or OURS_LAST in least:
            found.append(Row(tuple(record["shape"]), record["dtype"], record["op"], least))
    return found


def environment(records: list[Record]) -> str:
    """Say where this was measured, in a sentence."""
    found = of(records, "environment")
    if not found:
        return "The environment was not recorded.\n"
    one = found[-1]
    device = one["device"] if isinstance(one.get("device"), dict) else {}
    smi = one["nvidia_smi"] if isinstance(one.get("nvidia_smi"), dict) else {}
    versions = one["versions"] if isinstance(one.get("versions"), dict) else {}
    parts = [str(device.get("name") or smi.get("name") or "unknown device")]
    if "major" in device:
        parts.append(f"compute capability {device['major']}.{device['minor']}")
    if "multiProcessorCount" in device:
        parts.append(f"{device['multiProcessorCount']} multiprocessors")
    if "l2CacheSize" in device:
        parts.append(f"{device['l2CacheSize'] / 2**20:.0f} MiB of L2")
    if "driver_version" in smi:
        parts.append(f"driver {smi['driver_version']}")
    listed = ", ".join(f"{name} {number}" for name, number in versions.items())
    torch = one.get("torch")
    cudnn = f", cuDNN {torch['cudnn']}" if isinstance(torch, dict) and "cudnn" in torch else ""
    return f"{', '.join(parts)}; {listed}{cudnn}; {one.get('date')}.\n"


def checks(records: list[Record]) -> tuple[str, int]:
    """Return a table of what was checked, and how much of it failed or was cut short."""
    lines = [["section", "checks", "failed", "left out or not run"]]
    total = 0
    for name in CHECKED:
        found = of(records, name)
        failed = sum(record.get("failed", 0) for record in found)
        reasons = {str(r["left_out"]) for r in found if "left_out" in r}
        reasons |= {f"{r['not_run']} not run" for r in found if "not_run" in r}
        number = sum(record.get("checks", 0) for record in found)
        if not number and not reasons:
            reasons, failed = {"nothing was recorded"}, failed + 1
        total += failed
        lines.append([name, str(number), str(failed), "; ".join(sorted(reasons)) or "-"])
    cut = [r for r in of(records, "end") if r["code"]]
    text = markdown(lines)
    if cut:
        listed = ", ".join(f"{r['name']} (exit status {r['code']})" for r in cut)
        text += f"\nEnded early: {listed}.\n"
    # The tests may take longer than there is time for.
    return text, total + sum((r["name"], r["code"]) != ("suite", 124) for r in cut)


def failures(records: list[Record]) -> Iterator[str]:
    """Describe what failed, a line each."""
    for name in CHECKED:
        for record in of(records, name):
            if not record.get("failed"):
                continue
            where = [str(record[k]) for k in ("dtype", "case", "kind", "shape", "place", "tool")
                     if k in record]  # fmt: skip
            what = record.get("failures") or record.get("summary") or record.get("error") or ""
            yield f"- {name}: {', '.join(where)}: {str(what)[:400]}\n"


def host(records: list[Record]) -> str:
    """Host time of calls."""
    lines = [["call", "host, us", "kernels of nbnorm", "nodes of a graph"]]
    for record in of(records, "host", what="host"):
        counted = record.get("launches") or {}
        lines.append([
            record["name"], f"{record['median_us']:.1f}",
            str(counted.get("nbnorm", "-")), str(counted.get("all", "-")),
        ])  # fmt: skip
    return markdown(lines) if len(lines) > 1 else ""


def kernels(records: list[Record]) -> str:
    """Time of each kernel."""
    lines = [["call", "kernel", "a call", "us a call"]]
    for record in of(records, "host", what="kernels"):
        shape = name_of(tuple(record["shape"]))
        call = f"{record['name']} {record['dtype']} {shape} {record['place']}"
        for name, numbers in record["kernels"].items():
            lines.append([call, f"`{name}`", f"{numbers['a_call']:g}", f"{numbers['us_a_call']:g}"])
    return markdown(lines) if len(lines) > 1 else ""


def table(rows: list[Row]) -> str:
    """One row a shape: microseconds, share of the copy's bandwidth, peers as multiples of ours."""
    names = [n for n in (OURS_TWICE, *others(PEERS)) if any(n in row.least for row in rows)]
    lines = [
        ["shape", "copy", OURS, "share", OURS_LAST, "share", *names, "best peer / best of ours"]
    ]
    for row in rows:
        cells = [name_of(row.shape), _us(row.least.get(COPY))]
        for name in (OURS, OURS_LAST):
            share = row.share(name)
            cells += [_us(row.least.get(name)), "-" if share is None else f"{share:.2f}"]
        for name in names:
            like = OURS_LAST if PEERS[name].last else OURS
            cells.append(_ratio(row.least.get(name), row.least.get(like)))
        cells.append(_ratio(row.least[row.peer] if row.peer else None, row.ours))
        lines.append(cells)
    return markdown(lines)


def summary(rows: list[Row]) -> str:
    """One line for each N, dtype and op: sums over ResNet-50, means and worst of ratios."""
    lines = [["N", "dtype", "op", "shapes", "ms for the 53, " + OURS, OURS_LAST, "best peer each",
              "share of copy", "best peer / ours, mean", "least"]]  # fmt: skip
    for (N, dtype, op), some in grouped(rows).items():
        complete = {row.shape[1:] for row in some} >= {shape[1:] for shape in RESNET50}
        shares = [share for row in some if (share := _best_share(row)) is not None]
        ratios = {row.shape: row.least[row.peer] / row.ours for row in some if row.peer}
        worst = min(ratios, key=ratios.__getitem__) if ratios else None
        sums = [_sum(some, n) if complete else "-" for n in (OURS, OURS_LAST, None)]
        lines.append([
            str(N), dtype, op, str(len(some)), *sums,
            f"{statistics.geometric_mean(shares):.2f}" if shares else "-",
            f"{statistics.geometric_mean(ratios.values()):.2f}x" if ratios else "-",
            f"{ratios[worst]:.2f}x, {name_of(worst)}" if worst else "-",
        ])  # fmt: skip
    return markdown(lines)


def grouped(rows: list[Row]) -> dict[tuple[int, str, str], list[Row]]:
    """Return rows by N, dtype and op, the shapes in ResNet-50's order."""
    order = [shape[1:] for shape in RESNET50]
    groups: dict[tuple[int, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.shape[0], row.dtype, row.op), []).append(row)
    for some in groups.values():
        some.sort(key=lambda row: order.index(row.shape[1:]) if row.shape[1:] in order else 99)
    keys = sorted(groups, key=lambda key: (key[0], key[1] != "float32", key[1], OPS.index(key[2])))
    return {key: groups[key] for key in keys}


def _best_share(row: Row) -> float | None:
    shares = [share for n in (OURS, OURS_LAST) if (share := row.share(n)) is not None]
    return max(shares) if shares else None


def _sum(rows: list[Row], name: str | None) -> str:
    """Milliseconds for the 53 batch norms; without a name, of the best peer at each shape."""
    counts = {shape[1:]: entry.count for shape, entry in RESNET50.items()}
    total = 0.0
    for row in rows:
        one = row.least.get(name) if name else row.peer and row.least[row.peer]
        if one is None:
            return "-"
        total += counts.get(row.shape[1:], 0) * one
    return f"{total / 1e3:.2f}"


def _us(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.{max(0, 2 - int(math.log10(max(value, 1))))}f}"


def _ratio(value: float | None, to: float | None) -> str:
    return "-" if value is None or not to else f"{value / to:.2f}x"


def report(records: list[Record]) -> str:
    """Everything."""
    rows = rows_of(records)
    parts = [environment(records), "## Checks\n", checks(records)[0], *failures(records)]
    parts += ["## Host\n", host(records), "## Kernels\n", kernels(records)]
    parts += ["## Timings\n", summary(rows) if rows else "None.\n"]
    for (N, dtype, op), some in grouped(rows).items():
        parts.append(f"### {op}, {dtype}, N = {N}\n\n{table(some)}")
    left = {(r["name"], r["reason"]) for r in of(records, "timings", what="left out")}
    parts += [f"- left out: {name}: {reason}\n" for name, reason in sorted(left)]
    return "\n".join(parts)


def section(records: list[Record]) -> str:
    """The part of docs/gpu.md that is measured."""
    rows = rows_of(records)
    parts = ["<!-- Written by benchmarks/gpu/table.py --docs. -->\n", environment(records)]
    parts += ["    bash benchmarks/gpu/check.sh\n", checks(records)[0]]
    if rows:
        parts += [LEGEND, summary(rows)]
    for (N, dtype, op), some in grouped(rows).items():
        if N == 32 and dtype in ("float32", "bfloat16"):
            parts.append(
                f"{op.capitalize()}, {dtype}, N = {N}: microseconds, and peers' times as\n"
                f"multiples of nbnorm's on the same layout:\n\n{table(some)}"
            )
    if text := host(records):
        parts.append(f"Host time of a call at 2x8x4x4, float32:\n\n{text}")
    return "\n".join(parts)


def main() -> None:
    """Write what the command line asks for; with --summary, exit 0 says that all was right."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("results", type=Path, help="results.jsonl of check.sh")
    add("--markdown", type=Path, metavar="FILE", help="write all tables here")
    add("--docs", action="store_true", help="write a selection into docs/gpu.md")
    add("--summary", action="store_true", help="print what was checked and the sums")
    arguments = parser.parse_args()
    records = read(arguments.results)
    if arguments.markdown:
        arguments.markdown.write_text(report(records), encoding="utf-8")
    if arguments.docs:
        page = DOCS.read_text(encoding="utf-8")
        DOCS.write_text(with_section(page, section(records), BEGIN, END), encoding="utf-8")
    if arguments.summary:
        text, failed = checks(records)
        rows = rows_of(records)
        parts = [environment(records), text, *list(failures(records))[:20], host(records)]
        print("\n".join([*parts, summary(rows) if rows else ""]))
        sys.exit(int(failed > 0))
    if not (arguments.markdown or arguments.docs):
        print(report(records))


if __name__ == "__main__":
    main()
