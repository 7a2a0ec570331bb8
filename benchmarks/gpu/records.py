"""Results as JSON lines, appended to a file in the folder that GPU_RESULTS names."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
RESULTS = "results.jsonl"

OPS = ("forward", "backward", "inference")
# Tensors of x's size that an op must read or write, divided by the two tensors of a copy.
FLOORS = {"forward": 1.0, "backward": 1.5, "inference": 1.0}
COPY, OURS, OURS_LAST, TWICE = "copy", "nbnorm", "nbnorm channels-last", "nbnorm, read twice"


def others(names: Iterable[str]) -> list[str]:
    """Return the names that are neither nbnorm's nor the copy's."""
    return [name for name in names if not name.startswith((OURS, COPY))]


def file() -> Path:
    """Return the path of the results."""
    return Path(os.environ.get("GPU_RESULTS", "gpu-results"), RESULTS)


def add(what: str, **record: Any) -> None:
    """Append a record in a single write, as several processes may append."""
    file().parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"what": what, **record}, default=str) + "\n"
    descriptor = os.open(file(), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read(path: Path) -> list[Record]:
    """Return all records, except a last line that was cut off."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
