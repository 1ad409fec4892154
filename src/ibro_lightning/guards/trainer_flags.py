"""Refuses Trainer flags that have no, or another, effect here than Lightning documents, and names the alternative."""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler, LearningRateFinder
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn

from ibro_lightning.errors import ConfigError

FLAGS = tuple(inspect.signature(pl.Trainer).parameters)
PRECISIONS = (None, 32, "32", "32-true", "bf16", "bf16-mixed")
SUPPORTED = "not supported: write auto, ddp or fsdp2"
_CLIPPING = "write model.max_grad_norm, which clips by the norm"
_STRATEGIES = re.compile(
    r"(?!fsdp2$)(fsdp|deepspeed|model_parallel|xla|single_xla|single_tpu|hpu|ddp_(spawn|fork|notebook))"
)
"""Names of Lightning strategies that networks and optimizers here do not support, or that start in a new process."""
_HINTS = {
    "Timer(": "max_time",
    "backend": "accelerator",
    "torch_xla": "accelerator",
    "callback": "callbacks",
    "Early stopping": "callbacks",
}
"""Parts of Lightning's error messages that do not name the flag, and the flag."""
_CALLBACKS: dict[type[pl.Callback], str] = {
    BatchSizeFinder: "write model.micro_batch_tokens (what memory holds)",
    LearningRateFinder: "write the optimizer's lr",
    GradientAccumulationScheduler: "write model.mini_batch_prompts (an optimizer step's)",
}


def refuse_flags(settings: Any) -> None:
    """Raise :class:`ConfigError` for unsupported flags; ``settings`` has the Trainer's flags as attributes."""
    refused = {
        "accumulate_grad_batches": (
            settings.accumulate_grad_batches not in (None, 1),
            "write model.mini_batch_prompts (an optimizer step's) and model.micro_batch_tokens (what memory holds)",
        ),
        "gradient_clip_val": (settings.gradient_clip_val is not None, _CLIPPING),
        "gradient_clip_algorithm": (settings.gradient_clip_algorithm is not None, _CLIPPING),
        "overfit_batches": (
            bool(settings.overfit_batches),
            "every batch is new, so none comes twice: write a data.source of few problems (of files: its limit), and "
            "data.allow_overlap to evaluate on the same ones",
        ),
        "model_registry": (
            settings.model_registry is not None,
            "nothing is uploaded: leave it out, and upload the run's model/",
        ),
        "precision": (settings.precision not in PRECISIONS, "not supported: write 32-true or bf16-mixed"),
        "strategy": (isinstance(settings.strategy, str) and _STRATEGIES.match(settings.strategy), SUPPORTED),
        "default_root_dir": (
            "://" in str(settings.default_root_dir),
            "a run needs a folder on this machine: write its path",
        ),
    }
    for flag, (is_refused, remedy) in refused.items():
        if is_refused:
            raise ConfigError(f"trainer.{flag}", getattr(settings, flag), remedy)
    callbacks = settings.callbacks or ()
    for callback in callbacks if isinstance(callbacks, list | tuple) else (callbacks,):
        for kind, remedy in _CALLBACKS.items():
            if isinstance(callback, kind):
                raise ConfigError("trainer.callbacks", kind.__name__, f"has no effect here: {remedy}")


def refuse_trainer(trainer: pl.Trainer) -> None:
    """:func:`refuse_flags` for a Trainer, and what only a constructed Trainer reveals."""
    flags = {flag: getattr(trainer, flag, None) for flag in FLAGS}
    refuse_flags(SimpleNamespace(**flags | {"model_registry": trainer._model_registry}))
    strategy: Any = trainer.strategy
    sharded = hasattr(strategy, "sharding")
    if not sharded and not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise ConfigError("trainer.strategy", type(strategy).__name__, SUPPORTED)
    if (start := getattr(strategy, "_start_method", "popen")) != "popen":
        raise ConfigError("trainer.strategy", start, "a run cannot move to another process: write ddp")
    loops: dict[Any, Any] = {
        TrainerFn.VALIDATING: trainer.validate_loop,
        TrainerFn.TESTING: trainer.test_loop,
        TrainerFn.PREDICTING: trainer.predict_loop,
    }
    fn = trainer.state.fn  # None at the start of the command line, which evaluates after training
    if sharded and any(loop.inference_mode for stage, loop in loops.items() if fn in (None, stage)):
        raise ConfigError("trainer.inference_mode", True, "weights cannot be gathered in it: write false")


def refuse_batches(trainer: pl.Trainer, batches: int) -> None:
    """Raise :class:`ConfigError` for limits and intervals that do not fit an epoch of this number of batches; Lightning
    notices only after the first evaluation."""
    limit = trainer.limit_train_batches
    if isinstance(limit, float) and 0 < limit * batches < 1:
        remedy = f"an epoch has {batches} batches: write {1 / batches:g} or more, or 0"
        raise ConfigError("trainer.limit_train_batches", limit, remedy)
    interval = getattr(trainer, "val_check_interval", 1.0)
    if isinstance(interval, int) and trainer.check_val_every_n_epoch is not None and interval > batches:
        raise ConfigError(
            "trainer.val_check_interval",
            interval,
            f"an epoch has {batches} batches: write as many or fewer, or trainer.check_val_every_n_epoch: null to "
            "count over epochs",
        )


def as_refusal(error: Exception, settings: Any = None) -> ConfigError:
    """Lightning's error about a flag, as an error of one line that names the flag."""
    text = " ".join(str(error).split())
    named = [flag for flag in re.findall(r"\w+", text) if flag in FLAGS]
    # barebones names itself before the flag that it refuses.
    flag = next((flag for flag in named if flag != "barebones"), next(iter(named), None))
    flag = flag or next((flag for hint, flag in _HINTS.items() if hint in text), None)
    if flag is None:
        return ConfigError("trainer", "its flags", text)
    if "invalid strategy name" in text:
        text = SUPPORTED
    return ConfigError(f"trainer.{flag}", getattr(settings, flag, None), text)
