"""Trials of the long crash test: a command is killed at a random moment, among files of other people; one like it goes
on, or two at once; and all that is left is compared with what an undisturbed one leaves."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from helpers.crash import Moment, Reference, clear, finish, fit_argv, start, write_recipe
from helpers.processes import logs
from helpers.run_comparison import curves, differences
from helpers.user_code import USER_CODE

FOREIGN = ("notes.txt", "mine/deep/table.csv", "mine/iteration_000001.json", "config.yaml.mine", ".hidden")
"""Files of other people, within a run's folder and beside it."""
FOREIGN_LATER = ("checkpoints/notes.md", "evaluations/mine.txt", "rollouts/mine.csv")
"""In folders that a run has made."""
LIKE_OURS = (
    "mine/data.partial",
    "thesis.partial",
    "checkpoints/iteration_000002.ckpt.mine",
    "rollouts/x.parquet.partial",
)
"""With names that a careless clean-up would take for ours."""
LAST = ("--ckpt_path", "last")
OVERLAP = ("--data.max_staleness", "1")


@dataclass(frozen=True)
class Kind:
    """What is killed.

    Args:
        settings: of training.
        strategy: of several ranks; ``shards`` is fsdp2 whose checkpoints are folders.
        command: ``fit``, or what is done with a finished run.
    """

    algorithm: str = "DAPOModule"
    settings: tuple[str, ...] = ()
    ranks: int = 1
    strategy: str = "fsdp2"
    command: str = "fit"


KINDS = {
    "dapo": Kind(),
    "ppo": Kind("PPOModule"),
    "lora": Kind(settings=("--model.policy_options.lora.rank", "4")),
    "pool": Kind(settings=("--data.reward_pool.workers", "1")),
    "overlap": Kind(settings=OVERLAP),
    "ddp": Kind(ranks=2, strategy="ddp"),
    "shards": Kind("PPOModule", ranks=2, strategy="shards"),
    "overlap2": Kind("PPOModule", settings=OVERLAP, ranks=2),
    "validate": Kind(command="validate"),
    "predict": Kind(command="predict"),
    "export": Kind("PPOModule", command="export"),
}
EXPORTED = "run-exported"


