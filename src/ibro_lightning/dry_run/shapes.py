"""Rows and tokens of one iteration on one rank, at their largest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ibro_lightning.batches.experience import Experience
from ibro_lightning.batches.sequences import FlatSequences
from ibro_lightning.models.building import empty_model
from ibro_lightning.models.sharing import known_obstacle
from ibro_lightning.modules import PPOModule
from ibro_lightning.types import Prompt
from ibro_lightning.update.micro_batches import shared_prompt_batches, token_budget_batches

FLOAT, INT, LONG, BOOL = 4, 4, 8, 1


@dataclass(frozen=True)
class Shapes:
    """Responses (rows) of one rank, all of maximum length.

    Args:
        rows: of a rollout.
        step_rows: of an optimizer step.
        micro_rows: of a micro-batch.
        micro_batches: of an optimizer step.
        prompt, response: tokens.
        groups: of the rollout, on all ranks.
        prompts: a few, for regularisers that read them.
        micro_groups: the group of each row of the micro-batch, if a prompt is run once for all its rows in it.
    """

    rows: int
    step_rows: int
    micro_rows: int
    micro_batches: int
    prompt: int
    response: int
    groups: int = 1
    prompts: tuple[Prompt, ...] = ()
    micro_groups: tuple[int, ...] = ()

    @classmethod
    def of_rollouts(
        cls,
        module: Any,
        ranks: int,
        prompts_per_rollout: int,
        group_size: int,
        prompt: int,
        response: int,
        prompts: Sequence[Prompt] = (),
    ) -> Shapes:
        """Of a reinforcement-learning module's iteration."""
        rows = -(-prompts_per_rollout // ranks) * group_size
        per_step = min(module.updater.mini_batch_prompts or prompts_per_rollout, prompts_per_rollout)
        step_rows = min(rows, -(-per_step // ranks) * group_size)
        budget, groups = module.updater.budget.tokens, [row // group_size for row in range(step_rows)]
        if shared := _shares_prompts(module):
            batches = list(shared_prompt_batches(groups, [prompt] * step_rows, [response] * step_rows, budget))
        else:
            padded = not module.policy_options.packing
            batches = list(token_budget_batches([prompt + response] * step_rows, budget, padded=padded))
        largest = max(batches, key=lambda rows: (len(rows), len({groups[row] for row in rows}))).tolist()
        counts = rows, step_rows, len(largest), len(batches)
        micro_groups = tuple(groups[row] for row in largest) if shared else ()
        few = tuple(prompts[: len(largest)])
        return cls(*counts, prompt, response, prompts_per_rollout, few, micro_groups)

    @classmethod
    def of_demonstrations(cls, ranks: int, batch_size: int, prompt: int, response: int) -> Shapes:
        """Of supervised fine-tuning, where a batch is a micro-batch."""
        rows = -(-batch_size // ranks)
        return cls(rows, rows, rows, 1, prompt, response)

    @property
    def tokens(self) -> int:
        """Tokens of one row."""
        return self.prompt + self.response

    @property
    def half_a_micro_batch(self) -> int:
        """The tokens to which half of a micro-batch comes."""
        if not self.micro_groups:
            return self.micro_rows // 2 * self.tokens
        return (len(set(self.micro_groups)) * self.prompt + self.micro_rows * self.response) // 2

    def sequences(self) -> FlatSequences:
        """A micro-batch of dummy tokens; prompts of different groups begin with different ones."""
        prompts = [[group] + [0] * (self.prompt - 1) for group in self.micro_groups or range(self.micro_rows)]
        return FlatSequences.collate(prompts, [[0] * self.response] * self.micro_rows)

    def scores_first(self, module: Any) -> bool:
        """Whether a rollout is scored before its update, in an iteration that trains every network."""
        iteration = module.critic_warmup_iterations + 1 if isinstance(module, PPOModule) else 1
        rollout: Any = SimpleNamespace(num_groups=self.groups, iteration=iteration)
        return module.scores_first(rollout)

    def scored_first(self, module: Any) -> float:
        """The share of a rollout that is scored before its update, as the curve ``update/scored_first``."""
        if self.scores_first(module):
            return 1.0
        in_first_step = min(module.updater.mini_batch_prompts or self.groups, self.groups)
        return 0.0 if module.scorer.old_logp == "sampler" else 1.0 - in_first_step / self.groups

    def experience(self, module: Any) -> Experience:
        """The rows of a micro-batch at the start of an optimizer step, with all that the module's losses may read."""

        def zeros() -> Tensor:
            return torch.zeros(self.micro_rows * self.response)

        scored = self.scores_first(module)
        rows = range(self.micro_rows if self.prompts else 0)
        return Experience(
            sequences=self.sequences(),
            old_logp=zeros() if scored else None,
            old_entropy=zeros() if scored else None,
            advantages=zeros(),
            mask=torch.ones(self.micro_rows * self.response, dtype=torch.bool),
            groups=torch.zeros(self.micro_rows, dtype=torch.long),
            temperature=1.0,
            prompts=tuple(self.prompts[row % len(self.prompts)] for row in rows),
            token_rewards=zeros(),
            sampler_logp=zeros(),
            extra={name: zeros() for name in _extra_names(module)},
        )

    def rollout_bytes(self, module: Any) -> int:
        """Bytes of a rollout and its scores, and of the copy that an optimizer step works on."""
        if module.policy_loss is None:
            return self.rows * self.tokens * LONG
        # sampler_logp, token_rewards, old_logp, old_entropy, advantages
        floats = 5 + len(_extra_names(module))
        step = self.tokens * INT + self.response * (floats * FLOAT + BOOL)
        # What a rollout's first step finds out of its own rows is added to a copy of what was known of the others.
        kept = step + self.response * (0 if self.scores_first(module) else 2 * FLOAT)
        copied = step if self.step_rows < self.rows else 0  # a step on the whole rollout copies nothing
        return self.rows * kept + self.step_rows * (copied + self.response * FLOAT)  # a step has weights


def _shares_prompts(module: Any) -> bool:
    """Whether the module's policy will run each prompt of a micro-batch once, as far as its architecture tells."""
    options = module.policy_options
    if not options.share_prompts or options.packing:
        return False
    return known_obstacle(empty_model(module.policy_source, options)) is None


def _extra_names(module: Any) -> list[str]:
    ppo = ["values", "returns"] if isinstance(module, PPOModule) else []
    if module.kl is None:
        return ppo
    return ppo + (["reference_kl"] if module.kl.estimator == "exact" else ["reference_logp", "reference_kl"])
