"""What all families promise: the call, the null condition, dtypes, sizes, errors, learning."""

from __future__ import annotations

import pytest
import torch
from builders import make_ascend, make_iuvit, randomize

X = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
T = torch.tensor([0, 500, 999])
CONTEXT = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def text_model(make):
    return randomize(make(context_dim=24)).eval()


@torch.no_grad()
def test_time_in_every_accepted_form(make):
    model = randomize(make()).eval()
    expected = model(X, torch.full((3,), 7))
    for t in (7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7.0] * 3)):
        torch.testing.assert_close(model(X, t), expected, rtol=0, atol=0)
    assert not torch.allclose(model(X, 7.5), expected)
    with pytest.raises(ValueError, match=r"t has shape \(2,\), expected .* batch of 3"):
        model(X, torch.tensor([1, 2]))


@torch.no_grad()
def test_a_mask_row_of_false_and_no_context_are_the_same_null_condition(text_model):
    mask = torch.tensor([[True] * 5, [False] * 5, [True, True, False, False, False]])
    out = text_model(X, T, CONTEXT, context_mask=mask)
    null = text_model(X, T)
    torch.testing.assert_close(out[1], null[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out[0], null[0], atol=1e-3)
    other = CONTEXT.clone()
    other[1] += 1
    torch.testing.assert_close(text_model(X, T, other, context_mask=mask)[1], out[1])


@torch.no_grad()
def test_padding_of_the_text_does_not_matter(text_model):
    mask = torch.tensor([[True, True, True, False, False]]).expand(3, 5)
    short = text_model(X, T, CONTEXT[:, :3])
    torch.testing.assert_close(
        text_model(X, T, CONTEXT, context_mask=mask), short, rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_the_text_and_the_pooled_text_reach_the_output(text_model):
    out = text_model(X, T, CONTEXT)
    pooled = CONTEXT.mean(1)
    torch.testing.assert_close(text_model(X, T, CONTEXT, pooled=pooled), out, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(text_model(X, T, CONTEXT, pooled=pooled + 1), out, atol=1e-3)
    # the same mean in another arrangement: only attention sees it
    swapped = CONTEXT + torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0])[:, None]
    assert not torch.allclose(text_model(X, T, swapped, pooled=pooled), out, atol=1e-3)


def test_null_embeddings_learn_from_dropped_conditions(make):
    model = randomize(make(context_dim=24))
    mask = torch.tensor([[True] * 5, [False] * 5, [True] * 5])
    model(X, T, CONTEXT, context_mask=mask).square().mean().backward()
    assert model.text.null_context.grad.abs().sum() > 0
    assert model.text.null_pooled.grad.abs().sum() > 0


@torch.no_grad()
def test_labels(make):
    model = randomize(make(num_classes=10)).eval()
    y = torch.tensor([0, 3, 9])
    out = model(X, T, y=y)
    assert not torch.allclose(out[1], model(X, T, y=torch.tensor([0, 4, 9]))[1], atol=1e-3)
    torch.testing.assert_close(model(X, T), model(X, T, y=torch.full((3,), 10)))
    with pytest.raises(ValueError, match=r"y has shape \(1,\), expected \(3,\)"):
        model(X, T, y=y[:1])
    with pytest.raises(ValueError, match=r"y lies in 0\.\.11, expected labels 0\.\.9, or 10"):
        model(X, T, y=torch.tensor([0, 11, 3]))
    with pytest.raises(ValueError, match="num_classes=None"):
        make()(X, T, y=y)


@torch.no_grad()
def test_labels_and_text_together(make):
    model = randomize(make(num_classes=10, context_dim=24)).eval()
    y = torch.tensor([0, 3, 9])
    out = model(X, T, CONTEXT, y=y)
    for other in (model(X, T, CONTEXT), model(X, T, y=y), model(X, T)):
        assert not torch.allclose(out, other, atol=1e-3)


@torch.no_grad()
def test_learned_variance_doubles_the_channels(make):
    model = randomize(make(learn_variance=True)).eval()
    assert model(X, T).shape == (3, 6, 16, 16)
    assert randomize(make(in_channels=4, out_channels=2))(torch.randn(1, 4, 16, 16), 0).shape == (
        1,
        2,
        16,
        16,
    )
    with pytest.raises(ValueError, match="out_channels=0, expected a whole number >= 1"):
        make(out_channels=0)


@torch.no_grad()
def test_output_has_the_dtype_of_the_input(make):
    model = randomize(make(context_dim=24)).eval()
    expected = model(X, T, CONTEXT)
    model.bfloat16()
    out = model(X, T, CONTEXT)
    assert out.dtype == torch.float32
    assert model(X.bfloat16(), T, CONTEXT).dtype == torch.bfloat16
    assert (out - expected).square().mean() < 0.02 * expected.square().mean()


@torch.no_grad()
def test_a_picture_does_not_depend_on_its_batch(text_model):
    out = text_model(X, T, CONTEXT)
    one = text_model(X[1:2], T[1:2], CONTEXT[1:2])
    torch.testing.assert_close(out[1:2], one, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("sides", [(16, 24), (20, 36)], ids=str)
def test_images_that_are_not_square_or_that_windows_do_not_divide(make, sides):
    """A change of the picture in one place changes the output most in that place."""
    fields = {} if make is make_iuvit else {"attention_resolutions": (sides[0] // 2,)}
    model = randomize(make(image_size=sides, **fields)).eval()
    x = torch.randn(2, 3, *sides)
    other = x.clone()
    other[:, :, 8:12, 16:20] += 1
    change = (model(other, 5) - model(x, 5)).abs()
    assert change.shape == x.shape
    inside = change[:, :, 8:12, 16:20].mean()
    assert inside > 3 * (change.sum() - 16 * 6 * inside) / (change.numel() - 16 * 6)


@torch.no_grad()
def test_other_sizes_than_the_configured_one():
    x = torch.randn(2, 3, 24, 40)
    assert make_ascend()(x, 5).shape == x.shape
    with pytest.raises(ValueError, match=r"24x40, the model has positions for 16x16; .*=True"):
        make_iuvit()(x, 5)
    model = randomize(make_iuvit(resize_positions=True))
    assert model(x, 5).shape == x.shape


def test_wrong_images_are_refused_with_both_numbers(make):
    model = make()
    with pytest.raises(ValueError, match="x has 4 channels, the model takes 3"):
        model(torch.randn(1, 4, 16, 16), 0)
    with pytest.raises(ValueError, match=r"W=17 is not a multiple of \d"):
        model(torch.randn(1, 3, 16, 17), 0)
    with pytest.raises(ValueError, match=r"x is torch\.uint8, expected floating point"):
        model(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), 0)
    with pytest.raises(ValueError, match="3 dimensions"):
        model(torch.randn(3, 16, 16), 0)


def test_wrong_conditions_are_refused_with_both_numbers(make):
    model = make(context_dim=24)
    with pytest.raises(ValueError, match=r"\(3, 5, 23\), expected \(3, S, 24\)"):
        model(X, T, CONTEXT[..., :23])
    with pytest.raises(ValueError, match=r"context_mask is torch\.bool of shape \(3, 4\)"):
        model(X, T, CONTEXT, context_mask=torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"context_mask is torch\.float32"):
        model(X, T, CONTEXT, context_mask=torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"pooled has shape \(3, 7\), expected \(3, 24\)"):
        model(X, T, CONTEXT, pooled=torch.ones(3, 7))
    with pytest.raises(ValueError, match="without context"):
        model(X, T, context_mask=torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="context_dim=None"):
        make()(X, T, CONTEXT)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 0}, "patch_size=0, expected a whole number >= 1"),
        ({"image_size": (16, 16, 16)}, "expected one or two sides"),
        ({"patch_size": 5}, "patch_size=5 does not divide image side 16"),
        ({"layers": 4}, "layers=4, expected an odd number"),
        ({"dim": 72}, "head_dim=64 does not divide dim=72"),
        ({"dim": 64, "patch_size": 16}, "patch_size.2=256 does not divide dim=64"),
        ({"head": "none"}, "head='none'"),
    ],
)
def test_iuvit_config_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        make_iuvit(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 0}, "window=0, expected a whole number >= 1"),
        ({"image_size": 15}, "side 15 is not a multiple of 2"),
        ({"attention_resolutions": (7,)}, r"has 7, the levels have \[16, 8\]"),
        ({"groups": 7}, "groups=7 does not divide"),
        ({"head_dim": 48}, "head_dim=48 does not divide the 64 channels"),
        ({"channels": 30}, "channels=30 is not a multiple of 4"),
        ({"ffn": "linear"}, "ffn='linear'"),
    ],
)
def test_ascend_config_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        make_ascend(**fields)


