"""Modules, datamodules and callbacks in a Trainer of one's own, without the command line."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import ibro_lightning.callbacks as ours
from ibro_lightning.batches import Experience, Rollout, Sequences, TokenStats
from ibro_lightning.callbacks.metrics_log import rollout_metrics
from ibro_lightning.datamodules import EvalSet, RolloutDataModule, SFTDataModule
from ibro_lightning.engines import HFEngine
from ibro_lightning.errors import ConfigError
from ibro_lightning.models import Qwen2FromScratch, export_folder
from ibro_lightning.modules import DAPOModule, PPOModule, SFTModule
from ibro_lightning.regularizers import StepContext
from ibro_lightning.runs.checkpoints.shards import save_shards
from ibro_lightning.tasks import NumberPath, NumberPathDemonstrations, NumberPathReward, NumberPathSource
from ibro_lightning.types import Completion, Group, Prompt, RewardResult, SamplingParams

TASK = NumberPath(size=12)
SHORT = SamplingParams(max_tokens=6)
OUR_CALLBACKS = [name for name in ours.__all__ if name[0].isupper()]


def tiny() -> Qwen2FromScratch:
    return Qwen2FromScratch(TASK, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1)


def heldout() -> EvalSet:
    return EvalSet(NumberPathSource(TASK, split="heldout"), NumberPathReward(), samples=2, sampling=SHORT, limit=2)


def rollout_data() -> RolloutDataModule:
    return RolloutDataModule(
        NumberPathSource(TASK, split="train"),
        NumberPathReward(),
        SHORT,
        prompts_per_rollout=2,
        group_size=2,
        eval_sets={"a": heldout(), "b": heldout()},
        reward_pool=None,
        weight_check=None,
    )


def demonstrations() -> SFTDataModule:
    return SFTDataModule(
        NumberPathDemonstrations(TASK),
        batch_size=2,
        steps_per_epoch=1,
        eval_sets={"a": heldout()},
        reward_pool=None,
        weight_check=None,
    )


def trainer_in(folder: Path, callbacks: Sequence[pl.Callback] = (), **flags: Any) -> pl.Trainer:
    """As plain as it gets: Lightning's own defaults, and less on the screen."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    flags = {**quiet, "max_epochs": 2, "logger": TensorBoardLogger(folder, name="curves"), **flags}
    return pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), **flags)


