"""Any scheduler of diffusers as a sampler: DPM-Solver++, UniPC, Euler, Heun, DEIS, LMS, PNDM, ...

    scheduler = make_scheduler("DPMSolverMultistepScheduler", process, timestep_spacing="trailing")
    pictures = sample_scheduler(model, x_T, process, scheduler, steps=20)

Letters: B batch, T steps of the schedule.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor

from fastdiff.diffusion import Denoiser, DiffusionProcess, StepNoise
from fastdiff.diffusion.stepping import predict, progress_bar

# Our name of what a network predicts: diffusers'.
PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def make_scheduler(name: str, process: DiffusionProcess, **options: Any) -> Any:
    """A scheduler of diffusers for a process: its betas, what its network predicts, no clipping.

    Args:
        name: A class of diffusers, for example "UniPCMultistepScheduler".
        process: What the model was trained for.
        **options: Of that class, for example `timestep_spacing="trailing"`, `algorithm_type=...`,
            `clip_sample=True`, `thresholding=True`.

    Returns:
        The scheduler, for `sample_scheduler`.

    Raises:
        ValueError: No such class, one that drives another process or cannot take this one's
            prediction, or an option that it does not have.
    """
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)):
        raise ValueError(f"make_scheduler: diffusers has no scheduler {name!r}")
    takes = inspect.signature(found).parameters
    if "trained_betas" not in takes:
        raise ValueError(
            f"make_scheduler: {name} takes no betas: it drives another process than {process!r}"
        )
    unknown = sorted(options.keys() - takes.keys())
    if unknown:
        raise ValueError(f"make_scheduler: {name} has no option {', '.join(unknown)}")
    ours: dict[str, Any] = {
        "num_train_timesteps": process.steps,
        "trained_betas": process.schedule.betas.numpy(),
        "prediction_type": PREDICTION_TYPES[process.prediction],
        "clip_sample": False,
    }
    scheduler = found(**{**{k: v for k, v in ours.items() if k in takes}, **options})
    check_scheduler(scheduler, process)
    return scheduler


def check_scheduler(scheduler: Any, process: DiffusionProcess) -> None:
    """Raise ValueError unless a scheduler drives this process with this prediction."""
    name, config = type(scheduler).__name__, scheduler.config
    ours = PREDICTION_TYPES[process.prediction]
    # Those that have no such setting take the noise.
    theirs = config.get("prediction_type", "epsilon")
    if theirs != ours:
        raise ValueError(
            f"{name} has prediction_type={theirs!r}, the model predicts {process.prediction} "
            f"({ours!r}): make it with make_scheduler, or set prediction_type"
        )
    alpha_bar = getattr(scheduler, "alphas_cumprod", None)
    if alpha_bar is None or config.get("use_flow_sigmas", False):
        raise ValueError(
            f"{name} drives another process than x_t = sqrt(alpha_bar) x_0 + "
            "sqrt(1 - alpha_bar) eps"
        )
    if len(alpha_bar) != process.steps:
        raise ValueError(f"{name} has {len(alpha_bar)} steps, the process {process.steps}")
    log_snr = torch.as_tensor(alpha_bar).double().cpu().logit()
    apart = float((log_snr - process.schedule.snr.log()).abs().max())
    # In float32 the last alpha_bar of the cosine, 2e-9, is right to 1e-4.
    if not apart < 1e-2:
        raise ValueError(
            f"{name} has other noise levels than {process!r}: log SNR differs by {apart:.3g}; make "
            "it with make_scheduler"
        )


@torch.no_grad()
def sample_scheduler(
    model: Denoiser,
    x_T: Tensor,
    process: DiffusionProcess,
    scheduler: Any,
    *,
    steps: int = 50,
    generator: torch.Generator | Sequence[torch.Generator] | StepNoise | None = None,
    progress: bool = False,
    **step_options: Any,
) -> Tensor:
    """Draw samples with a scheduler of diffusers.

    Args:
        model: (x, t) -> the process's prediction, shaped as x. t is (B,), int64, or float32 where
            the scheduler asks between two steps. A learned variance behind the prediction is handed
            on where the scheduler's `variance_type` is a learned one, and left out elsewhere.
        x_T: standard normal, (B, ...); the network sees every x in this dtype.
        process: schedule and meaning of the network's output.
        scheduler: of diffusers; `make_scheduler` makes one that fits. It is left set to `steps`.
        steps: 1..T; schedulers of second order call the network more often.
        generator: where its noise comes from: a torch generator, or one for each picture; or a
            callable (i, shape) -> noise of the i-th call, where the scheduler can be given noise
            (DDIM, DPM-Solver multistep) or draws none; None: torch's own.
        progress: show a tqdm bar.
        **step_options: of the scheduler's `step`, for example `eta`.

    Returns:
        Samples shaped as x_T, in its dtype.

    Raises:
        ValueError: the scheduler does not fit the process, steps is out of range, a callable for a
            scheduler that draws its noise itself, an option that its step does not have, or the
            model's output has another shape.

    Numerics: the state is kept in float32. Thresholding and clipping are the scheduler's own.
    """
    name = type(scheduler).__name__
    check_scheduler(scheduler, process)
    if not 1 <= steps <= process.steps:
        raise ValueError(f"sample_scheduler: steps must lie in 1..{process.steps}, got {steps}")
    takes = inspect.signature(scheduler.step).parameters
    unknown = sorted(step_options.keys() - takes.keys())
    if unknown:
        raise ValueError(f"sample_scheduler: {name}.step has no option {', '.join(unknown)}")
    noise = generator if callable(generator) else None
    if noise is not None and "generator" in takes and "variance_noise" not in takes:
        raise ValueError(
            f"sample_scheduler: {name} draws its noise itself; give a torch.Generator, or a list "
            "of one for each picture"
        )
    if noise is None and "generator" in takes and generator is not None:
        step_options["generator"] = (
            generator if isinstance(generator, torch.Generator) else list(generator)  # type: ignore[arg-type]
        )
    learned = "learned" in str(scheduler.config.get("variance_type"))

    scheduler.set_timesteps(steps, device=x_T.device)
    x = x_T.to(torch.promote_types(x_T.dtype, torch.float32)) * scheduler.init_noise_sigma
    times = scheduler.timesteps
    for i in progress_bar(range(len(times)), progress):
        t = times[i]
        seen = scheduler.scale_model_input(x, t).to(x_T.dtype)
        out, variance = predict(model, seen, _as_step(t).expand(len(x)), x_T.dtype)
        if learned and variance is not None:
            out = torch.cat([out, variance], dim=1)
        if noise is not None and "variance_noise" in takes:
            step_options["variance_noise"] = noise(i, tuple(x.shape)).to(x)
        x = scheduler.step(out.to(x.dtype), t, x, **step_options).prev_sample
    return x.to(x_T.dtype)


def _as_step(t: Tensor) -> Tensor:
    """t as int64, or as float32 where the scheduler keeps fractions."""
    return t.to(torch.float32 if t.is_floating_point() else torch.int64)


__all__ = ["PREDICTION_TYPES", "check_scheduler", "make_scheduler", "sample_scheduler"]
