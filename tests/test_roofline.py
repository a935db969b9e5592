"""Bytes, FLOPs and times against figures worked out by hand, and against PyTorch's own counter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastdiff import roofline
from fastdiff.models import IUViT, IUViTConfig, create_model
from fastdiff.ops import backend
from fastdiff.roofline import CHIPS, count, time_floor

H200, A100 = CHIPS["h200"], CHIPS["a100-40g"]
BLOCKED = ("window_attention", "dwconv_gelu", "group_norm_silu", "layer_norm_modulate")


def microseconds(cost: roofline.Cost, chip: roofline.Chip = H200) -> float:
    return time_floor(cost.bytes, cost.flops, chip) * 1e6


# Worked out by hand from e (bytes of a tensor), parameters left aside.
WINDOW = roofline.window_attention((16, 64, 64, 384), heads=6, window=(8, 8))
CIFAR = roofline.dwconv_gelu((128, 256, 2048))
FIRST = roofline.group_norm_silu((16, 192, 128, 128))
SKIP = roofline.group_norm_silu((16, 384, 128, 128), film=2)


@pytest.mark.parametrize(
    ("cost", "chip", "expected"),
    [
        (WINDOW.forward, H200, 46.8),
        (WINDOW.backward, H200, 81.9),
        (WINDOW.forward, A100, 130),
        (WINDOW.backward, A100, 227),
        (CIFAR.forward, H200, 62.4),
        (CIFAR.backward, H200, 93.6),
        (CIFAR.backward, A100, 260),
        (FIRST.forward, H200, 70.2),
        (FIRST.backward, H200, 117.0),
        (FIRST.forward, A100, 195),
        (SKIP.forward, H200, 140.5),
        (roofline.group_norm_silu((16, 192, 128, 128), reads=1).forward, H200, 46.8),
        (roofline.group_norm_silu((16, 192, 128, 128), reads=1).backward, H200, 70.2),
    ],
)
def test_floors_worked_out_by_hand(
    cost: roofline.Cost, chip: roofline.Chip, expected: float
) -> None:
    assert microseconds(cost, chip) == pytest.approx(expected, rel=0.01)


def test_flops_of_window_attention_count_whole_windows() -> None:
    assert WINDOW.forward.flops == 4 * 65_536 * 64 * 384
    assert WINDOW.backward.flops == 2.5 * WINDOW.forward.flops
    ragged = roofline.window_attention((1, 9, 9, 32), heads=1, window=(8, 8))
    assert ragged.forward.flops == 4 * 256 * 64 * 32


def test_bytes_to_the_last_vector() -> None:
    e = 2 * 3 * 5 * 7 * 2
    norm = roofline.group_norm_silu((2, 3, 5, 7), groups=3, film=2)
    assert norm.forward.bytes == 3 * e + 2 * 3 * 4 + 2 * 2 * 3 * 2 + 2 * 2 * 3 * 4
    e = 2 * 5 * 8 * 2
    for residual, gate, forward, backward in ((0, 0, 2, 3), (1, 0, 4, 4), (1, 1, 4, 6)):
        cost = roofline.layer_norm_modulate((2, 5, 8), residual=bool(residual), gate=bool(gate))
        vectors = 2 * 8 * 4 + gate * 2 * 8 * 2
        assert cost.forward.bytes == forward * e + vectors
        assert cost.backward.bytes == backward * e + 2 * vectors
    table = roofline.window_attention((1, 4, 4, 8), heads=2, window=(4, 4), table=2)
    assert table.forward.bytes == 4 * 1 * 4 * 4 * 8 * 2 + 49 * 2 * 2


def test_time_is_the_longer_of_bytes_and_arithmetic() -> None:
    assert time_floor(4.3e12, 1, H200) == pytest.approx(1)
    assert time_floor(1, 790e12, H200) == pytest.approx(1)
    assert time_floor(1, 67e12, H200, torch.float32) == pytest.approx(1)
    assert time_floor(4.3e12, 1, replace(H200, bandwidth=8.6e12)) == pytest.approx(0.5)


def iuvit_flops(batch: int, config: IUViTConfig) -> float:
    """Forward of an IU-ViT without text, from the paper's figure alone."""
    D, p, side = config.dim, config.patch_size, config.sides[0]
    patches = (side // p) ** 2
    tokens = patches + 1
    block = tokens * (2 * D * 3 * D + 2 * D * D + 2 * D * 4 * D + 2 * 4 * D * D)
    block += 2 * 2 * tokens * tokens * D  # q k^T and the weighted sum
    block += 2 * 9 * patches * 4 * D  # depth-wise convolution
    skips = config.layers // 2 * tokens * 2 * 2 * D * D
    ends = patches * 2 * config.in_channels * p * p * D  # patches in
    ends += side * side * 2 * 9 * (D // p**2) * config.in_channels  # head's convolution
    ends += 2 * 2 * D * D  # time
    return batch * (config.layers * block + skips + ends)


def test_iuvit_by_an_independent_formula() -> None:
    found = count("iuvit_cifar10", 4, training=False)
    config = create_model("iuvit_cifar10").config
    assert found.flops == iuvit_flops(4, config)
    fused = [call for call in found.calls if call.kind == "dwconv_gelu"]
    assert len(fused) == 13
    # the reference model's table: 13 blocks with two norms each, and the head's
    assert sum(call.kind == "layer_norm_modulate" for call in found.calls) == 27
    assert sum(call.kind == "attention" for call in found.calls) == 13
    assert not any(call.backward for call in found.calls)


@pytest.mark.parametrize("name", ["iuvit_cc12m64", "ascend_cifar10"])
def test_flops_are_those_of_pytorchs_counter(name: str) -> None:
    found = count(name, 2, training=False, text=7)
    with torch.device("meta"):
        model = create_model(name).to(torch.bfloat16).eval()
        x = torch.empty(2, 3, *model.config.image_size, dtype=torch.bfloat16)
        context = None
        if model.config.context_dim is not None:
            context = torch.empty(2, 7, model.config.context_dim, dtype=torch.bfloat16)
        with FlopCounterMode(display=False) as counter, torch.no_grad(), backend("reference"):
            model(x, torch.empty(2), context)
    assert found.flops == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_training_counts_twice_the_products_and_the_optimiser() -> None:
    forward = count("ascend_cifar10", 2, training=False)
    both = count("ascend_cifar10", 2)

    def flops(found: roofline.Count, kind: str, backward: bool) -> float:
        return sum(c.flops for c in found.calls if c.kind == kind and c.backward == backward)

    for kind in ("matrix product", "convolution"):
        once = flops(forward, kind, False)
        assert flops(both, kind, False) == once
        # two products for each of the forward's, but none for the gradient of the image or time
        assert 1.95 * once < flops(both, kind, True) <= 2 * once
    for kind in BLOCKED:
        calls = [c for c in both.calls if c.kind == kind]
        assert len(calls) == 2 * sum(c.kind == kind for c in forward.calls) > 0
    last = both.calls[-1]
    with torch.device("meta"):
        parameters = sum(p.numel() for p in create_model("ascend_cifar10").parameters())
    assert (last.kind, last.bytes) == ("optimizer and EMA", 40 * parameters)


def test_fused_ops_move_less_than_their_definitions() -> None:
    fused, eager = (count("ascend_cifar10", 32, fused=fused) for fused in (True, False))
    assert eager.flops == pytest.approx(fused.flops, rel=0.01)
    assert eager.bytes > 2 * fused.bytes
    assert eager.seconds(H200) > fused.seconds(H200) > fused.seconds(replace(H200, bandwidth=1e15))


def test_op_cost_reads_a_call_as_the_op_got_it() -> None:
    x = torch.empty(2, 4, 4, 24, dtype=torch.bfloat16, device="meta")
    table = torch.empty(9, 2, device="meta")
    form = (x, table, 2, (2, 2), (0, 0), None, 1.0, False)
    expected = roofline.window_attention((2, 4, 4, 8), heads=2, window=(2, 2))
    assert roofline.op_cost("window_attention", form) == expected
    image, skip = (torch.empty(2, c, 4, 4, device="meta") for c in (4, 8))
    vector, film = torch.empty(12, device="meta"), torch.empty(2, 12, device="meta")
    form = (image, vector, vector, 4, 1e-5, film, None, skip, True)
    expected = roofline.group_norm_silu((2, 12, 4, 4), groups=4, film=1, element=4)
    assert roofline.op_cost("group_norm_silu", form) == expected
    with pytest.raises(ValueError, match="no formula for 'dwconv_ffn'"):
        roofline.op_cost("dwconv_ffn", (x,))


def test_views_are_free_and_expanded_tensors_small() -> None:
    calls: list[roofline.Call] = []
    with roofline._Counter(calls):
        x = torch.zeros(4, 8, device="meta")
        view = x.t()[1:].unsqueeze(0)
        assert [call.bytes for call in calls] == [4 * 8 * 4]  # zeros: written only
        _ = view + torch.empty(7, 1, device="meta").expand(7, 4)
        x.copy_(x)
    assert calls[1].bytes == (7 * 4 + 7 + 7 * 4) * 4
    assert calls[2].bytes == 2 * 4 * 8 * 4
    assert calls[2].kind == "copy"


def test_counting_wants_the_meta_device_and_leaves_the_ops_as_they_were() -> None:
    model = IUViT(IUViTConfig(image_size=8, dim=64, layers=1))
    with pytest.raises(ValueError, match="IUViT is not on the meta device"):
        count(model, 1)
    count("iuvit_cifar10", 1, training=False)
    assert model(torch.zeros(1, 3, 8, 8), 1).isfinite().all()


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    roofline.main(["iuvit_cifar10", "--batch", "2", "--chip", "a100-40g", "--bandwidth", "1.5"])
    text = capsys.readouterr().out
    assert text.startswith("iuvit_cifar10, batch 2, bfloat16, forward, backward and optimiser")
    assert "A100 40 GB: 1.50 TB/s, 312 TFLOP/s" in text
    assert "dwconv_gelu, backward" in text
    rows = [line.split() for line in text.splitlines()[2:-1]]
    shares = [float(row[-1].rstrip("%")) for row in rows]
    assert shares[-1] == 100
    assert sum(shares[:-1]) == pytest.approx(100, abs=1.5)
