"""Runs that must not go on from a checkpoint, or not as if nothing were different; and places that cannot hold any.

The runs are this very process, which saves each the seconds of its imports.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import driver
import pytest
import torch

import lightning_opt.reports
from lightning_opt import checkpoints
from lightning_opt.checkpoints import manifest
from lightning_opt.job import resuming
from lightning_opt.job.space import check_space
from lightning_opt.launch import main
from lightning_opt.plan import ConfigError
from lightning_opt.run_folder import RunFolder, read_events, read_json, read_metrics, read_status

TINY = (
    *driver.SMALLEST,
    "name=tiny",
    "trainer.num_threads=1",
    "trainer.max_steps=4",
    "trainer.val_sequences=4",
    "callbacks.checkpoint.every_n_steps=2",
    "callbacks.checkpoint.keep_best=0",  # so that no other step is saved
)
LONGER = "trainer.max_steps=6"
NO_EXPORT = "callbacks.export.directory=/proc/nowhere"  # the run fails behind its last step
DIFFERENCE = "resume with another seed, data, tokenizer, batch or length: refused in one line that names both values"
OPTIMIZER = "resume with another optimizer: refused, or by name allowed without its state"
PLACE = "a folder that cannot be written or is too small: refused at start"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, and ``first``: a run of four steps."""
    folder = tmp_path_factory.mktemp("refusals")
    for text in driver.write_texts(folder / "texts").iterdir():
        text.write_text(text.read_text()[:20_000])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train.py"])
        patch.setitem(lightning_opt.reports.__dict__, "write", lambda folder: None)
        assert main([*TINY, "data.path=texts", "data.cache_dir=cache", "hydra.run.dir=first"]) == 0
    return folder


@pytest.fixture
def run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`train.py` in a folder of its own that holds a copy of `place`; answers its exit code."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setitem(lightning_opt.reports.__dict__, "write", lambda folder: None)  # drawing takes seconds
    return lambda *more: main([*TINY, "data.path=texts", "data.cache_dir=cache", *more])


def only_run() -> RunFolder:
    (path,) = Path().glob("runs/tiny/*-*")
    return RunFolder(path)


def resumed(folder: RunFolder) -> list[tuple[int, str]]:
    return [(e["step"], e["checkpoint"]) for e in read_events(folder.events) if e["kind"] == "resumed"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param("seed=9", "seed (saved 1234, now 9)", marks=pytest.mark.fault(19, DIFFERENCE)),
        pytest.param("trainer.global_batch_size=2", "(saved 8, now 2)", marks=pytest.mark.fault(19, DIFFERENCE)),
        pytest.param("data.sequence_length=16", "(saved 32, now 16)", marks=pytest.mark.fault(19, DIFFERENCE)),
        pytest.param("optimizer=lion", "(saved adamw, now lion)", marks=pytest.mark.fault(20, OPTIMIZER)),
        pytest.param("trainer.max_steps=4", "is at step 4, and this run ends at 4", marks=()),
    ],
)
def test_refused_before_anything_is_made(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], change: str, words: str
) -> None:
    assert run(LONGER, "resume=first", change) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("resume = first: ")
    assert words in line
    assert not Path("runs").exists()


@pytest.mark.fault(19, DIFFERENCE)
def test_another_mix_is_found_once_the_data_is_built(run: Callable[..., int]) -> None:
    mix = "data.weights={code: 0.75, prose: 0.25}"
    assert run(LONGER, "resume=first", mix) == 2
    reason = read_status(only_run().status)["reason"]
    assert "data.weights (saved {'code': 0.5, 'prose': 0.5}, now {'code': 0.75, 'prose': 0.25})" in reason
    assert reason.endswith("resume_allow=[data]")
    assert not only_run().metrics.exists()
    assert run(LONGER, "resume=first", mix, "resume_allow=[data]") == 0
    assert resumed(only_run()) == [(4, "first/checkpoints/step-000004")]


