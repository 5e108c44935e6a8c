"""What `recipes.prepare_data` is asked for, checked, and the plan that it makes of it once and then keeps to."""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_opt.data import origins, text_files
from lightning_opt.data.cached import replace_text
from lightning_opt.data.decontamination import Ngrams, evaluation_files, identity
from lightning_opt.data.origins import Origin
from lightning_opt.data.shards import PLAN, TokenizerFacts, size_of
from lightning_opt.data.shares import corpus_shares
from lightning_opt.data.tokenizer import (
    BESIDE,
    END_OF_TEXT,
    SAMPLE_BYTES,
    TOKENIZER,
    find_eos,
    for_documents,
    save_trained,
    tokenizer_file,
    tokenizer_hash,
    train_tokenizer,
)
from lightning_opt.plan import ConfigError, check_value, data_phases, one_of

log = logging.getLogger("lightning_opt.data")

FORMAT = 2
SPREAD_FILES = 64
LEAST_QUOTA = 100_000
NGRAMS = "ngrams.npz"
_SAMPLED_FILES = 8
_ENTRY = ("repo", "path", "revision", "files", "column", "val_tokens", "val_fraction")


@dataclass(frozen=True)
class CorpusPlan:
    """One corpus of a plan.

    Attributes:
        name: of the corpus.
        origin: where its files lie.
        files: (name, bytes) in the order in which they are read.
        goal: tokens wanted of ``split``.
        split: ``train``, or ``val`` for a corpus that is for validation alone.
        column: where the text stands, or None.
        val_fraction: share of the documents held out of training.
    """

    name: str
    origin: Origin
    files: list[tuple[str, int]]
    goal: int
    split: str
    column: str | None
    val_fraction: float

    @property
    def quota(self) -> int:
        """Tokens taken of one file before it is the next one's turn, so that little text too comes from many files."""
        share = math.ceil(self.goal / min(SPREAD_FILES, len(self.files)))
        return min(max(share, LEAST_QUOTA), self.goal)


@dataclass(frozen=True)
class Plan:
    """What is to be made, down to the files' order; the shards are a function of it.

    Attributes:
        settings: what was asked for.
        corpora: in order of their names.
        eos: the tokenizer's end of text.
        folder: holds ``tokenizer.json`` and, where documents are to be left out, the n-grams.
    """

    settings: dict[str, Any]
    corpora: list[CorpusPlan]
    eos: str
    folder: Path

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's file."""
        return self.folder / TOKENIZER

    @property
    def ngrams(self) -> Path | None:
        """The evaluation sets' n-grams, where documents that touch them are left out."""
        return self.folder / NGRAMS if self.settings["decontaminate"] else None

    def facts(self) -> TokenizerFacts:
        """Of the tokenizer."""
        tokenizer = for_documents(self.tokenizer)
        eos_id = tokenizer.token_to_id(self.eos)
        return TokenizerFacts(tokenizer_hash(self.tokenizer, self.eos), self.eos, eos_id, size_of(tokenizer))


def asked(config: Mapping[str, Any], tokens: Any) -> dict[str, Any]:
    """The settings that decide what the shards hold, checked; reads nothing but evaluation sets.

    Args:
        config: ``config["data"]``.
        tokens: training tokens of all corpora together.

    Raises:
        ConfigError: the first thing that is wrong.
    """
    if config.get("source") != "prepared":
        how = "only data=... with source: prepared is made beforehand; train.py makes the others' shards itself"
        raise ConfigError("data.source", config.get("source"), how)
    tokens = check_value("prepare.tokens", tokens, field="tokens")
    if not config.get("path"):
        raise ConfigError("data.path", config.get("path"), "must name the folder of shards to make")
    corpora = {name: _entry(name, entry) for name, entry in (config.get("corpora") or {}).items() if entry}
    train = [name for name, entry in corpora.items() if entry["val_tokens"] is None]
    if not train:
        raise ConfigError("data.corpora", config.get("corpora"), "must name a corpus, {web: {repo: OWNER/NAME}}")
    if len(train) == len(corpora) and not any(entry["val_fraction"] for entry in corpora.values()):
        how = "must hold a corpus with val_tokens, or one with a val_fraction: training needs validation text"
        example = f"data.corpora.{train[0]}.val_fraction=0.001"
        raise ConfigError("data.corpora", list(corpora), f"{how}, for example {example}")
    tokenizer = config.get("tokenizer") or {}
    if not tokenizer.get("path") and check_value("data.tokenizer.vocab_size", tokenizer.get("vocab_size")) is None:
        how = "must be a number where data.tokenizer.path is null: a tokenizer is then trained on the text"
        raise ConfigError("data.tokenizer.vocab_size", None, how)
    sets = config.get("decontaminate")
    return {
        "format": FORMAT,
        "tokens": tokens,
        "corpora": dict(sorted(corpora.items())),
        "weights": {name: share for name, share in _shares(config, train).items() if share},
        "tokenizer": {key: tokenizer.get(key) for key in ("path", "vocab_size", "eos")},
        "decontaminate": identity(sets) if sets else None,
        "root": config.get("root"),
    }


