"""Secrets by override, environment and reference: none reaches what the job is told to write."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from lightning_opt.launch import main, redact

SECRET = "sk-do-not-tell-7f3a"


@pytest.fixture
def told(jobs, monkeypatch, tmp_path):
    """Runs a command and returns all text that goes to disk."""

    def run(*arguments):
        monkeypatch.setenv("MY_TOKEN", SECRET)
        assert main([*arguments, "evaluation=none"]) == 0
        written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
        return jobs[-1]["saved_config"] + "\n".join(jobs[-1]["overrides"]) + written, jobs[-1]["config"]

    return run


LOGGER = "logger.mine._target_=lightning.pytorch.loggers.CSVLogger"


def test_environment_stays_unresolved_on_disk_and_reaches_the_job(told):
    text, config = told(LOGGER, "logger.mine.name=${oc.env:MY_TOKEN}", "logger.mine.prefix=${logger.mine.name}-x")
    assert config["logger"]["mine"]["name"] == SECRET
    assert config["logger"]["mine"]["prefix"] == f"{SECRET}-x"
    assert SECRET not in text
    assert "${oc.env:MY_TOKEN}" in text


def test_a_secret_on_the_command_line_is_blotted_out(told):
    text, config = told(LOGGER, f"logger.mine.api_key={SECRET}")
    assert config["logger"]["mine"]["api_key"] == SECRET
    assert SECRET not in text
    assert "logger.mine.api_key=[redacted]" in text


def test_a_secret_inside_a_map_is_blotted_out(told):
    text, _ = told("logger={mine: {_target_: lightning.pytorch.loggers.CSVLogger, password: " + SECRET + "}}")
    assert SECRET not in text


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("logger.wandb.api_key=abc", "logger.wandb.api_key=[redacted]"),
        ("+logger.x.hf_token=abc", "+logger.x.hf_token=[redacted]"),
        ("logger.x.token=${oc.env:T}", "logger.x.token=${oc.env:T}"),
        ("logger.x={password: abc, a: 1}", "logger.x={password:[redacted],a:1}"),
        ("logger.x.url=https://me:abc@host/x", "logger.x.url='https://[redacted]@host/x'"),
        ("logger.x.url='https://me:abc@host/x y'", "logger.x.url='https://[redacted]@host/x y'"),
        ("trainer.max_tokens=5", "trainer.max_tokens=5"),
        ("data.tokenizer.path=x", "data.tokenizer.path=x"),
        ("optimizer=lion", "optimizer=lion"),
    ],
)
def test_redact(line, kept):
    assert redact([line]) == [kept]
    OverridesParser.create().parse_override(kept)  # as a sweep does with those of its earlier jobs


HIDDEN = [
    ("logger.mine={{_target_: {csv}, token: {secret}}}"),
    ("logger.mine={{_target_: {csv}, access_token: {secret}}}"),
    ("logger.mine={{_target_: {csv}, headers: {{Authorization: 'Bearer {secret}'}}}}"),
    ("logger.mine={{_target_: {csv}, api_key: '${{oc.env:MY_NAME}} {secret}'}}"),
    ("logger.mine={{_target_: {csv}, many: [{{password: {secret}}}]}}"),
    ("logger.mine.wandbApiKey={secret}"),
    ("logger.mine.access_key_id={secret}"),
    ("logger.mine.url=https://me:{secret}@host"),
    ("logger.mine.hf_token='${{oc.env:MY_NAME}}{secret}'"),
    ("logger.mine.auth_header={secret}"),
    ("logger.mine.token=a {secret}"),
]


@pytest.mark.parametrize("secret", ["s1x", SECRET])
@pytest.mark.parametrize("line", HIDDEN)
def test_hidden_wherever_it_stands(told, monkeypatch, line, secret):
    monkeypatch.setenv("MY_NAME", "me")
    first = [] if "csv" in line else [LOGGER]
    text, config = told(*first, line.format(secret=secret, csv="lightning.pytorch.loggers.CSVLogger"))
    assert secret in str(config["logger"])  # the job itself needs it
    assert secret not in text
    assert "[redacted]" in text


@pytest.mark.parametrize(
    "line",
    [
        "logger.x.tokens=5",
        "logger.x.max_tokens=word",
        "logger.x.tokenizer=org/name",
        "logger.x.eos_token=word",
        "logger.x={eos token: word, num_key_value_heads: four}",
        "logger.x.note='the eos token: word'",
        "logger.x={token: '${oc.env:A}', a: 1}",
        "~callbacks.memory",
    ],
)
def test_no_secret(line):
    assert redact([line]) == [line]
