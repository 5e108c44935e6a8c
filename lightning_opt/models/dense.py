"""Dense decoders: transformers' GPT-2 and Llama, and Qwen3 where queries and keys are normalised."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.initialization import no_init_weights


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
    init: Literal["width", "study"] | float = "width",
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
            far better than transformers' fixed 0.02; ``study`` is that of arXiv:2509.02046, see `study_init_`.
        rope_theta: base of the rotary frequencies.

    Returns:
        The model in float32 with scaled-dot-product attention.
    """
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
        "initializer_range": hidden_size**-0.5 if isinstance(init, str) else init,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "sdpa",
    }
    kind, config = (Qwen3ForCausalLM, Qwen3Config) if qk_norm else (LlamaForCausalLM, LlamaConfig)
    if init != "study":
        return kind(config(**shape))
    with no_init_weights():
        model = kind(config(**shape))
    study_init_(model)
    model.tie_weights()
    return model


def study_init_(model: nn.Module) -> None:
    """Draws matrices anew as the study's code does (arXiv:2509.02046; haliax, `Linear.init` and `Embedding.init`).

    Normal values cut off at three standard deviations, which are ``fan_in ** -0.5`` for linear maps, the output head
    among them, and ``1 / hidden_size`` for embeddings.

    Args:
        model: its linear maps have no bias.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            fan_in = module.weight.shape[1]
            _cut_normal_(module.weight, fan_in**-0.5 if isinstance(module, nn.Linear) else 1 / fan_in)


@torch.no_grad()
def _cut_normal_(weight: Tensor, std: float) -> None:
    """Draws again whatever lies beyond three standard deviations; five times as fast as `nn.init.trunc_normal_`."""
    weight.normal_(0, std)
    if weight.is_meta:
        return
    flat = weight.view(-1)
    while len(outside := (flat.abs() > 3 * std).nonzero()[:, 0]):
        flat[outside] = torch.empty_like(flat[outside]).normal_(0, std)


def gpt2(
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    vocab_size: int,
    context_length: int,
    init: float = 0.02,
) -> PreTrainedModel:
    """GPT-2 with fresh weights: learned positions, LayerNorm, biases, GELU, tied embedding; no dropout.

    Args:
        hidden_size: width of the residual stream; the MLP is four times as wide.
        num_layers: decoder layers.
        num_heads: attention heads.
        vocab_size: rows of the embedding.
        context_length: longest sequence, in tokens.
        init: standard deviation of all matrices; those that write into the residual stream have it divided by
            ``sqrt(2 * num_layers)`` (GPT-2's paper, section 2.3, as transformers reads it).

    Returns:
        The model in float32 with scaled-dot-product attention.
    """
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=context_length,
        n_embd=hidden_size,
        n_layer=num_layers,
        n_head=num_heads,
        initializer_range=init,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    return GPT2LMHeadModel(config)
