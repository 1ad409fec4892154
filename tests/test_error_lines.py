"""A wrong value is refused in one line: from Python by the name of the constructor's parameter, and in a recipe or on
the command line by the name that one types, with the same words behind it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml

import ibro_lightning.cli.run  # noqa: F401  imports every class that a recipe may name
from ibro_lightning import regularizers
from ibro_lightning.callbacks import Heartbeat, IterationCheckpoint, RankWatch, RolloutLog, SamplesTable
from ibro_lightning.cli.main import main
from ibro_lightning.cli.parser import OneLineParser
from ibro_lightning.engines import HFEngine, VLLMEngine
from ibro_lightning.engines.weight_check import WeightCheck
from ibro_lightning.errors import ConfigError
from ibro_lightning.models.lora import LoRAOptions
from ibro_lightning.modules import DAPOModule
from ibro_lightning.regularizers import IBRO, ClipCov, EntropyShapedAdvantage, InformationBottleneck, KLCov
from ibro_lightning.regularizers.coefficients import AdaptiveKL, Cosine, EntropyBand, Linear, Stages, TargetEntropy
from ibro_lightning.strategies import FSDP2Strategy
from ibro_lightning.types import SamplingParams

NOT_TO_CHOOSE = {"EntropyRegularizer", "PolicyLossMethod", "CorrectPathEntropySuppression"}
"""Base classes, and a former name."""
METHODS = {
    name
    for name in regularizers.__all__
    if issubclass(getattr(regularizers, name), regularizers.EntropyRegularizer) and name not in NOT_TO_CHOOSE
}
REGULARIZERS = f"one of {', '.join(sorted(METHODS))}, or module.Class of your own"
ADVANTAGES = "write one of grpo, dr_grpo, rloo, quantile, maxrl, asym_grpo, reinforce++, or one of AsymGRPO, DrGRPO, "
ADVANTAGES += "GRPO, MaxRL, QuantileAdvantage, RLOO, or module.Class of your own"
SOURCES = (
    "one of CountdownSource, DatasetSource, DifficultyPools, MixtureSource, NumberPathSource, ReasoningGymSource, "
    "SmallProgramsSource, SumsSource, or module.Class of your own"
)
SCHEDULES = (
    "ChainedScheduler, ConstantLR, CosineAnnealingLR, CosineAnnealingWarmRestarts, CyclicLR, ExponentialLR, LambdaLR, "
    "LinearLR, MultiStepLR, MultiplicativeLR, OneCycleLR, PolynomialLR, SequentialLR, StepLR"
)
"""Without ``ReduceLROnPlateau``, which is refused."""
PARTS = "write one of raw, centred, uniform, reversed"
COEFFICIENTS = (
    "one of AdaptiveClip, AdaptiveKL, Constant, Cosine, EntropyBand, EntropySteps, Linear, Stages, TargetEntropy, or "
    "module.Class of your own"
)


def refusal(make: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as refused:
        make()
    return str(refused.value)


def settings_of(kind: type, **settings: Any) -> dict[str, Any]:
    return {"class_path": f"{kind.__module__}.{kind.__name__}", "init_args": settings}


BOTH: dict[str, tuple[type, dict[str, Any], str, str]] = {
    # the class, its settings, where a recipe has it, and the line without that place
    "kl": (KLCov, {"kl_coef": -1.0}, "model.regularizer", "kl_coef: -1.0 - write 0 or more"),
    "share": (ClipCov, {"fraction": 2.0}, "model.regularizer", "fraction: 2.0 - write a share of the tokens, above 0 "
              "and up to 1"),
    "bounds": (ClipCov, {"low": 9.0}, "model.regularizer", "low: 9.0 - write a number below high (5.0)"),
    "clip": (InformationBottleneck, {"clip": 0.0}, "model.regularizer", "clip: 0.0 - write a positive bound for the "
             "advantage"),
    "coef": (InformationBottleneck, {"coef": -2.0}, "model.regularizer", "coef: -2.0 - write 0 or more"),
    "kappa": (EntropyShapedAdvantage, {"kappa": 0.5}, "model.regularizer", "kappa: 0.5 - write 1 or more: below, it "
              "would flip signs"),
    "beta": (IBRO, {"beta": -1.0}, "model.regularizer", "beta: -1.0 - write 0 or more"),
    "template": (IBRO, {"template": "x"}, "model.regularizer", "template: 'x' - must contain {prompt}, and {answer} or "
                 "a part of {meta[...]}"),
    "end": (Linear, {"start": 1.0, "end": -1.0, "iterations": 3}, "model.regularizer.coef", "end: -1.0 - write 0 or "
            "more"),
    "iterations": (Cosine, {"start": 1.0, "end": 0.0, "iterations": 0}, "model.regularizer.coef", "iterations: 0 - "
                   "write 1 or more"),
    "band": (EntropyBand, {"low": 2.0, "high": 1.0}, "model.regularizer.coef", "low: 2.0 - write a number between 0 "
             "and high (1.0)"),
    "stages": (Stages, {"values": [1.0, 0.5], "starts": [1]}, "model.regularizer.coef", "starts: 1 - write 2 or more"),
    "values": (Stages, {"values": [], "starts": []}, "model.regularizer.coef", "values: [] - write a list of numbers, "
               "such as [1.0, 0.5]"),
    "start": (AdaptiveKL, {"start": 0.0, "target": 0.1}, "model.regularizer.coef", "start: 0.0 - write a positive "
              "number: 0 would stay 0"),
    "maximum": (TargetEntropy, {"target": 1.0, "start": 0.5, "maximum": 0.1}, "model.regularizer.coef", "maximum: 0.1 "
                "- write start (0.5) or more"),
    "batch": (HFEngine, {"max_batch_size": 0}, "data.engine", "max_batch_size: 0 - write 1 or more responses"),
    "share of a batch": (HFEngine, {"compact_below": 0.0}, "data.engine", "compact_below: 0.0 - write a share above 0 "
                         "and up to 1"),
    "deadline": (VLLMEngine, {"deadline_s": 0.0}, "data.engine", "deadline_s: 0.0 - write 0.001 or more, or null to "
                 "wait"),
    "temperature": (SamplingParams, {"temperature": -1.0}, "data.sampling", "temperature: -1.0 - write 0 (greedy) or a "
                    "finite number of at least 1e-06"),
    "top_p": (SamplingParams, {"top_p": 2.0}, "data.eval_sets.starts.sampling", "top_p: 2.0 - write a number above 0 "
              "and up to 1 (1 keeps all tokens)"),
    "tokens": (SamplingParams, {"stop_token_ids": (-1,)}, "data.sampling", "stop_token_ids: [-1] - write token ids, "
               "from 0"),
    "tolerance": (WeightCheck, {"tolerance": 0.0}, "data.weight_check", "tolerance: 0.0 - write a positive number of "
                  "nats, or null"),
    "rank": (LoRAOptions, {"rank": 0}, "model.policy_options.lora", "rank: 0 - write 1 or more"),
    "silence": (RankWatch, {"silence_s": 1.0}, "rank_watch", "silence_s: 1.0 - write 10 or more"),
    "keep_last": (IterationCheckpoint, {"keep_last": 0}, "checkpoint", "keep_last: 0 - write 1 or more, or null to "
                  "keep all"),
    "rows": (SamplesTable, {"rows": -1}, "samples", "rows: -1 - write 0 or more"),
    "every": (RolloutLog, {"every_n_iterations": -1}, "rollout_log", "every_n_iterations: -1 - write 0 or more "
              "(1: every rollout, 0: none)"),
    "beats": (Heartbeat, {"first_s": -1.0}, "heartbeat", "first_s: -1.0 - write 0 or more"),
}  # fmt: skip


@pytest.mark.parametrize("case", BOTH)
def test_python_names_the_parameter_and_the_command_line_adds_where_it_is(case: str, recipe: Recipe) -> None:
    kind, settings, place, line = BOTH[case]
    assert refusal(lambda: kind(**settings)) == line
    assert refusal(lambda: recipe.build(kind, settings, place)) == f"{place}.{line}"


class Falling(Linear):
    """A user's, whose setting has another name in the base that checks it."""

    def __init__(self, top: float = 0.1) -> None:
        super().__init__(top, 0.0, 10)


