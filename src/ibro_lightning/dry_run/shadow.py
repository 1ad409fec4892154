"""Runs real code on tensors without memory, and counts the bytes that it would take.

torch's ``FakeTensorMode`` alone cannot run an update: code that reads masks and lengths raises
``DataDependentOutputException``, so small tensors are real here. Its ``MemTracker`` counts the same peak on top of this
mode, in more than twice the time, but only for a module that is called once between two resets, unlike micro-batches
and probes. In exchange it splits the peak by module and by kind of tensor, and tracks several devices.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ibro_lightning.functional.fused_head import shapes_only

REAL_BYTES = 1 << 20
"""Tensors of up to this size that do not depend on weights are real: masks, lengths and counters."""
LARGEST_ELEMENT = torch.complex128.itemsize
ON_DEVICE = torch.ops.prim.device.default
READ = torch.ops.aten._local_scalar_dense.default
INDEX = torch.ops.aten.index.Tensor


class ShadowMemory(TorchDispatchMode):
    """Within this mode, tensors have shapes, dtypes and lifetimes, but no values and almost no memory.

    The count is that of an allocator without rounding: the bytes of all live storages, whatever holds them (autograd's
    graph included). All tensors are on the CPU, whose operations represent those of any device.

    Values computed from weights read as 0. Code that branches on them, or counts the nonzero elements of such a tensor,
    cannot run here.

    Args:
        device: whose fused head to count, "cpu" or "cuda": their chunk sizes differ.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self._device = device
        self.now = 0
        """Live bytes."""
        self.peak = 0
        """The largest :attr:`now` so far; reset it to :attr:`now` to measure a part."""
        self._real_bytes = REAL_BYTES
        self._alive: dict[int, tuple[int, Any]] = {}
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._stack = ExitStack()

    @contextmanager
    def without_values(self) -> Iterator[None]:
        """Within, all new tensors are shadows, however small: for weights."""
        self._real_bytes = -1
        try:
            yield
        finally:
            self._real_bytes = REAL_BYTES

    def __enter__(self) -> ShadowMemory:
        self._stack.enter_context(shapes_only(self._device))
        self._stack.callback(setattr, torch.UntypedStorage, "resize_", torch.UntypedStorage.resize_)
        setattr(torch.UntypedStorage, "resize_", self._resizing())  # noqa: B010 - a method, for mypy
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
            return NotImplemented  # it operates on this rank's part, which is dispatched here in turn
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
            result = func(args[0], _positions(args[1]))
        else:
            result = func(*args, **kwargs)
        self._count(result)
        return result

    def _stays_real(self, func: Any, tensors: list[Tensor], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Whether the result is small, determined on shadows so that a large one never exists."""
        if sum(_bytes(tensor) for tensor in tensors) > self._real_bytes:
            return False
        if func is READ:
            return True
        if torch.Tag.pointwise in func.tags and tensors:  # as large as its operands: nothing to try
            elements = torch.broadcast_shapes(*(tensor.shape for tensor in tensors)).numel()
            if elements * LARGEST_ELEMENT <= self._real_bytes:
                return True
        try:
            results = tree_leaves(func(*args, **kwargs))
        except RuntimeError:  # its shape depends on the values of small tensors
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
        """An ``UntypedStorage.resize_`` that counts: fully_shard frees weights with it, unseen by modes."""
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


def _positions(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Masks as the positions that they select, whose number determines the result's shape."""
    positions: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype not in (torch.bool, torch.uint8) or isinstance(index, FakeTensor):
            positions.append(index)
        else:
            with unset_fake_temporarily():
                positions += index.nonzero().unbind(1)
    return positions


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
