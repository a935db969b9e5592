"""The program that runs under compute-sanitizer, here without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import memcheck
import pytest

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, memcheck.__file__, *arguments],
        env={**os.environ, "PYTHONPATH": path, **variables},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("only", "calls"),
    [("philox", 2), ("dwconv_gelu (1, 1)", 3), ("D=33 residual=False bfloat16", 1)],
)
def test_the_calls_run_in_the_interpreter(only: str, calls: int) -> None:
    done = command("--plain", "--only", only, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"memcheck: {calls} calls, 0 failed" in done.stdout


def test_head_widths_and_windows_are_all_there() -> None:
    names = [name for name, _ in memcheck.cases()]
    assert len(names) == len(set(names))
    for d in (16, 32, 64):
        for window in (7, 8):
            mine = [n for n in names if n.startswith(f"window_attention d={d} w={window}")]
            assert [n.partition(f"w={window}")[2] for n in mine] == [
                *("", " shifted", " padded", " padded values")
            ]
    for op in ("dwconv_gelu", "dwconv_ffn", "group_norm_silu", "layer_norm", "philox_normal"):
        assert any(name.startswith(op) for name in names), op


def test_without_the_tool_it_says_how_to_get_it() -> None:
    done = command(COMPUTE_SANITIZER="/no/such/tool")
    assert done.returncode == 2
    assert "compute-sanitizer is not here. It is part of the CUDA toolkit" in done.stderr


STAND_IN = """#!{python}
import os, sys
assert sys.argv[1:3] == ["--tool", "{tool}"], sys.argv
assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
program = sys.argv.index(sys.executable)
assert sys.argv[program + 2:] == ["--plain", "--only", "d=64"]
sys.exit({status})
"""


@pytest.mark.parametrize(
    ("tool", "status", "expected"), [("memcheck", 0, 0), ("racecheck", 99, 1), ("initcheck", 2, 2)]
)
def test_what_the_tool_is_given_and_what_it_says(
    tool: str, status: int, expected: int, tmp_path: Path
) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(STAND_IN.format(python=sys.executable, tool=tool, status=status))
    program.chmod(0o755)
    done = command("--tool", tool, "--only", "d=64", COMPUTE_SANITIZER=str(program))
    assert done.returncode == expected, done.stderr
    assert ("reported errors" in done.stderr) == (status == 99)
