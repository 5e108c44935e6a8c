"""The Markdown files as other programs read them: tables that hold, headers that parse, commands to paste."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt
from synthetic_run import config, evaluation, metric_rows

from lightning_opt import reports
from lightning_opt.reports.markdown import escape, fence, table

FEW = metric_rows()[99::100]
HOSTILE = [
    "a|b",
    "`code`",
    "<b>",
    "*x*",
    "_x_",
    "[a](b)",
    "line\nbreak",
    "back\\slash",
    "\\|",
    "&amp;",
    "~~x~~",
    "https://x.y",
]


def rendered_cells(text: str) -> list[list[str]]:
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(text)
    rows: list[list[str]] = []
    for token in tokens:
        if token.type == "tr_open":
            rows.append([])
        if token.type == "inline" and rows:
            assert {child.type for child in token.children or []} <= {"text", "text_special"}, token.content
            rows[-1].append("".join(child.content for child in token.children or []))
    return rows


def test_a_cell_shows_its_text_whatever_it_is() -> None:
    header = ["x", "y|z"]
    rows = [[text, "1"] for text in HOSTILE]
    shown = rendered_cells(table(header, rows, frozenset({1})))
    assert shown[0] == header
    assert [row[0] for row in shown[1:]] == [" ".join(text.split()) for text in HOSTILE]


@pytest.mark.parametrize("name", ["report.md", "MODEL_CARD.md"])
def test_every_table_is_a_table(finished: Path, name: str) -> None:
    body = (finished / name).read_text()
    blocks = re.findall(r"(?:^\|.*\|\n)+", body, flags=re.MULTILINE)
    assert len(blocks) > 4
    for block in blocks:
        lines = block.splitlines()
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
        assert len(widths) == 1, block
        assert re.fullmatch(r"\|(?: -{3}:? \|)+", lines[1]), block
        assert len(rendered_cells("\n\n" + block)) == len(lines) - 1
        before = body[: body.index(block)]
        assert before.endswith("\n\n")


def test_the_card_has_a_header_that_hugging_face_reads(finished: Path) -> None:
    _, header, body = (finished / "MODEL_CARD.md").read_text().split("---\n", 2)
    fields = yaml.safe_load(header)
    assert fields["library_name"] == "transformers"
    assert fields["pipeline_tag"] == "text-generation"
    assert "lion" in fields["tags"]
    assert "model-index" not in fields  # mini scores must not be read as published ones
    assert "1,638,400 tokens in 800 steps" in body
    assert "our own sweep, 2026-11, 3 seeds" in body
    assert "AutoModelForCausalLM.from_pretrained" in body


def test_the_card_lists_comparable_scores(make_run: Callable[..., Path], tmp_path: Path) -> None:
    scores = evaluation() | {"suite": "full", "comparable": True}
    folder = make_run(tmp_path / "run", rows=FEW, evaluation=scores)
    reports.write(folder)
    fields = yaml.safe_load((folder / "MODEL_CARD.md").read_text().split("---\n", 2)[1])
    results = fields["model-index"][0]["results"]
    assert [result["dataset"]["type"] for result in results] == ["hellaswag", "mmlu"]
    assert results[1]["metrics"][0]["value"] == 0.27
    assert results[1]["dataset"]["args"] == {"num_few_shot": 5}


def test_the_card_lists_only_the_tasks_that_are_comparable(make_run: Callable[..., Path], tmp_path: Path) -> None:
    scores = evaluation() | {"suite": "full", "comparable": False}
    scores["hellaswag"] |= {"comparable": True, "why_not": ""}
    scores["mmlu"] |= {"comparable": False, "why_not": "83 of 100 prompts were cut"}
    folder = make_run(tmp_path / "run", rows=FEW, evaluation=scores)
    reports.write(folder)
    header, body = (folder / "MODEL_CARD.md").read_text().split("---\n", 2)[1:]
    results = yaml.safe_load(header)["model-index"][0]["results"]
    assert [result["dataset"]["type"] for result in results] == ["hellaswag"]
    assert "MMLU: 83 of 100 prompts were cut." in body
    assert "mini" not in body


def test_equal_likelihoods_are_an_alarm_and_no_score(make_run: Callable[..., Path], tmp_path: Path) -> None:
    scores = evaluation() | {"suite": "full", "comparable": True}
    scores["mmlu"] |= {"degenerate": True}
    folder = make_run(tmp_path / "run", rows=FEW, evaluation=scores)
    reports.write(folder)
    for name in ("report.md", "MODEL_CARD.md"):
        body = (folder / name).read_text()
        assert body.index("**MMLU: every choice of every item got the same likelihood") < body.index("Lion trained")
        assert "MMLU 0.270" not in body
        assert "no score: every choice" in body
    assert "acc_norm" in (folder / "MODEL_CARD.md").read_text().split("---\n", 2)[1]
    assert "mmlu" not in (folder / "MODEL_CARD.md").read_text().split("---\n", 2)[1]
    assert 'class="alarm" style="--tone: var(--bad)"' in (folder / "report.html").read_text()


def test_a_continued_model_names_its_origin(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for path, base in (("models/mine", None), ("org/name", "org/name"), ("./models/gone", None), (None, None)):
        asked = config()
        asked["model"] = {"name": "hf", "path": path} if path else asked["model"]
        folder = make_run(tmp_path / "run", rows=FEW, config=asked)
        reports.write(folder)
        header, body = (folder / "MODEL_CARD.md").read_text().split("---\n", 2)[1:]
        assert yaml.safe_load(header).get("base_model") == base
        assert ("Pretrained on raw text only" in body) == (path is None)
        assert (f"Continued from {path}" in body) == (path is not None)


def test_full_scores_with_a_limit_are_not_comparable(make_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rows=FEW, evaluation=evaluation() | {"suite": "full", "comparable": False})
    reports.write(folder)
    assert "full: not comparable with published numbers" in (folder / "report.md").read_text()
    assert "model-index" not in (folder / "MODEL_CARD.md").read_text()


def test_commands_survive_the_shell(make_run: Callable[..., Path], tmp_path: Path) -> None:
    overrides = ["optimizer=lion", "data.path=/tmp/my data", "data.weights={a: 1, b: 2}", "optimizer.lr=3e-4", "seed=7"]
    folder = make_run(tmp_path / "a run", rows=FEW, overrides=overrides)
    reports.write(folder)
    blocks = re.findall(r"```bash\n(.*?)\n```", (folder / "report.md").read_text(), flags=re.DOTALL)
    assert shlex.split(blocks[0]) == ["python", "train.py", *overrides]
    assert shlex.split(blocks[1]) == ["python", "-m", "recipes.evaluate", str(folder), "--suite", "full"]
    assert shlex.split(blocks[2]) == ["python", "train.py", "-m", "optimizer=lion,adamw", *overrides[1:3], "seed=7"]


def test_a_fence_is_longer_than_what_it_holds() -> None:
    text = "x\n```\n````\ny"
    shown = MarkdownIt().parse(fence(text, "bash"))
    assert [token.type for token in shown] == ["fence"]
    assert shown[0].content == text + "\n"


def test_escape_keeps_words_with_underscores_readable() -> None:
    assert escape("loss_volatility") == "loss_volatility"
