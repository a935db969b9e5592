"""What became slower between two results: a table of ratios with confidence, and an exit status.

    python -m benchmarks.compare OLD.json NEW.json [--limit 0.15]

Compared are ratios within a run, never times: how many times faster ours is than the fastest eager
composition, than torch.compile, than other libraries, and the floor's time over ours. An interval
comes from 2000 bootstrap samples of the rounds; candidates take turns within a round, so a round is
drawn whole. A ratio has fallen when it is more than the limit lower and the interval, 95 %, holds
no rise.

Exit status: 0 nothing fell; 1 a ratio fell or a row has no number any more; 2 nothing to compare.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .harness import Row

Results = Mapping[str, Any]
Samples = Mapping[str, Sequence[float]]
DRAWS = 2000
# What must agree for ratios to be comparable.
MACHINE = ("cpu", "gpu", "threads")


@dataclass(frozen=True)
class Change:
    """One ratio in both results.

    Attributes:
        case, rival: what was timed, and against whom.
        old, new: the ratios, larger is better.
        low, high: ends of the interval of new / old.
    """

    case: str
    rival: str
    old: float
    new: float
    low: float
    high: float

    def fell(self, limit: float) -> bool:
        """More than `limit` lower, and not by chance."""
        return self.new < (1 - limit) * self.old and self.high < 1


def name_of(row: Row) -> str:
    """What tells a row from others of a run."""
    dtype = "" if row["dtype"] in row["case"] else f" {row['dtype']}"
    return f"{row['case']}{dtype}, {row['direction']}"


def rows_of(results: Results) -> dict[str, Row]:
    """Rows that have rounds, by name."""
    return {name_of(row): row for row in results["rows"] if row.get("samples_us", {}).get("ours")}


def pairs(samples: Samples) -> Iterator[tuple[str, Sequence[str], Sequence[str]]]:
    """Rivals by name, with the candidates of either side of which the fastest counts."""
    mine = [name for name in samples if name.startswith("ours")]
    eager = [name for name in samples if name.startswith("eager")]
    if eager:
        yield "eager", eager, mine
    for name in samples:
        if name not in (*mine, *eager):
            yield name, [name], mine


def ratios(samples: Samples, rival: Sequence[str], mine: Sequence[str]) -> tuple[float, np.ndarray]:
    """The rivals' time over ours, of the lower quartiles; and the same of each bootstrap sample."""
    rounds = min(len(samples[name]) for name in (*rival, *mine))
    drawn = np.random.default_rng(0).integers(0, rounds, (DRAWS, rounds))

    def fastest(names: Sequence[str]) -> np.ndarray:
        times = [np.asarray(samples[name][:rounds]) for name in names]
        whole = np.stack([np.quantile(t, 0.25) for t in times]).min(0, keepdims=True)
        each = np.stack([np.quantile(t[drawn], 0.25, axis=1) for t in times]).min(0)
        return np.concatenate([whole, each])

    found = fastest(rival) / fastest(mine)
    return float(found[0]), found[1:]


def compare(old: Results, new: Results) -> tuple[list[Change], list[str]]:
    """Ratios that both results have, the largest fall first, and rows that only the old has."""
    before, after = rows_of(old), rows_of(new)
    changes = []
    for name in before.keys() & after.keys():
        one, two = before[name]["samples_us"], after[name]["samples_us"]
        there = {rival: (theirs, mine) for rival, theirs, mine in pairs(two)}
        for rival, theirs, mine in pairs(one):
            if rival not in there:
                continue
            was, drawn = ratios(one, theirs, mine)
            now, redrawn = ratios(two, *there[rival])
            low, high = np.quantile(redrawn / drawn, (0.025, 0.975))
            changes.append(Change(name, rival, was, now, float(low), float(high)))
    changes.sort(key=lambda c: (c.new / c.old, c.case, c.rival))
    return changes, sorted(before.keys() - after.keys())


def machines_differ(old: Results, new: Results) -> str | None:
    """What of the machine differs, None where nothing does."""
    one, two = old["environment"], new["environment"]
    apart = [k for k in MACHINE if one.get(k) != two.get(k)]
    return ", ".join(f"{k} {one.get(k)} and {two.get(k)}" for k in apart) or None


def table(changes: Sequence[Change], limit: float) -> str:
    """A line for each ratio."""
    lines = [f"{'case':64} {'against':12} {'old':>6} {'new':>6} {'change':>7}  95 % of it"]
    for c in changes:
        mark = "  FELL" if c.fell(limit) else ""
        lines.append(
            f"{c.case:64} {c.rival:12} {c.old:6.2f} {c.new:6.2f} {c.new / c.old - 1:+7.1%}  "
            f"{c.low - 1:+.1%} to {c.high - 1:+.1%}{mark}"
        )
    return "\n".join(lines)


def read(path: str) -> Results:
    """Results of a run.

    Raises:
        ValueError: the file holds none.
    """
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not {"environment", "rows"} <= found.keys():
        raise ValueError(f"compare: {path} has no results: expected 'environment' and 'rows'")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--limit", type=float, default=0.15, help="allowed fall (0.15)")
    given = parser.parse_args(arguments)
    try:
        old, new = read(given.old), read(given.new)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if apart := machines_differ(old, new):
        print(f"compare: other machines: {apart}", file=sys.stderr)
        return 2
    changes, gone = compare(old, new)
    if not changes:
        print("compare: no row with rounds is in both", file=sys.stderr)
        return 2
    print(table(changes, given.limit))
    for name in gone:
        print(f"{name}: no number any more")
    fallen = sum(c.fell(given.limit) for c in changes)
    print(f"{fallen} of {len(changes)} ratios fell by more than {given.limit:.0%}")
    return int(bool(fallen or gone))


if __name__ == "__main__":
    sys.exit(main())
