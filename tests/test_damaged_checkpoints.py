"""Damaged checkpoints, and those of others: noticed, passed over, never removed; the one just written always stays."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed, nn

from helpers.crash import write_recipe
from helpers.processes import logs, run_ranks
from helpers.runs import CHECKPOINTS, QUICK, content, curve, refusal, same, train, weights
from helpers.sharded import fit, on_ranks, saved_model
from helpers.user_code import USER_CODE
from ibro_lightning.cli.main import main
from ibro_lightning.errors import ConfigError
from ibro_lightning.guards.finite import why_not_finite
from ibro_lightning.runs.checkpoints.catalog import Written, checkpoint_name, newer_valid, newest_valid
from ibro_lightning.runs.checkpoints.keeping import Keeper
from ibro_lightning.runs.checkpoints.plugin import CheckpointFiles, read_about, read_checkpoint, refusing
from ibro_lightning.runs.checkpoints.shards import save_shards
from ibro_lightning.runs.checkpoints.validity import check_limits, why_invalid, why_known_invalid
from ibro_lightning.runs.resume import evaluation_of, find_checkpoint, logger_states_of, record_end
from ibro_lightning.strategies import FSDP2Strategy

FORMS = ("file", "folder")
SHARD_FILES = ("__0_0.distcp", ".metadata", "meta.pt", "manifest.json")


def write(path: Path, form: str = "file", **more: Any) -> Path:
    checkpoint = {**content(), **more}
    if form == "folder":
        save_shards(path, checkpoint, is_first=True)
    else:
        CheckpointFiles().save_checkpoint(checkpoint, path)
    return path


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << bit
    path.write_bytes(data)


def damage(path: Path) -> Path:
    """A bit of a tensor."""
    file = path / SHARD_FILES[0] if path.is_dir() else path
    with zipfile.ZipFile(file if file == path else io.BytesIO(_first_archive(file))) as parts:
        part = next(part for part in parts.infolist() if part.filename.endswith("/data/0"))
    name_and_more = struct.unpack("<HH", file.read_bytes()[part.header_offset + 26 :][:4])
    flip(file, part.header_offset + 30 + sum(name_and_more))
    assert why_invalid(path) is not None
    return path


def _first_archive(file: Path) -> bytes:
    """DCP writes one archive of torch.save after the other."""
    data = file.read_bytes()
    return data[: data.index(b"PK\x05\x06") + 22]


# Shards.


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("shards") / "whole.ckpt", "folder")


@pytest.mark.parametrize("name", SHARD_FILES)
@settings(deadline=None)
@given(data=st.data())
def test_any_flipped_bit_of_any_file_of_a_folder_is_noticed(shards: Path, name: str, data: st.DataObject) -> None:
    whole = (shards / name).read_bytes()
    place, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    try:
        flip(shards / name, place, bit)
        reason = why_invalid(shards)
    finally:
        (shards / name).write_bytes(whole)
    assert reason is not None
    assert name in reason or name == "manifest.json"
    assert why_invalid(shards) is None


def test_digests_are_those_of_the_files_and_of_all_of_them(shards: Path) -> None:
    """They are taken while writing: DCP must not go back in a file."""
    manifest = json.loads((shards / "manifest.json").read_text())
    assert (
        set(manifest["files"]) == {path.name for path in shards.iterdir()} - {"manifest.json"} == set(SHARD_FILES[:3])
    )
    for name, entry in manifest["files"].items():
        data = (shards / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}, name


def as_earlier_versions(folder: Path) -> Path:
    """With a manifest that has sizes alone."""
    manifest = folder / "manifest.json"
    sizes = {name: entry["bytes"] for name, entry in json.loads(manifest.read_text())["files"].items()}
    manifest.write_text(json.dumps({"files": sizes}, indent=2) + "\n")
    return folder


def test_a_folder_of_an_earlier_version_is_read_and_its_sizes_compared(shards: Path, tmp_path: Path) -> None:
    folder = as_earlier_versions(shutil.copytree(shards, tmp_path / checkpoint_name(2)))
    assert why_invalid(folder) is None
    assert same(read_checkpoint(folder), content())
    assert same(CheckpointFiles().load_checkpoint(folder), content())
    os.truncate(folder / SHARD_FILES[0], 100)
    assert "has 100 bytes instead of" in str(why_invalid(folder))


@pytest.mark.parametrize("name", [".metadata", "meta.pt"])
@pytest.mark.parametrize("digests", [True, False], ids=["digests", "sizes"])
def test_a_folder_whose_index_or_rest_cannot_be_read_is_passed_over(
    shards: Path, tmp_path: Path, name: str, digests: bool
) -> None:
    """Also where no digest tells: otherwise a job that goes on with ``last`` would choose it again and again."""
    older, newer = (shutil.copytree(shards, tmp_path / checkpoint_name(number)) for number in (1, 2))
    if not digests:
        as_earlier_versions(newer)
    size = (newer / name).stat().st_size
    (newer / name).write_bytes(b"\x80" * size)
    found, passed_over = newest_valid(tmp_path)
    assert found == older
    assert name in passed_over[newer]


def test_parts_that_ranks_deal_out_are_all_of_it(shards: Path, tmp_path: Path) -> None:
    """Whatever is damaged, one of them finds it."""
    whole_file = write(tmp_path / "file.ckpt")
    for path in (shards, whole_file):
        for shares in (2, 3, 7):
            assert [why_invalid(path, share, shares) for share in range(shares)] == [None] * shares
    for name in SHARD_FILES[:3]:
        folder = shutil.copytree(shards, tmp_path / f"{name}.ckpt")
        flip(folder / name, 300)
        for shares in (2, 3, 7):
            assert any(why_invalid(folder, share, shares) for share in range(shares)), (name, shares)
    damage(whole_file)
    assert any(why_invalid(whole_file, share, 3) for share in range(3))


def test_what_this_process_knows_is_not_read_again_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ibro_lightning.runs.checkpoints.validity as validity

    path = write(tmp_path / checkpoint_name(1))
    reads: list[Path] = []
    read = validity._why_no_file
    monkeypatch.setattr(validity, "_why_no_file", lambda p, *rest: reads.append(p) or read(p, *rest))
    assert why_known_invalid(path) is None
    assert why_known_invalid(path) is None
    assert len(reads) == 1
    other = write(tmp_path / "other.ckpt", epoch=4)
    os.replace(other, path)
    os.truncate(path, 1000)
    assert why_known_invalid(path) is not None
    assert why_known_invalid(path) is not None
    assert len(reads) == 2


@pytest.mark.parametrize("form", FORMS)
def test_all_is_on_the_disk_before_a_checkpoint_gets_its_name(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte of every file when it is synced, the folder, then the name, the folder of names, the link, and that
    once more. DCP itself syncs before the last bytes have left its buffer."""
    synced: dict[int, int] = {}
    """Sizes by inode, as files are renamed."""
    named: list[str] = []
    fsync, replace = os.fsync, os.replace
    folder = tmp_path / "checkpoints"
    folder.mkdir()

    def note_sync(descriptor: int) -> None:
        found = os.fstat(descriptor)
        synced[found.st_ino] = found.st_size
        fsync(descriptor)

    def note_name(source: Path, target: Path) -> None:
        if target.suffix == ".ckpt":
            assert folder.stat().st_ino in synced, f"{named[-1]} is not on the disk"
        if target == folder / checkpoint_name(1):
            for file in [*source.iterdir(), source] if source.is_dir() else [source]:
                assert file.stat().st_ino in synced, file.name
                assert file.is_dir() or synced[file.stat().st_ino] == file.stat().st_size, file.name
        replace(source, target)
        named.append(target.name)
        synced.pop(folder.stat().st_ino, None)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_name)
    save(Keeper(folder, 1), folder, 1, form)
    assert [name for name in named if name != "manifest.json"] == ["written.txt", checkpoint_name(1), "last.ckpt"]
    assert folder.stat().st_ino in synced


