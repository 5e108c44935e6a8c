"""``python -m recipes.study``: its words, its refusals, and a whole study over runs that are a function."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lightning_opt.launch import Composer
from lightning_opt.launch.preflight import Checker
from lightning_opt.plan import ConfigError
from lightning_opt.run_folder import RunFolder, SweepFolder, SweepJob
from lightning_opt.study.cells import Trial
from lightning_opt.study.results import Cell
from lightning_opt.study.space import Axis, Ladder
from recipes import study, studying
from recipes.small_study.__main__ import OPTIMIZERS, SETTINGS, words
from recipes.study_design import design_of

TWO = ["optimizers=[adamw,lion]", "model=femto", "search=rate"]


def designed(*given: str):
    own, others, file = study.sorted_out(given)
    settings = study.settings_of(own, file)
    with Composer() as composer:
        return design_of(settings, others, Checker(composer))


def test_each_cell_starts_where_train_py_would():
    design = designed("optimizers=[adamw,lion,muon]", "models=[femto,pico]", "search=[rate,decay]")
    with Composer() as composer:
        for cell, plan in design.plans.items():
            config = Checker(composer).job([f"optimizer={cell.optimizer}", f"model={cell.params}", "scale=1x"]).config
            assert plan.start["optimizer.lr"] == config["optimizer"]["lr"]
            assert plan.start["optimizer.weight_decay"] == config["optimizer"]["weight_decay"]
    assert design.plans[Cell("adamw", "pico", 1.0)].tokens == 20 * 200704
    assert "tuned-small-models" in design.plans[Cell("lion", "femto", 1.0)].origin
    assert design.plans[Cell("muon", "femto", 1.0)].origin == "conf/optimizer/muon.yaml"


def test_full_searches_all_that_the_rule_has_and_nothing_else():
    design = designed("optimizers=[adamw,lion,muon]", "model=pico")
    adamw, lion, muon = ([axis.name for axis in axes] for axes in design.axes.values())
    eight = [
        "optimizer.lr", "optimizer.weight_decay", "schedule.warmup", "optimizer.betas[0]", "optimizer.betas[1]",
        "optimizer.eps", "optimizer.max_grad_norm", "trainer.global_batch_size",
    ]  # fmt: skip
    assert adamw == eight
    assert lion == [name for name in eight if name != "optimizer.eps"]
    assert muon == [*eight, "optimizer.momentum", "optimizer.roles.default.lr_scale"]
    axes = {axis.name: axis for axis in design.axes[Cell("lion", "pico", 1.0)]}
    assert axes["optimizer.lr"] == Ladder("optimizer.lr", 2.0, 1e-7, 64.0)
    assert axes["optimizer.betas[1]"] == Axis("optimizer.betas[1]", (0.9, 0.95, 0.98, 0.99))
    assert axes["optimizer.max_grad_norm"].values == (None, 1.0, 2.0)
    assert 0.8 in axes["optimizer.weight_decay"].values


def test_a_batch_of_another_size_keeps_the_tokens_and_what_train_py_refuses_is_no_neighbour():
    design = designed(*TWO[:2], "search=[batch]", "trainer.micro_batch_size=8")
    plan = design.plans[Cell("adamw", "femto", 1.0)]
    tokens = [plan.steps({"trainer.global_batch_size": size}) * size * 256 for size in (8, 16)]
    assert tokens == pytest.approx([plan.tokens] * 2, rel=0.01)
    assert plan.refused({"trainer.global_batch_size": 16}) is None
    assert "multiple of" in plan.refused({"trainer.global_batch_size": 4})


@pytest.mark.parametrize(
    ("given", "field", "said"),
    [
        (["optimizers=[adamw,lyon]"], "optimizers", "did you mean lion?"),
        (["optimizers=[lion]"], "baseline", "must be one of the optimizers"),
        (["optimizers=[adamw,adamw]"], "optimizers", "different names"),
        (["optimizers=[adamw]", "scales=[3]"], "scales", "another multiple such as 1.5x"),
        (["optimizers=[adamw]", "scales=[demo]"], "scales", "must be a multiple of 20 tokens"),
        (["optimizers=[adamw]", "scales=[1x,1.0x]"], "scales", "twice"),
        (["optimizers=[adamw]", "tune_at=[2x]"], "tune_at", "adamw has 1x"),
        (["optimizers=[adamw]", "search=[rate,speed]"], "search", "must be one of rate"),
        (["optimizers=[adamw,lion]", "search=[epsilon]"], "search", "is no setting of lion"),
        (["optimizers=[adamw]", "search={lion:rate}"], "search.adamw", "must be given"),
        (["optimizers=[adamw]", "budget=0"], "budget", "whole number of runs"),
        (["optimizers=[adamw]", "budget={tokens:1000}"], "budget", "must allow one run"),
        (["optimizers=[adamw]", "threshold=none"], "threshold", "nats, or auto"),
        (["optimizers=[adamw]", "seeds=[1234]"], "seeds", "must be fresh"),
        (["optimizers=[adamw]", "seeds=0"], "seeds", "whole number >= 1"),
        (["optimizers=[adamw]", "evaluation=minimal"], "evaluation", "did you mean mini?"),
        (["optimizers=[adamw]", "seed=7"], "seed", "follows from seeds="),
        (["optimizers=[adamw]", "trainer.max_steps=10"], "trainer.max_steps", "follows from scales="),
        (["optimizers=[adamw]", "optimizer.lr=0.1"], "optimizer.lr", "is searched"),
        (["optimizers=[adamw]", "trainer.val_sequences=0"], "trainer.val_sequences", "judged by the validation loss"),
        (["optimizers=[adamw]", "trainer.num_thread=1"], "trainer.num_thread", "did you mean trainer.num_threads?"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)  # fmt: skip
def test_what_is_wrong_is_refused_by_name_before_anything_runs(given, field, said):
    with pytest.raises(ConfigError) as error:
        designed(*given, "model=femto", *([] if any("search" in word for word in given) else ["search=rate"]))
    assert error.value.field == field
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["optimzers=[adamw]", "model=femto"], "did you mean optimizers?"),
        (["results=nowhere.csv"], "results = "),
        (["results=nowhere.csv", "data=files"], "data = files"),
        (["results=nowhere.csv", "fit=[8,1]"], "lowest and the highest"),
        (["results=nowhere.csv", "sigma=-1"], "must be a number > 0"),
        (["results=nowhere.csv", "near=-1"], "must be a number >= 0"),
        (["results=nowhere.csv", "model=pico"], "is of live runs"),
        (["results=nowhere.csv", f"out={__file__}/here"], "must be a folder"),
        (["settings=nowhere.yaml"], "settings = nowhere.yaml"),
        (["--verbose"], "is no option"),
        ([*TWO, "only=[muon]"], "only = muon"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_the_door_answers_wrong_words_with_one_line_and_2(given, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert study.main(given) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_help_shows_both_ways(capsys):
    assert study.main(["--help"]) == 0
    told = capsys.readouterr().out
    assert "results=results.csv" in told
    assert "optimizers=[adamw,lion,muon] model=pico" in told


def test_a_file_of_settings_says_only_what_differs_and_words_beat_it(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("optimizers: [adamw]\nbudget: {runs: 3}\nthreshold: 1e-2\nspace: {lion: {optimizer.lr: [1, 2]}}\n")
    settings = study.settings_of(["budget=5"], file)
    assert (settings["optimizers"], settings["budget"], settings["threshold"]) == (["adamw"], 5, 0.01)
    assert settings["space"]["lion"]["optimizer.lr"] == [1, 2]
    assert settings["space"]["lion"]["optimizer.weight_decay"]["reach"] == 2
    assert settings["seeds"] == 3
    file.write_text("optimisers: [adamw]\n")
    with pytest.raises(ConfigError, match="did you mean optimizers"):
        study.settings_of([], file)


def test_a_path_may_hold_what_is_grammar_elsewhere(tmp_path):
    odd = tmp_path / "a,b={c}.csv"
    own, _, _ = study.sorted_out([f"results={odd}", f"out={tmp_path}/x y"])
    settings = study.settings_of(own)
    assert (settings["results"], settings["out"]) == (str(odd), f"{tmp_path}/x y")


def test_the_studys_open_maps_are_none_of_train_py():
    with Composer() as composer, pytest.raises(ConfigError, match="no such field"):
        Checker(composer).job(["optimizer=adamw", "budget.runs=3"])


@pytest.fixture
def fake_jobs(monkeypatch, tmp_path):
    """`launch.run_jobs` as a function of the words; the run folders are as train.py's."""
    import lightning_opt.launch

    def loss(said: dict[str, str]) -> float:
        rate = {"adamw": 0.032, "lion": 0.002}[said["optimizer"]]
        lr = float(said["optimizer.lr"])
        if lr > 5 * rate:
            return math.inf
        base = {"adamw": 3.0, "lion": 2.98}[said["optimizer"]] - 0.1 * math.log(float(said["scale"].rstrip("x")))
        return base + 0.05 * math.log2(lr / rate) ** 2 + 0.002 * (int(said["seed"]) % 3)

    def run_jobs(lists, folder, *, words, shared=(), draw=True, until=math.inf):
        assert list(shared) == ["jobs_per_device=2"]
        known, before = SweepFolder(folder).jobs(), calls["ran"]
        for lines in lists:
            if calls["dies_after"] == calls["ran"] or calls["clock"] >= until:
                break
            calls["ran"] += 1
            calls["clock"] += 10.0
            run = RunFolder(Path(folder) / f"job-{len(known)}")
            (run.checkpoints / "step-000002").mkdir(parents=True)
            value = loss(dict(line.partition("=")[::2] for line in lines))
            state = "FINISHED" if math.isfinite(value) else "DIVERGED"
            run.status.write_text(json.dumps({"state": state, "reason": None}))
            about = {"state": state, "val_loss": value if state == "FINISHED" else None, "seconds": 10, "tokens": 1e6}
            run.summary.write_text(json.dumps({**about, "evaluation": {"hellaswag": {"value": 0.3}}}))
            run.metrics.write_text(f"step,tokens,time_s,val/loss\n1,1000,1,5.0\n2,2000,2,{min(value, 9.0)}\n")
            known.append(SweepJob(run, f"{len(known):08x}", list(lines), {}))
        SweepFolder(folder).write("recipes.study", [], known)
        return 143 if calls["dies_after"] == calls["ran"] else int(calls["ran"] - before < len(lists))

    calls = {"ran": 0, "dies_after": None, "clock": 0.0}
    monkeypatch.setattr(studying, "time", SimpleNamespace(monotonic=lambda: calls["clock"]))
    monkeypatch.setattr(lightning_opt.launch, "run_jobs", run_jobs, raising=False)
    monkeypatch.chdir(tmp_path)
    return calls


