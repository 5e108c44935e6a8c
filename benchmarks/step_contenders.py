"""Who steps in `benchmarks.optimizer_step`: every rule of ours in every way, and the peers that have the same rule.

The peers' agreement is what tests/optim/test_peers_*.py show. torch's SGD, Adagrad and RMSprop put the decay into the
gradient, which costs as much. For `nadamw`, `cautious_adamw`, `adam_mini` and `lion_sign_first` no package that can be
installed beside this one has the rule; timm, which has the first two, breaks this stack.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn

from lightning_opt import kernels, optim
from lightning_opt.optim.costs import costs

YARDSTICK = "torch AdamW fused"
RATE = {"lr": 1e-4, "weight_decay": 0.1}
BETAS = {"betas": (0.9, 0.99)}
# SOAP and Kron do their dear work every tenth step, and are timed over whole periods of ten
PERIODS = {"soap": 10, "kron": 10}
_OURS: dict[str, dict[str, Any]] = {
    "soap": {"precondition_frequency": 10},
    "kron": {"preconditioner_update_probability": 0.1, "update_prob_flat_start": 0, "update_prob_decay": 100.0},
    "scion": {"norm": "spectral"},
}
_COMPUTE_BOUND = 20  # operations per byte: beyond, arithmetic takes longer than memory on anything that runs torch


@dataclass
class Contender:
    """Something that steps, and what was measured of it.

    Attributes:
        name: as the table shows it.
        rule: whose maths it does.
        make: makes the optimizer.
        slow: many small calls; left out on large sets.
        compiles: takes torch.compile.
        storage: what states are held in, where that was asked for.
        period: steps that are timed as one.
    """

    name: str
    rule: str
    make: Callable[[list[nn.Parameter]], Any]
    slow: bool = False
    compiles: bool = False
    storage: str = "float32"
    period: int = 1
    step: Callable[[], Any] = lambda: None
    traffic: float = 0.0  # bytes per parameter of an ideal step
    state: float = 0.0  # bytes per parameter
    first_s: float = 0.0
    overwrites: bool = False  # its own gradients
    left_out: str = ""  # why, where it is
    own: list[tuple[float, float]] = field(default_factory=list)  # (busy, wall) of a step per round, seconds
    floor: list[tuple[float, float]] = field(default_factory=list)

    @property
    def ours(self) -> bool:
        """Whether it is one of this repository's."""
        return self.name.startswith("ours")

    @property
    def kind(self) -> str:
        """What it is fairly compared with: the rule, and int8 apart."""
        return f"{self.rule} int8" if self.storage == "int8" else self.rule

    @property
    def wall(self) -> float:
        """Median seconds of a step by the clock."""
        return statistics.median(wall for _, wall in self.own)


@dataclass(frozen=True)
class Peer:
    """A class of another package that has a rule of ours.

    Attributes:
        label: of the package, in tables.
        module: where the class is.
        cls: its name.
        rule: ours of the same maths.
        keys: settings beside rate and decay.
        ways: by the word for each, the settings that make it run that way.
        storage: see `Contender`.
    """

    label: str
    module: str
    cls: str
    rule: str
    keys: dict[str, Any] = field(default_factory=dict)
    ways: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})
    storage: str = "float32"


_LOOP, _MANY = {"foreach": False}, {"foreach": True}
_BOTH = {"for-loop": _LOOP, "foreach": _MANY}
_TORCH = {"default": {}, "foreach": _MANY, "fused": {"fused": True}}
_OPTIMI = {"for-loop": {"foreach": False, "triton": False}, "foreach": _MANY, "triton": {"triton": True}}
_DECOUPLED = {"decoupled_weight_decay": True}
_THREE = {"betas": (0.9, 0.99, 0.999)}


def _of(label: str, module: str, *rows: tuple[Any, ...]) -> list[Peer]:
    return [Peer(label, module, *row) for row in rows]


