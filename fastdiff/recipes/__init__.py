"""Experiments of the paper and of the demonstration, one typed file each."""

from __future__ import annotations

import importlib
import pkgutil

from fastdiff.models.backbone import nearest
from fastdiff.training.config import Recipe


def list_recipes() -> list[str]:
    """Names of all recipes, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get_recipe(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        ValueError: No recipe has that name; the nearest are named.
    """
    if name not in list_recipes():
        raise ValueError(f"no recipe {name!r}, {nearest(name, list_recipes())}")
    return importlib.import_module(f"{__name__}.{name}").RECIPE
