"""Schedules against closed forms and against torch's and transformers' schedulers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_opt.optim import schedules
from lightning_opt.plan import ConfigError


def curve(max_steps, **config):
    multiplier = schedules.build(config, max_steps)
    return [multiplier(k) for k in range(max_steps)]


def test_closed_forms():
    assert curve(5, name="constant", warmup=2) == [0.5, 1.0, 1.0, 1.0, 1.0]
    assert curve(6, name="linear", warmup=2) == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.4, 0.2])
    assert curve(6, name="linear", warmup=2, min_ratio=0.5) == pytest.approx([0.5, 1.0, 0.9, 0.8, 0.7, 0.6])
    assert curve(4, name="cosine", warmup=0) == pytest.approx(
        [(1 + math.cos(math.pi * k / 5)) / 2 for k in (1, 2, 3, 4)]
    )
    assert curve(10, name="wsd", warmup=0.2, decay=0.3) == pytest.approx([0.5, *[1.0] * 6, 0.75, 0.5, 0.25])
    assert curve(1, name="linear", warmup=0.0) == [0.5]
    assert curve(1, name="linear", warmup=1) == [1.0]


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_equal_to_transformers_one_step_on(name):
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

    make = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}[name]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    theirs = make(optimizer, 7, 41)
    rates = []
    for _ in range(41):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert curve(40, name=name, warmup=7) == pytest.approx(rates[1:], abs=1e-12)


def test_equal_to_torch_cosine_annealing():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=31, eta_min=0.1)
    rates = []
    for _ in range(30):
        optimizer.step()
        theirs.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert curve(30, name="cosine", warmup=0, min_ratio=0.1) == pytest.approx(rates, abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(sorted(schedules.SHAPES)),
    total=st.integers(1, 500),
    warmup=st.one_of(st.floats(0, 0.99), st.integers(1, 500)),
    floor=st.floats(0, 1),
    decay=st.one_of(st.floats(0.01, 0.99), st.integers(1, 500)),
)
def test_every_schedule_rises_to_the_peak_never_rises_again_and_arrives_at_the_floor(name, total, warmup, floor, decay):
    steps = schedules.steps_of(warmup, total)
    if steps > total:
        with pytest.raises(ConfigError, match="warmup"):
            schedules.build({"name": name, "warmup": warmup}, total)
        return
    rates = curve(total, name=name, warmup=warmup, min_ratio=floor, decay=decay)
    assert all(0 <= rate <= 1 + 1e-12 for rate in rates)
    if steps:
        assert rates[0] == pytest.approx(1 / steps)
        assert rates[steps - 1] == 1.0
    falling = rates[max(steps - 1, 0) :]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(falling))
    if name != "constant" and steps < total and not (name == "wsd" and schedules.steps_of(decay, total) == 0):
        beyond = schedules.build({"name": name, "warmup": warmup, "min_ratio": floor, "decay": decay}, total)
        assert beyond(total) == beyond(total + 7) == pytest.approx(floor, abs=1e-12)
        assert floor > 0.999 or rates[-1] > floor
    assert schedules.build({"name": name, "warmup": warmup, "min_ratio": floor}, total)(total + 7) >= 0


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"name": "lineer"}, "linear"),
        ({"name": "linear", "warmp": 3}, "warmup"),
        ({"name": "linear", "warmup": 11}, "10 steps"),
        ({"name": "linear", "warmup": -0.1}, "warmup"),
        ({"name": "cosine", "min_ratio": 2.0}, "min_ratio"),
    ],
)
def test_refused(config, words):
    with pytest.raises(ConfigError, match=words) as error:
        schedules.build(config, 10)
    assert "\n" not in str(error.value)


def test_every_yaml_builds(repository):
    folder = repository / "conf" / "schedule"
    files = sorted(set(folder.glob("*.yaml")) - {folder / "auto.yaml", folder / "flat.yaml"})  # which stand for others
    assert [file.stem for file in files] == sorted(schedules.SHAPES)
    for file in files:
        config = yaml.safe_load(file.read_text())
        assert config["name"] == file.stem
        assert schedules.build(config, 100)(4) == 1.0
