"""The rules of the project's layout that a machine can check: who imports whom, names, files."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels" / "fastdiff_kernels"
PACKAGES = {"fastdiff": ROOT / "fastdiff", "fastdiff_kernels": KERNELS}

# Module or package: the modules of the project it may import, besides itself. The longest entry
# that fits a module holds for it.
MAY_IMPORT = {
    "fastdiff_kernels": set(),
    "fastdiff.ops": {"fastdiff_kernels"},
    "fastdiff.nn": {"fastdiff.ops"},
    "fastdiff.models": {"fastdiff.ops", "fastdiff.nn"},
    "fastdiff.diffusion": set(),
    "fastdiff.data": set(),
    "fastdiff.metrics": {"fastdiff.data"},
    "fastdiff.sampling": {
        "fastdiff.models",
        "fastdiff.nn",
        "fastdiff.ops",
        "fastdiff.diffusion",
        "fastdiff.data",
    },
    "fastdiff.text": set(),
    "fastdiff.clip": set(),
    "fastdiff.grid": set(),
    "fastdiff.training": {
        "fastdiff.models",
        "fastdiff.nn",
        "fastdiff.ops",
        "fastdiff.diffusion",
        "fastdiff.data",
        "fastdiff.text",
        "fastdiff.grid",
        "fastdiff.metrics",
        "fastdiff.recipes",
        "fastdiff.roofline",
    },
    "fastdiff": {"fastdiff", "fastdiff_kernels"},
}

# Optional package: the only files of the two packages and of train/ that import it.
HOME = {
    "triton": {
        "kernels/fastdiff_kernels/*/triton_kernels.py",
        "kernels/fastdiff_kernels/_bound.py",
        "kernels/fastdiff_kernels/_interpreter.py",
        "kernels/fastdiff_kernels/_jit.py",
    },
    "deepspeed": {"fastdiff/training/engine.py"},
    "transformers": {
        "fastdiff/text.py",
        "fastdiff/clip.py",
        "fastdiff/integrations/transformers.py",
    },
    "tokenizers": {"fastdiff/text.py"},
    "fsspec": {"fastdiff/data/cache.py"},
    "diffusers": {
        "fastdiff/integrations/diffusers.py",  # models and pipeline
        "fastdiff/integrations/schedulers.py",
    },
    "pynvml": {"fastdiff/training/sensors.py"},
    "wandb": {"fastdiff/training/watch.py"},
    "flash_attn": {"fastdiff/nn/attention.py"},
    "xformers": {"fastdiff/nn/attention.py"},
}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    base = ROOT / "kernels" if path.is_relative_to(ROOT / "kernels") else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at any depth; `from a import b` gives a.b."""
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join(
                [*(above if node.level else []), *([node.module] if node.module else [])]
            )
            yield from (f"{base}.{alias.name}" for alias in node.names)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def against_the_rules(importer: str, imported: Iterable[str]) -> list[str]:
    layer = max((entry for entry in MAY_IMPORT if within(importer, entry)), key=len)
    allowed = {layer, *MAY_IMPORT[layer]}
    return [
        f"{importer} imports {module}"
        for module in imported
        if module.split(".")[0] in PACKAGES and not any(within(module, a) for a in allowed)
    ]


def test_packages_import_only_what_lies_below_them() -> None:
    wrong = [
        line
        for path in sources("fastdiff", "kernels")
        for line in against_the_rules(module_name(path), imports(path))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "module", "allowed"),
    [
        ("fastdiff_kernels.window_attention.op", "fastdiff.ops.backend", False),
        ("fastdiff.nn.attention", "fastdiff_kernels.window_attention", False),
        ("fastdiff.nn.attention", "fastdiff.ops.window_attention", True),
        ("fastdiff.diffusion.samplers", "fastdiff.models.iuvit", False),
        ("fastdiff.models.iuvit", "fastdiff.diffusion.schedules", False),
        ("fastdiff.models.iuvit", "fastdiff", False),
        ("fastdiff.training.loop", "fastdiff.models.create_model", True),
        ("fastdiff.sampling.engine", "fastdiff.models.Backbone", True),
        ("fastdiff.sampling.engine", "fastdiff.training.loop", False),
        ("fastdiff.models.iuvit", "fastdiff.sampling", False),
    ],
)
def test_the_import_check_tells_right_from_wrong(importer: str, module: str, allowed: bool) -> None:
    assert (against_the_rules(importer, [module]) == []) == allowed


