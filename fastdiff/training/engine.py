"""Optimiser steps: by PyTorch alone, in one process or many, or by DeepSpeed's ZeRO.

The only module that imports deepspeed. Both engines take the same calls, so the loop knows neither.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastdiff.nn import channels_last_, contiguous_
from fastdiff.training.config import Recipe
from fastdiff.training.shares import SavedState, Share, part, restore, whole

BANDS = 4  # of diffusion time, equally wide
# Rank 0 draws sample grids while the others wait for it.
TIMEOUT = timedelta(minutes=10)
# Devices on which convolutions want their weights so, where no wrapper needs contiguous ones.
CHANNELS_LAST = {"cuda"}
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class MicroBatch(NamedTuple):
    """One forward pass: what the learner takes, the seed of its dropout, and the samples' keys.

    The seed is a function of the batch, so a resumed run drops alike.
    """

    seed: int
    inputs: dict[str, Tensor]
    keys: tuple[str, ...] = ()


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
    """What the loop needs of an engine.

    Attributes:
        rank: This process.
        world: Number of processes.
        device: Where this rank computes.
        learner: What is trained.
        optimizer: AdamW, with the moments of this rank.
        shares: This rank's of the weights, one for each trained parameter, in its order; all
            ranks' together are all elements, each once. They follow the weights.
    """

    rank: int
    world: int
    device: torch.device
    learner: nn.Module
    optimizer: GuardedAdamW
    shares: list[Share]

    def step(self, micro_batches: Sequence[MicroBatch], lr: float) -> StepResult:
        """One optimiser step on this rank's share of the batch, at the rate `lr`.

        Where the loss or a gradient is not finite on any rank, no rank changes anything.
        """

    def load(self, saved: SavedState, scaler: Mapping[str, float]) -> None:
        """Read weights, moments and loss scale; the learner was made with these weights."""

    def scaler(self) -> dict[str, float]:
        """The loss scale of float16; empty for other types."""

    def any_rank(self, *flags: bool) -> tuple[bool, ...]:
        """Whether each flag is set on any rank. Collective."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank. Collective."""

    def whole(self, values: Mapping[str, Tensor], *, everywhere: bool = False) -> dict[str, Tensor]:
        """Parameters put together from all ranks' shares, on the CPU. Collective.

        Args:
            values: By name, (N,) float32 each, as long as this rank's share of it.
            everywhere: On every rank, not on rank 0 alone.

        Returns:
            Each parameter in its shape; nothing on other ranks than 0 where not asked for.
        """

    def barrier(self) -> None:
        """Wait for all ranks."""


class _Ranks:
    """The collective calls of both engines; without a process group there is one rank."""

    rank: int
    world: int
    device: torch.device
    shares: list[Share]

    def any_rank(self, *flags: bool) -> tuple[bool, ...]:
        """Whether each flag is set on any rank."""
        if self.world == 1:
            return flags
        values = torch.tensor([float(flag) for flag in flags], device=self.device)
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
        return tuple(bool(value) for value in values.tolist())

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        return gather(value)

    def whole(self, values: Mapping[str, Tensor], *, everywhere: bool = False) -> dict[str, Tensor]:
        """Parameters put together from all ranks' shares, on the CPU."""
        together = {}
        for share in self.shares:
            buffer = torch.zeros(math.prod(share.shape), device=self.device)
            if len(share.weight):
                mine = share.indexed(values[share.name]).flatten()
                buffer[share.start : share.start + len(mine)] = mine
            if self.world > 1 and everywhere:
                torch.distributed.all_reduce(buffer)
            elif self.world > 1:
                torch.distributed.reduce(buffer, 0)
            if everywhere or self.rank == 0:
                together[share.name] = buffer.view(share.shape).cpu()
        return together

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            torch.distributed.barrier()


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


