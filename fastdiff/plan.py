"""What a training run needs: the memory of a rank by ZeRO stage, the micro-batch, the hours.

    fastdiff plan ascend_t2i_128 --gpu a100-40g --count 8

A model of the run, not a measurement: what it takes for granted is printed with it. Activations
are those of `fastdiff.model_table`, times those of `fastdiff.roofline`, both without a GPU.

Letters: P trained parameters, N ranks (GPUs), S tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from fastdiff import roofline
from fastdiff.model_table import activation_bytes
from fastdiff.models import MODELS
from fastdiff.models.backbone import nearest
from fastdiff.recipes import get_recipe, list_recipes
from fastdiff.roofline import ADAMW_BYTES, EMA_BYTES, Chip, time_floor
from fastdiff.training.config import Recipe, TextConfig, load

GB, GIB = 1e9, 2**30
STAGES = (0, 1, 2, 3)
GPUS_OF_NODE = 8
# CUDA context, NCCL and the libraries' work space; and what the allocator loses between blocks.
RESERVED_BYTES, LOST_SHARE = 2 * GIB, 0.05
# DeepSpeed's defaults, in elements: reduce_bucket_size, stage3_max_live_parameters.
BUCKET, LIVE_PARAMETERS = 500_000_000, 1_000_000_000


@dataclass(frozen=True)
class GPU:
    """A GPU as its data sheet has it.

    Attributes:
        chip: bandwidth of its memory, and FLOP/s of dense products.
        memory: bytes.
        nvlink: bytes per second in one direction: half of the published total.
    """

    chip: Chip
    memory: float
    nvlink: float


#: SXM forms, from NVIDIA's data sheets of the A100 (2021), H100 (2022) and H200 (2023) Tensor Core
#: GPUs; FLOP/s without sparsity.
GPUS = {
    "a100-40g": GPU(Chip("A100 40 GB", 1.555e12, 312e12, 19.5e12), 40 * GB, 300 * GB),
    "a100-80g": GPU(Chip("A100 80 GB", 2.039e12, 312e12, 19.5e12), 80 * GB, 300 * GB),
    "h100-80g": GPU(Chip("H100 80 GB", 3.35e12, 989e12, 67e12), 80 * GB, 450 * GB),
    "h200-141g": GPU(Chip("H200 141 GB", 4.8e12, 989e12, 67e12), 141 * GB, 450 * GB),
}


class T5Shape(NamedTuple):
    """Sizes of a T5 encoder."""

    width: int
    head_dim: int
    heads: int
    hidden: int
    layers: int
    gated: bool
    vocabulary: int = 32_128
    buckets: int = 32

    @property
    def matrices(self) -> int:
        """Weights that every token is multiplied with."""
        attention = 4 * self.width * self.heads * self.head_dim
        return self.layers * (attention + (2 + self.gated) * self.width * self.hidden)

    @property
    def parameters(self) -> int:
        """All weights: the matrices, embeddings, norms and the bias of relative positions."""
        norms = (2 * self.layers + 1) * self.width
        return self.matrices + self.vocabulary * self.width + norms + self.buckets * self.heads

    def flops(self, tokens: int) -> float:
        """Of the encoding of one text."""
        scores = 4 * tokens * self.heads * self.head_dim * self.layers
        return tokens * (2.0 * self.matrices + scores)

    def activations(self, tokens: int, element: int) -> float:
        """Bytes at the peak for one text: a layer's scores, or its hidden tokens."""
        scores = self.heads * tokens**2 * (element + 4)
        hidden = (1 + self.gated) * tokens * self.hidden * element
        return 4 * tokens * self.width * element + max(scores, hidden)


_XL = T5Shape(2048, 64, 32, 5120, 24, gated=True)
_XXL = T5Shape(4096, 64, 64, 10_240, 24, gated=True)
T5_SHAPES = {
    "t5-small": T5Shape(512, 64, 8, 2048, 6, gated=False),
    "t5-base": T5Shape(768, 64, 12, 3072, 12, gated=False),
    "t5-large": T5Shape(1024, 64, 16, 4096, 24, gated=False),
    "t5-3b": T5Shape(1024, 128, 32, 16_384, 24, gated=False),
    "t5-11b": T5Shape(1024, 128, 128, 65_536, 24, gated=False),
    "google/t5-v1_1-xl": _XL,
    "google/t5-v1_1-xxl": _XXL,
}


