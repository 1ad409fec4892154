"""A study file: the question, the arms, the seeds, and the plan by which the result will be judged."""

from __future__ import annotations

import hashlib
import json
import re
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from ibro_lightning.errors import ConfigError, check_at_least, check_count
from ibro_lightning.runs.recipes import find_config

TESTS = ("sign_flip",)


@dataclass(frozen=True)
class Plan:
    """What is decided before the first trial runs.

    Args:
        question: what the study asks.
        metric: the primary outcome, a curve's name, read at each trial's last evaluation.
        comparisons: pairs of arms, ``[reference, other]``. A difference is other − reference, paired by seed; p-values
            are corrected for the number of pairs (Holm).
        answer: what would count as an answer, and what would change our mind.
        chosen_by: how task, run length, evaluation and coefficients were chosen, and on which problems and seeds.
        difference_that_matters: in the metric's unit.
        paired_sd: standard deviation of the paired differences in a pilot, in the metric's unit; None: no pilot.
        test: ``sign_flip``: random signs of the seeds' differences, exact for up to 14 seeds.
        level: of the intervals' complement and of the test.
    """

    question: str
    metric: str
    comparisons: list[list[str]]
    answer: str
    chosen_by: str
    difference_that_matters: float
    paired_sd: float | None = None
    test: str = "sign_flip"
    level: float = 0.05

    def __post_init__(self) -> None:
        for name in ("question", "answer", "chosen_by", "metric"):
            if not getattr(self, name).strip():
                raise ConfigError(f"plan.{name}", "", "write it before the first trial runs")
        if self.test not in TESTS:
            raise ConfigError("plan.test", self.test, f"write one of {', '.join(TESTS)}")
        if not 0 < self.level < 1:
            raise ConfigError("plan.level", self.level, "write a number between 0 and 1, such as 0.05")
        check_at_least("plan.difference_that_matters", self.difference_that_matters, 0)
        if self.paired_sd is not None:
            check_at_least("plan.paired_sd", self.paired_sd, 0)


