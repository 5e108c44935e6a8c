"""Every field's rule: what it takes, what it refuses, and how it says so."""

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_opt.plan import RULES, ConfigError, check_value


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("lr", 1e-3, 1e-3),
        ("optimizer.roles.norm.lr", 1, 1.0),
        ("weight_decay", 0, 0.0),
        ("betas", [0.9, 0], (0.9, 0.0)),
        ("max_grad_norm", None, None),
        ("trainer.max_tokens", 2e6, 2_000_000),
        ("warmup", 0.05, 0.05),
        ("warmup", 0, 0.0),
        ("warmup", 1, 1),
        ("warmup", 200.0, 200),
        ("init", "width", "width"),
        ("init", 0.02, 0.02),
        ("activation_checkpointing", "every_2", "every_2"),
        ("profiler", None, None),
        ("seed", 0, 0),
    ],
)
def test_good_values_are_normalised(name, value, expected):
    result = check_value(name, value)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("optimizer.lr", -1, "optimizer.lr = -1: must be a number > 0 (typical 1e-4 to 1e-2)"),
        ("optimizer.lr", "abc", "optimizer.lr = abc: must be a number"),
        ("optimizer.lr", math.nan, "optimizer.lr = nan"),
        ("optimizer.lr", math.inf, "optimizer.lr = inf"),
        ("optimizer.lr", True, "optimizer.lr = true"),
        ("optimizer.lr", None, "optimizer.lr = null"),
        ("lr", 0, "> 0"),
        ("betas", [0.9], "[0.9]: must be a list of 2 numbers"),
        ("betas", [0.9, 1.0], "< 1"),
        ("betas", 0.9, "list of 2"),
        ("betas", [0.9, "x"], "list of 2"),
        ("weight_decay", -0.1, ">= 0"),
        ("max_grad_norm", 0, "null for no clipping"),
        ("precision", "fp17", "auto, 32-true, bf16-mixed, bf16-true"),
        ("warmup", 1.0, "fraction"),
        ("warmup", 1.5, "fraction"),
        ("warmup", -1, "fraction"),
        ("max_steps", 2.5, "whole number"),
        ("max_steps", 0, ">= 1"),
        ("activation_checkpointing", "every_0", "every_N"),
        ("activation_checkpointing", False, "off"),  # YAML reads a bare `off` as false
        ("compile", "yes", "off, layers, model"),
        ("seed", -1, ">= 0"),
    ],
)
def test_bad_values_are_refused_in_one_line(name, value, words):
    with pytest.raises(ConfigError) as caught:
        check_value(name, value)
    text = str(caught.value)
    assert words in text
    assert text.startswith(f"{name} = ")
    assert "\n" not in text


def test_error_names_the_field_it_is_told():
    with pytest.raises(ConfigError, match=r"^Lion\.lr = -2: "):
        check_value("lr", -2, field="Lion.lr")


def test_error_is_one_line_whatever_the_value():
    assert "\n" not in str(ConfigError("a\tb".replace("\t", "."), "x\ny" * 100, "must be\nshort"))


def test_error_survives_pickling():
    error = pickle.loads(pickle.dumps(ConfigError("lr", -1, "must be > 0")))
    assert (error.field, error.value, str(error)) == ("lr", -1, "lr = -1: must be > 0")


def test_unknown_name_is_our_mistake_not_the_users():
    with pytest.raises(KeyError):
        check_value("no_such_field", 1)


@given(st.floats())
def test_lr_takes_exactly_the_positive_finite_numbers(value):
    good = math.isfinite(value) and value > 0
    try:
        assert check_value("lr", value) == value
    except ConfigError:
        assert not good
    else:
        assert good


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.floats(), max_size=3)))
def test_no_rule_ever_fails_other_than_by_config_error(value):
    for name in RULES:
        try:
            once = check_value(name, value)
        except ConfigError:
            continue
        assert check_value(name, once) == once  # what comes out goes in again


@given(st.one_of(st.text(), st.lists(st.text()), st.binary()))
def test_an_error_is_always_one_line(value):
    assert len(str(ConfigError("a.b", value, "must be short")).splitlines()) == 1