def t5_shape(name: str) -> T5Shape:
    """Sizes of a T5 by its name, or by the `config.json` in its folder.

    Raises:
        ValueError: neither a known name nor such a folder.
    """
    if name in T5_SHAPES:
        return T5_SHAPES[name]
    file = Path(name).expanduser() / "config.json"
    if not file.is_file():
        raise ValueError(f"plan: no T5 {name!r} and no {file}; {nearest(name, T5_SHAPES)}")
    values = json.loads(file.read_text(encoding="utf-8"))
    try:
        sizes = ("d_model", "d_kv", "num_heads", "d_ff", "num_layers", "vocab_size")
        width, head_dim, heads, hidden, layers, vocabulary = (int(values[key]) for key in sizes)
    except KeyError as error:
        raise ValueError(f"plan: {file} has no {error}; expected a T5's configuration") from None
    gated = "gated" in values.get("feed_forward_proj", "relu")
    return T5Shape(width, head_dim, heads, hidden, layers, gated, vocabulary)


@dataclass(frozen=True)
class States:
    """Bytes on the fullest rank (rank 0) that stay the whole step.

    Attributes:
        weights: as the network computes with them; under stage 3 also those gathered.
        gradients: of all micro-batches.
        optimizer: AdamW's moments and the float32 weights.
        average: float32, whole on rank 0.
        buckets: buffers in which gradients travel.
        text: the frozen text encoder.
    """

    weights: float
    gradients: float
    optimizer: float
    average: float
    buckets: float
    text: float = 0.0

    @property
    def total(self) -> float:
        return (
            self.weights + self.gradients + self.optimizer + self.average + self.buckets + self.text
        )


def states(
    parameters: int, ranks: int, stage: int, *, element: int = 2, text: float = 0.0
) -> States:
    """Bytes of weights and all that belongs to them, on rank 0.

    Args:
        parameters: P.
        ranks: N.
        stage: of ZeRO: 0 nothing is shared out, 1 the optimiser's state, 2 gradients too, 3 all.
        element: bytes of a weight in the network: 2 in bfloat16, 4 in float32.
        text: bytes of a frozen text encoder.

    Source: Rajbhandari et al. 2020 (ZeRO), section 3; buffers as DeepSpeed allocates them.
    """
    P, mine = parameters, parameters / ranks
    gathered = min(P - mine, LIVE_PARAMETERS) if stage == 3 else P - mine
    masters = 4 if element < 4 or stage > 0 else 0
    return States(
        weights=element * (mine + gathered),
        gradients=element * (mine if stage >= 2 else P),
        optimizer=(8 + masters) * (mine if stage >= 1 else P),
        average=4.0 * P,
        buckets=float(element * BUCKET) if stage >= 1 else 0.0,
        text=text,
    )


def sent_bytes(
    parameters: int, ranks: int, stage: int, micro_batches: int, *, element: int = 2
) -> float:
    """Bytes that a rank sends in one optimiser step, by rings.

    Gradients are reduced once, under stages 2 and 3 with every micro-batch; new weights are
    gathered once, under stage 3 twice for every micro-batch. For the average the float32 weights
    are summed over the ranks, where they are apart from the network's.
    """
    whole = (ranks - 1) / ranks * parameters
    rounds = {0: 2, 1: 2, 2: micro_batches + 1, 3: 3 * micro_batches}[stage]
    apart = stage > 0 and (element < 4 or stage == 3)
    return whole * (element * rounds + (2 * 4 if apart else 0))


