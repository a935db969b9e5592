"""The ahead-of-time gate passes what it should and fails what it should; nothing is mocked."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from benchmarks import aot_report, sass
from benchmarks.aot import compile as one
from benchmarks.aot import judge, machine, record, store
from benchmarks.aot.forms import Form, form_of, source_of
from fastdiff import ops
from fastdiff_kernels import _jit, _launch


@triton.jit
def copy(x, y, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o, mask=o < size), mask=o < size)


@triton.jit
def copy_every_other(x, y, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    o = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)) * 2
    tl.store(y + o, tl.load(x + o, mask=o < size), mask=o < size)


@triton.jit
def copy_from_before(x, y, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + (o - size), mask=o < size), mask=o < size)


@triton.jit
def copy_backwards(x, y, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + (size - o), mask=o < size), mask=o < size)


@triton.jit
def running_sum(x, y, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    p = x + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(size):
        total += tl.load(p).to(tl.float32)
        p += BLOCK
    tl.store(y + tl.arange(0, BLOCK), total.to(y.dtype.element_ty))


@triton.jit
def hold_too_much(x, y, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    o = tl.arange(0, BLOCK)
    first = tl.load(x + o).to(tl.float32)
    second = tl.load(x + BLOCK + o).to(tl.float32)
    for _ in range(size):
        first, second = tl.exp(second * first), tl.exp(first + second)
    tl.store(y + o, (first + second).to(y.dtype.element_ty))


@triton.jit
def add_shapes_that_differ(x, y, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(y + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)) + tl.arange(0, 3 * BLOCK))


def use_of(
    kernel: object, block: int, warps: int = 4, dtype: torch.dtype = torch.bfloat16
) -> record.Use:
    """The form of a kernel on 2^20 elements."""
    x = torch.empty(2**20, dtype=dtype, device="meta")
    arguments = {"x": x, "y": torch.empty_like(x), "size": 2**20, "BLOCK": block}
    return record.Use(form_of(kernel, arguments, warps, 2), large={"x", "y"})


def verdict_on(
    kernel: object,
    block: int,
    warps: int = 4,
    family: str = "sm_90",
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[one.Verdict, list[str]]:
    """What becomes of a kernel on 2^20 elements."""
    use = use_of(kernel, block, warps, dtype)
    made = one.compile_form(use.form, family, kernel)
    return made, judge.faults(use, made, family)


@pytest.mark.parametrize("family", ["sm_80", "sm_90"])
def test_sixteen_bytes_a_thread_pass(family: str) -> None:
    made, wrong = verdict_on(copy, 1024, family=family)
    assert made.widths == {"x": 16, "y": 16}
    assert wrong == []


def test_four_bytes_a_thread_pass_where_a_warp_has_whole_lines() -> None:
    made, wrong = verdict_on(copy, 64, warps=1)
    assert (made.widths["x"], made.spans["x"]) == (4, 128)
    assert wrong == []


def test_single_elements_of_float32_pass_in_a_row_of_lanes() -> None:
    made, wrong = verdict_on(copy, 32, warps=1, dtype=torch.float32)
    assert (made.widths["x"], made.spans["x"]) == (4, 128)
    assert wrong == []


def test_a_loop_s_pointer_is_followed() -> None:
    made, wrong = verdict_on(running_sum, 64, warps=1)
    assert (made.widths["x"], made.spans["x"]) == (4, 128)
    assert wrong == []


def test_a_difference_is_followed() -> None:
    made, wrong = verdict_on(copy_from_before, 32, warps=1, dtype=torch.float32)
    assert (made.widths["x"], made.spans["x"]) == (4, 128)
    assert wrong == []
    made, _ = verdict_on(copy_backwards, 32, warps=1, dtype=torch.float32)
    assert made.spans["x"] == 0  # it grows by -1


def test_one_element_a_thread_fails() -> None:
    _, wrong = verdict_on(copy, 32, warps=1)
    assert wrong == ["narrow accesses: x 2 B (64 a warp), y 2 B (64 a warp)"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_elements_apart_fail(dtype: torch.dtype) -> None:
    made, wrong = verdict_on(copy_every_other, 1024, dtype=dtype)
    assert made.widths["x"] == dtype.itemsize  # in float32, too, 128 bytes of a warp: in two lines
    assert [fault.partition(":")[0] for fault in wrong] == ["narrow accesses"]


def test_narrow_accesses_of_small_tensors_and_of_tests_pass() -> None:
    use = dataclasses.replace(use_of(copy, 32, 1), large=set())
    assert judge.faults(use, one.compile_form(use.form, "sm_90", copy), "sm_90") == []


@pytest.mark.parametrize("family", ["sm_90", "gfx1100"])
def test_a_spill_fails(family: str) -> None:
    made, wrong = verdict_on(hold_too_much, 4096, 1, family)
    assert made.spilled > 0
    assert f"spills {made.spilled} bytes" in wrong


def test_a_known_spill_passes_to_the_byte(monkeypatch) -> None:
    use = use_of(hold_too_much, 4096, 1)
    made = one.compile_form(use.form, "sm_90", hold_too_much)

    def faults(version: str = "1.0", family: str = "sm_90", spilled: int = 0) -> list[str]:
        return judge.faults(
            use, dataclasses.replace(made, spilled=made.spilled + spilled), family, version
        )

    known = judge.Known("1.0", ("sm_90",), "hold_too_much", ("BLOCK=4096",), made.spilled, "why")
    assert faults()
    monkeypatch.setattr(judge, "KNOWN", (known,))
    assert not faults()
    assert faults(spilled=4)
    assert faults("1.1")
    assert faults(family="sm_80")
    monkeypatch.setattr(judge, "KNOWN", (dataclasses.replace(known, constants=("BLOCK=409",)),))
    assert faults()


def test_a_known_spill_that_is_gone_fails(monkeypatch) -> None:
    version = store.Triton.current().version
    known = judge.Known(version, ("sm_90",), "philox_fill", (), 8, "why")
    monkeypatch.setattr(judge, "KNOWN", (known,))
    cover = aot_report.Cover(False, "sm_90", ("benchmarks",), few=1)
    found = record.Uses("sm_90")
    for use in aot_report.collect("sm_90", [], ["benchmarks"]).uses.found.values():
        if use.form.name == "philox_fill":
            found.add_form(use.form, "benchmarks")
    *_, wrong = aot_report.run([cover], {"sm_90": aot_report.Recorded(found, [])})
    assert wrong == [
        f"triton {version}, philox_fill []: spills no more; take it out of judge.KNOWN"
    ]


def test_a_spill_is_found_in_the_loop_that_has_it_and_where_there_is_no_loop() -> None:
    lines = ["STL", "FFMA", "LDL", "BRA", "FADD", "FADD", "FADD", "FADD", "BRA", "LDL", "EXIT"]
    targets = {3: 1, 8: 4}  # two loops: a load in the smaller, a load and a store in none

    def code(names: list[str], jumps: dict[int, int]) -> sass.Code:
        found = [
            sass.Instruction(16 * i, name, f" {16 * jumps[i]:#x} " if i in jumps else " R1")
            for i, name in enumerate(names)
        ]
        return sass.Code(found, registers=255, stack=8)

    assert code(lines, targets).spilled == 1
    lines[2] = "FFMA"
    assert code(lines, targets).spilled == 0
    assert code(lines, {}).spilled == 2


def test_what_does_not_compile_fails() -> None:
    made, wrong = verdict_on(add_shapes_that_differ, 64)
    assert made.error
    assert wrong == [made.error]


def test_too_much_shared_memory_fails() -> None:
    made, _ = verdict_on(copy, 1024)
    large = dataclasses.replace(made, shared=_launch.CHIPS["sm_80"].shared + 1)
    assert any("shared memory" in f for f in judge.faults(use_of(copy, 1024), large, "sm_80"))


def test_a_vector_register_in_an_accumulation_register_is_a_spill() -> None:
    text = ".private_segment_fixed_size: 0\n .vgpr_count: 512\n .vgpr_spill_count: 3\n"
    assert machine.amd_resources(text) == (512, 12)


@triton.jit
def squash(x, y, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    o = tl.arange(0, BLOCK)
    tl.store(y + o, _jit.sigmoid(tl.load(x + o).to(tl.float32)).to(y.dtype.element_ty))


@triton.jit
def squash_by_ptx(x, y, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    o = tl.arange(0, BLOCK)
    value = tl.load(x + o)
    value = tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
    )
    tl.store(y + o, value)


def test_what_the_assembler_does_not_know_fails() -> None:
    """LLVM prints an error, drops the line, and Triton returns a binary."""
    _, wrong = verdict_on(squash_by_ptx, 256, family="gfx942", dtype=torch.float32)
    assert len(wrong) == 1
    assert "error:" in wrong[0]
    assert verdict_on(squash_by_ptx, 256, dtype=torch.float32)[1] == []


@pytest.mark.parametrize("family", ["gfx942", "gfx1201"])
def test_our_sigmoid_compiles_for_amd(family: str) -> None:
    made, wrong = verdict_on(squash, 256, family=family, dtype=torch.float32)
    assert wrong == []
    assert made.registers > 0


# --- Forms ---


def test_a_form_tells_apart_what_triton_specialises_on() -> None:
    def form(x: torch.Tensor, size: int, **constants: object) -> Form:
        return form_of(copy, {"x": x, "y": x, "size": size, "BLOCK": 64} | constants, 4, 2)

    x = torch.empty(64)
    first = form(x, 32)
    assert form(torch.empty(1000), 4096) == first
    others = [
        *(form(x, 1), form(x, 7), form(x, 2**40), form(x[1:], 32), form(x.double(), 32)),
        *(form(x, 32, BLOCK=True), form(x, 32, BLOCK=1), form(x, 32, launch_pdl=True)),
    ]
    assert len({first, *others}) == 9
    far = torch.empty(2**29, device="meta")
    assert form(far, 32) != first
    assert form(far, 32).near() == form(torch.empty(1, device="meta"), 32)


def test_a_meta_tensor_s_offset_counts() -> None:
    x = torch.empty(64, dtype=torch.bfloat16, device="meta")
    aligned = [form_of(copy, {"x": t, "y": x, "size": 1, "BLOCK": 1}, 4, 2) for t in (x, x[8:])]
    assert len(set(aligned)) == 1
    assert form_of(copy, {"x": x[4:], "y": x, "size": 1, "BLOCK": 1}, 4, 2) not in aligned


def test_the_source_has_what_a_kernel_calls() -> None:
    text = source_of(_jit.silu_slope)
    assert "def silu_slope" in text
    assert "ex2.approx" in text  # of sigmoid
    assert "INTERPRETS" in text
    assert "def gelu" not in text


# --- The store ---

KERNEL = """
import triton
import triton.language as tl

