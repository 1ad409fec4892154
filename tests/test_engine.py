"""The embedded engine against the slowest thing that cannot be wrong: the plain model, one sequence, no cache.

Every batching trick (left padding, cache, shared prefixes, rows that leave the batch) must be invisible in tokens and
log-probs: a policy that is sampled from one distribution and scored under another learns from noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
)

from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.engines import HFEngine, sampling
from ibro_lightning.engines.sampling import sample_tokens
from ibro_lightning.errors import ConfigError, RolloutError
from ibro_lightning.models import Policy
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.types import Generation, SamplingParams

torch.set_num_threads(1)

VOCAB = 40
NEVER = VOCAB + 7  # an EOS id that the model cannot produce
SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    # Ten times the usual: distributions with peaks, to which positions and context matter.
    "initializer_range": 0.3,
    **SPECIAL,
}
GQA = {**SIZES, "num_key_value_heads": 2}
CONFIGS = {
    "qwen2": lambda: Qwen2Config(**GQA, tie_word_embeddings=True),
    "llama": lambda: LlamaConfig(**GQA),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, **SPECIAL
    ),
    "gemma2": lambda: Gemma2Config(
        **GQA,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=4,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **GQA,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        final_logit_softcapping=3.0,
    ),
    "mistral": lambda: MistralConfig(**GQA, sliding_window=4),
    "opt": lambda: OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        max_position_embeddings=64,
        init_std=0.3,
        **SPECIAL,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES),
    "bloom": lambda: BloomConfig(
        vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3, **SPECIAL
    ),
    "falcon_alibi": lambda: FalconConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
        alibi=True,
        **SPECIAL,
    ),
}
# Of different lengths, one of a single token, one longer than the sliding windows, and with the engine's padding id 0
# as an ordinary token.
PROMPTS = [[5, 9, 11], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [30, 0, 0, 12, 13]]
EOS = (1, 2, 3)
SEEDS = [[1000 * prompt + sample for sample in range(4)] for prompt in range(len(PROMPTS))]


@cache
def tiny_model(name: str, seed: int = 0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()


def engine_for(model, eos: Sequence[int] = EOS, **settings) -> HFEngine:
    engine = HFEngine(**settings)
    engine.setup(ModelSpec(model.config, tuple(eos), torch.device("cpu")))
    engine.load_weights(model.state_dict().items())
    return engine


@torch.no_grad()
def reference_logits(model, ids: Sequence[int]) -> torch.Tensor:
    """``[L, V]``: one sequence, no padding, no cache, no explicit positions."""
    return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()


def reference_logp(model, prompt: Sequence[int], response: Sequence[int], temperature: float) -> torch.Tensor:
    logits = reference_logits(model, [*prompt, *response])
    logp = (logits / temperature).log_softmax(dim=-1)
    return torch.stack([logp[len(prompt) - 1 + t, token] for t, token in enumerate(response)])


def reference_greedy(model, prompt: Sequence[int], eos: Sequence[int], max_tokens: int) -> tuple[int, ...]:
    response: list[int] = []
    while len(response) < max_tokens and not (response and response[-1] in eos):
        response.append(int(reference_logits(model, [*prompt, *response])[-1].argmax()))
    return tuple(response)


def tokens_of(generations: list[list[Generation]]) -> list[list[tuple[int, ...]]]:
    return [[sample.token_ids for sample in samples] for samples in generations]


def until_eos(tokens: Sequence[int], eos: Sequence[int]) -> tuple[int, ...]:
    """``tokens`` up to and including the first EOS."""
    ends = [place for place, token in enumerate(tokens) if token in eos]
    return tuple(tokens[: ends[0] + 1]) if ends else tuple(tokens)


@pytest.mark.parametrize("name", CONFIGS)
class TestEveryArchitecture:
    def test_greedy_tokens_and_log_probs_equal_the_plain_model(self, name):
        model = tiny_model(name)
        generated = engine_for(model).generate(
            PROMPTS, SamplingParams(temperature=0, max_tokens=10), [[0] for _ in PROMPTS]
        )
        for prompt, (sample,) in zip(PROMPTS, generated, strict=True):
            assert sample.token_ids == reference_greedy(model, prompt, EOS, 10)
            torch.testing.assert_close(
                torch.tensor(sample.logp), reference_logp(model, prompt, sample.token_ids, 1.0), atol=1e-4, rtol=0
            )

    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_sampled_log_probs_equal_the_plain_model(self, name, temperature):
        model = tiny_model(name)
        params = SamplingParams(temperature=temperature, max_tokens=12)
        generated = engine_for(model, compact_below=1.0).generate(PROMPTS, params, SEEDS)
        assert len({sample.token_ids for samples in generated for sample in samples}) > 8, (
            "these samples hardly differ: the comparison says little"
        )
        for prompt, samples in zip(PROMPTS, generated, strict=True):
            assert len(samples) == 4
            for sample in samples:
                torch.testing.assert_close(
                    torch.tensor(sample.logp),
                    reference_logp(model, prompt, sample.token_ids, temperature),
                    atol=1e-4,
                    rtol=0,
                )

    def test_log_probs_equal_what_the_policy_recomputes(self, name):
        """The importance ratio of the first update must be 1: the policy scores right-padded batches without cache."""
        model = tiny_model(name)
        generated = engine_for(model).generate(PROMPTS, SamplingParams(temperature=0.8, max_tokens=12), SEEDS)
        rows = [(prompt, s) for prompt, samples in zip(PROMPTS, generated, strict=True) for s in samples]
        sequences = Sequences.collate([prompt for prompt, _ in rows], [s.token_ids for _, s in rows])
        with torch.no_grad():
            logp, _ = Policy(model)(sequences, temperature=0.8)
        for row, (_, sample) in enumerate(rows):
            torch.testing.assert_close(
                logp[row, : len(sample.logp)], torch.tensor(sample.logp), atol=1e-4, rtol=0, msg=str
            )

    def test_samples_do_not_depend_on_the_rest_of_the_batch(self, name):
        """Else a resumed run, or one on more ranks, would sample other responses."""
        model = tiny_model(name)
        params = SamplingParams(max_tokens=10)
        alone = [engine_for(model).generate([p], params, [s])[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]
        for max_batch_size in (1, 3, 256):
            together = engine_for(model, max_batch_size=max_batch_size).generate(PROMPTS, params, SEEDS)
            assert tokens_of(together) == tokens_of([*alone])


class TestSeeds:
    def test_same_seeds_give_bit_identical_generations(self):
        model = tiny_model("qwen2")
        params = SamplingParams(max_tokens=12)
        first = engine_for(model).generate(PROMPTS, params, SEEDS)
        engine = engine_for(model)
        assert engine.generate(PROMPTS, params, SEEDS) == first
        assert engine.generate(PROMPTS, params, SEEDS) == first, "a second call of one engine differs"

    def test_other_seeds_give_other_samples(self):
        engine = engine_for(tiny_model("qwen2"))
        samples = engine.generate([PROMPTS[0]], SamplingParams(max_tokens=12), [list(range(50))])[0]
        assert len({sample.token_ids for sample in samples}) > 40

    def test_the_same_seed_gives_the_same_sample_within_a_batch(self):
        engine = engine_for(tiny_model("qwen2"))
        (one, other), _ = engine.generate(PROMPTS[:2], SamplingParams(max_tokens=12), [[5, 5], [5, 5]])
        assert one.token_ids == other.token_ids

    def test_an_engine_leaves_torchs_generator_untouched(self):
        """Otherwise turning evaluation on would change training."""
        model = tiny_model("qwen2")
        torch.manual_seed(3)
        before = torch.get_rng_state()
        engine_for(model).generate(PROMPTS, SamplingParams(max_tokens=6), SEEDS)
        assert torch.equal(torch.get_rng_state(), before)

    def test_torchs_generator_does_not_matter(self):
        model = tiny_model("qwen2")
        torch.manual_seed(1)
        first = engine_for(model).generate(PROMPTS, SamplingParams(max_tokens=6), SEEDS)
        torch.manual_seed(2)
        assert engine_for(model).generate(PROMPTS, SamplingParams(max_tokens=6), SEEDS) == first


class TestBatching:
    @pytest.mark.parametrize("max_batch_size", [1, 2, 3, 7])
    def test_splitting_a_prompts_samples_over_batches_keeps_their_order(self, max_batch_size):
        model = tiny_model("qwen2")
        params, seeds = SamplingParams(max_tokens=8), list(range(7))
        one_by_one = [engine_for(model).generate([PROMPTS[0]], params, [[s]])[0][0].token_ids for s in seeds]
        assert len(set(one_by_one)) == 7, "equal samples cannot show their order"
        split = engine_for(model, max_batch_size=max_batch_size).generate(
            [PROMPTS[1], PROMPTS[0]], params, [[100, 101], seeds]
        )
        assert tokens_of(split)[1] == one_by_one

    def test_a_batch_never_holds_more_responses_than_allowed_and_computes_each_prompt_once(self):
        model = tiny_model("qwen2")
        engine = engine_for(model, eos=(NEVER,), max_batch_size=6)
        shapes = record_shapes(engine)
        engine.generate(PROMPTS, SamplingParams(max_tokens=3), SEEDS)
        assert max(rows for rows, _ in shapes) <= 6
        prefills = [rows for rows, width in shapes if width > 1]
        assert sum(prefills) < sum(map(len, SEEDS)), "a prompt was computed once per sample"

    @pytest.mark.parametrize("name", ["qwen2", "mistral", "bloom"])
    def test_letting_finished_rows_leave_the_batch_changes_nothing(self, name):
        model = tiny_model(name)
        params, seeds = SamplingParams(max_tokens=16), [list(range(10 * i, 10 * i + 10)) for i in range(len(PROMPTS))]
        results, work = [], []
        for compact_below in (1.0, 0.8, 1e-9):
            engine = engine_for(model, compact_below=compact_below)
            shapes = record_shapes(engine)
            results.append(tokens_of(engine.generate(PROMPTS, params, seeds)))
            work.append(sum(rows for rows, width in shapes if width == 1))
        assert results[0] == results[1] == results[2]
        assert work[0] <= work[1] <= work[2] > work[0], f"rows computed with more and more laziness: {work}"

    def test_uneven_and_missing_samples(self):
        """Evaluation sets and refilled rollouts need not ask for the same number everywhere."""
        model = tiny_model("qwen2")
        params = SamplingParams(max_tokens=5)
        generated = engine_for(model).generate(PROMPTS, params, [[1], [], [2, 3, 4], [5, 6]])
        assert [len(samples) for samples in generated] == [1, 0, 3, 2]
        assert tokens_of(generated)[3] == tokens_of(engine_for(model).generate([PROMPTS[3]], params, [[5, 6]]))[0]

    def test_no_prompts_no_samples(self):
        assert engine_for(tiny_model("qwen2")).generate([], SamplingParams(), []) == []


def record_shapes(engine: HFEngine) -> list[tuple[int, int]]:
    """The ``(rows, width)`` of every forward pass from now on."""
    shapes: list[tuple[int, int]] = []
    engine._model.register_forward_pre_hook(
        lambda _module, _args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


class TestEndOfSequence:
    """An EOS only cuts: draws depend on seed and step, so what comes before it is what would have come anyway."""

    PARAMS = SamplingParams(max_tokens=16)

    @pytest.fixture
    def endless(self) -> list[list[tuple[int, ...]]]:
        """The samples of a model that cannot end."""
        generated = engine_for(tiny_model("qwen2"), eos=(NEVER,)).generate(PROMPTS, self.PARAMS, SEEDS)
        assert {(len(s.token_ids), s.finish_reason) for samples in generated for s in samples} == {(16, "length")}
        return tokens_of(generated)

    @pytest.mark.parametrize("eos", [(3,), (1, 2, 3), (0,), (12, 30)])
    def test_ends_the_response_and_is_part_of_it(self, endless, eos):
        model = tiny_model("qwen2")
        generated = engine_for(model, eos=eos).generate(PROMPTS, self.PARAMS, SEEDS)
        assert tokens_of(generated) == [[until_eos(tokens, eos) for tokens in samples] for samples in endless]
        reasons = set()
        for prompt, samples in zip(PROMPTS, generated, strict=True):
            for sample in samples:
                reasons.add(sample.finish_reason)
                assert sample.finish_reason == ("stop" if sample.token_ids[-1] in eos else "length")
                assert len(sample.logp) == len(sample.token_ids)
                torch.testing.assert_close(
                    sample.logp[-1], reference_logp(model, prompt, sample.token_ids, 1.0)[-1].item(), atol=1e-4, rtol=0
                )
        assert reasons == {"stop", "length"}, "both kinds of ending must have been seen"

    def test_every_one_of_several_ids_ends_a_response(self, endless):
        generated = engine_for(tiny_model("qwen2"), eos=EOS).generate(
            PROMPTS, self.PARAMS, [list(range(100 * i, 100 * i + 30)) for i in range(len(PROMPTS))]
        )
        assert {s.token_ids[-1] for samples in generated for s in samples if s.finish_reason == "stop"} == set(EOS)

    def test_further_tokens_end_a_response_if_the_sampling_names_them(self, endless):
        params = SamplingParams(max_tokens=16, stop_token_ids=(3, 12))
        generated = engine_for(tiny_model("qwen2"), eos=(30,)).generate(PROMPTS, params, SEEDS)
        assert tokens_of(generated) == [[until_eos(tokens, (3, 12, 30)) for tokens in samples] for samples in endless]
        assert {s.token_ids[-1] for samples in generated for s in samples if s.finish_reason == "stop"} == {3, 12, 30}
        with pytest.raises(ConfigError, match="stop_token_ids"):
            SamplingParams(stop_token_ids=(-1,))

    @pytest.mark.parametrize("length", [1, 2, 5])
    def test_at_exactly_the_length_limit_it_is_a_stop(self, endless, length):
        """Such a response is complete; calling it truncated would punish it."""
        tokens = endless[0][0]
        assert tokens[length - 1] not in tokens[: length - 1]
        engine = engine_for(tiny_model("qwen2"), eos=(tokens[length - 1],))
        sample = engine.generate([PROMPTS[0]], SamplingParams(max_tokens=length), [SEEDS[0][:1]])[0][0]
        assert (sample.token_ids, sample.finish_reason) == (tokens[:length], "stop")

    @pytest.mark.parametrize("length", [1, 3])
    def test_cut_one_token_before_eos_is_a_length_stop(self, endless, length):
        tokens = endless[0][0]
        assert tokens[length] not in tokens[:length]
        engine = engine_for(tiny_model("qwen2"), eos=(tokens[length],))
        sample = engine.generate([PROMPTS[0]], SamplingParams(max_tokens=length), [SEEDS[0][:1]])[0][0]
        assert (sample.token_ids, sample.finish_reason) == (tokens[:length], "length")

    @pytest.mark.parametrize("token", [0, 5])
    def test_a_pad_token_that_equals_eos_does_no_harm(self, token):
        """Many tokenizers have no pad token of their own. Here it also stands inside prompts, where it must count."""
        config = Qwen2Config(**{**GQA, "pad_token_id": token, "eos_token_id": token})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.3)  # also the pad token's row, left at 0
        prompts = [[token, 8, token], [9], [4, token, token, token, 6, 7]]
        generated = engine_for(model, eos=(token,)).generate(
            prompts, SamplingParams(max_tokens=12), [list(range(30 * i, 30 * i + 30)) for i in range(3)]
        )
        assert any(s.finish_reason == "stop" and len(s.token_ids) > 1 for samples in generated for s in samples)
        for prompt, samples in zip(prompts, generated, strict=True):
            for sample in samples:
                assert token not in sample.token_ids[:-1]
                torch.testing.assert_close(
                    torch.tensor(sample.logp), reference_logp(model, prompt, sample.token_ids, 1.0), atol=1e-4, rtol=0
                )


class TestWeights:
    def test_a_missing_weight_is_named(self):
        """Half-synchronised weights would sample from a policy that never existed."""
        model = tiny_model("llama")
        engine = engine_for(model)
        name = "model.layers.1.mlp.up_proj.weight"
        with pytest.raises(RolloutError, match=name):
            engine.load_weights((n, t) for n, t in model.state_dict().items() if n != name)

    def test_an_unknown_name_is_refused(self):
        model = tiny_model("llama")
        with pytest.raises(RolloutError, match=r"model\.layers\.7"):
            engine_for(model).load_weights([*model.state_dict().items(), ("model.layers.7.weight", torch.zeros(1))])

    @pytest.mark.parametrize(
        "shape",
        [
            (VOCAB + 1, 32),
            (1,),
            (32,),
            (VOCAB, 1),
        ],
    )
    def test_a_weight_of_another_shape_is_refused(self, shape):
        """A vector copied into a matrix would be repeated along its rows, without a word."""
        model = tiny_model("llama")
        weights = {**model.state_dict(), "model.embed_tokens.weight": torch.zeros(shape)}
        with pytest.raises(RolloutError):
            engine_for(model).load_weights(weights.items())

    @pytest.mark.parametrize("left_out", ["model.embed_tokens.weight", "lm_head.weight"])
    def test_tied_weights_need_one_of_their_names(self, left_out):
        """safetensors files hold tied weights once; state dicts hold them twice."""
        model, params = tiny_model("qwen2"), SamplingParams(max_tokens=6)
        assert model.config.tie_word_embeddings
        expected = engine_for(model).generate(PROMPTS, params, SEEDS)
        engine = engine_for(tiny_model("qwen2", seed=1))
        engine.load_weights((n, t) for n, t in model.state_dict().items() if n != left_out)
        assert engine.generate(PROMPTS, params, SEEDS) == expected

    def test_tied_weights_missing_under_both_names_are_noticed(self):
        model = tiny_model("qwen2")
        tied = {"model.embed_tokens.weight", "lm_head.weight"}
        with pytest.raises(RolloutError, match=r"embed_tokens|lm_head"):
            engine_for(model).load_weights((n, t) for n, t in model.state_dict().items() if n not in tied)

    def test_untied_weights_need_both_names(self):
        model = tiny_model("llama")
        assert not model.config.tie_word_embeddings
        with pytest.raises(RolloutError, match="lm_head"):
            engine_for(model).load_weights((n, t) for n, t in model.state_dict().items() if n != "lm_head.weight")

    def test_new_weights_are_sampled_from_at_once(self):
        old, new = tiny_model("qwen2"), tiny_model("qwen2", seed=1)
        engine = engine_for(old)
        params = SamplingParams(temperature=0, max_tokens=8)
        before = engine.generate(PROMPTS, params, [[0]] * 4)
        engine.load_weights(new.state_dict().items())
        after = engine.generate(PROMPTS, params, [[0]] * 4)
        assert tokens_of(after) == [[reference_greedy(new, prompt, EOS, 8)] for prompt in PROMPTS]
        assert tokens_of(after) != tokens_of(before)

    def test_the_engine_samples_from_what_it_was_last_given(self):
        """Its weights are a copy: an optimizer step between two syncs must not reach into generation."""
        config = Qwen2Config(**GQA)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        engine = engine_for(model)
        params = SamplingParams(max_tokens=6)
        before = engine.generate(PROMPTS, params, SEEDS)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        assert engine.generate(PROMPTS, params, SEEDS) == before

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_the_policys_config_is_left_as_it_was(self, dtype):
        """The policy goes on using, and exporting, this very object."""
        other = {"bfloat16": torch.float32, "float32": torch.bfloat16}[dtype]
        model = AutoModelForCausalLM.from_config(Qwen2Config(**GQA), dtype=other)
        before = model.config.to_dict()
        engine_for(model, dtype=dtype)
        assert model.config.to_dict() == before


class TestLifeCycle:
    def test_generating_before_setup_says_what_to_call(self):
        with pytest.raises(RuntimeError, match="setup"):
            HFEngine().generate(PROMPTS, SamplingParams(), SEEDS)

    def test_usable_again_after_close(self):
        model, params = tiny_model("qwen2"), SamplingParams(max_tokens=6)
        engine = engine_for(model)
        expected = engine.generate(PROMPTS, params, SEEDS)
        engine.close()
        with pytest.raises(RuntimeError, match="setup"):
            engine.generate(PROMPTS, params, SEEDS)
        engine.setup(ModelSpec(model.config, EOS, torch.device("cpu")))
        engine.load_weights(model.state_dict().items())
        assert engine.generate(PROMPTS, params, SEEDS) == expected

    def test_a_second_setup_keeps_the_weights(self):
        model, params = tiny_model("qwen2"), SamplingParams(max_tokens=6)
        engine = engine_for(model)
        expected = engine.generate(PROMPTS, params, SEEDS)
        engine.setup(ModelSpec(model.config, EOS, torch.device("cpu")))
        assert engine.generate(PROMPTS, params, SEEDS) == expected

    def test_offload_and_onload_change_nothing(self):
        model, params = tiny_model("qwen2"), SamplingParams(max_tokens=6)
        engine = engine_for(model)
        expected = engine.generate(PROMPTS, params, SEEDS)
        engine.offload()
        engine.onload()
        assert engine.generate(PROMPTS, params, SEEDS) == expected

    @pytest.mark.parametrize(
        ("settings", "name"),
        [
            ({"max_batch_size": 0}, "^max_batch_size"),
            ({"compact_below": 0.0}, "^compact_below"),
            ({"compact_below": 1.5}, "^compact_below"),
        ],
    )
    def test_refused_settings_are_named(self, settings, name):
        with pytest.raises(ConfigError, match=name):
            HFEngine(**settings)


# Critical values of chi-square at 0.001, from tables.
CHI_SQUARE = {1: 10.83, 2: 13.82, 3: 16.27, 7: 24.32}
N = 20_000


def softmax(logits: Sequence[float], temperature: float = 1.0) -> list[float]:
    weights = [math.exp(x / temperature) for x in logits]
    return [w / sum(weights) for w in weights]


def draw(logits: Sequence[float], params: SamplingParams, step: int = 0) -> tuple[list[int], torch.Tensor]:
    """``N`` draws from one distribution: how often each token came, and the log-prob reported for each draw."""
    rows = torch.tensor([logits]).expand(N, -1)
    tokens, logp = sample_tokens(rows, params, torch.arange(N) * 7919 + 13, step)
    counts = torch.bincount(tokens, minlength=len(logits)).tolist()
    return counts, torch.stack(
        [logp[tokens == t][0] if counts[t] else torch.tensor(-torch.inf) for t in range(len(logits))]
    )


def assert_follows(counts: Sequence[int], probabilities: Sequence[float]) -> None:
    """Counts follow ``probabilities``, and tokens of probability 0 never came."""
    assert [t for t, p in enumerate(probabilities) if p == 0 and counts[t]] == []
    possible = [(c, p) for c, p in zip(counts, probabilities, strict=True) if p > 0]
    if len(possible) > 1:
        assert sum((c - N * p) ** 2 / (N * p) for c, p in possible) < CHI_SQUARE[len(possible) - 1]
    else:
        assert possible[0][0] == N


def log(probabilities: Sequence[float]) -> list[float]:
    return [math.log(p) if p > 0 else -math.inf for p in probabilities]


class TestSampling:
    LOGITS = (0.3, -1.0, 2.0, 0.0, 1.1, -2.0, 0.7, 1.9)

    @pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
    def test_follows_the_softmax(self, temperature):
        counts, logp = draw(self.LOGITS, SamplingParams(temperature=temperature), step=5)
        expected = softmax(self.LOGITS, temperature)
        assert_follows(counts, expected)
        torch.testing.assert_close(logp, torch.tensor(log(expected)), atol=1e-5, rtol=0)

    @pytest.mark.parametrize(
        ("params", "expected"),
        [
            (SamplingParams(top_k=1), (0, 1, 0, 0)),
            (SamplingParams(top_k=2), (0.3 / 0.7, 0.4 / 0.7, 0, 0)),
            (SamplingParams(top_k=9), (0.3, 0.4, 0.1, 0.2)),
            (SamplingParams(top_p=0.35), (0, 1, 0, 0)),
            (SamplingParams(top_p=0.6), (0.3 / 0.7, 0.4 / 0.7, 0, 0)),
            (SamplingParams(top_p=0.8), (0.3 / 0.9, 0.4 / 0.9, 0, 0.2 / 0.9)),
            (SamplingParams(min_p=0.6), (0.3 / 0.7, 0.4 / 0.7, 0, 0)),
            (SamplingParams(min_p=0.4), (0.3 / 0.9, 0.4 / 0.9, 0, 0.2 / 0.9)),
            # top_p counts what top_k left: 0.4 / 0.7 alone reaches 0.5, where 0.4 of the full distribution would not.
            (SamplingParams(top_k=2, top_p=0.5), (0, 1, 0, 0)),
            (SamplingParams(top_k=3, min_p=0.6), (0.3 / 0.7, 0.4 / 0.7, 0, 0)),
            # At temperature 0.5 probabilities are squared: 9, 16, 1, 4 of 30; the first two hold 0.83.
            (SamplingParams(temperature=0.5, top_p=0.8), (9 / 25, 16 / 25, 0, 0)),
            (SamplingParams(temperature=0.5, min_p=0.3), (9 / 25, 16 / 25, 0, 0)),
        ],
    )
    def test_truncation_keeps_the_right_tokens_and_renormalises(self, params, expected):
        counts, logp = draw(log((0.3, 0.4, 0.1, 0.2)), params)
        assert_follows(counts, expected)
        torch.testing.assert_close(logp, torch.tensor(log(expected)), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-52])
    @pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(temperature=0.1)])
    def test_never_a_token_of_probability_0(self, monkeypatch, uniform, params):
        """Also at the ends of the unit interval, where an inverse CDF is easily off by one."""
        monkeypatch.setattr(
            sampling, "counter_uniforms", lambda seeds, step: torch.full(seeds.shape, uniform, dtype=torch.float64)
        )
        impossible = -torch.inf
        logits = torch.tensor(
            [
                [impossible, 1.0, impossible, 2.0, impossible],
                [impossible, impossible, 0.0, impossible, impossible],
                [3.0, 200.0, impossible, -200.0, impossible],
            ]
        )
        tokens, logp = sample_tokens(logits, params, torch.zeros(3, dtype=torch.long), 0)
        assert torch.isfinite(logits.gather(-1, tokens[:, None])).all()
        assert torch.isfinite(logp).all()

    @pytest.mark.parametrize("place", [1, 100, 500, 999])
    def test_rare_tokens_keep_their_share(self, monkeypatch, place):
        """1000 tokens of 1e-10 each behind a nearly certain one: next to 1, float32 sums cannot tell them apart."""
        logits = torch.full((1, 1001), math.log(1e-10))
        logits[0, 0] = 0.0
        uniform = 1 - (1000.5 - place) * 1e-10
        monkeypatch.setattr(
            sampling, "counter_uniforms", lambda seeds, step: torch.tensor([uniform], dtype=torch.float64)
        )
        tokens, logp = sample_tokens(logits, SamplingParams(), torch.tensor([1]), 0)
        assert abs(int(tokens) - place) <= 1
        assert logp.item() == pytest.approx(math.log(1e-10), abs=1e-4)

    def test_greedy_takes_the_most_likely_token_and_reports_temperature_1(self):
        tokens, logp = sample_tokens(
            torch.tensor([self.LOGITS, self.LOGITS[::-1]]), SamplingParams(temperature=0), torch.tensor([1, 2]), 0
        )
        assert tokens.tolist() == [2, 5]
        torch.testing.assert_close(logp, torch.full((2,), math.log(softmax(self.LOGITS)[2])), atol=1e-5, rtol=0)

    def test_rows_of_a_batch_are_drawn_from_their_own_distributions(self):
        logits = torch.full((3, 4), -torch.inf)
        logits[0, 3], logits[1, 0], logits[2, 2] = 0.0, 0.0, 0.0
        tokens, logp = sample_tokens(logits, SamplingParams(), torch.tensor([1, 2, 3]), 0)
        assert tokens.tolist() == [3, 0, 2]
        assert logp.tolist() == [0, 0, 0]

    def test_half_precision_logits_are_scored_in_float32(self):
        """bfloat16 log-probs are 0.01 to 0.1 nats off."""
        logits = torch.tensor([self.LOGITS]).bfloat16()
        tokens, logp = sample_tokens(logits, SamplingParams(), torch.tensor([4]), 0)
        expected = math.log(softmax(logits[0].tolist())[int(tokens)])
        assert logp.dtype == torch.float32
        assert logp.item() == pytest.approx(expected, abs=1e-5)


def test_all_samples_of_one_prompt_stay_in_one_batch_if_they_fit() -> None:
    """Three and one of four would have the second prompt computed twice."""
    engine = engine_for(tiny_model("qwen2"), eos=(NEVER,), max_batch_size=4)
    shapes = record_shapes(engine)
    engine.generate([[1, 2, 3], [4, 5, 6]], SamplingParams(max_tokens=2), [[1, 2, 3], [4, 5, 6]])
    assert [rows for rows, width in shapes if width > 1] == [1, 1]


def test_a_transposed_weight_is_refused() -> None:
    model, name = tiny_model("llama"), "model.layers.1.mlp.up_proj.weight"
    weights = {**model.state_dict(), name: model.state_dict()[name].T}
    with pytest.raises(RolloutError, match=f"weight '{name}' has shape"):
        engine_for(model).load_weights(weights.items())
