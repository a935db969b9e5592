"""The benchmarks' own machinery: what they measure, what they refuse, what they write down."""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import bench_models, bench_ops, harness, rivals
from fastdiff import ops
from fastdiff_kernels import _register

CPU = torch.device("cpu")
QUICK = bench_ops.Options(compile=False, rounds=3, seconds=0.1)
TINY = {case.op: case for case in bench_ops.TINY}


# Time


def test_candidates_take_turns_and_a_failing_one_only_loses_its_number() -> None:
    order: list[str] = []

    def run(name: str) -> None:
        order.append(name)
        time.sleep(0.003)  # longer than what calls for several calls a sample

    def broken() -> None:
        raise ValueError(f"no such thing\nin {Path(__file__).resolve()}")

    found = harness.measure(
        {"a": lambda: run("a"), "broken": broken, "b": lambda: run("b")}, CPU, rounds=4
    )
    assert list(found) == ["a", "broken", "b"]
    assert found["broken"] == "n/a: ValueError: no such thing"
    assert order[-8:] == ["a", "b"] * 4
    timing = found["a"]
    assert isinstance(timing, harness.Timing)
    assert (timing.rounds, timing.how) == (4, "cpu")
    assert 0.003 <= min(timing.samples) <= timing.seconds == timing.low <= timing.median < 0.1


def test_short_candidates_are_called_several_times_a_sample() -> None:
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    harness.measure({"short": count}, CPU, rounds=2)
    assert calls == 2 + 2 * 200


def test_rounds_end_when_the_time_is_over() -> None:
    found = harness.measure({"slow": lambda: time.sleep(0.01)}, CPU, rounds=100, seconds=0.0)
    assert isinstance(found["slow"], harness.Timing)
    assert found["slow"].rounds == 3


def test_timing_is_the_median_and_on_a_cpu_the_lower_quartile() -> None:
    samples = [3.0, 1.0, 4.0, 10.0, 2.0]
    assert harness.Timing.of(samples, "graph").seconds == 3.0
    assert harness.Timing.of(samples, "cpu").seconds == 2.0
    assert harness.Timing.of(samples, "cpu").samples == tuple(samples)
    assert harness.Timing.of([2.0], "graph").spread == 0.0