@dataclass
class Outcome:
    """What a trial showed."""

    kind: str
    number: int
    moment: str
    killed: bool
    """Whether the moment came before the command ended."""
    starts: int
    """How many went on at once."""
    refused: int
    """How many of these were refused."""
    differences: list[str]
    touched: list[str]
    """Files of other people that are gone, or have other bytes."""
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Bench:
    """A folder in which one kind of command is killed again and again."""

    name: str
    kind: Kind
    folder: Path
    policy: Path
    foreign: tuple[str, ...] = FOREIGN
    seed: int = 0

    def argv(self, *more: str) -> list[str]:
        kind = self.kind
        if kind.command == "export":
            return ["export", "--run", "run", *LAST, "--output", f"{EXPORTED}/model", "--overwrite"]
        argv = fit_argv(self.folder, *kind.settings, *more, ranks=kind.ranks, strategy=kind.strategy)
        return argv if kind.command == "fit" else [kind.command, *argv[1:], *LAST]

    @cached_property
    def reference(self) -> Reference:
        """The undisturbed command; made when it is first asked for."""
        kind = self.kind
        write_recipe(self.folder, kind.algorithm, self.policy, USER_CODE, folders=kind.strategy == "shards")
        if kind.command == "fit":
            return Reference.of(self.folder, self.argv(), ranks=kind.ranks)
        trained = Reference.of(self.folder, fit_argv(self.folder, *kind.settings))
        trained.folder.joinpath("reference").rename(self.folder / "trained")
        self._begin()
        made = Reference.of(self.folder, self.argv())
        if kind.command == "export":
            (self.folder / EXPORTED).rename(self.folder / "reference-exported")
        return made

    def _begin(self) -> None:
        clear(self.folder)
        if self.kind.command != "fit":
            shutil.copytree(self.folder / "trained", self.folder / "run", symlinks=True)

    def moment(self, number: int) -> Moment:
        """Before a random change of a file, or after a random time; now and then by SIGTERM."""
        draw = random.Random(f"{self.seed} {self.name} {number}")
        if draw.random() < 0.5:
            return Moment("file", draw.randint(1, self.reference.changes))
        what = "term" if draw.random() < 0.2 else "time"
        return Moment(what, draw.uniform(0.1, 1.0) * self.reference.seconds)

    def trial(self, number: int, *, starts: int = 1) -> Outcome:
        """Kill one, and have so many at once go on: one does, the others are refused or come when it is over."""
        moment = self.moment(number)
        self._begin()
        foreign = Foreign(self.folder, self.foreign)
        foreign.plant()
        codes = finish(start(self.folder, self.argv(), ranks=self.kind.ranks, moment=moment), moment)
        foreign.plant_later()
        more = LAST if self.kind.command == "fit" else ()
        running = [
            start(self.folder, self.argv(*more), ranks=self.kind.ranks, log=f"start_{i}.log" if starts > 1 else None)
            for i in range(starts)
        ]
        ended = [finish(processes) for processes in running]
        went_on = [[0] * self.kind.ranks == one for one in ended]
        refused = [2 in one and 0 not in one for one in ended]  # one rank says so, and the others are ended
        found = (
            []
            if all(a or b for a, b in zip(went_on, refused, strict=True))
            else [f"exit codes {ended}: {self._said()}"]
        )
        if not any(went_on):
            found.append(f"none went on: {ended}: {self._said()}")
        touched = foreign.touched()
        foreign.uproot()
        return Outcome(
            kind=self.name,
            number=number,
            moment=str(moment),
            killed=codes[0] != 0,
            starts=starts,
            refused=sum(refused),
            differences=found or self._differences(),
            touched=touched,
        )

    def _said(self) -> str:
        return logs(self.folder)[-2000:] + "".join(p.read_text()[-1000:] for p in self.folder.glob("start_*.log"))

    def _differences(self) -> list[str]:
        """Except for what a command had completed, which a second one keeps beside its own."""
        run, reference = self.folder / "run", self.folder / "reference"
        kept = [*run.glob("evaluations/validate.[0-9]*"), *run.glob("predictions.[0-9]*")]
        for aside in [*kept, *(self.folder / EXPORTED).glob("*.[0-9]*")]:
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
        found = differences(reference, run)
        if (shown := reference / "evaluations" / "validate" / "_curves").exists():
            same = curves(shown) == curves(run / "evaluations" / "validate" / "_curves")
            found += [] if same else ["curves of validate"]
        if self.kind.command == "export":
            exported = [differences(self.folder / "reference-exported", self.folder / EXPORTED)]
            found += [f"{EXPORTED}: {difference}" for difference in exported[0]]
        left = sorted(path.name for path in self.folder.glob(".run*"))
        return found + ([f"left: {left}"] if left else [])


class Foreign:
    """Files of other people in ``folder/run`` and beside it."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, names
        self._planted: dict[Path, bytes] = {}

    def plant(self) -> None:
        early = [name for name in self.names if name.split("/")[0] not in ("checkpoints", "evaluations", "rollouts")]
        self._write([self.folder / "run" / name for name in early])
        self._write([self.folder / f"run.{number}.mine" / name for number, name in enumerate(early)])

    def plant_later(self) -> None:
        """In the folders that a command has made."""
        late = {*FOREIGN_LATER, *self.names}
        paths = [self.folder / "run" / name for name in sorted(late) if "/" in name]
        self._write([path for path in paths if path.parent.is_dir() and not path.exists()])

    def _write(self, paths: Sequence[Path]) -> None:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = f"somebody's {path} {len(self._planted)}".encode()
            path.write_bytes(content)
            self._planted[path] = content

    def touched(self) -> list[str]:
        """Those that are not where they were, or have other bytes."""
        wrong = [path for path, content in self._planted.items() if not path.is_file() or path.read_bytes() != content]
        return sorted(str(path.relative_to(self.folder)) for path in wrong)

    def uproot(self) -> None:
        """Leave what the command wrote."""
        for path in self._planted:
            path.unlink(missing_ok=True)
            for parent in path.parents:
                if parent == self.folder or not parent.is_dir() or any(parent.iterdir()):
                    break
                parent.rmdir()
