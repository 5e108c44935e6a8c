"""Text in, shuffled token windows out: files, tokenizer, shards, mixture, loader.

``check`` needs no torch; ``build`` gives everything a run needs; ``loader`` makes batches of it.
"""

from lightning_opt._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "checks": ["check"],
        "token_data": ["TokenData", "CorpusInfo", "build"],
        "batches": ["BatchLoader", "loader"],
        "mixture": ["Mixture", "ValidationWindows"],
        "shards": ["Shards", "open_shards"],
        "writing": ["write_shards"],
        "tokenizer": ["load_tokenizer", "token_bytes", "train_tokenizer"],
        "text_files": ["CorpusFiles", "discover", "read_documents"],
        "embedded": ["make_corpora"],
    },
)
