"""A folder in GLM-4.5-Air's own key layout: loads for continued training and exports back; its maths by hand."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lightning_opt import anatomy, models, optim
from lightning_opt.callbacks import Export

# Keys as in config.json of zai-org/GLM-4.5-Air; 46 layers as there, all widths tiny.
LAYERS, HIDDEN, HEADS, KV, HEAD, EXPERTS, TOP_K, INNER, WIDTH, VOCABULARY = 46, 16, 6, 2, 8, 4, 2, 24, 8, 61
CONFIG = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": [1, 2],
    "first_k_dense_replace": 1,
    "head_dim": HEAD,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": INNER,
    "max_position_embeddings": 64,
    "model_type": "glm4_moe",
    "moe_intermediate_size": WIDTH,
    "n_group": 1,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": HEADS,
    "num_experts_per_tok": TOP_K,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_qk_norm": False,
    "vocab_size": VOCABULARY,
}


def layer_shapes(number: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer as published; the one after the last predicts a further token (MTP)."""
    at = f"model.layers.{number}"
    shapes: dict[str, tuple[int, ...]] = {
        f"{at}.input_layernorm.weight": (HIDDEN,),
        f"{at}.post_attention_layernorm.weight": (HIDDEN,),
        f"{at}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD),
    }
    for name, heads in (("q", HEADS), ("k", KV), ("v", KV)):
        shapes[f"{at}.self_attn.{name}_proj.weight"] = (heads * HEAD, HIDDEN)
        shapes[f"{at}.self_attn.{name}_proj.bias"] = (heads * HEAD,)
    mlps = {f"{at}.mlp": INNER}
    if number:
        mlps = {f"{at}.mlp.experts.{expert}": WIDTH for expert in range(EXPERTS)}
        mlps[f"{at}.mlp.shared_experts"] = WIDTH
        shapes[f"{at}.mlp.gate.weight"] = (EXPERTS, HIDDEN)
        shapes[f"{at}.mlp.gate.e_score_correction_bias"] = (EXPERTS,)
    for name, width in mlps.items():
        shapes[f"{name}.gate_proj.weight"] = shapes[f"{name}.up_proj.weight"] = (width, HIDDEN)
        shapes[f"{name}.down_proj.weight"] = (HIDDEN, width)
    if number == LAYERS:
        shapes[f"{at}.eh_proj.weight"] = (HIDDEN, 2 * HIDDEN)
        shapes |= {f"{at}.{name}.weight": (HIDDEN,) for name in ("enorm", "hnorm", "shared_head.norm")}
        shapes |= {f"{at}.{name}.weight": (VOCABULARY, HIDDEN) for name in ("embed_tokens", "shared_head.head")}
    return shapes


def published_tensors() -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (HIDDEN,)}
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (VOCABULARY, HIDDEN))
    for number in range(LAYERS + 1):
        shapes |= layer_shapes(number)
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=draw) * (0.05 if len(shape) == 1 else shape[-1] ** -0.5)
        if "norm" in name:
            value += 1
        tensors[name] = value if "correction" in name else value.bfloat16()
    return tensors


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """The folder, in two files with an index, and its tensors."""
    folder, tensors = tmp_path_factory.mktemp("air"), published_tensors()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    index, names = {}, sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2]), 1):  # experts of one layer in both files
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder, tensors


