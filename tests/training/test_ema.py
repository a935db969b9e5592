"""EMA: the recursion, bf16, exact resume, swapping weights in and out, refusals."""

import pytest
import torch
from torch import Tensor, nn

from fastdiff.training.ema import EMA


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).to(dtype)


def train_step(module: nn.Module, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    with torch.no_grad():
        for param in module.parameters():
            param.add_(torch.randn(param.shape, generator=generator).to(param.dtype))


@pytest.mark.parametrize("warmup", [False, True])
def test_update_is_the_recursion(warmup: bool) -> None:
    module = network()
    ema = EMA(module.named_parameters(), 0.9, warmup=warmup)
    expected = {name: p.detach().double() for name, p in module.named_parameters()}
    for n in range(100):
        train_step(module, n)
        ema.update(n)
        decay = min(0.9, (1 + n) / (10 + n)) if warmup else 0.9
        assert ema.decay_at(n) == decay
        for name, param in module.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * param.detach().double()
    for name, shadow in ema.state_dict().items():
        assert shadow.dtype == torch.float32
        torch.testing.assert_close(shadow.double(), expected[name], atol=1e-5, rtol=1e-5)


def test_decays_by_hand() -> None:
    flat, warm = (EMA([torch.ones(1)], warmup=warmup) for warmup in (False, True))
    assert [flat.decay_at(n) for n in (0, 10**6)] == [0.9999, 0.9999]
    assert [warm.decay_at(n) for n in (0, 8, 10**6)] == [0.1, 0.5, 0.9999]


def test_the_average_of_bf16_weights_moves() -> None:
    param = torch.ones(1, dtype=torch.bfloat16)
    ema = EMA([param], 0.9999)
    param.fill_(1.1)
    for n in range(5000):
        ema.update(n)
    target = float(param)
    expected = target + (1.0 - target) * 0.9999**5000
    assert float(ema.shadows["0"]) == pytest.approx(expected, rel=1e-4)
    assert ema.shadows["0"].dtype == torch.float32


def test_float32_masters_can_be_given_instead() -> None:
    module = network(torch.bfloat16)
    ema = EMA(module.named_parameters(), 0.5)
    start = {name: shadow.clone() for name, shadow in ema.shadows.items()}
    masters = [torch.full(p.shape, 1.001) for p in module.parameters()]
    ema.update(0, masters)
    for name, shadow in ema.shadows.items():
        torch.testing.assert_close(shadow, (start[name] + 1.001) / 2)


def test_resume_is_bit_exact() -> None:
    module = network()
    whole = EMA(module.named_parameters(), 0.99, warmup=True)
    saved: dict[str, Tensor] = {}
    for n in range(20):
        train_step(module, n)
        whole.update(n)
        if n == 9:
            saved = {name: shadow.clone() for name, shadow in whole.state_dict().items()}
    again = network()
    for n in range(10):
        train_step(again, n)
    resumed = EMA(again.named_parameters(), 0.99, warmup=True)
    resumed.load_state_dict(saved)
    for n in range(10, 20):
        train_step(again, n)
        resumed.update(n)
    for name, shadow in whole.shadows.items():
        assert torch.equal(resumed.shadows[name], shadow)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fail", [False, True])
def test_applied_swaps_in_and_restores(dtype: torch.dtype, fail: bool) -> None:
    module = network(dtype)
    ema = EMA(module.named_parameters(), 0.9)
    train_step(module, 0)
    ema.update(0)
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    shadows = {name: s.clone() for name, s in ema.shadows.items()}
    addresses = [p.data_ptr() for p in module.parameters()]

    def body() -> None:
        with ema.applied(module) as inside:
            assert inside is module
            for name, param in module.named_parameters():
                assert torch.equal(param, shadows[name].to(dtype))
                assert not torch.equal(param, weights[name])
            with pytest.raises(RuntimeError, match="update inside `applied`"):
                ema.update(1)
            with pytest.raises(RuntimeError, match="state_dict inside `applied`"):
                ema.state_dict()
            if fail:
                raise KeyboardInterrupt

    if fail:
        with pytest.raises(KeyboardInterrupt):
            body()
    else:
        body()
    for name, param in module.named_parameters():
        assert torch.equal(param, weights[name])
        assert torch.equal(ema.shadows[name], shadows[name])
        assert param.requires_grad
    # Flat buffers of an optimiser hold views of the parameters: their memory must stay.
    assert [p.data_ptr() for p in module.parameters()] == addresses
    ema.update(1)


def test_copy_to_another_module_and_frozen_parameters() -> None:
    module = network()
    ema = EMA(((n, p) for n, p in module.named_parameters() if not n.startswith("2.")), 0.5)
    target = network(torch.bfloat16)
    with pytest.raises(ValueError, match=r"0 missing \[\], 2 unexpected \['2.bias', '2.weight'\]"):
        ema.copy_to(target)
    for param in target[2].parameters():  # type: ignore[index]
        param.requires_grad_(False)
    train_step(module, 0)
    ema.update(0)
    ema.copy_to(target)
    for name, param in target.named_parameters():
        if name in ema.shadows:
            assert torch.equal(param, ema.shadows[name].bfloat16())


def test_shadows_do_not_alias_the_parameters() -> None:
    module = network()
    ema = EMA(module.named_parameters(), 0.9)
    before = {name: s.clone() for name, s in ema.shadows.items()}
    train_step(module, 0)
    assert all(torch.equal(ema.shadows[name], before[name]) for name in before)


def test_bad_input_is_refused() -> None:
    module = network()
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1.0"):
        EMA(module.parameters(), 1.0)
    with pytest.raises(ValueError, match="no parameters"):
        EMA([])
    with pytest.raises(ValueError, match=r"0 is empty, shape \(0,\); under ZeRO"):
        EMA([torch.empty(0)])
    with pytest.raises(TypeError, match=r"floating point, got torch\.int64"):
        EMA([torch.ones(2, dtype=torch.int64)])
    with pytest.raises(ValueError, match="'a' came twice"):
        EMA([("a", torch.ones(1)), ("a", torch.ones(1))])
    ema = EMA(module.named_parameters())
    with pytest.raises(ValueError, match="at least 0, got -1"):
        ema.update(-1)
    with pytest.raises(ValueError, match="6 tensors"):
        ema.update(0, [torch.ones(1)])
    state = {name: s.clone() for name, s in ema.state_dict().items()}
    with pytest.raises(ValueError, match=r"1 missing \['0.bias'\], 1 unexpected \['0.b'\]"):
        ema.load_state_dict(
            {**{n: s for n, s in state.items() if n != "0.bias"}, "0.b": state["0.bias"]}
        )
    with pytest.raises(ValueError, match=r"0\.bias must be \(4,\), got \(5,\)"):
        ema.load_state_dict({**state, "0.bias": torch.ones(5)})
    with pytest.raises(TypeError, match=r"0\.bias must be float32, got torch\.bfloat16"):
        ema.load_state_dict({**state, "0.bias": state["0.bias"].bfloat16()})
    with pytest.raises(ValueError, match="does not fit"):
        ema.copy_to(nn.Linear(3, 4))
