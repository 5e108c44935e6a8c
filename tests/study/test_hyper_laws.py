"""Laws of hyperparameters against the study's stored predictions, and of the loss against a law that is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lightning_opt.study import JointLaw, Tuned, fit_hyper_law, fit_joint_law, non_embedding
from lightning_opt.study.laws import NotEnoughCells
from lightning_opt.study.results import Cell

LABELS, RATIOS = ("130m", "300m", "520m"), (1.0, 2.0, 4.0, 8.0)
SETTINGS = [(label, ratio) for label in LABELS for ratio in RATIOS]


@pytest.fixture(scope="module")
def refitted(recorded: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The laws that go with the recorded data, as somebody else fitted them."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    held = yaml.load((recorded / "tuned_hparams.yaml").read_text(), Loader=loader)
    return held["hparam_scaling_law"]["coefficients_refit"]


@pytest.mark.parametrize("optimizer", ["adamw", "nadamw", "muon", "soap"])
def test_predictions_at_1_2b_are_the_studys(optimizer: str, tuned: Tuned, refitted: dict) -> None:
    """Of every hyperparameter that has a law: from the tuned values at 130M to 520M, at four ratios of data."""
    checked = 0
    for name, stored in refitted[optimizer].items():
        if "pred_1.2b_1_2_4_8x" not in stored:
            continue
        values = [tuned.best[Cell(optimizer, *setting)][name] for setting in SETTINGS]
        assert values == stored["observed_12"]
        law = fit_hyper_law(*zip(*((non_embedding(label), ratio) for label, ratio in SETTINGS), strict=True), values)
        found = [law(non_embedding("1.2b"), ratio) for ratio in RATIOS]
        assert found == pytest.approx(stored["pred_1.2b_1_2_4_8x"], rel=5e-3)
        assert law.held_out == pytest.approx(stored["heldout_520m_8x_rel_err"], rel=0.02, abs=1e-4)
        for ratio, value in zip(RATIOS, found, strict=True):
            published = tuned.predicted.get(Cell(optimizer, "1.2b", ratio), {}).get(name)
            assert published is None or value == pytest.approx(published, rel=5e-3)
        checked += 1
    assert checked >= 2


def test_the_papers_form_is_the_same_law() -> None:
    sizes, ratios = zip(*((size, ratio) for size in (1e8, 3e8, 1e9) for ratio in RATIOS), strict=True)
    values = [0.5 * size**-0.3 * ratio**-0.1 + 1e-4 for size, ratio in zip(sizes, ratios, strict=True)]
    law = fit_hyper_law(sizes, ratios, values)
    alpha, by_size, by_tokens, beta = law.by_tokens
    for size, ratio, value in zip(sizes, ratios, values, strict=True):
        assert law(size, ratio) == pytest.approx(value, rel=1e-3)
        tokens = 20 * size * ratio
        assert alpha * size**-by_size * tokens**-by_tokens + beta == pytest.approx(law(size, ratio))
    assert law.held_out < 1e-3
    assert law.points == tuple(zip(sizes, ratios, values, strict=True))


def test_one_value_is_a_constant() -> None:
    law = fit_hyper_law(*zip(*((non_embedding(label), ratio) for label, ratio in SETTINGS), strict=True), [0.1] * 12)
    assert law(1e12, 100) == 0.1
    assert law.held_out == 0


def test_too_few_settings() -> None:
    with pytest.raises(NotEnoughCells):
        fit_hyper_law([1e8] * 4, RATIOS, [1, 2, 3, 4])
    with pytest.raises(NotEnoughCells, match="3 model sizes"):
        fit_joint_law([1e8] * 4 + [3e8] * 4, RATIOS * 2, np.linspace(3.5, 3, 8))
    with pytest.raises(NotEnoughCells, match="2 ratios"):
        fit_joint_law(np.geomspace(1e8, 1e9, 6), [1.0] * 6, np.linspace(3.5, 3, 6))


def test_the_joint_law_is_found() -> None:
    """Chinchilla's own numbers (arXiv 2203.15556, equation 10), without noise."""
    truth = JointLaw(1.69, 406.4, 0.34, 410.7, 0.28, 1.0, 1.0, 0.0, 0)
    cells = [(size, ratio) for size in (1e8, 3e8, 1e9) for ratio in RATIOS]
    losses = [truth(size, 20 * size * ratio) for size, ratio in cells]
    law = fit_joint_law(*zip(*cells, strict=True), losses)
    assert (law.size_exponent, law.tokens_exponent) == pytest.approx((0.34, 0.28), abs=2e-3)
    assert law.floor == pytest.approx(1.69, abs=0.02)
    assert law.error < 1e-6
    assert law(7e10, 1.4e12) == pytest.approx(truth(7e10, 1.4e12), rel=2e-3)
