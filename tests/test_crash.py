"""Runs are killed (SIGKILL) at all kinds of moments and go on; they must end as if nothing had happened, bit for bit:
weights, optimizer states, curves, rollouts, evaluations, the list of files, and no temporary file. A longer version is
``benchmarks/crash_test.py``."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.crash import Moment, Reference, go_on, kill, phases, write_recipe
from helpers.crash_trials import FOREIGN, KINDS, LAST, OVERLAP, Bench, Foreign
from helpers.quick import slow_unless
from helpers.run_comparison import curves, differences, unequal
from helpers.user_code import USER_CODE
from ibro_lightning.runs.checkpoints.index import ABOUT
from ibro_lightning.runs.checkpoints.plugin import read_about

ALGORITHMS = ("DAPOModule", "PPOModule")


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> dict[str, Reference]:
    """For each algorithm a folder with an undisturbed run."""
    made = {}
    for algorithm in ALGORITHMS:
        folder = tmp_path_factory.mktemp(algorithm)
        write_recipe(folder, algorithm, tiny_policy, USER_CODE)
        made[algorithm] = Reference.make(folder)
    return made


def check(folder: Path, story: str) -> None:
    assert differences(folder / "reference", folder / "run") == [], story
    # A run that was killed before its first checkpoint, but after its first rollout, is moved aside and begun anew.
    assert not list(folder.glob("run.*/checkpoints/*.ckpt")), f"nothing was given up: {story}"


def in_phases() -> list[Any]:
    """The quick tests kill while sampling, while saving and at the end, and with PPO in an update."""
    quick = {"DAPOModule": ("generate", "half", "_write"), "PPOModule": ("clip_and_step",)}
    cases = [(name, moment) for name in ALGORITHMS for moment in phases(name)]
    return slow_unless(lambda case: str(case[1]).startswith(quick[case[0]]), cases)


@pytest.mark.parametrize(("algorithm", "moment"), in_phases(), ids=str)
def test_killed_in_a_phase(references: dict[str, Reference], algorithm: str, moment: Moment) -> None:
    folder = references[algorithm].folder
    assert kill(folder, moment), f"{moment} never came"
    go_on(folder)
    check(folder, str(moment))


@pytest.mark.parametrize("algorithm", slow_unless(lambda name: name == "PPOModule", ALGORITHMS))
def test_killed_again_and_again(references: dict[str, Reference], algorithm: str) -> None:
    """Before a random one of all its file operations, after a random time, and so on."""
    folder, changes, seconds = references[algorithm]
    draw = random.Random()
    moments = [Moment("file", draw.randint(1, changes)) if i % 2 else Moment("time", draw.uniform(0.3, 1.0) * seconds)
               for i in range(4)]  # fmt: skip
    for number, moment in enumerate(moments):
        kill(folder, moment, "--ckpt_path", "last", fresh=not number)
    go_on(folder)
    check(folder, ", ".join(map(str, moments)))


UPDATES = "ibro_lightning.update.updater.Updater.clip_and_step"


@pytest.mark.parametrize(
    ("algorithm", "ranks"),
    [("DAPOModule", 1), pytest.param("PPOModule", 2, marks=pytest.mark.slow)],
)
def test_killed_while_a_rollout_is_in_flight(algorithm: str, ranks: int, tiny_policy: Path, tmp_path: Path) -> None:
    """In the engine's call, in an update, and while the checkpoint is written that has the rollout; and stopped by
    SIGTERM in an update, whose checkpoint waits for the rollout, and while it is waited for."""
    settings = OVERLAP
    if ranks == 1:  # checkpoints within epochs as well as at their ends
        epochs = ("--data.rollouts_per_epoch", "2", "--trainer.max_epochs", "2")
        settings = (*OVERLAP, *epochs, "--trainer.check_val_every_n_epoch", "1")
    write_recipe(tmp_path, algorithm, tiny_policy, USER_CODE)
    Reference.make(tmp_path, *settings, ranks=ranks)
    moments = [
        Moment("half", 1),
        Moment(UPDATES, 3 if algorithm == "DAPOModule" else 5),
        Moment("ibro_lightning.engines.EngineProcess.generate", 2),
        Moment(UPDATES, 1, stop=True),
        Moment("ibro_lightning.datamodules.in_flight.InFlight.result", 1, stop=True),
    ]
    for number, moment in enumerate(moments):
        assert kill(tmp_path, moment, *settings, *LAST, ranks=ranks, fresh=not number), f"{moment} never came"
    go_on(tmp_path, *settings, ranks=ranks)
    check(tmp_path, f"{algorithm} with overlap")


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [(), OVERLAP], ids=["", "overlap"])
def test_killed_with_a_curriculum(overlap: tuple[str, ...], tiny_policy: Path, tmp_path: Path) -> None:
    """The outcomes of the rollouts before a checkpoint, and with overlap of the one in flight, decide what comes."""
    settings = (*overlap, "--trainer.max_epochs", "5", "--data.source", "DifficultyPools")
    settings += ("--data.source.source", "user_code.Starts", "--data.source.low", "0.25", "--data.source.high", "0.5")
    write_recipe(tmp_path, "DAPOModule", tiny_policy, USER_CODE)
    Reference.make(tmp_path, *settings)
    assert min(value for _, value in curves(tmp_path / "reference")["curriculum/admitted"]) < 1
    engine = (
        "ibro_lightning.engines.EngineProcess.generate" if overlap else "ibro_lightning.engines.hf.HFEngine.generate"
    )
    moments = [Moment("half", 2), Moment(engine, 2), Moment(UPDATES, 3), Moment(UPDATES, 1, stop=True)]
    for number, moment in enumerate(moments):
        assert kill(tmp_path, moment, *settings, *LAST, fresh=not number), f"{moment} never came"
    go_on(tmp_path, *settings)
    check(tmp_path, "with a curriculum")


SHARDS = "torch.distributed.checkpoint.filesystem._write_item"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "saving"),
    [
        ("DAPOModule", Moment("half", 2)),
        ("PPOModule", Moment(SHARDS, 70, after=True)),
    ],
)
def test_two_sharded_ranks_killed_again_and_again(
    algorithm: str, saving: Moment, tiny_policy: Path, tmp_path: Path
) -> None:
    """While sampling in the first iteration, while saving (one file with DAPO; with PPO a folder, into which every
    tensor is saved for itself), and in an update."""
    write_recipe(tmp_path, algorithm, tiny_policy, USER_CODE, folders=algorithm == "PPOModule")
    Reference.make(tmp_path, ranks=2)
    moments = [
        Moment("ibro_lightning.engines.hf.HFEngine.generate", 3),
        saving,
        Moment("ibro_lightning.update.updater.Updater.clip_and_step", 3, after=True),
    ]
    for number, moment in enumerate(moments):
        assert kill(tmp_path, moment, "--ckpt_path", "last", ranks=2, fresh=not number), f"{moment} never came"
    go_on(tmp_path, ranks=2)
    check(tmp_path, algorithm)


def stop_in_an_evaluation_and_go_on(folder: Path, ranks: int = 1) -> None:
    """The checkpoint that the stopped run leaves says that its iteration is not evaluated."""
    evaluates = Moment("ibro_lightning.callbacks.Interruptions.on_validation_start", 2, after=True, stop=True)
    assert kill(folder, evaluates, ranks=ranks), f"{evaluates} never came"
    checkpoint = folder / "run" / "checkpoints" / "iteration_000002.ckpt"
    assert not read_about(checkpoint)[ABOUT]["evaluated"]
    go_on(folder, ranks=ranks)
    assert read_about(checkpoint)[ABOUT]["evaluated"]
    check(folder, str(evaluates))


@pytest.mark.parametrize("algorithm", slow_unless(lambda name: name == "DAPOModule", ALGORITHMS))
def test_stopped_in_an_evaluation(references: dict[str, Reference], algorithm: str) -> None:
    stop_in_an_evaluation_and_go_on(references[algorithm].folder)


@pytest.mark.slow
def test_two_ranks_that_save_shards_stopped_in_an_evaluation(tiny_policy: Path, tmp_path: Path) -> None:
    """Their checkpoint is a folder, whose shards stay when the evaluation has been made."""
    write_recipe(tmp_path, "PPOModule", tiny_policy, USER_CODE, folders=True)
    Reference.make(tmp_path, ranks=2)
    stop_in_an_evaluation_and_go_on(tmp_path, ranks=2)


def test_the_comparison_finds_a_file_a_point_and_a_bit_too_many(
    references: dict[str, Reference], tmp_path: Path
) -> None:
    """Otherwise the tests above would show nothing."""
    reference, other = references["DAPOModule"].folder / "reference", tmp_path / "run"
    shutil.copytree(reference, other, symlinks=True)
    assert differences(reference, other) == []
    (other / "model.partial").mkdir()
    assert differences(reference, other) == ["files: ['model.partial']"]
    (other / "model.partial").rmdir()
    events = max(other.glob("events.*"), key=lambda path: path.stat().st_size)
    events.with_name(events.name + "1").write_bytes(events.read_bytes())
    assert all(found.startswith("curve ") for found in differences(reference, other))
    assert len(differences(reference, other)) > 20
    assert unequal({"a": [1.0]}, {"a": [1.0]}) == []
    assert unequal({"a": [1.0]}, {"a": [1.0 + 2**-52]}) == ["/a/0: 1.0 and 1.0000000000000002"]


@pytest.mark.parametrize("name", slow_unless(lambda name: name == "validate", KINDS))
def test_two_go_on_at_once_among_files_of_other_people(name: str, tiny_policy: Path, tmp_path: Path) -> None:
    """One of them does, and the other is refused, or finds nothing left to do. The benchmark draws other moments."""
    bench = Bench(name, KINDS[name], tmp_path, tiny_policy, seed=0)
    outcome = bench.trial(0, starts=2)
    assert outcome.differences == [], outcome
    assert outcome.touched == [], outcome


def test_a_trial_finds_files_of_other_people_that_are_gone_or_changed(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    foreign = Foreign(tmp_path, FOREIGN)
    foreign.plant()
    foreign.plant_later()
    assert foreign.touched() == []
    (tmp_path / "run" / "notes.txt").write_text("another text")
    (tmp_path / "run" / "checkpoints" / "notes.md").unlink()
    (tmp_path / "run" / ".hidden").rename(tmp_path / "run" / "elsewhere")
    assert foreign.touched() == ["run/.hidden", "run/checkpoints/notes.md", "run/notes.txt"]
