"""One page of all results: Markdown with SVG plots beside it, and HTML that holds everything.

    python -m benchmarks.report [RESULT.json ...] [--out runs/report]

Reads what `--rows` of the benchmarks and `make bench-gpu` write, `benchmarks/results/*.json` when
no file is named. Each file is one run on one machine; runs stand side by side.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import harness
from .compare import name_of
from .harness import ROOT, Row

# Facts of a run, in the order of the table.
FACTS = ("gpu", "cpu", "threads", "torch", "triton", "commit", "changed", "date")


@dataclass(frozen=True)
class Run:
    """The rows of one file.

    Attributes:
        name: of the file.
        environment: what the numbers depend on besides the code.
        rows: those with a number, and those without.
    """

    name: str
    environment: Row
    rows: list[Row]

    def timed(self, *keys: str) -> list[Row]:
        """Rows that have a time and all of some fields."""
        return [r for r in self.rows if all(r.get(key) is not None for key in ("us", *keys))]


def read(path: Path) -> Run | None:
    """A result, None for a file that is none.

    Raises:
        ValueError: no JSON.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"report: {path.name} is no JSON: {error}") from error
    if not isinstance(found, dict) or not {"environment", "rows"} <= found.keys():
        return None
    return Run(path.stem, found["environment"], found["rows"])


# Plots: each takes the runs and a figure's axes, and says whether it drew anything.

Draw = Callable[[Sequence[Run], Any], bool]
PLOTS: dict[str, tuple[str, Draw]] = {}


def plot(name: str, title: str) -> Callable[[Draw], Draw]:
    """Add a plot to the report."""

    def add(draw: Draw) -> Draw:
        PLOTS[name] = (title, draw)
        return draw

    return add


Bars = tuple[list[str], dict[str, list[float]]]
NOTHING = float("nan")


def bars(axes: Any, made: Bars, what: str) -> bool:
    """Horizontal bars, one group a label; NaN leaves a bar out."""
    labels, series = made
    if not labels:
        return False
    axes.figure.set_size_inches(9, 1.2 + 0.22 * len(labels) * max(1, len(series)))
    height = 0.8 / len(series)
    for index, (name, values) in enumerate(series.items()):
        places = [row + index * height for row in range(len(labels))]
        axes.barh(places, values, height, label=name)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(labels))], labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(what)
    axes.legend(fontsize=7)
    return True


def by_case(runs: Sequence[Run], key: str, keep: Callable[[Row], bool]) -> Bars:
    """Labels, and for each run the value of a field at each of them."""
    labels: dict[str, None] = {}
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for run in runs:
        for row in filter(keep, run.timed(key)):
            labels[name_of(row)] = None
            found[run.name][name_of(row)] = row[key]
    return list(labels), {run: [v.get(la, NOTHING) for la in labels] for run, v in found.items()}


def is_op(row: Row) -> bool:
    """A fused op's row, of a direction that was timed itself."""
    return "op" in row and row["direction"] != "backward"


@plot("time", "Time of the ops")
def _(runs: Sequence[Run], axes: Any) -> bool:
    axes.set_xscale("log")
    return bars(axes, by_case(runs, "us", is_op), "us")


@plot("memory", "Peak memory of forward and backward of the ops")
def _(runs: Sequence[Run], axes: Any) -> bool:
    axes.set_xscale("log")
    return bars(axes, by_case(runs, "peak_mib", lambda row: "op" in row), "MiB")


@plot(
    "roofline", "Fraction of what a copy in the same run allows (ops) and of the roofline (models)"
)
def _(runs: Sequence[Run], axes: Any) -> bool:
    labels, series = by_case(runs, "of_floor", is_op)
    more, others = by_case(runs, "of_roofline", lambda row: True)
    joined = {
        name: [
            *series.get(name, [NOTHING] * len(labels)),
            *others.get(name, [NOTHING] * len(more)),
        ]
        for name in {**series, **others}
    }
    return bars(axes, ([*labels, *more], joined), "fraction")