@pytest.mark.fault(19, "the text changes between two tries at one run: refused unless allowed")
def test_data_that_changes_underfoot(run: Callable[..., int]) -> None:
    assert run(NO_EXPORT) == 1
    texts = Path("texts")
    one = next(path for path in sorted(texts.iterdir()))
    one.write_text(one.read_text() + "\n\none more document, which nobody had read before\n")
    assert run(NO_EXPORT) == 2
    reason = read_status(only_run().status)["reason"]
    assert "differs in data.bytes.code (saved " in reason
    assert "resume_allow=[data" in reason
    assert run(NO_EXPORT, "resume_allow=[data,tokenizer]") == 1  # training was over: it comes to the export again
    assert resumed(only_run()) == [(4, "checkpoints/step-000004")]


@pytest.mark.fault(20, OPTIMIZER)
def test_another_optimizer_that_is_allowed_starts_without_state(run: Callable[..., int]) -> None:
    """And the same command goes on with its own folder later, although what it started from is gone."""
    command = (LONGER, "resume=first", "optimizer=lion", "resume_allow=[optimizer]", NO_EXPORT)
    assert run(*command) == 1
    folder = only_run()
    log = folder.log.read_text()
    assert "another optimizer than it was saved with, as allowed" in log
    assert "the optimizer's state is not" in log
    assert "another length: max_steps 4 -> 6" in log
    assert read_metrics(folder.metrics)["step"] == [4, 5, 6]
    (saved, *_) = checkpoints.find(folder.checkpoints)
    state = checkpoints.read(saved.path)["optimizer_states"][0]["state"]
    assert {entry["step"] for entry in state.values()} == {2}
    assert saved.meta["identity"]["optimizer"]["name"] == "lion"
    shutil.rmtree("first")
    assert run(*command) == 1
    assert resumed(only_run()) == [(4, "first/checkpoints/step-000004"), (6, "checkpoints/step-000006")]
    assert read_json(only_run().summary)["resumed_from"] == [4, 6]


