"""Chips by the names that drivers give them."""

from __future__ import annotations

import pytest

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
