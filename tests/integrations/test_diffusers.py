"""Our backbones in diffusers' pipelines, and our pipeline under diffusers' schedulers."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from types import SimpleNamespace

import diffusers
import pytest
import torch
from gaussian import MEAN, STD, discrete_model
from torch import nn

import fastdiff
from fastdiff import diffusion
from fastdiff.integrations.diffusers import FastDiffModel, FastDiffPipeline
from fastdiff.models import IUViT, IUViTConfig

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

SMALL = {"channels": 32, "depth": 1, "head_dim": 32, "groups": 8, "window": 4, "image_size": 16}


@pytest.fixture(autouse=True)
def quiet():
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)
    diffusers.utils.logging.disable_progress_bar()


def randomize(model: nn.Module) -> nn.Module:
    """Zero-initialised layers hide mistakes behind them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 4
            p.copy_(torch.randn(p.shape, generator=generator) * fan_in**-0.5)
    return model.eval()


def make_ascend(**fields):
    fields = {**SMALL, "attention_resolutions": (8,), "multipliers": (1, 2), **fields}
    return randomize(fastdiff.create_model("ascend_cifar10", **fields))


def make_iuvit(**fields):
    fields = {"image_size": 8, "patch_size": 2, "dim": 32, "layers": 3, "head_dim": 16, **fields}
    return randomize(IUViT(IUViTConfig(**fields)))


def draw(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "output_type": "np", **options}
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipe(generator=generator, **options).images)