@dataclass(frozen=True)
class Fit:
    """One ZeRO stage on one GPU.

    Attributes:
        stage: of ZeRO.
        states: bytes that stay.
        spare: bytes left for a micro-batch; below 0 where the states alone do not fit.
        micro_batch: the largest that fits and divides a rank's share, None where none does.
        checkpointed: the same with gradient checkpointing.
    """

    stage: int
    states: States
    spare: float
    micro_batch: int | None
    checkpointed: int | None


@dataclass(frozen=True)
class Step:
    """Seconds of one optimiser step as the recipe has it, and what follows.

    Attributes:
        stage, micro_batch, micro_batches, checkpointing: how it is made, on each rank.
        compute: forward and backward, with the second forward of checkpointing.
        text: the text encoder.
        update: AdamW and average.
        communication: between ranks.
        mfu: FLOPs of forward and backward over what the GPU could do in the step's time.
        images_per_s: over all ranks.
        hours: of the recipe's optimiser steps.
    """

    stage: int
    micro_batch: int
    micro_batches: int
    checkpointing: bool
    compute: float
    text: float
    update: float
    communication: float
    mfu: float
    images_per_s: float
    hours: float

    @property
    def seconds(self) -> float:
        return self.compute + self.text + self.update + self.communication


@dataclass(frozen=True)
class Plan:
    """What `plan` found.

    Attributes:
        title: the recipe.
        gpu: its name.
        count: N.
        parameters: P.
        activations: bytes for each image of a micro-batch, without and with checkpointing.
        fits: by ZeRO stage.
        step: None where nothing fits as the recipe has it.
        assumptions: what the numbers take for granted, a sentence each.
    """

    title: str
    gpu: str
    count: int
    parameters: int
    activations: tuple[float, float]
    fits: tuple[Fit, ...]
    step: Step | None
    assumptions: tuple[str, ...]


class _Affine(NamedTuple):
    """Bytes of a micro-batch: what a pass allocates once, and what each image adds."""

    once: float
    image: float

    def __call__(self, images: int) -> float:
        return self.once + self.image * images


def open_recipe(config: str) -> Recipe:
    """A recipe by name, by the folder of a run, or by a YAML file that a run saved.

    Raises:
        ValueError: none of them; the nearest names are in the message.
    """
    path = Path(config).expanduser()
    file = path / "recipe.yaml" if path.is_dir() else path
    if config not in list_recipes() and file.suffix == ".yaml" and file.is_file():
        return load(file)
    return get_recipe(config)


