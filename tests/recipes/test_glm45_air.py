"""The GLM-4.5-Air recipe: its commands compose, its maps are whole, and its page reads run folders."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from statistics import fmean, stdev

import pytest

from lightning_opt.evaluation.mmlu_subjects import TEST_DOCUMENTS
from lightning_opt.reports.jobs import Job
from lightning_opt.reports.reading import Run
from lightning_opt.run_folder import RunFolder, SweepFolder, SweepJob
from recipes.glm45_air_adamw_vs_lion import claims, measures, page, plans
from recipes.glm45_air_adamw_vs_lion.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
VALUES = {"glm45_air_adamw": 3.0, "glm45_air_lion": 3.25}


def singles(words: list[str]) -> list[list[str]]:
    """One list of overrides for each value of ``experiment=``, with the first value of all else that is swept."""
    key, _, names = words[0].partition("=")
    rest = [word if "[" in word or "dir=" in word else word.partition(",")[0] for word in words[1:-1]]
    return [[f"{key}={name}", *rest] for name in names.split(",")]


@pytest.mark.parametrize("size", ["nano", "mini", "air"])
def test_the_jobs_are_checked_as_train_checks_them(size, tmp_path):
    """The first row of each sweep, and at nano the staged one, whose warm-up before a seam is counted in steps."""
    from lightning_opt.launch import main as train

    extra = [] if size == "nano" else [f"data.path={tmp_path}"]
    (tmp_path / "a.txt").write_text("some text\n" * 99, encoding="utf-8")
    for words in plans.commands(size, 10, tmp_path, ("rows",), extra):
        rows = singles(words)
        for overrides in rows[:: max(1, len(rows) - 1)] if size == "nano" else rows[:1]:
            assert train([*overrides, "--cfg", "job"]) == 0


@pytest.mark.parametrize(
    ("row", "rule", "rate", "decay", "batch"),
    [
        ("adamw", "adamw", 2.5e-5, 0.01, 256),
        ("lion", "lion", 2.5e-5, 0.01, 256),
        ("lion_accumulated", "lion", 5e-5, 0.01, 1024),
        ("adamw_stable", "adamw", 1.5e-5, 0.01, 256),
        ("adamw_code", "adamw", 2.5e-5, 0.015, 256),
        ("staged", "lion_adamw_lion", 2.5e-5, 0.01, 256),
    ],
)
def test_a_row_is_the_articles(row, rule, rate, decay, batch, capsys):
    import yaml

    from lightning_opt.launch import main as train

    assert train([f"experiment=glm45_air_{row}", "--cfg", "job"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    optimizer, trainer = config["optimizer"], config["trainer"]
    found = (optimizer["name"], float(optimizer["lr"]), optimizer["weight_decay"], trainer["global_batch_size"])
    assert found == (rule, rate, decay, batch)
    assert (trainer["max_epochs"], config["model"]["context_length"], config["schedule"]["warmup"]) == (10, 8192, 0.05)
    betas = {"adamw": [0.9, 0.999], "lion": [0.9, 0.99]}
    if rule in betas:
        assert optimizer["betas"] == betas[rule]
    else:
        phases = list(optimizer["phases"].values())
        assert [phase["betas"] for phase in phases] == [betas[phase["rule"]] for phase in phases]
        assert [phase["rule"] for phase in phases] == ["lion", "adamw", "lion"]


def test_every_job_is_asked_for_once_and_the_scan_shares_its_middle_with_the_rows(tmp_path):
    rows, wide, rates = plans.commands("nano", 10, tmp_path)
    assert len(singles(rows)) + len(singles(wide)) == len(plans.ROWS)
    assert singles(wide)[0][0].endswith("accumulated")
    assert "trainer.global_batch_size=16" in wide
    assert "optimizer.lr=1e-05,5e-05,0.0001" in rates
    assert list(plans.commands("120b", 10, tmp_path)) == list(plans.commands("air", 10, tmp_path))


def test_both_maps_take_everything_once():
    subjects = [name for names in measures.mapped(measures.SUBJECTS).values() for name in names]
    assert sorted(subjects) == sorted(TEST_DOCUMENTS)
    problems = [number for numbers in measures.mapped(measures.PROBLEMS).values() for number in numbers]
    assert sorted(problems) == list(range(164))


def test_a_group_of_subjects_counts_documents_and_not_subjects():
    results = {"mmlu_virology": {"acc,none": 0.5}, "mmlu_astronomy": {"acc,none": 0.2}, "mmlu_law": {"acc,none": 1}}
    counts = {"mmlu_virology": {"effective": 30}, "mmlu_astronomy": {"effective": 10}, "mmlu_law": {"effective": 9}}
    summary = {"evaluation": {"mmlu": {"value": 0.4}}}
    job = Job(Path(), Run(Path(), summary=summary, results={"results": results, "n-samples": counts}))
    assert measures.subjects("science")(job) == pytest.approx((15 + 2) / 40)
    assert measures.subjects("humanities")(job) is None
    summary["evaluation"]["mmlu"]["degenerate"] = True
    assert measures.subjects("science")(job) is None


def test_problems_by_topic_from_lm_evals_samples():
    samples = [{"doc": {"task_id": f"HumanEval/{number}"}, "pass@1": float(number == 1)} for number in (0, 1, 6)]
    job = Job(Path(), Run(Path(), results={"samples": {"humaneval": samples}}))
    assert measures.problems("text")(job) == 0.5  # 1 and 6 are about text, 0 is about lists
    assert measures.problems("lists")(job) == 0
    assert measures.problems("numbers")(job) is None


def made_up(folder: Path, part: str, runs: list[tuple[str, int, float, dict]]) -> None:
    """A sweep folder as a finished sweep leaves it: experiment, seed, rate and what the summary says."""
    jobs = []
    for number, (row, seed, rate, says) in enumerate(runs):
        run = RunFolder(folder / part / f"job-{number}")
        run.path.mkdir(parents=True)
        name = "lion" if "lion" in row else "adamw"
        optimizer = {"name": name, "lr": rate, "lr_scale": 1.0, "weight_decay": 0.01}
        config = {"seed": seed, "optimizer": optimizer, "row": row}
        summary = {"state": "FINISHED", "optimizer": name, "model": "moe_nano", "params_total": 2**20, **says}
        run.config.write_text(json.dumps(config), encoding="utf-8")
        run.status.write_text(json.dumps({"state": "FINISHED", "step": 1}), encoding="utf-8")
        run.plan.write_text(json.dumps({"optimizer": name, "global_batch_size": 4}), encoding="utf-8")
        run.summary.write_text(json.dumps(summary), encoding="utf-8")
        run.metrics.write_text(f"step,tokens,val/loss\n1,2048,{says['val_loss']}\n", encoding="utf-8")
        jobs.append(SweepJob(run, str(number), [f"experiment={row}", f"seed={seed}", f"optimizer.lr={rate}"], {}))
    SweepFolder(folder / part).write("train.py -m", [], jobs)


def full(folder: Path) -> None:
    """Two rows, three seeds, and a scan."""
    says = {
        "glm45_air_adamw": {"optimizer_state_bytes": 2**23, "peak_memory_bytes": 2**25, "expert_load_cv": 0.5},
        "glm45_air_lion": {"optimizer_state_bytes": 2**22, "peak_memory_bytes": 2**24, "expert_load_cv": None},
    }
    chance = {"evaluation": {"mmlu": {"value": 0.26, "chance": 0.25}, "humaneval": {"skipped": "no sandbox"}}}
    runs = [
        (row, seed, 1e-3, {"val_loss": loss + 0.01 * seed, **says[row], **chance})
        for row, loss in VALUES.items()
        for seed in (1, 2, 3)
    ]
    made_up(folder, "rows", runs)
    made_up(folder, "rates", [(row, 1, rate, {"val_loss": 4.0}) for row in VALUES for rate in (4e-4, 2e-3, 4e-3)])


def test_the_page_shows_means_spreads_and_what_is_missing(tmp_path):
    full(tmp_path / "nano")
    path, words = page.write(tmp_path / "nano", "nano", 10)
    text = path.read_text(encoding="utf-8")
    assert "Lion ended 0.250 nats above AdamW, beyond the noise between seeds (3 and 3 seeds)" in words
    losses = [3.01, 3.02, 3.03]
    assert f"{fmean(losses):.3f} ± {stdev(losses):.3f}" in text
    assert "50 %" in text
    assert "not measured" in text
    assert text.count("<svg") == 1
    assert str(tmp_path) not in text
    for part in ("Decision matrix", "MMLU", "HumanEval", "Efficiency", "Stability", "Check-list", "slime"):
        assert part in text


def test_what_was_not_measured_is_no_zero_and_no_tick(tmp_path):
    full(tmp_path)
    found = page._read(tmp_path)
    lion, adamw = found.rows["glm45_air_lion"], found.rows["glm45_air_adamw"]
    assert measures.spread(lion, measures.balance) == "not measured"
    assert measures.spread(adamw, measures.balance) == "0.8000"
    assert measures.spread(adamw, measures.score("humaneval")) == "not measured"
    assert measures.spread(adamw[:1], measures.of("val_loss")) == "3.010 (n = 1)"
    marks = [check.mark for check in claims.checklist(found.rows, found.edges)]
    assert marks == ["[x]", "[x]", "[?]", "[x]", "[x]"]
    assert [check.mark for check in claims.checklist({}, None)] == ["[?]"] * 5


def test_a_load_over_the_alarm_and_a_run_that_diverged_take_their_ticks(tmp_path):
    full(tmp_path)
    run = RunFolder(tmp_path / "rows" / "job-0")
    summary = json.loads(run.summary.read_text(encoding="utf-8"))
    run.summary.write_text(json.dumps({**summary, "expert_load_cv": 0.9, "state": "DIVERGED"}), encoding="utf-8")
    run.status.write_text(json.dumps({"state": "DIVERGED", "step": 1}), encoding="utf-8")
    found = page._read(tmp_path)
    marks = [check.mark for check in claims.checklist(found.rows, found.edges)]
    assert (marks[1], marks[4]) == ("[ ]", "[ ]")
    assert sum(job.state == "FINISHED" for job in found.rows["glm45_air_adamw"]) == 2


def test_a_page_of_nothing(tmp_path, capsys):
    assert main(["--page", "--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("[?]") == 5
    assert "have not both come to an end" in (tmp_path / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("words", [["--epochs", "0"], ["--model_size", "huge"], ["--modelsize=nano"], ["nano"]])
def test_what_is_no_option_is_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("run_optimizer_benchmark.sh: error:")


def test_the_script_is_the_recipe():
    script = ROOT / "run_optimizer_benchmark.sh"
    said = subprocess.run(["bash", str(script), "--help"], capture_output=True, text=True, check=True, cwd="/").stdout
    assert "--model_size {nano,mini,air,120b}" in said
    assert "--epochs" in said


@pytest.mark.slow
def test_the_smoke_test(tmp_path):
    assert main(["--quick", "--folder", str(tmp_path)]) == 0
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    found = page._read(tmp_path)
    assert [len(jobs) for jobs in found.rows.values()] == [2, 2, 0, 0, 0, 0]
    assert all(job.state == "FINISHED" for jobs in found.rows.values() for job in jobs)
    assert measures.spread(found.rows["glm45_air_lion"], measures.of("expert_load_cv")) != "not measured"
    assert "<svg" in text
