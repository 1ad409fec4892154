"""TensorBoard's HPARAMS tab and its page of the curves that count, as TensorBoard's own plugins read them."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as custom
from tensorboard.plugins.hparams import metadata, plugin_data_pb2

from ibro_lightning.cli.main import main

FIT = ["fit", "--config", "tiny.yaml", "--trainer.max_epochs", "1", "--trainer.default_root_dir"]


def events_of(run: str) -> EventAccumulator:
    events = EventAccumulator(run, size_guidance={"tensors": 0})
    events.Reload()
    return events


def hparams_of(run: str) -> tuple[dict[str, str | float], list[str]]:
    """The session's settings, and the names of the experiment's metrics."""
    content = events_of(run).PluginTagToContent(metadata.PLUGIN_NAME)
    session = plugin_data_pb2.HParamsPluginData.FromString(content[metadata.SESSION_START_INFO_TAG])
    experiment = plugin_data_pb2.HParamsPluginData.FromString(content[metadata.EXPERIMENT_TAG])
    found: dict[str, str | float] = {}
    for name, value in session.session_start_info.hparams.items():
        found[name] = value.number_value if value.HasField("number_value") else value.string_value
    return found, [info.name.tag for info in experiment.experiment.metric_infos]


def charts_of(run: str) -> dict[str, list[str]]:
    tensor = events_of(run).Tensors(custom.CONFIG_SUMMARY_TAG)[-1].tensor_proto
    (category,) = layout_pb2.Layout.FromString(tensor.string_val[0]).category
    return {chart.title: list(chart.multiline.tag) for chart in category.chart}


def test_a_run_fills_hparams_and_shows_the_curves_that_count(workspace: Path) -> None:
    """Every curve that either names is there."""
    main([*FIT, "run", "--seed_everything", "7", "--model.regularizer.coef", "0.25"])
    settings, metrics = hparams_of("run")
    assert settings | {"learning_rate": 0.0} == {
        "recipe": "tiny",
        "module": "DAPOModule",
        "seed": 7.0,
        "advantage": "grpo",
        "group_size": 4.0,
        "regularizer": "InformationBottleneck",
        "coef": 0.25,
        "learning_rate": 0.0,
    }
    charts = charts_of("run")
    assert list(charts) == ["accuracy", "entropy (nats)", "length (tokens)", "advantage and entropy"]
    assert charts["accuracy"] == metrics
    scalars = set(events_of("run").Tags()["scalars"])
    assert {tag for tags in charts.values() for tag in tags} <= scalars


def test_a_run_without_evaluation_shows_the_accuracy_of_its_rollouts(workspace: Path) -> None:
    main([*FIT, "run", "--data.eval_sets", "null", "--overview.recipe", "mine"])
    settings, metrics = hparams_of("run")
    assert settings["recipe"] == "mine"
    assert metrics == ["rollout/accuracy"]


def test_other_loggers_are_left_alone(workspace: Path) -> None:
    main([*FIT, "run", "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "curves"])
    assert not [*Path("run").glob("events.out.*"), *Path("curves").rglob("events.out.*")]
