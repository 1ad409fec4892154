"""The dry run's tables and advice as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ibro_lightning.dry_run.layout import GIB, Layout
from ibro_lightning.dry_run.memory import MemoryEstimate
from ibro_lightning.dry_run.shapes import Shapes
from ibro_lightning.dry_run.work import Tokens, Work, seconds_at

MOST_USED = 0.9
"""Above this share of a device, an estimate that fits is called tight."""


def shape_line(shapes: Shapes) -> str:
    return (
        f"per rank: {shapes.rows} rows in a batch, {shapes.step_rows} in an optimizer step, cut into "
        f"{shapes.micro_batches} micro-batches of up to {shapes.micro_rows} rows of {shapes.tokens:,} tokens "
        f"({shapes.prompt:,} + {shapes.response:,}{', a prompt once for all its rows' if shapes.micro_groups else ''})"
    )


def memory_table(estimate: MemoryEstimate, shapes: Shapes, module: Any) -> Iterator[str]:
    """One rank's memory on its device, in GiB, while generating and while updating, and whether it fits."""
    for network in estimate.networks:
        trained = f", {network.trained:,} of them trained" if network.trained < network.parameters else ""
        yield f"{network.name}: {network.parameters:,} parameters{trained}"
    yield f"{'memory per rank, GiB':44}{'generate':>10}{'update':>10}"
    for row in estimate.rows:
        yield f"  {row.name:42}{_gib(row.generate)}{_gib(row.update)}" + (f"  {row.note}" if row.note else "")
    yield f"  {'total':42}{_gib(estimate.generate)}{_gib(estimate.update)}"
    if estimate.host:
        yield f"  {'in host memory, in addition':42}{_gib(estimate.host)}{_gib(estimate.host)}"
    if estimate.engine is not None and estimate.engine.unknown:
        yield f"  not counted: the engine ({estimate.engine.unknown})"
    yield from (f"  {note}" for note in estimate.notes)
    yield "  for the longest prompts and responses, tensors alone: add drivers, libraries and fragmentation"
    yield verdict(estimate, shapes, module)


def verdict(estimate: MemoryEstimate, shapes: Shapes, module: Any) -> str:
    """Whether the run fits, and if not, what to change."""
    memory, peak = estimate.layout.memory, estimate.peak
    if estimate.engine is not None and estimate.engine.refused:
        return f"does not fit: {estimate.engine.refused}"
    if memory is None:
        return "the device's memory is unknown: give --estimate.gib"
    of = f"{peak / GIB:.1f} of {memory / GIB:.1f} GiB"
    if peak <= MOST_USED * memory:
        return f"fits: {of}"
    changes = "; ".join(advice(estimate, shapes, module))
    return f"{'tight' if peak <= memory else 'does not fit'}: {of}. To need less: {changes}"


def advice(estimate: MemoryEstimate, shapes: Shapes, module: Any) -> Iterator[str]:
    """Settings that reduce the largest part, the cheapest first."""
    layout, options, engine = estimate.layout, module.policy_options, estimate.engine
    if engine is not None and estimate.generate > estimate.update:
        if engine.cache + engine.work > engine.weights:
            yield "lower data.engine.max_batch_size (HFEngine), or gpu_memory_utilization or kv_cache_gib (VLLMEngine)"
        if engine.dtype == "float32":
            yield "data.engine.dtype: bfloat16"
        elif layout.device != "cpu":
            yield "data.engine: VLLMServerEngine, on devices of its own"
    largest = max(estimate.networks, key=lambda network: network.update)
    if largest.micro_batch > largest.step:
        if not options.gradient_checkpointing:
            yield "model.policy_options.gradient_checkpointing: true"
        if shapes.micro_rows > 1:
            yield f"model.micro_batch_tokens: {shapes.half_a_micro_batch}"
        else:
            yield "a micro-batch is one response already: lower data.sampling.max_tokens"
    if layout.kind != "fsdp2":
        yield "trainer.strategy: fsdp2 with more trainer.devices"
    else:
        yield "more trainer.devices or trainer.num_nodes"
        if not layout.cpu_offload:
            yield "cpu_offload: true of fsdp2 (slow)"
    if options.lora is None:
        yield "model.policy_options.lora"


def time_lines(
    work: Work,
    tokens: Tokens,
    layout: Layout,
    tflops: float | None,
    speeds: Mapping[str, float],
    rounds: int,
    folder: Path,
) -> Iterator[str]:
    """Arithmetic of an iteration, and its time if a speed is given or was measured."""
    round_note = f" (dynamic sampling: one round of up to {rounds})" if rounds > 1 else ""
    yield (
        f"an iteration, all ranks, responses of {tokens.response:,.0f} tokens: {tokens.generated:,.0f} tokens "
        f"generated{round_note}, {tokens.trained:,.0f} trained on"
    )
    phases = {"generate": work.generate, "score": work.score, "update": work.update}
    parts = ", ".join(f"{phase} {_flops(flops)}" for phase, flops in phases.items() if flops)
    yield f"  {_flops(work.total)}: {parts}"
    if measured := seconds_at(speeds, tokens):
        parts = ", ".join(f"{phase} {_seconds(seconds)}" for phase, seconds in measured.items())
        total = _seconds(sum(measured.values()))
        yield f"  {total} at the speeds of the run in {folder}, if this one has the same model and devices: {parts}"
    if tflops is not None:
        seconds = work.total / (tflops * 1e12 * layout.world)
        yield f"  {_seconds(seconds)} at {tflops:g} TFLOP/s on each of {layout.world} devices, generation included"
    if not measured and tflops is None:
        yield (
            f"  no time, as no speed is known: give --estimate.tflops, or run a few iterations, whose speed is read "
            f"from the curves in {folder}"
        )


def _gib(size: int) -> str:
    return f"{size / GIB:10.2f}" if size else f"{'':10}"


def _flops(flops: float) -> str:
    for name, unit in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if flops >= unit:
            return f"{flops / unit:.3g} {name}"
    return f"{flops / 1e9:.3g} GFLOP"


def _seconds(seconds: float) -> str:
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.3g} s"
