"""Chips by the names that drivers give them."""

from __future__ import annotations

import importlib

import pytest
import torch

from fastdiff_kernels import _launch


@pytest.mark.parametrize(
    ("architecture", "family"),
    [
        ("gfx942:sramecc+:xnack-", "gfx942"),
        ("gfx90a:sramecc+:xnack-", "gfx942"),
        ("gfx1100", "gfx1100"),
        ("gfx1151", "gfx1100"),
        ("gfx1201", "gfx1201"),
        ("gfx1030", "default"),
    ],
)
def test_a_chip_of_amd_has_the_plans_of_its_generation(architecture: str, family: str) -> None:
    chip = _launch._amd_chip(architecture, 60, 4 << 20)
    assert chip.family == family
    assert (chip.processors, chip.shared) == (60, 65_536)


def test_a_known_chip_of_amd_counts_its_infinity_cache() -> None:
    assert _launch._amd_chip("gfx942:xnack-", 304, 4 << 20) == _launch.CHIPS["gfx942"]
    assert _launch._amd_chip("gfx90a", 104, 8 << 20).l2 == 8 << 20


@pytest.mark.parametrize(("family", "old", "taken"), [
    ("gfx942", True, False), ("gfx942", False, True), ("sm_90", True, True),
])  # fmt: skip
def test_a_skip_on_amd_needs_a_new_triton(monkeypatch, family, old, taken) -> None:
    norm = importlib.import_module("fastdiff_kernels.group_norm_silu.triton_kernels")
    monkeypatch.setattr(norm, "_BEFORE_3_9", old)
    x, weight = torch.empty(1, 4, 2, 2), torch.empty(8)
    with _launch.pretend(_launch.CHIPS[family]):
        assert norm.supports(x, weight[:4], weight[:4], 2, 1e-5, None, None, None, True) is None
        why = norm.supports(x, weight, weight, 2, 1e-5, None, None, x, True)
    assert (why is None) == taken


@pytest.mark.parametrize(("family", "taken"), [
    ("gfx942", True), ("gfx1100", False), ("gfx1201", False), ("sm_80", True),
])  # fmt: skip
def test_windows_are_not_for_rdna(family, taken) -> None:
    attention = importlib.import_module("fastdiff_kernels.window_attention.triton_kernels")
    with _launch.pretend(_launch.CHIPS[family]):
        form = torch.empty(1, 4, 4, 96), None, 2, (4, 4), (0, 0), None, 1.0, False
        assert (attention.supports(*form) is None) == taken
