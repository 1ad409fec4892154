"""Errors that a person can act on: which setting, what it is, what to write instead."""

from __future__ import annotations

import math


class ConfigError(ValueError):
    """A setting is wrong. The command line prints it as one line, without a traceback.

    >>> str(ConfigError("data.group_size", 1, "DAPO compares responses to one prompt: write 2 or more"))
    'data.group_size: 1 - DAPO compares responses to one prompt: write 2 or more'
    """

    def __init__(self, setting: str, value: object, remedy: str) -> None:
        self.setting, self.value, self.remedy = setting, value, remedy
        super().__init__(f"{setting}: {_short(value)} - {remedy}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, object, str]]:
        """So that it can come out of a worker process."""
        plain = self.value is None or isinstance(self.value, bool | int | float | str)
        return ConfigError, (self.setting, self.value if plain else str(self.value), self.remedy)


def check_at_least(setting: str, value: float, minimum: float, advice: str = "") -> None:
    """Raise a :class:`ConfigError` unless ``value`` is a finite number of at least ``minimum``."""
    if not (math.isfinite(value) and value >= minimum):
        raise ConfigError(setting, value, f"write {minimum:g} or more{advice}")


class RewardError(RuntimeError):
    """A reward function raised or returned something that is not a finite number. Names the reward and the prompt."""


class RolloutError(RuntimeError):
    """Generation cannot give the update what it needs, e.g. dynamic sampling found no informative group."""


class RankError(RuntimeError):
    """Another process of this run failed; says which one and how. That process prints its own error."""


class WeightSyncError(RolloutError):
    """After a sync the engine does not have the policy's weights. Says what is off, by how much, and why."""


def _short(value: object, limit: int = 200) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
