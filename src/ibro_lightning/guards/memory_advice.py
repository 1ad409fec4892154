"""Out of memory: which setting to lower, and to what value, computed from the memory in use at the failure."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.errors import ConfigError, is_out_of_memory

_ASKED = re.compile(r"(?:[Tt]ried to allocate|you tried to allocate) ([\d.]+) ?(bytes|KiB|MiB|GiB)?")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, None: 1}


class OutOfMemory(ConfigError):
    """Out of memory; names the setting that determines the memory use, its value, and a smaller one."""


@contextmanager
def memory_advice(
    phase: str,
    sequences: Sequences,
    micro_batch_tokens: int,
    *,
    packing: bool = False,
    sharing: bool = False,
    checkpointing: bool = False,
    device: torch.device | str = "cpu",
) -> Iterator[None]:
    """Context of a micro-batch's forward and backward pass that raises :class:`OutOfMemory`, with what to change, in
    place of torch's error.

    Args:
        phase: what is being computed, for the message.
        sequences: the micro-batch.
        micro_batch_tokens: the setting's present value.
        packing, sharing: tokens are run without padding; with ``sharing``, those of each distinct prompt once.
        checkpointing: whether gradient checkpointing is already on.
    """
    before = _in_use(device)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        asked, rows = requested_bytes(error), len(sequences)
        longest = int(sequences.lengths.max()) if rows else 0
        in_memory = _tokens(sequences, packing, sharing)
        used, capacity = _in_use(device), _capacity(device)
        limits = (
            "" if used is None or capacity is None else f" with {_size(used)} of {_size(capacity)} in use on {device}"
        )
        text = (
            f"out of memory in {phase}: a micro-batch of {rows} rows of up to {longest} tokens "
            f"({in_memory} in memory){_request(asked)}{limits}"
        )
        factor = lower_by(before, used, asked, capacity)
        other = "" if checkpointing else "; or model.policy_options.gradient_checkpointing: true, which is slower"
        tokens = int(min(in_memory, micro_batch_tokens) / factor)
        smaller = max(1, tokens // 256 * 256 if tokens >= 1024 else tokens)
        if rows > 1:
            remedy = f"write {smaller} (÷ {_number(micro_batch_tokens / smaller)}){other}"
        else:  # already a micro-batch of one row, which no token budget makes shorter
            remedy = (
                f"a single response does not fit: divide data.sampling.max_tokens by {factor:.2g}, spread the model "
                f"over more devices (trainer.strategy: fsdp2){other}"
            )
        raise OutOfMemory("micro_batch_tokens", micro_batch_tokens, f"{text}: {remedy}") from error


@contextmanager
def engine_memory_advice(setting: str, value: float, responses: int, tokens: int) -> Iterator[None]:
    """:func:`memory_advice` for generation: the engine's ``setting`` for the number of concurrent responses, such as
    ``max_batch_size``, its value, and the number and maximum length (prompt + response, in tokens) of the responses
    of this call."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        at_once = min(value, responses)
        smaller = max(1, int(at_once) // 2)
        raise OutOfMemory(
            setting,
            value,
            f"out of memory in generate: {at_once:g} responses of up to {tokens} tokens"
            f"{_request(requested_bytes(error))}: write {smaller} (÷ {_number(value / smaller)}), or lower "
            "data.sampling.max_tokens",
        ) from error


def requested_bytes(error: BaseException) -> int | None:
    """The size in bytes of the failed allocation, if the error names it."""
    match = _ASKED.search(str(error))
    return int(float(match[1]) * _UNITS[match[2]]) if match else None


def lower_by(before: int | None, at_failure: int | None, asked: int | None, capacity: int | None) -> float:
    """The factor by which a micro-batch has to shrink: 2, or more if the memory that it had and requested is more than
    twice what is available to it. All in bytes: in use ``before`` the micro-batch (weights, gradients, optimizer) and
    when memory ran out, ``asked`` for by the failed allocation, and in total."""
    if before is None or at_failure is None or asked is None or capacity is None or capacity <= before:
        return 2.0
    return max(2.0, (at_failure - before + asked) / (capacity - before))


def _tokens(sequences: Sequences, packing: bool, sharing: bool) -> int:
    """Tokens in memory at once, with padding unless they are packed or prompts are shared."""
    if sharing:
        firsts = sorted(set(sequences.same_prompts()))
        return int(sequences.prompt_lengths[firsts].sum() + sequences.response_lengths.sum())
    if packing or not len(sequences):
        return int(sequences.lengths.sum())
    return len(sequences) * int(sequences.lengths.max())


def _number(factor: float) -> str:
    return f"{factor:.2f}" if factor < 10 else f"{factor:.0f}"


def _request(asked: int | None) -> str:
    return "" if asked is None else f" asked for {_size(asked)} more"


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
    """Bytes that this process may use; None on the CPU without a limit, where others share the memory."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
