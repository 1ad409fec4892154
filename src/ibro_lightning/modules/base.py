"""What every module here shares: a policy, its tokenizer, its evaluation, and one way to take an optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from ibro_lightning.errors import ConfigError, check_at_least
from ibro_lightning.metrics import Evaluation, SampleAccuracy
from ibro_lightning.models import (
    Policy,
    PolicyOptions,
    PolicySource,
    PretrainedPolicy,
    Sharding,
    as_source,
    build_policy,
    clip_gradients,
    export_folder,
)
from ibro_lightning.modules.nonfinite import NonFiniteGuard, nonfinite_cause
from ibro_lightning.ranks import ALONE, Ranks
from ibro_lightning.run_folders import run_folder
from ibro_lightning.sequences import Sequences
from ibro_lightning.types import Dtype, ModelSpec, Rollout


class PolicyModule(pl.LightningModule):
    """A LightningModule that holds a policy. Optimises by hand; subclasses say what a batch is and what its loss is.

    Args:
        policy: a Hugging Face folder or hub name, or a :class:`PolicySource`.
        policy_options: dtype, attention implementation and the like.
        optimizer: called with the policy's parameters.
        warmup_steps: optimizer steps over which the learning rate rises linearly to its value.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them as they are.
        max_nonfinite_steps: a step whose loss, advantages or gradient are not finite is left out, on all ranks; after
            so many in a row training stops, and the batch is kept in ``nonfinite/``. 0 never stops.
    """

    min_group_size = 1

    def __init__(
        self,
        policy: str | PolicySource,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup_steps: int = 0,
        max_grad_norm: float = 1.0,
        max_nonfinite_steps: int = 5,
        policy_options: PolicyOptions = PolicyOptions(),
    ) -> None:
        super().__init__()
        for name, value in (("warmup_steps", warmup_steps), ("max_grad_norm", max_grad_norm)):
            check_at_least(f"model.{name}", value, 0)
        self.automatic_optimization = False
        self.policy_source = as_source(policy, policy_options)
        self.policy_options = policy_options
        self.tokenizer = self.policy_source.tokenizer()
        self.eos_token_ids = self.policy_source.eos_token_ids()
        self.optimizer_factory, self.warmup_steps, self.max_grad_norm = optimizer, warmup_steps, max_grad_norm
        self.nonfinite = NonFiniteGuard(max_nonfinite_steps)
        self.policy: Policy
        self.evaluations: dict[str, Evaluation] = {}
        """The latest evaluation of each set; :attr:`evaluated_at_step` says after how many optimizer steps."""
        self.evaluated_at_step: int | None = None
        self._eval_metrics: dict[str, SampleAccuracy] = {}

    def configure_model(self) -> None:
        if not hasattr(self, "policy"):
            self.policy = build_policy(self.policy_source, self.policy_options, self.sharding)

    def on_fit_start(self) -> None:
        if self.policy_options.packing:
            with self.trainer.precision_plugin.forward_context():
                self.check_packing()

    def check_packing(self) -> None:
        """Refuse to train if packed sequences see each other in any of the networks."""
        self.policy.check_packing()

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = self.optimizer_for(self.policy, self.optimizer_factory, "model.optimizer")
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def optimizer_for(
        self, network: nn.Module, factory: OptimizerCallable, setting: str
    ) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        """A network's optimizer and its schedule."""
        if self.trainer.precision not in ("32-true", "bf16-mixed"):
            raise ConfigError("trainer.precision", self.trainer.precision, "not supported: write 32-true or bf16-mixed")
        try:
            optimizer = factory([parameter for parameter in network.parameters() if parameter.requires_grad])
        except (TypeError, ValueError) as error:
            raise ConfigError(setting, type(self).__name__, f"the optimizer refuses its settings: {error}") from error
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, self.learning_rate_factor)

    def learning_rate_factor(self, step: int) -> float:
        """What the learning rate is multiplied with before optimizer step ``step`` (from 0)."""
        return min(1.0, (step + 1) / (self.warmup_steps + 1))

    def optimizer_step_clipped(self, losses: Mapping[str, float], batch: Any = None) -> dict[str, float]:
        """One optimizer step of the policy, which Lightning counts as ``global_step``; see :meth:`clip_and_step`."""
        optimizer, scheduler = _first(self.optimizers()), _first(self.lr_schedulers())
        return self.clip_and_step("policy", optimizer, scheduler, losses, batch)

    def clip_and_step(
        self, network: str, optimizer: Any, scheduler: Any, losses: Mapping[str, float], batch: Any = None
    ) -> dict[str, float]:
        """Clip, step, schedule, zero. A step with a loss or a gradient that is not finite is left out, and counted.

        Args:
            network: its name in this module.
            losses: of the step on all ranks.
            batch: what they were computed from, which is kept if they go on being infinite.
        """
        learning_rate = optimizer.param_groups[0]["lr"]
        norm = clip_gradients(getattr(self, network).parameters(), self.max_grad_norm)
        cause = nonfinite_cause(norm, losses)
        self.nonfinite.saw(network, cause, batch)
        if cause is None:
            optimizer.step()
            scheduler.step()
        optimizer.zero_grad()
        metrics = {"update/skipped_steps": float(cause is not None), "update/lr": learning_rate}
        return {**metrics, "update/grad_norm": norm.item()} if cause is None else metrics

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["nonfinite"] = self.nonfinite.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.nonfinite.load_state_dict(checkpoint.get("nonfinite", {}))

    def report_skipped_steps(self, rollout: Rollout | None = None) -> None:
        """At an iteration's end: say which optimizer steps were left out, and stop if they were too many in a row."""
        causes = self.nonfinite.causes
        if causes:
            counted = ", ".join(f"the {cause} ({causes.count(cause)})" for cause in dict.fromkeys(causes))
            rank_zero_warn(
                f"iteration {self.iteration}: {len(causes)} of {self.nonfinite.steps} optimizer steps left out: "
                f"not finite is {counted}"
            )
        self.nonfinite.check(run_folder(self.trainer), self.iteration, self.trainer.global_rank, rollout)

    @property
    def ranks(self) -> Ranks:
        """This process among those that share the data; taken out of its trainer, a module is alone."""
        return ALONE if self._trainer is None else Ranks.of(self.trainer.strategy)

    @property
    def sharding(self) -> Sharding | None:
        """How the strategy spreads networks over processes; None: each process has them whole."""
        return None if self._trainer is None else getattr(self.trainer.strategy, "sharding", None)

    @property
    def source_folders(self) -> tuple[Path, ...]:
        """Local folders that this run's weights come from, which a new run must not move away."""
        return local_folders(self.policy_source)

    @property
    def iteration(self) -> int:
        """Training batches that are done, over the whole run: the x-axis of every curve."""
        return self.trainer.fit_loop.epoch_loop.total_batch_idx + 1

    @property
    def evaluation_is_current(self) -> bool:
        """Do :attr:`evaluations` describe the weights as they are? True also if there is nothing to evaluate on."""
        has_sets = bool(getattr(self.trainer.datamodule, "eval_sets", None))  # type: ignore[attr-defined]
        return not has_sets or self.evaluated_at_step == self.trainer.global_step

    # What datamodules and callbacks ask of a policy module (types.PolicyProvider).

    def model_spec(self) -> ModelSpec:
        return ModelSpec(
            config=self.policy_source.config(),
            eos_token_ids=self.eos_token_ids,
            # Not self.device: datamodules are set up before the module moves to its device.
            device=self.trainer.strategy.root_device,
            trust_remote_code=self.policy_options.trust_remote_code,
        )

    def named_full_weights(self) -> Iterator[tuple[str, Tensor]]:
        return self.policy.named_full_weights()

    @property
    def compute_dtype(self) -> Dtype:
        return "bfloat16" if self.trainer.precision == "bf16-mixed" else self.policy_options.dtype

    @torch.no_grad()
    def response_logp(self, sequences: Sequences, temperature: float) -> Tensor:
        # Called while a batch is being made, where Lightning has not set the precision.
        with self.trainer.precision_plugin.forward_context():
            logp, _ = self.policy(sequences.to(self.device), temperature=temperature, with_entropy=False)
        return logp

    def export(self, folder: Path) -> Path:
        """Write the policy as a Hugging Face folder."""
        return export_folder(self.policy.model, self.tokenizer, folder)

    # Evaluation: every batch is a rollout of one evaluation set.

    def on_validation_epoch_start(self) -> None:
        self._eval_metrics = {}

    def validation_step(self, rollout: Rollout, batch_idx: int, dataloader_idx: int = 0) -> None:
        if rollout.name not in self._eval_metrics:
            self._eval_metrics[rollout.name] = SampleAccuracy(self.ranks.data).to(self.device)
        if len(rollout):  # with more ranks than prompts in a batch, some have none
            self._eval_metrics[rollout.name].update(rollout)

    def on_validation_epoch_end(self) -> None:
        self.evaluations = {name: metric.compute() for name, metric in self._eval_metrics.items()}
        self.evaluated_at_step = self.trainer.global_step
        prefix = "test" if self.trainer.testing else "val"
        scalars = {
            f"{prefix}/{name}/{key}": value
            for name, evaluation in self.evaluations.items()
            for key, value in evaluation.scalars().items()
        }
        # The curves get the iteration as their x-axis, and a point before training, which Lightning would not log.
        if self.logger is not None:
            self.logger.log_metrics(scalars, step=self.iteration)
        if not self.trainer.sanity_checking:
            self.log_dict(scalars, logger=False)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, rollout: Rollout, batch_idx: int, dataloader_idx: int = 0) -> Rollout:
        return rollout


def _first(optimizers: Any) -> Any:
    """The policy's optimizer or scheduler; a module with a critic has two."""
    return optimizers[0] if isinstance(optimizers, list) else optimizers


def local_folders(*sources: PolicySource) -> tuple[Path, ...]:
    """Those of the sources that are folders on this machine."""
    return tuple(Path(source.path).resolve() for source in sources if isinstance(source, PretrainedPolicy))
