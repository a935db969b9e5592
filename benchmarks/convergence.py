"""Train tiny models of both families on two back ends from one seed, and draw both curves.

    python -m benchmarks.convergence triton reference --steps 500                     # on a GPU
    python -m benchmarks.convergence triton reference --steps 500 --dtype bfloat16
    TRITON_INTERPRET=1 python -m benchmarks.convergence triton reference --steps 20   # without one

The same pictures, noise and times meet both. They agree when their smoothed losses differ by no
more than those of two seeds of the second back end do (the spread that another initialisation
makes on the same pictures), and in float32, where the first steps tell an error from rounding, when
the first ten losses are the same to 0.1 %. Exit status 1 where they do not.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdiff import ops
from fastdiff.data import scenes
from fastdiff.diffusion import DiffusionProcess, schedule
from fastdiff.models import create_model

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "iuvit": ("iuvit_cifar10", {"dim": 32, "head_dim": 16, "layers": 3, "patch_size": 2}),
    "ascend": (
        "ascend_cifar10",
        {
            "channels": 16,
            "depth": 1,
            "multipliers": (1, 2),
            "attention_resolutions": (4,),
            "head_dim": 16,
            "groups": 4,
            "dropout": 0.0,
        },
    ),
}
SIDE = 8
FIRST, CLOSE = 10, 1e-3


def losses(
    family: str, back_end: str, *, seed: int, steps: int, batch: int, dtype: str
) -> list[float]:
    """Train one model on captioned scenes, unconditionally; the loss of each step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    preset, overrides = FAMILIES[family]
    torch.manual_seed(seed)
    model = create_model(preset, image_size=SIDE, **overrides).to(device)
    for parameter in model.parameters():  # zero-initialised layers would hide what is behind them
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    process = DiffusionProcess(schedule("cosine"), "eps")
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
    found = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)  # the same for all: seeds only initialise
        picks = torch.randint(len(scenes.TRAIN_CAPTIONS), (batch,), generator=generator).tolist()
        drawn = scenes.render([scenes.TRAIN_CAPTIONS[i] for i in picks], SIDE, seed=step)
        x0 = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.randint(process.steps, (batch,), generator=generator)
        x0, noise, t = x0.to(device), noise.to(device), t.to(device)
        with ops.backend(back_end):
            with autocast:
                out = model(process.q_sample(x0, t, noise), t)
            loss = process.loss(out.float(), x0, t, noise).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        optimizer.step()
        found.append(loss.item())
        if (step + 1) % max(1, steps // 5) == 0:
            print(
                f"{family} {back_end} seed {seed}: {step + 1}/{steps} {found[-1]:.4f}", flush=True
            )
    return found


def smooth(curve: Sequence[float], width: int) -> np.ndarray:
    """Mean over a sliding window."""
    return np.convolve(curve, np.ones(width) / width, mode="valid")


def compare(
    mine: Sequence[float], theirs: Sequence[float], other_seed: Sequence[float], dtype: str
) -> tuple[dict[str, float], bool]:
    """How far two curves lie apart, what a change of seed does, and whether that is fine."""
    width = max(1, len(mine) // 10)
    a, b, c = (smooth(curve, width) for curve in (mine, theirs, other_seed))
    first = np.array(mine[:FIRST]) / np.array(theirs[:FIRST]) - 1
    numbers = {
        "between back ends": float(np.sqrt(np.mean((a - b) ** 2))),
        "between seeds": float(np.sqrt(np.mean((b - c) ** 2))),
        "first steps, relative": float(np.abs(first).max()),
        "last loss": float(a[-1]),
    }
    fine = numbers["between back ends"] <= numbers["between seeds"]
    if dtype == "float32":
        fine = fine and numbers["first steps, relative"] <= CLOSE
    return numbers, bool(fine and np.isfinite(a).all())


def draw(curves: dict[str, dict[str, list[float]]], path: Path, title: str) -> None:
    """Both curves of each family, and the other seed's behind them."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(10, 3.6), layout="constrained")
    for axis, (family, lines) in zip(np.atleast_1d(axes), curves.items(), strict=True):
        looks = zip(lines.items(), ("#1f6feb", "#d1242f", "#b8b8b8"), (2.6, 1.2, 1.0), strict=True)
        for (name, curve), colour, width in looks:
            steps = max(1, len(curve) // 10)
            x = np.arange(steps, len(curve) + 1)
            axis.plot(x, smooth(curve, steps), label=name, color=colour, linewidth=width)
        axis.set_title(f"{family}, {title}")
        axis.set_xlabel("step")
        axis.set_ylabel("loss (eps), running mean")
        axis.legend(frameon=False)
        axis.grid(True, alpha=0.25)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, compare, write the curves and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("back_ends", nargs=2, metavar="BACK_END", help="two of ops.backend's names")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=None, help="default 32; 2 for up to 50 steps")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--out", type=Path, default=Path("runs/convergence"))
    args = parser.parse_args(arguments)
    batch = args.batch or (2 if args.steps <= 50 else 32)
    mine, theirs = args.back_ends
    if mine == theirs:
        parser.error(f"both back ends are {mine!r}; expected two that differ")

    curves: dict[str, dict[str, list[float]]] = {}
    wrong = []
    for family in args.families:
        runs = {}
        for name, back_end, seed in (
            (theirs, theirs, 0),
            (mine, mine, 0),
            (f"{theirs}, another seed", theirs, 1),
        ):
            runs[name] = losses(
                family, back_end, seed=seed, steps=args.steps, batch=batch, dtype=args.dtype
            )
        curves[family] = runs
        numbers, fine = compare(
            runs[mine], runs[theirs], runs[f"{theirs}, another seed"], args.dtype
        )
        text = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
        print(f"{family} {args.dtype}, {args.steps} steps: {'ok' if fine else 'APART'}: {text}")
        wrong += [] if fine else [family]
    args.out.mkdir(parents=True, exist_ok=True)
    stem = f"{mine}-{theirs}-{args.dtype}-{args.steps}"
    (args.out / f"{stem}.json").write_text(json.dumps(curves))
    try:
        draw(curves, args.out / f"{stem}.png", args.dtype)
        print(f"curves: {args.out / f'{stem}.png'}")
    except ImportError:
        print(f"curves: {args.out / f'{stem}.json'} (matplotlib is not installed: no picture)")
    if wrong:
        raise SystemExit(f"convergence: the back ends part in {', '.join(wrong)}")


if __name__ == "__main__":
    main()
