"""Handling of data that spells control tokens of the tokenizer: counted, refused or encoded as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ibro_lightning.errors import ConfigError
from ibro_lightning.rendering import (
    Content,
    ControlTextError,
    ControlTokens,
    RenderingError,
    control_text,
    masked_content,
    render,
)
from ibro_lightning.types import ControlText, Prompt

SETTING = "data.control_text"
NAMED = 5
"""Maximum number of rows named in an error."""


def check_control_text(value: str) -> None:
    """Raise :class:`ConfigError` for an invalid value."""
    if value not in get_args(ControlText):
        raise ConfigError("control_text", value, "write warn, refuse or as_text")


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
            try:
                masked = masked_content(content, control, own)
            except ControlTextError as error:
                raise RenderingError(str(error)) from error
            return render(masked, tokenizer, chat_template_kwargs, masked=True)
    return render(content, tokenizer, chat_template_kwargs)


class ControlTextCount:
    """Counts the rows of one source that spell control tokens."""

    def __init__(self, setting: str, rule: ControlText, what: str = "rows") -> None:
        self.setting, self.rule, self.what = setting, rule, what
        self._found: list[tuple[str, str]] = []
        self._rows = 0

    def add(self, row: str, token: str) -> None:
        """Add a row with the first control token that its data spells, or "" if none."""
        self._rows += 1
        if token:
            self._found.append((row, token))

    def report(self) -> None:
        """Report the count in one line if it is not zero; raises :class:`ConfigError` if the rule is ``refuse``."""
        if not self._found:
            return
        row, token = self._found[0]
        counted = f"{len(self._found)} of {self._rows} {self.what} spell control tokens of the policy's tokenizer"
        if self.rule == "refuse":
            rows = ", ".join(row for row, _ in self._found[:NAMED]) + (", …" if len(self._found) > NAMED else "")
            remedy = f"{counted}, first {token!r} ({rows}): mend them, or write as_text to have them read as text"
            raise ConfigError("control_text", "refuse", f"{self.setting}: {remedy}")
        found = f"{self.setting}: {counted}, first {token!r} in {row!r}"
        if self.rule == "as_text":
            rank_zero_info(f"{found}: encoded as text ({SETTING}: as_text)")
        else:
            rank_zero_warn(f"{found}, and become such ({SETTING}: warn): write refuse, or as_text to keep them text")


def report_control_text(prompts: Sequence[Prompt], tokenizer: Any, setting: str, rule: ControlText) -> None:
    """Report the prompts of one source whose data spells control tokens, or refuse them."""
    control, count = ControlTokens.of(tokenizer), ControlTextCount(f"data.{setting}", rule)
    for prompt in prompts:
        count.add(prompt.id, control_text(prompt.content, control, prompt.own_text))
    count.report()


def report_shown(provider: Any, prompts: Sequence[Prompt], rule: ControlText) -> None:
    """Report, or refuse, the golds that the module's regulariser shows to the model and that spell control tokens."""
    for name, template in getattr(getattr(provider, "regularizer", None), "__dict__", {}).items():
        find: Callable[[Prompt, Any], str] | None = getattr(template, "control_text_shown", None)
        if find is None:
            continue
        count = ControlTextCount(f"model.regularizer ({name})", rule, "golds that it shows")
        for prompt in prompts:
            count.add(prompt.id, find(prompt, provider.tokenizer))
        count.report()
