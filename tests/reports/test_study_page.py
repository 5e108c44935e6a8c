"""A study's page: every number equal to the table it came from, every kind of missing said, nothing ordered by luck."""

from __future__ import annotations

import csv
import math
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import scipy.stats
from html_page import BROKEN, Page

from lightning_opt.reports import study
from lightning_opt.reports.style import optimizer_colours
from lightning_opt.study import Cell, Results, SpeedUp, fit_hyper_law, speed_ups

ROOT = Path(__file__).resolve().parents[2]
LAW = {"adamw": (0.40, 3.20), "muon": (0.34, 3.20), "soap": (0.34, 3.201), "lion": (0.42, 3.20)}
NAMES = {"adamw": "AdamW", "muon": "Muon", "soap": "SOAP", "lion": "Lion"}
NOISE = (-0.002, 0.0, 0.0023)
RATIOS = (1.0, 2.0, 4.0, 8.0)
SIGMA = 0.003


def loss(name: str, ratio: float) -> float:
    alpha, floor = LAW[name]
    return alpha * ratio**-0.3 + floor


def seeded(**changes: Any) -> Results:
    """Three seeds in every cell of one model."""
    cells = {Cell(name, "130m", ratio): loss(name, ratio) for name in LAW for ratio in RATIOS}
    losses = {cell: tuple(value + noise for noise in NOISE) for cell, value in cells.items()}
    return Results(**{"losses": losses, "sizes": {"130m": 1.34e8}, "source": "made up", **changes})


def once(losses: dict[tuple[str, float], float]) -> Results:
    return Results(losses={Cell(name, "130m", ratio): (value,) for (name, ratio), value in losses.items()})


def drawn(folder: Path, results: Results, *rest: Any, **facts: Any) -> Page:
    study.write(folder, results, *rest, facts=facts)
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert page.faults == []
    texts = page.text + (folder / "report.md").read_text(encoding="utf-8")
    assert BROKEN not in texts
    assert "No verdict could be drawn" not in texts
    assert not re.search(r"\b(nan|inf|None)\b", page.text)
    return page


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    results = seeded()
    study.write(folder, results, speed_ups(results, sigma=SIGMA), facts={"sigma": SIGMA, "fit": "1x to 8x"})
    return folder


@pytest.fixture(scope="module")
def page(whole: Path) -> Page:
    return Page((whole / "report.html").read_text(encoding="utf-8"))


def rows(page: Page, key: str) -> dict[str, dict[str, str]]:
    header, *body = page.tables[key]
    return {row[0]: dict(zip(header, row, strict=True)) for row in body}


def verdict_csv(folder: Path) -> dict[tuple[str, float], dict[str, str]]:
    with (folder / "verdict.csv").open(newline="") as file:
        return {(row["optimizer"], float(row["chinchilla"])): row for row in csv.DictReader(file)}


def test_every_loss_is_the_tables_mean_and_spread(page: Page, whole: Path) -> None:
    table, plain = rows(page, "losses"), verdict_csv(whole)
    for name in LAW:
        for ratio in RATIOS:
            values = [loss(name, ratio) + noise for noise in NOISE]
            shown = table[NAMES[name]][f"130m {ratio:g}x"].removesuffix(" ▾")
            assert shown == f"{fmean(values):.4f} ± {stdev(values):.4f}"
            row = plain[name, ratio]
            assert (float(row["loss"]), float(row["std"])) == (
                pytest.approx(fmean(values)),
                pytest.approx(stdev(values)),
            )
            assert row["n"] == "3"
    lowest = [name for name, row in table.items() if row["130m 1x"].endswith("▾")]
    assert lowest == ["Muon"]


def test_the_test_is_scipys(page: Page, whole: Path) -> None:
    error = SIGMA * math.sqrt(2 / 3)
    for (name, ratio), row in verdict_csv(whole).items():
        if name == "adamw":
            assert row["against_baseline"] == "baseline"
            continue
        p = scipy.stats.norm.sf((loss("adamw", ratio) - loss(name, ratio)) / error)
        assert float(row["p_better_than_baseline"]) == pytest.approx(p, abs=1e-9)
        told = "lower" if p < 0.05 else "higher" if p > 0.95 else "not told apart"
        assert row["against_baseline"] == told
        mark = {"lower": "●", "higher": "●", "not told apart": "○"}[told]
        gap = f"{loss(name, ratio) - loss('adamw', ratio):+.4f} {mark}".replace("-", "\N{MINUS SIGN}")
        assert rows(page, "gaps")[NAMES[name]][f"130m {ratio:g}x"] == gap
    assert "sigma * sqrt(1/n_a + 1/n_b)" in page.text


