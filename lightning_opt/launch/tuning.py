"""Tuned values as Hydra's config store sees them: `optional tuned: <optimizer>/<model>_<scale>_<schedule>`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hydra.core.config_store import ConfigNode, ConfigStore
from omegaconf import OmegaConf

from lightning_opt.plan import TunedRecord, tuned, tuned_optimizers, tuned_records


def register_tuned(scales: Iterable[str], schedules: Iterable[str]) -> None:
    """Puts plan's tables where the primary configuration finds them; a table is read when its optimizer is chosen.

    A record's own schedule comes with it where the schedule is `auto`, and only there: one that the user chose stays.
    `tuned=<optimizer>/<model>_<scale>` takes the other values of any record.

    Args:
        scales: every scale there is, for records that hold at any.
        schedules: every choice of a schedule.
    """
    tables = {name: _Table(name, tuple(scales), tuple(schedules)) for name in tuned_optimizers()}
    ConfigStore.instance().repo["tuned"] = tables


def chosen_record(choices: Mapping[str, Any]) -> TunedRecord | None:
    """The record that Hydra's `runtime.choices` took; None where there is none."""
    optimizer, _, cell = str(choices.get("tuned") or "").partition("/")
    model, _, scale = cell.removesuffix(f"_{choices.get('schedule')}").rpartition("_")
    return tuned(optimizer, model, scale)


class _Table(dict[str, tuple[TunedRecord, bool]]):
    """One optimizer's choices: file name -> record, and whether its schedule comes with it. Read at the first look."""

    def __init__(self, optimizer: str, scales: tuple[str, ...], schedules: tuple[str, ...]) -> None:
        self._optimizer, self._scales, self._schedules = optimizer, scales, schedules

    def _read(self) -> None:
        if len(self):
            return
        exact_last = sorted(tuned_records(self._optimizer), key=lambda record: "any" not in record.scales)
        for record in exact_last:
            for scale in filter(record.at, self._scales):
                for ending in ("", *(f"_{schedule}" for schedule in self._schedules)):
                    self[f"{record.model}_{scale}{ending}.yaml"] = record, ending == "_auto"

    def __contains__(self, name: object) -> bool:
        self._read()
        return super().__contains__(name)

    def keys(self) -> Any:
        """The choices, as files."""
        self._read()
        return super().keys()

    def __getitem__(self, name: str) -> Any:
        record, with_schedule = super().__getitem__(name)
        values = record.values if with_schedule else _without_schedule(record.values)
        return ConfigNode(name, OmegaConf.create(_nested(values)), f"tuned/{self._optimizer}", "_global_", "tuned")


def _without_schedule(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not key.startswith("schedule.")}


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree
