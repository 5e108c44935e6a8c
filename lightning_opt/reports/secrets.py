"""What reports leave out: the rules are `plan.secrets`', which also guard what a run writes down."""

from lightning_opt.plan.secrets import REDACTED, clean, clean_text, is_secret_name

__all__ = ["REDACTED", "clean", "clean_text", "is_secret_name"]
