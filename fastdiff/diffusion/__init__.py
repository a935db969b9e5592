"""The diffusion process of the paper, its samplers and its guidance. Imports no model."""

from __future__ import annotations

from fastdiff.diffusion.guidance import classifier_free
from fastdiff.diffusion.process import DiffusionProcess, Prediction
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

__all__ = [
    "DiffusionProcess",
    "NoiseSchedule",
    "PictureNoise",
    "Prediction",
    "classifier_free",
    "cosine_schedule",
    "ddim_timesteps",
    "initial_noise",
    "linear_schedule",
    "sample_ancestral",
    "sample_ddim",
    "schedule",
]
