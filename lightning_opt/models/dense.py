"""Dense decoders: transformers' Llama, and Qwen3 where queries and keys are normalised."""

from __future__ import annotations

from typing import Literal

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM


def llama(
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    intermediate_size: int,
    vocab_size: int,
    context_length: int,
    num_kv_heads: int | None = None,
    tie_embeddings: bool = True,
    qk_norm: bool = False,
    init: Literal["width"] | float = "width",
    rope_theta: float = 10000.0,
) -> PreTrainedModel:
    """A Llama with fresh weights (RMSNorm, rotary positions, SwiGLU, no biases, no dropout).

    Args:
        hidden_size: width of the residual stream.
        num_layers: decoder layers.
        num_heads: attention heads; head size is ``hidden_size / num_heads``.
        intermediate_size: width of the gated MLP (three matrices).
        vocab_size: rows of the embedding.
        context_length: longest sequence, in tokens.
        num_kv_heads: key and value heads (grouped-query attention); as many as heads when None.
        tie_embeddings: one matrix for embedding and output head.
        qk_norm: RMS-normalise queries and keys per head. Built as Qwen3, which is Llama with that norm, so that the
            saved model loads anywhere.
        init: standard deviation of all matrices; ``width`` means ``hidden_size ** -0.5``, which at small width trains
            far better than transformers' fixed 0.02.
        rope_theta: base of the rotary frequencies.

    Returns:
        The model in float32 with scaled-dot-product attention.
    """
    std = hidden_size**-0.5 if init == "width" else float(init)
    shape = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads or num_heads,
        "head_dim": hidden_size // num_heads,
        "intermediate_size": intermediate_size,
        "vocab_size": vocab_size,
        "max_position_embeddings": context_length,
        "tie_word_embeddings": tie_embeddings,
        "initializer_range": std,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "sdpa",
    }
    return Qwen3ForCausalLM(Qwen3Config(**shape)) if qk_norm else LlamaForCausalLM(LlamaConfig(**shape))
