"""Loggers of other people's: what they are told, and that their failures cost one warning."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers.logger import Logger

from lightning_opt import models, optim, training
from lightning_opt.job import pieces, stages
from lightning_opt.plan import Place, RunPlan
from lightning_opt.run_folder import RunFolder, Status, read_metrics
from lightning_opt.training import GuardedLogger, loggers, wandb_logger

METHODS = ("log_hyperparams", "log_metrics", "save", "finalize")


class Recorder(Logger):
    """Keeps what it is told; raises or hangs where it is asked to."""

    name, version, save_dir = "recorder", "7", "somewhere"

    def __init__(self, faulty: str = "", fault: Any = None) -> None:
        super().__init__()
        self.told: list[tuple[str, tuple]] = []
        self._faulty, self._fault = faulty, fault
        if faulty == "__init__":
            fault()

    def _tell(self, method: str, *what: Any) -> None:
        self.told.append((method, what))
        if method == self._faulty:
            self._fault()

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._tell("log_metrics", metrics, step)

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        self._tell("log_hyperparams", params)

    def save(self) -> None:
        self._tell("save")

    def finalize(self, status: str) -> None:
        self._tell("finalize", status)

    def draw(self) -> str:
        return "a picture"


def use(guarded: GuardedLogger) -> None:
    guarded.log_hyperparams({"lr": 1.0})
    for step in range(3):
        guarded.log_metrics({"loss": 1.0, "epoch": 0}, step)
        guarded.save()
    guarded.finalize("success")
    guarded.close()


def raiser(error: BaseException) -> Any:
    def fault() -> None:
        raise error

    return fault


def test_everything_arrives_in_order() -> None:
    inner = Recorder()
    guarded = GuardedLogger("mine", lambda: inner)
    assert guarded.draw() == "a picture"
    use(guarded)
    metrics = [("log_metrics", ({"loss": 1.0}, step)) for step in range(3)]
    rows = [call for row in metrics for call in (row, ("save", ()))]
    assert inner.told == [("log_hyperparams", ({"lr": 1.0},)), *rows, ("finalize", ("success",))]


def test_what_is_logged_for_one_step_arrives_as_one() -> None:
    inner = Recorder()
    guarded = GuardedLogger("mine", lambda: inner)
    for step in range(2):
        guarded.log_metrics({"a": 1.0}, step)
        guarded.log_metrics({"b": 2.0}, step)
    guarded.close()
    assert [what for method, what in inner.told if method == "log_metrics"] == [
        ({"a": 1.0, "b": 2.0}, s) for s in (0, 1)
    ]


@pytest.mark.parametrize("error", [RuntimeError("no key sk-abcdefghijklmnop"), SystemExit(1), ModuleNotFoundError("x")])
@pytest.mark.parametrize("method", ["__init__", *METHODS])
def test_a_failure_costs_one_warning_and_is_not_tried_again(
    method: str, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[Recorder] = []

    def make() -> Recorder:
        made.append(Recorder(method, raiser(error)))
        return made[-1]

    with caplog.at_level(logging.INFO):
        guarded = GuardedLogger("mine", make)
        use(guarded)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.name == "lightning_opt.training"
    assert record.getMessage().startswith(f"logger mine: {type(error).__name__}: ")
    assert "sk-" not in record.getMessage()
    assert sum(name == method for logger in made for name, _ in logger.told) == (method != "__init__")
    with pytest.raises(AttributeError):
        guarded.draw  # noqa: B018


@pytest.mark.parametrize("method", ["__init__", *METHODS])
def test_one_that_hangs_holds_nothing_up(
    method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loggers, "BACKLOG", 4)
    free = threading.Event()
    began = time.monotonic()
    with caplog.at_level(logging.INFO):
        use(GuardedLogger("mine", lambda: Recorder(method, free.wait), start_s=0.1, end_s=0.1))
    assert time.monotonic() - began < 10
    free.set()
    [record] = caplog.records
    assert record.getMessage().startswith("logger mine: ")


HELD = """
import atexit, threading
from lightning_opt.job import leave
from lightning_opt.training import GuardedLogger

def make():
    atexit.register(threading.Event().wait)
    threading.Event().wait()

logger = GuardedLogger("mine", make, start_s=0.1, end_s=0.1)
logger.close()
print("said", end="")
leave(3)
"""


FREE = """
import atexit
from lightning_opt.job import leave

atexit.register(print, "said", end="")
leave(3)
"""


@pytest.mark.parametrize("script", [HELD, FREE], ids=["held", "free"])
def test_one_that_hangs_does_not_hold_the_process(repository: Path, script: str) -> None:
    """Exit hooks are left out only then."""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=repository, stdout=subprocess.PIPE, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (3, "said")


def test_ranks_are_ours_to_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RANK=1 in the environment of a run of its own: nothing else writes its files."""
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    inner = Recorder()
    assert set(fit(tmp_path, [GuardedLogger("mine", lambda: inner)])["step"]) == {1, 2, 3, 4, 5}
    assert inner.told
    with training.joined(Place(), {"accelerator": "cpu", "devices": 1, "num_nodes": 1}):
        assert rank_zero_only.rank == 0  # which loggers of Lightning's ask