PEERS = [
    *_of(
        "torch",
        "torch.optim",
        ("SGD", "sgd", {}, _TORCH),
        ("SGD", "momentum", {"momentum": 0.9}, _TORCH),
        ("Adagrad", "adagrad", {}, _TORCH),
        ("RMSprop", "rmsprop", {}, _BOTH),
        ("Adam", "adam", BETAS, _TORCH),
        ("Adam", "amsgrad", {**BETAS, "amsgrad": True}, _TORCH),
        ("AdamW", "adamw", BETAS, _TORCH),
        ("NAdam", "nadam", {**BETAS, **_DECOUPLED}, _BOTH),
        ("RAdam", "radam", {**BETAS, **_DECOUPLED}, _BOTH),
        ("Adafactor", "adafactor", {}, _BOTH),
        ("Muon", "muon"),
    ),
    *_of(
        "torch-optimi",
        "optimi",
        ("SGD", "sgd", {}, _OPTIMI),
        ("SGD", "momentum", {"momentum": 0.9}, _OPTIMI),
        ("Adam", "adam", BETAS, _OPTIMI),
        ("AdamW", "adamw", BETAS, _OPTIMI),
        ("RAdam", "radam", BETAS, _OPTIMI),
        ("Lion", "lion", BETAS, _OPTIMI),
    ),
    *_of(
        "pytorch-optimizer",
        "pytorch_optimizer",
        ("SGDW", "momentum", {"momentum": 0.9}, _BOTH),
        ("AdaBelief", "adabelief", BETAS, _BOTH),
        ("SignSGD", "signum", {}, _BOTH),
        ("Lion", "lion", BETAS, _BOTH),
        ("MARS", "mars", {**BETAS, "optimize_1d": True}, _BOTH),
        ("ADOPT", "adopt", {**BETAS, "weight_decouple": True}, _BOTH),
        ("AdEMAMix", "ademamix", {**_THREE, "weight_decouple": True}, _BOTH),
        ("ScheduleFreeAdamW", "schedule_free_adamw", BETAS, _BOTH),
        ("AdaFactor", "adafactor", {"betas": (None, 0.999), "relative_step": False}, _BOTH),
        ("SophiaH", "sophia", {**BETAS, "update_period": 10**9}, _BOTH),
        ("Muon", "muon", {}, {"": {}, "gram": {"ns_method": "gram_newton_schulz"}}),
        ("NorMuon", "normuon"),
        ("SCION", "scion", {"constraint": True, "norm_type": 2}),
        ("SOAP", "soap", {"precondition_frequency": 10}),
        ("Kron", "kron", {"pre_conditioner_update_probability": 0.1}),
    ),
    *_of(
        "bitsandbytes",
        "bitsandbytes.optim",
        ("SGD", "momentum", {"momentum": 0.9}),
        ("Adagrad", "adagrad"),
        ("RMSprop", "rmsprop"),
        ("Adam", "adam", BETAS),
        ("AdamW", "adamw", BETAS),
        ("AdEMAMix", "ademamix", _THREE),
        ("Lion", "lion", BETAS),
        ("SGD8bit", "momentum", {"momentum": 0.9}, {"": {}}, "int8"),
        ("AdamW8bit", "adamw", BETAS, {"": {}}, "int8"),
        ("Lion8bit", "lion", BETAS, {"": {}}, "int8"),
    ),
    *_of("lion-pytorch", "lion_pytorch", ("Lion", "lion", BETAS, {"for-loop": {}, "triton": {"use_triton": True}})),
    *_of("lion-pytorch", "lion_pytorch.foreach", ("Lion", "lion", BETAS, {"foreach": {}})),
]


@cache
def is_matrix_rule(name: str) -> bool:
    """Whether the rule's time is arithmetic on whole matrices, so that bytes are no floor for it."""
    return not optim.find_rule(name).elementwise and costs(name).intensity > _COMPUTE_BOUND


def floor_bytes(rule: str, weight: int, state: float, storage: str) -> float:
    """Bytes per parameter that an ideal step moves, all passes.

    Args:
        rule: name of the rule; its own `Rule.traffic` in float32.
        weight: bytes of a weight, and of its gradient.
        state: bytes of state per parameter as they are held; those of float32 states are the rule's.
        storage: what was asked for.
    """
    spec = optim.find_rule(rule)
    if weight == 4 and storage == "float32":
        return spec.traffic
    return spec.traffic * (3 * weight + 2 * state) / (12 + 8 * len(spec.state))


