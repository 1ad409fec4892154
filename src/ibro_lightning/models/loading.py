"""Base of all sources of a policy: tokenizer, config, weights, and a critic with the same backbone."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForTokenClassification
from transformers.utils import logging as transformers_logging

from ibro_lightning.errors import ConfigError, check_instance
from ibro_lightning.models.lora import LoRAOptions
from ibro_lightning.models.spec import check_dtype
from ibro_lightning.models.stored import pickled
from ibro_lightning.types import Dtype


@dataclass(frozen=True)
class PolicyOptions:
    """How a policy is loaded.

    Args:
        dtype: of the trained weights. Keep float32 for small learning rates (a step of 1e-6 is lost in the rounding of
            bfloat16 weights) and compute in bfloat16 with trainer.precision: bf16-mixed.
        attn_implementation: transformers' name (sdpa, eager, flash_attention_2, …); None lets transformers choose.
        gradient_checkpointing: recompute activations in the backward pass; slower, much less memory.
        trust_remote_code: run Python code that comes with the model. Only for sources that you trust.
        revision: branch, tag or commit on the hub.
        packing: run each micro-batch as one row without padding; worth it on GPUs with flash_attention_2. Training
            stops at once if this attention lets packed sequences see each other.
        share_prompts: run micro-batches without padding, and a prompt once for all its responses in a micro-batch,
            which changes rounding alone. Tried before training; where it is not exact, and with packing, each response
            runs with a prompt of its own. False is for comparisons.
        fused_head: never hold all logits at once (models whose head is a plain linear layer); False is for comparisons.
        lora: train low-rank adapters in place of the weights, for policies whose gradients and optimizer states do not
            fit. Engines and exports get merged weights. Needs ``pip install 'ibro-lightning[lora]'``.
    """

    dtype: Dtype = "float32"
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    revision: str = "main"
    packing: bool = False
    share_prompts: bool = True
    fused_head: bool = True
    lora: LoRAOptions | None = None

    def __post_init__(self) -> None:
        check_dtype("dtype", self.dtype)
        check_instance("lora", self.lora, LoRAOptions, optional=True)


class PolicySource(ABC):
    """Provides tokenizer and config at once, and the weights on demand."""

    trusts_code = False
    """Whether Python code that comes with the model may run."""

    @abstractmethod
    def tokenizer(self) -> Any: ...

    @abstractmethod
    def config(self) -> Any: ...

    @abstractmethod
    def build(self, options: PolicyOptions) -> Any:
        """The ``PreTrainedModel``, on the CPU."""

    def build_critic(self, options: PolicyOptions) -> Any:
        """The same backbone, weights included, with a scalar head of zeros, so that all values start at 0."""
        config = copy.deepcopy(self.config())
        config.num_labels = 1
        with torch.random.fork_rng(devices=[]):  # the random weights are replaced at once
            critic = load_critic(
                self,
                AutoModelForTokenClassification.from_config,
                config,
                dtype=getattr(torch, options.dtype),
                attn_implementation=options.attn_implementation,
            )
        critic.base_model.load_state_dict(self.build(options).base_model.state_dict())
        return zero_head(critic, self)

    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a response: the tokenizer's EOS first, then those of the model's generation config."""
        tokenizer = self.tokenizer()
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "policy",
                str(self),
                "its tokenizer has no EOS token, so no response could ever end: set eos_token in tokenizer_config.json",
            )
        vocabulary = self.config().get_text_config().vocab_size
        if tokenizer.eos_token_id >= vocabulary:
            raise ConfigError(
                "policy",
                str(self),
                f"its EOS token {tokenizer.eos_token!r} has the id {tokenizer.eos_token_id}, but the model has "
                f"{vocabulary} tokens: set eos_token in tokenizer_config.json to a token that it was trained with",
            )
        more = [token for token in self._generation_eos() if token < vocabulary]  # others are never generated
        return tuple(dict.fromkeys([tokenizer.eos_token_id, *more]))

    def side_files(self) -> dict[str, Path]:
        """Files besides its weights, by their names in an exported folder: tokenizer, chat templates, processors."""
        return {}

    def _generation_eos(self) -> list[int]:
        return []


def zero_head(critic: Any, source: PolicySource, missing: Iterable[str] | None = None) -> Any:
    """Set the head of ``critic``, or those of its parameters that are ``missing`` from its folder, to 0."""
    in_backbone = {id(parameter) for parameter in critic.base_model.parameters()}
    for name, parameter in critic.named_parameters():
        if missing is not None and name not in missing:
            continue
        if id(parameter) not in in_backbone:
            torch.nn.init.zeros_(parameter)
        elif missing is not None:
            raise ConfigError("critic", str(source), f"its weights are not complete: {name} is missing")
    return critic


def load_critic(source: PolicySource, load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        with quiet_transformers():  # that a language model's folder has no scalar head is expected
            return load(*args, **kwargs)
    except (ConfigError, MemoryError):
        raise
    except Exception as error:
        if (remedy := pickled(str(source), error)) is not None:
            raise ConfigError("critic", str(source), remedy) from error
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ConfigError("critic", str(source), f"no critic can be made of it: {reason}") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within, transformers logs only errors."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def check_same_vocabulary(policy: PolicySource, other: PolicySource, setting: str) -> None:
    """Raise :class:`ConfigError` unless both models have the same number of tokens."""
    ours, theirs = (source.config().get_text_config().vocab_size for source in (policy, other))
    if ours != theirs:
        raise ConfigError(
            setting,
            str(other),
            f"it has {theirs} tokens and the policy {ours}: name a model with the policy's tokenizer",
        )
