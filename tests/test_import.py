"""What `import fastdiff` costs and pulls in, and that it lives beside other packages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

HEAVY = [
    *("triton", "deepspeed", "transformers", "tokenizers", "diffusers", "xformers", "flash_attn"),
    *("PIL", "matplotlib", "sklearn", "scipy", "tyro", "tensorboard", "yaml", "tqdm"),
    "torch._dynamo",
]


def python(code: str, *path: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs code in the checkout's root, as `python -c` does, with `path` before everything else."""
    lines = [f"import sys; sys.path[:0] = {[str(p) for p in path]!r}", code]
    command = [sys.executable, "-c", "\n".join(lines)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=check)


def test_import_is_light() -> None:
    code = f"""
import json, time
import torch
before, start = set(sys.modules), time.perf_counter()
import fastdiff
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted(set({HEAVY!r}) & (set(sys.modules) - before))]))
"""
    runs = [json.loads(python(code).stdout) for _ in range(3)]
    assert runs[0][1] == []
    # The quickest run: what else the machine does can only add to it.
    assert min(seconds for seconds, _ in runs) <= 0.3


def test_names_are_found_at_first_use() -> None:
    code = """
import fastdiff
assert "fastdiff.models" not in sys.modules
assert {"create_model", "from_pretrained", "show_config", "ops"} <= set(dir(fastdiff))
assert fastdiff.list_models() and callable(fastdiff.create_model)
assert callable(fastdiff.ops.explain)
try:
    fastdiff.create_modle
except AttributeError as error:
    print(error)
"""
    assert "no attribute 'create_modle'" in python(code).stdout


def test_versions_that_differ_are_refused_with_the_cure(tmp_path: Path) -> None:
    (tmp_path / "fastdiff_kernels").mkdir()
    (tmp_path / "fastdiff_kernels" / "__init__.py").write_text("__version__ = '0.0.9'\n")
    done = python("import fastdiff", tmp_path, check=False)
    assert done.returncode == 1
    assert "ImportError: fastdiff is " in done.stderr
    assert "fastdiff_kernels is 0.0.9" in done.stderr
    assert "pip install -e ." in done.stderr


@pytest.mark.parametrize("other_kernels", [False, True], ids=["alone", "beside-another-kernels"])
def test_transformers_imports_t5_from_the_root(tmp_path: Path, other_kernels: bool) -> None:
    # A package of Hugging Face is imported as `kernels`; our folder of that name must not be it.
    code = (
        "from transformers import T5EncoderModel\nimport fastdiff\nprint(T5EncoderModel.__name__)"
    )
    if other_kernels:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("mark = 'the other one'\n")
        code += "\nimport kernels\nprint(kernels.mark)"
    out = python(code, tmp_path).stdout.split("\n")
    assert out[:-1] == ["T5EncoderModel", *(["the other one"] if other_kernels else [])]
