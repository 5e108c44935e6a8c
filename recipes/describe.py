"""The page of an optimizer, made from its own file, configuration and tuned values.

``python -m recipes.describe NAME``
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import signal
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lightning_opt.optim.catalogue import OPTIMIZERS
from lightning_opt.plan import ConfigError, TunedRecord, one_of, tuned_records
from lightning_opt.plan.errors import show
from lightning_opt.plan.rule_facts import TABLE

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf" / "optimizer"
PAGES = ROOT / "docs" / "optimizers"
# Operations per byte that an H100 SXM5 can do: 67 TFLOP/s in float32 and 989 in bfloat16 on tensor cores, 3.35 TB/s
# (NVIDIA's data sheet).
BALANCE, TENSOR_BALANCE = 20, 295
_HEADINGS = {"Tuning": "Tuning", "Traps": "Traps", "What differs": "What differs from others"}
_WRITTEN = "*Written by `python -m recipes.describe --write`: change the files it is made from, not this one.*"
_EXAMPLES = """examples:
  python -m recipes.describe lion            # its page, on the terminal
  python -m recipes.describe --write         # every page into docs/optimizers, and the list of all
  python -m recipes.describe --write muon    # one of them"""


def main(arguments: list[str] | None = None) -> int:
    """Shows or writes pages; 0, or 2 for a name that does not exist."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.describe",
        description="What an optimizer does, costs and wants: its page.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(names())}")
    parser.add_argument("--write", action="store_true", help="write docs/optimizers instead")
    asked = parser.parse_args(arguments)
    for name in asked.names:
        if name not in names():
            print(ConfigError("optimizer", name, one_of(name, names())), file=sys.stderr)
            return 2
    if not asked.names and not asked.write:
        print(f"name one of {', '.join(names())}, or say --write for all", file=sys.stderr)
        return 2
    for name in asked.names or names():
        text = page(name)
        if asked.write:
            (PAGES / f"{name}.md").write_text(text, encoding="utf-8")
        else:
            print(text)
    if asked.write:
        (PAGES / "README.md").write_text(index(), encoding="utf-8")
        TABLE.write_text(rule_table(), encoding="utf-8")
    return 0


def names() -> list[str]:
    """Every optimizer that has a configuration."""
    return sorted(file.stem for file in CONF.glob("*.yaml"))


def rule_table() -> str:
    """What `plan` must know of every rule, one line each, in JSON."""
    from lightning_opt.optim.catalogue import find_rule
    from lightning_opt.optim.groups import facts_of

    rows = []
    for name in sorted(OPTIMIZERS):
        told = {key: value for key, value in asdict(facts_of(find_rule(name))).items() if value and key != "name"}
        rows.append(f"  {json.dumps(name)}: {json.dumps(told)}")
    return "{\n" + ",\n".join(rows) + "\n}\n"


def page(name: str) -> str:
    """The page of one optimizer, Markdown."""
    title, body = story(name)
    parts = [f"# {title}", _use(name), body, _cost(name), _settings(name), _tuned(name), _WRITTEN]
    return "\n\n".join(part for part in parts if part) + "\n"


def story(name: str) -> tuple[str, str]:
    """Title and text from the docstring of the optimizer's file, or from the YAML where it is made of rules."""
    file = ROOT / "lightning_opt" / "optim" / f"{name}.py"
    if not file.exists():
        title = re.split(r"\. |\n\n", _head(name))[0]
        return " ".join(title.split()), "\n".join(["## The rules", "", *_parts(name)])
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or name
    title, _, rest = text.partition("\n\n")
    blocks = [block.strip("\n") for block in re.split(rf"\n\s*\n|(?<=\.)\s+(?=(?:{'|'.join(_HEADINGS)}):)", rest)]
    return " ".join(title.split()), "\n\n".join(["## The rule", *map(_block, blocks)])


def _parts(name: str) -> list[str]:
    """The rules that a configuration is made of, one line each, with the values that they run with."""
    from lightning_opt.optim.catalogue import find_rule

    values = yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))
    lines = []
    for part, given in {**values.get("phases", {}), **values["roles"]}.items():
        if not (given := dict(given)).get("rule"):
            continue
        rule, until = given.pop("rule"), given.pop("until", None)
        common = {key: values[key] for key in find_rule(rule).defaults if key in values}
        told = ", ".join(f"{key} {_brief(value)}" for key, value in {**common, **given}.items())
        lines.append(f"- {part}{f', until {until}' if until else ''}: [{rule}]({rule}.md), {told}")
    return lines


