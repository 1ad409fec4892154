"""Problems from Hugging Face datasets: hub names and local files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from lightning.pytorch.utilities import rank_zero_info

from ibro_lightning.answers import after_hashes, boxed, canonical_gold
from ibro_lightning.datamodules.dataset_files import Row, Table, open_table
from ibro_lightning.datamodules.sources import PromptSource, as_prompt
from ibro_lightning.datamodules.templates import bare_question, template_text
from ibro_lightning.errors import ConfigError
from ibro_lightning.types import Problem

AnswerFormat = Literal["auto", "boxed", "raw", "after_hashes"]


PROMPT_COLUMNS = ["problem", "question", "prompt"]
ANSWER_COLUMNS = ["answer", "solution", "reward_model.ground_truth"]
"""What published files call them; the last of each is the verl/DAPO schema."""


@dataclass(frozen=True)
class SourceReport:
    """What became of a source's rows: ``rows = kept + duplicates + skipped``.

    Args:
        rows: how many were read.
        kept: how many became problems.
        duplicates: how many repeated an earlier question.
        conflicting: how many of the duplicates had another answer than the row that was kept.
        skipped: how many had no question or no answer (with ``skip_bad_rows``).
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


class _NothingThere(ConfigError):
    """A row without question or answer, which ``skip_bad_rows`` permits."""


