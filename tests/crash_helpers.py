"""Runs that are killed, go on, and are compared with one that was not: for test_crash.py and benchmarks/crash_test.py.

A moment to be killed at is either a time, or the n-th call of a function, or the n-th time that the run changes a file:
Python announces each of those before it happens (``sys.addaudithook``), so that no order of file operations is missed.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from ibro_lightning.checkpoints import read_checkpoint
from processes import logs, start_ranks

CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate", "shutil.rmtree"}
CLOCK = ("time/", "time_share/", "tokens_per_second/")
"""Curves that tell how fast a run was; every other point of every curve must be the same."""


@dataclass(frozen=True)
class Moment:
    """When to be killed.

    Args:
        what: ``time``, ``file``, ``half`` (a checkpoint's file is half written) or the path of a function.
        number: seconds, or how many of these come before the one.
        after: kill when the function has returned, not before it is called.
    """

    what: str
    number: float
    after: bool = False

    def __str__(self) -> str:
        number = f"{self.number:.2f}s" if self.what == "time" else f"{self.number:.0f}"
        return f"{self.what.rsplit('.', 1)[-1]}-{number}{'-after' if self.after else ''}"


RECIPE = """
seed_everything: 3
num_threads: 1
trainer: {{accelerator: cpu, max_epochs: 3, check_val_every_n_epoch: 2, default_root_dir: run}}
model:
  class_path: {algorithm}
  init_args:
    policy: {policy}
    regularizer:
      class_path: InformationBottleneck
      init_args:
        coef: {{class_path: EntropyBand, init_args: {{low: 0.5, high: 2.0, start: 0.2}}}}
    kl: {{class_path: ReferenceKL, init_args: {{coef: {{class_path: AdaptiveKL, init_args: {{target: 0.01}}}}}}}}
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 1.0e-2}}}}
    mini_batch_prompts: 2
    warmup_steps: 2
    {own}
data:
  class_path: RolloutDataModule
  init_args:
    source: {{class_path: user_code.Starts}}
    reward: {{class_path: user_code.SaysEquals}}
    sampling: {{temperature: 1.0, max_tokens: 6}}
    prompts_per_rollout: 4
    group_size: 4
    allow_overlap: true
    reward_pool: null
    dynamic_sampling: {{max_rounds: 2, on_exhausted: fill}}
    eval_sets:
      starts:
        source: {{class_path: user_code.Starts}}
        reward: {{class_path: user_code.SaysEquals}}
        samples: 4
        sampling: {{max_tokens: 6}}
samples: {{every_n_iterations: 1}}
checkpoint: {{every_n_iterations: 1, keep_last: 1, best: val/starts/avg@4}}
"""
OWN = {
    "DAPOModule": "",
    "PPOModule": "critic_optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-2}}\n"
    "    critic_warmup_iterations: 1\n    gae_lambda: 0.95",
}


FOLDERS = """
trainer:
  strategy:
    class_path: ibro_lightning.strategies.FSDP2Strategy
    init_args: {save_distributed_checkpoint: true}
"""


def write_recipe(folder: Path, algorithm: str, policy: Path, user_code: str, *, folders: bool = False) -> None:
    """A user's folder: ``crash.yaml`` runs three iterations in about a second; the last one is not evaluated within
    training, but after.

    Args:
        folders: several ranks write checkpoints to which each adds its shards, and not one file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if folders:
        (folder / "folders.yaml").write_text(FOLDERS)
    (folder / "user_code.py").write_text(user_code)
    (folder / "crash.yaml").write_text(
        textwrap.dedent(RECIPE).format(algorithm=algorithm, policy=policy, own=OWN[algorithm])
    )


def fit(folder: Path, *argv: str, ranks: int = 1, moment: Moment | None = None) -> list[int | None]:
    """``fit --config crash.yaml`` in ``folder``; the exit codes of its processes: -9 for those that were killed."""
    strategy = ["--config", "folders.yaml"] if (folder / "folders.yaml").exists() else ["--trainer.strategy", "fsdp2"]
    several = ["--trainer.devices", str(ranks), *strategy] if ranks > 1 else []
    processes = start_ranks(ranks, _run, ["fit", "--config", "crash.yaml", *several, *argv], moment, folder=folder)
    first = processes[0]
    if moment is not None and moment.what == "time":
        first.join(moment.number)
        first.kill()
    first.join(120)
    for process in processes:
        if first.exitcode != -signal.SIGKILL:  # otherwise the machine is lost, and all its processes with it
            process.join(120)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def kill(folder: Path, moment: Moment, *argv: str, ranks: int = 1, fresh: bool = True) -> bool:
    """A run that is killed at ``moment``; False if it ended before that."""
    if fresh:
        for left in folder.glob("run*"):
            shutil.rmtree(left)
    return fit(folder, *argv, ranks=ranks, moment=moment)[0] == -signal.SIGKILL


def go_on(folder: Path, *argv: str, ranks: int = 1) -> None:
    """Go on with the run in ``folder``, to its end."""
    codes = fit(folder, "--ckpt_path", "last", *argv, ranks=ranks)
    assert codes == [0] * ranks, f"exit codes {codes}\n{logs(folder)}"


