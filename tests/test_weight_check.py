"""The check after a sync: it finds every way in which an engine may not have the policy's weights, says which one it
is, and never stops a run that is sound. The engine is the embedded one, with faults planted into it."""

from __future__ import annotations

import copy
import importlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from helpers.collecting import IsOne, Paths
from helpers.models import VOCAB, TinyQwen2, qwen2
from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.cli.main import main
from ibro_lightning.datamodules import EvalSet, EvaluationDataModule
from ibro_lightning.engines import HFEngine, hf_batch
from ibro_lightning.engines.hf_cache import select_rows
from ibro_lightning.engines.weight_check import MOVED, TOLERANCES, WeightCheck, WeightVerifier
from ibro_lightning.errors import ConfigError, RolloutError, WeightSyncError
from ibro_lightning.models import Policy
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.modules import DAPOModule
from ibro_lightning.timing import PhaseTimer
from ibro_lightning.types import Dtype, Generation, SamplingParams

torch.set_num_threads(1)
NEVER = VOCAB + 1
"""An EOS that the model cannot write, so that answers have their full length."""


class Trainer:
    """As much of a LightningModule as the check may know, with a real policy."""

    def __init__(self, model: Any = None, dtype: Dtype = "float32", eos: Sequence[int] = (NEVER,)) -> None:
        self.policy = Policy(model or qwen2(max_position_embeddings=256, tie_word_embeddings=False))
        self.compute_dtype, self.eos_token_ids = dtype, tuple(eos)
        self._generator = torch.Generator().manual_seed(0)

    def model_spec(self) -> ModelSpec:
        return ModelSpec(self.policy.model.config, self.eos_token_ids, torch.device("cpu"))

    def named_full_weights(self) -> Iterable[tuple[str, Tensor]]:
        return self.policy.named_full_weights()

    @torch.no_grad()
    def response_logp(self, sequences: Sequences, temperature: float) -> Tensor:
        return self.policy(sequences, temperature=temperature, with_entropy=False)[0]

    @torch.no_grad()
    def learns(self, size: float = 0.03) -> None:
        """Every weight moves."""
        for parameter in self.policy.parameters():
            parameter += size * torch.randn(parameter.shape, generator=self._generator)


class Faulty(HFEngine):
    """From the second sync on, weights whose name matches ``lost`` do not arrive; with ``deaf`` not even when they are
    sent again. ``lost=""`` is a sync that does nothing."""

    def __init__(self, lost: str | None = None, deaf: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        self.lost, self.deaf, self.syncs = lost, deaf, 0

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], *, partial: bool = False) -> None:
        self.syncs += not partial
        if self.lost is None or self.syncs == 1 or (partial and not self.deaf):
            super().load_weights(named_tensors, partial=partial)
        else:
            arriving = ((name, tensor) for name, tensor in named_tensors if not re.search(self.lost, name))
            super().load_weights(arriving, partial=True)


def verifier_of(trainer: Trainer, engine: Any, seed: int = 0, **settings: Any) -> WeightVerifier:
    engine.setup(trainer.model_spec())
    return WeightVerifier(WeightCheck(**settings), engine, trainer, seed)  # type: ignore[arg-type]


def sync(verifier: WeightVerifier) -> dict[str, float]:
    verifier.engine.load_weights(verifier.provider.named_full_weights())
    return verifier.verify()


def refused(verifier: WeightVerifier) -> str:
    """What is said of a sync that did not succeed."""
    with pytest.raises(WeightSyncError) as caught:
        sync(verifier)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("the engine does not have the policy's weights: |Δlogp| is up to ")
    return message


def cause_after_learning(engine: Any, trainer: Trainer | None = None, **settings: Any) -> str:
    """The first sync is sound, the one after an update is not: what is said of it."""
    trainer = trainer or Trainer()
    verifier = verifier_of(trainer, engine, **settings)
    sync(verifier)
    trainer.learns()
    return refused(verifier)


# A sound engine.


def test_a_sound_engine_is_never_stopped_and_its_rounding_is_reported() -> None:
    """Steps of every size, none included, and evaluations in between, where nothing has changed."""
    trainer = Trainer()
    verifier = verifier_of(trainer, HFEngine())
    for size in [0.0, 1e-6, 1e-4, 1e-2, 0.1] * 6:
        trainer.learns(size)
        measured = [sync(verifier), sync(verifier)]
        for one in measured:
            assert one.keys() == {"sync/logp_difference_max", "sync/logp_difference_mean"}
            assert 0 <= one["sync/logp_difference_mean"] <= one["sync/logp_difference_max"] < 1e-4
    assert one["sync/logp_difference_max"] > 0, "a cache and a whole forward pass do round differently"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_no_fault(dtype: Dtype, tied: bool) -> None:
    """The engine's copy of the weights is rounded, and what it computes is, too."""
    trainer = Trainer(qwen2(max_position_embeddings=256, tie_word_embeddings=tied, initializer_range=0.1))
    verifier = verifier_of(trainer, HFEngine(dtype=dtype))
    for size in (0.0, 1e-6, 1e-3, 0.02):
        trainer.learns(size)
        measured = sync(verifier)
        assert 1e-5 < measured["sync/logp_difference_max"] < TOLERANCES[dtype]