def _block(text: str) -> str:
    """One paragraph of a docstring; what opens with `Tuning:` and the like gets a heading of its own."""
    word, colon, rest = text.partition(":")
    if colon and word in _HEADINGS:
        return f"## {_HEADINGS[word]}\n\n{_opened(rest.strip())}"
    return text


def _opened(text: str) -> str:
    """With a capital where it opens with a word; a shorter one than these may be a symbol."""
    return re.sub(r"^(a|as|by|if|in|no|of|on|to|[a-z]{3,})\b", lambda first: first[0].capitalize(), text)


def _use(name: str) -> str:
    lines = [f"python train.py optimizer={name}"]
    where = [f"[settings](../../conf/optimizer/{name}.yaml)"]
    if name in OPTIMIZERS:
        lines.append(f"from lightning_opt.optim import {OPTIMIZERS[name]}    # a torch optimizer as any other")
        where.insert(0, f"[rule](../../lightning_opt/optim/{name}.py)")
        if (ROOT / "tests" / "reference" / f"{name}.py").exists():
            where.append(f"[its float64 reference](../../tests/reference/{name}.py)")
    return "\n".join(["```", *lines, "```"]) + "\n\n" + " · ".join(where)


# -- what a step costs ----------------------------------------------------------------------------------------------


def _cost(name: str) -> str:
    if name not in OPTIMIZERS:
        return ""
    found = _costs(name)
    operations = f"{found.operations:.3g}"
    if found.most > 1.01 * found.least:
        operations += f" (mean of 100 steps, {found.least:.3g} to {found.most:.3g})"
    rows = [
        *((f"state, {dtype}", f"{_trimmed(held)} bytes per weight") for dtype, held in found.state.items()),
        ("an ideal float32 step moves", f"{found.traffic} bytes per weight"),
        ("and computes", f"{operations} floating-point operations per weight"),
        ("bound by", bound(found.intensity)),
    ]
    m, n = found.shape
    note = f"State and operations are counted while the real optimizer steps a {m} x {n} matrix with its defaults"
    return "\n".join(
        [
            "## What a step costs",
            "",
            *_table(("", "per step"), rows),
            "",
            f"{note}; the bytes are weight, gradient and states of its shape, once a pass.",
        ]
    )


@cache
def _costs(name: str) -> Any:
    from lightning_opt.optim.costs import costs

    return costs(name)


def bound(intensity: float) -> str:
    """What limits a step of so many operations per byte, in words."""
    told = f"{intensity:.2g} operations per byte"
    if intensity < BALANCE:
        return f"memory: {told}; an H100 has time for {BALANCE} in float32"
    if intensity < TENSOR_BALANCE:
        times = f"an H100 has time for {BALANCE} and {TENSOR_BALANCE}"
        return f"arithmetic in float32, memory on tensor cores: {told}; {times}"
    return f"arithmetic: {told}; an H100 has time for {BALANCE} in float32, {TENSOR_BALANCE} on tensor cores"


# -- settings -------------------------------------------------------------------------------------------------------


