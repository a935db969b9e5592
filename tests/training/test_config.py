"""Recipes as data: round trips, checks, and the command line over them."""

from __future__ import annotations

import dataclasses

import pytest
from tiny import ASCEND, IUVIT, tiny_recipe

from fastdiff.models import PRESETS
from fastdiff.recipes import get_recipe, list_recipes
from fastdiff.training.cli import parse_recipe
from fastdiff.training.config import from_dict, load, model_differences, save, to_dict
from fastdiff.training.engine import deepspeed_config, learning_rate, micro_batch_size


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_survives_being_saved(name, tmp_path):
    recipe = get_recipe(name)
    save(recipe, tmp_path / "recipe.yaml")
    assert load(tmp_path / "recipe.yaml") == recipe


def test_the_recipes_of_the_tables_are_the_tables():
    t2i = get_recipe("ascend_t2i_128")
    assert t2i.model == PRESETS["ascend_t2i_128"].config
    assert (t2i.train.batch_size, t2i.optim.lr, t2i.optim.betas) == (512, 1.2e-4, (0.9, 0.9999))
    assert (t2i.diffusion.schedule, t2i.diffusion.prediction) == ("cosine", "eps")
    assert (t2i.sample.steps, t2i.train.ema_decay, t2i.text.max_length) == (50, 0.9999, 256)
    cc12m = get_recipe("iuvit_cc12m64")
    assert cc12m.model == PRESETS["iuvit_cc12m64"].config
    assert (cc12m.train.batch_size, cc12m.optim.lr, cc12m.optim.betas) == (1024, 1e-4, (0.99, 0.99))
    assert (cc12m.diffusion.schedule, cc12m.sample.steps) == ("linear", 250)
    assert cc12m.train.max_steps == 150_000


def test_unknown_parts_are_refused(tmp_path):
    values = to_dict(tiny_recipe(tmp_path))
    with pytest.raises(ValueError, match=r"TrainConfig: unknown field 'max_step', did you mean"):
        from_dict({**values, "train": {"max_step": 3}})
    with pytest.raises(ValueError, match=r"unknown section 'trian', did you mean train"):
        from_dict({**values, "trian": {}})
    with pytest.raises(ValueError, match=r"unknown model 'UViT', did you mean IUViT"):
        from_dict({**values, "model": {"model": "UViT"}})
    with pytest.raises(ValueError, match=r"no recipe 'demos', did you mean demo"):
        get_recipe("demos")


def test_yaml_cannot_run_code(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("model: !!python/object/apply:os.mkdir [%s]\n" % (tmp_path / "made"))
    with pytest.raises(Exception, match="could not determine a constructor"):
        load(file)
    assert not (tmp_path / "made").exists()


def test_values_are_checked(tmp_path):
    recipe = tiny_recipe(tmp_path)
    with pytest.raises(ValueError, match=r"context_dim=32 differs from text\.width=64"):
        dataclasses.replace(recipe, text=dataclasses.replace(recipe.text, width=64))
    with pytest.raises(ValueError, match=r"train\.max_steps=0, expected >= 1"):
        tiny_recipe(tmp_path, max_steps=0)
    for changes in ({"micro_batch": -4}, {"sample_every": -1}, {"threads": 0}, {"keep": 0}):
        (name,) = changes
        with pytest.raises(ValueError, match=rf"train\.{name}=.*expected >="):
            tiny_recipe(tmp_path, **changes)
    with pytest.raises(ValueError, match=r"optim\.clip=0\.0, expected > 0"):
        dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, clip=0.0))
    with pytest.raises(ValueError, match=r"sample\.steps=2000, expected 1 to"):
        dataclasses.replace(recipe, sample=dataclasses.replace(recipe.sample, steps=2000))
    with pytest.raises(ValueError, match="square images"):
        dataclasses.replace(recipe, model=dataclasses.replace(IUVIT, image_size=(16, 32)))


def test_model_differences_name_the_fields(tmp_path):
    recipe = tiny_recipe(tmp_path)
    assert model_differences(recipe, tiny_recipe(tmp_path, max_steps=99, batch_size=4)) == []
    wide = dataclasses.replace(recipe, model=dataclasses.replace(IUVIT, dim=64))
    assert model_differences(wide, recipe) == ["model.dim: 32 in the checkpoint, 64 asked for"]
    other = dataclasses.replace(recipe, model=ASCEND)
    assert any(x.startswith("model.model: 'IUViT'") for x in model_differences(other, recipe))


def test_batches_divide_or_are_refused(tmp_path):
    recipe = tiny_recipe(tmp_path, batch_size=8, micro_batch=2)
    assert micro_batch_size(recipe, 1) == micro_batch_size(recipe, 4) == 2
    assert micro_batch_size(recipe, 8) == 1
    assert deepspeed_config(recipe, 2)["gradient_accumulation_steps"] == 2
    with pytest.raises(ValueError, match=r"batch_size=8 does not divide over 3 ranks"):
        micro_batch_size(recipe, 3)
    with pytest.raises(ValueError, match=r"micro_batch=3 does not divide the 8 images"):
        micro_batch_size(tiny_recipe(tmp_path, micro_batch=3), 1)


def test_learning_rate_is_a_function_of_the_step(tmp_path):
    recipe = tiny_recipe(tmp_path, max_steps=100)
    optim = dataclasses.replace(recipe.optim, lr=1.0, warmup=10)
    recipe = dataclasses.replace(recipe, optim=optim)
    assert [learning_rate(recipe, n) for n in (0, 4, 9, 50)] == pytest.approx([0.1, 0.5, 1, 1])
    cosine = dataclasses.replace(recipe, optim=dataclasses.replace(optim, decay="cosine"))
    assert learning_rate(cosine, 50) == pytest.approx(0.5)
    assert learning_rate(cosine, 99) < 0.001


def test_command_line(capsys):
    arguments = ["--local_rank=0", "--config", "demo_ascend", "--train.max-steps", "20"]
    name, recipe = parse_recipe(
        [*arguments, "--model.channels", "64", "--optim.clip", "None", "--data.path", "here"],
        default="demo",
        description="text",
    )
    assert name == "demo_ascend"
    assert (recipe.train.max_steps, recipe.model.channels) == (20, 64)
    assert (recipe.optim.clip, recipe.data.path) == (None, "here")
    assert recipe.diffusion == get_recipe("demo_ascend").diffusion
    assert parse_recipe([], default="demo", description="")[1] == get_recipe("demo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "demo_asc"], "did you mean demo_ascend"),
        (["--train.max-step", "3"], "--train.max-steps"),
        (["--model.dimm", "3"], "--model.dim"),
        (["--model.patch-size", "5"], "patch_size=5 does not divide image side 32"),
        (["--diffusion.prediction", "epsilon"], "eps"),
    ],
)
def test_command_line_errors_name_what_is_valid(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        parse_recipe(arguments, default="demo", description="")
    assert error.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err + captured.out
