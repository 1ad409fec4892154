"""A sample as a request to the completions API of a vLLM server, and as its answer: token ids both ways."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ibro_lightning.engines.vllm_http import Request
from ibro_lightning.errors import RolloutError
from ibro_lightning.types import Generation, SamplingParams

LOWEST_LOGP = -9999.0
"""What the API writes for −inf, which JSON does not have."""


def completion_request(
    prompt: Sequence[int], sampling: SamplingParams, seed: int, stop_token_ids: Sequence[int], **more: Any
) -> Request:
    """One sample of ``prompt``. ``stop_token_ids`` end a response, and are its last token; vLLM refuses ids that its
    model lacks. ``more`` are further parameters of the API."""
    body = {
        "prompt": list(prompt),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "max_tokens": sampling.max_tokens,
        "seed": seed,
        # Whatever a request leaves out comes from the model's generation_config.
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": True,
        "stop_token_ids": list(stop_token_ids),
        "logprobs": 0,  # of the sampled token only
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,  # or each token would be decoded for its log-prob
        **more,
    }
    return Request("POST", "/v1/completions", body)


def generation_of(answer: Any) -> Generation:
    """The sample in an answer; without tokens if there is no answer, because a deadline has passed."""
    if answer is None:
        return Generation((), (), "deadline")
    (choice,) = answer["choices"]
    tokens, reason = choice["token_ids"], choice["finish_reason"]
    logp = [-math.inf if value <= LOWEST_LOGP else value for value in choice["logprobs"]["token_logprobs"]]
    if reason not in ("stop", "length") or len(logp) != len(tokens):
        what = f"{reason!r}, {len(tokens)} tokens and {len(logp)} log-probs"
        raise RolloutError(f"the vLLM server ended a response with {what}")
    return Generation(tokens, logp, reason)
