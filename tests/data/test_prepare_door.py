"""The door itself, as a process: from a hub over HTTP, stopped by signals and killed at any instant."""

from __future__ import annotations

import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from data_samples import make_texts
from hub_server import SHA, hub
from prepare_samples import DCLM, STARCODER, content, make_hub

from lightning_opt.data import preparing
from lightning_opt.data import tokenizer as t
from lightning_opt.plan import ConfigError

COMMAND = (
    sys.executable, "-m", "recipes.prepare_data", "data=dclm_starcoder_proofpile", "data.corpora.c4_en.val_tokens=300",
    "processes=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("door")
    make_hub(folder / "hub", make_texts(80), make_texts(60, 1000), make_texts(60, 2000), make_texts(20, 3000))
    t.save_trained(t.train_tokenizer(make_texts(200), 300), folder)
    return folder


def command(place: Path, shards: Path, *more: str) -> list[str]:
    given = f"data.tokenizer.path={place / 'tokenizer.json'}"
    return [*COMMAND, given, f"data.path={shards}", *more]


def run(words: list[str], repository: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(repository), **environment}
    return subprocess.run(words, cwd=repository, env=environment, capture_output=True, text=True, timeout=300)


def test_a_gated_set_then_a_hub_that_stumbles(place: Path, repository: Path, tmp_path: Path) -> None:
    """One line how to get access; with a token, through 503 and 429, the shards are those of the local copies."""
    with hub(place / "hub") as server:
        server.gated = {STARCODER}
        environment = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        words = command(place, tmp_path / "shards", "tokens=4000")
        refused = run(words, repository, **environment, HF_TOKEN="")
        assert refused.returncode == 2
        assert refused.stderr.strip().count("\n") == 0
        how = f"accept its terms at https://huggingface.co/datasets/{STARCODER}, then `hf auth login` (or set HF_TOKEN)"
        assert how in refused.stderr
        assert f"data.corpora.starcoder = {STARCODER}: " in refused.stderr
        server.failures = {503: 2, 429: 1}
        done = run(words, repository, **environment, HF_TOKEN="hf_secret")
        assert done.returncode == 0, done.stderr
        assert server.failures == {503: 0, 429: 0}
        fetched = [path for _, path, spread in server.requests if spread]
        assert fetched
        assert all(f"/resolve/{SHA}/" in path for path in fetched)  # of one commit, whatever main becomes
        assert not [path for path in fetched if "c4-train" in path or "/test/" in path]
    local = run(command(place, tmp_path / "local", "tokens=4000", f"data.root={place / 'hub'}"), repository)
    assert local.returncode == 0, local.stderr
    for name in ("dclm", "starcoder", "proofpile", "c4_en"):
        over_http, copied = content(tmp_path / "shards" / name), content(tmp_path / "local" / name)
        tokens = [file for file in copied if not file.endswith(".json")]
        assert len(tokens) >= 3
        assert {file: over_http[file] for file in tokens} == {file: copied[file] for file in tokens}
    assert SHA in (tmp_path / "shards" / "dclm" / "index.json").read_text()
    written = [path for path in (tmp_path / "shards").rglob("*") if path.is_file()]
    assert not [path for path in written if b"hf_secret" in path.read_bytes()]


def test_dry_run_and_refusals_of_the_door(place: Path, repository: Path, tmp_path: Path) -> None:
    root = f"data.root={place / 'hub'}"
    dry = run(command(place, tmp_path / "shards", "tokens=4000", root, "--dry-run"), repository)
    assert dry.returncode == 0, dry.stderr
    assert "nothing was written" in dry.stdout
    assert str(place / "hub" / DCLM) in dry.stdout
    wrong = run(command(place, tmp_path / "shards", "tokns=4000", root), repository)
    assert wrong.returncode == 2
    assert "did you mean tokens?" in wrong.stderr
    assert not list(tmp_path.iterdir())


def test_training_is_told_the_weights_that_were_prepared(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And where it is not, says which weight is in the way: no preparation of that folder would help."""
    from lightning_opt import data
    from recipes.prepare_data import configuration, main

    words = command(place, tmp_path / "my shards", "tokens=2000", f"data.root={place / 'hub'}")[3:]
    assert main([*words, "data.weights.starcoder=0"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    told = ["data=dclm_starcoder_proofpile", f"data.path={tmp_path / 'my shards'}", "data.weights.starcoder=0"]
    assert shlex.split(last.removeprefix("train on them: ")) == ["python", "train.py", *told]
    data.check(configuration(told)["data"])
    with pytest.raises(
        ConfigError, match=r"data\.weights\.starcoder = 0\.0609: must be 0: the shards of .* without it"
    ):
        data.check(configuration(told[:2])["data"])
    for wrong, why in (
        ("dlcm", r"its name must be one of dclm, proofpile; did you mean dclm\?"),
        ("c4_en", "must be 0: it"),
    ):
        with pytest.raises(ConfigError, match=rf"data\.weights\.{wrong} = 1\.0: {why}"):
            data.check(configuration([*told, f"data.weights.{wrong}=1.0"])["data"])


def test_shards_without_validation_text_are_no_success(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who would train on them is told what helps, which is not the same command again."""
    from lightning_opt import data
    from recipes.prepare_data import configuration, main

    alone = ["data.corpora.c4_en=null", "data.corpora.dclm.val_fraction=1e-9"]
    words = [*command(place, tmp_path / "shards", "tokens=2000", f"data.root={place / 'hub'}")[3:], *alone]
    words.remove("data.corpora.c4_en.val_tokens=300")
    assert main(words) == 1
    said = capsys.readouterr()
    assert "train on them" not in said.out
    assert said.err.count("\n") == 1
    assert "data.corpora.NAME.val_fraction, or more tokens, and another data.path" in said.err
    with pytest.raises(ConfigError, match=r"nothing was held out: prepare others, in another data\.path"):
        data.check(configuration(words)["data"])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("data.path=2026", "data.path = 2026: must be the name of a folder or file"),
        ("data.decontaminate=5", "data.decontaminate = 5: must be the name of a folder or file"),
        ("data.tokenizer=gpt2", "data.tokenizer = gpt2: must be a mapping; the one to read is named by data.tokenizer"),
        ("data.corpora.dclm.files=5", "data.corpora.dclm.files = 5: must be a pattern or a list of them"),
        ("data.corpora.dclm.column=5", "data.corpora.dclm.column = 5: must be a word, or null for text, else content"),
        ("data.corpora.dclm.val_fractoin=0.1", "did you mean val_fraction?"),
        ("~data.source", "data.source"),
    ],
)
def test_wrong_values_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str, said: str) -> None:
    from recipes.prepare_data import main

    assert main(["data=dclm_starcoder_proofpile", f"data.path={tmp_path / 'shards'}", "tokens=1e6", word]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_file_that_the_page_shows_is_a_whole_one(repository: Path, tmp_path: Path) -> None:
    from lightning_opt import plan
    from lightning_opt.data import orders
    from lightning_opt.launch import Composer, compose_checked, plain_config

    page = (repository / "docs" / "data.md").read_text().partition("### Another data set")[2]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0])
    for name in ("train", "prepare"):
        with Composer(name=name, extra=tmp_path) as composer:
            config = plain_config(compose_checked(composer, ["data=mine"]))
            ours = plain_config(compose_checked(composer, ["data=fineweb_edu"]))
        assert config["data"].keys() == ours["data"].keys()
        assert len(orders.asked(config["data"], 1e6)["corpora"]) == 3
        if name == "train":
            plan.check(config)


