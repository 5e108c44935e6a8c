"""lightning_opt: optimizers, Lightning callbacks and Hydra recipes to train language models and compare optimizers fairly."""

__version__ = "0.1.0"
