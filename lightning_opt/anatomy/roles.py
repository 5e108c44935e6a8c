"""The role of one parameter, from its module's type, its tensor's rank and its neighbours; never from its name.

- ``matrix``     weights of linear maps and convolutions
- ``expert``     weights of experts that a router chooses from, stacked in 3-D or one module each
- ``embedding``  rows looked up by index; a weight tied to the head counts here
- ``head``       the map to the vocabulary
- ``norm``       every parameter of a normalisation layer, its bias too
- ``bias``       what a linear map or convolution adds
- ``router``     the scores that choose experts
- ``other``      the rest: gains, class tokens, attention sinks, single-row maps
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

ROLES = ("matrix", "expert", "embedding", "head", "norm", "bias", "router", "other")

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d, _NormBase)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def is_norm(module: nn.Module) -> bool:
    """A normalisation layer: torch's own, or a childless module of 1-D parameters with a small float (its epsilon).

    The second half is the structure of every RMSNorm of transformers.
    """
    if isinstance(module, _NORMS):
        return True
    own = [p for p in module._parameters.values() if p is not None]
    if not own or any(p.ndim != 1 for p in own) or any(True for _ in module.children()):
        return False
    return any(isinstance(value, float) and 0 < value < 1e-2 for value in vars(module).values())


def embedding_ids(model: nn.Module) -> set[int]:
    """Ids of the weights of embedding tables: torch's types, and what `get_input_embeddings` names."""
    tables = [module for module in model.modules() if isinstance(module, _EMBEDDINGS)]
    tables += _asked(model, "get_input_embeddings")
    return {id(p) for table in tables for p in table._parameters.values() if p is not None and p.ndim == 2}


def head_ids(model: nn.Module) -> set[int]:
    """Ids of the weights that map to the vocabulary.

    These are what `get_output_embeddings` names; in models without that method, linear maps tied to an embedding
    table; without those, one linear map outside the model's blocks with as many outputs as a table has rows: the
    widest, of equals the last. (Tables of positions have rows too, and a block's map may be as wide as those.)
    """
    named = {
        id(w) for head in _asked(model, "get_output_embeddings") if (w := getattr(head, "weight", None)) is not None
    }
    if named:
        return named
    maps = [module for module in model.modules() if isinstance(module, nn.Linear)]
    tables = embedding_ids(model)
    if tied := {id(m.weight) for m in maps} & tables:
        return tied
    rows = {module.num_embeddings for module in model.modules() if isinstance(module, _EMBEDDINGS)}
    blocks = _block_ids(model)
    fitting = [m for m in maps if m.out_features in rows and id(m) not in blocks]
    return {id(max(reversed(fitting), key=lambda m: m.out_features).weight)} if fitting else set()


def _block_ids(model: nn.Module) -> set[int]:
    """Ids of all modules inside repeated blocks: whatever a ModuleList holds, and a Sequential's equal parts.

    Equal leaves of a Sequential are no blocks: its last Linear may be the head.
    """
    blocks: list[nn.Module] = []
    for module in model.modules():
        children = list(module.children())
        if isinstance(module, nn.ModuleList):
            blocks += children
        elif isinstance(module, nn.Sequential):
            count = Counter(type(child) for child in children)
            blocks += [c for c in children if count[type(c)] > 1 and any(True for _ in c.children())]
    return {id(part) for block in blocks for part in block.modules()}


def _asked(model: nn.Module, method: str) -> Iterator[nn.Module]:
    """What every module that has a method of this name answers; models without such a part raise or return None."""
    for module in model.modules():
        ask = getattr(module, method, None)
        if callable(ask):
            try:
                answer = ask()
            except (NotImplementedError, AttributeError, TypeError):
                continue
            if isinstance(answer, nn.Module):
                yield answer


def role_by_shape(module: nn.Module, parameter: nn.Parameter) -> str:
    """The role of a parameter that is neither embedding, head, router nor inside an expert module."""
    if is_norm(module):
        return "norm"
    ranks = [p.ndim for p in module._parameters.values() if p is not None and p is not parameter]
    convolution = isinstance(module, _ConvNd)
    if parameter.ndim == 1:
        return "bias" if any(rank >= 2 for rank in ranks) else "other"
    if parameter.ndim == 2 and 3 in ranks and not convolution:
        return "bias"  # of stacked experts: one row each
    if parameter.ndim >= 2 and convolution:
        return "matrix"
    if parameter.ndim == 3 and parameter.shape[0] > 1:
        return "expert"
    return "matrix" if parameter.ndim == 2 and min(parameter.shape) > 1 else "other"
