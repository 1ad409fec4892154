"""Runs are killed (SIGKILL) at all kinds of moments and go on; they must end as if nothing had happened, bit for bit:
weights, optimizer states, curves, rollouts, evaluations, the list of files, and no temporary file. A longer version is
``benchmarks/crash_test.py``."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from conftest import USER_CODE
from crash_helpers import Moment, Reference, differences, go_on, kill, phases, unequal, write_recipe

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


@pytest.mark.parametrize(
    ("algorithm", "moment"), [(name, moment) for name in ALGORITHMS for moment in phases(name)], ids=str
)
def test_killed_in_a_phase(references: dict[str, Reference], algorithm: str, moment: Moment) -> None:
    folder = references[algorithm].folder
    assert kill(folder, moment), f"{moment} never came"
    go_on(folder)
    check(folder, str(moment))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
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


SHARDS = "torch.distributed.checkpoint.filesystem._write_item"


@pytest.mark.parametrize(
    ("algorithm", "saving"), [("DAPOModule", Moment("half", 2)), ("PPOModule", Moment(SHARDS, 70, after=True))]
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
        Moment("ibro_lightning.modules.base.PolicyModule.clip_and_step", 3, after=True),
    ]
    for number, moment in enumerate(moments):
        assert kill(tmp_path, moment, "--ckpt_path", "last", ranks=2, fresh=not number), f"{moment} never came"
    go_on(tmp_path, ranks=2)
    check(tmp_path, algorithm)


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
