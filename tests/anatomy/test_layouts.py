"""Pieces and heads of models that we did not write."""

from __future__ import annotations

import pytest
import torch
from test_anatomy import SMALL, built
from torch import nn

from lightning_opt.anatomy import describe

Q, K, V = "q_proj.weight", "k_proj.weight", "v_proj.weight"


def layouts(model, layer=None):
    """Last two parts of a name to its layout, of the weights of which something is known."""
    found = [(info.name, dict(info.layout)) for info in describe(model).parameters if info.layout]
    if layer is not None:
        found = [(name, layout) for name, layout in found if f".{layer}." in name]
    return {".".join(name.split(".")[-2:]): layout for name, layout in found}


@pytest.mark.parametrize("kv", [2, 4])
@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Mistral"])
def test_heads_of_separate_maps(kind, kv):
    more = {"head_dim": 4} if kind != "Llama" else {}
    model = built(kind, num_key_value_heads=kv, **more)
    assert layouts(model) == {Q: {"heads": 4}, K: {"heads": kv}, V: {"value_heads": kv}}


def test_fused_maps_of_phi3():
    pieces = {"qkv_proj.weight": {"pieces": [16, 8, 8], "heads": 8}, "gate_up_proj.weight": {"pieces": [24, 24]}}
    assert layouts(built("Phi3")) == pieces
    square = layouts(built("Phi3", num_key_value_heads=4))
    assert square["qkv_proj.weight"] == {"pieces": [16, 16, 16], "heads": 12}


def test_interleaved_maps_have_no_pieces():
    import transformers as tf

    with torch.device("meta"):
        model = tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SMALL))
    assert layouts(model) == {}


def test_gpt2_stores_inputs_first():
    import transformers as tf

    model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    first = {"inputs_first": True}
    assert layouts(model) == {
        "c_attn.weight": {"pieces": [16, 16, 16], "heads": 6, **first},
        "c_proj.weight": first,
        "c_fc.weight": first,
    }


def test_bert_and_torchs_attention():
    import transformers as tf

    config = tf.BertConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=4,
                           intermediate_size=24)  # fmt: skip
    assert layouts(tf.BertModel(config)) == {
        "query.weight": {"heads": 4},
        "key.weight": {"heads": 4},
        "value.weight": {"value_heads": 4},
    }
    fused = layouts(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32), 1, enable_nested_tensor=False))
    assert fused == {"self_attn.in_proj_weight": {"pieces": [16, 16, 16], "heads": 12}}
    apart = layouts(nn.MultiheadAttention(16, 4, kdim=8, vdim=12))
    assert apart == {"q_proj_weight": {"heads": 4}, "k_proj_weight": {"heads": 4}, "v_proj_weight": {"value_heads": 4}}


def test_stacked_experts():
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2}
    found = layouts(built("Mixtral", **moe))
    assert found["experts.gate_up_proj"] == {"pieces": [24, 24]}
    assert "experts.down_proj" not in found
    glm = built("Glm4Moe", n_routed_experts=4, num_experts_per_tok=1, n_shared_experts=1, moe_intermediate_size=8,
                first_k_dense_replace=1, n_group=1, topk_group=1, head_dim=4)  # fmt: skip
    assert layouts(glm)["experts.gate_up_proj"] == {"pieces": [8, 8]}
    oss = layouts(built("GptOss", head_dim=4, layer_types=["full_attention"] * 3, **moe))
    assert oss["experts.gate_up_proj"] == {"inputs_first": True}  # gate and up alternate: no run of rows is one of them
    assert oss["experts.down_proj"] == {"inputs_first": True}


class Own(nn.Module):
    def __init__(self, *shapes):
        super().__init__()
        for number, shape in enumerate(shapes):
            self.register_parameter(f"w{number}", nn.Parameter(torch.zeros(shape)))


def test_stacks_that_only_shapes_describe():
    assert layouts(nn.ModuleList([Own((4, 24, 8), (4, 8, 12))])) == {"0.w0": {"pieces": [12, 12]}}
    first = {"inputs_first": True}
    assert layouts(nn.ModuleList([Own((4, 8, 24), (4, 12, 8))])) == {
        "0.w0": {"pieces": [12, 12], **first},
        "0.w1": first,
    }
    assert layouts(nn.ModuleList([Own((4, 24, 8), (4, 8, 24))])) == {}


def test_plain_networks_have_none():
    assert layouts(nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8), nn.Linear(8, 8))) == {}
    assert layouts(nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8))) == {}
