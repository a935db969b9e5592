"""The page of the experiments, from `results.jsonl`: tables, plots, pictures, verdicts.

What stands in it about the results is computed: a difference whose interval holds zero is called
none, and the order is told as it came out.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from fastdiff.data.scenes import SceneJudge
from fastdiff.experiments.grid import BACKBONES, DEFAULT, TITLES
from fastdiff.experiments.grid import rows as grid_rows
from fastdiff.experiments.measure import Number, difference, number
from fastdiff.experiments.runner import RESULTS, read_results
from fastdiff.experiments.tasks import TASKS

#: 97.5 % quantile of Student's t by degrees of freedom, one less than the seeds.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}
TASK_TITLES = {
    "none": "nothing",
    "label": "a shape",
    "caption": "a caption",
    "pair": "two objects",
}
#: The experiments whose FIDs the page shows.
TABLES = ("table3", "table4")
#: What a row's numbers come from.
MAKERS = ("commit", "torch", "machine", "threads")
#: Rows that were run again elsewhere, lines as in `results.jsonl`.
REPEATS = "repeats.jsonl"
#: Number, heading, decimals, whether less is better.
MEASURES = (
    ("val_loss", "validation loss", 4, True),
    ("fid", "FID of scenes", 1, True),
    ("distance", "distance to a scene", 3, True),
    ("strict", "clean scenes", 3, False),
)

Result = dict[str, Any]


def over_seeds(numbers: Sequence[Number]) -> Number:
    """The mean over seeds with Student's interval; of one seed, its own number and interval."""
    if len(numbers) == 1:
        return numbers[0]
    values = [found["value"] for found in numbers]
    half = STUDENT[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    middle = statistics.mean(values)
    return number(middle, middle - half, middle + half, sum(f["n"] for f in numbers))


def apart(mine: Number, other: Number) -> Number:
    """Difference of two independent numbers, their intervals' sides added in squares.

    Source: Newcombe 1998, method 10, for two shares.
    """
    value = mine["value"] - other["value"]
    below = (mine["value"] - mine["low"]) ** 2 + (other["high"] - other["value"]) ** 2
    above = (mine["high"] - mine["value"]) ** 2 + (other["value"] - other["low"]) ** 2
    return number(value, value - below**0.5, value + above**0.5, min(mine["n"], other["n"]))


def verdict(found: Number, *, less_is_better: bool) -> str:
    """ "none" where the interval holds zero, else "better" or "worse"."""
    if found["low"] <= 0 <= found["high"]:
        return "none"
    return "better" if (found["value"] < 0) == less_is_better else "worse"


def told(found: Number, decimals: int, *, sign: bool = False) -> str:
    """A number and its interval."""
    plus = "+" if sign else ""
    value, low, high = (f"{found[key]:{plus}.{decimals}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def between(mine: Sequence[Result], other: Sequence[Result], key: str) -> Number:
    """Difference of a number over two rows' seeds; of losses on the same pictures and noise."""
    if key != "val_loss":
        return apart(*(over_seeds([r["numbers"][key] for r in rows]) for rows in (mine, other)))
    seeds = {r["seed"]: r for r in other}
    pairs = [(r, seeds[r["seed"]]) for r in mine if r["seed"] in seeds]
    return over_seeds([difference(a["val_losses"], b["val_losses"]) for a, b in pairs])


class Results:
    """Finished rows by experiment and name in the order of the grid, the newest of each seed."""

    def __init__(self, results: Sequence[Result]) -> None:
        place = {(row.experiment, row.name): at for at, row in enumerate(grid_rows(DEFAULT))}
        self.all = sorted(
            {result["row"]: result for result in results}.values(),
            key=lambda result: place.get((result["experiment"], result["name"]), len(place)),
        )
        self.by_name: dict[tuple[str, str], list[Result]] = {}
        for result in self.all:
            self.by_name.setdefault((result["experiment"], result["name"]), []).append(result)

    def names(self, experiment: str) -> list[str]:
        """Rows of an experiment that there are."""
        return [name for one, name in self.by_name if one == experiment]

    def one(self, experiment: str, name: str) -> Result:
        """Any seed of a row, for what does not depend on it."""
        return self.by_name[experiment, name][0]

    def number(self, experiment: str, name: str, key: str) -> Number:
        """A number over the seeds."""
        return over_seeds([r["numbers"][key] for r in self.by_name[experiment, name]])

    def change(self, experiment: str, name: str, base: str, key: str) -> Number:
        """Difference of a row to another; of losses on the same pictures with the same noise."""
        return between(self.by_name[experiment, name], self.by_name[experiment, base], key)


def samples(found: Mapping[str, Iterable[Number]]) -> str:
    """How many samples stand behind each number of a table, by its heading."""
    counts = [
        f"{heading} {' or '.join(str(n) for n in sorted({int(x['n']) for x in numbers}))}"
        for heading, numbers in found.items()
    ]
    return f"Samples of each number: {', '.join(counts)}."


def ablation(results: Results, experiment: str, base: str) -> str:
    """A table of the paper: rows beside one of them, what agrees, the order."""
    names = results.names(experiment)
    if base not in names:
        return "Not run yet.\n"
    extractors = {r["extractor"] for name in names for r in results.by_name[experiment, name]}
    if len(extractors) > 1:
        raise ValueError(
            f"the FIDs of {experiment} are of {len(extractors)} feature extractors and cannot be "
            f"compared; keep one folder's lines in {RESULTS} and run the other rows again there"
        )
    paper = {name: results.one(experiment, name)["paper"] for name in names}
    lines, agreement = [], []
    for name in names:
        row = results.one(experiment, name)
        line = [row["title"], f"{row['parameters'] / 1e6:.2f}M", f"{paper[name]:.2f}"]
        words = []
        for key, _, decimals, less in MEASURES:
            cell = told(results.number(experiment, name, key), decimals)
            if name != base:
                change = results.change(experiment, name, base, key)
                words.append(verdict(change, less_is_better=less))
                cell += f"<br>{told(change, decimals, sign=True)}: **{words[-1]}**"
            line.append(cell)
        lines.append(line)
        if name != base:
            expected = "better" if paper[name] < paper[base] else "worse"
            says = {expected: "agrees", "none": "shows none"}
            outcome = [
                f"{heading} {says.get(word, 'disagrees')}"
                for (_, heading, _, _), word in zip(MEASURES, words, strict=True)
            ]
            agreement.append(
                f"- {row['title']}: in the paper {expected} ({paper[name] - paper[base]:+.2f}); "
                f"{', '.join(outcome)}."
            )
    floor = told(results.number(experiment, base, "fid_of_real"), 1)
    lines.append(["real scenes", "", "", "", floor, "", ""])
    head = ["", "parameters", "paper, FID", *(heading for _, heading, _, _ in MEASURES)]
    titles = {name: results.one(experiment, name)["title"] for name in names}
    ranked = sorted(names, key=lambda name: paper[name])
    orders = [f"- the paper: {' > '.join(titles[n] for n in ranked)}"]
    for key, heading, _, less in MEASURES:
        ranked = sorted(
            names, key=lambda n: results.number(experiment, n, key)["value"], reverse=not less
        )
        line = titles[ranked[0]]
        for better, name in pairwise(ranked):
            change = results.change(experiment, name, better, key)
            none = verdict(change, less_is_better=less) == "none"
            line += f" {'=' if none else '>'} {titles[name]}"
        orders.append(f"- {heading}: {line}")
    order = "\n".join(orders)
    counted = {
        heading: [results.number(experiment, name, key) for name in names]
        for key, heading, _, _ in MEASURES
    }
    return (
        f"{table(head, lines)}\n\nThe second line of a cell is the difference to "
        f"{titles[base]}. {samples(counted)}\n\nAgainst the paper:\n\n"
        + "\n".join(agreement)
        + "\n\n"
        f"Best first; = where two neighbours differ by none:\n\n{order}\n"
        + bands(results, experiment)
    )


def scatter(results: Results, file: Path) -> str:
    """Tables 3 and 4: our numbers over the paper's, a point a row."""
    from matplotlib.figure import Figure

    tables = [one for one in TABLES if results.names(one)]
    if not tables:
        return ""
    figure = Figure(figsize=(11, 3.4 * len(tables)), layout="constrained")
    axes = figure.subplots(len(tables), len(PLOTTED), squeeze=False)
    for experiment, line in zip(tables, axes, strict=True):
        for (key, heading), ax in zip(PLOTTED, line, strict=True):
            for name in results.names(experiment):
                row, found = results.one(experiment, name), results.number(experiment, name, key)
                sides = [[found["value"] - found["low"]], [found["high"] - found["value"]]]
                ax.errorbar(row["paper"], found["value"], yerr=sides, fmt="o", label=row["title"])
            ax.set_xlabel("the paper's FID, CIFAR-10", fontsize=8)
            ax.set_ylabel(heading, fontsize=8)
            ax.tick_params(labelsize=8)
            ax.grid(True, alpha=0.25)
        line[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))  # off the points
    figure.savefig(file, format="png", dpi=90)
    return f"![Tables 3 and 4: our numbers over the paper's](images/{file.name})\n"


PLOTTED = (("val_loss", "validation loss"), ("fid", "FID of scenes"))


def strips(results: Results, experiment: str, out: Path, file: Path) -> str:
    """Drawn pictures, a line a row, the same noise in each column."""
    names = results.names(experiment)
    if not names:
        return ""
    rows = [results.one(experiment, name) for name in names]
    drawn = [Image.open(out / row["picture"]).convert("RGB") for row in rows]
    sheet = Image.new("RGB", (drawn[0].width, sum(d.height for d in drawn)), "white")
    for place, strip in enumerate(drawn):
        sheet.paste(strip, (0, sum(d.height for d in drawn[:place])))
    sheet.save(file)
    titles = "; ".join(row["title"] for row in rows)
    return f"![Drawn from the same noise](images/{file.name})\n\nFrom the top: {titles}.\n"


def bands(results: Results, experiment: str) -> str:
    """Validation losses by quarter of diffusion time."""
    lines = [
        [
            results.one(experiment, name)["title"],
            *(told(results.number(experiment, name, f"val_band_{i}"), 4) for i in range(4)),
        ]
        for name in results.names(experiment)
    ]
    head = ["validation loss", *(f"{i}/4 to {i + 1}/4 of T" for i in range(4))]
    return f"\n{table(head, lines)}\n"


def attention(results: Results) -> str:
    """Figure 10: agreement by attribute, separate beside fused."""
    if set(results.names("figure10")) != {"separate", "fused"}:
        return "Not run yet.\n"
    lines: list[list[str]] = []
    counted: dict[str, list[Number]] = {}
    for key, heading in (
        ("joint", "all four right"),
        ("strict", "and clean"),
        ("shape", "shape"),
        ("colour", "colour"),
        ("background", "background"),
        ("place", "place"),
    ):
        numbers = [results.number("figure10", name, key) for name in ("separate", "fused")]
        change = apart(*numbers)
        counted.setdefault("shares", []).extend(numbers)
        lines.append(
            [
                heading,
                *(told(found, 3) for found in numbers),
                told(change, 3, sign=True),
                verdict(change, less_is_better=False),
            ]
        )
    for key, heading in (
        ("distance", "distance to what was asked"),
        ("val_loss", "validation loss"),
    ):
        change = results.change("figure10", "separate", "fused", key)
        counted[heading] = [results.number("figure10", n, key) for n in ("separate", "fused")]
        both = [told(found, 4) for found in counted[heading]]
        word = verdict(change, less_is_better=True)
        lines.append([heading, *both, told(change, 4, sign=True), word])
    sizes = [
        f"{results.one('figure10', name)['parameters'] / 1e6:.2f}M"
        for name in ("separate", "fused")
    ]
    head = ["", f"separate, {sizes[0]}", f"fused, {sizes[1]}", "difference", "separate is"]
    return (
        f"{table(head, lines)}\n\n{samples(counted)}\n\n"
        "The paper shows pictures and says that separate attention encourages better semantic "
        "alignment; it gives no number.\n"
    )


def heat_map(results: Results, file: Path) -> str:
    """Figure 1: distance to what was asked, by resolution and condition."""
    from matplotlib.figure import Figure

    cells, clean = (
        {name: results.number("figure1", name, key) for name in results.names("figure1")}
        for key in ("distance", "strict")
    )
    if not cells:
        return "Not run yet.\n"
    sides = sorted({int(name.split("-")[1]) for name in cells})
    figure = Figure(figsize=(12, 1.4 + 0.9 * len(sides)), layout="constrained")
    image: Any = None
    highest = max(cell["value"] for cell in cells.values())
    for ax, backbone in zip(figure.subplots(1, 3), BACKBONES, strict=True):
        found = [[cells.get(f"{backbone}-{side}-{task}") for task in TASKS] for side in sides]
        shares = [[float("nan") if c is None else c["value"] for c in row] for row in found]
        image = ax.imshow(shares, vmin=0, vmax=highest, cmap="viridis_r", aspect="auto")
        for i, row in enumerate(found):
            for j, cell in enumerate(row):
                words = "-" if cell is None else f"{cell['value']:.2f}"
                dark = cell is not None and cell["value"] > 0.5 * highest
                ax.text(j, i, words, ha="center", va="center", color="white" if dark else "black")
        ax.set_xticks(range(len(TASKS)), [TASK_TITLES[task] for task in TASKS], fontsize=8)
        ax.set_yticks(range(len(sides)), [f"{side} px" for side in sides], fontsize=8)
        ax.set_title(TITLES[backbone], fontsize=10)
    figure.colorbar(image, ax=figure.axes, label="distance to what was asked")
    figure.savefig(file, format="png", dpi=90)
    lines = [
        [
            f"{side} px, {TASK_TITLES[task]}",
            *(
                f"{told(cells[name], 3)}<br>{told(clean[name], 3)}" if name in cells else "-"
                for name in (f"{b}-{side}-{task}" for b in BACKBONES)
            ),
        ]
        for side in sides
        for task in TASKS
    ]
    counted = {"distance": cells.values(), "share": clean.values()}
    return (
        f"![Distance to what was asked, by resolution and condition](images/{file.name})\n\n"
        f"{table(['asked for', *(TITLES[b] for b in BACKBONES)], lines)}\n\nFirst line: mean "
        "distance to the nearest rendering of what was asked. Second: share of clean pictures that "
        f"show it. {samples(counted)}\n\n{steps_of_difficulty(cells, sides)}\n"
    )


def steps_of_difficulty(cells: Mapping[str, Number], sides: Sequence[int]) -> str:
    """How often a step to more pixels, or to more that is asked for, is harder.

    Args:
        cells: Distances by "backbone-side-task".
        sides: Resolutions that there are, ascending.
    """
    lines = []
    for backbone in BACKBONES:
        pixels = [
            (f"{backbone}-{less}-{task}", f"{backbone}-{more}-{task}")
            for less, more in pairwise(sides)
            for task in TASKS
        ]
        asked = [
            (f"{backbone}-{side}-{less}", f"{backbone}-{side}-{more}")
            for side in sides
            for less, more in pairwise(TASKS)
        ]
        cell = [TITLES[backbone]]
        for steps in (pixels, asked):
            words = [
                verdict(apart(cells[more], cells[less]), less_is_better=True)
                for less, more in steps
                if less in cells and more in cells
            ]
            harder, easier = words.count("worse"), words.count("better")
            cell.append(f"harder in {harder}, easier in {easier}, none in {words.count('none')}")
        lines.append(cell)
    return table(["a step to", "more pixels is", "more that is asked for is"], lines)


def snapshots(results: Results, out: Path, file: Path) -> str:
    """Figure 6: pictures of the same noise while training goes on, and the patch effect."""
    names = [name for name in BACKBONES if name in results.names("figure6")]
    if not names:
        return "Not run yet.\n"
    found = {name: results.one("figure6", name) for name in names}
    steps = [shot["step"] for shot in found[names[0]]["snapshots"]]
    strips = [
        [Image.open(out / shot["picture"]).convert("RGB") for shot in found[name]["snapshots"]]
        for name in names
    ]
    width, height = strips[0][0].size
    sheet = Image.new("RGB", (width * len(names), height * len(steps)), "white")
    for column, shots in enumerate(strips):
        for row, strip in enumerate(shots):
            sheet.paste(strip, (column * width, row * height))
    sheet.save(file)
    lines = []
    for place, step in enumerate(steps):
        made = [found[name]["snapshots"][place] for name in names]
        lines.append(
            [
                str(step),
                *(f"{told(s['patch_effect'], 3)}<br>{told(s['distance'], 3)}" for s in made),
            ]
        )
    counted = {
        heading: [shot[key] for name in names for shot in found[name]["snapshots"]]
        for key, heading in (("patch_effect", "patch effect"), ("distance", "distance"))
    }
    real = {told(found[name]["numbers"]["patch_effect_of_real"], 3) for name in names}
    titles = [f"{TITLES[n]}, {found[n]['parameters'] / 1e6:.2f}M" for n in names]
    return (
        f"![{', '.join(TITLES[n] for n in names)} from left to right, at steps "
        f"{', '.join(map(str, steps))} from top to bottom](images/{file.name})\n\n"
        f"From left to right {', '.join(TITLES[n] for n in names)}; from top to bottom after "
        f"{', '.join(map(str, steps))} steps.\n\n"
        f"{table(['step', *titles], lines)}\n\n"
        "First line: gradient energy on the borders of IU-ViT's patches over that inside them; of "
        f"real pictures {', '.join(sorted(real))}. Second: distance to a scene. "
        f"{samples(counted)}\n"
    )


def origin(results: Results) -> str:
    """What made the numbers."""
    every = results.all

    def values(key: str) -> str:
        return ", ".join(map(str, sorted({r[key] for r in every})))

    made = Counter(tuple(str(r[key]) for key in MAKERS) for r in every)
    makers = [f"{n} row{'s' * (n > 1)}: {', '.join(maker)}" for maker, n in made.most_common()]
    seconds = sum(r["train_s"] + r["measure_s"] for r in every)
    extractors = sorted(
        {
            (min(r["side"], 32), r["extractor"], r["extractor_accuracy"])
            for r in every
            if r["experiment"] in TABLES
        }
    )
    features = "; ".join(
        f"{side} px `{sha[:16]}`, names {share:.1%} of fresh scenes"
        for side, sha, share in extractors
    )
    return table(
        ["", ""],
        [
            ["rows", str(len(every))],
            ["commit, torch, machine, threads", "<br>".join(makers)],
            ["seeds", values("seed")],
            ["steps, batch", f"{values('steps')} / {values('batch_size')}"],
            ["minutes in all, by the clock of each row", f"{seconds / 60:.0f}"],
            ["feature extractor of FID", features or "-"],
        ],
    )


def repeated(results: Results, repeats: Sequence[Result]) -> str:
    """What the same row and seed gives on another machine, where rounding alone differs."""
    first = {(r["row"], r["settings"]): r for r in results.all}
    lines = []
    for again in repeats:
        one = first.get((again["row"], again["settings"]))
        if one is None:
            continue
        line = [again["row"], f"{again['commit'][:7]}, {again['machine']}"]
        for key, _, decimals, _ in MEASURES:
            comparable = key != "fid" or again["extractor"] == one["extractor"]
            change = between([again], [one], key)
            line.append(told(change, decimals, sign=True) if comparable else "other features")
        lines.append(line)
    if not lines:
        return ""
    head = ["row", "run again by", *(heading for _, heading, _, _ in MEASURES)]
    return (
        "The same row with the same seed on another machine, less the one in the table above. "
        "Rounding is all that differs, and training makes it larger: differences between rows "
        f"that are not beyond these say nothing of architectures.\n\n{table(head, lines)}\n"
    )


INTRODUCTION = """\
Written by `python train/experiments.py --report`; what it says of numbers is computed from them.
Models of the paper's structure, narrow ones without `--full`, are trained on the embedded scenes;
within a table or figure with the same data, order, noise, optimiser and steps. They predict v on
the linear schedule, which learns captions in fewer steps than the paper's noise on the cosine one.
Where all is noise v is the picture: the loss there is that of guessing what nobody described.

To run a row again: `python train/experiments.py --only {row}`; on the same machine, with as many
threads, its numbers are the same.

A number is followed by its 95 % interval: bootstrap over {pictures} held-out pictures at 8 times
for losses (differences are paired), bootstrap over the drawn pictures for FID and distances,
Wilson's for shares. A difference whose interval holds zero is called none. The distance of a
picture is the root of the mean squared one to the nearest rendering of a scene (or of what was
asked), in units of [-1, 1]; two unlike scenes are 0.1 to 1 apart, and a picture within {bound} is
called clean.
"""

LIMITS = """\
- One seed says which of two runs is better, not which of two architectures: the intervals are
  those of measuring a run (other pictures, other noise), and another seed of the weights moves it,
  too. With several seeds (`--full`) the intervals are Student's, over the seeds.
- Hundreds or a few thousand steps compare how fast models learn. The paper's tables compare where
  they end after hundreds of thousands; what is slower at first may end better.
- Scenes have four shapes, six colours and flat backgrounds: no texture, on which convolutions and
  transformers differ most.
- The FID here is of features of a small classifier of scenes. It has nothing to do with
  Inception's but the formula; only its order means something beside the paper's numbers.
"""


def write_report(out: Path, file: Path) -> Path:
    """Write the page and its pictures (in `images/` beside it).

    Args:
        out: The grid's folder, with `results.jsonl` and `pictures/`, and `repeats.jsonl` if rows
            were run again on another machine.
        file: The page, `.md`.

    Raises:
        FileNotFoundError: No results there.
        ValueError: FIDs of one table are of several feature extractors.
    """
    results = Results(read_results(out / RESULTS))
    if not results.all:
        raise FileNotFoundError(f"{out / RESULTS} holds no finished row; run some first")
    images = file.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    row, pictures = results.all[0]["row"], results.all[0]["numbers"]["val_loss"]["n"]
    parts = [
        "# The paper's experiments, small",
        INTRODUCTION.format(pictures=pictures, row=row, bound=SceneJudge.RMSE_BOUND),
        origin(results),
        "## Table 3: what makes IU-ViT of U-ViT",
        ablation(results, "table3", "uvit"),
        strips(results, "table3", out, images / "experiments-table3.png"),
        "## Table 4: ASCEND and what it is made of",
        ablation(results, "table4", "ascend"),
        strips(results, "table4", out, images / "experiments-table4.png"),
        scatter(results, images / "experiments-tables.png"),
        "## Figure 10: separate against fused text attention",
        attention(results),
        strips(results, "figure10", out, images / "experiments-figure10.png"),
        "## Figure 6: what is learnt when, and patches",
        snapshots(results, out, images / "experiments-figure6.png"),
        "The paper: IU-ViT shows patches at first and lacks detail later; ASCEND learns structure "
        "faster than both.",
        "## Figure 1: difficulty by resolution and condition",
        heat_map(results, images / "experiments-figure1.png"),
        "The paper's diagram places published models, and calls more pixels and more text harder; "
        "it measures nothing.",
        "## What the budget cannot tell",
        repeated(results, read_results(out / REPEATS)),
        LIMITS,
    ]
    file.write_text(
        "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n", encoding="utf-8"
    )
    return file
