"""A run that goes on with other settings says which, keeps the earlier ones, and is refused where they leave the
checkpoint's state without a meaning."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from ibro_lightning.cli.main import main
from ibro_lightning.errors import ConfigError
from ibro_lightning.runs.checkpoints.index import ABOUT
from ibro_lightning.runs.checkpoints.plugin import read_checkpoint
from ibro_lightning.runs.marks import HEADER
from ibro_lightning.runs.resume import check_continues
from ibro_lightning.runs.settings import ResumeOptions, RunSettings, check_settings, keep_settings, put_settings_back
from ibro_lightning.seeding import run_seed

VERSIONS = f"{HEADER} 1.0.0, torch 2.13.0\n# python -m ibro_lightning fit\n"
IB = {"class_path": "ibro_lightning.regularizers.InformationBottleneck", "init_args": {"coef": 0.1, "clip": 1.0}}
BAND = {"class_path": "ibro_lightning.regularizers.coefficients.EntropyBand", "init_args": {"low": 0.5}}
CONFIG: dict[str, Any] = {
    "trainer": {"max_epochs": 3, "devices": "1", "default_root_dir": "run"},
    "model": {
        "class_path": "ibro_lightning.modules.DAPOModule",
        "init_args": {
            "policy": "base",
            "regularizer": IB,
            "kl": None,
            "learning_rate": 1e-5,
            "mini_batch_prompts": 2,
            "policy_options": {"dtype": "float32", "lora": None, "revision": "main"},
        },
    },
    "data": {
        "class_path": "ibro_lightning.datamodules.RolloutDataModule",
        "init_args": {
            "source": {"class_path": "DatasetSource", "init_args": {"path": "a.jsonl", "split": "train"}},
            "reward": {"class_path": "MathReward", "init_args": {"correct": 1.0}},
            "sampling": {"temperature": 1.0},
            "prompts_per_rollout": 4,
            "group_size": 4,
            "engine": None,
            "eval_sets": {"starts": {"samples": 4}},
            "prompt_limits": {"max_tokens": None},
        },
    },
    "num_threads": 1,
    "resume": {"allow_changes": False},
    "run_lock": {"wait_s": 0.0},
    "ckpt_path": None,
}


def changed(setting: str = "", value: Any = None, versions: str = VERSIONS) -> RunSettings:
    """``CONFIG`` with another value; ``...`` removes it."""
    config = copy.deepcopy(CONFIG)
    if setting:
        *path, last = setting.split(".")
        place = config
        for name in path:
            place = place[name]
            place = place.get("init_args", place)
        if value is ...:
            del place[last]
        else:
            place[last] = value
    return RunSettings.parse(versions + yaml.safe_dump(config, sort_keys=False))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """One of a run with ``CONFIG``."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(VERSIONS + yaml.safe_dump(CONFIG, sort_keys=False))
    path = tmp_path / "run" / "checkpoints" / "iteration_000002.ckpt"
    path.write_bytes(b"")
    return path