def test_what_a_base_of_ours_refuses_in_a_users_class_has_a_place(recipe: Recipe) -> None:
    line = refusal(lambda: recipe.build(Falling, {"top": -1.0}, "model.regularizer.coef"))
    assert line == "model.regularizer.coef.start: -1.0 - write 0 or more"


class Recipe:
    """The recipe of ``workspace``, with the parser that the command line has, without a Trainer's run."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content
        self.parser = OneLineParser(parser_mode="omegaconf")
        self.parser.add_lightning_class_args(pl.LightningModule, "model", subclass_mode=True, required=False)
        self.parser.add_lightning_class_args(pl.LightningDataModule, "data", subclass_mode=True, required=False)
        for callback, name in (
            (RankWatch, "rank_watch"),
            (Heartbeat, "heartbeat"),
            (RolloutLog, "rollout_log"),
            (SamplesTable, "samples"),
            (IterationCheckpoint, "checkpoint"),
        ):
            self.parser.add_lightning_class_args(callback, name)

    def build(self, kind: type, settings: Mapping[str, Any], place: str) -> None:
        """Build everything, with an object of ``kind`` at ``place``."""
        content: dict[str, Any] = yaml.safe_load(yaml.safe_dump(self.content))
        if place == "model.regularizer.coef":
            self.set(content, "model.regularizer", settings_of(InformationBottleneck))
        takes_any = place in ("model.regularizer", "model.regularizer.coef", "data.engine")
        self.set(content, place, settings_of(kind, **settings) if takes_any else dict(settings))
        self.parser.instantiate_classes(self.parser.parse_object(content))

    @staticmethod
    def set(content: dict[str, Any], place: str, value: object) -> None:
        *path, last = place.split(".")
        for key in path:
            content[key] = content.get(key) or {}
            content = content[key]
            content = content.setdefault("init_args", {}) if "class_path" in content else content
        content[last] = value


@pytest.fixture
def recipe(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr(sys, "argv", ["ibro-lightning"])
    content = yaml.safe_load((workspace / "tiny.yaml").read_text())
    return Recipe({name: content[name] for name in ("model", "data")})


def test_of_two_sets_of_settings_the_wrong_one_is_named(recipe: Recipe) -> None:
    """Both hold a temperature; a field of the evaluation set's is not one of training's."""
    recipe.set(recipe.content, "data.sampling", {"temperature": 1.0, "max_tokens": 6})
    line = refusal(lambda: recipe.build(SamplingParams, {"temperature": 1.0, "max_tokens": 0}, "data.sampling"))
    assert line.startswith("data.sampling.max_tokens: 0 - ")


def test_a_module_names_its_parameters(tiny_policy: Path) -> None:
    assert refusal(lambda: DAPOModule(tiny_policy, warmup_steps=-1)).endswith("warmup_steps: -1 - write 0 or more")
    assert refusal(lambda: FSDP2Strategy(tensor_parallel_size=0)) == "tensor_parallel_size: 0 - write 1 or more"


COMMAND_LINE = {
    # what is typed: the line
    "--model.clip_ratio_low -1": "model.clip_ratio_low: -1.0 - write a number between 0 and 1, such as 0.2",
    "--model.clip_ratio_low x": f"model.clip_ratio_low: 'x' - write a number, or {COEFFICIENTS}",
    "--model.update_epochs 1.5": "model.update_epochs: '1.5' - write a whole number",
    "--model.advantage nope": f"model.advantage: 'nope' - {ADVANTAGES}",
    "--checkpoint.mode best": "checkpoint.mode: 'best' - write max or min",
    "--model.policy_options.dtype f3": "model.policy_options.dtype: 'f3' - write one of float32, bfloat16, float16",
    "--model.regularizer.part nope": f"model.regularizer.part: 'nope' - {PARTS}",
    "--model.regularizer.init_args.part nope": f"model.regularizer.part: 'nope' - {PARTS}",
    "--model.regularizer.coef x": f"model.regularizer.coef: 'x' - write a number, or {COEFFICIENTS}",
    "--model.regularizer.coef None": f"model.regularizer.coef: null - write a number, or {COEFFICIENTS}, or leave it "
    "out for its default",
    "--model.regularizer.coef.start 1": f"model.regularizer.coef.start: '1' - it belongs to a class: write coef as "
    f"{COEFFICIENTS} first",
    "--model.regularizer.prat raw": "model.regularizer.prat: 'raw' - InformationBottleneck has no such setting: did "
    "you mean part?",
    "--model.regularizer Nope": f"model.regularizer: 'Nope' - there is no EntropyRegularizer of that name: write "
    f"{REGULARIZERS}, or null",
    "--model.regularizer InfoBottleneck": "model.regularizer: 'InfoBottleneck' - there is no EntropyRegularizer of "
    f"that name: did you mean InformationBottleneck? Or write {REGULARIZERS}, or null",
    "--model.regularizer my.Nope": f"model.regularizer: 'my.Nope' - cannot be imported (No module named 'my'): write "
    f"{REGULARIZERS}, or null",
    "--model.regularizer torch.optim.AdamW": "model.regularizer: 'torch.optim.AdamW' - not a subclass of "
    f"EntropyRegularizer: write {REGULARIZERS}, or null",
    "--model.regularizer EntropyRegularizer": f"model.regularizer: 'EntropyRegularizer' - this is an abstract "
    f"base class: write {REGULARIZERS}, or null",
    "--model.policy_options.lora x": "model.policy_options.lora: 'x' - write its settings (rank, alpha, "
    "target_modules, seed), or null",
    "--data.engine Nope": "data.engine: 'Nope' - there is no RolloutEngine of that name: write one of EngineProcess, "
    "HFEngine, VLLMEngine, VLLMServerEngine, or module.Class of your own, or null",
    "--data.prompt_limits.nope 1": "data.prompt_limits.nope: '1' - PromptLimits has no such setting: it has "
    "max_tokens, overlong",
    "--data.grup_size 4": "data.grup_size: '4' - RolloutDataModule has no such setting: did you mean group_size?",
    "--data.eval_sets.aime.samples 4": f"data.eval_sets.aime.source: missing - write {SOURCES}",
    "--data.eval_sets.aime.source DatasetSource": "data.eval_sets.aime.source.path: missing - write text",
    "--data.group_size null": "data.group_size: null - write a whole number, or leave it out for its default",
    "--data.reward_pool.workers x": "data.reward_pool.workers: 'x' - write a whole number, or null",
    "--data.sampling x": "data.sampling: 'x' - write its settings (temperature, top_p, top_k, min_p, max_tokens, "
    "stop_token_ids)",
    "--data.eval_sets.starts.samples x": "data.eval_sets.starts.samples: 'x' - write a whole number",
    "--data.eval_sets.starts.sorce x": "data.eval_sets.starts.sorce: 'x' - EvalSet has no such setting: did you mean "
    "source?",
    "--data.eval_sets.starts.source.nope 2": "data.eval_sets.starts.source.nope: '2' - Starts has no such setting: it "
    "has none",
    "--model.kl ibro_lightning.modules.ReferenceKL": "model.kl: 'ibro_lightning.modules.ReferenceKL' - this class has "
    "moved: write ReferenceKL, or ibro_lightning.update.ReferenceKL",
    "--model.regularizer.coef ibro_lightning.coefficients.AdaptiveKL": "model.regularizer.coef: "
    "'ibro_lightning.coefficients.AdaptiveKL' - this class has moved: write AdaptiveKL, or "
    "ibro_lightning.regularizers.coefficients.AdaptiveKL",
    "--model.gae_lambda 0.9": "model.gae_lambda: '0.9' - DAPOModule has no such setting: PPOModule has it",
    "--model.regularizer.prompts hard": "model.regularizer.prompts: 'hard' - InformationBottleneck has no such "
    "setting: MarginalEntropy or PassRateInformationBottleneck has it",
    "--model.surrogate grpo": "model.surrogate: 'grpo' - write one of ppo, gspo, cispo, gmpo, dppo, sapo, or a "
    "subclass of PolicyLoss, as module.Class",
    "--regularizer IBRO": "regularizer: 'IBRO' - the command line has no such setting: did you mean model.regularizer?",
    "--regularizer.coef 1": "regularizer.coef: '1' - the command line has no such setting: did you mean "
    "model.regularizer.coef?",
    "--grup_size 4": "grup_size: '4' - the command line has no such setting: did you mean data.group_size?",
    "--grup_size=--4": "grup_size: '--4' - the command line has no such setting: did you mean data.group_size?",
    "--checkpont --samples.rows 1": "checkpont: the command line has no such setting: did you mean checkpoint?",
    "--model.lr_scheduler Nope": "model.lr_scheduler: 'Nope' - there is no LRScheduler of that name: write one of "
    f"{SCHEDULES}, or module.Class of your own, or null",
    "--model DAPO": "model: 'DAPO' - there is no LightningModule of that name: did you mean DAPOModule? Or write one "
    "of DAPOModule, PPOModule, SFTModule, or module.Class of your own, or null",
    "--model SFTModule --model.policy null": "model.policy: missing - write a Hugging Face folder or hub name, or "
    "PretrainedPolicy or Qwen2FromScratch, or module.Class of your own",
    "--checkpont.mode min": "checkpont.mode: 'min' - the command line has no such setting: did you mean "
    "checkpoint.mode?",
}


@pytest.mark.parametrize("typed", COMMAND_LINE)
def test_the_command_line_is_answered_in_one_line(
    typed: str, workspace: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["ibro-lightning", *typed.split()])
    recipe.parser.add_argument("--config", action="config")
    (workspace / "part.yaml").write_text(yaml.safe_dump(recipe.content))
    with pytest.raises((ConfigError, SystemExit)) as refused:
        recipe.parser.instantiate_classes(recipe.parser.parse_args(["--config", "part.yaml", *typed.split()]))
    line = capsys.readouterr().err.strip().removeprefix("error: ") if refused.type is SystemExit else str(refused.value)
    assert line == COMMAND_LINE[typed]


TYPOS = {
    # a setting that does not exist: the class of its group, and what was meant
    "data.sampling.tempreature": ("SamplingParams", "temperature"),
    "data.prompt_limits.overlng": ("PromptLimits", "overlong"),
    "data.weight_check.tolerence": ("WeightCheck", "tolerance"),
    "data.reward_pool.wrokers": ("PoolOptions", "workers"),
    "data.dynamic_sampling.max_ronds": ("DynamicSampling", "max_rounds"),
    "data.eval_sets.starts.smaples": ("EvalSet", "samples"),
    "data.eval_sets.starts.sampling.tempreature": ("SamplingParams", "temperature"),
    "model.policy_options.dtpe": ("PolicyOptions", "dtype"),
    "model.policy_options.lora.rnk": ("LoRAOptions", "rank"),
    "model.sampler_correction.cpa": ("SamplerCorrection", "cap"),
    "model.kl.cof": ("ReferenceKL", "coef"),
    "checkpoint.mdoe": ("IterationCheckpoint", "mode"),
}


def line_of(
    recipe: Recipe, arguments: list[str], patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]
) -> str:
    """The line that the recipe's parser writes about arguments."""
    patch.setattr(sys, "argv", ["ibro-lightning", *arguments])
    recipe.parser.add_argument("--config", action="config")
    with pytest.raises(SystemExit):
        recipe.parser.parse_args(arguments)
    return capture.readouterr().err.strip().removeprefix("error: ")


