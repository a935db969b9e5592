"""The launch scripts: whole as shell, with flags that exist, and torchrun's as it runs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "train" / "launch"


def test_torchrun_has_the_flags():
    script = LAUNCH / "torchrun.sh"
    help = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    call = re.search(r"torch\.distributed\.run \\\n((?:  --.*\\\n)+)", script.read_text())
    flags = re.findall(r"--[a-z-]+", call[1])
    assert len(flags) >= 5
    assert [flag for flag in flags if flag not in help] == []


# Slurm's commands, as far as the script asks: two tasks, and signals to tasks alone.
SLURM = {
    "scontrol": 'echo "scontrol $*" >> told; [ "$1" != show ] || echo node0',
    "scancel": 'echo "scancel $*" >> told; kill -USR1 $(cat rank-0 rank-1)',
    "srun": """shift
      for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 "$@" & done
      wait -n; wait -n""",
}
RANK = """
import os, signal, sys, time
rank, code = os.environ["RANK"], int(os.environ["CODE"])
assert sys.argv[1:] == ["--config", "a b"], sys.argv
assert [os.environ[n] for n in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")] == [
    rank, "2", "node0", "20077"
]
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(code))
open(f"rank-{rank}", "w").write(f"{os.getpid()} ")
time.sleep(60)
"""


@pytest.mark.parametrize(("code", "requeued"), [(0, True), (3, False)])
def test_slurm_goes_on_after_a_checkpoint_and_only_then(code, requeued, tmp_path):
    for name, body in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "rank.py").write_text(RANK)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CODE": str(code)}
    environment |= {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[0-1]"}
    environment |= {"PYTHON": sys.executable, "SCRIPT": "rank.py"}
    process = subprocess.Popen(
        [str(LAUNCH / "slurm.sh"), "--config", "a b"], cwd=tmp_path, env=environment
    )
    deadline = time.monotonic() + 30
    while not all((tmp_path / f"rank-{i}").exists() for i in (0, 1)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == code
    told = (tmp_path / "told").read_text().splitlines()
    assert "scancel --signal=USR1 77" in told
    assert ("scontrol requeue 77" in told) == requeued


def test_torchrun_starts_two_ranks(tmp_path):
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "RANKS": "2"}
    environment |= {"PYTHON": sys.executable, "SCRIPT": str(ROOT / "train" / "t2i.py")}
    environment |= {"PORT": "0", "RESTARTS": "0"}
    options = ["--config", "demo", "--train.max-steps", "2", "--train.batch-size", "4"]
    done = subprocess.run(
        [str(LAUNCH / "torchrun.sh"), *options, "--train.out", str(tmp_path / "run")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert len(list(checkpoint.glob("state-*-of-00002.safetensors"))) == 2
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
