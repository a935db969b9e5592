"""The sampling engine against a plain loop over the same network, sampler and noise.

    python -m benchmarks.bench_sampling [--rounds 5] [--steps 4] [CASE ...]

Both take turns in one process; *over_plain* is the median of the rounds' ratios. A sample of
`steps` calls is timed with everything it takes, so the text's keys and values count once in so
many steps: with the paper's 250 the engine gains a little more. On a GPU *graphs* are on.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.diffusion import DiffusionProcess, classifier_free, sample_ddim, schedule
from fastdiff.models import create_model
from fastdiff.sampling import Engine, PhiloxNoise, SamplerConfig, seed_tensor, starting_noise

from . import harness
from .bench_ops import verdict
from .harness import Refused, Row, Timing


@dataclass(frozen=True)
class Case:
    """A preset at a batch size, drawn with guidance where it takes text.

    Attributes:
        preset: Its name.
        batch: Pictures at once.
        goal, gpu_goal: The plain loop's time over the engine's, at least.
        tokens: Text positions, all valid.
        overrides: The preset's fields.
    """

    preset: str
    batch: int
    goal: float = 0.99
    gpu_goal: float = 0.99
    tokens: int = 256
    overrides: Mapping[str, Any] = field(default_factory=dict)


# 0.99: never slower, as far as a clock can tell.
CASES = {
    "iuvit_cc12m64 b1": Case("iuvit_cc12m64", 1, goal=1.08),
    "iuvit_cifar10 b1": Case("iuvit_cifar10", 1, gpu_goal=2.0),
    "iuvit_cifar10 b64": Case("iuvit_cifar10", 64),
    "ascend_t2i_128 b1": Case("ascend_t2i_128", 1),
}
# On a CPU without --full: the text model narrow.
SMALL = {
    "iuvit_cifar10 b1": CASES["iuvit_cifar10 b1"],
    "iuvit_cc12m64 of width 256 b1": Case("iuvit_cc12m64", 1, overrides={"dim": 256, "layers": 5}),
}


def run_case(name: str, rounds: int, steps: int) -> Row:
    """Check that both draw the same, time them, and make the row.

    Raises:
        Refused: The pictures differ.
    """
    case = (CASES | SMALL)[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    model = create_model(case.preset, **case.overrides).to(device, dtype).eval()
    process = DiffusionProcess(schedule("linear"))
    condition: dict[str, Any] = {}
    width = model.config.context_dim
    if width is not None:
        context = torch.randn(case.batch, case.tokens, width, device=device)
        condition = {"context": context}
    guidance = 1.0 if width is None else 2.0
    seeds = range(case.batch)
    engine = Engine(model, process, SamplerConfig(steps=steps, eta=1.0), guidance=guidance)

    @torch.no_grad()
    def plain() -> Tensor:
        own = seed_tensor(seeds, device)
        x_T = starting_noise(own, (3, *model.config.sides))
        call: Callable[..., Tensor] = model
        if condition:
            call = classifier_free(model, guidance, **condition)
        return sample_ddim(call, x_T, process, steps=steps, eta=1.0, generator=PhiloxNoise(own))

    def ours() -> Tensor:
        return engine.draw(seeds, **condition)

    apart = float((plain() - ours()).abs().max())
    allowed = 1e-3 if dtype is torch.float32 else 0.1
    if not apart <= allowed:
        raise Refused(f"{name}: pictures differ by {apart:.2g}")
    jobs = {"plain loop": plain, "ours": ours}
    samples: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name_of_job, job in jobs.items():
            samples[name_of_job].append(_seconds(job, device))
    how = "cpu" if device.type == "cpu" else "clock"
    timed: dict[str, Timing | str] = {n: Timing.of(s, how) for n, s in samples.items()}
    pairs = zip(samples["plain loop"], samples["ours"], strict=True)
    ratio = statistics.median(a / b for a, b in pairs)
    goal = case.gpu_goal if device.type == "cuda" else case.goal
    words = f"sample {name}, {steps} steps" + (f", guidance {guidance:g}" if condition else "")
    row = harness.race_row(words, "sampling", timed, dtype=str(dtype)[6:], kind="sampling engine")
    return row | {
        "steps": steps,
        "guidance": guidance,
        "images_per_second": 1e6 * case.batch / row["us"],
        "over_plain": ratio,
        "goal": verdict([("x the plain loop", ratio, goal, True)]),
    }


def _seconds(job: Callable[[], object], device: torch.device) -> float:
    harness.synchronize(device)
    started = time.perf_counter()
    job()
    harness.synchronize(device)
    return time.perf_counter() - started


def line(row: Row) -> str:
    """A row as one prints it."""
    return (
        f"{row['case']}: plain {row['times_us']['plain loop'] / 1e3:.0f} ms, engine "
        f"{row['us'] / 1e3:.0f} ms, {row['over_plain']:.2f} x, {row['goal']}"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        full = torch.cuda.is_available() or metafunc.config.getoption("--full")
        metafunc.parametrize("name", CASES if full else SMALL)


def test_sampling(
    name: str, benchmark: Any, request: pytest.FixtureRequest, results: list[Row]
) -> None:
    """One case, as pytest-benchmark sees it."""
    rounds = 5 if request.config.getoption("--full") else 3
    rows: list[Row] = []
    benchmark.pedantic(lambda: rows.append(run_case(name, rounds, 4)), rounds=1)
    results += rows
    benchmark.extra_info["row"] = rows[0]


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(map(repr, CASES)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    given = parser.parse_args()
    for name in given.cases or CASES:
        print(line(run_case(name, given.rounds, given.steps)), flush=True)


if __name__ == "__main__":
    main()
