"""Learning-rate schedules of a resumed run: each is brought to the position of the checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import FunctionType
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from ibro_lightning.errors import ConfigError
from ibro_lightning.update.optimizer import Schedule, qualified_name
from ibro_lightning.update.optimizer_settings import copied, same


class AdoptedSchedule(Schedule):
    """A torch scheduler from a subclass's ``configure_optimizers``: saved, compared and replayed like any other.

    All other attributes are the scheduler's.
    """

    def __init__(self, scheduler: LRScheduler) -> None:
        super().__init__(scheduler.optimizer, lambda _: scheduler, setting="configure_optimizers")

    def step(self, *args: Any, **kwargs: Any) -> None:
        self.scheduler.step(*args, **kwargs)
        self.last_epoch += 1

    def state_dict(self) -> dict[str, Any]:
        # The scheduler may have been stepped directly; some (ChainedScheduler) do not count.
        self.last_epoch = getattr(self.scheduler, "last_epoch", self.last_epoch)
        return super().state_dict()

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":  # during construction
            raise AttributeError(name)
        return getattr(self.scheduler, name)


class ResumedSchedules:
    """Watches the schedules of one optimizer, whose state holds theirs: Lightning assigns states by a schedule's number
    in the whole run, which is wrong once one is added or removed.
    """

    def __init__(self, schedules: Sequence[Schedule]) -> None:
        self.schedules = schedules
        self.saved: Sequence[Mapping[str, Any]] | None = None
        """The states of this optimizer's schedules in the checkpoint; older checkpoints have none."""
        self.steps: int | None = None
        """Steps of the checkpoint's optimizer; None: nothing was loaded."""
        self.changes: list[str] = []
        self._restored: set[int] = set()
        for number, schedule in enumerate(schedules):
            setattr(schedule, "load_state_dict", partial(self._load, number))  # noqa: B010 - a method, for mypy

    @property
    def kinds(self) -> list[str]:
        return [qualified_name(type(schedule.scheduler)) for schedule in self.schedules]

    def finish(self) -> None:
        """Bring the schedules for which Lightning had no state to their position."""
        if self.steps is None:
            return
        for number in range(len(self.schedules)):
            if number not in self._restored and (self.saved is not None or self.steps):
                self._load(number, {"last_epoch": self.steps})

    def _load(self, number: int, handed: Mapping[str, Any]) -> None:
        schedule, kind = self.schedules[number], self.kinds[number]
        self._restored.add(number)
        is_new = self.saved is not None and number >= len(self.saved)
        if is_new:
            state: Mapping[str, Any] = {"last_epoch": self.steps}
            self.changes.append(f"lr_scheduler {kind} (checkpoint: none)")
        else:
            state = handed if self.saved is None else self.saved[number]
        try:
            if not _hides_its_rule(schedule.scheduler) or not self._follows_another_rule(schedule, state):
                type(schedule).load_state_dict(schedule, state)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                "lr_scheduler",
                kind,
                f"it cannot be brought to step {state.get('last_epoch')} of the checkpoint ({type(error).__name__}: "
                f"{reason}): write one that gets so far, or that of the checkpoint",
            ) from error
        self.changes += schedule.changes

    def _follows_another_rule(self, schedule: Schedule, state: Mapping[str, Any]) -> bool:
        """Whether equal settings lead to other rates than the checkpoint's; then the schedule follows the new rule.

        A state holds neither functions nor the code of a class, but the rates that they gave.
        """
        here = schedule.state_dict()
        if "start" not in state or not all(same(here[n], state[n]) for n in ("kind", "warmup_steps", "start")):
            return False
        before = [copied(group) for group in schedule.optimizer.param_groups]
        type(schedule).load_state_dict(schedule, {"last_epoch": state["last_epoch"]})
        if same(schedule.scheduler.get_last_lr(), state["scheduler"].get("_last_lr")):
            for group, values in zip(schedule.optimizer.param_groups, before, strict=True):
                group.update(values)
            return False
        self.changes.append(f"lr_scheduler {here['kind']} (checkpoint: one with another rule)")
        return True


def _hides_its_rule(scheduler: Any) -> bool:
    """Whether a scheduler's rates depend on more than its state: on functions, or on a class outside torch."""
    functions = getattr(scheduler, "lr_lambdas", ())
    return (
        any(isinstance(function, FunctionType) for function in functions)
        or not type(scheduler).__module__.startswith("torch.")
        or any(map(_hides_its_rule, getattr(scheduler, "_schedulers", ())))
    )
