"""Sweeps as they are found: in the middle, failed, broken, hostile, with secrets; the terminal and the recipe."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from html_page import BROKEN, Page
from synthetic_sweep import build_job, build_sweep

from lightning_opt import reports
from lightning_opt.reports.secrets import REDACTED
from lightning_opt.run_folder.status import process_start
from recipes.report import main

ROOT = Path(__file__).resolve().parents[2]
BUILT = ("report.html", "report.md", "sweep.csv")
COMMAND = "train.py -m optimizer=adamw,lion optimizer.lr_scale=0.5,1,2"
FILES = ("config.yaml", "overrides.txt", "plan.json", "env.json", "status.json", "metrics.csv", "summary.json")
OOM = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"


def middle() -> list[dict[str, Any]]:
    """A sweep at work: what a job can have come to, each once."""
    alive = {"pid": os.getpid(), "host": socket.gethostname(), "started": process_start(os.getpid())}
    return [
        {"optimizer": "adamw", "final": 3.5, "scale": 1.0},
        {"optimizer": "adamw", "final": 4.9, "scale": 4.0, "state": "DIVERGED", "step": 312, "reason": "loss is nan"},
        {"optimizer": "lion", "final": 3.4, "scale": 1.0},
        {"optimizer": "lion", "final": 3.1, "scale": 2.0, "state": "FAILED", "step": 120, "reason": OOM},
        {"optimizer": "lion", "final": 3.2, "scale": 4.0, "state": "RUNNING", "step": 430, "owner": alive},
        {"optimizer": "lion", "final": 3.2, "scale": 8.0, "state": "RUNNING", "step": 210},
        {"optimizer": "lion", "final": 3.2, "scale": 16.0, "state": "PREEMPTED", "step": 700, "reason": "SIGTERM"},
        {"optimizer": "lion", "final": None, "scale": 32.0},
    ]


def drawn(folder: Path) -> Page:
    reports.write_sweep(folder)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def texts(folder: Path) -> str:
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in BUILT)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_sweep(tmp_path_factory.mktemp("sweeps") / "middle", middle(), COMMAND)
    reports.write_sweep(folder)
    return folder


@pytest.fixture(scope="module")
def page(sweep: Path) -> Page:
    return Page((sweep / "report.html").read_text(encoding="utf-8"))


def test_every_job_is_shown_as_what_it_is(page: Page) -> None:
    header, *body = page.tables["jobs"]
    state, loss = header.index("state"), header.index("final loss")
    assert [row[state] for row in body] == [
        "finished",
        "finished",
        "running, 430/800",
        "stopped, 210/800",
        "preempted, 700/800",
        "diverged, 312/800",
        "failed, 120/800",
        "not started",
    ]
    assert [row[loss] for row in body] == ["3.400", "3.500", *["–"] * 6]  # no loss on the way is a final one
    reasons = {row[2].split(",")[0]: row[3] for row in page.tables["remarks"][1:]}
    assert reasons == {
        "running": "validation loss 4.200 so far",  # 3.2 + 2 * (1 - 400 / 800)
        "stopped": "its process is gone; the same command takes it up again",
        "preempted": "SIGTERM",
        "diverged": "loss is nan",
        "failed": OOM,
    }
    left = "1 running, 1 stopped, 1 preempted, 1 failed, 1 not started"
    assert f"5 of 8 jobs can still change what follows: {left}." in page.text
    assert "What failed is missing from the ranking; the command that asked for it runs it again." in page.text
    assert f"python {COMMAND}" in page.text


def test_failures_count_in_the_tuning_budget(page: Page) -> None:
    rows = {row[0]: dict(zip(page.tables["standing"][0], row, strict=True)) for row in page.tables["standing"][1:]}
    assert rows["AdamW"]["settings tried"] == "2"  # what diverged was tried
    assert rows["Lion"]["settings tried"] == "1"
    assert rows["Lion"]["jobs"] == "1 finished, 1 running, 1 stopped, 1 preempted, 1 failed, 1 not started"
    assert "Unequal tuning: settings tried are Lion 1, AdamW 2" in page.text


def test_the_page_is_whole_and_alone(sweep: Path, page: Page) -> None:
    assert page.faults == []
    assert BROKEN not in texts(sweep)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 10
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "img", "iframe", "object", "base")]
    for _, attributes in page.tags:
        assert not re.search(r"^[a-z]+:|^//", attributes.get("href") or "")
    before = {name: (sweep / name).read_bytes() for name in BUILT}
    reports.write_sweep(sweep)
    assert before == {name: (sweep / name).read_bytes() for name in BUILT}


def test_nothing_finished_is_no_ranking(tmp_path: Path) -> None:
    page = drawn(build_sweep(tmp_path / "sweep", [job for job in middle() if job.get("state") or job["final"] is None]))
    assert "Nothing can be ranked: no run came to its end with a validation loss" in page.text
    assert "ended lowest" not in page.text
    assert page.faults == []


def test_a_sweep_that_has_only_been_written_down(tmp_path: Path) -> None:
    folder = build_sweep(
        tmp_path / "sweep", [{"optimizer": "lion", "final": None}, {"optimizer": "adamw", "final": None}]
    )
    page = drawn(folder)
    assert [row[0] for row in page.tables["jobs"][1:]] == ["Lion", "AdamW"]
    assert "2 not started" in page.text
    assert BROKEN not in texts(folder)
    assert reports.sweep_lines(folder)


@pytest.mark.parametrize(
    "content", ["", "{", "null", "[1]", '{"jobs": 3}', '{"jobs": [{"folder": 1}]}', '{"jobs": [7]}']
)
def test_without_a_readable_ledger_the_runs_are_still_shown(tmp_path: Path, content: str) -> None:
    folder = build_sweep(tmp_path / "sweep", middle())
    (folder / "sweep.json").write_text(content)
    page = drawn(folder)
    assert "sweep.json cannot be read" in page.text
    assert len(page.tables["jobs"]) == 1 + 7  # not the one that never started
    assert BROKEN not in texts(folder)


@pytest.mark.parametrize("content", ["", "{", "[1, 2", "null", '"text"', "\x00\xff", "step,val/loss\n1"])
def test_broken_files_break_nothing(tmp_path: Path, content: str) -> None:
    folder = build_sweep(tmp_path / "sweep", [{"optimizer": "adamw", "final": 3.5}] * 8)
    jobs = sorted(path for path in folder.iterdir() if path.is_dir())
    for job, name in zip(jobs, FILES, strict=False):
        (job / name).write_text(content, encoding="latin-1")
    page = drawn(folder)
    assert page.faults == []
    assert BROKEN not in texts(folder)
    assert sum(len(rows) - 1 for key, rows in page.tables.items() if key.startswith("jobs")) == 8
    assert reports.sweep_lines(folder)


def test_strange_values_break_nothing(tmp_path: Path) -> None:
    for number, value in enumerate((None, -1, 1e400, "text", [], {}, {"name": None}, True)):
        folder = build_sweep(
            tmp_path / str(number), [{"optimizer": "adamw", "final": 3.5}, {"optimizer": "lion", "final": 3.4}]
        )
        job = next(path for path in folder.iterdir() if path.is_dir())
        for name in ("plan.json", "summary.json", "status.json", "env.json"):
            keys = json.loads((job / name).read_text())
            (job / name).write_text(json.dumps(dict.fromkeys(keys, value) | {"state": "FINISHED"}))
        assert drawn(folder).faults == []
        assert BROKEN not in texts(folder), value


HOSTILE = "<script>alert(1)</script>\n# heading | **bold** [x](javascript:alert(2)) `tick`"


def test_no_text_of_a_file_becomes_markup(tmp_path: Path) -> None:
    jobs = middle()
    for job in jobs:
        job |= {"reason": HOSTILE, "more": [f"trainer.note={HOSTILE}{job['scale']}"], "env": {"device_name": HOSTILE}}
        job["plan"] = {"model": HOSTILE, "data": HOSTILE, "corpora": [{"name": HOSTILE, "weight": 1.0}]}
        job["optimizer"] += HOSTILE
    folder = build_sweep(tmp_path / "sweep", jobs, HOSTILE)
    page = drawn(folder)
    assert page.faults == []
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert not [a for tag, a in page.tags if tag == "a" and (a["href"] or "").startswith("javascript")]
    markdown = re.sub(r"```.*?```", "", (folder / "report.md").read_text(), flags=re.DOTALL)
    assert "<script>" not in markdown
    assert "\n# heading" not in markdown
    assert not re.search(r"(?<!\\)\]\(javascript", markdown)


def test_secrets_stay_secret(tmp_path: Path) -> None:
    jobs = [
        {"optimizer": "lion", "final": 3.4, "seed": n, "more": [f"logger.wandb.api_key=sk-{n}{'a' * 24}"]}
        for n in (1, 2)
    ]
    jobs.append({"optimizer": "adamw", "final": 3.5, "more": ["data.token=hunter22"], "reason": "token=hunter22"})
    folder = build_sweep(tmp_path / "sweep", jobs, f"train.py -m +password=hunter22 key=sk-{'a' * 24}")
    reports.write_sweep(folder)
    everything = texts(folder) + "\n".join(reports.sweep_lines(folder))
    assert "hunter22" not in everything
    assert "aaaa" not in everything
    assert REDACTED in everything


def test_the_terminal_form_fits_and_names_the_best(sweep: Path, tmp_path: Path) -> None:
    lines = reports.sweep_lines(sweep)
    assert [line.split()[:3] for line in lines[1:3]] == [["*", "Lion", "lr_scale=1"], ["AdamW", "lr_scale=1", "3.500"]]
    assert "  python train.py optimizer=lion optimizer.lr_scale=1 seed=1234" in lines
    assert lines[-1].endswith("report.html")
    assert any(line.strip().startswith("Lion lr_scale=2: OutOfMemoryError") for line in lines)
    jobs = [
        {"optimizer": "adamw", "final": 3.5 + n / 100, "more": [f"model.some_very_long_name_of_a_field={n}{'x' * 60}"]}
        for n in range(40)
    ]
    many = reports.sweep_lines(build_sweep(tmp_path / "many", jobs))
    assert "and 17 more in the report" in "\n".join(many)
    for found in (lines, many):
        paste = [line for line in found if "python train.py" in line or line.startswith("report:")]
        assert all(len(line) <= 100 for line in found if line not in paste)


def test_forty_runs_make_a_page_of_bearable_size(tmp_path: Path) -> None:
    jobs = [
        {"optimizer": f"rule{n % 10}", "scale": 2.0 ** (n // 10), "final": 3.5 + n % 7 / 100, "report": False}
        for n in range(40)
    ]
    page = drawn(build_sweep(tmp_path / "many", jobs))
    assert (tmp_path / "many" / "report.html").stat().st_size < 500_000
    assert len(page.tables["jobs"]) == 41
    assert not [tag for tag, attributes in page.tags if tag == "a" and "report.html" in (attributes["href"] or "")]
    assert len({row[0] for row in page.tables["standing"][1:]}) == 10


def test_runs_of_different_commands_side_by_side(tmp_path: Path) -> None:
    lion = build_job(tmp_path / "runs" / "lion", "lion", 3.4, overrides=["optimizer=lion"])
    adamw = build_job(tmp_path / "runs" / "adamw", "adamw", 3.5, overrides=[])
    sweep = build_sweep(tmp_path / "sweep", [{"optimizer": "adamw", "final": 3.45, "scale": 2.0}])
    out = tmp_path / "comparisons" / "all"
    assert main(["--compare", str(out), str(lion), str(adamw), str(sweep), str(lion)]) == 0
    page = Page((out / "report.html").read_text())
    assert [(row[0], row[1]) for row in page.tables["jobs"][1:]] == [("Lion", "1"), ("AdamW", "2"), ("AdamW", "1")]
    links = [a["href"] for tag, a in page.tags if tag == "a" and "report.html" in (a["href"] or "")]
    assert {(out / link).resolve().parent.name for link in links} == {"lion", "adamw", next(sweep.glob("opt*")).name}
    assert "python -m recipes.report --compare" in page.text


def test_the_recipe_knows_sweeps_and_refuses_what_it_would_spoil(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (sweep / "report.html").unlink()
    assert main([str(sweep)]) == 0
    assert capsys.readouterr().out.strip() == str(sweep / "report.html")
    run = next(path.parent for path in sweep.glob("*/report.html"))
    before = (run / "report.html").read_bytes()
    for out in (run, sweep):
        assert main(["--compare", str(out), str(run)]) == 2
        assert "expected a folder of its own" in capsys.readouterr().err
    assert (run / "report.html").read_bytes() == before
    assert main(["--compare", str(tmp_path / "out"), str(tmp_path)]) == 2
    assert "no run folder" in capsys.readouterr().err


def test_without_torch_and_hydra(sweep: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lightning_opt import reports\n"
        f"folder = Path({str(sweep)!r}); reports.write_sweep(folder); reports.sweep_lines(folder)\n"
        "print([name for name in ('torch', 'lightning', 'hydra', 'omegaconf') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert answer.stdout.strip() == "[]", answer.stderr
