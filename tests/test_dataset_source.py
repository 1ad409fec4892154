"""Files and hub datasets as problems: columns, answers, templates and repeated rows.

The formats, templates of one's own and limits are tested in ``test_datamodules.py``, what is said of broken files in
``test_malformed_files.py``.
"""

from __future__ import annotations

import json
import os
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.tables import write
from ibro_lightning.errors import ConfigError
from ibro_lightning.regularizers.hindsight import HindsightTemplate
from ibro_lightning.rewards.mathematics.gold_text import canonical_gold
from ibro_lightning.sources import TEMPLATES, DatasetSource, SourceReport, bare_question
from ibro_lightning.types import Prompt

DATA = Path(os.environ.get("IBRO_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no folder {DATA} (set IBRO_DATA)")

ROWS = [{"problem": "one?", "answer": "1"}, {"problem": "two?", "answer": "2"}, {"problem": "three?", "answer": "3"}]


@pytest.fixture(autouse=True)
def _own_dataset_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets_cache"))


def answers(path: str, **settings: object) -> list[object]:
    return [problem.answer for problem in DatasetSource(path, **settings).problems()]


def error(path: Path | str, **settings: object) -> str:
    """The one line that this file gets."""
    with pytest.raises(ConfigError) as caught:
        list(DatasetSource(str(path), **settings).problems())
    line = str(caught.value)
    assert "\n" not in line
    assert Path(path).name in line
    return line


class TestColumns:
    @pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
    @pytest.mark.parametrize(("question", "answer"), [("problem", "solution"), ("question", "answer")])
    def test_the_first_name_that_the_file_has_is_taken(self, tmp_path, ending, question, answer):
        path = write(tmp_path / f"aime.{ending}", [{"id": "x", question: "one?", answer: r"\boxed{033}"}])
        source = DatasetSource(path, prompt_column=["problem", "question"], answer_column=["answer", "solution"])
        assert [(p.question, p.answer) for p in source.problems()] == [("one?", "33")]

    def test_the_order_of_the_names_decides(self, tmp_path):
        path = write(tmp_path / "both.jsonl", [{"problem": "one?", "answer": "1", "solution": "2"}])
        assert answers(path, answer_column=["solution", "answer"]) == ["2"]
        assert answers(path, answer_column=["answer", "solution"]) == ["1"]

    @pytest.mark.parametrize("ending", ["jsonl", "parquet"])
    def test_nested_names_are_looked_for_in_depth(self, tmp_path, ending):
        path = write(
            tmp_path / f"n.{ending}", [{"problem": "one?", "reward": {"style": "rule", "truth": {"value": 5}}}]
        )
        assert answers(path, answer_column=["answer", "reward.gold", "reward.truth.value"]) == ["5"]

    def test_a_name_with_a_dot_in_it_is_a_column_first(self, tmp_path):
        path = write(tmp_path / "dot.jsonl", [{"problem": "one?", "a.b": "1", "a": {"b": "2"}}])
        assert answers(path, answer_column="a.b") == ["1"]

    def test_rows_of_json_lines_may_have_other_columns_besides(self, tmp_path):
        path = write(
            tmp_path / "extra.jsonl", [{**ROWS[0]}, {**ROWS[1], "source": {"a": [1]}}, {"source": 7, **ROWS[2]}]
        )
        assert answers(path) == ["1", "2", "3"]

    @pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
    def test_none_of_the_names_is_an_error_that_lists_what_there_is(self, tmp_path, ending):
        line = error(write(tmp_path / f"m.{ending}", ROWS), answer_column=["gold", "solution"])
        assert line.startswith("answer_column: ['gold', 'solution'] - ")
        assert line.endswith("has no such column: write one of ['answer', 'problem']")

    def test_no_name_at_all_is_refused(self):
        with pytest.raises(ConfigError, match=r"^prompt_column: \[\]"):
            DatasetSource("x.jsonl", prompt_column=[])

    def test_csv_text_stays_text(self, tmp_path):
        """A reader that guesses types makes 12 of 012, a float of 1e5, and nothing of None."""
        rows = [
            {"problem": f"{n}?", "answer": text}
            for n, text in enumerate(["012", "1e5", "None", "NA", "1,5", 'a "b"\nc'])
        ]
        path = write(tmp_path / "text.csv", rows)
        assert answers(path, answer_format="raw") == ["012", "1e5", "None", "NA", "1,5", 'a "b"\nc']

    def test_a_byte_order_mark_is_no_part_of_the_first_column(self, tmp_path):
        (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbfproblem,answer\r\none?,1\r\n\r\ntwo?,2\r\n")
        (tmp_path / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"problem": "one?", "answer": "1"}\r\n\r\n')
        assert answers(str(tmp_path / "bom.csv")) == ["1", "2"]
        assert answers(str(tmp_path / "bom.jsonl")) == ["1"]

    def test_a_json_file_may_hold_json_lines(self, tmp_path):
        path = tmp_path / "lines.json"
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        assert answers(str(path)) == ["1", "2", "3"]

    def test_line_separators_of_unicode_do_not_end_a_line(self, tmp_path):
        path = tmp_path / "u2028.jsonl"
        path.write_text(
            json.dumps({"problem": "one\u2028two\x85?", "answer": "1"}, ensure_ascii=False), encoding="utf-8"
        )
        assert [p.question for p in DatasetSource(str(path)).problems()] == ["one\u2028two\x85?"]

    @pytest.mark.parametrize(
        ("split", "kept"),
        [("train[1:]", "23"), ("test[:1]", "1"), ("x[-1:]", "3"), ("t[:1]+t[2:]", "13"), ("t[:34%]", "1")],
    )
    @pytest.mark.parametrize("ending", ["jsonl", "parquet"])
    def test_slices(self, tmp_path, split, kept, ending):
        assert answers(write(tmp_path / f"m.{ending}", ROWS), split=split) == list(kept)

    @pytest.mark.parametrize("split", ["train[", "train[:x]", "train+test", "[:2]"])
    def test_a_split_that_is_none_is_refused(self, tmp_path, split):
        with pytest.raises(ConfigError, match=r"^split: .*such as"):
            list(DatasetSource(write(tmp_path / "m.jsonl", ROWS), split=split).problems())

    def test_what_datasets_can_load_is_loaded_by_it(self, tmp_path):
        """A folder of parquet files stands in for the hub; its rows come in more than one batch."""
        (tmp_path / "set").mkdir()
        for shard in range(2):
            rows = [
                {"question": f"{n}?", "reward": {"gold": [{"v": n}]}} for n in range(shard * 700, shard * 700 + 700)
            ]
            write(tmp_path / "set" / f"test-{shard:05d}-of-00002.parquet", rows)
        settings = {"prompt_column": ["problem", "question"], "answer_column": "reward.gold"}
        source = DatasetSource(str(tmp_path / "set"), split="test[:1300]", **settings)
        problems = list(source.problems())
        assert [p.id for p in problems] == [f"set/{n}" for n in range(1300)]
        assert [p.answer for p in problems] == [[{"v": n}] for n in range(1300)]
        line = error(tmp_path / "set", split="validation", **settings)
        assert line.startswith("path: ")
        assert "validation" in line

    def test_a_large_parquet_file_is_read_in_batches(self, tmp_path):
        path = write(tmp_path / "large.parquet", [{"problem": f"{n}?", "answer": n} for n in range(2500)])
        assert answers(path) == [str(n) for n in range(2500)]
        assert answers(path, split="train[1998:2002]") == ["1998", "1999", "2000", "2001"]


class TestAnswers:
    SOLUTION = "First 1 + 1 = 2.\n#### 1,072"

    @pytest.mark.parametrize(
        ("value", "answer_format", "answer"),
        [
            (r"so $\boxed{\frac{1}{2}}$.", "auto", r"\frac{1}{2}"),
            (r"so $\boxed{033}$.", "boxed", "33"),
            (r"\fbox{27.0}", "boxed", "27"),
            (SOLUTION, "auto", "1072"),
            (SOLUTION, "after_hashes", "1072"),
            (SOLUTION, "raw", SOLUTION),
            (r"\boxed{1}" + "\n#### 2", "auto", "1"),
            (r"\boxed{1}" + "\n#### 2", "after_hashes", "2"),
            (r"336^\circ", "auto", "336"),
            (r"336^\circ", "raw", r"336^\circ"),
            (r"\boxed{1}", "raw", r"\boxed{1}"),
            (" 27.0 ", "raw", " 27.0 "),
            (27.0, "auto", "27"),
            (27.0, "raw", 27.0),
            (27, "auto", "27"),
            (0, "auto", "0"),
            (True, "auto", True),
            ({"numbers": [1, 2], "target": 3}, "auto", {"numbers": [1, 2], "target": 3}),
            (["a", "b"], "raw", ["a", "b"]),
        ],
    )
    def test_where_it_stands(self, tmp_path, value, answer_format, answer):
        path = write(tmp_path / "m.jsonl", [{"problem": "one?", "answer": value}])
        assert answers(path, answer_format=answer_format) == [answer]
        assert type(answers(path, answer_format=answer_format)[0]) is type(answer)

    @pytest.mark.parametrize(
        ("value", "answer_format", "reason"),
        [
            ("27", "boxed", r"no closed \boxed{} in '27'"),
            (r"\boxed{27", "auto", r"no closed \boxed{} in"),
            ("27", "after_hashes", "no line with #### in '27'"),
            ("so\n####  ", "auto", "nothing is left of the answer"),
            (r"\boxed{ }", "auto", "nothing is left of the answer"),
            ("$$", "auto", "nothing is left of the answer"),
            (27, "boxed", "a number, and answer_format boxed reads text"),
            ({"v": 1}, "after_hashes", "an object, and answer_format after_hashes reads text"),
        ],
    )
    def test_where_there_is_none_file_and_row_are_named(self, tmp_path, value, answer_format, reason):
        good = {"boxed": r"\boxed{1}", "after_hashes": "#### 1"}.get(answer_format, "1")
        rows = [{"problem": "one?", "answer": good}] * (not isinstance(value, dict))
        path = write(tmp_path / "m.jsonl", [*rows, {"problem": "two?", "answer": value}])
        line = error(path, answer_format=answer_format)
        assert line.startswith("answer_column: 'answer' - ")
        assert f"m.jsonl, line {len(rows) + 1}: {reason}" in line

    def test_real_files_mix_numbers_and_text(self, tmp_path):
        rows = [{"problem": f"{n}?", "answer": value} for n, value in enumerate([27, "27.0", 27.0, "27", "27."])]
        assert answers(write(tmp_path / "mixed.jsonl", rows)) == ["27"] * 5

    def test_dates_and_decimals_of_parquet(self, tmp_path):
        table = pa.table({"problem": ["one?"], "answer": pa.array(["27.00"]).cast(pa.decimal128(9, 2))})
        pq.write_table(table, tmp_path / "decimal.parquet")
        assert answers(str(tmp_path / "decimal.parquet")) == ["27"]


class TestRepetitions:
    def test_are_dropped_and_counted(self, tmp_path):
        source = DatasetSource(write(tmp_path / "m.jsonl", [ROWS[0], ROWS[1], ROWS[0], ROWS[2], ROWS[0]]))
        assert source.report is None
        assert [p.id for p in source.problems()] == ["m/0", "m/1", "m/3"]
        assert source.report == SourceReport(rows=5, kept=3, duplicates=2)

    def test_the_first_answer_is_kept_and_conflicts_are_counted(self, tmp_path):
        rows = [ROWS[0], {**ROWS[0], "answer": "7"}, {**ROWS[0], "answer": "1.0"}, {**ROWS[0], "answer": "1"}, ROWS[1]]
        source = DatasetSource(write(tmp_path / "m.jsonl", rows))
        assert [p.answer for p in source.problems()] == ["1", "2"]
        assert source.report == SourceReport(rows=5, kept=2, duplicates=3, conflicting=1)
        assert str(source.report) == (
            "5 rows, 2 prompts kept, 3 duplicates dropped "
            "(1 of them with another answer than the first, which was kept)"
        )

    def test_are_said_in_one_line(self, tmp_path, caplog):
        path = write(tmp_path / "m.jsonl", [ROWS[0], ROWS[0]])
        with caplog.at_level("INFO"):
            list(DatasetSource(path).problems())
        assert f"{path}: 2 rows, 1 prompts kept, 1 duplicates dropped" in [
            record.getMessage() for record in caplog.records
        ]

    def test_without_any_nothing_is_said(self, tmp_path, caplog):
        source = DatasetSource(write(tmp_path / "m.jsonl", ROWS))
        with caplog.at_level("INFO"):
            list(source.problems())
        assert source.report == SourceReport(rows=3, kept=3)
        assert not [record for record in caplog.records if "rows" in record.getMessage()]

    def test_the_limit_and_the_split_decide_what_a_row_is(self, tmp_path):
        source = DatasetSource(write(tmp_path / "m.jsonl", [*ROWS, *ROWS]), split="train[1:5]", limit=3)
        assert [p.id for p in source.problems()] == ["m/0", "m/1", "m/2"]
        assert source.report == SourceReport(rows=3, kept=3)

    @pytest.mark.parametrize("skip", [True, False])
    def test_bad_rows_are_skipped_and_counted_if_asked(self, tmp_path, skip):
        rows = [
            ROWS[0],
            {"problem": "two?"},
            {"problem": " ", "answer": "2"},
            {**ROWS[1], "answer": r"\boxed{"},
            ROWS[0],
            ROWS[2],
        ]
        source = DatasetSource(write(tmp_path / "m.jsonl", rows), skip_bad_rows=skip)
        if not skip:
            with pytest.raises(ConfigError, match=r"m\.jsonl, line 2: no value there"):
                list(source.problems())
            assert source.report is None
            return
        assert [p.id for p in source.problems()] == ["m/0", "m/5"]
        assert source.report == SourceReport(rows=6, kept=2, duplicates=1, skipped=3)
        assert str(source.report).endswith("1 duplicates dropped, 3 rows without question or answer skipped")


class TestMetaColumns:
    def test_are_kept_beside_each_problem_under_their_names(self, tmp_path):
        rows = [{**row, "level": n, "extra_info": {"index": n, "source": "x"}} for n, row in enumerate(ROWS)]
        path = write(tmp_path / "m.jsonl", rows)
        problems = list(DatasetSource(path, meta_columns=["level", "extra_info.index", "extra_info"]).problems())
        assert [p.meta for p in problems] == [
            {"level": n, "extra_info.index": n, "extra_info": {"index": n, "source": "x"}} for n in range(3)
        ]
        assert [p.meta for p in DatasetSource(path).problems()] == [{}] * 3

    def test_one_name_is_a_list_of_one(self, tmp_path):
        path = write(tmp_path / "m.csv", [{**row, "level": "hard"} for row in ROWS])
        assert {p.meta["level"] for p in DatasetSource(path, meta_columns="level").problems()} == {"hard"}

    def test_a_row_without_one_has_none(self, tmp_path):
        rows = [ROWS[0], {**ROWS[1], "extra": {"level": 2}}, {**ROWS[2], "extra": None}]
        path = write(tmp_path / "m.jsonl", rows)
        problems = DatasetSource(path, meta_columns=["extra.level"]).problems()
        assert [p.meta["extra.level"] for p in problems] == [None, 2, None]

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("levle", "did you mean 'level'?"),
            ("levle.x", "did you mean 'level.x'?"),
            ("extra_info.indx", "did you mean 'extra_info.index'?"),
            ("level.deep", "write one of"),
            ("nothing", "write one of"),
        ],
    )
    @pytest.mark.parametrize("ending", ["jsonl", "parquet"])
    def test_a_column_that_does_not_exist_is_answered_with_the_nearest(self, tmp_path, name, hint, ending):
        rows = [{**row, "level": 1, "extra_info": {"index": 1}} for row in ROWS]
        path = write(tmp_path / f"m.{ending}", rows)
        with pytest.raises(ConfigError) as refused:
            list(DatasetSource(path, meta_columns=[name]).problems())
        assert str(refused.value).startswith(f"meta_columns: {name!r} - {path} has no such column: {hint}")

    def test_values_are_plain_json(self, tmp_path):
        day, nan = datetime(2026, 1, 2, 3, 4, 5), float("nan")
        beside = {
            "day": day,
            "price": Decimal("1.50"),
            "missing": nan,
            "deep": {"days": [day.date(), None], "ok": True},
            "long": timedelta(minutes=1),
        }
        path = write(tmp_path / "m.parquet", [{**ROWS[0], **beside}])
        (problem,) = DatasetSource(path, meta_columns=list(beside)).problems()
        assert problem.meta == {
            "day": "2026-01-02T03:04:05",
            "price": 1.5,
            "missing": None,
            "deep": {"days": ["2026-01-02", None], "ok": True},
            "long": 60.0,
        }
        assert json.loads(json.dumps(problem.meta, allow_nan=False)) == problem.meta

    def test_bytes_are_refused_with_their_row(self, tmp_path):
        path = write(tmp_path / "m.parquet", [{**row, "image": {"bytes": b"PNG"}} for row in ROWS])
        with pytest.raises(ConfigError, match=r"meta_columns: 'image' - .*data row 1: a value of type bytes cannot be"):
            list(DatasetSource(path, meta_columns=["image"]).problems())

    @pytest.mark.parametrize("names", [["level", "level"], [""], [7]])
    def test_each_is_named_once(self, names):
        with pytest.raises(ConfigError, match=r"^meta_columns: "):
            DatasetSource("x.jsonl", meta_columns=names)

    def test_hindsight_templates_and_rewards_find_them(self, tmp_path):
        path = write(tmp_path / "m.jsonl", [{**ROWS[0], "extra": {"way": "1 = 1"}}])
        (problem,) = DatasetSource(path, meta_columns=["extra.way"], chat=False).problems()
        prompt = Prompt(problem.id, "", (1,), problem.answer, problem.meta, problem.prompt)
        assert HindsightTemplate("{prompt} {meta[extra.way]}").content(prompt) == "one? 1 = 1"