def test_what_is_said_in_one_line_already_is_not_said_anew(shards: Path) -> None:
    said = ConfigError("ckpt_path", str(shards), "it is of another model")
    with pytest.raises(ConfigError) as found, refusing(shards):
        raise said
    assert found.value is said
    with pytest.raises(ConfigError, match="it cannot be read: broken"), refusing(shards):
        raise RuntimeError("broken")
    with pytest.raises(torch.OutOfMemoryError), refusing(shards):
        raise torch.OutOfMemoryError("no room")


# What stays in a folder.


def save(keeper: Keeper, folder: Path, iteration: int, form: str = "file", best: tuple[int, ...] = ()) -> Path:
    """As the callback does it."""
    path = folder / checkpoint_name(iteration)
    partial = write(path.with_name(path.name + ".partial"), form, iteration=iteration)
    keeper.give_name(partial, path)
    keeper.keep(path, best)
    assert os.readlink(folder / "last.ckpt") == path.name
    assert why_invalid(folder / "last.ckpt") is None
    return path


def in_folder(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"last.ckpt", "written.txt"}


def garbage(path: Path) -> None:
    path.write_bytes(b"somebody's thesis")


def garbage_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("42")


OTHERS: dict[str, Callable[[Path], Any]] = {
    "garbage": garbage,
    "a folder": garbage_folder,
    "another run's": lambda path: write(path, epoch=9),
    "another run's folder": lambda path: write(path, "folder", epoch=9),
    "a list of torch's": lambda path: torch.save([torch.zeros(3)], path),
    "half a checkpoint": lambda path: os.truncate(write(path), 1500),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
}


