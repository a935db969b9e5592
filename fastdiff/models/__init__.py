"""The backbones by name: create them, list them, save and load them."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
from pathlib import Path
from typing import Any

from fastdiff.models.ascend import ASCEND, ASCENDConfig
from fastdiff.models.backbone import CONFIG_FILE, WEIGHTS_FILE, Backbone, load_weights, nearest
from fastdiff.models.iuvit import IUViT, IUViTConfig
from fastdiff.models.presets import PRESETS, Preset
from fastdiff.models.unet import UNet, UNetConfig

MODELS: dict[str, type[Backbone]] = {"IUViT": IUViT, "ASCEND": ASCEND, "UNet": UNet}
_MODEL_OF_CONFIG: dict[type, type[Backbone]] = {model.Config: model for model in MODELS.values()}


def list_models(pattern: str = "*") -> list[str]:
    """Names of the presets that match a shell pattern, sorted.

    Args:
        pattern: For example "iuvit*" or "*64".
    """
    return sorted(fnmatch.filter(PRESETS, pattern))


def create_model(name: str, **overrides: Any) -> Backbone:
    """Build a model of the paper with fresh weights.

    Args:
        name: One of `list_models()`.
        **overrides: Fields of its configuration to change, for example `context_dim=4096`.

    Returns:
        The model, float32, on the default device, in training mode.

    Raises:
        ValueError: Unknown name or field (the nearest are named), or values that do not fit.
    """
    if name not in PRESETS:
        raise ValueError(f"create_model: no model {name!r}, {nearest(name, PRESETS)}")
    config = PRESETS[name].config
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return _MODEL_OF_CONFIG[type(config)].from_config({**values, **overrides})


def from_pretrained(folder: str | os.PathLike[str]) -> Backbone:
    """Build the model that `save_pretrained` wrote, and load its weights, strictly.

    Args:
        folder: Holds `config.json` and `model.safetensors`. Neither can run code.

    Returns:
        The model in evaluation mode, on the CPU, in the dtype that was saved.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: Unknown model or field, or weights that do not fit (all of them listed).
    """
    path = Path(folder)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / file).is_file():
            raise FileNotFoundError(
                f"from_pretrained: no {file} in {path}; expected a folder written by "
                "save_pretrained"
            )
    values = json.loads((path / CONFIG_FILE).read_text())
    kind = values.pop("model", None)
    if kind not in MODELS:
        raise ValueError(
            f"from_pretrained: {path / CONFIG_FILE} names the model {kind!r}, "
            f"{nearest(str(kind), MODELS)}"
        )
    model = MODELS[kind].from_config(values)
    load_weights(model, path / WEIGHTS_FILE)
    return model.eval()


__all__ = [
    "ASCEND",
    "MODELS",
    "PRESETS",
    "ASCENDConfig",
    "Backbone",
    "IUViT",
    "IUViTConfig",
    "Preset",
    "UNet",
    "UNetConfig",
    "create_model",
    "from_pretrained",
    "list_models",
]
