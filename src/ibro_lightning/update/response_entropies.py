"""Entropies of some trained responses by the sign of the advantage, by position, and with the answer shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ibro_lightning.batches import Rollout
from ibro_lightning.batches.experience import Experience
from ibro_lightning.functional import ending_rates, masked_correlation, quarter
from ibro_lightning.ranks import ALONE, Ranks
from ibro_lightning.regularizers import StepContext
from ibro_lightning.regularizers.hindsight import HindsightTemplate
from ibro_lightning.seeding import derive_seed, permutation, run_seed
from ibro_lightning.update.steps import rows_of

QUARTERS = ("first", "second", "third", "last")


def some_groups(experience: Experience, rollout: Rollout, responses: int, ranks: Ranks = ALONE) -> Experience:
    """About so many responses that are trained on, on all ranks, in whole groups that are chosen at random; at least
    one group. A rank without any of these has one row, which does not count."""
    total = ranks.sum(torch.tensor(0 if experience.placeholder else len(experience), device=experience.groups.device))
    groups = max(1, rollout.num_groups)
    count = max(1, round(responses * groups / max(1, int(total))))
    seed = derive_seed(run_seed(), "information", rollout.iteration)
    chosen = torch.tensor(permutation(groups, seed)[:count], device=experience.groups.device)
    rows = torch.isin(experience.groups, chosen).nonzero().squeeze(-1)
    if experience.placeholder:
        rows = rows[:0]
    return rows_of(replace(experience, other_rows=None), rows)


def entropy_parts(step: Experience, entropy: Tensor, ranks: Ranks = ALONE) -> dict[str, float]:
    """Mean entropy of tokens with positive and with negative advantages, and of each quarter of the responses; without
    those of which there is no token. Over the tokens that take part in the loss.

    Args:
        entropy: ``[N]`` nats.
    """
    mask, lengths = step.mask, step.lengths
    position = torch.arange(len(mask), device=mask.device) - step.per_token(lengths.cumsum(0) - lengths)  # [N]
    quarters = quarter(position, step.per_token(lengths))  # [N]
    parts = {
        "entropy_positive_advantage": mask & (step.advantages > 0),
        "entropy_negative_advantage": mask & (step.advantages < 0),
        **{f"entropy_{name}_quarter": mask & (quarters == number) for number, name in enumerate(QUARTERS)},
    }
    counts = ranks.sum(torch.stack([part.sum() for part in parts.values()])).tolist()
    means = {name: ranks.mean(entropy.double(), part).item() for name, part in parts.items()}
    return {name: mean for (name, mean), count in zip(means.items(), counts, strict=True) if count}


def answer_parts(
    step: Experience, entropy: Tensor, hindsight: HindsightTemplate, context: StepContext
) -> dict[str, float]:
    """What the entropies ``Hᵃ_t`` after a prompt that shows the answer say; one more scoring pass. Collective.

    ``corr_advantage_entropy_given_answer``: ``A_t`` with ``Hᵃ_t``. ``corr_advantage_lambda``: ``A_t`` with IBRO's
    weight of the token's entropy, ``λ_t = 2·min(Hᵃ_t / H_t, 1) − 1``, in our reading; IB regularisation puts −A_t in
    its place, which would make this −1. Over tokens, of which those of a response are alike in DAPO's A_t: a
    correlation's standard error is about 1/√responses.

    ``answer_information``: ``Σ_t H_t − Hᵃ_t`` per response, a proxy of I(r; a) in nats. It is I(r; a | q) where the
    policy's responses with the answer shown would visit the same states as those without, which they do not, and where
    the shown prompt is one that the model understands. So it has no sign: it may be negative.

    Args:
        entropy: ``[N]`` H_t, nats.

    Raises:
        ConfigError: the template cannot be filled or written.
    """
    ranks = context.ranks
    with ranks.all_or_none():
        shown = hindsight.sequences(step.prompts, step.sequences, context.tokenizer, context.max_length)
    _, given = context.score(shown, step.temperature)  # [N] Hᵃ
    without, given = entropy.double(), given.double()
    lam = 2.0 * (given / without.clamp(min=1e-6)).clamp(max=1.0) - 1.0  # [N]
    counts = ranks.sum((step.row_sums(step.mask) > 0).sum()).clamp(min=1)
    drop = ranks.sum(torch.where(step.mask, without - given, 0.0).sum())

    def correlation(values: Tensor) -> float:
        return masked_correlation(step.advantages, values, step.mask, mean=ranks.mean).item()

    return {
        "entropy_given_answer": ranks.mean(given, step.mask).item(),
        "corr_advantage_entropy_given_answer": correlation(given),
        "corr_advantage_lambda": correlation(lam),
        "answer_information": (drop / counts).item(),
    }


def ending_parts(rollout: Rollout, ranks: Ranks = ALONE) -> Mapping[str, float]:
    """How often a token ends its response, by quarter of the length limit, over all sampled responses; without quarters
    that no response reaches. Collective."""
    own = [] if rollout.placeholder else list(rollout.completions)
    sampled = [c for c in (*own, *(c for group in rollout.dropped for c in group.completions)) if not c.late]
    rows = torch.tensor(
        [(len(c.token_ids), not c.truncated, c.max_tokens) for c in sampled if len(c.token_ids)], dtype=torch.long
    ).reshape(-1, 3)
    counts = torch.stack(ending_rates(rows[:, 0], rows[:, 1].bool(), rows[:, 2]))  # [2, 4]
    endings, tokens = torch.tensor(ranks.gather(counts.tolist())).sum(dim=0).tolist()
    return {
        f"eos_{name}_quarter": ended / count
        for name, ended, count in zip(QUARTERS, endings, tokens, strict=True)
        if count
    }
