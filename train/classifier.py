#!/usr/bin/env python
"""Train a classifier of noised pictures, for classifier guidance.

    python train/classifier.py --data /data/imagenet64 --out runs/classifier64
    python train/classifier.py --data pictures --model.image-size 128 --model.multipliers 1 1 2 3 4

The data are a folder with a folder of pictures for each label. The same command again continues an
interrupted run. Then:

    classifier = NoisyClassifier.from_pretrained("runs/classifier64/model")
    guided = classifier_guided(model, classifier, 1.0, process, y=labels)
"""

from __future__ import annotations

import sys

import torch
import tyro

from fastdiff.training.classifier import ClassifierRun, train_classifier
from fastdiff.training.cli import log_to_stderr


def main() -> None:
    """Parse and train."""
    run = tyro.cli(ClassifierRun, description=__doc__)
    log_to_stderr()
    from fastdiff.data.faults import BadSampleError

    try:
        train_classifier(run, "cuda" if torch.cuda.is_available() else "cpu")
    except (BadSampleError, FloatingPointError, OSError, ValueError) as error:
        sys.exit(f"train/classifier.py: {error}")


if __name__ == "__main__":
    main()
