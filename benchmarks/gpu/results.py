"""What a run found: rows, files that are rewritten as rows arrive, and the summary at the end."""

from __future__ import annotations

import functools
import gzip
import io
import json
import os
import re
import tarfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# A reader may see the end of the output alone.
SUMMARY = 11_000
LARGEST = 15 << 20  # bytes of a file
LOG_HEAD, LOG_TAIL = 200_000, 800_000  # bytes of each log that are kept
HEADER = ("case", "direction", "us", "floor", "best rival", "x", "goal")
NAMED = 25  # failed tests in the summary


class Results:
    """Everything that the steps found.

    Args:
        folder: where the files go: NAME.json, NAME.md and NAME-logs.tar.gz.
        minutes: of the run.
        dry: on a CPU, tiny.
    """

    def __init__(self, folder: Path, minutes: float, dry: bool) -> None:
        self.folder, self.minutes, self.dry = folder, minutes, dry
        self.started = time.time()
        self.environment: Row = {}
        self.plan: list[str] = []
        self.ceilings: Row = {}
        self.checks: dict[str, Any] = {}
        self.tests: Row = {"summary": "not run", "failed": []}
        self.tested = False  # tests were planned
        self.rows: list[Row] = []
        self.kernels: list[Row] = []
        self.counters: list[Row] = []
        self.host: Any = None
        self.plans: dict[str, Row] = {}
        self.failed: dict[str, Row] = {}
        self.notes: list[str] = []
        self.skipped: dict[str, list[str]] = {}
        self.took: dict[str, float] = {}
        self.states: dict[str, Row] = {}
        self.cache: Row = {}
        self.stamp = time.strftime("%Y-%m-%d-%H%M", time.gmtime())

    @functools.cached_property
    def path(self) -> Path:
        """Of the JSON file; named at the first call, when the environment should be known."""
        device = self.environment.get("gpu", "cpu" if self.dry else "gpu")
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        return self.folder / f"{slug}-{self.stamp}.json"

    # Events

    def take(self, event: Row, *, extra: bool = False) -> None:
        """One event of a worker: what a case gave, or why it gave nothing.

        Args:
            event: with the step and the case's name.
            extra: a failure is no failure of the run.
        """
        step, name = event["step"], event.get("name", "")
        key = f"{step}: {name}" if name else step
        if "failed" in event:
            if step == "check":
                self.checks[name] = event["failed"]
            if extra:
                self.notes.append(f"{key}: {event['failed']}")
            else:
                self.failed[key] = {k: event[k] for k in ("failed", "log") if k in event}
            return
        self.took[key] = event.get("took", 0.0)
        if event.get("state"):
            self.states[key] = event["state"]
        if "check" in event:
            self.checks[name] = event["check"]
            # The next step checks what had no time or no memory in the first.
            self.failed.pop(f"check: {name}", None)
            if name in self.skipped.get("check", []):
                self.skipped["check"].remove(name)
        self.ceilings |= event.get("ceilings", {})
        for row in event.get("rows", []):
            self.add(row, step)
        self.kernels += event.get("kernels", [])
        self.counters += event.get("counters", [])
        self.notes += event.get("notes", [])
        for preset, values in event.get("plan", {}).items():
            self.plans[preset] = {**self.plans.get(preset, {}), **values}
        if "host" in event:
            self.host = event["host"]

    def add(self, row: Row, step: str) -> None:
        """Add a row; it takes the place of an earlier one of the same case, whose time it keeps."""
        row = {**row, "step": step}
        for index, old in enumerate(self.rows):
            if (old["case"], old["direction"]) == (row["case"], row["direction"]):
                row["earlier_us"] = old["us"]
                self.rows[index] = row
                return
        self.rows.append(row)

    def good(self) -> bool:
        """No case failed, the tests passed, and there are numbers."""
        tests = bool(self.tests.get("good")) or not self.tested
        return not self.failed and tests and bool(self.rows)

    # Files

    def found(self) -> Row:
        """The JSON file."""
        names = (
            *("environment", "minutes", "plan", "ceilings", "checks", "tests", "rows", "kernels"),
            *("counters", "host", "plans", "failed", "notes", "skipped", "took", "states", "cache"),
        )
        values = {name: getattr(self, name) for name in names}
        return {**values, "good": self.good(), "seconds": time.time() - self.started}

    def save(self, closing: bool = False) -> None:
        """Write the files anew, each whole or not at all; the logs are made by `save_logs`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        indent = 1 if closing else None
        text = json.dumps(self.found(), indent=indent, default=str)
        if len(text) > LARGEST:  # the rounds' single samples are the bulk
            for row in self.rows:
                row.pop("samples_us", None)
            text = json.dumps(self.found(), default=str)
        write(self.path, text.encode() + b"\n")
        write(self.path.with_suffix(".md"), self.markdown().encode())

    def save_logs(self, logs: Iterable[Path]) -> None:
        """The children's output in one archive."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for path in logs:
                text = shortened(path.read_bytes())
                entry = tarfile.TarInfo(path.name)
                entry.size = len(text)
                archive.addfile(entry, io.BytesIO(text))
        packed = gzip.compress(buffer.getvalue(), 6)
        if len(packed) <= LARGEST:
            write(self.path.with_name(f"{self.path.stem}-logs.tar.gz"), packed)

    def markdown(self) -> str:
        """The file that one reads first."""
        where = self.environment
        state = ", ".join(f"{k} {v}" for k, v in where.items() if k not in ("date", "commit"))
        text = [
            f"# {where.get('gpu', 'CPU')}, {where.get('date', '')}",
            "",
            f"Commit {where.get('commit')}; {state}.",
            "",
            f"{self.ceiling_line()} Tests: {self.tests['summary']}. {self.cache_line()}".strip(),
            "",
            "Made by `make bench-gpu`; `benchmarks/bench_ops.py` and `benchmarks/bench_models.py`",
            "define the columns. Times are medians of the GPU's own, by graph replay, except those",
            "of training steps, which include Python's.",
            "",
            "```",
            *self.plan,
            "```",
            "",
            "```",
            *self.summary(limit=10**6),
            "```",
        ]
        lists = {
            "Kernels": [
                f"{r['kernel']}: {r['us']:.1f} us in {r['launches']:g} launches, "
                f"{r['direction']} of {r['case']}"
                for r in self.kernels
            ],
            "Hardware counters": [
                f"{r['kernel']}, launch {r['launch']} of {r['case']}: "
                + "; ".join(f"{k} {v}" for k, v in r["metrics"].items())
                for r in self.counters
            ],
            "Figures to beat": sorted(
                {
                    f"{row['figure'][0]}: {row['figure'][1]:.0%} of a copy"
                    for row in self.rows
                    if "figure" in row
                }
            ),
            "Failed": [f"{name}: {event['failed']}" for name, event in self.failed.items()],
            "Notes": self.notes,
            "No time for": [f"{step}: {name}" for step, names in self.skipped.items()
                            for name in names],
            "Tests that failed": self.tests["failed"],
            "Rivals without a number": absences(self.rows),
        }  # fmt: skip
        for title, items in lists.items():
            if items:
                text += ["", f"## {title}", "", *(f"- {item}" for item in items)]
        texts = self.tests.get("texts", {})
        for test, why in texts.items():
            text += ["", f"### {test}", "", "```", why.strip(), "```"]
        return "\n".join(text) + "\n"

    # Lines

    def ceiling_line(self) -> str:
        if not self.ceilings:
            return "Ceilings: not measured."
        copy, product = (self.ceilings.get(name, 0.0) / 1e12 for name in ("copy", "product"))
        return f"Ceilings: copy {copy:.2f} TB/s, bf16 product {product:.0f} TFLOP/s."

    def cache_line(self) -> str:
        if not self.cache:
            return ""
        return (
            f"Compiled kernels: {self.cache.get('prepared', 0)} prepared, "
            f"{self.cache.get('compiled', 0)} compiled in this run."
        )

    def summary(self, limit: int = SUMMARY) -> list[str]:
        """The last lines of the output: the furthest from its goal, a table, what failed."""
        head = [self.ceiling_line()]
        if line := self.cache_line():
            head.append(line)
        aimed = sorted(
            (row for row in self.rows if row.get("goal_share") is not None),
            key=lambda row: row["goal_share"],
        )
        missed = [row for row in aimed if row["goal_share"] < 1]
        if missed:
            worst = missed[0]
            head.append(
                f"Furthest from its goal: {worst['case']}, {worst['direction']}: "
                f"{worst['goal_share']:.0%} of it ({worst['goal']})."
            )
        elif aimed:
            head.append(f"Every goal that was measured is met ({len(aimed)} rows).")
        else:
            head.append("No goal was measured.")
        table = self.table(aimed)
        rest = self.endings()
        room = limit - sum(len(line) + 1 for line in (*head, *rest)) - 80
        shown: list[str] = []
        for line in table:
            room -= len(line) + 1
            if room < 0:
                shown.append(f"... {len(table) - len(shown)} more rows in the .md file")
                break
            shown.append(line)
        return [*head, "", *shown, "", *rest]

    def table(self, aimed: Sequence[Row]) -> list[str]:
        """Rows by distance to their goals, then those without goals."""
        others = [row for row in self.rows if row.get("goal_share") is None]
        rows = [row for row in (*aimed, *others) if row["direction"] != "forward+backward"
                or row.get("goal_share") is not None or "op" not in row]  # fmt: skip
        cells: list[tuple[str, ...]] = [
            ("case", "direction", "us", "floor", "best rival", "x", "goal")
        ]
        cells += [row_cells(row) for row in rows]
        names = {row["case"] for row in self.rows}
        for name, verdict in self.checks.items():
            if name not in names:
                said = verdict if isinstance(verdict, str) else "right, not timed"
                cells.append((short(name), "", "-", "", "", "", f"no number: {said}"[:90]))
        widths = [max(len(line[i]) for line in cells) for i in range(6)]
        lines = []
        for line in cells:
            parts = [
                cell.ljust(width) if i in (0, 1, 4) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=False))
            ]
            lines.append("  ".join([*parts, line[6]]).rstrip())
        return lines

    def endings(self) -> list[str]:
        """Training, counters, tests, failures: the lines below the table."""
        lines = [line for row in self.rows if (line := training_line(row))]
        if self.host:
            lines.append(host_line(self.host))
        if self.counters:
            from . import profiling

            shown = {one["kernel"]: one for one in self.counters}  # the last launch of each
            lines += [f"Counters: {line}" for line in profiling.lines(list(shown.values()))]
        if self.skipped:
            count = {step: len(names) for step, names in self.skipped.items() if names}
            lines.append("No time for: " + ", ".join(f"{s} ({n})" for s, n in count.items()) + ".")
        lines += [f"Note: {note[:160]}" for note in self.notes[:6]]
        lines += [f"FAILED {k}: {v['failed']}"[:200] for k, v in list(self.failed.items())[:15]]
        if len(self.failed) > 15:
            lines.append(f"FAILED: {len(self.failed) - 15} more in the .md file")
        lines.append(f"Tests: {self.tests['summary']}.")
        names = self.tests["failed"]
        lines += [f"FAILED {name}"[:160] for name in names[:NAMED]]
        if len(names) > NAMED:
            lines.append(f"FAILED: {len(names) - NAMED} more tests in the .md file")
        verdict = "everything that ran is right" if self.good() else "NOT everything is right"
        lines.append(f"{self.path.name}: {len(self.rows)} rows; {verdict}.")
        return lines


