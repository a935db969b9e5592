"""The ahead-of-time report passes what it should and fails what it should; nothing is mocked."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton
import triton.language as tl

from benchmarks import aot_report
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
    kernel: object, block: int, warps: int = 4, family: str = "sm_90", shift: int = 0
) -> tuple[aot_report.Compiled, list[str]]:
    """What becomes of a kernel on 2^20 bfloat16, whose first lies at `shift`."""
    with _launch.pretend(_launch.CHIPS[family]), _launch.recording() as launches:
        x = torch.empty(2**20 + shift, dtype=torch.bfloat16, device="meta")[shift:]
        _launch.launch(
            kernel, (1,), num_warps=warps, x=x, y=torch.empty_like(x), size=2**20, BLOCK=block
        )
    made = aot_report.Kernel(launches[0])
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


def test_a_loop_s_pointer_is_followed() -> None:
    made, wrong = judge(running_sum, 64, warps=1)
    assert (made.widths["x"], made.spans["x"]) == (4, 128)
    assert wrong == []


def test_half_a_line_fails() -> None:
    _, wrong = judge(copy, 32, warps=1)
    assert wrong == ["narrow accesses: x 2 B (64 a warp), y 2 B (64 a warp)"]


def test_elements_apart_fail() -> None:
    made, wrong = judge(copy_every_other, 1024)
    assert made.widths["x"] == 2
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


def test_few_keeps_every_kernel() -> None:
    kernels = aot_report.collect("sm_90", ["iuvit_cifar10"], [torch.bfloat16])
    kept = aot_report.few(kernels)
    assert {k.name for k in kept} == {k.name for k in kernels}
    assert max(sum(k.name == name for k in kept) for name in {k.name for k in kept}) <= 3
