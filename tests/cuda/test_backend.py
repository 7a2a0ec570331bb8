"""Tests of the CUDA backend's interface, which do not need CUDA."""

import ast
from pathlib import Path

import pytest
from children import run_child

import nbnorm

PACKAGE = Path(nbnorm.__file__).parent


def functions(backend, file):
    """Return {name: arguments} of the public functions in a backend's file, unexecuted."""
    tree = ast.parse((PACKAGE / backend / file).read_text())
    return {
        node.name: {field: ast.dump(value) for field, value in _fields(node.args)}
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }


def _fields(arguments):
    """Yield names, kinds and defaults of arguments, but not their types."""
    for node in ast.walk(arguments):
        if isinstance(node, ast.arg):
            node.annotation = None
    for field, value in ast.iter_fields(arguments):
        yield field, ast.List(value if isinstance(value, list) else [value])


def test_both_backends_have_the_same_functions():
    assert functions("cuda", "__init__.py") == functions("cpu", "__init__.py")


def test_there_is_something_to_compare():
    found = functions("cpu", "__init__.py")
    assert {"stats", "apply", "forward", "rstd", "move"} <= set(found)
    assert "'activation'" in found["apply"]["args"]


MODULES = ("numba.cuda", "numba_cuda", "cupy", "cuda", "nbnorm.cuda")


@pytest.mark.parametrize(
    "use",
    [
        "",
        "import numpy as np; nbnorm.batch_norm_forward(np.ones((4, 3), np.float32))",
        "import nbnorm.cpu, nbnorm.reference, nbnorm.folding, nbnorm.layer",
    ],
    ids=["import", "call", "modules"],
)
def test_nothing_of_cuda_is_imported_before_it_is_needed(use):
    code = f"""
import sys, nbnorm
{use}
loaded = [name for name in {MODULES} if name in sys.modules]
print(loaded)
"""
    assert run_child("-W", "error", "-c", code).strip() == "[]"
