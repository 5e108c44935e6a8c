"""The study's recorded numbers, which developers have beside the checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_opt.study import Results, Tuned, read_results, read_tuned


@pytest.fixture(scope="session")
def recorded(shared_data: Path) -> Path:
    """The folder of recorded tables."""
    folder = shared_data.parent / "reference" / "study"
    if not folder.is_dir():
        pytest.skip("the study's recorded numbers are not here")
    return folder


@pytest.fixture(scope="session")
def published(recorded: Path) -> Results:
    """The published losses at 130M and 300M."""
    return read_results(recorded / "results.csv")


@pytest.fixture(scope="session")
def tuned(recorded: Path) -> Tuned:
    """The published tuned configurations."""
    return read_tuned(recorded / "tuned_hparams.yaml")
