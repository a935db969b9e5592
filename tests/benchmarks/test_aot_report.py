"""The ahead-of-time report passes what it should and fails what it should; nothing is mocked."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton
import triton.language as tl

from benchmarks import aot_report
from fastdiff import ops
from fastdiff_kernels import _launch


@triton.jit
def copy(x, y, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o, mask=o < size), mask=o < size)


@triton.jit
def copy_every_other(x, y, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    o = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)) * 2
    tl.store(y + o, tl.load(x + o, mask=o < size), mask=o < size)


@triton.jit
def running_sum(x, y, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    p = x + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(size):
        total += tl.load(p).to(tl.float32)
        p += BLOCK
    tl.store(y + tl.arange(0, BLOCK), total.to(y.dtype.element_ty))


@triton.jit
def hold_too_much(x, y, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    o = tl.arange(0, BLOCK)
    first = tl.load(x + o).to(tl.float32)
    second = tl.load(x + BLOCK + o).to(tl.float32)
    for _ in range(size):
        first, second = tl.exp(second * first), tl.exp(first + second)
    tl.store(y + o, (first + second).to(y.dtype.element_ty))


def judge(
    kernel: object,
    block: int,
    warps: int = 4,
    family: str = "sm_90",
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[aot_report.Compiled, list[str]]:
    """What becomes of a kernel on 2^20 elements."""
    with _launch.pretend(_launch.CHIPS[family]), _launch.recording() as launches:
        x = torch.empty(2**20, dtype=dtype, device="meta")
        _launch.launch(
            kernel, (1,), num_warps=warps, x=x, y=torch.empty_like(x), size=2**20, BLOCK=block
        )
    made = aot_report.Kernel(launches[0], activation=2**21)
    aot_report._work[:] = [made]
    compiled = aot_report.compile_one((0, family))
    return compiled, aot_report.faults(made, compiled, family)


@pytest.mark.parametrize("family", ["sm_80", "sm_90"])
def test_sixteen_bytes_a_thread_pass(family: str) -> None:
    made, wrong = judge(copy, 1024, family=family)
    assert made.widths == {"x": 16, "y": 16}
    assert wrong == []


def test_four_bytes_a_thread_pass_where_a_warp_has_whole_lines() -> None:
    made, wrong = judge(copy, 64, warps=1)
    assert (made.widths["x"], made.spans["x"]) == (4, 128)
    assert wrong == []


def test_single_elements_of_float32_pass_in_a_row_of_lanes() -> None:
    made, wrong = judge(copy, 32, warps=1, dtype=torch.float32)
    assert (made.widths["x"], made.spans["x"]) == (4, 128)
    assert wrong == []


def test_a_loop_s_pointer_is_followed() -> None:
    made, wrong = judge(running_sum, 64, warps=1)
    assert (made.widths["x"], made.spans["x"]) == (4, 128)
    assert wrong == []


def test_one_element_a_thread_fails() -> None:
    _, wrong = judge(copy, 32, warps=1)
    assert wrong == ["narrow accesses: x 2 B (64 a warp), y 2 B (64 a warp)"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_elements_apart_fail(dtype: torch.dtype) -> None:
    made, wrong = judge(copy_every_other, 1024, dtype=dtype)
    assert made.widths["x"] == dtype.itemsize  # in float32, too, 128 bytes of a warp: in two lines
    assert [fault.partition(":")[0] for fault in wrong] == ["narrow accesses"]


def test_a_spill_fails() -> None:
    made, wrong = judge(hold_too_much, 4096, warps=1)
    assert made.spilled > 0
    assert f"spills {made.spilled} bytes" in wrong


def test_too_much_shared_memory_fails() -> None:
    made, _ = judge(copy, 1024)
    kernel = aot_report._work[0]
    large = dataclasses.replace(made, shared=_launch.CHIPS["sm_80"].shared + 1)
    assert any("shared memory" in fault for fault in aot_report.faults(kernel, large, "sm_80"))


@pytest.fixture(scope="module")
def cifar() -> tuple[list[aot_report.Kernel], list[aot_report.Pass]]:
    return aot_report.collect("sm_90", ["iuvit_cifar10"], [torch.bfloat16])


def test_few_keeps_every_kernel(cifar) -> None:
    kernels, _ = cifar
    kept = aot_report.few(kernels)
    assert {k.name for k in kept} == {k.name for k in kernels}
    assert max(sum(k.name == name for k in kept) for name in {k.name for k in kept}) <= 3


def test_bytes_of_a_pass(cifar) -> None:
    """IU-ViT's planes fit a program: no halo. The FFN's backward writes y, a fourth tensor."""
    kernels, passes = cifar
    assert all(one.launches for one in passes)
    ratios = {(one.op, one.backward): one.ratio for one in passes}
    assert ratios["dwconv_ffn", False] == pytest.approx(1, abs=0.01)
    sums = 2 * 11 * 4 / (3 * 257 * 2)  # float32 of each plane, written and read
    assert ratios["dwconv_ffn", True] == pytest.approx(4 / 3 + sums, abs=0.01)
    assert ratios["layer_norm_modulate", False] == pytest.approx(1, abs=0.05)
    assert max(k.share for k in kernels) < 1.5


def test_halos_are_moved_again() -> None:
    shape, grid = (64, 64 * 64, 1024), (64, 64)
    with torch.device("meta"), _launch.pretend(_launch.CHIPS["sm_90"]), aot_report.passes() as made:
        z = torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)
        y = ops.dwconv_gelu(z, torch.empty(1024, 1, 3, 3), torch.empty(1024), grid=grid)
        y.sum().backward()
    # 4 stripes of 16 rows: 6 rows of 64 are read twice, or 12 of z in the backward and 6 of dy.
    launch = made[0].launches[0].arguments
    assert (launch["BANDS"] * launch["ROWS"], launch["span"]) == (16, 64)
    assert made[0].ratio == pytest.approx((70 / 64 + 1) / 2, abs=1e-2)
    assert made[1].ratio == pytest.approx((76 / 64 + 70 / 64 + 1) / 3, abs=2e-2)


def test_a_launch_of_some_images_moves_those() -> None:
    """64 images of 192 channels, 64 x 64: more than an L2, so a few at a time."""
    with torch.device("meta"), _launch.pretend(_launch.CHIPS["sm_80"]), aot_report.passes() as made:
        x = torch.empty(64, 192, 64, 64, dtype=torch.bfloat16)
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        weight, bias = (torch.empty(192, requires_grad=True) for _ in range(2))
        ops.group_norm_silu(x, weight, bias, num_groups=32, eps=1e-5).sum().backward()
    assert len(made[0].launches) > 2
    assert [one.ratio for one in made] == pytest.approx([1, 1], abs=0.02)
