"""The key-value cache of the embedded engine."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import Tensor
from transformers import DynamicCache

LAYOUT = ("layer_types", "sliding_window", "attention_chunk_size", "num_kv_shared_layers", "number_of_conv_states")
"""Config keys from which transformers builds a cache, for any architecture."""


def cache_config(config: Any) -> Any:
    """A copy of a model's config from which ``DynamicCache`` builds the right cache.

    Removes keys that the architecture does not use, such as a ``sliding_window`` in a Llama config: the model ignores
    them, but transformers would build a cache that drops tokens.
    """
    config = deepcopy(config.get_text_config(decoder=True))
    try:
        own = type(config)()
    except Exception:  # a custom class without defaults; engines.probe still checks the result
        return config
    for key in LAYOUT:
        if key in vars(config) and not hasattr(own, key):
            delattr(config, key)
    return config


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Select ``rows`` of the batch, in this order; rows may be repeated.

    Only ``reorder_cache`` supports every kind of layer: ``batch_select_indices`` is missing for linear attention and
    state spaces, and hybrid layers select only their keys and values with it.
    """
    cache.reorder_cache(rows)
