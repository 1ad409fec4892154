"""``python -m ibro_lightning export``: writes a checkpoint as a Hugging Face folder, without data or an engine."""

from __future__ import annotations

import os
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

from ibro_lightning.cli.commands import export_parser
from ibro_lightning.cli.parser import OneLineParser
from ibro_lightning.errors import ConfigError
from ibro_lightning.guards.disk import free_name
from ibro_lightning.modules import PolicyModule
from ibro_lightning.runs.checkpoints.plugin import CheckpointFiles
from ibro_lightning.runs.holding import FolderLock
from ibro_lightning.runs.model_folders import is_in_the_way, is_ours
from ibro_lightning.runs.resume import check_exists, find_checkpoint


def main(argv: Sequence[str]) -> None:
    settings = export_parser().parse_args(list(argv))
    folder = export_checkpoint(
        settings.ckpt_path, Path(settings.output), settings.run, settings.config, overwrite=settings.overwrite
    )
    sys.stdout.write(f"model     {folder}\n")


def export_checkpoint(
    ckpt_path: str, output: Path, run: str | None = None, config: str | None = None, *, overwrite: bool = False
) -> Path:
    """Write the policy of a checkpoint to ``output``; arguments as on the command line. Raises :class:`ConfigError` if
    the checkpoint or recipe does not exist, or ``output`` or a folder beside it for the critic or adapters is
    occupied."""
    check_exists(ckpt_path)
    check_free(output, overwrite)
    if run is None and not Path(ckpt_path).exists():
        raise ConfigError(
            "ckpt_path", ckpt_path, "of an unknown run: write --run runs/mine, or the path of a checkpoint"
        )
    # Not resolved: last.ckpt lies in the run's folder, but may be a link to elsewhere.
    folder = Path(run) if run is not None else Path(ckpt_path).absolute().parent.parent
    path = find_checkpoint(ckpt_path, folder)
    if path is None:
        raise ConfigError("ckpt_path", ckpt_path, f"there is no checkpoint in {folder}")
    recipe = Path(config) if config else folder / "config.yaml"
    if not recipe.is_file():
        raise ConfigError("config", str(recipe), "no such file: name the recipe of the checkpoint's run")
    module = build_module(recipe)
    if not isinstance(module, PolicyModule):
        raise ConfigError("config", str(recipe), f"its model is a {type(module).__name__}, which cannot be exported")
    targets = module.export_names(output)
    if len(set(targets)) < len(targets):
        raise ConfigError("output", str(output), f"{output.name}/ is another part of the model: write another name")
    for target in targets:
        check_free(target, overwrite)
    load_weights(module, path)
    if output.name in ("model", "critic", "adapter"):  # a run that is still active there writes these when it ends
        FolderLock(output.absolute().parent, "fit", setting="output").refuse_others()
    with FolderLock(output, "export", setting="output").held():
        output.parent.mkdir(parents=True, exist_ok=True)
        return module.export(output)


def check_free(folder: Path, overwrite: bool) -> None:
    """Raise :class:`ConfigError` if ``folder`` holds something that must stay."""
    for place in (folder, *folder.parents):
        if os.path.lexists(place) and not place.is_dir():
            raise ConfigError("output", str(folder), f"{place} is a file: write another folder")
    if is_in_the_way(folder):
        raise ConfigError("output", str(folder), "exists, and no export has written it: write the name of a new folder")
    if is_ours(folder) and not overwrite:
        remedy = f"exists: --overwrite moves it to {free_name(folder)}, or write another folder"
        raise ConfigError("output", str(folder), remedy)


def build_module(recipe: Path) -> pl.LightningModule:
    """Build the LightningModule of a recipe, and nothing else."""
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(recipe), resolve=False)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("config", str(recipe), f"this is not YAML: {error}") from error
    if not isinstance(content, dict) or "model" not in content:
        raise ConfigError("config", str(recipe), "it has no model: name the recipe of the checkpoint's run")
    model = OmegaConf.to_container(OmegaConf.create({"model": content["model"]}), resolve=True)
    parser = OneLineParser()
    parser.add_lightning_class_args(pl.LightningModule, "model", subclass_mode=True)
    built: Namespace = parser.instantiate_classes(parser.parse_object(model))
    module: pl.LightningModule = built.model
    return module


def load_weights(module: pl.LightningModule, path: Path) -> None:
    """Let Lightning build the networks and load the checkpoint, by predicting on no data."""
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