def test_a_run_tells_its_configuration_once_and_no_secret(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made: list[Recorder] = []

    def instantiate(spec: dict[str, Any], **place: Any) -> Recorder:
        assert spec["api_key"] == "abcdef0123456789"  # the logger itself gets it
        assert place == {"save_dir": str(tmp_path)}
        made.append(Recorder())
        return made[-1]

    config = {"logger": {"mine": {"save_dir": None, "api_key": "abcdef0123456789"}, "off": None}}
    order = stages.Order(config, None, [], "seed: 1\nlogger: {mine: {api_key: '[redacted]'}}\n", instantiate, None)
    [guarded] = pieces.loggers(order, RunFolder(tmp_path))
    guarded.close()
    [logger] = made
    assert logger.told == [("log_hyperparams", ({"seed": 1, "logger": {"mine": {"api_key": "[redacted]"}}},))]
    assert not caplog.records


class Sequences:
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(9) + 7 * index) % 16
        return {"input_ids": tokens[:-1], "labels": tokens[1:]}


def fit(folder: Path, guarded: list[GuardedLogger]) -> dict[str, list]:
    """Five steps, validated after three and at the end; returns metrics.csv."""
    plan = RunPlan(
        max_steps=5,
        tokens=5 * 16,
        tokens_per_step=16,
        global_batch_size=2,
        micro_batch_size=2,
        accumulate=1,
        devices=1,
        sequence_length=8,
        warmup_steps=0,
        val_every_n_steps=3,
    )
    trainer = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "compile": False}
    trainer |= {"log_every_n_steps": 2, "deterministic": True, "val_sequences": 4}
    model = models.llama(hidden_size=8, num_layers=1, num_heads=1, intermediate_size=8, vocab_size=16, context_length=8)
    adamw = optim.build(model, {"name": "adamw", "lr": 1e-3, "roles": {"default": {"rule": "adamw"}}})
    module = training.PretrainModule(model, adamw, lambda _: 1.0, corpora={"a": 1.0}, token_bytes=np.full(16, 2))
    data = training.TokenDataModule(
        Sequences(), {"a": Sequences()}, micro_batch_size=2, micro_batches=5, val_sequences=4
    )
    with Status(folder / "status.json", "0" * 8) as status:
        training.fit(
            module,
            data,
            plan,
            config=trainer,
            precision="32-true",
            folder=RunFolder(folder),
            columns=["val/loss/a"],
            callbacks=[],
            loggers=guarded,
            status=status,
        )
    return read_metrics(folder / "metrics.csv")


def rows_of(told: list[tuple[str, int, float]]) -> dict[str, dict[int, float]]:
    """(name, step, value) by name and step, each once."""
    rows: dict[str, dict[int, float]] = {}
    for name, step, value in told:
        assert step not in rows.setdefault(name, {})
        rows[name][step] = value
    return rows


def check_against(table: dict[str, list], rows: dict[str, dict[int, float]]) -> None:
    """What a logger was told is what metrics.csv has, at the same steps."""
    assert set(table["step"]) == {1, 2, 3, 4, 5}
    for name in ("train/loss", "val/loss", "val/loss/a", "val/perplexity", "val/bits_per_byte"):
        kept = {step: value for step, value in zip(table["step"], table[name], strict=True) if value is not None}
        assert len(kept) == (2 if name.startswith("val") else 4)
        assert rows[name] == pytest.approx(kept, rel=1e-5)


def test_a_logger_is_told_what_metrics_csv_says(tmp_path: Path) -> None:
    inner = Recorder()
    table = fit(tmp_path, [GuardedLogger("mine", lambda: inner)])
    calls = [what for method, what in inner.told if method == "log_metrics"]
    check_against(table, rows_of([(name, step, value) for metrics, step in calls for name, value in metrics.items()]))


def test_a_run_goes_on_without_its_loggers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    guarded = [GuardedLogger(method, lambda m=method: Recorder(m, raiser(OSError("gone")))) for method in METHODS[1:]]
    guarded.append(GuardedLogger("missing", raiser(ModuleNotFoundError("No module named 'aim'"))))
    fit(tmp_path, guarded)
    assert sorted(r.getMessage().split(":")[0].split()[1] for r in caplog.records if "metrics.csv" in r.msg) == sorted(
        ["missing", *METHODS[1:]]
    )


