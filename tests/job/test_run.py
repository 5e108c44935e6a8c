"""Whole runs through the front door: what they leave behind, what they say, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest

from lightning_opt.run_folder import METRIC_COLUMNS, read_events, read_metrics, summarize

FILES = [
    "config.yaml",
    "overrides.txt",
    "env.json",
    "plan.json",
    "status.json",
    "metrics.csv",
    "summary.json",
    "report.html",
    "report.md",
    "MODEL_CARD.md",
    "run.log",
]


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder of real text, so that no test tokenises megabytes."""
    folder = tmp_path_factory.mktemp("texts")
    for corpus, module in (("code", "argparse.py"), ("prose", "pydoc_data/topics.py")):
        source = Path(os.__file__).parent / module
        (folder / f"{corpus}.txt").write_text(
            "\n\n".join(source.read_text(encoding="utf-8").splitlines()[:3000]), encoding="utf-8"
        )
    return folder


class Door:
    """`python train.py` in a folder of its own."""

    def __init__(self, repository: Path, folder: Path, texts: Path):
        self.repository, self.folder, self.texts = repository, folder, texts

    def command(self, *overrides: str) -> list[str]:
        base = (
            "debug=smoke",
            "data=files",
            f"data.path={self.texts}",
            f"data.cache_dir={self.texts.parent / 'cache'}",
            "evaluation=none",
            "trainer.num_threads=1",
        )
        return [sys.executable, str(self.repository / "train.py"), *base, *overrides]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self.repository)}

    def __call__(self, *overrides: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*overrides),
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=self.environment(),
            timeout=300,
        )

    def start(self, command: list[str]) -> subprocess.Popen[str]:
        """Starts a command to be signalled; a background shell hands down an ignored Ctrl-C, which is undone."""
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
            env=self.environment(),
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def warm(self, forks: BaseContext, *overrides: str) -> tuple[int, str]:
        """The same in a process that has loaded everything: its exit code, and what it said."""
        said = self.texts.parent / f"{self.folder.name}.txt"
        process = forks.Process(target=_in, args=(self.folder, said, self.command(*overrides)[1:]))
        process.start()
        process.join(300)
        return process.exitcode, said.read_text(encoding="utf-8")

    def folders(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("runs/*/*") if path.is_dir())


def _in(folder: Path, said: Path, line: list[str]) -> None:
    """`train.py` with its command line, in a folder; everything that is said goes into a file."""
    from lightning_opt.job import leave
    from lightning_opt.launch import main

    os.chdir(folder)
    for stream in (1, 2):
        os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    sys.argv = line
    leave(main(line[1:]))


@pytest.fixture
def door(repository: Path, tmp_path: Path, texts: Path) -> Door:
    return Door(repository, tmp_path, texts)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_same_seed_gives_the_same_bits_and_a_whole_folder(door: Door, forks: BaseContext) -> None:
    first = door("optimizer=lion")
    assert first.returncode == 0, first.stdout + first.stderr
    code, said = door.warm(forks, "optimizer=lion", "data.num_workers=2", "name=again")
    assert code == 0, said
    folders = sorted(door.folders(), key=lambda folder: folder.parent.name == "again")
    assert len(folders) == 2
    tables = []
    for folder in folders:
        assert [name for name in FILES if not (folder / name).exists()] == []
        assert (folder / "model" / "model.safetensors").stat().st_size > 1000
        assert read(folder / "status.json")["state"] == "FINISHED"
        assert read(folder / "summary.json") == json.loads(json.dumps(summarize(folder)))
        table = read_metrics(folder / "metrics.csv")
        assert set(METRIC_COLUMNS) <= set(table)
        tables.append(
            {name: values for name, values in table.items() if name.startswith(("train/", "val/", "lr/", "grad_norm"))}
        )
    assert tables[0] == tables[1]
    assert len(tables[0]["train/loss"]) == 20
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
    # what the terminal said is in run.log, and Hydra and Lightning left nothing of their own behind
    log = (folders[0] / "run.log").read_text()
    for line in first.stdout.splitlines():
        assert line.strip() in log
    assert sorted(path.name for path in door.folder.iterdir()) == ["runs"]
    assert first.stderr == ""


