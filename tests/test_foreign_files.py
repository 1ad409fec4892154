"""Files of others, whatever they are called and wherever they lie, are where they were, with their bytes, after any
command, whether it ended, failed or was killed. What is ours is catalogued, and nothing of it gets lost either."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger

from helpers.crash import Moment, fit, kill, logs, write_recipe
from helpers.studies import small_study
from helpers.user_code import USER_CODE
from ibro_lightning.callbacks.rollout_log import set_predictions_aside
from ibro_lightning.cli.export import check_free
from ibro_lightning.cli.export import main as export
from ibro_lightning.cli.main import main
from ibro_lightning.errors import ConfigError
from ibro_lightning.evaluation.compare import main as compare
from ibro_lightning.evaluation.record import EvaluationRecord
from ibro_lightning.runs import model_folders, run_files
from ibro_lightning.runs.checkpoints.catalog import Written
from ibro_lightning.runs.checkpoints.keeping import Keeper
from ibro_lightning.runs.checkpoints.manifest import write_manifest
from ibro_lightning.runs.checkpoints.plugin import CheckpointFiles
from ibro_lightning.runs.claims import claim, survey
from ibro_lightning.runs.curve_files import cut_rows, open_csv
from ibro_lightning.runs.holding import lock_paths
from ibro_lightning.runs.marks import HEADER
from ibro_lightning.runs.model_folders import begin, finish, own_files
from ibro_lightning.runs.moving import holds_training, make_room, move, put_back, recover, reopen
from ibro_lightning.runs.resume import forget_beginning, remove_partial, wind_back
from ibro_lightning.runs.run_files import CATALOG, MARK, MOVING, PARTS, entry_of
from ibro_lightning.runs.settings import set_settings_aside
from ibro_lightning.studies.report.command import write_report

ABOUT = {"iteration": 1, "evaluated": True, "loggers": []}


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; of a link, where it leads."""
    found = [path for path in folder.rglob("*") if path.is_symlink() or path.is_file()]
    return {
        path.relative_to(folder).as_posix(): os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        for path in found
    }


# A run's folder as a run leaves it, without the run.


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"ours: {name}")


def a_model(folder: Path, *, keep_earlier: bool = False, text: str = "ours") -> Path:
    partial = begin(folder)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "additional_chat_templates/tools.jinja"):
        (partial / name).parent.mkdir(exist_ok=True)
        (partial / name).write_text(f"{text}: {folder.name}/{name}")
    return finish(partial, folder, keep_earlier=keep_earlier)


SHARDS = "iteration_000000.ckpt"


def a_checkpoint(folder: Path) -> Path:
    """Of shards, as far as anybody looks who does not load it."""
    write(folder, "__0_0.distcp", ".metadata", "meta.pt")
    write_manifest(folder, {})
    return folder


def a_run(folder: Path) -> None:
    folder.mkdir(parents=True)
    claim(folder, [part for parts in PARTS.values() for part in parts], files=["hparams.yaml"])
    events = f"events.out.tfevents.1700000000.{socket.gethostname()}.{os.getpid()}.0"
    (folder / "config.yaml").write_text(f"{HEADER} 0.1.0\n")
    for name in ("validate.yaml", "predict.yaml"):
        (folder / name).write_text(f"{HEADER} 0.1.0\n# {name}\n")
    write(folder, "summary.json", "hparams.yaml", events, "nonfinite/iteration_000002_rank_0.pt")
    for iteration in (1, 2):
        write(folder, f"rollouts/iteration_{iteration:06d}.parquet", f"checkpoints/iteration_{iteration:06d}.ckpt")
    (folder / "checkpoints" / "last.ckpt").symlink_to("iteration_000002.ckpt")
    Written(folder / "checkpoints").add(a_checkpoint(folder / "checkpoints" / SHARDS), SHARDS)
    for name in ("iteration_000000", "iteration_000002", "validate"):
        write(folder, f"evaluations/{name}.json", f"evaluations/{name}/set/batch_0000.parquet")
        (folder / "evaluations" / name / "_manifest.json").write_text("{}")
    write(folder, "predictions/set/batch_0000.parquet", "predictions/_manifest.json")
    (folder / "predictions" / "_manifest.json").write_text("{}")
    for model in ("model", "critic", "adapter"):
        a_model(folder / model)
    write(folder, "rollouts/iteration_000003.parquet.partial", "checkpoints/iteration_000003.ckpt.partial/__0_0.distcp")
    partial = begin(folder / "model")
    (partial / "config.json").write_text("half")


