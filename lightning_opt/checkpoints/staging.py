"""A snapshot of a checkpoint's tree in host memory: tensors and plain types, nothing else."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)

Where = tuple[Hashable, ...]


class Staging:
    """Copies trees into host memory that it keeps, so that only the first copy allocates.

    A copy overwrites the one before it. Tensors of a CUDA device come through pinned memory without waiting for each
    other; a tensor that occurs under several names is copied once and stays one.
    """

    def __init__(self) -> None:
        self._buffers: dict[Where, Tensor] = {}

    @torch.no_grad()
    def copy(self, tree: dict[str, Any]) -> dict[str, Any]:
        """The tree as it is now; it shares nothing with the original.

        Raises:
            TypeError: something in it is neither a dense tensor nor a plain type; the message says where.
        """
        used: dict[Where, Tensor] = {}
        seen: dict[tuple[Any, ...], Tensor] = {}

        def tensor(value: Tensor, where: Where) -> Tensor:
            key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
            if key not in seen:
                seen[key] = used[where] = self._buffer(value, where).copy_(value, non_blocking=value.is_cuda)
            return seen[key]

        copied = _rebuilt(tree, (), tensor)
        for device in {device for device, *_ in seen if device.type != "cpu"}:
            torch.accelerator.synchronize(device)
        self._buffers = used
        return copied

    def _buffer(self, value: Tensor, where: Where) -> Tensor:
        old = self._buffers.get(where)
        if old is not None and (old.dtype, old.shape) == (value.dtype, value.shape) and old.stride() == value.stride():
            return old
        return torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)


def _rebuilt(value: Any, where: Where, tensor: Any) -> Any:
    """The same containers with every tensor replaced; refuses what is not plain."""
    kind = type(value)
    if kind in (Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_meta:
        return tensor(value, where)
    if kind in _PLAIN:
        return value
    if kind in (dict, OrderedDict):
        for key in value:
            _check_key(key, where)
        rebuilt = kind((key, _rebuilt(item, (*where, key), tensor)) for key, item in value.items())
        if hasattr(value, "_metadata"):  # the versions that torch's state_dict keeps beside its items
            rebuilt._metadata = _rebuilt(value._metadata, (*where, "_metadata"), tensor)
        return rebuilt
    if kind in (list, tuple):
        return kind(_rebuilt(item, (*where, index), tensor) for index, item in enumerate(value))
    if kind is set and all(type(item) in _PLAIN for item in value):
        return set(value)
    raise TypeError(_refusal(value, where))


def _check_key(key: Any, where: Where) -> None:
    parts = key if type(key) is tuple else (key,)
    if not all(type(part) in _PLAIN for part in parts):
        raise TypeError(_refusal(key, (*where, "(a key)")))


def _refusal(value: Any, where: Where) -> str:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, Tensor):
        kind += f" ({value.layout} on {value.device})"
    place = "".join(f"[{part!r}]" for part in where)
    return f"checkpoint{place} is a {kind}; a checkpoint holds dense tensors and plain types only"