def test_a_saved_ddim_pipeline_draws_the_same_bits_in_another_process(tmp_path):
    unet = FastDiffModel.from_backbone(make_ascend())
    pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2"))
    torch.save(draw(pipe, batch_size=2), tmp_path / "here.pt")
    pipe.save_pretrained(tmp_path / "pipe")
    code = """
import sys, torch, diffusers
import fastdiff.integrations.diffusers
pipe = diffusers.DDIMPipeline.from_pretrained(sys.argv[1] + "/pipe")
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
images = pipe(batch_size=2, generator=generator, num_inference_steps=3, output_type="np").images
here = torch.load(sys.argv[1] + "/here.pt")
print(type(pipe.unet).__name__, here.std() > 0.05, torch.equal(torch.from_numpy(images), here))
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["FastDiffModel", "tensor(True)", "True"]
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["unet"] == ["fastdiff.integrations.diffusers", "FastDiffModel"]


def test_no_folder_of_this_module_is_named_like_a_pipeline_of_diffusers():
    # diffusers would write the pipeline's name for the module's and not find the class again
    names = FastDiffModel.__module__.split(".") + FastDiffPipeline.__module__.split(".")
    assert not {name for name in names if hasattr(diffusers.pipelines, name)}


@pytest.mark.parametrize("make", [make_ascend, make_iuvit])
def test_keys_weights_and_outputs_are_those_of_the_plain_model(make):
    plain = make()
    wrapped = FastDiffModel.from_backbone(plain)
    assert list(wrapped.state_dict()) == list(plain.state_dict())
    assert [p.data_ptr() for p in wrapped.parameters()] == [
        p.data_ptr() for p in plain.parameters()
    ]
    x, t = torch.randn(2, 3, *plain.config.sides), torch.tensor(7)
    expected = plain(x, t)
    assert torch.equal(wrapped(x, t).sample, expected)
    assert torch.equal(wrapped(x, t, return_dict=False)[0], expected)

    wrapped.to(torch.float64)
    assert plain.dtype == torch.float64
    assert not wrapped.train().eval().backbone.training
    again = FastDiffModel.from_config(wrapped.config)
    again.load_state_dict(plain.state_dict())
    assert again.backbone.config == plain.config


def test_layers_put_in_place_of_others_serve_both_faces():
    wrapped = FastDiffModel.from_backbone(make_iuvit())
    x = torch.randn(1, 3, 8, 8)
    wrapped.mid_block = wrapped.in_blocks[0]
    assert torch.equal(wrapped(x, 3).sample, wrapped.backbone(x, 3))
    assert wrapped.backbone.mid_block is wrapped.in_blocks[0]


def test_conditions_reach_the_model_by_diffusers_names():
    plain = make_iuvit(context_dim=24, num_classes=5)
    wrapped = FastDiffModel.from_backbone(plain)
    x, context = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 24)
    mask, y = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]), torch.tensor([1, 4])
    out = wrapped(
        x, 3, encoder_hidden_states=context, encoder_attention_mask=mask, class_labels=y
    ).sample
    assert torch.equal(out, plain(x, 3, context, context_mask=mask.bool(), y=y))
    assert not torch.equal(out, plain(x, 3, context, y=y))
    with pytest.raises(ValueError, match="cross_attention_kwargs has"):
        wrapped(x, 3, cross_attention_kwargs={"scale": 0.5})
    with pytest.raises(ValueError, match="no bias"):
        wrapped(x, 3, encoder_hidden_states=context, encoder_attention_mask=mask[:, None])


def test_gradient_checkpointing_by_diffusers_switch():
    wrapped = FastDiffModel.from_backbone(make_iuvit()).train()
    x = torch.randn(2, 3, 8, 8)

    def gradients():
        wrapped.zero_grad()
        wrapped(x, 3).sample.square().sum().backward()
        return [p.grad.clone() for p in wrapped.parameters() if p.grad is not None]

    kept = gradients()
    wrapped.enable_gradient_checkpointing()
    assert wrapped.is_gradient_checkpointing
    assert all(map(torch.equal, gradients(), kept))
    wrapped.disable_gradient_checkpointing()
    assert not wrapped.is_gradient_checkpointing


def test_wrong_configurations_are_refused():
    with pytest.raises(ValueError, match="model='Unet'"):
        FastDiffModel(model="Unet")
    with pytest.raises(ValueError, match="sample_size=64, but fields gives 8"):
        FastDiffModel(model="IUViT", fields={"image_size": 8}, sample_size=64)


def test_ddpm_pipeline_takes_a_learned_variance():
    unet = FastDiffModel.from_backbone(make_iuvit(learn_variance=True))
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    first = draw(diffusers.DDPMPipeline(unet, scheduler))
    ours = draw(FastDiffPipeline(unet, scheduler))
    assert torch.equal(first, ours)
    # any other scheduler gets the prediction alone
    assert draw(FastDiffPipeline(unet, diffusers.DDIMScheduler())).shape == (1, 8, 8, 3)


def test_our_pipeline_saves_loads_and_guides_as_the_samplers_do(tmp_path):
    plain = make_iuvit(context_dim=24)
    pipe = FastDiffPipeline(
        FastDiffModel.from_backbone(plain),
        diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False),
    )
    pipe.save_pretrained(tmp_path)
    pipe = FastDiffPipeline.from_pretrained(tmp_path)
    context, mask = torch.randn(2, 4, 24), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    x = torch.randn(2, 3, 8, 8)
    guided = diffusion.classifier_free(plain, 3.0, context=context, context_mask=mask)
    process = diffusion.DiffusionProcess(diffusion.linear_schedule())
    images = draw(
        pipe,
        prompt_embeds=context,
        prompt_mask=mask,
        guidance_scale=3.0,
        latents=x,
        num_inference_steps=5,
    )
    ours = diffusion.sample_ddim(guided, x, process, steps=5, clip_x0=False)
    ours = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(images, ours, rtol=0, atol=1e-4)


def test_our_pipeline_reads_prompts_with_a_t5(tmp_path):
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    config = T5Config(vocab_size=384, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    pipe = FastDiffPipeline(
        FastDiffModel.from_backbone(make_iuvit(context_dim=24)),
        diffusers.DDIMScheduler(),
        ByT5Tokenizer(),
        T5EncoderModel(config).eval(),
    )
    pipe.save_pretrained(tmp_path)
    both = [FastDiffPipeline.from_pretrained(tmp_path), pipe]
    first, again = (draw(p, prompt=["a red disc", "a cross"], guidance_scale=2.0) for p in both)
    assert torch.equal(first, again)
    embeds, mask = pipe.encode(["a red disc", "a cross"])
    assert mask.sum(1).tolist() == [11, 8]
    assert torch.equal(
        first, draw(pipe, prompt_embeds=embeds, prompt_mask=mask, guidance_scale=2.0)
    )
    assert not torch.equal(first, draw(pipe, prompt=["a red disc", "a ring"], guidance_scale=2.0))


def test_labels_are_guided():
    plain = make_iuvit(num_classes=4)
    pipe = FastDiffPipeline(FastDiffModel.from_backbone(plain), diffusers.DDIMScheduler())
    x, y, t = torch.randn(2, 3, 8, 8), torch.tensor([0, 3]), torch.tensor(9)
    guided = pipe._guided(2.5, None, None, y)(x, t)
    null = plain(x, t, y=torch.tensor([4, 4]))
    torch.testing.assert_close(guided, null + 2.5 * (plain(x, t, y=y) - null))
    assert draw(pipe, class_labels=[0, 3], guidance_scale=2.5).shape == (2, 8, 8, 3)
    with pytest.raises(ValueError, match="without a prompt or labels"):
        draw(pipe, guidance_scale=2.5)
    with pytest.raises(ValueError, match=r"batches \[2, 3\]"):
        draw(pipe, class_labels=[0, 3], batch_size=3)


class PerfectModel(nn.Module):
    """The best network for Gaussian data, behind the call of a FastDiffModel."""

    dtype, device = torch.float64, torch.device("cpu")

    def __init__(self, alpha_bar, prediction):
        super().__init__()
        self.model = discrete_model(alpha_bar, prediction)
        self.config = SimpleNamespace(sample_size=4, in_channels=3)

    def forward(self, x, t, return_dict=True):
        return (self.model(x, t),)


DETERMINISTIC = {
    "DDIMScheduler": {"timestep_spacing": "trailing", "clip_sample": False},
    "PNDMScheduler": {"skip_prk_steps": True},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "DEISMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_every_kind_of_scheduler_reaches_the_exact_sample(name, prediction):
    types = {"eps": "epsilon", "v": "v_prediction"}
    scheduler = getattr(diffusers, name)(prediction_type=types[prediction], **DETERMINISTIC[name])
    alpha_bar = scheduler.alphas_cumprod.double()
    pipe = FastDiffPipeline(PerfectModel(alpha_bar, prediction), scheduler)
    x = torch.linspace(-2, 2, 48, dtype=torch.float64).reshape(1, 3, 4, 4)
    images = draw(pipe, latents=x, num_inference_steps=100, output_type="np")
    # x_T has variance 1, the process a^2 STD^2 + s^2, next to the same at T
    a2 = alpha_bar[-1]
    z = (x - a2.sqrt() * MEAN) / (a2 * STD**2 + 1 - a2).sqrt()
    exact = ((MEAN + STD * z) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float()
    assert (images - exact).abs().max() < 0.02


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler"])
def test_stochastic_schedulers_reach_the_distribution(name):
    options = {"clip_sample": False} if name == "DDPMScheduler" else {}
    scheduler = getattr(diffusers, name)(**options)
    unet = PerfectModel(scheduler.alphas_cumprod.double(), "eps")
    unet.config.sample_size = 64
    pipe = FastDiffPipeline(unet, scheduler)
    images = draw(pipe, num_inference_steps=200, batch_size=2).double() * 2 - 1
    inside = torch.distributions.Normal(MEAN, STD)
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    expected = inside.icdf(quantiles)
    # 200 of 1000 steps, at the posterior's variance: the spread comes out a little narrow
    assert (images.flatten().quantile(quantiles) - expected).abs().max() < 0.03


@pytest.mark.parametrize(
    "scheduler", [diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.EDMEulerScheduler()]
)
def test_schedulers_of_another_process_are_refused(scheduler):
    with pytest.raises(ValueError, match="another process"):
        FastDiffPipeline(FastDiffModel.from_backbone(make_iuvit()), scheduler)
