"""Whether a running vLLM server was started as training needs it; if not, which flag is missing."""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from packaging.version import Version
from transformers import AutoConfig

from ibro_lightning.engines.vllm_build import MIN_VERSION, UNTESTED_VERSION, shortened
from ibro_lightning.engines.vllm_completions import completion_request
from ibro_lightning.engines.vllm_http import API_KEY, Request, ServerClient, ServerLost, ServerRefused
from ibro_lightning.engines.weight_names import weight_shapes
from ibro_lightning.errors import ConfigError
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.ranks import rank_zero_warn
from ibro_lightning.types import Dtype, SamplingParams

START = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --skip-tokenizer-init"


class ServerSettings(NamedTuple):
    """What a server says of itself."""

    dtype: Dtype
    max_model_len: int
    model: str
    """Name or folder of the model that it was started with."""


def checked_url(url: str) -> tuple[str, str]:
    """The URL without a slash at its end, and its host; raises :class:`ConfigError`."""
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except (AttributeError, TypeError, ValueError):  # no text, half an IPv6 address, or a port that is none
        whole = False
    if not whole or "?" in url or "#" in url:
        raise ConfigError("url", url, "write the server's address, such as http://127.0.0.1:8000")
    if parts.username is not None or parts.password is not None:
        raise ConfigError("url", url.replace(parts.netloc, "…"), f"write no password here; for a key, set {API_KEY}")
    if parts.path.rstrip("/").endswith("/v1"):
        raise ConfigError("url", url, "write it without /v1")
    return url.rstrip("/"), parts.hostname or ""


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def checked_settings(client: ServerClient, vocab_size: int) -> ServerSettings:
    """The server's settings; raises :class:`ConfigError` unless they are what training needs."""
    try:
        return _Inquiry(client).settings(vocab_size)
    except ServerLost as error:
        raise ConfigError("url", client.url, f"no vLLM server answers there: {error}; start one: {START}") from error


def check_same_model(client: ServerClient, model: str, spec: ModelSpec) -> None:
    """Raise :class:`ConfigError` if the folder ``model`` of the server can be seen here and has other weights than the
    policy: vLLM would take some of another shape without a word, and would not recover from refusing others."""
    if not (Path(model) / "config.json").is_file():
        return
    config = AutoConfig.from_pretrained(model, trust_remote_code=spec.trust_remote_code)
    theirs, ours = weight_shapes(replace(spec, config=config)), weight_shapes(spec)
    if different := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        name = different[0]
        shapes = [tuple(side[name]) if name in side else None for side in (theirs, ours)]
        what = f"{len(different)} of its weights are not the policy's, e.g. {name}: {shapes[0]} instead of {shapes[1]}"
        raise ConfigError("url", client.url, f"its model is {model}; {what}: start it with the policy's folder")


class _Inquiry:
    """The questions to one server."""

    def __init__(self, client: ServerClient) -> None:
        self.client = client

    def settings(self, vocab_size: int) -> ServerSettings:
        self._check_version(Version(str(self._answer("/version")["version"])))
        model = self._answer("/v1/models")["data"][0]  # adapters come after it
        config = self._answer("/server_info?config_format=json")["vllm_config"]
        if (mode := config["model_config"]["logprobs_mode"]) != "processed_logprobs":
            raise self._restart_with("--logprobs-mode processed_logprobs", f"its log-probs are {mode}")
        if config["device_config"]["device"] == "cpu" and config["scheduler_config"]["enable_chunked_prefill"]:
            raise self._restart_with("--no-enable-chunked-prefill", "on CPUs it dies of seeded samples otherwise")
        if not self._has_token(vocab_size - 1) or self._has_token(vocab_size):
            raise self._refused(f"its model lacks the policy's {vocab_size} tokens: start it with the policy's folder")
        dtype = config["model_config"]["dtype"].removeprefix("torch.")
        return ServerSettings(dtype, int(model["max_model_len"]), model["root"])

    def _check_version(self, version: Version) -> None:
        if version.release < Version(MIN_VERSION).release:
            raise self._refused(f"the server is vLLM {version}: {MIN_VERSION} or later is needed")
        if version.release >= Version(UNTESTED_VERSION).release:
            rank_zero_warn(f"the server is vLLM {version}, which was not tried with ibro_lightning; {MIN_VERSION} was")

    def _answer(self, path: str) -> Any:
        try:
            return self.client.ask([Request("GET", path)])[0]
        except ServerRefused as error:
            if error.status == 401:
                raise self._refused(f"the server asks for a key: set the environment variable {API_KEY}") from error
            if error.status == 404 and path.startswith("/server_info"):
                why = "weights are handed over in its development mode"
                raise self._restart_with("VLLM_SERVER_DEV_MODE=1 in its environment", why) from error
            remedy = f"it answers {path} with {error.status} ({shortened(error)}): is it a vLLM server? {START}"
            raise self._refused(remedy) from error

    def _has_token(self, token: int) -> bool:
        """Whether the server's model has this token, for no others are given a bias."""
        probe = completion_request([0], SamplingParams(max_tokens=1), 0, (), logit_bias={token: 0.0})
        try:
            self.client.ask([probe])
        except ServerRefused as error:
            if "logit_bias" not in str(error):
                raise self._refused(f"this vLLM server does not generate: {shortened(error)}") from error
            return False
        return True

    def _restart_with(self, flag: str, why: str) -> ConfigError:
        return self._refused(f"restart this vLLM server with {flag}: {why}")

    def _refused(self, remedy: str) -> ConfigError:
        return ConfigError("url", self.client.url, remedy)
