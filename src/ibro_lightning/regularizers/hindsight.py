"""Prompts that show the answer: what answer-conditioned entropies are computed under."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from string import Formatter
from typing import Any

from ibro_lightning.errors import ConfigError
from ibro_lightning.rendering import render
from ibro_lightning.sequences import Sequences
from ibro_lightning.types import Message, Prompt

SETTING = "regularizer.init_args.template"


class HindsightTemplate:
    """Puts the ground truth into a prompt.

    Args:
        template: with ``{prompt}`` and ``{answer}`` (or a part of it, ``{answer[target]}``, or of the problem's meta
            data, ``{meta[solution]}``). For chat prompts it is filled in with the text of the last user message, and
            the model's chat template is applied to the result.
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
        self, prompts: Sequence[Prompt], responses: Sequences, tokenizer: Any, max_length: int | None = None
    ) -> Sequences:
        """The same responses behind prompts that show the answer; row by row.

        Raises:
            ConfigError: prompt and response together are longer than ``max_length`` tokens; or the tokenizer has no
                tokens for what the template adds.
        """
        tokens = [self._token_ids(prompt, tokenizer) for prompt in prompts]
        on_cpu = responses.to("cpu")
        rows = zip(on_cpu.input_ids, on_cpu.is_response, strict=True)
        shown = Sequences.collate(tokens, [ids[mask].tolist() for ids, mask in rows])
        if max_length is not None and len(shown) and (longest := int(shown.lengths.max())) > max_length:
            raise ConfigError(
                SETTING,
                self.template,
                f"with the answer shown, prompt and response take up to {longest} tokens, and the model has positions "
                f"for {max_length}: show less, or lower data.sampling.max_tokens",
            )
        return shown.to(responses.input_ids.device)

    def content(self, prompt: Prompt) -> str | list[Message]:
        """The prompt as text or messages, with the answer shown."""
        if isinstance(prompt.content, str):
            return self._fill(prompt.content or prompt.text, prompt)  # a prompt made by hand may have its text alone
        messages = list(prompt.content)
        last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
        if last is None:
            raise ConfigError(SETTING, self.template, f"prompt {prompt.id} has no user message to put the answer into")
        messages[last] = {**messages[last], "content": self._fill(messages[last]["content"], prompt)}
        return messages

    def _fill(self, text: str, prompt: Prompt) -> str:
        try:
            return self.template.format(prompt=text, answer=prompt.answer, meta=prompt.meta)
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(
                SETTING,
                self.template,
                f"prompt {prompt.id} has no such value ({error!r}); its answer is {prompt.answer!r} "
                f"and its meta data {dict(prompt.meta)!r}",
            ) from error

    def _token_ids(self, prompt: Prompt, tokenizer: Any) -> tuple[int, ...]:
        key = (prompt.id, prompt.text)
        if key not in self._rendered:
            self._rendered[key] = self._render(prompt, tokenizer)
        return self._rendered[key]

    def _render(self, prompt: Prompt, tokenizer: Any) -> tuple[int, ...]:
        text, token_ids = render(self.content(prompt), tokenizer)
        if _is_lost(text, token_ids, tokenizer) and not _is_lost(prompt.text, prompt.token_ids, tokenizer):
            raise ConfigError(
                SETTING, self.template, f"the tokenizer cannot write {text!r}: use only words that the model knows"
            )
        return token_ids


def _is_lost(text: str, token_ids: Sequence[int], tokenizer: Any) -> bool:
    """Do the tokens say less than the text, letters and digits only? A tokenizer of few words drops the others."""

    def essence(some: str) -> str:
        return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", some).casefold()))

    return essence(text) not in essence(tokenizer.decode(list(token_ids)))
