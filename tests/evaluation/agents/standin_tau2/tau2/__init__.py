"""Stand-in for Sierra's tau2 1.0.1 (tag v1.0.1, commit b711c1e): its command line and its result files, in our words.

It has no desks of its own: an agent succeeds when its calls are those that the task lists. What was compared with the
real one is said in docs/agents.md.
"""
