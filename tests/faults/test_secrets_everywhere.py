"""Secrets by override, environment and resolver, in a real run: no byte that it leaves or says holds one."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from driver import write_texts

from lightning_opt.plan import ConfigError, secrets

LINE = "secrets by override, environment and resolver: in no file, log, page or checkpoint"

# Nothing about them looks like a secret: only where they stand tells.
BY_OVERRIDE, IN_A_MAP, IN_AN_ADDRESS = "Quj4bWz81override", "Quj4bWz82map", "Quj4bWz83address"
BY_RESOLVER, BY_REFERENCE = "Quj4bWz84resolver", "Quj4bWz85reference"
WANDB, HUB = "Quj4bWz86wandb", "Quj4bWz87hub"
SIGN = b"Quj4bWz8"

OVERRIDES = (
    "+callbacks.telltale._target_=telltale.Telltale",
    f"+callbacks.telltale.password={BY_OVERRIDE}",
    "+callbacks.telltale.shared=${oc.env:SHARED_TOKEN}",
    f"logger.client={{_target_: telltale.Client, save_dir: null, headers: {{Authorization: 'Bearer {IN_A_MAP}'}}}}",
    f"logger.client.url=https://me:{IN_AN_ADDRESS}@host/x",
    "logger.client.api_key=${oc.env:CLIENT_KEY}",
    "logger.client.note='for ${callbacks.telltale.shared}'",
)
ENVIRONMENT = {"WANDB_API_KEY": WANDB, "HF_TOKEN": HUB, "SHARED_TOKEN": BY_REFERENCE, "CLIENT_KEY": BY_RESOLVER}


def leaks(folder: Path) -> Iterator[str]:
    """Names and files below a folder that hold a secret, those inside archives included."""
    for path in folder.rglob("*"):
        if SIGN in os.fsencode(path.name):
            yield f"the name {path}"
        if not path.is_file():
            continue
        content = path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                content += b"".join(archive.read(name) for name in archive.namelist())
        for found in re.finditer(rb".{0,60}" + SIGN + rb".{0,20}", content, re.DOTALL):
            yield f"{path.relative_to(folder)}: {found[0]!r}"


def train(repository: Path, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    texts = write_texts(folder.parent / "texts")
    base = ("model=femto", "data=files", f"data.path={texts}", f"data.cache_dir={folder.parent / 'cache'}")
    steps = ("trainer.max_steps=4", "trainer.val_sequences=4", "evaluation=none", "trainer.num_threads=1")
    path = os.pathsep.join([str(repository), str(Path(__file__).parent)])
    return subprocess.run(
        [sys.executable, str(repository / "train.py"), *base, *steps, *overrides],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.fault(34, LINE)
def test_a_run_keeps_every_secret(repository: Path, tmp_path: Path) -> None:
    """It has all parts that write: loggers, checkpoints, export, report; and ends by an error that quotes secrets."""
    folder = tmp_path / "work"
    folder.mkdir()
    done = train(repository, folder, *OVERRIDES)
    assert done.returncode == 1, done.stdout + done.stderr
    assert list(leaks(folder)) == []
    assert SIGN.decode() not in done.stdout + done.stderr
    # or the above would say nothing
    [run] = folder.glob("runs/*/*-*")
    log = (run / "run.log").read_text()
    for said in ("told: the password is [redacted]", "the vault refused '[redacted]'", "logger client: Connection"):
        assert said in log
    assert "told: [redacted]" in log
    config = (run / "config.yaml").read_text()
    assert "shared: ${oc.env:SHARED_TOKEN}" in config
    assert "password: '[redacted]'" in config
    assert "callbacks.telltale.password=[redacted]" in (run / "overrides.txt").read_text()
    assert "the vault refused" in (run / "report.html").read_text()
    assert list(run.glob("checkpoints/*/model.safetensors"))
    assert list(run.glob("model/*.safetensors"))


@pytest.mark.slow
@pytest.mark.fault(34, LINE)
def test_a_sweep_of_two_ranks_keeps_every_secret(repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    done = train(repository, folder, *OVERRIDES, "-m", "optimizer.lr=1e-3,2e-3", "trainer.devices=2")
    assert done.returncode == 1, done.stdout + done.stderr
    assert list(leaks(folder)) == []
    assert SIGN.decode() not in done.stdout + done.stderr
    assert len(list(folder.glob("runs/sweeps/*/*/checkpoints/*"))) >= 2
    assert "the vault refused" in "".join(path.read_text() for path in folder.glob("runs/sweeps/*/*/run.log"))


@pytest.mark.fault(34, LINE)
@pytest.mark.parametrize(
    "wrong",
    [
        f"loger.client.api_key={BY_OVERRIDE}",  # a typo
        f"+callbacks.telltale.passwrd_key=[{BY_OVERRIDE}",  # not in the grammar
        f"optimizer.lr={BY_OVERRIDE} logger.x.token={BY_OVERRIDE}",
        f"logger.client.api_key=https://me:{IN_AN_ADDRESS}@host,2",  # several values without -m
    ],
)
def test_a_refusal_keeps_them_too(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_opt.launch import main

    assert main([f"logger.client.token={BY_OVERRIDE}", *wrong.split(" ")]) == 2
    said = "".join(capsys.readouterr())
    assert said
    assert SIGN.decode() not in said


def test_what_is_guarded_is_masked_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", HUB)
    monkeypatch.setenv("SOME_AUTH_SOCK", "/tmp/agent.1234")
    monkeypatch.setenv("SORT_AUTH", "wherever")
    text = f"{BY_OVERRIDE}-x, {HUB}, {IN_A_MAP}; tell /tmp/agent.1234 wherever key=value"
    config = {"api_key": BY_OVERRIDE, "auth": [f"Bearer {IN_A_MAP}"], "password": "tell", "name": "value"}
    with secrets.guarding(config):
        assert secrets.mask(text) == "[redacted]-x, [redacted], [redacted]; tell /tmp/agent.1234 wherever key=value"
        with secrets.guarding({}):
            assert BY_OVERRIDE not in secrets.clean_text(text)
    assert secrets.mask(text) == text
    assert secrets.mask("hf_abcdefghijklmnopqrst") == "[redacted]"


SURE = "correct-horse-battery"


@pytest.mark.parametrize("name", ["DB_PASSWORD", "MY_SECRET", "HF_TOKEN", "OPENAI_API_KEY", "vaultKey"])
@pytest.mark.parametrize("text", [SURE, "/bXl+c2VjcmV0/a2V5==", 'it\'s "quoted" \\ & <straße> / more'])
def test_a_variable_that_tells_by_its_name_is_guarded_in_every_form(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, text)
    forms = [text, repr(text)[1:-1], json.dumps({"a": text})[7:-2], quote(text, safe=""), quote(text), quote_plus(text)]
    with secrets.guarding({}):
        for form in [*forms, html.escape(text)]:
            assert secrets.mask(f"it said {form}, no more") == "it said [redacted], no more"


def test_paths_flags_and_short_words_are_no_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    innocent = {"SSL_KEY": str(tmp_path), "SORT_KEY": "default", "ANY_TOKEN": "true", "NOT_UTF8_KEY": "\udcff" * 9}
    for name, text in innocent.items():
        monkeypatch.setenv(name, text)
    text = f"{tmp_path} default true, {SURE}"
    with secrets.guarding({}):
        assert secrets.mask(text) == text


@pytest.mark.parametrize(
    "address", ["postgres://:pw@h/x", "https://TOKENTOKEN@h/x", "https://me:pw@h/x", "https://u:p@s@@h/x"]
)
def test_an_address_is_shown_without_its_key(address: str) -> None:
    assert secrets.mask(f"at {address}") == f"at {address.partition('://')[0]}://[redacted]@h/x"
    for plain in ("ssh://git@github.com/x", "https://host:8080/x@y"):
        assert secrets.mask(plain) == plain


@pytest.mark.parametrize(("field", "value"), [("x.api_key", BY_OVERRIDE), ("x", {"password": BY_OVERRIDE})])
def test_a_configuration_error_shows_no_secret(field: str, value: object) -> None:
    error = ConfigError(field, value, "must be another")
    assert SIGN.decode() not in str(error)
    assert "must be another" in str(error)
    assert error.value == value
