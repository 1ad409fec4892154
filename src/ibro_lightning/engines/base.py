"""The interfaces of rollout engines, and of the LightningModule whose policy they sample from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor

from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.errors import ConfigError
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.types import Dtype, Generation, SamplingParams

Rows = Sequence[Sequence[int]]
"""The token ids of each prompt, or the seeds of its samples."""


class RolloutEngine(Protocol):
    """Generates token ids from the most recently loaded weights.

    An engine that does not support all :class:`SamplingParams` also has a method ``check_sampling(sampling, *,
    setting)``, which raises ConfigError for parameters that it would refuse or change. One that is shared by all ranks
    has ``use_ranks(ranks)``, called before :meth:`setup`. Datamodules call both at start.
    """

    dtype: Dtype
    """Of the engine's copy of the weights."""
    max_model_len: int | None
    """Maximum length of prompt + response in tokens, set by :meth:`setup`; None means no limit."""

    def setup(self, spec: ModelSpec) -> None:
        """Build the model; repeated calls with the same spec do nothing."""

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], *, partial: bool = False) -> None:
        """Replace all weights, or (``partial``) whole layers, head or embedding; raises for missing or unknown ones."""

    def generate(self, prompts: Rows, sampling: SamplingParams, seeds: Rows) -> list[list[Generation]]:
        """``len(seeds[i])`` samples of ``prompts[i]``, in order. Same weights, prompts and seeds → same samples."""

    def offload(self) -> None:
        """Free the accelerator's memory until :meth:`onload` (a no-op on CPU)."""

    def onload(self) -> None:
        """Undo :meth:`offload`."""

    def close(self) -> None:
        """Release all resources. The engine can be set up again."""


def check_length(
    prompts: Rows, sampling: SamplingParams, limit: int | None, setting: str = "sampling", advice: str = ""
) -> None:
    """Raise :class:`ConfigError` if the longest prompt with ``sampling.max_tokens`` more tokens exceeds ``limit``."""
    longest = max(map(len, prompts), default=0)
    if limit is not None and prompts and longest + sampling.max_tokens > limit:
        reason = f"with the longest prompt ({longest} tokens) this exceeds the {limit} positions of engine and model"
        remedy = f"write at most {limit - longest}, {advice}or lower data.prompt_limits.max_tokens"
        raise ConfigError(f"{setting}.max_tokens", sampling.max_tokens, f"{reason}: {remedy}")


class PolicyProvider(Protocol):
    """What the datamodules require of a LightningModule.

    :class:`~ibro_lightning.modules.PolicyProviderMixin` implements it for modules with a policy and a tokenizer.
    """

    tokenizer: Any
    eos_token_ids: tuple[int, ...]
    min_group_size: int
    """Minimum responses per prompt: 2 for group-relative advantages, otherwise 1."""

    learns_off_policy: bool
    """Whether the loss weighs tokens by π_old/π_sampler, so that they may come from the weights before an update
    (``data.max_staleness``). A module without this attribute counts as one that does not."""

    def model_spec(self) -> ModelSpec: ...

    def named_full_weights(self) -> Iterable[tuple[str, Tensor]]:
        """The policy's current weights by Hugging Face name, one at a time, gathered if sharded."""

    @property
    def compute_dtype(self) -> Dtype:
        """The dtype in which the policy computes."""

    def response_logp(self, sequences: Sequences, temperature: float) -> Tensor:
        """``[B, T]`` log-probs in nats of the response tokens under the current policy, without gradients."""
