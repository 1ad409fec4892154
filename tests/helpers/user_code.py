"""Code as a user would write it, in a file of their own."""

from __future__ import annotations

USER_CODE = '''
"""What a user would write: a reward, a regulariser and a prompt source in a file of their own."""

from ibro_lightning.sources import PromptSource
from ibro_lightning.regularizers import EntropyRegularizer
from ibro_lightning.rewards import VerifiableReward
from ibro_lightning.types import Problem


class SaysEquals(VerifiableReward):
    def verify(self, prompt, completion):
        return "=" in completion.text


class Raises(VerifiableReward):
    def verify(self, prompt, completion):
        raise KeyError("oops\\nsecond line")


class MinusOne(VerifiableReward):
    def verify(self, prompt, completion):
        return -1.0


class NeverRight(VerifiableReward):
    def verify(self, prompt, completion):
        return False


class ReturnsNaN(VerifiableReward):
    def verify(self, prompt, completion):
        return float("nan")


class NaNLater(VerifiableReward):
    def verify(self, prompt, completion):
        return float("nan") if completion.token_ids else 0.0


class Squared(EntropyRegularizer):
    def __init__(self, coef: float = 0.5):
        super().__init__(coef)

    def objective(self, stats):
        return stats.entropy**2


class Starts(PromptSource):
    def problems(self):
        for n in range(10):
            yield Problem(id=str(n), prompt=f"{n}>{n + 1}:", answer=n + 1)


class NotProblems(PromptSource):
    def problems(self):
        return [{"prompt": "1>2:", "answer": 2}]


class NoProblems(PromptSource):
    def problems(self):
        return []
'''
