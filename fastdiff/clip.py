"""CLIP: features of pictures, with gradient, and of texts; for guidance and for the CLIP score.

transformers is imported when one is made. Legend: B batch, H W pixels, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

# Of OpenAI's models, and of whatever names none of its own.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class CLIP:
    """A pretrained CLIP of transformers, frozen and in evaluation mode.

    Pictures go through the whole preparation as tensors (shorter side to the model's size by an
    antialiased bicubic filter, centre crop, the model's mean and deviation), so a gradient reaches
    their pixels. Like `T5TextEncoder` it is not an nn.Module on purpose.

    Args:
        name_or_path: model name, or a folder with config.json, weights and tokenizer.
        dtype: "float32" or "bfloat16", of weights and computation.
        revision: branch, tag or commit of a model that is given by name.
        device: where the weights go.

    Raises:
        ValueError: dtype, a model that is not a CLIP, or one whose weights or tokenizer are not
            whole.
        OSError: the model is neither a folder nor to be had by name.

    Source: Radford et al. 2021.
    """

    def __init__(
        self,
        name_or_path: str | Path,
        *,
        dtype: Literal["bfloat16", "float32"] = "float32",
        revision: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if dtype not in ("bfloat16", "float32"):
            raise ValueError(f"CLIP: dtype must be bfloat16 or float32, got {dtype}")
        from transformers import AutoConfig, AutoTokenizer, CLIPModel

        source, at = str(name_or_path), revision or "main"
        try:
            config = AutoConfig.from_pretrained(source, revision=at)
            if config.model_type != "clip":
                raise ValueError(f"CLIP: {source} is a {config.model_type}, not a clip")
            self._tokenizer: Any = AutoTokenizer.from_pretrained(source, revision=at)
            # Typed as the model alone; with output_loading_info it is a pair.
            loaded: Any = CLIPModel.from_pretrained(
                source, revision=at, dtype=getattr(torch, dtype), output_loading_info=True
            )
        except OSError as error:
            raise OSError(
                f"CLIP: cannot load {source!r}. Give a folder that holds config.json, weights and "
                f"tokenizer; on a machine with a network, `hf download {source} --local-dir "
                f"FOLDER` makes one. Cause: {error}"
            ) from error
        model, loading = loaded
        # transformers only logs these, and leaves such weights random.
        if loading["missing_keys"]:
            missing = sorted(loading["missing_keys"])
            raise ValueError(
                f"CLIP: {source} lacks {len(missing)} weights, {missing[:3]} for instance"
            )
        # Where the tokenizer's files are absent, transformers makes one without a single word.
        if set(self._tokenizer.get_vocab()) <= set(self._tokenizer.all_special_tokens):
            raise ValueError(f"CLIP: {source} has no tokenizer, or one without words")
        self._model = model.requires_grad_(False).eval().to(device)
        self._size = int(config.vision_config.image_size)
        self._positions = int(config.text_config.max_position_embeddings)
        mean, std = _normalisation(source, at)
        self._mean, self._std = (
            torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (mean, std)
        )
        self._name = f"clip:{source}@{at}:{dtype}"

    @property
    def name(self) -> str:
        """Model as given, revision and dtype; to be stored beside a score."""
        return self._name

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(self._model.device)

    def encode_images(self, pictures: Tensor) -> Tensor:
        """Features of pictures.

        Args:
            pictures: (B, 3, H, W) float in [-1, 1]; values beyond are not clipped, since a clipped
                pixel has no gradient.

        Returns:
            (B, D) float32 of length 1, differentiable with respect to the pictures.

        Raises:
            ValueError: another shape.
        """
        return self._encode_images(self._prepared(pictures))

    def _prepared(self, pictures: Tensor) -> Tensor:
        if pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ValueError(f"CLIP: pictures {tuple(pictures.shape)}; expected (B, 3, H, W)")
        x = (pictures.float().to(self.device) + 1) / 2
        height, width = x.shape[2:]
        short = min(height, width)
        # As the preparation in transformers rounds: the longer side is cut down to a whole pixel.
        size = (self._size * height // short, self._size * width // short)
        if size != (height, width):
            x = F.interpolate(x, size, mode="bicubic", antialias=True)
        top, left = (size[0] - self._size) // 2, (size[1] - self._size) // 2
        return x[:, :, top : top + self._size, left : left + self._size]

    def _encode_images(self, x: Tensor) -> Tensor:
        model = self._model
        with torch.autocast(x.device.type, enabled=False):
            pixels = ((x - self._mean) / self._std).to(model.dtype)
            pooled = model.vision_model(pixel_values=pixels).pooler_output
            return F.normalize(model.visual_projection(pooled).float(), dim=1)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Features of texts: (B, D) float32 of length 1. A text that is too long is cut.

        Raises:
            TypeError: one string, or something else than strings.
            ValueError: no texts.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError("CLIP: texts must be a sequence of strings")
        if len(texts) == 0:
            raise ValueError("CLIP: no texts")
        batch = self._tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self._positions,
            return_tensors="pt",
        ).to(self.device)
        model = self._model
        with torch.autocast(self.device.type, enabled=False):
            pooled = model.text_model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).pooler_output
            return F.normalize(model.text_projection(pooled).float(), dim=1)

    @torch.no_grad()
    def score(self, pictures: Tensor, captions: Sequence[str]) -> Tensor:
        """CLIP score of each picture and its caption: 100 max(cos, 0).

        Args:
            pictures: (B, 3, H, W) float in [-1, 1].
            captions: B strings.

        Returns:
            (B,) float32 in 0..100.

        Raises:
            ValueError: another number of captions.

        Source: Hessel et al. 2021, whose factor is 2.5 in place of 100.
        """
        if len(captions) != len(pictures):
            raise ValueError(f"CLIP: {len(pictures)} pictures and {len(captions)} captions")
        # The filter overshoots at edges, where 8-bit pictures are clipped.
        images = self._encode_images(self._prepared(pictures).clamp(0, 1))
        return 100 * (images * self.encode_texts(captions)).sum(1).clamp_min(0)


def _normalisation(source: str, revision: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of the model's own preparation, OpenAI's where it has none."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        fields, _ = ImageProcessingMixin.get_image_processor_dict(source, revision=revision)
    except OSError:
        fields = {}
    return fields.get("image_mean", _MEAN), fields.get("image_std", _STD)
