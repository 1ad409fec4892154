"""Handling of data that spells control tokens of the tokenizer: counted, refused or encoded as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ibro_lightning.errors import ConfigError
from ibro_lightning.rendering import (
    Content,
    ControlTokens,
    control_text,
    masked_content,
    render,
)
from ibro_lightning.types import ControlText, Prompt

SETTING = "data.control_text"
MAX_NAMED = 5
"""Maximum number of rows named in an error."""


def rendered(
    content: Content,
    tokenizer: Any,
    chat_template_kwargs: Any = None,
    *,
    rule: ControlText = "warn",
    own: Sequence[str] = (),
) -> tuple[str, tuple[int, ...]]:
    """``(text, token ids)`` of :func:`~ibro_lightning.rendering.render`; ``as_text`` encodes control text as text."""
    if rule == "as_text":
        control = ControlTokens.of(tokenizer)
        if control.normalized or control_text(content, control, own):
            return render(masked_content(content, control, own), tokenizer, chat_template_kwargs, masked=True)
    return render(content, tokenizer, chat_template_kwargs)


def report_control_text(setting: str, rule: ControlText, found: Sequence[tuple[str, str]], what: str = "rows") -> None:
    """Report in one line how many rows spell control tokens; raises :class:`ConfigError` if the rule is ``refuse``.

    Args:
        setting: where the rows come from.
        found: each row with the first control token that its data spells, or "" if none.
    """
    hits = [(row, token) for row, token in found if token]
    if not hits:
        return
    row, token = hits[0]
    counted = f"{len(hits)} of {len(found)} {what} spell control tokens of the policy's tokenizer"
    if rule == "refuse":
        rows = ", ".join(row for row, _ in hits[:MAX_NAMED]) + (", …" if len(hits) > MAX_NAMED else "")
        remedy = f"{counted}, first {token!r} ({rows}): fix them, or write as_text to have them read as text"
        raise ConfigError("control_text", "refuse", f"{setting}: {remedy}")
    message = f"{setting}: {counted}, first {token!r} in {row!r}"
    if rule == "as_text":
        rank_zero_info(f"{message}: encoded as text ({SETTING}: as_text)")
    else:
        rank_zero_warn(f"{message}, and become such ({SETTING}: warn): write refuse, or as_text to keep them text")


def report_shown(provider: Any, prompts: Sequence[Prompt], rule: ControlText) -> None:
    """Report, or refuse, the golds that the module's regulariser shows to the model and that spell control tokens."""
    regularizer = getattr(provider, "regularizer", None)
    methods = getattr(regularizer, "combined", (regularizer,))
    for name, template in (found for method in methods for found in getattr(method, "__dict__", {}).items()):
        find: Callable[[Prompt, Any], str] | None = getattr(template, "control_text_shown", None)
        if find is not None:
            found = [(prompt.id, find(prompt, provider.tokenizer)) for prompt in prompts]
            report_control_text(f"model.regularizer ({name})", rule, found, "golds that it shows")
