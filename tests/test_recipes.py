"""Recipes: found by name from anywhere, complete, within a screenful, and parsed by the real command line."""

from __future__ import annotations

import io
import threading
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import lightning.pytorch as pl
import pytest
import yaml

from ibro_lightning.cli.main import main
from ibro_lightning.cli.parser import OneLineParser
from ibro_lightning.cli.training import IbroCLI
from ibro_lightning.errors import ConfigError
from ibro_lightning.modules import DAPOModule, PPOModule
from ibro_lightning.runs.recipes import find_config, recipe_folder, recipe_names
from ibro_lightning.update import ReferenceKL, SamplerCorrection, advantages
from ibro_lightning.update.surrogates import LOSSES

RECIPES = recipe_names()


@cache
def printed(*arguments: str) -> str:
    with redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code == 0
    return text.getvalue()


def printed_config(*arguments: str) -> dict:
    return yaml.safe_load(printed(*arguments))


def test_what_a_commands_own_parser_has_completed_and_checked_is_complete_and_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parser of all commands would complete and check it again, which takes as long."""
    found: list[str] = []

    def keep(cli: IbroCLI) -> None:
        found.append(cli.parser.dump(cli.config, skip_none=False))
        raise SystemExit

    monkeypatch.setattr(IbroCLI, "before_instantiate_classes", keep)
    monkeypatch.chdir(tmp_path)
    for trusts in (True, False):
        monkeypatch.setattr(OneLineParser, "trusts_commands", trusts)
        with pytest.raises(SystemExit):
            main(["fit", "--config", "ppo_ib.yaml", "--optimizer", "SGD", "--model.kl", "ReferenceKL"])
    assert len(found[0]) > 3000
    assert found[0] == found[1]


def test_help_shows_the_command_as_it_is_typed() -> None:
    with redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit):
        main(["fit", "--help"])
    assert text.getvalue().startswith("usage: python -m ibro_lightning [options] fit ")


@pytest.mark.parametrize("name", RECIPES)
def test_every_shipped_recipe_instantiates(
    name: str, tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All classes with all their settings, on the policy and the hardware that there are here."""
    built: list[IbroCLI] = []
    monkeypatch.setattr(IbroCLI, "fit", lambda self, **_: built.append(self))
    monkeypatch.setattr(IbroCLI, "after_fit", lambda self: None)
    monkeypatch.chdir(tmp_path)
    policy = [] if name.startswith("sft") else ["--model.policy", str(tiny_policy)]
    main(["fit", "--config", name, *policy, "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"])
    (cli,) = built
    for part, folder in ((cli.model, "modules"), (cli.datamodule, "datamodules")):
        assert type(part).__module__.startswith(f"ibro_lightning.{folder}.")
    cli.model.configure_model()
    assert sum(parameter.numel() for parameter in cli.model.policy.parameters()) > 0
    assert hasattr(cli.model, "critic") == (type(cli.model) is PPOModule)
    assert isinstance(cli.datamodule, pl.LightningDataModule)
    # After 15 minutes alone the watch of several ranks would end the process, which lives on here, as in a notebook.
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("failure-watch")]


@pytest.mark.parametrize("name", RECIPES)
def test_every_shipped_recipe_is_at_most_80_lines(name: str) -> None:
    assert len((recipe_folder() / name).read_text().splitlines()) <= 80


def test_the_published_dapo_values_are_in_dapo_ib() -> None:
    config = printed_config("fit", "--config", "dapo_ib.yaml")
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    assert model["policy"] == "Qwen/Qwen2.5-7B"
    assert (model["clip_ratio_low"], model["clip_ratio_high"], model["dual_clip"]) == (0.2, 0.28, 10.0)
    assert model["regularizer"]["init_args"]["coef"] == 0.005
    assert model["learning_rate"] == 1e-6
    assert model["optimizer"]["init_args"]["weight_decay"] == 0.1
    assert (model["warmup_steps"], model["max_grad_norm"], model["mini_batch_prompts"]) == (10, 1.0, 32)
    assert (data["prompts_per_rollout"], data["group_size"]) == (512, 16)
    assert data["sampling"]["max_tokens"] == 20480
    assert data["sampling"]["temperature"] == data["sampling"]["top_p"] == 1.0
    assert data["prompt_limits"]["max_tokens"] == 2048
    assert data["reward"]["init_args"]["rewards"][1]["init_args"] == {"buffer_tokens": 4096, "factor": 1.0}
    assert {name: (s["samples"], s["sampling"]["top_p"]) for name, s in data["eval_sets"].items()} == {
        "amc23": (32, 0.7),
        "aime24": (32, 0.7),
        "aime25": (32, 0.7),
    }


def test_environment_variables_reach_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IBRO_POLICY", "/models/mine")
    config = yaml.safe_load(printed.__wrapped__("fit", "--config", "dapo_ib.yaml"))
    assert config["model"]["init_args"]["policy"] == "/models/mine"


def test_the_command_line_overrides_the_recipe() -> None:
    config = printed_config("fit", "--config", "quickstart", "--data.group_size", "4", "--model.dual_clip", "3")
    assert config["data"]["init_args"]["group_size"] == 4
    assert config["model"]["init_args"]["dual_clip"] == 3.0


def test_a_path_wins_over_a_recipe_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("quickstart.yaml") == recipe_folder() / "quickstart.yaml"
    (tmp_path / "quickstart.yaml").write_text("seed_everything: 1\n")
    assert find_config("quickstart.yaml") == Path("quickstart.yaml")


def test_an_unknown_recipe_lists_those_that_exist() -> None:
    with pytest.raises(ConfigError) as error:
        find_config("quikstart.yaml")
    assert all(name in str(error.value) for name in RECIPES)


