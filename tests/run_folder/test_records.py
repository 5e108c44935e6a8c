"""Records survive kills and odd numbers, and the summary follows from them."""

from __future__ import annotations

import csv
import gzip
import json
import math
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_opt.run_folder import (
    NoJson,
    RunFolder,
    Status,
    append_event,
    read_events,
    read_json,
    read_json_lines,
    read_metrics,
    read_status,
    records,
    summarize,
    write_json,
)


def test_what_was_not_measured_is_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": math.nan, "b": [math.inf, 1.5, {"c": -math.inf}], "d": None, "e": 0})
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "a": None,
        "b": [None, 1.5, {"c": None}],
        "d": None,
        "e": 0,
    }


def test_a_kill_while_writing_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"n": -1, "pad": ""})
    code = f"""
from pathlib import Path
from lightning_opt.run_folder import write_json
print("go", flush=True)
n = 0
while True:
    write_json(Path({str(path)!r}), {{"n": n, "pad": "x" * 200000}})
    n += 1
"""
    for seed in range(5):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(random.Random(seed).uniform(0.01, 0.1))
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert json.loads(path.read_text())["n"] >= -1


def test_lines_cut_by_a_kill_are_left_out(tmp_path: Path) -> None:
    append_event(tmp_path / "events.jsonl", "skip", step=3, loss=math.nan)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": 1, "ki')
    assert [(event["kind"], event["loss"]) for event in read_events(tmp_path / "events.jsonl")] == [("skip", None)]
    (tmp_path / "metrics.csv").write_text("step,train/loss,val/loss\n10,4.5,\n20,4.0,3.9\n30,3.")
    assert read_metrics(tmp_path / "metrics.csv") == {
        "step": [10, 20],
        "train/loss": [4.5, 4.0],
        "val/loss": [None, 3.9],
    }


def test_missing_files_are_nothing(tmp_path: Path) -> None:
    assert read_json(tmp_path / "none.json") == {}
    assert read_metrics(tmp_path / "none.csv") == {}
    assert read_events(tmp_path / "none.jsonl") == []
    summary = summarize(RunFolder(tmp_path))
    assert set(summary.values()) == {None}


