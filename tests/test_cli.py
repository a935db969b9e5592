"""The `fastdiff` command."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fastdiff
from fastdiff import _show_config, cli, ops
from fastdiff_kernels import _native


def test_info_tells_versions_devices_and_the_back_end_of_every_op(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cli.main(["info"])
    out = capsys.readouterr().out
    assert fastdiff.__version__ in out
    assert torch.__version__ in out
    for name, (op, args, kwargs) in _show_config.example_calls(torch.device("cpu")).items():
        assert f"  {name}" in out
        assert ops.explain(op, *args, **kwargs).backend is not None
    assert "deepspeed" in out


def test_info_knows_every_op() -> None:
    public = set(ops.__all__) - {"Explanation", "backend", "explain"}
    assert set(_show_config.example_calls(torch.device("meta"))) == public


def test_info_says_why_there_is_no_compiled_library_and_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native, "_tried", True)
    monkeypatch.setattr(_native, "_reason", "there was no compiler; do this")
    fastdiff.show_config()
    out = capsys.readouterr().out
    assert "there was no compiler; do this" in out
    assert "no compiled kernels" in out


def test_info_names_an_absent_package_and_how_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_show_config, "OPTIONAL", {"no-such-package": "nothing"})
    fastdiff.show_config()
    assert "absent (for nothing): pip install no-such-package" in capsys.readouterr().out


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["inof"])
    assert "inof" in capsys.readouterr().err


def test_the_command_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "fastdiff.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"fastdiff {fastdiff.__version__}\n"
