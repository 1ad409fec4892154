"""Whether a model's head is tied to its embedding, by config.json and by the weights on disk."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ibro_lightning.models.stored import StoredWeights

SETTING = "tie_word_embeddings"
ROWS = 4096
"""Rows compared at a time: the head of a large vocabulary is never read whole."""


def says_tied(config: Any) -> bool:
    """Whether ``config`` ties the head of a causal language model that is built from it."""
    return bool(getattr(_part_for_language(config), SETTING, False)) and bool(tied_names(config))


def set_tied(config: Any, tied: bool) -> None:
    """Set ``tie_word_embeddings`` in every part of ``config``; composite configs repeat it in their text part."""
    for part in (config, config.get_text_config()):
        setattr(part, SETTING, tied)


def tied_names(config: Any) -> dict[str, str]:
    """Weights that may be tied, head → embedding; empty if the class is not transformers' own."""
    names = getattr(_class_of(config), "_tied_weights_keys", None)
    return dict(names) if isinstance(names, dict) else {}


def is_tied(model: Any) -> bool:
    """Whether the head's weight and the embedding's are one parameter."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    weight = getattr(head, "weight", None)
    return isinstance(weight, nn.Parameter) and weight is getattr(embedding, "weight", None)


def differs_on_disk(config: Any, stored: StoredWeights) -> str | None:
    """The head's name in the files, if they hold it besides the embedding with other values; None otherwise."""
    for target, origin in tied_names(config).items():
        head, embedding = _find(target, stored.names), _find(origin, stored.names)
        if head is not None and embedding is not None and not _equal(stored, head, embedding):
            return head
    return None


def has_head_and_embedding(config: Any, names: Collection[str]) -> bool:
    """Whether ``names`` holds both weights that may be tied."""
    return any(_find(target, names) and _find(origin, names) for target, origin in tied_names(config).items())


def _class_of(config: Any) -> Any:
    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    return model_class[0] if isinstance(model_class, tuple) else model_class


def _part_for_language(config: Any) -> Any:
    """The part of a composite config from which transformers builds the model."""
    text = config.get_text_config()
    return text if getattr(_class_of(config), "config_class", None) is type(text) else config


def _find(name: str, names: Collection[str]) -> str | None:
    """``name`` as in the files, possibly under an older or longer prefix; None if it is absent or ambiguous."""
    if name in names:
        return name
    leaf = ".".join(name.split(".")[-2:])
    matches = [other for other in names if f".{other}".endswith(f".{leaf}")]
    return matches[0] if len(matches) == 1 else None


def _equal(stored: StoredWeights, first: str, second: str) -> bool:
    shape = stored.shape(first)
    if shape != stored.shape(second):
        return False
    return all(
        torch.equal(*_alike(stored.rows(first, start, start + ROWS), stored.rows(second, start, start + ROWS)))
        for start in range(0, shape[0], ROWS)
    )


def _alike(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(first.dtype, second.dtype)
    return first.to(dtype), second.to(dtype)
