"""Packed micro-batches: one row without padding, exact or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, BloomForTokenClassification, OPTForCausalLM

from helpers.gradients import values_and_gradients
from helpers.heads import LINEAR
from helpers.models import TinyOPT, TinyQwen2, TinySource, gpt2, gpt2_critic, qwen2, qwen2_critic
from helpers.rollouts import PROMPTS, RESPONSES, TEMPERATURE, padded_further, reference_scores, rollouts, sequences
from helpers.updates import fit, ppo
from ibro_lightning.cli.main import main
from ibro_lightning.errors import ConfigError
from ibro_lightning.models import Critic, Policy, PolicyOptions, Qwen2FromScratch, export_folder
from ibro_lightning.modules import DAPOModule, PPOModule
from ibro_lightning.regularizers import InformationBottleneck
from ibro_lightning.tasks import NumberPath
from ibro_lightning.update import ReferenceKL
from ibro_lightning.update.micro_batches import token_budget_batches

torch.set_num_threads(1)


def assert_packed_is_padded(packed: Any, padded: Any) -> None:
    """Values to 1e-9; gradients to the float32 in which these models compute norms and rotary embeddings."""
    for some in (sequences(), padded_further(sequences("left"), 2, 1)):
        actual, expected = values_and_gradients(packed, some), values_and_gradients(padded, some)
        count = len(expected) - len(list(padded.parameters()))
        for one, other in zip(actual[:count], expected[:count], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        for one, other in zip(actual[count:], expected[count:], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6 * other.abs().max().item())


# Exact.


@pytest.mark.parametrize("fused_head", [True, False])
@pytest.mark.parametrize("name", ["qwen2, tied", "gpt2, tied", "llama, untied", "cohere, scaled up", "phi, bias"])
def test_a_packed_policy_scores_like_a_padded_one(name: str, fused_head: bool) -> None:
    model = LINEAR[name]().double()
    packed = Policy(model, packing=True, fused_head=fused_head)
    packed.check_packing()
    assert_packed_is_padded(packed, Policy(model, fused_head=fused_head))


@pytest.mark.parametrize("build", [qwen2, gpt2])
def test_packed_scores_are_those_of_each_sequence_on_its_own(build: Callable[[], Any]) -> None:
    policy = Policy(build().double(), packing=True)
    logp, _ = policy(sequences(), temperature=TEMPERATURE)
    for row, (expected, _) in enumerate(reference_scores(policy.model, TEMPERATURE)):
        torch.testing.assert_close(logp[row, : len(expected)].detach(), torch.tensor(expected), rtol=1e-9, atol=1e-9)
        assert (logp[row, len(expected) :] == 0).all()


@pytest.mark.parametrize("build", [qwen2_critic, gpt2_critic])
def test_a_packed_critic_values_like_a_padded_one(build: Callable[[], Any]) -> None:
    """The state after a row's last token is followed by another row's first, which it must not be taken for."""
    model = build()
    packed = Critic(model, packing=True)
    packed.check_packing()
    assert_packed_is_padded(packed, Critic(model))


def test_a_packed_micro_batch_is_one_row_without_padding() -> None:
    policy = Policy(qwen2().double(), packing=True)
    policy(sequences(), temperature=1.0)  # the first time, it also tries its head
    seen: list[Any] = []
    policy.model.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    policy(sequences("left"), temperature=1.0)
    [inputs] = seen
    assert inputs["input_ids"].tolist() == [
        [token for prompt, response in zip(PROMPTS, RESPONSES, strict=True) for token in prompt + response]
    ]
    lengths = [len(prompt + response) for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    assert inputs["position_ids"].tolist() == [[place for length in lengths for place in range(length)]]
    assert inputs.get("attention_mask") is None, "with one, sequences see each other"


def test_packing_with_checkpointing_gives_the_same_gradients() -> None:
    model = qwen2().double()
    plain = values_and_gradients(Policy(model, packing=True), sequences())
    checkpointed = values_and_gradients(Policy(model, packing=True, gradient_checkpointing=True), sequences())
    for one, other in zip(checkpointed, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


# The token budget.


def test_packed_micro_batches_count_tokens_and_padded_ones_count_padding() -> None:
    lengths = [2, 3, 5, 10]
    assert [rows.tolist() for rows in token_budget_batches(lengths, 20, padded=False)] == [[0, 1, 2, 3]]
    assert [rows.tolist() for rows in token_budget_batches(lengths, 20)] == [[0, 1, 2], [3]]
    assert [rows.tolist() for rows in token_budget_batches(lengths, 10, padded=False)] == [[0, 1, 2], [3]]
    assert [rows.tolist() for rows in token_budget_batches(lengths, 10)] == [[0, 1], [2], [3]]


@pytest.mark.parametrize("packing", [True, False])
def test_a_module_counts_as_its_policy_runs(packing: bool) -> None:
    """56 tokens of at most 10 in a row."""
    module = DAPOModule(TinyQwen2(), policy_options=PolicyOptions(packing=packing), micro_batch_tokens=60)
    lengths = sequences().lengths.tolist()
    assert sum(lengths) <= 60 < len(lengths) * max(lengths)
    assert len(list(module.scorer.budget.micro_batches(sequences()))) == (1 if packing else 2)


# In training.


@pytest.mark.parametrize("kind", [DAPOModule, PPOModule])
@pytest.mark.parametrize("micro_batch_tokens", [20, 10_000])
def test_packing_changes_nothing_of_what_is_learned(kind: Any, micro_batch_tokens: int) -> None:
    """Policy, critic and a reference that is another policy, in float64; plain gradient descent magnifies nothing."""
    ends = []
    for packing in (False, True):
        module = kind(
            TinySource(),
            kl=ReferenceKL(0.1, policy=TinySource(seed=1)),  # type: ignore[arg-type]
            regularizer=InformationBottleneck(0.2),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
            **({"critic_optimizer": lambda p: torch.optim.SGD(p, lr=0.05)} if kind is PPOModule else {}),
            mini_batch_prompts=2,
            micro_batch_tokens=micro_batch_tokens,
            policy_options=PolicyOptions(packing=packing),
        )
        _, recorder = fit(module, rollouts(2))
        assert not recorder.unchanged(0, 2, "policy.")
        ends.append(recorder.weights[-1])
    for name, padded in ends[0].items():
        torch.testing.assert_close(ends[1][name], padded, rtol=1e-6, atol=1e-7)


def test_a_packed_run_from_the_command_line_learns_what_a_padded_one_does(workspace: Path) -> None:
    root = ["--trainer.max_epochs", "1", "--trainer.limit_val_batches", "0", "--trainer.default_root_dir"]
    sgd = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1"]
    main(["fit", "--config", "tiny.yaml", *sgd, *root, "padded"])
    main(["fit", "--config", "tiny.yaml", *sgd, *root, "packed", "--model.policy_options.packing", "true"])
    padded, packed = (load_file(workspace / run / "model" / "model.safetensors") for run in ("padded", "packed"))
    start = Qwen2FromScratch(NumberPath(size=12), hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1)
    before = start.build(PolicyOptions()).state_dict()
    assert (packed["model.norm.weight"] - before["model.norm.weight"]).abs().max() > 1e-3
    for name in padded:
        torch.testing.assert_close(packed[name], padded[name], rtol=1e-4, atol=1e-5)


# Refused.


class OPTSource(TinyQwen2):
    """OPT's positions are its own business, and its attention takes a packed row for one sequence."""

    def __init__(self, dtype: torch.dtype = torch.float64, **overrides: Any) -> None:
        config = TinyOPT().model.config
        config.init_std = 0.4
        for name, value in overrides.items():
            setattr(config, name, value)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = OPTForCausalLM(config).to(dtype)


