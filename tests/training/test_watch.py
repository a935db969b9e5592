"""What a run logs: losses by band of diffusion time, readings of the GPU, utilisation."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import IUVIT, tiny_recipe

from fastdiff import _plot, roofline
from fastdiff.models import IUViT
from fastdiff.training.engine import StepResult, sums_by_band
from fastdiff.training.loop import train
from fastdiff.training.sensors import Sensors, Utilisation, peak_flops
from fastdiff.training.watch import Watch


def test_sums_by_band_worked_out_by_hand() -> None:
    found = sums_by_band(
        torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 249, 250, 999]), steps=1000
    )
    assert found.tolist() == [[3.0, 3.0, 0.0, 4.0], [2.0, 1.0, 0.0, 1.0]]


def test_the_log_holds_the_mean_of_an_interval_by_band(tmp_path) -> None:
    recipe = tiny_recipe(tmp_path, log_every=2)
    (tmp_path / "run").mkdir()
    watch = Watch(recipe, 0)
    for step, sums in enumerate(([3.0, 3.0, 0.0, 4.0], [1.0, 0.0, 0.0, 8.0]), start=1):
        bands = torch.tensor([sums, [2.0, 1.0, 0.0, 1.0]])
        watch.log_step(step, 8 * step, StepResult(1.0, 1.0, False, bands), 0.1, 0.2)
    watch.close()
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    point = json.loads(line)
    assert [point[f"loss_band_{i}"] for i in range(4)] == [1.0, 1.5, None, 6.0]


def test_a_run_logs_its_bands_and_is_drawn(tmp_path) -> None:
    run = train(tiny_recipe(tmp_path, max_steps=3, batch_size=32))
    points = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for point in points:
        bands = [point[f"loss_band_{i}"] for i in range(4) if point[f"loss_band_{i}"] is not None]
        assert min(bands) <= point["loss"] <= max(bands)
    assert not any("gpu" in field for field in points[0])  # there is none here
    png, page = _plot.plot([run])
    assert png.stat().st_size > 10_000
    assert "loss_band_3" in page.read_text()


def test_readings_have_their_units_and_what_is_not_told_is_left_out() -> None:
    class NVMLError(Exception):
        pass

    def refused(*_: object) -> float:
        raise NVMLError

    sensors = Sensors(torch.device("cpu"))
    assert sensors.read() == {}
    sensors._nvml = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_TEMPERATURE_GPU=0,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=3 * 2**30),
        nvmlDeviceGetPowerUsage=lambda gpu: 250_000,
        nvmlDeviceGetTemperature=refused,
        nvmlDeviceGetClockInfo=lambda gpu, kind: 1000 * kind,
    )
    assert sensors.read() == {
        "gpu_used_gib": 3.0,
        "gpu_power_w": 250.0,
        "gpu_sm_mhz": 1000.0,
        "gpu_memory_mhz": 2000.0,
    }


@pytest.mark.parametrize(
    ("gpu", "peak"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_by_name(gpu: str, peak: float | None) -> None:
    assert peak_flops(gpu) == peak


def test_utilisation_is_flops_over_the_peak(tmp_path) -> None:
    with torch.device("meta"):
        model = IUViT(IUVIT)
    flops = roofline.count(model, 1, text=24).flops
    found = Utilisation(tiny_recipe(tmp_path), peak=1e12)
    assert found.flops(24) == pytest.approx(flops)
    assert found(1000.0, 24) == pytest.approx(1000 * flops / 1e12)


def test_wandb_is_asked_for_and_gets_what_the_log_has(tmp_path, monkeypatch) -> None:
    """wandb itself is a service; this stands where it would be imported."""
    recipe = tiny_recipe(tmp_path, max_steps=2, sample_every=2, wandb=True)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="needs wandb: pip install wandb"):
        train(recipe)
    logged, began = [], []
    run = SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end")
    )
    module = SimpleNamespace(
        init=lambda **given: began.append(given) or run, Image=lambda image: image.size
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    train(recipe)
    assert began[0]["config"]["train"]["max_steps"] == 2
    (first, point), (second, _), (third, pictures), end = logged
    assert (first, second, third, end) == (1, 2, 2, "end")
    assert point["train/loss"] == json.loads(metrics(tmp_path / "run")[0])["loss"]
    assert pictures["samples"][0] > 256
    train(tiny_recipe(tmp_path, max_steps=3, wandb=True))
    assert began[1]["id"] == began[0]["id"]


def metrics(run) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()
