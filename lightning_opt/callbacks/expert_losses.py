"""Losses that keep routers even and calm, added to any project's training loss."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from lightning_opt.anatomy import ExpertLayer, find_expert_layers
from lightning_opt.anatomy.routers import choice_of, is_recomputation, listen, scores_in, sum_over_data, tensors_in
from lightning_opt.callbacks.expert_steps import attention_mask
from lightning_opt.callbacks.telling import is_logged, tell
from lightning_opt.plan import ConfigError, check_value

log = logging.getLogger("lightning_opt.callbacks")


def balance_loss(scores: Tensor, chosen: Tensor, tokens: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
    """Sum over experts of (share of the choices times E) times mean score; 1 where both are even.

    This is alpha = 1 of DeepSeek-V3's sequence-wise loss (arXiv 2412.19437, equations 17 to 20) and of the Switch
    loss (arXiv 2101.03961, equation 4, there for one expert per token). transformers' ``load_balancing_loss_func``
    gives top_k times as much, over all layers at once.

    Args:
        scores: (..., N, E) of a layer, each token's sum 1; the gradient flows through them.
        chosen: int64 (..., N, k).
        tokens: bool (..., N), False for padding; None = all.
        counts: (..., E) choices that count instead of `chosen`: those of the whole batch.

    Returns:
        (...), 0 where there is no token.
    """
    experts = scores.shape[-1]
    weights = scores.new_ones(scores.shape[:-1]) if tokens is None else tokens.to(scores.dtype)
    if counts is None:
        counts = choices(chosen, experts, tokens)
    share = counts.to(scores.dtype) / counts.sum(-1, keepdim=True).clamp(min=1)
    mean = (scores * weights[..., None]).sum(-2) / weights.sum(-1, keepdim=True).clamp(min=1)
    return experts * (share * mean).sum(-1)


def choices(chosen: Tensor, experts: int, tokens: Tensor | None = None) -> Tensor:
    """How often each expert was chosen: int64 (..., E) of choices (..., N, k), padding left out."""
    weights = torch.ones_like(chosen) if tokens is None else tokens[..., None].expand_as(chosen).long()
    counts = chosen.new_zeros((*chosen.shape[:-2], experts))
    return counts.scatter_add_(-1, chosen.flatten(-2), weights.flatten(-2))


def router_z_loss(logits: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Mean squared log-partition of a router's scores (ST-MoE, arXiv 2202.08906, equation 5); logits (N, E)."""
    squares = torch.logsumexp(logits, dim=-1).square()
    if tokens is None:
        return squares.mean()
    weights = tokens.to(squares.dtype)
    return (squares * weights).sum() / weights.sum().clamp(min=1)


class _Pass(NamedTuple):
    """What a router answered in a forward pass.

    Logits (N, E) with gradients, whom it chose, int64 (N, k), and the name of its `SCORES`.
    """

    logits: Tensor
    chosen: Tensor
    by: str