def test_who_cannot_be_told_apart_is_not_ordered(page: Page) -> None:
    head = page.text.split("Loss of every cell")[0]
    assert "At 1x Muon (3.5401) cannot be told from SOAP (3.5411); the other 2 ended higher, beyond noise." in head
    assert "ended lowest" not in head
    assert "Against AdamW: lower beyond noise in every cell (their number): Muon (4) and SOAP (4)" in head
    assert "Lion higher in 4" in head
    assert "n = 3" in head
    assert "sigma = 0.003 nats, an input" in head


def test_a_clear_lead_is_told_with_its_gap(tmp_path: Path) -> None:
    page = drawn(tmp_path, once({("adamw", 1.0): 3.53, ("muon", 1.0): 3.46, ("lion", 1.0): 3.55}), sigma=SIGMA)
    assert "130m: Muon ended lowest at 1x (3.4600 nats), beyond noise: 0.070 below AdamW (3.5300)." in page.text
    row = page.tables["lowest"][1]
    z = 0.07 / (SIGMA * math.sqrt(2))
    assert row[3:8] == ["0.070", "1", f"{z:.2f}", "< 0.001", "yes"]


def test_one_seed_and_no_sigma_is_no_order(tmp_path: Path) -> None:
    page = drawn(tmp_path, once({("adamw", 1.0): 3.53, ("muon", 1.0): 3.46}))
    assert "The spread between seeds is not known, so no difference was tested." in page.text
    assert "Not tested against it: AdamW (3.5300)" in page.text
    assert "beyond noise:" not in page.text.split("Loss of every cell")[0]
    assert page.tables["lowest"][1][5:8] == ["not measured", "not measured", "not tested"]


def test_without_a_sigma_seeds_are_paired(tmp_path: Path) -> None:
    a, b = (3.50, 3.53, 3.51), (3.52, 3.54, 3.534)
    results = Results(losses={Cell("muon", "pico", 1.0): a, Cell("adamw", "pico", 1.0): b})
    page = drawn(tmp_path, results)
    t = scipy.stats.ttest_rel(b, a, alternative="greater")
    assert page.tables["lowest"][1][5:8] == [
        f"{t.statistic:.2f}",
        f"{t.pvalue:.3f}",
        "yes" if t.pvalue < 0.05 else "no",
    ]


def test_a_pooled_sigma_says_its_freedom(tmp_path: Path) -> None:
    results = once({("adamw", 1.0): 3.53, ("muon", 1.0): 3.52})
    page = drawn(tmp_path, results, sigma=0.004, freedom=6)
    p = scipy.stats.t.sf(0.01 / (0.004 * math.sqrt(2)), 6)
    assert page.tables["lowest"][1][6] == f"{p:.3f}"
    assert "6 degrees of freedom" in page.text


def test_a_pooled_sigma_keeps_seeds_paired(tmp_path: Path) -> None:
    """Seeds that lift both cells alike say nothing against the gap between them."""
    a, b = (3.50, 3.53, 3.51), (3.512, 3.539, 3.523)
    results = Results(losses={Cell("muon", "pico", 1.0): a, Cell("adamw", "pico", 1.0): b})
    page = drawn(tmp_path, results, sigma=0.015, freedom=4)
    t = scipy.stats.ttest_rel(b, a, alternative="greater")
    assert page.tables["lowest"][1][5:8] == [f"{t.statistic:.2f}", f"{t.pvalue:.3f}", "yes"]
    assert "less each seed's own effect" in page.text


def test_diverged_seeds_are_said_and_not_averaged_away(tmp_path: Path) -> None:
    cells = {Cell("adamw", "130m", 1.0): (3.5, 3.51, 3.52), Cell("lion", "130m", 1.0): (3.4, math.inf, 3.42)}
    cells |= {Cell("muon", "130m", 1.0): (math.inf,) * 3}
    page = drawn(tmp_path, Results(losses=cells), sigma=SIGMA)
    table = rows(page, "losses")
    assert table["Lion"]["130m 1x"].startswith("3.410 ± 0.014 (1 of 3 diverged)")
    assert table["Muon"]["130m 1x"] == "diverged"
    assert (
        "At 1x the lowest was AdamW (3.5100). Not tested against it: Lion (3.4100; 1 of 3 seeds diverged)" in page.text
    )
    assert table["AdamW"]["130m 1x"].endswith("▾")
    assert verdict_csv(tmp_path)["muon", 1.0]["against_baseline"] == "diverged"
    assert "ended lowest" not in page.text.split("Loss of every cell")[0]


