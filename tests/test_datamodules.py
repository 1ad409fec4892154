"""From files to prompts to rollouts. The engine is scripted, so that what a rollout holds can be worked out by hand."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from helpers.collecting import IsOne, Paths, Provider, ScriptedEngine, build
from helpers.prompts import Listed
from helpers.tables import write
from ibro_lightning.batches import Rollout
from ibro_lightning.callbacks.metrics_log import rollout_metrics
from ibro_lightning.cli.parser import OneLineParser
from ibro_lightning.datamodules import DynamicSampling, EvalSet, EvaluationDataModule, RolloutDataModule, SFTDataModule
from ibro_lightning.engines.base import check_length
from ibro_lightning.engines.sampling import sample_tokens
from ibro_lightning.errors import ConfigError, RewardError, RolloutError
from ibro_lightning.evaluation.metrics import SampleAccuracy
from ibro_lightning.regularizers import (
    InformationBottleneck,
    PassRateInformationBottleneck,
    PositionCentredInformationBottleneck,
)
from ibro_lightning.rewards import LastNumberReward, OverlongPenalty, PoolOptions, RewardSum
from ibro_lightning.sources import DatasetSource, PromptCursor, PromptLimits, encode_prompts
from ibro_lightning.tasks import NumberPath, NumberPathDemonstrations
from ibro_lightning.types import Problem, Prompt, SamplingParams

torch.set_num_threads(1)
DATA = Path(os.environ.get("IBRO_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no folder {DATA} (set IBRO_DATA)")


@pytest.fixture(autouse=True)
def _run_seed(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")


@pytest.fixture(autouse=True)
def _own_dataset_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets_cache"))


class TestPromptCursor:
    PROMPTS = tuple(Prompt(str(i), str(i), (i,), None) for i in range(10))

    def order(self, seed: int = 0, count: int = 30, steps: Sequence[int] = ()) -> list[tuple[int, str]]:
        cursor = PromptCursor(list(self.PROMPTS), seed)
        return [(p, prompt.id) for step in (steps or (count,)) for p, prompt in cursor.draw(step)]

    def test_every_pass_is_a_permutation_and_every_pass_another_one(self):
        ids = [prompt_id for _, prompt_id in self.order()]
        passes = [ids[:10], ids[10:20], ids[20:]]
        assert [sorted(one) for one in passes] == [[str(i) for i in range(10)]] * 3
        assert passes[0] != passes[1] != passes[2] != passes[0]

    def test_positions_count_on(self):
        assert [position for position, _ in self.order()] == list(range(30))

    def test_a_function_of_seed_and_position_alone(self):
        assert self.order(seed=1) == self.order(seed=1)
        assert self.order(seed=1) != self.order(seed=2)
        assert self.order(steps=[1, 7, 13, 2, 7]) == self.order(), "the sizes of the draws matter"

    @pytest.mark.parametrize("position", [0, 3, 9, 10, 11, 25])
    def test_continues_from_a_restored_position(self, position):
        cursor = PromptCursor(list(self.PROMPTS), 0)
        cursor.position = position
        assert [(p, prompt.id) for p, prompt in cursor.draw(4)] == self.order(count=40)[position : position + 4]

    def test_can_go_back(self):
        cursor = PromptCursor(list(self.PROMPTS), 0)
        first = cursor.draw(25)
        cursor.position = 0
        assert cursor.draw(25) == first

    def test_does_not_touch_torchs_generator(self):
        before = torch.get_rng_state()
        self.order()
        assert torch.equal(torch.get_rng_state(), before)


class TestEncodePrompts:
    SETTING = "source"

    def encode(self, tokenizer, *problems: Problem, **limits) -> list[Prompt]:
        return encode_prompts(Listed(*problems), tokenizer, PromptLimits(**limits), setting=self.SETTING)

    def test_keeps_order_answers_and_meta(self, tokenizer):
        one, two = self.encode(
            tokenizer, Problem("a", "12>41:", {"x": 1}, {"distance": 3}), Problem("b", "0>7:", "seven")
        )
        assert (one.id, one.text, one.answer, one.meta) == ("a", "12>41:", {"x": 1}, {"distance": 3})
        assert tokenizer.convert_ids_to_tokens(list(one.token_ids)) == ["12", ">", "41", ":"]
        assert (two.id, two.text, two.answer) == ("b", "0>7:", "seven")

    # 4, 7 and 10 tokens.
    LENGTHS = (Problem("a", "12>41:", 0), Problem("b", "12>41:*2=24", 0), Problem("c", "12>41:*2=24-3=21", 0))

    @pytest.mark.parametrize(
        ("limit", "kept"), [(4, "a"), (6, "a"), (7, "ab"), (9, "ab"), (10, "abc"), (99, "abc"), (None, "abc")]
    )
    def test_drops_prompts_longer_than_the_limit(self, tokenizer, limit, kept):
        assert [p.id for p in self.encode(tokenizer, *self.LENGTHS, max_tokens=limit)] == list(kept)

    def test_refuses_them_if_asked_to_and_says_what_would_do(self, tokenizer):
        with pytest.raises(ConfigError, match=r"prompt_limits\.max_tokens: 7 - 1 of 3 prompts.*write 10"):
            self.encode(tokenizer, *self.LENGTHS, max_tokens=7, overlong="error")
        assert len(self.encode(tokenizer, *self.LENGTHS, max_tokens=10, overlong="error")) == 3

    def test_a_limit_that_drops_everything_is_an_error(self, tokenizer):
        with pytest.raises(ConfigError, match=r"max_tokens: 3 - 3 of 3"):
            self.encode(tokenizer, *self.LENGTHS, max_tokens=3)

    def test_repeated_ids_are_refused(self, tokenizer):
        """Seeds derive from ids: two problems of one id would be sampled with the same random numbers."""
        with pytest.raises(ConfigError, match=r"^source.*same id"):
            self.encode(tokenizer, Problem("a", "0>7:", 0), Problem("a", "0>8:", 0))

    def test_a_source_without_problems_is_refused(self, tokenizer):
        with pytest.raises(ConfigError, match=r"^source.*Listed.*no problems"):
            self.encode(tokenizer)

    def test_a_prompt_without_tokens_is_refused(self, tokenizer):
        with pytest.raises(ConfigError, match=r"^source.*empty-one.*no tokens"):
            self.encode(tokenizer, Problem("a", "0>7:", 0), Problem("empty-one", "", 0))

    def test_a_chat_prompt_needs_a_template(self, tokenizer):
        with pytest.raises(ConfigError, match=r"^source.*no chat template.*chat: false"):
            self.encode(tokenizer, Problem("a", [{"role": "user", "content": "0>7:"}], 0))

    @pytest.fixture
    def chat_tokenizer(self):
        """Writes ``<s>`` before every text, as Llama's does; its template writes ``<s>`` itself."""
        words = ["<unk>", "<s>", "</s>", "user", "system", "assistant", "hello", "be", "kind", "|"]
        backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        )
        tokenizer.chat_template = (
            "<s>{% for m in messages %} {{ m['role'] }} {{ m['content'] }} |{% endfor %}"
            "{% if add_generation_prompt %} assistant{% endif %}"
        )
        return tokenizer

    def test_messages_go_through_the_template_and_ask_for_an_answer(self, chat_tokenizer):
        messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
        (prompt,) = self.encode(chat_tokenizer, Problem("a", messages, 0))
        assert prompt.text == "<s> system be kind | user hello | assistant"
        tokens = chat_tokenizer.convert_ids_to_tokens(list(prompt.token_ids))
        assert tokens == ["<s>", "system", "be", "kind", "|", "user", "hello", "|", "assistant"]

    def test_raw_text_gets_its_special_tokens_once(self, chat_tokenizer):
        (prompt,) = self.encode(chat_tokenizer, Problem("a", "hello kind", 0))
        assert chat_tokenizer.convert_ids_to_tokens(list(prompt.token_ids)) == ["<s>", "hello", "kind"]


