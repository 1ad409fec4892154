"""What the embedded engine runs besides attention, and what it refuses: tiny random models of each kind."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.engines import HFEngine
from ibro_lightning.engines.hf_cache import cache_config
from ibro_lightning.errors import ConfigError
from ibro_lightning.models import Policy
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.models.transformer import check_packing
from ibro_lightning.types import SamplingParams

torch.set_num_threads(1)

VOCAB = 48
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
TWO = {**SIZES, "num_hidden_layers": 2}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": dict(head_dim=16, **LINEAR),
    "qwen3_next": dict(head_dim=16, shared_expert_intermediate_size=16, **EXPERTS, **LINEAR),
    "lfm2": {"block_ff_dim": 48, "full_attn_idxs": [1, 3]},
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2, num_dense_layers=1, **EXPERTS),
    "olmo_hybrid": LINEAR,
    "granitemoehybrid": dict(layer_types=["mamba", "attention"] * 2, shared_intermediate_size=16, **LOCAL, **MAMBA),
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4, "num_experts": 2},
    "bamba": dict(attn_layer_indices=[1, 3], **MAMBA),
    "falcon_h1": dict(mamba_d_ssm=64, **MAMBA),
}
PROMPTS = [[5, 9, 11], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [30, 0, 0, 12, 13]]
SEEDS = [[1000 * prompt + sample for sample in range(3)] for prompt in range(len(PROMPTS))]
EOS = (1, 2, 3, 17, 18, 19, 20)


def config_of(kind: str, **settings: Any) -> Any:
    return AutoConfig.for_model(kind, **{**SIZES, **HYBRIDS.get(kind, {}), **settings})


@cache
def tiny(kind: str) -> Any:
    return model_of(config_of(kind))


def model_of(config: Any) -> Any:
    """With distributions that have peaks, and biases that show whether padding passes through."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += (0.08 if parameter.ndim >= 2 else 0.3) * torch.randn(parameter.shape)
    return model


def engine_for(model: Any, eos: tuple[int, ...] = EOS) -> HFEngine:
    engine = HFEngine(compact_below=1.0)
    engine.setup(ModelSpec(model.config, eos, torch.device("cpu")))
    engine.load_weights(model.state_dict().items())
    return engine


def responses(model: Any, max_tokens: int = 10) -> tuple[list[list[int]], list[tuple[int, ...]], list[torch.Tensor]]:
    """``(prompts, responses, the engine's log-probs)`` of all samples; some end early and leave the batch."""
    generated = engine_for(model).generate(PROMPTS, SamplingParams(max_tokens=max_tokens), SEEDS)
    rows = [(prompt, sample) for prompt, samples in zip(PROMPTS, generated, strict=True) for sample in samples]
    lengths = {len(sample.token_ids) for _, sample in rows}
    assert min(lengths) < 4
    assert max(lengths) == max_tokens
    return (
        [prompt for prompt, _ in rows],
        [sample.token_ids for _, sample in rows],
        [torch.tensor(s.logp) for _, s in rows],
    )


def scores(policy: Policy, sequences: Sequences) -> list[torch.Tensor]:
    logp, _ = policy(sequences, temperature=1.0)
    return [row[:length] for row, length in zip(logp, sequences.response_lengths.tolist(), strict=True)]


def largest_difference(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize("kind", HYBRIDS)
def test_engine_and_trainer_agree_on_ragged_batches(kind: str) -> None:
    """However the trainer pads; and with the gradient of the rows one by one."""
    model = tiny(kind)
    prompts, answers, engine_logp = responses(model)
    policy = Policy(model)
    rows = [Sequences.collate([prompt], [answer]) for prompt, answer in zip(prompts, answers, strict=True)]
    policy.zero_grad()
    alone = [scores(policy, row)[0] for row in rows]
    torch.cat(alone).sum().backward()
    expected = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    assert largest_difference(engine_logp, alone) < 1e-4
    for side in ("right", "left"):
        padded = scores(policy, Sequences.collate(prompts, answers, padding_side=side))
        assert largest_difference(padded, alone) < 1e-4
    policy.zero_grad()
    torch.cat(scores(policy, Sequences.collate(prompts, answers))).sum().backward()
    for name, parameter in policy.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["qwen3_next", "lfm2", "bamba", "jamba", "falcon_h1"])
def test_packing_is_refused_where_the_state_runs_on(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"^policy_options\.packing: True"):
        check_packing(tiny(kind))


@pytest.mark.parametrize("kind", ["bamba", "qwen3_next"])
def test_pieces_in_which_a_state_is_computed_leave_no_seam(kind: str) -> None:
    """Prompts and answers are longer than a chunk."""
    model = tiny(kind)
    prompts = [[(7 * i + 3) % VOCAB for i in range(length)] for length in (70, 19)]
    generated = engine_for(model, eos=(VOCAB,)).generate(prompts, SamplingParams(max_tokens=20), [[1, 2], [3]])
    rows = [(prompt, sample) for prompt, samples in zip(prompts, generated, strict=True) for sample in samples]
    scored = scores(Policy(model), Sequences.collate([p for p, _ in rows], [s.token_ids for _, s in rows]))
    assert largest_difference([torch.tensor(s.logp) for _, s in rows], scored) < 1e-4


