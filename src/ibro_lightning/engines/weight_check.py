"""Checks after every sync that the engine has the policy's weights, and diagnoses the cause if it has not.

The engine continues a few prompts, and the trainer scores the responses. A stale output head, a missing layer or an
ineffective sync all cause different log-probs. One prompt is the same at every sync, so that stale keys and values in
the prefix cache are used and detected; it is long because caches store whole blocks of tokens. The other prompts are
always new, which distinguishes a stale cache from stale weights.

Padding and row handling are checked as well: the new prompts are shorter, are sampled twice each, and are generated
again with stop tokens so that a row ends before the others. The first check of a run includes a prompt that exceeds the
windows and chunks in the model's config.

In bfloat16, rounding hides small weight changes. An ineffective sync is still detected: the engine's log-probs are
unchanged although the trainer's have moved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch

from ibro_lightning.engines.base import PolicyProvider, RolloutEngine
from ibro_lightning.engines.weight_diagnosis import Diagnosis, beyond_windows
from ibro_lightning.engines.weight_questions import Answer, Questions, largest_difference
from ibro_lightning.errors import ConfigError, WeightSyncError, check_count, is_number
from ibro_lightning.ranks import ALONE, Ranks
from ibro_lightning.types import Dtype

TOLERANCES: dict[Dtype, float] = {"float32": 1e-3, "float16": 0.2, "bfloat16": 1.0}
"""Maximum |Δlogp| of a token in nats. In bfloat16, correct engines differ by up to 0.4."""
DEFAULT_MAX_LENGTH = 32768
"""Sequence limit in tokens where neither model nor engine has one."""
MOVED = 0.05
"""The trainer has moved if its log-probs changed by more than this share of the tolerance. The engine is unchanged if
its log-probs moved by at most a tenth of that, since batch composition affects the last digits."""


@dataclass(frozen=True)
class WeightCheck:
    """Options of the check after a sync.

    Args:
        prompt_tokens: length of the longest prompt, reduced to the model's limit; should exceed a block of the engine's
            prefix cache (16 to 128 tokens in vLLM). The other prompts have a quarter and a ninth of it.
        new_tokens: tokens to generate and score per prompt; with fewer than 3, no row can end before the others.
        tolerance: maximum |Δlogp| in nats; None uses 1e-3 for float32, 0.2 for float16 and 1 for bfloat16, whichever
            of the engine's and the trainer's dtype is coarser.
    """

    prompt_tokens: int = 144
    new_tokens: int = 8
    tolerance: float | None = None

    def __post_init__(self) -> None:
        check_count("prompt_tokens", self.prompt_tokens, 1)
        check_count("new_tokens", self.new_tokens, 1)
        if self.tolerance is not None and not (is_number(self.tolerance) and 0 < self.tolerance < math.inf):
            raise ConfigError("tolerance", self.tolerance, "write a positive number of nats, or null")

    def prompt_length(self, limit: int | None) -> int:
        """Length of the longest prompt if model and engine take ``limit`` tokens; raises if that is too few."""
        if limit is not None and self.new_tokens >= limit:
            remedy = f"model and engine take {limit} tokens, a prompt included: write {limit // 2} or less"
            raise ConfigError("new_tokens", self.new_tokens, remedy)
        return self.prompt_tokens if limit is None else min(self.prompt_tokens, limit - self.new_tokens)


class WeightVerifier:
    """Compares engine and trainer; one per run, because it remembers earlier answers of the engine.

    Every rank has its own engine. Ranks decide collectively, since the policy may be sharded over them.
    """

    def __init__(
        self, check: WeightCheck, engine: RolloutEngine, provider: PolicyProvider, seed: int, ranks: Ranks = ALONE
    ) -> None:
        self.check, self.engine, self.provider, self.ranks = check, engine, provider, ranks
        config = provider.model_spec().config.get_text_config()
        limits = (getattr(config, "max_position_embeddings", None), engine.max_model_len)
        longest = min((int(limit) for limit in limits if limit), default=None)
        self.questions = Questions(engine, provider, seed, ranks, check.prompt_length(longest), check.new_tokens)
        self._diagnosis = Diagnosis(self.questions, self.fits)
        self._beyond = beyond_windows(config, longest or DEFAULT_MAX_LENGTH, self.questions)
        self._moment: tuple[int | str, ...] = ()
        self._asked = 0
        self._reference: Answer | None = None
        """The engine's first answer since its log-probs last changed."""

    @property
    def tolerance(self) -> float:
        """Maximum |Δlogp| in nats."""
        if self.check.tolerance is not None:
            return self.check.tolerance
        return max(TOLERANCES[self.engine.dtype], TOLERANCES[self.provider.compute_dtype])

    def verify(self, *moment: int | str) -> dict[str, float]:
        """Check the weights with prompts that depend on ``moment``; returns metrics, or raises WeightSyncError."""
        if moment:
            self._moment, self._asked = moment, 0
        self._asked += 1
        answers = self.questions.ask_all(*self._moment, self._asked)
        unchanged = self._unchanged(answers.same)
        wrong = unchanged or not self.fits(answers.all)
        if self.ranks.any(wrong):
            cause = self._diagnosis.cause(answers, unchanged, MOVED * self.tolerance)
            self._refuse(answers.all, wrong, cause)
        self._check_beyond_windows()
        differences = torch.cat([answer.engine_logp - answer.trainer_logp for answer in answers.all]).abs()
        measured = self.ranks.gather((float(differences.max()), float(differences.mean())))
        return {
            "sync/logp_difference_max": max(largest for largest, _ in measured),
            "sync/logp_difference_mean": sum(mean for _, mean in measured) / len(measured),
        }

    def fits(self, answers: Sequence[Answer]) -> bool:
        """Whether engine and trainer agree on ``answers`` within the tolerance."""
        return largest_difference(answers) <= self.tolerance

    def _refuse(self, answers: Sequence[Answer], wrong: bool, cause: str) -> NoReturn:
        """Raise the error of the first failing rank on all ranks."""
        message = (
            f"the engine does not have the policy's weights: |Δlogp| is up to {largest_difference(answers):.3g} nats "
            f"(tolerance {self.tolerance:g}). {cause}"
        )
        raise WeightSyncError(next(text for text in self.ranks.gather(message if wrong else None) if text is not None))

    def _check_beyond_windows(self) -> None:
        """Check, once per run, a prompt that exceeds the windows of the model's layers."""
        if self._beyond is None:
            return
        (question, cause), self._beyond = self._beyond, None
        answers = self.questions.ask([question])
        if self.ranks.any(wrong := not self.fits(answers)):
            self._refuse(answers, wrong, cause)

    def _unchanged(self, same: Answer) -> bool:
        """Whether the engine's answer is unchanged although the trainer has moved."""
        reference, moved = self._reference, MOVED * self.tolerance
        if (
            reference is None
            or reference.generation.token_ids != same.generation.token_ids
            or not float((same.engine_logp - reference.engine_logp).abs().max()) <= 0.1 * moved
        ):
            self._reference = same
            return False
        return float((same.trainer_logp - reference.trainer_logp).abs().max()) > moved
