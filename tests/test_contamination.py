"""Problems that are trained and evaluated on: found by their normalised text, and named."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ibro_lightning.datamodules import EvalSet, RolloutDataModule
from ibro_lightning.errors import ConfigError
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.rewards import VerifiableReward
from ibro_lightning.sources import TEMPLATES, DatasetSource, Overlap, PromptSource, overlaps
from ibro_lightning.sources.contamination import TrainingTexts, normalized
from ibro_lightning.tasks import NumberPathSource, SumsSource
from ibro_lightning.types import Problem, Prompt

DATA = Path(os.environ.get("IBRO_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no folder {DATA} (set IBRO_DATA)")

LONG = r"Let $ABC$ be a triangle with $AB = 5$ and $BC = 9$. Find $AP$, where $P$ is the foot of its altitude."


def prompt(prompt_id: str, question: str, text: str | None = None) -> Prompt:
    return Prompt(prompt_id, question if text is None else text, (1,), None, question=question)


def found(evaluated: Prompt, *trained: Prompt) -> str | None:
    """The training prompt that has the question of the evaluation prompt."""
    hits = overlaps([evaluated], trained)
    return hits[0].train_id if hits else None


class TestNormalized:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("What is 3 + 5?", "what is 3 + 5"),
            ("  Two\n\nlines,\tand  gaps. ", "two lines and gaps"),
            (r"$\frac{1}{2}$", "frac 1 2"),
            ("x_1", "x 1"),
            ("12>41:", "12>41"),
            ("a*b/c=d<e>f^g-h+i", "a*b/c=d<e>f^g-h+i"),
            ("ﬁve Straße", "five strasse"),
            ("３", "3"),
            ("数学?", "数学"),
            ("?!", ""),
            ("", ""),
        ],
    )
    def test_what_remains(self, text, expected):
        assert normalized(text) == expected

    @pytest.mark.parametrize(
        "other",
        [
            LONG.upper(),
            LONG.replace(" ", "\n"),
            LONG.replace("$", ""),
            LONG.replace("$ABC$", r"\(ABC\)"),
            LONG.replace(". Find", r".\; Find"),
        ],
    )
    def test_copies_of_a_problem_are_alike(self, other):
        assert normalized(other) == normalized(LONG)

    def test_problems_that_differ_in_an_operator_or_in_where_numbers_part_are_not(self):
        texts = ["12>41:", "1>241:", "1>2 41:", "12<41:", "12-41:", "12+41:", "12 41:"]
        assert len({normalized(text) for text in texts}) == len(texts)

    @given(st.text(st.characters(codec="ascii"), max_size=40))
    def test_again_changes_nothing(self, text):
        assert normalized(normalized(text)) == normalized(text)

    @given(st.text(max_size=40))
    def test_words_are_parted_by_single_spaces(self, text):
        once = normalized(text)
        assert once == once.strip()
        assert "  " not in once
        assert "\n" not in once


class TestOverlaps:
    def test_an_equal_question_is_found_whatever_asks_it(self):
        evaluated = prompt("aime/0", "What is $1 + 1$?", TEMPLATES["boxed"].format(problem="What is $1 + 1$?"))
        trained = prompt("dapo/7", "what is 1 + 1", TEMPLATES["dapo"].format(problem="what is 1 + 1"))
        assert overlaps([evaluated], [prompt("dapo/6", "What is 1 + 2?"), trained]) == [
            Overlap("aime/0", "dapo/7", "What is $1 + 1$?")
        ]

    def test_the_first_training_prompt_that_has_it_is_named(self):
        assert found(prompt("e", LONG), *(prompt(str(n), LONG) for n in range(3))) == "0"

    def test_a_long_question_is_found_inside_a_prompt(self):
        """For chat lists with a template of their own nobody knows where the question begins."""
        longer = f"You are a mathematician. {LONG.lower()} Write the answer last."
        assert found(prompt("e", LONG), prompt("0", "another"), prompt("1", longer), prompt("2", "third")) == "1"

    def test_a_question_is_searched_that_the_prompt_does_not_have(self):
        trained = Prompt("1", "rendered some other way", (1,), None, question=f"First: {LONG}")
        assert found(prompt("e", LONG), trained) == "1"

    def test_a_short_question_inside_another_means_nothing(self):
        assert found(prompt("e", "What is 1 + 1?"), prompt("t", "What is 1 + 1? And what is 1 + 1 + 1?")) is None

    def test_from_forty_characters_on_it_does(self):
        forty = "a" * 38 + " b"
        assert found(prompt("e", forty), prompt("t", f"x {forty} y")) == "t"
        assert found(prompt("e", forty[1:]), prompt("t", f"x {forty[1:]} y")) is None

    @pytest.mark.parametrize("before", ["x", "2*", "1"])
    def test_words_are_not_cut(self, before):
        question = "1 is the number of ways to order the letters of a word of length n"
        assert found(prompt("e", question), prompt("t", f"so {before}{question}")) is None
        assert found(prompt("e", question), prompt("t", f"so {question}s")) is None
        assert found(prompt("e", question), prompt("t", f"so {question}.")) == "t"

    def test_nothing_is_found_across_two_prompts(self):
        half = len(LONG) // 2
        start, end = LONG[:half].rsplit(" ", 1)[0], LONG[len(LONG[:half].rsplit(" ", 1)[0]) :]
        assert found(prompt("e", LONG), prompt("0", start), prompt("1", end)) is None
        assert found(prompt("e", LONG), prompt("0", start + end)) == "0"

    def test_a_prompt_without_a_question_is_its_own(self):
        assert found(Prompt("e", "0>7:", (1,), None), Prompt("t", "0>7:", (1,), None)) == "t"

    def test_every_prompt_of_many_is_found_where_it_is(self):
        trained = [prompt(str(n), f"{LONG} {n}", f"ask: {LONG} {n} end") for n in range(50)]
        texts = TrainingTexts(trained)
        hits = [texts.find(prompt(f"e{n}", f"{LONG} {n} end")) for n in range(50)]
        assert [hit.train_id for hit in hits if hit] == [str(n) for n in range(50)]

    def test_names_both_ids_and_how_the_question_begins(self):
        assert str(Overlap("a/1", "b/2", "What\nis 1 + 1?")) == "a/1 = b/2 'What is 1 + 1?'"
        assert str(Overlap("a/1", "b/2", "x" * 61)) == f"a/1 = b/2 '{'x' * 59}…'"


class Listed(PromptSource):
    def __init__(self, **questions: str) -> None:
        self.questions = questions

    def problems(self):
        for problem_id, question in self.questions.items():
            yield Problem(problem_id, TEMPLATES["dapo"].format(problem=question), "1", question=question)


class NeverRight(VerifiableReward):
    pooled = False

    def verify(self, prompt, completion):
        return False


class ByCharacter:
    chat_template = None
    eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [1] * len(text)}


class SilentEngine:
    """Is set up; nothing is generated here."""

    dtype, max_model_len = "float32", None

    def setup(self, spec: ModelSpec) -> None:
        pass


class Provider(SimpleNamespace):
    tokenizer, eos_token_ids, min_group_size = ByCharacter(), (0,), 2

    def named_full_weights(self) -> list[tuple[str, torch.Tensor]]:
        return []

    def model_spec(self) -> ModelSpec:
        config = SimpleNamespace(vocab_size=2)
        config.get_text_config = lambda: config
        return ModelSpec(config, (0,), torch.device("cpu"))


def set_up(train: PromptSource, evaluated: PromptSource, **settings: object) -> RolloutDataModule:
    sets = {"aime": EvalSet(evaluated, NeverRight())}
    data = RolloutDataModule(
        train, NeverRight(), engine=SilentEngine(), eval_sets=sets, weight_check=None, reward_pool=None, **settings
    )
    data.trainer = SimpleNamespace(fast_dev_run=1, lightning_module=Provider())
    data.setup("fit")
    return data


class TestTrainingRefusesThem:
    TRAINED = Listed(a="What is 1?", b=LONG, c="What is 3?", d="What is 4?", e="What is 5?")

    def test_and_names_set_count_and_three_pairs(self):
        evaluated = Listed(v="what is $5$?", w="What is 2?", x=LONG.upper(), y="What is (4)?", z="What is 3")
        with pytest.raises(ConfigError) as refused:
            set_up(self.TRAINED, evaluated)
        assert str(refused.value) == (
            "eval_sets.aime: '4 of 5 questions' - are trained on (v = e 'what is $5$?'; "
            f"x = b '{LONG.upper()[:59]}…'; y = d 'What is (4)?'; …): write other splits, or allow_overlap: true"
        )

    def test_allow_overlap_warns_instead(self):
        with pytest.warns(UserWarning, match=r"^data\.eval_sets\.aime: 1 of 2 questions are trained on \(w = c 'What"):
            set_up(self.TRAINED, Listed(v="What is 2?", w="What is 3?"), allow_overlap=True)

    def test_other_problems_are_evaluated(self, recwarn):
        data = set_up(self.TRAINED, Listed(v="What is 2?", w="What is 6?"))
        assert [prompt.id for prompt in data.eval_prompts["aime"]] == ["v", "w"]
        assert not [warning for warning in recwarn if "trained on" in str(warning.message)]

    def test_only_what_is_evaluated_and_trained_on_counts(self):
        """The set's limit and the length filter come first."""
        sets = {"aime": EvalSet(Listed(v="What is 2?", w="What is 3?"), NeverRight(), limit=1)}
        settings = {"engine": SilentEngine(), "weight_check": None, "reward_pool": None}
        data = RolloutDataModule(self.TRAINED, NeverRight(), eval_sets=sets, **settings)
        data.trainer = SimpleNamespace(fast_dev_run=1, lightning_module=Provider())
        data.setup("fit")
        assert [prompt.id for prompt in data.eval_prompts["aime"]] == ["v"]

    @pytest.mark.parametrize(
        "source", [lambda split: NumberPathSource(split=split), lambda split: SumsSource(chat=False, split=split)]
    )
    def test_short_tasks_are_compared_exactly(self, source):
        """Thousands of prompts that differ in one character: the splits have none in common, and each has its own."""
        assert set_up(source("train"), source("heldout"))
        with pytest.raises(ConfigError, match=r"^eval_sets\.aime: '(\d+) of \1 questions' - are trained on"):
            set_up(source("all"), source("heldout"))


