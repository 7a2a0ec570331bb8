"""Settings shared by all tests, and the backend that they run on."""

import gc
from collections.abc import Callable, Iterator
from itertools import filterfalse

import backends
import numba
import pytest
import strategies
from hypothesis import Phase, settings

# The first call of a kernel compiles it, which would exceed any deadline. Examples derive from the
# test's name alone, so that a failure repeats on any machine.
settings.register_profile("nbnorm", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("nbnorm")
# For `--hypothesis-profile few`: enough examples for coverage to reach every line.
settings.register_profile("few", settings.get_profile("nbnorm"), max_examples=4)


# Tests of NumPy's memory layouts or of CPU threads, and tests that use no backend.
CPU_ONLY = (
    *("arithmetic", "benchmarks", "cache", "config", "conventions", "demo", "demo_browser"),
    *("digits", "distributed", "docs", "examples", "interop", "layer", "mutants", "plan", "pool"),
    *("population", "reference", "repository", "resume", "site", "sources", "streaming"),
    *("threads", "warmup", "autograd", "mygrad"),
    *("torch_convert", "torch_fold", "torch_functional", "torch_modules", "torch_operators"),
    *("torch_package", "torch_recalibrate", "torch_transforms"),
)
# Files whose half-precision cases are slow: each dtype compiles its own kernels.
HALVES_ARE_SLOW = (
    *("accuracy", "distributed", "integers", "microbatch", "population", "results", "rows"),
    *("streaming", "warmup"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", choices=["numpy", *backends.EXCHANGES], default="numpy")
    parser.addoption(
        "--no-skips", action="store_true", help="a skipped test fails the run (everything is there)"
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.getoption("--no-skips") and reporter and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_configure(config: pytest.Config) -> None:
    name = config.getoption("--backend")
    if _asks_for_nothing(config):
        strategies.drawn[:] = ("float32", "float64")
    if name == "simulator":
        # On the simulator an example takes a second: run few, and do not shrink them.
        phases = [phase for phase in Phase if phase is not Phase.shrink]
        nbnorm = settings.get_profile("nbnorm")
        settings.register_profile("simulator", nbnorm, max_examples=10, phases=phases)
        settings.load_profile("simulator")
    if missing := backends.missing(name):  # a run that skips every test would look like a pass
        raise pytest.UsageError(f"--backend {name}: {missing}")
    if name != "numpy":
        backends.install(backends.EXCHANGES[name]())


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if addresses := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"two processes would name these tests differently: {addresses}")
    for item in filter(_compiles_for_halves, items):
        item.add_marker("slow")
    if _asks_for_nothing(config):
        _deselect(config, items, _is_slow)
    if config.getoption("--backend") in backends.ON_DEVICE:
        _deselect(config, items, _is_about_the_cpu)


def pytest_collection_finish() -> None:
    """Collect garbage less often: a compiler's objects live long, and it took 4 % of a run."""
    gc.freeze()
    gc.set_threshold(10_000)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run `pytest` alone in two processes, and a selection of tests in one."""
    return 2 if _asks_for_nothing(config) else 0


@pytest.fixture
def thread_count() -> Iterator[int]:
    """Yield the number of threads; restore it after the test."""
    before = numba.get_num_threads()
    yield before
    numba.set_num_threads(before)


def _asks_for_nothing(config: pytest.Config) -> bool:
    """Return whether this is `pytest` alone: no file, no -k and no -m."""
    given = config.args_source is pytest.Config.ArgsSource.ARGS
    return not (given or config.option.keyword or config.option.markexpr)


def _deselect(
    config: pytest.Config, items: list[pytest.Item], unwanted: Callable[[pytest.Item], bool]
) -> None:
    config.hook.pytest_deselected(items=list(filter(unwanted, items)))
    items[:] = filterfalse(unwanted, items)


def _compiles_for_halves(item: pytest.Item) -> bool:
    """Return whether this is a half-precision case of a slow file: it compiles for up to a minute.

    `pytest` alone runs test_halves.py, which compares halves with float32.
    """
    file = item.path.stem.removeprefix("test_")
    params = getattr(item, "callspec", None)
    return (
        file in HALVES_ARE_SLOW
        and params is not None
        and any("float16" in str(value) for value in params.params.values())
    )


def _is_slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None


def _is_about_the_cpu(item: pytest.Item) -> bool:
    file = item.path.stem.removeprefix("test_")
    return file in CPU_ONLY or item.get_closest_marker("cpu_only") is not None
