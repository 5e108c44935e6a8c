"""What a search's command sweeps: values to search over, group choices, and seeds that repeat each point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import Override

from lightning_opt.launch.compose import Composer
from lightning_opt.launch.names import is_group_choice


@dataclass(frozen=True)
class Swept:
    """A command's overrides, sorted by what a search does with them; of two for one key the last counts.

    Attributes:
        fixed: overrides of one value, as Hydra writes them.
        seeds: ``seed=N`` for each repeat of a point; one empty line where no seed is swept.
        groups: the swept group choices, by key.
        fields: the other swept overrides, by key.
    """

    fixed: list[str]
    seeds: list[str]
    groups: dict[str, Override]
    fields: dict[str, Override]

    @classmethod
    def of(cls, composer: Composer, overrides: Sequence[Override]) -> Swept:
        """Sorts the overrides of a command."""
        found = cls([], [""], {}, {})
        for key, override in {override.get_key_element(): override for override in overrides}.items():
            if not override.is_sweep_override():
                found.fixed.append(f"{key}={override.get_value_element_as_str()}")
            elif key == "seed" and override.is_discrete_sweep():
                found.seeds[:] = [f"seed={text}" for text in texts_of(override)]
            elif is_group_choice(override, composer):
                found.groups[key] = override
            else:
                found.fields[key] = override
        return found


def texts_of(override: Override) -> list[str]:
    """The values that a swept override lists, as Hydra writes them."""
    return list(override.sweep_string_iterator())


def value_of_text(composer: Composer, key: str, text: str) -> Any:
    """The value that ``key=text`` sets."""
    return composer.parse([f"{key}={text}"])[0].value()
