"""Fields against each other, and what a good configuration amounts to."""

import copy
import json

import pytest

from lightning_opt.plan import ConfigError, check, data_config, normalised

GOOD = {
    "name": "adamw_nano",
    "seed": 1,
    "resume": "auto",
    "model": {
        "_target_": "lightning_opt.models.llama",
        "name": "nano",
        "hidden_size": 128,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 4,
        "intermediate_size": 352,
        "vocab_size": 2048,
        "context_length": 256,
        "non_embedding_params": 802_816,
    },
    "data": {
        "name": "embedded",
        "source": "embedded",
        "path": None,
        "weights": None,
        "sequence_length": 256,
        "tokenizer": {"path": None},
    },
    "optimizer": {
        "name": "adamw",
        "lr": 1e-3,
        "weight_decay": 0.1,
        "betas": [0.9, 0.95],
        "roles": {"default": {"rule": "adamw"}},
    },
    "schedule": {"name": "linear", "warmup": 0.05, "min_ratio": 0.0},
    "scale": {"name": "demo", "tokens": 1_638_400, "chinchilla": None},
    "trainer": {
        "max_steps": None,
        "max_tokens": None,
        "max_epochs": None,
        "global_batch_size": 8,
        "micro_batch_size": None,
        "devices": 1,
        "num_nodes": 1,
        "precision": "auto",
        "val_every_n_steps": None,
    },
    "evaluation": {"suite": "mini"},
}


def changed(**values):
    config = copy.deepcopy(GOOD)
    for path, value in values.items():
        *parents, last = path.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    return config


def test_the_demo():
    plan = check(GOOD)
    assert (plan.max_steps, plan.tokens, plan.tokens_per_step) == (800, 1_638_400, 2048)
    assert (plan.micro_batch_size, plan.accumulate, plan.devices, plan.sequence_length) == (8, 1, 1, 256)
    assert (plan.warmup_steps, plan.val_every_n_steps) == (40, 200)


def test_check_changes_nothing():
    config = copy.deepcopy(GOOD)
    check(config)
    assert config == GOOD


def test_scale_follows_the_shape_not_a_stale_number():
    plan = check(changed(scale={"name": "1x", "tokens": None, "chinchilla": 1.0}, model__num_layers=8))
    assert plan.max_steps == 20 * 2 * 802_816 // 2048


@pytest.mark.parametrize(
    ("trainer", "steps"), [({"max_steps": 7}, 7), ({"max_tokens": 2048 * 9 + 5}, 9), ({"max_tokens": 1e5}, 48)]
)
def test_trainer_says_how_long(trainer, steps):
    plan = check(changed(**{f"trainer__{key}": value for key, value in trainer.items()}))
    assert plan.max_steps == steps
    assert plan.tokens == steps * 2048


def test_epochs_wait_for_the_data():
    config = changed(trainer__max_epochs=2)
    assert check(config).max_steps is None
    assert check(config, sequences=400).max_steps == 100
    assert check(config, sequences=400).warmup_steps == 5