NAN = math.nan
KINDS = {
    1.0: (SpeedUp("muon", "130m", 1.0, 1.41, 1.35, 1.48), "1.41× (1.35 to 1.48)"),
    2.0: (SpeedUp("muon", "130m", 2.0, 1.3, 1.1, math.inf, note="extrapolated"), "1.30× (above 1.10) e"),
    4.0: (SpeedUp("muon", "130m", 4.0, 1.2, 0.0, 1.5, note="interpolated"), "1.20× (below 1.50) i"),
    8.0: (
        SpeedUp("muon", "130m", 8.0, NAN, 1.2, math.inf, note="undefined: below the fitted floor"),
        "undefined: below the fitted floor (above 1.20)",
    ),
    16.0: (SpeedUp("muon", "130m", 16.0, NAN, NAN, NAN, note="not enough cells"), "not enough cells"),
}


def test_every_kind_of_speed_up_is_shown_as_what_it_is(tmp_path: Path) -> None:
    results = once({(name, ratio): 3.5 - 0.01 * ratio for name in ("adamw", "muon") for ratio in KINDS})
    page = drawn(tmp_path, results, [one for one, _ in KINDS.values()], sigma=SIGMA)
    assert {ratio: rows(page, "speedups-tokens-130m")["Muon"][f"130m {ratio:g}x"] for ratio in KINDS} == {
        ratio: words for ratio, (_, words) in KINDS.items()
    }
    assert "By wall time and by memory: not measured in these results." in page.text
    plain = verdict_csv(tmp_path)
    assert (plain["muon", 8.0]["speedup_tokens"], plain["muon", 8.0]["speedup_tokens_note"]) == ("", KINDS[8.0][0].note)
    assert float(plain["muon", 1.0]["speedup_tokens"]) == 1.41


def test_the_speed_ups_are_those_that_were_handed_over(page: Page) -> None:
    found = {(one.optimizer, one.chinchilla): one for one in speed_ups(seeded(), sigma=SIGMA)}
    for (name, ratio), one in found.items():
        shown = rows(page, "speedups-tokens-130m")[NAMES[name]][f"130m {ratio:g}x"]
        if math.isfinite(one.value):
            assert float(shown.split("×")[0]) == pytest.approx(one.value, rel=5e-3)
        else:
            assert shown.startswith(one.note)
    assert {"speedup-data-130m"} <= {attributes.get("id") for _, attributes in page.tags}


def test_what_16x_in_the_fit_changes_is_said(tmp_path: Path) -> None:
    results = once({("adamw", 1.0): 3.53, ("muon", 1.0): 3.46})
    usual = [SpeedUp("muon", "130m", 1.0, 1.41, 1.3, 1.5)]
    other = [SpeedUp("muon", "130m", 1.0, 1.30, 1.2, 1.4)]
    page = drawn(tmp_path, results, usual, sigma=SIGMA, fit="1x to 8x", refit=[("1x to 16x", other)])
    assert rows(page, "speedups-tokens-130m")["Muon"]["130m 1x"] == "1.41× (1.30 to 1.50)"
    assert rows(page, "refit-1x-to-16x-130m")["Muon"]["130m 1x"] == "1.30× (1.20 to 1.40)"
    assert "Fitted to others, as with or without 16x, the speed-ups change: both are below." in page.text
    page = drawn(tmp_path, results, usual, sigma=SIGMA, fit="1x to 8x")
    assert "Adding 16x to the fit would change the speed-ups: these results have no such cell" in page.text


def test_an_empty_study(tmp_path: Path) -> None:
    page = drawn(tmp_path, Results())
    assert "Nothing can be compared yet: no cell has a final loss." in page.text
    assert (tmp_path / "verdict.csv").read_text().count("\n") == 1


