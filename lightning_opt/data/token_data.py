"""From ``config["data"]`` to everything a run needs of its data: ``build`` and what it returns."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_opt.data import cached, checks, embedded, text_files
from lightning_opt.data.cached import Damaged
from lightning_opt.data.meter import Meter
from lightning_opt.data.mixture import Mixture, ValidationWindows, windows_of
from lightning_opt.data.shards import Shards, open_shards
from lightning_opt.data.shares import CorpusShares, corpus_shares
from lightning_opt.data.text_files import CorpusFiles
from lightning_opt.data.tokenizer import (
    END_OF_TEXT,
    SAMPLE_BYTES,
    find_eos,
    for_documents,
    load_tokenizer,
    save_trained,
    token_bytes,
    tokenizer_file,
    tokenizer_hash,
    train_tokenizer,
)
from lightning_opt.data.writing import write_shards
from lightning_opt.plan import ConfigError, data_phases

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("lightning_opt.data")


@dataclass(frozen=True)
class CorpusInfo:
    """One corpus in numbers; entropies in nats per token on the validation tokens (``shards.Shards`` says which)."""

    name: str
    weight: float
    train_tokens: int
    val_tokens: int
    train_documents: int
    val_documents: int
    train_bytes: int
    val_bytes: int
    unigram_entropy: float | None
    val_entropy: float | None


@dataclass(frozen=True)
class TokenData:
    """The data of a run.

    Attributes:
        tokenizer: with its end-of-text token set.
        train: endless shuffled mixture; ``train[i]`` is a pure function of (seed, i).
        val: corpus -> windows in order, last one filled up with label -100.
        token_bytes: int32 (vocab,), bytes of text behind each token.
        corpora: one entry per corpus, sorted by name.
        fingerprint: equal where tokens, tokenizer, weights, sequence length and what a token sees of other documents
            are (the seed is not part of it).
        tokenizer_kind: ``trained`` or ``given``.
        tokenizer_sha256: of the tokenizer file and its end-of-text token.
    """

    tokenizer: PreTrainedTokenizerFast
    train: Mixture
    val: dict[str, ValidationWindows]
    token_bytes: np.ndarray
    corpora: list[CorpusInfo]
    fingerprint: str
    tokenizer_kind: str
    tokenizer_sha256: str

    @property
    def vocab_size(self) -> int:
        """Rows a model's embedding needs: the largest token id plus one."""
        return len(self.token_bytes)

    def epochs(self, tokens: int) -> dict[str, float]:
        """How often a run of ``tokens`` tokens goes through each corpus."""
        return self.train.epochs(tokens)


Seams = Callable[[int], Sequence[int]]


def build(config: Mapping[str, Any], *, seed: int, seams: Seams | None = None) -> TokenData:
    """Makes or reopens tokenizer and shards, and puts the mixture together. Never uses the network.

    Args:
        config: ``config["data"]`` as plain dict.
        seed: of the training order.
        seams: told how many windows an epoch of all corpora has, says with which place of the order each phase but the
            first begins; for a config with phases.

    Raises:
        ConfigError: what ``check`` finds, a broken line of a text file, a corpus that is empty or shorter than one
            sequence, damaged prepared shards.
    """
    checks.check(config)
    if config["source"] == "prepared":
        kind = "given"
        file, eos, corpora = _prepared(config)
        shares = corpus_shares(config, [shards.name for shards in corpora if len(shards.train)])
    else:
        found = _text_files(config)
        shares = corpus_shares(config, list(found))
        hashes = _hashes(found, _cache(config))
        kind, file, eos = _tokenizer(config, found, hashes, shares.base)
        corpora = [_shards(config, corpus, hashes[corpus.name], file, eos) for corpus in found.values()]
    train = _mixture(corpora, shares, config["sequence_length"], seed, seams)
    return _assemble(config, train, kind, file, eos, corpora, shares)


def _cache(config: Mapping[str, Any]) -> Path:
    return Path(config.get("cache_dir") or "data_cache")


