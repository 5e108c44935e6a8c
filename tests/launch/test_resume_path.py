"""`resume=PATH` on the way to the jobs: what reaches them, what is refused first, what makes another folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from lightning_opt import plan
from lightning_opt.checkpoints import Store
from lightning_opt.launch import main, task
from lightning_opt.run_folder import Status, config_hash, read_status

OFF = "evaluation=none"
SWEEP = ["-m", "hydra/launcher=basic", "trainer.max_steps=9", OFF]  # in this process, where the jobs are counted


@pytest.fixture
def start(jobs, tmp_path) -> str:
    """A checkpoint at step 5 of the default configuration."""
    assert main([OFF]) == 0
    identity = plan.identity(yaml.safe_load(jobs.pop()["saved_config"]), 800)
    store = Store(tmp_path / "earlier" / "checkpoints")
    store.save({"state_dict": {"w": torch.zeros(2)}}, step=5, meta={"identity": identity}, wait=True)
    return "earlier"


def test_a_sweep_starts_each_job_there(jobs, start):
    rates = "optimizer.lr=1e-3,2e-3"
    assert main([*SWEEP, rates, f"resume={start}", "resume_allow=[optimizer]"]) == 0
    assert [job["config"]["resume"] for job in jobs] == [start, start]
    assert all(job["config"]["resume_allow"] == ["optimizer"] for job in jobs)
    assert main([*SWEEP, rates, "resume=never"]) == 0  # which is the sweep's own matter
    assert [job["config"]["resume"] for job in jobs[2:]] == ["auto", "auto"]


def test_a_sweep_is_refused_before_its_first_job(jobs, start, capsys):
    assert main([*SWEEP, "optimizer.lr=1e-3,2e-3", f"resume={start}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"resume = {start}: differs in optimizer.lr (saved ")
    assert not jobs


def test_the_same_command_takes_its_own_folder_and_no_other(jobs, start):
    command = [OFF, "trainer.max_steps=9", f"resume={start}"]
    assert main(command) == 0
    assert main([OFF, "trainer.max_steps=9"]) == 0
    first, plain = (job["folder"] for job in jobs)
    assert first != plain
    Status(first.status, config_hash(jobs[0]["config"])).set("PREEMPTED", "for the test")
    status = first.status.read_text().replace('"pid": ', '"pid": 4000000')  # a process that is gone
    first.status.write_text(status)
    store = Store(first.checkpoints)
    store.save({"state_dict": {"w": torch.zeros(2)}}, step=7, meta={}, wait=True)
    for manifest in Path(start).rglob("MANIFEST.json"):
        manifest.unlink()
    assert main(command) == 0  # what it started from is not asked for again
    assert jobs[-1]["folder"] == first


def test_a_run_left_in_the_middle_is_told_of_where_a_value_was_changed(jobs, capsys):
    """Not one without a checkpoint, nor one behind which another has finished."""
    assert main([OFF, "seed=501"]) == 1  # it fails, and leaves no checkpoint
    capsys.readouterr()
    assert main([OFF, "seed=501", "trainer.max_steps=9"]) == 1
    assert capsys.readouterr().err == ""
    left = jobs[-1]["folder"]
    Store(left.checkpoints).save({"state_dict": {"w": torch.zeros(2)}}, step=7, meta={}, wait=True)
    left = left.path.rename(left.path.with_name(f"20990101T000000Z-{left.path.name[-8:]}"))  # the newest for sure
    assert main([OFF]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert f"unfinished at step 7: to go on from there add resume={left}" in line
    own = task.config_hash(jobs[-1]["config"])
    task._tell_of_unfinished(jobs[-1]["folder"], read_status(left / "status.json")["config_hash"])
    assert capsys.readouterr().err == ""  # it has this very configuration
    task._tell_of_unfinished(jobs[-1]["folder"], own)
    assert f"resume={left}" in capsys.readouterr().err
    assert main([OFF, "seed=3", "resume=never"]) == 0
    status = left / "status.json"
    status.write_text(status.read_text().replace("FAILED", "FINISHED"))
    assert main([OFF, "seed=4"]) == 0
    assert capsys.readouterr().err == ""
