"""``null`` for a number: either it has a documented meaning, or one line names the setting and says what to write."""

from __future__ import annotations

import inspect
import re
import sys
import typing
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import ibro_lightning.cli  # noqa: F401  imports every class that a recipe may name
from helpers.models import TinySource
from ibro_lightning import callbacks, datamodules, engines, models, modules, regularizers, rewards, sources, tasks
from ibro_lightning import strategies as strategy_classes
from ibro_lightning.cli.main import main
from ibro_lightning.cli.parser import OneLineParser
from ibro_lightning.errors import ConfigError, check_at_least
from ibro_lightning.regularizers import coefficients

PARTS = (
    callbacks,
    coefficients,
    datamodules,
    engines,
    models,
    modules,
    regularizers,
    rewards,
    sources,
    strategy_classes,
    tasks,
)
NUMBERS = (int, float)
CLASS = "(, or one of [A-Z][A-Za-z, ]+, or module.Class of your own)?"
"""What may stand in place of a number that has a schedule."""


def classes() -> list[type]:
    found = {
        thing
        for part in PARTS
        for name in getattr(part, "__all__", dir(part))
        if isinstance(thing := getattr(part, name), type) and thing.__module__.startswith("ibro_lightning")
    }
    in_recipes = (kind for kind in found if not inspect.isabstract(kind) and not issubclass(kind, tuple))
    return sorted(in_recipes, key=lambda kind: kind.__name__)


def is_number(action: Any) -> bool:
    hint = getattr(action, "_typehint", None)
    return any(kind in NUMBERS for kind in (hint, *typing.get_args(hint))) and not action.dest.endswith(".help")


def numbers(kind: type) -> Iterator[tuple[str, Any]]:
    """The numeric settings of a class, dotted where they are of a dataclass in it, with their actions."""
    parser = OneLineParser()
    parser.add_class_arguments(kind, "x")
    for action in parser._actions:
        if is_number(action):
            yield action.dest.removeprefix("x."), action


def parse_null(kind: type, name: str) -> None:
    parser = OneLineParser()
    parser.add_argument("--x", type=kind)
    *outer, last = name.split(".")
    settings: dict[str, Any] = {last: None}
    for part in reversed(outer):
        settings = {part: settings}
    parser.parse_object({"x": {"class_path": f"{kind.__module__}.{kind.__name__}", "init_args": settings}})


@pytest.fixture(autouse=True)
def nothing_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are completed by what stands there, which may be an earlier test's."""
    monkeypatch.setattr(sys, "argv", ["ibro_lightning"])


def documentation(kind: type) -> str:
    return " ".join(" ".join(base.__doc__ or "" for base in kind.__mro__ if base is not object).split())


@pytest.mark.parametrize("kind", classes(), ids=lambda kind: kind.__name__)
def test_every_number_takes_null_or_names_itself(kind: type, capsys: pytest.CaptureFixture[str]) -> None:
    for name, action in numbers(kind):
        optional = type(None) in typing.get_args(action._typehint)
        with suppress(SystemExit):
            parse_null(kind, name)
        error = capsys.readouterr().err.replace("error: x.", "error: ")
        if action.default is None:  # null is its default, or it has none and must be given
            assert not error or re.fullmatch(r"error: [\w.]+: missing - write .+\n", error), f"{name}: {error}"
        elif optional:
            assert ": null - " not in error, f"{name}: {error}"
        else:
            kinds = rf"a number{CLASS}|a whole number|a list"
            line = rf"error: {re.escape(name)}: null - write ({kinds}), or leave it out for its default\n"
            assert re.fullmatch(line, error), f"{name}: {error}"


def test_null_where_it_is_taken_is_documented() -> None:
    silent = []
    for kind in classes():
        for name, action in numbers(kind):
            if type(None) in typing.get_args(action._typehint) and action.default is not None:
                text, last = documentation(kind), name.rpartition(".")[2]
                told = [text[match.end() :][:400] for match in re.finditer(rf"\b{last}\b", text)]
                if not any("None" in part or "null" in part for part in told):
                    silent.append(f"{kind.__name__}.{name}")
    assert silent == []


RECIPE = ["fit", "--config", "tiny.yaml"]


WRITTEN = {
    "data.group_size": ("whole number", "data: {init_args: {group_size: null}}"),
    "data.sampling.temperature": ("number", "data: {init_args: {sampling: {temperature: null}}}"),
    "data.engine.max_batch_size": (
        "whole number",
        "data: {init_args: {engine: {class_path: HFEngine, init_args: {max_batch_size: null}}}}",
    ),
    "model.clip_ratio_low": ("number", "model: {init_args: {clip_ratio_low: null}}"),
    "model.regularizer.coef": (
        "number",
        "model: {init_args: {regularizer: {class_path: InformationBottleneck, init_args: {coef: null}}}}",
    ),
    "model.warmup_steps": ("whole number", "model: {init_args: {warmup_steps: null}}"),
    "checkpoint.every_n_iterations": ("whole number", "checkpoint: {every_n_iterations: null}"),
}


@pytest.mark.parametrize("setting", WRITTEN)
def test_the_line_names_the_setting_as_it_was_written(
    setting: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, recipe = WRITTEN[setting]
    (workspace / "null.yaml").write_text(recipe)
    for arguments in ([f"--{setting}", "null"], [f"--{setting}=null"], ["--config", "null.yaml"]):
        engine = ["--data.engine", "HFEngine"] if "engine" in setting and arguments[0] != "--config" else []
        with pytest.raises(SystemExit) as stop:
            main([*RECIPE, *engine, *arguments])
        assert stop.value.code == 2
        line = rf"error: {re.escape(setting)}: null - write a {kind}{CLASS}, or leave it out for its default\n"
        error = capsys.readouterr().err
        assert re.fullmatch(line, error), f"{arguments}: {error}"
    assert not (workspace / "run").exists()


def test_a_text_for_a_number_is_named_as_well(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*RECIPE, "--data.group_size", "many"])
    assert capsys.readouterr().err == "error: data.group_size: 'many' - write a whole number\n"


def test_no_norm_is_no_clipping_from_the_command_line(workspace: Path) -> None:
    arguments = ["--trainer.max_epochs", "1", "--trainer.limit_val_batches", "0"]
    for run, norm in (("none", "null"), ("zero", "0")):
        main([*RECIPE, *arguments, "--model.max_grad_norm", norm, "--trainer.default_root_dir", run])
    weights = [(workspace / run / "model" / "model.safetensors").read_bytes() for run in ("none", "zero")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("value", [None, "4", float("nan"), float("inf"), 0])
def test_what_is_no_number_is_refused_from_python_too(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^group_size: .* - write 1 or more"):
        check_at_least("group_size", value, 1)


@pytest.mark.parametrize("kind", [modules.DAPOModule, modules.PPOModule, modules.SFTModule])
def test_modules_take_no_null_and_no_text_for_a_number_from_python(kind: type) -> None:
    for name, action in numbers(kind):
        optional = type(None) in typing.get_args(action._typehint)
        if "." in name or action.default is None:
            continue
        for value in ("3", *(() if optional else (None,))):
            with pytest.raises(ConfigError, match=rf"^{name}: .* - write "):
                kind(TinySource(), **{name: value})


@pytest.mark.parametrize(("name", "value"), [("sampling", None), ("sampling", "x"), ("dynamic_sampling", "x")])
def test_parts_of_the_data_that_are_something_else_are_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: .* - write "):
        datamodules.RolloutDataModule(
            tasks.NumberPathSource(), tasks.NumberPathReward(), reward_pool=None, **{name: value}
        )
