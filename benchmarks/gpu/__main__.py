"""Run one part of check.sh: python -m benchmarks.gpu versions, short, timings or profile."""

import argparse

from benchmarks.gpu import versions


def main() -> None:
    """Run the part that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("part", choices=("versions", "short", "timings", "profile"))
    add("--seconds", type=float, default=60.0, help="time limit, default 60")
    add("--dry", action="store_true", help="use NumPy and the CPU, to try the program")
    arguments = parser.parse_args()
    if arguments.part == "versions":
        versions.run(dry=arguments.dry)
        return
    from benchmarks.gpu import timings

    timings.run(arguments.part, arguments.seconds, dry=arguments.dry)


if __name__ == "__main__":
    main()
