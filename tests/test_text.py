"""Text encoders on small random T5s saved into a folder: nothing is downloaded."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff.text import (
    SmallTextConfig,
    SmallTextEncoder,
    T5TextEncoder,
    TextFeatures,
    length_buckets,
    t5_label,
)

CAPTIONS = [
    "a green cross on a white background at the top left",
    "a red disc on a black background in the centre",
    "a blue ring",
]


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    import huggingface_hub.constants as constants

    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setattr(constants, "HF_HUB_OFFLINE", True)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ByT5 (the T5 whose tokenizer has no vocabulary file), as transformers saves it."""
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("byt5")
    torch.manual_seed(0)
    config = T5Config(vocab_size=384, d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=3)
    T5EncoderModel(config).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole_t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole T5, decoder too, with a tokenizer.json, as most published ones are."""
    from transformers import PreTrainedTokenizerFast, T5Config, T5Model

    folder = tmp_path_factory.mktemp("t5")
    small = SmallTextEncoder.from_captions(CAPTIONS, width=8)
    PreTrainedTokenizerFast(
        tokenizer_object=small._tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5Model(config).save_pretrained(folder)
    return folder


def small(**sizes: int) -> SmallTextEncoder:
    torch.manual_seed(0)
    return SmallTextEncoder.from_captions(CAPTIONS, width=32, **sizes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_t5_by_folder(t5_folder: Path, dtype: Any) -> None:
    encoder = T5TextEncoder(t5_folder, dtype=dtype)
    context, mask = encoder.encode(["ab", "a longer caption", ""])
    assert encoder.width == 24
    assert context.shape == (3, 17, 24)
    assert context.dtype == getattr(torch, dtype)
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [3, 17, 1]
    assert not context.requires_grad
    assert not context.is_inference()
    assert bool((context[~mask] == 0).all())
    assert bool(context.isfinite().all())
    assert dtype in encoder.name
    assert encoder.device == torch.device("cpu")


def test_t5_is_what_transformers_computes(t5_folder: Path) -> None:
    from transformers import ByT5Tokenizer, T5EncoderModel

    context, _ = T5TextEncoder(t5_folder, dtype="float32").encode(["a blue ring"])
    ids = ByT5Tokenizer()(["a blue ring"], return_tensors="pt").input_ids
    model = T5EncoderModel.from_pretrained(t5_folder).eval()
    with torch.no_grad():
        expected = model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(context, expected)


def test_t5_bf16_is_near_float32(t5_folder: Path) -> None:
    wide = T5TextEncoder(t5_folder, dtype="float32").encode(CAPTIONS).context
    narrow = T5TextEncoder(t5_folder, dtype="bfloat16").encode(CAPTIONS).context
    assert float((wide - narrow.float()).norm() / wide.norm()) < 0.03


def test_t5_ignores_the_callers_autocast(t5_folder: Path) -> None:
    encoder = T5TextEncoder(t5_folder, dtype="float32")
    plain = encoder.encode(CAPTIONS).context
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoder.encode(CAPTIONS).context, plain)


def test_t5_drops_the_decoder_of_a_whole_model(whole_t5_folder: Path) -> None:
    from transformers import T5Model

    encoder = T5TextEncoder(whole_t5_folder, dtype="float32")
    ids, mask = encoder.tokenize(["a blue zebra", ""])
    # "a blue <unk> </s>" and "</s>".
    assert ids[0, 2:].tolist() == [2, 1]
    assert ids[1].tolist() == [1, 0, 0, 0]
    expected = T5Model.from_pretrained(whole_t5_folder).eval().encoder(ids, mask)
    context = encoder(ids, mask)
    torch.testing.assert_close(context[mask], expected.last_hidden_state.detach()[mask])


def test_paper_text_mode_pads_with_zeros_and_masks_nothing(t5_folder: Path) -> None:
    paper = T5TextEncoder(t5_folder, dtype="float32", paper_text_mode=True).encode(CAPTIONS)
    masked = T5TextEncoder(t5_folder, dtype="float32").encode(CAPTIONS)
    length = masked.context.shape[1]
    assert paper.context.shape == (3, 256, 24)
    assert bool(paper.mask.all())
    # T5 itself still does not look at the padding.
    torch.testing.assert_close(paper.context[:, :length], masked.context, atol=1e-5, rtol=1e-5)
    assert bool((paper.context[:, length:] == 0).all())
    # So the models' masked mean is hana's mean over all 256 positions.
    torch.testing.assert_close(
        paper.context.mean(1), masked.context.sum(1) / 256, atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("kind", ["t5", "small"])
def test_features_do_not_depend_on_batch_mates(t5_folder: Path, kind: str) -> None:
    encoder = T5TextEncoder(t5_folder, dtype="float32") if kind == "t5" else small()
    together = encoder.encode(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        alone = encoder.encode([caption])
        assert bool(alone.mask.all())
        torch.testing.assert_close(
            together.context[row, together.mask[row]], alone.context[0], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("kind", ["t5", "small"])
def test_a_long_caption_is_cut_and_keeps_its_end(t5_folder: Path, kind: str) -> None:
    encoder = T5TextEncoder(t5_folder, max_length=5) if kind == "t5" else small(max_length=5)
    assert encoder.max_length == 5
    ids, mask = encoder.tokenize(CAPTIONS)
    assert ids.shape == (3, 5)
    assert ids.dtype == torch.int64
    assert ids[0, -1] == 1
    assert 1 not in ids[0, :-1]
    assert bool(mask[0].all())


@pytest.mark.parametrize("kind", ["t5", "small"])
def test_bad_captions_are_refused(t5_folder: Path, kind: str) -> None:
    encoder = T5TextEncoder(t5_folder) if kind == "t5" else small()
    with pytest.raises(TypeError, match="list of strings, got one string"):
        encoder.encode("a blue ring")
    with pytest.raises(ValueError, match="must not be empty"):
        encoder.encode([])
    with pytest.raises(TypeError, match="must be strings, got NoneType"):
        encoder.encode(["a", None])  # type: ignore[list-item]


def test_rows_are_grouped_by_the_length_they_need() -> None:
    lengths = [5, 32, 33, 64, 65, 130, 1, 0]
    mask = torch.arange(140) < torch.tensor(lengths).unsqueeze(1)
    found = [(rows.tolist(), length) for rows, length in length_buckets(mask)]
    assert found == [([0, 1, 6, 7], 32), ([2, 3], 64), ([4], 65), ([5], 130)]
    # Valid positions need not stand in front.
    gap = torch.zeros(1, 40, dtype=torch.bool)
    gap[0, 36] = True
    assert [length for _, length in length_buckets(gap)] == [37]


def test_padding_is_not_computed(t5_folder: Path) -> None:
    captions = ["a " * 100, *["a blue ring"] * 7]
    encoder = T5TextEncoder(t5_folder, dtype="float32", paper_text_mode=True)
    shapes: list[tuple[int, ...]] = []
    encoder._model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    context, _ = encoder.encode(captions)
    assert shapes == [(7, 12), (1, 201)]
    assert context.shape == (8, 256, 24)
    for row, caption in enumerate(captions):
        alone = T5TextEncoder(t5_folder, dtype="float32").encode([caption]).context[0]
        torch.testing.assert_close(context[row, : len(alone)], alone, atol=1e-5, rtol=1e-5)


def test_a_label_is_the_same_on_every_machine(t5_folder: Path) -> None:
    encoder = T5TextEncoder(t5_folder, max_length=77)
    assert encoder.label == f"t5:{t5_folder.name}@main:bfloat16:77"
    assert t5_label("google/t5-v1_1-xxl", "abc", "float32", 256) == "t5:t5-v1_1-xxl@abc:float32:256"
    assert t5_label("/mnt/t5-v1_1-xxl/", "abc", "float32", 256) == t5_label(
        "google/t5-v1_1-xxl", "abc", "float32", 256
    )
    assert encoder.commit == ""


def test_a_digest_tells_weights_apart(t5_folder: Path) -> None:
    narrow, wide = (T5TextEncoder(t5_folder, dtype=d) for d in ("bfloat16", "float32"))
    assert narrow.weights == wide.weights
    other = T5TextEncoder(t5_folder, dtype="float32")
    other._model.encoder.final_layer_norm.weight[3] += 0.1
    assert other.weights != wide.weights


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    from fastdiff.data import scenes

    return scenes.write_shards(tmp_path / "shards", n=12, resolution=8, seed=1, shard_size=4)


def test_embed_text_stores_what_the_encoder_gives(
    t5_folder: Path,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fastdiff import cli
    from fastdiff.data import open_dataset

    (shards / "00009.tar").write_bytes(b"rotten")
    command = ["embed-text", str(shards), str(tmp_path / "text"), "--encoder", str(t5_folder)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        cli.main(command)
    out = capsys.readouterr().out
    assert "00000.tar: 4 captions" in out
    assert "2 shards written" in out
    assert "1 shards written" in out
    assert "00009.tar has no text features: not a tar file" in out
    encoder = T5TextEncoder(t5_folder)
    dataset = open_dataset(shards, embeddings=tmp_path / "text", encoder=encoder.label)
    for i in range(12):
        sample = dataset[i]
        alone = encoder.encode([sample.caption]).context[0]
        torch.testing.assert_close(sample.context, alone, atol=0.03, rtol=0.02)
    with pytest.raises(SystemExit, match=r"of t5:byt5.*:256, not of t5:byt5.*:9; give another"):
        cli.main([*command, "--max-length", "9"])
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    (tmp_path / "none").mkdir()
    with pytest.raises(SystemExit, match=r"embed-text: open_dataset: no data in .*none"):
        cli.main(["embed-text", str(tmp_path / "none"), str(tmp_path / "text")])


def test_float16_is_refused_with_the_reason(t5_folder: Path) -> None:
    with pytest.raises(ValueError, match="got float16; T5's activations overflow float16 to NaN"):
        T5TextEncoder(t5_folder, dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        T5TextEncoder(t5_folder, max_length=0)


@pytest.mark.parametrize("name", ["t5-11b", "nobody/nothing", "no/such/folder"])
def test_a_model_that_cannot_be_had_says_how(name: str) -> None:
    with pytest.raises(OSError, match=f"cannot load '{name}'. Give a folder that holds"):
        T5TextEncoder(name)


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="is a bert, not a t5"):
        T5TextEncoder(tmp_path)
    small().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no config\.json of a transformers model"):
        T5TextEncoder(tmp_path)


def test_a_folder_without_its_tokenizer_is_refused(t5_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((t5_folder / name).read_bytes())
    with pytest.raises(ValueError, match="has no tokenizer, or one without words"):
        T5TextEncoder(tmp_path)


def test_a_checkpoint_with_missing_weights_is_refused(t5_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in t5_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.final_layer_norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights .*encoder\.final_layer_norm\.weight"):
        T5TextEncoder(tmp_path)


def test_a_tokenizer_without_an_end_token_is_refused(whole_t5_folder: Path, tmp_path: Path) -> None:
    for file in whole_t5_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    encoder = T5TextEncoder(tmp_path)
    with pytest.raises(ValueError, match="no token for an empty caption"):
        encoder.encode(["a blue ring", ""])


def test_the_vocabulary_is_the_captions_words() -> None:
    encoder = small()
    words = set(" ".join(CAPTIONS).split())
    assert set(encoder.vocabulary) == words | {"<pad>", "</s>", "<unk>"}
    shuffled = SmallTextEncoder.from_captions(reversed(CAPTIONS), width=32)
    assert shuffled.vocabulary == encoder.vocabulary
    assert shuffled.name == encoder.name
    two = SmallTextEncoder.from_captions(CAPTIONS, width=32, max_words=2)
    assert set(two.vocabulary) == {"<pad>", "</s>", "<unk>", "a", "background"}
    assert two.name != encoder.name


def test_words_are_lower_cased_and_unknown_ones_map_to_unk() -> None:
    encoder = small()
    ids, mask = encoder.tokenize(["A  Green, purple ring", "", "</s> <pad>"])
    word = encoder.vocabulary
    assert ids[0].tolist() == [word["a"], word["green"], 2, 2, word["ring"], 1, 0]
    assert ids[1].tolist() == [1, 0, 0, 0, 0, 0, 0]
    # The text of a special token is text, not the token.
    assert ids[2].tolist() == [2, 2, 2, 2, 2, 2, 1]
    assert mask.sum(1).tolist() == [6, 1, 7]
    asked = ["A  Green, purple ring", "a Purple box", "a ring"]
    assert encoder.unknown_words(asked) == [",", "purple", "Purple", "box"]


def test_small_trains_every_parameter() -> None:
    encoder = small()
    out = encoder.encode(CAPTIONS)
    assert isinstance(out, TextFeatures)
    assert out.context.shape == (3, 12, 32)
    weight = torch.randn(out.context.shape, generator=torch.Generator().manual_seed(0))
    (out.context * weight).sum().backward()
    for name, param in encoder.named_parameters():
        assert param.grad is not None, name
        assert bool(param.grad.abs().sum() > 0), name
    # One embedding, not the two tied ones of a whole T5.
    addresses = [value.data_ptr() for value in encoder.state_dict().values()]
    assert len(set(addresses)) == len(addresses)


def test_small_tells_captions_apart_after_training() -> None:
    encoder = small()
    head = torch.nn.Linear(32, len(CAPTIONS))
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(40):
        context, mask = encoder.encode(CAPTIONS)
        pooled = context.sum(1) / mask.sum(1, keepdim=True)
        loss = torch.nn.functional.cross_entropy(head(pooled), torch.arange(3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_round_trip_is_bit_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    encoder = small(layers=1, heads=2, max_length=9).to(dtype)
    encoder.save_pretrained(tmp_path / "text")
    files = sorted(file.name for file in (tmp_path / "text").iterdir())
    assert files == ["config.json", "model.safetensors", "tokenizer.json"]
    again = SmallTextEncoder.from_pretrained(tmp_path / "text")
    assert again.config == encoder.config
    assert again.name == encoder.name
    for one, other in zip(encoder.encode(CAPTIONS), again.encode(CAPTIONS), strict=True):
        assert torch.equal(one, other)
    for key, value in encoder.state_dict().items():
        assert again.state_dict()[key].dtype == dtype
        assert torch.equal(again.state_dict()[key], value)
    assert all(param.requires_grad for param in again.parameters())


def test_small_loading_is_strict(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def rewrite(**changes: object) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))

    rewrite(layers=3)
    with pytest.raises(ValueError, match=r"do not fit config.json, encoder.block.2.*got None"):
        SmallTextEncoder.from_pretrained(tmp_path)
    rewrite(depth=3)
    with pytest.raises(ValueError, match=r"unknown fields \['depth'\]"):
        SmallTextEncoder.from_pretrained(tmp_path)
    rewrite(format="other")
    with pytest.raises(ValueError, match="got 'other'"):
        SmallTextEncoder.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        SmallTextEncoder.from_pretrained(tmp_path)


def test_small_config_is_checked() -> None:
    with pytest.raises(ValueError, match="heads=5 does not divide width=32"):
        SmallTextConfig(width=32, heads=5)
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        SmallTextConfig(layers=0)
    with pytest.raises(ValueError, match="hold no word"):
        SmallTextEncoder.from_captions(["", "  "])


def test_importing_text_imports_neither_transformers_nor_tokenizers() -> None:
    code = (
        "import sys, fastdiff.text; "
        "print([m for m in ('transformers', 'tokenizers', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True
    )
    assert done.stdout.strip() == "[]"
