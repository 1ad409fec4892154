"""A policy in a Hugging Face folder or on the hub."""

from __future__ import annotations

import copy
from collections.abc import Callable
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

from ibro_lightning.errors import ConfigError
from ibro_lightning.models.complete import check_complete
from ibro_lightning.models.folders import check_folder, find_side_files, hint, is_of_tokenizer
from ibro_lightning.models.generation_config import read_generation_config
from ibro_lightning.models.loading import PolicyOptions, PolicySource, load_critic, quiet_transformers, zero_head
from ibro_lightning.models.lora import adapter_layers
from ibro_lightning.models.quantization import forget_quantization, refuse_quantized, take_quantization
from ibro_lightning.models.stored import StoredWeights, names_on_hub, pickled, stored_weights
from ibro_lightning.models.ties import differs_on_disk, has_head_and_embedding, is_tied, says_tied, set_tied
from ibro_lightning.models.weight_files import WeightFiles
from ibro_lightning.ranks import rank_zero_warn


def local_folders(*sources: PolicySource) -> tuple[Path, ...]:
    """The folders of those sources that have one."""
    return tuple(Path(source.path).resolve() for source in sources if isinstance(source, PretrainedPolicy))


class PretrainedPolicy(PolicySource):
    """A Hugging Face folder or hub name: ``policy: NAME`` in a recipe. Errors name the ``setting``."""

    def __init__(self, path: str | Path, options: PolicyOptions | None = None, setting: str = "policy") -> None:
        self.setting = setting
        self.path = str(Path(path).expanduser()) if str(path).startswith("~") else str(path)
        options = options or PolicyOptions()
        self._hub = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
        self.trusts_code = options.trust_remote_code
        check_folder(self.path, setting, is_folder=isinstance(path, Path))
        self._tokenizer: Any = None
        self._config: Any = None
        self.quantization: Any = None
        """The quantization config, if the weights on disk are quantized; set by :meth:`config`."""
        self._generation: tuple[GenerationConfig | None] | None = None

    def __str__(self) -> str:
        return self.path

    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            if Path(self.path).is_dir() and not any(is_of_tokenizer(name) for name in self.side_files()):
                remedy = "this folder holds no tokenizer: copy tokenizer.json and tokenizer_config.json into it"
                raise ConfigError(self.setting, self.path, remedy)  # transformers would create an empty one
            self._tokenizer = self._load(AutoTokenizer)
        return self._tokenizer

    def config(self) -> Any:
        """config.json without quantization, and untied if the weights are: trainer, engine and export follow it."""
        if self._config is None:
            config = self._load(AutoConfig)
            self._refuse("weights", lambda: self._correct_by_weights(config))
            self._config = config
        return self._config

    def build(self, options: PolicyOptions) -> Any:
        config = copy.deepcopy(self.config())
        if self.quantization is not None:
            config.quantization_config = self.quantization
        generation = self.generation_config()
        with quiet_transformers():  # its long table repeats check_complete's message
            model, report = self._load(
                AutoModelForCausalLM,
                config=config,
                dtype=getattr(torch, options.dtype),
                attn_implementation=options.attn_implementation,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **({} if generation is None else {"generation_config": generation}),
            )
        keys = report["missing_keys"], report["unexpected_keys"], report["mismatched_keys"]
        check_complete(model, *keys, setting=self.setting, source=self.path)
        if adapter_layers(model):
            remedy = "it is an adapter: name whole weights, which peft's merge_and_unload makes"
            raise ConfigError(self.setting, self.path, remedy)
        if self.quantization is not None:
            forget_quantization(model, self.quantization, self.setting, self.path)
        if type(model).__module__.startswith("transformers.") and is_tied(model) != says_tied(self.config()):
            remedy = "its head is tied to its embedding in config.json or in the weights, but not in both: correct"
            raise ConfigError(self.setting, self.path, f"{remedy} tie_word_embeddings in config.json")
        return model

    def build_critic(self, options: PolicyOptions) -> Any:
        """A critic's folder as it is; of a language model's folder, the backbone with a head of zeros."""
        config = copy.deepcopy(self.config())  # raises an unreadable folder's own error
        config.num_labels = 1
        if self.quantization is not None:
            refuse_quantized("critic", self.path)
        critic, report = load_critic(
            self,
            AutoModelForTokenClassification.from_pretrained,
            self.path,
            **self._hub,
            config=config,
            dtype=getattr(torch, options.dtype),
            attn_implementation=options.attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        keys = report["unexpected_keys"], report["mismatched_keys"]
        check_complete(critic, (), *keys, setting="critic", source=self.path)
        return zero_head(critic, self, report["missing_keys"])

    def weight_files(self) -> WeightFiles | None:
        """Its safetensors files, downloaded if need be; None if its weights are in another format."""
        return self._refuse("weights", lambda: WeightFiles.find(self.path, str(self._hub["revision"])))

    def generation_config(self) -> GenerationConfig | None:
        """Its generation_config.json, repaired where transformers would refuse it; None if there is none."""
        if self._generation is None:
            generation, repair = read_generation_config(self.path, str(self._hub["revision"]))
            if repair:
                generation = generation or GenerationConfig.from_model_config(self.config())
                rank_zero_warn(f"{self.path}: generation_config.json: {repair}")
            self._generation = (generation,)
        return self._generation[0]

    def side_files(self) -> dict[str, Path]:
        return find_side_files(self.path, str(self._hub["revision"]), code=self.trusts_code)

    def empty(self, auto_class: Any, config: Any, options: PolicyOptions) -> Any:
        """A model as ``auto_class`` would load it from here, without its parameters' values."""

        def make() -> Any:
            model = auto_class.from_config(
                config,
                trust_remote_code=self._hub["trust_remote_code"],
                dtype=getattr(torch, options.dtype),
                attn_implementation=options.attn_implementation,
            )
            if model.can_generate() and (generation := self.generation_config()) is not None:
                model.generation_config = copy.deepcopy(generation)
            return model.eval()

        return self._refuse(auto_class.__name__[4:], make)

    def _correct_by_weights(self, config: Any) -> None:
        """Correct ``config`` where the weights on disk contradict it, reading no more of them than necessary."""
        stored: list[StoredWeights | None] = []

        def look() -> StoredWeights | None:
            if not stored:
                stored.append(stored_weights(self.path, str(self._hub["revision"])))
            return stored[0]

        self.quantization = take_quantization(config, look, self.path)
        if not says_tied(config) or self._is_head_absent_on_hub(config):
            return
        if (weights := look()) is not None and (head := differs_on_disk(config, weights)):
            set_tied(config, False)
            rank_zero_warn(
                f"{self.path}: config.json says tie_word_embeddings: true, but {head} differs from the embedding: "
                "it is loaded, trained and exported untied"
            )

    def _is_head_absent_on_hub(self, config: Any) -> bool:
        """Whether the hub shows, without a download, that no separate head is stored: a dry run needs no weights."""
        if Path(self.path).is_dir():
            return False
        names = names_on_hub(self.path, str(self._hub["revision"]))
        return names is not None and not has_head_and_embedding(config, names)

    def _load(self, auto_class: Any, **kwargs: Any) -> Any:
        return self._refuse(
            auto_class.__name__[4:], lambda: auto_class.from_pretrained(self.path, **self._hub, **kwargs)
        )

    def _refuse(self, what: str, load: Callable[[], Any]) -> Any:
        """``load()``; any error, such as a broken file's, becomes a :class:`ConfigError`."""
        try:
            return load()
        except (ConfigError, MemoryError):
            raise
        except Exception as error:
            if (remedy := pickled(self.path, error)) is not None:
                raise ConfigError(self.setting, self.path, remedy) from error
            reason = " ".join(str(error).split())[:300]
            if not isinstance(error, OSError | ValueError | ImportError | SafetensorError):
                reason = f"{type(error).__name__}: {reason}"
            raise ConfigError(self.setting, self.path, f"cannot load its {what}: {reason}{hint(self.path)}") from error

    def _generation_eos(self) -> list[int]:
        generation = self.generation_config()
        eos = self.config().eos_token_id if generation is None else generation.eos_token_id
        return [eos] if isinstance(eos, int) else list(eos or [])
