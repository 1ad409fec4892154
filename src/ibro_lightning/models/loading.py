"""Where a policy comes from: a Hugging Face folder or hub name, or random initialisation."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.utils import logging as transformers_logging

from ibro_lightning.errors import ConfigError
from ibro_lightning.models.lora import LoRAOptions
from ibro_lightning.models.weights import WeightFiles
from ibro_lightning.types import Dtype


@dataclass(frozen=True)
class PolicyOptions:
    """How a policy folder is loaded.

    Args:
        dtype: of the trained weights. Keep float32 for small learning rates (a step of 1e-6 is lost in the rounding of
            bfloat16 weights) and compute in bfloat16 with trainer.precision: bf16-mixed.
        attn_implementation: transformers' name (sdpa, eager, flash_attention_2, …); None lets transformers choose.
        gradient_checkpointing: recompute activations in the backward pass; slower, much less memory.
        trust_remote_code: run Python code that comes with the model. Only for sources that you trust.
        revision: branch, tag or commit on the hub.
        packing: run each micro-batch as one row without padding; worth it on GPUs with flash_attention_2. Training
            stops at once if this attention lets packed sequences see each other.
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
    fused_head: bool = True
    lora: LoRAOptions | None = None


class PolicySource(ABC):
    """Gives tokenizer and config at once, and the weights when they are wanted."""

    @abstractmethod
    def tokenizer(self) -> Any: ...

    @abstractmethod
    def config(self) -> Any: ...

    @abstractmethod
    def build(self, options: PolicyOptions) -> Any:
        """The ``PreTrainedModel``, on CPU."""

    def build_critic(self, options: PolicyOptions) -> Any:
        """The same backbone, weights included, with a scalar head that starts at 0: so do all values."""
        config = copy.deepcopy(self.config())
        config.num_labels = 1
        with torch.random.fork_rng(devices=[]):  # the random weights are replaced at once
            critic = _load_critic(
                self,
                AutoModelForTokenClassification.from_config,
                config,
                dtype=getattr(torch, options.dtype),
                attn_implementation=options.attn_implementation,
            )
        critic.base_model.load_state_dict(self.build(options).base_model.state_dict())
        return _zero_head(critic, self)

    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a response: the tokenizer's EOS first, then what the model's generation config adds."""
        tokenizer = self.tokenizer()
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "model.policy",
                str(self),
                "its tokenizer has no EOS token, so no response could ever end: set eos_token in tokenizer_config.json",
            )
        eos = tuple(dict.fromkeys([tokenizer.eos_token_id, *self._generation_eos()]))
        vocabulary = self.config().get_text_config().vocab_size
        if max(eos) >= vocabulary:
            raise ConfigError(
                "model.policy",
                str(self),
                f"its EOS token {tokenizer.eos_token!r} has the id {max(eos)}, but the model has {vocabulary} tokens: "
                "set eos_token in tokenizer_config.json to a token that it was trained with",
            )
        return eos

    def _generation_eos(self) -> list[int]:
        return []


class PretrainedPolicy(PolicySource):
    """A Hugging Face folder or hub name. What ``policy: NAME`` in a recipe means; errors name the ``setting``."""

    def __init__(self, path: str, options: PolicyOptions | None = None, setting: str = "model.policy") -> None:
        self.setting = setting
        self.path = str(Path(path).expanduser()) if path.startswith("~") else path
        options = options or PolicyOptions()
        self._hub = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
        folder = Path(self.path)
        looks_like_path = folder.is_absolute() or self.path.startswith(".") or self.path.count("/") != 1
        if folder.exists():
            if not (folder / "config.json").is_file():
                raise ConfigError(
                    self.setting, path, "this folder holds no config.json: name a Hugging Face model folder"
                )
        elif looks_like_path or folder.parent.is_dir():
            raise ConfigError(self.setting, path, f"no such folder: name a Hugging Face model folder{_hint(self.path)}")
        self._tokenizer: Any = None
        self._config: Any = None

    def __str__(self) -> str:
        return self.path

    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = self._load(AutoTokenizer)
        return self._tokenizer

    def config(self) -> Any:
        if self._config is None:
            self._config = self._load(AutoConfig)
        return self._config

    def build(self, options: PolicyOptions) -> Any:
        return self._load(
            AutoModelForCausalLM,
            dtype=getattr(torch, options.dtype),
            attn_implementation=options.attn_implementation,
        )

    def build_critic(self, options: PolicyOptions) -> Any:
        """A critic's folder as it is; from a language model's folder, the backbone with a head that starts at 0."""
        self.config()  # a folder that cannot be read says so itself
        critic, report = _load_critic(
            self,
            AutoModelForTokenClassification.from_pretrained,
            self.path,
            **self._hub,
            num_labels=1,
            dtype=getattr(torch, options.dtype),
            attn_implementation=options.attn_implementation,
            output_loading_info=True,
        )
        return _zero_head(critic, self, report["missing_keys"])

    def weight_files(self) -> WeightFiles | None:
        """Its safetensors files, downloaded if it is on the hub; None if its weights are in another format."""
        return self._refuse("weights", lambda: WeightFiles.find(self.path, str(self._hub["revision"])))

    def empty(self, auto_class: Any, config: Any, options: PolicyOptions) -> Any:
        """A model as ``auto_class`` would load it from here, but for its parameters' values."""

        def make() -> Any:
            model = auto_class.from_config(
                config,
                trust_remote_code=self._hub["trust_remote_code"],
                dtype=getattr(torch, options.dtype),
                attn_implementation=options.attn_implementation,
            )
            if model.can_generate():
                with suppress(OSError):  # as in from_pretrained, which also goes on without it
                    model.generation_config = GenerationConfig.from_pretrained(
                        self.path, revision=self._hub["revision"]
                    )
            return model.eval()

        return self._refuse(auto_class.__name__[4:], make)

    def _load(self, auto_class: Any, **kwargs: Any) -> Any:
        return self._refuse(
            auto_class.__name__[4:], lambda: auto_class.from_pretrained(self.path, **self._hub, **kwargs)
        )

    def _refuse(self, what: str, load: Callable[[], Any]) -> Any:
        """``load()``, with a :class:`ConfigError` if it cannot."""
        try:
            return load()
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(self.setting, self.path, f"cannot load its {what}: {reason}{_hint(self.path)}") from error

    def _generation_eos(self) -> list[int]:
        try:
            eos = GenerationConfig.from_pretrained(self.path, revision=self._hub["revision"]).eos_token_id
        except OSError:
            eos = self.config().eos_token_id
        return [eos] if isinstance(eos, int) else list(eos or [])


