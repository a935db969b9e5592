"""Statistics of a set of pictures, from pictures to file; the same on any number of ranks.

Batch k holds the same pictures however many ranks there are and is computed by rank k mod world;
features are gathered in the order of the pictures and summed in that order on every rank. So the
statistics agree to the bit between one rank and many, if each computes with as many threads.

Legend: N pictures, D features, K classes, H W pixels.
"""

from __future__ import annotations

import io
import json
import os
import platform
import secrets
import warnings
import zipfile
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastdiff.data.samples import BadSample
from fastdiff.metrics.extractors import Extractor
from fastdiff.metrics.pictures import Pictures
from fastdiff.metrics.ranks import in_order, own_batches

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What evaluation keeps of a set of pictures.

    Args:
        mean: (D,) float64.
        covariance: (D, D) float64, by N - 1.
        count: N.
        features: (M, D) float32 of M pictures spread evenly over the set, or None.
        logits: (N, K) float32, or None; never stored.
        about: what made them (JSON values): `extractor`, `size` (H, W), `transform`, `crop`,
            `resize`, `data`, `software`. Absent in files of other tools.
    """

    mean: Tensor
    covariance: Tensor
    count: int
    features: Tensor | None = None
    logits: Tensor | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write an `.npz` with the arrays `mu` and `sigma`, as other FID tools read them.

        The file appears whole or not at all.

        Raises:
            FileExistsError: something is at `path`, and overwrite is False.
            ValueError: another suffix than .npz.
        """
        path = Path(path)
        check_free(path, overwrite)
        if path.suffix != ".npz":
            raise ValueError(f"Statistics.save: {path}; expected the suffix .npz")
        arrays = {
            "mu": self.mean.numpy(),
            "sigma": self.covariance.numpy(),
            "count": np.array(self.count, np.int64),
            "about": np.array(json.dumps({"format": FORMAT, **self.about})),
        }
        if self.features is not None:
            arrays["features"] = self.features.numpy()
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        write_whole(path, buffer.getbuffer())
        return path

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read statistics, of ours or of any tool that stores `mu` and `sigma`.

        Raises:
            FileNotFoundError: nothing at `path`.
            ValueError: not such a file, or arrays that do not fit each other.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"Statistics.load: {path} does not exist")
        try:
            with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                arrays = {n: file[n] for n in _ARRAYS if n in file.files}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, TypeError) as error:
            raise ValueError(f"Statistics.load: {path} cannot be read: {error}") from None
        if not {"mu", "sigma"} <= arrays.keys():
            raise ValueError(f"Statistics.load: {path} has no arrays mu and sigma")
        mean, covariance = arrays["mu"], arrays["sigma"]
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"Statistics.load: {path} has mu {mean.shape} and sigma {covariance.shape}; "
                "expected (D,) and (D, D)"
            )
        features = arrays.get("features")
        if features is not None and features.shape[1:] != mean.shape:
            raise ValueError(
                f"Statistics.load: {path} has features {features.shape} and mu {mean.shape}"
            )
        try:
            about = json.loads(str(arrays["about"])) if "about" in arrays else {}
        except ValueError as error:
            raise ValueError(f"Statistics.load: {path} has a damaged about: {error}") from None
        return cls(
            mean=torch.from_numpy(mean.astype(np.float64)),
            covariance=torch.from_numpy(covariance.astype(np.float64)),
            count=int(arrays.get("count", 0)),
            features=None if features is None else torch.from_numpy(features),
            about=about,
        )


_ARRAYS = ("mu", "sigma", "count", "about", "features")


