"""lm-eval's Hugging Face model on a model in memory, with forward passes of our own for log-likelihoods.

The same numbers as `HFLM`, with less to compute: a token sequence is run once, prompts that many share are run once,
batches are filled by length, and only the positions that are asked for go through the output layer.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix
from torch.utils import collect_env
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lightning_opt.data.meter import Meter
from lightning_opt.evaluation.counting import Counting, Keep, KeepText
from lightning_opt.evaluation.quiet import metered
from lightning_opt.evaluation.rows import Batch, Row, plan, rows_of

_LOGITS = 2**27
"""Most logits computed at once: half a GiB in float32."""

Cache = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values by layer, [1, heads, tokens, width]."""


class CountingLM(Counting, HFLM):
    """`HFLM` on a model in memory.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        batch_size: prompts of full context that one batch may hold; of shorter ones it holds more.
        max_length: the context, in tokens.
        reuse: whether prompts that many requests begin with are computed once.
    """

    def __init__(
        self, model: torch.nn.Module, tokenizer: Any, *, batch_size: int, max_length: int, reuse: bool = True
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
        self.reuse = reuse
        self._selects = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self._vocabulary = self.model.config.get_text_config().vocab_size
        self._meter: Meter | None = None

    def _encode_all(self, texts: Sequence[str]) -> None:
        start = self.tokenizer.decode(self.prefix_token_id)
        plain = list(dict.fromkeys(text for text in texts if text and not has_bos_prefix(text, start)))
        if plain:
            added = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
            self._encoded = dict(zip(plain, self.tokenizer(plain, **added)["input_ids"], strict=True))

    def _score(self, pairs: Iterable[tuple[list[int], list[int]]], texts: Sequence[Any], keep: Keep) -> None:
        batches = self._plan(rows_of(pairs, self.max_length))
        with metered(f"{len(texts):,} answers to weigh", sum(batch.work for batch in batches)) as meter:
            prefix, cache = (), None
            for batch in batches:
                if batch.prefix != prefix:
                    prefix, cache = batch.prefix, self._cache(batch.prefix)
                self._answer(batch, cache, keep)
                self._save()
                meter.advance(batch.work)

    def _answer(self, batch: Batch, cache: Cache | None, keep: Keep) -> None:
        """Answers the requests of a batch; one that does not fit the accelerator's memory goes in halves."""
        try:
            for row, logits in zip(batch.rows, self._logits(batch, cache), strict=True):
                _weigh(row, logits, keep)
            return
        except torch.OutOfMemoryError:
            if len(batch.rows) == 1:
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        middle = len(batch.rows) // 2
        for half in (batch.rows[:middle], batch.rows[middle:]):
            self._answer(Batch(batch.prefix, half), cache, keep)

    def _plan(self, rows: Sequence[Row]) -> list[Batch]:
        tokens, positions = self.batch_size * self.max_length, max(1, _LOGITS // self._vocabulary)
        if not self._selects:  # logits of every token are made
            tokens = min(tokens, positions)
        return plan(rows, tokens=tokens, positions=positions, reuse=self.reuse and self._selects)

    @torch.no_grad()
    def _cache(self, prefix: tuple[int, ...]) -> Cache | None:
        """Keys and values of a shared prompt by layer; None for no prompt, and for models that keep other things."""
        if not prefix or not self.reuse:
            return None
        tokens = torch.tensor([prefix], device=self.device)
        cache = self.model(tokens, use_cache=True, logits_to_keep=1).past_key_values
        if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
            self.reuse = False
            return None
        return [(layer.keys, layer.values) for layer in cache.layers]

    @torch.no_grad()
    def _logits(self, batch: Batch, cache: Cache | None) -> Iterator[torch.Tensor]:
        """For each row the logits of its last `keep` positions, float32, [keep, vocabulary]."""
        known = len(batch.prefix) if cache else 0
        shown = [torch.tensor(row.tokens[known:]) for row in batch.rows]
        tokens = torch.nn.utils.rnn.pad_sequence(shown, batch_first=True).to(self.device)
        first = min(len(ids) - row.keep for ids, row in zip(shown, batch.rows, strict=True))
        wanted: dict[str, Any] = {"logits_to_keep": tokens.shape[1] - first} if self._selects else {}
        if cache:
            spread = [
                (keys.expand(len(shown), -1, -1, -1), values.expand(len(shown), -1, -1, -1)) for keys, values in cache
            ]
            wanted |= {"past_key_values": DynamicCache(spread), "use_cache": True}
        logits = self.model(tokens, **wanted).logits
        offset = tokens.shape[1] - logits.shape[1]
        for ids, row, found in zip(shown, batch.rows, logits, strict=True):
            end = len(ids) - offset
            yield found[end - row.keep : end].float()

    def _compose(self, requests: list[Any], keep: KeepText) -> None:
        # lm-eval's own order, longest prompt first, but by batches: each is kept before the next is begun.
        order = sorted(range(len(requests)), key=lambda place: -len(self.tok_encode(requests[place].args[0])))
        with metered(f"{len(requests):,} texts to write", len(requests)) as self._meter:
            for start in range(0, len(order), self.batch_size):
                places = order[start : start + self.batch_size]
                for place, text in zip(places, self._generate([requests[each] for each in places]), strict=True):
                    keep(place, text)
                self._save()

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        written = super()._model_generate(context, *args, **kwargs)
        if self._meter is not None:
            self._meter.advance(len(context))
        return written


def _weigh(row: Row, logits: torch.Tensor, keep: Keep) -> None:
    """Hands out the answers of a row; `logits` are those of its last `keep` positions."""
    chances = logits.log_softmax(-1)
    likeliest = logits.argmax(-1)
    for number, tokens in row.asked:
        wanted = torch.tensor(tokens, device=logits.device)
        places = chances[-len(tokens) :].gather(1, wanted[:, None])
        keep(number, (float(places.sum()), bool((likeliest[-len(tokens) :] == wanted).all())))


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
