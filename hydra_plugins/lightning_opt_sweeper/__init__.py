"""Hands Hydra our sweeper; Hydra looks for plugins only below `hydra_plugins`."""
