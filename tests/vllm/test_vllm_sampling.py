"""vLLM's samples against the plain model, and against the embedded engine, which draws differently from the same
distribution: a policy that is sampled from one distribution and scored under another learns from noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.tiny_vllm import (
    CONFIGS,
    EOS,
    LONG,
    NEVER,
    PROMPTS,
    hf_engine,
    largest_difference,
    logps_of,
    next_logp,
    reference_logits,
    tiny_model,
    tokens_of,
)
from ibro_lightning.engines.sampling import _truncate
from ibro_lightning.errors import ConfigError
from ibro_lightning.seeding import derive_seed
from ibro_lightning.types import SamplingParams

SEEDS = [[1000 * prompt + sample for sample in range(4)] for prompt in range(len(PROMPTS))]
ONE_EACH = [[0] for _ in PROMPTS]
MANY = [list(range(100 * index, 100 * index + 30)) for index in range(len(PROMPTS))]


@pytest.mark.parametrize("name", CONFIGS, scope="module")
class TestLogProbs:
    def test_greedy_tokens_and_log_probs_equal_the_embedded_engine_and_the_plain_model(self, serve, name):
        model, params = tiny_model(name), SamplingParams(temperature=0, max_tokens=10)
        generated = serve(name).generate(PROMPTS, params, ONE_EACH)
        embedded = hf_engine(model).generate(PROMPTS, params, ONE_EACH)
        assert tokens_of(generated) == tokens_of(embedded)
        assert [s[0].finish_reason for s in generated] == [s[0].finish_reason for s in embedded]
        assert largest_difference(model, PROMPTS, generated) < 1e-4

    @pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
    def test_sampled_log_probs_equal_the_plain_model(self, serve, name, temperature):
        params = SamplingParams(temperature=temperature, max_tokens=12)
        generated = serve(name).generate(PROMPTS, params, SEEDS)
        assert len({sample.token_ids for samples in generated for sample in samples}) > 16, (
            "these samples hardly differ: the comparison says little"
        )
        assert largest_difference(tiny_model(name), PROMPTS, generated, temperature) < 1e-4

    @pytest.mark.parametrize(
        "options",
        [
            {"top_k": 5},
            {"top_k": 1},
            {"top_k": 1000},
            {"top_p": 0.6},
            {"top_p": 0.05},
            {"min_p": 0.1},
            {"top_k": 12, "top_p": 0.7},
            {"temperature": 0.7, "top_k": 12, "top_p": 0.7},
            {"temperature": 1.5, "min_p": 0.2},
        ],
        ids=str,
    )
    def test_truncated_sampling_reports_the_truncated_distribution(self, serve, name, options):
        """Renormalised over the tokens that are kept, and nothing else is ever sampled."""
        model, params = tiny_model(name), SamplingParams(max_tokens=6, **options)
        generated = serve(name, eos=NEVER).generate(PROMPTS, params, SEEDS)
        for prompt, samples in zip(PROMPTS, generated, strict=True):
            for sample in samples:
                logits = reference_logits(model, [*prompt, *sample.token_ids])[len(prompt) - 1 : -1]
                expected = _truncate((logits / params.temperature).log_softmax(-1), params).log_softmax(-1)
                expected = expected.gather(-1, torch.tensor(sample.token_ids)[:, None]).squeeze(-1)
                torch.testing.assert_close(torch.tensor(sample.logp), expected, atol=1e-4, rtol=0)

    def test_greedy_decoding_ignores_truncation(self, serve, name):
        plain = SamplingParams(temperature=0, max_tokens=6)
        truncated = SamplingParams(temperature=0, max_tokens=6, top_p=0.3, top_k=2, min_p=0.5)
        engine = serve(name)
        assert engine.generate(PROMPTS, truncated, ONE_EACH) == engine.generate(PROMPTS, plain, ONE_EACH)


@pytest.mark.parametrize("engine_name", ["vllm", "hf"])
class TestDistribution:
    """Chi-square tests against exact probabilities. The seeds are fixed, so they pass always or never."""

    SAMPLES = 3000

    def engine(self, serve, engine_name):
        return serve("untied", eos=NEVER) if engine_name == "vllm" else hf_engine(tiny_model("untied"), NEVER)

    def seeds(self, kind: str) -> list[int]:
        counted = kind == "counted"
        return [n if counted else derive_seed(3, "sample", n) for n in range(self.SAMPLES)]

    @pytest.mark.parametrize("seeds", ["counted", "derived"])
    @pytest.mark.parametrize("temperature", [1.0, 1.7])
    def test_first_tokens_follow_the_models_probabilities(self, serve, engine_name, seeds, temperature):
        model, params = tiny_model("untied"), SamplingParams(temperature=temperature, max_tokens=1)
        samples = self.engine(serve, engine_name).generate([PROMPTS[0]], params, [self.seeds(seeds)])[0]
        counts = torch.zeros(64)
        for sample in samples:
            counts[sample.token_ids[0]] += 1
        p_value, cells = chi_square(counts, next_logp(model, PROMPTS[0], temperature).exp())
        assert cells > 8, "hardly a distribution"
        assert p_value > 1e-3

    def test_pairs_of_tokens_follow_the_models_probabilities(self, serve, engine_name):
        """The second draw must be independent of the first: same seed, another number."""
        model, params = tiny_model("untied"), SamplingParams(temperature=1.3, max_tokens=2)
        samples = self.engine(serve, engine_name).generate([PROMPTS[2]], params, [self.seeds("derived")])[0]
        counts = torch.zeros(64, 64)
        for sample in samples:
            counts[tuple(sample.token_ids)] += 1
        first = next_logp(model, PROMPTS[2], 1.3)
        second = torch.stack([next_logp(model, [*PROMPTS[2], token], 1.3) for token in range(64)])
        p_value, cells = chi_square(counts.flatten(), (first[:, None] + second).exp().flatten())
        assert cells > 50
        assert p_value > 1e-3

    @pytest.mark.parametrize("options", [{"top_k": 6}, {"top_p": 0.7}, {"min_p": 0.1}], ids=str)
    def test_truncated_sampling_keeps_the_rest_in_proportion(self, serve, engine_name, options):
        model, params = tiny_model("untied"), SamplingParams(temperature=1.5, max_tokens=1, **options)
        samples = self.engine(serve, engine_name).generate([PROMPTS[3]], params, [self.seeds("derived")])[0]
        probabilities = _truncate(next_logp(model, PROMPTS[3], 1.5)[None], params).softmax(-1)[0]
        counts = torch.zeros(64)
        for sample in samples:
            counts[sample.token_ids[0]] += 1
        assert counts[probabilities == 0].sum() == 0
        assert chi_square(counts, probabilities)[0] > 1e-3


def chi_square(counts: Tensor, probabilities: Tensor) -> tuple[float, int]:
    """p-value and number of cells; those where fewer than 5 are expected count as one."""
    expected = probabilities.double() / probabilities.double().sum() * counts.sum()
    rare = expected < 5
    observed = torch.cat([counts[~rare].double(), counts[rare].sum()[None].double()])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    if expected[-1] < 5:
        observed, expected = observed[:-1], expected[:-1]
    statistic = ((observed - expected) ** 2 / expected).sum()
    degrees = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, statistic / 2)), len(expected)


class TestSeeds:
    PARAMS = SamplingParams(max_tokens=12)

    def test_same_seeds_give_identical_generations(self, serve):
        engine = serve("tied")
        first = engine.generate(PROMPTS, self.PARAMS, SEEDS)
        again = engine.generate(PROMPTS, self.PARAMS, SEEDS)
        assert tokens_of(again) == tokens_of(first)
        # The second time the long prompt's prefix comes from the cache.
        torch.testing.assert_close(logps_of(again), logps_of(first), atol=1e-5, rtol=0)

    def test_a_new_engine_with_another_seed_of_its_own_gives_identical_generations(self, serve):
        first = serve("tied").generate(PROMPTS, self.PARAMS, SEEDS)
        assert serve("tied", seed=17).generate(PROMPTS, self.PARAMS, SEEDS) == first

    def test_other_seeds_give_other_samples(self, serve):
        samples = serve("tied", eos=NEVER).generate([PROMPTS[0]], self.PARAMS, [list(range(50))])[0]
        assert len({sample.token_ids for sample in samples}) > 45

    def test_equal_prompts_with_the_same_seed_get_the_same_sample(self, serve):
        (one, other), (elsewhere,) = serve("tied").generate([[7], [7]], self.PARAMS, [[5, 5], [5]])
        assert one.token_ids == other.token_ids == elsewhere.token_ids

    def test_large_seeds(self, serve):
        """Seeds have 63 bits. (torch's generator on CPUs takes the lower 32.)"""
        seeds = [0, 2**31, 2**32 + 5, 2**62 + 1, 2**63 - 1]
        samples = serve("tied").generate([PROMPTS[0]], self.PARAMS, [seeds])[0]
        assert len({sample.token_ids for sample in samples}) == len(seeds)

    @pytest.mark.parametrize("name", CONFIGS, scope="module")
    def test_a_sample_does_not_depend_on_which_others_share_the_call(self, serve, name):
        """Else a resumed run, or one on more ranks, would sample other responses."""
        engine = serve(name)
        together = engine.generate(PROMPTS, self.PARAMS, SEEDS)
        for prompt, seeds, samples in zip(PROMPTS, SEEDS, together, strict=True):
            alone = [engine.generate([prompt], self.PARAMS, [[seed]])[0][0] for seed in seeds]
            assert tokens_of([alone]) == tokens_of([samples])
            torch.testing.assert_close(logps_of([alone]), logps_of([samples]), atol=1e-5, rtol=0)

    @pytest.mark.parametrize(
        "settings",
        [{"max_num_seqs": 3}, {"engine_args": {"max_num_batched_tokens": 640}}, {"kv_cache_gib": 0.0009}],
        ids=["few at a time", "few tokens per step", "too little cache for all"],
    )
    def test_how_vllm_schedules_the_requests_changes_nothing(self, serve, settings):
        """Waiting, prompts spread over steps, and responses thrown out of a full cache and computed again."""
        params = SamplingParams(max_tokens=150)
        prompts = [[*LONG[40 * n :], n] for n in range(6)]
        seeds = [[10 * n, 10 * n + 1] for n in range(len(prompts))]
        expected = serve("tied", eos=NEVER).generate(prompts, params, seeds)
        generated = serve("tied", eos=NEVER, **settings).generate(prompts, params, seeds)
        assert tokens_of(generated) == tokens_of(expected)
        torch.testing.assert_close(logps_of(generated), logps_of(expected), atol=1e-4, rtol=0)

    def test_uneven_and_missing_samples_come_back_in_order(self, serve):
        """Evaluation sets and refilled rollouts need not ask for the same number everywhere."""
        engine = serve("tied")
        seeds = [[1], [], [2, 3, 4], [5, 6], [7], []]
        generated = engine.generate(PROMPTS, self.PARAMS, seeds)
        assert [len(samples) for samples in generated] == [1, 0, 3, 2, 1, 0]
        for prompt, own, samples in zip(PROMPTS, seeds, generated, strict=True):
            for seed, sample in zip(own, samples, strict=True):
                assert engine.generate([prompt], self.PARAMS, [[seed]])[0][0].token_ids == sample.token_ids

    def test_more_than_ten_samples_of_a_prompt_come_back_in_order(self, serve):
        """Request ids are texts: "10" sorts before "2"."""
        engine, seeds = serve("tied"), list(range(23))
        together = engine.generate([[7]], self.PARAMS, [seeds])[0]
        assert [s.token_ids for s in together] == [
            engine.generate([[7]], self.PARAMS, [[seed]])[0][0].token_ids for seed in seeds
        ]

    def test_no_prompts_and_no_samples(self, serve):
        engine = serve("tied")
        assert engine.generate([], SamplingParams(), []) == []
        assert engine.generate([[5], [6]], SamplingParams(), [[], []]) == [[], []]


class TestEndOfSequence:
    """An EOS only cuts: what comes before it is what would have come anyway."""

    PARAMS = SamplingParams(max_tokens=16)

    @pytest.mark.parametrize("eos", [(3,), EOS, (0,), (12, 30)], ids=str)
    def test_ends_the_response_and_is_its_last_token(self, serve, eos):
        endless = serve("tied", eos=NEVER).generate(PROMPTS, self.PARAMS, MANY)
        assert {(len(s.token_ids), s.finish_reason) for samples in endless for s in samples} == {(16, "length")}
        generated = serve("tied", eos=eos).generate(PROMPTS, self.PARAMS, MANY)
        for samples, uncut in zip(generated, endless, strict=True):
            for sample, whole in zip(samples, uncut, strict=True):
                ends = [place + 1 for place, token in enumerate(whole.token_ids) if token in eos]
                end = ends[0] if ends else 16
                assert sample.token_ids == whole.token_ids[:end]
                assert len(sample.logp) == end
                assert sample.finish_reason == ("stop" if ends else "length")
        reasons = [s.finish_reason for samples in generated for s in samples]
        assert {"stop", "length"} == set(reasons), "both kinds of ending must have been seen"
        last = {s.token_ids[-1] for samples in generated for s in samples if s.finish_reason == "stop"}
        assert last == set(eos), "every one of several ids ends a response"
        assert largest_difference(tiny_model("tied"), PROMPTS, generated) < 1e-4

    def test_at_exactly_the_length_limit_it_is_a_stop_and_one_token_earlier_a_cut(self, serve):
        """A response that ends in time is complete; calling it truncated would punish it."""
        engine, lengths = serve("tied"), set()
        stopped = [
            (prompt, seed, sample)
            for prompt, seeds, samples in zip(PROMPTS, MANY, engine.generate(PROMPTS, self.PARAMS, MANY), strict=True)
            for seed, sample in zip(seeds, samples, strict=True)
            if sample.finish_reason == "stop"
            and len(sample.token_ids) not in lengths
            and not lengths.add(len(sample.token_ids))
        ]
        assert {1, 2, 5} <= lengths
        for prompt, seed, sample in stopped:
            length = len(sample.token_ids)
            exact = engine.generate([prompt], SamplingParams(max_tokens=length), [[seed]])[0][0]
            assert (exact.token_ids, exact.finish_reason) == (sample.token_ids, "stop")
            if length > 1:
                cut = engine.generate([prompt], SamplingParams(max_tokens=length - 1), [[seed]])[0][0]
                assert (cut.token_ids, cut.finish_reason) == (sample.token_ids[:-1], "length")

    @pytest.mark.parametrize("eos", [EOS, NEVER, tuple(range(0, 60, 5))], ids=["few", "never", "many"])
    @pytest.mark.parametrize("max_tokens", [1, 2, 3, 8])
    def test_the_embedded_engine_ends_in_the_same_way(self, serve, eos, max_tokens):
        """Greedily, as the two draw differently."""
        prompts = [[token, (3 * token + 1) % 60] for token in range(60)]
        params, seeds = SamplingParams(temperature=0, max_tokens=max_tokens), [[0] for _ in prompts]
        generated = serve("tied", eos=eos).generate(prompts, params, seeds)
        embedded = hf_engine(tiny_model("tied"), eos).generate(prompts, params, seeds)
        assert [(s.token_ids, s.finish_reason) for (s,) in generated] == [
            (s.token_ids, s.finish_reason) for (s,) in embedded
        ]

    def test_the_models_own_eos_does_not_end_a_response(self, serve):
        """The config's EOS may be another than the ones that the datamodule works with."""
        # generation_config.json and config.json are where vLLM would look.
        engine = serve("tied_with_eos", eos=(3,))
        generated = engine.generate(PROMPTS, self.PARAMS, MANY)
        assert {s.token_ids[-1] for samples in generated for s in samples if s.finish_reason == "stop"} == {3}
        assert any(5 in s.token_ids[:-1] for samples in generated for s in samples)


class TestLimits:
    def test_prompt_and_response_fill_the_engine_exactly(self, serve):
        prompt = (LONG + LONG)[:500]
        (sample,) = serve("tied", eos=NEVER).generate([prompt], SamplingParams(max_tokens=12), [[1]])[0]
        assert (len(sample.token_ids), sample.finish_reason) == (12, "length")
        assert largest_difference(tiny_model("tied"), [prompt], [[sample]]) < 1e-4

    def test_one_token_more_is_refused(self, serve):
        with pytest.raises(ConfigError, match=r"512 positions of engine and model: write at most 12.*max_model_len"):
            serve("tied", eos=NEVER).generate([(LONG + LONG)[:500]], SamplingParams(max_tokens=13), [[1]])

    @pytest.mark.parametrize("token", [61, 64, 10**6])
    def test_a_token_outside_the_vocabulary_is_refused(self, serve, token):
        """61 to 63 have a row in vLLM's padded embedding: it would answer."""
        with pytest.raises(ConfigError, match=f"token id {token}.*61 tokens"):
            serve("tied").generate([[5], [7, token, 8]], SamplingParams(max_tokens=2), [[1], [2]])


def test_samples_of_a_prompt_share_the_whole_blocks_of_it(serve, monkeypatch):
    """300 tokens are nine blocks of 32 and a rest; only the first sample computes them."""
    engine = serve("tied")
    cached, step = {}, engine._engine.step

    def watched():
        outputs = step()
        cached.update({int(output.request_id): output.num_cached_tokens for output in outputs})
        return outputs

    engine.reset_cache()
    monkeypatch.setattr(engine._engine, "step", watched)
    engine.generate([LONG], SamplingParams(max_tokens=2), [[1, 2, 3, 4]])
    assert [cached[sample] for sample in range(4)] == [0, 288, 288, 288]