def make_optimizer(recipe: Recipe, learner: nn.Module, device: torch.device) -> GuardedAdamW:
    """AdamW over every parameter that is trained, fused on a GPU."""
    optim = recipe.optim
    optimizer = GuardedAdamW(
        [p for p in learner.parameters() if p.requires_grad],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=device.type == "cuda" or recipe.train.offload or None,
    )
    optimizer.device = device
    return optimizer


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that changes nothing, on any rank, where a gradient on one of them is not finite.

    DeepSpeed's own checks differ with ZeRO stage and precision; this one sees what reaches Adam.

    Attributes:
        skipped: Whether the last step was left out.
        device: Where ranks tell each other.
    """

    skipped = False
    device = torch.device("cpu")

    def step(self, closure: Any = None) -> Any:
        """One step, on all ranks or on none."""
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        grads = [grad for grad in grads if grad is not None and grad.numel()]
        finite = torch.ones((), device=self.device)
        if grads:
            largest = torch.stack(torch._foreach_norm(grads, math.inf))
            finite = largest.isfinite().all().float().to(self.device)
        if under_launcher():
            torch.distributed.all_reduce(finite, op=torch.distributed.ReduceOp.MIN)
        self.skipped = not bool(finite)
        return None if self.skipped else super().step(closure)


def gather(value: Any) -> list[Any]:
    """Every rank's value, on every rank. Collective."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def under_launcher() -> bool:
    """Whether `deepspeed` or `torchrun` started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


class PlainEngine(_Ranks):
    """Float32 weights, whole on each rank; narrower types by autocast where asked.

    Under a launcher (ZeRO 0) gradients are averaged by DistributedDataParallel. Convolution weights
    are channels_last on a GPU.

    Args:
        recipe: The run's.
        learner: Maps a micro-batch to its losses (B,).
        device: Where this rank computes.
    """

    def __init__(self, recipe: Recipe, learner: nn.Module, device: torch.device) -> None:
        self.rank, self.world = 0, 1
        if under_launcher():
            self.rank = torch.distributed.get_rank()
            self.world = torch.distributed.get_world_size()
        self.device = device
        self.learner = learner.to(device)
        if device.type in CHANNELS_LAST:
            channels_last_(learner)
        self.recipe = recipe
        self.optimizer = make_optimizer(recipe, learner, device)
        self.parameters = [p for p in learner.parameters() if p.requires_grad]
        held = [whole(n, p) for n, p in learner.named_parameters() if p.requires_grad]
        self._held = held
        self.shares = [part(share, self.rank, self.world) for share in held]
        self._scaler = torch.amp.GradScaler(device.type, enabled=recipe.train.precision == "fp16")
        self._module: nn.Module = self.learner
        if self.world > 1:
            self._module = nn.parallel.DistributedDataParallel(
                learner, device_ids=None if device.index is None else [device.index]
            )

    def step(self, micro_batches: Sequence[MicroBatch], lr: float) -> StepResult:
        """One optimiser step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=self.device)
        bands = torch.zeros(2, BANDS, device=self.device)
        for number, batch in enumerate(micro_batches, start=1):
            torch.manual_seed(batch.seed)
            with self._autocast(), self._sync(number == len(micro_batches)):
                losses = self._module(**batch.inputs)
                loss = losses.mean() / len(micro_batches)
                self._scaler.scale(loss).backward()
            bands += sums_by_band(losses, batch.inputs["t"], self.recipe.diffusion.steps)
            total += loss.detach()
        if self.world > 1:
            torch.distributed.all_reduce(total)
            total /= self.world
        if self._scaler.is_enabled():
            self._scaler.unscale_(self.optimizer)
        clip = self.recipe.optim.clip
        norm = nn.utils.clip_grad_norm_(self.parameters, math.inf if clip is None else clip)
        mean, grad_norm = torch.stack([total, norm.float()]).tolist()
        # the gradients are the same numbers on every rank
        skipped = not (math.isfinite(mean) and math.isfinite(grad_norm))
        if not skipped:
            super(GuardedAdamW, self.optimizer).step()
        if self._scaler.is_enabled():
            self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(mean, grad_norm, skipped, bands)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = _AUTOCAST.get(self.recipe.train.precision)
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=dtype)

    def _sync(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Ranks exchange gradients in the last backward pass of a step."""
        if last or not isinstance(self._module, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self._module.no_sync()

    def load(self, saved: SavedState, scaler: Mapping[str, float]) -> None:
        """Read weights, moments and loss scale, all of them on every rank."""
        restore(self._held, self.optimizer, saved)
        if self._scaler.is_enabled() and scaler:
            state = self._scaler.state_dict()
            state |= {"scale": scaler["scale"], "_growth_tracker": int(scaler["good_steps"])}
            self._scaler.load_state_dict(state)

    def scaler(self) -> dict[str, float]:
        """The loss scale, and the steps since it last changed."""
        if not self._scaler.is_enabled():
            return {}
        state = self._scaler.state_dict()
        return {"scale": state["scale"], "good_steps": state["_growth_tracker"]}


def deepspeed_config(recipe: Recipe, world: int) -> dict[str, Any]:
    """DeepSpeed's dictionary, derived from the recipe so that no value stands twice."""
    micro = micro_batch_size(recipe, world)
    train = recipe.train
    zero: dict[str, Any] = {
        "stage": train.zero,
        # One group of the optimiser on each rank: a step is left out as a whole or not at all.
        "sub_group_size": 10**12,
    }
    if train.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": train.batch_size // world // micro,
        "gradient_clipping": recipe.optim.clip or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # a subclass of AdamW counts as one
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": train.precision == "bf16"},
        "fp16": {"enabled": train.precision == "fp16"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


class DeepSpeedEngine(_Ranks):
    """DeepSpeed with ZeRO 1, 2 or 3 on the ranks of its launcher (or of torchrun).

    It lays all weights side by side in one tensor, contiguous each.

    Args:
        recipe: The run's.
        learner: Maps a micro-batch to its losses (B,).
        device: Where this rank computes.
    """

    optimizer: GuardedAdamW

    def __init__(self, recipe: Recipe, learner: nn.Module, device: torch.device) -> None:
        import deepspeed

        self.device = device
        self.recipe = recipe
        self.rank = torch.distributed.get_rank()
        self.world = torch.distributed.get_world_size()
        self.learner = contiguous_(learner.to(device))
        self.optimizer = make_optimizer(recipe, learner, device)
        trained = [(n, p) for n, p in learner.named_parameters() if p.requires_grad]
        exact = {n: p.detach().flatten().to("cpu", copy=True) for n, p in trained}
        self.engine, *_ = deepspeed.initialize(
            model=learner, optimizer=self.optimizer, config=deepspeed_config(recipe, self.world)
        )
        self.shares = [self._share(name, parameter) for name, parameter in trained]
        # DeepSpeed makes its float32 weights out of the rounded ones.
        for share in self.shares:
            stop = share.start + len(share.weight)
            share.weight.copy_(exact[share.name][share.start : stop])

    def _share(self, name: str, parameter: Any) -> Share:
        """Where ZeRO put this rank's float32 elements of a parameter."""
        zero = self.engine.optimizer
        if self.recipe.train.zero == 3:
            group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
            flat, shape = zero.fp32_partitioned_groups_flat[group], tuple(parameter.ds_shape)
            start = min(self.rank * length, parameter.ds_numel)
            count = min(length, parameter.ds_numel - start)  # the rest is padding
        else:
            shape, mapping = tuple(parameter.shape), parameter._hp_mapping
            if mapping is None:
                flat, offset, start, count = zero.single_partition_of_fp32_groups[0], 0, 0, 0
            else:
                flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
                offset, count = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
                start = mapping.lp_fragment_address.start
        weight = flat.detach().narrow(0, offset, count)
        return Share(name, shape, start, weight, flat, offset)

    def step(self, micro_batches: Sequence[MicroBatch], lr: float) -> StepResult:
        """One optimiser step over all ranks."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=self.device)
        bands = torch.zeros(2, BANDS, device=self.device)
        self.optimizer.skipped = False
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
        skipped = self.optimizer.skipped or bool(getattr(self.engine.optimizer, "overflow", False))
        if skipped and math.isfinite(grad_norm):
            grad_norm = math.nan  # what DeepSpeed had was of the step before, or its -1
        return StepResult(loss_value, grad_norm, skipped, bands)

    def load(self, saved: SavedState, scaler: Mapping[str, float]) -> None:
        """Read this rank's shares of weights and moments, and the loss scale."""
        restore(self.shares, self.optimizer, saved)
        if self.recipe.train.precision == "fp16" and scaler:
            mine = self.engine.optimizer.loss_scaler
            mine.cur_scale, mine.last_overflow_iter = scaler["scale"], -1
            mine.cur_iter = int(scaler["good_steps"]) - 1

    def scaler(self) -> dict[str, float]:
        """The loss scale, and the steps since it last changed."""
        if self.recipe.train.precision != "fp16":
            return {}
        mine = self.engine.optimizer.loss_scaler
        good = (mine.cur_iter - mine.last_overflow_iter) % mine.scale_window
        return {"scale": float(mine.cur_scale), "good_steps": float(good)}


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
    deepspeed.init_distributed(verbose=False, timeout=TIMEOUT)
    return torch.distributed.get_rank(), torch.distributed.get_world_size(), device


def stop() -> None:
    """Leave the process group, if one was joined."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def make_engine(recipe: Recipe, learner: nn.Module, device: torch.device) -> Engine:
    """DeepSpeed under a launcher, but for ZeRO 0; else plain PyTorch."""
    if under_launcher() and recipe.train.zero > 0:
        return DeepSpeedEngine(recipe, learner, device)
    return PlainEngine(recipe, learner, device)
