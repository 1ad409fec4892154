"""Several commands in one folder, and files of others under names like ours: neither takes what is the other's."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.processes import CONTEXT
from ibro_lightning.callbacks.rollout_log import set_predictions_aside
from ibro_lightning.cli.main import main
from ibro_lightning.errors import ConfigError
from ibro_lightning.evaluation.compare import check_free
from ibro_lightning.evaluation.record import EvaluationRecord
from ibro_lightning.runs.authorship import leave_to_others, run_id, signed
from ibro_lightning.runs.claims import claim, in_the_way, survey
from ibro_lightning.runs.holding import FolderLock
from ibro_lightning.runs.marks import HEADER, read_mark, write_mark
from ibro_lightning.runs.model_folders import begin, finish
from ibro_lightning.runs.moving import make_room, put_back, recover, recover_alone
from ibro_lightning.runs.resume import remove_partial, wind_back
from ibro_lightning.runs.run_files import MARK, MOVING, PARTS
from ibro_lightning.runs.settings import RunSettings, keep_settings, set_settings_aside

PATIENCE_S = 600


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def a_run(folder: Path, text: str = "ours") -> None:
    """What a run and a validate leave."""
    folder.mkdir(parents=True, exist_ok=True)
    write_mark(folder, [*PARTS["fit"], *PARTS["validate"]])
    (folder / "config.yaml").write_text(f"{HEADER} 0.1.0\n# {text}\n")
    for name in ("rollouts/iteration_000001.parquet", "evaluations/validate.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


# The mark.


def mark_often(folder: Path, name: str, begin: Any, failed: Any) -> None:
    begin.wait()
    try:
        for number in range(40):
            write_mark(folder, [f"{name}{number}"])
        failed.put("")
    except Exception as error:
        failed.put(repr(error))


def test_commands_that_start_together_lose_nothing_of_each_others_marks(tmp_path: Path) -> None:
    begin, failed = CONTEXT.Event(), CONTEXT.Queue()
    processes = [CONTEXT.Process(target=mark_often, args=(tmp_path, name, begin, failed)) for name in "abc"]
    for process in processes:
        process.start()
    begin.set()
    assert [failed.get(timeout=PATIENCE_S) for _ in processes] == [""] * 3
    for process in processes:
        process.join()
    mark = read_mark(tmp_path)
    assert mark is not None
    assert mark.parts == {f"{name}{number}" for name in "abc" for number in range(40)}
    assert len(mark.processes or ()) == 3
    assert [path.name for path in tmp_path.iterdir()] == [MARK]


def test_where_folders_have_no_locks_a_mark_is_whole_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr("ibro_lightning.runs.marks.fcntl.flock", refuse)
    (tmp_path / f"{MARK}.partial").write_text("another's, half written")
    write_mark(tmp_path, ["rollouts"])
    mark = read_mark(tmp_path)
    assert mark is not None
    assert mark.parts == {"rollouts"}
    assert (tmp_path / f"{MARK}.partial").read_text() == "another's, half written"


@pytest.mark.parametrize("left", [0, 1, 40, -4], ids=["nothing", "zeros", "a part", "almost all"])
def test_a_torn_mark_does_not_shut_the_folder(left: int, tmp_path: Path) -> None:
    """The settings' header stands for it; a file of that name that nobody of us wrote is still refused."""
    a_run(tmp_path)
    torn = (tmp_path / MARK).read_bytes()[:left]
    (tmp_path / MARK).write_bytes(b"\0" * 300 if left == 1 else torn)  # as a power failure leaves it
    assert in_the_way(tmp_path, PARTS["fit"]) == []
    assert set(survey(tmp_path).own) >= {"config.yaml", "rollouts/iteration_000001.parquet", MARK}
    write_mark(tmp_path, PARTS["predict"])
    assert json.loads((tmp_path / MARK).read_text())["parts"] == sorted({*PARTS["fit"], *PARTS["predict"]})
    for foreign in (b"mine", b"{}", b'{"ibro": 1}'):
        (tmp_path / MARK).write_bytes(foreign)
        assert MARK in in_the_way(tmp_path, PARTS["fit"])


