"""Control text: data that spells control tokens, such as ``<|im_end|>`` in a question, which would end the user's turn.

A tokenizer parses special and added tokens anywhere in its input, and cannot distinguish those written by a chat
template from those in the data. The data is therefore *masked* before the template is applied: each control token is
replaced by private-use Unicode characters. :class:`TextTokenizer` then encodes masked tokens as text and the others,
which the template wrote, as control tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

Content = str | Sequence[Mapping[str, Any]]
"""Raw text, or ``{role, content}`` messages."""
OPEN, CLOSE, PREFIX = "\U000ff000", "\U000ff001", "\U000ff002"
"""Delimiters of a masked token's index, and the prefix of a template token's id. Planes 15 and 16 are private use."""
RESERVED = {OPEN, CLOSE, PREFIX}
_TO_PRIVATE = {ord(str(digit)): 0xFF010 + digit for digit in range(10)}
_FROM_PRIVATE = {private: digit for digit, private in _TO_PRIVATE.items()}
_CANNOT = "control tokens cannot be encoded as text"
_MASKED = re.compile(f"{OPEN}([^{CLOSE}]*){CLOSE}")
_BRACKETED = re.compile(r"<\|.*\|>", re.DOTALL)
_MARKS = re.compile(r"[<\[{|](?!\s).*[>\]}|]", re.DOTALL)


class RenderingError(ValueError):
    """Text or messages cannot be rendered as a prompt."""


@dataclass(frozen=True)
class ControlTokens:
    """A tokenizer's control tokens: special tokens, and added tokens of the form ``<|...|>`` or marked up in its chat
    template (``<tool_call>``). In the assistant's messages only special tokens are control tokens."""

    tokens: tuple[str, ...]
    special: frozenset[str]
    ids: Mapping[str, int]
    normalized: bool = False
    """Whether a token is matched after normalisation, so that different text may become it."""

    @classmethod
    def of(cls, tokenizer: Any) -> ControlTokens:
        try:
            version = str(getattr(tokenizer, "chat_template", None)), len(tokenizer)
            if _control_tokens.get(tokenizer, (None,))[0] != version:
                _control_tokens[tokenizer] = version, cls._read(tokenizer)
        except TypeError:  # a custom tokenizer without weak references or hash
            return cls._read(tokenizer)
        return _control_tokens[tokenizer][1]

    @classmethod
    def _read(cls, tokenizer: Any) -> ControlTokens:
        decoder = getattr(tokenizer, "added_tokens_decoder", {})
        added = {str(token): (number, token) for number, token in decoder.items()}
        named = {str(token) for token in getattr(tokenizer, "all_special_tokens", ())}
        special = {text for text, (_, token) in added.items() if getattr(token, "special", False) or text in named}
        if not added and hasattr(tokenizer, "convert_tokens_to_ids"):
            added = {text: (tokenizer.convert_tokens_to_ids(text), None) for text in named}
            special = named
        template = str(getattr(tokenizer, "chat_template", None) or "")
        others = {
            text
            for text in added
            if _BRACKETED.fullmatch(text) or (len(text) > 2 and _MARKS.fullmatch(text) and text in template)
        }
        tokens = sorted({text for text in special | others if text.strip()}, key=lambda text: (-len(text), text))
        normalized = any(getattr(added[text][1], "normalized", False) for text in tokens)
        return cls(tuple(tokens), frozenset(special), {text: added[text][0] for text in tokens}, normalized)

    def found(self, text: str, *, assistant: bool = False) -> list[re.Match[str]]:
        """Matches of control tokens in ``text``; of overlapping ones the first, then the longest."""
        pattern = _pattern(tuple(token for token in self.tokens if not assistant or token in self.special))
        return list(pattern.finditer(text)) if pattern else []

    def mask(self, text: str, *, own: Sequence[str] = (), assistant: bool = False) -> str:
        """``text`` with its control tokens masked, except in its prefixes and suffixes ``own`` from the recipe."""
        if RESERVED & set(text):
            raise RenderingError(
                "the text contains characters that are reserved for masking control tokens (U+FF000 to U+FF002)"
            )
        pieces, last = list[str](), 0
        for match in self.found(text, assistant=assistant):
            if within(match, text, own):
                continue
            number = str(self.tokens.index(match[0])).translate(_TO_PRIVATE)
            pieces += [text[last : match.start()], OPEN, number, CLOSE]
            last = match.end()
        return "".join([*pieces, text[last:]])

    def unmask(self, text: str) -> str:
        return _MASKED.sub(lambda match: self.tokens[int(match[1].translate(_FROM_PRIVATE))], text)

    def disguise(self, text: str) -> str:
        """Masked text as :class:`TextTokenizer` encodes it: unmasked control tokens renamed, masked ones restored."""
        pattern = _pattern(self.tokens)
        if pattern is not None:
            text = pattern.sub(lambda match: disguised(self.ids[match[0]]), text)
        return self.unmask(text)


def within(match: re.Match[str], text: str, own: Sequence[str]) -> bool:
    """Whether a match lies in a prefix or suffix of ``text`` that is one of ``own``."""
    return any(
        (words and text.startswith(words) and match.end() <= len(words))
        or (words and text.endswith(words) and match.start() >= len(text) - len(words))
        for words in own
    )


