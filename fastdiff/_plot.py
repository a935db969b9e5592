"""Curves of training runs, from their `metrics.jsonl`: one PNG, and one page that needs no network.

`fastdiff plot RUN [RUN ...]`
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
COLUMNS = 3


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Args:
        title: With the unit.
        series: Field of the log and its name in the legend; a field that no run has is left out.
        log: A logarithmic scale.
    """

    title: str
    series: tuple[tuple[str, str], ...]
    log: bool = False


PANELS = (
    Panel(
        "loss",
        (
            ("loss", "training"),
            ("val_loss", "validation"),
            ("val_loss_raw", "validation, without average"),
        ),
        log=True,
    ),
    Panel(
        "loss by quarter of diffusion time",
        tuple((f"loss_band_{i}", f"{i}/4 to {i + 1}/4 of T") for i in range(4)),
        log=True,
    ),
    Panel(
        "validation loss by diffusion time",
        tuple((f"val_loss_t{k}", f"{2 * k + 1}/16 of T") for k in range(8)),
        log=True,
    ),
    Panel("FID of averaged weights", (("fid", ""),)),
    Panel("gradient norm", (("grad_norm", ""),), log=True),
    Panel("learning rate", (("lr", ""),)),
    Panel("images/s", (("images_per_s", ""),)),
    Panel(
        "seconds of a step",
        (("step_s", "whole"), ("data_s", "waiting for data"), ("wait_s", "for other ranks")),
    ),
    Panel("model FLOP utilisation", (("mfu", ""),)),
    Panel(
        "memory, GiB",
        (
            ("memory_gib", "torch, at the peak"),
            ("gpu_used_gib", "GPU 0"),
        ),
    ),
    Panel("power, W", (("gpu_power_w", ""),)),
    Panel("temperature, degrees Celsius", (("gpu_celsius", ""),)),
    Panel("clocks, MHz", (("gpu_sm_mhz", "processors"), ("gpu_memory_mhz", "memory"))),
    Panel("FID", (("fid", ""),)),
    Panel("skipped steps", (("skipped", ""),)),
)


@dataclass(frozen=True)
class Run:
    """A run's log.

    Attributes:
        name: in the legend.
        folder: of the run.
        points: of the log, by step.
        torn: lines that could not be read, such as the last one after a kill.
    """

    name: str
    folder: Path
    points: list[dict[str, Any]]
    torn: int

    def curve(self, field: str) -> tuple[list[int], list[float]]:
        """Steps and values, where the log has a finite number."""
        pairs = [
            (point["step"], float(value))
            for point in self.points
            if isinstance(value := point.get(field), (int, float)) and math.isfinite(value)
        ]
        return [step for step, _ in pairs], [value for _, value in pairs]


def read_run(folder: str | Path, name: str | None = None) -> Run:
    """A run's log.

    Raises:
        FileNotFoundError: no log there.
        ValueError: not a point in it.
    """
    file = Path(folder) / METRICS_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; give the folder of a run (train.out)")
    points: dict[int, dict[str, Any]] = {}
    torn = 0
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            point = json.loads(line)
            # A step that was made again after a kill counts as it was made last.
            points[int(point["step"])] = point
        except (ValueError, KeyError, TypeError):
            torn += 1
    if not points:
        raise ValueError(f"{file} holds no point yet")
    ordered = [points[step] for step in sorted(points)]
    return Run(name or Path(folder).resolve().name, Path(folder), ordered, torn)


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Logs of runs; of those whose folders are called alike, the whole path is the name."""
    names = [Path(folder).resolve().name for folder in folders]
    return [
        read_run(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def draw(runs: Sequence[Run]) -> bytes:
    """All panels of which some run has a value, as a PNG.

    Raises:
        ValueError: no run has any.
    """
    from matplotlib.figure import Figure

    shown = [p for p in PANELS if any(run.curve(field)[0] for run in runs for field, _ in p.series)]
    if not shown:
        raise ValueError("no run's log has a field to draw")
    rows = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(5.2 * COLUMNS, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for panel, ax in zip(shown, axes, strict=False):
        _draw_panel(ax, panel, runs)
    for ax in axes[len(shown) :]:
        ax.remove()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _draw_panel(ax: Any, panel: Panel, runs: Sequence[Run]) -> None:
    positive = True
    for number, run in enumerate(runs):
        for place, (field, label) in enumerate(panel.series):
            steps, values = run.curve(field)
            if not steps:
                continue
            positive &= min(values) > 0
            words = " ".join(w for w in (run.name if len(runs) > 1 else "", label) if w)
            ax.plot(
                steps,
                values,
                ("-", "--", ":", "-.")[place % 4],
                color=f"C{number % 10}" if len(runs) > 1 else f"C{place}",
                marker="." if len(steps) < 10 else None,
                label=words or None,
            )
    if panel.log and positive:
        ax.set_yscale("log")
    ax.set_title(panel.title, fontsize=10)
    ax.set_xlabel("optimiser step", fontsize=8)
    ax.tick_params(labelsize=8)
    ax.grid(True, alpha=0.25)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=7)


def _last(run: Run) -> dict[str, str]:
    """The newest value of every field of a run."""
    fields = dict.fromkeys(key for point in run.points for key in point)
    found = {}
    for field in fields:
        values = run.curve(field)[1]
        found[field] = f"{values[-1]:.6g}" if values else "not finite"
    return found


def page(runs: Sequence[Run], png: bytes) -> str:
    """The page: curves, newest values, newest sample grid of each run; all of it inside."""
    newest = [_last(run) for run in runs]
    fields = list(dict.fromkeys(field for values in newest for field in values))
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    rows = "".join(
        f"<tr><td>{html.escape(field)}</td>"
        + "".join(f"<td>{html.escape(values.get(field, '-'))}</td>" for values in newest)
        + "</tr>"
        for field in fields
    )
    grids = ""
    for run in runs:
        drawn = sorted((run.folder / "samples").glob("step-*.png"))
        if drawn:
            title = html.escape(f"{run.name}, {drawn[-1].stem}")
            grids += f"<h2>{title}</h2>{_picture(drawn[-1].read_bytes(), title)}"
    notes = "".join(
        f"<p>{html.escape(run.name)}: {run.torn} lines of its log could not be read.</p>"
        for run in runs
        if run.torn
    )
    title = html.escape(", ".join(run.name for run in runs))
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{title}</title><style>body{{font-family:sans-serif;margin:2em}}"
        "img{max-width:100%}td,th{padding:.1em 1em;text-align:right}"
        "td:first-child{text-align:left}</style></head>"
        f"<body><h1>{title}</h1>{notes}{_picture(png, 'curves')}"
        f"<h2>Newest values</h2><table><tr><th></th>{head}</tr>{rows}</table>{grids}"
        "</body></html>\n"
    )


def _picture(png: bytes, alt: str) -> str:
    return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def plot(folders: Sequence[str | Path], out: str | Path | None = None) -> tuple[Path, Path]:
    """Draw runs.

    Args:
        folders: Of runs.
        out: What is written, without its ending; default `curves` in the first run's folder.

    Returns:
        The PNG and the page.

    Raises:
        FileNotFoundError: A folder without a log.
        ValueError: A log without a point.
    """
    runs = read_runs(folders)
    png = draw(runs)
    stem = Path(folders[0]) / "curves" if out is None else Path(out)
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".html")
    files[0].write_bytes(png)
    files[1].write_text(page(runs, png), encoding="utf-8")
    return files
