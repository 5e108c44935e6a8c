"""Which matrices a weight's rows are: fused ones, attention heads; read from shapes and numbers, never from names.

A layout is a dict with these keys, each only where it is known (rows = outputs):

- ``pieces``: rows of the matrices that a weight holds one below the other: query, key and value; gate and up;
- ``heads``: number of attention heads that the rows of a query or key map belong to, or all of a fused map's;
- ``value_heads``: the same of a value map;
- ``inputs_first``: True where the weight is stored (inputs, outputs), as GPT-2's maps are: rows are then columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

LAYOUT = ("pieces", "heads", "value_heads", "inputs_first")

_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_head", "n_heads", "nhead")
_HEAD_SIZES = ("head_dim", "attention_head_size", "head_size")
# Families of transformers whose fused map holds query, key and value of a head together: no piece is a run of rows.
_INTERLEAVED = {"bloom", "codegen", "falcon", "gpt_neox", "gpt_neox_japanese", "persimmon"}


def find_layouts(model: nn.Module) -> dict[int, dict[str, Any]]:
    """Layouts of a model's weights, by id of the parameter; weights of which nothing is known are left out."""
    found: dict[int, dict[str, Any]] = {}
    family = getattr(getattr(model, "config", None), "model_type", None)
    for module in model.modules():
        for parameter, layout in (*_of_stack(module), *_of_attention(module, family), *_of_gate(module)):
            found.setdefault(id(parameter), {}).update(layout)
        if isinstance(module, nn.MultiheadAttention):
            for parameter, layout in _of_torch(module):
                found.setdefault(id(parameter), {}).update(layout)
        elif _inputs_first(module):
            found.setdefault(id(module.weight), {})["inputs_first"] = True
    return found


Found = Iterator[tuple[nn.Parameter, dict[str, Any]]]


def _inputs_first(module: nn.Module) -> bool:
    """A childless 2-D map with its own number of outputs, in the order of GPT-2's Conv1D."""
    weight, outputs = module._parameters.get("weight"), getattr(module, "nf", None)
    return type(outputs) is int and weight is not None and weight.ndim == 2 and weight.shape[1] == outputs


def _maps(module: nn.Module) -> list[tuple[nn.Parameter, int, int]]:
    """(weight, outputs, inputs) of the linear maps right below a module, in the order it made them."""
    maps = []
    for child in module.children():
        if isinstance(child, nn.Linear):
            maps.append((child.weight, *child.weight.shape))
        elif _inputs_first(child):
            maps.append((child.weight, *reversed(child.weight.shape)))
    return maps


def _number(names: tuple[str, ...], *places: Any) -> int | None:
    values = (getattr(place, name, None) for place in places for name in names)
    return next((value for value in values if type(value) is int and value > 0), None)


def _of_attention(module: nn.Module, family: str | None) -> Found:
    """A module that knows heads and holds their maps: three, or one fused, and perhaps the one that leads back.

    Of four maps that one comes last; of two it is the one with fewer outputs.
    """
    count, size = _number(_HEAD_COUNTS, module), _number(_HEAD_SIZES, module)
    maps = _maps(module)
    if (count is None and size is None) or not maps:
        return
    config = getattr(module, "config", None)
    count = count or _number(_HEAD_COUNTS, config)
    if count is None:
        return
    size = size or max(1, maps[0][2] // count)
    back = [i for i, (_, outputs, inputs) in enumerate(maps) if inputs == count * size and outputs == maps[i - 1][2]]
    if len(maps) in (2, 4) and back:
        last = max(back) if len(maps) == 4 else min(back, key=lambda i: maps[i][1])
        maps.pop(last)
    if len({inputs for *_, inputs in maps}) != 1:
        return
    if len(maps) == 3:
        rows = [outputs for _, outputs, _ in maps]
        if rows[0] == count * size and rows[1] == rows[2] and rows[1] % size == 0:
            for (weight, outputs, _), key in zip(maps, ("heads", "heads", "value_heads"), strict=True):
                yield weight, {key: outputs // size}
    elif len(maps) == 1 and family not in _INTERLEAVED:
        weight, outputs, _ = maps[0]
        rest = outputs - count * size
        if rest > 0 and rest % (2 * size) == 0 and rest // 2 <= count * size:
            yield weight, {"pieces": [count * size, rest // 2, rest // 2], "heads": outputs // size}


def _of_torch(module: nn.MultiheadAttention) -> Found:
    heads = module.num_heads
    if module.in_proj_weight is not None:
        yield module.in_proj_weight, {"pieces": [module.embed_dim] * 3, "heads": 3 * heads}
    else:
        yield module.q_proj_weight, {"heads": heads}
        yield module.k_proj_weight, {"heads": heads}
        yield module.v_proj_weight, {"value_heads": heads}


def _of_gate(module: nn.Module) -> Found:
    """Gate and up in one map: twice as many outputs as the only other map, which leads back, has inputs."""
    maps = _maps(module)
    if len(maps) == 2:
        (up, outputs, inputs), (_, back, inner) = maps
        if outputs == 2 * inner and inputs == back:
            yield up, {"pieces": [inner, inner]}


def _of_stack(module: nn.Module) -> Found:
    """The same of stacked experts (count, outputs, inputs), or inputs first where the module or the shapes say so.

    Interleaved gates (``is_concatenated`` false, as transformers says) are no pieces.
    """
    stacks = [p for p in module._parameters.values() if p is not None and p.ndim == 3]
    if len(stacks) != 2 or stacks[0].shape[0] != stacks[1].shape[0]:
        return
    (_, rows, columns), (_, back, inner) = (p.shape for p in stacks)
    turned = getattr(module, "is_transposed", None)
    if turned is None:
        turned = not (columns == back and rows in (inner, 2 * inner)) and rows == inner and columns in (back, 2 * back)
    if turned:
        rows, inner = columns, back
        for stack in stacks:
            yield stack, {"inputs_first": True}
    if rows == 2 * inner and getattr(module, "is_concatenated", True):
        yield stacks[0], {"pieces": [inner, inner]}
