"""Settings shared by all tests."""

import pytest
from hypothesis import settings

# The first call of a kernel compiles it, which no deadline survives; examples are derived from
# the test's name alone, so that a red run is red again on the next machine.
settings.register_profile("nbnorm", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("nbnorm")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-skips", action="store_true", help="a skipped test fails the run (everything is there)"
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.getoption("--no-skips") and reporter and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
