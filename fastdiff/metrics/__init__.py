"""Evaluation: statistics of pictures, FID, KID, Inception score, precision and recall."""

from fastdiff.metrics.evaluation import SCORES, caption_agreement, evaluate
from fastdiff.metrics.extractors import Extractor, from_module, load_torchscript
from fastdiff.metrics.pictures import Pictures, open_pictures
from fastdiff.metrics.scores import (
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from fastdiff.metrics.statistics import Statistics, measure

__all__ = [
    "SCORES",
    "Extractor",
    "Pictures",
    "Statistics",
    "caption_agreement",
    "evaluate",
    "frechet_distance",
    "from_module",
    "inception_score",
    "kernel_distance",
    "load_torchscript",
    "measure",
    "open_pictures",
    "precision_recall",
]
