"""How the embedded engine's batch shrinks and grows: rows that end leave it, and others take their places."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from helpers.quick import slow_unless
from ibro_lightning.engines import HFEngine, hf, hf_batch, hf_check
from ibro_lightning.engines.hf_attention import grouped_attention
from ibro_lightning.engines.hf_batch import Batch, GrowingBatch
from ibro_lightning.engines.hf_cache import BLOCK, Buffer
from ibro_lightning.engines.hf_responses import _in_place
from ibro_lightning.engines.sampling import sample_tokens
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.types import Generation, SamplingParams

torch.set_num_threads(1)

VOCAB = 40
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
KINDS: dict[str, tuple[str, dict[str, Any], type[Batch]]] = {
    "attention": ("qwen2", {}, GrowingBatch),
    "windows": ("mistral", {"sliding_window": 4}, GrowingBatch),
    "both": (
        "gemma3_text",
        {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        GrowingBatch,
    ),
    "linear": ("qwen3_5_text", {"layer_types": ["linear_attention", "full_attention"], **LINEAR}, GrowingBatch),
    "convolution": ("lfm2", {"block_ff_dim": 48, "full_attn_idxs": [1]}, GrowingBatch),
    "sinks": (
        "gpt_oss",
        {"sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1},
        GrowingBatch,
    ),
    "alibi": ("bloom", {"n_layer": 2, "n_head": 4}, Batch),
    "chunks": (
        "llama4_text",
        {"attention_chunk_size": 6, "intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1},
        Batch,
    ),
}
EOS = (1, 2, 3, 4, 5)
PROMPTS = [[5, 9, 11], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [30, 0, 0, 12, 13], [8, 8], [31, 2, 17, 4]]
SEEDS = [[100 * prompt + sample for sample in range(3)] for prompt in range(len(PROMPTS))]
SAMPLING = SamplingParams(max_tokens=12)


def model_of(kind: str) -> Any:
    name, settings, _ = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SIZES, **settings})).float().eval()


def engine_for(model: Any, **settings: Any) -> HFEngine:
    engine = HFEngine(**settings)
    engine.setup(ModelSpec(model.config, EOS, torch.device("cpu")))
    engine.load_weights(model.state_dict().items())
    return engine


def forward_passes(engine: HFEngine) -> list[tuple[int, int, int | None]]:
    """``(rows, new tokens, width of the mask)`` of every forward pass from now on."""
    passes: list[tuple[int, int, int | None]] = []

    def note(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs["attention_mask"]
        masks = [m for m in mask.values() if m is not None] if isinstance(mask, dict) else [mask]
        passes.append((*kwargs["input_ids"].shape, max(m.shape[-1] for m in masks)))

    engine._model.register_forward_pre_hook(note, with_kwargs=True)
    return passes


def flat(groups: list[list[Generation]]) -> list[Generation]:
    return [sample for group in groups for sample in group]


def assert_same(some: list[list[Generation]], others: list[list[Generation]]) -> None:
    for one, other in zip(flat(some), flat(others), strict=True):
        assert one.token_ids == other.token_ids
        assert one.finish_reason == other.finish_reason
        assert one.logp == pytest.approx(other.logp, abs=1e-4)


@pytest.fixture(autouse=True)
def nothing_checked_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is planted below must not be hidden by what was found before it was."""
    monkeypatch.setattr(hf, "PASSED", set())


@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_batch_is_taken_where_the_architecture_allows_it(kind: str) -> None:
    assert engine_for(model_of(kind))._batch_type is KINDS[kind][2]


