"""What this installation can run, and what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastdiff_kernels
from fastdiff import __version__, ops
from fastdiff_kernels import _native

# Optional package: what it serves.
OPTIONAL = {
    "triton": "the triton back end on GPUs",
    "deepspeed": "training",
    "transformers": "T5 text encoders",
    "diffusers": "the adapters for diffusers",
    "flash-attn": "an alternative for global attention",
    "xformers": "an alternative for global attention",
}


def example_calls(device: torch.device) -> dict[str, tuple[Callable[..., Any], tuple, dict]]:
    """One small typical call of each op: the op, its positional and its keyword arguments."""

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=device)

    conv = (new(32, 1, 3, 3), new(32))
    seeds = torch.empty(2, dtype=torch.int64, device=device)
    return {
        "window_attention": (
            ops.window_attention,
            (new(1, 8, 8, 96), new(49, 2)),
            {"heads": 2, "window_size": 4},
        ),
        "dwconv_gelu": (ops.dwconv_gelu, (new(1, 16, 32), *conv), {"grid": (4, 4)}),
        "dwconv_ffn": (
            ops.dwconv_ffn,
            (new(1, 16, 16), new(32, 16), new(32), *conv, new(16, 32), new(16)),
            {"grid": (4, 4)},
        ),
        "group_norm_silu": (
            ops.group_norm_silu,
            (new(1, 32, 4, 4), new(32), new(32)),
            {"num_groups": 8},
        ),
        "layer_norm_modulate": (ops.layer_norm_modulate, (new(1, 16, 32), new(32), new(32)), {}),
        "philox_bits": (ops.philox_bits, (seeds, 0, (3, 8, 8)), {}),
        "philox_normal": (ops.philox_normal, (seeds, 0, (3, 8, 8)), {}),
    }


def processor_name() -> str:
    """The CPU's name as the system tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(errors="replace") if info.is_file() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def cpu_kernels() -> str:
    """What of the compiled CPU kernels runs here."""
    return (
        f"compiled kernels for {_native.cpu_level()}"
        if _native.available()
        else "no compiled kernels"
    )


def _devices() -> list[str]:
    lines = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        lines.append(
            f"cuda:{index}  {device.name}, sm_{device.major}{device.minor}, {memory:.0f} GiB"
        )
    lines.append(f"cpu     {processor_name()}, {torch.get_num_threads()} threads, {cpu_kernels()}")
    return lines


def _back_ends(device: torch.device) -> list[str]:
    lines = []
    for name, (op, args, kwargs) in example_calls(device).items():
        found = ops.explain(op, *args, **kwargs)
        lines.append(f"{name:20} {found.backend or 'cannot run'}")
        lines += [
            f"  not {other}: {why}" for other, why in found.reasons.items() if other != "reference"
        ]
    return lines


def _packages() -> list[str]:
    lines = []
    for package, purpose in OPTIONAL.items():
        try:
            state = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            state = f"absent (for {purpose}): pip install {package}"
        lines.append(f"{package:20} {state}")
    return lines


def config_text() -> str:
    """What `show_config` prints: versions, devices, the back end of every op, what is missing."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    versions = [
        f"fastdiff             {__version__} (fastdiff_kernels {fastdiff_kernels.__version__})",
        f"python               {sys.version.split()[0]}, {platform.platform()}",
        f"torch                {torch.__version__}, {build}",
    ]
    native = _native.why_absent()
    sections = {
        "Versions": versions,
        "Devices": _devices(),
        "Compiled CPU library": [native or f"loaded: {_native.LIBRARY.name}"],
        f"Back end of each op, for a call on {device}": _back_ends(device),
        "Optional packages": _packages(),
    }
    return "\n\n".join(
        "\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections.items()
    )


def show_config() -> None:
    """Print what this installation can run, and what is missing and how to get it."""
    print(config_text())
