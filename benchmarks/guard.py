"""A small part of the benchmarks held against a stored baseline: `make bench-guard`.

    python -m benchmarks.guard            # exit status 1 where a ratio to eager fell over 15 %
    python -m benchmarks.guard --store    # measure and keep as this machine's baseline

`baseline.json` has one result for each kind of CPU and number of threads; on any other there is no
verdict, and the status is 0. What fell is measured again, twice at most: other processes can make a
ratio fall once, a slower kernel makes it fall every time. Eager is the judge, not the floor or
torch.compile: it is in every row, and a change of torch moves it least.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import bench_models, bench_ops, compare, harness
from .compare import Change, Results
from .harness import Row

BASELINE = Path(__file__).with_name("baseline.json")
LIMIT, TRIES = 0.15, 3
F32, BF16 = torch.float32, torch.bfloat16
OPTIONS = bench_ops.Options(compile=False, rounds=41, seconds=1.5)
CPU = torch.device("cpu")
OPS = [
    bench_ops.window(2, 32, 96, 3, dtype=F32),
    bench_ops.window(2, 32, 96, 3),
    bench_ops.gelu(4, 16, 512, dtype=F32),
    bench_ops.ffn(4, 16, 128, dtype=F32),
    bench_ops.group_norm(2, 96, 64, film=True, dtype=F32),
    bench_ops.group_norm(2, 96, 64, film=True, nchw=True, dtype=F32),
    bench_ops.layer_norm(8, 257, 256, residual=True, dtype=F32),
]
MODELS = bench_models.CPU[:2]
Cases = dict[str, Callable[[], list[Row]]]


def cases() -> Cases:
    """What is measured, by name."""
    ops: Cases = {c.name: partial(bench_ops.run_case, c, CPU, OPTIONS) for c in OPS}
    return ops | {c.name: partial(bench_models.run_case, c, CPU, OPTIONS) for c in MODELS}


def machine(environment: Row) -> str:
    """The key of a baseline."""
    return f"{environment['cpu']}, {environment['threads']} threads"


def run(names: Sequence[str]) -> Results:
    """Rows of some cases; only what a comparison reads."""
    found, rows = cases(), []
    for name in names:
        for row in found[name]():
            if "samples_us" in row:
                kept = ("case", "dtype", "direction", "samples_us")
                rows.append({key: row[key] for key in kept})
    return {"environment": harness.environment(CPU), "rows": rows}


def fallen(old: Results, new: Results) -> list[Change]:
    """Ratios to eager that fell."""
    return [c for c in compare.compare(old, new)[0] if c.rival == "eager" and c.fell(LIMIT)]


def judge(old: Results, measure: Callable[[Sequence[str]], Results]) -> list[Change]:
    """What fell in every one of the tries; cases that held are not measured again."""
    left = list(dict.fromkeys(row["case"] for row in old["rows"]))
    lost: list[Change] = []
    for _ in range(TRIES):
        some = {**old, "rows": [row for row in old["rows"] if row["case"] in left]}
        lost = fallen(some, measure(left))
        if not lost:
            return []
        left = [name for name in left if any(c.case.startswith(name) for c in lost)]
        print(compare.table(lost, LIMIT), flush=True)
    return lost


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and judge, or store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", action="store_true", help="keep as the baseline")
    given = parser.parse_args(arguments)
    stored: dict[str, Any] = {}
    if BASELINE.is_file():
        stored = json.loads(BASELINE.read_text(encoding="utf-8"))
    if given.store:
        found = run(list(cases()))
        stored[machine(found["environment"])] = found
        BASELINE.write_text(json.dumps(stored) + "\n", encoding="utf-8")
        return 0
    here = machine(harness.environment(CPU))
    if here not in stored:
        print(f"no baseline for {here}, so no verdict; --store makes one")
        return 0
    lost = judge(stored[here], run)
    print(f"{len(lost)} ratios to eager fell by more than {LIMIT:.0%}")
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
