"""Checks a few problems of every source as training and evaluation see them: prompts, rewards, lengths, templates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from ibro_lightning.batches.sequences import FlatSequences
from ibro_lightning.datamodules import RolloutDataModule, SFTDataModule
from ibro_lightning.datamodules.evaluation import EvaluationDataModule
from ibro_lightning.regularizers import EntropyRegularizer
from ibro_lightning.regularizers.hindsight import HindsightTemplate
from ibro_lightning.rewards import Reward, judge_all
from ibro_lightning.types import Completion, Prompt, SamplingParams

ROWS = 64
"""Problems read from each source."""
JUDGED = 8
"""Prompts whose reference answer is judged."""
SHOWN = 600
"""Characters of a prompt that are printed."""


@dataclass
class Checked:
    """Results of the checks."""

    lines: list[str] = field(default_factory=list)
    """Text to print."""
    prompts: list[Prompt] = field(default_factory=list)
    """Training prompts that were read."""
    prompt: int = 0
    """Tokens of the longest of them, with a mean of :attr:`mean_prompt`."""
    response: int = 0
    """Tokens of the longest possible response."""
    mean_prompt: float = 0.0
    complete: bool = False
    """Whether all training problems were read."""


def check_data(module: Any, data: EvaluationDataModule) -> Checked:
    """Do what ``data.setup("fit")`` does, on a few problems and without an engine.

    Raises:
        ConfigError, RewardError: as training would.
    """
    checked = Checked()
    # The part of a Trainer that preparing rewards needs.
    data.trainer = SimpleNamespace(lightning_module=module, num_devices=1, strategy=None)  # type: ignore[assignment]
    try:
        data.prepare("fit", ROWS)
        positions = getattr(module.policy_source.config().get_text_config(), "max_position_embeddings", None)
        limits = [limit for limit in (positions, data.engine.max_model_len) if limit is not None]
        data.check_lengths("fit", min(limits, default=None))
        if isinstance(data, RolloutDataModule):
            checked.prompts = data.prompts
            checked.prompt = max(len(prompt.token_ids) for prompt in checked.prompts)
            checked.mean_prompt = sum(len(prompt.token_ids) for prompt in checked.prompts) / len(checked.prompts)
            checked.complete = len(checked.prompts) < ROWS
            checked.response = data.sampling.max_tokens
            checked.lines += _source_report("data.source", data.prompts, data.reward, data.sampling, data)
            _check_templates(checked, module, data.sampling, positions)
        elif isinstance(data, SFTDataModule):
            _check_demonstrations(checked, module, data)
        for name, eval_set in data.eval_sets.items():
            prompts = data.eval_prompts[name]
            checked.lines += _source_report(f"data.eval_sets.{name}", prompts, eval_set.reward, eval_set.sampling, data)
    finally:
        data.collector.stop_judging()
        data.trainer = None
    return checked


def _source_report(
    setting: str, prompts: Sequence[Prompt], reward: Reward, sampling: SamplingParams, data: EvaluationDataModule
) -> list[str]:
    """Report on one source with its reward."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    return [
        f"{setting}: first problems read, {len(prompts)} prompts of up to {longest} tokens",
        f"  first prompt, {len(prompts[0].token_ids)} tokens: {_quoted(prompts[0].text)}",
        *(f"  {line}" for line in _reward_report(prompts, reward, sampling, data)),
    ]


def _reward_report(
    prompts: Sequence[Prompt], reward: Reward, sampling: SamplingParams, data: EvaluationDataModule
) -> list[str]:
    """Rewards of an empty response, and of the reference answer in the spellings that rewards recognize."""
    judge, tokenizer, prompts = data.collector.judge, data.provider.tokenizer, prompts[:JUDGED]
    empty = Completion((), (), "length", "", sampling.max_tokens, seed=0)
    results = judge_all(reward, [(prompt, [empty]) for prompt in prompts], judge)
    lines = [f"an empty response earns {results[0][0].reward:g}"]
    golden = [(prompt, _reference_responses(prompt)) for prompt in prompts]
    judged = [(prompt, [_completion(text, sampling, tokenizer) for text in golds]) for prompt, golds in golden if golds]
    if not judged:
        return [*lines, "the right answers are not text, so they are not judged here"]
    best = [max(row, key=lambda result: result.parts["accuracy"]) for row in judge_all(reward, judged, judge)]
    right = sum(result.parts["accuracy"] == 1 for result in best)
    lines.append(f"the right answer is accepted for {right} of {len(judged)} problems")
    if right < len(judged):
        prompt = next(p for (p, _), result in zip(judged, best, strict=True) if result.parts["accuracy"] < 1)
        lines.append(
            f"  not for {prompt.id!r}, whose answer is {_quoted(str(prompt.answer), 80)}, in any usual spelling: "
            "look whether the reward suits the data, unless it asks for more than an answer"
        )
    return lines


def _reference_responses(prompt: Prompt) -> list[str]:
    """Responses that consist of the reference answer alone."""
    if isinstance(solution := prompt.meta.get("solution"), str):
        return [solution]
    if not isinstance(prompt.answer, str | int | float) or isinstance(prompt.answer, bool):
        return []
    gold = str(prompt.answer)
    return [gold, f"Answer: {gold}", f"The answer is \\boxed{{{gold}}}", f"#### {gold}", f"<answer>{gold}</answer>"]


def _completion(text: str, sampling: SamplingParams, tokenizer: Any) -> Completion:
    tokens = (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    return Completion(tokens, (0.0,) * len(tokens), "stop", text, max(sampling.max_tokens, len(tokens)), seed=0)


def _check_templates(checked: Checked, module: Any, sampling: SamplingParams, positions: int | None) -> None:
    """Report on the prompts that show the answer, if the regulariser builds any."""
    methods: Iterable[EntropyRegularizer] = getattr(getattr(module, "regularizer", None), "combined", ())
    for method in methods:  # a local variable, by which an error's path is found
        for template in vars(method).values():
            if not isinstance(template, HindsightTemplate):
                continue
            response = [module.tokenizer.eos_token_id] * sampling.max_tokens
            prompt_ids = [list(prompt.token_ids) for prompt in checked.prompts]
            responses = FlatSequences.collate(prompt_ids, [response] * len(prompt_ids))
            shown = template.sequences(checked.prompts, responses, module.tokenizer, positions)
            first = shown.prompts[: int(shown.prompt_lengths[0])].tolist()
            checked.lines += [
                f"model.regularizer: prompts with the answer take up to {int(shown.prompt_lengths.max())} tokens",
                f"  first one: {_quoted(module.tokenizer.decode(first))}",
            ]


def _check_demonstrations(checked: Checked, module: Any, data: SFTDataModule) -> None:
    pairs = [data.source.demonstration(seed) for seed in range(ROWS)]
    tokenizer = module.tokenizer
    prompt_ids, response_ids = data.encode(pairs, tokenizer)
    prompts = [len(ids) for ids in prompt_ids]
    checked.prompt, checked.response = max(prompts), max(len(ids) for ids in response_ids)
    checked.mean_prompt = sum(prompts) / len(prompts)
    checked.lines += [
        f"data.source: {ROWS} demonstrations, prompts of up to {checked.prompt} tokens, responses of up to "
        f"{checked.response}",
        f"  first one: {_quoted(tokenizer.decode(prompt_ids[0]))} -> {_quoted(pairs[0][1])}",
    ]


def _quoted(text: str, limit: int = SHOWN) -> str:
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")
