"""Builds policies and critics from their sources, on a single device or sharded."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from ibro_lightning.errors import ConfigError
from ibro_lightning.guards.finite import why_not_finite
from ibro_lightning.models.complete import check_complete
from ibro_lightning.models.critic import Critic
from ibro_lightning.models.loading import PolicyOptions, PolicySource
from ibro_lightning.models.lora import BASE, add_adapters, initial_adapter, is_adapter
from ibro_lightning.models.policy import Policy
from ibro_lightning.models.pretrained import PretrainedPolicy
from ibro_lightning.models.sharding import Sharding, materialize, named_parameters, shard
from ibro_lightning.models.tensor_parallel import SETTING as TENSOR_PARALLEL
from ibro_lightning.models.weight_files import RankZero, WeightFiles, WeightSource, local_part, raise_on_all_ranks


def build_policy(
    source: PolicySource, options: PolicyOptions, sharding: Sharding | None = None, *, frozen: bool = False
) -> Policy:
    """Build the policy of ``source``, with adapters if the options ask for them.

    Without ``sharding``, on the CPU. With it, each rank holds its part of every weight on its device, and never more
    than a few whole tensors; the weights are those of a single process, bit for bit. All ranks must call it.

    Args:
        frozen: for a reference policy: no gradients, no adapters, no gradient checkpointing.

    Raises:
        ConfigError: the weights cannot be loaded, or the model does not support this sharding or these adapters.
    """
    if options.lora is not None and not frozen and sharding is not None and sharding.tensor_parallel_size > 1:
        size = sharding.tensor_parallel_size
        raise ConfigError(TENSOR_PARALLEL, size, "adapters (policy_options.lora) cannot be cut like this: write 1")
    if sharding is None:
        model, weights = source.build(options), None
    else:
        model, weights = _empty_and_weights(source, options, sharding, critic=False)
    policy = wrap_policy(model, options, frozen=frozen, empty=weights is not None)
    if sharding is not None and weights is not None:
        _shard_and_fill(policy, sharding, weights, options)
    _check_finite(policy.model, "policy", source, sharding)
    return policy


def wrap_policy(model: Any, options: PolicyOptions, *, frozen: bool = False, empty: bool = False) -> Policy:
    """The policy of a transformers model, with the adapters that the options ask for unless it is frozen.

    Args:
        empty: the model is on the meta device, and so are its adapters.
    """
    if options.lora is not None and not frozen:
        add_adapters(model, options.lora, empty=empty)
    policy = Policy(
        model,
        gradient_checkpointing=options.gradient_checkpointing and not frozen,
        fused_head=options.fused_head,
        packing=options.packing,
        share_prompts=options.share_prompts,
    )
    return policy.requires_grad_(False) if frozen else policy


def build_critic(source: PolicySource, options: PolicyOptions, sharding: Sharding | None = None) -> Critic:
    """Build the critic of ``source``; see :func:`build_policy`. A critic has no adapters."""
    if sharding is None:
        model, weights = source.build_critic(options), None
    else:
        model, weights = _empty_and_weights(source, options, sharding, critic=True)
    critic = wrap_critic(model, options)
    if sharding is not None and weights is not None:
        _shard_and_fill(critic, sharding, weights, options)
    _check_finite(critic.model, "critic", source, sharding)
    return critic


def wrap_critic(model: Any, options: PolicyOptions) -> Critic:
    """The critic of a transformers model."""
    return Critic(
        model,
        gradient_checkpointing=options.gradient_checkpointing,
        packing=options.packing,
        share_prompts=options.share_prompts,
    )


def _check_finite(model: nn.Module, setting: str, source: PolicySource, sharding: Sharding | None) -> None:
    """Refuse weights that are not finite, on all ranks if any rank finds some in its part."""

    def check() -> None:
        if reason := why_not_finite(dict(model.named_parameters())):
            raise ConfigError(setting, str(source), f"{reason}: name a model whose weights are all numbers")

    check() if sharding is None else raise_on_all_ranks(check)


def _shard_and_fill(network: Any, sharding: Sharding, weights: WeightSource, options: PolicyOptions) -> None:
    buffers = weights.buffers(network.model)
    shard(network, sharding)
    materialize(network, sharding.parameter_device)
    model = network.model
    with torch.no_grad():
        for name, canonical, parameter in named_parameters(model):
            if name != canonical:
                continue
            if is_adapter(name):
                assert options.lora is not None
                start = initial_adapter(name, parameter, options.lora)
                parameter.to_local().copy_(local_part(parameter, start))  # type: ignore[attr-defined]  # a DTensor
            else:
                weights.fill(name.replace(BASE, "."), parameter)
    for name, value in buffers.items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = value.to(sharding.device)
    network.device = sharding.device


def empty_model(source: PolicySource, options: PolicyOptions, *, critic: bool = False) -> Any:
    """The model of ``source``, or a critic with its backbone, on the meta device and from its config alone."""
    auto_class: Any = AutoModelForTokenClassification if critic else AutoModelForCausalLM
    config = copy.deepcopy(source.config())
    if critic:
        config.num_labels = 1
    with parameters_on_meta():
        if isinstance(source, PretrainedPolicy):
            return source.empty(auto_class, config, options)
        dtype = getattr(torch, options.dtype)
        return auto_class.from_config(config, dtype=dtype, attn_implementation=options.attn_implementation)


def _empty_and_weights(
    source: PolicySource, options: PolicyOptions, sharding: Sharding, *, critic: bool
) -> tuple[Any, WeightSource]:
    """A model with parameters on the meta device, and the source of their values.

    That is the files if they hold the parameters one by one; otherwise (other formats or names, random weights, a
    custom source) rank 0 builds the model as a single process would.
    """
    ours = (PretrainedPolicy.build, PretrainedPolicy.build_critic)  # subclasses may not build from their files
    if isinstance(source, PretrainedPolicy) and (type(source).build, type(source).build_critic) == ours:
        model, files = raise_on_all_ranks(lambda: _from_files(source, options, critic))
        fits = torch.tensor(int(files is not None), device=sharding.device)
        distributed.all_reduce(fits, distributed.ReduceOp.MIN)
        if files is not None and bool(fits):
            return model, files
    build = source.build_critic if critic else source.build
    built = raise_on_all_ranks(lambda: build(options) if distributed.get_rank() == 0 else None)
    model = _copy_of(built, options)
    return model, RankZero(built, sharding.device)


def _from_files(source: PretrainedPolicy, options: PolicyOptions, critic: bool) -> tuple[Any, WeightFiles | None]:
    files = source.weight_files()
    if files is None:
        return None, None
    model = empty_model(source, options, critic=critic)
    if source.quantization is not None:
        return None, None
    absent: frozenset[str] = frozenset()
    if critic:
        inside = {id(parameter) for parameter in model.base_model.parameters()}
        head = {name for name, parameter in model.named_parameters() if id(parameter) not in inside}
        absent = frozenset(head - files.files.keys())
    if not files.fits(model, absent):
        return None, None
    if not critic:
        surplus = files.files.keys() - model.state_dict().keys()
        check_complete(model, (), surplus, setting=source.setting, source=source.path)
    return model, WeightFiles(files.files, absent)


def _copy_of(built: Any, options: PolicyOptions) -> Any:
    """An empty model with the class, parameters, dtypes and ties of rank 0's ``built``, on every rank."""
    description: list[Any] = [None]
    if built is not None:
        tensors = {name: (first, tensor.shape, tensor.dtype) for name, first, tensor in named_parameters(built)}
        buffers = {name: (buffer.shape, buffer.dtype) for name, buffer in built.named_buffers()}
        description = [(type(built), built.config, getattr(built, "generation_config", None), tensors, buffers)]
    distributed.broadcast_object_list(description, src=0)
    model_class, config, generation, tensors, buffers = description[0]
    with parameters_on_meta():
        model = model_class._from_config(
            copy.deepcopy(config), dtype=getattr(torch, options.dtype), attn_implementation=config._attn_implementation
        )
    shared: dict[str, nn.Parameter] = {}
    for name, (first, shape, dtype) in tensors.items():
        if first not in shared:
            shared[first] = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = shared[first]
    for name, (shape, dtype) in buffers.items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = torch.empty(shape, dtype=dtype)
    if generation is not None:
        model.generation_config = generation
    return model.eval()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules created within have parameters on the meta device, and buffers as usual."""

    def to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter) -> nn.Parameter:
        return parameter if parameter.is_meta else nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]  # it may return one
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        handle.remove()
