"""One table of value rules: what each field may hold, for configurations and for optimizer constructors alike.

A rule is found by the field's full dotted name, else by its last part: `optimizer.roles.norm.lr` obeys `lr`.
"""

from __future__ import annotations

import re
from typing import Any

from lightning_opt.plan.errors import ConfigError
from lightning_opt.plan.value_rule import Rule


def _number(low: float | None = None, high: float | None = None, **more: Any) -> Rule:
    return Rule("float", low, high, **more)


def _positive(hint: str = "", **more: Any) -> Rule:
    return Rule("float", 0, low_open=True, hint=hint, **more)


def _count(low: int = 1, hint: str = "", **more: Any) -> Rule:
    return Rule("int", low, hint=hint, **more)


def _choice(*choices: str, **more: Any) -> Rule:
    return Rule("choice", choices=choices, **more)


def _place(none: str) -> Rule:
    what = f"must be the name of a folder or file, or null for {none}; one that reads as a number is written ./5"
    return Rule("str", none=none, expected=what)


_FRACTION = {"low": 0, "high": 1, "high_open": True}
SMALLEST_VOCABULARY = 257
LARGEST_TRAINED_VOCABULARY = 16384  # of 6 MB of text: each entry is seen about a hundred times

_OWN_WARMUP = Rule(
    "warmup",
    low_open=True,
    none="no warm-up",
    expected="must be a fraction of the run (> 0 and < 1) or a whole number of steps (>= 1), or null for no warm-up",
)

