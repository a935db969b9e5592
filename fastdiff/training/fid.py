"""FID while a run trains: of the same seeds and conditions each time, drawn on all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastdiff.grid import to_uint8
from fastdiff.metrics import Statistics, frechet_distance, load_torchscript
from fastdiff.metrics.ranks import in_order, own_batches
from fastdiff.metrics.statistics import Moments, warn_if_few
from fastdiff.training.config import Recipe
from fastdiff.training.learner import Learner

BATCH = 64


class ScheduledFID:
    """FID of a recipe's pictures against stored statistics.

    Of a few thousand pictures it is biased upwards, and tells one step of a run from another, not
    one paper from another: `fastdiff fid` on 50,000 does that.

    Args:
        recipe: The run's; `sample.fid_statistics` and `sample.fid_extractor` say against what.
        captions: As many as pictures, for a model of text.
        labels: Number of labels, 0 without.
        device: Where this rank computes.

    Raises:
        FileNotFoundError, ValueError: A file is missing, or the statistics are of another
            extractor.
    """

    def __init__(
        self, recipe: Recipe, captions: Sequence[str] | None, labels: int, device: torch.device
    ) -> None:
        sample = recipe.sample
        assert sample.fid_statistics is not None, "the recipe refuses FID without"
        assert sample.fid_extractor is not None, "the recipe refuses FID without"
        self.recipe, self.captions, self.labels = recipe, captions, labels
        self.statistics = Statistics.load(sample.fid_statistics)
        about = self.statistics.about.get("extractor") or {}
        low, high = about.get("value_range") or (0.0, 255.0)
        self.extractor = load_torchscript(
            sample.fid_extractor, value_range=(low, high), image_size=about.get("image_size")
        )
        if about.get("sha256") not in (None, self.extractor.sha256):
            raise ValueError(
                f"{sample.fid_statistics} was made with the extractor {about.get('name')} "
                f"({about['sha256'][:12]}), sample.fid_extractor={sample.fid_extractor} is another"
            )
        self.extractor.to(device)
        warn_if_few("FID while training", sample.fid_images, len(self.statistics.mean))

    def __call__(self, learner: Learner) -> float:
        """FID of a learner's pictures, the same on any number of ranks. Collective.

        Args:
            learner: With the weights to judge, on every rank.
        """
        batches = -(-self.recipe.sample.fid_images // BATCH)
        moments = Moments()
        for features in in_order(batches, self._own(learner, batches)):
            moments.add(features)
        stored = self.statistics
        return frechet_distance(*moments.result(), stored.mean, stored.covariance)

    def _own(self, learner: Learner, batches: int) -> Iterator[Tensor | Exception]:
        for batch in own_batches(batches):
            try:
                yield self._features(learner, batch)
            except Exception as error:  # raised on every rank
                yield error

    def _features(self, learner: Learner, batch: int) -> Tensor:
        sample = self.recipe.sample
        seeds = range(batch * BATCH, min((batch + 1) * BATCH, sample.fid_images))
        if self.captions is not None:
            captions = self.captions[seeds.start : seeds.stop]
            pictures = learner.draw(captions, seeds, steps=sample.steps, guidance=sample.guidance)
        else:
            labels = [seed % self.labels for seed in seeds] if self.labels else None
            pictures = learner.draw_labels(
                labels, seeds, steps=sample.steps, guidance=sample.guidance
            )
        return self.extractor(to_uint8(pictures)).features.cpu()
