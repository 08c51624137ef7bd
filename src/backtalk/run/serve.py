"""Serve an OpenAI-compatible endpoint over a policy's sampler, for agents that other people wrote.

Token ids in, token ids out: the ids that a conversation's replies were sampled as are remembered, so that a
conversation that comes back is continued from them. It is recognised by its meaning and not by its bytes, as agents
write JSON anew and add fields. A reply that is not remembered is rendered with its calls in the policy's tool format.
Either way a prompt is, token for token, the one that training would have rendered (``History``). Each reply carries the
ids of its prompt, its own and their log-probabilities, under the names that vLLM gives them.
"""

from __future__ import annotations

import asyncio
import errno
import json
import math
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from itertools import count
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from backtalk.errors import BacktalkError, ConfigError
from backtalk.language.history import History
from backtalk.language.openai_chat import AssistantMessage, content_text, read_assistant, write_call
from backtalk.language.renderer import Renderer
from backtalk.messages import Message, ParsedAction, Part, clean_text
from backtalk.rollout.sampler import Completion, Sampler, SamplingParams, sample_action
from backtalk.run.chat_request import Request, stop_reply
from backtalk.trajectory import TokenRole

if TYPE_CHECKING:
    from starlette.applications import Starlette

REMEMBERED = 4096  # replies, each known by two keys


class ContextTooLong(ConfigError):
    """A history that leaves no room for a reply. Agents look for the code that OpenAI gives it, and summarise."""