@plot("speedup", "Times faster than each rival, median and range over all its rows")
def _(runs: Sequence[Run], axes: Any) -> bool:
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for row in run.timed("times_us"):
            if row["direction"] == "backward":
                continue
            for name, time in row["times_us"].items():
                if isinstance(time, float) and not name.startswith(("ours", "floor")):
                    kind = row.get("op") or row.get("kind", "blocks and models")
                    found[run.name][f"{kind}: {name}"].append(time / row["us"])
    labels = sorted({label for rivals in found.values() for label in rivals})
    if not labels:
        return False
    axes.figure.set_size_inches(9, 1.2 + 0.3 * len(labels))
    for index, (source, rivals) in enumerate(found.items()):
        for place, label in enumerate(labels):
            if values := sorted(rivals.get(label, [])):
                at = place + 0.15 * index
                axes.plot([values[0], values[-1]], [at, at], color=f"C{index}", linewidth=1)
                middle = values[len(values) // 2]
                axes.plot(middle, at, "o", color=f"C{index}")
        axes.plot([], [], "o", color=f"C{index}", label=source)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_xlabel("their time over ours")
    axes.legend(fontsize=7)
    return True


def scaling(axis: str) -> Draw:
    """Time per pixel along an axis."""

    def draw(runs: Sequence[Run], axes: Any) -> bool:
        lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for run in runs:
            for row in run.timed("scaling"):
                if row["scaling"] == axis:
                    label = f"{row['line']}, {run.name}"
                    lines[label].append((row["value"], row["ns_per_pixel"]))
                    if axis == "resolution" and "mflop_per_pixel" in row:
                        products = f"{label}: MFLOP/pixel, counted"
                        lines[products].append((row["value"], row["mflop_per_pixel"]))
        for label, points in lines.items():
            # Each line over its first point: growth is what is read.
            x, y = zip(*points, strict=True)
            style = "--" if label.endswith("counted") else "o-"
            axes.plot(x, [value / y[0] for value in y], style, label=label)
        axes.set_xscale("log", base=2)
        values = sorted({x for points in lines.values() for x, _ in points})
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.set_xlabel(axis)
        axes.set_ylabel("per pixel, over the first point")
        axes.set_ylim(bottom=0)
        if lines:
            axes.legend(fontsize=7)
        return bool(lines)

    return draw


for _axis in ("resolution", "batch", "window"):
    plot(f"scaling_{_axis}", f"Time per pixel against {_axis}")(scaling(_axis))


@plot("training", "Training: images a second")
def _(runs: Sequence[Run], axes: Any) -> bool:
    found = by_case(runs, "images_per_second", lambda row: row["direction"] == "training")
    axes.set_xscale("log")
    return bars(axes, found, "images/s, forward and backward")


@plot("training_memory", "Training: peak memory beyond weights and gradients")
def _(runs: Sequence[Run], axes: Any) -> bool:
    wanted = by_case(runs, "peak_mib", lambda r: r["direction"] == "training" and "op" not in r)
    return bars(axes, wanted, "MiB")


@plot("sampling", "One call of a model, as sampling makes it: images a second")
def _(runs: Sequence[Run], axes: Any) -> bool:
    found = by_case(runs, "images_per_second", lambda row: row["direction"] == "forward")
    axes.set_xscale("log")
    return bars(axes, found, "images/s a step")


PARTS = {
    "engine": ("The sampling engine, a whole draw of a few steps: images a second", "sampling"),
    "loop": ("The training loop, with all that a run does: images a second", "training loop"),
    "loading": ("The loader on one thread: images a second", "loading"),
}


def rate(direction: str) -> Draw:
    """Images a second of the rows of a direction."""

    def draw(runs: Sequence[Run], axes: Any) -> bool:
        found = by_case(runs, "images_per_second", lambda row: row["direction"] == direction)
        return bars(axes, found, "images/s")

    return draw


for _name, (_title, _direction) in PARTS.items():
    plot(_name, _title)(rate(_direction))


@plot("flops", "FLOPs against time")
def _(runs: Sequence[Run], axes: Any) -> bool:
    drawn = False
    for run in runs:
        for row in run.timed("flops"):
            drawn = True
            marker = {"forward": "o", "training": "s"}.get(row["direction"], "o")
            axes.plot(row["flops"] / 1e9, row["us"] / 1e3, marker, markersize=4)
            label = row.get("model") or row.get("preset") or row["case"]
            where = (row["flops"] / 1e9, row["us"] / 1e3)
            axes.annotate(label, where, fontsize=5, xytext=(3, 3), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("GFLOP a call")
    axes.set_ylabel("ms; circles forward, squares training")
    return drawn


def figures(runs: Sequence[Run]) -> Iterator[tuple[str, str, bytes]]:
    """Name, title and SVG of each plot that has something to show."""
    import io

    import matplotlib
    from matplotlib.figure import Figure

    # The same page for the same results: no date, no random names.
    with matplotlib.rc_context({"svg.hashsalt": "fastdiff", "svg.fonttype": "path"}):
        for name, (title, draw) in PLOTS.items():
            figure = Figure(figsize=(9, 4.5))
            axes = figure.add_subplot()
            if draw(runs, axes):
                axes.set_title(title, fontsize=10)
                file = io.BytesIO()
                figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
                yield name, title, file.getvalue()


def machines(runs: Sequence[Run]) -> list[list[str]]:
    """A table of what the numbers depend on, a run a column."""
    facts = [key for key in FACTS if any(run.environment.get(key) is not None for run in runs)]
    lines = [["", *(run.name for run in runs)]]
    for key in facts:
        lines.append([key, *(str(run.environment.get(key, "")) for run in runs)])
    return lines


def missed(runs: Sequence[Run]) -> list[str]:
    """Goals that do not hold."""
    return [
        f"{run.name}: {name_of(row)}: {row['goal']}"
        for run in runs
        for row in run.timed("goal")
        if row["goal"].startswith("missed")
    ]


def markdown(runs: Sequence[Run], plots: Sequence[tuple[str, str, bytes]]) -> str:
    """The page; its plots lie beside it."""
    lines = ["# Benchmarks", ""]
    head, *body = machines(runs)
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(cells)} |" for cells in body]
    for name, title, _ in plots:
        lines += ["", f"## {title}", "", f"![{title}]({name}.svg)"]
    if failed := missed(runs):
        lines += ["", "## Goals that do not hold", "", *(f"- {line}" for line in failed)]
    for run in runs:
        lines += ["", f"## Rows of {run.name}", "", harness.table(run.rows, markdown=True)]
    return "\n".join(lines) + "\n"


STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;font-size:13px}td,th{border:1px solid #ccc;padding:2px 8px}"
    "img{max-width:100%}pre{font-size:11px;overflow-x:auto}"
)


