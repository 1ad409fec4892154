"""Columns of mixed types, which ``datasets`` stores as JSON: what was written is what is handed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from ibro_lightning.sources import DatasetSource
from ibro_lightning.sources.files import open_table
from ibro_lightning.sources.json_columns import json_value, rows_of

GOLDS: list[Any] = [
    *("007", 12, "null", "forty", "\\frac{1}{2}", "1e5", True, 1.5, "1.50", 1e20, 12345678901234567890, "a/b", "é"),
    *('12 "x"', "[1, 2]", [1, 2], ["1", 2], {"a": "x/y"}, None, -3, 2.0, ["12"], "", " ", "NaN", "3 apples"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``lines/train.jsonl``, and ``mixed.parquet`` that datasets made of it: at the top, in an object, in a list."""
    folder = tmp_path_factory.mktemp("json")
    (folder / "lines").mkdir()
    rows = [
        {"problem": f"{n}?", "answer": gold, "reward_model": {"ground_truth": gold}, "tests": [{"gold": gold}]}
        for n, gold in enumerate(GOLDS)
    ]
    (folder / "lines" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = datasets.load_dataset(str(folder / "lines"), split="train", cache_dir=str(folder / "cache"))
    data.to_parquet(str(folder / "mixed.parquet"))
    return folder


def exact(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"


@pytest.mark.parametrize("name", ["mixed.parquet", "lines", "lines/train.jsonl"])
@pytest.mark.parametrize("place", ["answer", "reward_model", "tests"])
def test_what_was_written_is_read_by_either_reader(
    written: Path, name: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", written / "cache")
    table, _ = open_table(str(written / name), None, "train")
    found = [row[place] for _, row in table.rows([place])]
    if place == "reward_model":
        found = [value["ground_truth"] for value in found]
    elif place == "tests":
        found = [value[0]["gold"] for value in found]
    assert list(map(exact, found)) == list(map(exact, GOLDS))


def test_the_file_holds_json_text_as_arrow_knows_it(written: Path) -> None:
    """What the test above would prove nothing without."""
    schema = pq.read_schema(written / "mixed.parquet")
    assert str(schema.field("answer").type) == "extension<arrow.json>"
    assert pq.read_table(written / "mixed.parquet")["answer"].to_pylist()[3] == '"forty"'


def test_golds_of_such_a_file_are_answers(written: Path, tmp_path: Path) -> None:
    table = pq.read_table(written / "mixed.parquet").slice(0, 6)
    pq.write_table(table, tmp_path / "part.parquet")
    problems = DatasetSource(str(tmp_path / "part.parquet"), answer_column="reward_model.ground_truth").problems()
    assert [problem.answer for problem in problems] == ["7", "12", "null", "forty", "\\frac{1}{2}", "1e5"]


def test_in_files_of_others_null_is_nothing(tmp_path: Path) -> None:
    table = pa.table({"answer": pa.array(['"forty"', "null", None, "7"], pa.json_())})
    pq.write_table(table, tmp_path / "other.parquet")
    read, _ = open_table(str(tmp_path / "other.parquet"), None, "train")
    assert [row["answer"] for _, row in read.rows(["answer"])] == ["forty", None, None, 7]


def test_columns_that_are_no_json_are_left_alone() -> None:
    batch = pa.table({"answer": ['"forty"', "007"], "n": [1, 2]})
    assert rows_of(batch) == batch.to_pylist()


PAIR, READ = ['"forty"', "7"], ["forty", 7]


@pytest.mark.parametrize(
    ("kind", "stored", "value"),
    [
        (lambda text: pa.list_(text), PAIR, READ),
        (lambda text: pa.large_list(text), PAIR, READ),
        (lambda text: pa.list_(text, 2), PAIR, READ),
        (lambda text: pa.struct([("a", pa.list_(text))]), {"a": PAIR}, {"a": READ}),
        (lambda text: pa.map_(pa.string(), text), [("x", PAIR[0]), ("y", "7")], [("x", "forty"), ("y", 7)]),
        (
            lambda text: pa.list_(pa.struct([("a", text), ("b", pa.string())])),
            [{"a": '"forty"', "b": '"x"'}, {"a": "7", "b": None}],
            [{"a": "forty", "b": '"x"'}, {"a": 7, "b": None}],
        ),
    ],
)
def test_nested_in_anything(kind: Any, stored: Any, value: Any) -> None:
    column = pa.array([stored, None], kind(pa.string())).cast(kind(pa.json_()))
    assert [row["c"] for row in rows_of(pa.table({"c": column}))] == [value, None]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=5,
    )
)
@examples(max_examples=100, deadline=None)
def test_json_comes_back_as_it_was(value: Any) -> None:
    assert json_value(json.dumps(value, separators=(",", ":"))) == value