def _settings(name: str) -> str:
    text = (CONF / f"{name}.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    said = dict(re.findall(r"^(\w+):[^#\n]*# *(.*)$", text, flags=re.MULTILINE))
    ours, told = _constructor(name)
    rows = [
        (f"`{key}`", ours.get(key, "–"), f"`{_brief(value)}`", said.get(key) or told.get(key, ""))
        for key, value in values.items()
        if key not in {"name", "roles"} and not isinstance(value, dict)
    ]
    cls = f"`{OPTIMIZERS[name]}(...)`" if name in OPTIMIZERS else "alone"
    parts = ["## Settings", "", _head(name), "", *_table(("", cls, f"`optimizer={name}`", ""), rows)]
    nested = {key: value for key, value in values.items() if isinstance(value, dict)}
    for key, value in nested.items():
        dumped = yaml.safe_dump({key: value}, sort_keys=False, default_flow_style=None, width=110).rstrip()
        parts += ["", "```yaml", dumped, "```"]
    return "\n".join(parts)


def _head(name: str) -> str:
    """The comment that opens a configuration: where its defaults come from."""
    lines = (CONF / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    taken = []
    for line in lines:
        if not line.startswith("#"):
            break
        taken.append(line.lstrip("# ").rstrip())
    return "\n".join(taken)


def _constructor(name: str) -> tuple[dict[str, str], dict[str, str]]:
    """Defaults of the class by argument, and what its docstring says of each."""
    if name not in OPTIMIZERS:
        return {}, {}
    from lightning_opt import optim

    cls = getattr(optim, OPTIMIZERS[name])
    spec = {**optim.base.COMMON, **optim.find_rule(name).defaults}
    given = {
        key: it.default
        for key, it in inspect.signature(cls).parameters.items()
        if it.default is not inspect.Parameter.empty
    }
    defaults = {key: f"`{_brief(value)}`" for key, value in {**spec, **given}.items()}
    arguments = (inspect.getdoc(cls) or "").partition("Args:\n")[2].partition("\n\n")[0]
    told = {}
    for entry in re.split(r"\n    (?=\w)", "\n" + arguments):
        keys, _, text = entry.strip().partition(":")
        told |= {key.strip(): " ".join(text.split()) for key in keys.split(",")}
    return defaults, told


# -- tuned values ---------------------------------------------------------------------------------------------------


def _tuned(name: str) -> str:
    records = tuned_records(name)
    parts = []
    ours = [record for record in records if record.measured != "published"]
    if ours:
        parts += ["", *_records(ours), "", f"Measured by this project: [{ours[0].source}](../../{ours[0].source})."]
    published = [record for record in records if record.measured == "published"]
    if published:
        source = published[0].source.rpartition(" ")[0]
        parts += [
            "",
            *_records(published),
            "",
            f"Published: {source}, one row per cell. `loss` is what the study reached with them on Paloma's C4 (nats "
            "per token, its own data and tokenizer). They are used for these models and scales, and refused for models "
            "outside 130M to 1.2B non-embedding parameters.",
        ]
    return "\n".join(["## Tuned values", *parts]) if parts else ""


def _records(records: list[TunedRecord]) -> list[str]:
    """What they have in common in one line, the rest as a table."""
    first = ["optimizer.lr", "optimizer.weight_decay", "optimizer.betas", "optimizer.eps"]
    keys = list(dict.fromkeys(key for record in records for key in record.values))
    keys = sorted(keys, key=lambda key: first.index(key) if key in first else len(first))
    missing = object()
    alike = [key for key in keys if len({str(record.values.get(key, missing)) for record in records}) == 1]
    told = ", ".join(f"{_short(key)} {_brief(records[0].values[key])}" for key in alike)
    keys = [key for key in keys if key not in alike]
    losses = ["loss"] if any(record.loss for record in records) else []
    rows = []
    for record in records:
        reached = [f"{record.loss:.4f}" if record.loss else "–"] if losses else []
        cells = [_brief(record.values[key]) if key in record.values else "–" for key in keys]
        rows.append((record.model, "/".join(record.scales), *reached, *cells))
    table = _table(("model", "scale", *losses, *map(_short, keys)), rows)
    return [f"In all cells: {told}.", "", *table] if told else table


def _short(key: str) -> str:
    return f"`{key.removeprefix('optimizer.')}`"


# -- words ----------------------------------------------------------------------------------------------------------


def index() -> str:
    """The list of all optimizers with what each costs."""
    rows = []
    for name in names():
        title = story(name)[0]
        link, what = f"[{name}]({name}.md)", _opened(title.partition(":")[2].strip() or title)
        if name not in OPTIMIZERS:
            rows.append((link, what, "", "", "", "", str(len(tuned_records(name)) or "")))
            continue
        found = _costs(name)
        limit = bound(found.intensity).partition(":")[0]
        held = _trimmed(found.state["float32"])
        cells = str(len(tuned_records(name)) or "")
        rows.append((link, what, held, str(found.traffic), f"{found.operations:.3g}", limit, cells))
    header = ("", "what it does", "state", "moves", "operations", "bound by", "tuned cells")
    words = "State and traffic in bytes per float32 weight, operations per weight and step, of a 512 x 2048 matrix."
    return "\n".join(["# Optimizers", "", words, "", *_table(header, rows), "", _WRITTEN, ""])


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    width = len(header)
    assert all(len(row) == width for row in rows)
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * width}"]
    return lines + [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]


def _brief(value: Any) -> str:
    return show(list(value) if isinstance(value, tuple) else value)


def _trimmed(number: float) -> str:
    return f"{number:.3f}".rstrip("0").rstrip(".")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` ends quietly
    sys.exit(main())
