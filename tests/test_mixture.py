"""Mixtures: what they yield, which settings they refuse, and the order in which their parts are drawn."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import jsonargparse
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ibro_lightning.datamodules import RolloutDataModule
from ibro_lightning.errors import ConfigError
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.rewards import VerifiableReward
from ibro_lightning.seeding import derive_seed, permutation
from ibro_lightning.sources import (
    DatasetSource,
    MixturePart,
    MixtureSource,
    PromptCursor,
    PromptLimits,
    PromptSource,
    encode_prompts,
)
from ibro_lightning.tasks import SumsSource
from ibro_lightning.types import Generation, Problem, Prompt


class Numbers(PromptSource):
    def __init__(self, count: int, part: str = "") -> None:
        self.count, self.part = count, part

    def problems(self):
        for n in range(self.count):
            yield Problem(str(n), "x" * (n + 1), n, {"n": n}, f"what is {n}?", self.part)


def mixed(**parts: tuple[float, int]) -> tuple[list[Prompt], dict[str, float]]:
    """Prompts and weights of a mixture of so many numbers each: ``name=(weight, count)``."""
    source = MixtureSource({name: MixturePart(Numbers(count), weight) for name, (weight, count) in parts.items()})
    prompts = [Prompt(p.id, p.prompt, (1,), p.answer, part=p.part) for p in source.problems()]
    return prompts, source.weights


class ByCharacter:
    """A tokenizer of one token per character."""

    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return ["".join(map(chr, row)) for row in rows]


class SaysA:
    """An engine without weights that answers everything with "a"."""

    dtype, max_model_len = "float32", None

    def setup(self, spec: ModelSpec) -> None: ...

    def load_weights(self, named_tensors, *, partial=False) -> None: ...

    def onload(self) -> None: ...

    def offload(self) -> None: ...

    def generate(self, prompts, sampling, seeds):
        return [[Generation((ord("a"),), (0.0,), "stop") for _ in row] for row in seeds]


class NeverRight(VerifiableReward):
    pooled = False

    def verify(self, prompt, completion):
        return False


class Provider(SimpleNamespace):
    tokenizer, eos_token_ids, min_group_size = ByCharacter(), (0,), 2

    def model_spec(self) -> ModelSpec:
        config = SimpleNamespace(vocab_size=256)
        config.get_text_config = lambda: config
        return ModelSpec(config, (0,), torch.device("cpu"))

    def named_full_weights(self):
        return []


class TestMixtureSource:
    def test_problems_of_every_part_in_order_with_its_name(self):
        source = MixtureSource({"b": MixturePart(Numbers(2)), "a": MixturePart(Numbers(1), 3.0)})
        problems = list(source.problems())
        assert [(p.id, p.part, p.answer) for p in problems] == [("b/0", "b", 0), ("b/1", "b", 1), ("a/0", "a", 0)]
        assert problems[1] == replace(list(Numbers(2).problems())[1], id="b/1", part="b")

    def test_weights_are_shares(self):
        source = MixtureSource(
            {"a": MixturePart(Numbers(1), 3), "b": MixturePart(Numbers(9)), "c": MixturePart(Numbers(5), 4)}
        )
        assert source.weights == {"a": 0.375, "b": 0.125, "c": 0.5}

    def test_a_source_without_parts_has_no_weights(self):
        assert Numbers(1).weights is None
        assert SumsSource().weights is None

    @pytest.mark.parametrize("weight", [0, -1.0, math.nan, math.inf])
    def test_a_weight_that_is_no_share_is_refused(self, weight):
        with pytest.raises(ConfigError, match=r"^weight: .* above 0$"):
            MixtureSource({"math": MixturePart(Numbers(1), weight)})

    @pytest.mark.parametrize("name", ["", "a/b", "a b", "a.b"])
    def test_a_name_that_ids_cannot_hold_is_refused(self, name):
        with pytest.raises(ConfigError, match=r"^parts: .*letters"):
            MixtureSource({name: MixturePart(Numbers(1))})

    def test_no_parts_are_refused(self):
        with pytest.raises(ConfigError, match=r"^parts.*at least one"):
            MixtureSource({})

    def test_mixtures_cannot_be_nested(self):
        inner = MixtureSource({"a": MixturePart(Numbers(1))})
        with pytest.raises(ConfigError, match=r"^parts\.outer\.source.*cannot be nested"):
            MixtureSource({"outer": MixturePart(inner)})
        disguised = MixtureSource({"outer": MixturePart(Numbers(1, part="inner"))})
        with pytest.raises(ConfigError, match=r"^parts\.outer\.source: 'inner'.*cannot be nested"):
            list(disguised.problems())

    def test_a_part_that_yields_something_else_is_named(self):
        class Dicts(PromptSource):
            def problems(self):
                return [{"prompt": "1+1"}]

        with pytest.raises(ConfigError, match=r"^parts\.mine\.source: 'dict'.*Problem"):
            list(MixtureSource({"mine": MixturePart(Dicts())}).problems())

    def test_parses_from_yaml(self, tmp_path):
        path = tmp_path / "math.jsonl"
        path.write_text(json.dumps({"question": "1+2?", "solution": r"\boxed{3}"}) + "\n")
        text = f"""
        source:
          class_path: MixtureSource
          init_args:
            parts:
              math:
                weight: 3
                source:
                  class_path: DatasetSource
                  init_args:
                    path: {path}
                    prompt_column: [problem, question]
                    answer_column: [answer, solution]
                    template: dapo
                    answer_format: boxed
              sums: {{source: {{class_path: SumsSource}}}}
        """
        parser = jsonargparse.ArgumentParser()
        parser.add_argument("--source", type=PromptSource)
        source = parser.instantiate(parser.parse_object(yaml.safe_load(text))).source
        assert isinstance(source, MixtureSource)
        assert source.weights == {"math": 0.75, "sums": 0.25}
        first, second, *_ = source.problems()
        assert (first.id, first.answer, first.question) == ("math/math/0", "3", "1+2?")
        assert (second.id, second.part) == ("sums/0+0", "sums")

    def test_columns_and_template_parse_from_the_command_line(self):
        parser = jsonargparse.ArgumentParser()
        parser.add_class_arguments(DatasetSource, "source")
        arguments = [
            "--source.path=x.jsonl",
            "--source.prompt_column=[problem, question]",
            "--source.answer_column=a.b",
        ]
        source = parser.instantiate(parser.parse_args(arguments)).source
        assert source.prompt_column == ["problem", "question"]
        assert source.answer_column == "a.b"


class TestOrder:
    PARTS: ClassVar = {"small": (1.0, 2), "large": (3.0, 5), "rare": (0.5, 3)}

    def cursor(self, seed: int = 7) -> PromptCursor:
        prompts, weights = mixed(**self.PARTS)
        return PromptCursor(prompts, seed, weights)

    @given(st.integers(0, 3), st.lists(st.integers(1, 40), min_size=1, max_size=6))
    @settings(max_examples=50, deadline=None)
    def test_any_split_into_draws_gives_the_same_sequence(self, seed, counts):
        whole, split = self.cursor(seed), self.cursor(seed)
        expected = whole.draw(sum(counts))
        assert [draw for count in counts for draw in split.draw(count)] == expected
        assert [position for position, _ in expected] == list(range(sum(counts)))

    @given(st.lists(st.tuples(st.integers(0, 120), st.integers(0, 20)), max_size=6))
    @settings(max_examples=50, deadline=None)
    def test_any_restored_position_continues_there(self, jumps):
        expected = self.cursor().draw(150)
        cursor = self.cursor()
        for position, count in jumps:
            cursor.position = position
            assert cursor.draw(count) == expected[position : position + count]

    def test_which_part_a_draw_is_from_depends_on_seed_and_position_alone(self):
        """Other numbers of prompts in the parts change the prompts, not the parts."""
        parts = [prompt.part for _, prompt in self.cursor().draw(300)]
        prompts, weights = mixed(small=(1.0, 11), large=(3.0, 1), rare=(0.5, 7))
        assert [prompt.part for _, prompt in PromptCursor(prompts, 7, weights).draw(300)] == parts
        assert [prompt.part for _, prompt in self.cursor(8).draw(300)] != parts

    def test_is_the_documented_function(self):
        """By hand: the bounds of the sorted parts large, rare, small are 3/4.5, 3.5/4.5 and 1."""
        drawn = Counter[str]()
        for position, prompt in self.cursor().draw(60):
            uniform = derive_seed(7, "prompt part", position) / 2**63
            part = "large" if uniform < 3 / 4.5 else "rare" if uniform < 3.5 / 4.5 else "small"
            size = self.PARTS[part][1]
            order = permutation(size, derive_seed(7, "prompt order", part, drawn[part] // size))
            assert prompt.id == f"{part}/{order[drawn[part] % size]}"
            drawn[part] += 1

    def test_every_pass_over_a_part_is_a_permutation(self):
        ids = [prompt.id for _, prompt in self.cursor().draw(400) if prompt.part == "large"]
        passes = [ids[start : start + 5] for start in range(0, len(ids) - 4, 5)]
        assert len(passes) > 40
        assert {tuple(sorted(one)) for one in passes} == {tuple(f"large/{n}" for n in range(5))}
        assert len({tuple(one) for one in passes}) > 20

    def test_parts_are_drawn_by_their_weights(self):
        counts = Counter(prompt.part for _, prompt in self.cursor().draw(9000))
        for part, (weight, _) in self.PARTS.items():
            share = weight / 4.5
            deviation = math.sqrt(9000 * share * (1 - share))
            assert abs(counts[part] - 9000 * share) < 4 * deviation

    def test_the_order_of_the_parts_in_a_recipe_does_not_matter(self):
        prompts, weights = mixed(**self.PARTS)
        turned = dict(reversed(weights.items()))
        assert PromptCursor(prompts, 7, turned).draw(100) == self.cursor().draw(100)

    def test_without_a_mixture_the_order_is_what_it_always_was(self):
        """The figures in the README were measured with it."""
        prompts = [Prompt(str(n), "", (1,), None) for n in range(6)]
        orders = [permutation(6, derive_seed(3, "prompt order", epoch)) for epoch in range(3)]
        assert [prompt.id for _, prompt in PromptCursor(prompts, 3).draw(18)] == [
            str(n) for order in orders for n in order
        ]
        assert [prompt.id for _, prompt in PromptCursor(prompts, 3).draw(6)] == ["5", "4", "0", "3", "1", "2"]

    def test_a_mixture_of_one_part_draws_it_alone(self):
        prompts, weights = mixed(only=(2.0, 4))
        ids = [prompt.id for _, prompt in PromptCursor(prompts, 0, weights).draw(8)]
        assert sorted(ids[:4]) == sorted(ids[4:]) == [f"only/{n}" for n in range(4)]


class TestRefusedMixtures:
    def encode(self, source: PromptSource, limit: int) -> list[Prompt]:
        return encode_prompts(source, ByCharacter(), PromptLimits(limit), setting="source")

    def test_a_part_that_the_length_filter_dropped_whole_is_named(self):
        class Long(PromptSource):
            def problems(self):
                yield Problem("0", "x" * 50, 0)

        source = MixtureSource({"short": MixturePart(Numbers(3)), "long": MixturePart(Long())})
        prompts = self.encode(source, limit=10)
        assert [prompt.id for prompt in prompts] == ["short/0", "short/1", "short/2"]
        with pytest.raises(ConfigError, match=r"^source\.parts\.long: .*max_tokens"):
            PromptCursor(prompts, 0, source.weights)
        assert len(PromptCursor(self.encode(source, limit=50), 0, source.weights).draw(9)) == 9

    def test_a_prompt_of_an_unknown_part_is_named(self):
        prompts, _ = mixed(a=(1.0, 2), b=(1.0, 2))
        with pytest.raises(ConfigError, match=r"^source: 'b' - the prompt 'b/0'"):
            PromptCursor(prompts, 0, {"a": 1.0})

    @pytest.mark.parametrize("weight", [0.0, -1.0, math.nan])
    def test_a_users_own_weights_are_checked(self, weight):
        prompts, _ = mixed(a=(1.0, 2), b=(1.0, 2))
        with pytest.raises(ConfigError, match=r"^source\.weights\['b'\]"):
            PromptCursor(prompts, 0, {"a": 1.0, "b": weight})


def test_training_draws_by_weight_and_resumes_where_it_stopped(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    source = MixtureSource({"a": MixturePart(Numbers(3), 1.0), "b": MixturePart(Numbers(7), 3.0)})

    def build() -> RolloutDataModule:
        data = RolloutDataModule(
            source,
            NeverRight(),
            prompts_per_rollout=10,
            group_size=2,
            engine=SaysA(),
            weight_check=None,
            reward_pool=None,
        )
        data.trainer = SimpleNamespace(lightning_module=Provider())
        data.setup("fit")
        return data

    def drawn(data: RolloutDataModule, rollouts: int) -> list[str]:
        return [prompt.id for _ in range(rollouts) for prompt in data.next_rollout().prompts[::2]]

    straight, resumed = build(), build()
    ids = drawn(straight, 4)
    prompts = encode_prompts(source, ByCharacter(), PromptLimits(), setting="source")
    assert ids == [prompt.id for _, prompt in PromptCursor(prompts, 5, {"a": 0.25, "b": 0.75}).draw(40)]
    assert {prompt_id[0] for prompt_id in ids} == {"a", "b"}
    first = build()
    drawn(first, 3)
    resumed.load_state_dict(first.state_dict())
    assert drawn(resumed, 1) == ids[30:]