@needs_data
class TestRealSets:
    @staticmethod
    def prompts(name: str, **columns: str) -> list[Prompt]:
        problems = DatasetSource(str(DATA / name), chat=False, **columns).problems()
        texts = [(p, p.prompt if isinstance(p.prompt, str) else p.prompt[-1]["content"]) for p in problems]
        return [Prompt(p.id, text, (1,), p.answer, question=p.question) for p, text in texts]

    @pytest.mark.parametrize("name", ["aime24", "aime25", "amc23"])
    def test_the_papers_sets_are_not_among_the_dapo_sample(self, name):
        columns = {"prompt_column": "prompt", "answer_column": "reward_model.ground_truth"}
        trained = self.prompts("dapo_math_17k_sample.parquet", **columns)
        assert overlaps(self.prompts(f"{name}.jsonl"), trained) == []

    def test_the_dapo_sample_is_the_jsonl_under_its_template(self):
        columns = {"prompt_column": "prompt", "answer_column": "reward_model.ground_truth"}
        hits = overlaps(self.prompts("dapo_math_17k_64.jsonl"), self.prompts("dapo_math_17k_sample.parquet", **columns))
        assert [hit.eval_id for hit in hits] == [f"dapo_math_17k_64/{n}" for n in range(64)]

    @pytest.mark.parametrize(
        ("evaluated", "trained"), [("math500_first250", "math_train_2500"), ("gsm8k_test_400", "gsm8k_train_1000")]
    )
    def test_train_and_test_splits_share_no_question(self, evaluated, trained):
        assert overlaps(self.prompts(f"{evaluated}.jsonl"), self.prompts(f"{trained}.jsonl")) == []