def _zero_head(critic: Any, source: PolicySource, missing: Iterable[str] | None = None) -> Any:
    """``critic`` with its head, or those parameters of it that are ``missing`` from its folder, set to 0."""
    in_backbone = {id(parameter) for parameter in critic.base_model.parameters()}
    for name, parameter in critic.named_parameters():
        if missing is not None and name not in missing:
            continue
        if id(parameter) not in in_backbone:
            torch.nn.init.zeros_(parameter)
        elif missing is not None:
            raise ConfigError("model.critic", str(source), f"its weights are not complete: {name} is missing")
    return critic


def _load_critic(source: PolicySource, load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # a language model's folder has no scalar head, which is no news
    try:
        return load(*args, **kwargs)
    except (ValueError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError("model.critic", str(source), f"no critic can be made of it: {reason}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def as_source(policy: str | PolicySource, options: PolicyOptions, setting: str = "model.policy") -> PolicySource:
    """``policy`` as it stands in a recipe, under ``setting`` → its source."""
    return PretrainedPolicy(policy, options, setting) if isinstance(policy, str) else policy


def check_same_vocabulary(policy: PolicySource, other: PolicySource, setting: str) -> None:
    """Raise :class:`ConfigError` unless both models have equally many tokens."""
    ours, theirs = (source.config().get_text_config().vocab_size for source in (policy, other))
    if ours != theirs:
        raise ConfigError(
            setting,
            str(other),
            f"it has {theirs} tokens and the policy {ours}: name a model with the policy's tokenizer",
        )


def _hint(path: str) -> str:
    if "sft_quickstart" not in path:
        return ""
    return "; the quick start's base policy is made by: python -m ibro_lightning fit --config sft_quickstart.yaml"
