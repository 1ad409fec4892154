"""Whether a running vLLM server was started as training needs it; if not, which flag is missing."""

from __future__ import annotations

import ipaddress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from lightning.pytorch.utilities import rank_zero_warn
from packaging.version import Version

from ibro_lightning.engines.vllm_build import MIN_VERSION, UNTESTED_VERSION, one_line
from ibro_lightning.engines.vllm_completions import completion_request
from ibro_lightning.engines.vllm_http import API_KEY, Request, ServerClient, ServerLost, ServerRefused
from ibro_lightning.errors import ConfigError
from ibro_lightning.types import Dtype, SamplingParams

START = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --skip-tokenizer-init"


class ServerSettings(NamedTuple):
    """What a server says of itself."""

    dtype: Dtype
    max_model_len: int


def checked_url(url: str) -> tuple[str, str]:
    """The URL without a slash at its end, and its host; raises :class:`ConfigError`."""
    parts = urlsplit(url) if isinstance(url, str) else None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError("url", url, "write the server's address, such as http://127.0.0.1:8000")
    if parts.username is not None or parts.password is not None:
        raise ConfigError("url", url.replace(parts.netloc, "…"), f"write no password here; for a key, set {API_KEY}")
    if parts.path.rstrip("/").endswith("/v1"):
        raise ConfigError("url", url, "write it without /v1")
    return url.rstrip("/"), parts.hostname


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


class _Inquiry:
    """The questions to one server."""

    def __init__(self, client: ServerClient) -> None:
        self.client = client

    def settings(self, vocab_size: int) -> ServerSettings:
        self._check_version(Version(str(self._answer("/version")["version"])))
        max_model_len = int(self._answer("/v1/models")["data"][0]["max_model_len"])
        config = self._answer("/server_info?config_format=json")["vllm_config"]
        if (mode := config["model_config"]["logprobs_mode"]) != "processed_logprobs":
            raise self._restart_with("--logprobs-mode processed_logprobs", f"its log-probs are {mode}")
        if config["device_config"]["device"] == "cpu" and config["scheduler_config"]["enable_chunked_prefill"]:
            raise self._restart_with("--no-enable-chunked-prefill", "on CPUs it dies of seeded samples otherwise")
        if not self._has_token(vocab_size - 1) or self._has_token(vocab_size):
            raise self._refused(f"its model lacks the policy's {vocab_size} tokens: start it with the policy's folder")
        return ServerSettings(config["model_config"]["dtype"].removeprefix("torch."), max_model_len)

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
            remedy = f"it answers {path} with {error.status} ({one_line(error)}): is it a vLLM server? {START}"
            raise self._refused(remedy) from error

    def _has_token(self, token: int) -> bool:
        """Whether the server's model has this token, for no others are given a bias."""
        probe = completion_request([0], SamplingParams(max_tokens=1), 0, (), logit_bias={token: 0.0})
        try:
            self.client.ask([probe])
        except ServerRefused as error:
            if "logit_bias" not in str(error):
                raise self._refused(f"this vLLM server does not generate: {one_line(error)}") from error
            return False
        return True

    def _restart_with(self, flag: str, why: str) -> ConfigError:
        return self._refused(f"restart this vLLM server with {flag}: {why}")

    def _refused(self, remedy: str) -> ConfigError:
        return ConfigError("url", self.client.url, remedy)