def short(name: str) -> str:
    """A case without the dtype that nearly all have."""
    return name.removesuffix(" bfloat16")


def row_cells(row: Row) -> tuple[str, ...]:
    """A row of the summary's table."""
    floor = row.get("of_floor")
    shown = "" if floor is None else f"{floor:.0%}"
    if row.get("over_floor") is not None:
        shown = f"{row['over_floor']:.2f}x"
    goal = row.get("goal", "")
    if figure := row.get("figure"):
        goal += f"{'; ' * bool(goal)}{'above' if figure[2] else 'below'} sglang's {figure[1]:.0%}"
    ratio = row.get("over_best")
    us = row["us"]
    return (
        short(row["case"]),
        row["direction"],
        f"{us:.1f}" if us < 1000 else f"{us:.0f}",
        shown,
        str(row.get("best", "")) if ratio is not None else "",
        "" if ratio is None else f"{ratio:.2f}",
        goal,
    )


def training_line(row: Row) -> str:
    """A training step in one line; empty for other rows."""
    if not row["direction"].startswith("training step"):
        return ""
    parts = [f"{row['us'] / 1e3:.1f} ms, {row['images_per_second']:.0f} images/s"]
    if row.get("mfu") is not None:
        parts.append(f"MFU {row['mfu']:.1%} of the data sheet's peak")
    if row.get("mfu_of_measured") is not None:
        parts.append(f"{row['mfu_of_measured']:.1%} of the measured product")
    planned = row.get("planned_gib")
    beside = f" (planned {planned:.1f})" if planned is not None else ""
    parts.append(f"peak {row['peak_gib']:.1f} GiB{beside}")
    if row.get("planned_ms") is not None:
        parts.append(f"planned {row['planned_ms']:.0f} ms")
    for key in ("no_mfu", "no_plan"):
        if key in row:
            parts.append(f"{key.replace('_', ' ')}: {row[key]}"[:90])
    return f"{row['case']}, {row['direction'].split(', ')[-1]}: {'; '.join(parts)}."


