"""Options of the benchmarks, and the table at their end.

The rows also go to the file that `--rows FILE` names, as JSON.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from . import harness
from .bench_ops import Options

ROWS: list[harness.Row] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastdiff")
    group.addoption("--compile", action="store_true", help="torch.compile as a rival on a CPU, too")
    group.addoption("--max-autotune", action="store_true", help="and with mode max-autotune")
    group.addoption(
        "--full", action="store_true", help="on a CPU: the paper's shapes, many minutes"
    )
    group.addoption("--threads", type=int, help="threads of a CPU")
    group.addoption("--rounds", type=int, help="at most so many rounds of a case on a CPU (15)")
    group.addoption("--seconds", type=float, help="no round begins after so many (0.7)")
    group.addoption("--rows", metavar="FILE", help="write every row as JSON")


def pytest_configure(config: pytest.Config) -> None:
    # What rivals and torch.compile warn of is no error here, as it is in the tests.
    config.addinivalue_line("filterwarnings", "default")
    for kind in ("DeprecationWarning", "ResourceWarning"):  # webdataset leaves its files open
        config.addinivalue_line("filterwarnings", f"ignore::{kind}")
    if threads := config.getoption("--threads", None):
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def bench_options(request: pytest.FixtureRequest) -> Options:
    gpu, most = torch.cuda.is_available(), request.config.getoption("--max-autotune")
    compiled = gpu or most or request.config.getoption("--compile")
    if gpu:
        torch.backends.cudnn.benchmark = True
        return Options(compile=compiled, max_autotune=most)
    rounds, seconds = (request.config.getoption(name) for name in ("--rounds", "--seconds"))
    return Options(compile=compiled, max_autotune=most, rounds=rounds or 15, seconds=seconds or 0.7)


@pytest.fixture
def results() -> list[harness.Row]:
    return ROWS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if ROWS:
        terminalreporter.section("fastdiff")
        terminalreporter.write_line(harness.table(ROWS))
    write(terminalreporter.config)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Rows are written as they come: a run of hours may be ended."""
    write(item.config)


def write(config: pytest.Config) -> None:
    """The rows so far, to the file that `--rows` names."""
    if path := config.getoption("--rows"):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        found = {"environment": harness.environment(device), "rows": ROWS}
        Path(path).write_text(json.dumps(found) + "\n")


def pytest_exception_interact(
    node: pytest.Item, call: pytest.CallInfo[object], report: pytest.TestReport
) -> None:
    """A refused case stands in the table and in the results, too."""
    if call.excinfo is not None and call.excinfo.errisinstance(harness.Refused):
        ROWS.append({"case": node.name, "failed": f"refused: {call.excinfo.value}"})
