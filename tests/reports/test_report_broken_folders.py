"""Folders as they are found after bad days: files gone, cut off or strange, runs diverged, hostile text, secrets."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from html_page import BROKEN, BUILT, Page, drawn
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from synthetic_run import config, env, evaluation, metric_rows, plan

from lightning_opt.reports.reading import read
from lightning_opt.reports.secrets import REDACTED, clean, is_secret_name

Make = Callable[..., Path]
FEW = metric_rows()[99::100]  # enough for every figure, quick to read
FILES = ("config.yaml", "overrides.txt", "plan.json", "env.json", "status.json", "metrics.csv", "events.jsonl")
FILES += ("summary.json", "evaluation/results.json")


def texts(folder: Path) -> str:
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in BUILT)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_said_and_breaks_nothing(make_run: Make, tmp_path: Path, name: str) -> None:
    folder = make_run(tmp_path / "run", rows=FEW)
    (folder / name).unlink()
    page = drawn(folder)
    assert page.faults == []
    assert BROKEN not in texts(folder)
    if name != "events.jsonl":
        assert f"Not in this folder: {name}" in page.text
    assert ("None: no step was skipped" in page.text) == (name == "events.jsonl")
    assert ("What was asked on the command line is not known." in page.text) == (name == "overrides.txt")
    assert ("python train.py" in page.text) == (name != "overrides.txt")
    assert "beyond the defaults" not in page.text


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"not json\nnor this\n"])
def test_unreadable_events_are_not_no_events(make_run: Make, tmp_path: Path, content: bytes) -> None:
    folder = make_run(tmp_path / "run", rows=FEW)
    (folder / "events.jsonl").write_bytes(content)
    page = drawn(folder)
    assert "Not known: events.jsonl cannot be read." in page.text
    assert "no step was skipped" not in page.text


def test_no_results_are_missed_where_evaluation_was_turned_off(make_run: Make, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rows=FEW, config=config() | {"evaluation": {"suite": "none"}}, evaluation=None)
    (folder / "evaluation/results.json").unlink()
    page = drawn(folder)
    assert "Scores: not measured (evaluation was turned off)." in page.text
    assert "Not in this folder" not in page.text


def test_without_tuned_values_the_rate_that_was_asked_is_no_default(make_run: Make, tmp_path: Path) -> None:
    for planned, words in (
        (plan() | {"tuned": None}, "No tuned values were used: what was not asked is the configuration's own default."),
        ({k: v for k, v in plan().items() if k != "tuned"}, "Whether tuned values were used is not known."),
    ):
        folder = make_run(tmp_path / "run", rows=FEW, plan=planned, overrides=["optimizer.lr=3e-3"])
        assert f"Asked on the command line: optimizer.lr=3e-3. {words}" in drawn(folder).text
        assert words.split(":")[0] in (folder / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize("content", ["", "{", "[1, 2", "null", "\x00\xff", "step,train/loss\n1"])
def test_cut_off_files_break_nothing(make_run: Make, tmp_path: Path, content: str) -> None:
    folder = make_run(tmp_path / "run", rows=FEW)
    whole = read(folder)
    for name in FILES:  # one at a time: the others are still read
        kept = (folder / name).read_bytes()
        (folder / name).write_text(content, encoding="latin-1")
        assert read(folder).env == ({} if name == "env.json" else whole.env)
        (folder / name).write_bytes(kept)
    for name in FILES:
        (folder / name).write_text(content, encoding="latin-1")
    assert drawn(folder).faults == []
    assert BROKEN not in texts(folder)


def test_an_empty_folder_says_not_measured_and_no_zero(tmp_path: Path) -> None:
    folder = tmp_path / "nothing"
    folder.mkdir()
    page = drawn(folder)
    assert page.faults == []
    assert BROKEN not in texts(folder)
    assert "no training step was logged" in page.text
    assert "How this run ended is not known" in page.text
    cards = page.text.split("Not in this folder")[0]
    assert cards.count("not measured") == 6
    measures = [row[1] for row in page.tables["speed"][1:]] + [row[1] for row in page.tables["memory"][1:]]
    assert set(measures) == {"not measured"}


@pytest.mark.parametrize(
    ("state", "reason", "first"),
    [
        ("DIVERGED", "loss is not finite", "Diverged at step 312 of 800: loss is not finite."),
        ("FAILED", "OSError: no space left", "Failed at step 312 of 800: OSError: no space left."),
        ("PREEMPTED", "stopped by SIGTERM", "Preempted at step 312 of 800: stopped by SIGTERM."),
        ("RUNNING", None, "Not finished when this was written: step 312 of 800."),
    ],
)
def test_a_run_that_did_not_finish_says_so_first(
    make_run: Make, tmp_path: Path, state: str, reason: str | None, first: str
) -> None:
    rows = metric_rows()[:312]
    if state == "DIVERGED":
        rows[-1] |= {"train/loss": math.nan, "grad_norm": math.inf}
    folder = make_run(
        tmp_path / "run", status={"state": state, "step": 312, "reason": reason}, rows=rows, evaluation=None
    )
    page = drawn(folder)
    assert page.faults == []
    assert page.text.index(first) < page.text.index("Lion trained nano")
    assert "0 B" not in page.text
    assert "nan" not in page.text.lower().replace("nano", "")
    body = (folder / "report.md").read_text()
    assert body.index(first.split(":")[0]) < body.index("Lion trained nano")
    assert "python train.py optimizer=lion" in page.text
    assert ("optimizer.lr_scale=0.5" in page.text) == (state == "DIVERGED")


def test_metrics_without_a_number(make_run: Make, tmp_path: Path) -> None:
    rows = [dict.fromkeys(row, math.nan) | {"step": row["step"]} for row in metric_rows()[:20]]
    folder = make_run(tmp_path / "run", rows=rows)
    assert drawn(folder).faults == []
    assert BROKEN not in texts(folder)
    (folder / "metrics.csv").write_text("step,tokens,train/loss\n")
    (folder / "summary.json").unlink()
    page = drawn(folder)
    assert BROKEN not in texts(folder)
    assert "Loss: not measured" in page.text


def test_one_logged_step(make_run: Make, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rows=metric_rows()[99:100])
    assert drawn(folder).faults == []
    assert BROKEN not in texts(folder)


EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>|`*_[x](javascript:alert(3))\n# heading"


def test_no_text_of_a_file_becomes_markup(make_run: Make, tmp_path: Path) -> None:
    asked, planned, machine = config(), plan(), env()
    asked["optimizer"]["name"] = asked["model"]["name"] = asked["data"]["name"] = asked["name"] = EVIL
    planned |= dict.fromkeys(("name", "optimizer", "model", "data", "precision", "data_fingerprint"), EVIL)
    planned["routing"][0] |= {"role": EVIL, "rule": EVIL, "implementation": EVIL}
    planned["corpora"][0]["name"] = EVIL
    planned["tuned"] = {"source": EVIL, "values": {EVIL: EVIL}}
    machine["packages"][EVIL] = machine["device_name"] = EVIL
    rows = [
        {key.replace("val/loss/code", f"val/loss/{EVIL}"): value for key, value in row.items()} for row in metric_rows()
    ]
    rows = [{key.replace("lr/matrix", f"lr/{EVIL}"): value for key, value in row.items()} for row in rows]
    folder = make_run(
        tmp_path / "run",
        config=asked,
        plan=planned,
        env=machine,
        rows=rows,
        overrides=[f"name={EVIL}"],
        events=[{"time": 1.0, "kind": EVIL, "reason": EVIL, EVIL: 3}],
        status={"state": EVIL, "step": 1, "reason": EVIL},
        evaluation={**evaluation(), EVIL: {"value": 0.5, "metric": EVIL}, "mmlu": {"skipped": EVIL}},
    )
    page = drawn(folder)
    assert page.faults == []
    assert not [tag for tag, _ in page.tags if tag in ("script", "img")]
    assert "alert(1)" in page.text
    assert BROKEN not in texts(folder)
    for name in ("report.md", "MODEL_CARD.md"):
        body = (folder / name).read_text()
        outside = "".join(part for i, part in enumerate(re.split(r"(?m)^`{3,}.*$", body)) if i % 2 == 0)
        outside = outside.split("---\n", 2)[2] if name == "MODEL_CARD.md" else outside
        assert "<script" not in outside
        assert "<img" not in outside
        assert "](javascript" not in outside.replace("\\]", "")
        assert "\n# heading" not in outside


def test_secrets_are_never_shown(make_run: Make, tmp_path: Path) -> None:
    asked = config()
    asked["logger"] = {"wandb": {"api_key": "abcdef0123456789", "project": "p", "token": "${oc.env:WANDB_TOKEN}"}}
    asked["password"], asked["data"]["path"] = "hunter2hunter2", "https://user:swordfish9@example.org/x"
    asked["optimizer"]["clientSecret"] = "s3cr3tvalue"
    folder = make_run(
        tmp_path / "run",
        config=asked,
        overrides=["optimizer=lion", "+logger.wandb.api_key=abcdef0123456789", "note=sk-abcdefghijklmnopqrst"],
        status={
            "state": "FAILED",
            "step": 3,
            "reason": "401 for Authorization: Bearer zzzsecretzzz (password=hunter2hunter2)",
        },
        rows=FEW,
        events=[{"time": 1.0, "kind": "login", "access_token": "tok-999999", "url": "https://a:b0bb0b@x.org"}],
    )
    drawn(folder)
    shown = texts(folder)
    for secret in (
        "abcdef0123456789",
        "hunter2",
        "swordfish9",
        "s3cr3tvalue",
        "sk-abcdef",
        "zzzsecret",
        "tok-999",
        "b0bb0b",
    ):
        assert secret not in shown, secret
    assert REDACTED in shown
    assert "${oc.env:WANDB_TOKEN}" in shown


@pytest.mark.parametrize(
    "name", ["api_key", "WANDB_API_KEY", "hf_token", "db.password", "clientSecret", "authToken", "key"]
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)
    assert clean({name: "x1y2z3"}) == {name: REDACTED}


@pytest.mark.parametrize(
    "name", ["tokens", "tokenizer", "tokens_per_step", "num_key_value_heads", "pad_token", "keyboard"]
)
def test_names_that_are_no_secrets(name: str) -> None:
    assert not is_secret_name(name)
    assert clean({name: "x1y2z3"}) == {name: "x1y2z3"}


def test_numbers_are_no_secrets() -> None:
    assert clean({"token": 3, "key": None, "list": [1.5, True]}) == {"token": 3, "key": None, "list": [1.5, True]}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@hypothesis_settings(
    max_examples=8, deadline=None, phases=[Phase.generate], derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(st.data())
def test_strange_values_anywhere_break_nothing(make_run: Make, tmp_path: Path, data: st.DataObject) -> None:
    folder = make_run(tmp_path / "run", rows=FEW[::2])
    for name in ("plan.json", "summary.json", "status.json", "env.json", "config.yaml"):
        content = yaml.safe_load((folder / name).read_text())
        for key in data.draw(st.lists(st.sampled_from(sorted(content)), max_size=4, unique=True)):
            value = content[key]
            if isinstance(value, list) and value and isinstance(value[0], dict):
                value[0][data.draw(st.sampled_from(sorted(value[0])))] = data.draw(JSON)
            elif isinstance(value, dict) and value:
                value[data.draw(st.sampled_from(sorted(value)))] = data.draw(JSON)
            else:
                content[key] = data.draw(JSON)
        (folder / name).write_text(json.dumps(content))
    page: Page = drawn(folder)
    assert page.faults == []
    assert BROKEN not in texts(folder)
