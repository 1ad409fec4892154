"""From Python, a value of another kind than a constructor's parameter takes is refused at once, under its name: text or
True for a number, a fraction for a count, another word than the choices, a class or a number for an object."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from math import nan
from types import SimpleNamespace, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import lightning.pytorch as pl
import pytest

from ibro_lightning import callbacks, datamodules, engines, regularizers, rewards, sources, tasks
from ibro_lightning.datamodules import EvalSet, EvaluationDataModule, RolloutDataModule, SFTDataModule
from ibro_lightning.datamodules.evaluation import check_provider
from ibro_lightning.engines.weight_check import WeightCheck
from ibro_lightning.errors import ConfigError
from ibro_lightning.models import LoRAOptions, PolicyOptions, Qwen2FromScratch
from ibro_lightning.modules import DAPOModule, PPOModule, SFTModule
from ibro_lightning.regularizers import StepContext, coefficients
from ibro_lightning.rewards import RewardPool, Verdict
from ibro_lightning.rewards.code.limits import SandboxLimits
from ibro_lightning.runs.holding import RunLock
from ibro_lightning.sources.base import PromptSource
from ibro_lightning.sources.dataset import SourceReport
from ibro_lightning.sources.mixture import MixtureSource
from ibro_lightning.sources.prompts import PromptLimits
from ibro_lightning.strategies import FSDP2Strategy
from ibro_lightning.tasks import NumberPath, NumberPathDemonstrations, NumberPathReward, NumberPathSource
from ibro_lightning.types import SamplingParams
from ibro_lightning.update import PolicyLoss, ReferenceKL
from ibro_lightning.update.correction import SamplerCorrection

START = Qwen2FromScratch(NumberPath(size=12), hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1)
PROBLEMS, REWARD = NumberPathSource(), NumberPathReward()
NEEDED: Mapping[str, Any] = {
    "policy": START,
    "source": PROBLEMS,
    "reward": REWARD,
    "rewards": [REWARD],
    "dataset": "knights_knaves",
    "path": "x.jsonl",
    "buffer_tokens": 4,
    "iterations": 3,
    **dict.fromkeys(("coef", "start", "end"), 0.1),
}
"""Values of the parameters without a default."""
FREE = ("seed", "prompt_column", "answer_column", "meta_columns", "chat_template_kwargs", "engine_args", "config")
"""Seeds are hashed whatever they are; the others are data of the user's, checked where they are read."""


def classes() -> Iterator[type]:
    """What recipes and Python build: the exported classes, and the options that belong to them."""
    for package in (callbacks, datamodules, engines, regularizers, coefficients, rewards, sources, tasks):
        for name in getattr(package, "__all__", vars(package)):
            kind = getattr(package, name)
            if inspect.isclass(kind) and kind.__module__.startswith("ibro_lightning") and not inspect.isabstract(kind):
                yield kind
    yield from (
        DAPOModule,
        PPOModule,
        SFTModule,
        PolicyLoss,
        ReferenceKL,
        SamplerCorrection,
        PolicyOptions,
        LoRAOptions,
    )
    yield from (EvalSet, PromptLimits, SamplingParams, WeightCheck, SandboxLimits, NumberPath, RunLock, FSDP2Strategy)


def wrong_values(hint: Any) -> Iterator[object]:
    kinds = set(get_args(hint)) if get_origin(hint) in (Union, UnionType) else {hint}
    ours = [kind for kind in kinds if isinstance(kind, type) and kind.__module__.startswith("ibro_lightning")]
    if int in kinds and float not in kinds:
        yield from (1.5, nan, True, "3")
    elif float in kinds:
        yield from (nan, True, "3")
    elif any(get_origin(kind) is Literal for kind in kinds):
        yield from ("nope", None)
    elif ours and str not in kinds:
        yield from ("nope", {}, True, 0.01, [], *ours)


def with_needed(kind: type) -> dict[str, Any] | None:
    """What the class needs to be built; None if that is more than is known here."""
    parameters = inspect.signature(kind).parameters
    needed = {
        name: NEEDED.get(name) for name, p in parameters.items() if p.default is p.empty and p.kind != p.VAR_KEYWORD
    }
    if kind is SFTDataModule:
        needed["source"] = NumberPathDemonstrations()
    try:
        kind(**needed)
    except (AttributeError, ConfigError, TypeError, ValueError):
        return None
    return needed