FOLDERS = sorted({str(Path(name).parent) for entry in CATALOG for name in (re.sub(r"\[.*?\]", "", entry.name),)})
PLACES = [
    re.sub(r"<\w+>", lambda m: {"<evaluation>": "validate", "<iteration>": "000002", "<set>": "set"}[m[0]], folder)
    for folder in FOLDERS
    if ".ckpt" not in folder
] + ["", "thesis", "thesis.partial", "model.partial", "rollouts/old", "earlier.1", "runs", "wandb/run-1"]
PLACES += [f"checkpoints/{name}{below}" for name in (SHARDS, "iteration_000003.ckpt.partial") for below in ("", "/hf")]
LOOK_ALIKES = [
    *("notes.txt", "x.partial", "README.md", ".hidden", "a file with spaces", "grün.json", "iteration_1.parquet"),
    *("iteration_000001.ckpt.bak", "iteration_000002.json.old", "batch_1.parquet", "model.safetensors.partial"),
    *("events.out.tfevents.mine", "events.out.tfevents.1700000000.elsewhere.1.0", "config.yaml.orig", "last.ckpt.txt"),
    *("summary.json.1", "model.safetensors2", "iteration_000009.npz", "end.json.partial.partial", "predictions.zip"),
]
NAMES = st.sampled_from(LOOK_ALIKES) | st.text("abc._-1", min_size=1, max_size=12).filter(lambda s: s.strip("."))
PATHS = st.lists(st.tuples(st.sampled_from(sorted(set(PLACES))), NAMES), min_size=1, max_size=6)


def plant(folder: Path, paths: Sequence[tuple[str, str]]) -> dict[str, bytes]:
    """Foreign files beside those of the run; none with a name that we write."""
    planted = {}
    for place, name in paths:
        path = folder / place / name
        relative = path.relative_to(folder).as_posix()
        parents = [parent for parent in path.parents if parent.is_relative_to(folder)]
        if entry_of(relative) and not relative.startswith(("model", "critic", "adapter")):
            continue
        if os.path.lexists(path) or any(os.path.lexists(p) and not p.is_dir() for p in parents):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"foreign: {relative}")
        planted[relative] = path.read_bytes()
    return planted


# Death before any change of a file: from then on the process changes nothing more.


class Killed(BaseException):
    pass


CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate", "os.chmod"}
_left: int | None = None


_made: set[Path] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    global _left
    if _made is not None:
        _made.update(_makes(event, arguments))
    if _left is None or not (event in CHANGES or (event == "open" and isinstance(arguments[1], str)
                                                  and set(arguments[1]) & set("wax+"))):  # fmt: skip
        return
    if _left == 0:
        raise Killed
    _left -= 1


sys.addaudithook(_hook)


def _makes(event: str, arguments: tuple[Any, ...]) -> list[Path]:
    """The paths that get something: made, opened to write, renamed to."""
    which = {"open": 0, "os.mkdir": 0, "os.rename": 1, "os.symlink": 1}.get(event)
    if which is None or not isinstance(arguments[which], str | bytes | Path):
        return []
    flags = arguments[2] if event == "open" else os.O_CREAT
    written = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    return [Path(os.path.abspath(os.fsdecode(arguments[which])))] if written else []


@contextmanager
def recorded(top: Path) -> Iterator[set[str]]:
    """What this process makes below ``top``, relative to it, for a moment, too."""
    global _made
    before, _made, made = _made, set(), set[str]()
    try:
        yield made
    finally:
        found, _made = _made, before
        made |= {path.relative_to(top).as_posix() for path in found if path != top and path.is_relative_to(top)}


def end_of(changes: int | None, function: Callable[[], Any]) -> str:
    """Whether ``function`` was ``killed`` before its n-th change, ``refused``, or came to its end: ``done``."""
    global _left
    _left = changes
    try:
        function()
    except Killed:
        return "killed"
    except ConfigError:
        return "refused"
    finally:
        _left = None
    return "done"


def dies(changes: int | None, function: Callable[[], Any]) -> bool:
    return end_of(changes, function) == "killed"


def changes_of(function: Callable[[], Any]) -> int:
    """How many changes it makes, refused or not."""
    global _left
    _left = 10**9
    with suppress(ConfigError):
        function()
    left, _left = _left, None
    return 10**9 - left


def new_run(folder: Path) -> None:
    recover(folder)
    make_room(folder, ())


def refused_run(folder: Path) -> None:
    recover(folder)
    room = make_room(folder, ())
    if not (folder / "hparams.yaml").exists():
        claim(folder, PARTS["fit"], files=["hparams.yaml"])
        write(folder, "hparams.yaml")
    (folder / "config.yaml").write_text(f"{HEADER} 0.1.0, another\n")
    put_back(room)


