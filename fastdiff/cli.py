"""The `fastdiff` command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import fastdiff


def _info(_: argparse.Namespace) -> None:
    fastdiff.show_config()


def parser() -> argparse.ArgumentParser:
    """The command line: one function per subcommand, each importing what it needs when it runs."""
    root = argparse.ArgumentParser(prog="fastdiff", description=__doc__)
    root.add_argument("--version", action="version", version=f"fastdiff {fastdiff.__version__}")
    commands = root.add_subparsers(required=True, metavar="command")

    info = commands.add_parser(
        "info", help="versions, devices, the back end of every op, and what is missing"
    )
    info.set_defaults(run=_info)
    return root


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name (default: those of the process)."""
    arguments = parser().parse_args(argv)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
