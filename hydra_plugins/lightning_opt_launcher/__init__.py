"""Hands Hydra our launcher; Hydra looks for plugins only below `hydra_plugins`."""
