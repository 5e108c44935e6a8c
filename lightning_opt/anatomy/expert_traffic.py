"""How many tokens each expert of a model is given, counted while it trains."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_opt.anatomy.experts import ExpertLayer, find_expert_layers

log = logging.getLogger("lightning_opt.anatomy")

_shared: WeakKeyDictionary[nn.Module, ExpertTraffic] = WeakKeyDictionary()


class ExpertTraffic:
    """Counts tokens per expert of every mixture-of-experts layer, by hooks, until `close`.

    A token that goes to k experts counts k times. Counted is what modules in training mode are given in a forward pass:
    not what activation checkpointing computes again within the backward pass, not what is evaluated, not what happens
    in `paused`. The counts stay on the device and nothing here waits for it.

    Stacked experts show what they were given as an argument (transformers' ``experts(hidden_states, top_k_index,
    top_k_weights)``); of experts in a list, and of stacks that are not told, the router's own choice counts: the
    indices among its outputs, else the ``top_k`` largest of its scores.

    Args:
        model: any module, on the device where it will train. Layers whose choices cannot be seen are left out.

    Attributes:
        layers: the layers that are counted.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[ExpertLayer] = []
        self._hooks: list[Any] = []
        modules = dict(model.named_modules())
        for layer in find_expert_layers(model):
            if (place := _place(layer, modules[layer.name])) is not None:
                watched, before = place
                record = partial(self._record, len(self.layers))
                register = watched.register_forward_pre_hook if before else watched.register_forward_hook
                self._hooks.append(register(record, with_kwargs=True))
                self.layers.append(layer)
        # One more place in each row, for choices that are no expert's: padding, other ranks' experts, dropped tokens.
        self._width = max((layer.count for layer in self.layers), default=0) + 1
        device = self.layers[0].experts[0].device if self.layers else None
        self._tally = torch.zeros(len(self.layers), self._width, dtype=torch.int64, device=device)
        self._sum: Tensor | None = None
        self._padding: Tensor | None = None
        self._step: int | None = None
        self._holders = 1
        self._paused = self._told = False

    @classmethod
    def of(cls, model: nn.Module) -> ExpertTraffic:
        """The one that all who ask for this model share; it counts until each of them has called `close`."""
        if (traffic := _shared.get(model)) is None:
            traffic = _shared[model] = cls(model)
        else:
            traffic._holders += 1
        return traffic

    def close(self) -> None:
        """Lets go: the hooks are removed when everybody has."""
        self._holders -= 1
        if self._holders <= 0:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
            for model, traffic in list(_shared.items()):
                if traffic is self:
                    del _shared[model]

    # -- what is counted ---------------------------------------------------------------------------------------------

    def begin(self, step: int, attention_mask: Tensor | None = None) -> None:
        """A micro-batch of this optimizer step is next: of another than the last, the counts start at 0.

        All who share one object may tell it so.

        Args:
            step: any number that is another one in every optimizer step.
            attention_mask: as for `mask`.
        """
        if step != self._step:
            self._step = step
            self.reset()
        self.mask(attention_mask)

    def reset(self) -> None:
        """Counts from 0."""
        self._tally.zero_()
        self._sum = None

    def mask(self, attention_mask: Tensor | None) -> None:
        """Says which positions of the next forward passes are tokens.

        Args:
            attention_mask: (B, T), not 0 where there is a token; None: everywhere.
        """
        self._padding = None if attention_mask is None else attention_mask.reshape(-1, 1) == 0

    @staticmethod
    @contextmanager
    def paused(model: nn.Module) -> Iterator[None]:
        """Whoever counts this model by `of` does not meanwhile: forward passes that no update follows."""
        traffic = _shared.get(model)
        before = traffic is not None and traffic._paused
        if traffic is not None:
            traffic._paused = True
        try:
            yield
        finally:
            if traffic is not None:
                traffic._paused = before

    @torch.compiler.disable  # whether this is a recomputation is only known while it runs
    def _record(self, row: int, watched: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        if self._paused or not watched.training or is_recomputation():
            return
        layer = self.layers[row]
        chosen = _indices((args, kwargs)) if output is None else choice_of(output, layer)
        if chosen is None:
            self._say_once("%s does not show which experts it chose: nothing is counted there", layer.name)
            return
        if self._tally.device != chosen.device:
            self._tally = self._tally.to(chosen.device)
        with torch.no_grad():
            places = chosen.detach().flatten(0, -2).to(torch.int64)
            if (padding := self._padding) is not None and self._fits(padding, places):
                places = places.masked_fill(padding.to(places.device), layer.count)
            places = places.remainder(layer.count + 1).flatten()  # -1, a usual word for "dropped", is no expert
            self._tally[row].scatter_add_(0, places, torch.ones_like(places))
        self._sum = None

    def _fits(self, padding: Tensor, places: Tensor) -> bool:
        fits = len(padding) == len(places)
        if not fits:
            self._say_once("the mask has %d positions, the experts get %d: padding counts", len(padding), len(places))
        return fits

    def _say_once(self, what: str, *values: Any) -> None:
        if not self._told:
            self._told = True
            log.warning(what, *values)

    # -- the counts --------------------------------------------------------------------------------------------------

    @property
    def counts(self) -> Tensor | list[Tensor]:
        """Tokens of this process since the last `reset`: int64 (layers, E), or a list of (E,) where E differs."""
        return self._shaped(self._tally)

    def total(self) -> Tensor | list[Tensor]:
        """`counts` summed over the processes that train together; where there are several, each must ask.

        The sum is kept until something new is counted, so that it costs one collective however many ask.
        """
        if self._sum is None:
            self._sum = self._tally.clone()
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(self._sum)
        return self._shaped(self._sum)

    def by_parameter(self) -> dict[nn.Parameter, Tensor]:
        """`total` by expert weight: int64 (E,) for a stack, (1,) for a weight of one expert alone.

        Of a layer where nothing was counted (in evaluation mode, or its choices cannot be seen) all experts have
        2^31 - 1 tokens: who knows nothing must not let them rest.
        """
        found = {}
        for layer, counts in zip(self.layers, self.total(), strict=True):
            counts = torch.where(counts.sum() > 0, counts, 2**31 - 1)
            each = max(1, len(layer.experts) // layer.count)
            for place, parameter in enumerate(layer.experts):
                found[parameter] = counts if is_stack(layer) else counts[place // each, None]
        return found

    def _shaped(self, tally: Tensor) -> Tensor | list[Tensor]:
        sizes = [layer.count for layer in self.layers]
        if len(set(sizes)) <= 1:
            return tally[:, : self._width - 1]
        return [row[:size] for row, size in zip(tally, sizes, strict=True)]


def is_recomputation() -> bool:
    """Whether a backward pass runs in this thread: a forward pass now is activation checkpointing's second one."""
    return torch._C._current_graph_task_id() != -1


def is_stack(layer: ExpertLayer) -> bool:
    """Whether the experts are slices of 3-D parameters, not modules of a list."""
    return layer.experts[0].ndim == 3


def router_call(layer: ExpertLayer, block: nn.Module) -> nn.Module | None:
    """The module whose answer is the router's, where that is a module of its own beside the experts."""
    return None if layer.router is block else layer.router


def _place(layer: ExpertLayer, block: nn.Module) -> tuple[nn.Module, bool] | None:
    """The module whose calls show the choices, and whether in what it is given (else in what it answers)."""
    if is_stack(layer) and len(inspect.signature(layer.holder.forward).parameters) > 1:
        return layer.holder, True
    router = router_call(layer, block)
    return None if router is None or layer.top_k is None else (router, False)


def _indices(told: Any) -> Tensor | None:
    """The chosen experts (..., k) among the tensors of a call."""
    whole = (t for t in tensors_in(told) if t.ndim >= 2 and not t.is_floating_point() and t.dtype != torch.bool)
    return next(whole, None)


def choice_of(answer: Any, layer: ExpertLayer) -> Tensor | None:
    """What a router chose: the indices that it answers, else the largest of its scores (..., E)."""
    if (chosen := _indices(answer)) is not None:
        return chosen
    scores = (t for t in tensors_in(answer) if t.ndim >= 2 and t.is_floating_point() and t.shape[-1] == layer.count)
    return next((t.topk(layer.top_k, dim=-1).indices for t in scores), None)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of nested lists, tuples and mappings, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
