"""What must be the same where a run goes on from a checkpoint."""

from __future__ import annotations

import copy
import json

import pytest

from lightning_opt.plan import ConfigError, check_allowed, check_same, identity, length_changes, with_data

CONFIG = {
    "seed": 1,
    "model": {"_target_": "lightning_opt.models.llama", "name": "nano", "num_layers": 4, "context_length": 256},
    "data": {"sequence_length": 256},
    "trainer": {"global_batch_size": 8},
    "optimizer": {"name": "adamw", "lr": 1e-3, "implementation": "auto", "roles": {"norm": {"weight_decay": 0.0}}},
    "schedule": {"name": "linear", "warmup": 0.05},
}
WEIGHTS = {"code": 0.5, "prose": 0.5}


def made(max_steps=100, weights=WEIGHTS, fingerprint="aa", tokenizer="tt", vocabulary=512, prose=900, **changes):
    """An identity as it comes back from a manifest, some values of the configuration changed."""
    config = copy.deepcopy(CONFIG)
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    data = {"weights": weights, "bytes": {"prose": prose}, "fingerprint": fingerprint}
    data |= {"tokenizer": tokenizer, "vocabulary": vocabulary}
    return json.loads(json.dumps(with_data(identity(config, max_steps), **data)))


def refusal(now, allow=(), saved=None):
    with pytest.raises(ConfigError) as caught:
        check_same(saved or made(), now, allow, "runs/x")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("resume = runs/x: ")
    return caught.value.expected


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        ({"seed": 2}, "seed", "seed (saved 1, now 2)"),
        ({"trainer__global_batch_size": 16}, "global_batch_size", "global_batch_size (saved 8, now 16)"),
        ({"optimizer__lr": 0.01}, "optimizer", "optimizer.lr (saved 0.001, now 0.01)"),
        ({"optimizer__roles__norm": {"weight_decay": 0.1}}, "optimizer", "optimizer.roles.norm.weight_decay (saved 0"),
        ({"optimizer__name": "lion", "optimizer__lr": 1}, "optimizer", "optimizer (saved adamw, now lion); to go on"),
        ({"fingerprint": "bb"}, "data", "data.fingerprint (saved aa, now bb)"),
        ({"weights": {"code": 1.0}, "fingerprint": "bb"}, "data", "data.weights (saved {'code': 0.5"),
        ({"tokenizer": "uu", "fingerprint": "bb"}, "tokenizer", "tokenizer (saved tt, now uu); to go on"),
        ({"data__sequence_length": 128, "fingerprint": "bb"}, "sequence_length", "(saved 256, now 128); to go on"),
    ],
)
def test_a_difference_is_named_and_can_be_allowed(change, name, words):
    expected = refusal(made(**change))
    assert words in expected
    assert expected.endswith(f"resume_allow=[{name}]")
    assert check_same(made(), made(**change), [name], "runs/x") == [name]
    others = {"seed", "data", "optimizer", "tokenizer"} - {name}
    assert words in refusal(made(**change), allow=sorted(others))


def test_text_that_changes_a_tokenizer_trained_on_it_is_not_hidden_behind_that():
    expected = refusal(made(tokenizer="uu", fingerprint="bb", prose=901), allow=["tokenizer"])
    assert expected.startswith("differs in data.bytes.prose (saved 900, now 901), data.fingerprint (saved aa, now bb)")
    assert expected.endswith("resume_allow=[data, tokenizer]")


def test_several_differences_stand_in_one_line_with_one_remedy():
    expected = refusal(made(seed=2, optimizer__lr=0.1, trainer__global_batch_size=4), allow=["seed"])
    assert "seed" not in expected.replace("resume_allow=[seed", "")
    assert expected.endswith("resume_allow=[seed, global_batch_size, optimizer]")  # all that the command then needs


def test_another_model_is_refused_whatever_is_allowed():
    expected = refusal(made(model__num_layers=2), allow=["seed", "data", "optimizer"])
    assert expected == "must be of this model, but differs in model.num_layers (saved 4, now 2): its weights do not fit"
    assert "vocabulary (saved 512, now 600)" in refusal(
        made(tokenizer="uu", vocabulary=600), allow=["tokenizer", "data"]
    )


def test_what_changes_no_weight_and_no_batch_may_differ():
    now = made(optimizer__implementation="eager", model__context_length=512, model__activation_checkpointing="full")
    assert check_same(made(), now, [], "runs/x") == []
    with_experts = made(model__experts_implementation="auto")
    assert check_same(with_experts, made(model__experts_implementation="eager"), [], "runs/x") == []
    assert check_same(made(), with_experts, [], "runs/x") == []  # saved before the key was there
    gpt2 = {"_target_": "lightning_opt.models.gpt2", "context_length": 256}  # whose positions are weights
    assert "context_length" in refusal(made(model={**gpt2, "context_length": 128}), saved=made(model=gpt2))


def test_only_what_both_tell_is_compared():
    early = identity(CONFIG, None)  # before the data is built
    assert check_same(made(fingerprint="bb"), early, [], "runs/x") == []
    assert check_same({}, made(), [], "runs/x") == []


def test_steps_and_schedule_may_differ_and_are_told():
    now = made(max_steps=200, schedule={"name": "wsd", "warmup": 0.1})
    assert check_same(made(), now, [], "runs/x") == []
    assert length_changes(made(), now) == ["max_steps 100 -> 200", "schedule linear -> wsd"]
    assert length_changes(made(), made()) == []


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("seed", "a list"),
        (["sed"], "did you mean seed?"),
        (["model"], "cannot hold model"),
        ([3], "one of"),
        (None, "a"),
    ],
)
def test_what_may_be_allowed_is_checked(names, words):
    with pytest.raises(ConfigError, match=words):
        check_allowed(names)
    check_allowed(["seed", "optimizer"])