class Endpoint:
    """Chat completions of one policy.

    ``open_sampler`` returns its sampler for some parameters. ``max_tokens`` is of a whole history, reply included.
    """

    def __init__(
        self,
        renderer: Renderer,
        open_sampler: Callable[[SamplingParams], Sampler],
        defaults: SamplingParams,
        *,
        max_tokens: int,
        name: str = "backtalk",
    ) -> None:
        self.name = name
        self._renderer, self._sampler = renderer, cache(open_sampler)
        self._defaults, self._max_tokens = defaults, max_tokens
        self._histories: OrderedDict[str, History] = OrderedDict()  # up to and with a reply
        self._numbers, self._salt = count(), token_hex(4)  # no call has the id of one before a restart

    async def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to one request, as plain data.

        Raises:
            ConfigError: the request asks for what cannot be served, or its history leaves no room for a reply.
        """
        request = Request.of(body, self._defaults)
        renderer = self._renderer.for_tools(request.tools)
        if (request.max_calls or math.inf) < renderer.config.max_calls_per_turn:
            raise ConfigError(
                f"parallel_tool_calls=false is not served, since a reply may hold {renderer.config.max_calls_per_turn} "
                "calls here; start the server with --set renderer.max_calls_per_turn=1"
            )
        conversation = Conversation.of(request)
        history = self._history(conversation, renderer)
        prompt = tuple(history.token_ids)
        tokens_left = self._max_tokens - len(prompt)
        if tokens_left < 1:
            raise ContextTooLong(
                f"this model's maximum context length is {self._max_tokens} tokens, and the history has {len(prompt)}"
            )
        number = next(self._numbers)
        async with self._sampler(request.params).session(f"serve/{number}") as session:
            room = min(tokens_left, request.max_tokens)
            end = renderer.action_end if request.may_call else None
            sampled = await sample_action(session, prompt, room, end)
        completion, action = stop_reply(sampled, request.stop, renderer)
        message = _write_reply(action, request.may_call, f"{self._salt}{number}")
        history.act(completion.token_ids)
        self._remember(conversation.keys_with(message), history)
        return self._answer(number, prompt, completion, message, renderer)

    def _history(self, conversation: Conversation, renderer: Renderer) -> History:
        """Return the conversation as training would have rendered it, from the last remembered reply on."""
        turns, history, start = conversation.turns, History(), 0
        for turn in range(len(turns), 0, -1):
            known = [self._histories[key] for key in conversation.keys[turn - 1] if key in self._histories]
            if known:
                history, start = known[0].copy(), turn
                history.observe(turns[turn - 1].answers, renderer)
                break
        else:
            if conversation.prompt:
                history.begin(conversation.prompt, renderer)
        for turn in turns[start:]:
            history.act(renderer.encode_message(turn.reply.text, turn.reply.calls, turn.reply.reasoning))
            history.observe(turn.answers, renderer)
        return history

    def _remember(self, keys: Sequence[str], history: History) -> None:
        for key in keys:
            self._histories[key] = history
            self._histories.move_to_end(key)
        while len(self._histories) > REMEMBERED:
            self._histories.popitem(last=False)

    def _answer(
        self,
        number: int,
        prompt: tuple[int, ...],
        completion: Completion,
        message: Mapping[str, Any],
        renderer: Renderer,
    ) -> dict[str, Any]:
        logprobs = completion.logprobs and {
            "content": [
                {"token": renderer.encoder.decode([token]), "logprob": value, "bytes": None, "top_logprobs": []}
                for token, value in zip(completion.token_ids, completion.logprobs, strict=True)
            ]
        }
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": "tool_calls" if "tool_calls" in message else "stop" if completion.stopped else "length",
            "logprobs": logprobs,
            "token_ids": list(completion.token_ids),
        }
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(completion.token_ids)}
        return {
            "id": f"chatcmpl-{number}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.name,
            "prompt_token_ids": list(prompt),
            "choices": [choice],
            "usage": usage | {"total_tokens": sum(usage.values())},
        }


def application(endpoint: Endpoint) -> Starlette:
    """Return the web application with the routes /v1/chat/completions, /v1/models and /health."""
    from starlette.applications import Starlette
    from starlette.requests import Request as HttpRequest
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def complete(request: HttpRequest) -> JSONResponse:
        try:
            body = json.loads(await request.body())
            if not isinstance(body, dict):
                raise ConfigError("the body has to be a JSON object")
            return JSONResponse(await endpoint.complete(body))
        except (BacktalkError, ValueError, TypeError) as error:
            code = "context_length_exceeded" if isinstance(error, ContextTooLong) else "invalid_request"
            answer = {"message": str(error), "type": "invalid_request_error", "code": code}
            return JSONResponse({"error": answer}, status_code=400)

    async def models(request: HttpRequest) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [{"id": endpoint.name, "object": "model"}]})

    async def health(request: HttpRequest) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    routes = [
        Route("/v1/chat/completions", complete, methods=["POST"]),
        Route("/v1/models", models),
        Route("/health", health),
    ]
    return Starlette(routes=routes)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address; whoever connects waits until it is served.

    Raises:
        ConfigError: the packages for serving are not installed, or the address cannot be had.
    """
    if find_spec("uvicorn") is None or find_spec("starlette") is None:
        raise ConfigError("serving needs uvicorn and starlette; type: pip install 'backtalk[serve]'")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        fix = "name an address of this machine with --host, 127.0.0.1 or 0.0.0.0"
        if error.errno == errno.EADDRINUSE:
            fix = f"another program listens there; end it, or choose another port, such as --port {port % 65535 + 1}"
        elif error.errno == errno.EACCES:
            fix = "ports below 1024 need root; choose another, such as --port 8000"
        raise ConfigError(f"cannot serve at {host} port {port} ({error.strerror}): {fix}") from error


async def serve(endpoint: Endpoint, listener: socket.socket) -> None:
    """Serve an endpoint until cancelled, as :func:`serve_application`."""
    await serve_application(application(endpoint), listener)


async def serve_application(app: Starlette, listener: socket.socket) -> None:
    """Serve a web application, until cancelled, to those who connect to a socket that listens (``listen``)."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:  # the caller has handlers of its own
            yield

    server = Server(uvicorn.Config(app, log_level="warning"))
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    try:
        await asyncio.shield(serving)
    except asyncio.CancelledError:
        server.should_exit = True
        await serving
        raise


@dataclass(frozen=True, slots=True)
class Turn:
    """A reply of the policy as a client's history has it, and the messages that answer it."""

    reply: AssistantMessage
    answers: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True)