def _text_files(config: Mapping[str, Any]) -> dict[str, CorpusFiles]:
    if config["source"] == "files":
        return text_files.discover(config["path"])

    fraction = config.get("val_fraction", 0.02)

    def make(folder: Path) -> None:
        log.info("making the embedded corpora (prose, code, mathematics) from this Python and its packages")
        embedded.make_corpora(folder, fraction)

    key = cached.fingerprint(embedded.identity(), fraction)
    return text_files.discover(cached.folder_made_once(_cache(config), f"embedded-{key[:16]}", make))


def _hashes(found: Mapping[str, CorpusFiles], cache: Path) -> dict[str, list]:
    """Corpus -> [[kind, sha256], ...] of its files; names and times of files do not count, their content does."""
    files = [(c.name, split, path) for c in found.values() for split in ("train", "val") for path in getattr(c, split)]
    hashes: dict[str, list] = {name: [] for name in found}
    digests = cached.content_hashes([path for _, _, path in files], cache / "sources.json")
    for (name, split, path), digest in zip(files, digests, strict=True):
        hashes[name].append([split, text_files.suffix_of(path), digest])
    return hashes


def _tokenizer(
    config: Mapping[str, Any],
    found: Mapping[str, CorpusFiles],
    hashes: Mapping[str, list],
    weights: Mapping[str, float],
) -> tuple[str, Path, str]:
    """(trained | given, tokenizer.json, end-of-text token)."""
    asked = config.get("tokenizer") or {}
    if asked.get("path"):
        file = tokenizer_file(asked["path"])
        return "given", file, find_eos(file, asked.get("eos"))
    size, fraction = asked["vocab_size"], config.get("val_fraction", 0.02)

    def make(folder: Path) -> None:
        log.info("training a byte-level BPE tokenizer with %d entries", size)
        save_trained(train_tokenizer(_sample(found, weights, fraction), size), folder)

    import tokenizers

    key = cached.fingerprint("tokenizer", 1, tokenizers.__version__, size, fraction, SAMPLE_BYTES, hashes, weights)
    folder = cached.folder_made_once(_cache(config), f"tokenizer-{key[:16]}", make)
    return "trained", folder / "tokenizer.json", END_OF_TEXT


def _sample(found: Mapping[str, CorpusFiles], weights: Mapping[str, float], fraction: float) -> Iterator[str]:
    """Training documents in the mixture's proportions, 6 MB in all: of each file its first part, by the file's size."""
    for corpus in found.values():
        total = sum(path.stat().st_size for path in corpus.train)
        for path in corpus.train:
            room = SAMPLE_BYTES * weights[corpus.name] * path.stat().st_size / max(total, 1)
            for text in text_files.read_documents(path):
                if room <= 0:
                    break
                if corpus.val or text_files.draw(text) >= fraction:
                    room -= len(text.encode("utf-8"))
                    yield text


def _shards(config: Mapping[str, Any], corpus: CorpusFiles, hashes: list, file: Path, eos: str) -> Shards:
    fraction = config.get("val_fraction", 0.02)
    sha = tokenizer_hash(file, eos)

    def make(folder: Path) -> None:
        size = sum(path.stat().st_size for path in [*corpus.train, *corpus.val])
        with Meter(f"tokenising {corpus.name}", size, unit="B") as meter:
            documents = _split_documents(corpus, fraction, meter.advance)
            write_shards(folder, corpus.name, documents, for_documents(file), eos=eos, tokenizer_sha256=sha)

    key = cached.fingerprint("shards", 1, hashes, sha, None if corpus.val else fraction)
    shards = open_shards(cached.folder_made_once(_cache(config), f"{corpus.name}-{key[:16]}", make))
    if not shards.train_documents:
        raise ConfigError(_field(config), corpus.name, "must not be an empty corpus: no training documents found")
    if not shards.val_documents:
        need = f"{corpus.name}_val.* files, more documents, or a larger data.val_fraction"
        raise ConfigError(
            _field(config), corpus.name, f"must have validation documents: none was held out; needs {need}"
        )
    return shards


def _field(config: Mapping[str, Any]) -> str:
    return "data.path" if config["source"] == "files" else "data.source"