def _run(argv: Sequence[str], moment: Moment | None) -> None:
    from ibro_lightning.cli import main

    if moment is not None and int(os.environ.get("RANK", "0")) == 0:
        arm(moment)
    main(list(argv))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: Moment) -> None:
    """Have this process killed at ``moment``."""
    if moment.what in ("file", "count"):
        sys.addaudithook(_count_changes(int(moment.number)))
    elif moment.what == "half":
        _save_half(int(moment.number))
    elif moment.what != "time":
        path, name = moment.what.rsplit(".", 1)
        module, last = path.rsplit(".", 1)
        is_class = last[0].isupper()
        target = getattr(importlib.import_module(module), last) if is_class else importlib.import_module(path)
        setattr(target, name, _counted(getattr(target, name), int(moment.number), moment.after))


def _counted(function: Callable[..., Any], number: int, after: bool) -> Callable[..., Any]:
    calls = 0

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            die()
        result = function(*args, **kwargs)
        if calls == number and after:
            die()
        return result

    return called


def _count_changes(number: int) -> Callable[[str, tuple[Any, ...]], None]:
    """Dies before change ``number``; 0: keeps count in the file ``changes``."""
    run, seen = str(Path("run").absolute()), 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if changes_a_file(event, arguments, run):
            seen += 1
            if seen == number:
                die()
            if not number:
                Path("changes").write_text(str(seen))

    return hook


def changes_a_file(event: str, arguments: tuple[Any, ...], run: str) -> bool:
    """Does an audit event announce that a file or folder of the run is made, moved or removed?"""
    if event == "open":
        path, _, flags = arguments
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return False
    elif event in CHANGES:
        path = arguments[1] if event == "os.symlink" else arguments[0]
    else:
        return False
    return isinstance(path, str | os.PathLike) and os.path.abspath(os.fspath(path)).startswith(run)


def _save_half(number: int) -> None:
    """``torch.save`` writes half of the ``number``-th checkpoint, and the process is gone."""
    saved, calls = torch.save, 0

    def save(content: Any, file: Any, **kwargs: Any) -> None:
        nonlocal calls
        saved(content, file, **kwargs)
        calls += ".ckpt.partial" in str(getattr(file, "name", ""))
        if calls == number:
            file.flush()
            file.truncate(file.tell() // 2)
            die()

    torch.save = save


# What a run leaves.


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
        own = ("seconds", "log_dir", "model_dir", "events")
        return {key: _plain(value) for key, value in content.items() if key not in own}
    return content


def unequal(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two checkpoints differ, bit for bit, apart from times."""
    if type(one) is not type(other):
        return [f"{where}: {type(one).__name__} and {type(other).__name__}"]
    if isinstance(one, Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [where]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{where}: {sorted(map(str, one.keys() ^ other.keys()))}"]
        keys = [key for key in one if key not in ("seconds", "events")]
        return [difference for key in keys for difference in unequal(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [f"{where}: {len(one)} and {len(other)} entries"]
        return [d for i, (a, b) in enumerate(zip(one, other, strict=True)) for d in unequal(a, b, f"{where}/{i}")]
    return [] if one == other else [f"{where}: {one} and {other}"]


class Reference(NamedTuple):
    """An undisturbed run in ``folder/reference``."""

    folder: Path
    changes: int
    """How often it changed a file."""
    seconds: float

    @classmethod
    def make(cls, folder: Path, *argv: str, ranks: int = 1) -> Reference:
        """Run what ``crash.yaml`` in ``folder`` says."""
        started = time.perf_counter()
        codes = fit(folder, *argv, ranks=ranks, moment=Moment("count", 0))
        assert codes == [0] * ranks, logs(folder)
        (folder / "run").rename(folder / "reference")
        return cls(folder, int((folder / "changes").read_text()), time.perf_counter() - started)


MODULES = {"DAPOModule": "ibro_lightning.modules.dapo", "PPOModule": "ibro_lightning.modules.ppo"}


def phases(algorithm: str) -> list[Moment]:
    """A moment in each phase of an iteration, and around it. The runs have three iterations of two optimizer steps, and
    are evaluated before, once within training, and after it."""
    module = f"{MODULES[algorithm]}.{algorithm}"
    return [
        Moment("ibro_lightning.engines.hf.HFEngine.generate", 5),
        Moment("user_code.SaysEquals.verify", 70),
        Moment(f"{module}.prepare", 2, after=True),
        Moment("ibro_lightning.modules.base.PolicyModule.clip_and_step", 4, after=True),
        Moment("half", 2),
        Moment("ibro_lightning.modules.base.PolicyModule.validation_step", 2, after=True),
        Moment("ibro_lightning.modules.base.PolicyModule.validation_step", 3, after=True),
        Moment("transformers.PreTrainedTokenizerBase.save_pretrained", 1),
        Moment("ibro_lightning.callbacks.RunSummary._write", 1),
    ]
