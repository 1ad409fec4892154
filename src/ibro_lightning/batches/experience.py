"""The input of an update: a rollout as losses and regularisers see it. Shapes as in :mod:`ibro_lightning.types`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from ibro_lightning.batches.ragged import Places, per_token, row_sums, tokens_of
from ibro_lightning.batches.sequences import FlatSequences, Sequences, repr_of_shapes
from ibro_lightning.types import Prompt


@dataclass(frozen=True, repr=False)
class OldScores:
    """What is known of a rollout before its first optimizer step, which scores its own rows."""

    logp: Tensor
    """``[N]``; nan where it is not known yet."""
    entropy: Tensor
    """``[N]``; nan where it is not known."""
    scored: Tensor
    """``[B]`` bool: rows whose log-probs and entropies are the policy's own."""

    __repr__ = repr_of_shapes

    @classmethod
    def unknown(cls, sequences: FlatSequences, dtype: torch.dtype) -> Self:
        """Nothing is known yet."""
        nothing = torch.full(sequences.responses.shape, torch.nan, dtype=dtype, device=sequences.device)
        return cls(nothing, nothing.clone(), torch.zeros_like(sequences.response_lengths, dtype=torch.bool))

    def select(self, lengths: Tensor, rows: Tensor) -> Self:
        """These rows, of rows of ``lengths``."""
        tokens = tokens_of(lengths, rows)
        logp, entropy = (values.index_select(0, tokens) for values in (self.logp, self.entropy))
        return type(self)(logp, entropy, self.scored[rows])


@dataclass(frozen=True, repr=False)
class Experience:
    """A rollout's sequences with everything that stays fixed while the policy moves, without padding: ``[N]`` response
    tokens, row after row.

    Rows may be selected: an optimizer step holds some of a rollout's rows. A :class:`MicroBatch` has some of a step's,
    padded.
    """

    sequences: FlatSequences
    old_logp: Tensor | None
    """``[N]`` under the policy that the rollout came from; None: not known yet, the first optimizer step scores its
    own rows."""
    old_entropy: Tensor | None
    """``[N]`` of the same policy, in nats; None if :attr:`old_logp` is, and in a step with rows that are not
    scored (:attr:`scored`)."""
    advantages: Tensor
    """``[N]``."""
    mask: Tensor
    """``[N]`` bool: False on tokens that take no part in the loss."""
    groups: Tensor
    """``[B]`` the prompt that each row answers, numbered over all ranks."""
    temperature: float
    iteration: int = 0
    prompts: tuple[Prompt, ...] = ()
    """The rows' prompts, for methods that need more than tokens."""
    token_rewards: Tensor | None = None
    """``[N]`` each response's reward at its last token, less a KL penalty in the reward."""
    rewards: Tensor | None = None
    """``[B]`` the sums of :attr:`token_rewards`; of a response without tokens, its reward."""
    sampler_logp: Tensor | None = None
    """``[N]`` log-probs that the engine sampled with, nan where it gave none."""
    weights: Tensor | None = None
    """``[N]`` each token's weight in its optimizer step's loss, ``Σ weights·x``, however the step is split."""
    num_tokens: Tensor | float = 1.0
    """Valid tokens of the optimizer step on all ranks: the denominator of its metrics."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """``[N]`` each: tensors that an algorithm or a regulariser adds (values, returns, a choice of tokens, …)."""
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

    __repr__ = repr_of_shapes

    @property
    def lengths(self) -> Tensor:
        """``[B]`` tokens of each response."""
        return self.sequences.response_lengths

    @property
    def responses(self) -> Tensor:
        """``[N]`` bool: the response tokens that statistics count, whether or not they take part in the loss."""
        return torch.full_like(self.mask, not self.placeholder)

    @property
    def scored_responses(self) -> Tensor:
        """``[N]`` bool: those of :attr:`responses` whose old log-prob and entropy are the policy's own."""
        return self.responses if self.scored is None else self.responses & self.per_token(self.scored)

    def per_token(self, values: Tensor) -> Tensor:
        """``[B]`` → ``[N]``: each response's value, on each of its tokens."""
        return per_token(values, self.lengths)

    def row_sums(self, values: Tensor) -> Tensor:
        """``[N]`` → ``[B]``: sums over each response's tokens."""
        return row_sums(values, self.lengths)

    def select(self, rows: Tensor) -> Self:
        """These rows."""
        if rows.tolist() == list(range(len(self))):  # of one step on the whole rollout, which need not be there twice
            return self

        tokens = tokens_of(self.lengths, rows)  # [n]

        def of_rows(values: Tensor | None) -> Any:
            return None if values is None else values.index_select(0, tokens)

        return replace(
            self,
            sequences=self.sequences.select(rows),
            old_logp=of_rows(self.old_logp),
            old_entropy=of_rows(self.old_entropy),
            advantages=of_rows(self.advantages),
            mask=of_rows(self.mask),
            groups=self.groups[rows],
            prompts=tuple(self.prompts[row] for row in rows.tolist()) if self.prompts else (),
            token_rewards=of_rows(self.token_rewards),
            rewards=None if self.rewards is None else self.rewards[rows],
            sampler_logp=of_rows(self.sampler_logp),
            outcomes=None if self.outcomes is None else self.outcomes[rows],
            outcome_span=None if self.outcome_span is None else self.outcome_span[rows],
            weights=of_rows(self.weights),
            scored=None if self.scored is None else self.scored[rows],
            other_rows=None if self.other_rows is None else self.other_rows.select(self.lengths, rows),
            extra={name: of_rows(values) for name, values in self.extra.items()},
        )

    def micro_batch(self, rows: Tensor | None = None) -> MicroBatch:
        """These rows of an optimizer step, or all, padded to the longest response among them."""
        rows = torch.arange(len(self), device=self.groups.device) if rows is None else rows
        places = Places.of(self.lengths, rows)

        def pad(values: Tensor | None) -> Any:
            return None if values is None else places.pad(values)

        return MicroBatch(
            sequences=self.sequences.pad(rows),
            old_logp=pad(self.old_logp),
            old_entropy=pad(self.old_entropy),
            advantages=pad(self.advantages),
            mask=pad(self.mask),
            groups=self.groups[rows],
            temperature=self.temperature,
            iteration=self.iteration,
            prompts=tuple(self.prompts[row] for row in rows.tolist()) if self.prompts else (),
            sampler_logp=pad(self.sampler_logp),
            weights=pad(self.weights),
            num_tokens=self.num_tokens,
            extra={name: pad(values) for name, values in self.extra.items()},
        )

    def with_extra(self, **extra: Tensor) -> Self:
        """A copy that also holds these ``[N]`` tensors."""
        return replace(self, extra={**self.extra, **extra})


@dataclass(frozen=True, repr=False)
class MicroBatch:
    """Some rows of an optimizer step, padded for a model: ``[B, T]``, 0 on padding, of what :class:`Experience` has as
    ``[N]`` under the same name."""

    sequences: Sequences
    old_logp: Tensor | None
    old_entropy: Tensor | None
    advantages: Tensor
    mask: Tensor
    groups: Tensor
    """``[B]``."""
    temperature: float
    iteration: int = 0
    prompts: tuple[Prompt, ...] = ()
    sampler_logp: Tensor | None = None
    weights: Tensor | None = None
    num_tokens: Tensor | float = 1.0
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sequences)

    __repr__ = repr_of_shapes


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

    __repr__ = repr_of_shapes