@pytest.mark.parametrize(
    ("kind", "max_batch_size"),
    slow_unless(
        lambda case: case[1] == 4 or case[0] == "attention", [(kind, size) for kind in KINDS for size in (3, 4, 7)]
    ),
)
def test_samples_that_join_a_batch_are_those_that_would_have_begun_one(kind: str, max_batch_size: int) -> None:
    model = model_of(kind)
    alone = [engine_for(model).generate([p], SAMPLING, [s])[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]
    lengths = {len(sample.token_ids) for sample in flat(alone)}
    assert min(lengths) < 4
    assert max(lengths) == 12
    assert_same(engine_for(model, max_batch_size=max_batch_size).generate(PROMPTS, SAMPLING, SEEDS), alone)


def test_free_rows_are_filled_and_no_row_is_too_many_or_too_wide() -> None:
    """While some responses go on, others end and the next begin: far fewer steps than one batch after the other."""
    engine = engine_for(model_of("attention"), max_batch_size=6)
    prompts = sorted([prompt for prompt in PROMPTS if len(prompt) > 1] * 4, key=len)
    passes = forward_passes(engine)
    samples = flat(engine.generate(prompts, SAMPLING, [[10 * prompt + i for i in range(3)] for prompt in range(20)]))
    lengths = [len(sample.token_ids) for sample in samples]
    rows, widths = [rows for rows, new, _ in passes if new == 1], [width for _, _, width in passes]
    assert max(rows) == 6
    assert max(widths) <= max(map(len, PROMPTS)) + SAMPLING.max_tokens
    assert sum(rows) == sum(lengths) - len(lengths), "the prompt gives a response's first token, a step each other"
    one_after_the_other = sum(max(lengths[first : first + 6]) - 1 for first in range(0, len(lengths), 6))
    assert len(rows) < 0.85 * one_after_the_other


def test_samples_of_a_prompt_wait_for_room_for_all_of_them() -> None:
    engine = engine_for(model_of("attention"), max_batch_size=4)
    passes = forward_passes(engine)
    engine.generate([[7, 8], [9, 10, 11]], SAMPLING, [[1, 2, 3], [4, 5, 6]])
    assert [rows for rows, new, _ in passes if new > 1] == [1, 1]


@pytest.mark.parametrize("compact_below", [0.3, 0.8])
def test_rows_that_stay_after_their_end_exceed_no_position(compact_below: float) -> None:
    """Learned positions beyond the last are an error."""
    config = AutoConfig.for_model(
        "gpt2", vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=21, initializer_range=0.3
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config).eval()
    lazy = engine_for(model, compact_below=compact_below, max_batch_size=5)
    assert lazy._batch_type is GrowingBatch
    assert_same(lazy.generate(PROMPTS, SAMPLING, SEEDS), engine_for(model).generate(PROMPTS, SAMPLING, SEEDS))


def test_a_batch_that_the_probe_finds_wrong_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("attention")
    expected = engine_for(model).generate(PROMPTS, SAMPLING, SEEDS)
    masks = GrowingBatch._masks
    monkeypatch.setattr(GrowingBatch, "_masks", lambda batch: torch.zeros_like(masks(batch)))  # padding is seen
    hf.PASSED.clear()
    engine = engine_for(model)
    assert engine._batch_type is Batch
    assert engine._model.config._attn_implementation == "sdpa"
    assert_same(engine.generate(PROMPTS, SAMPLING, SEEDS), expected)


def test_an_engine_is_checked_once_for_each_configuration_and_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run sets its engine up again for its last evaluation."""
    checks: list[str] = []

    def note(model: Any, *others: Any) -> bool:
        checks.append(model.config.model_type)
        return hf_check.check_generation(model, *others)

    monkeypatch.setattr(hf, "check_generation", note)
    model = model_of("attention")
    first = engine_for(model).generate(PROMPTS, SAMPLING, SEEDS)
    assert engine_for(model).generate(PROMPTS, SAMPLING, SEEDS) == first
    assert checks == ["qwen2"]
    engine_for(model_of("windows"))
    assert checks == ["qwen2", "mistral"]
    model.set_attn_implementation("eager")
    assert engine_for(model).generate(PROMPTS, SAMPLING, SEEDS)
    assert checks == ["qwen2", "mistral", "qwen2"]


@pytest.mark.parametrize("kind", ["attention", "windows", "linear"])
def test_the_probe_has_rows_join(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that join with the state of others are found."""
    join = hf_batch.join_rows

    def mixed_up(cache: Any, other: Any) -> None:
        join(cache, other)
        rows = len(cache.layers[-1].keys)
        hf_batch.select_rows(cache, torch.arange(rows).roll(1))

    monkeypatch.setattr(hf_batch, "join_rows", mixed_up)
    assert engine_for(model_of(kind))._batch_type is Batch


@pytest.mark.parametrize(("largest", "expected"), [(2e9, GrowingBatch), (0, Batch)])
def test_a_model_whose_numbers_are_not_checked_takes_no_risk(
    largest: float, expected: type[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half precision rounding hides faults, and a float32 copy of a large model has no room."""
    monkeypatch.setattr(hf_check, "MAX_FLOAT32_PARAMETERS", largest)
    assert engine_for(model_of("attention"), dtype="bfloat16")._batch_type is expected


# The parts.


def states(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_a_buffer_holds_what_was_put_into_it() -> None:
    kept = states(2, 3, 4, 5)
    buffer = Buffer(kept.clone())
    buffer.repeat(torch.tensor([0, 0, 1, 1, 1]))
    kept = kept[[0, 0, 1, 1, 1]]
    for step in range(2 * BLOCK):
        new = states(5, 3, 1, 5) + step
        buffer.append(new)
        kept = torch.cat([kept, new], dim=2)
        assert torch.equal(buffer.states, kept)
    buffer.drop(3, torch.tensor([1]), torch.tensor([4]))
    kept = kept[[0, 4, 2]]
    assert torch.equal(buffer.states, kept)
    buffer.keep_last(7)
    kept = kept[:, :, -7:]
    assert torch.equal(buffer.states, kept)
    for other in (states(2, 3, 9, 5), states(1, 3, 2, 5)):
        buffer.join(Buffer(other.clone()))
        longest = max(kept.shape[2], other.shape[2])
        padded = [torch.nn.functional.pad(part, (0, 0, longest - part.shape[2], 0)) for part in (kept, other)]
        kept = torch.cat(padded)
        assert torch.equal(buffer.states, kept)


def test_appending_a_token_and_dropping_rows_copies_nothing_else() -> None:
    buffer = Buffer(states(4, 2, 3, 5))
    buffer.append(states(4, 2, 1, 5))
    place = buffer.states.data_ptr()
    for _ in range(BLOCK):
        buffer.append(states(4, 2, 1, 5))
    buffer.drop(2, torch.tensor([0]), torch.tensor([3]))
    assert buffer.states.data_ptr() == place
    assert buffer.states.shape == (2, 2, 4 + BLOCK, 5)


@pytest.mark.parametrize("live", [[1, 0, 1, 1, 0, 1], [0, 0, 1], [1, 1, 0, 0], [0, 1, 0, 1, 0, 1, 0]])
def test_rows_that_stay_keep_their_places_where_they_can(live: list[int]) -> None:
    count = sum(live)
    keep = _in_place(torch.tensor(live).bool(), count).tolist()
    assert sorted(keep) == [row for row, alive in enumerate(live) if alive]
    assert all(keep[row] == row for row in range(count) if live[row])


@pytest.mark.parametrize("shape", [(4, 4, 7), (4, 2, 1), (6, 3, 30), (8, 1, 5)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_heads_that_share_keys_are_computed_as_those_that_have_copies(
    shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float
) -> None:
    heads, shared, length = shape
    module = torch.nn.Module()
    module.num_key_value_groups = heads // shared  # type: ignore[assignment]
    query, key = states(3, heads, 1, 8).to(dtype), states(3, shared, length, 8).to(dtype)
    value = states(3, shared, length, 6).to(dtype)
    hidden = torch.arange(length) < torch.tensor([0, length // 2, length - 1])[:, None]
    mask = torch.zeros(3, 1, 1, length, dtype=dtype).masked_fill_(hidden[:, None, None], -torch.inf)
    for attention_mask in (mask, None, ~hidden[:, None, None]):
        for scaling in (None, 0.7):
            expected, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)
            computed, weights = grouped_attention(module, query, key, value, attention_mask, scaling=scaling)
            assert weights is None
            torch.testing.assert_close(computed, expected, atol=tolerance, rtol=0)


def test_rows_at_different_steps_draw_what_each_would_draw_alone() -> None:
    logits, seeds, steps = states(6, 30), torch.arange(6) * 77 + 5, torch.tensor([0, 3, 1, 3, 9, 2])
    tokens, logp = sample_tokens(logits, SamplingParams(), seeds, steps)
    for row, step in enumerate(steps.tolist()):
        one = slice(row, row + 1)
        token, own_logp = sample_tokens(logits[one], SamplingParams(), seeds[one], step)
        assert int(token) == int(tokens[row])
        torch.testing.assert_close(own_logp, logp[one])


def test_a_temperature_of_one_and_a_tensor_that_is_used_again_are_left_alone() -> None:
    """The draws happen in place, on memory of their own."""
    logits = states(4, 20)
    before = logits.clone()
    sample_tokens(logits, SamplingParams(), torch.arange(4), 0)
    assert torch.equal(logits, before)