class Conversation:
    """A history in turns. It is remembered up to each reply by two ``keys``: with the ids of the calls, and without.

    The same call may have been sampled in several ways, and its id tells which. If an agent has changed the ids, the
    last reply of that meaning is taken. ``end`` holds the keys of the whole history.
    """

    prompt: tuple[Message, ...]
    turns: tuple[Turn, ...]
    keys: tuple[tuple[str, str], ...]
    end: tuple[str, str]

    @classmethod
    def of(cls, request: Request) -> Conversation:
        """Read the messages of a request.

        Raises:
            ConfigError, DataError: a message cannot be served.
        """
        prompt: list[Message] = []
        turns: list[Turn] = []
        for message in request.messages:
            if message.get("role") == "assistant":
                reply = read_assistant(message)
                if turns and not turns[-1].answers:  # some agents send text and calls of a reply one after the other
                    reply = _join(turns.pop().reply, reply)
                turns.append(Turn(reply))
            elif turns:
                turns[-1] = replace(turns[-1], answers=(*turns[-1].answers, _read_message(message)))
            else:
                prompt.append(_read_message(message))
        tools = [[tool.name, tool.description, tool.parameters] for tool in request.tools]
        end, keys = _extend(("", ""), [tools, _texts(prompt)]), []
        for turn in turns:
            keys.append(end := _extend_by_reply(end, turn.reply))
            end = _extend(end, _texts(turn.answers))
        return cls(tuple(prompt), tuple(turns), tuple(keys), end)

    def keys_with(self, reply: Mapping[str, Any]) -> tuple[str, str]:
        """Return the keys of this conversation followed by a reply."""
        return _extend_by_reply(self.end, read_assistant(reply))


def _extend(keys: tuple[str, str], meaning: Any, ids: Sequence[str | None] = ()) -> tuple[str, str]:
    """Return the keys of a history and what follows it: one with the calls' ids, one without."""
    exact, loose = (
        sha256(f"{key}{json.dumps(content, sort_keys=True)}".encode()).hexdigest()
        for key, content in zip(keys, ([meaning, ids], meaning), strict=True)
    )
    return exact, loose


def _extend_by_reply(keys: tuple[str, str], reply: AssistantMessage) -> tuple[str, str]:
    calls = [[call.tool, _same_numbers(call.arguments)] for call in reply.calls]
    return _extend(keys, [reply.text.strip(), calls], reply.call_ids)


def _texts(messages: Sequence[Message]) -> list[list[str]]:
    return [[message.role, message.text] for message in messages]


def _same_numbers(value: Any) -> Any:
    """Return a JSON value in which 1.0 is 1, as JavaScript writes it."""
    if isinstance(value, Mapping):
        return {key: _same_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_same_numbers(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _join(first: AssistantMessage, second: AssistantMessage) -> AssistantMessage:
    return AssistantMessage(
        text="\n".join(filter(None, (first.text, second.text))),
        calls=first.calls + second.calls,
        call_ids=first.call_ids + second.call_ids,
        reasoning="\n".join(filter(None, (first.reasoning, second.reasoning))),
    )


def _read_message(message: Mapping[str, Any]) -> Message:
    role = {"developer": "system", "function": "tool"}.get(str(message.get("role")), str(message.get("role")))
    if role not in ("system", "user", "tool"):
        raise ConfigError(f"message role {message.get('role')!r} is not known; use system, user, assistant or tool")
    text = clean_text(content_text(message.get("content")))
    return Message(role, (Part(text, TokenRole.ENV_OUTPUT),), tool=message.get("name"))


def _write_reply(action: ParsedAction, may_call: bool, name: str) -> dict[str, Any]:
    """Return a reply as the protocol has it; an unreadable call stays text. ``name`` makes the ids of calls unique."""
    if not may_call or not action.calls:
        return {"role": "assistant", "content": action.text}
    calls = [write_call(call, f"call_{name}_{position}") for position, call in enumerate(action.calls)]
    return {"role": "assistant", "content": None, "tool_calls": calls}
