"""The fused head: its compiled arithmetic against its eager one and against full logits, in time, memory and error."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fused_head import Problem, error_sizes, peak_bytes
from gpu.hardware import device, seconds
from gpu.report import Figures
from ibro_lightning.functional import fused_head

SIZES = {False: (4096, 896, 151936), True: (64, 16, 101)}
"""Tokens, width and vocabulary, by miniature: those of Qwen2.5-0.5B, and some that take no time."""
REPEATS = {False: 10, True: 2}


@contextmanager
def compiled(on: bool, miniature: bool) -> Iterator[None]:
    """Compile the fused head's arithmetic on this device, or do not. Raises if compiling fails, as it then goes on
    without. A miniature traces the arithmetic like any other and runs what was traced, without a C++ compiler."""
    kept = fused_head._compiled_devices, fused_head._compiled
    fused_head._compiled_devices = {device().type} if on else set()
    if miniature:
        fused_head._compiled = functools.cache(functools.partial(torch.compile, dynamic=True, backend="eager"))
    try:
        yield
        if on and device().type not in fused_head._compiled_devices:
            raise RuntimeError("torch.compile failed on the fused head's arithmetic: see the warning above")
    finally:
        fused_head._compiled_devices, fused_head._compiled = kept


def measure(figures: Figures, miniature: bool) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        problem = Problem(*SIZES[miniature], dtype, None, device())
        exact = problem.exact()
        variants: dict[str, tuple[Callable[[], list[torch.Tensor]], bool]] = {
            "compiled": (problem.fused, True),
            "torch": (problem.fused, False),
            "full logits": (problem.naive, False),
        }
        for name, (run, on) in variants.items():
            with figures.guarded(f"{name}, {dtype}".replace("torch.", "")) as row, compiled(on, miniature):
                run()  # compiles, and warms up
                taken = [seconds(run) for _ in range(REPEATS[miniature])]
                quartiles = statistics.quantiles(taken, n=4, method="inclusive")
                for label, value in zip(("ms_low", "ms", "ms_high"), quartiles, strict=True):
                    row[label] = value * 1e3
                row["peak_mib"] = (memory(run) - problem.weight.nbytes) / 2**20
                row |= error_sizes(run(), exact)


def memory(run: Callable[[], object]) -> int:
    """The most that torch's allocator has in use during a call, above what it had before."""
    if not torch.cuda.is_available():
        return peak_bytes(run)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before