RULES: dict[str, Rule] = {
    # optimizer (the last part of the name is enough, so roles and constructors obey them too)
    "lr": _positive("typical 1e-4 to 1e-2"),
    "lr_scale": _positive("1 = as it is"),
    "weight_decay": _number(0, hint="typical 0 to 1"),
    "betas": Rule("floats", **_FRACTION, length=2, hint="for example [0.9, 0.95]"),
    "beta1": _number(**_FRACTION),
    "beta2": _number(**_FRACTION),
    "eps": _positive("typical 1e-8"),
    "momentum": _number(**_FRACTION, hint="typical 0.9 to 0.98"),
    "dampening": _number(**_FRACTION, hint="typical 0"),
    "rmsprop.alpha": _number(**_FRACTION, hint="typical 0.95 to 0.99"),
    "centered": Rule("bool"),
    "lr_decay": _number(0, hint="typical 0: the schedule does it"),
    "initial_accumulator_value": _number(0, hint="typical 0 to 0.1"),
    "momentum_decay": _number(0, hint="typical 4e-3"),
    "bias_correction": _choice("one", "two"),
    "max_grad_norm": _positive("typical 1", none="no clipping"),
    "state_dtype": _choice("float32", "bfloat16", "int8"),
    "state_rounding": _choice("nearest", "stochastic"),
    "weight_rounding": _choice("nearest", "stochastic", "master"),
    "sparse_experts": _count(0, "tokens in a step, with fewer an expert rests; 0 = none rests"),
    "sparse_parts": Rule("words", choices=("update", "decay", "momentum")),
    "expert_rate": _choice("none", "sqrt_load", "inverse_sqrt_load"),
    "expert_rate_bound": _number(1, hint="largest factor, typical 2"),
    "implementation": _choice("auto", "eager", "foreach", "compiled", "fused", "whole"),
    "cautious": Rule("bool"),
    "cautious_weight_decay": Rule("bool"),
    "weight_decay_mode": _choice("decoupled", "independent", "l2"),
    "nesterov": Rule("bool"),
    "ns_steps": Rule("int", 1, 30, hint="Newton-Schulz iterations, typical 5"),
    "coefficients": _choice("jordan", "polar_express", "quintic", "cubic"),
    "scale": _choice("original", "match_rms_adamw", "spectral", "weight_rms"),
    "ns_dtype": _choice("auto", "float32", "bfloat16"),
    "split_fused": Rule("bool"),
    "per_head": Rule("bool"),
    "norm": _choice("auto", "spectral", "sign", "col", "row", "rms"),
    "radius": _positive("typical 1 to 3000"),
    "gamma": _number(0, hint="mars: typical 0.025; sophia: 0.01 to 0.05"),
    "mars.clip": _choice("tensor", "global", "none"),
    "clip_norm": _positive("typical 1"),
    "clip_exponent": _number(0, hint="the paper's is 0.25", none="no clipping"),
    "beta3": _number(**_FRACTION, hint="typical 0.999 to 0.9999"),
    "ademamix.alpha": _number(0, hint="typical 2 to 8"),
    "alpha_warmup": _OWN_WARMUP,
    "beta3_warmup": _OWN_WARMUP,
    "warmup_steps": Rule(
        "warmup",
        expected="must be a fraction of the run (>= 0 and < 1) or a whole number of steps; typical 0.02 to 0.05",
    ),
    "weight_lr_power": _number(0, hint="typical 2; 0 = all iterates alike"),
    "estimator": _choice("gnb", "hutchinson"),
    "sophia.interval": _count(hint="steps between estimates, typical 10"),
    "decay_exponent": _positive("the paper's is 0.8"),
    "scale_floor": _positive("typical 1e-3"),
    "clip_threshold": _positive("typical 1"),
    "scale_parameter": Rule("bool"),
    "relative_step": Rule("bool"),
    "shampoo_beta": _number(**_FRACTION, none="the second moment's decay"),
    "precondition_frequency": _count(hint="steps between two new bases, typical 10"),
    "max_precond_dim": _count(0, "longer dimensions have no basis"),
    "block_size": _count(2, "typical 256 to 512", none="whole matrices"),
    "merge_dims": Rule("bool"),
    "one_sided": Rule("bool"),
    "precondition_1d": Rule("bool"),
    "normalize_grads": Rule("bool"),
    "correct_bias": Rule("bool"),
    "preconditioner_lr": _number(0, 1, low_open=True, hint="typical 0.1"),
    "preconditioner_init_scale": _positive("typical 1"),
    "preconditioner_update_probability": _number(0, 1, low_open=True, hint="typical 0.03 to 0.1"),
    "update_prob_flat_start": _count(0, "steps, typical 500 to 2000"),
    "update_prob_decay": _number(0, hint="typical 0.001"),
    "max_size_triangular": _count(0, "longer dimensions have diagonal factors"),
    "memory_save_mode": _choice("one_diag", "smart_one_diag", "all_diag", none="triangular factors"),
    "momentum_into_precond_update": Rule("bool"),
    "max_update_rms": _positive("typical 1.1", none="any size"),
    "until": Rule(
        "warmup",
        low_open=True,
        none="the last phase",
        expected="must be a fraction of the run (> 0 and < 1) or a whole number of steps (>= 1), null in the last one",
    ),
    "warm": Rule("warmup", expected="must be a fraction of the run (>= 0 and < 1) or a whole number of steps"),
    "ramp": Rule("warmup", expected="must be a fraction of the run (>= 0 and < 1) or a whole number of steps"),
    "signal": _choice("loss_volatility", "grad_norm_change"),
    "threshold": _positive("loss_volatility: typical 0.02 to 0.1"),
    "hysteresis": _number(0, 1, hint="typical 0.5"),
    "patience": _count(0, "steps, typical 20"),
    "dwell": _count(0, "steps, typical 100"),
    # schedule
    "schedule.name": _choice("linear", "cosine", "wsd", "constant"),
    "warmup": Rule(
        "warmup",
        expected="must be a fraction of the run (>= 0 and < 1) or a whole number of steps (>= 1); typical 0.05",
    ),
    "min_ratio": _number(0, 1, hint="share of the peak rate left at the end"),
    "decay": Rule(
        "warmup",
        low_open=True,
        expected="must be a fraction of the run (> 0 and < 1) or a whole number of steps (>= 1); typical 0.2",
    ),
    # how long
    "max_steps": _count(none="what scale says"),
    "max_tokens": _count(none="what scale says", hint="for example 1.6e6"),
    "max_epochs": _positive("1 = as many sequences as the corpora hold together", none="what scale says"),
    "scale.tokens": _count(none="20 tokens per non-embedding parameter times scale.chinchilla"),
    "scale.chinchilla": _positive("1 = 20 tokens per non-embedding parameter", none="scale.tokens"),
    # trainer
    "seed": Rule("int", 0, 2**32 - 1),
    "resume": Rule("str", expected="must be auto, never, or the path of a run, its checkpoints or one of them"),
    "on_failure": Rule(
        "choice",
        choices=("continue", "stop"),
        pattern=r"retry:[1-9]\d*",
        expected="must be continue, stop or retry:N (retry:2 runs a failed job at most twice more)",
    ),
    "jobs_per_device": _count(hint="jobs of a sweep at once on one GPU, or on the CPU where there is none"),
    "global_batch_size": _count(hint="sequences per optimizer step"),
    "micro_batch_size": _count(none="as large as the global batch allows"),
    "accelerator": _choice("auto", "cpu", "gpu", "cuda", "mps"),
    "trainer.devices": _count(hint="per node"),
    "num_nodes": _count(),
    "strategy": _choice("auto", "ddp", "fsdp"),
    "precision": _choice("auto", "32-true", "bf16-mixed", "bf16-true"),
    "update_in_backward": _choice("off", "on", "clip_each", booleans=("off", "on")),
    "compile": _choice("off", "layers", "model", booleans=("off", "layers")),
    "log_every_n_steps": _count(),
    "val_every_n_steps": _count(none="4 times over the run"),
    "val_sequences": _count(0, "sequences per corpus, 0 = no validation"),
    "val_part": _choice("all", "tuning", "reporting"),
    "num_threads": _count(none="torch's own choice"),
    "deterministic": Rule("bool"),
    "overfit_batches": _count(0, "0 = off"),
    "profiler": _choice("simple", "pytorch", none="no profiler"),
    # model
    "hidden_size": _count(),
    "num_layers": _count(),
    "num_heads": _count(),
    "num_kv_heads": _count(none="as many as num_heads"),
    "head_dim": _count(none="hidden_size / num_heads"),
    "intermediate_size": _count(),
    "num_experts": _count(2),
    "experts_per_token": _count(),
    "expert_size": _count(hint="width of one expert"),
    "shared_experts": _count(hint="experts that every token goes through"),
    "dense_layers": _count(0, "first layers without experts"),
    "experts_implementation": _choice("auto", "eager", "batched_mm", "grouped_mm"),
    "qkv_bias": Rule("bool"),
    "rotary_fraction": _number(0, 1, low_open=True, hint="share of a head that turns with its position"),
    "rope_theta": _positive("base of the rotary frequencies, typical 1e4 to 1e6"),
    "vocab_size": _count(SMALLEST_VOCABULARY, "256 bytes and the end of text", none="the tokenizer's own"),
    "context_length": _count(8),
    "tie_embeddings": Rule("bool"),
    "qk_norm": Rule("bool"),
    "z_loss": _number(0, hint="typical 1e-4; 0 = off"),
    "init": _positive("std; width = hidden_size**-0.5; study = fan_in**-0.5", choices=("width", "study")),
    "activation_checkpointing": Rule(
        "choice",
        choices=("off", "full"),
        pattern=r"every_[1-9]\d*",
        expected="must be off, full or every_N (every N-th layer, for example every_2)",
    ),
    "non_embedding_params": _count(none="counted once the model is built"),
    "model.path": _place("none"),
    # data
    "source": _choice("embedded", "files", "prepared"),
    "sequence_length": _count(8, "tokens"),
    "data.path": _place("none"),
    "data.root": _place("the hub"),
    "data.decontaminate": _place("no sets"),
    "data.cache_dir": _place("data_cache"),
    "data.tokenizer.path": _place("one that is trained on the text"),
    "data.weights.*": _number(0, hint="the corpus's share beside the others, 0 leaves it out"),
    "data.block_cross_document_attention": Rule("bool"),
    "data.warn_above_epochs": _positive("typical 4", none="no warning"),
    "val_fraction": _number(0, 0.5, low_open=True, hint="typical 0.02"),
    "data.corpora.*.repo": Rule("str", none="a folder, which path names"),
    "data.corpora.*.path": _place("a data set on the hub, which repo names"),
    "data.corpora.*.revision": Rule("str", none="main"),
    "data.corpora.*.column": Rule("str", none="text, else content"),
    "data.corpora.*.val_fraction": _number(0, 0.5, hint="of the documents; 0 = none"),
    "data.corpora.*.val_tokens": _count(none="a corpus to train on", hint="typical 1e7"),
    "prepare.tokens": _count(hint="of all corpora together, for example 3e9"),
    "prepare.processes": _count(none="one per CPU"),
    "num_workers": _count(0),
    # evaluation
    "suite": _choice("mini", "full", "none"),
    "evaluation.data_dir": _place("the hub"),
    "evaluation.cache": _place("no cache"),
    "evaluation.limit": _count(hint="documents per task", none="all"),
    "evaluation.batch_size": _count(hint="prompts of full context in one batch"),
    "evaluation.max_gen_toks": _count(hint="tokens written per HumanEval problem", none="the suite's own"),
    "evaluation.samples": _count(hint="programs written per HumanEval problem"),
    "evaluation.temperature": _positive("of sampling, where evaluation.samples is above 1"),
    "evaluation.sandbox_seconds": _number(0, 600, low_open=True, hint="seconds a generated program may run"),
    # callbacks of ours, whatever their entry is called
    "callbacks.Checkpoint.every_n_steps": _count(0, "0 = the last step only", none="about 20 times over the run"),
    "callbacks.Checkpoint.keep_last": _count(),
    "callbacks.Checkpoint.keep_best": _count(0),
    "callbacks.Checkpoint.keep_every_n_steps": _count(none="none for good"),
    "callbacks.Checkpoint.monitor": Rule("str"),
    "callbacks.LossGuard.on_spike": _choice("skip", "rewind", none="neither"),
    "callbacks.LossGuard.sigma": _positive("standard deviations"),
    "callbacks.LossGuard.window": _count(2, "optimizer steps"),
    "callbacks.LossGuard.warmup": _count(2, "optimizer steps", none="half a window"),
    "callbacks.LossGuard.max_rewinds": _count(0),
    "callbacks.SampleScores.every_n_steps": _count(0, "0 = off", none="10 times over the run"),
    "callbacks.Stability.window": _count(2, "optimizer steps"),
    "callbacks.OptimizerSignals.window": _count(2, "optimizer steps"),
    "callbacks.Throughput.warmup_steps": _count(0),
    "callbacks.Export.dtype": _choice("float32", "bfloat16", "float16", none="as trained"),
    "callbacks.ExpertLoadMonitor.keys": _choice("brief", "detailed"),
    "callbacks.ExpertLoadMonitor.cv_limit": _positive("typical 0.8; at most sqrt(experts / experts per token - 1)"),
    "callbacks.ExpertLoadMonitor.dead_steps": _count(hint="optimizer steps without a token"),
    "callbacks.ExpertLoadMonitor.history": _count(2, "steps that are kept for the picture"),
    "callbacks.ExpertBalance.rate": _number(0, 1, none="0.001, and more in a run of few steps", hint="0 = off"),
    "callbacks.ExpertBalance.centred": Rule("bool"),
    "callbacks.ExpertBalance.until": Rule(
        "warmup",
        low_open=True,
        none="to the end",
        expected="must be a fraction of the run (> 0 and < 1) or a whole number of steps (>= 1), or null for no end",
    ),
    "callbacks.RouterLosses.balance": _number(0, hint="typical 1e-4 beside a correction bias, 1e-2 alone; 0 = off"),
    "callbacks.RouterLosses.over": _choice("layer", "sequence", "global"),
    "callbacks.RouterLosses.z": _number(0, hint="typical 1e-3; 0 = off"),
    "callbacks.EMA.decay": _number(**_FRACTION, hint="typical 0.99 to 0.9999"),
}


