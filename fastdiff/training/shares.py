"""Shares: what one rank holds of the float32 weights, of Adam's moments and of the average.

A share of a parameter is a run of its elements in the order of indices. One process has one share
of each, the whole; ZeRO cuts where it likes, also through the middle of a parameter. A checkpoint
is each rank's shares with their first elements' numbers, so any number of ranks, under any ZeRO
stage or none, reads back the shares that it holds itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WEIGHT, EMA = "weight", "ema"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Share:
    """A rank's run of one parameter's elements.

    Args:
        name: The parameter's.
        shape: Of the whole parameter.
        start: Number of the first element.
        weight: (N,) float32, a view of the weights that the optimiser steps; N may be 0.
        flat: The optimiser's own tensor, under which it keeps its state.
        offset: Where the run begins in `flat`.
        channels_last: The parameter's memory format. The run is then whole output channels, each in
            the order of memory; so are moments and average. `indexed` and `read` translate.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    weight: Tensor
    flat: Tensor
    offset: int
    channels_last: bool = False

    def indexed(self, values: Tensor) -> Tensor:
        """A view of this share's (N,) in the order of indices; in channels_last (n, C, kh, kw)."""
        if not self.channels_last:
            return values
        _, C, height, width = self.shape
        channels = len(values) // (C * height * width)
        return values.view(channels, height, width, C).permute(0, 3, 1, 2)

    def read(self, saved: SavedState, kind: str, out: Tensor) -> None:
        """Copy this share of a checkpoint's tensor into `out` (N,)."""
        if not self.channels_last:
            saved.read(kind, self.name, self.start, out)
            return
        values = torch.empty(len(out))
        saved.read(kind, self.name, self.start, values)
        with torch.no_grad():
            to = self.indexed(out)
            to.copy_(values.view(to.shape))

    def moment(self, optimizer: torch.optim.Optimizer, key: str) -> Tensor | None:
        """(N,) view of a moment; None before the first update."""
        state = optimizer.state.get(self.flat)
        if not state:
            return None
        moment = _in_memory(state[key], self.channels_last)
        return moment.narrow(0, self.offset, len(self.weight))


def whole(name: str, parameter: Tensor) -> Share:
    """The share of a process that holds all of a parameter."""
    last = _is_channels_last(parameter)
    values = _in_memory(parameter.detach(), last)
    return Share(name, tuple(parameter.shape), 0, values, parameter, 0, last)


def _is_channels_last(tensor: Tensor) -> bool:
    if tensor.dim() != 4 or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=torch.channels_last)


def _in_memory(tensor: Tensor, channels_last: bool) -> Tensor:
    """A view of all elements, (N,), in the order of memory."""
    return (tensor.permute(0, 2, 3, 1) if channels_last else tensor).view(-1)


