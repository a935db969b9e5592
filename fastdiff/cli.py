"""The `fastdiff` command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import fastdiff
from fastdiff import _evaluate


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
    command.add_argument(
        "--attention-order",
        choices=["legacy", "new"],
        help="of ADM's qkv; new = its use_new_attention_order",
    )


def _imported(arguments: argparse.Namespace) -> tuple[str, Any]:
    from fastdiff.integrations.importers import Options

    names = ("layout", "weights", "image_size", "head_dim", "attention_order")
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

    _evaluate.add_commands(commands)
    return root


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name (default: those of the process)."""
    arguments = parser().parse_args(argv)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
