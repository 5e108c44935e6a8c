"""Are all experts of a mixture at work?"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_opt.anatomy import ExpertLayer, find_expert_layers
from lightning_opt.callbacks.expert_metric import OVER_LAYERS, ExpertLoad, over_layers
from lightning_opt.callbacks.expert_steps import ExpertCallback
from lightning_opt.callbacks.telling import is_logged, tell
from lightning_opt.kernels import gathered
from lightning_opt.plan import check_value

log = logging.getLogger("lightning_opt.callbacks")

PER_LAYER = ("cv", "max_violation", "coldest", "dead", "entropy")
GRADIENTS = ("min", "median", "max")


class _Look(NamedTuple):
    """One step: counts int64 and gradient norms float32, both (layers, E)."""

    step: int
    counts: Tensor
    norms: Tensor


class ExpertLoadMonitor(ExpertCallback):
    """Load of every expert: what is logged, kept for a picture, and worth an alarm.

    Costs nothing for a model without experts. Logged every ``trainer.log_every_n_steps`` optimizer steps, of the tokens
    of that one step over all micro-batches and processes, padding left out:

    - ``expert_load/<measure>`` for all layers together: see `load_measures` and `over_layers`; the ``noise_floor`` says
      what ``cv`` chance alone would give
    - ``expert_load/idle_steps``: for how many steps in a row the most idle expert has had no token
    - ``expert_grad_norm/{min,median,max}`` over all experts, before clipping, where gradients still exist
    - with ``keys="detailed"`` also ``expert_load/<measure>/<layer>`` of each layer: five for each

    An alarm is raised, as an event and a line of the log, when a layer's ``cv`` comes over ``cv_limit`` (unless a step
    has so few tokens that chance alone gives half of it) or an expert has had no token for ``dead_steps`` steps; again
    only after the layer's ``cv`` was under three quarters of the limit, or no expert was idle for so long.

    Counts and gradient norms of up to ``history`` steps, evenly spread, are written to ``path`` with each checkpoint
    and at the end: arrays ``steps`` (n,), ``counts`` and ``grad_norm`` (n, layers, E), ``experts``, ``top_k`` (0 =
    unknown) and ``layers`` (layers,), names. They are part of the checkpoint.

    Args:
        keys: ``brief`` or ``detailed``.
        cv_limit: of one layer.
        dead_steps: optimizer steps.
        history: steps that are kept.
        path: the file; None = ``expert_load.npz`` in the trainer's ``default_root_dir``.

    Attributes:
        last: what was logged last, by name.
        on_event: called as ``on_event("expert_alarm", step=, reason=, layers=, value=)``, where it is set.
    """

    def __init__(
        self,
        keys: str = "brief",
        cv_limit: float = 0.8,
        dead_steps: int = 50,
        history: int = 256,
        path: str | Path | None = None,
    ) -> None:
        for name, value in (("keys", keys), ("cv_limit", cv_limit), ("dead_steps", dead_steps), ("history", history)):
            check_value(f"callbacks.ExpertLoadMonitor.{name}", value, field=f"expert_load.{name}")
        self.keys, self.cv_limit, self.dead_steps, self.history, self.path = keys, cv_limit, dead_steps, history, path
        self.last: dict[str, float] = {}
        self.on_event: Callable[..., None] | None = None
        self._looks: list[_Look] = []
        self._newest: _Look | None = None
        self._stride, self._seen, self._step = 1, 0, 0
        self._idle = torch.zeros(0, 0, dtype=torch.int64)
        self._norms: Tensor | None = None
        self._alarmed: set[tuple[str, int]] = set()

    def columns(self, model: nn.Module) -> list[str]:
        """The names of all that is logged for a model; none for one without experts."""
        if not (layers := find_expert_layers(model)):
            return []
        names = [f"expert_load/{name}" for name in (*OVER_LAYERS, "cv_worst", "idle_steps")]
        names += [f"expert_grad_norm/{name}" for name in GRADIENTS]
        each = PER_LAYER if self.keys == "detailed" else ()
        return names + [f"expert_load/{name}/{layer}" for name in each for layer in range(len(layers))]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the experts, and goes on with what a checkpoint held of them."""
        super().on_fit_start(trainer, pl_module)
        if self.traffic is None:
            return
        layers = self.traffic.layers
        self._load = ExpertLoad([x.count for x in layers], [x.top_k for x in layers])
        if self._idle.shape != self._load.counts.shape:  # of another model, or of none yet
            self._idle = torch.zeros_like(self._load.counts)
            self._looks, self._newest, self._stride, self._seen = [], None, 1, 0
            self._alarmed = set()
        self._idle = self._idle.to(pl_module.device)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Only now a resumed run knows its step."""
        self._step = trainer.global_step

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """The gradients are complete and not clipped yet."""
        if self.traffic is not None and is_logged(trainer, trainer.global_step + 1):
            self._norms = gradient_norms(self.traffic.layers)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At the end of a step notes who was idle; looks when it is time."""
        if self.traffic is None or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        counts = _rectangle(self.traffic.counts)
        went = counts.sum(1, keepdim=True) > 0  # a layer that was not run, or is frozen in evaluation, is not idle
        self._idle = (self._idle.to(counts.device) + went).masked_fill_(counts > 0, 0)
        if is_logged(trainer, self._step):
            self._look(trainer)

    def _look(self, trainer: pl.Trainer) -> None:
        total = _rectangle(self.traffic.total()).cpu()
        norms = self._norms.cpu() if self._norms is not None else torch.full(total.shape, torch.nan)
        idle = self._idle_anywhere().cpu() * self._exist()
        self._load.reset()
        self._load.update(total)
        measures = self._load.measures()
        if not total.any():
            log.warning("expert load: no token was counted; a model that trains must be in training mode")
            return
        self._keep(_Look(self._step, total, norms))
        values = {f"expert_load/{name}": float(value) for name, value in over_layers(measures).items()}
        values["expert_load/idle_steps"] = float(idle.max())
        known = norms[self._exist() & ~norms.isnan()]
        if len(known):
            for name in GRADIENTS:
                values[f"expert_grad_norm/{name}"] = float(getattr(known, name)())
        if self.keys == "detailed":
            for name in PER_LAYER:
                rows = enumerate(measures[name].tolist())
                values |= {f"expert_load/{name}/{layer}": value for layer, value in rows if value == value}
        self.last = values
        tell(trainer, values)
        self._judge(trainer, measures, idle)

    def _exist(self) -> Tensor:
        """(layers, E): which places are experts."""
        sizes = torch.tensor(self._load.experts)
        return torch.arange(int(sizes.max()))[None] < sizes[:, None]

    def _idle_anywhere(self) -> Tensor:
        """An expert is idle for as many steps as it is on every process."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._idle, op=dist.ReduceOp.MIN)
        return self._idle

    # -- alarms ------------------------------------------------------------------------------------------------------

    def _judge(self, trainer: pl.Trainer, measures: dict[str, Tensor], idle: Tensor) -> None:
        cv, longest = measures["cv"], idle.amax(1)
        uneven = (cv > self.cv_limit) & (measures["noise_floor"] < self.cv_limit / 2)
        found = {
            "uneven load": (uneven, cv < 0.75 * self.cv_limit, cv),
            "dead experts": (longest >= self.dead_steps, longest < self.dead_steps, longest),
        }
        for reason, (bad, well, value) in found.items():
            self._alarmed -= {(reason, layer) for layer in range(len(well)) if well[layer]}
            new = [layer for layer in range(len(bad)) if bad[layer] and (reason, layer) not in self._alarmed]
            self._alarmed |= {(reason, layer) for layer in new}
            if new and trainer.is_global_zero:
                self._alarm(reason, new, float(value[new].max()))

    def _alarm(self, reason: str, layers: list[int], value: float) -> None:
        names = ", ".join(self.traffic.layers[layer].name for layer in layers)
        if reason == "uneven load":
            what = f"CV {value:.2f}, over {self.cv_limit:g}"
        else:
            what = f"without a token for {value:.0f} steps, {self.dead_steps} are the limit"
        log.warning("expert load: step %d: %s: %s in %s", self._step, reason, what, names)
        if self.on_event is not None:
            self.on_event("expert_alarm", step=self._step, reason=reason, layers=layers, value=value)

    # -- what is kept ------------------------------------------------------------------------------------------------

    def _keep(self, look: _Look) -> None:
        """Every look, then every second, fourth ... of them, so that they stay few and evenly spread."""
        self._newest = look
        if self._seen % self._stride == 0:
            self._looks.append(look)
            if len(self._looks) > self.history:
                self._looks = self._looks[::2]
                self._stride *= 2
        self._seen += 1

    def _all_looks(self) -> list[_Look]:
        late = self._newest is not None and self._newest is not self._looks[-1]
        return [*self._looks, self._newest] if late else list(self._looks)

    def _write(self, trainer: pl.Trainer) -> None:
        looks = self._all_looks()
        if self.traffic is None or not looks or not trainer.is_global_zero:
            return
        path = Path(self.path or Path(trainer.default_root_dir) / "expert_load.npz")
        arrays = {
            "steps": np.array([look.step for look in looks]),
            "counts": torch.stack([look.counts for look in looks]).numpy(),
            "grad_norm": torch.stack([look.norms for look in looks]).numpy(),
            "experts": np.array(self._load.experts),
            "top_k": np.array([top_k or 0 for top_k in self._load.top_k]),
            "layers": np.array([layer.name for layer in self.traffic.layers]),
        }
        beside = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                np.savez_compressed(file, **arrays)
            os.replace(beside, path)
        except OSError as error:
            log.warning("%s cannot be written: %s", path.name, error.strerror)
            with suppress(OSError):
                beside.unlink(missing_ok=True)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the file and lets go of the model."""
        self._write(trainer)
        super().on_fit_end(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Writes the file and lets go of the model."""
        self._write(trainer)
        super().on_exception(trainer, pl_module, exception)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Writes the file too; over several processes a checkpoint holds who was idle on all."""
        self._write(trainer)
        if self.traffic is not None and trainer.world_size > 1 and "callbacks" in checkpoint:
            self._idle_anywhere()
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types: what was kept, who is idle, what was raised; empty for a model without experts."""
        if not self._idle.numel():
            return {}
        looks = self._all_looks()
        return {
            "steps": [look.step for look in looks],
            "counts": [look.counts for look in looks],
            "norms": [look.norms for look in looks],
            "idle": self._idle.cpu().clone(),
            "alarmed": sorted([reason, layer] for reason, layer in self._alarmed),
            "stride": self._stride,
            "seen": self._seen,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from `state_dict`."""
        if state_dict:
            rows = zip(state_dict["steps"], state_dict["counts"], state_dict["norms"], strict=True)
            self._looks = [_Look(*row) for row in rows]
            self._stride, self._seen, self._idle = state_dict["stride"], state_dict["seen"], state_dict["idle"]
            self._alarmed = {(reason, layer) for reason, layer in state_dict.get("alarmed", ())}
            self._newest = self._looks[-1] if self._looks else None
            if (self._seen - 1) % self._stride and len(self._looks) > 1:  # it was there as the newest only
                self._looks.pop()


def gradient_norms(layers: Sequence[ExpertLayer]) -> Tensor:
    """2-norm of each expert's gradient over all its weights: float32 (layers, E), not a number where there is none."""
    return _rectangle([_gradient_norm(layer) for layer in layers])


def _gradient_norm(layer: ExpertLayer) -> Tensor:
    gradients = [p.grad for p in layer.experts]
    device = layer.experts[0].device
    if all(gradient is None for gradient in gradients):
        return torch.full((layer.count,), torch.nan, device=device)
    if layer.experts[0].ndim == 3:
        norms = [torch.linalg.vector_norm(g, dim=(1, 2), dtype=torch.float32) for g in gradients if g is not None]
        norms = [gathered(norm) for norm in norms]
        return torch.stack(norms).square().sum(0).sqrt()
    nothing = torch.zeros((), device=device)
    norms = [nothing if g is None else torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
    norms = [gathered(norm) for norm in norms]
    return torch.stack(norms).view(layer.count, -1).square().sum(1).sqrt()


def _rectangle(rows: Tensor | Sequence[Tensor]) -> Tensor:
    """Rows of different lengths as one tensor, filled with zeros."""
    return rows if isinstance(rows, Tensor) else nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
