"""Repeated seeds: who counts as a repetition, what the noise is, and what may be said and offered because of it."""

from __future__ import annotations

import itertools
import re
import shlex
import statistics
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
from html_page import Page
from synthetic_sweep import build_job, build_sweep, job_config

from lightning_opt import reports
from lightning_opt.reports import ranking, targets
from lightning_opt.reports.jobs import of_sweep
from lightning_opt.reports.verdicts import verdict
from lightning_opt.run_folder import RunFolder, SweepFolder, SweepJob
from lightning_opt.run_folder.records import read_json
from lightning_opt.run_folder.status import Status
from recipes.report import main

COMMAND = "train.py -m optimizer=adamw,lion seed=0,1,2"


def repeated(name: str, scale: float, *finals: float) -> list[dict[str, Any]]:
    return [{"optimizer": name, "scale": scale, "final": final, "seed": seed} for seed, final in enumerate(finals)]


def group_of(folder: Path, *parts: list[dict[str, Any]]) -> ranking.Group:
    (group,), _ = ranking.groups(of_sweep(build_sweep(folder, [job for part in parts for job in part], COMMAND)).jobs)
    return group


def page_of(folder: Path, *parts: list[dict[str, Any]]) -> Page:
    reports.write_sweep(build_sweep(folder, [job for part in parts for job in part], COMMAND))
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_a_whole_number_and_its_decimal_are_one_setting(tmp_path: Path) -> None:
    jobs = repeated("lion", 1.0, 3.4, 3.41)
    for job, scale in zip(jobs, (1, 1.0), strict=True):  # config.yaml keeps what was typed
        job["config"] = job_config("lion", scale, job["seed"])
    assert [cell.n for cell in group_of(tmp_path / "typed", jobs).standings[0].cells] == [2]
    jobs[1]["config"] |= {"optimizer": {"name": "lion", "lr": "broken", "lr_scale": 1.0}}
    assert [cell.n for cell in group_of(tmp_path / "broken", jobs).standings[0].cells] == [1, 1]


def test_the_noise_is_pooled_over_every_repeated_setting(tmp_path: Path) -> None:
    losses = {("adamw", 1.0): (3.0, 3.01, 3.03), ("adamw", 2.0): (3.2, 3.24), ("lion", 1.0): (3.1,)}
    group = group_of(tmp_path / "sweep", *(repeated(*key, *finals) for key, finals in losses.items()))
    within = [statistics.variance(finals) * (len(finals) - 1) for finals in losses.values() if len(finals) > 1]
    assert group.noise == ranking.Noise(pytest.approx(sum(within) / 3), 3)
    adamw, lion = (one.cells[0] for one in group.standings)
    found = ranking.gap(adamw, lion, group.noise)
    assert found.t == pytest.approx((3.1 - statistics.fmean(losses["adamw", 1.0])) / (sum(within) / 3 * 4 / 3) ** 0.5)
    assert found.limit == pytest.approx(scipy.stats.t.ppf(0.975, 3), rel=2e-3)


def test_a_setting_run_once_does_not_win(tmp_path: Path) -> None:
    lion = repeated("lion", 1.0, 3.2, 3.21, 3.22)
    group = group_of(tmp_path / "once", repeated("adamw", 2.0, 3.005), repeated("adamw", 1.0, 3.0, 3.01, 3.03), lion)
    words = verdict(group)
    assert words.startswith("AdamW ended lowest at 3.005 (lr_scale=2, n = 1), 0.21 nats (6.4 %) below Lion's 3.210")
    assert "more than the noise among the repeated settings explains" in words
    assert "won" not in words
    assert "AdamW won with" in verdict(group_of(tmp_path / "thrice", repeated("adamw", 1.0, 3.0, 3.01, 3.03), lion))


def test_nobody_vanishes_from_the_verdict(tmp_path: Path) -> None:
    adamw = repeated("adamw", 1.0, 3.01, 3.02, 3.03)
    words = verdict(group_of(tmp_path / "a", repeated("muon", 1.0, 3.0), repeated("lion", 1.0, 3.01), adamw))
    assert words.startswith("Muon, Lion and AdamW cannot be told apart: Muon's 3.000 (n = 1) against Lion's 3.010")
    words = verdict(group_of(tmp_path / "b", repeated("muon", 1.0, 3.0), repeated("lion", 1.0, 3.3), adamw))
    assert "Muon and AdamW cannot be told apart" in words
    assert "Beyond noise behind Muon: Lion's 3.300 (n = 1)." in words