def test_cells_that_share_no_place_are_not_compared(tmp_path: Path) -> None:
    page = drawn(tmp_path, once({("adamw", 1.0): 3.53, ("muon", 2.0): 3.46}), sigma=SIGMA)
    assert "no two optimizers have a final loss in the same cell" in page.text
    assert "lowest" not in page.tables


def test_what_is_missing_is_said_in_every_part(tmp_path: Path) -> None:
    page = drawn(tmp_path, once({("adamw", 1.0): 3.53, ("muon", 1.0): 3.46}), sigma=SIGMA)
    for words in (
        "HellaSwag and other tasks: not measured.",
        "By tokens and by wall time and by memory: not measured in these results.",
        "Loss on the way: not measured",
        "Loss over the rate: not measured; no cell has runs at two rates.",
        "Runs, tokens and time of the tuning: not measured",
        "Failed runs: not measured",
    ):
        assert words in page.text
    matrix = {(row[0], row[1]): row[2:] for row in page.tables["matrix"][1:]}
    filled = {key for key, cells in matrix.items() if set(cells) != {"not measured"}}
    assert filled == {("tokens", "final loss against the baseline's")}
    assert matrix["tokens", "final loss against the baseline's"] == ["baseline", "-0.0700 nats (1)"]


def test_cost_failures_and_measures(tmp_path: Path) -> None:
    results = once({("adamw", 1.0): 3.53, ("muon", 1.0): 3.46})
    adamw, muon = Cell("adamw", "130m", 1.0), Cell("muon", "130m", 1.0)
    results.peak_bytes.update({adamw: (2.0**30,), muon: (0.75 * 2.0**30,)})
    results.scores.update({adamw: {"hellaswag": (0.31,)}, muon: {"hellaswag": (0.33,)}})
    cost = {"adamw": {"runs": 12, "tokens": 4.8e7, "seconds": 3700.0, "diverged": 2, "capped": [adamw]}}
    cost["muon"] = {"runs": 10, "tokens": 4e7, "seconds": None, "diverged": 0, "capped": []}
    failures = [{"optimizer": "adamw", "params": "130m", "chinchilla": 1.0, "setting": "lr 0.032", "state": "DIVERGED"}]
    measures = {adamw: {"optimizer_ms": (4.0,)}, muon: {"optimizer_ms": (10.0,)}}
    page = drawn(tmp_path, results, sigma=SIGMA, cost=cost, failures=failures, measures=measures)
    assert page.tables["cost"][1:] == [
        ["AdamW", "12", "2", "48.0M", "1 h 01 min", "130m 1x"],
        ["Muon", "10", "0", "40.0M", "not measured", "no"],
    ]
    assert page.tables["failures"][1] == ["AdamW", "130m 1x", "lr 0.032", "diverged", "no reason was recorded"]
    matrix = {row[1]: row[2:] for row in page.tables["matrix"][1:]}
    assert matrix["peak memory against the baseline's"] == ["baseline", "0.750× (1)"]
    assert matrix["time of an update against the baseline's"] == ["baseline", "2.50× (1)"]
    assert matrix["diverged while it was tuned"] == ["2 of 12 runs", "0 of 10 runs"]
    assert matrix["HellaSwag"] == ["0.310 (1)", "0.330 (1)"]
    assert matrix["MMLU"] == ["not measured"] * 2
    assert rows(page, "score-hellaswag")["Muon"]["130m 1x"] == "0.3300"


def test_rates_come_from_the_tuning_runs(tmp_path: Path) -> None:
    results = once({("adamw", 1.0): 3.53, ("muon", 1.0): 3.46})
    cell = Cell("adamw", "130m", 1.0)
    tried = [
        ({"optimizer.lr": rate, "optimizer.weight_decay": 0.1}, value)
        for rate, value in ((0.004, 3.55), (0.008, 3.53), (0.016, 3.54), (0.032, math.inf))
    ]
    tried.append(({"optimizer.lr": 0.008, "optimizer.weight_decay": 0.2}, 3.6))
    study.write(tmp_path, results, (), (), {cell: tried}, {"sigma": SIGMA})
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Crosses at the top: diverged." in page.text
    assert "rate-130m-1x" in {attributes.get("id") for _, attributes in page.tags}
    text = (tmp_path / "report.md").read_text()
    shown = re.findall(r"\| AdamW \| (0\.0\d+) \| (\S+) \| – \|", text)
    assert shown == [("0.004", "3.5500"), ("0.008", "3.5300"), ("0.016", "3.5400"), ("0.032", "diverged")]
    matrix = {row[1]: row[2:] for row in page.tables["matrix"][1:]}
    assert matrix["twice the tuned rate costs"][0] == "+0.0100 nats (1)"