def part(share: Share, rank: int, world: int) -> Share:
    """The rank's part of a whole share, of equal length for all ranks but the last ones."""
    count = len(share.weight)
    # In channels_last whole output channels: those are runs in memory and by index alike.
    unit = math.prod(share.shape[1:]) if share.channels_last else 1
    length = -(-count // (world * unit)) * unit
    start, stop = min(rank * length, count), min((rank + 1) * length, count)
    return replace(share, start=start, weight=share.weight[start:stop], offset=start)


def tensors_of(
    shares: Iterable[Share], optimizer: torch.optim.Optimizer, averages: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What a rank writes: "weight/NAME", "exp_avg/NAME", "exp_avg_sq/NAME", "ema/NAME".

    They are views, in the order of indices once they are flat.

    Args:
        shares: The rank's; empty ones are left out.
        optimizer: Adam.
        averages: By name, each as long as its share.
    """
    tensors = {}
    for share in shares:
        if not len(share.weight):
            continue
        tensors[f"{WEIGHT}/{share.name}"] = share.indexed(share.weight)
        if share.name in averages:
            tensors[f"{EMA}/{share.name}"] = share.indexed(averages[share.name])
        for key in MOMENTS:
            moment = share.moment(optimizer, key)
            if moment is not None:
                tensors[f"{key}/{share.name}"] = share.indexed(moment)
    return tensors


def updates_of(shares: Iterable[Share], optimizer: torch.optim.Optimizer) -> int:
    """Adam's number of updates; steps that were skipped do not count."""
    states = (optimizer.state.get(share.flat) for share in shares)
    return max((int(state["step"]) for state in states if state), default=0)


def restore(shares: Iterable[Share], optimizer: torch.optim.Optimizer, saved: SavedState) -> None:
    """Read weights and moments of a checkpoint into shares."""
    fused = bool(optimizer.param_groups[0].get("fused"))
    for share in shares:
        share.read(saved, WEIGHT, share.weight)
        if (MOMENTS[0], share.name) not in saved or not len(share.weight):
            continue
        if not optimizer.state[share.flat]:
            # As AdamW makes it at its first step; it keeps the counter on the CPU unless fused.
            device = share.flat.device if fused else "cpu"
            optimizer.state[share.flat] = {
                "step": torch.tensor(float(saved.updates), device=device),
                **{key: torch.zeros_like(share.flat) for key in MOMENTS},
            }
        for key in MOMENTS:
            moment = share.moment(optimizer, key)
            assert moment is not None, "it was made above"
            share.read(saved, key, moment)


def write_state(
    file: Path, tensors: Mapping[str, Tensor], starts: Mapping[str, int], updates: int
) -> None:
    """Write a rank's shares as safetensors; nothing in such a file can run code.

    Args:
        file: Of the rank.
        tensors: "KIND/NAME" to (N,) float32 on the CPU.
        starts: Number of the first element of each NAME's share.
        updates: Adam's number of updates.
    """
    from safetensors.torch import save_file

    save_file(dict(tensors), file, metadata={"starts": json.dumps(starts), "updates": str(updates)})


class SavedState:
    """The shares of all ranks in a checkpoint, read by name and range.

    Args:
        files: One of each rank.
        shapes: Of the whole parameters, by name.

    Raises:
        OSError, ValueError: A file is missing or damaged.
    """

    def __init__(self, files: Sequence[Path], shapes: Mapping[str, Sequence[int]]) -> None:
        from safetensors import SafetensorError, safe_open

        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.updates = 0
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        for file in files:
            try:
                handle = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{file}: {error}") from error
            metadata = handle.metadata()
            self.updates = max(self.updates, int(metadata["updates"]))
            starts = json.loads(metadata["starts"])
            for key in handle.keys():  # noqa: SIM118 - no mapping
                kind, name = key.split("/", 1)
                (length,) = handle.get_slice(key).get_shape()
                piece = starts[name], starts[name] + length, handle, key
                self._pieces.setdefault((kind, name), []).append(piece)

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._pieces

    def names(self, kind: str) -> list[str]:
        """Parameters of which there is such a tensor."""
        return [name for k, name in self._pieces if k == kind]

    @torch.no_grad()
    def read(self, kind: str, name: str, start: int, out: Tensor) -> None:
        """Copy elements start, start + 1, ... of a parameter into `out` (N,).

        Raises:
            ValueError: Some of them are in no file.
        """
        stop, copied = start + len(out), 0
        for first, last, handle, key in self._pieces.get((kind, name), []):
            low, high = max(start, first), min(stop, last)
            if low < high:
                values = handle.get_slice(key)[low - first : high - first]
                out[low - start : high - start].copy_(values)
                copied += high - low
        if copied != len(out):
            raise ValueError(
                f"the checkpoint holds {copied} of elements {start}..{stop} of {kind}/{name}"
            )

    def full(self, kind: str, name: str) -> Tensor:
        """A whole parameter, float32 on the CPU, of its shape."""
        out = torch.empty(self.shapes[name])
        self.read(kind, name, 0, out.view(-1))
        return out

    @torch.no_grad()
    def copy_to(self, module: torch.nn.Module, kind: str) -> None:
        """Write a kind's tensors into a module's trained parameters.

        Raises:
            ValueError: The module's parameters have other names or shapes; all are listed, and
                nothing is written.
        """
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        here = {name: tuple(p.shape) for name, p in trained.items()}
        if here != self.shapes:
            differing = sorted(n for n in here | self.shapes if here.get(n) != self.shapes.get(n))
            raise ValueError(
                f"the checkpoint is of another model; {len(differing)} parameters differ: "
                + ", ".join(
                    f"{n} ({self.shapes.get(n, 'absent')} there, {here.get(n, 'absent')} here)"
                    for n in differing
                )
            )
        for name, parameter in trained.items():
            parameter.copy_(self.full(kind, name))
