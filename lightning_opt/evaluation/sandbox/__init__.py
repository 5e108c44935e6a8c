"""The one place that runs generated code: `Sandbox` judges a program at a time, `Rooms` several side by side.

`room` is the outside of the closed room, `server` its inside, `kernel` the system calls of both. Those three need the
standard library only.
"""

from lightning_opt._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "room": ["Limits", "Sandbox", "SandboxError", "Verdict", "available"],
        "rooms": ["Rooms", "shared"],
    },
)
