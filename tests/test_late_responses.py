"""Responses that an engine's deadline cut off: counted, never trained on, and possibly without a single token."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from helpers.collecting import ScriptedEngine, build
from helpers.flat import span
from helpers.models import TinySource, gpt2, qwen2, qwen2_critic
from helpers.quick import slow_unless
from helpers.rollouts import LATE, make_rollout, with_late
from helpers.updates import (
    adamw,
    assert_same,
    begin_step,
    dapo,
    fit,
    micro_loss,
    ppo,
    scored_first,
    sgd,
    summed,
    value_loss,
)
from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.callbacks.metrics_log import rollout_metrics
from ibro_lightning.cli.main import main
from ibro_lightning.models import Critic, Policy
from ibro_lightning.modules import DAPOModule, PolicyModule, PPOModule
from ibro_lightning.regularizers import (
    SIREN,
    STEER,
    ClipCov,
    ConditionalEntropyShaping,
    EntropyBonus,
    EntropyShapedAdvantage,
    InformationBottleneck,
    MarginalEntropy,
    PassRateInformationBottleneck,
    PositionCentredInformationBottleneck,
)
from ibro_lightning.types import Generation, Group, RewardResult

torch.set_num_threads(1)
FULL = {1: 6, 4: 6, 5: 6}
"""The same rows, with all the tokens that they have."""

# The rollout.


def test_a_rollout_knows_its_late_responses() -> None:
    rollout = with_late()
    assert rollout.late.tolist() == [row in LATE for row in range(8)]
    assert not rollout.truncated.any(), "cut by the clock, not by the length limit"
    assert rollout.sequences.response_lengths.tolist() == [6, 0, 5, 4, 0, 1, 4, 2]
    assert rollout.sequences.pad().response_mask[1].tolist() == [False] * 6
    assert rollout.sampler_logp.shape == (22,)
    assert make_rollout().late.tolist() == [False] * 8
    assert [completion.late for completion in rollout.completions] == rollout.late.tolist()
    moved = rollout.to("cpu")
    assert torch.equal(moved.late, rollout.late)


def test_the_share_of_late_responses_is_in_the_curves() -> None:
    """Of all that were sampled, those that dynamic sampling dropped included."""
    rollout = with_late()
    metrics = rollout_metrics(rollout)
    assert metrics["rollout/late"] == 3 / 8
    assert metrics["rollout/truncated"] == 0
    assert metrics["rollout/length"] == (6 + 0 + 5 + 4 + 0 + 1 + 4 + 2) / 8
    completions = rollout.completions[:2]
    dropped = Group(rollout.prompts[0], completions, (RewardResult(0.0, {"accuracy": 0.0}),) * 2)
    assert rollout_metrics(replace(rollout, dropped=(dropped,)))["rollout/late"] == pytest.approx(4 / 10)
    assert rollout_metrics(make_rollout())["rollout/late"] == 0


class Hurried(ScriptedEngine):
    """Every fourth answer is cut off by the deadline: of each group the last one, before its first token."""

    def generate(self, prompts: Any, sampling: Any, seeds: Any) -> list[list[Generation]]:
        groups = super().generate(prompts, sampling, seeds)
        return [[*group[:3], Generation((), (), "deadline")] for group in groups]


def test_a_datamodule_takes_what_the_deadline_left(tokenizer: Any) -> None:
    rollout = build(tokenizer, engine=Hurried(tokenizer, [1, 2, 0])).next_rollout()
    assert rollout.late.tolist() == [False, False, False, True] * 3
    assert rollout.sequences.response_lengths.tolist() == [2, 2, 2, 0] * 3
    assert rollout.accuracy.tolist() == [1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0], "no answer is a wrong one"
    assert rollout.completions[3].text == ""
    assert rollout.metrics["rollout/generated_tokens"] == 18
    assert rollout_metrics(rollout)["rollout/late"] == 0.25


# No tokens at all.


@pytest.mark.parametrize("side", ["left", "right"])
def test_empty_responses_are_collated_and_selected(side: Any) -> None:
    both = Sequences.collate([[3, 1], [4]], [[], [5, 6]], padding_side=side)
    assert both.response_lengths.tolist() == [0, 2]
    assert both.response_mask.tolist() == [[False, False], [True, True]]
    assert both.is_response.sum().item() == 2
    alone = both.select(torch.tensor([0]))
    assert alone.input_ids.tolist() == [[3, 1]]
    assert alone.max_response_length == 0
    assert alone.response_mask.shape == (1, 0)


POLICIES = {
    "fused head": lambda: Policy(qwen2().double()),
    "full logits": lambda: Policy(qwen2().double(), fused_head=False),
    "gpt2": lambda: Policy(gpt2().double()),
    "packed": lambda: Policy(qwen2().double(), packing=True),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("with_entropy", [True, False])
def test_a_policy_scores_what_there_is(name: str, with_entropy: bool) -> None:
    """Empty rows beside others are 0; a batch of nothing else has no columns, and a gradient of 0."""
    policy = POLICIES[name]()
    score = partial(policy, temperature=0.8, with_entropy=with_entropy)
    rows = Sequences.collate([[3, 1, 4], [1, 5], [9, 2]], [[], [7, 2], []])
    together, entropy = score(rows)
    alone, _ = score(rows.select(torch.tensor([1])))
    if name != "packed":  # packed rows see each other in this attention; nothing but shapes is asked of it here
        torch.testing.assert_close(together[1], alone[0], rtol=1e-9, atol=1e-12)
    assert together.shape == (3, 2)
    assert (together[[0, 2]] == 0).all()
    assert (entropy is not None) == with_entropy
    nothing, entropy = score(rows.select(torch.tensor([0, 2])))
    assert nothing.shape == (2, 0)
    assert entropy is None or entropy.shape == (2, 0)
    nothing.sum().backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in policy.parameters())


def test_a_critic_values_the_state_in_which_nothing_was_written() -> None:
    critic = Critic(qwen2_critic())
    rows = Sequences.collate([[3, 1, 4], [1, 5]], [[], [7, 2]])
    values = critic(rows)
    assert values.shape == (2, 3)
    alone = critic(rows.select(torch.tensor([0])))
    assert alone.shape == (1, 1)
    torch.testing.assert_close(values[0, :1], alone[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("budget", [1, 12, 10_000])
@pytest.mark.parametrize("build", [dapo, ppo])
def test_scores_do_not_depend_on_the_token_budget(build: Any, budget: int) -> None:
    rollout = with_late()
    expected, found = (scored_first(build(micro_batch_tokens=n)).prepare(rollout) for n in (16384, budget))
    for name in ("old_logp", "old_entropy", "advantages"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-12)
    for name in expected.extra:
        torch.testing.assert_close(found.extra[name], expected.extra[name], rtol=1e-9, atol=1e-12)
    assert (found.micro_batch().old_logp[1] == 0).all()


# The loss.


def gradients(module: PolicyModule, experience: Any) -> list[list[Tensor]]:
    step = begin_step(module, experience)
    found = [
        summed(
            lambda micro: micro_loss(module, micro),
            [step.select(torch.tensor(rows)) for rows in ([0, 4, 7], [1], [2, 3, 5, 6])],
            list(module.policy.parameters()),
        )
    ]
    if isinstance(module, PPOModule):
        found.append(summed(partial(value_loss, module), [step], list(module.critic.parameters())))
    return found


@pytest.mark.parametrize(
    "aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
)
@pytest.mark.parametrize("rows", [LATE, FULL], ids=["cut", "all but finished"])
@pytest.mark.parametrize("build", [dapo, ppo])
def test_late_responses_are_masked(build: Any, rows: Any, aggregation: Any) -> None:
    """From the tokens of the loss and from its denominators; policy and critic alike, cut in any way. Advantages still
    compare with them."""
    options = {"aggregation": aggregation, "aggregation_max_tokens": 6, "regularizer": EntropyBonus(0.3)}
    module = scored_first(build(**options, **({"whiten_advantages": False} if build is ppo else {})))
    late, on_time = module.prepare(with_late(rows)), module.prepare(make_rollout())
    counts = torch.tensor([row not in rows for row in range(8)])
    assert torch.equal(late.mask, late.per_token(counts))
    kept = on_time.per_token(counts)
    advantages = late.advantages[late.mask]
    torch.testing.assert_close(advantages, on_time.advantages[kept], rtol=1e-9, atol=1e-12)
    expected = gradients(module, replace(on_time, mask=on_time.mask & kept))
    for found, others in zip(gradients(module, late), expected, strict=True):
        assert_same(found, others)
    unmasked = gradients(module, on_time)
    assert any(not torch.allclose(one, other) for one, other in zip(expected[0], unmasked[0], strict=True))


def test_late_and_overlong_responses_are_both_left_out() -> None:
    rollout = replace(with_late({1: 2}), truncated=torch.arange(8) == 3)
    for flag, out in ((False, {1}), (True, {1, 3})):
        experience = dapo(overlong_filter=flag).prepare(rollout)
        assert {row for row in range(8) if not experience.mask[span(experience.lengths, row)].any()} == out


REGULARIZERS = {
    "ib": lambda: InformationBottleneck(0.5),
    "ib noise": lambda: InformationBottleneck(0.5, noise=0.5),
    "marginal": lambda: MarginalEntropy(0.5),
    "bonus": lambda: EntropyBonus(0.3),
    "clip-cov": lambda: ClipCov(0.2, -100.0, 100.0),
    "shaped": lambda: EntropyShapedAdvantage(),
    "steer": lambda: STEER(0.3),
    "ces": lambda: ConditionalEntropyShaping(0.5),
    "siren": lambda: SIREN(0.5, fraction=0.5),
    "hard prompts": lambda: PassRateInformationBottleneck(0.5),
    "by position": lambda: PositionCentredInformationBottleneck(0.5),
}


def trained(kind: type[PolicyModule], rows: Mapping[int, int], **settings: Any) -> tuple[dict[str, Tensor], Any]:
    settings = {"optimizer": sgd, **settings}
    if issubclass(kind, PPOModule):
        settings["critic_optimizer"] = adamw(0.01)
    module = kind(TinySource(), **settings)
    _, recorder = fit(module, [with_late(rows, iteration=n) for n in (1, 2)])
    assert not recorder.unchanged(0, 1, "policy.")
    return recorder.weights[-1], recorder.metrics


# The quick tests have every method with DAPO in two steps, and one with PPO and in one step.
@pytest.mark.parametrize(
    ("kind", "name", "steps"),
    slow_unless(
        lambda case: case[1] == "ib" or case[::2] == (DAPOModule, 2),
        itertools.product((DAPOModule, PPOModule), REGULARIZERS, (1, 2)),
    ),
)
def test_what_a_late_response_said_before_it_was_cut_never_matters(
    kind: type[PolicyModule], name: str, steps: int
) -> None:
    """Nothing, two tokens, or all of it: the same weights, whatever the micro-batches, and no nan in any curve."""
    few = {"regularizer": REGULARIZERS[name](), "mini_batch_prompts": None if steps == 1 else 2}
    expected, _ = trained(kind, FULL, **few)
    for rows, budget in ((LATE, 1), (LATE, 20), (LATE, 10_000), ({1: 1, 4: 2, 5: 0}, 20)):
        found, metrics = trained(kind, rows, micro_batch_tokens=budget, **few)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-8, atol=1e-10, msg=key)
        for of_iteration in metrics:
            assert all(math.isfinite(value) for value in of_iteration.values())
            assert of_iteration["update/steps"] == steps
            assert of_iteration["update/skipped_steps"] == 0


@pytest.mark.parametrize("kind", [DAPOModule, PPOModule])
@pytest.mark.parametrize("prompts", [None, 1], ids=["one step", "four steps"])
@pytest.mark.parametrize("tokens", [0, 2])
def test_a_group_of_late_responses_alone_may_be_a_step(
    kind: type[PolicyModule], prompts: int | None, tokens: int
) -> None:
    """An optimizer step without a token of the loss: no gradient, and no nan."""
    late = {0: tokens, 1: tokens}  # the first group
    module = kind(TinySource(), optimizer=sgd, mini_batch_prompts=prompts, micro_batch_tokens=12)
    _, recorder = fit(module, [with_late(late, iteration=1)])
    assert not recorder.unchanged(0, 1, "policy.")
    assert all(math.isfinite(value) for value in recorder.metrics[0].values())


@pytest.mark.parametrize("kind", [DAPOModule, PPOModule])
@pytest.mark.parametrize("tokens", [0, 1])
def test_a_rollout_of_late_responses_alone_teaches_nothing(kind: type[PolicyModule], tokens: int) -> None:
    """A deadline far too short: the run goes on as it was, and the curves say why."""
    rollout = with_late(dict.fromkeys(range(8), tokens), iteration=1)
    assert rollout_metrics(rollout)["rollout/late"] == 1
    module = kind(TinySource(), optimizer=sgd, regularizer=EntropyBonus(0.3))
    _, recorder = fit(module, [rollout])
    assert recorder.unchanged(0, 1, "policy.")
    assert all(math.isfinite(value) for value in recorder.metrics[0].values())


def test_the_entropy_of_first_tokens_is_that_of_responses_that_have_one() -> None:
    rollout = with_late()
    module = scored_first(dapo())
    experience = module.prepare(rollout)
    metrics = module.experience_metrics(experience, rollout)
    have = rollout.sequences.response_lengths > 0
    expected = experience.micro_batch().old_entropy[have, 0].mean().item()
    assert metrics["policy/entropy_first_token"] == pytest.approx(expected, rel=1e-9)
    assert metrics["policy/entropy"] == pytest.approx(experience.old_entropy.mean().item(), rel=1e-9)


# Whole runs.

ENGINE = """
from __future__ import annotations

