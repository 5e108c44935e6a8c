"""`benchmarks.mfu`: what ours is compared with, and what becomes of parts that fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import mfu


def row(contender: str, speed: float) -> dict[str, Any]:
    common = {"model": "nano", "flops_per_token": 1, "mfu": None, "peak_gib": None, "global_batch": 2, "micro_batch": 1}
    common |= {"step_ms": 1.0, "step_ms_p10": 1.0, "step_ms_p90": 1.0, "first_step_s": 1.0, "steps": 3}
    common |= {"optimizer": "fused", "length": 8, "device": "a GPU"}
    return {**common, "contender": contender, "tokens_per_s": speed}


def test_the_rival_is_the_faster_trainer_and_named() -> None:
    speeds = {"ours-adamw": 300.0, "trainer": 100.0, "trainer-compiled": 200.0}
    rows = {f"nano {name}": row(name, speed) for name, speed in speeds.items()}
    shown = {row["contender"]: row["against the faster Trainer"] for row in mfu.page(rows).tables[0].rows}
    assert shown == {"ours-adamw": "1.50x (trainer-compiled)", "trainer": None, "trainer-compiled": None}
    rows["nano trainer-compiled"] = {"model": "nano", "contender": "trainer-compiled", "failed": "took too long"}
    speed, absent = mfu.page(rows).tables
    assert speed.rows[0]["against the faster Trainer"] == "3.00x (trainer; trainer-compiled: not measured)"
    assert absent.rows == [{"model": "nano", "contender": "trainer-compiled", "why": "took too long"}]
    del rows["nano trainer"]
    assert mfu.page(rows).tables[0].rows[0]["against the faster Trainer"] is None


def test_a_part_that_failed_is_told_and_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def run_part(args: Any, model: str, part: str) -> dict[str, Any] | str:
        tried.append(part)
        return "no room" if part == "trainer" else row(part, 300.0)

    monkeypatch.setattr(mfu, "run_part", run_part)
    monkeypatch.setattr(sys, "argv", ["mfu", "--quick", "--device", "cpu", "--out", str(tmp_path)])
    assert [mfu.main(), mfu.main()] == [1, 0]
    assert tried == ["ours-adamw", "trainer"]
    assert json.loads((tmp_path / "mfu-parts.json").read_text())["nano trainer"]["failed"] == "no room"
    page = next(tmp_path.glob("*-mfu-quick.md")).read_text(encoding="utf-8")
    assert "| nano | trainer | no room |" in page
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--again"])
    assert mfu.main() == 1
    assert tried == ["ours-adamw", "trainer"] * 2
