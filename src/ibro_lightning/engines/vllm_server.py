"""Rollouts with a vLLM server that is running already, on this machine or another: ``vllm serve``, spoken to over HTTP.

Token ids go to its completions API, one request per sample, and token ids and log-probs come back. New weights go
through a folder of safetensors files that both sides see: the server's development mode has an RPC that reloads them.
vLLM's own weight transfer (``/init_weight_transfer_engine``, ``/update_weights``) is not used, because it needs a GPU
on both sides: without one, its trainer's side raises "Cannot access accelerator device when none is available" for
``nccl`` and ``ipc`` alike, and over HTTP ``ipc`` has the server unpickle what it is sent.

Pitfalls of vLLM's server that are handled here:

- Parameters that a request leaves out come from the model's generation_config: all are sent.
- Without a tokenizer it does not check the ids of a prompt, and an unknown one kills it: they are checked here.
- A reload that fails leaves it with weights that the next one does not mend, or that kill it with the next request. So
  all weights are checked before they are handed over, and nothing is generated until a reload has succeeded.
- It takes weights of another shape, or not all of them, without a word: names and shapes are checked here as far as the
  model that it was started with is known, and :mod:`ibro_lightning.engines.weight_check` checks the rest.

What is not handled: requests arrive when they arrive, so batches differ from run to run, and with them log-probs in
their last digits and, now and then, a sample.

The pitfalls of :mod:`ibro_lightning.engines.vllm` that concern weights and caches are handled as there.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from torch import Tensor, distributed

from ibro_lightning.engines.base import RolloutEngine, Rows
from ibro_lightning.engines.vllm_build import shortened
from ibro_lightning.engines.vllm_completions import completion_request, generation_of
from ibro_lightning.engines.vllm_http import Request, ServerClient, ServerLost, ServerRefused
from ibro_lightning.engines.vllm_limits import check_prompts, check_temperature
from ibro_lightning.engines.vllm_server_settings import check_same_model, checked_settings, checked_url, is_loopback
from ibro_lightning.engines.weight_folder import private_folder, write_weights
from ibro_lightning.engines.weight_names import checked_weights, weight_shapes
from ibro_lightning.errors import ConfigError, RolloutError, check_at_least, check_count
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.ranks import ALONE, Ranks
from ibro_lightning.types import Dtype, Generation, SamplingParams

RESET_PAUSE_S = 0.1
"""Pause before another try to reset the prefix cache."""


class VLLMServerEngine(RolloutEngine):
    """A running vLLM server as a rollout engine; for how to start it see docs/vllm.md.

    All ranks send their requests to the one server, and the first rank hands over the weights while the others wait.
    The server keeps its memory during the update, so it belongs on devices of its own. Its dtype is its own as well,
    and is read from it.

    Args:
        url: of the server, such as ``http://127.0.0.1:8000``. Nothing is sent anywhere else. If the server asks for a
            key, it is taken from the environment variable VLLM_API_KEY.
        weights_dir: folder for the weights on their way, which the server must see under the same path. They are
            readable by this user alone, and removed after each sync. None takes the system's temporary folder, for a
            server on this machine.
        max_num_seqs: responses requested at the same time by each rank; the server keeps those in line that exceed its
            own ``--max-num-seqs``.
        timeout_s: seconds in which the server must accept a connection and answer what needs no computing. It is asked
            for its health while it generates or loads weights, so that its death is noticed within about this time.
        deadline_s: time limit in seconds for one call of :meth:`generate`. Unfinished responses are then aborted and
            returned without tokens, with the finish reason ``deadline``; they are counted, and masked in training.
            Evaluations warn about them. None waits.
    """

    def __init__(
        self,
        url: str,
        weights_dir: str | None = None,
        max_num_seqs: int = 256,
        timeout_s: float = 60.0,
        deadline_s: float | None = None,
    ) -> None:
        self.url, host = checked_url(url)
        if weights_dir is None and not is_loopback(host):
            remedy = f"{host} may be another machine: write a folder that the server sees under the same path"
            raise ConfigError("weights_dir", None, remedy)
        if weights_dir is not None and not isinstance(weights_dir, str | Path):
            raise ConfigError("weights_dir", weights_dir, "write the path of a folder")
        check_count("max_num_seqs", max_num_seqs)
        check_at_least("timeout_s", timeout_s, 0.1)
        if deadline_s is not None:
            check_at_least("deadline_s", deadline_s, 0.001, ", or null to wait")
        self.weights_dir, self.max_num_seqs = weights_dir, max_num_seqs
        self.timeout_s, self.deadline_s = timeout_s, deadline_s
        self.dtype: Dtype = "bfloat16"  # until the server says its own
        self.max_model_len: int | None = None
        self._ranks: Ranks = ALONE
        self._client: ServerClient | None = None
        self._has_weights = False

    def check_sampling(self, sampling: SamplingParams, *, setting: str) -> None:
        """Raise :class:`ConfigError` for temperatures that vLLM rejects or silently replaces."""
        check_temperature(sampling, setting)

    def use_ranks(self, ranks: Ranks) -> None:
        """See :class:`RolloutEngine`; raises ConfigError where several processes hold one share of the data."""
        if distributed.is_initialized() and ranks.size != distributed.get_world_size():
            remedy = "processes of one tensor-parallel group would get different responses: take VLLMEngine, or fsdp2"
            raise ConfigError("engine", "VLLMServerEngine", remedy)
        self._ranks = ranks

    def setup(self, spec: ModelSpec) -> None:
        if self._client is not None:
            return
        self._shapes = weight_shapes(spec)
        self._vocab_size = int(spec.config.get_text_config().vocab_size)
        self._eos = [token for token in spec.eos_token_ids if token < self._vocab_size]  # vLLM refuses others
        if self.weights_dir is not None and self._ranks.is_first and not Path(self.weights_dir).is_dir():
            raise ConfigError("weights_dir", self.weights_dir, "there is no such folder: write one that exists")
        self._client = ServerClient(self.url, self.max_num_seqs, self.timeout_s)
        try:
            self.dtype, self.max_model_len, model = checked_settings(self._client, self._vocab_size)
            check_same_model(self._client, model, spec)
        except BaseException:
            self.close()
            raise

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], *, partial: bool = False) -> None:
        """See :class:`RolloutEngine`. Collective: every rank iterates over the weights, the first writes and hands them
        over. After a failure nothing is generated until another call has succeeded."""
        client = self._connected()
        weights = checked_weights(named_tensors, self._shapes, partial=partial)
        with private_folder(self.weights_dir) if self._ranks.is_first else nullcontext() as folder:
            if folder is not None:
                write_weights(weights, folder)
            for _ in weights:  # on the other ranks, since gathering is collective
                pass
            self._has_weights = False
            with self._ranks.all_or_none():
                if folder is not None:
                    self._hand_over(client, folder)
        self._has_weights = True

    def generate(self, prompts: Rows, sampling: SamplingParams, seeds: Rows) -> list[list[Generation]]:
        client = self._connected()
        if not self._has_weights:
            raise RolloutError("VLLMServerEngine: a successful load_weights(...) comes before generate(...)")
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many lists of seeds, not {len(seeds)}")
        advice = "restart the server with a higher --max-model-len as far as the model allows, "
        check_prompts(prompts, sampling, self.max_model_len, self._vocab_size, advice)
        # One request per sample, because each has its own seed; samples of a prompt share its cached prefix.
        stops = [*self._eos, *(token for token in sampling.stop_token_ids if token < self._vocab_size)]
        requests = [
            completion_request(prompt, sampling, seed, stops)
            for prompt, own in zip(prompts, seeds, strict=True)
            for seed in own
        ]
        with self._errors("generating"):
            answers = client.ask(requests, self.deadline_s)
        generations = map(generation_of, answers)
        if answers and all(answer is None for answer in answers):
            raise RolloutError(f"data.engine.deadline_s: {self.deadline_s} s passed before any response was finished")
        return [[next(generations) for _ in own] for own in seeds]

    def offload(self) -> None:
        """Nothing: the server's memory is its own."""

    def onload(self) -> None:
        """Nothing: the server's memory is its own."""

    def close(self) -> None:
        """End the connections; the server goes on."""
        if self._client is not None:
            client, self._client, self._has_weights = self._client, None, False
            client.close()

    def _connected(self) -> ServerClient:
        if self._client is None:
            raise RolloutError("VLLMServerEngine: setup(spec) comes before load_weights(...) and generate(...)")
        return self._client

    def _hand_over(self, client: ServerClient, folder: Path) -> None:
        """Have the server load the weights in ``folder``, and forget the keys and values of the old ones."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        remedy = "; does it see that folder (data.engine.weights_dir)? Else restart it with the policy's model"
        with self._errors(f"loading the weights in {folder}", remedy):
            if any(folder.iterdir()):  # a partial sync may have nothing to hand over
                client.ask([Request("POST", "/collective_rpc", body)])
        with self._errors("resetting its prefix cache"):
            end = time.monotonic() + self.timeout_s
            # It is refused while requests run; those that a deadline aborted may take a moment to end.
            while not client.ask([Request("POST", "/reset_prefix_cache")])[0]["success"]:
                if time.monotonic() > end:
                    raise RolloutError("the vLLM server keeps the prefix cache of the old weights: it serves others")
                time.sleep(RESET_PAUSE_S)

    @contextmanager
    def _errors(self, doing: str, remedy: str = "") -> Iterator[None]:
        """Convert the client's errors to a one-line RolloutError; ``remedy`` is for what the server refuses."""
        try:
            yield
        except ServerLost as error:
            resume = "once it is back, --ckpt_path last continues from the last checkpoint, if there is one"
            raise RolloutError(f"the vLLM server at {self.url} was lost while {doing}: {error}; {resume}") from error
        except ServerRefused as error:
            raise RolloutError(f"the vLLM server failed while {doing}: {shortened(error)}{remedy}") from error
