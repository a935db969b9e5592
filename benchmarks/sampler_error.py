"""Error of the samplers against their steps, exactly: the variance they give Gaussian data.

    python -m benchmarks.sampler_error          # draws docs/images/sampler_error.png, in a minute

For data N(0.3, 0.25) the best network is affine, so a sampler is an affine map of x_T and of the
noise of its steps. The map is recovered by running the sampler on unit vectors in float64; nothing
is drawn at random. Every sampler starts from the true marginal at its noisiest time.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.diffusion import (
    VPSDE,
    DiffusionProcess,
    Process,
    ddim_timesteps,
    sample_ancestral,
    sample_ddim,
    sample_euler_maruyama,
    sample_ode_euler,
    sample_ode_heun,
    schedule,
)

MEAN, VARIANCE = 0.3, 0.25
STEPS = (10, 20, 50, 100, 200, 500, 1000)
Noise = Callable[[int, tuple[int, ...]], Tensor]
Draw = Callable[[Tensor, Noise], Tensor]


def levels(process: Process, t: Tensor) -> tuple[Tensor, Tensor]:
    """a and s at times t (B,), each (B, 1) float64."""
    one = torch.ones(len(t), 1, dtype=torch.float64)
    return process.q_sample(one, t, 0 * one), process.q_sample(0 * one, t, one)


def best_network(process: Process) -> Callable[[Tensor, Tensor], Tensor]:
    """eps of data N(MEAN, VARIANCE): s (x - a MEAN) / (a^2 VARIANCE + s^2)."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        a, s = levels(process, t[:1])
        return s * (x - a * MEAN) / (a**2 * VARIANCE + s**2)

    return model


def variance_error(draw: Draw, start: float, calls: int) -> float:
    """|variance of the samples - VARIANCE|, where x_T has the variance `start`.

    Args:
        draw: (x_T (B, 1), noise) -> samples.
        start: of x_T.
        calls: of the network that may be followed by noise.
    """
    x_T = torch.zeros(2 + calls, 1, dtype=torch.float64)
    x_T[1] = 1.0

    def unit(i: int, shape: tuple[int, ...]) -> Tensor:
        noise = torch.zeros(shape, dtype=torch.float64)
        noise[2 + i] = 1.0
        return noise

    out = draw(x_T, unit).flatten()
    gains = (out[1:] - out[0]).square()
    return abs(float(gains[0] * start + gains[1:].sum()) - VARIANCE)


def errors(name: str) -> dict[str, dict[int, float]]:
    """Of one schedule: sampler, calls of the network, error."""
    discrete, continuous = DiffusionProcess(schedule(name)), VPSDE(name)  # type: ignore[arg-type]
    eps, eps_u = best_network(discrete), best_network(continuous)

    def start(process: Process, t: float) -> float:
        in_steps = isinstance(process, DiffusionProcess)
        time = torch.tensor([int(t)]) if in_steps else torch.tensor([t])
        a, s = levels(process, time)
        return float(a**2 * VARIANCE + s**2)

    found: dict[str, dict[int, float]] = {}

    def measure(
        label: str, draw: Callable[[int], Draw], *, of: Process, noisy: bool, calls: int = 1
    ) -> None:
        table = found[label] = {}
        for steps in STEPS:
            t = ddim_timesteps(1000, steps)[0] if of is discrete else 999.0
            number = steps if calls == 1 else 2 * steps - 1
            table[number] = variance_error(draw(steps), start(of, t), steps if noisy else 0)

    measure(
        "DDIM",
        lambda n: lambda x, z: sample_ddim(eps, x, discrete, steps=n, clip_x0=False),
        of=discrete,
        noisy=False,
    )
    measure(
        "DDIM, eta 1",
        lambda n: (
            lambda x, z: sample_ddim(eps, x, discrete, steps=n, eta=1.0, generator=z, clip_x0=False)
        ),
        of=discrete,
        noisy=True,
    )
    measure(
        "Euler-Maruyama",
        lambda n: lambda x, z: sample_euler_maruyama(eps_u, x, continuous, steps=n, generator=z),
        of=continuous,
        noisy=True,
    )
    measure(
        "ODE, Euler",
        lambda n: lambda x, z: sample_ode_euler(eps_u, x, continuous, steps=n),
        of=continuous,
        noisy=False,
    )
    measure(
        "ODE, Heun",
        lambda n: lambda x, z: sample_ode_heun(eps_u, x, continuous, steps=n),
        of=continuous,
        noisy=False,
        calls=2,
    )
    for variance in ("small", "large"):
        error = variance_error(
            lambda x, z, variance=variance: sample_ancestral(  # type: ignore[misc]
                eps, x, discrete, variance=variance, generator=z, clip_x0=False
            ),
            start(discrete, 999),
            1000,
        )
        found[f"DDPM, {variance}"] = {1000: error}
    return found


def draw_plot(found: dict[str, dict[str, dict[int, float]]], path: Path) -> None:
    """One panel a schedule."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for axes, (name, samplers) in zip(panels, found.items(), strict=True):
        for label, table in samplers.items():
            marker = "*" if len(table) == 1 else "o"
            axes.plot(list(table), list(table.values()), marker=marker, ms=4 + 4 * (marker == "*"))
            axes.lines[-1].set_label(label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("calls of the network")
        axes.set_title(f"{name} schedule")
        axes.grid(True, which="both", alpha=0.25)
    panels[0].set_ylabel(f"|variance of samples - {VARIANCE}|")
    panels[1].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Compute, print, draw."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/images/sampler_error.png"))
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    found = {name: errors(name) for name in ("linear", "cosine")}
    for name, samplers in found.items():
        for label, table in samplers.items():
            row = "  ".join(f"{calls}: {error:.2e}" for calls, error in table.items())
            print(f"{name:7s} {label:15s} {row}")
            if not all(math.isfinite(error) for error in table.values()):
                raise SystemExit(f"{name}, {label}: not finite")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    draw_plot(found, options.out)
    print(options.out)


if __name__ == "__main__":
    main()
