"""Documents kept apart on a GPU: flex attention's blocks give what the dense mask gives, gradients too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from lightning_opt import models
from lightning_opt.models import apart, causal_lm_loss, document_masks, keep_documents_apart

pytestmark = pytest.mark.gpu

END, LENGTH = 0, 320  # two whole blocks and a half
SHAPE = {"hidden_size": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 512, "context_length": LENGTH}
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "expert_size": 64}
KINDS = {
    "llama": lambda: models.llama(**SHAPE, intermediate_size=256, num_kv_heads=2),
    "gpt2": lambda: models.gpt2(**SHAPE),
    "glm4_moe": lambda: models.glm4_moe(**SHAPE, intermediate_size=256, num_kv_heads=2, **EXPERTS),
}


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, 512, (3, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    ids[0, [40, 41, 130, 256]] = ids[1, [0, 128, 319]] = END
    ids = ids.cuda()
    return ids[:, :-1], ids[:, 1:]


def loss_and_gradients(model: nn.Module, **more: Any) -> tuple[float, list[Tensor]]:
    model = copy.deepcopy(model)
    loss = causal_lm_loss(model, *batch(), **more)
    loss.total.backward()
    return loss.nll.item(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_give_what_the_dense_mask_gives(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = KINDS[kind]().train().cuda()
    keep_documents_apart(model)
    assert isinstance(apart(batch()[0], END)["attention_mask"], BlockMask)
    flex, by_flex = loss_and_gradients(model, separator=END)
    across, _ = loss_and_gradients(model)
    monkeypatch.setattr(document_masks, "_blocks", document_masks._dense)
    dense, by_dense = loss_and_gradients(model, separator=END)
    assert flex == pytest.approx(dense, rel=1e-4)
    assert abs(across - dense) > 1e-3
    for one, other in zip(by_flex, by_dense, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-3 * float(other.abs().max()))


@pytest.mark.parametrize("how", ["off", "layers"])
def test_in_bfloat16_compiled_or_not(how: str) -> None:
    """Step after step with other documents, as in a run."""
    torch.manual_seed(0)
    model = KINDS["llama"]().train().cuda()
    keep_documents_apart(model)
    wanted = causal_lm_loss(model, *batch(), separator=END).nll.item()
    with models.compiled(model, how), torch.autocast("cuda", dtype=torch.bfloat16):
        for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
            inputs, labels = (side[order] for side in batch())
            loss = causal_lm_loss(model, inputs, labels, separator=END)
            loss.total.backward()
            assert loss.nll.item() == pytest.approx(wanted, rel=0.02)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
