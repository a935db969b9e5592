"""What is trained: a backbone, and the small text encoder where the recipe has one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.diffusion import (
    DiffusionProcess,
    classifier_free,
    initial_noise,
    sample_ddim,
    schedule,
)
from fastdiff.models import MODELS, Backbone
from fastdiff.text import SmallTextEncoder, T5TextEncoder
from fastdiff.training.config import Recipe

AnyTextEncoder = SmallTextEncoder | T5TextEncoder


def make_process(recipe: Recipe) -> DiffusionProcess:
    """The recipe's diffusion process."""
    diffusion = recipe.diffusion
    return DiffusionProcess(schedule(diffusion.schedule, diffusion.steps), diffusion.prediction)


def make_t5(recipe: Recipe, device: torch.device) -> T5TextEncoder:
    """The recipe's pretrained T5.

    Raises:
        ValueError: Its width is not the one the backbone takes.
    """
    config = recipe.text
    encoder = T5TextEncoder(
        config.name,
        dtype=config.dtype,
        max_length=config.max_length,
        revision=config.revision,
        paper_text_mode=config.paper_mode,
        device=device,
    )
    if encoder.width != recipe.model.context_dim:
        raise ValueError(
            f"text encoder {config.name} has width {encoder.width}, the model takes "
            f"model.context_dim={recipe.model.context_dim}; set it to {encoder.width}"
        )
    return encoder


class Learner(nn.Module):
    """Loss of a micro-batch, and pictures for captions.

    Args:
        recipe: The run's.
        text: The text encoder. A small one becomes part of the learner and is trained; a
            pretrained one stays outside and frozen; None where the
            features are stored, or where there is no text.
    """

    def __init__(self, recipe: Recipe, text: AnyTextEncoder | None) -> None:
        super().__init__()
        # As the authors' code had it, features are padded and seen as a whole.
        self._padded = recipe.text.max_length if recipe.text.paper_mode else None
        self.process = make_process(recipe)
        kind = next(model for model in MODELS.values() if model.Config is type(recipe.model))
        self.backbone: Backbone = kind(recipe.model)
        self.backbone.set_checkpointing(recipe.train.checkpointing)
        self.text: SmallTextEncoder | None = text if isinstance(text, SmallTextEncoder) else None
        self._min_snr = recipe.train.min_snr
        self._frozen = [text] if isinstance(text, T5TextEncoder) else []

    @property
    def encoder(self) -> AnyTextEncoder:
        """The text encoder, trained or frozen."""
        if self.text is not None:
            return self.text
        if not self._frozen:
            raise RuntimeError("Learner: no text encoder; it was made for stored text features")
        return self._frozen[0]

    def forward(
        self,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        drop: Tensor,
        mask: Tensor | None = None,
        ids: Tensor | None = None,
        context: Tensor | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """Losses of a micro-batch.

        Args:
            x0: (B, 3, H, W) images in [-1, 1].
            noise: (B, 3, H, W) standard normal.
            t: (B,) int64, steps 0..T-1.
            drop: (B,) bool, True = null condition.
            mask: (B, S) bool, True = valid; for a model of text.
            ids: (B, S) int64 token ids for the text encoder; or
            context: (B, S, width) its features, where they are stored.
            y: (B,) int64 labels, for a model of labels.

        Returns:
            (B,) float32, mean squared error of each image's prediction; in training times its
            min-SNR weight, where the recipe has one.
        """
        if ids is not None:
            assert mask is not None, "tokens come with their mask"
            context, mask = self.encoder.features(ids, mask)
        elif context is not None and self._padded is not None:
            context = nn.functional.pad(context, (0, 0, 0, self._padded - context.shape[1]))
            mask = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
        x_t = self.process.q_sample(x0, t, noise)
        if mask is not None:
            mask = mask & ~drop.unsqueeze(1)
        if y is not None:
            y = torch.where(drop, self.backbone.config.num_classes, y)
        out = self.backbone(x_t, t, context, context_mask=mask, y=y)
        losses = self.process.loss(out, x0, t, noise)
        if self._min_snr is not None and self.training:
            losses = losses * self.process.min_snr_weight(t, self._min_snr)
        return losses

    @torch.no_grad()
    def draw(
        self,
        captions: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int = 50,
        guidance: float = 3.0,
        batch: int = 64,
        progress: Callable[[int], Any] | None = None,
    ) -> Tensor:
        """Draw one picture for each caption with DDIM.

        Args:
            captions: B captions.
            seeds: B seeds; a picture depends on its own seed and caption alone.
            steps: DDIM steps.
            guidance: Scale of classifier-free guidance; 0 hides the captions.
            batch: Pictures drawn at once.
            progress: Called with the number of pictures that came.

        Returns:
            (B, 3, H, W) float32 in [-1, 1], on the CPU.
        """

        def condition(part: slice) -> dict[str, Any]:
            if guidance == 0:
                return {}
            context, mask = self.encoder.encode(list(captions[part]))
            return {"context": context.to(self._device), "context_mask": mask.to(self._device)}

        return self._draw(seeds, condition, steps, guidance, batch, progress)

    @torch.no_grad()
    def draw_labels(
        self,
        labels: Sequence[int] | None,
        seeds: Sequence[int],
        *,
        steps: int = 50,
        guidance: float = 1.0,
        batch: int = 64,
    ) -> Tensor:
        """Draw one picture for each seed with DDIM, without text.

        Args:
            labels: B of the model's labels; None for a model without.
            seeds: B seeds; a picture depends on its own seed and label alone.
            steps: DDIM steps.
            guidance: Scale of classifier-free guidance.
            batch: Pictures drawn at once.

        Returns:
            (B, 3, H, W) float32 in [-1, 1], on the CPU.
        """

        def condition(part: slice) -> dict[str, Any]:
            if labels is None:
                return {}
            y = torch.tensor(labels[part], device=self._device)
            return {"y": y, "null_y": self.backbone.config.num_classes}

        return self._draw(seeds, condition, steps, guidance, batch, None)

    @property
    def _device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    def _draw(
        self,
        seeds: Sequence[int],
        condition: Callable[[slice], dict[str, Any]],
        steps: int,
        guidance: float,
        batch: int,
        progress: Callable[[int], Any] | None,
    ) -> Tensor:
        height, width = self.backbone.config.image_size
        pictures = []
        training = self.training
        self.eval()
        for start in range(0, len(seeds), batch):
            part = slice(start, start + batch)
            given = condition(part)
            model: Callable[[Tensor, Tensor], Tensor] = self.backbone
            if given:
                model = classifier_free(self.backbone, guidance, **given)
            x_T = initial_noise(seeds[part], (3, height, width), self._device)
            pictures.append(sample_ddim(model, x_T, self.process, steps=steps).float().cpu())
            if progress is not None:
                progress(len(x_T))
        self.train(training)
        return torch.cat(pictures).clamp(-1.0, 1.0)
