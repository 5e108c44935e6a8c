"""The base of every optimizer: the only `step`, parameter groups, decay modes, state storage, clipping by group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_opt import kernels
from lightning_opt.kernels import Bucket, Choice, Later, Rule, Variant
from lightning_opt.optim.buckets import Row, filled_bucket, layout_of
from lightning_opt.optim.catalogue import find_rule
from lightning_opt.optim.clipping import Clipping
from lightning_opt.optim.saved import fitted, plain
from lightning_opt.optim.storage import bytes_held, fresh_state, planned_bytes, state_dtypes, warn_of_lost_updates
from lightning_opt.plan import ConfigError, check_value, one_of

# Every rule has these; a rule adds its own (`Rule.defaults`).
COMMON: dict[str, Any] = {
    "lr": 1e-3,
    "weight_decay": 0.0,
    "weight_decay_mode": "decoupled",
    "max_grad_norm": None,
    "cautious": False,
    "cautious_weight_decay": False,
    "state_dtype": "float32",
    "implementation": "auto",
}
# What else a group may carry. `pieces` and `heads` are lists aligned with the group's parameters, or None: the rows of
# the matrices fused in each weight, and the number of attention heads its rows belong to (see `optim.routing`).
_BOOKKEEPING: dict[str, Any] = {"rule": None, "role": "all", "clip_group": "", "pieces": None, "heads": None}
_ALLOWED = frozenset({"params", "param_names", "name", "initial_lr", *COMMON, *_BOOKKEEPING})

Hook = Callable[["Optimizer"], None]


class Optimizer(torch.optim.Optimizer):
    """A torch optimizer whose groups each name the rule that updates them.

    Decay modes, with rate lr (as scheduled), its peak (`initial_lr`: the rate a group was made with) and decay wd:

    - ``decoupled``: ``p <- p (1 - lr wd)`` before the rule (torch's AdamW);
    - ``independent``: ``p <- p (1 - lr / peak wd)`` (optimi's ``decouple_lr``; wd is then about 1e-5 to 1e-4);
    - ``l2``: ``g <- g + wd p`` before the rule (torch's Adam and SGD).

    ``cautious`` leaves out every step that points against its gradient and scales the others up by what is missing,
    tensor by tensor (Liang et al. 2024, arXiv 2411.16085, and its repository's scale: 1 / mean of the mask, at most
    1000). ``cautious_weight_decay`` decays only weights that the step moves towards zero too (Chen et al. 2025,
    arXiv 2510.12402).

    Updates of bfloat16 weights are computed in float32 and rounded to nearest when written. A weight that is changed
    by less than half a bfloat16 step (0.2 to 0.4 % of its size) therefore does not move at all, in any number of
    updates: at lr 1e-4 most weights of a language model stay where they are. The first step logs a warning where lr is
    that small; weights kept in float32 (precision bf16-mixed) do not suffer from it.

    State is made at a parameter's first gradient, in `state_dtype`, but for what a rule must keep in float32
    (`Rule.wide_state`: AdamW's second moment); all of it is float64 for float64 weights. `step` is a Python int.
    Parameters without gradient are left alone. `max_grad_norm` is applied by `clip_`, and by `step` unless these very
    gradients were clipped before and not changed since.

    Numbers may be tensors of one element, and `lr` may be 0 (a schedule may start there).

    Args:
        params: parameters, named parameters, or groups (each may override any hyperparameter, and `rule`).
        rule: name of the rule for groups that do not name their own.
        **hyper: hyperparameters of the rule and the common ones (`COMMON`).

    Raises:
        ConfigError: for an unknown rule or hyperparameter, or a value out of range.
        ValueError: for a parameter given twice, or one that cannot be trained.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "step" in vars(cls):
            raise TypeError(f"{cls.__name__} overrides step(): the maths belongs in its Rule")

    def __init__(self, params: Any, *, rule: str, **hyper: Any) -> None:
        spec = find_rule(rule)
        _refuse_unknown(spec, hyper)
        defaults = {**_BOOKKEEPING, **COMMON, **spec.defaults, **hyper, "rule": rule}
        self._set_up()
        super().__init__(params, _checked(spec, defaults))

    def _set_up(self) -> None:
        """Attributes that are no part of torch's optimizer; kept where they exist (torch calls __setstate__ often)."""
        self.__dict__.setdefault("_before_update", [])
        self.__dict__.setdefault("_clipping", Clipping())
        self.__dict__.setdefault("_signals", {})
        self.__dict__.setdefault("_elements", {})  # rule -> number of its weights
        self.__dict__.setdefault("_stepped", False)
        self.__dict__.setdefault("_skip", False)
        self.__dict__.setdefault("_uncertain", None)  # a masked step: the mask, and the states that counted it

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._set_up()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group after checking its keys, values and parameters; keys left out take the constructor's values.

        Raises:
            ConfigError: for an unknown rule or hyperparameter, or a value out of range.
            ValueError: for a parameter that is already held or cannot be trained.
        """
        spec = find_rule(param_group.get("rule") or self.defaults["rule"])
        _refuse_unknown(spec, param_group)
        inherited = {key: value for key, value in self.defaults.items() if key in _ALLOWED or key in spec.defaults}
        group = {**spec.defaults, **inherited, **param_group, "rule": spec.name}
        params = group.pop("params")
        group = {**_checked(spec, group), "params": [params] if isinstance(params, Tensor) else list(params)}
        plain = [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]
        if len({id(p) for p in plain}) != len(plain):
            raise ValueError("a parameter is listed twice in one group: tied weights are updated once")
        if any(isinstance(p, Tensor) and p.is_complex() for p in plain):
            raise ValueError("complex parameters are not supported: train torch.view_as_real(p) instead")
        if small := [p for p in plain if isinstance(p, Tensor) and p.ndim < spec.least_ndim]:
            raise ValueError(
                f"{spec.name} takes matrices, and a parameter has shape {tuple(small[0].shape)}: hand it the hidden "
                "matrices only and the rest to another group, or let optim.build(model, config) route them by role"
            )
        group.setdefault("initial_lr", group["lr"])
        super().add_param_group(group)
        for key in set(self.param_groups[-1]) - set(group) - _ALLOWED:
            del self.param_groups[-1][key]  # torch fills in every default, also those of another rule
        self._elements.clear()

    # -- the step ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient.

        Args:
            closure: called once, first, with gradients enabled; its result is returned.

        Raises:
            RuntimeError: for sparse gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        limited = any(group["max_grad_norm"] is not None for group in self.param_groups)
        if limited and not self._clipping.holds(self.param_groups):
            self.clip_()
        self._clipping.forget()
        if not self._stepped:
            self._stepped = True
            warn_of_lost_updates(self.param_groups)
        self._settle()
        self._skip = False
        for hook in list(self._before_update):
            hook(self)
        if self._skip is True:
            return loss
        counted: list[dict[str, Any]] = []
        for group in self.param_groups:
            rule = find_rule(group["rule"])
            for bucket in self._buckets(rule, group, counted):
                kernels.run(self._choice(rule, group, bucket).implementation, rule, bucket)
        if self._skip is not False:
            self._uncertain = Later(self._skip), counted
        return loss

    def skip_step(self, flag: bool | Tensor) -> None:
        """Leaves weights and state untouched in the step under way if `flag` is true; for a before-update hook.

        Args:
            flag: a bool: the step ends there. A 0-dim bool tensor: the update is masked on the device, the host does
                not wait, and the states' step counts are put right once it can know: in the next step or
                `state_dict`. Several flags in one step add up.
        """
        self._skip = self._skip | flag

    def _settle(self) -> None:
        """Takes a masked step that was skipped back out of the counts."""
        if self._uncertain is None:
            return
        (flag, counted), self._uncertain = self._uncertain, None
        if flag.read():
            for state in counted:
                state["step"] -= 1

    def _buckets(self, rule: Rule, group: dict[str, Any], counted: list[dict[str, Any]]) -> Iterator[Bucket]:
        """The group's parameters with gradients, apart by step count, device and dtypes; counts the step.

        The states whose count went up are added to `counted`.
        """
        found: dict[tuple[Any, ...], list[Row]] = {}
        for index, p in enumerate(group["params"]):
            grad = p.grad
            if grad is None:
                continue
            if grad.layout is not torch.strided:
                _refuse_sparse(grad)
            state = self.state[p]
            layout = layout_of(group, index)
            if not state:
                state["step"] = 0
                state |= fresh_state(rule, group, p, layout)
            state["step"] += 1
            counted.append(state)
            row = Row.of(rule, p, grad, state, layout)
            found.setdefault((state["step"], *row.kind), []).append(row)
        shrink, l2 = (None, None) if rule.own_decay else _decay(group)
        for (step, *_), rows in found.items():
            skip = self._skip.to(rows[0].tensors[0].device) if isinstance(self._skip, Tensor) else None
            yield filled_bucket(rule, rows, step, group, shrink=shrink, l2=l2, skip=skip)

    def register_before_update_hook(self, hook: Hook) -> Callable[[], None]:
        """Calls ``hook(optimizer)`` in every step after the closure and before a weight changes.

        Returns:
            a function that takes the hook off again.
        """
        self._before_update.append(hook)
        return lambda: self._before_update.remove(hook)

    # -- signals ----------------------------------------------------------------------------------------------------

    @property
    def needs(self) -> frozenset[str]:
        """Names of the signals that this optimizer's rules cannot work without."""
        return frozenset().union(*(find_rule(group["rule"]).needs for group in self.param_groups))

    def observe(self, **signals: Any) -> None:
        """Takes signals by name; what no rule here needs is refused.

        Raises:
            ConfigError: for a signal that is not in `needs`.
        """
        for name, value in signals.items():
            if name not in self.needs:
                wanted = ", ".join(sorted(self.needs)) or "no signals"
                raise ConfigError(f"observe.{name}", value, f"this optimizer needs {wanted}")
            self._signals[name] = value

    # -- clipping ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def clip_(self) -> Tensor:
        """Clips the gradients in place, each group to its own `max_grad_norm`.

        Groups with the same limit and `clip_group` are clipped together by their joint norm, so where all agree this
        is the usual global clip. No host-device synchronisation. Where a joint norm is not finite the gradients stay
        as they are: the returned norm tells.

        Returns:
            the norm of all gradients before clipping, a 0-dim tensor (0 where there are none).
        """
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    _refuse_sparse(p.grad)
        return self._clipping.clip(self.param_groups)

    @property
    def last_grad_norm(self) -> Tensor | None:
        """What the last `clip_` returned; None before the first."""
        return self._clipping.total

    def grad_norms(self) -> dict[str, Tensor]:
        """Norm per role before clipping, as the last `clip_` measured it."""
        return dict(self._clipping.by_role)

    # -- what runs, what it holds -----------------------------------------------------------------------------------

    def _choice(self, rule: Rule, group: Mapping[str, Any], bucket: Bucket) -> Choice:
        return self._choose(rule, group, bucket.params[0].device, bucket.dtypes, bucket.variant)

    def _choose(
        self,
        rule: Rule,
        group: Mapping[str, Any],
        device: torch.device,
        dtypes: tuple[torch.dtype, ...],
        variant: Variant,
    ) -> Choice:
        if rule.name not in self._elements:
            members = (p for g in self.param_groups if g["rule"] == rule.name for p in g["params"])
            self._elements[rule.name] = sum(p.numel() for p in members)
        return kernels.choose(rule, group["implementation"], device, dtypes, self._elements[rule.name], variant)

    def _choice_of(self, group: Mapping[str, Any]) -> Choice:
        rule = find_rule(group["rule"])
        largest = max(group["params"], key=lambda p: p.numel())
        states = state_dtypes(rule, group, largest).values()
        shrink, l2 = (None, None) if rule.own_decay else _decay(group)
        variant = Variant(l2 is not None, group["cautious"], group["cautious_weight_decay"] and shrink is not None)
        return self._choose(rule, group, largest.device, (largest.dtype, largest.dtype, *states), variant)

    @property
    def implementations(self) -> dict[str, str]:
        """Per rule what really runs and why, for example ``{"lion": "compiled (auto: 27.3M parameters, g++)"}``."""
        return {group["rule"]: str(self._choice_of(group)) for group in self.param_groups if group["params"]}

    def state_bytes(self) -> int:
        """Bytes of state held now on this process, measured on the tensors (0 before the first step)."""
        return sum(bytes_held(state) for state in self.state.values())

    def routing_table(self) -> list[dict[str, Any]]:
        """One row per group, in plain types.

        Keys: role, rule, implementation, tensors, params (weights), lr (peak), weight_decay, max_grad_norm,
        state_bytes (measured once the group has state; before, what it will be).
        """
        rows = []
        for group in self.param_groups:
            params = group["params"]
            held = sum(bytes_held(self.state[p]) for p in params if p in self.state)
            rule = find_rule(group["rule"])
            planned = sum(planned_bytes(rule, group, p, layout_of(group, i)) for i, p in enumerate(params))
            rows.append(
                {
                    "role": group["role"],
                    "rule": group["rule"],
                    "implementation": str(self._choice_of(group)) if params else "",
                    "tensors": len(params),
                    "params": sum(p.numel() for p in params),
                    "lr": group.get("initial_lr", group["lr"]),
                    "weight_decay": group["weight_decay"],
                    "max_grad_norm": group["max_grad_norm"],
                    "state_bytes": held or planned,
                }
            )
        return rows

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's; waits for the device where the last step was masked, for the counts to be right."""
        self._settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, or a state of torch.optim.AdamW into our AdamW.

        Hyperparameters come from the checkpoint, as in torch, but for `implementation`, `max_grad_norm` and
        `clip_group`, which stay as this optimizer was built; keys the checkpoint lacks do too.

        Raises:
            ConfigError: where the checkpoint's groups, rules, roles or states are not this optimizer's.
            ValueError: where a group holds another number of parameters.
        """
        self._uncertain = None
        state_dict = fitted(state_dict, self.param_groups)
        saved_ids = [group["params"] for group in state_dict["param_groups"]]
        super().load_state_dict(state_dict)
        for group, ids in zip(self.param_groups, saved_ids, strict=True):
            rule = find_rule(group["rule"])
            for index, p in zip(ids, group["params"], strict=True):
                # torch casts state to the parameter's dtype: that would round the float32 state of bfloat16 weights.
                asked = state_dtypes(rule, group, p)
                for name, saved in state_dict["state"].get(index, {}).items():
                    if isinstance(saved, Tensor):
                        dtype = asked.get(name, saved.dtype)
                        if self.state[p][name].dtype != dtype:
                            self.state[p][name] = saved.to(device=p.device, dtype=dtype)


def _refuse_unknown(spec: Rule, hyper: Mapping[str, Any]) -> None:
    for key, value in hyper.items():
        if key not in _ALLOWED and key not in spec.defaults:
            raise ConfigError(f"{spec.name}.{key}", value, one_of(key, [*COMMON, *spec.defaults]))


def _checked(spec: Rule, group: Mapping[str, Any]) -> dict[str, Any]:
    """The group with its values checked and in plain types."""
    checked = dict(group)
    for key in (*COMMON, *spec.defaults):
        value = plain(group[key])
        still = key == "lr" and type(value) in (int, float) and value == 0  # only a configuration refuses it
        checked[key] = 0.0 if still else check_value(f"{spec.name}.{key}", value)
    if checked.get("initial_lr") is not None:
        checked["initial_lr"] = plain(checked["initial_lr"])
    if checked["cautious"] and spec.writes:
        raise ConfigError(
            f"{spec.name}.cautious", True, f"{spec.name} writes its weights itself: false is all it can do"
        )
    asked, possible = checked["implementation"], kernels.possible(spec)
    if asked != "auto" and asked not in possible:
        raise ConfigError(f"{spec.name}.implementation", asked, f"{spec.name} has auto, {', '.join(possible)}")
    return checked


def _refuse_sparse(grad: Tensor) -> None:
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"a gradient is sparse ({grad.layout}): build the embedding with sparse=False, these rules need dense ones"
        )


def _decay(group: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """(factor on the weights, coefficient of the weights in the gradient), None where there is none."""
    wd, lr = group["weight_decay"], group["lr"]
    if wd == 0:
        return None, None
    if group["weight_decay_mode"] == "l2":
        return None, wd
    if group["weight_decay_mode"] == "independent":
        return 1 - lr / (group.get("initial_lr") or lr) * wd if lr else None, None
    return 1 - lr * wd, None
