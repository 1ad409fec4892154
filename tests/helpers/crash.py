"""Runs that are killed, go on, and are compared with one that was not: for test_crash.py and benchmarks/crash_test.py.

A moment to be killed at is either a time, or the n-th call of a function, or the n-th time that the run changes a file:
Python announces each of those before it happens (``sys.addaudithook``), so that no order of file operations is missed.
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from helpers.processes import HANGS_S, logs, start_ranks

CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate", "shutil.rmtree"}


@dataclass(frozen=True)
class Moment:
    """When to be killed.

    Args:
        what: ``time``, ``file``, ``half`` (a checkpoint's file is half written), the path of a function, or ``term``:
            after a time as well, by SIGTERM, which a run answers with a checkpoint.
        number: seconds, or how many of these come before the one.
        after: kill when the function has returned, not before it is called.
        stop: send SIGTERM to the calling process in place of SIGKILL.
    """

    what: str
    number: float
    after: bool = False
    stop: bool = False

    def __str__(self) -> str:
        number = f"{self.number:.2f}s" if self.what in ("time", "term") else f"{self.number:.0f}"
        return f"{self.what.rsplit('.', 1)[-1]}-{number}{'-after' if self.after else ''}{'-stop' if self.stop else ''}"


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
    dynamic_sampling: {{max_rounds: 2, on_exhausted: fill, max_skips: 1000000}}
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


def fit_argv(folder: Path, *argv: str, ranks: int = 1, strategy: str = "fsdp2") -> list[str]:
    """``fit --config crash.yaml`` in ``folder``, by so many ranks."""
    several = ["--config", "folders.yaml"] if (folder / "folders.yaml").exists() else ["--trainer.strategy", strategy]
    return ["fit", "--config", "crash.yaml", *(["--trainer.devices", str(ranks), *several] if ranks > 1 else []), *argv]


def fit(folder: Path, *argv: str, ranks: int = 1, moment: Moment | None = None) -> list[int | None]:
    """The exit codes of the processes of :func:`fit_argv`: -9 for those that were killed."""
    return finish(start(folder, fit_argv(folder, *argv, ranks=ranks), ranks=ranks, moment=moment), moment)


def start(
    folder: Path, argv: Sequence[str], *, ranks: int = 1, moment: Moment | None = None, log: str | None = None
) -> list[BaseProcess]:
    """A command in ``folder``, on so many ranks.

    Args:
        log: its output goes there, if others use ``folder`` at the same time.
    """
    return start_ranks(ranks, _run, list(argv), moment, log, folder=folder)


def finish(processes: Sequence[BaseProcess], moment: Moment | None = None) -> list[int | None]:
    """Exit codes: -9 for processes that were killed."""
    first = processes[0]
    if moment is not None and moment.what in ("time", "term"):
        first.join(moment.number)
        (first.kill if moment.what == "time" else first.terminate)()
    first.join(HANGS_S)
    for process in processes:
        # Killed, the machine is lost with all its processes; if it is refused (2), the others wait in vain.
        if first.exitcode is not None and first.exitcode >= 0 and first.exitcode != 2:
            process.join(HANGS_S)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def kill(folder: Path, moment: Moment, *argv: str, ranks: int = 1, fresh: bool = True) -> bool:
    """A run that is killed, or stopped, at ``moment``; False if it ended before that."""
    if fresh:
        clear(folder)
    expected = 128 + signal.SIGTERM if moment.stop else -signal.SIGKILL
    return fit(folder, *argv, ranks=ranks, moment=moment)[0] == expected


def clear(folder: Path) -> None:
    """Remove what runs have left, locks of killed ones among it."""
    for left in [*folder.glob("run*"), *folder.glob(".run*")]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def go_on(folder: Path, *argv: str, ranks: int = 1) -> None:
    """Go on with the run in ``folder``, to its end."""
    codes = fit(folder, "--ckpt_path", "last", *argv, ranks=ranks)
    assert codes == [0] * ranks, f"exit codes {codes}\n{logs(folder)}"


def _run(argv: Sequence[str], moment: Moment | None, log: str | None) -> None:
    from helpers.forked import fork_engines
    from ibro_lightning.cli.main import main

    fork_engines()
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
    if moment is not None and int(os.environ.get("RANK", "0")) == 0:
        arm(moment)
    main(list(argv))


def die(number: signal.Signals = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def arm(moment: Moment) -> None:
    """Have this process killed at ``moment``."""
    if moment.what in ("file", "count"):
        sys.addaudithook(_count_changes(int(moment.number)))
    elif moment.what == "half":
        _save_half(int(moment.number))
    elif moment.what not in ("time", "term"):
        path, name = moment.what.rsplit(".", 1)
        module, last = path.rsplit(".", 1)
        is_class = last[0].isupper()
        target = getattr(importlib.import_module(module), last) if is_class else importlib.import_module(path)
        setattr(target, name, _counted(getattr(target, name), moment))


def _counted(function: Callable[..., Any], moment: Moment) -> Callable[..., Any]:
    calls = 0
    number = signal.SIGTERM if moment.stop else signal.SIGKILL

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == moment.number and not moment.after:
            die(number)
        result = function(*args, **kwargs)
        if calls == moment.number and moment.after:
            die(number)
        return result

    return called


def _count_changes(number: int) -> Callable[[str, tuple[Any, ...]], None]:
    """Dies before change ``number``; 0: keeps count in the file ``changes``."""
    folder, seen = Path.cwd(), 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if changes_a_file(event, arguments, folder):
            seen += 1
            if seen == number:
                die()
            if not number:
                Path("changes").write_text(str(seen))

    return hook


def changes_a_file(event: str, arguments: tuple[Any, ...], folder: Path) -> bool:
    """Does an audit event announce that a file or folder of the run in ``folder``, or its lock, is made, moved or
    removed?"""
    if event == "open":
        path, _, flags = arguments
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return False
    elif event in CHANGES:
        path = arguments[1] if event == "os.symlink" else arguments[0]
    else:
        return False
    ours = (str(folder / "run"), str(folder / ".run"))
    return isinstance(path, str | os.PathLike) and os.path.abspath(os.fspath(path)).startswith(ours)


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


class Reference(NamedTuple):
    """An undisturbed run in ``folder/reference``."""

    folder: Path
    changes: int
    """How often it changed a file."""
    seconds: float

    @classmethod
    def make(cls, folder: Path, *argv: str, ranks: int = 1) -> Reference:
        """Run what ``crash.yaml`` in ``folder`` says."""
        return cls.of(folder, fit_argv(folder, *argv, ranks=ranks), ranks=ranks)

    @classmethod
    def of(cls, folder: Path, argv: Sequence[str], *, ranks: int = 1) -> Reference:
        """Run a command, and keep what is in ``folder/run`` then."""
        started, moment = time.perf_counter(), Moment("count", 0)
        codes = finish(start(folder, argv, ranks=ranks, moment=moment), moment)
        assert codes == [0] * ranks, logs(folder)
        seconds = time.perf_counter() - started
        (folder / "run").rename(folder / "reference")
        return cls(folder, int((folder / "changes").read_text()), seconds)


MODULES = {"DAPOModule": "ibro_lightning.modules.dapo", "PPOModule": "ibro_lightning.modules.ppo"}


def phases(algorithm: str) -> list[Moment]:
    """A moment in each phase of an iteration, and around it. The runs have three iterations of two optimizer steps, and
    are evaluated before, once within training, and after it."""
    module = f"{MODULES[algorithm]}.{algorithm}"
    return [
        Moment("ibro_lightning.engines.hf.HFEngine.generate", 5),
        Moment("user_code.SaysEquals.verify", 70),
        Moment(f"{module}.prepare", 2, after=True),
        Moment("ibro_lightning.update.updater.Updater.clip_and_step", 4, after=True),
        Moment("half", 2),
        Moment("ibro_lightning.modules.policy_module.PolicyModule.validation_step", 2, after=True),
        Moment("ibro_lightning.modules.policy_module.PolicyModule.validation_step", 3, after=True),
        Moment("transformers.PreTrainedTokenizerBase.save_pretrained", 1),
        Moment("ibro_lightning.callbacks.RunSummary._write", 1),
    ]
