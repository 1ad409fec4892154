"""What the folders of two runs hold, compared bit for bit, apart from how long things took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from ibro_lightning.runs.checkpoints.plugin import read_checkpoint

CLOCK = ("time/", "time_share/", "tokens_per_second/")
"""Curves that tell how fast a run was; every other point of every curve must be the same."""


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every point of every curve that does not measure time, in the order in which a reader finds them."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    found = {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"] if not tag.startswith(CLOCK)
    }
    tables = {tag: [(e.step, e.tensor_proto.string_val[0]) for e in events.Tensors(tag)] for tag in tags["tensors"]}
    return {**found, **tables}


def files(run: Path) -> list[str]:
    """Names of all files and folders; TensorBoard's, which carry the time and the process, as one."""
    names = {str(path.relative_to(run)) for path in run.rglob("*") if "tfevents" not in path.name}
    return sorted(names)


def differences(one: Path, other: Path) -> list[str]:
    """In what the folders of two runs differ, apart from how long things took."""
    found = []
    if files(one) != files(other):
        found.append(f"files: {sorted(set(files(one)) ^ set(files(other)))}")
    for name in files(one):
        path, twin = one / name, other / name
        exact = path.suffix == ".safetensors" or name == "hparams.yaml"
        if exact and path.read_bytes() != twin.read_bytes():
            found.append(f"{name}: other bytes")
        elif path.suffix == ".parquet" and not pandas.read_parquet(path).equals(pandas.read_parquet(twin)):
            found.append(f"{name}: other rows")
        elif (
            path.suffix == ".json"
            and path.name != "manifest.json"
            and _plain(json.loads(path.read_text())) != _plain(json.loads(twin.read_text()))
        ):
            found.append(f"{name}: other content")
        elif path.suffix == ".ckpt":
            found += [f"{name}: {where}" for where in unequal(read_checkpoint(path), read_checkpoint(twin))]
    points = [curves(run) for run in (one, other)]
    found += [f"curve {tag}" for tag in sorted({*points[0], *points[1]}) if points[0].get(tag) != points[1].get(tag)]
    return found


def _plain(content: Any) -> Any:
    """Without times, and without digests of files that hold times."""
    if isinstance(content, dict):
        own = ("seconds", "log_dir", "model_dir", "curves", "loggers")
        return {key: _plain(value) for key, value in content.items() if key not in own}
    return content


def unequal(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two checkpoints differ, bit for bit, apart from times and from whose they are."""
    if type(one) is not type(other):
        return [f"{where}: {type(one).__name__} and {type(other).__name__}"]
    if isinstance(one, Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [where]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{where}: {sorted(map(str, one.keys() ^ other.keys()))}"]
        keys = [key for key in one if key not in ("seconds", "loggers", "run_id")]
        return [difference for key in keys for difference in unequal(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [f"{where}: {len(one)} and {len(other)} entries"]
        return [d for i, (a, b) in enumerate(zip(one, other, strict=True)) for d in unequal(a, b, f"{where}/{i}")]
    return [] if one == other else [f"{where}: {one} and {other}"]