def points(folder: Path) -> dict[str, list[int]]:
    """The x-axis of each curve."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [point.step for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# Curves and metrics.


@pytest.mark.parametrize(
    ("module", "data", "curve"),
    [
        (DAPOModule, rollout_data, "rollout/reward"),
        (PPOModule, rollout_data, "critic/explained_variance"),
        (SFTModule, demonstrations, "sft/loss"),
    ],
)
def test_a_plain_trainer_has_every_curve_once(module: Any, data: Any, curve: str, tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    trainer.fit(module(tiny()), data())
    curves = points(tmp_path / "curves" / "version_0")
    assert {name: curves[name] for name in (curve, "update/grad_norm", "time/update_s")} == {
        name: [1, 2] for name in (curve, "update/grad_norm", "time/update_s")
    }
    assert curves["val/a/accuracy"] == curves["val/accuracy"] == [0, 1, 2]
    assert trainer.callback_metrics["iteration"] == 2
    assert {curve, "val/a/accuracy", "val/accuracy"} <= trainer.callback_metrics.keys()
    for value in trainer.callback_metrics.values():  # as self.log leaves them: a checkpoint may save one alone
        assert (value.dtype, value.untyped_storage().nbytes()) == (torch.float32, 4)


def test_lightnings_own_monitors_see_training_and_evaluation(tmp_path: Path) -> None:
    best = ModelCheckpoint(monitor="val/accuracy", mode="max", filename="{epoch}")
    uncertain = ModelCheckpoint(monitor="policy/entropy", mode="max", filename="uncertain-{epoch}")
    patience = EarlyStopping("rollout/truncated", mode="min", patience=1)
    trainer = trainer_in(tmp_path, [best, uncertain, patience, LearningRateMonitor()], max_epochs=4)
    trainer.fit(DAPOModule(tiny(), learning_rate=0.0), rollout_data())
    assert Path(best.best_model_path).is_file()
    assert Path(uncertain.best_model_path).is_file()
    assert patience.best_score.isfinite()
    assert len(points(tmp_path / "curves" / "version_0")["lr-AdamW"]) == trainer.current_epoch


def test_other_callbacks_see_the_metrics_of_the_same_iteration(tmp_path: Path) -> None:
    seen = []

    class Reader(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *others: Any) -> None:
            seen.append(float(trainer.callback_metrics["iteration"]))

    trainer = trainer_in(tmp_path, [Reader()], limit_val_batches=0)
    module, data = DAPOModule(tiny()), rollout_data()
    trainer.fit(module, data)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, data)
    assert seen == [1, 2, 3]
    assert sum(isinstance(callback, ours.MetricsLog) for callback in trainer.callbacks) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("every", "of_the_trainer", "expected"), [(None, 50, [1, 2, 3]), (None, 2, [2]), (3, 50, [3]), (0, 1, None)]
)
def test_how_often_there_is_a_point(
    every: int | None, of_the_trainer: int, expected: list[int] | None, tmp_path: Path
) -> None:
    callback = ours.MetricsLog(every_n_iterations=every)
    flags: dict[str, Any] = {"max_epochs": 3, "limit_val_batches": 0, "log_every_n_steps": of_the_trainer}
    trainer_in(tmp_path, [callback], **flags).fit(DAPOModule(tiny()), rollout_data())
    assert points(tmp_path / "curves" / "version_0").get("rollout/reward") == expected


def test_barebones_has_no_curves(tmp_path: Path) -> None:
    trainer = pl.Trainer(barebones=True, max_epochs=1, accelerator="cpu", default_root_dir=tmp_path)
    trainer.fit(DAPOModule(tiny()), rollout_data())
    assert not any(isinstance(callback, ours.MetricsLog) for callback in trainer.callbacks)  # type: ignore[attr-defined]


# Our callbacks.


def left_by(callback: str) -> list[str]:
    """What a run of two iterations leaves in its folder because of a callback."""
    return {
        "EvaluationReport": ["evaluations/iteration_000002.json"],
        "ExportModel": ["model/model.safetensors"],
        "IterationCheckpoint": ["checkpoints/iteration_000002.ckpt"],
        "RolloutLog": ["rollouts/iteration_000001.parquet", "rollouts/iteration_000002.parquet"],
        "RunSummary": ["summary.json"],
    }.get(callback, [])


@pytest.mark.parametrize("name", OUR_CALLBACKS)
def test_each_callback_works_alone(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    is_bar = name == "IterationProgress"
    trainer = trainer_in(tmp_path, [getattr(ours, name)()], enable_progress_bar=is_bar)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*does nothing.*")
        trainer.fit(DAPOModule(tiny()), rollout_data())
    for path in left_by(name):
        assert (tmp_path / path).exists()
    shown = capsys.readouterr().out
    assert not is_bar or "reward" in shown.splitlines()[0]


def test_all_of_them_work_in_any_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = [getattr(ours, name)() for name in reversed(OUR_CALLBACKS)]
    trainer_in(tmp_path, callbacks, enable_progress_bar=True).fit(DAPOModule(tiny()), rollout_data())
    for name in OUR_CALLBACKS:
        for path in left_by(name):
            assert (tmp_path / path).exists()
    assert points(tmp_path / "curves" / "version_0")["rollout/reward"] == [1, 2]
    bar = [
        line for line in capsys.readouterr().out.splitlines() if line.endswith(tuple("0123456789")) and "/2 " in line
    ]
    assert len(bar) == 2
    assert all("reward" in line and "entropy" in line for line in bar)


class Foreign(pl.LightningModule):
    """Somebody's module, which knows nothing of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        return {"loss": self.layer(batch).mean(), "activations": torch.zeros(3)}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("EvaluationReport", "a module with evaluations, iteration and evaluation_is_current, which Foreign lacks"),
        ("ExportModel", "a module with export, export_names and source_folders, which Foreign lacks"),
        ("RunSummary", "a module with evaluations, iteration and evaluation_is_current, which Foreign lacks"),
        ("RolloutLog", "batches of type Rollout, and got Tensor"),
        ("SamplesTable", "batches of type Rollout, and got Tensor"),
    ],
)
def test_what_a_callback_needs_of_a_foreign_module_is_one_line(name: str, needs: str, tmp_path: Path) -> None:
    batches = DataLoader(torch.ones(4, 2))  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="does nothing") as warned:
        trainer_in(tmp_path, [getattr(ours, name)()], max_epochs=1).fit(Foreign(), batches)
    lines = [str(warning.message) for warning in warned if "does nothing" in str(warning.message)]
    assert lines == [f"{name} does nothing: it needs {needs}"]


