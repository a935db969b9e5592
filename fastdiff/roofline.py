"""Bytes and FLOPs of the fused ops and of whole models, and the time no kernel can beat.

    python -m fastdiff.roofline ascend_t2i_128 --batch 16 --chip a100-40g

A count assumes that each operator reads every input from memory once and writes every output once.
FLOPs are those of matrix products, attention and convolutions, two for a multiply and add;
elementwise arithmetic hides behind its bytes. The model runs on the meta device: no data, no GPU.

Letters: B batch, C channels, H W pixels, L S tokens, N heads, d head width, T = B H W,
e = bytes of one activation tensor.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.models import PRESETS, Backbone, create_model
from fastdiff_kernels import _register

# Bytes an optimiser step moves for each parameter: gradient and bfloat16 weight beside AdamW's
# float32 state (or all of it in float32: the sum is the same); reading and writing the average.
ADAMW_BYTES, EMA_BYTES = 28, 12


@dataclass(frozen=True)
class Chip:
    """What limits a kernel on a GPU.

    Attributes:
        name: as people say it.
        bandwidth: bytes per second that a copy reaches, read and written together.
        half: FLOP/s of dense bfloat16 or float16 matrix products.
        single: FLOP/s in float32 without TF32.
    """

    name: str
    bandwidth: float
    half: float
    single: float

    def rate(self, dtype: torch.dtype) -> float:
        """FLOP/s of matrix products in a dtype."""
        return self.half if dtype in (torch.bfloat16, torch.float16) else self.single


# H200: copy and matrix product as measured; A100: the vendor's figures.
CHIPS = {
    "h200": Chip("H200", 4.3e12, 790e12, 67e12),
    "a100-40g": Chip("A100 40 GB", 1.55e12, 312e12, 19.5e12),
    "a100-80g": Chip("A100 80 GB", 2.0e12, 312e12, 19.5e12),
}


class Cost(NamedTuple):
    """FLOPs and bytes."""

    flops: float
    bytes: float


class OpCost(NamedTuple):
    """Cost of an op's forward, and of a backward that gives every gradient."""

    forward: Cost
    backward: Cost


def time_floor(
    moved: float, flops: float, chip: Chip, dtype: torch.dtype = torch.bfloat16
) -> float:
    """Seconds that a kernel takes at least: the longer of its bytes and its arithmetic.

    Args:
        moved: bytes.
        flops: FLOPs of matrix products.
        chip: the GPU; `dataclasses.replace(chip, bandwidth=...)` for a bandwidth just measured.
        dtype: of the matrix products.
    """
    return max(moved / chip.bandwidth, flops / chip.rate(dtype))


