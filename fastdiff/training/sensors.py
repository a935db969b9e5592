"""What a GPU tells of itself while it trains, and how much of it a model uses."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch

from fastdiff import roofline
from fastdiff.models import MODELS
from fastdiff.training.config import Recipe

log = logging.getLogger("fastdiff")

#: Dense bfloat16 FLOP/s by a part of the GPU's name, the special before the general (data sheets).
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


class Sensors:
    """Readings of one GPU by NVML, and torch's own memory; none on a CPU.

    Args:
        device: Of this process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._nvml: Any = None
        self._handle: Any = None
        if device.type != "cuda":
            return
        try:
            import pynvml
        except ImportError:
            log.warning("no readings of the GPU: pip install nvidia-ml-py")
            return
        try:
            pynvml.nvmlInit()
            # by its own name: NVML does not follow CUDA_VISIBLE_DEVICES
            uuid = torch.cuda.get_device_properties(device).uuid
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except pynvml.NVMLError as error:
            log.warning("no readings of the GPU: %s", error)
            return
        self._nvml = pynvml

    def read(self) -> dict[str, float]:
        """GiB, W, degrees Celsius and MHz by name; what the driver does not tell is left out."""
        found: dict[str, float] = {}
        if self.device.type == "cuda":
            found["memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            torch.cuda.reset_peak_memory_stats(self.device)
        if self._nvml is None:
            return found
        nvml, gpu = self._nvml, self._handle
        readings: dict[str, Callable[[], float]] = {
            "gpu_used_gib": lambda: nvml.nvmlDeviceGetMemoryInfo(gpu).used / 2**30,
            "gpu_power_w": lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
            "gpu_celsius": lambda: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
            "gpu_sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
            "gpu_memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
        }
        for name, reading in readings.items():
            with contextlib.suppress(nvml.NVMLError):
                found[name] = float(reading())
        return found


def peak_flops(gpu: str) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU by the name that torch gives it; None if it is not known."""
    return next((peak for name, peak in PEAKS.items() if name in gpu), None)


class Utilisation:
    """Model FLOP utilisation: FLOPs of forward and backward over what the GPU could do.

    The second forward of checkpointing and the text encoder do not count.

    Args:
        recipe: The run's; its model is counted on the meta device when first asked for.
        peak: FLOP/s of the GPU.
    """

    def __init__(self, recipe: Recipe, peak: float) -> None:
        self.recipe, self.peak = recipe, peak
        self._line: tuple[float, float] | None = None

    def flops(self, tokens: float) -> float:
        """Of one image, forward and backward, with a text of so many tokens."""
        if self._line is None:
            # a line in the number of tokens: products with them, and scores of cross-attention
            few, many = (self._count(tokens) for tokens in (16, 32))
            slope = (many - few) / 16
            self._line = few - 16 * slope, slope
        return self._line[0] + self._line[1] * tokens

    def _count(self, tokens: int) -> float:
        with torch.device("meta"):
            kind = next(m for m in MODELS.values() if m.Config is type(self.recipe.model))
            net = kind(self.recipe.model)
        return roofline.count(net, 1, text=tokens).flops

    def __call__(self, images_per_s: float, tokens: float) -> float:
        """Share of the peak, from the images of one GPU in a second and tokens of a text."""
        return images_per_s * self.flops(tokens) / self.peak


def make_utilisation(recipe: Recipe, device: torch.device) -> Utilisation | None:
    """For a GPU whose peak is known, in bfloat16; None elsewhere."""
    if device.type != "cuda" or recipe.train.precision != "bf16":
        return None
    peak = peak_flops(torch.cuda.get_device_name(device))
    return None if peak is None else Utilisation(recipe, peak)
