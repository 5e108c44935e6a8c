"""Sizes and floating-point operations of decoder-only transformers, from their shape alone."""

from __future__ import annotations


def flops_per_token(
    non_embedding_params: int,
    num_layers: int,
    hidden_size: int,
    sequence_length: int,
    vocab_size: int,
    attention_width: float | None = None,
) -> int:
    """Floating-point operations of one training token, forward and backward.

    ``6 N + 12 L a s + 6 h V``: two operations per parameter forward and four backward (N without the embedding), the
    attention scores and their product with the values (not halved for causality), and the output head. What activation
    checkpointing computes twice does not count, so this is the numerator of model FLOPs utilisation (PaLM,
    arXiv:2204.02311, appendix B, which counts the head inside N).

    Args:
        non_embedding_params: N; for mixtures of experts the parameters that one token uses.
        num_layers: L.
        hidden_size: h, width of the residual stream.
        sequence_length: s, tokens.
        vocab_size: V, rows of the output head.
        attention_width: a = heads x head dimension (the mean of a query's and a value's); None where that is h.
    """
    attention = 12 * num_layers * (attention_width or hidden_size) * sequence_length
    return int(6 * non_embedding_params + attention + 6 * hidden_size * vocab_size)


def non_embedding_params(
    num_layers: int,
    hidden_size: int,
    intermediate_size: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    mlp_matrices: int = 3,
) -> int:
    """Matrix parameters of a decoder without embedding, head, norms and biases: ``L (m h i + 2 h h + 2 h k)``.

    m is the number of matrices of the MLP: 3 for Llama, whose MLP is gated, 2 for GPT-2; k is the width of the keys,
    ``h * num_kv_heads / num_heads``. With as many key heads as heads a Llama has the study's ``L (3 h i + 4 h h)``
    (arXiv:2509.02046).
    """
    key_width = hidden_size * (num_kv_heads or num_heads) // num_heads
    return num_layers * (mlp_matrices * hidden_size * intermediate_size + 2 * hidden_size * (hidden_size + key_width))


def mixture_params(
    num_layers: int,
    hidden_size: int,
    intermediate_size: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    *,
    num_experts: int,
    experts_per_token: int,
    expert_size: int,
    shared_experts: int,
    dense_layers: int,
) -> int:
    """Matrix parameters that one token uses in a decoder with experts, without embedding, head, norms and biases.

    Attention of every layer, the gated MLP of the first ``dense_layers``, and in each other layer the router, the
    shared experts and ``experts_per_token`` of the routed ones; all of these give the count of all weights.
    """
    head_dim = head_dim or hidden_size // num_heads
    attention = 2 * hidden_size * head_dim * (num_heads + (num_kv_heads or num_heads))
    dense = 3 * hidden_size * intermediate_size
    sparse = 3 * hidden_size * expert_size * (experts_per_token + shared_experts) + num_experts * hidden_size
    return num_layers * attention + dense_layers * dense + (num_layers - dense_layers) * sparse