def bytes_of(path: Path) -> Any:
    if path.is_symlink():
        return os.readlink(path)
    return {file.name: file.read_bytes() for file in path.iterdir()} if path.is_dir() else path.read_bytes()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keep_last", [1, 2])
@pytest.mark.parametrize("kind", OTHERS)
def test_checkpoints_of_others_are_neither_counted_nor_removed(
    kind: str, keep_last: int, form: str, tmp_path: Path
) -> None:
    others = [tmp_path / checkpoint_name(number) for number in (2, 999)]
    for other in others:
        OTHERS[kind](other)
    before = [bytes_of(other) for other in others]
    keeper = Keeper(tmp_path, keep_last)
    for iteration in (5, 10, 15):
        save(keeper, tmp_path, iteration, form)
    ours = {checkpoint_name(number) for number in (5, 10, 15)[-keep_last:]}
    assert in_folder(tmp_path) == ours | {other.name for other in others}
    assert [bytes_of(other) for other in others] == before
    found, _ = newest_valid(tmp_path)
    assert found == tmp_path / checkpoint_name(15)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", OTHERS)
def test_what_has_the_name_of_a_checkpoint_that_is_due_makes_way(kind: str, form: str, tmp_path: Path) -> None:
    place = tmp_path / checkpoint_name(5)
    OTHERS[kind](place)
    for name in ("last.ckpt", "iteration_000005.ckpt.foreign"):
        garbage_folder(tmp_path / name)
    before = bytes_of(place)
    save(Keeper(tmp_path, 1), tmp_path, 5, form)
    assert in_folder(tmp_path) == {place.name, f"{place.name}.foreign", f"{place.name}.foreign.1", "last.ckpt.foreign"}
    assert bytes_of(tmp_path / f"{place.name}.foreign.1") == before
    assert (tmp_path / "last.ckpt.foreign" / "thesis.tex").read_text() == "42"


@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_checkpoint_does_not_take_the_place_of_a_whole_one(form: str, tmp_path: Path) -> None:
    """Neither a damaged newer one, nor a damaged one among those that would stay; what is the best stays, too."""
    keeper = Keeper(tmp_path, 2)
    for iteration in (1, 2, 3, 4):
        save(keeper, tmp_path, iteration, form, best=(1,))
    assert in_folder(tmp_path) == {checkpoint_name(number) for number in (1, 3, 4)}
    damage(tmp_path / checkpoint_name(4))
    save(keeper, tmp_path, 5, form, best=(1,))
    assert in_folder(tmp_path) == {checkpoint_name(number) for number in (1, 3, 4, 5)}
    save(keeper, tmp_path, 6, form, best=(1,))
    assert in_folder(tmp_path) == {checkpoint_name(number) for number in (1, 5, 6)}