@pytest.mark.parametrize(
    ("changes", "start", "words"),
    [
        ({"optimizer__lr": -1}, "optimizer.lr = -1: ", "> 0"),
        ({"optimizer__roles": {"matrx": {"lr_scale": 2}}}, "optimizer.roles.matrx", "did you mean matrix?"),
        (
            {"optimizer__roles": {"norm": {"weight_decy": 2}}},
            "optimizer.roles.norm.weight_decy = 2",
            "did you mean weight_decay?",
        ),
        ({"optimizer__roles": {"norm": {"lr": -2}}}, "optimizer.roles.norm.lr = -2", "> 0"),
        ({"schedule__warmup": 800}, "schedule.warmup = 800: ", "run of 800 steps"),
        ({"schedule__warmup": 20, "trainer__max_steps": 20}, "schedule.warmup = 20: ", "run of 20 steps"),
        ({"schedule": {"name": "wsd", "warmup": 0.9, "decay": 0.2}}, "schedule.decay = 0.2: ", "at most 0.1"),
        ({"trainer__max_steps": 5, "trainer__max_tokens": 9}, "trainer.max_tokens = 9: ", "trainer.max_steps"),
        (
            {"trainer__max_steps": 5, "scale": {"name": "1x", "tokens": None, "chinchilla": 1.0}},
            "trainer.max_steps = 5: ",
            "scale=demo",
        ),
        ({"trainer__max_steps": 5, "trainer__max_epochs": 1}, "trainer.max_epochs = 1", "trainer.max_steps=null"),
        ({"scale__chinchilla": 1.0}, "scale.tokens = 1638400: ", "scale.chinchilla = 1.0"),
        ({"trainer__devices": 3}, "trainer.global_batch_size = 8: ", "must be a multiple of"),
        ({"trainer__num_nodes": 2}, "trainer.num_nodes = 2: ", "needs torchrun or srun"),
        ({"trainer__strategy": "fdsp"}, "trainer.strategy = fdsp: ", "auto, ddp, fsdp"),
        ({"schedule": {"name": "wsd", "warmup": 0.1, "decay": 0}}, "schedule.decay = 0: ", "> 0"),
        ({"model__vocab_size": 64}, "model.vocab_size = 64: ", ">= 257"),
        ({"data__val_fraction": 0.6}, "data.val_fraction = 0.6: ", "<= 0.5"),
        ({"data__name": None}, "data.name = null: ", "name: mine"),
        ({"data": {"name": "mine"}}, "data.sequence_length = null: ", "${model.context_length}"),
        ({"data": {"name": "mine", "sequence_length": 16}}, "data.source = null: ", "source: prepared"),
        ({"data__path": 5}, "data.path = 5: ", "./5"),
        ({"data__tokenizer": "gpt2"}, "data.tokenizer = gpt2: ", "data.tokenizer.path=gpt2"),
        ({"trainer__max_tokens": 100}, "trainer.max_tokens = 100: ", "2048"),
        (
            {"trainer__global_batch_size": 9, "trainer__micro_batch_size": 2},
            "trainer.global_batch_size = 9: ",
            "8 or 10",
        ),
        ({"model__num_heads": 5}, "model.num_heads = 5: ", "4 or 8"),
        ({"model__num_heads": 128, "model__num_kv_heads": None}, "model.num_heads = 128: ", "even"),
        ({"model__num_kv_heads": 3}, "model.num_kv_heads = 3: ", "num_heads = 4"),
        ({"data__sequence_length": 512}, "data.sequence_length = 512: ", "256"),
        ({"data__source": "files"}, "data.path = null: ", "data.path="),
        ({"data__weights": {"web": -1}}, "data.weights.web = -1: ", ">= 0"),
        ({"name": "../up"}, "name = ../up: ", "folder"),
        ({"name": "a b"}, "name = 'a b': ", "folder"),
        ({"model": {"name": "hf", "path": None}}, "model.path = null: ", "folder"),
        ({"model": {"name": "hf", "path": "./nope"}}, "model.path = ./nope: ", "not found"),
        (
            {"model": {"name": "hf", "path": "a/b"}, "scale": {"name": "1x", "tokens": None, "chinchilla": 1.0}},
            "scale.chinchilla = 1.0: ",
            "max_tokens",
        ),
    ],
)
def test_contradictions(changes, start, words):
    with pytest.raises(ConfigError) as caught:
        check(changed(**changes))
    text = str(caught.value)
    assert text.startswith(start)
    assert words in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer__max_grad_norm": 1.0}, "optimizer.max_grad_norm must be null"),
        ({"optimizer__roles": {"norm": {"max_grad_norm": 1.0}}}, "optimizer.roles.norm.max_grad_norm must be null"),
        ({"trainer__micro_batch_size": 4}, "one of 2 parts"),
        ({"trainer__devices": 2}, "one device only"),
        ({"callbacks": {"guard": {"_target_": "lightning_opt.callbacks.LossGuard"}}}, "~callbacks.guard"),
        ({"optimizer__phases": {"first": {"rule": "lion"}}}, "phases"),
    ],
)
def test_what_an_update_in_the_backward_pass_cannot_be_had_with(changes, words):
    check(changed(trainer__update_in_backward="on"))
    check(changed(**changes))
    with pytest.raises(ConfigError, match=words) as caught:
        check(changed(trainer__update_in_backward="on", **changes))
    assert str(caught.value).startswith("trainer.update_in_backward = on: ")
    assert "\n" not in str(caught.value)
    if "max_grad_norm" in words:
        check(changed(trainer__update_in_backward="clip_each", **changes))


