"""Check and time the CUDA backend on a GPU, one section a process: check.sh runs them all.

    python benchmarks/gpu/check.py environment --output gpu-results
    python benchmarks/gpu/check.py correctness --dtype float16 --seconds 120
    python benchmarks/gpu/check.py timings --seconds 200
    python benchmarks/gpu/check.py correctness --dry       # NumPy and the CPU: tries the check

Results are added to results.jsonl in the output folder; table.py makes tables of them.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

if not __package__:  # run as a program: make this folder's package and nbnorm importable
    sys.path[0] = str(Path(__file__).resolve().parents[2])

os.environ.setdefault("NUMBA_CUDA_LOW_OCCUPANCY_WARNINGS", "0")

SECTIONS = (
    "environment", "correctness", "large", "repeat", "torch", "graph", "host", "timings",
    "sanitize", "small",
)  # fmt: skip


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("section", choices=SECTIONS)
    add("--output", type=Path, default=Path("gpu-results"), help="folder, by default gpu-results")
    add("--dtype", default="float32", help="of correctness: float32, float64, float16, bfloat16")
    add("--seconds", type=float, default=200.0, help="time for the section, by default 200")
    add("--compile-seconds", type=float, default=60.0, help="of it, for torch.compile")
    add("--seed", type=int, default=None, help="of random data; by default a new one, printed")
    add("--skip", type=int, default=0, help="cases of correctness to pass over")
    add("--tools", nargs="+", default=["memcheck", "racecheck"], help="of compute-sanitizer")
    add("--dry", action="store_true", help="NumPy and the CPU, to try the section itself")
    arguments = parser.parse_args()
    if arguments.seed is None:
        arguments.seed = int.from_bytes(os.urandom(4), "little")
    return arguments


def main() -> None:
    """Run one section."""
    arguments = parse()
    print(f"{arguments.section}: seed {arguments.seed}", flush=True)
    from benchmarks.gpu import records

    results = records.Records(arguments.output, arguments.section)
    begin = time.monotonic()
    try:
        section(arguments, results)
    except Exception as error:
        results.add(error=f"{type(error).__name__}: {error}", checks=1, failed=1)
        raise
    seconds = time.monotonic() - begin
    print(f"{arguments.section}: {seconds:.1f} s", flush=True)


def section(arguments: argparse.Namespace, results: Any) -> None:
    """Run the section that was asked for; each imports what it needs."""
    from benchmarks.gpu import sanitize
    from benchmarks.gpu.machine import Machine

    seed, seconds = arguments.seed, arguments.seconds
    if arguments.section == "sanitize":  # it starts processes; this one leaves the GPU alone
        sanitize.run(results, arguments.output, seed, seconds, arguments.tools)
        return
    machine = Machine(dry=arguments.dry)
    if arguments.section == "small":
        sanitize.small(machine, seed)
    elif arguments.section == "environment":
        from benchmarks.gpu import environment

        environment.run(machine, results)
    elif arguments.section == "correctness":
        _correctness(arguments, machine, results)
    elif arguments.section == "large":
        from benchmarks.gpu import large

        large.run(machine, results, seed, seconds)
    elif arguments.section == "repeat":
        from benchmarks.gpu import repeat

        repeat.run(machine, results, seed, seconds)
    elif arguments.section == "torch":
        from benchmarks.gpu import interop

        interop.run(machine, results, seed, seconds)
    elif arguments.section == "graph":
        from benchmarks.gpu import graph

        graph.run(machine, results, seed)
    elif arguments.section == "host":
        from benchmarks.gpu import host

        host.run(machine, results, seed, seconds)
    else:
        from benchmarks.gpu import timings

        timings.run(machine, results, seed, seconds, arguments.compile_seconds)


def _correctness(arguments: argparse.Namespace, machine: Any, results: Any) -> None:
    """Check; where the device stops answering, go on in a new process after the case it was at."""
    from benchmarks.gpu import correctness

    begin = time.monotonic()
    following = correctness.run(
        machine, results, arguments.dtype, arguments.seed, arguments.seconds, arguments.skip
    )
    left = arguments.seconds - (time.monotonic() - begin)
    if following is None or left < 5:
        return
    options = {
        "--output": arguments.output, "--dtype": arguments.dtype, "--seconds": left,
        "--seed": arguments.seed, "--skip": following,
    }  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, __file__, "correctness", *words])


if __name__ == "__main__":
    main()
