"""The parts of the command for the GPU: timetable, workers, tests, profilers' output, results."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_models, bench_ops, run_gpu
from benchmarks.gpu import profiling, pytests, results, steps, timetable, training, workers
from benchmarks.gpu.timetable import STEPS, Step

# The timetable


def planned(minutes: float) -> tuple[dict[str, timetable.Slot], set[str]]:
    slots, dropped = timetable.plan(STEPS, 60 * minutes)
    return {slot.step.name: slot for slot in slots}, {step.name for step in dropped}


def test_eight_minutes_have_time_for_everything_and_ninety_seconds_for_what_matters() -> None:
    slots, dropped = planned(8)
    assert not dropped
    assert sum(s.seconds for s in slots.values() if not s.step.beside) <= 480 - timetable.CLOSING
    assert max(slots[name].end for name in ("check", "ceilings", "ours")) <= 90
    assert slots["tests"].end <= 185
    for before, after in itertools.pairwise(STEPS):
        if not before.beside and not after.beside:
            assert slots[after.name].start >= slots[before.name].end - 1e-9
    assert (slots["warm"].start, slots["warm"].end) == (slots["tests"].start, slots["tests"].end)


def test_four_minutes_keep_correctness_ours_copies_and_a_training_step() -> None:
    slots, dropped = planned(4)
    assert {"check", "ceilings", "ours", "train ascend"} <= slots.keys()
    assert all(slots[name].seconds >= slots[name].step.seconds for name in ("check", "ours"))
    assert {"rivals", "ascend"} <= dropped
    assert max(slot.end for slot in slots.values()) <= 240 - timetable.CLOSING


@pytest.mark.parametrize("minutes", [0, 0.5, 1, 2, 3, 5, 6, 7, 10, 30])
def test_any_number_of_minutes_is_planned(minutes: float) -> None:
    slots, dropped = planned(minutes)
    assert slots.keys() | dropped == {step.name for step in STEPS}
    assert max(slot.end for slot in slots.values()) <= max(60 * minutes - timetable.CLOSING, 0)
    assert all(slot.seconds >= 0 for slot in slots.values())
    assert "check" in slots
    if minutes > 8:
        assert slots["rest"].seconds > 100


def test_the_order_list_names_every_step_with_start_and_seconds() -> None:
    slots, dropped = timetable.plan(STEPS, 240)
    lines = timetable.order_list(slots, [(step, "no time") for step in dropped])
    assert len(lines) == 1 + len(STEPS)
    assert any(line.split()[:3] == ["0", "48", "check:"] for line in lines)
    assert any(" rivals: not made: no time" in line for line in lines)
    assert any(line.split()[1:3] == ["beside", "warm:"] for line in lines)
    assert any("plan: " in line and "(next to ours)" in line for line in lines)


def test_every_step_has_cases_and_every_case_one_name() -> None:
    assert {step.name for step in STEPS} <= {*steps.TASKS, "tests"}
    for dry in (False, True):
        context = steps.Context(torch.device("cpu"), dry, frozenset(), {})
        ops, models = steps.op_cases(context), steps.model_cases(context)
        assert len(ops) == len([c for c in (bench_ops.TINY if dry else bench_ops.GPU)
                                if dry or c.dtype is not torch.float32])  # fmt: skip
        assert len(models) == len(bench_models.TINY if dry else bench_models.GPU)
        assert "philox_normal" in steps.every_op(context)[-1]
        for name in ("blocks", "ascend"):
            assert steps.TASKS[name].items(context)
    gpu = steps.Context(torch.device("cuda"), False, frozenset(), {})
    assert len(steps.goal_ops(gpu)) == 9
    assert len(steps.blocks(gpu)) == 2
    assert steps.ascend(gpu) == ["ascend_t2i_128, batch 16"]
    # What takes long or matters least is left out unless it is asked for.
    assert not any("float32" in name for name in steps.every_op(gpu)[:-1])
    assert not any("iuvit" in name or "compiled" in name for name in steps.rest(gpu))
    most = steps.Context(torch.device("cuda"), False, frozenset(run_gpu.ALSO), {})
    assert any("float32" in name for name in steps.rest(most))
    assert {"iuvit_cifar10, batch 128", "ascend_t2i_128, batch 16, compiled"} <= set(
        steps.rest(most)
    )
    assert most.options(11, 1.5).max_autotune
    assert not gpu.options(11, 1.5).max_autotune


# Workers

WORKER = """
import json, os, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if os.path.exists(flags["--events"] + ".unable"):
    os._exit(9)
