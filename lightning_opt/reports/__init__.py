"""Reports: reads a run folder and writes what a person wants to see of it (HTML, Markdown, model card). Never torch."""

from lightning_opt._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "page": ["write"],
        "reading": ["Run", "read"],
        "canvas": ["Figure"],
        "tables": ["Table"],
        "commands": ["next_commands"],
    },
)
