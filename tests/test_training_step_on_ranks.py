"""Two ranks with a share of the rollout each train as one process does that has all of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.models import TinyQwen2
from helpers.rollouts import make_rollout, share_of, with_shown_tokens
from helpers.sharded import on_ranks
from helpers.updates import Verified, dapo, fit, ppo, sgd
from ibro_lightning.batches import Rollout
from ibro_lightning.regularizers import (
    IBRO,
    SIREN,
    STEER,
    AdaptiveClip,
    AEnt,
    ClipCov,
    ConditionalEntropyShaping,
    EntroPIC,
    EntropyBonus,
    EntropyRatioClip,
    EntropySteps,
    InformationBottleneck,
    KLCov,
    MarginalEntropy,
    PassRateInformationBottleneck,
    PositionCentredInformationBottleneck,
    PositiveAdvantageWeight,
    RenyiBonus,
    SelfDistillation,
    TopEntropyTokens,
)
from ibro_lightning.regularizers.coefficients import AdaptiveKL, TargetEntropy
from ibro_lightning.update import ReferenceKL, SamplerCorrection
from ibro_lightning.update.advantages import GROUP_RELATIVE
from ibro_lightning.update.surrogates import LOSSES

torch.set_num_threads(1)
pytestmark = pytest.mark.slow
SETTINGS: dict[str, Any] = {"optimizer": sgd, "warmup_steps": 0, "mini_batch_prompts": 2, "micro_batch_tokens": 20}
AT_ONCE = {**SETTINGS, "mini_batch_prompts": None}


class ChoiceOfKLCov(KLCov):
    """What KLCov holds back learns nothing. Its own penalty has a gradient of rounding's sign in a first step."""

    def shape_policy_loss(self, loss: Tensor, stats: Any) -> Tensor:
        return torch.where(stats.extra["kl_cov"], 0.0, loss)


def adaptive_kl(**settings: Any) -> ReferenceKL:
    """To another policy. β follows the number of responses: 8 of 100 may change it by 1.6 %."""
    return ReferenceKL(AdaptiveKL(start=0.5, target=0.01, horizon=100), policy=TinyQwen2(seed=1), **settings)


def reinforce() -> Any:
    return dapo(advantage="reinforce++", kl=adaptive_kl(placement="reward"), **SETTINGS)


def of_surrogate(surrogate: Any) -> Any:
    """In two passes with narrow clips, so that the second is off policy and clipped."""
    narrow = {} if surrogate == "sapo" else {"clip_ratio_low": 0.01, "clip_ratio_high": 0.01}
    return dapo(surrogate=surrogate, aggregation="seq-mean-token-mean", update_epochs=2, **narrow, **SETTINGS)


