"""The CUDA backend on the simulator: all tests of simulated.py, in a child process.

The simulator replaces modules, so no other test may share its process.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import nbnorm

pytestmark = pytest.mark.slow

FILE = Path(__file__).with_name("simulated.py")
TESTS = [
    node.name
    for node in ast.parse(FILE.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """Run the selected tests of simulated.py; return their cases by test name."""
    wanted = {
        item.callspec.params["name"]
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    }
    report = tmp_path_factory.mktemp("simulated") / "report.xml"
    tests = [f"{FILE}::{name}" for name in TESTS if name in wanted]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *tests],
        env={**os.environ, "PYTHONPATH": str(Path(nbnorm.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert report.exists(), child.stdout[-4000:] + child.stderr[-4000:]
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        found.setdefault(case.get("name").partition("[")[0], []).append(case)
    return found


@pytest.mark.parametrize("name", TESTS)
def test_simulated(name, outcomes):
    cases = outcomes[name]
    wrong = [(case, problem) for case in cases for problem in case if problem.tag != "skipped"]
    if wrong:
        _, problem = wrong[0]
        failed = [case.get("name") for case, _ in wrong]
        pytest.fail(f"{len(wrong)} of {len(cases)}: {failed}\n{problem.text}", pytrace=False)
    assert any(len(case) == 0 for case in cases), "none of its cases ran"