class Moments:
    """Mean and covariance of rows that come in batches, in float64.

    Sums are taken about the first batch's mean, so that a large mean costs no digits.
    """

    def __init__(self) -> None:
        self.count = 0
        self._shift = self._sum = self._products = torch.empty(0, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take a batch (B, D)."""
        rows = rows.double()
        if self.count == 0:
            self._shift = rows.mean(0)
            self._sum = torch.zeros_like(self._shift)
            self._products = rows.new_zeros(rows.shape[1], rows.shape[1])
        rows = rows - self._shift
        self.count += len(rows)
        self._sum += rows.sum(0)
        self._products.addmm_(rows.T, rows)

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean (D,) and unbiased covariance (D, D).

        Raises:
            ValueError: fewer than two rows.
        """
        if self.count < 2:
            raise ValueError(f"Moments: a covariance of {self.count} pictures; expected at least 2")
        offset = self._sum / self.count
        covariance = (self._products - self._sum.outer(offset)) / (self.count - 1)
        return self._shift + offset, (covariance + covariance.T) / 2


def measure(
    pictures: Pictures,
    extractor: Extractor,
    *,
    keep_features: int = 0,
    logits: bool = False,
    batch_size: int = 64,
    workers: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> Statistics:
    """Statistics of pictures. Under torch.distributed all ranks call it, and all have the result.

    Args:
        pictures: the same on every rank.
        extractor: the same on every rank; moved to `device`.
        keep_features: features are kept of so many pictures at most.
        logits: keep the classifier's output of every picture.
        batch_size: pictures in a call of the extractor.
        workers: reading processes of each rank; 0 reads in this one.
        device: of the extractor.
        progress: called with the number of pictures done since its last call.

    Raises:
        BadSample: a picture that cannot be read, on all ranks; the error names it.
        ValueError: pictures of differing sizes, features that are not finite, fewer than two
            pictures, or a number out of range.

    Warns:
        UserWarning: no more pictures than features, so that the covariance is singular.
    """
    if batch_size < 1 or workers < 0 or keep_features < 0:
        raise ValueError(
            f"measure: batch_size={batch_size}, workers={workers}, keep_features={keep_features}; "
            "expected at least 1, 0 and 0"
        )
    n = len(pictures)
    kept = min(keep_features, n)
    rows = {index * n // kept for index in range(kept)}
    moments, features, scores = Moments(), [], []
    size: tuple[int, ...] | None = None
    own = _own_features(
        pictures, extractor.to(device), logits, batch_size, workers, torch.device(device)
    )
    # Closed at once, so that an error leaves no reading process behind.
    with closing(own):
        for number, batch in enumerate(in_order(-(-n // batch_size), own)):
            start = number * batch_size
            if size is not None and batch.size != size:
                raise ValueError(_differing(pictures, start, batch.size, size))
            size = batch.size
            if not bool(batch.features.isfinite().all()):
                raise ValueError(
                    f"measure: {extractor.name} gives NaN or infinity near {pictures.key(start)}"
                )
            moments.add(batch.features)
            chosen = [i for i in range(len(batch.features)) if start + i in rows]
            features.append(batch.features[chosen])
            if batch.logits is not None:
                scores.append(batch.logits)
            if progress is not None:
                progress(len(batch.features))
    mean, covariance = moments.result()
    warn_if_few(str(pictures.path), n, len(mean))
    transform = pictures.transform
    return Statistics(
        mean=mean,
        covariance=covariance,
        count=n,
        features=torch.cat(features) if kept else None,
        logits=torch.cat(scores) if scores else None,
        about={
            "data": pictures.path.name,
            "size": list(size or ()),
            "transform": transform.name if transform else None,
            "crop": transform.crop_text if transform else None,
            "resize": transform.resize_text if transform else None,
            "extractor": {"name": extractor.name, **extractor.about},
            "software": software(),
        },
    )


def warn_if_few(what: str, count: int, features: int) -> None:
    """Warn where a covariance is singular for want of pictures."""
    if count <= features:
        warnings.warn(
            f"{what}: {count} pictures for {features} features: the covariance is singular and a "
            "Frechet distance far from its limit; the paper's are of 50,000 pictures",
            UserWarning,
            stacklevel=3,
        )


def _differing(
    pictures: Pictures, index: int, size: tuple[int, ...], other: tuple[int, ...]
) -> str:
    return (
        f"measure: {pictures.key(index)} in {pictures.path} has {size[1]}x{size[0]} pixels, those "
        f"before it {other[1]}x{other[0]}; choose a transform that makes them equal"
    )


class _Batch(NamedTuple):
    features: Tensor
    logits: Tensor | None
    size: tuple[int, ...]


class _Batches(Dataset[Any]):
    """Batch number k as (B, H, W, 3) uint8; what is wrong with it comes as a value, to be told to
    all ranks (an exception that leaves a reading process loses its type)."""

    def __init__(self, pictures: Pictures, batch_size: int) -> None:
        self.pictures, self.batch_size = pictures, batch_size

    def __getitem__(self, k: int) -> np.ndarray | Exception:
        first = k * self.batch_size
        pixels: list[np.ndarray] = []
        try:
            for index in range(first, min(first + self.batch_size, len(self.pictures))):
                pixels.append(self.pictures[index])
                if pixels[-1].shape != pixels[0].shape:
                    shapes = pixels[-1].shape, pixels[0].shape
                    return ValueError(_differing(self.pictures, index, *shapes))
        except BadSample as error:
            return error
        return np.stack(pixels)


def _own_features(
    pictures: Pictures,
    extractor: Extractor,
    logits: bool,
    batch_size: int,
    workers: int,
    device: torch.device,
) -> Generator[_Batch | Exception]:
    """This rank's batches."""
    mine = own_batches(-(-len(pictures) // batch_size))
    loader = DataLoader(
        _Batches(pictures, batch_size),
        batch_size=None,
        sampler=mine,
        num_workers=min(workers, len(mine)),
        pin_memory=device.type == "cuda",
        # Without its own the loader takes a number from torch's global generator.
        generator=torch.Generator(),
    )
    for pixels in loader:
        if isinstance(pixels, Exception):
            yield pixels
            continue
        x = pixels.to(device, non_blocking=True).permute(0, 3, 1, 2)
        try:
            features, scores = extractor(x, logits=logits)
        except ValueError as error:
            yield error
            continue
        scores = None if scores is None else scores.cpu()
        yield _Batch(features.cpu(), scores, tuple(x.shape[2:]))


def software() -> dict[str, str]:
    """Versions that a number may depend on."""
    versions = {"python": platform.python_version()}
    for package in ("fastdiff", "torch", "numpy", "pillow"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"  # on the path of a checkout only
    return versions


def check_free(path: Path, overwrite: bool) -> None:
    """Refuse to write over a file unless told to.

    Raises:
        FileExistsError: something is at `path`, and overwrite is False.
    """
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; remove it, choose another path, or ask to overwrite")


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
