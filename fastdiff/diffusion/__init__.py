"""The diffusion process of the paper, its samplers and its guidance. Imports no model."""

from __future__ import annotations

from fastdiff.diffusion.guidance import (
    classifier_free,
    classifier_guided,
    clip_guided,
    gradient_guided,
)
from fastdiff.diffusion.process import DiffusionProcess, Prediction, Process
from fastdiff.diffusion.samplers import (
    PictureNoise,
    ddim_timesteps,
    initial_noise,
    sample_ancestral,
    sample_ddim,
)
from fastdiff.diffusion.schedules import (
    NoiseSchedule,
    cosine_schedule,
    linear_schedule,
    schedule,
)
from fastdiff.diffusion.sde import (
    VPSDE,
    sample_euler_maruyama,
    sample_ode_euler,
    sample_ode_heun,
)
from fastdiff.diffusion.stepping import Denoiser, StepNoise
from fastdiff.diffusion.thresholding import Threshold, dynamic_threshold, static_threshold

__all__ = [
    "VPSDE",
    "Denoiser",
    "DiffusionProcess",
    "NoiseSchedule",
    "PictureNoise",
    "Prediction",
    "Process",
    "StepNoise",
    "Threshold",
    "classifier_free",
    "classifier_guided",
    "clip_guided",
    "cosine_schedule",
    "ddim_timesteps",
    "dynamic_threshold",
    "gradient_guided",
    "initial_noise",
    "linear_schedule",
    "sample_ancestral",
    "sample_ddim",
    "sample_euler_maruyama",
    "sample_ode_euler",
    "sample_ode_heun",
    "schedule",
    "static_threshold",
]