def test_this_model_is_here_because_packed_it_is_wrong() -> None:
    """By whole nats. Whoever mends OPT's attention will hear of it here."""
    model = OPTSource().model
    packed, _ = Policy(model, packing=True)(sequences(), temperature=1.0)
    padded, _ = Policy(model)(sequences(), temperature=1.0)
    assert (packed - padded).abs().max() > 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sequences_that_would_see_each_other_are_refused(dtype: torch.dtype) -> None:
    policy = Policy(OPTSource(dtype).model, packing=True)
    with pytest.raises(ConfigError, match=r"^policy_options\.packing: True - .*see each other .*write false"):
        policy.check_packing()
    Policy(policy.model).check_packing()  # nobody wants to pack


def test_sequences_that_would_see_each_other_are_refused_in_bfloat16() -> None:
    source = OPTSource()
    source.model.config.init_std = 0.02
    model = OPTForCausalLM(source.model.config).bfloat16()
    with pytest.raises(ConfigError, match=r"see each other"):
        Policy(model, packing=True).check_packing()


@pytest.mark.parametrize("build", [qwen2, gpt2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sequences_that_do_not_are_accepted_in_every_precision(build: Callable[..., Any], dtype: torch.dtype) -> None:
    for seed in range(3):
        Policy(build(seed).to(dtype), packing=True).check_packing()


def test_a_model_that_cannot_run_a_packed_row_is_refused_too() -> None:
    class NoPositions(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = qwen2(), qwen2().config

        def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> Any:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask)

    with pytest.raises(ConfigError, match=r"^policy_options\.packing: True - .*cannot run .*write false"):
        Policy(NoPositions(), packing=True).check_packing()


def test_a_critic_is_checked_like_a_policy() -> None:
    """Bloom's attention is biased by distance over the whole row."""
    config = BloomConfig(vocab_size=23, hidden_size=16, n_layer=2, n_head=2, num_labels=1, initializer_range=0.4)
    critic = Critic(BloomForTokenClassification(config).double(), packing=True)
    with pytest.raises(ConfigError, match=r"^policy_options\.packing: True"):
        critic.check_packing()


def test_a_critic_of_another_kind_than_the_policy_is_checked_before_training() -> None:
    config = BloomConfig(vocab_size=23, hidden_size=16, n_layer=2, n_head=2, num_labels=1, initializer_range=0.4)

    class WithBloom(TinySource):
        def build_critic(self, options: PolicyOptions) -> Any:
            return BloomForTokenClassification(config).double()

    module = PPOModule(WithBloom(), policy_options=PolicyOptions(packing=True))
    with pytest.raises(ConfigError, match=r"packing"):
        fit(module, rollouts(1))


def test_a_reference_of_another_kind_than_the_policy_is_checked_before_training() -> None:
    kl = ReferenceKL(0.1, policy=OPTSource())  # type: ignore[arg-type]
    module = DAPOModule(TinySource(), kl=kl, policy_options=PolicyOptions(packing=True))
    with pytest.raises(ConfigError, match=r"packing"):
        fit(module, rollouts(1))


def test_a_run_that_would_pack_wrongly_stops_before_its_first_rollout(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = NumberPath(size=12)
    tokenizer = task.tokenizer()
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    source = OPTSource(torch.float32, vocab_size=len(tokenizer), **ends)
    export_folder(source.model, tokenizer, workspace / "opt")
    arguments = ["fit", "--config", "tiny.yaml", "--model.policy", "opt", "--trainer.max_epochs", "1"]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--model.policy_options.packing", "true"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "error: model.policy_options.packing: True - " in error
    assert "Traceback" not in error
    assert not (workspace / "run").exists(), "neither a rollout nor an evaluation"
    main([*arguments, "--trainer.limit_val_batches", "0"])  # it is the packing, and nothing else
    assert (workspace / "run" / "model").exists()


def test_packing_works_with_attention_that_only_runs_under_autocast(half_only_attention: str) -> None:
    source = TinySource(torch.float32, attn_implementation=half_only_attention)
    module = DAPOModule(source, policy_options=PolicyOptions(packing=True, fused_head=False))
    fit(module, rollouts(1), precision="bf16-mixed")


def test_nothing_is_checked_where_nothing_is_packed() -> None:
    module = ppo()
    calls: list[int] = []
    module.policy.model.register_forward_hook(lambda *_: calls.append(1))
    module.on_fit_start()
    assert not calls


@pytest.mark.parametrize("mixed", [True, False])
def test_a_slight_contamination_is_found_in_half_precision(mixed: bool) -> None:
    """Bloom with transformers' initialisation: packed and alone differ by 1 %, as little as rounding in bfloat16."""
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4))
    policy = Policy(model if mixed else model.bfloat16(), packing=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed), pytest.raises(ConfigError, match="see each other"):
        policy.check_packing()
