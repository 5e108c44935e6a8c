"""Documents kept apart within a sequence: equal to documents run one by one, and to torch's own block masks."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from lightning_opt import models
from lightning_opt.models import apart, causal_lm_loss, document_masks, keep_documents_apart
from lightning_opt.plan import ConfigError
from lightning_opt.training import PretrainModule

VOCABULARY, END = 40, 0
SHAPE = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY, "context_length": 64}
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "expert_size": 16}
KINDS = {
    "llama": lambda: models.llama(**SHAPE, intermediate_size=48, num_kv_heads=2),
    "qk_norm": lambda: models.llama(**SHAPE, intermediate_size=48, qk_norm=True),
    "gpt2": lambda: models.gpt2(**SHAPE),
    "glm4_moe": lambda: models.glm4_moe(**SHAPE, intermediate_size=48, num_kv_heads=2, **EXPERTS),
}


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind]().train()


def tokens(begins: list[list[int]], length: int = 32) -> Tensor:
    """Rows of length + 1 in which an end of text stands at the given places only."""
    ids = torch.randint(1, VOCABULARY, (len(begins), length + 1), generator=torch.Generator().manual_seed(1))
    for row, places in enumerate(begins):
        ids[row, places] = END
    return ids


# Documents of one token, one that begins with the row, one that begins with its last token, and a row of one document.
ROWS = tokens([[5, 6, 20], [0, 31], [], [10, 32]])


def pieces(row: Tensor) -> list[Tensor]:
    """A row's documents, each with the token after it, which is its last label."""
    inside = [k for k in range(1, len(row) - 1) if row[k] == END]
    return [row[begin : end + 1] for begin, end in pairwise([0, *inside, len(row) - 1])]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_documents_run_one_by_one(kind: str) -> None:
    """Also the whole's mean is theirs: every token but the rows' first is predicted once, none is left out."""
    alone = model_of(kind)
    together = copy.deepcopy(alone)
    keep_documents_apart(together)
    loss = causal_lm_loss(together, ROWS[:, :-1], ROWS[:, 1:], separator=END)
    loss.total.backward()
    found = [piece for row in ROWS for piece in pieces(row)]
    assert (len(found), sum(len(piece) - 1 for piece in found)) == (9, ROWS[:, 1:].numel())
    total = 0.0
    for piece in found:
        logits = alone(input_ids=piece[None, :-1], use_cache=False).logits[0]
        part = nn.functional.cross_entropy(logits, piece[1:], reduction="sum") / ROWS[:, 1:].numel()
        part.backward()
        total += part.item()
    assert loss.nll.item() == pytest.approx(total, rel=1e-6)
    for (name, one), other in zip(together.named_parameters(), alone.parameters(), strict=True):
        scale = other.grad.abs().max()
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=2e-6 * float(scale), msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_one_option_sees_other_documents_and_the_other_does_not(kind: str) -> None:
    """Another first document: what lies behind it changes, or does not (but for rounding, where experts' rows move)."""
    model = model_of(kind)
    keep_documents_apart(model)
    ids = tokens([[12]])[:, :-1]
    other = ids.clone()
    other[0, :12] = other[0, :12] % (VOCABULARY - 1) + 1
    for separator, sees in ((None, True), (END, False)):
        one, two = (model(input_ids=i, use_cache=False, **apart(i, separator)).logits for i in (ids, other))
        assert not torch.allclose(one[:, :12], two[:, :12], atol=1e-3)
        change = (one[:, 12:] - two[:, 12:]).abs().max().item()
        assert change > 1e-2 if sees else change < 1e-5


def test_positions_alone_switch_on_a_mask_of_transformers() -> None:
    """Why ours is always handed over: the day this fails, transformers looks at positions no more, or differently."""
    model = model_of("llama")
    ids = ROWS[:, :-1]
    given = apart(ids, END)
    by_mask, by_positions = (
        model(input_ids=ids, position_ids=given["position_ids"], attention_mask=mask, use_cache=False).logits
        for mask in (given["attention_mask"], None)
    )
    torch.testing.assert_close(by_mask, by_positions)
    causal = torch.ones(32, 32, dtype=torch.bool).tril()[None, None].expand(4, -1, -1, -1)
    across = model(input_ids=ids, position_ids=given["position_ids"], attention_mask=causal, use_cache=False).logits
    assert not torch.allclose(by_mask, across, atol=1e-3)  # positions that begin anew are no mask


