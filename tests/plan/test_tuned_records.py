"""Tuned values: their form, the choice between records, the sizes they hold for, and who reads which file."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_opt.optim.catalogue import OPTIMIZERS
from lightning_opt.plan import RULES, ConfigError, TunedRecord, check_value, tuned, tuned_optimizers, tuned_records
from lightning_opt.plan.values import rule_for

CONF = Path(__file__).parents[2] / "conf" / "optimizer"


def rules_of(optimizer):
    """The rules that its configuration gives to roles."""
    roles = yaml.safe_load((CONF / f"{optimizer}.yaml").read_text())["roles"]
    return {entry["rule"] for entry in roles.values() if "rule" in entry}


def test_every_value_obeys_its_rule_and_every_record_its_origin():
    assert RULES
    for record in tuned_records():
        assert record.measured in {"ours", "published", "no"}
        assert record.source
        for key, value in record.values.items():
            if key.endswith(".rule"):
                assert value in OPTIMIZERS
                continue
            names = [key, *(f"{rule}.{key.rpartition('.')[2]}" for rule in rules_of(record.optimizer))]
            name = next((name for name in names if rule_for(name)), None)
            assert name, key
            check_value(name, value)


def test_no_two_records_for_one_cell():
    cells = [(r.optimizer, r.model, scale) for r in tuned_records() for scale in r.scales]
    assert len(cells) == len(set(cells))


def test_a_named_scale_goes_before_any():
    records = [
        TunedRecord("a", "m", ("any",), {"optimizer.lr": 1.0}, "here", "ours"),
        TunedRecord("a", "m", ("2x",), {"optimizer.lr": 2.0}, "here", "ours"),
    ]
    assert tuned("a", "m", "2x", records=records).values == {"optimizer.lr": 2.0}
    assert tuned("a", "m", "1x", records=records).values == {"optimizer.lr": 1.0}
    assert tuned("a", "x", "1x", records=records) is None


def test_one_file_per_optimizer():
    assert {record.optimizer for record in tuned_records()} == set(tuned_optimizers())
    assert tuned_records("adamw")
    assert tuned_records("no_such") == ()


def test_only_the_file_of_the_wanted_optimizer_is_read(repository):
    code = """
import pathlib
from lightning_opt.plan import tuned
read = []
was = pathlib.Path.read_text
pathlib.Path.read_text = lambda self, *a, **k: read.append(self.name) or was(self, *a, **k)
assert tuned("lion", "llama_130m", "1x")
print(read)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['lion.yaml']"


@pytest.mark.parametrize("size", [802_816, 129_000_000, 6_700_000_000, None])
def test_published_values_are_refused_outside_the_studys_sizes(size):
    record = tuned("adamw", "llama_130m", "1x")
    with pytest.raises(ConfigError, match=r"130M to 1\.2B") as caught:
        record.check_size(size)
    text = str(caught.value)
    assert text.startswith("tuned = adamw/llama_130m_1x: ")
    assert "~tuned" in text
    assert "\n" not in text


@pytest.mark.parametrize("size", [134_217_728, 301_989_888, 1_207_959_552])
def test_the_studys_own_sizes_are_taken(size):
    tuned("adamw", "llama_130m", "1x").check_size(size)


def test_our_own_values_go_with_any_size():
    tuned("adamw", "nano", "demo").check_size(802_816)
    tuned("adamw", "nano", "demo").check_size(None)


def test_a_command_that_shrinks_the_studys_model_is_refused():
    from lightning_opt.launch import Composer
    from lightning_opt.launch.preflight import check_job

    with Composer() as composer:
        cell = ["model=llama_130m", "scale=1x", "model.num_layers=2"]
        with pytest.raises(ConfigError, match="~tuned") as caught:
            check_job(composer.compose(cell))
        assert caught.value.field == "tuned"
        assert check_job(composer.compose([*cell, "~tuned"]))["optimizer"]["lr"] == 1e-3
        assert check_job(composer.compose(["model=llama_130m", "scale=1x"]))["optimizer"]["lr"] == 0.008


def test_a_record_knows_the_tokens_of_a_step_it_was_found_at():
    assert tuned("adamw", "llama_130m", "1x").tokens_per_step == 128 * 4096
    assert tuned("adamw", "llama_130m", "16x").tokens_per_step == 256 * 4096
    assert tuned("lion", "nano", "demo").tokens_per_step == 8 * 256


@pytest.mark.parametrize(("tokens", "told"), [(128 * 4096, False), (128 * 256, True)])
def test_a_run_with_other_steps_than_the_records_is_told(caplog, tokens, told):
    from lightning_opt.job import notices

    with caplog.at_level("INFO"):
        notices.tuning({"source": "S", "tokens_per_step": 128 * 4096, "values": {}}, tokens, 10**9)
        notices.tuning(None, tokens, 10**9)
    lines = [record.getMessage() for record in caplog.records]
    assert bool(lines) == told
    if told:
        assert "524,288 tokens per step" in lines[0]
        assert "32,768" in lines[0]


@pytest.mark.parametrize(("tokens", "told"), [(409_600, False), (819_200, False), (1_638_400, True), (16_384, False)])
def test_a_run_much_longer_than_the_records_is_told(caplog, tokens, told):
    from lightning_opt.job import notices

    record = tuned("muon", "pico", "demo")
    assert record.tokens == 409_600
    assert tuned("muon", "llama_130m", "1x").tokens is None  # the scale says it
    notices.tuning({"tokens": record.tokens, "tokens_per_step": 2048}, 2048, tokens)
    assert [record.getMessage().split(",")[0].strip() for record in caplog.records] == ["tuned at 409"] * told
