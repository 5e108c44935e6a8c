"""Runs that were not given the same task: refused, or marked; and what a comparison shows of compute and cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from html_page import BROKEN, Page
from synthetic_run import plan
from synthetic_sweep import PER_STEP, STEPS, build_job, build_sweep

from lightning_opt import reports
from lightning_opt.reports.jobs import of_runs
from lightning_opt.reports.ranking import groups
from recipes.report import main

FLOPS = plan()["flops_per_token"]


def two(folder: Path, **second: Any) -> list[str]:
    one = build_job(folder / "runs" / "adamw", "adamw", 3.5, overrides=["optimizer=adamw"])
    other = build_job(folder / "runs" / "lion", "lion", 3.4, overrides=["optimizer=lion"], **second)
    return [str(one), str(other)]


UNEQUAL = [
    ({"plan": {"data_fingerprint": "other"}}, "data fingerprint"),
    ({"plan": {"tokens": 2 * STEPS * PER_STEP}}, "schedule end (tokens)"),
    ({"step": 790}, "tokens trained on"),
    ({"plan": {"sequence_length": 512}}, "sequence length"),
]


@pytest.mark.parametrize(("change", "name"), UNEQUAL)
def test_unequal_runs_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], name: str
) -> None:
    out = tmp_path / "out"
    assert main(["--compare", str(out), *two(tmp_path, **change)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert name in line
    assert "--mixed" in line
    assert not out.exists()


@pytest.mark.parametrize(("change", "name"), UNEQUAL)
def test_with_mixed_they_are_side_by_side_marked_and_not_ranked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], name: str
) -> None:
    out = tmp_path / "out"
    assert main(["--compare", str(out), "--mixed", *two(tmp_path, **change)]) == 0
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert page.faults == []
    assert BROKEN not in page.text
    assert "Mixed on purpose (--mixed)" in page.text
    assert "Not one ranking but 2" in page.text
    assert name in page.tables["groups"][0]
    ids = {attributes.get("id") for _, attributes in page.tags}
    assert {"val-loss-tokens-together", "tradeoff-memory-together"} <= ids
    assert "the front" not in page.text
    assert "python -m recipes.report --compare" in page.text
    assert "--mixed" in page.text.split("Draw this comparison again")[1]
    assert "below" not in page.text.split("How to read")[0]


def test_a_label_says_what_its_group_does_not_share(tmp_path: Path) -> None:
    asked = (["optimizer=adamw", "model=femto"], ["optimizer=lion", "model=femto", "optimizer.lr_scale=2"])
    jobs = [build_job(tmp_path / str(place), words[0][10:], 3.5, overrides=words) for place, words in enumerate(asked)]
    third = ["optimizer=adamw", "model=nano", "data.cache_dir=elsewhere"]
    jobs.append(build_job(tmp_path / "third", "adamw", 3.2, overrides=third, plan={"data_fingerprint": "0123abcd" * 8}))
    comparison = of_runs(jobs, tmp_path / "out")
    assert "data.cache_dir" not in comparison.keys
    found, _ = groups(comparison.jobs)
    assert [[job.setting for job in group.jobs] for group in found] == [["lr_scale=1", "lr_scale=2"], [""]]
    assert found[1].facts["data fingerprint"] == "0123abcd0123…"


def test_equal_runs_and_other_models_are_not_refused(tmp_path: Path) -> None:
    for place, change in enumerate(({}, {"plan": {"model": "pico"}}, {"state": "DIVERGED", "step": 300})):
        folder = tmp_path / str(place)
        assert main(["--compare", str(folder / "out"), *two(folder, **change)]) == 0
        page = Page((folder / "out" / "report.html").read_text(encoding="utf-8"))
        assert "--mixed" not in page.text


def test_mixed_alone_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--mixed", *two(tmp_path)]) == 2
    assert capsys.readouterr().err.strip() == "--mixed: expected together with --compare OUT"


def test_a_sweep_keeps_its_groups(tmp_path: Path) -> None:
    jobs = [{"optimizer": "adamw", "final": 3.5}, {"optimizer": "lion", "final": 3.4, "plan": {"sequence_length": 512}}]
    reports.write_sweep(build_sweep(tmp_path / "sweep", jobs))
    page = Page((tmp_path / "sweep" / "report.html").read_text())
    assert "Not one ranking but 2" in page.text
    assert "--mixed" not in page.text


def figure(folder: Path, title: str) -> list[list[str]]:
    """The table of a figure's numbers, from the Markdown."""
    part = (folder / "report.md").read_text(encoding="utf-8").split(f"### {title}\n")[1].split("\n#")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [
        [cell.strip().replace("\\", "") for cell in line.strip("|").split("|")] for line in lines if "---" not in line
    ]


@pytest.mark.filterwarnings("error")
def test_loss_by_compute_and_against_cost(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["--compare", str(out), *two(tmp_path, plan={"model": "wide", "flops_per_token": 2 * FLOPS})]) == 0
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "training compute, TFLOP" in text  # 800 steps of 2048 tokens of 8 MFLOP: 13 TFLOP
    assert text.count('<figure id="val-loss-compute-') == 2  # two models, two groups
    reports.compare([Path(path) for path in two(tmp_path / "same")], out)
    rows = figure(out, "Final loss against time")
    assert [row[0] for row in rows[1:]] == ["Lion", "AdamW"]  # 140 ms and 150 ms a step
    assert [row[2:] for row in rows[1:]] == [["3.4000", "yes"], ["3.5000", "no"]]
    rows = figure(out, "Final loss against peak memory")
    assert [row[1:] for row in rows[1:]] == [["625 MiB", "3.4000", "yes"], ["625 MiB", "3.5000", "no"]]


def test_what_was_not_measured_has_no_picture(tmp_path: Path) -> None:
    runs = two(tmp_path, plan={"flops_per_token": None})
    for path in runs:
        rows = Path(path, "metrics.csv").read_text().replace("memory_peak_bytes", "memory_other")
        Path(path, "metrics.csv").write_text(rows)
        summary = Path(path, "summary.json")
        summary.write_text(summary.read_text().replace("peak_memory_bytes", "other"))
    out = tmp_path / "out"
    assert main(["--compare", str(out), *runs]) == 0
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    ids = {attributes.get("id") for _, attributes in page.tags}
    assert "tradeoff-time" in ids
    assert "tradeoff-memory" not in ids
    assert "val-loss-compute" in ids  # one of the two says its operations
