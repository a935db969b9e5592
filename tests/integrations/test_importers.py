"""Checkpoints of U-ViT, ADM and hana, made by plain networks of the same keys, in our models."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import plain_adm
import plain_uvit
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fastdiff
from fastdiff.cli import main
from fastdiff.integrations.importers import Options, import_checkpoint, read_checkpoint
from fastdiff.integrations.verify import verify

HERE = Path(__file__).parent
TIMES = torch.tensor([0.0, 3.5, 600.0])


def randomize(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * p[0].numel() ** -0.5 if p.ndim > 1 else 1 + 0.3 * noise)
            if p.ndim == 1 and name.endswith("bias"):
                p.sub_(1)
    return model.eval()


def uvit(**fields) -> nn.Module:
    defaults = {"img_size": 16, "patch_size": 4, "in_chans": 3, "embed_dim": 48, "depth": 4}
    return randomize(plain_uvit.UViT(**{**defaults, "num_heads": 3, **fields}))


def adm(**fields) -> nn.Module:
    defaults = {
        "image_size": 16,
        "in_channels": 3,
        "model_channels": 32,
        "out_channels": 3,
        "num_res_blocks": 2,
        "attention_resolutions": (2, 4),
        "channel_mult": (1, 2, 3),
        "num_head_channels": 16,
    }
    return randomize(plain_adm.UNetModel(**{**defaults, **fields}))


def write(model: nn.Module, path: Path) -> Path:
    torch.save(model.state_dict(), path)
    return path


def compare(ours: nn.Module, theirs: nn.Module, **extra) -> None:
    """Outputs and gradients by the image to 1e-5 of the largest."""
    x = torch.randn(3, ours.config.in_channels, *ours.config.sides).requires_grad_()
    names = {"text": "context"}
    outputs = [
        ours(x, TIMES, **{names.get(k, k): v for k, v in extra.items()}),
        theirs(x, TIMES, **extra),
    ]
    gradients = [torch.autograd.grad(y.square().mean(), x)[0] for y in outputs]
    for mine, plain in (outputs, gradients):
        assert (mine - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert outputs[1].std() > 0.1


UVIT = {
    "plain": {},
    "labels": {"num_classes": 5},
    "latent": {"in_chans": 4, "conv": False, "patch_size": 2},
}


@pytest.mark.parametrize("kind", UVIT)
def test_uvit(kind, tmp_path):
    theirs = uvit(**UVIT[kind])
    file = write(theirs, tmp_path / "nnet.pth")
    imported = import_checkpoint(file, Options(head_dim=16))
    assert imported.layout == "uvit"
    assert imported.complete, str(imported)
    assert imported.placed == len(theirs.state_dict())
    y = {"y": torch.tensor([0, 4, 2])} if kind == "labels" else {}
    compare(imported.model, theirs, **y)
    if kind == "labels":
        assert imported.model.config.num_classes == 5
        guided = import_checkpoint(file, Options(head_dim=16, null_label=True)).model
        assert guided.config.num_classes == 4
        x = torch.randn(3, 3, 16, 16)
        null = theirs(x, TIMES, y=torch.full((3,), 4))
        torch.testing.assert_close(guided(x, TIMES), null, rtol=1e-4, atol=1e-5)


def test_uvits_published_sizes_are_the_presets(tmp_path):
    with torch.device("meta"):
        theirs = plain_uvit.UViT(32, 2, 3, 512, 12, 8)
    state = {key: torch.zeros(value.shape) for key, value in theirs.state_dict().items()}
    torch.save(state, tmp_path / "cifar10_uvit_small.pth")
    imported = import_checkpoint(tmp_path / "cifar10_uvit_small.pth")
    assert imported.complete
    assert imported.model.config == fastdiff.models.PRESETS["uvit_s2_cifar10"].config


ADM = {
    "plain": {},
    "labels, learned variance": {"num_classes": 4, "out_channels": 6},
    "new order": {"use_new_attention_order": True},
    "half widths": {"channel_mult": (1, 1.5, 2), "model_channels": 64, "num_res_blocks": 1},
}


@pytest.mark.parametrize("kind", ADM)
def test_adm(kind, tmp_path):
    theirs = adm(**ADM[kind])
    order = "new" if kind == "new order" else None
    file = write(theirs, tmp_path / "16x16_diffusion.pt")
    imported = import_checkpoint(file, Options(head_dim=16, attention_order=order))
    assert imported.layout == "adm"
    assert imported.complete, str(imported)
    labelled = kind.startswith("labels")
    assert imported.model.config.learn_variance == labelled
    compare(imported.model, theirs, **({"y": torch.tensor([0, 3, 1])} if labelled else {}))


def test_hana(tmp_path):
    theirs = adm(text_width=160)
    # as its trainer wraps it
    state = {f"model.{key}": value for key, value in theirs.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "last.ckpt")
    imported = import_checkpoint(tmp_path / "last.ckpt", Options(image_size=16, head_dim=16))
    assert imported.layout == "hana"
    assert imported.complete, str(imported)
    text = torch.randn(3, 6, 160)
    compare(imported.model, theirs, text=text)
    # the pooled part of its null condition is exact: nothing behind the projection
    condition = imported.model.text
    assert imported.model.time_text.text(condition.null_pooled).abs().max() < 1e-5


def test_what_a_name_or_a_prefix_hides_is_found(tmp_path):
    theirs = uvit()
    state = {f"module.{key}": value for key, value in theirs.state_dict().items()}
    zeros = {key: torch.zeros_like(value) for key, value in state.items()}
    torch.save({"nnet": zeros, "ema": state, "step": 7}, tmp_path / "both.pth")
    with pytest.raises(ValueError, match=r"choose one of \['nnet', 'ema'\]"):
        import_checkpoint(tmp_path / "both.pth")
    found = import_checkpoint(tmp_path / "both.pth", Options(weights="ema", head_dim=16))
    compare(found.model, theirs)
    save_file(theirs.state_dict(), tmp_path / "nnet.safetensors")
    again = import_checkpoint(tmp_path / "nnet.safetensors", Options(head_dim=16))
    compare(again.model, theirs)


def test_keys_without_a_place_are_told(tmp_path, capsys):
    theirs = uvit()
    state = theirs.state_dict()
    state["mid_block.attn.qkv.bias"] = torch.zeros(144)
    state["time_embed.0.weight"] = torch.zeros(192, 48)
    state["norm.weight"] = torch.ones(7)
    del state["mid_block.norm1.bias"]
    torch.save(state, tmp_path / "nnet.pth")
    out = tmp_path / "out"
    command = ["convert", str(tmp_path / "nnet.pth"), str(out), "--head-dim", "16"]
    with pytest.raises(SystemExit, match="nothing was written"):
        main(command)
    told = capsys.readouterr().out
    assert "could not place: mid_block.attn.qkv.bias" in told
    assert "could not place: time_embed.0.weight" in told
    assert "could not place: norm.weight: (7,), but head.norm.weight is (48,)" in told
    assert "not in the file: mid_block.norm1.bias" in told
    assert not out.exists()
    main([*command, "--partial"])
    assert fastdiff.from_pretrained(out).config.dim == 48


class Evil:
    def __reduce__(self):
        return os.system, ("echo ran > ran.txt",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": uvit().state_dict(), "args": Evil()}, "nnet.pth")
    with pytest.raises(ValueError, match=r"holds more than tensors.*refused"):
        read_checkpoint("nnet.pth")
    with pytest.raises(SystemExit, match="refused"):
        main(["convert", "nnet.pth", "out"])
    assert not (tmp_path / "ran.txt").exists()
    (tmp_path / "noise.pth").write_bytes(b"no checkpoint at all")
    with pytest.raises(ValueError, match=r"no checkpoint at all|cannot be read"):
        read_checkpoint("noise.pth")
    (tmp_path / "noise.safetensors").write_bytes(b"no checkpoint at all")
    with pytest.raises(ValueError, match="no safetensors file"):
        read_checkpoint("noise.safetensors")


def test_what_cannot_be_imported_says_why(tmp_path):
    file = write(nn.Linear(2, 2), tmp_path / "other.pt")
    with pytest.raises(ValueError, match="holds no weights in the layout of uvit or hana or adm"):
        import_checkpoint(file)
    file = write(adm(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="give image_size"):
        import_checkpoint(file)
    with pytest.raises(ValueError, match="head_dim=16 and heads=2, expected one"):
        import_checkpoint(file, Options(image_size=16, head_dim=16, heads=2))
    text = {**uvit().state_dict(), "context_embed.weight": torch.zeros(48, 8)}
    torch.save(text, tmp_path / "text.pth")
    with pytest.raises(ValueError, match="one sequence with the patches"):
        import_checkpoint(tmp_path / "text.pth")
    with pytest.raises(FileNotFoundError):
        import_checkpoint(tmp_path / "absent.pth")


def checkout(folder: Path) -> Path:
    """Folders as those of U-ViT and guided-diffusion, with the plain networks in them."""
    for module, source in (
        ("libs/uvit.py", "plain_uvit.py"),
        ("guided_diffusion/unet.py", "plain_adm.py"),
    ):
        path = folder / "code" / module
        path.parent.mkdir(parents=True)
        (path.parent / "__init__.py").touch()
        shutil.copy(HERE / source, path)
    return folder / "code"


@pytest.mark.parametrize("order", ["legacy", "new"])
def test_adm_with_as_many_heads_at_every_level(order, tmp_path):
    theirs = adm(
        num_heads=4, num_head_channels=-1, channel_mult=(1, 2), attention_resolutions=(1, 2),
        use_new_attention_order=order == "new",
    )  # fmt: skip
    file = write(theirs, tmp_path / "128x128_diffusion.pt")
    imported = import_checkpoint(file, Options(image_size=16, attention_order=order))
    assert imported.complete, str(imported)
    assert imported.model.config.heads == 4
    compare(imported.model, theirs)
    assert verify(file, checkout(tmp_path), imported.options).same


def test_verify_confirms_the_right_weights(tmp_path, capsys):
    code = checkout(tmp_path)
    file = write(uvit(num_classes=3), tmp_path / "nnet.pth")
    main(["verify", str(file), "--code", str(code), "--head-dim", "16"])
    assert "the same: over 6 images" in capsys.readouterr().out
    file = write(
        adm(num_classes=4, out_channels=6, use_new_attention_order=True), tmp_path / "16x16.pt"
    )
    command = ["verify", str(file), "--code", str(code), "--head-dim", "16"]
    main([*command, "--attention-order", "new"])
    assert "the same" in capsys.readouterr().out


def test_verify_sees_a_difference(tmp_path, capsys):
    code = checkout(tmp_path)
    file = write(uvit(), tmp_path / "nnet.pth")
    source = code / "libs" / "uvit.py"
    changed = source.read_text().replace("F.gelu(self.fc1(x))", "F.relu(self.fc1(x))")
    assert changed != source.read_text()
    source.write_text(changed)
    with pytest.raises(SystemExit):
        main(["verify", str(file), "--code", str(code), "--head-dim", "16"])
    assert "NOT the same" in capsys.readouterr().out
    assert verify(file, code, Options(head_dim=16), tolerance=10.0).same

    with pytest.raises(SystemExit, match=r"no libs/uvit\.py"):
        main(["verify", str(file), "--code", str(tmp_path / "nowhere"), "--head-dim", "16"])
    file = write(adm(text_width=40), tmp_path / "16x16_hana.pt")
    with pytest.raises(ValueError, match="layout hana cannot be verified"):
        verify(file, code, Options(head_dim=16))
