"""What is wrong with a file is said in one line: which file, and row and column as far as the damage leaves them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.tables import write
from ibro_lightning.errors import ConfigError
from ibro_lightning.sources import DatasetSource

ROWS = [{"problem": "one?", "answer": "1"}, {"problem": "two?", "answer": "2"}, {"problem": "three?", "answer": "3"}]

REPAIR = ": repair the row, or write skip_bad_rows: true"


def error(path: Path | str, **settings: object) -> str:
    """The one line that this file gets."""
    with pytest.raises(ConfigError) as caught:
        list(DatasetSource(str(path), **settings).problems())
    line = str(caught.value)
    assert "\n" not in line
    assert Path(path).name in line
    return line


class TestMalformedFiles:
    @pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
    def test_missing_column(self, tmp_path, ending):
        line = error(write(tmp_path / f"m.{ending}", ROWS), answer_column="gold")
        assert line == (
            f"answer_column: 'gold' - {tmp_path}/m.{ending} has no such column: write one of ['answer', 'problem']"
        )

    @pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
    @pytest.mark.parametrize("nothing", [None, "", "  \n "])
    @pytest.mark.parametrize("column", ["problem", "answer"])
    def test_empty_question_or_answer(self, tmp_path, ending, nothing, column):
        line = error(write(tmp_path / f"m.{ending}", [ROWS[0], ROWS[1], {**ROWS[2], column: nothing}]))
        setting = {"problem": "prompt_column", "answer": "answer_column"}[column]
        where = "line 3" if ending == "jsonl" else "data row 3"
        assert line == f"{setting}: '{column}' - {tmp_path}/m.{ending}, {where}: no value there{REPAIR}"

    @pytest.mark.parametrize("nothing", [[], {}, float("nan")])
    def test_other_kinds_of_nothing(self, tmp_path, nothing):
        line = error(write(tmp_path / "m.jsonl", [{"problem": "one?", "answer": nothing}]))
        assert "m.jsonl, line 1: " in line
        assert "no value" in line

    def test_a_column_that_a_row_lacks(self, tmp_path):
        line = error(write(tmp_path / "m.jsonl", [ROWS[0], {"problem": "two?"}]))
        assert line.endswith(f"m.jsonl, line 2: no value there{REPAIR}")

    def test_blank_lines_count_as_lines(self, tmp_path):
        (tmp_path / "m.jsonl").write_text('{"problem": "one?", "answer": "1"}\n\n\n{"problem": "two?", "answer": ""}\n')
        assert "m.jsonl, line 4: no value" in error(tmp_path / "m.jsonl")

    @pytest.mark.parametrize(
        ("name", "content", "where"),
        [
            ("m.jsonl", b'{"problem": "a?", "answer": "1"}\n{"problem": "caf\xe9?", "answer": "2"}\n', "byte 17"),
            ("m.csv", b"problem,answer\ncaf\xe9?,2\n", "byte 4"),
            (
                "m.json",
                b'[{"problem": "a?", "answer": "1"},\n{"problem": {"text": "caf\xe9?"}, "answer": "2"}]',
                "byte 26",
            ),
        ],
    )
    def test_not_utf8(self, tmp_path, name, content, where):
        (tmp_path / name).write_bytes(content)
        expected = (
            f"cannot be read: line 2, column 'problem': {where} of the line (0xe9) is not UTF-8: convert the file"
        )
        assert error(tmp_path / name).endswith(expected)

    def test_not_utf8_in_the_middle_of_nowhere(self, tmp_path):
        (tmp_path / "m.jsonl").write_bytes(bytes(range(256)))
        assert "line 2: byte 118 of the line (0x80) is not UTF-8" in error(tmp_path / "m.jsonl")

    @pytest.mark.parametrize("cut", [1, 4, 100])
    def test_truncated_parquet(self, tmp_path, cut):
        path = Path(write(tmp_path / "m.parquet", ROWS))
        path.write_bytes(path.read_bytes()[:-cut])
        assert "truncated: its" in error(path)
        assert "copy the file again" in error(path)

    def test_parquet_with_a_damaged_footer(self, tmp_path):
        path = Path(write(tmp_path / "m.parquet", ROWS))
        content = path.read_bytes()
        path.write_bytes(content[:-100] + b"\xff" * 92 + content[-8:])
        assert "its footer is damaged" in error(path)

    def test_parquet_with_damaged_data_says_after_which_row(self, tmp_path):
        path = tmp_path / "m.parquet"
        table = pa.Table.from_pylist([{"problem": f"{n}?", "answer": str(n)} for n in range(3000)])
        pq.write_table(table, path, row_group_size=1000, compression="snappy", use_dictionary=False)
        second = pq.ParquetFile(path).metadata.row_group(1).column(0)
        content = bytearray(path.read_bytes())
        start = second.data_page_offset
        content[start : start + second.total_compressed_size] = b"\xff" * second.total_compressed_size
        path.write_bytes(bytes(content))
        assert "damaged after data row 1000, in column problem, answer" in error(path)

    def test_something_else_with_this_ending(self, tmp_path):
        (tmp_path / "m.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
        assert "this is no parquet file" in error(tmp_path / "m.parquet")

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (
                '{"problem": "one?", "answer": "1"}\n{"problem": "two?", "ans',
                "line 2, character 21: Unterminated string",
            ),
            (
                '{"problem": "one?", "answer": "1"}\n{"problem": \n',
                "line 2, character 13: Expecting value, it ends too early",
            ),
            ('{"problem": "one?" "answer": "1"}\n', "line 1, character 20: Expecting ',' delimiter"),
            ('{"problem": "one?", "answer": "1"}\n[1, 2]\n', 'line 2 is no object: write {"problem": …, "answer": …}'),
            ('{"problem": "one?", "answer": ' + "9" * 5000 + "}", "line 1: ValueError: Exceeds the limit"),
            ("[" * 100_000, "line 1: RecursionError"),
        ],
        ids=range(6),
    )
    def test_json_lines_that_are_none(self, tmp_path, content, reason):
        (tmp_path / "m.jsonl").write_text(content)
        assert f"cannot be read: {reason}" in error(tmp_path / "m.jsonl")

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (
                '[{"problem": "one?", "answer": "1"},\n{"problem": "two?"',
                "line 2, character 19: Expecting ',' delimiter, it ends",
            ),
            ('[{"problem": "one?", "answer": "1"}, 7]', "data row 2 is no object"),
            ('{"problem": "one?", "answer": "1"}\n{"problem": ', "line 2, character 13"),
            ("[" * 100_000, "RecursionError"),
        ],
        ids=range(4),
    )
    def test_json_that_is_none(self, tmp_path, content, reason):
        (tmp_path / "m.json").write_text(content)
        assert f"cannot be read: {reason}" in error(tmp_path / "m.json")

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ("problem,answer\none?,1\ntwo?,2,3\n", "data row 2 (line 3) has 3 fields, the header 2 (problem, answer)"),
            ("problem,answer\none?\n", "data row 1 (line 2) has 1 fields"),
            ('problem,answer\n"one?,1\n', "line 2: unexpected end of data"),
            ("problem,answer,answer\none?,1,2\n", "line 1: several columns are called 'answer'"),
        ],
    )
    def test_csv_that_is_none(self, tmp_path, content, reason):
        (tmp_path / "m.csv").write_text(content)
        assert f"cannot be read: {reason}" in error(tmp_path / "m.csv")

    @pytest.mark.parametrize(
        ("name", "content"),
        [("m.jsonl", ""), ("m.jsonl", "\n\n"), ("m.json", "[]"), ("m.csv", "problem,answer\n"), ("m.parquet", "")],
    )
    def test_empty(self, tmp_path, name, content):
        (tmp_path / name).write_text(content)
        assert "this file is empty" in error(tmp_path / name)

    def test_parquet_without_rows(self, tmp_path):
        pq.write_table(
            pa.table({"problem": pa.array([], pa.string()), "answer": pa.array([], pa.string())}),
            tmp_path / "m.parquet",
        )
        assert "this file is empty: it has no rows" in error(tmp_path / "m.parquet")

    MESSAGES = [{"role": "user", "content": "one?"}]  # noqa: RUF012

    @pytest.mark.parametrize(
        ("column", "first", "other", "kinds"),
        [
            ("answer", 1, [[2]], "a list here, but a plain value in line 1"),
            ("answer", [True], "2", "a plain value here, but a list in line 1"),
            ("answer", {"v": 1}, ["2"], "a list here, but an object in line 1"),
            ("problem", "one?", {"text": "two?"}, "an object here, but text in line 1"),
            ("problem", "one?", 2, "a number here, but text in line 1"),
            ("problem", "one?", MESSAGES, "a list here, but text in line 1"),
            ("problem", MESSAGES, "two?", "text here, but a list in line 1"),
        ],
    )
    def test_mixed_types(self, tmp_path, column, first, other, kinds):
        rows = [{"problem": f"{n}?", "answer": str(n), column: first} for n in range(7)]
        rows = [{**row, "problem": f"{row['problem']}{n}"} if column == "problem" and isinstance(first, str) else row
                for n, row in enumerate(rows)]  # fmt: skip
        line = error(write(tmp_path / "m.jsonl", [*rows[:6], {**rows[6], column: other}]))
        assert line.endswith(f"m.jsonl, line 7: {kinds}: types must not be mixed in a column")
        assert f"_column: '{column}'" in line

    @pytest.mark.parametrize(
        ("message", "reason"),
        [
            ({"role": "user"}, "message 2 has no content"),
            ({"content": "one?"}, "message 2 has no role: write {role: user, content: ...}"),
            ({"role": "user", "content": None}, "message 2 has no content"),
            ({"role": "user", "content": [{"url": "x"}]}, "message 2 contains something other than text"),
            ({"role": "user", "content": " "}, "message 2 is empty"),
        ],
    )
    @pytest.mark.parametrize("ending", ["jsonl", "parquet"])
    def test_chat_lists_that_are_none(self, tmp_path, message, reason, ending):
        system = {"role": "system", "content": "be kind"}
        if isinstance(message.get("content"), list):  # in parquet all contents have one type
            system["content"] = message["content"] if ending == "parquet" else "be kind"
            reason = reason.replace("2", "1") if ending == "parquet" else reason
        rows = [{"problem": [system, message], "answer": "1"}]
        line = error(write(tmp_path / f"m.{ending}", rows))
        where = "line 1" if ending == "jsonl" else "data row 1"
        assert line.startswith("prompt_column: 'problem' - ")
        assert f"m.{ending}, {where}: " in line
        assert line.removesuffix(REPAIR).endswith(reason)

    def test_half_a_surrogate_pair(self, tmp_path):
        """No tokenizer takes it, and the tokenizer's error would not say where it is."""
        (tmp_path / "m.jsonl").write_text('{"problem": "one \\ud83d?", "answer": "1"}\n')
        assert "prompt_column: 'problem' - " in error(tmp_path / "m.jsonl")
        assert "line 1: it holds half a surrogate pair" in error(tmp_path / "m.jsonl")


