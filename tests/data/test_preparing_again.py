"""The same preparation once more: made already, stopped, killed, damaged; always the same shards, to the byte."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_samples import make_texts, write_jsonl
from prepare_samples import content, study

from lightning_opt import data, plan
from lightning_opt.data import cached, orders, preparing, units
from lightning_opt.data import tokenizer as t
from lightning_opt.data.workforce import WorkerLost, Workforce
from lightning_opt.plan import ConfigError, HubLost

pytestmark = pytest.mark.usefixtures("small_quotas")


def test_the_same_command_again_finds_it_made_and_another_is_refused(
    made: tuple[dict[str, Any], list], monkeypatch: pytest.MonkeyPatch, tokenizer: Path
) -> None:
    config, report = made
    before = content(Path(config["path"]))
    monkeypatch.setattr(preparing, "_make", None)
    assert preparing.prepare(config, tokens=6000) == report
    with pytest.raises(ConfigError, match=r"tokens = 6000, not of 6001: name another data\.path, or delete it$"):
        preparing.prepare(config, tokens=6001)
    with pytest.raises(
        ConfigError, match=r"data\.weights\.dclm = 0\.6, not of 0\.3333: .*too: data\.weights\.starcoder, "
    ):
        preparing.prepare({**config, "weights": {"dclm": 1, "starcoder": 1, "proofpile": 1}}, tokens=6000)
    assert content(Path(config["path"])) == before


def test_a_killed_worker_is_said_and_the_next_call_goes_on(
    root: Path, tokenizer: Path, tmp_path: Path, made: tuple[dict[str, Any], list], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = study(root, tmp_path / "shards", tokenizer)
    give = Workforce.give

    def give_and_kill(self: Workforce, unit: units.Unit) -> None:
        give(self, unit)
        self._processes[0].kill()

    with monkeypatch.context() as patch:
        patch.setattr(Workforce, "give", give_and_kill)
        with pytest.raises(WorkerLost, match="was killed, most often for want of memory"):
            preparing.prepare(config, tokens=6000, processes=1)
    assert (tmp_path / "shards" / preparing.WORK / orders.PLAN).is_file()
    assert preparing.prepare(config, tokens=6000, processes=2) == made[1]
    assert content(tmp_path / "shards") == content(Path(made[0]["path"]))


def test_sizes_that_changed_since_the_plan_are_refused(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "texts" / "a.jsonl", make_texts(5))
    entry = {"path": str(tmp_path / "texts"), "val_fraction": 0.5}
    config = study(None, tmp_path / "shards", tokenizer, weights=None, corpora={"mine": entry})
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "_fill", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            preparing.prepare(config, tokens=100, processes=1)
    write_jsonl(tmp_path / "texts" / "a.jsonl", make_texts(6))
    with pytest.raises(ConfigError, match=r"must still be there with \d+ bytes, as when it was listed"):
        preparing.prepare(config, tokens=100, processes=1)


@pytest.fixture
def copy_of_made(made: tuple[dict[str, Any], list], tmp_path: Path) -> dict[str, Any]:
    shutil.copytree(made[0]["path"], tmp_path / "shards")
    return {**made[0], "path": str(tmp_path / "shards")}


def remove_a_corpus(shards: Path) -> None:
    shutil.rmtree(shards / "dclm")


def flip_a_byte(shards: Path) -> None:
    content = bytearray((shards / "dclm" / "train-00000.bin").read_bytes())
    content[5] ^= 1
    (shards / "dclm" / "train-00000.bin").write_bytes(content)


def remove_the_tokenizer(shards: Path) -> None:
    (shards / "tokenizer.json").unlink()


def remove_the_plan_and_a_corpus(shards: Path) -> None:
    (shards / orders.PLAN).unlink()
    remove_a_corpus(shards)


@pytest.mark.parametrize("harm", [remove_a_corpus, flip_a_byte, remove_the_tokenizer, remove_the_plan_and_a_corpus])
def test_the_same_command_again_makes_what_is_damaged(
    copy_of_made: dict[str, Any], made: tuple[dict[str, Any], list], harm: Callable[[Path], None]
) -> None:
    """To the byte, and leaves what is whole alone."""
    shards = Path(copy_of_made["path"])
    untouched = (shards / "proofpile" / "index.json").stat().st_ino
    harm(shards)
    assert content(shards) != content(Path(made[0]["path"]))
    assert preparing.prepare(copy_of_made, tokens=6000, processes=1) == made[1]
    assert content(shards) == content(Path(made[0]["path"]))
    alone = (shards / "proofpile" / "index.json").stat().st_ino == untouched
    assert alone == (harm is not remove_the_plan_and_a_corpus)
    assert not (shards / preparing.WORK).exists()


def test_a_byte_that_changed_and_left_size_and_time_is_found(
    copy_of_made: dict[str, Any], made: tuple[dict[str, Any], list], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training remembers large files by these two; the command reads them."""
    monkeypatch.setattr(cached, "ALWAYS_READ_BYTES", 0)
    shards = Path(copy_of_made["path"])
    data.build(copy_of_made, seed=1)
    times = (shards / "dclm" / "train-00000.bin").stat()
    flip_a_byte(shards)
    os.utime(shards / "dclm" / "train-00000.bin", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert preparing.prepare(copy_of_made, tokens=6000, processes=1) == made[1]
    assert content(shards) == content(Path(made[0]["path"]))


def test_training_refuses_a_part_of_what_was_prepared(
    copy_of_made: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weights null, the corpora that are there would be all; a repair that was stopped leaves this as well."""
    config, shards = {**copy_of_made, "weights": None}, Path(copy_of_made["path"])
    data.check(config)
    remove_a_corpus(shards)
    command = rf"python -m recipes\.prepare_data data={config['name']} data\.path={shards} tokens=6000$"
    with pytest.raises(ConfigError, match=rf"but dclm is not there; make it again: {command}"):
        data.check(config, tokens=9)
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "_fill", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            preparing.prepare(copy_of_made, tokens=6000, processes=1)
    with pytest.raises(ConfigError, match=rf"its preparation is not over; go on with it: {command}"):
        data.check(config, tokens=9)
    words = ["data=study", "tokens=6000", "data.root=hub"]
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "_fill", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            preparing.prepare(copy_of_made, tokens=6000, processes=1, arguments=words)
    with pytest.raises(ConfigError, match=rf"go on with it: .*prepare_data {' '.join(words)} data\.path={shards}$"):
        data.check(config, tokens=9)
    preparing.prepare(copy_of_made, tokens=6000, processes=1)
    data.check(config)


def test_a_model_that_is_trained_further_brings_its_ids(
    made: tuple[dict[str, Any], list], tokenizer: Path, tmp_path: Path
) -> None:
    def check(model: Path) -> None:
        whole = {"model": {"path": str(model)}, "data": made[0]}
        data.check(plan.data_config(whole))

    same, other, bare, ends = (tmp_path / name for name in ("same", "other", "bare", "ends"))
    for folder in (same, other, bare, ends):
        folder.mkdir()
    shutil.copy(tokenizer, same)
    shutil.copy(tokenizer, ends)
    (ends / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    t.save_trained(t.train_tokenizer(["zebra zoo " * 50], 270), other)
    check(same)
    check(bare)
    with pytest.raises(ConfigError, match=rf"data\.path = .*must hold the ids of {other}'s own tokenizer, but \d+ "):
        check(other)
    with pytest.raises(ConfigError, match=rf"must end documents by {ends}'s a, not by <\|endoftext\|>: data\.tok"):
        check(ends)


def test_a_repair_that_is_stopped_goes_on(
    copy_of_made: dict[str, Any], made: tuple[dict[str, Any], list], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = Path(copy_of_made["path"])
    flip_a_byte(shards)
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "_fill", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            preparing.prepare(copy_of_made, tokens=6000, processes=1)
    assert preparing.prepare(copy_of_made, tokens=6000, processes=1) == made[1]
    assert content(shards) == content(Path(made[0]["path"]))


def test_without_its_plan_and_then_without_the_hub_the_same_command_still_goes_on(
    copy_of_made: dict[str, Any], made: tuple[dict[str, Any], list], monkeypatch: pytest.MonkeyPatch
) -> None:
    remove_the_plan_and_a_corpus(Path(copy_of_made["path"]))
    with monkeypatch.context() as patch:
        patch.setattr(orders, "find_corpora", lambda _: (_ for _ in ()).throw(HubLost("gave up")))
        with pytest.raises(HubLost):
            preparing.prepare(copy_of_made, tokens=6000, processes=1)
    assert preparing.prepare(copy_of_made, tokens=6000, processes=1) == made[1]
    assert content(Path(copy_of_made["path"])) == content(Path(made[0]["path"]))


def test_training_names_the_command_that_made_the_shards(root: Path, tokenizer: Path, tmp_path: Path) -> None:
    """Not one with the tokens of the run, which the folder would refuse."""
    config = study(root, tmp_path / "shards", tokenizer)
    words = ["data=study", "tokens=700", "data.weights={dclm: 0.6, starcoder: 0.3, proofpile: 0.1}"]
    for given, said in (((), "tokens=700"), (words, f"data=study tokens=700 '{words[2]}' data.path={config['path']}")):
        preparing.prepare(config, tokens=700, processes=1, arguments=given)
        (tmp_path / "shards" / "dclm" / "train-00000.bin").write_bytes(b"")
        with pytest.raises(ConfigError) as caught:
            data.check(config, tokens=123_456)
        assert str(caught.value).endswith(said)
