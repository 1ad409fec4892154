"""Exact verifier of the number path."""

from __future__ import annotations

from typing import Any

from ibro_lightning.errors import ConfigError
from ibro_lightning.responses import Completion, Prompt
from ibro_lightning.rewards.base import VerifiableReward
from ibro_lightning.tasks import NumberPath


class NumberPathReward(VerifiableReward):
    """Right if every step is true, the last number is the target and EOS follows. Reads tokens, not text.

    ``prompt.answer`` holds the problem: ``{start, target, size, moves}`` (see :class:`NumberPathSource`).
    """

    pooled = False  # a walk over the tokens, bounded by construction
    _tokenizer: Any = None

    def setup(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tasks: dict[tuple[int, tuple[str, ...]], NumberPath] = {}

    def verify(self, prompt: Prompt, completion: Completion) -> bool:
        if self._tokenizer is None:
            raise RuntimeError("NumberPathReward.setup(tokenizer) must be called first")
        answer = prompt.answer
        tokens = self._tokenizer.convert_ids_to_tokens(list(completion.token_ids))
        return self._task(answer["size"], tuple(answer["moves"])).verify(tokens, answer["start"], answer["target"])

    def _task(self, size: int, moves: tuple[str, ...]) -> NumberPath:
        """The rules, once it is certain that the policy's tokenizer has a token for all of their words."""
        if (size, moves) not in self._tasks:
            task = NumberPath(size, moves)
            known = self._tokenizer.get_vocab()
            if missing := [token for token in task.vocabulary() if token not in known]:
                raise ConfigError(
                    "data.reward",
                    "NumberPathReward",
                    f"the policy's tokenizer has no token {missing[0]!r}: use a policy trained on this very task "
                    "(sft_quickstart.yaml makes one for 50 numbers), or another task for this policy",
                )
            self._tasks[size, moves] = task
        return self._tasks[size, moves]
