"""Encoding of problems as prompts (chat template, tokenizer, length limit), and the order of training prompts."""

from __future__ import annotations

import hashlib
import math
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ibro_lightning.errors import ConfigError, check_count
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.rendering import (
    ControlTokens,
    RenderingError,
    appended_tokens,
    last_question,
    prefill,
    text_messages,
)
from ibro_lightning.rendering import control_text as first_control_token
from ibro_lightning.seeding import derive_seed, permutation
from ibro_lightning.sources.base import PromptSource, check_problem
from ibro_lightning.sources.chat_template import about_system
from ibro_lightning.sources.control_text import rendered, report_control_text
from ibro_lightning.types import ControlText, Problem, Prompt, check_choice

Overlong = Literal["drop", "error"]


@dataclass(frozen=True)
class PromptLimits:
    """How overlong prompts are handled.

    Args:
        max_tokens: maximum prompt length; None means no limit.
        overlong: drop overlong prompts and report their number, or raise an error.
    """

    max_tokens: int | None = None
    overlong: Overlong = "drop"

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            check_count("max_tokens", self.max_tokens)
        check_choice("overlong", self.overlong, Overlong)


def encode_prompts(
    source: PromptSource,
    tokenizer: Any,
    limits: PromptLimits,
    *,
    setting: str,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    control_text: ControlText = "warn",
    first: int | None = None,
    rows: int | None = None,
) -> list[Prompt]:
    """A source's problems as prompts. Raises :class:`ConfigError` if there are none, or if a setting refuses one.

    Args:
        setting: the source's place in the configuration, for messages.
        first: maximum number of prompts, counted after overlong ones are dropped; None keeps all.
        rows: maximum number of problems to read; None reads all.
    """
    kwargs = dict(chat_template_kwargs or {})
    problems = source.problems() if rows is None else source.first_problems(rows)
    prompts = [_encode(problem, tokenizer, setting, kwargs, control_text) for problem in problems]
    name = type(source).__name__
    if not prompts:
        raise ConfigError(setting, name, "it has no problems: check its file, split and difficulty settings")
    if len({prompt.id for prompt in prompts}) < len(prompts):
        raise ConfigError(setting, name, "several of its problems have the same id: seeds derive from ids")
    _report_ends(prompts, tokenizer)
    if kwargs and all(isinstance(prompt.content, str) for prompt in prompts):
        rank_zero_warn(f"data.{setting}: all prompts are raw text, which chat_template_kwargs do not reach")
    kept = _short_enough(prompts, limits, setting, name)[:first]
    control = ControlTokens.of(tokenizer)
    spelled = [(prompt.id, first_control_token(prompt.content, control, prompt.own_text)) for prompt in kept]
    report_control_text(f"data.{setting}", control_text, spelled)
    return kept


def _short_enough(prompts: list[Prompt], limits: PromptLimits, setting: str, name: str) -> list[Prompt]:
    """The prompts within ``limits``; reports how many are dropped."""
    if limits.max_tokens is None:
        return prompts
    kept = [prompt for prompt in prompts if len(prompt.token_ids) <= limits.max_tokens]
    dropped = len(prompts) - len(kept)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    if dropped and (limits.overlong == "error" or not kept):
        remedy = f"write {longest}" + ("" if limits.overlong == "drop" else ", or overlong: drop to leave them out")
        reason = f"{dropped} of {len(prompts)} prompts of {name} are longer (up to {longest} tokens)"
        raise ConfigError("prompt_limits.max_tokens", limits.max_tokens, f"{reason}: {remedy}")
    if dropped:
        counts = f"{dropped} of {len(prompts)} prompts dropped, over {limits.max_tokens} tokens (up to {longest})"
        rank_zero_info(f"data.{setting}: {counts}")
    return kept


def report_appended(text: str, tokenizer: Any) -> None:
    """Warn about special tokens that the tokenizer appends to raw text."""
    if appended := appended_tokens(text, tokenizer) if text else ():
        what = tokenizer.decode(list(appended))
        rank_zero_warn(f"the policy's tokenizer appends {what!r} to raw text: cut from prompts, which responses follow")


def _report_ends(prompts: Sequence[Prompt], tokenizer: Any) -> None:
    """Warn about tokens removed from the ends of prompts, and about prompts that still end with EOS."""
    raw = next((prompt.content for prompt in prompts if isinstance(prompt.content, str)), "")
    report_appended(raw, tokenizer)
    ended = [prompt for prompt in prompts if prompt.token_ids[-1] == getattr(tokenizer, "eos_token_id", None)]
    if ended:
        end = tokenizer.decode([ended[0].token_ids[-1]])
        rank_zero_warn(
            f"{len(ended)} of {len(prompts)} prompts end with {end!r} (first {ended[0].id!r}), after which the policy "
            "has nothing to say: their own text, or a chat template without a generation prompt, writes it"
        )


