"""An expert without tokens drifts under rules that see no size, fades out under AdamW, and rests where it is asked to.

Measured before by somebody else (see `benchmarks.idle_experts`): AdamW (0.9, 0.95) 0.43, 0.20 and 0.018 of its usual
step 10, 20 and 50 steps later, 12.5 steps of drift in all; Lion and Muon all of it for ever.
"""

from __future__ import annotations

import pytest

from benchmarks.idle_experts import drift, trained


def test_adamws_steps_fade():
    moved = drift("adamw")
    assert [moved[k - 1] for k in (10, 20, 50)] == pytest.approx([0.43, 0.20, 0.018], rel=0.1)
    assert sum(moved) == pytest.approx(12.5, rel=0.1)


@pytest.mark.parametrize("rule", ["lion", "muon"])
def test_lions_and_muons_do_not(rule):
    moved = drift(rule, steps=60)
    assert min(moved) > 0.98
    assert sum(moved) == pytest.approx(60, rel=0.02)


@pytest.mark.parametrize("rule", ["adamw", "lion", "muon", "soap", "kron"])
def test_at_rest_none_moves_at_all(rule):
    assert drift(rule, steps=20, sparse_experts=1) == [0.0] * 20


def test_the_toy_is_learnt():
    """Else the comparison would say nothing: no expert's error is above that of answering nothing."""
    before, after = (trained("adamw", {}, lr, seed=0, steps=60) for lr in (1e-9, 2e-2))
    assert after[0] < 0.2 * before[0]
    assert after[2] < before[2]
