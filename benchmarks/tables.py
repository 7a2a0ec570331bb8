"""A run as Markdown: all figures, a page for the site, and a selection for README.md."""

import statistics
from collections.abc import Callable, Iterable

from benchmarks.markdown import markdown
from benchmarks.peers import OPS, PASSES, PEERS, is_ours, ours_for
from benchmarks.runs import Row, Run, describe
from benchmarks.shapes import RESNET50, SMALL, name_of

BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"

_RESNET = "All 53 batch norms of ResNet-50 at N = 32, in ms"
_SMALL = "Small calls, in µs"
_OF_THOSE = "channels-last: those of more than two axes"

LEGEND = """\
Each cell has the minimum and the median in milliseconds, and a ratio: nbnorm's time in floors, or a
peer's time as a multiple of nbnorm's on the same layout and with the same kind of output (existing
or new memory). The floor is the fastest sweep that reads x and writes y, times the number of such
sweeps that the op needs (floor.py).
"""


def report(run: Run) -> str:
    """Return all figures of a run: a table and a summary for each dtype and op."""
    parts = [f"{describe(run.conditions)}\n\n{_commands(run)}\n{LEGEND}", *_left_out(run)]
    for dtype in dict.fromkeys(row.dtype for row in run.rows):
        for op, rows in _by_op(run, dtype).items():
            parts.append(f"## {op}, {dtype}\n\n{_table(rows)}\n{_summary(rows)}")
    return "\n".join(parts)


def section(run: Run) -> str:
    """Return README.md's section: the chart, the means, ResNet-50's sums and small calls."""
    parts = [
        "<!-- Written by benchmarks/compare.py --readme. -->\n",
        "![Time of the batch norms of ResNet-50, by library](docs/speed.svg)\n",
    ]
    for dtype in dict.fromkeys(row.dtype for row in run.rows):
        by_op = _by_op(run, dtype)
        shapes = len({row.shape for rows in by_op.values() for row in rows})
        parts.append(
            f"Peers' times in {dtype} divided by nbnorm's, on the same layout: geometric mean\n"
            f"over {shapes} shapes ({_OF_THOSE}), and in brackets\nthe smallest, with its shape:"
            f"\n\n{_means(by_op)}"
        )
        for title, table in ((_RESNET, _sums(by_op)), (_SMALL, _small(by_op))):
            if table:
                parts.append(f"{title}:\n\n{table}")
    parts += [*_left_out(run), f"{describe(run.conditions)}\n\n{_commands(run)}"]
    return "\n".join(parts)


def page(run: Run) -> str:
    """Return the site's page of a run: sums, means, and every op by shape."""
    parts = [f"{describe(run.conditions)}\n\n{_commands(run)}", *_left_out(run)]
    for dtype in dict.fromkeys(row.dtype for row in run.rows):
        by_op = _by_op(run, dtype)
        sums = _sums(by_op)
        if sums:
            parts.append(f"## ResNet-50, {dtype}\n\n{_RESNET}:\n\n{sums}")
        small = _small(by_op)
        if small:
            parts.append(f"## Small calls, {dtype}\n\n{_SMALL}:\n\n{small}")
        parts.append(
            f"## Against each library, {dtype}\n\nTimes divided by nbnorm's, on the same layout: "
            f"geometric mean over all shapes\n({_OF_THOSE}), and in brackets the smallest, with "
            f"its shape:\n\n{_means(by_op)}"
        )
        for op, rows in by_op.items():
            table = _shapes(rows, filter(is_ours, PEERS))
            parts.append(
                f"## By shape: {op}, {dtype}\n\n"
                f"Times of the floor and nbnorm in ms, peers in multiples of nbnorm:\n\n{table}"
            )
    return "\n".join(parts)


def with_section(page: str, text: str, begin: str = BEGIN, end: str = END) -> str:
    """Return a page with this text between its two marks, by default those of README.md."""
    before, found_begin, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"the page lacks {begin} or {end}")
    return f"{before}{begin}\n{text}{end}{after}"


def resnet_sums(rows: list[Row]) -> dict[str, float]:
    """Return seconds for all batch norms of ResNet-50, by name and for the floor.

    The result is empty if shapes are missing. Names that are not in every row are left out.
    """
    layers = [row for row in rows if row.shape in RESNET50]
    if len(layers) < len(RESNET50):
        return {}

    def total(value: Callable[[Row], float]) -> float:
        return sum(RESNET50[row.shape].count * value(row) for row in layers)

    sums = {
        name: total(lambda row, name=name: row.times[name].least)
        for name in _names(layers)
        if all(name in row.times for row in layers)
    }
    return sums | {"floor": total(lambda row: row.floor)}


def number(value: float) -> str:
    """Return a number as text with three digits."""
    return f"{float(f'{value:.3g}'):,g}" if value < 1e6 else f"{value:.2e}"


def multiple(value: float) -> str:
    """Return a ratio as text: two decimals, or three digits in all."""
    return f"{value:.2f}" if 0.1 <= value < 10 else number(value)


def _by_op(run: Run, dtype: str) -> dict[str, list[Row]]:
    rows = [row for row in run.rows if row.dtype == dtype]
    return {op: some for op in OPS if (some := [row for row in rows if row.op == op])}


def _names(rows: Iterable[Row]) -> list[str]:
    """Return the names that were measured, in the order of `PEERS`."""
    measured = {name for row in rows for name in row.times}
    return [name for name in PEERS if name in measured]


def _others(rows: Iterable[Row]) -> list[str]:
    return [name for name in _names(rows) if not is_ours(name)]


