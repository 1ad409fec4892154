"""Reads a model folder's generation_config.json, and repairs it, so that a mistake in it stops no run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

# Settled first, since the validity of other values depends on them.
TOKENS = ("eos_token_id", "bos_token_id", "pad_token_id")
FIRST = (*TOKENS, "num_beams", "do_sample", "return_dict_in_generate", "use_cache")
# Values that have no effect.
SAMPLING: dict[str, tuple[Any, ...]] = {
    "temperature": (None, 1.0, 0.0),
    "top_p": (None, 1.0),
    "top_k": (None, 50, 0, 1),
    "min_p": (None, 0.0),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
}


def read_generation_config(path: str, revision: str) -> tuple[GenerationConfig | None, str]:
    """The settings of the folder or hub model at ``path``, repaired if necessary, and a description of the repair.

    None if it has no such file, or one without settings.
    """
    try:
        file = cached_file(path, GENERATION_CONFIG_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
        text = None if file is None else Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        return None, f"it cannot be read ({' '.join(str(error).split())[:100]}), so it is left out"
    if text is None:
        return None, ""
    try:
        values = json.loads(text)
    except ValueError:
        return None, "it is not JSON, so it is left out"
    if not isinstance(values, dict):
        return None, "it holds no settings, so it is left out"
    return repaired(values)


def repaired(values: Mapping[str, Any]) -> tuple[GenerationConfig, str]:
    """The nearest settings that transformers agrees to write, and a description of the changes; '' if there are none.

    Sampling values without ``do_sample`` mean sampling, as in vLLM; with ``do_sample: false`` they mean nothing.
    """
    if _is_sound(values):
        return GenerationConfig.from_dict(dict(values)), ""
    kept: dict[str, Any] = {}
    added = values.get("do_sample") is None and _means_sampling(values)
    if added:
        values = {**values, "do_sample": True}
    left_out = []
    for name in sorted(values, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST)):
        if _is_sound({**kept, name: values[name]}):
            kept[name] = values[name]
        else:
            left_out.append(f"{name}: {values[name]!r}"[:60])
    changes = ["do_sample: true is added to its sampling values"] if added else []
    if left_out:
        changes.append(f"transformers refuses {', '.join(left_out)}, which is left out")
    return GenerationConfig.from_dict(kept), " and ".join(changes)


def _is_sound(values: Mapping[str, Any]) -> bool:
    """Whether transformers accepts these settings and writes them."""
    try:
        config = GenerationConfig.from_dict(dict(values))
        config.validate(strict=True)
        config.to_json_string()
    except Exception:  # depending on the file, TypeErrors and AttributeErrors as well
        return False
    return all(_is_token(values.get(name)) for name in TOKENS)


def _is_token(value: Any) -> bool:
    tokens = value if isinstance(value, list) else [value] if value is not None else []
    return all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in tokens)


def _means_sampling(values: Mapping[str, Any]) -> bool:
    beams = values.get("num_beams")
    greedy = values.get("temperature") == 0 or values.get("top_k") == 1 or beams not in (None, 1)
    return not greedy and any(
        isinstance(value := values.get(name), int | float) and math.isfinite(value) and value not in nothing
        for name, nothing in SAMPLING.items()
    )
