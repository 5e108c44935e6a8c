"""When is the run saved, and what else must be, so that it goes on as if nothing had happened?"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn

from lightning_opt.callbacks.checkpoint_io import CheckpointIO
from lightning_opt.callbacks.rng import of_all_ranks, rng_state, set_rng_state
from lightning_opt.checkpoints import Retention, Store, find
from lightning_opt.plan import check_value

log = logging.getLogger("lightning_opt.callbacks")

ROUGHLY = 20  # checkpoints over a run whose interval nobody chose
ENDLESS = 1000  # steps between those of a run that has no end
_KEY = "exact_resume"  # ours in Lightning's checkpoint


class Checkpoint(pl.callbacks.Checkpoint):
    """Saves a run so that it goes on to the last bit: ``trainer.fit(model, ckpt_path="checkpoints/step-000300")``.

    Fires between two optimizer steps only: in `on_train_batch_end`; at a step with validation in `on_validation_end`,
    where the metric is known; and in `on_train_end` if the last step is not saved yet. A step whose validation makes it
    one of the `keep_best` so far is saved whatever the interval, but for 0. The training loop waits for the
    copy to host memory, a thread for the disk; the last step's checkpoint is waited for. A save that fails is an event
    and an error in the log, and training goes on.

    A checkpoint holds what Lightning keeps, and the generators of random numbers (Python, NumPy, torch, CUDA) of every
    rank, put back when training starts. A loader with ``state_dict`` and ``load_state_dict`` goes on behind its last
    batch; any other starts its epoch anew, of which Lightning warns. Another number of threads, another torch or
    another number of ranks than saved is one warning; with another ``accumulate_grad_batches`` or number of ranks the
    loop's counters follow the steps.

    A ``ReduceLROnPlateau`` by epochs misses the step of the epoch at whose end it was saved, as with all of Lightning's
    checkpoints: it follows them.

    Lightning calls callbacks of this kind last. Everything saved must be a tensor or a plain type.

    Args:
        every_n_steps: optimizer steps between checkpoints; ``None`` = about 20 over the run (every 1000 of one
            without end), 0 = the last step only.
        keep_last: how many of the newest stay.
        keep_best: how many with the lowest `monitor` stay.
        keep_every_n_steps: those whose step is a multiple stay for good.
        monitor: name of a logged metric.
        directory: where ``step-000300/`` and its like go; ``None`` = ``checkpoints`` in ``default_root_dir``.

    Attributes:
        retention: which of them stay.
        identity: what the run is (plain JSON), kept in each manifest; ``None`` = nothing.
        tokens_per_step: tokens of one optimizer step over all devices, for the manifest.
        on_event: ``on_event("checkpoint_failed", step=, reason=)``; ``None`` = the log alone.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        keep_last: int = 2,
        keep_best: int = 1,
        keep_every_n_steps: int | None = None,
        monitor: str = "val/loss",
        directory: str | Path | None = None,
    ) -> None:
        check_value("callbacks.Checkpoint.every_n_steps", every_n_steps, field="checkpoint.every_n_steps")
        self.every_n_steps = every_n_steps
        self.retention = Retention(keep_last, keep_best, keep_every_n_steps, monitor)
        self.identity: dict[str, Any] | None = None
        self.tokens_per_step: int | None = None
        self.on_event: Callable[..., None] | None = None
        self._directory = directory
        self._store: Store | None = None
        self._seen = self._saved = 0  # steps
        self._loaded: int | None = None  # the step that it went on from
        self._tokens_apart = 0  # what earlier steps of another size make up
        self._awaited = self._validated = False  # a validation, at this step
        self._between = False  # two optimizer steps
        self._under_way: dict[int, float] = {}  # the metric of the step saved last, which may not be on disk yet
        self._passed: list[Any] = []  # states of loaders that were saved behind their last batch
        self._rng: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Installs the way to and from the disk."""
        if stage != "fit":
            return
        self._root = Path(self._directory or Path(trainer.default_root_dir) / "checkpoints")
        if trainer.is_global_zero:
            told = {} if self.on_event is None else {"on_event": self.on_event}
            self._store = Store(self._root, **asdict(self.retention), **told)
        verified = getattr(trainer.strategy.checkpoint_io, "verified", None)
        trainer.strategy.checkpoint_io = CheckpointIO(self._store, verified)
        self._seen = self._saved = self._tokens_apart = 0
        self._awaited, self._passed, self._rng, self._under_way = False, [], None, {}
        self._loaded = None

    # -- when -------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last moment before the first batch: random numbers go on where they were."""
        self._seen, self._between = trainer.global_step, True
        self._every = _interval(trainer) if self.every_n_steps is None else self.every_n_steps
        if self._passed:
            _begin_next_pass(trainer.fit_loop, self._passed)
        self._restore_rng()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Saves, or waits for the validation of this step."""
        step = trainer.global_step
        self._between = step != self._seen
        if not self._between:
            return
        self._seen = step
        due = self._due(trainer)
        self._awaited = due and _validation_due(trainer)
        if due and not self._awaited:
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Saves the step that waited for it, and any that is better than what is kept."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or not self._between:
            return
        if self._awaited or trainer.strategy.broadcast(self._is_better(trainer)):
            self._awaited, self._validated = False, True
            self._save(trainer)
            self._validated = False

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Saves the last step, if nobody has."""
        if trainer.global_step != self._saved:
            self._save(trainer, wait=True)

    def save_now(self, trainer: pl.Trainer) -> int | None:
        """Saves the step just done and returns when it is on disk; every rank must call it.

        To be called in ``on_train_batch_end`` of a callback that comes last, or within the validation after it. A
        validation that is due at this step and not over is then the first thing that the resumed run does.

        Returns:
            The newest step on disk: not this one where the save failed; None where none was saved nor gone on from.
        """
        if self._newest(trainer) != trainer.global_step:
            self._save(trainer, wait=True)
        return self._newest(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """What is under way gets onto the disk, but where the process is told to end at once."""
        if isinstance(exception, Exception):
            self._close()
        elif self._store:
            self._store.abandon()

    def teardown(self, *_: Any, **__: Any) -> None:
        """Everything gets onto the disk."""
        self._close()

    def _due(self, trainer: pl.Trainer) -> bool:
        step = trainer.global_step
        return step == trainer.max_steps or (self._every > 0 and step % self._every == 0)

    def _save(self, trainer: pl.Trainer, wait: bool = False) -> None:
        step = self._saved = trainer.global_step
        value = self._metric(trainer) if self._validated else None
        self._under_way = {} if value is None else {step: value}
        meta = {
            "identity": self.identity or {},
            "metrics": {} if value is None else {self.retention.monitor: value},
            "tokens": self._tokens(step),
            "threads": torch.get_num_threads(),
            "world_size": trainer.world_size,
        }
        options = {"meta": meta, "metric": value, "wait": wait or step == trainer.max_steps}
        trainer.save_checkpoint(self._root / f"step-{step:06d}", storage_options=options)

    def _metric(self, trainer: pl.Trainer) -> float | None:
        metric = trainer.callback_metrics.get(self.retention.monitor)
        return None if metric is None else float(metric)

    def _is_better(self, trainer: pl.Trainer) -> bool:
        """Whether the step just validated is among the best so far; the first rank knows."""
        value, keep = self._metric(trainer), self.retention.keep_best
        wanted = keep and self._every and self._store
        if not wanted or value is None or not math.isfinite(value):
            return False
        known = {checkpoint.step: checkpoint.metric(self.retention.monitor) for checkpoint in find(self._root)}
        before = {step: score for step, score in (known | self._under_way).items() if step < trainer.global_step}
        best = sorted(score for score in before.values() if score is not None)[:keep]
        return len(best) < keep or value <= best[-1]

    def _newest(self, trainer: pl.Trainer) -> int | None:
        """The newest step on disk, by what the first rank knows; every rank must call it."""
        if self._store:
            self._store.wait()
        saved = self._store.saved if self._store else []
        return trainer.strategy.broadcast(saved[-1] if saved else self._loaded)

    def _tokens(self, step: int) -> int | None:
        return step * self.tokens_per_step + self._tokens_apart if self.tokens_per_step else None

    def _close(self) -> None:
        if self._store:
            self._store.close()

    # -- what -------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the generators of all ranks and what the bits depend on; settles the loop's counters."""
        checkpoint[_KEY] = {
            "rng": of_all_ranks(rng_state(), trainer.world_size),
            "accumulate": trainer.accumulate_grad_batches,
            "conditions": _conditions(trainer),
            "pass_over": trainer.fit_loop.epoch_loop.batch_progress.is_last_batch,
            "tokens": self._tokens(trainer.global_step),
        }
        if trainer.state.fn == TrainerFn.FITTING:
            owed = not self._validated and _validation_due(trainer)
            _settle(checkpoint["loops"]["fit_loop"], owed)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes the generators' states, and fits the loop's counters to this trainer."""
        saved = checkpoint.get(_KEY)
        if saved is None or trainer.state.fn != TrainerFn.FITTING:
            return
        self._saved = self._loaded = checkpoint["global_step"]
        if (tokens := saved.get("tokens")) and self.tokens_per_step:
            self._tokens_apart = tokens - self._saved * self.tokens_per_step
        if trainer.global_rank < len(saved["rng"]):
            self._rng = saved["rng"][trainer.global_rank]
        loops = checkpoint["loops"]["fit_loop"]
        _count_by_steps(loops["epoch_loop.batch_progress"], saved["accumulate"], trainer.accumulate_grad_batches)
        self._passed = loops["state_dict"].get("combined_loader", []) if saved["pass_over"] else []
        now = _conditions(trainer)
        changed = [
            f"{name} {value} -> {now[name]}" for name, value in saved["conditions"].items() if now[name] != value
        ]
        if changed and trainer.is_global_zero:
            log.warning("resumed under other conditions than saved, so bits may differ: %s", ", ".join(changed))

    def on_fit_end(self, *_: Any) -> None:
        """A fit that had nothing left to do never started: what comes after it finds the generators all the same."""
        self._restore_rng()

    def _restore_rng(self) -> None:
        state, self._rng = self._rng, None
        if state is not None:
            set_rng_state(state)


def _interval(trainer: pl.Trainer) -> int:
    steps = trainer.estimated_stepping_batches
    return max(1, int(steps) // ROUGHLY) if steps < float("inf") else ENDLESS


def _conditions(trainer: pl.Trainer) -> dict[str, Any]:
    return {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "device": trainer.strategy.root_device.type,
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
    }


def _validation_due(trainer: pl.Trainer) -> bool:
    """Whether Lightning validates at this step, as it will decide a moment later."""
    loop = trainer.fit_loop
    return loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def _settle(loops: dict[str, Any], owed: bool) -> None:
    """Makes the saved counters say what Lightning will take up from them rightly.

    Validation is over or, if owed, still to be done: of a step saved in ``on_train_batch_end`` Lightning takes it for
    done, and goes back into it only where a batch of it was begun. And a pass whose last batch is done is over: else
    Lightning would count the next one as the same.

    Args:
        loops: the saved state of the fit loop.
        owed: validation is due at this step and not over.
    """
    batches = loops["epoch_loop.batch_progress"]
    within_batch_end = batches["total"]["completed"] < batches["total"]["processed"]
    for counts in loops["epoch_loop.val_loop.batch_progress"].values():
        if isinstance(counts, dict):
            counts.update(dict.fromkeys(counts, 0 if owed else counts["completed"]))
            counts.update(dict.fromkeys(("ready", "started"), 1) if owed else {})
    if owed and within_batch_end:
        for counts in (batches["total"], batches["current"]):
            counts["completed"] = counts["processed"]
    elif within_batch_end and batches["is_last_batch"]:
        batches["total"]["completed"] += 1
        batches["is_last_batch"] = False
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
        for name in ("batch_progress", "scheduler_progress", "automatic_optimization.optim_progress"):
            _start_over(loops[f"epoch_loop.{name}"])
        loops["epoch_loop.val_loop.batch_progress"]["total"] = dict.fromkeys(batches["total"], 0)
        for counts in loops["epoch_progress"].values():
            counts["processed"] += 1
            counts["completed"] += 1


def _start_over(progress: dict[str, Any]) -> None:
    for name, counts in progress.items():
        if name == "current":
            counts.update(dict.fromkeys(counts, 0))
        elif isinstance(counts, dict):
            _start_over(counts)


def _count_by_steps(batches: dict[str, Any], before: int, now: int) -> None:
    """Puts saved counters of micro-batches to what they are under another accumulation.

    Args:
        batches: the saved batch progress of the training loop.
        before: micro-batches per step when it was saved.
        now: micro-batches per step of this trainer.
    """
    for counts in (batches["total"], batches["current"]):
        open_ones = counts["ready"] - counts["completed"]
        done = counts["ready"] * now // before
        counts.update(ready=done, started=done, processed=done, completed=done - open_ones)


def _begin_next_pass(loop: Any, states: list[Any]) -> None:
    """Lets loaders that were saved at the end of a pass finish it: Lightning would take the nothing for an epoch."""
    loader = loop._combined_loader
    loader._load_state_dicts(states)
    if next(iter(loader), None) is not None:  # it begins its next pass by itself
        loader._load_state_dicts(states)
    iter(loop._data_fetcher)
