"""Checks at start whether the embedded engine generates correctly with a model.

Transformers has many kinds of cache, and not every architecture supports rows of different lengths in a batch, copying
rows and dropping them. Therefore a few responses are generated as in training, and their log-probs compared with those
of a forward pass of each sequence alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ibro_lightning.engines.base import Rows
from ibro_lightning.errors import ConfigError
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.types import Generation, SamplingParams

Generate = Callable[[Rows, SamplingParams, Rows, int], list[Generation]]
"""All samples of prompts, in order; the last argument is the maximum number of concurrent responses."""

KNOWN_FAULTS = dict.fromkeys(
    ("nemotron_h", "zamba2"),
    "transformers bounds the time steps of its Mamba layers in a prompt, and not in what is generated",
)
"""Model types whose faults depend on the weights, so that the check can miss them."""
RELATIVE_TOLERANCE, TOLERANCE = 0.1, 2e-5
"""Log-probs are wrong if they are off by more than ``TOLERANCE`` nats and ``RELATIVE_TOLERANCE`` of the effect of a
different context. Rounding errors are far smaller, lost or mixed-up state is not."""
MAX_FLOAT32_PARAMETERS = 2e9
"""Maximum number of parameters of a half-precision model to check in float32, which needs memory at start."""
LENGTHS = (9, 4, 6)
"""Lengths of the test prompts; the first is sampled twice."""


def build(spec: ModelSpec, dtype: torch.dtype) -> Any:
    """A model with random weights on the spec's device; raises ConfigError if this engine does not support it."""
    config = spec.config
    if getattr(config, "is_encoder_decoder", False):
        raise _refusal(config, "it is an encoder-decoder, and policies are causal language models")
    if fault := KNOWN_FAULTS.get(config.get_text_config().model_type):
        raise _refusal(config, fault)
    # The initial weights must neither consume nor depend on the run's random numbers.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        try:
            own_code = spec.trust_remote_code
            model = AutoModelForCausalLM.from_config(spec.plain_config(), dtype=dtype, trust_remote_code=own_code)
        except (ValueError, TypeError, KeyError, AttributeError, ImportError, NotImplementedError) as error:
            raise _refusal(config, f"transformers cannot build it: {_first_words(error)}") from error
    return model.to(spec.device).eval().requires_grad_(False)


def in_float32(model: Any, spec: ModelSpec) -> Any:
    """The model to check: a float32 one instead of a small half-precision one, whose rounding would hide faults."""
    if model.dtype == torch.float32 or sum(p.numel() for p in model.parameters()) > MAX_FLOAT32_PARAMETERS:
        return model
    return build(spec, torch.float32)


def check_generation(model: Any, generate: Generate, spec: ModelSpec, max_model_len: int | None) -> bool:
    """Raise :class:`ConfigError` unless generation with ``model`` agrees with its forward pass without a cache. False
    if memory was too short to tell.

    Its random weights are rescaled: with usual initialisation, matrices are so small and biases 0 that context and
    padding hardly affect the output.
    """
    _rescale(model)
    try:
        # Rounding can change the routing in a mixture of experts, but hardly for three different sets of prompts.
        faults = [_find_fault(model, generate, max_model_len, 0)]
        while faults[-1] and len(faults) < 3:
            faults.append(_find_fault(model, generate, max_model_len, len(faults)))
    except (MemoryError, torch.OutOfMemoryError):
        return False  # the first call of generate reports it with advice
    except Exception as error:
        raise _refusal(spec.config, f"{type(error).__name__}: {_first_words(error)}") from error
    if faults[-1] and hasattr(spec.config, "encoder_layers"):  # e.g. BartForCausalLM
        raise _refusal(spec.config, "it is the decoder of an encoder-decoder, and policies are models of their own")
    if faults[-1]:
        raise _refusal(spec.config, faults[-1])
    return True


def _refusal(config: Any, fault: str) -> ConfigError:
    remedy = f"cannot run the model type {config.model_type!r} ({fault}): use VLLMEngine, if vLLM can, or another model"
    return ConfigError("engine", "HFEngine", f"the embedded engine {remedy}")


def _first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


