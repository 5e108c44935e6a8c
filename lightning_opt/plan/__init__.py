"""Checks, lengths, FLOPs and tuned values: plain Python, so that wrong input is refused before torch loads."""

from lightning_opt._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "errors": ["ConfigError"],
        "value_rule": ["Rule"],
        "values": ["RULES", "check_value", "rule_for"],
        "checks": ["RunPlan", "check", "data_config", "is_hub_id", "normalised"],
        "words": ["amount", "closest", "duration", "near_path", "one_of"],
        "rule_facts": [
            "COMMON",
            "CURVATURE",
            "EXPERT_TOKENS",
            "OF_THE_RUN",
            "RuleFacts",
            "check_options",
            "facts",
            "known_rules",
            "minds_tokens",
            "wants_all",
            "warms_by_fraction",
        ],
        "routes": ["ROLES", "read_roles", "settings"],
        "mixing": ["DataPhase", "check_data_fields", "check_documents_apart", "data_phases", "data_seams"],
        "phases": ["check_order", "read_phases"],
        "resuming": ["check_allowed", "check_same", "differences", "identity", "length_changes", "with_data"],
        "hub": ["HubLost", "hub_said"],
        "lengths": ["steps_for_epochs"],
        "processes": ["Place", "available_cpus", "place"],
        "flops": ["flops_per_token"],
        "records": ["TunedRecord", "tuned", "tuned_optimizers", "tuned_records"],
    },
)
