"""Texts the data tests share."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = [
    "the", "a", "blue", "red", "old", "new", "house", "tree", "river", "runs", "stands", "falls", "over", "under",
    "with", "12", "345", "naïve", "数", "🙂", "\n\n", "def", "return", "x", "=", "y", "+", "1",
]  # fmt: skip


def make_texts(count: int, start: int = 0) -> list[str]:
    """Distinct documents of some 30 words, the same every time."""
    return [
        f"document {k}: " + " ".join(WORDS[(k * 7 + j * j * 3 + j * k) % len(WORDS)] for j in range(30))
        for k in range(start, start + count)
    ]


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts), encoding="utf-8")
