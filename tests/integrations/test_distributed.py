"""One step under DDP and FSDP2 on two ranks is the step of one process."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastdiff.models import ASCEND, ASCENDConfig, IUViT, IUViTConfig, UNet, UNetConfig
from fastdiff.nn import Checkpointed, channels_last_, contiguous_

TEXT = {"context_dim": 8, "num_classes": 3, "image_size": 16}
LEVELS = {
    "channels": 16,
    "depth": 1,
    "multipliers": (1, 2),
    "attention_resolutions": (8,),
    "head_dim": 16,
    "groups": 8,
}
MODELS = {
    "iuvit": lambda: IUViT(IUViTConfig(patch_size=4, dim=32, layers=3, head_dim=16, **TEXT)),
    "ascend": lambda: ASCEND(ASCENDConfig(window=4, **LEVELS, **TEXT)),
    "unet": lambda: UNet(UNetConfig(**LEVELS, **TEXT)),
}
RANKS, BATCH = 2, 4


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp2(model: nn.Module) -> nn.Module:
    for part in reversed(list(model.modules())):
        if isinstance(part, Checkpointed):
            fully_shard(part)
    return fully_shard(model)


WRAPPERS = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    "ddp, channels_last": lambda model: ddp(channels_last_(model)),
    "fsdp2, contiguous again": lambda model: fsdp2(contiguous_(channels_last_(model))),
}


def step(model: nn.Module, rows: slice) -> None:
    """One step of AdamW on some rows of the batch."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, 3, 16, 16, generator=generator)
    context = torch.randn(BATCH, 5, 8, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    y, t = torch.tensor([0, 3, 1, 2]), torch.tensor([0, 250, 700, 999])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    out = model(x[rows], t[rows], context[rows], context_mask=mask[rows], y=y[rows])
    (out - x[rows]).square().mean().backward()
    optimizer.step()


def whole(p: Tensor) -> Tensor:
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach()


def worker(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    share = BATCH // RANKS
    rows = slice(rank * share, (rank + 1) * share)
    for name, make in MODELS.items():
        torch.manual_seed(0)
        alone = make()
        for p in alone.parameters():
            nn.init.normal_(p, std=0.1)
        start = copy.deepcopy(alone)
        step(alone, slice(None))
        with pytest.raises(NotImplementedError, match="non-contiguous"):
            fsdp2(channels_last_(copy.deepcopy(start)))
        for kind, wrap in WRAPPERS.items():
            model = copy.deepcopy(start)
            step(wrap(model), rows)
            keys = {key: whole(p) for key, p in model.named_parameters()}
            assert list(keys) == [key for key, _ in alone.named_parameters()]
            for key, p in alone.named_parameters():
                torch.testing.assert_close(
                    keys[key], p.detach(), rtol=1e-4, atol=1e-5, msg=f"{name}, {kind}: {key}"
                )
            moved = [not torch.equal(keys[key], p) for key, p in start.named_parameters()]
            assert sum(moved) > 0.9 * len(moved)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_step_as_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, (str(tmp_path / "store"),), nprocs=RANKS)