@pytest.mark.parametrize("foreign", [False, True], ids=["alone", "beside others' files"])
def test_after_a_refused_run_the_folder_says_what_it_did(foreign: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    a_run(folder)
    (folder / MARK).write_text((folder / MARK).read_text().replace(str(os.getpid()), "1"))  # another process
    if foreign:
        (folder / "notes.txt").write_text("mine")
    before = content(folder)
    put_back(make_room(folder, ()))
    assert content(folder) == before


def test_a_refused_run_leaves_what_another_command_has_written_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    a_run(folder)
    room = make_room(folder, ())
    with monkeypatch.context() as patch:
        patch.setattr("ibro_lightning.runs.marks.this_process", lambda: "host.1")
        write_mark(folder, PARTS["predict"])
    (folder / "predict.yaml").write_text("theirs")
    put_back(room)
    assert (folder / "predict.yaml").read_text() == "theirs"
    assert (folder / "rollouts" / "iteration_000001.parquet").read_text() == "ours"
    mark = read_mark(folder)
    assert mark is not None
    assert mark.parts >= {*PARTS["fit"], *PARTS["validate"], *PARTS["predict"]}


# Two commands in one folder.


def hold(folder: Path, command: str, ready: Any, end: Any) -> None:
    with FolderLock(folder, command).held():
        ready.put(os.getpid())
        end.wait()


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[Callable[[Path, str], Any]]:
    """Has another process hold a folder for a command, until the event that this returns is set."""
    ready, processes = CONTEXT.Queue(), []

    def start(folder: Path, command: str) -> Any:
        end = CONTEXT.Event()
        processes.append(CONTEXT.Process(target=hold, args=(folder, command, ready, end)))
        processes[-1].start()
        ready.get(timeout=PATIENCE_S)
        return end

    yield start
    for process in processes:
        process.kill()
        process.join()


@pytest.mark.parametrize("command", ["validate", "test", "predict", "export"])
def test_an_earlier_run_is_not_moved_away_under_a_live_command(
    command: str, tmp_path: Path, busy: Callable[[Path, str], Any]
) -> None:
    folder = tmp_path / "run"
    a_run(folder)
    before = content(folder)
    end = busy(folder / "model" if command == "export" else folder, command)
    with pytest.raises(ConfigError, match=rf"in use by process \d+ on .* \({command}\), since") as refused:
        make_room(folder, ())
    assert "\n" not in str(refused.value)
    assert {name: text for name, text in content(folder).items() if ".lock" not in name} == before
    assert not (tmp_path / "run.1").exists()
    threading.Timer(0.2, end.set).start()
    make_room(folder, (), wait_s=PATIENCE_S)
    assert content(tmp_path / "run.1") == before
    assert not list(tmp_path.rglob(".run*"))


def test_no_command_starts_while_an_earlier_run_is_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    a_run(folder)
    seen = []

    def survey_in(path: Path, *arguments: Any) -> Any:
        for name in ("validate", "predict"):
            process = CONTEXT.Process(target=try_to_hold, args=(folder, name, answers := CONTEXT.Queue()))
            process.start()
            seen.append(answers.get(timeout=PATIENCE_S))
            process.join()
        monkeypatch.undo()
        return survey(path, *arguments)

    monkeypatch.setattr("ibro_lightning.runs.moving.survey", survey_in)
    make_room(folder, ())
    assert len(seen) == 2
    assert all(f"in use by process {os.getpid()}" in said and "(fit)" in said for said in seen), seen


def try_to_hold(folder: Path, command: str, answers: Any) -> None:
    try:
        FolderLock(folder, command).take()
        answers.put("taken")
    except ConfigError as error:
        answers.put(str(error))


def test_a_move_of_a_live_run_is_not_undone_by_another_command(
    tmp_path: Path, busy: Callable[[Path, str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of a dead one is."""
    folder = tmp_path / "run"
    a_run(folder)
    before = content(folder)
    folder.rename(tmp_path / "run.1.partial")
    (tmp_path / "run.1.partial" / MOVING).touch()
    end = busy(folder, "fit")
    monkeypatch.setattr("ibro_lightning.runs.moving.PATIENCE_S", 0.0)
    with pytest.raises(ConfigError, match=r"in use by process \d+ on .* \(fit\)"):
        recover_alone(folder, "validate")
    assert not folder.exists()
    monkeypatch.setattr("ibro_lightning.runs.moving.PATIENCE_S", PATIENCE_S)
    end.set()
    recover_alone(folder, "validate")
    assert content(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


# Names with numbers.


def test_what_took_a_name_while_files_were_away_keeps_it(tmp_path: Path) -> None:
    """A process died while it moved a run aside, and another one has written in its place since."""
    run, aside = tmp_path / "run", tmp_path / "run.1.partial"
    for folder, text in ((run, "new"), (aside, "old")):
        folder.mkdir()
        (folder / "summary.json").write_text(text)
    (aside / "config.yaml").write_text("old")
    (aside / MOVING).touch()
    recover(run)
    assert (run / "summary.json").read_text() == "new"
    assert (run / "config.yaml").read_text() == "old"
    assert [path.read_text() for path in tmp_path.glob("run.*/summary.json")] == ["old"]


@pytest.mark.parametrize(
    ("command", "name", "blamed"),
    [
        ("fit", "config.7.yaml", "config.7.yaml"),
        ("fit", "config.7.yaml.partial", "config.7.yaml.partial"),
        ("fit", "earlier.3/rollouts/iteration_000001.parquet", "earlier.3/"),
        ("validate", "validate.2.yaml", "validate.2.yaml"),
        ("predict", "predictions.4/set/batch_0001.parquet", "predictions.4/"),
    ],
)
def test_what_has_a_number_before_the_first_run_does_not_become_the_runs(
    command: str, name: str, blamed: str, tmp_path: Path
) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=f"it holds {blamed}, which no run of this folder has written"):
        claim(tmp_path, PARTS[command])
    assert content(tmp_path) == {name: b"mine"}


def test_other_names_with_numbers_stay_and_stop_nothing(tmp_path: Path) -> None:
    names = ["data.7.yaml", "config.a.yaml", "predictions.4/notes.txt", "earlier.1/notes.txt", "model.1/config.json"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    for command in PARTS:
        claim(tmp_path, PARTS[command])
    (tmp_path / "config.yaml").write_text(f"{HEADER} 0.1.0\n")
    make_room(tmp_path, ())
    assert {name: (tmp_path / name).read_text() for name in names} == dict.fromkeys(names, "mine")


# Files with nothing in them, and links that lead nowhere.


@pytest.mark.parametrize("left", ["", "{"], ids=["empty", "a brace"])
def test_a_file_that_may_be_somebody_elses_is_moved_out_of_the_locks_way(
    left: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / ".run.lock").write_text(left)
    with caplog.at_level("INFO"), FolderLock(tmp_path / "run", "fit").held():
        assert "is not recognisable as a lock: renamed to .run.lock.1" in caplog.text
    assert content(tmp_path) == {".run.lock.1": left.encode()}


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_what_is_in_the_locks_way_is_named(kind: str, tmp_path: Path) -> None:
    lock = tmp_path / ".run.lock"
    lock.symlink_to("nowhere") if kind == "link" else lock.mkdir()
    with pytest.raises(ConfigError, match=rf"nothing can be written there \({lock} is a {kind}\)"):
        FolderLock(tmp_path / "run", "fit").take()
    assert os.path.lexists(lock)


def test_links_that_lead_nowhere_are_moved_aside_like_files(tmp_path: Path) -> None:
    for name in ("d.json", "config.1.yaml", "validate.yaml", "validate.json"):
        (tmp_path / name).symlink_to("/nowhere/x")
    with pytest.raises(ConfigError, match="exists: --overwrite moves it aside"):
        check_free(tmp_path / "d.json", overwrite=False)
    (tmp_path / "config.yaml").write_text(f"{HEADER} 0.1.0\na: 1\n")
    assert keep_settings(tmp_path, RunSettings({"a": 2}, HEADER)) == tmp_path / "config.2.yaml"
    (tmp_path / "new").write_text("a: 1\n")
    set_settings_aside(tmp_path / "validate.yaml", tmp_path / "new")
    EvaluationRecord(tmp_path / "validate", {"weights": "others"})
    for name in ("d.json", "config.1.yaml", "validate.1.yaml", "validate.1.json"):
        assert os.readlink(tmp_path / name) == "/nowhere/x", name


# A run that goes on.


def rollout_of(run: str, path: Path) -> None:
    columns = ("iteration", "prompt_id", "response", "reward", "seed", "trained_on")
    path.parent.mkdir(exist_ok=True)
    pq.write_table(signed(pa.table({name: [0] for name in columns}), run), path)


def test_a_run_that_goes_on_removes_only_what_a_run_wrote(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Files under its own names, of later iterations; those of others are moved, in one line."""
    a_run(tmp_path)
    run, mine = run_id(tmp_path), tmp_path / "evaluations" / "iteration_000003"
    rollout_of(run, tmp_path / "rollouts" / "iteration_000002.parquet")
    rollout_of(run, tmp_path / "rollouts" / "iteration_000003_rank_1.parquet")
    rollout_of("", tmp_path / "rollouts" / "iteration_000004.parquet")  # of an earlier version
    rollout_of("another", tmp_path / "rollouts" / "iteration_000005.parquet")
    (tmp_path / "rollouts" / "iteration_000099.parquet").write_text("mine")
    (tmp_path / "evaluations" / "iteration_000099.json").write_text("mine")
    results = {"questions": 1, "samples": 1, "avg_at_k": {}, "pass_at_k": {}, "mean_length": 1, "truncated": 0}
    mine.with_suffix(".json").write_text(json.dumps({"set": results}))
    (mine / "set").mkdir(parents=True)
    rollout_of("", mine / "set" / "batch_0000.parquet")
    (mine / "set" / "batch_0001.parquet").write_text("mine")
    (mine / "_manifest.json").write_text('{"version": "1", "fingerprint": null, "files": {}}')
    with caplog.at_level("INFO"):
        wind_back(tmp_path, {"iteration": 1, "evaluated": True, "loggers": []})
    assert caplog.text.count(f"is not of this run, which will write such files: moved to {tmp_path / 'foreign.1'}") == 1
    left = content(tmp_path)
    assert left.pop("foreign.1/rollouts/iteration_000005.parquet").startswith(b"PAR1")
    assert [left.pop(name) for name in (
        "foreign.1/rollouts/iteration_000099.parquet", "foreign.1/evaluations/iteration_000099.json",
        "foreign.1/evaluations/iteration_000003/set/batch_0001.parquet",
    )] == [b"mine"] * 3  # fmt: skip
    assert left.keys() == {MARK, "config.yaml", "rollouts/iteration_000001.parquet", "evaluations/validate.json"}


def test_killed_predictions_take_nothing_of_others_with_them(tmp_path: Path) -> None:
    claim(tmp_path, PARTS["predict"])
    folder = tmp_path / "predictions" / "set"
    folder.mkdir(parents=True)
    rollout_of("", folder / "batch_0000.parquet")
    (folder / "batch_0001.parquet").write_text("mine")
    set_predictions_aside(tmp_path / "predictions")
    left = content(tmp_path)
    del left[MARK]
    assert left == {"foreign.1/predictions/set/batch_0001.parquet": b"mine"}


def test_predictions_behind_a_link_stay_where_the_link_leads(tmp_path: Path) -> None:
    """The next command makes a folder of its own."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    claim(run, PARTS["predict"])
    run.mkdir(exist_ok=True)
    (run / "predictions").symlink_to(elsewhere)
    (elsewhere / "set").mkdir()
    rollout_of("", elsewhere / "set" / "batch_0000.parquet")
    (elsewhere / "_manifest.json").write_text('{"version": "1", "complete": true}')
    before = content(elsewhere)
    set_predictions_aside(run / "predictions")
    assert not (run / "predictions").exists()
    assert (run / "predictions.1").readlink() == elsewhere
    assert content(elsewhere) == before


def test_a_new_run_has_an_id_of_its_own_and_a_run_that_goes_on_keeps_its(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    a_run(folder)
    first = run_id(folder)
    write_mark(folder, PARTS["predict"])
    assert run_id(folder) == first != ""
    make_room(folder, ())
    assert run_id(folder) not in ("", first)


# A run's folder that is a link, to another disk.


@pytest.mark.parametrize("foreign", [False, True], ids=["alone", "beside others' files"])
def test_a_linked_folder_stays_one_and_its_runs_stay_on_their_disk(foreign: bool, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "home").mkdir()
    folder, real = tmp_path / "home" / "run", tmp_path / "disk" / "real"
    a_run(real)
    folder.symlink_to(real)
    if foreign:
        (real / "notes.txt").write_text("mine")
    before = content(folder)
    room = make_room(folder, ())
    assert room.aside == real.with_name("real.1")
    assert folder.is_symlink()
    assert list(folder.parent.iterdir()) == [folder]
    moved = content(tmp_path / "disk" / "real.1")
    assert moved.keys() == before.keys() - {"notes.txt"}
    assert set(content(folder)) == {MARK, *(["notes.txt"] if foreign else [])}
    put_back(room)
    assert content(folder) == before
    assert list((tmp_path / "disk").iterdir()) == [real]


def test_a_move_within_a_linked_folder_that_was_killed_is_undone(tmp_path: Path) -> None:
    folder, real = tmp_path / "run", tmp_path / "disk" / "real"
    a_run(real)
    folder.symlink_to(real)
    before = content(real)
    (tmp_path / "disk" / "real.1.partial").mkdir()
    (tmp_path / "disk" / "real.1.partial" / MOVING).touch()
    (real / "rollouts").rename(tmp_path / "disk" / "real.1.partial" / "rollouts")
    recover_alone(folder, "validate")
    assert content(folder) == before
    assert list((tmp_path / "disk").iterdir()) == [real]
    real.rename(tmp_path / "elsewhere")  # a start that was killed in between
    make_room(folder, ())
    assert set(content(real)) == {MARK}


def test_all_that_a_run_writes_is_known_to_be_its_own(workspace: Path, caplog: pytest.LogCaptureFixture) -> None:
    """So that a run that goes on moves nothing of its own away."""
    main(["fit", "--config", "tiny.yaml"])
    main(["predict", "--config", "tiny.yaml"])
    run = workspace / "run"
    paths = [path for path in survey(run).own if path.startswith(("rollouts/", "evaluations/", "predictions/set"))]
    assert sum(path.startswith("rollouts/") for path in paths) > 1
    assert {Path(path).suffix for path in paths} == {".parquet", ".json"}
    assert leave_to_others(run, paths) == paths
    kept = [path for path in paths if path.startswith("rollouts/")]
    (run / MARK).write_text((run / MARK).read_text().replace(run_id(run), "another"))
    with caplog.at_level("INFO"):
        assert leave_to_others(run, kept) == []
    assert "is not of this run" in caplog.text


def test_the_command_line_leaves_a_run_that_is_being_validated_where_it_is(
    workspace: Path, busy: Callable[[Path, str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = workspace / "run"
    a_run(run)
    before = content(run)
    busy(run, "validate")
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "tiny.yaml", "--run_lock.wait_s", "0.1"])
    assert end.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: trainer.default_root_dir: 'run' - in use after 0.1 s by process ")
    assert "(validate), since" in said
    assert content(run) == before


def test_half_a_file_that_none_of_us_began_is_kept(tmp_path: Path) -> None:
    a_run(tmp_path)
    for name, text in (("checkpoints/iteration_000004.ckpt", "mine"), ("rollouts/iteration_000004.parquet", "mine"),
                       ("checkpoints/iteration_000005.ckpt", "PK..."), ("rollouts/iteration_000005.parquet", ""),
                       ("rollouts/iteration_000006.parquet", "PAR1..."), ("summary.json", "{")):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.partial").write_text(text)
    before = content(tmp_path)
    remove_partial(tmp_path)
    foreign = [name for name in before if "000004" in name]
    assert len(foreign) == 2
    assert content(tmp_path) == {
        f"foreign.1/{name}" if name in foreign else name: text
        for name, text in before.items()
        if name in foreign or not name.endswith(".partial")
    }


@pytest.mark.parametrize("foreign", [[], ["notes.txt"]], ids=["alone", "beside a file of others"])
def test_a_model_folder_that_was_hardly_begun_goes(foreign: list[str], tmp_path: Path) -> None:
    a_run(tmp_path)
    folder = tmp_path / "critic.partial"
    folder.mkdir()
    for name in ("ibro_lightning.json.partial", *foreign):
        (folder / name).write_text("")
    remove_partial(tmp_path)
    assert folder.exists() == bool(foreign)
    assert not foreign or sorted(path.name for path in folder.iterdir()) == ["ibro_lightning.json.partial", *foreign]


def test_an_export_that_was_killed_as_it_began_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "ibro_lightning.json.partial").write_text("{")
    finish(begin(tmp_path / "model"), tmp_path / "model", keep_earlier=True)
    assert sorted(content(tmp_path)) == ["model/ibro_lightning.json"]