@pytest.mark.parametrize("written", ["flag", "recipe"])
@pytest.mark.parametrize("name", TYPOS)
def test_a_typo_in_any_group_is_answered_by_the_groups_own_settings(
    name: str, written: str, recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = [f"--{name}", "1"] if written == "flag" else []
    if written == "recipe":
        recipe.set(recipe.content, name, 1)
    Path("part.yaml").write_text(yaml.safe_dump(recipe.content))
    owner, meant = TYPOS[name]
    line = line_of(recipe, ["--config", "part.yaml", *typed], monkeypatch, capsys)
    assert line == f"{name}: '1' - {owner} has no such setting: did you mean {meant}?"


WITHOUT_A_CLASS = "'4' - it belongs to a class: write class_path first, "
DATA = "one of EvaluationDataModule, RolloutDataModule, SFTDataModule, or module.Class of your own"


@pytest.mark.parametrize(
    ("written", "line"),
    [
        ("data: {group_size: 4}", f"data.group_size: {WITHOUT_A_CLASS}{DATA}"),
        ("data: {init_args: {group_size: 4}}", f"data.group_size: {WITHOUT_A_CLASS}{DATA}"),
        ("model: {init_args: {learning_rate: 4}}", f"model.learning_rate: {WITHOUT_A_CLASS}one of DAPOModule, "),
    ],
)
def test_settings_without_a_class_ask_for_one(
    written: str, line: str, recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("part.yaml").write_text(written)
    assert line_of(recipe, ["--config", "part.yaml"], monkeypatch, capsys).startswith(line)


IN_A_RECIPE = {
    "trainer: {callbacks: [{class_path: Timer}, {class_path: EarlyStopping}]}": "trainer.callbacks[1].monitor: missing "
    "- write text",
    "data: {init_args: {eval_sets: {aime: {source: DatasetSource}}}}": "data.eval_sets.aime.source.path: missing - "
    "write text",
    "model: {init_args: {advantage: nope}}": f"model.advantage: 'nope' - {ADVANTAGES}",
    "model: {init_args: {regularizer: {init_args: {prat: raw}}}}": "model.regularizer.prat: 'raw' - "
    "InformationBottleneck has no such setting: did you mean part?",
    "data: {init_args: {eval_sets: {starts: {samples: many}}}}": "data.eval_sets.starts.samples: 'many' - write a "
    "whole number",
    "data: {init_args: {reward: {class_path: RewardSum, init_args: {rewards: [{class_path: user_code.SaysEquals}, "
    "{class_path: OverlongPenalty, init_args: {bufer_tokens: 3}}]}}}}": "data.reward.rewards[1].bufer_tokens: '3' - "
    "OverlongPenalty has no such setting: did you mean buffer_tokens?",
    "data: {init_args: {engine: {class_path: HFEngine, init_args: {max_batch_size: 0}}}}": "data.engine.max_batch_size:"
    " 0 - write 1 or more responses",
    "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitr: loss}}]}": "trainer.callbacks[0].monitr: "
    "'loss' - EarlyStopping has no such setting: did you mean monitor?",
}


@pytest.mark.parametrize("written", IN_A_RECIPE)
def test_a_recipe_is_answered_in_one_line(written: str, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / "wrong.yaml").write_text(yaml.safe_dump(_merged("tiny.yaml", written)))
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "wrong.yaml"])
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {IN_A_RECIPE[written]}"


