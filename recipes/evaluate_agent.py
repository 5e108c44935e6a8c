"""Scores a served checkpoint as a tool-calling agent: tau2's retail and airline desks, pass^k and tool-call success.

    vllm serve runs/NAME/RUN/model --served-model-name mine --enable-auto-tool-choice --tool-call-parser hermes
    python -m recipes.evaluate_agent url=http://127.0.0.1:8000/v1 model=mine tau2=~/tau2-bench/.venv/bin/python
    python -m recipes.evaluate_agent url=http://127.0.0.1:8000/v1 domains=airline trials=1 tasks=5   # a first look
    python -m recipes.evaluate_agent url=http://127.0.0.1:8000/v1 user=llama user_url=http://127.0.0.1:8001/v1 \\
        judge=llama judge_url=http://127.0.0.1:8001/v1                                               # no OpenAI key

Needs Sierra's tau2 1.x in a Python 3.12 environment of its own (docs/agents.md). Keys come from the environment
(OPENAI_API_KEY for tau2's own user and judge, HOSTED_VLLM_API_KEY for endpoints given by address) and are never
written. The same command again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from lightning_opt.evaluation.agents.settings import AgentSettings, parse_words
from lightning_opt.plan import ConfigError


def parse(arguments: list[str] | None = None) -> AgentSettings:
    """The command line's ``name=value`` words, checked.

    Raises:
        ConfigError: see `parse_words`.
    """
    about, _, rest = (__doc__ or "").partition("\n\n")
    names = (AgentSettings.__doc__ or "").partition("Attributes:\n")[2].rstrip()
    parser = argparse.ArgumentParser(
        prog="python -m recipes.evaluate_agent",
        description=about,
        epilog=f"examples:\n{rest}\nnames:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="name=value", help="url is needed, the others have defaults")
    return parse_words(parser.parse_args(arguments).words)


def show(folder: Path, summary: dict[str, Any]) -> None:
    """Prints the scores as a table."""
    from rich.console import Console
    from rich.table import Table

    tasks = {name: entry for name, entry in summary.items() if isinstance(entry, dict)}
    most = max(int(k) for entry in tasks.values() for k in entry["pass"])
    note = "" if summary["comparable"] else " (not comparable with published numbers)"
    table = Table(title=f"pass^k, {summary['trials']} trials a task{note}", title_justify="left")
    for column in ("task", "pass^1", "stderr", f"pass^{most}", "idle agent", "tool calls that ran", "n"):
        table.add_column(column, justify="left" if column == "task" else "right", no_wrap=column == "task")
    for name, entry in tasks.items():
        passes = {int(k): part["value"] for k, part in entry["pass"].items()}
        calls = (
            f"{_number(entry['tool_call_success'])} of {entry['tool_calls']}" if entry["tool_calls"] else "none made"
        )
        numbers = (entry["value"], entry["stderr"], passes.get(most), entry["chance"])
        table.add_row(name, *map(_number, numbers), calls, str(entry["n"]))
    reasons = [f"{name}: {entry['why_not']}" for name, entry in tasks.items() if "why_not" in entry]
    table.caption, table.caption_justify = "; ".join(reasons) or None, "left"
    Console().print(table)
    print(folder / "results.json")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def main(arguments: list[str] | None = None) -> int:
    """Entry point; 0 done, 1 failed on the way, 2 wrong input or nothing to run it with, 130 interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        settings = parse(arguments)
        from lightning_opt.evaluation.agents import evaluate_agent

        show(*evaluate_agent(settings))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