def plan(
    recipe: Recipe,
    gpu: str,
    count: int,
    *,
    title: str = "recipe",
    efficiency: float = 0.5,
    tokens: int = 32,
    network_gbit: float = 200.0,
) -> Plan:
    """Work out what a recipe needs, in a few seconds.

    Args:
        recipe: What is trained.
        gpu: One of GPUS.
        count: N, all of them alike.
        title: Name of the recipe.
        efficiency: Share of the roofline's speed that kernels reach, in (0, 1].
        tokens: Valid tokens of a mean caption.
        network_gbit: Gbit/s between nodes of eight GPUs, for a whole node in one direction.

    Raises:
        ValueError: An unknown GPU or text encoder, a count below 1 or one that does not divide the
            batch, a number out of range.
    """
    _check(recipe, gpu, count, efficiency, tokens, network_gbit)
    card, train = GPUS[gpu], recipe.train
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    element = dtype.itemsize
    with torch.device("meta"):
        kind = next(model for model in MODELS.values() if model.Config is type(recipe.model))
        net = kind(recipe.model)
    P = sum(p.numel() for p in net.parameters())
    longest = recipe.text.max_length
    tokens = longest if recipe.text.paper_mode else min(tokens, longest)

    def affine(checkpointing: bool) -> _Affine:
        few, many = (
            activation_bytes(net, n, checkpointing=checkpointing, dtype=dtype, text=longest)
            for n in (4, 16)
        )
        image = (many - few) / 12
        return _Affine(max(0.0, few - 4 * image), image)

    stored, again = affine(False), affine(True)
    t5, text_element = _online_t5(recipe), 2 if recipe.text.dtype == "bfloat16" else 4
    frozen = 0.0 if t5 is None else float(t5.parameters * text_element)

    share = train.batch_size // count
    usable = card.memory * (1 - LOST_SHARE) - RESERVED_BYTES

    def largest(stage: int, held: States, activations: _Affine, most: int = share) -> int | None:
        apart = stage > 0 and (element < 4 or stage == 3)
        for images in (n for n in range(min(most, share), 0, -1) if share % n == 0):
            texts = 0.0 if t5 is None else images * t5.activations(longest, text_element)
            # One after the other: the encoder, forward and backward, the average's weights.
            if held.total + max(activations(images), texts, 4.0 * P * apart) <= usable:
                return images
        return None

    fits = []
    for stage in STAGES:
        held = states(P, count, stage, element=element, text=frozen)
        most = (largest(stage, held, form) for form in (stored, again))
        fits.append(Fit(stage, held, usable - held.total, *most))

    step = None
    held, form = fits[train.zero].states, again if train.checkpointing else stored
    micro = largest(train.zero, held, form, train.micro_batch or share)
    if micro is not None:
        calls = roofline.count(net, micro, dtype=dtype, text=tokens)
        passes = [call for call in calls.calls if call.kind != "optimizer and EMA"]
        seconds = calls.seconds(card.chip, passes)
        if train.checkpointing:
            seconds += calls.seconds(card.chip, [call for call in passes if not call.backward])
        micros = share // micro
        encoding = 0.0
        if t5 is not None:
            kind_of_text = getattr(torch, recipe.text.dtype)
            encoding = time_floor(frozen, micro * t5.flops(tokens), card.chip, kind_of_text)
        updated = ADAMW_BYTES * P / (count if train.zero else 1) + EMA_BYTES * P
        between = card.nvlink
        if count > GPUS_OF_NODE:
            between = min(between, network_gbit * 1e9 / 8)
        sent = sent_bytes(P, count, train.zero, micros, element=element)
        parts = (
            micros * seconds / efficiency,
            micros * encoding / efficiency,
            updated / card.chip.bandwidth / efficiency,
            sent / between,
        )
        flops = micros * sum(call.flops for call in passes)
        step = Step(
            *(train.zero, micro, micros, train.checkpointing),
            *parts,
            mfu=flops / sum(parts) / card.chip.rate(dtype),
            images_per_s=train.batch_size / sum(parts),
            hours=sum(parts) * train.max_steps / 3600,
        )
    assumed = _assumptions(recipe, card, count, efficiency, tokens, network_gbit, t5 is not None)
    activations = (stored.image, again.image)
    return Plan(title, gpu, count, P, activations, tuple(fits), step, tuple(assumed))


def _check(
    recipe: Recipe, gpu: str, count: int, efficiency: float, tokens: int, network_gbit: float
) -> None:
    if gpu not in GPUS:
        raise ValueError(f"plan: unknown GPU {gpu!r}, {nearest(gpu, GPUS)}")
    if count < 1:
        raise ValueError(f"plan: count={count}, expected at least 1")
    if recipe.train.batch_size % count:
        raise ValueError(
            f"plan: count={count} does not divide train.batch_size={recipe.train.batch_size}"
        )
    if not 0 < efficiency <= 1:
        raise ValueError(f"plan: efficiency={efficiency}, expected above 0 and at most 1")
    if tokens < 1:
        raise ValueError(f"plan: tokens={tokens}, expected at least 1")
    if not network_gbit > 0:
        raise ValueError(f"plan: network_gbit={network_gbit}, expected above 0")


def _online_t5(recipe: Recipe) -> T5Shape | None:
    """The T5 that runs beside the training; None without text or with stored features."""
    text: TextConfig = recipe.text
    if recipe.model.context_dim is None or text.encoder != "t5":
        return None
    return None if recipe.data.embeddings is not None else t5_shape(text.name)


