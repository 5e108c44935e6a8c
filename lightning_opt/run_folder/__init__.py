"""The run folder: names, claiming, status, records and the summary. Everything above talks through it (no torch)."""

from lightning_opt._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "folder": ["FolderRefused", "RunFolder", "adoptable", "claim", "config_hash", "starts_elsewhere"],
        "status": ["FINISHED_STATES", "STATES", "Status", "owner_is_gone", "owner_seems_gone", "read_status"],
        "json_lines": ["NoJson", "read_json_lines"],
        "records": [
            "METRIC_COLUMNS",
            "append_event",
            "append_text",
            "late_events",
            "read_events",
            "read_json",
            "read_metrics",
            "write_json",
            "write_text",
        ],
        "endings": ["Diverged", "ExitCode", "record_end"],
        "summary": ["summarize"],
        "sweep": ["SweepFolder", "SweepJob", "claim_sweep", "to_go_on", "job_name", "short_names"],
    },
)