from collections.abc import Sequence

from ibro_lightning.engines import HFEngine
from ibro_lightning.types import Generation, SamplingParams


class Hurried(HFEngine):
    \"\"\"Cuts every third answer off, after none, one or two tokens; the check after a sync has all the time.\"\"\"

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[Sequence[int]]
    ) -> list[list[Generation]]:
        groups = super().generate(prompts, sampling, seeds)
        if sampling.max_tokens != 6:
            return groups
        return [[self.cut(one, seed) for one, seed in zip(*both)] for both in zip(groups, seeds)]

    def cut(self, one: Generation, seed: int) -> Generation:
        if seed % 3 or one.finish_reason == "stop":
            return one
        tokens = seed % 9 // 3
        return Generation(one.token_ids[:tokens], one.logp[:tokens], "deadline")
"""


@pytest.mark.parametrize(
    ("module", "steps"),
    slow_unless(
        {("DAPOModule", "2"), ("PPOModule", "null")}.__contains__,
        itertools.product(("DAPOModule", "PPOModule"), ("null", "2")),
    ),
)
def test_a_run_with_a_hurried_engine_goes_on(workspace: Path, module: str, steps: str) -> None:
    (workspace / "hurried_engine.py").write_text(ENGINE)
    recipe = (workspace / "tiny.yaml").read_text()
    assert recipe.count("class_path: DAPOModule") == 1
    (workspace / "tiny.yaml").write_text(recipe.replace("class_path: DAPOModule", f"class_path: {module}"))
    settings = ["--model.mini_batch_prompts", steps, "--model.micro_batch_tokens", "12", "--trainer.max_epochs", "3"]
    main(["fit", "--config", "tiny.yaml", "--data.engine", "hurried_engine.Hurried", *settings])
    events = EventAccumulator(str(workspace / "run"))
    events.Reload()
    curves = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert all(math.isfinite(value) for values in curves.values() for value in values)
    rollouts = pandas.read_parquet(workspace / "run" / "rollouts")
    assert len(curves["rollout/late"]) == 3
    assert all(0 < value < 0.6 for value in curves["rollout/late"])
    assert (rollouts.response_tokens == 0).any()
    weights = load_file(workspace / "run" / "model" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    summary = json.loads((workspace / "run" / "summary.json").read_text())
    assert summary["iterations"] == 3
    assert 0 <= summary["accuracy_after"] <= 1
