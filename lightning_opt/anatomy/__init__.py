"""What each parameter of a model is: roles, experts and routers, ties and counts, read from the module tree."""

from lightning_opt._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "tree": ["Anatomy", "ParameterInfo", "describe"],
        "roles": ["ROLES"],
        "layouts": ["LAYOUT", "find_layouts"],
        "experts": ["ExpertLayer", "find_expert_layers"],
        "expert_traffic": ["ExpertTraffic"],
        "float32": ["keep_float32"],
    },
)
