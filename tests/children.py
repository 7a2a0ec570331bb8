"""Run Python in a child process that imports the tested nbnorm."""

import os
import subprocess
import sys
from pathlib import Path

import nbnorm


def run_child(*arguments, **environment):
    """Run Python; return what it printed, or fail with what it printed to stderr."""
    package = str(Path(nbnorm.__file__).parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    child = subprocess.run(
        [sys.executable, "-X", "faulthandler", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert child.returncode == 0, f"exit status {child.returncode}: {child.stderr[-4000:]}"
    return child.stdout