def test_the_summary_follows_from_the_records(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    steps = list(range(10, 910, 10))
    rows = [
        {
            "step": step,
            "tokens": step * 2048,
            "time_s": step / 10,
            "train/loss": 8 - step / 200,
            "val/loss": 4.25 if step == 900 else "",
            "val/loss/web": 4.5 if step == 900 else "",
            "tokens_per_s_per_device": 1000 + step,
            "memory_peak_bytes": 5e8 - step,
            "loss_volatility": 1.0 if step <= 300 else 2.0 if step <= 600 else 4.0,
        }
        for step in steps
    ]
    with folder.metrics.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    write_json(folder.plan, {"max_steps": 900, "optimizer": "lion", "params_total": 12, "tokens_per_step": 2048})
    write_json(folder.status, {"state": "FINISHED", "step": 903})  # the last step need not have a row
    summary = summarize(folder)
    assert summary["steps"] == 903
    assert summary["tokens"] == 903 * 2048
    assert summary["train_loss"] == pytest.approx(statistics.fmean(8 - step / 200 for step in (870, 880, 890, 900)))
    assert summary["val_loss"] == 4.25
    assert summary["val_loss_by_corpus"] == {"web": 4.5}
    assert summary["tokens_per_s_per_device"] == statistics.median(1000 + step for step in steps)
    assert summary["peak_memory_bytes"] == 5e8 - 10
    assert summary["loss_volatility"] == pytest.approx(7 / 3)
    assert summary["loss_volatility_by_third"] == [1.0, 2.0, 4.0]
    assert summary["optimizer"] == "lion"
    assert summary["mfu"] is None
    assert summary["evaluation"] is None


def test_the_summary_tells_what_the_run_survived(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_json(folder.plan, {"max_steps": 900})
    assert summarize(folder)["resumed_from"] == []
    assert summarize(folder)["skipped_steps"] == 0
    for kind, fields in (
        ("step_skipped", {"step": 100}),
        ("checkpoint_failed", {"step": 200, "reason": "No space left on device"}),
        ("step_skipped", {"step": 310}),
        ("preempted", {"step": 350}),
        ("resumed", {"step": 300}),
        ("step_skipped", {"step": 310}),  # lived again
        ("rewound", {"step": 400}),
        ("resumed", {"step": 350}),  # its way back, no restart
        ("resumed", {"step": 360}),
    ):
        append_event(folder.events, kind, **fields)
    told = {key: summarize(folder)[key] for key in ("resumed_from", "failed_saves", "skipped_steps", "rewinds")}
    assert told == {"resumed_from": [300, 360], "failed_saves": 1, "skipped_steps": 2, "rewinds": 1}
    append_event(folder.events, "restarted")  # from the first step, for want of a good checkpoint
    assert summarize(folder)["skipped_steps"] == 0


def test_what_finds_the_disk_full_is_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events in their order, once each; the status at once, in the old file's place."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    events, status = tmp_path / "events.jsonl", Status(tmp_path / "status.json", "1a2b3c4d")
    append_event(events, "first")
    status.set("RUNNING", "a reason that is longer than the next, so that something of it could be left")
    with monkeypatch.context() as patch:
        patch.setattr(records, "append_text", full)
        patch.setattr(Path, "write_text", full)
        append_event(events, "checkpoint_failed", step=3)
        append_event(events, "checkpoint_failed", step=6)
        status.set("PREEMPTED", "stopped")
        assert [event["kind"] for event in read_events(events)] == ["first"]
        assert (read_status(status.path)["state"], read_status(status.path)["reason"]) == ("PREEMPTED", "stopped")
        with pytest.raises(OSError, match="No space"):
            Status(tmp_path / "none.json", "1a2b3c4d").write()
    status.write()
    append_event(events, "last")
    assert [event.get("step") for event in read_events(events)] == [None, 3, 6, None]


def test_an_event_behind_a_torn_line_is_not_lost(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    append_event(events, "first")
    with events.open("a") as file:
        file.write('{"time": 1.0, "ki')  # killed here
    append_event(events, "resumed", step=3)
    append_event(events, "last")
    assert [event["kind"] for event in read_events(events)] == ["first", "resumed", "last"]


def test_late_events_do_not_bring_a_deleted_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    gone, other = (RunFolder(tmp_path / name) for name in ("gone", "other"))
    for folder in (gone, other):
        folder.path.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(records, "append_text", full)
        append_event(gone.events, "checkpoint_failed", step=3)
    gone.path.rmdir()
    append_event(other.events, "first")
    assert not gone.path.exists()
    assert gone.events not in records._late
    assert [event["kind"] for event in read_events(other.events)] == ["first"]


def test_an_append_leaves_all_or_nothing(tmp_path: Path) -> None:
    """The kernel's own refusal, in the middle of a line: a file that may not grow beyond 100 bytes."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from lightning_opt.run_folder import append_text\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try: append_text(Path(sys.argv[1]), 'b' * 80 + chr(10))\n"
        "except OSError: sys.exit(7)"
    )
    path = tmp_path / "table"
    path.write_text("a" * 50 + "\n")
    assert subprocess.run([sys.executable, "-c", code, str(path)], timeout=60).returncode == 7
    assert path.read_text() == "a" * 50 + "\n"


def test_json_lines_are_read_packed_or_not_and_a_broken_one_is_named(tmp_path: Path) -> None:
    lines = b'{"a": 1}\n\n[2, "\xe2\x80\xa8"]\n{"cut": \n"last"'
    (tmp_path / "x.jsonl").write_bytes(lines)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines))
    for path in (tmp_path / "x.jsonl", tmp_path / "x.jsonl.gz"):
        assert list(read_json_lines(path, torn=True)) == [{"a": 1}, [2, "\u2028"], "last"]
        with pytest.raises(NoJson, match="line 4: Expecting value") as caught:
            list(read_json_lines(path))
        assert caught.value.line == 4
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines)[:-9])
    with pytest.raises(EOFError):
        list(read_json_lines(tmp_path / "x.jsonl.gz", torn=True))