class DatasetSource(PromptSource):
    r"""Questions and answers in two columns of a dataset.

    Repeated questions are dropped and counted (the public DAPO-Math-17K file repeats each about a hundred times); the
    counts are in ``report`` once :meth:`problems` has come to its end. Ids are ``file/row``, rows counted from 0 after
    ``split`` has been applied, whatever is dropped.

    Args:
        path: a local ``.jsonl``, ``.json``, ``.parquet`` or ``.csv`` file; or what ``datasets.load_dataset`` takes: a
            name on the hub, or a folder.
        split, config: as in ``datasets.load_dataset``. A local file answers to any split name.
        prompt_column: text, or a chat list of ``{role, content}``. Dots reach into nested columns. Of a list of names
            the first that the file has is taken, since copies of a set name it differently; left out, the usual names
            are tried.
        answer_column: likewise.
        answer_format: ``boxed``: what the last ``\boxed{}`` in the column holds. ``after_hashes``: what follows the
            last ``####``, as in GSM8K's solutions. ``raw``: the value as it stands. ``auto``: text that contains
            ``\boxed{`` or a line with ``####`` is read like that, other values are taken whole. All but ``raw`` bring
            text and numbers into the spelling of :func:`ibro_lightning.answers.canonical_gold` (``27.0`` becomes 27).
        template: how a text prompt is asked: a name (plain, dapo, boxed: see :mod:`.templates`), or a text that
            contains ``{problem}``. A chat list is taken as it stands: template, chat and system are for text.
        chat: wrap text prompts as a user message for the model's chat template; False leaves them raw.
        system: a system message (or, raw, a first paragraph).
        limit: take only the first so many rows.
        skip_bad_rows: skip and count rows without question or answer; False stops at the first one.
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
    ) -> None:
        if limit is not None and limit < 1:
            raise ConfigError("source.limit", limit, "write 1 or more rows, or null for all")
        if answer_format not in get_args(AnswerFormat):
            raise ConfigError(
                "source.answer_format", answer_format, f"write one of {', '.join(get_args(AnswerFormat))}"
            )
        for name, columns in (("prompt_column", prompt_column), ("answer_column", answer_column)):
            if not columns:
                raise ConfigError(f"source.{name}", columns, "name a column, or several to choose from")
        self.path, self.split, self.config = path, split, config
        self.prompt_column, self.answer_column, self.answer_format = prompt_column, answer_column, answer_format
        self.template, self.chat, self.system, self.limit = template_text(template), chat, system, limit
        self.skip_bad_rows = skip_bad_rows
        self.report: SourceReport | None = None

    def problems(self) -> Iterator[Problem]:
        self.report = None
        table, selected = open_table(self.path, self.config, self.split)
        question_at = _Column("source.prompt_column", self.path, self.prompt_column, table)
        answer_at = _Column("source.answer_column", self.path, self.answer_column, table)
        stem = Path(self.path).stem
        seen: dict[Any, tuple[Any, Any]] = {}
        rows = duplicates = conflicting = skipped = 0
        columns = list(dict.fromkeys((question_at.top, answer_at.top)))
        for number, row in enumerate(islice(_select(table, columns, selected), self.limit)):
            rows += 1
            try:
                question, value = question_at.value(row), answer_at.value(row)
                key = question.strip() if isinstance(question, str) else str(question)
                if key in seen and seen[key][0] == value:  # nearly all rows of the public DAPO file
                    duplicates += 1
                    continue
                prompt, bare = self._prompt(question, question_at, row)
                answer = self._answer(value, answer_at, row)
            except _NothingThere:
                if not self.skip_bad_rows:
                    raise
                skipped += 1
                continue
            if key in seen:
                duplicates += 1
                conflicting += seen[key][1] != answer
                continue
            seen[key] = value, answer
            yield Problem(f"{stem}/{number}", prompt, answer, question=bare)
        self.report = SourceReport(rows, len(seen), duplicates, conflicting, skipped)
        if duplicates or skipped:
            rank_zero_info(f"{self.path}: {self.report}")

    def _prompt(self, question: Any, column: _Column, row: Row) -> tuple[Any, str]:
        """What is asked, and the bare question."""
        if isinstance(question, str):
            text = self.template.format(problem=question)
            return as_prompt(text, chat=self.chat, system=self.system), question
        if isinstance(question, list) and all(isinstance(message, Mapping) for message in question):
            messages = [_message(number, message, column, row) for number, message in enumerate(question, start=1)]
            if not messages[-1]["content"].strip():
                raise column.nothing(row, f"message {len(messages)} is empty")
            return messages, bare_question(messages[-1]["content"])
        raise column.error(row, f"{_kind(question)}: neither text nor a list of messages")

    def _answer(self, value: Any, column: _Column, row: Row) -> Any:
        answer_format: str = self.answer_format
        if answer_format == "auto" and isinstance(value, str):
            if r"\boxed{" in value:
                answer_format = "boxed"
            elif after_hashes(value) is not None:
                answer_format = "after_hashes"
        if answer_format in ("boxed", "after_hashes"):
            if not isinstance(value, str):
                raise column.error(row, f"{_kind(value)}, and answer_format {answer_format} reads text")
            found = boxed(value) if answer_format == "boxed" else after_hashes(value)
            if found is None:
                what = r"closed \boxed{}" if answer_format == "boxed" else "line with ####"
                raise column.nothing(row, f"no {what} in {value[-60:]!r}")
            answer: Any = found
        else:
            answer = value
        if (
            self.answer_format == "raw"
            or isinstance(answer, bool)
            or not isinstance(answer, str | int | float | Decimal)
        ):
            return answer
        if not (canonical := canonical_gold(answer)):
            raise column.nothing(row, f"nothing is left of the answer {value[-60:]!r}")
        return canonical


class _Column:
    """Where question or answer stand in a row, and what is wrong if they do not."""

    def __init__(self, setting: str, path: str, names: list[str] | str, table: Table) -> None:
        self.setting, self.path = setting, path
        candidates = [names] if isinstance(names, str) else list(names)
        found = next((name for name in candidates if _has(table, name, nested=len(candidates) > 1)), None)
        if found is None:
            remedy = f"{path} has no such column: write one of {sorted(table.columns)}"
            raise ConfigError(setting, names, remedy)
        self.name = found
        self.keys = _keys(table, found)
        self.top = self.keys[0]
        self._first: tuple[str, str] | None = None

    def value(self, row: Row) -> Any:
        value: Any = row[1]
        for key in self.keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is None or value in ("", [], {}) or (isinstance(value, str) and not value.strip()):
            raise self.nothing(row, "no value there")
        if isinstance(value, float | Decimal) and not math.isfinite(value):
            raise self.nothing(row, f"{value} is no value")
        self._check_type(value, row)
        return value

    def _check_type(self, value: Any, row: Row) -> None:
        # Real files mix 27 and "27.0": among answers plain values are all alike.
        plain = self.setting == "source.answer_column" and isinstance(value, str | int | float | Decimal)
        kind = "a plain value" if plain else _kind(value)
        if self._first is None:
            self._first = row[0], kind
        if kind != self._first[1]:
            where, first = self._first
            raise self.error(row, f"{kind} here, but {first} in {where}: types must not be mixed in a column")
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise self.error(row, "it holds half a surrogate pair, which is not Unicode text: repair the row")

    def error(self, row: Row, what: str) -> ConfigError:
        return ConfigError(self.setting, self.name, f"{self.path}, {row[0]}: {what}")

    def nothing(self, row: Row, what: str) -> ConfigError:
        remedy = "repair the row, or write skip_bad_rows: true"
        return _NothingThere(self.setting, self.name, f"{self.path}, {row[0]}: {what}: {remedy}")


def _keys(table: Table, name: str) -> list[str]:
    return [name] if name in table.columns else name.split(".")


def _has(table: Table, name: str, nested: bool) -> bool:
    """Whether the file has this column; ``nested``: also what the dots of its name reach for, in the first row."""
    top, *below = _keys(table, name)
    if top not in table.columns or not below or not nested:
        return top in table.columns
    _, value = next(table.rows([top]))
    for key in (top, *below):
        if not isinstance(value, Mapping) or key not in value:
            return False
        value = value[key]
    return True


def _select(table: Table, columns: list[str], selected: list[range]) -> Iterator[Row]:
    for part in selected:
        yield from islice(table.rows(columns), part.start, part.stop)


def _message(number: int, message: Mapping[str, Any], column: _Column, row: Row) -> Mapping[str, str]:
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            what = f"{key!r} is {_kind(message[key])}" if message.get(key) is not None else f"has no {key!r}"
            raise column.error(row, f"neither text nor a list of messages: message {number} {what}")
    return {"role": message["role"], "content": message["content"]}


def _kind(value: Any) -> str:
    for types, name in (
        (str, "text"),
        (bool, "a truth value"),
        ((int, float, Decimal), "a number"),
        (list, "a list"),
        (Mapping, "an object"),
    ):
        if isinstance(value, types):
            return name
    return f"a value of type {type(value).__name__}"
