"""``fit --dry_run``: checks a recipe and estimates its needs on any machine, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ibro_lightning.datamodules import RolloutDataModule
from ibro_lightning.datamodules.demonstrations import SFTDataModule
from ibro_lightning.dry_run.checks import Checked, check_data
from ibro_lightning.dry_run.generation import EngineMemory, engine_memory
from ibro_lightning.dry_run.layout import Layout
from ibro_lightning.dry_run.memory import MemoryEstimate, estimate_memory
from ibro_lightning.dry_run.networks import parameter_count
from ibro_lightning.dry_run.options import EstimateOptions
from ibro_lightning.dry_run.report import memory_table, shape_line, time_lines
from ibro_lightning.dry_run.shapes import Shapes
from ibro_lightning.dry_run.work import Tokens, measured_speeds, work_of
from ibro_lightning.errors import ConfigError, check_at_least
from ibro_lightning.modules import PolicyModule


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
        raise ConfigError("dry_run", kinds, "it knows our modules with RolloutDataModule or SFTDataModule, only")

    def say(*lines: str) -> None:
        print(*lines, sep="\n", flush=True)

    say(f"{type(module).__name__} on {layout}")
    checked = check_data(module, data)
    shapes = _shapes(module, data, layout, checked)
    say(*checked.lines, shape_line(shapes), *_warnings(module, data, layout))
    engine = _engine(module, data, layout, shapes)
    estimate = estimate_memory(module, shapes, layout, engine)
    say("", *memory_table(estimate, shapes, module), "")
    folder = Path(trainer.default_root_dir or "runs/default")
    say(*_time(module, data, checked, shapes, estimate, options, folder))
    return estimate


def _shapes(module: Any, data: Any, layout: Layout, checked: Checked) -> Shapes:
    ranks = layout.data_parallel
    if isinstance(data, SFTDataModule):
        check_at_least("data.batch_size", data.batch_size, ranks, ": every rank needs a sequence")
        return Shapes.of_demonstrations(ranks, data.batch_size, checked.prompt, checked.response)
    prompt = checked.prompt
    if not checked.complete and data.prompt_limits.max_tokens is not None:  # others may reach the limit
        prompt = data.prompt_limits.max_tokens
    return Shapes.of_rollouts(
        module, ranks, data.prompts_per_rollout, data.group_size, prompt, checked.response, checked.prompts
    )


def _warnings(module: Any, data: Any, layout: Layout) -> Iterator[str]:
    """Settings that work but waste time."""
    if not isinstance(data, RolloutDataModule):
        return
    ranks = layout.data_parallel
    for setting, prompts in (
        ("data.prompts_per_rollout", data.prompts_per_rollout),
        ("model.mini_batch_prompts", module.updater.mini_batch_prompts),
    ):
        if prompts is not None and prompts % ranks:
            yield f"{setting}: {prompts} is no multiple of the {ranks} ranks: some wait for others"
    if module.updater.mini_batch_prompts and data.prompts_per_rollout % module.updater.mini_batch_prompts:
        yield (
            f"model.mini_batch_prompts: {module.updater.mini_batch_prompts} does not divide "
            f"data.prompts_per_rollout: {data.prompts_per_rollout}: the last optimizer step is smaller"
        )


def _engine(module: Any, data: Any, layout: Layout, shapes: Shapes) -> EngineMemory | None:
    """The engine's memory in training; evaluations use the same engine."""
    if not isinstance(data, RolloutDataModule):
        return None
    source = module.policy_source
    return engine_memory(
        data.engine,
        source.config(),
        parameter_count(source, module.policy_options),
        data.sampling,
        layout,
        prompt=shapes.prompt,
        group_size=data.group_size,
        responses=shapes.rows,
    )


def _time(
    module: Any,
    data: Any,
    checked: Checked,
    shapes: Shapes,
    estimate: MemoryEstimate,
    options: EstimateOptions,
    folder: Path,
) -> Iterator[str]:
    speeds = measured_speeds(folder)
    rollouts = isinstance(data, RolloutDataModule)
    prompts, group = (data.prompts_per_rollout, data.group_size) if rollouts else (data.batch_size, 1)
    length = options.response_tokens or speeds.get("rollout/length") or shapes.response
    tokens = Tokens(prompts, prompts * group, checked.mean_prompt, length)
    scored = module.policy_loss is not None and shapes.scores_first(module)
    work = work_of(module, estimate, tokens, scored)
    rounds = data.dynamic_sampling.max_rounds if getattr(data, "dynamic_sampling", None) else 1
    return time_lines(work, tokens, estimate.layout, options.tflops, speeds, rounds, folder)