def host_line(found: Any) -> str:
    """What `bench_host` found, in one line."""
    try:
        ops = [
            f"{row['case']} {row['host']['forward']:.1f} / {row['host']['both']:.1f}"
            for row in found["rows"]
        ]
    except (KeyError, TypeError, ValueError):
        return "Host time of a call: in the JSON file."
    return f"Host us a call, forward / both directions: {', '.join(ops)}."


def progress(event: Row) -> str:
    """A case in one line."""
    if "failed" in event:
        return f"FAILED: {event['failed']}"
    parts = []
    if "check" in event:
        parts.append(f"right, {event['check']['margin']:.2f} of what is allowed")
    for row in event.get("rows", []):
        if row["direction"] == "forward+backward" and "op" in row:
            continue
        us, where = row["us"], row["direction"]
        text = f"{where} {us:.1f} us"
        if "of_floor" in row:
            text += f", {row['of_floor']:.0%} of floor"
        if "over_floor" in row:
            text += f", {row['over_floor']:.2f} x floor"
        if "over_best" in row:
            text += f", {row['over_best']:.2f} x {row['best']}"
        if row.get("goal"):
            text += f" ({row['goal']})"
        parts.append(text)
    if "ceilings" in event:
        parts.append(", ".join(f"{k} {v / 1e12:.3f} T/s" for k, v in event["ceilings"].items()))
    if "kernels" in event:
        parts.append(f"{len(event['kernels'])} kernels")
    if "counters" in event:
        parts.append(f"counters of {len(event['counters'])} launches")
    return "; ".join(parts) or "done"


def absences(rows: Iterable[Row]) -> list[str]:
    """Rivals that have no number, why, and in how many rows."""
    counts: dict[str, int] = {}
    for row in rows:
        for name, time_us in row.get("times_us", {}).items():
            if isinstance(time_us, str):
                why = f"{name}: {time_us.removeprefix('n/a: ')}"
                counts[why] = counts.get(why, 0) + 1
    return [f"{why} ({count} rows)" for why, count in counts.items()]


def shortened(text: bytes) -> bytes:
    """The head and the tail of a log."""
    if len(text) <= LOG_HEAD + LOG_TAIL:
        return text
    return text[:LOG_HEAD] + b"\n...\n" + text[-LOG_TAIL:]


def write(path: Path, content: bytes) -> None:
    """Replace a file as a whole."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
