"""Phases, averages and curvature in whole runs: N steps, an end and N more end in the same bits as 2N."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_exact_resume import SETUPS, assert_same, end_of, fit, killed_after

from lightning_opt.callbacks import OptimizerSignals

COMMON = {"weight_decay": 0.1, "max_grad_norm": 1.0, "lr": 1e-2}
PHASES = {
    "start": {"rule": "lion", "until": 0.4, "lr_scale": 0.1},
    "middle": {"rule": "adamw", "until": 9},
    "end": {"rule": "lion", "lr_scale": 0.1},
}
ROLES = {"default": {}, "norm": {"rule": "adamw", "weight_decay": 0.0}}
RUNS: dict[str, dict[str, Any]] = {
    "phased": {**COMMON, "name": "phased", "phases": PHASES, "warm": 3, "ramp": 2, "roles": ROLES},
    "dynamic": {
        **COMMON,
        "name": "dynamic",
        "signal": "loss_volatility",
        "threshold": 1e-9,
        "patience": 2,
        "dwell": 3,
        "phases": {"calm": {"rule": "lion", "lr_scale": 0.1}, "rough": {"rule": "adamw"}},
        "roles": ROLES,
    },
    "schedule_free": {**COMMON, "name": "schedule_free_adamw", "roles": {"default": {"rule": "schedule_free_adamw"}}},
    "sophia": {**COMMON, "name": "sophia", "interval": 5, "roles": {"default": {"rule": "sophia"}}},
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("step", [4, pytest.param(7, marks=pytest.mark.slow), pytest.param(9, marks=pytest.mark.slow)])
def test_n_and_n_more_are_2n(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, step: int) -> None:
    """Step 4 is validated: the averaged weights of schedule-free are swapped in and out at it."""
    monkeypatch.setitem(SETUPS, name, {"optimizer": RUNS[name]})
    monkeypatch.setattr("test_fit.OPTIMIZER", {})
    events: list[Any] = []

    def signals() -> OptimizerSignals:
        made = OptimizerSignals(window=3)
        made.on_event = lambda kind, **fields: events.append((kind, fields["step"], fields["after"]))
        return made

    fit(tmp_path / "whole", setup=name, extra=[signals()])
    before = list(events)
    assert bool(before) == ("phases" in RUNS[name])
    fit(tmp_path / "b", setup=name, extra=[signals()], resume=killed_after(tmp_path / "whole", step, tmp_path / "b"))
    assert_same(end_of(tmp_path / "whole"), end_of(tmp_path / "b"))
    assert events[len(before) :] == [event for event in before if event[1] > step]
