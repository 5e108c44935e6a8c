"""What does the optimizer need to know that it cannot see?"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor

from lightning_opt.anatomy import ExpertTraffic
from lightning_opt.callbacks.batches import StepLoss
from lightning_opt.callbacks.curvature import Curvature
from lightning_opt.callbacks.expert_steps import attention_mask
from lightning_opt.callbacks.stability import FEWEST, total_norm
from lightning_opt.callbacks.telling import is_logged, tell
from lightning_opt.kernels import Later
from lightning_opt.plan import CURVATURE, EXPERT_TOKENS, ConfigError, check_value

log = logging.getLogger("lightning_opt.callbacks")

MEASURED = ("loss_volatility", "grad_norm_change")
UNCLIPPED = "sophia/unclipped"
FED = frozenset({"run_length", CURVATURE, EXPERT_TOKENS, *MEASURED})


class OptimizerSignals(pl.Callback):
    """Feeds optimizers of ours what they name in `needs`, and has them in the right mode.

    - ``run_length``: optimizer steps of the run, for phases that are fractions of it
    - ``loss_volatility``: standard deviation over mean of the last ``window`` steps' losses (means over micro-batches
      and processes); ``grad_norm_change``: mean of |g_t - g_(t-1)| / g_(t-1) over them; not a number before there are
      10 (``window`` if that is less). Neither makes the host wait
    - ``hessian_diagonal``: for Sophia, every ``interval`` steps by its ``estimator`` (`Curvature`), which may differ
      between groups; the LightningModule must have ``curvature_loss(batch, generator)``. The share of elements that the
      last step with an estimate did not clip is logged once, as ``sophia/unclipped``, at the next step that is logged
    - ``expert_tokens``: how many tokens each expert was given in the step, over its micro-batches and all processes,
      padding (``attention_mask``) left out; for experts that go each their own way (`optim.experts`)
    - averaged weights (schedule-free) are in place while validating and once the fit is over, so they are what is
      exported and scored; checkpoints hold the trained ones, also one that is saved within a validation
    - a change of phase is told to ``on_event`` on the first process

    Costs nothing for an optimizer that needs nothing. List it before what exports the model. The window is part of the
    checkpoint.

    Args:
        window: optimizer steps that ``loss_volatility`` and ``grad_norm_change`` look back on.

    Attributes:
        max_steps: optimizer steps of the whole run; ``None`` = as the trainer estimates.
        optimizer: whose metrics `columns` announces; ``None`` = none. The job hands its own in; the fit
            goes by the trainer's.
        on_event: called as ``on_event("phase_switched", step=, before=, after=, rule=, reason=)``, where it is set.

    Raises:
        ConfigError: when training starts, for a need that nothing here feeds, curvature under tensor parallelism, or
            two averages of the weights.
    """

    def __init__(self, window: int = 50) -> None:
        check_value("callbacks.OptimizerSignals.window", window, field="signals.window")
        self.window = window
        self.max_steps: int | None = None
        self.on_event: Callable[..., None] | None = None
        self.optimizer: Any = None
        self._history = torch.full((2, window), torch.nan)  # a ring: row 0 losses, row 1 changes of the gradient norm
        self._count = 0
        self._norm: Tensor | None = None
        self._optimizers: list[Any] = []
        self._curvatures: dict[Any, dict[str, Curvature]] = {}  # of the step under way, by optimizer and estimator
        self._estimated: list[Any] = []  # optimizers that were handed an estimate in the step under way
        self._share: Later | None = None  # of elements not clipped, until it is told
        self._undo: list[Callable[[], None]] = []
        self._traffic: ExpertTraffic | None = None

    # -- the fit ----------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses what cannot be fed, and says how long the run is."""
        self._optimizers = [optimizer for optimizer in trainer.optimizers if hasattr(optimizer, "observe")]
        for optimizer in self._optimizers:
            self._refuse(trainer, pl_module, optimizer)
            if "run_length" in optimizer.needs:
                length = self.max_steps or trainer.estimated_stepping_batches
                optimizer.observe(run_length=int(length))

    def _refuse(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        rules = ", ".join(sorted({group["rule"] for group in optimizer.param_groups}))
        if unmet := sorted(optimizer.needs - FED):
            raise ConfigError("optimizer", rules, f"needs {', '.join(unmet)}, which nothing here feeds")
        if CURVATURE in optimizer.needs:
            if not callable(getattr(module, "curvature_loss", None)):
                what = f"needs {CURVATURE}: the LightningModule must have curvature_loss(batch, generator)"
                raise ConfigError("optimizer", rules, what)
            if getattr(trainer.precision_plugin, "scaler", None) is not None:
                raise ConfigError("trainer.precision", "16-mixed", "scales losses: the curvature must be of the loss")
            if _shares_tokens(trainer, module):
                what = f"needs {CURVATURE}, which is measured data-parallel only: tensor_parallel_size must be 1"
                raise ConfigError("optimizer", rules, what)
        if optimizer.averages and any(_averages(callback) for callback in trainer.callbacks):
            raise ConfigError("callbacks", "ema", "must be left out: the optimizer averages the weights itself")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hooks into the optimizers; also after a resume."""
        self._unhook()
        self._trainer, self._loss = trainer, StepLoss()
        self._history = self._history.to(pl_module.device)
        for optimizer in self._optimizers:
            optimizer.train()
            if hasattr(optimizer, "register_switch_hook"):
                self._start_phases(trainer, optimizer)
            if EXPERT_TOKENS in optimizer.needs and self._traffic is None:
                self._traffic = ExpertTraffic.of(pl_module)
                self._undo.append(self._stop_counting)
            if CURVATURE in optimizer.needs:
                optimizer.observe(**{CURVATURE: {}})  # between two estimates there is nothing new
            if not optimizer.needs.isdisjoint((*MEASURED, CURVATURE, EXPERT_TOKENS)):
                self._undo.append(optimizer.register_before_update_hook(self._before_update))

    def _start_phases(self, trainer: pl.Trainer, optimizer: Any) -> None:
        if trainer.global_step and not optimizer.taken:  # the run was another optimizer's until now
            optimizer.begin_at(trainer.global_step)
        if trainer.is_global_zero:
            log.info("phases     %s", optimizer.describe())
            length = self.max_steps or trainer.estimated_stepping_batches
            if late := optimizer.beyond(length):
                log.warning("phases     %s will not begin: this run ends after step %g", ", ".join(late), length)
        self._undo.append(optimizer.register_switch_hook(self._tell))

    def _tell(self, switch: Any) -> None:
        if self.on_event is not None and self._trainer.is_global_zero:
            told = {key: getattr(switch, key) for key in ("step", "before", "after", "rule", "reason")}
            self.on_event("phase_switched", **told)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Where an estimate is due, measures this micro-batch's share of it."""
        if self._traffic is not None:
            self._traffic.begin(trainer.global_step, attention_mask(batch))
        for optimizer in self._optimizers:
            found = self._curvatures.setdefault(optimizer, {})
            for estimator, params in _due(optimizer, trainer.global_step).items():
                if estimator not in found:
                    place = trainer.world_size, trainer.global_rank
                    found[estimator] = Curvature(params, estimator, trainer.global_step, *place)
                with ExpertTraffic.paused(pl_module):
                    found[estimator].add(pl_module, batch, trainer.precision_plugin.train_step_context())

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Takes a micro-batch's loss."""
        if self._undo:
            self._loss.add(loss, trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Gradients are complete and not clipped yet."""
        self._norm_before = getattr(optimizer, "last_grad_norm", None)

    def _before_update(self, optimizer: Any) -> None:
        """Within the step, behind its clipping: all of the step's losses and gradients are known."""
        if not optimizer.needs.isdisjoint(MEASURED):
            self._measure(optimizer)
            values = dict(zip(MEASURED, self._values(), strict=True))
            optimizer.observe(**{name: value for name, value in values.items() if name in optimizer.needs})
        if curvatures := self._curvatures.pop(optimizer, None):
            estimates = [curvature.estimate() for curvature in curvatures.values()]
            optimizer.observe(**{CURVATURE: {p: value for found in estimates for p, value in found.items()}})
            self._estimated.append(optimizer)
        if self._traffic is not None and EXPERT_TOKENS in optimizer.needs:
            optimizer.observe(**{EXPERT_TOKENS: self._traffic.by_parameter()})

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Where a step is logged, says how many elements the last step with an estimate did not clip."""
        estimated, self._estimated = self._estimated, []
        if estimated and trainer.log_every_n_steps:
            from lightning_opt.optim.sophia import unclipped  # only whoever has such an optimizer needs its room

            shares = [share for optimizer in estimated if (share := unclipped(optimizer)) is not None]
            self._share = Later(torch.stack(shares).mean()) if shares else None
        if self._share is not None and is_logged(trainer, trainer.global_step):
            tell(trainer, {UNCLIPPED: float(self._share.read())})
            self._share = None

    def columns(self, model: Any) -> list[str]:
        """The name of what is logged of a rule that divides by curvature."""
        return [UNCLIPPED] if self.optimizer is not None and CURVATURE in self.optimizer.needs else []

    def _stop_counting(self) -> None:
        if self._traffic is not None:
            self._traffic.close()
            self._traffic = None

    # -- loss and gradient norm -------------------------------------------------------------------------------------

    def _measure(self, optimizer: Any) -> None:
        told = optimizer.last_grad_norm
        norm = told if told is not None and told is not self._norm_before else total_norm(optimizer)
        absent = self._history.new_full((), torch.nan)
        loss, norm = (absent if value is None else value.detach().to(absent) for value in (self._loss.take(), norm))
        if self._trainer.world_size > 1:
            loss = loss.clone()
            dist.all_reduce(loss)
            loss /= self._trainer.world_size
        change = absent if self._norm is None else (norm - self._norm).abs() / self._norm
        self._norm = norm.clone()
        self._history[:, self._count % self.window] = torch.stack([loss, change])
        self._count += 1

    def _values(self) -> tuple[Tensor, Tensor]:
        """Loss volatility and change of the gradient norm, as float64 scalars on the device."""
        if self._count < min(FEWEST, self.window):
            absent = self._history.new_full((), torch.nan)
            return absent, absent
        losses, changes = self._history[:, : self._count].double()
        return losses.std() / losses.mean(), changes.nanmean()

    # -- averaged weights -------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Averaged weights are what is validated."""
        for optimizer in self._optimizers:
            optimizer.eval()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """And the trained ones what goes on; once the fit is over the averaged ones stay."""
        if trainer.state.fn == "fit":
            self._train()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Within a validation the module holds the averaged weights: training goes on from the others."""
        swapped = [optimizer for optimizer in self._optimizers if optimizer.swapped]
        if not swapped:
            return
        self._train()
        state = trainer.strategy.lightning_module_state_dict()
        checkpoint["state_dict"] = {name: value.detach().clone() for name, value in state.items()}
        for optimizer in swapped:
            optimizer.eval()

    def _train(self) -> None:
        for optimizer in self._optimizers:
            optimizer.train()

    # -- the end ----------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets go of the optimizers."""
        self._unhook()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Averaged weights are what is exported and scored."""
        self._share = None
        for optimizer in self._optimizers:
            optimizer.eval()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lets go of the optimizers; their weights are the trained ones."""
        self._unhook()
        self._train()

    def _unhook(self) -> None:
        self._curvatures = {}
        while self._undo:
            self._undo.pop()()

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types: the window, and a share that waits to be told."""
        state = {"history": self._history.cpu().clone(), "count": self._count}
        if self._norm is not None:
            state["grad_norm"] = self._norm.cpu()
        if self._share is not None:
            state["share"] = self._share.read().clone()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from `state_dict`; a window of another length starts empty."""
        if state_dict["history"].shape == self._history.shape:
            self._history, self._count = state_dict["history"].clone(), state_dict["count"]
            self._norm = state_dict.get("grad_norm")
        self._share = Later(state_dict["share"]) if "share" in state_dict else None


def _due(optimizer: Any, step: int) -> dict[str, list[Tensor]]:
    """By estimator, the weights whose curvature is wanted in the step after so many."""
    found: dict[str, list[Tensor]] = {}
    for group in optimizer.observing(CURVATURE):
        if step % group["interval"] == 0:
            found.setdefault(group["estimator"], []).extend(group["params"])
    return found


def _shares_tokens(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Whether some processes see the same tokens, as those of a tensor-parallel group do."""
    mesh = getattr(module, "device_mesh", None)
    named = mesh is not None and "data_parallel" in (mesh.mesh_dim_names or ())
    return named and mesh["data_parallel"].size() < trainer.world_size


def _averages(callback: Any) -> bool:
    return isinstance(callback, WeightAveraging | StochasticWeightAveraging)
