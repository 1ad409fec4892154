"""Sections that train: the quick start as it is shipped, and a 0.5B model with fsdp2, without and with vLLM."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
import yaml

from gpu import hardware
from gpu.report import Figures, Row
from ibro_lightning.batches import Rollout
from ibro_lightning.callbacks import MetricsLog
from ibro_lightning.cli.main import main
from ibro_lightning.dry_run.work import Tokens, Work, work_of
from peers.smollm2 import tokenizer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SIZES = {
    False: {
        "hidden_size": 896,
        "num_layers": 24,
        "num_heads": 14,
        "num_kv_heads": 2,
        "intermediate_size": 4864,
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
    },
    True: {"hidden_size": 160, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 96},
}
"""By miniature: Qwen2.5-0.5B's, and a model with heads of 80, which vLLM's attention on CPUs takes. Those of a multiple
of 32 would use AMX in bfloat16, which some virtual machines name and do not execute."""
VOCABULARY = {False: 151936, True: 256}
ROLLOUT = {False: (32, 8, 512), True: (2, 2, 6)}
"""Prompts, responses to each, and tokens of each; random weights practically never end earlier."""
ITERATIONS = {"fsdp2": 3, "vllm": 5}
MINIATURE_ITERATIONS = 2
CURVES = ("time/", "sync/", "tokens_per_second/generate", "tokens_per_second/prepare", "tokens_per_second/update")
CURVES += ("rollout/length", "rollout/reward")
QUICKSTART = {
    False: ([], ["--trainer.max_epochs=30", "--trainer.check_val_every_n_epoch=15"]),
    True: (
        ["--trainer.max_epochs=1", "--data.steps_per_epoch=2", "--data.eval_sets=null"],
        [
            *("--trainer.max_epochs=2", "--data.prompts_per_rollout=4", "--model.mini_batch_prompts=2"),
            *("--data.eval_sets.number_path.limit=2", "--data.dynamic_sampling=null"),
        ],
    ),
}
"""Further arguments of the warm start and of training, by miniature."""


class Words:
    """A vocabulary of any size, as a model from scratch asks of a task; a random response may solve a one-digit sum.

    Args:
        size: of the vocabulary.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def tokenizer(self) -> Any:
        return tokenizer(self.size)


class Watch(pl.Callback):
    """Collects the curves of each iteration, its work, and what sleeping and waking of the engine takes."""

    latest: Watch
    """The one of the run that is under way or was last: the command line builds it."""

    def __init__(self) -> None:
        Watch.latest = self
        self.curves: list[dict[str, float]] = []
        self.work: list[Work] = []
        self.moves: dict[str, list[tuple[float, float]]] = {}
        self.parameters = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        engine = trainer.datamodule.engine  # type: ignore[attr-defined]
        engine.offload, engine.onload = self.timed("sleep", engine.offload), self.timed("wake", engine.onload)
        self.parameters = sum(parameter.numel() for parameter in pl_module.policy.parameters())

    def timed(self, name: str, move: Callable[[], None]) -> Callable[[], None]:
        """``move`` with its seconds and the GiB of the device that it frees noted; a CPU's memory is not looked at."""

        def measured() -> None:
            before = _free()
            taken = hardware.seconds(move)
            self.moves.setdefault(name, []).append((taken, (_free() - before) / 2**30))

        return measured

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Rollout, batch_idx: int
    ) -> None:
        self.curves.append(MetricsLog().measure(trainer, outputs, batch))
        lengths = batch.sequences.response_lengths.sum().item()
        prompts = batch.sequences.lengths.sum().item() - lengths
        tokens = Tokens(batch.num_groups, len(batch), prompts / len(batch), lengths / len(batch))
        network = SimpleNamespace(parameters=self.parameters, trained=self.parameters)
        estimate: Any = SimpleNamespace(networks=[network])
        self.work.append(work_of(pl_module, estimate, tokens, pl_module.scores_first(batch)))


def _free() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def measure(name: str, figures: Figures, miniature: bool, folder: Path) -> None:
    """Run a section, and keep what it measured even where it fails later on."""
    with figures.guarded(name) as row:
        try:
            if name == "quickstart":
                quickstart(row, miniature, folder)
            else:
                half_billion(row, name, miniature, folder)
        finally:
            if hasattr(Watch, "latest"):
                collect(row, Watch.latest, share=name != "quickstart")