def test_the_metrics_of_a_foreign_module_are_logged(tmp_path: Path) -> None:
    trainer_in(tmp_path, [ours.MetricsLog()], max_epochs=1).fit(Foreign(), DataLoader(torch.ones(3, 2)))  # type: ignore
    assert points(tmp_path / "curves" / "version_0")["loss"] == [1, 2, 3]


def test_a_module_that_returns_nothing_to_log_is_named(tmp_path: Path) -> None:
    class Silent(Foreign):
        automatic_optimization = False

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            return None

    with pytest.warns(UserWarning, match="MetricsLog does nothing: .*training_step returns, and Silent has none"):
        trainer_in(tmp_path, [ours.MetricsLog()], max_epochs=1).fit(Silent(), DataLoader(torch.ones(3, 2)))  # type: ignore


def test_a_rollout_whose_reward_has_no_accuracy_has_curves_all_the_same() -> None:
    completion = Completion((1, 2), (-1.0, -1.0), "stop", "x", max_tokens=4, seed=0)
    group = Group(Prompt("q", "q", (3,), None), (completion,) * 2, (RewardResult(1.0, {}), RewardResult(0.0, {})))
    metrics = rollout_metrics(Rollout.from_groups([group], name="train", iteration=1, temperature=1.0))
    assert metrics["rollout/reward"] == metrics["train/reward"] == 0.5
    assert metrics["rollout/length"] == 2.0
    assert not [name for name in metrics if "accuracy" in name or "right" in name]


def test_samples_without_a_logger_and_interruptions_without_a_checkpoint_say_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="SamplesTable does nothing: it needs a logger"):
        trainer_in(tmp_path, [ours.SamplesTable()], logger=False, max_epochs=1, limit_val_batches=0).fit(
            DAPOModule(tiny()), rollout_data()
        )
    with pytest.warns(UserWarning, match="Interruptions saves nothing .* add an IterationCheckpoint"):
        trainer_in(tmp_path, [ours.Interruptions()], max_epochs=1, limit_val_batches=0).fit(
            DAPOModule(tiny()), rollout_data()
        )


# What a person sees who prints a batch.


def test_batches_are_one_line_of_shapes() -> None:
    sequences = Sequences.collate([[1, 2], [3]], [[4], [5, 6]])
    zeros, of_tokens, mask = torch.zeros(2, 2), torch.zeros(3), torch.ones(3, dtype=torch.bool)
    of_rows = torch.tensor([0, 0])
    experience = Experience(
        sequences.flatten(), of_tokens, of_tokens, of_tokens, mask, of_rows, 1.0, extra={"values": of_tokens}
    )
    stats = TokenStats(zeros, None, zeros, zeros, zeros, sequences.response_mask)
    context = StepContext(torch.nn.Bilinear(2, 2, 2), print, tokenizer=object(), seed=3)  # type: ignore[arg-type]
    assert repr(sequences) == (
        "Sequences(input_ids=[2, 3] int64, starts=[2] int64, prompt_lengths=[2] int64, response_lengths=[2] int64)"
    )
    for batch in (experience, experience.micro_batch(), stats, context):
        assert "\n" not in repr(batch)
        assert "tensor(" not in repr(batch)
    assert "extra={values: [3] float32}" in repr(experience)
    assert "extra={values: [2, 2] float32}" in repr(experience.micro_batch())
    assert repr(stats).startswith("TokenStats(logp=[2, 2] float32, old_logp=")
    assert "policy=Bilinear" in repr(context)