def _encode(
    problem: Problem, tokenizer: Any, setting: str, chat_template_kwargs: Mapping[str, Any], rule: ControlText
) -> Prompt:
    check_problem(problem, setting)
    if not isinstance(problem.prompt, str) and not tokenizer.chat_template:
        remedy = "the policy's tokenizer has no chat template: write chat: false for raw prompts"
        raise ConfigError(setting, "chat: true", remedy)
    try:
        content = problem.prompt if isinstance(problem.prompt, str) else text_messages(problem.prompt)
        text, token_ids = rendered(content, tokenizer, chat_template_kwargs, rule=rule, own=problem.own_text)
    except RenderingError as error:
        advice = about_system(problem.prompt, tokenizer, chat_template_kwargs)
        raise ConfigError(setting, problem.id, f"{error}{advice}") from error
    if not token_ids:
        raise ConfigError(setting, problem.id, "its prompt has no tokens: a response needs something to follow")
    return Prompt(
        problem.id,
        text,
        token_ids,
        problem.answer,
        problem.meta,
        content,
        question=problem.question or last_question(content),
        part=problem.part,
        prefill=prefill(content),
        chat_template_kwargs=chat_template_kwargs,
        own_text=problem.own_text,
        control_text=rule,
    )


def check_vocabulary(prompts: list[Prompt], spec: ModelSpec, *, setting: str) -> None:
    """Raise :class:`ConfigError` for a token id outside the model's vocabulary: the tokenizer is another model's."""
    vocabulary = int(spec.config.get_text_config().vocab_size)
    for prompt in prompts:
        if (largest := max(prompt.token_ids)) >= vocabulary:
            reason = f"data.{setting} has a prompt with this token ({prompt.id}), but the model has {vocabulary}"
            remedy = "the tokenizer in its folder is another model's"
            raise ConfigError("model.policy", f"token id {largest}", f"{reason}: {remedy}")


class PromptCursor:
    """Draws prompts in an order that is a function of the seed and the position, its only state.

    Each pass over the prompts is a new permutation. With ``weights`` of a mixture's parts, the part of a draw is a
    function of seed and position, and each pass over a part's prompts is a new permutation.
    """

    def __init__(self, prompts: list[Prompt], seed: int, weights: Mapping[str, float] | None = None) -> None:
        self.prompts, self.seed = prompts, seed
        self.position = 0
        self._orders: dict[str, tuple[int, list[int]]] = {}
        self._parts = {"": range(len(prompts))} if weights is None else _parts_of(prompts, weights)
        self._names = sorted(self._parts)
        self._bounds = list(accumulate(weights[name] for name in self._names)) if weights is not None else [1.0]
        # Number of draws from each part before position ``_replayed``.
        self._drawn, self._replayed = [0] * len(self._names), 0

    def draw(self, count: int) -> list[tuple[int, Prompt]]:
        """The next ``count`` draws as ``(position, prompt)``; the position identifies a draw within the run."""
        draws = [(p, self._at(p)) for p in range(self.position, self.position + count)]
        self.position += count
        return draws

    @cached_property
    def digest(self) -> str:
        """Digest of the prompts' ids and tokens, in order."""
        digest = hashlib.blake2b(digest_size=16)
        for prompt in self.prompts:
            digest.update(f"{prompt.id} {len(prompt.token_ids)}\n".encode())
            digest.update(array("q", prompt.token_ids).tobytes())
        return digest.hexdigest()

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The place of each prompt in :attr:`prompts`, by id."""
        return {prompt.id: number for number, prompt in enumerate(self.prompts)}

    def refuse_others(self, then: str | None) -> None:
        """Raise :class:`ConfigError` unless ``then``, the digest in a checkpoint, is None or that of these prompts."""
        if then not in (None, self.digest):
            remedy = "not those of the checkpoint's run: write the source of that run, begin a new run, or "
            remedy += "continue with --resume.allow_changes true"
            raise ConfigError("source", f"{len(self.prompts)} prompts", remedy)

    def _at(self, position: int) -> Prompt:
        if len(self._names) == 1:
            return self._within(self._names[0], position)
        if position < self._replayed:
            self._drawn, self._replayed = [0] * len(self._names), 0
        for earlier in range(self._replayed, position):
            self._drawn[self._part_of_draw(earlier)] += 1
        self._replayed = position
        part = self._part_of_draw(position)
        return self._within(self._names[part], self._drawn[part])

    def _part_of_draw(self, position: int) -> int:
        """Index, among the sorted names, of the part that a draw is from."""
        uniform = derive_seed(self.seed, "prompt part", position) / 2**63
        return min(bisect_right(self._bounds, uniform * self._bounds[-1]), len(self._bounds) - 1)

    def _within(self, part: str, position: int) -> Prompt:
        """The prompt at this position in the sequence of a part's draws."""
        indices = self._parts[part]
        epoch, offset = divmod(position, len(indices))
        if part not in self._orders or self._orders[part][0] != epoch:
            counters = ("prompt order", part, epoch) if part else ("prompt order", epoch)
            self._orders[part] = epoch, permutation(len(indices), derive_seed(self.seed, *counters))
        return self.prompts[indices[self._orders[part][1][offset]]]


def _parts_of(prompts: list[Prompt], weights: Mapping[str, float]) -> dict[str, Sequence[int]]:
    """Indices of each part's prompts."""
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"source.weights[{name!r}]", weight, "write a finite number above 0")
    parts: dict[str, list[int]] = {name: [] for name in weights}
    for index, prompt in enumerate(prompts):
        if prompt.part not in parts:
            raise ConfigError("source", prompt.part, f"the prompt {prompt.id!r} is of a part without a weight")
        parts[prompt.part].append(index)
    for name, indices in parts.items():
        if not indices:
            remedy = "raise data.prompt_limits.max_tokens if it dropped them, or take the part out"
            raise ConfigError(f"source.parts.{name}", "no prompts", remedy)
    return dict(parts)