def ours(dtype: torch.dtype) -> Iterator[Contender]:
    """Every implementation of every optimizer of ours; with narrow state too where it can be had."""
    for name in optim.list_optimizers():
        rule = optim.find_rule(name)
        storages = ["float32", *(["bfloat16"] if dtype == torch.bfloat16 else []), *(["int8"] if rule.codes else [])]
        for storage in storages:
            for way in kernels.possible(rule):
                if way == "fused" and (dtype == torch.bfloat16 or storage != "float32"):
                    continue  # torch's kernel takes one dtype only, and our second moment stays float32
                if storage == "int8" and way == "eager":
                    continue  # of interest to tests alone
                label = f"ours {name} {way}"
                label += f", {storage} state" if dtype == torch.bfloat16 or storage != "float32" else ""
                make = _maker(name, implementation="auto" if way == "whole" else way, state_dtype=storage)
                slow, period = way == "eager", PERIODS.get(name, 1)
                yield Contender(label, name, make, slow=slow, storage=storage, period=period)


def _maker(name: str, **keys: Any) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        shared = BETAS if "betas" in optim.find_rule(name).defaults else {}
        optimizer = getattr(optim, optim.OPTIMIZERS[name])(params, **RATE, **shared, **_OURS.get(name, {}), **keys)
        if optimizer.needs:
            optimizer.observe(**{need: {} for need in optimizer.needs})  # fed, though there is nothing new
        return optimizer

    return make


def peers(device: str) -> Iterator[Contender]:
    """Each in every way it offers for this device; one that is not installed says so when it is made."""
    for peer in PEERS:
        for word, way in peer.ways.items():
            if word == "triton" and device != "cuda":
                continue
            name = " ".join(filter(None, (peer.label, peer.cls, word)))
            if peer.cls == "SGD" and peer.rule == "momentum":
                name += ", momentum"
            if peer.rule == "amsgrad":
                name += ", amsgrad"
            make = lambda p, peer=peer, way=way: _made(peer, way, p)  # noqa: E731
            slow, period = word in ("for-loop", "default"), PERIODS.get(peer.rule, 1)
            yield Contender(name, peer.rule, make, slow=slow, storage=peer.storage, period=period)
    yield Contender("torch AdamW compiled", "adamw", _torch_compiled, compiles=True)
    yield Contender("pytorch-optimizer Lion compiled", "lion", _pytorch_optimizer_compiled, compiles=True)


def _made(peer: Peer, way: dict[str, Any], params: list[nn.Parameter]) -> torch.optim.Optimizer:
    with contextlib.redirect_stdout(io.StringIO()):  # bitsandbytes reports what it did not find
        cls = getattr(importlib.import_module(peer.module), peer.cls)
    if peer.cls == "Kron" and not torch.backends.opt_einsum.is_available():
        raise RuntimeError("without opt_einsum, torch.einsum makes the outer product of its factors: gigabytes")
    groups: Sequence[Any] = params
    if peer.label == "pytorch-optimizer" and peer.rule in ("muon", "normuon"):
        groups = [{"params": params, "use_muon": True}]
    optimizer = cls(groups, **RATE, **peer.keys, **way)
    if peer.cls == "SophiaH":  # its first step wants an estimate
        optimizer.step(hessian=[torch.zeros_like(p) for p in params])
    return optimizer


def yardstick() -> Contender:
    """What every table knows: torch's fused AdamW."""
    return next(c for c in peers("cpu") if c.name == YARDSTICK)


def _torch_compiled(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    rate = torch.tensor(RATE["lr"], device=params[0].device)
    optimizer = torch.optim.AdamW(params, **RATE | BETAS | {"lr": rate}, foreach=True, capturable=True)
    optimizer.step = torch.compile(optimizer.step)
    return optimizer


def _pytorch_optimizer_compiled(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    create = importlib.import_module("pytorch_optimizer").create_optimizer
    settings = {**RATE, **BETAS, "wd_ban_list": (), "compile": True, "foreach": True}
    return create(nn.ParameterList(params), "lion", **settings)


def flops(rule: str, shapes: Sequence[tuple[int, ...]]) -> float:
    """Floating-point operations of one step over matrices of these shapes, at the settings of the contenders."""
    per_weight = {shape: costs(rule, shape, **_OURS.get(rule, {})).operations for shape in set(shapes)}
    return sum(per_weight[shape] * math.prod(shape) for shape in shapes)
