"""Where the policy is in the information plane, and what its entropy does where: every few iterations."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn

from ibro_lightning.batches import Rollout
from ibro_lightning.batches.cross_prompts import Probe, surprise
from ibro_lightning.batches.experience import Experience
from ibro_lightning.callbacks.needs import RolloutModule, warn_unless
from ibro_lightning.errors import ConfigError, check_count
from ibro_lightning.functional import information_plane
from ibro_lightning.ranks import Ranks
from ibro_lightning.regularizers import IBRO
from ibro_lightning.regularizers.hindsight import HindsightTemplate
from ibro_lightning.seeding import derive_seed, run_seed
from ibro_lightning.update.gradient_share import regularizer_share
from ibro_lightning.update.response_entropies import answer_parts, ending_parts, entropy_parts, some_groups


class InformationPlane(pl.Callback):
    """Curves ``information/…`` of IBRO's objective ``I(q; r) − β·I(r; a)`` (arXiv 2507.18391), measured between the
    advantages and the update, in iterations 1, 1 + n, 1 + 2n, …: see ``docs/curves.md``, and for bias and error of each
    estimator :func:`.information_plane` and :mod:`.response_entropies`. Training is the same, bit for bit, with it and
    without.

    The policy is the one that the responses come from; with ``data.max_staleness`` it is one update further, and all
    estimates but H(r|q) are off by what that changes. An iteration without an update is not measured.

    Args:
        every_n_iterations: how often; 0 switches it off. It costs at most 5 % of the time at the default sizes
            (``benchmarks/information_plane.py``).
        prompts: M of the probe, of all prompts that the iteration sampled responses to. M² sequences are scored, and
            I(q; r) is seen up to log M.
        responses: that are trained on, for entropies by advantage, position and answer, and for the regulariser's share
            of the gradient; whole groups.
        template: shows the answer for answer-conditioned entropies, see :class:`.HindsightTemplate`. None takes the
            one of the regulariser IBRO, and leaves these curves out with any other.
        gradient_share: measure the regulariser's share of the gradient's norm; two forward and backward passes.
    """

    def __init__(
        self,
        every_n_iterations: int = 10,
        prompts: int = 16,
        responses: int = 64,
        template: str | None = None,
        gradient_share: bool = True,
    ) -> None:
        check_count("every_n_iterations", every_n_iterations, 0)
        check_count("prompts", prompts, 2)
        check_count("responses", responses, 1)
        if not isinstance(gradient_share, bool):
            raise ConfigError("gradient_share", gradient_share, "write true or false")
        self.every_n_iterations, self.prompts, self.responses = every_n_iterations, prompts, responses
        self.template, self.gradient_share = template, gradient_share
        self.hindsight = None if template is None else HindsightTemplate(template)
        self.start: float | None = None
        """H(r) when it was first measured, in nats."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == TrainerFn.FITTING and self.every_n_iterations:
            warn_unless(self, pl_module, RolloutModule, "scorer, updater and policy_loss")

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start = state_dict["start"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx < 0:  # another run than that of an earlier fit
            self.start = None

    def on_experience(
        self, trainer: pl.Trainer, pl_module: Any, rollout: Rollout, experience: Experience
    ) -> dict[str, float]:
        """The curves of an iteration, before its update (:class:`.ExperienceWatcher`). Collective."""
        if not self.every_n_iterations or (rollout.iteration - 1) % self.every_n_iterations:
            return {}
        began, ranks = time.perf_counter(), Ranks.of(trainer.strategy)
        measured = {
            **self.plane(pl_module, rollout, ranks),
            **ending_parts(rollout, ranks),
            **self.tokens(pl_module, rollout, experience, ranks),
        }
        # One that has no value, such as a correlation with advantages that are all equal, is left out.
        curves = {f"information/{name}": value for name, value in measured.items() if math.isfinite(value)}
        return {**curves, "time/information_s": time.perf_counter() - began}

    def plane(self, module: Any, rollout: Rollout, ranks: Ranks) -> dict[str, float]:
        """H(r|q), H(r), I(q; r) and what comes with them; nothing if there is only one prompt."""
        probe = Probe.of(rollout, self.prompts, ranks)
        if probe is None:
            return {}
        matrix = probe.cross_logp(module.scorer.score, rollout.temperature, rollout.sequences.device, ranks).cpu()
        nats, tokens = surprise(rollout, ranks) or (None, torch.tensor([float(len(r)) for r in probe.responses]))
        point = information_plane(matrix, nats)
        measured = {name: float(value) for name, value in asdict(point).items()}
        if self.start is None:
            self.start = measured["marginal_entropy"]
        return {
            **measured,
            "conditional_entropy_per_token": measured["conditional_entropy"] / float(tokens.mean()),
            "marginal_entropy_drift": measured["marginal_entropy"] - self.start,
        }

    def tokens(self, module: Any, rollout: Rollout, experience: Experience, ranks: Ranks) -> dict[str, float]:
        """Entropies by advantage, position and answer, and the regulariser's share of the gradient."""
        step = some_groups(experience, rollout, self.responses, ranks)
        context = replace(module.context(), seed=derive_seed(run_seed(), "information", rollout.iteration))
        _, entropy = context.score(step.sequences, step.temperature)  # [n]
        measured = entropy_parts(step, entropy, ranks)
        of_ibro = (method.hindsight for method in module.policy_loss.regularizer.combined if isinstance(method, IBRO))
        hindsight = self.hindsight or next(of_ibro, None)
        if hindsight is not None:
            measured |= answer_parts(step, entropy, hindsight, context)
        if self.gradient_share:
            share = regularizer_share(module.updater, step, module.policy_loss, context)
            measured |= {} if share is None else {"regularizer_gradient_share": share}
        return measured
