"""Problems from Hugging Face datasets and local files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info

from ibro_lightning.errors import ConfigError, check_count
from ibro_lightning.rendering import RenderingError, last_question, text_messages
from ibro_lightning.rewards.mathematics.gold_text import after_hashes, alternatives, boxed, canonical_gold
from ibro_lightning.sources.base import PromptSource, as_prompt, own_words
from ibro_lightning.sources.columns import (
    Column,
    MetaColumns,
    MissingValue,
    checked_names,
    checked_words,
    is_number,
    is_plain,
    kind_of,
    word_key,
)
from ibro_lightning.sources.files import Row, open_table
from ibro_lightning.sources.prompt_templates import bare_question, template_text
from ibro_lightning.types import Problem, check_choice

AnswerFormat = Literal["auto", "boxed", "raw", "after_hashes"]
PROMPT_COLUMNS = ["problem", "question", "prompt"]
ANSWER_COLUMNS = ["answer", "solution", "reward_model.ground_truth"]
"""Column names of published datasets; the last of each list is the verl/DAPO schema."""


@dataclass(frozen=True)
class SourceReport:
    """Row counts of a source: ``rows = kept + duplicates + skipped``.

    Args:
        rows: rows read.
        kept: rows that became problems.
        duplicates: rows that repeat an earlier question.
        conflicting: duplicates whose answer differs from that of the row kept.
        skipped: rows without question or answer (with ``skip_bad_rows``).
    """

    rows: int = 0
    kept: int = 0
    duplicates: int = 0
    conflicting: int = 0
    skipped: int = 0

    def __str__(self) -> str:
        text = f"{self.rows} rows, {self.kept} prompts kept, {self.duplicates} duplicates dropped"
        if self.conflicting:
            text += f" ({self.conflicting} of them with another answer than the first, which was kept)"
        return text + (f", {self.skipped} rows without question or answer skipped" if self.skipped else "")


class DatasetSource(PromptSource):
    r"""Questions and answers in two columns of a dataset.

    Repeated questions are dropped and counted (the public DAPO-Math-17K file repeats each about a hundred times); the
    counts are in ``report`` once :meth:`problems` is exhausted. Ids are ``file/row``, where rows are counted from 0
    after ``split`` is applied and before any are dropped.

    Args:
        path: a local ``.jsonl``, ``.json``, ``.parquet`` or ``.csv`` file; or a hub name or folder, as in
            ``datasets.load_dataset``.
        split, config: as in ``datasets.load_dataset``. A local file accepts any split name.
        field: in a local ``.json`` file that is one object, the key of its list of rows, as in ``datasets``' JSON
            loader; dots reach deeper. Files that are a list of rows, and the hub, have no use for it.
        prompt_column: text, or a list of ``{role, content}`` messages; if the last one is the assistant's, responses
            continue it. Dots reach into nested columns. Of a list of names, the first that exists is used; by default,
            common names are tried.
        answer_column: likewise.
        answer_format: ``boxed``: the contents of the last ``\boxed{}``. ``after_hashes``: the text after the last
            ``####``, as in GSM8K's solutions. ``raw``: the value unchanged. ``auto``: ``boxed`` or ``after_hashes`` for
            text that contains ``\boxed{`` or a line with ``####``, otherwise the whole value. All but ``raw`` apply
            :func:`~ibro_lightning.rewards.mathematics.gold_text.canonical_gold` to text and numbers (``27.0`` becomes
            27). A list of answers, possibly written as text (``["1/2", "0.5"]``), is read element by element; each of
            them is right.
        answer_words: the word for each answer of the file, for truth values and classes: ``{true: "yes", false: "no"}``
            or ``{"0": "no", "1": "yes"}``. An answer without a word stops the run. None keeps the answers.
        template: template of text prompts: a name (plain, dapo, boxed: see :mod:`.prompt_templates`), or text that has
            ``{problem}``. ``template``, ``chat`` and ``system`` do not apply to lists of messages.
        chat: wrap text prompts as a user message for the model's chat template; False leaves them raw.
        system: a system message, or the first paragraph of a raw prompt.
        limit: read only the first ``limit`` rows.
        skip_bad_rows: skip and count rows without question or answer; False stops at the first one.
        meta_columns: further columns, such as ``[difficulty, extra_info.index]``, available to rewards under these
            names in ``prompt.meta`` and kept in the rollout log. Numbers, text, lists and objects; dates become text.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        config: str | None = None,
        prompt_column: list[str] | str = PROMPT_COLUMNS,
        answer_column: list[str] | str = ANSWER_COLUMNS,
        answer_format: AnswerFormat = "auto",
        template: str = "plain",
        chat: bool = True,
        system: str | None = None,
        limit: int | None = None,
        skip_bad_rows: bool = False,
        meta_columns: list[str] | str | None = None,
        field: str | None = None,
        answer_words: dict[str, str] | None = None,
    ) -> None:
        if limit is not None:
            check_count("limit", limit, 1, " rows, or null for all")
        check_choice("answer_format", answer_format, AnswerFormat)
        for name, columns in (("prompt_column", prompt_column), ("answer_column", answer_column)):
            if not columns:
                raise ConfigError(name, columns, "name a column, or several to choose from")
        self.path, self.split, self.config, self.field = path, split, config, field
        self.answer_words = checked_words(answer_words)
        self.prompt_column, self.answer_column, self.answer_format = prompt_column, answer_column, answer_format
        self.template, self.chat, self.system, self.limit = template_text(template), chat, system, limit
        self._own_text = own_words(self.template, chat=chat, system=system)
        self.skip_bad_rows, self.meta_columns = skip_bad_rows, checked_names(meta_columns)
        self.report: SourceReport | None = None

    def problems(self) -> Iterator[Problem]:
        self.report = None
        table, selected = open_table(self.path, self.config, self.split, self.field)
        question_column = Column("prompt_column", self.path, self.prompt_column, table)
        answer_column = Column("answer_column", self.path, self.answer_column, table)
        meta = MetaColumns(self.path, self.meta_columns, table)
        stem = Path(self.path).stem
        seen: dict[Any, tuple[Any, Any]] = {}
        rows = duplicates = conflicting = skipped = 0
        columns = list(dict.fromkeys((question_column.top, answer_column.top, *meta.tops)))
        chosen = chain.from_iterable(islice(table.rows(columns), part.start, part.stop) for part in selected)
        for number, row in enumerate(islice(chosen, self.limit)):
            rows += 1
            try:
                question, value = question_column.value(row), answer_column.value(row)
                key = question.strip() if isinstance(question, str) else str(question)
                if key in seen and seen[key][0] == value:  # fast path: most rows of the public DAPO file
                    duplicates += 1
                    continue
                prompt, bare = self._prompt(question, question_column, row)
                answer = self._answer(value, answer_column, row)
                extra = meta.values(row)
            except MissingValue:
                if not self.skip_bad_rows:
                    raise
                skipped += 1
                continue
            if key in seen:
                duplicates += 1
                conflicting += seen[key][1] != answer
                continue
            seen[key] = value, answer
            own = self._own_text if isinstance(question, str) else ()
            yield Problem(f"{stem}/{number}", prompt, answer, extra, question=bare, own_text=own)
        meta.check_found()
        self.report = SourceReport(rows, len(seen), duplicates, conflicting, skipped)
        if duplicates or skipped:
            rank_zero_info(f"{self.path}: {self.report}")

    def _prompt(self, question: Any, column: Column, row: Row) -> tuple[Any, str]:
        """``(prompt, bare question)``."""
        if isinstance(question, str):
            text = self.template.format(problem=question)
            return as_prompt(text, chat=self.chat, system=self.system), question
        if isinstance(question, list) and all(isinstance(message, Mapping) for message in question):
            given = [{key: value for key, value in message.items() if value is not None} for message in question]
            try:
                messages = text_messages(given)
            except RenderingError as error:
                raise column.error(row, f"neither text nor a list of messages: {error}") from error
            asked = last_question(messages)
            if not messages[-1]["content"].strip():
                raise column.nothing(row, f"message {len(messages)} is empty")
            if not asked.strip():
                raise column.nothing(row, "the user's last message is empty")
            return messages, bare_question(asked)
        raise column.error(row, f"{kind_of(question)}: neither text nor a list of messages")

    def _answer(self, value: Any, column: Column, row: Row) -> Any:
        """The right answer, or a list if there are several."""
        if self.answer_words is not None:
            value = self._in_words(value, column, row)
        if self.answer_format == "raw":
            return value
        if column.is_json and isinstance(value, list) and all(is_number(element) for element in value):
            what = f"{value} is a list or the text {str(value)!r}, which a column of mixed types (arrow.json)"
            raise column.error(row, f"{what} does not tell: write a list's elements as text, or the text with spaces")
        elements = alternatives(value)
        if elements == [value] or not all(is_plain(element) for element in elements):
            return self._one_answer(value, column, row)
        for element in elements:
            column.check_value(element, row)
        answers = list(dict.fromkeys(self._one_answer(element, column, row) for element in elements))
        return answers if len(answers) > 1 else answers[0]

    def _in_words(self, value: Any, column: Column, row: Row) -> Any:
        """``value``, or each element of a list, in the words of ``answer_words``."""
        assert self.answer_words is not None
        if isinstance(value, list):
            return [self._in_words(element, column, row) for element in value]
        if (key := word_key(value)) not in self.answer_words:
            words = ", ".join(self.answer_words)
            raise column.error(row, f"answer_words has no word for {key[:60]!r}, only for {words}: write one")
        return self.answer_words[key]

    def _one_answer(self, value: Any, column: Column, row: Row) -> Any:
        answer_format: str = self.answer_format
        if answer_format == "auto" and isinstance(value, str):
            if r"\boxed{" in value:
                answer_format = "boxed"
            elif after_hashes(value) is not None:
                answer_format = "after_hashes"
        if answer_format in ("boxed", "after_hashes"):
            if not isinstance(value, str):
                raise column.error(row, f"{kind_of(value)}, and answer_format {answer_format} reads text")
            found = boxed(value) if answer_format == "boxed" else after_hashes(value)
            if found is None:
                what = r"closed \boxed{}" if answer_format == "boxed" else "line with ####"
                raise column.nothing(row, f"no {what} in {value[-60:]!r}")
            answer: Any = found
        elif is_plain(value):
            answer = value
        else:
            return value
        if not (canonical := canonical_gold(answer)):
            raise column.nothing(row, f"nothing is left of the answer {value[-60:]!r}")
        return canonical