if not sys.stdin.readline():
    os._exit(0)
work = json.load(open(flags["--work"]))
def tell(**event):
    with open(flags["--events"], "a") as file:
        file.write(json.dumps(event) + "\\n")
for name in work["items"]:
    tell(begin=name)
    if name == "crash":
        os._exit(7)
    if name == "kill":
        with open(flags["--events"], "a") as file:
            file.write('{"name": "ki')
        os.kill(os.getpid(), 9)
    if name == "lost":
        tell(name=name, failed="the GPU's context broke: x")
        os._exit(3)
    if name == "hang":
        time.sleep(60)
    tell(name=name, rows=[work["value"]])
"""
STEP = Step("some step", "", 1, 1, 1, cap=1.0, shards=2)


def run_step(
    folder: Path, items: list[str], *, seconds: float = 30, before: Any = None
) -> tuple[list[dict], workers.StepRun]:
    events: list[dict] = []
    command = [sys.executable, "-c", WORKER]
    run = workers.StepRun(STEP, folder, command, dict(os.environ), events.append)
    run.prepare()
    if before:
        before(run)
    run.go(items, {"value": 5}, time.time() + seconds)
    while not run.poll():
        time.sleep(0.02)
    run.stop()
    return events, run


def test_a_crash_a_kill_and_a_hang_cost_one_case_each(tmp_path: Path) -> None:
    items = ["a", "crash", "b", "hang", "lost", "kill", "c", "d"]
    events, run = run_step(tmp_path, items)
    by_name = {event["name"]: event for event in events}
    assert by_name.keys() == set(items)
    assert {n for n, e in by_name.items() if "rows" in e} == set("abcd")
    assert by_name["a"]["rows"] == [5]
    assert "status 7" in by_name["crash"]["failed"]
    assert by_name["kill"]["failed"] == "the process was ended by SIGKILL"
    assert by_name["hang"]["failed"] == "stopped after the 1 s it may take"
    assert by_name["lost"]["failed"].startswith("the GPU's context broke")
    assert all(event["step"] == "some step" for event in events)
    assert not run.left()


def test_a_worker_that_dies_while_it_waits_is_begun_anew(tmp_path: Path) -> None:
    def kill(run: workers.StepRun) -> None:
        for worker in run.workers:
            assert worker.process is not None
            worker.process.process.kill()
            worker.process.process.wait()

    events, _ = run_step(tmp_path, list("abc"), before=kill)
    assert {event["name"] for event in events} == set("abc")
    assert not any("failed" in event for event in events)


def test_a_worker_that_never_begins_fails_its_step(tmp_path: Path) -> None:
    for index in range(2):
        (tmp_path / f"some-step-{index}.events.unable").touch()
    events, run = run_step(tmp_path, list("ab"))
    assert [event["failed"] for event in events] == ["the process ended with status 9"] * 2
    assert sorted(run.left()) == ["a", "b"]


def test_time_that_is_over_leaves_cases_out_and_fails_nothing(tmp_path: Path) -> None:
    events, run = run_step(tmp_path, ["a", "b", "hang", "c"], seconds=0.8)
    assert not any("failed" in event for event in events)
    assert "hang" in run.left()


def test_processes_that_do_not_listen_are_ended_together(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(signal.SIGINT, lambda *_: None); "
    code += "print('deaf', flush=True)\nwhile True: time.sleep(60)"
    made = [
        workers.Process(workers.python("-c", code), dict(os.environ), tmp_path / f"log-{i}")
        for i in range(4)
    ]
    while not all(one.output.read_text() for one in made):
        time.sleep(0.02)
    started = time.time()
    workers.stop_all(made, patience=0.5)
    assert time.time() - started < 1.5  # not four times as long
    assert [one.status() for one in made] == [-9] * 4


def test_a_worker_whose_parent_is_gone_ends(tmp_path: Path) -> None:
    run = workers.StepRun(STEP, tmp_path, [sys.executable, "-c", WORKER], dict(os.environ), print)
    run.prepare()
    for worker in run.workers:
        assert worker.process is not None
        assert worker.process.process.stdin is not None
        worker.process.process.stdin.close()
        assert worker.process.process.wait(10) == 0


def test_children_end_with_their_parent_however_it_dies(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from benchmarks.gpu import workers; "
        "sleep = [sys.executable, '-c', 'import time; time.sleep(60)']; "
        f"made = workers.Process(sleep, dict(os.environ), Path({str(tmp_path / 'log')!r})); "
        "print(made.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        workers.python("-c", code), cwd=workers.ROOT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until = time.time() + 10
    while time.time() < until and alive(child):
        time.sleep(0.02)
    assert not alive(child)


def alive(process: int) -> bool:
    """Whether it runs: not gone, and not waiting for somebody to read its status."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# Tests

