"""Whether a verifier can use a gold answer: it must accept its plainest form, and reject a different answer."""

from __future__ import annotations

from collections.abc import Sequence

from ibro_lightning.errors import ConfigError, RewardError
from ibro_lightning.rewards.base import Reward
from ibro_lightning.rewards.blame import blamed_on
from ibro_lightning.types import Completion, Prompt, RewardResult

STOPPED = "judging it was stopped: import slow modules in preload, or raise data.reward_pool.deadline_s or memory_mib"


def gives_plain_responses(reward: Reward) -> bool:
    """Whether a reward defines plain responses for its own way of judging, not only inherits those of another."""
    order = type(reward).__mro__
    naming = next(place for place, kind in enumerate(order) if "plain_responses" in vars(kind))
    judging = next(place for place, kind in enumerate(order) if vars(kind).keys() & {"verify", "__call__"})
    return order[naming] is not Reward and naming <= judging


class GoldTrial(Reward):
    """Tries a prompt's gold on its verifier; one result per prompt, regardless of the responses.

    The result's reward is 1 if the gold is usable; otherwise it is 0, and ``answer`` is the reason. The pool runs it
    like the verifier itself: in a worker process, with a deadline.
    """

    def __init__(self, verifier: Reward) -> None:
        self.verifier = verifier
        self.pooled, self.deadline_s = verifier.pooled, verifier.deadline_s

    def __call__(self, prompt: Prompt, completions: Sequence[Completion]) -> list[RewardResult]:
        with blamed_on(self.verifier, f"the trial of the gold of prompt {prompt.id!r}"):
            reason = self._reason(prompt)
        return [RewardResult(float(reason is None), {}, reason)] * len(completions)

    def stopped(self, score: float) -> RewardResult:
        return RewardResult(0.0, {}, STOPPED, timed_out=True)

    def _reason(self, prompt: Prompt) -> str | None:
        try:
            if (plain := self.verifier.plain_responses(prompt)) is None:
                return None
            texts = (*plain.right, *plain.wrong)
            responses = [Completion((), (), "stop", text, 1, 0) for text in texts]
            results = self.verifier(prompt, responses) if texts else []
        except (RewardError, ConfigError, ValueError) as error:
            return " ".join(str(error).split())
        for place, (text, result) in enumerate(zip(texts, results, strict=True)):
            right = result.parts.get("accuracy") == 1
            shown = repr(text if len(text) <= 80 else text[:79] + "…")
            if place < len(plain.right) and not right:
                return f"it does not accept even {shown}"
            if place >= len(plain.right) and right:
                return f"it accepts {shown}, too"
        return None
