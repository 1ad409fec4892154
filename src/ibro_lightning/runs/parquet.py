"""Responses as parquet files, one row each: written atomically, and read back."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ibro_lightning.batches import Rollout
from ibro_lightning.guards.disk import written_atomically
from ibro_lightning.runs.authorship import signed
from ibro_lightning.types import Completion, Group, Prompt, RewardResult

_PART = "reward_"
# For columns that may be empty in one file and not in the next; engines return float32 log-probs.
_TYPES = {
    "answer_read": pa.string(),
    "why": pa.string(),
    "token_ids": pa.list_(pa.int32()),
    "logp": pa.list_(pa.float32()),
}


def write_parquet(path: Path, rollout: Rollout, *, tokens: bool = False, run: str = "") -> Path:
    """Write one row per sampled response; ``trained_on`` is True for those in the update's batch. With ``tokens``,
    token ids and their log-probs, which :func:`read_groups` needs, are included."""
    updates = rollout.name == "train" and not rollout.skip_update
    own = zip(rollout.prompts, rollout.completions, rollout.results, strict=True)
    kept = [] if rollout.placeholder else [(prompt, completion, result, updates) for prompt, completion, result in own]
    dropped = [
        (group.prompt, completion, result, False)
        for group in rollout.dropped
        for completion, result in zip(group.completions, group.results, strict=True)
    ]
    rows = [
        {
            "iteration": rollout.iteration,
            **_row(prompt, completion, result),
            "trained_on": trained_on,
            **({"token_ids": np.asarray(completion.token_ids), "logp": np.asarray(completion.logp)} if tokens else {}),
        }
        for prompt, completion, result, trained_on in (*kept, *dropped)
    ]
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: pa.array([row.get(name) for row in rows], _TYPES.get(name)) for name in names}
    with written_atomically(path) as partial:
        pq.write_table(signed(pa.table(columns), run), partial)
    return path


def _row(prompt: Prompt, completion: Completion, result: RewardResult) -> dict[str, Any]:
    logps = [logp for logp in completion.logp if math.isfinite(logp)]
    return {
        "prompt_id": prompt.id,
        "part": prompt.part,
        "prompt": prompt.text,
        "answer": json.dumps(prompt.answer, default=str),
        "meta": json.dumps(dict(prompt.meta), default=str),
        "response": completion.text,
        "prompt_tokens": len(prompt.token_ids),
        "response_tokens": len(completion.token_ids),
        "max_tokens": completion.max_tokens,
        "finish_reason": completion.finish_reason,
        "seed": completion.seed,
        "reward": float(result.reward),
        **{f"{_PART}{name}": float(value) for name, value in result.parts.items()},
        "answer_read": result.answer,
        "why": result.why,
        "timed_out": result.timed_out,
        "mean_logp": sum(logps) / max(1, len(logps)),  # in nats, over the tokens that have one; 0 if none has
    }


def read_groups(path: Path, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]]) -> list[Group] | None:
    """Read the responses to these prompts, written with ``tokens=True``; None if the file is missing, damaged, or of
    other prompts or seeds."""
    expected = [(prompt.id, seed) for prompt, row in zip(prompts, seeds, strict=True) for seed in row]
    try:
        rows = pq.ParquetFile(path).read().to_pylist()
        if [(row["prompt_id"], row["seed"]) for row in rows] != expected:
            return None
        judged = iter([_read_row(row) for row in rows])
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None
    groups = []
    for prompt, samples in zip(prompts, seeds, strict=True):
        completions, results = zip(*islice(judged, len(samples)), strict=True)
        groups.append(Group(prompt, completions, results))
    return groups


def _read_row(row: dict[str, Any]) -> tuple[Completion, RewardResult]:
    completion = Completion(
        token_ids=list(row["token_ids"]),
        logp=list(row["logp"]),
        finish_reason=row["finish_reason"],
        text=row["response"],
        max_tokens=row["max_tokens"],
        seed=row["seed"],
    )
    # Null: in a mixture, a part that only other responses' rewards have.
    given = {name: value for name, value in row.items() if name.startswith(_PART) and value is not None}
    parts = {name.removeprefix(_PART): value for name, value in given.items()}
    why = row.get("why")  # not in files written before 0.3
    return completion, RewardResult(row["reward"], parts, row["answer_read"], row["timed_out"], why=why)
