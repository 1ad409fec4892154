"""``fit --dry_run``: checks a recipe and estimates its needs on any machine, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ibro_lightning.datamodules import RolloutDataModule
from ibro_lightning.datamodules.demonstrations import SFTDataModule
from ibro_lightning.dry_run.checks import Checked, check_data
from ibro_lightning.dry_run.engine_memory import engine_memory
from ibro_lightning.dry_run.layout import Layout
from ibro_lightning.dry_run.memory import MemoryEstimate, estimate_memory
from ibro_lightning.dry_run.networks import parameter_count
from ibro_lightning.dry_run.options import EstimateOptions
from ibro_lightning.dry_run.report import memory_table, shape_line, time_lines
from ibro_lightning.dry_run.shapes import Shapes
from ibro_lightning.dry_run.work import Tokens, measured_speeds, work_of
from ibro_lightning.engines import EngineProcess
from ibro_lightning.errors import ConfigError, check_at_least
from ibro_lightning.modules import PolicyModule
from ibro_lightning.modules.rollout_data import refuse_unverified_logp


def dry_run(module: Any, data: Any, trainer: Any, options: EstimateOptions) -> MemoryEstimate:
    """Check and estimate, and print both.

    Args:
        module, data: as the recipe constructs them, without a Trainer.
        trainer: the ``trainer`` section of the recipe, classes instantiated.

    Raises:
        ConfigError, RewardError: what would stop training in its first seconds.
    """
    layout = Layout.of(trainer, options.gib)
    if not isinstance(module, PolicyModule) or not isinstance(data, RolloutDataModule | SFTDataModule):
        kinds = f"{type(module).__name__} with {type(data).__name__}"
        raise ConfigError("dry_run", kinds, "it needs one of our modules with RolloutDataModule or SFTDataModule")

    def say(*lines: str) -> None:
        print(*lines, sep="\n", flush=True)

    say(f"{type(module).__name__} on {layout}")
    if isinstance(data, RolloutDataModule):
        mixed = layout.precision == "bf16-mixed"
        refuse_unverified_logp(module, data, "bfloat16" if mixed else module.compute_dtype)
    checked = check_data(module, data)
    shapes = _shapes(module, data, layout, checked)
    say(*checked.lines, shape_line(shapes), *_warnings(module, data, layout))
    engine = None  # evaluations use the engine of training
    if isinstance(data, RolloutDataModule):
        config, parameters = module.policy_source.config(), parameter_count(module.policy_source, module.policy_options)
        sizes = {"prompt": shapes.prompt, "group_size": data.group_size, "responses": shapes.rows}
        engine = engine_memory(data.engine, config, parameters, data.sampling, layout, **sizes)
        if isinstance(data.engine, EngineProcess):
            copy = parameters * getattr(torch, module.policy_options.dtype).itemsize
            engine = engine.in_another_process(copy, overlaps=data.max_staleness > 0)
    estimate = estimate_memory(module, shapes, layout, engine)
    say("", *memory_table(estimate, shapes, module), "")
    folder = Path(trainer.default_root_dir or "runs/default")
    speeds = measured_speeds(folder)
    length = options.response_tokens or speeds.get("rollout/length") or shapes.response
    if isinstance(data, RolloutDataModule):
        prompts = data.prompts_per_rollout
        tokens = Tokens(prompts, prompts * data.group_size, checked.mean_prompt, length)
        rounds = data.dynamic_sampling.max_rounds if data.dynamic_sampling else 1
    else:
        tokens, rounds = Tokens(data.batch_size, data.batch_size, checked.mean_prompt, length), 1
    work = work_of(module, estimate, tokens, 0.0 if module.policy_loss is None else shapes.scored_first(module))
    say(*time_lines(work, tokens, layout, options.tflops, speeds, rounds, folder))
    return estimate


def _shapes(module: Any, data: Any, layout: Layout, checked: Checked) -> Shapes:
    ranks, prompt = layout.data_parallel, checked.prompt
    if isinstance(data, SFTDataModule):
        check_at_least("data.batch_size", data.batch_size, ranks, ": every rank needs a sequence")
        return Shapes.of_demonstrations(ranks, data.batch_size, prompt, checked.response)
    if not checked.complete and data.prompt_limits.max_tokens is not None:  # others may reach the limit
        prompt = data.prompt_limits.max_tokens
    sizes = data.prompts_per_rollout, data.group_size, prompt, checked.response
    return Shapes.of_rollouts(module, ranks, *sizes, checked.prompts)


def _warnings(module: Any, data: Any, layout: Layout) -> Iterator[str]:
    """Settings that work but waste time."""
    if not isinstance(data, RolloutDataModule):
        return
    ranks, mini_batch = layout.data_parallel, module.updater.mini_batch_prompts
    for setting, prompts in (
        ("data.prompts_per_rollout", data.prompts_per_rollout),
        ("model.mini_batch_prompts", mini_batch),
    ):
        if prompts and prompts % ranks:
            yield f"{setting}: {prompts} is no multiple of the {ranks} ranks: some wait for others"
    if mini_batch and data.prompts_per_rollout % mini_batch:
        yield (
            f"model.mini_batch_prompts: {mini_batch} does not divide data.prompts_per_rollout: "
            f"{data.prompts_per_rollout}: the last optimizer step is smaller"
        )