ROWS = [{"problem": "one?", "answer": "1"}, {"problem": "two?", "answer": "2"}, {"problem": "three?", "answer": "3"}]


class TestDatasetSource:
    @pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
    def test_reads_every_format(self, tmp_path, ending):
        problems = list(DatasetSource(write(tmp_path / f"math.{ending}", ROWS), chat=False).problems())
        assert [p.prompt for p in problems] == ["one?", "two?", "three?"]
        assert [str(p.answer) for p in problems] == ["1", "2", "3"]
        assert len({p.id for p in problems}) == 3
        assert all("math" in p.id for p in problems)

    @pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
    def test_dots_reach_into_nested_columns(self, tmp_path, ending):
        rows = [{"q": {"text": "one?"}, "reward_model": {"ground_truth": "1", "style": "rule"}}]
        path = write(tmp_path / f"nested.{ending}", rows)
        source = DatasetSource(path, prompt_column="q.text", answer_column="reward_model.ground_truth", chat=False)
        assert [(p.prompt, p.answer) for p in source.problems()] == [("one?", "1")]

    @pytest.mark.parametrize("ending", ["jsonl", "parquet"])
    def test_a_chat_list_is_taken_as_it_is(self, tmp_path, ending):
        messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "one?"}]
        path = write(tmp_path / f"chat.{ending}", [{"problem": messages, "answer": "1"}])
        (problem,) = DatasetSource(path, template="never used: {problem}").problems()
        assert [dict(message) for message in problem.prompt] == messages

    def test_text_is_asked_by_the_template_as_a_user_message(self, tmp_path):
        path = write(tmp_path / "math.jsonl", ROWS[:1])
        (problem,) = DatasetSource(path, template="Q: {problem} A:", system="be kind").problems()
        assert problem.prompt == [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "Q: one? A:"},
        ]
        (problem,) = DatasetSource(path, template="Q: {problem} A:", system="be kind", chat=False).problems()
        assert problem.prompt == "be kind\n\nQ: one? A:"

    def test_braces_in_a_question_are_left_alone(self, tmp_path):
        """LaTeX is full of them."""
        path = write(tmp_path / "math.jsonl", [{"problem": r"\frac{1}{x} {problem}?", "answer": "1"}])
        (problem,) = DatasetSource(path, template="{problem} in {{}}", chat=False).problems()
        assert problem.prompt == r"\frac{1}{x} {problem}? in {}"

    @pytest.mark.parametrize("template", ["no name", "{question}", "{problem", "{}", "{problem} {0}"])
    def test_a_template_that_cannot_be_filled_in_is_refused(self, template):
        with pytest.raises(ConfigError, match=r"^template"):
            DatasetSource("x.jsonl", template=template)

    def test_repeated_questions_are_dropped(self, tmp_path):
        path = write(tmp_path / "math.jsonl", [ROWS[0], ROWS[1], ROWS[0], ROWS[0], ROWS[2]])
        problems = list(DatasetSource(path, chat=False).problems())
        assert [p.prompt for p in problems] == ["one?", "two?", "three?"]

    def test_repeated_chat_lists_are_dropped(self, tmp_path):
        rows = [{"problem": [{"role": "user", "content": q}], "answer": "1"} for q in ("one?", "two?", "one?")]
        assert len(list(DatasetSource(write(tmp_path / "chat.jsonl", rows)).problems())) == 2

    def test_limit_takes_the_first_rows(self, tmp_path):
        path = write(tmp_path / "math.jsonl", ROWS)
        assert [p.prompt for p in DatasetSource(path, chat=False, limit=2).problems()] == ["one?", "two?"]
        assert len(list(DatasetSource(path, chat=False, limit=99).problems())) == 3
        with pytest.raises(ConfigError, match=r"^limit"):
            DatasetSource(path, limit=0)

    def test_ids_do_not_depend_on_the_limit(self, tmp_path):
        """Evaluation seeds derive from them, so a quick look and the full set agree."""
        path = write(tmp_path / "math.jsonl", [ROWS[0], ROWS[0], ROWS[1], ROWS[2]])
        every = [p.id for p in DatasetSource(path).problems()]
        assert [p.id for p in DatasetSource(path, limit=3).problems()] == every[:2]

    def test_zero_is_an_answer(self, tmp_path):
        path = write(tmp_path / "math.jsonl", [{"problem": "none?", "answer": 0}, {"problem": "no?", "answer": False}])
        assert [p.answer for p in DatasetSource(path, answer_format="raw").problems()] == [0, False]
        assert [p.answer for p in DatasetSource(path).problems()] == ["0", False]

    @pytest.mark.parametrize(
        ("settings", "setting"),
        [
            ({"prompt_column": "question"}, "prompt_column"),
            ({"answer_column": "solution"}, "answer_column"),
            ({"answer_column": "reward_model.ground_truth"}, "answer_column"),
        ],
    )
    def test_a_missing_column_is_named_with_those_that_exist(self, tmp_path, settings, setting):
        path = write(tmp_path / "math.jsonl", ROWS)
        with pytest.raises(ConfigError, match=rf"^{setting}.*math\.jsonl.*answer.*problem"):
            list(DatasetSource(path, **settings).problems())

    def test_a_missing_nested_value_is_named(self, tmp_path):
        path = write(tmp_path / "math.jsonl", [{"problem": "one?", "reward_model": {"style": "rule"}}])
        with pytest.raises(ConfigError, match=r"answer_column.*reward_model\.ground_truth.*line 1"):
            list(DatasetSource(path, answer_column="reward_model.ground_truth").problems())

    @pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
    @pytest.mark.parametrize("column", ["problem", "answer"])
    @pytest.mark.parametrize("nothing", ["", None])
    def test_an_empty_value_is_named_with_its_row(self, tmp_path, ending, column, nothing):
        """An empty answer could never be matched, or by everything."""
        path = write(tmp_path / f"math.{ending}", [ROWS[0], {**ROWS[1], column: nothing}, ROWS[2]])
        setting = {"problem": "prompt_column", "answer": "answer_column"}[column]
        where = "line 2" if ending == "jsonl" else "data row 2"
        with pytest.raises(ConfigError, match=rf"^{setting}.*math\.{ending}, {where}: no value"):
            list(DatasetSource(path).problems())

    @pytest.mark.parametrize("question", [7, ["one?"], [{"role": "user"}]])
    def test_a_question_that_is_neither_text_nor_messages_is_named(self, tmp_path, question):
        path = write(tmp_path / "math.jsonl", [{"problem": question, "answer": "1"}])
        with pytest.raises(ConfigError, match=r"prompt_column.*line 1.*neither text nor"):
            list(DatasetSource(path).problems())

    @pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
    def test_a_missing_file_is_named(self, tmp_path, ending):
        with pytest.raises(ConfigError, match=rf"^path.*nowhere\.{ending}.*no such file"):
            list(DatasetSource(str(tmp_path / f"nowhere.{ending}")).problems())

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("broken.jsonl", b'{"problem": "one?", "answer": "1"}\n{"problem": \n'),
            ("broken.json", b'[{"problem": "one?"'),
            ("broken.parquet", b"PAR1 this is no parquet file"),
            ("binary.jsonl", bytes(range(256))),
            ("empty.parquet", b""),
            ("ragged.csv", b'problem,answer\none?,1\ntwo?,2,3,4,5\n"'),
        ],
    )
    def test_a_broken_file_is_named(self, tmp_path, name, content):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=rf"^path.*{name}"):
            list(DatasetSource(str(tmp_path / name)).problems())

    def test_a_file_that_changed_is_read_anew(self, tmp_path):
        """datasets caches what it reads; a stale copy would be hard to notice."""
        path = tmp_path / "math.jsonl"
        assert len(list(DatasetSource(write(path, ROWS[:1])).problems())) == 1
        assert len(list(DatasetSource(write(path, ROWS)).problems())) == 3

    @needs_data
    def test_reads_gsm8k(self):
        rows = [json.loads(line) for line in (DATA / "gsm8k_train_1000.jsonl").open(encoding="utf-8")]
        problems = list(DatasetSource(str(DATA / "gsm8k_train_1000.jsonl"), chat=False).problems())
        assert len(problems) == len({row["problem"] for row in rows})
        assert len(problems) > 990
        assert (problems[0].prompt, problems[0].answer) == (rows[0]["problem"], "72")

    @needs_data
    def test_reads_the_published_dapo_schema_and_drops_its_repetitions(self):
        source = DatasetSource(
            str(DATA / "dapo_math_17k_sample.parquet"),
            prompt_column="prompt",
            answer_column="reward_model.ground_truth",
        )
        problems = list(source.problems())
        assert len(problems) == 64
        assert problems[0].answer == "3"
        (message,) = problems[0].prompt
        assert message["role"] == "user"
        assert "$m^2 + n^2 + 1 = kmn$" in message["content"]
        assert all(problem.answer.lstrip("-").isdigit() for problem in problems)


