"""Runs are killed (SIGKILL) at all kinds of moments and go on; they must end as if nothing had happened, bit for bit:
weights, optimizer states, curves, rollouts, evaluations, the list of files, and no temporary file. A longer version is
``benchmarks/crash_test.py``."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import crash_helpers
from conftest import USER_CODE
from crash_helpers import Moment, count_changes, differences, kill_and_go_on, write_recipe

ALGORITHMS = {"DAPOModule": "ibro_lightning.modules.dapo", "PPOModule": "ibro_lightning.modules.ppo"}


def phases(algorithm: str) -> list[Moment]:
    """A moment in each phase of an iteration, and around it. Three iterations of two optimizer steps, over 10 questions
    of evaluation before, once within training, and after it."""
    module = f"{ALGORITHMS[algorithm]}.{algorithm}"
    return [
        Moment("ibro_lightning.engines.hf.HFEngine.generate", 3),
        Moment("user_code.SaysEquals.verify", 70),
        Moment(f"{module}.prepare", 2, after=True),
        Moment("ibro_lightning.modules.base.PolicyModule.clip_and_step", 4, after=True),
        Moment("half", 2),
        Moment("ibro_lightning.modules.base.PolicyModule.validation_step", 2, after=True),
        Moment("ibro_lightning.models.policy.Policy.forward", 1),
        Moment(f"{module}.export", 1),
        Moment("transformers.PreTrainedTokenizerBase.save_pretrained", 1),
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> dict[str, tuple[Path, int, float]]:
    """For each algorithm a folder with an undisturbed run in ``reference``, how often that changed a file, and how long
    it took."""
    prepared = {}
    for algorithm in ALGORITHMS:
        folder = tmp_path_factory.mktemp(algorithm)
        write_recipe(folder, algorithm, tiny_policy, USER_CODE)
        changes, seconds = count_changes(folder)
        (folder / "run").rename(folder / "reference")
        prepared[algorithm] = folder, changes, seconds
    return prepared


def check(folder: Path, moment: Moment, *, must_die: bool = True) -> None:
    killed = kill_and_go_on(folder, moment)
    assert killed or not must_die, f"{moment} never came"
    assert differences(folder / "reference", folder / "run") == [], str(moment)
    assert not (folder / "run.1").exists(), "nothing was given up"


@pytest.mark.parametrize(
    ("algorithm", "moment"),
    [(algorithm, moment) for algorithm in ALGORITHMS for moment in phases(algorithm)],
    ids=str,
)
def test_killed_in_a_phase(folders: dict[str, tuple[Path, int, float]], algorithm: str, moment: Moment) -> None:
    check(folders[algorithm][0], moment)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_killed_before_a_file_is_changed(
    folders: dict[str, tuple[Path, int, float]], algorithm: str, share: float
) -> None:
    """A random one of all file operations of a run, from each fifth of them."""
    folder, changes, _ = folders[algorithm]
    number = round(changes * (share + random.uniform(-0.1, 0.1)))
    check(folder, Moment("file", max(1, min(number, changes))))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_killed_at_a_random_time(folders: dict[str, tuple[Path, int, float]], algorithm: str) -> None:
    folder, _, seconds = folders[algorithm]
    check(folder, Moment("time", random.uniform(0.2, seconds)), must_die=False)


def test_the_comparison_finds_a_point_a_weight_and_a_file_too_many(
    folders: dict[str, tuple[Path, int, float]], tmp_path: Path
) -> None:
    """Otherwise the tests above would show nothing."""
    import shutil

    reference = folders["DAPOModule"][0] / "reference"
    other = tmp_path / "run"
    shutil.copytree(reference, other, symlinks=True)
    assert differences(reference, other) == []
    (other / "model.partial").mkdir()
    assert any("model.partial" in found for found in differences(reference, other))
    (other / "model.partial").rmdir()
    events = next(other.glob("events.*"))
    events.with_name(events.name + "1").write_bytes(events.read_bytes())
    assert any(found.startswith("curve ") for found in differences(reference, other))
    assert crash_helpers.unequal({"a": [1.0]}, {"a": [1.0 + 1e-16]}) == []
    assert crash_helpers.unequal({"a": [1.0]}, {"a": [1.0 + 1e-15]}) == ["/a/0: 1.0 and 1.000000000000001"]