RESULTS = (SourceReport, StepContext, RewardPool, Verdict)
"""What the package makes itself."""
CASES = {
    kind: needed
    for kind in dict.fromkeys(classes())
    if kind not in RESULTS and (needed := with_needed(kind)) is not None
}


def test_most_constructors_are_tried() -> None:
    named = {DAPOModule, PPOModule, RolloutDataModule, SFTDataModule, EvalSet, PolicyOptions, NumberPathSource}
    assert named <= CASES.keys()
    assert len(CASES) > 40


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
def test_another_type_is_refused_under_the_parameters_name(kind: type) -> None:
    accepted, misnamed = [], []
    for name, hint in get_type_hints(kind.__init__).items():
        if name not in inspect.signature(kind).parameters or name in FREE:
            continue
        for value in wrong_values(hint):
            try:
                kind(**{**CASES[kind], name: value})
                accepted.append((name, value))
            except ConfigError as refused:
                misnamed += [str(refused)] if refused.field != name else []
    assert not accepted
    assert not misnamed


NAMED = {
    "regularizer: 'PolicyLossMethod' - a base class": regularizers.PolicyLossMethod,
    # what is given: the beginning of the line
    "kl: 0.01 - write an instance of ReferenceKL, or None": lambda: DAPOModule(START, kl=0.01),
    "policy_options: {} - write an instance of PolicyOptions": lambda: DAPOModule(START, policy_options={}),
    "sampler_correction: True - write an instance of SamplerCorrection, or None": lambda: PolicyLoss(
        sampler_correction=True
    ),
    "dtype: 'fp16' - write one of float32, bfloat16, float16": lambda: PolicyOptions(dtype="fp16"),
    "eval_sets: [] - write an EvalSet for each name": lambda: EvaluationDataModule(eval_sets=[]),
    "eval_sets.a: <ibro_lightning.tasks.number_path.NumberPathSource": lambda: EvaluationDataModule(
        eval_sets={"a": PROBLEMS}
    ),
    "test_sets.a: None - write an instance of EvalSet": lambda: EvaluationDataModule(test_sets={"a": None}),
    "source: ['12>41:'] - write an instance of PromptSource": lambda: RolloutDataModule(["12>41:"], REWARD),
    "reward: <function": lambda: RolloutDataModule(PROBLEMS, lambda prompt, completions: []),
    "rewards: <function": lambda: rewards.RewardSum([lambda prompt, completions: []]),
    "parts.a: 3 - write an instance of MixturePart": lambda: MixtureSource({"a": 3}),
}


@pytest.mark.parametrize("line", NAMED)
def test_the_line_names_the_value_and_what_to_write(line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        NAMED[line]()
    assert str(refused.value).startswith(line)


def test_a_plain_function_is_told_what_a_reward_is() -> None:
    with pytest.raises(ConfigError, match="write an instance of Reward: subclass VerifiableReward"):
        EvalSet(PROBLEMS, lambda prompt, completions: [])


@pytest.mark.parametrize("kind", [NumberPathSource, tasks.CountdownSource, tasks.SumsSource])
def test_another_name_of_a_split_is_refused_not_read_as_train(kind: type[PromptSource]) -> None:
    with pytest.raises(ConfigError, match=r"^split: 'held_out' - write train or heldout or all$"):
        kind(split="held_out")
    for share in (1.5, -0.1, nan, "0.2"):
        with pytest.raises(ConfigError, match=r"^heldout_fraction: .* - write a share from 0 to 1"):
            kind(heldout_fraction=share)


def test_a_module_that_provides_no_policy_is_told_of_the_mixin(tmp_path: Any) -> None:
    class Mine(pl.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> None: ...

        def configure_optimizers(self) -> None: ...

    trainer = pl.Trainer(default_root_dir=tmp_path, max_epochs=1, logger=False, accelerator="cpu")
    with pytest.raises(
        ConfigError, match=r"^model: 'Mine' - it has no tokenizer, .*: derive it from .*PolicyProviderM"
    ):
        trainer.fit(Mine(), datamodule=RolloutDataModule(PROBLEMS, REWARD))
    others = ("tokenizer", "eos_token_ids", "min_group_size", "model_spec", "named_full_weights")
    unscored = SimpleNamespace(**dict.fromkeys(others))
    check_provider(unscored, scores=False)
    with pytest.raises(ConfigError, match=r"it has no response_logp: "):
        check_provider(unscored, scores=True)