def test_no_hub_is_a_failure_and_no_mistake(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network (HF_HUB_OFFLINE, as all tests have it): exit status 1; and 2 for an option there is not."""
    from recipes.prepare_data import main

    words = command(place, tmp_path / "shards", "tokens=4000")[3:]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert said.startswith("data.corpora.c4_en = allenai/c4: the hub gave up on us (")
    assert said.endswith("data.root=FOLDER; the same command goes on where it was\n")
    lost = [word for word in words if not word.startswith("data.tokenizer.path=")]
    lost += [f"data.root={place / 'hub'}", "data.tokenizer.path=some-org/model"]
    assert main(lost) == 1
    said = capsys.readouterr().err
    assert said.startswith("data.tokenizer.path = some-org/model: the hub gave up on us (")
    shutil.rmtree(tmp_path / "shards", ignore_errors=True)  # what it began
    assert main([*words, "--dryrun"]) == 2
    assert capsys.readouterr().err.startswith("--dryrun = true: is no option: there is --dry-run")
    assert not list(tmp_path.iterdir())


def begin(words: list[str], repository: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    silent = subprocess.DEVNULL
    return subprocess.Popen(words, cwd=repository, env=environment, stdout=silent, stderr=silent)


def test_no_process_outlives_a_kill_and_the_same_command_ends_the_same(
    place: Path, repository: Path, tmp_path: Path
) -> None:
    words = command(place, tmp_path / "killed", "tokens=4000", f"data.root={place / 'hub'}")
    process = begin(words, repository)
    work = tmp_path / "killed" / preparing.WORK
    while not list(work.glob("dclm/*.bin")):  # a worker is at work
        assert process.poll() is None
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    process.send_signal(signal.SIGKILL)
    process.wait()
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    assert len(gone) == len(workers)
    assert run(words, repository).returncode == 0
    whole = command(place, tmp_path / "whole", "tokens=4000", f"data.root={place / 'hub'}", "processes=1")
    assert run(whole, repository).returncode == 0
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_random_instants_real_text(shared_data: Path, repository: Path, tmp_path: Path) -> None:
    """Twenty-four kills, at instants drawn over the whole of a run, with 1 to 3 processes in turn."""
    import json

    texts = {
        name: [json.loads(line)["text"] for line in (shared_data / "text" / f"{name}.jsonl").open(encoding="utf-8")]
        for name in ("web_train", "code_train", "math_train", "web_val")
    }
    make_hub(tmp_path / "hub", *texts.values())
    tokenizer = shared_data / "tokenizers" / "gpt2.tokenizer.json"
    changes = [
        f"data.root={tmp_path / 'hub'}", f"data.tokenizer.path={tokenizer}", "tokens=1.2e6",
        f"data.decontaminate={shared_data / 'eval'}", "data.corpora.c4_en.val_tokens=30000",
        "data.weights={dclm: 0.5, starcoder: 0.3, proofpile: 0.2}",
    ]  # fmt: skip
    started = time.monotonic()
    assert run([*COMMAND, f"data.path={tmp_path / 'whole'}", *changes], repository).returncode == 0
    length = time.monotonic() - started
    wanted, draw = content(tmp_path / "whole"), random.Random(7)
    for attempt in range(6):
        shards = tmp_path / f"cut{attempt}"
        for kill in range(4):
            words = [*COMMAND, f"data.path={shards}", *changes, f"processes={1 + kill % 3}"]
            process = begin(words, repository)
            time.sleep(draw.uniform(0, length))
            workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.kill()
            process.wait()
            psutil.wait_procs(workers, timeout=60)
        assert run(words, repository).returncode == 0
        assert content(shards) == wanted


PEAK = """
import re, sys
from pathlib import Path
from lightning_opt.data.workforce import Workforce
from recipes.prepare_data import main
def peak(pid):  # getrusage's would hold what the process was forked from
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path(f"/proc/{pid}/status").read_text())[1])
leave, workers = Workforce.__exit__, []
def leave_and_tell(self, *error):
    workers.extend(peak(process.pid) for process in self._processes)
    leave(self, *error)
