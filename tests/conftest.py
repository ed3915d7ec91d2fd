"""Options and fixtures of all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from fault_table import fault_table

# How long an example takes says more of the machine than of the code.
settings.register_profile("trietune", deadline=None)
settings.load_profile("trietune")
GOLDEN = Path(__file__).parent / "golden"


# What `nohup` and a shell's background jobs ignore is passed on to every process that a test starts, and a signal that
# was ignored at the start stays ignored by TrieTune.
for _number in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(_number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--refresh-golden", action="store_true", help="write golden files anew; read the difference in git"
    )


def pytest_collection_finish() -> None:
    """Take what steers tests out of the environment: TrieTune refuses a variable TRIETUNE_... that names no key."""
    for name in [name for name in os.environ if name.startswith("TRIETUNE_") and name != "TRIETUNE_CACHE"]:
        del os.environ[name]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    lines = fault_table(report for report in reports if report.when == "call")
    if lines:
        terminalreporter.section("fault matrix")
        terminalreporter.write("\n".join([*lines, ""]))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)`: the text equals `tests/golden/<name>`, or becomes it with `--refresh-golden`."""
    is_refresh = bool(request.config.getoption("--refresh-golden"))

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if is_refresh:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"tests/golden/{name} is not there; `pytest --refresh-golden` writes it"
        assert text == path.read_text(encoding="utf-8"), f"differs from tests/golden/{name}"

    return check
