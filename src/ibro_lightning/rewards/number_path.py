"""Exact verifier of the number path."""

from __future__ import annotations

from typing import Any

from ibro_lightning.errors import ConfigError
from ibro_lightning.rewards.base import VerifiableReward
from ibro_lightning.tasks import NumberPath
from ibro_lightning.types import Completion, Prompt


class NumberPathReward(VerifiableReward):
    """Right if every step is true, the last number is the target and EOS follows. Reads tokens, not text.

    ``prompt.answer`` holds the problem: ``{start, target, size, moves}`` (see :class:`NumberPathSource`).
    """

    _tokenizer: Any = None

    def setup(self, tokenizer: Any) -> None:
        missing = [token for token in ("0", "1", "=", "!") if token not in tokenizer.get_vocab()]
        if missing:
            raise ConfigError(
                "data.reward",
                "NumberPathReward",
                f"the policy's tokenizer has no token {missing[0]!r}: use a policy trained with the number-path "
                "tokenizer (sft_quickstart.yaml makes one), or another task for this policy",
            )
        self._tokenizer = tokenizer

    def verify(self, prompt: Prompt, completion: Completion) -> bool:
        if self._tokenizer is None:
            raise RuntimeError("NumberPathReward.setup(tokenizer) must be called first")
        answer = prompt.answer
        task = NumberPath(answer["size"], answer["moves"])
        tokens = self._tokenizer.convert_ids_to_tokens(list(completion.token_ids))
        return task.verify(tokens, answer["start"], answer["target"])
