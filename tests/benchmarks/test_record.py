"""The pages of benchmarks: which command made them, and that a run cut short leaves no page that looks whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.record import Page, Table, keep

WHERE = {"date": "2026-01-02", "device": "a CPU", "cpus": 2, "threads": 1, "torch": "2", "python": "3", "cuda": None}


def page(value: int) -> Page:
    return Page("memory", "Memory", "How it was measured.", [Table("Peak", [{"MiB": value}])])


def test_a_run_cut_short_does_not_touch_the_complete_page(tmp_path: Path) -> None:
    where = WHERE | {"load_before": 0.1}
    complete = keep(page(1), where, tmp_path)
    part = keep(page(2), where, tmp_path, more=True)
    assert "| 1 |" in complete.read_text()
    assert "INCOMPLETE" not in complete.read_text()
    assert "| 2 |" in part.read_text()
    assert "**INCOMPLETE**" in part.read_text().split("## Peak")[0]
    assert not json.loads(part.with_suffix(".json").read_text())["complete"]
    assert keep(page(3), where, tmp_path) == complete
    assert "| 3 |" in complete.read_text()
    assert "INCOMPLETE" not in complete.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2026-01-02-memory.json", "2026-01-02-memory.md"]


def test_the_page_names_the_command_that_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["memory.py", "--model", "a b", "--out", str(tmp_path), "--quick"])
    made = keep(page(1), WHERE | {"load_before": 0.1}, tmp_path)
    command = "python -m benchmarks.memory --model 'a b' --quick"
    assert f"Made by `{command}`." in made.read_text()
    assert json.loads(made.with_suffix(".json").read_text())["command"] == command
