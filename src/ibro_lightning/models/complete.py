"""Checks that a folder holds all weights of its model, and that the model has a place for each of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any, NoReturn

from torch import nn

from ibro_lightning.errors import ConfigError
from ibro_lightning.models.ties import says_tied

HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
# Tables and masks that older versions of transformers stored with the weights, and that models now compute.
TABLES = re.compile(r"(rotary_emb\.inv_freq|\.masked_bias|\.attn\.bias|position_ids)$")


def check_complete(
    model: Any,
    missing: Collection[str],
    unexpected: Iterable[str],
    mismatched: Iterable[Any] = (),
    *,
    setting: str,
    source: str,
) -> None:
    """Refuse weights that would leave a part of ``model`` random, or that belong to the model but have no place in it.

    Weights of something that the model does not have (a vision tower, another head) are harmless.

    Raises:
        ConfigError: one line, with the first names.
    """

    def refuse(remedy: str) -> NoReturn:
        raise ConfigError(setting, source, remedy)

    for name, *shapes in mismatched:
        stored, expected = (tuple(shape) for shape in shapes)
        refuse(
            f"{name} is {stored} on the disk, and config.json makes it {expected}: name a folder whose config.json "
            "belongs to its weights"
        )
    if missing and all(HEAD.search(name) for name in missing) and not says_tied(model.config):
        refuse(
            "config.json says tie_word_embeddings: false, but the folder holds no head (lm_head.weight): write true "
            "there if the head is the embedding, or name a folder with all weights"
        )
    if missing:
        refuse(f"the folder lacks {_count(missing)} of the model: name one that holds all of its weights")
    if unplaced := sorted(name for name in unexpected if _belongs(name, model)):
        refuse(
            f"the folder holds {_count(unplaced)} for which config.json leaves no place, so it would be another model: "
            "name a folder whose config.json belongs to its weights (whole and merged ones)"
        )


def _belongs(name: str, model: nn.Module) -> bool:
    """Whether a leftover weight belongs to a module of ``model`` that has weights, or to one more layer."""
    ignored: Any = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    if TABLES.search(name) or any(re.search(pattern, name) for pattern in ignored):
        return False
    modules = dict(model.named_modules())
    owner, _, _ = name.rpartition(".")
    if owner in modules:
        return bool(modules[owner]._parameters)
    while owner:
        outer, _, leaf = owner.rpartition(".")
        if outer in modules:
            return isinstance(modules[outer], nn.ModuleList) and leaf.isdigit()
        owner = outer
    return False


def _count(names: Collection[str]) -> str:
    first = min(names)
    return first if len(names) == 1 else f"{len(names)} weights ({first}, …)"