def resumed_run(folder: Path) -> None:
    recover(folder)
    reopen(folder)
    wind_back(folder, ABOUT)
    for model in ("model", "critic", "adapter"):
        a_model(folder / model, text="new")


def begun_anew(folder: Path) -> None:
    recover(folder)
    if forget_beginning(folder):
        reopen(folder)
    remove_partial(folder)


def evaluated(folder: Path) -> None:
    recover(folder)
    claim(folder, PARTS["validate"])
    EvaluationRecord(folder / "evaluations" / "validate", {"weights": "others"})
    EvaluationRecord(folder / "evaluations" / "iteration_000000", None)
    write(folder, "validate.yaml.partial")
    set_settings_aside(folder / "validate.yaml", folder / "validate.yaml.partial")


def predicted(folder: Path) -> None:
    recover(folder)
    claim(folder, PARTS["predict"])
    set_predictions_aside(folder / "predictions")


def exported(folder: Path) -> None:
    for model in ("model", "adapter"):
        check_free(folder / model, overwrite=True)
        a_model(folder / model, keep_earlier=True, text="new")


def checkpointed(folder: Path) -> None:
    """As a run does that keeps one; the first of the names is taken by what a killed one has left."""
    recover(folder)
    reopen(folder)
    keeper = Keeper(folder / "checkpoints", 1)
    for iteration in (3, 4):
        path = folder / "checkpoints" / f"iteration_{iteration:06d}.ckpt"
        partial = path.with_name(path.name + ".partial")
        keeper.make_way(partial)
        keeper.give_name(a_checkpoint(partial), path)
        keeper.keep(path, ())


COMMANDS = (new_run, refused_run, resumed_run, begun_anew, evaluated, predicted, exported, checkpointed)
KEPT_BY = {
    "checkpointed": r"(?!.*iteration_00000[034]\.ckpt|checkpoints/(written.txt|last.ckpt))",
    "resumed_run": r"(?!.*(000002\.parquet|iteration_000002[/.]j?|partial|hparams|model/|critic/|adapter/))",
    "begun_anew": r"(?!.*partial)",
    "exported": r"(?!.*partial)",
    "evaluated": r"(?!evaluations/iteration_000000/|.*partial)",
}
"""What is ours and must still be somewhere: what a command does not make again."""


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_after_any_command_killed_or_not_foreign_files_are_where_they_were(command: Callable[[Path], None]) -> None:
    """And what was the run's is still there, under this or another name. The command did something in some."""
    ends = Counter[str]()

    @given(paths=PATHS, moment=st.none() | st.floats(0, 0.999), marked=st.integers(0, 7))
    @example([("", "notes.txt"), ("model", "README.md")], 0.2, 1)
    @example([("", "notes.txt"), ("thesis", "thesis.partial")], 0.6, 1)
    @example([("", "notes.txt"), ("thesis", "thesis.partial")], None, 1)
    @example([("rollouts", "notes.txt"), ("model", "x.partial")], None, 1)
    @example([("checkpoints", "mine.ckpt"), ("evaluations/validate", "notes.txt")], None, 1)
    @example([(place, "x.bin") for place in PLACES if ".ckpt" in place], 0.6, 1)
    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
    def any_foreign_files(paths: list[tuple[str, str]], moment: float | None, marked: int) -> None:
        ends[check(paths, command, moment, is_marked=marked > 0)] += 1

    any_foreign_files()
    assert min(ends["done"], ends["killed"]) >= 2, ends  # of the examples above alone


IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Some 17,000 folders are made and removed again; on a disk, that takes longer than everything else here."""


def check(
    paths: list[tuple[str, str]], command: Callable[[Path], None], moment: float | None, *, is_marked: bool
) -> str:
    """How the command ended, the first time.

    Args:
        moment: after which share of its changes it is killed; then it is tried again.
    """
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as root:
        folder = Path(root, "run")
        a_run(folder)
        foreign = plant(folder, paths)
        outside = plant(Path(root), [("", "run.txt"), ("run.9", "notes.txt"), ("model", "config.json")])
        if not is_marked:  # somebody else's folder, with names like ours
            for name in (MARK, "config.yaml", "validate.yaml", "predict.yaml"):
                (folder / name).unlink()
            foreign = content(folder)
            if command in (resumed_run, exported, checkpointed):
                assume(False)  # they are told what is theirs
        ours = {name: text for name, text in content(folder).items() if name not in foreign}
        changes = None
        if moment is not None:
            copy = shutil.copytree(root, Path(root) / "copy", symlinks=True)
            changes = int(moment * changes_of(lambda: command(copy / "run")))
            shutil.rmtree(copy)
        first = end_of(changes, lambda: command(folder))
        for end in (first, "again") if first == "killed" else (first,):
            now = content(folder)
            places = {name: name for name in foreign}
            if command is checkpointed:  # a name that it needs: the one exception, said in docs/files.md
                places = {name: _at(name, now) for name in foreign}
            assert {name: now.get(place) for name, place in places.items()} == foreign
            assert content(Path(root)).items() >= outside.items()
            everything = set(content(Path(root)).values())
            kept = re.compile(KEPT_BY.get(command.__name__, ""))
            lost = [name for name, text in ours.items() if kept.match(name) and text not in everything]
            was_killed = first == "killed"
            assert set(lost) <= {MARK, "config.yaml"} if command is new_run and was_killed else set(lost) <= {MARK}, (
                lost
            )
            if end == "killed":
                end_of(None, lambda: command(folder))
        return first


def _at(name: str, now: Mapping[str, bytes]) -> str:
    """Where a foreign file may be once its folder was in a checkpoint's way."""
    return name if name in now else re.sub(r"^(checkpoints/[^/]+\.partial)/", r"\1.foreign/", name)


