"""BIG-bench Hard and StrategyQA in the formats in which they are published, and the recipes that read them.

The files in ``data/published`` have the formats of the published ones, and questions of our own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from helpers.tables import write
from ibro_lightning.cli.main import main
from ibro_lightning.errors import ConfigError
from ibro_lightning.rewards import MathVerifyReward
from ibro_lightning.runs.recipes import find_config
from ibro_lightning.sources import DatasetSource
from ibro_lightning.types import Completion, Prompt

PUBLISHED = Path(__file__).parent / "data" / "published"
THREE, FIVE = (PUBLISHED / f"logical_deduction_{count}_objects.json" for count in ("three", "five"))
STRATEGY_QA = PUBLISHED / "strategyqa_train.json"
ANSWERS = [*(f"Answer: ({letter})" for letter in "ABCDE"), "Answer: yes", "Answer: no"]


def source_of(recipe: str, **changes: Any) -> DatasetSource:
    """The recipe's own training source, from another path."""
    settings = yaml.safe_load(find_config(recipe).read_text())["data"]["init_args"]["source"]["init_args"]
    return DatasetSource(**{**settings, **changes})


def judged(gold: Any, response: str) -> float:
    prompt = Prompt("a", "", (1,), gold, {}, "")
    return MathVerifyReward().verify(prompt, Completion((), (), "stop", response, 1, 0)).accuracy


# The formats.


def test_the_published_file_of_big_bench_hard_holds_its_rows_in_examples() -> None:
    problems = list(source_of("bbh_logical_deduction.yaml", path=str(THREE)).problems())
    rows = json.loads(THREE.read_text())["examples"]
    assert [problem.question for problem in problems] == [row["input"] for row in rows]
    assert [problem.answer for problem in problems] == ["(B)", "(C)", "(A)", "(C)", "(A)", "(B)"]
    assert problems[0].id == "logical_deduction_three_objects/0"
    assert "(C) The paper lamp is the leftmost\nThink step by step" in problems[0].prompt[0]["content"]


@pytest.mark.parametrize("ending", ["parquet", "json", "jsonl", "csv"])
def test_the_recipe_reads_a_plain_table_of_the_same_rows_too(tmp_path: Path, ending: str) -> None:
    """As the hub's copies are, whose columns are input and target."""
    path = write(tmp_path / f"three.{ending}", json.loads(THREE.read_text())["examples"])
    found = [problem.answer for problem in source_of("bbh_logical_deduction.yaml", path=path).problems()]
    assert found == ["(B)", "(C)", "(A)", "(C)", "(A)", "(B)"]


def test_the_published_file_of_strategy_qa_says_yes_and_no() -> None:
    train = list(source_of("strategy_qa.yaml", path=str(STRATEGY_QA)).problems())
    heldout = list(source_of("strategy_qa.yaml", path=str(STRATEGY_QA), split="train[90%:]").problems())
    assert [problem.answer for problem in train] == ["no", "yes", "no", "yes", "no", "yes", "no", "yes", "yes"]
    assert [problem.answer for problem in heldout] == ["no"]
    assert train[0].question == "Would a snowman outlast a summer afternoon in Cairo?"


def test_the_recipe_reads_truth_values_of_parquet_too(tmp_path: Path) -> None:
    rows = [{name: row[name] for name in ("question", "answer")} for row in json.loads(STRATEGY_QA.read_text())]
    path = write(tmp_path / "train.parquet", rows)
    found = [problem.answer for problem in source_of("strategy_qa.yaml", path=path).problems()]
    assert found == ["no", "yes", "no", "yes", "no", "yes", "no", "yes", "yes"]


# Their settings.


def answers(path: Path, **settings: Any) -> list[Any]:
    return [problem.answer for problem in DatasetSource(str(path), **settings).problems()]


def refusal(path: Path, **settings: Any) -> str:
    with pytest.raises(ConfigError) as error:
        answers(path, **settings)
    return str(error.value)


def table(folder: Path, content: Any) -> Path:
    path = folder / "table.json"
    path.write_text(json.dumps(content))
    return path


ROWS = [{"problem": "one?", "answer": 1}, {"problem": "two?", "answer": 2}]


def test_a_field_may_lie_deeper_and_a_key_with_a_dot_comes_first(tmp_path: Path) -> None:
    assert answers(table(tmp_path, {"data": {"train": ROWS}}), field="data.train") == ["1", "2"]
    assert answers(table(tmp_path, {"data.train": ROWS[1:], "data": {"train": ROWS}}), field="data.train") == ["2"]


def test_an_object_is_one_row_without_a_field(tmp_path: Path) -> None:
    assert answers(table(tmp_path, {**ROWS[0], "facts": ["a"]})) == ["1"]


def test_a_field_that_holds_no_rows_is_refused(tmp_path: Path) -> None:
    path = table(tmp_path, {"version": 1, "rows": ROWS, "data": {"x": 3}})
    for field in ("examples", "version", "data.x", "rows.0"):
        said = refusal(path, field=field)
        assert said.startswith(f"field: {field!r} - ")
        assert said.endswith("has no list of rows there: write rows")
    assert "write null" in refusal(table(tmp_path, ROWS[0]), field="examples")
    assert "data row 2 is no object" in refusal(table(tmp_path, {"rows": [ROWS[0], 7]}), field="rows")


def test_a_column_that_lies_in_a_list_is_refused_with_the_name_of_the_list() -> None:
    said = refusal(THREE, prompt_column="input", answer_column="target")
    assert said.startswith("prompt_column: 'input' - ")
    assert said.endswith("write one of ['canary', 'examples'], or field: examples if the rows are in that list")


