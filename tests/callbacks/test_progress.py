"""Progress: plain lines where output is a file, one live bar on a real (pseudo) terminal, the same lines in the log."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from foreign_project import FakeClock, Foreign, Rows, fit

from lightning_opt.callbacks import Progress, Stability, Throughput
from lightning_opt.callbacks.plain_lines import number, quantity
from lightning_opt.plan import duration

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f\x1b]")


@pytest.fixture
def run_log(tmp_path: Path) -> Any:
    """A job's run.log: a file handler on the logger ``lightning_opt``."""
    path = tmp_path / "run.log"
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("lightning_opt")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield path
    logger.removeHandler(handler)
    logger.setLevel(level)
    handler.close()


def steps_of(text: str) -> list[int]:
    return [int(m) for line in text.splitlines() if "validation" not in line for m in re.findall(r"^step (\d+)", line)]


def test_a_file_gets_one_plain_line_per_interval_and_the_log_the_same(tmp_path: Path, run_log: Path) -> None:
    out = io.StringIO()
    module = Foreign()
    progress = Progress(every_n_steps=5, stream=out)
    fit(tmp_path, module, [Stability(), progress], val_rows=Rows(8), val_check_interval=10, max_steps=22)
    text = out.getvalue()
    assert not CONTROL.search(text)
    assert steps_of(text) == [5, 10, 15, 20, 22]
    assert len([line for line in text.splitlines() if "validation" in line]) == 2
    assert run_log.read_text() == text
    line = next(line for line in text.splitlines() if line.startswith("step 15"))
    assert line.startswith("step 15/22  68%  ")
    assert f"loss {module.micro_losses[14]:.3f}" in line
    assert f"grad {module.norms[14]:.2f}" in line
    assert "lr 1.0e-02" in line
    assert re.search(r"val \d\.\d{3}  lr", line)
    assert re.search(r"[\d.]+k? tok/s  ETA [\d.]+ s$", line)


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")])
@pytest.mark.parametrize("terminal", [False, True])
def test_who_cannot_be_told_any_more_stops_nothing(
    tmp_path: Path, run_log: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool, error: OSError
) -> None:
    """The reader of a pipe that has seen enough, a full disk, a terminal that was closed."""

    class Gone(io.StringIO):
        def isatty(self) -> bool:
            return terminal

        def write(self, text: str) -> int:
            if "step 10" in self.getvalue() + text:
                raise error
            return super().write(text)

    monkeypatch.setenv("TERM", "xterm-256color")
    progress = Progress(every_n_steps=5, stream=Gone())
    monkeypatch.setattr("lightning_opt.callbacks.progress.REFRESH_S", 0.0)
    trainer, _ = fit(tmp_path, Foreign(), [progress], max_steps=20, batch_size=1)
    assert trainer.global_step == 20
    assert steps_of(run_log.read_text()) == [5, 10, 15, 20]


