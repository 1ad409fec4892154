"""The datamodule of supervised fine-tuning (SFT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.datamodules.eval_sets import EvalSet
from ibro_lightning.datamodules.evaluation import EvaluationDataModule, TrainingStream
from ibro_lightning.datamodules.gold_check import OnBadGold
from ibro_lightning.engines.base import RolloutEngine
from ibro_lightning.engines.weight_check import WeightCheck
from ibro_lightning.errors import ConfigError, check_count, check_instance
from ibro_lightning.rendering import ControlTokens, RenderingError, TextTokenizer, control_text
from ibro_lightning.rewards import PoolOptions
from ibro_lightning.seeding import derive_seed, run_seed
from ibro_lightning.sources.base import DemonstrationSource
from ibro_lightning.sources.control_text import rendered, report_control_text
from ibro_lightning.sources.prompts import PromptLimits, report_appended
from ibro_lightning.types import ControlText, Message

Pair = tuple[str | Sequence[Message], str]
"""``(prompt, response)``."""
SEARCHED = 256
"""Demonstrations searched for control text before training; the source is endless."""


class SFTDataModule(EvaluationDataModule):
    """Batches of demonstrations: one Lightning batch is one optimizer step.

    See :class:`EvaluationDataModule` for the arguments from ``engine`` on.

    Args:
        source: the demonstrations.
        batch_size: sequences per step, over all ranks.
        steps_per_epoch: batches per Lightning epoch.
    """

    batch_type = Sequences

    def __init__(
        self,
        source: DemonstrationSource,
        batch_size: int = 64,
        steps_per_epoch: int = 100,
        engine: RolloutEngine | None = None,
        eval_sets: dict[str, EvalSet] | None = None,
        test_sets: dict[str, EvalSet] | None = None,
        eval_batch_prompts: int = 64,
        prompt_limits: PromptLimits = PromptLimits(),
        weight_check: WeightCheck | None = WeightCheck(),
        reward_pool: PoolOptions | None = PoolOptions(),
        eval_samples: int | None = None,
        eval_max_tokens: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        keep_special_tokens: bool = False,
        on_bad_gold: OnBadGold = "refuse",
        control_text: ControlText = "warn",
    ) -> None:
        super().__init__(
            engine=engine,
            eval_sets=eval_sets,
            test_sets=test_sets,
            eval_batch_prompts=eval_batch_prompts,
            prompt_limits=prompt_limits,
            weight_check=weight_check,
            reward_pool=reward_pool,
            eval_samples=eval_samples,
            eval_max_tokens=eval_max_tokens,
            chat_template_kwargs=chat_template_kwargs,
            keep_special_tokens=keep_special_tokens,
            on_bad_gold=on_bad_gold,
            control_text=control_text,
        )
        check_instance("source", source, DemonstrationSource)
        check_count("batch_size", batch_size, 1)
        check_count("steps_per_epoch", steps_per_epoch, 1)
        self.source, self.batch_size, self.steps_per_epoch = source, batch_size, steps_per_epoch
        self.step = 0

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            check_count("batch_size", self.batch_size, self.ranks.size, ": every rank needs a sequence")
            prompt, _ = self._demonstration(0, 0)
            report_appended(prompt if isinstance(prompt, str) else "", self.provider.tokenizer)
            first = [self._demonstration(*divmod(row, self.batch_size)) for row in range(SEARCHED)]
            self._count_control_text(first, self.provider.tokenizer)
            self.refuse_overlap(self.source.may_show, "write split: heldout and the same heldout_fraction in both")

    def train_dataloader(self) -> TrainingStream[Sequences]:
        return TrainingStream(self.steps_per_epoch, self.next_batch)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = state_dict["step"]

    def next_batch(self) -> Sequences:
        tokenizer = self.provider.tokenizer
        pairs = [self._demonstration(self.step, row) for row in self.ranks.share(range(self.batch_size))]
        self.step += 1
        return Sequences.collate(*self.encode(pairs, tokenizer))

    def _demonstration(self, step: int, row: int) -> Pair:
        return self.source.demonstration(derive_seed(run_seed(), "sft", step, row))

    def _count_control_text(self, pairs: Sequence[Pair], tokenizer: Any) -> None:
        """Report how many demonstrations spell control tokens, or refuse them."""
        control, found = ControlTokens.of(tokenizer), []
        for number, (prompt, response) in enumerate(pairs):
            answer = [{"role": "assistant", "content": _without_eos(response, tokenizer)}]
            found.append((f"number {number}", control_text(prompt, control) or control_text(answer, control)))
        report_control_text("data.source", self.control_text, found, "demonstrations searched")

    def encode(self, pairs: Sequence[Pair], tokenizer: Any) -> tuple[list[tuple[int, ...]], list[list[int]]]:
        """``(prompt tokens, response tokens)``: prompts encoded as for sampling, responses ending with one EOS."""
        rule = self.control_text
        if rule == "refuse":
            self._count_control_text(pairs, tokenizer)
        responses = tokenizer([response for _, response in pairs], add_special_tokens=False)["input_ids"]
        try:
            prompts = [rendered(prompt, tokenizer, self.chat_template_kwargs, rule=rule)[1] for prompt, _ in pairs]
            if rule == "as_text":
                responses = [_as_text(text, ids, tokenizer) for (_, text), ids in zip(pairs, responses, strict=True)]
        except RenderingError as error:
            raise ConfigError("source", type(self.source).__name__, str(error)) from error
        eos = tokenizer.eos_token_id
        return prompts, [ids if ids and ids[-1] == eos else [*ids, eos] for ids in responses]


def _without_eos(response: str, tokenizer: Any) -> str:
    """The response without a trailing EOS, which is legitimate there."""
    return response.removesuffix(getattr(tokenizer, "eos_token", None) or "")


def _as_text(response: str, token_ids: list[int], tokenizer: Any) -> list[int]:
    """A response's tokens with its special tokens encoded as text, except a trailing EOS.

    Non-special control tokens, such as ``<think>``, are part of the assistant's output and stay tokens.
    """
    answer, control = _without_eos(response, tokenizer), ControlTokens.of(tokenizer)
    if not control.normalized and not control.found(answer, assistant=True):
        return token_ids
    masked = control.mask(answer, assistant=True) + response[len(answer) :]
    return TextTokenizer.of(tokenizer)(masked)["input_ids"]
