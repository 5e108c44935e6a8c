"""Runs that were stopped: what the report says of it, and whether the command that it prints finds them again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic_run import config, metric_rows

from lightning_opt import reports
from lightning_opt.checkpoints.manifest import manifest_text
from lightning_opt.run_folder import Status, adoptable

EVENTS = [
    {"time": 1.0, "kind": "checkpoint_failed", "step": 200, "reason": "OSError: No space left on device"},
    {"time": 2.0, "kind": "resumed", "step": 100, "checkpoint": "checkpoints/step-000100"},
    {"time": 3.0, "kind": "resumed", "step": 300, "checkpoint": "checkpoints/step-000300"},
    {"time": 4.0, "kind": "step_skipped", "step": 388, "reason": "gradient norm"},
    {"time": 5.0, "kind": "rewound", "step": 700, "reason": "loss nan"},
]


def written(folder: Path) -> str:
    reports.write(folder)
    return re.sub(r"\s+", " ", (folder / "report.md").read_text().replace("\\", ""))


def test_what_a_run_survived_is_told_a_line_each(make_run: Callable[..., Path], tmp_path: Path) -> None:
    text = written(make_run(tmp_path / "run", rows=metric_rows()[:30], events=EVENTS))
    for line in (
        "- Interrupted and resumed 2 times, from steps 100 and 300.",
        "- 1 step skipped because loss or gradient norm leapt: see the events.",
        "- Rewound once to a checkpoint and led past the data that it broke at.",
        "- 1 checkpoint could not be saved: a kill then would have lost more steps.",
    ):
        assert line in text
    calm = written(make_run(tmp_path / "calm", rows=metric_rows()[:30], events=[]))
    assert not re.search("resumed|skipped because|Rewound|could not be saved", calm)


def test_a_run_that_started_elsewhere_says_where(make_run: Callable[..., Path], tmp_path: Path) -> None:
    asked = {**config(), "resume": "runs/other"}
    folder = make_run(tmp_path / "run", rows=metric_rows()[:30], config=asked, events=EVENTS[1:2])
    text = written(folder)
    assert "Started from another run's checkpoint: runs/other." in text
    assert "Interrupted and resumed" not in text
    assert "started from the checkpoint | runs/other" in (folder / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize("place", ["runs/lion_nano/20260101T120000Z-1a2b3c4d", "mine", "runs/sweep/a job's, of 2=3"])
def test_the_printed_command_finds_the_very_folder(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """What Hydra reads out of the command, the claim of a folder then finds."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    monkeypatch.chdir(tmp_path)
    asked = {**config(), "resume": "never"}
    folder = make_run(tmp_path / place, rows=metric_rows()[:30], config=asked, overrides=["seed=3", "resume=never"])
    Status(folder / "status.json", "1a2b3c4d").set("PREEMPTED", "stopped by SIGTERM at step 30")
    assert reports.next_commands(reports.read(folder))[0][0].startswith("Start this run over")
    saved = folder / "checkpoints" / "step-000030"
    saved.mkdir(parents=True)  # which a power cut has emptied
    assert reports.next_commands(reports.read(folder))[0][0].startswith("Move this folder away and start anew")
    text = manifest_text(step=30, created="now", versions={}, metric={"name": None, "value": None}, files={}, meta={})
    (saved / "MANIFEST.json").write_text(text)
    what, command = reports.next_commands(reports.read(folder))[0]
    assert what.startswith("Resume this run")
    python, script, *overrides = shlex.split(command)
    assert (python, script) == ("python", "train.py")
    said = {one.key_or_group: one.value() for one in OverridesParser.create().parse_overrides(overrides)}
    named = said.pop("hydra.run.dir", None)
    assert said == {"seed": 3}  # resume=never would begin once more
    found = adoptable(Path("runs"), "lion_nano", "1a2b3c4d", path=Path(named) if named else None)
    assert found is not None
    assert found.path.resolve() == folder


def test_without_a_model_no_command_scores_it(make_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rows=[])
    Status(folder / "status.json", "1a2b3c4d").set("DIVERGED", "loss nan at step 1")
    (folder / "model").rmdir()
    said = [what for what, _ in reports.next_commands(reports.read(folder))]
    assert said[0] == "Train again, with half the rate"
    assert not any("Score" in what for what in said)
    (folder / "model").mkdir()
    assert any("Score" in what for what, _ in reports.next_commands(reports.read(folder)))
