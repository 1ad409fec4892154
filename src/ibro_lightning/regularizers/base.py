"""The interface of entropy methods: a term of the loss, and hooks for the advantages and the policy loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar

import torch
from torch import Tensor

from ibro_lightning.batches.experience import Experience, MicroBatch, TokenStats
from ibro_lightning.errors import ConfigError
from ibro_lightning.functional import HeadFunctional
from ibro_lightning.ranks import ALONE, Ranks
from ibro_lightning.regularizers.coefficients import Coefficient, TrackedNumber, as_coefficient
from ibro_lightning.regularizers.method import Method


def _no_scorer(*_: Any, **__: Any) -> dict[str, Tensor]:
    raise NotImplementedError("this context comes from no Scorer: give StepContext a function tell")


@dataclass(frozen=True)
class StepContext:
    """What a loss and its regulariser can use in an optimizer step, besides the step itself."""

    policy: Callable[..., tuple[Any, ...]]
    """``policy(sequences, temperature=…, with_entropy=True)`` → ``(logp, entropy)`` ``[B, T]`` with gradients, for a
    padded batch; with ``functionals={…}`` also a dictionary of what they give."""
    score: Callable[..., tuple[Tensor, Tensor]]
    """``score(sequences, temperature)`` → ``(logp, entropy)`` ``[N]`` without gradients, for any number of sequences
    without padding."""
    tokenizer: Any = None
    seed: int = 0
    """For draws in :meth:`EntropyRegularizer.prepare`: a function of the run, the iteration and the step."""
    max_length: int | None = None
    """The policy's number of positions; None: not in its configuration."""
    ranks: Ranks = ALONE
    """Sums and means over the tokens of all ranks that share the step."""
    tell: Callable[..., dict[str, Tensor]] = _no_scorer
    """``tell(sequences, temperature, functionals)`` → ``{name: [N]}``: what these functionals give under the present
    policy, without gradients, for any number of sequences without padding."""
    micro: MicroBatch | None = None
    """The micro-batch over which the policy is about to run, in :meth:`EntropyRegularizer.functionals`."""


HARMLESS = ("prepare", "functionals", "statistics", "measure", "coefficients")
"""Methods of a regulariser that move no policy by themselves."""


