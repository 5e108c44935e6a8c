"""FLOPs and counts against torch's own counter on transformers' own model, and the study's published sizes."""

import pytest

from lightning_opt.plan import flops_per_token
from lightning_opt.plan.flops import non_embedding_params


@pytest.mark.parametrize(
    ("hidden", "intermediate", "heads", "published"),
    [
        (512, 2048, 8, 134_217_728),
        (768, 3072, 12, 301_989_888),
        (1024, 4096, 16, 536_870_912),
        (1536, 6144, 24, 1_207_959_552),
    ],
)
def test_counts_of_the_study(hidden, intermediate, heads, published):
    assert non_embedding_params(32, hidden, intermediate, heads) == published


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_against_torchs_counter_on_a_real_llama(kv_heads):
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers.models.llama import LlamaConfig, LlamaForCausalLM

    shape = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}
    config = LlamaConfig(**shape, num_key_value_heads=kv_heads, vocab_size=96, attn_implementation="eager")
    model = LlamaForCausalLM(config)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name)
    params = non_embedding_params(3, 64, 160, 4, kv_heads)
    assert params == matrices
    tokens = torch.randint(96, (2, 32))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    # The rotary tables' small product is no part of the formula.
    assert counter.get_total_flops() / tokens.numel() == pytest.approx(flops_per_token(params, 3, 64, 32, 96), rel=2e-3)
