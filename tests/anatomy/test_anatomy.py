"""Roles, ties, experts and counts on models that we did not write."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_opt.anatomy import ROLES, describe

SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": None,
}


def built(kind, **more):
    import transformers as tf

    config = getattr(tf, f"{kind}Config")(**{**SMALL, **more})
    with torch.device("meta"):
        return getattr(tf, f"{kind}ForCausalLM")(config)


def kinds(anatomy):
    """Role to the set of (last parts of names), to compare with what a reader of the model's source would say."""
    found = {}
    for name, role in anatomy.roles.items():
        found.setdefault(role, set()).add(".".join(name.split(".")[-2:]))
    return found


def complete(model, anatomy):
    ids = [id(info.parameter) for info in anatomy.parameters]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in model.parameters()}
    assert {info.role for info in anatomy.parameters} <= set(ROLES)
    assert anatomy.total == sum(p.numel() for p in model.parameters())


ATTENTION = {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"}
MLP = {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}
NORMS = {"input_layernorm.weight", "post_attention_layernorm.weight", "norm.weight"}


@pytest.mark.parametrize("tied", [True, False])
def test_llama(tied):
    model = built("Llama", tie_word_embeddings=tied)
    anatomy = describe(model)
    complete(model, anatomy)
    expected = {"matrix": ATTENTION | MLP, "norm": NORMS, "embedding": {"embed_tokens.weight"}}
    assert kinds(anatomy) == (expected if tied else {**expected, "head": {"lm_head.weight"}})
    (embedding,) = [info for info in anatomy.parameters if info.role == "embedding"]
    assert embedding.tied_names == (("lm_head.weight",) if tied else ())
    assert embedding.module_type == "Embedding"
    assert anatomy.total - anatomy.non_embedding == 61 * 16 * (1 if tied else 2)
    assert anatomy.active == anatomy.total
    assert anatomy.expert_layers == []


def test_the_studys_count_is_the_matrices():
    h, i, layers = 16, 24, 3
    anatomy = describe(built("Llama", num_key_value_heads=4))
    matrices = sum(info.parameter.numel() for info in anatomy.parameters if info.role == "matrix")
    assert matrices == layers * (3 * h * i + 4 * h * h)
    assert anatomy.non_embedding == matrices + (2 * layers + 1) * h


def test_qwen3_with_its_norms_of_queries_and_keys():
    anatomy = describe(built("Qwen3", tie_word_embeddings=True, head_dim=8))
    assert kinds(anatomy)["norm"] == NORMS | {"q_norm.weight", "k_norm.weight"}
    assert kinds(anatomy)["matrix"] == ATTENTION | MLP


def test_biases_of_qwen2():
    assert kinds(describe(built("Qwen2")))["bias"] == {"q_proj.bias", "k_proj.bias", "v_proj.bias"}


def test_mixtral():
    model = built("Mixtral", num_local_experts=4, num_experts_per_tok=2)
    anatomy = describe(model)
    complete(model, anatomy)
    assert kinds(anatomy)["matrix"] == ATTENTION
    assert len(anatomy.expert_layers) == 3
    assert {(layer.count, layer.top_k) for layer in anatomy.expert_layers} == {(4, 2)}
    experts = 3 * 4 * 3 * 16 * 24
    assert sum(info.parameter.numel() for info in anatomy.parameters if info.role == "expert") == experts
    assert sum(info.parameter.numel() for info in anatomy.parameters if info.role == "router") == 3 * 4 * 16
    assert anatomy.total - anatomy.active == experts // 2


def test_glm4_moe_with_a_dense_first_layer_and_shared_experts():
    model = built(
        "Glm4Moe", n_routed_experts=4, num_experts_per_tok=1, n_shared_experts=1, moe_intermediate_size=8,
        first_k_dense_replace=1, n_group=1, topk_group=1, head_dim=4,
    )  # fmt: skip
    anatomy = describe(model)
    complete(model, anatomy)
    found = kinds(anatomy)
    assert found["router"] == {"gate.weight"}
    assert found["matrix"] == ATTENTION | MLP
    assert len(anatomy.expert_layers) == 2
    assert all(info.parameter.ndim == 3 for info in anatomy.parameters if info.role == "expert")
    assert anatomy.total - anatomy.active == 2 * (4 - 1) * 3 * 16 * 8


def test_qwen2_moe_gate_of_the_shared_expert_is_a_router():
    model = built("Qwen2Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
                  shared_expert_intermediate_size=8, decoder_sparse_step=1)  # fmt: skip
    found = kinds(describe(model))
    assert found["router"] == {"gate.weight", "shared_expert_gate.weight"}
    assert found["matrix"] == ATTENTION | MLP


def test_gpt2_conv1d_and_positions():
    import transformers as tf

    model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    anatomy = describe(model)
    complete(model, anatomy)
    found = kinds(anatomy)
    assert found["embedding"] == {"wte.weight", "wpe.weight"}
    assert found["matrix"] == {"c_attn.weight", "c_proj.weight", "c_fc.weight"}
    assert found["bias"] == {"c_attn.bias", "c_proj.bias", "c_fc.bias"}
    assert found["norm"] == {f"{layer}.{part}" for layer in ("ln_1", "ln_2", "ln_f") for part in ("weight", "bias")}
    assert "head" not in found


def test_torch_encoder_plain_networks_and_frozen_weights():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32), 2)
    found = kinds(describe(encoder))
    assert found["matrix"] == {"self_attn.in_proj_weight", "out_proj.weight", "linear1.weight", "linear2.weight"}
    assert found["bias"] == {"self_attn.in_proj_bias", "out_proj.bias", "linear1.bias", "linear2.bias"}
    assert found["norm"] == {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"}
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv1d(4, 4, 3), nn.PReLU(), nn.Linear(8, 1))
    net.requires_grad_(False)
    assert list(describe(net).roles.values()) == [
        "matrix",
        "bias",
        "norm",
        "norm",
        "matrix",
        "bias",
        "other",
        "other",
        "bias",
    ]
    assert describe(nn.Module()).parameters == []


