"""The command line of the training scripts: a recipe by name, and any of its fields."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from fastdiff.recipes import get_recipe, list_recipes
from fastdiff.training.config import Recipe


def parse_recipe(argv: Sequence[str], *, default: str, description: str) -> tuple[str, Recipe]:
    """Read `--config NAME` and overrides such as `--train.max-steps 20`.

    Args:
        argv: Arguments after the script's name. `--local_rank`, which launchers add, is accepted.
        default: Recipe without `--config`.
        description: First line of the help.

    Returns:
        The recipe's name and the recipe.

    Raises:
        SystemExit: Unknown recipe or field (the nearest are named), values that do not fit, help.
    """
    import tyro

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", default=default)
    first.add_argument("--local_rank", "--local-rank", type=int, default=None)
    known, rest = first.parse_known_args(list(argv))
    try:
        recipe = get_recipe(known.config)
        if {"-h", "--help"} & set(rest):
            print(
                f"{description}\n\n--config {{{','.join(list_recipes())}}} (now: {known.config})\n"
            )
        recipe = tyro.cli(
            Recipe,
            default=recipe,
            args=rest,
            description=f"Fields of the recipe {known.config}, each with its present value.",
            config=(tyro.conf.AvoidSubcommands,),
        )
    except ValueError as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return known.config, recipe


def log_to_stderr() -> None:
    """Plain log lines of this package on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("fastdiff")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
