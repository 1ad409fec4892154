"""From problems to the tokens that a model sees: raw text and EOS, chat templates, and prompts that end with the
assistant's words. With a byte-level tokenizer, so that every template can be tried on it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from helpers.prompts import Listed
from ibro_lightning.batches.sequences import FlatSequences
from ibro_lightning.datamodules import EvalSet, EvaluationDataModule, RolloutDataModule, SFTDataModule
from ibro_lightning.datamodules.collector import Collector
from ibro_lightning.errors import ConfigError
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.regularizers.hindsight import HindsightTemplate
from ibro_lightning.rendering import last_question, render
from ibro_lightning.rewards import LastNumberReward, VerifiableReward
from ibro_lightning.sources import (
    DatasetSource,
    DemonstrationSource,
    PromptLimits,
    PromptSource,
    encode_prompts,
    overlaps,
)
from ibro_lightning.sources.chat_template import template_variables
from ibro_lightning.timing import PhaseTimer
from ibro_lightning.types import Generation, Problem, Prompt, SamplingParams

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_GENERATION_PROMPT = (  # as Mistral's
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
TRIMS = CHATML.replace("m['content']", "m['content'] | trim")
OPENS_A_THOUGHT = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")  # as QwQ's
DROPS_THOUGHTS = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")  # as DeepSeek-R1's
THINKS = (  # as Qwen3's: an empty thought before the last answer, and in the generation prompt if thinking is off
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
BOS, EOS, END, THINK, THOUGHT = "<s>", "</s>", "<|im_end|>", "<think>", "</think>"
SPECIAL = [BOS, EOS, "<|im_start|>", END, THINK, THOUGHT, "[SEP]", "<pad>"]
ASK = {"role": "user", "content": "What is 2 + 2?"}


def tokenizer(template: str | None = None, around: str = "$A", eos: str = END) -> PreTrainedTokenizerFast:
    """Bytes and special tokens; ``around`` is what the tokenizer puts around raw text, e.g. ``<s> $A </s>``."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *letters])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    if around != "$A":
        used = [(token, vocabulary[token]) for token in SPECIAL if token in around.split()]
        core.post_processor = processors.TemplateProcessing(single=around, special_tokens=used)
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BOS, eos_token=eos, pad_token="<pad>")
    fast.chat_template = template
    return fast


def encode(tokenizer, *contents, **kwargs) -> list[Prompt]:
    problems = [Problem(f"p{number}", content, "4") for number, content in enumerate(contents)]
    return encode_prompts(Listed(*problems), tokenizer, PromptLimits(), setting="source", **kwargs)


def text(content, template: str, **kwargs) -> str:
    """The prompt as the model reads it, from its tokens."""
    tokens = tokenizer(template)
    rendered, token_ids = render(content, tokens, kwargs)
    assert tokens.decode(list(token_ids)) == rendered
    return rendered


