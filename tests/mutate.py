"""Mutation tests: change one line of nbnorm at a time and check that a test fails.

Usage: `python tests/mutate.py [word]`. mutants.py lists the changes; `word` selects those whose
file or line contains it. For each mutant, the few tests listed with it run on a copy of the
package. It is killed if they fail or crash. If they time out, it may hang or only be slow: its
tests must be short enough to tell which. A mutant that survives needs a reason in the table, for
example that it changes only the run time.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mutants import MUTANTS

ROOT = Path(__file__).parents[1]
LIMIT = 300  # seconds


def run(tests, folder):
    """Run tests on a copy; return "alive", "killed", "timed out" or "no test ran"."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    # Python detects stale bytecode by seconds and size, which two mutants may share.
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        code = subprocess.run(
            [*command, *tests.split()],
            cwd=folder / "tests",
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=LIMIT,
            check=False,
        ).returncode
    except subprocess.TimeoutExpired:
        return "timed out"
    if code == 0:
        return "alive"
    # 1 is a failed test, a negative number a signal; other codes are errors of pytest itself.
    return "killed" if code == 1 or code < 0 else "no test ran"


def judge(mutant, folder):
    """Return the outcome of a mutant; restore the copy."""
    path = folder / mutant.file
    source = path.read_text()
    if source.count(mutant.original) != 1:
        return "does not apply"
    path.write_text(source.replace(mutant.original, mutant.mutated))
    try:
        return run(mutant.tests, folder)
    finally:
        path.write_text(source)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("word", nargs="?", default="", help="part of a file's name or of a line")
    word = parser.parse_args().word
    chosen = [m for m in MUTANTS if word in m.file or word in m.original]
    found = {"killed": 0, "alive, with a reason": 0}
    bad = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for part in ("nbnorm", "tests", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, folder / part)
        everything = sorted({test for m in chosen for test in m.tests.split()})
        if run(" ".join(everything), folder) != "alive":
            sys.exit("the tests fail without any mutant: " + " ".join(everything))
        for m in chosen:
            begin = time.perf_counter()
            result = judge(m, folder)
            if result == "alive" and m.reason:
                result = "alive, with a reason"
            found[result] = found.get(result, 0) + 1
            bad += result not in ("killed", "timed out", "alive, with a reason")
            line = f"{m.file}: {m.original.strip()!r} -> {m.mutated.strip()!r}"
            print(f"{result:20} {time.perf_counter() - begin:4.0f} s  {line}", flush=True)
    print(f"{len(chosen)} mutants:", ", ".join(f"{n} {result}" for result, n in found.items()))
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
