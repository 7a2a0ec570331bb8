"""Results of long runs: as JSON, with command, machine, dates, versions and settings; as figures.

A file contains all finished runs. Running a command again adds the runs that are missing from the
file; if none is missing, the command only draws the figure.
"""

import json
import shlex
import sys
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import numba
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.runs import conditions

ROOT = Path(__file__).resolve().parents[2]


def one_thread():
    """Make Numba compute with one thread, and PyTorch too if it is imported.

    The networks are small, and the threads of both would spin while they wait for each other: with
    other programs running, a step of figure2.py took seconds.
    """
    numba.set_num_threads(1)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


def read(path, settings):
    """Return the finished runs of a file as a dict, which is empty if there is no file.

    Raises ValueError if they were made with other settings.
    """
    if path is None or not path.exists():
        return {}
    file = json.loads(path.read_text())
    if file["settings"] != settings:
        raise ValueError(f"{path} has runs with {file['settings']}, not with {settings}")
    return file["runs"]


def write(path, settings, runs):
    """Write all finished runs, one per line, with the current command."""
    program = Path(sys.argv[0]).resolve()
    known = json.loads(path.read_text())["conditions"] if path.exists() else []
    now = conditions()
    head = {
        "command": shlex.join(["python", program.relative_to(ROOT).as_posix(), *sys.argv[1:]]),
        "conditions": known if now in known else [*known, now],
        "settings": settings,
        "runs": {},
    }
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(run)}" for name, run in runs.items())
    text = json.dumps(head, indent=1).removesuffix("{}\n}") + f"{{\n{lines}\n}}\n}}\n"
    unfinished = path.with_suffix(".part")
    unfinished.write_text(text)
    unfinished.replace(path)  # atomic: an interruption leaves the old file


@contextmanager
def drawn(output, size):
    """Yield an empty figure, and write it to a file at the end."""
    # Equal results must give equal files: no date, and no random names of elements.
    style = {"svg.hashsalt": "nbnorm", "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        metadata = {"Date": None} if output.suffix == ".svg" else None
        figure.savefig(output, dpi=150, metadata=metadata)
