"""Captioned scenes as a folder of 50 pictures of 16 pixels, and a network as a TorchScript file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_network import Network

from fastdiff.data import scenes


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.write_folder(tmp_path_factory.mktemp("scenes") / "data", n=50, resolution=16)


@pytest.fixture(scope="session")
def torchscript(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network traced and saved; what users have of Inception."""
    path = tmp_path_factory.mktemp("extractor") / "network.pt"
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.trace(Network().eval(), torch.zeros(1, 3, 16, 16)).save(str(path))
    return path
