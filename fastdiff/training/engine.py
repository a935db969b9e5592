"""Optimiser steps: in one process by PyTorch alone, or by DeepSpeed under a launcher.

The only module that imports deepspeed. Both engines take the same calls, so the loop knows neither.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastdiff.training.config import Recipe

BANDS = 4  # of diffusion time, equally wide


class MicroBatch(NamedTuple):
    """One forward pass: what the learner takes, and the seed of its dropout.

    The seed is a function of the batch, so a resumed run drops alike.
    """

    seed: int
    inputs: dict[str, Tensor]


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step gave.

    Args:
        loss: Mean over the global batch.
        grad_norm: Global gradient norm before clipping.
        skipped: The loss or the norm was not finite; no weight changed.
        bands: (2, BANDS) float32 on the device, of this rank's images: sums of their losses and
            their number, by band of diffusion time. Read it seldom: that waits for the device.
    """

    loss: float
    grad_norm: float
    skipped: bool
    bands: Tensor | None = None


class Engine(Protocol):
    """What the loop needs of an engine."""

    rank: int
    world: int
    device: torch.device

    def step(self, micro_batches: Sequence[MicroBatch], lr: float) -> StepResult:
        """One optimiser step on this rank's share of the batch, at the rate `lr`."""

    def weights(self) -> list[Tensor] | None:
        """Float32 weights in the learner's order; None: the parameters themselves. Collective."""

    def save(self, folder: Path) -> None:
        """Write weights and optimiser state into `folder`. Collective."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Collective."""

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Collective."""

    def barrier(self) -> None:
        """Wait for all ranks."""


def sums_by_band(losses: Tensor, t: Tensor, steps: int) -> Tensor:
    """Sums of losses and their number, by band of diffusion time.

    Args:
        losses: (B,).
        t: (B,) int64, steps 0..T-1.
        steps: T.

    Returns:
        (2, BANDS) float32, without a wait for the device.
    """
    bands = torch.arange(BANDS, device=t.device)
    inside = ((t * BANDS).div(steps, rounding_mode="floor").unsqueeze(1) == bands).float()
    return torch.stack([losses.detach().float() @ inside, inside.sum(dim=0)])


def micro_batch_size(recipe: Recipe, world: int) -> int:
    """Images of one forward pass on one rank.

    Raises:
        ValueError: The batch does not divide over ranks and micro-batches.
    """
    batch = recipe.train.batch_size
    if batch % world:
        raise ValueError(f"train.batch_size={batch} does not divide over {world} ranks")
    share = batch // world
    micro = min(recipe.train.micro_batch or share, share)
    if share % micro:
        raise ValueError(
            f"train.micro_batch={micro} does not divide the {share} images that each of {world} "
            f"ranks has of train.batch_size={batch}"
        )
    return micro


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate of optimiser step `step`, counted from 0; a function of the step alone."""
    optim = recipe.optim
    rate = optim.lr * min(1.0, (step + 1) / max(1, optim.warmup))
    if optim.decay == "cosine":
        rate *= 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / recipe.train.max_steps)))
    return rate


def make_optimizer(recipe: Recipe, learner: nn.Module, device: torch.device) -> torch.optim.AdamW:
    """AdamW over every parameter that is trained, fused on a GPU."""
    optim = recipe.optim
    return torch.optim.AdamW(
        [p for p in learner.parameters() if p.requires_grad],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=device.type == "cuda" or None,
    )


def under_launcher() -> bool:
    """Whether `deepspeed` or `torchrun` started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


class PlainEngine:
    """One process, float32 weights, bf16 by autocast where asked.

    Args:
        recipe: The run's.
        learner: Maps a micro-batch to its losses (B,).
    """

    rank, world = 0, 1

    def __init__(self, recipe: Recipe, learner: nn.Module, device: torch.device) -> None:
        self.device = device
        self.learner = learner.to(device)
        self.recipe = recipe
        self.optimizer = make_optimizer(recipe, learner, device)
        self.parameters = [p for p in learner.parameters() if p.requires_grad]

    def step(self, micro_batches: Sequence[MicroBatch], lr: float) -> StepResult:
        """One optimiser step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total, bands = 0.0, torch.zeros(2, BANDS, device=self.device)
        autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.recipe.train.precision == "bf16":
            autocast = torch.autocast(self.device.type, dtype=torch.bfloat16)
        for batch in micro_batches:
            torch.manual_seed(batch.seed)
            with autocast:
                losses = self.learner(**batch.inputs)
                loss = losses.mean() / len(micro_batches)
            loss.backward()
            bands += sums_by_band(losses, batch.inputs["t"], self.recipe.diffusion.steps)
            total += float(loss.detach())
        clip = self.recipe.optim.clip
        norm = nn.utils.clip_grad_norm_(self.parameters, math.inf if clip is None else clip)
        grad_norm = float(norm)
        skipped = not (math.isfinite(total) and math.isfinite(grad_norm))
        if not skipped:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(total, grad_norm, skipped, bands)

    def weights(self) -> list[Tensor] | None:
        """The parameters themselves are the float32 weights."""
        return None

    def save(self, folder: Path) -> None:
        """Weights and Adam moments as safetensors: nothing in them can run code."""
        from safetensors.torch import save_file

        names = [n for n, p in self.learner.named_parameters() if p.requires_grad]
        tensors = {f"weight/{n}": p.detach() for n, p in self.learner.named_parameters()}
        for name, parameter in zip(names, self.parameters, strict=True):
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}/{name}"] = value
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "trainer.safetensors")

    def load(self, folder: Path) -> None:
        """Restore weights and Adam moments, all of them or none."""
        from safetensors.torch import load_file

        file = folder / "trainer.safetensors"
        tensors = load_file(file, device=str(self.device))
        named = dict(self.learner.named_parameters())
        trained = [n for n, p in named.items() if p.requires_grad]
        keys = ("step", "exp_avg", "exp_avg_sq")
        # before its first update (all steps skipped, say) a parameter has no moments
        moved = [n for n in trained if f"step/{n}" in tensors]
        expected = {f"weight/{n}" for n in named} | {f"{k}/{n}" for k in keys for n in moved}
        if expected != set(tensors):
            raise ValueError(
                f"{file} is of another model: missing {sorted(expected - set(tensors))[:5]}, "
                f"unexpected {sorted(set(tensors) - expected)[:5]}"
            )
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(tensors[f"weight/{name}"])
        for name in moved:
            # copies: what safetensors returns lies in the mapped file
            state = {key: tensors[f"{key}/{name}"].clone() for key in keys}
            # PyTorch keeps the step counter of an unfused AdamW on the CPU
            if self.optimizer.param_groups[0]["fused"] is not True:
                state["step"] = state["step"].cpu()
            self.optimizer.state[named[name]] = state

    def any_rank(self, flag: bool) -> bool:
        """The flag of the only rank."""
        return flag

    def barrier(self) -> None:
        """Nothing to wait for."""