def test_missing_path_names_the_closest_entry(tmp_path):
    (tmp_path / "my_texts").mkdir()
    with pytest.raises(ConfigError, match=r"did you mean .*my_texts"):
        check(changed(data__source="files", data__path=str(tmp_path / "my_text")))


def test_callbacks_keywords_are_not_ours_to_judge():
    check(changed(callbacks={"mine": {"_target_": "x.Y", "lr": "high", "seed": "no"}}))


def test_whole_numbers_become_whole_whatever_they_were_written_as():
    odd = changed(trainer__global_batch_size=8.0, trainer__devices=1.0, scale__tokens=1.6384e6, data__weights={"a": 1})
    even = changed(trainer__global_batch_size=8, trainer__devices=1, scale__tokens=1638400, data__weights={"a": 1.0})
    assert json.dumps(normalised(odd)) == json.dumps(normalised(even))
    assert normalised(odd)["optimizer"]["betas"] == [0.9, 0.95]
    mine = {"_target_": "x.Y", "lr": "high", "compile": 3}
    assert normalised(changed(callbacks={"mine": mine}))["callbacks"]["mine"] == mine


class TestGivenModel:
    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "config.json").write_text('{"max_position_embeddings": 128}')
        return tmp_path

    def config(self, path, length=128):
        model = {"_target_": "lightning_opt.models.hf", "name": "hf", "path": str(path), "context_length": length}
        return changed(model=model, data__sequence_length=length)

    def test_a_tokenizer_of_the_models_size_is_no_larger_than_its_text_can_teach(self):
        for size, made in ((128256, 16384), (16384, 16384), (20000, 20000)):
            config = changed(model={**GOOD["model"], "vocab_size": 128256 if made == 16384 else 300})
            config["data"] = {**config["data"], "tokenizer": {"path": None, "vocab_size": size}}
            assert data_config(config)["tokenizer"]["vocab_size"] == made

    def test_its_tokenizer_is_used_unless_another_is_given(self, folder):
        assert data_config(self.config(folder))["tokenizer"]["path"] == str(folder)
        assert data_config(self.config("org/name"))["tokenizer"]["path"] == "org/name"
        given = self.config(folder)
        given["data"]["tokenizer"]["path"] = "mine.json"
        assert data_config(given) == given["data"]
        assert data_config(GOOD) == GOOD["data"]

    def test_it_is_not_asked_for_more_than_it_was_made_for(self, folder):
        check(self.config(folder))
        with pytest.raises(ConfigError, match=r"^model\.context_length = 256: must be at most 128"):
            check(self.config(folder, 256))

    def test_a_folder_without_a_model(self, tmp_path):
        with pytest.raises(ConfigError, match=r"^model\.path = .*config\.json is missing"):
            check(self.config(tmp_path))

    def test_a_path_into_a_folder_that_is_here_is_no_hub_id(self, folder, monkeypatch):
        monkeypatch.chdir(folder)
        (folder / "models").mkdir()
        check(self.config("hub/name"))
        with pytest.raises(ConfigError, match=r"^model\.path = models/name: not found"):
            check(self.config("models/name"))


def test_processes_that_nobody_we_know_started(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"^WORLD_SIZE = 2: is set, but not by torchrun or srun"):
        check(GOOD)
    monkeypatch.setenv("WORLD_SIZE", "1")
    check(GOOD)
