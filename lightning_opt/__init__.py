"""Optimizers, Lightning callbacks and Hydra recipes to train language models and to compare optimizers fairly."""

__version__ = "0.1.0"
