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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.diffusion import DiffusionProcess, classifier_free, sample_ddim, schedule
from fastdiff.models import create_model
from fastdiff.sampling import Engine, PhiloxNoise, SamplerConfig, seed_tensor, starting_noise

from . import harness
from .bench_ops import verdict
from .harness import Refused, Row


@dataclass(frozen=True)
class Case:
    """A preset at a batch size, drawn with guidance where it takes text.

    Attributes:
        preset: Its name.
        batch: Pictures at once.
        goal, gpu_goal: The plain loop's time over the engine's, at least.
        tokens: Text positions, all valid.
    """

    preset: str
    batch: int
    goal: float = 0.99
    gpu_goal: float = 0.99
    tokens: int = 256


# 0.99: never slower, as far as a clock can tell.
CASES = {
    "iuvit_cc12m64 b1": Case("iuvit_cc12m64", 1, goal=1.08),
    "iuvit_cifar10 b1": Case("iuvit_cifar10", 1, gpu_goal=2.0),
    "iuvit_cifar10 b64": Case("iuvit_cifar10", 64),
    "ascend_t2i_128 b1": Case("ascend_t2i_128", 1),
}


def run_case(name: str, rounds: int, steps: int) -> Row:
    """Check that both draw the same, time them, and make the row.

    Raises:
        Refused: The pictures differ.
    """
    case = CASES[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    model = create_model(case.preset).to(device, dtype).eval()
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
    times: list[tuple[float, float]] = []
    for _ in range(rounds):
        times.append((_seconds(plain, device), _seconds(ours, device)))
    ratio = statistics.median(a / b for a, b in times)
    goal = case.gpu_goal if device.type == "cuda" else case.goal
    return {
        "case": name,
        "steps": steps,
        "guidance": guidance,
        "plain_ms": 1e3 * statistics.median(a for a, _ in times),
        "engine_ms": 1e3 * statistics.median(b for _, b in times),
        "over_plain": ratio,
        "goal": verdict([("over_plain", ratio, goal, True)]),
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
        f"{row['case']}, {row['steps']} steps, guidance {row['guidance']:g}: plain "
        f"{row['plain_ms']:.0f} ms, engine {row['engine_ms']:.0f} ms, {row['over_plain']:.2f} x, "
        f"{row['goal']}"
    )


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
