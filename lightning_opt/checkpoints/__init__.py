"""Checkpoints that can be trusted: folders with a manifest, written beside, synced, read back, renamed."""

from lightning_opt._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "manifest": ["Checkpoint", "Damaged", "find", "newest_good", "read_manifest", "verify"],
        "contents": ["read"],
        "retention": ["Retention", "bytes_needed"],
        "writing": ["clear_leftovers", "set_aside"],
        "store": ["Store"],
    },
)
