"""Results as JSON lines: several processes add to one file, and what is written stays written."""

import json
import os
import sys
from pathlib import Path
from typing import Any

RESULTS = "results.jsonl"


class Records:
    """A file that records are added to, each in one write."""

    def __init__(self, folder: Path, section: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._section = folder / RESULTS, section

    def add(self, **record: Any) -> None:
        """Add a record of this section."""
        line = json.dumps({"section": self._section, **record}, default=_plain) + "\n"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def read(path: Path) -> list[dict[str, Any]]:
    """Return all records; a last line that was cut off is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            print(f"left out: {line[:80]}", file=sys.stderr)
    return records


def of(records: list[dict[str, Any]], section: str, **wanted: Any) -> list[dict[str, Any]]:
    """Return the records of a section that have these values."""
    return [
        record
        for record in records
        if record["section"] == section and all(record.get(k) == v for k, v in wanted.items())
    ]


def say(*words: Any) -> None:
    """Print at once, for the log."""
    print(*words, flush=True)


def _plain(value: Any) -> Any:
    """NumPy's and CuPy's numbers as Python's."""
    return value.item() if hasattr(value, "item") else str(value)
