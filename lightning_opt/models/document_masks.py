"""Attention that stays within a document, where several lie in one training sequence.

A document begins at the end-of-text token that ends the one before it, as modded-nanogpt cuts its stream
(``docs = (input_seq == 50256).cumsum(0)``). So each token is still predicted once: the end of a document from the
document, the first token of the next from the end of text alone, which is what a model is asked with where a prompt is
empty. Positions count from 0 in each document, and in the piece of a document that a sequence begins with.

transformers builds such a mask by itself where position ids start anew and no mask is given, and only there
(`masking_utils.find_packed_sequence_indices`, 5.23). We leave it nothing to find: apart, it is handed the mask, which
it passes on as it is; across, no position ids.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lightning_opt.plan import ConfigError

FIELD = "data.block_cross_document_attention"
_NAME = "sdpa_or_flex"
_BLOCK = 128


def keep_documents_apart(model: nn.Module) -> None:
    """Makes a model take the masks of `apart`; without one it attends as ever (scaled-dot-product attention).

    Args:
        model: causal language model of transformers, each layer of which attends to all that lies before.

    Raises:
        ConfigError: the model cannot keep documents apart by a mask.
    """
    if not isinstance(model, PreTrainedModel) or not model._supports_sdpa or getattr(model, "_is_stateful", False):
        raise ConfigError(FIELD, True, f"must be false: {type(model).__name__} does not attend by a mask of ours")
    shape = model.config.get_text_config()
    kinds = {kind for kind in getattr(shape, "layer_types", None) or () if kind != "full_attention"}
    if getattr(shape, "sliding_window", None) and getattr(shape, "use_sliding_window", True):
        kinds.add("sliding_window")
    if kinds:
        layers = ", ".join(sorted(kinds))
        raise ConfigError(FIELD, True, f"must be false: {type(model).__name__} has layers of another kind ({layers})")
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)


def apart(input_ids: Tensor, separator: int | None) -> dict[str, Any]:
    """What a model is told, beside its tokens, for documents not to see each other.

    Args:
        input_ids: int64 (B, T).
        separator: id of the end-of-text token; None: documents see those before them.

    Returns:
        ``position_ids``, int64 (B, T), and ``attention_mask``: on CUDA blocks for flex attention, memory
        (T / 128)², elsewhere dense, bool (B, 1, T, T). Nothing where `separator` is None.
    """
    if separator is None:
        return {}
    begins = input_ids == separator
    documents, places = begins.cumsum(1), torch.arange(input_ids.shape[1], device=input_ids.device)
    positions = places - (places * begins).cummax(1).values
    return {"position_ids": positions, "attention_mask": (_blocks if input_ids.is_cuda else _dense)(documents)}


def _dense(documents: Tensor) -> Tensor:
    return (documents[:, :, None] == documents[:, None, :]).tril()[:, None]


def _blocks(documents: Tensor) -> BlockMask:
    """The same in blocks of 128 x 128, of which flex attention leaves out the empty ones.

    `create_block_mask` looks at every pair of tokens; since documents are numbered in order, a block's first and last
    tell as much.
    """
    batch, length = documents.shape
    count = -(-length // _BLOCK)
    beyond = (documents[:, -1:] + 1).expand(batch, count * _BLOCK - length)  # so that no block at the edge is full
    tiles = torch.cat([documents, beyond], 1).view(batch, count, _BLOCK)
    first, last = tiles[..., 0], tiles[..., -1]
    places = torch.arange(count, device=documents.device)
    before = places[None, :] < places[:, None]
    some = (last[:, None, :] >= first[:, :, None]) & (places[None, :] <= places[:, None])
    full = (first[:, None, :] == last[:, :, None]) & before

    def mask_mod(batch: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[batch, query] == documents[batch, key])

    tables = (*_table(some & ~full), *_table(full))
    blocks = BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=_BLOCK, mask_mod=mask_mod, seq_lengths=(length, length))
    blocks.ndim = 4  # type: ignore[attr-defined]  # GPT-2 asks a mask for it
    return blocks


def _table(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many, and which first: int32 (B, 1, rows) and (B, 1, rows, columns)."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **more: Any) -> Any:
    chosen = flex_attention_forward if isinstance(attention_mask, BlockMask) else sdpa_attention_forward
    return chosen(module, query, key, value, attention_mask, **more)
