"""The replay of the published table, of sizes nobody has here, and of a live study's own."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from lightning_opt.plan import ConfigError
from lightning_opt.study import Cell, LossLaw, Results, analyse, write_results
from lightning_opt.study.replay import replay


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_published_table(recorded: Path, tmp_path: Path) -> None:
    done = replay(recorded / "results.csv", tmp_path)
    speeds, laws = rows(tmp_path / "speedups.csv"), rows(tmp_path / "laws.csv")
    assert list(speeds[0]) == ["optimizer", "params", "chinchilla", "speedup", "low", "high", "by", "note"]
    assert list(laws[0]) == ["optimizer", "params", "fit_points", "alpha", "exponent", "floor"]
    assert done.paths == (tmp_path / "speedups.csv", tmp_path / "laws.csv")
    assert len(speeds) == len([cell for cell in done.results.losses if cell.optimizer != "adamw"])
    assert {row["by"] for row in speeds} == {"tokens"}
    [muon] = [row for row in speeds if (row["optimizer"], row["params"], row["chinchilla"]) == ("muon", "130m", "8")]
    assert round(float(muon["speedup"]), 2) == 1.41
    assert float(muon["low"]) < 1.41 < float(muon["high"])
    assert len(laws) == 21  # all but sophia at 300m, which has one ratio
    assert {row["fit_points"] for row in laws} == {"1;2;4;8"}
    sixteen = [row for row in speeds if row["chinchilla"] == "16"]
    assert {row["optimizer"] for row in sixteen} == {"nadamw", "muon", "soap"}
    assert all(row["note"] == "extrapolated" or row["speedup"] == "" for row in sixteen)
    assert any("muon 130m 8x" in note and "1.30 instead of 1.41" in note for note in done.facts["notes"])
    assert any("winner's curse" in note for note in done.facts["notes"])
    assert done.facts["cost"]["adamw"]["runs"] == 115  # 105 changes and 10 tuned configurations


def test_sizes_that_nobody_has_here(tmp_path: Path) -> None:
    """Others' tables: 520M and 1.2B, where most optimizers lack cells, and one size with two ratios."""
    law = {label: LossLaw(0.3, 0.45, floor) for label, floor in (("130m", 3.1), ("520m", 2.8), ("1.2b", 2.6))}
    ratios = (1.0, 2.0, 4.0, 8.0)
    losses = {Cell("adamw", label, ratio): (one(ratio),) for label, one in law.items() for ratio in ratios}
    losses |= {Cell("muon", label, 8.0): (one(8 * 1.2),) for label, one in law.items()}
    losses |= {Cell("adamw", "760m", ratio): (law["520m"](2 * ratio),) for ratio in (1.0, 2.0)}
    losses |= {Cell("soap", "760m", 1.0): (law["520m"](2.6),), Cell("kron", "1.2b", 1.0): (law["1.2b"](1.1),)}
    losses |= {Cell("soap", "77m", 1.0): (3.9,)}
    file = write_results(Results(losses, metric="c4en_loss"), tmp_path / "results.csv")
    done = replay(file, tmp_path / "out", sigma=1e-3)
    found = {(row["optimizer"], row["params"], row["chinchilla"]): row for row in rows(done.paths[0])}
    for label in law:
        assert float(found["muon", label, "8"]["speedup"]) == pytest.approx(1.2, rel=1e-6)
    assert float(found["kron", "1.2b", "1"]["speedup"]) == pytest.approx(1.1, rel=1e-6)
    assert found["soap", "760m", "1"]["note"] == "interpolated"
    assert found["soap", "77m", "1"]["note"] == "not enough cells"
    assert found["soap", "77m", "1"]["speedup"] == found["soap", "77m", "1"]["low"] == ""
    assert {(row["optimizer"], row["params"]) for row in rows(done.paths[1])} == {("adamw", label) for label in law}
    assert done.facts["joint_law"].cells == 14
    assert done.facts["refit"] == []
    assert not {"cost", "failures"} & set(done.facts)  # nothing of the tuning is in the table


def test_an_extrapolated_baseline_is_held_against_itself(tmp_path: Path) -> None:
    law = LossLaw(0.4, 0.5, 3.1)
    losses = {Cell("adamw", "130m", ratio): (law(ratio),) for ratio in (1.0, 2.0, 4.0, 8.0)}
    losses[Cell("adamw", "130m", 16.0)] = (law(20.0),)
    losses[Cell("muon", "130m", 8.0)] = (law(10.0),)
    done = analyse(Results(losses), tmp_path)
    assert any("1.25x over itself" in note for note in done.facts["notes"])
    [(words, wide)] = done.facts["refit"]
    assert words == "1x to 16x"
    assert wide[0].value != pytest.approx(1.25, rel=1e-3)
    other = analyse(Results(losses), tmp_path, fit=(1, 16))  # who asks for 16x is shown the fit without it
    [(words, usual)] = other.facts["refit"]
    assert words == "1x to 8x"
    assert [one.value for one in usual] == [one.value for one in done.speedups]
    assert [one.value for one in other.speedups] == [one.value for one in wide]
    assert not any("over itself" in note for note in other.facts["notes"])


def test_another_fit_is_shown_only_where_it_is_another(tmp_path: Path) -> None:
    law, ratios = LossLaw(0.4, 0.5, 3.1), (1.0, 2.0, 4.0, 8.0)
    losses = {Cell("adamw", label, ratio): (law(ratio),) for label in ("130m", "520m") for ratio in ratios}
    losses[Cell("adamw", "130m", 16.0)] = (law(20.0),)
    losses |= {Cell("muon", label, 8.0): (law(10.0),) for label in ("130m", "520m")}
    [(_, found)] = analyse(Results(losses), tmp_path).facts["refit"]
    assert {one.params for one in found} == {"130m"}


def test_a_baseline_that_gets_worse_credits_nobody(tmp_path: Path) -> None:
    losses = {Cell("adamw", "130m", ratio): (3.0 + 0.1 * ratio,) for ratio in (1.0, 2.0, 4.0, 8.0, 16.0)}
    done = analyse(Results({**losses, Cell("muon", "130m", 8.0): (3.0,)}), tmp_path)
    assert not any("over itself" in note or "under its floor" in note for note in done.facts["notes"])
    assert done.speedups[0].note.startswith("undefined")


def test_a_live_study_pools_its_noise(tmp_path: Path) -> None:
    law, offsets = LossLaw(0.4, 0.5, 3.1), (-4e-3, 0.0, 4e-3)
    losses = {Cell("adamw", "pico", ratio): tuple(law(ratio) + d for d in offsets) for ratio in (0.5, 1.0, 2.0, 4.0)}
    losses[Cell("lion", "pico", 1.0)] = tuple(law(1.1) + d for d in offsets)
    live = Results(losses, seconds={cell: (10.0 * cell.chinchilla,) * 3 for cell in losses})
    done = replay(write_results(live, tmp_path / "results.csv"), tmp_path, fit=None, sigma=None)
    assert done.facts["sigma"] == pytest.approx(4e-3)
    assert done.facts["freedom"] == 10
    assert {one.by for one in done.speedups} == {"tokens", "time"}
    assert all(one.value == pytest.approx(1.1, rel=1e-6) for one in done.speedups)
    assert not any(math.isnan(one.low) for one in done.speedups)


def test_no_sigma_without_seeds(tmp_path: Path) -> None:
    file = write_results(Results({Cell("adamw", "130m", 1.0): (3.5,)}), tmp_path / "results.csv")
    with pytest.raises(ConfigError, match="no cell has two seeds"):
        replay(file, tmp_path, sigma=None)