def test_positions_and_masks_as_written() -> None:
    given = apart(torch.tensor([[7, 8, END, 5, END, END, 9], [END, 1, 2, 3, 4, 5, 6]]), END)
    assert given["position_ids"].tolist() == [[0, 1, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6]]
    assert given["attention_mask"][0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]
    assert torch.equal(given["attention_mask"][1, 0], torch.ones(7, 7).tril().bool())
    assert apart(torch.tensor([[END]]), None) == {}


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 520), st.lists(st.integers(0, 520), max_size=8), st.integers(1, 2))
def test_blocks_are_those_that_torch_finds_by_looking_at_every_pair(length: int, cuts: list[int], rows: int) -> None:
    ids = torch.ones(rows, length, dtype=torch.int64)
    ids[0, [cut for cut in cuts if cut < length]] = END
    numbered = (ids == END).cumsum(1)
    ours = document_masks._blocks(numbered)
    theirs = create_block_mask(ours.mask_mod, rows, None, length, length, device="cpu")
    assert ours.shape == theirs.shape
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.to_dense(), theirs.to_dense())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2", "glm4_moe"])
def test_flex_attention_gives_what_the_dense_mask_gives(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on CUDA, as far as a CPU can: forward only. `tests/gpu` has the gradients."""
    model = model_of(kind)
    keep_documents_apart(model)
    with torch.no_grad():
        dense = causal_lm_loss(model, ROWS[:, :-1], ROWS[:, 1:], separator=END).nll
        monkeypatch.setattr(document_masks, "_dense", document_masks._blocks)
        flex = causal_lm_loss(model, ROWS[:, :-1], ROWS[:, 1:], separator=END).nll
    across = causal_lm_loss(model, ROWS[:, :-1], ROWS[:, 1:]).nll
    assert flex.item() == pytest.approx(dense.item(), rel=1e-5)
    assert abs(across.item() - dense.item()) > 1e-3


def test_recomputed_layers_keep_documents_apart_too() -> None:
    model = model_of("llama")
    keep_documents_apart(model)
    recomputing = copy.deepcopy(model)
    recomputing.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=1)
    for one in (model, recomputing):
        causal_lm_loss(one, ROWS[:, :-1], ROWS[:, 1:], separator=END).total.backward()
    for a, b in zip(model.parameters(), recomputing.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["layers", "model"])
def test_compiled_models_keep_documents_apart_too(how: str) -> None:
    model = model_of("llama")
    keep_documents_apart(model)
    wanted = causal_lm_loss(model, ROWS[:, :-1], ROWS[:, 1:], separator=END).nll.item()
    with models.compiled(model, how):
        for rows in (ROWS, ROWS.flip(0)):  # other documents, the same graph
            loss = causal_lm_loss(model, rows[:, :-1], rows[:, 1:], separator=END)
            assert loss.nll.item() == pytest.approx(wanted, rel=1e-5)
            loss.total.backward()


def test_without_a_mask_and_in_a_folder_the_model_is_what_it_was(tmp_path: Path) -> None:
    """Scoring, generation and export know nothing of it."""
    model = model_of("glm4_moe").eval()
    ids, padded = ROWS[:, :-1], torch.ones(4, 32, dtype=torch.int64)
    padded[:2, :5] = 0
    asked: list[dict[str, Any]] = [{}, {"attention_mask": padded}]
    before = [model(input_ids=ids, **one).logits for one in asked]
    written = model.generate(ids[2:3, :8], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=END)
    keep_documents_apart(model)
    for one, logits in zip(asked, before, strict=True):
        assert torch.equal(model(input_ids=ids, **one).logits, logits)
    again = model.generate(ids[2:3, :8], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=END)
    assert torch.equal(again, written)
    model.save_pretrained(tmp_path)
    assert "flex" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert loaded.config._attn_implementation == "sdpa"
    torch.testing.assert_close(loaded(input_ids=ids).logits, before[0])


def test_models_that_no_mask_keeps_apart_are_refused() -> None:
    small = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16}
    windows = MistralForCausalLM(MistralConfig(**small, **heads, sliding_window=8))
    with pytest.raises(ConfigError, match=r"data\.block_cross_document_attention = true: .*\(sliding_window\)"):
        keep_documents_apart(windows)
    for model in (MambaForCausalLM(MambaConfig(**small)), nn.Linear(2, 2)):
        with pytest.raises(ConfigError, match="does not attend by a mask"):
            keep_documents_apart(model)
    keep_documents_apart(MistralForCausalLM(MistralConfig(**small, **heads, sliding_window=None)))


def test_training_validation_and_curvature_see_the_same_documents() -> None:
    """And micro-batches weigh alike: each predicts as many tokens, so their mean is the mean over all tokens."""
    model = model_of("llama")
    module = PretrainModule(
        model, None, lambda step: 1.0, corpora={"a": 1.0}, token_bytes=[1] * VOCABULARY, separator=END
    )
    batch = {"input_ids": ROWS[:, :-1], "labels": ROWS[:, 1:]}
    whole = module.training_step(batch, 0)
    assert whole.item() == pytest.approx(causal_lm_loss(model, *batch.values(), separator=END).nll.item(), rel=1e-6)
    assert abs(whole.item() - causal_lm_loss(model, *batch.values()).nll.item()) > 1e-3
    halves = [{key: side[part] for key, side in batch.items()} for part in (slice(0, 2), slice(2, 4))]
    assert sum(module.training_step(half, 0).item() for half in halves) / 2 == pytest.approx(whole.item(), rel=1e-6)
    curvature, count = module.curvature_loss(batch, None)
    assert (curvature.item(), count) == (pytest.approx(whole.item(), rel=1e-6), ROWS[:, 1:].numel())
    with torch.no_grad():
        module.validation_step(batch, 0)
    assert float(module._val_nats[0].compute() / module._val_tokens[0].compute()) == pytest.approx(whole.item())