def page(runs: Sequence[Run], plots: Sequence[tuple[str, str, bytes]]) -> str:
    """The page as one HTML file, which loads nothing."""
    out = ["<!doctype html><html lang='en'><meta charset='utf-8'><title>Benchmarks</title>"]
    out.append(f"<style>{STYLE}</style><h1>Benchmarks</h1><table>")
    for cells in machines(runs):
        out.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    out.append("</table>")
    for _, title, svg in plots:
        data = base64.b64encode(svg).decode()
        text = html.escape(title, quote=True)
        source = f"data:image/svg+xml;base64,{data}"
        out.append(f'<h2>{text}</h2><img alt="{text}" src="{source}">')
    if failed := missed(runs):
        items = "".join(f"<li>{html.escape(line)}</li>" for line in failed)
        out.append(f"<h2>Goals that do not hold</h2><ul>{items}</ul>")
    for run in runs:
        out.append(f"<h2>Rows of {html.escape(run.name)}</h2>")
        out.append(f"<pre>{html.escape(harness.table(run.rows))}</pre>")
    return "\n".join(out) + "\n</html>\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write both pages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="*", type=Path, help="benchmarks/results/*.json")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "report", help="folder")
    given = parser.parse_args(arguments)
    paths = given.results or sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    try:
        runs = [run for run in map(read, paths) if run is not None]
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if not runs:
        print("report: no results; `pytest benchmarks/ --rows FILE` makes some", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    plots = list(figures(runs))
    for name, _, svg in plots:
        (given.out / f"{name}.svg").write_bytes(svg)
    (given.out / "report.md").write_text(markdown(runs, plots), encoding="utf-8")
    (given.out / "report.html").write_text(page(runs, plots), encoding="utf-8")
    print(f"{given.out / 'report.html'}: {len(runs)} runs, {len(plots)} plots")
    return 0


if __name__ == "__main__":
    sys.exit(main())
