"""The study's models and GPT-2: sizes on the meta device, initialisation by its statistics, the loss at step 0."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_opt import anatomy, models
from lightning_opt.plan import flops_per_token
from lightning_opt.plan.flops import non_embedding_params

# Non-embedding and total parameters: study.md section 1 for Llama, the released checkpoint for GPT-2.
SIZES = {
    "llama_130m": (134_217_728, 265_585_152),
    "llama_300m": (301_989_888, 499_041_024),
    "llama_520m": (536_870_912, 799_605_760),
    "llama_1_2b": (1_207_959_552, 1_602_061_824),
    "gpt2_124m": (84_934_656, 124_439_808),
}
CUT = math.sqrt(1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / math.sqrt(2)))  # of a normal cut at 3


def preset(repository: Path, name: str, **more: Any) -> nn.Module:
    config = yaml.safe_load((repository / "conf" / "model" / f"{name}.yaml").read_text())
    if "num_kv_heads" in config:
        config["num_kv_heads"] = None

    def instantiate(given: dict[str, Any]) -> nn.Module:
        return getattr(models, given.pop("_target_").rsplit(".", 1)[1])(**given)

    config |= more
    return models.build(config, vocab_size=config["vocab_size"], instantiate=instantiate)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_the_published_ones(repository: Path, name: str) -> None:
    with torch.device("meta"):
        model = preset(repository, name)
    counted, stated = anatomy.describe(model), yaml.safe_load((repository / f"conf/model/{name}.yaml").read_text())
    assert (counted.non_embedding, counted.total) == SIZES[name]
    assert stated["non_embedding_params"] == SIZES[name][0]
    assert counted.total == counted.active == sum(p.numel() for p in model.parameters())
    roles = {info.name.rpartition("layers.")[2].rpartition("h.")[2]: info.role for info in counted.parameters}
    if name == "gpt2_124m":
        assert roles["0.attn.c_attn.weight"] == roles["11.mlp.c_proj.weight"] == "matrix"  # Conv1D: (in, out)
        assert {role for key, role in roles.items() if "wte" in key or "wpe" in key} == {"embedding"}
        assert "head" not in roles.values()
    else:
        assert model.config.head_dim == 64
        assert roles["lm_head.weight"] == "head"
        assert roles["model.embed_tokens.weight"] == "embedding"
        assert set(roles.values()) == {"matrix", "norm", "head", "embedding"}


def test_the_studys_initialisation(repository: Path) -> None:
    torch.manual_seed(0)
    model = preset(repository, "llama_130m", num_layers=2, vocab_size=4096)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    checked = 0
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            fan_in = module.weight.shape[1]
            sigma = fan_in**-0.5 if isinstance(module, nn.Linear) else 1 / fan_in
            ratio = module.weight.detach().double() / sigma
            assert ratio.std().item() == pytest.approx(CUT, rel=0.005)
            assert abs(ratio.mean().item()) < 0.01
            assert 2.95 < ratio.abs().max() <= 3 + 1e-6
            assert (ratio.abs() > 2).double().mean().item() == pytest.approx(0.0429, abs=0.002)  # the tails' share
            checked += 1
        elif module.__class__.__name__ == "LlamaRMSNorm":
            assert (module.weight == 1).all()
    assert checked == 2 * 7 + 2
    tied = preset(repository, "llama_130m", num_layers=1, vocab_size=4096, tie_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_the_loss_before_training_is_that_of_the_studys_log(repository: Path) -> None:
    """12.213 in the log of their 130M; ln V + var/2 for unit states and a head of that variance."""
    torch.manual_seed(0)
    model = preset(repository, "llama_130m", num_layers=4)
    assert anatomy.describe(model).total > 140e6
    ids = torch.randint(128256, (1, 129))
    with torch.no_grad():
        loss = models.causal_lm_loss(model, ids[:, :-1], ids[:, 1:]).nll.item()
    assert loss == pytest.approx(math.log(128256) + CUT**2 / 2, abs=0.12)
    assert loss == pytest.approx(12.213, abs=0.15)


def test_gpt2_is_initialised_as_gpt2(repository: Path) -> None:
    torch.manual_seed(0)
    model = preset(repository, "gpt2_124m", num_layers=8, hidden_size=128, num_heads=2, vocab_size=1024)
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert parameter.std().item() == pytest.approx(0.02 / math.sqrt(2 * 8), rel=0.03)
        elif parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.03)
        else:
            assert (parameter == (1 if name.endswith("weight") else 0)).all()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(module.p == 0 for module in model.modules() if isinstance(module, nn.Dropout))


def test_flops_of_gpt2_against_torchs_counter() -> None:
    model = models.gpt2(hidden_size=64, num_layers=3, num_heads=4, vocab_size=96, context_length=32)
    model.set_attn_implementation("eager")
    tokens = torch.randint(96, (2, 32))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    params = non_embedding_params(3, 64, 256, 4, mlp_matrices=2)
    assert params == anatomy.describe(model).non_embedding
    assert counter.get_total_flops() / tokens.numel() == pytest.approx(flops_per_token(params, 3, 64, 32, 96), rel=1e-3)


def test_another_vocabulary_than_the_stated_one_is_told(repository: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = {"_target_": "x", "vocab_size": 128256}
    with caplog.at_level("INFO", "lightning_opt.models"):
        models.build(config, vocab_size=99, instantiate=lambda given: nn.Embedding(given["vocab_size"], 2))
    assert "99 rows" in caplog.text
    assert "data.tokenizer.path" in caplog.text
