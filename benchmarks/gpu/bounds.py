"""The tolerances of the tests, which are no package: found by their path."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

import tolerances as T  # noqa: N812

__all__ = ["T"]
