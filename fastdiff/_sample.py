"""`fastdiff sample`, alone or under torchrun."""

from __future__ import annotations

import argparse
import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff._evaluate import _device, _first_rank, _process_group, _progress

if TYPE_CHECKING:
    from torch import Tensor

    from fastdiff.diffusion import DiffusionProcess
    from fastdiff.models import Backbone
    from fastdiff.sampling import Output
    from fastdiff.text import SmallTextEncoder, T5TextEncoder

GRID = 64


def add_command(commands: Any) -> None:
    """Add the command to the command line."""
    sample = commands.add_parser(
        "sample",
        help="draw pictures with a trained model",
        description="Draws into a folder of PNGs, a .tar or an .npz. A picture is a function of "
        "its seed and its prompt or label. The same command continues a drawing that was "
        "interrupted; with several GPUs: torchrun --nproc-per-node 8 -m fastdiff sample ...",
    )
    sample.add_argument("model", help="folder of a run or of save_pretrained; or a preset's name")
    sample.add_argument("out", help="folder, or file ending in .tar or .npz")
    what = sample.add_argument_group("what to draw")
    what.add_argument("--prompt", nargs="+", default=[], metavar="TEXT", help="one or several")
    what.add_argument(
        "--prompts-file",
        metavar="FILE",
        help="a prompt a line, or a .csv or .tsv with a column Prompts, such as DrawBench's",
    )
    what.add_argument("--labels", nargs="+", type=int, default=[], metavar="CLASS")
    what.add_argument(
        "--count", type=int, default=1, help="for each prompt or label; else in all; default 1"
    )
    what.add_argument("--seed", type=int, default=0, help="of the first; the next has seed + 1")
    what.add_argument("--size", nargs=2, type=int, metavar=("H", "W"), help="default the model's")
    what.add_argument("--grid", metavar="PNG", help=f"also a sheet of the first {GRID}")
    how = sample.add_argument_group("how")
    how.add_argument("--guidance", type=float, help="1 = none; default the run's, else 1")
    how.add_argument("--guidance-interval", nargs=2, type=float, metavar=("LOW", "HIGH"))
    how.add_argument("--guidance-rescale", type=float, default=0.0, metavar="PHI")
    how.add_argument(
        "--sampler", default="ddim", metavar="NAME",
        help="ddim (default), ancestral, euler_maruyama, ode_euler, ode_heun",
    )  # fmt: skip
    how.add_argument("--steps", type=int, help="default the run's for ddim, else the sampler's")
    how.add_argument("--eta", type=float, help="of ddim")
    how.add_argument("--spacing", help="of ddim: trailing (default), leading, linspace")
    how.add_argument("--variance", help="of ancestral: small (default), large, learned")
    how.add_argument("--batch-size", type=int, default=64, metavar="N", help="default 64")
    how.add_argument("--device", help="default cuda where there is one")
    how.add_argument("--dtype", choices=["float32", "bfloat16"], help="default the weights'")
    how.add_argument("--compile", action="store_true", help="by torch.compile")
    how.add_argument("--no-graphs", action="store_true", help="no CUDA graphs")
    bare = sample.add_argument_group("what a run knows, and a model's folder does not")
    bare.add_argument("--schedule", help="linear or cosine")
    bare.add_argument("--prediction", help="eps (default), x0 or v")
    bare.add_argument("--text-encoder", metavar="T5", help="folder or name; default MODEL/text")
    sample.set_defaults(run=_run)


@dataclass
class _Source:
    """A model and what came with it."""

    model: Backbone
    process: DiffusionProcess
    encoder: SmallTextEncoder | T5TextEncoder | None
    prompts: tuple[str, ...] = ()
    steps: int | None = None
    guidance: float = 1.0


def _run(arguments: argparse.Namespace) -> None:
    import torch

    try:
        if arguments.count < 1 or arguments.batch_size < 1:
            raise ValueError("--count and --batch-size must be at least 1")
        if (arguments.prompt and arguments.labels) or (arguments.prompts_file and arguments.labels):
            raise ValueError("give prompts or labels, not both")
        with _process_group(), torch.no_grad():
            _sample(arguments)
    except (ValueError, OSError) as error:
        raise SystemExit(f"fastdiff sample: {error}") from error


