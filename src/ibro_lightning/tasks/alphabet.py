"""The tokenizer of a policy from scratch whose task is written in plain text."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ibro_lightning.errors import ConfigError, check_count, check_instance
from ibro_lightning.seeding import derive_seed
from ibro_lightning.sources.base import DemonstrationSource

PAD, UNKNOWN, EOS = "<pad>", "<unk>", "<eos>"
CHARACTERS = (*"\n ", *string.digits, *string.ascii_letters, *string.punctuation)
SEARCHED = 512
"""Demonstrations in which words are counted."""


class Alphabet:
    """One token per printable ASCII character, and one for each of the most frequent words of the demonstrations.

    Words, with the space before them, make long questions short. Without them (``words=0``), a policy sees the letters,
    as it must where a task is about them.

    Args:
        words: how many of them.
        source: whose demonstrations are searched for words; needed if there are any.
    """

    def __init__(self, words: int = 0, source: DemonstrationSource | None = None) -> None:
        check_count("words", words, 0)
        check_instance("source", source, DemonstrationSource, optional=True)
        if words and source is None:
            raise ConfigError("source", None, f"write the demonstrations whose {words} most frequent words are tokens")
        self.words, self.source = words, source

    def vocabulary(self) -> Iterator[str]:
        yield from (PAD, UNKNOWN, EOS, *CHARACTERS)
        yield from self._frequent_words()

    def _frequent_words(self) -> list[str]:
        """By falling frequency, ties in alphabetical order."""
        if self.source is None:
            return []
        counts: Counter[str] = Counter()
        for index in range(SEARCHED):
            prompt, response = self.source.demonstration(derive_seed(0, "alphabet", index))
            texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
            for text in (*texts, response):
                counts.update(re.findall(r" ?[A-Za-z]{2,}", text))
        return sorted(counts, key=lambda word: (-counts[word], word))[: self.words]

    def tokenizer(self) -> Any:
        """A transformers tokenizer (``PreTrainedTokenizerFast``), which reads the longest word that matches.

        Every token is also an "added token", as in :meth:`NumberPath.tokenizer
        <ibro_lightning.tasks.number_path.NumberPath.tokenizer>` and for the same reason.
        """
        from transformers import PreTrainedTokenizerFast  # lazy: slow, and not needed in reward workers

        vocabulary = {token: index for index, token in enumerate(self.vocabulary())}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
        backend.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
        backend.decoder = decoders.Fuse()
        special = {"pad_token": PAD, "unk_token": UNKNOWN, "eos_token": EOS}
        plain = [token for token in vocabulary if token not in special.values()]
        backend.add_tokens([AddedToken(token, normalized=False) for token in plain])
        return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