BAD = """
import os, time, pytest

@pytest.mark.parametrize("i", range(24))
def test_a(i):
    if i == 3:
        raise AssertionError("wrong by 3")
    if i == 5:
        os._exit(11)
    if i == 9:
        time.sleep(60)
    if i == 10:
        pytest.skip("no")

@pytest.fixture
def broken():
    raise RuntimeError("no fixture")

def test_b(broken):
    pass
"""


@pytest.mark.parametrize("xdist", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_tests_that_crash_or_hang_cost_themselves(tmp_path: Path, xdist: bool) -> None:
    if xdist:
        pytest.importorskip("xdist")
    (tmp_path / "test_bad.py").write_text(BAD)
    run = pytests.TestRun(
        [str(tmp_path / "test_bad.py")], tmp_path / "run", count=2, xdist=xdist, seconds=2
    )
    run.go(time.time() + 240)  # a busy machine takes its time
    while not run.poll():
        time.sleep(0.05)
    run.stop()
    found = run.result()
    names = [test.rpartition("::")[2] for test in found["failed"]]
    assert names == ["test_a[3]", "test_a[5]", "test_a[9]", "test_b"]
    assert found["counts"] == {"passed": 20, "skipped": 1, "failed": 2, "crashed": 1, "error": 1}
    assert found["good"] is False
    texts = {test.rpartition("::")[2]: text for test, text in found["texts"].items()}
    assert "wrong by 3" in texts["test_a[3]"]
    assert texts["test_a[9]"] == "no end after 2 s"
    assert run.variables["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_test_that_breaks_the_context_ends_its_process(tmp_path: Path) -> None:
    (tmp_path / "test_lost.py").write_text(
        "import sys, types\n"
        "cuda = types.SimpleNamespace(is_initialized=lambda: False)\n"
        "sys.modules['torch'] = types.SimpleNamespace(cuda=cuda)\n"
        "def lost():\n    raise RuntimeError('CUDA error: an illegal memory access')\n"
        "def test_a():\n"
        "    cuda.is_initialized = lambda: True\n"
        "    cuda.synchronize = lost\n"
        "    raise AssertionError('first sign')\n"
        "def test_b():\n    assert not cuda.is_initialized()\n"
    )
    run = pytests.TestRun([str(tmp_path)], tmp_path / "run", count=1, xdist=False)
    run.go(time.time() + 60)
    while not run.poll():
        time.sleep(0.05)
    run.stop()
    found = run.result()
    assert found["counts"] == {"passed": 1, "failed": 1}
    ((name, text),) = found["texts"].items()
    assert name.endswith("test_a")
    assert "first sign" in text
    assert "context broke: CUDA error: an illegal memory access" in text


def test_tests_that_have_no_time_are_not_good(tmp_path: Path) -> None:
    (tmp_path / "test_slow.py").write_text(
        "import time\ndef test_a():\n    pass\ndef test_b():\n    time.sleep(60)\n"
    )
    run = pytests.TestRun([str(tmp_path)], tmp_path / "run", count=1, xdist=False)
    run.go(time.time() + 60)
    records: dict[str, dict] = {}
    while not any(test.endswith("test_b") for test in records):
        time.sleep(0.05)
        records = pytests.pytest_records.read(run.records)
    run.stop()
    found = run.result()
    assert found["summary"].endswith("stopped for time")
    assert found["counts"]["stopped"] == 1
    assert not found["good"]
    assert not found["failed"]


def test_what_the_records_say() -> None:
    def record(outcome: str) -> dict[str, str]:
        return {"outcome": outcome, "text": "why"}

    good = pytests.judge({"a": record("passed"), "b": record("skipped")}, [0, 5], [])
    assert (good["good"], good["summary"]) == (True, "1 passed, 1 skipped")
    assert not pytests.judge({"a": record("skipped")}, [0], [])["good"]
    assert pytests.judge({}, [2], ["ERROR collecting"])["log"] == "ERROR collecting"
    assert "exit status 4" in pytests.judge({}, [4], [])["summary"]
    crashed = pytests.judge({"a": record("running"), "b": record("passed")}, [-11], [])
    assert crashed["failed"] == ["a"]
    assert not crashed["good"]


# Profilers

NCU = """torch.Size([128, 257, 2048])
==PROF== Connected to process 4242 (/usr/bin/python3.12)
==PROF== Profiling "dwconv_gelu_backward" - 0: 0%....50%....100% - 38 passes
==PROF== Profiling "dwconv_gelu_backward" - 1: 0%....50%....100% - 38 passes
==PROF== Disconnected from process 4242
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name","Rule Type","Rule Description"
"0","4242","python3.12","127.0.0.1","dwconv_gelu_backward","1","7","(64, 1, 1)","(4096, 1, 1)","0","9.0","GPU Speed Of Light Throughput","DRAM Frequency","Ghz","2.62","","",""
"0","4242","python3.12","127.0.0.1","dwconv_gelu_backward","1","7","(64, 1, 1)","(4096, 1, 1)","0","9.0","GPU Speed Of Light Throughput","Duration","us","312.45","","",""
"0","4242","python3.12","127.0.0.1","dwconv_gelu_backward","1","7","(64, 1, 1)","(4096, 1, 1)","0","9.0","GPU Speed Of Light Throughput","DRAM Throughput","%","61.20","","",""
"0","4242","python3.12","127.0.0.1","dwconv_gelu_backward","1","7","(64, 1, 1)","(4096, 1, 1)","0","9.0","GPU Speed Of Light Throughput","Compute (SM) Throughput","%","88.10","","",""
"0","4242","python3.12","127.0.0.1","dwconv_gelu_backward","1","7","(64, 1, 1)","(4096, 1, 1)","0","9.0","GPU Speed Of Light Throughput","","","","SOLBottleneck","INF","This workload is bound by, among others, ""ALU""."
"0","4242","python3.12","127.0.0.1","dwconv_gelu_backward","1","7","(64, 1, 1)","(4096, 1, 1)","0","9.0","Instruction Statistics","Executed Instructions","inst","1,234,567,890","","",""
"0","4242","python3.12","127.0.0.1","dwconv_gelu_backward","1","7","(64, 1, 1)","(4096, 1, 1)","0","9.0","Launch Statistics","Registers Per Thread","register/thread","168","","",""
"0","4242","python3.12","127.0.0.1","dwconv_gelu_backward","1","7","(64, 1, 1)","(4096, 1, 1)","0","9.0","Launch Statistics","Function Cache Configuration","","CachePreferNone","","",""
"0","4242","python3.12","127.0.0.1","dwconv_gelu_backward","1","7","(64, 1, 1)","(4096, 1, 1)","0","9.0","Occupancy","Achieved Occupancy","%","24.60","","",""
"1","4242","python3.12","127.0.0.1","dwconv_gelu_backward","1","7","(64, 1, 1)","(4096, 1, 1)","0","9.0","GPU Speed Of Light Throughput","Duration","ms","1.31","","",""
==WARNING== something behind the table
"""  # noqa: E501


def test_the_counters_of_a_recorded_output() -> None:
    first, second = profiling.parse(NCU)
    assert (first["launch"], first["grid"]) == (0, "(4096, 1, 1)")
    metrics = first["metrics"]
    assert metrics["Duration [us]"] == 312.45
    assert metrics["Executed Instructions [inst]"] == 1234567890
    assert metrics["Function Cache Configuration"] == "CachePreferNone"
    assert "" not in metrics
    assert second["metrics"] == {"Duration [ms]": 1.31}
    for text in ("", "==ERROR== The user does not have permission", NCU.partition('"ID"')[0]):
        assert profiling.parse(text) == []
    one = {"case": "c", **first}
    (line,) = profiling.lines([one])
    assert line == (
        "dwconv_gelu_backward: 312.45 us, DRAM 61.2 %, SM 88.1 %, occupancy 24.6 %, "
        "registers 168 (c)"
    )


def goal_row(op: str, direction: str, share: float | None) -> dict[str, Any]:
    row = {"case": f"{op} case", "op": op, "direction": direction, "us": 10.0}
    return row | ({} if share is None else {"goal_share": share, "goal": "missed: floor"})


ROWS = [
    goal_row("window_attention", "forward", 1.1),
    goal_row("window_attention", "backward", 0.9),
    goal_row("dwconv_gelu", "forward", 0.97),
    goal_row("dwconv_gelu", "backward", 0.8),
    goal_row("group_norm_silu", "forward", 0.85),
]
KERNELS = [
    {"case": "dwconv_gelu case", "direction": "backward", "kernel": "void at::x()", "us": 99.0},
    {"case": "dwconv_gelu case", "direction": "backward", "kernel": "main", "us": 9.0},
    {"case": "dwconv_gelu case", "direction": "backward", "kernel": "sums", "us": 1.0},
    {"case": "dwconv_gelu case", "direction": "forward", "kernel": "fore", "us": 5.0},
    {"case": "group_norm_silu case", "direction": "forward", "kernel": "apply", "us": 4.0},
]


def test_the_worst_kernels_are_the_heaviest_of_the_furthest_from_their_goals() -> None:
    worst = profiling.worst({"rows": ROWS, "kernels": KERNELS})
    assert [one["kernel"] for one in worst] == ["main", "apply"]
    assert worst[0]["case"] == "dwconv_gelu case"
    # Without goals: what the machine code points at.
    plain = [{k: v for k, v in row.items() if k != "goal_share"} for row in ROWS]
    assert [o["kernel"] for o in profiling.worst({"rows": plain, "kernels": KERNELS})] == [
        "main",
        "apply",
    ]
    assert profiling.worst({}) == []


def test_counters_by_a_profiler_and_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"rows": ROWS, "kernels": KERNELS}
    monkeypatch.setattr(profiling, "profiler_path", lambda: None)
    with pytest.raises(RuntimeError, match="no ncu on this machine"):
        profiling.counters(given, dry=True)
    tool = tmp_path / "ncu"
    (tmp_path / "out").write_text(NCU)
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ncat {tmp_path}/out\n')
    tool.chmod(0o755)
    monkeypatch.setattr(profiling, "profiler_path", lambda: str(tool))
    found = profiling.counters(given, dry=True)["counters"]
    assert [launch["kernel"] for launch in found] == ["dwconv_gelu_backward"] * 2
    asked = (tmp_path / "asked").read_text()
    assert "--clock-control none" in asked
    assert "regex:^(main|apply)$" in asked
    assert "--target dwconv_gelu case --target group_norm_silu case --dry" in asked
    (tmp_path / "out").write_text("==ERROR== ERR_NVGPUCTRPERM")
    with pytest.raises(RuntimeError, match="ERR_NVGPUCTRPERM"):
        profiling.counters(given, dry=True)
    tool.write_text("#!/bin/sh\necho broken\nexit 3\n")
    with pytest.raises(RuntimeError, match="status 3: broken"):
        profiling.counters(given, dry=True)


def test_time_by_kernel_tells_the_directions_apart() -> None:
    case = bench_ops.TINY[1]
    found = profiling.kernel_times(case.name, case, torch.device("cpu"), 2)["kernels"]
    assert {row["direction"] for row in found} == {"forward", "backward"}
    assert all(row["us"] > 0 and row["launches"] > 0 for row in found)


# Training


def test_a_training_step_has_its_images_its_mfu_and_its_plan() -> None:
    device = torch.device("cpu")
    eager, graph = training.items("iuvit_cifar10")
    (row,) = training.run(eager, device, True, {"ceilings": {"product": 1e12}})["rows"]
    assert row["images_per_second"] == pytest.approx(2e6 / row["us"])
    assert row["mfu_of_measured"] == pytest.approx(row["flops"] / row["us"] * 1e6 / 1e12)
    assert row["planned_gib"] > row["planned_activations_gib"] > 0
    assert row["peak_gib"] > 0
    line = results.training_line({**row, "mfu": 0.4, "planned_ms": 12.0})
    assert "MFU 40.0% of the data sheet's peak" in line
    assert "of the measured product" in line
    assert "planned" in line
    assert "needs a GPU" in training.run(graph, device, True, {})["notes"][0]


def test_a_step_trains() -> None:
    step = training.Step("iuvit_cifar10", torch.device("cpu"), dry=True)
    losses = [float(step()) for _ in range(8)]
    assert losses[-1] < losses[0]


def test_the_plan_of_a_card() -> None:
    assert training.card_of("NVIDIA H100 80GB HBM3", 85e9) == "h100-80g"
    assert training.card_of("NVIDIA A100-SXM4-40GB", 42e9) == "a100-40g"
    assert training.card_of("NVIDIA A100-SXM4-80GB", 85e9) == "a100-80g"
    assert training.card_of("NVIDIA T4", 16e9) is None
    assert training.card_of("", 0) is None
    memory, _, time, _ = training.plan_items()
    gpu = {"gpu": "NVIDIA H200", "memory_gib": 139.8}
    found = training.plan(time.replace("ascend_t2i_128", "iuvit_cifar10"), False, gpu)["plan"]
    assert 1 < found["iuvit_cifar10"]["planned_ms"] < 1000
    assert found["iuvit_cifar10"]["planned_for"] == "h200-141g"
    assert training.plan(time, False, {}) == {}
    (values,) = training.plan(memory, True, {})["plan"].values()
    assert values["planned_gib"] > 0
    # The row takes what is there.
    given = {"plans": {"iuvit_cifar10": {"flops": 1e12, "planned_gib": 9.0}}}
    row = training.counted("iuvit_cifar10", True, 0.5, torch.device("cpu"), given)
    assert (row["tflops"], row["planned_gib"]) == (2.0, 9.0)


@pytest.mark.slow
def test_the_plan_of_ascend() -> None:
    slow, fast = (
        training.milliseconds_of("ascend_t2i_128", 16, card) for card in ("a100-80g", "h200-141g")
    )
    assert slow is not None
    assert fast is not None
    assert 50 < fast < slow < 1000


def test_a_plan_that_cannot_be_made_costs_the_plan_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> dict:
        raise ImportError("No module named 'PIL'")

    monkeypatch.setattr(training, "planned", broken)
    row = training.counted("iuvit_cifar10", True, 1.0, torch.device("cpu"), {})
    assert row["flops"] > 0
    assert row["no_plan"] == "ImportError: No module named 'PIL'"


# Results


def made(folder: Path) -> results.Results:
    found = results.Results(folder, 8, dry=True)
    found.environment = {"gpu": "NVIDIA Test 1", "date": "today", "commit": "abc"}
    return found


def row(case: str, direction: str = "forward", **more: Any) -> dict[str, Any]:
    return {"case": case, "op": "o", "direction": direction, "us": 10.0, **more}


def test_a_later_row_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    found = made(tmp_path)
    found.take({"step": "ours", "name": "a", "rows": [row("a"), row("b")]})
    found.take({"step": "rivals", "name": "a", "rows": [row("a", us=11.0, best="x")]})
    assert [(r["case"], r["us"], r.get("earlier_us")) for r in found.rows] == [
        ("a", 11.0, 10.0),
        ("b", 10.0, None),
    ]


def test_what_fails_fails_the_run_except_what_is_extra(tmp_path: Path) -> None:
    found = made(tmp_path)
    found.take({"step": "ours", "name": "a", "rows": [row("a")]})
    assert found.good()
    found.take({"step": "warm", "name": "a", "failed": "no"}, extra=True)
    assert found.good()
    assert found.notes == ["warm: a: no"]
    found.tested = True
    assert not found.good()
    found.tests = {"good": True, "summary": "1 passed", "failed": []}
    assert found.good()
    found.take({"step": "check", "name": "b", "failed": "n/a: out of memory"})
    assert not found.good()
    # The next step checks it alone.
    found.take({"step": "ours", "name": "b", "check": {"margin": 0.5}, "rows": [row("b")]})
    assert found.good()


def test_files_are_few_whole_and_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = made(tmp_path)
    found.take({"step": "ours", "name": "a", "rows": [row("a", samples_us={"ours": [1.0]})]})
    found.save()
    for index in range(3):
        (tmp_path / f"log-{index}.txt").write_bytes(os.urandom(100) + b"x" * 2_000_000)
    found.save_logs(sorted(tmp_path.glob("log-*.txt")))
    names = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("log-"))
    stem = f"nvidia-test-1-{found.stamp}"
    assert names == [f"{stem}-logs.tar.gz", f"{stem}.json", f"{stem}.md"]
    with tarfile.open(tmp_path / names[0]) as archive:
        sizes = [member.size for member in archive.getmembers()]
    assert len(sizes) == 3
    assert all(1_000_000 <= size < 1_000_100 for size in sizes)
    assert json.loads((tmp_path / names[1]).read_text())["rows"][0]["samples_us"]
    monkeypatch.setattr(results, "LARGEST", 100)
    found.save()
    assert "samples_us" not in json.loads((tmp_path / names[1]).read_text())["rows"][0]


