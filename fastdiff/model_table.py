"""What every model costs: parameters, FLOPs, activation memory, beside the paper's own numbers.

`fastdiff info 'iuvit*'` prints it, `fastdiff info --markdown` is the README's table. Everything is
worked out on the meta device; no weights are made, nothing is run.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff import roofline
from fastdiff.models import PRESETS, Backbone, create_model
from fastdiff.nn import attention
from fastdiff_kernels import _register

_BATCH = 64  # what a step allocates once, whatever its batch, then counts for little


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        name: the preset's.
        source: where in the paper it stands.
        published: the paper's parameter count, "-" where it gives none.
        parameters: ours.
        flops: of a forward for one image, two for a multiply and add.
        activations: bytes for each image of a training step in bfloat16, at the peak.
        checkpointed: likewise with gradient checkpointing.
    """

    name: str
    source: str
    published: str
    parameters: int
    flops: float
    activations: float
    checkpointed: float


def parameter_count(name: str) -> int:
    """Parameters of a preset."""
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(name).parameters())


def measure(name: str) -> Row:
    """Work out a preset's row, in about a second.

    Raises:
        ValueError: unknown name.
    """
    count = parameter_count(name)
    preset = PRESETS[name]
    return Row(
        name,
        preset.source,
        preset.published,
        count,
        roofline.count(name, 1, training=False).flops,
        activation_bytes(name) / _BATCH,
        activation_bytes(name, checkpointing=True) / _BATCH,
    )


def activation_bytes(
    model: str | Backbone,
    batch: int = _BATCH,
    *,
    checkpointing: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    text: int = 256,
) -> int:
    """Largest sum of what is alive at once in a forward and backward, weights left aside.

    Each fused op saves what its kernels save, and attention what flash attention does. A gradient
    of a parameter is let go as soon as it is whole.

    Args:
        model: a preset's name, or a model on the meta device, which is left in `dtype`.
        batch: images.
        checkpointing: see `Backbone.set_checkpointing`.
        dtype: of activations and weights.
        text: length of the text, for a model that takes one.
    """
    with torch.device("meta"):
        net = (create_model(model) if isinstance(model, str) else model).to(dtype).train()
        net.set_checkpointing(checkpointing)
        x = torch.empty(batch, net.config.in_channels, *net.config.sides, dtype=dtype)
        context = None
        if net.config.context_dim is not None:
            context = torch.empty(batch, text, net.config.context_dim, dtype=dtype)
        hooks = [p.register_post_accumulate_grad_hook(_let_go) for p in net.parameters()]
        with _Alive() as alive, _flash_attention(), _register.stand_in(_as_kernels_save):
            out = net(x, torch.empty(batch), context)
            out.backward(torch.empty_like(out))
        for hook in hooks:
            hook.remove()
        net.set_checkpointing(False)
    return alive.peak


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None


def _as_kernels_save(op: str, form: tuple[Any, ...]) -> Any:
    """A call of the compiled kernels; on the meta device, only what they allocate and save."""
    _register._load(op, "native")
    call = _register._OPS[op]._backends["native"].call
    assert call is not None
    return call(*form)


@contextlib.contextmanager
def _flash_attention() -> Iterator[None]:
    """Let what stands in for flash attention be the default: PyTorch's is taken apart on meta."""
    before = attention._loaded["sdpa"]
    attention._loaded["sdpa"] = _FlashAttention.apply
    try:
        yield
    finally:
        attention._loaded["sdpa"] = before


class _FlashAttention(torch.autograd.Function):
    """Saves what flash attention saves: its inputs, its output, a number for each query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out, sums = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, mask, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        q, k, v = ctx.saved_tensors[:3]
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


class _Alive(TorchDispatchMode):
    """Bytes of all memory that was allocated within and not yet freed, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in roofline._tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return out

    def _freed(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self.now -= size


_HEADER = ("model", "in the paper", "parameters", "published", "GFLOP", "MiB", "checkpointed")


def cells(row: Row) -> tuple[str, ...]:
    """A row as it is printed: parameters in millions, for each image GFLOP and twice MiB."""
    return (
        row.name,
        row.source,
        f"{row.parameters / 1e6:.1f}M",
        row.published,
        f"{row.flops / 1e9:,.0f}",
        _mebibytes(row.activations),
        _mebibytes(row.checkpointed),
    )


def _mebibytes(size: float) -> str:
    return f"{size / 2**20:,.0f}" if size > 100 * 2**20 else f"{size / 2**20:.1f}"


def as_text(rows: Iterable[Row]) -> str:
    """The table for a terminal."""
    lines = [_HEADER, *map(cells, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def as_markdown(rows: Iterable[Row]) -> str:
    """The table for the README."""
    lines: list[Sequence[str]] = [_HEADER, ["---"] * 2 + ["--:"] * (len(_HEADER) - 2)]
    lines += [(f"`{name}`", *rest) for name, *rest in map(cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