@dataclass(frozen=True)
class Arm:
    """One way to train: a recipe with settings of its own.

    Args:
        settings: ``{setting: value}`` as on the command line, e.g. ``{model.regularizer: null}``.
        recipe: another recipe than the study's.
        grid: ``{setting: values}``: the arm is run with every combination, each as an arm ``NAME,setting=value``.
        label: its name in the report; the arm's own if left out.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    grid: dict[str, list[Any]] = field(default_factory=dict)
    label: str | None = None


@dataclass(frozen=True)
class BasePolicy:
    """The policy from which all arms of a seed start, trained once per seed.

    Args:
        recipe: trains it; its ``seed_everything`` is the trial's.
        settings: as an arm's.
        key: the setting of the arms' recipes that gets the path of the trained model.
    """

    recipe: str
    settings: dict[str, Any] = field(default_factory=dict)
    key: str = "model.policy"


@dataclass(frozen=True)
class Trial:
    """One training run of a study: an arm with a seed; or, with arm None, the base policy of a seed."""

    arm: str | None
    seed: int
    arguments: tuple[str, ...]
    """Of ``fit``, but for those that name folders."""
    context: str = ""
    """What else decides what its results are: the text of the recipes, the base policy, how they are gathered."""

    @property
    def name(self) -> str:
        return f"{self.arm or 'base'}/seed_{self.seed}"

    @property
    def digest(self) -> str:
        """Of everything that decides the trial's results in one version of the code."""
        return hashlib.sha256("\0".join([*self.arguments, self.context]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Study:
    """A study file.

    Args:
        name: also the name of its folders.
        plan: decided before the first trial runs.
        recipe: that of all arms without their own.
        arms: ``{name: arm}``.
        seeds: one trial per arm and seed. All arms share a seed's prompts, random numbers and base policy.
        settings: of all arms, before their own.
        base_policy: trained once per seed; None: the recipe names the policy.
        temperatures: at which the final policies are evaluated, besides the recipe's own.
        curves: beginnings of the names of the curves to keep; what else was logged stays in the trials' folders.
        every: iterations over which a training curve is averaged to one point of the results.
    """

    name: str
    plan: Plan
    recipe: str
    arms: dict[str, Arm]
    seeds: list[int]
    settings: dict[str, Any] = field(default_factory=dict)
    base_policy: BasePolicy | None = None
    temperatures: list[float] = field(default_factory=list)
    curves: list[str] = field(
        default_factory=lambda: [
            *("val/", "policy/entropy", "rollout/accuracy", "rollout/length", "rollout/reward"),
            *("rollout/zero_variance_groups", "ib/", "regularizer/", "information/", "alarm/"),
            *("update/grad_norm", "update/policy_shift", "critic/explained_variance"),
        ]
    )
    every: int = 10

    def __post_init__(self) -> None:
        if not self.name.replace("_", "a").replace("-", "a").isalnum():
            raise ConfigError("name", self.name, "write letters, digits, - and _: folders have this name")
        if not self.arms:
            raise ConfigError("arms", {}, "write one arm at least")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError("seeds", self.seeds, "write different whole numbers, one at least")
        for seed in self.seeds:
            check_count("seeds", seed, 0)
        for name, arm in self.arms.items():
            _check_arm(name, arm)
        check_count("every", self.every, 1)
        if not all(temperature > 0 for temperature in self.temperatures):
            raise ConfigError("temperatures", self.temperatures, "write numbers above 0")
        if len(set(self.temperatures)) < len(self.temperatures):
            raise ConfigError("temperatures", self.temperatures, "write each of them once")
        known = set(self.all_arms())
        for pair in self.plan.comparisons:
            if len(pair) != 2 or len(set(pair) & known) != 2:
                remedy = f"write pairs [reference, other] of the arms {', '.join(known)}"
                raise ConfigError("plan.comparisons", pair, remedy)

    def all_arms(self) -> dict[str, Arm]:
        """The arms with their grids spread out."""
        return dict(arm for name, given in self.arms.items() for arm in spread(name, given))

    def trials(self) -> Iterator[Trial]:
        """All trials, seed after seed, so that a study that is cut short has whole pairs."""
        arms = self.all_arms()
        for seed in self.seeds:
            for name, arm in arms.items():
                settings = {**self.settings, **arm.settings, "seed_everything": seed}
                recipe = arm.recipe or self.recipe
                yield Trial(name, seed, arguments(recipe, settings), self._context(seed, recipe))

    def _context(self, seed: int, recipe: str) -> str:
        base, gathered = self.base(seed), (self.temperatures, self.curves, self.every)
        return "\0".join([find_config(recipe).read_text(), base.digest if base else "", json.dumps(gathered)])

    def base(self, seed: int) -> Trial | None:
        """The trial that trains a seed's base policy."""
        if self.base_policy is None:
            return None
        settings = {**self.base_policy.settings, "seed_everything": seed}
        recipe = self.base_policy.recipe
        return Trial(None, seed, arguments(recipe, settings), find_config(recipe).read_text())


def _check_arm(name: str, arm: Arm) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", name) or name == "base":
        remedy = "write letters, digits, _, +, - and . only: folders have this name; base is the base policies'"
        raise ConfigError("arms", name, remedy)
    for setting, values in arm.grid.items():
        if not values or not all(isinstance(value, bool | int | float | str) for value in values):
            raise ConfigError(f"arms.{name}.grid", {setting: values}, "write numbers or names to try, one at least")
        if any("/" in str(value) for value in values):
            raise ConfigError(
                f"arms.{name}.grid",
                {setting: values},
                "folders have these values in their names: write an arm for each",
            )


def spread(name: str, arm: Arm) -> Iterator[tuple[str, Arm]]:
    """An arm's grid as arms, ``(name, arm)`` each; itself without a grid."""
    for values in product(*arm.grid.values()):
        point = dict(zip(arm.grid, values, strict=True))
        given = "".join(f",{key.rsplit('.', 1)[-1]}={value}" for key, value in point.items())
        yield (
            name + given,
            Arm({**arm.settings, **point}, arm.recipe, label=arm.label and arm.label + given.replace(",", ", ")),
        )


def arguments(recipe: str, settings: dict[str, Any]) -> tuple[str, ...]:
    """Settings as on the command line."""
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    return ("--config", recipe, *(part for key, value in values.items() for part in (f"--{key}", value)))


def study_parser() -> ArgumentParser:
    """The command line of ``study``, without how it is run: a study file, and its fields as flags."""
    parser = ArgumentParser(prog="python -m ibro_lightning study", exit_on_error=False)
    parser.add_argument("--config", action="config", help="a study file, e.g. studies/paper_table.yaml")
    parser.add_class_arguments(Study, None)
    return parser


def read_study(path: Path) -> Study:
    """The study in a file. Raises :class:`ConfigError` for what is wrong in it."""
    return build_study(parsed(study_parser(), ["--config", str(path)]))


def parsed(parser: ArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    """What a parser makes of arguments; raises :class:`ConfigError` for what it refuses."""
    try:
        return parser.parse_args(arguments).as_dict()
    except ArgumentError as error:
        raise ConfigError("study", " ".join(arguments), " ".join(str(error).split())) from error


def build_study(content: Mapping[str, Any]) -> Study:
    """A study of the fields in ``content``. Not by the parser: it would build the classes that settings name, too."""
    own = {name: content[name] for name in Study.__dataclass_fields__}
    arms = {name: Arm(**arm) for name, arm in own["arms"].items()}
    base = own["base_policy"] and BasePolicy(**own["base_policy"])
    return Study(**{**own, "plan": Plan(**own["plan"]), "arms": arms, "base_policy": base})


def as_yaml(study: Study) -> str:
    """The study as a file that :func:`read_study` reads back."""
    return yaml.safe_dump(asdict(study), sort_keys=False, allow_unicode=True, width=110)
