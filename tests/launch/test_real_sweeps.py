"""Sweeps that train: tiny, but everything is what a user runs."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from lightning_opt.run_folder import SweepFolder, read_json, read_status

LIMIT_S = 300
TINY = [
    "model=femto",
    "model.vocab_size=300",
    "model.context_length=32",
    "data=files",
    "data.path=texts",
    "data.val_fraction=0.1",
    "trainer.max_steps=3",
    "evaluation=none",
]


@pytest.fixture
def texts(tmp_path):
    words = ["the", "house", "river", "falls", "under", "a", "tree", "12", "blue"]
    (tmp_path / "texts").mkdir()
    for corpus in ("web", "code"):
        lines = [" ".join(words[(k * j + len(corpus)) % len(words)] for j in range(60)) for k in range(400)]
        (tmp_path / "texts" / f"{corpus}.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in lines))


def sweep(tmp_path):
    (file,) = tmp_path.glob("runs/sweeps/*/sweep.json")
    return SweepFolder(file.parent)


def test_a_sweep_trains_and_compares(train_py, tmp_path, texts):
    done = train_py("-m", "optimizer=adamw,lion", *TINY)
    assert done.code == 0, done.err
    assert "heavy: []" in done.out  # the parent never imports torch: its memory is the jobs'
    folder = sweep(tmp_path)
    assert [job.folder.path.name.rpartition("-")[0] for job in folder.jobs()] == ["optimizer-adamw", "optimizer-lion"]
    for job in folder.jobs():
        summary = read_json(job.folder.summary)
        assert (summary["optimizer"], summary["state"], summary["steps"]) == (job.differs["optimizer"], "FINISHED", 3)
        assert job.folder.report_html.exists()
    assert read_status(folder.status)["state"] == "FINISHED"
    for file in (folder.report_html, folder.report_md, folder.table):
        assert file.stat().st_size, file
    jobs_said, end = done.out.split("[2/2] FINISHED: loss ")
    assert "report: " in end
    assert "python train.py" not in jobs_said  # what to type next is for the end to say


@pytest.mark.slow
def test_a_sweep_killed_at_job_three_of_six_goes_on(repository, tmp_path, texts):
    words = ["-m", "optimizer=adamw,lion", "optimizer.lr_scale=0.5,1,2", *TINY]
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(repository / "train.py"), *words]

    def start():
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
        )

    first = start()
    family = set()
    try:
        end = time.monotonic() + LIMIT_S
        while len(list(tmp_path.glob("runs/sweeps/*/*/run.log"))) < 3:
            assert time.monotonic() < end
            time.sleep(0.02)
        family = {psutil.Process(first.pid), *psutil.Process(first.pid).children(recursive=True)}
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    assert not psutil.wait_procs(family, timeout=20)[1]
    folder = sweep(tmp_path)
    states = [job.state for job in folder.jobs()]
    assert states[:2] == ["FINISHED", "FINISHED"]
    assert states[3:] == [None, None, None]
    kept = {
        path: path.stat().st_mtime_ns
        for job in folder.jobs()[:2]
        for path in job.folder.path.rglob("*")
        if path.is_file()
    }
    assert start().wait(timeout=LIMIT_S) == 0
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert sweep(tmp_path) == folder
    assert [job.state for job in folder.jobs()] == ["FINISHED"] * 6
    assert {read_json(job.folder.summary)["steps"] for job in folder.jobs()} == {3}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_the_other_launchers_fill_the_same_folder(train_py, tmp_path, texts, launcher):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    done = train_py("-m", "optimizer=adamw,lion", f"hydra/launcher={launcher}", *TINY)
    assert done.code == 0, done.err
    assert "deprecated" not in done.err
    assert [job.state for job in sweep(tmp_path).jobs()] == ["FINISHED", "FINISHED"]
    assert sweep(tmp_path).report_html.exists()
    done = train_py("-m", "optimizer=adamw,lion", f"hydra/launcher={launcher}", *TINY[:-2], "trainer.max_steps=0")
    assert done.code == 2
