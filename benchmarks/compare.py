"""Compare nbnorm with its peers: check each against the oracle, then time all, interleaved.

    python benchmarks/compare.py                     # all shapes and ops, float32
    python benchmarks/compare.py --quick
    python benchmarks/compare.py --shapes 32x256x56x56 60x100 --op forward --dtype float16
    python benchmarks/compare.py --json docs/speed.json --chart docs/speed.svg --readme
    python benchmarks/compare.py --from-json docs/speed.json --chart docs/speed.svg --readme

Machines are shared and noisy, so a single time says little. All calls of a row alternate in one
process with the same number of threads, and the tables give ratios of minimum times: nbnorm's to
the floor (floor.py), and a peer's to nbnorm's on the same layout and with the same kind of output,
existing or new memory.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a program: make this folder's package and nbnorm importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import tables
from benchmarks.checking import check
from benchmarks.floor import FLOORS, sweeps
from benchmarks.peers import OPS, PEERS, Batch, Call, LeftOut, forget_shapes, installed, is_ours
from benchmarks.runs import Row, Run, command_of, conditions
from benchmarks.shapes import QUICK, SHAPES, Shape, name_of, shape_of
from benchmarks.timing import alternate

README = Path(__file__).resolve().parents[1] / "README.md"
DTYPES = ("float32", "float64", "float16", "bfloat16")
LAST = " channels-last"
OTHERS = [name for name in PEERS if not is_ours(name) and not name.endswith(LAST)]
# torch.compile needs a second or two for each function, so it must be named.
USUAL = [name for name in OTHERS if name != "torch.compile"]


def measure(
    op: str, shape: Shape, dtype: str, names: list[str], rounds: int
) -> tuple[Row, dict[str, str]]:
    """Check and time peers at one shape; also return why some are left out."""
    forget_shapes()
    layouts = (False, True) if len(shape) > 2 else (False,)
    batches = {last: Batch(shape, dtype, last=last) for last in layouts}
    calls: dict[str, Call] = {}
    left_out: dict[str, str] = {}
    for name in names:
        peer = PEERS[name]
        if op not in peer.ops or peer.last not in batches:
            continue
        batch = batches[peer.last]
        try:
            call = peer.ops[op](batch)
            check(name, op, batch, call())
        except LeftOut as reason:
            left_out[name] = str(reason)
        except AssertionError as wrong:
            if is_ours(name):
                raise
            left_out[name] = str(wrong)
        else:
            calls[name] = call
    floors = sweeps(batches[False].x, batches[False].out)
    times = alternate(calls | floors, rounds)
    floor = FLOORS[op] * min(times[name].least for name in floors)
    return Row(op, dtype, shape, floor, {name: times[name] for name in calls}), left_out


def measure_all(arguments: argparse.Namespace) -> Run:
    """Measure what the command line asks for; report progress on stderr."""
    shapes = arguments.shapes or (QUICK if arguments.quick else SHAPES)
    wanted = [n for n in PEERS if is_ours(n) or n.removesuffix(LAST) in arguments.peers]
    names = [name for name in wanted if name in installed()]
    left_out = {name: "not installed" for name in wanted if name not in names}
    run = Run(conditions(), [command_of("compare.py", sys.argv[1:])], left_out, [])
    for dtype in arguments.dtype:
        for op in arguments.op:
            for shape in shapes:
                print(f"{op} {dtype} {name_of(shape)}", file=sys.stderr)
                row, reasons = measure(op, shape, dtype, names, 3 if arguments.quick else 9)
                run.rows.append(row)
                left_out |= reasons
                if arguments.json:  # after every row, since a run takes half an hour
                    run.write(arguments.json)
    return run.with_least_floors()


def main() -> None:
    """Measure or read what the command line asks for; print and write it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="few and small shapes, few rounds")
    add("--shapes", nargs="+", type=shape_of, metavar="NAME", help="shapes such as 32x256x56x56")
    add("--op", nargs="+", choices=OPS, default=OPS, help="default: all")
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="default: float32")
    add("--peers", nargs="+", choices=OTHERS, default=USUAL, help="default: all but torch.compile")
    add("--from-json", nargs="+", type=Path, metavar="FILE", help="read these instead of measuring")
    add("--json", type=Path, metavar="FILE", help="write all figures to this file")
    add("--markdown", type=Path, metavar="FILE", help="write all tables to this file")
    add("--chart", type=Path, metavar="FILE", help="draw ResNet-50's sums (.svg, .png)")
    add("--readme", action="store_true", help="write a selection into README.md")
    arguments = parser.parse_args()

    run = Run.read(*arguments.from_json) if arguments.from_json else measure_all(arguments)
    text = tables.report(run)
    print(text)
    if arguments.json:
        run.write(arguments.json)
    if arguments.markdown:
        arguments.markdown.write_text(text)
    if arguments.chart:
        from benchmarks.chart import draw  # needs matplotlib

        draw(run, arguments.chart)
    if arguments.readme:
        text = tables.with_section(README.read_text(encoding="utf-8"), tables.section(run))
        README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
