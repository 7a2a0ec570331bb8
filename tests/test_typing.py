"""Type checking: functions return the type of array they take, and misspelt names are errors."""

import re
import sys
from pathlib import Path

import pytest

api = pytest.importorskip("mypy.api", reason="types are checked by mypy")

PROGRAM = """
from typing import reveal_type

import numpy as np
from numpy.typing import NDArray

import nbnorm
from nbnorm import BatchNorm, reference
from nbnorm.distributed import SelfComm, SyncBatchNorm, sync_batch_norm_forward


class Tensor:
    ...


x: NDArray[np.float32] = np.ones((4, 3), np.float32)
running = np.zeros(3), np.ones(3)
result = nbnorm.batch_norm_forward(x, None, None, *running, activation="relu")
reveal_type(result.y)  # FLOATS
y, mean, rstd = nbnorm.batch_norm_forward(Tensor())
reveal_type(y)  # TENSOR
gradients = nbnorm.batch_norm_backward(x, x, None, mean, rstd)
gradients.dx.sum(), gradients.dgamma.sum()
reveal_type(gradients.dx)  # FLOATS
reveal_type(nbnorm.batch_norm_inference(x, None, None, *running))  # FLOATS
reveal_type(nbnorm.batch_norm_apply(x, None, None, mean, rstd))  # FLOATS
stats = nbnorm.batch_norm_stats(x)
reveal_type(stats.count)  # int
sums = nbnorm.batch_norm_backward_reduce(x, x, mean, rstd)
reveal_type(nbnorm.batch_norm_backward_apply(x, x, None, mean, rstd, *sums, 4))  # FLOATS
reveal_type(nbnorm.update_running_stats(*running, stats)[0])  # DOUBLES
layer = BatchNorm(3, activation=None)
reveal_type(layer.forward(x))  # FLOATS
reveal_type(layer(x, x))  # FLOATS
reveal_type(layer(Tensor()))  # TENSOR
weight = x.T @ layer.backward(x)
reveal_type(SyncBatchNorm(3, comm=SelfComm())(x))  # FLOATS
reveal_type(sync_batch_norm_forward(x, comm=SelfComm()).y)  # FLOATS
reveal_type(reference.batch_norm_forward(x).y)  # ARRAY
reveal_type(nbnorm.conventions.load("keras", [x, x, x, x]))  # nbnorm.layer.BatchNorm
"""
MEANINGS = {
    "FLOATS": r"numpy\.ndarray\[.*float.*32.*\]",
    "DOUBLES": r"numpy\.ndarray\[.*float.*64.*\]",
    "ARRAY": r"numpy\.ndarray\[.*\]",
    "TENSOR": r".*\.Tensor",
    "int": r"(builtins\.)?int",
}
WRONG = """
import numpy as np
import nbnorm

x = np.ones((4, 3))
nbnorm.batch_norm_forward(x, activation="elu")
nbnorm.BatchNorm(3, activation="Relu")
nbnorm.batch_norm_backward(x, x, None, x, x, beta=None, activation="atan")
nbnorm.batch_norm_forward(x).z
"""


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """Return mypy's errors and notes, by program and line."""
    folder = tmp_path_factory.mktemp("typing")
    for name, program in ("right", PROGRAM), ("wrong", WRONG):
        (folder / f"{name}.py").write_text(program)
    root = Path(__file__).parents[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYPYPATH", str(root))
        options = ["--config-file=", "--follow-imports=silent", f"--cache-dir={folder / 'cache'}"]
        options += [f"--python-executable={sys.executable}", "--ignore-missing-imports"]
        output, errors, _ = api.run([*options, str(folder / "right.py"), str(folder / "wrong.py")])
    assert not errors
    found = {"right": {}, "wrong": {}}
    for line in output.splitlines():
        place = re.match(r".*(right|wrong)\.py:(\d+): (error|note): (.*)", line)
        if place is not None:
            found[place[1]].setdefault(int(place[2]), []).append((place[3], place[4]))
    return found


def test_arrays_that_go_in_come_out(checked):
    lines = PROGRAM.splitlines()
    revealed = {number: line for number, line in enumerate(lines, 1) if "  # " in line}
    assert not [m for messages in checked["right"].values() for m in messages if m[0] == "error"]
    for number, line in revealed.items():
        meaning = line.rpartition("  # ")[2]
        [(_, message)] = checked["right"][number]
        [kind] = re.findall('"(.*)"', message)
        assert re.search(MEANINGS.get(meaning, re.escape(meaning)), kind), (line, kind)
        assert kind != "Any"


def test_what_is_misspelt_is_an_error(checked):
    wrong = [n for n, line in enumerate(WRONG.splitlines(), 1) if re.match(r"nbnorm\.", line)]
    assert sorted(checked["wrong"]) == wrong
    assert all(message[0][0] == "error" for message in checked["wrong"].values())
