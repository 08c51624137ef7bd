"""A server on this machine that speaks the REST calls of Foundry's fine-tuning sessions, over a model of PyTorch.

The calls are those of azure-ai-finetuningsessions 1.0.0b1, read from its code: a POST starts an operation, a GET asks
for its result, and both are JSON. It is for tests and `backtalk check`, where the SDK itself talks to it.
"""

from __future__ import annotations

import asyncio
import json
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from backtalk.engines.remote.local import LocalModel, LocalService, LocalWeights
from backtalk.engines.remote.service import AdamStep, Datum, ServiceError

PREFIX = "/api/projects/loopback/fine_tuning/sessions"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What goes wrong once: an answer in place of the one to an operation, or to the question for its result.

    ``operation`` is the last part of an address (optim_step), or the operation of which the result is asked.
    """

    operation: str
    status: int = 200
    body: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    is_result: bool = False  # in place of the result, and of the work too unless is_done
    is_done: bool = False  # the work was done all the same


class Refusal(Exception):
    """A request that is answered with an error status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(slots=True)
class _Session:
    model: LocalModel
    samplers: dict[str, LocalWeights] = field(default_factory=dict)
    results: dict[str, tuple[int, Mapping[str, Any], Mapping[str, str]]] = field(default_factory=dict)
    steps: int = 0


class Loopback:
    """The server. ``tokens`` are the bearer tokens that it takes, None for any; ``faults`` happen in their order."""

    def __init__(self, service: LocalService) -> None:
        self.service = service
        self.tokens: set[str] | None = None
        self.faults: list[Fault] = []
        self.calls: list[str] = []  # of the operations that were asked for, refused ones included
        self.sessions: dict[str, _Session] = {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"loopback": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}{PREFIX.partition('/fine_tuning')[0]}"

    def close(self) -> None:
        """Stop to answer."""
        self._server.shutdown()
        self._server.server_close()

    def answer(
        self, method: str, path: list[str], query: Mapping[str, list[str]], token: str, body: Any
    ) -> tuple[int, Mapping[str, Any], Mapping[str, str]]:
        """Return status, JSON and headers of the answer to a request; ``path`` follows the address of the sessions."""
        operation = path[-1] if path else "sessions"
        if self.tokens is not None and token not in self.tokens:
            return 401, {"error": {"code": "invalid_token", "message": "the token has expired"}}, {}
        with self._lock:
            try:
                if method == "GET":
                    return self._session(path[0]).results[path[2]]
                if operation in ("complete", "heartbeat"):
                    if operation == "complete":
                        del self.sessions[path[0]]
                    return 200, {"session_id": path[0]}, {}
                return self._start(operation, path, query, body)
            except Refusal as refusal:
                return refusal.status, {"error": {"message": str(refusal)}}, {}
            except (KeyError, TypeError, ValueError, ServiceError) as error:
                return 422, {"type": "validation_error", "message": repr(error)}, {}
            except Exception as error:
                return 500, {"message": repr(error)}, {}

    def _start(
        self, operation: str, path: list[str], query: Mapping[str, list[str]], body: Any
    ) -> tuple[int, Mapping[str, Any], Mapping[str, str]]:
        """Do an operation, and keep its result until it is asked for."""
        self.calls.append(operation)
        fault = next((fault for fault in self.faults if fault.operation == operation), None)
        if fault is not None:
            self.faults.remove(fault)
        result: dict[str, Any] = {}
        session_id = path[0] if path else f"session_{uuid.uuid4().hex[:8]}"
        if fault is None or fault.is_done:
            result = self._work(operation, session_id, query, body)
        if fault is not None and not fault.is_result:
            return fault.status, fault.body, fault.headers
        request_id = uuid.uuid4().hex
        envelope = (200, {"status": "completed", "result": result}, {})
        session = self._session(session_id)
        session.results[request_id] = envelope if fault is None else (fault.status, fault.body, fault.headers)
        return 200, {"request_id": request_id, "session_id": session_id, "status": "pending"}, {}

    def _session(self, session_id: str) -> _Session:
        if session_id not in self.sessions:
            raise Refusal(404, f"there is no session {session_id}")
        return self.sessions[session_id]

    def _work(self, operation: str, session_id: str, query: Mapping[str, list[str]], body: Any) -> dict[str, Any]:
        """Do an operation and return its result, in the words of the service."""
        if operation == "sessions":
            source = body.get("from_checkpoint")
            state = f"local/{source['source_session_id']}.{source['checkpoint_id']}" if source else None
            self.sessions[session_id] = _Session(self.service.open_model(state))
            return {}
        session = self._session(session_id)
        match operation:
            case "forward" | "forward_backward":
                return _forward(session.model, body[f"{operation}_input"], backward=operation == "forward_backward")
            case "optim_step":
                adam = body["adam_params"]
                betas = (adam.pop("beta1"), adam.pop("beta2"))
                norm = session.model.step(AdamStep(betas=betas, **adam))["local/grad_norm"]
                session.steps += 1
                return {"metrics": {"skyrl.ai/grad_norm": norm, "step_count": session.steps}}
            case "checkpoint":
                session.model.save(f"{session_id}.{body['path']}")
                return {"checkpoint_id": body["path"], "path": f"loom://{session_id}/weights/{body['path']}"}
            case "checkpoint_sample":
                name = f"ss{body['sampling_session_seq_id']}_seq{body['seq_id']}"
                session.samplers[name] = session.model.sampling_weights()
                return {}
            case "sample":
                return _sample(session.samplers[query["checkpoint_id"][0]], body)
            case _:
                raise Refusal(404, f"there is no operation {operation}")


def _forward(model: LocalModel, request: Any, *, backward: bool) -> dict[str, Any]:
    rows: list[Datum] = []
    for datum in request["data"]:
        ids = [token for chunk in datum["model_input"]["chunks"] for token in chunk["tokens"]]
        inputs = {name: tensor["data"] for name, tensor in datum["loss_fn_inputs"].items()}
        targets = list(map(int, inputs.pop("target_tokens")))  # the SDK sends all numbers of a row as floats
        if ids[1:] != targets[:-1] or any(len(values) != len(ids) for values in inputs.values()):
            raise ValueError("inputs, targets and numbers of a row are not aligned")
        rows.append(Datum(token_ids=[*ids, targets[-1]], inputs=inputs))
    found = model.run(rows, request["loss_fn"], backward=backward)
    return {"loss_fn_outputs": [{"logprobs": {"data": row, "dtype": "float32", "shape": [len(row)]}} for row in found]}


def _sample(weights: LocalWeights, request: Any) -> dict[str, Any]:
    params = request["sampling_params"]
    prompt = [token for chunk in request["prompt"]["chunks"] for token in chunk["tokens"]]
    completion = asyncio.run(
        weights.sample(
            prompt,
            max_tokens=params["max_tokens"],
            temperature=params["temperature"],
            seed=params["seed"],
            stop=params.get("stop_criteria", ()),
        )
    )
    return {"sequences": [{"tokens": completion.token_ids, "logprobs": completion.logprobs}]}


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    loopback: Loopback
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer leaves in one piece, or the other side waits before it acknowledges the first

    def _serve(self) -> None:
        url = urlsplit(self.path)
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or "{}")
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        path = [part for part in url.path.removeprefix(PREFIX).split("/") if part]
        status, answer, headers = self.loopback.answer(self.command, path, parse_qs(url.query), token, body)
        data = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = _serve

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""