def rule_for(name: str) -> Rule | None:
    """The rule of a field by its full dotted name, else by its last part; None where no rule is known.

    What a user names himself obeys the rule of its map: `data.weights.web` that of `data.weights.*`.
    """
    if re.match(r"data\.(phases\.[^.]+\.)?weights\.", name):
        return RULES["data.weights.*"]
    if name.startswith("data.corpora."):
        return RULES.get(f"data.corpora.*.{name.rpartition('.')[2]}")
    return RULES.get(name) or RULES.get(name.rpartition(".")[2])


def check_value(name: str, value: Any, *, field: str | None = None) -> Any:
    """The value, normalised: whole numbers as int, numbers as float, `betas` as a tuple of floats.

    Args:
        name: a name in `RULES`, for example ``lr``, or a dotted name that ends in one.
        value: what the user gave.
        field: the name to show in the error; `name` by default.

    Raises:
        ConfigError: the value breaks the rule.
        KeyError: no rule is known for `name` (a mistake of the caller, not of the user).
    """
    rule = rule_for(name)
    if rule is None:
        raise KeyError(f"no value rule for {name!r}: add one to lightning_opt/plan/values.py")
    try:
        return rule.normalise(value)
    except ValueError as error:
        raise ConfigError(field or name, value, str(error)) from None
