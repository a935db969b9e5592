"""The classifier of noised pictures: its pool, what it depends on, saving, refusals."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from builders import LEVELS, make_unet, randomize
from einops import rearrange
from torch import Tensor

from fastdiff.diffusion import DiffusionProcess, classifier_guided, sample_ddim, schedule
from fastdiff.models.classifier import AttentionPool, ClassifierConfig, NoisyClassifier


def make_classifier(**fields: object) -> NoisyClassifier:
    values = {**LEVELS, "num_classes": 5, **fields}
    return NoisyClassifier(ClassifierConfig(**values))  # type: ignore[arg-type]


def pictures(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def test_the_pool_is_clips() -> None:
    torch.manual_seed(0)
    pool = AttentionPool(64, (4, 6), 7, head_dim=16)
    x = torch.randn(2, 64, 4, 6)
    tokens = rearrange(x, "b c h w -> (h w) b c")
    tokens = torch.cat([tokens.mean(0, keepdim=True), tokens]) + pool.position[:, None]
    (wk, wv), (bk, bv) = pool.kv.weight.chunk(2), pool.kv.bias.chunk(2)
    expected, _ = F.multi_head_attention_forward(
        tokens[:1],
        tokens,
        tokens,
        embed_dim_to_check=64,
        num_heads=4,
        in_proj_weight=None,
        in_proj_bias=torch.cat([pool.q.bias, bk, bv]),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=pool.proj.weight,
        out_proj_bias=pool.proj.bias,
        use_separate_proj_weight=True,
        q_proj_weight=pool.q.weight,
        k_proj_weight=wk,
        v_proj_weight=wv,
    )
    torch.testing.assert_close(pool(x), expected[0], atol=1e-5, rtol=1e-5)


def test_it_is_the_encoder_half_of_the_unet() -> None:
    classifier, unet = randomize(make_classifier()), make_unet(num_classes=5)
    halves = ("time.", "encoder.", "middle.")
    shared = {k: v for k, v in classifier.state_dict().items() if k.startswith(halves)}
    assert {k for k in unet.state_dict() if k.startswith(halves)} == shared.keys()
    unet.load_state_dict(shared, strict=False)
    caught: list[Tensor] = []
    unet.middle.register_forward_hook(lambda module, args, out: caught.append(out))
    x, t = pictures(), torch.tensor([5, 400, 999])
    # A label embedding of zeros leaves the time alone.
    for parameter in unet.label.parameters():
        torch.nn.init.zeros_(parameter)
    unet(x, t)
    assert isinstance(classifier, NoisyClassifier)
    expected = classifier.pool(classifier.norm_out(caught[0]))
    torch.testing.assert_close(classifier(x, t), expected)


def test_logits_depend_on_picture_and_time_and_have_a_gradient() -> None:
    model = randomize(make_classifier(image_size=(16, 32)))
    x = torch.randn(2, 3, 16, 32, requires_grad=True)
    logits = model(x, torch.tensor([10, 900]))
    assert logits.shape == (2, 5)
    assert not torch.allclose(logits, model(x, 10))
    logits[0, 1].backward()
    assert x.grad is not None
    assert bool(x.grad[0].any())
    assert not bool(x.grad[1].any())  # a picture's logits are its own
    torch.testing.assert_close(model(x[:1], 10), model(x, 10)[:1], atol=1e-5, rtol=1e-4)


def test_it_guides_a_unet() -> None:
    process = DiffusionProcess(schedule("linear"))
    unet, classifier = randomize(make_unet()).eval(), randomize(make_classifier()).eval()
    x_T, y = pictures(), torch.tensor([0, 1, 2])

    def sure(scale: float) -> Tensor:
        model = classifier_guided(unet, classifier, scale, process, y=y)
        out = sample_ddim(model, x_T, process, steps=6)
        return classifier(out, 0).log_softmax(1)[torch.arange(3), y]

    with torch.no_grad():
        # With random weights the gradients are small.
        assert bool((sure(3000.0) > sure(0.0)).all())


def test_saving_and_loading(tmp_path: Path) -> None:
    model = randomize(make_classifier()).eval()
    assert isinstance(model, NoisyClassifier)
    model.save_pretrained(tmp_path)
    again = NoisyClassifier.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(pictures(), 7), model(pictures(), 7))
    make_unet().save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="holds the model 'UNet'"):
        NoisyClassifier.from_pretrained(tmp_path / "unet")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        NoisyClassifier.from_pretrained(tmp_path / "nowhere")


def test_what_does_not_fit_is_refused() -> None:
    model = make_classifier()
    with pytest.raises(ValueError, match=r"image \(32, 32\), expected \(16, 16\)"):
        model(torch.zeros(1, 3, 32, 32), 0)
    with pytest.raises(ValueError, match="x has 1 channels, the model takes 3"):
        model(torch.zeros(1, 1, 16, 16), 0)
    with pytest.raises(ValueError, match="num_classes=None"):
        make_classifier(num_classes=None)
    with pytest.raises(ValueError, match="a classifier has none"):
        make_classifier(context_dim=8)
    with pytest.raises(ValueError, match="head_dim=48 does not divide channels=64"):
        AttentionPool(64, (2, 2), 3, head_dim=48)
