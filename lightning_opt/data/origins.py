"""Where a corpus comes from: files of a data set on the hub at one commit, or of a folder here.

The hub's files are read as files, by ranges over HTTP, whatever script or viewer a data set has: this reads
script-based sets that `datasets` refuses, and only as much of each file as is used. Waiting and trying again (429,
5xx, lost connections; 1, 2, 4 ... 60 s, or what Retry-After says) is huggingface_hub's own.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import math
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lightning_opt.data.text_files import SUFFIXES, suffix_of
from lightning_opt.plan import ConfigError, hub_said

TRIES_AT_START, TRIES = 2, 8
BLOCK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Origin:
    """One corpus's place.

    Attributes:
        field: the config field an error names, for example ``data.corpora.dclm``.
        repo: data set on the hub, or None.
        revision: commit of ``repo``.
        folder: folder here, or None.
    """

    field: str
    repo: str | None = None
    revision: str | None = None
    folder: str | None = None

    @property
    def place(self) -> str:
        """What a person calls it."""
        return self.repo if self.folder is None else self.folder  # type: ignore[return-value]

    def open(self, name: str, size: int) -> IO[bytes]:
        """Opens one of its files for reading and seeking.

        Args:
            name: as `files` lists it.
            size: bytes, as `files` lists them.

        Raises:
            ConfigError: the file is not as it was listed, or may not be read.
        """
        if self.folder is None:
            return io.BufferedReader(_Ranges(self, name, size), BLOCK_BYTES)
        path = Path(self.folder, name)
        if not path.is_file() or path.stat().st_size != size:
            how = f"must still be there with {size} bytes, as when it was listed"
            raise ConfigError(self.field, str(path), f"{how}; another data.path lists all anew")
        return path.open("rb")


def locate(name: str, entry: Mapping[str, Any], root: str | None) -> Origin:
    """The origin of ``data.corpora.<name>``; on the hub, the commit that its revision means today.

    Args:
        name: the corpus.
        entry: holds ``repo`` (and ``revision``) or ``path``.
        root: a folder of downloaded copies that stands for the hub, ``<root>/<repo>/<files>``; None: the hub itself.

    Raises:
        ConfigError: no such folder or data set, or no access to it.
        HubLost: the hub does not answer.
    """
    field = f"data.corpora.{name}"
    folder = entry.get("path") or (str(Path(root, entry["repo"])) if root else None)
    if folder is not None:
        if not Path(folder).is_dir():
            where = f"{field}.path" if entry.get("path") else "data.root"
            raise ConfigError(where, folder, f"must be an existing folder (of corpus {name})")
        return Origin(field, folder=folder)
    repo, revision = entry["repo"], entry.get("revision") or "main"
    from huggingface_hub import constants

    url = f"{constants.ENDPOINT}/api/datasets/{repo}/revision/{urllib.parse.quote(revision, safe='')}"
    return Origin(field, repo=repo, revision=_get(field, repo, url, TRIES_AT_START).json()["sha"])


def files(origin: Origin, patterns: Sequence[str]) -> list[tuple[str, int]]:
    """(name, bytes) of the files that match any of the patterns (``*`` also crosses ``/``), sorted by name.

    Raises:
        ConfigError: none matches; or the data set is gated and we have no access.
        HubLost: the hub does not answer.
    """
    if origin.folder is not None:
        paths = [path for path in Path(origin.folder).rglob("*") if path.is_file()]
        listed = [(path.relative_to(origin.folder).as_posix(), path.stat().st_size) for path in paths]
    else:
        listed = _tree(origin)
    found = sorted((name, size) for name, size in listed if any(fnmatch.fnmatchcase(name, p) for p in patterns))
    readable = [(name, size) for name, size in found if size and suffix_of(Path(name))]
    if not readable:
        expected = f"must name files of {origin.place} that end in {', '.join(SUFFIXES)}"
        raise ConfigError(f"{origin.field}.files", list(patterns), expected)
    if origin.folder is None:
        with origin.open(*readable[0]) as first:  # a gated set shows its list to everybody, its files to few
            first.read(1)
    return readable


def in_reading_order(listed: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """The files in an order that is the same everywhere and by chance, large ones sooner, each as its size deserves.

    So any first part of it is a fair sample of the whole (weighted sampling without replacement; Efraimidis and
    Spirakis 2006).
    """

    def key(file: tuple[str, int]) -> float:
        draw = int.from_bytes(hashlib.blake2b(file[0].encode(), digest_size=6).digest(), "big")
        return -math.log((draw + 1) / (2**48 + 1)) / file[1]

    return sorted(listed, key=key)


def _tree(origin: Origin) -> list[tuple[str, int]]:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    assert origin.repo
    try:
        tree = HfApi().list_repo_tree(origin.repo, recursive=True, revision=origin.revision, repo_type="dataset")
        return [(entry.path, entry.size) for entry in tree if isinstance(entry, RepoFile)]
    except Exception as error:
        raise _said(origin.field, origin.repo, error) from None


def _get(field: str, repo: str, url: str, tries: int, **headers: str) -> Any:
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff, logging

    logging.set_verbosity_error()  # it would tell of each try, in two lines with a long address
    try:
        headers = {**build_hf_headers(), **headers}
        response = http_backoff("GET", url, max_retries=tries, max_wait_time=60, headers=headers, timeout=60)
        hf_raise_for_status(response)
    except Exception as error:
        raise _said(field, repo, error) from None
    return response


def _said(field: str, repo: str, error: Exception) -> Exception:
    """What the hub meant; anything that is no word of the hub's goes on as it is."""
    instead = "a downloaded copy can stand for the hub: data.root=FOLDER"
    return hub_said(field, "datasets", repo, error, instead) or error


class _Ranges(io.RawIOBase):
    """A file on the hub, fetched piece by piece as it is read."""

    def __init__(self, origin: Origin, name: str, size: int) -> None:
        from huggingface_hub import hf_hub_url

        assert origin.repo
        self._origin, self._size, self._at = origin, size, 0
        self._url = hf_hub_url(origin.repo, name, repo_type="dataset", revision=origin.revision)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._at)
        if wanted <= 0:
            return 0
        spread = f"bytes={self._at}-{self._at + wanted - 1}"
        content = _get(self._origin.field, self._origin.repo or "", self._url, TRIES, range=spread).content
        if len(content) != wanted:
            raise OSError(f"{self._url}: asked for {spread}, got {len(content)} bytes")
        buffer[:wanted] = content
        self._at += wanted
        return wanted
