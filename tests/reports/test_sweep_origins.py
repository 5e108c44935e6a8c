"""Whose values an optimizer ran in a sweep: tuned ones, and of which source, or those of its own YAML."""

from __future__ import annotations

from pathlib import Path

from html_page import Page
from synthetic_sweep import build_sweep

from lightning_opt import reports

OURS = {"source": "benchmarks/results/a.md", "measured": "ours", "values": {"optimizer.lr": 0.0004, "schedule": "wsd"}}
PUBLISHED = {"source": "arXiv 2509.02046", "measured": "published", "values": {"optimizer.lr": 0.004}}


def page(folder: Path, **tuned: object) -> Page:
    """A sweep of two seeds each; `tuned` is what plan.json holds, or it holds nothing."""
    jobs = [
        {"optimizer": name, "final": 3.0 + place / 10, "seed": seed, "plan": {"tuned": record}}
        for place, (name, record) in enumerate(tuned.items())
        for seed in (1, 2)
    ]
    reports.write_sweep(build_sweep(folder, jobs))
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_each_optimizer_says_whose_values_it_ran(tmp_path: Path) -> None:
    shown = page(tmp_path / "mixed", lion=OURS, adamw=PUBLISHED, muon=None)
    rows = shown.tables["origins"]
    assert rows[1:] == [
        ["Lion", "tuned values, measured by this project", "benchmarks/results/a.md", "lr, schedule", "2"],
        ["AdamW", "tuned values, published", "arXiv 2509.02046", "lr", "2"],
        ["Muon", "its YAML's own defaults", "–", "–", "2"],
    ]
    said = "Lion and AdamW ran tuned values, Muon its YAML's own defaults: a gap between them may be that alone."
    assert said in shown.text


def test_it_is_no_news_where_all_are_alike(tmp_path: Path) -> None:
    for name, record in (("tuned", OURS), ("plain", None)):
        assert "may be that alone" not in page(tmp_path / name, lion=record, adamw=record).text


def test_a_job_that_wrote_no_plan_is_not_guessed_at(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    jobs = [{"optimizer": "lion", "final": 3.0, "seed": seed} for seed in (1, 2)]
    build_sweep(folder, jobs)
    for plan in folder.glob("*/plan.json"):
        text = plan.read_text(encoding="utf-8")
        plan.write_text(text.replace('"tuned"', '"turned"'), encoding="utf-8")
    reports.write_sweep(folder)
    rows = Page((folder / "report.html").read_text(encoding="utf-8")).tables["origins"]
    assert rows[1:] == [["Lion", "not known", "–", "–", "2"]]
