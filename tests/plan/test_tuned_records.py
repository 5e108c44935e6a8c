"""Tuned values: the study's cells against its own published file, and the choice between records."""

import pytest
import yaml

from lightning_opt.plan import RULES, TunedRecord, check_value, tuned, tuned_records
from lightning_opt.plan.values import rule_for


def test_every_value_obeys_its_rule_and_every_record_its_origin():
    assert RULES
    for record in tuned_records():
        assert record.measured in {"ours", "published", "no"}
        assert record.source
        for key, value in record.values.items():
            assert rule_for(key), key
            check_value(key, value)


def test_no_two_records_for_one_cell():
    cells = [(r.optimizer, r.model, scale) for r in tuned_records() for scale in r.scales]
    assert len(cells) == len(set(cells))


def test_a_named_scale_goes_before_any():
    records = [
        TunedRecord("a", "m", ("any",), {"optimizer.lr": 1.0}, "here", "ours"),
        TunedRecord("a", "m", ("2x",), {"optimizer.lr": 2.0}, "here", "ours"),
    ]
    assert tuned("a", "m", "2x", records=records).values == {"optimizer.lr": 2.0}
    assert tuned("a", "m", "1x", records=records).values == {"optimizer.lr": 1.0}
    assert tuned("a", "x", "1x", records=records) is None


def test_the_studys_cells_are_its_own_numbers(shared_data):
    file = shared_data.parent / "reference" / "study" / "tuned_hparams.yaml"
    if not file.exists():
        pytest.skip("the study's file is not here")
    study = yaml.safe_load(file.read_text())["optimizers"]
    checked = 0
    for record in tuned_records():
        if record.measured != "published":
            continue
        size = record.model.removeprefix("llama_").replace("1_2b", "1.2b")
        best = study[record.optimizer]["settings"][f"{size}/{record.scales[0]}"]["best"]
        assert record.values["optimizer.lr"] == best["learning_rate"]
        assert record.values["optimizer.weight_decay"] == best["weight_decay"]
        assert record.values["optimizer.betas"] == [best["beta1"], best["beta2"]]
        assert record.values["schedule.warmup"] == best["warmup"]
        assert record.values["trainer.global_batch_size"] == best["train_batch_size"]
        assert record.values["optimizer.max_grad_norm"] == (best["max_grad_norm"] or None)
        checked += 1
    assert checked == 30
