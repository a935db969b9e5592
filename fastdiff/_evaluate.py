"""`fastdiff stats` and `fastdiff fid`, alone or under torchrun."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdiff.metrics import Extractor


def add_commands(commands: Any) -> None:
    """Add both commands to the command line."""
    stats = commands.add_parser(
        "stats",
        help="statistics of a data set's pictures, which FID and its kin compare samples with",
        description="Writes mean and covariance of the extractor's features (the arrays mu and "
        "sigma, as other tools read them), features of some pictures, and what they depend on: "
        "extractor, crop, size, versions. With several GPUs: torchrun --nproc-per-node 8 -m "
        "fastdiff stats ...; the numbers do not depend on how many.",
    )
    stats.add_argument("data", help="folder, .zip, tar shards, .npz, cifar-10-binary.tar.gz")
    stats.add_argument("out", help=".npz to write")
    _options(stats)
    stats.add_argument(
        "--keep-features",
        type=int,
        default=10_000,
        metavar="N",
        help="of so many pictures, for KID, precision and recall; default 10000, 0 for FID alone",
    )
    stats.set_defaults(run=_run("stats", _stats))

    fid = commands.add_parser(
        "fid",
        help="FID, KID, precision and recall, Inception score, CLIP score of samples",
        description="Prints the result and writes it as JSON, with all that the numbers depend "
        "on. Statistics of another extractor or size are refused.",
    )
    fid.add_argument("samples", help="folder, .zip, tar shards or .npz of generated pictures")
    fid.add_argument("statistics", nargs="?", help="what `fastdiff stats` wrote, or another tool")
    _options(fid)
    fid.add_argument(
        "--scores",
        nargs="+",
        default=["fid"],
        metavar="NAME",
        help="fid (default), kid, precision_recall, inception_score",
    )
    fid.add_argument("--seed", type=int, default=0, help="of KID's subsets; default 0")
    fid.add_argument("--clip", metavar="MODEL", help="also the CLIP score of captioned samples")
    fid.add_argument("--out", help="JSON to write; default SAMPLES.fid.json")
    fid.set_defaults(run=_run("fid", _fid))


def _options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--extractor", metavar="FILE", help="TorchScript, such as an Inception's")
    command.add_argument(
        "--value-range",
        nargs=2,
        type=float,
        metavar=("BLACK", "WHITE"),
        help="that the extractor takes; default the statistics', else 0 255",
    )
    command.add_argument(
        "--input-size", type=int, metavar="PIXELS", help="where the extractor does not scale itself"
    )
    command.add_argument("--transform", metavar="NAME", help="celeba64, lsun256, square64, ...")
    command.add_argument("--count", type=int, metavar="N", help="only the first N pictures")
    command.add_argument("--batch-size", type=int, default=64, metavar="N", help="default 64")
    command.add_argument("--workers", type=int, default=0, metavar="N", help="that read; default 0")
    command.add_argument("--device", help="default cuda where there is one")
    command.add_argument("--overwrite", action="store_true", help="replace what is at the output")


def _run(
    name: str, command: Callable[[argparse.Namespace], None]
) -> Callable[[argparse.Namespace], None]:
    def run(arguments: argparse.Namespace) -> None:
        from fastdiff.data import BadSample

        try:
            if arguments.batch_size < 1 or arguments.workers < 0:
                raise ValueError("--batch-size must be at least 1, --workers at least 0")
            with _process_group():
                command(arguments)
        except (ValueError, OSError, BadSample) as error:
            raise SystemExit(f"fastdiff {name}: {error}") from error

    return run


@contextmanager
def _process_group() -> Iterator[None]:
    """The ranks that torchrun started, joined; features travel over the CPU."""
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def _first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _device(arguments: argparse.Namespace) -> str:
    import torch

    if arguments.device or not torch.cuda.is_available():
        return arguments.device or "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


@contextmanager
def _progress(total: int, title: str) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    with tqdm(total=total, unit="picture", desc=title, disable=not _first_rank()) as bar:
        yield bar.update


def _extractor(arguments: argparse.Namespace, stored: dict[str, Any] | None) -> Extractor:
    """The extractor; how it takes pictures is as asked, else as it was for the statistics."""
    from fastdiff.metrics import load_torchscript

    if arguments.extractor is None:
        raise ValueError("no extractor; give --extractor FILE, a TorchScript file")
    stored = stored or {}
    low, high = arguments.value_range or stored.get("value_range") or (0.0, 255.0)
    return load_torchscript(
        arguments.extractor,
        value_range=(low, high),
        image_size=arguments.input_size or stored.get("image_size"),
    )


def _pictures(path: str, arguments: argparse.Namespace) -> Any:
    from fastdiff.data.transforms import named_transform
    from fastdiff.metrics import open_pictures

    transform = named_transform(arguments.transform) if arguments.transform else None
    return open_pictures(path, transform, arguments.count)


def _stats(arguments: argparse.Namespace) -> None:
    from fastdiff.metrics import measure
    from fastdiff.metrics.statistics import check_free

    out = Path(arguments.out)
    check_free(out, arguments.overwrite)
    if out.suffix != ".npz":
        raise ValueError(f"{out}: expected the suffix .npz")
    extractor = _extractor(arguments, None)
    pictures = _pictures(arguments.data, arguments)
    with _progress(len(pictures), "stats") as progress:
        statistics = measure(
            pictures,
            extractor,
            keep_features=arguments.keep_features,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            device=_device(arguments),
            progress=progress,
        )
    if _first_rank():
        statistics.save(out, overwrite=arguments.overwrite)
        print(f"{out}: {statistics.count} pictures, {len(statistics.mean)} features")


def _fid(arguments: argparse.Namespace) -> None:
    from fastdiff.metrics import Statistics, evaluate
    from fastdiff.metrics.statistics import check_free, write_whole

    samples = Path(arguments.samples)
    out = Path(arguments.out or samples.with_name(f"{samples.resolve().name}.fid.json"))
    check_free(out, arguments.overwrite)
    result: dict[str, Any] = {}
    if arguments.extractor or arguments.statistics or not arguments.clip:
        stored = None
        if arguments.statistics:
            stored = Statistics.load(arguments.statistics).about.get("extractor")
        extractor = _extractor(arguments, stored)
        pictures = _pictures(arguments.samples, arguments)
        with _progress(len(pictures), "fid") as progress:
            result = evaluate(
                pictures,
                extractor,
                arguments.statistics,
                scores=arguments.scores,
                seed=arguments.seed,
                batch_size=arguments.batch_size,
                workers=arguments.workers,
                device=_device(arguments),
                progress=progress,
            )
    if arguments.clip:
        result = _clip_score(arguments) | result
    if _first_rank():
        text = json.dumps(result, indent=1)
        write_whole(out, (text + "\n").encode())
        print(text)


def _clip_score(arguments: argparse.Namespace) -> dict[str, Any]:
    from fastdiff.clip import CLIP
    from fastdiff.data import open_dataset
    from fastdiff.metrics import caption_agreement
    from fastdiff.metrics.evaluation import sample_settings
    from fastdiff.metrics.statistics import software

    clip = CLIP(arguments.clip, device=_device(arguments))
    dataset = open_dataset(arguments.samples)
    count = min(arguments.count or len(dataset), len(dataset))
    with _progress(count, "clip") as progress:
        spread = caption_agreement(
            dataset, clip.score, count, batch_size=arguments.batch_size, progress=progress
        )
    return {
        "clip_score": spread.mean,
        "clip_score_std": spread.std,
        "clip": clip.name,
        "count": count,
        "samples": {"path": arguments.samples},
        **sample_settings(_pictures(arguments.samples, arguments)),
        "evaluator": {"software": software()},
    }
