"""A policy in memory: a transformers model object, alone or with its tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, PreTrainedModel, PreTrainedTokenizerBase

from ibro_lightning.errors import ConfigError
from ibro_lightning.models.loading import PolicyOptions, PolicySource, quiet_transformers
from ibro_lightning.models.pretrained import PretrainedPolicy
from ibro_lightning.models.ties import is_tied, set_tied

PAIR = "write (model, tokenizer)"


class ModelPolicy(PolicySource):
    """A transformers model, e.g. of ``AutoModelForCausalLM.from_pretrained``. It is copied when training begins, in the
    options' dtype, and stays unchanged: the reference policy and a resumed run start from it.

    Args:
        model: a causal language model with its weights in memory, without adapters and not quantized.
        tokenizer: None takes the one of the folder or hub name that the model was loaded from.
        options: whether to trust remote code, for that tokenizer.
        setting: name for errors. A ``model.critic`` may be a token classifier with one label.

    Raises:
        ConfigError: it is something else, has no tokenizer, or its weights are not those that its config builds.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        options: PolicyOptions | None = None,
        setting: str = "policy",
    ) -> None:
        self.setting, self._model, self._tokenizer = setting, model, tokenizer
        self._options = options or PolicyOptions()
        self.trusts_code = self._options.trust_remote_code
        if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ConfigError(setting, str(self), f"a {type(tokenizer).__name__} is not a tokenizer: {PAIR}")
        self._check()
        self._config = copy.deepcopy(model.config)
        if self._is_language_model:
            set_tied(self._config, is_tied(model))
        self._check_weights()

    def __str__(self) -> str:
        return type(self._model).__name__

    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            if not (name := getattr(self._model, "name_or_path", "")):
                raise ConfigError(self.setting, str(self), f"its tokenizer is unknown: {PAIR}")
            try:
                self._tokenizer = PretrainedPolicy(name, self._options, self.setting).tokenizer()
            except ConfigError as error:
                raise ConfigError(self.setting, str(self), f"no tokenizer is found at {name}: {PAIR}") from error
        return self._tokenizer

    def config(self) -> Any:
        return self._config

    def build(self, options: PolicyOptions) -> Any:
        model = copy.deepcopy(self._model).to("cpu")
        dtype = getattr(torch, options.dtype)
        for parameter in model.parameters():  # buffers keep their dtype: rotary tables are float32 in any model
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
        if options.attn_implementation is not None:
            model.set_attn_implementation(options.attn_implementation)
        return model.eval()

    def build_critic(self, options: PolicyOptions) -> Any:
        return super().build_critic(options) if self._is_language_model else self.build(options)

    def _generation_eos(self) -> list[int]:
        eos = getattr(getattr(self._model, "generation_config", None), "eos_token_id", None)
        return [eos] if isinstance(eos, int) else list(eos or [])

    @property
    def _is_language_model(self) -> bool:
        return self._model.get_output_embeddings() is not None

    def _check(self) -> None:
        value = str(self)
        model: Any = self._model
        classes = _classes(AutoModelForCausalLM, model.config)
        if not classes and model.is_remote_code() and model.can_generate():
            classes = (type(model),)
        if self.setting == "critic" and model.config.num_labels == 1:
            classes += _classes(AutoModelForTokenClassification, model.config)
        if not issubclass(type(model), classes):
            remedy = "not a causal language model of transformers: write AutoModelForCausalLM.from_pretrained(...)"
            raise ConfigError(self.setting, value, remedy)
        if any(".lora_" in name or ".base_layer." in name for name, _ in model.named_parameters()):
            remedy = "it has adapters: merge them first (peft's merge_and_unload)"
            raise ConfigError(self.setting, value, f"{remedy}; new ones are model.policy_options.lora")
        if getattr(model, "hf_quantizer", None) is not None or not all(
            p.is_floating_point() for p in model.parameters()
        ):
            raise ConfigError(self.setting, value, "it is quantized, and cannot be trained: load it unquantized")
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ConfigError(self.setting, value, "its weights are not all in memory: load it without device_map")

    def _check_weights(self) -> None:
        """Refuse weights that the config does not build: engines, exports and resumed runs fill it by name."""
        auto_class: Any = AutoModelForCausalLM if self._is_language_model else AutoModelForTokenClassification
        config = copy.deepcopy(self._config)
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"), quiet_transformers():
                if type(config) in auto_class._model_mapping:
                    built = auto_class.from_config(config)
                else:  # code that came with the model
                    built = type(self._model)(config)
        except Exception as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ConfigError(self.setting, str(self), f"its config builds no such model: {why}") from error
        if difference := _difference(_shapes(self._model), _shapes(built)):
            raise ConfigError(
                self.setting,
                str(self),
                f"its weights are not what its config builds: {difference}; what is changed must be so in its config, "
                "from which engines build it",
            )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _difference(own: Mapping[str, tuple[int, ...]], built: Mapping[str, tuple[int, ...]]) -> str:
    """The weights that a model has in addition, lacks, or has in other shapes, in words; "" if there are none."""
    reshaped = {name: shape for name, shape in own.items() if name in built and shape != built[name]}
    parts = []
    if more := [name for name in own if name not in built]:
        parts.append(f"it has {_first(more)} more")
    if less := [name for name in built if name not in own]:
        parts.append(f"it lacks {_first(less)}")
    if reshaped:
        name, shape = next(iter(reshaped.items()))
        parts.append(f"{_first(list(reshaped))} in another shape ({list(shape)}, not {list(built[name])})")
    return ", ".join(parts)


def _first(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} others" if len(names) > 1 else "")


def _classes(auto_class: Any, config: Any) -> tuple[type, ...]:
    """The classes that ``auto_class`` builds from ``config``."""
    if type(config) not in auto_class._model_mapping:
        return ()
    classes = auto_class._model_mapping[type(config)]
    return classes if isinstance(classes, tuple) else (classes,)
