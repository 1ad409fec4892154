"""Validation of ``chat_template_kwargs``, such as ``enable_thinking: false``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2 import meta

from ibro_lightning.errors import ConfigError
from ibro_lightning.rendering import Content, RenderingError, render, text_messages

RESERVED = frozenset(
    {"conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"}
    | {"padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"}
    | {"tokenizer_kwargs"}
)
"""Parameters of ``apply_chat_template`` itself, which are not variables of the template."""


def check_reserved(setting: str, chat_template_kwargs: Mapping[str, Any] | None) -> None:
    """Raise :class:`ConfigError` for parameters of ``apply_chat_template`` itself."""
    if not isinstance(chat_template_kwargs, Mapping | None):
        raise ConfigError(setting, chat_template_kwargs, "write names with values, such as {enable_thinking: false}")
    for name, value in (chat_template_kwargs or {}).items():
        if name in RESERVED:
            raise ConfigError(f"{setting}.{name}", value, "it is set by ibro_lightning: take it out")


def check_template_kwargs(setting: str, chat_template_kwargs: Mapping[str, Any] | None, tokenizer: Any) -> None:
    """Raise :class:`ConfigError` for variables that the tokenizer's chat template never reads."""
    if not chat_template_kwargs:
        return
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        given = ", ".join(chat_template_kwargs)
        raise ConfigError(setting, given, "the policy's tokenizer has no chat template that could read it: write null")
    if isinstance(template, Mapping):  # named templates
        template = "\n".join(map(str, template.values()))
    variables = template_variables(str(template))
    for name, value in chat_template_kwargs.items():
        if variables is None or name in variables:
            continue
        near = difflib.get_close_matches(name, variables, n=1)
        others = sorted(variable for variable in variables if not variable.endswith("_token"))
        hint = f"did you mean {near[0]}?" if near else f"it reads {', '.join(others) or 'the messages alone'}"
        raise ConfigError(f"{setting}.{name}", value, f"the policy's chat template never reads it: {hint}")


def about_system(content: Content, tokenizer: Any, chat_template_kwargs: Mapping[str, Any]) -> str:
    """The advice for messages that the chat template rejects because of their system message; "" for other causes."""
    try:
        messages = [] if isinstance(content, str) else text_messages(content)
        others = [message for message in messages if message["role"] != "system"]
        if len(others) == len(messages):
            return ""
        render(others, tokenizer, chat_template_kwargs)
    except RenderingError:
        return ""
    return ": it takes no system message. Write source.system: null, and its words in source.template, before {problem}"


def template_variables(template: str) -> set[str] | None:
    """The variables that a chat template reads, besides the messages; None if it cannot be parsed."""
    # jinja2 does not know transformers' {% generation %} tag.
    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except jinja2.TemplateError:
        return None
    return set(meta.find_undeclared_variables(tree)) - {"raise_exception", "strftime_now", *RESERVED}
