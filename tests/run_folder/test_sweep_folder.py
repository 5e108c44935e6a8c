"""A sweep's folder: names, ledger, who may have it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lightning_opt.run_folder import (
    FolderRefused,
    RunFolder,
    Status,
    SweepFolder,
    SweepJob,
    claim_sweep,
    config_hash,
    job_name,
    read_events,
    read_status,
    record_end,
    short_names,
)


@pytest.mark.parametrize(
    ("differs", "name"),
    [
        ({"optimizer": "lion", "optimizer.lr_scale": 0.5}, "optimizer-lion_lr_scale-0.5-1a2b3c4d"),
        ({"a.b.lr": 1, "a.c.lr": 2}, "b.lr-1_c.lr-2-1a2b3c4d"),
        ({"data.path": "../x=1,2 y/z"}, "path-..-x-1-2y-z-1a2b3c4d"),
        ({"betas": [0.9, 0.95], "flag": True, "limit": None}, "betas-0.9-0.95-_flag-true_limit-null-1a2b3c4d"),
        ({"data.path": "é/ü"}, "path-1a2b3c4d"),
        ({}, "1a2b3c4d"),
    ],
)
def test_a_jobs_name_says_what_differs(differs, name):
    assert job_name(differs, "1a2b3c4d") == name
    assert re.fullmatch(r"[A-Za-z0-9._+-]+", name)


def test_a_job_that_differs_in_nothing_has_the_runs_name():
    assert job_name({}, "1a2b3c4d", "adamw_nano") == "adamw_nano-1a2b3c4d"
    assert job_name({"seed": 1}, "1a2b3c4d", "adamw_nano") == "seed-1-1a2b3c4d"
    assert SweepJob(RunFolder(Path("adamw_nano-x")), "x", [], {}).label(short=True) == "adamw_nano-x"


def test_a_name_stays_short_and_its_own():
    long = {f"section.key_{n}": "x" * 50 for n in range(20)}
    names = {job_name(long, hash) for hash in ("00000001", "00000002")}
    assert len(names) == 2
    assert max(map(len, names)) < 120


def test_short_names_are_as_long_as_they_must_be():
    assert short_names(["optimizer", "optimizer.lr"]) == {"optimizer": "optimizer", "optimizer.lr": "lr"}
    assert short_names(["lr", "optimizer.lr"]) == {"lr": "lr", "optimizer.lr": "optimizer.lr"}


def test_what_is_written_reads_back(tmp_path):
    folder = SweepFolder(tmp_path)
    job = SweepJob(RunFolder(tmp_path / "seed-1-x"), "x", ["seed=1"], {"seed": 1}, "train.py -m seed=1")
    folder.write("train.py -m seed=1,2", ["seed"], [job])
    assert folder.jobs() == [job]
    assert json.loads(folder.sweep.read_text())["command"] == "train.py -m seed=1,2"
    assert (job.state, job.is_done) == (None, False)
    for state in ("RUNNING", "FAILED", "PREEMPTED", "DIVERGED", "FINISHED"):
        job.folder.path.mkdir(exist_ok=True)
        Status(job.folder.status, "x").set(state)
        assert (job.state, job.is_done) == (state, state in ("DIVERGED", "FINISHED"))


def test_the_order_of_the_jobs_makes_no_other_sweep(tmp_path):
    first, hash = claim_sweep(tmp_path, ["a", "b"])
    assert first.path.parent == tmp_path / "sweeps"
    assert first.path.name.endswith(hash)
    Status(first.status, hash).set("FAILED")
    assert claim_sweep(tmp_path, ["b", "a"]) == (first, hash)
    assert claim_sweep(tmp_path, ["b", "a", "c"])[0] != first


def test_the_newest_sweep_is_taken_up_also_when_it_is_finished_and_never_makes_a_new_one(tmp_path):
    first, hash = claim_sweep(tmp_path, ["a"])
    Status(first.status, hash).set("PREEMPTED")
    second, _ = claim_sweep(tmp_path, ["a"], resume="never")
    assert second != first
    Status(second.status, hash).set("FINISHED")
    assert claim_sweep(tmp_path, ["a"])[0] == second


def test_a_named_folder_grows_but_takes_no_run_and_no_stranger(tmp_path):
    named, hash = claim_sweep(tmp_path, ["a"], path=tmp_path / "mine")
    with pytest.raises(FolderRefused, match="in progress"):
        claim_sweep(tmp_path, ["a"], path=tmp_path / "mine")
    Status(named.status, hash).set("FINISHED")
    assert claim_sweep(tmp_path, ["a", "b"], path=tmp_path / "mine")[0] == named
    Status(named.status, hash).set("FINISHED")
    with pytest.raises(FolderRefused, match=r"^a new folder: resume=never starts anew, and this one holds a sweep$"):
        claim_sweep(tmp_path, ["a"], path=tmp_path / "mine", resume="never")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(FolderRefused, match="single run"):
        claim_sweep(tmp_path, ["a"], path=tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("")
    with pytest.raises(FolderRefused, match="other files"):
        claim_sweep(tmp_path, ["a"], path=tmp_path / "other")


def test_a_sweeps_policy_is_no_part_of_a_jobs_identity():
    config = {"seed": 1, "on_failure": "continue", "jobs_per_device": 1}
    assert config_hash(config) == config_hash({"seed": 1, "on_failure": "retry:3", "jobs_per_device": 4})
    assert config_hash(config) == config_hash({"seed": 1})


def test_an_end_that_the_run_could_not_write_itself(tmp_path):
    folder = RunFolder(tmp_path / "died")
    record_end(folder, "1a2b3c4d", "FAILED", "killed by SIGKILL")
    assert read_status(folder.status)["state"] == "FAILED"
    Status(folder.status, "1a2b3c4d").step = 7
    record_end(folder, "1a2b3c4d", "FAILED", "ValueError: no", "Traceback:\n  line\nValueError: no\n")
    assert [event["reason"] for event in read_events(folder.events)] == ["killed by SIGKILL", "ValueError: no"]
    lines = folder.log.read_text().splitlines()
    assert lines[0].endswith("ERROR failed: killed by SIGKILL")
    assert lines[1].endswith("ERROR Traceback:")
    assert lines[-1].endswith("ERROR failed: ValueError: no")
