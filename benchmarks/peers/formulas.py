"""Losses, advantages and their gradients: ours beside verl's and TRL's own code, on one batch in float64.

python -m peers.formulas, in the environment of ``parity.py``; prints a JSON list of :class:`Row`.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from trl import GRPOTrainer
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig

from ibro_lightning import functional as F
from ibro_lightning.functional import policy_loss as surrogates

GROUP, TOKENS, LIMIT = 4, 12, 20
LENGTHS = torch.tensor([12, 3, 7, 1, 9, 12, 5, 4])
WITH_AN_EMPTY_ROW = torch.tensor([12, 3, 7, 0, 9, 12, 5, 4])
"""As overlong filtering leaves it."""
LOW, HIGH, DUAL = 0.2, 0.28, 10.0


@dataclass(frozen=True)
class Row:
    """How far two formulas lie apart: their values, and the largest difference of their gradients (or of values per
    token, for an advantage)."""

    peer: str
    formula: str
    ours: float
    theirs: float
    largest: float


class Batch:
    """Eight responses to two prompts, of 1 to 12 tokens, with ratios on which every clip acts."""

    def __init__(self, lengths: Tensor = LENGTHS) -> None:
        draw = torch.Generator().manual_seed(7)
        normal = partial(torch.randn, len(LENGTHS), TOKENS, generator=draw, dtype=torch.float64)
        self.mask = (torch.arange(TOKENS) < lengths[:, None]).double()
        self.old_logp = -2.0 * normal().abs() - 0.05
        self.logp = (self.old_logp + 2.0 * normal()).clamp(max=-0.01).requires_grad_()
        self.ref_logp = self.old_logp + 0.3 * normal()
        self.entropy = normal().abs().requires_grad_()
        self.old_values, self.returns = normal(), normal()
        self.values = (self.old_values + normal()).requires_grad_()
        self.rewards = torch.tensor([1.0, -1, -1, 1, -1, -1, -1.5, 1], dtype=torch.float64)
        self.groups = torch.arange(len(LENGTHS)) // GROUP
        self.advantages = F.group_advantages(self.rewards, self.groups)[:, None].expand(-1, TOKENS) * self.mask
        self.sampler_weights = (0.5 * normal()).exp().clamp(max=2.0)
        last = torch.arange(TOKENS) == lengths[:, None] - 1
        self.token_rewards = last * self.rewards[:, None]

    def aggregate(self, values: Tensor, mode: F.AggregationMode = "token-mean") -> Tensor:
        counts = {"num_tokens": self.mask.sum(), "num_sequences": (self.mask.sum(1) > 0).sum()}
        return F.aggregate(values, self.mask, mode, max_tokens=LIMIT, **counts)


def gradients(value: Tensor, batch: Batch) -> Tensor:
    """With respect to log-probs, entropies and values, one after the other."""
    leaves = [batch.logp, batch.entropy, batch.values]
    found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
    return torch.stack(
        [torch.zeros_like(leaf) if one is None else one for leaf, one in zip(leaves, found, strict=True)]
    )


def losses(peer: str, formula: str, batch: Batch, ours: Tensor, theirs: Tensor) -> Row:
    difference = (gradients(ours, batch) - gradients(theirs, batch)).abs().max()
    return Row(peer, formula, ours.item(), theirs.item(), difference.item())


def per_token(peer: str, formula: str, batch: Batch, ours: Tensor, theirs: Tensor) -> Row:
    """Of advantages and returns: sums of squares, and the largest difference of a token of the response."""
    ours, theirs = ours * batch.mask, theirs * batch.mask
    return Row(peer, formula, (ours**2).sum().item(), (theirs**2).sum().item(), (ours - theirs).abs().max().item())


def spread(batch: Batch, advantages: Tensor) -> Tensor:
    return advantages[:, None].expand(-1, TOKENS) * batch.mask


def clip_higher(batch: Batch, dual_clip: float | None) -> Tensor:
    """``[B, T]``; every clip acts on a token of the batch, or nothing would be shown."""
    found = F.clipped_surrogate(
        batch.logp, batch.old_logp, batch.advantages, clip_ratio_low=LOW, clip_ratio_high=HIGH, dual_clip=dual_clip
    )
    bounds = [found.clipped_low, found.clipped_high, *([found.clipped_dual] if dual_clip else [])]
    assert all(bool((bound & batch.mask.bool()).any()) for bound in bounds), "a clip acts on no token"
    return found.loss


# verl.


def actor(**settings: Any) -> ActorConfig:
    clips = {"clip_ratio_low": LOW, "clip_ratio_high": HIGH, "clip_ratio_c": DUAL}
    return ActorConfig(**({"strategy": "fsdp", "rollout_n": GROUP, "use_dynamic_bsz": True} | clips | settings))


def verl_loss(name: str, batch: Batch, mode: str, weights: Tensor | None = None, **settings: Any) -> Tensor:
    function = core_algos.get_policy_loss_fn(name)
    config = actor(global_batch_info={"loss_scale_factor": LIMIT} if mode.endswith("norm") else {}, **settings)
    loss, _ = function(
        batch.old_logp, batch.logp, batch.advantages, batch.mask, mode, config=config, rollout_is_weights=weights
    )
    return loss


def losses_of_verl() -> Iterator[Row]:
    batch, empty = Batch(), Batch(WITH_AN_EMPTY_ROW)
    loss = partial(losses, "verl", batch=batch)
    ppo = clip_higher(batch, DUAL)
    for mode in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"):
        name = f"clip-higher with dual clip, {mode}"
        yield loss(formula=name, ours=batch.aggregate(ppo, mode), theirs=verl_loss("vanilla", batch, mode))
    sequence: F.AggregationMode = "seq-mean-token-mean"
    ours, theirs = empty.aggregate(clip_higher(empty, DUAL), sequence), verl_loss("vanilla", empty, sequence)
    yield losses("verl", f"clip-higher with dual clip, {sequence}, one row without tokens", empty, ours, theirs)
    theirs = verl_loss("vanilla", batch, "token-mean", batch.sampler_weights)
    ours = batch.aggregate(ppo * batch.sampler_weights)
    yield loss(formula="clip-higher with dual clip and sampler weights", ours=ours, theirs=theirs)
    arguments = (batch.logp, batch.old_logp, batch.advantages)
    small = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.15}
    others: dict[str, tuple[str, Tensor, F.AggregationMode, dict[str, float]]] = {
        "GSPO": ("gspo", surrogates.gspo_surrogate(*arguments, batch.mask, **small).loss, sequence, small),
        "GMPO": (
            "geo_mean",
            surrogates.gmpo_surrogate(*arguments, batch.mask, clip_ratio_low=0.4, clip_ratio_high=0.4).loss,
            sequence,
            {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4},
        ),
        "CISPO": (
            "cispo",
            surrogates.cispo_surrogate(*arguments, clip_ratio_low=0.8, clip_ratio_high=4.0).loss,
            "token-mean",
            {"clip_ratio_low": 0.8, "clip_ratio_high": 4.0},
        ),
        "SAPO": ("sapo", surrogates.sapo_surrogate(*arguments).loss, sequence, {}),
        "DPPO, binary TV (verl caps the ratio, here at 20)": (
            "dppo_tv",
            surrogates.dppo_surrogate(*arguments).loss,
            "token-mean",
            {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 20.0},
        ),
    }
    for formula, (name, ours, mode, settings) in others.items():
        yield loss(formula=formula, ours=batch.aggregate(ours, mode), theirs=verl_loss(name, batch, mode, **settings))
    bonus = core_algos.agg_loss(batch.entropy, batch.mask, "token-mean")
    ib = F.information_bottleneck_objective(batch.entropy, batch.advantages, batch.mask)
    theirs = core_algos.agg_loss(batch.advantages * batch.entropy, batch.mask, "token-mean")
    yield loss(formula="IB's A·H, in verl's token-mean (verl has no IB)", ours=batch.aggregate(ib), theirs=theirs)
    naive = batch.aggregate(batch.entropy)
    yield loss(formula="entropy bonus, token-mean", ours=naive, theirs=bonus)
    value = F.clipped_value_loss(batch.values, batch.old_values, batch.returns, clip=0.5).loss
    theirs, _ = core_algos.compute_value_loss(batch.values, batch.returns, batch.old_values, batch.mask, 0.5)
    yield loss(formula="value loss, clip 0.5", ours=batch.aggregate(value), theirs=theirs)
    estimators: dict[F.KLEstimator, str] = {"k1": "k1", "k2": "k2", "k3": "k3", "k3_k2_grad": "k3+"}
    for ours_name, their_name in estimators.items():
        ours = batch.aggregate(F.kl_divergence(batch.logp, batch.ref_logp, ours_name))
        penalty = core_algos.kl_penalty(batch.logp, batch.ref_logp, their_name)
        theirs = core_algos.agg_loss(penalty, batch.mask, "token-mean")
        yield loss(formula=f"KL to a reference, {ours_name} ({their_name})", ours=ours, theirs=theirs)


def advantages_of_verl() -> Iterator[Row]:
    batch = Batch()
    row = partial(per_token, "verl", batch=batch)
    index = batch.groups.numpy()
    grpo = partial(core_algos.compute_grpo_outcome_advantage, batch.token_rewards, batch.mask, index)
    ours = spread(batch, F.group_advantages(batch.rewards, batch.groups))
    yield row(formula="advantage of GRPO", ours=ours, theirs=grpo()[0])
    ours = spread(batch, F.dr_grpo_advantages(batch.rewards, batch.groups))
    yield row(formula="advantage of Dr. GRPO", ours=ours, theirs=grpo(norm_adv_by_std_in_grpo=False)[0])
    theirs = core_algos.compute_rloo_outcome_advantage(batch.token_rewards, batch.mask, index)[0]
    ours = spread(batch, F.rloo_advantages(batch.rewards, batch.groups))
    yield row(formula="advantage of RLOO", ours=ours, theirs=theirs)
    alone = np.arange(len(LENGTHS))
    theirs = core_algos.compute_grpo_outcome_advantage(batch.token_rewards, batch.mask, alone)[0]
    ours = spread(batch, F.group_advantages(batch.rewards, torch.arange(len(LENGTHS))))
    yield row(formula="advantage of GRPO in groups of one", ours=ours, theirs=theirs)
    theirs = core_algos.compute_reinforce_plus_plus_outcome_advantage(
        batch.token_rewards, batch.mask, config=AlgoConfig(gamma=0.99)
    )[0]
    ours = F.reinforce_plus_plus_advantages(batch.token_rewards, batch.mask, gamma=0.99)
    yield row(formula="advantage of REINFORCE++", ours=ours, theirs=theirs)
    values = batch.values.detach()
    ours_gae = F.gae(batch.token_rewards, values, batch.mask, gamma=0.99, lam=0.95)
    theirs_gae = core_algos.compute_gae_advantage_return(batch.token_rewards, values, batch.mask, 0.99, 0.95)
    yield row(formula="returns of GAE", ours=ours_gae.returns, theirs=theirs_gae[1])
    white = F.masked_whiten(ours_gae.advantages, batch.mask)
    yield row(formula="advantages of GAE, whitened", ours=white, theirs=theirs_gae[0])


# TRL.


def trl_loss(batch: Batch, kind: str, **settings: Any) -> Tensor:
    """``GRPOTrainer._compute_loss`` with the batch's log-probs in place of a model's: of a whole optimizer step."""
    arguments = {"delta": None, "use_bias_correction_kl": False, "steps_per_generation": 1, "entropy_target": None}
    arguments |= {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}
    arguments |= {name: settings.pop(name) for name in [*settings] if name in arguments}
    accelerator = SimpleNamespace(
        num_processes=1, sync_gradients=False, gather=lambda x: x[None] if x.dim() == 0 else x, reduce=lambda x, **_: x
    )
    trainer = SimpleNamespace(
        **{
            "top_entropy_quantile": 1.0,
            "off_policy_mask_threshold": None,
            "importance_sampling_level": "token",
            "beta": 0.0,
            "loss_type": kind,
            "epsilon_low": LOW,
            "epsilon_high": HIGH,
            "use_vllm": "weights" in settings,
            "vllm_importance_sampling_correction": True,
            "aux_loss_enabled": False,
            "current_gradient_accumulation_steps": 1,
            "max_completion_length": LIMIT,
            "use_adaptive_entropy": False,
            "entropy_coef": 0.0,
            "_entropy_bonus_enabled": "entropy_coef" in settings,
        }
        | {name: value for name, value in settings.items() if name != "weights"},
        args=SimpleNamespace(**arguments),
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch.logp, batch.entropy, None),
    )
    ids = torch.zeros(len(LENGTHS), TOKENS, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": batch.mask,
        "advantages": batch.advantages[:, 0],
        "old_per_token_logps": batch.old_logp,
        "ref_per_token_logps": batch.ref_logp,
        "num_items_in_batch": batch.mask.sum(),
        "importance_sampling_ratio": settings.get("weights"),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def of_trl() -> Iterator[Row]:
    batch, empty = Batch(), Batch(WITH_AN_EMPTY_ROW)
    loss = partial(losses, "TRL", batch=batch)
    arguments = (batch.logp, batch.old_logp, batch.advantages)
    ppo = clip_higher(batch, None)
    modes: dict[str, F.AggregationMode] = {
        "dapo": "token-mean",
        "bnpo": "token-mean",
        "grpo": "seq-mean-token-mean",
        "dr_grpo": "seq-mean-token-sum-norm",
    }
    for kind, mode in modes.items():
        yield loss(
            formula=f"clip-higher, {mode} ({kind})", ours=batch.aggregate(ppo, mode), theirs=trl_loss(batch, kind)
        )
    name, mode = "clip-higher, seq-mean-token-mean (grpo), one row without tokens", modes["grpo"]
    yield losses("TRL", name, empty, empty.aggregate(clip_higher(empty, None), mode), trl_loss(empty, "grpo"))
    theirs = trl_loss(batch, "dapo", weights=batch.sampler_weights)
    ours = batch.aggregate(ppo * batch.sampler_weights)
    yield loss(formula="clip-higher with sampler weights", ours=ours, theirs=theirs)
    dual = batch.aggregate(clip_higher(batch, DUAL))
    theirs = trl_loss(batch, "dapo", delta=DUAL)
    yield loss(formula="clip-higher with dual clip (delta)", ours=dual, theirs=theirs)
    small = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.15}
    gspo = batch.aggregate(surrogates.gspo_surrogate(*arguments, batch.mask, **small).loss, "seq-mean-token-mean")
    theirs = trl_loss(batch, "grpo", importance_sampling_level="sequence", epsilon_low=0.1, epsilon_high=0.15)
    yield loss(formula="GSPO", ours=gspo, theirs=theirs)
    cispo = surrogates.cispo_surrogate(*arguments, clip_ratio_low=1.0, clip_ratio_high=4.0).loss
    theirs = trl_loss(batch, "cispo", epsilon_high=5.0)
    yield loss(formula="CISPO (their epsilon_high is the bound: 5)", ours=batch.aggregate(cispo), theirs=theirs)
    sapo = surrogates.sapo_surrogate(*arguments).loss
    yield loss(formula="SAPO", ours=batch.aggregate(sapo, "seq-mean-token-mean"), theirs=trl_loss(batch, "sapo"))
    kl = batch.aggregate(ppo + 0.1 * F.kl_divergence(batch.logp, batch.ref_logp, "k3"))
    yield loss(formula="KL to a reference, k3, β = 0.1", ours=kl, theirs=trl_loss(batch, "dapo", beta=0.1))
    naive = batch.aggregate(ppo) - 0.001 * batch.aggregate(batch.entropy)
    theirs = trl_loss(batch, "dapo", entropy_coef=0.001)
    yield loss(formula="entropy bonus, token-mean, α = 0.001", ours=naive, theirs=theirs)


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump([asdict(row) for row in (*losses_of_verl(), *advantages_of_verl(), *of_trl())], sys.stdout)