@pytest.mark.fault(19, "another batch, allowed: no sequence twice, none lost, tokens counted as they were")
@pytest.mark.fault(20, "another rate, allowed: the optimizer's state is kept")
def test_another_rate_and_batch_that_are_allowed(run: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    """And the files of the checkpoint are hashed once."""
    digest, hashed = manifest.digest, []
    monkeypatch.setattr(manifest, "digest", lambda path: hashed.append(path.name) or digest(path))
    change = ("optimizer.lr=3e-4", "trainer.global_batch_size=2")
    assert run(LONGER, "resume=first", *change, "resume_allow=[optimizer,global_batch_size]") == 0
    assert sorted(hashed) == ["model.safetensors", "state.pt"]
    folder = only_run()
    assert "the optimizer's state is kept, its values are those of now" in folder.log.read_text()
    columns = read_metrics(folder.metrics)
    assert columns["step"] == [4, 5, 6]
    assert columns["tokens"] == [32 * (4 * 8), 32 * (4 * 8 + 2), 32 * (4 * 8 + 2 * 2)]
    assert read_json(folder.summary)["tokens"] == columns["tokens"][-1]
    last = checkpoints.read(checkpoints.find(folder.checkpoints)[0].path)
    assert {entry["step"] for entry in last["optimizer_states"][0]["state"].values()} == {6}
    (place,) = last["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert place["sequences"] + place["offset"] == 4 * 8 + 2 * 2


@pytest.mark.fault(7, "a named checkpoint is damaged: an error, no fallback; of a named run the one before is used")
def test_a_named_checkpoint_that_is_damaged(run: Callable[..., int]) -> None:
    with Path("first/checkpoints/step-000004/state.pt").open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff\x00\xff")
    assert run(LONGER, "resume=first/checkpoints/step-000004") == 2
    reason = read_status(only_run().status)["reason"]
    assert "must be whole, but state.pt is not what was written" in reason
    shutil.rmtree("runs")
    assert run(LONGER, "resume=first") == 0
    assert "step-000004 is damaged and passed over: state.pt" in only_run().log.read_text()
    assert [e["checkpoint"] for e in read_events(only_run().events) if e["kind"] == "checkpoint_bad"] == ["step-000004"]
    assert resumed(only_run()) == [(2, "first/checkpoints/step-000002")]
    assert Path("first/checkpoints/step-000004").is_dir()  # another run's: not ours to set aside


@pytest.mark.fault(
    7, "all checkpoints of the run itself are damaged: refused, its metrics stay; resume=never starts anew"
)
def test_a_run_with_no_good_checkpoint_does_not_start_over(run: Callable[..., int]) -> None:
    assert run(NO_EXPORT) == 1
    folder = only_run()
    rows = folder.metrics.read_bytes()
    for number in (2, 4):
        (folder.checkpoints / f"step-00000{number}" / "state.pt").write_bytes(b"")
    for _ in range(2):
        assert run(NO_EXPORT) == 2
        reason = read_status(only_run().status)["reason"]
        assert re.search(r"can be used: step-000004: state.pt is 0 bytes .*; step-000002: .*resume=never$", reason)
    assert (folder.metrics.read_bytes(), resumed(folder)) == (rows, [])
    assert run(NO_EXPORT, "resume=never") == 1
    assert len(list(Path().glob("runs/tiny/*-*"))) == 2


@pytest.mark.fault(7, "another run thins out the checkpoint just chosen: the next newest is chosen")
def test_a_checkpoint_that_goes_while_it_is_chosen(run: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []

    def choose(*given: Any) -> Any:
        start = resuming_choose(*given)
        if not chosen:
            shutil.rmtree(start.path)
        chosen.append(start.step)
        return start

    resuming_choose = resuming.choose
    monkeypatch.setattr(resuming, "choose", choose)
    assert run(LONGER, "resume=first") == 0
    assert chosen == [4, 2]
    assert "step-000004 is gone since it was chosen: choosing again" in only_run().log.read_text()
    assert read_metrics(only_run().metrics)["step"][-1] == 6


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("nevr", "did you mean never?"),
        ("frist", "(. holds no frist; did you mean first?)"),
        ("first/checkpoints/step-000002", "MANIFEST.json is missing"),
    ],
)
def test_a_path_that_is_no_checkpoint(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], where: str, words: str
) -> None:
    Path("first/checkpoints/step-000002/MANIFEST.json").unlink()
    assert run(LONGER, f"resume={where}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"resume = {where}: ")
    assert words in line
    assert not Path("runs").exists()


@pytest.mark.fault(9, PLACE)
def test_checkpoints_that_cannot_be_written(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    """A place that the kernel lets nobody write to, not even root."""
    assert run("hydra.run.dir=/proc/none") == 2
    assert "must be a folder we can write to" in capsys.readouterr().err
    assert run(NO_EXPORT) == 1
    shutil.rmtree(only_run().checkpoints)
    only_run().checkpoints.symlink_to("/proc")
    assert run(NO_EXPORT) == 2
    assert "its checkpoints folder cannot be written" in read_status(only_run().status)["reason"]


@pytest.mark.fault(8, "too little room for the checkpoints: refused before the first step")
def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    """A model of 64 TiB that takes no memory, and the real disk."""

    class Optimizer:
        def routing_table(self):
            return [{"state_bytes": 2**47}]

    model = torch.nn.Linear(2**20, 2**24, bias=False, device="meta")
    with pytest.raises(ConfigError) as caught:
        check_space(RunFolder(tmp_path), model, Optimizer(), keep=3)
    need = 4 * (2**46 + 2**47 + 2**20) + 2**46
    assert f"needs {need:,} bytes for 3 checkpoints" in caught.value.expected
    told = int(re.search(r"; ([\d,]+) are free there", caught.value.expected)[1].replace(",", ""))
    assert told == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)  # others write there too
    with pytest.raises(ConfigError, match=f"{4 * (2**47 + 2**47 + 2**20) + 2**46:,} bytes for 3 checkpoints"):
        check_space(RunFolder(tmp_path), model, Optimizer(), keep=3, averaged=True)
    check_space(RunFolder(tmp_path), torch.nn.Linear(2, 2), Optimizer.__new__(SmallOptimizer), keep=3)


class SmallOptimizer:
    """Keeps sixteen bytes."""

    def routing_table(self):
        return [{"state_bytes": 16}]
