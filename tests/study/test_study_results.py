"""The table of results: what is read from the published one, what is refused, and that ours comes back as it was."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path

import pytest

from lightning_opt.plan import ConfigError
from lightning_opt.study import Cell, Results, non_embedding, read_results, recorded_change, write_results

HEAD = "source,optimizer,params,chinchilla,metric,value\n"


def table(tmp_path: Path, *rows: str) -> Path:
    path = tmp_path / "results.csv"
    path.write_text(HEAD + "".join(f"{row}\n" for row in rows))
    return path


def test_published_cells(published: Results, recorded: Path) -> None:
    """Against the csv module: every final loss, every ablation and every score, and nothing of anybody else's runs."""
    with (recorded / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    finals = [row for row in rows if row["metric"] == "c4en_loss_min"]
    assert len(published.losses) == len(finals) == 93
    for row in finals:
        cell = Cell(row["optimizer"], row["params"], float(row["chinchilla"]))
        assert published.losses[cell] == (float(row["value"]),)
    ablations = [row for row in rows if row["metric"].startswith(("c4en_loss_ablation:", "c4en_loss_best_config"))]
    assert sum(map(len, published.tuning.values())) == len(ablations)
    scores = {tuple(row.values()) for row in rows if row["metric"].startswith("acc:")}  # soap has two in two cells
    assert sum(len(values) for tasks in published.scores.values() for values in tasks.values()) == len(scores)
    assert published.sizes == {"130m": 134_217_728, "300m": 301_989_888}
    assert published.metric == "c4en_loss"
    assert not published.seconds  # the speedrun rows are another architecture's
    assert published.labels == ("130m", "300m")


def test_a_diverged_run_is_infinite(published: Results) -> None:
    assert published.tuning[Cell("mars", "130m", 8)]["beta2=0.9"] == math.inf
    assert published.tuning[Cell("mars", "130m", 1)]["warmup=1000"] == math.inf  # 40927 in the table


@pytest.mark.parametrize(
    ("change", "meant"),
    [
        ("learning_rate=0.004", ("learning_rate", 0.004)),
        ("epsilon=1e-25", ("epsilon", 1e-25)),
        ("train_batch_size=256", ("train_batch_size", 256)),
        ("normalize_grads=False", ("normalize_grads", False)),
        ("schedule.name=wsd", ("schedule.name", "wsd")),
        ("optimizer.betas=[0.9, 0.95]", ("optimizer.betas", [0.9, 0.95])),
        ("optimizer.max_grad_norm=null", ("optimizer.max_grad_norm", None)),
    ],
)
def test_changes(change: str, meant: tuple[str, object]) -> None:
    found = recorded_change(change)
    assert found == meant
    assert type(found[1]) is type(meant[1])


@pytest.mark.parametrize(
    ("label", "count"),
    [("130m", 134217728), ("1.2B", 1207959552), ("760m", 7.6e8), ("0.5b", 5e8), ("200k", 2e5), ("pico", None)],
)
def test_labels(label: str, count: float | None) -> None:
    assert non_embedding(label) == (None if count is None else pytest.approx(count))


def test_the_studys_counts() -> None:
    """32 layers of three MLP and four attention matrices: L (3 h i + 4 h h)."""
    shapes = {"130m": (512, 2048), "300m": (768, 3072), "520m": (1024, 4096), "1.2b": (1536, 6144)}
    for label, (hidden, inner) in shapes.items():
        assert non_embedding(label) == 32 * (3 * hidden * inner + 4 * hidden * hidden)


def test_a_live_table_comes_back(tmp_path: Path) -> None:
    a, b = Cell("adamw", "pico", 0.5), Cell("muon", "pico", 0.5)
    live = Results(
        losses={a: (4.0, 4.0, 3.9), b: (math.inf, 3.8)},  # two seeds with one loss are two seeds
        tuning={a: {"best_config": 4.01, "optimizer.betas[0]=0.9": math.inf}},
        scores={b: {"hellaswag": (0.3, 0.31)}},
        seconds={a: (10.0, 11.0, 10.0)},
        tokens={a: (1e6,) * 3},
        peak_bytes={b: (5e8, 5e8)},
        flops={b: (1e12, 1e12)},
        sizes={"pico": 196_608.0},
    )
    back = read_results(write_results(live, tmp_path / "results.csv"))
    assert dataclasses.replace(back, source="") == live


def test_whole_rows_count_once(tmp_path: Path) -> None:
    row = "a,adamw,130m,1,c4en_loss_min,3.5"
    found = read_results(table(tmp_path, row, row, "b,adamw,130m,1,c4en_loss_min,3.5"))
    assert found.losses == {Cell("adamw", "130m", 1): (3.5, 3.5)}


def test_cells_without_a_value_are_absent(tmp_path: Path) -> None:
    found = read_results(table(tmp_path, "a,adamw,520m,1,c4en_loss_min,3.1", "a,kron,520m,1,c4en_loss_min,"))
    assert list(found.losses) == [Cell("adamw", "520m", 1)]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["a,adamw,130m,1,c4en_loss_min,low"], ("line 2", "column value", "'low'")),
        (["a,adamw,130m,one,c4en_loss_min,3.5"], ("line 2", "column chinchilla", "'one'")),
        (["a,adamw,130m,1,c4en_loss_min,3.5", "a,adamw,130m,0,acc:piqa,0.5"], ("line 3", "column chinchilla", "> 0")),
        (["a,,130m,1,c4en_loss_min,3.5"], ("line 2", "column optimizer", "empty")),
        (["a,adamw,130m,1,c4en_loss_min"], ("line 2", "6 columns")),
        (["a,adamw,130m,1,loss,3.5"], ("c4en_loss_min", "none of them")),
        (["a,adamw,130m,1,val_loss,3.5", "a,adamw,130m,1,c4en_loss_min,3.5"], ("both", "not the same loss")),
        (["a,adamw,130m,1,c4en_loss_min,3.5", "a,adamw,130m,1,acc:piqa,nan"], ("line 3", "must be a number")),
        (["a,adamw,130m,1,c4en_loss_min,3.5", "a,lion,130M,1,c4en_loss_min,3.6"], ("params", "'130M'", "'130m'")),
        (["a,AdamW,130m,1,c4en_loss_min,3.5", "a,adamw,130m,2,c4en_loss_min,3.4"], ("optimizer", "one way")),
    ],
)
def test_refusals_name_line_and_column(tmp_path: Path, rows: list[str], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as refused:
        read_results(table(tmp_path, *rows))
    assert refused.value.field == "results"
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)


def test_a_table_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("step,loss\n1,2\n")
    with pytest.raises(ConfigError, match="no column source, optimizer"):
        read_results(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_results(tmp_path / "none.csv")