def right_answers(rollout: Rollout) -> list[float]:
    """How many responses of each group are right."""
    return [rollout.accuracy[rollout.groups == group].sum().item() for group in range(rollout.num_groups)]


def prompts_of_groups(rollout: Rollout) -> list[str]:
    return list(dict.fromkeys(prompt.text for prompt in rollout.prompts))


class TestRollouts:
    def test_a_rollout_holds_every_group_as_it_was_generated(self, tokenizer):
        data = build(tokenizer, [0, 4, 1])
        rollout = data.next_rollout()
        assert len(rollout) == 12
        assert rollout.groups.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert right_answers(rollout) == [0, 4, 1]
        assert rollout.rewards.tolist() == [-1.0] * 4 + [1.0] * 4 + [1.0, -1.0, -1.0, -1.0]
        assert prompts_of_groups(rollout) == data.engine.texts
        assert not rollout.skip_update
        assert (rollout.name, rollout.iteration, rollout.temperature) == ("train", 1, 1.0)

    def test_rows_are_prompt_then_response_with_the_engines_log_probs(self, tokenizer):
        rollout = build(tokenizer, [4, 0, 0]).next_rollout()
        assert tokenizer.decode(rollout.sequences.pad().input_ids[0].tolist()) == rollout.prompts[0].text + "1!"
        assert tokenizer.decode(rollout.sequences.pad().input_ids[4].tolist()) == rollout.prompts[4].text + "0!"
        assert rollout.sequences.prompt_lengths.tolist() == [4] * 12
        assert rollout.sequences.response_lengths.tolist() == [2] * 12
        assert rollout.sampler_logp.tolist() == [-0.5, -0.25] * 12
        assert not rollout.truncated.any()

    def test_completions_carry_text_seed_and_limit(self, tokenizer):
        data = build(tokenizer, [1, 1, 1], sampling=SamplingParams(max_tokens=9))
        rollout = data.next_rollout()
        ((_, seeds, sampling),) = data.engine.calls
        assert sampling.max_tokens == 9
        assert [c.seed for c in rollout.completions] == [seed for row in seeds for seed in row]
        assert {c.max_tokens for c in rollout.completions} == {9}
        assert [c.text for c in rollout.completions[:4]] == ["1", "0", "0", "0"]  # without EOS

    def test_share_of_zero_variance_groups_is_reported_without_dynamic_sampling_too(self, tokenizer):
        metrics = rollout_metrics(build(tokenizer, [0, 4, 1, 2], prompts_per_rollout=4).next_rollout())
        assert metrics["rollout/zero_variance_groups"] == 0.5
        assert metrics["rollout/accuracy"] == 7 / 16
        assert metrics["rollout/prompts_sampled"] == 4
        assert metrics["rollout/rounds"] == 1
        assert metrics["rollout/generated_tokens"] == 32

    def test_seeds_are_unique_per_sample_over_the_whole_run(self, tokenizer):
        """Also when a small source is drawn again and again: the same seeds would give the same responses."""
        data = build(tokenizer, source=Paths(2))
        for _ in range(5):
            data.next_rollout()
        seeds = [seed for _, rows, _ in data.engine.calls for row in rows for seed in row]
        assert len(seeds) == 5 * 3 * 4
        assert len(set(seeds)) == len(seeds)

    def test_every_prompt_comes_once_before_any_comes_again(self, tokenizer):
        data = build(tokenizer)
        for _ in range(8):
            data.next_rollout()
        everything = sorted(f"0>{number}:" for number in range(1, 13))
        assert sorted(data.engine.texts[:12]) == sorted(data.engine.texts[12:]) == everything
        assert data.engine.texts[:12] != everything

    def test_other_run_seeds_give_other_prompts_and_samples(self, tokenizer, monkeypatch):
        first = build(tokenizer)
        first.next_rollout()
        monkeypatch.setenv("PL_GLOBAL_SEED", "6")
        second = build(tokenizer)
        second.next_rollout()
        assert first.engine.texts != second.engine.texts
        assert first.engine.calls[0][1] != second.engine.calls[0][1]

    def test_the_engine_gets_the_current_weights_before_each_generation(self, tokenizer):
        data = build(tokenizer)
        for version in (1.0, 2.0, 3.0):
            data.provider.version = version
            data.next_rollout()
        assert data.engine.weights_at_calls == [1.0, 2.0, 3.0]

    def test_the_engine_is_on_the_device_only_while_it_is_needed(self, tokenizer):
        data = build(tokenizer)
        data.next_rollout()
        assert data.engine.events == ["setup", "onload", "load", "generate", "offload"]
        data.teardown("fit")
        assert data.engine.events[-1] == "close"

    def test_rollouts_are_generated_when_they_are_asked_for(self, tokenizer):
        """A prefetched rollout would come from weights that are one update old."""
        data = build(tokenizer, rollouts_per_epoch=3)
        stream = data.train_dataloader()
        assert len(stream) == 3
        rollouts = iter(stream)
        assert data.engine.calls == []
        next(rollouts)
        assert len(data.engine.calls) == 1
        assert [rollout.iteration for rollout in rollouts] == [2, 3]


