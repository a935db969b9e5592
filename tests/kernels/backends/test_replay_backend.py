"""Calls that are replayed give what the same calls give when each is planned anew, to the bit."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from conformance import BACKEND, DEVICE, run

from fastdiff_kernels import (
    _calls,
    _launch,
    _register,
    _replay,
    backend,
    dwconv_ffn,
    dwconv_gelu,
    group_norm_silu,
    layer_norm_modulate,
    philox_normal,
    window_attention,
)

LAST = torch.channels_last


def window(qkv, table, pad):
    return window_attention(
        qkv, table, heads=2, window_size=4, shift=2, pad_mode="value", pad_qkv=pad
    )


def norm(x, w, b, scale, shift, skip):
    options = {"scale": scale, "shift": shift, "skip": skip}
    return group_norm_silu(x, w, b, num_groups=4, **options)


# Of each op: the call, the sizes of its tensors.
CALLS = {
    "window": (window, [(1, 6, 7, 96), (49, 2), (96,)]),
    "window of several tiles": (
        lambda qkv, table: window_attention(qkv, table, heads=1, window_size=9),
        [(1, 9, 9, 48), (289, 1)],
    ),
    "gelu": (
        lambda z, w, b: dwconv_gelu(z, w, b, grid=(5, 4), prefix=1),
        [(2, 21, 8), (8, 1, 3, 3), (8,)],
    ),
    "ffn": (
        lambda x, *w: dwconv_ffn(x, *w, grid=(3, 4), prefix=1),
        [(2, 13, 8), (16, 8), (16,), (16, 1, 3, 3), (16,), (8, 16), (8,)],
    ),
    "group norm": (norm, [(2, 8, 4, 4), (16,), (16,), (2, 16), (2, 16), (2, 8, 4, 4)]),
    "large group norm": (norm, [(1, 8, 33, 40), (16,), (16,), (1, 16), (1, 16), (1, 8, 33, 40)]),
    "layer norm": (lambda x, w, b: layer_norm_modulate(x, w, b)[0], [(2, 5, 24), (24,), (24,)]),
    "layer norm, both results": (
        lambda x, r, w: layer_norm_modulate(x, w, None, residual=r),
        [(2, 5, 24), (2, 5, 24), (24,)],
    ),
    "gated layer norm": (
        lambda x, r, gate, scale: layer_norm_modulate(
            x, None, None, scale=scale, residual=r, gate=gate
        ),
        [(2, 5, 24), (2, 5, 24), (2, 24), (2, 24)],
    ),
}
triton_only = pytest.mark.skipif(BACKEND != "triton", reason="only its launches are replayed")
each_call = pytest.mark.parametrize("name", CALLS)


def draw(sizes, dtype=torch.float32):
    return [torch.randn(size).to(DEVICE, dtype).requires_grad_() for size in sizes]


def results_of(call, inputs, seed):
    """Results of a call and all gradients, for weights that the seed draws."""
    shapes = call(*inputs)
    shapes = shapes if isinstance(shapes, tuple) else (shapes,)
    generator = torch.Generator().manual_seed(seed)
    dys = [torch.randn(y.shape, generator=generator).to(DEVICE, y.dtype) for y in shapes]
    return run(call, inputs, dys)


def same(some, others):
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(some, others, strict=True)
    )


def expected(call, inputs, seed):
    with _calls.disabled():
        return results_of(call, inputs, seed)


@contextlib.contextmanager
def counting(monkeypatch):
    """How many calls were traced, and how many of these can be replayed."""
    counts = {"traced": 0, "made": 0}
    trace = _replay.trace

    def spy(function, args):
        results, replay = trace(function, args)
        counts["traced"] += 1
        counts["made"] += replay is not None
        return results, replay

    with monkeypatch.context() as patch:
        patch.setattr(_replay, "trace", spy)
        yield counts


@pytest.fixture(autouse=True)
def forgotten():
    for op in _register._OPS.values():
        op._known = _calls.Known()


@each_call
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_a_replay_equals_the_call_planned_anew(name, dtype, monkeypatch):
    call, sizes = CALLS[name]
    with counting(monkeypatch) as counts:
        for seed in range(4):
            inputs = draw(sizes, dtype)
            got = results_of(call, inputs, seed)
            if seed in (1, 3):  # traced; replayed a second time
                assert same(got, expected(call, inputs, seed)), seed
    # Two calls each: one for its shapes. So the forward is traced in the second, and never again.
    assert counts["traced"] == 2
    assert counts["made"] == (2 if BACKEND == "triton" else 0)


@each_call
def test_without_gradients(name, monkeypatch):
    call, sizes = CALLS[name]
    with torch.no_grad(), counting(monkeypatch) as counts:
        for _ in range(4):
            inputs = draw(sizes)
            got = call(*inputs)
            with _calls.disabled():
                plain = call(*inputs)
            got, plain = (r if isinstance(r, tuple) else (r,) for r in (got, plain))
            assert same(got, plain)
            assert not any(r.requires_grad for r in got)
    assert counts["traced"] == 1


@each_call
def test_some_of_the_gradients(name):
    call, sizes = CALLS[name]
    for wanted in sorted({0, 1, len(sizes) - 1}):
        for seed in range(3):
            inputs = draw(sizes)
            for place, tensor in enumerate(inputs):
                tensor.requires_grad_(place == wanted)
            got = results_of(call, inputs, seed)
        assert same(got, expected(call, inputs, seed)), wanted


def test_results_are_new_tensors_each_time():
    call, sizes = CALLS["gelu"]
    inputs = draw(sizes)
    with torch.no_grad():
        results = [call(*inputs) for _ in range(4)]
    assert len({y.data_ptr() for y in results}) == 4
    results[0].fill_(7)
    assert same(results[1:2], results[2:3])


def test_other_strides_offsets_and_layouts_are_other_kinds():
    call, (size, *others) = CALLS["large group norm"]
    rest = draw(others)
    for _ in range(3):
        whole = torch.randn(size).to(DEVICE)
        spare = torch.randn(whole.numel() + 1, device=DEVICE)[1:].view(size)  # 4 bytes off
        turned = torch.randn(1, 8, 40, 33).to(DEVICE).transpose(2, 3)
        for x in (whole, whole.to(memory_format=LAST), spare, turned):
            inputs = [x.requires_grad_(), *rest]
            assert same(results_of(call, inputs, 0), expected(call, inputs, 0))


@triton_only
def test_a_misaligned_tensor_after_aligned_ones_is_planned_anew(monkeypatch):
    call, (size, *others) = CALLS["gelu"]
    rest = draw(others)
    for _ in range(3):
        results_of(call, [torch.randn(size).to(DEVICE).requires_grad_(), *rest], 0)
    numel = torch.Size(size).numel()
    off = (torch.randn(numel + 1, device=DEVICE)[1:].view(size)).requires_grad_()
    assert off.data_ptr() % 16
    planned, launch = [], _launch.launch
    monkeypatch.setattr(
        _launch, "launch", lambda *args, **kw: (planned.append(args[0]), launch(*args, **kw))
    )
    got = results_of(call, [off, *rest], 0)
    assert len(planned) == 4  # two forwards, two kernels of the backward
    assert same(got, expected(call, [off, *rest], 0))
    planned.clear()
    results_of(call, [torch.randn(size).to(DEVICE).requires_grad_(), *rest], 0)
    assert not planned


def test_parts_of_one_memory_and_a_tensor_given_twice():
    call, sizes = CALLS["group norm"]
    x, w, b, *_, skip = draw(sizes)
    for i in range(4):
        both = torch.randn(2, 32, device=DEVICE, requires_grad=True)
        scale, shift = both.chunk(2, 1) if i != 2 else reversed(both.chunk(2, 1))
        for inputs in ([x, w, b, scale, shift, skip], [x, w, b, scale, scale, x]):
            inputs = [t.detach().requires_grad_() for t in inputs] if i % 2 else inputs
            assert same(results_of(call, inputs, i), expected(call, inputs, i)), i


def test_gradients_of_other_strides():
    call, sizes = CALLS["gelu"]
    for layout in (0, 1, 0, 1, 1):
        inputs = draw(sizes)
        dy = torch.randn(2, 8, 21, device=DEVICE).transpose(1, 2) if layout else None
        dy = torch.randn(2, 21, 8, device=DEVICE) if dy is None else dy
        got = run(call, inputs, [dy])
        with _calls.disabled():
            assert same(got, run(call, inputs, [dy]))


def test_one_of_two_results_used():
    call, sizes = CALLS["gated layer norm"]
    for i in range(5):
        inputs = draw(sizes)
        wanted = [t for j, t in enumerate(inputs) if j < 3]

        def gradients(inputs=inputs, wanted=wanted, i=i):
            results = call(*inputs)
            # The second result does not depend on scale: without the first, nothing needs dy.
            return torch.autograd.grad(results[1 - i % 2].square().sum(), wanted)

        got = gradients()
        with _calls.disabled():
            assert same(got, gradients())


def test_under_autocast():
    call, sizes = CALLS["ffn"]
    for i in range(4):
        inputs = draw(sizes)
        with torch.autocast(DEVICE, torch.float16):
            inputs[0] = inputs[0].detach().half().requires_grad_()
            got = results_of(call, inputs, i)
            assert torch.is_autocast_enabled(DEVICE)
            assert same(got, expected(call, inputs, i))
        assert got[0].dtype is torch.float16


def test_the_choice_of_a_back_end_and_of_a_chip_is_part_of_the_kind():
    call, sizes = CALLS["layer norm"]
    inputs = draw(sizes)
    chips = ["interpreter", "sm_80", "interpreter", "sm_90"] if DEVICE == "cpu" else [None] * 4
    for chip in chips:
        plan = contextlib.nullcontext() if chip is None else _launch.pretend(_launch.CHIPS[chip])
        with plan:
            for _ in range(3):
                assert same(results_of(call, inputs, 0), expected(call, inputs, 0))
        with backend("reference"):
            plain = call(*inputs)
            assert not type(plain.grad_fn).__name__.startswith("layer_norm_modulate")


def test_errors_stay_errors():
    call, (size, *others) = CALLS["gelu"]
    inputs = draw([size, *others])
    for _ in range(3):
        call(*inputs)
    with pytest.raises(ValueError, match="expected 21"):
        call(torch.randn(2, 20, 8, device=DEVICE), *inputs[1:])
    with pytest.raises(TypeError, match=r"bias is torch\.float64"):
        call(*inputs[:2], inputs[2].double())
    with pytest.raises(TypeError, match="bias is ndarray"):  # it cannot be a key
        call(*inputs[:2], inputs[2].detach().cpu().numpy())
    with pytest.raises(ValueError, match="expected at least 0"):
        dwconv_gelu(*inputs, grid=(-5, 4), prefix=1)


def test_double_backward_still_raises():
    call, sizes = CALLS["gelu"]
    for _ in range(3):
        inputs = draw(sizes)
        (first,) = torch.autograd.grad(call(*inputs).sum(), inputs[:1], create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(first.sum(), inputs[:1])


def test_saved_tensors_kept_elsewhere():
    """A hook that moves what is saved, as offloading does, to memory of another layout."""
    call, sizes = CALLS["large group norm"]

    def pack(tensor):
        return tensor.detach().clone(memory_format=torch.contiguous_format)

    for i in range(4):
        inputs = draw(sizes)
        inputs[0] = inputs[0].detach().to(memory_format=LAST).requires_grad_()
        inputs[5] = inputs[5].detach().to(memory_format=LAST).requires_grad_()
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        with hooks if i % 2 else contextlib.nullcontext():
            got = results_of(call, inputs, i)
        truth = expected(call, inputs, i)
        # Another layout is another kernel: the same numbers but for rounding.
        for a, b in zip(got, truth, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.skipif(
    BACKEND == "triton" and DEVICE == "cpu", reason="the interpreter runs in one thread at a time"
)
def test_several_threads_at_once():
    call, sizes = CALLS["window"]
    inputs = [draw(sizes) for _ in range(12)]
    truth = [expected(call, one, i) for i, one in enumerate(inputs)]
    wrong = []

    def work(first):
        for i in range(first, 12, 3):
            if not same(results_of(call, inputs[i], i), truth[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@triton_only
def test_noise(monkeypatch):
    step = torch.tensor(3, device=DEVICE)
    with counting(monkeypatch) as counts:
        for i in range(4):
            seeds = torch.arange(i, i + 3, device=DEVICE)
            step.fill_(i)
            with _calls.disabled():
                plain = philox_normal(seeds, step, (5, 3))
            assert torch.equal(philox_normal(seeds, step, (5, 3)), plain)
    assert counts == {"traced": 1, "made": 1}


@each_call
def test_operators_of_compiled_models_are_replayed(name, monkeypatch):
    call, sizes = CALLS[name]
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    results_of(compiled, draw(sizes), 0)  # compiles
    with counting(monkeypatch) as counts:
        for seed in range(4):
            inputs = draw(sizes)
            got = results_of(compiled, inputs, seed)
            if seed in (1, 3):
                assert same(got, expected(call, inputs, seed)), seed
    assert counts["made"] == (2 if BACKEND == "triton" else 0)
