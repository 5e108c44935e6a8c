"""Three corpora made on this machine, without any download: prose, code and worked mathematics.

Code: files of Python's standard library. Prose: Python's language reference (``pydoc_data.topics``), the descriptions
packages come with, and docstrings of the standard library's other files and of well-documented packages. No file
serves both, so a held-out code file is not half known from the prose. Nothing is imported that is read. The corpora
depend on the Python version and on the versions of ``PACKAGES``, and on nothing else.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from lightning_opt.data.cached import fingerprint
from lightning_opt.plan import ConfigError

CORPUS_BYTES = 2_600_000
SYMBOLIC_PROBLEMS = 1_200
# (import name, distribution): well documented, and brought by this project's own dependencies
PACKAGES = (
    ("numpy", "numpy"), ("sympy", "sympy"), ("torch", "torch"), ("transformers", "transformers"),
    ("lightning", "lightning"), ("torchmetrics", "torchmetrics"), ("networkx", "networkx"),
    ("matplotlib", "matplotlib"),
    ("sklearn", "scikit-learn"), ("scipy", "scipy"), ("pandas", "pandas"), ("datasets", "datasets"),
    ("huggingface_hub", "huggingface_hub"), ("hydra", "hydra-core"), ("rich", "rich"), ("fsspec", "fsspec"),
    ("nltk", "nltk"), ("mpmath", "mpmath"), ("jinja2", "jinja2"), ("peft", "peft"), ("accelerate", "accelerate"),
    ("psutil", "psutil"), ("more_itertools", "more-itertools"), ("joblib", "joblib"), ("tqdm", "tqdm"),
    ("PIL", "pillow"), ("dateutil", "python-dateutil"), ("lm_eval", "lm_eval"), ("grain", "grain"),
)  # fmt: skip
_SKIPPED_FOLDERS = frozenset(
    (
        "test", "tests", "testing", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "ensurepip",
        "turtledemo", "encodings",
    )
)  # fmt: skip
_PACKAGE_SHARE = 120_000
_DESCRIPTION_SHARE = 12_000


def identity() -> str:
    """Fingerprint of what the corpora are made from: Python, the packages used, and the code that makes them."""
    versions = [(name, _version(distribution)) for name, distribution in PACKAGES]
    here = Path(__file__).parent
    makers = [
        (here / name).read_text(encoding="utf-8") for name in ("embedded.py", "mathematics.py", "algebra_problems.py")
    ]
    return fingerprint("embedded", list(sys.version_info[:3]), versions, makers)


def make_corpora(folder: Path, val_fraction: float) -> None:
    """Writes ``X_train.jsonl`` and ``X_val.jsonl`` for X in prose, code and math, about 2.6 MB each together.

    Args:
        folder: exists.
        val_fraction: share of each corpus's bytes that is held out, in whole documents.

    Raises:
        ConfigError: this Python's standard library does not lie on disk as source.
    """
    from lightning_opt.data import mathematics

    sources = _by_hash(_standard_library())
    code, used = _code(sources)
    if not code:
        raise ConfigError("data.source", "embedded", "must have the standard library's .py files here; use data=files")
    rest = [path for path in sources if path not in used]
    _write(folder, "code", code, val_fraction)
    _write(folder, "prose", _limited(_prose(rest), CORPUS_BYTES), val_fraction)
    _write(folder, "math", mathematics.documents(20, CORPUS_BYTES, symbolic=SYMBOLIC_PROBLEMS), val_fraction)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _write(folder: Path, name: str, texts: Iterable[str], val_fraction: float) -> None:
    """Equal documents once, in an order that mixes the sources (by hash, so always the same); the first are held out.

    By bytes and not by drawing lots, because a few hundred code files would else give a validation set of any size.
    """
    documents = sorted(set(texts), key=_rank)
    left = val_fraction * sum(len(text) for text in documents)
    with (
        (folder / f"{name}_val.jsonl").open("w", encoding="utf-8") as val,
        (folder / f"{name}_train.jsonl").open("w", encoding="utf-8") as train,
    ):
        for text in documents:
            (val if left > 0 else train).write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            left -= len(text)


def _rank(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8, person=b"order").digest()


def _limited(texts: Iterable[str], size: int) -> Iterator[str]:
    """Distinct texts until ``size`` bytes are reached."""
    seen: set[str] = set()
    for text in texts:
        if text not in seen:
            seen.add(text)
            size -= len(text.encode("utf-8", "replace"))
            yield text
            if size <= 0:
                return


def _python_files(root: Path) -> Iterator[Path]:
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(
            name for name in inner if name not in _SKIPPED_FOLDERS and not name.startswith((".", "_vendor"))
        )
        for name in sorted(names):
            if name.endswith(".py"):
                yield Path(folder, name)


def _standard_library() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in _python_files(root):
        if not path.name.startswith("_sysconfigdata"):  # describes the machine, not the language
            yield path.relative_to(root).as_posix(), path


def _by_hash(files: Iterable[tuple[str, Path]]) -> dict[Path, str]:
    """path -> relative name, in an order that depends on the relative names alone."""
    return {path: name for name, path in sorted(files, key=lambda entry: _rank(entry[0]))}


def _source(path: Path) -> str | None:
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None


def _code(sources: dict[Path, str]) -> tuple[list[str], set[Path]]:
    texts, used, size = [], set(), 0
    for path in sources:
        text = _source(path)
        if text is not None and 1_000 < len(text) < 40_000:
            texts.append(text)
            used.add(path)
            size += len(text.encode("utf-8", "replace"))
            if size >= CORPUS_BYTES:
                break
    return texts, used


def _prose(standard_library: list[Path]) -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from (topics[name].strip() for name in sorted(topics))
    for _, distribution in PACKAGES:
        description = _description(distribution)
        if description:
            yield description[:_DESCRIPTION_SHARE]
    for name, _ in PACKAGES:
        yield from _limited(_package_docstrings(name), _PACKAGE_SHARE)
    for path in standard_library:
        yield from _docstrings(path)


def _description(distribution: str) -> str:
    try:
        metadata = importlib.metadata.metadata(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
    return (metadata.json.get("description") or "").strip()


def _package_docstrings(name: str) -> Iterator[str]:
    spec = importlib.util.find_spec(name)
    for location in spec.submodule_search_locations or [] if spec else []:
        root = Path(location)
        for path in _by_hash((path.relative_to(root).as_posix(), path) for path in _python_files(root)):
            yield from _docstrings(path)


def _docstrings(path: Path) -> Iterator[str]:
    """Docstrings of 160 characters and more, each under the name it documents."""
    text = _source(path)
    if text is None or '"""' not in text:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's code
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) >= 160:
                yield f"{getattr(node, 'name', path.stem)}\n\n{docstring}"
