"""Guidance: the formulas, the number of calls, the null condition, exact posteriors, refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.diffusion import (
    VPSDE,
    DiffusionProcess,
    Prediction,
    Process,
    classifier_free,
    classifier_guided,
    clip_guided,
    gradient_guided,
    initial_noise,
    sample_ddim,
    sample_euler_maruyama,
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


class Labelled:
    """A model of labels alone; label 9 is none."""

    def __init__(self, variance: bool = False) -> None:
        self.sizes: list[int] = []
        self.variance = variance

    def __call__(self, x: Tensor, t: Tensor, *, y: Tensor | None = None) -> Tensor:
        assert y is not None
        self.sizes.append(x.shape[0])
        label = y.view(-1, 1, 1, 1)
        out = x * (1 + label / 4)
        return torch.cat([out, x + label], dim=1) if self.variance else out


def test_labels_are_guided_against_the_null_label() -> None:
    x, t, _, _ = inputs()
    y = torch.tensor([1, 2, 3])
    model = Labelled()
    out = classifier_free(model, 3.0, y=y, null_y=9)(x, t)
    assert model.sizes == [2 * B]
    conditional, null = model(x, t, y=y), model(x, t, y=torch.full((B,), 9))
    torch.testing.assert_close(out, null + 3 * (conditional - null))


def test_a_learned_variance_is_the_conditions() -> None:
    x, t, _, _ = inputs()
    y = torch.tensor([1, 2, 3])
    plain, model = Labelled(), Labelled(variance=True)
    out = classifier_free(model, 3.0, y=y, null_y=9)(x, t)
    prediction, variance = out.chunk(2, dim=1)
    assert torch.equal(prediction, classifier_free(plain, 3.0, y=y, null_y=9)(x, t))
    torch.testing.assert_close(variance, x + y.view(-1, 1, 1, 1))


def test_text_and_label_are_dropped_together_where_both_are_guided() -> None:
    x, t, context, mask = inputs()
    model = Recorder()
    y = torch.tensor([1, 2, 3])
    classifier_free(model, 2.0, context=context, context_mask=mask, y=y, null_y=9)(x, t)
    assert model.calls[0]["y"].tolist() == [1, 2, 3, 9, 9, 9]
    assert model.calls[0]["mask"].any(1).tolist() == [True] * 3 + [False] * 3


def test_outside_the_interval_the_condition_stands_alone() -> None:
    x, _, context, mask = inputs()
    model = Recorder()
    guided = classifier_free(model, 5.0, context=context, context_mask=mask, interval=(100, 600))
    for step, inside in ((99, False), (100, True), (600, True), (601, False)):
        model.calls.clear()
        t = torch.full((B,), step)
        out = guided(x, t)
        assert [call["x"].shape[0] for call in model.calls] == [2 * B if inside else B]
        everywhere = classifier_free(Recorder(), 5.0, context=context, context_mask=mask)(x, t)
        conditional = Recorder()(x, t, context, context_mask=mask)
        torch.testing.assert_close(out, everywhere if inside else conditional)
    # Pictures of one batch may stand at different times.
    t = torch.tensor([50, 300, 700])
    out = guided(x, t)
    everywhere = classifier_free(Recorder(), 5.0, context=context, context_mask=mask)(x, t)
    conditional = Recorder()(x, t, context, context_mask=mask)
    torch.testing.assert_close(out[1], everywhere[1])
    torch.testing.assert_close(out[[0, 2]], conditional[[0, 2]])


def test_rescale_brings_back_the_deviation() -> None:
    x, t, context, mask = inputs()
    conditional = Recorder()(x, t, context, context_mask=mask)
    full = classifier_free(Recorder(), 6.0, context=context, context_mask=mask)(x, t)

    def guided(rescale: float) -> Tensor:
        return classifier_free(
            Recorder(), 6.0, context=context, context_mask=mask, rescale=rescale
        )(x, t)

    torch.testing.assert_close(guided(1.0).std((1, 2, 3)), conditional.std((1, 2, 3)))
    torch.testing.assert_close(guided(0.7), 0.7 * guided(1.0) + 0.3 * full)


PROCESSES: list[Callable[[Prediction], Process]] = [
    lambda kind: DiffusionProcess(schedule("cosine"), kind),
    lambda kind: VPSDE("linear", kind),
]
CENTRES, SPREAD = (-0.6, 0.5), 0.2


class TwoClasses:
    """Pictures whose pixels are all N(-0.6, 0.04), or all N(0.5, 0.04): all answers are known."""

    def __init__(self, process: Process) -> None:
        self.process = process

    def _levels(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = self.process.noise_std(x, t)
        a = (1 - s**2).sqrt()
        return a, s, a**2 * SPREAD**2 + s**2

    def classifier(self, x: Tensor, t: Tensor) -> Tensor:
        a, _, variance = self._levels(x, t)
        return torch.stack(
            [(-((x - a * m) ** 2) / (2 * variance)).flatten(1).sum(1) for m in CENTRES], dim=1
        )

    def of_class(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The best output for pictures of class y."""
        a, s, variance = self._levels(x, t)
        mean = torch.tensor(CENTRES, dtype=x.dtype)[y].view(-1, *[1] * (x.ndim - 1))
        eps = s * (x - a * mean) / variance
        return self._output(x, eps, a, s)

    def _output(self, x: Tensor, eps: Tensor, a: Tensor, s: Tensor) -> Tensor:
        x0 = (x - s * eps) / a
        return {"eps": eps, "x0": x0, "v": a * eps - s * x0}[self.process.prediction]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The best output where the class is not known."""
        weights = self.classifier(x, t).softmax(1)
        outs = [self.of_class(x, t, torch.full((len(x),), y)) for y in (0, 1)]
        shape = (-1, *[1] * (x.ndim - 1))
        return sum(w.view(shape) * out for w, out in zip(weights.T, outs, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("make", PROCESSES)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_classifier_guidance_of_scale_one_is_bayes_rule(
    make: Callable[[Prediction], Process], prediction: Prediction
) -> None:
    process = make(prediction)
    data = TwoClasses(process)
    x = initial_noise(range(4), (1, 2, 2)).double()
    y, t = torch.tensor([0, 1, 0, 1]), torch.tensor([10, 300, 600, 900])
    guided = classifier_guided(data, data.classifier, 1.0, process, y=y)
    torch.testing.assert_close(guided(x, t), data.of_class(x, t, y))
    assert float((data(x, t) - data.of_class(x, t, y)).abs().max()) > 0.01
    torch.testing.assert_close(
        classifier_guided(data, data.classifier, 3.0, process, y=y)(x, t),
        data(x, t) + 3 * (data.of_class(x, t, y) - data(x, t)),
    )


def test_samplers_draw_the_class_that_guidance_asks_for() -> None:
    y = torch.arange(16) % 2
    x_T = initial_noise(range(16), (1, 2, 2)).double()
    discrete, continuous = DiffusionProcess(schedule("linear")), VPSDE("linear")
    generator = torch.Generator().manual_seed(0)
    for process in (discrete, continuous):
        data = TwoClasses(process)
        model = classifier_guided(data, data.classifier, 1.0, process, y=y)
        with torch.inference_mode():
            if process is discrete:
                out = sample_ddim(model, x_T, discrete, steps=50)
            else:
                out = sample_euler_maruyama(model, x_T, continuous, steps=100, generator=generator)
        assert torch.equal((out.mean((1, 2, 3)) > 0).long(), y)
        assert not out.requires_grad


def encode(x: Tensor, t: Tensor | None = None) -> Tensor:
    """A small f(x), and f(x, t)."""
    weight = torch.eye(4, 5, dtype=x.dtype) + 0.1
    features = torch.tanh(x.flatten(1)) @ weight
    return features if t is None else features * (1 + t.view(-1, 1) / 1000)


def numeric_gradient(value: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    gradient = torch.zeros_like(x)
    for place in range(x[0].numel()):
        step = torch.zeros_like(x[0]).flatten()
        step[place] = 1e-6
        step = step.view(x[0].shape)
        gradient.flatten(1)[:, place] = (value(x + step) - value(x - step)) / 2e-6
    return gradient


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("through", ["x_t", "x0", "model"])
def test_clip_guidance_is_the_gradient_of_the_similarity(
    prediction: Prediction, through: str
) -> None:
    process = DiffusionProcess(schedule("linear"), prediction)
    x, t = initial_noise(range(3), (1, 2, 2)).double(), torch.tensor([50, 500, 800])
    target = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(3 * x) * 0.5

    def similarity(moved: Tensor) -> Tensor:
        if through == "x_t":
            return F.cosine_similarity(encode(moved, t), target)
        out = model(moved if through == "model" else x, t)
        return F.cosine_similarity(encode(process.to_x0(out, moved, t)), target)

    guided = clip_guided(model, encode, 20.0, process, target=target, through=through)  # type: ignore[arg-type]
    gradient = numeric_gradient(similarity, x)
    alpha_bar = process.schedule.alpha_bar[t].view(3, 1, 1, 1)
    expected = process.to_eps(model(x, t), x, t) - 20 * (1 - alpha_bar).sqrt() * gradient
    got = process.to_eps(guided(x, t), x, t)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    assert float(gradient.abs().max()) > 0.01


@pytest.mark.parametrize("through", ["x0", "model"])
def test_clip_guidance_draws_what_is_more_alike(through: str) -> None:
    process = DiffusionProcess(schedule("linear"))
    x_T = initial_noise(range(8), (1, 2, 2)).double()
    target = encode(torch.tensor([[0.5, -0.5, 0.5, 0.5]], dtype=torch.float64))

    def model(x: Tensor, t: Tensor) -> Tensor:  # the best for pixels N(0, 1/4)
        s = process.noise_std(x, t)
        return x * s / (0.25 * (1 - s**2) + s**2)

    def similarity(scale: float) -> Tensor:
        guided = clip_guided(model, encode, scale, process, target=target, through=through)  # type: ignore[arg-type]
        return F.cosine_similarity(encode(sample_ddim(guided, x_T, process, steps=50)), target)

    before, after = similarity(0.0), similarity(10.0)
    assert float((after - before).min()) > 0
    assert float(after.mean() - before.mean()) > 0.5


def test_guidances_add_up_and_pass_a_learned_variance_on() -> None:
    process = DiffusionProcess(schedule("cosine"))
    data = TwoClasses(process)
    x, t, y = initial_noise(range(2), (1, 2, 2)), torch.tensor([100, 800]), torch.tensor([1, 1])

    def model(x: Tensor, t: Tensor, *, y: Tensor | None = None) -> Tensor:
        return torch.cat([data(x, t), 2 * x], dim=1)

    inner = classifier_free(model, 2.0, y=y, null_y=2)
    out = classifier_guided(inner, data.classifier, 1.0, process, y=y)(x, t)
    prediction, variance = out.chunk(2, dim=1)
    torch.testing.assert_close(variance, 2 * x)
    torch.testing.assert_close(prediction, data.of_class(x, t, y), atol=1e-5, rtol=1e-4)


def test_bad_guidance_is_refused() -> None:
    process = DiffusionProcess(schedule("linear"))
    x, t, context, mask = inputs()
    y = torch.tensor([1, 2, 3])
    with pytest.raises(ValueError, match=r"rescale must lie in 0\.\.1, got 1\.5"):
        classifier_free(Recorder(), 2.0, context=context, rescale=1.5)
    with pytest.raises(ValueError, match=r"interval must be \(low, high\), got \(5, 1\)"):
        classifier_free(Recorder(), 2.0, context=context, interval=(5, 1))
    with pytest.raises(ValueError, match="no condition"):
        classifier_free(Recorder(), 2.0)
    with pytest.raises(ValueError, match="y together with null_y"):
        classifier_free(Recorder(), 2.0, y=y)
    with pytest.raises(ValueError, match="without context"):
        classifier_free(Recorder(), 2.0, y=y, null_y=9, context_mask=mask)
    for scale in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="finite and at least 0"):
            gradient_guided(lambda x, t: x, lambda x, t: x, scale, process)
    with pytest.raises(ValueError, match="got 'x_0'"):
        gradient_guided(lambda x, t: x, lambda x, t: x, 1.0, process, through="x_0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must return \(3,\).*got \(\)"):
        gradient_guided(lambda x, t: x, lambda x, t: x.sum(), 1.0, process)(x, t)
    with pytest.raises(ValueError, match=r"y must be \(B,\) int64, got \(3,\) torch\.float32"):
        classifier_guided(lambda x, t: x, lambda x, t: x, 1.0, process, y=y.float())
    with pytest.raises(ValueError, match="x has batch 3, y has 2"):
        classifier_guided(lambda x, t: x, lambda x, t: x, 1.0, process, y=y[:2])(x, t)
    with pytest.raises(ValueError, match=r"target \(3, 4\) does not fit the features \(3, 8\)"):
        clip_guided(lambda x, t: x, lambda x: x.flatten(1), 1.0, process, target=torch.ones(3, 4))(
            x, t
        )