class TestTemplates:
    @pytest.mark.parametrize("name", sorted(TEMPLATES))
    def test_a_name_is_a_template_that_can_be_taken_off(self, tmp_path, name):
        question = r"What is $\frac{1}{2}$ of {problem} {} {{2}}?"
        path = write(tmp_path / "m.jsonl", [{"problem": question, "answer": "1"}])
        (problem,) = DatasetSource(path, template=name, chat=False).problems()
        assert problem.prompt == TEMPLATES[name].format(problem=question)
        assert problem.question == question
        assert bare_question(problem.prompt) == bare_question(f"\n{problem.prompt} ").strip() == question

    def test_boxed_asks_for_a_box(self):
        asked = TEMPLATES["boxed"].format(problem="one?")
        assert asked == "one?\nPlease reason step by step, and put your final answer within \\boxed{}."

    @pytest.mark.parametrize(
        "text", ["one?", "", "Solve the following math problem step by step.", TEMPLATES["dapo"][:150]]
    )
    def test_other_text_is_its_own_question(self, text):
        assert bare_question(text) == text

    def test_the_question_of_a_template_of_ones_own_is_the_problem(self, tmp_path):
        path = write(tmp_path / "m.jsonl", ROWS[:1])
        (problem,) = DatasetSource(path, template="Q: {problem} {{A}}", system="be kind").problems()
        assert problem.prompt[-1] == {"role": "user", "content": "Q: one? {A}"}
        assert problem.question == "one?"

    def test_the_question_of_a_chat_list_is_its_last_message_without_the_template(self, tmp_path):
        messages = [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": TEMPLATES["dapo"].format(problem="one?")},
        ]
        path = write(tmp_path / "m.jsonl", [{"problem": messages, "answer": "1"}])
        (problem,) = DatasetSource(path).problems()
        assert problem.prompt == messages
        assert problem.question == "one?"

    def test_a_name_that_does_not_exist_is_answered_with_those_that_do(self):
        with pytest.raises(ConfigError, match=r"^template: 'dpao' - write one of plain, dapo, boxed, or a text"):
            DatasetSource("x.jsonl", template="dpao")


