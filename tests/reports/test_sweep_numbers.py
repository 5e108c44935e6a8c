"""A comparison's numbers against the closed form of the made-up losses, and against scipy and the statistics module."""

from __future__ import annotations

import csv
import random
import shlex
import statistics
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
from html_page import Page
from synthetic_sweep import FALL, LR, MS, PER_STEP, STEPS, build_sweep, job_config, rows

from lightning_opt import reports
from lightning_opt.reports import ranking, targets
from lightning_opt.reports.canvas import tick
from lightning_opt.reports.jobs import Job, of_sweep
from lightning_opt.reports.reading import Run
from lightning_opt.reports.sweep_figures import Response
from lightning_opt.reports.sweep_page import response
from lightning_opt.reports.verdicts import verdict

COMMAND = "train.py -m optimizer=adamw,lion optimizer.lr_scale=0.5,1,2"
GRID = {("adamw", 0.5): 3.56, ("adamw", 1.0): 3.512, ("adamw", 2.0): 3.58}
GRID |= {("lion", 0.5): 3.62, ("lion", 1.0): 3.45, ("lion", 2.0): 3.41}
NAMES = {"adamw": "AdamW", "lion": "Lion"}


def grid() -> list[dict[str, Any]]:
    return [{"optimizer": name, "scale": scale, "final": final} for (name, scale), final in GRID.items()]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_sweep(tmp_path_factory.mktemp("sweeps") / "grid", grid(), COMMAND)
    reports.write_sweep(folder)
    return folder


@pytest.fixture(scope="module")
def page(sweep: Path) -> Page:
    return Page((sweep / "report.html").read_text(encoding="utf-8"))


