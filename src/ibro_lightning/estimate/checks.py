"""A few problems of every source, as training and evaluation will see them: prompts, rewards, lengths, templates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import Any

import torch

from ibro_lightning.datamodules import MixtureSource, PromptLimits, PromptSource, RolloutDataModule
from ibro_lightning.datamodules.collector import check_reward
from ibro_lightning.datamodules.evaluation import EvaluationDataModule
from ibro_lightning.datamodules.prompts import check_lengths, check_vocabulary, encode_prompts
from ibro_lightning.datamodules.sft import SFTDataModule
from ibro_lightning.errors import ConfigError
from ibro_lightning.regularizers.hindsight import HindsightTemplate
from ibro_lightning.rewards import Judge, Reward
from ibro_lightning.sequences import Sequences
from ibro_lightning.types import Completion, ModelSpec, Problem, Prompt, SamplingParams

ROWS = 64
"""Problems that are read of each source."""
JUDGED = 8
"""Prompts whose right answer is judged."""
SHOWN = 600
"""Characters of a prompt that are printed."""


@dataclass
class Checked:
    """What the checks found.

    Args:
        lines: for people.
        prompts: training prompts that were read.
        prompt, response: tokens of the longest prompt that was read, and of the longest response there can be.
        mean_prompt: tokens of a prompt on average.
        complete: were all training problems read?
    """

    lines: list[str] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    prompt: int = 0
    response: int = 0
    mean_prompt: float = 0.0
    complete: bool = False


class FirstRows(PromptSource):
    """The first problems of a source, and of each part of a mixture."""

    def __init__(self, source: PromptSource, rows: int = ROWS) -> None:
        self.source, self.rows = source, rows

    def problems(self) -> Iterator[Problem]:
        sources: Iterable[PromptSource] = [self.source]
        if isinstance(self.source, MixtureSource):
            sources = [MixtureSource({name: part}) for name, part in self.source.parts.items()]
        for source in sources:
            yield from islice(source.problems(), self.rows)


def check_data(module: Any, data: EvaluationDataModule) -> Checked:
    """Try what ``data.setup("fit")`` does, without an engine and on a few problems.

    Raises:
        ConfigError, RewardError: as training would.
    """
    found = Checked()
    # As much of a Trainer as rewards need to be made ready.
    data.trainer = SimpleNamespace(lightning_module=module, num_devices=1, strategy=None)  # type: ignore[assignment]
    try:
        judge = data.start_judging("fit")
        check = partial(_check_set, found, module, data, judge, _positions(module, data))
        if isinstance(data, RolloutDataModule):
            _check_group_size(module, data)
            found.prompts = check(_Set("data.source", data.source, data.reward, data.sampling, "data.sampling"))
            found.prompt = max(len(prompt.token_ids) for prompt in found.prompts)
            found.mean_prompt = sum(len(prompt.token_ids) for prompt in found.prompts) / len(found.prompts)
            found.complete = len(found.prompts) < ROWS
            found.response = data.sampling.max_tokens
            _check_templates(found, module, data.sampling)
        elif isinstance(data, SFTDataModule):
            _check_demonstrations(found, module, data)
        for name, eval_set in data.eval_sets.items():
            setting, sampling = f"data.eval_sets.{name}", eval_set.sampling
            source = FirstRows(eval_set.source, min(ROWS, eval_set.limit or ROWS))
            check(_Set(setting, source, eval_set.reward, sampling, f"{setting}.sampling"))
    finally:
        data.stop_judging()
        data.trainer = None
    return found


def _check_group_size(module: Any, data: RolloutDataModule) -> None:
    if data.group_size < module.min_group_size:
        raise ConfigError(
            "data.group_size",
            data.group_size,
            f"{type(module).__name__} compares responses to the same prompt: write {module.min_group_size} or more",
        )


def _positions(module: Any, data: EvaluationDataModule) -> int | None:
    """Longest prompt + response that engine and model take."""
    positions = getattr(module.policy_source.config().get_text_config(), "max_position_embeddings", None)
    known = [limit for limit in (positions, data.engine.max_model_len) if limit is not None]
    return min(known, default=None)


@dataclass(frozen=True)
class _Set:
    """Problems with what goes with them, and under which settings all that stands."""

    setting: str
    source: PromptSource
    reward: Reward
    sampling: SamplingParams
    sampling_setting: str


def _check_set(
    found: Checked, module: Any, data: EvaluationDataModule, judge: Judge, limit: int | None, some: _Set
) -> list[Prompt]:
    """One source with its reward; the prompts that are short enough."""
    read = encode_prompts(FirstRows(some.source), module.tokenizer, PromptLimits(), setting=some.setting)
    most = data.prompt_limits.max_tokens
    longest = max(len(prompt.token_ids) for prompt in read)
    prompts = [prompt for prompt in read if most is None or len(prompt.token_ids) <= most]
    if len(prompts) < len(read) and (data.prompt_limits.overlong == "error" or not prompts):
        raise ConfigError(
            "data.prompt_limits.max_tokens",
            most,
            f"{len(read) - len(prompts)} of the first {len(read)} prompts of {some.setting} are longer (to {longest}): "
            "raise it, or take shorter problems",
        )
    spec = ModelSpec(module.policy_source.config(), module.eos_token_ids, torch.device("cpu"))
    check_vocabulary(prompts, spec, setting=some.setting)
    check_reward(some.reward, prompts, some.sampling, judge)
    check_lengths(prompts, some.sampling, limit, setting=some.sampling_setting)
    dropped = f", {len(read) - len(prompts)} longer than {most} are dropped" if len(prompts) < len(read) else ""
    found.lines += [
        f"{some.setting}: first {len(read)} problems read, prompts of up to {longest} tokens{dropped}",
        f"  first prompt, {len(prompts[0].token_ids)} tokens: {_shown(prompts[0].text)}",
        *(f"  {line}" for line in _judged(prompts, some, judge, module.tokenizer)),
    ]
    return prompts


def _judged(prompts: Sequence[Prompt], of: _Set, judge: Judge, tokenizer: Any) -> list[str]:
    """What the reward says of an empty response, and of the right answer in the spellings that rewards look for."""
    reward, sampling = of.reward, of.sampling
    some = list(prompts[:JUDGED])
    empty = Completion((), (), "length", "", sampling.max_tokens, seed=0)
    results = reward.judge([(prompt, [empty]) for prompt in some], judge)
    lines = [f"an empty response earns {results[0][0].reward:g}"]
    spelled = [(prompt, _golds(prompt)) for prompt in some]
    tried = [(prompt, [_answered(text, sampling, tokenizer) for text in texts]) for prompt, texts in spelled if texts]
    if not tried:
        return [*lines, "the right answers are no text: what they earn was not tried"]
    best = [max(row, key=lambda result: result.parts["accuracy"]) for row in reward.judge(tried, judge)]
    right = sum(result.parts["accuracy"] == 1 for result in best)
    lines.append(f"the right answer is accepted for {right} of {len(tried)} problems")
    if right < len(tried):
        prompt = next(p for (p, _), result in zip(tried, best, strict=True) if result.parts["accuracy"] < 1)
        lines.append(
            f"  not for {prompt.id!r}, whose answer is {_shown(str(prompt.answer), 80)}, in any usual spelling: "
            "look whether the reward suits the data, unless it asks for more than an answer"
        )
    return lines


def _golds(prompt: Prompt) -> list[str]:
    """Responses that say nothing but the right answer."""
    if isinstance(solution := prompt.meta.get("solution"), str):
        return [solution]
    if not isinstance(prompt.answer, str | int | float) or isinstance(prompt.answer, bool):
        return []
    gold = str(prompt.answer)
    return [gold, f"Answer: {gold}", f"The answer is \\boxed{{{gold}}}", f"#### {gold}", f"<answer>{gold}</answer>"]


def _answered(text: str, sampling: SamplingParams, tokenizer: Any) -> Completion:
    tokens = (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    return Completion(tokens, (0.0,) * len(tokens), "stop", text, max(sampling.max_tokens, len(tokens)), seed=0)


def _check_templates(found: Checked, module: Any, sampling: SamplingParams) -> None:
    """Prompts that show the answer, if the regulariser makes any."""
    regularizer = getattr(module, "regularizer", None)
    positions = getattr(module.policy_source.config().get_text_config(), "max_position_embeddings", None)
    for template in vars(regularizer).values() if regularizer is not None else ():
        if not isinstance(template, HindsightTemplate):
            continue
        response = [module.tokenizer.eos_token_id] * sampling.max_tokens
        asked = [list(prompt.token_ids) for prompt in found.prompts]
        responses = Sequences.collate(asked, [response] * len(asked))
        shown = template.sequences(found.prompts, responses, module.tokenizer, positions)
        first = shown.input_ids[0, : int(shown.prompt_lengths[0])].tolist()
        found.lines += [
            f"model.regularizer: prompts with the answer take up to {int(shown.prompt_lengths.max())} tokens",
            f"  first one: {_shown(module.tokenizer.decode(first))}",
        ]


def _check_demonstrations(found: Checked, module: Any, data: SFTDataModule) -> None:
    pairs = [data.source.demonstration(seed) for seed in range(ROWS)]
    tokenizer = module.tokenizer
    prompts = [len(ids) for ids in tokenizer([prompt for prompt, _ in pairs])["input_ids"]]
    answers = tokenizer([answer for _, answer in pairs], add_special_tokens=False)["input_ids"]
    found.prompt, found.response = max(prompts), max(len(ids) for ids in answers) + 1
    found.mean_prompt = sum(prompts) / len(prompts)
    found.lines += [
        f"data.source: {ROWS} demonstrations, prompts of up to {found.prompt} tokens, responses of up to "
        f"{found.response}",
        f"  first one: {_shown(pairs[0][0])} -> {_shown(pairs[0][1])}",
    ]


def _shown(text: str, limit: int = SHOWN) -> str:
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")
