"""Mixtures of experts: transformers' Glm4Moe, the architecture of GLM-4.5 and GLM-4.5-Air."""

from __future__ import annotations

from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, PreTrainedModel


def glm4_moe(
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    intermediate_size: int,
    num_experts: int,
    experts_per_token: int,
    expert_size: int,
    vocab_size: int,
    context_length: int,
    shared_experts: int = 1,
    dense_layers: int = 1,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    qkv_bias: bool = True,
    qk_norm: bool = False,
    rotary_fraction: float = 0.5,
    rope_theta: float = 10000.0,
    tie_embeddings: bool = True,
    init: float | str = "width",
) -> PreTrainedModel:
    """A GLM-4.5 with fresh weights (arXiv:2508.06471, section 2.1): a Llama whose later layers have experts for an MLP.

    Each token goes through the shared experts and ``experts_per_token`` of the routed ones: those of the highest
    ``sigmoid(router score) + correction bias``, weighted by the sigmoids alone, which are normalised to a sum of one.
    Nothing is dropped. The correction bias is a buffer; who wants balanced experts moves it (arXiv:2408.15664). There
    are no layers that predict further tokens (MTP).

    Args:
        hidden_size: width of the residual stream.
        num_layers: decoder layers, those without experts included.
        num_heads: attention heads.
        intermediate_size: width of the gated MLP of layers without experts.
        num_experts: routed experts per layer.
        experts_per_token: routed experts that one token is sent to.
        expert_size: width of one expert, a gated MLP.
        vocab_size: rows of the embedding.
        context_length: longest sequence, in tokens.
        shared_experts: experts that every token goes through, as one MLP so many times as wide.
        dense_layers: first layers, which have no experts.
        num_kv_heads: key and value heads (grouped-query attention); as many as heads when None.
        head_dim: size of a head; ``hidden_size / num_heads`` when None. GLM's heads are together wider than the stream.
        qkv_bias: queries, keys and values have a bias.
        qk_norm: RMS-normalise queries and keys per head (GLM-4.5 does, Air does not).
        rotary_fraction: share of each head that turns with the position.
        rope_theta: base of the rotary frequencies.
        tie_embeddings: one matrix for embedding and output head.
        init: standard deviation of all matrices, experts and routers; ``width`` means ``hidden_size ** -0.5``.

    Returns:
        The model in float32 with scaled-dot-product attention.
    """
    config = Glm4MoeConfig(
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads or num_heads,
        head_dim=head_dim or hidden_size // num_heads,
        intermediate_size=intermediate_size,
        moe_intermediate_size=expert_size,
        n_routed_experts=num_experts,
        num_experts_per_tok=experts_per_token,
        n_shared_experts=shared_experts,
        first_k_dense_replace=dense_layers,
        vocab_size=vocab_size,
        max_position_embeddings=context_length,
        tie_word_embeddings=tie_embeddings,
        attention_bias=qkv_bias,
        use_qk_norm=qk_norm,
        initializer_range=hidden_size**-0.5 if isinstance(init, str) else init,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": rope_theta,
            "partial_rotary_factor": rotary_fraction,
        },
        num_mtp_layers=0,
        attn_implementation="sdpa",
    )
    return Glm4MoeForCausalLM(config)
