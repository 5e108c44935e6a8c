"""FSDP2: a model's parameters split over the ranks, its optimizer kept, and the whole model back at the end."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_opt.callbacks.gathering import full_state, full_tensor
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


class WholeStateStrategy(ModelParallelStrategy):
    """Lightning's strategy of split models, whose checkpoints are those of a whole model: any world size loads them.

    Weights and states are gathered on the first rank, tensor by tensor; to load, each rank reads the checkpoint and
    keeps its part. Lightning's own wants its own format, and takes a step of the optimizer to know its state.
    """

    save_checkpoint = Strategy.save_checkpoint
    load_checkpoint = Strategy.load_checkpoint
    lightning_restore_optimizer = Strategy.lightning_restore_optimizer

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors on the first rank, nothing on the others."""
        return full_state(self.lightning_module, keep=self.is_global_zero)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each rank's parts."""
        targets = self.lightning_module.state_dict(keep_vars=True)
        parts = {name: _split_as(value, targets.get(name)) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(parts, strict=strict)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Whole tensors on the first rank."""
        saved = optimizer.state_dict()
        states = {
            index: {name: full_tensor(value, self.is_global_zero) for name, value in state.items()}
            for index, state in saved["state"].items()
        }
        return {**saved, "state": states}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each rank's parts, laid out as their parameters are."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            like = dict(zip(numbers, parameters, strict=True))
            states = {
                index: {name: _split_as(value, like[index]) for name, value in state.items()}
                for index, state in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": states})


def _split_as(value: Any, like: Any) -> Any:
    """This rank's part of a whole tensor, laid out as another; without a word to the other ranks."""
    if not isinstance(value, Tensor) or not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
