"""Article 2's figures: the cells are the study's, the page is drawn from tables, from runs, and from little."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lightning_opt.plan import ConfigError, tuned_records
from lightning_opt.run_folder import RunFolder
from lightning_opt.study import Cell
from recipes.fantastic_optimizers import curves, plans, runs
from recipes.fantastic_optimizers.__main__ import main

RATIOS = {"130m": (1, 2, 4, 16), "300m": (1, 2, 16)}
FLOORS = {"adamw": 3.20, "muon": 3.18, "lion": 3.205, "soap": 3.181}


def test_every_cell_is_there_once_and_has_published_values():
    cells = [one for one in plans.planned() if one.why == "cells"]
    named = [one.cell for one in cells]
    assert len(set(named)) == len(named) == 3 * 4 * 10 + 4 + 2 + 4 * 4 + 2 * 4
    for one in cells:
        said = dict(word.split("=", 1) for word in one.words)
        records = tuned_records(said["optimizer"])
        published = [
            r for r in records if r.measured == "published" and r.model == said["model"] and r.at(said["scale"])
        ]
        assert len(published) == 1, one


def test_the_rows_of_single_figures():
    words = {one.why: one.words for one in plans.planned() if one.why != "cells"}
    assert "optimizer.lr=6e-4" in words["under_tuned"]
    assert "optimizer.weight_decay=0.1" in words["shared_decay"]
    assert [one.cell.chinchilla for one in plans.planned() if one.why == "under_tuned"] == [1.0, 2.0]


@pytest.mark.parametrize("place", ["130m/1x", "1.2b/8x"])
def test_commands_compose(place, capsys):
    from lightning_opt.launch import main as train

    assert main(["--commands", place]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(plans.chosen(place))
    muon = next(one for one in plans.chosen(place) if one.cell.optimizer == "muon")
    assert muon.command in lines
    assert train([*muon.words, "--cfg", "job"]) == 0


def table(path: Path, ratios=RATIOS) -> Path:
    """A table of results by a closed form, with scores and recorded changes."""
    rows = ["source,optimizer,params,chinchilla,metric,value"]
    for name, floor in FLOORS.items():
        for label, lift in (("130m", 0.3), ("300m", 0.0)):
            for ratio in ratios.get(label, ()):
                loss = floor + lift + 0.4 * ratio**-0.35
                rows += [f"s,{name},{label},{ratio},c4en_loss_min,{loss}"]
                rows += [f"s,{name},{label},{ratio},acc:hellaswag_0shot,{1 - loss / 5}"]
        for change, rise in (("learning_rate=0.004", 0.01), ("learning_rate=0.016", 0.02), ("weight_decay=0.1", 0.05)):
            rows.append(f"s,{name},130m,1,c4en_loss_ablation:{change},{floor + 0.7 + rise}")
        rows.append(f"s,{name},130m,1,c4en_loss_best_config,{floor + 0.7}")
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def tuned(path: Path) -> Path:
    best = {"learning_rate": 0.008, "weight_decay": 0.6}
    path.write_text(json.dumps({"optimizers": {n: {"settings": {"130m/1x": {"best": best}}} for n in FLOORS}}))
    return path


def ways(path: Path) -> Path:
    """Curves that cross: Muon is behind until 60 % of the way."""
    rows = [",".join(curves.COLUMNS)]
    rows += [f"adamw,130m,1,{step},{step * 1000},{5 - 0.01 * step}" for step in range(0, 101, 5)]
    rows += [f"muon,130m,1,{step},{step * 1000},{5.3 - 0.015 * step}" for step in range(0, 101, 5)]
    path.write_text("\n".join(rows))
    return path


def drawn(arguments: list[str], out: Path, capsys) -> str:
    assert main([*arguments, "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out / "index.html")
    text = (out / "index.html").read_text(encoding="utf-8")
    assert "could not be drawn" not in text.lower()
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert not re.search(r"[>(]nan\b", text)
    return text


@pytest.mark.filterwarnings("error")
def test_every_figure_from_tables(tmp_path, capsys):
    files = ["--results", str(table(tmp_path / "r.csv")), "--tuned", str(tuned(tmp_path / "t.yaml"))]
    text = drawn([*files, "--curves", str(ways(tmp_path / "c.csv"))], tmp_path / "out", capsys)
    for key in ("under_tuned", "decay", "cells", "kinds", "speed_up", "sixteen", "crossing"):
        figures = re.findall(rf'<figure id="[^"]*-{key.replace("_", "-")}-published"', text)
        assert figures, key
    assert "6e-4, is not in these results (the rates at hand are 0.004 to 0.016)" in text
    markdown = (tmp_path / "out" / "index.md").read_text(encoding="utf-8")
    lion = FLOORS["lion"] + 0.7
    assert f"| Lion | 130m 1x | 0.6 | {lion:.4f} | {lion + 0.05:.4f} | +0.050 |" in markdown
    assert "| 130m 1x | Muon | AdamW | 60.0k (60 %) | 0.25 | 0.20 |" in markdown
    assert "Not whole: these results have no cell of 520m or 1.2b" in text
    assert (tmp_path / "out" / "published" / "speedups.csv").is_file()
    again = re.search(r"python -m recipes.fantastic_optimizers --results [^<]+", text)
    assert again
    assert "--curves" in again[0]


def test_what_is_not_handed_over_is_said(tmp_path, capsys):
    text = drawn(["--results", str(table(tmp_path / "r.csv", {"130m": (1,)}))], tmp_path / "out", capsys)
    assert "hand over loss_curves.csv with --curves" in text
    assert "No 16x cell in these results." in text
    assert "not enough cells" in text
    assert text.count("Not whole") == 2


def run(folder: Path, optimizer: str, model: str, rate: float, seed: int, loss: float, **changes) -> Path:
    """A run folder as a finished run leaves it."""
    paths = RunFolder(folder)
    folder.mkdir(parents=True)
    tokens = 20 * 134_217_728
    config = {"seed": seed, "optimizer": {"name": optimizer, "lr": rate, "lr_scale": 1.0, "weight_decay": 0.1}}
    config |= {"scale": {"chinchilla": changes.get("scale", 1.0)}}
    plan = {"model": model, "optimizer": optimizer, "params_non_embedding": 134_217_728, "tokens": tokens}
    summary = {"state": "FINISHED", "optimizer": optimizer, "val_loss": loss, "tokens": tokens, "seconds": 50.0}
    summary |= {"peak_memory_bytes": 2**30, "evaluation": {"suite": "full", "hellaswag": {"value": 0.31}}}
    state = {"state": changes.get("state", "FINISHED"), "step": 2}
    for path, value in ((paths.config, config), (paths.plan, plan), (paths.summary, summary), (paths.status, state)):
        path.write_text(json.dumps(value), encoding="utf-8")
    rows = [f"{step},{step * tokens // 4},{step * 10},{loss + 1 - step / 4}" for step in range(1, 5)]
    paths.metrics.write_text("\n".join(["step,tokens,time_s,val/loss", *rows]), encoding="utf-8")
    return folder


def test_runs_find_their_cells_by_the_studys_names(tmp_path):
    found = [run(tmp_path / f"a{seed}", "adamw", "llama_130m", 0.008, seed, 3.5 + 0.01 * seed) for seed in (1, 2)]
    found.append(run(tmp_path / "b", "adamw", "llama_130m", 6e-4, 1, 3.7))
    found.append(run(tmp_path / "c", "mars_study", "llama_1_2b", 0.008, 1, 3.0, scale=2.0))
    found.append(run(tmp_path / "d", "lion", "pico", 0.001, 1, 4.0, scale=None, state="FAILED"))
    read = runs.read(found)
    adamw, mars = Cell("adamw", "130m", 1.0), Cell("mars", "1.2b", 2.0)
    assert read.results.losses == {adamw: (pytest.approx(3.51), pytest.approx(3.52)), mars: (3.0,)}
    assert read.results.seconds[adamw] == (50.0, 50.0)
    assert read.results.scores[adamw] == {"hellaswag": (0.31, 0.31)}
    assert [(config["learning_rate"], loss) for config, loss in read.tried[adamw]] == [
        (0.008, pytest.approx(3.515)),
        (6e-4, 3.7),
    ]
    assert read.curves[mars]["tokens"][1][-1] == 3.0
    assert read.left_out == ("d: failed",)


def test_the_page_from_runs_and_from_both(tmp_path, capsys):
    folders = [
        run(tmp_path / "a", "adamw", "llama_130m", 0.008, 1, 3.5),
        run(tmp_path / "b", "muon", "llama_130m", 0.02, 1, 3.4),
    ]
    folders.append(run(tmp_path / "c", "adamw", "llama_130m", 6e-4, 1, 3.7))
    given = ["--runs", *map(str, folders)]
    text = drawn(given, tmp_path / "out", capsys)
    assert "rate for this size, 6e-4, is among the rates" in text
    assert "Every run that was given has its place." in text
    both = drawn([*given, "--results", str(table(tmp_path / "r.csv", {"130m": (1,)}))], tmp_path / "both", capsys)
    assert "(these runs)" in both
    assert "(published)" in both


def test_curves_of_two_runs_are_told_apart(tmp_path):
    path = tmp_path / "c.csv"
    rows = ["soap,300m,1,0,10,12.0", "soap,300m,1,10,100,5.4", "soap,300m,1,0,10,12.0", "soap,300m,1,10,100,3.2"]
    path.write_text("\n".join([",".join(curves.COLUMNS), *rows, "lion,300m,1,10,100,3.3"]))
    found, twice = curves.read(path)
    assert found == {Cell("soap", "300m", 1.0): ([100.0], [3.2]), Cell("lion", "300m", 1.0): ([100.0], [3.3])}
    assert twice == [Cell("soap", "300m", 1.0)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2", "must have the columns"),
        (",".join(curves.COLUMNS) + "\nadamw,130m,1,x,2,3", "line 2, column step: must be a number, not 'x'"),
        (",".join(curves.COLUMNS) + "\nadamw,130m,1,1,2", "line 2, column c4en_loss: must be a number"),
    ],
)
def test_a_table_of_curves_that_is_none(tmp_path, text, words):
    path = tmp_path / "c.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(words)):
        curves.read(path)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--curves", "c.csv"],
        ["--tuned", "t.yaml"],
        ["--results", "nowhere.csv"],
        ["--runs", "nowhere"],
        ["--commands", "131m"],
        ["--commands", "130m/3x"],
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