class EntropyRegularizer(ABC):
    """Adds ``−coef · agg(objective)`` to the policy loss; ``agg`` is the loss's own aggregation over the whole step.

    A new regulariser is one class with one method, in any importable file::

        class HighEntropyBonus(EntropyRegularizer):
            def objective(self, stats):
                return stats.entropy * (stats.old_entropy > 0.5)

    Five further hooks do nothing unless overridden. In the order in which a step calls them: :meth:`prepare` (once per
    optimizer step), then for every micro-batch :meth:`functionals`, :meth:`statistics`, :meth:`shape_policy_loss`,
    :meth:`objective`, :meth:`measure`.

    Args:
        coef: α ≥ 0, or a :class:`~ibro_lightning.regularizers.coefficients.Coefficient` that moves it during training.
            While it is 0, the term is not computed.
    """

    method: ClassVar[Method | None] = None
    """What the table of ``docs/methods.md`` says of the class; the package's own have one each."""
    needs_entropy: bool = True
    """Whether :meth:`objective` reads ``stats.entropy``; otherwise entropies have no gradient."""
    shaping_needs_entropy: bool = False
    """Whether :meth:`shape_policy_loss` reads ``stats.entropy``, whatever α is."""
    shaping_needs_extra: bool = False
    """Whether :meth:`shape_policy_loss` reads what :meth:`functionals` or :meth:`statistics` give: they are computed
    whatever α is, then."""
    prepare_needs_scores: bool = False
    """Whether :meth:`prepare` reads ``step.old_logp`` or ``step.old_entropy``. Otherwise they may be None
    there: a rollout's first optimizer step takes them from its own forward pass."""
    zero_without_advantage: bool = False
    """Whether the term, and what :meth:`shape_policy_loss` makes of a loss of 0, are 0 wherever the advantage is,
    whatever α is (:attr:`needs_rows_without_advantage`). Subclasses with methods of their own do not inherit it."""
    reads_old_entropy: bool = True
    """Whether another hook reads ``old_entropy``. Otherwise a module's ``old_logp: sampler`` may leave it None."""
    acts_in_first_step: bool = True
    """Whether it acts in a rollout's first optimizer step, before which the policy has not moved. A method that does
    not is without an effect where a rollout has one step, of which the :class:`.Updater` warns."""
    min_group_size: int = 1
    """The least number of responses to a prompt with which the method acts; the rollout datamodule refuses fewer."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        does_not_inherit(cls, "zero_without_advantage", harmless=HARMLESS)

    def __init__(self, coef: Coefficient | float) -> None:
        self.coefficient = as_coefficient(coef, "coef", "entropy")

    @property
    def coef(self) -> float:
        """The present α."""
        return self.coefficient.value

    @property
    def combined(self) -> tuple[EntropyRegularizer, ...]:
        """The methods that act: this one, and before it in a step, one that it holds."""
        return (self,)

    @property
    def coefficients(self) -> Mapping[str, TrackedNumber]:
        """All numbers of the method that may move, by name: α is ``coef``, and a method with further weights adds them.
        They count the iterations, observe the policy's entropy before every update, are part of the checkpoint, and are
        the curves ``regularizer/name``."""
        return {"coef": self.coefficient}

    @property
    def needs_rows_without_advantage(self) -> bool:
        """Whether responses whose advantage is 0 may have a gradient, and need a backward pass: through the term, which
        there is only while α is not 0, or through :meth:`shape_policy_loss`."""
        shapes = type(self).shape_policy_loss is not EntropyRegularizer.shape_policy_loss
        return (shapes or bool(self.coef)) and not self.zero_without_advantage

    def prepare(self, step: Experience, context: StepContext) -> Experience:
        """Called without gradients before the step is split into micro-batches: for statistics of the whole step, for
        another advantage, and for ``step.with_extra(name=…)``, whose mean is logged as ``regularizer/name``. The step's
        tensors are ``[N]``: its response tokens, row after row without padding (:class:`.Experience`)."""
        return step

    def functionals(self, context: StepContext) -> Mapping[str, HeadFunctional]:
        """Further numbers of each token's distribution that the policy's head computes in its pass, *with* gradients,
        ``[B, T]`` each, for ``stats.extra``; only if α > 0 or the class sets :attr:`shaping_needs_extra`. What is not
        requested costs nothing. Functionals that hold something per token find the micro-batch in ``context.micro``.
        Their names must differ from those that :meth:`prepare` or the algorithm have in ``extra``."""
        return {}

    def statistics(self, micro: MicroBatch, context: StepContext) -> Mapping[str, Tensor]:
        """Further tensors of a micro-batch, *with* gradients, ``[B, T]`` each, for ``stats.extra``; computed when
        :meth:`functionals` are. One with the name of a prepared tensor replaces it."""
        return {}

    @abstractmethod
    def objective(self, stats: TokenStats) -> Tensor:
        """The per-token quantity to **maximise**, ``[B, T]`` in nats. Values under a False mask are ignored."""

    def shape_policy_loss(self, loss: Tensor, stats: TokenStats) -> Tensor:
        """The policy loss ``[B, T]`` in place of ``loss``. Tokens set to 0 still count in the denominator."""
        return loss

    def measure(self, stats: TokenStats) -> Mapping[str, Tensor]:
        """Further curves ``regularizer/name``: values ``[B, T]`` whose mean over the step's tokens is logged."""
        return {}


def does_not_inherit(cls: type, promise: str, harmless: Sequence[str] = ()) -> None:
    """Set a class's ``promise`` to False if it, or a mixin, has methods that precede those of the class that made the
    promise; but for constructors and ``harmless`` ones."""
    before = takewhile(lambda kind: promise not in vars(kind), cls.__mro__)
    methods = {name for kind in before for name, value in vars(kind).items() if hasattr(value, "__get__")}
    if methods - {"__init__", "__init_subclass__", "__dict__", "__weakref__", *harmless}:
        setattr(cls, promise, False)


class PolicyLossMethod(EntropyRegularizer):
    """A method that works through the advantages or the policy loss, and has no term of its own."""

    needs_entropy = False
    shaping_needs_extra = True

    def __init__(self) -> None:
        if type(self) is PolicyLossMethod:
            raise ConfigError(
                "regularizer", "PolicyLossMethod", "a base class, which does nothing: write NoRegularizer"
            )
        super().__init__(coef=0.0)

    def objective(self, stats: TokenStats) -> Tensor:
        return torch.zeros_like(stats.logp)
