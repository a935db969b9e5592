"""One training step of a preset: eager and as a CUDA graph, its memory beside the plan's.

A step is what `fastdiff train` does on one GPU without its loader: noise the pictures, forward and
backward under autocast to bfloat16 with float32 weights, clip, AdamW, moving average.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fastdiff import roofline
from fastdiff.diffusion import DiffusionProcess, schedule
from fastdiff.models import Backbone, create_model
from fastdiff.nn import channels_last_

from .. import bench_models, harness
from ..harness import Row, Timing

GIB = 2**30
TEXT = 256  # tokens
BATCH = {"ascend_t2i_128": 16, "iuvit_cifar10": 128}
# The dry run's, small enough for a second.
TINY: dict[str, tuple[int, dict[str, Any]]] = {
    "ascend_t2i_128": (2, {**bench_models._SMALL, "image_size": 32}),
    "iuvit_cifar10": (2, {"dim": 64, "layers": 1}),
}
# Names of `fastdiff.plan.GPUS` by a part of the GPU's own and its memory in GB, at least.
CARDS = (
    *(("H200", 0, "h200-141g"), ("H100", 0, "h100-80g")),
    *(("A100", 60, "a100-80g"), ("A100", 0, "a100-40g")),
)


def items(preset: str) -> list[str]:
    return [f"{preset} training step, batch {BATCH[preset]}, {how}" for how in ("eager", "graph")]


def made(preset: str, dry: bool) -> tuple[Backbone, int]:
    """The model and its batch."""
    batch, overrides = TINY[preset] if dry else (BATCH[preset], {})
    return create_model(preset, **overrides), batch


class Step:
    """A model with its optimiser, average and one batch, ready to train."""

    def __init__(self, preset: str, device: torch.device, dry: bool) -> None:
        self.device = device
        torch.manual_seed(0)
        with torch.device(device):
            self.net, self.batch = made(preset, dry)
            self.net.train()
            if device.type == "cuda":  # as training has it
                channels_last_(self.net)
            config = self.net.config
            self.x0 = torch.randn(self.batch, config.in_channels, *config.image_size).clamp(-1, 1)
            self.noise = torch.randn_like(self.x0)
            self.t = torch.randint(0, 1000, (self.batch,))
            self.text: dict[str, Any] = {}
            if config.context_dim is not None:
                mask = torch.ones(self.batch, TEXT, dtype=torch.bool)
                self.text["context"] = torch.randn(self.batch, TEXT, config.context_dim)
                self.text["context_mask"] = mask
        self.process = DiffusionProcess(schedule("cosine", 1000))
        self.parameters = list(self.net.parameters())
        gpu = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=1e-4, betas=(0.9, 0.9999), fused=gpu or None, capturable=gpu
        )
        self.weights: list[torch.Tensor] = list(self.parameters)
        self.average = [p.detach().float().clone() for p in self.parameters]

    def __call__(self) -> torch.Tensor:
        """One optimiser step; its loss."""
        autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.device.type == "cuda":
            autocast = torch.autocast("cuda", torch.bfloat16)
        with autocast:
            x_t = self.process.q_sample(self.x0, self.t, self.noise)
            out = self.net(x_t, self.t, **self.text)
            loss = self.process.loss(out, self.x0, self.t, self.noise).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.weights, 1e-4)
        return loss.detach()

    def captured(self) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """The step as a graph, and the tensor that each replay writes its loss to."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self()
        return graph, loss


@functools.lru_cache(maxsize=1)
def step_of(preset: str, device: torch.device, dry: bool) -> Step:
    """Made once for both ways to run it."""
    return Step(preset, device, dry)