class TestDynamicSampling:
    def test_keeps_only_groups_that_are_neither_all_right_nor_all_wrong(self, tokenizer):
        # Round 1 finds one of three, so round 2 asks for all three again.
        data = build(tokenizer, [1, 0, 4, 2, 0, 3], dynamic_sampling=DynamicSampling())
        rollout = data.next_rollout()
        assert right_answers(rollout) == [1, 2, 3]
        texts = data.engine.texts
        assert prompts_of_groups(rollout) == [texts[0], texts[3], texts[5]]
        assert not rollout.skip_update

    def test_metrics_count_every_group_that_was_sampled(self, tokenizer):
        """What the policy can do, not what was kept: the latter is between 0 and 1 by construction."""
        data = build(tokenizer, [1, 0, 4, 2, 0, 3], dynamic_sampling=DynamicSampling())
        metrics = rollout_metrics(data.next_rollout())
        assert metrics["rollout/prompts_sampled"] == 6
        assert metrics["rollout/rounds"] == 2
        assert metrics["rollout/zero_variance_groups"] == pytest.approx(3 / 6)
        assert metrics["rollout/accuracy"] == pytest.approx(10 / 24)
        assert metrics["rollout/generated_tokens"] == 6 * 4 * 2

    def test_a_full_first_round_ends_it(self, tokenizer):
        data = build(tokenizer, [1, 2, 3], dynamic_sampling=DynamicSampling())
        assert right_answers(data.next_rollout()) == [1, 2, 3]
        assert len(data.engine.calls) == 1

    def test_surplus_is_trimmed_and_still_counted(self, tokenizer):
        # One of two in round 1, so round 2 tries two for the one that is missing, and both are informative.
        data = build(tokenizer, [0, 2, 1, 3], prompts_per_rollout=2, dynamic_sampling=DynamicSampling())
        rollout = data.next_rollout()
        assert right_answers(rollout) == [2, 1]
        assert rollout.metrics["rollout/prompts_sampled"] == 4
        assert rollout.metrics["rollout/zero_variance_groups"] == 0.25
        assert rollout_metrics(rollout)["rollout/accuracy"] == 6 / 16

    @pytest.mark.parametrize("max_rounds", [1, 2, 5])
    def test_rounds_are_bounded(self, tokenizer, max_rounds):
        data = build(tokenizer, [0] * 100, dynamic_sampling=DynamicSampling(max_rounds=max_rounds))
        assert data.next_rollout().metrics["rollout/rounds"] == max_rounds
        assert len(data.engine.calls) == max_rounds

    def test_no_round_is_larger_than_the_rollout(self, tokenizer):
        """Engines and memory are sized for it."""
        data = build(tokenizer, [1, 0, 0] + [0] * 50, dynamic_sampling=DynamicSampling(max_rounds=6))
        data.next_rollout()
        assert max(len(texts) for texts, _, _ in data.engine.calls) <= 3

    def test_rounds_of_one_rollout_share_weights_and_iteration_but_no_seeds(self, tokenizer):
        data = build(tokenizer, [0] * 9, source=Paths(3), dynamic_sampling=DynamicSampling())
        data.provider.version = 4.0
        rollout = data.next_rollout()
        assert set(data.engine.weights_at_calls) == {4.0}
        assert rollout.iteration == 1
        seeds = [seed for _, rows, _ in data.engine.calls for row in rows for seed in row]
        assert len(set(seeds)) == 3 * 3 * 4

    def test_smaller_trains_on_what_there_is(self, tokenizer):
        data = build(tokenizer, [0, 2, 4, 0, 4, 0], dynamic_sampling=DynamicSampling(max_rounds=2))
        rollout = data.next_rollout()
        assert right_answers(rollout) == [2]
        assert not rollout.skip_update

    def test_fill_completes_the_rollout_with_zero_variance_groups(self, tokenizer):
        rule = DynamicSampling(max_rounds=2, on_exhausted="fill")
        rollout = build(tokenizer, [0, 2, 4, 0, 4, 0], dynamic_sampling=rule).next_rollout()
        assert right_answers(rollout)[0] == 2
        assert len(right_answers(rollout)) == 3
        assert set(right_answers(rollout)[1:]) <= {0, 4}
        assert not rollout.skip_update

    def test_stop_ends_training_and_says_what_was_found(self, tokenizer):
        rule = DynamicSampling(max_rounds=2, on_exhausted="stop")
        data = build(tokenizer, [0, 2, 4, 0, 4, 0], dynamic_sampling=rule)
        with pytest.raises(RolloutError, match=r"1 of 3 informative.*of 5 others 2 were all right and 3 all wrong"):
            data.next_rollout()

    def test_stop_does_not_mind_a_full_rollout(self, tokenizer):
        rule = DynamicSampling(max_rounds=1, on_exhausted="stop")
        assert right_answers(build(tokenizer, [1, 2, 3], dynamic_sampling=rule).next_rollout()) == [1, 2, 3]

    @pytest.mark.parametrize("on_exhausted", ["smaller", "fill"])
    def test_without_any_informative_group_the_update_is_skipped(self, tokenizer, on_exhausted):
        """The rows stay for the record, so that the log shows what the policy did."""
        rule = DynamicSampling(max_rounds=2, on_exhausted=on_exhausted)
        rollout = build(tokenizer, [0, 4, 0, 4, 0, 0], dynamic_sampling=rule).next_rollout()
        assert rollout.skip_update
        assert rollout.num_groups == 3
        assert rollout.metrics["rollout/zero_variance_groups"] == 1.0
        assert rollout_metrics(rollout)["rollout/accuracy"] == pytest.approx(8 / 24)

    def test_too_many_skips_in_a_row_end_training(self, tokenizer):
        data = build(tokenizer, [0] * 9, dynamic_sampling=DynamicSampling(max_rounds=1, max_skips=3))
        assert data.next_rollout().skip_update
        assert data.next_rollout().skip_update
        with pytest.raises(RolloutError, match=r"0 of 3 informative.*none in 3 rollouts in a row"):
            data.next_rollout()

    @pytest.mark.parametrize("on_exhausted", ["smaller", "fill", "stop"])
    def test_the_remedy_is_one_that_helps(self, tokenizer, on_exhausted):
        """``fill`` helps where ``stop`` ended the run; after ``max_skips`` it would have skipped as well."""
        rule = DynamicSampling(max_rounds=1, max_skips=1, on_exhausted=on_exhausted)
        with pytest.raises(RolloutError, match=r"or a larger max_skips$"):
            build(tokenizer, [0] * 9, dynamic_sampling=rule).next_rollout()
        with pytest.raises(RolloutError, match=r"or on_exhausted: fill$"):
            build(tokenizer, [0, 2, 0], dynamic_sampling=replace(rule, on_exhausted="stop")).next_rollout()

    def test_an_informative_group_starts_the_count_anew(self, tokenizer):
        rights = [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
        data = build(tokenizer, rights, dynamic_sampling=DynamicSampling(max_rounds=1, max_skips=2))
        assert [data.next_rollout().skip_update for _ in range(3)] == [True, False, True]
        with pytest.raises(RolloutError):
            data.next_rollout()

    def test_a_resumed_run_goes_on_counting_skips(self, tokenizer):
        rule = DynamicSampling(max_rounds=1, max_skips=2)
        first = build(tokenizer, [0] * 3, dynamic_sampling=rule)
        first.next_rollout()
        second = build(tokenizer, [0] * 3, dynamic_sampling=rule)
        second.load_state_dict(first.state_dict())
        with pytest.raises(RolloutError):
            second.next_rollout()

    @pytest.mark.parametrize("setting", ["max_rounds", "max_skips"])
    def test_refused_settings_are_named(self, setting):
        with pytest.raises(ConfigError, match=rf"^{setting}: 0"):
            DynamicSampling(**{setting: 0})


def test_every_remedy_names_the_limit_of_prompts_by_its_full_key() -> None:
    """As one writes it in a recipe or on the command line: also where an engine refuses, which knows no datamodule."""
    with pytest.raises(ConfigError, match=r"^sampling\.max_tokens.* lower data\.prompt_limits\.max_tokens"):
        check_length([[1, 2, 3]], SamplingParams(max_tokens=6), limit=8)
    with pytest.raises(
        ConfigError, match=r"^eval_sets\.a\.sampling\.max_tokens.* lower data\.prompt_limits\.max_tokens"
    ):
        check_length([[1, 2, 3]], SamplingParams(max_tokens=6), limit=8, setting="eval_sets.a.sampling")
    prompt = Prompt("a", "", (1,), None, part="a")
    with pytest.raises(ConfigError, match=r"^source\.parts\.b.* data\.prompt_limits\.max_tokens"):
        PromptCursor([prompt], 0, {"a": 0.5, "b": 0.5})


class TestResuming:
    @pytest.mark.parametrize("rollouts_before", [0, 1, 3, 5])
    @pytest.mark.parametrize("load_first", [True, False])
    def test_continues_with_identical_prompts_and_seeds(self, tokenizer, rollouts_before, load_first):
        """Across passes over the 12 prompts, too; Lightning may load the state before or after setup."""
        straight = build(tokenizer)
        for _ in range(rollouts_before):
            straight.next_rollout()
        state = json.loads(json.dumps(straight.state_dict()))  # checkpoints hold plain values only
        done = len(straight.engine.calls)
        rollouts = [straight.next_rollout() for _ in range(3)]

        resumed = build(tokenizer, attach=False)
        if load_first:
            resumed.load_state_dict(state)
        resumed.trainer = SimpleNamespace(fast_dev_run=1, lightning_module=Provider(tokenizer), predicting=True)
        resumed.setup("fit")
        if not load_first:
            resumed.load_state_dict(state)
        again = [resumed.next_rollout() for _ in range(3)]
        assert resumed.engine.calls == straight.engine.calls[done:]
        assert [r.iteration for r in again] == [r.iteration for r in rollouts]

    def test_continues_where_dynamic_sampling_stopped_drawing(self, tokenizer):
        """A rollout of two rounds has used up more prompts than it holds."""
        rule = DynamicSampling(max_rounds=2)
        straight = build(tokenizer, [0, 0, 1, 0, 1, 1] + [1] * 6, dynamic_sampling=rule)
        straight.next_rollout()
        resumed = build(tokenizer, [1] * 6, dynamic_sampling=rule)
        resumed.load_state_dict(straight.state_dict())
        straight.next_rollout(), resumed.next_rollout()
        assert len(straight.engine.calls) == 3
        assert resumed.engine.calls[0] == straight.engine.calls[2]


class TestRefusedSettings:
    @pytest.mark.parametrize(
        ("settings", "name"),
        [
            ({"sampling": SamplingParams(temperature=0)}, "sampling.temperature"),
            ({"sampling": SamplingParams(top_p=0.9)}, "sampling.top_p"),
            ({"sampling": SamplingParams(top_k=20)}, "sampling.top_k"),
            ({"sampling": SamplingParams(min_p=0.1)}, "sampling.min_p"),
            ({"prompts_per_rollout": 0}, "prompts_per_rollout"),
            ({"group_size": 0}, "group_size"),
            ({"group_size": 2.5}, "group_size"),
            ({"group_size": None}, "group_size"),
            ({"prompts_per_rollout": 4.0}, "prompts_per_rollout"),
            ({"chat_template_kwargs": ["enable_thinking"]}, "chat_template_kwargs"),
            ({"rollouts_per_epoch": 0}, "rollouts_per_epoch"),
            ({"eval_batch_prompts": 0}, "eval_batch_prompts"),
            ({"eval_sets": {"a b": EvalSet(Paths(), IsOne())}}, "eval_sets"),
            ({"eval_sets": {"a/b": EvalSet(Paths(), IsOne())}}, "eval_sets"),
        ],
    )
    def test_are_named_before_anything_is_built(self, tokenizer, settings, name):
        with pytest.raises(ConfigError) as caught:
            build(tokenizer, attach=False, **settings)
        assert caught.value.setting == name

    @pytest.mark.parametrize(
        ("name", "values"),
        [
            ("temperature", [-1, -0.0001, 1e-7, 1e-40, float("nan"), float("inf"), None, "1", True]),
            ("top_p", [0, -0.1, 1.01, float("nan"), None, "0.9"]),
            ("top_k", [-1, 1.5, 20.0, float("nan"), None, "20"]),
            ("min_p", [-0.1, 1, 1.5, float("nan"), None]),
            ("max_tokens", [0, -1, 16.0, 1.5, float("inf"), None, "16"]),
        ],
    )
    def test_sampling_values_that_no_engine_samples_with_are_named(self, name, values):
        for value in values:
            with pytest.raises(ConfigError) as caught:
                SamplingParams(**{name: value})
            assert caught.value.setting == name, value

    def test_those_that_are_allowed_are_sampled_with_as_they_are(self):
        """Down to the coldest temperature, the log-prob is a number and the likeliest token is drawn."""
        for temperature in (1e-6, 1e-3, 2.5, 1e6):
            sampling = SamplingParams(temperature=temperature, top_p=1e-9 if temperature > 1 else 1.0)
            tokens, logp = sample_tokens(torch.tensor([[-100.0, 3e4, 50.0]]), sampling, torch.tensor([7]), 0)
            assert (tokens.item(), logp.item()) == (1, 0.0)

    @pytest.mark.parametrize("name", ["limit", "samples"])
    @pytest.mark.parametrize("count", [0, -1, 1.5])
    def test_an_evaluation_of_no_problems_or_samples_is_named(self, name, count):
        """A limit of -1 would silently leave out the last problem."""
        with pytest.raises(ConfigError, match=rf"^{name}: {count} - "):
            EvalSet(Paths(), IsOne(), **{name: count})

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("temperature", -1),
            ("top_p", 0),
            ("top_p", 1.1),
            ("top_k", -1),
            ("min_p", 1),
            ("min_p", -0.1),
            ("max_tokens", 0),
        ],
    )
    def test_impossible_sampling_is_named(self, name, value):
        with pytest.raises(ConfigError, match=rf"^{name}: "):
            SamplingParams(**{name: value})

    @pytest.mark.parametrize(("minimum", "size", "allowed"), [(2, 1, False), (2, 2, True), (1, 1, True), (3, 2, False)])
    def test_the_algorithm_says_how_large_a_group_must_be(self, tokenizer, minimum, size, allowed):
        data = build(tokenizer, attach=False, group_size=size)
        data.trainer = SimpleNamespace(fast_dev_run=1, lightning_module=Provider(tokenizer, min_group_size=minimum))
        if allowed:
            data.setup("fit")
        else:
            with pytest.raises(ConfigError, match=rf"^group_size: {size} - Provider.*write {minimum} or more"):
                data.setup("fit")

    @pytest.mark.parametrize(
        ("regularizer", "allowed"),
        [
            (PositionCentredInformationBottleneck(), False),
            (PassRateInformationBottleneck(prompts="mixed"), False),
            (PassRateInformationBottleneck(prompts="hard"), True),
            (InformationBottleneck(), True),
        ],
    )
    def test_a_regulariser_that_compares_responses_refuses_one_to_a_prompt(self, tokenizer, regularizer, allowed):
        provider = Provider(tokenizer, min_group_size=1)
        provider.regularizer = regularizer
        for size, refused in ((1, not allowed), (2, False)):
            data = build(tokenizer, attach=False, group_size=size)
            data.trainer = SimpleNamespace(fast_dev_run=1, lightning_module=provider)
            if refused:
                name = type(regularizer).__name__
                with pytest.raises(ConfigError, match=rf"^group_size: 1 - {name} compares .*write 2 or more"):
                    data.setup("fit")
            else:
                data.setup("fit")

    def test_a_reward_without_accuracy_is_found_before_the_first_response(self, tokenizer):
        data = build(tokenizer, attach=False, reward=OverlongPenalty(4))
        data.trainer = SimpleNamespace(fast_dev_run=1, lightning_module=Provider(tokenizer), predicting=True)
        with pytest.raises(RewardError, match="accuracy"):
            data.setup("fit")
        assert data.engine.events == []

    @pytest.mark.parametrize(
        ("rule", "setting"),
        [
            (None, "null"),
            (DynamicSampling(on_exhausted="fill"), "on_exhausted: fill"),
            (DynamicSampling(on_exhausted="smaller"), ""),
        ],
    )
    def test_shaping_of_groups_that_do_not_differ_is_announced(self, tokenizer, rule, setting, recwarn):
        shaped = RewardSum([IsOne(), OverlongPenalty(4)])
        build(tokenizer, reward=shaped, dynamic_sampling=rule)
        said = [str(w.message) for w in recwarn if "data.dynamic_sampling" in str(w.message)]
        assert len(said) == bool(setting)
        assert all(line.startswith(f"data.dynamic_sampling: {setting} - ") and " overlong " in line for line in said)
        build(tokenizer, dynamic_sampling=rule)
        assert len([w for w in recwarn if "data.dynamic_sampling" in str(w.message)]) == len(said), "nothing is shaped"

    @pytest.mark.parametrize("where", ["source", "eval_sets.half"])
    def test_a_gold_that_its_verifier_cannot_use_is_refused_or_dropped(self, tokenizer, where):
        """In training and in evaluation, before the engine does anything."""
        mixed = Listed(*(Problem(f"half/{n}", f"0>{n + 1}:", gold) for n, gold in enumerate(["1/2", "7", "8", "9"])))
        sets = {"half": EvalSet(mixed, LastNumberReward())} if "eval" in where else {}
        own = {} if sets else {"source": mixed, "reward": LastNumberReward()}
        data = build(tokenizer, attach=False, eval_sets=sets, allow_overlap=True, **own)
        data.trainer = SimpleNamespace(fast_dev_run=1, lightning_module=Provider(tokenizer), predicting=True)
        with pytest.raises(ConfigError, match=rf"{where}: 'half/0' - 1 of 4 golds.*'1/2'.*or on_bad_gold: drop"):
            data.setup("fit")
        assert data.engine.events == []
        data = build(tokenizer, eval_sets=sets, allow_overlap=True, on_bad_gold="drop", **own)
        left = data.eval_prompts["half"] if sets else data._cursor.prompts
        assert [prompt.id for prompt in left] == ["half/1", "half/2", "half/3"]

    @pytest.mark.parametrize("stage", ["validate", "test", "predict"])
    def test_evaluating_without_a_set_is_named(self, tokenizer, stage):
        data = build(tokenizer)
        with pytest.raises(ConfigError, match=rf"^eval_sets.*{stage}"):
            data.setup(stage)

    def test_using_it_without_a_trainer_says_so(self, tokenizer):
        with pytest.raises(RuntimeError, match="Trainer"):
            build(tokenizer, attach=False).setup("fit")


