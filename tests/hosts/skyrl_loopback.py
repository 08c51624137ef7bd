"""An inference engine of SkyRL's kind on this machine: a small real model behind the routes that its client calls."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from skyrl.backends.skyrl_train.inference_servers.remote_inference_client import RemoteInferenceClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from backtalk.engines.torch.sampler import TorchSampler
from backtalk.rollout.sampler import SamplingParams


class Loopback:
    """The model's server; ``requests`` is what it was asked, ``answer`` may spoil what it answers."""

    def __init__(self, folder: str | Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.requests: list[dict[str, Any]] = []
        self.finished: list[str] = []
        self.spoil: Any = lambda choice: choice
        self.status = 200
        self._sampler: TorchSampler | None = None
        self.app = FastAPI()
        self.app.post("/inference/v1/generate")(self.generate)
        self.app.post("/finish_session")(self.finish_session)

    async def generate(self, request: Request) -> Any:
        """Sample as vLLM does with stop tokens and the log-probability of each token."""
        asked = await request.json()
        self.requests.append(asked | {"session": request.headers.get("X-Session-ID")})
        if self.status != 200:
            return Response(content='{"error": {"message": "no more"}}', status_code=self.status)
        params = asked["sampling_params"]
        if self._sampler is None:
            self._sampler = TorchSampler(
                self.model,
                params=SamplingParams(temperature=params["temperature"], max_tokens=4096, seed=0),
                stop_token_ids=params["stop_token_ids"],
                pad_token_id=self.tokenizer.pad_token_id,
            )
        async with self._sampler.session(f"{len(self.requests)}") as session:
            action = await session.sample(asked["token_ids"], params["max_tokens"])
        assert action.logprobs is not None
        choice = {
            "token_ids": list(action.token_ids),
            "logprobs": {"content": [{"logprob": x} for x in action.logprobs]},
            "finish_reason": "stop" if action.stopped else "length",
        }
        return {"choices": [self.spoil(choice)]}

    async def finish_session(self, session_id: str) -> dict[str, Any]:
        """Note that a rollout has ended."""
        self.finished.append(session_id)
        return {}


@contextmanager
def serve(folder: str | Path) -> Iterator[tuple[Loopback, RemoteInferenceClient]]:
    """Serve a model on this machine, and yield the server with SkyRL's own client of it."""
    loopback = Loopback(folder)
    server = uvicorn.Server(uvicorn.Config(loopback.app, port=0, log_level="error"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield (
            loopback,
            RemoteInferenceClient(proxy_url=url, server_urls=[url], data_parallel_size=1, tokenizer=loopback.tokenizer),
        )
    finally:
        server.should_exit = True
        thread.join(timeout=10)