def test_parquet_that_is_not_utf8_names_row_and_column(tmp_path: Path) -> None:
    """pyarrow trusts the writer; copying the file again, the remedy for damage, would not help."""
    raw = pa.array([b"1+1?", b"caf\xe9?", b"2+2?"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    path = tmp_path / "bad.parquet"
    pq.write_table(pa.table({"problem": text, "answer": ["2", "3", "4"]}), path)
    with pytest.raises(ConfigError, match=r"bad.parquet.*data row 2, column 'problem': not UTF-8: convert the file"):
        list(DatasetSource(str(path)).problems())


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl.gz", "x"])
def test_a_file_with_another_ending_is_not_looked_for_on_the_hub(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"problem": "1+1?", "answer": "2"}\n')
    with pytest.raises(ConfigError, match=r"^path: .* - write a .jsonl, .json, .csv or .parquet file"):
        list(DatasetSource(str(tmp_path / name)).problems())


def test_endings_may_be_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "X.JSONL").write_text('{"problem": "1+1?", "answer": "2"}\n')
    assert [problem.answer for problem in DatasetSource(str(tmp_path / "X.JSONL")).problems()] == ["2"]


def test_a_long_field_of_a_csv_file_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "long.csv").write_text(f"problem,answer\n{'1+' * 100_000}1,100001\n")
    assert [problem.answer for problem in DatasetSource(str(tmp_path / "long.csv")).problems()] == ["100001"]
