"""Which prompts a rollout asks: the next ones in the order, or those of them that a curriculum admits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ibro_lightning.errors import ConfigError
from ibro_lightning.seeding import derive_seed
from ibro_lightning.sources.curriculum import Curriculum
from ibro_lightning.sources.pass_rates import Outcome, PassRates
from ibro_lightning.sources.prompts import PromptCursor
from ibro_lightning.types import Prompt


class Draws:
    """The prompts of one rollout: the next ones in the order.

    Args:
        cursor: stands where the rollout begins.
    """

    def __init__(self, cursor: PromptCursor) -> None:
        self.cursor = cursor

    def draw(self, count: int) -> list[tuple[int, Prompt]]:
        """So many further prompts, with their positions in the order."""
        return self.cursor.draw(count)

    def metrics(self) -> dict[str, float]:
        return {}

    def seen_after(self, outcomes: Mapping[int, Outcome]) -> PassRates | None:
        """What the next rollout knows of the prompts; None: nothing, as nothing asks for it.

        Args:
            outcomes: of all groups of the rollout, by position.
        """
        return None


class AdmittedDraws(Draws):
    """Those of the next prompts that a curriculum admits. Once it has refused twice as many in a row as there are
    prompts, so that hardly any is admitted at all, the rest of the draw are the next ones as they come.

    Args:
        curriculum: decides by what has been seen up to the rollout before.
        seen: that; None, or of other prompts than the cursor's: nothing.
        seed: the run's.
    """

    def __init__(self, curriculum: Curriculum, cursor: PromptCursor, seen: PassRates | None, seed: int) -> None:
        super().__init__(cursor)
        if seen is None or seen.prompts != cursor.digest:
            seen = PassRates.unseen(cursor.digest, len(cursor.prompts))
        self.curriculum, self.seen, self.seed = curriculum, seen, seed
        self._chances = _checked(curriculum, curriculum.admission(seen), len(cursor.prompts))
        self._drawn: dict[int, int] = {}
        self._turns = self._forced = 0

    def draw(self, count: int) -> list[tuple[int, Prompt]]:
        draws: list[tuple[int, Prompt]] = []
        refused, patience = 0, 2 * len(self._chances)
        while len(draws) < count:
            ((position, prompt),) = self.cursor.draw(1)
            number, forced = self.cursor.numbers[prompt.id], refused >= patience
            self._turns += 1
            if forced or self._admits(position, number):
                draws.append((position, prompt))
                self._drawn[position] = number
                self._forced += forced
                refused = refused if forced else 0
            else:
                refused += 1
        return draws

    def metrics(self) -> dict[str, float]:
        """The pools as the rollout found them, and what it took from each."""
        asked = torch.tensor(list(self._drawn.values()))
        metrics = {"admitted": len(asked) / self._turns, "forced": self._forced / len(asked)}
        for name, pool in self.curriculum.pools(self.seen).items():
            metrics |= {f"{name}_prompts": int(pool.sum()), f"{name}_share": int(pool[asked].sum()) / len(asked)}
            if (known := pool & (self.seen.attempts > 0)).any():
                metrics[f"{name}_pass_rate"] = self.seen.rates[known].mean().item()
        return {f"curriculum/{name}": float(value) for name, value in metrics.items()}

    def seen_after(self, outcomes: Mapping[int, Outcome]) -> PassRates:
        by_prompt: dict[int, list[Outcome]] = {}
        for position in sorted(outcomes):  # whichever rank answered: a prompt may come twice in a rollout
            if outcomes[position][1]:
                by_prompt.setdefault(self._drawn[position], []).append(outcomes[position])
        return self.seen.told(by_prompt, self.curriculum.memory)

    def _admits(self, position: int, number: int) -> bool:
        return derive_seed(self.seed, "admission", position) / 2**63 < self._chances[number]


def draws_of(curriculum: Curriculum | None, cursor: PromptCursor, seen: PassRates | None, seed: int) -> Draws:
    """The draws of a rollout that begins where ``cursor`` stands, with or without a curriculum."""
    return Draws(cursor) if curriculum is None else AdmittedDraws(curriculum, cursor, seen, seed)


def _checked(curriculum: Curriculum, chances: Tensor, count: int) -> list[float]:
    """The probabilities as numbers; raises :class:`ConfigError` for what cannot be one per prompt."""
    remedy = f"its admission must return a probability for each prompt, a tensor of {count} numbers from 0 to 1"
    name = type(curriculum).__name__
    if not isinstance(chances, Tensor) or chances.shape != (count,):
        got = list(chances.shape) if isinstance(chances, Tensor) else type(chances).__name__
        raise ConfigError("source", f"{name}, {got}", remedy)
    numbers: list[float] = chances.double().tolist()
    if wrong := [number for number in numbers if not 0 <= number <= 1]:
        raise ConfigError("source", f"{name}, {wrong[0]}", remedy)
    return numbers