def test_optional_packages_are_imported_in_their_own_file_only() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sources("fastdiff", "kernels", "train")
        for module in imports(path)
        if (homes := HOME.get(module.split(".")[0])) is not None
        and not any(path.relative_to(ROOT).match(home) for home in homes)
    ]
    assert not wrong, "\n".join(wrong)


def test_nobody_imports_scripts_tests_benchmarks_or_the_folder_kernels() -> None:
    closed = {"train", "tests", "benchmarks", "kernels"}
    # The benchmarks share a harness, and have tests of their own.
    own = {"benchmarks": [ROOT / "benchmarks", ROOT / "tests" / "benchmarks"]}
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sources("fastdiff", "kernels", "train", "benchmarks", "tests")
        for module in imports(path)
        if (top := module.split(".")[0]) in closed
        and not any(path.is_relative_to(folder) for folder in own.get(top, []))
    ]
    assert not wrong, "\n".join(wrong)


def test_a_reference_imports_torch_and_nothing_of_the_project() -> None:
    allowed = {"__future__", "math", "torch", "einops"}
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in KERNELS.glob("*/reference.py")
        for module in imports(path)
        if module.split(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_kernels_is_a_folder_and_no_package() -> None:
    # A package of Hugging Face is imported as `kernels`, and transformers looks for it.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_folder_of_the_packages_is_a_package() -> None:
    folders = {path.parent for root in PACKAGES.values() for path in root.rglob("*.py")}
    missing = [str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").is_file()]
    assert not missing, f"without __init__.py, hence not in the wheel: {missing}"


def test_scripts_are_not_named_like_a_library() -> None:
    # `python train/x.py` puts train/ first on the path.
    taken = {*sys.stdlib_module_names, *importlib.metadata.packages_distributions(), *HOME}
    taken |= {"datasets", "kernels"}
    scripts = [path for folder in ("train", "benchmarks") for path in (ROOT / folder).glob("*")]
    wrong = [str(path.relative_to(ROOT)) for path in scripts if path.stem in taken]
    assert not wrong, wrong


def test_op_folders_hold_the_same_files() -> None:
    ops = sorted(path.parent for path in KERNELS.glob("*/op.py"))
    assert len(ops) >= 4
    always = {"__init__.py", "op.py", "reference.py"}
    # ffn.py is what the back ends of dwconv_ffn share.
    also = ("triton_*.py", "native_*.py", "cpu.cpp", "README.md", "ffn.py")
    for op in ops:
        files = {path.name for path in op.iterdir() if path.is_file()}
        others = [f for f in files - always if not any(fnmatch(f, kind) for kind in also)]
        assert always <= files, f"{op.name}: {sorted(files)}"
        assert not others, f"{op.name}: {others}"
        assert (ROOT / "tests" / "kernels" / f"test_{op.name}.py").is_file(), op.name


def texts() -> Iterator[tuple[Path, str]]:
    kinds = {
        ".py",
        ".md",
        ".toml",
        ".txt",
        ".yaml",
        ".cpp",
        ".h",
        ".cfg",
        ".sh",
        ".json",
        ".in",
        "",
    }
    folders = ("fastdiff", "kernels", "train", "benchmarks", "tests", ".ci")
    for path in [*ROOT.glob("*"), *(p for folder in folders for p in (ROOT / folder).rglob("*"))]:
        if path.is_file() and path.suffix in kinds and "__pycache__" not in path.parts:
            yield path, path.read_text(encoding="utf-8")


def test_no_file_names_a_place_of_one_machine_or_a_package_registry() -> None:
    place = re.compile(r"(?<![\w.$}~])/(?:home|root|work|Users)/\w")
    hosts = re.compile(
        "|".join([r"pypi\.o" + "rg", r"pythonhosted\.o" + "rg", "download.pyto" + "rch"])
    )
    wrong = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path, text in texts()
        for match in [*place.finditer(text), *hosts.finditer(text)]
    ]
    assert not wrong, "\n".join(wrong)
