"""Rendering of raw text and chat messages as prompt tokens.

Raw text gets the tokenizer's prefix (BOS) but no suffix. Messages go through the chat template, which writes its own
special tokens; if the last message is the assistant's, the response continues it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any
from weakref import WeakKeyDictionary

from ibro_lightning.rendering.control_tokens import Content, ControlTokens, RenderingError, TextTokenizer

_END = "<|the words end here|>"
_PRINTED = ("'text': '", '"text": "', '"text":"')
"""What precedes the text of a part if a template prints the part's Python or JSON representation."""
_THINK, _THOUGHT = "<think>", "</think>"
_forms: WeakKeyDictionary[Any, dict[Any, list[bool]]] = WeakKeyDictionary()
"""Results of :func:`_content_parts`, by tokenizer, then by template, roles and template variables."""


def render(
    content: Content, tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None = None, *, masked: bool = False
) -> tuple[str, tuple[int, ...]]:
    """``(text, token ids)`` of raw text, or of messages through the tokenizer's chat template; raises RenderingError.

    With ``masked``, control tokens in ``content`` are masked (:mod:`.control_tokens`) and encoded as text; the returned
    text contains them unmasked.
    """
    encode = TextTokenizer.of(tokenizer) if masked else tokenizer
    if isinstance(content, str):
        text, token_ids = content, _raw_tokens(content, encode)[0]
    else:
        text = _chat_text(text_messages(content), tokenizer, chat_template_kwargs or {})
        # The template has already written the special tokens.
        token_ids = tuple(encode(text, add_special_tokens=False)["input_ids"])
    return ControlTokens.of(tokenizer).unmask(text) if masked else text, token_ids


def appended_tokens(text: str, tokenizer: Any) -> tuple[int, ...]:
    """Special tokens that the tokenizer appends to raw text, such as EOS; prompts omit them."""
    return _raw_tokens(text, tokenizer)[1]


def prefill(content: Content) -> str:
    """The beginning of the assistant's message that the response continues; "" if there is none."""
    if isinstance(content, str) or not content or content[-1].get("role") != "assistant":
        return ""
    return text_of(content[-1].get("content")) or ""


def last_question(content: Content) -> str:
    """The raw text, or the last user message; without one, the last message that is not the assistant's."""
    if isinstance(content, str):
        return content
    messages = text_messages(content)
    asked = [message for message in messages if message["role"] == "user"]
    others = [message for message in messages if message["role"] != "assistant"]
    return str((asked or others or messages)[-1]["content"])


