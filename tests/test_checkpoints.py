"""Checkpoints: whole or absent, harmless to read, found by name, loaded by any strategy, exported."""

from __future__ import annotations

import json
import logging
import os
import pickle
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from helpers.crash import write_recipe
from helpers.processes import logs, run_ranks
from helpers.runs import CHECKPOINTS, QUICK, content, curve, refusal, same, train, weights
from helpers.user_code import USER_CODE
from ibro_lightning.cli.main import main
from ibro_lightning.errors import ConfigError
from ibro_lightning.runs.checkpoints.catalog import checkpoint_name, iteration_of, newest_valid
from ibro_lightning.runs.checkpoints.plugin import CheckpointFiles, read_about, read_checkpoint
from ibro_lightning.runs.checkpoints.shards import save_shards
from ibro_lightning.runs.checkpoints.validity import check_fits, why_invalid
from ibro_lightning.runs.resume import check_continues, find_checkpoint

# One checkpoint on disk.


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("written")
    CheckpointFiles().save_checkpoint(content(), folder / "file.ckpt")
    save_shards(folder / "folder.ckpt", content(), is_first=True)
    return {"file": folder / "file.ckpt", "folder": folder / "folder.ckpt"}


@pytest.mark.parametrize("form", ["file", "folder"])
def test_what_is_read_is_what_was_written_bit_for_bit(written: dict[str, Path], form: str) -> None:
    assert why_invalid(written[form]) is None
    assert same(read_checkpoint(written[form]), content())
    assert same(CheckpointFiles().load_checkpoint(written[form]), content())
    assert read_about(written[form])["epoch"] == 3
    weights = CheckpointFiles(weights_alone=True).load_checkpoint(written[form])
    assert same(weights["state_dict"], content()["state_dict"])
    assert weights.keys() == {"state_dict", "pytorch-lightning_version"}


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_that_is_cut_anywhere_is_found_out(written: dict[str, Path], share: float) -> None:
    whole = written["file"].read_bytes()
    cut = written["file"].with_name("cut.ckpt")
    cut.write_bytes(whole[: int(share * len(whole))])
    assert why_invalid(cut) is not None
    with pytest.raises(ConfigError, match="ckpt_path"):
        read_checkpoint(cut)


@given(data=st.data())
def test_a_flipped_bit_is_found_out_or_harmless(written: dict[str, Path], data: st.DataObject) -> None:
    """torch itself loads damaged tensors without a word. (All bits were tried; this repeats a few.)"""
    whole = bytearray(written["file"].read_bytes())
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= 1 << data.draw(st.integers(0, 7))
    damaged = written["file"].with_name("damaged.ckpt")
    damaged.write_bytes(whole)
    assert why_invalid(damaged) is not None or same(read_checkpoint(damaged), content())


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "only a part"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda folder: (folder / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda folder: os.truncate(folder / "__0_0.distcp", 100), "has 100 bytes instead of"),
        (lambda folder: (folder / "meta.pt").write_bytes(b""), "meta.pt has 0 bytes"),
    ],
)
def test_a_folder_that_is_not_whole_is_found_out(
    written: dict[str, Path], tmp_path: Path, harm: Any, reason: str
) -> None:
    folder = shutil.copytree(written["folder"], tmp_path / "folder.ckpt")
    harm(folder)
    assert reason in str(why_invalid(folder))


