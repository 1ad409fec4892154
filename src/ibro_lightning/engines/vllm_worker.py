"""Transfer of weights to vLLM in other processes, in chunks that pass its message queues without pickle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

Piece = tuple[str, str, list[int], bytes]
"""``(name, dtype, shape, bytes)`` of a weight."""
CHUNK_BYTES = 64 * 2**20


def chunks(weights: Iterable[tuple[str, Tensor]], limit: int = CHUNK_BYTES) -> Iterator[list[Piece]]:
    """Lists of pieces of at most ``limit`` bytes; a larger weight is a list of its own."""
    chunk: list[Piece] = []
    size = 0
    for name, tensor in weights:
        data = tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
        if chunk and size + len(data) > limit:
            yield chunk
            chunk, size = [], 0
        chunk.append((name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), data))
        size += len(data)
    if chunk:
        yield chunk


def tensors(chunk: Iterable[Piece]) -> Iterator[tuple[str, Tensor]]:
    """The inverse of :func:`chunks`."""
    for name, dtype, shape, data in chunk:
        raw = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        yield name, raw.view(getattr(torch, dtype)).view(shape)


class WeightReceiver:
    """Methods that vLLM adds to its workers (``worker_extension_cls``): its layerwise reload in several calls."""

    model_runner: Any

    def ibro_begin_reload(self) -> None:
        from vllm.model_executor.model_loader.reload.layerwise import initialize_layerwise_reload

        initialize_layerwise_reload(self.model_runner.get_model())

    def ibro_load_chunk(self, chunk: list[Piece]) -> None:
        self.model_runner.get_model().load_weights(tensors(chunk))

    def ibro_finish_reload(self) -> None:
        from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload

        finalize_layerwise_reload(self.model_runner.get_model(), self.model_runner.model_config)