class TestWhatMayChange:
    def test_a_class_that_has_moved_since_is_the_same_one(self, checkpoint: Path, caplog: Any) -> None:
        """Among its settings, those that differ are compared one by one."""
        old = CONFIG["data"]["init_args"]["source"]["init_args"]
        for package in ("datamodules", "sources"):
            source = {"class_path": f"ibro_lightning.{package}.DatasetSource", "init_args": old}
            settings = changed("data.source", source)
            if package == "datamodules":
                (checkpoint.parents[1] / "config.yaml").write_text(VERSIONS + yaml.safe_dump(settings.values))
        with caplog.at_level(logging.INFO):
            check_settings(checkpoint, settings, ResumeOptions())
            assert "->" not in caplog.text
            source["init_args"] = {**old, "split": "test"}
            with pytest.raises(ConfigError, match=r"^data\.source\.split: 'test' - "):
                check_settings(checkpoint, changed("data.source", source), ResumeOptions())

    @pytest.mark.parametrize(
        ("setting", "value"),
        [
            ("trainer.max_epochs", 5),
            ("trainer.devices", "8"),
            ("trainer.default_root_dir", "b"),
            ("model.learning_rate", 1e-6),
            ("model.mini_batch_prompts", 4),
            ("model.regularizer.coef", 0.2),
            ("model.policy_options.dtype", "bfloat16"),
            ("data.engine", {"class_path": "VLLMEngine"}),
            ("data.eval_sets.more", {"samples": 8}),
            ("data.sampling.temperature", 0.9),
            ("data.reward.correct", 2.0),
            ("model.kl", {"class_path": "ReferenceKL", "init_args": {"coef": 0.1}}),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_is_said(self, setting: str, value: Any, checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO):
            check_settings(checkpoint, changed(setting, value), ResumeOptions())
        said = caplog.text
        assert f"{setting}  " in said
        assert " -> " in said
        assert said.count(" -> ") == 1
        assert str(checkpoint.parents[1] / "config.yaml") in said

    @pytest.mark.parametrize(
        ("setting", "value"),
        [("ckpt_path", "last"), ("resume.allow_changes", True), ("run_lock.wait_s", 5.0), ("model.kl", {})],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_or_is_no_change(
        self, setting: str, value: Any, checkpoint: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO):
            check_settings(checkpoint, changed(setting, value), ResumeOptions())
            keep_settings(checkpoint.parents[1], changed(setting, value))
        assert not caplog.text
        assert [path.name for path in checkpoint.parents[1].glob("*.yaml")] == ["config.yaml"]


FIXED: list[tuple[str, Any, str]] = [
    ("model.policy", "other", "base"),
    ("model.policy", {"class_path": "m.Qwen2FromScratch", "init_args": {"hidden_size": 8}}, "base"),
    ("model.regularizer", None, "InformationBottleneck(coef=0.1, clip=1.0)"),
    ("model.regularizer.coef", BAND, "0.1"),
    ("model.policy_options.lora", {"rank": 8}, "null"),
    ("model.policy_options.revision", "v2", "main"),
    ("data.source.path", "b.jsonl", "a.jsonl"),
    ("data.source", {"class_path": "SumsSource"}, "DatasetSource(path=a.jsonl, split=train)"),
    ("data.reward", {"class_path": "CodeReward"}, "MathReward(correct=1.0)"),
    ("data.group_size", 8, "4"),
    ("data.prompts_per_rollout", 8, "4"),
    ("data.prompt_limits.max_tokens", 16, "null"),
]


class TestWhatMayNot:
    @pytest.mark.parametrize(("setting", "value", "then"), FIXED, ids=lambda value: str(value)[:24])
    def test_is_refused_in_one_line_unless_told_to(
        self, setting: str, value: Any, then: str, checkpoint: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(ConfigError) as refused:
            check_settings(checkpoint, changed(setting, value), ResumeOptions())
        said = str(refused.value)
        assert said.startswith(f"{setting}: ")
        assert f"is of a run with {then}, and " in said
        assert said.endswith("or write --resume.allow_changes true to resume anyway")
        assert "\n" not in said
        with caplog.at_level(logging.INFO):
            check_settings(checkpoint, changed(setting, value), ResumeOptions(allow_changes=True))
        assert f"{setting}  {then} -> " in caplog.text

    def test_all_of_it_is_named(self, checkpoint: Path) -> None:
        now = changed("data.group_size", 8)
        now.values["data"]["init_args"]["prompts_per_rollout"] = 2  # type: ignore[index]
        with pytest.raises(ConfigError, match=r"^data.*; the same goes for data\.(group_size|prompts_per_rollout):"):
            check_settings(checkpoint, now, ResumeOptions())

    def test_what_another_version_does_not_know_is_no_reason(self, checkpoint: Path) -> None:
        """But what it knows is one."""
        other = VERSIONS.replace("1.0.0", "1.1.0")
        check_settings(checkpoint, changed("data.prompt_limits", ..., other), ResumeOptions())
        with pytest.raises(ConfigError, match=r"^data\.group_size"):
            check_settings(checkpoint, changed("data.group_size", 8, other), ResumeOptions())

    @pytest.mark.parametrize(
        "content", [None, "", "data: {group_size: 2}", f"{HEADER}\nwords", f"{HEADER}\na: [", "\0"], ids=repr
    )
    def test_without_settings_of_then_nothing_is_compared(
        self, content: str | None, checkpoint: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A run from Python has none; a damaged file is kept all the same. One line says so."""
        folder = checkpoint.parents[1]
        (folder / "config.yaml").unlink()
        if content is not None:
            (folder / "config.yaml").write_text(content)
        with caplog.at_level(logging.INFO):
            check_settings(checkpoint, changed("data.group_size", 8), ResumeOptions())
            kept = keep_settings(folder, changed())
        (said,) = (line for line in caplog.text.splitlines() if "cannot be compared" in line)
        assert str(folder / "config.yaml") in said
        assert (kept is None) == (content is None)
        if kept is not None:
            assert kept.read_text() == content

    @pytest.mark.parametrize("then", ["base", "./base/", "link", "/absolute"])
    def test_a_path_in_another_spelling_is_the_same(
        self, then: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Also seen from another folder than where the run began; one that leads elsewhere is another."""
        top = checkpoint.parents[2]
        for name in ("base", "other", "elsewhere/base"):
            (top / name).mkdir(parents=True)
        (top / "link").symlink_to("base")
        (top / "a.jsonl").touch()
        config = copy.deepcopy(CONFIG)
        config["model"]["init_args"]["policy"] = str(top / "base") if then == "/absolute" else then
        (top / "run" / "config.yaml").write_text(VERSIONS + yaml.safe_dump(config, sort_keys=False))
        monkeypatch.chdir(top / "elsewhere")
        for now in (str(top / "base"), "../base", str(top / "link")):
            with caplog.at_level(logging.INFO):
                check_settings(checkpoint, changed("model.policy", now), ResumeOptions())
            assert not caplog.text
        check_settings(checkpoint, _with(changed("model.policy", "../base"), "../a.jsonl"), ResumeOptions())
        for now in (str(top / "other"), str(top / "elsewhere" / "base"), str(top / "nowhere")):
            with pytest.raises(ConfigError, match=r"^model\.policy"):
                check_settings(checkpoint, changed("model.policy", now), ResumeOptions())


def _with(settings: RunSettings, path: str) -> RunSettings:
    settings.values["data"]["init_args"]["source"]["init_args"]["path"] = path
    return settings


class TestTheEarlierSettings:
    def test_are_kept_each_once(self, checkpoint: Path) -> None:
        folder = checkpoint.parents[1]
        first = (folder / "config.yaml").read_bytes()
        kept = keep_settings(folder, changed("num_threads", 2))
        assert kept == folder / "config.1.yaml"
        assert keep_settings(folder, changed("num_threads", 2)) == kept, "killed before the new ones were written"
        (folder / "config.yaml").write_text("other: 1")
        assert keep_settings(folder, changed()) == folder / "config.2.yaml"
        assert (folder / "config.1.yaml").read_bytes() == first
        assert (folder / "config.2.yaml").read_text() == "other: 1"

    def test_are_kept_if_only_the_libraries_are_others(self, checkpoint: Path) -> None:
        assert keep_settings(checkpoint.parents[1], changed(versions=VERSIONS.replace("2.13", "2.14"))) is not None

    def test_come_back_if_nothing_was_computed_with_others(self, checkpoint: Path) -> None:
        folder = checkpoint.parents[1]
        first = (folder / "config.yaml").read_bytes()
        kept = keep_settings(folder, changed("num_threads", 2))
        (folder / "config.yaml").write_text("other: 1")
        put_settings_back(folder, kept)
        assert (folder / "config.yaml").read_bytes() == first
        assert [path.name for path in folder.glob("config*")] == ["config.yaml"]


def test_a_checkpoint_of_another_version_is_said(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    about = {"version": "0.0.9", "algorithm": "DAPOModule", "seed": run_seed(), "iteration": 2}
    monkeypatch.setattr("ibro_lightning.runs.resume.read_about", lambda path: {ABOUT: about})
    with caplog.at_level(logging.INFO):
        check_continues(checkpoint, checkpoint.parents[2] / "elsewhere", "DAPOModule")
    assert "was written by ibro_lightning 0.0.9, this is " in caplog.text


def test_on_the_command_line(
    workspace: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Refused before anything in the folder changes; allowed, the run goes on and has both files."""
    fit = ["fit", "--config", "tiny.yaml", "--trainer.check_val_every_n_epoch=9"]
    main([*fit, "--trainer.max_epochs=1"])
    run = workspace / "run"
    (run / "rollouts" / "iteration_000002.parquet").write_bytes(b"of an iteration that winding back removes")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    more = [*fit, "--ckpt_path=last", "--data.group_size=2"]
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit) as end:
        main(more)
    assert end.value.code == 2
    assert "data.group_size  4 -> 2" in caplog.text
    assert "trainer.max_epochs  1 -> 2" in caplog.text
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: data.group_size: 2 - ")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    main([*more, "--resume.allow_changes=true"])
    assert (run / "config.1.yaml").read_bytes() == before[run / "config.yaml"]
    assert RunSettings.parse((run / "config.yaml").read_text()).values["data"]["init_args"]["group_size"] == 2
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")[ABOUT]["iteration"] == 2


def test_a_dataset_that_has_changed_under_its_name(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The settings are the same: the checkpoint itself knows its prompts."""
    fit = ["fit", "--config", "tiny.yaml", "--trainer.check_val_every_n_epoch=9", "--export.enabled=false"]
    main([*fit, "--trainer.max_epochs=1"])
    settings = (workspace / "run" / "config.yaml").read_bytes()
    import user_code

    problems = list(user_code.Starts().problems())
    monkeypatch.setattr(user_code.Starts, "problems", lambda self: problems[1:])
    with pytest.raises(SystemExit) as end:
        main([*fit, "--ckpt_path=last"])
    assert end.value.code == 2
    assert "error: data.source: '9 prompts' - not those of the checkpoint's run: " in capsys.readouterr().err
    assert (workspace / "run" / "config.yaml").read_bytes() == settings
    assert not (workspace / "run" / "config.1.yaml").exists()
    main([*fit, "--ckpt_path=last", "--resume.allow_changes=true"])
    assert (workspace / "run" / "config.1.yaml").read_bytes() == settings
