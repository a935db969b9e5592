"""CUDA graphs, streams, devices, memory and large tensors: every op behaves as PyTorch's own do.

On a CPU the same code runs with stand-ins for graphs and streams (see cuda_tools).
"""

from __future__ import annotations

import threading

import pytest
import torch
from conformance import BACKEND, DEVICE
from cuda_tools import Lane, capture, kept_bytes, refill, same, synchronize
from every_op import OPS, Case, results_and_gradients
from torch import Tensor

from fastdiff_kernels import backend, dwconv_ffn, dwconv_gelu, philox_normal

HERE = torch.device(DEVICE)
DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.bfloat16]


def params(names: list[str]) -> list:
    """Interpreted, two cheap ops exercise the tests' code; the others are slow."""
    quick = BACKEND != "triton" or DEVICE == "cuda"
    cheap = ("layer_norm_modulate", "philox_normal")
    slow = [() if quick or name in cheap else (pytest.mark.slow,) for name in names]
    return [pytest.param(OPS[n], marks=m, id=n) for n, m in zip(names, slow, strict=True)]


each_op = pytest.mark.parametrize("case", params(list(OPS)))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
with_backward = pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
each_differentiable = pytest.mark.parametrize(
    "case", params([name for name, case in OPS.items() if case.differentiable])
)


def run(case: Case, inputs: list[Tensor | None], backward: bool = True) -> list[Tensor]:
    """Results, and gradients where they are wanted."""
    if backward:
        return results_and_gradients(case.call, inputs)
    with torch.no_grad():
        results = case.call(*inputs)
    return list(results) if isinstance(results, tuple) else [results]


def repeats() -> int:
    return 20 if DEVICE == "cuda" else 1


@with_backward
@each_dtype
@each_op
def test_a_graph_gives_what_eager_gives_for_new_data(case, dtype, backward):
    if backward and not case.differentiable:
        pytest.skip("no gradient")
    static = case.inputs(HERE, dtype, seed=0)
    replay = capture(lambda: run(case, static, backward), HERE)
    for seed in (1, 2):
        new = case.inputs(HERE, dtype, seed=seed)
        refill(static, new)
        got = [t.clone() for t in replay()]
        synchronize(HERE)
        same(got, run(case, new, backward), exact=case.exact, what=f"seed {seed}: ")


@each_dtype
@each_op
def test_a_side_stream_waits_for_inputs_made_on_it(case, dtype):
    source = case.inputs(HERE, dtype, seed=3)
    expected = run(case, source)
    lane = Lane(HERE)
    lane.follow()
    with lane():
        inputs = [None if t is None else t.detach().clone() for t in source]
        inputs = [
            t if t is None or not t.is_floating_point() else t.requires_grad_() for t in inputs
        ]
        got = run(case, inputs)
    lane.join()
    same(got, expected, exact=case.exact)


@each_op
def test_scratch_memory_is_not_shared_by_streams(case):
    """Two streams at once, each with its own data, many times: no partials are mixed up."""
    lanes = [Lane(HERE, cycles=1000) for _ in range(2)]
    sets = [case.inputs(HERE, torch.float32, seed=seed) for seed in (4, 5)]
    expected = [run(case, inputs) for inputs in sets]
    for lane in lanes:
        lane.follow()
    found: list[list[list[Tensor]]] = [[], []]
    for _ in range(repeats()):
        for index, lane in enumerate(lanes):
            with lane(busy=False):
                found[index].append(run(case, sets[index]))
    for index, lane in enumerate(lanes):
        lane.join()
        for got in found[index]:
            same(got, expected[index], exact=case.exact, what=f"stream {index}: ")


@each_op
def test_memory_that_is_freed_on_a_side_stream_may_be_used_at_once(case):
    """The op's scratch memory goes back to the allocator while its kernels still wait."""
    inputs = case.inputs(HERE, torch.float32, seed=6)
    expected = run(case, inputs)
    lane = Lane(HERE)
    lane.follow()
    with lane():
        got = run(case, inputs)
        for size in (16, 512, 4096, 65536):
            torch.empty(size, device=HERE).fill_(torch.nan)
    spoil = [torch.full((size,), torch.nan, device=HERE) for size in (16, 512, 4096, 65536)]
    lane.join()
    same(got, expected, exact=case.exact)
    assert all(t.isnan().all() for t in spoil)


@each_differentiable
def test_backward_runs_on_the_stream_of_the_forward(case):
    """Called outside the block, from this thread and from another one."""

    def differentiate(results: list[Tensor], dys: list[Tensor], out: list[Tensor]) -> None:
        if HERE.type == "cuda":
            torch.cuda.set_device(HERE.index or 0)
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        with backend(BACKEND):
            out.extend(torch.autograd.grad(results, wanted, dys))

    inputs = case.inputs(HERE, torch.float32, seed=7)
    expected = run(case, inputs)
    for other_thread in (False, True):
        lane = Lane(HERE)
        lane.follow()
        with lane():
            results = case.call(*inputs)
            results = list(results) if isinstance(results, tuple) else [results]
        lane.join()
        dys = [torch.linspace(-1, 2, r.numel(), device=HERE).view(r.shape) for r in results]
        got: list[Tensor] = []
        if other_thread:
            thread = threading.Thread(target=differentiate, args=(results, dys, got))
            thread.start()
            thread.join()
            synchronize(HERE)
        else:
            differentiate(results, dys, got)
        same([*(r.detach() for r in results), *got], expected, exact=case.exact)


