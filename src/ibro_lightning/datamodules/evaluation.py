"""The evaluation datamodule: identical prompts and seeds in every evaluation, so that policies are comparable."""

from __future__ import annotations

from typing import Any

from ibro_lightning.datamodules.base import CollectingDataModule
from ibro_lightning.datamodules.collector import Collector
from ibro_lightning.datamodules.eval_sets import EvalSet
from ibro_lightning.datamodules.gold_check import OnBadGold
from ibro_lightning.engines.base import RolloutEngine
from ibro_lightning.engines.weight_check import WeightCheck
from ibro_lightning.rewards import PoolOptions
from ibro_lightning.sources.prompts import PromptLimits
from ibro_lightning.types import ControlText


class EvaluationDataModule(CollectingDataModule):
    """Evaluates any policy on named sets; see :class:`CollectingDataModule` for its arguments."""

    def __init__(
        self,
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
            Collector(engine, weight_check, reward_pool, keep_special_tokens, on_bad_gold),
            eval_sets,
            test_sets,
            eval_batch_prompts,
            eval_samples,
            eval_max_tokens,
            prompt_limits,
            chat_template_kwargs,
            control_text,
        )
