"""What a module expects of the datamodule whose rollouts it learns from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from ibro_lightning.batches import Rollout
from ibro_lightning.engines.weight_check import TOLERANCES
from ibro_lightning.errors import ConfigError


def check(module: Any, datamodule: Any, stage: str) -> None:
    """Prepare ``module`` for a datamodule, ours or another; None: the Trainer was given dataloaders."""
    if stage == "fit":
        refuse_unverified_logp(module, datamodule, module.compute_dtype)
    if not hasattr(datamodule, "collector"):
        # On the instance: Lightning warns of a class that overrides the hook, whatever the datamodule.
        module.on_before_batch_transfer = partial(_numbered, module)


def _numbered(module: Any, batch: Any, dataloader_idx: int) -> Any:
    """Number the rollouts of a foreign datamodule."""
    unnumbered = isinstance(batch, Rollout) and module.trainer.training and not batch.iteration
    return replace(batch, iteration=module.iteration + 1) if unnumbered else batch


def refuse_unverified_logp(module: Any, datamodule: Any, policy_dtype: str) -> None:
    """Raise :class:`ConfigError` if ``old_logp`` is ``sampler`` and nothing finds the engine's log-probs equal to those
    of a policy that computes in ``policy_dtype``, after each sync and to the digits of float32."""
    scorer = getattr(module, "scorer", None)  # only in modules that learn from rollouts
    if scorer is not None and scorer.old_logp == "sampler":
        if getattr(datamodule, "max_staleness", 0):
            reason = "with data.max_staleness the engine's log-probs are those of earlier weights"
            raise ConfigError("old_logp", "sampler", f"{reason}: write old_logp: policy, or max_staleness: 0")
        for reason in _reasons(policy_dtype, getattr(datamodule, "collector", None)):
            raise ConfigError("old_logp", "sampler", f"{reason}, or old_logp: policy")


def _reasons(policy_dtype: str, collector: Any) -> Iterator[str]:
    """Why an engine's log-probs cannot be taken for the policy's, each with a remedy."""
    if collector is None or collector.weight_check is None:
        yield "nothing verifies the engine's log-probs: write the weight_check of a RolloutDataModule"
        return
    tolerance, largest = collector.weight_check.tolerance, TOLERANCES["float32"]
    if tolerance is not None and tolerance > largest:
        yield f"data.weight_check lets them differ by {tolerance:g} nats: write a tolerance of {largest:g}"
    if (engine_dtype := collector.engine.dtype) != "float32" or policy_dtype != "float32":
        yield f"the engine computes in {engine_dtype}, the policy in {policy_dtype}: write float32 for both"
