"""Diffusion backbones (IU-ViT, ASCEND and their baselines) on fused kernels.

    import fastdiff

    model = fastdiff.create_model("ascend_t2i_128")
    fastdiff.list_models("iuvit*")
    fastdiff.show_config()

Models are loaded from `fastdiff.models` and ops from `fastdiff.ops` at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import fastdiff_kernels

__version__ = "0.1.0"

if fastdiff_kernels.__version__ != __version__:
    # A plain install used from within a newer checkout: the checkout's fastdiff shadows the
    # installed one, but fastdiff_kernels comes from site-packages.
    raise ImportError(
        f"fastdiff is {__version__} ({__file__}) but fastdiff_kernels is "
        f"{fastdiff_kernels.__version__} ({fastdiff_kernels.__file__}): they belong together. "
        "Run `pip install -e .` in the checkout of fastdiff."
    )

if TYPE_CHECKING:
    from fastdiff import ops as ops
    from fastdiff._show_config import show_config
    from fastdiff.integrations.accelerate import accelerate
    from fastdiff.models import create_model, from_pretrained, list_models

__all__ = ["accelerate", "create_model", "from_pretrained", "list_models", "ops", "show_config"]

_HOME = {
    "accelerate": "fastdiff.integrations.accelerate",
    "create_model": "fastdiff.models",
    "from_pretrained": "fastdiff.models",
    "list_models": "fastdiff.models",
    "show_config": "fastdiff._show_config",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    elif name == "ops":
        value = import_module("fastdiff.ops")
    else:
        raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