def test_an_evaluation_set_names_its_source_and_reward() -> None:
    text = repr(EvalSet(NumberPathSource(), NumberPathReward(), samples=8))
    assert text.startswith(
        "EvalSet(source=NumberPathSource, reward=NumberPathReward, samples=8, sampling=SamplingParams("
    )


# Without a Trainer.


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[DAPOModule, Path]:
    """A module after two iterations, and the last checkpoint of its run."""
    folder = tmp_path_factory.mktemp("run")
    module = DAPOModule(tiny(), learning_rate=1e-2)
    trainer_in(folder, [ours.IterationCheckpoint()], limit_val_batches=0).fit(module, rollout_data())
    return module, folder / "checkpoints" / "last.ckpt"


def weights_of(module: DAPOModule) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in module.named_full_weights()}


def assert_same_weights(one: DAPOModule, other: DAPOModule) -> None:
    torch.testing.assert_close(weights_of(one), weights_of(other), rtol=0, atol=0)


@pytest.mark.parametrize("form", ["file", "folder of shards"])
def test_a_module_is_loaded_from_either_form_of_a_checkpoint(
    form: str, fitted: tuple[DAPOModule, Path], tmp_path: Path
) -> None:
    module, path = fitted
    if form != "file":
        save_shards(tmp_path / "shards.ckpt", torch.load(path, weights_only=True), is_first=True)
        path = tmp_path / "shards.ckpt"
    loaded = DAPOModule.load_from_checkpoint(path, policy=tiny(), clip_ratio_high=0.3)
    assert_same_weights(loaded, module)


def test_a_damaged_folder_of_shards_is_refused_in_one_line(fitted: tuple[DAPOModule, Path], tmp_path: Path) -> None:
    save_shards(tmp_path / "shards.ckpt", torch.load(fitted[1], weights_only=True), is_first=True)
    (tmp_path / "shards.ckpt" / ".metadata").unlink()
    with pytest.raises(ConfigError, match="ckpt_path"):
        DAPOModule.load_from_checkpoint(tmp_path / "shards.ckpt", policy=tiny())


def test_a_module_taken_out_of_its_trainer_generates_and_scores(fitted: tuple[DAPOModule, Path]) -> None:
    loaded = DAPOModule.load_from_checkpoint(fitted[1], policy=tiny())
    prompts = loaded.tokenizer(["1>6:", "3>4:"], add_special_tokens=False)["input_ids"]
    responses = []
    for module in (fitted[0], loaded):
        engine = HFEngine()
        engine.setup(module.model_spec())
        engine.load_weights(module.named_full_weights())
        generations = engine.generate(prompts, SHORT, seeds=[[1], [2]])
        engine.close()
        responses.append([generation.token_ids for (generation,) in generations])
        logp = module.response_logp(Sequences.collate(prompts, responses[-1]), temperature=1.0)
        for row, (generation,) in enumerate(generations):
            sampled_with = torch.tensor(generation.logp)
            torch.testing.assert_close(logp[row, : len(sampled_with)], sampled_with, rtol=1e-4, atol=1e-4)
    assert responses[0] == responses[1]


def test_a_module_is_exported_with_and_without_a_trainer(fitted: tuple[DAPOModule, Path], tmp_path: Path) -> None:
    module, path = fitted
    loaded = DAPOModule.load_from_checkpoint(path, policy=tiny())
    for name, exported in (("fitted", module), ("loaded", loaded)):
        folder = exported.export(str(tmp_path / name))  # a str will do
        again = DAPOModule(str(folder))
        again.configure_model()
        assert_same_weights(again, module)
    never = DAPOModule(tiny()).export(tmp_path / "never in a trainer")
    assert (never / "model.safetensors").is_file()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fitted")
    written = export_folder(model, module.tokenizer, str(tmp_path / "from transformers"))
    assert (written / "tokenizer.json").is_file()


def test_ppo_exports_its_critic_beside_the_policy(tmp_path: Path) -> None:
    PPOModule(tiny()).export(str(tmp_path / "model"))
    assert (tmp_path / "critic" / "model.safetensors").is_file()
