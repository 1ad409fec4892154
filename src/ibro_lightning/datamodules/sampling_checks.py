"""Validation of sampling parameters."""

from __future__ import annotations

from typing import Any

from ibro_lightning.errors import ConfigError
from ibro_lightning.types import SamplingParams


def check_sampling(engine: Any, sampling: SamplingParams, *, setting: str) -> None:
    """Call the engine's ``check_sampling``; an engine without it supports all :class:`SamplingParams`."""
    if check := getattr(engine, "check_sampling", None):
        check(sampling, setting=setting)


def check_training_sampling(sampling: SamplingParams) -> None:
    """Raise :class:`ConfigError` for parameters with which the importance ratios of training would be wrong."""
    if not isinstance(sampling, SamplingParams):
        raise ConfigError("sampling", sampling, "write SamplingParams, or leave it out for its defaults")
    if sampling.temperature == 0:
        raise ConfigError("sampling.temperature", 0, "training needs samples that differ: write a number such as 1.0")
    for name, full in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
        if (value := getattr(sampling, name)) != full:
            remedy = f"a truncated distribution makes every importance ratio wrong: write {full:g} (except to evaluate)"
            raise ConfigError(f"sampling.{name}", value, remedy)