def text_messages(content: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of messages with their content as text, other fields kept; raises RenderingError for anything else."""
    if not isinstance(content, Sequence) or not content:
        raise RenderingError(f"a prompt is text or a list of {{role, content}} messages, not {content!r}")
    messages = []
    for number, message in enumerate(content, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RenderingError(f"message {number} has no role: write {{role: user, content: ...}}")
        text = text_of(message.get("content"))
        if text is None and message.get("tool_calls") and message.get("content") is None:
            text = ""
        if text is None:
            what = "has no content" if message.get("content") is None else "contains something other than text"
            raise RenderingError(f"message {number} {what}")
        messages.append({**message, "content": text})
    return messages


def text_of(content: object) -> str | None:
    """Text itself, or parts ``{type: text, text: ...}`` joined by line breaks; None for anything else."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or not content:
        return None
    parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    kinds = {part.get("type", "text") for part in content if isinstance(part, Mapping)}
    if kinds - {"text"} or not all(isinstance(part, str) for part in parts):
        return None
    return "\n".join(map(str, parts))


def _raw_tokens(text: str, tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """``(prompt tokens, appended tokens)`` of raw text."""
    bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(text, add_special_tokens=True)["input_ids"])
    if not bare:
        begins = bool(whole) and whole[0] == getattr(tokenizer, "bos_token_id", None)
        return tuple(whole[:begins]), tuple(whole[begins:])
    size = len(bare)
    start = next((n for n in range(len(whole) - size + 1) if whole[n : n + size] == bare), None)
    if start is None:  # special tokens change the tokenization of the text
        special = set(getattr(tokenizer, "all_special_ids", ()))
        end = len(whole)
        while end and whole[end - 1] in special and whole[end - 1] != bare[-1]:
            end -= 1
        return tuple(whole[:end]), tuple(whole[end:])
    has_prefix = bare[:start] == whole[:start]  # the text itself begins with BOS
    return tuple(bare if has_prefix else whole[: start + size]), tuple(whole[start + size :])


def _chat_text(messages: list[dict[str, Any]], tokenizer: Any, chat_template_kwargs: Mapping[str, Any]) -> str:
    def apply_plain(messages: list[dict[str, Any]], *, ask: bool) -> str:
        try:
            settings = {**chat_template_kwargs, "add_generation_prompt": ask, "tokenize": False}
            return str(tokenizer.apply_chat_template(messages, **settings))
        except Exception as error:  # templates may raise anything
            why = " ".join(str(error).split())[:300] or type(error).__name__
            raise RenderingError(f"the chat template cannot write these messages: {why}") from error

    roles = tuple(message["role"] for message in messages)
    key = str(getattr(tokenizer, "chat_template", None)), roles, repr(chat_template_kwargs)
    try:
        cache = _forms.setdefault(tokenizer, {})
    except TypeError:  # a custom tokenizer without weak references or hash
        cache = {}
    if key not in cache:
        cache[key] = _content_parts(messages, apply_plain)
    parts = cache[key]

    def apply(messages: list[dict[str, Any]], *, ask: bool) -> str:
        return apply_plain(_with_parts(messages, parts), ask=ask)

    return _continued(messages, apply) if messages[-1]["role"] == "assistant" else apply(messages, ask=True)


def _with_parts(messages: Sequence[dict[str, Any]], parts: Sequence[bool]) -> list[dict[str, Any]]:
    """Messages with their content as a list of one part ``{type: text, text: ...}`` where ``parts`` is True."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]} if in_parts else message
        for message, in_parts in zip(messages, parts, strict=False)
    ]


def _content_parts(messages: list[dict[str, Any]], apply: Callable[..., str]) -> list[bool]:
    """For each message, whether the chat template requires its content as parts, as some multimodal templates do.

    Probed with placeholder words, because templates may trim, escape or cut actual content. Raises RenderingError if in
    either form the template omits the last user message or the message to respond to.
    """
    end = len(messages) - len(list(takewhile(lambda message: message["role"] == "assistant", reversed(messages))))
    words = [{**message, "content": f"content{number}content"} for number, message in enumerate(messages[:end])]

    def shown(parts: list[bool]) -> list[bool] | None:
        """For each message, whether its words appear in the rendered text; None if rendering fails."""
        try:
            text = apply(_with_parts(words, parts), ask=True).casefold()
        except RenderingError:
            return None
        return [
            message["content"] in text and not any(f"{quote}{message['content']}" in text for quote in printed)
            for message, printed in ((word, _PRINTED if part else ()) for word, part in zip(words, parts, strict=True))
        ]

    plain = [False] * end
    seen = shown(plain)
    candidates = [(plain, seen)] if seen is not None else []
    if seen is None or not all(seen):
        forms = [[True] * end, [message["role"] == "user" for message in words]]
        if seen is not None:
            forms.insert(0, [not visible for visible in seen])
        candidates += [(form, visible) for form in forms if (visible := shown(form)) is not None]
    if not candidates or not end:
        return [False] * len(messages)  # rendering the messages themselves then raises the template's own error
    form, seen = max(candidates, key=lambda candidate: sum(candidate[1]))
    roles = [message["role"] for message in words]
    asked = max((n for n in range(end) if roles[n] == "user"), default=end - 1)
    for number in (asked, end - 1):
        if not seen[number] and (number == asked or roles[number] != "system"):
            reason = f"the chat template leaves out message {number + 1} (role {roles[number]!r})"
            raise RenderingError(f"{reason}: write the roles that the template knows, or raw prompts (chat: false)")
    return [*form, *[any(form)] * (len(messages) - end)]


def _continued(messages: list[dict[str, Any]], apply: Callable[..., str]) -> str:
    """The conversation with its last message open and verbatim, unlike transformers' ``continue_final_message``."""
    *before, last = messages
    words = last["content"]
    if not words.strip():
        raise RenderingError("the last message is the assistant's and is empty: take it out, or write how it begins")
    refused: RenderingError | None = None
    try:
        text, found, _ = apply([*before, {**last, "content": words + _END}], ask=False).rpartition(_END)
    except RenderingError as error:  # some templates require a user message at the end
        text, found, refused = "", "", error
    thinks = words.lstrip().startswith(_THINK)
    # Templates of reasoning models insert an empty thought before text that does not close one.
    doubled = thinks and text.removesuffix(words).rstrip().endswith(_THOUGHT)
    if found and text.endswith(words) and not doubled:
        return text
    opened, closed = (apply(before, ask=ask) if before else "" for ask in (True, False))
    if opened == closed:
        raise refused or RenderingError(
            f"the chat template changes how the assistant's last message begins, {words[:60]!r}: write it as the "
            "template would, without white space around it and without a thought; or write raw prompts (chat: false)"
        )
    if thinks and opened.rstrip().endswith(_THINK):
        opened = opened.rstrip().removesuffix(_THINK)
    return opened + words
