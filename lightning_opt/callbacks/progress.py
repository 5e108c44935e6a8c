"""How far is the run, and when will it end?"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor

from lightning_opt.callbacks.batches import StepLoss, TokensPerBatch, count_tokens
from lightning_opt.callbacks.live_bar import LiveBar
from lightning_opt.callbacks.plain_lines import log_line, number, quantity
from lightning_opt.callbacks.telling import is_logged
from lightning_opt.plan import ConfigError, duration

FIRST_STEPS = 3  # not representative: compilation, cold caches
RECENT = 50  # steps that speed and ETA look back on
REFRESH_S = 0.5  # of the live bar


class Progress(ProgressBar):
    """A live bar on a terminal; elsewhere one plain line per interval. The same lines always go to the log.

    ``step 120/800  15%  loss 4.812  val 4.9  lr 3.2e-03  grad 0.91  14.2k tok/s  ETA 1 min 02 s``

    - *loss* of that step (the mean over its micro-batches); *val*: last validation's; *lr* that the step used, of the
      group with the most parameters; *grad*: gradient norm before clipping, where the optimizer or `Stability` tells
    - *tok/s* over all devices: `Throughput`'s, where it logs, else the mean over the last 50 steps without pauses
    - *ETA*: the remaining steps at that speed, plus the share of pauses (validation, checkpoints) seen so far

    A line is written every ``every_n_steps`` optimizer steps (default: the trainer's ``log_every_n_steps``) or every
    ``interval_s`` seconds, after each validation, and at the end: no control characters, to the stream and to the
    logger ``lightning_opt.progress``. Handlers that write to the console are left out there, so nothing shows twice: on
    a terminal only the bar moves. Only rank zero writes.

    It is a Lightning `ProgressBar`, so it replaces Lightning's own; leave ``enable_progress_bar`` on. Fires:
    `on_train_start`, `on_before_optimizer_step` (notes the rate), `on_train_batch_end`, `on_validation_start/_end`;
    `on_train_end`, `on_exception` and `teardown` close the bar.

    Args:
        every_n_steps: optimizer steps between lines.
        interval_s: seconds between lines; instead of ``every_n_steps``.
        tokens_per_batch: tokens of one micro-batch, or a function of the batch; ``None`` reads them off the batch.
        stream: where to write; ``None`` = standard output.
        clock: seconds, for tests.

    Attributes:
        max_steps: optimizer steps of the whole run; ``None`` = as the trainer estimates, if it can.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        interval_s: float | None = None,
        tokens_per_batch: TokensPerBatch = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__()
        for name, value in (("every_n_steps", every_n_steps), ("interval_s", interval_s)):
            if value is not None and value <= 0:
                raise ConfigError(f"progress.{name}", value, "must be > 0, or null")
        if every_n_steps is not None and interval_s is not None:
            raise ConfigError("progress.interval_s", interval_s, "must be null where every_n_steps is given")
        self.every_n_steps, self.interval_s, self.tokens_per_batch = every_n_steps, interval_s, tokens_per_batch
        self.max_steps: int | None = None
        self._stream, self._clock = stream, clock
        self._enabled, self._training = True, False
        self._bar: LiveBar | None = None
        self._val: float | None = None
        self._total: int | None = None
        self._paused_at: float | None = None

    def enable(self) -> None:
        """Lightning's tuner switches bars off and on again."""
        self._enabled = True

    def disable(self) -> None:
        """Writes nothing from now on."""
        self._enabled = False
        self._close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """`LightningModule.print` without breaking the bar."""
        print(*args, **kwargs)  # rich lifts it above the bar

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock and, on a terminal, the bar."""
        total = self.max_steps if self.max_steps is not None else trainer.estimated_stepping_batches
        self._total = int(total) if 0 < total < float("inf") else None
        self._step = self._first_step = self._written = trainer.global_step
        self._loss, self._step_loss, self._rate = None, StepLoss(), None
        self._tokens: int | None = 0
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT)
        self._started = self._mark = self._line_at = self._refreshed = self._clock()
        self._paused_s, self._paused_at = 0.0, None
        groups = trainer.optimizers[0].param_groups if trainer.optimizers else []
        sizes = [sum(p.numel() for p in group["params"]) for group in groups]
        self._largest = sizes.index(max(sizes)) if sizes else 0
        self._training = True
        if self._enabled:
            self._bar = LiveBar.on(self._stream or sys.stdout, self._total, self._step)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Notes the rate: when the batch ends, the scheduler has moved on."""
        if self._enabled and (groups := optimizer.param_groups):  # Lightning's stand-in for no optimizer has none
            group = groups[min(self._largest, len(groups) - 1)]
            self._rate = group["lr"] * group.get("lr_factor", 1.0)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts; writes when it is time."""
        if not self._enabled or not self._training:
            return
        automatic = pl_module.automatic_optimization
        self._step_loss.add(outputs, trainer.accumulate_grad_batches if automatic else 1)
        tokens = count_tokens(batch, self.tokens_per_batch)
        self._tokens = None if tokens is None or self._tokens is None else self._tokens + tokens
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._loss = self._step_loss.take()
        self._resume()
        now = self._clock()
        seconds, self._mark = now - self._mark, now
        if self._step - self._first_step > FIRST_STEPS:
            self._recent.append((seconds, self._tokens or 0))
        self._tokens = None if self._tokens is None else 0
        if self._due(trainer, now):
            self._write_step(trainer, now)
        elif self._bar and now - self._refreshed >= REFRESH_S:
            self._refreshed = now
            self._bar.update(self._step, eta=self._eta())

    def _due(self, trainer: pl.Trainer, now: float) -> bool:
        if self.interval_s is not None:
            return now - self._line_at >= self.interval_s
        return is_logged(trainer, self._step, self.every_n_steps)

    def _write_step(self, trainer: pl.Trainer, now: float) -> None:
        self._line_at = self._refreshed = now
        self._written = self._step
        fields = self._fields(trainer)
        self._write("  ".join(fields.values()))
        if self._bar:
            self._bar.update(self._step, eta=self._eta(), fields=fields)

    def _fields(self, trainer: pl.Trainer) -> dict[str, str]:
        of = f"/{self._total}" if self._total else ""
        fields = {"step": f"step {self._step}{of}"}
        if self._total:
            fields["percent"] = f"{100 * self._step // self._total}%"
        if (loss := self._mean_loss(trainer)) is not None:
            fields["loss"] = f"loss {number(float(loss))}"
        if self._val is not None:
            fields["val"] = f"val {number(self._val)}"
        if self._rate is not None:
            fields["lr"] = f"lr {float(self._rate):.1e}"
        logged = trainer.callback_metrics
        norm = getattr(next(iter(trainer.optimizers), None), "last_grad_norm", None)
        norm = logged.get("grad_norm") if norm is None else norm
        if norm is not None:
            fields["grad"] = f"grad {number(float(norm), 2)}"
        if speed := self._tokens_per_s(trainer, logged):
            fields["speed"] = f"{quantity(speed)} tok/s"
        if (eta := self._eta()) is not None:
            fields["eta"] = f"ETA {duration(eta)}"
        elif self._total is None:
            fields["eta"] = f"elapsed {duration(self._clock() - self._started)}"
        return fields

    def _mean_loss(self, trainer: pl.Trainer) -> Tensor | None:
        """Over several ranks what the module logged, if it is of this step; only one rank is here to ask."""
        logged = trainer.callback_metrics.get("train/loss") if trainer.world_size > 1 else None
        return self._loss if logged is None else logged

    def _tokens_per_s(self, trainer: pl.Trainer, logged: dict[str, Tensor]) -> float | None:
        if "tokens_per_s_per_device" in logged:
            return float(logged["tokens_per_s_per_device"]) * trainer.world_size
        seconds = sum(seconds for seconds, _ in self._recent)
        if not seconds or self._tokens is None:
            return None
        return sum(tokens for _, tokens in self._recent) / seconds * trainer.world_size

    def _eta(self) -> float | None:
        if self._total is None or not self._recent:
            return None
        per_step = sum(seconds for seconds, _ in self._recent) / len(self._recent)
        pauses = self._paused_s / max(1, self._step - self._first_step)
        return max(0, self._total - self._step) * (per_step + pauses)

    def pause(self) -> None:
        """Stops the clock until the next batch starts."""
        if self._training and self._paused_at is None:
            self._paused_at = self._clock()

    def _resume(self) -> None:
        if self._paused_at is not None:
            pause = self._clock() - self._paused_at
            self._paused_s += pause
            self._mark += pause
            self._paused_at = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock of the speed."""
        self.pause()
        if self._bar:
            self._bar.update(self._step, note="validating")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The pause, if there was one, is over."""
        self._resume()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Stops the clock of the speed."""
        self.pause()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes what validation found."""
        if not self._enabled or trainer.sanity_checking:
            return
        found = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith(("val", "valid"))}
        for name in ("val/loss", "val_loss", "valid/loss", "valid_loss", "validation/loss", "validation_loss"):
            if name in found:
                self._val = found[name]
                break
        if found:
            pairs = "  ".join(f"{name} {number(value)}" for name, value in found.items())
            at = f"step {trainer.global_step}" + (f"/{self._total}" if self._training and self._total else "")
            took = f"  ({duration(self._clock() - self._paused_at)})" if self._paused_at is not None else ""
            self._write(f"{at}  validation  {pairs}{took}")
        if self._bar:
            self._bar.update(self._step, note="", val=self._val)

    def _write(self, line: str) -> None:
        log_line(line)
        if not self._bar:
            stream = self._stream or sys.stdout
            with suppress(OSError):  # a full disk, a reader that is gone: the log has it
                stream.write(line + "\n")
                stream.flush()

    def _close(self) -> None:
        if self._bar:
            self._bar.close()
            self._bar = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last step's line, if it has none yet."""
        if self._enabled and self._training and self._written != self._step:
            self._write_step(trainer, self._clock())
        self._training = False
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves the terminal as it was."""
        self._training = False
        self._close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the terminal as it was."""
        self._close()