def window_attention(
    shape: Sequence[int],
    *,
    heads: int,
    window: tuple[int, int],
    element: int = 2,
    table: int = 4,
) -> OpCost:
    """4 e forward, 7 e backward (scores recomputed), and the bias table.

    Args:
        shape: (B, H, W, C) of the output.
        heads: N.
        window: rows and columns.
        element: bytes of an activation's element.
        table: bytes of the table's element; 0 without a table.
    """
    B, H, W, C = shape
    h, w = window
    e = B * H * W * C * element
    bias = (2 * h - 1) * (2 * w - 1) * heads * table
    # Whole windows are computed, also where the map ends inside one.
    tokens, pairs = B * -(-H // h) * h * -(-W // w) * w, h * w
    return OpCost(
        Cost(4 * tokens * pairs * C, 4 * e + bias),
        Cost(10 * tokens * pairs * C, 7 * e + 2 * bias),
    )


def dwconv_gelu(
    shape: Sequence[int], *, prefix: int = 0, element: int = 2, parameter: int = 4
) -> OpCost:
    """2 e forward, 3 e backward (convolution recomputed), weight and bias.

    Args:
        shape: (B, prefix + H*W, C).
        prefix: tokens that the convolution leaves out.
        element: bytes of an activation's element.
        parameter: bytes of a parameter's element.
    """
    B, L, C = shape
    e, weights, pixels = B * L * C * element, 10 * C * parameter, B * (L - prefix) * C
    return OpCost(Cost(2 * 9 * pixels, 2 * e + weights), Cost(4 * 9 * pixels, 3 * e + 2 * weights))


def group_norm_silu(
    shape: Sequence[int],
    *,
    groups: int = 32,
    film: int = 0,
    element: int = 2,
    parameter: int = 4,
    reads: int = 2,
) -> OpCost:
    """3 e forward and 5 e backward with two reads of the input, 2 e and 3 e with one.

    Args:
        shape: (B, C, H, W) of the output, so of x and skip together.
        groups: their number, for the statistics that the backward reads.
        film: how many of scale and shift there are.
        element: bytes of an activation's element.
        parameter: bytes of a parameter's element.
        reads: how often x (and dy) come from memory.
    """
    B, C = shape[:2]
    e = math.prod(shape) * element
    affine, vectors, statistics = 2 * C * parameter, film * B * C * element, 2 * B * groups * 4
    return OpCost(
        Cost(0, (reads + 1) * e + affine + vectors + statistics),
        Cost(0, (2 * reads + 1) * e + 2 * (affine + vectors) + statistics),
    )


def layer_norm_modulate(
    shape: Sequence[int],
    *,
    affine: int = 2,
    modulation: int = 0,
    residual: bool = False,
    gate: bool = False,
    element: int = 2,
    parameter: int = 4,
) -> OpCost:
    """2 e forward and 3 e backward; with a residual 4 e and 4 e, 6 e with a gate.

    Args:
        shape: (B, ..., C).
        affine: how many of weight and bias there are.
        modulation: how many of scale and shift there are.
        residual: whether x is added to a residual, which is returned too.
        gate: whether x is multiplied by a vector first.
        element: bytes of an activation's element.
        parameter: bytes of a parameter's element.
    """
    B, C = shape[0], shape[-1]
    e = math.prod(shape) * element
    vectors = affine * C * parameter + (modulation + gate) * B * C * element
    backward = (6 if gate else 4) if residual else 3
    return OpCost(
        Cost(0, (4 if residual else 2) * e + vectors), Cost(0, backward * e + 2 * vectors)
    )


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> OpCost:
    """Flash attention: scores stay on the chip and are recomputed backward.

    q (B, N, L, d), k and v (B, N, S, d), mask broadcast over (B, N, L, S) or None.
    """
    B, N, L, d = q.shape
    S = k.shape[2]
    out, sums = B * N * L * v.shape[3] * q.element_size(), B * N * L * 4
    inputs = sum(_size(t) for t in (q, k, v))
    masked = 0 if mask is None else _size(mask)
    products = B * N * L * S * (d + v.shape[3])
    return OpCost(
        Cost(2 * products, inputs + out + sums + masked),
        Cost(5 * products, 2 * (inputs + out) + sums + masked),
    )


def op_cost(op: str, form: Sequence[Any]) -> OpCost:
    """Cost of one call of a fused op.

    Args:
        op: its name; not `dwconv_ffn`, whose Linears are no part of the fused kernel.
        form: the call in normal form (`fastdiff_kernels._register.Op`); meta tensors will do.

    Raises:
        ValueError: no formula for this op.
    """
    x: Tensor = form[0]
    element = x.element_size()

    def width(*parameters: Tensor | None) -> int:
        return max((p.element_size() for p in parameters if p is not None), default=0)

    if op == "window_attention":
        _, table, heads, window = form[:4]
        shape = (*x.shape[:3], x.shape[3] // 3)
        return window_attention(
            shape, heads=heads, window=window, element=element, table=width(table)
        )
    if op == "dwconv_gelu":
        return dwconv_gelu(x.shape, prefix=form[4], element=element, parameter=width(form[1]))
    if op == "group_norm_silu":
        _, weight, bias, groups, _, scale, shift, skip, _ = form
        B, C, H, W = x.shape
        shape = (B, C + (0 if skip is None else skip.shape[1]), H, W)
        film = (scale is not None) + (shift is not None)
        parameter = width(weight, bias)
        return group_norm_silu(
            shape, groups=groups, film=film, element=element, parameter=parameter
        )
    if op == "layer_norm_modulate":
        _, weight, bias, scale, shift, residual, gate, _ = form
        return layer_norm_modulate(
            x.shape,
            affine=(weight is not None) + (bias is not None),
            modulation=(scale is not None) + (shift is not None),
            residual=residual is not None,
            gate=gate is not None,
            element=element,
            parameter=width(weight, bias),
        )
    raise ValueError(f"op_cost: no formula for {op!r}")


@dataclass(frozen=True)
class Call:
    """One operator of a counted model."""

    kind: str
    backward: bool
    flops: float
    bytes: float


@dataclass
class Count:
    """What one pass of a model moves and computes.

    Attributes:
        title: the model, the batch, what was counted.
        batch: images.
        dtype: of activations and weights.
        calls: every operator that touches memory.
    """

    title: str
    batch: int
    dtype: torch.dtype
    calls: list[Call] = field(default_factory=list)

    @property
    def flops(self) -> float:
        return sum(call.flops for call in self.calls)

    @property
    def bytes(self) -> float:
        return sum(call.bytes for call in self.calls)

    def seconds(self, chip: Chip, calls: Iterable[Call] | None = None) -> float:
        """Sum over the operators of the time each takes at least."""
        some = self.calls if calls is None else calls
        return sum(time_floor(c.bytes, c.flops, chip, self.dtype) for c in some)

    def table(self, chip: Chip) -> str:
        """By kind of operator, forward and backward: calls, GFLOP, GB, ms and share of the time."""
        kinds: dict[tuple[bool, str], list[Call]] = defaultdict(list)
        for call in self.calls:
            kinds[call.backward, call.kind].append(call)
        total = self.seconds(chip)
        lines = [
            f"{self.title}, {chip.name}: {chip.bandwidth / 1e12:.2f} TB/s, "
            f"{chip.rate(self.dtype) / 1e12:.0f} TFLOP/s",
            f"{'':34}{'calls':>7}{'GFLOP':>11}{'GB':>9}{'ms':>9}{'share':>8}",
        ]

        def row(name: str, calls: Sequence[Call]) -> str:
            seconds = self.seconds(chip, calls)
            flops, moved = sum(c.flops for c in calls), sum(c.bytes for c in calls)
            return (
                f"{name:34}{len(calls):7}{flops / 1e9:11.1f}{moved / 1e9:9.2f}"
                f"{seconds * 1e3:9.3f}{seconds / total:8.1%}"
            )

        for backward in (False, True):
            mine = [(kind, calls) for (back, kind), calls in kinds.items() if back == backward]
            mine.sort(key=lambda item: -self.seconds(chip, item[1]))
            lines += [
                row(f"{kind}, {'backward' if backward else 'forward'}", c) for kind, c in mine
            ]
        used = self.flops / total / chip.rate(self.dtype)
        lines += [
            row("total", self.calls),
            f"at most {self.batch / total:,.0f} images/s; {self.flops / total / 1e12:.0f} TFLOP/s "
            f"= {used:.0%} of the matrix units",
        ]
        return "\n".join(lines)


def count(
    model: str | Backbone,
    batch: int,
    *,
    training: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    text: int = 256,
    fused: bool = True,
) -> Count:
    """Count one call of a model, or forward and backward and an AdamW step with EMA.

    Args:
        model: a preset's name, or a model on the meta device.
        batch: images.
        training: backward and optimiser as well.
        dtype: of activations and weights.
        text: length of the text, for a model that takes one.
        fused: each fused op as one operator, by its formula; else as its definition in plain
            PyTorch, operator by operator, which is what an eager framework moves.

    Raises:
        ValueError: unknown model, or one whose weights are not on the meta device.
    """
    with torch.device("meta"):
        if isinstance(model, str):
            title, net = model, create_model(model)
        else:
            title, net = type(model).__name__, model
        if any(p.device.type != "meta" for p in net.parameters()):
            raise ValueError(f"count: {title} is not on the meta device; build it under it")
        net = net.to(dtype).train(training)
        config = net.config
        sides = config.image_size
        x = torch.empty(batch, config.in_channels, *sides, dtype=dtype)
        context = None
        if config.context_dim is not None:
            context = torch.empty(batch, text, config.context_dim, dtype=dtype)
        what = "forward, backward and optimiser" if training else "forward"
        found = Count(f"{title}, batch {batch}, {str(dtype)[6:]}, {what}", batch, dtype)
        counter = _Counter(found.calls)
        ops = _register.stand_in(counter.op) if fused else _register.backend("reference")
        with torch.set_grad_enabled(training), counter, _Attention(counter), ops:
            out = net(x, torch.empty(batch), context)
            counter.backward = True
            if training:
                out.backward(torch.empty_like(out))
        if training:
            parameters = sum(p.numel() for p in net.parameters())
            moved = (ADAMW_BYTES + EMA_BYTES) * parameters
            found.calls.append(Call("optimizer and EMA", True, 0, moved))
    return found


_aten = torch.ops.aten

# Only a new tensor's shape and address, or a view that the schema does not call one.
_FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "_reshape_alias",
    "lift_fresh",
    "detach",
}
# What these write, they do not read first.
_OVERWRITE = {"copy_", "fill_", "zero_", "normal_", "uniform_"}
_KINDS = {
    "matrix product": {"mm", "addmm", "addmm_", "bmm", "baddbmm"},
    "convolution": {"convolution", "convolution_backward"},
    "copy": {"clone", "_to_copy", "copy_", "cat", "constant_pad_nd", "roll"},
    "resampling": {
        "avg_pool2d",
        "avg_pool2d_backward",
        "upsample_nearest2d",
        "upsample_nearest2d_backward",
    },
    "reduction": {"sum", "mean", "var_mean", "linalg_vector_norm"},
    "normalisation": {
        "native_group_norm",
        "native_group_norm_backward",
        "native_layer_norm",
        "native_layer_norm_backward",
        "_softmax",
        "_softmax_backward_data",
    },
}
_KIND = {name: kind for kind, names in _KINDS.items() for name in names}


def _size(tensor: Tensor) -> int:
    """Bytes of memory behind a tensor: an expanded one is no larger than what it was made of."""
    if not tensor.numel():
        return 0
    distinct = math.prod(
        n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride
    )
    return distinct * tensor.element_size()


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, (tuple, list)):
        return [tensor for value in values for tensor in _tensors(value)]
    return []