def table(sweep: Path) -> list[dict[str, str]]:
    with (sweep / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def cell(*losses: float, states: tuple[str, ...] = ()) -> ranking.Cell:
    states = states or ("FINISHED",) * len(losses)
    return ranking.Cell(
        tuple(
            Job(
                Path(f"job{i}"),
                Run(Path(f"job{i}"), status={"state": state}, summary={"val_loss": loss}, plan={"a": 1}),
            )
            for i, (loss, state) in enumerate(zip(losses, states, strict=True))
        )
    )


def crossing_step(final: float, target: float) -> float:
    return STEPS * (1 - (target - final) / FALL)


def test_a_row_for_each_job_in_the_order_of_its_loss_with_only_what_differs(page: Page) -> None:
    header, *body = page.tables["jobs"]
    assert header[:4] == ["optimizer", "lr_scale", "final loss", "state"]  # the seed was asked for, but is the same
    found = [(row[0], float(row[1]), float(row[2])) for row in body]
    expected = sorted(((NAMES[name], scale, loss) for (name, scale), loss in GRID.items()), key=lambda row: row[2])
    assert found == [(name, scale, pytest.approx(loss, abs=5e-4)) for name, scale, loss in expected]
    assert all(row[3] == "finished" for row in body)
    speed = {NAMES[name]: PER_STEP / MS[name] for name in NAMES}  # thousands a second
    for row in body:
        values = dict(zip(header, row, strict=True))
        assert values["HellaSwag (mini)"] == "0.430 ± 0.050"
        assert values["MMLU (mini)"] == "0.270 ± 0.045"
        assert float(values["tokens/s"].removesuffix("k")) == pytest.approx(speed[row[0]], abs=0.05)
        assert values["optimizer share"] == "4.0 %"
        assert values["memory · state"] == "625 MiB · 7.63 MiB"  # 655,000,000 and 8,000,000 bytes
    steps = {row[0]: row[page.tables["standing"][0].index("optimizer step")] for row in page.tables["standing"][1:]}
    assert steps == {NAMES[name]: f"4.0 % · {0.04 * MS[name]:.2f} ms" for name in NAMES}
    assert "HumanEval was skipped: this machine cannot isolate generated code" in page.text
    assert "not comparable with published numbers" in page.text


def test_each_row_leads_to_the_jobs_own_report(sweep: Path, page: Page) -> None:
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a" and "/report.html" in attributes["href"]]
    jobs = {path.parent.resolve() for path in sweep.glob("*/report.html")}
    assert len(jobs) == 6
    assert {(sweep / link).resolve().parent for link in links} == jobs


def test_the_best_commands_are_the_jobs_own(page: Page, sweep: Path) -> None:
    markdown = (sweep / "report.md").read_text()
    for best in ("optimizer=lion optimizer.lr_scale=2 seed=1234", "optimizer=adamw optimizer.lr_scale=1 seed=1234"):
        assert f"python train.py {best}" in page.text
        assert f"\npython train.py {best}\n" in markdown


def test_steps_tokens_and_time_to_the_baseline_by_closed_form(sweep: Path, page: Page) -> None:
    target = GRID["adamw", 1.0]
    for row in table(sweep):
        name, final = row["optimizer"].lower(), float(row["final_loss"])
        needed = crossing_step(final, target)
        if needed > STEPS + 1e-6:
            assert row["to_baseline_steps"] == ""
            continue
        assert float(row["to_baseline_steps"]) == pytest.approx(needed)
        assert float(row["to_baseline_tokens"]) == pytest.approx(needed * PER_STEP)
        assert float(row["to_baseline_seconds"]) == pytest.approx(needed * MS[name] / 1000)
        assert float(row["learning_rate"]) == pytest.approx(LR[name] * float(row["optimizer.lr_scale"]))
    needed = crossing_step(GRID["lion", 2.0], target)
    lion, adamw = (dict(zip(page.tables["target"][0], row, strict=True)) for row in page.tables["target"][1:])
    assert lion["steps"] == f"{needed:.0f}"
    assert lion["speed-up in tokens"] == f"{STEPS / needed:.2f}×"
    assert lion["speed-up in time"] == f"{STEPS * MS['adamw'] / needed / MS['lion']:.2f}×"
    assert (adamw["steps"], adamw["speed-up in tokens"]) == ("800", "baseline")
    assert f"trainer.max_steps={needed:.0f}" in page.text  # the command that would prove it


@pytest.mark.parametrize(("target", "step"), [(3.0, 800), (3.25, 700), (3.3, 680), (4.1, 360)])
def test_crossing_between_and_at_validation_points(target: float, step: float) -> None:
    columns = {key: [row.get(key) for row in rows(3.0, 100.0)] for key in ("step", "tokens", "time_s", "val/loss")}
    found = targets.crossing(Run(Path("run"), metrics=columns), target)
    assert found == targets.Crossing(*(pytest.approx(step * unit) for unit in (1, PER_STEP, 0.1)), at_most=False)
    first = targets.crossing(Run(Path("run"), metrics=columns), 4.75)  # already the first validation is there
    assert first == targets.Crossing(100, 100 * PER_STEP, pytest.approx(10.0), at_most=True)
    assert targets.crossing(Run(Path("run"), metrics=columns), 2.99) is None


def test_the_edge_of_the_grid_is_told_and_can_be_widened(page: Page) -> None:
    where = {row[0]: row[-1] for row in page.tables["grid"][1:]}
    assert where == {"AdamW": "inside the grid", "Lion": "at the high edge of the grid: widen it"}
    assert "python train.py -m optimizer=lion seed=1234 optimizer.lr_scale=4,8 hydra.sweep.dir=" in page.text
    assert "Lion's best rate (0.0008) is at the high edge of the grid" in page.text
    assert "Widen AdamW" not in page.text


def test_where_the_best_value_lies() -> None:
    good, better, diverged, failed = (
        cell(3.5),
        cell(3.4),
        cell(9.0, states=("DIVERGED",)),
        cell(9.0, states=("FAILED",)),
    )

    def side(*points: tuple[float, ranking.Cell]) -> str | None:
        where = ranking.edge(points)
        return where and where.side

    assert side((1, better), (2, good)) == "low"
    assert side((1, good), (2, better)) == "high"
    assert side((1, good), (2, better), (4, diverged)) == ""  # what diverged was tried
    assert side((1, good), (2, better), (4, failed)) == "high"  # what failed for another reason was not
    assert side((1, good)) == "only"
    assert side((1, failed)) is None


def test_the_difference_is_tested_as_scipy_does() -> None:
    noise = random.Random(1)
    for n, m in ((2, 2), (3, 3), (5, 2), (4, 9)):
        a, b = ([noise.gauss(3.5, 0.01) for _ in range(k)] for k in (n, m))
        first, second = cell(*a), cell(*b)
        found, expected = ranking.gap(first, second, ranking.pooled([first, second])), scipy.stats.ttest_ind(b, a)
        assert found.t == pytest.approx(expected.statistic)
        assert found.limit == pytest.approx(scipy.stats.t.ppf(0.975, n + m - 2), rel=2e-3)
        assert (found.judgement == "beyond") == (expected.pvalue < 0.05)
        assert found.value == pytest.approx(statistics.fmean(b) - statistics.fmean(a))
    assert ranking.pooled([cell(3.5), cell(3.6)]) is None
    assert ranking.gap(cell(3.5), cell(3.6), None).judgement == "unknown"
    for freedom in (*range(1, 40), 200):
        assert ranking.t_limit(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), rel=2e-3)


