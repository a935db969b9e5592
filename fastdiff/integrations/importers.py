"""Published weights of other projects in our models: U-ViT, guided-diffusion (ADM), hana.

    imported = import_checkpoint("cifar10_uvit_small.pth")
    print(imported)
    imported.model.save_pretrained(folder)

No file can run code: safetensors, and pickles by `torch.load(weights_only=True)`. What a checkpoint
does not say (image size of ADM, width of heads) is asked for or taken as published, and said.

Letters: C channels, D width, N heads, d head width, K labels, p patch size.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.models import MODELS, Backbone

State = dict[str, Tensor]


@dataclass(frozen=True)
class Options:
    """What a checkpoint may leave open.

    Args:
        layout: "uvit" | "adm" | "hana"; None: whichever its keys fit.
        weights: Name of the weights inside a checkpoint that holds several ("ema", ...).
        image_size: Pixels of a side. None: from the position embeddings, or from a file name with
            "64x64" in it.
        head_dim: d; None: as published (72 for U-ViT-H, else 64).
        heads: Of ADM, where their number is the same at every level and not their width
            (`num_heads`). None: 4 for a file named 128x128_diffusion, as published.
        attention_order: Of ADM's qkv rows: "legacy" (N, 3, d) or "new" (3, N, d), which is
            `use_new_attention_order`. None: "new" for a file named 64x64_diffusion, else "legacy".
        null_label: Whether U-ViT's last label means "no label". None: where there are 1001.
    """

    layout: str | None = None
    weights: str | None = None
    image_size: int | None = None
    head_dim: int | None = None
    heads: int | None = None
    attention_order: str | None = None
    null_label: bool | None = None


@dataclass
class Plan:
    """How a checkpoint becomes a model of ours.

    Args:
        model: Name of our class.
        fields: Its configuration.
        rename: Key of theirs to key of ours, None where there is no place.
        convert: Their tensor, under our key, to ours.
        filled: What their network has no weights for.
        unused: Their keys that their network does not read.
        notes: What was assumed.
    """

    model: str
    fields: dict[str, Any]
    rename: Callable[[str], str | None]
    convert: Callable[[str, Tensor], Tensor] = lambda key, value: value
    filled: State = field(default_factory=dict)
    unused: Callable[[str], bool] = lambda key: False
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Imported:
    """A model with another project's weights.

    Args:
        model: In evaluation mode, float32.
        layout: Whose layout it was.
        placed: Number of keys that found their place.
        unplaced: Keys of the file without a place, with the reason.
        unfilled: Keys of the model that the file did not give.
        notes: What was assumed, and what was filled in.
        state: Their weights as they were.
        options: What was asked for and, in the place of None, what was taken.
    """

    model: Backbone
    layout: str
    placed: int
    unplaced: tuple[str, ...]
    unfilled: tuple[str, ...]
    notes: tuple[str, ...]
    state: Mapping[str, Tensor] = field(repr=False)
    options: Options = field(repr=False)

    @property
    def complete(self) -> bool:
        """Whether every key of theirs was placed and every key of ours filled."""
        return not (self.unplaced or self.unfilled)

    def __str__(self) -> str:
        name = type(self.model).__name__
        lines = [f"{self.layout} to {name}: {self.placed} tensors placed"]
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  could not place: {key}" for key in self.unplaced]
        lines += [f"  not in the file: {key}" for key in self.unfilled]
        return "\n".join(lines)


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Read a file of tensors without running anything of it.

    Args:
        path: `.safetensors`, or a file of `torch.save`.

    Returns:
        What it holds, on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is neither, or a pickle that holds more than tensors and plain containers.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"read_checkpoint: no file {file}")
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"read_checkpoint: {file} is no safetensors file: {error}") from error
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)|global ([\w.]+)", str(error))
        what = f" ({next(filter(None, named.groups()))})" if named else ""
        raise ValueError(
            f"read_checkpoint: {file} is a pickle that holds more than tensors{what}, or no "
            "checkpoint at all. Reading it could run any code, so it is refused. Where you trust "
            "its source, write its weights alone with that project's own code: "
            "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"read_checkpoint: {file} cannot be read: {error}") from error


def _state_dicts(held: Any, name: str = "") -> Iterator[tuple[str, State]]:
    """Every mapping of names to tensors in a checkpoint, by its own name."""
    if not isinstance(held, Mapping):
        return
    tensors = {k: v for k, v in held.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if tensors:
        yield name, tensors
    for key, value in held.items():
        yield from _state_dicts(value, f"{name}.{key}" if name else str(key))


def _anchored(state: State, anchor: str) -> State | None:
    """The part of a state dict that a prefix sets apart, without it; None where there is none."""
    prefixes = {key[: -len(anchor)] for key in state if key == anchor or key.endswith("." + anchor)}
    if not prefixes:
        return None
    prefix = min(prefixes, key=len)
    return {key.removeprefix(prefix): value for key, value in state.items()}


# --- U-ViT ---------------------------------------------------------------------------------------


def _plan_uvit(state: State, options: Options, file: Path) -> tuple[Plan, Options]:
    if "context_embed.weight" in state:
        raise ValueError(
            "import_checkpoint: this is U-ViT for text, whose text tokens stand in one sequence "
            "with the patches; no model of ours has that form"
        )
    weight = state["patch_embed.proj.weight"]
    dim, channels, patch, _ = weight.shape
    labels = state["label_emb.weight"].shape[0] if "label_emb.weight" in state else 0
    patches = state["pos_embed"].shape[1] - (2 if labels else 1)
    image_size = options.image_size or round(patches**0.5) * patch
    if (image_size // patch) ** 2 != patches:
        raise ValueError(
            f"import_checkpoint: {patches} positions of patches of {patch} pixels do not make a "
            f"square image of {image_size} pixels"
        )
    head_dim = options.head_dim or {1152: 72}.get(dim, 64)
    half = sum(bool(re.fullmatch(r"in_blocks\.\d+\.norm1\.weight", key)) for key in state)
    null_label = options.null_label
    if null_label is None:
        null_label = labels == 1001
    plan = Plan(
        "IUViT",
        {
            "image_size": image_size,
            "patch_size": patch,
            "in_channels": channels,
            "dim": dim,
            "layers": 2 * half + 1,
            "head_dim": head_dim,
            "ffn": "mlp",
            "head": "linear_first",
            "time_mlp": False,
            "num_classes": (labels - null_label) or None,
        },
        _rename_uvit,
        notes=[f"heads are {head_dim} wide"],
    )
    if labels and not null_label:
        plan.convert = lambda key, value: (
            torch.cat([value, value.new_zeros(1, dim)]) if key == "label.weight" else value
        )
        plan.notes.append(f"the {labels} labels hold none for 'no label'; ours is zero")
    if "final_layer.weight" not in state:
        plan.filled = {
            "head.conv.weight": torch.nn.init.dirac_(torch.empty(channels, channels, 3, 3)),
            "head.conv.bias": torch.zeros(channels),
        }
        plan.notes.append("no last convolution; ours is the identity")
    return plan, replace(
        options, layout="uvit", image_size=image_size, head_dim=head_dim, null_label=null_label
    )


def _rename_uvit(key: str) -> str | None:
    if re.match(r"(in_blocks\.\d+|mid_block|out_blocks\.\d+)\.", key):
        return key.replace(".mlp.", ".ffn.")
    for theirs, ours in (
        ("patch_embed.", "patch_embed."),
        ("label_emb.", "label."),
        ("norm.", "head.norm."),
        ("decoder_pred.", "head.linear."),
        ("final_layer.", "head.conv."),
    ):
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return "positions.table" if key == "pos_embed" else None


# --- guided-diffusion and what came of it ---------------------------------------------------------


def _plan_adm(state: State, options: Options, file: Path) -> tuple[Plan, Options]:
    if "out.2.weight" not in state:
        raise ValueError(
            "import_checkpoint: the U-Net has no output convolution out.2; ADM's classifiers have "
            "no counterpart among our models"
        )
    image_size, head_dim, heads = options.image_size, options.head_dim, options.heads
    named = re.search(r"(\d+)x\1", file.name)
    if image_size is None and named:
        image_size = int(named[1])
    if image_size is None:
        raise ValueError(
            "import_checkpoint: ADM's weights do not say their image size; give image_size"
        )
    if head_dim is not None and heads is not None:
        raise ValueError(
            f"import_checkpoint: head_dim={head_dim} and heads={heads}, expected one of them"
        )
    if head_dim is None and file.name.startswith("128x128_diffusion"):
        heads = heads or 4
    head_dim = head_dim or 64
    order = options.attention_order
    if order is None:
        order = "new" if file.name.startswith("64x64_diffusion") else "legacy"
    if order not in ("legacy", "new"):
        raise ValueError(f"import_checkpoint: attention_order={order!r}, expected legacy or new")

    blocks = _children(state, "output_blocks")
    # a level's last output block ends in a second ResBlock, which doubles the resolution
    ups = [i for i in range(blocks) if _residual_parts(state, f"output_blocks.{i}") == 2]
    levels = len(ups) + 1
    if blocks % levels or _children(state, "input_blocks") != blocks:
        raise ValueError(
            f"import_checkpoint: {_children(state, 'input_blocks')} input and {blocks} output "
            f"blocks with {len(ups)} residual up-samplings are no U-Net of ADM with "
            "resblock_updown=True, the only one that has a counterpart here"
        )
    depth = blocks // levels - 1
    channels = state["time_embed.0.weight"].shape[1]
    firsts = [1 + level * (depth + 1) for level in range(levels)]
    widths = [state[f"input_blocks.{i}.0.out_layers.3.weight"].shape[0] for i in firsts]
    attended = [
        level for level, i in enumerate(firsts) if f"input_blocks.{i}.1.qkv.weight" in state
    ]
    in_channels = state["input_blocks.0.0.weight"].shape[1]
    out_channels = state["out.2.weight"].shape[0]
    labels = state["label_emb.weight"].shape[0] if "label_emb.weight" in state else None

    def convert(key: str, value: Tensor) -> Tensor:
        if key == "label.weight":
            return torch.cat([value, value.new_zeros(1, value.shape[1])])
        if ".qkv." not in key and ".text_kv." not in key and ".attn.proj." not in key:
            return value
        value = value.squeeze(-1) if value.ndim == 3 else value
        parts = {"qkv": 3, "text_kv": 2}.get(key.split(".")[-2])
        if parts is None or order == "new":
            return value
        rows = value.unflatten(0, (heads or -1, parts, -1 if heads else head_dim))
        return rows.transpose(0, 1).flatten(0, 2)

    wide = f"{heads} heads at every level" if heads else f"heads {head_dim} wide"
    plan = Plan(
        "UNet",
        {
            "image_size": image_size,
            "in_channels": in_channels,
            "learn_variance": out_channels == 2 * in_channels,
            "channels": channels,
            "depth": depth,
            "multipliers": tuple(width / channels for width in widths),
            "attention_resolutions": tuple(image_size >> level for level in attended),
            "head_dim": head_dim,
            "heads": heads,
            "num_classes": labels,
        },
        lambda key: _rename_adm(key, depth, levels, set(attended)),
        convert,
        notes=[f"image size {image_size}, {wide}, attention order {order}"],
    )
    if out_channels not in (in_channels, 2 * in_channels):
        plan.fields["out_channels"] = out_channels
    if labels:
        plan.notes.append(f"the {labels} labels hold none for 'no label'; ours is zero")
    return plan, replace(
        options,
        layout="adm",
        image_size=image_size,
        head_dim=None if heads else head_dim,
        heads=heads,
        attention_order=order,
    )


def _children(state: State, name: str) -> int:
    """Length of a module list."""
    found = [int(m[1]) for key in state if (m := re.match(rf"{name}\.(\d+)\.", key))]
    return max(found, default=-1) + 1


def _residual_parts(state: State, block: str) -> int:
    """ResBlocks in a block."""
    return sum(f"{block}.{part}.in_layers.0.weight" in state for part in range(3))


_RES_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "emb",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "skip",
}
_ATTENTION = {"norm": "norm", "qkv": "qkv", "proj_out": "proj", "encoder_kv": "text_kv"}
_AROUND = {
    "time_embed.0": "time.fc1",
    "time_embed.2": "time.fc2",
    "label_emb": "label",
    "input_blocks.0.0": "encoder.conv_in",
    "out.0": "norm_out",
    "out.2": "conv_out",
    # hana's
    "final_ln": "text.norm",
    "transformer_proj": "time_text.text",
    "time_to_half": "time_text.time_half",
    "clip_to_half": "time_text.text_half",
}


def _rename_adm(key: str, depth: int, levels: int, attended: set[int]) -> str | None:
    name, _, kind = key.rpartition(".")
    if name in _AROUND:
        return f"{_AROUND[name]}.{kind}"
    match = re.fullmatch(r"(input_blocks|middle_block|output_blocks)\.(?:(\d+)\.)?(\d)\.(.+)", name)
    if match is None:
        return None
    part, rest = int(match[3]), match[4]
    layer = _RES_BLOCK.get(rest) or _ATTENTION.get(rest)
    attention = rest in _ATTENTION
    if layer is None:
        return None
    if match[1] == "middle_block":
        return f"middle.{('res1', 'attn', 'res2')[part]}.{layer}.{kind}" if part < 3 else None
    index = int(match[2])
    if match[1] == "input_blocks":
        level, place = divmod(index - 1, depth + 1)
        owner = f"encoder.levels.{level}.{place}"
        if level in attended and place < depth:
            owner += ".attn" if part else ".res"
        return f"{owner}.{layer}.{kind}"
    owner = "attn" if attention else ("up" if part else "res")
    return f"decoder.blocks.{index}.{owner}.{layer}.{kind}"


def _plan_hana(state: State, options: Options, file: Path) -> tuple[Plan, Options]:
    if options.attention_order not in (None, "legacy"):
        raise ValueError("import_checkpoint: hana's attention has the legacy order")
    plan, taken = _plan_adm(state, replace(options, attention_order="legacy"), file)
    weight, bias = (state[f"transformer_proj.{kind}"].double() for kind in ("weight", "bias"))
    width = weight.shape[1]
    plan.fields |= {"context_dim": width, "text_norm": "final_ln.weight" in state}
    # its condition is dropped by zeros behind the norm and behind the projection of pooled text
    null = torch.linalg.lstsq(weight, -bias.unsqueeze(1))
    plan.filled = {
        "text.null_context": torch.zeros(1, width),
        "text.null_pooled": null.solution[:, 0].float(),
    }
    plan.unused = lambda key: key.startswith("clip_embed_proj.")
    plan.notes += [
        "its null condition is one zero for each position of the text; ours has a single one, so "
        "unconditional outputs differ",
        "it reads padding as text: give context of its full length without a mask",
    ]
    return plan, replace(taken, layout="hana")


# Which keys say whose checkpoint it is; hana's are ADM's and more.
LAYOUTS: dict[str, tuple[tuple[str, ...], Callable[..., tuple[Plan, Options]]]] = {
    "uvit": (("patch_embed.proj.weight", "pos_embed", "decoder_pred.weight"), _plan_uvit),
    "hana": (("time_embed.0.weight", "input_blocks.0.0.weight", "time_to_half.weight"), _plan_hana),
    "adm": (("time_embed.0.weight", "input_blocks.0.0.weight"), _plan_adm),
}


def import_checkpoint(path: str | os.PathLike[str], options: Options | None = None) -> Imported:
    """Read another project's weights into a model of ours.

    Args:
        path: `nnet.pth` of U-ViT, `*_diffusion*.pt` of guided-diffusion, hana's text-to-image
            U-Net, or the same keys in safetensors.
        options: What the file leaves open.

    Returns:
        The model, and which keys had no place; look at `complete`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file could run code, its layout is none of these, or it holds several sets
            of weights.
    """
    options = options or Options()
    file = Path(path)
    if options.layout is not None and options.layout not in LAYOUTS:
        raise ValueError(
            f"import_checkpoint: layout={options.layout!r}, expected one of {list(LAYOUTS)}"
        )
    found = []
    for name, held in _state_dicts(read_checkpoint(file)):
        for layout, (anchors, make_plan) in LAYOUTS.items():
            state = _anchored(held, anchors[0]) if options.layout in (None, layout) else None
            if state is not None and all(anchor in state for anchor in anchors):
                found.append((name, layout, state, make_plan))
                break
    if options.weights is not None:
        found = [each for each in found if each[0] == options.weights]
    if not found:
        raise ValueError(
            f"import_checkpoint: {file} holds no weights "
            + (f"named {options.weights!r} " if options.weights else "")
            + f"in the layout of {options.layout or ' or '.join(LAYOUTS)}"
        )
    if len(found) > 1:
        names = [each[0] for each in found]
        raise ValueError(f"import_checkpoint: {file} holds several weights, choose one of {names}")
    _, layout, state, make_plan = found[0]
    plan, taken = make_plan(state, options, file)
    model = MODELS[plan.model].from_config(plan.fields)
    return _fill(model, layout, state, plan, taken)


def _fill(model: Backbone, layout: str, state: State, plan: Plan, options: Options) -> Imported:
    own = model.state_dict()
    new = {key: value for key, value in plan.filled.items() if key in own}
    unplaced, placed = [], 0
    for key, value in state.items():
        if plan.unused(key):
            continue
        target = plan.rename(key)
        if target is None or target not in own:
            unplaced.append(key)
            continue
        value = plan.convert(target, value).float()
        if value.shape != own[target].shape:
            unplaced.append(
                f"{key}: {tuple(value.shape)}, but {target} is {tuple(own[target].shape)}"
            )
            continue
        new[target] = value
        placed += 1
    unfilled = tuple(key for key in own if key not in new)
    model.load_state_dict(new, strict=False)
    return Imported(
        model.eval(),
        layout,
        placed,
        tuple(unplaced),
        unfilled,
        tuple(plan.notes),
        state,
        options,
    )