class TestEvaluation:
    def build(self, tokenizer, stage: str = "validate", **settings) -> EvaluationDataModule:
        sampling = SamplingParams(temperature=0.6, top_p=0.95, max_tokens=7)
        defaults = {
            "engine": ScriptedEngine(tokenizer),
            "eval_sets": {"aime": EvalSet(Paths(10), IsOne(), samples=3, sampling=sampling)},
            "eval_batch_prompts": 4,
            "weight_check": None,
            "reward_pool": None,
        }
        data = EvaluationDataModule(**{**defaults, **settings})
        data.trainer = SimpleNamespace(fast_dev_run=1, lightning_module=Provider(tokenizer), predicting=True)
        data.setup(stage)
        return data

    def test_covers_every_prompt_once_in_the_sources_order(self, tokenizer):
        (stream,) = self.build(tokenizer).val_dataloader()
        rollouts = list(stream)
        assert len(stream) == len(rollouts) == 3
        assert [len(r) for r in rollouts] == [12, 12, 6]
        texts = [text for r in rollouts for text in prompts_of_groups(r)]
        assert texts == [f"0>{number}:" for number in range(1, 11)]
        assert {r.name for r in rollouts} == {"aime"}

    def test_uses_the_same_seeds_every_time(self, tokenizer):
        """Two policies, or one policy at two times, are compared with the same random numbers."""
        data = self.build(tokenizer)
        (stream,) = data.val_dataloader()
        list(stream), list(stream)
        calls = data.engine.calls
        assert calls[:3] == calls[3:]
        other = self.build(tokenizer)
        list(other.val_dataloader()[0])
        assert other.engine.calls == calls[:3]

    def test_seeds_do_not_depend_on_the_batch_or_the_limit(self, tokenizer):
        def seeds(**settings):
            data = self.build(tokenizer, **settings)
            list(data.val_dataloader()[0])
            return [row for _, rows, _ in data.engine.calls for row in rows]

        everything = seeds()
        assert seeds(eval_batch_prompts=3) == everything
        assert seeds(eval_batch_prompts=100) == everything
        limited = EvalSet(Paths(10), IsOne(), samples=3, limit=4)
        assert seeds(eval_sets={"aime": limited}) == everything[:4]

    def test_seeds_are_unique_over_samples_prompts_and_sets(self, tokenizer):
        sets = {name: EvalSet(Paths(10), IsOne(), samples=3) for name in ("aime", "amc")}
        data = self.build(tokenizer, eval_sets=sets)
        for stream in data.val_dataloader():
            list(stream)
        seeds = [seed for _, rows, _ in data.engine.calls for row in rows for seed in row]
        assert len(set(seeds)) == len(seeds) == 2 * 10 * 3

    def test_evaluation_may_truncate_the_distribution(self, tokenizer):
        data = self.build(tokenizer)
        rollouts = list(data.val_dataloader()[0])
        assert {(s.temperature, s.top_p, s.max_tokens) for _, _, s in data.engine.calls} == {(0.6, 0.95, 7)}
        assert {r.temperature for r in rollouts} == {0.6}

    def test_the_engine_sleeps_once_the_last_batch_is_there(self, tokenizer):
        """Lightning asks for as many batches as there are, and never again: nothing after the last one would run."""
        data = self.build(tokenizer)
        (stream,) = data.val_dataloader()
        batches = iter(stream)
        for _ in range(len(stream)):
            assert data.engine.events[-1] != "offload"
            next(batches)
        assert data.engine.events[-1] == "offload"

    def test_late_responses_are_reported_as_cut_and_warned_of(self, tokenizer):
        class Late(ScriptedEngine):
            def generate(self, prompts, sampling, seeds):
                groups = super().generate(prompts, sampling, seeds)
                return [[replace(sample, finish_reason="deadline") for sample in group] for group in groups]

        (stream,) = self.build(tokenizer, engine=Late(tokenizer)).val_dataloader()
        metric = SampleAccuracy()
        with pytest.warns(UserWarning, match="aime: data.engine.deadline_s cut 12 responses"):
            rollouts = list(stream)
        for rollout in rollouts:
            metric.update(rollout)
        assert metric.compute().truncated == 1

    @pytest.mark.parametrize("limit", [None, 12, 11])
    def test_prompts_and_responses_must_fit_the_engine(self, tokenizer, limit):
        """The longest prompt is 0>10: of 4 tokens, responses have up to 7."""
        engine = ScriptedEngine(tokenizer)
        engine.max_model_len = limit
        longest = max(len(tokenizer(f"0>{number}:")["input_ids"]) for number in range(1, 11))
        if limit is None or longest + 7 <= limit:
            self.build(tokenizer, engine=engine)
            engine.max_model_len = longest + 6
        with pytest.raises(ConfigError, match=r"^eval_sets\.aime\.sampling\.max_tokens: 7 - .* write at most 6"):
            self.build(tokenizer, engine=engine)

    def test_evaluates_the_current_weights(self, tokenizer):
        data = self.build(tokenizer)
        (stream,) = data.val_dataloader()
        for version in (1.0, 2.0):
            data.provider.version = version
            list(stream)
        assert data.engine.weights_at_calls == [1.0] * 3 + [2.0] * 3

    def test_test_sets_are_their_own_or_the_evaluation_sets(self, tokenizer):
        own = {"amc": EvalSet(Paths(2), IsOne())}
        assert [s.name for s in self.build(tokenizer, "test", test_sets=own).test_dataloader()] == ["amc"]
        assert [s.name for s in self.build(tokenizer, "test").test_dataloader()] == ["aime"]
        assert [s.name for s in self.build(tokenizer, "predict").predict_dataloader()] == ["aime"]

    def test_evaluating_in_between_does_not_change_training(self, tokenizer):
        sets = {"aime": EvalSet(Paths(10), IsOne(), samples=3)}
        plain, evaluated = build(tokenizer), build(tokenizer, eval_sets=sets, allow_overlap=True)
        for data in (plain, evaluated):
            data.next_rollout()
            for stream in data.val_dataloader():
                list(stream)
            data.next_rollout()
        assert plain.engine.calls == [evaluated.engine.calls[0], evaluated.engine.calls[-1]]


