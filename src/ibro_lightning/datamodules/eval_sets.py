"""Evaluation sets and their validation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ibro_lightning.batches.sequences import one_line
from ibro_lightning.datamodules.sampling_checks import check_sampling
from ibro_lightning.engines.base import RolloutEngine
from ibro_lightning.errors import ConfigError, check_at_least
from ibro_lightning.rewards import Reward
from ibro_lightning.sources.base import PromptSource
from ibro_lightning.sources.chat_template import check_reserved
from ibro_lightning.sources.prompts import check_count
from ibro_lightning.types import SamplingParams


@dataclass(frozen=True, repr=False)
class EvalSet:
    """A named evaluation set.

    Args:
        source: its problems.
        reward: judges the responses.
        samples: k, the responses per problem.
        sampling: temperature, top_p and length of this set.
        limit: use only the first ``limit`` problems; None uses all.
        chat_template_kwargs: replaces the datamodule's.
    """

    source: PromptSource
    reward: Reward
    samples: int = 4
    sampling: SamplingParams = field(default_factory=SamplingParams)
    limit: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    __repr__ = one_line


def overridden(sets: dict[str, EvalSet], samples: int | None, max_tokens: int | None) -> dict[str, EvalSet]:
    """The sets with ``samples`` and ``sampling.max_tokens`` replaced where a value is given."""
    for setting, value in (("eval_samples", samples), ("eval_max_tokens", max_tokens)):
        if value is not None:
            check_at_least(setting, value, 1, ", or null for each set's own")
    return {
        name: replace(
            eval_set,
            samples=eval_set.samples if samples is None else samples,
            sampling=eval_set.sampling if max_tokens is None else replace(eval_set.sampling, max_tokens=max_tokens),
        )
        for name, eval_set in sets.items()
    }


def check_sets(sets: Mapping[str, EvalSet], engine: RolloutEngine) -> None:
    """Raise :class:`ConfigError` for invalid names, numbers or sampling parameters."""
    for name, eval_set in sets.items():
        if not re.fullmatch(r"[\w-]+", name):
            raise ConfigError("eval_sets", name, "name sets with letters, digits, '_' and '-' only")
        check_count(f"eval_sets.{name}.samples", eval_set.samples)
        if eval_set.limit is not None:
            check_count(f"eval_sets.{name}.limit", eval_set.limit)
        check_reserved(f"eval_sets.{name}.chat_template_kwargs", eval_set.chat_template_kwargs)
        check_sampling(engine, eval_set.sampling, setting=f"eval_sets.{name}.sampling")