@pytest.mark.parametrize("form", FORMS)
def test_passed_over_ones_are_set_aside_when_the_run_goes_on(
    form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keeper = Keeper(tmp_path, None)
    for iteration in (1, 2, 3, 4):
        save(keeper, tmp_path, iteration, form)
    garbage(tmp_path / checkpoint_name(999))
    garbage(tmp_path / "iteration_000004.ckpt.damaged")
    for number in (3, 4):
        damage(tmp_path / checkpoint_name(number))
    found, passed_over = newest_valid(tmp_path)
    assert found == tmp_path / checkpoint_name(2)
    assert len(passed_over) == 3
    assert newer_valid(found) is None
    with caplog.at_level(logging.INFO):
        Keeper(tmp_path, 1).resume_from(found)
    aside = {"iteration_000003.ckpt.damaged", "iteration_000004.ckpt.damaged", "iteration_000004.ckpt.damaged.1"}
    assert in_folder(tmp_path) == aside | {checkpoint_name(number) for number in (1, 2, 999)}
    assert "iteration_000003.ckpt is now iteration_000003.ckpt.damaged: " in caplog.text
    assert os.readlink(tmp_path / "last.ckpt") == checkpoint_name(2)
    save(Keeper(tmp_path, 1), tmp_path, 3, form)
    assert in_folder(tmp_path) == aside | {checkpoint_name(number) for number in (3, 999)}


def renew(keeper: Keeper, path: Path) -> None:
    """As the callback does it once the evaluation is made that was not when ``path`` was written."""
    keeper.make_way(path.with_name(path.name + ".partial"))
    keeper.update(path, {**content(), "state_dict": {}, "optimizer_states": [], "iteration": 5, "epoch": 4})


def test_a_folder_whose_rest_is_renewed_is_whole_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = Keeper(tmp_path, 1)
    path = save(keeper, tmp_path, 5, "folder")
    before, epochs, moment = read_checkpoint(path), [3], 0
    calls = iter(range(0))

    def killed(function: Any) -> Any:
        def called(*arguments: Any) -> None:
            if next(calls, None) == moment:
                raise KeyboardInterrupt
            function(*arguments)

        return called

    monkeypatch.setattr(os, "fsync", killed(lambda descriptor: None))
    monkeypatch.setattr(os, "replace", killed(os.replace))
    while True:
        calls, moment = iter(range(1000)), moment + 1
        try:
            renew(keeper, path)
        except KeyboardInterrupt:
            assert newest_valid(tmp_path) == (path, {})
            assert Written(tmp_path).wrote(path)
            epochs.append(read_about(path)["epoch"])
        else:
            break
    monkeypatch.undo()
    assert moment > 10
    assert epochs == sorted(epochs)
    assert in_folder(tmp_path) == {path.name}
    assert why_invalid(path) is None
    assert same({**before, "epoch": 4}, read_checkpoint(path))
    assert set(json.loads((path / "manifest.json").read_text())["files"]) == set(SHARD_FILES[:3])
    keeper.keep(path, ())
    assert (tmp_path / "written.txt").read_text().count(path.name) == 1
    save(keeper, tmp_path, 6, "folder")
    assert in_folder(tmp_path) == {checkpoint_name(6)}


def test_a_folder_that_a_run_went_on_from_and_did_not_write_is_not_renewed(tmp_path: Path) -> None:
    path = write(tmp_path / checkpoint_name(5), "folder")
    keeper, before = Keeper(tmp_path, 1), bytes_of(path)
    keeper.resume_from(path)
    renew(keeper, path)
    assert bytes_of(path) == before
    assert in_folder(tmp_path) == {path.name}


def plant(folder: Path) -> dict[str, Any]:
    """What a converter, or somebody, leaves in a checkpoint's folder."""
    (folder / "hf").mkdir()
    for name in ("hf/model.safetensors", "notes.txt", "__9_9.distcp" if folder.suffix != ".partial" else "x.partial"):
        (folder / name).write_text(f"mine: {name}")
    (folder / "link").symlink_to("/nowhere")
    return {name: content for name, content in files_in(folder).items() if str(content).startswith(("b'mine:", "/"))}


def files_in(folder: Path) -> dict[str, Any]:
    return {path.relative_to(folder).as_posix(): bytes_of(path) for path in folder.rglob("*") if not path.is_dir()}


def test_what_others_have_put_into_a_folder_of_shards_stays_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It makes no checkpoint an invalid one, is in no manifest, and of one that goes stays with its folder, at its
    place; one line says so, once."""
    keeper = Keeper(tmp_path, 1)
    first = save(keeper, tmp_path, 1, "folder")
    mine = plant(first)
    assert why_invalid(first) is None
    with caplog.at_level(logging.INFO):
        for iteration in (2, 3):
            save(keeper, tmp_path, iteration, "folder")
    assert in_folder(tmp_path) == {first.name, checkpoint_name(3)}
    assert {
        path.relative_to(first).as_posix(): bytes_of(path) for path in first.rglob("*") if not path.is_dir()
    } == mine
    assert caplog.text.count(f"{first} stays, without the checkpoint's files: __9_9.distcp in it") == 1
    assert Written(tmp_path).has_name(tmp_path / checkpoint_name(3))
    assert newest_valid(tmp_path)[0] == tmp_path / checkpoint_name(3)


def test_what_others_have_put_into_a_folder_that_is_being_written_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keeper = Keeper(tmp_path, 1)
    partial = write(tmp_path / f"{checkpoint_name(4)}.partial", "folder")
    (partial / "manifest.json").rename(partial / "manifest.json.partial")  # killed just then
    mine = plant(partial)
    with caplog.at_level(logging.INFO):
        keeper.make_way(partial)
    aside = partial.with_name(partial.name + ".foreign")
    assert not os.path.lexists(partial)
    assert {
        path.relative_to(aside).as_posix(): bytes_of(path) for path in aside.rglob("*") if not path.is_dir()
    } == mine
    assert f"{partial} is now {aside.name}: " in caplog.text
    # Put there while it is written: it is not the checkpoint's, whose it then lies beside.
    write(partial, "folder")
    plant(partial)
    (partial / "manifest.json").unlink()
    save_shards(partial, content(), is_first=True)
    assert set(json.loads((partial / "manifest.json").read_text())["files"]) == set(SHARD_FILES[:3])


@pytest.mark.parametrize("kind", ["link", "text", "half", "empty", "shards", "nothing"])
def test_a_partial_file_goes_if_a_checkpoint_begins_like_that(kind: str, tmp_path: Path) -> None:
    partial = tmp_path / f"{checkpoint_name(4)}.partial"
    if kind == "link":
        partial.symlink_to("thesis.tex")
    elif kind in ("half", "shards"):
        write(partial, "folder" if kind == "shards" else "file")
    elif kind != "nothing":
        partial.write_text("mine" if kind == "text" else "")
    Keeper(tmp_path, 1).make_way(partial)
    assert not os.path.lexists(partial)
    assert in_folder(tmp_path) == ({f"{partial.name}.foreign"} if kind in ("link", "text") else set())


def test_a_checkpoint_that_was_half_removed_counts_for_nothing_and_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = Keeper(tmp_path, 1)
    first = save(keeper, tmp_path, 1, "folder")
    unlink = Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.name == "manifest.json":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            save(keeper, tmp_path, 2, "folder")
    assert os.listdir(first) == ["manifest.json"]
    assert "is missing" in str(why_known_invalid(first))
    save(keeper, tmp_path, 3, "folder")
    assert in_folder(tmp_path) == {checkpoint_name(3)}


def test_a_link_that_somebody_made_of_a_checkpoint_stays(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path, 1)
    first = save(keeper, tmp_path, 1)
    first.rename(tmp_path / "elsewhere")
    first.symlink_to("elsewhere")
    save(keeper, tmp_path, 2)
    assert in_folder(tmp_path) == {first.name, "elsewhere", checkpoint_name(2)}


def test_a_link_in_a_circle_is_passed_over(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    save(Keeper(checkpoints, 1), checkpoints, 1)
    circle = checkpoints / checkpoint_name(2)
    circle.symlink_to(circle.name)
    assert find_checkpoint("last", tmp_path) == checkpoints / checkpoint_name(1)
    with pytest.raises(ConfigError, match="no such checkpoint"):
        find_checkpoint(str(circle), tmp_path)
    save(Keeper(checkpoints, 1), checkpoints, 2)
    assert in_folder(checkpoints) == {circle.name, f"{circle.name}.foreign"}


def test_another_runs_checkpoint_is_not_gone_on_from_unless_it_is_named(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    save(Keeper(checkpoints, 1), checkpoints, 5)
    other = write(checkpoints / checkpoint_name(50), epoch=9)
    assert find_checkpoint("last", tmp_path) == checkpoints / checkpoint_name(5)
    assert newer_valid(checkpoints / checkpoint_name(5)) is None
    (checkpoints / checkpoint_name(5)).unlink()
    with pytest.raises(ConfigError, match=r"none of the 1 checkpoints .* is valid and of this run"):
        find_checkpoint("last", tmp_path)
    assert find_checkpoint(str(other), tmp_path) == other
    # The run goes on from it: now it is of its history, but still not the run's to remove.
    Keeper(checkpoints, 1).resume_from(other)
    assert find_checkpoint("last", tmp_path) == other
    for iteration in (51, 52):
        save(Keeper(checkpoints, 1), checkpoints, iteration)
    assert in_folder(checkpoints) == {checkpoint_name(50), checkpoint_name(52)}


def test_a_checkpoint_that_somebody_has_changed_is_of_this_run_but_not_the_runs_to_remove(tmp_path: Path) -> None:
    """Also one that was copied here from another copy of the run's folder."""
    keeper = Keeper(tmp_path, 1)
    about = {"ibro_lightning": {"run_id": keeper.run_id}}
    save(keeper, tmp_path, 5)
    for number, more in ((5, about), (7, about), (9, {"ibro_lightning": {"run_id": "another"}})):
        write(tmp_path / checkpoint_name(number), epoch=9, **more)
    found, passed_over = newest_valid(tmp_path)
    assert found == tmp_path / checkpoint_name(7)
    assert list(passed_over) == [tmp_path / checkpoint_name(9)]
    assert keeper.run_id == Written(tmp_path).run_id
    save(keeper, tmp_path, 8)
    assert in_folder(tmp_path) == {checkpoint_name(number) for number in (5, 7, 8, 9)}


@pytest.mark.parametrize("harm", ["gone", "cut", "flipped", "garbage"])
def test_without_the_list_nothing_is_removed_and_anything_whole_gone_on_from(harm: str, tmp_path: Path) -> None:
    keeper = Keeper(tmp_path, None)
    for iteration in (1, 2):
        save(keeper, tmp_path, iteration)
    path = tmp_path / "written.txt"
    match harm:
        case "gone":
            path.unlink()
        case "cut":
            os.truncate(path, 100)
        case "flipped":
            flip(path, 90)
        case "garbage":
            path.write_bytes(b"\xff\x00 a")
    if harm == "gone":
        found, _ = newest_valid(tmp_path)
    else:
        with pytest.warns(UserWarning, match="is damaged: any of the checkpoints"):
            found, _ = newest_valid(tmp_path)
    assert found == tmp_path / checkpoint_name(2)
    save(Keeper(tmp_path, 1), tmp_path, 3)
    assert in_folder(tmp_path) == {checkpoint_name(number) for number in (1, 2, 3)}


def test_a_run_that_was_killed_before_a_name_was_given_knows_both(tmp_path: Path) -> None:
    """The list is written first; what had the name before is still the run's."""
    save(Keeper(tmp_path, 1), tmp_path, 1)
    path = tmp_path / checkpoint_name(1)
    partial = write(path.with_name(path.name + ".partial"), epoch=7)
    Written(tmp_path).add(partial, path.name)
    assert Written(tmp_path).wrote(path)
    os.replace(partial, path)
    assert Written(tmp_path).wrote(path)
    Keeper(tmp_path, 1).keep(path, ())
    assert (tmp_path / "written.txt").read_text().count("iteration_") == 1


# NaN.


def poisoned(where: str, value: float) -> dict[str, Any]:
    checkpoint = content()
    if where == "optimizer":
        checkpoint["optimizer_states"][1]["state"][0]["exp_avg"][0, 1] = value
    else:
        checkpoint["state_dict"][where][-1] = value
    return checkpoint


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        ("critic.bias", "nan", "its weight critic.bias holds NaN"),
        ("half", "inf", "its weight half holds infinity"),
        ("policy.weight", "-inf", "its weight policy.weight holds infinity"),
        ("optimizer", "nan", "exp_avg of parameter 0 in optimizer 1 holds NaN"),
        ("optimizer", "inf", None),
    ],
)
def test_weights_that_are_not_finite_are_refused(
    form: str, where: str, value: str, said: str | None, tmp_path: Path
) -> None:
    path = write(tmp_path / checkpoint_name(20), form, **poisoned(where, float(value)))
    assert why_invalid(path) is None
    if said is None:
        CheckpointFiles().load_checkpoint(path)
        return
    with pytest.raises(
        ConfigError, match=f"^ckpt_path: .*iteration_000020.ckpt' - {said}, .*--ckpt_path last"
    ) as found:
        CheckpointFiles().load_checkpoint(path)
    assert "\n" not in str(found.value)
    if where == "optimizer":
        CheckpointFiles(weights_alone=True).load_checkpoint(path)


