"""What the SDK and a server do wrong is told in words that name what to do. Runs where the SDK is installed."""

from __future__ import annotations

import concurrent.futures
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from backtalk.engines.remote.service import Datum, ServiceError
from backtalk.engines.tinker.config import TinkerConfig
from backtalk.errors import ConfigError, SamplerError

pytest.importorskip("tinker.types")
from backtalk.engines.tinker import sdk


class Answers(BaseHTTPRequestHandler):
    """A server that is healthy and does nothing else right."""

    status = 500

    def do_GET(self) -> None:
        self.send_response(200 if self.path.endswith("/healthz") else self.status)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def config(port: int) -> TinkerConfig:
    return TinkerConfig(model="m", base_url=f"http://127.0.0.1:{port}", timeout_s=5.0)


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(ServiceError, match=r"no server answers at http://127.*start it, or set engine\.base_url"):
            sdk.connect(config(free.getsockname()[1]))


@pytest.mark.parametrize(
    ("status", "advice"),
    [(401, "check TINKER_API_KEY"), (404, "is it the root address"), (422, r"SkyRL 0\.4 is made for 0\.25")],
)
def test_a_server_that_refuses(
    server: ThreadingHTTPServer, status: int, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answers, "status", status)
    with pytest.raises(ServiceError, match=advice):
        sdk.connect(config(server.server_port))


def test_an_sdk_of_another_version_and_a_key_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TINKER_API_KEY", "TINKER_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"set TINKER_API_KEY, or engine\.base_url"):
        sdk.connect(TinkerConfig())
    monkeypatch.setattr(sdk, "version", lambda name: "0.24.1")
    with pytest.raises(ConfigError, match=r"tinker 0\.24\.1 is installed, and 0\.25 to 0\.38 are known to work"):
        sdk.connect(TinkerConfig())


def test_a_server_that_fails_for_good_and_one_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    response = sdk.httpx.Response(500, request=sdk.httpx.Request("POST", "http://here/api/v1/optim_step"))
    failed = sdk.tinker.InternalServerError("Error code: 500", response=response, body=None)
    assert sdk._explain(failed).startswith("InternalServerError: Error code: 500; the server failed, and its log says")

    monkeypatch.setattr(sdk, "_LOOK_S", 0.01)
    service = object.__new__(sdk.TinkerService)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        service._url = service._where = f"http://127.0.0.1:{free.getsockname()[1]}"
        service._config = TinkerConfig(timeout_s=600.0)
        with pytest.raises(
            ServiceError, match=r"did not give a step: ConnectError.*the server is gone; start it again"
        ):
            service._ask("a step", lambda: concurrent.futures.Future())


class Future:
    """An answer that is there, or never comes."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def result(self, timeout: float | None = None) -> Any:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value

    async def result_async(self, timeout: float | None = None) -> Any:
        return self.result()


def patience() -> Any:
    return sdk._Patience(None, 5.0)


class Client:
    """A client of the SDK with one answer to everything."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: Future(self.value)


def test_a_row_goes_out_shifted_and_comes_back_whole() -> None:
    datum = sdk._datum(Datum(token_ids=[5, 6, 7], inputs={"weights": [0.5, -1.0]}))
    assert datum.model_input.to_ints() == [5, 6]
    assert list(datum.loss_fn_inputs["target_tokens"].data) == [6, 7]
    assert list(datum.loss_fn_inputs["weights"].data) == [0.5, -1.0]


def test_an_answer_that_never_comes_and_one_of_another_length() -> None:
    service = object.__new__(sdk.TinkerService)
    service._config, service._url, service._where = TinkerConfig(timeout_s=1.0), None, "http://here"
    with pytest.raises(
        ServiceError, match=r"http://here did not give a forward pass: .*no answer; .*engine\.timeout_s"
    ):
        sdk.SdkModel(Client(TimeoutError()), service._ask, patience).run(
            [Datum(token_ids=[5, 6], inputs={"weights": [1.0]})], "cross_entropy", backward=True
        )
    output = type("Output", (), {"loss_fn_outputs": []})()
    with pytest.raises(ServiceError, match="other tokens than it was sent"):
        sdk.SdkModel(Client(output), service._ask, patience).run(
            [Datum(token_ids=[5, 6], inputs={"weights": [1.0]})], "cross_entropy", backward=False
        )


async def test_an_action_without_its_stop_token_or_its_log_probabilities_is_refused() -> None:
    for tokens, logprobs in (([8, 9], [-1.0, -1.0]), ([8, 2], None), ([8, 2], [-1.0])):
        sequence = type("Sequence", (), {"tokens": tokens, "logprobs": logprobs, "stop_reason": "stop"})()
        client = Client(type("Answer", (), {"sequences": [sequence]})())
        with pytest.raises(SamplerError, match="an action needs the log-probability of each, its stop token included"):
            await sdk.SdkWeights(client, patience).sample([1, 2], max_tokens=4, temperature=1.0, seed=0, stop=[2])
    with pytest.raises(SamplerError, match="did not sample: OSError: gone"):
        await sdk.SdkWeights(Client(OSError("gone")), patience).sample(
            [1, 2], max_tokens=4, temperature=1.0, seed=0, stop=[2]
        )
