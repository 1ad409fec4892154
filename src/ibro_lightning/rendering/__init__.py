"""Rendering of problems as model input: chat templates, BOS and control tokens."""

from ibro_lightning.rendering.control_tokens import (
    Content,
    ControlTokens,
    RenderingError,
    TextTokenizer,
    control_text,
    masked_content,
)
from ibro_lightning.rendering.render import (
    appended_tokens,
    last_question,
    prefill,
    render,
    text_messages,
    text_of,
)

__all__ = [
    "Content",
    "ControlTokens",
    "RenderingError",
    "TextTokenizer",
    "appended_tokens",
    "control_text",
    "last_question",
    "masked_content",
    "prefill",
    "render",
    "text_messages",
    "text_of",
]
