"""The base of all modules: a policy, its tokenizer, its optimizers and its evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from ibro_lightning.batches import Rollout
from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.callbacks.metrics_log import MetricsLog
from ibro_lightning.errors import check_at_least, check_count, check_instance
from ibro_lightning.evaluation.metrics import Evaluation
from ibro_lightning.guards.trainer_flags import refuse_trainer
from ibro_lightning.models import (
    Policy,
    PolicyLike,
    PolicyOptions,
    Sharding,
    as_source,
    build_policy,
    compile_in_place,
    export_folder,
)
from ibro_lightning.models.compiled import compile_hook
from ibro_lightning.models.pretrained import local_folders
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.modules import network_optimizers, rollout_data
from ibro_lightning.modules.evaluating import Evaluator
from ibro_lightning.modules.trainer_loop import TrainerLoop
from ibro_lightning.ranks import Ranks
from ibro_lightning.regularizers import StepContext
from ibro_lightning.runs.checkpoints.plugin import read_checkpoint
from ibro_lightning.runs.folder import refuse_loggers, run_folder
from ibro_lightning.runs.parquet import write_parquet
from ibro_lightning.types import Dtype
from ibro_lightning.update.loss import PolicyLoss
from ibro_lightning.update.optimizer import Schedule, check_optimizer, check_schedule
from ibro_lightning.update.reference import ReferenceKL
from ibro_lightning.update.resumed_optimizers import OptimizerWatch
from ibro_lightning.update.scoring import Scorer
from ibro_lightning.update.updater import Updater


class PolicyModule(pl.LightningModule):
    """A policy, and an updater that takes its optimizer steps. Subclasses define the batch and the loss. The arguments
    that several of them have are explained here; those from ``regularizer`` to ``micro_batch_tokens`` are for rollouts.

    Args:
        policy: a Hugging Face folder or hub name, a transformers model, ``(model, tokenizer)``, or a ``PolicySource``.
        regularizer: an entropy method; None: none.
        surrogate: the policy loss (``docs/methods.md``). ``ppo`` clips each token (PPO, GRPO, DAPO), ``gspo`` once
            per sequence; ``cispo`` clips a weight, and no token loses its gradient; ``gmpo`` takes the mean of clipped
            ratios; ``dppo`` bounds probabilities; ``sapo`` is a soft gate; or a subclass of :class:`.PolicyLoss`.
        clip_ratio_low: the probability ratio is clipped to at least 1 − this; a number, or a coefficient that moves it.
        clip_ratio_high: the probability ratio is clipped to at most 1 + this; likewise.
        dual_clip: bounds the loss of negative advantages by c·|A|, c a number or a coefficient; None switches it off.
            In ``ppo`` and ``gspo``.
        aggregation: how token losses become one number; denominators count the whole optimizer step.
        aggregation_max_tokens: the constant length of ``seq-mean-token-sum-norm`` (Dr.GRPO).
        kl: a KL penalty to a reference policy; None, as in DAPO and in the paper, has none.
        sampler_correction: weights the policy loss for an engine whose probabilities are not quite the policy's; None
            does not, as responses without log-probs need. The curves ``sampler/…`` show the mismatch in either case.
        old_logp: of the rows that are not in a rollout's first optimizer step, which scores its own: ``policy`` scores
            them before the update; ``sampler`` takes the log-probs that they were sampled with (``docs/update.md``).
        overlong_filter: leave responses cut at the length limit out of the loss; advantages still compare with them.
        mini_batch_prompts: prompts (whole groups) per optimizer step; None takes the rollout in one step.
        update_epochs: passes over each rollout.
        micro_batch_tokens: tokens in memory at once, padding included; changes speed and memory, never the result.
        optimizer: called with the policy's parameters. An ``lr`` that is set here replaces ``learning_rate``; two that
            differ are refused. The default of the optimizer's class never counts.
        learning_rate: the policy's, after the warm-up.
        warmup_steps: optimizer steps over which the learning rate rises linearly to its value.
        lr_scheduler: called with each optimizer: a class of ``torch.optim.lr_scheduler``, stepped with every optimizer
            step after the warm-up. None: constant; ``ReduceLROnPlateau`` is refused.
        max_grad_norm: gradients are scaled down to this norm; None (or 0) leaves them as they are.
        max_nonfinite_steps: a step whose loss, advantages or gradient are not finite is skipped on all ranks; after
            this many in a row training stops, and the batch is saved in ``nonfinite/``. 0 never stops.
        policy_options: dtype, attention implementation and the like.
    """

    batch_type: ClassVar[type] = object  # of training_step
    min_group_size, learns_off_policy = 1, False
    trained: ClassVar[Mapping[str, tuple[str, str]]] = {"policy": ("optimizer", "learning_rate")}
    """The networks that learn, by name, and the arguments with the optimizer and the learning rate of each."""
    schedule_settings: tuple[str, ...] = ()  # attributes that learning_rate_factor reads, besides warmup_steps
    policy: Policy
    updater: Updater
    scorer: Scorer  # like the loss, only in modules that learn from rollouts
    policy_loss: PolicyLoss | None = None

    def __init__(
        self,
        policy: PolicyLike,
        *,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        learning_rate: float = 1e-6,
        warmup_steps: int = 10,
        lr_scheduler: LRSchedulerCallable | None = None,
        policy_options: PolicyOptions = PolicyOptions(),
    ) -> None:
        super().__init__()
        check_instance("policy_options", policy_options, PolicyOptions)
        check_at_least("learning_rate", learning_rate, 0)
        check_count("warmup_steps", warmup_steps, 0)
        check_optimizer(optimizer, "optimizer")
        check_schedule(lr_scheduler, "lr_scheduler")
        self.automatic_optimization = False
        self.policy_source = as_source(policy, policy_options, "policy")
        self.policy_options = policy_options
        self.tokenizer = self.policy_source.tokenizer()
        self.eos_token_ids = self.policy_source.eos_token_ids()
        self.optimizer_factory, self.learning_rate = optimizer, learning_rate
        self.warmup_steps, self.lr_scheduler_factory = warmup_steps, lr_scheduler
        self.loop = TrainerLoop(self, tuple(self.trained))
        self.evaluator = Evaluator(self)
        self.evaluations: dict[str, Evaluation] = {}  # the latest of each set
        self._optimizer_watch: OptimizerWatch | None = None
        # The names in a state have no prefixes of torch.compile, wherever it was applied.
        self.register_state_dict_pre_hook(compile_hook)
        self.register_load_state_dict_pre_hook(compile_hook)

    @property
    def ranks(self) -> Ranks:
        return self.loop.ranks

    @property
    def kl(self) -> ReferenceKL | None:
        return None if self.policy_loss is None else self.policy_loss.kl

    def setup(self, stage: str) -> None:
        refuse_trainer(self.trainer)
        refuse_loggers(self.trainer)
        rollout_data.check(self, self.trainer.datamodule, stage)  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        if not hasattr(self, "policy"):
            self.policy = build_policy(self.policy_source, self.policy_options, self.sharding)
        if self.kl is not None:
            self.kl.sharding = self.sharding

    def configure_callbacks(self) -> list[pl.Callback]:
        """Add :class:`.MetricsLog`, which writes the curves and ``trainer.callback_metrics``, to any Trainer."""
        callbacks: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if not self.trainer.barebones and not any(isinstance(callback, MetricsLog) for callback in callbacks):
            callbacks.insert(0, MetricsLog())  # first: others may read the metrics at the end of the same batch
        return []

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: Path | str,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **settings: Any,
    ) -> Self:
        """Lightning's method, for a checkpoint in a file or in a folder of shards (which is read on the CPU).
        ``settings`` are the constructor's arguments, at least ``policy``; a checkpoint holds none of them."""
        if not Path(checkpoint_path).is_dir():
            return super().load_from_checkpoint(
                checkpoint_path, map_location, hparams_file, strict, weights_only, **settings
            )
        checkpoint = read_checkpoint(Path(checkpoint_path), with_optimizers=False)
        module = cls(**settings)
        module.configure_model()
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=strict is not False)
        return module

    def on_fit_start(self) -> None:
        compile_in_place(self)
        if self._trainer is not None:
            self._optimizer_watch = network_optimizers.watch(self)
        if self.policy_options.packing:
            with self.forward_context():
                self.check_packing()

    def on_train_start(self) -> None:
        if self._optimizer_watch is not None:
            self._optimizer_watch.report()
        with self.forward_context():
            self.policy.ensure_deterministic()  # before anything is generated
            self.policy.settle_sharing()

    def forward_context(self) -> AbstractContextManager[None]:
        """The Trainer's precision, for code outside Lightning's steps, such as the generation of a batch."""
        return nullcontext() if self._trainer is None else self.trainer.precision_plugin.forward_context()

    def check_packing(self) -> None:
        """Refuse to train if packed sequences see each other in a network."""
        self.policy.check_packing()
        if self.kl is not None:
            self.kl.on(self.device).check_packing()

    def configure_optimizers(self) -> Any:
        """A subclass may return optimizers of its own: one or several, with or without schedules."""
        pairs = [self.optimizer_for(network) for network in self.trained]
        return [optimizer for optimizer, _ in pairs], [schedule for _, schedule in pairs]

    def optimizer_for(self, network: str) -> tuple[torch.optim.Optimizer, Schedule]:
        """The optimizer and the schedule of a network, given its name in this module."""
        return network_optimizers.optimizer_and_schedule(self, network)

    def learning_rate_factor(self, step: int) -> float:
        """The factor of the learning rate in optimizer step ``step`` (from 0), unless there is an ``lr_scheduler``."""
        return min(1.0, (step + 1) / (self.warmup_steps + 1))

    def check_resumed_optimizers(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Raise :class:`ConfigError` if an optimizer cannot resume from its state in a checkpoint, before anything is
        built or moved. Those of an overridden ``configure_optimizers`` are checked when the states are loaded."""
        if len(states) == len(self.trained) and not is_overridden("configure_optimizers", self, PolicyModule):
            network_optimizers.check_resumed(self, states)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["nonfinite"] = self.updater.nonfinite.state_dict()
        if self.policy_loss is not None:
            checkpoint["coefficients"] = {name: c.state_dict() for name, c in self.policy_loss.coefficients.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.updater.nonfinite.load_state_dict(checkpoint.get("nonfinite", {}))
        saved = checkpoint.get("coefficients", {})
        # One that the checkpoint has not, such as a clip ratio's, counts the run's iterations as the others do.
        new = {name: count for name, count in saved.get("regularizer", {}).items() if name == "iterations"}
        for name, coefficient in (self.policy_loss.coefficients if self.policy_loss else {}).items():
            coefficient.load_state_dict(saved.get(name, new))

    def report_skipped_steps(self, rollout: Rollout | None = None) -> None:
        """Report the skipped optimizer steps of an iteration, and stop if there were too many in a row."""
        save = None if rollout is None else partial(write_parquet, rollout=rollout, tokens=True)
        self.updater.nonfinite.report(self.iteration)
        self.updater.nonfinite.check(run_folder(self.trainer), self.iteration, self.trainer.global_rank, save)

    def context(self) -> StepContext:
        """What losses and regularisers can use in an optimizer step."""
        config = self.policy_source.config()
        return self.scorer.context(self.tokenizer, getattr(config, "max_position_embeddings", None))

    @property
    def sharding(self) -> Sharding | None:
        """How the strategy shards networks over processes; None: each process holds them whole."""
        return None if self._trainer is None else getattr(self.trainer.strategy, "sharding", None)

    @property
    def source_folders(self) -> tuple[Path, ...]:
        """Local folders with the initial weights of this run, which a new run must not move away."""
        return local_folders(self.policy_source, *(() if self.kl is None else (self.kl.source,)))

    @property
    def iteration(self) -> int:
        """Completed training batches of the run: the x-axis of every curve."""
        return self.trainer.fit_loop.epoch_loop.total_batch_idx + 1

    # The interface for datamodules and callbacks (engines.base.PolicyProvider).

    def model_spec(self) -> ModelSpec:
        # Not self.device with a trainer: datamodules are set up before the module moves to its device.
        device = self.device if self._trainer is None else self.trainer.strategy.root_device
        return ModelSpec(self.policy_source.config(), self.eos_token_ids, device, self.policy_options.trust_remote_code)

    def named_full_weights(self) -> Iterator[tuple[str, Tensor]]:
        return self.policy.named_full_weights()

    @property
    def compute_dtype(self) -> Dtype:
        is_mixed = self._trainer is not None and self.trainer.precision == "bf16-mixed"
        return "bfloat16" if is_mixed else self.policy_options.dtype

    @torch.no_grad()
    def response_logp(self, sequences: Sequences, temperature: float) -> Tensor:
        with self.forward_context():
            logp, _ = self.policy(sequences.to(self.device), temperature=temperature, with_entropy=False)
        return logp

    def export(self, folder: Path | str, *, keep_earlier: bool = True) -> Path:
        """Write the policy as a Hugging Face folder; see :func:`.export_folder`."""
        if not hasattr(self, "policy"):  # a module that has had no Trainer
            self.configure_model()
        return export_folder(self.policy.model, self.tokenizer, folder, self.policy_source, keep_earlier=keep_earlier)

    def export_names(self, folder: Path) -> tuple[Path, ...]:
        """All folders that :meth:`export` writes."""
        return (folder, *((folder.with_name("adapter"),) if self.policy_options.lora is not None else ()))

    @property
    def evaluation_is_current(self) -> bool:
        """Whether :attr:`evaluations` belong to the present weights; True if there are no evaluation sets."""
        sets = getattr(self.trainer.datamodule, "eval_sets", None)  # type: ignore[attr-defined]
        return not sets or self.evaluator.at_step == self.trainer.global_step

    def on_validation_epoch_start(self) -> None:
        with self.forward_context():
            self.policy.settle_sharing()  # a run may resume with its last evaluation, without a start of training
        self.evaluator.begin()

    def validation_step(self, rollout: Rollout, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluator.add(rollout, self.ranks.data)

    def on_validation_epoch_end(self) -> None:
        self.evaluations = self.evaluator.finish(self.iteration)

    def on_validation_end(self) -> None:
        self.evaluator.complete_returned()

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end
    on_test_end = on_validation_end

    def predict_step(self, rollout: Rollout, batch_idx: int, dataloader_idx: int = 0) -> Rollout:
        return rollout
