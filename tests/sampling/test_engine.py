"""The engine: noise by seeds, the same pictures in every batch, nothing done twice."""

from __future__ import annotations

import pytest
import small_models as small
import torch

from fastdiff.diffusion import classifier_free, sample_ancestral, sample_ddim
from fastdiff.nn import MHCA
from fastdiff.sampling import (
    SAMPLERS,
    Engine,
    GraphedModel,
    PhiloxNoise,
    SamplerConfig,
    seed_tensor,
    starting_noise,
)

SEEDS = range(100, 164)


def seen_inputs(model):
    """What the network is called with, (x, t) each time."""
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append((args[0].clone(), args[1].clone())))
    return seen


def draw_in_batches(engine, batch, context, mask):
    parts = [slice(i, min(i + batch, 64)) for i in range(0, 64, batch)]
    return torch.cat(
        [engine.draw(SEEDS[p], context=context[p], context_mask=mask[p]) for p in parts]
    )


def test_pictures_do_not_depend_on_the_batch():
    model = small.iuvit(context_dim=small.WIDTH, layers=1)
    context, mask = small.text(64)
    engine = Engine(model, small.process(), SamplerConfig(steps=5, eta=1.0), guidance=2.0)
    seen = seen_inputs(model)
    drawn, started = {}, {}
    for batch in (64, 1, 7):
        seen.clear()
        drawn[batch] = draw_in_batches(engine, batch, context, mask)
        first = [x[: len(x) // 2] for x, t in seen if t[0] == max(int(t[0]) for _, t in seen)]
        started[batch] = torch.cat(first)
    for batch in (1, 7):
        assert torch.equal(started[batch], started[64])
        assert (drawn[batch] - drawn[64]).abs().max() < 1e-4
        levels = [((drawn[b].clamp(-1, 1) + 1) * 127.5).round() for b in (batch, 64)]
        assert (levels[0] - levels[1]).abs().max() <= 1
    assert torch.equal(started[64], starting_noise(seed_tensor(SEEDS), (3, 8, 8)))
    assert drawn[64].std(0).min() > 1e-3  # the pictures differ


def test_step_noise_does_not_depend_on_the_batch_and_no_step_repeats_another():
    seeds = seed_tensor([*SEEDS, 2**64 - 1])
    whole = [PhiloxNoise(seeds)(i, (65, 3, 8, 8)) for i in range(3)]
    for batch in (1, 7):
        for i in range(3):
            parts = [PhiloxNoise(s)(i, (len(s), 3, 8, 8)) for s in seeds.split(batch)]
            assert torch.equal(torch.cat(parts), whole[i])
    rows = torch.cat([starting_noise(seeds, (3, 8, 8)), *whole]).flatten(1)
    off = torch.corrcoef(rows) - torch.eye(len(rows))
    assert off.abs().max() < 0.45


@pytest.mark.parametrize("guidance", [1.0, 3.0, 0.0])
def test_engine_is_the_plain_loop(guidance):
    model = small.iuvit(context_dim=small.WIDTH)
    context, mask = small.text(4)
    engine = Engine(model, small.process("v"), SamplerConfig(steps=6, eta=0.5), guidance=guidance)
    if guidance == 0:
        with pytest.warns(UserWarning, match="below 1"):
            got = engine.draw(SEEDS[:4], context=context, context_mask=mask)
        context, mask = context[:, :1], mask[:, :1] & False
    else:
        got = engine.draw(SEEDS[:4], context=context, context_mask=mask)
    seeds = seed_tensor(SEEDS[:4])
    x_T = starting_noise(seeds, (3, 8, 8))
    plain = classifier_free(model, guidance or 1.0, context=context, context_mask=mask)
    noise = PhiloxNoise(seeds)
    expected = sample_ddim(plain, x_T, small.process("v"), steps=6, eta=0.5, generator=noise)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_text_is_projected_once_per_sample_and_guidance_is_one_call_a_step():
    model = small.iuvit(context_dim=small.WIDTH)
    cross = [module for module in model.modules() if isinstance(module, MHCA)]
    rows, batches = [], []
    for module in cross:
        module.kv.register_forward_hook(lambda _, args, out: rows.append(len(args[0])))
    model.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    engine = Engine(model, small.process(), SamplerConfig(steps=9), guidance=2.0)
    context, mask = small.text(3)
    for sample in (1, 2):
        engine.draw(SEEDS[:3], context=context, context_mask=mask)
        # The texts, and the one position of the null condition.
        assert sorted(rows) == sorted([1, 3] * len(cross) * sample)
    assert batches == [6] * 18


def samplers():
    """Each with a process in which it is quick: ancestral takes all steps."""
    for name in SAMPLERS:
        steps = 30 if name == "ancestral" else 1000
        yield name, small.process(steps=steps), SamplerConfig(name=name, steps=30)


@pytest.mark.parametrize(("name", "process", "sampler"), list(samplers()), ids=list(SAMPLERS))
def test_every_sampler_draws(name, process, sampler):
    engine = Engine(small.iuvit(layers=1), process, sampler)
    a, b = engine.draw([3, 4]), engine.draw([4])
    assert a.shape == (2, 3, 8, 8)
    assert a.isfinite().all()
    torch.testing.assert_close(a[1:], b, rtol=1e-4, atol=1e-4)
    if name == "ancestral":
        x_T, noise = starting_noise(seed_tensor([4]), (3, 8, 8)), PhiloxNoise(seed_tensor([4]))
        expected = sample_ancestral(engine.model, x_T, process, generator=noise)
        torch.testing.assert_close(b, expected)


def test_labels_guide_where_there_is_no_text():
    model = small.iuvit(num_classes=5)
    y = torch.tensor([0, 4])
    process, sampler = small.process(), SamplerConfig(steps=4)
    guided = Engine(model, process, sampler, guidance=2.0).draw([1, 2], y=y)
    x_T = starting_noise(seed_tensor([1, 2]), (3, 8, 8))

    def plain(x, t):
        conditional, null = model(x, t, y=y), model(x, t, y=torch.tensor([5, 5]))
        return null + 2.0 * (conditional - null)

    expected = sample_ddim(plain, x_T, process, steps=4)
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", [False, True])
def test_graphs_read_new_inputs_and_keep_old_results(text):
    """With a stand-in for CUDA's capture, which repeats a call on the inputs it was made with."""
    recorded = []

    def capture(call):
        call()
        recorded.append(call)
        return call

    model = small.iuvit(context_dim=small.WIDTH if text else None)
    graphed = GraphedModel(model, capture)
    kept = []
    with torch.no_grad():
        for batch, seed in ((2, 0), (2, 1), (3, 2), (2, 3)):
            torch.manual_seed(seed)
            x = torch.randn(batch, 3, 8, 8)
            own = model.project_text(torch.randn(batch, 5, small.WIDTH)) if text else None
            for t in (999, 500):
                step = torch.tensor(t).expand(batch)
                kept.append((graphed(x, step, own), model(x, step, own)))
    for got, expected in kept:  # at the end: no replay wrote into an earlier result
        torch.testing.assert_close(got, expected)
    assert len(recorded) == 2


@pytest.mark.parametrize(("name", "process", "sampler"), list(samplers()), ids=list(SAMPLERS))
def test_loop_never_waits_for_the_device(name, process, sampler):
    """On meta tensors reading a value raises, as it would synchronise on a GPU."""
    model = small.iuvit(num_classes=3, layers=1).to("meta")
    engine = Engine(model, process, sampler, guidance=2.0)
    y = torch.zeros(2, dtype=torch.int64, device="meta")
    assert engine.draw([1, 2], y=y).shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "dpm"}, "name='dpm', expected one of .'ddim'"),
        ({"eta": 2.0}, "eta=2.0, expected 0 to 1"),
        ({"name": "ancestral", "eta": 0.5}, "ancestral takes no eta"),
        ({"steps": 0}, "steps=0, expected 1 to 1000"),
        ({"steps": 1001}, "steps=1001, expected 1 to 1000"),
        ({"name": "ode_heun", "steps": 0}, "steps=0, expected 1 to 1000"),
        ({"name": "ancestral", "steps": 50}, "ancestral takes all 1000 steps, not 50"),
        ({"spacing": "even"}, "spacing must be one of"),
    ],
)
def test_bad_sampler(fields, message):
    with pytest.raises(ValueError, match=message):
        Engine(small.iuvit(), small.process(), SamplerConfig(**fields))


def test_bad_calls():
    model = small.iuvit()
    with pytest.raises(ValueError, match="guidance=-1, expected at least 0"):
        Engine(model, small.process(), SamplerConfig(), guidance=-1)
    with pytest.raises(ValueError, match=r"guidance=2\.0 needs text or labels"):
        Engine(model, small.process(), SamplerConfig(), guidance=2.0).draw([1])
    engine = Engine(model, small.process(), SamplerConfig(steps=1))
    for seeds in ([], [-1], [2**64]):
        with pytest.raises(ValueError, match="seeds must"):
            engine.draw(seeds)
    with pytest.raises(ValueError, match="2 seeds for the shape"):
        PhiloxNoise(seed_tensor([1, 2]))(0, (3, 1))
