"""Warm starts from scratch on any source: solved problems, and an alphabet to write them in."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ibro_lightning.cli.main import main
from ibro_lightning.errors import ConfigError
from ibro_lightning.models import PolicyOptions, Qwen2FromScratch
from ibro_lightning.sources import DemonstrationSource, PromptSource, SolvedProblems
from ibro_lightning.tasks import Alphabet, SumsSource
from ibro_lightning.tasks.alphabet import CHARACTERS
from ibro_lightning.types import Problem


class Squares(PromptSource):
    def problems(self):
        for n in range(20):
            yield Problem(str(n), f"{n} squared:", {"value": n * n}, meta={"words": f"it is {n * n}"})


class Pairs(DemonstrationSource):
    """Words by falling frequency: and, then cat and dog, then an."""

    def demonstration(self, seed):
        return "a cat and a dog and", " an ox and" if random.Random(seed).random() < 0.5 else "x"


class TestSolvedProblems:
    def test_a_demonstration_is_a_problem_with_its_own_solution(self):
        source = SolvedProblems(Squares(), "{answer[value]}")
        for seed in range(50):
            prompt, response = source.demonstration(seed)
            assert int(response) == int(prompt.split()[0]) ** 2

    def test_the_template_reads_meta_and_all_problems_occur(self):
        source = SolvedProblems(Squares(), "{meta[words]}!")
        shown = {source.demonstration(seed) for seed in range(400)}
        assert shown == {(f"{n} squared:", f"it is {n * n}!") for n in range(20)}

    def test_it_is_a_function_of_the_seed(self):
        one, other = SolvedProblems(Squares()), SolvedProblems(Squares())
        assert [one.demonstration(s) for s in range(9)] == [other.demonstration(s) for s in range(9)]

    def test_it_tells_which_prompts_it_may_show(self):
        source = SolvedProblems(Squares())
        assert source.may_show("7 squared:")
        assert not source.may_show("20 squared:")

    @pytest.mark.parametrize("response", ["{answer[text]}", "{meta[solution]}", "{question}", "{0}", "{answer"])
    def test_a_template_that_does_not_suit_the_source_is_named(self, response):
        with pytest.raises(ConfigError, match=r"response.*cannot be filled in for problem"):
            SolvedProblems(Squares(), response).demonstration(0)

    def test_a_template_without_a_field_is_refused(self):
        with pytest.raises(ConfigError, match=r"response.*write a template"):
            SolvedProblems(Squares(), "42")

    def test_a_source_without_problems_is_refused(self):
        class Empty(PromptSource):
            def problems(self):
                return ()

        with pytest.raises(ConfigError, match=r"Empty.*has no problems"):
            SolvedProblems(Empty()).demonstration(0)


class TestAlphabet:
    @given(st.text(alphabet=CHARACTERS, max_size=60))
    def test_text_survives_the_tokenizer(self, text):
        tokenizer = WORDS
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    def test_words_are_taken_by_frequency_with_the_space_before_them(self):
        assert list(Alphabet(3, Pairs()).vocabulary())[3 + len(CHARACTERS) :] == [" and", " cat", " dog"]

    def test_the_longest_word_is_read(self):
        tokens = WORDS.convert_ids_to_tokens(WORDS("and and an")["input_ids"])
        assert tokens == ["a", "n", "d", " and", " an"]

    def test_without_words_every_letter_is_a_token(self):
        tokenizer = Alphabet().tokenizer()
        assert tokenizer.convert_ids_to_tokens(tokenizer("cat 12")["input_ids"]) == ["c", "a", "t", " ", "1", "2"]
        assert len(tokenizer) == 3 + len(CHARACTERS)

    def test_a_saved_policy_reads_as_before(self, tmp_path):
        """For model type qwen2 AutoTokenizer loads another class than the one that was saved."""
        policy = Qwen2FromScratch(task=Alphabet(4, Pairs()), hidden_size=16, num_layers=1, intermediate_size=16)
        policy.build(PolicyOptions()).save_pretrained(tmp_path)
        policy.tokenizer().save_pretrained(tmp_path)
        loaded, text = AutoTokenizer.from_pretrained(tmp_path), "a cat\n and  an 'ox' (3+4)*2"
        assert loaded(text)["input_ids"] == policy.tokenizer()(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text
        assert loaded.eos_token_id == policy.tokenizer().eos_token_id

    def test_words_need_a_source(self):
        with pytest.raises(ConfigError, match=r"source.*5 most frequent words"):
            Alphabet(5)

    def test_a_prompt_source_is_no_source_of_words(self):
        with pytest.raises(ConfigError, match="source"):
            Alphabet(5, SumsSource())


def test_the_documented_recipe_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step on solved small programs, with the alphabet, by the command line."""
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    (tmp_path / "scratch.yaml").write_text(page.split("## From scratch")[1].split("```yaml\n")[1].split("```")[0])
    monkeypatch.chdir(tmp_path)
    fewer = ["--data.steps_per_epoch", "1", "--data.batch_size", "2", "--data.source.source.num_problems", "60"]
    main(["fit", "--config", "scratch.yaml", *fewer, "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "runs" / "default" / "model")
    assert tokenizer.convert_ids_to_tokens(tokenizer("f=lambda")["input_ids"]) == list("f=lambda")


WORDS = Alphabet(4, Pairs()).tokenizer()
