"""Problems from Hugging Face datasets: hub names and local files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
from lightning.pytorch.utilities import rank_zero_info

from ibro_lightning.datamodules.sources import PromptSource, as_prompt, check_template
from ibro_lightning.errors import ConfigError
from ibro_lightning.types import Problem

_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


class DatasetSource(PromptSource):
    """Questions and answers in two columns of a dataset, read with Hugging Face ``datasets``.

    Repeated questions are dropped and counted (the public DAPO-Math-17K file repeats each about a hundred times).

    Args:
        path: a local ``.jsonl``, ``.json``, ``.parquet`` or ``.csv`` file, or a dataset name on the hub.
        split, config: as in ``datasets.load_dataset``. A local file answers to any split name.
        prompt_column: text, or a chat list of ``{role, content}``. Dots reach into nested columns.
        answer_column: likewise, e.g. ``reward_model.ground_truth``.
        template: how a text prompt is asked; must contain ``{problem}``. A chat list is taken as it stands: template,
            chat and system are for text.
        chat: wrap text prompts as a user message for the model's chat template; False leaves them raw.
        system: a system message (or, raw, a first paragraph).
        limit: take only the first so many rows.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        config: str | None = None,
        prompt_column: str = "problem",
        answer_column: str = "answer",
        template: str = "{problem}",
        chat: bool = True,
        system: str | None = None,
        limit: int | None = None,
    ) -> None:
        check_template("source.template", template, ("problem",))
        if limit is not None and limit < 1:
            raise ConfigError("source.limit", limit, "write 1 or more rows, or null for all")
        self.path, self.split, self.config = path, split, config
        self.prompt_column, self.answer_column = prompt_column, answer_column
        self.template, self.chat, self.system, self.limit = template, chat, system, limit

    def problems(self) -> Iterator[Problem]:
        table = self._load()
        for setting, column in (("prompt_column", self.prompt_column), ("answer_column", self.answer_column)):
            if column.split(".")[0] not in table.column_names:
                raise ConfigError(
                    f"source.{setting}",
                    column,
                    f"{self.path} has no such column: write one of {sorted(table.column_names)}",
                )
        seen: set[str] = set()
        for number, row in enumerate(table):
            question = self._value(row, number, "prompt_column", self.prompt_column)
            if (key := str(question)) in seen:
                continue
            seen.add(key)
            answer = self._value(row, number, "answer_column", self.answer_column)
            yield Problem(f"{Path(self.path).stem}/{number}", self._prompt(question, number), answer)
        if repeated := len(table) - len(seen):
            rank_zero_info(f"{self.path}: {len(table)} rows, {len(seen)} prompts kept, {repeated} duplicates dropped")

    def _load(self) -> datasets.Dataset:
        file_format = _FORMATS.get(Path(self.path).suffix)
        try:
            if file_format is None:
                table = datasets.load_dataset(self.path, self.config, split=self.split)
            elif Path(self.path).is_file() and Path(self.path).stat().st_size == 0:
                raise ConfigError("source.path", self.path, "this file is empty: it must hold at least one row")
            elif Path(self.path).is_file():
                split_name = self.split.split("[")[0]  # "train[:10]" is the first ten rows of "train"
                table = datasets.load_dataset(file_format, data_files={split_name: self.path}, split=self.split)
            else:
                raise ConfigError(
                    "source.path", self.path, "no such file: check the path (it is relative to where you run)"
                )
        except ConfigError:
            raise
        except Exception as error:  # datasets raises its own, pyarrow's, pandas' and the hub's errors
            cause = error.__cause__ or error
            reason = " ".join(str(cause).split())[:300]
            raise ConfigError("source.path", self.path, f"cannot be read: {type(cause).__name__}: {reason}") from error
        return table.select(range(min(self.limit, len(table)))) if self.limit else table

    def _value(self, row: Mapping[str, Any], number: int, setting: str, column: str) -> Any:
        value: Any = row
        for key in column.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is None or value in ("", []):
            raise ConfigError(f"source.{setting}", column, f"{self.path}, row {number}: no value there")
        return value

    def _prompt(self, question: Any, number: int) -> Any:
        if isinstance(question, str):
            return as_prompt(self.template.format(problem=question), chat=self.chat, system=self.system)
        if isinstance(question, list) and all(
            isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in question
        ):
            return [{"role": m["role"], "content": m["content"]} for m in question]
        raise ConfigError(
            "source.prompt_column",
            self.prompt_column,
            f"{self.path}, row {number}: neither text nor a list of messages",
        )