def _split_documents(corpus: CorpusFiles, fraction: float, advance: Callable[[int], None]) -> Iterator[tuple[str, str]]:
    """(split, document). Where few documents mean that none is drawn for validation, the lowest draw is taken."""
    lowest, drawn = 1.0, bool(corpus.val)
    if not drawn:
        for path in corpus.train:
            for text in text_files.read_documents(path):
                lowest = min(lowest, text_files.draw(text))
                if lowest < fraction:
                    break
    bound = 0.0 if drawn else max(fraction, math.nextafter(lowest, 2.0))
    for path in corpus.train:
        for text in text_files.read_documents(path, on_bytes=advance):
            yield "val" if text_files.draw(text) < bound else "train", text
    for path in corpus.val:
        for text in text_files.read_documents(path, on_bytes=advance):
            yield "val", text


def _prepared(config: Mapping[str, Any]) -> tuple[Path, str, list[Shards]]:
    folders = checks.check_prepared(config, ask_hub=True)
    file = Path(config["path"]) / "tokenizer.json"
    corpora = []
    for folder in folders.values():
        try:
            cached.verify(folder, _cache(config) / cached.VERIFIED)
            shards = open_shards(folder)
        except Damaged as damage:
            problem = f"must be whole, but {damage}; make it again: {checks.prepare_command(config, None)}"
            raise ConfigError("data.path", config["path"], problem) from None
        corpora.append(shards)
    return file, corpora[0].eos, corpora


def _mixture(corpora: list[Shards], shares: CorpusShares, length: int, seed: int, seams: Seams | None) -> Mixture:
    streams = {shards.name: shards.train for shards in corpora}
    first, *others = shares.phases
    used = {name for phase in shares.phases for name, share in phase.items() if share}
    epoch = sum(windows_of(streams[name], length) for name in used)
    later = list(zip(seams(epoch) if seams and others else (), others, strict=True))
    return Mixture(streams, first, sequence_length=length, seed=seed, later=later)


def _assemble(
    config: Mapping[str, Any],
    train: Mixture,
    kind: str,
    file: Path,
    eos: str,
    corpora: list[Shards],
    shares: CorpusShares,
) -> TokenData:
    length, weights = config["sequence_length"], shares.base
    tokenizer = load_tokenizer(file, eos)
    table = token_bytes(tokenizer)
    val = {
        shards.name: ValidationWindows(shards.val, sequence_length=length, pad_id=shards.eos_id)
        for shards in corpora
        if len(shards.val) > 1
    }
    infos = [_info(shards, weights.get(shards.name, 0.0)) for shards in corpora]
    for shards in corpora:
        _warn_if_lossy(shards, table)
    sha = tokenizer_hash(file, eos)
    told = [(s.name, s.digest, weights.get(s.name, 0.0)) for s in corpora]
    apart = ["documents apart"] * bool(config.get("block_cross_document_attention"))
    phases = [
        (phase.until, list(own.items())) for phase, own in zip(data_phases(config), shares.phases, strict=False)
    ] * (shares.phases != [weights])
    mark = cached.fingerprint("data", 1, sha, length, told, *apart, *phases)
    return TokenData(tokenizer, train, val, table, infos, mark, kind, sha)


def _info(shards: Shards, weight: float) -> CorpusInfo:
    return CorpusInfo(
        name=shards.name,
        weight=weight,
        train_tokens=len(shards.train),
        val_tokens=len(shards.val),
        train_documents=shards.train_documents,
        val_documents=shards.val_documents,
        train_bytes=shards.train_bytes,
        val_bytes=shards.val_bytes,
        unigram_entropy=shards.unigram_entropy,
        val_entropy=shards.val_entropy,
    )


def _warn_if_lossy(shards: Shards, table: np.ndarray) -> None:
    """Bits per byte divide by the bytes behind the tokens; says so where a given tokenizer drops part of the text."""
    counted = shards.val_bytes if len(shards.val) > 2**24 else int(table[shards.val.read(0, len(shards.val))].sum())
    if abs(counted - shards.val_bytes) > 0.001 * shards.val_bytes:
        share = counted / shards.val_bytes
        log.warning(
            "the tokenizer keeps %.1f %% of the bytes of %s: bits per byte count those", 100 * share, shards.name
        )
