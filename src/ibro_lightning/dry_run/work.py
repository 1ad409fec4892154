"""Arithmetic of an iteration, and its duration at measured speeds.

By formula rather than torch's ``FlopCounterMode``: that counts only what is run, but a dry run runs one micro-batch and
does not sample thousands of tokens; and it does not count attention on CPUs (1.87 of 2.14 GFLOP of the quick start's
micro-batch). The tests compare the formula with its count. Not covered: mixtures of experts, linear attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibro_lightning.dry_run.memory import MemoryEstimate
from ibro_lightning.models.tensor_parallel import head_dim
from ibro_lightning.modules import PPOModule

LATEST = 10
"""Last iterations of an earlier run, from which its speed is taken."""
TAGS = ("tokens_per_second/generate", "tokens_per_second/prepare", "tokens_per_second/update", "rollout/length")


@dataclass(frozen=True)
class Tokens:
    """Tokens of one iteration on all ranks, with one round of generation.

    Args:
        prompts: number of prompts; each is computed once for all its responses.
        responses: number of responses.
        prompt, response: mean tokens of one.
    """

    prompts: int
    responses: int
    prompt: float
    response: float

    @property
    def generated(self) -> float:
        return self.responses * self.response

    @property
    def trained(self) -> float:
        """Prompt and response tokens of all responses."""
        return self.responses * (self.prompt + self.response)


@dataclass(frozen=True)
class Work:
    """FLOPs of one iteration on all ranks: matrix products, at 2 per multiplication; nothing else counts."""

    generate: float
    score: float
    update: float

    @property
    def total(self) -> float:
        return self.generate + self.score + self.update


def work_of(module: Any, estimate: MemoryEstimate, tokens: Tokens, scored_first: float) -> Work:
    """FLOPs of an iteration: 2 per token and weight of the blocks (of a prompt once, if it is shared), 2 per response
    token and weight of the head, and attention over preceding tokens. Backward passes count twice, recomputation once
    more; regularisers' passes not. ``scored_first``: the share of the rollout that the policy scores before the update.
    """
    config = module.policy_source.config().get_text_config()
    table = config.vocab_size * config.hidden_size
    tied = bool(getattr(config, "tie_word_embeddings", False))
    policy = estimate.networks[0]
    added = policy.trained if policy.trained < policy.parameters else 0  # adapters
    blocks = policy.parameters - added - table * (1 if tied else 2)
    per_pair = 4 * config.num_hidden_layers * config.num_attention_heads * head_dim(config)

    def attention(prompt: float, response: float) -> float:
        """Each token attends to those up to itself."""
        return per_pair * ((prompt + response) ** 2 - prompt**2) / 2

    head = 2 * table * tokens.generated
    shared = module.policy.shares_prompts

    def forward_of(response: float) -> float:
        """A pass over responses of this length. Shared prompts are computed once, though attention may ask again."""
        prompts = tokens.prompts if shared else tokens.responses
        computed = prompts * tokens.prompt + tokens.responses * response
        return 2 * blocks * computed + tokens.responses * attention(0, tokens.prompt + response)

    forward = forward_of(tokens.response - shared)  # where prompts are shared, the last token is left out
    generate = (
        2 * blocks * (tokens.prompts * tokens.prompt + tokens.generated)
        + head
        + tokens.prompts * attention(0, tokens.prompt)
        + tokens.responses * attention(tokens.prompt, tokens.response)
    )
    passes = 3 + module.policy_options.gradient_checkpointing - (added > 0)
    if module.policy_loss is None:
        return Work(0.0, 0.0, passes * forward + 4 * head)
    scores = scored_first + (module.kl is not None)
    exact = module.kl is not None and module.kl.estimator == "exact"
    compared = forward + 2 * head if exact and module.kl.placement == "loss" else 0.0  # its head forward and backward
    critic = forward_of(tokens.response) if isinstance(module, PPOModule) else 0.0
    critic_passes = 3 + module.policy_options.gradient_checkpointing
    return Work(
        generate=generate,
        score=scores * (forward + head) + critic,
        update=module.updater.update_epochs * (passes * forward + critic_passes * critic + 4 * head + compared),
    )


def measured_speeds(folder: Path) -> dict[str, float]:
    """Speeds in the curves of an earlier run in ``folder``, averaged over its last iterations; empty without curves."""
    if not any(folder.glob("events.out.tfevents.*")):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    speeds = {}
    for tag in TAGS:
        if tag in events.Tags()["scalars"]:
            values = [event.value for event in events.Scalars(tag)[-LATEST:]]
            speeds[tag] = sum(values) / len(values)
    return speeds


def seconds_at(speeds: Mapping[str, float], tokens: Tokens) -> dict[str, float]:
    """Seconds of each phase of one iteration at measured speeds."""
    amounts = {"generate": tokens.generated, "prepare": tokens.trained, "update": tokens.trained}
    return {
        phase: amount / speeds[f"tokens_per_second/{phase}"]
        for phase, amount in amounts.items()
        if speeds.get(f"tokens_per_second/{phase}")
    }
