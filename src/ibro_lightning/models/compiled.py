"""Removes the wrappers of ``torch.compile``, which would put ``_orig_mod`` into the name of every weight."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule

from ibro_lightning.models.transformer import backbone_of


def compile_in_place(module: Any) -> Any:
    """Replace ``torch.compile``'s wrappers in a module by what they wrap, with compiled calls.

    Weights keep the names by which engines, exports, checkpoints and adapters know them, and the compiler keeps its
    settings. Idempotent.

    Returns:
        the module, or the one that it wrapped.
    """
    while isinstance(module, OptimizedModule):
        module = _unwrapped(module)
    if isinstance(module, nn.Module):
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, OptimizedModule):
                    setattr(parent, name, _unwrapped(child))
    return module


def compile_hook(module: Any, *_: Any) -> None:
    """:func:`compile_in_place` as a hook before a state is saved or loaded."""
    compile_in_place(module)


def _unwrapped(wrapper: Any) -> Any:
    """The module as ``nn.Module.compile`` would leave it, backbone included, which runs without the head."""
    inner: Any = wrapper._orig_mod
    for part in (inner, backbone_of(inner)):
        if part is not None and part._compiled_call_impl is None:
            part._compiled_call_impl = wrapper.dynamo_ctx(part._call_impl)
    return inner
