"""Feature extractors: any module, or a TorchScript file such as the published Inceptions.

Legend: B batch, H W pixels, D features, K classes.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Features(NamedTuple):
    """features (B, D) float32; logits (B, K) float32, or None where none were asked for."""

    features: Tensor
    logits: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """A network that features are taken from, and how pictures are handed to it.

    Args:
        module: called with float32 (B, 3, H, W); returns features of B rows, which are flattened,
            or a pair of features and logits. A TorchScript module whose `forward` has the argument
            `return_features` (NVIDIA's Inception) is called with it, and once more without it for
            the probabilities where logits are asked for. Put into evaluation mode.
        name: for people.
        sha256: of the file, or of the state dict.
        value_range: what black and white are to the module: (0, 255), (0, 1), (-1, 1).
        image_size: pictures are scaled to it (torch's antialiased bilinear filter) where the
            module does not do so itself; None hands them over as they are.
    """

    module: nn.Module
    name: str
    sha256: str
    value_range: tuple[float, float] = (0.0, 255.0)
    image_size: int | None = None
    _arguments: frozenset[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        low, high = self.value_range
        if not low < high:
            raise ValueError(f"Extractor: value_range {low:g}..{high:g}; expected black < white")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"Extractor: image_size={self.image_size}; expected at least 1")
        self.module.eval()
        arguments: set[str] = set()
        if isinstance(self.module, torch.jit.ScriptModule):
            forward: Any = self.module.forward
            arguments = {argument.name for argument in forward.schema.arguments}
        object.__setattr__(self, "_arguments", frozenset(arguments))

    @property
    def about(self) -> dict[str, Any]:
        """What features depend on beside the pictures (JSON values)."""
        return {
            "sha256": self.sha256,
            "value_range": list(self.value_range),
            "image_size": self.image_size,
        }

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, *, logits: bool = False) -> Features:
        """Features of pictures.

        Args:
            pixels: (B, 3, H, W) uint8; moved to the module's device.
            logits: also the classifier's output.

        Raises:
            ValueError: the module returns something else, or has no logits.

        Numerics: float32 without TF32 or autocast; deterministic, also over the calls of a
            TorchScript module, which torch would otherwise rewrite after the first ones.
        """
        low, high = self.value_range
        state = next(chain(self.module.parameters(), self.module.buffers()), pixels)
        x = pixels.to(state.device, non_blocking=True).float().contiguous()
        if self.image_size is not None:
            x = F.interpolate(x, (self.image_size,) * 2, mode="bilinear", antialias=True)
        if self.value_range != (0.0, 255.0):
            x = x * ((high - low) / 255) + low
        with (
            torch.autocast(x.device.type, enabled=False),
            torch.backends.cudnn.flags(deterministic=True, benchmark=False, allow_tf32=False),
            torch.jit.optimized_execution(False),
        ):
            return self._run(x, logits)

    def _run(self, x: Tensor, logits: bool) -> Features:
        scores = None
        if "return_features" in self._arguments:
            out = self.module(x, return_features=True)
            if logits:
                # As the score's first code has it, the bias of the last layer is left out.
                plain = {"no_output_bias": True} if "no_output_bias" in self._arguments else {}
                scores = self.module(x, **plain).log()
        else:
            out = self.module(x)
            if isinstance(out, tuple) and len(out) == 2:
                out, scores = out[0], out[1] if logits else None
            if logits and scores is None:
                raise ValueError(
                    f"Extractor: {self.name} returns no logits; expected (features, logits)"
                )
        for value in (out, scores) if logits else (out,):
            if not isinstance(value, Tensor) or value.ndim < 2 or len(value) != len(x):
                told = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"Extractor: {self.name} returns {told}; expected ({len(x)}, D)")
        return Features(out.flatten(1).float(), None if scores is None else scores.float())

    def to(self, device: torch.device | str) -> Extractor:
        """Move the module; returns self."""
        self.module.to(device)
        return self


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes as 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def from_module(
    module: nn.Module,
    *,
    name: str | None = None,
    value_range: tuple[float, float] = (0.0, 255.0),
    image_size: int | None = None,
) -> Extractor:
    """An extractor of a module, told apart by its class and its state dict; see `Extractor`."""
    digest = hashlib.sha256(type(module).__qualname__.encode())
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"\0{key} {value.dtype} {tuple(value.shape)}\0".encode())
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(raw.numpy().data)
    return Extractor(
        module=module,
        name=name or type(module).__name__,
        sha256=digest.hexdigest(),
        value_range=value_range,
        image_size=image_size,
    )


def load_torchscript(
    path: str | Path,
    *,
    value_range: tuple[float, float] = (0.0, 255.0),
    image_size: int | None = None,
) -> Extractor:
    """An extractor of a TorchScript file, told apart by the file's bytes; see `Extractor`.

    Such a file holds a program, which torch's own interpreter runs; no Python of it is executed.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: not a TorchScript file.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"load_torchscript: {path} does not exist")
    try:
        with warnings.catch_warnings():
            # The published Inceptions have no other form yet.
            warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
            module = torch.jit.load(str(path), map_location="cpu")
    except RuntimeError as error:
        raise ValueError(
            f"load_torchscript: {path} is not a TorchScript file ({str(error).splitlines()[0]}); "
            "weights alone are no extractor: build their module and give it to from_module"
        ) from None
    return Extractor(
        module=module,
        name=path.name,
        sha256=file_sha256(path),
        value_range=value_range,
        image_size=image_size,
    )
