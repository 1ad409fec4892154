"""Rollouts by vLLM, in this process: the trainer's weights go in, tokens and their log-probs come out.

What vLLM does behind one's back, and what is done about it here:

- It reports log-probs of the unscaled distribution unless told otherwise; here they are those that were sampled from.
- It keeps the output head apart from the embedding it is tied to (on CPUs), and a reload leaves that copy stale unless
  the head is passed by name; :meth:`VLLMEngine.load_weights` insists on every name.
- Cached prefixes outlive the weights they were computed with; the cache is reset after every reload, and vLLM's answer
  is checked: it refuses while requests are running.
- It seeds the process's random generators and replaces ``torch.set_num_threads``; both are put back.

None of this is believed: :mod:`ibro_lightning.datamodules.weight_check` asks the engine after every sync.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ibro_lightning.engines.vllm_build import (
    VLLMSettings,
    build,
    deaths_noticed,
    is_dead,
    one_line,
    release,
    torch_rng_kept,
)
from ibro_lightning.engines.vllm_worker import chunks
from ibro_lightning.engines.weights import checked_weights, weight_shapes
from ibro_lightning.errors import ConfigError, RolloutError, check_at_least
from ibro_lightning.types import Dtype, FinishReason, Generation, ModelSpec, RolloutEngine, SamplingParams

LOOK_EVERY = 16
"""Tokens between two looks at a response that has a deadline."""


class VLLMEngine(RolloutEngine):
    """vLLM as a rollout engine. It is imported when the engine is set up, not before.

    Args:
        dtype: of the engine's copy of the weights. vLLM's attention on GPUs wants bfloat16 or float16.
        gpu_memory_utilization: share of the GPU's memory for weights and key-value cache together.
        kv_cache_gib: size of the key-value cache in GiB; None fills the share above, on a CPU it means 1 GiB.
        max_model_len: longest prompt + response in tokens; None takes the model's own limit.
        max_num_seqs: responses generated at the same time.
        tensor_parallel_size: GPUs that share each layer.
        enforce_eager: no CUDA graphs, no compilation. Starts sooner; better for tiny models. None: on CPUs.
        seed: vLLM's own. Samples do not depend on it: each has a seed from the datamodule.
        in_process: False runs vLLM in a process of its own, which it may then take down with it; the weights are
            copied over in pieces.
        deadline_s: seconds that one call of :meth:`generate` may take. What is unfinished then is aborted, and comes
            back as it was when last looked at (every 16 tokens), with the finish reason ``deadline``: counted, and
            masked in training. An evaluation that it cuts warns. None waits.
        engine_args: any other argument of vLLM's ``EngineArgs``, e.g. ``{enable_chunked_prefill: false}``.
    """

    def __init__(
        self,
        dtype: Dtype = "bfloat16",
        gpu_memory_utilization: float = 0.5,
        kv_cache_gib: float | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        tensor_parallel_size: int = 1,
        enforce_eager: bool | None = None,
        seed: int = 0,
        in_process: bool = True,
        deadline_s: float | None = None,
        engine_args: dict[str, Any] | None = None,
    ) -> None:
        self.dtype: Dtype = dtype
        self.max_model_len = max_model_len
        self.settings = VLLMSettings(
            dtype=dtype,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_gib=kv_cache_gib,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            tensor_parallel_size=tensor_parallel_size,
            enforce_eager=enforce_eager,
            seed=seed,
            in_process=in_process,
            engine_args=engine_args or {},
        )
        if deadline_s is not None:
            check_at_least("data.engine.deadline_s", deadline_s, 0.001, ", or null to wait")
        self.deadline_s = deadline_s
        self._engine: Any = None
        self._spec: ModelSpec | None = None
        self._asleep = False

    def setup(self, spec: ModelSpec) -> None:
        if self._engine is not None:
            return
        self._spec = spec
        self._shapes = weight_shapes(spec)
        self._vocab_size = int(spec.config.get_text_config().vocab_size)
        self._eos = [token for token in spec.eos_token_ids if token < self._vocab_size]  # vLLM refuses others
        self._sleeps = spec.device.type != "cpu"
        self._owns_process_group = not torch.distributed.is_initialized()
        self._engine = build(self.settings, spec, sleep_mode=self._sleeps)
        self.max_model_len = int(self._engine.model_config.max_model_len)
        try:  # models that its attention cannot run are found out here, and the first real call is not the slow one
            self._generate([[0]], SamplingParams(max_tokens=1), [[0]], deadline_s=None)
        except RolloutError as error:
            self.close()
            raise ConfigError(
                "data.engine",
                "VLLMEngine",
                f"vLLM cannot run this model here: {error.__cause__ or error}; use HFEngine",
            ) from error

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], *, partial: bool = False) -> None:
        """See :class:`RolloutEngine`. A failure leaves vLLM with some of the weights: it is closed, and started anew by
        the next call."""
        if self._spec is None:
            raise RolloutError("VLLMEngine: setup(spec) comes before load_weights(...)")
        self.setup(self._spec)
        weights = checked_weights(named_tensors, self._shapes, partial=partial)
        done = False
        try:
            with self._errors("taking new weights"):
                self._reload(weights)
            done = True
        finally:  # Ctrl-C, too
            if not done:
                self.close()
        self.reset_cache()

    def reset_cache(self) -> None:
        """Forget the keys and values of all prompts."""
        if not self._engine.reset_prefix_cache():
            raise RolloutError("vLLM did not reset its prefix cache: it holds keys and values of the old weights")

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[Sequence[int]]
    ) -> list[list[Generation]]:
        if self._engine is None:
            raise RolloutError(
                "VLLMEngine: setup(spec) and a load_weights(...) that succeeds come before generate(...)"
            )
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many lists of seeds, not {len(seeds)}")
        self._check_prompts(prompts, sampling)
        return self._generate(prompts, sampling, seeds, self.deadline_s)

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        seeds: Sequence[Sequence[int]],
        deadline_s: float | None,
    ) -> list[list[Generation]]:
        owners = [index for index, own in enumerate(seeds) for _ in own]
        responses = [_Response() for _ in owners]
        # One request per sample, each with its own seed; samples of a prompt share its cached prefix.
        requests = [
            ({"prompt_token_ids": list(prompts[index])}, self._sampling_params(sampling, seed))
            for index, own in enumerate(seeds)
            for seed in own
        ]
        with self._errors("generating"), torch_rng_kept():
            self._run(requests, responses, deadline_s)
        if responses and not any(response.token_ids for response in responses):
            raise RolloutError(f"data.engine.deadline_s: {deadline_s} s passed before any response had a token")
        results: list[list[Generation]] = [[] for _ in prompts]
        for index, response in zip(owners, responses, strict=True):
            results[index].append(response.generation())
        return results

    def offload(self) -> None:
        """On GPUs vLLM sleeps: weights and cache are dropped, and come back with the next sync."""
        if self._engine is not None and self._sleeps and not self._asleep:
            self._engine.sleep(level=2)
            self._asleep = True

    def onload(self) -> None:
        if self._asleep:
            self._engine.wake_up()
            self._asleep = False

    def close(self) -> None:
        if self._engine is not None:
            engine, self._engine, self._asleep = self._engine, None, False
            release(engine, owns_process_group=self._owns_process_group)

    def _reload(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Hand the weights to vLLM one at a time; it holds those of a layer until the layer is whole, and the embedding
        and the head until the end if it pads them."""
        if self.settings.same_process:
            self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            return
        self._engine.collective_rpc("ibro_begin_reload")
        for chunk in chunks(weights):
            self._engine.collective_rpc("ibro_load_chunk", args=(chunk,))
        self._engine.collective_rpc("ibro_finish_reload")

    def _sampling_params(self, sampling: SamplingParams, seed: int) -> Any:
        from vllm import SamplingParams as VLLMSamplingParams
        from vllm.sampling_params import RequestOutputKind

        return VLLMSamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_tokens=sampling.max_tokens,
            seed=seed,
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            # The embedded engine's rule: each of these ends a response and is its last token.
            ignore_eos=True,
            stop_token_ids=self._eos,
            detokenize=False,
            # Only what may be aborted must be followed, and not at every token: benchmarks/vllm_engine.py --deadline_s.
            output_kind=RequestOutputKind.FINAL_ONLY if self.deadline_s is None else RequestOutputKind.DELTA,
            stream_interval=None if self.deadline_s is None else LOOK_EVERY,
            skip_clone=True,
        )

    def _run(self, requests: list[tuple[Any, Any]], responses: list[_Response], deadline_s: float | None) -> None:
        """Step the engine until every response is finished or late."""
        deadline = None if deadline_s is None else time.monotonic() + deadline_s
        try:
            for number, (prompt, params) in enumerate(requests):
                self._engine.add_request(str(number), prompt, params)
            while self._engine.has_unfinished_requests():
                if deadline is not None and time.monotonic() > deadline:
                    break
                for output in self._engine.step():
                    responses[int(output.request_id)].take(output.outputs[0])
        finally:  # after an error or Ctrl-C, too: what is left would answer the next call
            late = [str(number) for number, response in enumerate(responses) if response.finish_reason == "deadline"]
            if late and not is_dead(self._engine):
                self._engine.abort_request(late)

    def _check_prompts(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> None:
        longest = max((len(prompt) for prompt in prompts), default=0)
        limit = self.max_model_len
        if limit is not None and prompts and longest + sampling.max_tokens > limit:
            raise ConfigError(
                "sampling.max_tokens",
                sampling.max_tokens,
                f"with a prompt of {longest} tokens this exceeds the engine's {limit}: write at most "
                f"{limit - longest}, raise data.engine.max_model_len as far as the model allows, or "
                "lower data.prompt_limits.max_tokens",
            )
        unknown = [token for prompt in prompts for token in prompt if not 0 <= token < self._vocab_size]
        if unknown:
            raise ConfigError(
                "model.policy",
                f"token id {unknown[0]}",
                f"a prompt holds it, but the model has {self._vocab_size} tokens: its folder has another model's "
                "tokenizer",
            )

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        """Say in one line what happened to vLLM; our own errors pass."""
        try:
            with deaths_noticed(self._engine):
                yield
        except (ConfigError, RolloutError, KeyError):
            raise
        except Exception as error:
            if is_dead(self._engine, patience_s=5):
                raise RolloutError(
                    f"the vLLM engine died while {doing}: its process is gone, its messages are above; the last "
                    "checkpoint is intact, and --ckpt_path continues from it"
                ) from error
            raise RolloutError(f"vLLM failed while {doing}: {one_line(error)}") from error


class _Response:
    """What has come of one sample so far; late until it is finished."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logp: list[float] = []
        self.finish_reason: FinishReason = "deadline"

    def take(self, output: Any) -> None:
        self.token_ids += output.token_ids
        self.logp += output.logprobs.logprobs
        if output.finish_reason in ("stop", "length"):
            self.finish_reason = output.finish_reason
        elif output.finish_reason is not None:
            raise RuntimeError(f"a response ended with {output.finish_reason!r}")

    def generation(self) -> Generation:
        return Generation(tuple(self.token_ids), tuple(self.logp), self.finish_reason)
