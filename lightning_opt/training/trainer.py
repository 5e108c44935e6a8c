"""One fit: Lightning's Trainer as this project sets it up."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, Strategy

from lightning_opt.callbacks import CheckpointIO, LossGuard
from lightning_opt.models import compiled
from lightning_opt.optim.releasing import release
from lightning_opt.optim.storage import local
from lightning_opt.plan import RunPlan
from lightning_opt.run_folder import Diverged, RunFolder
from lightning_opt.training.datamodule import TokenDataModule
from lightning_opt.training.group import Group
from lightning_opt.training.loggers import GuardedLogger
from lightning_opt.training.module import PretrainModule
from lightning_opt.training.precision import BFloat16Parameters
from lightning_opt.training.run_logger import RunLogger
from lightning_opt.training.stopping import Stopped, Stopping

log = logging.getLogger("lightning_opt.training")


@dataclass(frozen=True)
class FitResult:
    """How a fit ended.

    Attributes:
        steps: optimizer steps done.
        stopped_by: name of the signal that asked for it, else None.
    """

    steps: int
    stopped_by: str | None = None


class _Step(pl.Callback):
    """Keeps the step in the run's status, and has the first and the last step logged whatever the interval.

    In checkpoints: the step validated last, and the row of ``metrics.csv`` that is not on disk yet.
    """

    def __init__(self, status: Any, interval: int, logger: RunLogger | None, other_optimizer: bool, group: Group):
        self._status, self._interval, self._logger, self._other = status, interval, logger, other_optimizer
        self._group = group
        self.validated = 0

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Has what the module logged at this step written first: Lightning hands it on after the callbacks."""
        logged = trainer._logger_connector
        if self._logger and trainer.training and logged.should_update_logs:
            self._logger.log_metrics(logged.metrics["log"])
        row = self._logger.state_dict() if self._logger else None
        checkpoint["run"] = {"validated": self.validated, "metrics": row}

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """The run is one epoch, however long it is now and its batches are; rates follow the schedule of now."""
        self.validated = checkpoint["run"]["validated"]
        if self._logger and checkpoint["run"]["metrics"]:
            self._logger.load_state_dict(checkpoint["run"]["metrics"], checkpoint["global_step"])
        loops = checkpoint["loops"]["fit_loop"]
        loops["epoch_loop.batch_progress"]["is_last_batch"] = False
        for place in loops["state_dict"].get("combined_loader", []):
            place["batches"] = checkpoint["global_step"] * trainer.accumulate_grad_batches
        for schedule in checkpoint["lr_schedulers"]:
            del schedule["base_lrs"]
        said = [self._take_optimizer(module, checkpoint), _trained_weights(trainer, checkpoint)]
        for line in filter(None, said if trainer.is_global_zero else []):
            log.info("%-10s %s", "", line)

    def _take_optimizer(self, module: PretrainModule, checkpoint: dict[str, Any]) -> str | None:
        """Hyperparameters are those of now; what is to be said of the state."""
        kept = [module.optimizer.with_own_values(state) for state in checkpoint["optimizer_states"]]
        if None not in kept:
            checkpoint["optimizer_states"] = kept
            return "the optimizer's state is kept, its values are those of now" if self._other else None
        if self._other:
            checkpoint["optimizer_states"] = []
            return "weights and place in the data are taken over, the optimizer's state is not: it fits no other"
        return None  # and loading refuses it

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for schedule in (config.scheduler for config in trainer.lr_scheduler_configs):
            for group, peak, ratio in zip(
                schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
            ):
                group["lr"] = peak * ratio(schedule.last_epoch)

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.validated = trainer.global_step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        edge = trainer.global_step in (0, trainer.max_steps - 1)
        trainer.log_every_n_steps = 1 if edge else self._interval
        if trainer.global_step == trainer.max_steps - 1:  # validated before it is saved, whatever the interval
            trainer.val_check_batch = trainer.max_steps * trainer.accumulate_grad_batches

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._status.step = trainer.global_step

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Behind all that still changes weights, and before they are exported or scored."""
        if self._group.any(not _finite(module)):
            raise Diverged(f"the weights are not finite at the end, after step {trainer.global_step}")


def _finite(module: torch.nn.Module) -> bool:
    """Whether all weights are, of which a rank may hold parts only; the host waits once."""
    parts = (local(p.detach()) for p in module.parameters() if p.is_floating_point())
    if not (held := [part for part in parts if part.numel()]):
        return True
    norms = torch._foreach_norm(held, math.inf)
    return bool(torch.stack([norm.float() for norm in norms]).isfinite().all())


def _trained_weights(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> str | None:
    """Takes the trained weights of a run that kept averaged ones, if nobody averages now; what is to be said of it."""
    if "current_model_state" not in checkpoint or any(isinstance(c, WeightAveraging) for c in trainer.callbacks):
        return None
    trainer.strategy.load_model_state_dict({"state_dict": checkpoint["current_model_state"]})
    return "saved with averaged weights: goes on from the trained ones, without an average"


def prepare(seed: int, num_threads: int | None, processes: int = 1) -> None:
    """Seeds Python, NumPy and torch, and sets torch's threads: results depend on both.

    Args:
        seed: any non-negative integer.
        num_threads: torch's threads, or None for an equal share of what torch would take.
        processes: of this run on this machine.
    """
    if num_threads or processes > 1:
        torch.set_num_threads(num_threads or max(1, torch.get_num_threads() // processes))
    pl.seed_everything(seed, workers=True, verbose=False)


def fit(
    module: PretrainModule,
    data: TokenDataModule,
    plan: RunPlan,
    *,
    config: Mapping[str, Any],
    precision: str,
    folder: RunFolder,
    columns: Sequence[str],
    callbacks: Sequence[pl.Callback],
    loggers: Sequence[GuardedLogger],
    status: Any,
    group: Group | None = None,
    asked: Callable[[], str | None] = lambda: None,
    resume: Path | None = None,
    verified: bool = False,
    other_optimizer: bool = False,
) -> FitResult:
    """Trains to the plan's last step and validates there.

    Args:
        module: what is trained.
        data: its batches.
        plan: steps, accumulation, validation interval.
        config: the ``trainer`` group.
        precision: resolved precision.
        folder: where ``metrics.csv`` and ``profile/`` are written.
        columns: metric names besides the common ones.
        callbacks: in the order they are called.
        loggers: further loggers of the user's.
        status: its ``step`` is set after every step.
        group: the processes that train together, each of which calls this; None: this one alone. Only the first
            writes.
        asked: name of a signal that wants the fit to end after the step, or None.
        resume: a checkpoint's folder, from which the fit goes on as if it had never stopped; None: from the start.
        verified: its files were compared with its manifest a moment ago.
        other_optimizer: the checkpoint may be of another optimizer, whose state is left out where it does not fit.

    Returns:
        Steps done and what stopped the run early, if anything.

    Raises:
        Diverged: the callback LossGuard found a loss or gradient norm that is not finite, or weights at the end are.
        Damaged: the checkpoint is not what was written.
    """
    validates = config["val_sequences"] > 0
    module.model.train()
    group = group or Group()
    run_logger: RunLogger | None = None
    if group.first:
        run_logger = RunLogger(
            folder.metrics,
            columns,
            tokens_per_step=plan.tokens_per_step,
            current_step=lambda: trainer.global_step,
            start_step=None if resume else 0,
        )
    writers: list[Logger] = [run_logger, *loggers] if run_logger else []
    for logger in loggers:
        logger.current_step = lambda: trainer.global_step
    with _quiet(), compiled(module.model, config.get("compile", "off")):
        stopping = Stopping(asked, group)
        step = _Step(status, config["log_every_n_steps"], run_logger, other_optimizer, group)
        watchers = [step, *callbacks, stopping]
        trainer = _trainer(plan, config, precision, folder, writers, watchers, resume if verified else None)
        stopping.keep_lightning_out(trainer)
        not_taken = False
        guarded = any(isinstance(callback, LossGuard) for callback in callbacks)
        mode = config.get("update_in_backward", "off")
        released = release(module.optimizer, mode, accumulate=plan.accumulate, guarded=guarded)
        try:
            trainer.fit(module, data, ckpt_path=resume)
            if validates and step.validated != trainer.global_step:
                trainer.validate(module, data, verbose=False)
            stopping.check()
        except Stopped as stop:
            return FitResult(trainer.global_step, stop.name)
        except Diverged as end:
            not_taken = end.step == trainer.global_step  # a step that the device masked has counted as one
            raise
        finally:
            if released:
                released.remove()
            status.step = trainer.global_step - not_taken
            for logger in writers:
                logger.close()
    return FitResult(trainer.global_step)


def _trainer(
    plan: RunPlan,
    config: Mapping[str, Any],
    precision: str,
    folder: RunFolder,
    loggers: list[Logger],
    callbacks: list[pl.Callback],
    verified: Path | None,
) -> pl.Trainer:
    """Lightning's Trainer: one epoch of exactly the run's batches, validation by steps, nothing written by itself."""
    trainer = pl.Trainer(
        max_steps=plan.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=plan.accumulate,
        val_check_interval=plan.val_every_n_steps * plan.accumulate,
        check_val_every_n_epoch=None,
        limit_val_batches=None if config["val_sequences"] else 0,
        num_sanity_val_steps=0,
        accelerator=config["accelerator"],
        devices=config["devices"],
        num_nodes=config["num_nodes"],
        strategy=_strategy(plan, config["strategy"]),
        log_every_n_steps=config["log_every_n_steps"],
        deterministic=config["deterministic"],
        profiler=_profiler(config.get("profiler"), folder.profile) if loggers else None,
        logger=loggers,
        callbacks=callbacks,
        default_root_dir=folder.path,
        enable_checkpointing=any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks),
        enable_progress_bar=any(isinstance(callback, pl.callbacks.ProgressBar) for callback in callbacks),
        enable_model_summary=False,
        use_distributed_sampler=False,
        plugins=_plugins(plan, precision, verified),
        precision=None if precision == "bf16-true" else precision,
    )
    torch.utils.deterministic.fill_uninitialized_memory = False  # it costs time and changes no result of ours
    return trainer


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Lightning's notices and advertisements off the terminal; its warnings still reach run.log.

    But for one: what is logged without ``sync_dist`` is a mean over the ranks already.
    """
    noisy = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*sync_dist=True")
            yield
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)


def _strategy(plan: RunPlan, name: str) -> str | Strategy:
    """How the devices of a run work together; one device alone needs no strategy."""
    if plan.devices == 1:
        return "auto"
    if name == "fsdp":
        from lightning_opt.training.sharding import WholeStateStrategy

        return WholeStateStrategy(data_parallel_size=plan.devices, tensor_parallel_size=1)
    return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)  # ours change alike on all ranks


def _plugins(plan: RunPlan, precision: str, verified: Path | None) -> list[Any]:
    environment = [TorchElasticEnvironment()] if plan.devices > 1 else []  # however the processes were started
    return [CheckpointIO(verified=verified), *environment] + (
        [BFloat16Parameters()] if precision == "bf16-true" else []
    )


def _profiler(name: str | None, folder: Path) -> Any:
    from lightning.pytorch.profilers import PyTorchProfiler, SimpleProfiler

    if name is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    if name == "simple":
        return SimpleProfiler(dirpath=folder, filename="simple")
    return PyTorchProfiler(dirpath=folder, filename="pytorch", row_limit=30)