def test_the_differences_are_those_of_all_answers() -> None:
    """By hand: the largest and the mean of what the engine reported against the policy's own scores."""
    trainer, engine = Trainer(), Recording(shift=2e-4)
    measured = sync(verifier_of(trainer, engine))
    differences = []
    for prompt, answer, _, _ in engine.asked:
        logp = trainer.response_logp(Sequences.collate([prompt], [answer.token_ids]), 1.0)
        differences += (torch.tensor(answer.logp) - logp[0]).abs().tolist()
    assert 5 * 8 + 4 < len(differences) < 5 * 8 + 4 * 4  # five of full length, and four shorter ones, some end early
    assert measured["sync/logp_difference_max"] == pytest.approx(max(differences), abs=2e-6)
    assert measured["sync/logp_difference_mean"] == pytest.approx(sum(differences) / len(differences), abs=2e-6)
    assert measured["sync/logp_difference_mean"] == pytest.approx(2e-4, rel=0.1)


def test_answers_that_end_early_are_compared_as_far_as_they_go() -> None:
    """Their lengths differ, and what stands behind the shorter one is padding."""
    trainer = Trainer(eos=range(0, VOCAB, 3))
    engine = Recording()
    verifier = verifier_of(trainer, engine)
    for _ in range(20):
        trainer.learns()
        assert sync(verifier)["sync/logp_difference_max"] < 1e-4
    lengths = [len(asked.answer.token_ids) for asked in engine.asked]
    assert min(lengths) == 1
    assert max(lengths) > 3
    faulty = verifier_of(Trainer(eos=range(VOCAB)), Faulty(lost=r"layers\.1"))  # an answer of one token is enough
    sync(faulty)
    faulty.provider.learns()  # type: ignore[attr-defined]
    assert "layer 1" in refused(faulty)


def test_the_check_leaves_the_runs_random_numbers_alone() -> None:
    verifier = verifier_of(Trainer(), HFEngine())
    before = torch.get_rng_state()
    sync(verifier)
    assert torch.equal(torch.get_rng_state(), before)


# What it asks.


class Asked(NamedTuple):
    """One sample that an engine was asked for."""

    prompt: list[int]
    answer: Generation
    sampling: SamplingParams
    seed: int


class Recording(HFEngine):
    """Remembers what it was asked and what it answered, with log-probs off by ``shift``."""

    def __init__(self, shift: float = 0.0, **settings: Any) -> None:
        super().__init__(**settings)
        self.shift = shift
        self.asked: list[Asked] = []

    def generate(self, prompts: Any, sampling: Any, seeds: Any) -> list[list[Generation]]:
        groups = super().generate(prompts, sampling, seeds)
        groups = [[replace(g, logp=tuple(x + self.shift for x in g.logp)) for g in group] for group in groups]
        for prompt, answers, own in zip(prompts, groups, seeds, strict=True):
            self.asked += [Asked(list(prompt), *each) for each in zip(answers, [sampling] * len(own), own, strict=True)]
        return groups

    @property
    def checks(self) -> list[list[Asked]]:
        """By check: the prompt that is always the same, two samples each of two new ones, and these four once more."""
        assert len(self.asked) % 9 == 0
        return [self.asked[start : start + 9] for start in range(0, len(self.asked), 9)]

    @property
    def same(self) -> list[Asked]:
        return [check[0] for check in self.checks]


def prompts_asked(count: int = 4, *, seed: int = 0) -> list[list[list[int]]]:
    engine = Recording()
    verifier = verifier_of(Trainer(), engine, seed)
    for _ in range(count):
        sync(verifier)
    return [[asked.prompt for asked in check] for check in engine.checks]


def test_one_prompt_is_always_the_same_and_the_others_are_always_new() -> None:
    asked = prompts_asked(5)
    same = asked[0][0]
    for prompts in asked:
        assert prompts[0] == same
        assert prompts[1] == prompts[2] != prompts[3] == prompts[4]
        assert prompts[1:5] == prompts[5:]
        assert [len(prompt) for prompt in prompts[:4]] == [144, 36, 36, 16]
        assert set(prompts[0]) <= set(range(VOCAB))
        assert len(set(prompts[0])) > VOCAB / 2, "a context of all kinds of tokens"
    assert len({tuple(prompt) for prompts in asked for prompt in prompts}) == 1 + 2 * 5
    assert prompts_asked(5) == asked, "a function of the run's seed"
    assert prompts_asked(1, seed=1)[0][0] != same


