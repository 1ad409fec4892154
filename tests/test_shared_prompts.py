"""Each distinct prompt of a micro-batch is run once, without padding: exact, or as if there were no such thing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

from helpers.gradients import values_and_gradients
from helpers.heads import LINEAR
from helpers.models import TinySource, gpt2, gpt2_critic, qwen2, qwen2_critic
from helpers.rollouts import padded_further, rollouts, sequences
from helpers.sharded import meet, objective, on_ranks, source_of
from helpers.updates import fit
from ibro_lightning.batches.flat import FlatBatch
from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.models import Critic, LoRAOptions, Policy, PolicyOptions, build_policy, full_tensor
from ibro_lightning.models.building import wrap_policy
from ibro_lightning.modules import DAPOModule, PPOModule
from ibro_lightning.regularizers import InformationBottleneck
from ibro_lightning.update import ReferenceKL
from ibro_lightning.update.micro_batches import TokenBudget, shared_prompt_batches

torch.set_num_threads(1)


def group(prompt: list[int], *lengths: int) -> list[tuple[list[int], list[int]]]:
    """Rows of one prompt with responses of these lengths, no two of which are equal."""
    return [(prompt, [(5 * step + 3 * length + prompt[0]) % 23 for step in range(length)]) for length in lengths]


def batch_of(*rows: tuple[list[int], list[int]], side: Any = "right") -> Sequences:
    return Sequences.collate([prompt for prompt, _ in rows], [response for _, response in rows], padding_side=side)


LONG = [*group(list(range(1, 12)), 2, 5, 1, 3), *group([7, 3] * 6, 4, 4), *group([9], 2)]
"""Prompts are longer than their responses, so that they ask only once."""
BATCHES = {
    "short prompts": sequences(),
    "padded left": sequences("left"),
    "padded further": padded_further(sequences("left"), 2, 1),
    "long prompts": batch_of(*LONG),
    "long prompts, padded left, in disorder": batch_of(*LONG[::-2], *LONG[::2], side="left"),
    "one row": batch_of(*group([4, 2], 3)),
    "an empty response": batch_of(*group([4, 2, 1, 5], 3, 0, 1)),
}


def assert_shared_is_plain(shared: Any, plain: Any, seqs: Sequences, precision: float) -> None:
    assert shared.shares_prompts
    assert not plain.shares_prompts
    for one, other in zip(values_and_gradients(shared, seqs), values_and_gradients(plain, seqs), strict=True):
        size = other.abs().max().item() if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=0, atol=precision * max(1.0, size))


# Exact.


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("fused_head", [True, False])
def test_values_and_gradients_are_those_of_each_row_with_its_own_prompt(batch: str, fused_head: bool) -> None:
    """GPT-2 computes all of it in float64."""
    model = gpt2().double()
    networks = (Policy(model, fused_head=fused_head, share_prompts=shared) for shared in (True, False))
    assert_shared_is_plain(*networks, BATCHES[batch], 1e-12)


@pytest.mark.parametrize("name", ["qwen2, tied", "llama, untied", "cohere, scaled up", "granite, divided by 6"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_architectures_that_compute_norms_in_float32_share_by_its_precision(name: str, attention: str) -> None:
    model = LINEAR[name]()
    model.set_attn_implementation(attention)
    for batch in ("short prompts", "long prompts"):
        assert_shared_is_plain(Policy(model), Policy(model, share_prompts=False), BATCHES[batch], 2e-5)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("build", [qwen2_critic, gpt2_critic])
@pytest.mark.parametrize("batch", BATCHES)
def test_a_critic_values_a_shared_prompt_like_any_other(build: Callable[[], Any], batch: str) -> None:
    model, precision = (build(), 1e-12) if build is gpt2_critic else (build().float(), 2e-5)
    assert_shared_is_plain(Critic(model), Critic(model, share_prompts=False), BATCHES[batch], precision)


@pytest.mark.parametrize("window", [1, 3, 6, 40])
def test_sliding_windows_reach_back_into_the_prompt_as_far_as_they_do(window: int) -> None:
    config = MistralConfig(**{**qwen2().config.to_dict(), "sliding_window": window})
    torch.manual_seed(0)
    model = MistralForCausalLM(config)
    for batch in ("short prompts", "long prompts", "long prompts, padded left, in disorder"):
        assert_shared_is_plain(Policy(model), Policy(model, share_prompts=False), BATCHES[batch], 2e-5)


@pytest.mark.parametrize("batch", ["short prompts", "long prompts"])
def test_checkpointed_blocks_are_recomputed_as_they_were_run(batch: str) -> None:
    model = gpt2().double()
    plain, checkpointed = Policy(model), Policy(model, gradient_checkpointing=True)
    assert plain.shares_prompts
    assert checkpointed.shares_prompts
    expected = values_and_gradients(plain, BATCHES[batch])
    for one, other in zip(values_and_gradients(checkpointed, BATCHES[batch]), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert model.config._attn_implementation == "sdpa"


def test_adapters_get_the_same_gradients() -> None:
    results = []
    for shared in (True, False):
        policy = wrap_policy(gpt2().double(), PolicyOptions(lora=LoRAOptions(rank=2), share_prompts=shared))
        assert policy.shares_prompts is shared
        for name, parameter in policy.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        objective(policy, list(range(8))).backward()
        results.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, expected in results[1].items():
        torch.testing.assert_close(
            results[0][name], expected, rtol=0, atol=1e-12 * max(1.0, expected.abs().max().item())
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_reason_not_to_share(dtype: torch.dtype) -> None:
    for seed in range(3):
        policy = Policy(qwen2(seed).to(dtype))
        assert policy.shares_prompts
        if dtype == torch.float32:
            logp, _ = policy(sequences(), temperature=1.0)
            plain, _ = Policy(policy.model, share_prompts=False)(sequences(), temperature=1.0)
            assert (logp - plain).abs().max() < 1e-5


# What is run.


@pytest.mark.parametrize("batch", BATCHES)
def test_the_model_sees_each_distinct_prompt_once_and_neither_padding_nor_last_tokens(batch: str) -> None:
    """No token is predicted from a response's last one."""
    policy, seqs = Policy(gpt2()), BATCHES[batch]
    assert policy.shares_prompts
    policy(seqs, temperature=1.0)  # the first time, random draws are looked for, too
    seen: list[Any] = []
    policy.model.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    policy(seqs, temperature=1.0)
    [inputs] = seen
    firsts = sorted(set(seqs.same_prompts()))
    count = int(seqs.prompt_lengths[firsts].sum() + (seqs.response_lengths - 1).clamp(min=0).sum())
    assert inputs["input_ids"].shape == inputs["position_ids"].shape == (1, count)