def test_nothing_shows_twice_where_the_console_has_a_handler(
    tmp_path: Path, run_log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console = logging.StreamHandler(sys.stdout)
    logging.getLogger("lightning_opt").addHandler(console)
    try:
        fit(tmp_path, Foreign(), [Progress(every_n_steps=4)])
    finally:
        logging.getLogger("lightning_opt").removeHandler(console)
    assert steps_of(capsys.readouterr().out) == [4, 8, 12]
    assert steps_of(run_log.read_text()) == [4, 8, 12]


def test_by_seconds_with_eta_without_pauses(tmp_path: Path, clock: FakeClock) -> None:
    out = io.StringIO()
    module = Foreign(forward=lambda: clock.ms(250), validation=lambda: clock.ms(30_000))
    progress = Progress(interval_s=2.0, stream=out, clock=clock)
    fit(tmp_path, module, [progress], val_rows=Rows(4), val_check_interval=20, max_steps=40)
    lines = out.getvalue().splitlines()
    first = next(line for line in lines if line.startswith("step 8/40"))
    assert first.endswith("128 tok/s  ETA 8.0 s")  # 32 tokens in 0.25 s; 32 steps left
    later = next(line for line in lines if line.startswith("step 21/40"))
    # one pause of 30 s in 21 steps so far: 19 * (0.25 s + 30/21 s) are left
    assert later.endswith("128 tok/s  ETA 32 s")
    assert "step 20/40  validation  val_loss" in lines[2]
    assert lines[2].endswith("(30 s)")


def test_accumulation_counts_optimizer_steps_and_averages(tmp_path: Path) -> None:
    out, module = io.StringIO(), Foreign()
    fit(tmp_path, module, [Progress(every_n_steps=1, stream=out)], accumulate_grad_batches=2, max_steps=3)
    assert steps_of(out.getvalue()) == [1, 2, 3]
    assert f"loss {sum(module.micro_losses[4:]) / 2:.3f}" in out.getvalue().splitlines()[-1]


def test_throughputs_number_is_shown_where_it_logs(tmp_path: Path, clock: FakeClock) -> None:
    out = io.StringIO()
    module = Foreign(forward=lambda: clock.ms(100))
    throughput = Throughput(clock=clock)
    fit(tmp_path, module, [throughput, Progress(stream=out)], log_every_n_steps=6)
    assert "320 tok/s" in out.getvalue().splitlines()[-1]
    assert throughput.last["tokens_per_s_per_device"] == pytest.approx(320)


def test_a_run_without_known_end_has_no_percent_and_no_eta(tmp_path: Path) -> None:
    class StopsAtSix(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 6

    out = io.StringIO()
    callbacks = [StopsAtSix(), Progress(every_n_steps=3, stream=out)]
    fit(tmp_path, Foreign(), callbacks, max_steps=-1, max_epochs=-1)
    assert re.fullmatch(r"step 6  loss .*  elapsed [\d.]+ s", out.getvalue().splitlines()[1])


def test_epochs_give_the_end_and_an_injected_one_wins(tmp_path: Path) -> None:
    out = io.StringIO()
    fit(tmp_path, Foreign(), [Progress(every_n_steps=4, stream=out)], rows=Rows(16), max_steps=-1, max_epochs=2)
    assert steps_of(out.getvalue()) == [4, 8]
    assert "step 8/8  100%" in out.getvalue()
    out = io.StringIO()
    progress = Progress(every_n_steps=4, stream=out)
    progress.max_steps = 50
    fit(tmp_path, Foreign(), [progress])
    assert "step 4/50  8%" in out.getvalue()


def test_a_resumed_run_counts_on(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, Foreign(), [Progress(stream=io.StringIO())], max_steps=6)
    trainer.save_checkpoint(tmp_path / "six.ckpt")
    out = io.StringIO()
    fit(tmp_path, Foreign(), [Progress(every_n_steps=5, stream=out)], max_steps=20, ckpt_path=tmp_path / "six.ckpt")
    assert steps_of(out.getvalue()) == [10, 15, 20]


@pytest.mark.parametrize("nothing", [None, []])
def test_a_project_without_an_optimizer_trains_on(tmp_path: Path, nothing: Any) -> None:
    class Counting(Foreign):  # say, statistics of the data
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = nothing is None

        def configure_optimizers(self) -> Any:
            return nothing

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            pass

    module, out = Counting(), io.StringIO()
    progress = Progress(every_n_steps=1, stream=out)
    fit(tmp_path, module, [progress], rows=Rows(20), val_rows=Rows(8), max_steps=-1, max_epochs=1)
    assert len(module.micro_losses) == 5
    assert "validation  val_loss" in out.getvalue()


def test_other_ranks_are_silent_and_validation_alone_speaks(tmp_path: Path, run_log: Path) -> None:
    out = io.StringIO()
    progress = Progress(every_n_steps=1, stream=out)
    progress.disable()
    trainer, _ = fit(tmp_path, Foreign(), [progress])
    assert out.getvalue() == run_log.read_text() == ""
    progress.enable()
    trainer.validate(Foreign(), torch.utils.data.DataLoader(Rows(8), batch_size=4), verbose=False)
    assert re.fullmatch(r"step \d+  validation  val_loss [\d.]+\n", out.getvalue())


def test_numbers_for_people() -> None:
    assert [number(v) for v in (4.8123, 0.0, 0.00123, 123456.0, float("nan"))] == [
        "4.812",
        "0.000",
        "1.23e-03",
        "1.23e+05",
        "nan",
    ]
    assert [quantity(v) for v in (14_230, 987.4, 12.34, 1_250_000, 999_999, 3.2e9, 1000)] == [
        "14.2k",
        "987",
        "12.3",
        "1.25M",
        "1.00M",
        "3.20G",
        "1.00k",
    ]
    assert [duration(v) for v in (4.25, 9.99, 42, 59.7, 62, 3599.6, 11_100, 187_200)] == [
        "4.2 s",
        "10 s",
        "42 s",
        "1 min 00 s",
        "1 min 02 s",
        "1 h 00 min",
        "3 h 05 min",
        "2 d 04 h",
    ]


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="every_n_steps = 0"):
        Progress(every_n_steps=0)
    with pytest.raises(ValueError, match="interval_s = 3"):
        Progress(every_n_steps=5, interval_s=3)


class Terminal:
    """A pseudo terminal; a thread keeps reading what arrives, as a terminal does."""

    def __init__(self) -> None:
        self._ours, theirs = pty.openpty()
        self.stream = os.fdopen(theirs, "w", encoding="utf-8")
        self._received = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while piece := os.read(self._ours, 65536):
                self._received += piece
        except OSError:  # the other end is closed
            return

    def text(self) -> str:
        """All that arrived; closes the terminal."""
        self.stream.close()
        self._reader.join(timeout=10)
        os.close(self._ours)
        return self._received.decode()

    @staticmethod
    def frames(text: str) -> list[str]:
        """The lines as drawn, one per redrawing, without control sequences."""
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
        return [frame for frame in re.split(r"[\r\n]+", plain) if frame.strip()]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "110")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def drive(tmp_path: Path, terminal: Terminal, **hooks: Any) -> None:
    """60 steps of half a (fake) second, so that every refresh is due."""
    clock = FakeClock()
    module = Foreign(forward=lambda: (clock.ms(500), hooks.get("forward", lambda _: None)(len(module.micro_losses))))
    progress = Progress(every_n_steps=20, stream=terminal.stream, clock=clock)
    fit(tmp_path, module, [progress], val_rows=Rows(8), val_check_interval=40, max_steps=60)