def seeded(tmp_path: Path, losses: dict[str, list[float]]) -> Path:
    jobs = [
        {"optimizer": name, "final": final, "seed": seed}
        for name, finals in losses.items()
        for seed, final in enumerate(finals)
    ]
    folder = build_sweep(tmp_path / "seeds", jobs)
    reports.write_sweep(folder)
    return folder


def test_seeds_are_grouped_and_a_difference_beyond_noise_is_a_win(tmp_path: Path) -> None:
    losses = {"adamw": [3.52, 3.528, 3.523], "lion": [3.49, 3.5, 3.497]}
    page = Page((seeded(tmp_path, losses) / "report.html").read_text())
    rows = {row[0]: row for row in page.tables["settings"][1:]}
    for name, values in losses.items():
        mean, std = statistics.fmean(values), statistics.stdev(values)
        assert rows[NAMES[name]][2:4] == [f"{mean:.4f} ± {std:.4f}", "3"]
    t = scipy.stats.ttest_ind(losses["adamw"], losses["lion"]).statistic
    assert "Lion won with 3.4957 ± 0.0051 (n = 3)" in page.text
    assert f"beyond the noise between seeds (t = {t:.1f}, 5 % limit 2.8)" in page.text
    assert page.tables["standing"][2][5] == "yes"


def test_a_difference_inside_noise_is_no_win(tmp_path: Path) -> None:
    page = Page((seeded(tmp_path, {"adamw": [3.52, 3.50], "lion": [3.505, 3.512]}) / "report.html").read_text())
    assert "Lion and AdamW cannot be told apart" in page.text
    assert " won " not in page.text
    assert page.tables["standing"][2][5] == "no"