def test_every_rank_looks_at_its_share_for_nan() -> None:
    tensors: dict[str, Any] = {str(number): torch.zeros(3) for number in range(5)}
    tensors |= {"none": torch.empty(0), "int": torch.tensor([1]), "extra": "state", "bool": torch.tensor([True])}
    tensors["4"][1] = float("nan")
    assert [why_not_finite(tensors, (), share, 3) is None for share in range(3)] == [True, False, True]
    assert why_not_finite(nn.Linear(2, 2).state_dict()) is None


# Hints and limits.


def test_limits_below_the_checkpoints_are_refused_and_equal_ones_not() -> None:
    rest = {"global_step": 7, "loops": {"fit_loop": {"epoch_progress": {"current": {"ready": 3}}}}}
    for epochs, steps in ((3, -1), (None, 7), (-1, 8), (4, 9), (-1, -1)):
        check_limits(rest, epochs, steps, "a.ckpt")
    check_limits({}, 1, 1, "a.ckpt")
    with pytest.raises(ConfigError, match=r"^trainer.max_epochs: 2 - a.ckpt is already in epoch 3: write 3 "):
        check_limits(rest, 2, -1, "a.ckpt")
    with pytest.raises(ConfigError, match=r"^trainer.max_steps: 6 - a.ckpt is already in optimizer step 7"):
        check_limits(rest, -1, 6, "a.ckpt")


