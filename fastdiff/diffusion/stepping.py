"""What the loop of every sampler does: call the network, clip its x_0, draw noise, show a bar.

Legend: B batch; x_0 predicted data; i call of the network, 0 first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor

from fastdiff.diffusion.process import Process
from fastdiff.diffusion.thresholding import Threshold, static_threshold

Denoiser = Callable[[Tensor, Tensor], Tensor]
StepNoise = Callable[[int, tuple[int, ...]], Tensor]


def predict(
    model: Denoiser, x: Tensor, t: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The network's output at x, and what a learned variance puts behind it in the channels.

    Raises:
        ValueError: the output has neither x's shape nor that of twice as many channels.
    """
    out = model(x.to(dtype), t)
    if out.shape == x.shape:
        return out, None
    if x.ndim > 1 and out.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:]):
        prediction, variance = out.chunk(2, dim=1)
        return prediction, variance
    raise ValueError(
        f"sampler: the model must return x's shape {tuple(x.shape)}, or twice the channels where "
        f"it learned the variance, got {tuple(out.shape)}"
    )


def clipped(x0: Tensor, clip_x0: bool | Threshold) -> Tensor:
    """x_0 as a sampler's `clip_x0` has it."""
    if isinstance(clip_x0, bool):
        return static_threshold(x0) if clip_x0 else x0
    return clip_x0(x0)


def to_x0_and_eps(
    process: Process, out: Tensor, x: Tensor, t: Tensor, clip_x0: bool | Threshold
) -> tuple[Tensor, Tensor]:
    """x_0 and eps that an output stands for; eps taken again from x_0 where that was clipped."""
    x0 = clipped(process.to_x0(out, x, t), clip_x0)
    if clip_x0 is False:
        return x0, process.to_eps(out, x, t)
    return x0, process.eps_from_x0(x0, x, t)


def draw(source: torch.Generator | StepNoise | None, i: int, x: Tensor) -> Tensor:
    """Standard normal noise of the i-th call, as x."""
    if source is None or isinstance(source, torch.Generator):
        return torch.randn(x.shape, generator=source, device=x.device, dtype=x.dtype)
    return source(i, tuple(x.shape)).to(x)


def progress_bar(steps: range, progress: bool) -> Iterable[int]:
    """`steps`, with a tqdm bar where `progress`."""
    if not progress:
        return steps
    from tqdm.auto import tqdm

    return cast(Iterable[int], tqdm(steps, desc="sampling", unit="step"))
