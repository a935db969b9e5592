"""From pictures to statistics to file; two ranks as one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from small_network import Network
from torch import Tensor, nn

from fastdiff.data import BadSample
from fastdiff.data.transforms import named_transform
from fastdiff.metrics import Statistics, from_module, measure, open_pictures
from fastdiff.metrics.statistics import Moments


def expected_features(data: Path) -> Tensor:
    pictures = open_pictures(data)
    x = torch.stack([torch.from_numpy(pictures[i]) for i in range(len(pictures))])
    with torch.no_grad():
        return Network()(x.permute(0, 3, 1, 2).float())[0]


def same(a: Statistics, b: Statistics) -> bool:
    pairs = ((a.mean, b.mean), (a.covariance, b.covariance), (a.features, b.features))
    equal = all(x is y is None or torch.equal(x, y) for x, y in pairs)
    return equal and a.count == b.count and a.about == b.about


def test_moments_are_numpys_also_far_from_zero() -> None:
    x = torch.randn(300, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64)
    for offset in (0.0, 1e6):
        moments = Moments()
        for part in (x + offset).split(7):
            moments.add(part)
        mean, covariance = moments.result()
        torch.testing.assert_close(mean, x.mean(0) + offset, rtol=1e-12, atol=1e-12)
        expected = torch.from_numpy(np.cov(x.numpy(), rowvar=False))
        # Of 16 digits the offset takes 6.
        tolerance = 1e-12 if offset == 0 else 1e-8
        torch.testing.assert_close(covariance, expected, rtol=tolerance, atol=tolerance)
    one = Moments()
    one.add(x[:1])
    with pytest.raises(ValueError, match="covariance of 1 pictures"):
        one.result()


def test_measure_is_the_networks_features_summed(data: Path) -> None:
    done: list[int] = []
    statistics = measure(
        open_pictures(data),
        from_module(Network()),
        keep_features=10,
        logits=True,
        batch_size=8,
        progress=done.append,
    )
    features = expected_features(data)
    torch.testing.assert_close(statistics.mean, features.double().mean(0), rtol=1e-5, atol=1e-7)
    expected = torch.from_numpy(np.cov(features.numpy(), rowvar=False))
    torch.testing.assert_close(statistics.covariance, expected, rtol=1e-4, atol=1e-9)
    # Spread over the whole set: sorted pictures are often sorted by class.
    assert statistics.features is not None
    torch.testing.assert_close(statistics.features, features[::5], rtol=1e-4, atol=1e-6)
    assert statistics.logits is not None
    assert statistics.logits.shape == (50, 4)
    assert statistics.count == sum(done) == 50
    assert done == [8] * 6 + [2]


def test_what_the_numbers_depend_on_is_kept(data: Path) -> None:
    pictures = open_pictures(data, named_transform("square8"), 20)
    about = measure(pictures, from_module(Network(), name="net")).about
    assert about["size"] == [8, 8]
    assert about["transform"] == "square8"
    assert about["crop"] == "largest square in the centre"
    assert "8x8, PIL bicubic" in about["resize"]
    assert about["extractor"]["name"] == "net"
    assert about["extractor"]["sha256"] == from_module(Network()).sha256
    assert about["software"]["torch"] == torch.__version__
    assert measure(open_pictures(data), from_module(Network())).about["crop"] is None


def test_reading_processes_change_nothing(data: Path) -> None:
    options = {"keep_features": 50, "batch_size": 16}
    extractor = from_module(Network())
    before = torch.get_rng_state()
    alone = measure(open_pictures(data), extractor, **options)
    assert torch.equal(torch.get_rng_state(), before)  # measuring may happen amid a training
    assert same(alone, measure(open_pictures(data), extractor, workers=1, **options))


def rank_of_two(rank: int, data: str, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    # 5 batches: the last round has work for one rank alone. One batch: the other has none at all.
    for batch_size in (11, 64):
        statistics = measure(
            open_pictures(data), from_module(Network()), keep_features=20, batch_size=batch_size
        )
        statistics.save(f"{out}/{rank}-{batch_size}.npz")
    (Path(data) / "images" / "000049.png").write_bytes(b"rotten")
    dist.barrier()
    with pytest.raises(BadSample, match="000049"):  # on both ranks; only one of them reads it
        measure(open_pictures(data), from_module(Network()), batch_size=11)
    dist.destroy_process_group()


def test_two_ranks_are_one(tmp_path: Path) -> None:
    from fastdiff.data import scenes

    data = scenes.write_folder(tmp_path / "data", n=50, resolution=16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = {
            size: measure(
                open_pictures(data), from_module(Network()), keep_features=20, batch_size=size
            )
            for size in (11, 64)
        }
    finally:
        torch.set_num_threads(threads)
    torch.multiprocessing.spawn(
        rank_of_two, (str(data), str(tmp_path / "store"), str(tmp_path)), nprocs=2
    )
    for size, expected in alone.items():
        for rank in range(2):
            loaded = Statistics.load(tmp_path / f"{rank}-{size}.npz")
            loaded.about.pop("format")
            assert same(loaded, expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_picture_ends_it_by_name(tmp_path: Path, workers: int) -> None:
    for i in range(4):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"rotten")
    with pytest.raises(BadSample, match=r"2\.png"):
        measure(open_pictures(tmp_path), from_module(Network()), workers=workers)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_pictures_of_two_sizes_end_it_by_name(tmp_path: Path, batch_size: int) -> None:
    for i, size in enumerate(((8, 8), (8, 8), (9, 8))):
        Image.new("RGB", size, (i, 0, 0)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=r"2\.png in .* has 9x8 pixels, those before it 8x8"):
        measure(open_pictures(tmp_path), from_module(Network()), batch_size=batch_size)


def test_too_few_pictures_warn_with_the_count(data: Path) -> None:
    with pytest.warns(UserWarning, match="6 pictures for 6 features"):
        measure(open_pictures(data, count=6), from_module(Network()))
    measure(open_pictures(data, count=7), from_module(Network()))  # warnings are errors here


def test_features_that_are_not_finite_are_refused(data: Path) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3)) / (x.amax((1, 2, 3))[:, None] > 300)

    with pytest.raises(ValueError, match="Broken gives NaN or infinity near images/000000"):
        measure(open_pictures(data), from_module(Broken()))


@pytest.mark.parametrize("option", [{"batch_size": 0}, {"workers": -1}, {"keep_features": -1}])
def test_numbers_out_of_range_are_refused(data: Path, option: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="=".join(map(str, next(iter(option.items()))))):
        measure(open_pictures(data), from_module(Network()), **option)


def test_a_file_gives_back_what_was_saved(data: Path, tmp_path: Path) -> None:
    pictures = open_pictures(data, named_transform("square8"))
    statistics = measure(pictures, from_module(Network()), keep_features=5)
    path = statistics.save(tmp_path / "new" / "a.npz")
    loaded = Statistics.load(path)
    assert loaded.about.pop("format") == 1
    assert same(loaded, statistics)
    # As pytorch-fid and ADM's evaluator read it.
    with np.load(path) as file:
        assert np.array_equal(file["mu"], statistics.mean.numpy())
        assert np.array_equal(file["sigma"], statistics.covariance.numpy())
    assert list(path.parent.iterdir()) == [path]  # no partial file stays


def test_a_file_is_not_replaced_unasked(data: Path, tmp_path: Path) -> None:
    statistics = measure(open_pictures(data), from_module(Network()))
    path = tmp_path / "a.npz"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"a\.npz exists"):
        statistics.save(path)
    assert path.read_bytes() == b"precious"
    statistics.save(path, overwrite=True)
    assert Statistics.load(path).count == 50
    with pytest.raises(ValueError, match=r"expected the suffix \.npz"):
        statistics.save(tmp_path / "a.pt")


def test_statistics_of_other_tools_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "fid_stats.npz", mu=np.arange(3.0), sigma=np.eye(3))
    loaded = Statistics.load(tmp_path / "fid_stats.npz")
    assert loaded.mean.tolist() == [0, 1, 2]
    assert (loaded.count, loaded.features, loaded.about) == (0, None, {})


def test_files_that_are_no_statistics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Statistics.load(tmp_path / "a.npz")
    rotten = {
        "no arrays mu and sigma": {"arr_0": np.zeros(3)},
        r"mu \(3,\) and sigma \(4, 4\)": {"mu": np.zeros(3), "sigma": np.eye(4)},
        "features": {"mu": np.zeros(3), "sigma": np.eye(3), "features": np.zeros((2, 4))},
        "pickle": {"mu": np.array([Path()], object), "sigma": np.eye(1)},
        "about": {"mu": np.zeros(3), "sigma": np.eye(3), "about": np.array("{")},
    }
    for reason, arrays in rotten.items():
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(ValueError, match=rf"a\.npz .*{reason}"):
            Statistics.load(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="cannot be read"):
        Statistics.load(tmp_path / "a.npz")