MODULES: dict[str, Callable[[], Any]] = {
    # A draw from all eligible tokens, which the ranks make together.
    "ClipCov": lambda: dapo(regularizer=ClipCov(0.2, -0.5, 0.5), **SETTINGS),
    "KLCov": lambda: dapo(regularizer=ChoiceOfKLCov(0.2), **SETTINGS),
    "TopEntropyTokens": lambda: dapo(regularizer=TopEntropyTokens(0.3), **SETTINGS),
    # A fraction that takes one of two tokens with the same entropy, or covariance: the first of a group's responses.
    "TopEntropyTokens in float32": lambda: dapo(torch.float32, regularizer=TopEntropyTokens(0.27), **AT_ONCE),
    "KLCov in float32": lambda: dapo(torch.float32, regularizer=ChoiceOfKLCov(0.27), **AT_ONCE),
    "IB under sequence means": lambda: dapo(
        regularizer=InformationBottleneck(0.5, part="centred"), aggregation="seq-mean-token-mean", **SETTINGS
    ),
    "STEER": lambda: dapo(regularizer=STEER(0.3), **SETTINGS),
    "CES": lambda: dapo(regularizer=ConditionalEntropyShaping(0.5, fraction=0.3), **SETTINGS),
    "SIREN": lambda: dapo(regularizer=SIREN(5.0, fraction=0.5), **SETTINGS),
    "pass rates": lambda: dapo(regularizer=PassRateInformationBottleneck(0.5), **SETTINGS),
    "IB by position": lambda: dapo(
        regularizer=PositionCentredInformationBottleneck(0.5), aggregation="seq-mean-token-mean", **SETTINGS
    ),
    "AdaptiveKL": lambda: dapo(kl=adaptive_kl(), **SETTINGS),
    "REINFORCE++ with AdaptiveKL": reinforce,
    "TargetEntropy": lambda: dapo(regularizer=EntropyBonus(TargetEntropy(target=10.0, step=0.1)), **SETTINGS),
    "weights that move": lambda: dapo(
        regularizer=PositiveAdvantageWeight(EntropySteps(target=10.0, step=0.3)),
        clip_ratio_high=AdaptiveClip(target=10.0),
        **SETTINGS,
    ),
    "mismatched responses": lambda: dapo(sampler_correction=SamplerCorrection(max_difference=3.7), **SETTINGS),
    "EntropyRatioClip": lambda: dapo(regularizer=EntropyRatioClip(1e-3, 1e-3), update_epochs=2, **SETTINGS),
    # The first step scores its own rows; the others are scored before, or have the sampler's log-probs.
    "IB in two passes": lambda: dapo(regularizer=InformationBottleneck(0.5), update_epochs=2, **SETTINGS),
    "the sampler's log-probs": lambda: dapo(
        regularizer=InformationBottleneck(0.5), update_epochs=2, old_logp="sampler", **SETTINGS
    ),
    "MarginalEntropy": lambda: dapo(
        regularizer=MarginalEntropy(0.5, prompts=3, base=InformationBottleneck(0.5, noise=0.5)),
        aggregation="seq-mean-token-mean",
        update_epochs=2,
        **SETTINGS,
    ),
    "noise": lambda: dapo(advantage_noise=0.5, update_epochs=2, **SETTINGS),
    "noise in PPO": lambda: ppo(critic_optimizer=sgd, gae_lambda=0.9, advantage_noise=0.5, **SETTINGS),
    "AEnt": lambda: dapo(regularizer=AEnt(0.5), **SETTINGS),
    "RenyiBonus": lambda: dapo(regularizer=RenyiBonus(0.5), **SETTINGS),
    "SelfDistillation": lambda: dapo(regularizer=with_shown_tokens(SelfDistillation(0.5)), **SETTINGS),
    "IBRO": lambda: dapo(regularizer=with_shown_tokens(IBRO(0.5)), **SETTINGS),
    "EntroPIC": lambda: dapo(regularizer=EntroPIC(), **SETTINGS),
    **{surrogate: partial(of_surrogate, surrogate) for surrogate in LOSSES},
    **{advantage: partial(dapo, advantage=advantage, **SETTINGS) for advantage in GROUP_RELATIVE},
    "PPO": lambda: ppo(critic_optimizer=sgd, gae_lambda=0.9, kl=adaptive_kl(), **SETTINGS),
}
HALVES, UNEQUAL, ONE_HAS_NONE = ([0, 1], [2, 3]), ([0], [1, 2, 3]), ([0, 1, 2, 3], [])
IN_TURN, SWAPPED = ([0, 2], [1, 3]), ([2, 3], [0, 1])
OWN_SCORES = ("IB in two passes", "the sampler's log-probs")
FLOAT32 = [name for name in MODULES if name.endswith("float32")]
CASES = [
    *((name, HALVES) for name in ("ClipCov", "TopEntropyTokens", "TargetEntropy", "PPO", "EntropyRatioClip")),
    *((name, UNEQUAL) for name in ("ClipCov", "KLCov", "IB under sequence means", "AdaptiveKL", "weights that move")),
    *((name, UNEQUAL) for name in ("STEER", "CES", "SIREN", "pass rates", "IB by position")),
    *((name, ONE_HAS_NONE) for name in ("STEER", "SIREN", "IB by position")),
    *((name, shares) for name in ("MarginalEntropy", "noise in PPO") for shares in (HALVES, UNEQUAL, ONE_HAS_NONE)),
    *(("noise", shares) for shares in (IN_TURN, SWAPPED)),
    *((name, UNEQUAL) for name in ("AEnt", "RenyiBonus", "SelfDistillation", "IBRO", "EntroPIC")),
    *((name, UNEQUAL) for name in (*LOSSES, *GROUP_RELATIVE)),
    ("mismatched responses", IN_TURN),
    *((name, shares) for name in FLOAT32 for shares in (HALVES, IN_TURN, SWAPPED)),
    *((name, ONE_HAS_NONE) for name in ("AdaptiveKL", "REINFORCE++ with AdaptiveKL", "KLCov", "PPO")),
    *((name, shares) for name in OWN_SCORES for shares in (HALVES, IN_TURN, UNEQUAL, ONE_HAS_NONE)),
]
Result = tuple[dict[str, Tensor], list[Mapping[str, float]]]


def result_of(name: str, share: Callable[[Rollout], Rollout], **flags: Any) -> Result:
    rollouts = [share(make_rollout(iteration=number)) for number in (1, 2)]
    module = MODULES[name]()
    verified = module.scorer.old_logp == "sampler"
    _, recorder = fit(module, Verified(rollouts) if verified else rollouts, **flags)
    return recorder.weights[-1], recorder.metrics


def train_shares() -> None:
    rank = int(os.environ["RANK"])
    for number, (name, shares) in enumerate(CASES):
        flags = {"devices": len(shares), "strategy": "ddp", "use_distributed_sampler": False}
        mine = shares[rank]
        torch.save(result_of(name, lambda rollout, mine=mine: share_of(rollout, mine), **flags), f"{number}.{rank}.pt")


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Result]]:
    """All cases, one after the other in the same two processes: the results of both ranks by a case's number."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    on_ranks(2, train_shares, folder=folder)
    return lambda number: [torch.load(folder / f"{number}.{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{name}, {shares}" for name, shares in CASES])
def test_ranks_train_as_one_process_does(number: int, on_two_ranks: Callable[[int], list[Result]]) -> None:
    name, _ = CASES[number]
    weights, metrics = result_of(name, lambda rollout: rollout)
    rtol, atol = (1e-4, 1e-6) if name in FLOAT32 else (1e-9, 1e-11)
    for found, measured in on_two_ranks(number):
        for key, value in weights.items():
            torch.testing.assert_close(found[key], value, rtol=rtol, atol=atol, msg=key)
        for one, other in zip(measured, metrics, strict=True):
            assert one.keys() == other.keys()
            for key in one:
                assert key.startswith(("time/", "time_share/")) or one[key] == pytest.approx(
                    other[key], rel=max(1e-6, rtol), abs=max(1e-9, atol)
                ), key
