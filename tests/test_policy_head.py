"""The policy without its logits: whatever the head, the values and gradients are those of full logits."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from helpers.heads import LINEAR, tiny
from helpers.models import qwen2
from helpers.rollouts import PROMPTS, RESPONSES, TEMPERATURE, sequences
from helpers.updates import assert_same
from ibro_lightning.models import Policy
from ibro_lightning.models.head import find_linear_head

torch.set_num_threads(1)


SCALES = {
    "cohere, scaled up": 1.5,
    "cohere, as published": 0.0625,
    "granite, divided by 6": 1 / 6,
    "granite, multiplied by 3": 3.0,
}


def silent() -> warnings.catch_warnings[None]:
    """Within it, a warning is an error: nothing fell back to full logits."""
    return warnings.catch_warnings(action="error")


def scores_and_gradients(policy: Policy, **options: Any) -> list[Tensor]:
    """Log-probs and entropies, and every parameter's gradient of a sum that weighs all tokens differently."""
    logp, entropy = policy(sequences("left"), temperature=TEMPERATURE, **options)
    weights = torch.randn(2, *logp.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    total = (weights[0] * logp).sum()
    values = [logp.detach()]
    if entropy is not None:
        total = total + (weights[1] * entropy).sum()
        values.append(entropy.detach())
    return values + list(torch.autograd.grad(total, list(policy.parameters())))


def test_the_models_do_have_the_heads_that_they_are_here_for() -> None:
    heads = {name: build().get_output_embeddings() for name, build in LINEAR.items()}
    assert {name for name, head in heads.items() if head.bias is not None} == {"gptj, bias", "phi, bias"}
    for name, build in LINEAR.items():
        model = build()
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert tied == (", tied" in name or "cohere" in name), name


# Equal to full logits.


@pytest.mark.parametrize("name", LINEAR)
def test_without_logits_values_and_all_gradients_are_the_same(name: str) -> None:
    model = LINEAR[name]().double()
    with silent():
        fused = scores_and_gradients(Policy(model))
    full = scores_and_gradients(Policy(model, fused_head=False))
    assert len(fused) == 2 + len(list(model.parameters()))
    assert fused[0].dtype == fused[1].dtype == torch.float64
    # Norms in these models are computed in float32, and so are gradients on their way through them.
    assert_same(fused[:2], full[:2])
    for one, other in zip(fused[2:], full[2:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6 * other.abs().max().item())


@pytest.mark.parametrize("name", LINEAR)
def test_the_head_is_found_with_its_factor_and_is_the_models_own(name: str) -> None:
    model = Policy(LINEAR[name]().double()).model
    with silent():
        head = find_linear_head(model)
    assert head is not None
    assert head.linear is model.get_output_embeddings()
    assert head.backbone is model.base_model
    assert head.scale == pytest.approx(SCALES.get(name, 1.0), rel=1e-12)
    assert name in SCALES or head.scale == 1.0


@pytest.mark.parametrize("name", LINEAR)
def test_log_probs_are_those_of_the_models_own_logits(name: str) -> None:
    """One unpadded sequence at a time, from what the model itself calls its logits."""
    policy = Policy(LINEAR[name]())
    with torch.no_grad():
        logp, entropy = policy(sequences(), temperature=TEMPERATURE)
        for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            logits = policy.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
            expected = logits.log_softmax(-1)
            chosen = expected.gather(1, torch.tensor(response)[:, None])[:, 0]
            torch.testing.assert_close(logp[row, : len(response)], chosen, rtol=1e-4, atol=1e-4)
            of_entropy = -(expected.exp() * expected).sum(-1)
            torch.testing.assert_close(entropy[row, : len(response)], of_entropy, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2, tied", "granite, divided by 6"])
def test_the_policy_follows_its_weights(name: str) -> None:
    """The head is looked for once; what it holds is the layer and not a copy of its weights."""
    model = LINEAR[name]().double()
    policy = Policy(model)
    before, _ = policy(sequences(), temperature=1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    after, _ = policy(sequences(), temperature=1.0)
    assert (after - before).abs().max() > 0.01
    full, _ = Policy(model, fused_head=False)(sequences(), temperature=1.0)
    torch.testing.assert_close(after, full, rtol=1e-9, atol=1e-12)


def test_the_models_head_never_runs_again_once_it_has_been_tried() -> None:
    """Which is what saves the memory."""
    policy = Policy(qwen2().double())
    policy(sequences(), temperature=1.0)
    calls: list[int] = []
    policy.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    logp, entropy = policy(sequences(), temperature=1.0)
    (logp + entropy).sum().backward()
    assert not calls
    Policy(policy.model, fused_head=False)(sequences(), temperature=1.0)
    assert calls


@pytest.mark.parametrize("fused_head", [True, False])
def test_entropy_is_left_out_on_request_and_log_probs_do_not_change(fused_head: bool) -> None:
    policy = Policy(qwen2().double(), fused_head=fused_head)
    expected, _ = policy(sequences(), temperature=TEMPERATURE)
    logp, entropy = policy(sequences(), temperature=TEMPERATURE, with_entropy=False)
    assert entropy is None
    torch.testing.assert_close(logp, expected, rtol=1e-12, atol=0)
    fused = scores_and_gradients(policy, with_entropy=False)
    assert_same(fused, scores_and_gradients(Policy(policy.model, fused_head=False), with_entropy=False))


@pytest.mark.parametrize("name", ["qwen2, tied", "gpt2, untied", "phi, bias"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    plain = scores_and_gradients(Policy(LINEAR[name]().double()))
    policy = Policy(LINEAR[name]().double(), gradient_checkpointing=True)
    with silent():
        assert_same(scores_and_gradients(policy), plain)
    assert policy.model.is_gradient_checkpointing


# Heads that are more than a linear layer.


def test_soft_capped_logits_are_computed_in_full_and_said_once_per_policy() -> None:
    """Gemma 2 squeezes its logits through a tanh, which no factor can undo."""
    model = tiny(Gemma2Config, Gemma2ForCausalLM, head_dim=8, final_logit_softcapping=3.0).double()
    for _ in range(2):
        policy = Policy(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            capped = scores_and_gradients(policy)
            scores_and_gradients(policy)
            policy(sequences(), temperature=1.0)
        assert len(caught) == 1
        assert "Gemma2ForCausalLM: its logits are soft-capped (final_logit_softcapping)" in str(caught[0].message)
    with silent():
        assert_same(scores_and_gradients(Policy(model, fused_head=False)), capped)
    logits = model(torch.tensor([PROMPTS[0] + RESPONSES[0]])).logits
    assert logits.abs().max() <= 3
    plain = tiny(Gemma2Config, Gemma2ForCausalLM, head_dim=8, final_logit_softcapping=None).double()
    with silent():
        assert (scores_and_gradients(Policy(plain))[0] - capped[0]).abs().max() > 0.1


def test_small_capped_logits_are_not_taken_for_plain_ones() -> None:
    """So small that the cap hides within rounding, as in a model before training: it is found by its name."""
    model = tiny(Gemma2Config, Gemma2ForCausalLM, head_dim=8, initializer_range=1e-4)
    with pytest.warns(UserWarning, match="soft-capped"):
        assert find_linear_head(model) is None


class Adjusted(nn.Module):
    """A language model around another one that does something to its logits."""

    def __init__(self, model: Any, adjust: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.base_model, self.lm_head, self.config, self._adjust = model.model, model.lm_head, model.config, adjust

    def get_output_embeddings(self) -> Any:
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Any = None, use_cache: bool = False) -> Any:
        hidden = self.base_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return SimpleNamespace(logits=self._adjust(self.lm_head(hidden)))


def forbid_a_token(logits: Tensor) -> Tensor:
    return logits - 4.0 * torch.nn.functional.one_hot(torch.tensor(5), logits.shape[-1])


ADJUSTMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a soft cap": lambda logits: 30 * torch.tanh(logits / 30),
    "one token less likely": forbid_a_token,
    "turned over": lambda logits: -logits,
    "normalised": lambda logits: logits.log_softmax(-1),
}


@pytest.mark.parametrize("name", ADJUSTMENTS)
def test_a_head_that_does_more_is_found_out_by_trying(name: str) -> None:
    model = Adjusted(qwen2().double(), ADJUSTMENTS[name])
    policy = Policy(model)
    with pytest.warns(UserWarning, match="Adjusted: its logits are not a multiple of its head's output"):
        logp, _ = policy(sequences(), temperature=TEMPERATURE)
    logits = model(torch.tensor([PROMPTS[3] + RESPONSES[3]])).logits[0, len(PROMPTS[3]) - 1 : -1] / TEMPERATURE
    expected = logits.log_softmax(-1).gather(1, torch.tensor(RESPONSES[3])[:, None])[:, 0]
    torch.testing.assert_close(logp[3, : len(expected)], expected, rtol=1e-9, atol=1e-9)


def test_a_wrapper_that_changes_nothing_is_trusted() -> None:
    """The tests above do not pass because of the wrapper."""
    with silent():
        assert find_linear_head(Adjusted(qwen2().double(), lambda logits: logits)) is not None


class Bigrams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(23, 23, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


def test_a_module_that_is_no_transformers_model_falls_back() -> None:
    policy = Policy(Bigrams())
    with pytest.warns(UserWarning, match="Bigrams: its head is not a plain linear layer"):
        logp, _ = policy(sequences(), temperature=1.0)
    before = [PROMPTS[0][-1], *RESPONSES[0][:-1]]
    expected = policy.model.table[before].log_softmax(-1)[range(2), RESPONSES[0]]
    torch.testing.assert_close(logp[0, :2], expected)


def test_a_head_of_a_class_of_its_own_falls_back() -> None:
    """A LoRA layer is a Linear in name, and adds to its output."""

    class Lora(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden) + hidden.sum(-1, keepdim=True)

    model = qwen2(tie_word_embeddings=False)
    lora = Lora(16, 23, bias=False)
    lora.weight = model.lm_head.weight
    model.lm_head = lora
    with pytest.warns(UserWarning, match="its head is not a plain linear layer"):
        assert find_linear_head(model) is None


def test_an_adapter_around_a_language_model_falls_back() -> None:
    class Adapter(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.base_model, self.config = model, model.config

        def get_output_embeddings(self) -> Any:
            return self.base_model.get_output_embeddings()

        def forward(self, input_ids: Tensor, attention_mask: Any = None, use_cache: bool = False) -> Any:
            return self.base_model(input_ids=input_ids, attention_mask=attention_mask)

    with warnings.catch_warnings(record=True) as caught:
        Policy(Adapter(qwen2()))(sequences(), temperature=1.0)
    assert len(caught) == 1


@pytest.mark.parametrize(
    "adjust",
    [
        lambda logits: 5 * torch.tanh(logits / 5),
        lambda logits: logits - torch.nn.functional.one_hot(torch.tensor(5), logits.shape[-1]),
    ],
)
def test_a_head_that_does_more_is_found_out_in_bfloat16(adjust: Callable[[Tensor], Tensor]) -> None:
    with pytest.warns(UserWarning, match="not a multiple"):
        assert find_linear_head(Adjusted(qwen2().bfloat16(), adjust)) is None


def test_a_soft_cap_by_another_name_is_found() -> None:
    model = tiny(RecurrentGemmaConfig, RecurrentGemmaForCausalLM, num_hidden_layers=3, logits_soft_cap=30.0).bfloat16()
    with pytest.warns(UserWarning, match="full logits"):
        assert find_linear_head(model) is None


def test_a_scaled_head_is_recognised_under_mixed_precision() -> None:
    """The factor is the weights' business: bfloat16 logits divided by 6 would only be near a multiple."""
    model = Policy(LINEAR["granite, divided by 6"]()).model
    with torch.autocast("cpu", torch.bfloat16), silent():
        head = find_linear_head(model)
    assert head is not None
    assert head.scale == pytest.approx(1 / 6, rel=1e-6)


def test_the_probe_works_with_attention_that_only_runs_under_autocast(half_only_attention: str) -> None:
    policy = Policy(qwen2(attn_implementation=half_only_attention))
    with torch.autocast("cpu", torch.bfloat16):
        Policy(policy.model, fused_head=False)(sequences(), temperature=1.0)
        policy(sequences(), temperature=1.0)


# Trying leaves no trace.


@pytest.mark.parametrize("name", ["qwen2, tied", "gpt2, tied", "granite, divided by 6"])
@pytest.mark.parametrize("train", [True, False])
def test_trying_the_head_leaves_no_trace(name: str, train: bool) -> None:
    """On randomness, gradients, modes, parameters and what is saved."""
    model = LINEAR[name]()
    policy = Policy(model)
    model.train(train)
    model.get_input_embeddings().requires_grad_(False)
    parameters = dict(policy.named_parameters())
    for index, parameter in enumerate(parameters.values()):
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, float(index))
    before = (
        torch.get_rng_state(),
        {key: value.clone() for key, value in policy.state_dict().items()},
        [module.training for module in policy.modules()],
        [(key, p.requires_grad, None if p.grad is None else p.grad.clone()) for key, p in parameters.items()],
    )
    with silent():
        assert find_linear_head(model) is not None
        with torch.no_grad():
            policy(sequences(), temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert policy.state_dict().keys() == before[1].keys()
    assert all(torch.equal(value, before[1][key]) for key, value in policy.state_dict().items())
    assert [module.training for module in policy.modules()] == before[2]
    assert dict(policy.named_parameters()).keys() == parameters.keys()
    for key, wanted, gradient in before[3]:
        assert parameters[key].requires_grad == wanted
        if gradient is None:
            assert parameters[key].grad is None
        else:
            assert torch.equal(parameters[key].grad, gradient)
