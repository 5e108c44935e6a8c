"""The training loss of a causal language model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lightning_opt.models.chunked import can_be_chunked, linear_cross_entropy, logits_cross_entropy
from lightning_opt.models.document_masks import apart

log = logging.getLogger("lightning_opt.models")

# Heads whose logits the model changes afterwards (soft caps, scales): found out at their first loss.
_not_plain: WeakSet[nn.Module] = WeakSet()


class Loss(NamedTuple):
    """What is minimised, and what is reported.

    Attributes:
        total: the objective: cross-entropy plus the z-loss; a float32 scalar with a gradient.
        nll: mean negative log-likelihood in nats per counted token, without a gradient.
    """

    total: Tensor
    nll: Tensor


def causal_lm_loss(
    model: nn.Module, input_ids: Tensor, labels: Tensor, z_loss: float = 0.0, *, separator: int | None = None
) -> Loss:
    """Mean cross-entropy of next tokens.

    Where the model's output head is a plain linear map, the loss is computed inside the head's own forward, a few rows
    of logits at a time (`linear_cross_entropy`): its hooks, such as FSDP2's that gather the weight, fire as ever, and
    the loss leaves through the model's output. Any other head, and a model that changes the logits afterwards, gives
    its logits.

    Args:
        model: a causal language model whose forward returns ``logits`` (B, T, V).
        input_ids: int64 (B, T).
        labels: int64 (B, T), already shifted: ``labels[:, t]`` is the token after ``input_ids[:, t]``; -100 does not
            count. Where none counts, the loss is 0.
        z_loss: weight of the mean squared log-partition, which keeps logits from drifting (PaLM, arXiv 2204.02311,
            section 5: 1e-4).
        separator: end-of-text token at which a document begins that sees none before it, in a model that can keep them
            apart (`keep_documents_apart`); None: each token sees all before it.

    Returns:
        The loss, computed in float32 whatever the model's precision.
    """
    head, more = _linear_head(model), apart(input_ids, separator)
    if head is not None and head not in _not_plain:
        with _asked(head, labels, z_loss) as question:
            try:
                logits = model(input_ids=input_ids, use_cache=False, **more).logits
            except IndexError:  # of a model that indexes what it takes for logits
                logits = None
        if question.answered_by(logits):
            return Loss(logits[0], logits[1].detach())
        _not_plain.add(head)
        log.info("%s: its head is not a plain one, so the loss takes all logits at once", type(model).__name__)
    logits = model(input_ids=input_ids, use_cache=False, **more).logits
    total, nll = logits_cross_entropy(logits.flatten(0, -2), labels.flatten(), z_loss)
    return Loss(total, nll.detach())


def _linear_head(model: nn.Module) -> nn.Linear | None:
    """The model's output head where it computes what `nn.Linear` does, by its own parameters or gathered ones."""
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if ask is not None else None
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and "forward" not in vars(head)
    return head if plain else None


class _Question:
    """Labels that a head shall answer with their loss, and its answer, to tell it from what the model makes of it."""

    def __init__(self, labels: Tensor, z_loss: float) -> None:
        self.labels, self.z_loss = labels, z_loss
        self._answer: Tensor | None = None
        self._version = 0

    def answer(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        """The loss (2,) for the head's input (B, T, h)."""
        flat = hidden.flatten(0, -2), head.weight, head.bias, self.labels.flatten()
        values = linear_cross_entropy(*flat, self.z_loss)
        with torch.inference_mode(False):  # inference tensors have no version
            self._answer = values.clone() if values.is_inference() else values
        self._version = self._answer._version
        return self._answer

    def answered_by(self, logits: Tensor | None) -> bool:
        """Whether this is the answer as given: the same tensor, not written to since."""
        return logits is not None and logits is self._answer and logits._version == self._version


@contextmanager
def _asked(head: nn.Linear, labels: Tensor, z_loss: float) -> Iterator[_Question]:
    """While this lasts, the head answers with the loss of these labels; an ordinary head again afterwards."""
    question = _Question(labels, z_loss)
    head.__dict__.update(_question=question, forward=MethodType(_answer, head))
    try:
        yield question
    finally:
        del head.__dict__["forward"], head.__dict__["_question"]


@torch.compiler.disable  # a compiler would be free to keep every chunk of logits for the backward pass
def _answer(head: nn.Linear, hidden: Tensor) -> Tensor:
    question: _Question = head.__dict__["_question"]
    if hidden.shape[:-1] != question.labels.shape or not can_be_chunked(hidden, head.weight):
        return nn.Linear.forward(head, hidden)
    return question.answer(head, hidden)