def test_the_page_says_what_the_test_takes_for_granted(tmp_path: Path) -> None:
    page = page_of(tmp_path / "sweep", repeated("adamw", 1.0, 3.0, 3.01), repeated("lion", 1.0, 3.2, 3.21))
    assert "which are taken to spread alike" in page.text
    assert "that the best of several settings was picked is not corrected for" in page.text


def test_runs_of_one_setting_and_seed_count_alike_in_any_order(tmp_path: Path) -> None:
    twice = [*repeated("lion", 1.0, 3.3), *repeated("lion", 1.0, 3.1)]  # seed 0, two times
    others = [*repeated("lion", 2.0, 3.22), *repeated("adamw", 1.0, 3.25, 3.26)]
    told = set()
    for number, jobs in enumerate(itertools.permutations([*twice, *others])):
        if number % 17 == 0:
            group = group_of(tmp_path / str(number), list(jobs))
            cell = next(cell for cell in group.standings[0].cells if len(cell.jobs) == 2)
            assert (cell.mean, cell.n, cell.std) == (pytest.approx(3.2), 1, None)
            told.add((verdict(group), targets.of_cell(cell, 3.2)[1]))
    [(_, reached)] = told
    assert reached == 1
    page = page_of(tmp_path / "page", twice, repeated("adamw", 1.0, 3.205), repeated("adamw", 2.0, 3.5))
    assert "reached by 1 of 2" in page.text


def test_more_values_are_offered_with_all_seeds(tmp_path: Path) -> None:
    page = page_of(tmp_path / "sweep", repeated("adamw", 1.0, 3.0, 3.01), repeated("adamw", 2.0, 2.9, 2.91))
    assert "python train.py -m optimizer=adamw seed=0,1 optimizer.lr_scale=4,8 hydra.sweep.dir=" in page.text


def test_a_speed_up_is_a_headline_only_where_it_is_shown(tmp_path: Path) -> None:
    scales = ((0.5, 3.6), (1.0, 3.5), (2.0, 3.7))
    adamw = [job for scale, final in scales for job in repeated("adamw", scale, final, final + 0.01)]
    card = re.compile(r"speed-up in tokens\S+×Lion came to")
    lion = repeated("lion", 1.0, 3.3, 3.31)
    assert card.search(page_of(tmp_path / "shown", adamw, lion).text)
    page = page_of(tmp_path / "at-most", adamw, repeated("lion", 1.0, 1.5, 1.51))
    assert "speed-up in tokens≥ 8.00×Lion came to" in page.text  # its first validation, at step 100, lies below
    page = page_of(tmp_path / "untuned", repeated("adamw", 1.0, 3.5, 3.51), lion)
    assert not card.search(page.text)
    assert "Mind that AdamW is not tuned" in page.text
    assert len(page.tables["target"]) == 3
    page = page_of(tmp_path / "noise", adamw, repeated("lion", 1.0, 3.499, 3.509))
    assert not card.search(page.text)
    assert "Mind that Lion's lead over AdamW is not shown to be beyond noise" in page.text


@pytest.mark.parametrize(
    ("times", "together"),
    [(((0, 50), (30, 90)), True), (((0, 50), (49, 90)), False), (((0, 50), (51, 90)), False)],  # 49: a handover
)
def test_jobs_that_ran_at_the_same_time_are_noticed(tmp_path: Path, times: Any, together: bool) -> None:
    Status(tmp_path / "status.json", "1a2b3c4d").write()
    owner = read_json(tmp_path / "status.json")["owner"]  # as a run leaves it; a calm one leaves no event
    jobs = repeated("lion", 1.0, 3.4, 3.41)
    for pid, (job, (start, end)) in enumerate(zip(jobs, times, strict=True)):
        job["owner"] = owner | {"pid": pid + 2, "started": 1.7e9 + start, "heartbeat": 1.7e9 + end}
    assert ("Some jobs ran at the same time" in page_of(tmp_path / "sweep", jobs).text) == together
    for job in jobs:
        job["owner"] |= {"pid": 2, "started": 1.7e9}  # one worker, job after job
    assert "Some jobs ran at the same time" not in page_of(tmp_path / "worker", jobs).text