def test_help_of_a_class_shows_its_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--model.help", "DAPOModule"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "clip_ratio_high" in text
    assert "bounds the loss of negative advantages" in text


ALGORITHMS = {
    "GRPO": "clip_ratio_high 0.2, dual_clip null, aggregation seq-mean-token-mean, kl ReferenceKL, kl.estimator k3",
    "Dr.GRPO": "advantage dr_grpo, aggregation seq-mean-token-sum-norm, aggregation_max_tokens 56",
    "RLOO": "advantage rloo",
    "REINFORCE++": "advantage reinforce++, kl ReferenceKL, kl.placement reward, kl.estimator k1",
    "QAE": "advantage QuantileAdvantage, advantage.quantile 0.4",
    "AsymGRPO": "advantage AsymGRPO, advantage.positive_power 0.9, advantage.negative_power 0.4",
}
FROM_CLASSES = {
    name: [f"{setting} {value}" for setting, value in yaml.safe_load(kind.method.recipe).items()]
    for name, kind in LOSSES.items()
}
"""The surrogates, whose recipe lines the tables have."""


@pytest.mark.parametrize("name", [*ALGORITHMS, *FROM_CLASSES])
def test_the_documented_algorithms_are_options_that_parse_and_build(name: str, tiny_policy: Path) -> None:
    documentation = (recipe_folder().parent / "docs" / "methods.md").read_text()
    written = ALGORITHMS[name].split(", ") if name in ALGORITHMS else FROM_CLASSES[name]
    if name in ALGORITHMS:
        assert f"| {name} | {', '.join(f'`{option}`' for option in written)} |" in documentation
    options = [word for option in written for word in f"--model.{option}".split()]
    settings = printed_config("fit", "--config", "quickstart.yaml", *options)["model"]["init_args"]
    kl = settings.pop("kl")
    kl = ReferenceKL(**kl["init_args"]) if kl else None
    correction = SamplerCorrection(**settings.pop("sampler_correction"))
    if isinstance(advantage := settings["advantage"], dict):
        kind = getattr(advantages, advantage["class_path"].rpartition(".")[2])
        settings["advantage"] = kind(**advantage["init_args"])
    for setting in ("policy", "policy_options", "regularizer", "optimizer"):
        del settings[setting]
    DAPOModule(str(tiny_policy), kl=kl, sampler_correction=correction, **settings)


@pytest.mark.parametrize("algorithm", ["dapo", "ppo"])
@pytest.mark.parametrize(("number", "regularizer"), [(0, "EntropyBonus"), (1, "NoRegularizer")])
def test_the_papers_arms_differ_in_the_regularizer_alone(algorithm: str, number: int, regularizer: str) -> None:
    """Otherwise their difference would say nothing about it. The options are those in the recipe's head comment."""
    name = f"{algorithm}_ib.yaml"
    arms = [line for line in find_config(name).read_text().splitlines() if line.startswith("#   --")]
    assert len(arms) == 2
    ours = printed_config("fit", "--config", name)
    theirs = printed_config("fit", "--config", name, *arms[number].removeprefix("#").split())
    kinds = [config["model"]["init_args"].pop("regularizer")["class_path"].split(".")[-1] for config in (ours, theirs)]
    assert kinds == ["InformationBottleneck", regularizer]
    assert ours["trainer"].pop("default_root_dir") != theirs["trainer"].pop("default_root_dir")
    assert ours == theirs


def test_the_32b_recipe_is_the_papers_but_for_its_model_and_its_place() -> None:
    ours, theirs = (printed_config("fit", "--config", name) for name in ("dapo_ib_32b.yaml", "dapo_ib.yaml"))
    changed = {
        "policy": (ours["model"]["init_args"].pop("policy"), theirs["model"]["init_args"].pop("policy")),
        **{key: (ours["trainer"].pop(key), theirs["trainer"].pop(key)) for key in ("num_nodes", "devices")},
    }
    assert changed == {
        "policy": ("Qwen/Qwen2.5-32B", "Qwen/Qwen2.5-7B"),
        "num_nodes": (4, 1),
        "devices": (8, "auto"),
    }
    engines = [config["data"]["init_args"]["engine"]["init_args"] for config in (ours, theirs)]
    assert [engine.pop("gpu_memory_utilization") for engine in engines] == [0.75, 0.5]
    assert ours["trainer"].pop("default_root_dir") != theirs["trainer"].pop("default_root_dir")
    assert ours == theirs


@pytest.mark.parametrize("algorithm", ["dapo", "ppo"])
def test_the_readme_names_the_papers_arms(algorithm: str) -> None:
    readme = (recipe_folder().parent / "README.md").read_text()
    for line in find_config(f"{algorithm}_ib.yaml").read_text().splitlines():
        if line.startswith("#   --"):
            assert f"`{line.removeprefix('#').split(' --trainer.')[0].strip()}`" in readme


@pytest.mark.parametrize("name", ["dapo_ib.yaml", "dapo_ib_32b.yaml", "ppo_ib.yaml", "eval_math.yaml"])
def test_the_papers_evaluation_is_avg_at_32_on_three_sets(name: str) -> None:
    sets = yaml.safe_load(find_config(name).read_text())["data"]["init_args"]["eval_sets"]
    assert list(sets) == ["amc23", "aime24", "aime25"]
    for eval_set in sets.values():
        assert eval_set["samples"] == 32
        assert eval_set["sampling"] == {"temperature": 1.0, "top_p": 0.7, "max_tokens": 20480}
        assert eval_set["source"]["init_args"]["template"] == "dapo"
