"""Stand-in: tasks from where tau2 looks for them, as plain objects."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def raw_tasks(domain: str, number: int | None) -> list[dict[str, Any]]:
    path = Path(os.environ["TAU2_DATA_DIR"]) / "tau2" / "domains" / domain / "tasks.json"
    return json.loads(path.read_text("utf-8"))[:number]


def get_tasks(name: str, split: str | None = None, ids: Any = None, number: int | None = None) -> list[Any]:
    if split != "base":
        raise ValueError(f"Invalid task split name: {split}. Valid splits are: base")
    found = []
    for task in raw_tasks(name, number):
        wanted = task["evaluation_criteria"]
        basis = [SimpleNamespace(value=value) for value in wanted["reward_basis"]]
        criteria = SimpleNamespace(nl_assertions=wanted["nl_assertions"], reward_basis=basis)
        found.append(SimpleNamespace(id=task["id"], evaluation_criteria=criteria))
    return found
