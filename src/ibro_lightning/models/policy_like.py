"""What may be given as a policy: a folder, a hub name, a model, a custom source."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ibro_lightning.errors import ConfigError
from ibro_lightning.models.in_memory import ModelPolicy
from ibro_lightning.models.loading import PolicyOptions, PolicySource
from ibro_lightning.models.pretrained import PretrainedPolicy

PolicyLike: TypeAlias = str | PolicySource | PreTrainedModel | tuple[Any, Any] | Path
"""A Hugging Face folder, a hub name, a transformers model (alone or as ``(model, tokenizer)``), or a source."""
# Path comes last: the parser would otherwise save any value as one in config.yaml, even a source's settings.
FOLDER = "a Hugging Face folder or hub name"
REMEDY = f"write {FOLDER}, a transformers model or (model, tokenizer), or a PolicySource"


def as_source(policy: PolicyLike, options: PolicyOptions, setting: str = "policy") -> PolicySource:
    """The source of a ``policy`` in a recipe or a script, where ``setting`` names it.

    Raises:
        ConfigError: it is none of these.
    """
    if isinstance(policy, PolicySource):
        return policy
    if isinstance(policy, os.PathLike) and isinstance(name := os.fspath(policy), str):
        policy = Path(name)
    if isinstance(policy, str | Path):
        return PretrainedPolicy(policy, options, setting)
    if isinstance(policy, tuple | list) and len(policy) == 2 and isinstance(policy[0], PreTrainedModel):
        return ModelPolicy(policy[0], policy[1], options, setting)
    if isinstance(policy, PreTrainedModel):
        return ModelPolicy(policy, None, options, setting)
    raise ConfigError(setting, _kind(policy), REMEDY + _more(policy))


def _kind(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float) else type(value).__name__


def _more(value: Any) -> str:
    if isinstance(value, tuple | list) and len(value) == 2:
        return _more(value[0]) or _more(value[1])
    if isinstance(value, PreTrainedTokenizerBase):
        return "; this is a tokenizer"
    if isinstance(value, type) and issubclass(value, PolicySource | PreTrainedModel):
        return f"; this is the class {value.__name__}, not one of its objects"
    if callable(getattr(value, "merge_and_unload", None)):
        return "; of a PeftModel, what merge_and_unload() returns"
    if isinstance(getattr(value, "_orig_mod", None), PreTrainedModel):
        return "; of a compiled model, the one that was compiled (_orig_mod)"
    if isinstance(getattr(value, "model", None), PreTrainedModel):
        return "; its .model is one"
    return ""