class RouterLosses(pl.Callback):
    """Adds an auxiliary load-balancing loss and a router z-loss to what ``training_step`` returns.

    Both are summed over the layers, as Megatron and DeepSeek do (OLMo divides by their number), and over the forward
    passes of one ``training_step`` through which gradients flow, say of two views: a teacher under ``no_grad``, and
    what is evaluated, have none. Computed in float32 at least, and left out where their weight is 0; then, and for a
    model without experts, nothing here runs. Logged as ``router_loss/balance`` (1 per layer where all is even) and
    ``router_loss/z``, means over layers and passes, without weights, of the last micro-batch of a logged step on the
    first process.

    Scores are what the router's weights show: the softmax of its logits, or sigmoids (GLM-4.5, Llama 4) or roots of
    softplus (DeepSeek-V4) divided by their sum. Where it shows none, sigmoids of a router with a correction bias,
    else the softmax. Padding is what the batch's ``attention_mask`` says.

    Args:
        balance: weight; GLM-4.5 and DeepSeek-V3 used 1e-4 with ``over="sequence"`` beside a correction bias; alone 1e-2
            is common.
        over: whose choices shall be even: ``layer`` = of one layer's micro-batch, ``sequence`` = of each sequence,
            ``global`` = of all processes and of the step's micro-batches so far (arXiv 2501.11873), one collective for
            all layers: experts may then specialise on sequences.
        z: weight of the z-loss; ST-MoE used 1e-3.

    Raises:
        ConfigError: when training starts, in manual optimization; in a step, with reentrant activation checkpointing,
            through which no gradient of these losses would flow.
    """

    def __init__(self, balance: float = 0.0, over: str = "sequence", z: float = 0.0) -> None:
        for name, value in (("balance", balance), ("over", over), ("z", z)):
            check_value(f"callbacks.RouterLosses.{name}", value, field=f"router_losses.{name}")
        self.balance, self.over, self.z = balance, over, z
        self.last: dict[str, float] = {}
        self._hooks: list[Any] = []
        self._heard: dict[int, list[_Pass]] = {}
        self._passes: Counter[int] = Counter()  # of a training_step, with gradients; by layer, as the next two
        self._silent: Counter[int] = Counter()  # without gradients
        self._again: Counter[int] = Counter()  # made once more within the backward pass
        self._listening = False
        self._by: dict[int, str] = {}  # of `SCORES`
        self._counts: Tensor | None = None  # of all layers in the step's micro-batches so far, over all processes
        self._step = -1
        self._told: Tensor | None = None
        self._said: set[str] = set()
        self._before: Any = None

    def columns(self, model: nn.Module) -> list[str]:
        """The names of all that is logged for a model; none for one without experts."""
        names = [f"router_loss/{name}" for name in ("balance", "z") if getattr(self, name)]
        return names if names and find_expert_layers(model) else []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listens to the routers, and stands behind ``training_step``."""
        if not (self.balance or self.z):
            return
        modules = dict(pl_module.named_modules())
        self._layers = find_expert_layers(pl_module)
        for place, layer in enumerate(self._layers):
            self._hooks += listen(layer, modules[layer.name], partial(self._hear, place))
        if not self._hooks:
            return
        if not pl_module.automatic_optimization:
            raise ConfigError("router_losses", "manual optimization", "wants the loss that training_step returns")
        self._step, self._by, self._said = -1, {}, set()
        self._before = pl_module.__dict__.get("training_step")
        pl_module.training_step = self._behind(trainer, pl_module)

    def _behind(self, trainer: pl.Trainer, module: pl.LightningModule) -> Any:
        training_step = module.training_step

        @wraps(training_step)
        def with_router_losses(batch: Any, *rest: Any, **more: Any) -> Any:
            self._passes, self._silent, self._again = Counter(), Counter(), Counter()
            self._listening = True
            try:
                output = training_step(batch, *rest, **more)
            finally:
                self._listening = False
                heard, self._heard = self._heard, {}
            loss = output.get("loss") if isinstance(output, dict) else output
            if not isinstance(loss, Tensor) or not heard:
                return output
            if trainer.global_step != self._step:
                self._step, self._counts = trainer.global_step, None
            total = loss + self._sum(heard, module, batch)
            return {**output, "loss": total} if isinstance(output, dict) else total

        return with_router_losses

    def _hear(self, place: int, router: nn.Module, answers: tuple[Any, ...]) -> None:
        """Only keeps: what is computed here would have to be computed again by activation checkpointing."""
        if not router.training:
            return
        if is_recomputation():
            self._again[place] += 1
            if self._silent[place] and self._again[place] > self._passes[place]:
                why = "must be non-reentrant: no gradient flows from router losses through the other kind"
                raise ConfigError("activation checkpointing", "use_reentrant=True", why)
        elif self._listening:
            layer = self._layers[place]
            logits, chosen = scores_in(answers[-1], layer), choice_of(answers, layer)
            if logits is None or chosen is None:
                self._say_once("%s does not show its router's scores and choices: it has no router loss", layer.name)
            elif not logits.requires_grad:  # a teacher's, or reentrant checkpointing's, which will come again
                self._silent[place] += 1
            else:
                asks = self.balance and place not in self._by
                if asks and (by := score_function(layer, logits, chosen, answers)) is not None:
                    self._by[place] = by
                self._passes[place] += 1
                heard = _Pass(logits.flatten(0, -2), chosen.flatten(0, -2).long(), self._by.get(place, usual(layer)))
                self._heard.setdefault(place, []).append(heard)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Whatever is computed again from here on belongs to no pass of this micro-batch."""
        self._silent = Counter()

    def _sum(self, heard: dict[int, list[_Pass]], module: nn.Module, batch: Any) -> Tensor:
        mask = attention_mask(batch)
        passes = [(place, one, self._tokens(one, mask)) for place in sorted(heard) for one in heard[place]]
        counts = self._global_counts(passes, module) if self.balance and self.over == "global" else {}
        balance, z = [], []
        for place, one, tokens in passes:
            logits = one.logits.to(torch.promote_types(one.logits.dtype, torch.float32))
            if self.balance:
                scores = SCORES[one.by](logits)
                parts = scores, one.chosen, tokens
                if self.over == "sequence":
                    parts = self._by_sequence(*parts, shape=_sequences(batch))
                balance.append(balance_loss(*parts, counts.get(place)).mean())
            if self.z:
                z.append(router_z_loss(logits, tokens))
        nothing = passes[0][1].logits.new_zeros(1, dtype=torch.float32)
        sums = [torch.stack(part) if part else nothing for part in (balance, z)]
        self._told = torch.stack([part.detach().mean() for part in sums])
        return self.balance * sums[0].sum() + self.z * sums[1].sum()

    def _tokens(self, one: _Pass, mask: Tensor | None) -> Tensor | None:
        if mask is None or mask.numel() == len(one.logits):
            return None if mask is None else mask.reshape(-1).to(one.logits.device) != 0
        self._say_once("the mask has %d positions, a router gets %d: padding counts", mask.numel(), len(one.logits))
        return None

    def _global_counts(self, passes: list[tuple[int, _Pass, Tensor | None]], module: nn.Module) -> dict[int, Tensor]:
        """Choices of the whole step so far, by layer: one sum over the processes for all layers together."""
        sizes = [layer.count for layer in self._layers]
        new = passes[0][1].chosen.new_zeros(sum(sizes))
        for place, one, tokens in passes:
            new.split(sizes)[place].add_(choices(one.chosen, sizes[place], tokens))
        sum_over_data(new, module)
        self._counts = new if self._counts is None else self._counts + new
        return dict(enumerate(self._counts.split(sizes)))

    def _by_sequence(
        self, scores: Tensor, chosen: Tensor, tokens: Tensor | None, shape: tuple[int, int] | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(B, T, ...) instead of (B T, ...), where the batch says how many sequences there are."""
        rows = 0
        if shape is not None:  # several views may have been laid together
            rows = len(scores) // shape[1] if len(scores) % (shape[0] * shape[1]) == 0 else shape[0]
        if rows == 0 or len(scores) % rows:
            what = "router losses: %d positions are not of %d sequences: each micro-batch is evened out as one"
            self._say_once(what, len(scores), rows)
            return scores, chosen, tokens
        return (*(None if part is None else part.unflatten(0, (rows, -1)) for part in (scores, chosen, tokens)),)

    def _say_once(self, what: str, *values: Any) -> None:
        if what not in self._said:
            self._said.add(what)
            log.warning(what, *values)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs when it is time."""
        stepped = trainer.global_step != self._step
        if self._told is not None and stepped and is_logged(trainer, trainer.global_step):
            values = dict(zip(("balance", "z"), self._told.tolist(), strict=True))
            self.last = {f"router_loss/{name}": value for name, value in values.items() if getattr(self, name)}
            tell(trainer, self.last)
            self._told = None

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets go of the model."""
        self._close(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lets go of the model."""
        self._close(pl_module)

    def _close(self, module: pl.LightningModule) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._hooks:
            module.__dict__.pop("training_step", None)
            if self._before is not None:
                module.training_step = self._before
        self._hooks, self._heard, self._counts = [], {}, None


def normalised(scores: Tensor, dim: int = -1) -> Tensor:
    """Scores (..., E) divided by their sum."""
    return scores / (scores.sum(dim, keepdim=True) + 1e-20)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": lambda logits: normalised(logits.sigmoid()),
    "sqrtsoftplus": lambda logits: normalised(softplus(logits).clamp(min=1e-20).sqrt()),
}
"""What routers make of logits (..., E), each token's sum 1; the root of 0 has no slope, hence the clamp."""

