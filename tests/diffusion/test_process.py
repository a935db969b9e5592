"""The process: closed forms, round trips, dtypes, compilation and refusals."""

import pytest
import torch
from torch import Tensor

from fastdiff.diffusion import DiffusionProcess, Prediction, schedule

PREDICTIONS: tuple[Prediction, ...] = ("eps", "x0", "v")


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64).clamp(-1, 1)
    noise = torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64)
    return x0.to(dtype), torch.tensor([0, 1, 500, 999]), noise.to(dtype)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_q_sample_is_ddpms_eq4_not_the_papers_misprint(name: str) -> None:
    process = DiffusionProcess(schedule(name))
    x0, t, noise = batch()
    x_t = process.q_sample(x0, t, noise)
    for b, step in enumerate(t.tolist()):
        alpha_bar = float(process.schedule.alpha_bar[step])
        expected = alpha_bar**0.5 * x0[b] + (1 - alpha_bar) ** 0.5 * noise[b]
        torch.testing.assert_close(x_t[b], expected)


def test_q_sample_agrees_with_the_chain_of_eq1() -> None:
    process = DiffusionProcess(schedule("linear", 50))
    generator = torch.Generator().manual_seed(0)
    x = torch.full((200_000,), 0.7)
    for beta in process.schedule.betas.tolist():
        x = (1 - beta) ** 0.5 * x + beta**0.5 * torch.randn(x.shape, generator=generator)
    last = torch.tensor(49)
    direct = process.q_sample(
        torch.full((200_000,), 0.7), last, torch.randn(200_000, generator=generator)
    )
    assert float(x.mean()) == pytest.approx(float(direct.mean()), abs=0.01)
    assert float(x.var()) == pytest.approx(float(direct.var()), rel=0.02)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_exact_target_converts_to_each_type(prediction: Prediction, name: str) -> None:
    process = DiffusionProcess(schedule(name), prediction)
    x0, t, noise = batch(torch.float64)
    x_t = process.q_sample(x0, t, noise)
    target = process.target(x0, t, noise)
    assert x_t.dtype == target.dtype == torch.float64
    alpha_bar = process.schedule.alpha_bar[t].view(4, 1, 1, 1)
    v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0
    torch.testing.assert_close(target, {"eps": noise, "x0": x0, "v": v}[prediction])
    torch.testing.assert_close(process.to_eps(target, x_t, t), noise)
    torch.testing.assert_close(process.to_x0(target, x_t, t), x0)
    torch.testing.assert_close(process.to_v(target, x_t, t), v)
    torch.testing.assert_close(process.eps_from_x0(x0, x_t, t), noise)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_loss_is_a_mean_per_sample_in_float32(prediction: Prediction) -> None:
    process = DiffusionProcess(schedule("cosine"), prediction)
    x0, t, noise = batch()
    target = process.target(x0, t, noise)
    error = torch.tensor([0.0, 1.0, 2.0, -3.0]).view(4, 1, 1, 1)
    out = (target + error).requires_grad_()
    loss = process.loss(out, x0, t, noise)
    torch.testing.assert_close(loss, torch.tensor([0.0, 1.0, 4.0, 9.0]), atol=1e-5, rtol=1e-5)
    loss.sum().backward()
    expected = (2 * error / 12).expand_as(out)
    torch.testing.assert_close(out.grad, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_low_precision_inputs_are_computed_in_float32(prediction: Prediction) -> None:
    process = DiffusionProcess(schedule("linear"), prediction)
    x0, t, noise = batch(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_t = process.q_sample(x0, t, noise)
        target = process.target(x0, t, noise)
        loss = process.loss(torch.zeros_like(x0), x0, t, noise)
    wide = (x0.double(), t, noise.double())
    assert x_t.dtype == target.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(x_t.double(), process.q_sample(*wide), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        loss.double(), process.loss(wide[0] * 0, *wide), atol=1e-6, rtol=1e-6
    )


def test_t_broadcasts_from_0d_and_from_one_value() -> None:
    process = DiffusionProcess(schedule("linear"), "v")
    x0, _, noise = batch()
    full = process.q_sample(x0, torch.full((4,), 7), noise)
    for t in (torch.tensor(7), torch.tensor([7]), torch.tensor([7], dtype=torch.int32)):
        assert torch.equal(process.q_sample(x0, t, noise), full)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_fullgraph_compile(prediction: Prediction) -> None:
    process = DiffusionProcess(schedule("cosine"), prediction)
    x0, t, noise = batch()

    def step(out: Tensor) -> Tensor:
        x_t = process.q_sample(x0, t, noise)
        return process.loss(process.to_v(out, x_t, t) + x_t, x0, t, noise)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(noise), step(noise))


def test_tables_move_once_and_serve_training_after_inference() -> None:
    process = DiffusionProcess(schedule("linear"), "v")
    x0, t, noise = (tensor.to("meta") for tensor in batch())
    with torch.inference_mode():
        process.q_sample(x0, t, noise)
    table = process._table(torch.device("meta"), torch.float32)
    assert process._table(torch.device("meta"), torch.float32) is table
    assert not table.is_inference()
    out = noise.clone().requires_grad_()
    process.to_x0(out, x0, t).sum().backward()
    assert out.grad is not None


def test_bad_input_is_refused() -> None:
    x0, t, noise = batch()
    process = DiffusionProcess(schedule("linear"))
    with pytest.raises(ValueError, match=r"prediction must be one of .*got 'noise'"):
        DiffusionProcess(schedule("linear"), "noise")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"int64, got torch\.float32"):
        process.q_sample(x0, t.float(), noise)
    with pytest.raises(ValueError, match=r"0\.\.999, got 0\.\.1000"):
        process.q_sample(x0, torch.tensor([0, 1, 2, 1000]), noise)
    with pytest.raises(ValueError, match=r"0\.\.999, got -1\.\.2"):
        process.q_sample(x0, torch.tensor([0, 1, 2, -1]), noise)
    with pytest.raises(ValueError, match=r"0-d, \(1,\) or \(4,\), got \(3,\)"):
        process.q_sample(x0, t[:3], noise)
    with pytest.raises(ValueError, match=r"got \(4, 3, 2, 2\) and \(4, 3, 2, 1\)"):
        process.q_sample(x0, t, noise[..., :1])
    with pytest.raises(ValueError, match=r"shape \(4, 3, 2, 2\), got \(4, 6, 2, 2\)"):
        process.loss(torch.zeros(4, 6, 2, 2), x0, t, noise)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_min_snr_weighs_the_error_of_x0_alike(prediction: Prediction) -> None:
    """Whatever is predicted, an error e of x0 costs min(SNR, gamma) e^2."""
    process = DiffusionProcess(schedule("cosine"), prediction)
    t = torch.tensor([3, 200, 500, 990])
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(4, 3, 5, 5, generator=generator) for _ in range(2))
    x_t = process.q_sample(x0, t, noise)
    wrong = x0 + 0.1
    out = {
        "x0": wrong,
        "eps": process.eps_from_x0(wrong, x_t, t),
        "v": DiffusionProcess(schedule("cosine"), "x0").to_v(wrong, x_t, t),
    }[prediction]
    bar = process.schedule.alpha_bar[t]
    expected = (bar / (1 - bar)).clamp(max=5.0) * 0.01
    got = process.loss(out, x0, t, noise) * process.min_snr_weight(t)
    torch.testing.assert_close(got.double(), expected.double(), rtol=2e-3, atol=1e-6)
