"""`philox_bits` and `philox_normal` of a back end, held to the reference."""

from __future__ import annotations

import pytest
import torch
from conformance import BACKEND, DEVICE

from fastdiff_kernels import _launch, backend, philox_bits, philox_normal

SEEDS = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 0x243F6A8885A308D3])
SHAPES = [(), (1,), (4,), (5, 3), (3, 16, 16), (1021,), (1024,), (1025,), (4097,), (0, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("step", "stream"), [(0, 0), (2**32 - 1, 2**32 - 1), (77, 5)])
def test_bits_are_the_references_and_normals_to_2_ulp(shape, step, stream):
    bits = philox_bits(SEEDS.to(DEVICE), step, shape, stream=stream)
    z = philox_normal(SEEDS.to(DEVICE), step, shape, stream=stream)
    assert bits.device == z.device == SEEDS.to(DEVICE).device
    with backend("reference"):
        assert torch.equal(bits.cpu(), philox_bits(SEEDS, step, shape, stream=stream))
        expected = philox_normal(SEEDS, step, shape, stream=stream)
    # Floats of one sign are ordered as their bits.
    apart = (z.cpu().view(torch.int32).long() - expected.view(torch.int32).long()).abs()
    assert apart.numel() == 0 or apart.max() <= 2
    assert (apart != 0).sum() <= 1


def test_step_is_read_where_it_lies():
    step = torch.tensor(3, device=DEVICE)
    before = philox_normal(SEEDS.to(DEVICE), step, (7,))
    step += 1
    after = philox_normal(SEEDS.to(DEVICE), step, (7,))
    assert torch.equal(before, philox_normal(SEEDS.to(DEVICE), 3, (7,)))
    assert torch.equal(after, philox_normal(SEEDS.to(DEVICE), 4, (7,)))


def test_seeds_that_do_not_lie_side_by_side():
    seeds = SEEDS.to(DEVICE)
    got = philox_normal(seeds.repeat_interleave(2)[::2], 1, (9,))
    assert torch.equal(got, philox_normal(seeds, 1, (9,)))


@pytest.mark.skipif(BACKEND != "triton", reason="grids are Triton's")
def test_more_pictures_than_a_grid_is_long():
    with _launch.recording() as launches:
        philox_bits(torch.empty(65_535 + 3, dtype=torch.int64, device="meta"), 1, (3, 1000))
    assert [launch.grid for launch in launches] == [(3, 65_535), (3, 3)]
    assert [len(launch.arguments["y"]) for launch in launches] == [65_538, 3]
