"""The `fastdiff` command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import fastdiff


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
    return root


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name (default: those of the process)."""
    arguments = parser().parse_args(argv)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
