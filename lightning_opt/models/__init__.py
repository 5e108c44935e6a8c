"""Models: builders and presets on transformers' own modelling code, and the loss."""

from lightning_opt._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "builder": ["build"],
        "dense": ["llama"],
        "pretrained": ["hf"],
        "loss": ["Loss", "causal_lm_loss"],
    },
)