class TestRawText:
    @pytest.mark.parametrize("around", ["$A </s>", "<s> $A </s>", "<s> $A [SEP]", "<s> $A [SEP] </s>", "$A <|im_end|>"])
    def test_ends_with_its_own_last_token(self, around):
        """A response that follows EOS answers nothing."""
        tokens = tokenizer(around=around)
        with pytest.warns(UserWarning, match="the policy's tokenizer appends"):
            (prompt,) = encode(tokens, "What is 2 + 2?")
        before = [BOS] if around.startswith(BOS) else []
        assert tokens.decode(list(prompt.token_ids)) == "".join([*before, "What is 2 + 2?"])

    def test_the_report_names_what_was_cut(self):
        with pytest.warns(UserWarning, match=r"^the policy's tokenizer appends '\[SEP\]</s>' to raw text: cut"):
            encode(tokenizer(around="<s> $A [SEP] </s>"), "one", "two")

    def test_nothing_is_reported_where_nothing_is_added(self, recwarn):
        encode(tokenizer(around="<s> $A"), "one", "two")
        encode(tokenizer(CHATML, around="<s> $A </s>"), [ASK])
        assert [str(warning.message) for warning in recwarn] == []

    def test_bos_is_not_doubled_where_the_text_has_it(self):
        tokens = tokenizer(around="<s> $A </s>")
        assert render("<s>one", tokens)[1] == render("one", tokens)[1]
        assert tokens.decode(list(render("<s>one", tokens)[1])) == "<s>one"

    def test_an_eos_within_the_text_is_the_users(self):
        """Few-shot prompts divide their examples with it."""
        tokens = tokenizer(around="$A <|im_end|>")
        few = f"1+1? 2{END}2+2?"
        assert tokens.decode(list(render(few, tokens)[1])) == few

    @pytest.mark.filterwarnings("ignore:the policy's tokenizer puts")
    def test_one_at_the_texts_end_is_kept_and_reported(self):
        with pytest.warns(UserWarning, match=r"1 of 2 prompts end with '<\|im_end\|>' \(first 'p1'\), after which"):
            _, prompt = encode(tokenizer(around="$A <|im_end|>"), "one", f"two{END}")
        assert prompt.token_ids[-1] == SPECIAL.index(END)

    @pytest.mark.parametrize("around", ["$A </s>", "<s> $A </s>", "<s> $A"])
    def test_empty_text_is_bos_or_nothing(self, around):
        _, token_ids = render("", tokenizer(around=around))
        assert token_ids == ((0,) if around.startswith(BOS) else ())

    def test_a_tokenizer_that_cuts_text_up_differently_within_special_tokens(self):
        class Odd:
            all_special_ids = (1, 2)

            def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
                return {"input_ids": [1, 30, 31, 2] if add_special_tokens else [40, 31]}

        assert render("x", Odd())[1] == (1, 30, 31)

    def test_prompts_with_the_answer_shown_end_likewise(self):
        tokens = tokenizer(around="<s> $A <|im_end|>")
        prompt = Prompt("p", "2+2?", (9,), "4", content="2+2?")
        row = (
            HindsightTemplate("{prompt} ({answer})")
            .sequences([prompt], FlatSequences.collate([[1]], [[5, 3]]), tokens)
            .pad()
        )
        ids = row.input_ids[0].tolist()
        assert tokens.decode(ids[:-2]) == "<s>2+2? (4)"
        assert ids[-2:] == [5, 3]


class TestDemonstrations:
    class Shown(DemonstrationSource):
        def __init__(self, prompt, response: str = "4") -> None:
            self.shown = prompt, response

        def demonstration(self, seed):
            return self.shown

    def batch(self, tokens, prompt, response: str = "4", **settings) -> tuple[str, str]:
        data = SFTDataModule(self.Shown(prompt, response), reward_pool=None, **settings)
        prompts, responses = data.encode([data.source.demonstration(0)] * 2, tokens)
        return tokens.decode(list(prompts[1])), tokens.decode(responses[1])

    @pytest.mark.parametrize("around", ["$A <|im_end|>", "<s> $A <|im_end|>", "$A", "<s> $A"])
    def test_eos_is_learnt_once_and_only_behind_the_response(self, around):
        before = BOS if around.startswith(BOS) else ""
        tokens = tokenizer(around=around)
        assert self.batch(tokens, "2+2?") == (f"{before}2+2?", f"4{END}")
        assert self.batch(tokens, "2+2?", f"4{END}") == (f"{before}2+2?", f"4{END}")
        assert self.batch(tokens, "2+2?", "") == (f"{before}2+2?", END)

    def test_messages_go_through_the_chat_template(self):
        tokens = tokenizer(THINKS, around="<s> $A <|im_end|>")
        prompt, response = self.batch(tokens, [ASK], chat_template_kwargs={"enable_thinking": False})
        assert prompt == f"<|im_start|>user\n{ASK['content']}{END}\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        assert response == f"4{END}"
        assert self.batch(tokens, [ASK, {"role": "assistant", "content": "It is "}])[0].endswith("It is ")

    def test_what_is_cut_from_them_is_reported(self, monkeypatch):
        monkeypatch.setenv("PL_GLOBAL_SEED", "5")
        data = SFTDataModule(self.Shown("2+2?"), engine=Scripted(), weight_check=None, reward_pool=None)
        with pytest.warns(UserWarning, match=r"^the policy's tokenizer appends '<\|im_end\|>' to raw text"):
            attach(data, tokenizer(around="$A <|im_end|>"), "fit")

    def test_messages_without_a_chat_template_are_refused_in_one_line(self):
        with pytest.raises(ConfigError, match=r"^source: 'Shown' - the chat template cannot write"):
            self.batch(tokenizer(), [ASK])


