"""FSDP2: a model's parameters split over the ranks, its optimizer kept, and the whole model back at the end."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lightning_opt.callbacks.gathering import full_state
from lightning_opt.models import decoder_layers
from lightning_opt.optim import Optimizer


class Sharded:
    """A model that was split in place: each decoder layer is gathered when it is needed and let go again.

    The rest (embeddings, last norm, head; tied or not) is one more part, gathered from the start of the forward pass
    to the end of the backward pass. The optimizer's groups go on with the split parameters: roles, rules and rates
    were chosen before, on the whole model.

    Args:
        model: the model, the same on every rank.
        optimizer: an optimizer over its parameters, without state yet.
        mesh: the ranks, one dimension.
        precision: Lightning's name. ``bf16-mixed``: float32 weights and state, gathered and computed in bfloat16;
            gradients are summed over the ranks in float32 in every case.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, mesh: DeviceMesh, precision: str):
        self._model = model
        self._empty = copy.deepcopy(model, {id(p): _meta(p) for p in model.parameters()})
        names = {id(p): name for name, p in model.named_parameters()}
        compute = torch.bfloat16 if precision == "bf16-mixed" else None
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        for part in (*decoder_layers(model), model):
            fully_shard(part, mesh=mesh, mp_policy=policy)
        sharded = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [sharded[names[id(p)]] for p in group["params"]]

    def whole(self, *, keep: bool) -> nn.Module:
        """The model as it was before, with the weights of now, on the CPU; every rank must ask.

        Args:
            keep: whether this rank wants the weights; else the model it gets is empty.
        """
        if state := full_state(self._model, keep=keep):
            self._empty.load_state_dict(state, assign=True)
            if hasattr(self._empty, "tie_weights"):
                self._empty.tie_weights()
        return self._empty


def _meta(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
