"""Suites for asv, which imports all modules of this folder; none needs a peer or a host."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # asv adds only this folder
