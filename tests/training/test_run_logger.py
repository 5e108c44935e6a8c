"""metrics.csv: one row per step, one writer, nothing lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_opt.run_folder import METRIC_COLUMNS, read_metrics
from lightning_opt.training import RunLogger


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def make(path: Path, step: list[int], clock: Clock, start_step: int = 0) -> RunLogger:
    return RunLogger(
        path,
        ["val/loss/web", "lr/matrix"],
        tokens_per_step=2048,
        current_step=lambda: step[0],
        start_step=start_step,
        clock=clock,
    )


def test_validation_joins_its_steps_row(tmp_path: Path) -> None:
    path, step, clock = tmp_path / "metrics.csv", [0], Clock()
    logger = make(path, step, clock)
    assert path.read_text().splitlines() == [",".join([*METRIC_COLUMNS, "val/loss/web", "lr/matrix"])]
    for step[0] in (10, 20):
        clock.now += 2
        logger.log_metrics({"train/loss": 5.0 - step[0] / 10, "epoch": 0}, step=step[0] - 1)
        if step[0] == 20:
            clock.now += 1
            logger.log_metrics({"val/loss": 4.5, "val/loss/web": 4.5}, step=19)
    logger.finalize("success")
    logger.log_metrics({"val/perplexity": 90.0}, step=20)  # the validation after fit
    logger.close()
    columns = read_metrics(path)
    assert columns["step"] == [10, 20]
    assert columns["tokens"] == [20480, 40960]
    assert columns["time_s"] == [2.0, 5.0]
    assert columns["train/loss"] == [4.0, 3.0]
    assert columns["val/loss"] == [None, 4.5]
    assert columns["val/perplexity"] == [None, 90.0]
    assert columns["mfu"] == [None, None]
    assert "epoch" not in columns


def test_somebody_elses_metric_is_kept(tmp_path: Path) -> None:
    path, step, clock = tmp_path / "metrics.csv", [1], Clock()
    logger = make(path, step, clock)
    logger.log_metrics({"train/loss": 5.0})
    step[0] = 2
    logger.log_metrics({"train/loss": 4.0, "their/own": 7.0})
    step[0] = 3
    logger.log_metrics({"train/loss": 3.0})
    logger.close()
    columns = read_metrics(path)
    assert columns["train/loss"] == [5.0, 4.0, 3.0]
    assert columns["their/own"] == [None, 7.0, None]


def test_a_run_that_goes_on_drops_the_rows_after_its_step(tmp_path: Path) -> None:
    path, step, clock = tmp_path / "metrics.csv", [1], Clock()
    logger = make(path, step, clock)
    for step[0] in (10, 20, 30):
        clock.now += 5
        logger.log_metrics({"train/loss": float(step[0]), "their/own": 1.0})
    logger.close()
    clock.now = 7.0  # another process: its clock starts elsewhere
    logger = make(path, step, clock, start_step=20)
    step[0] = 30
    clock.now += 3
    logger.log_metrics({"train/loss": 31.0})
    logger.close()
    columns = read_metrics(path)
    assert columns["step"] == [10, 20, 30]
    assert columns["train/loss"] == [10.0, 20.0, 31.0]
    assert columns["time_s"] == [5.0, 10.0, pytest.approx(13.0)]
    assert columns["their/own"] == [1.0, 1.0, None]


def test_a_new_run_in_an_adopted_folder_starts_an_empty_table(tmp_path: Path) -> None:
    path, step, clock = tmp_path / "metrics.csv", [10], Clock()
    logger = make(path, step, clock)
    logger.log_metrics({"train/loss": 5.0})
    logger.close()
    make(path, step, clock)
    assert read_metrics(path)["step"] == []
