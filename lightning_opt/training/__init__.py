"""Training with Lightning: the module, the data module, the run's logger, and the fit."""

from lightning_opt._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "module": ["PretrainModule"],
        "datamodule": ["TokenDataModule"],
        "group": ["Group", "joined"],
        "run_logger": ["RunLogger"],
        "loggers": ["GuardedLogger", "wandb_logger"],
        "precision": ["BFloat16Parameters", "choose_device", "choose_precision"],
        "trainer": ["FitResult", "fit", "prepare"],
    },
)