@each_op
def test_repeats_on_side_streams_bit_for_bit(case):
    inputs = case.inputs(HERE, torch.float32, seed=8)
    with Lane(HERE)(busy=False):
        synchronize(HERE)
        expected = run(case, inputs)
        synchronize(HERE)
    for _ in range(2):
        lane = Lane(HERE, cycles=100_000)
        lane.follow()
        with lane():
            got = run(case, inputs)
        lane.join()
        # cuBLAS keeps a workspace for each stream, and chooses the same way for each.
        same(got, expected, exact=True)


def other_device() -> torch.device:
    """A device that is not the current one, if there is one."""
    if HERE.type != "cuda":
        return HERE
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second CUDA device")
    return torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())


@each_op
def test_tensors_of_a_device_that_is_not_the_current_one(case):
    device = other_device()
    before = torch.cuda.current_device() if HERE.type == "cuda" else None
    got = run(case, case.inputs(device, torch.float32, seed=9))
    if before is not None:
        assert torch.cuda.current_device() == before
    assert all(t.device == device for t in got)
    same(
        [t.to(HERE) for t in got], run(case, case.inputs(HERE, torch.float32, seed=9)), exact=False
    )


@each_op
def test_an_empty_batch(case):
    inputs = case.inputs(HERE, torch.float32, batch=0)
    results = run(case, inputs)
    synchronize(HERE)
    shapes = [t.shape for t in inputs if t is not None and t.requires_grad]
    gradients = results[len(results) - len(shapes) :]
    assert [g.shape for g in gradients] == shapes
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ffn_holds_half_of_the_memory_of_separate_ops(dtype):
    import torch.nn.functional as F

    size = (16, 16, 16, 512) if DEVICE == "cuda" else (8, 4, 4, 32)  # the float32 taps count little
    B, H, W, D = size
    C = 4 * D
    shapes = [(B, H * W, D), (C, D), (C,), (C, 1, 3, 3), (C,), (D, C), (D,)]
    inputs = [torch.randn(shape, device=HERE).to(dtype).requires_grad_() for shape in shapes]

    def separate(x, w1, b1, conv_weight, conv_bias, w2, b2):
        image = F.linear(x, w1, b1).transpose(1, 2).reshape(-1, C, H, W)
        image = F.conv2d(image, conv_weight, conv_bias, padding=1, groups=C)
        return F.linear(F.gelu(image.flatten(2).transpose(1, 2)), w2, b2)

    eager = kept_bytes(lambda: separate(*inputs), inputs, HERE)
    mine = kept_bytes(lambda: dwconv_ffn(*inputs, grid=(H, W)), inputs, HERE)
    assert 0 < mine <= 0.5 * eager


def test_a_graph_reads_the_step_of_the_noise_anew():
    seeds, step = torch.arange(3, device=HERE), torch.zeros((), dtype=torch.int64, device=HERE)
    replay = capture(lambda: [philox_normal(seeds, step, (3, 4))], HERE)
    for value in (0, 1, 999):
        step.fill_(value)
        assert torch.equal(replay()[0], philox_normal(seeds, value, (3, 4)))


# More elements than 32 bits count. The last picture is held against a call of its own.

LARGE = pytest.param(
    True,
    marks=[
        *(pytest.mark.gpu, pytest.mark.slow),
        pytest.mark.skipif(DEVICE != "cuda", reason="25 GB of tensors"),
    ],
    id="large",
)
small_and_large = pytest.mark.parametrize("large", [pytest.param(False, id="small"), LARGE])


def needs_memory(gigabytes: float) -> None:
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GB of memory that is free")


@small_and_large
def test_dwconv_of_more_elements_than_32_bits_count(large):
    needs_memory(25 if large else 0)
    B, side, C = (33, 256, 1024) if large else (3, 5, 8)  # 2.2e9
    z = torch.randn(B, side * side, C, device=HERE, dtype=torch.bfloat16).requires_grad_()
    weight, bias = torch.randn(C, 1, 3, 3, device=HERE) / 3, torch.randn(C, device=HERE)
    y = dwconv_gelu(z, weight, bias, grid=(side, side))
    (dz,) = torch.autograd.grad(y, z, torch.ones_like(y))
    last = z.detach()[-1:].requires_grad_()
    y_last = dwconv_gelu(last, weight, bias, grid=(side, side))
    (dz_last,) = torch.autograd.grad(y_last, last, torch.ones_like(y_last))
    assert torch.equal(y[-1:], y_last)
    assert torch.equal(dz[-1:], dz_last)


@small_and_large
def test_noise_of_more_elements_than_32_bits_count(large):
    needs_memory(12 if large else 0)
    B, side = (33, 2**26) if large else (3, 40)  # 2.2e9
    seeds = torch.arange(B, device=HERE)
    noise = philox_normal(seeds, 5, (side,))
    assert torch.equal(noise[-1:], philox_normal(seeds[-1:], 5, (side,)))
    assert not torch.equal(noise[-1], noise[-2])
