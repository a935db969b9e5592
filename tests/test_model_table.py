"""The table of models: counts by hand, memory against what really is allocated, the README."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastdiff import cli, model_table, ops
from fastdiff.models import PRESETS, ASCENDConfig, IUViTConfig, UNetConfig, create_model
from fastdiff.models import __dict__ as models
from fastdiff_kernels import _native

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
CURE = "the README's table is what `fastdiff info --markdown` prints"

SMALL = {
    "IUViT": IUViTConfig(image_size=16, patch_size=2, dim=128, layers=5, context_dim=24),
    "ASCEND": ASCENDConfig(image_size=32, channels=32, depth=1, groups=8, head_dim=32),
    "UNet": UNetConfig(
        image_size=32, channels=32, depth=1, groups=8, head_dim=32, context_dim=24, dropout=0.1
    ),
}


@pytest.mark.skipif(not _native.available(), reason="the kernels' own allocations are compared")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", SMALL)
def test_activations_are_those_of_a_real_step(kind: str, checkpointing: bool) -> None:
    batch, config = 16, SMALL[kind]
    with torch.device("meta"):
        model = models[kind](config)
    planned = model_table.activation_bytes(
        model, batch, checkpointing=checkpointing, dtype=torch.float32, text=8
    )
    model = models[kind](config).set_checkpointing(checkpointing)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(model_table._let_go)
    context = None if config.context_dim is None else torch.randn(batch, 8, config.context_dim)
    x, t = torch.randn(batch, 3, *config.sides), torch.zeros(batch)
    with ops.backend("native"), model_table._Alive() as alive:
        model(x, t, context).sum().backward()
    assert planned == pytest.approx(alive.peak, rel=0.05)


def test_alive_counts_each_memory_once_until_it_is_freed() -> None:
    with model_table._Alive() as alive:
        a = torch.zeros(10, dtype=torch.float32)
        b = a.view(2, 5).t()
        assert alive.now == 40
        c = a + 1
        del a, c
        assert (alive.now, alive.peak) == (40, 80)
        del b
        assert (alive.now, alive.peak) == (0, 80)


def rows_of(text: str) -> dict[str, list[str]]:
    """A Markdown table's rows by their first cell."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {cells[0]: cells for cells in rows}


@pytest.mark.parametrize("name", ["iuvit_cifar10", "ascend_cifar10_swin_decoder", "unet_64"])
def test_a_row_of_the_readme(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["info", "--markdown", name])
    printed = capsys.readouterr().out
    assert len(rows_of(printed)) == 1
    assert printed.splitlines()[-1] in README, CURE


def test_the_readme_has_every_model_with_its_parameters() -> None:
    rows = rows_of(README)
    assert [name for name in rows if name.strip("`") in PRESETS] == [f"`{n}`" for n in PRESETS]
    for name, preset in PRESETS.items():
        count = f"{model_table.parameter_count(name) / 1e6:.1f}M"
        assert rows[f"`{name}`"][1:4] == [preset.source, count, preset.published], CURE


@pytest.mark.slow
def test_the_readmes_whole_table(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["info", "--markdown"])
    assert capsys.readouterr().out in README, CURE


def test_info_takes_names_and_patterns(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["info", "uvit_s4_celeba64", "uvit_s2*"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["model", "uvit_s2_cifar10", "uvit_s4_celeba64"]
    assert len(lines[0]) == len(lines[1]) == len(lines[2])
    with pytest.raises(SystemExit, match=r"no model 'uvit_s3', did you mean .*uvit_s2_cifar10"):
        cli.main(["info", "uvit_s3"])


def test_a_model_of_ones_own() -> None:
    with torch.device("meta"):
        model = create_model("iuvit_cifar10", layers=1)
    one = model_table.activation_bytes(model, 32)
    assert 1.9 * one < model_table.activation_bytes(model, 64) < 2.1 * one