class TestPrefill:
    WORDS = "Let me think."

    def begun(self, words: str = WORDS) -> list[dict[str, str]]:
        return [ASK, {"role": "assistant", "content": words}]

    def test_is_continued(self):
        expected = f"<|im_start|>user\n{ASK['content']}{END}\n<|im_start|>assistant\nLet me think."
        assert text(self.begun(), CHATML) == expected

    @pytest.mark.parametrize("template", [CHATML, TRIMS, NO_GENERATION_PROMPT, OPENS_A_THOUGHT, DROPS_THOUGHTS, THINKS])
    @pytest.mark.parametrize("words", [WORDS, "The answer is \\boxed{", "4"])
    def test_is_what_transformers_calls_continue_final_message(self, template, words):
        expected = tokenizer(template).apply_chat_template(
            self.begun(words), continue_final_message=True, tokenize=False
        )
        assert text(self.begun(words), template) == expected

    @pytest.mark.parametrize("template", [CHATML, NO_GENERATION_PROMPT, TRIMS, THINKS])
    def test_white_space_at_its_end_stays(self, template):
        """The tokens of what follows depend on it."""
        assert text(self.begun("Steps:\n\n1. "), template).endswith("Steps:\n\n1. ")

    def test_white_space_that_a_template_would_strip_stays(self):
        assert text(self.begun("\n Steps"), TRIMS).endswith("<|im_start|>assistant\n\n Steps")

    def test_a_thought_is_not_opened_twice(self):
        for template in (OPENS_A_THOUGHT, THINKS, DROPS_THOUGHTS, CHATML):
            written = text(self.begun("<think>\nWell"), template)
            assert written.endswith("<|im_start|>assistant\n<think>\nWell"), template

    def test_a_thought_that_a_template_would_drop_stays(self):
        words = "<think>\n2 + 2\n</think>\n\nIt is"
        assert text(self.begun(words), DROPS_THOUGHTS).endswith(f"<|im_start|>assistant\n{words}")

    def test_follows_the_empty_thought_of_a_model_that_is_not_to_think(self):
        assert text(self.begun(), THINKS, enable_thinking=False).endswith("<think>\n\n</think>\n\nLet me think.")

    def test_is_refused_where_the_template_changes_it(self):
        strips = NO_GENERATION_PROMPT.replace("m['content'] + eos_token", "m['content'] | trim + eos_token")
        with pytest.raises(ConfigError, match=r"^source: 'p0' - the chat template changes how .*' \\nWell'"):
            encode(tokenizer(strips), self.begun(" \nWell"))

    def test_is_continued_where_the_template_wants_the_user_to_be_last(self):
        insists = "{% if messages[-1].role != 'user' %}{{ raise_exception('the user must be last') }}{% endif %}"
        assert text(self.begun(), insists + CHATML).endswith("<|im_start|>assistant\nLet me think.")
        with pytest.raises(ConfigError, match=r"'p0' - the chat template cannot write these .*the user must be last"):
            encode(tokenizer(insists + NO_GENERATION_PROMPT), self.begun())

    @pytest.mark.parametrize("words", ["", " \n"])
    def test_of_no_words_is_refused(self, words):
        with pytest.raises(ConfigError, match=r"^source: 'p0' - the last message is the assistant's and is empty"):
            encode(tokenizer(CHATML), self.begun(words))

    def test_an_assistant_turn_in_the_middle_is_closed(self):
        turns = [*self.begun("4"), {"role": "user", "content": "And 3 + 3?"}, *self.begun("It is")[1:]]
        written = text(turns, CHATML)
        assert written.count(END) == 3
        assert written.endswith("<|im_start|>assistant\nIt is")

    def test_the_question_is_the_users_last_message(self, tmp_path):
        turns = [{"role": "system", "content": "Be brief."}, *self.begun()]
        (prompt,) = encode(tokenizer(CHATML), turns)
        assert prompt.question == ASK["content"]
        assert prompt.prefill == "Let me think."
        path = tmp_path / "prefill.jsonl"
        path.write_text(json.dumps({"prompt": turns, "answer": "4"}) + "\n")
        (problem,) = DatasetSource(str(path)).problems()
        assert problem.question == ASK["content"]

    def test_overlaps_are_found_by_the_question_and_not_by_the_prefill(self):
        """All prompts of a set begin their answers alike."""
        chat = tokenizer(CHATML)
        other = [{"role": "user", "content": "What is 3 + 3?"}, self.begun()[1]]
        trained = encode(chat, [ASK])
        assert [overlap.eval_id for overlap in overlaps(encode(chat, self.begun(), other), trained)] == ["p0"]
        assert overlaps(encode(chat, other), encode(chat, self.begun())) == []

    def test_the_answer_is_shown_in_the_question_and_the_words_are_continued(self):
        chat = tokenizer(CHATML)
        prompts = encode(chat, self.begun())
        row = (
            HindsightTemplate("{prompt} ({answer})").sequences(prompts, FlatSequences.collate([[1]], [[5]]), chat).pad()
        )
        expected = f"<|im_start|>user\n{ASK['content']} (4){END}\n<|im_start|>assistant\nLet me think."
        assert chat.decode(row.input_ids[0].tolist()[:-1]) == expected