def test_ascend_predicts_zero_and_its_swin_layers_are_the_identity_at_the_start():
    model = make_ascend()
    assert model(X, T).abs().max() == 0
    block = model.encoder.levels[1][0]
    x = torch.randn(2, 32, 8, 8).to(memory_format=torch.channels_last)
    out = block(x, torch.randn(2, 128))
    torch.testing.assert_close(out, block.width(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


@torch.no_grad()
def test_ascend_stays_channels_last(make):
    model = randomize(make_ascend()).eval()
    seen = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_hook(lambda m, i, o: seen.append((i[0], o)))
    model(X, T)
    assert len(seen) > 5
    for pair in seen:
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x in pair)


@torch.no_grad()
def test_every_skip_of_ascend_is_used_once():
    config = {"depth": 2, "multipliers": (1, 2, 2), "attention_resolutions": (8, 4)}
    model = make_ascend(**config)
    # the first convolution, 2 blocks a level, 2 down-samplings; 3 output blocks a level
    assert len(model.encoder.skip_channels) == len(model.decoder.blocks) == 1 + 3 * 2 + 2
    assert model(X, T).shape == X.shape


@pytest.mark.parametrize("fields", [{}, {"decoder": "swin"}, {"skips": "reduced"}], ids=str)
def test_the_decoder_reads_every_skip(fields):
    model = randomize(make_ascend(depth=2, **fields))
    emb = torch.randn(3, model.config.emb_dim)
    skips = [skip.detach().requires_grad_() for skip in model.encoder(X, emb, None)]
    grads = torch.autograd.grad(model.decoder(skips[-1].detach(), skips, emb, None).sum(), skips)
    assert all(grad.any() for grad in grads)


def test_dropout_acts_in_training_only():
    for model in (randomize(make_ascend(dropout=0.5)),):
        model.train()
        assert not torch.equal(model(X, T), model(X, T))
        model.eval()
        assert torch.equal(model(X, T), model(X, T))


@pytest.mark.parametrize(
    "model",
    [
        lambda: make_iuvit(image_size=8, patch_size=2),
        lambda: make_ascend(image_size=8, attention_resolutions=(4,)),
    ],
    ids=["iuvit", "ascend"],
)
def test_a_family_overfits_64_images(model):
    """Loss on fixed images, noise and times falls under a tenth of its start."""
    torch.manual_seed(0)
    network = model()
    x0 = torch.randn(64, 3, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3).clamp(-1, 1)
    noise, t = torch.randn_like(x0), torch.rand(64)
    x_t = (1 - t).sqrt()[:, None, None, None] * x0 + t.sqrt()[:, None, None, None] * noise
    optimizer = torch.optim.Adam(network.parameters(), lr=4e-3)
    losses = []
    for _ in range(200):
        loss = (network(x_t, t * 999) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if losses[-1] < 0.1 * losses[0]:
            break
    assert losses[-1] < 0.1 * losses[0], f"{losses[0]:.3f} -> {losses[-1]:.3f}"
