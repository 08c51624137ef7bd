"""Servers for the tests of samplers, which can be broken in the ways that servers break.

One of our own samples from a model folder, speaks OpenAI's completions over HTTP, and takes weights as vLLM and SGLang
do. A proxy breaks a real vLLM.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from backtalk.engines.torch.config import TorchConfig
from backtalk.engines.torch.engine import TorchEngine
from backtalk.engines.torch.model import load_model
from backtalk.engines.torch.sampler import TorchSampler
from backtalk.rollout.sampler import SamplingParams
from backtalk.run.serve import listen, serve_application
from backtalk.trajectory import Segment, TokenRole, Trajectory

UPDATES = ("/collective_rpc", "/reset_prefix_cache", "/update_weights_from_disk")


@dataclass
class Breakable:
    """What a server was asked, and how it is broken. ``answer`` and ``load`` are the server's own."""

    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)  # bodies of completions
    updates: list[str] = field(default_factory=list)  # folders of weights
    frozen: bool = False  # says that it has loaded new weights, and has not
    shift: float = 0.0  # of every log-probability that it says it sampled with, nats
    raw: bool = False  # log-probabilities of before the temperature
    failures: int = 0  # answers with status 500 that are still to come
    breaks_off: int = 0  # streams that are still to end early
    lives: int | None = None  # completions until it is dead: it then breaks off every answer

    def mend(self) -> None:
        """Make it whole, and forget what it was asked."""
        for name, whole in vars(type(self)()).items():
            if name not in ("url", "engine", "upstream"):
                setattr(self, name, whole)

    async def complete(self, request: Request) -> Response:
        body = json.loads(await request.body())
        self.asked.append(body)
        self.lives = self.lives and self.lives - 1
        if self.failures > 0:
            self.failures -= 1
            return JSONResponse({"error": "a worker has died"}, status_code=500)
        answer = await self.answer(body)
        for choice in answer.get("choices", ()) if self.shift and not body.get("echo") else ():
            choice["logprobs"]["token_logprobs"] = [x + self.shift for x in choice["logprobs"]["token_logprobs"]]
        if body.get("stream"):
            return StreamingResponse(self._stream(answer["choices"][0]), media_type="text/event-stream")
        return JSONResponse(answer)

    async def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    async def load(self, path: str, body: dict[str, Any]) -> None:
        raise NotImplementedError

    async def update(self, request: Request) -> Response:
        body = json.loads(await request.body() or "{}")
        if request.url.path != "/reset_prefix_cache":
            self.updates.append(body["model_path"] if "model_path" in body else body["kwargs"]["weights_path"])
        if not self.frozen:
            await self.load(request.url.path, body)
        return JSONResponse({"success": True})

    async def _stream(self, choice: dict[str, Any]) -> AsyncIterator[str]:
        ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        for n, (token, logprob) in enumerate(zip(ids, logprobs, strict=True), 1):
            if n == len(ids) and self.breaks_off > 0:
                self.breaks_off -= 1
                return
            part = _choice([token], [logprob], choice["finish_reason"] if n == len(ids) else None)
            yield f"data: {json.dumps({'choices': [part]})}\n\n"
        yield "data: [DONE]\n\n"

    def app(self) -> Any:
        async def models(request: Request) -> Response:
            return JSONResponse({"data": [{"id": "policy"}]})

        async def well(request: Request) -> Response:
            return Response()

        routes = [
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", well),
            *(Route(path, self.update, methods=["POST"]) for path in UPDATES),
        ]
        inner = Starlette(routes=routes)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if self.lives == 0 and scope["type"] == "http":
                await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
                return
            await inner(scope, receive, send)

        return app


@dataclass
class SamplingServer(Breakable):
    """A server of our own."""

    engine: Any = None  # a TorchEngine

    async def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"]
        if body.get("echo"):
            logprobs = [None, *(await self._score(prompt, 1.0))[1:], 0.0]
            return {"choices": [{"logprobs": {"token_logprobs": logprobs}, "finish_reason": "length"}]}
        temperature = body["temperature"]
        sampler = TorchSampler(
            self.engine.model,
            params=SamplingParams(temperature=temperature, max_tokens=body["max_tokens"], seed=body["seed"]),
            stop_token_ids=body["stop_token_ids"],
            pad_token_id=self.engine.pad_token_id,
        )
        async with sampler.session("") as session:
            found = await session.sample(prompt)
        assert found.logprobs is not None
        logprobs = list(found.logprobs)
        if self.raw:
            logprobs = (await self._score([*prompt, *found.token_ids], 1.0))[len(prompt) :]
        return {"choices": [_choice(found.token_ids, logprobs, "stop" if found.stopped else "length")]}

    async def _score(self, ids: Sequence[int], temperature: float) -> list[float]:
        row = Trajectory(task_id="", sample_index=0, segments=(Segment(TokenRole.CONTEXT, tuple(ids)),))
        return (await self.engine._in_worker(lambda: self.engine._score([row], temperature)))[0]

    async def load(self, path: str, body: dict[str, Any]) -> None:
        if path != "/reset_prefix_cache":
            model = load_model(self.updates[-1], self.engine.device, self.engine._dtype)
            self.engine.model.load_state_dict(model.state_dict())


@dataclass
class Proxy(Breakable):
    """A server before another one, which is real."""

    upstream: str = ""

    async def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        return await self._post("/v1/completions", {**body, "stream": False})

    async def load(self, path: str, body: dict[str, Any]) -> None:
        await self._post(path, body)

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        async with httpx2.AsyncClient(timeout=300, verify=False) as client:
            response = await client.post(self.upstream.removesuffix("/v1") + path, json=body)
            response.raise_for_status()
            return response.json() if response.text else {}


def _choice(ids: Sequence[int], logprobs: Sequence[float], reason: str | None) -> dict[str, Any]:
    return {"token_ids": list(ids), "logprobs": {"token_logprobs": list(logprobs)}, "finish_reason": reason}


@contextmanager
def sampling_server(model: Path) -> Iterator[SamplingServer]:
    """Serve a model on a free port of this machine."""
    server = SamplingServer(engine=TorchEngine(TorchConfig(model=str(model), device="cpu", dtype="float32")))
    with listening(server):
        yield server


@contextmanager
def listening(server: Breakable) -> Iterator[None]:
    """Serve on a free port of this machine, in a thread with a loop of its own."""
    listener = listen("127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    loop = asyncio.new_event_loop()
    serving = loop.create_task(serve_application(server.app(), listener))

    def run() -> None:
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(serving)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(serving.cancel)
        thread.join()
        loop.close()