def quickstart(row: Row, miniature: bool, folder: Path) -> None:
    """The warm start and the first iterations of the quick start, as shipped but for the device."""
    for_base, for_run = QUICKSTART[miniature]
    start = time.perf_counter()
    fit("sft_quickstart.yaml", f"--trainer.default_root_dir={folder / 'base'}", *for_base)
    row["warm_start_s"] = time.perf_counter() - start
    fit(
        *("quickstart.yaml", f"--model.policy={folder / 'base' / 'model'}", f"--trainer.callbacks+={__name__}.Watch"),
        *(f"--trainer.default_root_dir={folder / 'run'}", *for_run),
    )
    summary = json.loads((folder / "run" / "summary.json").read_text())
    row |= {name: summary[name] for name in ("accuracy_before", "accuracy_after", "optimizer_steps", "seconds")}


def half_billion(row: Row, engine: str, miniature: bool, folder: Path) -> None:
    """``fsdp2``: with the embedded engine; ``vllm``: with vLLM, whose weights then come from sharded ones."""
    recipe = folder / f"{engine}.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(engine, miniature, folder)))
    fit(str(recipe))
    row["parameters"] = Watch.latest.parameters


def recipe_of(engine: str, miniature: bool, folder: Path) -> dict[str, Any]:
    prompts, group, new_tokens = ROLLOUT[miniature]
    task = {"class_path": f"{__name__}.Words", "init_args": {"size": VOCABULARY[miniature]}}
    policy = {
        "class_path": "ibro_lightning.models.Qwen2FromScratch",
        "init_args": {"task": task, **SIZES[miniature]},
    }
    vllm = {"gpu_memory_utilization": 0.4, "max_model_len": 1024}
    if miniature:
        vllm = {"gpu_memory_utilization": 0.3, "max_model_len": 192, "kv_cache_gib": 0.1, "enforce_eager": True}
    engines = {
        "vllm": {"class_path": "VLLMEngine", "init_args": vllm},
        "fsdp2": {"class_path": "HFEngine", "init_args": {"max_batch_size": prompts * group}},
    }
    return {
        "seed_everything": 1,
        "trainer": {
            "devices": 1,
            "strategy": "fsdp2",
            "precision": "bf16-mixed",
            "max_epochs": MINIATURE_ITERATIONS if miniature else ITERATIONS[engine],
            "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": None,
            "default_root_dir": str(folder / engine),
            "enable_checkpointing": False,
            "callbacks": [{"class_path": f"{__name__}.Watch"}],
        },
        "model": {"class_path": "DAPOModule", "init_args": {"policy": policy}},
        "data": {
            "class_path": "RolloutDataModule",
            "init_args": {
                "source": {"class_path": "SumsSource"},
                "reward": {"class_path": "LastNumberReward"},
                "sampling": {"max_tokens": new_tokens},
                "prompts_per_rollout": prompts,
                "group_size": group,
                "engine": engines[engine],
            },
        },
        "export": {"enabled": False},
    }


def fit(recipe: str, *arguments: str) -> None:
    """Run ``fit`` in this process, on the device that is measured."""
    path = recipe if Path(recipe).is_absolute() else str(CONFIGS / recipe)
    kept = list(sys.argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    flags = [f"--trainer.accelerator={device}", "--trainer.enable_progress_bar=false"]
    try:
        main(["fit", "--config", path, *flags, *arguments])
    except SystemExit as ended:  # a refusal, with its reason on stderr: not an Exception, which a row would note
        raise RuntimeError(f"fit {Path(recipe).name} ended with {ended.code}") from ended
    finally:
        sys.argv[:] = kept


def collect(row: Row, watch: Watch, *, share: bool) -> None:
    """Medians over the iterations after the first, which warms up; FLOP/s of both sides, as shares of the peak."""
    warm, work = watch.curves[1:], watch.work[1:]
    row["iterations_after_the_first"] = len(warm)
    for curve in dict.fromkeys(name for one in warm for name in one if name.startswith(CURVES)):
        row[curve] = statistics.median(one[curve] for one in warm if curve in one)
    peak = hardware.peak_flops(hardware.name())
    for phase in ("generate", "update"):
        timed = [(getattr(own, phase), one.get(f"time/{phase}_s")) for own, one in zip(work, warm, strict=True)]
        if rates := [flops / seconds for flops, seconds in timed if seconds]:
            row[f"{phase}_flops_per_s"] = statistics.median(rates)
            if share and peak:
                row[f"{phase}_share_of_peak"] = statistics.median(rates) / peak
    if share and not peak:
        row["share_of_peak"] = f"left out: the peak of {hardware.name()} is not in the table"
    for name, moves in watch.moves.items():
        taken, freed = zip(*moves[1:] or moves, strict=True)
        row[f"{name}_s"], row[f"{name}_frees_gib"] = statistics.median(taken), statistics.median(freed)
    if torch.cuda.is_available():
        row["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