def _assumptions(
    recipe: Recipe,
    card: GPU,
    count: int,
    efficiency: float,
    tokens: int,
    network_gbit: float,
    online: bool,
) -> list[str]:
    chip, dtype = (
        card.chip,
        getattr(torch, {"bf16": "bfloat16"}.get(recipe.train.precision, "float32")),
    )
    lines = [
        f"{chip.name} (SXM, data sheet): {card.memory / GB:.0f} GB at {chip.bandwidth / 1e12:.2f} "
        f"TB/s, {chip.rate(dtype) / 1e12:.0f} TFLOP/s dense {recipe.train.precision}.",
        f"Of the memory {LOST_SHARE:.0%} is lost between blocks and {RESERVED_BYTES / GIB:.0f} GiB "
        "goes to CUDA, NCCL and libraries.",
        f"Kernels reach {efficiency:.0%} of the roofline: the longer of an operator's bytes and "
        "FLOPs, each operator alone. This is a guess, not a measurement.",
        "The loader, checkpoints, sample grids and evaluation take no time.",
        "States are those of DeepSpeed with its defaults: buckets of 5e8 elements, under stage 3 "
        "up to 1e9 gathered parameters; the average whole on rank 0, which is the rank shown.",
    ]
    if count > 1:
        inside = f"NVLink, {card.nvlink / GB:.0f} GB/s in one direction"
        across = f"{network_gbit:g} Gbit/s from node to node, {GPUS_OF_NODE} GPUs each"
        lines.append(
            f"Ranks are joined by {across if count > GPUS_OF_NODE else inside}; "
            "what they exchange is not hidden behind computing."
        )
    if recipe.model.context_dim is not None:
        lines.append(
            f"Captions have {tokens} tokens in the times, {recipe.text.max_length} in the memory."
        )
        kind = recipe.text.encoder
        if online:
            lines.append(f"{recipe.text.name} runs beside the training, in {recipe.text.dtype}.")
        elif kind == "small":
            lines.append("The small text encoder is left out.")
    return lines


def as_text(found: Plan) -> str:
    """A plan for a terminal."""
    lines = [
        f"{found.title} on {found.count} x {found.gpu}: {found.parameters / 1e6:.1f}M parameters, "
        f"{found.activations[0] / 2**20:,.1f} MiB of activations for each image, "
        f"{found.activations[1] / 2**20:,.1f} MiB with checkpointing",
        "",
        "GB on rank 0    weights  gradients  optimiser  average  buckets  text   left"
        "   largest micro-batch (checkpointing)",
    ]
    for fit in found.fits:
        held = fit.states
        row = (held.weights, held.gradients, held.optimizer, held.average, held.buckets, held.text)
        cells = " ".join(
            f"{value / GB:{width}.1f}"
            for value, width in zip(row, (8, 10, 10, 8, 8, 5), strict=True)
        )
        most, again = (n or "none" for n in (fit.micro_batch, fit.checkpointed))
        lines.append(f"ZeRO {fit.stage}       {cells} {fit.spare / GB:6.1f}   {most} ({again})")
    lines += ["", *_step_lines(found), "", "Taken for granted:"]
    return "\n".join([*lines, *(f"- {line}" for line in found.assumptions)])


def _step_lines(found: Plan) -> Sequence[str]:
    step = found.step
    if step is None:
        rescued = [f"ZeRO {fit.stage} with checkpointing" for fit in found.fits if fit.checkpointed]
        advice = f"; {rescued[0]} fits" if rescued else "; no stage fits: more or larger GPUs"
        return [f"As the recipe has it, not one image fits{advice}."]
    form = "with checkpointing" if step.checkpointing else "without checkpointing"
    return [
        f"ZeRO {step.stage}, {step.micro_batches} micro-batches of {step.micro_batch} {form}: "
        f"{step.seconds * 1e3:,.0f} ms a step (computing {step.compute * 1e3:,.0f}, text "
        f"{step.text * 1e3:,.0f}, update {step.update * 1e3:,.0f}, communication "
        f"{step.communication * 1e3:,.0f})",
        f"{step.images_per_s:,.0f} images/s, MFU {step.mfu:.0%}, {step.hours:,.1f} hours in all",
    ]