def _sample(arguments: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    from fastdiff.sampling import Engine, Output, SamplerConfig, draw_all, prompts_of

    device = torch.device(_device(arguments))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    source = _load(arguments, device)
    if arguments.dtype:
        source.model.to(getattr(torch, arguments.dtype))
    prompts = [*arguments.prompt]
    if arguments.prompts_file:
        prompts += prompts_of(arguments.prompts_file)
    if not prompts and not arguments.labels:
        prompts = [*source.prompts]
    _check_conditions(source, prompts, arguments.labels)

    steps = arguments.steps
    if steps is None and arguments.sampler == "ddim":
        steps = source.steps
    sampler = SamplerConfig(
        name=arguments.sampler,
        steps=steps,
        eta=arguments.eta,
        spacing=arguments.spacing,
        variance=arguments.variance,
    )
    conditional = bool(prompts or arguments.labels)
    guidance = arguments.guidance
    if guidance is None:
        guidance = source.guidance if conditional else 1.0
    engine = Engine(
        source.model,
        source.process,
        sampler,
        guidance=guidance,
        interval=arguments.guidance_interval and tuple(arguments.guidance_interval),
        rescale=arguments.guidance_rescale,
        graphs=False if arguments.no_graphs else None,
        compile=arguments.compile,
    )
    if guidance not in (0, 1) and not conditional:
        raise ValueError(f"--guidance {guidance} needs prompts or labels to guide by")
    captions = [prompt for prompt in prompts for _ in range(arguments.count)]
    labels = [label for label in arguments.labels for _ in range(arguments.count)]
    count = len(captions) or len(labels) or arguments.count
    seeds = range(arguments.seed, arguments.seed + count)
    if seeds[0] < 0 or seeds[-1] >= 1 << 64:
        raise ValueError(f"--seed {arguments.seed}, expected 0 to 2^64 - {count}")
    size = tuple(arguments.size or source.model.config.sides)
    if arguments.size:
        # Whether the model takes it, before there is a folder.
        source.model(torch.zeros(1, source.model.config.in_channels, *size, device=device), 0)
    settings = {
        **_settings(source, sampler, arguments, captions, labels),
        "guidance": guidance,
        "seeds": [seeds[0], seeds[-1]],
        "count": count,
        "size": size,
    }

    def draw(indices: Sequence[int]) -> Tensor:
        part = slice(indices[0], indices[-1] + 1)
        condition: dict[str, Any] = {}
        if captions:
            assert source.encoder is not None, "checked"
            features = source.encoder.encode(captions[part])
            condition = {"context": features[0], "context_mask": features[1]}
        if labels:
            condition = {"y": torch.tensor(labels[part], device=device)}
        return engine.draw(seeds[part], size=size, **condition)

    output = Output(arguments.out, settings, count, captions or None)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    mine = sum(
        min(arguments.batch_size, count - first)
        for first in range(rank * arguments.batch_size, count, world * arguments.batch_size)
    )
    with _progress(mine, "sample") as progress:
        draw_all(
            draw,
            output,
            batch_size=arguments.batch_size,
            rank=rank,
            world=world,
            progress=progress,
        )
    if world > 1:
        dist.barrier()
    if _first_rank():
        if arguments.grid:
            _write_grid(arguments.grid, output, captions)
        print(output.finish())


def _write_grid(file: str, output: Output, captions: Sequence[str]) -> None:
    import torch

    from fastdiff.grid import picture_grid

    pixels = torch.from_numpy(output.read(range(min(GRID, output.count))))
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    sheet = picture_grid(pixels.permute(0, 3, 1, 2) / 127.5 - 1.0, captions[:GRID] or None)
    sheet.save(file)
    print(file)


def _load(arguments: argparse.Namespace, device: Any) -> _Source:
    folder = Path(arguments.model)
    if (folder / "recipe.yaml").is_file() or (folder / "checkpoints").is_dir():
        return _load_run(arguments, folder, device)
    from fastdiff.diffusion import DiffusionProcess, schedule
    from fastdiff.models import PRESETS, create_model, from_pretrained
    from fastdiff.nn import channels_last_
    from fastdiff.text import SmallTextEncoder, T5TextEncoder

    if folder.is_dir():
        model = from_pretrained(folder)
    elif arguments.model in PRESETS:
        warnings.warn(f"{arguments.model}: a preset's weights are random", stacklevel=1)
        import torch

        torch.manual_seed(0)
        model = create_model(arguments.model)
    else:
        raise ValueError(
            f"{arguments.model} is no folder and no preset; `fastdiff info '*'` lists these"
        )
    if device.type == "cuda":
        channels_last_(model)
    process = DiffusionProcess(
        schedule(arguments.schedule or "linear"), arguments.prediction or "eps"
    )
    encoder: Any = None
    if arguments.text_encoder and not (Path(arguments.text_encoder) / "tokenizer.json").is_file():
        encoder = T5TextEncoder(arguments.text_encoder, device=device)
    else:
        text = Path(arguments.text_encoder or folder / "text")
        if text.is_dir():
            encoder = SmallTextEncoder.from_pretrained(text, device)
    return _Source(
        model.to(device),
        process,
        encoder,
    )


def _load_run(arguments: argparse.Namespace, folder: Path, device: Any) -> _Source:
    from fastdiff.training.loop import load_run

    for name in ("schedule", "prediction", "text_encoder"):
        if getattr(arguments, name):
            raise ValueError(f"--{name.replace('_', '-')}: {folder} is a run and has its own")
    learner, recipe = load_run(folder, device)
    sample = recipe.sample
    text = None if recipe.model.context_dim is None else learner.encoder
    return _Source(
        learner.backbone,
        learner.process,
        text,
        sample.prompts,
        sample.steps,
        sample.guidance,
    )


def _check_conditions(source: _Source, prompts: Sequence[str], labels: Sequence[int]) -> None:
    from fastdiff.text import SmallTextEncoder

    config = source.model.config
    if prompts and config.context_dim is None:
        raise ValueError("prompts given, but the model takes no text")
    if prompts and source.encoder is None:
        raise ValueError(
            "the model's folder holds no text encoder; give --text-encoder, or the folder of the "
            "run that trained the model"
        )
    if prompts and isinstance(source.encoder, SmallTextEncoder) and _first_rank():
        _warn_of_unknown_words(source.encoder, prompts)
    classes = config.num_classes
    if labels and classes is None:
        raise ValueError("--labels given, but the model takes none")
    if labels and not all(0 <= label < classes for label in labels):
        raise ValueError(f"--labels {min(labels)}..{max(labels)}, expected 0 to {classes - 1}")


def _warn_of_unknown_words(encoder: SmallTextEncoder, prompts: Sequence[str]) -> None:
    """A small encoder knows its training captions' words, and answers any other with noise."""
    unknown = encoder.unknown_words(prompts)
    if unknown:
        known = sorted(word for word in encoder.vocabulary if word.isalnum())
        warnings.warn(
            f"the text encoder does not know {_listed(unknown, 10)}: pictures of these words mean "
            f"nothing. It knows {_listed(known, 40)}",
            stacklevel=1,
        )


def _listed(words: Sequence[str], most: int) -> str:
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if words[most:] else "")


def _settings(
    source: _Source,
    sampler: Any,
    arguments: argparse.Namespace,
    captions: Sequence[str],
    labels: Sequence[int],
) -> dict[str, Any]:
    """What the pictures' bytes depend on."""
    from fastdiff.sampling import weights_digest

    options = sampler.resolved(source.process)
    told: dict[str, Any] = {
        "sampler": sampler.name,
        "steps": options.pop("steps", source.process.steps),
        "sampler_options": options,
        "guidance_interval": arguments.guidance_interval,
        "guidance_rescale": arguments.guidance_rescale,
        "model": weights_digest(source.model),
        "process": repr(source.process),
        "batch_size": arguments.batch_size,
    }
    if captions:
        digest = hashlib.sha256("\0".join(captions).encode()).hexdigest()[:16]
        assert source.encoder is not None, "checked"
        told |= {"prompts": digest, "text_encoder": source.encoder.name}
    if labels:
        told["labels"] = labels
    return told
