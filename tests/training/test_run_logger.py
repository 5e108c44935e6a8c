"""metrics.csv: one row per step, one writer, nothing lost."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from lightning_opt.run_folder import METRIC_COLUMNS, read_metrics
from lightning_opt.training import RunLogger


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def make(
    path: Path, step: list[int], clock: Clock, start_step: int | None = 0, cpu_clock: Clock | None = None
) -> RunLogger:
    return RunLogger(
        path,
        ["val/loss/web", "lr/matrix"],
        tokens_per_step=2048,
        current_step=lambda: step[0],
        start_step=start_step,
        clock=clock,
        cpu_clock=cpu_clock or Clock(),
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


@pytest.mark.parametrize("by_checkpoint", [True, False])
def test_what_the_process_computed_is_counted_apart_from_what_passed_and_goes_on_too(tmp_path: Path, by_checkpoint):
    path, step, clock, computed = tmp_path / "metrics.csv", [10], Clock(), Clock()
    logger = make(path, step, clock, cpu_clock=computed)
    clock.now, computed.now = clock.now + 20, computed.now + 5  # the machine had something else to do
    logger.log_metrics({"train/loss": 5.0})
    state = logger.state_dict()
    logger.close()
    clock.now, computed.now = 3.0, 1.0
    logger = make(path, step, clock, None if by_checkpoint else 10, cpu_clock=computed)
    if by_checkpoint:
        logger.load_state_dict(state, 10)
    step[0] = 20
    clock.now, computed.now = clock.now + 4, computed.now + 3
    logger.log_metrics({"train/loss": 4.0})
    logger.close()
    columns = read_metrics(path)
    assert columns["time_s"] == [20.0, 24.0]
    assert columns["cpu_time_s"] == [5.0, 8.0]


def test_a_new_run_in_an_adopted_folder_starts_an_empty_table(tmp_path: Path) -> None:
    path, step, clock = tmp_path / "metrics.csv", [10], Clock()
    logger = make(path, step, clock)
    logger.log_metrics({"train/loss": 5.0})
    logger.close()
    make(path, step, clock)
    assert read_metrics(path)["step"] == []


class FullDisk:
    """Lets half of what is written arrive, and then nothing, while it is `full`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        real = io.FileIO.write

        disk = self

        class File(io.FileIO):
            def write(self, content: bytes) -> int:
                if disk.full and len(content) < 8:
                    raise OSError(28, "No space left on device")
                return real(self, content[: len(content) // 2] if disk.full else content)

        opens = Path.open

        def opened(path: Path, mode: str = "r", buffering: int = -1, **more: object) -> object:
            return File(path, mode) if buffering == 0 else opens(path, mode, buffering, **more)

        monkeypatch.setattr(Path, "open", opened)


def test_rows_wait_while_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is torn, one warning; a checkpoint saved meanwhile holds them."""
    path, step, clock, disk = tmp_path / "metrics.csv", [1], Clock(), FullDisk(monkeypatch)
    logger = make(path, step, clock)
    for step[0] in (1, 2, 3, 4, 5, 6):
        disk.full = step[0] in (3, 4, 5)  # when the rows before are written: 2, 3 and 4
        logger.log_metrics({"train/loss": float(step[0])})
        if step[0] == 4:
            saved = logger.state_dict()
            assert read_metrics(path)["step"] == [1]
            assert path.read_text().endswith("\n")
    logger.close()
    assert read_metrics(path)["step"] == [1, 2, 3, 4, 5, 6]
    assert read_metrics(path)["train/loss"] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "metrics.csv cannot be written (No space left on device)"
    ]
    step[0] = 4
    for whole in (path.read_text(), "".join(path.read_text().splitlines(keepends=True)[:2])):  # written later, or lost
        path.write_text(whole)
        resumed = make(path, step, clock, start_step=None)
        resumed.load_state_dict(saved, 4)
        resumed.close()
        assert read_metrics(path)["step"] == [1, 2, 3, 4]


def test_a_new_column_waits_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, step = tmp_path / "metrics.csv", [1]
    logger = make(path, step, Clock())
    logger.log_metrics({"train/loss": 1.0, "their/own": 7.0})
    with monkeypatch.context() as patch:
        patch.setattr(
            Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        step[0] = 2
        logger.log_metrics({"train/loss": 2.0})
    logger.close()
    assert read_metrics(path)["their/own"] == [7.0, None]
    assert read_metrics(path)["train/loss"] == [1.0, 2.0]