def _shares(config: Mapping[str, Any], names: list[str]) -> dict[str, float]:
    """Each corpus's share of the whole run: where weights change along it, the mean over its phases."""
    shares, phases = corpus_shares(config, names), data_phases(config)
    if len(shares.phases) == 1:
        return shares.phases[0]
    ends = [0.0, *(phase.until for phase in phases[:-1]), 1.0]
    if not all(isinstance(end, float) for end in ends):
        how = (
            "must end its phases at fractions of the run while data is prepared: how long the run is, is not known here"
        )
        raise ConfigError("data.phases", config["phases"], how)
    lengths = [later - sooner for sooner, later in itertools.pairwise(ends)]
    return {name: sum(length * s[name] for length, s in zip(lengths, shares.phases, strict=True)) for name in names}


def _entry(name: str, entry: Any) -> dict[str, Any]:
    field = f"data.corpora.{name}"
    if not re.fullmatch(r"(?!tokenizer)[\w-]+", name):
        raise ConfigError(field, name, "must be a name of letters, digits, _ and -, that does not begin with tokenizer")
    if not isinstance(entry, Mapping) or bool(entry.get("repo")) == bool(entry.get("path")):
        raise ConfigError(field, entry, "must name either repo: OWNER/NAME on the hub, or path: FOLDER")
    for key in entry:
        if key not in _ENTRY:
            raise ConfigError(f"{field}.{key}", entry[key], one_of(key, _ENTRY))
    for key in ("repo", "path", "revision", "column"):
        check_value(f"data.corpora.*.{key}", entry.get(key), field=f"{field}.{key}")
    patterns = entry.get("files") or [f"*{suffix}" for suffix in text_files.SUFFIXES]
    if not isinstance(patterns, str | list | tuple) or not all(isinstance(one, str) for one in patterns):
        raise ConfigError(f"{field}.files", patterns, 'must be a pattern or a list of them, for example "*.jsonl"')
    return {
        "repo": entry.get("repo"),
        "path": entry.get("path"),
        "revision": entry.get("revision"),
        "files": [patterns] if isinstance(patterns, str) else list(patterns),
        "column": entry.get("column"),
        "val_tokens": check_value("data.corpora.*.val_tokens", entry.get("val_tokens"), field=f"{field}.val_tokens"),
        "val_fraction": check_value(
            "data.corpora.*.val_fraction", entry.get("val_fraction") or 0, field=f"{field}.val_fraction"
        ),
    }


def make_plan(config: Mapping[str, Any], settings: dict[str, Any], folder: Path) -> Plan:
    """Asks the hub what there is, and makes or fetches the tokenizer; writes into ``folder``, the plan itself last.

    Raises:
        ConfigError: a corpus or the tokenizer cannot be had, or the disk is too small.
    """
    corpora = find_corpora(settings)
    folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(settings, corpora, make_tokenizer(settings, corpora, folder), folder)
    check_disk(plan, Path(config["path"]))
    save_plan(plan, config)
    return plan


