"""Runs of 13 words shared with evaluation sets: against sets of tuples, on planted and on real text."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from data_samples import make_texts, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from prepare_samples import study

from lightning_opt.data import preparing
from lightning_opt.data import tokenizer as t
from lightning_opt.data.decontamination import Ngrams, evaluation_files, identity
from lightning_opt.data.shards import open_shards
from lightning_opt.plan import ConfigError

ITEM = "The quick brown fox jumps over the lazy dog while seven wise owls look on in silence"  # 17 words


def grams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[k : k + 13]) for k in range(len(words) - 12)}


def strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner: Iterable = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in inner for text in strings(part)]


def seams(item: dict[str, object]) -> list[str]:
    """Every field, and every string of a list, behind every other: of both only what a run over the seam can hold."""
    parts = [(key, text) for key in item if (texts := strings(item[key])) for text in {*texts, " ".join(texts)}]
    last = {text: " ".join(re.findall(r"\w+", text)[-12:]) for _, text in parts}
    first = {text: " ".join(re.findall(r"\w+", text)[:12]) for _, text in parts}
    return [f"{last[a]} {first[b]}" for one, a in parts for other, b in parts if one != other]


def test_items_as_they_are_shown_are_found_whatever_column_lies_between(shared_data: Path) -> None:
    """The hub's order of columns is question, subject, choices, answer; HellaSwag's context comes before any ending."""
    read = (shared_data / "eval" / "mmlu_test.jsonl").read_text(encoding="utf-8").splitlines()
    found = Ngrams.of([shared_data / "eval" / "mmlu_test.jsonl"])
    items = [json.loads(line) for line in read]
    assert list(items[0]) == ["question", "subject", "choices", "answer"]
    texts = [f"{item['question']}\n{' '.join(item['choices'])}" for item in items]
    texts += [f"{item['question']} {item['choices'][item['answer']]}" for item in items]
    long = [text for text in texts if grams(text)]
    assert len(long) > 2000
    assert [text for text in long if not found.touches(text)] == []
    read = (shared_data / "eval" / "hellaswag_val.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    found = Ngrams.of([shared_data / "eval" / "hellaswag_val.jsonl"])
    for item in map(json.loads, read):
        seam = re.findall(r"\w+", item["ctx"])[-6:] + re.findall(r"\w+", item["endings"][int(item["label"])])[:7]
        assert len(seam) < 13 or found.touches(" ".join(seam))


def test_sets_of_one_name_in_two_folders_are_two(tmp_path: Path) -> None:
    for place in ("x", "y"):
        write_jsonl(tmp_path / place / "test.jsonl", [f"{ITEM} {place}"], "q")
    both = identity(tmp_path)
    assert [name for name, _ in both] == ["x/test.jsonl", "y/test.jsonl"]
    write_jsonl(tmp_path / "x" / "test.jsonl", ["another"], "q")
    changed = identity(tmp_path)
    assert changed != both
    assert changed[1] == both[1]
    assert identity(tmp_path / "y" / "test.jsonl") == [["test.jsonl", both[1][1]]]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_jsonl(folder / "quiz.jsonl", [ITEM], "question")
    short = {"question": "one two three four five six", "choices": ["seven eight nine", "ten eleven twelve thirteen"]}
    (folder / "short.jsonl.gz").write_bytes(gzip.compress(json.dumps(short).encode()))
    words = pyarrow.table({"q": [" ".join(f"p{k}" for k in range(14))], "n": [1]})
    pyarrow.parquet.write_table(words, folder / "p.parquet")
    (folder / "notes.txt").write_text("not a set")
    return folder


@pytest.mark.parametrize(
    ("text", "touches"),
    [
        ("the QUICK brown -- fox, jumps over; the lazy\ndog while seven wise owls", True),  # 13 words
        ("the quick brown fox jumps over the lazy dog while seven wise", False),  # 12
        ("so: jumps over the lazy dog while seven wise owls look on in silence. End", True),
        ("the quick brown fox jumps over the lazy cat while seven wise owls look on in silence", False),
        ("one two three four five six seven eight nine ten eleven twelve thirteen", True),  # over two fields
        (" ".join(f"p{k}" for k in range(1, 14)), True),
        ("", False),
        ("dog " * 40, False),
    ],
)
def test_what_counts_as_shared(sets: Path, text: str, touches: bool) -> None:
    assert Ngrams.of(evaluation_files(sets)).touches(text) is touches


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from("abcd"), max_size=60), st.lists(st.sampled_from("abcd"), max_size=60))
def test_agrees_with_sets_of_tuples(tmp_path_factory: pytest.TempPathFactory, item: list[str], text: list[str]) -> None:
    """Few words, so that nearly equal runs are common."""
    folder = tmp_path_factory.mktemp("sets")
    text = text[:20] + item[5:20] + text[20:] if len(text) % 3 == 0 else text
    write_jsonl(folder / "a.jsonl", [" ".join(item)], "q")
    found = Ngrams.of([folder / "a.jsonl"])
    found.save(folder / "n.npz")
    expected = bool(grams(" ".join(item)) & grams(" ".join(text)))
    assert found.touches(" ".join(text)) == Ngrams.load(folder / "n.npz").touches(" ".join(text)) == expected


def test_real_sets_against_real_text(shared_data: Path) -> None:
    """MMLU and HellaSwag; into every tenth web document 13 words of an item are put."""
    files = [shared_data / "eval" / "mmlu_dev.jsonl", shared_data / "eval" / "hellaswag_val.jsonl"]
    found = Ngrams.of(files)
    known: set[tuple[str, ...]] = set()
    items = []
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            texts = strings(json.loads(line))
            items += texts
            for text in [*texts, " ".join(texts), *seams(json.loads(line))]:
                known |= grams(text)
    assert len(found.hashes) == len(known)
    long = [text for text in items if len(grams(text)) > 3]
    with (shared_data / "text" / "web_train.jsonl").open(encoding="utf-8") as lines:
        documents = [json.loads(line)["text"] for _, line in zip(range(200), lines, strict=False)]
    for number in range(0, 200, 10):
        words = re.findall(r"\w+", long[number])[2:15]
        documents[number] = documents[number][:500] + " " + " ".join(words).upper() + " " + documents[number][500:]
    told = [found.touches(document) for document in documents]
    assert told == [bool(grams(document) & known) for document in documents]
    assert sum(told) == 20


def test_documents_are_left_out_counted_and_the_sets_recorded(sets: Path, tmp_path: Path) -> None:
    texts = make_texts(60)
    dirty = [f"{text} {ITEM}" for text in texts[::6]]
    write_jsonl(tmp_path / "texts" / "a.jsonl", [dirty[k // 6] if k % 6 == 0 else text for k, text in enumerate(texts)])
    t.save_trained(t.train_tokenizer(make_texts(200), 300), tmp_path)
    entry = {"path": str(tmp_path / "texts"), "val_fraction": 0.1}
    changes = {"weights": None, "corpora": {"mine": entry}, "decontaminate": str(sets)}
    config = study(None, tmp_path / "shards", tmp_path / "tokenizer.json", **changes)
    (corpus,) = preparing.prepare(config, tokens=1e6, processes=1)
    assert corpus.removed == len(dirty) == 10
    assert sum(corpus.documents.values()) == 50
    made_from = json.loads((tmp_path / "shards" / "mine" / "index.json").read_text())["made_from"]
    assert [name for name, _ in made_from["decontaminated_by"]] == ["p.parquet", "quiz.jsonl", "short.jsonl.gz"]
    assert made_from["documents_removed"] == 10
    shards = open_shards(tmp_path / "shards" / "mine")
    assert shards.train_bytes + shards.val_bytes == sum(len(x.encode()) for k, x in enumerate(texts) if k % 6)
    write_jsonl(tmp_path / "sets" / "quiz.jsonl", ["another"], "question")
    with pytest.raises(ConfigError, match=r"holds shards of data\.decontaminate"):
        preparing.prepare({**config, "decontaminate": str(tmp_path / "sets")}, tokens=1e6)


def test_a_set_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(ConfigError, match=r"data\.decontaminate = .*: must be readable"):
        Ngrams.of(evaluation_files(tmp_path))
