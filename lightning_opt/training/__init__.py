"""Training with Lightning: the module, the data module, the run's logger, and the fit."""

from lightning_opt._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "module": ["PretrainModule"],
        "datamodule": ["TokenDataModule"],
        "run_logger": ["RunLogger"],
        "precision": ["BFloat16Parameters", "choose_device", "choose_precision"],
        "trainer": ["FitResult", "fit", "prepare"],
    },
)