def run(name: str, device: torch.device, dry: bool, given: Mapping[str, Any]) -> Row:
    """Time a training step; the row has images/s, MFU, and memory beside the plan's."""
    preset, how = name.split()[0], name.rsplit(", ", 1)[1]
    if how == "graph" and device.type != "cuda":
        return {"notes": [f"{name}: a CUDA graph needs a GPU"]}
    step = step_of(preset, device, dry)
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    losses = [step() for _ in range(3)]
    job: Callable[[], Any] = step
    if how == "graph":
        graph, loss = step.captured()
        losses.append(loss)
        job = graph.replay
    timing = timed(job, device, rounds=3 if dry else 20, seconds=0.5 if dry else 4.0)
    if not all(math.isfinite(float(loss)) for loss in losses):
        raise harness.Refused(f"the loss is {[float(loss) for loss in losses]}")
    row: Row = {
        "case": name.rsplit(", ", 1)[0],
        "direction": f"training step, {how}",
        "dtype": "bfloat16" if gpu else "float32",
        "us": 1e6 * timing.seconds,
        "times_us": {"ours": 1e6 * timing.seconds},
        "samples_us": harness.samples_us({"ours": timing}),
        "spread": timing.spread,
        "rounds": timing.rounds,
        "how": timing.how,
        "batch": step.batch,
        "images_per_second": step.batch / timing.seconds,
    }
    if gpu:
        row["peak_gib"] = torch.cuda.max_memory_allocated(device) / GIB
        row["reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB
        row["gpu_used_gib"] = bench_models.gpu_used_gib(device)
    else:
        row["peak_gib"] = harness.peak_memory(step, device) / GIB
    return {"rows": [row | counted(preset, dry, timing.seconds, device, given)]}


def timed(job: Callable[[], Any], device: torch.device, *, rounds: int, seconds: float) -> Timing:
    """Time of a call from its start until the GPU has done it, Python's included."""
    harness.synchronize(device)
    samples: list[float] = []
    started = time.perf_counter()
    while len(samples) < rounds and (len(samples) < 3 or time.perf_counter() - started < seconds):
        began = time.perf_counter()
        job()
        harness.synchronize(device)
        samples.append(time.perf_counter() - began)
    return Timing.of(samples, "clock" if device.type == "cuda" else "cpu")


def counted(
    preset: str, dry: bool, seconds: float, device: torch.device, given: Mapping[str, Any]
) -> Row:
    """MFU over both ceilings, and what `fastdiff plan` predicts; a part that fails is named.

    Args:
        given: "ceilings", and "plans" where an earlier step has made them.
    """
    found: Row = {"preset": preset, **given.get("plans", {}).get(preset, {})}
    try:
        flops = found.get("flops") or flops_of(preset, dry)
        found["flops"] = flops
        found["tflops"] = flops / seconds / 1e12
        if product := given.get("ceilings", {}).get("product"):
            found["mfu_of_measured"] = flops / seconds / product
        if device.type == "cuda":
            gpu = torch.cuda.get_device_name(device)
            found["mfu"] = bench_models.utilisation(flops, seconds, torch.bfloat16, gpu)
    except Exception as error:
        found["no_mfu"] = f"{type(error).__name__}: {error}"[:200]
    if "planned_gib" not in found:
        try:
            found |= planned(preset, dry)
        except Exception as error:
            found["no_plan"] = f"{type(error).__name__}: {error}"[:200]
    return found


def plan_items() -> list[str]:
    return [f"{what} of {preset}" for what in ("memory", "time") for preset in BATCH]


def plan(name: str, dry: bool, environment: Mapping[str, Any]) -> Row:
    """What `fastdiff plan` says of a preset's step: it takes seconds, and no GPU.

    Args:
        name: of `plan_items`.
        dry: of the tiny models; they have no time.
        environment: of the run, with the GPU's name.
    """
    what, preset = name.split(" of ")
    if what == "memory":
        return {"plan": {preset: {"flops": flops_of(preset, dry), **planned(preset, dry)}}}
    card = card_of(environment.get("gpu", ""), 2**30 * environment.get("memory_gib", 0))
    if dry or card is None:
        return {}
    ms = milliseconds_of(preset, BATCH[preset], card)
    return {"plan": {preset: {"planned_ms": ms, "planned_for": card}}}


def flops_of(preset: str, dry: bool) -> float:
    """FLOPs of a forward and backward."""
    with torch.device("meta"):
        net, batch = made(preset, dry)
    calls = roofline.count(net, batch, text=TEXT).calls
    return sum(call.flops for call in calls if not call.kind.startswith("optimizer"))


def activations_of(preset: str, dry: bool) -> tuple[float, int]:
    """Bytes of activations as `fastdiff plan` counts them, and parameters."""
    from fastdiff.model_table import activation_bytes

    with torch.device("meta"):
        net, batch = made(preset, dry)
        parameters = sum(p.numel() for p in net.parameters())
    return activation_bytes(net, batch, text=TEXT), parameters


def milliseconds_of(preset: str, batch: int, card: str) -> float | None:
    """Milliseconds of a step by `fastdiff plan` on one GPU, its text encoder left out."""
    from fastdiff import plan

    recipe = plan.open_recipe(preset)
    train = dataclasses.replace(recipe.train, batch_size=batch, micro_batch=batch)
    data = recipe.data
    if recipe.model.context_dim is not None:
        data = dataclasses.replace(data, embeddings="stored")
    recipe = dataclasses.replace(recipe, train=train, data=data)
    step = plan.plan(recipe, card, 1, tokens=TEXT).step
    return None if step is None else 1e3 * step.seconds


def card_of(name: str, memory: float) -> str | None:
    """The name in `fastdiff.plan.GPUS` of a GPU with so many bytes."""
    cards = (c for part, least, c in CARDS if part in name and memory / 1e9 >= least)
    return next(cards, None)


def planned(preset: str, dry: bool) -> Row:
    """GiB that stay, and GiB of activations beside them, as `fastdiff plan` counts them."""
    activations, parameters = activations_of(preset, dry)
    found: Row = {"planned_activations_gib": activations / GIB}
    from fastdiff import plan  # needs Pillow, by way of the recipes

    held = plan.states(parameters, 1, 0)
    found["planned_gib"] = (held.total + activations) / GIB
    return found