def test_recorded_changes_without_their_centre_do_not_invent_it(tmp_path: Path) -> None:
    results = once({("adamw", 1.0): 3.53, ("muon", 1.0): 3.46})
    cell = Cell("adamw", "130m", 1.0)
    recorded = {"best_config": 3.53, "learning_rate=0.004": 3.55, "learning_rate=0.016": 3.538, "beta2=0.9": 3.54}
    results.tuning[cell] = recorded
    page = drawn(tmp_path, results, sigma=SIGMA)
    assert "The table does not say which rate was the tuned one" in page.text
    assert {row[1]: row[2] for row in page.tables["matrix"][1:]}["twice the tuned rate costs"] == "not measured"
    page = drawn(tmp_path, results, sigma=SIGMA, centre={cell: {"learning_rate": 0.008, "beta2": 0.98}})
    assert "The table does not say which rate was the tuned one" not in page.text
    assert {row[1]: row[2] for row in page.tables["matrix"][1:]}["twice the tuned rate costs"] == "+0.0080 nats (1)"


def test_a_rate_that_ruins_the_run_is_no_mean(tmp_path: Path) -> None:
    """Published runs that blew up have finite losses: 7.78 where 3.53 is usual."""
    results = once({("adamw", ratio): 3.53 - 0.01 * ratio for ratio in RATIOS})
    centre = {Cell("adamw", "130m", ratio): {"learning_rate": 0.008} for ratio in RATIOS}
    for ratio, doubled in zip(RATIOS, (3.55, 3.56, 7.78, math.inf), strict=True):
        results.tuning[Cell("adamw", "130m", ratio)] = {"best_config": 3.53, "learning_rate=0.016": doubled}
    page = drawn(tmp_path, results, sigma=SIGMA, centre=centre)
    matrix = {row[1]: row[2] for row in page.tables["matrix"][1:]}
    assert matrix["twice the tuned rate costs"] == "+0.0250 nats (2)"
    assert matrix["twice the tuned rate diverges"] == "2 of 4"
    assert matrix["four times the tuned batch diverges"] == "not measured"


def test_speed_ups_beyond_the_fit_are_in_no_mean(tmp_path: Path) -> None:
    results = once({(name, ratio): 3.5 for name in ("adamw", "muon") for ratio in (1.0, 8.0, 16.0)})
    speeds = [
        SpeedUp("muon", "130m", 1.0, 1.4, 1.3, 1.5),
        SpeedUp("muon", "130m", 8.0, 1.2, 1.1, 1.3, note="extrapolated"),
    ]
    speeds.append(SpeedUp("muon", "130m", 16.0, 9.0, 1.1, math.inf, note="extrapolated"))
    laws = [
        {"optimizer": "adamw", "params": "130m", "fit_points": "1;2;4;8", "alpha": 0.4, "exponent": 0.5, "floor": 3}
    ]
    page = drawn(tmp_path, results, speeds, laws, sigma=SIGMA)
    assert {row[1]: row[3] for row in page.tables["matrix"][1:]}["speed-up by tokens"] == "1.30× (2)"
    assert "Hollow: not read off a fitted range of AdamW's cells (e: extrapolated)." in page.text


def test_laws_of_hyperparameters_show_what_they_miss(tmp_path: Path) -> None:
    cells = [(label, ratio) for label in (1e8, 3e8, 1e9) for ratio in RATIOS]
    where = tuple(zip(*cells, strict=True))
    rate = [0.5 * size**-0.2 * ratio**-0.1 for size, ratio in cells]
    laws = [
        ("muon", "learning_rate", 12, fit_hyper_law(*where, [*rate[:-1], 2 * rate[-1]])),
        ("muon", "weight_decay", 12, fit_hyper_law(*where, [0.1] * 12)),
        ("muon", "epsilon", 12, fit_hyper_law(*where, [1e-10] * 11 + [1e-12])),  # all but the one held out
    ]
    page = drawn(tmp_path, once({("adamw", 1.0): 3.53, ("muon", 1.0): 3.46}), sigma=SIGMA, hyper_laws=laws)
    [row, epsilon] = page.tables["hyper-laws"][1:]
    assert epsilon[3:6] == ["1e-12", "1e-10", "1e2 times"]
    assert row[:3] == ["Muon", "learning_rate", "12"]
    assert float(row[3]) == pytest.approx(2 * rate[-1], rel=1e-4)
    assert float(row[4]) == pytest.approx(rate[-1], rel=1e-2)
    assert row[5] == "50 %"
    assert row[6].startswith("0.5·N^−0.2·C^−0.1 + ")
    assert "so that there is nothing to fit: Muon: weight_decay 0.1." in page.text
    page = drawn(tmp_path, once({("adamw", 1.0): 3.53, ("muon", 1.0): 3.46}), sigma=SIGMA)
    assert "one needs tuned configurations of six settings" in page.text