class Evil:
    """Unpickling this leaves a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("where", ["file", "rest", "index", "value"])
def test_a_checkpoint_cannot_run_code(written: dict[str, Path], tmp_path: Path, where: str) -> None:
    trace, path = tmp_path / "trace", tmp_path / "evil.ckpt"
    if where == "file":
        torch.save({**content(), "more": Evil(trace)}, path)
    else:
        shutil.copytree(written["folder"], path)
        if where == "rest":
            torch.save({"optimizer_states": [], "more": Evil(trace)}, path / "meta.pt")
        elif where == "index":
            (path / ".metadata").write_bytes(pickle.dumps(Evil(trace)))
        else:  # DCP would unpickle a value that stands where a tensor is expected
            tensors = {f"weight/{name}": value for name, value in content()["state_dict"].items()}
            save({**tensors, "weight/half": Evil(trace)}, storage_writer=FileSystemWriter(path), no_dist=True)
    if where != "value":
        with pytest.raises(ConfigError, match="is not loaded"):
            read_checkpoint(path)
    else:
        assert "half" not in read_checkpoint(path)["state_dict"]
    assert not trace.exists()


def test_another_models_weights_are_refused_in_one_line() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    check_fits(shapes, module, "a.ckpt")
    with pytest.raises(
        ConfigError, match=r"^ckpt_path: 'a.ckpt' - .*lacks 2 weights, such as 1.bias; .*1 .*more, such as x"
    ) as found:
        check_fits({"0.weight": (4, 3), "0.bias": (4,), "x": (1,)}, module, "a.ckpt")
    assert "\n" not in str(found.value)
    with pytest.raises(ConfigError, match=r"its 0.weight is \[5, 3\], not \[4, 3\]"):
        check_fits({**shapes, "0.weight": (5, 3)}, module, "a.ckpt")


def test_the_newest_whole_one_is_found_and_the_others_named(written: dict[str, Path], tmp_path: Path) -> None:
    for iteration in (5, 1_000_000, 40, 300):
        shutil.copy(written["file"], tmp_path / checkpoint_name(iteration))
    os.truncate(tmp_path / checkpoint_name(1_000_000), 200)
    shutil.copytree(written["folder"], tmp_path / checkpoint_name(301))
    (tmp_path / checkpoint_name(301) / "manifest.json").unlink()
    (tmp_path / "iteration_000400.ckpt.partial").write_bytes(b"half")
    (tmp_path / "last.ckpt").symlink_to(checkpoint_name(1_000_000))
    path, passed_over = newest_valid(tmp_path)
    assert path == tmp_path / checkpoint_name(300)
    assert [iteration_of(name) for name in passed_over] == [1_000_000, 301]
    assert newest_valid(tmp_path / "nowhere") == (None, {})


# Those of a run.


def names() -> list[str]:
    return sorted(path.name for path in CHECKPOINTS.iterdir() if iteration_of(path) is not None)


def test_the_newest_and_the_best_stay(workspace: Path) -> None:
    best = ["--checkpoint.best", "rollout/reward", "--checkpoint.keep_best", "2", "--checkpoint.keep_last", "1"]
    main([*QUICK, "--trainer.max_epochs", "6", *best])
    rewards = curve("rollout/reward")
    expected = {6, *sorted(rewards, key=lambda step: (-rewards[step], step))[:2]}
    assert names() == [checkpoint_name(iteration) for iteration in sorted(expected)]
    assert os.readlink(CHECKPOINTS / "last.ckpt") == checkpoint_name(6)
    main(["validate", "--config", "tiny.yaml", "--ckpt_path", "best"])
    best_one = find_checkpoint("best", Path("run"))
    assert best_one is not None
    assert best_one.is_absolute()
    # Going on from an older one in the same folder, which recipes name by a relative path, would mix two histories.
    with pytest.raises(ConfigError, match="is newer, and the folder would show two histories"):
        check_continues(CHECKPOINTS / checkpoint_name(min(expected)), Path("run"), "DAPOModule")


def test_a_better_evaluation_is_a_reason_for_a_checkpoint_and_the_end_is_another(workspace: Path) -> None:
    rarely = ["--checkpoint.every_n_iterations", "100", "--trainer.check_val_every_n_epoch", "1"]
    main(
        ["fit", "--config", "tiny.yaml", *rarely, "--checkpoint.best", "val/starts/avg@4", "--trainer.max_epochs", "4"]
    )
    accuracy = curve("val/starts/avg@4")
    records = [step for step in range(1, 5) if all(accuracy[step] > accuracy[before] for before in range(1, step))]
    written = sorted({*records, 4})
    assert names() == [checkpoint_name(step) for step in sorted({*written[-2:], records[-1]})]


def test_monitors_of_ours_and_of_lightnings_need_not_know_k(workspace: Path) -> None:
    stop = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val/accuracy"]
    stop += ["--trainer.callbacks.mode", "max", "--trainer.callbacks.stopping_threshold", "-1"]
    keep = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor", "val/starts/accuracy"]
    keep += ["--trainer.callbacks.dirpath", "kept", "--checkpoint.best", "val/starts/accuracy"]
    often = ["--trainer.check_val_every_n_epoch", "1", "--trainer.max_epochs", "9"]
    main(["fit", "--config", "tiny.yaml", *often, *stop, *keep])
    accuracy = curve("val/starts/avg@4")
    assert curve("val/starts/accuracy") == curve("val/accuracy") == accuracy
    assert max(accuracy) == 1, "stopped after the first evaluation"
    assert len(list(Path("kept").iterdir())) == 1
    assert find_checkpoint("best", Path("run")) is not None


def test_training_that_is_told_to_stop_ends_with_a_checkpoint(workspace: Path) -> None:
    rarely = ["--checkpoint.every_n_iterations", "0", "--trainer.max_epochs", "50", "--trainer.max_time", "00:00:00:01"]
    main([*QUICK, *rarely])
    (name,) = names()
    done = iteration_of(CHECKPOINTS / name) or 0
    assert 0 < done < 50
    main([*QUICK, "--trainer.max_epochs", str(done + 1), "--ckpt_path", "last"])
    main([*QUICK, "--trainer.max_epochs", str(done + 1), "--trainer.default_root_dir", "whole"])
    assert same(weights(), weights("whole"))


def test_an_unknown_metric_is_refused_with_names_that_are_known(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "checkpoint.best: 'rewrad' - there is no such metric" in refusal(
        [*QUICK, "--checkpoint.best", "rewrad"], capsys
    )


def test_last_passes_over_what_is_damaged_and_says_so(
    workspace: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*QUICK, "--trainer.max_epochs", "4", "--trainer.default_root_dir", "whole"])
    main([*QUICK, "--trainer.max_epochs", "3"])
    newest = CHECKPOINTS / checkpoint_name(3)
    os.truncate(newest, newest.stat().st_size // 2)
    said = refusal([*QUICK, "--ckpt_path", str(CHECKPOINTS / "last.ckpt")], capsys)
    assert "only a part" in said
    assert f"the newest valid one beside it is {CHECKPOINTS / checkpoint_name(2)}" in said
    with caplog.at_level(logging.INFO):
        main([*QUICK, "--trainer.max_epochs", "4", "--ckpt_path", "last"])
    assert f"skipped {newest}: this file is not a checkpoint, or only a part of one" in caplog.text
    assert f"the newest valid checkpoint is {CHECKPOINTS / checkpoint_name(2)}" in caplog.text
    assert same(weights(), weights("whole"))
    assert names() == [checkpoint_name(3), checkpoint_name(4)]
    for name in names():
        os.truncate(CHECKPOINTS / name, 10)
    assert "none of the 2 checkpoints in run is valid" in refusal([*QUICK, "--ckpt_path", "last"], capsys)


def test_a_run_goes_on_only_with_its_own_seed_algorithm_and_model(
    workspace: Path, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    from ibro_lightning.models import PolicyOptions, Qwen2FromScratch, export_folder
    from ibro_lightning.tasks import NumberPath

    main([*QUICK, "--trainer.max_epochs", "3", "--checkpoint.keep_last", "null"])
    more = [*QUICK, "--trainer.max_epochs", "4", "--ckpt_path"]
    said = refusal([*more, "last", "--seed_everything", "4"], capsys)
    assert "seed_everything: 4 - the run of" in said
    assert "has 3: write that" in said
    ppo = ["--model", "PPOModule"]
    assert "it is of a run with DAPOModule, this one has PPOModule" in refusal([*more, "last", *ppo], capsys)
    wide = Qwen2FromScratch(NumberPath(size=12), hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1)
    folder = export_folder(wide.build(PolicyOptions()), wide.tokenizer(), tmp_path_factory.mktemp("wide") / "model")
    other = [*more, "last", "--model.policy", str(folder)]
    assert "model.policy" in refusal(other, capsys)
    said = refusal([*other, "--resume.allow_changes", "true"], capsys)
    assert "another model or algorithm" in said
    assert "not [" in said
    said = refusal([*more, str(CHECKPOINTS / checkpoint_name(1))], capsys)
    assert f"{checkpoint_name(3)} beside it is newer" in said
    assert "two histories" in said
    elsewhere = ["--trainer.default_root_dir", "elsewhere"]
    main([*more, str(CHECKPOINTS / checkpoint_name(1)), *elsewhere])
    main([*more, "last"])
    assert same(weights(), weights("elsewhere"))


def test_last_starts_anew_where_there_is_nothing_to_go_on_with(
    workspace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One command for a job that may be its first try or its fifth. What a finished iteration left is not removed."""
    with caplog.at_level(logging.INFO):
        main([*QUICK, "--ckpt_path", "last"])
    assert "there is no checkpoint in run yet: starting from the beginning" in caplog.text
    once = weights()
    shutil.rmtree(CHECKPOINTS)
    main([*QUICK, "--ckpt_path", "last"])
    assert same(weights(), once)
    assert len(list(Path("run.1", "rollouts").iterdir())) == 2
    for part in ("checkpoints", "rollouts", "model"):
        shutil.rmtree(Path("run", part))
    main([*QUICK, "--ckpt_path", "last"])
    assert same(weights(), once)
    assert not Path("run.2").exists(), "a run that was killed in its first iteration is not worth keeping"


