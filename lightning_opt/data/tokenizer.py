"""The tokenizer: byte-level BPE trained on the spot, or any local ``tokenizer.json``."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_opt.plan import ConfigError, check_value, hub_said, is_hub_id

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
WELL_KNOWN_EOS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>", "[EOS]", "<|im_end|>")
TOKENIZER = "tokenizer.json"
BESIDE = ("tokenizer_config.json", "special_tokens_map.json")
SAMPLE_BYTES = 6_000_000
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE (as GPT-2's, but every digit stands alone, so that numbers have one spelling).

    Any text survives encoding and decoding unchanged, because the alphabet is all 256 bytes.

    Args:
        texts: documents; the iterable is consumed once.
        vocab_size: entries including the 256 bytes and the end of text; small data may yield fewer.

    Returns:
        A ``tokenizers.Tokenizer``, the same for the same texts.

    Raises:
        ConfigError: ``vocab_size`` is too small for the byte alphabet.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    check_value("data.tokenizer.vocab_size", vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_trained(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a tokenizer of `train_tokenizer` as transformers reads it."""
    tokenizer.save(str(folder / TOKENIZER))
    beside = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    (folder / BESIDE[0]).write_text(json.dumps(beside, indent=1), encoding="utf-8")


def tokenizer_file(path: str | Path) -> Path:
    """The ``tokenizer.json`` that ``data.tokenizer.path`` means: the file itself, or that of a folder or a hub id.

    Raises:
        ConfigError: there is none.
        HubLost: the hub does not answer, and has not been asked before.
    """
    if is_hub_id(str(path)):
        return _from_hub(str(path))
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError("data.tokenizer.path", str(path), "must be a tokenizer.json, or a folder that holds one")
    return file


def _from_hub(name: str) -> Path:
    """Fetches a hub model's tokenizer into the hub's own cache, with the small files beside it that name its tokens."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        file = Path(hf_hub_download(name, "tokenizer.json"))
        for beside in BESIDE:
            with contextlib.suppress(EntryNotFoundError):  # not every model has them
                hf_hub_download(name, beside)
    except Exception as error:
        instead = "a folder with its tokenizer.json can stand for it: data.tokenizer.path=FOLDER"
        if said := hub_said("data.tokenizer.path", "", name, error, instead):
            raise said from None
        raise
    return file


def find_eos(file: Path, asked: str | None = None) -> str:
    """The end-of-text token of a tokenizer file, found without loading it (no torch, no tokenizers).

    Order: ``asked``; ``eos_token`` in tokenizer_config.json or special_tokens_map.json beside it; well-known names.

    Raises:
        ConfigError: none found, or the one asked for is not in the vocabulary.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        known = {token["content"] for token in content.get("added_tokens") or []}
        vocabulary = content["model"]["vocab"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError("data.tokenizer.path", str(file), "must be written by Hugging Face tokenizers") from None
    known |= set(vocabulary) if isinstance(vocabulary, dict) else {entry[0] for entry in vocabulary}
    if asked is not None:
        if asked not in known:
            raise ConfigError("data.tokenizer.eos", asked, f"must be a token of {file.name}")
        return asked
    for name in BESIDE:
        try:
            token = json.loads((file.parent / name).read_text(encoding="utf-8")).get("eos_token")
        except (OSError, ValueError):
            continue
        token = token.get("content") if isinstance(token, dict) else token
        if token in known:
            return token
    for token in WELL_KNOWN_EOS:
        if token in known:
            return token
    how = """e.g. 'data.tokenizer.eos="</s>"'"""
    raise ConfigError("data.tokenizer.eos", None, f"must name the end-of-text token of {file.name}, {how}")


def vocabulary_of(file: Path) -> dict[str, int]:
    """Token to id, added tokens too, of a file of which `find_eos` knows that it is a tokenizer's."""
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    if not isinstance(vocabulary, dict):
        vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
    return vocabulary | {token["content"]: token["id"] for token in content.get("added_tokens") or []}


def load_tokenizer(path: str | Path, eos: str | None = None) -> PreTrainedTokenizerFast:
    """Loads a local tokenizer for transformers and lm-eval, with its end-of-text token set.

    Args:
        path: ``tokenizer.json`` or a folder with one.
        eos: the end-of-text token; found as ``find_eos`` says when None.

    Raises:
        ConfigError: no such file, or no end-of-text token.
    """
    from transformers import PreTrainedTokenizerFast

    file = tokenizer_file(path)
    eos = find_eos(file, eos)
    named: dict[str, Any] = {"eos_token": eos, "clean_up_tokenization_spaces": False}
    try:
        beside = json.loads((file.parent / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        beside = {}
    for key in ("bos_token", "unk_token", "pad_token", "chat_template"):
        value = beside.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            named[key] = value
    return PreTrainedTokenizerFast(tokenizer_file=str(file), **named)


def tokenizer_hash(file: Path, eos: str) -> str:
    """sha256 over the tokenizer file and its end-of-text token: what the shards depend on."""
    return hashlib.sha256(file.read_bytes() + b"\0" + eos.encode()).hexdigest()


def for_documents(file: Path) -> Tokenizer:
    """The tokenizer as documents see it: what looks like a special token in a text is encoded as the text it is."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def token_bytes(tokenizer: Tokenizer | PreTrainedTokenizerFast) -> np.ndarray:
    """Bytes of text behind each token, for bits per byte.

    For a byte-level tokenizer the sum over a text's tokens is the text's UTF-8 length. Special tokens count 0: they are
    no text. For others (``▁`` and ``<0x0A>`` of sentencepiece, ``##`` of WordPiece) it is as near as the vocabulary
    tells.

    Returns:
        int32 array of shape (vocab,).
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    added = backend.get_added_tokens_decoder()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    state = json.loads(backend.to_str())
    parts = json.dumps([state.get("decoder"), state.get("pre_tokenizer")])
    byte_level = '"ByteLevel"' in parts
    table = np.zeros(max(vocabulary.values()) + 1, dtype=np.int32)
    for token, index in vocabulary.items():
        if index in added:
            table[index] = 0 if added[index].special else len(token.encode("utf-8"))
        elif byte_level:
            table[index] = len(token)  # one character stands for one byte
        elif _BYTE_TOKEN.fullmatch(token):
            table[index] = 1
        else:
            table[index] = len(token.replace("▁", " ").removeprefix("##").encode("utf-8"))
    return table