def disguised(number: int) -> str:
    """The name of a control token in the vocabulary of :class:`TextTokenizer`."""
    return PREFIX + str(number).translate(_TO_PRIVATE) + CLOSE


def control_text(content: Content, control: ControlTokens, own: Sequence[str] = ()) -> str:
    """The first control token in a prompt's data, outside the recipe's ``own`` prefixes and suffixes; "" if none."""
    for text, assistant in _texts(content):
        for match in control.found(text, assistant=assistant):
            if not within(match, text, own):
                return match[0]
    return ""


def masked_content(content: Content, control: ControlTokens, own: Sequence[str] = ()) -> Content:
    """``content`` with control tokens masked (see :meth:`ControlTokens.mask`), in all fields of messages."""
    if isinstance(content, str):
        return control.mask(content, own=own)
    return [_masked(message, control, own, message.get("role") == "assistant") for message in content]


def _masked(value: Any, control: ControlTokens, own: Sequence[str], assistant: bool) -> Any:
    if isinstance(value, str):
        return control.mask(value, own=own, assistant=assistant)
    if isinstance(value, Mapping):
        return {key: _masked(item, control, own, assistant) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(item, control, own, assistant) for item in value]
    return value


def _texts(value: Any, assistant: bool = False) -> Iterator[tuple[str, bool]]:
    """``(text, whether it is the assistant's)`` of all texts in messages."""
    if isinstance(value, str):
        yield value, assistant
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item, assistant or value.get("role") == "assistant")
    elif isinstance(value, Sequence):
        for item in value:
            yield from _texts(item, assistant)


class TextTokenizer:
    """A copy of a tokenizer with renamed control tokens (:func:`disguised`), otherwise identical.

    Control tokens in plain text are encoded as text, in the pieces that the tokenizer would use if they did not exist.
    """

    def __init__(self, tokenizer: Any, control: ControlTokens, twin: Any) -> None:
        self._tokenizer, self._control, self._twin = tokenizer, control, twin

    @classmethod
    def of(cls, tokenizer: Any) -> TextTokenizer:
        control = ControlTokens.of(tokenizer)
        try:
            if (cached := _twins.get(tokenizer)) is None or cached[0] is not control:
                cached = _twins[tokenizer] = control, _twin_of(tokenizer, control)
        except TypeError:  # as above
            cached = control, _twin_of(tokenizer, control)
        return cls(tokenizer, *cached)

    @property
    def bos_token_id(self) -> int | None:
        return getattr(self._tokenizer, "bos_token_id", None)

    @property
    def all_special_ids(self) -> Sequence[int]:
        return getattr(self._tokenizer, "all_special_ids", ())

    def __call__(self, masked: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        """Encode masked text: unmasked control tokens as tokens, masked ones as text. Raises :class:`RenderingError`
        if the vocabulary has no tokens for these, or the copy does not reproduce the tokenizer on this text."""
        control, tokenizer = self._control, self._tokenizer
        plain = control.unmask(masked)
        # With all control tokens renamed, including those in the data, the copy must agree with the tokenizer.
        reference = self._ids(control.disguise(plain), add_special_tokens)
        if reference != list(tokenizer(plain, add_special_tokens=add_special_tokens)["input_ids"]):
            raise RenderingError(f"{_CANNOT}: {type(tokenizer).__name__} prepares text in a way of its own")
        ids = self._ids(control.disguise(masked), add_special_tokens)
        unknown = getattr(tokenizer, "unk_token_id", None)
        if unknown is not None and ids.count(unknown) > reference.count(unknown):
            raise RenderingError(f"{_CANNOT}: the tokenizer has no other tokens for what is written there")
        return {"input_ids": ids}

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._twin.encode(text, add_special_tokens=add_special_tokens).ids)


def _twin_of(tokenizer: Any, control: ControlTokens) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        needed = "a tokenizer of the library tokenizers, which alone can encode control tokens as text"
        raise RenderingError(f"{_CANNOT}: {type(tokenizer).__name__} is not {needed}")
    from tokenizers import Tokenizer  # lazy: rarely needed

    twin = Tokenizer.from_str(json.dumps(_renamed(json.loads(backend.to_str()), control)))
    twin.encode_special_tokens = backend.encode_special_tokens
    twin.no_padding()
    twin.no_truncation()
    return twin


def _renamed(described: dict[str, Any], control: ControlTokens) -> dict[str, Any]:
    """A serialised tokenizer with control tokens renamed in its added tokens, vocabulary and merges."""
    names = {token: disguised(number) for token, number in control.ids.items()}
    for added in described["added_tokens"]:
        if added["content"] in names:
            added["content"] = names[added["content"]]
    model = described["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): number for token, number in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _involves(merge, names)]
    return described


def _involves(merge: Any, names: Mapping[str, str]) -> bool:
    """Whether a control token is an operand or the result of a merge."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names


_control_tokens: WeakKeyDictionary[Any, tuple[Any, ControlTokens]] = WeakKeyDictionary()
_twins: WeakKeyDictionary[Any, tuple[ControlTokens, Any]] = WeakKeyDictionary()


@lru_cache(maxsize=64)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None