@pytest.mark.parametrize("batch", BATCHES)
def test_every_token_of_the_flat_row_is_where_its_sequences_say(batch: str) -> None:
    seqs = BATCHES[batch]
    flat, attended = FlatBatch.of(seqs), seqs.attention_mask.bool()
    places = flat.places(seqs)
    assert torch.equal(flat.tokens[places], seqs.input_ids[attended])
    assert torch.equal(flat.positions[places], seqs.position_ids[attended])
    assert set(places.tolist()) == set(range(len(flat.tokens)))
    kept = torch.cat([part.queries.flatten()[part.kept] for part in flat.parts])
    assert torch.equal(kept, torch.arange(len(flat.tokens))), "attention's results follow each other in its order"


def test_long_prompts_ask_once_and_short_ones_with_each_response() -> None:
    assert all(part.before is None for part in FlatBatch.of(BATCHES["short prompts"]).parts)
    asked = sum(part.queries.numel() for part in FlatBatch.of(BATCHES["long prompts"]).parts)
    assert asked < int(BATCHES["long prompts"].lengths.sum())


# Micro-batches.

ROWS = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), min_size=1, max_size=14)


@settings(max_examples=25, deadline=None)
@given(rows=ROWS, budgets=st.tuples(st.integers(1, 60), st.integers(1, 60)))
def test_no_plan_changes_the_loss_or_its_gradient(rows: list[tuple[int, int]], budgets: tuple[int, int]) -> None:
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12], [13, 14], [1, 2]]
    seqs = batch_of(*(group(prompts[number], length)[0] for number, length in rows))
    weights = torch.randn(seqs.response_mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model, results = gpt2().double(), []
    for budget, shared in ((budgets[0], True), (budgets[1], True), (budgets[0], False)):
        policy = Policy(model, share_prompts=shared)
        model.zero_grad()
        total = 0.0
        for chosen, _ in TokenBudget(budget).micro_batches(seqs, network=policy):
            logp, entropy = policy(seqs.select(chosen), temperature=0.8)
            loss = (weights[chosen, : logp.shape[1]] * (logp - 0.3 * entropy)).sum()
            loss.backward()
            total += loss.item()
        results.append([torch.tensor(total), *(parameter.grad.clone() for parameter in model.parameters())])
    for others in results[:2]:
        for one, other in zip(others, results[2], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, budget=st.integers(1, 60))
def test_shared_micro_batches_cover_each_row_once_within_the_budget(rows: list[tuple[int, int]], budget: int) -> None:
    prompts, responses = [number for number, _ in rows], [length for _, length in rows]
    lengths = [3 * number + 1 for number in prompts]
    cut = [chosen.tolist() for chosen in shared_prompt_batches(prompts, lengths, responses, budget)]
    assert sorted(row for chosen in cut for row in chosen) == list(range(len(rows)))
    for chosen in cut:
        tokens = sum(3 * number + 1 for number in {prompts[row] for row in chosen})
        assert len(chosen) == 1 or tokens + sum(responses[row] for row in chosen) <= budget


def test_rows_of_a_prompt_stay_together_and_count_it_once() -> None:
    """Prompts of 10 and 2 tokens: 10 + 1 + 2 + 3 and 2 + 9 + 1 fit into 16; in order of length, 5 micro-batches would
    be needed for 11 + 12 + 13 and 3 + 11 tokens."""
    cut = shared_prompt_batches([0, 1, 0, 1, 0], [10, 2, 10, 2, 10], [3, 9, 1, 1, 2], 16)
    assert [rows.tolist() for rows in cut] == [[2, 4, 0], [3, 1]]


class GPT2Source(TinySource):
    def __init__(self, seed: int = 0) -> None:
        self.model = gpt2(seed).double()


@pytest.mark.parametrize("kind", [DAPOModule, PPOModule])
@pytest.mark.parametrize("micro_batch_tokens", [20, 10_000])
def test_sharing_changes_nothing_of_what_is_learned(kind: Any, micro_batch_tokens: int) -> None:
    """Policy, critic and a reference that is another policy, in float64; plain gradient descent magnifies nothing."""
    ends: list[dict[str, Tensor]] = []
    for shared in (False, True):
        module = kind(
            GPT2Source(),
            kl=ReferenceKL(0.1, policy=GPT2Source(seed=1)),  # type: ignore[arg-type]
            regularizer=InformationBottleneck(0.2),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
            **({"critic_optimizer": lambda p: torch.optim.SGD(p, lr=0.05)} if kind is PPOModule else {}),
            mini_batch_prompts=2,
            micro_batch_tokens=micro_batch_tokens,
            policy_options=PolicyOptions(share_prompts=shared),
        )
        _, recorder = fit(module, rollouts(2))
        assert module.policy.shares_prompts is shared
        assert not recorder.unchanged(0, 2, "policy.")
        ends.append(recorder.weights[-1])
    for name, plain in ends[0].items():
        torch.testing.assert_close(ends[1][name], plain, rtol=1e-9, atol=1e-11)


# On ranks.


def _check_ranks(folder: str) -> None:
    sharding = meet()
    options = PolicyOptions(dtype="float64")  # type: ignore[arg-type]
    sharded = build_policy(source_of(folder, options), options, sharding)  # type: ignore[arg-type]
    assert sharded.shares_prompts
    plain = Policy(gpt2().double(), share_prompts=False)
    rank = sharding.mesh["data_parallel"].get_local_rank()
    (objective(sharded, [0, 2, 3, 5][2 * rank :][:2]) * 2).backward()
    objective(plain, [0, 2, 3, 5]).backward()
    for (name, ours), theirs in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(full_tensor(ours.grad), theirs.grad, rtol=0, atol=1e-12, msg=name)


def test_two_fsdp2_ranks_share_the_prompts_of_their_rows(tmp_path: Any) -> None:
    gpt2().save_pretrained(tmp_path / "model")
    on_ranks(2, _check_ranks, str(tmp_path / "model"), folder=tmp_path)


# Where it is not exact.


class Leaking(nn.Module):
    """A block that mixes a token with its neighbour in memory, whoever that is."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, states: Tensor, *args: Any, **options: Any) -> Any:
        mixed = states + 0.1 * nn.functional.pad(states, (0, 0, 1, 0))[:, :-1]
        return self.block(mixed, *args, **options)


class Forgetful(Leaking):
    """A block whose gradient ends in a batch of one row."""

    def forward(self, states: Tensor, *args: Any, **options: Any) -> Any:
        return self.block(states.detach() if len(states) == 1 else states, *args, **options)


@pytest.mark.parametrize(("wrapper", "reason"), [(Leaking, "hidden states differ"), (Forgetful, "gradients differ")])
def test_a_model_that_would_be_wrong_is_run_as_before(
    wrapper: type[Leaking], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = qwen2().double()
    model.model.layers[1] = wrapper(model.model.layers[1])
    policy = Policy(model)
    with caplog.at_level(logging.INFO):
        assert not policy.shares_prompts
        computed = values_and_gradients(policy, sequences())
        assert not policy.shares_prompts
    expected = values_and_gradients(Policy(model, share_prompts=False), sequences())
    assert all(torch.equal(one, other) for one, other in zip(computed, expected, strict=True))
    [said] = [record.getMessage() for record in caplog.records if "once per response" in record.getMessage()]
    assert said.startswith("Qwen2ForCausalLM: ")
    assert reason in said
    assert "\n" not in said


def test_a_forward_pass_does_not_try_by_itself() -> None:
    """Within one, a sharded network would give its gathered weights back."""
    policy = Policy(gpt2())
    policy(sequences(), temperature=1.0)
    assert policy._shares_prompts is None


def test_float64_that_is_rounded_to_float32_is_not_exact(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert not Policy(qwen2().double()).shares_prompts
    assert "gradients differ by" in caplog.text


def compiled(model: Any) -> Any:
    model.model.layers[0].compile(backend="eager")
    return model


OBSTACLES: dict[str, tuple[Callable[[], Any], str]] = {
    "attention of its own": (lambda: BloomForCausalLM(BloomConfig(vocab_size=23, hidden_size=16, n_head=2)), "exchang"),
    "compiled": (lambda: compiled(qwen2()), "compiled"),
    "flash": (lambda: _named(qwen2(), "flash_attention_2"), "flash_attention_2"),
    "chunks": (lambda: _with(qwen2(), attention_chunk_size=4), "chunks"),
    "a window that no layer asks for": (lambda: _with(qwen2(), sliding_window=9), "how far it sees"),
    "no model of transformers": (lambda: nn.Linear(2, 2), "no model of transformers"),
}


def _named(model: Any, attention: str) -> Any:
    model.config._attn_implementation = attention
    return model


def _with(model: Any, **settings: Any) -> Any:
    for name, value in settings.items():
        setattr(model.config, name, value)
    return model


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_stands_in_the_way_is_named(obstacle: str, caplog: pytest.LogCaptureFixture) -> None:
    build, reason = OBSTACLES[obstacle]
    policy = Policy(build())
    policy._evaluated = []
    with caplog.at_level(logging.INFO):
        assert not policy.shares_prompts
    assert reason in caplog.text


def test_sharing_is_off_on_request_and_with_packing() -> None:
    assert not Policy(qwen2(), share_prompts=False).shares_prompts
    assert not Policy(qwen2(), packing=True).shares_prompts
    module = DAPOModule(TinySource(), policy_options=PolicyOptions(share_prompts=False))
    module.configure_model()
    assert not module.policy.shares_prompts
