"""The documentation is correct: its examples run, and every public name has a docstring."""

import doctest
import importlib
import importlib.util
import inspect
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
SECTIONS = r"^ *{}\n *-{{{}}}$"

MODULES = sorted(
    module.name
    for package in (nbnorm, nbnorm.cpu)
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    if not module.name.rpartition(".")[2].startswith("_")
    # Host frameworks and GPUs have their own tests, which run where they are installed.
    and module.name not in ("nbnorm.integrations", "nbnorm.cuda", "nbnorm.distributed")
)
# Public modules whose names are not in `nbnorm` itself.
OF_THEIR_OWN = ("conventions", "distributed")
FUNCTIONS = [name for name in nbnorm.__all__ if inspect.isfunction(getattr(nbnorm, name))]


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


PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("benchmarks/*.md")])
PAGES = [page for page in PAGES if not {"generated", "_build"} & set(page.parts)]


def places_in(page):
    """Return the anchors of a page's headings on code hosts."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_files_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        address, _, place = link.partition("#")
        if "://" in address:
            continue
        target = page.parent / address if address else page
        assert target.exists(), link
        assert not place or place in places_in(target), link


def test_the_reference_lists_every_public_name():
    listed = set(re.findall(r"^   ~?(nbnorm\.[\w.]+)$", (ROOT / "docs/api.rst").read_text(), re.M))
    package = ROOT / "nbnorm"
    modules = [*package.glob("integrations/[a-z]*"), package / "reference.py"]
    modules += [path for path in package.glob("[a-z]*") if path.stem in OF_THEIR_OWN]
    expected = {f"nbnorm.{name}" for name in nbnorm.__all__}
    expected |= {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules}
    assert listed == expected


def test_all_names_what_there_is():
    assert len(set(nbnorm.__all__)) == len(nbnorm.__all__)
    for name in nbnorm.__all__:
        assert hasattr(nbnorm, name), name


def has_section(docstring, title):
    """Return whether there is a numpydoc section with this title."""
    return re.search(SECTIONS.format(title, len(title)), docstring, re.M) is not None


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_of_functions(name):
    function = getattr(nbnorm, name)
    docstring = inspect.getdoc(function)
    signature = inspect.signature(function)
    assert docstring
    assert has_section(docstring, "Examples")
    assert ">>> " in docstring
    if signature.parameters:
        assert has_section(docstring, "Parameters")
        assert has_section(docstring, "Raises")
        documented = docstring.partition("Parameters\n")[2].partition("\nReturns\n")[0]
        for parameter in signature.parameters:
            assert re.search(rf"^[\w, *]*\b{parameter}\b[\w, ]* : ", documented, re.M), parameter
    if signature.return_annotation not in (None, "None"):
        assert has_section(docstring, "Returns")


@pytest.mark.parametrize("name", [n for n in nbnorm.__all__ if inspect.isclass(getattr(nbnorm, n))])
def test_docstrings_of_classes_and_methods(name):
    cls = getattr(nbnorm, name)
    assert inspect.getdoc(cls)
    for attribute, member in vars(cls).items():
        if not attribute.startswith("_") and inspect.isfunction(member):
            assert member.__doc__, f"{name}.{attribute}"


def test_public_functions_are_typed():
    for name in FUNCTIONS:
        signature = inspect.signature(getattr(nbnorm, name))
        assert signature.return_annotation is not inspect.Signature.empty, name
        for parameter in signature.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, f"{name}({parameter})"


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


def test_one_least_version_of_numba_cuda():
    """The error and the page name the version in pyproject.toml; tests use no older one."""
    pattern = r"numba-cuda(?:\[cu13\])?(?:>=|==| | later than )(\d+)\.(\d+)"
    files = "pyproject.toml", "nbnorm/cuda/loading.py", "docs/gpu.md", "tests/cuda/toolchain.txt"
    asked, named, told, pinned = (
        re.findall(pattern, (ROOT / file).read_text(encoding="utf-8")) for file in files
    )
    assert len(asked) == len(pinned) == 1
    assert named == told == asked
    assert tuple(map(int, pinned[0])) >= tuple(map(int, asked[0]))


def test_who_cites_cites_this_version():
    for name, line in (("README.md", "  version = {{{}}},"), ("CITATION.cff", "version: {}")):
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        assert line.format(nbnorm.__version__) in lines, name


def test_ci_runs_every_step_of_the_gate():
    files = ".ci/run", ".github/workflows/ci.yml"
    gate, workflow = ((ROOT / file).read_text(encoding="utf-8") for file in files)
    groups = re.findall(r'^(?:shared|apart|single)="(.*)"', gate, re.M)
    steps = {name for group in groups for name in group.split()}
    titled = re.findall(r"^(\w+)\(\) [({]  # \w", gate, re.M)
    assert steps <= set(titled)
    lines = re.findall(r"^ +- (?:run: \.ci/run )?([a-z_ ]+)$", workflow, re.M)
    called = {name for line in lines for name in line.split()}
    assert called == steps - {"pythons"}  # there every step runs on every Python
