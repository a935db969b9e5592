"""Saving and loading: strict, whole, and nothing that runs code."""

from __future__ import annotations

import json

import pytest
import torch
from builders import randomize
from safetensors.torch import load_file, save_file

import fastdiff
from fastdiff.models import from_pretrained


def test_round_trip(make, tmp_path):
    model = randomize(make(context_dim=24)).eval()
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = fastdiff.from_pretrained(tmp_path)
    assert again.config == model.config
    assert not again.training
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(x, 3), model(x, 3))


def test_weights_keep_their_dtype(make, tmp_path):
    model = make().bfloat16()
    model.save_pretrained(tmp_path)
    assert {v.dtype for v in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert from_pretrained(tmp_path).dtype == torch.bfloat16


def test_all_misfits_are_listed_and_nothing_is_loaded(make, tmp_path):
    make().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    names = list(weights)
    del weights[names[0]]
    weights[names[1]] = torch.zeros(1, 2, 3)
    weights["stranger"] = torch.zeros(1)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit") as error:
        from_pretrained(tmp_path)
    for part in (f"missing: {names[0]}", f"shape of {names[1]}", "not in the model: stranger"):
        assert part in str(error.value)


def test_wrong_folders(make, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        from_pretrained(tmp_path)
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model": "os.system"}))
    with pytest.raises(ValueError, match=r"names the model 'os\.system', expected one of"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "strange": 1}))
    with pytest.raises(ValueError, match="unknown field 'strange'"):
        from_pretrained(tmp_path)
