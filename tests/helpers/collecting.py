"""A rollout datamodule with an engine that answers by a script."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from ibro_lightning.datamodules import (
    RolloutDataModule,
)
from ibro_lightning.engines.base import RolloutEngine
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.rewards import VerifiableReward
from ibro_lightning.sources import PromptSource
from ibro_lightning.types import Generation, Problem, SamplingParams


class Paths(PromptSource):
    """``count`` raw prompts ``0>1:``, ``0>2:``, … of four tokens each."""

    def __init__(self, count: int = 12) -> None:
        self.count = count

    def problems(self):
        for number in range(1, self.count + 1):
            yield Problem(f"path-{number}", f"0>{number}:", number, {"number": number})


class ScriptedEngine(RolloutEngine):
    """Answers right (``1!``) or wrong (``0!``) as the script says, and remembers everything it was told.

    ``rights`` gives, for each group in the order they are asked for, how many of its responses are right. It has no
    weights that a check could find wanting: :mod:`test_weight_check` is about that.
    """

    dtype = "float32"

    max_model_len = None

    def __init__(self, tokenizer, rights: Sequence[int] | None = None) -> None:
        self.tokenizer = tokenizer
        self.rights: Iterator[int] = iter(rights if rights is not None else [1] * 10_000)
        self.events: list[str] = []
        self.weights: list[float] = []
        self.calls: list[tuple[list[str], list[list[int]], SamplingParams]] = []
        self.weights_at_calls: list[float] = []

    def setup(self, spec):
        assert isinstance(spec, ModelSpec)
        self.events.append("setup")

    def load_weights(self, named_tensors, *, partial=False):
        self.events.append("load")
        self.weights.append({name: tensor.item() for name, tensor in named_tensors}["version"])

    def generate(self, prompts, sampling, seeds):
        self.events.append("generate")
        self.weights_at_calls.append(self.weights[-1])
        texts = [self.tokenizer.decode(list(ids)) for ids in prompts]
        self.calls.append((texts, [list(row) for row in seeds], sampling))
        right, wrong = (tuple(self.tokenizer(text)["input_ids"]) for text in ("1!", "0!"))
        groups = []
        for row in seeds:
            count = next(self.rights)
            groups.append([Generation(right if i < count else wrong, (-0.5, -0.25), "stop") for i in range(len(row))])
        return groups

    def offload(self):
        self.events.append("offload")

    def onload(self):
        self.events.append("onload")

    def close(self):
        self.events.append("close")

    @property
    def texts(self) -> list[str]:
        """All prompts asked so far, in order."""
        return [text for texts, _, _ in self.calls for text in texts]


class IsOne(VerifiableReward):
    def verify(self, prompt, completion):
        return completion.text == "1"


class Provider(SimpleNamespace):
    """As much of a LightningModule as datamodules may know."""

    def __init__(self, tokenizer, min_group_size: int = 2) -> None:
        super().__init__(tokenizer=tokenizer, eos_token_ids=(tokenizer.eos_token_id,), min_group_size=min_group_size)
        self.version = 0.0

    def model_spec(self):
        config = SimpleNamespace(vocab_size=len(self.tokenizer))
        config.get_text_config = lambda: config
        return ModelSpec(config, self.eos_token_ids, torch.device("cpu"))

    def named_full_weights(self):
        yield "version", torch.tensor(self.version)


def build(tokenizer, rights: Sequence[int] | None = None, *, attach: bool = True, **settings) -> RolloutDataModule:
    """A datamodule with 3 prompts per rollout and groups of 4, ready to generate."""
    defaults = {
        "source": Paths(),
        "reward": IsOne(),
        "engine": ScriptedEngine(tokenizer, rights),
        "prompts_per_rollout": 3,
        "group_size": 4,
        "weight_check": None,
        "reward_pool": None,
    }
    data = RolloutDataModule(**{**defaults, **settings})
    if attach:
        data.trainer = SimpleNamespace(fast_dev_run=1, lightning_module=Provider(tokenizer), predicting=True)
        data.setup("fit")
    return data


class Learner(Provider):
    learns_off_policy = True


def trainer_of(tokenizer: Any, **settings: Any) -> Any:
    """As much of a Trainer as the datamodule asks; by default it never ends."""
    ready = SimpleNamespace(current=SimpleNamespace(ready=0))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=ready))
    defaults = {"max_epochs": -1, "max_steps": -1, "num_training_batches": 1, "current_epoch": 0, "global_step": 0}
    return SimpleNamespace(
        fast_dev_run=1,
        lightning_module=Learner(tokenizer),
        predicting=True,
        fit_loop=loop,
        **{**defaults, **settings},
    )


def through_a_file(state: Any) -> Any:
    """As Lightning reads it: nothing but plain values and tensors."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