FACTOR = tl.constexpr({factor})

@triton.jit
def times(x):
    return x * FACTOR

@triton.jit
def scale(x, y, size, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(y + o, times(tl.load(x + o)))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a module with a kernel `scale` and returns a job of it."""
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    (tmp_path / "modules").mkdir()

    def write(factor: float, name: str = "aot_trial") -> store.Job:
        (tmp_path / "modules" / f"{name}.py").write_text(KERNEL.format(factor=factor))
        importlib.invalidate_caches()
        store._sources.clear()
        sys.modules.pop(name, None)
        kernel = importlib.import_module(name).scale
        x = torch.empty(1024)
        form = form_of(kernel, {"x": x, "y": x, "size": 1024, "BLOCK": 1024}, 4, 2)
        return store.Job(form, "sm_90", store.Triton.current())

    return write


def test_verdicts_are_kept_until_the_source_changes(tmp_path, module) -> None:
    path = [str(tmp_path / "modules")]
    job = module(2.0)
    made, counts = store.verdicts([job, job], tmp_path / "store", path=path)
    assert (counts.compiled, counts.kept) == (1, 0)
    assert made[job].error == ""
    assert made[job].registers > 0
    again, counts = store.verdicts([job], tmp_path / "store", path=path)
    assert (counts.compiled, counts.kept) == (0, 1)
    assert again == made
    # Only the global that the called function reads.
    job = module(3.0)
    _, counts = store.verdicts([job], tmp_path / "store", path=path)
    assert (counts.compiled, counts.kept) == (1, 0)


def test_the_key_has_source_form_chip_triton_and_reader(module) -> None:
    job = module(2.0)
    other = store.Triton("0.0")
    keys = [
        *(store.key_of(job), store.key_of(dataclasses.replace(job, target="sm_80"))),
        *(store.key_of(dataclasses.replace(job, triton=other)), store.key_of(job, "reader")),
        store.key_of(dataclasses.replace(job, form=Form(job.form.text.replace("1024", "2048")))),
    ]
    assert len(set(keys)) == 5
    assert store.key_of(job) == keys[0]


@pytest.mark.parametrize("text", ["", '{"registers": 3', '{"unknown": 1}'])
def test_half_a_verdict_is_none(tmp_path, text) -> None:
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / "abc").write_text(text)
    assert store.read(tmp_path, "abc") is None
    store.write(tmp_path, "abc", one.Verdict(registers=7))
    assert store.read(tmp_path, "abc") == one.Verdict(registers=7)


def test_a_compiler_that_crashes_is_a_verdict_and_the_next_job_runs(tmp_path, module) -> None:
    (tmp_path / "modules").joinpath("aot_crash.py").write_text(
        "import os, sys\n"
        "if 'pytest' not in sys.modules:\n    os.abort()\n" + KERNEL.format(factor=1.0)
    )
    fine = module(2.0)
    kernel = importlib.import_module("aot_crash").scale
    x = torch.empty(1024)
    form = form_of(kernel, {"x": x, "y": x, "size": 1024, "BLOCK": 1024}, 4, 2)
    crash = store.Job(form, "sm_90", store.Triton.current())
    made, _ = store.verdicts(
        [crash, fine], tmp_path / "store", workers=1, path=[str(tmp_path / "modules")]
    )
    assert "status -6" in made[crash].error
    assert made[fine].error == ""


def test_a_triton_that_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="pip install --no-deps --target"):
        store.Triton.at(tmp_path)


# --- What is recorded ---


@pytest.fixture(scope="module")
def cifar() -> aot_report.Recorded:
    return aot_report.collect("sm_90", ["iuvit_cifar10"])


def test_few_keeps_every_kernel(cifar) -> None:
    uses = cifar.forms(aot_report.Cover(False, "sm_90"))
    kept = aot_report.few(uses, 3)
    assert {u.form.name for u in kept} == {u.form.name for u in uses}
    names = [u.form.name for u in kept]
    assert max(map(names.count, names)) <= 3


def test_bytes_of_a_pass(cifar) -> None:
    """IU-ViT's planes fit a program: no halo. The FFN's backward writes y, a fourth tensor."""
    assert all(one.launches for one in cifar.passes)
    ratios = {(one.op, one.backward): one.ratio for one in cifar.passes}
    assert ratios["dwconv_ffn", False] == pytest.approx(1, abs=0.01)
    sums = 2 * 11 * 4 / (3 * 257 * 2)  # float32 of each plane, written and read
    assert ratios["dwconv_ffn", True] == pytest.approx(4 / 3 + sums, abs=0.01)
    assert ratios["layer_norm_modulate", False] == pytest.approx(1, abs=0.05)
    assert max(use.share for use in cifar.uses.found.values()) < 1.5


def test_halos_are_moved_again() -> None:
    shape, grid = (64, 64 * 64, 1024), (64, 64)
    with torch.device("meta"), _launch.pretend(_launch.CHIPS["sm_90"]), record.passes() as made:
        z = torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)
        y = ops.dwconv_gelu(z, torch.empty(1024, 1, 3, 3), torch.empty(1024), grid=grid)
        y.sum().backward()
    # 4 stripes of 16 rows: 6 rows of 64 are read twice, or 12 of z in the backward and 6 of dy.
    launch = made[0].launches[0].arguments
    assert (launch["BANDS"] * launch["ROWS"], launch["span"]) == (16, 64)
    assert made[0].ratio == pytest.approx((70 / 64 + 1) / 2, abs=1e-2)
    assert made[1].ratio == pytest.approx((76 / 64 + 70 / 64 + 1) / 3, abs=2e-2)


def test_a_launch_of_some_images_moves_those() -> None:
    """64 images of 192 channels, 64 x 64: more than an L2, so a few at a time."""
    with torch.device("meta"), _launch.pretend(_launch.CHIPS["sm_80"]), record.passes() as made:
        x = torch.empty(64, 192, 64, 64, dtype=torch.bfloat16)
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        weight, bias = (torch.empty(192, requires_grad=True) for _ in range(2))
        ops.group_norm_silu(x, weight, bias, num_groups=32, eps=1e-5).sum().backward()
    assert len(made[0].launches) > 2
    assert [one.ratio for one in made] == pytest.approx([1, 1], abs=0.02)


def test_presets_and_benchmarks_launch_every_kernel() -> None:
    """So the quick gate compiles each of them."""
    found = aot_report.collect("sm_90", aot_report.QUICK_PRESETS, aot_report.EVERY[:3])
    modules = {use.form.module for use in found.uses.found.values()}
    assert len(modules) >= 5
    kernels = {
        name
        for module in modules
        for name, value in vars(importlib.import_module(module)).items()
        if isinstance(value, JITFunction)
        and value.fn.__module__ == module
        and not name.startswith("_")
    }
    assert {use.form.name for use in found.uses.found.values()} == kernels


def test_the_tests_launches_are_recorded_for_each_family() -> None:
    tests = ["tests/kernels/backends/test_philox_normal_backend.py"]
    forms, _ = record.record_tests(["sm_90", "gfx942"], tests)
    for some in forms.values():
        assert {form.name for form in some} == {"philox_fill"}
        # Bits and normals; N and the stream are no constants.
        assert {form.data["arguments"]["RAW"][1] for form in some} == {False, True}
        assert set(some.values()) == {"tests"}


@pytest.mark.slow
def test_tests_that_fail_while_recorded_are_an_error(tmp_path) -> None:
    path = tmp_path / "test_fails.py"
    path.write_text("def test():\n    raise RuntimeError('it fails')\n")
    with pytest.raises(RuntimeError, match="it fails"):
        record.record_tests(["sm_90"], [str(path)])


@pytest.mark.slow
def test_a_second_recording_is_the_same() -> None:
    tests = ["tests/kernels/backends/test_layer_norm_modulate_backend.py"]
    first, second = (record.record_tests(["sm_90"], tests)[0]["sm_90"] for _ in range(2))
    assert {f.text for f in first} == {f.text for f in second}
    assert set(first.values()) == {"tests", "slow tests"}


@pytest.mark.slow
@pytest.mark.skipif(not aot_report.FOLDER.is_dir(), reason="make build/triton-3.6.0")
def test_a_sum_in_the_loop_does_not_compile_with_the_oldest_triton(tmp_path) -> None:
    """Its optimiser of reductions wants one use of the loop's result; `aot_old` has two."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "aot_old.py").write_text(
        "import triton\nimport triton.language as tl\n\n@triton.jit\n"
        "def scale(x, y, size, BLOCK: tl.constexpr):\n"
        "    z = tl.zeros([BLOCK], tl.float32)\n"
        "    o = tl.arange(0, BLOCK)[:, None] * 128 + tl.arange(0, 128)[None, :]\n"
        "    for i in range(size):\n"
        "        z += tl.sum(tl.load(x + i * 128 * BLOCK + o), 1)\n"
        "    p = y + tl.arange(0, BLOCK)\n"
        "    tl.store(p, z)\n"
        "    tl.store(p + BLOCK, 2 * z)\n"
    )
    sys.path.insert(0, str(modules))
    try:
        kernel = importlib.import_module("aot_old").scale
    finally:
        sys.path.remove(str(modules))
    x = torch.empty(1024)
    form = form_of(kernel, {"x": x, "y": x, "size": 7, "BLOCK": 16}, 4, 2)
    jobs = [
        store.Job(form, "sm_90", by)
        for by in (store.Triton.current(), store.Triton.at(aot_report.FOLDER))
    ]
    made, _ = store.verdicts(jobs, tmp_path / "store", path=[str(modules)])
    assert made[jobs[0]].error == ""
    assert "hasOneUse" in made[jobs[1]].error


def test_the_verdict_is_json() -> None:
    made = one.Verdict(widths={"x": 16})
    assert one.Verdict(**json.loads(json.dumps(dataclasses.asdict(made)))) == made
