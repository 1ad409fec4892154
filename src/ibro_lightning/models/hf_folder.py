"""Writes a model as a Hugging Face folder: whole weights under their Hugging Face names, config and tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, distributed, nn

from ibro_lightning.models.compiled import compile_in_place
from ibro_lightning.models.generation_config import repaired
from ibro_lightning.models.loading import PolicySource
from ibro_lightning.models.lora import BASE, adapter_layers, adapter_weights, merged_weights, save_adapter
from ibro_lightning.models.sharding import full_tensor, is_sharded, named_parameters
from ibro_lightning.models.side_files import attempt, report, write_beside
from ibro_lightning.models.ties import is_tied, says_tied, set_tied
from ibro_lightning.models.weight_files import raise_on_all_ranks
from ibro_lightning.runs.model_folders import begin, finish


def full_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """``model.state_dict()`` in whole tensors, adapters merged. Sharded tensors are gathered lazily, one at a time;
    every rank must iterate over all of them."""
    if adapter_layers(model):
        yield from merged_weights(model)
        return
    for name, tensor in model.state_dict().items():
        yield name, full_tensor(tensor)


def export_folder(
    model: Any, tokenizer: Any, folder: Path | str, source: PolicySource | None = None, *, keep_earlier: bool = True
) -> Path:
    """Write a Hugging Face folder (``config.json``, ``model.safetensors``, tokenizer) with a list of its files. An
    earlier export there is moved aside (``folder.1``).

    Adapters are merged into it, and also written in peft's format to ``adapter`` next to it. All ranks must call this
    for a sharded model: tensors are gathered one at a time, rank 0 keeps them on the CPU and writes, and all wait for
    it. For any other model, only the first rank writes.

    A problem with a file besides the weights does not cost the weights: the file is repaired, copied or left out, with
    a one-line warning.

    Args:
        source: where the model came from; its processor files are copied.
        keep_earlier: False removes what an earlier call with False wrote, if it is unchanged.

    Returns:
        the folder written: ``folder``, or a free name next to it if what is there is not an export.
    """
    model, folder = compile_in_place(model), Path(folder)
    sharded, first = is_sharded(model), not distributed.is_initialized() or distributed.get_rank() == 0
    if not (sharded or first):
        return folder
    weights = _collect(model) if sharded or adapter_layers(model) else None
    adapters = _on_rank_zero(adapter_weights(model)) if adapter_layers(model) else {}

    def write() -> Path:
        if not first:
            return folder
        partial = _write(model, tokenizer, folder, weights, source)
        written = finish(partial, folder, keep_earlier=keep_earlier)
        if adapters:
            adapter_folder = folder.with_name("adapter")
            partial = begin(adapter_folder)
            if attempt(partial, "the adapter", lambda: save_adapter(model, adapters, partial)):
                finish(partial, adapter_folder, keep_earlier=keep_earlier)
        return written

    written: Path = raise_on_all_ranks(write) if sharded else write()
    return written


def _write(
    model: Any, tokenizer: Any, folder: Path, weights: dict[str, Tensor] | None, source: PolicySource | None
) -> Path:
    """Write everything to a temporary folder."""
    partial = begin(folder)
    _make_writable(model, partial)
    kept = dict(weights) if weights is not None else None  # save_pretrained empties its argument
    if not attempt(partial, "transformers' folder", lambda: model.save_pretrained(partial, state_dict=kept)):
        _write_plainly(model, weights, partial)
    originals: dict[str, Path] = {}
    if source is not None:
        attempt(partial, "what lies beside the base model's weights", lambda: originals.update(source.side_files()))
    write_beside(tokenizer, partial, originals, trust_remote_code=source is not None and source.trusts_code)
    return partial


def _make_writable(model: Any, folder: Path) -> None:
    """Repair what transformers loads but refuses to write, and what contradicts the weights."""
    if (generation := getattr(model, "generation_config", None)) is not None:
        values = {name: value for name, value in generation.to_dict().items() if value is not None}
        mended, changes = repaired(values)
        if changes:
            model.generation_config = mended
            report(folder, f"generation_config.json is repaired: {changes}")
    if model.get_output_embeddings() is not None and says_tied(model.config) and not is_tied(model):
        set_tied(model.config, False)


def _write_plainly(model: Any, weights: dict[str, Tensor] | None, folder: Path) -> None:
    """Write weights and config of a model that ``save_pretrained`` cannot write."""
    weights = dict(model.state_dict()) if weights is None else weights
    distinct = {(t.data_ptr(), t.shape, t.stride()): name for name, t in reversed(weights.items())}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: weights[name].detach().cpu().contiguous() for name in distinct.values()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    attempt(folder, "config.json", lambda: model.config.to_json_file(folder / "config.json"))
    if getattr(model, "generation_config", None) is not None:
        attempt(folder, "generation_config.json", lambda: model.generation_config.save_pretrained(folder))


def _collect(model: nn.Module) -> dict[str, Tensor]:
    """All whole weights on rank 0's CPU, tied ones as one tensor; empty on other ranks."""
    canonical = {name.replace(BASE, "."): first.replace(BASE, ".") for name, first, _ in named_parameters(model)}
    kept = _on_rank_zero(full_weights(model))
    return {name: kept[canonical.get(name, name)] for name in kept}


def _on_rank_zero(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    first = not distributed.is_initialized() or distributed.get_rank() == 0
    kept = {}
    for name, tensor in weights:
        if first:
            kept[name] = tensor.cpu().contiguous()
    return kept