def test_a_run_that_diverges_says_so(door: Door, forks: BaseContext) -> None:
    code, said = door.warm(forks, "optimizer.lr=1e30", "optimizer.max_grad_norm=null")
    assert code == 3, said
    (folder,) = door.folders()
    status = read(folder / "status.json")
    assert status["state"] == "DIVERGED"
    assert "not taken" in status["reason"]
    assert "DIVERGED" in (folder / "report.md").read_text().upper()
    assert read(folder / "summary.json")["state"] == "DIVERGED"


def test_a_run_that_fails_leaves_its_traceback(door: Door, forks: BaseContext) -> None:
    code, said = door.warm(forks, "callbacks.export.directory=/proc/nowhere")
    assert code == 1, said
    (folder,) = door.folders()
    assert read(folder / "status.json")["state"] == "FAILED"
    assert "Traceback" in (folder / "run.log").read_text()
    assert (folder / "report.html").exists()


def test_a_run_that_is_stopped_says_so_and_the_same_command_takes_its_folder(door: Door) -> None:
    """To the whole group, as Slurm or a terminal does: the loader's worker and the run both hear it."""
    command = door.command("trainer.max_steps=100000", "data.num_workers=1")
    stopped_at = 0
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process, told = door.start(command), []
        while not told or not told[-1].startswith("step ") or (stopped_at == 0 and not told[-1].startswith("step 5")):
            told.append(process.stdout.readline())
            assert told[-1] or process.poll() is None
        assert not stopped_at or any(f"from step {stopped_at}:" in line for line in told if line.startswith("resume "))
        os.killpg(process.pid, number)
        said = process.stdout.read()
        assert process.wait(timeout=120) == code
        assert "Traceback" not in said
        assert "the same command takes up its folder" in said
        (folder,) = door.folders()
        assert read(folder / "status.json")["state"] == "PREEMPTED"
        before, stopped_at = stopped_at, read(folder / "status.json")["step"]
        assert max(5, before + 1) <= stopped_at < 100000


def test_sigterm_while_scoring_is_told_too(door: Door) -> None:
    """Lightning's own handler is gone by then."""
    command = door.command("trainer.max_steps=2", "evaluation=mini")
    process = door.start(command)
    while not (line := process.stdout.readline()).startswith("evaluation"):
        assert line or process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.stdout.read()
    assert process.wait(timeout=120) == 143
    (folder,) = door.folders()
    assert read(folder / "status.json")["state"] == "PREEMPTED"
    assert read_events(folder / "events.jsonl")[-1]["kind"] == "preempted"
    assert (folder / "report.html").exists()


@pytest.mark.slow
def test_real_text_beats_its_unigrams(door: Door, shared_data: Path) -> None:
    """The judged command, shortened to 300 steps: every corpus ends well below its unigram entropy."""
    command = [
        *(sys.executable, str(door.repository / "train.py"), "optimizer=lion", "trainer.max_steps=300"),
        *("data=files", f"data.path={shared_data / 'text'}"),
        *("evaluation=full", f"evaluation.data_dir={shared_data / 'eval'}", "evaluation.limit=12"),
    ]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=door.folder, env=door.environment(), timeout=900
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (folder,) = door.folders()
    summary, plan = read(folder / "summary.json"), read(folder / "plan.json")
    for corpus in plan["corpora"]:
        assert summary["val_loss_by_corpus"][corpus["name"]] < corpus["unigram_entropy"] - 0.8
    for task in ("hellaswag", "mmlu", "humaneval"):
        score = summary["evaluation"][task]
        if "skipped" not in score:
            assert score["n"] == 12
            assert score["stderr"] is not None
