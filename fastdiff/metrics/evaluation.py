"""Samples against stored statistics: the numbers, and beside them all that they depend on."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.data.samples import BadSample, CaptionedImages
from fastdiff.data.transforms import to_tensor
from fastdiff.metrics.extractors import Extractor, file_sha256
from fastdiff.metrics.pictures import Pictures
from fastdiff.metrics.ranks import in_order, own_batches
from fastdiff.metrics.scores import (
    Spread,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from fastdiff.metrics.statistics import Statistics, measure, software, warn_if_few

SCORES = ("fid", "kid", "precision_recall", "inception_score")
#: What is taken over from the settings that sampling leaves with its pictures.
SETTINGS = (
    "sampler",
    "steps",
    "sampler_options",
    "guidance",
    "guidance_interval",
    "guidance_rescale",
    "seeds",
    "model",
    "process",
)
# As the sources of the scores have them.
_SUBSETS, _SUBSET_SIZE, _NEIGHBOURS, _SPLITS = 100, 1000, 3, 10


def evaluate(
    samples: Pictures,
    extractor: Extractor,
    statistics: str | Path | None = None,
    *,
    scores: Collection[str] = ("fid",),
    seed: int = 0,
    **reading: Any,
) -> dict[str, Any]:
    """Judge samples. Under torch.distributed all ranks call it, and all have the result.

    Args:
        samples: the generated pictures.
        extractor: the one that made the statistics.
        statistics: file of `Statistics.save` or of another tool; the Inception score alone needs
            none.
        scores: names out of SCORES.
        seed: of the subsets of KID and the shuffling of the Inception score.
        reading: batch_size, workers, device, progress: see `measure`.

    Returns:
        JSON values: the numbers asked for; count, size; statistics, evaluator (versions and
        extractor), crop, resize; and sampler, steps, guidance, seeds, model, ... from the samples'
        settings (SETTINGS), null where these are not known.

    Raises:
        ValueError: an unknown score, one that lacks what it needs, or statistics of another
            extractor, size of pictures or number of features; samples that are not all there.
        BadSample: a picture that cannot be read; the error names it.

    Warns:
        UserWarning: no more pictures than features on either side, or statistics of another tool,
            which do not say what made them.
    """
    if unknown := sorted(set(scores) - set(SCORES)):
        raise ValueError(f"evaluate: scores {unknown}; expected names out of {SCORES}")
    reference = None if statistics is None else Statistics.load(statistics)
    sampled = sample_settings(samples)
    by_features = bool({"kid", "precision_recall"} & set(scores))
    if reference is None and set(scores) != {"inception_score"}:
        raise ValueError("evaluate: no statistics; only the Inception score does without them")
    if reference is not None:
        check_comparable(reference, extractor, samples)
        if by_features and reference.features is None:
            raise ValueError(
                "evaluate: the statistics hold no features, which KID, precision and recall need; "
                "make them with keep_features"
            )
    stored = reference.features if reference is not None and by_features else None
    own = measure(
        samples,
        extractor,
        keep_features=0 if stored is None else len(stored),
        logits="inception_score" in scores,
        **reading,
    )
    numbers, settings = _compare(own, reference, scores, seed)
    about = {} if reference is None else reference.about
    return {
        **numbers,
        "count": own.count,
        "size": own.about["size"],
        "statistics": None
        if reference is None or statistics is None
        else {
            "file": Path(statistics).name,
            "sha256": file_sha256(Path(statistics).expanduser()),
            "data": about.get("data"),
            "count": reference.count or None,
        },
        "crop": about.get("crop"),
        "resize": about.get("resize"),
        "samples": {"path": str(samples.path), **{k: own.about[k] for k in ("crop", "resize")}},
        **sampled,
        "evaluator": {"extractor": own.about["extractor"], **settings, "software": software()},
    }


def _compare(
    own: Statistics, reference: Statistics | None, scores: Collection[str], seed: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """The numbers, and the settings of the scores that have some."""
    numbers: dict[str, float] = {}
    settings: dict[str, Any] = {}
    if reference is not None and "fid" in scores:
        moments = own.mean, own.covariance, reference.mean, reference.covariance
        numbers["fid"] = frechet_distance(*moments)
    if reference is not None and own.features is not None and reference.features is not None:
        real, generated = reference.features, own.features
        if "kid" in scores:
            size = min(_SUBSET_SIZE, len(real), len(generated))
            kid = kernel_distance(real, generated, subsets=_SUBSETS, subset_size=size, seed=seed)
            numbers |= {"kid": kid.mean, "kid_std": kid.std}
            settings["kid"] = {"subsets": _SUBSETS, "subset_size": size, "seed": seed}
        if "precision_recall" in scores:
            numbers |= precision_recall(real, generated, neighbours=_NEIGHBOURS)._asdict()
            sides = {"real": len(real), "generated": len(generated)}
            settings["precision_recall"] = {"neighbours": _NEIGHBOURS, **sides}
    if own.logits is not None:
        splits = min(_SPLITS, own.count)
        inception = inception_score(own.logits, splits=splits, seed=seed)
        numbers |= {"inception_score": inception.mean, "inception_score_std": inception.std}
        settings["inception_score"] = {"splits": splits, "seed": seed}
    return numbers, settings


def check_comparable(reference: Statistics, extractor: Extractor, samples: Pictures) -> None:
    """Refuse statistics of another extractor or size, before hours are spent on the samples.

    Raises:
        ValueError: another extractor, value range, input size or number of features, or pictures
            of another size; with both values.

    Warns:
        UserWarning: no more pictures than features, or statistics that do not say what made them.
    """
    first = samples[0]
    features = extractor(torch.from_numpy(first[None]).permute(0, 3, 1, 2)).features.shape[1]
    if features != len(reference.mean):
        raise ValueError(
            f"evaluate: {extractor.name} gives {features} features, the statistics have "
            f"{len(reference.mean)}; expected those of the same extractor"
        )
    if reference.count:
        warn_if_few("the statistics", reference.count, features)
    theirs = reference.about.get("extractor")
    if theirs is None:
        warnings.warn(
            "evaluate: the statistics do not say which extractor, crop and size made them; the "
            "numbers hold only if these were the same",
            UserWarning,
            stacklevel=3,
        )
        return
    differing = [
        f"{name} {value}, the statistics' {theirs.get(name)}"
        for name, value in extractor.about.items()
        if value != theirs.get(name)
    ]
    if differing:
        raise ValueError(
            f"evaluate: extractor {extractor.name} has {'; '.join(differing)} "
            f"({theirs.get('name')}); expected the same extractor"
        )
    height, width = reference.about["size"]
    if first.shape[:2] != (height, width):
        raise ValueError(
            f"evaluate: samples have {first.shape[1]}x{first.shape[0]} pixels, the statistics are "
            f"of {width}x{height}"
        )


def sample_settings(samples: Pictures) -> dict[str, Any]:
    """What SETTINGS names of the samples' settings; None where absent.

    Raises:
        ValueError: settings that are not a JSON object, or of more pictures than are there: the
            drawing was interrupted.
    """
    settings = _read_settings(samples.path)
    planned = settings.get("count")
    if isinstance(planned, int) and len(samples) == samples.total < planned:
        raise ValueError(
            f"evaluate: {samples.path} holds {samples.total} of the {planned} pictures of its "
            "drawing; let it end, or say how many are to be judged"
        )
    return {name: settings.get(name) for name in SETTINGS}


def _read_settings(samples: Path) -> dict[str, Any]:
    """What sampling has left with its pictures, {} where there is nothing.

    It lies in a folder as `settings.json`, beside an archive as NAME.json.

    Raises:
        ValueError: a file that is not a JSON object.
    """
    beside = samples.with_name(f"{samples.name}.json")
    path = samples / "settings.json" if samples.is_dir() else beside
    settings: Any = {}
    try:
        if path.is_file():
            settings = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"evaluate: {path} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"evaluate: {path} is {type(settings).__name__}; expected an object")
    return settings


def caption_agreement(
    samples: CaptionedImages,
    score: Callable[[Tensor, list[str]], Tensor],
    count: int | None = None,
    *,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> Spread:
    """Mean and standard deviation of a score of picture and caption, such as `CLIP.score`.

    Args:
        samples: captioned pictures, as `fastdiff.data.open_dataset` opens them.
        score: (pictures (B, 3, H, W) in [-1, 1], B captions) -> (B,).
        count: the first so many only; None for all.
        batch_size: pictures in a call of `score`.
        progress: called with the number of pictures done since its last call.

    Raises:
        BadSample: a picture or caption that cannot be read; the error names it.
    """
    n = len(samples) if count is None else min(count, len(samples))

    def own() -> Iterator[Tensor | Exception]:
        for number in own_batches(-(-n // batch_size)):
            first = number * batch_size
            try:
                batch = [samples[i] for i in range(first, min(first + batch_size, n))]
                pictures = torch.stack([to_tensor(np.array(x.image)[None])[0] for x in batch])
                yield score(pictures, [x.caption for x in batch]).detach().double().cpu()
            except (BadSample, ValueError) as error:
                yield error

    scores = []
    for part in in_order(-(-n // batch_size), own()):
        scores.append(part)
        if progress is not None:
            progress(len(part))
    every = torch.cat(scores)
    return Spread(float(every.mean()), float(every.std(correction=0)))