def test_a_finished_run_that_goes_on_keeps_its_last_evaluation(workspace: Path) -> None:
    fit = ["fit", "--config", "tiny.yaml", "--trainer.max_epochs"]
    main([*fit, "1"])
    evaluation = Path("run", "evaluations", "iteration_000001.json").read_text()
    main([*fit, "2", "--ckpt_path", "last"])
    assert Path("run", "evaluations", "iteration_000001.json").read_text() == evaluation
    assert list(curve("val/starts/avg@4")) == [0, 1, 2]
    summary = Path("run", "summary.json").read_text()
    main([*fit, "2", "--ckpt_path", "last"])
    again = json.loads(Path("run", "summary.json").read_text())
    assert {**again, "seconds": 0} == {**json.loads(summary), "seconds": 0}, "there was nothing left to do"


def small_files_only(argv: list[str], limit: int) -> None:
    """As if the disk were full: files can grow to ``limit`` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    main(argv)


def test_without_room_for_a_checkpoint_the_previous_one_stays(workspace: Path) -> None:
    main([*QUICK, "--trainer.max_epochs", "1"])
    before = (CHECKPOINTS / checkpoint_name(1)).read_bytes()
    argv = [*QUICK, "--trainer.max_epochs", "3", "--ckpt_path", "last"]
    codes = run_ranks(1, small_files_only, argv, len(before) // 2, folder=workspace)
    assert codes != [0]
    assert "cannot be written" in logs(workspace)
    assert (CHECKPOINTS / checkpoint_name(1)).read_bytes() == before
    assert names() == [checkpoint_name(1)]
    assert not list(CHECKPOINTS.glob("*.partial"))


# Export.


def test_a_checkpoint_becomes_a_model_folder(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*QUICK, "--trainer.max_epochs", "2"])
    main(["export", "--ckpt_path", str(CHECKPOINTS / "last.ckpt"), "--output", "out/model"])
    assert "model     out/model" in capsys.readouterr().out
    assert same(load_file("out/model/model.safetensors"), weights())
    assert sorted(path.name for path in Path("out/model").iterdir()) == sorted(
        p.name for p in Path("run/model").iterdir()
    )
    last = ["export", "--ckpt_path", "last", "--run", "run"]
    main([*last, "--config", "tiny.yaml", "--output", "out/model", "--overwrite"])
    assert same(load_file("out/model/model.safetensors"), weights())
    assert same(load_file("out/model.1/model.safetensors"), weights())
    older = str(CHECKPOINTS / checkpoint_name(1))
    main(["export", "--ckpt_path", older, "--output", "older"])
    assert not same(load_file("older/model.safetensors"), weights())
    (workspace / "precious").mkdir()
    (workspace / "precious" / "thesis.tex").touch()
    for argv, said in (
        (["--ckpt_path", older, "--output", "precious"], "output: 'precious' - exists, and no export has written it"),
        (["--ckpt_path", "last", "--output", "x"], "of an unknown run: write --run"),
        (["--ckpt_path", "nope.ckpt", "--output", "x"], "ckpt_path: 'nope.ckpt'"),
        (["--ckpt_path", older, "--output", "x", "--config", "user_code.py"], "config: 'user_code.py'"),
    ):
        assert said in refusal(["export", *argv], capsys)


# Several ranks.


@pytest.fixture
def recipes(tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for algorithm in ("DAPOModule", "PPOModule"):
        write_recipe(tmp_path, algorithm, tiny_policy, USER_CODE, folders=True)
        (tmp_path / "crash.yaml").rename(tmp_path / f"{algorithm}.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


PARTS = {"DAPOModule": ("model",), "PPOModule": ("model", "critic")}


def state_of(run: str, iteration: int) -> dict[str, Any]:
    """What matters of a run's checkpoint, in whole tensors, whatever its form."""
    checkpoint = read_checkpoint(Path(run, "checkpoints", checkpoint_name(iteration)))
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "coefficients", "RolloutDataModule", "global_step")
    return {name: checkpoint[name] for name in kept}


