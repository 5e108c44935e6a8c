"""An HTML page taken apart with the standard library's parser."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from lightning_opt import reports

VOID = {"meta", "link", "br", "hr", "img", "input"}
BUILT = ("report.html", "report.md", "MODEL_CARD.md")
BROKEN = "could not be drawn"


class Page(HTMLParser):
    """Collects what the tests ask about, and every tag that does not match."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.faults: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.words: list[str] = []
        self._table = ""
        self._cell: list[str] | None = None
        self.feed(text)
        self.close()
        self.faults += [f"never closed: {tag}" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        key = dict(attrs).get("id") or ""
        if key.startswith("table-"):
            self._table = key.removeprefix("table-")
            self.tables[self._table] = []
        if tag == "tr" and self._table:
            self.tables[self._table].append([])
        if tag in ("td", "th") and self._table:
            self._cell = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1] != tag:
            self.faults.append(f"</{tag}> inside {self.open[-3:]}")
        else:
            self.open.pop()
        if tag in ("td", "th") and self._cell is not None:
            self.tables[self._table][-1].append("".join(self._cell).strip())
            self._cell = None
        if tag == "table":
            self._table = ""

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self._cell is not None:
            self._cell.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).replace("\N{NO-BREAK SPACE}", " ").split())


def drawn(folder: Path) -> Page:
    reports.write(folder)
    return Page((folder / "report.html").read_text(encoding="utf-8"))