def _with(name: str, rows: list[Row]) -> list[Row]:
    return [row for row in rows if name in row.times]


def _best(row: Row) -> float:
    """Return the least time of all peers, of any layout and kind of output."""
    return min(row.times[name].least for name in _others([row]))


def _mean_and_least(
    rows: list[Row], value: Callable[[Row], float], worst: Callable[..., Row] = min
) -> tuple[str, str, str]:
    row = worst(rows, key=value)
    mean = statistics.geometric_mean(map(value, rows))
    return multiple(mean), multiple(value(row)), name_of(row.shape)


def _table(rows: list[Row]) -> str:
    """Return a row per shape and a column per peer; `LEGEND` explains the cells."""
    names = _names(rows)
    lines = [["shape", "floor", *names]]
    for row in rows:
        cells = dict.fromkeys(names, "-")
        for name, (least, median) in row.times.items():
            cells[name] = f"{number(1e3 * least)} {number(1e3 * median)} " + (
                f"{multiple(least / row.floor)} fl"
                if is_ours(name)
                else f"{multiple(row.ratio(name, ours_for(name, row.op)))}x"
            )
        lines.append([name_of(row.shape), number(1e3 * row.floor), *cells.values()])
    return markdown(lines)


def _summary(rows: list[Row]) -> str:
    """Return geometric means and worst cases over the shapes, and sums over ResNet-50."""
    lines = [["", "geometric mean", "worst", "at"]]

    def add(label: str, rows: list[Row], value: Callable[[Row], float], worst=min) -> None:
        if rows:
            lines.append([label, *_mean_and_least(rows, value, worst)])

    ours = [name for name in _names(rows) if is_ours(name)]
    for name in ours:
        add(f"{name}, floors", _with(name, rows), lambda r, n=name: r.times[n].least / r.floor, max)
    for name in _others(rows):
        us = ours_for(name, rows[0].op)
        add(f"{name} / {us}", _with(name, rows), lambda r, n=name, us=us: r.ratio(n, us))
    against = [row for row in rows if _others([row])]
    for name in ours:
        add(
            f"best of all peers / {name}",
            _with(name, against),
            lambda r, n=name: _best(r) / r.times[n].least,
        )
    text = markdown(lines)
    sums = resnet_sums(rows)
    if sums:
        listed = "; ".join(f"{name} {number(1e3 * total)}" for name, total in sums.items())
        text += f"\nThe 53 batch norms of ResNet-50 at N = 32, ms: {listed}.\n"
    return text


def _sums(by_op: dict[str, list[Row]]) -> str:
    """Return a row per peer and a column per op: milliseconds for ResNet-50."""
    sums = {op: total for op, rows in by_op.items() if (total := resnet_sums(rows))}
    if not sums:
        return ""
    names = [name for name in [*PEERS, "floor"] if any(name in total for total in sums.values())]
    lines = [["", *sums]]
    for name in names:
        cells = (number(1e3 * sums[op][name]) if name in sums[op] else "-" for op in sums)
        lines.append([name, *cells])
    return markdown(lines)


def _small(by_op: dict[str, list[Row]]) -> str:
    """Return a row per peer and a column per op and small shape: microseconds."""
    columns = [
        row for op, rows in by_op.items() if op in PASSES for row in rows if row.shape in SMALL
    ]
    lines = [["", *(f"{row.op} {name_of(row.shape)}" for row in columns)]]
    for name in _names(columns):
        cells = (
            number(1e6 * row.times[name].least) if name in row.times else "-" for row in columns
        )
        lines.append([name, *cells])
    return markdown(lines) if columns else ""


def _means(by_op: dict[str, list[Row]]) -> str:
    """Return a row per peer and a column per op: geometric mean of the ratios, and the least."""
    lines = [["", *by_op]]
    for name in _others(row for rows in by_op.values() for row in rows):
        cells = ["-"] * len(by_op)
        for i, (op, rows) in enumerate(by_op.items()):
            measured = _with(name, rows)
            if measured:
                us = ours_for(name, op)
                value = _mean_and_least(measured, lambda row, n=name, us=us: row.ratio(n, us))
                cells[i] = "{}x ({}x, {})".format(*value)
        lines.append([name, *cells])
    best = ["fastest peer, any layout"]
    for rows in by_op.values():
        us = "nbnorm" if "nbnorm" in _names(rows) else "nbnorm, new output"
        against = [row for row in rows if _others([row])]
        if against:
            value = _mean_and_least(against, lambda row, us=us: _best(row) / row.times[us].least)
            best.append("{}x ({}x, {})".format(*value))
        else:
            best.append("-")
    return markdown([*lines, best])


def _shapes(rows: list[Row], ours: Iterable[str]) -> str:
    """Return a row per shape: times of the floor and of `ours`, multiples of nbnorm for peers."""
    ours = [name for name in ours if name in _names(rows)]
    others = _others(rows)
    lines = [["shape", "floor", *ours, *others]]
    for row in rows:
        cells = [number(1e3 * row.times[n].least) if n in row.times else "-" for n in ours]
        for name in others:
            us = ours_for(name, row.op)
            cells.append(f"{multiple(row.ratio(name, us))}x" if name in row.times else "-")
        lines.append([name_of(row.shape), number(1e3 * row.floor), *cells])
    return markdown(lines)


def _left_out(run: Run) -> list[str]:
    reasons = "; ".join(
        reason if reason.startswith(name) else f"{name}: {reason}"
        for name, reason in run.left_out.items()
    )
    return [f"Left out: {reasons}.\n"] if reasons else []


def _commands(run: Run) -> str:
    return "".join(f"    {command}\n" for command in run.commands)