def _merged(recipe: str, change: str) -> dict[str, Any]:
    def merge(one: Any, other: Any) -> Any:
        if not (isinstance(one, dict) and isinstance(other, dict)):
            return other
        return {**one, **{key: merge(one.get(key), value) for key, value in other.items()}}

    merged: dict[str, Any] = merge(yaml.safe_load(Path(recipe).read_text()), yaml.safe_load(change))
    return merged


LATER = {
    "--model.policy_options.lora.target_modules [nope]": "model.policy_options.lora.target_modules: ['nope'] - ",
    "--data.eval_sets.starts.source DatasetSource --data.eval_sets.starts.source.path no.jsonl": "data.eval_sets."
    "starts.source.path: 'no.jsonl' - no such file",
    "--model.regularizer IBRO": "model.regularizer.template: '{prompt}",
    "--checkpoint.best nope": "checkpoint.best: 'nope' - there is no such metric",
    "--data.weight_check.new_tokens 400": "data.weight_check.new_tokens: 400 - ",
}


@pytest.mark.parametrize("typed", LATER)
def test_what_is_found_out_during_setup_has_its_place_too(
    typed: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "tiny.yaml", *typed.split()])
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {LATER[typed]}")


@pytest.mark.parametrize("typed", [typed for typed in LATER if re.search("eval_sets|IBRO|lora", typed)])
def test_what_a_dry_run_finds_out_has_its_place_too(
    typed: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "tiny.yaml", "--dry_run", *typed.split()])
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {LATER[typed]}")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["fitt"], "command: 'fitt' - there is no such command: did you mean fit?"),
        (["fit"], "data: missing - write --config RECIPE, such as --config quickstart.yaml"),
        (["validate"], "data: missing - write --config RECIPE, such as --config quickstart.yaml"),
        (["fit", "--config", "modle.yaml"], "modle: the command line has no such setting: did you mean model?"),
        (["fit", "--config", "unclosed.yaml"], "config: 'unclosed.yaml' - this is not YAML: while parsing a flow "
         "sequence in unclosed.yaml, line 1, column 8 did not find expected ',' or ']' in unclosed.yaml, line 2, "
         "column 1"),
        (["fit", "--config", "tiny.yaml", "--seed_everything", "-5"], "seed_everything: -5 - write a whole number "
         "from 0 to 4294967295"),
        (["fit", "--config", "tiny.yaml", "--seed_everything", "4294967296"], "seed_everything: 4294967296 - write a "
         "whole number from 0 to 4294967295"),
        (["fit", "--model.help=DAPOModul"], "model: 'DAPOModul' - there is no LightningModule of that name: did you "
         "mean DAPOModule? Or write one of DAPOModule, PPOModule, SFTModule, or module.Class of your own, or null"),
        (["fit", "quickstart.yaml"], "config: 'quickstart.yaml' - a recipe has a flag before it: write --config "
         "quickstart.yaml"),
        (["fit", "quickstart"], "config: 'quickstart' - a recipe has a flag before it: write --config quickstart"),
        (["fit", "--config", "tiny.yaml", "--model.warmup_steps", "1", "2"], "argument: '2' - it is no setting's "
         "value: settings are written --NAME VALUE"),
        (["fit", "--config", "tiny.yaml", "--trainer.precision", "fp16"], "trainer.precision: 'fp16' - not supported: "
         "write 32-true or bf16-mixed"),
        (["tune"], "command: 'tune' - there is no such command: write one of fit, validate, test, predict, study, "
         "compare, report, export, verify, doctor"),
        (["fit", "--config", "tiny.yaml", "--ckpt_path"], "ckpt_path: missing - write text, or a path, or null"),
        (["fit", "--config", "tiny.yaml", "--trainer.logger", "CSVLogger"], "trainer.logger.save_dir: missing - write "
         "text, or a path"),
        (["fit", "--config", "tiny.yaml", "--trainer.strategy", "nope"], "trainer.strategy: 'nope' - not supported: "
         "write auto, ddp or fsdp2"),
    ],
)  # fmt: skip
def test_commands_and_flags_are_answered_in_one_line(
    arguments: list[str], line: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workspace / "modle.yaml").write_text("modle: {class_path: DAPOModule}\n")
    (workspace / "unclosed.yaml").write_text("model: [1\n")
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {line}"


