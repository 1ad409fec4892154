"""The optimizers and schedules that a policy module is configured with: built, and compared with a checkpoint's."""

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
from ibro_lightning.update.optimizer_settings import check_goes_on
from ibro_lightning.update.resumed_optimizers import OptimizerWatch
from ibro_lightning.update.updater import optimizers_of


class NetworkOptimizers:
    """One optimizer and one schedule for each network that learns.

    Args:
        module: a :class:`.PolicyModule`; its ``trained`` names the attributes that hold the settings of each network.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._watch: OptimizerWatch | None = None

    def build(self, network: str) -> tuple[Optimizer, Schedule]:
        """The optimizer and the schedule of a network.

        Raises:
            ConfigError: the trainer's precision is not supported, or the settings are refused.
        """
        module, precision = self._module, self._module.trainer.precision
        if precision not in ("32-true", "bf16-mixed"):
            raise ConfigError("trainer.precision", precision, "not supported: write 32-true or bf16-mixed")
        parameters = [parameter for parameter in getattr(module, network).parameters() if parameter.requires_grad]
        optimizer = module.make_optimizer(network, parameters)
        if module.lr_scheduler_factory is not None:
            return optimizer, Schedule(optimizer, module.lr_scheduler_factory, module.warmup_steps)
        settings = {name: getattr(module, name) for name in ("warmup_steps", *module.schedule_settings)}
        factory = partial(LambdaLR, lr_lambda=module.learning_rate_factor)
        return optimizer, Schedule(optimizer, factory, settings=settings)

    def make(self, network: str, parameters: list[nn.Parameter]) -> Optimizer:
        setting, rate = self._module.trained[network]
        return build_optimizer(
            getattr(self._module, f"{setting}_factory"),
            parameters,
            getattr(self._module, rate),
            setting=setting,
            rate_setting=rate,
            default_rate=default_rate(type(self._module), rate),
        )

    def check_resumed(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Raise :class:`ConfigError` if an optimizer cannot resume from its state; those that only a function builds
        are checked when the state is loaded."""
        for (network, (setting, _)), state in zip(self._module.trained.items(), states, strict=True):
            if class_of(getattr(self._module, f"{setting}_factory")) is not None:
                trial = self._module.make_optimizer(network, [nn.Parameter(torch.zeros(2, 2))])
                check_goes_on(trial, state, f"model.{setting}")

    def watch(self) -> None:
        """Prepare for the restoration of a checkpoint: see :class:`.OptimizerWatch`."""
        module = self._module
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        schedules = module.trainer.strategy.lr_scheduler_configs
        self._watch = OptimizerWatch(module.trained, partial(optimizers_of, module.loop), schedules, names)

    def report_changes(self) -> None:
        """Report settings that differ from the restored checkpoint's."""
        if self._watch is not None:
            self._watch.report()