def test_a_whole_study_ends_in_a_verdict_and_a_table_that_the_replay_reads(fake_jobs, tmp_path, capsys):
    asked = [*TWO, "scales={default:[1x],adamw:[1x,2x,4x]}", "jobs_per_device=2", "evaluation=mini", "budget=6"]
    fake_jobs["dies_after"] = 7
    assert study.main(asked) == 143
    assert fake_jobs["ran"] == 7
    fake_jobs["dies_after"] = None
    assert study.main([*asked, "status=true"]) == 0
    assert "7 runs finished" in capsys.readouterr().out
    assert study.main(asked) == 0
    total = fake_jobs["ran"]
    out = tmp_path / "runs" / "study" / "femto"
    jobs = SweepFolder(out / "runs").jobs()
    with (out / "speedups.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["optimizer"] for row in rows} == {"lion"}
    # lion's loss at 1x lies 0.02 under AdamW's law 3.0 - 0.1 ln C: it is worth exp(0.2) times the data
    (found,) = [float(row["speedup"]) for row in rows if row["by"] == "tokens"]
    assert found == pytest.approx(math.exp(0.2), rel=0.02)
    verdict = (out / "report.md").read_text(encoding="utf-8")
    assert "Lion" in verdict
    assert str(tmp_path) not in verdict
    assert (out / "report.html").is_file()
    assert study.main(asked) == 0
    assert fake_jobs["ran"] == total  # nothing runs twice
    kept = {run.parent.name for run in out.glob("runs/*/checkpoints")}
    reported = {job.folder.path.name for job in jobs if "trainer.val_part=reporting" in job.overrides}
    assert kept == reported
    assert len(reported) == 4 * 3
    assert study.main([f"results={out / 'results.csv'}", "out=again", "fit=all", "sigma=pooled"]) == 0
    with (tmp_path / "again" / "speedups.csv").open() as file:
        assert list(csv.DictReader(file)) == rows


def test_when_the_time_is_over_nothing_more_starts_and_the_same_command_goes_on(fake_jobs, tmp_path, capsys):
    asked = [*TWO, "jobs_per_device=2", "budget=3"]
    assert study.main([*asked, "stop_after=35"]) == 0
    assert fake_jobs["ran"] == 4  # of the six of the first wave; the fourth began at 30 s
    assert "out of time (stop_after)" in capsys.readouterr().out
    assert study.main([*asked, "stop_after=20"]) == 0  # the last two of that wave, and none of the next
    assert fake_jobs["ran"] == 6
    assert study.main(asked) == 0
    assert fake_jobs["ran"] == 2 * (3 + 3)  # to tune, to report: none ran twice
    assert (tmp_path / "runs" / "study" / "femto" / "report.html").is_file()


def test_a_dry_run_counts_and_writes_nothing(fake_jobs, tmp_path, capsys):
    assert study.main([*TWO, "scales=[1x,2x]", "budget=5", "reduced_budget=3", "dry_run=true"]) == 0
    told = capsys.readouterr().out
    assert "28 runs at most: 16 to tune, 12 to report" in told
    assert not (tmp_path / "runs").exists()
    assert fake_jobs["ran"] == 0


def test_a_replay_needs_neither_torch_nor_training(tmp_path, repository):
    rows = ["source,optimizer,params,chinchilla,metric,value"]
    for name, gain in (("adamw", 0.0), ("lion", 0.02)):
        rows += [f"x,{name},130m,{ratio},c4en_loss_min,{3.0 + 0.5 * ratio**-0.5 - gain}" for ratio in (1, 2, 4, 8)]
    (tmp_path / "r.csv").write_text("\n".join(rows) + "\n")
    code = (
        "import sys; from recipes.study import main; code = main(['results=r.csv', 'out=o']); "
        "print('torch' in sys.modules, 'lightning' in sys.modules); sys.exit(code)"
    )
    path = os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False False"
    made = {"speedups.csv", "laws.csv", "verdict.csv", "report.html", "report.md"}
    assert made <= {path.name for path in (tmp_path / "o").iterdir()}


def test_the_small_study_is_what_its_page_says():
    assert study.settings_of([], SETTINGS)["models"] == ["femto", "pico"]
    design = designed(*words("all", ["models=[femto]"]))
    assert design.optimizers == OPTIMIZERS
    by_name = {name: {c.chinchilla for c in design.plans if c.optimizer == name} for name in OPTIMIZERS}
    assert by_name["adamw"] == {0.5, 1.0, 2.0, 4.0}
    assert all(ratios == {1.0, 2.0} for name, ratios in by_name.items() if name != "adamw")
    assert {cell.chinchilla for cell in design.first} == {1.0}
    for axes in design.axes.values():
        assert [axis.name for axis in axes[:2]] == ["optimizer.lr", "optimizer.weight_decay"]
        assert len(axes) == 3
    assert (design.budget.runs, design.reduced_budget.runs, len(design.seeds)) == (10, 4, 3)
    femto = design.plans[Cell("soap", "femto", 1.0)]
    assert femto.start["optimizer.lr"] == 0.012
    assert "optimizer.roles.embedding.lr_scale=3.0" in femto.words
    final, choosing = (Trial(femto, femto.start, 1, part) for part in ("reporting", "tuning"))
    assert {"evaluation=mini", "evaluation.tasks=[hellaswag]"} <= set(design.words(final))
    assert "evaluation=none" in design.words(choosing)


@pytest.mark.slow
def test_a_real_study_of_a_few_steps(tmp_path, repository):
    """femto for 8 and 16 steps, two optimizers, two rates: run, run again, replayed."""
    settings = tmp_path / "tiny.yaml"
    settings.write_text("space: {default: {optimizer.lr: {factor: 4, low: 1e-4, high: 1.0}}}\n")
    asked = [
        "optimizers=[adamw,lion]", "model=femto", "scales=[0.01x,0.02x]", "search=rate", "budget=2", "seeds=2",
        f"settings={settings}", f"out={tmp_path / 'study'}", "trainer.num_threads=1", "trainer.accelerator=cpu",
        "trainer.val_sequences=4", f"data.cache_dir={tmp_path / 'cache'}", "jobs_per_device=1",
    ]  # fmt: skip
    path = os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "recipes.study", *asked],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    jobs = SweepFolder(tmp_path / "study" / "runs").jobs()
    assert len(jobs) == 2 * 2 + 2 * 2 + 4 * 2  # two to tune each cell, two to report each
    assert {job.state for job in jobs} == {"FINISHED"}
    with (tmp_path / "study" / "results.csv").open() as file:
        final = [row for row in csv.DictReader(file) if row["metric"] == "val_loss"]
    assert len(final) == 4 * 2
    assert all(2.0 < float(row["value"]) < 8.0 for row in final)
    assert (tmp_path / "study" / "report.html").is_file()
