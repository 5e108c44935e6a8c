"""The only home of Hydra and OmegaConf: from a command line to checked plain dictionaries, one run each."""

from lightning_opt._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "entry": ["main"],
        "compose": ["Composer"],
        "preflight": ["Checker", "Command", "Job", "check_command", "check_lists", "compose_checked"],
        "resolve": ["plain_config", "redact", "saved_text"],
        "explicit": ["run_jobs"],
        "sweep": ["run_sweep"],
        "task": ["instantiate", "run_job"],
    },
)
