"""``python -m ibro_lightning export``: a checkpoint becomes a Hugging Face folder, without data or an engine."""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from jsonargparse import Namespace
from omegaconf import OmegaConf

from ibro_lightning.arguments import OneLineParser
from ibro_lightning.checkpoints import CheckpointFiles
from ibro_lightning.errors import ConfigError
from ibro_lightning.modules import PolicyModule
from ibro_lightning.resume import check_exists, find_checkpoint


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="ibro_lightning export",
        description="Write the policy of a checkpoint as a Hugging Face folder, and its critic, if any, to critic/ "
        "beside it. One process, on the CPU, whatever the checkpoint was written by.",
    )
    parser.add_argument("--ckpt_path", required=True, help="a checkpoint; or last or best, with --run")
    parser.add_argument("--output", required=True, help="the folder to write, e.g. exported/model")
    parser.add_argument("--run", help="the run's folder; found from the checkpoint's path if left out")
    parser.add_argument("--config", help="a recipe; the run's own config.yaml if left out")
    settings = parser.parse_args(list(argv))
    folder = export_checkpoint(settings.ckpt_path, Path(settings.output), settings.run, settings.config)
    sys.stdout.write(f"model     {folder}\n")


def export_checkpoint(wanted: str, output: Path, run: str | None = None, config: str | None = None) -> Path:
    """Write the policy that a checkpoint holds to ``output``; arguments as on the command line.

    Raises:
        ConfigError: there is no such checkpoint or recipe, or ``output`` holds something else.
    """
    check_exists(wanted)
    if run is None and not Path(wanted).exists():
        raise ConfigError("ckpt_path", wanted, "of which run? Write --run runs/mine, or the path of a checkpoint")
    # Not resolved: links in the path lead elsewhere, but last.ckpt lies in the run's folder.
    folder = Path(run) if run is not None else Path(wanted).absolute().parent.parent
    path = find_checkpoint(wanted, folder)
    if path is None:
        raise ConfigError("ckpt_path", wanted, f"there is no checkpoint in {folder}")
    for target in (output, output.with_name("critic")):
        if target.exists() and not (target / "config.json").is_file():
            raise ConfigError("output", str(target), "exists and is no model's folder: write another one")
    recipe = Path(config) if config else folder / "config.yaml"
    if not recipe.is_file():
        raise ConfigError("config", str(recipe), "no such file: name the recipe of the checkpoint's run")
    module = build_module(recipe)
    if not isinstance(module, PolicyModule):
        raise ConfigError("config", str(recipe), f"its model is a {type(module).__name__}, which cannot be exported")
    load_weights(module, path)
    output.parent.mkdir(parents=True, exist_ok=True)
    return module.export(output)


def build_module(recipe: Path) -> pl.LightningModule:
    """The LightningModule that a recipe names, and nothing else of it."""
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(recipe), resolve=False)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("config", str(recipe), f"this is no YAML: {error}") from error
    if not isinstance(content, dict) or "model" not in content:
        raise ConfigError("config", str(recipe), "it has no model: name the recipe of the checkpoint's run")
    model = OmegaConf.to_container(OmegaConf.create({"model": content["model"]}), resolve=True)
    parser = OneLineParser(exit_on_error=False)
    parser.add_lightning_class_args(pl.LightningModule, "model", subclass_mode=True)
    built: Namespace = parser.instantiate_classes(parser.parse_object(model))
    module: pl.LightningModule = built.model
    return module


def load_weights(module: pl.LightningModule, path: Path) -> None:
    """Have Lightning build the networks and fill them. There is nothing to predict."""
    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=root,
            plugins=[CheckpointFiles(weights_alone=True)],
        )
        trainer.predict(module, dataloaders=[], ckpt_path=str(path))