@pytest.mark.parametrize(("change", "name"), [({"params_total": 7}, "parameters"), ({"precision": "x"}, "precision")])
def test_models_of_one_name_are_not_the_same_model(tmp_path: Path, change: dict[str, Any], name: str) -> None:
    jobs = [{"optimizer": "adamw", "final": 3.5}, {"optimizer": "lion", "final": 3.4, "plan": change}]
    page = page_of(tmp_path / "sweep", jobs)
    assert f"Not one ranking but 2: these runs differ in {name}" in page.text


def test_what_else_varies_in_a_ranking_is_said(tmp_path: Path) -> None:
    jobs = [
        {"optimizer": name, "final": 3.5 + z, "more": [f"model.z_loss={z}"]}
        for name in ("adamw", "lion")
        for z in (0, 0.1)
    ]
    assert "Jobs of this ranking also differ in model.z_loss" in page_of(tmp_path / "sweep", jobs).text


def test_commands_hold_no_logger_and_no_secret_of_one(tmp_path: Path) -> None:
    more = ["logger=wandb", "+logger.wandb.api_key=hunter22", "hydra/launcher=joblib"]
    folder = build_sweep(tmp_path / "sweep", [{"optimizer": "lion", "final": 3.4, "more": more}], COMMAND)
    lines = reports.sweep_lines(folder)
    assert "  python train.py optimizer=lion optimizer.lr_scale=1 seed=1234" in lines


def test_a_failed_job_can_be_run_again(tmp_path: Path) -> None:
    failed = {"optimizer": "lion", "final": 3.4, "state": "FAILED", "step": 120, "reason": "out of memory"}
    page = page_of(tmp_path / "sweep", [{"optimizer": "adamw", "final": 3.5}, failed])
    assert "Go on with this sweep" in page.text
    assert f"python {COMMAND}" in page.text.split("Go on with this sweep")[1]


def test_each_command_of_a_grown_sweep_is_offered_for_its_jobs(tmp_path: Path) -> None:
    lines = {"lion": "train.py -m seed=1", "muon": "train.py -m seed=2", "soap": "train.py -m seed=1"}
    left = [{"optimizer": name, "final": None, "command": line} for name, line in lines.items()]
    page = page_of(tmp_path / "sweep", [{"optimizer": "adamw", "final": 3.5}, *left])
    said = re.findall(r"Go on with this sweep, (\d) of 4 jobs.*?python (train.py -m seed=\d)", page.text)
    assert said == [("2", "train.py -m seed=1"), ("1", "train.py -m seed=2")]


def test_a_comparison_is_drawn_again_from_what_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build_sweep(Path("a sweep"), [{"optimizer": "adamw", "final": 3.5}, {"optimizer": "lion", "final": None}])
    run = build_job(Path("runs/lion"), "lion", 3.4)
    assert main(["--compare", "out", "a sweep", str(run)]) == 0
    page = Page(Path("out/report.html").read_text(encoding="utf-8"))
    words = "python -m recipes.report --compare out 'a sweep' runs/lion"
    assert words in page.text
    assert main(shlex.split(words)[3:]) == 0
    assert "a new sweep: compare again with its folder added" in page.text


def test_a_short_run_is_drawn_whole(tmp_path: Path) -> None:
    folder = tmp_path / "short"
    jobs = [{"optimizer": "lion", "final": 3.4, "step": step} for step in (80, 400)]
    assert "are cut off" not in page_of(folder, jobs[:1]).text
    assert "are cut off" in page_of(tmp_path / "long", jobs[1:]).text


def test_what_is_not_known_of_a_job_is_not_shown(tmp_path: Path) -> None:
    asked = [["optimizer=lion", "seed=1"], ["optimizer=lion", "seed=2"], ["optimizer=adamw"]]
    jobs = [SweepJob(RunFolder(tmp_path / str(n)), f"{n:08x}", lines, {}) for n, lines in enumerate(asked)]
    SweepFolder(tmp_path).write(COMMAND, ["seed"], jobs)
    assert [job.label for job in of_sweep(tmp_path).jobs] == ["seed=1", "seed=2", ""]
    reports.write_sweep(tmp_path)
    assert [row[1] for row in Page((tmp_path / "report.html").read_text()).tables["jobs"][1:]] == ["1", "2", "–"]
