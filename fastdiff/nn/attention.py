"""Global self-attention, cross-attention to text, and ADM's attention over pixels.

Letters: B batch, L tokens, S keys (text positions, or the tokens themselves), D width, N heads,
d head width, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fastdiff.nn.norms import GroupNormSiLU

IMPLEMENTATIONS = ("sdpa", "flash", "xformers")


@dataclass(frozen=True, eq=False)
class ProjectedText:
    """A text as the layers of one model read it, for many calls with the same text.

    `Backbone.project_text` makes it; the model takes it in place of the context.

    Args:
        kv: Of each layer's Linear over the text, its keys and values, (B, S, 2 D); of the first
            `rows` rows alone where no more are read.
        mask: (B, S) bool, True = valid, with no row all False.
        pooled: (B, width).
        rows: B, or fewer where the rows behind have no text: attending to the null condition's one
            key gives its value, whatever the query.
        null: What `MHCA` then gives for them, (1, 1, D), by the same Linear; empty where rows = B.
    """

    kv: dict[nn.Module, Tensor]
    mask: Tensor
    pooled: Tensor
    rows: int
    null: dict[nn.Module, Tensor]

    def tensors(self) -> list[Tensor]:
        """All of it, in a fixed order."""
        return [*self.kv.values(), *self.null.values(), self.mask, self.pooled]


# Context (B, S, width) or what was made of it, and mask (B, S) bool with no row all False.
Text = tuple[Tensor | ProjectedText, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    keys = None if mask is None else mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keys).transpose(1, 2)


def _flash() -> Attend:
    from flash_attn import flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        _check_cuda("flash", q)
        if mask is not None:
            raise ValueError(
                "attention: 'flash' takes no mask over keys, and cross-attention to text has one; "
                "choose another for it: set_attention('flash', cross='sdpa')"
            )
        if q.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"attention: 'flash' takes float16 and bfloat16, and q is {q.dtype}; cast the "
                "model, use autocast, or choose 'sdpa'"
            )
        if q.shape[3] > 256:
            raise ValueError(
                f"attention: 'flash' takes heads of width up to 256, not {q.shape[3]}; "
                "choose 'sdpa'"
            )
        repeatable = torch.are_deterministic_algorithms_enabled()
        return flash_attn_func(q, k, v, deterministic=repeatable)

    return attend


def _xformers() -> Attend:
    from xformers.ops import memory_efficient_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        _check_cuda("xformers", q)
        bias = None
        if mask is not None:
            # its rows must lie a multiple of 16 bytes apart, so a wider one is cut to S keys
            B, S = mask.shape
            bias = q.new_zeros(B, 1, 1, -(-S // 8) * 8)[..., :S]
            bias.masked_fill_(~mask[:, None, None, :], -torch.inf)
            bias = bias.expand(B, q.shape[2], q.shape[1], S)
        return memory_efficient_attention(q, k, v, attn_bias=bias)

    return attend


def _check_cuda(name: str, q: Tensor) -> None:
    if q.device.type != "cuda":
        raise ValueError(
            f"attention: {name!r} runs on cuda tensors, and q is on {q.device.type}; choose 'sdpa'"
        )


_packages = {"flash": (_flash, "flash-attn"), "xformers": (_xformers, "xformers")}
_loaded: dict[str, Attend] = {"sdpa": _sdpa}
# Plain globals, because torch.compile guards those: a compiled model recompiles for a new choice.
_choice = _cross_choice = "sdpa"


def load_implementation(name: str) -> str:
    """Import what an implementation needs, once; returns the name.

    Raises:
        ValueError: the name is none of `IMPLEMENTATIONS`.
        ImportError: its package cannot be imported.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"attention: implementation={name!r}, expected one of {IMPLEMENTATIONS}")
    if name not in _loaded:
        make, package = _packages[name]
        try:
            _loaded[name] = make()
        except ImportError as error:
            raise ImportError(
                f"attention: {name!r} needs {package}, which cannot be imported ({error}): "
                f'pip install "fastdiff[{name}]"'
            ) from error
    return name