HINTS = {
    "empty": "",
    "half": '{"iteration": 3, "eval',
    "a list": "[1]",
    "null": "null",
    "no loggers": '{"iteration": 3, "evaluated": true}',
    "no classes": '{"iteration": 3, "evaluated": true, "loggers": [3]}',
    "a number": '{"iteration": 3, "evaluated": true, "loggers": 3}',
    "no truth value": '{"iteration": 3, "evaluated": 1, "loggers": []}',
    "zeros": "\x00" * 30,
}


@pytest.mark.parametrize("text", HINTS.values(), ids=HINTS)
def test_a_damaged_hint_does_not_count(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    about = {"iteration": 3, "evaluated": False, "loggers": [{"class": "A"}]}
    (tmp_path / "checkpoints").mkdir()
    record_end(tmp_path, 3, [])
    assert logger_states_of(tmp_path, about) == []
    (tmp_path / "checkpoints" / "end.json").write_text(text)
    with caplog.at_level(logging.INFO):
        assert logger_states_of(tmp_path, about) == about["loggers"]
        assert evaluation_of(tmp_path, about, 3) is None
    assert "end.json is damaged and is ignored" in caplog.text


def test_a_damaged_evaluation_is_made_again(tmp_path: Path) -> None:
    about = {"iteration": 3, "evaluated": True, "loggers": []}
    (tmp_path / "evaluations").mkdir()
    path = tmp_path / "evaluations" / "iteration_000003.json"
    path.write_text('{"a": 1}')
    assert evaluation_of(tmp_path, about, 3) == {"a": 1}
    path.write_text('{"a": ')
    assert evaluation_of(tmp_path, about, 3) is None


# Whole runs.


def test_a_run_goes_on_past_a_damaged_checkpoint_and_keeps_the_one_it_writes(
    workspace: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """With ``keep_last: 1`` every whole one was gone: the damaged one had the higher number. (The run below ends before
    it comes to that number.)"""
    one = ["--checkpoint.keep_last", "1", "--checkpoint.every_n_iterations", "2"]
    main([*QUICK, "--trainer.max_epochs", "4", "--checkpoint.keep_last", "null"])
    (CHECKPOINTS / checkpoint_name(3)).unlink()
    damage(CHECKPOINTS / checkpoint_name(4))
    garbage(CHECKPOINTS / checkpoint_name(999))
    before = sorted(path.name for path in CHECKPOINTS.iterdir())
    main(["export", "--ckpt_path", "last", "--run", "run", "--output", "out/model"])
    assert sorted(path.name for path in CHECKPOINTS.iterdir()) == before, "only training sets aside"
    assert "trainer.max_epochs: 1 - " in refusal([*QUICK, "--ckpt_path", "last", "--trainer.max_epochs", "1"], capsys)
    assert sorted(path.name for path in CHECKPOINTS.iterdir()) == before
    with caplog.at_level(logging.INFO):
        main([*QUICK, "--trainer.max_epochs", "3", "--ckpt_path", "last", *one])
    assert "iteration_000004.ckpt is now iteration_000004.ckpt.damaged: the file is damaged" in caplog.text
    assert {path.name for path in CHECKPOINTS.glob("*.ckpt*")} == {
        "iteration_000003.ckpt",
        "iteration_000004.ckpt.damaged",
        "iteration_000999.ckpt",
        "last.ckpt",
    }
    assert find_checkpoint("last", Path("run")) == (CHECKPOINTS / checkpoint_name(3)).resolve()
    main([*QUICK, "--trainer.max_epochs", "3", "--trainer.default_root_dir", "whole"])
    assert same(weights(), weights("whole"))


def test_a_damaged_hint_changes_nothing_in_a_run_that_goes_on(workspace: Path) -> None:
    fit = ["fit", "--config", "tiny.yaml", "--trainer.max_epochs"]
    main([*fit, "1"])
    shutil.copytree("run", "other", symlinks=True)
    Path("run", "checkpoints", "end.json").write_text('{"iteration": 1, "eval')
    Path("other", "checkpoints", "end.json").unlink()
    for run in ("run", "other"):
        main([*fit, "2", "--ckpt_path", "last", "--trainer.default_root_dir", run])
    assert same(weights(), weights("other"))
    assert curve("val/starts/avg@4") == curve("val/starts/avg@4", "other")
    assert list(curve("val/starts/avg@4")) == [0, 2]


@pytest.mark.parametrize("limit", ["max_epochs=2", "max_steps=5"])
def test_a_limit_below_the_checkpoint_changes_nothing_in_the_folder(
    limit: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lightning raised for ``max_epochs`` two below; one below, it trained nothing and wrote all anew."""
    main([*QUICK, "--trainer.max_epochs", "3"])

    def contents() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}

    before = contents()
    flags = ["--trainer.max_epochs=null"] if "steps" in limit else []
    said = refusal([*QUICK, *flags, f"--trainer.{limit}", "--ckpt_path", "last"], capsys)
    assert said.startswith(f"error: trainer.{limit.replace('=', ': ')} - ")
    assert "iteration_000003.ckpt is already in " in said
    assert contents() == before


# Several ranks.


HARMS = ("shard of rank 1", "index", "NaN in a folder", "NaN in a file")


def refuse_each(model: Path) -> None:
    """Two ranks of fsdp2 load one damaged checkpoint after the other, without anybody having looked at it before."""
    settings = {"save_distributed_checkpoint": True}
    fit(model, 1, Path("two.ckpt"), None, FSDP2Strategy(**settings), devices=2)
    rank = distributed.get_rank()
    if rank == 0:
        for name, file in zip(HARMS, ("__1_0.distcp", ".metadata"), strict=False):
            shutil.copytree("two.ckpt", name)
            damaged = Path(name, file)
            flip(damaged, damaged.stat().st_size // 2)
    distributed.barrier()
    for name in HARMS:
        try:
            fit(model, 2, Path("never.ckpt"), Path(name), FSDP2Strategy(**settings), devices=2)
        except ConfigError as error:
            Path(f"{name}.{rank}.txt").write_text(str(error))
    fit(model, 2, Path("on.ckpt"), Path("two.ckpt"), FSDP2Strategy(**settings), devices=2)


def test_what_one_of_two_ranks_finds_all_refuse(tmp_path: Path) -> None:
    """Each reads only its share: the last row of a weight is rank 1's."""
    model = saved_model(tmp_path / "model")
    fit(model, 1, tmp_path / "single.ckpt", None)
    checkpoint = read_checkpoint(tmp_path / "single.ckpt")
    name = next(name for name, value in checkpoint["state_dict"].items() if value.ndim == 2)
    checkpoint["state_dict"][name][-1] = float("nan")
    save_shards(tmp_path / "NaN in a folder", checkpoint, is_first=True)
    CheckpointFiles().save_checkpoint(checkpoint, tmp_path / "NaN in a file")
    on_ranks(2, refuse_each, model, folder=tmp_path)
    for harm in HARMS:
        first, second = ((tmp_path / f"{harm}.{rank}.txt").read_text() for rank in (0, 1))
        assert first == second
        assert first.startswith("ckpt_path: ")
        assert f"weight {name} holds NaN" in first if "NaN" in harm else "damaged" in first
    assert not (tmp_path / "never.ckpt").exists()
    assert why_invalid(tmp_path / "on.ckpt") is None


def test_two_ranks_fall_back_from_a_flipped_bit_in_a_shard(
    tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later checkpoint's shard of rank 1 is damaged: ``last`` takes the one before it; its path is refused."""
    write_recipe(tmp_path, "DAPOModule", tiny_policy, USER_CODE, folders=True)
    (tmp_path / "crash.yaml").rename(tmp_path / "DAPOModule.yaml")
    monkeypatch.chdir(tmp_path)
    train(tmp_path, "DAPOModule", "run", 2, "folder", "--checkpoint.keep_last", "2")
    checkpoints = tmp_path / "run" / "checkpoints"
    newest = checkpoints / checkpoint_name(3)
    whole = read_checkpoint(newest)["state_dict"]
    shard = newest / "__1_0.distcp"
    flip(shard, shard.stat().st_size // 2)
    argv = ["fit", "--config", "DAPOModule.yaml", "--config", "folders.yaml", "--trainer.devices", "2"]
    argv += ["--trainer.default_root_dir", "run", "--ckpt_path", str(newest)]
    assert run_ranks(2, main, argv, folder=tmp_path) == [2, 2], logs(tmp_path)
    assert "__1_0.distcp is damaged: it does not match its digest: the newest valid one beside it" in logs(tmp_path)
    train(tmp_path, "DAPOModule", "run", 2, "folder", "--checkpoint.keep_last", "1")
    assert f"skipped run/checkpoints/{newest.name}: __1_0.distcp is damaged" in logs(tmp_path)
    names = {path.name for path in checkpoints.iterdir()}
    assert names == {newest.name, f"{newest.name}.damaged", "last.ckpt", "written.txt", "end.json"}
    assert same(read_checkpoint(newest)["state_dict"], whole)


def test_last_refuses_nan_and_takes_the_older_one_once_that_is_moved_away(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*QUICK, "--trainer.max_epochs", "2"])
    newest = CHECKPOINTS / checkpoint_name(2)
    checkpoint = torch.load(newest, weights_only=True)
    name = next(iter(checkpoint["state_dict"]))
    checkpoint["state_dict"][name].view(-1)[-1] = float("nan")
    torch.save(checkpoint, newest)
    said = refusal([*QUICK, "--trainer.max_epochs", "3", "--ckpt_path", "last"], capsys)
    assert f"iteration_000002.ckpt' - its weight {name} holds NaN, so it is unusable. Move it out" in said
    newest.rename("moved.ckpt")
    main([*QUICK, "--trainer.max_epochs", "2", "--ckpt_path", "last"])
    main([*QUICK, "--trainer.max_epochs", "2", "--trainer.default_root_dir", "whole"])
    assert same(weights(), weights("whole"))


@pytest.mark.slow
def test_ddp_refuses_nan_on_both_ranks(workspace: Path) -> None:
    main([*QUICK, "--trainer.max_epochs", "1"])
    path = CHECKPOINTS / checkpoint_name(1)
    checkpoint = read_checkpoint(path)
    name = next(iter(checkpoint["state_dict"]))
    checkpoint["state_dict"][name][0] = float("nan")
    CheckpointFiles().save_checkpoint(checkpoint, path)
    argv = [*QUICK, "--ckpt_path", str(path), "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    assert run_ranks(2, main, argv, folder=workspace) == [2, 2], logs(workspace)
    assert logs(workspace).count(f"its weight {name} holds NaN, so it is unusable") >= 2
    assert "Traceback" not in logs(workspace)


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_an_optimizer_may_keep_infinity_and_a_weight_may_not(value: float) -> None:
    """Some begin with it."""
    tensor = torch.full((2,), value)
    assert why_not_finite({}, [{"state": {0: {"largest": tensor}}}]) is None
    assert why_not_finite({"weight": tensor}) == "its weight weight holds infinity"