def test_the_summary_begins_with_the_furthest_and_fits_the_end_of_an_output(
    tmp_path: Path,
) -> None:
    found = made(tmp_path)
    found.ceilings = {"copy": 3.0e12, "product": 7.9e14}
    found.cache = {"prepared": 900, "compiled": 12}
    for index in range(150):
        share = 0.5 + index / 100
        goal = "met" if share >= 1 else f"missed: floor {share:.2f} < 1"
        found.add(
            row(f"window_attention {index} bfloat16", of_floor=share, goal_share=share, goal=goal,
                best="compile", over_best=1.5),
            "ours",
        )  # fmt: skip
    found.add(row("without a goal", "training"), "blocks")
    found.tests = {
        "summary": "60 failed",
        "failed": [f"tests/kernels/backends/test_x.py::test_{i}[{'x' * 80}]" for i in range(60)],
    }
    for index in range(40):
        found.take({"step": "rivals", "name": f"case {index}", "failed": "out of memory " * 9})
    lines = found.summary()
    text = "\n".join(lines)
    assert len(text) < 11_500
    assert lines[0] == "Ceilings: copy 3.00 TB/s, bf16 product 790 TFLOP/s."
    assert lines[1] == "Compiled kernels: 900 prepared, 12 compiled in this run."
    assert lines[2] == (
        "Furthest from its goal: window_attention 0 bfloat16, forward: 50% of it "
        "(missed: floor 0.50 < 1)."
    )
    table = [line for line in lines if line.startswith("window_attention")]
    assert table[0].split()[:6] == ["window_attention", "0", "forward", "10.0", "50%", "compile"]
    assert "more rows in the .md file" in text
    assert "FAILED tests/kernels/backends/test_x.py::test_24" in text
    assert "FAILED: 35 more tests" in text
    assert "FAILED rivals: case 3: out of memory" in text
    assert lines[-1].endswith("NOT everything is right.")
    assert len(found.summary(limit=10**6)) > len(lines)
    assert text.count("bfloat16") == 1


