"""What a run says, writes down and keeps to of its mixture: epochs, repeated corpora, phases, documents apart."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_opt.job import notices
from lightning_opt.plan import ConfigError
from lightning_opt.reports import tables
from lightning_opt.reports.reading import read
from lightning_opt.run_folder import summarize

PHASES = [
    {"phase": "start", "until_token": 6000, "weights": {"a": 0.5, "b": 0.5}, "epochs": {"a": 3.0, "b": 1.0}},
    {"phase": "anneal", "until_token": 8000, "weights": {"a": 1.0}, "epochs": {"a": 5.0, "b": 1.0}},
]
PLAN: dict[str, Any] = {
    "tokens_per_step": 100,
    "max_steps": 80,
    "mixture": PHASES,
    "warn_above_epochs": 4.0,
    "documents_apart": True,
    "corpora": [
        {"name": "a", "weight": 0.5, "epochs": 5.0, "train_tokens": 900, "unigram_entropy": 5.432},
        {"name": "b", "weight": 0.5, "epochs": 1.0, "train_tokens": 2000, "unigram_entropy": None},
        {"name": "c4_en", "weight": 0.0, "epochs": None, "train_tokens": 0, "unigram_entropy": 5.0},
    ],
}


@pytest.mark.parametrize(("limit", "told"), [(4.0, ["a"]), (0.5, ["a", "b"]), (5.0, []), (None, [])])
def test_corpora_that_are_read_too_often_are_named(
    limit: float | None, told: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        notices.mixture({**PLAN, "warn_above_epochs": limit})
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line.split()[0] for line in warned] == told
    assert all("data.warn_above_epochs" in line and "\n" not in line for line in warned)
    said = [" ".join(record.getMessage().split()) for record in caplog.records if record.levelno == logging.INFO]
    corpora = [
        "a weight 0.500 900 tokens, 5.00 epochs; unigram entropy 5.43 nats",
        "b weight 0.500 2.00k tokens, 1.00 epochs; no validation text of its own",  # as the study's mixture has it
        "c4_en validation only",
    ]
    phases = ["start until 6.00k tokens: a 0.500 b 0.500", "anneal until 8.00k tokens: a 1.000"]
    assert said == [*corpora, *phases, "no token sees another document"]


@pytest.mark.parametrize(
    ("steps", "epochs"),
    [(0, {"a": 0, "b": 0}), (30, {"a": 1.5, "b": 0.5}), (60, {"a": 3, "b": 1}), (70, {"a": 4, "b": 1})],
)
def test_the_summary_counts_the_epochs_that_were_read(tmp_path: Path, steps: int, epochs: dict[str, float]) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    (tmp_path / "status.json").write_text(json.dumps({"state": "PREEMPTED", "step": steps}))
    assert summarize(tmp_path)["epochs_by_corpus"] == pytest.approx(epochs)
    (tmp_path / "plan.json").write_text(json.dumps({"tokens_per_step": 100}))  # as older runs have it
    assert summarize(tmp_path)["epochs_by_corpus"] is None


def test_the_report_shows_the_epochs_that_were_read(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    (tmp_path / "status.json").write_text(json.dumps({"state": "FINISHED", "step": 80}))
    (tmp_path / "summary.json").write_text(json.dumps(summarize(tmp_path)))
    table = tables.corpora(read(tmp_path))
    column = table.header.index("epochs")
    assert [(row[0], float(row[column])) for row in table.rows[:2]] == [("a", 5.0), ("b", 1.0)]
    assert (table.rows[2][0], table.rows[2][column]) == ("c4_en", "not measured")
    assert "Read more than 4 times (data.warn_above_epochs): a." in table.note
    assert "anneal until token 8,000: a 100" in table.note
    assert "No token saw another document." in table.note


@pytest.mark.slow
def test_a_run_goes_on_over_a_seam_bit_by_bit(repository: Path, tmp_path: Path) -> None:
    """Through the front door, documents apart: the whole run, and one from a checkpoint before the seam."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for corpus, module in (("code", "argparse.py"), ("prose", "pydoc_data/topics.py")):
        lines = (Path(os.__file__).parent / module).read_text(encoding="utf-8").splitlines()
        (texts / f"{corpus}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines if line))

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        phases = "{first: {until: 0.55}, last: {weights: {code: 1, prose: 0}}}"
        line = [
            *(sys.executable, str(repository / "train.py"), "debug=smoke", "evaluation=none", "trainer.max_steps=10"),
            *("data=files", f"data.path={texts}", "trainer.num_threads=1", "callbacks.checkpoint.every_n_steps=4"),
            *("callbacks.checkpoint.keep_last=9", "data.block_cross_document_attention=true"),
            *(f"data.phases={phases}", "data.warn_above_epochs=0.2", *words),
        ]
        environment = {**os.environ, "PYTHONPATH": str(repository)}
        return subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)

    whole = run("hydra.run.dir=whole")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert "code is gone through" in whole.stdout
    plan = json.loads((tmp_path / "whole/plan.json").read_text())
    assert plan["data_seams"] == [44]  # of 80: in the middle of a batch of 8
    summary = json.loads((tmp_path / "whole/summary.json").read_text())
    assert summary["epochs_by_corpus"] == pytest.approx({c["name"]: c["epochs"] for c in plan["corpora"]})
    again = run("hydra.run.dir=again", "resume=whole/checkpoints/step-000004", "data.num_workers=2")
    assert again.returncode == 0, again.stdout + again.stderr
    weights = [(tmp_path / folder / "model/model.safetensors").read_bytes() for folder in ("whole", "again")]
    assert weights[0] == weights[1]
    other = run("hydra.run.dir=other", "resume=whole/checkpoints/step-000004", "data.phases.first.until=0.8")
    assert other.returncode == 2
    assert "data.phases" in other.stdout + other.stderr
    assert ConfigError.__name__ not in other.stderr  # one line, no traceback