class FakeGPU:
    """Enough of torch.cuda to walk through the graph path: a clock that jobs move by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.record, self.capturing = 0.0, [], False
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = gpu.now

            def elapsed_time(self, other: Event) -> float:
                return 1e3 * (other.at - self.at)

        class Graph:
            def capture_begin(self, pool: object, capture_error_mode: str) -> None:
                assert capture_error_mode == "thread_local"
                gpu.capturing, self.started = True, gpu.now

            def capture_end(self) -> None:
                gpu.capturing, self.length = False, gpu.now - self.started
                gpu.now = self.started

            def replay(self) -> None:
                gpu.now += self.length

        class Stream:
            def __init__(self, device: object = None) -> None: ...
            def __enter__(self) -> Stream:
                return self

            def __exit__(self, *_: object) -> None: ...
            def wait_stream(self, other: object) -> None: ...

        fakes = {
            "Event": Event,
            "CUDAGraph": Graph,
            "Stream": Stream,
            "stream": lambda stream: stream,
            "current_stream": Stream,
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: None,
            "graph_pool_handle": lambda: (0, 0),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(harness, "_flush", lambda device: functools.partial(self.work, 60e-6))
        for name in ("_side_stream", "_flush_graph"):
            kept = getattr(harness, name)
            monkeypatch.setattr(harness, name, functools.cache(kept.__wrapped__))

    def work(self, seconds: float) -> None:
        self.now += seconds

    def refuse_capture(self, seconds: float) -> None:
        if self.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.now += seconds


def test_on_a_gpu_the_flush_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU(monkeypatch)
    found = harness.measure(
        {
            "short": lambda: gpu.work(5e-6),
            "long": lambda: gpu.work(3e-3),
            "not captured": lambda: gpu.refuse_capture(20e-6),
            "broken": lambda: 1 / 0,
            "nothing": lambda: None,
        },
        torch.device("cuda"),
    )
    for name, how, expected in (
        ("short", "graph", 5e-6),
        ("long", "graph", 3e-3),
        ("not captured", "events", 20e-6),
    ):
        timing = found[name]
        assert isinstance(timing, harness.Timing)
        assert (timing.how, timing.seconds) == (how, pytest.approx(expected)), name
    assert found["broken"] == "n/a: ZeroDivisionError: division by zero"
    assert str(found["nothing"]).startswith("n/a: too short")


def test_a_broken_context_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGPU(monkeypatch)

    def lost(device: object = None) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(harness.DeviceLost, match="illegal memory access"):
        harness.reason(ValueError("first sign"), torch.device("cuda"))


# Memory


def test_saved_bytes_count_each_memory_once_and_no_weights() -> None:
    x = torch.randn(8, 16, requires_grad=True)
    weight = torch.randn(4, 16, requires_grad=True)
    saved = functools.partial(harness.saved_bytes, lambda: F.linear(x, weight).square())
    # x for the weight's gradient, the product for the square's
    assert saved([weight]) == (8 * 16 + 8 * 4) * 4
    assert saved() == (8 * 16 + 8 * 4 + 4 * 16) * 4
    assert harness.saved_bytes(lambda: x * x) == 8 * 16 * 4
    assert harness.saved_bytes(lambda: x + x) == 0


def test_peak_memory_of_a_cpu() -> None:
    x = torch.randn(1 << 16, requires_grad=True)
    assert harness.peak_memory(lambda: None, CPU) == 0

    def job() -> None:
        kept = x.exp()  # saved for its own backward
        del kept

    def training() -> None:
        x.exp().sin().sum().backward()  # exp's result is saved twice over, sin's is gone
        x.grad = None

    assert harness.peak_memory(job, CPU) == x.nbytes
    # two gradients and exp's result; a few bytes of scalars
    assert x.nbytes * 3 <= harness.peak_memory(training, CPU) <= x.nbytes * 4 + 1024


# Correctness


def problem(op: str) -> bench_ops.Problem:
    return bench_ops.Problem(TINY[op], CPU)


@pytest.mark.parametrize("op", TINY)
def test_the_rule_passes_the_definition(op: str) -> None:
    case = problem(op)
    with ops.backend("reference"):
        truth = harness.exact(case.ours, case.inputs, case.dys)
        assert harness.check(case.ours, case.inputs, case.dys, truth) <= 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda y: y * (1 + 1e-4), "tensor 0 of 3: RMS error"),
        (lambda y: torch.where(torch.arange(y.numel()).view_as(y) == 7, 3.0, y), "tensor 0 of 3"),
        (lambda y: torch.where(torch.arange(y.numel()).view_as(y) == 7, torch.nan, y), "finite"),
        (lambda y: y + (0.5 * y - (0.5 * y).detach()), r"tensor [12] of 3: RMS error"),
        (lambda y: y.bfloat16(), "tensor 0 of 3 is torch.bfloat16"),
    ],
)
def test_the_rule_refuses_a_wrong_result(spoil: harness.Call, message: str) -> None:
    case = problem("window_attention")
    with ops.backend("reference"):
        truth = harness.exact(case.ours, case.inputs, case.dys)

    def wrong(*inputs: Tensor) -> Tensor:
        y = case.ours(*inputs)
        return y if _register._asked == "reference" else spoil(y)

    with ops.backend("auto"), pytest.raises(harness.Refused, match=message):
        harness.check(wrong, case.inputs, case.dys, truth)


def test_references_of_float32_take_no_tf32() -> None:
    """cuDNN convolves in TF32 by default, a thousand times less exact."""
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [flag.allow_tf32 for flag in flags]
    seen = []

    def call(x: Tensor) -> Tensor:
        seen.append((x.dtype, [flag.allow_tf32 for flag in flags]))
        return 2 * x

    inputs, dys = [torch.randn(4, requires_grad=True)], [torch.ones(4)]
    try:
        torch.backends.cudnn.allow_tf32 = True
        harness.check(call, inputs, dys, [2 * inputs[0].detach().double(), 2 * dys[0].double()])
        assert torch.backends.cudnn.allow_tf32
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value
    assert seen
    assert all(not any(on) for dtype, on in seen if dtype is torch.float32)


def test_a_rival_may_be_imprecise_but_not_something_else() -> None:
    truth = [torch.randn(100, dtype=torch.float64), None]
    harness.check_rival([truth[0].bfloat16(), None], truth)
    for wrong in ([truth[0] * 1.2, None], [truth[0] * torch.nan, None], [None, None]):
        with pytest.raises(ValueError, match="tensor 0"):
            harness.check_rival(wrong, truth)


def test_a_wrong_op_gets_no_row() -> None:
    case = TINY["layer_norm_modulate"]

    def wrong(op: str, form: tuple) -> tuple[Tensor, Tensor]:
        y, r = _register._OPS[op]._reference(*form)
        # right in the float64 that the truth is made in, wrong in the dtype of the case
        return (y, r) if y.dtype is torch.float64 else (y + 1e-3, r)

    class Once(bench_ops.Problem):
        def ours(self, *inputs: Tensor) -> object:
            if _register._asked == "reference":
                return super().ours(*inputs)
            with _register.stand_in(wrong):
                return super().ours(*inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_ops, "Problem", Once)
        with pytest.raises(harness.Refused, match="tensor 0"):
            bench_ops.run_case(case, CPU, QUICK)


# Rivals and the floor


@pytest.mark.parametrize("op", TINY)
@pytest.mark.parametrize("nchw", [False, True])
def test_plain_compositions_compute_the_ops(op: str, nchw: bool) -> None:
    case = problem(op)
    with ops.backend("reference"):
        truth = harness.exact(case.ours, case.inputs, case.dys)
    with rivals.plain(nchw=nchw):
        got = harness.values_and_gradients(case.ours, case.inputs, case.dys)
    harness.check_rival(got, truth, allowed=1e-5)


@pytest.mark.parametrize("shape", [(2, 8, 8), (2, 9, 10), (1, 4, 4), (2, 7, 16)])
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("biased", [True, False])
def test_window_rivals_pad_shift_and_mask(
    shape: tuple[int, int, int], shift: int, biased: bool
) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(*shape, 48, requires_grad=True)
    table = torch.randn(49, 2, requires_grad=True) if biased else None

    def call(qkv: Tensor, table: Tensor | None) -> Tensor:
        return ops.window_attention(qkv, table, heads=2, window_size=4, shift=shift)

    inputs, dys = [qkv, table], [torch.randn(*shape, 16)]
    truth = harness.exact(call, inputs, dys)
    with rivals.plain():
        harness.check_rival(harness.values_and_gradients(call, inputs, dys), truth, 1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("shape", [(2, 8, 8), (2, 9, 10)])
def test_flex_scores_are_those_of_the_op(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    qkv, table = torch.randn(*shape, 48), torch.randn(49, 2)
    form = (qkv, table, 2, (4, 4), (2, 2), None, 0.25, False)
    expected = ops.window_attention(qkv, table, heads=2, window_size=4, shift=2, scale=0.25)
    torch.testing.assert_close(rivals.window_flex(*form), expected)


class Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", bench_models.TINY, ids=lambda c: c.name)
def test_the_floor_leaves_products_and_adds(case: bench_models.Case) -> None:
    made = bench_models.Problem(case, CPU)
    floor = bench_models.Contestant(made.module, rivals.floor)
    with Names() as seen:
        grads = made.training(floor)()
        out = made.forward(floor)()
    assert out.shape == made.dy.shape
    assert out.isfinite().all()
    left_out = {
        *("native_layer_norm", "native_group_norm", "gelu", "roll", "index", "gather"),
        *("avg_pool2d", "upsample_nearest2d", "native_dropout", "addcmul"),
        *("native_layer_norm_backward", "native_group_norm_backward", "gelu_backward"),
        *("avg_pool2d_backward", "upsample_nearest2d_backward"),
    }
    assert not seen.names & left_out
    assert "convolution_backward" in seen.names
    wanted = made.wanted(floor)
    for grad, p in zip(grads, wanted, strict=True):
        assert grad is None or grad.shape == p.shape
    assert sum(g is not None for g in grads) > 0.4 * len(wanted)


def test_the_nchw_copy_is_nchw_everywhere_and_the_same_function() -> None:
    made = bench_models.Problem(bench_models.TINY[1], CPU)
    nchw = bench_models.as_nchw(made.module)
    layouts = []
    for part in nchw.modules():
        if isinstance(part, torch.nn.Conv2d):
            part.register_forward_hook(
                lambda p, x, y: layouts.append((x[0].is_contiguous(), p.weight.is_contiguous()))
            )
    with torch.no_grad(), rivals.plain(nchw=True):
        got = nchw(*made.arguments)
    assert layouts
    assert all(a and b for a, b in layouts)
    torch.testing.assert_close(got, made.module(*made.arguments), rtol=1e-4, atol=1e-4)


# Rows


def test_rows_of_an_op(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = bench_ops.run_case(TINY["window_attention"], CPU, QUICK)
    assert [row["direction"] for row in rows][:2] == ["forward", "forward+backward"]
    row = rows[0]
    assert row["bytes"] == 4 * 8 * 8 * 16 * 4 + 49 * 4
    assert row["gbs"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
    assert row["of_floor"] == pytest.approx(row["bytes"] / (row["copy_gbs"] * 1e3) / row["us"])
    timed = {name for name, time in row["times_us"].items() if not isinstance(time, str)}
    assert timed == {"ours", "eager", "eager SDPA"} == set(row["samples_us"])
    assert row["times_us"]["xformers"].startswith("n/a: ")
    assert len(row["samples_us"]["ours"]) == row["rounds"]
    assert (
        row["over_best"] == min(row["times_us"]["eager"], row["times_us"]["eager SDPA"]) / row["us"]
    )
    assert row["margin"] <= 1
    assert rows[1]["saved_mib"] > 0
    json.dumps(rows)


def test_backward_is_the_difference_and_absent_where_noise_hides_it() -> None:
    made = problem("dwconv_gelu")
    contestants = {
        n: bench_ops.Rival(made.ours, made.inputs, eager=True) for n in ("ours", "eager")
    }

    def timings(both: float) -> dict:
        found = {
            (name, way): harness.Timing(t, t, 0.0, 3, "graph")
            for name, t0, t1 in (("ours", 2e-6, both), ("eager", 4e-6, 10e-6))
            for way, t in (("forward", t0), ("both", t1))
        }
        return found | {("copy", "forward"): harness.Timing(1e-6, 1e-6, 0.0, 3, "graph")}

    rows = bench_ops.table_rows(made, contestants, {"flex": "n/a: why"}, timings(5e-6))
    assert [round(row["us"], 6) for row in rows] == [2, 5, 3]
    assert rows[2]["over_best"] == pytest.approx(2)
    assert rows[0]["times_us"]["flex"] == "n/a: why"
    assert rows[0]["copy_gbs"] == pytest.approx(2 * made.activation() / 1e3)
    rows = bench_ops.table_rows(made, contestants, {}, timings(1.9e-6))
    assert [row["direction"] for row in rows] == ["forward", "forward+backward"]


def test_rows_of_a_model() -> None:
    rows = bench_models.run_case(bench_models.TINY[0], CPU, QUICK)
    assert [row["direction"] for row in rows] == ["forward", "training"]
    assert {"ours", "eager", "floor"} <= set(rows[0]["times_us"])
    times = rows[1]["times_us"]
    assert rows[1]["over_floor"] == pytest.approx(times["ours"] / times["floor"])
    assert rows[0]["samples_us"].keys() >= {"ours", "eager", "floor"}


def test_a_row_of_a_race() -> None:
    def timing(*samples: float) -> harness.Timing:
        return harness.Timing.of(samples, "cpu")

    timed = {
        "ours": timing(2e-3, 2e-3, 4e-3),
        "ours, noise": timing(1e-3, 1e-3, 1e-3),
        "floor": timing(1e-3, 1e-3, 1e-3),
        "eager": timing(6e-3, 6e-3, 6e-3),
        "other": timing(4e-3, 4e-3, 4e-3),
        "absent": "n/a: not installed",
    }
    row = harness.race_row("a", "forward", timed, kind="k")
    assert (row["us"], row["kind"]) == (pytest.approx(2000), "k")
    assert (row["best"], row["over_best"]) == ("other", pytest.approx(2))
    assert (row["eager"], row["over_eager"]) == ("eager", pytest.approx(3))
    assert row["over_floor"] == pytest.approx(2)
    assert row["samples_us"]["ours"] == [2000, 2000, 4000]
    assert row["times_us"]["absent"] == "n/a: not installed"
    assert harness.race_row("a", "f", timed, mine="ours, noise")["over_best"] == pytest.approx(4)
    with pytest.raises(harness.Refused, match="not installed"):
        harness.race_row("a", "forward", timed, mine="absent")


def test_utilisation_of_known_gpus() -> None:
    half = bench_models.utilisation(156e12, 1.0, torch.bfloat16, "NVIDIA A100-SXM4-80GB")
    assert half == pytest.approx(0.5)
    assert bench_models.utilisation(1e12, 1.0, torch.float32, "NVIDIA A100-SXM4-80GB") is None
    assert bench_models.utilisation(1e12, 1.0, torch.bfloat16, "unheard of") is None


def test_goals() -> None:
    assert bench_ops.verdict([("floor", 0.8, 0.75, True), ("memory", 0.8, 0.8, False)]) == "met"
    missed = bench_ops.verdict([("floor", 0.7, 0.75, True), ("memory", 0.9, 0.8, False)])
    assert missed == "missed: floor 0.70 < 0.75, memory 0.90 > 0.8"


def test_the_share_of_a_goal_is_that_of_the_furthest() -> None:
    assert bench_ops.share([("floor", 0.6, 0.75, True), ("eager", 8, 4, True)]) == pytest.approx(
        0.8
    )
    assert bench_ops.share([("memory", 0.4, 0.8, False)]) == 2


def test_a_published_figure_stands_beside_the_row_that_it_is_for() -> None:
    nhwc = bench_ops.group_norm(1, 16, 4, film=True)
    what, value = bench_ops.figure_to_beat(nhwc, "forward") or ("", 0)
    assert value == 0.9
    assert "sglang" in what
    assert bench_ops.figure_to_beat(nhwc, "backward") is None
    assert bench_ops.figure_to_beat(bench_ops.group_norm(1, 16, 4, nchw=True), "forward") is None


def test_the_table_has_every_row_and_every_failure() -> None:
    rows = [
        {"case": "op a", "direction": "forward", "us": 1234.5, "of_floor": 0.815, "best": "flex"},
        {"case": "op b", "direction": "forward", "us": 1.25},
        {"case": "op c", "failed": "refused"},
    ]
    text = harness.table(rows)
    assert "1234" in text and "82%" in text and "op b" in text  # noqa: PT018
    assert "op c: no number: refused" in text
    marked = harness.table(rows, markdown=True).splitlines()
    rows[0]["times_us"] = {"ours": 1.0, "flex": "n/a: on a GPU only"}
    assert "without flex: on a GPU only (1 rows)" in harness.table(rows)
    assert marked[1].count("|") == marked[0].count("|") == marked[3].count("|")


def test_nothing_names_a_place_of_this_machine() -> None:
    text = harness.clean(f"{harness.ROOT}/benchmarks/harness.py, /opt/x/y.py; a/b; 3/4 /tmp/z")
    assert text == "benchmarks/harness.py, .../y.py; a/b; 3/4 .../z"
    assert not [v for v in harness.environment(CPU).values() if "/" in str(v)[:1]]
