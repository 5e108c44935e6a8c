"""Models: shapes, counts, initialisation, loss, checkpointing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from lightning_opt import models
from lightning_opt.plan import ConfigError, HubLost

TINY = {
    "hidden_size": 32,
    "num_layers": 4,
    "num_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
    "context_length": 16,
}


def instantiate(config: dict[str, Any], **more: Any) -> torch.nn.Module:
    """Hydra's job, for the two builders we have."""
    config = {**config, **more}
    return getattr(models, config.pop("_target_").rsplit(".", 1)[1])(**config)


def tiny(**more: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return models.llama(**{**TINY, **more})


@pytest.mark.parametrize(("name", "total"), [("nano", 1_066_112), ("pico", 266_816), ("femto", 134_160)])
def test_presets_have_the_size_they_state(repository: Path, name: str, total: int) -> None:
    config = yaml.safe_load((repository / "conf" / "model" / f"{name}.yaml").read_text())
    config["num_kv_heads"] = config["num_heads"]
    model = models.build(config, vocab_size=config["vocab_size"], instantiate=instantiate)
    layers, hidden, inner = config["num_layers"], config["hidden_size"], config["intermediate_size"]
    in_layers = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    assert in_layers == config["non_embedding_params"] == layers * (3 * hidden * inner + 4 * hidden**2)
    assert sum(p.numel() for p in model.parameters()) == total


def test_the_initialisation_follows_the_width() -> None:
    model = tiny(hidden_size=256, num_heads=4)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert tiny(init=0.02).lm_head.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_loss_is_the_cross_entropy_in_float64() -> None:
    model = tiny()
    ids, labels = torch.randint(0, 64, (2, 16)), torch.randint(0, 64, (2, 16))
    labels[0, :5] = -100
    loss = models.causal_lm_loss(model, ids, labels, z_loss=1e-2)
    logits = model(input_ids=ids).logits.detach().double().numpy().reshape(-1, 64)
    log_z = np.log(np.exp(logits).sum(-1))
    flat = labels.numpy().ravel()
    kept = flat != -100
    nll = (log_z - logits[np.arange(32), np.where(kept, flat, 0)])[kept].mean()
    assert loss.nll.item() == pytest.approx(nll, rel=1e-6)
    assert loss.total.item() == pytest.approx(nll + 1e-2 * (log_z**2)[kept].mean(), rel=1e-6)
    assert not loss.nll.requires_grad
    assert loss.total.requires_grad


def test_labels_are_already_shifted() -> None:
    """Our labels against transformers' own loss, which shifts by itself."""
    model = tiny()
    tokens = torch.randint(0, 64, (3, 17))
    ours = models.causal_lm_loss(model, tokens[:, :-1], tokens[:, 1:]).nll
    logits = model(input_ids=tokens[:, :-1]).logits
    theirs = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:])
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.parametrize("mode", ["full", "every_2"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_checkpointing_changes_no_gradient(mode: str, qk_norm: bool) -> None:
    ids = torch.randint(0, 64, (2, 16))

    def gradients(mode: str) -> tuple[list[torch.Tensor], int]:
        torch.manual_seed(0)
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        config = {
            "_target_": "lightning_opt.models.llama",
            "name": "tiny",
            "activation_checkpointing": mode,
            "qk_norm": qk_norm,
            **TINY,
        }
        model = models.build(config, vocab_size=64, instantiate=instantiate)
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(count)  # the recomputation stops before the layer ends
        models.causal_lm_loss(model, ids, ids).total.backward()
        return [p.grad for p in model.parameters()], calls

    plain, once = gradients("off")
    recomputed, calls = gradients(mode)
    assert once == 4
    assert calls == (8 if mode == "full" else 6)
    for a, b in zip(plain, recomputed, strict=True):
        assert torch.equal(a, b)


def test_a_saved_model_loads_anywhere(tmp_path: Path) -> None:
    for options, kind in (({}, "LlamaForCausalLM"), ({"qk_norm": True}, "Qwen3ForCausalLM")):
        model = tiny(**options).eval()
        model.save_pretrained(tmp_path / kind)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
        assert type(again).__name__ == kind
        ids = torch.arange(8)[None]
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert isinstance(tiny(qk_norm=True), Qwen3ForCausalLM)


def test_continued_training_from_a_folder(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    config = {"_target_": "lightning_opt.models.hf", "name": "hf", "path": str(tmp_path), "context_length": 16}
    assert models.build(config, vocab_size=64, instantiate=instantiate).training
    with pytest.raises(ConfigError, match=r"data\.tokenizer.*64 embeddings"):
        models.build(config, vocab_size=65, instantiate=instantiate)
    with pytest.raises(ConfigError, match=r"model\.context_length = 17: at most 16"):
        models.build({**config, "context_length": 17}, vocab_size=64, instantiate=instantiate)
    with pytest.raises(ConfigError, match=r"model\.path"):
        models.build({**config, "path": str(tmp_path / "none")}, vocab_size=64, instantiate=instantiate)


def test_a_model_on_a_hub_that_is_lost_is_no_mistake_in_the_config() -> None:
    """Switched off here, as in all tests."""
    with pytest.raises(HubLost, match=r"^model\.path = some-org/model: the hub gave up on us .*model\.path=FOLDER"):
        models.hf(path="some-org/model", context_length=8)


def test_a_gated_model_says_how_to_get_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers wraps what the hub said in several lines of its own."""
    from huggingface_hub.errors import GatedRepoError

    def refuse(*_: object, **__: object) -> None:
        raise OSError("You are trying to access\na gated repo.") from GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    how = r"^model\.path = some-org/model: must be open to you.* accept its terms at https://huggingface\.co/some-org/model,"
    with pytest.raises(ConfigError, match=how):
        models.hf(path="some-org/model", context_length=8)


@pytest.mark.parametrize("mode", ["every_0", "sometimes", "every_x"])
def test_an_unknown_checkpointing_mode_is_refused(mode: str) -> None:
    with pytest.raises(ConfigError, match="every_2"):
        models.build(
            {"_target_": "lightning_opt.models.llama", "activation_checkpointing": mode, **TINY},
            vocab_size=64,
            instantiate=instantiate,
        )