# What is refused.

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "zamba2": ({}, "time steps"),
    "nemotron_h": ({}, "time steps"),
    "mamba": ({"state_size": 8}, "rows of different lengths"),
    "mamba2": (
        {"num_heads": 4, "head_dim": 16, "expand": 2, "state_size": 8, "n_groups": 1, "chunk_size": 8},
        "rows of different",
    ),
    "recurrent_gemma": (
        {"block_types": ["recurrent", "attention"], "lru_width": 32, "head_dim": 16},
        "rows of different",
    ),
    "minimax": (dict(layer_types=["linear_attention", "full_attention"], block_size=8, head_dim=16, **LOCAL), "cache"),
    "bert": ({}, "see later ones"),
    "xlnet": ({"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48}, "see later ones"),
    "openai-gpt": ({"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}, "RuntimeError"),
    "bart": (
        {
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
        },
        "encoder-decoder",
    ),
    "t5": ({"d_model": 32, "num_layers": 1, "num_heads": 2}, "encoder-decoder"),
    "vit": ({}, "cannot build it"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_engine_cannot_run_is_refused_in_one_line(kind: str) -> None:
    settings, reason = REFUSED[kind]
    if kind in ("zamba2", "nemotron_h"):
        config = AutoConfig.for_model(kind)
    else:
        base = {} if kind in ("bart", "t5", "openai-gpt", "xlnet", "vit") else TWO
        config = AutoConfig.for_model(kind, **{**base, "vocab_size": VOCAB, **settings})
    engine = HFEngine()
    with pytest.raises(ConfigError) as caught:
        engine.setup(ModelSpec(config, (1,), torch.device("cpu")))
    message = str(caught.value)
    assert "\n" not in message
    assert repr(kind) in message
    assert "VLLMEngine" in message
    assert reason in message
    with pytest.raises(RuntimeError, match="setup"):
        engine.generate([[1]], SamplingParams(max_tokens=1), [[0]])


def test_half_precision_hides_nothing() -> None:
    config = AutoConfig.for_model("mamba", **{**TWO, "state_size": 8})
    with pytest.raises(ConfigError, match=r"'mamba' .*rows of different lengths"):
        HFEngine(dtype="bfloat16").setup(ModelSpec(config, (1,), torch.device("cpu")))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trying_a_model_leaves_no_trace(dtype: Any) -> None:
    before = torch.get_rng_state()
    config = config_of("lfm2")
    said = config.to_dict()
    HFEngine(dtype=dtype).setup(ModelSpec(config, (1,), torch.device("cpu")))
    assert torch.equal(torch.get_rng_state(), before)
    assert config.to_dict() == said


# Configs that say more than the architecture knows.


@pytest.mark.parametrize(
    "stray",
    [
        {"sliding_window": 6},
        {"attention_chunk_size": 6},
        {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2},
        {"layer_types": ["linear_attention"] * 4},
        {"num_kv_shared_layers": 2},
        {"sliding_window": 6, "use_sliding_window": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_keys_that_the_architecture_does_not_know_do_nothing(kind: str, stray: dict[str, Any]) -> None:
    model = model_of(config_of(kind, **stray))
    prompts, answers, engine_logp = responses(model, max_tokens=16)
    with torch.no_grad():
        scored = scores(Policy(model), Sequences.collate(prompts, answers))
    assert largest_difference(engine_logp, scored) < 1e-4


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("mistral", {"sliding_window": 6}),
        ("gemma2", {"sliding_window": 6, "head_dim": 16}),
        ("gpt_oss", dict(sliding_window=6, head_dim=16, **LOCAL)),
        ("llama4_text", dict(attention_chunk_size=6, head_dim=16, intermediate_size_mlp=48, **LOCAL)),
        ("qwen2", {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 2}),
    ],
)
def test_windows_of_the_architecture_are_kept_to(kind: str, settings: dict[str, Any]) -> None:
    """And the cache forgets what is out of reach, which saves its memory."""
    model = model_of(config_of(kind, **settings))
    kept = cache_config(model.config)
    assert (getattr(kept, "sliding_window", None) or kept.attention_chunk_size) == 6
    prompts, answers, engine_logp = responses(model, max_tokens=16)
    with torch.no_grad():
        scored = scores(Policy(model), Sequences.collate(prompts, answers))
    assert largest_difference(engine_logp, scored) < 1e-4


ASKS_FOR_MORE = {"output_router_logits": True, "output_hidden_states": True, "return_dict": False}


@pytest.mark.parametrize("fused_head", [True, False])
@pytest.mark.parametrize(("kind", "more"), [("mixtral", LOCAL), ("qwen3_moe", {**EXPERTS, "head_dim": 16})])
def test_outputs_that_nobody_reads_are_not_asked_for(kind: str, more: dict[str, Any], fused_head: bool) -> None:
    """Router logits failed while decoding; the config stays as it is, and is exported so."""
    model = model_of(config_of(kind, **more, **ASKS_FOR_MORE))
    prompts, answers, engine_logp = responses(model)
    policy = Policy(model, fused_head=fused_head)
    scored = scores(policy, Sequences.collate(prompts, answers))
    torch.cat(scored).sum().backward()
    assert largest_difference(engine_logp, scored) < 1e-4
    assert {name: getattr(model.config, name) for name in ASKS_FOR_MORE} == ASKS_FOR_MORE
