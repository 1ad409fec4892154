"""A rollout that is made while the policy learns from the one before it, and its form in a checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from itertools import accumulate, islice, pairwise
from typing import Any

import numpy as np

from ibro_lightning.batches.sequences import joined
from ibro_lightning.datamodules.producer import Produced, Progress, owners_of
from ibro_lightning.ranks import Ranks
from ibro_lightning.types import Completion, Group, Logp, Prompt, RewardResult, TokenIds

STOP_S = 5.0
"""Longest time in seconds to wait for abandoned work: the engine's end stops it, but not verifiers, nor other ranks."""


class InFlight:
    """The rollout, or its making: a thread at work."""

    def __init__(self, future: Future[Produced]) -> None:
        self._future = future

    @classmethod
    def begin(cls, produce: Callable[[], Produced]) -> InFlight:
        """Make it in a thread."""
        future: Future[Produced] = Future()

        def work() -> None:
            try:
                future.set_result(produce())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, name="rollout", daemon=True).start()
        return cls(future)

    @classmethod
    def landed(cls, produced: Produced) -> InFlight:
        """One that was made before."""
        future: Future[Produced] = Future()
        future.set_result(produced)
        return cls(future)

    def settle(self, timeout_s: float | None = None) -> None:
        """Wait until it is made, or has failed; its error stays for :meth:`result`."""
        wait([self._future], timeout_s)

    def result(self) -> Produced:
        """Waits for it; raises what its thread raised."""
        return self._future.result()

    def state(self, ranks: Ranks) -> dict[str, Any] | None:
        """Waits for it; plain values and tensors of all ranks, or None if it has failed: a resumed run makes it anew.
        Collective."""
        self.settle()
        produced = None if self._future.exception() else self._future.result()
        shares = ranks.gather(None if produced is None else _packed_share(produced))
        if produced is None or any(share is None for share in shares):
            return None
        return {
            "shares": shares,
            "total_groups": produced.total_groups,
            "skip_update": produced.skip_update,
            "metrics": {name: value for name, value in produced.metrics.items() if not name.startswith("time/")},
            "after": produced.after.state(),
        }


def restored(state: Mapping[str, Any], prompts: Sequence[Prompt], ranks: Ranks) -> Produced | None:
    """This rank's share of the rollout in a checkpoint, which may be one of another number of ranks; None if the run
    has other prompts now.

    Args:
        prompts: of the run; the checkpoint has their ids.
    """
    by_id = {prompt.id: prompt for prompt in prompts}
    shares, after = state["shares"], Progress.of(state["after"])
    if any(name not in by_id for share in shares for part in ("own", "dropped") for name in share[part]["prompts"]):
        return None
    if len(shares) == ranks.size:
        own, dropped = _unpacked_share(shares[ranks.rank], by_id)
    else:
        everyone = [_unpacked_share(share, by_id) for share in shares]
        owners = owners_of(state["total_groups"], after.iteration, ranks.size)
        pairs = sorted((number, group) for groups, _ in everyone for number, group in groups.items())
        own = {number: group for number, group in pairs if owners[number] == ranks.rank}
        dropped = ranks.share([group for _, groups in everyone for group in groups])
    return Produced(own, tuple(dropped), state["total_groups"], state["skip_update"], state["metrics"], after)


def _packed_share(produced: Produced) -> dict[str, Any]:
    own, dropped = list(produced.own.values()), list(produced.dropped)
    return {"numbers": list(produced.own), "own": _packed(own), "dropped": _packed(dropped)}


def _unpacked_share(share: Mapping[str, Any], prompts: Mapping[str, Prompt]) -> tuple[dict[int, Group], list[Group]]:
    own = dict(zip(share["numbers"], _unpacked(share["own"], prompts), strict=True))
    return own, _unpacked(share["dropped"], prompts)


def _packed(groups: Sequence[Group]) -> dict[str, Any]:
    completions = [completion for group in groups for completion in group.completions]
    results = [result for group in groups for result in group.results]
    return {
        "prompts": [group.prompt.id for group in groups],
        "sizes": [len(group.completions) for group in groups],
        "lengths": [(len(completion.token_ids), len(completion.logp)) for completion in completions],
        "token_ids": joined([completion.token_ids for completion in completions], np.int32),  # [N] int32
        "logp": joined([completion.logp for completion in completions], np.float32),  # [≤ N] float32
        "completions": [(c.finish_reason, c.text, c.max_tokens, c.seed) for c in completions],
        "results": [
            (_plain(r.reward), _plain_parts(r), r.answer, r.timed_out, _plain(r.outcome_span), r.why) for r in results
        ],
    }


def _unpacked(packed: Mapping[str, Any], prompts: Mapping[str, Prompt]) -> list[Group]:
    # Up to 0.2 they were int64 and float64.
    tokens, logp = TokenIds.shared(packed["token_ids"].int().numpy()), Logp.shared(packed["logp"].float().numpy())
    ends = accumulate(packed["lengths"], lambda ends, more: (ends[0] + more[0], ends[1] + more[1]), initial=(0, 0))
    completions = (
        Completion(tokens[before[0] : end[0]], logp[before[1] : end[1]], *others)
        for (before, end), others in zip(pairwise(ends), packed["completions"], strict=True)
    )
    results = (RewardResult(*values) for values in packed["results"])
    return [
        Group(prompts[name], tuple(islice(completions, size)), tuple(islice(results, size)))
        for name, size in zip(packed["prompts"], packed["sizes"], strict=True)
    ]


def _plain(number: Any) -> Any:
    """A number as a checkpoint can hold it: rewards may give one of numpy or torch."""
    return number if number is None or type(number) in (bool, int, float) else float(number)


def _plain_parts(result: RewardResult) -> dict[str, Any]:
    return {name: _plain(value) for name, value in result.parts.items()}
