"""Classifier-free guidance: the formula, the number of calls, the null condition, refusals."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.diffusion import (
    DiffusionProcess,
    classifier_free,
    initial_noise,
    sample_ddim,
    schedule,
)

B, S, WIDTH = 3, 5, 4


class Recorder:
    """A model with a learned null embedding, as the backbones have it, that keeps its calls."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        *,
        context_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        assert context is not None
        assert context_mask is not None
        self.calls.append({"x": x, "t": t, "mask": context_mask, "pooled": pooled, "y": y})
        valid = context_mask.unsqueeze(-1)
        mean = (context * valid).sum(1) / valid.sum(1).clamp(min=1)
        null = torch.full_like(mean, 0.25)
        text = torch.where(context_mask.any(1, keepdim=True), mean, null).sum(1)
        return x * 0.5 + text.view(-1, 1, 1, 1) * (1 + t.view(-1, 1, 1, 1) / 1000)


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(B, S, WIDTH, generator=generator)
    mask = torch.arange(S) < torch.tensor([5, 2, 1]).view(B, 1)
    return torch.randn(B, 2, 2, 2, generator=generator), torch.tensor([9, 99, 999]), context, mask


@pytest.mark.parametrize("scale", [1.5, 3.0, 7.5])
def test_eq6_in_one_call(scale: float) -> None:
    x, t, context, mask = inputs()
    model = Recorder()
    out = classifier_free(model, scale, context=context, context_mask=mask)(x, t)
    assert len(model.calls) == 1
    assert model.calls[0]["x"].shape[0] == 2 * B
    conditional = Recorder()(x, t, context, context_mask=mask)
    null = Recorder()(x, t, context, context_mask=torch.zeros_like(mask))
    torch.testing.assert_close(out, null + scale * (conditional - null))


def test_scale_one_calls_the_condition_alone() -> None:
    x, t, context, mask = inputs()
    model = Recorder()
    out = classifier_free(model, 1.0, context=context, context_mask=mask)(x, t)
    assert [call["x"].shape[0] for call in model.calls] == [B]
    assert torch.equal(out, Recorder()(x, t, context, context_mask=mask))


def test_scale_zero_calls_the_null_condition_alone() -> None:
    x, t, context, mask = inputs()
    model = Recorder()
    with pytest.warns(UserWarning, match="scale 0 is below 1"):
        guided = classifier_free(model, 0, context=context, context_mask=mask)
    guided(x, t)
    assert [call["x"].shape[0] for call in model.calls] == [B]
    assert not bool(model.calls[0]["mask"].any())


def test_a_scale_below_one_warns_and_interpolates() -> None:
    x, t, context, mask = inputs()
    with pytest.warns(UserWarning, match="scale 0.5 is below 1"):
        guided = classifier_free(Recorder(), 0.5, context=context, context_mask=mask)
    conditional = Recorder()(x, t, context, context_mask=mask)
    null = Recorder()(x, t, context, context_mask=torch.zeros_like(mask))
    torch.testing.assert_close(guided(x, t), (conditional + null) / 2)


def test_both_halves_get_the_same_pooled_and_label_and_a_0d_t() -> None:
    x, _, context, _ = inputs()
    model = Recorder()
    pooled, y = torch.randn(B, WIDTH), torch.tensor([1, 2, 3])
    classifier_free(model, 2.0, context=context, pooled=pooled, y=y)(x, torch.tensor(7))
    call = model.calls[0]
    assert torch.equal(call["pooled"], torch.cat([pooled, pooled]))
    assert call["y"].tolist() == [1, 2, 3, 1, 2, 3]
    assert call["t"].tolist() == [7] * 6
    # No mask given: every position is valid in the conditional half, none in the other.
    assert call["mask"].any(1).tolist() == [True] * 3 + [False] * 3
    assert bool(call["mask"][:3].all())


def test_bf16_outputs_are_combined_in_float32() -> None:
    x, t, context, mask = inputs()

    def model(x: Tensor, t: Tensor, context: Tensor, **kwargs: Tensor | None) -> Tensor:
        half = x.shape[0] // 2
        return torch.cat([torch.full_like(x[:half], 1.0078125), torch.ones_like(x[half:])])

    guided = classifier_free(model, 3.0, context=context, context_mask=mask)
    out = guided(x.bfloat16(), t)
    assert out.dtype == torch.float32
    assert torch.equal(out, torch.full_like(out, 1.0234375))


def test_guidance_holds_for_each_prediction_type() -> None:
    x_T = initial_noise(range(B), (2, 2, 2)).double()
    _, _, context, mask = inputs()
    eps_process = DiffusionProcess(schedule("linear"), "eps")
    v_process = DiffusionProcess(schedule("linear"), "v")

    def eps_model(x: Tensor, t: Tensor, context: Tensor, **kwargs: Any) -> Tensor:
        return Recorder()(x, t, context.double(), **kwargs)

    def v_model(x: Tensor, t: Tensor, context: Tensor, **kwargs: Any) -> Tensor:
        return eps_process.to_v(eps_model(x, t, context, **kwargs), x, t)

    eps = classifier_free(eps_model, 3.0, context=context, context_mask=mask)
    v = classifier_free(v_model, 3.0, context=context, context_mask=mask)
    torch.testing.assert_close(
        sample_ddim(eps, x_T, eps_process, steps=10), sample_ddim(v, x_T, v_process, steps=10)
    )


def test_bad_input_is_refused() -> None:
    x, t, context, mask = inputs()
    for scale in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite and at least 0"):
            classifier_free(Recorder(), scale, context=context)
    with pytest.raises(ValueError, match=r"\(B, S, width\), got \(5, 4\)"):
        classifier_free(Recorder(), 2.0, context=context[0])
    with pytest.raises(ValueError, match=r"must be \(3, 5\) as the context, got \(3, 4\)"):
        classifier_free(Recorder(), 2.0, context=context, context_mask=mask[:, 1:])
    with pytest.raises(TypeError, match=r"bool, got torch\.int64"):
        classifier_free(Recorder(), 2.0, context=context, context_mask=mask.long())
    with pytest.raises(ValueError, match=r"pooled must have the context's batch 3, got \(2, 4\)"):
        classifier_free(Recorder(), 2.0, context=context, pooled=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="x has batch 2, the context has 3"):
        classifier_free(Recorder(), 2.0, context=context)(x[:2], t[:2])
