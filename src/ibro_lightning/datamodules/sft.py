"""Demonstrations for supervised warm starts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from ibro_lightning.datamodules.evaluation import EvaluationDataModule
from ibro_lightning.errors import ConfigError, check_at_least
from ibro_lightning.seeding import derive_seed, run_seed
from ibro_lightning.sequences import Sequences
from ibro_lightning.tasks import NumberPath, in_split


class DemonstrationSource(ABC):
    """An endless supply of worked examples."""

    @abstractmethod
    def demonstration(self, seed: int) -> tuple[str, str]:
        """``(prompt, response)`` as raw text, without EOS; a function of ``seed`` alone."""

    def may_show(self, prompt: str) -> bool:
        """Could ``prompt`` be among the demonstrations? If so it cannot be evaluated on. False if nobody knows."""
        return False


class NumberPathDemonstrations(DemonstrationSource):
    """Random walks, relabelled with where they ended: no expert, mostly far from the shortest path.

    Args:
        task: the rules.
        max_steps: longest walk.
        heldout_fraction: as in :class:`NumberPathSource`; walks that would answer a held-out problem are never shown.
    """

    def __init__(self, task: NumberPath | None = None, max_steps: int = 12, heldout_fraction: float = 0.15) -> None:
        check_at_least("source.max_steps", max_steps, 1)
        self.task = task or NumberPath()
        if not self.task.distances:
            raise ConfigError(
                "source.task", list(self.task.moves), "no move leads anywhere within the numbers: add one"
            )
        self.max_steps, self.heldout_fraction = max_steps, heldout_fraction

    def demonstration(self, seed: int) -> tuple[str, str]:
        attempt = 0
        while True:
            start, target, tokens = self.task.random_walk(derive_seed(seed, "walk", attempt), self.max_steps)
            prompt = self.task.prompt(start, target)
            if in_split(prompt, "train", self.heldout_fraction):
                return prompt, "".join(tokens)
            attempt += 1

    def may_show(self, prompt: str) -> bool:
        return in_split(prompt, "train", self.heldout_fraction)


class SFTDataModule(EvaluationDataModule):
    """Batches of demonstrations: one Lightning batch is one optimizer step.

    Args:
        source: the demonstrations.
        batch_size: sequences per step, over all ranks.
        steps_per_epoch: batches per Lightning epoch.
        evaluation_settings: engine, eval_sets, prompt_limits, …, as in :class:`EvaluationDataModule`.
    """

    def __init__(
        self,
        source: DemonstrationSource,
        batch_size: int = 64,
        steps_per_epoch: int = 100,
        **evaluation_settings: Any,
    ) -> None:
        super().__init__(**evaluation_settings)
        check_at_least("data.batch_size", batch_size, 1)
        check_at_least("data.steps_per_epoch", steps_per_epoch, 1)
        self.source, self.batch_size, self.steps_per_epoch = source, batch_size, steps_per_epoch
        self.step = 0

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            check_at_least("data.batch_size", self.batch_size, self.ranks.size, ": every rank needs a sequence")
            self.refuse_overlap(self.source.may_show, "write split: heldout and the same heldout_fraction in both")

    def train_dataloader(self) -> SFTStream:
        return SFTStream(self)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = state_dict["step"]

    def next_batch(self) -> Sequences:
        tokenizer, seed = self.provider.tokenizer, run_seed()
        rows = self.ranks.share(range(self.batch_size))
        pairs = [self.source.demonstration(derive_seed(seed, "sft", self.step, row)) for row in rows]
        self.step += 1
        prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
        responses = tokenizer([response for _, response in pairs], add_special_tokens=False)["input_ids"]
        return Sequences.collate(prompts, [[*ids, tokenizer.eos_token_id] for ids in responses])


class SFTStream:
    """The batches of one epoch, made as Lightning asks for them."""

    def __init__(self, data: SFTDataModule) -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data.steps_per_epoch

    def __iter__(self) -> Iterator[Sequences]:
        for _ in range(len(self)):
            yield self.data.next_batch()
