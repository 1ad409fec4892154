"""A policy throws no dice: what draws random numbers in training is switched off, or refused by name."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.models import qwen2
from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.engines import HFEngine
from ibro_lightning.errors import ConfigError
from ibro_lightning.models import Policy
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.models.transformer import accepted_arguments
from ibro_lightning.types import SamplingParams

torch.set_num_threads(1)

SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MORE = {
    "intermediate_size": 48,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 16,
}
PROMPTS, SEEDS = [[5, 9, 11], [7], [1, 2, 3, 4, 5, 6]], [[1, 2], [3, 4], [5, 6]]
NOISY: dict[str, tuple[dict[str, Any], str]] = {
    "mixtral": (dict(router_jitter_noise=0.3, **MORE), "MixtralSparseMoeBlock (model.layers.0.mlp and another)"),
    "phimoe": (MORE, "PhimoeTopKRouter (model.layers.0.mlp.router and another)"),
    "opt": ({"layerdrop": 0.1, "ffn_dim": 48, "word_embed_proj_dim": 32}, "OPTDecoder (model.decoder)"),
}


def model_of(kind: str, settings: dict[str, Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        config = AutoConfig.for_model(kind, **SIZES, **special, max_position_embeddings=64, **settings)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
    return model


def sequences() -> Sequences:
    return Sequences.collate(PROMPTS, [[8, 2, 3], [4, 4, 4, 4], [9]])


@pytest.mark.parametrize("kind", NOISY)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_draws_in_training_is_off_and_said_so(kind: str, checkpointing: bool) -> None:
    """Log-probs and gradients are those of evaluation, whatever the seed; also after Lightning has switched modes."""
    settings, named = NOISY[kind]
    model = model_of(kind, settings)
    evaluated, _ = Policy(copy.deepcopy(model)).eval()(sequences(), temperature=1.0)
    policy = Policy(model, gradient_checkpointing=checkpointing)
    with pytest.warns(UserWarning, match="draws random numbers in training") as caught:
        policy.ensure_deterministic()
    assert named in str(caught[0].message)
    gradients = []
    for seed in range(4):
        torch.manual_seed(seed)
        policy.zero_grad()
        logp, _ = policy(sequences(), temperature=1.0)
        torch.testing.assert_close(logp.detach(), evaluated, atol=1e-5, rtol=0)
        logp.sum().backward()
        gradients.append([p.grad.clone() for p in policy.parameters() if p.grad is not None])
        policy.eval()
        policy.train()
    assert policy.training
    assert all(torch.equal(one, other) for some in gradients for one, other in zip(some, gradients[0], strict=True))


def test_engine_and_trainer_agree_in_spite_of_jitter() -> None:
    model = model_of("mixtral", NOISY["mixtral"][0])
    engine = HFEngine()
    engine.setup(ModelSpec(model.config, (3,), torch.device("cpu")))
    engine.load_weights(model.state_dict().items())
    generated = engine.generate(PROMPTS, SamplingParams(max_tokens=8), SEEDS)
    rows = [(prompt, sample) for prompt, samples in zip(PROMPTS, generated, strict=True) for sample in samples]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = Sequences.collate([prompt for prompt, _ in rows], [sample.token_ids for _, sample in rows])
        logp, _ = Policy(model)(batch, temperature=1.0)
    for row, (_, sample) in zip(logp, rows, strict=True):
        torch.testing.assert_close(row[: len(sample.logp)], torch.tensor(sample.logp), atol=1e-4, rtol=0)


class Dice(nn.Module):
    """Adds noise from one of the places where random numbers come from."""

    def __init__(self, inner: nn.Module, source: str, always: bool) -> None:
        super().__init__()
        self.inner, self.source, self.always = inner, source, always
        self.generator = torch.Generator()

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.inner(hidden)
        if not (self.always or self.training):
            return hidden
        if self.source == "its own":
            return hidden + 0.1 * torch.randn(hidden.shape, generator=self.generator)
        draw = {"torch": lambda: torch.rand(()).item(), "python": random.random, "numpy": np.random.rand}[self.source]()
        return hidden * (1 + (draw if self.source != "python" else float(draw < 0.2)))  # the latter hits rarely


def with_dice(source: str, always: bool) -> Any:
    model = qwen2()
    model.model.layers[1].mlp = Dice(model.model.layers[1].mlp, source, always)
    return model


@pytest.mark.parametrize("source", ["torch", "python", "numpy", "its own"])
def test_the_module_that_draws_is_found_wherever_its_numbers_come_from(source: str) -> None:
    policy = Policy(with_dice(source, always=False))
    with pytest.warns(UserWarning, match=r"Dice \(model\.layers\.1\.mlp\) draws"):
        policy.ensure_deterministic()
    awake = [name for name, module in policy.model.named_modules() if not module.training]
    assert awake == ["model.layers.1.mlp"]


@pytest.mark.filterwarnings("ignore:.*draws random numbers")
@pytest.mark.parametrize("source", ["torch", "python", "numpy", "its own"])
def test_what_draws_in_evaluation_as_well_is_refused_by_name(source: str) -> None:
    policy = Policy(with_dice(source, always=True))
    with pytest.raises(ConfigError, match=r"^policy: 'Qwen2ForCausalLM' .*Dice \(model\.layers\.1\.mlp\)") as caught:
        policy.ensure_deterministic()
    assert "\n" not in str(caught.value)


def test_most_models_are_left_as_they_are() -> None:
    policy = Policy(qwen2(attention_dropout=0.5))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.ensure_deterministic()
    assert all(module.training for module in policy.modules())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_the_trial_takes_two_passes_and_queues_nothing_for_a_gpu() -> None:
    """Where CUDA is not initialised, ``torch.manual_seed`` keeps the formatted stack of each call for when it is."""
    policy, passes = Policy(qwen2()), list[bool]()
    policy.model.register_forward_pre_hook(lambda *_: passes.append(True))
    queued = len(torch.cuda._queued_calls)
    policy.ensure_deterministic()
    assert len(passes) == 2
    assert len(torch.cuda._queued_calls) == queued


def test_a_wrapper_around_one_models_forward_pass_is_asked_itself() -> None:
    """Its class's, which has been asked before, takes more."""
    model = qwen2()
    assert "position_ids" in accepted_arguments(model)
    model.forward = lambda input_ids, attention_mask: None
    assert accepted_arguments(model) == {"input_ids", "attention_mask"}
    assert "position_ids" in accepted_arguments(qwen2())


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_for_what_it_is(name: str, value: float) -> None:
    model = qwen2(tie_word_embeddings=False)
    model.get_parameter(name).data.view(-1)[-1] = value
    with pytest.raises(ConfigError, match=rf"its weight {name} holds (NaN|infinity)") as caught:
        Policy(model).ensure_deterministic()
    assert "\n" not in str(caught.value)


class Counter(nn.Module):
    """Adds how often it was called, which is no random number."""

    def __init__(self, inner: nn.Module, always: bool) -> None:
        super().__init__()
        self.inner, self.always, self.calls = inner, always, 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(hidden) * (1 + self.calls * (self.always or self.training))


def test_a_module_that_counts_is_not_said_to_draw_random_numbers() -> None:
    model = qwen2()
    model.model.layers[1].mlp = Counter(model.model.layers[1].mlp, always=False)
    with pytest.warns(UserWarning, match=r"Counter \(model\.layers\.1\.mlp\) gives other results for the same input"):
        Policy(model).ensure_deterministic()
    model.model.layers[1].mlp.always = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is called off that stays on
        with pytest.raises(
            ConfigError, match=r"changes from one run to the next.*Counter \(model\.layers\.1\.mlp\) gives other"
        ):
            Policy(model.train()).ensure_deterministic()
