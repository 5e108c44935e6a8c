"""The fair comparison, as arithmetic: search, sensitivity, laws, speed-ups, statistics. Never trains, never draws."""

from lightning_opt._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "results": ["Cell", "Results", "non_embedding", "read_results", "recorded_change", "write_results"],
        "space": ["Axis", "Ladder", "Space"],
        "descent": ["Descent", "Step"],
        "recorded": ["RecordedRuns", "descend", "recorded_cost", "recorded_gains"],
        "laws": ["Interpolation", "LossLaw", "fit_law", "interpolate"],
        "speedups": ["SpeedUp", "speed_ups"],
        "hyper_laws": ["HyperLaw", "JointLaw", "fit_hyper_law", "fit_joint_law", "tuned_laws"],
        "sensitivity": ["NearBest", "Sensitivity", "near_best", "recorded_trials"],
        "significance": ["Comparison", "Noise", "better", "pooled"],
        "replay": ["Replayed", "analyse", "phase_two"],
        "tuned": ["Tuned", "read_tuned"],
        "budget": ["Budget", "Spent", "read_budget"],
        "cells": ["CellPlan", "Outcome", "Trial", "read_ledger"],
        "phases": ["Design", "Standing", "drive", "stand"],
    },
)
