"""Optimizer settings of a resumed run: the present configuration counts, not the checkpoint's.

Lightning restores an optimizer with the checkpoint's param groups, learning rate included, in place of the new ones.
Here each optimizer's state records its configuration, and a hook of ``load_state_dict`` compares: equal settings are
restored bit for bit, possible changes are applied and reported, others are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ibro_lightning.errors import NO_PLATEAU, ConfigError
from ibro_lightning.ranks import rank_zero_info
from ibro_lightning.update.optimizer import Schedule, qualified_name
from ibro_lightning.update.optimizer_settings import (
    CONFIGURED,
    HOW,
    check_resumable,
    configured_in,
    of_kind,
    settings_of,
    short_value,
)
from ibro_lightning.update.resumed_schedules import AdoptedSchedule, ResumedSchedules

_RATE = ("lr", "initial_lr")
_SCHEDULED = ("lr", "max_lr", "min_lr")


class OptimizerWatch:
    """Watches the optimizers and schedules of a module in one ``fit``, from before anything is restored.

    Args:
        networks: those that learn, by name, with the arguments for optimizer and learning rate.
        schedules: Lightning's configurations of all schedules; torch's own are wrapped in an :class:`AdoptedSchedule`.
        names: of the module's parameters, by ``id``.

    Raises:
        ConfigError: a network has no optimizer, or a schedule waits for a metric.
    """

    def __init__(
        self,
        networks: Mapping[str, tuple[str, str]],
        optimizers_of: Callable[[str], Sequence[Optimizer]],
        schedules: Sequence[Any],
        names: Mapping[int, str],
    ) -> None:
        for config in schedules:
            if isinstance(config.scheduler, ReduceLROnPlateau):
                raise ConfigError("configure_optimizers", type(config.scheduler).__name__, NO_PLATEAU)
            if isinstance(config.scheduler, LRScheduler):
                config.scheduler = AdoptedSchedule(config.scheduler)
        ours = [config.scheduler for config in schedules if isinstance(config.scheduler, Schedule)]
        self.settings: list[ResumedSettings] = []
        watched: set[int] = set()
        for network, (setting, rate) in networks.items():
            optimizers = optimizers_of(network)
            if not optimizers:
                remedy = "no optimizer has its parameters: return one for each network that learns"
                raise ConfigError("configure_optimizers", network, remedy)
            for optimizer in optimizers:
                if id(optimizer) not in watched:
                    watched.add(id(optimizer))
                    mine = [schedule for schedule in ours if schedule.optimizer is optimizer]
                    self.settings.append(ResumedSettings(optimizer, f"model.{setting}", rate, mine, names))

    def report(self) -> None:
        """Report in one line, after everything is restored, what differs from the checkpoint."""
        for settings in self.settings:
            settings.schedules.finish()
        changes = [change for settings in self.settings for change in settings.changes]
        changes += [change for settings in self.settings for change in settings.schedules.changes]
        if changes:
            rank_zero_info(f"resumes with other optimizer settings: {', '.join(dict.fromkeys(changes))}")


class ResumedSettings:
    """Watches one optimizer: records its settings in its state, and puts them in place of a checkpoint's.

    Args:
        optimizer: as configured, its schedule included, before anything is restored.
        setting, rate_setting: names in the configuration, such as ``model.optimizer`` and ``learning_rate``.
        schedules: of this optimizer.
        names: of parameters, by ``id``; others are named by their shape.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        setting: str,
        rate_setting: str,
        schedules: Sequence[Schedule],
        names: Mapping[int, str],
    ) -> None:
        self.setting, self.rate_setting = setting, rate_setting
        self.groups = [settings_of(group) for group in optimizer.param_groups]
        self.schedules = ResumedSchedules(schedules)
        self.parameters = [
            [names.get(id(p), f"one of shape {list(p.shape)}") for p in group["params"]]
            for group in optimizer.param_groups
        ]
        self.steps = 0
        """Steps of the optimizer over the whole run."""
        self.changes: list[str] = []
        """Settings that differ from the loaded checkpoint's, as text."""
        optimizer.register_step_post_hook(self._count)
        optimizer.register_state_dict_post_hook(self._record)
        optimizer.register_load_state_dict_pre_hook(self._adopt)

    def _count(self, *_: object) -> None:
        self.steps += 1

    def _record(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        state[CONFIGURED] = {
            "class": qualified_name(type(optimizer)),
            "groups": self.groups,
            "parameters": self.parameters,
            "steps": self.steps,
            "schedules": [schedule.state_dict() for schedule in self.schedules.schedules],
        }

    def _adopt(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        changed = check_resumable(optimizer, state, self.setting, self.groups)
        self._check_parameters(optimizer, state)
        saved = configured_in(state)
        self.steps = saved.get("steps", _steps(state))
        self.schedules.steps, self.schedules.saved = self.steps, saved.get("schedules")
        changes = (
            f"{self._setting_name(name)} {short_value(value)} (checkpoint: {short_value(old.get(name))})"
            for old, settings in zip(saved["groups"], changed, strict=True)
            for name, value in sorted(settings.items(), key=lambda item: item[0] not in _RATE)
            if name not in HOW and (name not in _SCHEDULED or "initial_lr" not in settings)
        )
        self.changes = list(dict.fromkeys(changes))
        other_schedules = self._other_schedules(optimizer, state)
        groups, here = [], optimizer.param_groups
        for number, (group, old, settings) in enumerate(
            zip(state["param_groups"], saved["groups"], changed, strict=True)
        ):
            new = {**group, **settings}
            if other_schedules:  # the earlier one may have changed more than the rate, and left other keys
                kept = {name: value for name, value in group.items() if name in here[number] or name == "params"}
                new = {**kept, **self.groups[number]}
            elif settings.get("initial_lr") and old.get("initial_lr"):
                # For a schedule that is not watched; watched ones are replayed up to this step.
                new["lr"] = group["lr"] * settings["initial_lr"] / old["initial_lr"]
            groups.append(of_kind(here[number], new))
        return {**state, "param_groups": groups}

    def _other_schedules(self, optimizer: Optimizer, state: Mapping[str, Any]) -> bool:
        """Whether the checkpoint's schedules were of other kinds; removed ones are reported here."""
        kinds = self.schedules.kinds
        if self.schedules.saved is not None:
            before = [schedule["kind"] for schedule in self.schedules.saved]
        else:  # an older checkpoint: a schedule leaves its mark, but not its name
            marked = "initial_lr" in state["param_groups"][0] and "initial_lr" not in optimizer.param_groups[0]
            before = ["one"] if marked else kinds
        self.changes += [f"lr_scheduler none (checkpoint: {kind})" for kind in before[len(kinds) :]]
        return before != kinds

    def _check_parameters(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        sizes = [[len(g["params"]) for g in groups] for groups in (optimizer.param_groups, state["param_groups"])]
        if sizes[0] != sizes[1]:
            remedy = f"its groups have {sizes[0]} parameters, the checkpoint's {sizes[1]}"
        else:
            saved = configured_in(state).get("parameters", self.parameters)
            differences = [
                f"its parameter group {number} has {name} where the checkpoint's has {before}"
                for number, (group, old) in enumerate(zip(self.parameters, saved, strict=True))
                for name, before in zip(group, old, strict=True)
                if name != before
            ]
            if not differences:
                return
            remedy = differences[0]
        kind = qualified_name(type(optimizer))
        raise ConfigError(self.setting, kind, f"{remedy}: group them as they were, in the same order")

    def _setting_name(self, name: str) -> str:
        if name in _RATE:
            return self.rate_setting
        return f"{self.setting.removeprefix('model.')}.{name}"


def _steps(state: Mapping[str, Any]) -> int:
    """Steps of an optimizer of an older checkpoint, as far as its state shows them."""
    return max((int(entry["step"]) for entry in state["state"].values() if "step" in entry), default=0)