def test_an_op_without_a_number_still_has_its_line(tmp_path: Path) -> None:
    found = made(tmp_path)
    found.take({"step": "check", "name": "a bfloat16", "failed": "wrong result: RMS error"})
    found.take({"step": "check", "name": "b bfloat16", "check": {"margin": 0.3}})
    lines = [line for line in found.summary() if line]
    assert any(line.split()[0] == "a" and "no number: wrong result" in line for line in lines)
    assert any(line.split()[0] == "b" and "right, not timed" in line for line in lines)


def test_a_figure_to_beat_has_its_source(tmp_path: Path) -> None:
    found = made(tmp_path)
    found.add(row("a", of_floor=0.8, figure=["somebody's kernel (its source)", 0.9, False]), "ours")
    assert "below sglang's 90%" in "\n".join(found.summary())
    assert "- somebody's kernel (its source): 90% of a copy" in found.markdown()


def test_host_time_stands_in_one_line() -> None:
    found = {"rows": [{"case": "dwconv_gelu", "host": {"forward": 8.04, "both": 21.5}}]}
    line = results.host_line(found)
    assert line == "Host us a call, forward / both directions: dwconv_gelu 8.0 / 21.5."
    assert "JSON" in results.host_line({"other": 1})


def test_only_our_kernels_of_the_cache_count(tmp_path: Path) -> None:
    for name in ("A/__grp__dwconv_gelu_forward.json", "B/__grp__triton_poi_fused_0.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    assert run_gpu.kernels_in(tmp_path) == {"A/__grp__dwconv_gelu_forward.json"}
    assert run_gpu.kernels_in(tmp_path / "absent") == set()