def test_a_move_that_was_killed_anywhere_is_undone_or_done(tmp_path: Path) -> None:
    """Between any two of its renames; then the next start finds the earlier run whole, in one place."""
    changes, killed = 0, True
    while killed:
        folder = tmp_path / str(changes) / "run"
        a_run(folder)
        foreign = plant(folder, [("", "notes.txt"), ("rollouts", "mine.parquet"), ("model", "README.md")])
        before = content(folder)
        killed = dies(changes, lambda folder=folder: new_run(folder))  # type: ignore[misc]
        recover(folder)
        if holds_training(folder):
            assert content(folder).keys() == before.keys(), f"killed before change {changes + 1}"
        else:
            moved = content(folder.with_name("run.1"))
            assert moved.keys() - {MOVING} == before.keys() - foreign.keys(), f"killed before change {changes + 1}"
        assert not list(folder.parent.glob("*.partial"))
        changes += 1
    assert changes > 15


# What is refused, and what is not.


@pytest.mark.parametrize("part", PARTS["fit"])
@pytest.mark.parametrize("form", ["", ".partial"])
def test_a_new_run_is_refused_where_something_else_has_its_names(part: str, form: str, tmp_path: Path) -> None:
    if "." in part:
        (tmp_path / f"{part}{form}").write_text("mine")
    else:
        write(tmp_path / f"{part}{form}", "deep/thesis.tex")
    before = content(tmp_path)
    with pytest.raises(ConfigError, match=rf"{part}.*no run of this folder.*write another folder"):
        make_room(tmp_path, ())
    assert content(tmp_path) == before


def test_files_under_other_names_and_empty_folders_do_not_stop_a_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    write(tmp_path, "data/train.jsonl", "README.md", "events.out.tfevents.1700000000.elsewhere.1.0", "my.partial")
    before = content(tmp_path)
    make_room(tmp_path, ())
    assert content(tmp_path).items() >= before.items()


def test_what_lies_among_the_shards_of_a_checkpoint_does_not_stop_a_run_that_goes_on(tmp_path: Path) -> None:
    a_run(tmp_path / "run")
    write(
        tmp_path / "run", f"checkpoints/{SHARDS}/hf/model.safetensors", "checkpoints/iteration_000009.ckpt/thesis.tex"
    )
    reopen(tmp_path / "run")


