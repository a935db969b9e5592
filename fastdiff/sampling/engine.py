"""The engine: what a batch of pictures takes beyond a loop over the network.

The text's keys and values are made once per sample, noise follows each picture's own seed, and on
a GPU the network runs as one CUDA graph per shape.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdiff.diffusion import (
    VPSDE,
    Denoiser,
    DiffusionProcess,
    classifier_free,
    ddim_timesteps,
    sample_ancestral,
    sample_ddim,
    sample_euler_maruyama,
    sample_ode_euler,
    sample_ode_heun,
)
from fastdiff.models import Backbone
from fastdiff.nn import ProjectedText
from fastdiff.sampling.graphs import GraphedModel
from fastdiff.sampling.noise import PhiloxNoise, seed_tensor, starting_noise

SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddim": sample_ddim,
    "ancestral": sample_ancestral,
    "euler_maruyama": sample_euler_maruyama,
    "ode_euler": sample_ode_euler,
    "ode_heun": sample_ode_heun,
}
_CONTINUOUS = ("euler_maruyama", "ode_euler", "ode_heun")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """A sampler by name, with its settings.

    Args:
        name: One of `SAMPLERS`.
        steps: Steps, 1..T; None = the sampler's default. "ancestral" takes all T.
        eta: Of "ddim".
        spacing: Of "ddim": "trailing" | "leading" | "linspace".
        variance: Of "ancestral": "small" | "large" | "learned".
        clip_x0: Clamp the predicted x_0 to [-1, 1]; None = the sampler's default.

    Raises:
        ValueError: An unknown name, or a setting of another sampler.
    """

    name: str = "ddim"
    steps: int | None = None
    eta: float | None = None
    spacing: str | None = None
    variance: str | None = None
    clip_x0: bool | None = None

    def __post_init__(self) -> None:
        if self.name not in SAMPLERS:
            raise ValueError(f"SamplerConfig: name={self.name!r}, expected one of {list(SAMPLERS)}")
        taken = inspect.signature(SAMPLERS[self.name]).parameters
        for name in ("eta", "spacing", "variance"):
            if getattr(self, name) is not None and name not in taken:
                raise ValueError(f"SamplerConfig: {self.name} takes no {name}")
        if self.eta is not None and not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"SamplerConfig: eta={self.eta}, expected 0 to 1")

    def resolved(self, process: DiffusionProcess) -> dict[str, Any]:
        """Every setting of the sampler by name, defaults filled in.

        Raises:
            ValueError: steps outside 1..T.
        """
        signature = inspect.signature(SAMPLERS[self.name]).parameters
        names = [n for n in ("steps", "eta", "spacing", "variance", "clip_x0") if n in signature]
        given = {name: getattr(self, name) for name in names}
        settings = {n: signature[n].default if v is None else v for n, v in given.items()}
        total = process.steps
        steps = self.steps if self.name == "ancestral" else settings["steps"]
        if steps is not None and not 1 <= steps <= total:
            raise ValueError(f"SamplerConfig: steps={steps}, expected 1 to {total}")
        if self.name == "ancestral" and steps not in (None, total):
            raise ValueError(f"SamplerConfig: ancestral takes all {total} steps, not {steps}")
        if self.name == "ddim":
            ddim_timesteps(total, settings["steps"], settings["spacing"])
        return settings

    def bind(self, process: DiffusionProcess) -> Callable[..., Tensor]:
        """The sampler as (model, x_T, generator=..., progress=...) -> pictures."""
        settings = self.resolved(process)
        sampler = SAMPLERS[self.name]
        if self.name not in _CONTINUOUS:
            return partial(sampler, process=process, **settings)
        sde = VPSDE(process.schedule.name, process.prediction)  # type: ignore[arg-type]
        bound = partial(sampler, process=sde, **settings)
        if "generator" in inspect.signature(sampler).parameters:
            return bound
        return lambda model, x_T, generator, **rest: bound(model, x_T, **rest)


class _TextOnce:
    """A backbone that makes the keys and values of each text it is given only the first time.

    A text is the tensor objects that it comes as: guidance gives the same ones at each step.
    """

    def __init__(self, backbone: Backbone, call: Callable[..., Tensor]) -> None:
        self._backbone, self._call = backbone, call
        self._seen: list[tuple[tuple[Tensor | None, ...], ProjectedText]] = []

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        *,
        context_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        if context is None:
            return self._call(x, t, None, y=y)
        given = (context, context_mask, pooled)
        for seen, text in self._seen:
            if all(a is b for a, b in zip(seen, given, strict=True)):
                return self._call(x, t, text, y=y)
        text = self._backbone.project_text(context, context_mask=context_mask, pooled=pooled)
        self._seen.append((given, text))
        return self._call(x, t, text, y=y)


class Engine:
    """Draws batches of pictures.

    Args:
        model: The network, on its device; it is put into evaluation mode.
        process: Schedule and meaning of the network's output.
        sampler: Which one, with its settings.
        guidance: Scale of classifier-free guidance by text or, without text, by label; 1 = none.
        interval: The steps t (0..T-1) in which it guides; None = all.
        rescale: Of the guided output, 0..1 (`classifier_free`).
        graphs: Run the network as CUDA graphs; None = on a GPU.
        compile: Compile the network with torch.compile, which takes minutes at each new shape.

    Raises:
        ValueError: A setting out of range.
    """

    def __init__(
        self,
        model: Backbone,
        process: DiffusionProcess,
        sampler: SamplerConfig,
        *,
        guidance: float = 1.0,
        interval: tuple[float, float] | None = None,
        rescale: float = 0.0,
        graphs: bool | None = None,
        compile: bool = False,
    ) -> None:
        if not guidance >= 0:
            raise ValueError(f"Engine: guidance={guidance}, expected at least 0")
        self.model, self.process = model.eval(), process
        self.guidance, self.sampler = guidance, sampler.bind(process)
        self._guidance: dict[str, Any] = {"rescale": rescale}
        if interval is not None:
            self._guidance["interval"] = interval
        self.device = next(model.parameters()).device
        self._call: Callable[..., Tensor] = torch.compile(model) if compile else model
        if self.device.type == "cuda" if graphs is None else graphs:
            self._call = GraphedModel(self._call)

    @torch.no_grad()
    def draw(
        self,
        seeds: Sequence[int],
        *,
        size: tuple[int, int] | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        y: Tensor | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draw one picture for each seed.

        Args:
            seeds: B seeds 0..2^64-1; a picture is a function of its seed and condition alone, up to
                rounding, which the batch may change.
            size: (H, W); None = the model's.
            context: (B, S, width) text features, or None. Fewer positions than the model saw in
                training are as good.
            context_mask: (B, S) bool, True = valid.
            pooled: (B, width).
            y: (B,) int64 labels.
            progress: Show a bar over the steps.

        Returns:
            (B, C, H, W) float32 on the model's device, in [-1, 1] up to what the sampler leaves.

        Raises:
            ValueError: Guidance without a condition, or shapes that do not fit.
        """
        config = self.model.config
        own = seed_tensor(seeds, self.device)
        x_T = starting_noise(own, (config.in_channels, *(size or config.sides)))
        denoiser = self._denoiser(context, context_mask, pooled, y)
        return self.sampler(denoiser, x_T, generator=PhiloxNoise(own), progress=progress)

    def _denoiser(
        self, context: Tensor | None, mask: Tensor | None, pooled: Tensor | None, y: Tensor | None
    ) -> Denoiser:
        model = _TextOnce(self.model, self._call)
        if context is None and y is None and self.guidance not in (0, 1):
            raise ValueError(f"Engine: guidance={self.guidance} needs text or labels, got neither")
        if context is None and self.guidance == 0:
            y = None
        if self.guidance == 1 or (context is None and y is None):
            return partial(model, context=context, context_mask=mask, pooled=pooled, y=y)
        # With text the label is given to both halves: only the text is guided.
        null_y = self.model.config.num_classes if context is None else None
        return classifier_free(
            model,
            self.guidance,
            context=context,
            context_mask=mask,
            pooled=pooled,
            y=y,
            null_y=null_y,
            **self._guidance,
        )
