"""A pytest plugin for runs on a GPU that may hang, crash or lose the GPU's context.

    FASTDIFF_RECORDS=FOLDER [FASTDIFF_SHARD=0/14] pytest -p benchmarks.gpu.pytest_records ...

Every process writes what it began and ended to a file of its own in FOLDER, so that the results
survive it. A test that breaks the GPU's context ends its process, because everything behind it
would fail too; so does one that takes longer than FASTDIFF_TEST_SECONDS. What FOLDER says was
begun, on any day, is not run again. FASTDIFF_SHARD takes every n-th block of tests.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

LOST = 3  # exit status
BLOCK = 8  # neighbours share kernels: to one process, or each would compile them


def _folder() -> Path:
    return Path(os.environ["FASTDIFF_RECORDS"])


def _write(**record: Any) -> None:
    worker = os.environ.get("PYTEST_XDIST_WORKER", os.environ.get("FASTDIFF_SHARD", "all"))
    name = f"{worker.replace('/', '-')}-{os.getpid()}.jsonl"
    with (_folder() / name).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _leave(**record: Any) -> None:
    """Record the end of a test, and end the process: nothing of it can be trusted."""
    _write(**record)
    sys.stdout.flush()
    os._exit(LOST)


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Every test that was begun: {"outcome": ..., "text": ...}; "running" where it has no end."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        text = path.read_text(encoding="utf-8")
        for line in text[: text.rfind("\n") + 1].splitlines():
            record = json.loads(line)
            if "begin" in record:
                found[record["begin"]] = {"outcome": "running", "text": ""}
            else:
                found[record["end"]] = {"outcome": record["outcome"], "text": record["text"]}
    return found


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shard = os.environ.get("FASTDIFF_SHARD")
    if shard is None:  # xdist shares them out
        return
    index, count = map(int, shard.split("/"))
    begun = read(_folder())
    mine = [
        item
        for place, item in enumerate(items)
        if place // BLOCK % count == index and item.nodeid not in begun
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in mine])
    items[:] = mine


_outcome: dict[str, Any] = {}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, None]:
    seconds = float(os.environ.get("FASTDIFF_TEST_SECONDS", "90"))
    late = {"end": item.nodeid, "outcome": "failed", "text": f"no end after {seconds:.0f} s"}
    alarm = threading.Timer(seconds, _leave, kwargs=late)
    alarm.daemon = True
    _outcome.clear()
    _write(begin=item.nodeid)
    alarm.start()
    outcome = yield
    alarm.cancel()
    if isinstance(outcome.exception, KeyboardInterrupt):
        return  # stopped from outside: it has no end
    _write(end=item.nodeid, **{"outcome": "error", "text": "", **_outcome})


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    report = (yield).get_result()
    if report.failed:
        kind = "failed" if report.when == "call" else "error"
        text = report.longreprtext[-3000:]
        if why := _lost():
            _leave(end=item.nodeid, outcome=kind, text=f"{text}\nthe GPU's context broke: {why}")
        _outcome.update(outcome=kind, text=text)
    elif _outcome.get("outcome") in ("failed", "error"):
        pass
    elif report.skipped:
        _outcome.update(outcome="skipped", text="")
    elif report.when == "call":
        _outcome.update(outcome="passed", text="")


def _lost() -> str:
    """What the GPU's context says, where it is broken."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return str(error).splitlines()[0]
    return ""