def deepspeed_config(recipe: Recipe, world: int) -> dict[str, Any]:
    """DeepSpeed's dictionary, derived from the recipe so that no value stands twice."""
    micro = micro_batch_size(recipe, world)
    train = recipe.train
    return {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": train.batch_size // world // micro,
        "gradient_clipping": recipe.optim.clip or 0.0,
        "zero_optimization": {"stage": train.zero},
        "bf16": {"enabled": train.precision == "bf16"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


class DeepSpeedEngine:
    """DeepSpeed with ZeRO 1, 2 or 3 on the ranks of its launcher (or of torchrun).

    Args:
        recipe: The run's.
        learner: Maps a micro-batch to its losses (B,).
    """

    TAG = "zero"

    def __init__(self, recipe: Recipe, learner: nn.Module, device: torch.device) -> None:
        import deepspeed

        self.device = device
        self.recipe = recipe
        self.rank = torch.distributed.get_rank()
        self.world = torch.distributed.get_world_size()
        self.names = [n for n, p in learner.named_parameters() if p.requires_grad]
        learner.to(device)
        self.engine, *_ = deepspeed.initialize(
            model=learner,
            optimizer=make_optimizer(recipe, learner, device),
            config=deepspeed_config(recipe, self.world),
        )

    def step(self, micro_batches: Sequence[MicroBatch], lr: float) -> StepResult:
        """One optimiser step over all ranks."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        total, bands = (
            torch.zeros((), device=self.device),
            torch.zeros(2, BANDS, device=self.device),
        )
        for batch in micro_batches:
            torch.manual_seed(batch.seed)
            losses = self.engine(**batch.inputs)
            loss = losses.mean()
            bands += sums_by_band(losses, batch.inputs["t"], self.recipe.diffusion.steps)
            total += loss.detach().float() / len(micro_batches)
            self.engine.backward(loss)
            self.engine.step()
        torch.distributed.all_reduce(total)
        loss_value = float(total) / self.world
        grad_norm = float(self.engine.get_global_grad_norm() or 0.0)
        skipped = not (math.isfinite(loss_value) and math.isfinite(grad_norm))
        if skipped and not getattr(self.engine.optimizer, "overflow", False):
            raise FloatingPointError(
                f"loss {loss_value} and gradient norm {grad_norm} reached the weights; resume from "
                "the last checkpoint with a lower rate or train.precision=bf16, under which "
                "DeepSpeed skips such a step"
            )
        return StepResult(loss_value, grad_norm, skipped, bands)

    def weights(self) -> list[Tensor] | None:
        """Full float32 master weights, gathered; the parameters themselves where they are those."""
        if self.recipe.train.precision == "fp32" and self.recipe.train.zero < 3:
            return None
        from deepspeed.utils import safe_get_full_fp32_param

        named = dict(self.engine.module.named_parameters())
        return [safe_get_full_fp32_param(named[name]) for name in self.names]

    def save(self, folder: Path) -> None:
        """DeepSpeed's own files: pickles, so read back from a run's own folder only."""
        self.engine.save_checkpoint(str(folder), tag=self.TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, on the same number of ranks."""
        path, _ = self.engine.load_checkpoint(str(folder), tag=self.TAG)
        if path is None:
            raise ValueError(f"{folder} holds no DeepSpeed checkpoint {self.TAG!r}")

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        value = torch.tensor(float(flag), device=self.device)
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
        return bool(value)

    def barrier(self) -> None:
        """Wait for all ranks."""
        torch.distributed.barrier()


def start() -> tuple[int, int, torch.device]:
    """Rank, world size and device of this process; joins the process group under a launcher."""
    if not under_launcher():
        return 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls names that newer PyTorch deprecates
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # else DeepSpeed compiles a shared-memory all-reduce at start, for a minute; gloo will do
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        device = torch.device("cpu")
    else:
        device = torch.device(accelerator.device_name(), int(os.environ.get("LOCAL_RANK", 0)))
        accelerator.set_device(device.index)
    deepspeed.init_distributed(verbose=False)
    return torch.distributed.get_rank(), torch.distributed.get_world_size(), device


def stop() -> None:
    """Leave the process group, if one was joined."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def make_engine(recipe: Recipe, learner: nn.Module, device: torch.device) -> Engine:
    """DeepSpeed under a launcher, else plain PyTorch."""
    if under_launcher():
        return DeepSpeedEngine(recipe, learner, device)
    return PlainEngine(recipe, learner, device)
