"""Rollouts with vLLM: the trainer's weights go in, sampled tokens and their log-probs come out.

Pitfalls of vLLM that are handled here:

- By default it reports log-probs of the unscaled distribution; here they are those of the sampling distribution.
- On CPUs it keeps a copy of an output head that is tied to the embedding. A reload leaves the copy stale unless the
  head is passed by name; :meth:`VLLMEngine.load_weights` requires every name.
- Cached prefixes outlive the weights they were computed with. The cache is reset after every reload, and the return
  value checked, because vLLM refuses while requests are running.
- It seeds the process's random generators and replaces ``torch.set_num_threads``; both are restored.

In addition, :mod:`ibro_lightning.engines.weight_check` verifies the engine after every sync.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ibro_lightning.engines.base import RolloutEngine, Rows
from ibro_lightning.engines.vllm_build import (
    VLLMSettings,
    build,
    deaths_noticed,
    is_dead,
    release,
    shortened,
    torch_rng_kept,
)
from ibro_lightning.engines.vllm_limits import check_prompts, check_temperature
from ibro_lightning.engines.vllm_worker import chunks
from ibro_lightning.engines.weight_names import checked_weights, weight_shapes
from ibro_lightning.errors import ConfigError, RolloutError, check_at_least
from ibro_lightning.guards.signals import held_back
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.types import Dtype, FinishReason, Generation, SamplingParams

UPDATE_EVERY = 16
"""Tokens between two updates of a response with a deadline."""


class VLLMEngine(RolloutEngine):
    """vLLM as a rollout engine, imported when the engine is set up.

    Args:
        dtype: of the engine's copy of the weights. vLLM's attention on GPUs requires bfloat16 or float16.
        gpu_memory_utilization: share of GPU memory for weights and key-value cache.
        kv_cache_gib: size of the key-value cache in GiB; None fills the share above, or means 1 GiB on a CPU.
        max_model_len: maximum length of prompt + response in tokens; None takes the model's limit.
        max_num_seqs: responses generated concurrently.
        tensor_parallel_size: GPUs that share each layer, in a run of one process. In others every rank's engine has the
            rank's own GPU, and this is 1; the server of :class:`VLLMServerEngine` may have any.
        enforce_eager: disable CUDA graphs and compilation, for a faster start and tiny models. None disables them on
            CPUs only.
        seed: of vLLM itself. Samples do not depend on it, since each has a seed from the datamodule.
        in_process: False runs vLLM in a separate process, whose crash leaves this one alive; weights are copied in
            chunks.
        deadline_s: time limit in seconds for one call of :meth:`generate`. Unfinished responses are then aborted and
            returned as of their last update (every 16 tokens) with the finish reason ``deadline``; they are counted,
            and masked in training. Evaluations warn about them. None waits.
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
            check_at_least("deadline_s", deadline_s, 0.001, ", or null to wait")
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
        try:  # detects models that vLLM's attention does not support, and warms up
            self._generate([[0]], SamplingParams(max_tokens=1), [[0]], deadline_s=None)
        except RolloutError as error:
            self.close()
            remedy = f"vLLM cannot run this model here: {error.__cause__ or error}; use HFEngine"
            raise ConfigError("engine", "VLLMEngine", remedy) from error

    def check_sampling(self, sampling: SamplingParams, *, setting: str) -> None:
        """Raise :class:`ConfigError` for temperatures that vLLM rejects or silently replaces."""
        check_temperature(sampling, setting)

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], *, partial: bool = False) -> None:
        """See :class:`RolloutEngine`. A failure leaves the weights incomplete: vLLM is closed, and restarts later."""
        if self._spec is None:
            raise RolloutError("VLLMEngine: setup(spec) comes before load_weights(...)")
        self.setup(self._spec)
        weights = checked_weights(named_tensors, self._shapes, partial=partial)
        complete = False
        try:
            with self._errors("taking new weights"):
                self._reload(weights)
            complete = True
        finally:  # also on Ctrl-C
            if not complete:
                self.close()
        self.reset_cache()

    def reset_cache(self) -> None:
        if not self._engine.reset_prefix_cache():
            raise RolloutError("vLLM did not reset its prefix cache: it holds keys and values of the old weights")

    def generate(self, prompts: Rows, sampling: SamplingParams, seeds: Rows) -> list[list[Generation]]:
        if self._engine is None:
            raise RolloutError("VLLMEngine: setup(spec) and a successful load_weights(...) come before generate(...)")
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many lists of seeds, not {len(seeds)}")
        advice = "raise data.engine.max_model_len as far as the model allows, "
        check_prompts(prompts, sampling, self.max_model_len, self._vocab_size, advice)
        return self._generate(prompts, sampling, seeds, self.deadline_s)

    def _generate(
        self, prompts: Rows, sampling: SamplingParams, seeds: Rows, deadline_s: float | None
    ) -> list[list[Generation]]:
        owners = [index for index, own in enumerate(seeds) for _ in own]
        responses = [_Response() for _ in owners]
        # One request per sample, because each has its own seed; samples of a prompt share its cached prefix.
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
        """Put vLLM to sleep (on GPUs): weights and cache are dropped, and restored by the next sync."""
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
        """Pass the weights to vLLM one at a time; it buffers a layer, a padded embedding and a padded head."""
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
            logprobs=0,  # of the sampled token only
            flat_logprobs=True,
            # As in the embedded engine, each of these ends a response and is its last token.
            ignore_eos=True,
            stop_token_ids=[*self._eos, *(token for token in sampling.stop_token_ids if token < self._vocab_size)],
            detokenize=False,
            # Only with a deadline, and not at every token; for the cost see benchmarks/vllm_engine.py --deadline_s.
            output_kind=RequestOutputKind.FINAL_ONLY if self.deadline_s is None else RequestOutputKind.DELTA,
            stream_interval=None if self.deadline_s is None else UPDATE_EVERY,
            skip_clone=True,
        )

    def _run(self, requests: list[tuple[Any, Any]], responses: list[_Response], deadline_s: float | None) -> None:
        """Step the engine until every response is finished or late."""
        deadline = None if deadline_s is None else time.monotonic() + deadline_s
        with held_back() as let_signals_through:  # a step that is left half done makes all that follow it fail
            try:
                for number, (prompt, params) in enumerate(requests):
                    self._engine.add_request(str(number), prompt, params)
                    let_signals_through()
                while self._engine.has_unfinished_requests():
                    if deadline is not None and time.monotonic() > deadline:
                        break
                    for output in self._engine.step():
                        responses[int(output.request_id)].take(output.outputs[0])
                    let_signals_through()
            finally:  # also after an error or Ctrl-C: remaining requests would be returned by the next call
                late = [str(number) for number, own in enumerate(responses) if own.finish_reason == "deadline"]
                if late and not is_dead(self._engine):
                    self._engine.abort_request(late)

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        """Convert vLLM's errors to a one-line RolloutError."""
        try:
            with deaths_noticed(self._engine):
                yield
        except (ConfigError, RolloutError):
            raise
        except Exception as error:
            if is_dead(self._engine, patience_s=5):
                remedy = "--ckpt_path last continues from the last checkpoint, if there is one"
                raise RolloutError(f"the vLLM engine died while {doing}: see its messages above; {remedy}") from error
            raise RolloutError(f"vLLM failed while {doing}: {shortened(error)}") from error


class _Response:
    """One sample so far; its finish reason is ``deadline`` until it is finished."""

    def __init__(self) -> None:
        self.token_ids = array("i")
        self.logp = array("f")
        self.finish_reason: FinishReason = "deadline"

    def take(self, output: Any) -> None:
        self.token_ids.extend(output.token_ids)
        self.logp.extend(output.logprobs.logprobs)
        if output.finish_reason in ("stop", "length"):
            self.finish_reason = output.finish_reason
        elif output.finish_reason is not None:
            raise RuntimeError(f"a response ended with {output.finish_reason!r}")

    def generation(self) -> Generation:
        return Generation(self.token_ids, self.logp, self.finish_reason)
