"""Drawing pictures with a trained backbone: fast, repeatable, and safe to interrupt."""

from __future__ import annotations

from fastdiff.sampling.engine import SAMPLERS, Engine, SamplerConfig
from fastdiff.sampling.graphs import GraphedModel
from fastdiff.sampling.noise import PhiloxNoise, seed_tensor, starting_noise
from fastdiff.sampling.output import Output
from fastdiff.sampling.run import draw_all, prompts_of, weights_digest

__all__ = [
    "SAMPLERS",
    "Engine",
    "GraphedModel",
    "Output",
    "PhiloxNoise",
    "SamplerConfig",
    "draw_all",
    "prompts_of",
    "seed_tensor",
    "starting_noise",
    "weights_digest",
]
