"""The input of an update: a rollout as losses and regularisers see it. Shapes as in :mod:`ibro_lightning.types`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from ibro_lightning.batches.sequences import Sequences, one_line
from ibro_lightning.types import Prompt


@dataclass(frozen=True, repr=False)
class OldScores:
    """What is known of a rollout before its first optimizer step, which scores its own rows."""

    logp: Tensor
    """``[B, T]``; nan where it is not known yet, 0 on padding."""
    entropy: Tensor
    """``[B, T]``; nan where it is not known."""
    scored: Tensor
    """``[B]`` bool: rows whose log-probs and entropies are the policy's own."""

    __repr__ = one_line

    @classmethod
    def unknown(cls, sequences: Sequences, dtype: torch.dtype) -> Self:
        """Nothing is known yet."""
        responses = sequences.response_mask
        nothing = torch.zeros(responses.shape, dtype=dtype, device=responses.device).masked_fill(responses, torch.nan)
        return cls(nothing, nothing.clone(), torch.zeros_like(sequences.starts, dtype=torch.bool))

    def select(self, rows: Tensor, width: int) -> Self:
        """These rows, trimmed to ``width``."""
        return type(self)(self.logp[rows, :width], self.entropy[rows, :width], self.scored[rows])


@dataclass(frozen=True, repr=False)
class Experience:
    """A rollout's sequences with everything that stays fixed while the policy moves.

    Rows may be selected: an optimizer step holds some of a rollout's rows, a micro-batch some of a step's.
    """

    sequences: Sequences
    old_logp: Tensor | None
    """``[B, T]`` under the policy that the rollout came from; None: not known yet, the first optimizer step scores its
    own rows."""
    old_entropy: Tensor | None
    """``[B, T]`` of the same policy, in nats; None if :attr:`old_logp` is, and in a step with rows that nobody has
    scored (:attr:`scored`)."""
    advantages: Tensor
    """``[B, T]``."""
    mask: Tensor
    """``[B, T]`` bool: False on padding and on tokens that take no part in the loss."""
    groups: Tensor
    """``[B]`` the prompt that each row answers, numbered over all ranks."""
    temperature: float
    iteration: int = 0
    prompts: tuple[Prompt, ...] = ()
    """The rows' prompts, for methods that need more than tokens."""
    token_rewards: Tensor | None = None
    """``[B, T]`` each response's reward at its last token, less a KL penalty in the reward."""
    sampler_logp: Tensor | None = None
    """``[B, T]`` log-probs that the engine sampled with, nan where it gave none."""
    weights: Tensor | None = None
    """``[B, T]`` each token's weight in its optimizer step's loss, ``Σ weights·x``, however the step is split."""
    num_tokens: Tensor | float = 1.0
    """Valid tokens of the optimizer step on all ranks: the denominator of its metrics."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """``[B, T]`` each: tensors that an algorithm or a regulariser adds (values, returns, a choice of tokens, …)."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Measured while the step was prepared, for the curves."""
    outcomes: Tensor | None = None
    """``[B]`` accuracy, nan where the verifier was stopped; None: the rewards are the outcomes."""
    outcome_span: Tensor | None = None
    """``[B]`` the reward of right less that of wrong; None: 1."""
    num_groups: int | None = None
    """Groups of the whole rollout on all ranks; None: there are no others than these."""
    placeholder: bool = False
    """This rank has no share of the rollout: its rows do not count, and only take part in the collectives."""
    scored: Tensor | None = None
    """``[B]`` bool: rows whose old scores are the policy's own; the others have the sampler's log-probs, and nan in
    place of entropies. None: all rows are alike."""
    other_rows: OldScores | None = None
    """Of a whole rollout, while :attr:`old_logp` is None: the rows that are not in its first optimizer step."""

    def __len__(self) -> int:
        return len(self.sequences)

    __repr__ = one_line

    @property
    def responses(self) -> Tensor:
        """``[B, T]`` bool: the response tokens that statistics count, whether or not they take part in the loss."""
        responses = self.sequences.response_mask
        return torch.zeros_like(responses) if self.placeholder else responses

    @property
    def scored_responses(self) -> Tensor:
        """``[B, T]`` bool: those of :attr:`responses` whose old log-prob and entropy are the policy's own."""
        return self.responses if self.scored is None else self.responses & self.scored[:, None]

    def select(self, rows: Tensor) -> Self:
        """These rows, trimmed to the longest response among them."""
        sequences = self.sequences.select(rows)
        width = sequences.max_response_length

        def trim(values: Tensor) -> Tensor:
            return values[rows, :width]

        def trim_optional(values: Tensor | None) -> Tensor | None:
            return None if values is None else trim(values)

        return replace(
            self,
            sequences=sequences,
            old_logp=trim_optional(self.old_logp),
            old_entropy=trim_optional(self.old_entropy),
            advantages=trim(self.advantages),
            mask=trim(self.mask),
            groups=self.groups[rows],
            prompts=tuple(self.prompts[row] for row in rows.tolist()) if self.prompts else (),
            token_rewards=trim_optional(self.token_rewards),
            sampler_logp=trim_optional(self.sampler_logp),
            outcomes=None if self.outcomes is None else self.outcomes[rows],
            outcome_span=None if self.outcome_span is None else self.outcome_span[rows],
            weights=trim_optional(self.weights),
            scored=None if self.scored is None else self.scored[rows],
            other_rows=None if self.other_rows is None else self.other_rows.select(rows, width),
            extra={name: trim(values) for name, values in self.extra.items()},
        )

    def with_extra(self, **extra: Tensor) -> Self:
        """A copy that also holds these ``[B, T]`` tensors."""
        return replace(self, extra={**self.extra, **extra})


@dataclass(frozen=True, repr=False)
class TokenStats:
    """One micro-batch as a loss or a regulariser sees it, ``[B, T]`` each.

    ``logp`` and ``entropy`` belong to the current policy and carry gradients; the rest is fixed. Values are meaningless
    where ``mask`` is False. ``entropy`` is None when the regulariser does not need it, ``old_entropy`` where the policy
    did not score the step's rows (``old_logp: sampler``, with a regulariser that does not read it). ``extra`` holds
    what the algorithm and the regulariser added to the :class:`Experience`.
    """

    logp: Tensor
    entropy: Tensor | None
    old_logp: Tensor
    old_entropy: Tensor | None
    advantages: Tensor
    mask: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    sampler_logp: Tensor | None = None

    __repr__ = one_line