def test_one_seed_says_that_the_spread_is_unknown(page: Page) -> None:
    assert "Lion ended lowest at 3.410 (lr_scale=2, n = 1), 0.10 nats (2.9 %) below AdamW's 3.512" in page.text
    assert "the spread between seeds is unknown" in page.text
    assert " won " not in page.text
    assert page.tables["standing"][2][5] == "unknown"
    assert "seed=1235,1236" in page.text


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"plan": {"data_fingerprint": "other"}}, "data fingerprint"),
        ({"plan": {"tokens": 2 * STEPS * PER_STEP}}, "schedule end"),
        ({"step": 790}, "tokens trained on"),
        ({"plan": {"sequence_length": 512}}, "sequence length"),
        ({"plan": {"model": "pico"}}, "model"),
    ],
)
def test_runs_that_do_not_mean_the_same_are_not_ranked(tmp_path: Path, change: dict[str, Any], name: str) -> None:
    jobs = [{"optimizer": "adamw", "final": 3.5}, {"optimizer": "lion", "final": 3.4, **change}]
    folder = build_sweep(tmp_path / "sweep", jobs)
    reports.write_sweep(folder)
    page = Page((folder / "report.html").read_text())
    assert "Not one ranking but 2: these runs differ in" in page.text
    assert any(heading.startswith(name) for heading in page.tables["groups"][0])
    assert page.faults == []
    for group in ("a", "b"):
        assert len(page.tables[f"jobs-{group}"]) == 2
    assert "below" not in page.text.split("How to read")[0]
    assert [row["rank"] for row in table(folder)] == ["1", "1"]
    assert sorted(row["group"] for row in table(folder)) == ["A", "B"]
    assert "baseline" not in page.text.split("Setup")[0]


def test_more_than_the_optimizer_differs_between_the_best(tmp_path: Path) -> None:
    jobs = [
        {"optimizer": "adamw", "final": 3.5, "more": ["trainer.global_batch_size=8"]},
        {"optimizer": "lion", "final": 3.4, "more": ["trainer.global_batch_size=16"]},
    ]
    comparison = of_sweep(build_sweep(tmp_path / "sweep", jobs))
    (group,), _ = ranking.groups(comparison.jobs)
    assert "also differ in trainer.global_batch_size (16 and 8)" in verdict(group)


def test_the_baseline_is_adamw_else_the_first(tmp_path: Path) -> None:
    for order, expected in (
        (["lion", "adamw", "muon"], "AdamW"),
        (["lion", "muon"], "Lion"),
        (["muon", "lion"], "Muon"),
    ):
        jobs = [{"optimizer": name, "final": 3.5 - 0.1 * place} for place, name in enumerate(order)]
        comparison = of_sweep(build_sweep(tmp_path / "-".join(order), jobs))
        (group,), _ = ranking.groups(comparison.jobs)
        base = ranking.baseline(group)
        assert base is not None
        assert base.optimizer == expected


def test_a_single_other_number_gets_its_curve(tmp_path: Path) -> None:
    def asked(name: str, first: list[str]) -> Response | None:
        jobs = [
            {"optimizer": "lion", "final": final, "more": [f"optimizer.weight_decay={decay}", *more]}
            | {"config": job_config("lion", 1.0, weight_decay=decay)}
            for decay, final, more in ((0.0, 3.6, first), (0.1, 3.5, []), (0.3, 3.55, []))
        ]
        comparison = of_sweep(build_sweep(tmp_path / name, jobs))
        return response(comparison.keys, ranking.groups(comparison.jobs)[0][0])

    what = asked("one", [])
    assert what is not None
    assert (what.label, what.log) == ("optimizer.weight_decay", False)
    assert [(value, one.mean) for value, one in what.points["Lion"]] == [(0.0, 3.6), (0.1, 3.5), (0.3, 3.55)]
    assert asked("seeds", ["seed=7"]) is not None  # seeds do not count, a second setting does
    assert asked("two", ["model.z_loss=0.1"]) is None


def test_commands_survive_the_shell(tmp_path: Path) -> None:
    strange = ["optimizer=lion", "data.weights={a: 1, b: 2}", "name=it's $HOME", "trainer.note='two words'"]
    folder = build_sweep(tmp_path / "a sweep", [{"optimizer": "lion", "final": 3.4, "overrides": strange}])
    line = next(line for line in reports.sweep_lines(folder) if line.startswith("  python train.py"))
    assert shlex.split(line) == ["python", "train.py", *(text for text in strange if not text.startswith("name="))]


def test_neighbouring_ticks_of_a_loss_axis_are_told_apart() -> None:
    assert [tick(value) for value in (3.5, 3.525, 3.55)] == ["3.5", "3.525", "3.55"]