@torch.no_grad()
def _rescale(model: Any) -> None:
    """Scale matrices to preserve the norm of their inputs, and add noise to vectors (biases, norms)."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim < 2:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((0.3 * noise).to(parameter.device, parameter.dtype))
        elif parameter.numel() > 1:
            gain = 1 / (parameter.shape[-1] ** 0.5 * float(parameter.std()) + 1e-9)
            if 1 < gain < 1e3:
                parameter.mul_(gain)


@torch.no_grad()
def _find_fault(model: Any, generate: Generate, max_model_len: int | None, attempt: int) -> str | None:
    """The fault in generating responses to a few prompts, which depend on ``attempt``; None if there is none."""
    vocabulary = model.config.get_text_config().vocab_size
    room = max_model_len or 64
    new_tokens = max(1, min(6, room // 2))
    prompts = [
        [(7 * i * i + 3 * i + 5 * row + 11 * attempt + 1) % vocabulary for i in range(length)]
        for row, length in enumerate(max(1, min(length, room - new_tokens)) for length in LENGTHS)
    ]
    seeds = [[attempt, attempt + 1], [attempt + 2], [attempt + 3]]
    sampling = SamplingParams(max_tokens=new_tokens)
    full = generate(prompts, sampling, seeds, 4)
    # Choose stop tokens with which two of the four rows end early and leave the batch.
    stops = tuple({full[row].token_ids[min(row, len(full[row].token_ids) - 1)] for row in (0, 2)})
    generated = full + generate(prompts, replace(sampling, stop_token_ids=stops), seeds, 4)
    # With room for three, the two samples of the longest prompt wait until one of the others ends, and join the other.
    stops = _ends_one(full[2].token_ids, full[3].token_ids)
    generated += generate(prompts, replace(sampling, stop_token_ids=stops), seeds, 3)
    owners = [prompts[0], *prompts]
    rows = list(zip(owners * 3, generated, strict=True))
    expected = [_plain_logp(model, prompt, answer.token_ids) for prompt, answer in rows]
    if not all(torch.isfinite(logp).all() for logp in expected):
        return None  # inconclusive with these weights
    if _sees_later_tokens(model, [*prompts[0], *full[0].token_ids]):
        return "its tokens see later ones, so it is no causal language model"
    if model.dtype != torch.float32:
        return None  # too large for float32, and rounding would dominate the difference
    difference = max(
        float((torch.tensor([*answer.logp]) - logp).abs().max())
        for (_, answer), logp in zip(rows, expected, strict=True)
    )
    changed = [(prompts[0][0] + 1) % vocabulary, *prompts[0][1:]]
    context = float((_plain_logp(model, changed, full[0].token_ids) - expected[0]).abs().max())
    if difference <= max(TOLERANCE, RELATIVE_TOLERANCE * context):
        return None
    return f"its cache cannot hold rows of different lengths: log-probs are up to {difference:.2g} nats off"


def _ends_one(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    """A stop token with which one of two responses ends while the other goes on; none if they are the same."""
    for first, second in ((one, other), (other, one)):
        for step, token in enumerate(first[:-1]):
            if token not in second[: step + 2]:
                return (token,)
    return ()


def _plain_logp(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """``[T]`` log-probs of a response from a forward pass without padding or cache; on the CPU."""
    logits = _logits(model, [*prompt, *response])[len(prompt) - 1 : -1].float()
    chosen = torch.tensor([*response], device=logits.device)[:, None]
    return logits.log_softmax(dim=-1).gather(-1, chosen).squeeze(-1).cpu()


def _logits(model: Any, tokens: Sequence[int]) -> Tensor:
    """``[L, V]`` logits of a sequence."""
    inputs = torch.tensor([list(tokens)], device=model.device)
    return cast(Tensor, model(input_ids=inputs, use_cache=False).logits[0])


def _sees_later_tokens(model: Any, tokens: Sequence[int]) -> bool:
    """Whether predictions for the first half of ``tokens`` depend on the second half."""
    half = len(tokens) // 2
    altered = [*tokens[:half], *reversed(tokens[half:])]
    logits, altered_logits = (_logits(model, sequence)[:half].float() for sequence in (tokens, altered))
    difference = (logits - altered_logits).abs().max() / logits.abs().max().clamp(min=1e-6)
    return bool(difference > torch.finfo(model.dtype).eps ** 0.6)
