"""Running real code on tensors without memory, and counting the bytes that it would have taken."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ibro_lightning.functional import fused_head

REAL_BYTES = 1 << 20
"""Tensors of up to this size that depend on no weight are real: masks, lengths and counters, which code looks into."""
ON_DEVICE = torch.ops.prim.device.default
READ = torch.ops.aten._local_scalar_dense.default
INDEX = torch.ops.aten.index.Tensor


class ShadowMemory(TorchDispatchMode):
    """What is computed within has shapes, dtypes and lifetimes, but no values, and takes next to no memory.

    The count is that of an allocator without rounding: the bytes of all storages that are alive, whoever holds them
    (autograd's graph included). All tensors are on the CPU, whose operations stand for those of any device.

    Values that would have been computed from weights read as 0. Code that branches on them, or asks how many elements
    of such a tensor are not 0, cannot be run like this.

    Args:
        device: the kind of device whose fused head to count, "cpu" or "cuda": they take other chunks at a time.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self._device = device
        self.now = 0
        """Bytes alive."""
        self.peak = 0
        """The largest :attr:`now` so far; whoever wants to know that of a part sets it back to :attr:`now`."""
        self._real_bytes = REAL_BYTES
        self._alive: dict[int, tuple[int, Any]] = {}
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._stack = ExitStack()

    @contextmanager
    def without_values(self) -> Iterator[None]:
        """Whatever is made within is a shadow, however small: weights."""
        self._real_bytes = -1
        try:
            yield
        finally:
            self._real_bytes = REAL_BYTES

    def __enter__(self) -> ShadowMemory:
        self._stack.enter_context(_head_in_shape_only(self._device))
        self._stack.enter_context(patch.object(torch.UntypedStorage, "resize_", self._resizing()))
        self._stack.enter_context(self._fake)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it does its work on this rank's part, which then comes by here
        if func is ON_DEVICE:
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        shadows = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if shadows and func is READ:
            return {torch.bool: False}.get(args[0].dtype, 0.0 if args[0].is_floating_point() else 0)
        if not shadows and self._stays_real(func, tensors, args, kwargs):
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
        elif func is INDEX:
            result = func(args[0], _places(args[1]))
        else:
            result = func(*args, **kwargs)
        self._count(result)
        return result

    def _stays_real(self, func: Any, tensors: list[Tensor], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Is the result small? Found out on shadows, so that a large one never exists."""
        if sum(_bytes(tensor) for tensor in tensors) > self._real_bytes:
            return False
        try:
            results = tree_leaves(func(*args, **kwargs))
        except RuntimeError:  # its shape depends on values, which are small
            return True
        return sum(_bytes(leaf) for leaf in results if isinstance(leaf, Tensor)) <= self._real_bytes

    def _count(self, result: Any) -> None:
        for leaf in tree_leaves(result):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._alive:
                self._alive[key] = size, weakref.ref(storage, partial(self._freed, key))
                self.now += size
                self.peak = max(self.peak, self.now)

    def _resizing(self) -> Callable[[Any, int], Any]:
        """``UntypedStorage.resize_``, which is no operation that a mode would see: how fully_shard frees what it has
        gathered."""
        resize = torch.UntypedStorage.resize_

        def counted(storage: Any, size: int) -> Any:
            result = resize(storage, size)
            if storage._cdata in self._alive:
                before, alive = self._alive[storage._cdata]
                self._alive[storage._cdata] = size, alive
                self.now += size - before
                self.peak = max(self.peak, self.now)
            return result

        return counted

    def _freed(self, key: int, _: object) -> None:
        size, _ = self._alive.pop(key)
        self.now -= size


def _places(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Masks as the positions that they pick, whose number is the result's shape."""
    places: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype not in (torch.bool, torch.uint8) or isinstance(index, FakeTensor):
            places.append(index)
        else:
            with unset_fake_temporarily():
                places += index.nonzero().unbind(1)
    return places


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def _head_in_shape_only(device: str) -> Iterator[None]:
    """The fused head goes over its logits in hundreds of small blocks: on shadows, their arithmetic is left out."""
    chunk = fused_head._CHUNK_BYTES.get(device, fused_head._CHUNK_BYTES["cuda"])
    with (
        patch.object(fused_head, "_run", _run),
        patch.object(fused_head, "_blocks", lambda logits: [slice(0, len(logits))]),
        patch.dict(fused_head._CHUNK_BYTES, cpu=chunk),
    ):
        yield


def _run(function: Any, logits: Tensor, *args: Any) -> Any:
    if function is fused_head._statistics:
        return tuple(logits.new_empty(len(logits)) for _ in range(4 if args[1] else 3))
    return None