def test_tensorboard(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from lightning.pytorch.loggers import TensorBoardLogger

    guarded = GuardedLogger("tensorboard", lambda: TensorBoardLogger(str(tmp_path), name="tensorboard"))
    guarded.log_hyperparams({"optimizer": {"lr": 0.5}})
    table = fit(tmp_path, [guarded])
    told = []
    for file in sorted((tmp_path / "tensorboard").rglob("events.*")):
        found = events.EventAccumulator(str(file)).Reload()
        told += [(name, e.step, e.value) for name in found.Tags()["scalars"] for e in found.Scalars(name)]
    check_against(table, rows_of([row for row in told if row[0] != "hp_metric"]))
    assert "lr: 0.5" in (tmp_path / "tensorboard" / "version_0" / "hparams.yaml").read_text()


class TrackingServer(BaseHTTPRequestHandler):
    """As much of MLflow's REST interface as one run needs; what was posted is kept by the class."""

    posted: list[tuple[str, dict[str, Any]]]

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self._answer(404 if "get-by-name" in self.path else 200)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.posted.append((self.path.partition("mlflow/")[2], body))
        self._answer(200)

    def _answer(self, code: int) -> None:
        run = {"info": {"run_id": "r1", "experiment_id": "7", "status": "RUNNING"}, "data": {}}
        answer = {"experiment_id": "7", "run": run, "run_info": run["info"]}
        body = json.dumps(answer if code == 200 else {"error_code": "RESOURCE_DOES_NOT_EXIST"}).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def tracking_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    TrackingServer.posted = []
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), TrackingServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_mlflow(tmp_path: Path, tracking_server: str) -> None:
    pytest.importorskip("mlflow")
    from lightning.pytorch.loggers import MLFlowLogger

    guarded = GuardedLogger("mlflow", lambda: MLFlowLogger("theirs", "mine", tracking_server))
    guarded.log_hyperparams({"optimizer": {"lr": 0.5}})
    table = fit(tmp_path, [guarded])
    posted = TrackingServer.posted
    assert [body["name"] for path, body in posted if path == "experiments/create"] == ["theirs"]
    [made] = [body for path, body in posted if path == "runs/create"]
    assert {"key": "mlflow.runName", "value": "mine"} in made["tags"]
    batches = [body for path, body in posted if path == "runs/log-batch"]
    assert [p for body in batches for p in body.get("params", [])] == [{"key": "optimizer/lr", "value": "0.5"}]
    told = [(m["key"], int(m.get("step", 0)), m["value"]) for body in batches for m in body.get("metrics", [])]
    check_against(table, rows_of(told))
    assert [body["status"] for path, body in posted if path == "runs/update"][-1] == "FINISHED"


def test_wandb_without_a_key_stays_on_disk_and_keeps_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.setenv(name, "gone")  # so that what the logger sets is taken back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "argv", ["train.py", "+logger.x.api_key=abcdef0123456789"])
    with caplog.at_level(logging.INFO, "lightning_opt"):
        guarded = GuardedLogger(
            "wandb", lambda: wandb_logger(project="theirs", save_dir=str(tmp_path), name="mine"), end_s=100
        )
        guarded.log_hyperparams({"optimizer": {"lr": 0.5}})
        table = fit(tmp_path, [guarded])
    assert "`wandb sync`" in caplog.text
    assert wandb.run is None  # the next run in this process is its own
    [file] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    everything = b"".join(path.read_bytes() for path in (tmp_path / "wandb").rglob("*") if path.is_file())
    assert b"abcdef0123456789" not in everything
    told, config = wandb_records(file)
    check_against(table, rows_of(told))
    assert config["optimizer"] == {"lr": 0.5}


def wandb_records(file: Path) -> tuple[list[tuple[str, int, float]], dict[str, Any]]:
    """What W&B wrote for `wandb sync`: (name, step, value) of every row, and the configuration."""
    from wandb.proto import wandb_internal_pb2

    told, config, deadline = [], {}, time.monotonic() + 60
    records: list[Any] = []
    while not (records and records[-1].HasField("exit")):  # its own process writes the file, and takes its time
        assert time.monotonic() < deadline
        records = [wandb_internal_pb2.Record.FromString(data) for data in leveldb_log(file.read_bytes())]
        time.sleep(0.02)
    for record in records:
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        told += [(name, row["trainer/global_step"], value) for name, value in row.items() if name[0] != "_"]
        for update in (record.run.config.update, record.config.update):
            config |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in update}
    return [entry for entry in told if entry[0] != "trainer/global_step"], config


@pytest.mark.parametrize(("where", "online"), [("environment", True), ("netrc", True), ("nowhere", False)])
def test_wandb_is_online_once_somebody_has_logged_in(
    where: str, online: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "NETRC", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    if where == "environment":
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    if where == "netrc":
        (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {'x' * 40}\n")
        (tmp_path / ".netrc").chmod(0o600)
    assert wandb_logger(save_dir=str(tmp_path))._offline is not online


def leveldb_log(raw: bytes) -> list[bytes]:
    """The records of a file in LevelDB's log format, behind W&B's own 7 bytes at its start."""
    block, start, records = 32768, 7, [b""]
    while start + 7 <= len(raw):
        if block - start % block < 7:  # too short for a header: padding
            start += block - start % block
            continue
        size, kind = int.from_bytes(raw[start + 4 : start + 6], "little"), raw[start + 6]
        records[-1] += raw[start + 7 : start + 7 + size]
        start += 7 + size
        if kind in (1, 4):  # whole, or last part
            records.append(b"")
    return records[:-1]