def near(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two states differ by more than 1e-5."""
    if isinstance(one, torch.Tensor | float):
        one, other = (torch.as_tensor(value, dtype=torch.float64) for value in (one, other))
        far = one.shape != other.shape or not torch.allclose(one, other, rtol=0, atol=1e-5)
        return [where] if far else []
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{where}: {one.keys() ^ other.keys()}"]
        return [found for key in one for found in near(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for number, pair in pairs for found in near(*pair, f"{where}/{number}")]
    return [] if one == other else [where]


MOVES = {
    "DAPOModule": [("folder", 1), ("single", 2)],
    "PPOModule": [("folder", 1), ("single", 2), ("folder", 2), ("file", 1), ("file", 2)],
}
"""A checkpoint's origin, and how many processes go on from it."""


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["DAPOModule", "PPOModule"])
def test_any_strategy_goes_on_with_any_checkpoint(recipes: Path, algorithm: str) -> None:
    """Of PPO, the policy has no optimizer state yet when they are written: its critic is still warming up."""
    first = Path("checkpoints", checkpoint_name(1))
    wrote = {"folder": 2, "file": 2, "single": 1}
    for name in dict(MOVES[algorithm]):
        train(recipes, algorithm, name, wrote[name], name, "--checkpoint.keep_last", "null")
        assert (name / first).is_dir() == (name == "folder")
    whole = {name: state_of(name, 3) for name in dict(MOVES[algorithm])}
    if algorithm == "PPOModule":
        assert [bool(state["state"]) for state in state_of("folder", 1)["optimizer_states"]] == [False, True]
        assert same(state_of("folder", 1), state_of("file", 1))
        assert same(whole["folder"], whole["file"])
    assert near(whole["folder"], whole["single"]) == []

    for name, ranks in MOVES[algorithm]:
        run = f"{name} on {ranks}"
        Path(run, "checkpoints").mkdir(parents=True)
        (shutil.copytree if name == "folder" else shutil.copy)(name / first, run / first)
        train(recipes, algorithm, run, ranks, "file" if name == "single" else "folder")
        if ranks == wrote[name]:
            assert same(state_of(run, 3), whole[name]), run
        else:
            assert near(state_of(run, 3), whole[name]) == [], run
    for part in PARTS[algorithm]:
        exported = [load_file(f"{run}/{part}/model.safetensors") for run in ("folder on 1", "folder")]
        assert near(*exported) == []
    main(["export", "--ckpt_path", "last", "--run", "folder", "--output", "out/model"])
    for part in PARTS[algorithm]:
        assert same(load_file(f"out/{part}/model.safetensors"), load_file(f"folder/{part}/model.safetensors"))


def test_a_callback_of_lightnings_may_remove_its_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "file.ckpt").touch()
    (tmp_path / "folder.ckpt" / "part").mkdir(parents=True)
    for name in ("file.ckpt", "folder.ckpt", "gone.ckpt"):
        CheckpointFiles().remove_checkpoint(tmp_path / name)
    assert not list(tmp_path.iterdir())
