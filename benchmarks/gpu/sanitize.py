"""compute-sanitizer over a small section: memory, races, barriers, memory nothing wrote."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import nbnorm
from benchmarks.gpu.machine import Machine, Unavailable
from benchmarks.gpu.records import Records, say

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
CHECK = Path(__file__).with_name("check.py")
FOUND = 9  # what compute-sanitizer exits with, for us, where it found something

# Of each traversal one shape by vectors and one value by value, of more than one chunk.
SMALL = (
    ((3, 4, 100, 64), 1), ((2, 3, 31, 33), 1), ((300, 16, 4, 4), 1), ((70, 5, 7, 7), 1),
    ((900, 24), 1), ((8, 9, 9, 3), -1),
)  # fmt: skip


def _sanitizer() -> str | None:
    return shutil.which(
        "compute-sanitizer",
        path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]),
    )


def run(records: Records, output: Path, seed: int, seconds: float, tools: list[str]) -> None:
    """Run the section `small` under each tool."""
    sanitizer = _sanitizer()
    if sanitizer is None:
        say("left out: compute-sanitizer is not installed")
        records.add(left_out="compute-sanitizer is not installed")
        return
    deadline = time.monotonic() + seconds
    for tool in tools:
        left = deadline - time.monotonic()
        if left < 10:
            records.add(tool=tool, left_out="out of time")
            continue
        code, text = _run(sanitizer, tool, output, seed, left)
        summary = re.findall(r"^=+ (.*SUMMARY.*)$", text, re.M)
        finished = "small: done" in text
        say(text[-6000:])
        say(f"{tool}: exit code {code}, {summary or 'no summary'}")
        records.add(
            tool=tool, code=code, summary=summary, finished=finished, checks=1,
            failed=int(code != 0 or not finished), text="" if code == 0 else text[-4000:],
        )  # fmt: skip


def _run(sanitizer: str, tool: str, output: Path, seed: int, seconds: float) -> tuple[int, str]:
    command = [
        sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20",
        sys.executable, str(CHECK), "small", "--output", str(output), "--seed", str(seed),
    ]  # fmt: skip
    with tempfile.TemporaryFile("w+") as text:
        # A session of its own, so that the program under the tool ends with it.
        child = subprocess.Popen(
            command, stdout=text, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            code = 124
        text.seek(0)
        return code, text.read()


def small(machine: Machine, seed: int) -> None:
    """All passes at small shapes, without CuPy's pool, so that each array has its own bounds."""
    if not machine.dry:
        machine.xp.cuda.set_allocator(None)
    rng = np.random.default_rng(seed)
    for dtype in ("float32", "bfloat16"):
        try:
            kind = machine.dtype(dtype)
        except Unavailable as reason:
            say(reason)
            continue
        for shape, axis in SMALL:
            x, dy, residual = (machine.send(rng.normal(size=shape).astype(kind)) for _ in range(3))
            C = shape[axis]
            parameters = [machine.send(np.ones(C, np.float32)) for _ in range(4)]
            options = {"axis": axis, "activation": "relu"}
            y, mean, rstd = nbnorm.batch_norm_forward(x, *parameters, residual=residual, **options)
            gamma, beta = parameters[:2]
            nbnorm.batch_norm_backward(dy, x, gamma, mean, rstd, y=y, **options)
            nbnorm.batch_norm_backward(dy, x, gamma, mean, rstd, beta=beta, **options)
            nbnorm.batch_norm_inference(x, *parameters, axis=axis)
            machine.sync()
            say(f"small: {dtype} {shape}")
    say("small: done")
