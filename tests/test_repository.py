"""Files of the repository agree: docstrings, links, versions, the gate and the workflow."""

import inspect
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import nbnorm

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = r"^ *{}\n *-{{{}}}$"

# Public modules whose names are not in `nbnorm` itself.
OF_THEIR_OWN = ("conventions", "distributed")
FUNCTIONS = [name for name in nbnorm.__all__ if inspect.isfunction(getattr(nbnorm, name))]

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


@pytest.mark.skipif(shutil.which("bash") is None, reason="the gate is written in bash")
def test_ci_runs_every_step_of_the_gate():
    listed = subprocess.run(["bash", ".ci/run", "--list"], cwd=ROOT, capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr
    steps = dict(line.split(maxsplit=1) for line in listed.stdout.splitlines())
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    lines = re.findall(r"^ +- (?:run: \.ci/run )?([a-z_ ]+)$", workflow, re.M)
    called = {name for line in lines for name in line.split()}
    assert called == steps.keys() - {"pythons"}  # in CI the steps run on every Python
