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
    norms = sum(info.parameter.numel() for info in anatomy.parameters if info.role == "norm")
    assert anatomy.total - anatomy.non_embedding == 61 * 16 * (1 if tied else 2) + norms
    assert anatomy.active == anatomy.total
    assert anatomy.expert_layers == []


def test_the_studys_count_is_the_matrices():
    h, i, layers = 16, 24, 3
    anatomy = describe(built("Llama", num_key_value_heads=4))
    assert anatomy.non_embedding == layers * (3 * h * i + 4 * h * h)


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


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.same = nn.Linear(width, width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)


class NanoGPT(nn.Module):
    """No get_output_embeddings; the context is as long as the MLP is wide, as with d = 256 and context 1024."""

    def __init__(self, vocabulary, width=16, layers=3, head="own", blocks=nn.ModuleList):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(4 * width, width)
        parts = [Block(width) for _ in range(layers)]
        self.blocks = blocks(parts) if blocks is nn.ModuleList else blocks(*parts)
        if head != "functional":
            self.out = nn.Linear(width, vocabulary, bias=False)
        if head == "tied":
            self.out.weight = self.tokens.weight


@pytest.mark.parametrize("vocabulary", [500, 16, 40])  # the last two below the context; 16 also the width
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("head", ["own", "tied", "functional"])
def test_mlps_as_wide_as_a_position_table_are_no_heads(vocabulary, layers, head):
    model = NanoGPT(vocabulary, layers=layers, head=head)
    found = kinds(describe(model))
    assert found["matrix"] == {"up.weight", "same.weight", "down.weight"}
    assert found["embedding"] == {"tokens.weight", "positions.weight"}
    assert found.get("head") == ({"out.weight"} if head == "own" else None)
    complete(model, describe(model))


def test_blocks_in_a_sequential_and_linear_maps_as_wide_as_the_table_is_long():
    assert kinds(describe(NanoGPT(64, 16, blocks=nn.Sequential)))["head"] == {"out.weight"}
    net = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 64))
    roles = {name: role for name, role in describe(net).roles.items() if name.endswith("weight")}
    assert roles == {
        "0.weight": "embedding",
        "1.weight": "matrix",
        "3.weight": "matrix",
        "4.weight": "head",
    }


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
