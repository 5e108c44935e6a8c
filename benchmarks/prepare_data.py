"""How fast is text made into tokens on disk? `recipes.prepare_data` beside Hugging Face datasets.

    python -m benchmarks.prepare_data            60 MB of text in 8 files, five rounds; about 10 minutes on 2 cores
    python -m benchmarks.prepare_data --quick    does it run here?

The same jsonl files, the same tokenizer, the same number of processes, one thread each, everything in turn:

- *ours*: what the recipe does, from files to sealed shards, with its processes' start
- *datasets, map*: ``Dataset.map(batched=True, num_proc=...)`` over rows that lie ready as Arrow
- *datasets, load and map*: the same from the files on, as ours

Without caches of an earlier round. Text and tokenizer are what is given, else the embedded corpora and a byte-level BPE
of 4096 entries trained on them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # of every contender: a process is one thread
os.environ["RAYON_NUM_THREADS"] = "1"

from benchmarks.record import Page, Table, keep, machine
from benchmarks.turns import spread
from lightning_opt.data import preparing
from lightning_opt.data.embedded import make_corpora
from lightning_opt.data.text_files import read_documents, suffix_of
from lightning_opt.data.tokenizer import find_eos, for_documents, save_trained, tokenizer_file, train_tokenizer
from lightning_opt.plan import available_cpus

FILES = 8


def documents(folder: Path) -> Iterator[str]:
    """Of all text files of a folder, again and again."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and suffix_of(path))
    while True:
        for path in paths:
            yield from read_documents(path)


def write_texts(source: Path, folder: Path, size: int) -> tuple[int, int]:
    """``FILES`` jsonl files of ``size`` bytes of text in all; (bytes, documents)."""
    written = count = 0
    texts = documents(source)
    for number in range(FILES):
        with (folder / f"part-{number:05d}.jsonl").open("w", encoding="utf-8") as file:
            while written < size * (number + 1) / FILES:
                text = next(texts)
                file.write(json.dumps({"text": text, "id": count}) + "\n")
                written, count = written + len(text.encode("utf-8")), count + 1
    return written, count


def ours(texts: Path, tokenizer: Path, processes: int, place: Path) -> int:
    """Tokens of the shards."""
    config = {
        "source": "prepared",
        "path": str(place / "shards"),
        "corpora": {"texts": {"path": str(texts), "val_fraction": 0.01}},
        "tokenizer": {"path": str(tokenizer)},
    }
    (made,) = preparing.prepare(config, tokens=10**12, processes=processes)
    return sum(made.tokens.values())


def loaded(texts: Path, place: Path) -> Any:
    import datasets

    files = sorted(map(str, texts.glob("*.jsonl")))
    return datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(place / "cache"))


def mapped(rows: Any, tokenizer: Path, processes: int, place: Path) -> int:
    """Tokens of the mapped data set."""
    encoder = for_documents(tokenizer)
    eos = encoder.token_to_id(find_eos(tokenizer))

    def encode(batch: dict[str, list]) -> dict[str, list]:
        encoder.encode_special_tokens = True  # lost on the way to a worker
        encodings = encoder.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"ids": [[*encoding.ids, eos] for encoding in encodings]}

    out = rows.map(
        encode,
        batched=True,
        num_proc=processes,
        remove_columns=rows.column_names,
        load_from_cache_file=False,
        cache_file_name=str(place / "tokens.arrow"),
    )
    return int(sum(len(chunk.values) for chunk in out.data.column("ids").chunks))


def seconds(contender: Callable[[Path], int]) -> tuple[float, int]:
    with tempfile.TemporaryDirectory() as place:
        began = time.perf_counter()
        tokens = contender(Path(place))
        return time.perf_counter() - began, tokens


def measure(args: argparse.Namespace, texts: Path, tokenizer: Path, size: int) -> list[dict[str, Any]]:
    """A row for each contender; the first round is to warm up."""
    with tempfile.TemporaryDirectory() as ready:
        rows = loaded(texts, Path(ready))
        contenders: dict[str, Callable[[Path], int]] = {
            "ours": lambda place: ours(texts, tokenizer, args.processes, place),
            "datasets, map": lambda place: mapped(rows, tokenizer, args.processes, place),
            "datasets, load and map": lambda place: mapped(loaded(texts, place), tokenizer, args.processes, place),
        }
        spent: dict[str, list[float]] = {name: [] for name in contenders}
        tokens: dict[str, int] = {}
        order, draw = list(contenders), random.Random(0)
        for number in range(args.rounds + 1):
            draw.shuffle(order)
            for name in order:
                took, tokens[name] = seconds(contenders[name])
                spent[name] += [took] if number else []
        assert len(set(tokens.values())) == 1, tokens
    return [
        {
            "contender": name,
            "processes": args.processes,
            "M tokens": tokens[name] / 1e6,
            "MB of text/s": spread([size / 1e6 / took for took in spent[name]], 2),
            "M tokens/s": spread([tokens[name] / 1e6 / took for took in spent[name]], 3),
            "ours is faster by": spread([t / o for t, o in zip(spent[name], spent["ours"], strict=True)], 2),
        }
        for name in contenders
    ]


def main() -> None:
    """Measures, prints and keeps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=None, help="folder of text files (the embedded corpora)")
    parser.add_argument(
        "--tokenizer", default=None, help="tokenizer.json, its folder or a hub id (trained on the text)"
    )
    parser.add_argument("--processes", type=int, default=None, help="of each contender (one per CPU)")
    parser.add_argument("--megabytes", type=float, default=None, help="of text (60)")
    parser.add_argument("--rounds", type=int, default=None, help="of all contenders (5)")
    parser.add_argument("--quick", action="store_true", help="2 MB, one round")
    parser.add_argument("--out", type=Path, default=None, help="folder (benchmarks/results)")
    args = parser.parse_args()
    args.processes = args.processes or available_cpus()
    args.rounds = args.rounds or (1 if args.quick else 5)
    megabytes = args.megabytes or (2 if args.quick else 60)
    where = machine()
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for inner in ("source", "texts", "tokenizer"):
            (folder / inner).mkdir()
        if args.text is None:
            make_corpora(folder / "source", 0.01)
        source = args.text or folder / "source"
        size, _ = write_texts(source, folder / "texts", int(megabytes * 1e6))
        if args.tokenizer is None:
            some = (text for _, text in zip(range(2000), documents(source), strict=False))
            save_trained(train_tokenizer(some, 4096), folder / "tokenizer")
        tokenizer = tokenizer_file(args.tokenizer or folder / "tokenizer")
        rows = measure(args, folder / "texts", tokenizer, size)
    note = f"{megabytes:g} MB of text in {FILES} files, {args.rounds} rounds; median (10-90 %), ratios within a round."
    about = "Everything in turn, in shuffled order, one thread a process; see the module's text."
    page = Page("prepare_data", "Preparing data", about, [Table("Text to tokens on disk", rows, note)])
    keep(page, where, args.out, suffix="-quick" if args.quick else "")


if __name__ == "__main__":
    main()