class Experts(nn.Module):
    def __init__(self, count, top_k):
        super().__init__()
        if top_k:
            self.top_k, self.count = top_k, count
        self.score = nn.Linear(8, count, bias=False)
        self.members = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(count))


def test_experts_in_a_list_but_not_any_list():
    anatomy = describe(Experts(4, 2))
    assert sorted(set(anatomy.roles.values())) == ["bias", "expert", "router"]
    assert anatomy.total - anatomy.active == 4 * 2 * 64 // 2
    deep = describe(Experts(4, None))  # four equal layers and a 4-way output: an ordinary deep network
    assert sorted(set(deep.roles.values())) == ["bias", "matrix"]


def test_names_do_not_matter():
    """The same Llama under names that lie gets the same roles."""
    model = built("Llama", tie_word_embeddings=False)
    liar = nn.Module()
    liar.norm_bias_embed = nn.Module()
    liar.norm_bias_embed.lm_head = model
    layer = model.model.layers[0]
    layer.mlp.up_proj, layer.mlp.embed_norm = None, layer.mlp.up_proj
    roles = describe(liar).roles
    assert roles["norm_bias_embed.lm_head.model.layers.0.mlp.embed_norm.weight"] == "matrix"
    assert roles["norm_bias_embed.lm_head.lm_head.weight"] == "head"
    assert sum(role == "embedding" for role in roles.values()) == 1


def test_a_head_of_a_model_that_names_none():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Embedding(50, 8)
            self.b = nn.Linear(8, 8)
            self.c = nn.Linear(8, 50)

    assert describe(Plain()).roles == {
        "a.weight": "embedding",
        "b.weight": "matrix",
        "b.bias": "bias",
        "c.weight": "head",
        "c.bias": "bias",
    }