_UNSCALED = {**SCORES, "sigmoid": torch.sigmoid, "sqrtsoftplus": lambda logits: softplus(logits).sqrt()}


_STRANGE = 0.05  # of a weight; bfloat16 rounds by under 0.004


def usual(layer: ExpertLayer) -> str:
    """The `SCORES` of a router that does not show them: a correction bias and sigmoids mostly come together."""
    return "softmax" if layer.bias is None else "sigmoid"


@torch.no_grad()
def score_function(layer: ExpertLayer, logits: Tensor, chosen: Tensor, answers: Any) -> str | None:
    """Which of `SCORES` a router takes: the one that its weights are nearest to.

    Weights may be scaled, of each token or, with one expert per token, all together. Waits for the device, so ask once
    per layer.

    Args:
        layer: of experts.
        logits: (..., E).
        chosen: int64 (..., k).
        answers: of the router; the weights among them are (..., k), or (..., E) and 0 for who is not chosen.

    Returns:
        A name, with a warning where even the nearest is far off; `usual` where no weights are told, or negative ones,
        or one expert's is always the same; None where logits are all equal, so that it cannot be seen yet.
    """
    experts, k = logits.shape[-1], chosen.shape[-1]
    logits, chosen = logits.reshape(-1, experts).float(), chosen.reshape(-1, k).long()
    if (weights := _weights(answers, logits, chosen)) is None:
        return usual(layer)
    least, most = weights.aminmax()
    if least < 0 or (k == 1 and most - least <= 1e-3 * most):
        return usual(layer)
    along = -1 if k > 1 else 0
    weights = normalised(weights, along)
    off = {
        n: float((normalised(f(logits).gather(-1, chosen), along) - weights).abs().mean()) for n, f in _UNSCALED.items()
    }
    if max(off.values()) - min(off.values()) <= 1e-7:
        return None
    nearest = min(off, key=off.__getitem__)
    if (gap := off[nearest] / float(weights.mean())) > _STRANGE:
        what = "%s weighs its experts by none of %s (%.0f %% off the nearest): its balance loss takes %s"
        log.warning(what, layer.name, ", ".join(SCORES), 100 * gap, nearest)
    return nearest


def _weights(answers: Any, logits: Tensor, chosen: Tensor) -> Tensor | None:
    """The weights (N, k) of chosen experts among a router's answers."""
    floats = [t.float() for t in tensors_in(answers) if t.is_floating_point() and t.ndim >= 2]
    for told in (t.reshape(-1, t.shape[-1]) for t in floats):
        if told.shape == chosen.shape:
            return told
        if told.shape == logits.shape and bool(((told != 0).sum(-1) == chosen.shape[-1]).all()):
            return told.gather(-1, chosen)
    return None


def _sequences(batch: Any) -> tuple[int, int] | None:
    """Rows and columns of the first tensor (B, T) or longer of a batch."""
    return next((tuple(tensor.shape[:2]) for tensor in tensors_in(batch) if tensor.ndim >= 2), None)