def test_what_is_asked_is_a_function_of_the_moment() -> None:
    """A resumed run asks what the run that was not killed would have asked."""
    engines = Recording(), Recording()
    whole, resumed = (verifier_of(Trainer(), engine) for engine in engines)
    for verifier, moments in ((whole, [("train", 0), ("train", 1)]), (resumed, [("train", 1)])):
        for moment in moments:
            verifier.engine.load_weights(verifier.provider.named_full_weights())
            verifier.verify(*moment)
    assert engines[0].checks[1] == engines[1].checks[0]


def test_answers_are_sampled_at_temperature_one_with_seeds_of_their_own() -> None:
    engine = Recording()
    verifier = verifier_of(Trainer(), engine, new_tokens=5)
    for _ in range(3):
        sync(verifier)
    asked_with = {(asked.sampling.temperature, asked.sampling.max_tokens) for asked in engine.asked}
    assert asked_with == {(1.0, 5), (1.0, 4)}
    assert not any(asked.sampling.truncates_distribution for asked in engine.asked)
    assert len({asked.seed for asked in engine.same}) == 1
    assert len({asked.seed for check in engine.checks for asked in check[1:]}) == 3 * 4
    assert {len(asked.answer.logp) for check in engine.checks for asked in check[:5]} == {5}


@pytest.mark.parametrize("seed", range(5))
def test_at_every_sync_a_row_ends_early_and_others_go_on(seed: int) -> None:
    """Although the model cannot write its EOS."""
    trainer, engine = Trainer(), Recording()
    verifier = verifier_of(trainer, engine, seed)
    for _ in range(4):
        trainer.learns()
        sync(verifier)
    for check in engine.checks:
        lengths = [len(asked.answer.token_ids) for asked in check[5:]]
        assert min(lengths) <= 2
        assert max(lengths) - min(lengths) >= 2
        for whole, ended in zip(check[1:5], check[5:], strict=True):
            assert ended.answer.token_ids == whole.answer.token_ids[: len(ended.answer.token_ids)]


