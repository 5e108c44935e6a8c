"""What an optimizer's settings amount to is known without torch: rules, phases, schedule, signals."""

import copy

import pytest
from test_config_checks import changed

from lightning_opt.plan import ConfigError, check, read_roles, settings

PHASES = {"a": {"rule": "lion", "until": 0.5}, "b": {"rule": "adamw"}}
SIGNALS = {"signals": {"_target_": "lightning_opt.callbacks.OptimizerSignals"}}
COMMON = {"lr": 1e-3, "weight_decay": 0.1}


def with_optimizer(callbacks=SIGNALS, **values):
    config = changed(callbacks=callbacks)
    config["optimizer"] = copy.deepcopy({**COMMON, **values})
    return config


@pytest.mark.parametrize(
    ("optimizer", "start", "words"),
    [
        ({"name": "lionn"}, "optimizer.roles.default.rule = lionn: ", "did you mean lion?"),
        ({"name": "lion", "eps": 1e-8}, "optimizer.eps = ", "must be one of betas"),
        (
            {"name": "lion", "roles": {"norm": {"ns_steps": 3}}},
            "optimizer.roles.norm.ns_steps = 3: ",
            "must be one of betas",
        ),
        ({"name": "lion", "roles": {"head": 3}}, "optimizer.roles.head = 3: ", "must be a map"),
        ({"name": "ademamix", "alpha": -1}, "optimizer.alpha = -1: ", ">= 0"),
        ({"name": "ademamix", "alpha_warmup": 0}, "optimizer.alpha_warmup = 0: ", "fraction of the run (> 0"),
        ({"name": "soap", "state_dtype": "int8"}, "optimizer.state_dtype = int8: ", "soap has float32 and bfloat16"),
        (
            {"name": "lion", "roles": {"default": {"rule": "lion"}, "head": {"rule": "adopt", "state_dtype": "int8"}}},
            "optimizer.roles.head.state_dtype = int8: ",
            "adopt has float32 and bfloat16",
        ),
        ({"name": "lion", "implementation": "fused"}, "optimizer.implementation = fused: ", "eager, foreach, compiled"),
        ({"name": "muon"}, "optimizer.roles.default.rule = muon: ", "give optimizer.roles.norm a rule of its own"),
        (
            {"name": "schedule_free_adamw", "roles": {"default": {"rule": "schedule_free_adamw", "cautious": True}}},
            "optimizer.roles.default.cautious = true: ",
            "writes its weights itself: false",
        ),
        ({"name": "schedule_free_adamw"}, "schedule = linear: ", "schedule=flat"),
        ({"name": "phased", "phases": {}}, "optimizer.phases = ", "must have a phase"),
        (
            {"name": "phased", "phases": {**PHASES, "b": {"rul": "adamw"}}},
            "optimizer.phases.b = ",
            "did you mean rule by rul?",
        ),
        ({"name": "phased", "phases": {**PHASES, "b": {"until": 3}}}, "optimizer.phases.b = ", "must name its rule"),
        (
            {"name": "phased", "phases": {**PHASES, "b": {"rule": "adamv"}}},
            "optimizer.phases.b.rule = adamv: ",
            "did you mean adam",
        ),
        (
            {"name": "phased", "phases": {**PHASES, "b": {"rule": "adamw", "beta": 3}}},
            "optimizer.phases.b.beta = 3: ",
            "did you mean betas?",
        ),
        ({"name": "phased", "phases": {**PHASES, "c": {"rule": "lion"}}}, "optimizer.phases.b.until = null: ", "ends"),
        (
            {"name": "phased", "phases": {"a": PHASES["a"], "b": {"rule": "sgd", "until": 300}, "c": {"rule": "lion"}}},
            "optimizer.phases.b.until = 300: ",
            "must be later than 400, where a ends",
        ),
        (
            {"name": "phased", "phases": {**PHASES, "b": {"rule": "sgd"}}, "state_dtype": "int8"},
            "optimizer.state_dtype = int8: ",
            "sgd has float32 and bfloat16",
        ),
        (
            {"name": "phased", "phases": {**PHASES, "b": {"rule": "muon"}}},
            "optimizer.phases.b.rule = muon: ",
            "matrices",
        ),
        (
            {"name": "phased", "phases": {**PHASES, "b": {"rule": "schedule_free_adamw"}}},
            "schedule = linear: ",
            "schedule=flat",
        ),
        ({"name": "phased", "phases": PHASES, "ns_steps": 3}, "optimizer.ns_steps = 3: ", "must be one of"),
        ({"name": "phased", "phases": PHASES, "callbacks": {}}, "optimizer = phased: ", "needs run_length"),
        (
            {"name": "dynamic", "phases": {"a": {"rule": "lion"}}, "signal": "loss_volatility"},
            "optimizer.phases = [a]: ",
            "must be two",
        ),
        (
            {"name": "dynamic", "phases": {**PHASES}, "signal": "loss_volatility"},
            "optimizer.phases.a.until = 0.5: ",
            "no end",
        ),
        (
            {
                "name": "dynamic",
                "phases": {"a": {"rule": "lion"}, "b": {"rule": "adamw"}},
                "signal": "loss_volatility",
                "callbacks": {},
            },
            "optimizer = dynamic: ",
            "needs loss_volatility: the callback OptimizerSignals",
        ),
        ({"name": "sophia", "callbacks": {}}, "optimizer = sophia: ", "needs hessian_diagonal"),
        ({"name": "ademamix", "alpha_warmup": 0.9, "callbacks": {}}, "optimizer = ademamix: ", "needs run_length"),
    ],
)
def test_refused_in_one_line(optimizer, start, words):
    with pytest.raises(ConfigError) as caught:
        check(with_optimizer(**optimizer))
    text = str(caught.value)
    assert text.startswith(start)
    assert words in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "lion", "state_dtype": "int8"},
        {
            "name": "muon",
            "roles": {"default": {"rule": "adamw"}, "matrix": {"rule": "muon"}},
            "implementation": "eager",
        },
        {
            "name": "phased",
            "phases": {**PHASES, "c": None},
            "roles": {"norm": {"rule": "sgd"}, "head": {"betas": [0, 0]}},
        },
        {
            "name": "phased",
            "phases": {**PHASES, "b": {"rule": "muon"}},
            "roles": {"norm": {"rule": "lion"}, "bias": {"rule": "lion"}},
        },
        {"name": "ademamix", "alpha_warmup": 0.9, "beta3_warmup": None},
        {"name": "sophia", "callbacks": {"theirs": {"_target_": "their.Own"}}},
        {"name": "lion", "callbacks": {}},
    ],
)
def test_right_ones_pass(optimizer):
    check(with_optimizer(**optimizer))


def test_an_order_that_only_the_length_of_the_run_tells():
    phases = {"a": {"rule": "lion", "until": 0.5}, "b": {"rule": "sgd", "until": 300}, "c": {"rule": "lion"}}
    config = with_optimizer(name="phased", phases=phases)
    config["scale"]["tokens"] = 2048 * 500  # half of it is step 250
    check(config)


def test_settings_of_a_role_are_the_top_levels_under_its_own():
    config = {
        "name": "lion", "lr": 1e-3, "lr_scale": 2.0, "weight_decay": 0.1, "eps": 1e-6, "cautious": True,
        "roles": {"default": {"rule": "adamw", "lr_scale": 0.5}, "matrix": {"rule": "lion"}, "norm": {"lr": 0.5}},
    }  # fmt: skip
    entries = read_roles(config)
    assert settings(config, entries, "matrix") == {"rule": "lion", "lr": 2e-3, "weight_decay": 0.1, "cautious": True}
    rest = {"rule": "adamw", "weight_decay": 0.1, "eps": 1e-6, "cautious": True}
    assert settings(config, entries, "bias") == {**rest, "lr": 1e-3}
    assert settings(config, entries, "norm") == {**rest, "lr": 0.5}  # its own rate, times both scales
