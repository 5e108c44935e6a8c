"""Freezing from copies of the hub's own layout (parquet files, a card that names configurations), then use of it."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import urllib.parse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_opt.evaluation import freezing, suites
from lightning_opt.evaluation.freezing import freeze
from lightning_opt.evaluation.layouts import as_on_hub
from lightning_opt.evaluation.suites import read_documents
from lightning_opt.plan import ConfigError
from tests.data import hub_server

TASKS = ["mmlu", "copa", "boolq", "wsc273"]


@pytest.fixture
def hub(tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Repositories as on the hub, filled from the samples here; the calls go there instead."""
    import datasets
    import huggingface_hub

    root = tmp_path / "hub"
    for task in TASKS:
        source = suites.SOURCES[task]
        for split, path in suites.local_files(shared_data / "eval", task).items():
            rows = [as_on_hub(task, document) for document in read_documents(path)][:60]
            folder = root / source.hub / source.config
            folder.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    for repository in {suites.SOURCES[task].hub for task in TASKS}:
        lines = ["---", "configs:"]
        for folder in sorted((root / repository).iterdir()):
            lines += [f"- config_name: {folder.name}", "  data_files:"]
            for path in sorted(folder.iterdir()):
                lines += [f"  - split: {path.name.split('-')[0]}", f"    path: {folder.name}/{path.name}"]
        (root / repository / "README.md").write_text("\n".join([*lines, "---", ""]))
    stock = datasets.load_dataset

    def load(name: str, config: str, *, split: str, revision: str) -> Any:
        assert revision == f"sha of {name}"
        return stock(str(root / name), config, split=split, cache_dir=str(tmp_path / "cached"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    told = lambda _, name, revision: SimpleNamespace(sha=f"sha of {name}")  # noqa: E731
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", told)
    return root


def test_frozen_sets_are_the_hubs_and_are_used(hub: Path, tmp_path: Path) -> None:
    folder, said = tmp_path / "frozen", []
    assert freeze(folder, TASKS, said.append) == {}
    files = {"mmlu_test.jsonl", "mmlu_dev.jsonl", "copa_val.jsonl", "boolq_val.jsonl", "winograd_wsc273.jsonl"}
    assert {path.name for path in folder.iterdir()} == files | {"FROZEN.json"}
    listed = json.loads((folder / "FROZEN.json").read_text())
    assert listed["copa_val.jsonl"]["revision"] == "sha of aps/super_glue"
    assert listed["copa_val.jsonl"]["documents"] == sum(1 for _ in read_documents(folder / "copa_val.jsonl")) == 50
    settings = suites.resolve({"suite": "full", "data_dir": str(folder), "tasks": TASKS})
    assert settings["tasks"] == TASKS
    with pytest.raises(ConfigError, match=r"hellaswag_val\.jsonl, piqa_val\.jsonl"):
        suites.check({"suite": "full", "data_dir": str(folder), "tasks": ["hellaswag", "copa", "piqa"]})


class Tree(hub_server._Answer):
    """Lists single folders too, and tells files apart by their content, as `datasets` needs it."""

    def do_GET(self) -> None:
        where = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        match = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/[^/]+/(.+)", where)
        if not match:
            return super().do_GET()
        root = self.server.folder / match[1]
        entries = [
            {"type": "file", "path": path.relative_to(root).as_posix(), "size": path.stat().st_size, "oid": "0"}
            for path in sorted((root / match[2]).iterdir())
        ]
        return self._send(200, json.dumps(entries).encode())

    do_HEAD = do_GET  # noqa: N815 - the server's own name

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        if "ETag" in headers:
            headers["ETag"] = f'"{hashlib.sha256(body).hexdigest()}"'
        super()._send(status, body, **headers)


def test_the_command_fetches_by_the_hubs_own_interface_and_scores_offline(
    hub: Path, checkpoint: Path, tmp_path: Path, repository: Path
) -> None:
    """Nothing is patched in the commands: the hub's client talks HTTP to a stand-in on this machine."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "answers")}

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "recipes.evaluate", *arguments]
        settings = {"cwd": repository, "env": environment | more, "capture_output": True, "text": True}
        return subprocess.run(command, check=False, **settings)

    frozen = str(tmp_path / "frozen")
    with hub_server.hub(hub) as server:
        server.RequestHandlerClass = Tree
        done = run("--freeze", frozen, "--tasks", ",".join(TASKS), HF_ENDPOINT=server.url, HF_HUB_DISABLE_XET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    listed = json.loads((tmp_path / "frozen" / "FROZEN.json").read_text())
    assert {entry["revision"] for entry in listed.values()} == {hub_server.SHA}
    scored = ["--data-dir", frozen, "--tasks", "copa,wsc273", "--limit", "4", "--device", "cpu"]
    done = run(str(checkpoint), *scored, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert "wsc273" in done.stdout


def test_what_is_whole_is_not_fetched_again_and_what_changed_is_refused(hub: Path, tmp_path: Path) -> None:
    folder, said = tmp_path / "frozen", []
    freeze(folder, ["copa", "boolq"], said.append)
    path = folder / "copa_val.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"label": 1', b'"label": 0', 1))
    with pytest.raises(ConfigError, match="must be unchanged since it was frozen"):
        suites.check({"suite": "full", "data_dir": str(folder), "tasks": ["copa"]})
    freeze(folder, ["copa", "boolq"], said.append)
    assert path.read_bytes() == whole
    assert said[-2:] == ["copa_val.jsonl: 50 documents of aps/super_glue", "boolq_val.jsonl: already frozen"]


def test_a_list_that_is_cut_and_a_file_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    settings = {"suite": "full", "data_dir": str(tmp_path), "tasks": ["copa"]}
    (tmp_path / "copa_val.jsonl.gz").write_bytes(gzip.compress(b'{"label": 1}\n' * 99)[:-12])
    with pytest.raises(ConfigError, match=r"data_dir = .*copa_val\.jsonl\.gz: must be readable JSON lines"):
        list(suites.read_documents(tmp_path / "copa_val.jsonl.gz"))
    suites.check(settings)
    (tmp_path / "FROZEN.json").write_text('{"copa_val.jso')
    for use in (lambda: suites.check(settings), lambda: freeze(tmp_path, ["copa"])):
        with pytest.raises(ConfigError, match=r"FROZEN\.json: must be whole, and is cut or no JSON: remove it"):
            use()


def test_one_failing_set_does_not_lose_the_others(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freezing, "_WAITS", ())
    failed = freeze(tmp_path / "frozen", ["piqa", "copa"], lambda _: None)
    assert failed.keys() == {"piqa_val.jsonl"}
    assert failed["piqa_val.jsonl"].startswith("baber/piqa: ")
    assert {path.name for path in (tmp_path / "frozen").iterdir()} == {"FROZEN.json", "copa_val.jsonl"}


def test_a_network_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(freezing.time, "sleep", waited.append)
    lost = type("ReadError", (type("TransportError", (Exception,), {}),), {})
    answers = iter([ConnectionError("no route"), TimeoutError(), lost(), "here"])

    def load() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert freezing._patiently(load) == "here"
    assert waited == list(freezing._WAITS)
