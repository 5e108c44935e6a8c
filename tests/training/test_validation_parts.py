"""Parts of the validation text: what chose a setting does not report it, and reports do not mix the two."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lightning_opt.plan import ConfigError, check_value
from lightning_opt.reports.jobs import Job
from lightning_opt.reports.ranking import groups
from lightning_opt.reports.reading import Run
from lightning_opt.run_folder import config_hash
from lightning_opt.training import TokenDataModule


def sequences(module: TokenDataModule) -> dict[str, list[int]]:
    return {name: [dataset[i] for i in range(len(dataset))] for name, dataset in module.val.items()}


def module(part: str, count: int, val: dict) -> TokenDataModule:
    return TokenDataModule([0], val, micro_batch_size=1, micro_batches=1, val_sequences=count, val_part=part)


@pytest.mark.parametrize("count", [1, 3, 100])
def test_the_two_parts_share_no_sequence_and_make_up_the_whole(count):
    val = {"prose": list(range(7)), "code": list(range(100, 110))}
    tuning, reporting, both = (sequences(module(part, count, val)) for part in ("tuning", "reporting", "all"))
    for name in val:
        assert tuning[name]
        assert not set(tuning[name]) & set(reporting[name])
        if count == 100:
            assert sorted(tuning[name] + reporting[name]) == both[name] == val[name]


def test_a_text_too_short_to_be_parted_is_refused():
    val = {"prose": [1]}
    assert sequences(module("all", 4, val)) == {"prose": [1]}
    with pytest.raises(ConfigError, match=r"^trainer.val_part = tuning: .*prose has 1"):
        module("tuning", 4, val)


def test_the_part_is_one_of_three_and_makes_another_run():
    assert check_value("trainer.val_part", "reporting") == "reporting"
    with pytest.raises(ConfigError, match="must be one of all, tuning, reporting"):
        check_value("trainer.val_part", "test")
    hashes = {config_hash({"trainer": {"val_part": part}}) for part in ("all", "tuning", "reporting")}
    assert len(hashes) == 3


def test_runs_on_different_parts_are_not_ranked_together(tmp_path):
    def job(part: str | None) -> Job:
        trainer = {} if part is None else {"val_part": part}
        return Job(tmp_path, Run(tmp_path, config={"trainer": trainer}, plan={"model": "femto"}))

    assert len(groups([job("all"), job(None)])[0]) == 1  # runs from before there were parts
    found, _ = groups([job("tuning"), job("reporting"), job("tuning")])
    assert [(dict(group.facts), len(group.jobs)) for group in found] == [
        ({"validation part": "tuning"}, 2),
        ({"validation part": "reporting"}, 1),
    ]


def test_a_run_gets_the_part_that_it_asks_for():
    from lightning_opt.job import pieces

    data = SimpleNamespace(train=[0], val={"prose": list(range(6))})
    plan = SimpleNamespace(micro_batch_size=1, max_steps=1, accumulate=1)
    trainer = {"val_sequences": 8, "val_part": "reporting", "overfit_batches": 0}
    built = pieces.batches({"trainer": trainer, "data": {"num_workers": 0}}, plan, data)
    assert sequences(built) == {"prose": [1, 3, 5]}
