"""Modules import only from their own and lower layers, never in a circle, even within functions.

Names that benchmarks, examples and tests import from the package must exist. Imports are read from
the source, so neither hosts nor CUDA need be installed. Python's implicit imports of a module's
parent packages do not count.
"""

import ast
from fnmatch import fnmatch
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import nbnorm

PACKAGE = Path(nbnorm.__file__).parent

# A module imports from its own layer and from lower ones. The first matching pattern counts.
LAYERS = (
    ("nbnorm", "nbnorm.__main__", "nbnorm.config"),
    ("nbnorm._demo*",),
    ("nbnorm.integrations*",),
    (
        *("nbnorm.distributed*", "nbnorm.population", "nbnorm.microbatch", "nbnorm._sweeps"),
        *("nbnorm.conventions", "nbnorm._warmup"),
    ),
    # cpu.overloads implements functional's calls for compiled code, beside the kernels.
    ("nbnorm.layer", "nbnorm.reference", "nbnorm.cpu.overloads"),
    ("nbnorm.renorm", "nbnorm._rows"),
    ("nbnorm.functional", "nbnorm.second_order"),
    ("nbnorm._segments",),
    ("nbnorm._weights", "nbnorm._integers"),
    (
        *(
            "nbnorm._pairwise",
            "nbnorm._frame",
            "nbnorm._shortcut",
            "nbnorm.folding",
            "nbnorm.moments",
        ),
        *("nbnorm._sources", "nbnorm._checkpoint"),
    ),
    ("nbnorm._arrays",),
    ("nbnorm._checks",),
    ("nbnorm.cpu", "nbnorm.cuda"),
    ("nbnorm.cpu.*", "nbnorm.cuda.*"),
    ("nbnorm._files", "nbnorm._kernel_axes", "nbnorm._layout", "nbnorm._running", "nbnorm.pool"),
    ("nbnorm._typing", "nbnorm._version", "nbnorm.activations"),
)


def name_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name):
    """Yield the modules of nbnorm that a module imports anywhere."""
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import, which this test does not check"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if submodule in MODULES:
                    yield submodule
                elif node.module in MODULES:
                    yield node.module


def bound(name):
    """Return the names that a module binds outside functions, and its submodules."""
    names = {other.rpartition(".")[2] for other in MODULES if other.rpartition(".")[0] == name}
    statements = list(ast.parse(MODULES[name].read_text(encoding="utf-8")).body)
    for node in statements:  # the list grows by what is inside an `if` or a `try`
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names.update(each.id for each in ast.walk(node) if isinstance(each, ast.Name))
        else:
            inner = ast.iter_child_nodes(node)
            statements += [each for each in inner if isinstance(each, ast.stmt)]
    return names


GRAPH = {name: sorted(set(imports(name))) for name in MODULES}


def layer(name):
    """Return a module's layer, counted from the top."""
    for i, patterns in enumerate(LAYERS):
        if any(fnmatch(name, pattern) for pattern in patterns):
            return i
    raise AssertionError(f"{name} is in no layer")


def test_there_is_something_to_look_at():
    assert "nbnorm.functional" in GRAPH["nbnorm.layer"]
    assert "nbnorm.cpu.kernels" in GRAPH["nbnorm.cpu"]
    assert "nbnorm.cuda" in GRAPH["nbnorm._arrays"]  # imported within a function
    assert "nbnorm.cpu" in GRAPH["nbnorm.cpu.overloads"]  # which imports a name from it


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_from_below(name):
    upwards = [other for other in GRAPH[name] if layer(other) < layer(name)]
    assert not upwards


def test_there_is_no_circle():
    TopologicalSorter(GRAPH).prepare()  # raises CycleError, which names the circle


def test_backends_know_nothing_of_each_other():
    for name, others in GRAPH.items():
        for one, other in ("nbnorm.cpu", "nbnorm.cuda"), ("nbnorm.cuda", "nbnorm.cpu"):
            if name.startswith(one):
                assert not [found for found in others if found.startswith(other)], name


def test_benchmarks_examples_and_tests_import_what_is_there():
    """Most need libraries that may be missing, so their imports are read and not run."""
    there = {name: bound(name) for name in MODULES}
    imported = 0
    for folder in ("benchmarks", "docs", "tests"):
        for path in (PACKAGE.parent / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module in there:
                    missing = {alias.name for alias in node.names} - there[node.module]
                    assert not missing, f"{path} imports {missing} from {node.module}"
                    imported += 1
    assert imported > 100
