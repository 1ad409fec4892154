"""As much of a vLLM server as the engine asks for, on a port of this machine; what it answers is up to the test."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import Qwen2Config

from helpers.processes import HANGS_S
from ibro_lightning.engines.weight_names import weight_shapes
from ibro_lightning.models.spec import ModelSpec

Answer = tuple[int, Any]
VOCAB = 11
SPEC = ModelSpec(
    Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=12,
        tie_word_embeddings=True,
    ),
    (2, 99),  # 99 is beyond the vocabulary, as EOS of other tokenizers may be
    torch.device("cpu"),
)
WEIGHTS = {name: torch.full(shape, float(number)) for number, (name, shape) in enumerate(weight_shapes(SPEC).items())}


class FakeServer:
    """Answers a completion with the tokens ``[its seed]``, and refuses a bias for tokens beyond ``vocab_size``.

    ``answers[path]`` replaces the answer to a path: it is called with the body, in a thread of the request. Everything
    that is asked is in ``asked``, in order, and the weights that were handed over in ``weights``, by sync.
    """

    def __init__(self) -> None:
        self.vocab_size, self.model = VOCAB, "somewhere/else"
        self.answers: dict[str, Callable[[Any], Answer]] = {}
        self.headers: dict[str, str] = {}
        self.asked: list[tuple[str, Any]] = []
        self.keys: list[str | None] = []
        self.weights: list[dict[str, Any]] = []
        self.modes: list[int] = []
        self.config: dict[str, Any] = {
            "model_config": {"dtype": "torch.float32", "logprobs_mode": "processed_logprobs"},
            "device_config": {"device": "cpu"},
            "scheduler_config": {"enable_chunked_prefill": False},
        }

    def answer(self, path: str, body: Any) -> Answer:
        self.asked.append((path, body))
        if path in self.answers:
            return self.answers[path](body)
        return {
            "/health": lambda: (200, None),
            "/version": lambda: (200, {"version": "0.32.0"}),
            "/v1/models": lambda: (200, {"data": [{"id": "tiny", "max_model_len": 32, "root": self.model}]}),
            "/server_info?config_format=json": lambda: (200, {"vllm_config": self.config}),
            "/collective_rpc": lambda: self._load(body),
            "/reset_prefix_cache": lambda: (200, {"success": True}),
            "/v1/completions": lambda: self._complete(body),
        }.get(path, lambda: (404, {"detail": "Not Found"}))()

    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]

    def completions(self) -> list[Any]:
        return [body for path, body in self.asked if path == "/v1/completions" and "logit_bias" not in body]

    def wait_for_completions(self, number: int) -> None:
        """Return once as many have been asked for: a test's answer that must not come before the other requests do."""
        until = time.monotonic() + HANGS_S
        while len(self.completions()) < number:
            assert time.monotonic() < until, f"{number} completions were never asked for"
            time.sleep(0.001)

    def _load(self, body: Any) -> Answer:
        assert body["method"] == "reload_weights"
        folder = Path(body["kwargs"]["weights_path"])
        assert folder.is_absolute()
        self.modes.append(folder.stat().st_mode & 0o777)
        self.weights.append({name: t for file in sorted(folder.iterdir()) for name, t in load_file(file).items()})
        return 200, {"results": [None]}

    def _complete(self, body: Any) -> Answer:
        if unknown := [token for token in body.get("logit_bias", {}) if int(token) >= self.vocab_size]:
            return 400, {"error": {"message": f"token_id(s) {unknown} in logit_bias contain out-of-vocab token ids."}}
        return 200, completion([body["seed"]], [-1.5])


def completion(tokens: list[int], logp: list[float], reason: str = "length") -> dict[str, Any]:
    return {"choices": [{"token_ids": tokens, "logprobs": {"token_logprobs": logp}, "finish_reason": reason}]}


@contextmanager
def fake_server() -> Iterator[tuple[FakeServer, str]]:
    """A running server and its URL."""
    fake = FakeServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_request(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            fake.keys.append(self.headers.get("Authorization"))
            status, content = fake.answer(self.path, body)
            if status == 0:  # hang up
                self.close_connection = True
                return
            data = b"" if content is None else json.dumps(content).encode()
            with suppress(OSError):  # the client has left
                self.send_response(status)
                for name, value in fake.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        do_GET = do_POST = handle_request

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield fake, f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
