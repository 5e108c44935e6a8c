"""Losses that keep routers even and calm, added to any project's training loss."""

from __future__ import annotations

from functools import partial, wraps
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_opt.anatomy import ExpertLayer, find_expert_layers
from lightning_opt.anatomy.expert_traffic import choice_of, is_recomputation, router_call, tensors_in
from lightning_opt.callbacks.expert_steps import attention_mask
from lightning_opt.callbacks.telling import tell
from lightning_opt.plan import ConfigError, check_value


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


class RouterLosses(pl.Callback):
    """Adds an auxiliary load-balancing loss and a router z-loss to what ``training_step`` returns.

    Both are summed over the layers, as Megatron and DeepSeek do (OLMo divides by their number), computed in float32 at
    least, and left out where their weight is 0; then, and for a model without experts, nothing here runs. Logged as
    ``router_loss/balance`` (1 per layer where all is even) and ``router_loss/z``, means over layers, without weights,
    of the last micro-batch of a logged step on the first process.

    Scores are the softmax of the router's logits; of routers with a correction bias, as DeepSeek-V3 and GLM-4.5 have,
    sigmoids divided by their sum. Padding is what the batch's ``attention_mask`` says.

    Args:
        balance: weight; GLM-4.5 and DeepSeek-V3 used 1e-4 with ``over="sequence"`` beside a correction bias; alone 1e-2
            is common.
        over: whose choices shall be even: ``layer`` = of one layer's micro-batch, ``sequence`` = of each sequence,
            ``global`` = of all processes and of the step's micro-batches so far (arXiv 2501.11873), one collective
            each: experts may then specialise on sequences.
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
        self._heard: dict[int, tuple[Tensor, Tensor]] = {}
        self._listening = False
        self._counts: dict[int, Tensor] = {}  # of the step's micro-batches so far, over all processes
        self._step = -1
        self._told: Tensor | None = None
        self._before: Any = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listens to the routers, and stands behind ``training_step``."""
        if not (self.balance or self.z):
            return
        modules = dict(pl_module.named_modules())
        self._layers = find_expert_layers(pl_module)
        for place, layer in enumerate(self._layers):
            router = router_call(layer, modules[layer.name])
            if router is not None and layer.top_k is not None:
                self._hooks.append(router.register_forward_hook(partial(self._hear, place)))
        if not self._hooks:
            return
        if not pl_module.automatic_optimization:
            raise ConfigError("router_losses", "manual optimization", "wants the loss that training_step returns")
        self._step = -1
        self._before = pl_module.__dict__.get("training_step")
        pl_module.training_step = self._behind(trainer, pl_module.training_step)

    def _behind(self, trainer: pl.Trainer, training_step: Any) -> Any:
        @wraps(training_step)
        def with_router_losses(batch: Any, *rest: Any, **more: Any) -> Any:
            self._heard, self._listening = {}, True
            try:
                output = training_step(batch, *rest, **more)
            finally:
                self._listening = False
            heard, self._heard = self._heard, {}
            loss = output.get("loss") if isinstance(output, dict) else output
            if not isinstance(loss, Tensor) or not heard:
                return output
            total = loss + self._sum(heard, trainer.global_step, attention_mask(batch), _sequences(batch))
            return {**output, "loss": total} if isinstance(output, dict) else total

        return with_router_losses

    @torch.compiler.disable  # whether this is a recomputation is only known while it runs
    def _hear(self, place: int, router: nn.Module, _: Any, output: Any) -> None:
        """Only keeps: what is computed here would have to be computed again by activation checkpointing."""
        if not self._listening or not router.training or is_recomputation():
            return
        layer = self._layers[place]
        logits = next((t for t in tensors_in(output) if t.is_floating_point() and t.shape[-1] == layer.count), None)
        chosen = choice_of(output, layer)
        if logits is not None and chosen is not None:
            if not logits.requires_grad and any(weight.requires_grad for weight in layer.routers):
                why = "must be non-reentrant: no gradient flows from router losses through the other kind"
                raise ConfigError("activation checkpointing", "use_reentrant=True", why)
            self._heard[place] = logits.flatten(0, -2), chosen.flatten(0, -2)

    def _sum(self, heard: dict[int, Any], step: int, mask: Tensor | None, sequences: int | None) -> Tensor:
        if step != self._step:
            self._step, self._counts = step, {}
        balance, z = [], []
        for place, (logits, chosen) in heard.items():
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            tokens = None if mask is None or mask.numel() != len(logits) else mask.reshape(-1).to(logits.device) != 0
            if self.balance:
                balance.append(self._balance(place, logits, chosen, tokens, sequences))
            if self.z:
                z.append(router_z_loss(logits, tokens))
        nothing = next(iter(heard.values()))[0].new_zeros(1, dtype=torch.float32)
        parts = [torch.stack(part) if part else nothing for part in (balance, z)]
        self._told = torch.stack([part.detach().mean() for part in parts])
        return self.balance * parts[0].sum() + self.z * parts[1].sum()

    def _balance(
        self, place: int, logits: Tensor, chosen: Tensor, tokens: Tensor | None, sequences: int | None
    ) -> Tensor:
        scores = _scores(logits, self._layers[place])
        counts = None
        if self.over == "sequence" and sequences and len(logits) % sequences == 0:
            scores, chosen = (part.unflatten(0, (sequences, -1)) for part in (scores, chosen))
            tokens = None if tokens is None else tokens.view(sequences, -1)
        elif self.over == "global":
            counts = choices(chosen, scores.shape[-1], tokens)
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(counts)
            if place in self._counts:
                counts = counts + self._counts[place]
            self._counts[place] = counts
        return balance_loss(scores, chosen, tokens, counts).mean()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs when it is time."""
        stepped = trainer.global_step != self._step
        if self._told is not None and stepped and trainer.global_step % trainer.log_every_n_steps == 0:
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
        self._hooks, self._heard, self._counts = [], {}, {}


def _scores(logits: Tensor, layer: ExpertLayer) -> Tensor:
    if layer.bias is None:
        return logits.softmax(-1)
    scores = logits.sigmoid()
    return scores / (scores.sum(-1, keepdim=True) + 1e-20)


def _sequences(batch: Any) -> int | None:
    """Rows of the first tensor (B, T) or longer of a batch."""
    return next((len(tensor) for tensor in tensors_in(batch) if tensor.ndim >= 2), None)
