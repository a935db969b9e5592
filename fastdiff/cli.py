"""The `fastdiff` command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import fastdiff
from fastdiff import _evaluate, _sample


def _info(arguments: argparse.Namespace) -> None:
    if not arguments.models and not arguments.markdown:
        fastdiff.show_config()
        return
    from fastdiff import model_table
    from fastdiff.models import PRESETS, list_models
    from fastdiff.models.backbone import nearest

    names: list[str] = []
    for pattern in arguments.models or ["*"]:
        matching = list_models(pattern)
        if not matching:
            raise SystemExit(f"fastdiff info: no model {pattern!r}, {nearest(pattern, PRESETS)}")
        names += matching
    rows = [model_table.measure(name) for name in PRESETS if name in names]
    print((model_table.as_markdown if arguments.markdown else model_table.as_text)(rows))


def _checkpoint_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("checkpoint", help="nnet.pth, *_diffusion.pt, ... or .safetensors")
    command.add_argument("--layout", choices=["uvit", "adm", "hana"], help="default: by its keys")
    command.add_argument("--weights", metavar="NAME", help="which, where the file has several sets")
    command.add_argument("--image-size", type=int, metavar="PIXELS", help="where the file has none")
    command.add_argument("--head-dim", type=int, metavar="WIDTH", help="of a head, default 64")
    command.add_argument("--heads", type=int, help="of ADM, where every level has as many")
    command.add_argument(
        "--attention-order",
        choices=["legacy", "new"],
        help="of ADM's qkv; new = its use_new_attention_order",
    )


def _imported(arguments: argparse.Namespace) -> tuple[str, Any]:
    from fastdiff.integrations.importers import Options

    names = ("layout", "weights", "image_size", "head_dim", "heads", "attention_order")
    return arguments.checkpoint, Options(**{name: getattr(arguments, name) for name in names})


def _convert(arguments: argparse.Namespace) -> None:
    from fastdiff.integrations.importers import import_checkpoint

    try:
        imported = import_checkpoint(*_imported(arguments))
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"fastdiff convert: {error}") from error
    print(imported)
    if not (imported.complete or arguments.partial):
        raise SystemExit("fastdiff convert: nothing was written; --partial writes it nevertheless")
    imported.model.save_pretrained(arguments.out)
    print(f"written to {arguments.out}; fastdiff.from_pretrained reads it")


def _verify(arguments: argparse.Namespace) -> None:
    from fastdiff.integrations.verify import verify

    checkpoint, options = _imported(arguments)
    try:
        verified = verify(checkpoint, arguments.code, options, tolerance=arguments.tolerance)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"fastdiff verify: {error}") from error
    print(verified)
    if not verified.same:
        raise SystemExit(1)


def _embed_text(arguments: argparse.Namespace) -> None:
    from fastdiff.data.embed import Written, embed_shards, place_of_process
    from fastdiff.data.readers import open_dataset
    from fastdiff.data.shards import ShardDataset
    from fastdiff.text import T5TextEncoder

    rank, world, device = place_of_process()

    def told(done: Written) -> None:
        rotten = f", {done.rotten} without a caption" if done.rotten else ""
        print(f"{done.shard}: {done.samples} captions, {done.tokens} tokens{rotten}", flush=True)

    try:
        dataset = open_dataset(arguments.data, cache=arguments.cache, cache_gib=arguments.cache_gib)
        if not isinstance(dataset, ShardDataset):
            raise ValueError(f"{arguments.data} holds no tar shards")
        encoder = T5TextEncoder(
            arguments.encoder,
            dtype=arguments.dtype,
            max_length=arguments.max_length,
            revision=arguments.revision,
            device=arguments.device or device,
        )
        done = embed_shards(
            dataset,
            encoder,
            arguments.out,
            rank=rank,
            world=world,
            batch_tokens=arguments.batch_tokens,
            told=told,
        )
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise SystemExit(f"fastdiff embed-text: {error}") from error
    share = f" (process {rank} of {world})" if world > 1 else ""
    print(f"{len(done.written)} shards written to {arguments.out}, {done.kept} were there{share}")
    for shard, reason in done.failed + [(bad.path, bad.reason) for bad in dataset.bad_shards]:
        print(f"fastdiff embed-text: {shard} has no text features: {reason}")
    if done.failed:
        raise SystemExit(1)


def _plan(arguments: argparse.Namespace) -> None:
    import dataclasses
    import json

    from fastdiff import plan

    try:
        found = plan.plan(
            plan.open_recipe(arguments.config),
            arguments.gpu,
            arguments.count,
            title=arguments.config,
            efficiency=arguments.efficiency,
            tokens=arguments.tokens,
            network_gbit=arguments.network_gbit,
        )
    except (ValueError, OSError) as error:
        raise SystemExit(f"fastdiff plan: {error}") from error
    print(
        json.dumps(dataclasses.asdict(found), indent=2) if arguments.json else plan.as_text(found)
    )


def _plot(arguments: argparse.Namespace) -> None:
    from fastdiff import _plot as curves

    try:
        for file in curves.plot(arguments.runs, arguments.out):
            print(file)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"fastdiff plot: {error}") from error


def parser() -> argparse.ArgumentParser:
    """The command line: one function per subcommand, each importing what it needs when it runs."""
    root = argparse.ArgumentParser(prog="fastdiff", description=__doc__)
    root.add_argument("--version", action="version", version=f"fastdiff {fastdiff.__version__}")
    commands = root.add_subparsers(required=True, metavar="command")

    info = commands.add_parser(
        "info",
        help="what is installed and missing; or the table of models",
        description="Without arguments: versions, devices, the back end of every op, and what is "
        "missing. With models: their parameters beside the paper's, GFLOP of a forward and MiB of "
        "activations of a training step in bfloat16, for each image, without and with gradient "
        "checkpointing.",
    )
    info.add_argument("models", nargs="*", help="names or shell patterns: 'iuvit*', '*'")
    info.add_argument("--markdown", action="store_true", help="the table as the README has it")
    info.set_defaults(run=_info)

    convert = commands.add_parser(
        "convert",
        help="weights of U-ViT, guided-diffusion (ADM) or hana into a model of ours",
        description="Reads a checkpoint of another project, without running anything of it, says "
        "which keys it could not place, and writes config.json and model.safetensors.",
    )
    _checkpoint_options(convert)
    convert.add_argument("out", help="folder to write")
    convert.add_argument("--partial", action="store_true", help="write also with keys left over")
    convert.set_defaults(run=_convert)

    verify = commands.add_parser(
        "verify",
        help="do converted weights give the outputs of that project's own code?",
        description="Compares outputs and gradients on random images. The project's code is "
        "imported from --code, so it runs: give a checkout that you trust.",
    )
    _checkpoint_options(verify)
    verify.add_argument("--code", required=True, help="checkout of U-ViT or guided-diffusion")
    verify.add_argument("--tolerance", type=float, default=1e-4, help="default 1e-4")
    verify.set_defaults(run=_verify)

    _sample.add_command(commands)
    _evaluate.add_commands(commands)
    embed = commands.add_parser(
        "embed-text",
        help="T5 features of a data set's captions, stored for training",
        description="Writes NAME.text.safetensors for each NAME.tar: valid tokens only, bfloat16, "
        "with checksums. Under `torchrun -m fastdiff embed-text ...` each process takes its share; "
        "a job that was stopped goes on. Train with --data.embeddings OUT.",
    )
    embed.add_argument("data", help="folder or address of tar shards")
    embed.add_argument("out", help="folder or address of the features; may be the data's")
    embed.add_argument("--encoder", default="t5-11b", help="name or folder of a T5, default t5-11b")
    embed.add_argument("--revision", help="of an encoder by name: branch, tag or commit")
    embed.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    embed.add_argument("--max-length", type=int, default=256, metavar="TOKENS", help="default 256")
    embed.add_argument("--batch-tokens", type=int, default=16_384, metavar="TOKENS")
    embed.add_argument("--device", help="default: this process's GPU, else the CPU")
    embed.add_argument("--cache", default="~/.cache/fastdiff/shards", help="for remote shards")
    embed.add_argument("--cache-gib", type=float, default=64.0, metavar="GIB")
    embed.set_defaults(run=_embed_text)

    plan = commands.add_parser(
        "plan",
        help="memory by ZeRO stage, largest micro-batch and hours of a training recipe",
        description="Works out, without a GPU, what a recipe needs on GPUs of one kind, and prints "
        "what the numbers take for granted.",
    )
    plan.add_argument("config", help="a recipe's name, the folder of a run, or its recipe.yaml")
    plan.add_argument("--gpu", required=True, help="a100-40g, a100-80g, h100-80g or h200-141g")
    plan.add_argument("--count", type=int, default=1, help="GPUs in all; default 1")
    plan.add_argument(
        "--efficiency", type=float, default=0.5, help="share of the roofline, default 0.5"
    )
    plan.add_argument("--tokens", type=int, default=32, help="of a mean caption, default 32")
    plan.add_argument(
        "--network-gbit",
        type=float,
        default=200.0,
        metavar="GBIT",
        help="per second between nodes of eight GPUs; default 200",
    )
    plan.add_argument("--json", action="store_true", help="for programs")
    plan.set_defaults(run=_plan)

    plot = commands.add_parser(
        "plot",
        help="curves of training runs as a PNG and a page of its own",
        description="Reads the metrics.jsonl of each run, also of one that is still training.",
    )
    plot.add_argument("runs", nargs="+", help="folders of runs")
    plot.add_argument("--out", metavar="STEM", help="default RUN/curves: curves.png, curves.html")
    plot.set_defaults(run=_plot)
    return root


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name (default: those of the process)."""
    arguments = parser().parse_args(argv)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
