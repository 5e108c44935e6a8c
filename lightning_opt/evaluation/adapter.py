"""lm-eval's Hugging Face model, told to count what it cuts; imports lm_eval."""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from torch.utils import collect_env

from lightning_opt.evaluation.quiet import aloud

_LOG = logging.getLogger("lightning_opt.evaluation")
_SAY_SECONDS = 15.0


class CountingLM(HFLM):
    """`HFLM` on a model in memory that also notes, per task and document, what the scores alone do not show.

    Attributes:
        cut: task to documents of which at least one prompt was longer than the context and lost its left end.
        choices: task to document to its number of choices.
        tied: task to documents whose choices all got the same log-likelihood.
    """

    def __init__(self, model: torch.nn.Module, tokenizer: Any, *, batch_size: int, max_length: int) -> None:
        self.cut: dict[str, set[int]] = defaultdict(set)
        self.choices: dict[str, dict[int, int]] = defaultdict(dict)
        self.tied: dict[str, set[int]] = defaultdict(set)
        self._asked: list[Any] = []
        self._rows, self._said = 0, time.monotonic()
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihoods (nats, summed over the continuation) and whether the continuation is the greedy one."""
        self._asked, self._rows = list(requests), 0
        answers = super().loglikelihood(requests, disable_tqdm=True)
        self._asked = []
        found = defaultdict(list)
        for request, (value, _) in zip(requests, answers, strict=True):
            found[request.task_name, request.doc_id].append(value)
        for (task, document), values in found.items():
            self.choices[task][document] = len(values)
            if len(values) > 1 and min(values) == max(values):
                self.tied[task].add(document)
        return answers

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before, after = super()._encode_pair(context, continuation)
        # lm-eval stops at a side without tokens: a blank context, or a tokenizer that merges across the border.
        if not before:
            before = [self.prefix_token_id]
        if not after:
            before, after = (before[:-1] or [self.prefix_token_id]), before[-1:]
        return before, after

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        for asked, (_, context, continuation) in zip(self._asked, requests, strict=False):
            if len(context) + len(continuation) > self.max_length + 1:
                self.cut[asked.task_name].add(asked.doc_id)
        # lm-eval stops at a continuation longer than the context: keep the end of it instead, as it does with prompts.
        kept = [(key, context, continuation[-self.max_length :]) for key, context, continuation in requests]
        return super()._loglikelihood_tokens(kept, *args, **{**kwargs, "disable_tqdm": True})

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._tell(len(inps))
        return super()._model_call(inps, *args, **kwargs)

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._tell(len(context))
        return super()._model_generate(context, *args, **kwargs)

    def _tell(self, rows: int) -> None:
        """A line now and then: the real sets take minutes."""
        self._rows += rows
        if time.monotonic() - self._said > _SAY_SECONDS:
            self._said = time.monotonic()
            with aloud():
                _LOG.info("evaluation: prompt %d of at most %d", self._rows, len(self._asked))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Greedy continuations up to a stop string."""
        self._asked, self._rows = list(requests), 0
        for request in requests:
            prompt, options = request.args[:2]
            room = self.max_length - options.get("max_gen_toks", self.max_gen_toks)
            if len(self.tok_encode(prompt)) > room:
                self.cut[request.task_name].add(request.doc_id)
        return super().generate_until(requests, disable_tqdm=True)


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Leaves the model's train/eval modes and every random state as they were."""
    modes = [(module, module.training) for module in model.modules()]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextlib.contextmanager
def without_environment_report() -> Iterator[None]:
    """lm-eval asks git, pip and the compiler about the machine: a second, and git complains on the terminal where
    there is no repository. env.json of the run folder has what matters.
    """
    kept = evaluator.get_git_commit_hash, collect_env.get_pretty_env_info
    evaluator.get_git_commit_hash, collect_env.get_pretty_env_info = (lambda: None), (lambda: "see env.json")
    try:
        yield
    finally:
        evaluator.get_git_commit_hash, collect_env.get_pretty_env_info = kept
