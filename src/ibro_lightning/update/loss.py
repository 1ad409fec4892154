"""The policy loss, from the ratio to one number: PPO's with DAPO's clips. :mod:`~ibro_lightning.update.surrogates` has
its variants.

Notation: A advantage, r = π/π_old the probability ratio, ε its clip ratios, c the dual clip, w = π_old/π_sampler the
importance weight of an engine that is not quite the policy, H the policy's entropy, J what the regulariser maximises.
``agg`` is a weighted sum over the tokens of the whole optimizer step, so that micro-batches add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from ibro_lightning.batches.experience import Experience, MicroBatch, TokenStats
from ibro_lightning.batches.ragged import row_wise
from ibro_lightning.errors import ConfigError, check_count, check_instance
from ibro_lightning.functional import AggregationMode, HeadFunctional, aggregation_weights, approximate_kl, token_mean
from ibro_lightning.ranks import rank_zero_warn
from ibro_lightning.regularizers import EntropyRegularizer, NoRegularizer, StepContext
from ibro_lightning.regularizers.base import does_not_inherit
from ibro_lightning.regularizers.coefficients import AdaptiveClip, BoundedSetting, Coefficient, TrackedNumber
from ibro_lightning.regularizers.method import Method
from ibro_lightning.update.correction import SamplerCorrection
from ibro_lightning.update.hook_checks import (
    check_regularizer,
    functionals_of,
    measured,
    noted,
    of_policy,
    of_surrogate,
    per_step_token,
    per_token,
    prepared_by,
    shaped,
    statistics_of,
    without_entropy,
)
from ibro_lightning.update.reference import EXACT, ReferenceKL

CLIP_RATIO_LOW, CLIP_RATIO_HIGH = 0.2, 0.28
DUAL_CLIP = 10.0
"""A bound so far from 1 that it acts only on tokens that have become much more likely."""


class PolicyLoss:
    """``L = agg(w·max(−rA, −clip(r, 1−ε_low, 1+ε_high)·A) + β·KL) − α·agg(J)``; for A < 0 the maximum is cut to
    ``min(…, −cA)``. A regulariser's ``shape_policy_loss`` may change the first term.

    For another loss, subclass it and override :meth:`surrogate`.

    Args:
        regularizer: an entropy method, with α.
        clip_ratio_low, clip_ratio_high: ε of PPO (arXiv 1707.06347); different values are DAPO's clip-higher. A
            :class:`~ibro_lightning.regularizers.coefficients.Coefficient` moves it during training.
        dual_clip: c of dual-clip PPO (arXiv 1912.09729), larger than 1, or a coefficient; None switches it off.
        aggregation: how token losses become one number; denominators count the whole optimizer step.
        aggregation_max_tokens: the constant length of ``seq-mean-token-sum-norm`` (Dr.GRPO).
        sampler_correction: the bounds of w; None leaves it out.
        kl: a penalty to a reference policy, with β.
    """

    method = Method(
        formula="max(−rA, −clip(r, 1 − ε_low, 1 + ε_high)·A), at most −cA for A < 0",
        source="arXiv 1707.06347, 2503.14476, 1912.09729",
        certainty="paper",
        recipe="surrogate: ppo",
    )
    clip_ratio_low_may_be_one = False
    clip_ratio_high_limit = math.inf
    """``clip_ratio_high`` is below it."""
    has_clip_ratios = True
    has_dual_clip = True
    must_be_finite = ("update/policy_loss",)
    zero_without_advantage = True
    """Whether :meth:`surrogate` is 0 wherever the advantage is: then responses without an advantage need no backward
    pass. Subclasses with methods of their own do not inherit it."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        does_not_inherit(cls, "zero_without_advantage")

    def __init__(
        self,
        regularizer: EntropyRegularizer | None = None,
        *,
        clip_ratio_low: Coefficient | float = CLIP_RATIO_LOW,
        clip_ratio_high: Coefficient | float = CLIP_RATIO_HIGH,
        dual_clip: Coefficient | float | None = DUAL_CLIP,
        aggregation: AggregationMode = "token-mean",
        aggregation_max_tokens: int | None = None,
        sampler_correction: SamplerCorrection | None = SamplerCorrection(),
        kl: ReferenceKL | None = None,
    ) -> None:
        check_instance("regularizer", regularizer, EntropyRegularizer, optional=True)
        check_regularizer(regularizer := regularizer or NoRegularizer())
        check_instance("sampler_correction", sampler_correction, SamplerCorrection, optional=True)
        check_instance("kl", kl, ReferenceKL, optional=True)
        one, most = self.clip_ratio_low_may_be_one, self.clip_ratio_high_limit
        low = BoundedSetting("clip_ratio_low", clip_ratio_low, limit=1.0, included=one, example="0.2")
        high = BoundedSetting("clip_ratio_high", clip_ratio_high, limit=most, included=most == math.inf, example="0.28")
        self._clips = {"low": low, "high": high}
        if dual_clip is not None:
            example = "10, or null to switch it off"
            self._clips["dual"] = BoundedSetting("dual_clip", dual_clip, above=1.0, example=example)
        self._refuse_clips_without_use()
        _warn_of_another_epsilon(low, high)
        _check_aggregation(aggregation, aggregation_max_tokens)
        self.regularizer = regularizer
        self.aggregation: AggregationMode = aggregation
        self.aggregation_max_tokens = aggregation_max_tokens
        self.sampler_correction, self.kl = sampler_correction, kl

    def _refuse_clips_without_use(self) -> None:
        """Raise :class:`ConfigError` for a clip that :meth:`surrogate` does not read, unless it is the default."""
        used = {"low": self.has_clip_ratios, "high": self.has_clip_ratios, "dual": self.has_dual_clip}
        defaults = {"low": CLIP_RATIO_LOW, "high": CLIP_RATIO_HIGH, "dual": DUAL_CLIP}
        for name, clip in self._clips.items():
            if not used[name] and clip.number != defaults[name]:
                value = type(clip.number).__name__ if isinstance(clip.number, Coefficient) else clip.number
                what = "dual clip" if name == "dual" else "clip ratios"
                raise ConfigError(clip.setting, value, f"{type(self).__name__} has no {what}: leave it out")

    @property
    def clip_ratio_low(self) -> float:
        """The present ε_low."""
        return self._clips["low"].value

    @property
    def clip_ratio_high(self) -> float:
        """The present ε_high."""
        return self._clips["high"].value

    @property
    def dual_clip(self) -> float | None:
        """The present c; None: there is no dual clip."""
        return self._clips["dual"].value if "dual" in self._clips else None

    def surrogate(self, stats: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss ``[B, T]``, and metrics ``[B, T]`` by name, of which the mean over the step's tokens is logged."""
        A, low, high = stats.advantages, 1.0 - self.clip_ratio_low, 1.0 + self.clip_ratio_high
        ratio = (stats.logp - stats.old_logp).clamp(-20.0, 20.0).exp()  # [B, T] r; clamped: no loss is infinite
        loss = torch.maximum(-ratio * A, -ratio.clamp(low, high) * A)  # [B, T]
        clipped = {"low": (A < 0) & (ratio < low), "high": (A > 0) & (ratio > high), "dual": torch.zeros_like(A > 0)}
        if self.dual_clip is not None:
            loss = torch.where(A < 0, torch.minimum(loss, -self.dual_clip * A), loss)  # [B, T]
            clipped["dual"] = (A < 0) & (ratio > self.dual_clip)
        return loss, {f"update/clipped_{bound}": tokens for bound, tokens in clipped.items()}

    def __call__(self, stats: TokenStats, micro: MicroBatch) -> tuple[Tensor, dict[str, float]]:
        """The micro-batch's share of the step's loss, a scalar with a gradient, and of the step's metrics."""
        loss, curves = of_surrogate(self, self.surrogate(stats), stats)  # [B, T]
        micro = self.without_mismatched(stats, micro)
        if self.sampler_correction is not None and stats.sampler_logp is not None:
            loss = loss * self.sampler_correction(stats.old_logp, stats.sampler_logp, stats.mask).weights  # [B, T] w
        loss = shaped(loss, self.regularizer, stats)  # [B, T] shape_policy_loss of the regulariser
        total = weighted_sum(loss, micro)  # [B, T] → scalar
        metrics = {"update/policy_loss": total.item()}
        if self.kl is not None:
            loss = self.kl.add_to(loss, stats)  # [B, T] + β·KL
            total = weighted_sum(loss, micro)
        if self.regularizer.coef:
            objective = weighted_sum(self.objective(stats), micro)  # [B, T] J → scalar
            total = total - self.regularizer.coef * objective
            metrics["update/regularizer"] = objective.item()
        curves["update/approx_kl"] = approximate_kl(stats.logp.detach(), stats.old_logp)
        added = {name: values for name, values in stats.extra.items() if name not in (*micro.extra, EXACT)}
        added |= measured(self.regularizer, stats)
        curves |= {f"regularizer/{name}": values for name, values in added.items()}
        for name, values in curves.items():
            metrics[name] = token_mean(values.detach().float(), stats.mask, micro.num_tokens).item()
        return total, metrics

    def without_mismatched(self, stats: TokenStats, micro: MicroBatch) -> MicroBatch:
        """The micro-batch with a mask that is False on what ``sampler_correction.max_difference`` leaves out."""
        correction = self.sampler_correction
        if correction is None or correction.max_difference is None or stats.sampler_logp is None:
            return micro
        mismatched = correction.mismatched(stats.old_logp, stats.sampler_logp, stats.mask)  # [B]
        return replace(micro, mask=micro.mask & ~mismatched[:, None])

    def objective(self, stats: TokenStats) -> Tensor:
        """What the regulariser maximises, ``[B, T]``: J."""
        advice = without_entropy(stats, "needs_entropy")
        with noted(advice):
            values = self.regularizer.objective(stats)
        return per_token(self.regularizer, "objective", values, stats, advice)

    def rows_with_gradient(self, step: Experience) -> Tensor:
        """``[B]`` bool: the rows whose loss may have a gradient other than 0. In a group of equal rewards, advantages
        are 0, and neither surrogate nor IB moves the policy; a uniform bonus or a KL penalty does."""
        tokens = step.mask
        if self.kl is None and self.zero_without_advantage and not self.regularizer.needs_rows_without_advantage:
            tokens = tokens & (step.advantages != 0)
        return step.row_sums(tokens) > 0

    def stats(self, micro: MicroBatch, context: StepContext) -> TokenStats:
        """Run the policy over a micro-batch, with gradients. If it has no old scores, this is the rollout's first
        optimizer step: the policy is still the one that sampled, so its scores serve as the old ones."""
        regularizer, unscored = self.regularizer, micro.old_logp is None
        active = bool(regularizer.coef)
        needs_entropy = unscored or regularizer.shaping_needs_entropy or (active and regularizer.needs_entropy)
        functionals: dict[str, HeadFunctional] = {}
        if gives_extra := active or regularizer.shaping_needs_extra:
            functionals = functionals_of(regularizer, regularizer.functionals(replace(context, micro=micro)), micro)
        if self.kl is not None:
            functionals |= self.kl.functionals(micro.sequences, micro.temperature)
        logp, entropy, values = _run_policy(micro, context, needs_entropy, functionals)  # [B, T] each
        if unscored:
            assert entropy is not None
            micro = replace(micro, old_logp=logp.detach(), old_entropy=entropy.detach())
        assert micro.old_logp is not None
        statistics: dict[str, Tensor] = {}
        if gives_extra:
            statistics = statistics_of(regularizer, regularizer.statistics(micro, context), micro, values)
        extra = {**micro.extra, **statistics, **values}
        scores = (logp, entropy, micro.old_logp, micro.old_entropy)  # [B, T] each
        return TokenStats(*scores, micro.advantages, micro.mask, extra, micro.sampler_logp)

    @torch.no_grad()
    def prepare(self, step: Experience, context: StepContext) -> Experience:
        """Fix what depends on the whole optimizer step before it is split into micro-batches: the tokens' weights, and
        the regulariser's tensors."""
        per_step_token("advantages", step.advantages, step)
        num_tokens = context.ranks.sum(step.mask.count_nonzero()).clamp(min=1)
        weights_of = partial(
            aggregation_weights,
            mode=self.aggregation,
            num_tokens=num_tokens,
            num_sequences=context.ranks.sum((step.row_sums(step.mask) > 0).sum()).clamp(min=1),
            max_tokens=self.aggregation_max_tokens,
            dtype=torch.float64 if step.advantages.dtype == torch.float64 else torch.float32,
        )
        (weights,) = row_wise(lambda _, __, mask: weights_of(mask), step.lengths, step.mask)  # [N]
        step = replace(step, weights=weights, num_tokens=num_tokens)
        name = type(self.regularizer).__name__
        advice = f"old_logp and old_entropy may be None unless {name} sets prepare_needs_scores = True"
        with noted(advice if step.old_logp is None else ""):
            prepared = self.regularizer.prepare(step, context)
        prepared = prepared_by(self.regularizer, prepared)
        added = {name: values for name, values in prepared.extra.items() if name not in step.extra}
        means = {f"regularizer/{name}": context.ranks.mean(v.float(), step.mask).item() for name, v in added.items()}
        return replace(prepared, metrics={**prepared.metrics, **means})

    def start_iteration(self) -> None:
        """Let the coefficients count the iteration, before the update uses them."""
        for coefficient in set(self.coefficients.values()):  # one may serve twice
            coefficient.start_iteration()

    @property
    def needs_scores(self) -> bool:
        """Whether an update needs the old log-probs and entropies of the whole rollout before it begins."""
        follows = any(coefficient.follows_measurement for coefficient in self.entropy_observers)
        return follows or self.kl is not None or self.regularizer.prepare_needs_scores

    @property
    def coefficients(self) -> dict[str, TrackedNumber]:
        """α and the regulariser's further weights, β, and the clips that move, by their names in a checkpoint. A curve
        has the same name, or ``name/coef``."""
        of_term: dict[str, TrackedNumber] = {"regularizer": self.regularizer.coefficient}
        of_term |= {f"regularizer/{name}": c for name, c in self.regularizer.coefficients.items() if name != "coef"}
        kl = {} if self.kl is None else {"kl": self.kl.coefficient}
        clips = {f"update/{name}": c for clip in self._clips.values() for name, c in clip.coefficients.items()}
        return {**of_term, **kl, **clips}

    @property
    def entropy_observers(self) -> list[Coefficient]:
        """The coefficients that observe the policy's entropy before an update, each once: all but β, which observes the
        KL."""
        others = (c for name, c in self.coefficients.items() if name != "kl")
        return list(dict.fromkeys(c for c in others if isinstance(c, Coefficient)))


def _warn_of_another_epsilon(low: BoundedSetting, high: BoundedSetting) -> None:
    if isinstance(high.number, AdaptiveClip) and low.number != high.number.epsilon:
        written = type(low.number).__name__ if isinstance(low.number, Coefficient) else f"{low.number:g}"
        rank_zero_warn(
            f"clip_ratio_low is {written} and AdaptiveClip's epsilon {high.number.epsilon:g}; its recipe has one ε for "
            f"both bounds: write clip_ratio_low: {high.number.epsilon:g}, unless you mean two"
        )


def _run_policy(
    micro: MicroBatch, context: StepContext, with_entropy: bool, functionals: Mapping[str, HeadFunctional]
) -> tuple[Tensor, Tensor | None, Mapping[str, Tensor]]:
    """``(logp, entropy, {name: value})``. Users' policies need not accept functionals."""
    policy = context.policy
    if not functionals:
        logp, entropy = policy(micro.sequences, temperature=micro.temperature, with_entropy=with_entropy)
        return logp, entropy, {}
    scores = policy(micro.sequences, temperature=micro.temperature, with_entropy=with_entropy, functionals=functionals)
    logp, entropy, values = of_policy(policy, scores, functionals, micro)
    return logp, entropy, values


def weighted_sum(values: Tensor, micro: MicroBatch) -> Tensor:
    """``Σ weights·x`` over the valid tokens of a micro-batch: its share of the step's aggregate."""
    assert micro.weights is not None, "PolicyLoss.prepare sets the weights"
    if values.shape != micro.mask.shape:
        raise ValueError(f"losses and objectives are [B, T] = {list(micro.mask.shape)}, got {list(values.shape)}")
    return (torch.where(micro.mask, values, 0.0) * micro.weights).sum()


def _check_aggregation(mode: AggregationMode, max_tokens: int | None) -> None:
    if mode not in get_args(AggregationMode):
        raise ConfigError("aggregation", mode, f"write one of {', '.join(get_args(AggregationMode))}")
    if max_tokens is not None:
        check_count("aggregation_max_tokens", max_tokens)
    elif mode == "seq-mean-token-sum-norm":
        remedy = f"{mode} divides by a constant length: write data.sampling's max_tokens"
        raise ConfigError("aggregation_max_tokens", max_tokens, remedy)
