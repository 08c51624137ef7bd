"""An OpenAI-compatible endpoint over our sampler, for agents that other people wrote.

Token in, token out: what a conversation's replies were sampled as is remembered, so that a conversation that only grows
is continued from the very ids, and never tokenised again. Each reply carries its prompt's ids, its own and their
log-probabilities, under the names that vLLM gives them.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from backtalk.errors import BacktalkError, ConfigError
from backtalk.language.renderer import Renderer
from backtalk.messages import Message, ParsedAction, Part, ToolSpec
from backtalk.rollout.sampler import Completion, Sampler, SamplingParams
from backtalk.trajectory import TokenRole

if TYPE_CHECKING:
    from starlette.applications import Starlette

REMEMBERED = 4096  # conversations


class ContextTooLong(ConfigError):
    """A history that leaves no room for a reply. Agents look for the code that OpenAI gives it, and summarise."""


@dataclass(frozen=True, slots=True)
class Request:
    """One chat completion as it was asked for."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[ToolSpec, ...]
    params: SamplingParams
    max_tokens: int  # of the reply

    @classmethod
    def of(cls, body: Mapping[str, Any], defaults: SamplingParams) -> Request:
        """Raises ConfigError: what cannot be served, or is no request."""
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(m, Mapping) for m in messages):
            raise ConfigError("messages has to be a list of at least one message")
        if messages[-1].get("role") == "assistant":
            raise ConfigError("the last message is the assistant's; a reply follows one of the user or of a tool")
        if body.get("stream") or body.get("n", 1) != 1:
            raise ConfigError("stream=true and n > 1 are not served; ask for one whole reply at a time")
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or defaults.max_tokens
        temperature, seed = body.get("temperature"), body.get("seed")
        params = SamplingParams(
            temperature=defaults.temperature if temperature is None else float(temperature),
            max_tokens=defaults.max_tokens,
            seed=defaults.seed if seed is None else int(seed),
        )
        tools = tuple(_tool(tool) for tool in body.get("tools") or ())
        return cls(tuple(messages), tools, params, min(int(limit), defaults.max_tokens))


