"""Does the engine have the policy's weights? Asked after every sync, and answered with the cause if it has not.

The engine continues two long prompts, and the trainer scores what it wrote. A stale output head, a layer that did not
arrive, a sync that did nothing: all show as log-probs that differ. One prompt is the same at every sync, so that keys
and values cached under old weights would be used and noticed; the other is always new, which tells a stale cache from
stale weights. Prompts are long because caches work on whole blocks of tokens.

In bfloat16 the engines' rounding hides small changes of the weights. A sync that did nothing is still noticed there:
the engine then answers as before while the trainer's own log-probs of that answer have moved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ibro_lightning.engines.weights import weight_group
from ibro_lightning.errors import ConfigError, RolloutError, WeightSyncError, check_at_least
from ibro_lightning.ranks import ALONE, Ranks
from ibro_lightning.seeding import counter_uniforms, derive_seed
from ibro_lightning.sequences import Sequences
from ibro_lightning.types import Dtype, Generation, PolicyProvider, RolloutEngine, SamplingParams

TOLERANCES: dict[Dtype, float] = {"float32": 1e-3, "float16": 0.2, "bfloat16": 1.0}
"""Largest |Δlogp| of a token in nats. In bfloat16, sound engines were seen 0.4 apart."""
MOVED = 0.05
"""The trainer has moved if its log-probs changed by more than this share of the tolerance, and an engine that moved by
less than a tenth of that has stood still: how its batches are put together may show in the last digits."""


@dataclass(frozen=True)
class WeightCheck:
    """How the check after a sync is done.

    Args:
        prompt_tokens: length of the two prompts (cut to what the model takes); longer than a block of the engine's
            prefix cache, which is 16 to 128 tokens in vLLM.
        new_tokens: tokens that the engine adds to each, and the trainer scores.
        tolerance: largest |Δlogp| in nats; None takes it from the coarser dtype of engine and trainer: 1e-3 in
            float32, 0.2 in float16, 1 in bfloat16.
    """

    prompt_tokens: int = 144
    new_tokens: int = 8
    tolerance: float | None = None

    def __post_init__(self) -> None:
        check_at_least("data.weight_check.prompt_tokens", self.prompt_tokens, 1)
        check_at_least("data.weight_check.new_tokens", self.new_tokens, 1)
        if self.tolerance is not None and not 0 < self.tolerance < math.inf:
            raise ConfigError("data.weight_check.tolerance", self.tolerance, "write a positive number of nats, or null")


class Answer(NamedTuple):
    """What the engine wrote after a prompt, and both opinions on it, ``[new tokens]`` each."""

    generation: Generation
    engine_logp: Tensor
    trainer_logp: Tensor

    @property
    def difference(self) -> float:
        """Largest |Δlogp|; infinite if one is not a number."""
        return float((self.engine_logp - self.trainer_logp).abs().nan_to_num(torch.inf, torch.inf).max())


class WeightVerifier:
    """Compares engine and trainer; one per run, as it remembers what the engine answered before.

    Every rank has an engine of its own. They decide together, as the policy they compare with may be spread over them.
    """

    def __init__(
        self, check: WeightCheck, engine: RolloutEngine, provider: PolicyProvider, seed: int, ranks: Ranks = ALONE
    ) -> None:
        self.check, self.engine, self.provider, self.seed, self.ranks = check, engine, provider, seed, ranks
        config = provider.model_spec().config.get_text_config()
        self._vocabulary = int(config.vocab_size)
        limits = (getattr(config, "max_position_embeddings", None), engine.max_model_len)
        longest = min((int(limit) for limit in limits if limit), default=check.prompt_tokens + check.new_tokens)
        self._prompt_tokens = min(check.prompt_tokens, longest - check.new_tokens)
        if self._prompt_tokens < 1:
            raise ConfigError(
                "data.weight_check.new_tokens",
                check.new_tokens,
                f"model and engine take {longest} tokens, a prompt included: write {longest // 2} or less",
            )
        self._tied = bool(getattr(config, "tie_word_embeddings", False))
        self._moment: tuple[int | str, ...] = ()
        self._asked = 0
        self._reference: Answer | None = None
        """The first of the answers that the engine has given since it last moved."""

    @property
    def tolerance(self) -> float:
        """In nats."""
        if self.check.tolerance is not None:
            return self.check.tolerance
        return max(TOLERANCES[self.engine.dtype], TOLERANCES[self.provider.compute_dtype])

    def verify(self, *moment: int | str) -> dict[str, float]:
        """Raise :class:`WeightSyncError` unless the engine has the policy's weights; what was measured otherwise.

        Args:
            moment: where in the run this is; what is asked is then a function of it, in a resumed run as well.
        """
        if moment:
            self._moment, self._asked = moment, 0
        same, new = self._ask()
        differences = torch.cat([answer.engine_logp - answer.trainer_logp for answer in (same, new)]).abs()
        unchanged = self._unchanged(same)
        wrong = not max(same.difference, new.difference) <= self.tolerance or unchanged
        if self.ranks.any(wrong):
            explanation = self._explain(same, new, unchanged)
            found = self.ranks.gather(explanation if wrong else None)
            raise WeightSyncError(next(text for text in found if text is not None))
        measured = self.ranks.gather((float(differences.max()), float(differences.mean())))
        return {
            "sync/logp_difference_max": max(largest for largest, _ in measured),
            "sync/logp_difference_mean": sum(mean for _, mean in measured) / len(measured),
        }

    def _ask(self) -> tuple[Answer, Answer]:
        """The engine's answers to the prompt that is always the same and to one that is always new."""
        self._asked += 1
        now = (*self._moment, self._asked)
        prompts = [self._prompt("same"), self._prompt("new", *now)]
        seeds = [[derive_seed(self.seed, "weight check")], [derive_seed(self.seed, "weight check", *now)]]
        with self.ranks.together():
            generations = [own[0] for own in self.engine.generate(prompts, self._sampling, seeds)]
            if not all(generation.token_ids for generation in generations):
                raise RolloutError(
                    "the engine's deadline passed before it could be checked: raise data.engine.deadline_s"
                )
        sequences = Sequences.collate(prompts, [generation.token_ids for generation in generations])
        scored = self.provider.response_logp(sequences, self._sampling.temperature).float().cpu()
        same, new = (
            Answer(generation, torch.tensor(generation.logp), scored[row, : len(generation.logp)])
            for row, generation in enumerate(generations)
        )
        return same, new

    @property
    def _sampling(self) -> SamplingParams:
        return SamplingParams(temperature=1.0, max_tokens=self.check.new_tokens)

    def _prompt(self, *counters: str | int) -> list[int]:
        """Random tokens: a context in which every weight matters, whatever the task."""
        seed = torch.tensor([derive_seed(self.seed, "weight check prompt", *counters)])
        draws = [counter_uniforms(seed, place).item() for place in range(self._prompt_tokens)]
        return [min(int(draw * self._vocabulary), self._vocabulary - 1) for draw in draws]

    def _unchanged(self, same: Answer) -> bool:
        """Is this what the engine said under weights that the trainer no longer has?"""
        reference, moved = self._reference, MOVED * self.tolerance
        if reference is None or reference.generation.token_ids != same.generation.token_ids:
            self._reference = same
            return False
        if not float((same.engine_logp - reference.engine_logp).abs().max()) <= 0.1 * moved:
            self._reference = same
            return False
        return float((same.trainer_logp - reference.trainer_logp).abs().max()) > moved

    def _explain(self, same: Answer, new: Answer, unchanged: bool) -> str:
        """One sentence on what is wrong, and the cause: what mends it. All ranks look for it if any is wrong."""
        difference = max(same.difference, new.difference)
        found = f"the engine does not have the policy's weights: |Δlogp| is up to {difference:.3g} nats"
        found += f" (tolerance {self.tolerance:g})"
        new_fits = new.difference <= (MOVED if unchanged else 1) * self.tolerance
        cache = same.difference > self.tolerance and new_fits
        if not self.ranks.any(not cache and not unchanged and difference > self.tolerance):
            stale = []  # nobody's weights need to be looked through
        else:
            stale = self._stale_groups()
        if cache:
            return (
                f"{found}. Cause: the prefix cache was not reset, as a prompt seen before is continued wrongly and a "
                "new one is not"
            )
        if unchanged:
            return f"{found}. Cause: the sync did not reach the engine, which answers as it did before the last update"
        if stale:
            tied = self._tied and stale == ["head"]
            head = " (the output head is tied to the embedding, and the engine keeps a copy)" if tied else ""
            return f"{found}. Cause: stale weights in the engine, mended by sending again: {', '.join(stale)}{head}"
        return (
            f"{found}. Sending all weights again did not mend it, so the engine computes something else: another "
            "precision (raise data.weight_check.tolerance if it is harmless), another implementation of this "
            "architecture, or a config that does not belong to the weights"
        )

    def _stale_groups(self) -> list[str]:
        """Send the weights again, group by group, and name the groups that made a difference; none if it never fits."""
        stale: list[str] = []
        before = self._ask()
        for group in self._groups():
            weights = (
                (name, tensor) for name, tensor in self.provider.named_full_weights() if weight_group(name) == group
            )
            self.engine.load_weights(weights, partial=True)
            after = self._ask()
            if before[0].generation != after[0].generation:
                stale.append(group)
            if not self.ranks.any(not max(after[0].difference, after[1].difference) <= self.tolerance):
                return stale
            before = after
        return []

    def _groups(self) -> Iterator[str]:
        names = [name for name, _ in self.provider.named_full_weights()]
        groups = dict.fromkeys(weight_group(name) for name in names)
        yield from sorted(groups, key=lambda group: group != "head")  # the usual suspect first
