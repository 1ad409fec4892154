"""Importance sampling for an engine whose probabilities are not quite the policy's, and the checks of its log-probs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from ibro_lightning.batches.ragged import row_sums, row_wise
from ibro_lightning.errors import ConfigError, is_number
from ibro_lightning.functional import (
    MismatchLevel,
    MismatchMode,
    MismatchWeights,
    mismatch_diagnostics,
    mismatch_weights,
    mismatched_rows,
)
from ibro_lightning.ranks import ALONE, Ranks


@dataclass(frozen=True)
class SamplerCorrection:
    """Importance weights ``w = π_old / π_sampler`` on the policy loss, bounded; see
    :func:`~ibro_lightning.functional.mismatch_weights`.

    The default is truncated importance sampling per token. ``mode: mask`` is IcePop; ``level: sequence`` and
    ``geometric`` weigh (or drop) whole responses. A token without a finite log-prob of the engine takes no part in
    the update, corrected or not (see :func:`sampled_tokens`).

    Args:
        level: what a ratio belongs to: ``token``, ``sequence`` (the product) or ``geometric`` (the tokens' mean).
        mode: ratios out of bounds are cut (``truncate``), or their tokens dropped (``mask``).
        cap: largest ratio.
        floor: smallest one of ``mask``; None means 1 / cap.
        max_difference: a response whose log-probs differ by more than this from the policy's, in nats, as the mean
            absolute value over its tokens, takes no part in the loss: neither in the policy loss, nor in the
            regulariser's term, nor in a KL penalty. It still counts in the denominators, statistics of a whole step
            (such as Ā) still count it, and a critic still learns from it. ``sampler/mismatched_responses`` is their
            number. None: all take part. ``level: geometric`` with ``mode: mask`` is not the same: in its mean,
            differences of either sign cancel, and responses that stay are weighted. Under ``old_logp: sampler`` only
            the responses of the first optimizer step can differ.
    """

    level: MismatchLevel = "token"
    mode: MismatchMode = "truncate"
    cap: float = 2.0
    floor: float | None = None
    max_difference: float | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("level", MismatchLevel), ("mode", MismatchMode)):
            if (value := getattr(self, name)) not in get_args(allowed):
                raise ConfigError(name, value, f"write one of {', '.join(get_args(allowed))}")
        if not (is_number(self.cap) and self.cap >= 1):
            raise ConfigError("cap", self.cap, "write 1 or more: equal log-probs have ratio 1")
        bound = self.floor
        if bound is not None and not (self.mode == "mask" and is_number(bound) and 0 <= bound <= 1):
            raise ConfigError("floor", self.floor, "it is a bound of mode mask: write a number from 0 to 1, or null")
        most = self.max_difference
        if most is not None and not (is_number(most) and 0 < most < float("inf")):
            raise ConfigError("max_difference", most, "write a positive number of nats per token, or null for no bound")

    def __call__(self, old_logp: Tensor, sampler_logp: Tensor, mask: Tensor) -> MismatchWeights:
        """Weights and dropped tokens; all ``[B, T]``."""
        return mismatch_weights(
            old_logp,
            sampler_logp,
            mask,
            level=self.level,
            mode=self.mode,
            cap=self.cap,
            floor=self.floor,
            max_difference=self.max_difference,
        )

    def mismatched(self, old_logp: Tensor, sampler_logp: Tensor, mask: Tensor) -> Tensor:
        """``[B]`` bool: the responses that ``max_difference`` leaves out of the loss; of ``[B, T]`` each."""
        bound = float("inf") if self.max_difference is None else self.max_difference
        return mismatched_rows(old_logp, sampler_logp, mask, bound)


def mismatch_metrics(
    correction: SamplerCorrection | None,
    old_logp: Tensor,
    sampler_logp: Tensor,
    mask: Tensor,
    lengths: Tensor,
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """The mismatch of trainer and sampler over all ranks, before any correction, as ``sampler/…``.

    Args:
        old_logp, sampler_logp, mask: ``[N]``, of responses of ``lengths [B]``.
    """
    result, tokens = None, (old_logp, sampler_logp, mask)
    if correction is not None:
        result = MismatchWeights(
            *row_wise(lambda _, __, old, sampler, own: tuple(correction(old, sampler, own)), lengths, *tokens)
        )
    measured = mismatch_diagnostics(old_logp, sampler_logp, mask, result, mean=ranks.mean, largest=ranks.largest)
    measured["non_finite"] = ranks.sum(measured["non_finite"])
    if correction is not None and correction.max_difference is not None:
        (dropped,) = row_wise(
            lambda _, __, old, sampler, own: correction.mismatched(old, sampler, own)[:, None] & own, lengths, *tokens
        )  # [N]
        measured["mismatched_responses"] = ranks.sum((row_sums(dropped, lengths) > 0).sum().to(old_logp.dtype))
    return {f"sampler/{name}": value for name, value in measured.items()}


def sampled_tokens(sampler_logp: Tensor, tokens: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """Which of ``tokens`` take part in the update: those with a finite log-prob of the engine.

    A token without one (nan, −inf) comes from an unknown distribution: it is left out of the loss, the regulariser's
    term and both denominators. If no rank has any log-prob, the responses were not sampled by one of our engines, and
    all tokens take part, which makes sense only without a correction. All ``[N]``.
    """
    sampled = tokens & sampler_logp.isfinite()
    return sampled if bool(ranks.sum(sampled.count_nonzero())) else tokens


_CERTAIN = -1e-6
"""Above this a log-prob counts as 0: the sampler was certain, or did not fill it in."""
_ABOVE_ZERO = 1e-3
"""More than rounding can exceed 0."""
_CERTAIN_NATS = 0.1
"""Log-probs of 0 are accepted if the policy's mean on these tokens is within this of 0."""
_APART_NATS = 10.0
"""Mean difference per token that no precision explains: fp8 against bf16 stays far below 1."""
_UNIFORM_NATS = 20.0
"""No sampler draws tokens this unlikely on average: uniform sampling from 2^17 tokens has 12 nats."""


def rows_without_logp(sampler_logp: Tensor, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """``[B]`` bool each: responses without a finite log-prob; and responses whose log-probs count as 0 on all tokens,
    or on all but one of several, as in a buffer that was not filled in. Both False for a response without tokens."""
    finite = tokens & sampler_logp.isfinite()  # [N]
    count, with_logp = row_sums(tokens, lengths), row_sums(finite, lengths)  # [B]
    certain = row_sums(finite & (sampler_logp > _CERTAIN), lengths)
    return (
        (count > 0) & (with_logp == 0),
        (certain > 0) & (certain >= count - (count > 2).to(count.dtype)),
    )


def logp_are_suspicious(sampler_logp: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    """0-dim bool: whether the log-probs ``[N]`` alone call for a comparison with the policy's."""
    mean = _row_means(sampler_logp, tokens & sampler_logp.isfinite(), lengths)  # [B]
    return torch.stack([*rows_without_logp(sampler_logp, tokens, lengths), mean < -_UNIFORM_NATS]).any()


def refuse_impossible_logp(sampler_logp: Tensor, tokens: Tensor, ranks: Ranks = ALONE) -> None:
    """Raise :class:`ConfigError` if a token's log-prob ``[N]`` is above 0 by more than rounding."""
    above = (tokens & sampler_logp.isfinite() & (sampler_logp > _ABOVE_ZERO)).count_nonzero()
    if count := int(ranks.sum(above)):
        raise _refused(f"{count} of the sampler's log-probs are above 0, which no probability is")


def refuse_missing_logp(
    sampler_logp: Tensor, old_logp: Tensor, tokens: Tensor, lengths: Tensor, ranks: Ranks = ALONE
) -> int:
    """The number of responses, on all ranks, without a finite log-prob of the sampler.

    Args:
        sampler_logp, old_logp, tokens: ``[N]``, of responses of ``lengths [B]``; old_logp is the policy's.

    Raises:
        ConfigError: these are all responses; or the log-probs of some are 0 on every token (or on all but one) where
            the policy is far from certain; or their mean difference from the policy's, over all tokens, exceeds what
            any precision explains. Correcting by them would scale the loss to almost nothing, or to the cap.
    """
    without, zero = rows_without_logp(sampler_logp, tokens, lengths)  # [B]
    finite = tokens & sampler_logp.isfinite() & old_logp.isfinite()
    certain = finite & (sampler_logp > _CERTAIN)
    zero &= _row_means(old_logp, certain, lengths) < -_CERTAIN_NATS
    answers = (row_sums(tokens, lengths) > 0).sum()
    missing, zeros, total = ranks.sum(torch.stack([without.sum(), zero.sum(), answers])).tolist()
    if total and (missing == total or zeros):
        what = "0 on every token or on all but one" if zeros else "not finite"
        raise _refused(f"the sampler's log-probs of {zeros or missing} of {total} responses are {what}")
    difference = row_sums(torch.where(finite, old_logp - sampler_logp, 0.0), lengths).double().sum()
    apart, count = ranks.sum(torch.stack([difference, finite.count_nonzero().double()])).tolist()
    if abs(apart) > _APART_NATS * count:
        raise _refused(
            f"the sampler's log-probs are {abs(apart) / count:.3g} nats per token from the policy's on average"
        )
    return int(missing)


def _row_means(values: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
    """``[B]`` over each row's tokens in ``mask [N]``; 0 without any."""
    return row_sums(torch.where(mask, values, 0.0), lengths) / row_sums(mask, lengths).clamp(min=1)


def _refused(what: str) -> ConfigError:
    return ConfigError(
        "sampler_correction",
        "SamplerCorrection",
        f"{what}, so that there is nothing to correct by: give each token its own (Completion.logp, or logp of "
        "from_tokens and collate_rollout), or write sampler_correction: null (None in Python)",
    )
