"""Time host frameworks with their own batch norm and with nbnorm's, forward + backward.

    python benchmarks/integrations.py
    python benchmarks/integrations.py --hosts autograd --shapes 4096x512
    python benchmarks/integrations.py --docs        (writes the table of docs/integrations.md)

A host without batch norm is timed with one composed of its functions, as its users would write it.
The two versions alternate in one process and compute y and the gradients of x, gamma and beta;
ONNX, which has no gradients, computes only y. The output names hosts that are not installed.
"""

import argparse
import importlib
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numba

from benchmarks.runs import conditions, describe
from benchmarks.shapes import name_of, shape_of
from benchmarks.tables import markdown, multiple, number, with_section
from benchmarks.timing import Times, alternate

HOSTS = ("torch", "autograd", "mygrad", "thinc", "onnx")
SHAPES = ((60, 100), (4096, 512), (32, 64, 28, 28), (32, 256, 56, 56))
DOCS = Path(__file__).resolve().parents[1] / "docs" / "integrations.md"
BEGIN, END = "<!-- integrations: begin -->", "<!-- integrations: end -->"


def measure(
    hosts: list[str], shapes: list[tuple[int, ...]], rounds: int
) -> tuple[dict[tuple[str, tuple[int, ...]], dict[str, Times]], list[str]]:
    """Return times by host and shape, and the reason for every host that was left out."""
    times, missing = {}, []
    for host in hosts:
        try:
            module = importlib.import_module(f"benchmarks.hosts.{host}")
        except ImportError as error:
            missing.append(f"{host}: {error}")
            continue
        for shape in shapes:
            name = module.name()
            times[name, shape] = found = alternate(module.calls(shape), rounds)
            least = ", ".join(f"{who} {number(1e3 * t.least)} ms" for who, t in found.items())
            print(f"{name} {name_of(shape)}: {least}", file=sys.stderr)
    return times, missing


def table(times: dict[tuple[str, tuple[int, ...]], dict[str, Times]]) -> str:
    """Return a row per host and a column per shape: least ms of host and nbnorm, and the ratio."""
    shapes = list(dict.fromkeys(shape for _, shape in times))
    lines = [["host", *map(name_of, shapes)]]
    for host in dict.fromkeys(host for host, _ in times):
        cells = []
        for shape in shapes:
            own, ours = (1e3 * times[host, shape][who].least for who in ("host", "nbnorm"))
            cells.append(f"{number(own)} / {number(ours)} = {multiple(own / ours)}x")
        lines.append([host, *cells])
    return markdown(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hosts", nargs="+", choices=HOSTS, default=HOSTS)
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=SHAPES)
    parser.add_argument("--rounds", type=int, default=9, help="default %(default)s")
    parser.add_argument(
        "--docs", action="store_true", help="write the table of docs/integrations.md"
    )
    options = parser.parse_args()
    times, missing = measure(options.hosts, options.shapes, options.rounds)
    command = shlex.join(["python", "benchmarks/integrations.py", *sys.argv[1:]])
    text = (
        f"Milliseconds with the host's own and with nbnorm, and the ratio:\n\n{table(times)}\n"
        f"`{command}`, {numba.get_num_threads()} threads.\n{describe(conditions())}\n"
        + "".join(f"Left out: {reason}.\n" for reason in missing)
    )
    print(text)
    if options.docs:
        page = DOCS.read_text(encoding="utf-8")
        DOCS.write_text(with_section(page, text, BEGIN, END), encoding="utf-8")


if __name__ == "__main__":
    main()
