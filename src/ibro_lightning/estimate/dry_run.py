"""``fit --dry_run``: checks a recipe and says what it will need, on any machine, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from ibro_lightning.datamodules import RolloutDataModule
from ibro_lightning.datamodules.sft import SFTDataModule
from ibro_lightning.errors import ConfigError, check_at_least
from ibro_lightning.estimate.checks import Checked, check_data
from ibro_lightning.estimate.generation import EngineMemory, engine_memory
from ibro_lightning.estimate.layout import Layout
from ibro_lightning.estimate.memory import MemoryEstimate, estimate_memory
from ibro_lightning.estimate.networks import parameter_count
from ibro_lightning.estimate.report import memory_table, shape_line, time_lines
from ibro_lightning.estimate.shapes import Shapes
from ibro_lightning.estimate.work import Tokens, measured_speeds, work_of
from ibro_lightning.modules import ActorModule, PolicyModule


@dataclass(frozen=True)
class EstimateOptions:
    """What a dry run is to assume.

    Args:
        gib: memory of one device in GiB; None takes this machine's, if it has such devices.
        tflops: TFLOP/s that one device sustains on this work, as measured in another run; None gives no time, unless
            the run's folder holds the curves of an earlier run, whose speed is taken.
        response_tokens: mean length of a response, for the time; None takes that of an earlier run, or the longest
            that data.sampling allows. Memory is always for the longest.
    """

    gib: float | None = None
    tflops: float | None = None
    response_tokens: float | None = None

    def __post_init__(self) -> None:
        for name in ("gib", "tflops", "response_tokens"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"estimate.{name}", value, "write a positive number")


def add_arguments(parser: LightningArgumentParser) -> None:
    """``--dry_run`` and ``--estimate.*``."""
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="Check data, rewards and templates on a few rows, print memory per rank and arithmetic, and exit.",
    )
    parser.add_class_arguments(EstimateOptions, "estimate")


def dry_run(module: Any, data: Any, trainer: Any, options: EstimateOptions) -> MemoryEstimate:
    """Check and estimate, and print both.

    Args:
        module, data: as the recipe constructs them, attached to nothing.
        trainer: the ``trainer`` section of the recipe, classes instantiated.

    Raises:
        ConfigError, RewardError: what training would stop at in its first seconds.
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
    if not checked.complete and data.prompt_limits.max_tokens is not None:  # others may be as long as they may be
        prompt = data.prompt_limits.max_tokens
    return Shapes.of_rollouts(
        module, ranks, data.prompts_per_rollout, data.group_size, prompt, checked.response, checked.prompts
    )


def _warnings(module: Any, data: Any, layout: Layout) -> Iterator[str]:
    """Settings that work, and waste time."""
    if not isinstance(data, RolloutDataModule):
        return
    ranks = layout.data_parallel
    for setting, prompts in (
        ("data.prompts_per_rollout", data.prompts_per_rollout),
        ("model.mini_batch_prompts", module.mini_batch_prompts),
    ):
        if prompts is not None and prompts % ranks:
            yield f"{setting}: {prompts} is no multiple of the {ranks} ranks: some wait for others"
    if module.mini_batch_prompts and data.prompts_per_rollout % module.mini_batch_prompts:
        yield (
            f"model.mini_batch_prompts: {module.mini_batch_prompts} does not divide "
            f"data.prompts_per_rollout: {data.prompts_per_rollout}: the last optimizer step is smaller"
        )


def _engine(module: Any, data: Any, layout: Layout, shapes: Shapes) -> EngineMemory | None:
    """The engine's needs while training generates; evaluations in between use the same."""
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
    scored = isinstance(module, ActorModule) and shapes.scores_first(module)
    work = work_of(module, estimate, tokens, scored)
    rounds = data.dynamic_sampling.max_rounds if getattr(data, "dynamic_sampling", None) else 1
    return time_lines(work, tokens, estimate.layout, options.tflops, speeds, rounds, folder)
