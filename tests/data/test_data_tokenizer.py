"""The trained tokenizer, given ones, and the table of bytes."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from data_samples import make_texts
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from lightning_opt import data
from lightning_opt.data import tokenizer as t
from lightning_opt.plan import ConfigError, HubLost


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    t.train_tokenizer(make_texts(300), 330).save(str(file))
    return file


ODD_TEXTS = [
    "", " ", "\n\n\t ", "\r\n", "\0", "naïve café", "数学と🙂", "👩‍👩‍👧‍👦",
    "\u202eright to left", "e\u0301 é", "<|endoftext|>",
    "a<|endoftext|>b", "  two  spaces  ", "007 1234567890", "don't can't .", "\ufeffbom", "\U0010ffff", "ﬀ ½ Ⅷ",
]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_survives_and_its_bytes_are_counted(trained: Path, text: str) -> None:
    check_round_trip(trained, text)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_texts_survive(trained: Path, text: str) -> None:
    check_round_trip(trained, text)


def check_round_trip(file: Path, text: str) -> None:
    tokenizer, fast, table = loaded(file)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert fast.decode(ids, skip_special_tokens=False) == text
    assert table[ids].sum() == len(text.encode("utf-8"))
    assert tokenizer.token_to_id(t.END_OF_TEXT) not in ids  # a text cannot end a document


@functools.cache
def loaded(file: Path) -> tuple:
    return t.for_documents(file), t.load_tokenizer(file), t.token_bytes(t.for_documents(file))


def test_digits_stand_alone(trained: Path) -> None:
    tokens = t.for_documents(trained).encode("12345 + 67").tokens
    assert [token for token in tokens if any(c.isdigit() for c in token)] == list("1234567")


def test_transformers_sees_the_same_ids_and_the_end(trained: Path) -> None:
    fast = t.load_tokenizer(trained)
    text = "the old house 12 🙂"
    assert fast(text)["input_ids"] == t.for_documents(trained).encode(text).ids
    assert fast.eos_token == "<|endoftext|>"
    assert fast("a<|endoftext|>")["input_ids"][-1] == fast.eos_token_id
    assert len(fast) == 330
    assert t.token_bytes(fast)[fast.eos_token_id] == 0


def test_training_is_the_same_in_another_process_whatever_its_threads(tmp_path: Path, trained: Path) -> None:
    script = (
        "import sys; from lightning_opt.data.tokenizer import train_tokenizer; from data_samples import make_texts;"
        "train_tokenizer(make_texts(300), 330).save(sys.argv[1])"
    )
    for parallel in ("true", "false"):
        file = tmp_path / f"{parallel}.json"
        environment = {
            **os.environ,
            "TOKENIZERS_PARALLELISM": parallel,
            "PYTHONHASHSEED": "7",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        subprocess.run([sys.executable, "-c", script, str(file)], check=True, env=environment)
        assert file.read_bytes() == trained.read_bytes()


def test_a_vocabulary_smaller_than_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.vocab_size = 256: must be a whole number >= 257"):
        t.train_tokenizer(["x"], 256)
    assert t.train_tokenizer(["x"], 257).get_vocab_size() == 257


def test_gpt2_gives_the_ids_everybody_knows(shared_data: Path) -> None:
    file = shared_data / "tokenizers" / "gpt2.tokenizer.json"
    tokenizer = t.for_documents(file)
    assert tokenizer.encode("Hello world").ids == [15496, 995]
    assert tokenizer.encode("Hello, my dog is cute").ids == [15496, 11, 616, 3290, 318, 13779]
    assert t.find_eos(file) == "<|endoftext|>"
    fast = t.load_tokenizer(file)
    assert (fast.eos_token_id, len(fast)) == (50256, 50257)
    for text in ODD_TEXTS:
        check_round_trip(file, text)


def word_level(folder: Path, words: list[str]) -> Path:
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_the_end_token_is_found_beside_a_given_tokenizer(tmp_path: Path) -> None:
    folder = word_level(tmp_path / "a", ["[UNK]", "STOP", "</s>", "word"])
    file = t.tokenizer_file(folder)
    assert t.find_eos(file) == "</s>"
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "STOP"}}))
    assert t.find_eos(file) == "STOP"
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "word", "unk_token": "[UNK]"}))
    assert t.find_eos(file) == "word"
    assert t.find_eos(file, "</s>") == "</s>"
    assert t.load_tokenizer(folder, "</s>").eos_token == "</s>"
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.eos = nope"):
        t.find_eos(file, "nope")


def test_a_tokenizer_without_an_end_says_how_to_name_it(tmp_path: Path) -> None:
    file = t.tokenizer_file(word_level(tmp_path / "a", ["[UNK]", "x"]))
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.eos = null: .*data\.tokenizer\.eos="):
        t.find_eos(file)
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.path"):
        t.tokenizer_file(tmp_path / "missing.json")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ConfigError, match="Hugging Face"):
        t.find_eos(tmp_path / "x.json")


def test_bytes_of_a_sentencepiece_like_vocabulary() -> None:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        special_tokens=["<unk>", "</s>", *(f"<0x{k:02X}>" for k in range(256))], vocab_size=400, show_progress=False
    )
    tokenizer.train_from_iterator(["größe der Häuser"] * 10, trainer)
    table = t.token_bytes(tokenizer)
    assert table[tokenizer.token_to_id("</s>")] == 0
    ids = tokenizer.encode("größe der Häuser").ids
    assert table[ids].sum() == len(" größe der Häuser".encode())


def answered(kind: type[HfHubHTTPError]) -> HfHubHTTPError:
    return kind("the hub said no", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]


class TestFromTheHub:
    def test_checked_without_asking_and_refused_in_one_line_where_it_cannot_be_had(
        self, config: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = config(tokenizer={"path": "some-org/no-such-model", "vocab_size": None, "eos": None})
        data.check(given)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(HubLost, match=r"^data\.tokenizer\.path = some-org/no-such-model: the hub") as caught:
            data.build(given, seed=1)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("error", "kind", "said"),
        [
            (HTTPError("refused"), HubLost, "gave up on us .*data.tokenizer.path=FOLDER"),
            (answered(HfHubHTTPError), HubLost, "gave up on us"),
            (answered(RepositoryNotFoundError), ConfigError, "must be a model on the hub"),
            (answered(RemoteEntryNotFoundError), ConfigError, "must hold what is read of it"),
            (PermissionError("no disk of yours"), PermissionError, "no disk of yours"),
        ],
    )
    def test_a_hub_that_is_lost_is_no_mistake_in_the_config(
        self, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], said: str
    ) -> None:
        def refuse(*_: object) -> None:
            if kind is not HubLost:
                raise error
            raise LocalEntryNotFoundError("cannot be found") from error  # as huggingface_hub says it

        monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
        with pytest.raises(kind, match=said):
            t.tokenizer_file("some-org/model")

    def test_used_from_the_hubs_own_cache(
        self, config: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        snapshot = tmp_path / "hub" / "models--some-org--model" / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
        t.train_tokenizer(make_texts(50), 281).save(str(snapshot / "tokenizer.json"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        built = data.build(config(tokenizer={"path": "some-org/model", "vocab_size": None, "eos": None}), seed=1)
        assert (built.tokenizer_kind, built.vocab_size) == ("given", 281)


def test_a_gated_tokenizer_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def refuse(*_: object) -> None:
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    page = r"accept its terms at https://huggingface\.co/meta-llama/Meta-Llama-3\.1-8B, then `hf auth login`"
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.path = meta-llama/Meta-Llama-3\.1-8B: .*" + page):
        t.tokenizer_file("meta-llama/Meta-Llama-3.1-8B")