@pytest.mark.parametrize(
    "change",
    [
        lambda run: shutil.rmtree(run / "model") or write(run, "model/config.json", "model/model.safetensors"),
        lambda run: shutil.rmtree(run / "model") or (run / "model").symlink_to(run.parent),
        lambda run: shutil.rmtree(run / "critic") or write(run, "critic"),
        lambda run: (run / "summary.json").unlink() or write(run, "summary.json/thesis.tex"),
        lambda run: shutil.rmtree(run / "rollouts") or write(run, "rollouts"),
    ],
    ids=["another model", "a link to one", "a file for a folder", "a folder for a file", "a file for rollouts"],
)
def test_what_took_the_place_of_a_runs_own_files_stops_the_next_one(
    change: Callable[[Path], Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    a_run(folder)
    change(folder)
    before = content(folder)
    for start in (lambda: make_room(folder, ()), lambda: reopen(folder)):
        with pytest.raises(ConfigError, match="which no run of this folder has written"):
            start()
    assert content(folder) == before
    assert not (tmp_path / "run.1").exists()


def test_a_run_of_an_earlier_version_moves_aside_and_its_model_is_kept(tmp_path: Path) -> None:
    """It has no mark and no manifests, but the header of its settings."""
    for name, go_on in (("new", False), ("resumed", True)):
        folder = tmp_path / name
        a_run(folder)
        (folder / MARK).unlink()
        for path in folder.rglob("ibro_lightning.json"):
            path.unlink()
        write(folder, "model/thesis.tex", "notes.txt")
        old = content(folder)
        if go_on:
            reopen(folder)
            wind_back(folder, ABOUT)
            a_model(folder / "model", text="new")
            assert content(folder / "model.1")["config.json"] == old["model/config.json"]
        else:
            make_room(folder, ())
            moved = content(tmp_path / "new.1")
            assert moved.keys() - {MARK} == old.keys() - {"model/thesis.tex", "notes.txt"}
        assert (folder / "model" / "thesis.tex").exists()
        assert (folder / "notes.txt").exists()


def test_a_model_that_somebody_changed_is_moved_aside_and_others_are_written_beside(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    a_model(folder, text="first")
    a_model(folder, text="second")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"], "its own, as it was, is replaced"
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("second", "edited"))
    assert a_model(folder, text="third") == folder
    assert (tmp_path / "model.1" / "config.json").read_text().startswith("edited")
    write(tmp_path, "other/config.json")
    assert a_model(tmp_path / "other") == tmp_path / "other.1"
    write(tmp_path, "model/vocab.txt")
    partial = begin(folder)
    (partial / "vocab.txt").write_text("new")
    assert finish(partial, folder, keep_earlier=False) == tmp_path / "model.2"
    assert (folder / "config.json").read_text().startswith("third")
    assert (folder / "vocab.txt").read_text() == "ours: model/vocab.txt"


def test_a_refused_run_leaves_a_foreign_folder_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    write(folder, "data.txt", "evaluation/notes.txt")
    before = content(folder)
    refused_run(folder)
    assert content(folder) == before


# compare.


def test_a_comparison_replaces_no_other_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "mine.json", "half.json.partial", "file")
    for arguments, said in (
        (["mine.json"], "exists: --overwrite moves it aside"),
        (["half.json"], "half.json.partial is in the way"),
        (["."], "no file can be there"),
        (["file/x.json"], "no file can be there"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):  # before it looks for the evaluations
            compare(["a", "b", "--json", str(tmp_path / arguments[0])])
    with pytest.raises(ConfigError, match="no evaluation there"):
        compare(["a", "b", "--json", str(tmp_path / "mine.json"), "--overwrite"])
    assert (tmp_path / "mine.json").read_text() == "ours: mine.json"


# Real commands. One run with PPO, one with adapters; each under a umask of its own.


MADE: dict[str, set[str]] = {}
"""What the commands of :func:`runs` wrote."""


@pytest.fixture(scope="module")
def runs(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Folders with a finished run each, its settings in ``crash.yaml`` and an export in ``out``."""
    made = {}
    lora = ["--model.policy_options.lora.rank", "2"]
    with pytest.MonkeyPatch.context() as patch:
        for name, mask, algorithm, more in (("ppo", 0o002, "PPOModule", []), ("lora", 0o027, "DAPOModule", lora)):
            folder = tmp_path_factory.mktemp(name)
            write_recipe(folder, algorithm, tiny_policy, USER_CODE)
            patch.chdir(folder)
            patch.syspath_prepend(str(folder))
            sys.modules.pop("user_code", None)
            before = os.umask(mask)
            record = recorded(folder)
            MADE[name] = record.__enter__()
            try:
                main(["fit", "--config", "crash.yaml", "--trainer.max_epochs", "1", *more])
                main(["predict", "--config", "crash.yaml", *more])
                main(["export", "--ckpt_path", "last", "--run", "run", "--output", "out/policy"])
            finally:
                record.__exit__(None, None, None)
                os.umask(before)
            made[name] = folder
    yield made
    sys.modules.pop("user_code", None)


@pytest.mark.parametrize(("name", "file", "folder"), [("ppo", 0o664, 0o775), ("lora", 0o640, 0o750)])
def test_all_files_have_the_modes_that_the_umask_asks_for(
    name: str, file: int, folder: int, runs: dict[str, Path]
) -> None:
    asked, seen = {False: file, True: folder}, set()
    for top in ("run", "out"):
        for path in [runs[name] / top, *(runs[name] / top).rglob("*")]:
            if not path.is_symlink():
                assert stat.S_IMODE(path.stat().st_mode) == asked[path.is_dir()], path
                seen.add(path.suffix)
    assert {".safetensors", ".ckpt", ".parquet", ".json", ".yaml"} <= seen


@pytest.mark.parametrize("name", ["ppo", "lora"])
def test_every_file_that_a_run_leaves_is_in_the_catalogue_and_known_to_be_its_own(
    name: str, runs: dict[str, Path]
) -> None:
    run = runs[name] / "run"
    found = survey(run)
    assert found.foreign == ()
    parts = {entry.part for path in found.own if (entry := entry_of(path))}
    assert parts >= {"config.yaml", "rollouts", "checkpoints", "evaluations", "predictions", "summary.json", MARK}
    assert parts >= {"critic" if name == "ppo" else "adapter", "model"}
    assert [path for path in found.own if entry_of(path) is None] == [
        path for path in sorted(found.own) if path.startswith("events.") or path == "hparams.yaml"
    ]
    for beside in ("policy", "critic" if name == "ppo" else "adapter"):
        out = runs[name] / "out" / beside
        assert sorted(own_files(out)) == sorted(content(out))


def test_an_export_replaces_nothing(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A base policy at its output, something else beside it, an earlier export; refused before any weights are read."""
    folder = Path(shutil.copytree(runs["lora"], tmp_path / "lora", symlinks=True))
    monkeypatch.chdir(folder)
    monkeypatch.setattr("ibro_lightning.cli.export.load_weights", lambda *_: pytest.fail("work has started"))
    base = folder / "base"
    shutil.copytree(folder / "out" / "policy", base)
    (base / "ibro_lightning.json").unlink()
    write(folder, "beside/adapter/adapter_config.json", "notes/thesis.tex", "file")
    before = content(folder)
    for argv, said in (
        (["base"], "no export has written it"),
        (["base", "--overwrite"], "no export has written it"),
        (["beside/model"], "'beside/adapter' - exists, and no export has written it"),
        (["beside/adapter"], "no export has written it"),
        (["new/adapter"], "another part of the model"),
        (["notes"], "no export has written it"),
        (["file"], "is a file"),
        (["file/x"], "is a file"),
        (["out/policy"], "exists: --overwrite moves it to out/policy.1"),
        (["run/model"], "exists: --overwrite moves it to run/model.1"),
        (["run/checkpoints"], "no export has written it"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            export(["--ckpt_path", "last", "--run", "run", "--output", *argv])
        assert content(folder) == before, argv


def test_an_export_that_overwrites_keeps_the_earlier_one_also_if_it_fails(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(runs["ppo"], tmp_path / "ppo", symlinks=True))
    monkeypatch.chdir(folder)
    write(folder, "out/policy/README.md", "out/critic.txt")
    before = content(folder / "out")
    again = ["--ckpt_path", "last", "--run", "run", "--output", "out/policy", "--overwrite"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ibro_lightning.models.hf_folder.write_beside", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export(again)
    assert {name: content(folder / "out").get(name) for name in before} == before
    export(again)
    after = content(folder / "out")
    assert after.items() >= before.items(), "the same weights, and what is not ours"
    for name in (name for name in before if name.startswith("policy/") and not name.endswith("README.md")):
        assert after[name.replace("policy/", "policy.1/")] == before[name]
    assert (folder / "out" / "critic.1" / "model.safetensors").exists()
    assert not list((folder / "out").glob("*.partial"))


def test_the_command_line_refuses_before_any_model_is_loaded(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(runs["ppo"]))
    shutil.copy(runs["ppo"] / "crash.yaml", tmp_path)
    monkeypatch.setattr(
        "ibro_lightning.modules.policy_module.build_policy", lambda *_: pytest.fail("a model is loaded")
    )
    write(tmp_path / "run", "model/config.json", "checkpoints/mine.ckpt", "evaluations/a.json", "predictions/b.json")
    before = content(tmp_path)
    for command, name in (("fit", "checkpoints/"), ("validate", "evaluations/"), ("predict", "predictions/")):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([command, "--config", "crash.yaml"])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        line = error[error.index("error:") :]
        assert line.count("\n") == 1
        assert "trainer.default_root_dir: 'run'" in line
        assert name in line
        assert content(tmp_path) == before


def test_a_resumed_run_replaces_only_what_it_wrote(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With files of others in each of its folders; then a new run in the same folder, which moves it aside."""
    folder = Path(shutil.copytree(runs["ppo"], tmp_path / "ppo", symlinks=True, ignore=shutil.ignore_patterns("*.1")))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    other = "events.out.tfevents.1700000000.elsewhere.1.0"
    paths = [(place, name) for place in ("", "rollouts", "checkpoints", "model", "critic", "evaluations", "predictions")
             for name in ("notes.txt", "mine.partial")]  # fmt: skip
    foreign = plant(
        folder / "run", [*paths, ("", other), ("evaluations/iteration_000000", "x"), ("mine", "iteration_000001.ckpt")]
    )
    arguments = ["fit", "--config", "crash.yaml", "--trainer.max_epochs", "2"]
    with recorded(folder) as made:
        main([*arguments, "--ckpt_path", "last", "--num_threads", "1"])
    assert "run/config.1.yaml" in made
    assert undocumented(made) == []
    assert content(folder / "run").items() >= foreign.items()
    assert json.loads((folder / "run" / "summary.json").read_text())["iterations"] == 2
    assert not list((folder / "run").glob("*.1"))
    first = content(folder / "run")
    main(["fit", "--config", "crash.yaml", "--trainer.max_epochs", "1"])
    assert content(folder / "run").items() >= foreign.items()
    aside = content(folder / "run.1")
    assert aside == {name: text for name, text in first.items() if name not in foreign}


@pytest.mark.parametrize(
    "moment",
    [
        Moment("file", 3),
        pytest.param(Moment("ibro_lightning.models.hf_folder.finish", 1), marks=pytest.mark.slow),
        pytest.param(Moment("half", 2), marks=pytest.mark.slow),
        *(pytest.param(Moment("file", number), marks=pytest.mark.slow) for number in range(6, 120, 16)),
    ],
    ids=str,
)
def test_killed_runs_leave_foreign_files_alone(
    moment: Moment, runs: dict[str, Path], tmp_path: Path, tiny_policy: Path
) -> None:
    """A new run where an earlier one is, killed; then again, to its end."""
    write_recipe(tmp_path, "PPOModule", tiny_policy, USER_CODE)
    shutil.copytree(runs["ppo"] / "run", tmp_path / "run", symlinks=True)
    foreign = plant(tmp_path / "run", [(place, "notes.txt") for place in PLACES] + [("", "mine.partial")])
    earlier = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    kill(tmp_path, moment, fresh=False)
    assert (after := content(tmp_path / "run")).items() >= {_at(name, after): foreign[name] for name in foreign}.items()
    codes = fit(tmp_path)
    assert codes == [0], logs(tmp_path)
    assert (after := content(tmp_path / "run")).items() >= {_at(name, after): foreign[name] for name in foreign}.items()
    assert not list(tmp_path.glob("*.partial"))
    assert earlier in [path.read_bytes() for path in tmp_path.glob("run.*/model/model.safetensors")]


# The documentation.


def test_the_list_in_the_documentation_is_the_catalogue() -> None:
    text = Path(__file__).parents[1].joinpath("docs", "files.md").read_text()
    assert run_files.table() in text, "docs/files.md: put in what python -m ibro_lightning.runs.run_files prints"
    assert all((entry.pattern, entry.folders, entry.fixed_folders) for entry in CATALOG), "each is a valid pattern"
    assert {part for parts in PARTS.values() for part in parts} == {entry.part for entry in CATALOG} - {MARK}


DOCUMENTATION = Path(__file__).parents[1] / "docs" / "files.md"
NAMES_OF = {
    "<run>": "run",
    "<out>": "policy",
    "<json>": "x.json",
    "<report>": "report",
    "<command>": "(?:validate|test|predict)",
}


def documented() -> dict[str, re.Pattern[str]]:
    """Every name in the tables, relative to where the run's folder lies."""
    inside, beside = DOCUMENTATION.read_text().split("## Beside")
    rows = [f"<run>/{name}" for name in re.findall(r"^\| `(.+?)` \|", inside, re.MULTILINE)]
    rows += re.findall(r"^\| `(.+?)` \|", beside, re.MULTILINE)
    return {row: re.compile(_filled(run_files._pattern(row))) for row in rows}


def _filled(pattern: str) -> str:
    for token, value in NAMES_OF.items():
        pattern = pattern.replace(token, value)
    return pattern


def test_what_a_killed_writer_leaves_in_an_unfinished_model_goes(tmp_path: Path) -> None:
    """safetensors writes each file under another name first; somebody's file beside them stays, and sends the next
    model elsewhere, also once a second process was killed there."""
    first = model_folders.begin(tmp_path / "model")
    write(first, "config.json", ".tmpfqqw8Z", "tokenizer/.tmpAbC123")
    assert model_folders.begin(tmp_path / "model") == first
    assert [path.name for path in first.iterdir()] == [model_folders.MANIFEST]
    write(first, "thesis.tex", ".tmpfqqw8Z")
    second = model_folders.begin(tmp_path / "model")
    write(second, ".tmpAbC123")
    assert model_folders.begin(tmp_path / "model") == second != first
    assert [path.name for path in first.iterdir()] == ["thesis.tex"]
    assert [path.name for path in second.iterdir()] == [model_folders.MANIFEST]


def undocumented(paths: Collection[str], known: Mapping[str, re.Pattern[str]] | None = None) -> list[str]:
    """Those that have no row, a folder none below it, nor (in the first table, as said there) a name without
    ``.partial`` that has one."""
    known = known or documented()
    folders = {"/".join(row.split("/")[:depth]) for row in known for depth in range(1, row.count("/") + 1)}
    patterns = [*known.values(), *(re.compile(_filled(run_files._pattern(folder))) for folder in folders)]
    names = {path: path.removesuffix(".partial") if path.startswith("run/") else path for path in paths}
    return sorted(p for p, name in names.items() if not any(k.fullmatch(p) or k.fullmatch(name) for k in patterns))


def test_every_name_that_a_command_writes_is_in_the_documentation_and_no_other(
    runs: dict[str, Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of whole commands, of the rarer moves, and of locks."""
    study = small_study(tmp_path_factory.mktemp("study"))
    made = {name for names in MADE.values() for name in names if not name.startswith("out")}
    made |= {name.removeprefix("out/") for names in MADE.values() for name in names if name.startswith("out/")}
    run, number = tmp_path / "run", "iteration_000001.ckpt"
    with recorded(tmp_path) as more:
        a_run(run)
        write(run, "model/README.md")
        new_run(run)
        shutil.copytree(tmp_path / "run.1", run, symlinks=True, dirs_exist_ok=True)
        move(run, run / "earlier.1", [*survey(run).own])
        write(run, f"checkpoints/{number}", f"checkpoints/{number}.partial/thesis.tex", "checkpoints/last.ckpt")
        write(run, f"checkpoints/{number}.partial/__0_0.distcp", "checkpoints/last.ckpt.partial")
        save(Keeper(run / "checkpoints", 1), run / "checkpoints", 1)
        evaluation = str(runs["ppo"] / "run" / "evaluations" / "iteration_000000.json")
        for _ in range(2):
            compare([evaluation, evaluation, "--json", str(tmp_path / "x.json")])
        write(tmp_path, "report/report.md")
        write_report([study], tmp_path / "report", overwrite=True)
        (run / "metrics.csv").write_text("step,x\n1,2\n3,4\n")
        open_csv(CSVLogger(tmp_path, name="run", version=""))
        cut_rows(run / "metrics.csv", 1)
    made |= (more | content(tmp_path).keys()) - {"run/checkpoints/iteration_000001.ckpt.partial/thesis.tex"}
    locks = [path for command in ("fit", "validate", "test", "predict") for path in lock_paths(run, command)]
    locks += lock_paths(tmp_path / "policy", "export")
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: True)
        locks += [path for command in ("fit", "validate", "test", "predict") for path in lock_paths(run, command)]
    assert len(locks) == 9
    assert {".run.lock", ".run.predict.lock", ".policy.export.lock"} <= made, "as they are"
    made |= {path.relative_to(tmp_path).as_posix() for path in locks}
    made = {name for name in made if "__pycache__" not in name.split("/")}  # the interpreter's, beside a user's code
    assert undocumented(made) == []
    assert undocumented(["run/x", "run/model.bak/x", ".run.fit.lock", "x", "run/checkpoints/x.foreign"]) != []
    beside = DOCUMENTATION.read_text().split("## Beside")[1]
    never = [row for row, pattern in documented().items() if not any(map(pattern.fullmatch, made)) and row in beside]
    assert never == []


def save(keeper: Keeper, folder: Path, iteration: int) -> None:
    """As the callback does it."""
    path = folder / f"iteration_{iteration:06d}.ckpt"
    partial = path.with_name(path.name + ".partial")
    keeper.make_way(partial)
    CheckpointFiles().save_checkpoint({"state_dict": {"w": torch.zeros(2)}, "iteration": iteration}, partial)
    keeper.give_name(partial, path)
    keeper.keep(path, ())


@pytest.mark.parametrize("part", ["rollouts/iteration_000001.parquet", "checkpoints/iteration_000001.ckpt", "model"])
@pytest.mark.parametrize("is_complete", [True, False])
def test_only_a_run_without_a_complete_iteration_is_forgotten(part: str, is_complete: bool, tmp_path: Path) -> None:
    """A folder that holds more is kept as it is. Unfinished files do not count."""
    claim(tmp_path, PARTS["fit"], files=["hparams.yaml"])
    (tmp_path / "config.yaml").write_text(f"{HEADER} 0.1.0\n")
    write(tmp_path, "hparams.yaml")
    if not is_complete:
        (begin(tmp_path / part) / "config.json").write_text("half") if part == "model" else write(
            tmp_path, f"{part}.partial"
        )
    elif part == "model":
        a_model(tmp_path / part)
    else:
        write(tmp_path, part)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert forget_beginning(tmp_path) is not is_complete
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert (after == before) is is_complete
    assert (tmp_path / "hparams.yaml").exists() is is_complete
