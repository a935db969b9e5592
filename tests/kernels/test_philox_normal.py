"""`philox_bits` against the published vectors, `philox_normal` against exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from fastdiff_kernels import backend, philox_bits, philox_normal
from fastdiff_kernels.philox_normal import reference

# Random123, tests/kat_vectors: philox4x32 10, counter, key, result.
VECTORS = [
    "00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    "ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd",
    "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1",
]
SEEDS = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 123_456_789_012_345])


@pytest.fixture(params=["reference", "native"])
def on(request):
    with backend(request.param):
        yield


def unsigned(bits):
    return bits.numpy().view(np.uint32)


@pytest.mark.parametrize("vector", VECTORS)
def test_published_vectors(vector):
    c0, c1, c2, c3, k0, k1, *expected = (torch.tensor(int(word, 16)) for word in vector.split())
    assert list(reference.philox((c0, c1, c2, c3), (k0, k1))) == expected


def test_counter_and_key_are_as_documented(on):
    assert [f"{w:08x}" for w in unsigned(philox_bits(torch.tensor([0]), 0, (4,)))[0]] == VECTORS[
        0
    ].split()[6:]
    seed, step, stream = 0xFEDCBA9876543210, 0x89ABCDEF, 0x76543210
    got = unsigned(philox_bits(torch.tensor([seed - 2**64]), step, (2, 5), stream=stream))
    words = []
    for block in range(3):
        counter = map(torch.tensor, (block, step, stream, 0))
        words += reference.philox(
            tuple(counter), tuple(map(torch.tensor, (0x76543210, seed >> 32)))
        )
    assert got.ravel().tolist() == [int(word) for word in words[:10]]


PI = Fraction(3_141_592_653_589_793_238_462_643_383_279, 10**30)


def cosine(x: Fraction) -> Fraction:
    return sum((-1) ** k * x ** (2 * k) / math.factorial(2 * k) for k in range(9))


def test_normals_are_those_of_the_words_to_half_a_place(on):
    seeds = torch.arange(3)
    w, v = unsigned(philox_bits(seeds, 9, (64,))).astype(object).reshape(-1, 2).T
    got = philox_normal(seeds, 9, (64,)).reshape(-1, 2).double().numpy()
    for k in range(len(w)):
        turn = Fraction(2 * v[k] + 1, 2**33)
        # The radius in float64 is good to 1e-16; the rest is exact.
        radius = math.sqrt(-2.0 * math.log((w[k] + 0.5) / 2**32))
        for place, shift in enumerate((Fraction(0), Fraction(1, 4))):
            about = round(4 * (turn - shift))
            left = (turn - shift - Fraction(about, 4)) * 2 * PI
            quarter = [cosine(left), -cosine(PI / 2 - left), -cosine(left)]
            exact = radius * float([*quarter, cosine(PI / 2 - left)][about % 4])
            ulp = float(np.spacing(np.float32(abs(exact))))
            assert abs(got[k, place] - exact) <= 0.51 * ulp


LARGEST = math.sqrt(66 * math.log(2))


@pytest.mark.parametrize(
    ("w", "v", "z"),
    [
        # The largest radius; the smallest; an angle of half a unit short of a quarter of a turn.
        (0, 0, LARGEST),
        (0xFFFFFFFF, 0, 1.5258789e-05),
        (0, 0x3FFFFFFF, LARGEST * math.pi * 2**-32),
        (0, 0xFFFFFFFF, LARGEST),
    ],
)
def test_edges_of_the_words(monkeypatch, w, v, z):
    words = torch.tensor([[[w, v, w, v]]])
    monkeypatch.setattr(reference, "_words", lambda *_: words)
    got = reference.philox_normal(torch.tensor([0]), torch.tensor(0), (4,), 0)
    assert got[0, 0].item() == pytest.approx(z, rel=1e-6)


def test_a_picture_is_its_seed_step_stream_and_place_alone(on):
    shape = (3, 37, 11)
    whole = philox_normal(SEEDS, 5, shape)
    for b, seed in enumerate(SEEDS):
        assert torch.equal(philox_normal(seed.view(1), 5, shape)[0], whole[b])
    # Longer pictures go on where shorter ones end.
    assert torch.equal(philox_normal(SEEDS, 5, (1000,)), whole.flatten(1)[:, :1000])
    assert torch.equal(philox_normal(SEEDS, torch.tensor(5 + 2**32), shape), whole)
    assert torch.equal(philox_normal(SEEDS.repeat(2)[::2], 5, shape), whole[[0, 2, 4] * 2])
    others = [whole, philox_normal(SEEDS, 6, shape), philox_normal(SEEDS, 5, shape, stream=1)]
    rows = torch.cat(others).flatten(1)
    assert torch.equal(torch.corrcoef(rows).abs() > 0.2, torch.eye(len(rows)) == 1)


def test_distribution(on):
    """Moments, and the Kolmogorov-Smirnov distance, within what 10^6 numbers allow."""
    z = philox_normal(torch.arange(64), 3, (128, 128)).double().flatten()
    n = len(z)
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - mean) < 4 * math.sqrt(variance / n)
    cdf = torch.special.ndtr(z.sort().values)
    assert (cdf - (torch.arange(n) + 0.5) / n).abs().max() < 1.95 / math.sqrt(n)
    # Both of a pair, neighbouring pairs, and neighbouring pictures are uncorrelated.
    for lag in (1, 2, 3, 4, 128 * 128):
        for power in (1, 2):
            a = z**power - (z**power).mean()
            assert abs((a[lag:] * a[:-lag]).mean() / a.var()) < 4.5 / math.sqrt(n)


def test_empty_sizes(on):
    assert philox_normal(SEEDS[:0], 0, (3, 4)).shape == (0, 3, 4)
    assert philox_normal(SEEDS, 0, (0, 4)).shape == (6, 0, 4)
    assert philox_normal(SEEDS, 0, ()).shape == (6,)


def test_back_ends_agree_to_the_bit_on_a_hundred_thousand_numbers():
    calls = [(SEEDS, 2**32 - 1, (3, 71, 83), 2**32 - 1), (SEEDS, 0, (1025,), 0)]
    for seeds, step, shape, stream in calls:
        results = []
        for name in ("reference", "native"):
            with backend(name):
                results.append(philox_bits(seeds, step, shape, stream=stream))
                results.append(philox_normal(seeds, step, shape, stream=stream))
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[1], results[3])


def test_compiled_as_one_graph_for_any_batch_and_step():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def call(seeds, step):
        return philox_normal(seeds, step, (3, 5)) * 2

    for batch, step in ((3, 1), (5, 2), (6, 7)):
        seeds = SEEDS[:batch].clone()
        torch._dynamo.mark_dynamic(seeds, 0)
        got = call(seeds, torch.tensor(step))
        assert torch.equal(got, philox_normal(seeds, step, (3, 5)) * 2)
    assert counter.frame_count == 1
    meta = philox_normal(SEEDS.to("meta"), 0, (2, 3))
    assert (meta.shape, meta.device.type) == ((6, 2, 3), "meta")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1, 0, (2,)), TypeError, "seeds is int; expected a tensor"),
        ((SEEDS.int(), 0, (2,)), TypeError, "seeds is torch.int32; expected torch.int64"),
        ((SEEDS.view(2, 3), 0, (2,)), ValueError, r"seeds has shape \(2, 3\); expected \(B,\)"),
        ((SEEDS, -1, (2,)), ValueError, r"step=-1; expected 0..2\^32-1"),
        ((SEEDS, 2**32, (2,)), ValueError, "step=4294967296"),
        ((SEEDS, SEEDS, (2,)), ValueError, r"step is torch.int64 of shape \(6,\) on cpu"),
        ((SEEDS, torch.tensor(1.0), (2,)), ValueError, "step is torch.float32"),
        ((SEEDS, SEEDS[0].to("meta"), (2,)), ValueError, "on meta; expected torch.int64, 0-d, on"),
        ((SEEDS, 0, (2, -1)), ValueError, r"shape=\(2, -1\); expected 0 to 2\^34 elements"),
        ((SEEDS, 0, (2**18, 2**17)), ValueError, "expected 0 to"),
    ],
)
@pytest.mark.parametrize("op", [philox_bits, philox_normal])
def test_bad_arguments(op, arguments, error, message):
    with pytest.raises(error, match=f"^{op.__name__}: .*{message}"):
        op(*arguments)


def test_bad_stream():
    with pytest.raises(ValueError, match=r"^philox_normal: stream=-1; expected 0..2\^32-1"):
        philox_normal(SEEDS, 0, (2,), stream=-1)