def by_hand(tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Logits (T, V) in float64, from the published names, expert by expert and token by token."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    x = t["model.embed_tokens.weight"][ids]
    steps = len(ids)
    causal = torch.full((steps, steps), -torch.inf, dtype=torch.float64).triu(1)
    turned = HEAD // 2
    angles = torch.arange(steps, dtype=torch.float64)[:, None] * 1e6 ** -(
        torch.arange(0, turned, 2, dtype=torch.float64) / turned
    )

    def norm(value: Tensor, name: str) -> Tensor:
        return value / (value.square().mean(-1, keepdim=True) + 1e-5).sqrt() * t[f"{name}.weight"]

    def turn(value: Tensor) -> Tensor:
        first, second, rest = value.split([turned // 2, turned // 2, HEAD - turned], -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)

    def mlp(value: Tensor, name: str) -> Tensor:
        gate, up = (value @ t[f"{name}.{part}_proj.weight"].T for part in ("gate", "up"))
        return (F.silu(gate) * up) @ t[f"{name}.down_proj.weight"].T

    for number in range(LAYERS):
        at = f"model.layers.{number}"
        h = norm(x, f"{at}.input_layernorm")
        q, k, v = (
            (h @ t[f"{at}.self_attn.{n}_proj.weight"].T + t[f"{at}.self_attn.{n}_proj.bias"])
            .unflatten(-1, (-1, HEAD))
            .transpose(0, 1)
            for n in "qkv"
        )
        k, v = (part.repeat_interleave(HEADS // KV, 0) for part in (turn(k), v))
        weights = (turn(q) @ k.transpose(1, 2) / HEAD**0.5 + causal).softmax(-1)
        x = x + (weights @ v).transpose(0, 1).flatten(1) @ t[f"{at}.self_attn.o_proj.weight"].T
        h = norm(x, f"{at}.post_attention_layernorm")
        if number == 0:
            x = x + mlp(h, f"{at}.mlp")
            continue
        added = mlp(h, f"{at}.mlp.shared_experts")
        scores = (h @ t[f"{at}.mlp.gate.weight"].T).sigmoid()
        for token, score in enumerate(scores):
            best = (score + t[f"{at}.mlp.gate.e_score_correction_bias"]).topk(TOP_K).indices
            for expert in best.tolist():
                share = score[expert] / score[best].sum()
                added[token] += share * mlp(h[token], f"{at}.mlp.experts.{expert}")
        x = x + added
    return norm(x, "model.norm") @ t["lm_head.weight"].T


def loaded(folder: Path) -> nn.Module:
    config = {"_target_": "lightning_opt.models.hf", "name": "hf", "path": str(folder), "context_length": 32}
    return models.build(config, vocab_size=VOCABULARY, instantiate=lambda given: models.hf(**without_target(given)))


def without_target(given: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key != "_target_"}


def written(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 9, 7]])


def test_what_is_loaded_computes_what_the_tensors_say(
    published: tuple[Path, dict[str, Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    folder, tensors = published
    with caplog.at_level(logging.INFO, "lightning_opt.models"):
        model = loaded(folder)
    assert "MTP" in caplog.text
    logits = model(input_ids=IDS).logits[0].detach()
    expected = by_hand(tensors, IDS[0])
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    described = anatomy.describe(model)
    assert len(described.expert_layers) == LAYERS - 1
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    bias = tensors["model.layers.7.mlp.gate.e_score_correction_bias"]
    assert torch.equal(described.expert_layers[6].bias, bias)
    assert described.expert_layers[6].name == "model.layers.7.mlp"


def test_untrained_it_is_written_as_it_was(published: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    """Every published tensor but those of the MTP layer, with its bits; the correction biases float32 beside bf16."""
    folder, tensors = published
    Export(dtype="bfloat16").save(loaded(folder), tmp_path / "model")
    again = written(tmp_path / "model")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"model.layers.{LAYERS}.")}
    assert set(again) == set(kept)
    for name, tensor in kept.items():
        assert again[name].dtype == tensor.dtype, name
        assert torch.equal(again[name], tensor), name
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0  # its weights are not there


def test_continued_training_leaves_a_folder_that_transformers_loads(
    published: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder, tensors = published
    model = loaded(folder)
    optimizer = optim.build(model, {"name": "adamw", "lr": 1e-3})
    for _ in range(2):
        models.causal_lm_loss(model, IDS[:, :-1], IDS[:, 1:]).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    anatomy.find_expert_layers(model)[0].bias.add_(1e-3)  # as a balance would
    Export().save(model, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    theirs.set_experts_implementation("eager")
    ours = model.eval()(input_ids=IDS).logits
    torch.testing.assert_close(theirs(input_ids=IDS).logits, ours, rtol=1e-4, atol=1e-5)
    again = written(tmp_path / "model")
    by_the_names = by_hand(again, IDS[0])
    assert (ours[0].detach() - by_the_names).abs().max() < 1e-4 * by_the_names.abs().max()
    assert not torch.equal(again["model.layers.9.mlp.gate.weight"], tensors["model.layers.9.mlp.gate.weight"].float())
    again_loaded = loaded(tmp_path / "model")
    assert torch.equal(again_loaded(input_ids=IDS).logits, ours)


MLA = {"kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
DEEPSEEK = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
FAMILIES = {
    "Mixtral": {"num_local_experts": 4, "intermediate_size": 8},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 8},
    "Olmoe": {"num_experts": 4, "intermediate_size": 8},
    "DeepseekV3": {**DEEPSEEK, **MLA, "moe_intermediate_size": 8, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_are_trained_on_and_written_as_they_came(family: str, tmp_path: Path) -> None:
    import transformers as tf

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape |= {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "num_experts_per_tok": 2, "pad_token_id": None}
    theirs = getattr(tf, f"{family}ForCausalLM")(getattr(tf, f"{family}Config")(**{**shape, **FAMILIES[family]}))
    theirs.save_pretrained(tmp_path / "theirs")
    model = loaded(tmp_path / "theirs")
    assert torch.equal(model(input_ids=IDS).logits, theirs.train()(input_ids=IDS).logits)
    optimizer = optim.build(model, {"name": "lion", "lr": 1e-3})
    models.causal_lm_loss(model, IDS[:, :-1], IDS[:, 1:]).total.backward()
    optimizer.step()
    Export().save(model, tmp_path / "ours")
    before, after = written(tmp_path / "theirs"), written(tmp_path / "ours")
    assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert {name.split("layers.")[1].split(".")[0] for name in changed if "experts.0." in name} >= {"1"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    again.set_experts_implementation("eager")
    torch.testing.assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
