"""The curves of a run, read from its TensorBoard files."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_curves(run: Path) -> list[tuple[str, int, float]]:
    """``(metric, iteration, value)`` of every scalar, each iteration once: of a repeated one, the last value."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    values = {(name, event.step): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}
    return [(name, step, value) for (name, step), value in sorted(values.items())]
