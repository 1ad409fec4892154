"""The optimizer and the schedule of each network that a policy module trains: built, and compared with a checkpoint's.

``module`` is a :class:`.PolicyModule`; its ``trained`` names the attributes that hold the settings of each network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ibro_lightning.errors import ConfigError
from ibro_lightning.update.optimizer import Schedule, build_optimizer, class_of, default_rate
from ibro_lightning.update.optimizer_settings import check_resumable
from ibro_lightning.update.resumed_optimizers import OptimizerWatch
from ibro_lightning.update.updater import optimizers_of


def optimizer_and_schedule(module: Any, network: str) -> tuple[Optimizer, Schedule]:
    """Those of a network that has been built.

    Raises:
        ConfigError: the trainer's precision is not supported, or the settings are refused.
    """
    if (precision := module.trainer.precision) not in ("32-true", "bf16-mixed"):
        raise ConfigError("trainer.precision", precision, "not supported: write 32-true or bf16-mixed")
    parameters = [parameter for parameter in getattr(module, network).parameters() if parameter.requires_grad]
    optimizer = optimizer_of(module, network, parameters)
    if module.lr_scheduler_factory is not None:
        return optimizer, Schedule(optimizer, module.lr_scheduler_factory, module.warmup_steps)
    settings = {name: getattr(module, name) for name in ("warmup_steps", *module.schedule_settings)}
    factory = partial(LambdaLR, lr_lambda=module.learning_rate_factor)
    return optimizer, Schedule(optimizer, factory, settings=settings)


def optimizer_of(module: Any, network: str, parameters: list[nn.Parameter]) -> Optimizer:
    """The configured optimizer of a network, for these parameters."""
    setting, rate = module.trained[network]
    return build_optimizer(
        getattr(module, f"{setting}_factory"),
        parameters,
        getattr(module, rate),
        setting=setting,
        rate_setting=rate,
        default_rate=default_rate(type(module), rate),
    )


def check_resumed(module: Any, states: Sequence[Mapping[str, Any]]) -> None:
    """Raise :class:`ConfigError` if an optimizer cannot resume from its state; those that only a function builds are
    checked when the state is loaded."""
    for (network, (setting, _)), state in zip(module.trained.items(), states, strict=True):
        if class_of(getattr(module, f"{setting}_factory")) is not None:
            trial = optimizer_of(module, network, [nn.Parameter(torch.zeros(2, 2))])
            check_resumable(trial, state, f"model.{setting}")


def watch(module: Any) -> OptimizerWatch:
    """Prepare the optimizers for the restoration of a checkpoint."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    schedules = module.trainer.strategy.lr_scheduler_configs
    return OptimizerWatch(module.trained, partial(optimizers_of, module.loop), schedules, names)