class TestDemonstrations:
    def build(self, tokenizer, **settings) -> SFTDataModule:
        data = SFTDataModule(NumberPathDemonstrations(max_steps=4), batch_size=8, **settings)
        data.trainer = SimpleNamespace(fast_dev_run=1, lightning_module=Provider(tokenizer), predicting=True)
        return data

    def test_rows_are_prompt_response_and_eos(self, tokenizer):
        batch = self.build(tokenizer).next_batch()
        assert len(batch) == 8
        for row, (total, prompt_length) in enumerate(
            zip(batch.lengths.tolist(), batch.prompt_lengths.tolist(), strict=True)
        ):
            tokens = tokenizer.convert_ids_to_tokens(batch.input_ids[row, :total].tolist())
            start, arrow, target, colon = tokens[:prompt_length]
            assert (arrow, colon) == (">", ":")
            assert NumberPath().verify(tokens[prompt_length:], int(start), int(target))

    def test_resumes_with_the_next_batch(self, tokenizer):
        straight, resumed = self.build(tokenizer), self.build(tokenizer)
        batches = [straight.next_batch() for _ in range(3)]
        assert not torch.equal(batches[0].input_ids, batches[1].input_ids)
        resumed.load_state_dict({"step": 2})
        assert torch.equal(resumed.next_batch().input_ids, batches[2].input_ids)
        assert resumed.state_dict() == straight.state_dict()

    def test_an_epoch_has_its_steps(self, tokenizer):
        data = self.build(tokenizer, steps_per_epoch=3)
        assert len(data.train_dataloader()) == len(list(data.train_dataloader())) == 3

    @pytest.mark.parametrize("name", ["batch_size", "steps_per_epoch"])
    def test_refused_settings_are_named(self, name):
        with pytest.raises(ConfigError, match=rf"^{name}: 0"):
            SFTDataModule(NumberPathDemonstrations(), **{name: 0})


