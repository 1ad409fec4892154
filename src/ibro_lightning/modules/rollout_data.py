"""What a module expects of the datamodule whose rollouts it learns from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from ibro_lightning.batches import Rollout, Sequences
from ibro_lightning.engines.weight_check import TOLERANCES
from ibro_lightning.errors import ConfigError


def check(module: Any, datamodule: Any, stage: str) -> None:
    """Prepare ``module`` for a datamodule, ours or another; None: the Trainer was given dataloaders."""
    if stage == "fit":
        refuse_unverified_logp(module, datamodule, module.compute_dtype)
    if not hasattr(datamodule, "collector"):
        # On the instance: Lightning warns of a class that overrides the hook, whatever the datamodule.
        module.on_before_batch_transfer = partial(_received, module)


def _received(module: Any, batch: Any, dataloader_idx: int) -> Any:
    """A batch of a foreign datamodule or DataLoader, checked; rollouts to train on get the iteration's number."""
    training = module.trainer.training
    needed = module.batch_type if training else Rollout
    if not isinstance(batch, needed):
        loader, remedy = "train_dataloaders" if training else "dataloaders", _HOW[needed]
        reason = f"{type(module).__name__} takes batches of type {_type_name(needed)}"
        raise ConfigError(loader, type(batch).__name__, f"{reason}: {remedy}")
    if not training or not isinstance(batch, Rollout):
        return batch
    _check_rollout(module, batch)
    return batch if batch.iteration else replace(batch, iteration=module.iteration + 1)


_HOW = {
    Rollout: "write collate_fn=collate_rollout in the DataLoader, or yield Rollout.from_tokens(…)",
    Sequences: "yield Sequences.collate(prompts, responses)",
}


def _type_name(kind: type) -> str:
    return f"ibro_lightning.batches.{kind.__name__}"


def _check_rollout(module: Any, rollout: Rollout) -> None:
    """Refuse tokens outside the policy's vocabulary; warn of a rollout without groups to compare."""
    vocabulary = int(module.policy_source.config().get_text_config().vocab_size)
    for name, ids in (("prompt", rollout.sequences.prompts), ("response", rollout.sequences.responses)):
        if len(ids) and (largest := int(ids.max())) >= vocabulary:
            remedy = f"the policy has {vocabulary} tokens: encode with its own tokenizer"
            raise ConfigError(f"{name}_token_ids", largest, remedy)
    if len(rollout) and int(rollout.groups.bincount().max()) < module.min_group_size:
        rank_zero_warn(
            f"no prompt of a batch has {module.min_group_size} responses for {type(module).__name__} to compare: every "
            "advantage is 0 (PPOModule, or advantage: reinforce++, learn from single responses)"
        )


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