@needs_data
class TestRealFiles:
    DAPO = dict(prompt_column="prompt", answer_column="reward_model.ground_truth")  # noqa: C408, RUF012

    def test_dapo_rows_are_counted(self):
        source = DatasetSource(str(DATA / "dapo_math_17k_sample.parquet"), **self.DAPO)
        problems = list(source.problems())
        assert source.report == SourceReport(rows=192, kept=64, duplicates=128)
        assert str(source.report) == "192 rows, 64 prompts kept, 128 duplicates dropped"
        rows = [json.loads(line) for line in (DATA / "dapo_math_17k_64.jsonl").open(encoding="utf-8")]
        assert [(p.question, p.answer) for p in problems] == [(row["problem"].strip(), row["answer"]) for row in rows]

    def test_the_named_template_is_the_published_one_word_for_word(self):
        published = DatasetSource(str(DATA / "dapo_math_17k_sample.parquet"), **self.DAPO)
        ours = DatasetSource(str(DATA / "dapo_math_17k_64.jsonl"), template="dapo")
        assert [p.prompt for p in published.problems()] == [p.prompt for p in ours.problems()]

    @pytest.mark.parametrize(
        ("name", "rows"), [("aime24", 30), ("aime25", 30), ("amc23", 40), ("math500_first250", 250)]
    )
    def test_evaluation_sets(self, name, rows):
        source = DatasetSource(str(DATA / f"{name}.jsonl"), template="dapo")
        problems = list(source.problems())
        assert source.report == SourceReport(rows=rows, kept=rows)
        golds = [json.loads(line)["answer"] for line in (DATA / f"{name}.jsonl").open(encoding="utf-8")]
        assert [p.answer for p in problems] == [canonical_gold(gold) for gold in golds]
        if name != "math500_first250":
            assert [p.answer for p in problems] == golds

    def test_a_truncated_copy_is_named(self, tmp_path):
        content = (DATA / "dapo_math_17k_sample.parquet").read_bytes()
        (tmp_path / "dapo.parquet").write_bytes(content[: len(content) // 2])
        assert "truncated: its 8280 bytes" in error(tmp_path / "dapo.parquet", **self.DAPO)


def test_an_unknown_answer_format_is_refused() -> None:
    """From Python nothing else would check it, and every answer would be taken whole."""
    with pytest.raises(ConfigError, match=r"^answer_format: 'box' - write auto or boxed or raw or after_hashes"):
        DatasetSource("x.jsonl", answer_format="box")  # type: ignore[arg-type]