class Scripted:
    """An engine that answers every prompt with the same tokens."""

    dtype, max_model_len = "float32", None

    def __init__(self, token_ids: Sequence[int] = (), finish: str = "stop") -> None:
        self.generation = Generation(tuple(token_ids), (-0.5,) * len(token_ids), finish)

    def setup(self, spec: ModelSpec) -> None: ...

    def generate(self, prompts, sampling, seeds):
        return [[self.generation for _ in row] for row in seeds]


class Texts(VerifiableReward):
    """Remembers what it was given to read."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[str] = []

    def verify(self, prompt, completion):
        self.read.append(completion.text)
        return True


class TestWhatRewardsRead:
    def collect(self, tokens, prompt: Prompt, answer: str, finish: str = "stop", **settings):
        reward, engine = Texts(), Scripted(tokens(answer, add_special_tokens=False)["input_ids"], finish)
        collector = Collector(engine, **settings)
        collector.attach(SimpleNamespace(tokenizer=tokens, eos_token_ids=(SPECIAL.index(END),)))
        (group,) = collector.collect([prompt], [[1, 2]], SamplingParams(), reward, PhaseTimer())
        assert {completion.text for completion in group.completions} == {reward.read[0].removeprefix(prompt.prefill)}
        return reward.read[0]

    def test_is_the_assistants_whole_message(self):
        """A box that the prompt opens is closed by the response; the record keeps the response alone."""
        chat = tokenizer(CHATML)
        (prompt,) = encode(chat, [ASK, {"role": "assistant", "content": "It is \\boxed{"}])
        assert self.collect(chat, prompt, f"4}}{END}") == "It is \\boxed{4}"
        (plain,) = encode(chat, [ASK])
        assert self.collect(chat, plain, f"4{END}") == "4"

    ANSWER = f"{THINK}2+2{THOUGHT}4"

    @pytest.mark.parametrize("end", [END, "", f"{END}<pad>", EOS])
    def test_has_special_tokens_if_asked_but_not_its_end(self, end):
        tokens = tokenizer(CHATML, eos=EOS)
        (prompt,) = encode(tokens, [ASK])
        assert self.collect(tokens, prompt, self.ANSWER + end) == "2+24"
        assert self.collect(tokens, prompt, self.ANSWER + end, keep_special_tokens=True) == self.ANSWER

    def test_an_end_within_it_stays(self):
        tokens = tokenizer(CHATML)
        (prompt,) = encode(tokens, [ASK])
        assert (
            self.collect(tokens, prompt, f"<pad>4{THOUGHT}", "length", keep_special_tokens=True) == f"<pad>4{THOUGHT}"
        )


class TestMessages:
    def test_parts_of_text_are_text(self, tmp_path):
        parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "2 + 2?", "image": None}]
        turns = [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": parts},
        ]
        (prompt,) = encode(tokenizer(CHATML), turns)
        assert prompt.text.startswith(f"<|im_start|>system\nBe brief.{END}\n<|im_start|>user\nWhat is\n2 + 2?{END}\n")
        assert prompt.question == "What is\n2 + 2?"
        path = tmp_path / "parts.jsonl"
        path.write_text(json.dumps({"prompt": turns, "answer": "4"}) + "\n")
        (problem,) = DatasetSource(str(path)).problems()
        assert problem.prompt[1] == {"role": "user", "content": "What is\n2 + 2?"}

    @pytest.mark.parametrize(
        "content", [[{"type": "image_url", "image_url": "x"}], [{"type": "text", "text": None}], [], 7, None, {"a": 1}]
    )
    def test_anything_else_is_refused_in_one_line(self, tmp_path, content):
        turns = [{"role": "user", "content": content}]
        what = "has no content" if content is None else "contains something other than text"
        with pytest.raises(ConfigError, match=rf"^source: 'p0' - message 1 {what}"):
            encode(tokenizer(CHATML), turns)
        path = tmp_path / "parts.jsonl"
        path.write_text(json.dumps({"prompt": turns, "answer": "4"}) + "\n")
        with pytest.raises(ConfigError, match=r"prompt_column.*line 1: neither text nor a list of messages: message 1"):
            list(DatasetSource(str(path)).problems())

    @pytest.mark.parametrize("content", [[], None, 7, [{"content": "x"}], ["x"]])
    def test_what_is_no_list_of_messages_is_refused_in_one_line(self, content):
        with pytest.raises(ConfigError, match=r"^source: 'p0' - (a prompt is text or a list|message 1 has no role)"):
            encode(tokenizer(CHATML), content)

    def test_roles_and_further_fields_are_for_the_template(self, tmp_path):
        template = (
            "{% for m in messages %}{{ m.role }}{% for c in m.tool_calls or [] %}({{ c.name }}){% endfor %}"
            ":{{ m.content }};{% endfor %}{{ '>' if add_generation_prompt }}"
        )
        turns = [
            ASK,
            {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]},
            {"role": "tool", "content": "4", "name": "add", "tool_calls": None},
        ]
        path = tmp_path / "tools.jsonl"
        path.write_text(json.dumps({"prompt": turns, "answer": "4"}) + "\n")
        (problem,) = DatasetSource(str(path)).problems()
        assert text(problem.prompt, template) == "user:What is 2 + 2?;assistant(add):;tool:4;>"
        assert problem.question == ASK["content"]

    @pytest.mark.parametrize(
        ("turns", "question"),
        [
            ([ASK, {"role": "system", "content": "Be brief."}], ASK["content"]),
            ([{"role": "system", "content": "2+2?"}], "2+2?"),
            ([{"role": "user", "content": "1?"}, {"role": "assistant", "content": "1"}, ASK], ASK["content"]),
            ([{"role": "assistant", "content": "It is"}], "It is"),
        ],
    )
    def test_what_is_asked(self, turns, question):
        assert last_question(turns) == question

    def test_what_the_template_refuses_is_said_in_one_line(self):
        refuses = "{{ raise_exception('System role\nnot supported') }}"
        with pytest.raises(ConfigError, match=r"'p0' - the chat template cannot write these messages: System role not"):
            encode(tokenizer(refuses), [ASK])
        with pytest.raises(
            ConfigError, match=r"'p0' - the chat template cannot write these messages: 'nothing' is und"
        ):
            encode(tokenizer("{{ nothing.at.all }}"), [ASK])

    def test_a_template_that_ends_every_turn_with_eos_and_opens_none_is_reported(self):
        ends = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        with pytest.warns(UserWarning, match=r"1 of 1 prompts end with '<\|im_end\|>'"):
            encode(tokenizer(ends), [ASK])


PARTS = (  # as of multimodal bases
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% for p in m['content'] | selectattr('type', 'equalto', 'text') %}{{ p['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FIRST_PART = CHATML.replace("m['content']", "m['content'][0]['text']")
PARTS_OF_USERS = CHATML.replace(
    "m['content']", "(m['content'][0]['text'] if m['role'] == 'user' else m['content'].strip())"
)


class TestWhatTheTemplateReads:
    BRIEF: Mapping[str, str] = {"role": "system", "content": "Be brief."}

    @pytest.mark.parametrize("template", [PARTS, FIRST_PART, PARTS_OF_USERS])
    def test_parts_are_given_where_it_wants_parts(self, template):
        for turns in (
            [ASK],
            [self.BRIEF, ASK],
            [{"role": "user", "content": [{"type": "text", "text": ASK["content"]}]}],
            [ASK, {"role": "assistant", "content": "4"}, ASK],
            [{"role": "user", "content": " text: 'content', {\"type\": 1} "}],
        ):
            assert text(turns, template) == text(turns, CHATML)

    @pytest.mark.parametrize("template", [PARTS, FIRST_PART])
    @pytest.mark.parametrize("words", ["It is", "It is ", "<think>\nHm"])
    def test_the_assistants_words_are_continued_likewise(self, template, words):
        turns = [ASK, {"role": "assistant", "content": words}]
        assert text(turns, template) == text(turns, CHATML)
        assert encode(tokenizer(template), turns)[0].prefill == words

    def test_one_that_reads_both_gets_text(self):
        both = PARTS.replace("{% for p", "{% if m['content'] is string %}{{ 'T' + m['content'] }}{% else %}{% for p")
        both = both.replace("{% endfor %}{{ '<|im_end|>", "{% endfor %}{% endif %}{{ '<|im_end|>")
        assert f"user\nT{ASK['content']}" in text([ASK], both)

    @pytest.mark.parametrize(
        ("template", "turns", "number"),
        [
            (NO_GENERATION_PROMPT.replace("'user'", "'human'").replace("{% else", "{% elif false"), [ASK], 1),
            (CHATML.replace("messages %}", "messages if m['role'] == 'user' %}"), [{**ASK, "role": "human"}], 1),
            (CHATML.replace("messages %}", "messages[:-1] %}"), [{**ASK, "role": "system"}, ASK], 2),
            (CHATML.replace("messages %}", "messages if m['role'] == 'user' %}"), [ASK, {**ASK, "role": "tool"}], 2),
            (CHATML.replace("m['content']", "m['text'] | default('')"), [ASK], 1),
            (CHATML.replace("messages %}", "messages[1:] %}"), [ASK, {"role": "assistant", "content": "It is"}], 1),
        ],
    )
    def test_one_that_leaves_the_question_out_is_refused_in_one_line(self, template, turns, number):
        with pytest.raises(
            ConfigError, match=rf"^source: 'p0' - the chat template leaves out message {number} \(role '\w+'\)"
        ) as refusal:
            encode(tokenizer(template), turns)
        assert "\n" not in str(refusal.value)

    @pytest.mark.parametrize("change", ["| trim", "| tojson", "| upper", "| escape", "[:200]"])
    def test_one_that_changes_the_text_is_left_to_it(self, change):
        turns = [self.BRIEF, {"role": "user", "content": '  Is "1 < 2"\n& é?\n'}]
        template = CHATML.replace("m['content']", f"(m['content'] {change})")
        tokens = tokenizer(template)
        expected = tokens.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        assert render(turns, tokens)[0] == expected

    def test_another_template_of_the_same_tokenizer_is_tried_anew(self):
        tokens = tokenizer(PARTS)
        before = render([ASK], tokens)
        tokens.chat_template = CHATML
        assert render([ASK], tokens) == before


class Silent(VerifiableReward):
    def verify(self, prompt, completion):
        return False


def attach(data: EvaluationDataModule, tokens, stage: str) -> None:
    """Set a datamodule up, with as much of a Trainer and a policy as it asks for."""
    config = SimpleNamespace(vocab_size=len(tokens))
    config.get_text_config = lambda: config
    provider = SimpleNamespace(
        tokenizer=tokens,
        eos_token_ids=(tokens.eos_token_id,),
        min_group_size=2,
        model_spec=lambda: ModelSpec(config, (tokens.eos_token_id,), torch.device("cpu")),
        named_full_weights=lambda: iter([("w", torch.zeros(1))]),
    )
    data.trainer = SimpleNamespace(fast_dev_run=1, lightning_module=provider, testing=False)
    data.setup(stage)


def attached(tokens, train: PromptSource | None = None, **settings) -> EvaluationDataModule:
    """A datamodule that is set up for training, or for validation where nothing is trained on."""
    settings = {"engine": Scripted(), "weight_check": None, "reward_pool": None, **settings}
    data = RolloutDataModule(train, Silent(), **settings) if train else EvaluationDataModule(**settings)
    attach(data, tokens, "fit" if train else "validate")
    return data


class TestChatTemplateKwargs:
    SOURCE = Listed(Problem("a", [ASK], "4"))
    OTHER = Listed(Problem("b", [{"role": "user", "content": "What is 3 + 3?"}], "6"))
    OFF: Mapping[str, object] = {"enable_thinking": False}

    def test_reach_training_and_evaluation_and_a_set_may_have_its_own(self):
        sets = {"same": EvalSet(self.OTHER, Silent()), "own": EvalSet(self.OTHER, Silent(), chat_template_kwargs={})}
        data = attached(tokenizer(THINKS), self.SOURCE, eval_sets=sets, chat_template_kwargs=dict(self.OFF))
        prompts = [data._cursor.prompts[0], data.eval_prompts["same"][0], data.eval_prompts["own"][0]]
        assert [prompt.text.endswith("<think>\n\n</think>\n\n") for prompt in prompts] == [True, True, False]

    def test_reach_prompts_that_show_the_answer(self):
        tokens = tokenizer(THINKS)
        prompts = encode(tokens, [ASK], chat_template_kwargs=self.OFF)
        row = (
            HindsightTemplate("{prompt} ({answer})")
            .sequences(prompts, FlatSequences.collate([[1]], [[5]]), tokens)
            .pad()
        )
        assert tokens.decode(row.input_ids[0].tolist()[:-1]).endswith(
            "(4)<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        )

    @pytest.mark.parametrize(
        ("name", "hint"),
        [("enable_thinkin", r"did you mean enable_thinking\?"), ("documents", r"it reads enable_thinking$")],
    )
    def test_one_that_the_template_never_reads_is_refused(self, name, hint):
        with pytest.raises(ConfigError, match=rf"^chat_template_kwargs\.{name}: True - .*never reads it: {hint}"):
            attached(tokenizer(THINKS), self.SOURCE, chat_template_kwargs={name: True})
        sets = {"own": EvalSet(self.OTHER, Silent(), chat_template_kwargs={name: True})}
        with pytest.raises(ConfigError, match=rf"^eval_sets\.own\.chat_template_kwargs\.{name}"):
            attached(tokenizer(THINKS), eval_sets=sets)

    def test_need_a_template(self):
        with pytest.raises(ConfigError, match=r"chat_template_kwargs: 'enable_thinking' - .*no chat template"):
            attached(tokenizer(), Listed(Problem("a", "2+2?", "4")), chat_template_kwargs=dict(self.OFF))

    def test_and_prompts_for_it(self):
        with pytest.warns(UserWarning, match=r"^data\.source: all prompts are raw text, which chat_template_kwargs"):
            attached(tokenizer(THINKS), Listed(Problem("a", "2+2?", "4")), chat_template_kwargs=dict(self.OFF))

    @pytest.mark.parametrize("name", ["add_generation_prompt", "tokenize", "chat_template", "messages", "return_dict"])
    def test_do_not_say_how_the_template_is_applied(self, name):
        with pytest.raises(ConfigError, match=rf"^chat_template_kwargs\.{name}: False - it is set by ibro_lightning"):
            EvaluationDataModule(chat_template_kwargs={name: False})

    @pytest.mark.parametrize(
        ("template", "variables"),
        [
            (CHATML, set()),
            (THINKS, {"enable_thinking"}),
            (NO_GENERATION_PROMPT, {"bos_token", "eos_token"}),
            ("{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ thinking }}", {"thinking"}),
            (
                "{% set ns = namespace(x=1) %}{% generation %}{{ strftime_now('%d') }}{% endgeneration %}{{ date }}",
                {"date"},
            ),
            ("{% for t in tools %}{% if t.x %}{% break %}{% endif %}{% endfor %}", {"tools"}),
            ("{% if", None),
        ],
    )
    def test_what_a_template_reads(self, template, variables):
        assert template_variables(template) == variables

    def test_old_evaluations_are_not_continued_under_other_ones(self, monkeypatch):
        monkeypatch.setenv("PL_GLOBAL_SEED", "5")

        def digest(**settings):
            data = attached(tokenizer(THINKS), eval_sets={"a": EvalSet(self.SOURCE, Silent())}, **settings)
            return data.fingerprint()

        plain = digest()
        assert digest() == plain
        for settings in ({"chat_template_kwargs": {"enable_thinking": True}}, {"keep_special_tokens": True}):
            assert {name for name, value in digest(**settings).items() if value != plain[name]} == {"rendering"}


def test_a_file_of_begun_answers_is_continued_told_apart_and_judged(tmp_path):
    begun = {"role": "assistant", "content": "Let me think."}
    rows = [
        {"prompt": [{"role": "user", "content": question}, begun], "answer": answer}
        for question, answer in (("Half of 18?", "9"), ("Seven plus 8?", "15"))
    ]
    (tmp_path / "prefill.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat = tokenizer(CHATML)
    prompts = encode_prompts(DatasetSource(str(tmp_path / "prefill.jsonl")), chat, PromptLimits(), setting="source")
    assert [prompt.question for prompt in prompts] == ["Half of 18?", "Seven plus 8?"]
    assert all(prompt.text.endswith("<|im_start|>assistant\nLet me think.") for prompt in prompts)
    answer = chat(f" It is 15.{END}", add_special_tokens=False)["input_ids"]
    collector = Collector(Scripted(answer))
    collector.attach(SimpleNamespace(tokenizer=chat, eos_token_ids=()))
    groups = collector.collect(prompts, [[1], [2]], SamplingParams(), LastNumberReward(), PhaseTimer())
    assert [group.results[0].parts["accuracy"] for group in groups] == [0.0, 1.0]
    assert [group.completions[0].text for group in groups] == [" It is 15."] * 2