Workforce.__exit__ = leave_and_tell
print("peaks", main(sys.argv[1:]), peak("self"), max(workers))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peaks are read from Linux's /proc")
def test_memory_is_the_same_for_ten_times_the_text(shared_data: Path, repository: Path, tmp_path: Path) -> None:
    """The largest of the parent and of a worker, on 8 and on 80 MB of text in two files; parquet and jsonl.zst.

    With a tokenizer of whole words, which is quick.
    """
    import json

    import pyarrow
    import pyarrow.parquet
    import zstandard
    from tokenizers import Tokenizer, models, pre_tokenizers

    quick = Tokenizer(models.WordLevel({"[UNK]": 0, t.END_OF_TEXT: 1, "the": 2}, unk_token="[UNK]"))
    quick.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    quick.save(str(tmp_path / "tokenizer.json"))

    lines = (shared_data / "text" / "web_train.jsonl").read_bytes()
    texts = [json.loads(line)["text"] for line in lines.splitlines()]
    peaks = []
    for times in (1, 10):
        folder = tmp_path / f"x{times}"
        folder.mkdir()
        (folder / "a.jsonl.zst").write_bytes(zstandard.compress(lines * times))
        pyarrow.parquet.write_table(pyarrow.table({"text": texts * times}), folder / "b.parquet", row_group_size=500)
        words = [
            sys.executable, "-c", PEAK, "data=fineweb_edu", f"data.path={tmp_path / f'shards{times}'}", "tokens=1e9",
            "data.corpora.fineweb_edu.repo=null", f"data.corpora.fineweb_edu.path={folder}", "processes=1",
            "data.corpora.fineweb_edu.files=null", f"data.tokenizer.path={tmp_path / 'tokenizer.json'}",
        ]  # fmt: skip
        done = run(words, repository)
        assert "peaks 0" in done.stdout, done.stderr
        peaks.append([int(kilobytes) for kilobytes in done.stdout.split("peaks 0")[1].split()])
    for small, large in zip(*peaks, strict=True):
        assert large < 1.2 * small, peaks
