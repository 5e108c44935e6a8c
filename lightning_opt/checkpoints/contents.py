"""The files of a checkpoint: ``model.safetensors`` for the state_dict's tensors, ``state.pt`` for all the rest."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_opt.checkpoints.manifest import Damaged, verify

MODEL, STATE = "model.safetensors", "state.pt"
_WEIGHTS = "state_dict"


def read(path: Path | str, *, verified: bool = False) -> dict[str, Any]:
    """Verifies a checkpoint and loads it on the CPU.

    Args:
        path: its folder.
        verified: it was a moment ago: load it alone.

    Returns:
        The tree that was saved.

    Raises:
        Damaged: a file is missing, is not what was written, or holds more than tensors and plain types.
    """
    path = Path(path) if verified else verify(path).path
    try:
        return load(path)
    except pickle.UnpicklingError as error:
        raise Damaged(path, f"{STATE} holds more than tensors and plain types") from error
    except Exception as error:  # whole as the manifest has it, and yet no checkpoint of ours; or gone since
        raise Damaged(path, f"cannot be loaded ({type(error).__name__}: {error})") from error


def save(tree: dict[str, Any], folder: Path) -> None:
    """Writes both files; a tensor that occurs under several names is written once.

    The names of tied tensors stand in the header's metadata, as ``safetensors.torch.save_model`` has it.

    Raises:
        OSError, SafetensorError, RuntimeError: it cannot be written.
    """
    weights, state = _split(tree)
    if weights:
        first: dict[int, str] = {}
        ties = {name: first.setdefault(id(tensor), name) for name, tensor in weights.items()}
        unique = {name: weights[name].contiguous() for name in first.values()}
        save_file(unique, folder / MODEL, {name: kept for name, kept in ties.items() if name != kept})
    torch.save(state, folder / STATE)


def load(folder: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Loads both files on the CPU; nothing is verified.

    Args:
        folder: the checkpoint's.
        mmap: read the state's tensors from the disk when they are looked at.
    """
    tree = torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=mmap)
    if (folder / MODEL).exists():
        weights: dict[str, Tensor] = load_file(folder / MODEL)
        with safe_open(folder / MODEL, "pt") as file:
            ties = file.metadata() or {}
        tree[_WEIGHTS].update(weights | {name: weights[kept] for name, kept in ties.items()})
    return tree


def same(one: Any, other: Any) -> bool:
    """Whether two trees are equal to the last bit (NaN equals itself)."""
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(_bytes(one), _bytes(other))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or one != one


def _split(tree: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state_dict's tensors, and the tree with None in their places, so that names and their order stay."""
    if not isinstance(tree.get(_WEIGHTS), dict):
        return {}, tree
    weights = {name: value for name, value in tree[_WEIGHTS].items() if isinstance(value, Tensor)}
    rest = OrderedDict((name, None if name in weights else value) for name, value in tree[_WEIGHTS].items())
    rest.__dict__.update(getattr(tree[_WEIGHTS], "__dict__", {}))
    return weights, tree | {_WEIGHTS: rest}


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
