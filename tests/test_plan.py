"""Plans against figures worked out by hand, and against the libraries they speak of."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from fastdiff import cli, plan
from fastdiff.model_table import activation_bytes
from fastdiff.models import ASCENDConfig, IUViT, IUViTConfig
from fastdiff.plan import GPUS, T5_SHAPES, T5Shape, sent_bytes, states, t5_shape
from fastdiff.roofline import Chip
from fastdiff.training.config import OptimConfig, Recipe, TextConfig, TrainConfig, save

MODEL = IUViTConfig(image_size=16, patch_size=4, dim=32, layers=3, head_dim=16, context_dim=32)


def recipe(**train: Any) -> Recipe:
    given = {"batch_size": 64, "max_steps": 7200, "precision": "bf16", **train}
    return Recipe(
        model=MODEL,
        text=TextConfig(encoder="small", width=32, max_length=24),
        optim=OptimConfig(),
        train=TrainConfig(**given),
    )


@pytest.mark.parametrize(
    ("stage", "element", "expected"),
    [
        # weights, gradients, optimiser, average, buckets; in millions of bytes, P = 1e6, N = 8
        (0, 2, (2, 2, 12, 4, 0)),
        (1, 2, (2, 2, 1.5, 4, 1000)),
        (2, 2, (2, 0.25, 1.5, 4, 1000)),
        (3, 2, (2, 0.25, 1.5, 4, 1000)),  # so few are all gathered
        (0, 4, (4, 4, 8, 4, 0)),
        (2, 4, (4, 0.5, 1.5, 4, 2000)),
    ],
)
def test_states_worked_out_by_hand(stage: int, element: int, expected: tuple[float, ...]) -> None:
    held = states(1_000_000, 8, stage, element=element)
    found = (held.weights, held.gradients, held.optimizer, held.average, held.buckets)
    assert found == pytest.approx([1e6 * value for value in expected])
    assert held.total == pytest.approx(1e6 * sum(expected))


def test_stage_3_gathers_a_billion_parameters_at_most() -> None:
    assert states(4_000_000_000, 8, 3).weights == pytest.approx(2 * (0.5e9 + 1e9))


@pytest.mark.parametrize(
    ("stage", "element", "expected"),
    [(0, 2, 3e6), (1, 2, 9e6), (2, 2, 12e6), (3, 2, 19.5e6), (1, 4, 6e6), (3, 4, 33e6)],
)
def test_bytes_sent_worked_out_by_hand(stage: int, element: int, expected: float) -> None:
    # 3/4 of 1e6 parameters leave each of 4 ranks in a round; 3 micro-batches
    assert sent_bytes(1_000_000, 4, stage, 3, element=element) == pytest.approx(expected)
    assert sent_bytes(1_000_000, 1, stage, 3, element=element) == 0


def test_a_t5_worked_out_by_hand() -> None:
    shape = T5Shape(2, 3, 4, 5, 1, gated=False, vocabulary=7, buckets=8)
    assert shape.matrices == 4 * 2 * 12 + 2 * 2 * 5
    assert shape.parameters == 116 + 7 * 2 + 3 * 2 + 8 * 4
    assert shape.flops(10) == 10 * (2 * 116 + 4 * 10 * 12)


@pytest.mark.parametrize("name", ["t5-small", "google/t5-v1_1-xl"])
def test_t5_parameters_are_those_of_transformers(name: str) -> None:
    from transformers import T5Config, T5EncoderModel

    shape = T5_SHAPES[name]
    with torch.device("meta"):
        model = T5EncoderModel(
            T5Config(
                d_model=shape.width,
                d_kv=shape.head_dim,
                num_heads=shape.heads,
                d_ff=shape.hidden,
                num_layers=shape.layers,
                feed_forward_proj="gated-gelu" if shape.gated else "relu",
            )
        )
    assert shape.parameters == sum(p.numel() for p in model.parameters())


def test_a_t5_of_a_folder(tmp_path) -> None:
    values = {"d_model": 8, "d_kv": 2, "num_heads": 4, "d_ff": 16, "num_layers": 2}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**values, "vocab_size": 9, "feed_forward_proj": "gated-gelu"}))
    assert t5_shape(str(tmp_path)) == T5Shape(8, 2, 4, 16, 2, gated=True, vocabulary=9)
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="vocab_size"):
        t5_shape(str(tmp_path))
    with pytest.raises(ValueError, match="did you mean t5-11b"):
        t5_shape("t5-11B")


def test_the_largest_micro_batch_is_the_last_that_fits(monkeypatch) -> None:
    with torch.device("meta"):
        model = IUViT(MODEL)
    parameters = sum(p.numel() for p in model.parameters())
    held = states(parameters, 2, 2, element=4).total
    needed = held + activation_bytes(model, 4, dtype=torch.float32, text=24)

    def found(memory: float) -> int | None:
        total = (memory + plan.RESERVED_BYTES) / (1 - plan.LOST_SHARE)
        gpu = plan.GPU(Chip("small", 1e12, 1e14, 1e13), total, 1e11)
        monkeypatch.setitem(GPUS, "small", gpu)
        return plan.plan(recipe(precision="fp32"), "small", 2).fits[2].micro_batch

    assert found(needed + 1e3) == 4
    assert found(needed - 1e3) == 2  # a rank's share of 32 is taken in equal parts
    assert found(1e6) is None
    assert found(1e12) == 32


def test_times_worked_out_by_hand(monkeypatch) -> None:
    # Without FLOPs that matter: what is left is bytes over bandwidth.
    gpu = plan.GPU(Chip("small", 1e9, 1e30, 1e30), 1e12, 1e6)
    monkeypatch.setitem(GPUS, "small", gpu)
    found = plan.plan(recipe(zero=1), "small", 4, efficiency=0.5)
    step, P = found.step, found.parameters
    assert step is not None
    assert (step.micro_batch, step.micro_batches) == (16, 1)
    assert step.update == pytest.approx((28 * P / 4 + 12 * P) / 1e9 / 0.5)
    assert step.communication == pytest.approx(sent_bytes(P, 4, 1, 1) / 1e6)
    assert step.hours == pytest.approx(2 * step.seconds)  # 7200 steps
    assert step.images_per_s == pytest.approx(64 / step.seconds)

    slower = plan.plan(recipe(zero=1), "small", 4, efficiency=0.25).step
    assert slower is not None
    assert slower.compute == pytest.approx(2 * step.compute)
    assert slower.communication == step.communication
    again = plan.plan(recipe(zero=1, checkpointing=True), "small", 4, efficiency=0.5).step
    assert again is not None
    assert 1.2 * step.compute < again.compute < 1.6 * step.compute
    smaller = plan.plan(recipe(zero=2, micro_batch=4), "small", 4).step
    assert smaller is not None
    assert (smaller.micro_batch, smaller.micro_batches) == (4, 4)
    assert smaller.communication == pytest.approx(sent_bytes(P, 4, 2, 4) / 1e6)


def test_mfu_is_flops_over_time(monkeypatch) -> None:
    # Without bytes that matter, at full efficiency, alone: all of the time is products.
    monkeypatch.setitem(GPUS, "small", plan.GPU(Chip("small", 1e30, 1e9, 1e9), 1e12, 1e6))
    step = plan.plan(recipe(), "small", 1, efficiency=1.0).step
    assert step is not None
    assert step.mfu == pytest.approx(1.0, rel=1e-3)


def test_many_nodes_are_as_fast_as_their_network() -> None:
    one, two = (plan.plan(recipe(), "a100-40g", n).step for n in (8, 16))
    assert one is not None
    assert two is not None
    P = plan.plan(recipe(), "a100-40g", 8).parameters
    assert one.communication == pytest.approx(sent_bytes(P, 8, 1, 1) / 300e9)
    assert two.communication == pytest.approx(sent_bytes(P, 16, 1, 1) / 25e9)


def test_a_t5_beside_the_training_takes_memory_and_time() -> None:
    text = TextConfig(encoder="t5", name="t5-11b")
    model = dataclasses.replace(MODEL, context_dim=1024)
    online = dataclasses.replace(recipe(), text=text, model=model)
    data = dataclasses.replace(online.data, embeddings="features")
    beside = plan.plan(online, "a100-40g", 32)
    stored = plan.plan(dataclasses.replace(online, data=data), "a100-40g", 32)
    shape = T5_SHAPES["t5-11b"]
    assert beside.fits[1].states.text == 2 * shape.parameters
    assert stored.fits[1].states.text == 0
    assert beside.step is not None
    assert stored.step is not None
    assert stored.step.text == 0
    # two captions of 32 tokens: reading the weights takes longer than multiplying with them
    assert beside.step.text == pytest.approx(2 * shape.parameters / 1.555e12 / 0.5)
    assert any("t5-11b runs beside the training" in line for line in beside.assumptions)


def test_the_command_prints_and_reads_runs(tmp_path, capsys) -> None:
    save(recipe(), tmp_path / "recipe.yaml")
    command = ["plan", str(tmp_path), "--gpu", "a100-40g", "--count", "8"]
    cli.main(command)
    out = capsys.readouterr().out
    for words in ("ZeRO 3", "hours in all", "Taken for granted", "data sheet", "buckets of 5e8"):
        assert words in out
    cli.main([*command, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["count"] == 8
    assert [fit["stage"] for fit in found["fits"]] == [0, 1, 2, 3]
    assert found["step"]["hours"] > 0
    assert found["assumptions"]


def test_what_does_not_fit_is_said(monkeypatch) -> None:
    monkeypatch.setitem(GPUS, "small", plan.GPU(Chip("small", 1e12, 1e14, 1e13), 3e9, 1e11))
    found = plan.plan(recipe(), "small", 2)
    assert found.step is None
    assert "not one image fits" in plan.as_text(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--gpu", "a100"], "did you mean a100-"),
        (["dmeo", "--gpu", "a100-40g"], "did you mean demo"),
        (["demo", "--gpu", "a100-40g", "--count", "0"], "count=0, expected at least 1"),
        (["demo", "--gpu", "a100-40g", "--count", "7"], "does not divide train.batch_size=32"),
        (["demo", "--gpu", "a100-40g", "--efficiency", "1.5"], "efficiency=1.5"),
        (["demo", "--gpu", "a100-40g", "--tokens", "0"], "tokens=0"),
        (["demo", "--gpu", "a100-40g", "--network-gbit", "0"], "network_gbit=0"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        cli.main(["plan", *arguments])


def test_a_model_without_text_needs_no_encoder() -> None:
    model = ASCENDConfig(
        image_size=16,
        channels=16,
        depth=1,
        multipliers=(1, 2),
        attention_resolutions=(8,),
        head_dim=16,
        groups=8,
        window=4,
    )
    found = plan.plan(Recipe(model=model, train=TrainConfig(batch_size=8)), "h100-80g", 4)
    assert found.fits[1].states.text == 0
    assert found.step is not None
    assert not any("aptions" in line for line in found.assumptions)
