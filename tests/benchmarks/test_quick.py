"""Each benchmark's --quick setting runs and writes numbers that make sense; how fast is not for tests to say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def quick(name: str, repository: Path, out: Path, *more: str) -> dict[str, Any]:
    """The tables of what `python -m benchmarks.<name> --quick` wrote."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--out", str(out), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stderr[-3000:]
    [page] = out.glob(f"*-{name}*-quick.json")
    assert "\n| --- |" in page.with_suffix(".md").read_text(encoding="utf-8")
    record = json.loads(page.read_text(encoding="utf-8"))
    assert record["machine"]["torch"]
    return record["tables"]


def middle(cell: str) -> float:
    """The median of ``median (low-high)``, which lies between the two."""
    median, low, high = map(float, re.fullmatch(r"(-?[\d.]+) \((-?[\d.]+)-(-?[\d.]+)\)", cell).groups())
    assert low <= median <= high
    return median


def test_train_loop(repository: Path, tmp_path: Path) -> None:
    [table] = quick("train_loop", repository, tmp_path)
    [row] = table["rows"]
    for name in ("ours", "bare", "Trainer"):
        assert row[f"{name} tokens/s"] == pytest.approx(row["tokens per step"] / row[f"{name} step ms"] * 1e3, rel=0.01)
    for other in ("bare", "Trainer"):
        assert 0.05 < middle(row[f"ours / {other}, cpu"]) < 20


@pytest.mark.slow
def test_protections(repository: Path, tmp_path: Path) -> None:
    speeds, saves = quick("protections", repository, tmp_path)
    [speed], [save] = speeds["rows"], saves["rows"]
    assert 0.05 < middle(speed["ours / off, wall"]) < 20
    assert 0.05 < speed["all rounds, wall"] < 20
    assert speed["checkpoints left"] == 2  # saves did happen, and the older ones are gone
    assert save["MB"] > 1
    assert save["loop waits, first ms"] > 0
    assert 0 < middle(save["loop waits, then ms"]) < middle(save["thread writes ms"])


@pytest.mark.slow
def test_callback_overhead(repository: Path, tmp_path: Path) -> None:
    [table] = quick("callback_overhead", repository, tmp_path)
    [row] = table["rows"]
    assert row["step without ms"] > 1  # it sleeps that long
    assert middle(row["with / without, wall"]) > 0


@pytest.mark.slow
def test_callback_overhead_of_experts(repository: Path, tmp_path: Path) -> None:
    [steps, own] = quick("callback_overhead", repository, tmp_path, "--experts")
    assert {"ExpertLoadMonitor, brief", "ExpertBalance"} <= {row["callbacks"] for row in steps["rows"]}
    assert {row["callbacks"] for row in own["rows"]} < {row["callbacks"] for row in steps["rows"]}
    assert all(middle(row["own ms of a step"]) > 0 for row in own["rows"])
    for row in steps["rows"]:
        assert row["step without ms"] > 1
        assert middle(row["with / without, wall"]) > 0


@pytest.mark.slow
def test_checkpointing_of_a_mixture(repository: Path, tmp_path: Path) -> None:
    [table] = quick("checkpointing", repository, tmp_path, "--model", "moe_nano")
    ways = [(row["precision"], row["loss from"], row["checkpointing"]) for row in table["rows"]]
    assert len(set(ways)) == 2 * 2 * 3
    assert "20 %" in table["note"]
    for row in table["rows"]:
        assert row["peak, MiB"] > 1
        assert middle(row["time, of the first (deciles)"]) > 0
        assert (row["memory less"] is None) == (row["time more"] is None) == (row["checkpointing"] == "off")


def test_data_loading(repository: Path, tmp_path: Path) -> None:
    [table] = quick("data_loading", repository, tmp_path)
    rows = {row["loader"]: row for row in table["rows"]}
    assert {"memmap", "ours, 0 workers", "ours, 1 workers", "torch, 0 workers"} <= set(rows)
    assert middle(rows["memmap"]["of the limit"]) == 1
    for row in rows.values():
        assert middle(row["M tokens/s"]) > 0


@pytest.mark.slow
def test_memory(repository: Path, tmp_path: Path) -> None:
    table, losses, sizes, states, claims = quick("memory", repository, tmp_path)
    rows = {row["optimizer"]: row for row in table["rows"]}
    assert set(rows) == {"torch-adamw", "lion"}
    for row in rows.values():
        assert row["states"] == pytest.approx(row["expected states"], abs=0.1)
        named = row["weights"] + row["gradients"] + row["states"]
        assert named == pytest.approx(row["expected weights + gradients + states"], abs=0.3)
        assert row["peak MiB"] > named - 1
        assert row["peak less than torch-adamw"] == pytest.approx(row["expected less"], abs=2)
    assert rows["torch-adamw"]["states"] == pytest.approx(2 * rows["lion"]["states"], abs=0.2)
    chunked, whole = losses["rows"]
    assert whole["peak MiB"] > 1.9 * whole["all logits in float32"] > 1.5 * chunked["peak MiB"] > 100
    assert [row["model"] for row in sizes["rows"]] == ["pico", "nano"]
    assert [(row["optimizer"], row["state"]) for row in states["rows"]][::3] == [
        ("adamw", "float32"),
        ("lion", "float32"),
    ]
    assert claims["rows"][0]["Lion less"] == "25%"


@pytest.mark.slow
def test_interval_coverage(repository: Path, tmp_path: Path) -> None:
    ours, bootstrap = quick("interval_coverage", repository, tmp_path)
    assert {row["interval"] for row in ours["rows"]} == {"profile"}
    assert {row["interval"] for row in bootstrap["rows"]} == {"percentile"}
    for row in ours["rows"]:  # 50 trials: a right 90 % interval covers in 37 or fewer of them once in 2000 times
        assert row["covered"] >= 0.76
        assert row["width"] > 1


@pytest.mark.slow
def test_sweep_overhead(repository: Path, tmp_path: Path) -> None:
    [table] = quick("sweep_overhead", repository, tmp_path)
    [row] = table["rows"]
    assert (row["jobs"], row["steps of a job"]) == (2, 2)
    alone, swept = middle(row["jobs alone, s"]), middle(row["sweep, s"])
    assert alone == pytest.approx(2 * middle(row["a job alone, s"]), abs=0.01)  # the median of two is their mean
    assert middle(row["over"]) == pytest.approx(swept / alone - 1, abs=0.05 * swept / alone)
    parts = [middle(row[f"{name}, s"]) for name in ("before", "between", "after")]
    assert min(parts) > 0
    assert sum(parts) < swept
