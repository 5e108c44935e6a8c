"""What a preparation would read, write and take, from a look at the start of each corpus; writes nothing."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_opt.data import orders
from lightning_opt.data.orders import CorpusPlan
from lightning_opt.data.preparing import check_target
from lightning_opt.data.shards import size_of, token_dtype
from lightning_opt.data.tokenizer import for_documents
from lightning_opt.plan import amount, available_cpus, duration

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SAMPLE_CHARACTERS = 500_000


@dataclass(frozen=True)
class CorpusEstimate:
    """One corpus.

    Attributes:
        plan: where it lies and what is wanted of it.
        tokens_per_byte: of its files, as they lie there.
        seconds_per_token: of one process.
    """

    plan: CorpusPlan
    tokens_per_byte: float
    seconds_per_token: float

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(size for _, size in self.plan.files)

    @property
    def tokens(self) -> int:
        """That all its files would give."""
        return int(self.bytes * self.tokens_per_byte)

    @property
    def used_tokens(self) -> int:
        """That will be taken."""
        return min(self.plan.goal, self.tokens)

    @property
    def used_bytes(self) -> int:
        """That will be read."""
        return int(self.used_tokens / self.tokens_per_byte)

    @property
    def used_files(self) -> int:
        """That will be opened, about."""
        left = self.plan.goal
        for count, (_, size) in enumerate(self.plan.files):
            if left <= 0:
                return count
            left -= min(self.plan.quota, int(size * self.tokens_per_byte))
        return len(self.plan.files)


@dataclass(frozen=True)
class Estimate:
    """All of it.

    Attributes:
        corpora: one by one.
        disk_bytes: of the shards.
        processes: that would work.
    """

    corpora: list[CorpusEstimate]
    disk_bytes: int
    processes: int

    @property
    def seconds(self) -> float:
        """Of tokenising; reading goes on beside it, unless the line is slower."""
        return sum(corpus.used_tokens * corpus.seconds_per_token for corpus in self.corpora) / self.processes

    def text(self) -> str:
        """A line for each corpus and one for the whole."""
        lines = []
        for corpus in self.corpora:
            plan = corpus.plan
            short = "" if corpus.tokens >= plan.goal else f", {100 * corpus.tokens / plan.goal:.2g} % of what is asked"
            use = "training" if plan.split == "train" else "validation"
            lines.append(
                f"{plan.name}: {amount(plan.goal, 'tokens')} for {use}"
                f" from {plan.origin.place}{'@' + plan.origin.revision[:8] if plan.origin.revision else ''}: about "
                f"{amount(corpus.used_bytes, 'B')} of {corpus.used_files} files (there are {len(plan.files)}, "
                f"{amount(corpus.bytes, 'B')}, some {amount(corpus.tokens, 'tokens')}{short})"
            )
        read = sum(corpus.used_bytes for corpus in self.corpora)
        lines.append(
            f"all: {amount(read, 'B')} to read, {amount(self.disk_bytes, 'B')} on disk, about {duration(self.seconds)} "
            f"of tokenising in {self.processes} processes; nothing was written"
        )
        return "\n".join(lines)


def estimate(config: Mapping[str, Any], *, tokens: Any, processes: int | None = None) -> Estimate:
    """Lists the files of every corpus, tokenises the start of one of each and reckons.

    Args:
        config: ``config["data"]``.
        tokens: training tokens of all corpora together.
        processes: that would work; None: one per CPU.

    Raises:
        ConfigError: what `preparing.prepare` would find wrong before it starts.
    """
    settings = orders.asked(config, tokens)
    check_target(Path(config["path"]), settings)
    with tempfile.TemporaryDirectory() as folder:
        plan = orders.make_plan(config, settings, Path(folder))
        tokenizer = for_documents(plan.tokenizer)
    found = [_look(corpus, tokenizer) for corpus in plan.corpora]
    disk = sum(corpus.used_tokens for corpus in found) * token_dtype(size_of(tokenizer)).itemsize
    return Estimate(found, disk, processes or available_cpus())


def _look(corpus: CorpusPlan, tokenizer: Tokenizer) -> CorpusEstimate:
    (name, size), read, characters, texts = corpus.files[0], 0, 0, []

    def count(more: int) -> None:
        nonlocal read
        read += more

    for text in orders.first_documents(corpus, name, size, count):
        texts.append(text)
        characters += len(text)
        if characters >= _SAMPLE_CHARACTERS and read:
            break
    started = time.perf_counter()
    tokens = sum(len(tokenizer.encode(text, add_special_tokens=False).ids) + 1 for text in texts)
    seconds = time.perf_counter() - started
    return CorpusEstimate(corpus, max(tokens, 1) / max(min(read, size), 1), seconds / max(tokens, 1))
