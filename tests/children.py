"""Run Python in a child process that imports the tested nbnorm."""

import os
import subprocess
import sys
from pathlib import Path

import nbnorm


def run_child(*arguments, **environment):
    """Run Python; return what it printed, or fail with the end of that and of stderr."""
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
    printed = child.stdout[-2000:] + child.stderr[-4000:]
    assert child.returncode == 0, f"exit status {child.returncode}: {printed}"
    return child.stdout
