"""Submodules are attributes of the package, imported on first use."""

import subprocess
import sys

import pytest

import nbnorm

SUBMODULES = ["conventions", "distributed", "integrations", "reference"]
HOSTS = ["autograd", "mygrad", "onnx", "sklearn", "thinc", "torch"]


def run(code):
    """Run a program in a child process: this process has imported everything already."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_none_of_them():
    code = "import sys, nbnorm; print(*(name for name in sys.modules if name.startswith('nbnorm')))"
    imported = run(code).split()
    assert not {f"nbnorm.{name}" for name in SUBMODULES} & set(imported)
    assert not [name for name in imported if name.startswith("nbnorm.integrations")]


@pytest.mark.parametrize("name", SUBMODULES)
def test_a_submodule_is_an_attribute(name):
    assert run(f"import nbnorm; print(nbnorm.{name}.__name__)").strip() == f"nbnorm.{name}"


@pytest.mark.parametrize("name", HOSTS)
def test_a_host_is_an_attribute(name):
    pytest.importorskip(name)
    code = f"import nbnorm; print(nbnorm.integrations.{name}.batch_norm.__module__)"
    if name in ("thinc", "onnx", "sklearn"):
        code = f"import nbnorm; print(nbnorm.integrations.{name}.__name__)"
    assert run(code).strip() == f"nbnorm.integrations.{name}"


def test_a_host_that_is_not_installed_is_an_import_error():
    code = """
import sys, nbnorm
sys.modules["thinc"] = None
try:
    nbnorm.integrations.thinc
except ImportError as error:
    assert "thinc" in str(error)
else:
    raise AssertionError
"""
    run(code)


@pytest.mark.parametrize("module", [nbnorm, nbnorm.integrations])
def test_other_names_are_attribute_errors(module):
    with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'relu'"):
        _ = module.relu
    assert not hasattr(module, "__wrapped__")


def test_they_are_listed_and_not_imported_by_it():
    code = """
import sys, nbnorm
print(*dir(nbnorm))
assert "nbnorm.conventions" not in sys.modules
"""
    assert {*SUBMODULES, *nbnorm.__all__} <= set(run(code).split())
    assert set(HOSTS) <= set(dir(nbnorm.integrations))


def test_a_star_takes_no_submodule():
    run("import sys; from nbnorm import *; assert 'nbnorm.conventions' not in sys.modules")
