"""Suites for asv, which imports all that is in this folder: nothing here needs a peer or a host."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # asv knows this folder alone
