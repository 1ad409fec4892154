"""What an update reads: a rollout as the losses and the regularisers see it. Shapes as in :mod:`.types`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from ibro_lightning.ranks import ALONE, Ranks
from ibro_lightning.sequences import Sequences
from ibro_lightning.types import Prompt


@dataclass(frozen=True)
class Experience:
    """What an update reads: a rollout's sequences with everything that stays fixed while the policy moves.

    ``old_logp``, ``old_entropy``, ``advantages``, ``mask``: ``[B, T]``; ``mask`` is False on padding and on tokens that
    take no part in the loss. ``groups [B]``. ``prompts`` are the rows' prompts, for those who need more than tokens.
    """

    sequences: Sequences
    old_logp: Tensor
    old_entropy: Tensor
    advantages: Tensor
    mask: Tensor
    groups: Tensor
    temperature: float
    iteration: int = 0
    prompts: tuple[Prompt, ...] = ()
    weights: Tensor | None = None
    """``[B, T]`` what each token counts in the loss of its optimizer step: ``agg(x) = Σ weights·x``. Set when a step
    begins, from the whole step, so that nothing depends on how the step is cut into micro-batches."""
    num_tokens: Tensor | float = 1.0
    """Valid tokens of the optimizer step on all ranks: the denominator of its metrics."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """``[B, T]`` each: what an algorithm or a regulariser adds (values, returns, a mask of tokens, …)."""
    scored: bool = True
    """Do ``old_logp`` and ``old_entropy`` exist already? If not, the one update fills them in: :meth:`record`."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What was measured while the step was prepared, for the curves."""
    num_groups: int | None = None
    """Groups of the whole rollout on all ranks; None: those that are here are all."""
    stands_in: bool = False
    """These rows stand for nothing: this rank has no share of the rollout, and takes part in the collectives."""

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def responses(self) -> Tensor:
        """``[B, T]`` bool: the response tokens that statistics count, those that take no part in the loss included."""
        responses = self.sequences.response_mask
        return torch.zeros_like(responses) if self.stands_in else responses

    def select(self, rows: Tensor) -> Self:
        """Some rows, trimmed to the longest response among them."""
        sequences = self.sequences.select(rows)
        width = sequences.max_response_length

        def cut(values: Tensor) -> Tensor:
            return values[rows, :width]

        return replace(
            self,
            sequences=sequences,
            old_logp=cut(self.old_logp),
            old_entropy=cut(self.old_entropy),
            advantages=cut(self.advantages),
            mask=cut(self.mask),
            groups=self.groups[rows],
            prompts=tuple(self.prompts[row] for row in rows.tolist()) if self.prompts else (),
            weights=None if self.weights is None else cut(self.weights),
            extra={name: cut(values) for name, values in self.extra.items()},
        )

    def record(self, rows: Tensor, logp: Tensor, entropy: Tensor) -> None:
        """Write what the policy says of some rows before its only update, in place: for the metrics."""
        self.old_logp[rows, : logp.shape[1]] = logp
        self.old_entropy[rows, : entropy.shape[1]] = entropy

    def with_extra(self, **extra: Tensor) -> Self:
        """A copy that also holds these ``[B, T]`` tensors."""
        return replace(self, extra={**self.extra, **extra})


@dataclass(frozen=True)
class TokenStats:
    """What a loss or a regulariser sees of one micro-batch, ``[B, T]`` each.

    ``logp`` and ``entropy`` belong to the current policy and carry gradients; the rest is fixed. Values where ``mask``
    is False mean nothing. ``entropy`` is None when the regulariser said that it does not need it. ``extra`` holds what
    the algorithm and the regulariser added to the :class:`Experience`.
    """

    logp: Tensor
    entropy: Tensor | None
    old_logp: Tensor
    old_entropy: Tensor
    advantages: Tensor
    mask: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StepContext:
    """What a regulariser may ask of the module while it prepares an optimizer step.

    ``policy(sequences, temperature=…)`` gives ``(logp, entropy)`` with gradients, ``score(sequences, temperature)``
    without, for as many sequences as one likes. ``seed`` is a function of the run, the iteration and the step.
    """

    policy: Callable[..., tuple[Tensor, Tensor | None]]
    score: Callable[[Sequences, float], tuple[Tensor, Tensor]]
    sum_over_ranks: Callable[[Tensor], Tensor]
    tokenizer: Any
    seed: int
    max_length: int | None = None
    """Positions that the policy has; None if it says nothing about it."""
    ranks: Ranks = ALONE
    """This process among those that share the step, for what is neither a sum nor a mean."""

    def mean(self, values: Tensor, weights: Tensor) -> Tensor:
        """Mean over the tokens of the whole step, on all ranks; ``weights`` are a mask, or numbers ≥ 0."""
        total = self.sum_over_ranks((torch.where(weights > 0, values, 0.0) * weights).sum())
        norm = self.sum_over_ranks(weights.sum())
        return torch.where(norm > 0, total / norm, 0.0)