class set_attention:
    """Choose what computes global and cross-attention: by a call for good, by a `with` for a block.

    The choice is process-wide and holds for all layers that have none of their own
    (`model.set_attention`). Make it outside compiled functions; they recompile for a new one.

    Args:
        implementation: "sdpa" (PyTorch's, the default: it runs everywhere), "flash" (flash-attn),
            "xformers" (its memory-efficient attention). Neither of the last two is ever taken
            unasked, nor left for another where it cannot run a call: that raises.
        cross: likewise for cross-attention, which has a mask; None = the same. flash-attn takes no
            mask over keys, so with text: `set_attention("flash", cross="sdpa")`.

    Raises:
        ValueError: a name is none of the three.
        ImportError: its package cannot be imported.

    Example:
        >>> with set_attention("sdpa"):
        ...     y = model(x, t)
    """

    def __init__(self, implementation: str, *, cross: str | None = None) -> None:
        global _choice, _cross_choice
        chosen = load_implementation(implementation), load_implementation(cross or implementation)
        self._before = _choice, _cross_choice
        _choice, _cross_choice = chosen

    def __enter__(self) -> set_attention:
        return self

    def __exit__(self, *exception: object) -> None:
        global _choice, _cross_choice
        _choice, _cross_choice = self._before


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    implementation: str | None = None,
) -> Tensor:
    """Softmax attention, softmax(q k^T / sqrt(d)) v, with the implementation in force.

    Args:
        q: (B, L, N, d).
        k: (B, S, N, d), dtype and device of q.
        v: (B, S, N, d), likewise.
        mask: (B, S) bool, True = valid, with no row all False; None = all valid.
        implementation: "sdpa" | "flash" | "xformers"; None = the choice of `set_attention`.

    Returns:
        (B, L, N, d), dtype of q.

    Raises:
        ValueError: an unknown name; a call that the implementation cannot run: on another device
            than cuda (flash, xformers), float32, a mask, heads wider than 256 (flash).
        ImportError: the package of the implementation cannot be imported.

    Numerics: flash is deterministic where `torch.use_deterministic_algorithms` asks for it.
    """
    if implementation is None:
        implementation = _choice if mask is None else _cross_choice
    if implementation not in _loaded:
        load_implementation(implementation)
    return _loaded[implementation](q, k, v, mask)


def _heads(name: str, dim: int, head_dim: int) -> int:
    if dim % head_dim:
        raise ValueError(f"{name}: head_dim={head_dim} does not divide dim={dim}")
    return dim // head_dim


