"""A stand-in for AReaL's names in its registry."""

from __future__ import annotations


def update_weights_from_disk(experiment_name: str, trial_name: str, model_version: int) -> str:
    return f"{experiment_name}/{trial_name}/update_weights_from_disk/{model_version}"