@pytest.mark.parametrize(("split", "rows"), [("train", 3), ("test", 3), ("train[:2]", 2)])
def test_a_local_file_answers_to_any_split_name_and_slice(tmp_path, split, rows):
    """So that a recipe written for a hub dataset takes a local copy by its path alone."""
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(f'{{"problem": "{n}+1", "answer": "{n + 1}"}}\n' for n in range(3)))
    assert len(list(DatasetSource(str(path), split=split).problems())) == rows


class TestConstructors:
    KINDS = (EvaluationDataModule, RolloutDataModule, SFTDataModule)

    @pytest.mark.parametrize("kind", KINDS)
    def test_signature_and_help_show_the_same_parameters_each_explained(self, kind):
        parser = OneLineParser()
        parser.add_class_arguments(kind, "data")
        actions = {action.dest.removeprefix("data."): action for action in parser._actions}
        parameters = inspect.signature(kind).parameters
        assert not [one for one in parameters.values() if one.kind in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
        shown = {name.partition(".")[0] for name in actions} - {"data", "help"}
        assert shown == parameters.keys()
        defaults = {name: actions[name].default for name in parameters if name in actions}
        plain = {name: one.default for name, one in parameters.items() if isinstance(one.default, bool | int | str)}
        assert plain.items() <= defaults.items()
        assert not [name for name in parameters if name in actions and not actions[name].help]

    def test_its_text_generates_nothing(self, tokenizer):
        """Lightning's own ``__str__`` iterates over the training data: here it would sample an epoch."""
        data = build(tokenizer, [1] * 9, rollouts_per_epoch=2)
        assert str(data) == "RolloutDataModule(evaluation sets: none)"
        assert data.iteration == 0

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_wrong_keyword_names_the_class(self, kind):
        with pytest.raises(
            TypeError, match=rf"{kind.__name__}\.__init__\(\) got an unexpected keyword argument 'engin'"
        ):
            kind(engin=None)


class TestFromRolloutToRollout:
    def test_an_iteration_that_fails_begins_again_with_the_same_prompts_and_seeds(self, tokenizer):
        straight, failing = build(tokenizer), build(tokenizer)
        for data in (straight, failing):
            data.next_rollout()
        generate, failing.engine.generate = failing.engine.generate, None  # not callable
        with pytest.raises(TypeError):
            failing.next_rollout()
        failing.engine.generate = generate
        for data in (straight, failing):
            assert data.next_rollout().iteration == 2
        assert failing.engine.calls == straight.engine.calls

    def test_a_resumed_run_goes_on_counting_lost_rollouts(self, tokenizer):
        first, second = build(tokenizer), build(tokenizer)
        first.load_state_dict({**first.state_dict(), "lost_rollouts": 2})
        second.load_state_dict(first.state_dict())
        assert second.state_dict()["lost_rollouts"] == 2

    def test_stopped_verifications_are_those_of_the_rollout(self, tokenizer, monkeypatch):
        """The pool counts those of the whole run."""
        data = build(tokenizer)
        counts = iter([3.0, 5.0, 5.0, 5.0])
        monkeypatch.setattr(data.collector, "verifications_stopped", lambda: {"timed_out": next(counts)})
        assert [data.next_rollout().metrics["verifier/timed_out"] for _ in range(2)] == [2.0, 0.0]

    def test_the_share_of_lost_verdicts_is_that_of_the_whole_evaluation(self, tokenizer):
        data = TestEvaluation().build(tokenizer)
        data.collector.reward_pool = PoolOptions()
        shares = [rollout.metrics.get("verifier/lost_share") for rollout in data.val_dataloader()[0]]
        assert shares == [None, None, 0.0]

    def test_a_round_is_large_enough_for_the_share_that_has_been_informative(self, tokenizer):
        """One is missing, and two of three were informative: 1.5 prompts are two."""
        data = build(tokenizer, [1, 1, 0, 1, 1], dynamic_sampling=DynamicSampling())
        data.next_rollout()
        assert [len(texts) for texts, _, _ in data.engine.calls] == [3, 2]
