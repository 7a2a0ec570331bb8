"""Greatest error of each peer's y for inputs with a large mean, against the oracle.

    python benchmarks/accuracy.py [--markdown FILE]

x = N(0, 1) + offset, float32, shape (32, 16, 56, 56), training forward.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a program: make this folder's package and nbnorm importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.checking import as_array
from benchmarks.peers import EPS, PEERS, Batch, installed
from benchmarks.runs import command_of, conditions, describe
from benchmarks.tables import markdown
from nbnorm import reference

SHAPE = (32, 16, 56, 56)
OFFSETS = (0.0, 1e2, 1e4, 1e6)
# A peer's arithmetic does not depend on where it writes: one column each.
NAMES = ("nbnorm", "nbnorm channels-last", "PyTorch", "PyTorch channels-last", "NumPy")


def error(name: str, offset: float) -> float:
    """Return the greatest |y - oracle| of a peer."""
    peer = PEERS[name]
    batch = Batch(SHAPE, last=peer.last)
    batch.x += np.float32(offset)
    expected = reference.batch_norm_forward(batch.x, batch.gamma, batch.beta, eps=EPS).y
    return float(np.abs(as_array(peer.ops["forward"](batch)()) - expected).max())


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    names = [name for name in NAMES if name in installed()]
    lines = [["mean / std", *names]]
    for offset in OFFSETS:
        lines.append([f"{offset:g}", *(f"{error(name, offset):.1e}" for name in names)])
    command = command_of("accuracy.py", sys.argv[1:])
    text = f"{describe(conditions())}\n\n    {command}\n\n{markdown(lines)}"
    print(text)
    if args.markdown:
        args.markdown.write_text(text)


if __name__ == "__main__":
    main()
