"""What every backbone shares: checks of its input, saving and loading."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fastdiff.nn import (
    MHCA,
    MHSA,
    Checkpointed,
    FusedAttention,
    FusedSpatialAttention,
    ProjectedText,
    SpatialAttention,
    Text,
    as_timesteps,
)
from fastdiff.nn.attention import load_implementation

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

T = TypeVar("T", bound="Backbone")


def nearest(name: str, valid: Iterable[str]) -> str:
    """Words for an error message: the valid names closest to `name`, or all of them."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"expected one of {', '.join(names)}"


def check_choice(owner: str, field: str, value: str, valid: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of `valid`."""
    if value not in (names := list(valid)):
        raise ValueError(f"{owner}: {field}={value!r}, {nearest(value, names)}")


def check_positive(owner: str, config: Any, fields: Iterable[str]) -> None:
    """Raise ValueError unless each of the fields is a whole number of at least 1."""
    for field in fields:
        value = getattr(config, field)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{owner}: {field}={value!r}, expected a whole number >= 1")


def check_image(owner: str, x: Tensor, channels: int, multiple: int) -> None:
    """Raise ValueError unless x is (B, channels, H, W) with H and W multiples of `multiple`."""
    if x.ndim != 4:
        raise ValueError(f"{owner}: x has {x.ndim} dimensions, expected 4: (B, C, H, W)")
    if not x.is_floating_point():
        raise ValueError(f"{owner}: x is {x.dtype}, expected floating point, images in [-1, 1]")
    if x.shape[1] != channels:
        raise ValueError(f"{owner}: x has {x.shape[1]} channels, the model takes {channels}")
    for side, name in zip(x.shape[2:], "HW", strict=True):
        if side == 0 or side % multiple:
            raise ValueError(
                f"{owner}: image {name}={side} is not a multiple of {multiple}; the next sizes "
                f"that fit are {side // multiple * multiple or multiple} and "
                f"{(side // multiple + 1) * multiple}"
            )


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """What every backbone is told.

    Args:
        image_size: Pixels of a side, or (H, W).
        in_channels: Channels of the image.
        out_channels: Channels of the prediction; None = `in_channels`.
        learn_variance: Predict the variance too: as many channels again, behind the prediction
            (ADM's `learn_sigma`).
        context_dim: Width of the text encoder, None without text.
        num_classes: Number of labels, None without labels.
    """

    image_size: int | tuple[int, int] = 32
    in_channels: int = 3
    out_channels: int | None = None
    learn_variance: bool = False
    context_dim: int | None = None
    num_classes: int | None = None

    def __post_init__(self) -> None:
        size = self.image_size
        sides = (size, size) if isinstance(size, int) else tuple(size)
        object.__setattr__(self, "image_size", sides)
        name = type(self).__name__
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(f"{name}: image_size={sides}, expected one or two sides >= 1")
        given = ("out_channels", "context_dim", "num_classes")
        optional = (field for field in given if getattr(self, field) is not None)
        check_positive(name, self, ("in_channels", *optional))

    @property
    def sides(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        assert isinstance(self.image_size, tuple)
        return self.image_size

    @property
    def predicted_channels(self) -> int:
        """Channels of the model's output, those of a learned variance counted."""
        return (1 + self.learn_variance) * (self.out_channels or self.in_channels)


class Backbone(nn.Module):
    """A denoising network `model(x, t, context, ...)` that is built from its `Config` alone."""

    Config: ClassVar[type]
    config: Any
    time: nn.Module
    label: nn.Module | None
    text: nn.Module | None
    time_text: nn.Module | None

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(
        self,
        x: Tensor,
        t: int | float | Tensor,
        context: Tensor | ProjectedText | None = None,
        *,
        context_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """Predict the process's target (the noise, in the paper) from a noised image.

        Args:
            x: (B, C, H, W), image in [-1, 1] plus noise.
            t: Time in steps 0..999; int, float, or tensor of shape (), (1,) or (B,).
            context: (B, S, context_dim) text features, None = null condition; or what
                `project_text` made of these, with the mask and the pooled text in it.
            context_mask: (B, S) bool, True = valid; a row of False = null condition.
            pooled: (B, context_dim), None = mean of the valid positions.
            y: (B,) int64 labels; `num_classes` or None = no label.

        Returns:
            (B, out_channels, H, W), dtype of x; twice the channels with `learn_variance`.

        Raises:
            ValueError: A shape does not fit the configuration; both numbers are in the message.
        """
        check_image(type(self).__name__, x, self.config.in_channels, self.config.multiple)
        batch = x.shape[0]
        self.check_conditions(batch, context, context_mask, pooled, y)

        emb = self.time(as_timesteps(t, batch, x.device))
        text: Text | None = None
        if self.text is not None and self.time_text is not None:
            if isinstance(context, ProjectedText):
                text, pooled = (context, context.mask), context.pooled
            else:
                features, mask, pooled = self.text(context, context_mask, pooled, batch)
                text = (features, mask)
            emb = self.time_text(emb.to(self.dtype), pooled)
        label = None if self.label is None else self.label(y, batch)
        return self.denoise(x.to(self.dtype), emb, label, text).to(x.dtype)

    def denoise(self, x: Tensor, emb: Tensor, label: Tensor | None, text: Text | None) -> Tensor:
        """The network itself, on checked inputs in its own dtype."""
        raise NotImplementedError

    @torch.no_grad()
    def project_text(
        self,
        context: Tensor,
        *,
        context_mask: Tensor | None = None,
        pooled: Tensor | None = None,
    ) -> ProjectedText:
        """Make each layer's keys and values of a text, once for all steps of a sample.

        Positions behind the last valid one of any row are cut off, to a multiple of 16.

        Args:
            context, context_mask, pooled: As `forward` takes them. Where the rows without text
                (mask all False) are the last ones, as in guidance, cross-attention skips them.

        Returns:
            What `forward` takes in place of the context; without gradient. With other weights, or
            under another autocast, it is out of date.

        Raises:
            ValueError: As `forward`.

        Numerics: The model's output is that of the text itself up to rounding.
        """
        batch = context.shape[0]
        self.check_conditions(batch, context, context_mask, pooled, None)
        assert self.text is not None, "checked"
        features, mask, pooled = self.text(context, context_mask, pooled, batch)
        has_text = [True] * batch if context_mask is None else context_mask.any(1).tolist()
        rows = sum(has_text) if has_text == sorted(has_text, reverse=True) else batch
        last = int(mask.any(0).nonzero().max()) if batch else 0
        features, mask = (tensor[:, : -(-(last + 1) // 16) * 16] for tensor in (features, mask))
        kv: dict[nn.Module, Tensor] = {}
        null: dict[nn.Module, Tensor] = {}
        for module in self.modules():
            if isinstance(module, MHCA):
                kv[module.kv] = module.kv(features[:rows])
                if rows < batch:
                    null[module.kv] = module.attend_nothing(module.kv(features[-1:, :1]))
            elif isinstance(module, (FusedAttention, FusedSpatialAttention)):
                kv[module.text_kv] = module.text_kv(features)
        return ProjectedText(kv, mask, pooled, rows, null)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.parameters()).dtype

    def set_attention(self: T, implementation: str | None, *, cross: str | None = None) -> T:
        """Choose what computes this model's global and cross-attention; it is not saved with it.

        Args:
            implementation: "sdpa" | "flash" | "xformers", or None: what `fastdiff.nn.set_attention`
                chose for all models.
            cross: Likewise for attention to the text, None = the same. flash-attn takes no mask, so
                with text: `model.set_attention("flash", cross="sdpa")`.

        Returns:
            The model.

        Raises:
            ValueError: A name is none of the three.
            ImportError: Its package cannot be imported.
        """
        cross = cross or implementation
        for name in filter(None, (implementation, cross)):
            load_implementation(name)
        for module in self.modules():
            if isinstance(module, (MHCA, FusedAttention, FusedSpatialAttention)):
                module.implementation = cross
            elif isinstance(module, (MHSA, SpatialAttention)):
                module.implementation = implementation
        return self

    def set_checkpointing(self: T, on: bool = True) -> T:
        """Trade time for memory in training: compute each block's activations again backward.

        It is not saved with the model. Gradients are the same bits.

        Args:
            on: Off gives the faster training back.

        Returns:
            The model.
        """

        def visit(module: nn.Module) -> None:
            if isinstance(module, Checkpointed):
                module.checkpointing = on
            else:
                for child in module.children():
                    visit(child)

        visit(self)
        return self

    def check_conditions(
        self,
        batch: int,
        context: Tensor | ProjectedText | None,
        context_mask: Tensor | None,
        pooled: Tensor | None,
        y: Tensor | None,
    ) -> None:
        """Raise ValueError for a condition that this model was not built to take."""
        name = type(self).__name__
        if context is None and (context_mask is not None or pooled is not None):
            raise ValueError(f"{name}: context_mask or pooled given without context")
        if y is not None and y.shape != (batch,):
            raise ValueError(f"{name}: y has shape {tuple(y.shape)}, expected ({batch},)")
        if isinstance(context, ProjectedText):
            if context_mask is not None or pooled is not None:
                raise ValueError(f"{name}: context_mask or pooled given with a projected text")
            if context.mask.shape[0] != batch:
                raise ValueError(
                    f"{name}: projected text of batch {context.mask.shape[0]}, expected {batch}"
                )
        elif context is not None and self.config.context_dim is None:
            raise ValueError(
                f"{name}: context of width {context.shape[-1]} given, but the model has "
                "context_dim=None; create it with context_dim set to the text encoder's width"
            )
        if y is not None and self.config.num_classes is None:
            raise ValueError(
                f"{name}: labels y given, but the model has num_classes=None; create it with "
                "num_classes set"
            )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors`.

        Args:
            folder: Made if it does not exist. Each file is written beside its place and renamed.
        """
        from safetensors.torch import save_file

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        config = {"model": type(self).__name__, **dataclasses.asdict(self.config)}
        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        temporary = path / f".{WEIGHTS_FILE}.{os.getpid()}"
        save_file(weights, temporary)
        os.replace(temporary, path / WEIGHTS_FILE)
        temporary = path / f".{CONFIG_FILE}.{os.getpid()}"
        temporary.write_text(json.dumps(config, indent=2) + "\n")
        os.replace(temporary, path / CONFIG_FILE)

    @classmethod
    def from_config(cls: type[T], values: Mapping[str, Any]) -> T:
        """Build from a mapping of config fields; lists become tuples.

        Raises:
            ValueError: A field that `Config` does not have.
        """
        fields = {field.name for field in dataclasses.fields(cls.Config)}
        for name in values:
            if name not in fields:
                raise ValueError(
                    f"{cls.Config.__name__}: unknown field {name!r}, {nearest(name, fields)}"
                )
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(cls.Config(**given))


def load_weights(model: nn.Module, file: Path) -> None:
    """Load a safetensors file, all keys and shapes matching, or nothing; the model takes its dtype.

    Raises:
        ValueError: Missing, extra or misshaped keys, all of them listed.
    """
    from safetensors.torch import load_file

    weights = load_file(file)
    own = model.state_dict()
    problems = [f"missing: {name}" for name in own if name not in weights]
    problems += [f"not in the model: {name}" for name in weights if name not in own]
    problems += [
        f"shape of {name}: {tuple(weights[name].shape)} in the file, {tuple(own[name].shape)} in "
        "the model"
        for name in own
        if name in weights and own[name].shape != weights[name].shape
    ]
    if problems:
        raise ValueError(
            f"{file} does not fit {type(model).__name__}; nothing was loaded:\n  "
            + "\n  ".join(problems)
        )
    dtypes = {value.dtype for value in weights.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    model.load_state_dict(weights)
