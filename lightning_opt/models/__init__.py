"""Models: builders and presets on transformers' own modelling code, and the loss."""

from lightning_opt._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "builder": ["build"],
        "dense": ["gpt2", "llama"],
        "moe": ["glm4_moe"],
        "experts": ["implement_experts"],
        "pretrained": ["hf"],
        "document_masks": ["apart", "keep_documents_apart"],
        "chunked": ["IGNORE", "linear_cross_entropy", "logits_cross_entropy"],
        "loss": ["Loss", "causal_lm_loss"],
        "compiling": ["compiled", "decoder_layers"],
    },
)