@pytest.mark.parametrize(
    ("positions", "engines", "settings", "length"),
    [
        (256, None, {}, 144),
        (152, None, {}, 144),
        (151, None, {}, 143),
        (32, None, {}, 24),
        (32, None, {"new_tokens": 20}, 12),
        (256, 40, {}, 32),
        (32, 40, {}, 24),
        (256, None, {"prompt_tokens": 5}, 5),
        (9, None, {}, 1),
    ],
)
def test_prompts_are_cut_to_what_model_and_engine_can_take(
    positions: int, engines: int | None, settings: dict[str, int], length: int
) -> None:
    trainer, engine = Trainer(qwen2(max_position_embeddings=positions)), Recording()
    engine.setup(trainer.model_spec())
    if engines is not None:
        engine.max_model_len = engines
    sync(verifier_of(trainer, engine, **settings))
    new = [max(1, length // 4)] * 2 + [max(1, length // 9)] * 2
    assert [len(asked.prompt) for asked in engine.asked] == [length, *new, *new]


def test_more_new_tokens_than_there_are_positions_name_the_setting() -> None:
    """The engine would name ``sampling.max_tokens``, which nobody has set to this."""
    with pytest.raises(ConfigError, match=r"^new_tokens: 32"):
        sync(verifier_of(Trainer(qwen2(max_position_embeddings=32)), HFEngine(), new_tokens=32))


@pytest.mark.parametrize("eos", [(NEVER,), range(0, VOCAB, 3)])
def test_long_and_short_prompts_are_scored_apart(eos: Sequence[int]) -> None:
    """Without the padding of the short ones, and equally often on every rank, whatever the answers' lengths."""

    shapes: list[tuple[int, int]] = []

    class Scores(Trainer):
        def response_logp(self, sequences: Sequences, temperature: float) -> Tensor:
            shapes.append(tuple(sequences.input_ids.shape))
            return super().response_logp(sequences, temperature)

    sync(verifier_of(Scores(eos=eos), HFEngine()))
    (long, longest), (_, short) = shapes
    assert long == 1
    assert longest > 144
    assert short <= 36 + 8


# Faults, each with its cause.


def test_a_sync_that_did_nothing_is_named_as_that() -> None:
    message = cause_after_learning(Faulty(lost=""))
    assert "Cause: the sync did not reach the engine, which answers as it did before the last update" in message


def test_the_message_says_by_how_much() -> None:
    trainer, engine = Trainer(), Recording(shift=0.25)
    message = refused(verifier_of(trainer, engine, tolerance=0.125))
    assert "|Δlogp| is up to 0.25 nats (tolerance 0.125)" in message


GROUPS = {
    r"layers\.0\.": "layer 0",
    r"layers\.1\.": "layer 1",
    r"layers\.1\.mlp\.down_proj": "layer 1",
    r"layers\.0\.self_attn\.k_proj\.bias": "layer 0",
    r"lm_head": "head",
    r"embed_tokens": "model.embed_tokens",
    r"model\.norm": "model.norm",
    r"layers\.": "layer 0, layer 1",
    r"lm_head|layers\.1\.": "head, layer 1",
}


@pytest.mark.parametrize("lost", GROUPS)
def test_weights_that_did_not_arrive_are_named_and_no_others(lost: str) -> None:
    message = cause_after_learning(Faulty(lost=lost))
    cause = message[message.index("Cause: ") :]
    stale = re.fullmatch(r"Cause: stale weights in the engine, mended by sending again: ([\w., ]+?)( \(.*\))?", cause)
    assert stale is not None, cause
    assert stale[1] == GROUPS[lost]


class OwnHead(Faulty):
    """Keeps the output head apart from the embedding that it is tied to, as vLLM does on CPUs."""

    def setup(self, spec: ModelSpec) -> None:
        config = copy.deepcopy(spec.config)
        config.tie_word_embeddings = False
        super().setup(replace(spec, config=config))


def test_a_stale_copy_of_a_tied_head_is_named_with_its_reason() -> None:
    message = cause_after_learning(OwnHead(lost="lm_head"), Trainer(qwen2(max_position_embeddings=256)))
    reason = "(the output head is tied to the embedding, and the engine keeps a copy)"
    assert message.endswith(f"mended by sending again: head {reason}")


def test_a_head_of_its_own_is_not_said_to_be_tied() -> None:
    assert "tied" not in cause_after_learning(Faulty(lost="lm_head"))


def test_an_engine_that_never_got_weights_is_found_at_once() -> None:
    """There is no earlier answer to compare with, and nothing fits."""

    class Never(Faulty):
        def load_weights(self, named_tensors: Any, *, partial: bool = False) -> None:
            if partial:
                super().load_weights(named_tensors, partial=True)

    trainer = Trainer()
    trainer.learns()  # norms start at 1 everywhere
    message = refused(verifier_of(trainer, Never()))
    assert "mended by sending again: head, model.embed_tokens, layer 0, layer 1, model.norm" in message


class StalePrefixes(HFEngine):
    """Keys and values of a prompt are computed once and kept, whatever becomes of the weights; the rest is fresh. So is
    all of a prompt that was never seen. With ``reset``, as it ought to be."""

    def __init__(self, reset: bool) -> None:
        super().__init__()
        self.reset, self.kept = reset, {}

    def load_weights(self, named_tensors: Any, *, partial: bool = False) -> None:
        super().load_weights(named_tensors, partial=partial)
        if self.reset:
            self.kept.clear()

    def _prefill(self, prompts: Any) -> tuple[Any, Tensor]:
        ids, mask = self._left_pad(prompts)
        batch, _ = self._batch_type.start(self._network, ids[:, :-1], mask[:, :-1])
        for row, prompt in enumerate(map(tuple, ids.tolist())):
            fresh = [(layer.keys[row].clone(), layer.values[row].clone()) for layer in batch.cache.layers]
            for layer, (keys, values) in zip(batch.cache.layers, self.kept.setdefault(prompt, fresh), strict=True):
                layer.keys[row], layer.values[row] = keys, values
        return batch, batch.extend(ids[:, -1])


class StaleAnswers(HFEngine):
    """Answers a prompt that it knows as it did the first time, and a new one with its new weights."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[tuple[int, ...], list[Generation]] = {}

    def generate(self, prompts: Any, sampling: Any, seeds: Any) -> list[list[Generation]]:
        groups = super().generate(prompts, sampling, seeds)
        return [self.kept.setdefault(tuple(prompt), group) for prompt, group in zip(prompts, groups, strict=True)]


@pytest.mark.parametrize("engine", [lambda: StalePrefixes(reset=False), StaleAnswers], ids=["keys and values", "all"])
def test_a_cache_that_outlived_its_weights_is_named_as_that(engine: Any) -> None:
    message = cause_after_learning(engine())
    assert "Cause: the prefix cache was not reset, as a prompt seen before is continued wrongly" in message


def test_a_cache_that_is_reset_does_no_harm() -> None:
    trainer = Trainer()
    verifier = verifier_of(trainer, StalePrefixes(reset=True))
    for _ in range(3):
        trainer.learns()
        assert sync(verifier)["sync/logp_difference_max"] < 1e-4


class Warmer(HFEngine):
    """Right weights, another computation."""

    def generate(self, prompts: Any, sampling: Any, seeds: Any) -> list[list[Generation]]:
        return super().generate(prompts, replace(sampling, temperature=1.1 * sampling.temperature), seeds)


@pytest.mark.parametrize("engine", [Warmer, lambda: Recording(shift=0.01)], ids=["temperature", "constant"])
def test_another_computation_is_not_taken_for_stale_weights(engine: Any) -> None:
    message = refused(verifier_of(Trainer(), engine()))
    assert "Sending all weights again did not help, so the engine computes something else" in message
    assert "data.weight_check.tolerance" in message
    assert "Cause" not in message


# Faults of rows and padding: the weights are right, and what is computed with them is not.


class PadsOffByOne(HFEngine):
    """Attends to one token too many, or too few, of what is left of a short prompt."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = shift

    def _left_pad(self, prompts: Any) -> tuple[Tensor, Tensor]:
        ids, mask = super()._left_pad(prompts)
        longest = max(len(prompt) for prompt in prompts)
        for row, prompt in enumerate(prompts):
            if len(prompt) < longest:
                mask[row, : longest - len(prompt)] = 0
                start = longest - len(prompt) + self.shift
                mask[row, min(start, longest - len(prompt)) :] = 1
                mask[row, :start] = 0
        return ids, mask


def permuting(rows_kept: bool) -> Any:
    """Instead of the engine's way to select rows: turns them round when others have left, or when they are copied."""

    def select(cache: Any, rows: Tensor) -> None:
        before = cache.layers[0].keys.shape[0]
        leaves = len(rows) < before
        select_rows(cache, rows.roll(1) if leaves == rows_kept and len(rows) != before else rows)

    return select


class Slides(HFEngine):
    """Its cache forgets what is more than ``window`` tokens ago; the trainer does not."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def setup(self, spec: ModelSpec) -> None:
        super().setup(spec)
        config = self._network.cache_config
        config.layer_types, config.sliding_window = ["sliding_attention"] * config.num_hidden_layers, self.window


ARRIVED = "Cause: not the weights, which have arrived, but "


@pytest.mark.parametrize("shift", [-1, 1])
def test_padding_that_is_off_by_one_is_named_as_that(shift: int) -> None:
    cause = "prompts of different lengths in one batch: its padding is wrong"
    assert refused(verifier_of(Trainer(), PadsOffByOne(shift))).endswith(f"{ARRIVED}how the engine handles {cause}")


@pytest.mark.parametrize(
    ("rows_kept", "cause"),
    [
        (True, "rows that go on when others of their batch have ended: they are mixed up"),
        (False, "several samples of one prompt: what they share is copied wrongly"),
    ],
)
def test_rows_that_are_mixed_up_are_named_as_that(rows_kept: bool, cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = verifier_of(Trainer(), HFEngine())
    sync(verifier)
    monkeypatch.setattr(hf_batch, "select_rows", permuting(rows_kept))
    assert refused(verifier).endswith(f"{ARRIVED}how the engine handles {cause}")


def windowed(window: int, positions: int = 256, **settings: Any) -> Any:
    """A Qwen2, which has no window unless it is told to use it, with one in its config."""
    model = qwen2(max_position_embeddings=positions, initializer_range=0.1, **settings)
    model.config.sliding_window = window
    return model


@pytest.mark.parametrize("window", [100, 180, 247])
def test_a_window_that_only_the_engine_has_is_named_at_once(window: int) -> None:
    """Within the prompts of every check, beyond them, and with only a few tokens of the answer outside."""
    message = refused(verifier_of(Trainer(windowed(window)), Slides(window)))
    assert f"{ARRIVED}how far back the engine looks" in message
    assert f"sliding_window {window}" in message


def test_a_stray_window_of_the_config_does_no_harm_to_the_embedded_engine() -> None:
    measured = sync(verifier_of(Trainer(windowed(100)), HFEngine()))
    assert measured["sync/logp_difference_max"] < 1e-4


@pytest.mark.parametrize(
    ("window", "length"),
    [(30, 30 + 16), (180, 180 + 16), (240, 248), (255, 248), (256, None), (5000, None), (None, None)],
)
def test_once_a_prompt_exceeds_the_configs_window(window: int | None, length: int | None) -> None:
    engine = Recording()
    verifier = verifier_of(Trainer(windowed(window) if window else None), engine)
    sync(verifier)
    asked = [len(asked.prompt) for asked in engine.asked[9:]]
    assert asked == ([] if length is None else [length])
    sync(verifier)
    assert len(engine.asked) == 18 + len(asked)


def test_weights_that_never_arrive_cannot_be_mended() -> None:
    message = cause_after_learning(Faulty(lost=r"layers\.1", deaf=True))
    assert "Sending all weights again did not help" in message


class Broken(HFEngine):
    """One log-prob of its answer to one of the prompts is ``number``."""

    def __init__(self, number: float, place: int) -> None:
        super().__init__()
        self.number, self.place, self.asked = number, place, 0

    def generate(self, prompts: Any, sampling: Any, seeds: Any) -> list[list[Generation]]:
        groups = super().generate(prompts, sampling, seeds)
        for group in groups:
            if self.asked % 2 == self.place:
                group[0] = replace(group[0], logp=(*group[0].logp[:-1], self.number))
            self.asked += 1
        return groups


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("number", [math.nan, -math.inf, math.inf])
def test_log_probs_of_the_engine_that_are_not_numbers_are_refused(number: float, place: int) -> None:
    """Also if any difference would be tolerated."""
    assert "up to inf nats" in refused(verifier_of(Trainer(), Broken(number, place), tolerance=1e9))


def test_a_policy_that_is_not_a_number_any_more_is_refused() -> None:
    class NotANumber(Trainer):
        def response_logp(self, sequences: Sequences, temperature: float) -> Tensor:
            return super().response_logp(sequences, temperature) * math.nan

    assert "up to inf nats" in refused(verifier_of(NotANumber(), HFEngine()))


def test_an_answer_of_no_tokens_says_nothing_and_is_said() -> None:
    """An engine with a deadline may return one; the run must not end with a message of torch's."""

    class Late(HFEngine):
        def generate(self, prompts: Any, sampling: Any, seeds: Any) -> list[list[Generation]]:
            return [[Generation((), (), "deadline")] for _ in prompts]

    with pytest.raises(RolloutError, match=r"data\.engine\.deadline_s"):
        sync(verifier_of(Trainer(), Late()))


# How much is tolerated.


@pytest.mark.parametrize(
    ("engine", "trainer", "tolerance"),
    [
        ("float32", "float32", 1e-3),
        ("float16", "float32", 0.2),
        ("float32", "float16", 0.2),
        ("bfloat16", "float32", 1.0),
        ("float32", "bfloat16", 1.0),
        ("bfloat16", "float16", 1.0),
        ("bfloat16", "bfloat16", 1.0),
    ],
)
def test_the_coarser_precision_sets_the_tolerance(engine: Dtype, trainer: Dtype, tolerance: float) -> None:
    verifier = verifier_of(Trainer(dtype=trainer), HFEngine(dtype=engine))
    assert verifier.tolerance == tolerance
    assert verifier_of(Trainer(dtype=trainer), HFEngine(dtype=engine), tolerance=0.03).tolerance == 0.03


@pytest.mark.parametrize(
    ("shift", "dtype", "tolerance", "allowed"),
    [
        (5e-4, "float32", None, True),
        (2e-3, "float32", None, False),
        (2e-3, "float32", 3e-3, True),
        (2e-3, "float16", 1e-3, False),
        (0.1, "float16", None, True),
        (0.3, "float16", None, False),
        (0.9, "bfloat16", None, True),
        (1.1, "bfloat16", None, False),
        (-1.1, "bfloat16", None, False),
    ],
)
def test_differences_are_allowed_up_to_the_tolerance(
    shift: float, dtype: Dtype, tolerance: float | None, allowed: bool
) -> None:
    verifier = verifier_of(Trainer(dtype=dtype), Recording(shift=shift), tolerance=tolerance)
    if allowed:
        assert sync(verifier)["sync/logp_difference_max"] == pytest.approx(abs(shift), abs=1e-4)
    else:
        assert f"up to {abs(shift):.3g} nats (tolerance {verifier.tolerance:g})" in refused(verifier)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens"),
        ({"new_tokens": 0}, "new_tokens"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"tolerance": math.nan}, "tolerance"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(settings: dict[str, float], name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        WeightCheck(**settings)  # type: ignore[arg-type]
    assert caught.value.setting == name


# What rounding would hide: the same answer to the last bit, under weights that have moved.

WIDE = 5.0
"""A tolerance under which any two policies of these tests look alike."""


def test_an_engine_that_answers_as_before_is_refused_although_it_is_near_enough() -> None:
    trainer, engine = Trainer(), Faulty(lost="")
    verifier = verifier_of(trainer, engine, tolerance=WIDE)
    sync(verifier)
    trainer.learns()
    message = refused(verifier)
    assert "Cause: the sync did not reach the engine" in message
    found = re.search(r"up to ([\d.e-]+) nats", message)
    assert found is not None
    assert MOVED * WIDE < float(found[1]) < WIDE


@pytest.mark.parametrize("seed", range(6))
def test_whether_the_answer_is_as_before_does_not_depend_on_the_other_one(seed: int) -> None:
    """The answer to the new prompt may end early and leave the batch, which then rounds differently."""
    trainer = Trainer(eos=range(0, VOCAB, 3))
    verifier = verifier_of(trainer, Faulty(lost="", deaf=True), seed, tolerance=WIDE)
    sync(verifier)
    for _ in range(2):
        trainer.learns()
        assert "did not reach the engine" in refused(verifier)


def test_a_bfloat16_engine_that_is_never_synced_is_found_in_the_second_iteration() -> None:
    trainer = Trainer(qwen2(max_position_embeddings=256, initializer_range=0.1))
    verifier = verifier_of(trainer, Faulty(lost="", dtype="bfloat16"))
    sync(verifier)
    trainer.learns(0.02)
    assert "did not reach the engine" in refused(verifier)


def test_the_same_answer_from_the_same_weights_is_as_it_should_be() -> None:
    """An evaluation, then the next iteration: two syncs, no update between them."""
    verifier = verifier_of(Trainer(), HFEngine(), tolerance=1e-5)
    assert sync(verifier)["sync/logp_difference_max"] < 1e-5
    for _ in range(3):
        sync(verifier)


def test_a_step_too_small_for_the_engines_precision_is_no_fault() -> None:
    """A float32 trainer moves by less than a bfloat16 copy can show, and the answer stays the same to the last bit."""
    trainer, engine = Trainer(), Recording(dtype="bfloat16")
    verifier = verifier_of(trainer, engine)
    for _ in range(5):
        sync(verifier)
        trainer.learns(1e-9)
    assert len(engine.same) == 5
    assert all(asked.answer == engine.same[0].answer for asked in engine.same)


def test_small_steps_that_never_reach_the_engine_add_up() -> None:
    """Each alone would be below what counts as having moved; the comparison is with the first of equal answers."""
    trainer = Trainer()
    verifier = verifier_of(trainer, Faulty(lost=""), tolerance=WIDE)

    def raises(verifier: WeightVerifier) -> bool:
        try:
            return not sync(verifier)
        except WeightSyncError as error:
            return "did not reach the engine" in str(error)

    steps = 0
    while steps < 300 and not raises(verifier):
        trainer.learns(1e-4)
        steps += 1
    assert 3 < steps < 300


def test_an_answer_that_has_changed_is_the_one_to_compare_with() -> None:
    """Weights that come back to what they were do not count as unchanged; a sync that fails later on still does."""
    trainer, engine = Trainer(), Faulty()
    verifier = verifier_of(trainer, engine, tolerance=WIDE)
    first = copy.deepcopy(trainer.policy.state_dict())
    sync(verifier)
    trainer.learns()
    sync(verifier)
    trainer.policy.load_state_dict(first)
    sync(verifier)
    engine.lost = ""
    sync(verifier)
    trainer.learns()
    assert "did not reach the engine" in refused(verifier)


# As part of a datamodule.


def module_for(precision: str) -> DAPOModule:
    module = DAPOModule(TinyQwen2(torch.float32, max_position_embeddings=256))
    module.configure_model()
    plugin = MixedPrecision("bf16-mixed", "cpu") if precision == "bf16-mixed" else Precision()
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    module._trainer = SimpleNamespace(precision=precision, precision_plugin=plugin, strategy=strategy)  # type: ignore
    return module


def test_a_module_scores_with_the_precision_that_it_trains_with() -> None:
    """Rollouts are made while Lightning has no autocast on."""
    sequences = Sequences.collate([[3, 1, 4], [1, 5]], [[7, 2], [1, 8, 2]])
    exact, mixed = module_for("32-true"), module_for("bf16-mixed")
    assert (exact.compute_dtype, mixed.compute_dtype) == ("float32", "bfloat16")
    expected, _ = exact.policy(sequences, temperature=0.7)
    torch.testing.assert_close(exact.response_logp(sequences, 0.7), expected.detach())
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = mixed.policy(sequences, temperature=0.7)
    assert not torch.equal(rounded, expected)
    assert torch.equal(mixed.response_logp(sequences, 0.7), rounded.detach())
    assert not mixed.response_logp(sequences, 0.7).requires_grad
    assert mixed.response_logp(sequences, 0.7).dtype == torch.float32


class TestSyncEngine:
    def build(self, engine: Any, **settings: Any) -> tuple[EvaluationDataModule, Trainer]:
        trainer = Trainer()
        data = EvaluationDataModule(engine, {"paths": EvalSet(Paths(), IsOne())}, reward_pool=None, **settings)
        data.trainer = SimpleNamespace(lightning_module=trainer, predicting=True)  # type: ignore[assignment]
        data.collector.attach(trainer)  # type: ignore[arg-type]
        engine.setup(trainer.model_spec())
        return data, trainer

    def test_measures_and_is_timed_beside_the_sync(self) -> None:
        data, _ = self.build(HFEngine())
        timer = PhaseTimer()
        measured = data.collector.sync(timer)
        assert 0 < measured["sync/logp_difference_max"] < 1e-4
        assert timer.metrics().keys() == {"time/sync_s", "time/verify_s"}

    def test_remembers_what_the_engine_answered(self) -> None:
        data, trainer = self.build(Faulty(lost=""), weight_check=WeightCheck(tolerance=WIDE))
        data.collector.sync(PhaseTimer())
        data.collector.sync(PhaseTimer())
        trainer.learns()
        with pytest.raises(WeightSyncError, match="did not reach"):
            data.collector.sync(PhaseTimer())

    def test_forgets_it_when_the_run_is_over(self) -> None:
        """The next run, of another policy, owes nothing to the last one."""
        data, trainer = self.build(HFEngine(), weight_check=WeightCheck(tolerance=WIDE))
        data.collector.sync(PhaseTimer())
        data.teardown("fit")
        data.collector.engine = Faulty(lost="")
        data.engine.setup(trainer.model_spec())
        trainer.learns()
        data.collector.sync(PhaseTimer())

    def test_can_be_switched_off(self) -> None:
        engine = Recording(shift=1.0)
        data, _ = self.build(engine, weight_check=None)
        timer = PhaseTimer()
        assert data.collector.sync(timer) == {}
        assert timer.metrics().keys() == {"time/sync_s"}
        assert engine.asked == []

    def test_is_on_by_default(self) -> None:
        data, _ = self.build(Recording(shift=1.0))
        with pytest.raises(WeightSyncError):
            data.collector.sync(PhaseTimer())


# Whole runs.


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_run_logs_the_check_of_every_sync(workspace: Path) -> None:
    main(["fit", "--config", "tiny.yaml"])
    logged = curves(workspace / "run")
    for kind in ("max", "mean"):
        for prefix, steps in (("", [1, 2]), ("val/starts/", [0, 2])):
            points = logged[f"{prefix}sync/logp_difference_{kind}"]
            assert [step for step, _ in points] == steps
            assert all(0 <= value < 1e-4 for _, value in points)
    assert [step for step, _ in logged["time/verify_s"]] == [1, 2]
    assert "weight_check" in (workspace / "run" / "config.yaml").read_text()


def test_without_the_check_a_run_learns_the_same_bit_for_bit(workspace: Path) -> None:
    main(["fit", "--config", "tiny.yaml", "--trainer.default_root_dir", "checked"])
    main(["fit", "--config", "tiny.yaml", "--trainer.default_root_dir", "plain", "--data.weight_check", "null"])
    assert not [tag for tag in curves(workspace / "plain") if "logp_difference" in tag and "sync/" in tag]
    checked, plain = (load_file(workspace / run / "model" / "model.safetensors") for run in ("checked", "plain"))
    assert all(torch.equal(checked[name], plain[name]) for name in checked)


ENGINES = """
from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ibro_lightning.engines import HFEngine


class SkipsSyncs(HFEngine):
    syncs = 0

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], *, partial: bool = False) -> None:
        self.syncs += 1
        if self.syncs == 1:
            super().load_weights(named_tensors)
"""


def test_a_run_with_a_stale_engine_ends_in_one_line(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / "engines_of_mine.py").write_text(ENGINES)
    importlib.invalidate_caches()
    with pytest.raises(SystemExit):
        main(["fit", "--config", "tiny.yaml", "--data.engine", "engines_of_mine.SkipsSyncs"])
    errors = capsys.readouterr().err
    line = errors[errors.index("error:") :]
    assert line.count("\n") == 1
    assert "the engine does not have the policy's weights: |Δlogp| is up to" in line


def test_settings_are_read_from_the_command_line(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--data.weight_check.tolerance", "0.5", "--data.weight_check.prompt_tokens", "20"]
    with pytest.raises(SystemExit):
        main(["fit", "--config", "tiny.yaml", *settings, "--print_config"])
    printed = capsys.readouterr().out
    assert re.search(r"weight_check:\s+prompt_tokens: 20\s+new_tokens: 8\s+tolerance: 0\.5", printed)
    with pytest.raises(SystemExit):
        main(["validate", "--config", "tiny.yaml", "--data.weight_check.tolerance", "0"])
    assert "data.weight_check.tolerance: 0" in capsys.readouterr().err