def test_many_gaps_are_told_as_many_tests(tmp_path: Path) -> None:
    """Muon leads by 10 standard errors at 1x, by 2 at 2x: alone beyond noise, but not among the four tests."""
    error = SIGMA * math.sqrt(2)
    losses = {("adamw", 1.0): 3.5, ("muon", 1.0): 3.5 - 10 * error, ("adamw", 2.0): 3.4, ("muon", 2.0): 3.4 - 2 * error}
    page = drawn(tmp_path, once(losses), sigma=SIGMA)
    assert "1 of the 2 ● stand by Holm's correction for all 4 one-sided tests of this table." in page.text


def test_curves_that_cross_are_named_where_they_cross(tmp_path: Path) -> None:
    results = once({("adamw", 1.0): 3.0, ("muon", 1.0): 2.9})
    xs = [float(x) for x in range(101)]
    curves = {Cell("adamw", "130m", 1.0): {"tokens": (xs, [4 - 0.01 * x for x in xs])}}
    curves[Cell("muon", "130m", 1.0)] = {"tokens": (xs, [4.3 - 0.014 * x for x in xs])}  # equal at 75
    page = drawn(tmp_path, results, sigma=SIGMA, curves=curves)
    row = page.tables["crossings"][1]
    assert row[:4] == ["130m 1x", "Muon", "AdamW", "75 (75 %)"]
    assert [float(text) for text in row[4:]] == [pytest.approx(0.26, abs=6e-3), pytest.approx(0.1, abs=6e-3)]
    assert "lead-tokens-130m-1x" in {attributes.get("id") for _, attributes in page.tags}


HOSTILE = "<script>alert(1)</script>|`x` [a](javascript:b)"


def test_no_text_of_a_table_becomes_markup(tmp_path: Path) -> None:
    results = once({("adamw", 1.0): 3.53, (HOSTILE, 1.0): 3.46})
    results.scores[Cell(HOSTILE, "130m", 1.0)] = {HOSTILE: (0.3,)}
    failures = [{"optimizer": HOSTILE, "setting": HOSTILE, "reason": HOSTILE}]
    page = drawn(
        tmp_path, results, sigma=SIGMA, failures=failures, title=HOSTILE, notes=[HOSTILE], commands=[(HOSTILE, HOSTILE)]
    )
    assert not [tag for tag, _ in page.tags if tag == "script"]
    markdown = re.sub(r"```.*?```", "", (tmp_path / "report.md").read_text(), flags=re.DOTALL)
    assert "<script>" not in markdown


@pytest.mark.filterwarnings("error")
def test_eleven_optimizers_are_drawn_without_a_warning_and_told_apart(tmp_path: Path) -> None:
    names = [*LAW, "nadamw", "cautious", "mars", "adam_mini", "sophia", "scion", "kron"]
    losses = {(name, ratio): 3.5 - 0.01 * place - 0.02 * ratio for place, name in enumerate(names) for ratio in RATIOS}
    results = once(losses)
    page = drawn(tmp_path, results, speed_ups(results, sigma=SIGMA), sigma=SIGMA)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 20
    assert len(set(optimizer_colours(names).values())) == len(names)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    drawn(tmp_path, results, speed_ups(results, sigma=SIGMA), sigma=SIGMA)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_without_torch_and_hydra(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lightning_opt.reports import study; "
        "from lightning_opt.study import Cell, Results\n"
        f"study.write(Path({str(tmp_path)!r}), Results(losses={{Cell('adamw', 'a', 1.0): (3.0,)}}))\n"
        "print([name for name in ('torch', 'lightning', 'hydra', 'omegaconf') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert answer.stdout.strip() == "[]", answer.stderr