@pytest.mark.parametrize(
    ("given", "words", "stored"),
    [
        ([True, False], {True: "yes", False: "no"}, ["yes", "no"]),  # as YAML reads {true: "yes"}
        ([True, False], {"true": "yes", "false": "no"}, ["yes", "no"]),
        ([0, 1], {"0": "no", "1": "yes"}, ["no", "yes"]),
        ([0, 1.0], {0: "no", 1: "yes"}, ["no", "yes"]),
        (["entailment", " neutral "], {"entailment": "A", "neutral": "B"}, ["A", "B"]),
        ([["A", "B"], ["B"]], {"A": "first", "B": "second"}, [["first", "second"], "second"]),
    ],
)
def test_answers_are_stored_in_the_words_of_the_recipe(
    tmp_path: Path, given: list[Any], words: dict[Any, str], stored: list[Any]
) -> None:
    path = table(tmp_path, [{"problem": f"{number}?", "answer": answer} for number, answer in enumerate(given)])
    assert answers(path, answer_words=words) == stored


def test_an_answer_without_a_word_is_refused(tmp_path: Path) -> None:
    path = table(tmp_path, [{"problem": "one?", "answer": True}, {"problem": "two?", "answer": "unknown"}])
    said = refusal(path, answer_words={True: "yes", False: "no"})
    assert said.startswith("answer_column: 'answer' - ")
    assert said.endswith("data row 2: answer_words has no word for 'unknown', only for true, false: write one")


@pytest.mark.parametrize("words", [{}, ["yes"], {True: True, False: False}, {"a": " "}, {"a": 3}])
def test_words_that_are_none_are_refused(words: Any) -> None:
    """YAML reads yes and no without quotes as true and false."""
    with pytest.raises(ConfigError, match=r'^answer_words: .*true: "yes", false: "no"'):
        DatasetSource("x.json", answer_words=words)


# The verifier of both recipes.


@pytest.mark.parametrize(
    ("gold", "response"),
    [
        *(
            ("(B)", f"So B it is.\n{answer}")
            for answer in ("Answer: (B)", "Answer: B", "**Answer:** (B).", r"\boxed{B}")
        ),
        *(("yes", f"I think so.\n{answer}") for answer in ("Answer: yes", "Answer: Yes.", "The answer is yes.")),
        ("no", "Answer: No"),
    ],
)
def test_a_letter_or_a_word_is_right_in_any_usual_spelling(gold: str, response: str) -> None:
    assert judged(gold, response) == 1.0


@pytest.mark.parametrize(
    ("gold", "response"),
    [
        *(
            ("(B)", answer)
            for answer in ("Answer: (A)", "Answer: (A) or (B)", "Answer: A, B", "Answer: (A)(B)", "(B)?")
        ),
        ("(B)", "Answer: (B)\nNo.\nAnswer: (A)"),
        *(("yes", answer) for answer in ("Answer: no", "Answer: yes or no", "Answer: yes/no", "Answer: not yes", "")),
        ("no", "Answer: yes, no"),
    ],
)
def test_another_one_is_wrong_and_so_are_several(gold: str, response: str) -> None:
    assert judged(gold, response) == 0.0


# The recipes.


@pytest.fixture(scope="module")
def guesser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model whose only words are answers, one token each, which it gives at random."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_tokens([AddedToken(answer, normalized=False) for answer in ANSWERS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, eos_token_id=1, pad_token_id=1, **sizes)
    folder = tmp_path_factory.mktemp("guesser")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("recipe", "files", "golds", "evaluated"),
    [
        ("bbh_logical_deduction", {"IBRO_BBH_THREE": THREE, "IBRO_BBH_FIVE": FIVE}, {"(A)", "(B)", "(C)"}, 2),
        pytest.param(
            *("strategy_qa", {"IBRO_STRATEGY_QA": STRATEGY_QA}, {"yes", "no"}, 1),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_recipe_learns_from_the_published_files(
    recipe: str,
    files: dict[str, Path],
    golds: set[str],
    evaluated: int,
    guesser: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for variable, path in files.items():
        monkeypatch.setenv(variable, str(path))
    few = ["--trainer.max_epochs", "2", "--trainer.check_val_every_n_epoch", "2", "--trainer.accelerator", "cpu"]
    small = ["--data.sampling.max_tokens", "32", "--data.prompts_per_rollout", "6", "--data.reward_pool", "null"]
    main(["fit", "--config", f"{recipe}.yaml", "--model.policy", str(guesser), *few, *small])
    run = tmp_path / "runs" / recipe
    rollouts = pandas.read_parquet(run / "rollouts")
    rollouts["gold"] = rollouts.answer.map(json.loads)
    assert set(rollouts.gold) == golds
    assert 0 < rollouts.reward_accuracy.mean() < 1, "the policy guesses"
    right = rollouts[rollouts.reward_accuracy == 1]
    assert (right.answer_read.str.strip("()\"'") == right.gold.str.strip("()")).all()
    assert sorted(rollouts[rollouts.trained_on].iteration.unique()) == [1, 2]
    before, after = (load_file(folder / "model.safetensors") for folder in (guesser, run / "model"))
    assert any(not torch.equal(before[name], after[name]) for name in before), "nothing was learned"
    (evaluation,) = json.loads((run / "evaluations" / "iteration_000002.json").read_text()).values()
    assert evaluation["questions"] == evaluated
