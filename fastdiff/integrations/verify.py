"""Their code beside ours: do imported weights give the same outputs?

The other project's code lies on disk and is imported from there, so it runs: give it a checkout
that you trust. What a checkpoint leaves open (the width of heads, the order of ADM's qkv) is taken
alike on both sides, so it is not confirmed: give what its training command had.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.integrations.importers import Imported, Options, import_checkpoint


@dataclass(frozen=True)
class Verified:
    """How far our outputs are from theirs.

    Args:
        imported: The model and its keys.
        error: Largest difference, over the largest of their outputs.
        gradient_error: The same for the gradient of the outputs' mean square by the image.
        tolerance: What was allowed.
        cases: How many images were compared.
    """

    imported: Imported
    error: float
    gradient_error: float
    tolerance: float
    cases: int

    @property
    def same(self) -> bool:
        """Whether both lie within the tolerance and every key found its place."""
        worst = max(self.error, self.gradient_error)
        return self.imported.complete and worst <= self.tolerance

    def __str__(self) -> str:
        verdict = "the same" if self.same else "NOT the same"
        return (
            f"{self.imported}\n{verdict}: over {self.cases} images the outputs differ by "
            f"{self.error:.1e} of the largest, the gradients by {self.gradient_error:.1e} "
            f"(allowed {self.tolerance:.0e})"
        )


def verify(
    path: str | os.PathLike[str],
    code: str | os.PathLike[str],
    options: Options | None = None,
    *,
    tolerance: float = 1e-4,
) -> Verified:
    """Import a checkpoint and compare the model with that project's own.

    Args:
        path: As `import_checkpoint` takes it, of U-ViT or guided-diffusion.
        code: Folder of their checkout, which holds `libs/uvit.py` or `guided_diffusion/unet.py`.
            It is imported, so it runs.
        options: What the file leaves open.
        tolerance: Largest difference over the largest output, float32.

    Returns:
        The differences, on random images at six times from 0 to 999, with labels where the model
        has them.

    Raises:
        FileNotFoundError: No such file, or the code is not there.
        ValueError: As `import_checkpoint`; or a layout whose code cannot be called like that.
    """
    imported = import_checkpoint(path, options)
    if imported.layout not in _THEIRS:
        raise ValueError(
            f"verify: the layout {imported.layout} cannot be verified, only {list(_THEIRS)}"
        )
    module, name, arguments = _THEIRS[imported.layout]
    with _imported_from(Path(code), module) as found:
        theirs: nn.Module = getattr(found, name)(**arguments(imported))
    theirs.load_state_dict(dict(imported.state))
    theirs.float().eval()

    config = imported.model.config
    times = torch.tensor([0.0, 1.0, 250.0, 500.5, 750.0, 999.0])
    generator = torch.Generator().manual_seed(0)
    shape = (len(times), config.in_channels, *config.sides)
    x = torch.randn(shape, generator=generator, requires_grad=True)
    extra: dict[str, Tensor] = {}
    if config.num_classes is not None:
        extra["y"] = torch.randint(config.num_classes, (len(times),), generator=generator)
    outputs = [model(x, times, **extra) for model in (imported.model, theirs)]
    gradients = [torch.autograd.grad(out.square().mean(), x)[0] for out in outputs]
    return Verified(imported, _apart(*outputs), _apart(*gradients), tolerance, len(times))


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value of theirs; infinite where shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    difference = (ours - theirs).detach().abs().max() / theirs.detach().abs().max().clamp(min=1e-12)
    return float(difference.nan_to_num(float("inf")))


def _uvit(imported: Imported) -> dict[str, Any]:
    config, state = imported.model.config, imported.state
    labels = state["label_emb.weight"].shape[0] if "label_emb.weight" in state else -1
    return {
        "img_size": config.sides[0],
        "patch_size": config.patch_size,
        "in_chans": config.in_channels,
        "embed_dim": config.dim,
        "depth": config.layers - 1,
        "num_heads": config.dim // config.head_dim,
        "num_classes": labels,
        "conv": "final_layer.weight" in state,
    }


def _adm(imported: Imported) -> dict[str, Any]:
    config = imported.model.config
    return {
        "image_size": config.sides[0],
        "in_channels": config.in_channels,
        "model_channels": config.channels,
        "out_channels": config.predicted_channels,
        "num_res_blocks": config.depth,
        "attention_resolutions": tuple(2**level for level in config.attention_levels),
        "channel_mult": config.multipliers,
        "num_classes": config.num_classes,
        "num_heads": config.heads or 1,
        "num_head_channels": -1 if config.heads else config.head_dim,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
        "use_new_attention_order": imported.options.attention_order == "new",
    }


# Layout: module and class in their checkout, and what it is built with.
_THEIRS = {
    "uvit": ("libs.uvit", "UViT", _uvit),
    "adm": ("guided_diffusion.unet", "UNetModel", _adm),
}


@contextmanager
def _imported_from(folder: Path, module: str) -> Iterator[Any]:
    """A module of a checkout, imported beside whatever else has its name."""
    if not (folder / f"{module.replace('.', '/')}.py").is_file():
        raise FileNotFoundError(f"verify: no {module.replace('.', '/')}.py in {folder}")
    package = module.partition(".")[0]

    def taken() -> Mapping[str, Any]:
        return {n: m for n, m in sys.modules.items() if n.partition(".")[0] == package}

    before = taken()
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, str(folder.resolve()))
    try:
        importlib.invalidate_caches()
        yield importlib.import_module(module)
    finally:
        sys.path.remove(str(folder.resolve()))
        for name in taken():
            del sys.modules[name]
        sys.modules.update(before)
