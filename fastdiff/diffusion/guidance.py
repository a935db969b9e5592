"""Guidance of the reverse process by a condition.

Each function turns a model into a guided one, `guided(x, t)`, that every sampler takes; what one
returns another may take, so that guidances add up.

Legend: B batch, C channels, H W pixels, S text positions, D features, K labels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.diffusion.process import Process
from fastdiff.diffusion.stepping import Denoiser, predict

_ALWAYS = (-math.inf, math.inf)


def classifier_free(
    model: Callable[..., Tensor],
    scale: float,
    *,
    context: Tensor | None = None,
    context_mask: Tensor | None = None,
    pooled: Tensor | None = None,
    y: Tensor | None = None,
    null_y: int | None = None,
    interval: tuple[float, float] = _ALWAYS,
    rescale: float = 0.0,
) -> Denoiser:
    """Turn a conditional model into a guided callable (x, t) for the samplers (Eq. 6).

    out = out_u + s (out_c - out_u). Eq. 6 is written for eps; x_0 and v are affine in eps at a
    given x_t, and the weights s and 1 - s sum to one, so it holds for each prediction type.

    Condition and null condition run as one batch of 2B. The null condition is a context_mask row
    that is all False, where the model puts its learned null embedding: the same tensor as the
    condition dropout of training. scale 1 makes the conditional call alone, of B, and scale 0 the
    unconditional one alone. A learned variance (as many channels again, behind the prediction) is
    the conditional one's.

    Args:
        model: model(x, t, context, context_mask=, pooled=, y=) -> Tensor shaped as x.
        scale: s >= 1 (the paper's range). 0 <= s < 1 weakens the condition and warns.
        context: text features, (B, S, width), or None with labels alone.
        context_mask: (B, S) bool, True = valid; None: all positions are valid.
        pooled: (B, width), or None for the model's own masked mean. The model replaces it too
            where the mask row is all False.
        y: (B,) int64 class labels, or None. Without null_y they are given to both halves: only the
            text is guided.
        null_y: the label of the null condition, where labels are guided too; of a backbone its
            `num_classes`. Needed where there is no context.
        interval: (low, high) in the model's t; elsewhere scale 1. Guidance does harm at high noise
            and nothing at low noise (Kynkaanniemi et al. 2024). On a CPU the null half is then not
            computed; on a GPU it is, since to look at t would cost a synchronisation.
        rescale: phi in 0..1: how far the guided output's standard deviation, over each picture, is
            brought back to the conditional one's, against the over-exposure of a strong scale
            (Lin et al. 2024, section 3.4: 0.7). It depends on the prediction type; theirs is v.

    Returns:
        A callable (x (B, C, H, W), t (B,)) -> guided output shaped as x. Where two outputs are
        combined, in float32 at least.

    Raises:
        ValueError: scale is negative or not finite, rescale is outside 0..1, the interval is empty,
            no condition is given, a shape does not fit the context's (B, S), or the callable is
            given another batch than the context's.
        TypeError: context_mask is not bool.

    Source: Ho and Salimans 2022; Eq. 6 of the paper.
    """
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"classifier_free: scale must be finite and at least 0, got {scale}")
    if scale < 1:
        warnings.warn(
            f"classifier_free: scale {scale} is below 1 and weakens the condition; "
            "the paper uses 1 and above",
            UserWarning,
            stacklevel=2,
        )
    if not 0.0 <= rescale <= 1.0:
        raise ValueError(f"classifier_free: rescale must lie in 0..1, got {rescale}")
    if not interval[0] <= interval[1]:
        raise ValueError(f"classifier_free: interval must be (low, high), got {interval}")
    condition = y if context is None else context
    if condition is None or (context is None and null_y is None):
        raise ValueError(
            "classifier_free: no condition to guide by; give context, or y together with null_y"
        )
    if context is None and (context_mask is not None or pooled is not None):
        raise ValueError("classifier_free: context_mask or pooled given without context")
    batch = condition.shape[0] if condition.ndim else 0
    null_mask = None
    if context is not None:
        context_mask = _checked_mask(context, context_mask)
        null_mask = torch.zeros_like(context_mask)
    for name, value in (("pooled", pooled), ("y", y)):
        if value is not None and (value.ndim == 0 or value.shape[0] != batch):
            raise ValueError(
                f"classifier_free: {name} must have the context's batch {batch}, "
                f"got {tuple(value.shape)}"
            )
    unlabelled = y if y is None or null_y is None else torch.full_like(y, null_y)

    def arguments(
        context: Tensor | None, mask: Tensor | None, pooled: Tensor | None, y: Tensor | None
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor | None]]:
        if context is None:
            return (), {"y": y}
        return (context,), {"context_mask": mask, "pooled": pooled, "y": y}

    # Once here, not once per step.
    alone = arguments(context, context_mask, pooled, y)
    null = arguments(context, null_mask, pooled, unlabelled)
    both = arguments(
        _stacked(context, context),
        _stacked(context_mask, null_mask),
        _stacked(pooled, pooled),
        _stacked(y, unlabelled),
    )

    def guided(x: Tensor, t: Tensor) -> Tensor:
        if x.shape[0] != batch:
            raise ValueError(f"classifier_free: x has batch {x.shape[0]}, the context has {batch}")
        t = t.expand(batch)
        inside = None if interval == _ALWAYS else (t >= interval[0]) & (t <= interval[1])
        outside = inside is not None and t.device.type == "cpu" and not bool(inside.any())
        if scale == 1 or outside:
            return model(x, t, *alone[0], **alone[1])
        if scale == 0 and inside is None:
            return model(x, t, *null[0], **null[1])
        out = model(torch.cat([x, x]), torch.cat([t, t]), *both[0], **both[1])
        conditional, out_u = _wide(out).chunk(2)
        prediction, variance = conditional[:, : x.shape[1]], conditional[:, x.shape[1] :]
        out_u = out_u[:, : x.shape[1]]
        out = out_u + scale * (prediction - out_u)
        if rescale:
            ratio = _deviation(prediction) / _deviation(out)
            out = out * (1.0 + rescale * (ratio - 1.0))
        if inside is not None:
            out = torch.where(inside.view(-1, *[1] * (x.ndim - 1)), out, prediction)
        return torch.cat([out, variance], dim=1) if variance.shape[1] else out

    return guided


def _checked_mask(context: Tensor, context_mask: Tensor | None) -> Tensor:
    if context.ndim != 3:
        raise ValueError(
            f"classifier_free: context must be (B, S, width), got {tuple(context.shape)}"
        )
    batch, positions, _ = context.shape
    if context_mask is None:
        return context.new_ones((batch, positions), dtype=torch.bool)
    if context_mask.dtype != torch.bool:
        raise TypeError(f"classifier_free: context_mask must be bool, got {context_mask.dtype}")
    if context_mask.shape != (batch, positions):
        raise ValueError(
            f"classifier_free: context_mask must be ({batch}, {positions}) as the context, "
            f"got {tuple(context_mask.shape)}"
        )
    return context_mask


def _stacked(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else torch.cat([first, second])


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _deviation(x: Tensor) -> Tensor:
    return x.flatten(1).std(dim=1).view(-1, *[1] * (x.ndim - 1))


def gradient_guided(
    model: Denoiser,
    objective: Callable[[Tensor, Tensor], Tensor],
    scale: float,
    process: Process,
    *,
    through: Literal["x_t", "x0", "model"] = "x_t",
) -> Denoiser:
    """Guide by the gradient of a score of pictures: what classifier and CLIP guidance share.

    eps <- eps - scale sqrt(1 - alpha_bar_t) grad objective

    with the gradient by x_t, and for outputs that are x_0 or v what that means for them.

    Args:
        model: (x, t) -> the process's prediction; a learned variance behind it is passed on.
        objective: (pictures (B, ...), t (B,)) -> (B,), larger is better, differentiable. Each
            picture's value must depend on that picture alone.
        scale: at least 0; 1 is Bayes' rule where the objective is log p(condition | pictures).
        process: noise levels, and the meaning of the model's output.
        through: what the objective is given. "x_t": noised pictures, for objectives that were
            trained on them; "model": the model's x_0, with the gradient through the model, at the
            cost of its backward pass; "x0": the same x_0 as if the model's output did not change
            with x_t, which costs no pass.

    Returns:
        A callable (x (B, ...), t) -> guided output, float32 at least, without a graph. It works
        under `torch.no_grad` and `torch.inference_mode`, as samplers run.

    Raises:
        ValueError: scale is negative or not finite, `through` is unknown, or the objective does not
            return (B,).

    Source: Dhariwal and Nichol 2021, Eq. 14 (the paper's section 2.3); GLIDE (Nichol et al. 2021).
    """
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"guidance: scale must be finite and at least 0, got {scale}")
    kinds = get_args(Literal["x_t", "x0", "model"])
    if through not in kinds:
        raise ValueError(f"guidance: through must be one of {kinds}, got {through!r}")

    def guided(x: Tensor, t: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            # Samplers may run in inference mode, whose tensors have no gradients; copies have.
            t = t.clone().expand(x.shape[0])
            x_t = x.detach().clone().requires_grad_()
            with torch.set_grad_enabled(through == "model"):
                out, variance = predict(model, x_t, t, x.dtype)
            pictures = x_t if through == "x_t" else process.to_x0(out, x_t, t)
            values = objective(pictures, t)
            if values.shape != x.shape[:1]:
                raise ValueError(
                    f"guidance: the objective must return ({x.shape[0]},), one value a picture, "
                    f"got {tuple(values.shape)}"
                )
            gradient = torch.autograd.grad(values.sum(), x_t)[0]
        with torch.no_grad():
            change = -scale * process.noise_std(gradient, t) * gradient
            out = process.shift_eps(out.detach(), change, t)
            return out if variance is None else torch.cat([out, variance.to(out)], dim=1)

    return guided


def classifier_guided(
    model: Denoiser,
    classifier: Callable[[Tensor, Tensor], Tensor],
    scale: float,
    process: Process,
    *,
    y: Tensor,
) -> Denoiser:
    """Guide to labels by a classifier of noised pictures.

    eps <- eps - scale sqrt(1 - alpha_bar_t) grad log p(y | x_t)

    Args:
        model, scale, process: as in `gradient_guided`.
        classifier: (x_t (B, C, H, W), t (B,)) -> (B, K) logits, for instance
            `fastdiff.models.NoisyClassifier`.
        y: (B,) int64 labels, 0..K-1.

    Returns, Raises: as `gradient_guided`; ValueError where y is not (B,).

    Source: Dhariwal and Nichol 2021, algorithm 2; section 2.3 of the paper.
    """
    if y.ndim != 1 or y.dtype != torch.int64:
        raise ValueError(f"classifier_guided: y must be (B,) int64, got {tuple(y.shape)} {y.dtype}")

    def log_probability(x_t: Tensor, t: Tensor) -> Tensor:
        if len(x_t) != len(y):
            raise ValueError(f"classifier_guided: x has batch {len(x_t)}, y has {len(y)}")
        return -F.cross_entropy(_wide(classifier(x_t, t)), y, reduction="none")

    return gradient_guided(model, log_probability, scale, process)


def clip_guided(
    model: Denoiser,
    encode: Callable[..., Tensor],
    scale: float,
    process: Process,
    *,
    target: Tensor,
    through: Literal["x_t", "x0", "model"] = "model",
) -> Denoiser:
    """Guide to a text, or to a picture, by the features of CLIP.

    eps <- eps - scale sqrt(1 - alpha_bar_t) grad f(x) . g(c)

    Args:
        model, scale, process: as in `gradient_guided`; scales of GLIDE are about 100 to 300.
        encode: f. Pictures (B, 3, H, W) in [-1, 1] -> features (B, D), differentiable, for
            instance `fastdiff.clip.CLIP(...).encode_images`; with through="x_t" a CLIP that was
            trained on noised pictures, (x_t, t) -> (B, D).
        target: g(c), (B, D) or (1, D), for instance `CLIP(...).encode_texts`.
        through: as in `gradient_guided`.

    Both features are brought to length 1.

    Returns, Raises: as `gradient_guided`; ValueError where target does not fit the features.

    Source: GLIDE (Nichol et al. 2021), section 2.5; section 2.3 of the paper.
    """
    goal = F.normalize(_wide(target), dim=-1)

    def similarity(x: Tensor, t: Tensor) -> Tensor:
        features = encode(x, t) if through == "x_t" else encode(x)
        fits = features.ndim == goal.ndim == 2 and features.shape[1] == goal.shape[1]
        if not fits or len(goal) not in (1, len(features)):
            raise ValueError(
                f"clip_guided: target {tuple(goal.shape)} does not fit the features "
                f"{tuple(features.shape)}"
            )
        return (F.normalize(_wide(features), dim=-1) * goal).sum(dim=-1)

    return gradient_guided(model, similarity, scale, process, through=through)