class Endpoint:
    """Chat completions from one policy. ``sampler_of`` makes its sampler for some parameters."""

    def __init__(
        self,
        renderer: Renderer,
        sampler_of: Callable[[SamplingParams], Sampler],
        defaults: SamplingParams,
        *,
        max_tokens: int,
        name: str = "backtalk",
    ) -> None:
        """``max_tokens`` is of a whole history, reply included."""
        self.name = name
        self._renderer, self._sampler_of, self._defaults, self._max_tokens = renderer, sampler_of, defaults, max_tokens
        self._samplers: dict[SamplingParams, Sampler] = {}
        self._known: OrderedDict[str, tuple[tuple[int, ...], tuple[int, ...]]] = OrderedDict()  # history, last reply
        self._numbers = count()

    async def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one request, as plain data.

        Raises:
            ConfigError: what was asked for cannot be served; a history that leaves no room for a reply.
        """
        request = Request.of(body, self._defaults)
        renderer = self._renderer.for_tools(request.tools)
        prompt = self._prompt(request, renderer)
        room = self._max_tokens - len(prompt)
        if room < 1:
            raise ContextTooLong(
                f"this model's maximum context length is {self._max_tokens} tokens, and the history has {len(prompt)}"
            )
        number = next(self._numbers)
        async with self._sampler(request.params).session(f"serve/{number}") as session:
            completion = await session.sample(prompt, min(room, request.max_tokens))
        action = renderer.parse_action(completion.token_ids, completion.stopped)
        message = _message(action, bool(request.tools))
        self._remember(request, message, prompt, completion.token_ids)
        return self._answer(number, request, prompt, completion, message, renderer)

    def _sampler(self, params: SamplingParams) -> Sampler:
        if params not in self._samplers:
            self._samplers[params] = self._sampler_of(params)
        return self._samplers[params]

    def _prompt(self, request: Request, renderer: Renderer) -> tuple[int, ...]:
        """The ids that the reply follows: those of the conversation so far where it only grew."""
        replies = [n for n, message in enumerate(request.messages) if message.get("role") == "assistant"]
        if not replies:
            segments = renderer.render_prompt([_said(message) for message in request.messages])
            return tuple(token for segment in segments for token in segment.token_ids)
        last = replies[-1]
        news = [_said(message) for message in request.messages[last + 1 :]]
        known = self._known.get(_key(request.tools, request.messages[: last + 1]))
        if known is not None:
            history, reply = known
            closed = reply[-1:] == (renderer.end_of_turn_id,)
            segments = renderer.render_observation(news, turn=len(replies) - 1, closed=closed)
            return history + reply + tuple(token for segment in segments for token in segment.token_ids)
        before = [_said(m) if m.get("role") != "assistant" else _text(m) for m in request.messages[: last + 1]]
        segments = renderer.render_history(before, news, turn=len(replies) - 1, branch=0)
        return tuple(token for segment in segments for token in segment.token_ids)

    def _remember(
        self, request: Request, message: Mapping[str, Any], prompt: tuple[int, ...], reply: tuple[int, ...]
    ) -> None:
        self._known[_key(request.tools, (*request.messages, message))] = (prompt, reply)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)

    def _answer(
        self,
        number: int,
        request: Request,
        prompt: tuple[int, ...],
        completion: Completion,
        message: Mapping[str, Any],
        renderer: Renderer,
    ) -> dict[str, Any]:
        decode = renderer.encoder.decode
        logprobs = completion.logprobs and [
            {"token": decode([token]), "logprob": value, "bytes": None, "top_logprobs": []}
            for token, value in zip(completion.token_ids, completion.logprobs, strict=True)
        ]
        ending = "tool_calls" if "tool_calls" in message else "stop" if completion.stopped else "length"
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": ending,
            "logprobs": None if logprobs is None else {"content": list(logprobs)},
            "token_ids": list(completion.token_ids),
        }
        used = {"prompt_tokens": len(prompt), "completion_tokens": len(completion.token_ids)}
        return {
            "id": f"chatcmpl-{number}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.name,
            "prompt_token_ids": list(prompt),
            "choices": [choice],
            "usage": used | {"total_tokens": sum(used.values())},
        }


def application(endpoint: Endpoint) -> Starlette:
    """The routes /v1/chat/completions, /v1/models and /health."""
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
            said = {"message": str(error), "type": "invalid_request_error", "code": code}
            return JSONResponse({"error": said}, status_code=400)

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


async def serve(endpoint: Endpoint, *, host: str, port: int) -> None:
    """Until it is cancelled.

    Raises:
        ConfigError: the packages for it are not installed.
        OSError: the address is taken.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise ConfigError("serving needs uvicorn and starlette; type: pip install 'backtalk[serve]'") from error

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:  # the caller has handlers of its own
            yield

    server = Server(uvicorn.Config(application(endpoint), host=host, port=port, log_level="warning"))
    serving = asyncio.ensure_future(server.serve())
    try:
        await asyncio.shield(serving)
    except asyncio.CancelledError:
        server.should_exit = True
        await serving
        raise


# ---------------------------------------------------------------- messages of the protocol, and ours


def _tool(tool: Mapping[str, Any]) -> ToolSpec:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ConfigError(f"tool {tool!r} is none of type function with a name")
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    return ToolSpec(function["name"], function.get("description") or "", parameters)


def _said(message: Mapping[str, Any]) -> Message:
    role = {"developer": "system", "function": "tool"}.get(str(message.get("role")), str(message.get("role")))
    if role not in ("system", "user", "tool"):
        raise ConfigError(f"message role {message.get('role')!r} is not known; use system, user, assistant or tool")
    return Message(role, (Part(_text(message), TokenRole.ENV_OUTPUT),), tool=message.get("name"))


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str) or content is None:
        return content or ""
    texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
    if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
        raise ConfigError("a message holds something other than text; only text is served")
    return "".join(str(text) for text in texts)


def _message(action: ParsedAction, may_call: bool) -> dict[str, Any]:
    """The reply as the protocol has it; a call that cannot be read stays text."""
    if not may_call or not action.calls:
        return {"role": "assistant", "content": action.text}
    calls = [
        {
            "id": f"call_{number}",
            "type": "function",
            "function": {"name": call.tool, "arguments": json.dumps(dict(call.arguments))},
        }
        for number, call in enumerate(action.calls)
    ]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def _key(tools: Sequence[ToolSpec], messages: Sequence[Mapping[str, Any]]) -> str:
    """What a conversation is known by: who said what. Agents add and drop fields, and null for none."""
    said = [
        [message.get("role"), _text(message), [call.get("function") for call in message.get("tool_calls") or ()]]
        for message in messages
    ]
    return json.dumps([[tool.name for tool in tools], said])