def save_plan(plan: Plan, config: Mapping[str, Any]) -> None:
    """Writes the plan into its folder, after the n-grams of the evaluation sets that it leaves out.

    Raises:
        ConfigError: an evaluation set cannot be read.
    """
    if plan.ngrams:
        Ngrams.of(evaluation_files(config["decontaminate"])).save(plan.ngrams)
    record = {"settings": plan.settings, "eos": plan.eos, "corpora": [asdict(corpus) for corpus in plan.corpora]}
    replace_text(plan.folder / PLAN, json.dumps(record))


def read_plan(folder: Path) -> Plan | None:
    """The plan that was made in this folder, or None."""
    try:
        record = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    corpora = []
    for entry in record["corpora"]:
        listed = [(name, size) for name, size in entry["files"]]
        corpora.append(CorpusPlan(**{**entry, "origin": Origin(**entry["origin"]), "files": listed}))
    return Plan(record["settings"], corpora, record["eos"], folder)


def find_corpora(settings: Mapping[str, Any]) -> list[CorpusPlan]:
    """Locates the files of every corpus that is used.

    Raises:
        ConfigError: no such data set or files, or no access.
    """
    found = []
    for name, entry in settings["corpora"].items():
        share = settings["weights"].get(name)
        if entry["val_tokens"] is None and share is None:
            continue  # weight 0
        origin = origins.locate(name, entry, settings["root"])
        listed = origins.in_reading_order(origins.files(origin, entry["files"]))
        goal = entry["val_tokens"] if share is None else max(round(share * settings["tokens"]), 1)
        split = "val" if share is None else "train"
        found.append(CorpusPlan(name, origin, listed, goal, split, entry["column"], entry["val_fraction"]))
    return found


def make_tokenizer(settings: Mapping[str, Any], corpora: list[CorpusPlan], folder: Path) -> str:
    """Puts the tokenizer into ``folder``; its end-of-text token.

    Raises:
        ConfigError: it cannot be had.
    """
    given = settings["tokenizer"]
    if not given["path"]:
        save_trained(train_tokenizer(_sample(settings, corpora), given["vocab_size"]), folder)
        return END_OF_TEXT
    file = tokenizer_file(given["path"])
    eos = find_eos(file, given["eos"])
    shutil.copyfile(file, folder / TOKENIZER)
    for name in BESIDE:
        if (file.parent / name).is_file():
            shutil.copyfile(file.parent / name, folder / name)
    return eos


def check_disk(plan: Plan, target: Path) -> int:
    """The bytes that the shards will take at most.

    Raises:
        ConfigError: the disk of ``target``, which need not be there yet, has not so many left.
    """
    most = [min(corpus.goal, 2 * sum(size for _, size in corpus.files)) for corpus in plan.corpora]
    needed = sum(most) * plan.facts().dtype.itemsize  # two tokens per byte of a file: text as packed as text can be
    free = shutil.disk_usage(existing(target)).free
    if needed > free:
        how = f"must lie on a disk with {needed / 1e9:.1f} GB free, there are {free / 1e9:.1f}"
        raise ConfigError("data.path", str(target), how)
    return needed


def existing(path: Path) -> Path:
    """The path, or the nearest above it that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def _sample(settings: Mapping[str, Any], corpora: list[CorpusPlan]) -> Iterator[str]:
    """Training documents in the mixture's proportions: of each corpus the first parts of a few files."""
    total = max(SAMPLE_BYTES, 2_000 * settings["tokenizer"]["vocab_size"])
    for corpus in corpora:
        files = corpus.files[:_SAMPLED_FILES]
        for name, size in files if corpus.split == "train" else ():
            room = total * settings["weights"][corpus.name] / len(files)
            for text in first_documents(corpus, name, size):
                if text_files.draw(text) >= corpus.val_fraction:
                    room -= len(text.encode("utf-8"))
                    yield text
                if room <= 0:
                    break


def first_documents(corpus: CorpusPlan, name: str, size: int, on_bytes: Any = None) -> Iterator[str]:
    """The documents of one of its files from the start on."""
    suffix = text_files.suffix_of(Path(name))
    assert suffix
    reading = text_files.Reading(name, suffix, corpus.origin.field, corpus.column, on_bytes=on_bytes)
    with corpus.origin.open(name, size) as raw:
        yield from filter(None, reading.rows(raw))