WITHOUT_A_RECIPE = {
    "export": "ckpt_path: missing - write a checkpoint; or last or best, with --run",
    "export --ckpt_path last": "output: missing - write the folder to write, e.g. exported/model",
    "export --output x --ckpt_path": "ckpt_path: missing - write a checkpoint; or last or best, with --run",
    "export --help-me": "--help-me: export has no such flag: did you mean --help?",
    "export --ckpt_pth last": "--ckpt_pth: export has no such flag: did you mean --ckpt_path?",
    "export --ckpt_path a --output b c": "argument: 'c' - export takes nothing without a flag",
    "export --overwrite=3": "overwrite: '3' - it takes no value: leave that out",
    "verify": "gold: missing - write the right answer, as LaTeX or text",
    "verify 1 2 3": "argument: '3' - verify takes gold, response",
    "verify 1 2 --nope": "--nope: verify has no such flag: it has --help, --precision, --units, --order, --simplified, "
    "--equality",
    "verify 1 2 --precision x": "precision: 'x' - write a whole number",
    "verify 1 2 --units nope": "units: 'nope' - write one of agree, required, ignored",
    "verify 1 2 --units": "units: missing - write one of agree, required, ignored",
    "compare a": "second: missing - write the same of the second",
    "report a --metrc b": "--metrc: report has no such flag: did you mean --metric?",
}


@pytest.mark.parametrize("typed", WITHOUT_A_RECIPE)
def test_commands_without_a_recipe_are_answered_in_one_line(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(typed.split())
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {WITHOUT_A_RECIPE[typed]}\n"


def test_the_help_of_a_class_lists_none_that_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--model.help", "DAPOModule"])
    listed = re.sub(r"\s", "", capsys.readouterr().out)
    assert "ibro_lightning.regularizers.IBRO," in listed
    assert "torch.optim.lr_scheduler.StepLR," in listed
    refused = ("PolicyLossMethod", "CorrectPathEntropySuppression", "torch.optim.lr_scheduler.ReduceLROnPlateau")
    assert not [name for name in refused if name in listed]


def test_the_list_of_commands_names_all_and_needs_no_torch() -> None:
    script = "import sys; from ibro_lightning.cli.commands import answer; "
    script += "print(answer(sys.argv[1:])); print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", script, "--help"], capture_output=True, text=True, check=True).stdout
    named = ("fit", "validate", "test", "predict", "study", "compare", "report", "export")
    assert all(f"\n  {name} " in shown for name in named)
    assert shown.endswith("False\n")