def test_a_terminal_gets_one_live_bar_and_no_second_line(
    tmp_path: Path, run_log: Path, terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    drive(tmp_path, terminal)
    received, log = terminal.text(), run_log.read_text()
    assert steps_of(log) == [20, 40, 60]
    assert not CONTROL.search(log)
    frames = Terminal.frames(received)
    assert all("━" in frame for frame in frames)  # the plain lines go to the log alone
    assert {int(step) for frame in frames for step in re.findall(r"step (\d+)/60", frame)} >= set(range(1, 61))
    last = r"step 60/60  100%  loss [\d.]+  val [\d.]+  lr 1.0e-02  [\d.]+ tok/s  ETA 0.0 s"
    assert re.search(last, frames[-1])
    assert any("validating" in frame for frame in frames)
    assert "validating" not in frames[-1]
    assert received.rindex("\x1b[?25h") > received.rindex("\x1b[?25l")  # the cursor was hidden and is back
    assert received.count("\n") <= 2  # redrawn in place, not scrolled
    assert "step" not in capsys.readouterr().out


def test_a_narrow_terminal_keeps_the_bar_on_one_line(
    tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    drive(tmp_path, terminal)
    frames = Terminal.frames(terminal.text())
    assert max(map(len, frames)) <= 60
    assert re.search(r"step 60/60 .*loss [\d.]+ .*ETA", frames[-1])


def test_an_exception_gives_the_terminal_back(tmp_path: Path, run_log: Path, terminal: Terminal) -> None:
    def forward(step: int) -> None:
        if step == 30:
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        drive(tmp_path, terminal, forward=forward)
    received = terminal.text()
    assert received.rindex("\x1b[?25h") > received.rindex("\x1b[?25l")
    assert steps_of(run_log.read_text()) == [20]


def test_ctrl_c_gives_the_terminal_back(tmp_path: Path, run_log: Path, terminal: Terminal) -> None:
    def forward(step: int) -> None:
        if step == 30:
            raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            drive(tmp_path, terminal, forward=forward)
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores further ones while it shuts down
    received = terminal.text()
    assert received.rindex("\x1b[?25h") > received.rindex("\x1b[?25l")
    assert steps_of(run_log.read_text()) == [20]


@pytest.mark.parametrize("why", ["dumb", "no rich"])
def test_without_a_capable_terminal_or_rich_lines_serve(
    tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    else:
        monkeypatch.setitem(sys.modules, "rich.progress", None)
    drive(tmp_path, terminal)
    received = terminal.text().replace("\r\n", "\n")
    assert not CONTROL.search(received)
    assert steps_of(received) == [20, 40, 60]
