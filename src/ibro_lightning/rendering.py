"""From what a problem says to the tokens that a model sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def render(content: str | Sequence[Mapping[str, str]], tokenizer: Any) -> tuple[str, tuple[int, ...]]:
    """``(text, token ids)`` of raw text, or of ``{role, content}`` messages through the tokenizer's chat template."""
    if isinstance(content, str):
        text, add_special_tokens = content, True
    else:
        messages = [dict(message) for message in content]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        add_special_tokens = False  # the template has written them out
    return text, tuple(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])


def last_message(content: str | Sequence[Mapping[str, str]]) -> str:
    """What is asked: raw text itself, or the last of the messages."""
    return content if isinstance(content, str) else content[-1]["content"]
