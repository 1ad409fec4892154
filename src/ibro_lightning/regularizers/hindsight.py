"""Prompts that show the answer, for answer-conditioned entropies."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from string import Formatter
from typing import Any

import numpy as np
import torch

from ibro_lightning.batches.sequences import FlatSequences, joined
from ibro_lightning.errors import ConfigError
from ibro_lightning.rendering import ControlTokens, RenderingError, masked_content, render
from ibro_lightning.types import Message, Prompt

SETTING = "template"


class HindsightTemplate:
    """Puts the ground truth into a prompt.

    Args:
        template: with ``{prompt}`` and ``{answer}`` (or a part of it, ``{answer[target]}``, or of the problem's
            metadata, ``{meta[solution]}``). In chat prompts it replaces the text of the last user message, before the
            model's chat template is applied.
    """

    def __init__(self, template: str) -> None:
        try:
            names = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
        except ValueError as error:
            raise ConfigError(SETTING, template, f"cannot be read ({error}): write {{{{ for {{") from error
        roots = {name.split("[")[0].split(".")[0] for name in names}
        if "prompt" not in roots or not roots & {"answer", "meta"} or roots - {"prompt", "answer", "meta"}:
            raise ConfigError(SETTING, template, "must contain {prompt}, and {answer} or a part of {meta[...]}")
        self.template = template
        self._rendered: dict[tuple[str, str], tuple[int, ...]] = {}

    def sequences(
        self, prompts: Sequence[Prompt], responses: FlatSequences, tokenizer: Any, max_length: int | None = None
    ) -> FlatSequences:
        """The same responses after prompts that show the answer, row by row.

        Raises:
            ConfigError: prompt and response together are longer than ``max_length`` tokens; or the tokenizer cannot
                write what the template adds.
        """
        for prompt in prompts:
            if (prompt.id, prompt.text) not in self._rendered:
                self._rendered[prompt.id, prompt.text] = self._render(prompt, tokenizer)
        tokens = [self._rendered[prompt.id, prompt.text] for prompt in prompts]
        shown = replace(
            responses,
            prompts=joined(tokens, np.int32).to(responses.device),
            prompt_lengths=torch.tensor([len(ids) for ids in tokens], device=responses.device),
        )
        if max_length is not None and len(shown) and (longest := int(shown.lengths.max())) > max_length:
            raise ConfigError(
                SETTING,
                self.template,
                f"with the answer shown, prompt and response take up to {longest} tokens, and the model has positions "
                f"for {max_length}: show less, or lower data.sampling.max_tokens",
            )
        return shown

    def content(self, prompt: Prompt, control: ControlTokens | None = None) -> str | list[Message]:
        """The prompt as text or messages, with the answer shown.

        Args:
            control: mask these tokens in the data's text, but not in the template's.
        """
        content = prompt.content or prompt.text  # a handmade prompt may have only its text
        if not content and prompt.answer is None:  # as in Rollout.from_tokens
            remedy = f"prompt {prompt.id} has tokens and no text, nor an answer: build rollouts from whole Prompts"
            raise ConfigError(SETTING, self.template, remedy)
        if control is not None:
            content = masked_content(content, control, prompt.own_text)
        if isinstance(content, str):
            return self._fill(content, prompt, control)
        messages = list(content)
        last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
        if last is None:
            raise ConfigError(SETTING, self.template, f"prompt {prompt.id} has no user message to put the answer into")
        messages[last] = {**messages[last], "content": self._fill(messages[last]["content"], prompt, control)}
        return messages

    def control_text_shown(self, prompt: Prompt, tokenizer: Any) -> str:
        """The first control token in the shown part of the gold; "" without one."""
        control, shown = ControlTokens.of(tokenizer), list[str]()
        self._fill("", prompt, shown=shown)
        return next((found[0][0] for text in shown if (found := control.found(text))), "")

    def _fill(
        self, text: str, prompt: Prompt, control: ControlTokens | None = None, shown: list[str] | None = None
    ) -> str:
        fields = _Fields(control, shown if shown is not None else [])
        values = {"prompt": _Verbatim(text), "answer": prompt.answer, "meta": prompt.meta}
        try:
            return fields.vformat(self.template, (), values)
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(
                SETTING,
                self.template,
                f"prompt {prompt.id} has no such value ({error!r}); its answer is {prompt.answer!r} "
                f"and its meta data {dict(prompt.meta)!r}",
            ) from error

    def _render(self, prompt: Prompt, tokenizer: Any) -> tuple[int, ...]:
        control = ControlTokens.of(tokenizer) if prompt.control_text == "as_text" else None
        try:
            content = self.content(prompt, control)
            masked = control is not None and (control.normalized or content != self.content(prompt))
            text, token_ids = render(content, tokenizer, prompt.chat_template_kwargs, masked=masked)
        except RenderingError as error:
            raise ConfigError(SETTING, self.template, f"prompt {prompt.id}: {error}") from error
        if _is_lost(text, token_ids, tokenizer) and not _is_lost(prompt.text, prompt.token_ids, tokenizer):
            raise ConfigError(
                SETTING, self.template, f"the tokenizer cannot write {text!r}: use only words that the model knows"
            )
        return token_ids


class _Verbatim(str):
    """Text to be inserted without masking."""


class _Fields(Formatter):
    """``str.format`` with control tokens masked in inserted parts of the gold; these texts are also kept."""

    def __init__(self, control: ControlTokens | None, shown: list[str]) -> None:
        self.control, self.shown = control, shown

    def convert_field(self, value: Any, conversion: Any) -> Any:
        converted = super().convert_field(value, conversion)
        return _Verbatim(converted) if isinstance(value, _Verbatim) else converted

    def format_field(self, value: Any, format_spec: str) -> Any:
        text = super().format_field(value, format_spec)
        if isinstance(value, _Verbatim):
            return text
        self.shown.append(text)
        return text if self.control is None else self.control.mask(text)


def _is_lost(text: str, token_ids: Sequence[int], tokenizer: Any) -> bool:
    """Whether the tokens lack letters or digits of the text, since a tokenizer with few words drops the others."""

    def essence(content: str) -> str:
        return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", content).casefold()))

    return essence(text) not in essence(tokenizer.decode(list(token_ids)))
