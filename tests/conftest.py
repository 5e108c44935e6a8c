"""Fixtures every room's tests share."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_DATA = Path(os.environ.get("LIGHTNING_OPT_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))

# No hub in tests: whatever tries the network must fail at once, not after retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Several workers side by side: with as many threads each as there are cores they would mostly wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's root."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Small real data that developers have beside the checkout; users do not, so tests that need it skip."""
    if not SHARED_DATA.is_dir():
        pytest.skip("real data not found: set LIGHTNING_OPT_SHARED_DATA to the developers' shared/data folder")
    return SHARED_DATA


@pytest.fixture(scope="session")
def forks() -> BaseContext:
    """Makes processes that are forked from one that has loaded what takes seconds: tests wait for that once."""
    import multiprocessing

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning.pytorch", "torch.distributed.fsdp", "transformers.models.llama"])
    return context


@pytest.fixture(scope="session")
def on_two_ranks(forks: BaseContext) -> Callable[..., None]:
    """``on_two_ranks(function, *arguments)`` calls ``function(rank, *arguments)`` in two processes."""
    from torch.multiprocessing import start_processes

    return lambda function, *arguments: start_processes(function, arguments, nprocs=2, start_method="forkserver")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests skip where torch sees no GPU."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
