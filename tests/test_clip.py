"""CLIP on a small random model in a folder: nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastdiff import cli
from fastdiff.clip import CLIP
from fastdiff.data import open_dataset, scenes
from fastdiff.data.transforms import to_tensor

TEXTS = ["a red disc", "a green cross on a white background", "", "cross " * 40]


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    import huggingface_hub.constants as constants

    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setattr(constants, "HF_HUB_OFFLINE", True)
    yield
    patch.undo()


def save(folder: Path, **processor: Any) -> Path:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({word: i for i, word in enumerate(words)}, [])
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "initializer_range": 0.5}
    last = len(words) - 1
    text = {"vocab_size": len(words), "max_position_embeddings": 40, "eos_token_id": last}
    config = CLIPConfig(
        text_config={**sizes, **text, "bos_token_id": last - 1, "pad_token_id": last},
        vision_config={**sizes, "image_size": 24, "patch_size": 8},
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if processor:
        CLIPImageProcessorPil(
            size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, **processor
        ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    return save(path, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25])


def smooth(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 9 + k) * np.cos(y / (7 + k)) for k in range(3)]
    return Image.fromarray((127.5 + 100 * np.stack(waves, -1)).astype(np.uint8))


def fine(width: int, height: int) -> Image.Image:
    """Half-contrast noise, which only an antialiased filter scales down to nearly grey."""
    return Image.fromarray(np.random.default_rng(0).integers(64, 192, (height, width, 3), np.uint8))


def by_transformers(folder: Path, image: Image.Image, text: str) -> tuple[Tensor, Tensor]:
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    pixels = CLIPImageProcessorPil.from_pretrained(folder)(image, return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(folder)([text], return_tensors="pt")
    with torch.no_grad():
        out = CLIPModel.from_pretrained(folder).eval()(**pixels, **tokens)
    return out.image_embeds, out.text_embeds


@pytest.mark.parametrize(
    "image", [smooth(24, 24), smooth(64, 64), fine(130, 96), smooth(20, 33)], ids=lambda i: i.size
)
def test_features_are_those_of_transformers(folder: Path, image: Image.Image) -> None:
    clip = CLIP(folder)
    expected, expected_text = by_transformers(folder, image, TEXTS[1])
    pictures = to_tensor(np.array(image)[None])
    # transformers rounds the scaled picture to 8 bits.
    assert float((clip.encode_images(pictures) - expected).norm()) < 0.01
    torch.testing.assert_close(clip.encode_texts(TEXTS[1:2]), expected_text)
    cosine = float((expected * expected_text).sum())
    got = float(clip.score(pictures, TEXTS[1:2])[0])
    assert got == pytest.approx(max(0, 100 * cosine), abs=1)


def test_padding_changes_nothing_and_long_texts_are_cut(folder: Path) -> None:
    clip = CLIP(folder)
    together = clip.encode_texts(TEXTS)
    assert together.shape == (4, 12)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(4))
    for i, text in enumerate(TEXTS):
        torch.testing.assert_close(clip.encode_texts([text])[0], together[i])
    assert not together.requires_grad


def test_a_gradient_reaches_the_pixels_also_beyond_the_range(folder: Path) -> None:
    clip = CLIP(folder)
    target = clip.encode_texts(TEXTS[:1])
    x = 1.5 * to_tensor(np.array(smooth(32, 32))[None])
    x.requires_grad_()

    def objective(x: Tensor) -> Tensor:
        return (clip.encode_images(x) * target).sum()

    (gradient,) = torch.autograd.grad(objective(x), x)
    assert bool((gradient != 0).flatten(2).float().mean() > 0.99)
    direction = gradient / gradient.norm()
    step = 1e-2
    with torch.no_grad():
        change = (objective(x + step * direction) - objective(x - step * direction)) / (2 * step)
    assert float(change) == pytest.approx(float(gradient.norm()), rel=0.02)


def test_score_is_a_hundred_times_the_cosine_and_never_negative(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = CLIP(folder)
    pictures = to_tensor(np.stack([np.array(smooth(24, 24))] * 3))
    own = clip.encode_images(pictures)
    other = torch.nn.functional.normalize(own[0] + torch.linspace(-0.3, 0.3, 12), dim=0)
    texts = torch.stack([own[0], -own[0], other])
    monkeypatch.setattr(clip, "encode_texts", lambda captions: texts)
    expected = torch.tensor([100, 0, 100 * float(own[0] @ other)])
    torch.testing.assert_close(clip.score(pictures, TEXTS[:3]), expected)
    with pytest.raises(ValueError, match="3 pictures and 1 captions"):
        clip.score(pictures, ["a"])


def test_bfloat16_is_near_float32(folder: Path) -> None:
    pictures = to_tensor(np.array(smooth(24, 24))[None])
    wide, narrow = CLIP(folder), CLIP(folder, dtype="bfloat16")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert narrow.encode_images(pictures).dtype == torch.float32
        same = wide.encode_images(pictures)
    torch.testing.assert_close(same, wide.encode_images(pictures))
    assert float((narrow.encode_images(pictures) * same).sum()) > 0.99
    assert narrow.name != wide.name
    assert wide.device == torch.device("cpu")


def test_openais_normalisation_where_the_model_names_none(tmp_path: Path) -> None:
    path = save(tmp_path / "bare")
    ours, named = CLIP(path), CLIP(save(tmp_path / "full", do_normalize=True))
    picture = to_tensor(np.array(smooth(24, 24))[None])
    torch.testing.assert_close(ours.encode_images(picture), named.encode_images(picture))


def test_the_clip_score_of_samples_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    samples = scenes.write_folder(tmp_path / "samples", n=10, resolution=16)
    (samples / "settings.json").write_text(json.dumps({"guidance": 3.0}))
    command = ["fid", str(samples), "--clip", str(folder), "--batch-size", "4", "--device", "cpu"]
    cli.main([*command, "--count", "9"])
    result = json.loads((tmp_path / "samples.fid.json").read_text())
    clip, dataset = CLIP(folder), open_dataset(samples)
    pictures = to_tensor(np.stack([np.array(dataset[i].image) for i in range(9)]))
    expected = clip.score(pictures, [dataset[i].caption for i in range(9)])
    assert result["clip_score"] == pytest.approx(float(expected.mean()), rel=1e-4, abs=1e-4)
    assert result["clip"] == clip.name
    assert (result["count"], result["guidance"], result["steps"]) == (9, 3.0, None)


def test_errors(folder: Path, tmp_path: Path) -> None:
    clip = CLIP(folder)
    with pytest.raises(ValueError, match=r"pictures \(3, 24, 24\); expected"):
        clip.encode_images(torch.zeros(3, 24, 24))
    with pytest.raises(TypeError, match="sequence of strings"):
        clip.encode_texts("one")
    with pytest.raises(ValueError, match="no texts"):
        clip.encode_texts([])
    with pytest.raises(ValueError, match="bfloat16 or float32, got float16"):
        CLIP(folder, dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(OSError, match="cannot load 'no/such-clip'"):
        CLIP("no/such-clip")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ValueError, match="is a t5, not a clip"):
        CLIP(tmp_path)


def test_a_model_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = save(tmp_path / "clip")
    weights = load_file(path / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, \['visual_projection\.weight'\]"):
        CLIP(path)
    path = save(tmp_path / "mute")
    for file in path.glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match="no tokenizer"):
        CLIP(path)
