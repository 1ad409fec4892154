"""Out of memory: which setting to lower, and to what, from what was in memory when it happened."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ibro_lightning.errors import ConfigError
from ibro_lightning.sequences import Sequences

_ASKED = re.compile(r"(?:[Tt]ried to allocate|you tried to allocate) ([\d.]+) ?(bytes|KiB|MiB|GiB)?")
_ON_CPU = re.compile(r"can't allocate memory|not enough memory|Cannot allocate memory|std::bad_alloc")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, None: 1}


class OutOfMemory(ConfigError):
    """Names the setting that decides how much memory this takes, its value, and a smaller one."""


@dataclass(frozen=True)
class Load:
    """What was being computed: rows of a micro-batch, and the tokens of it."""

    rows: int
    tokens: int
    """In memory: with padding, unless sequences are packed."""
    longest: int

    @classmethod
    def of(cls, sequences: Sequences, *, packing: bool = False) -> Load:
        lengths = sequences.lengths
        longest = int(lengths.max()) if len(sequences) else 0
        return cls(len(sequences), int(lengths.sum()) if packing else len(sequences) * longest, longest)


@contextmanager
def memory_advice(
    phase: str,
    sequences: Sequences,
    micro_batch_tokens: int,
    *,
    packing: bool = False,
    checkpointing: bool = False,
    device: torch.device | str = "cpu",
) -> Iterator[None]:
    """Around a micro-batch's forward and backward pass: says what to change if memory runs out in it.

    Args:
        phase: what is being computed, for the message.
        sequences: the micro-batch.
        micro_batch_tokens: the setting as it is.
        checkpointing: is gradient checkpointing on already?

    Raises:
        OutOfMemory: in place of torch's error.
    """
    before = _in_use(device)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        asked, load = requested_bytes(error), Load.of(sequences, packing=packing)
        text = _situation(phase, load, device, asked)
        factor = lower_by(before, _in_use(device), asked, _capacity(device))
        other = "" if checkpointing else "; or model.policy_options.gradient_checkpointing: true, which is slower"
        smaller = _round_down(min(load.tokens, micro_batch_tokens) / factor)
        if load.rows > 1:
            remedy = f"write {smaller} (÷ {_number(micro_batch_tokens / smaller)}){other}"
        else:  # this row has a micro-batch of its own already: no budget makes it shorter
            remedy = (
                f"a single response does not fit: divide data.sampling.max_tokens by {factor:.2g}, spread the model "
                f"over more devices (trainer.strategy: fsdp2){other}"
            )
        raise OutOfMemory("model.micro_batch_tokens", micro_batch_tokens, f"{text}: {remedy}") from error


@contextmanager
def engine_memory_advice(setting: str, value: float, responses: int, tokens: int) -> Iterator[None]:
    """The same around generation.

    Args:
        setting: the engine's that decides how much is generated at once, such as ``data.engine.max_batch_size``.
        value: as it is.
        responses: to be generated in this call.
        tokens: prompt + response that each of them may have.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        at_once = min(value, responses)
        smaller = max(1, int(at_once) // 2)
        asked = requested_bytes(error)
        wanted = "" if asked is None else f" asked for {_size(asked)} more"
        raise OutOfMemory(
            setting,
            value,
            f"out of memory in generate: {at_once:g} responses of up to {tokens} tokens{wanted}: write {smaller} "
            f"(÷ {_number(value / smaller)}), or lower data.sampling.max_tokens",
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """An accelerator's, torch's on the CPU, or Python's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_ON_CPU.search(str(error)))


def requested_bytes(error: BaseException) -> int | None:
    """How much more was asked for, if the error says so."""
    said = _ASKED.search(str(error))
    return int(float(said[1]) * _UNITS[said[2]]) if said else None


def lower_by(before: int | None, at_failure: int | None, asked: int | None, capacity: int | None) -> float:
    """By what factor a micro-batch has to shrink. All that is known is that it needs more than it got: at least by a
    half; by more if what it had and asked for is more than twice what there is for it.

    Args:
        before: bytes in use before the micro-batch: weights, gradients, optimizer.
        at_failure: bytes in use when memory ran out.
        asked: bytes it asked for then.
        capacity: bytes that there are.
    """
    if before is None or at_failure is None or asked is None or capacity is None or capacity <= before:
        return 2.0
    return max(2.0, (at_failure - before + asked) / (capacity - before))


def _number(factor: float) -> str:
    return f"{factor:.2f}" if factor < 10 else f"{factor:.0f}"


def _round_down(tokens: float) -> int:
    step = 256 if tokens >= 1024 else 1
    return max(1, int(tokens) // step * step)


def _situation(phase: str, load: Load, device: torch.device | str, asked: int | None) -> str:
    used, capacity = _in_use(device), _capacity(device)
    wanted = "" if asked is None else f" asked for {_size(asked)} more"
    there = "" if used is None or capacity is None else f" with {_size(used)} of {_size(capacity)} in use on {device}"
    return (
        f"out of memory in {phase}: a micro-batch of {load.rows} rows of up to {load.longest} tokens "
        f"({load.tokens} in memory){wanted}{there}"
    )


def _in_use(device: torch.device | str) -> int | None:
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return None


def _capacity(device: torch.device | str) -> int | None:
    """Bytes that this process may have; on the CPU None, unless it is limited: what is free depends on others."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
