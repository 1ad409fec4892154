"""The callback InformationPlane: its curves, on one rank and on two, and a training that it does not change."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from helpers.forked import fork_engines
from helpers.processes import logs, run_ranks
from helpers.run_comparison import curves, differences
from helpers.runs import CHECKPOINTS, refusal, same, weights
from ibro_lightning.callbacks import InformationPlane
from ibro_lightning.cli.main import main
from ibro_lightning.errors import ConfigError
from ibro_lightning.regularizers import IBRO
from ibro_lightning.regularizers.hindsight import HindsightTemplate

ON = ["--information_plane.every_n_iterations", "1", "--information_plane.responses", "8"]
OFF = ["--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "false"]
SHOWN = ["--information_plane.template", "{prompt}{answer}>{prompt}"]
PPO = """
model:
  class_path: PPOModule
  init_args: {critic_optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-2}}, mini_batch_prompts: 6}
data: {init_args: {prompts_per_rollout: 12, group_size: 1, dynamic_sampling: null}}
"""
EVERY = {
    *("conditional_entropy", "conditional_entropy_per_token", "conditional_entropy_error", "joint_entropy"),
    *("marginal_entropy", "marginal_entropy_error", "marginal_entropy_drift"),
    *("mutual_information", "mutual_information_error", "mutual_information_upper", "mutual_information_ceiling"),
    *("entropy_positive_advantage", "entropy_negative_advantage", "regularizer_gradient_share"),
    *(f"entropy_{name}_quarter" for name in ("first", "second", "third", "last")),
    *("entropy_given_answer", "corr_advantage_entropy_given_answer", "corr_advantage_lambda", "answer_information"),
}


def run(folder: str, *argv: str) -> dict[str, list[tuple[int, float]]]:
    main(["fit", "--config", "tiny.yaml", *OFF, "--trainer.default_root_dir", folder, *argv])
    return curves(Path(folder))


def of_plane(found: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("information/"): v for name, v in found.items() if name.startswith("information/")}


@pytest.mark.parametrize("algorithm", ["DAPO", "PPO", "overlap"])
def test_training_is_the_same_bit_for_bit_and_every_curve_is_there(
    algorithm: str, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workspace / "ppo.yaml").write_text(PPO)
    settings = {"DAPO": [], "PPO": ["--config", "ppo.yaml"], "overlap": ["--data.max_staleness", "1"]}[algorithm]
    if algorithm == "overlap":
        fork_engines(monkeypatch)
    without, found = run("without", *settings), run("with", *settings, *ON, *SHOWN)
    assert same(weights("without"), weights("with"))
    measured = of_plane(found)
    assert {name: v for name, v in found.items() if name.removeprefix("information/") not in measured} == without
    assert measured.keys() >= EVERY
    assert all([step for step, _ in measured[name]] == [1, 2] for name in EVERY)
    assert all(math.isfinite(value) for points in measured.values() for _, value in points)
    for _, value in measured["mutual_information"]:
        assert value <= measured["mutual_information_ceiling"][0][1] + 1e-6
    parts = (dict(measured[name]) for name in ("marginal_entropy", "conditional_entropy", "mutual_information"))
    total, given, information = parts
    assert all(total[n] == pytest.approx(given[n] + information[n], abs=1e-5) for n in (1, 2))
    assert measured["marginal_entropy_drift"][0][1] == 0.0
    assert measured["marginal_entropy_drift"][1][1] == pytest.approx(total[2] - total[1], abs=1e-5)
    states = torch.load(Path("without") / CHECKPOINTS.name / "last.ckpt", weights_only=True)["callbacks"]
    assert any("InformationPlane" in name for name in states)


def test_a_resumed_run_has_the_same_curves_bit_for_bit(workspace: Path) -> None:
    four = [*ON, "--information_plane.every_n_iterations", "3", "--trainer.max_epochs", "4"]
    run("whole", *four)
    run("parts", *four, "--trainer.max_epochs", "2")
    (Path("parts") / "config.yaml").unlink()
    found = run("parts", *four, "--ckpt_path", "last")
    assert [step for step, _ in found["information/marginal_entropy_drift"]] == [1, 4]
    wrong = [line for line in differences(Path("whole"), Path("parts")) if "curve" in line or "safetensors" in line]
    assert not wrong


def test_it_costs_nothing_unless_it_is_asked_for(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the setting it never looks at a rollout; and a plain Trainer's has a period."""

    def looks(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(InformationPlane, "plane", looks)
    monkeypatch.setattr(InformationPlane, "tokens", looks)
    assert not of_plane(run("without", "--trainer.max_epochs", "1"))
    assert InformationPlane().every_n_iterations == 10


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "every": ({"every_n_iterations": -1}, "every_n_iterations: -1 - write 0 or more"),
    "prompts": ({"prompts": 1}, "prompts: 1 - write 2 or more"),
    "responses": ({"responses": 0}, "responses: 0 - write 1 or more"),
    "template": ({"template": "{prompt}"}, "template: {prompt} - must contain {prompt}, and {answer}"),
    "share": ({"gradient_share": 1}, "gradient_share: 1 - write true or false"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_refused(case: str) -> None:
    settings, line = WRONG[case]
    with pytest.raises(ConfigError) as refused:
        InformationPlane(**settings)
    assert line in str(refused.value).replace("'", "")


def test_a_module_without_rollouts_gets_a_warning(tmp_path: Path) -> None:
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary"), False)
    trainer = pl.Trainer(accelerator="cpu", callbacks=[InformationPlane()], max_epochs=0, **off)
    with pytest.warns(UserWarning, match="InformationPlane does nothing: it needs a module with scorer, updater"):
        trainer.fit(BoringModel())


def test_a_template_that_the_tokenizer_cannot_write_is_named(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--information_plane.template", "{prompt} The answer is {answer}."]
    line = refusal(["fit", "--config", "tiny.yaml", *OFF, *ON, *words], capsys)
    assert line.startswith("error: information_plane.template: ")
    assert "use only words that the model knows" in line


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_two_ranks_measure_what_one_does_and_train_the_same(strategy: str, workspace: Path) -> None:
    argv = ["fit", "--config", "tiny.yaml", *OFF, "--trainer.devices", "2", "--trainer.strategy", strategy]
    argv += ["--rollout_log.every_n_iterations", "0", "--samples.every_n_iterations", "0"]
    for folder, settings in (("without", []), ("with", [*ON, *SHOWN])):
        codes = run_ranks(2, main, [*argv, "--trainer.default_root_dir", folder, *settings], folder=workspace)
        assert codes == [0, 0], logs(workspace)
    assert same(weights("without"), weights("with"))
    alone, found = of_plane(run("alone", *ON, *SHOWN)), of_plane(curves(Path("with")))
    assert found.keys() == alone.keys()
    for name, points in alone.items():
        for (step, value), (_, other) in zip(points, found[name], strict=True):
            assert other == pytest.approx(value, rel=2e-3, abs=2e-3), (name, step)  # weights differ by rounding in 2


def test_ibro_s_own_template_is_taken() -> None:
    regularizer = IBRO(0.1, template="{prompt}{answer}")
    assert isinstance(regularizer.hindsight, HindsightTemplate)
    assert InformationPlane().hindsight is None
