"""The language-model recipe: its commands compose, and its page reads run folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_opt.run_folder import RunFolder, SweepFolder, SweepJob
from recipes.lion_language_model import page, plans
from recipes.lion_language_model.__main__ import main


def test_every_part_is_a_folder_and_the_betas_are_the_papers(tmp_path):
    commands = list(plans.commands("nano", list(plans.PARTS), tmp_path))
    assert {words[-1] for words in commands} == {f"hydra.sweep.dir={tmp_path / part}" for part in plans.PARTS}
    by_optimizer = {words[0]: words for words in commands if words[-1].endswith("optimizers")}
    assert "optimizer.betas=[0.95,0.98]" in by_optimizer["optimizer=lion"]
    assert {"optimizer.betas=[0.9,0.99]", "optimizer.eps=1e-6"} <= set(by_optimizer["optimizer=adamw"])
    assert not any(word.startswith("optimizer.betas") for word in by_optimizer["optimizer=adafactor"])
    assert len(list(plans.commands("wiki40b", ["beta2"], tmp_path))) == 2


@pytest.mark.parametrize("place", [*plans.PLACES, "quick"])
def test_the_jobs_are_checked_as_train_checks_them(place, tmp_path):
    """Each part's last command, with the first value of what it sweeps."""
    from lightning_opt.launch import main as train

    commands = {words[-1]: words[:-1] for words in plans.commands(place, list(plans.PARTS), tmp_path)}
    for words in commands.values():
        assert train([*map(first_value, words), "--cfg", "job"]) == 0


def first_value(word: str) -> str:
    key, _, values = word.partition("=")
    return f"{key}={values.partition(']')[0]}]" if values.startswith("[") else f"{key}={values.partition(',')[0]}"


def finished(folder: Path, losses: dict[tuple[str, ...], float]) -> None:
    """A sweep folder as a finished sweep leaves it."""
    jobs = []
    for number, (overrides, loss) in enumerate(losses.items()):
        run = RunFolder(folder / f"job-{number}")
        run.path.mkdir(parents=True)
        asked = dict(override.split("=", 1) for override in overrides)
        name, seed = asked["optimizer"], int(asked.get("seed", 1234))
        rate = 0.001 * float(asked.get("optimizer.lr_scale", 1))
        differs = {key: value for key, value in asked.items() if key not in ("seed", "optimizer")}
        config = {"seed": seed, "optimizer": {"name": name, "lr": rate, "lr_scale": 1.0}, "differs": differs}
        run.config.write_text(json.dumps(config), encoding="utf-8")
        run.status.write_text(json.dumps({"state": "FINISHED", "step": 1}), encoding="utf-8")
        run.plan.write_text(json.dumps({"optimizer": name}), encoding="utf-8")
        run.summary.write_text(json.dumps({"state": "FINISHED", "val_loss": loss, "optimizer": name}), encoding="utf-8")
        run.metrics.write_text(f"step,tokens,val/loss\n1,2048,{loss}\n", encoding="utf-8")
        jobs.append(SweepJob(run, str(number), list(overrides), {}))
    SweepFolder(folder).write("train.py -m", [], jobs)


def test_the_page_says_who_ended_lowest(tmp_path):
    names = {"lion": 3.0, "adamw": 2.8, "adafactor": 2.9}
    finished(
        tmp_path / "optimizers",
        {
            (f"optimizer={name}", f"optimizer.lr_scale={scale}", f"seed={seed}"): loss
            + 0.2 * (scale != 1)
            + 0.01 * seed
            for name, loss in names.items()
            for scale in (0.5, 1, 2)
            for seed in (1, 2)
        },
    )
    finished(tmp_path / "beta2", {("optimizer=lion", f"optimizer.betas=[0.95,{b}]"): 3 + b for b in (0.9, 0.99)})
    text = page.write(tmp_path, "nano").read_text(encoding="utf-8")
    assert "AdamW ended lowest: perplexity 16.7" in text or "adamw ended lowest: perplexity 16.7" in text
    assert "0.100 nats behind (beyond the noise)" in text
    assert text.count("<svg") >= 2
    assert "batch_size: no run has come to its end" in text
    assert str(tmp_path) not in text


def test_a_page_of_nothing(tmp_path):
    assert main(["--page", "--folder", str(tmp_path)]) == 0
    assert "No run has come to its end" in (tmp_path / "index.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_smoke_test(tmp_path):
    assert main(["--quick", "--folder", str(tmp_path)]) == 0
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert text.count("<svg") >= 3
