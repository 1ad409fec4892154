"""What a path names, and which files a model folder holds besides weights and config."""

from __future__ import annotations

import re
from pathlib import Path

from transformers.utils import cached_file

from ibro_lightning.errors import ConfigError

TEMPLATES = "additional_chat_templates"
# Files of tokenizers and multimodal processors, by transformers' names for them, old and new.
SIDE_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
    *("chat_template.jinja", "chat_template.json", "processor_config.json", "preprocessor_config.json"),
    *("video_preprocessor_config.json", "image_processor_config.json", "feature_extractor_config.json"),
    "audio_tokenizer_config.json",
)
MORE = re.compile(r".*token.*\.(json|model|txt)|.*processor.*\.json|.*\.(tiktoken|jinja)|.*vocab.*|.*\.bpe\.model")
NO_TOKENIZER = re.compile(r".*processor.*|feature_extractor.*|audio_tokenizer.*|chat_template\.json|.*\.py")
CODE = re.compile(r".*\.py")


def check_folder(path: str, setting: str, *, is_folder: bool = False) -> None:
    """Raise :class:`ConfigError` unless ``path`` is a model folder or could be a name on the hub.

    Args:
        is_folder: it cannot be a name.
    """
    folder = Path(path)
    if not path.strip():
        raise ConfigError(setting, path, "empty: write a Hugging Face folder or hub name")
    if folder.is_file():
        remedy = "this is a file: name a Hugging Face model folder (config.json, model.safetensors, tokenizer)"
        if folder.suffix == ".ckpt":
            remedy = "this is a checkpoint: make a folder of it with python -m ibro_lightning export"
        raise ConfigError(setting, path, remedy)
    if folder.is_dir():
        _check_content(folder, path, setting)
        return
    looks_like_path = is_folder or folder.is_absolute() or path.startswith(".") or path.count("/") != 1
    if looks_like_path or folder.parent.is_dir():
        raise ConfigError(setting, path, f"no such folder: name a Hugging Face model folder{hint(path)}")


def _check_content(folder: Path, path: str, setting: str) -> None:
    if (folder / "adapter_config.json").is_file():
        remedy = "it holds an adapter (adapter_config.json): name a folder of whole, merged weights"
        if (folder.parent / "model" / "config.json").is_file():
            remedy += f", here {folder.parent / 'model'}"
        raise ConfigError(setting, path, f"{remedy}; peft's merge_and_unload makes them")
    if not (folder / "config.json").is_file():
        remedy = "this folder holds no config.json: name a Hugging Face model folder"
        if (folder / "model" / "config.json").is_file():
            remedy += f", here {folder / 'model'}"
        elif any(folder.glob("*.gguf")):
            remedy += " with safetensors; GGUF files cannot be trained"
        raise ConfigError(setting, path, remedy)


def find_side_files(path: str, revision: str, *, code: bool = False) -> dict[str, Path]:
    """The side files of the folder or hub model at ``path``, by their names in it.

    Args:
        code: include Python files.
    """
    folder = Path(path)
    if folder.is_dir():
        local = {file.name: file for file in sorted(folder.iterdir()) if file.is_file() and _is_side(file.name, code)}
        return local | {f"{TEMPLATES}/{file.name}": file for file in sorted(folder.glob(f"{TEMPLATES}/*.jinja"))}
    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    files = {name: cached_file(path, name, revision=revision, **optional) for name in SIDE_FILES}
    return {name: Path(file) for name, file in files.items() if file is not None}


def is_of_tokenizer(name: str) -> bool:
    """Whether a side file is read by tokenizers only."""
    return NO_TOKENIZER.fullmatch(name) is None


def _is_side(name: str, code: bool) -> bool:
    if name.endswith(".index.json") or name.startswith("."):
        return False
    return name in SIDE_FILES or bool(MORE.fullmatch(name)) or (code and bool(CODE.fullmatch(name)))


def hint(path: str) -> str:
    """How to make the quick start's base policy, if ``path`` means it."""
    if "sft_quickstart" not in path:
        return ""
    return "; the quick start's base policy is made by: python -m ibro_lightning fit --config sft_quickstart.yaml"
