"""How far it is from ``training_step`` to the IB term: calls, files and lines of ours that a reader goes through.

    python benchmarks/path_to_the_ib_term.py

One training step of a tiny DAPOModule is run, and the call stack looked at inside ``InformationBottleneck.objective``.
Frames of torch and Lightning do not count; the lines are those of the whole functions, docstrings included.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from transformers import Qwen2Config, Qwen2ForCausalLM

import ibro_lightning
from ibro_lightning.batches import Rollout
from ibro_lightning.batches.experience import TokenStats
from ibro_lightning.models import PolicyOptions, PolicySource
from ibro_lightning.modules import DAPOModule
from ibro_lightning.regularizers import InformationBottleneck
from ibro_lightning.types import Completion, Group, Prompt, RewardResult

PACKAGE = Path(ibro_lightning.__file__).parent


@dataclass(frozen=True)
class Way:
    """From the outermost call to the innermost."""

    calls: list[tuple[str, str, int]]
    """``(file, function, lines)`` of each."""

    @property
    def files(self) -> set[str]:
        return {file for file, _, _ in self.calls}

    @property
    def lines(self) -> int:
        return sum(lines for _, _, lines in self.calls)


class Tiny(PolicySource):
    """A random Qwen2 of a few thousand parameters."""

    def tokenizer(self) -> Any:
        return SimpleNamespace(eos_token_id=0)

    def config(self) -> Any:
        return Qwen2Config(
            vocab_size=16,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            intermediate_size=8,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )

    def build(self, options: PolicyOptions) -> Any:
        return Qwen2ForCausalLM(self.config())


def rollout() -> Rollout:
    """One prompt, answered rightly and wrongly."""
    completions = tuple(Completion((token, 0), (-1.0, -1.0), "stop", "", 2, seed=token) for token in (3, 4))
    results = (RewardResult(1.0, {"accuracy": 1.0}), RewardResult(0.0, {"accuracy": 0.0}))
    group = Group(Prompt("p", "", (1, 2), answer=None), completions, results)
    return Rollout.from_groups([group], name="train", iteration=1, temperature=1.0)


def path_to_the_ib_term() -> Way:
    """Of one training step."""
    seen: list[FrameType] = []

    class Watched(InformationBottleneck):
        def objective(self, stats: TokenStats) -> torch.Tensor:
            frame = inspect.currentframe()
            while frame is not None and not seen:
                frame = frame.f_back
                calls.append(frame.f_code)
                if frame.f_code.co_name == "training_step":
                    seen.append(frame)
            return super().objective(stats)

    calls: list[CodeType] = []
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = DAPOModule(Tiny(), regularizer=Watched(0.005))
    trainer.fit(module, DataLoader([rollout()], batch_size=None))
    ours = [
        code for code in [InformationBottleneck.objective.__code__, *calls] if PACKAGE in Path(code.co_filename).parents
    ]
    return Way(
        [
            (str(Path(c.co_filename).relative_to(PACKAGE)), c.co_qualname, len(inspect.getsourcelines(c)[0]))
            for c in reversed(ours)
        ]
    )


def main() -> None:
    path = path_to_the_ib_term()
    for file, function, lines in path.calls:
        print(f"{lines:4} lines  {file}: {function}")
    print(f"{path.lines:4} lines, {len(path.calls)} calls, {len(path.files)} files")


if __name__ == "__main__":
    main()
