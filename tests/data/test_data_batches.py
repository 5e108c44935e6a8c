"""Batches: the same whatever the workers, ranks and interruptions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_opt.data.batches import BatchLoader, loader
from lightning_opt.data.mixture import Mixture, ValidationWindows
from lightning_opt.data.shards import TokenStream


@pytest.fixture
def mixture(tmp_path: Path) -> Mixture:
    np.arange(4001, dtype=np.uint16).tofile(tmp_path / "a.bin")
    return Mixture({"a": TokenStream([tmp_path / "a.bin"], [4001], "uint16")}, {"a": 1.0}, sequence_length=8, seed=3)


def inputs(batches: BatchLoader) -> list[list[list[int]]]:
    return [batch["input_ids"].tolist() for batch in batches]


def test_batches_hold_the_elements_in_order(mixture: Mixture) -> None:
    batches = list(loader(mixture, batch_size=4, start=10, count=12))
    assert len(batches) == 3
    for b, batch in enumerate(batches):
        for key in ("input_ids", "labels"):
            assert batch[key].dtype == torch.int64
            assert torch.equal(batch[key], torch.stack([mixture[10 + 4 * b + k][key] for k in range(4)]))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("workers", "context"), [(1, "fork"), (4, "fork"), (1, "spawn")])
def test_workers_change_nothing(mixture: Mixture, workers: int, context: str) -> None:
    alone = loader(mixture, batch_size=4, count=46)
    many = loader(mixture, batch_size=4, count=46, num_workers=workers, multiprocessing_context=context)
    first = inputs(alone)
    assert len(first) == len(alone) == 12
    assert inputs(many) == first
    assert inputs(many) == first  # persistent workers start over rightly


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 5, 11, 12])
def test_the_state_is_one_integer_and_resumes_exactly(mixture: Mixture, workers: int, stop: int) -> None:
    whole = inputs(loader(mixture, batch_size=4, count=48))
    first = loader(mixture, batch_size=4, count=48, num_workers=workers)
    iterator = iter(first)
    seen = [next(iterator)["input_ids"].tolist() for _ in range(stop)]
    state = first.state_dict()
    assert state == {"sequences": 4 * stop, "offset": 0}
    second = loader(mixture, batch_size=4, count=48, num_workers=workers)
    second.load_state_dict(state)
    assert len(second) == 12
    assert second.state_dict() == state
    assert seen + inputs(second) == whole
    assert inputs(second) == whole  # the pass after the resumed one is a full one


@pytest.mark.parametrize("world_size", [1, 2])
def test_bad_batches_are_left_out_for_good(mixture: Mixture, world_size: int) -> None:
    """Three batches given, then the elements up to 28 left out, then those up to 52; as a rewind does."""
    of_ranks = []
    for rank in range(world_size):
        split = {"batch_size": 4 // world_size, "count": 40, "rank": rank, "world_size": world_size}
        plain, moved = loader(mixture, **split), loader(mixture, **split, not_before=28)
        for one in (plain, moved):
            one.load_state_dict({"sequences": 12})
        assert (plain.elements(3), moved.elements(3)) == (range(12, 16), range(12, 16))
        iterator = iter(moved)
        seen = [next(iterator)["input_ids"].tolist() for _ in range(2)]
        assert (moved.elements(3), moved.state_dict()) == (range(28, 32), {"sequences": 20, "offset": 16})
        later = loader(mixture, **split, not_before=52)
        later.load_state_dict(moved.state_dict())
        of_ranks.append(seen + inputs(later))
        assert (later.elements(5), len(inputs(plain))) == (range(52, 56), 7)
    rows = [row for ranks in zip(*of_ranks, strict=True) for rank in ranks for row in rank]
    wanted = [*range(28, 36), *range(52, 72)]
    assert rows == [mixture[i]["input_ids"].tolist() for i in wanted]


def test_a_state_of_another_loader_is_refused(mixture: Mixture) -> None:
    with pytest.raises(ValueError, match="sequence 52, this loader has 48"):
        loader(mixture, batch_size=4, count=48).load_state_dict({"sequences": 52})
    with pytest.raises(ValueError, match="sequence 6, is no multiple of 4"):
        loader(mixture, batch_size=4, count=48).load_state_dict({"sequences": 6})


def test_another_split_goes_on_at_the_same_sequence(mixture: Mixture) -> None:
    """Saved by one rank of batches of 8, loaded by two of 2."""
    whole = [row for batch in inputs(loader(mixture, batch_size=8, count=48)) for row in batch]
    first = loader(mixture, batch_size=8, count=48)
    iterator = iter(first)
    for _ in range(3):
        next(iterator)
    ranks = [loader(mixture, batch_size=2, count=48, rank=rank, world_size=2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(first.state_dict())
    parts = [row for pair in zip(*map(inputs, ranks), strict=True) for batch in pair for row in batch]
    assert parts == whole[24:]


def test_batches_of_another_size_go_on_at_the_same_element(mixture: Mixture) -> None:
    """Five batches of 8, then of 4, then of 16 up to the eighth: each begins where the one before it ended."""
    state, given = {"sequences": 0}, []
    for size, before, until in ((8, 0, 5), (4, 5, 7), (16, 7, 8)):
        one = loader(mixture, batch_size=size, count=8 * size)
        one.load_state_dict(state | {"batches": before})
        assert one.elements(before).start == len(given)
        for batch, _ in zip(one, range(before, until), strict=False):
            given += batch["input_ids"].tolist()
            state = one.state_dict()
    assert given == [mixture[i]["input_ids"].tolist() for i in range(5 * 8 + 2 * 4 + 16)]
    assert state == {"sequences": 8 * 16, "offset": 64 - 8 * 16}
    with pytest.raises(ValueError, match="this loader has 64"):
        loader(mixture, batch_size=8, count=64).load_state_dict(state | {"batches": 9})


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_step_sees_the_same_elements_on_any_world_size(mixture: Mixture, world: int) -> None:
    """Global batch of 8 sequences per step, as 1 x 8, 2 x 4 or 4 x 2, with and without accumulation."""
    for micro in (8 // world, max(8 // world // 2, 1)):
        ranks = [
            [batch["input_ids"] for batch in loader(mixture, batch_size=micro, count=32, rank=r, world_size=world)]
            for r in range(world)
        ]
        assert len({len(batches) for batches in ranks}) == 1
        flat = torch.cat([torch.cat(together) for together in zip(*ranks, strict=True)])
        assert torch.equal(flat, torch.stack([mixture[k]["input_ids"] for k in range(32)]))


def test_an_incomplete_last_batch_loses_nothing(tmp_path: Path) -> None:
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "v.bin")
    windows = ValidationWindows(TokenStream([tmp_path / "v.bin"], [100], "uint16"), sequence_length=9, pad_id=0)
    sizes = {}
    for rank in (0, 1):
        batches = loader(windows, batch_size=4, rank=rank, world_size=2)
        sizes[rank] = [len(batch["labels"]) for batch in batches]
        assert len(batches) == len(sizes[rank])
    assert sizes == {0: [4, 3], 1: [4]}
    assert sum(map(sum, sizes.values())) == len(windows) == 11


def test_the_global_random_state_is_left_alone(mixture: Mixture) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    inputs(loader(mixture, batch_size=4, count=16))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"start": -1}, {"count": -1}, {"rank": 2, "world_size": 2}, {"num_workers": -1}]
)
def test_numbers_out_of_range(mixture: Mixture, wrong: dict) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        loader(mixture, **{"batch_size": 2, **wrong})


@pytest.mark.slow
def test_lightning_resumes_in_the_middle_of_a_pass(mixture: Mixture, tmp_path: Path) -> None:
    import lightning.pytorch as pl

    class Record(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.seen: list[list[list[int]]] = []

        def training_step(self, batch: dict, _: int) -> torch.Tensor:
            self.seen.append(batch["input_ids"].tolist())
            return self.weight.sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def run(steps: int, checkpoint: Path | None) -> tuple[pl.Trainer, list]:
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(accelerator="cpu", max_steps=steps, enable_checkpointing=False, **options)
        module = Record()
        trainer.fit(module, loader(mixture, batch_size=4, count=48), ckpt_path=checkpoint)
        return trainer, module.seen

    _, whole = run(12, None)
    trainer, first = run(5, None)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    _, second = run(12, tmp_path / "a.ckpt")
    assert len(whole) == 12
    assert first + second == whole