class MHSA(nn.Module):
    """Multi-head self-attention over all tokens.

    Attributes (here, in `MHCA` and in `SpatialAttention`):
        implementation: The layer's own choice, None = that of `set_attention`.

    Args:
        dim: D.
        head_dim: d.
        qkv_bias: Bias of the q, k, v projection (off in U-ViT and IU-ViT).

    Raises:
        ValueError: `head_dim` does not divide `dim`.
    """

    def __init__(self, dim: int, *, head_dim: int = 64, qkv_bias: bool = False) -> None:
        super().__init__()
        self.implementation: str | None = None
        self.heads = _heads("MHSA", dim, head_dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        q, k, v = rearrange(self.qkv(x), "b l (three n d) -> three b l n d", three=3, n=self.heads)
        return self.proj(attention(q, k, v, implementation=self.implementation).flatten(2))


class MHCA(nn.Module):
    """Multi-head cross-attention: queries from the image, keys and values from the text.

    Args:
        dim: D.
        context_dim: Width of the text, taken as it is.
        head_dim: d.

    Raises:
        ValueError: `head_dim` does not divide `dim`.

    Source: section 3.2 (self- and cross-attention separate), Figure 8.
    """

    def __init__(self, dim: int, context_dim: int, *, head_dim: int = 64) -> None:
        super().__init__()
        self.implementation: str | None = None
        self.heads = _heads("MHCA", dim, head_dim)
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(context_dim, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | ProjectedText, mask: Tensor) -> Tensor:
        """x (B, L, D), context (B, S, width), mask (B, S) bool with no row all False: (B, L, D)."""
        if not isinstance(context, ProjectedText):
            return self.attend(x, self.kv(context), mask)
        rows, rest = context.rows, x.shape[0] - context.rows
        if not rest:
            return self.attend(x, context.kv[self.kv], mask)
        out = context.null[self.kv].expand(rest, x.shape[1], -1)
        if rows:
            attended = self.attend(x[:rows], context.kv[self.kv], mask[:rows])
            out = torch.cat([attended, out.to(attended.dtype)])
        return out

    def attend(self, x: Tensor, kv: Tensor, mask: Tensor) -> Tensor:
        """x (B, L, D), kv (B, S, 2 D), mask (B, S): (B, L, D)."""
        q = rearrange(self.q(x), "b l (n d) -> b l n d", n=self.heads)
        k, v = rearrange(kv, "b s (two n d) -> two b s n d", two=2, n=self.heads)
        return self.proj(attention(q, k, v, mask, implementation=self.implementation).flatten(2))

    def attend_nothing(self, kv: Tensor) -> Tensor:
        """`attend` of any query where one key alone is valid: its kv (1, 1, 2 D) to (1, 1, D)."""
        out: Tensor = self.proj(kv.chunk(2, dim=2)[1])
        return out


class FusedAttention(MHSA):
    """Self-attention whose keys and values are those of the image and of the text, side by side.

    softmax(q [k, k_text]^T / sqrt(d)) [v, v_text]

    Args:
        dim: D.
        context_dim: Width of the text, taken as it is.
        head_dim: d.

    Raises:
        ValueError: `head_dim` does not divide `dim`.

    Source: GLIDE; what the paper compares its separate attentions with (section 3.2, Figure 10).
    """

    def __init__(self, dim: int, context_dim: int, *, head_dim: int = 64) -> None:
        super().__init__(dim, head_dim=head_dim)
        self.text_kv = nn.Linear(context_dim, 2 * dim, bias=False)

    def forward(  # type: ignore[override]
        self, x: Tensor, context: Tensor | ProjectedText, mask: Tensor
    ) -> Tensor:
        """x (B, L, D), context (B, S, width), mask (B, S) bool: (B, L, D)."""
        q, k, v = rearrange(self.qkv(x), "b l (three n d) -> three b l n d", three=3, n=self.heads)
        kv = _keys_and_values(self.text_kv, context)
        out = attend_image_and_text(q, k, v, kv, mask, implementation=self.implementation)
        return self.proj(out)


def _keys_and_values(text_kv: nn.Module, context: Tensor | ProjectedText) -> Tensor:
    made: Tensor = context.kv[text_kv] if isinstance(context, ProjectedText) else text_kv(context)
    return made


def attend_image_and_text(
    q: Tensor, k: Tensor, v: Tensor, text_kv: Tensor, mask: Tensor, *, implementation: str | None
) -> Tensor:
    """Attention over pixels and text at once.

    q, k, v (B, L, N, d), text_kv (B, S, 2 N d), mask (B, S) bool: (B, L, N d).
    """
    text_k, text_v = rearrange(text_kv, "b s (two n d) -> two b s n d", two=2, n=q.shape[2])
    k, v = torch.cat([text_k, k], dim=1), torch.cat([text_v, v], dim=1)
    image = mask.new_ones(1, 1).expand(q.shape[0], q.shape[1])
    keys = torch.cat([mask, image], dim=1)
    return attention(q, k, v, keys, implementation=implementation).flatten(2)


class SpatialAttention(nn.Module):
    """ADM's attention block: GroupNorm, self-attention over all pixels, zero-initialised output.

    Args:
        channels: C.
        head_dim: d.
        groups: Groups of the norm.

    Raises:
        ValueError: `head_dim` does not divide `channels`.

    Source: ADM's `AttentionBlock` with `num_head_channels=64`.
    """

    def __init__(self, channels: int, *, head_dim: int = 64, groups: int = 32) -> None:
        super().__init__()
        self.implementation: str | None = None
        self.norm = GroupNormSiLU(channels, groups=groups, activation="identity")
        self.heads = _heads("SpatialAttention", channels, head_dim)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor, text: Text | None = None) -> Tensor:
        """x (B, C, H, W) to the same, channels_last in and out; `text` is not looked at."""
        _, _, height, width = x.shape
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        q, k, v = rearrange(
            self.qkv(tokens), "b l (three n d) -> three b l n d", three=3, n=self.heads
        )
        out = self.proj(self.attend(q, k, v, text))
        return x + rearrange(out, "b (h w) c -> b c h w", h=height, w=width)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, text: Text | None) -> Tensor:
        """q, k, v (B, L, N, d) to (B, L, C)."""
        return attention(q, k, v, implementation=self.implementation).flatten(2)


class FusedSpatialAttention(SpatialAttention):
    """ADM's attention block with the text's keys and values beside those of the pixels.

    Args:
        channels: C.
        context_dim: Width of the text.
        head_dim: d.
        groups: Groups of the norm.

    Raises:
        ValueError: `head_dim` does not divide `channels`.

    Source: GLIDE, and the authors' own text-to-image U-Net.
    """

    def __init__(
        self, channels: int, context_dim: int, *, head_dim: int = 64, groups: int = 32
    ) -> None:
        super().__init__(channels, head_dim=head_dim, groups=groups)
        self.text_kv = nn.Linear(context_dim, 2 * channels)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, text: Text | None) -> Tensor:
        """q, k, v (B, L, N, d), text = context (B, S, width) and mask (B, S), to (B, L, C)."""
        if text is None:
            raise ValueError("FusedSpatialAttention: text is needed, got None")
        context, mask = text
        kv = _keys_and_values(self.text_kv, context)
        return attend_image_and_text(q, k, v, kv, mask, implementation=self.implementation)