def _flops(name: str, args: Sequence[Any], out: Any) -> float:
    if name in ("mm", "bmm"):
        return 2 * out.numel() * args[0].shape[-1]
    if name in ("addmm", "addmm_", "baddbmm"):
        return 2 * out.numel() * args[1].shape[-1]
    if name == "convolution":
        return 2 * out.numel() * math.prod(args[1].shape[1:])
    if name == "convolution_backward":
        # The gradients of input and weight take the forward's products each.
        needed = sum(args[-1][:2])
        return needed * 2 * args[0].numel() * math.prod(args[2].shape[1:])
    return 0


class _Counter(TorchDispatchMode):
    """Adds every operator that PyTorch dispatches to a list of calls."""

    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self.calls, self.backward = calls, False

    def add(self, kind: str, cost: Cost, *, backward: bool) -> None:
        self.calls.append(Call(kind, backward, cost.flops, cost.bytes))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        aliases = [r.alias_info for r in func._schema.returns]
        view = any(a is not None and not a.is_write for a in aliases)
        if not view and name not in _FREE:
            read = _tensors([*args, *(kwargs or {}).values()])[name in _OVERWRITE :]
            written = _tensors(out)
            cost = Cost(_flops(name, args, out), sum(map(_size, [*read, *written])))
            self.add(_KIND.get(name, "pointwise"), cost, backward=self.backward)
        return out

    def op(self, op: str, form: tuple[Any, ...]) -> Any:
        """Stand in for a fused op: results of its shapes, and its formula's cost."""
        x: Tensor = form[0]
        if op == "dwconv_ffn":
            _, w1, b1, w_conv, b_conv, w2, b2, grid, prefix = form
            z = F.linear(x, w1, b1)
            return F.linear(self.op("dwconv_gelu", (z, w_conv, b_conv, grid, prefix)), w2, b2)
        cost = op_cost(op, form)
        tensors = [t if isinstance(t, Tensor) else None for t in form]
        if op == "window_attention":
            y: Tensor = x.new_empty(*x.shape[:3], x.shape[3] // 3)
        elif op == "group_norm_silu" and form[7] is not None:
            B, C, H, W = x.shape
            y = x.new_empty(B, C + form[7].shape[1], H, W)
            if not x.is_contiguous():
                y = torch.empty_like(y, memory_format=torch.channels_last)
        else:
            y = torch.empty_like(x)
        results = [y]
        if op == "layer_norm_modulate" and form[5] is not None:
            results.append(torch.empty_like(x))
        made = _Counted.apply(self, op, cost, results, *tensors)
        if op != "layer_norm_modulate":
            return made[0]
        return made if len(made) == 2 else (made[0], x)


class _Counted(torch.autograd.Function):
    """One operator of a known cost: gives the results it is handed, and empty gradients."""

    @staticmethod
    def forward(
        ctx: Any, counter: _Counter, kind: str, cost: OpCost, results: list[Tensor], *tensors: Any
    ) -> tuple[Tensor, ...]:
        counter.add(kind, cost.forward, backward=False)
        ctx.counter, ctx.kind, ctx.cost = counter, kind, cost.backward
        ctx.models = [None if t is None else t.detach() for t in tensors]
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        ctx.counter.add(ctx.kind, ctx.cost, backward=True)
        needed = ctx.needs_input_grad[4:]
        grads = (
            torch.empty_like(t) if t is not None and need else None
            for t, need in zip(ctx.models, needed, strict=True)
        )
        return (None, None, None, None, *grads)


class _Attention(TorchFunctionMode):
    """Counts `scaled_dot_product_attention` as one operator: on meta it would be taken apart."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = args[:3]
        cost = scaled_dot_product_attention(q, k, v, kwargs.get("attn_mask"))
        # The layout that flash attention gives: the heads of a token side by side.
        B, N, L, _ = q.shape
        out = q.new_empty(B, L, N, v.shape[3]).transpose(1, 2)
        return _Counted.apply(self.counter, "attention", cost, [out], q, k, v)[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=sorted(PRESETS), metavar="model", help="a preset's name")
    parser.add_argument("--batch", type=int, default=16, help="images of one GPU (16)")
    parser.add_argument("--chip", choices=CHIPS, default="h200")
    parser.add_argument("--forward", action="store_true", help="without backward and optimiser")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--text", type=int, default=256, help="tokens of text (256)")
    parser.add_argument("--eager", action="store_true", help="the definitions, not the kernels")
    parser.add_argument("--bandwidth", type=float, help="TB/s of a copy, measured; for --chip's")
    parser.add_argument("--rate", type=float, help="TFLOP/s of a product, measured; for --chip's")
    args = parser.parse_args(arguments)
    chip = CHIPS[args.chip]
    if args.bandwidth:
        chip = replace(chip, bandwidth=args.bandwidth * 1e12)
    if args.rate:
        chip = replace(chip, half=args.rate * 1e12, single=args.rate * 1e12)
    found = count(
        args.model,
        args.batch,
        training=not args.forward,
        dtype=getattr(torch, args.dtype),
        text=args.text,
        fused=not args.eager,
    )
    print(found.table(chip))


if __name__ == "__main__":
    main()
