"""Examples in docstrings, README and pages run; importing nbnorm imports only what it needs."""

import doctest
import importlib
import importlib.util
import os
import pkgutil
import re
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest
from children import run_child

import nbnorm

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
BLOCK = r"^```python\n(.*?)^```$"

MODULES = sorted(
    module.name
    for package in (nbnorm, nbnorm.cpu)
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    if not module.name.rpartition(".")[2].startswith("_")
    # Host frameworks and GPUs have their own tests, which run where they are installed.
    and module.name not in ("nbnorm.integrations", "nbnorm.cuda", "nbnorm.distributed")
)


@pytest.mark.parametrize("name", ["nbnorm", *MODULES])
def test_doctests(name):
    module = importlib.import_module(name)
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, _ = doctest.testmod(module, optionflags=options)
    assert failed == 0


def test_doctests_are_found():
    examples = doctest.DocTestFinder().find(importlib.import_module("nbnorm.functional"))
    assert sum(len(test.examples) for test in examples) > 10


def test_readme_blocks_run_in_order(tmp_path, monkeypatch):
    blocks = re.findall(BLOCK, (ROOT / "README.md").read_text(), re.M | re.S)
    assert blocks
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    for i, block in enumerate(blocks):
        exec(compile(block, f"README.md, block {i + 1}", "exec"), namespace)


def sections_of(page):
    """Return {title: Python blocks} of all sections that have blocks."""
    sections, title = {}, ""
    # Match blocks as a whole: their comments look like headings.
    for block in re.finditer(
        r"^```(\w*)[^\n]*\n(.*?)^```$|^#+ ([^\n]*)$", page.read_text(encoding="utf-8"), re.M | re.S
    ):
        language, code, heading = block.groups()
        title = heading or title
        if language == "python":
            sections.setdefault(title, []).append(code)
    return sections


SECTIONS_RUN = [
    pytest.param(blocks, id=f"{page.name}: {title}")
    for page in sorted((ROOT / "docs").glob("*.md"))
    if page.name != "integrations.md"  # tests/integrations/test_page.py runs it
    for title, blocks in sections_of(page).items()
]


def test_sections_are_found():
    assert len(SECTIONS_RUN) > 20
    page = "# One\n```python\n# no heading\na = 1\n```\n## Two\n```sh\n# nor this\n```\n"
    with NamedTemporaryFile("w", suffix=".md") as file:
        file.write(page)
        file.flush()
        assert sections_of(Path(file.name)) == {"One": ["# no heading\na = 1\n"]}


# Keras converts its variables to NumPy arrays in a way that NumPy deprecates.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("blocks", SECTIONS_RUN)
def test_sections_of_the_docs_run(blocks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "KERAS_BACKEND" not in os.environ:
        monkeypatch.setenv("KERAS_BACKEND", "numpy")
    imported = re.findall(r"^(?:import|from) (\w+)", "".join(blocks), re.M)
    for name in imported:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    # The settings of torchrun for torch.distributed.
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    namespace = {"__name__": "section"}
    for i, block in enumerate(blocks):
        exec(compile(block, f"block {i + 1}", "exec"), namespace)


def test_import_compiles_nothing_and_brings_no_framework():
    code = """
import sys
from numba.core import event
with event.install_recorder("numba:compile") as compilations:
    import nbnorm
assert not compilations.buffer, compilations.buffer
found = {"torch", "jax", "cupy", "matplotlib", "ml_dtypes", "pytest"} & set(sys.modules)
assert not found, found
assert "nbnorm.reference" not in sys.modules
"""
    run_child("-c", code)


def test_a_first_call_brings_no_framework_either():
    code = """
import sys, numpy, nbnorm
x = numpy.ones((4, 3), "float32")
y, mean, rstd = nbnorm.batch_norm_forward(x)
nbnorm.batch_norm_backward(x, x, None, mean, rstd)
found = {"torch", "jax", "cupy", "matplotlib", "ml_dtypes"} & set(sys.modules)
assert not found, found
"""
    run_child("-c", code)


def test_module_run_as_a_program_shows_the_configuration():
    assert nbnorm.__version__ in run_child("-m", "nbnorm")
