"""Curricula: sources whose prompts are asked more or less often, by how often they have been answered right so far.

Without torch, like all of this package that reward workers import."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ibro_lightning.errors import ConfigError, check_instance, is_number
from ibro_lightning.sources.base import PromptSource
from ibro_lightning.types import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from ibro_lightning.sources.pass_rates import PassRates


class Curriculum(PromptSource):
    """A source around another one, with a gate: when a prompt's turn comes, it is asked or passed over.

    One of your own has one method, a function of what has been seen of the prompts so far::

        class NeverAgainIfRight(Curriculum):
            def admission(self, seen):
                return (seen.rates < 1).double()

    The turns are those of training without a curriculum. What the gate does is a function of the run's seed, of the
    turn, and of the outcomes up to the rollout before: a resumed run goes on exactly, and all ranks agree.

    Args:
        source: the problems; of a mixture, parts with fewer prompts admitted get a smaller share than their weight.
        memory: weight of the past in a prompt's moving pass rate; 0 keeps that of its last group alone.
    """

    def __init__(self, source: PromptSource, memory: float = 0.5) -> None:
        check_instance("source", source, PromptSource)
        if isinstance(source, Curriculum):
            raise ConfigError("source", type(source).__name__, "curricula cannot be nested: write the source in it")
        if not (is_number(memory) and 0 <= memory < 1):
            raise ConfigError("memory", memory, "write a number from 0 up to, not including, 1")
        self.source, self.memory = source, memory
        self.weights = source.weights

    def problems(self) -> Iterable[Problem]:
        return self.source.problems()

    def first_problems(self, count: int) -> Iterable[Problem]:
        return self.source.first_problems(count)

    @abstractmethod
    def admission(self, seen: PassRates) -> Tensor:
        """The probability, from 0 to 1, with which each prompt is asked when its turn comes, ``[P]`` float64. Asked
        once for each rollout; must not change ``seen``."""

    def pools(self, seen: PassRates) -> Mapping[str, Tensor]:
        """Prompts by name, ``[P]`` bool each, whose number, pass rate and share of a rollout become curves."""
        return {}


class DifficultyPools(Curriculum):
    """Asks prompts that are nearly always or hardly ever answered right less often::

        source:
          class_path: DifficultyPools
          init_args:
            source: {class_path: DatasetSource, init_args: {path: BytedTsinghua-SIA/DAPO-Math-17k}}

    A prompt is *unseen* until its first group is judged; then its moving pass rate says whether it is *hard* (up to
    ``low``), *easy* (from ``high``), or *normal*. Unseen and normal prompts are always asked. Easy and hard ones come
    back now and then, and so to the normal pool as the policy changes; where a share is 0, they are gone for good.

    That prompts of medium difficulty teach most is argued in arXiv 2504.03380, and difficulty pools are prime-rl's,
    which has a prompt leave the normal pool for good. The rule here and its constants are ours.

    Args:
        source: the problems.
        low: pass rate up to which a prompt is hard.
        high: pass rate from which it is easy.
        hard_share: share of the turns of hard prompts that are used.
        easy_share: the same of easy ones.
        memory: weight of the past in the moving pass rate; 0 keeps that of the last group alone.
    """

    def __init__(
        self,
        source: PromptSource,
        low: float = 0.1,
        high: float = 0.9,
        hard_share: float = 0.25,
        easy_share: float = 0.1,
        memory: float = 0.5,
    ) -> None:
        super().__init__(source, memory)
        if not (is_number(high) and 0 < high <= 1):
            raise ConfigError("high", high, "write a pass rate: a number above 0 and up to 1")
        if not (is_number(low) and 0 <= low < high):
            raise ConfigError("low", low, f"write a pass rate: a number from 0 up to, not including, high ({high})")
        for name, share in (("hard_share", hard_share), ("easy_share", easy_share)):
            if not (is_number(share) and 0 <= share <= 1):
                raise ConfigError(name, share, "write a number from 0 (none) to 1 (all)")
        self.low, self.high, self.hard_share, self.easy_share = low, high, hard_share, easy_share

    def admission(self, seen: PassRates) -> Tensor:
        pools, always = self.pools(seen), seen.rates.new_ones(len(seen.rates))
        return always.masked_fill(pools["hard"], self.hard_share).masked_fill(pools["easy"], self.easy_share)

    def pools(self, seen: PassRates) -> Mapping[str, Tensor]:
        known = seen.attempts > 0
        hard, easy = known & (seen.rates <= self.low), known & (seen.rates >= self.high)
        return {"unseen": ~known, "hard": hard, "normal": known & ~hard & ~easy, "easy": easy}
