"""What can be known wrong about ``config["data"]`` before anything is read or torch is imported."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_opt.data.cached import Damaged
from lightning_opt.data.shards import PLAN, RECORD, WORK, read_index
from lightning_opt.data.shares import corpus_shares
from lightning_opt.data.text_files import discover
from lightning_opt.data.tokenizer import find_eos, tokenizer_file, tokenizer_hash, vocabulary_of
from lightning_opt.plan import ConfigError, HubLost, check_value, is_hub_id, one_of

log = logging.getLogger("lightning_opt.data")

EMBEDDED_CORPORA = ("code", "math", "prose")


def check(config: Mapping[str, Any], *, tokens: int | None = None) -> None:
    """Checks the data part of a config; imports neither torch nor transformers.

    Args:
        config: ``config["data"]``.
        tokens: how many the run will train on, for the prepare command's sake.

    Raises:
        ConfigError: the first thing that is wrong, in one line.
    """
    for name in ("source", "sequence_length", "num_workers", "val_fraction"):
        if name in config:
            check_value(f"data.{name}", config[name])
    source = config.get("source")
    if source == "prepared":
        check_prepared(config, tokens=tokens)
        return
    tokenizer = config.get("tokenizer") or {}
    if tokenizer.get("path"):
        if not is_hub_id(tokenizer["path"]):  # the hub is asked only when the run needs its answer
            find_eos(tokenizer_file(tokenizer["path"]), tokenizer.get("eos"))
    elif check_value("data.tokenizer.vocab_size", tokenizer.get("vocab_size")) is None:
        raise ConfigError("data.tokenizer.vocab_size", None, "must be a number: a tokenizer is trained on the text")
    if source == "embedded":
        corpus_shares(config, list(EMBEDDED_CORPORA))
        return
    if not config.get("path"):
        raise ConfigError("data.path", config.get("path"), "must be a folder of text files, e.g. data.path=my_texts")
    corpus_shares(config, list(discover(config["path"])))


def prepare_command(config: Mapping[str, Any], tokens: int | None) -> str:
    """The command that makes the shards this config asks for, or, where some were made, makes them again."""
    record = _record(config, RECORD) or _record(config, f"{WORK}/{RECORD}")
    if record.get("arguments"):
        words = [*record["arguments"], f"data.path={config['path']}"]
        return shlex.join(["python", "-m", "recipes.prepare_data", *words])
    tokens = record.get("settings", {}).get("tokens", tokens)
    words = ["python -m recipes.prepare_data", f"data={config.get('name')}"]
    if config.get("path"):
        words.append(f"data.path={config['path']}")
    words.append(f"tokens={tokens}" if tokens else "tokens=...")
    return " ".join(words)


def _record(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a preparation left of itself in this file of the folder; empty where there is none."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        record = json.loads(Path(config.get("path"), name).read_text(encoding="utf-8"))
        return record if isinstance(record, dict) else {}
    return {}


def check_prepared(config: Mapping[str, Any], *, tokens: int | None = None, ask_hub: bool = False) -> dict[str, Path]:
    """Finds the prepared shards: one sub-folder per corpus and ``tokenizer.json`` beside them.

    Args:
        config: ``config["data"]``.
        tokens: how many the run will train on, for the prepare command's sake.
        ask_hub: whether a model that is trained further, and named by its hub id, is asked for its tokenizer.

    Returns:
        Corpus -> folder, sorted; corpora without training tokens are for validation only.

    Raises:
        ConfigError: something is missing, truncated or of another tokenizer; names it and the prepare command.
    """
    command = prepare_command(config, tokens)
    path = config.get("path")
    if not path or not Path(path).is_dir():
        raise ConfigError("data.path", path, f"must be a folder of prepared shards; make them: {command}")
    folder, record = Path(path), _record(config, RECORD)
    if (folder / WORK / PLAN).is_file():
        problem = f"must be whole, but its preparation is not over; go on with it: {command}"
        raise ConfigError("data.path", str(folder), problem)
    indexes = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith((".", "tokenizer")):
            try:
                indexes[entry.name] = read_index(entry)
            except Damaged as damage:
                problem = f"must be whole, but {damage}; make it again: {command}"
                raise ConfigError("data.path", str(folder), problem) from None
    if not indexes:
        raise ConfigError("data.path", str(folder), f"must hold prepared shards; make them: {command}")
    if gone := [name for name in record.get("corpora", []) if name not in indexes]:
        problem = f"must hold all that was prepared, but {', '.join(gone)} is not there; make it again: {command}"
        raise ConfigError("data.path", str(folder), problem)
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError("data.path", str(folder), f"must hold the shards' tokenizer.json; make it again: {command}")
    train = [name for name, index in indexes.items() if index["splits"]["train"]["tokens"]]
    weights = config.get("weights")
    for name, weight in weights.items() if isinstance(weights, Mapping) else ():
        if weight and name not in train:
            if not record:
                raise ConfigError("data.path", str(folder), f"must hold shards of corpus {name}; make them: {command}")
            raise ConfigError(f"data.weights.{name}", weight, _no_training_text(folder, record, name, train))
    corpus_shares(config, train)
    if not any(index["splits"]["val"]["tokens"] for index in indexes.values()):
        how = "prepare others, in another data.path, with more tokens or a larger data.corpora.NAME.val_fraction"
        how = f"but nothing was held out: {how}" if record else f"make them: {command}"
        raise ConfigError("data.path", str(folder), f"must hold validation shards; {how}")
    if len({index["tokenizer_sha256"] for index in indexes.values()}) > 1:
        raise ConfigError("data.path", str(folder), "must be shards of one tokenizer, but they differ")
    index = next(iter(indexes.values()))
    if index["tokenizer_sha256"] != tokenizer_hash(folder / "tokenizer.json", index["eos"]):
        how = f"must be shards of the tokenizer.json beside them, which is another now; make it again: {command}"
        raise ConfigError("data.path", str(folder), how)
    model = (config.get("tokenizer") or {}).get("of_model")
    if model and (ask_hub or not is_hub_id(model)):
        _check_ids(folder, model, index["eos"], config["tokenizer"].get("eos"))
    return {name: folder / name for name in indexes}


def _no_training_text(folder: Path, record: Mapping[str, Any], name: str, train: list[str]) -> str:
    """Why a corpus that is given a weight has no training shards."""
    if name in record.get("corpora", []):
        return "must be 0: it is for validation alone"
    if name in record.get("settings", {}).get("corpora", {}):
        return f"must be 0: the shards of {folder} were prepared without it"
    return f"its name {one_of(name, train)}"


def _check_ids(folder: Path, model: str, eos: str, asked: str | None) -> None:
    """Refuses shards whose ids mean something else to the model; one without a tokenizer.json is taken as it is."""
    try:
        file = tokenizer_file(model)
        own = find_eos(file, asked)
    except (ConfigError, HubLost) as error:
        log.debug("%s: its tokenizer is not compared with that of the shards: %s", model, error)
        return
    known = vocabulary_of(file)
    other = [token for token, number in vocabulary_of(folder / "tokenizer.json").items() if known.get(token) != number]
    again = f"data.tokenizer.path={model}, and another data.path, when they are prepared"
    if other:
        what = f"must hold the ids of {model}'s own tokenizer, but {len(other):,} tokens have others ({other[0]!r})"
        raise ConfigError("data.path", str(folder), f"{what}: {again}")
    if own != eos:
        raise ConfigError(
            "data.path",
            str(folder),
            f"must end documents by {model}'s {own}, not by {eos}: {again}; "
            f"""or 'data.tokenizer.eos="{eos}"', where that is meant""",
        )
